"""Tests of what stands beside: the times tables and the plot. Run: python -m pytest -q"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import plot


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------- Times tables, plot


def test_times_tables_are_what_the_shown_lines_make(tmp_path, monkeypatch):
    tables = FOLDER / "times_tables"
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", (tables / "README.md").read_text(), re.DOTALL)[1], {})
    prompts = {}
    for name, count in (("train", 89), ("test", 32)):
        rows = rows_of(tables / f"{name}.jsonl")
        assert rows == rows_of(tmp_path / f"{name}.jsonl")
        assert all(eval(re.search(r"\d+ \* \d+", row["prompt"])[0]) == int(row["answer"]) for row in rows)
        prompts[name] = {row["prompt"] for row in rows}
        assert len(rows) == len(prompts[name]) == count
    assert not prompts["train"] & prompts["test"]
    swapped = {re.sub(r"(\d+) \* (\d+)", r"\2 * \1", prompt) for prompt in prompts["train"]}
    assert f"Of the 32, {len(swapped & prompts['test'])} are" in (tables / "README.md").read_text()


def metrics(folder, steps):
    """A run's log, with the gaps that a log has: evaluated at step 0 only, no wrong response at the last."""
    folder.mkdir()
    rows = [{"step": 0, "eval/accuracy": 0.3}]
    for step in range(1, steps + 1):
        rows.append({
            "step": step, "reward/verified": step / steps, "entropy": 1.0, "confidence/correct": -0.1,
            "confidence/wrong": -1.0 if step < steps else None, "preference/agreement": -0.5,
            "length/mean": 9.0, "length/truncated_frac": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_plot_draws_runs_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    runs = [metrics(tmp_path / "a", 1), metrics(tmp_path / "b", 12)]
    found = importlib.util.find_spec
    if found("matplotlib"):
        assert plot.main([*runs, "--output", str(tmp_path / "plot.png")]) == 0
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 0}\n{"st')
        for run in (str(tmp_path / "b"), str(tmp_path / "none")):
            assert plot.main([run, "--output", str(tmp_path / "no.png")]) == 2
            error = capsys.readouterr().err
            assert error.startswith("plot.py: error:") and error.count("\n") == 1 and run in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "matplotlib" and found(name))
    assert plot.main([*runs, "--output", str(tmp_path / "no.png")]) == 2
    assert capsys.readouterr().err == "plot.py: error: matplotlib is missing: pip install matplotlib\n"
    assert not (tmp_path / "no.png").exists()
