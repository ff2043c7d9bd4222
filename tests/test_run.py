"""Whole runs of icpo.py, faults, and what people bring: offline, on tiny models. SLOW=1 kills more runs."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers.utils.logging import warning_once

import icpo
from examples import addition
from icpo import Config
from tests.common import CHATML, ROOT, by_letters, rows_of, saved, tiny, tiny_run, write_jsonl

REWARD = ("--reward", "tests.common:by_letters")
GOOD = '{"prompt": "1+1=", "answer": "2"}'


def run(*flags):
    return icpo.main([str(flag) for flag in flags])


def in_a_process(*flags, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, flags)], cwd=cwd, capture_output=True, text=True)


def error_of(capfd, *flags):
    """The one line that a run in vain shows."""
    assert run(*flags) == 2
    error = capfd.readouterr().err.split("icpo.py: error: ")[1].strip()
    assert "\n" not in error
    return error


def learning_run(model, out, *flags):
    """The flags of a run whose weights move in every step, with a checkpoint of each."""
    return tiny_run(
        model, out, "--eval-data", model / "one.jsonl", "--lr", 1e-2, "--steps", 4, "--save-every", 1,
        "--eval-every", 2, "--kl-coef", 0.1, "--prompts-per-step", 2, *REWARD, *flags)


def result_of(out):
    """All that a run leaves: its step, weights, optimizer and logs, and the saved model."""
    state = torch.utils._pytree.tree_leaves(torch.load(out / "checkpoint.pt"))
    numbers = [torch.as_tensor(x).tolist() for x in state if x is not None]
    return numbers, [(out / name).read_bytes() for name in (*icpo.LOGS, "model/model.safetensors")]


# -------------------------------------------------------------------------- A run has a folder, and continues

def test_a_run_has_a_folder_of_its_own_that_is_new_or_empty(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(icpo, "strftime", lambda name: name.replace("%Y%m%d-%H%M%S", "20260102-030405"))
    Path("mine").mkdir()
    for out in ("", "mine"):
        assert run(*tiny_run(tiny, out, *REWARD)) == 0
    assert os.listdir("runs") == [f"{tiny.name}-20260102-030405"] and Path("mine/config.json").exists()
    monkeypatch.setattr(icpo, "load_model", lambda *args: pytest.fail("a model was loaded"))
    for out in ("", "mine"):
        assert "is not empty" in error_of(capfd, *tiny_run(tiny, out, *REWARD))


def test_of_two_runs_that_begin_at_once_one_gets_a_line(tiny, tmp_path, monkeypatch, capfd):
    def other_run(*args):
        monkeypatch.undo()
        assert run(*learning_run(tiny, out)) == 0
        return icpo.load_examples(*args)

    out = tmp_path / "run"
    monkeypatch.setattr(icpo, "load_examples", other_run)
    error = error_of(capfd, *learning_run(tiny, out))
    assert str(out) in error and "xists" in error


def test_resumed_runs_keep_their_settings_take_those_given_and_end_as_unbroken_ones(tiny, tmp_path, capfd):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*learning_run(tiny, whole)) == run(*learning_run(tiny, broken, "--steps", 2)) == 0
    for log in icpo.LOGS:
        with open(broken / log, "ab") as file:
            file.write(b'{"step": 3}\n{"st')  # a step of which there is no checkpoint, and half of a line
    for _ in range(2):  # the second time there is nothing left to do
        assert run("--resume", broken, "--steps", 4) == 0
        assert result_of(broken) == result_of(whole)
    rows = rows_of(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4] and rows[4]["kl/ref"] > 0
    kept, expected = (json.loads((out / "config.json").read_text()) for out in (broken, whole))
    assert kept == expected | {"resume": str(broken), "output_dir": str(broken)}
    (broken / "checkpoint.pt").unlink()
    assert "checkpoint.pt" in error_of(capfd, "--resume", broken)


def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(tiny, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["icpo", "tests.test_run"])  # spares each process the import of torch
    out, whole, chance = tmp_path / "run", tmp_path / "whole", np.random.default_rng(0)
    assert run(*learning_run(tiny, whole, "--steps", 8)) == 0
    kills, seconds = 0, 2
    while kills < (20 if "SLOW" in os.environ else 4):
        resumed = (out / "checkpoint.pt").exists()
        if not resumed:
            shutil.rmtree(out, ignore_errors=True)
        flags = ["--resume", out] if resumed else learning_run(tiny, out, "--steps", 8)
        process = context.Process(target=run, args=flags)
        process.start()
        process.join(chance.uniform(0.1, 1) * seconds)  # while it reads, evaluates, trains or saves
        process.kill()
        process.join()
        killed = process.exitcode == -9
        kills += killed and resumed
        seconds *= 1.1 if killed else 0.8
        if not killed:  # it had come to its end: begin another
            assert result_of(out) == result_of(whole)
            shutil.rmtree(out)
    assert run("--resume", out) == 0
    assert result_of(out) == result_of(whole)


@pytest.mark.parametrize("step, told", [(0, ""), (4, "--resume {} continues after step 2")])
def test_ctrl_c_in_a_save_tells_how_to_resume_from_the_last(tiny, tmp_path, monkeypatch, capfd, step, told):
    def cut(state, path):
        save(state, path)
        if state["step"] == step:
            os.truncate(path, 999)
            raise KeyboardInterrupt

    out, save, flags = tmp_path / "run", torch.save, ["--save-every", 2]
    monkeypatch.setattr(torch, "save", cut)
    assert run(*learning_run(tiny, out, *flags)) == 130
    monkeypatch.undo()
    assert capfd.readouterr().err.splitlines()[-1] == f"icpo.py: stopped; {told.format(out)}"
    if told:  # else there is nothing to resume
        assert run("--resume", out) == run(*learning_run(tiny, tmp_path / "whole", *flags)) == 0
        assert result_of(out) == result_of(tmp_path / "whole")


def test_random_numbers_follow_from_the_seed_and_the_step(tiny, tmp_path):
    responses = []
    for seed in (0, 1):
        flags = ["--steps", 2, "--seed", seed, "--lr", 1e-30, "--prompts-per-step", 1, *REWARD]
        assert run(*tiny_run(tiny, tmp_path / str(seed), *flags)) == 0
        rows = [row["response"] for row in rows_of(tmp_path / str(seed) / "samples.jsonl")]
        responses += [tuple(rows[:8]), tuple(rows[8:])]
    assert len(set(responses)) == 4


@pytest.mark.parametrize("warmup, rate", [(0, 0.25), (4, 0.0625)])
def test_adamw_first_moves_a_weight_by_the_learning_rate_which_warms_up(tiny, tmp_path, warmup, rate):
    assert run(*tiny_run(tiny, tmp_path / "run", "--lr", 0.25, "--warmup-steps", warmup, *REWARD)) == 0
    before = load_file(tiny / "model.safetensors")
    after = torch.load(tmp_path / "run/checkpoint.pt")["policy"]
    moves = [(after[name] - x.float()).abs().max().item() for name, x in before.items()]
    assert max(moves) == pytest.approx(rate, rel=1e-3)


def test_values_of_numpy_become_those_of_python_which_can_be_written():
    given = dict(steps=np.int64(1), lr=np.float32(0.25), beta=np.logspace(0, 2, 3)[1], resume=np.str_("run"),
                 keep_uniform_groups=np.bool_(True), max_new_tokens=np.arange(9)[4])
    kept = json.loads(json.dumps(vars(Config(**given))))
    assert [repr(kept[name]) for name in given] == ["1", "0.25", "10.0", "'run'", "True", "4"]


def test_every_example_once_an_epoch():
    config = Config(prompts_per_step=4)
    taken = [i for step in range(1, 16) for i in icpo.batch_of(range(10), step, config)]
    epochs = [taken[start:start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert icpo.batch_of(range(10), 1, Config(prompts_per_step=10, seed=1)) != epochs[0]


def test_evaluation_equals_loops(tiny, capsys):
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    examples = [icpo.Example("", n, [n + 1] * (n + 1)) for n in range(5)]
    reward = Mock(side_effect=by_letters)
    config = Config(prompts_per_step=2, group_size=3, eval_samples=3, max_new_tokens=5, seed=3)
    metrics = icpo.evaluate(model, tokenizer, eos_ids, examples, reward, config)
    written, references = zip(*[call.args for call in reward.call_args_list])
    assert references == (0, 1, 2, 3, 4, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)
    rewards = list(map(by_letters, written, references))
    greedy, sampled = rewards[:5], rewards[5:]
    assert metrics == pytest.approx({
        "eval/accuracy": sum(greedy) / 5, "eval/mean_at_k": sum(sampled) / 15,
        "eval/pass_at_k": sum(max(sampled[start:start + 3]) for start in range(0, 15, 3)) / 5})
    assert metrics["eval/mean_at_k"] < metrics["eval/pass_at_k"] and len(set(greedy)) > 1
    assert f"-> {written[0][-40:]!r}" in capsys.readouterr().out
    assert icpo.evaluate(model, tokenizer, eos_ids, examples, reward, config) == metrics
    reward.side_effect = [1] * 5 + [ValueError, 2, 1] * 5  # a failed call counts as 0 here
    assert icpo.evaluate(model, tokenizer, eos_ids, examples, reward, config)["eval/mean_at_k"] == 1


# --------------------------------------------------------------------------- The command line, and its errors

def test_help_without_docstrings_explains_every_flag_with_its_default():
    shown = in_a_process("-OO", icpo.__file__, "--help")
    text = re.sub(r"\s+", " ", shown.stdout)
    for name, field in Config.__dataclass_fields__.items():
        flag = f" --{name.replace('_', '-')}"
        told = re.search(flag + r"( [][A-Z_]+| {[a-z,]+})? ([a-zA-Z][^-].{9,}?) \(default: (.*?)\)", text)
        assert told and told[3] == str(field.default), (name, shown.stderr)


def test_importing_icpo_registers_nothing_and_sets_nothing():
    script = """
import signal, sys, torch, transformers
def state():
    interfaces = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    return [*map(sorted, interfaces), *map(signal.getsignal, signal.valid_signals()), sys.path[:],
            torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.backends.cuda.cudnn_sdp_enabled()]
before = state()
import icpo
sys.exit(before != state())"""
    assert in_a_process("-c", script).returncode == 0


def test_a_log_in_a_file_has_a_line_a_step_and_own_modules_come_first(tiny, tmp_path):
    (tmp_path / "verify.py").write_text("def verify(response, reference): return len(response) % 4 / 4")
    flags = ("--eval-data", tiny / "one.jsonl", "--eval-every", 2, "--steps", 6, "--reward", "verify:verify")
    shown = in_a_process(icpo.__file__, *tiny_run(tiny, "own", *flags, "--beta", "-1e1"), cwd=tmp_path)
    assert shown.returncode == 0 and not re.search(r"[\r|%]", shown.stdout + shown.stderr), shown.stderr
    lines = shown.stdout.splitlines()
    assert [line[:4] for line in lines if line[1:4] == "/6 "] == [f"{n}/6 " for n in range(1, 7)]
    assert sum(line.startswith("accuracy ") for line in lines) == 4 and len(lines) <= 6 + 4 + 7
    assert repr("[user]1[assistant]") in lines  # the first prompt, as the model gets it
    rows = rows_of(tmp_path / "own/samples.jsonl")
    assert [row["reward"] for row in rows] == [len(row["response"]) % 4 / 4 for row in rows]
    assert json.loads((tmp_path / "own/config.json").read_text())["beta"] == -10
    assert in_a_process(icpo.__file__, *tiny_run(tiny, "ours"), cwd=tmp_path).returncode == 0
    assert {row["reward"] for row in rows_of(tmp_path / "ours/samples.jsonl")} == {0}


@pytest.mark.parametrize("name, text, message", [
    ("--group-size", "1", "--group-size: must be at least 2"), ("--seed", "-1", "--seed -1: out of range"),
    ("--alpha", "-1", "--alpha -1.0: out of range"), ("--beta", "nan", "--beta nan: out of range"),
    ("--train-data", "", "need each other"), ("--model", "", "need each other"),
    ("--resume", "absent", "'absent/config.json'"), ("--eval-data", "absent", "No such file or directory"),
    ("--max-new-tokens", "500", "no usable line"), ("--chat-template-kwargs", "{", "JSONDecodeError"),
    ("--reward", "verify:nothing", "nothing"), ("--model", "models/typo", "--model models/typo: "),
    pytest.param("--device", "cuda", "CUDA", marks=pytest.mark.skipif("torch.cuda.is_available()")),
    ("data.jsonl", f"{GOOD}\n \n{{oops\n", "data.jsonl, line 3: JSONDecodeError"),
    ("data.jsonl", f'{GOOD}\r\n{{"prompt": "1", "reply": "1"}}', "line 2: KeyError('answer')"),
    ("data.jsonl", '{"prompt": "", "answer": null}', "no answer"), ("data.jsonl", "é", "UnicodeDecodeError"),
    ("data.jsonl", '{"prompt": 1, "answer": 1}', "line 1: "), ("reward.py", "def f(", "SyntaxError"),
    ("data.jsonl", '{"prompt": "\\ud800", "answer": 1}', "line 1: "), ("reward.py", "exit()", "SystemExit"),
    ("chat_template.jinja", "only S", "leaves out the prompt"), ("tokenizer.json", None, "tokenizer.json"),
    ("chat_template.jinja", "{{ messages[1].content }}", "or --system-prompt"),
    ("chat_template.jinja", "{{ 1 / 0 }}", "ZeroDivisionError"), ("config.json", None, "no LoRA adapter"),
    ("config.json", '{"auto_map": {"AutoConfig": "mine.Config"}}', "code which must be executed"),
    ("model.safetensors", "{", "--model .: "), ("tokenizer.json", "{", "--model .: ")])
def test_bad_flags_and_files_get_one_line_and_write_nothing(
        tiny, tmp_path, monkeypatch, capfd, name, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(addition, "prepare", lambda seed: pytest.fail("a task for the user's data"))
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    Path("data.jsonl").write_text(f"\ufeff{GOOD}", encoding="utf-8")  # a byte order mark is fine
    flags = ["--train-data", "data.jsonl", "--system-prompt", "S"]
    flags += ["--reward", "reward:f"] * (name == "reward.py")
    if name.startswith("--"):
        flags += [name, text]
    elif text is None:
        Path(name).unlink()
    else:
        Path(name).write_bytes(text.encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    assert message in error_of(capfd, *tiny_run(Path(), "new", *flags))
    assert sorted(tmp_path.rglob("*")) == before


def test_our_own_errors_are_tracebacks_but_no_memory_is_a_line(tiny, tmp_path, monkeypatch, capfd):
    errors = [ValueError("ours"), KeyError("ours"), RuntimeError("ours"), torch.OutOfMemoryError("no memory")]
    monkeypatch.setattr(icpo, "rollout_metrics", Mock(side_effect=errors))
    for error in errors[:3]:
        with pytest.raises(type(error), match="ours"):
            run(*tiny_run(tiny, tmp_path / type(error).__name__, *REWARD))
    assert error_of(capfd, *tiny_run(tiny, tmp_path / "run", *REWARD)) == "no memory"


# ----------------------------------------------------------------------------- Rewards, prompts and responses

def test_a_failed_call_scores_as_the_lowest_of_its_group_or_zero_and_is_shown_once(caplog):
    warning_once.cache_clear()
    responses = ["1", "-1", "math.nan", "-math.inf", "1", "[]", "1 / 0", "exec('raise SystemExit')", "?"]
    examples = [icpo.Example("", "r", [])] * 3
    rewards, failed = icpo.score_responses(lambda text, _: eval(text), responses, examples)
    assert rewards.tolist() == [[1, -1, -1], [1, 1, 1], [0, 0, 0]]
    assert failed.tolist() == [[False, False, True], [True, False, True], [True, True, True]]
    assert caplog.text.count("Traceback") == 1
    with pytest.raises(KeyboardInterrupt):  # which is no failure of the reward
        icpo.score_responses(Mock(side_effect=KeyboardInterrupt), ["1"], examples[:1])


def test_rewards_that_all_fail_in_a_later_step_end_nothing(tiny, tmp_path, monkeypatch):
    reward = Mock(side_effect=[0, 1, 0, 1] + [ValueError] * 8)
    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    flags = ["--steps", 3, "--prompts-per-step", 1, "--group-size", 4]
    assert run(*tiny_run(tiny, tmp_path / "run", *flags)) == 0
    assert [row.get("reward/errors") for row in rows_of(tmp_path / "run/metrics.jsonl")] == [None, 0, 4, 4]


def test_a_reward_that_changes_its_reference_changes_only_its_own_copy():
    examples = [icpo.Example("", [], []), icpo.Example("", [0], [])]
    rewards, _ = icpo.score_responses(lambda text, own: own.append(text) or len(own), list("abcd"), examples)
    assert rewards.tolist() == [[1, 1], [2, 2]]
    assert [example.reference for example in examples] == [[], [0]]


def test_rollout_metrics_by_hand():
    rollout = SimpleNamespace(
        entropies=torch.tensor([[1.0, 2.0], [3.0, 0.0]]), mask=torch.tensor([[True, True], [True, False]]),
        lengths=torch.tensor([2, 1]), truncated=torch.tensor([True, False]))
    rewards = torch.tensor([[0.5, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    l = torch.tensor([[-1.0, -2.0], [-1.0, -3.0], [-1.0, -4.0], [-5.0, -6.0]])
    metrics = icpo.rollout_metrics(rollout, rewards, l, beta=1e4)
    assert metrics == pytest.approx({
        "reward/verified": 5.5 / 8, "groups/uniform_frac": 1 / 4,
        "preference/agreement": 1 / 3,  # two groups agree, one does not, and one is uniform
        "confidence/correct": -17 / 5, "confidence/wrong": -6 / 3,
        "entropy": 2.0, "length/mean": 1.5, "length/truncated_frac": 0.5})
    assert icpo.rollout_metrics(rollout, rewards, l, beta=-1e4) == metrics  # it tells of the model
    assert icpo.rollout_metrics(rollout, torch.ones(4, 2), l, beta=1.0)["confidence/wrong"] is None


def texts(tokenizer, responses, truncated=False):
    """What the reward gets of these responses."""
    rows = [torch.tensor(response) for response in responses]
    rollout = SimpleNamespace(
        ids=torch.nn.utils.rnn.pad_sequence(rows, True), lengths=torch.tensor(list(map(len, rows))),
        truncated=torch.full((len(rows),), truncated))
    return icpo.texts_of(rollout, tokenizer, [icpo.Example("", "", [5])])


def test_prompts_go_through_the_chat_template_and_references_stay_as_they_are(tiny, tmp_path):
    _, tokenizer, _ = icpo.load_model(str(tiny), "cpu")
    values = [72, 0.5, True, [12, 13], {"target": 5, "numbers": [2, None]}, "so\n#### 18"]
    data = write_jsonl(tmp_path / "data.jsonl", [{"q": "2+2 is 4", "a": value} for value in values])
    keys = dict(prompt_key="q", answer_key="a", max_new_tokens=9)
    examples = icpo.load_examples(data, tokenizer, Config(system_prompt="S", prompt_suffix="!", **keys))
    assert {tokenizer.decode(example.ids) for example in examples} == {"[system]S[user]2+2 is 4![assistant]"}
    assert [example.reference for example in examples] == values
    write_jsonl(data, [{"q": "x" * n, "a": 1} for n in (256 - 9 - 1, 256 - 9 - 2)])  # too long, and longest
    config = Config(system_prompt="S:", no_chat_template=True, **keys)
    example, = icpo.load_examples(data, tokenizer, config)
    assert tokenizer.decode(example.ids) == "S:" + "x" * (256 - 9 - 2)


@pytest.mark.parametrize("kwargs, end, opened", [
    ("{}", "<think>\n", True), ('{"thought": false}', "<think>\n\n</think>\n\n", False)])
def test_a_thought_that_the_template_opens_belongs_to_the_response(tmp_path, capfd, kwargs, end, opened):
    thought = "<think>\n{% if thought is defined %}\n\n</think>\n\n{% endif %}"
    saved(tmp_path / "model", CHATML.replace("{% endif %}", thought + "{% endif %}"))
    flags = ["--chat-template-kwargs", kwargs, "--prompt-suffix", " é <think>?", *REWARD]
    assert run(*tiny_run(tmp_path / "model", tmp_path / "run", *flags)) == 0
    prompt = f"<|im_start|>user\n1 é <think>?<|im_end|>\n<|im_start|>assistant\n{end}"
    assert repr(prompt) in capfd.readouterr().out.splitlines()  # shown, as the model gets it
    rows = rows_of(tmp_path / "run/samples.jsonl")
    assert {row["response"].startswith("<think>\n") for row in rows} == {opened}


def test_the_token_that_closes_a_message_ends_a_response_and_is_all_that_rewards_miss(tmp_path):
    tokenizer = saved(tmp_path, CHATML, ["<|im_start|>", "<|im_end|>", AddedToken("<think>", special=True)])
    _, loaded, eos_ids = icpo.load_model(str(tmp_path), "cpu")
    assert eos_ids == [257, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    written = "<think>3 + 4 .</think>7"
    for end in ("<|im_end|>", "<|endoftext|>"):
        ids = tokenizer(written + end).input_ids
        assert texts(loaded, [ids, ids[-1:]]) == [written, ""]
        assert texts(loaded, [ids], truncated=True) == [written + end]  # the last token did not end it
