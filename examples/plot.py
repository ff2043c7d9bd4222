"""Draws the metrics of one or several runs of icpo.py into one picture.

    python examples/plot.py runs/a runs/b          writes plot.png, or what --output names; needs matplotlib

Thin lines are steps, thick ones means of the last five; dots are the greedy accuracy on held-out prompts.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

PANELS = {  # title, unit: the metrics in it, and how each is drawn
    "fraction correct (dots: held out, greedy)": {"reward/verified": "-", "eval/accuracy": "o"},
    "entropy, nats": {"entropy": "-"},
    "confidence: correct, wrong (dashes)": {"confidence/correct": "-", "confidence/wrong": "--"},
    "agreement": {"preference/agreement": "-"},
    "response length, tokens": {"length/mean": "-"},
    "fraction truncated": {"length/truncated_frac": "-"},
}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#444444", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's


def read(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def is_known(row: dict, name: str) -> bool:
    """There is no confidence without responses, and no agreement where the rewards of every group are equal."""
    alike = name == "preference/agreement" and row.get("groups/uniform_frac") == 1
    return row.get(name) is not None and not alike


def draw(runs: dict[str, list[dict]], path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True, layout="constrained")
    for ax, (title, metrics) in zip(axes.flat, PANELS.items()):
        for i, (label, rows) in enumerate(runs.items()):
            color = COLORS[i % len(COLORS)]
            for name, style in metrics.items():
                known = [(row["step"], row[name]) for row in rows if is_known(row, name)]
                steps, values = np.array(known).reshape(-1, 2).T
                if style == "o":
                    ax.plot(steps, values, style, color=color, markersize=5)
                    continue
                ax.plot(steps, values, style, color=color, alpha=0.3, linewidth=0.7)
                means = [values[max(0, n - 4):n + 1].mean() for n in range(len(values))]
                ax.plot(steps, means, style, color=color, linewidth=1.8, label=label)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylim(0, 1.03)
    axes[1, 2].set_ylim(0, 1.03)
    axes[1, 0].set_ylim(-1.05, 1.05)
    axes[1, 0].axhline(0, color="black", linewidth=0.8)
    figure.supxlabel("training step", fontsize=10)
    if len(runs) > 1:
        axes[0, 0].legend(frameon=False)
    plt.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="output folders of icpo.py")
    parser.add_argument("--output", default="plot.png", help="the picture (default plot.png)")
    args = parser.parse_args(arguments)
    try:
        if not importlib.util.find_spec("matplotlib"):
            raise ValueError("matplotlib is missing: pip install matplotlib")
        if Path(args.output).exists():
            raise ValueError(f"{args.output} is there already: name another --output")
        draw({run: read(Path(run) / "metrics.jsonl") for run in args.runs}, args.output)
    except (OSError, ValueError) as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        return 2
    print(f"figure: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
