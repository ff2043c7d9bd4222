"""When does ICPO help? GRPO against ICPO on the built-in task, over regimes, reward noise and seeds.

    python results/study.py            print the tables of the log, draw curves.png
    python results/study.py --run      the same, after running what the log lacks
    python results/study.py --rerun    the same from nothing: two to five hours on two cores
    python results/study.py --tune     the search for the default, on seeds that the tables do not use

Runs are paired by seed: the same warm start, the same prompts in the same order, the same random numbers for
sampling. They go two at a time, each on one thread; a finished run is a line of study.jsonl (tuning.jsonl)
and is not run again. The figure needs matplotlib; it shows real_model.py's runs beside, as far as there are any.
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
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "results", ROOT / "runs"
WARM_STARTS = RUNS / "study"
sys.path.insert(0, str(ROOT))

REGIMES = {
    "90%": dict(task_teacher_error=0.9),  # overconfident: the carry in one answer of ten
    "98%": dict(task_teacher_error=0.98),  # overconfident: in one of a hundred
    "slipping": dict(task_teacher_error=0.0, task_warmup_steps=400),  # right, but too few demonstrations
}
NOISES = {0.0: "clean", 0.2: "noisy", 0.35: "noisier"}  # the probability that a training reward is flipped
CELLS = [(regime, noise) for regime in REGIMES for noise in NOISES if (regime, noise) != ("90%", 0.35)]
METHODS = {
    "GRPO": dict(alpha=0.0),
    "ICPO": dict(alpha=0.1),
    "uniform kept": dict(alpha=0.1, keep_uniform_groups=True),
    "alpha 0.4": dict(alpha=0.4),
    "adaptive": dict(form="adaptive", alpha=0.4),
    "gated": dict(form="gated", alpha=0.9),
}
SEEDS = range(16)
TUNING = {
    "GRPO": dict(alpha=0.0),
    "alpha 0.1": dict(alpha=0.1),
    "alpha 0.2": dict(alpha=0.2),
    "alpha 0.4": dict(alpha=0.4),
    "alpha 0.1, beta 30": dict(alpha=0.1, beta=30.0),
    "alpha 0.2, beta 30": dict(alpha=0.2, beta=30.0),
    "alpha 0.4, beta 30": dict(alpha=0.4, beta=30.0),
}
VARIANTS = {  # tried in the first edition (tuning_first_edition.jsonl), and run after the others
    "alpha 0.4, falling to 0": dict(alpha=0.4, alpha_end=0.0),
    "alpha 0.4, uniform kept": dict(alpha=0.4, keep_uniform_groups=True),
    "alpha 0.45 times agreement": dict(form="weighted", alpha=0.45),
    "gated": dict(form="gated", alpha=0.9),
    "gated, alpha 0.5": dict(form="gated", alpha=0.5),
    "gated, beta 3": dict(form="gated", alpha=0.9, beta=3.0),
    "gated, beta 30": dict(form="gated", alpha=0.9, beta=30.0),
    "untrusted, alpha 0.5": dict(form="untrusted", alpha=0.5),
    "untrusted": dict(form="untrusted", alpha=0.9),
    "untrusted, falling to 0": dict(form="untrusted", alpha=0.9, alpha_end=0.0),
    "amplifying": dict(form="amplifying", alpha=0.9),
    "signed": dict(form="signed", alpha=0.9),
    "opposite, alpha 0.5": dict(form="opposite", alpha=0.5),
}
TUNING_SEEDS = range(100, 106)
FORMS = {  # other joins of rewards R, GRPO's advantage A = N(R), preference s, agreement c, weight a
    "adaptive": lambda R, N, A, s, c, a: N(R + a * (2 * c).clamp(0, 1) * s) * (A != 0).any(1, keepdim=True),
    "weighted": lambda R, N, A, s, c, a: N(R + a * c.clamp(min=0) * s) * (A != 0).any(1, keepdim=True),
    "gated": lambda R, N, A, s, c, a: A + a * (2 * c).clamp(0, 1) * A.abs() * s,
    "untrusted": lambda R, N, A, s, c, a: A + a * A.abs() * s,
    "amplifying": lambda R, N, A, s, c, a: A + a * A * (A.sign() * s).clamp(min=0),
    "signed": lambda R, N, A, s, c, a: A + a * c * A.abs() * s,
    "opposite": lambda R, N, A, s, c, a: A - a * A.abs() * s,
}
STEPS = 60
CURVES = {  # what the log keeps of each step, and to how many digits
    "reward/verified": 3, "entropy": 3, "preference/agreement": 2, "confidence/overconfident_frac": 2,
    "groups/uniform_frac": 2, "confidence/correct": 2, "confidence/wrong": 2}
EVALUATED = ("eval/accuracy", "eval/mean_at_k", "eval/pass_at_k")
MEASURES = {
    "area": lambda row: row["area"],
    "steps to 0.8": lambda row: steps_to(row["reward/verified"], 0.8),
    "sampled accuracy": lambda row: row["eval/mean_at_k"][-1],
    "greedy accuracy": lambda row: row["eval/accuracy"][-1],
    "pass@8 halfway": lambda row: row["eval/pass_at_k"][1],
    "pass@8": lambda row: row["eval/pass_at_k"][-1],
    "entropy": lambda row: np.mean(row["entropy"]),
    "final entropy": lambda row: np.mean(row["entropy"][-10:]),
    "overconfident": lambda row: np.mean(row["confidence/overconfident_frac"]),
    "confidence gap": lambda row: np.nanmean(
        np.array(row["confidence/correct"], dtype=float) - np.array(row["confidence/wrong"], dtype=float)),
    "uniform groups": lambda row: np.mean(row["groups/uniform_frac"]),
    "first agreement": lambda row: np.mean(row["preference/agreement"][:10]),
    "final agreement": lambda row: np.mean(row["preference/agreement"][-10:]),
}


# ------------------------------------------------------------------------------------------------------- Runs


def quietly(function, *args):
    """Calls it with what it prints kept away from the progress bar."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return function(*args)


def rows_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def task_folder(regime: str, seed: int) -> Path:
    return WARM_STARTS / f"{regime}-{seed}"


def warm_start(job: tuple[str, int]) -> None:
    import icpo
    import torch
    torch.set_num_threads(1)
    regime, seed = job
    if not task_folder(regime, seed).exists():
        with tempfile.TemporaryDirectory(dir=WARM_STARTS) as scratch:
            config = icpo.Config(seed=seed, device="cpu", **REGIMES[regime])
            quietly(icpo.write_task, Path(scratch) / "run", config)
            os.rename(Path(scratch) / "run" / "task", task_folder(regime, seed))


def variant(form: str | None, start: float, end: float | None = None):
    """What stands in for icpo_advantage: itself or another form, with alpha moving from start to end."""
    from icpo import group_advantage, icpo_advantage, preference_advantage
    alphas = iter(np.linspace(start, start if end is None else end, STEPS).tolist())

    def advantage(rewards, seq_log_probs, alpha, beta, keep_uniform_groups=False):
        alpha = next(alphas)
        if form is None:
            return icpo_advantage(rewards, seq_log_probs, alpha, beta, keep_uniform_groups)
        A, s = group_advantage(rewards), preference_advantage(seq_log_probs, beta)
        agreement = (A * s).sum() / (A * s).abs().sum().clamp(min=1e-9)
        return FORMS[form](rewards, group_advantage, A, s, agreement, alpha)

    return advantage


def train(advantage=None, noise: float = 0.0, **settings) -> list[dict]:
    """The rows of metrics.jsonl of a run that leaves nothing else; advantage stands in for icpo_advantage.

    noise is the probability that the update gets 1 - R for a reward R of the verifier. What is correct is still
    told by the verifier's rewards; the spread, the uniform groups and the agreement are those trained on.
    """
    import icpo
    import torch
    torch.set_num_threads(1)  # two runs go at a time
    own_advantage, own_metrics, trained_on = advantage or icpo.icpo_advantage, icpo.rollout_metrics, None

    def noisy_advantage(rewards, *args):
        nonlocal trained_on
        trained_on = torch.where(torch.rand(rewards.shape) < noise, 1 - rewards, rewards)
        return own_advantage(trained_on, *args)

    def noisy_metrics(rollout, rewards, *args):
        noisy = own_metrics(rollout, trained_on, *args)
        names = ("reward/std", "groups/uniform_frac", "preference/agreement")
        return own_metrics(rollout, rewards, *args) | {name: noisy[name] for name in names}

    with tempfile.TemporaryDirectory(dir=RUNS) as out:
        try:
            with patch.multiple(icpo, icpo_advantage=noisy_advantage, rollout_metrics=noisy_metrics):
                quietly(icpo.train, icpo.Config(output_dir=f"{out}/run", save_every=1000, **settings))
        except KeyboardInterrupt:
            sys.exit(130)  # of a worker that is told to stop, a traceback shows nothing
        return rows_of(Path(out) / "run/metrics.jsonl")


def run(job: dict) -> dict:
    """One run: the job with its area; if it is evaluated, with its evaluations and curves too."""
    settings, task = dict(job["settings"]), task_folder(job["regime"], job["seed"])
    advantage = variant(settings.pop("form", None), settings.pop("alpha"), settings.pop("alpha_end", None))
    rows = train(
        advantage, job["noise"], model=str(task / "model"), train_data=str(task / "train.jsonl"), device="cpu", seed=job["seed"],
        eval_data=str(task / "eval.jsonl") if job["evaluate"] else None, eval_every=30, eval_rows=96,
        steps=STEPS, max_new_tokens=32, micro_batch=128, lr=1e-4, **settings)
    result = job | {"area": round(float(np.mean([row["reward/verified"] for row in rows[1:]])), 4)}
    if job["evaluate"]:
        evaluated = [row for row in rows if "eval/accuracy" in row]
        result |= {name: [round(row[name], 4) for row in evaluated] for name in EVALUATED}
        result |= {name: [None if row[name] is None else round(row[name], digits) for row in rows[1:]]
                   for name, digits in CURVES.items()}
    return result


def warm_starts(jobs: list[dict], pool) -> None:
    """Makes the warm starts of jobs that are missing."""
    WARM_STARTS.mkdir(parents=True, exist_ok=True)
    starts = list(dict.fromkeys((job["regime"], job["seed"]) for job in jobs))
    for _ in tqdm(pool.imap_unordered(warm_start, starts), total=len(starts), desc="warm starts"):
        pass


def plan(methods: dict, seeds: range, cells: list, evaluate: bool) -> list[dict]:
    """The jobs, whole seeds one after another: a log that breaks off is balanced."""
    return [dict(regime=regime, noise=noise, method=method, seed=seed, settings=settings, evaluate=evaluate)
            for seed in seeds for regime, noise in cells for method, settings in methods.items()]


def logged(log: Path, jobs: list[dict]) -> dict[str, dict]:
    """What a log holds of jobs, in their order: by the job, the job and what run(job) found."""

    def key(row: dict) -> str:
        return json.dumps([row.get(name) for name in jobs[0]])

    rows = {key(row): row for row in rows_of(log)}
    return {json.dumps(job): rows[key(job)] for job in jobs if key(job) in rows}


def complete(log: Path, jobs: list[dict], args, run, report, prepare=None) -> None:
    """Reports what the log holds of the jobs, after running what it lacks, two at a time, if args say so."""
    if args.rerun:
        log.unlink(missing_ok=True)
    known = logged(log, jobs)
    missing = [job for job in jobs if json.dumps(job) not in known]
    if missing and (args.run or args.rerun):
        RUNS.mkdir(exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(2) as pool, log.open("a") as file:
            if prepare:
                prepare(missing, pool)
            done = pool.imap_unordered(run, missing)
            for row in tqdm(done, desc="runs", initial=len(known), total=len(jobs)):
                file.write(json.dumps(row) + "\n")
                file.flush()
        known = logged(log, jobs)
    elif missing:
        print(f"{log.name} has {len(known)} of {len(jobs)} runs; --run makes the others", file=sys.stderr)
    if known:
        report(list(known.values()))


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="first run what the log lacks")
    parser.add_argument("--rerun", action="store_true", help="delete the log, and run everything")
    return parser


# ----------------------------------------------------------------------------------------------------- Tables

# Student's t of a two-sided 95% interval, for 1 to 23 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069)


def interval(values) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(T975[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5)


def level(values) -> str:
    return "{:.3f} ± {:.3f}".format(*interval(values)) if len(values) > 1 else ""


def difference(values) -> str:
    """Of differences: mean and 95% interval, bold if it leaves out 0."""
    if len(values) < 2:
        return ""
    mean, half = interval(values)
    return f"**{mean:+.3f} ± {half:.3f}**" if abs(mean) > half else f"{mean:+.3f} ± {half:.3f}"


def steps_to(curve: list[float], level: float) -> int:
    """The first step at which the mean of the last five reaches the level, else one more than there are."""
    means = np.convolve(curve, np.ones(5) / 5, mode="valid")
    return int(np.argmax(means >= level)) + 5 if (means >= level).any() else len(curve) + 1


def by_seed(rows: list[dict], **wanted) -> dict[int, dict]:
    return {row["seed"]: row for row in rows if all(row[name] == value for name, value in wanted.items())}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def compared(rows: list[dict], measure, **cell) -> list[str]:
    """A measure in a cell: GRPO's, and by how much each other method's differs from it on the same seeds."""
    base = by_seed(rows, method="GRPO", **cell)
    fields = [level([measure(row) for row in base.values()])]
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "GRPO"):
        own = by_seed(rows, method=method, **cell)
        fields.append(difference([measure(own[seed]) - measure(base[seed]) for seed in own if seed in base]))
    return fields


def table(rows: list[dict], name: str, methods: dict, by_method: bool = False) -> str:
    """A measure by cell (a line each, or a column each): GRPO's level, and the other methods minus GRPO's."""
    rows = sorted(rows, key=lambda row: list(methods).index(row["method"]))
    others = dict.fromkeys(row["method"] for row in rows if row["method"] != "GRPO")
    lines = [[name, "GRPO", *others]] + [
        [f"{regime} {NOISES[noise]}", *compared(rows, MEASURES[name], regime=regime, noise=noise)]
        for regime, noise in CELLS if by_seed(rows, regime=regime, noise=noise)]
    header, *lines = map(list, zip(*lines)) if by_method else lines
    return markdown(header, lines)


# ----------------------------------------------------------------------------------------------------- Figure

STYLES = {  # the colors are Okabe and Ito's
    "GRPO": ("#444444", "-"), "ICPO": ("#0072B2", "-"), "adaptive": ("#009E73", "--"),
    "alpha 0.4": ("#E69F00", "-")}


def band(ax, curves: np.ndarray, color: str, style: str, label: str) -> None:
    """Mean and 95% interval of curves (seeds, steps), themselves means of five steps."""
    means = np.array([np.convolve(curve, np.ones(5) / 5, mode="valid") for curve in curves])
    mean, half = map(np.array, zip(*(interval(column) for column in means.T)))
    x = np.arange(5, 5 + len(mean))
    ax.plot(x, mean, style, color=color, label=label, linewidth=1.6)
    ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.16, linewidth=0)


def figure(columns: dict[str, list[dict]], path: Path) -> None:
    """By column: accuracy of the samples, its difference to GRPO of the same seed, and the agreement."""
    if not importlib.util.find_spec("matplotlib"):
        print("no figure: pip install matplotlib")
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    kinds = [("reward/verified", False, "fraction of samples correct"),
             ("reward/verified", True, "that minus GRPO's\nof the same seed"),
             ("preference/agreement", False, "agreement")]
    plt.rcParams.update({"font.size": 10})
    size = (2.9 * len(columns), 7.2)
    _, axes = plt.subplots(3, len(columns), figsize=size, sharex="col", sharey="row", layout="constrained",
                           squeeze=False)
    for j, (title, rows) in enumerate(columns.items()):
        base = by_seed(rows, method="GRPO")
        for i, (name, paired, label) in enumerate(kinds):
            ax = axes[i, j]
            for method, (color, style) in STYLES.items():
                own = by_seed(rows, method=method)
                seeds = [seed for seed in own if seed in base]
                if len(seeds) > 1:
                    band(ax, np.array([np.array(own[seed][name]) - paired * np.array(base[seed][name])
                                       for seed in seeds]), color, style, method)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            if i > 0:
                ax.axhline(0, color="black", linewidth=0.8)
            if j == 0:
                ax.set_ylabel(label)
        axes[0, j].set_title(title, fontsize=11)
        axes[0, j].set_ylim(0, 1)
        axes[-1, j].set_xlabel("training step")
    axes[0, 0].legend(loc="lower right", frameon=False)
    plt.savefig(path, dpi=150)
    print(f"figure: {path}")


def report(rows: list[dict]) -> None:
    """Prints every table of the study, and draws the figure."""
    print("\n\n".join(table(rows, name, METHODS) for name in MEASURES))
    print("\nseeds: " + ", ".join(f"{method} {len(by_seed(rows, method=method))}" for method in METHODS))
    noisy = [row for row in rows if row["noise"] == 0.2]
    columns = {f"toy {regime}, 20% flipped": [row for row in noisy if row["regime"] == regime]
               for regime in ("98%", "slipping")}
    real = rows_of(RESULTS / "real_model.jsonl")
    for noise, title in ((0.0, "SmolLM2, clean"), (0.2, "SmolLM2, 20% flipped")):
        if len(by_seed(real, method="ICPO", noise=noise)) > 1:
            columns[title] = [row for row in real if row["noise"] == noise]
    figure(columns, RESULTS / "curves.png")


def report_tuning(rows: list[dict]) -> None:
    print(table(rows, "area", TUNING | VARIANTS, by_method=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tune", action="store_true", help="the search for the default instead")
    args = parser.parse_args(arguments)
    if args.tune:
        cells = [cell for cell in CELLS if cell[1] < 0.3]
        jobs = plan(TUNING, TUNING_SEEDS, cells, False) + plan(VARIANTS, TUNING_SEEDS, cells, False)
        complete(RESULTS / "tuning.jsonl", jobs, args, run, report_tuning, warm_starts)
        report_tuning(rows_of(RESULTS / "tuning_first_edition.jsonl"))
    else:
        jobs = plan(METHODS, SEEDS, CELLS, evaluate=True)
        complete(RESULTS / "study.jsonl", jobs, args, run, report, warm_starts)


if __name__ == "__main__":
    main()
