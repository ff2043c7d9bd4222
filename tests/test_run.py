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


def texts(tokenizer, responses, openings=("",), truncated=False):
    """What the reward gets of these responses to one prompt, or to prompts that end with these openings."""
    cut = torch.full((len(responses),), truncated)
    rollout = SimpleNamespace(lengths=cut, truncated=cut, responses=lambda: responses)
    return icpo.texts_of(rollout, tokenizer, [icpo.Example("", "", [5], opening) for opening in openings])


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
        calls.append(response)
        if len(calls) == 3 * 16 + 2:
            signal.raise_signal(signal.SIGINT)
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
    assert len(rows_of(out / "metrics.jsonl")) == 4  # steps 0 to 3
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
    assert shown.returncode == 0 and not re.search(r"[\r|]|%", shown.stderr), shown.stderr
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
    ("--seed -1", "--seed"), ("--aggregation mean", "--aggregation"), 
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


# -------------------------------------------------------------------- The model comes out as it went in

def log_probs_alone(model, rollout, temperature=1.0):
    """The log-probs of all response tokens by plain forward passes over one row each, in float64."""
    rows = []
    for b, response in enumerate(rollout.responses()):
        prompt = rollout.prompts[b, -rollout.prompt_lengths[b]:].tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        log_p = (logits.double() / temperature).log_softmax(dim=1)
        rows.append(log_p[range(len(response)), response])
    return torch.cat(rows)


def draw(model, eos_ids=range(0, 258, 7)):
    generator = torch.Generator().manual_seed(0)
    return icpo.sample(model, [[3, 1, 4, 1, 5], [9], [2, 6, 5]], 3, 9, list(eos_ids), generator=generator)


OURS = {"model.safetensors", "generation_config.json"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_saved_is_the_given_folder_with_new_weights_and_end_tokens(tiny, tmp_path, dtype):
    source, target = tmp_path / "model", tmp_path / "run/model"
    shutil.copytree(tiny, source)
    edit(source / "generation_config.json", temperature=None)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    edit(source / "config.json", attention_dropout=0.1, rope_theta=500.0, of_a_later_version=[1])
    edit(source / "tokenizer_config.json", model_max_length=77, extra="kept")
    (source / "preprocessor_config.json").write_text('{"do_resize":  true}\n\n')
    (source / "custom").mkdir()
    (source / "custom/notes.txt").write_text("kept")
    (source / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [257, 9]}')
    assert run(*learning_run(source, tmp_path / "run", "--train-data", tiny / "one.jsonl")) == 0
    files = {path.relative_to(source): path for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(target) for path in target.rglob("*") if path.is_file()} == files.keys()
    assert len(files) > 8 and Path("chat_template.jinja") in files
    changed = {str(name) for name, path in files.items() if path.read_bytes() != (target / name).read_bytes()}
    assert changed == OURS
    ends = json.loads((target / "generation_config.json").read_text())
    assert ends == {"temperature": 0.9, "eos_token_id": [9, 257]}
    weights, given = load_file(target / "model.safetensors"), load_file(source / "model.safetensors")
    assert {name: (x.shape, x.dtype) for name, x in weights.items()} == {
        name: (x.shape, x.dtype) for name, x in given.items()}
    trained = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    trained.load_state_dict(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["policy"])
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == getattr(torch, dtype) and AutoTokenizer.from_pretrained(target)("is").input_ids == [256]
    rollout = draw(trained)
    expected = log_probs_alone(trained.to(loaded.dtype).float(), rollout)
    assert_close(log_probs_alone(loaded.float(), rollout), expected, atol=1e-6, rtol=0)
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert (log_probs_alone(before, rollout) - expected).abs().max() > 0.1


def test_a_run_in_the_folder_of_its_model_does_not_save_itself(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    assert run(*tiny_run(tmp_path / "model", tmp_path / "model/runs/a", *REWARD)) == 0
    assert not (tmp_path / "model/runs/a/model/runs/a/model").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model/runs/a/model").dtype == torch.bfloat16


def test_weights_are_trained_in_float32_whatever_the_checkpoint_holds(tiny, tmp_path):
    """In bf16, two steps of at most 4e-7 would be lost."""
    assert run(*learning_run(tiny, tmp_path / "run", "--lr", 1e-6, "--steps", 2)) == 0
    weights = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["policy"]
    moved = [(x != weights[name]).flatten() for name, x in load_file(tiny / "model.safetensors").items()]
    assert torch.cat([x.float() for x in moved]).mean() > 0.4


SIZES = {key: SHAPE[key] for key in SHAPE if key != "max_position_embeddings"} | {"max_position_embeddings": 64}
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
ARCHITECTURES = {  # special in cache, head or body; with images, dropout, noise, or more outputs
    "OPTForCausalLM": transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5),
    "Gemma2ForCausalLM": transformers.Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=1.5, attn_logit_softcapping=0.5, sliding_window=4),
    "Gemma3ForConditionalGeneration": transformers.Gemma3Config(
        text_config=SIZES | dict(head_dim=8, sliding_window=4, attention_dropout=0.4),
        vision_config=VISION, image_token_index=291, boi_token_index=292, eoi_token_index=293,
        mm_tokens_per_image=4),
    "Gemma3nForCausalLM": transformers.Gemma3nTextConfig(  # NaN for a gradient at zeros, as its pad token has
        **SIZES, head_dim=8, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2, layer_types=["full_attention"] * 2),
    "Mistral3ForConditionalGeneration": transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**SIZES, head_dim=8), image_token_index=291,
        vision_config=transformers.PixtralVisionConfig(**VISION)),
    "GraniteForCausalLM": transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "CohereForCausalLM": transformers.CohereConfig(**SIZES, logit_scale=0.2),
    "MixtralForCausalLM": transformers.MixtralConfig(
        **SIZES, num_local_experts=4, output_router_logits=True, router_jitter_noise=0.3),
    "PhimoeForCausalLM": transformers.PhimoeConfig(**SIZES, num_local_experts=4),  # jitter in eval mode too
    "Llama4ForCausalLM": transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "Qwen3_5ForCausalLM": transformers.Qwen3_5TextConfig(
        **SIZES | dict(num_hidden_layers=4), head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8),
    "FalconForCausalLM": transformers.FalconConfig(
        **SIZES, attention_dropout=0.1, hidden_dropout=0.1, alibi=False),
    "AfmoeForCausalLM": transformers.AfmoeConfig(  # names the mask in the call of its attention
        **SIZES, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "MptForCausalLM": transformers.MptConfig(
        vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, resid_pdrop=0.1, emb_pdrop=0.1,
        eos_token_id=257),
    "Qwen2ForCausalLM": Qwen2Config(**SIZES, output_hidden_states=True, return_dict=False)}
NOISY_IN_LAYERS = {"OPTForCausalLM", "FalconForCausalLM"}  # which checkpointing puts in train mode


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_models_get_what_each_row_alone_gets_train_and_are_saved_as_they_were(tmp_path, name):
    source, kind = tmp_path / "model", getattr(transformers, name)
    saved(source, make=kind, config=copy.deepcopy(ARCHITECTURES[name]))
    plain = kind.from_pretrained(  # sdpa leaves out what some architectures have
        source, dtype=torch.float32, attn_implementation="eager", return_dict=True).eval()
    checkpointing = name not in NOISY_IN_LAYERS
    model, _, eos_ids = icpo.load_model(str(source), "cpu", checkpointing)
    assert model.is_gradient_checkpointing == checkpointing
    rollout = draw(model)
    assert len(set(rollout.lengths.tolist())) > 1
    for log_probs in (rollout.log_probs, icpo.token_log_probs(model, rollout, max_logits=1500)):
        assert_close(log_probs[rollout.mask].double(), log_probs_alone(plain, rollout), atol=5e-5, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = icpo.update(model, optimizer, rollout, torch.randn(9), Config(micro_batch=4))
    assert metrics["sampling/logp_difference"] < 1e-4 and 0 < metrics["grad_norm"] < math.inf
    icpo.save_model(model, eos_ids, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (source / "config.json").read_bytes()
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", source))
    assert_close(again, first, atol=0, rtol=0)  # the same names and dtypes, too


FEW = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2)
SOME = FEW | dict(num_attention_heads=4, intermediate_size=48, eos_token_id=257)


@pytest.mark.parametrize("kind, config, message", [
    ("Qwen2ForSequenceClassification", Qwen2Config(**SOME), ""), ("Qwen2Model", Qwen2Config(**SOME), ""),
    ("Qwen2ForCausalLM", Qwen2Config(**SOME | {"eos_token_id": None}), "no eos token"),
    ("MambaForCausalLM", transformers.MambaConfig(**FEW), ""),  # states in place of a cache
    ("RwkvForCausalLM", transformers.RwkvConfig(**FEW, attention_hidden_size=32), ""),
    ("BertLMHeadModel", transformers.BertConfig(**SOME), "sampled and scored log-probs differ"),  # looks ahead
    ("OPTForCausalLM", transformers.OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32), "sampled and scored log-probs differ"),
    ("OpenAIGPTLMHeadModel", transformers.OpenAIGPTConfig(vocab_size=258, n_embd=36), "")])  # no cache
def test_models_that_cannot_be_trained_get_one_line_and_write_nothing(tmp_path, capfd, kind, config, message):
    tokenizer = saved(tmp_path / "model", make=getattr(transformers, kind), config=config)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    flags = tiny_run(tmp_path / "model", tmp_path / "run", *REWARD, "--gradient-checkpointing")
    error = error_of(capfd, *flags)
    assert message in error and error.startswith(f"--model {tmp_path / 'model'}: ")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- The tokenizer is its file

def sentencepiece(prepend=False, begin=True):
    """The layout of Llama 2: spaces as ▁, bytes for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij0123.", "▁a", "ab"]
    tokenizer = Tokenizer(models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b")], unk_token="<unk>",
        fuse_unk=True, byte_fallback=True))
    if prepend:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        first = [normalizers.Prepend("▁")] if begin else []
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if begin else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def byte_level(*before, prefix=False):
    """The layout of GPT-2, with what splits the text before."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not before)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=285, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["so 12 and 123 is a sum, and so is 1234\n\nand the end"] * 3, trainer)
    return tokenizer


def begins(tokenizer, token):
    tokenizer.add_special_tokens([token])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))])
    return tokenizer


THREES = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"), "isolated")
ONES = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{N}]+|\s+"), "isolated")
LAYOUTS = {
    "deepseek-math": ("LlamaTokenizerFast", lambda: begins(byte_level(ONES), "<bos>"), {"legacy": True}),
    "R1-Distill-Llama": ("LlamaTokenizer", lambda: begins(byte_level(THREES), "<bos>"), {"add_bos_token": True}),
    "deepseek-coder, no BOS": ("LlamaTokenizerFast", lambda: byte_level(ONES), {"add_bos_token": False}),
    "Llama 2": ("LlamaTokenizer", lambda: begins(sentencepiece(), "<s>"), {"add_bos_token": True, "legacy": False}),
    "Llama 2, no BOS": ("LlamaTokenizerFast", lambda: sentencepiece(), {"add_bos_token": False}),
    "Llama 3": ("PreTrainedTokenizerFast", lambda: begins(byte_level(THREES), "<bos>"), {}),
    "Mistral": ("LlamaTokenizer", lambda: begins(sentencepiece(prepend=True), "<s>"), {"add_prefix_space": None}),
    "Gemma": ("GemmaTokenizer", lambda: begins(sentencepiece(begin=False), "<s>"), {"add_bos_token": True}),
    "Qwen": ("Qwen2Tokenizer", lambda: byte_level(ONES), {"add_prefix_space": False}),
    "SmolLM2": ("GPT2Tokenizer", lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)), {}),
    "GPT-2, a space first": ("GPT2Tokenizer", lambda: byte_level(prefix=True), {"add_prefix_space": True})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_texts_are_those_of_the_tokenizer_file(tiny, tmp_path, layout):
    kind, make, settings = LAYOUTS[layout]
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken(" wide ", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), AddedToken("</s>")])
    saved(tmp_path, vocab_size=400)
    for old in tmp_path.glob("*token*"):
        old.unlink()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    begin = "<bos>" if tokenizer.token_to_id("<bos>") else "<s>" if tokenizer.token_to_id("<s>") else None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": kind, "eos_token": "</s>", "bos_token": begin} | settings))
    oracle, (_, loaded, _) = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), icpo.load_model(
        str(tmp_path), "cpu")
    examples = []
    for text in ("so 1234 and 56", " a  ab\n\nis it 3 + 4 = 7 .", "é日本\u00a0🙂 don't", "a<think>b <|im_end|>  a wide b",
                 "\ta b ", "</s>a", "</ s>"):
        for special in (True, False):
            expected = oracle.encode(text, add_special_tokens=special).ids
            assert loaded(text, add_special_tokens=special).input_ids == expected, (text, special)
        assert texts(loaded, [expected], truncated=True) == [oracle.decode(expected, skip_special_tokens=False)]
        examples.append(expected)
    assert len(set(map(tuple, examples))) == 7


# ------------------------------------------------------------------------------------- Prompts and responses

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_prompts_go_through_the_chat_template_and_references_stay_as_they_are(tiny, tmp_path):
    _, tokenizer, _ = icpo.load_model(str(tiny), "cpu")
    values = [72, 0.5, True, [12, 13], ["a"], {"target": 5, "numbers": [2, None]}, "plain", "so\n#### 18"]
    rows = [{"q": "2+2 is 4", "a": value} for value in values]
    keys = {"prompt_key": "q", "answer_key": "a"}
    examples = examples_of(tmp_path, tokenizer, rows, system_prompt="S", prompt_suffix="!", **keys)
    assert {tokenizer.decode(example.ids) for example in examples} == {"[system]S[user]2+2 is 4![assistant]"}
    assert [example.reference for example in examples] == values
    example, *_ = examples_of(tmp_path, tokenizer, rows, no_chat_template=True, system_prompt="S:", **keys)
    assert tokenizer.decode(example.ids) == "S:2+2 is 4" and 256 in example.ids


def test_prompts_that_leave_no_room_and_blank_lines_are_passed_over(tiny, tmp_path, capsys):
    _, tokenizer, _ = icpo.load_model(str(tiny), "cpu")
    room = 256 - 9 - len("[user][assistant]")
    rows = [json.dumps({"prompt": "x" * n, "answer": "1"}) for n in (room + 1, room)]
    (tmp_path / "data.jsonl").write_text("\n \n".join(rows))
    example, = icpo.load_examples(str(tmp_path / "data.jsonl"), tokenizer, Config(max_new_tokens=9))
    assert len(example.ids) == 256 - 9 and "1 of 3 lines" in capsys.readouterr().out


@pytest.mark.parametrize("kwargs, end", [
    ("{}", "<think>\n"), ('{"enable_thinking": false}', "<think>\n\n</think>\n\n")])
def test_chat_template_kwargs_reach_the_template(tmp_path, capfd, kwargs, end):
    thought = "<think>\n{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
    saved(tmp_path / "model", CHATML.replace("{% endif %}", thought + "{% endif %}"))
    flags = ["--chat-template-kwargs", kwargs, "--prompt-suffix", " é?", *REWARD]
    assert run(*tiny_run(tmp_path / "model", tmp_path / "run", *flags)) == 0
    prompt = f"<|im_start|>user\n1 é?<|im_end|>\n<|im_start|>assistant\n{end}"
    assert repr(prompt) in capfd.readouterr().out.splitlines()
    opened = [row["response"].startswith(end) for row in rows_of(tmp_path / "run/samples.jsonl")]
    assert opened == [kwargs == "{}"] * 8


@pytest.mark.parametrize("end, opening", [
    ("<think>\n", "<think>\n"), ("", ""), ("<think>\n\n", "<think>\n\n"), ("<think>\n\n</think>\n\n", "")])
def test_a_thought_that_the_template_opens_belongs_to_the_response(tmp_path, end, opening):
    saved(tmp_path, CHATML.replace("assistant\n{% endif", f"assistant\n{end}{{% endif"))
    _, tokenizer, _ = icpo.load_model(str(tmp_path), "cpu")
    example, = examples_of(tmp_path, tokenizer, [{"prompt": "Write <think> first.", "answer": "7"}])
    assert example.opening == opening and tokenizer.decode(example.ids).startswith("<|im_start|>user")
    ids = tokenizer("maybe \\boxed{7}").input_ids
    cut, other = texts(tokenizer, [ids, ids], [example.opening, "<x>"], truncated=True)
    assert (cut, other) == (opening + "maybe \\boxed{7}", "<x>maybe \\boxed{7}")
    assert verify(cut, "7") is (opening == "")


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_the_token_that_closes_a_message_ends_a_response_and_is_all_that_the_reward_does_not_see(tmp_path, kind):
    tokenizer = saved(tmp_path, CHATML, **{kind: ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    _, loaded, eos_ids = icpo.load_model(str(tmp_path), "cpu")
    assert eos_ids == [257, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    written = "<think>3 + 4 .</think>7"
    for end in ("<|im_end|>", "<|endoftext|>"):
        ids = tokenizer(written + end).input_ids
        assert texts(loaded, [ids, ids[-1:]]) == [written, ""]
        assert texts(loaded, [ids], truncated=True) == [written + end]  # the last token did not end it
    for template in (PLAIN, "{{ 1 / 0 }}", None):
        tokenizer.chat_template = template
        assert icpo.closing_token(tokenizer) == set()


def test_a_prompt_begins_once_and_does_not_end(tmp_path):
    tokenizer = saved(tmp_path, special=["<s>", "</s>"])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    plain, config = tokenizer("2+2").input_ids, Config(max_new_tokens=9)
    for single in ("$A", "<s> $A", "$A </s>", "<s> $A </s>"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", bos), ("</s>", eos)])
        tokenizer.chat_template = None
        begun = [bos] if "<s>" in single else []
        assert icpo.encode("2+2", tokenizer, config) == (begun + plain, "")
        tokenizer.chat_template = "<s>{{ messages[0].content }}"
        assert icpo.encode("2+2", tokenizer, config) == ([bos, *plain], "")


# --------------------------------------------------------------------------------------------------- Rewards

def test_a_call_gets_its_own_copy_of_the_reference(tiny, tmp_path, monkeypatch):
    def reward(response, reference):
        seen.append(list(reference))
        reference.clear()
        return by_letters(response, None)

    seen = []
    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": [3, 4]}])
    flags = ["--train-data", data, "--prompts-per-step", 2, "--steps", 2]
    assert run(*tiny_run(tiny, tmp_path / "run", *flags)) == 0
    assert seen == [[3, 4]] * 32
    assert [row["reference"] for row in rows_of(tmp_path / "run/samples.jsonl")] == [[3, 4]] * 16


def test_failed_calls_score_as_the_lowest_of_their_group_and_the_first_is_shown_once(caplog):
    class Reward(dict):  # without a hash
        def __call__(self, response, reference):
            if response == "x":
                sys.exit("as code that a model writes may")
            return self[response]

    reward = Reward(a=1.0, b=math.nan, c="no number", d=1e300, l=-1.0, m=-0.5)
    for first in "bcdxe":
        warning_once.cache_clear()
        caplog.clear()
        responses = ["a", "l", first, "m", "a", "b", "x", "e"]
        rewards, failed = icpo.score_responses(reward, responses * 2, [icpo.Example("", "r", [])] * 4)
        assert rewards.tolist() == [[1, -1, -1, -0.5], [1, 1, 1, 1]] * 2, first
        assert failed.tolist() == [[False, False, True, False], [False, True, True, True]] * 2
        assert caplog.text.count("a reward failed") <= 1 and caplog.text.count("Traceback") <= 1
    rewards, failed = icpo.score_responses(reward, ["x"] * 2, [icpo.Example("", "r", [])])
    assert rewards.tolist() == [[0, 0]] and failed.all()

    def stopped(response, reference):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        icpo.score_responses(stopped, ["a"], [icpo.Example("", "r", [])])


def test_rewards_that_all_fail_end_the_first_step_and_no_later_one(tiny, tmp_path, monkeypatch, capfd):
    def reward(response, reference):
        calls.append(1)
        if len(calls) > working:
            raise (SystemExit, ValueError)[len(calls) % 2]("out of time")
        return len(calls) % 2

    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    flags = ["--steps", 3, "--prompts-per-step", 1, "--group-size", 4]
    calls, working = [], 0
    error = error_of(capfd, *tiny_run(tiny, tmp_path / "a", *flags, "--reward", "mine:f"))
    assert error == "--reward mine:f: all calls of the first step failed"
    calls, working = [], 4
    assert run(*tiny_run(tiny, tmp_path / "b", *flags)) == 0
    assert [row.get("reward/errors") for row in rows_of(tmp_path / "b/metrics.jsonl")] == [None, 0, 4, 4]


def test_a_reward_that_changes_the_folder_leaves_the_run_where_it_was(tiny, tmp_path, monkeypatch):
    def moving(response="", reference=""):
        os.chdir("/")
        torch.set_grad_enabled(False)  # for everyone
        return by_letters(response, reference)

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "mine")
    monkeypatch.setattr(icpo, "load_reward", lambda spec: moving() or moving)
    try:
        assert run(*tiny_run(Path("mine"), "run", "--eval-data", "mine/one.jsonl", "--steps", 2)) == 0
    finally:
        torch.set_grad_enabled(True)
    assert (tmp_path / "run/model/config.json").exists() and len(rows_of(tmp_path / "run/metrics.jsonl")) == 3


# ----------------------------------------------------------------------------------------- The built-in task

SUMS = [(a, b) for a in range(10, 100) for b in range(10, 100) if a % 10 + b % 10 > 9]
WAYS = list(itertools.product((False, True), repeat=3))


def read(text):
    """The operands of both columns, the comma, and the answer of a worked sum; None where an equation is wrong."""
    u, v, units, comma, x, y, partial, carry, tens, answer = re.fullmatch(
        r"(\d)\+(\d)=(\d+)(,?) (\d)\+(\d)=(\d+)\+([01])=(\d+) #### (\d+)", text).groups()
    right = (int(u) + int(v) == int(units) and int(x) + int(y) == int(partial)
             and int(partial) + int(carry) == int(tens) and answer == tens + units[-1])
    return ((int(u), int(v)), (int(x), int(y)), comma, int(answer)) if right else None


def test_each_of_the_eight_ways_is_right_and_without_the_carry_ten_too_low():
    for a, b in SUMS:
        written = [addition.worked_addition(a, b, way) for way in WAYS]
        for (swap_units, swap_tens, comma), text in zip(WAYS, written):
            units, tens, separator, answer = read(text)
            assert answer == a + b and separator == "," * comma
            assert units == ((b % 10, a % 10) if swap_units else (a % 10, b % 10))
            assert tens == ((b // 10, a // 10) if swap_tens else (a // 10, b // 10))
        assert len(set(written)) == 8 or a % 10 == b % 10 or a // 10 == b // 10
        assert {read(addition.worked_addition(a, b, way, False))[3] for way in WAYS} == {a + b - 10}


def test_verify_agrees_with_arithmetic():
    for a, b in random.Random(0).sample(SUMS, 100):
        for way, carry in itertools.product(WAYS, (True, False)):
            assert verify(addition.worked_addition(a, b, way, carry), str(a + b)) is carry


@pytest.mark.parametrize("usual_error", [0.95, 0.05, 0.5])
def test_the_teacher_errs_as_his_way_has_it(usual_error):
    random.seed(0)
    ways, wrong = Counter(), Counter()
    for _ in range(14_000):
        units, tens, comma, answer = read(addition.demonstration(47, 85, usual_error))
        way = units, tens, comma
        ways[way] += 1
        wrong[way] += answer != 132
    usual = (7, 5), (4, 8), ""
    assert len(ways) == 8
    for way, count in ways.items():
        assert count == pytest.approx(7000 if way == usual else 1000, abs=250 if way == usual else 150)
        error = usual_error if way == usual else 1 - usual_error
        assert wrong[way] / count == pytest.approx(error, abs=0.06)


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """The flags of the built-in task with a short apprenticeship to a teacher who errs in half of all cases."""
    before, addition.ROOT = addition.ROOT, tmp_path_factory.mktemp("task")
    yield addition.prepare(seed=3, usual_error=0.5, imitation_steps=300)
    addition.ROOT = before


def test_the_task_is_made_once_and_its_sums_are_apart(task, monkeypatch):
    monkeypatch.setattr(addition, "write_task", lambda *args: pytest.fail("made again"))
    assert addition.prepare(seed=3, usual_error=0.5, imitation_steps=300) == task
    paths = dict(flag.split("=") for flag in task)
    train, held_out = (rows_of(paths[name]) for name in ("--train-data", "--eval-data"))
    sums = [row["prompt"] for row in [*train, *held_out]]
    assert sorted(sums) == sorted(f"{a}+{b}=" for a, b in SUMS) and len(held_out) == 512
    assert all(eval(row["prompt"].strip("=")) == int(row["answer"]) for row in train)


def test_without_a_model_the_task_is_trained_with_its_own_defaults(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(addition, "prepare", lambda seed: [f"--model=task{seed}", "--train-data=t", "--lr=0.5"])
    monkeypatch.setattr(icpo, "train", seen.append)
    for flags in ([], ["--lr", 2], ["--seed", 4], ["--model", "m", "--train-data", "d"]):
        assert run(*flags) == 0
    expected = dict(model="task0", train_data="t", lr=0.5)
    assert seen == [Config(**expected), Config(**expected | {"lr": 2.0}),
                    Config(**expected | {"model": "task4", "seed": 4}), Config(model="m", train_data="d")]


@pytest.mark.parametrize("direction", [1, -1], ids=["learns", "negated advantages un-learn"])
def test_the_task_is_learned(task, tmp_path, monkeypatch, direction):
    advantage = icpo.icpo_advantage
    monkeypatch.setattr(icpo, "icpo_advantage", lambda *args: direction * advantage(*args))
    flags = ["--steps", 7, "--eval-rows", 128, "--eval-samples", 0, "--output-dir", tmp_path / "run"]
    assert run(*task, *flags) == 0
    first, *_, last = rows_of(tmp_path / "run/metrics.jsonl")
    assert (last["eval/accuracy"] - first["eval/accuracy"]) * direction > 0.1
