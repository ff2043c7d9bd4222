"""When does ICPO help? GRPO, ICPO and two variants on the built-in task: two regimes, reward noise, seeds.

    python results/study.py            print the tables of the logs, draw when.png
    python results/study.py --run      the same, after running what the logs lack
    python results/study.py --rerun    the same from nothing: two to four hours on two cores
    python results/study.py --tune     larger alphas, on seeds that the tables do not use

Runs are paired by seed: the same warm start, the same prompts in the same order, the same random numbers for
sampling and for flipping rewards. They go two at a time, each on one thread; a finished run is a line of
study.jsonl (tuning.jsonl), and is not run again. README.md beside says what was predicted before the first run.
"""

import argparse
import contextlib
import importlib.util
import json
import math
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
    "holds": dict(task_usual_error=0.95),  # the usual way is wrong: what is less probable is right
    "fails": dict(task_usual_error=0.05),  # the usual way is right
}
NOISES = {0.0: "clean", 0.2: "20% flipped", 0.35: "35% flipped"}  # the training rewards
CELLS = [(regime, noise) for regime in REGIMES for noise in NOISES]
METHODS = {
    "GRPO": dict(alpha=0.0),
    "ICPO": dict(alpha=0.1),
    "opposite": dict(alpha=0.1, beta=-10.0),
    "chosen": dict(alpha=0.1, chosen=True),  # GRPO for ten steps, then ICPO or opposite: see train
}
SEEDS = range(16)
TUNING = {"GRPO": dict(alpha=0.0)} | {f"alpha {alpha}": dict(alpha=alpha) for alpha in (0.1, 0.2, 0.4)}
TUNING_SEEDS = range(100, 106)
STEPS, FIRST = 60, 10  # FIRST: the steps over which the agreement is averaged
CURVES = {  # what the log keeps of each step, and to how many digits
    "reward/verified": 3, "entropy": 3, "preference/agreement": 3, "confidence/overconfident_frac": 2,
    "confidence/correct": 3, "confidence/wrong": 3, "ways": 2, "distinct": 2, "shift": 4}
EVALUATED = ("eval/accuracy", "eval/mean_at_k", "eval/pass_at_k")


def mean_of(name: str, steps: slice = slice(None)):
    """The measure of a run that is the mean of a curve, over the steps that have a value."""
    return lambda row: float(np.nanmean(np.array(row[name][steps], dtype=float)))


MEASURES = {
    "area": mean_of("reward/verified"),
    "first agreement": mean_of("preference/agreement", slice(FIRST)),
    "pass@8": lambda row: row["eval/pass_at_k"][-1],
    "ways alive": mean_of("ways", slice(-10, None)),
    "overconfident": mean_of("confidence/overconfident_frac"),
    "gap in l": lambda row: mean_of("confidence/correct")(row) - mean_of("confidence/wrong")(row),
    "entropy": mean_of("entropy"),
    "distinct texts, first ten steps": mean_of("distinct", slice(FIRST)),
    "shift of A": mean_of("shift"),
}
CLAIMS = ("pass@8", "ways alive", "overconfident", "gap in l", "entropy")


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


def variety(samples: list[dict], group_size: int) -> dict:
    """Distinct texts of a group: the correct ones ("ways"), and all, where some are correct and some wrong."""
    groups = [samples[i:i + group_size] for i in range(0, len(samples), group_size)]
    right = [{row["response"] for row in group if row["reward"] > 0.5} for group in groups]
    mixed = [len({row["response"] for row in group}) for group in groups
             if len({row["reward"] > 0.5 for row in group}) == 2]
    return {"ways": float(np.mean([len(texts) for texts in right])),
            "distinct": float(np.mean(mixed)) if mixed else None}


def train(noise: float = 0.0, chosen: bool = False, **settings) -> list[dict]:
    """The rows of metrics.jsonl of a run that leaves nothing else, with its variety and its shift of A.

    noise: the probability that the update gets 1 - R for a reward R of the verifier. What is correct is still
    told by the verifier's rewards; spread, uniform groups and agreement are of those trained on.
    chosen: GRPO for ten steps, then with the sign of beta that their mean agreement names.
    shift: mean |A - A of GRPO| over the groups that are not uniform, both from the rewards trained on.
    """
    torch.set_num_threads(1)  # two runs go at a time
    own_advantage, own_metrics, own_step = icpo.icpo_advantage, icpo.rollout_metrics, icpo.train_step
    trained_on, shift, agreements = None, None, []

    def noisy_advantage(rewards, seq_log_probs, alpha, beta, *rest):
        nonlocal trained_on, shift
        trained_on = torch.where(torch.rand(rewards.shape) < noise, 1 - rewards, rewards)
        if chosen and len(agreements) < FIRST:
            alpha = 0.0
        elif chosen:
            beta = math.copysign(beta, np.mean(agreements[:FIRST]))
        advantages = own_advantage(trained_on, seq_log_probs, alpha, beta, *rest)
        mixed = ~icpo.uniform_groups(trained_on).squeeze(1)
        shift = (advantages - icpo.group_advantage(trained_on))[mixed].abs().mean().item() if mixed.any() else None
        return advantages

    def noisy_metrics(rollout, rewards, *rest):
        noisy = own_metrics(rollout, trained_on, *rest)
        agreements.append(noisy["preference/agreement"])
        names = ("reward/std", "groups/uniform_frac", "preference/agreement")
        return own_metrics(rollout, rewards, *rest) | {name: noisy[name] for name in names} | {"shift": shift}

    def measured_step(policy, tokenizer, eos_ids, optimizer, examples, *rest):
        metrics, samples = own_step(policy, tokenizer, eos_ids, optimizer, examples, *rest)
        return metrics | variety(samples, len(samples) // len(examples)), samples

    with tempfile.TemporaryDirectory(dir=RUNS) as out:
        patches = dict(icpo_advantage=noisy_advantage, rollout_metrics=noisy_metrics, train_step=measured_step)
        try:
            with patch.multiple(icpo, **patches):
                quietly(icpo.train, icpo.Config(output_dir=f"{out}/run", save_every=1000, **settings))
        except KeyboardInterrupt:
            sys.exit(130)  # of a worker that is told to stop, a traceback shows nothing
        return rows_of(Path(out) / "run/metrics.jsonl")


def run(job: dict) -> dict:
    """One run: the job with its curves, and its evaluations before and after."""
    task = task_folder(job["regime"], job["seed"])
    rows = train(
        job["noise"], model=str(task / "model"), train_data=str(task / "train.jsonl"),
        eval_data=str(task / "eval.jsonl"), eval_every=STEPS, eval_rows=96, device="cpu", seed=job["seed"],
        steps=STEPS, max_new_tokens=32, micro_batch=128, lr=1e-4, **job["settings"])
    evaluations = {name: [round(row[name], 4) for row in (rows[0], rows[-1])] for name in EVALUATED}
    curves = {name: [None if row[name] is None else round(row[name], digits) for row in rows[1:]]
              for name, digits in CURVES.items()}
    return job | evaluations | curves


def warm_starts(jobs: list[dict], pool) -> None:
    """Makes the warm starts of jobs that are missing."""
    WARM_STARTS.mkdir(parents=True, exist_ok=True)
    starts = list(dict.fromkeys((job["regime"], job["seed"]) for job in jobs))
    for _ in tqdm(pool.imap_unordered(warm_start, starts), total=len(starts), desc="warm starts"):
        pass


def plan(methods: dict, seeds: range) -> list[dict]:
    """The jobs, whole seeds one after another: a log that breaks off is balanced."""
    return [dict(regime=regime, noise=noise, method=method, seed=seed, settings=settings)
            for seed in seeds for regime, noise in CELLS for method, settings in methods.items()]


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


def outcomes() -> list[dict]:
    """The cells, SmolLM2's too, from the highest first agreement of GRPO down.

    Each has a name, GRPO's first agreements and areas by seed, and by method the differences of area.
    """
    toy, real = rows_of(RESULTS / "study.jsonl"), rows_of(RESULTS / "real_model.jsonl")
    rows = toy + [row | {"regime": "SmolLM2"} for row in real if row["model"] == "runs/smollm2"]
    found = []
    for regime, noise in [*CELLS, ("SmolLM2", 0.0), ("SmolLM2", 0.2)]:
        cell = dict(regime=regime, noise=noise)
        if len(by_seed(rows, method="GRPO", **cell)) > 1:
            agreements, areas = (paired(rows, MEASURES[name], "GRPO", **cell)[0] for name in ("first agreement", "area"))
            found.append({"name": f"{regime}, {NOISES[noise]}", "agreement": agreements, "area": areas} | {
                method: paired(rows, MEASURES["area"], method, **cell)[1] for method in METHODS if method != "GRPO"})
    return sorted(found, key=lambda cell: -np.mean(cell["agreement"]))


def area_table(cells: list[dict]) -> str:
    """What decides: GRPO's first agreement and area, and the others' area minus GRPO's."""
    others = [method for method in METHODS if method != "GRPO"]
    return markdown(["area", "seeds", "first agreement", "GRPO", *others], [
        [cell["name"], str(len(cell["ICPO"])), level(cell["agreement"]), level(cell["area"]),
         *(difference(cell[method]) for method in others)] for cell in cells])


def verdict(cells: list[dict]) -> str:
    """How many intervals of ICPO and opposite exclude 0, and on which side, in the cells of the built-in task."""
    sides = []
    for cell in cells:
        for method, bet in (("ICPO", 1), ("opposite", -1)):
            if len(cell[method]) > 1 and not cell["name"].startswith("SmolLM2"):
                mean, half = interval(cell[method])
                sides.append((abs(mean) > half) * math.copysign(1, bet * mean * np.mean(cell["agreement"])))
    return (f"Of {len(sides)} intervals {sum(side != 0 for side in sides)} exclude 0: {sides.count(1)} on the side "
            f"that the agreement names, {sides.count(-1)} on the other.")


def claims_table(rows: list[dict]) -> str:
    """What the abstract claims beside: GRPO's level in each cell, and ICPO's and opposite's difference from it."""
    lines = []
    for regime, noise in CELLS:
        for method in ("GRPO", "ICPO", "opposite"):
            values = [paired(rows, MEASURES[name], method, regime=regime, noise=noise) for name in CLAIMS]
            shown = [level(base) if method == "GRPO" else difference(minus) for base, minus in values]
            lines.append([f"{regime}, {NOISES[noise]}: {method}{'' if method == 'GRPO' else ' minus GRPO'}", *shown])
    return markdown(["", *CLAIMS], lines)


def variety_table(rows: list[dict]) -> str:
    """Whether the method can act: distinct texts of a mixed group of GRPO, and how far ICPO's A is from GRPO's."""
    def levels(regime, method, name):
        return level([MEASURES[name](row) for row in rows
                      if (row["regime"], row["method"], row["noise"]) == (regime, method, 0.0)])
    return markdown(["clean", "distinct texts, first ten steps", "shift of A"], [
        [regime, levels(regime, "GRPO", "distinct texts, first ten steps"), levels(regime, "ICPO", "shift of A")]
        for regime in REGIMES])


def tuning_table(rows: list[dict]) -> str:
    """Area by alpha: GRPO's, and the others' minus GRPO's."""
    return markdown(["area", *TUNING], [
        [f"{regime}, {NOISES[noise]}", *compared(rows, MEASURES["area"], TUNING, regime=regime, noise=noise)]
        for regime, noise in CELLS])


# ----------------------------------------------------------------------------------------------------- Figure


def draw_when(cells: list[dict], path: Path) -> None:
    """The area of ICPO and of opposite minus GRPO's, over GRPO's first agreement; a dotted line a regime."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    _, ax = plt.subplots(figsize=(9.4, 5.4), layout="constrained")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(0, color="black", linewidth=0.8)
    edges = []
    for method, color, marker, shift, label in (
            ("ICPO", "#0072B2", "o", -0.011, "ICPO: the less probable response is preferred"),
            ("opposite", "#D55E00", "s", 0.011, "opposite: the more probable one is preferred")):
        for cell in cells:
            if len(cell[method]) > 1:
                mean, half = interval(cell[method])
                ax.errorbar(np.mean(cell["agreement"]) + shift, mean, half, fmt=marker, color=color, capsize=3,
                            markersize=5, linewidth=1.4, label=label)
                label = None
                # Of two or three seeds an interval may be wider than all else: it leaves the picture.
                edges += [mean - half, mean + half] if len(cell[method]) > 3 else [mean]
    for i, cell in enumerate(cells):
        x, top = np.mean(cell["agreement"]), (1.03, 1.15)[i % 2]
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


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tune", action="store_true", help="larger alphas instead")
    args = parser.parse_args(arguments)
    if args.tune:
        print(tuning_table(complete(RESULTS / "tuning.jsonl", plan(TUNING, TUNING_SEEDS), args, run, warm_starts)))
        return
    rows = complete(RESULTS / "study.jsonl", plan(METHODS, SEEDS), args, run, warm_starts)
    cells = outcomes()
    print("\n\n".join([area_table(cells), verdict(cells), claims_table(rows), variety_table(rows)]))
    if importlib.util.find_spec("matplotlib"):
        draw_when(cells, RESULTS / "when.png")
    else:
        print("no figure: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
