"""Tests of icpo.py and verify.py: offline, on tiny models made here. Run: python -m pytest -q

Each formula is held against an oracle that shares no code with it: a number derived by hand, a plain Python loop, an
enumeration, or transformers' own generate and forward. results/test_verdicts.py has more of the verifier.
"""

import contextlib
import copy
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2Tokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.logging import warning_once

import icpo
from examples.addition import write_task
from icpo import (Config, group_advantage, icpo_advantage, policy_loss, preference_advantage, sample,
                  sequence_log_prob, token_log_probs, uniform_groups)
from verify import is_equivalent, verify

# One thread, here and in the runs started here: several that wait for each other crawl where something else runs too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(icpo.__file__).parent

# ---------------------------------------------------------------------------------------------- Preference advantage

def test_the_worked_example_of_the_readme():
    rows = re.findall(r"^\| (?:correct|wrong), .*", (ROOT / "README.md").read_text().replace("−", "-"), re.MULTILINE)
    l, s, R, grpo, icpo_ = torch.tensor([[float(x.strip("* ")) for x in row.split("|")[2:7]] for row in rows]).T
    torch.testing.assert_close(preference_advantage(l[None], Config().beta)[0], s, atol=5e-4, rtol=0)
    torch.testing.assert_close(group_advantage(R[None])[0], grpo, atol=5e-4, rtol=0)
    torch.testing.assert_close(icpo_advantage(R[None], l[None], Config().alpha, Config().beta)[0], icpo_, atol=5e-4, rtol=0)
    assert len(rows) == 4 and R.tolist() == [1, 1, 0, 0]


def test_preference_by_hand():
    # A gap of ln 3 at beta 1 is a preference of 3/4, so a score of 2 * 3/4 - 1 = 1/2; one of 2 ln 3 is 9/10, so 4/5.
    ln3 = math.log(3)
    torch.testing.assert_close(preference_advantage(torch.tensor([[0.0, -ln3]]), 1.0), torch.tensor([[-0.5, 0.5]]))
    expected = torch.tensor([[(-0.5 - 0.8) / 2, 0.0, (0.5 + 0.8) / 2]])
    torch.testing.assert_close(preference_advantage(torch.tensor([[0.0, -ln3, -2 * ln3]]), 1.0), expected)
    torch.testing.assert_close(preference_advantage(torch.tensor([[0.0, -ln3]]), -1.0), torch.tensor([[0.5, -0.5]]))
    scaled_down = preference_advantage(torch.tensor([[0.0, -ln3 / 10]]), 10.0)
    torch.testing.assert_close(scaled_down, torch.tensor([[-0.5, 0.5]]))


def loop_preference(group, beta):
    """Steps 3 and 4 of the method from the Bradley-Terry probability, in plain Python."""
    scores = []
    for i, l_i in enumerate(group):
        wins = [2 / (1 + math.exp(-beta * (l_j - l_i))) - 1 for j, l_j in enumerate(group) if j != i]
        scores.append(sum(wins) / len(wins))
    return scores


@pytest.mark.parametrize("P, G, beta", [(1, 2, 1.0), (3, 4, 0.3), (5, 8, 10.0), (2, 16, 3.0)])
def test_preference_equals_double_loop(P, G, beta):
    l = -torch.rand(P, G, generator=torch.Generator().manual_seed(G)) * 2
    expected = torch.tensor([loop_preference(group, beta) for group in l.tolist()])
    torch.testing.assert_close(preference_advantage(l, beta), expected, atol=1e-6, rtol=0)


def test_preference_properties():
    l = -torch.rand(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    s = preference_advantage(l, 10.0)
    assert s.shape == (6, 8) and s.dtype == torch.float32 and not s.requires_grad
    assert s.abs().max() < 1
    torch.testing.assert_close(s.sum(dim=1), torch.zeros(6), atol=1e-5, rtol=0)
    assert torch.equal(s.argsort(dim=1), l.argsort(dim=1, descending=True))  # the less probable, the more preferred
    assert torch.equal(preference_advantage(torch.full((2, 5), -0.7), 10.0), torch.zeros(2, 5))
    l = torch.tensor([[-0.4, -0.1, -0.9, -0.2]])
    ranks = torch.tensor([[1.0, -3.0, 3.0, -1.0]]) / 3  # (how many are more probable - less probable) / (G - 1)
    torch.testing.assert_close(preference_advantage(l, 1e6), ranks)
    slope = (l.mean() - l) * 4 / 3 / 2  # tanh(x / 2) is x / 2 for small x
    torch.testing.assert_close(preference_advantage(l, 1e-3) / 1e-3, slope, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------- Group and ICPO advantages

def test_icpo_advantage_by_hand():
    # A correct and a wrong response with s = 1/2 and -1/2: R + alpha s is (1.1, -0.1), which two values turn into
    # +-1/sqrt(2) whatever their distance. Among four, s only moves the responses of equal reward apart.
    ln3 = math.log(3)
    pair = icpo_advantage(torch.tensor([[1.0, 0.0]]), torch.tensor([[-ln3, 0.0]]), 0.2, 1.0)
    torch.testing.assert_close(pair, torch.tensor([[math.sqrt(0.5), -math.sqrt(0.5)]]))
    # Gaps of ln 3: s = (-1/2 - 1/2 + 0) / 3 = -1/3 for the two probable ones, 1/3 for the others.
    four = icpo_advantage(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, -ln3, -ln3]]), 0.3, 1.0)
    shaped = [0.9, -0.1, 1.1, 0.1]
    std = math.sqrt((0.4**2 + 0.6**2 + 0.6**2 + 0.4**2) / 3)
    torch.testing.assert_close(four, torch.tensor([[(x - 0.5) / std for x in shaped]]))


def test_direction_confident_errors_and_undervalued_successes():
    rewards, l = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[-0.2, -0.6, -0.1, -0.5]])
    sure_correct, unsure_correct, sure_wrong, unsure_wrong = icpo_advantage(rewards, l, 0.1, 10.0)[0]
    assert unsure_correct > sure_correct > 0 > unsure_wrong > sure_wrong


def loop_advantage(group):
    return [(r - statistics.mean(group)) / statistics.stdev(group) if len(set(group)) > 1 else 0.0 for r in group]


def test_icpo_advantage_equals_loop():
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randint(0, 3, (30, 5), generator=generator).float() / 2  # some at the mean of their group
    l, alpha, beta = -torch.rand(30, 5, generator=generator), 0.3, 7.0
    expected = []
    for group, row in zip(rewards.tolist(), l.tolist()):
        shaped = [r + alpha * s for r, s in zip(group, loop_preference(row, beta))]
        expected.append(loop_advantage(shaped) if len(set(group)) > 1 else [0.0] * 5)
    torch.testing.assert_close(icpo_advantage(rewards, l, alpha, beta), torch.tensor(expected), atol=1e-5, rtol=0)


def test_alpha_zero_is_grpo_to_the_bit():
    rewards, l = torch.rand(50, 8).round(decimals=1), -torch.rand(50, 8)
    assert torch.equal(icpo_advantage(rewards, l, 0.0, 10.0), group_advantage(rewards))
    kept = icpo_advantage(torch.ones(2, 4), -torch.rand(2, 4), 0.0, 10.0, keep_uniform_groups=True)
    assert torch.equal(kept, torch.zeros(2, 4))


def test_the_verifier_is_never_overruled_not_even_by_repetition():
    """Correct responses outrank wrong ones, be they repeated with log-probs near 0 or rambling; alpha < 1/G keeps signs."""
    for bits in itertools.product([0.0, 1.0], repeat=5):
        rewards = torch.tensor([bits])
        for l in (-torch.rand(1, 5) * 3, torch.where(rewards == 1, -0.2, -1e-4), torch.where(rewards == 1, -0.2, -5.0)):
            for alpha, beta in ((0.499, 1e4), (0.199, 1e4), (Config().alpha, Config().beta)):
                advantages = icpo_advantage(rewards, l, alpha, beta)
                correct, wrong = advantages[rewards == 1], advantages[rewards == 0]
                if len(correct) and len(wrong):
                    assert correct.min() > wrong.max() and (alpha > 1 / 5 or correct.min() > 0 > wrong.max())


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.6, 0.7, 0.9, 1.0, -5.0])
def test_equal_rewards_give_exactly_zero_or_alpha_times_preference(reward):
    for G in range(2, 17):
        rewards, l = torch.full((3, G), reward), -torch.rand(3, G)
        assert torch.equal(group_advantage(rewards), torch.zeros(3, G))
        assert torch.equal(icpo_advantage(rewards, l, 0.4, 10.0), torch.zeros(3, G))
        kept = icpo_advantage(rewards, l, 0.4, 10.0, keep_uniform_groups=True)
        expected = 0.4 * torch.tensor([loop_preference(group, 10.0) for group in l.tolist()])
        torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0)


def test_the_std_is_the_unbiased_one_and_near_ties_stay_small():
    one_in_eight = group_advantage(torch.eye(8)[:1])[0, :2]
    torch.testing.assert_close(one_in_eight, torch.tensor([2.4749, -0.3536]), atol=1e-4, rtol=0)
    rewards = torch.full((1, 8), 0.7)
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))  # rounding is not a difference in reward
    assert group_advantage(rewards).abs().max() < 1e-3
    assert group_advantage(torch.tensor([[0.7, 0.7, 0.7, 0.701]])).abs().max() > 1  # a small difference is one


def test_groups_of_one_and_unknown_aggregations_are_refused():
    for function in (lambda x: preference_advantage(x, 1.0), lambda x: icpo_advantage(x, x, 0.1, 1.0)):
        with pytest.raises(ValueError, match="at least 2"):
            function(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="mean"):
        policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1), aggregation="mean")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_sequence_log_prob_is_the_mean_over_the_response(dtype):
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, math.nan], [-4.0, 9.0, 9.0, 9.0]])  # the padding holds rubbish
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=dtype)
    assert sequence_log_prob(log_probs, mask).tolist() == [-2.0, -4.0]
    neighbors = torch.tensor([[-1.0, -1.0078125]], dtype=torch.bfloat16)  # no number of bf16 lies between them
    assert sequence_log_prob(neighbors, torch.ones(1, 2)).tolist() == [-1.00390625]


@pytest.mark.parametrize("function", [
    sequence_log_prob, preference_advantage, uniform_groups, group_advantage, icpo_advantage, policy_loss],
    ids=lambda f: f.__name__)
def test_pure_functions_work_pasted_alone(function):
    needed = {group_advantage: [uniform_groups],
              icpo_advantage: [uniform_groups, group_advantage, preference_advantage]}.get(function, [])
    namespace = {}
    exec("import torch\nfrom torch import Tensor\n" + "".join(map(inspect.getsource, [*needed, function])), namespace)
    l, mask = -torch.rand(3, 4), (torch.rand(3, 4) < 0.7).long()
    arguments = {sequence_log_prob: (l, mask), preference_advantage: (l, 5.0), group_advantage: (l,), uniform_groups: (l,),
                 icpo_advantage: (l.round(), l, 0.3, 5.0), policy_loss: (l, l - 0.1, l[:, 0], mask)}[function]
    torch.testing.assert_close(namespace[function.__name__](*arguments), function(*arguments))


# ----------------------------------------------------------------------------------------------------- Policy loss

@pytest.mark.parametrize("A, ratio, slope", [
    (1, 0.5, 1), (1, 1.0, 1), (1, 1.5, 0), (-1, 0.5, 0), (-1, 1.0, -1), (-1, 1.5, -1),
    (1, 1.27, 1), (1, 1.29, 0), (-1, 0.81, -1), (-1, 0.79, 0)])
def test_clip_table(A, ratio, slope):
    """The objective's derivative by the ratio: A inside, 0 where the ratio has moved far enough in A's favor."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([float(A)]), torch.ones(1, 1))
    loss.backward()
    assert -log_probs.grad.item() / ratio == pytest.approx(slope, abs=1e-6)  # d ratio / d log_prob is the ratio
    assert stats["clipped"] == (slope == 0)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_batch_without_response_tokens_has_no_loss(aggregation):
    nothing = torch.zeros(2, 3)
    assert policy_loss(nothing, nothing, torch.ones(2), nothing, aggregation=aggregation)[0] == 0


def random_loss_inputs(B=5, T=7):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(T) < torch.tensor([7, 1, 3, 2, 5])[:, None]
    log_probs, old, ref = (torch.randn(B, T, generator=generator, dtype=torch.float64) * 0.4 - 1 for _ in range(3))
    return log_probs.requires_grad_(), old, torch.randn(B, generator=generator, dtype=torch.float64), mask, ref


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_loss_and_stats_equal_loop_over_tokens(aggregation, dtype):
    log_probs, old, A, mask, ref = random_loss_inputs()
    loss, stats = policy_loss(log_probs, old, A, mask.to(dtype), 0.2, 0.28, aggregation, ref_log_probs=ref, kl_coef=0.3)
    rows, clipped, kl_old, kl_ref = [], 0, 0.0, 0.0
    for b in range(len(mask)):
        terms = []
        for t in range(int(mask[b].sum())):
            new_p, old_p, ref_p = (math.exp(x[b, t].item()) for x in (log_probs, old, ref))
            r, a = new_p / old_p, A[b].item()
            bounded = min(max(r, 0.8), 1.28)
            k3 = ref_p / new_p - math.log(ref_p / new_p) - 1
            terms.append(-min(r * a, bounded * a) + 0.3 * k3)
            clipped += bounded * a < r * a
            kl_old, kl_ref = kl_old + r - math.log(r) - 1, kl_ref + k3
        rows.append(terms)
    flat = [term for terms in rows for term in terms]
    expected = statistics.mean(flat) if aggregation == "token" else statistics.mean(map(statistics.mean, rows))
    assert loss.item() == pytest.approx(expected)
    assert (stats["tokens"], stats["clipped"]) == (18, clipped) and clipped > 0
    assert stats["kl_old"].item() == pytest.approx(kl_old) and stats["kl_ref"].item() == pytest.approx(kl_ref)


@pytest.mark.parametrize("aggregation, normalizer", [("token", 18), ("sequence", 5)])
def test_micro_batches_add_up_and_padding_and_inputs_stay(aggregation, normalizer):
    log_probs, old, A, mask, ref = inputs = random_loss_inputs()
    before = copy.deepcopy(inputs)
    whole, _ = policy_loss(log_probs, old, A, mask, aggregation=aggregation, ref_log_probs=ref, kl_coef=0.1)
    gradient, = torch.autograd.grad(whole, log_probs)
    assert all(map(torch.equal, before, inputs))
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    for size in (1, 2, 3):
        parts = sum(policy_loss(log_probs[rows], old[rows], A[rows], mask[rows], 0.2, 0.28, aggregation, normalizer,
                                ref[rows], 0.1)[0] for rows in torch.arange(5).split(size))
        torch.testing.assert_close(torch.autograd.grad(parts, log_probs)[0], gradient)
    rubbish = torch.where(mask, old, torch.nan)
    loss, _ = policy_loss(log_probs, rubbish, A, mask, aggregation=aggregation, ref_log_probs=ref, kl_coef=0.1)
    torch.testing.assert_close(loss, whole)


def test_kl_estimator_is_unbiased_and_points_from_policy_to_reference():
    """Its mean under pi, enumerated over a vocabulary, is KL(pi || pi_ref), not KL(pi_ref || pi)."""
    pi = torch.tensor([0.7, 0.2, 0.06, 0.04], dtype=torch.float64).log().view(4, 1, 1)
    ref = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().view(4, 1, 1)
    zero, one = torch.zeros(1), torch.ones(1, 1)
    true = sum(p.exp() * (p - q) for p, q in zip(pi, ref)).item()
    terms = [policy_loss(p, p, zero, one, ref_log_probs=q, kl_coef=1.0)[0] for p, q in zip(pi, ref)]
    assert sum(p.exp() * loss for p, loss in zip(pi, terms)).item() == pytest.approx(true)
    # kl_old: tokens were drawn from the old policy, so the mean under it is KL(pi_old || pi).
    terms = [policy_loss(q, p, zero, one)[1]["kl_old"] for p, q in zip(pi, ref)]
    assert sum(p.exp() * kl for p, kl in zip(pi, terms)).item() == pytest.approx(true)


# -------------------------------------------------------------------------------------------- Sampling and scoring

DEVICE = os.environ.get("ICPO_TEST_DEVICE", "cpu")  # of the sampler, the scorer and the update
if DEVICE != "cpu":  # in float32, since bf16 autocast would leave nothing exact to compare
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
VOCAB, EOS = 23, 7
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None, pad_token_id=0)


def on(values):
    return torch.as_tensor(values, device=DEVICE)


def scaled(make):
    """The model with larger weights, so that its distributions differ from the uniform one and from each other."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.to(DEVICE).eval()


def qwen2():
    return scaled(lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)))


def gpt2():  # absolute positions and dropout
    return scaled(lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, embd_pdrop=0.1,
        attn_pdrop=0.1, eos_token_id=EOS, bos_token_id=None)))


def grouped():  # as load_model sets it
    model = qwen2()
    model.set_attn_implementation("grouped")
    return model


@pytest.fixture(params=[qwen2, grouped, gpt2], ids=["qwen2", "grouped", "gpt2"])
def model(request):
    return request.param()


def draw(model, group_size=4, max_new_tokens=9, seed=0, **kwargs):
    return sample(model, PROMPTS, group_size, max_new_tokens, kwargs.pop("eos_ids", [EOS]),
                  generator=torch.Generator().manual_seed(seed), **kwargs)


def prefix_log_prob(model, tokens, position):
    """log p(tokens[position] | tokens[:position]) by a forward pass over the prefix alone, in float64."""
    with torch.no_grad():
        logits = model(input_ids=on([tokens[:position]])).logits[0, -1].double()
    return (logits[tokens[position]] - logits.logsumexp(dim=0)).item()


@pytest.mark.parametrize("selectable, temperature", [(True, 1.0), (True, 0.7), (False, 1.0)])
def test_a_row_is_what_it_would_be_alone(model, selectable, temperature, monkeypatch):
    """Rows end, leave the batch and share prefills of different lengths; a prefix at a time gives the same tokens,
    log-probs and entropies, sampled and scored, whatever the generation config wants."""
    for name, value in dict(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1, temperature=0.6).items():
        setattr(model.generation_config, name, value)
    if not selectable:  # as with caches that cannot be repeated and selected by row
        monkeypatch.setattr(icpo, "DynamicLayer", None)
    eos_ids = [EOS, 0, 11, 14]  # the padding id too; so many that a row which stays in the batch ends twice
    rows = []
    hook = model.register_forward_pre_hook(lambda m, args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    rollout = draw(model, group_size=3, max_new_tokens=8, seed=4, temperature=temperature, eos_ids=eos_ids)
    hook.remove()
    alive = [sum(n > t for n in rollout.lengths.tolist()) for t in range(1, rollout.ids.shape[1])]
    assert rows == ([3, *alive] if selectable else [9] * len(rows))  # a prefill a prompt, and no row behind its end
    scored = token_log_probs(model, rollout, temperature)
    uniforms = torch.rand(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert scored.dtype == torch.float32 and scored.shape == rollout.mask.shape
    for b, response in enumerate(rollout.responses()):
        tokens, n = list(PROMPTS[b // 3]), len(response)
        for t in range(8):
            with torch.no_grad():
                p = (model(input_ids=on([tokens])).logits[0, -1].double() / temperature).softmax(dim=0)
            assert rollout.entropies[b, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
            token = next(v for v in range(VOCAB) if p[:v + 1].sum() > uniforms[b, t] or v == VOCAB - 1)  # inverse CDF
            for log_probs in (rollout.log_probs, scored):
                assert log_probs[b, t].item() == pytest.approx(p[token].log().item(), abs=1e-5)
            tokens.append(token)
            if token in eos_ids:
                break
        prompt = rollout.prompts[b, rollout.prompts.shape[1] - rollout.prompt_lengths[b]:].tolist()
        assert prompt + response == tokens and prompt == PROMPTS[b // 3] and rollout.ids[b, n:].eq(0).all()
        assert rollout.mask[b].tolist() == [t < n for t in range(rollout.mask.shape[1])]
        assert rollout.truncated[b].item() == (response[-1] not in eos_ids) and (n == 8 or not rollout.truncated[b])
        assert all(x[b, n:].eq(0).all() for x in (rollout.log_probs, scored, rollout.entropies))
    assert rollout.truncated.any() and not rollout.truncated.all() and len(set(rollout.lengths.tolist())) > 2


ARCHITECTURES = {  # each of them special in its cache, its head or its body
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32),
    "Gemma2": dict(head_dim=8, final_logit_softcapping=1.5, sliding_window=4),
    "Gemma3": dict(head_dim=8, sliding_window=4), "Granite": dict(logits_scaling=3.0), "Cohere": dict(logit_scale=0.2),
    "Mixtral": dict(num_local_experts=4), "Llama4": dict(intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "Qwen3_5": dict(num_hidden_layers=4, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
                    linear_key_head_dim=8, linear_value_head_dim=8),
    "Qwen2": {}, "GPT2": dict(n_embd=32, n_layer=2, n_head=4)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_sample_and_score_what_each_row_alone_gets(name):
    config = next(getattr(transformers, f"{name}{kind}") for kind in ("TextConfig", "Config")
                  if hasattr(transformers, f"{name}{kind}"))
    model = scaled(lambda: AutoModelForCausalLM.from_config(config(**SHAPE | ARCHITECTURES[name])))
    rollout = draw(model, group_size=3, eos_ids=[EOS, 3, 11])
    log_probs = token_log_probs(model, rollout, max_logits=5 * VOCAB)
    torch.testing.assert_close(rollout.log_probs, log_probs, atol=5e-5, rtol=0)
    assert len(set(rollout.lengths.tolist())) > 1
    for b in range(9):
        tokens, start = PROMPTS[b // 3] + rollout.responses()[b], len(PROMPTS[b // 3])
        with torch.no_grad():
            plain = model(input_ids=on([tokens])).logits[0, start - 1:-1].log_softmax(dim=1)
        for t, token in enumerate(tokens[start:]):
            assert log_probs[b, t].item() == pytest.approx(plain[t, token].item(), abs=5e-5)
    log_probs.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_greedy_equals_generate(model):
    rollout = draw(model, group_size=1, max_new_tokens=12, temperature=0)
    for prompt, response in zip(PROMPTS, rollout.responses()):
        expected = model.generate(on([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS,
                                  pad_token_id=0)
        assert response == expected[0, len(prompt):].tolist()


def drawn(monkeypatch, logits, uniforms):
    """The tokens that the given uniform numbers draw, and their rollout."""
    numbers = torch.tensor(uniforms, dtype=torch.float64)[:, None]
    model = qwen2()
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: numbers)
    monkeypatch.setattr(model, "forward", lambda input_ids, **kwargs: SimpleNamespace(
        logits=on(logits).expand(len(input_ids), 1, -1)))
    rollout = sample(model, [[1]], len(uniforms), 1, [])
    return rollout.ids[:, 0].tolist(), rollout


def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch):
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    tokens, rollout = drawn(monkeypatch, logits, [0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53])
    assert tokens == [1, 1, 3, 3]
    torch.testing.assert_close(rollout.entropies, on([[math.log(2)]] * 4))  # the impossible add nothing


def test_a_tail_below_the_precision_of_float32_is_drawn(monkeypatch):
    V, way = 20_000, [n / 50 for n in range(1, 50)]  # of the way through the tail
    logits = torch.full((V,), math.log(1e-8))  # 1 + 1e-8 is 1 in float32
    logits[0] = 0
    tokens, _ = drawn(monkeypatch, logits, [(1 + x * (V - 1) * 1e-8) / (1 + (V - 1) * 1e-8) for x in way])
    assert tokens == pytest.approx([x * V for x in way], abs=1)


def test_rows_do_not_depend_on_their_batch_on_padding_or_on_its_token(model):
    rollout = draw(model)
    values = token_log_probs(model, rollout)

    def gradient(rollout, row):
        model.zero_grad()
        token_log_probs(model, rollout)[row].sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    alone = rollout.select(on([5]))
    assert (alone.prompts.shape[1], alone.ids.shape[1]) == (len(PROMPTS[1]), rollout.lengths[5])
    torch.testing.assert_close(gradient(alone, 0), gradient(rollout, 5), atol=1e-4, rtol=1e-4)
    other = copy.copy(rollout)
    other.ids = torch.nn.functional.pad(torch.where(rollout.mask, rollout.ids, 13), (0, 6), value=EOS)
    inside = on(range(5)) >= 5 - rollout.prompt_lengths[:, None]
    other.prompts = torch.nn.functional.pad(torch.where(inside, rollout.prompts, 13), (6, 0), value=EOS)
    torch.testing.assert_close(token_log_probs(model, other)[:, :values.shape[1]], values, atol=1e-5, rtol=0)


def test_gradient_in_chunks_equals_autograd_of_the_plain_formula(model):
    rollout = draw(model).select(on([0, 4, 8]))
    total = 0
    for prompt, response in zip(PROMPTS, rollout.responses()):
        logits = model(input_ids=on([prompt + response])).logits[0, len(prompt) - 1:-1]
        log_p = (logits / 0.7).log_softmax(dim=1)
        total = total + sum(log_p[t, token] ** 2 for t, token in enumerate(response))
    expected = torch.autograd.grad(total, list(model.parameters()))
    for max_logits in (2**25, 5 * VOCAB, 1):
        log_probs = token_log_probs(model, rollout, 0.7, max_logits)
        actual = torch.autograd.grad(log_probs.pow(2).sum(), list(model.parameters()))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_bf16_logits_are_normalized_in_float32(monkeypatch):
    forward = Qwen2ForCausalLM.forward

    def coarse(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = (outputs.logits * 50).bfloat16()  # their exponentials overflow
        return outputs

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", coarse)
    model = qwen2()
    rollout = draw(model)
    log_probs = token_log_probs(model, rollout)
    assert log_probs.dtype == rollout.log_probs.dtype == torch.float32
    for prompt, response, row in zip(PROMPTS, rollout.responses()[::4], log_probs[::4]):
        with torch.no_grad():
            logits = model(input_ids=on([prompt + response])).logits[0, len(prompt) - 1:-1]
        expected = logits.double().log_softmax(dim=1)[torch.arange(len(response)), response]
        torch.testing.assert_close(row[:len(response)].double(), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- The update

def settings(**kwargs):
    return Config(**{"lr": 0.0, "micro_batch": 100, "max_grad_norm": 1e9} | kwargs)


class Keep(torch.optim.SGD):
    """An optimizer that keeps the gradients of its first step and changes nothing."""

    def step(self, closure=None):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.gradient = getattr(self, "gradient", torch.cat(gradients))


def update_gradient(model, rollout, advantages, ref_model=None, **kwargs):
    optimizer = Keep(model.parameters(), lr=0.0)
    metrics = icpo.update(model, optimizer, rollout, advantages, settings(**kwargs), ref_model)
    return optimizer.gradient, metrics


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_does_not_depend_on_micro_batches_row_order_or_skipped_rows(model, aggregation):
    rollout = draw(model, group_size=4, max_new_tokens=12)
    advantages = on(torch.randn(12, generator=torch.Generator().manual_seed(0)))
    advantages[[2, 5, 6]] = 0
    # The oracle: -sum of A * log-prob weighted by a loop. At ratio 1 the clipped loss has its gradient.
    log_probs, total = token_log_probs(model, rollout), 0.0
    lengths = rollout.lengths.tolist()
    for b in range(12):
        weight = 1 / sum(lengths) if aggregation == "token" else 1 / (lengths[b] * 12)
        total = total - advantages[b] * log_probs[b, :lengths[b]].sum() * weight
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    assert len(set(lengths)) > 2
    for size in (1, 2, 5, 100):
        actual, _ = update_gradient(model, rollout, advantages, aggregation=aggregation, micro_batch=size)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    order = on(torch.randperm(12))
    actual, _ = update_gradient(model, rollout.select(order), advantages[order], aggregation=aggregation, micro_batch=5)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_gradient_checkpointing_recomputes_layers_and_keeps_the_gradient(make):
    model = scaled(lambda: AutoModelForCausalLM.from_config(icpo.quietened(make().config)))
    rollout, advantages = draw(model), on(torch.randn(12))
    expected, _ = update_gradient(model, rollout, advantages)
    calls = []
    model.gradient_checkpointing_enable()
    layer = next(module for module in model.modules() if hasattr(module, "mlp"))
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    actual, _ = update_gradient(model, rollout, advantages)
    assert len(calls) == 2  # once forward, once again in the backward pass
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(draw(model).log_probs, rollout.log_probs)  # sampling still has its cache


@pytest.mark.parametrize("size", [3, 100])
def test_first_ratio_is_exactly_one_and_the_second_is_not(size, monkeypatch):
    model, seen = gpt2(), []  # dropout 0.1, which must not act

    def spy(log_probs, old_log_probs, *args, **kwargs):
        seen.append((log_probs - old_log_probs).exp())
        return policy_loss(log_probs, old_log_probs, *args, **kwargs)

    monkeypatch.setattr(icpo, "policy_loss", spy)
    model.train()
    config, rollout = settings(inner_epochs=2, micro_batch=size), draw(model)
    icpo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rollout, on(torch.randn(12)), config)
    first, second = seen[:len(seen) // 2], seen[len(seen) // 2:]
    assert all(ratio.eq(1).all() for ratio in first)
    assert all(ratio.ne(1).any() for ratio in second)


def test_metrics_of_the_update_equal_a_loop_over_all_tokens(model):
    rollout, advantages, ref_model = draw(model), on(torch.randn(12)), copy.deepcopy(model)
    advantages[3] = 0  # counts all the same, since the KL needs it
    otherwise = torch.linspace(-0.01, 0.01, rollout.mask.shape[1])
    rollout.log_probs += rollout.mask * on(otherwise)  # as if sampled otherwise
    with torch.no_grad():
        for parameter in ref_model.parameters():
            parameter.mul_(0.9)

    def updated(inner_epochs):
        policy = copy.deepcopy(model)
        config = settings(inner_epochs=inner_epochs, micro_batch=5, kl_coef=0.1)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        return policy, icpo.update(policy, optimizer, rollout, advantages, config, ref_model)

    # The second epoch again by hand: the first on a copy, then ratios and KL token by token.
    (copied, _), (_, metrics) = updated(1), updated(2)
    clipped, kl_old, kl_ref, difference, tokens = 0, 0.0, 0.0, 0.0, 0
    for b, response in enumerate(rollout.responses()):
        for t in range(len(response)):
            place = (PROMPTS[b // 4] + response, len(PROMPTS[b // 4]) + t)
            old, new, ref = (prefix_log_prob(m, *place) for m in (model, copied, ref_model))
            ratio = math.exp(new - old)
            clipped += (advantages[b].item() > 0 and ratio > 1.28) or (advantages[b].item() < 0 and ratio < 0.8)
            kl_old, kl_ref = kl_old + ratio - (new - old) - 1, kl_ref + math.exp(ref - new) - (ref - new) - 1
            difference, tokens = difference + abs(old - rollout.log_probs[b, t].item()), tokens + 1
    assert metrics["ratio/clip_frac"] == pytest.approx(clipped / tokens) and clipped
    assert metrics["kl/old"] == pytest.approx(kl_old / tokens, rel=1e-3)
    assert metrics["kl/ref"] == pytest.approx(kl_ref / tokens, rel=1e-3)
    assert metrics["sampling/logp_difference"] == pytest.approx(difference / tokens, rel=1e-3) and difference


def test_uniform_batches_and_broken_gradients_make_no_step():
    model = qwen2()
    rollout, before = draw(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert icpo.update(model, optimizer, rollout, on([0.0] * 12), settings())["grad_norm"] == 0
    metrics = icpo.update(model, optimizer, rollout, on([math.inf] * 12), settings())
    assert metrics["update/skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    icpo.update(model, optimizer, rollout, on(torch.randn(12)), settings(max_grad_norm=0.01))
    moved = torch.cat([(value - before[name]).flatten() for name, value in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-2)


def test_log_probs_that_were_not_sampled_stop_the_first_update_before_any_weight_moves():
    model = qwen2()
    rollout, before = draw(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sampled, limit = rollout.log_probs, 0.01 if DEVICE == "cpu" else 0.1
    for wrong in (1.1 * limit, -1.1 * limit, math.nan):
        rollout.log_probs = sampled + wrong * rollout.mask
        with pytest.raises(icpo.UserError, match="nats a token"):
            icpo.update(model, optimizer, rollout, on(torch.randn(12)), settings())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rollout.log_probs = sampled + 0.9 * limit * rollout.mask
    metrics = icpo.update(model, optimizer, rollout, on(torch.randn(12)), settings())
    assert metrics["sampling/logp_difference"] == pytest.approx(0.9 * limit, abs=1e-5)
    rollout.log_probs = sampled - 3  # from the second step on it is a metric, and stops nothing
    icpo.update(model, optimizer, rollout, on(torch.randn(12)), settings())


def test_rollout_metrics_equal_loops():
    rollout, mean = draw(qwen2()), statistics.mean
    rewards = torch.tensor([[0, 0.5, 0.5, 1], [1, 1, 1, 1], [0, 0, 0, 1]])  # some at the mean, all equal, neither
    l = sequence_log_prob(rollout.log_probs, rollout.mask).view(3, 4).cpu()
    metrics = icpo.rollout_metrics(rollout, rewards, l, 10.0)
    groups = [list(zip([r > 0.5 for r in row], c)) for row, c in zip(rewards.tolist(), l.tolist())]
    rows, scores = rewards.tolist(), [loop_preference(row, 10.0) for row in l.tolist()]
    terms = [a * s for row, group in zip(rows, scores) for a, s in zip(loop_advantage(row), group)]
    expected = {
        "reward/verified": mean(itertools.chain(*rows)),
        "reward/std": mean(map(statistics.stdev, rows)),
        "groups/uniform_frac": mean(len(set(row)) == 1 for row in rows),
        "preference/agreement": sum(terms) / sum(map(abs, terms)),
        "confidence/correct": mean(c for group in groups for v, c in group if v),
        "confidence/wrong": mean(c for group in groups for v, c in group if not v),
        "confidence/overconfident_frac": mean(any(v for v, _ in group) and not max(group, key=lambda pair: pair[1])[0]
                                              for group in groups),
        "entropy": mean(x for row, n in zip(rollout.entropies.tolist(), rollout.lengths.tolist()) for x in row[:n]),
        "length/mean": mean(rollout.lengths.tolist()),
        "length/truncated_frac": mean(map(int, rollout.truncated.tolist()))}
    assert metrics == pytest.approx(expected, abs=1e-5)
    assert icpo.rollout_metrics(rollout, rewards, l, -10.0) == metrics  # agreement tells of the model, not of beta
    assert icpo.rollout_metrics(rollout, torch.ones(3, 4), l, 10.0)["confidence/wrong"] is None


# ------------------------------------------------------------------------------------------------------- Whole runs

def run(*flags):
    return icpo.main([str(flag) for flag in flags])


def error_of(capfd, *flags):
    """The one line that a run in vain shows."""
    assert run(*flags) == 2
    error = capfd.readouterr().err.split("icpo.py: error: ")[1].strip()
    assert "\n" not in error
    return error


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """The built-in task with a shorter apprenticeship to a less sloppy teacher."""
    folder = tmp_path_factory.mktemp("task") / "run"
    write_task(folder, Config(task_warmup_steps=500, task_teacher_error=0.7, device="cpu"))
    return folder / "task"


def own(task, out, *flags):
    return ["--model", task / "model", "--train-data", task / "train.jsonl", "--eval-data", task / "eval.jsonl",
            "--output-dir", out, "--max-new-tokens", 32, "--micro-batch", 128, "--eval-rows", 128, "--eval-samples", 0,
            "--lr", 2e-4, "--device", "cpu", *flags]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A saved Qwen2-architecture model with a byte-level BPE tokenizer and a chat template, its weights in bf16."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"is": 256, "<|endoftext|>": 257}, merges=[("i", "s")])
    tokenizer.chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% endif %}")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE | dict(vocab_size=258, num_hidden_layers=1, max_position_embeddings=256,
                                                eos_token_id=257))).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.9}')  # invalid when saved as it is
    return folder


GSM = [{"question": f"What is {n} and {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
       for n in range(9)]


@pytest.mark.parametrize("direction", [1, -1], ids=["learns", "negated advantages un-learn"])
def test_task_learns(task, tmp_path, monkeypatch, direction):
    monkeypatch.setattr(icpo, "icpo_advantage", lambda *args: direction * icpo_advantage(*args))
    assert run(*own(task, tmp_path / "run", "--steps", 12)) == 0
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert (accuracies[-1] - accuracies[0]) * direction > 0.1, accuracies


def test_train_step_is_the_six_lines_of_the_header(tiny, tmp_path):
    """Called as in a notebook, with every number of its samples made again from the parts."""
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    before = copy.deepcopy(model)
    config = Config(group_size=4, max_new_tokens=6, lr=1e-2, alpha=0.3, beta=5.0, micro_batch=3)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"{n} is", "answer": "1"} for n in range(3)])
    examples = icpo.load_examples(str(data), tokenizer, config, context=64)
    torch.manual_seed(1)
    metrics, samples = icpo.train_step(model, tokenizer, eos_ids, torch.optim.SGD(model.parameters(), lr=0.1), examples,
                                       lambda response, reference: 1 / (len(response) % 3), config)
    torch.manual_seed(1)
    rollout = sample(before, [example.ids for example in examples], 4, 6, eos_ids)
    responses = tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
    l = [statistics.mean(row[:n]) for row, n in zip(rollout.log_probs.tolist(), rollout.lengths.tolist())]
    rewards, expected = [{0: 0.0, 1: 1.0, 2: 0.5}[len(response) % 3] for response in responses], []
    for p in range(3):
        group, scores = rewards[4 * p:4 * p + 4], loop_preference(l[4 * p:4 * p + 4], 5.0)
        uniform = len(set(group)) == 1
        expected += [0.0] * 4 if uniform else loop_advantage([r + 0.3 * s for r, s in zip(group, scores)])
    assert any(expected) and len(samples) == 12
    assert [row["response"] for row in samples] == responses and [row["reward"] for row in samples] == rewards
    assert [row["prompt"] for row in samples] == [f"{b // 4} is" for b in range(12)]
    assert [row["confidence"] for row in samples] == pytest.approx(l, abs=1e-5)
    assert [row["advantage"] for row in samples] == pytest.approx(expected, abs=1e-4)
    assert metrics["reward/verified"] == pytest.approx(statistics.mean(rewards))
    assert metrics["reward/errors"] == rewards.count(0.0) > 0
    gradient, _ = update_gradient(before, rollout, torch.tensor(expected), lr=1e-2)
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before.parameters())])
    torch.testing.assert_close(moved, -0.1 * gradient, atol=1e-6, rtol=1e-3)


def test_own_model_and_data(tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "my_reward.py").write_text("def count(response, reference):\n"
                                           "    assert reference in map(str, range(0, 18, 2)), reference\n"
                                           "    return len(response) % 5 / 4\n")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "mine")
    config = json.loads((tiny / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "mine/config.json").write_text(json.dumps(config))
    data = write_jsonl(tmp_path / "data.jsonl", GSM + [{"question": "x" * 300, "answer": "1"}])
    assert run(
        "--device", "cpu", "--model", "mine", "--train-data", data, "--eval-data", data, "--prompt-key", "question",
        "--max-new-tokens", 8, "--max-prompt-tokens", 200, "--steps", 2, "--prompts-per-step", 3, "--group-size", 4,
        "--eval-samples", 2, "--reward", "my_reward:count", "--system-prompt", "Brief.", "--prompt-suffix", " Think.",
        "--kl-coef", 0.1, "--inner-epochs", 2, "--micro-batch", 5, "--alpha", 0.3, "--output-dir", "run") == 0
    assert "skipped 1 prompts" in capfd.readouterr().out
    metrics, samples = rows_of(tmp_path / "run" / "metrics.jsonl"), rows_of(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2] and len(samples) == 2 * 4
    explained = (ROOT / "results" / "README.md").read_text()
    assert len(metrics[2]) == 26 and all(f"`{name}`" in explained for name in set(metrics[2]) - {"step"})
    assert metrics[2]["reward/errors"] == 0 and metrics[2]["lr"] == pytest.approx(1e-6 * 2 / 5)
    assert metrics[2]["sampling/logp_difference"] < 1e-5
    assert {sample["reference"] for sample in samples} <= {str(n) for n in range(0, 18, 2)}
    saved = tmp_path / "run" / "model"
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert policy.config.attention_dropout == 0.1  # it was off while training
    assert policy.dtype == torch.float32 and tokenizer("this").input_ids[-1] == 256
    # float32 masters: two steps of at most 4e-7 would be lost in the checkpoint's bf16, and yet most weights moved
    old = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    moved = [(value != old[name]).flatten() for name, value in policy.state_dict().items() if "layers" in name]
    assert torch.cat(moved).float().mean() > 0.5


def test_prompts_go_through_the_chat_template_and_tokens(tiny, tmp_path):
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    assert eos_ids == [257] and model.dtype == torch.float32
    data = str(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "2+2 is 4", "answer": "\\boxed{4}"}]))
    example, = icpo.load_examples(data, tokenizer, Config(max_new_tokens=9, system_prompt="S", prompt_suffix="!"), 1000)
    assert tokenizer.decode(example.ids) == "[system]S[user]2+2 is 4![assistant]" and example.reference == "4"
    example, = icpo.load_examples(data, tokenizer, Config(max_new_tokens=9, prompt_suffix="!", no_chat_template=True), 1000)
    assert tokenizer.decode(example.ids) == "2+2 is 4!" and 256 in example.ids


def test_evaluation_equals_loops(tiny, monkeypatch, capsys):
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    examples, seen = [icpo.Example("", "r", [n + 1] * (n + 1)) for n in range(5)], {1: [], 3: []}

    def spy(model, prompts, k, *args):
        rollout = sample(model, prompts, k, *args)
        responses = tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
        seen[k] += [responses[start:start + k] for start in range(0, len(responses), k)]
        return rollout

    monkeypatch.setattr(icpo, "sample", spy)
    config = Config(prompts_per_step=2, group_size=3, eval_samples=3, max_new_tokens=5, seed=3)
    metrics = icpo.evaluate(model, tokenizer, eos_ids, examples, lambda text, _: len(text) % 3 / 2, config)
    rewards = {k: [[len(text) % 3 / 2 for text in group] for group in groups] for k, groups in seen.items()}
    worst = min(seen[1], key=lambda group: len(group[0]) % 3)[0]
    assert f"-> {worst[-40:]!r}" in capsys.readouterr().out
    assert metrics == pytest.approx({
        "eval/accuracy": statistics.mean(scores[0] for scores in rewards[1]),
        "eval/mean_at_k": statistics.mean(itertools.chain(*rewards[3])),
        "eval/pass_at_k": statistics.mean(map(max, rewards[3]))})
    assert metrics["eval/mean_at_k"] < metrics["eval/pass_at_k"] and len(seen[3]) == 5
    assert icpo.evaluate(model, tokenizer, eos_ids, examples, lambda text, _: len(text) % 3 / 2, config) == metrics


def test_random_numbers_follow_from_the_seed_and_the_step(tiny, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("--model", tiny, "--train-data", data, "--max-new-tokens", 8, "--steps", 2, "--seed", seed,
                   "--lr", 1e-30, "--prompts-per-step", 1, "--output-dir", tmp_path / name, "--device", "cpu") == 0
    a, b, c = ([row["response"] for row in rows_of(tmp_path / name / "samples.jsonl")] for name in "abc")
    assert a == b and a != c and a[:8] != a[8:] and len(a) == 16


def test_every_example_once_an_epoch():
    taken = [i for step in range(1, 13) for i in icpo.batch_indices(10, step, 5, seed=0)]
    epochs = [taken[start:start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6


def test_failing_rewards_score_zero_are_counted_and_shown_once(caplog):
    class Reward(dict):  # without a hash
        def __call__(self, response, reference):
            return self[response]

    reward = Reward(a=1.0, b=math.nan, c="no number", d=1e300)
    for responses, shown in (("abcdea", "the reward is nan"), ("acbdea", "'no number'"), ("adbcea", "overflow")):
        warning_once.cache_clear()
        caplog.clear()
        for _ in range(2):
            rewards, failed = icpo.score_responses(reward, list(responses), [icpo.Example("", "r", [])] * 3)
            assert rewards.tolist() == [[1, 0], [0, 0], [0, 1]] and len(failed) == 4 and "KeyError('e')" in failed
        assert caplog.text.count(shown) == caplog.text.count("Traceback") == 1


BROKEN_TEMPLATES = ["no_prompt", "{{none+1}}", "{{1/0}}", "{{messages[9].content}}", "{%if%}", "{{messages.no()}}"]
BAD = [
    ("--group-size 1", "--group-size: must be at least 2"), ("--alpha 0.5", "below 1/2"), ("--alpha -1", "-1"),
    ("--steps 0", "--steps 0"), ("--beta inf", "--beta: must be finite"), ("--beta nan", "--beta: must be finite"), ("--lr nan", "--lr nan: must be above 0"),
    ("--kl-coef -1", "--kl-coef"), ("--clip-low -1", "--clip-low -1.0: must be at least 0"), ("--temperature 0", "--temperature"),
    ("--seed -1", "--seed -1"), ("--resume", "no checkpoint in"), ("--reward nowhere:f", "No module named 'nowhere'"),
    ("--reward verify:nothing", "nothing"), ("--reward bad:f", "SyntaxError"),
    ("--reward verify:MAX_BITS", "not a function"), ("--model code", "code which must be executed"),
    ("--model no/such/dir", "no/such/dir"), ("--train-data absent.jsonl", "No such file or directory: 'absent.jsonl'"),
    ("--train-data .", "Is a directory"), ("--train-data broken.jsonl", "broken.jsonl, line 3: JSONDecodeError"),
    ("--train-data keys.jsonl", "line 2: KeyError('answer')"), ("--train-data keys.jsonl", '"reply": "1"'),
    ("--train-data list.jsonl", "line 1: TypeError"), ("--train-data number.jsonl", "no string for a prompt, or no answer"),
    ("--train-data null.jsonl", "line 1: TypeError"), ("--output-dir runs/addition", "not empty"),
    ("--train-data latin.jsonl", "utf-8"),
    ("--train-data table.csv", "table.csv, line 1: JSONDecodeError"),
    ("--train-data table.csv", "give JSON Lines in UTF-8, in each 'prompt' and 'answer'"),
    ("--train-data array.json", "give JSON Lines"), ("--train-data empty.jsonl", "no usable row of 0"),
    ("--train-data surrogate.jsonl", "prompts that tokenizer and chat template take"), ("--reward leaves:f", "SystemExit"),
    *((f"--model broken --system-prompt {template}", "chat template") for template in BROKEN_TEMPLATES),
    ("--max-prompt-tokens 1", "no usable row"), ("--output-dir good.jsonl/run", "cannot be written: [Errno 20] Not a directory"),
    ("--max-new-tokens 500", "context 256 less"), ("--output-dir .", "not empty"),
    ("--model gemma --system-prompt x", "System role not supported"),
    pytest.param("--device cuda", "sees no CUDA GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"))]


@pytest.mark.parametrize("flags, message", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(tiny, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "1+1=", "answer": "2"}
    for name, text in {"good": json.dumps(good), "broken": f"{json.dumps(good)}\n\n{{oops\n", "empty": "\n",
                       "keys": f'{json.dumps(good)}\r\n{{"prompt": "1", "reply": "1"}}', "list": "[1]", "null": "null",
                       "number": '{"prompt": 1, "answer": 1}',
                       "surrogate": '{"prompt": "\\ud800", "answer": "1"}'}.items():
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" * (name == "good") + text, encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(good).encode() + b"\n\xe9")
    (tmp_path / "bad.py").write_text("def f(")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit()")
    (tmp_path / "table.csv").write_text("prompt,answer\n1+1=,2\n")
    (tmp_path / "array.json").write_text(json.dumps([good]))
    shutil.copytree(tiny, tmp_path / "broken")
    (tmp_path / "broken/chat_template.jinja").write_text(flags.rpartition("--system-prompt ")[2])
    (tmp_path / "runs" / "addition" / "task").mkdir(parents=True)
    shutil.copytree(tiny, tmp_path / "code")
    (tmp_path / "code/config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    shutil.copytree(tiny, tmp_path / "gemma")
    (tmp_path / "gemma/chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    before = sorted(tmp_path.rglob("*"))
    flags = ["--model", tiny, "--train-data", "good.jsonl", "--max-new-tokens", 8, "--device", "cpu", *flags.split()]
    assert message in error_of(capfd, *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_names_what_differs_and_a_full_folder_is_refused(tiny, tmp_path, capfd):
    data = write_jsonl(tmp_path / "data.jsonl", GSM)
    flags = ["--model", tiny, "--train-data", data, "--prompt-key", "question", "--max-new-tokens", 4, "--steps", 1,
             "--output-dir", tmp_path / "run", "--device", "cpu"]
    assert run(*flags) == 0
    assert "is not empty" in error_of(capfd, *flags)
    assert "began with another {'beta': 10.0}" in error_of(capfd, *flags, "--resume", "--beta", 3, "--steps", 2)
    assert run(*flags, "--resume", "--micro-batch", 3, "--gradient-checkpointing", "--steps", 2) == 0
    assert "--model and --train-data need each other" in error_of(capfd, *flags[2:])


def test_help_names_and_explains_every_flag_and_unknown_ones_are_refused(capsys):
    shown = subprocess.run([sys.executable, icpo.__file__, "--help"], capture_output=True, text=True)
    text = re.sub(r"\s+", " ", shown.stdout)
    assert shown.returncode == 0 and "0 is GRPO, below 1/G keeps the signs of its A (default: 0.1)" in text
    for name in Config.__dataclass_fields__:
        shown = rf"--{name.replace('_', '-')}( [A-Z_]+| {{[a-z,]+}}| \[[A-Z_]+\])? [a-zA-Z].*\(default:"
        assert re.search(shown, text), name
    with pytest.raises(SystemExit) as stop:
        run("--alhpa", 1)
    assert stop.value.code == 2 and capsys.readouterr().err.strip().endswith("unrecognized arguments: --alhpa 1")


def wrong_with_a_cache(self, *args, use_cache=None, **kwargs):
    outputs = qwen2_forward(self, *args, use_cache=use_cache, **kwargs)
    outputs.logits = outputs.logits * (1.5 if use_cache else 1)
    return outputs


qwen2_forward = Qwen2ForCausalLM.forward
SMALL = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, eos_token_id=257)
STATES = [transformers.MambaConfig(**SMALL), transformers.RwkvConfig(**SMALL, attention_hidden_size=32)]


@pytest.mark.parametrize("config", [None, *STATES], ids=["wrong with a cache", "Mamba", "RWKV"])
def test_a_model_that_samples_otherwise_than_it_scores_is_refused(tiny, tmp_path, monkeypatch, capfd, config):
    shutil.copytree(tiny, tmp_path / "model")
    if config is None:
        monkeypatch.setattr(Qwen2ForCausalLM, "forward", wrong_with_a_cache)
    model = AutoModelForCausalLM.from_config(config) if config else AutoModelForCausalLM.from_pretrained(tiny)
    model.generation_config = transformers.GenerationConfig()
    scaled(lambda: model).save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1" * n, "answer": "1"} for n in range(1, 9)])
    assert "nats a token" in error_of(capfd, "--model", tmp_path / "model", "--train-data", data, "--max-new-tokens", 8,
                                      "--output-dir", tmp_path / "run", "--device", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_sampled_from_is_one_line(tiny, tmp_path, capfd):
    shutil.copytree(tiny, tmp_path / "model")
    config = transformers.OpenAIGPTConfig(vocab_size=258, n_embd=32, n_layer=1, n_head=2)  # it has no cache at all
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    error = error_of(capfd, "--model", tmp_path / "model", "--train-data", "x.jsonl", "--device", "cpu")
    assert f"--model {tmp_path / 'model'}: " in error


# ---------------------------------------------------------------------------------------------------------- Faults

def short_run(task, out, *flags):
    return list(map(str, own(task, out, "--prompts-per-step", 4, "--group-size", 4, "--eval-rows", 4, "--steps", 12,
                             "--save-every", 1, *flags)))


def result_of(out):
    """The checkpoint, and the logs without their times."""
    state, logs = torch.load(out / "checkpoint" / "state.pt", weights_only=True), []
    for log in ("metrics.jsonl", "samples.jsonl"):
        logs.append([{name: value for name, value in row.items() if not name.startswith("time/")}
                     for row in rows_of(out / log)])
    tensors = torch.utils._pytree.tree_leaves([state["policy"], state["optimizer"]])
    return state["step"], [torch.as_tensor(x).tolist() for x in tensors if x is not None], logs


def test_resume_repeats_an_unbroken_run_bit_for_bit(task, tmp_path):
    flags = ["--eval-every", 2, "--save-every", 2, "--prompts-per-step", 4, "--eval-rows", 16]
    assert run(*own(task, tmp_path / "whole", *flags, "--steps", 4)) == 0
    assert run(*own(task, tmp_path / "broken", *flags, "--steps", 2)) == 0
    for log in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "broken" / log, "a") as file:
            file.write('{"step": 3}\n{"st')  # steps after the checkpoint, as a killed run leaves them
    (tmp_path / "broken").rename(tmp_path / "moved")
    assert run(*own(task, tmp_path / "moved", *flags, "--steps", 4, "--resume")) == 0
    whole, broken = result_of(tmp_path / "whole"), result_of(tmp_path / "moved")
    assert whole == broken and len(whole[1]) > 60 and len(whole[2][0]) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_and_go_on(task, tmp_path, number):
    command = [sys.executable, icpo.__file__, *short_run(task, tmp_path / "run", "--save-every", 100)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(rows_of(log)) > 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in shown and "Traceback" not in shown, shown
    step = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert 2 <= step == len(rows_of(log)) - 1 < 12  # the step in hand was finished, and kept
    assert run(*short_run(task, tmp_path / "run", "--resume", "--save-every", 100)) == 0
    assert run(*short_run(task, tmp_path / "whole")) == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_a_second_signal_of_either_kind_stops_at_once():
    with icpo.caught_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes half a minute; SLOW=1 python -m pytest runs it")
def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(task, tmp_path):
    context, out = multiprocessing.get_context("forkserver"), tmp_path / "run"
    context.set_forkserver_preload(["icpo"])  # which saves each process the seconds that it takes to import torch

    def process(out, *flags):
        process = context.Process(target=icpo.main, args=(short_run(task, out, *flags),))
        process.start()
        return process

    for name in ("first", "whole"):  # the first time the server still imports torch
        begin = time.perf_counter()
        process(tmp_path / name).join()
        seconds = time.perf_counter() - begin
    expected, random_, ended = result_of(tmp_path / "whole"), random.Random(0), 0
    checkpoint = out / "checkpoint" / "state.pt"
    for _ in range(20):
        if not checkpoint.exists():
            shutil.rmtree(out, ignore_errors=True)
        running = process(out, *["--resume"] * checkpoint.exists())
        running.join(random_.random() * seconds)  # while it reads, evaluates, trains or saves
        running.kill()
        running.join()
        if checkpoint.exists():
            torch.load(checkpoint, weights_only=True)
        if running.exitcode == 0:  # it had come to its end: begin another
            assert result_of(out) == expected
            shutil.rmtree(out)
            ended, seconds = ended + 1, seconds * 0.8  # the machine is faster than when the time was taken
    process(out, *["--resume"] * checkpoint.exists()).join()
    assert result_of(out) == expected and ended < 10


@contextlib.contextmanager
def files_of_at_most(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(task, tmp_path, capfd):
    flags = ["--resume", "--steps", 4, "--eval-every", 2]
    assert run(*short_run(task, tmp_path / "run", "--steps", 2, "--eval-every", 2)) == 0
    with files_of_at_most(100_000):
        error = error_of(capfd, *short_run(task, tmp_path / "run", *flags))
    assert f"{tmp_path / 'run' / 'checkpoint' / 'state.pt'} cannot be written" in error and "make room" in error
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    with files_of_at_most(sum(map(len, kept)) + 99):  # in the middle of a line
        error = error_of(capfd, *short_run(task, tmp_path / "run", *flags))
    assert ".jsonl cannot be written" in error
    assert run(*short_run(task, tmp_path / "run", *flags)) == 0
    assert run(*short_run(task, tmp_path / "whole", *flags[1:])) == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_no_room_or_no_folder_for_the_task_or_a_lost_log_is_one_line(task, tmp_path, capfd):
    with files_of_at_most(500_000):  # the sums fit in, 0.3M parameters do not
        error = error_of(capfd, "--task-warmup-steps", 1, "--output-dir", tmp_path / "run", "--device", "cpu")
    assert f"{tmp_path / 'run' / 'task'} cannot be written" in error
    error = error_of(capfd, "--output-dir", task / "train.jsonl" / "run", "--device", "cpu")
    assert "cannot be written: [Errno 20] Not a directory" in error
    assert run(*short_run(task, tmp_path / "lost", "--steps", 1)) == 0
    (tmp_path / "lost" / "samples.jsonl").unlink()
    error = error_of(capfd, *short_run(task, tmp_path / "lost", "--steps", 2, "--resume"))
    assert f"No such file or directory: '{tmp_path / 'lost' / 'samples.jsonl'}'" in error


def test_truncation_is_told_once(task, tmp_path, caplog):
    warning_once.cache_clear()
    for name in "ab":
        assert run(*short_run(task, tmp_path / name, "--max-new-tokens", 5, "--steps", 3)) == 0
    assert caplog.text.count("were cut: raise --max-new-tokens") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "no end"])
def test_a_damaged_model_or_one_that_never_ends_is_one_line(task, tmp_path, capfd, name):
    shutil.copytree(task / "model", tmp_path / "model")
    if name == "no end":
        for path in (tmp_path / "model" / f"{part}onfig.json" for part in ("tokenizer_c", "generation_c", "c")):
            path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(("eos_token", "eos_token_id"))))
    else:
        content = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(content[:len(content) // 2])
    error = error_of(capfd, *own(task, tmp_path / "run", "--model", tmp_path / "model"))
    assert ("no eos token" if name == "no end" else "--model") in error and not (tmp_path / "run").exists()


def test_out_of_memory_names_the_flags(task, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(icpo, "update", lambda *args: torch.empty(2**50))
    assert run(*short_run(task, tmp_path / "run")) == 2
    assert "lower --micro-batch" in capfd.readouterr().err


# ------------------------------------------------------------------------------------- What people bring, and meet

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def saved(folder, template=None, plain=(), special=(), make=Qwen2ForCausalLM, config=None, **changes):
    """A tiny model with a byte-level tokenizer, saved in the folder; the tokenizer."""
    vocabulary = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[])
    tokenizer.add_tokens([transformers.AddedToken(token, special=False) for token in plain])
    tokenizer.add_tokens([transformers.AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = template
    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=256) | changes
    make(config or Qwen2Config(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def texts(tokenizer, responses, opening="", truncated=False):
    """What the reward gets of one-token prompts and these responses."""
    lengths = torch.tensor([len(ids) for ids in responses])
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, responses)), batch_first=True)
    rollout = icpo.Rollout(torch.full((len(ids), 1), 5), torch.ones_like(lengths), ids, lengths,
                           torch.full((len(ids),), truncated), *torch.zeros(2, *ids.shape))
    return icpo.texts_of(rollout, tokenizer, [icpo.Example("", "", [5], opening)] * len(responses))


def test_the_reward_sees_what_the_model_wrote_without_the_token_that_ends_it(tmp_path):
    tokenizer = saved(tmp_path, plain=["<|im_end|>"], special=["<think>", "</think>", "<answer>", "</answer>"])
    written = "<think>3 + 4 .</think><answer>7</answer>"
    for end in ("<|im_end|>", "<|endoftext|>"):
        ids = tokenizer(written + end).input_ids
        assert texts(tokenizer, [ids, ids[-1:]]) == [written, ""]
        assert texts(tokenizer, [ids], truncated=True) == [written + end]  # the last token did not end it


@pytest.mark.parametrize("end, opening", [("<think>\n", "<think>\n"), ("", ""), ("<think>\n\n", "<think>\n\n"),
                                          ("<think>\n\n</think>\n\n", "")])
def test_a_thought_that_the_template_opens_belongs_to_the_response(tmp_path, end, opening):
    tokenizer = saved(tmp_path, template=CHATML.replace("assistant\n{% endif", f"assistant\n{end}{{% endif"))
    tokenizer = icpo.load_model(str(tmp_path), "cpu")[1]
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Write <think> first.", "answer": "7"}])
    example, = icpo.load_examples(str(data), tokenizer, Config(model="m", max_new_tokens=9))
    assert example.opening == opening
    cut, = texts(tokenizer, [tokenizer("maybe 3+4=7").input_ids], example.opening, truncated=True)
    assert cut == opening + "maybe 3+4=7" and verify(cut, "7") is (opening == "")


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_the_token_that_closes_a_message_ends_a_response(tmp_path, kind):
    tokenizer = saved(tmp_path, template=CHATML, **{kind: ["<|im_start|>", "<|im_end|>"]})
    ends = {256, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(icpo.load_model(str(tmp_path), "cpu")[2]) == ends
    for template in ("{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}", "{{ 1 / 0 }}", None):
        tokenizer.chat_template = template
        assert icpo.closing_token(tokenizer) == set()


def test_a_prompt_begins_once_and_does_not_end(tmp_path):
    tokenizer = saved(tmp_path, special=["<s>", "</s>"])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    plain, config = tokenizer("2+2").input_ids, Config(max_new_tokens=9)
    processor = importlib.import_module("tokenizers.processors").TemplateProcessing
    for single in ("$A", "<s> $A", "$A </s>", "<s> $A </s>"):
        tokenizer.backend_tokenizer.post_processor = processor(single=single, special_tokens=[("<s>", bos), ("</s>", eos)])
        begun = [bos] if "<s>" in single else []
        assert icpo.encode("2+2", tokenizer, config) == (begun + plain, "")
        assert icpo.encode("<s>2+2", tokenizer, config) == ([bos, *plain], "")
        assert icpo.encode("2+2 <think>", tokenizer, config)[1] == "<think>"


@pytest.mark.parametrize("failure", ["1 / 0", "sys.exit()", "[1.0]", "float('nan')"])
def test_a_reward_that_always_fails_at_first_ends_the_run_and_later_only_counts(tiny, tmp_path, monkeypatch, capfd, failure):
    module = f"failing_{abs(hash(failure))}"
    (tmp_path / f"{module}.py").write_text(
        f"import sys\ncalls = []\ndef always(response, reference):\n    return {failure}\n"
        "def later(response, reference):\n    calls.append(1)\n"
        f"    return {failure} if len(calls) > 4 else len(calls) % 2\n")
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    flags = ["--model", tiny, "--train-data", data, "--max-new-tokens", 4, "--steps", 3, "--prompts-per-step", 1,
             "--group-size", 4, "--device", "cpu"]
    error = error_of(capfd, *flags, "--output-dir", "a", "--reward", f"{module}:always")
    assert "all 4 calls of the first step failed" in error
    assert run(*flags, "--output-dir", "b", "--reward", f"{module}:later") == 0
    assert [row.get("reward/errors") for row in rows_of(tmp_path / "b/metrics.jsonl")] == [None, 0, 4, 4]


def test_a_process_that_a_reward_forks_does_not_train_on(monkeypatch):
    parent = os.getpid()

    def forks(response, reference):
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)  # as in a child
        sys.exit()

    with pytest.raises(SystemExit):
        icpo.score_responses(forks, ["a"], [icpo.Example("", "r", [])])


def test_the_reference_model_is_asked_once_a_rollout():
    model, calls = qwen2(), []
    reference = copy.deepcopy(model)
    reference.register_forward_pre_hook(lambda *args: calls.append(1))
    config = settings(inner_epochs=3, micro_batch=6, kl_coef=0.1)
    icpo.update(model, torch.optim.SGD(model.parameters(), lr=0.01), draw(model), on(torch.randn(12)), config, reference)
    assert len(calls) == 2


def test_references_reach_the_reward_as_they_are_in_the_file(tiny, tmp_path):
    tokenizer = icpo.load_model(str(tiny), "cpu")[1]
    values = [72, 0.5, True, [12, 13], ["a"], {"target": 5, "numbers": [2, None]}, "so\n#### 18", "plain"]
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "q", "answer": value} for value in values])
    examples = icpo.load_examples(str(data), tokenizer, Config(model="m", max_new_tokens=8))
    assert [example.reference for example in examples] == [*values[:-2], "18", "plain"]
    assert verify("The answer is 12, 13", [12, 13]) and not verify("The answer is 12", [12, 13]) and verify("7", ["7"])


@pytest.mark.parametrize("settings", [
    {"early_stopping": True}, {"length_penalty": 0.6}, {"output_scores": True}, {"pad_token_id": -1},
    {"temperature": 0.9}, {"top_k": 7, "do_sample": True}], ids=str)
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_what_could_not_be_saved_is_mended_before_the_first_step(tiny, tmp_path, settings, place):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [257, 9]}')
    path = tmp_path / "model" / place
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    assert run("--model", tmp_path / "model", "--train-data", data, "--max-new-tokens", 4, "--steps", 1, "--device", "cpu",
               "--output-dir", tmp_path / "run") == 0
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").generation_config.eos_token_id
    assert {257, 9} <= set(ends)


def test_weights_that_are_missing_and_ids_without_a_row_are_refused(tmp_path, capfd):
    flags = ["--train-data", "x.jsonl", "--device", "cpu", "--output-dir", tmp_path / "run"]
    for name, make, message in (("classifier", transformers.Qwen2ForSequenceClassification, "no weights in it for lm_head"),
                                ("body", transformers.Qwen2Model, "no weights in it for lm_head")):
        saved(tmp_path / name, make=make, tie_word_embeddings=False)
        assert message in error_of(capfd, "--model", tmp_path / name, *flags)
    saved(tmp_path / "short", vocab_size=250)
    assert "tokenizer of 257, model of 250 tokens" in error_of(capfd, "--model", tmp_path / "short", *flags)
    saved(tmp_path / "added", vocab_size=257, special=["<image>"])  # added without a row: fine if no prompt has it
    data = [write_jsonl(tmp_path / name, [{"prompt": name, "answer": "1"}]) for name in ("a", "<image>")]
    flags = ["--max-new-tokens", 4, "--steps", 1, "--device", "cpu", "--model", tmp_path / "added", "--train-data"]
    assert "a token beyond the 257 rows" in error_of(capfd, *flags, data[1], "--output-dir", tmp_path / "in-vain")
    assert run(*flags, data[0], "--output-dir", tmp_path / "run") == 0
    flags = ["--train-data", "x.jsonl", "--device", "cpu"]
    bert = transformers.BertConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                   num_attention_heads=4)
    saved(tmp_path / "bert", make=transformers.BertForMaskedLM, config=bert)
    assert "nats a token" in error_of(capfd, "--model", tmp_path / "bert", *flags)


WRONG_MODELS = {
    "run": "of a run, its folder model", "run/checkpoint": "of a run, its folder model",
    "bare": "no tokenizer in it", "half": "no tokenizer in it", "empty": "empty: Unrecognized model",
    "adapter": "no LoRA adapter, no file", "m.gguf": "no LoRA adapter, no file",
    "models/typo": "no such folder; We couldn", "~/absent": "/absent: no such folder",
    "./absent": "./absent: no such folder", "a/b/c": "a/b/c: no such folder"}


@pytest.mark.parametrize("given", WRONG_MODELS)
def test_what_people_give_for_a_model_is_told_what_it_is(tiny, tmp_path, monkeypatch, capfd, given):
    monkeypatch.chdir(tmp_path)
    for name in ("run/model", "bare", "adapter"):
        shutil.copytree(tiny, tmp_path / name)
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    shutil.copytree(tiny, tmp_path / "half")
    (tmp_path / "half/tokenizer.json").unlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run/checkpoint").mkdir()
    (tmp_path / "run/checkpoint/state.pt").write_text("")
    (tmp_path / "adapter/config.json").rename(tmp_path / "adapter/adapter_config.json")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert WRONG_MODELS[given] in error_of(capfd, "--model", given, "--train-data", "x.jsonl", "--device", "cpu")


def test_a_home_folder_and_an_unwritable_one(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(icpo, "evaluate", None)  # it is not reached
    shutil.copytree(tiny, tmp_path / "mine")
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    flags = ["--model", "~/mine", "--train-data", "~/data.jsonl", "--max-new-tokens", 4, "--device", "cpu"]
    assert "/proc/run/.lock cannot be written" in error_of(capfd, *flags, "--output-dir", "/proc/run")


def test_a_reward_that_changes_the_folder_leaves_the_run_where_it_was(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moving.py").write_text("import os, torch\nos.chdir('elsewhere')\ntorch.set_grad_enabled(False)\n"
                                        "def f(response, reference):\n    os.chdir('/')\n"
                                        "    torch.set_grad_enabled(False)\n    return len(response) % 2\n")
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    try:  # the module also turns gradients off, for everyone
        assert run("--model", tiny, "--train-data", "data.jsonl", "--eval-data", "data.jsonl", "--max-new-tokens", 4,
                   "--steps", 2, "--reward", "moving:f", "--output-dir", "run", "--device", "cpu") == 0
    finally:
        torch.set_grad_enabled(True)
    assert (tmp_path / "run/model/config.json").exists() and len(rows_of(tmp_path / "run/metrics.jsonl")) == 3


def test_one_run_a_folder(tiny, tmp_path, capfd):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    flags = ["--max-new-tokens", 4, "--steps", 1, "--device", "cpu", "--output-dir", tmp_path / "run"]
    own = ["--model", tiny, "--train-data", data]
    lock = icpo.claim(tmp_path / "run")
    another = f"import icpo; icpo.main({list(map(str, [*own, *flags]))})"
    shown = subprocess.run([sys.executable, "-c", another], cwd=ROOT, capture_output=True, text=True)
    assert "use an --output-dir no run is in" in shown.stderr and not (tmp_path / "run/metrics.jsonl").exists()
    lock.release()
    assert run(*own, *flags) == 0 and run(*own, *flags, "--resume", "--steps", 2) == 0
    assert "no checkpoint" in error_of(capfd, *own, *flags[:-1], tmp_path / "other", "--resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_a_reward_forks_die_of_a_signal(number):
    with icpo.caught_signals() as caught:
        if (child := os.fork()) == 0:
            try:
                time.sleep(60)
            finally:  # KeyboardInterrupt, as Python has it
                os._exit(-number % 256)
        time.sleep(0.1)
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-number, -number % 256)
    assert not caught


def test_a_pool_that_a_reward_terminates_ends(tiny, tmp_path):
    """Its workers may be told to end in the very moment in which they begin."""
    (tmp_path / "pooled.py").write_text("import multiprocessing\ndef f(response, reference):\n"
                                        "    pool = multiprocessing.get_context('fork').Pool(2)\n"
                                        "    x = pool.map(len, [response])[0]\n"
                                        "    pool.terminate()\n    pool.join()\n    return x % 2\n")
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    flags = ["--model", tiny, "--train-data", data, "--max-new-tokens", 4, "--steps", 2, "--prompts-per-step", 4,
             "--reward", "pooled:f", "--output-dir", "run", "--device", "cpu"]
    shown = subprocess.run([sys.executable, icpo.__file__, *map(str, flags)], cwd=tmp_path, capture_output=True, timeout=100)
    assert shown.returncode == 0 and rows_of(tmp_path / "run/metrics.jsonl")[-1]["reward/errors"] == 0


def test_training_in_a_thread(tiny, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    config = Config(model=tiny, train_data=data, output_dir=tmp_path / "run", steps=1, max_new_tokens=4, device="cpu")
    thread = threading.Thread(target=icpo.train, args=[config])
    thread.start()
    thread.join()
    assert (tmp_path / "run/model/config.json").exists()


def test_resume_needs_the_data_and_a_whole_checkpoint(tiny, tmp_path, capfd):
    paths = [write_jsonl(tmp_path / name, [{"prompt": "1", "answer": "1"}] * 2) for name in ("train", "eval")]
    flags = ["--model", tiny, "--train-data", paths[0], "--eval-data", paths[1], "--max-new-tokens", 4, "--device", "cpu",
             "--output-dir", tmp_path / "run", "--steps"]
    assert run(*flags, 1) == 0
    for path, rows in itertools.product(paths, ([("1", "1")], [("1", "1"), ("1", "2")], [("1", "1")] * 3)):
        whole = path.read_bytes()
        write_jsonl(path, [{"prompt": prompt, "answer": answer} for prompt, answer in rows])
        assert "began with another {'data" in error_of(capfd, *flags, 2, "--resume")
        path.write_bytes(whole)
    checkpoint = tmp_path / "run/checkpoint/state.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:999])
    assert "is damaged" in error_of(capfd, *flags, 2, "--resume")


def test_the_task_has_defaults_of_its_own_and_a_config_those_of_a_model(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(icpo, "train", seen.append)
    for flags in ([], ["--lr", 0.5], ["--steps", 500], ["--model", "m", "--train-data", "d"]):
        assert run(*flags) == 0
    torch.set_num_threads(1)
    chosen = [(c.steps, c.max_new_tokens, c.micro_batch, c.lr) for c in seen]
    assert chosen == [(60, 32, 128, 1e-4), (60, 32, 128, 0.5), (500, 32, 128, 1e-4), (500, 512, 8, 1e-6)]
    assert replace(Config(), model="m", train_data="d") == seen[3]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    config = Config(model=str(tiny), train_data=str(data), steps=1, device="cpu", max_new_tokens=4)
    icpo.train(config)
    assert rows_of(tmp_path / "runs" / tiny.name / "metrics.jsonl")[1]["lr"] == pytest.approx(1e-6 / 5)


SMALLER = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, max_position_embeddings=64, eos_token_id=7, bos_token_id=None, pad_token_id=0)
GEMMA3 = dict(text_config=SMALLER | dict(head_dim=8, sliding_window=32, attention_dropout=0.4),
              image_token_index=291, boi_token_index=292, eoi_token_index=293, mm_tokens_per_image=4, eos_token_id=7,
              vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=28, patch_size=14))
AS_LOADED = {  # images; experts that return router logits, and add noise to their input in training; dropout by function
    "Gemma3ForConditionalGeneration": transformers.Gemma3Config(**GEMMA3),
    "Mistral3ForConditionalGeneration": transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**SMALLER, head_dim=8), image_token_index=291,
        vision_config=transformers.PixtralVisionConfig(**GEMMA3["vision_config"])),
    "MixtralForCausalLM": transformers.MixtralConfig(**SMALLER, num_local_experts=4, output_router_logits=True,
                                                     router_jitter_noise=0.3),
    "Qwen2ForCausalLM": Qwen2Config(**SMALLER, output_hidden_states=True, return_dict=False),
    "OPTForCausalLM": transformers.OPTConfig(**SMALLER, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5),
    "FalconForCausalLM": transformers.FalconConfig(**SMALLER, attention_dropout=0.1, hidden_dropout=0.1, alibi=False),
    "MptForCausalLM": transformers.MptConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64,
                                             resid_pdrop=0.1, emb_pdrop=0.1)}


@pytest.mark.parametrize("name", AS_LOADED)
def test_loaded_models_train_without_dropout_or_extras_and_are_saved_as_they_were(tmp_path, name):
    saved(tmp_path / "model", make=getattr(transformers, name), config=copy.deepcopy(AS_LOADED[name]))
    model, _, eos_ids = icpo.load_model(str(tmp_path / "model"), "cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    rollout = draw(scaled(lambda: model), eos_ids=eos_ids)
    model.gradient_checkpointing_enable()  # puts layers into training mode
    metrics = icpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rollout, on(torch.randn(12)), settings())
    assert metrics["sampling/logp_difference"] < 1e-4 and metrics["grad_norm"] > 0
    model.config = model.config_to_save
    model.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("model", "again"))
    changed = {key for key in first if first[key] != again.get(key)}
    assert changed <= {"dtype", "text_config", "vision_config"}, changed


def test_the_built_in_task_runs_on_one_thread(monkeypatch):
    seen = []
    monkeypatch.setattr(icpo, "train", lambda config: seen.append(torch.get_num_threads()))
    for flags in ([], ["--model", "m", "--train-data", "d"]):
        torch.set_num_threads(2)
        assert run(*flags) == 0
    torch.set_num_threads(1)
    assert seen == [1, 2]


def test_what_a_run_shows_fits_80_columns_and_tells_what_it_does(task, tmp_path):
    command = [sys.executable, icpo.__file__, *short_run(task, tmp_path / "run", "--steps", 2, "--eval-every", 1,
                                                         "--max-new-tokens", 5, "--eval-samples", 2)]
    shown = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert shown.returncode == 0 and "Loading weights" not in shown.stderr and "model shards" not in shown.stderr
    assert "cpu, 1 threads, 0.3M parameters, 7076 prompts; an evaluation samples up to 60 tokens" in shown.stdout
    line = r"accuracy (0.\d{3}), mean_at_k 0.\d{3}, pass_at_k 0.\d{3}: '\d\d\+\d\d=' -> '."
    assert len(re.findall(line, shown.stdout)) == 3
    bars = [line for line in re.split(r"[\r\n]", shown.stderr) if "acc=" in line]
    assert bars and all(len(line) <= 80 and re.search(r"acc=\d\.\d\d, reward=\d\.\d\d, entropy=\d", line) for line in bars)
    assert shown.stderr.count("over half of the responses were cut") == 1


def test_lone_surrogates_and_narrow_terminals(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "caf\\u00e9 =", "answer": "\\ud800"}\n')
    flags = ["--model", tiny, "--train-data", data, "--eval-data", data, "--max-new-tokens", 4, "--steps", 1, "--device",
             "cpu", "--eval-samples", 0, "--output-dir", tmp_path / "run"]
    shown = subprocess.run([sys.executable, icpo.__file__, *map(str, flags)], capture_output=True, text=True,
                           env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert shown.returncode == 0 and "caf\\xe9" in shown.stdout, shown.stderr
    assert {row["reference"] for row in rows_of(tmp_path / "run/samples.jsonl")} == {"\ud800"}


def test_an_old_python_is_told_so():
    source = Path(icpo.__file__).read_text().split("\nimport contextlib")[0]
    with pytest.raises(SystemExit, match="Python 3.10; 3.11 or newer"):
        exec(source.replace("import sys\n", "import types\nsys = types.SimpleNamespace(version_info=(3, 10), exit=exit)\n"),
             {"exit": sys.exit})


# ----------------------------------------------------------------------------------------------------------- Verifier

@pytest.mark.parametrize("a, b, equal", [
    ("0.75", r"\frac{3}{4}", True), ("75%", "3/4", True), ("1.5e3", "1,500", True), (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("(1, 2)", "(1,2.0)", True), (r"\{1, 2\}", r"\{2,1\}", True), ("x = 5", "5", True), (r"2 \cdot 8 = 16", "16", True),
    ("0.333", "1/3", False), ("1 or 2", "1", False), ("(1, 2)", "(2, 1)", False), (r"2 \cdot 8 = 15", "15", False),
    (r"\pi", "3.14", False), ("72057594037927937", "72057594037927936", False), ("12,34", "1234", False)])
def test_equivalence_is_exact(a, b, equal):
    assert is_equivalent(a, b) is is_equivalent(b, a) is equal
