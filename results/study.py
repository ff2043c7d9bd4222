"""When does ICPO help? GRPO against ICPO on the built-in task, over regimes, reward noise and seeds.

    python results/study.py            print the tables of the logs, draw curves.png and when.png
    python results/study.py --run      the same, after running what the logs lack
    python results/study.py --rerun    the same from nothing: three to six hours on two cores
    python results/study.py --all      every measure in every cell
    python results/study.py --tune     the search for the default, on seeds that the tables do not use

Runs are paired by seed: the same warm start, the same prompts in the same order, the same random numbers for
sampling. They go two at a time, each on one thread; a finished run is a line of study.jsonl (opposite.jsonl,
tuning.jsonl) and is not run again. The figures need matplotlib; they show real_model.py's runs too.
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
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "results", ROOT / "runs"
WARM_STARTS = RUNS / "study"
sys.path.insert(0, str(ROOT))

import icpo
from examples.addition import write_task

REGIMES = {
    "90%": dict(task_teacher_error=0.9),  # overconfident: the carry in one answer of ten
    "98%": dict(task_teacher_error=0.98),  # overconfident: in one of a hundred
    "slipping": dict(task_teacher_error=0.0, task_warmup_steps=400),  # right, but too few demonstrations
}
NOISES = {0.0: "clean", 0.2: "20% flipped", 0.35: "35% flipped"}  # the training rewards
CELLS = [(regime, noise) for regime in REGIMES for noise in NOISES if (regime, noise) != ("90%", 0.35)]
METHODS = {
    "GRPO": dict(alpha=0.0),
    "ICPO": dict(alpha=0.1),
    "uniform kept": dict(alpha=0.1, keep_uniform_groups=True),
    "alpha 0.4": dict(alpha=0.4),
    "adaptive": dict(form="adaptive", alpha=0.4),
}
OPPOSITE = {  # with a GRPO of its own, since runs repeat bit for bit only on one kind of CPU
    "GRPO": dict(alpha=0.0),
    "opposite": dict(alpha=0.1, beta=-10.0),
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
TUNING_SEEDS = range(100, 106)
STEPS = 60
CURVES = {  # what the log keeps of each step, and to how many digits
    "reward/verified": 3, "entropy": 3, "preference/agreement": 2, "confidence/overconfident_frac": 2,
    "groups/uniform_frac": 2, "confidence/correct": 2, "confidence/wrong": 2}
EVALUATED = ("eval/accuracy", "eval/mean_at_k", "eval/pass_at_k")
MEASURES = {
    "area": lambda row: row["area"] if "area" in row else np.mean(row["reward/verified"]),
    "sampled accuracy": lambda row: row["eval/mean_at_k"][-1],
    "greedy accuracy": lambda row: row["eval/accuracy"][-1],
    "pass@8": lambda row: row["eval/pass_at_k"][-1],
    "entropy": lambda row: np.mean(row["entropy"]),
    "overconfident": lambda row: np.mean(row["confidence/overconfident_frac"]),
    "confidence gap": lambda row: np.nanmean(
        np.array(row["confidence/correct"], dtype=float) - np.array(row["confidence/wrong"], dtype=float)),
    "uniform groups": lambda row: np.mean(row["groups/uniform_frac"]),
    "first agreement": lambda row: np.mean(row["preference/agreement"][:10]),
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
    torch.set_num_threads(1)
    regime, seed = job
    if not task_folder(regime, seed).exists():
        with tempfile.TemporaryDirectory(dir=WARM_STARTS) as scratch:
            config = icpo.Config(seed=seed, device="cpu", **REGIMES[regime])
            quietly(write_task, Path(scratch) / "run", config)
            os.rename(Path(scratch) / "run" / "task", task_folder(regime, seed))


def adaptive(rewards, seq_log_probs, alpha, beta, keep_uniform_groups=False):
    """In place of icpo_advantage: alpha counts to the extent that the less probable responses did better."""
    A, s = icpo.group_advantage(rewards), icpo.preference_advantage(seq_log_probs, beta)
    agreement = (A * s).sum() / (A * s).abs().sum().clamp(min=1e-9)
    joined = icpo.group_advantage(rewards + alpha * (2 * agreement).clamp(0, 1) * s)
    return joined * (A != 0).any(dim=1, keepdim=True)


def train(advantage=None, noise: float = 0.0, **settings) -> list[dict]:
    """The rows of metrics.jsonl of a run that leaves nothing else; advantage stands in for icpo_advantage.

    noise is the probability that the update gets 1 - R for a reward R of the verifier. What is correct is
    still told by the verifier's rewards; spread, uniform groups and agreement are of those trained on.
    """
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
    advantage = adaptive if settings.pop("form", None) else None
    rows = train(
        advantage, job["noise"], model=str(task / "model"), train_data=str(task / "train.jsonl"),
        eval_data=str(task / "eval.jsonl") if job["evaluate"] else None, eval_every=30, eval_rows=96,
        device="cpu", seed=job["seed"], steps=STEPS, max_new_tokens=32, micro_batch=128, lr=1e-4, **settings)
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


def complete(log: Path, jobs: list[dict], args, run, prepare=None) -> list[dict]:
    """What the log holds of the jobs, after running what it lacks, two at a time, if args say so."""
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
    return list(known.values())


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="first run what the logs lack")
    parser.add_argument("--rerun", action="store_true", help="delete the logs, and run everything")
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


def by_seed(rows: list[dict], **wanted) -> dict[int, dict]:
    return {row["seed"]: row for row in rows if all(row[name] == value for name, value in wanted.items())}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def paired(rows: list[dict], measure, method: str, **cell) -> tuple[list[float], list[float]]:
    """A measure of GRPO in a cell, and by how much a method's differs: of the seeds that both have run."""
    base, own = (by_seed(rows, method=name, **cell) for name in ("GRPO", method))
    pairs = [(measure(base[seed]), measure(own[seed])) for seed in base if seed in own]
    return [of_base for of_base, _ in pairs], [of_own - of_base for of_base, of_own in pairs]


def compared(rows: list[dict], measure, methods, **cell) -> list[str]:
    """A measure in a cell: GRPO's, and by how much each other method's differs from it on the same seeds."""
    return [level(paired(rows, measure, "GRPO", **cell)[0]),
            *(difference(paired(rows, measure, method, **cell)[1]) for method in methods if method != "GRPO")]


def table(rows: list[dict], name: str, methods: dict, by_method: bool = False) -> str:
    """A measure by cell (a line each, or a column each): GRPO's level, and the other methods minus GRPO's."""
    lines = [[name, *methods]] + [
        [f"{regime}, {NOISES[noise]}", *compared(rows, MEASURES[name], methods, regime=regime, noise=noise)]
        for regime, noise in CELLS if by_seed(rows, regime=regime, noise=noise)]
    header, *lines = map(list, zip(*lines)) if by_method else lines
    return markdown(header, lines)


def claims(rows: list[dict]) -> str:
    """What is claimed for ICPO beside a better area, where the most rewards are flipped."""
    cells = [cell for cell in CELLS if cell[1] == 0.35]
    header = [f"{regime}: {shown}" for regime, _ in cells for shown in ("GRPO", "ICPO minus GRPO")]
    return markdown(["35% flipped", *header], [
        [name, *(field for regime, noise in cells
                 for field in compared(rows, MEASURES[name], ["ICPO"], regime=regime, noise=noise))]
        for name in ("overconfident", "confidence gap", "pass@8")])


# --------------------------------------------------------------------------------------------- When to use it


def with_smollm2(log: str) -> list[dict]:
    """The rows of a log of the toy, and those of SmolLM2 as another regime."""
    real = [row for row in rows_of(RESULTS / "real_model.jsonl") if row["model"] == "runs/smollm2"]
    return rows_of(RESULTS / log) + [row | {"regime": "SmolLM2"} for row in real]


def outcomes() -> list[dict]:
    """The regimes, from the highest first agreement of GRPO down.

    Each has a name, and by method three lists by seed: GRPO's first agreement, its area, and the difference.
    """
    rows = {"ICPO": with_smollm2("study.jsonl"), "opposite": with_smollm2("opposite.jsonl")}
    found = []
    for regime, noise in [*CELLS, ("SmolLM2", 0.0), ("SmolLM2", 0.2)]:
        cell = {"name": f"{regime}, {NOISES[noise]}"}
        for method in rows:
            agreement, area = (paired(rows[method], MEASURES[name], method, regime=regime, noise=noise)
                               for name in ("first agreement", "area"))
            cell[method] = agreement[0], *area
        found.append(cell)
    known = [cell for cell in found if len(cell["ICPO"][0]) > 1]
    return sorted(known, key=lambda cell: -np.mean(cell["ICPO"][0]))


def when(cells: list[dict]) -> str:
    """The table beside when.png."""
    return markdown(
        ["regime", "first agreement", "ICPO minus GRPO", "seeds", "GRPO's area", "opposite minus GRPO",
         "seeds"],
        [[cell["name"], level(cell["ICPO"][0]), difference(cell["ICPO"][2]), str(len(cell["ICPO"][2])),
          level(cell["opposite"][1]), difference(cell["opposite"][2]), str(len(cell["opposite"][2]))]
         for cell in cells])


# ---------------------------------------------------------------------------------------------------- Figures

STYLES = {  # the colors are Okabe and Ito's
    "GRPO": ("#444444", "-"), "ICPO": ("#0072B2", "-"), "adaptive": ("#009E73", "--"),
    "alpha 0.4": ("#E69F00", "-"), "opposite": ("#D55E00", "-")}


def drawing():
    """pyplot, without a screen; None, and a line that says so, where there is no matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        print("no figure: pip install matplotlib", file=sys.stderr)
        return None
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def band(ax, curves: list, color: str, style: str, label: str) -> None:
    """Mean and 95% interval of curves (seeds, steps), themselves means of five steps."""
    means = np.array([np.convolve(curve, np.ones(5) / 5, mode="valid") for curve in curves])
    mean, half = map(np.array, zip(*(interval(column) for column in means.T)))
    x = np.arange(5, 5 + len(mean))
    ax.plot(x, mean, style, color=color, label=label, linewidth=1.6)
    ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.16, linewidth=0)


def draw_curves(rows: list[dict], path: Path) -> None:
    """Four regimes side by side: accuracy of the samples, its difference to GRPO, and the agreement."""
    plt = drawing()
    columns = [(regime, noise, cell)
               for regime, noise in [("98%", 0.2), ("slipping", 0.2), ("SmolLM2", 0.0), ("SmolLM2", 0.2)]
               if (cell := [row for row in rows if (row["regime"], row["noise"]) == (regime, noise)])]
    kinds = [("reward/verified", False, "fraction of samples correct"),
             ("reward/verified", True, "that minus GRPO's\nof the same seed"),
             ("preference/agreement", False, "agreement")]
    _, axes = plt.subplots(3, len(columns), figsize=(2.9 * len(columns), 7.2), sharex="col", sharey="row",
                           layout="constrained", squeeze=False)
    for j, (regime, noise, cell) in enumerate(columns):
        base = by_seed(cell, method="GRPO")
        for i, (name, minus, label) in enumerate(kinds):
            ax = axes[i, j]
            for method, (color, style) in STYLES.items():
                own = by_seed(cell, method=method)
                curves = [np.array(own[seed][name]) - minus * np.array(base[seed][name])
                          for seed in own if seed in base]
                if len(curves) > 1:
                    band(ax, curves, color, style, method)
            ax.grid(alpha=0.25)
            if i > 0:
                ax.axhline(0, color="black", linewidth=0.8)
            if j == 0:
                ax.set_ylabel(label)
        axes[0, j].set_title(f"{regime}, {NOISES[noise]}", fontsize=11)
        axes[0, j].set_ylim(0, 1)
        axes[-1, j].set_xlabel("training step")
    lines = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels())}
    axes[0, 0].legend(lines.values(), lines, loc="lower right", frameon=False)
    plt.savefig(path, dpi=150)
    plt.close()
    print(f"figure: {path}", file=sys.stderr)


def draw_when(cells: list[dict], path: Path) -> None:
    """The area of ICPO and of opposite minus GRPO's, over GRPO's first agreement; a dotted line a regime."""
    plt = drawing()
    _, ax = plt.subplots(figsize=(9.4, 5.4), layout="constrained")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(0, color="black", linewidth=0.8)
    edges = []
    for method, color, marker, shift, label in (
            ("ICPO", "#0072B2", "o", -0.011, "ICPO: the less probable response is preferred"),
            ("opposite", "#D55E00", "s", 0.011, "opposite: the more probable one is preferred")):
        for cell in cells:
            if len(cell[method][2]) > 1:
                mean, half = interval(cell[method][2])
                ax.errorbar(np.mean(cell["ICPO"][0]) + shift, mean, half, fmt=marker, color=color, capsize=3,
                            markersize=5, linewidth=1.4, label=label)
                label = None
                # Of two or three seeds an interval may be wider than all else: it leaves the picture.
                edges += [mean - half, mean + half] if len(cell[method][2]) > 3 else [mean]
    for i, cell in enumerate(cells):
        x, top = np.mean(cell["ICPO"][0]), (1.03, 1.15)[i % 2]
        ax.plot([x, x], [0, top], ":", color="#999999", linewidth=0.8, transform=ax.get_xaxis_transform(),
                clip_on=False, zorder=0)
        ax.text(x, top, cell["name"].replace(", ", "\n"), ha="center", va="bottom",
                transform=ax.get_xaxis_transform(), bbox=dict(color="white", pad=1))
    ax.set_xlim(-1, 1)
    ax.set_ylim(min(edges) - 0.01, max(edges) + 0.01)
    ax.set_xlabel("agreement in GRPO's first ten steps\n"
                  "← the more probable responses did better          the less probable ones did better →")
    ax.set_ylabel("area minus GRPO's, 95% interval")
    ax.legend(loc="lower right", framealpha=1, edgecolor="white")
    plt.savefig(path, dpi=192)
    plt.close()
    print(f"figure: {path}", file=sys.stderr)


def report(rows: list[dict]) -> None:
    """Prints the tables of the study, and draws the figures."""
    cells = outcomes()
    print("\n\n".join([table(rows, "area", METHODS), claims(rows), when(cells)]))
    if cells and drawing():
        draw_curves(with_smollm2("study.jsonl"), RESULTS / "curves.png")
        draw_when(cells, RESULTS / "when.png")


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--all", action="store_true", help="every measure in every cell instead")
    parser.add_argument("--tune", action="store_true", help="the search for the default instead")
    args = parser.parse_args(arguments)
    if args.tune:
        cells = [cell for cell in CELLS if cell[1] < 0.3]
        jobs = plan(TUNING, TUNING_SEEDS, cells, evaluate=False)
        print(table(complete(RESULTS / "tuning.jsonl", jobs, args, run, warm_starts), "area", TUNING, True))
        return
    rows, opposite = (
        complete(RESULTS / log, plan(methods, SEEDS, CELLS, evaluate=True), args, run, warm_starts)
        for log, methods in (("study.jsonl", METHODS), ("opposite.jsonl", OPPOSITE)))
    if args.all:
        for found, methods in ((rows, METHODS), (opposite, OPPOSITE)):
            print("\n\n".join(table(found, name, methods) for name in MEASURES) + "\n")
    else:
        report(rows)


if __name__ == "__main__":
    main()
