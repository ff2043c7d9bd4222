"""When does ICPO help? GRPO against ICPO on the built-in task, over regimes, reward noise and seeds.

    python results/study.py            run what is missing (on a clone: nothing), print the tables, draw curves.png
    python results/study.py --rerun    from nothing
    python results/study.py --tune     the search that chose the default, on seeds that the tables do not use

Runs are paired by seed: the same warm start, the same prompts in the same order, the same random numbers for
sampling. They go two at a time, each on one thread; a finished run is a line of study.jsonl (tuning.jsonl), and is not
run again. The figure needs matplotlib.

"ICPO reward" is icpo.py's one form of the method, at alpha 0.4. The other forms in FORMS were tried, "ICPO gated" was
the default of the first edition, and the logs are that edition's.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "results", ROOT / "runs"
WARM_STARTS = RUNS / "study"
REGIMES = {
    "overconfident 90 %": dict(task_teacher_error=0.9),  # the carry in one answer of ten, the arithmetic learned
    "overconfident 98 %": dict(task_teacher_error=0.98),  # in one of a hundred
    "slipping": dict(task_teacher_error=0.0, task_warmup_steps=400),  # right demonstrations, too few: unsure where it errs
}
NOISES = (0.0, 0.2)
METHODS = {
    "GRPO": dict(alpha=0.0),
    "ICPO reward": dict(alpha=0.4),
    "ICPO gated": dict(form="gated", alpha=0.9),
}
SEEDS = range(16)
TUNING = METHODS | {
    "reward, alpha falls to 0": dict(alpha=0.4, alpha_end=0.0),
    "reward, uniform groups kept": dict(alpha=0.4, keep_uniform_groups=True),
    "reward, alpha 0.45 times trust": dict(form="trusted reward", alpha=0.45),
    "gated, alpha 0.5": dict(form="gated", alpha=0.5),
    "gated, beta 3": dict(form="gated", alpha=0.9, beta=3.0),
    "gated, beta 30": dict(form="gated", alpha=0.9, beta=30.0),
    "gated, alpha 0.5, no trust": dict(form="untrusted", alpha=0.5),
    "gated, no trust": dict(form="untrusted", alpha=0.9),
    "gated, no trust, alpha falls to 0": dict(form="untrusted", alpha=0.9, alpha_end=0.0),
    "gated, no trust, amplifying only": dict(form="amplifying", alpha=0.9),
    "gated, the agreement's own sign": dict(form="signed", alpha=0.9),
    "opposite sign, alpha 0.5, no trust": dict(form="opposite", alpha=0.5),
}
TUNING_SEEDS = range(100, 106)
FORMS = {  # other joins of GRPO's advantage A, preference s, agreement c, weight a and rewards R
    "gated": lambda A, s, c, a, R: A + a * (2 * c).clamp(0, 1) * A.abs() * s,
    "untrusted": lambda A, s, c, a, R: A + a * A.abs() * s,
    "amplifying": lambda A, s, c, a, R: A + a * A * (A.sign() * s).clamp(min=0),
    "signed": lambda A, s, c, a, R: A + a * c * A.abs() * s,
    "opposite": lambda A, s, c, a, R: A - a * A.abs() * s,
    "trusted reward": lambda A, s, c, a, R: group_advantage(R + a * c.clamp(min=0) * s) * (A != 0).any(dim=1, keepdim=True),
}
STEPS = 60
EVALUATED = {"greedy accuracy": "eval/accuracy", "sampled accuracy": "eval/mean_at_k", "pass@8": "eval/pass_at_k"}
CLAIMS = {"area": 1, "overconfident": -1, "steps to 0.8": -1, "entropy at the end": 1}  # and which sign is the better one

sys.path.insert(0, str(ROOT))
if __name__ == "__mp_main__":  # a worker; the tables and the figure do without torch
    import torch
    import icpo
    from icpo import group_advantage, icpo_advantage, preference_advantage
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------------------- Runs


def quietly(function, *args):
    """Calls it with what it prints kept away from the progress bar."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return function(*args)


def task_folder(regime: str, seed: int) -> Path:
    return WARM_STARTS / f"{regime.replace(' %', '').replace(' ', '-')}-{seed}"


def warm_start(job: tuple[str, int]) -> None:
    regime, seed = job
    if not task_folder(regime, seed).exists():
        with tempfile.TemporaryDirectory(dir=WARM_STARTS) as scratch:
            config = icpo.Config(seed=seed, device="cpu", **REGIMES[regime])
            quietly(icpo.write_task, Path(scratch) / "run", config)
            os.rename(Path(scratch) / "run" / "task", task_folder(regime, seed))


def variant(form: str | None, start: float, end: float):
    """What stands in for icpo_advantage: another form, or an alpha that moves linearly from start to end of the run."""
    alphas = iter(np.linspace(start, end, STEPS))

    def advantage(rewards, seq_log_probs, alpha, beta, keep_uniform_groups=False):
        alpha = float(next(alphas))
        if form is None:
            return icpo_advantage(rewards, seq_log_probs, alpha, beta, keep_uniform_groups)
        A, s = group_advantage(rewards), preference_advantage(seq_log_probs, beta)
        agreement = (A * s).sum() / (A * s).abs().sum().clamp(min=1e-9)
        return FORMS[form](A, s, agreement, alpha, rewards)

    return advantage


def train(variant=None, **settings) -> list[dict]:
    """The rows of metrics.jsonl of a run that leaves nothing else; variant stands in for icpo_advantage."""
    import icpo
    import torch
    torch.set_num_threads(1)  # two runs go at a time
    own = icpo.icpo_advantage
    with tempfile.TemporaryDirectory(dir=RUNS) as out:
        try:
            icpo.icpo_advantage = variant or own
            quietly(icpo.train, icpo.Config(output_dir=f"{out}/run", save_every=1000, **settings))
        except KeyboardInterrupt:
            sys.exit(130)  # of a worker that is told to stop, a traceback shows nothing
        finally:
            icpo.icpo_advantage = own
        return [json.loads(line) for line in open(f"{out}/run/metrics.jsonl")]


def run(job: dict) -> dict:
    """One run: the job with its curves, evaluations and means."""
    settings, task = dict(job["settings"]), task_folder(job["regime"], job["seed"])
    form, alpha = settings.pop("form", None), settings.pop("alpha")
    end = settings.pop("alpha_end", alpha)
    rows = train(
        variant(form, alpha, end), model=str(task / "model"), train_data=str(task / "train.jsonl"), seed=job["seed"],
        eval_data=str(task / "eval.jsonl") if job["evaluate"] else None, eval_every=30, eval_rows=128, steps=STEPS,
        reward_noise=job["noise"], max_new_tokens=32, micro_batch=32, lr=1e-4, device="cpu", **settings)

    def curve(name: str, digits: int) -> list:
        return [None if row[name] is None else round(row[name], digits) for row in rows[1:]]

    evaluated = [row for row in rows if "eval/accuracy" in row]
    verified, entropy, agreement = curve("reward/verified", 3), curve("entropy", 4), curve("preference/agreement", 2)
    means = {
        "area": float(np.mean(verified)), "end": float(np.mean(verified[-10:])), "entropy at the end": float(np.mean(entropy[-10:])),
        "agreement at first": float(np.mean(agreement[:10])), "agreement at the end": float(np.mean(agreement[-10:])),
        "overconfident": float(np.mean(curve("confidence/overconfident_frac", 4))),
        "uniform groups": float(np.mean(curve("groups/uniform_frac", 4))),
    } | {f"l of {kind} at the end": float(np.mean([x for x in curve(f"confidence/{kind}", 4)[-10:] if x is not None] or [np.nan]))
         for kind in ("correct", "wrong")}
    result = job | {"means": {name: None if np.isnan(value) else round(value, 4) for name, value in means.items()}}
    if job["evaluate"]:
        result |= {"verified": verified, "entropy": entropy, "agreement": agreement,
                   "evaluations": {name: [round(row[name], 4) for row in evaluated] for name in EVALUATED.values()}}
    return result


def warm_starts(jobs: list[dict], pool) -> None:
    """Makes the warm starts of jobs that are missing."""
    WARM_STARTS.mkdir(parents=True, exist_ok=True)
    starts = list(dict.fromkeys((job["regime"], job["seed"]) for job in jobs))
    for _ in tqdm(pool.imap_unordered(warm_start, starts), total=len(starts), desc="warm starts"):
        pass


def plan(methods: dict, seeds: range, evaluate: bool) -> list[dict]:
    """The jobs: the more noisy ones first, whole seeds one after another."""
    return [dict(regime=regime, noise=noise, method=method, seed=seed, settings=settings, evaluate=evaluate)
            for seed in seeds for noise in NOISES[::-1] for regime in REGIMES for method, settings in methods.items()]


def complete(log: Path, jobs: list[dict], run, prepare=None) -> list[dict]:
    """The rows of the jobs, each a job and what run(job) found, in their order: what the log lacks runs, two at a time."""

    def key(row: dict) -> str:
        return json.dumps([row.get(name) for name in jobs[0]])

    rows = {key(row): row for row in map(json.loads, log.open())} if log.exists() else {}
    missing = [job for job in jobs if key(job) not in rows]
    if missing:
        RUNS.mkdir(exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(2) as pool, log.open("a") as file:
            if prepare:
                prepare(missing, pool)
            done = pool.imap_unordered(run, missing)
            for row in tqdm(done, desc="runs", initial=len(jobs) - len(missing), total=len(jobs)):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows[key(row)] = row
    return [rows[key(job)] for job in jobs]


# -------------------------------------------------------------------------------------------------------------- Tables

# Student's t of a two-sided 95 % interval, for 1 to 23 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069)


def interval(values) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(T975[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5)


def level(values) -> str:
    return "{:.3f} ± {:.3f}".format(*interval(values))


def difference(values, better: int) -> str:
    """Of differences: mean and 95 % interval; ✓ better or ✗ worse if it leaves out 0, better being the better sign."""
    mean, half = interval(values)
    mark = ("✓ " if mean * better > 0 else "✗ ") if better and abs(mean) > half else ""
    return f"{mark}{mean:+.3f} ± {half:.3f}"


def steps_to(curve: list[float], level: float) -> int:
    """The first step at which the mean of the last five reaches the level, else one more than there are."""
    means = np.convolve(curve, np.ones(5) / 5, mode="valid")
    return int(np.argmax(means >= level)) + 5 if (means >= level).any() else len(curve) + 1


def measure(row: dict, name: str) -> float:
    if name in EVALUATED:
        return row["evaluations"][EVALUATED[name]][-1]
    return steps_to(row["verified"], 0.8) if name == "steps to 0.8" else row["means"][name]


def cells(rows: list[dict], method: str) -> list[list[dict]]:
    """A method's runs in each regime without and with noise, by seed."""
    return [sorted((row for row in rows if (row["regime"], row["noise"], row["method"]) == (regime, noise, method)),
                   key=lambda row: row["seed"]) for regime in REGIMES for noise in NOISES]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def table(first: str, lines: list[tuple[str, list[str]]]) -> str:
    header = [first, *(f"{regime}, {'noisy' if noise else 'clean'}" for regime in REGIMES for noise in NOISES)]
    return markdown(header, [[name, *fields] for name, fields in lines])


def levels(rows: list[dict], name: str) -> str:
    """Mean and 95 % interval of a measure: a line for each method, a column for each cell."""
    return table(name, [(method, [level([measure(row, name) for row in cell]) for cell in cells(rows, method)])
                        for method in METHODS])


def differences(rows: list[dict], measures: dict[str, int]) -> str:
    """Measures minus GRPO's of the same seed; ✓ better or ✗ worse if the 95 % interval leaves out 0."""
    lines = []
    for name, better in measures.items():
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "GRPO"):
            fields = [difference([measure(a, name) - measure(b, name) for a, b in zip(own, base, strict=True)], better)
                      for own, base in zip(cells(rows, method), cells(rows, "GRPO"))]
            lines.append((method if len(measures) == 1 else f"{name}: {method}", fields))
    return table("minus GRPO's" if len(measures) > 1 else f"{name}, minus GRPO's", lines)


# -------------------------------------------------------------------------------------------------------------- Figure


def band(ax, curves: np.ndarray, color: str, style: str, label: str) -> None:
    """Mean and 95 % interval of curves (seeds, steps), themselves means of five steps."""
    means = np.array([np.convolve(curve, np.ones(5) / 5, mode="valid") for curve in curves])
    mean, half = map(np.array, zip(*(interval(column) for column in means.T)))
    x = np.arange(5, 5 + len(mean))
    ax.plot(x, mean, style, color=color, label=label, linewidth=1.6)
    ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.16, linewidth=0)


def figure(rows: list[dict], path: Path) -> None:
    """Accuracy of the sampled responses, its difference to GRPO of the same seed, and the agreement, by regime."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    styles = {"GRPO": ("#444444", "-"), "ICPO reward": ("#E69F00", "--"), "ICPO gated": ("#0072B2", "-")}  # Okabe and Ito's
    kinds = [("verified", 0.2, False, "share of samples right,\n20 % of rewards flipped"),
             ("verified", 0.2, True, "that minus GRPO's\nof the same seed"),
             ("verified", 0.0, True, "the same difference,\nclean rewards"),
             ("agreement", 0.2, False, "agreement, 20 %\nof rewards flipped")]

    def curves(name: str, method: str, cell: int) -> np.ndarray:  # (seeds, steps)
        return np.array([row[name] for row in cells(rows, method)[cell]])

    plt.rcParams.update({"font.size": 10})
    _, axes = plt.subplots(4, 3, figsize=(8.8, 8.8), sharex=True, sharey="row", layout="constrained")
    for i, (name, noise, paired, label) in enumerate(kinds):
        for j, regime in enumerate(REGIMES):
            ax, cell = axes[i, j], len(NOISES) * j + NOISES.index(noise)
            for method, (color, style) in styles.items():
                values = curves(name, method, cell) - paired * curves(name, "GRPO", cell)
                band(ax, values, color, style, method)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            if name == "agreement":
                ax.axhline(0, color="black", linewidth=0.8)
                ax.set_xlabel("training step")
            if i == 0:
                ax.set_title(regime, fontsize=11)
            if j == 0:
                ax.set_ylabel(label)
    axes[0, 0].legend(loc="lower right", frameon=False)
    plt.savefig(path, dpi=150)
    print(f"figure: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rerun", action="store_true", help="delete the logs first")
    parser.add_argument("--tune", action="store_true", help="the search for the default instead")
    args = parser.parse_args()
    log = RESULTS / ("tuning.jsonl" if args.tune else "study.jsonl")
    if args.rerun:
        log.unlink(missing_ok=True)
    if args.tune:
        rows = complete(log, plan(TUNING, TUNING_SEEDS, evaluate=False), run, warm_starts)
        print(differences(rows, {"area": 1}) + "\n\n" + differences(rows, {"end": 1}))
        return
    rows = complete(log, plan(METHODS, SEEDS, evaluate=True), run, warm_starts)
    print(differences(rows, CLAIMS))
    for name in (*EVALUATED, *CLAIMS, "l of correct at the end", "l of wrong at the end", "uniform groups",
                 "agreement at first", "agreement at the end"):
        print("\n" + levels(rows, name))
    if importlib.util.find_spec("matplotlib"):
        figure(rows, RESULTS / "curves.png")
    else:
        print("no figure: pip install matplotlib")


if __name__ == "__main__":
    main()
