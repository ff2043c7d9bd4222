"""Whole runs of icpo.py, faults, and what people bring: offline, on tiny models. Run: python -m pytest -q

SLOW=1 kills more runs.
"""

import contextlib
import copy
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.utils.logging import warning_once

import icpo
from examples import addition
from icpo import Config
from tests.common import (
    PLAIN, ROOT, SHAPE, by_letters, edit, rows_of, saved, scaled, tiny, tiny_run, write_jsonl)
from verify import verify

REWARD = ("--reward", "tests.common:by_letters")
LOGS = ("metrics.jsonl", "samples.jsonl")


def run(*flags):
    return icpo.main([str(flag) for flag in flags])


def in_a_process(*flags, cwd=None, python=()):
    command = [sys.executable, *python, icpo.__file__, *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


def error_of(capfd, *flags):
    """The one line that a run in vain shows."""
    assert run(*flags) == 2
    error = capfd.readouterr().err.split("icpo.py: error: ")[1].strip()
    assert "\n" not in error
    return error


def examples_of(folder, tokenizer, rows, **changes):
    data = write_jsonl(folder / "data.jsonl", rows)
    return icpo.load_examples(str(data), tokenizer, Config(max_new_tokens=9, **changes))


def learning_run(model, out, *flags):
    """The flags of a run whose weights move in every step, with a checkpoint of each."""
    return tiny_run(model, out, "--eval-data", model / "one.jsonl", "--lr", 1e-2, "--steps", 4, "--save-every", 1,
                    "--eval-every", 3, "--kl-coef", 0.1, "--prompts-per-step", 2, *REWARD, *flags)


def result_of(out):
    """All that a run leaves: its step, weights, optimizer and logs."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    tensors = torch.utils._pytree.tree_leaves([state["policy"], state["optimizer"]])
    logs = [(out / log).read_bytes() for log in LOGS]
    model = (out / "model/model.safetensors").read_bytes()
    return state["step"], [torch.as_tensor(x).tolist() for x in tensors if x is not None], logs, model


# ------------------------------------------------------------------------- A run has a folder, and continues

def test_a_run_has_a_new_folder_of_its_own_and_none_that_has_something_in_it(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(icpo, "strftime", lambda name: name.replace("%Y%m%d-%H%M%S", "20260102-030405"))
    flags = tiny_run(tiny, "", *REWARD)
    assert run(*flags) == run(*flags[:4], *flags[6:], "--output-dir", "mine") == 0
    assert sorted(os.listdir("runs")) == [f"{tiny.name}-20260102-030405"] and Path("mine/config.json").exists()
    monkeypatch.setattr(icpo, "load_model", lambda *args: pytest.fail("a model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for out in ("", "mine"):
        assert "is not empty; --resume continues a run" in error_of(capfd, *flags, "--output-dir", out)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_of_two_runs_that_begin_at_once_one_gets_a_line(tiny, tmp_path, monkeypatch, capfd):
    def second_run(*args):
        monkeypatch.undo()
        assert run(*learning_run(tiny, tmp_path / "run")) == 0
        finished.append(result_of(tmp_path / "run"))
        return icpo.load_examples(*args)

    finished = []
    monkeypatch.setattr(icpo, "load_examples", second_run)
    assert f"exists: '{tmp_path / 'run/config.json'}'" in error_of(capfd, *learning_run(tiny, tmp_path / "run"))
    assert [result_of(tmp_path / "run")] == finished


def test_resumed_runs_have_the_settings_of_their_folder_and_those_given_and_end_as_unbroken_ones(tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*learning_run(tiny, whole)) == 0
    assert run(*learning_run(tiny, broken, "--steps", 2, "--eval-every", 1)) == 0
    assert len(rows_of(broken / "samples.jsonl")) == 2 * 8
    logs = [path.open("ab") for path in (broken / log for log in LOGS)]
    for log in logs:
        log.write(b'{"step": 3}\n{"st')  # a step of which there is no checkpoint, and half of a line
        log.close()
    assert run("--resume", broken, "--steps", 4) == 0
    rows = rows_of(broken / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 1, 2, 3, 4]
    for row in rows[1:3]:  # they were evaluated more often, which changes nothing else
        for name in [name for name in row if name.startswith("eval/")]:
            del row[name]
    assert rows == rows_of(whole / "metrics.jsonl")
    step, weights, (_, samples), model = result_of(whole)
    after = result_of(broken)
    assert (step, weights, samples, model) == (after[0], after[1], after[2][1], after[3])
    assert step == 4 and rows[4]["kl/ref"] > 0 and load_file(tiny / "model.safetensors").keys()
    kept, expected = (json.loads((out / "config.json").read_text()) for out in (broken, whole))
    changed = {"resume": str(broken), "output_dir": str(broken), "eval_every": 1}
    assert kept == expected | changed and kept["steps"] == 4


def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(tiny, tmp_path):
    def start(*flags):
        process = context.Process(target=icpo.main, args=[list(map(str, flags))])
        process.start()
        return process

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["icpo", "tests.common"])  # spares each process the import of torch
    flags, out = ["--steps", 8, "--eval-every", 2], tmp_path / "run"
    for name in ("first", "whole"):  # the first time the server still imports torch
        begin = time.perf_counter()
        start(*learning_run(tiny, tmp_path / name, *flags)).join()
        seconds = time.perf_counter() - begin
    chance, kills, resumed = random.Random(0), 0, 0
    while kills < (20 if "SLOW" in os.environ else 4):
        if (out / "checkpoint.pt").exists():
            process, resumed = start("--resume", out), resumed + 1
        else:
            shutil.rmtree(out, ignore_errors=True)
            process = start(*learning_run(tiny, out, *flags))
        process.join(chance.uniform(0.2, 1) * seconds)  # while it reads, evaluates, trains or saves
        kills += process.is_alive()
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert result_of(out) == result_of(tmp_path / "whole")
            shutil.rmtree(out)
            seconds *= 0.8  # the machine is faster than when the time was taken
    if not (out / "checkpoint.pt").exists():
        shutil.rmtree(out, ignore_errors=True)
    start(*(["--resume", out] if out.exists() else learning_run(tiny, out, *flags))).join()
    assert result_of(out) == result_of(tmp_path / "whole") and resumed


def test_ctrl_c_is_one_line_that_names_the_folder_to_resume(tiny, tmp_path, monkeypatch, capfd):
    def reward(response, reference):
        if response is None or len(calls) == 3 * 16 + 2:
            signal.raise_signal(signal.SIGINT)
        calls.append(response)
        return by_letters(response, reference)

    calls, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    out, flags = tmp_path / "run", ["--eval-every", 9, "--eval-data", "", "--save-every", 2]
    try:
        assert run(*learning_run(tiny, out, *flags)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    line = f"icpo.py: stopped; --resume {out} continues after step 2"
    assert capfd.readouterr().err.strip().split("\n")[-1] == line
    assert len(calls) == 3 * 16 + 2 and len(rows_of(out / "metrics.jsonl")) == 4  # steps 0 to 3
    assert run("--resume", out) == run(*learning_run(tiny, tmp_path / "whole", *flags)) == 0
    assert result_of(out) == result_of(tmp_path / "whole")


def test_checkpoints_are_saved_every_save_every_steps_and_at_the_end(tiny, tmp_path, monkeypatch):
    saved_at = []
    monkeypatch.setattr(icpo, "save_checkpoint", lambda out, step, *rest: saved_at.append(step))
    assert run(*tiny_run(tiny, tmp_path / "run", "--steps", 5, "--save-every", 2, *REWARD)) == 0
    assert saved_at == [0, 2, 4, 5]


def test_values_of_numpy_train_are_written_and_resume(tiny, tmp_path):
    config = Config(
        model=str(tiny), train_data=str(tiny / "one.jsonl"), output_dir=str(tmp_path / "run"), reward=REWARD[1],
        device="cpu", steps=np.int64(1), max_new_tokens=np.arange(9)[4], lr=np.float32(0.25),
        beta=np.logspace(0, 2, 3)[1], keep_uniform_groups=np.bool_(True))
    metrics = icpo.train(config)
    assert metrics["step"] == 1 and metrics["sampling/logp_difference"] < 1e-5
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert (written["lr"], written["beta"], written["keep_uniform_groups"]) == (0.25, 10.0, True)
    assert run("--resume", tmp_path / "run", "--steps", 2) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]


def test_random_numbers_follow_from_the_seed_and_the_step(tiny, tmp_path):
    responses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ["--steps", 2, "--seed", seed, "--lr", 1e-30, "--prompts-per-step", 1, *REWARD]
        assert run(*tiny_run(tiny, tmp_path / name, *flags)) == 0
        responses.append([row["response"] for row in rows_of(tmp_path / name / "samples.jsonl")])
    a, b, c = responses
    assert a == b and a != c and a[:8] != a[8:] and len(a) == 16


def test_every_example_once_an_epoch():
    taken = [i for step in range(1, 16) for i in icpo.batch_indices(10, step, 4, seed=0)]
    epochs = [taken[start:start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert icpo.batch_indices(10, 1, 10, seed=1) != epochs[0]


def test_evaluation_equals_loops(tiny, capsys):
    def reward(text, reference):
        seen.append((text, reference, by_letters(text, reference)))
        return seen[-1][2]

    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    examples, seen = [icpo.Example("", n, [n + 1] * (n + 1)) for n in range(5)], []
    config = Config(prompts_per_step=2, group_size=3, eval_samples=3, max_new_tokens=5, seed=3)
    metrics = icpo.evaluate(model, tokenizer, eos_ids, examples, reward, config)
    texts, references, rewards = zip(*seen)
    assert references == (0, 1, 2, 3, 4, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    greedy, sampled = rewards[:5], rewards[5:]
    groups = [sampled[start:start + 3] for start in range(0, 15, 3)]
    assert metrics == pytest.approx({
        "eval/accuracy": statistics.mean(greedy), "eval/mean_at_k": statistics.mean(sampled),
        "eval/pass_at_k": statistics.mean(map(max, groups)), "eval/errors": 0})
    assert metrics["eval/mean_at_k"] < metrics["eval/pass_at_k"] and len(set(greedy)) > 1
    assert f"-> {texts[greedy.index(min(greedy))][-40:]!r}" in capsys.readouterr().out  # the worst is shown
    generated = model.generate(torch.tensor([[5] * 5]), do_sample=False, max_new_tokens=5)[0, 5:]
    assert texts[4] == tokenizer.decode(generated, skip_special_tokens=True)
    assert icpo.evaluate(model, tokenizer, eos_ids, examples, reward, config) == metrics
    failing = icpo.evaluate(model, tokenizer, eos_ids, examples, lambda *args: None, config)
    assert set(failing.values()) == {0, 20} and failing["eval/errors"] == 20


# ----------------------------------------------------------------------------- The command line, and its errors

def test_help_without_docstrings_explains_every_flag_with_its_default():
    shown = in_a_process("--help", python=["-OO"])
    assert (shown.returncode, shown.stderr) == (0, "")
    text = re.sub(r"\s+", " ", shown.stdout)
    for name, field in Config.__dataclass_fields__.items():
        told = re.search(rf" --{name.replace('_', '-')}( [A-Z_]+)? ([a-zA-Z][^-].*?) \(default: (.*?)\)", text)
        assert told and len(told[2]) > 9 and told[3] == repr(field.default), name


def test_importing_icpo_registers_nothing_and_sets_nothing():
    script = """
import random, signal, sys, numpy, torch, transformers
from transformers.utils import logging

def state():
    interfaces = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    return ([signal.getsignal(number) for number in signal.valid_signals()], *map(sorted, interfaces), sys.path[:],
            torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cuda.cudnn_sdp_enabled(),
            torch.is_grad_enabled(), torch.initial_seed(), torch.random.get_rng_state().tolist(), random.getstate(),
            logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.excepthook)

before = state()
import icpo
sys.exit(before != state())"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).returncode == 0


def test_a_log_in_a_file_has_a_line_a_step_and_own_modules_come_first(tiny, tmp_path):
    (tmp_path / "verify.py").write_text("def verify(response, reference): return len(response) % 4 / 4")
    flags = ["--eval-data", tiny / "one.jsonl", "--eval-every", 2, "--steps", 6, "--beta", "-1e1", "--alpha", 0.3]
    shown = in_a_process(*tiny_run(tiny, "run", *flags, "--reward", "verify:verify"), cwd=tmp_path)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    lines = shown.stdout.splitlines()
    assert [line[:4] for line in lines if re.match(r"\d/6 ", line)] == [f"{n}/6 " for n in range(1, 7)]
    assert sum(line.startswith("accuracy ") for line in lines) == 4 and len(lines) < 6 + 4 + 8
    assert "\r" not in shown.stdout and repr("[user]1[assistant]") in lines  # the prompt as the model gets it
    rows = rows_of(tmp_path / "run/samples.jsonl")
    assert [row["reward"] for row in rows] == [len(row["response"]) % 4 / 4 for row in rows]
    assert json.loads((tmp_path / "run/config.json").read_text())["beta"] == -10
    shown = in_a_process(*tiny_run(tiny, "ours"), cwd=tmp_path)
    assert shown.returncode == 0 and {row["reward"] for row in rows_of(tmp_path / "ours/samples.jsonl")} == {0}


@pytest.mark.parametrize("flags, message", [
    ("--group-size 1", "--group-size: must be at least 2"), ("--alpha 0.5", "--alpha: must be in [0, 1/2)"),
    ("--alpha -1", "--alpha"), ("--beta inf", "--beta: must be finite"), ("--beta nan", "--beta: must be finite"),
    ("--steps 0", "--steps: must be above 0"), ("--lr nan", "--lr: must be above 0"), ("--temperature 0", "above 0"),
    ("--seed -1", "--seed"), ("--aggregation mean", "--aggregation"), ("--kl-coef -1", "--kl-coef"),
    ("--train-data=", "--model and --train-data need each other"), ("--model=", "need each other"),
    ("--output-dir .", "not empty"), ("--resume absent", "No such file or directory: 'absent/config.json'"),
    ("--max-new-tokens 500", "no usable line"), ("--chat-template-kwargs {", "JSONDecodeError"),
    ("--reward nowhere:f", "No module named 'nowhere'"), ("--reward verify:nothing", "nothing"),
    ("--train-data .", "Is a directory"), ("--train-data absent", "No such file or directory: 'absent'"),
    ("--eval-data ~/absent", "No such file or directory: '/proc/absent'"), ("--train-data data.jsonl", "no usable"),
    ("--model models/typo", "--model models/typo: "), ("--model a/b/c", "a/b/c: no such folder"),
    ("--model ./absent", "./absent: no such folder"), ("--model data.jsonl", "no LoRA adapter, no file"),
    ("--device nowhere", "nowhere"), pytest.param("--device cuda", "--device", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one"))])
def test_bad_flags_get_one_line_and_write_nothing(tiny, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/proc")  # where nothing can be written
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(addition, "write_task", lambda *args: pytest.fail("minutes of imitation, for nothing"))
    Path("data.jsonl").write_text("")
    assert message in error_of(capfd, *tiny_run(tiny, "new", *flags.split()))
    assert os.listdir() == ["data.jsonl"]


GOOD = '{"prompt": "1+1=", "answer": "2"}'


@pytest.mark.parametrize("name, text, message", [
    ("data.jsonl", f"{GOOD}\n\n{{oops\n", "data.jsonl, line 3: JSONDecodeError"),
    ("data.jsonl", f'{GOOD}\r\n{{"prompt": "1", "reply": "1"}}', "line 2: KeyError('answer')"),
    ("data.jsonl", "prompt,answer\n1+1=,2\n", "data.jsonl, line 1: JSONDecodeError"),
    ("data.jsonl", f"[{GOOD}]", "line 1: TypeError"), ("data.jsonl", "null", "line 1: TypeError"),
    ("data.jsonl", '{"prompt": 1, "answer": 1}', "no string for a prompt, or no answer"),
    ("data.jsonl", '{"prompt": "", "answer": null}', "no string for a prompt, or no answer"),
    ("data.jsonl", f"{GOOD}\né", "utf-8"), ("data.jsonl", "\n", "no usable line"),
    ("data.jsonl", '{"prompt": "\\ud800", "answer": "1"}', "line 1: "),
    ("reward.py", "def f(", "SyntaxError"), ("reward.py", "import sys\nsys.exit()", "SystemExit"),
    ("model/chat_template.jinja", "no prompt", "the chat template leaves out the prompt"),
    ("model/chat_template.jinja", "{{ messages[1].content }}", "leaves out the prompt, or --system-prompt"),
    ("model/chat_template.jinja", "{{ raise_exception('No system role') }}", "No system role"),
    ("model/chat_template.jinja", "{% if %}", "TemplateSyntaxError"),
    *(("model/chat_template.jinja", template, "that the chat template takes") for template in (
        "{{ none + 1 }}", "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ messages.no() }}")),
    ("model/config.json", '{"auto_map": {"AutoConfig": "mine.Config"}}', "code which must be executed"),
    ("model/config.json", "{}", "Unrecognized model"), ("model/config.json", None, "no LoRA adapter"),
    ("model/config.json", "{", "--model model: "), ("model/model.safetensors", "{", "--model model: "),
    ("model/tokenizer.json", "{", "--model model: "), ("model/tokenizer.json", None, "no tokenizer in it")])
def test_bad_files_get_one_line_and_write_nothing(tiny, tmp_path, monkeypatch, capfd, name, text, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")
    Path("data.jsonl").write_text(f"\ufeff{GOOD}", encoding="utf-8")  # a byte order mark is fine
    if text is None:
        Path(name).unlink()
    else:
        Path(name).write_bytes(text.encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    reward = "reward:f" if name == "reward.py" else "verify:verify"
    flags = ["--train-data", "data.jsonl", "--reward", reward, "--system-prompt", "S"]
    assert message in error_of(capfd, *tiny_run(Path("model"), "new", *flags))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, TypeError])
def test_an_error_of_our_own_is_a_traceback(tiny, tmp_path, monkeypatch, error):
    def fails(*args):
        raise error("ours")

    monkeypatch.setattr(icpo, "rollout_metrics", fails)
    with pytest.raises(error, match="ours"):
        run(*tiny_run(tiny, tmp_path / "run", *REWARD))


def test_out_of_memory_names_the_flags(tiny, tmp_path, monkeypatch, capfd):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(icpo, "rollout_metrics", fails)
    error = error_of(capfd, *tiny_run(tiny, tmp_path / "run", *REWARD))
    assert error.startswith("CUDA out of memory") and "lower --micro-batch or add --gradient-checkpointing" in error


def test_checkpoints_that_are_missing_damaged_or_of_another_model_are_told(tiny, tmp_path, capfd):
    out = tmp_path / "run"
    assert run(*tiny_run(tiny, out, *REWARD)) == 0
    whole, logs = (out / "checkpoint.pt").read_bytes(), [(out / log).read_bytes() for log in LOGS]
    other = torch.load(io.BytesIO(whole), weights_only=True) | {"policy": {}}
    torch.save(other, tmp_path / "other")
    for content in ((tmp_path / "other").read_bytes(), whole[:999], None):
        (out / "checkpoint.pt").unlink()
        if content is not None:
            (out / "checkpoint.pt").write_bytes(content)
        assert f"no checkpoint of this model in {out}, or a damaged one" in error_of(capfd, "--resume", out)
    assert [(out / log).read_bytes() for log in LOGS] == logs
