"""Tests of the examples: the README's code, the engines (where they are installed), the times tables and the plot."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import icpo
import plot
from examples import addition, plain_answers
from test_icpo import alone, update_gradient
from tests.common import rows_of, tiny
from tests.test_verify import table
from verify import verify

assert tiny  # a fixture: a saved model with a chat template
README = (FOLDER.parent / "README.md").read_text()


class Keep(torch.optim.SGD):
    """An optimizer that keeps the gradients of its first step and changes nothing."""

    def step(self, closure=None):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.gradient = getattr(self, "gradient", torch.cat(gradients))


# -------------------------------------------------------------------------------------- The README, TRL and verl


def test_the_recipes_of_the_readme():
    block, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # Of the four groups that take the place of "yours" the third has equal rewards.
    rewards = "torch.tensor([1.0, *[0.0] * 7] * 2 + [1.0] * 8 + [0.0, *[1.0] * 7])"
    assert "torch.rand(32).round()" in block
    names = {}
    exec(block.replace("torch.rand(32).round()", rewards), names)
    joined, flat, advantages = (names[name] for name in ("joined", "flat", "advantages"))
    assert advantages.view(4, 8).any(dim=1).tolist() == [True, True, False, True]
    torch.testing.assert_close(flat, advantages)
    torch.testing.assert_close(icpo.group_advantage(joined.view(4, 8)).flatten(), advantages)


SETTINGS = dict(
    per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4, max_completion_length=8, max_steps=1,
    epsilon_high=0.28, max_grad_norm=0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
    save_strategy="no", disable_tqdm=True)


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 3) for ids in completion_ids]


def trainer_of(base, tiny, tmp_path, reward=reward, settings={}, **kwargs):
    """A trainer of 4 groups of 4 responses; what it hands to the update is its `kept`."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class Kept(base):
        losses, kept = [], None

        def _generate_and_score_completions(self, inputs):
            self.kept = super()._generate_and_score_completions(inputs)
            return self.kept

        def _compute_loss(self, model, inputs):
            self.losses = [*self.losses, super()._compute_loss(model, inputs)]
            return self.losses[-1]

        def create_optimizer(self):
            self.optimizer = Keep(self.model.parameters(), lr=0.0)
            return self.optimizer

    return Kept(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), reward,
        trl.GRPOConfig(str(tmp_path), **SETTINGS | settings),
        datasets.Dataset.from_dict({"prompt": [f"{i} + 1{'0' * (i % 3)} is" for i in range(16)]}),
        processing_class=AutoTokenizer.from_pretrained(tiny, padding_side="left"), **kwargs)


def as_trl_divides(rewards, l, alpha):
    """icpo_advantage, but for the 1e-4 that TRL adds to the std."""
    A = icpo.icpo_advantage(rewards, l, alpha, 10.0)
    assert A.any()
    std = (rewards + alpha * icpo.preference_advantage(l, 10.0)).std(dim=1, keepdim=True)
    return A * std / (std + 1e-4)


@pytest.mark.parametrize("alpha, iterations", [(0.1, 1), (0.4, 2)])
def test_trl_agrees_on_advantages_loss_and_gradient(tiny, tmp_path, alpha, iterations):
    """One update of 16 rows in two micro-batches. With 2 iterations TRL computes old log-probs, with 1 it does not."""
    pytest.importorskip("trl")
    from trl_icpo import ICPOTrainer
    trainer = trainer_of(ICPOTrainer, tiny, tmp_path, settings=dict(num_iterations=iterations), alpha=alpha)
    policy = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trainer.train()
    kept = trainer.kept
    assert ("old_per_token_logps" in kept) == (iterations == 2)
    prompts, responses = ([row[real.bool()] for row, real in zip(kept[f"{part}_ids"], kept[f"{part}_mask"])]
                          for part in ("prompt", "completion"))
    prompt_lengths, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, responses))
    left, right = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
                   for rows, side in ((prompts, "left"), (responses, "right")))
    rollout = icpo.Rollout(left, prompt_lengths, right, lengths, lengths < 0, *torch.zeros(2, *right.shape))
    with torch.no_grad():
        rollout.log_probs = icpo.token_log_probs(policy, rollout)
    l = icpo.sequence_log_prob(rollout.log_probs, rollout.mask).view(4, 4)
    rewards = torch.tensor([float(row.sum() % 3) for row in responses]).view(4, 4)
    advantages = as_trl_divides(rewards, l, alpha)
    torch.testing.assert_close(kept["advantages"].view(4, 4), advantages, atol=1e-5, rtol=0)
    gradient, metrics = update_gradient(policy, rollout, kept["advantages"], micro_batch=5)
    assert sum(trainer.losses).item() == pytest.approx(metrics["loss"], abs=1e-5)
    assert (trainer.optimizer.optimizer.gradient - gradient).norm() < 1e-4 * gradient.norm()


def some_none(completion_ids, **kwargs):
    """A group with two references, one with one, one with none, one with all."""
    missing = (1, 3, 4, 5, 6, 8, 9, 10, 11)
    return [None if i in missing else float(sum(ids) % 3) for i, ids in enumerate(completion_ids)]


@pytest.mark.parametrize("reward", [reward, some_none])
@pytest.mark.parametrize("settings", [{}, dict(scale_rewards="none"), dict(scale_rewards="batch"),
                                      dict(mask_truncated_completions=True), dict(reward_weights=[0.3])], ids=str)
def test_at_alpha_0_all_of_trls_settings_give_trls_own_advantages(tiny, tmp_path, reward, settings):
    trl = pytest.importorskip("trl")
    from trl_icpo import ICPOTrainer
    settings = settings | dict(per_device_train_batch_size=16, gradient_accumulation_steps=1)
    own = trainer_of(trl.GRPOTrainer, tiny, tmp_path, reward, settings)
    own.train()
    ours = trainer_of(ICPOTrainer, tiny, tmp_path, reward, settings, alpha=0.0)
    ours.train()
    assert torch.equal(own.kept["completion_ids"], ours.kept["completion_ids"])
    assert torch.equal(own.kept["advantages"], ours.kept["advantages"]) and own.kept["advantages"].any()
    assert list(own._logs["advantages"]) == list(ours._logs["advantages"])


def test_trl_compares_only_responses_that_have_a_reward_and_logs_the_advantages_it_uses(tiny, tmp_path):
    pytest.importorskip("trl")
    from trl_icpo import ICPOTrainer
    settings = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1)
    trainer = trainer_of(ICPOTrainer, tiny, tmp_path, some_none, settings, alpha=0.4)
    trainer.confidence = lambda: torch.arange(16) / -7
    trainer.train()
    assert trainer.kept["advantages"].tolist() == list(trainer._logs["advantages"])
    rewards = some_none(ids[mask.bool()].tolist() for ids, mask in zip(
        trainer.kept["completion_ids"], trainer.kept["completion_mask"]))
    for first in range(0, 16, 4):
        scored = [i for i in range(first, first + 4) if rewards[i] is not None]
        R, l = torch.tensor([rewards[i] for i in scored]), torch.tensor(scored) / -7
        expected = icpo.icpo_advantage(R, l, 0.4, 10.0) if scored else R
        A = trainer.kept["advantages"][first:first + 4]
        torch.testing.assert_close(A[[i - first for i in scored]], expected, atol=1e-3, rtol=1e-3)
        assert A.count_nonzero() == expected.count_nonzero()


def test_trl_settings_that_leave_no_sense_to_alpha_are_refused(tiny, tmp_path):
    pytest.importorskip("trl")
    from trl_icpo import ICPOTrainer
    with pytest.raises(ValueError, match="sum_then_normalize"):
        trainer_of(ICPOTrainer, tiny, tmp_path, settings=dict(multi_objective_aggregation="normalize_then_sum"))


KEEPING = """
import glob, time, torch, trl_icpo
generate = trl_icpo.ICPOTrainer._generate_and_score_completions
def keep(self, inputs):
    output = generate(self, inputs)
    torch.save(output, f"{self.args.output_dir}/{self._step}-{self.accelerator.process_index}.pt")
    return output
trl_icpo.ICPOTrainer._generate_and_score_completions = keep
trl_icpo.main()
def gloo_threads():
    try:
        return [name for name in (open(file).read() for file in glob.glob("/proc/self/task/*/comm")) if "gloo" in name]
    except OSError:  # one ended between the two calls
        return ["?"]
end = time.time() + 10  # the kernel's list may lag behind a join
while (left := gloo_threads()) and time.time() < end:
    time.sleep(0.01)
assert not left, f"threads that may abort the exit: {left}"
"""


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """The built-in task, imitated for long enough that responses differ."""
    pytest.importorskip("trl")
    folder = tmp_path_factory.mktemp("sums") / "task"
    addition.write_task(folder, seed=0, usual_error=0.7, imitation_steps=400)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_trl_example_in_one_and_two_processes_gives_the_advantages_of_one(sums, tmp_path, processes):
    """Nine groups of four responses: with two processes of 18 rows, the fifth group lies in both."""
    (tmp_path / "keeping.py").write_text(KEEPING)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1, "--multi_gpu",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0] if processes > 1 else []
    command = [
        sys.executable, *launch, tmp_path / "keeping.py", "--model", sums / "addition", "--data", sums / "train.jsonl",
        "--output_dir", tmp_path, "--per_device_train_batch_size", 36 // processes, "--num_generations", 4,
        "--max_completion_length", 32, "--max_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3, "--use_cpu",
        "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.returncode == 0 and "rewards/preference/std" in shown.stdout, shown.stderr[-3000:]
    model, tokenizer, _ = icpo.load_model(str(sums / "addition"), "cpu")
    rows, rewards, l = [], [], []
    for output in (torch.load(tmp_path / f"0-{rank}.pt") for rank in range(processes)):
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        rows += zip(*(output[name] for name in names))
    for prompt, real, completion, kept, _ in rows:
        prompt, completion = prompt[real.bool()], completion[kept.bool()]
        a, b = re.fullmatch(r"(\d+)\+(\d+)=", tokenizer.decode(prompt)).groups()
        rewards.append(float(verify(tokenizer.decode(completion, skip_special_tokens=True), int(a) + int(b))))
        log_probs = alone(model, prompt.tolist(), completion.tolist())
        l.append(log_probs.gather(1, completion[:, None]).mean().item())
    expected = as_trl_divides(torch.tensor(rewards).view(9, 4), torch.tensor(l).view(9, 4), 0.1)
    assert len(rows) == 36
    torch.testing.assert_close(torch.stack([row[-1] for row in rows]).view(9, 4), expected, atol=1e-4, rtol=0)


VERL = """
import numpy, tensordict, torch
from verl import DataProto
from verl.trainer.ppo.v1 import utils
from icpo import icpo_advantage, sequence_log_prob
torch.manual_seed(0)
uid = numpy.array(list("abcbcaacbacb") + ["alone", "pad", "pad", "short", "short", "short"], dtype=object)
mask, old = torch.arange(5) < torch.randint(1, 6, (18, 1)), -torch.rand(18, 5)
rewards = torch.randint(0, 2, (18, 1)) * torch.eye(5)[mask.sum(dim=1) - 1]
rewards[uid == "pad"], mask[uid == "pad"] = 0.0, False

def advantages(estimator, alpha):
    data = DataProto.from_dict({
        "response_mask": mask.long(), "old_log_probs": old, "token_level_rewards": rewards}, {"uid": uid})
    config = {"icpo": {"alpha": alpha}}
    return utils.compute_advantage(data, estimator, config=config).batch["advantages"]

scores, l, expected = rewards.sum(dim=1), sequence_log_prob(old, mask), torch.zeros(18)
for group in set(uid):
    rows = [i for i in range(18) if uid[i] == group]
    expected[rows] = icpo_advantage(scores[rows], l[rows], 0.3, 10.0)
torch.testing.assert_close(advantages("icpo", 0.3), expected[:, None] * mask)
assert expected[uid == "short"].any() and not expected[uid == "alone"].any()
own = advantages("grpo", 0.0)
own[uid == "alone"] = 0  # verl gives a group of one its reward
torch.testing.assert_close(advantages("icpo", 0.0), own, atol=1e-4, rtol=0)
"""


def test_verl_example_in_verls_own_compute_advantage(tmp_path):
    pytest.importorskip("verl.trainer.ppo.v1.utils", exc_type=ImportError)  # verl's own dependencies, too
    environment = os.environ | {"PYTHONPATH": f"{FOLDER.parent}:{FOLDER}", "VERL_USE_EXTERNAL_MODULES": "verl_icpo"}
    shown = subprocess.run([sys.executable, "-c", VERL], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr[-3000:]


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
            "length/mean": 9.0, "length/truncated_frac": 0.1, "groups/uniform_frac": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_plot_draws_runs_and_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    runs = [metrics(tmp_path / "a", 1), metrics(tmp_path / "b", 12)]
    found = importlib.util.find_spec
    if found("matplotlib"):
        assert plot.main([*runs, "--output", str(tmp_path / "plot.png")]) == 0
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert plot.main([*runs, "--output", str(tmp_path / "plot.png")]) == 2
        assert "is there already" in capsys.readouterr().err
        (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 0}\n{"st')
        for run in (str(tmp_path / "b"), str(tmp_path / "none")):
            assert plot.main([run, "--output", str(tmp_path / "no.png")]) == 2
            error = capsys.readouterr().err
            assert error.startswith("plot.py: error:") and error.count("\n") == 1 and run in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "matplotlib" and found(name))
    assert plot.main([*runs, "--output", str(tmp_path / "no.png")]) == 2
    assert capsys.readouterr().err == "plot.py: error: matplotlib is missing: pip install matplotlib\n"
    assert not (tmp_path / "no.png").exists()


# ---------------------------------------------------------------------------------- Answers without a marker

PLAIN = r"""
yes It costs 5 dollars. ~ 5 ;; So the total is **18**. I hope this helps! ~ 18 ;; B) cells ~ B
yes It is B. ~ B ;; surplus ~ surplus ;; The answer is 12 because 3 * 4 = 12. ~ 12 ;; Answer: 6⏎Answer: 5 ~ 5
yes The answer is D, it can't be A or B. ~ D ;; Therefore, the answer (Yes or No) is No. ~ no
yes Answer: m+n = 256+37 = 293 ~ 293 ;; The answer is 7. Indeed, the answer is correct. ~ 7
yes so $9 + 9 = 18$ ~ 18 ;; (3,-4) ~ (3, -4) ;; ### Final Answer⏎⏎$\sqrt{2}$ ~ \sqrt2 ;; it is 5</s> ~ 5
yes So B is the answer. ~ B ;; \boxed{5} or 6 ~ 5
no It costs 5 million dollars. ~ 5 ;; So it is minus 5. ~ 5 ;; There are 4 or 5 ~ 5 ;; 5 is wrong ~ 5
no I don't pick B ~ B ;; Suppose B is correct. Contradiction. ~ B ;; The answer is A or B ~ A ;; maybe 5 ~ 5
no The answer isn't 5. ~ 5 ;; \boxed{4} so 5 ~ 5 ;; Answer: 5⏎Wait, no.⏎Answer: 6 ~ 5 ;; It is 5 squared. ~ 5
no There are 120 socks and 180 dishes. ~ 180 ;; A) 3 B) 4 ~ B ;; The answer is less than 5. ~ 5 ;; 1-5 ~ 5
no x < 5 ~ 5 ;; One might think B is correct; no. ~ B ;; so 3x ~ 3
"""


@pytest.mark.parametrize("response, reference, right", table(PLAIN))
def test_plain_answers(response, reference, right):
    assert plain_answers.verify(response, reference) is right
