"""The built-in task: its sums, its teacher, and that icpo.py learns it. Run: python -m pytest -q"""

import itertools
import random
import re
from collections import Counter

import pytest

import icpo
from examples import addition
from icpo import Config
from tests.common import rows_of
from verify import verify

SUMS = [(a, b) for a in range(10, 100) for b in range(10, 100) if a % 10 + b % 10 > 9]
WAYS = list(itertools.product((False, True), repeat=3))


def read(text):
    """Whether each equation of a worked sum holds, its way for 47+85, and its answer."""
    u, v, units, comma, x, y, partial, carry, tens, answer = re.fullmatch(
        r"(\d)\+(\d)=(\d+)(,?) (\d)\+(\d)=(\d+)\+([01])=(\d+) #### (\d+)", text).groups()
    u, v, x, y = map(int, (u, v, x, y))
    right = (u + v, x + y, x + y + int(carry)) == (int(units), int(partial), int(tens))
    return right and answer == tens + units[-1], ((u, v), (x, y), comma), int(answer)


def test_the_eight_ways_are_right_and_ten_too_low_without_the_carry_and_verify_agrees():
    for a, b in random.Random(0).sample(SUMS, 150):
        for swap_units, swap_tens, comma in WAYS:
            units, tens = (a % 10, b % 10), (a // 10, b // 10)
            way = units[::-1] if swap_units else units, tens[::-1] if swap_tens else tens, "," * comma
            for carry in (True, False):
                text = addition.worked_addition(a, b, (swap_units, swap_tens, comma), carry)
                assert read(text) == (True, way, a + b - 10 * (not carry))
                assert verify(text, str(a + b)) is carry


@pytest.mark.parametrize("usual_error", [0.95, 0.05])
def test_the_teacher_errs_as_his_way_has_it(usual_error):
    random.seed(0)
    ways, wrong = Counter(), Counter()
    for _ in range(14_000):
        _, way, answer = read(addition.demonstration(47, 85, usual_error))
        ways[way] += 1
        wrong[way] += answer != 132
    usual = (7, 5), (4, 8), ""
    assert len(ways) == 8
    for way, count in ways.items():
        expected, error = (7000, usual_error) if way == usual else (1000, 1 - usual_error)
        assert count == pytest.approx(expected, abs=250)
        assert wrong[way] / count == pytest.approx(error, abs=0.05)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The flags of the built-in task, shortly apprenticed to a teacher who errs in half of all cases."""
    before, addition.ROOT = addition.ROOT, tmp_path_factory.mktemp("task")
    yield addition.prepare(seed=3, usual_error=0.5, imitation_steps=300)
    addition.ROOT = before


def test_the_task_is_made_once_and_trained_without_a_model(task, monkeypatch):
    monkeypatch.setattr(addition, "write_task", lambda *args: pytest.fail("made again"))
    assert addition.prepare(seed=3, usual_error=0.5, imitation_steps=300) == task
    paths, seen = dict(flag.split("=") for flag in task), []
    train, held_out = (rows_of(paths[name]) for name in ("--train-data", "--eval-data"))
    assert sorted(row["prompt"] for row in train + held_out) == sorted(f"{a}+{b}=" for a, b in SUMS)
    for row in train + held_out:
        assert sum(map(int, row["prompt"][:-1].split("+"))) == int(row["answer"])
    made = lambda seed: [f"--model=task{seed}", "--train-data=t", "--lr=0.5"]
    monkeypatch.setattr(addition, "prepare", made)
    monkeypatch.setattr(icpo, "train", seen.append)
    for flags in ([], ["--lr", 2, "--seed", 4], ["--model", "m", "--train-data", "d"]):
        assert icpo.main([str(flag) for flag in flags]) == 0
    assert seen == [
        Config(model="task0", train_data="t", lr=0.5), Config(model="task4", train_data="t", lr=2.0, seed=4),
        Config(model="m", train_data="d")]


@pytest.mark.parametrize("direction", [1, -1], ids=["learns", "negated advantages un-learn"])
def test_the_task_is_learned(task, tmp_path, monkeypatch, direction):
    advantage = icpo.icpo_advantage
    monkeypatch.setattr(icpo, "icpo_advantage", lambda *args: direction * advantage(*args))
    flags = ["--steps=7", "--eval-rows=128", "--eval-samples=0", f"--output-dir={tmp_path}/run"]
    assert icpo.main([*task, *flags]) == 0
    first, *_, last = rows_of(tmp_path / "run/metrics.jsonl")
    assert (last["eval/accuracy"] - first["eval/accuracy"]) * direction > 0.1
