"""When does ICPO help? GRPO, ICPO and two variants on the built-in task: two regimes, reward noise, seeds.

    python results/study.py            print the tables of the logs, draw when.png
    python results/study.py --run      the same, after running what the logs lack
    python results/study.py --rerun    the same from nothing: two to four hours on two cores
    python results/study.py --tune     larger alphas, on seeds that the tables do not use

Runs are paired by seed: the same warm start, the same prompts in the same order, the same random numbers for
sampling and for flipping rewards. They go two at a time, each on one thread; a finished run is a line of
study.jsonl (tuning.jsonl), and is not run again. README.md beside has what was predicted beforehand.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
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
from tables import by_seed, compared, difference, interval, level, markdown, minus_grpo, side

REGIMES = {  # how often the teacher's usual way is wrong
    "holds": 0.95,  # what is less probable is right
    "fails": 0.05,
}
IMITATION_STEPS = 1800
NOISES = {0.0: "clean", 0.2: "20% flipped", 0.35: "35% flipped"}  # the training rewards
CELLS = {f"{regime}, {name}": dict(regime=regime, noise=noise)
         for regime in REGIMES for noise, name in NOISES.items()}
SMOLLM2 = {f"SmolLM2, {NOISES[noise]}": dict(regime="SmolLM2", noise=noise) for noise in (0.0, 0.2)}
METHODS = {
    "GRPO": dict(alpha=0.0),
    "ICPO": dict(alpha=0.1),
    "opposite": dict(alpha=0.1, beta=-10.0),
    "chosen": dict(alpha=0.1, chosen=True),  # GRPO for ten steps, then ICPO or opposite: see train
}
OTHERS = [method for method in METHODS if method != "GRPO"]
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
CLAIMS = ("ways alive", "overconfident")
SMALL = ("pass@8", "gap in l", "entropy")


# ------------------------------------------------------------------------------------------------------- Runs

def quietly(function, *args):
    """Calls it with what it prints kept away from the progress bar."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return function(*args)


def rows_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def warm_start(job: tuple[str, int]) -> None:
    torch.set_num_threads(1)
    regime, seed = job
    folder = WARM_STARTS / f"{regime}-{seed}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=WARM_STARTS) as scratch:
            quietly(write_task, Path(scratch) / "task", seed, REGIMES[regime], IMITATION_STEPS)
            os.rename(Path(scratch) / "task", folder)


def variety(samples: list[dict], group_size: int) -> dict:
    """Distinct texts of a group: of its correct ones ("ways"); of all, if some are correct and some wrong.

    Overconfident are the groups whose most probable response is wrong while another one is correct.
    """
    groups = [samples[i:i + group_size] for i in range(0, len(samples), group_size)]
    right = [{row["response"] for row in group if row["reward"] > 0.5} for group in groups]
    mixed = [len({row["response"] for row in group}) for group in groups
             if len({row["reward"] > 0.5 for row in group}) == 2]
    surest = [max(group, key=lambda row: row["confidence"])["reward"] for group in groups]
    overconfident = [len(texts) > 0 and reward <= 0.5 for texts, reward in zip(right, surest)]
    return {"ways": float(np.mean([len(texts) for texts in right])),
            "distinct": float(np.mean(mixed)) if mixed else None,
            "confidence/overconfident_frac": float(np.mean(overconfident))}


def train(noise: float = 0.0, chosen: bool = False, **settings) -> list[dict]:
    """The rows of metrics.jsonl of a run that leaves nothing else, with its variety and its shift of A.

    noise: the probability that the update gets 1 - R for a reward R of the verifier. What is correct is still
    told by the verifier's rewards; uniform groups and agreement are of those trained on.
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
        shifts = (advantages - icpo.group_advantage(trained_on))[mixed].abs()
        shift = shifts.mean().item() if mixed.any() else None
        return advantages

    def noisy_metrics(rollout, rewards, *rest):
        noisy = own_metrics(rollout, trained_on, *rest)
        agreements.append(noisy["preference/agreement"])
        names = ("groups/uniform_frac", "preference/agreement")
        return own_metrics(rollout, rewards, *rest) | {name: noisy[name] for name in names} | {"shift": shift}

    def measured_step(*args):
        metrics, samples = own_step(*args)
        return metrics | variety(samples, trained_on.shape[1]), samples

    with tempfile.TemporaryDirectory(dir=RUNS) as out:
        try:
            with patch.multiple(icpo, icpo_advantage=noisy_advantage, rollout_metrics=noisy_metrics,
                                train_step=measured_step):
                quietly(icpo.train, icpo.Config(output_dir=f"{out}/run", save_every=1000, **settings))
        except KeyboardInterrupt:
            sys.exit(130)  # of a worker that is told to stop, a traceback shows nothing
        return rows_of(Path(out) / "run/metrics.jsonl")


def kept(rows: list[dict], curves: dict[str, int]) -> dict:
    """What a log keeps of a run: its evaluations before and after, and its curves to so many digits."""
    evaluations = {name: [round(row[name], 4) for row in (rows[0], rows[-1])] for name in EVALUATED}
    return evaluations | {name: [None if row[name] is None else round(row[name], digits) for row in rows[1:]]
                          for name, digits in curves.items()}


def run(job: dict) -> dict:
    """One run: the job, and what the log keeps of it."""
    task = WARM_STARTS / f"{job['regime']}-{job['seed']}"
    rows = train(
        job["noise"], model=str(task / "addition"), train_data=str(task / "train.jsonl"),
        eval_data=str(task / "eval.jsonl"), eval_every=STEPS, eval_rows=96, device="cpu", seed=job["seed"],
        steps=STEPS, max_new_tokens=32, micro_batch=128, lr=1e-4, **job["settings"])
    return job | kept(rows, CURVES)


def warm_starts(jobs: list[dict], pool) -> None:
    """Makes the warm starts of jobs that are missing."""
    WARM_STARTS.mkdir(parents=True, exist_ok=True)
    starts = list(dict.fromkeys((job["regime"], job["seed"]) for job in jobs))
    list(tqdm(pool.imap_unordered(warm_start, starts), total=len(starts), desc="warm starts"))


def plan(methods: dict, seeds: range) -> list[dict]:
    """The jobs, whole seeds one after another: a log that breaks off is balanced."""
    return [dict(**cell, method=method, seed=seed, settings=settings)
            for seed in seeds for cell in CELLS.values() for method, settings in methods.items()]


def complete(log: Path, jobs: list[dict], args, run, prepare) -> list[dict]:
    """What the log holds of the jobs, after running what it lacks, two at a time, if args say so."""
    if args.rerun:
        log.unlink(missing_ok=True)
    rows = rows_of(log)
    missing = [job for job in jobs if not any(job.items() <= row.items() for row in rows)]
    known = len(jobs) - len(missing)
    if missing and (args.run or args.rerun):
        RUNS.mkdir(exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(2) as pool, log.open("a") as file:
            prepare(missing, pool)
            finished = pool.imap_unordered(run, missing)
            for row in tqdm(finished, desc="runs", initial=known, total=len(jobs)):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
    elif missing:
        print(f"{log.name} has {known} of {len(jobs)} runs; --run makes the others", file=sys.stderr)
    return [row for job in jobs for row in rows if job.items() <= row.items()]


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="first run what the logs lack")
    parser.add_argument("--rerun", action="store_true", help="delete the logs, and run everything")
    return parser


# ----------------------------------------------------------------------------------------------------- Tables

def outcomes() -> list[dict]:
    """The cells, SmolLM2's too, from the highest first agreement of GRPO down.

    Each has a name, GRPO's first agreements and areas by seed, and by method the differences of area.
    """
    real = [row for row in rows_of(RESULTS / "real_model.jsonl") if row["model"] == "runs/smollm2"]
    rows = rows_of(RESULTS / "study.jsonl") + [row | {"regime": "SmolLM2"} for row in real]
    found = []
    for name, cell in (CELLS | SMOLLM2).items():
        agreement, area = ([*by_seed(rows, MEASURES[measure], method="GRPO", **cell).values()]
                           for measure in ("first agreement", "area"))
        minus = {method: minus_grpo(rows, MEASURES["area"], method, **cell) for method in OTHERS}
        if len(area) > 1:
            found.append({"name": name, "agreement": agreement, "area": area} | minus)
    return sorted(found, key=lambda cell: -np.mean(cell["agreement"]))


def area_table(cells: list[dict]) -> str:
    """What decides: GRPO's first agreement and area, and the others' area minus GRPO's."""
    return markdown(["area", "seeds", "first agreement", "GRPO", *OTHERS], [
        [cell["name"], str(len(cell["ICPO"])), level(cell["agreement"]), level(cell["area"]),
         *(difference(cell[method], digits=4) for method in OTHERS)] for cell in cells])


def verdict(cells: list[dict]) -> str:
    """How many intervals of ICPO and opposite exclude 0, and on which side: the built-in task's."""
    sides = []
    for cell in cells:
        for method, bet in (("ICPO", 1), ("opposite", -1)):
            if cell["name"] in CELLS and len(cell[method]) > 1:
                sides.append(bet * side(cell[method]) * np.sign(np.mean(cell["agreement"])))
    return (f"Of {len(sides)} intervals {np.count_nonzero(sides)} exclude 0: {sides.count(1)} on the side "
            f"that the agreement names, {sides.count(-1)} on the other.")


def claims_table(rows: list[dict]) -> str:
    """What the abstract claims beside: GRPO's level in each cell, and the others' difference from it."""
    bets = ("ICPO", "opposite")
    header = [f"{claim}: GRPO" if not i else bet for claim in CLAIMS for i, bet in enumerate(("GRPO", *bets))]
    return markdown(["", *header], [
        [name, *(shown for claim in CLAIMS for shown in compared(rows, MEASURES[claim], bets, **cell))]
        for name, cell in CELLS.items()])


def minor_measures(rows: list[dict]) -> str:
    """What hardly differs: GRPO's means over the cells, and the largest difference. Whether ICPO can act, clean."""
    lines = []
    for name in SMALL:
        base = [np.mean([*by_seed(rows, MEASURES[name], method="GRPO", **cell).values()]) for cell in CELLS.values()]
        off = [abs(np.mean(minus_grpo(rows, MEASURES[name], method, **cell)))
               for cell in CELLS.values() for method in ("ICPO", "opposite")]
        lines.append(f"- *{name}*: {min(base):.3f} to {max(base):.3f} with GRPO; differences up to {max(off):.3f}.")
    for regime in REGIMES:
        distinct, shift = (level(by_seed(rows, MEASURES[name], regime=regime, method=method, noise=0.0).values())
                           for name, method in (("distinct texts, first ten steps", "GRPO"), ("shift of A", "ICPO")))
        lines.append(f"- *{regime}*, clean: {distinct} distinct texts in mixed groups of GRPO's first ten steps; "
                     f"shift of A {shift}.")
    return "\n".join(lines)


def tuning_table(rows: list[dict]) -> str:
    """Area by alpha: GRPO's, and the others' minus GRPO's."""
    return markdown(["area", *TUNING], [
        [name, *compared(rows, MEASURES["area"], TUNING, **cell)] for name, cell in CELLS.items()])


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
        known = [cell for cell in cells if len(cell[method]) > 1]
        x = [np.mean(cell["agreement"]) + shift for cell in known]
        mean, half = np.array([interval(cell[method]) for cell in known]).reshape(-1, 2).T  # also of none
        ax.errorbar(x, mean, half, fmt=marker, color=color, capsize=3, markersize=5, linewidth=1.4,
                    label=label)
        # Of two or three seeds an interval may be wider than all else: it leaves the picture.
        shown = half * [len(cell[method]) > 3 for cell in known]
        edges += [*(mean - shown), *(mean + shown)]
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
    rows, cells = complete(RESULTS / "study.jsonl", plan(METHODS, SEEDS), args, run, warm_starts), outcomes()
    print("\n\n".join([area_table(cells), verdict(cells), claims_table(rows), minor_measures(rows)]))
    if importlib.util.find_spec("matplotlib"):
        draw_when(cells, RESULTS / "when.png")
    else:
        print("no figure: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
