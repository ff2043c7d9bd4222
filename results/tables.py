"""What the tables here are made of: means, their 95% intervals, and differences paired by seed, as Markdown.

Rows are those of a log, each with a seed, a method, and what tells its cell. A measure is a function of one.
"""

import numpy as np

# Student's t of a two-sided 95% interval, for 1 to 23 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069)


def interval(values) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval."""
    values = np.array([*values], dtype=float)
    return float(values.mean()), float(T975[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5)


def side(values) -> int:
    """1 if their interval is above 0, -1 if it is below, else 0."""
    mean, half = interval(values)
    return (mean > half) - (mean < -half)


def level(values, form: str = "{:.3f} ± {:.3f}") -> str:
    return form.format(*interval(values)) if len(values) > 1 else ""


def difference(values, digits: int = 3) -> str:
    """Of differences: mean and 95% interval, bold if it leaves out 0."""
    shown = level(values, f"{{:+.{digits}f}} ± {{:.{digits}f}}")
    return f"**{shown}**" if shown and side(values) else shown


def by_seed(rows: list[dict], measure, **cell) -> dict[int, float]:
    """A measure of the rows that have these values."""
    return {row["seed"]: measure(row) for row in rows if cell.items() <= row.items()}


def minus_grpo(rows: list[dict], measure, method: str, **cell) -> list[float]:
    """By how much a method's measure differs from GRPO's, for each seed that both have run."""
    base, own = (by_seed(rows, measure, method=name, **cell) for name in ("GRPO", method))
    return [own[seed] - base[seed] for seed in base if seed in own]


def compared(rows: list[dict], measure, methods, **cell) -> list[str]:
    """A measure in a cell: GRPO's, and by how much each other method's differs from it on the same seeds."""
    return [level(by_seed(rows, measure, method="GRPO", **cell).values()),
            *(difference(minus_grpo(rows, measure, method, **cell)) for method in methods
              if method != "GRPO")]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
