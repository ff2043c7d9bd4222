"""Tests of icpo.py and verify.py: offline, on tiny models made here. Run: python -m pytest -q

Each formula is held against an oracle that shares no code with it: a plain Python loop, an enumeration, a number derived
by hand, or transformers' own generate and forward.
"""

import contextlib
import copy
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
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM,
                          GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, Qwen2Config, Qwen2ForCausalLM)

import icpo
from icpo import (Config, Rollout, group_advantage, icpo_advantage, policy_loss, preference_advantage, sample,
                  sequence_log_prob, token_log_probs)
from verify import compute_score, extract_answer, is_equivalent, reward_func, verify

# One thread, here and in the runs started here: several that wait for each other crawl where something else runs too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(icpo.__file__).parent
README = (ROOT / "README.md").read_text()
VOCAB, EOS = 23, 7
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def qwen2():
    torch.manual_seed(0)
    return scaled(Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None)))


def gpt2():
    torch.manual_seed(0)
    return scaled(GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
        eos_token_id=EOS, bos_token_id=None)))


def scaled(model):
    """Larger weights, so that the next-token distributions differ from the uniform one and from each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture(params=[qwen2, gpt2], ids=["qwen2", "gpt2"])
def model(request):
    return request.param()


def draw(model, group_size=4, max_new_tokens=9, seed=0, **kwargs):
    return sample(model, PROMPTS, group_size, max_new_tokens, kwargs.pop("eos_ids", [EOS]),
                  generator=torch.Generator().manual_seed(seed), **kwargs)


# ------------------------------------------------------------------------------------------------ Preference advantage


def loop_preference(group, beta):
    """Steps 2 to 4 of the method from the Bradley-Terry probability, in plain Python."""
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


def test_preference_by_hand():
    # A gap of ln 3 at beta 1 is a preference of 3/4, so a score of 2 * 3/4 - 1 = 1/2; one of 2 ln 3 is 9/10, so 4/5.
    ln3 = math.log(3)
    torch.testing.assert_close(preference_advantage(torch.tensor([[0.0, -ln3]]), 1.0), torch.tensor([[-0.5, 0.5]]))
    expected = torch.tensor([[(-0.5 - 0.8) / 2, 0.0, (0.5 + 0.8) / 2]])
    torch.testing.assert_close(preference_advantage(torch.tensor([[0.0, -ln3, -2 * ln3]]), 1.0), expected)
    torch.testing.assert_close(preference_advantage(torch.tensor([[0.0, -ln3 / 10]]), 10.0), torch.tensor([[-0.5, 0.5]]))


def test_preference_properties():
    l = -torch.rand(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    s = preference_advantage(l, 10.0)
    assert s.shape == (6, 8) and s.dtype == torch.float32 and not s.requires_grad
    assert s.abs().max() < 1
    torch.testing.assert_close(s.sum(dim=1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(preference_advantage(-l, 10.0), -s)  # antisymmetric
    torch.testing.assert_close(preference_advantage(l - 3, 10.0), s, atol=1e-4, rtol=0)  # only differences count
    assert torch.equal(s.argsort(dim=1), l.argsort(dim=1, descending=True))  # the less probable, the more preferred
    order, groups = torch.randperm(8), torch.randperm(6)
    torch.testing.assert_close(preference_advantage(l[:, order], 10.0), s[:, order])
    torch.testing.assert_close(preference_advantage(l[groups], 10.0), s[groups])
    assert torch.equal(preference_advantage(torch.full((2, 5), -0.7), 10.0), torch.zeros(2, 5))
    tied = preference_advantage(torch.tensor([[-1.0, -1.0, -2.0]]), 10.0)[0]
    assert tied[0] == tied[1] < tied[2]


def test_preference_limits_of_beta():
    l = torch.tensor([[-0.4, -0.1, -0.9, -0.2]])
    ranks = torch.tensor([[1.0, -3.0, 3.0, -1.0]]) / 3  # (less probable ones below me - above me) / (G - 1)
    torch.testing.assert_close(preference_advantage(l, 1e6), ranks)
    slope = (l.mean() - l) * 4 / 3 / 2  # tanh(x / 2) is x / 2 for small x
    torch.testing.assert_close(preference_advantage(l, 1e-3) / 1e-3, slope, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- Group and ICPO advantages


def loop_advantage(group):
    return [(r - statistics.mean(group)) / statistics.stdev(group) if len(set(group)) > 1 else 0.0 for r in group]


def test_group_advantage_equals_loop():
    rewards = torch.randint(0, 3, (20, 6), generator=torch.Generator().manual_seed(0)).float() / 2
    expected = torch.tensor([loop_advantage(group) for group in rewards.tolist()])
    torch.testing.assert_close(group_advantage(rewards), expected, atol=1e-5, rtol=0)


def test_one_success_in_eight():
    advantages = group_advantage(torch.eye(8)[:1])
    torch.testing.assert_close(advantages[0, :2], torch.tensor([2.4749, -0.3536]), atol=1e-4, rtol=0)  # std with ddof 1


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.6, 0.7, 0.9, 1.0, -5.0])
def test_equal_rewards_give_exactly_zero(reward):
    for G in range(2, 17):
        rewards = torch.full((3, G), reward)
        l = -torch.rand(3, G)
        assert torch.equal(group_advantage(rewards), torch.zeros(3, G))
        for shaping in ("reward", "gated"):
            assert torch.equal(icpo_advantage(rewards, l, 0.4, 10.0, shaping), torch.zeros(3, G))


def test_near_ties_stay_small():
    rewards = torch.full((1, 8), 0.7)
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))  # rounding is not a difference in reward
    assert group_advantage(rewards).abs().max() < 1e-3
    assert group_advantage(torch.tensor([[0.7, 0.7, 0.7, 0.701]])).abs().max() > 1  # a small difference is one


@pytest.mark.parametrize("shaping", ["reward", "gated"])
def test_icpo_advantage_equals_loop(shaping):
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randint(0, 2, (30, 5), generator=generator).float()
    l, alpha, beta = -torch.rand(30, 5, generator=generator), 0.3, 7.0
    l -= rewards * 0.1  # right answers less probable on the whole, so that the agreement is between 0 and 1/2
    scores, plain = [loop_preference(row, beta) for row in l.tolist()], [loop_advantage(row) for row in rewards.tolist()]
    terms = [a * x for advantages, s in zip(plain, scores) for a, x in zip(advantages, s)]
    agreement, expected = sum(terms) / sum(map(abs, terms)), []
    assert 0 < agreement < 0.5
    for group, s, advantages in zip(rewards.tolist(), scores, plain):
        if shaping == "reward":
            mixed = loop_advantage([r + alpha * x for r, x in zip(group, s)])
            expected.append(mixed if len(set(group)) > 1 else [0.0] * 5)
        else:
            expected.append([a + alpha * 2 * agreement * abs(a) * x for a, x in zip(advantages, s)])
    actual = icpo_advantage(rewards, l, alpha, beta, shaping)
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=0)
    groups = torch.randperm(30)
    torch.testing.assert_close(icpo_advantage(rewards[groups], l[groups], alpha, beta, shaping), actual[groups])


@pytest.mark.parametrize("shaping", ["reward", "gated"])
def test_alpha_zero_is_grpo_to_the_bit(shaping):
    rewards, l = torch.rand(50, 8).round(decimals=1), -torch.rand(50, 8)
    assert torch.equal(icpo_advantage(rewards, l, 0.0, 10.0, shaping), group_advantage(rewards))
    kept = icpo_advantage(torch.ones(2, 4), -torch.rand(2, 4), 0.0, 10.0, shaping, keep_uniform_groups=True)
    assert torch.equal(kept, torch.zeros(2, 4))


def test_kept_uniform_groups_get_alpha_times_preference():
    l = torch.tensor([[-0.1, -0.5, -0.2]])
    kept = icpo_advantage(torch.zeros(1, 3), l, 0.4, 10.0, "reward", keep_uniform_groups=True)
    torch.testing.assert_close(kept, 0.4 * torch.tensor([loop_preference(l[0].tolist(), 10.0)]))


def test_verifier_is_never_overruled():
    for bits in itertools.product([0.0, 1.0], repeat=5):
        rewards, l = torch.tensor([bits]), -torch.rand(1, 5) * 3
        additive = icpo_advantage(rewards, l, 0.499, 1e4, "reward")[0]
        right, wrong = additive[rewards[0] == 1], additive[rewards[0] == 0]
        assert len(right) == 0 or len(wrong) == 0 or right.min() > wrong.max()
        assert torch.equal(icpo_advantage(rewards, l, 0.999, 1e4, "gated").sign(), group_advantage(rewards).sign())


def test_trust_by_hand():
    """Pairs of a right and a wrong response, so A = +-1/sqrt(2), with s = +-1/2 and +-3/10 from gaps of ln 3 and ln(13/7)."""
    rewards, a = torch.tensor([[1.0, 0.0]]), math.sqrt(0.5)
    unlikely_right, likely_right = torch.tensor([[-math.log(3), 0.0]]), torch.tensor([[0.0, -math.log(13 / 7)]])
    full = icpo_advantage(rewards, unlikely_right, 0.8, 1.0, "gated")  # agreement 1: A grows by 0.8 * 1/2
    torch.testing.assert_close(full, torch.tensor([[1.4 * a, -1.4 * a]]))
    assert torch.equal(icpo_advantage(rewards, likely_right, 0.8, 1.0, "gated"), group_advantage(rewards))  # agreement -1
    both = icpo_advantage(rewards.expand(2, 2), torch.cat([unlikely_right, likely_right]), 0.8, 1.0, "gated")
    # agreement (1/2 - 3/10) / (1/2 + 3/10) = 1/4, so trust 1/2 in both groups
    torch.testing.assert_close(both, torch.tensor([[1.2 * a, -1.2 * a], [0.88 * a, -0.88 * a]]))


def test_direction_confident_errors_and_undervalued_successes():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    l = torch.tensor([[-0.2, -0.6, -0.1, -0.5]])
    for shaping in ("reward", "gated"):
        sure_right, unsure_right, sure_wrong, unsure_wrong = icpo_advantage(rewards, l, 0.49, 10.0, shaping)[0]
        assert unsure_right > sure_right > 0 > unsure_wrong > sure_wrong


def test_repetition_does_not_pay():
    """A wrong answer that the model repeats with log-probs near 0, or a rambling one, never outranks a right one."""
    for wrong in (-1e-4, -0.2, -5.0):
        for shaping, alpha in (("gated", Config().alpha), ("reward", 0.49)):
            advantages = icpo_advantage(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[-0.2, wrong, -0.2, -0.3]]),
                                        alpha, Config().beta, shaping)[0]
            assert advantages[0] > 0 and advantages[0] > advantages[1:].max()


def test_bad_shapes_and_names_are_refused():
    for function in (lambda x: preference_advantage(x, 1.0), group_advantage):
        with pytest.raises(ValueError, match="at least 2"):
            function(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="additive"):
        icpo_advantage(torch.zeros(1, 2), torch.zeros(1, 2), 0.1, 1.0, "additive")
    with pytest.raises(ValueError, match="mean"):
        policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1, dtype=torch.bool), aggregation="mean")


def test_sequence_log_prob_is_the_mean_over_the_response():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, math.nan], [-4.0, 9.0, 9.0, 9.0]])  # the padding holds rubbish
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert sequence_log_prob(log_probs, mask).tolist() == [-2.0, -4.0]


# --------------------------------------------------------------------------------------------------------- Policy loss


@pytest.mark.parametrize("A, ratio, slope", [(1, 0.5, 1), (1, 1.0, 1), (1, 1.5, 0), (-1, 0.5, 0), (-1, 1.0, -1), (-1, 1.5, -1),
                                             (1, 1.27, 1), (1, 1.29, 0), (-1, 0.81, -1), (-1, 0.79, 0)])
def test_clip_table(A, ratio, slope):
    """The derivative of the objective by the ratio: A inside, 0 where the ratio has already moved far enough in A's favour."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([float(A)]), torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert -log_probs.grad.item() / ratio == pytest.approx(slope, abs=1e-6)  # d ratio / d log_prob is the ratio
    assert stats["clipped"] == (slope == 0)


def test_ratio_is_of_probabilities():
    old, new = torch.tensor([[math.log(0.4)]]), torch.tensor([[math.log(0.2)]])
    loss, _ = policy_loss(new, old, torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(-0.5)


def random_loss_inputs(B=5, T=7):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(T) < torch.tensor([7, 1, 3, 2, 5])[:, None]
    log_probs, old, ref = (torch.randn(B, T, generator=generator, dtype=torch.float64) * 0.4 - 1 for _ in range(3))
    return log_probs.requires_grad_(), old, torch.randn(B, generator=generator, dtype=torch.float64), mask, ref


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_and_stats_equal_loop_over_tokens(aggregation):
    log_probs, old, A, mask, ref = random_loss_inputs()
    loss, stats = policy_loss(log_probs, old, A, mask, 0.2, 0.28, aggregation, ref_log_probs=ref, kl_coef=0.3)
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
    log_probs, old, A, mask, ref = random_loss_inputs()
    before = copy.deepcopy((log_probs, old, A, mask, ref))
    whole, _ = policy_loss(log_probs, old, A, mask, aggregation=aggregation, ref_log_probs=ref, kl_coef=0.1)
    gradient, = torch.autograd.grad(whole, log_probs)
    for old_tensor, new_tensor in zip(before, (log_probs, old, A, mask, ref)):
        assert torch.equal(old_tensor, new_tensor)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    for size in (1, 2, 3):
        parts = sum(policy_loss(log_probs[i:i + size], old[i:i + size], A[i:i + size], mask[i:i + size], 0.2, 0.28, aggregation,
                                normalizer, ref[i:i + size], 0.1)[0] for i in range(0, 5, size))
        torch.testing.assert_close(torch.autograd.grad(parts, log_probs)[0], gradient)
    rubbish = torch.where(mask, old, torch.nan)
    torch.testing.assert_close(policy_loss(log_probs, rubbish, A, mask, aggregation=aggregation, ref_log_probs=ref, kl_coef=0.1)[0], whole)


def test_kl_estimator_is_unbiased_and_points_from_policy_to_reference():
    """Its mean under pi, enumerated over a vocabulary, is KL(pi || pi_ref), not KL(pi_ref || pi)."""
    pi, ref = torch.tensor([0.7, 0.2, 0.06, 0.04], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    terms = [policy_loss(p.log().view(1, 1), p.log().view(1, 1), torch.zeros(1), one, ref_log_probs=q.log().view(1, 1), kl_coef=1.0)
             for p, q in zip(pi, ref)]
    true = sum(p * math.log(p / q) for p, q in zip(pi.tolist(), ref.tolist()))
    assert sum(p * loss for p, (loss, _) in zip(pi.tolist(), terms)).item() == pytest.approx(true)
    # kl_old: tokens were drawn from the old policy, so the mean under it is KL(pi_old || pi).
    terms = [policy_loss(q.log().view(1, 1), p.log().view(1, 1), torch.zeros(1), one)[1]["kl_old"] for p, q in zip(pi, ref)]
    assert sum(p * kl for p, kl in zip(pi.tolist(), terms)).item() == pytest.approx(true)


@pytest.mark.parametrize("function", [sequence_log_prob, preference_advantage, group_advantage, icpo_advantage, policy_loss],
                         ids=lambda function: function.__name__)
def test_pure_functions_work_pasted_alone(function):
    needed = [preference_advantage, group_advantage] if function is icpo_advantage else []
    namespace = {}
    exec("import torch\nfrom torch import Tensor\n" + "".join(map(inspect.getsource, [*needed, function])), namespace)
    l, mask = -torch.rand(3, 4), torch.rand(3, 4) < 0.7
    arguments = {"sequence_log_prob": (l, mask), "preference_advantage": (l, 5.0), "group_advantage": (l,),
                 "icpo_advantage": (l.round(), l, 0.3, 5.0), "policy_loss": (l, l - 0.1, l[:, 0], mask)}[function.__name__]
    torch.testing.assert_close(namespace[function.__name__](*arguments), function(*arguments))


# ------------------------------------------------------------------------------------------------ Sampling and scoring


def prefix_log_prob(model, tokens, position, temperature=1.0):
    """log p(tokens[position] | tokens[:position]) by a forward pass over the prefix alone, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens[:position]])).logits[0, -1].double() / temperature
    return (logits[tokens[position]] - logits.logsumexp(dim=0)).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_loop_over_prefixes_under_a_hostile_generation_config(model, temperature):
    for name, value in dict(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1, temperature=0.7).items():
        setattr(model.generation_config, name, value)
    rollout = draw(model, temperature=temperature)
    log_probs, entropies = token_log_probs(model, rollout, temperature)
    assert log_probs.dtype == entropies.dtype == torch.float32 and log_probs.shape == rollout.mask.shape
    torch.testing.assert_close(rollout.log_probs, log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.entropies, entropies, atol=1e-4, rtol=0)
    for b, response in enumerate(rollout.responses()):
        tokens = PROMPTS[b // 4] + response
        for t in range(len(response)):
            expected = prefix_log_prob(model, tokens, len(PROMPTS[b // 4]) + t, temperature)
            assert log_probs[b, t].item() == pytest.approx(expected, abs=1e-5)
        assert log_probs[b, len(response):].eq(0).all()


def test_entropy_equals_sum_over_the_vocabulary():
    model = qwen2()
    rollout = draw(model)
    p = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(dim=0)
    assert rollout.entropies[0, 0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_greedy_equals_generate(model):
    rollout = draw(model, group_size=1, max_new_tokens=12, temperature=0)
    for prompt, response in zip(PROMPTS, rollout.responses()):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0)
        assert response == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize("eos_ids", [[EOS], [0], [EOS, 11, 0]], ids=["plain", "eos is the padding id", "several"])
def test_end_of_sequence_belongs_to_the_response_and_truncation_is_seen(model, eos_ids):
    rollout = draw(model, group_size=16, max_new_tokens=6, eos_ids=eos_ids)
    responses = rollout.responses()
    for b, response in enumerate(responses):
        assert rollout.mask[b].tolist() == [t < len(response) for t in range(rollout.mask.shape[1])]
        assert not any(token in eos_ids for token in response[:-1])
        assert rollout.truncated[b].item() == (response[-1] not in eos_ids)
        assert rollout.truncated[b].item() <= (len(response) == 6)
        assert rollout.ids[b, :len(PROMPTS[b // 16])].tolist() == PROMPTS[b // 16]
    assert rollout.truncated.any() and not rollout.truncated.all() and len(set(map(len, responses))) > 2


def test_sampled_frequencies_equal_probabilities(model):
    """Second tokens of 40,000 samples: prefill, shared cache and drawing, against probabilities by enumeration."""
    n, prompt = 40_000, PROMPTS[0]
    rollout = sample(model, [prompt], n, 2, [], temperature=0.8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.8).softmax(dim=0)
        nexts = (model(input_ids=torch.tensor([prompt + [a] for a in range(VOCAB)])).logits[:, -1].double() / 0.8).softmax(dim=1)
    joint = (first[:, None] * nexts).flatten() * n
    counts = torch.bincount(rollout.ids[:, -2] * VOCAB + rollout.ids[:, -1], minlength=VOCAB**2)
    common = joint >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([joint[common], joint[~common].sum()[None]])
    chi2, freedom = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert freedom > 20 and abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)  # 5 standard deviations


class Fixed(torch.nn.Module):
    """A model that gives the same logits (V,) everywhere."""

    device = torch.device("cpu")

    def __init__(self, logits):
        super().__init__()
        self.logits, self.config = logits, Qwen2Config(vocab_size=len(logits))

    def forward(self, input_ids, **kwargs):
        return type("Output", (), {"logits": self.logits.expand(len(input_ids), 1, -1)})


def test_drawing_is_exact_in_the_tail_of_a_large_vocabulary():
    """A likely first token, then 150,000 unlikely ones of which half are impossible: none of these, all parts of the rest."""
    V, n = 150_000, 1000
    logits = torch.full((V,), -math.inf)
    logits[0], logits[2::2] = math.log(0.5), math.log(0.5 / (V // 2 - 1))
    draws = [sample(Fixed(logits), [[1]], 100, 1, [], generator=torch.Generator().manual_seed(i)) for i in range(n // 100)]
    tokens = torch.cat([rollout.ids[:, 1] for rollout in draws])
    assert (tokens % 2 == 0).all()
    shares = [(tokens == 0).float().mean()] + [((tokens > 0) & (tokens * 4 // V == quarter)).float().mean() for quarter in range(4)]
    for share, expected in zip(shares, [0.5, 0.125, 0.125, 0.125, 0.125]):
        assert share.item() == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / n))


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (0.5, 2), (1 - 2**-53, 2)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch, uniform, token):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, uniform, dtype=torch.float64))
    for V in (4, 40_000):  # one level and blocks
        logits = torch.full((V,), -math.inf)
        logits[[V // 4, V // 2]] = 0.0  # cumulative in quarters of V: 0, 1/2, 1, 1
        rollout = sample(Fixed(logits), [[1]], 2, 1, [])
        assert rollout.ids[:, 1].tolist() == [token * V // 4] * 2
        torch.testing.assert_close(rollout.entropies, torch.full((2, 1), math.log(2)))  # impossible tokens add nothing


@pytest.mark.parametrize("V, places", [(8_000, 1), (40_000, 8)])  # in one level, and in blocks of float32 weights
def test_a_tail_below_the_precision_of_float32_is_drawn(V, places):
    share = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)  # of the way through the tail
    weights = torch.full((len(share), V), 1e-8)  # 1 + 1e-8 is 1 in float32
    weights[:, 0] = 1
    tokens = icpo.draw(weights, (1 + share * (V - 1) * 1e-8) / (1 + (V - 1) * 1e-8))
    assert tokens.tolist() == pytest.approx((share * V).tolist(), abs=places)


@pytest.mark.parametrize("V", [300, 20_001])
def test_drawing_is_the_inverse_of_the_cumulative_distribution(V):
    p = (torch.randn(1, V, generator=torch.Generator().manual_seed(2)) * 4).softmax(dim=1)  # from 1e-8 to 0.1
    cdf = np.cumsum(p[0].double().numpy()) / p.double().sum().item()
    u = np.random.default_rng(3).random(2000)
    u[:500] = 1 - u[:500] * 1e-3  # more of the end
    tokens = icpo.draw(p.expand(len(u), V), torch.tensor(u)).numpy()
    low, high = np.concatenate([[0.0], cdf])[tokens], cdf[tokens]
    assert (u >= low - 1e-6).all() and (u <= high + 1e-6).all()
    assert ((u >= low) & (u < high)).mean() > 0.99


def test_rows_do_not_depend_on_their_batch_on_padding_or_on_its_token(model):
    rollout = draw(model)
    values, _ = token_log_probs(model, rollout)

    def gradient(rollout, row):
        model.zero_grad()
        token_log_probs(model, rollout)[0][row].sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    for b in range(len(rollout.ids)):
        alone = rollout.select(torch.tensor([b]))
        assert alone.ids.shape[1] == len(PROMPTS[b // 4]) + rollout.lengths[b]
        torch.testing.assert_close(token_log_probs(model, alone)[0][0], values[b, :rollout.lengths[b]], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient(rollout.select(torch.tensor([5])), 0), gradient(rollout, 5), atol=1e-4, rtol=1e-4)
    padding = torch.arange(rollout.ids.shape[1]) >= (rollout.prompt_lengths + rollout.lengths)[:, None]
    other = copy.copy(rollout)
    other.ids = torch.nn.functional.pad(torch.where(padding, 13, rollout.ids), (0, 6), value=EOS)
    torch.testing.assert_close(token_log_probs(model, other)[0], values, atol=1e-5, rtol=0)


def test_a_row_samples_the_same_whatever_its_neighbours(model):
    """Rows end, leave the batch and share prefills of different lengths; each still is what it would have been alone."""
    together = draw(model, group_size=3, max_new_tokens=8, seed=4)
    uniforms = torch.rand(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for b in range(9):
        tokens = list(PROMPTS[b // 3])
        for t in range(8):  # inverse CDF by hand
            with torch.no_grad():
                p = model(input_ids=torch.tensor([tokens])).logits[0, -1].double().softmax(dim=0)
            tokens.append(next(v for v in range(VOCAB) if p[:v + 1].sum() > uniforms[b, t] or v == VOCAB - 1))
            if tokens[-1] == EOS:
                break
        assert tokens[len(PROMPTS[b // 3]):] == together.responses()[b]


def test_responses_longer_than_the_room_in_the_cache():
    """200 tokens: the cache makes room several times, and again when rows leave."""
    torch.manual_seed(0)
    model = scaled(Qwen2ForCausalLM(Qwen2Config(**SHAPE | dict(max_position_embeddings=256))))
    for eos_ids, longest in (([EOS], 131), ([], 200)):
        rollout = sample(model, PROMPTS, 4, 200, eos_ids, generator=torch.Generator().manual_seed(1))
        assert rollout.lengths.max() == longest
        torch.testing.assert_close(rollout.log_probs, token_log_probs(model, rollout)[0], atol=1e-5, rtol=0)


def test_gradient_of_log_probs_equals_autograd_of_the_plain_formula(model):
    rollout = draw(model)
    gradients = []
    for plain in (True, False):
        model.zero_grad()
        if plain:
            total = 0
            for prompt, response in zip(PROMPTS, rollout.responses()[::4]):
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
                log_p = (logits / 0.7).log_softmax(dim=1)
                total = total + sum(log_p[t, token] ** 2 for t, token in enumerate(response))
        else:
            total = token_log_probs(model, rollout.select(torch.tensor([0, 4, 8])), 0.7)[0].pow(2).sum()
        total.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_chunked_log_probs_equal_the_plain_path_in_value_and_gradient(model):
    rollout, results = draw(model), []
    for max_logits in (2**25, 5 * VOCAB, 1):
        model.zero_grad()
        log_probs, entropies = token_log_probs(model, rollout, 0.7, max_logits=max_logits)
        (log_probs * torch.arange(log_probs.shape[1])).sum().backward()
        results.append((log_probs.detach(), entropies, [parameter.grad.clone() for parameter in model.parameters()]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-4)


SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("make", [
    lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=1.5, sliding_window=4)),
    lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.2))], ids=["soft cap", "scaling", "scale"])
def test_models_that_cap_or_scale_their_logits(make):
    torch.manual_seed(0)
    model = scaled(make())
    rollout = draw(model)
    log_probs, _ = token_log_probs(model, rollout, max_logits=5 * VOCAB)
    torch.testing.assert_close(rollout.log_probs, log_probs, atol=1e-5, rtol=0)
    tokens = PROMPTS[1] + rollout.responses()[4]
    assert log_probs[4, 0].item() == pytest.approx(prefix_log_prob(model, tokens, 1), abs=1e-5)


def test_bf16_logits_are_normalised_in_float32(monkeypatch):
    model = qwen2()
    rollout = draw(model)
    N = int(rollout.mask.sum())
    logits = (torch.randn(N, VOCAB, generator=torch.Generator().manual_seed(0)) * 50).bfloat16()  # exp(100) overflows
    monkeypatch.setattr(icpo, "output_logits", lambda *args: logits)
    log_probs, _ = token_log_probs(model, rollout)
    row, t = rollout.mask.nonzero(as_tuple=True)
    targets = torch.tensor([token for response in rollout.responses() for token in response])
    expected = logits.double().log_softmax(dim=1)[torch.arange(N), targets]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs[row, t].double(), expected, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- Update


def settings(**kwargs):
    return Config(**{"lr": 0.0, "micro_batch": 100, "max_grad_norm": 1e9} | kwargs)


class Keep(torch.optim.SGD):
    """An optimizer that keeps the gradients of its first step and changes nothing."""

    def step(self, closure=None):
        self.gradient = getattr(self, "gradient", torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))


def update_gradient(model, rollout, advantages, reference=None, **kwargs):
    optimizer = Keep(model.parameters(), lr=0.0)
    metrics = icpo.update(model, optimizer, rollout, advantages, settings(**kwargs), reference)
    return optimizer.gradient, metrics


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_does_not_depend_on_micro_batches_row_order_or_skipped_rows(model, aggregation):
    rollout = draw(model, group_size=4, max_new_tokens=12)
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    advantages[[2, 5, 6]] = 0
    # The oracle: -sum of A * log-prob over all tokens, weighed by a loop; at ratio 1 its gradient is that of the clipped loss.
    log_probs, total = token_log_probs(model, rollout)[0], 0.0
    lengths = rollout.lengths.tolist()
    for b in range(12):
        weight = 1 / sum(lengths) if aggregation == "token" else 1 / (lengths[b] * 12)
        total = total - advantages[b] * log_probs[b, :lengths[b]].sum() * weight
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    assert len(set(lengths)) > 2
    for size in (1, 2, 5, 100):
        actual, _ = update_gradient(model, rollout, advantages, aggregation=aggregation, micro_batch=size)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    order = torch.randperm(12)
    actual, _ = update_gradient(model, rollout.select(order), advantages[order], aggregation=aggregation, micro_batch=5)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    actual, _ = update_gradient(model, rollout, advantages, aggregation=aggregation, gradient_checkpointing=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_recomputes_layers_and_keeps_the_gradient(model):
    rollout, advantages = draw(model), torch.randn(12)
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
    monkeypatch.setattr(icpo, "policy_loss", lambda new, old, *args, **kwargs: seen.append((new - old).exp()) or policy_loss(new, old, *args, **kwargs))
    model.train()
    config = settings(inner_epochs=2, micro_batch=size, lr=1e-2)
    rollout = draw(model)
    icpo.update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), rollout, torch.randn(12), config)
    first, second = seen[:len(seen) // 2], seen[len(seen) // 2:]
    assert all(ratio.eq(1).all() for ratio in first)
    assert all(ratio.ne(1).any() for ratio in second)


def test_metrics_of_the_update_equal_a_loop_over_all_tokens(model):
    rollout, advantages, reference = draw(model), torch.randn(12), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    config = settings(inner_epochs=2, micro_batch=5, kl_coef=0.1)
    metrics = icpo.update(policy, optimizer, rollout, advantages, config, reference)
    # The second epoch again by hand: first epoch on a copy, then ratios and KL token by token.
    copied = copy.deepcopy(model)
    icpo.update(copied, torch.optim.SGD(copied.parameters(), lr=0.05), rollout, advantages, settings(micro_batch=5, kl_coef=0.1), reference)
    clipped, kl_old, kl_ref, tokens = 0, 0.0, 0.0, 0
    for b, response in enumerate(rollout.responses()):
        for t in range(len(response)):
            place = (PROMPTS[b // 4] + response, len(PROMPTS[b // 4]) + t)
            old, new, ref = (prefix_log_prob(m, *place) for m in (model, copied, reference))
            ratio = math.exp(new - old)
            clipped += ratio > 1.28 if advantages[b] > 0 else ratio < 0.8
            kl_old, kl_ref, tokens = kl_old + ratio - (new - old) - 1, kl_ref + math.exp(ref - new) - (ref - new) - 1, tokens + 1
    assert metrics["ratio/clip_frac"] == pytest.approx(clipped / tokens) and clipped
    assert metrics["kl/old"] == pytest.approx(kl_old / tokens, rel=1e-3)
    assert metrics["kl/ref"] == pytest.approx(kl_ref / tokens, rel=1e-3)


def test_uniform_batches_and_broken_gradients_make_no_step():
    model = qwen2()
    rollout, before = draw(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert icpo.update(model, optimizer, rollout, torch.zeros(12), settings())["grad_norm"] == 0
    metrics = icpo.update(model, optimizer, rollout, torch.full((12,), math.inf), settings())
    assert metrics["update/skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rollout_metrics_equal_loops():
    model = qwen2()
    rollout = draw(model)
    verified = torch.randint(0, 2, (3, 4), generator=torch.Generator().manual_seed(0)).float()
    noisy = torch.tensor([[0, 0.5, 0.5, 1], [1, 1, 1, 1], [0, 0, 0, 1]])  # two at their group's mean, a group of equals, neither
    l = sequence_log_prob(rollout.log_probs, rollout.mask).view(3, 4)
    metrics = icpo.rollout_metrics(rollout, verified, noisy, l, torch.arange(-5.0, 7.0).view(3, 4), 10.0)
    groups = [list(zip(v, c)) for v, c in zip(verified.tolist(), l.tolist())]
    assert metrics["reward/verified"] == pytest.approx(statistics.mean(v for group in groups for v, _ in group))
    assert metrics["reward/mean"] == pytest.approx(statistics.mean(itertools.chain(*noisy.tolist())))
    assert metrics["advantage/abs_mean"] == 3  # of 5, 4, ..., 0, ..., 6
    assert metrics["preference/abs_mean"] == pytest.approx(statistics.mean(abs(s) for row in l.tolist() for s in loop_preference(row, 10.0)))
    assert metrics["reward/std"] == pytest.approx(statistics.mean(statistics.stdev(row) for row in noisy.tolist()))
    for name, value in (("correct", 1), ("wrong", 0)):
        assert metrics[f"confidence/{name}"] == pytest.approx(statistics.mean(c for group in groups for v, c in group if v == value))
    overconfident = [max(group, key=lambda pair: pair[1])[0] == 0 and any(v for v, _ in group) for group in groups]
    assert metrics["confidence/overconfident_frac"] == pytest.approx(statistics.mean(overconfident))
    terms = [a * x for row, c in zip(noisy.tolist(), l.tolist()) for a, x in zip(loop_advantage(row), loop_preference(c, 10.0))]
    assert metrics["preference/agreement"] == pytest.approx(sum(terms) / sum(map(abs, terms)), abs=1e-5)
    assert metrics["groups/uniform_frac"] == pytest.approx(statistics.mean(len(set(row)) == 1 for row in noisy.tolist()))
    every = [rollout.entropies[b, t].item() for b, n in enumerate(rollout.lengths.tolist()) for t in range(n)]
    assert metrics["entropy"] == pytest.approx(statistics.mean(every))
    assert icpo.rollout_metrics(rollout, torch.ones(3, 4), noisy, l, noisy, 10.0)["confidence/wrong"] is None


# --------------------------------------------------------------------------------------------------------- Whole runs


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


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """The built-in task with a shorter apprenticeship to a less sloppy teacher."""
    folder = tmp_path_factory.mktemp("task")
    icpo.write_task(folder / "task", Config(task_warmup_steps=500, task_teacher_error=0.7), torch.device("cpu"))
    return folder / "task"


def own(task, out, *flags):
    return ["--model", task / "model", "--train-data", task / "train.jsonl", "--eval-data", task / "eval.jsonl", "--output-dir", out,
            "--max-new-tokens", 32, "--micro-batch", 128, "--eval-rows", 128, "--eval-samples", 0, "--lr", 2e-4, *flags]


@pytest.mark.parametrize("direction", [1, -1], ids=["learns", "negated advantages un-learn"])
def test_task_learns(task, tmp_path, monkeypatch, direction):
    monkeypatch.setattr(icpo, "icpo_advantage", lambda *args: direction * icpo_advantage(*args))
    assert run(*own(task, tmp_path / "run", "--steps", 12)) == 0
    accuracies = [row["eval/accuracy"] for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "eval/accuracy" in row]
    assert (accuracies[-1] - accuracies[0]) * direction > 0.1, accuracies


def test_resume_repeats_an_unbroken_run_bit_for_bit(task, tmp_path):
    flags = ["--eval-every", 2, "--save-every", 2, "--reward-noise", 0.2, "--prompts-per-step", 4, "--eval-rows", 16]
    assert run(*own(task, tmp_path / "whole", *flags, "--steps", 4)) == 0
    assert run(*own(task, tmp_path / "broken", *flags, "--steps", 2)) == 0
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')  # a step after the checkpoint, as a killed run leaves it
    assert run(*own(task, tmp_path / "broken", *flags, "--steps", 4, "--resume")) == 0
    states = [torch.load(tmp_path / name / "checkpoint" / "state.pt", weights_only=True) for name in ("whole", "broken")]
    for part in ("policy", "optimizer"):
        whole, broken = ([x for x in torch.utils._pytree.tree_leaves(state[part]) if x is not None] for state in states)
        assert len(whole) == len(broken) > 30 and all(map(torch.equal, map(torch.as_tensor, whole), map(torch.as_tensor, broken)))
    for log in ("metrics.jsonl", "samples.jsonl"):
        whole, broken = ([{name: value for name, value in row.items() if not name.startswith(("time/", "tokens_per_s"))}
                          for row in rows_of(tmp_path / run / log)] for run in ("whole", "broken"))
        assert whole == broken


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A saved Qwen2-architecture model with a byte-level BPE tokenizer and a chat template, its weights in bf16."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {character: i for i, character in enumerate(sorted(icpo.ByteLevel.alphabet()))}
    vocabulary |= {"is": 256, "<|endoftext|>": 257}
    tokenizer = icpo.Qwen2Tokenizer(vocab=vocabulary, merges=[("i", "s")])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, max_position_embeddings=256, eos_token_id=257)).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GSM = [{"question": f"What is {n} and {n}?", "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"} for n in range(9)]


def test_own_model_and_data(tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "my_reward.py").write_text("def count(response, reference):\n"
                                           "    assert reference in map(str, range(0, 18, 2)), reference\n"
                                           "    return response.count('e') / 8\n")
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", GSM + [{"question": "x" * 300, "answer": "1"}])
    flags = ["--model", tiny, "--train-data", data, "--eval-data", data, "--prompt-key", "question", "--max-new-tokens", 8,
             "--max-prompt-tokens", 200, "--steps", 2, "--prompts-per-step", 3, "--group-size", 4, "--eval-samples", 2,
             "--reward", "my_reward:count", "--system-prompt", "Be brief.", "--prompt-suffix", " Think.", "--kl-coef", 0.1,
             "--inner-epochs", 2, "--micro-batch", 5, "--shaping", "reward", "--alpha", 0.3, "--output-dir", tmp_path / "run"]
    assert run(*flags) == 0
    assert "skipped 1 prompts" in capfd.readouterr().out
    metrics, samples = rows_of(tmp_path / "run" / "metrics.jsonl"), rows_of(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2] and len(samples) == 2 * 4
    assert set(metrics[2]) == {
        "step", "reward/mean", "reward/verified", "reward/std", "reward/errors", "groups/uniform_frac", "advantage/abs_mean",
        "preference/abs_mean", "preference/agreement", "confidence/correct", "confidence/wrong", "confidence/overconfident_frac", "entropy", "length/mean",
        "length/truncated_frac", "ratio/clip_frac", "kl/old", "kl/ref", "loss", "grad_norm", "update/skipped", "lr", "alpha",
        "time/sample", "time/score", "time/update", "tokens_per_s", "eval/accuracy", "eval/mean_at_k", "eval/pass_at_k"}
    assert all(f"`{name}`" in README for name in set(metrics[2]) - {"step"})
    assert metrics[2]["reward/errors"] == 0 and metrics[2]["lr"] == pytest.approx(1e-6 * 2 / 5)
    assert {sample["reference"] for sample in samples} <= {str(n) for n in range(0, 18, 2)}
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"), AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert policy.dtype == torch.float32 and tokenizer("this").input_ids[-1] == 256
    # float32 masters: two steps of at most 4e-7 would be lost in the checkpoint's bf16, and yet most weights moved
    old = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    moved = torch.cat([(value != old[name]).flatten() for name, value in policy.state_dict().items() if "layers" in name])
    assert moved.float().mean() > 0.5


def test_prompts_go_through_the_chat_template_and_tokens(tiny, tmp_path):
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), torch.device("cpu"))
    assert eos_ids == [257] and model.dtype == torch.float32
    data = str(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "2+2 is 4", "answer": "\\boxed{4}"}]))
    config = Config(system_prompt="S", prompt_suffix="!")
    example, = icpo.load_examples(data, tokenizer, config)
    assert tokenizer.decode(example.ids) == "[system]S[user]2+2 is 4![assistant]" and example.reference == "4"
    example, = icpo.load_examples(data, tokenizer, Config(prompt_suffix="!", no_chat_template=True))
    assert tokenizer.decode(example.ids) == "2+2 is 4!" and 256 in example.ids


def test_every_example_once_an_epoch():
    taken = [i for step in range(1, 13) for i in icpo.batch_indices(10, step, 5, seed=0)]
    epochs = [taken[start:start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6


def test_failing_rewards_score_zero_are_counted_and_shown_once(capfd):
    def reward(response, reference):
        return {"a": 1.0, "b": math.nan, "c": "no number"}[response]

    for _ in range(2):
        rewards, failed = icpo.score_responses(reward, ["a", "b", "c", "d", "a"], ["r"] * 5)
        assert rewards.tolist() == [1, 0, 0, 0, 1] and failed == 3
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == 1 and "no number" in shown


def test_alpha_falls_and_noise_flips(tiny, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", GSM)
    assert run("--model", tiny, "--train-data", data, "--prompt-key", "question", "--max-new-tokens", 4, "--steps", 3, "--alpha", 0.4,
               "--alpha-end", 0, "--reward-noise", 1, "--output-dir", tmp_path / "run") == 0
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [row["alpha"] for row in rows] == pytest.approx([0.4, 0.2, 0.0])
    assert all(row["reward/mean"] == 1 - row["reward/verified"] for row in rows)


BAD = [
    (["--group-size", 1], "--group-size 1: must be at least 2"), (["--alpha", 0.5, "--shaping", "reward"], "below 1/2 in form reward"),
    (["--alpha", 1], "below 1 in form gated"), (["--alpha", -0.1], "at least 0"), (["--alpha-end", 2], "--alpha-end 2.0"),
    (["--steps", 0], "--steps 0"), (["--beta", 0], "--beta"), (["--lr", "nan"], "--lr nan: must be above 0"), (["--kl-coef", -1], "--kl-coef"),
    (["--reward-noise", 2], "from 0 to 1"), (["--temperature", 0], "--temperature"), (["--seed", -1], "--seed -1"), (["--resume"], "no checkpoint in"),
    (["--reward", "nowhere:f"], "No module named 'nowhere'"), (["--reward", "verify:nothing"], "nothing"), (["--reward", "bad:f"], "SyntaxError"),
    (["--reward", "verify:MAX_BITS"], "not a function"), (["--device", "cuda:99"], "no such device"), (["--device", "gpu"], "no such device"),
    (["--model", "no/such/dir"], "no/such/dir"), (["--train-data", "absent.jsonl"], "absent.jsonl: No such file"), (["--train-data", "."], "Is a directory"),
    (["--train-data", "broken.jsonl"], "broken.jsonl, line 3: not JSON"), (["--train-data", "keys.jsonl"], "line 2: no 'answer' among the keys ['prompt', 'reply']"),
    (["--train-data", "list.jsonl"], "line 1: no 'prompt'"), (["--train-data", "number.jsonl"], "'prompt' is not a string"),
    (["--train-data", "empty.jsonl"], "no usable row"), (["--train-data", "latin.jsonl"], "utf-8"), (["--max-prompt-tokens", 1], "no usable row"),
    (["--output-dir", "good.jsonl/run"], "cannot be written: Not a directory"), (["--max-new-tokens", 500], "context"), (["--output-dir", "."], "not empty"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(map(str, flags)) for flags, _ in BAD])
def test_bad_input_gets_one_line_and_writes_nothing(tiny, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "1+1=", "answer": "2"}
    for name, text in {"good": json.dumps(good), "broken": f"{json.dumps(good)}\n\n{{oops\n", "empty": "\n",
                       "keys": f'{json.dumps(good)}\r\n{{"prompt": "1", "reply": "1"}}', "list": "[1]", "number": '{"prompt": 1, "answer": 1}'}.items():
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" * (name == "good") + text, encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(good).encode() + b"\n\xe9")
    (tmp_path / "bad.py").write_text("def f(")
    before = sorted(tmp_path.rglob("*"))
    assert message in error_of(capfd, "--model", tiny, "--train-data", "good.jsonl", "--max-new-tokens", 8, *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_names_what_differs_and_a_full_folder_is_refused(tiny, tmp_path, capfd):
    data = write_jsonl(tmp_path / "data.jsonl", GSM)
    flags = ["--model", tiny, "--train-data", data, "--prompt-key", "question", "--max-new-tokens", 4, "--steps", 1, "--output-dir", tmp_path / "run"]
    assert run(*flags) == 0
    assert run(*flags) == 2 and "is not empty" in capfd.readouterr().err
    assert run(*flags, "--resume", "--beta", 3, "--steps", 2) == 2
    assert "--beta 3.0 (was 10.0)" in capfd.readouterr().err


def test_help_names_every_flag_and_unknown_ones_are_refused(capsys):
    shown = subprocess.run([sys.executable, icpo.__file__, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and all(f"--{name.replace('_', '-')}" in shown.stdout for name in Config.__dataclass_fields__)
    with pytest.raises(SystemExit) as stop:
        run("--alhpa", 1)
    assert stop.value.code == 2 and capsys.readouterr().err.strip().endswith("unrecognized arguments: --alhpa 1")

# --------------------------------------------------------------------------------------------------------------- Faults


def short_run(task, out, *flags):
    return list(map(str, own(task, out, "--prompts-per-step", 4, "--group-size", 4, "--eval-rows", 4, "--steps", 12, "--save-every", 1, *flags)))


def result_of(out):
    """The checkpoint, and the logs without their times."""
    state = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    logs = [[{name: value for name, value in row.items() if not name.startswith(("time/", "tokens_per_s"))} for row in rows_of(out / log)]
            for log in ("metrics.jsonl", "samples.jsonl")]
    return state["step"], [x.tolist() for x in state["policy"].values()], logs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_and_go_on(task, tmp_path, number):
    process = subprocess.Popen([sys.executable, icpo.__file__, *short_run(task, tmp_path / "run", "--save-every", 100)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(rows_of(log)) > 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in shown and "Traceback" not in shown, shown
    step = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert 2 <= step == len(rows_of(log)) - 1 < 12  # the step in hand was finished, and kept
    assert run(*short_run(task, tmp_path / "run", "--resume")) == 0
    assert run(*short_run(task, tmp_path / "whole")) == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes half a minute; SLOW=1 python -m pytest runs it")
def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(task, tmp_path):
    context, out = multiprocessing.get_context("forkserver"), tmp_path / "run"
    context.set_forkserver_preload(["icpo"])  # which saves each process the seconds that it takes to import torch

    def process(out, *flags):
        process = context.Process(target=icpo.main, args=(short_run(task, out, *flags),))
        process.start()
        return process

    for _ in range(2):  # the first time the server still imports torch
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        begin = time.perf_counter()
        process(tmp_path / "whole").join()
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
            ended += 1
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
    assert "cannot be written" in error and "make room" in error
    assert run(*short_run(task, tmp_path / "run", *flags)) == 0
    assert run(*short_run(task, tmp_path / "whole", *flags[1:])) == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_a_disk_too_small_for_the_model_of_the_task_is_one_line(tmp_path, capfd):
    with files_of_at_most(500_000):  # the sums fit in, 0.3M parameters do not
        assert "model cannot be written" in error_of(capfd, "--task-warmup-steps", 1, "--output-dir", tmp_path / "run")


def test_the_task_in_a_folder_that_cannot_be_made_is_one_line(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in error_of(capfd, "--output-dir", tmp_path / "file" / "run")


def test_a_reward_that_raises_at_every_third_call(task, tmp_path, monkeypatch, capfd):
    (tmp_path / "thirds.py").write_text("n = 0\ndef reward(response, reference):\n    global n\n    n += 1\n    return 1 / (n % 3)\n")
    monkeypatch.chdir(tmp_path)
    assert run(*short_run(task, "run", "--reward", "thirds:reward", "--steps", 3, "--eval-every", 100)) == 0
    assert sum(row["reward/errors"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")[1:]) == 3 * 16 // 3
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1


def test_truncation_is_told_once(task, tmp_path, capfd):
    assert run(*short_run(task, tmp_path / "run", "--max-new-tokens", 5, "--steps", 3)) == 0
    assert capfd.readouterr().err.count("were cut at --max-new-tokens 5") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_one_line(task, tmp_path, capfd, name):
    shutil.copytree(task / "model", tmp_path / "model")
    content = (tmp_path / "model" / name).read_bytes()
    (tmp_path / "model" / name).write_bytes(content[:len(content) // 2])
    error = error_of(capfd, "--model", tmp_path / "model", "--train-data", task / "train.jsonl", "--output-dir", tmp_path / "run")
    assert "--model" in error and not (tmp_path / "run").exists()


def test_a_model_in_which_nothing_ends_a_response_is_one_line(task, tmp_path, capfd):
    shutil.copytree(task / "model", tmp_path / "model")
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        settings = json.loads((tmp_path / "model" / name).read_text())
        (tmp_path / "model" / name).write_text(json.dumps(settings | dict.fromkeys(("eos_token", "eos_token_id"))))
    error = error_of(capfd, "--model", tmp_path / "model", "--train-data", task / "train.jsonl", "--output-dir", tmp_path / "run")
    assert "no eos token" in error and not (tmp_path / "run").exists()


def test_out_of_memory_names_the_flags(task, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(icpo, "update", lambda *args: torch.empty(2**50))
    assert run(*short_run(task, tmp_path / "run")) == 2
    assert "lower --micro-batch" in capfd.readouterr().err


# -------------------------------------------------------------------------- README, and examples where their engine is there


def test_tables_are_those_of_the_logs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    import benchmark
    import study
    assert benchmark.table(json.loads((ROOT / "results" / "benchmark.json").read_text())) in README
    rows, tuned = (sorted(rows_of(ROOT / "results" / log), key=lambda row: list(study.TUNING).index(row["method"]))
                   for log in ("study.jsonl", "tuning.jsonl"))
    for table in (study.differences(rows, study.CLAIMS), study.levels(rows, "sampled accuracy"), study.differences(tuned, {"area": 1})):
        assert table in README
    ends = [rows_of(ROOT / "results" / "first_run" / f"seed-{seed}.jsonl")[-1]["eval/accuracy"] for seed in range(4)]
    assert f"seeds 0 to 3: {', '.join(f'{end:.3f}' for end in ends)} " in README
    areas = {(row["method"], row["seed"]): statistics.fmean(row["verified"]) for row in rows
             if (row["regime"], row["noise"]) == ("overconfident 98 %", 0.2)}
    gaps = [areas["ICPO gated", seed] - areas["GRPO", seed] for seed in range(16)]
    half = 2.131 * statistics.stdev(gaps) / math.sqrt(16)  # Student's t for 15 degrees of freedom
    assert f"✓ {statistics.fmean(gaps):+.3f} ± {half:.3f}" in README and statistics.fmean(gaps) > half


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_blocks_of_the_readme(block):
    for module in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(module)
    names = {}
    exec(block, names)
    if "strict" in names:
        assert names["strict"]("so \\boxed{5}", "5") and not names["strict"]("so 5", "5")
    elif "queries" in block:
        assert names["reward_func"](["1+1= 2", "1+1= 3"], ["1+1="] * 2, ["2"] * 2)["rewards"].tolist() == [1, 0]
    else:
        assert "trainer" in names or names["advantages"].shape == (32,)


@pytest.mark.parametrize("alpha, shaping, iterations", [(0.0, "gated", 1), (0.9, "gated", 1), (0.4, "reward", 2)])
def test_trl_agrees_on_advantages_loss_and_gradient(tiny, tmp_path, alpha, shaping, iterations):
    """One update of 16 rows in two micro-batches. With 2 iterations TRL computes old log-probs, with 1 it does not."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from examples.trl_icpo import ICPOTrainer
    losses, gradients = [], []

    class Kept(ICPOTrainer):
        def _generate_and_score_completions(self, inputs):
            self.kept = super()._generate_and_score_completions(inputs)
            return self.kept

        def _compute_loss(self, model, inputs):
            losses.append(super()._compute_loss(model, inputs))
            return losses[-1]

        def create_optimizer(self):
            self.optimizer = Keep(self.model.parameters(), lr=0.0)
            return self.optimizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    policy = copy.deepcopy(model)
    trainer = Kept(model, lambda completion_ids, **kwargs: [float(sum(ids) % 3) for ids in completion_ids], trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4, max_completion_length=8, max_steps=1,
        num_iterations=iterations, epsilon_high=0.28, max_grad_norm=0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True), datasets.Dataset.from_dict({"prompt": [f"{i} + 1{'0' * (i % 3)} is" for i in range(16)]}),
        processing_class=AutoTokenizer.from_pretrained(tiny, padding_side="left"), icpo=dict(alpha=alpha, beta=10.0, shaping=shaping))
    trainer.train()
    kept = trainer.kept
    assert ("old_per_token_logps" in kept) == (iterations == 2)
    prompts, responses = ([row[real.bool()] for row, real in zip(kept[f"{part}_ids"], kept[f"{part}_mask"])] for part in ("prompt", "completion"))
    prompt_lengths, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, responses))
    ids = torch.nn.utils.rnn.pad_sequence([torch.cat(pair) for pair in zip(prompts, responses)], batch_first=True)
    rollout = Rollout(ids, prompt_lengths, lengths, lengths < 0, *torch.zeros(2, 16, int(lengths.max())))
    rewards = torch.tensor([float(row.sum() % 3) for row in responses]).view(4, 4)
    with torch.no_grad():
        l = sequence_log_prob(token_log_probs(policy, rollout)[0], rollout.mask).view(4, 4)
    advantages = icpo_advantage(rewards, l, alpha, 10.0, shaping)
    assert (advantages != 0).any()
    torch.testing.assert_close(kept["advantages"].view(4, 4), advantages, atol=1e-6, rtol=0)
    if alpha == 0:  # TRL is the oracle, but for the 1e-4 that it adds to the std
        std = rewards.std(dim=1, keepdim=True)
        own = torch.tensor(list(trainer._logs["advantages"])).view(4, 4)
        torch.testing.assert_close(own * (std + 1e-4) / std.clamp(min=1e-9), advantages, atol=1e-6, rtol=0)
    gradient, metrics = update_gradient(policy, rollout, kept["advantages"], micro_batch=5)
    assert sum(losses).item() == pytest.approx(metrics["loss"], abs=1e-5)
    assert (trainer.optimizer.optimizer.gradient - gradient).norm() < 1e-4 * gradient.norm()


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


@pytest.mark.parametrize("processes", [1, 2])
def test_trl_example_in_one_and_two_processes_gives_the_advantages_of_one(task, tmp_path, processes):
    """Nine groups of four responses: with two processes of 18 rows, the fifth group lies in both."""
    pytest.importorskip("trl")
    (tmp_path / "keeping.py").write_text(KEEPING)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend",
              "no", "--multi_gpu", "--main_process_port", 0] if processes > 1 else []
    command = [sys.executable, *launch, tmp_path / "keeping.py", "--model", task / "model", "--data", task / "train.jsonl", "--output_dir", tmp_path,
               "--per_device_train_batch_size", 36 // processes, "--num_generations", 4, "--max_completion_length", 32, "--max_steps", 2,
               "--logging_steps", 1, "--learning_rate", 1e-3, "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples"), "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.returncode == 0 and "icpo/preference_abs_mean" in shown.stdout, shown.stderr[-3000:]
    model, tokenizer, _ = icpo.load_model(str(task / "model"), torch.device("cpu"))
    rows = []
    for output in (torch.load(tmp_path / f"0-{rank}.pt") for rank in range(processes)):
        rows += zip(*(output[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")))
    rewards, l = [], []
    for prompt, real, completion, kept, _ in rows:
        prompt, completion = prompt[real.bool()], completion[kept.bool()]
        a, b = re.fullmatch(r"(\d+)\+(\d+)=", tokenizer.decode(prompt)).groups()
        rewards.append(float(verify(tokenizer.decode(completion, skip_special_tokens=True), int(a) + int(b))))
        tokens = torch.cat([prompt, completion]).tolist()
        l.append(statistics.mean(prefix_log_prob(model, tokens, t) for t in range(len(prompt), len(tokens))))
    expected = icpo_advantage(torch.tensor(rewards).view(9, 4), torch.tensor(l).view(9, 4), 0.9, 10.0)
    assert len(rows) == 36 and (expected != 0).any()
    torch.testing.assert_close(torch.stack([row[-1] for row in rows]).view(9, 4), expected, atol=1e-4, rtol=0)


VERL = """
import numpy, tensordict, torch
from verl import DataProto
from verl.trainer.ppo.v1 import utils
from icpo import icpo_advantage, sequence_log_prob
torch.manual_seed(0)
mask, old = torch.arange(5) < torch.randint(1, 6, (12, 1)), -torch.rand(12, 5)
rewards = torch.randint(0, 2, (12, 1)) * torch.eye(5)[mask.sum(dim=1) - 1]
uid = numpy.array(list("abcbcaacbacb"), dtype=object)
data = DataProto.from_dict({"response_mask": mask.long(), "old_log_probs": old, "token_level_rewards": rewards}, {"uid": uid})
data = utils.compute_advantage(data, "icpo", config={"icpo": {"alpha": 0.5}})
rows = torch.tensor([[i for i in range(12) if uid[i] == group] for group in "abc"])
l = sequence_log_prob(old, mask)
expected = torch.zeros(12)
expected[rows.flatten()] = icpo_advantage(rewards.sum(dim=1)[rows], l[rows], 0.5, 10.0).flatten()
torch.testing.assert_close(data.batch["advantages"], expected[:, None] * mask)
assert (expected != 0).any()
"""


def test_verl_example_in_verls_own_compute_advantage(tmp_path):
    pytest.importorskip("verl")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "VERL_USE_EXTERNAL_MODULES": "verl_icpo"}
    shown = subprocess.run([sys.executable, "-c", VERL], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr[-3000:]


# ----------------------------------------------------------------------------------------------------------- Verifier


EXTRACTED = r"""
markers   so \boxed{42} ~ 42 ;; \boxed{\frac{1}{2}} done ~ \frac{1}{2} ;; \boxed{1} then \boxed{2} ~ 2 ;; \fbox{3} ~ 3
markers   \boxed {4} ~ 4 ;; \boxed{\boxed{5}} ~ 5 ;; \boxed{\{1, 2\}} ~ \{1, 2\}
markers   \boxed{\left\{ x \right.} ~ \left\{ x \right. ;; \boxed 5 ~ 5 ;; $\boxed 7$. ~ 7 ;; \fbox B ~ B
markers   \boxed\pi⏎ ~ \pi ;; <answer> 7 </answer> ~ 7 ;; <answer>\boxed{8}</answer> ~ 8 ;; <answer>⏎#### 9</answer> ~ 9
markers   \boxed{1} <answer>2</answer> ~ 2 ;; \boxed{1}⏎#### 5 ~ 5 ;; #### 5⏎\boxed{1} ~ 1
markers   work⏎#### -1,200 ⏎bye ~ -1,200 ;; #### $18 ~ $18 ;; #### 18 dollars ~ 18 dollars ;; #### 12 apples ~ 12 apples
markers   #### Summary⏎#### 12 ~ 12 ;; #### 12⏎#### Summary ~ 12 ;; #### 12⏎#### 3. Check the result ~ 12
markers   ##### 5 apples and 6 ~ 6 ;; \boxed{9} <think>\boxed{1}</think> \boxed{2} ~ 2
markers   </think> a \boxed{1} </think> \boxed{2} ~ 2
phrases   The answer is 12. Bye ~ 12 ;; Answer: x ~ x ;; The final answer is: **3.5**. ~ 3.5 ;; Answer:⏎⏎42⏎bye ~ 42
phrases   **Answer:** (B) ~ (B) ;; the answer is 1 or 2 ~ 1 or 2 ;; the answer is 7, the answer is 8. ~ 8
phrases   The answer is 12 because 3 * 4 = 12. ~ 12 ;; The answer is **12**, since 3 * 4 is ~ 12
phrases   The answer is A as 7 is prime ~ A ;; the answer is 4 so that 5 is not ~ 4
phrases   the answer is 5 as well as 6 ~ 5 as well ;; the answer is basic ~ basic ;; the answer is 4 so what ~ 4 so what
phrases   first 3 then 4/5 ~ 4/5 ;; costs -7 in all ~ -7 ;; 10-7 ~ 7 ;; 1,234.5% more ~ 1,234.5%
phrases   it is 3, and 4, ok ~ 4
nothing   <think>\boxed{1}</think> no ~ None ;; B ~ None ;; nothing here ~ None ;; \boxed{1} \boxed 12 ~ None
nothing   \boxed 7.5 ~ None ;; \boxed 7/8 ~ None ;; \boxed 7, 8 ~ None ;; \boxed -7 ~ None ;; \boxedx 5 ~ None
nothing   \boxed{1} \boxed{} ~ None ;; \boxed{1} \boxed{2 ~ None ;; #### 4⏎<answer>5 ~ None
nothing   \boxed{3} <answer></answer> ~ None ;; the answer is 4 \boxed{ ~ None
"""


def pairs(table):
    for line in table.strip().splitlines():
        category, cases = line.split(None, 1)
        for case in cases.split(" ;; "):
            a, b = case.strip().replace("⍽", "\u00a0").replace("⏎", "\n").rsplit(" ~ ", 1)
            yield pytest.param(a, b, id=f"{category}: {case.strip()}")


@pytest.mark.parametrize("response, answer", [*pairs(EXTRACTED)])
def test_extraction(response, answer):
    assert str(extract_answer(response)) == answer


def test_strict_extraction_stops_before_letter_phrase_and_number():
    assert extract_answer("The answer is 12", strict=True) is None and extract_answer("it is 12", strict=True) is None
    assert extract_answer("B", strict=True, letter=True) is None and extract_answer("#### 12", strict=True) == "12"
    assert extract_answer("") is None and extract_answer("x" * 1000 + " 5 " + "y" * 1000) == "5"


EQUAL = r"""
decimals  18 ~ 18.0 ;; +18 ~ 18 ;; 18. ~ 18 ;; 007 ~ 7 ;; -0 ~ 0 ;; 72057594037927937 ~ 72057594037927937.0 ;; −4 ~ -4
decimals  ２１ ~ 21 ;; --5 ~ 5 ;; .5 ~ 0.50 ;; 1.250 ~ 1.25 ;; 0.1 ~ 1/10 ;; -.75 ~ -0.75
decimals  3.0000000000000000000001 ~ 3.00000000000000000000010 ;; 1,234,567 ~ 1234567 ;; 1,234.50 ~ 1234.5
decimals  1{,}000 ~ 1000 ;; $1,000 ~ 1000 ;; -3,000 ~ -3000 ;; 10\,000 ~ 10000 ;; 12\,500 ~ 12500 ;; 12\!500 ~ 12500
decimals  12⍽500 ~ 12500 ;; 1\,234\,567.5 ~ 1234567.5 ;; (1\,234, 5) ~ (1234, 5)
fractions -3/4 ~ \frac{-3}{4} ;; -\frac{3}{4} ~ -0.75 ;; \dfrac{3}{4} ~ 6/8 ;; \tfrac12 ~ 0.5 ;; \frac{3}{-4} ~ -3/4
fractions \frac{1}{2}/2 ~ 1/4 ;; \frac 3 4 ~ 3/4 ;; ½ ~ 0.5 ;; 3⁄4 ~ 0.75 ;; 1 3/4 ~ 7/4 ;; -1\frac{3}{4} ~ -1.75
fractions 1\frac34 ~ 1.75 ;; 2½ ~ 5/2 ;; 1 \frac{1}{2} ~ 3/2
powers    1.5e3 ~ 1500 ;; 1.5 \times 10^3 ~ 1500 ;; 1.5×10^{3} ~ 1.5E3 ;; 5·10⁻² ~ 0.05 ;; 2*10^-3 ~ 0.002
powers    1e-3 ~ 0.001 ;; 10²³ ~ 10^{23} ;; 2^{10} ~ 1024 ;; 2^-1 ~ 0.5 ;; (-2)^2 ~ 4 ;; -2^2 ~ -4 ;; 4^{1/2} ~ 2
powers    8^{\frac{1}{3}} ~ 2 ;; 2² ~ 4 ;; 2^56+1 ~ 72057594037927937 ;; 0^2 ~ 0 ;; 2(3) ~ 6 ;; (2)(3) ~ 6
powers    2 \cdot 3 ~ 6 ;; 12 \div 4 ~ 3 ;; (1+2)*3 ~ 9 ;; 2^3 \cdot 5 ~ 40
roots     2\sqrt{3} ~ \sqrt{12} ;; \frac{1}{\sqrt{2}} ~ \frac{\sqrt2}{2} ;; √12 ~ 2√3 ;; \sqrt{20402} ~ 101\sqrt{2}
roots     \sqrt[3]{8} ~ 2 ;; \sqrt{9/4} ~ 1.5 ;; \sqrt{2}\sqrt{8} ~ 4 ;; sqrt(2)/2 ~ \frac{\sqrt{2}}{2}
roots     \frac{1}{1+\sqrt2} ~ \sqrt2-1 ;; \sqrt{0} ~ 0 ;; 1+\sqrt2 ~ \sqrt{2} + 1 ;; (\sqrt2)^4 ~ 4 ;; (2\sqrt3)^2 ~ 12
roots     (2\sqrt3)^{-1} ~ \sqrt3/6 ;; (1+\sqrt2)^2 ~ 3+2\sqrt2 ;; \sqrt[3]{\frac{8}{27}} ~ 2/3
roots     \frac{1}{\sqrt3-\sqrt2} ~ \sqrt3+\sqrt2 ;; 3\pi ~ \pi * 3 ;; \frac{\pi}{2} ~ 0.5\pi ;; 2π ~ 2\pi
roots     \pi^2/\pi ~ \pi ;; \frac{3}{4}\pi ~ \frac{3\pi}{4} ;; 2pi ~ 2\pi
units     50% ~ 1/2 ;; 50\% ~ 50 ;; 50 percent ~ 50% ;; 12.5% ~ 0.125 ;; 5％ ~ 5% ;; 5 cm ~ 5 ;; 5 cm ~ 5 centimeters
units     5\text{ cm}^2 ~ 5 square cm ;; 90^\circ ~ 90 ;; 90° ~ 90 degrees ;; 5 \text{ m/s} ~ 5 ;; 3 hours ~ 3 h
units     5cm ~ 5 \mathrm{cm} ;; $5 ~ 5 ;; -$5 ~ -5 ;; $-5 ~ -5 ;; 5 dollars ~ $5 ;; €7 ~ 7 euros ;; \$1,000 ~ 1000
units     10 USD ~ $10 ;; £3.50 ~ 3.5 pounds
wrappers  \text{Paris} ~ paris ;; $\frac{1}{2}$ ~ 0.5 ;; \(7\) ~ 7 ;; \[7\] ~ 7 ;; $$7$$ ~ 7 ;; **12** ~ 12
wrappers  \boxed{7} ~ 7 ;; `7` ~ 7 ;; \left(1,2\right) ~ (1,2) ;; {7} ~ 7 ;; (7) ~ 7 ;; \displaystyle\frac12 ~ 1/2
wrappers  \boldsymbol{\frac{2}{7}} ~ 2/7 ;; \mathbf{\sqrt{2}} ~ \sqrt2 ;; \mathbf{\frac{\sqrt{3}}{2}} ~ \frac{\sqrt3}{2}
wrappers  \boldsymbol{\text{Paris}} ~ Paris
names     x = 5 ~ 5 ;; x=5 ~ x = 5.0 ;; x_1 = 3 ~ 3 ;; f(x) = 2 ~ 2 ;; \theta = \pi ~ \pi ;; x \in [0,1] ~ [0, 1]
names     x∈[0,1] ~ x \in [0,1] ;; g(2) = 9 ~ 9 ;; f(-1)=3 ~ 3 ;; P(A) = \frac12 ~ 0.5 ;; f(\frac{1}{2}) = 3 ~ 3
names     a_{1} = 3 ~ a_1 = 3 ;; 2 \cdot 8 = 16 ~ 16 ;; \frac12 = 0.5 = 50\% ~ 1/2 ;; x = 2 \cdot 8 = 16 ~ x = 16
names     2(500) = 1,000 ~ 1000 ;; 3 * 4 cm = 12 cm ~ 12 ;; 1 + 1 = 2, 5 ~ 2, 5
tuples    (1,2) ~ (1, 2.0) ;; (\frac12, -1) ~ (0.5, -1) ;; (1,2,3) ~ ( 1 , 2 , 3 ) ;; （1，2） ~ (1,2) ;; [0,1) ~ [0, 1)
tuples    (-\infty, 3] ~ (-∞,3] ;; (2, +\infty) ~ (2,\infty) ;; (1,2)\cup(3,4) ~ (3,4) \cup (1,2)
tuples    (0,1)∪[2,3] ~ [2,3]\cup(0,1) ;; [\frac{1}{2}, 2] ~ [0.5, 2]
sets      \{1,2\} ~ \{2, 1\} ;; {1, 2} ~ \{2,1\} ;; \{\frac12\} ~ \{0.5\} ;; \{(1,2),(3,4)\} ~ \{(3,4),(1,2)\}
sets      \{a, b\} ~ \{b,a\} ;; 1, 2 ~ 2,1 ;; 1 or 2 ~ 2 and 1 ;; 1, 2, and 3 ~ 3,2,1 ;; x=1 or x=2 ~ 1, 2
sets      1,000, 5 ~ 5, 1000 ;; 2 \pm 1 ~ 1, 3 ;; \pm 3 ~ -3, 3 ;; 1 ± √2 ~ 1+\sqrt2, 1-\sqrt2
text      \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ~ \begin{pmatrix}1&2\\3&4\end{pmatrix} ;; new york ~ New  York.
text      yes ~ Yes ;; x^2 + 1 ~ x^2+1 ;; \text{(red, blue)} ~ (red,blue) ;; 10:30 ~ 10:30 ;; \sqrt{-1} ~ \sqrt{ -1 }
text      1/0 ~ 1/0 ;; 5 apples ~ 5 Apples ;; y^{3} ~ y^3 ;; a_{1} ~ a_1 ;; x^{2}y + 1 ~ x^2y+1 ;; x^{n} ~ x^n
text      2x^{ 3 } ~ 2x^3 ;; x \leq 5 ~ x \le 5 ;; x \geq 5 ~ x ≥ 5 ;; x \neq 1 ~ x \ne 1 ;; x≤5 ~ x \leq 5
text      \tfrac{x}{2} ~ \dfrac{x}{2} ;; \frac x2 ~ \dfrac x2 ;; \lbrace 1, 2 \rbrace ~ \{1, 2\}
text      \frac12x ~ \frac{1}{2}x
"""

UNEQUAL = r"""
decimals  18 ~ 19 ;; -5 ~ 5 ;; 100001 ~ 100000 ;; 72057594037927937 ~ 72057594037927936 ;; 12 ~ 1 2 ;; 5 ~ five
decimals  11 ~ 1 ;; 5- ~ 5 ;; 0.333 ~ 1/3 ;; 3.14 ~ 3.1400001 ;; 0.1 ~ 0.10000000000000000001 ;; 1.2.3 ~ 1.2 ;; 2.5 ~ 25
decimals  0.5 ~ .05 ;; 12,34 ~ 1234 ;; 1,2345 ~ 12345 ;; 1,234 ~ 1.234 ;; 1,000 ~ 1 ;; 1,00 ~ 100 ;; 1,234,5 ~ 12345
decimals  10 000 ~ 10000 ;; 10\,000 ~ 10 000 ;; 12\,34 ~ 1234 ;; 1\,2345 ~ 12345 ;; 1\,234\,5 ~ 12345
decimals  1\,125/128 ~ 1125/128 ;; 5.123\,456 ~ 5.123456 ;; 12 500 ~ 12, 500
fractions 1/2 ~ 2 ;; 3/4 ~ 4/3 ;; 1/0 ~ 0 ;; \frac{1}{2} ~ 12 ;; \frac{1}{0} ~ 1 ;; 1/2/2 ~ 1 ;; \frac{1}{2 ~ 1/2
fractions \frac12 ~ \frac{1}{20} ;; 1 3/4 ~ 13/4 ;; 1 3/4 ~ 3/4 ;; -1 3/4 ~ -1/4 ;; 1\frac34 ~ 3/4 ;; 1 2 3 ~ 12 3
powers    1e9 ~ 1 ;; 1.5e3 ~ 1.5 ;; 2 \times 10^3 ~ 20^3 ;; 1e-3 ~ 1000 ;; 10^3 ~ 103 ;; 10^{23} ~ 10^{2}3 ;; 2^3 ~ 23
powers    2^3 ~ 6 ;; (-2)^2 ~ -4 ;; 2^56 ~ 2^56+1 ;; 10^{10^{10}} ~ 1 ;; 9^{9^9} ~ 9^{9^{8}} ;; 0^0 ~ 1
powers    2^{0.5} ~ 1.41421356
roots     \sqrt2 ~ 1.414 ;; \sqrt{3} ~ 3 ;; \sqrt{2}+\sqrt{3} ~ \sqrt{5} ;; 2\sqrt{3} ~ 3\sqrt{2} ;; \sqrt{-1} ~ 1
roots     \sqrt[3]{2} ~ \sqrt{2} ;; \sqrt{4} ~ -2 ;; \sqrt{12} ~ \sqrt1 2 ;; \frac{1}{\sqrt3-\sqrt2} ~ \sqrt3-\sqrt2
roots     \sqrt[3]{4} ~ 2 ;; \pi ~ 3.14 ;; \pi ~ 22/7 ;; 2\pi ~ \pi^2 ;; 3\pi ~ 3 ;; \frac{\pi}{2} ~ 2\pi ;; pie ~ \pi
units     50% ~ 5 ;; 0.5% ~ 50% ;; 50% ~ 500 ;; 12% ~ 0.012 ;; 5 cm ~ 5 m ;; 5 kg ~ 5 g ;; 5 cm ~ 5 cm^2 ;; 5m ~ 5
units     500 cm ~ 5 m ;; 90° ~ 90 km ;; 5 hours ~ 5 minutes ;; 5 m or 6 m ~ 5 ;; $5 ~ €5 ;; $5 ~ 5 cents ;; $5-$10 ~ 5
units     $5 ~ $50 ;; $ ~ 0
wrappers  \text{Paris} ~ rome ;; 15 \text{ or } 16 ~ 15 ;; \boxed{7} ~ 8 ;; \boxed{} ~ 0 ;; \boxed{7 ~ 7
wrappers  \boldsymbol{\frac{2}{7}} ~ 7/2 ;; \mathbf{\sqrt{2}} ~ 2 ;; \boldsymbol{\frac{2}{7} ~ 2/7
names     x = 5 ~ y = 5 ;; x = 5 ~ x = 6 ;; x = y = 5 ~ 5 ;; x_1 = 3 ~ x_2 = 3 ;; x > 5 ~ 5 ;; x \ne 5 ~ 5
names     g(2) = 9 ~ f(2) = 9 ;; f(2) = 9 ~ f(3) = 9 ;; g(2) = 9 ~ 2 ;; x(x+1) = 6 ~ 6 ;; f(2) + 1 = 9 ~ 9
names     \sqrt(4) = 5 ~ 5 ;; \pi = 3 ~ 3 ;; X = 5 ~ x = 5 ;; a_{12} = 3 ~ a_12 = 3 ;; 2 \cdot 8 = 15 ~ 15
names     2 \cdot 8 = 16 ~ 8 ;; 16 = 2 \cdot 7 = 14 ~ 14 ;; 1/3 = 0.333 ~ 0.333 ;; x = 3 = 4 ~ 4 ;; 2x = 16 ~ 16
names     x + 1 = 5 ~ 5 ;; 5 cm = 5 m ~ 5 ;; 1, 2 = 2 ~ 2 ;; 5 = x ~ 5
tuples    (1,2) ~ (2,1) ;; (1,2) ~ (1,2,3) ;; (1,2) ~ 1,2 ;; (1,2) ~ \{1,2\} ;; (1,23) ~ (12,3) ;; (1,2) ~ 12
tuples    (1,000) ~ 1000 ;; [0,1) ~ (0,1) ;; [0,1) ~ [0,1] ;; (-\infty,3) ~ (\infty,3) ;; (0,1) ~ (0,1)\cup(2,3)
tuples    [0,1] ~ 0 ;; (-\infty,3) ~ (-3,\infty)
sets      {1,2} ~ 1 ;; {1,2} ~ {1,3} ;; \{1,2,3\} ~ \{1,2\} ;; \{1\} ~ \{2\} ;; \{\} ~ \{0\} ;; 1 or 2 ~ 1 ;; 1, 2 ~ 2
sets      1 and 2 ~ 12 ;; not 5 ~ 5 ;; 5-6 ~ 5 ;; 5–6 ~ 5 ;; between 5 and 6 ~ 5 ;; about 5 ~ 5 ;; ~5 ~ 6 ;; 5 to 6 ~ 5
sets      5? ~ 6 ;; 2\pm 1 ~ 3 ;; 5 (or 6) ~ 5 ;; 5 or more ~ 5 ;; 5, maybe 6 ~ 6 ;; 1/2/3 ~ 1 ;; 3 = 4 ~ 4
text      \begin{pmatrix} 1 & 2 \end{pmatrix} ~ \begin{pmatrix} 1 2 \end{pmatrix}
text      \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix} ;; \begin{pmatrix}1\end{pmatrix} ~ 1
text      paris ~ rome ;; a b ~ ab ;; x+1 ~ x+2 ;; 10:30 ~ 10.30 ;; true ~ false ;; ² ~ 2 ;; \infty ~ -\infty
text      __import__('os') ~ 1 ;; 5 ~ 5; rm -rf ;; ٣ ~ 3 ;; i ~ 1 ;; x^{12} ~ x^12 ;; x^{1}2 ~ x^{12} ;; x^{1}2 ~ x^12
text      a_{12} ~ a_12 ;; y^{3} ~ y^{2} ;; e^{xy} ~ e^xy ;; a_1 ~ a1 ;; x^{1.5} ~ x^{1}.5 ;; 10^{2}3 ~ 10^23
text      x \leq 5 ~ x < 5 ;; x \le 5 ~ x \ge 5 ;; x \neq 1 ~ x = 1 ;; x \leq 5 ~ x \lt 5 ;; \lbrace 1 \rbrace ~ \{2\}
text      \lbrace 1, 2 \rbrace ~ (1, 2) ;; \frac12x ~ \frac{1}{2x} ;; \frac{12}34 ~ 12/34 ;; \frac{1}23 ~ 1/23
text      \sqrt12 ~ \sqrt{12}
"""


@pytest.mark.parametrize("a, b", [*pairs(EQUAL)])
def test_equal_answers(a, b):
    assert is_equivalent(a, b) and is_equivalent(b, a)


@pytest.mark.parametrize("a, b", [*pairs(UNEQUAL)])
def test_unequal_answers(a, b):
    assert not is_equivalent(a, b) and not is_equivalent(b, a)


def test_number_with_a_noun_is_the_number_if_that_is_the_reference():
    for answer in ("12 apples", "12 \\text{ apples}", "12.0 Apples.", "24/2 cups", "**12 men**", "\\frac{24}{2} cups"):
        assert is_equivalent(answer, "12") and not is_equivalent("12", answer), answer
        assert not is_equivalent(answer, "$12") and not is_equivalent(answer, "13"), answer
    others = ("3 dozen; 3 millions; 3 thousandths; 3 quarters; 3 halves; 3 squared; 3 more; 3 times; 3 less; 3 over; "
              "3 percentage; 3 repeating; 3 five; 3 binary; 3 sin; 3√; 3 of 5 apples; 3 apples and 5; 3 5 apples; "
              "1 + 2 apples; 3, 5 apples; 3 or 5 apples; not 3 apples; -3 apples; 3 xy; 3 pm; 3 x; 3apples")
    for answer in others.split("; "):
        assert not is_equivalent(answer, "3") and not is_equivalent("3", answer), answer
    assert is_equivalent("12 percent", "0.12") and not is_equivalent("12 apples", "12 oranges")


def test_beyond_the_bounds_the_text_is_compared():
    many = r"(1+\sqrt2)(1+\sqrt3)(1+\sqrt5)(1+\sqrt7)(1+\sqrt{11})"
    for zero in (r"2^{3999}*2^{3999}*2^{3999}*0", r"(1+\sqrt2)^9*0", f"{many}*0", "(" * 50 + "0" + ")" * 50, "0e1000"):
        assert is_equivalent(zero, zero) and not is_equivalent(zero, "0"), zero
    for long, short in [(", ".join("1" * 65), "1, 1"), ("0" * 1000 + "1", "1"), ("[" * 30 + "1" + "]" * 30, "1")]:
        assert is_equivalent(long, long) and not is_equivalent(long, short), long
    assert not is_equivalent("[" * 30 + "0.5" + "]" * 30, "[" * 30 + ".50" + "]" * 30)


def test_letters_of_multiple_choice():
    for answer in ("B", "(B)", "B.", "b", "B) 12", "(B) twelve", "\\text{(B)}", "B: 12", "\\textbf{B}"):
        assert is_equivalent(answer, "B") and is_equivalent(answer, "(B)"), answer
    for answer in ("C", "BAD", "A or B", "12", "Because", "B and C", "AB", "not B", ""):
        assert not is_equivalent(answer, "B"), answer


def test_response_that_ends_on_the_letter_of_an_option():
    for response in ("B", "b", "(b)", "**B**\n", "x = 12, so the correct option is (B).", "Correct choice is **B**"):
        assert verify(response, "B") and verify(response, "\\boxed{(B)}") and not verify(response, "A"), response
    for response in ("A B", "BB", "the correct option is b", "incorrect option is (B)", "the correct option is (B)?",
                     "the correct option is (B) or (C)", "The correct option is (B). The answer is (C)",
                     "\\boxed{C} The correct option is (B)"):
        assert not verify(response, "B"), response
    assert verify("x = 12, so the correct option is (B)", "12")


def test_references_that_cannot_be_read_never_match():
    for reference in (None, "", " ", "\\boxed{}", "\\boxed{5", "<answer>", math.nan, math.inf, [5], {}, b"5", 10**5000):
        for answer in ("5", "", "\\boxed{}", None):
            assert is_equivalent(answer, reference) is False
        assert verify("\\boxed{5}", reference) is False
        assert reward_func(["\\boxed{5}"], answer=[reference]) == [None]
    assert verify("\\boxed{5}", 5) and verify("\\boxed{0.25}", 0.25) and not verify("\\boxed{5}", 6)


def test_adapters():
    assert verify("... #### 72", "48/2 = 24\n#### 72") and not verify("#### 71", "#### 72") and not verify("no", "5")
    assert verify(None, "5") is False and verify("5", None) is False
    assert compute_score("gsm8k", "#### 5", "5", extra_info={}) == 1.0 and compute_score("x", "#### 5", 6) == 0.0
    chat = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "\\boxed{3}"}], []]
    assert reward_func(["\\boxed{3}", "4"], answer=["3", "3"], prompts=["", ""]) == [1.0, 0.0]
    assert reward_func(chat, solution=["3", "3"]) == [1.0, 0.0]
    assert reward_func(["1", "1"], ground_truth=[None, ""]) == [None, None] and reward_func(["1"]) == [None]


def test_verdicts_are_those_of_the_version_before():
    """results/verdicts.json: in a category, answers in one list are equal, and others only if a pair says so."""
    changed = []
    for kept in json.loads((ROOT / "results" / "verdicts.json").read_text()).values():
        place = {answer: i for i, answers in enumerate(kept["equal"]) for answer in answers}
        for a, b in itertools.product(place, place):
            before = (place[a] == place[b] or [a, b] in kept["also"]) and a not in kept["never"]
            if is_equivalent(a, b) != before:
                changed.append((a, b))
    on_purpose = {("10 000", "10\\,000"), ("10\\,000", "10 000"), ("5 Apples", "5"), ("5 apples", "5")}
    assert set(changed) == on_purpose


def notations(value, rng):
    """The rational in notations drawn at random; every one of them names exactly this value."""
    n, d = value.numerator, value.denominator
    k, sign = rng.randint(2, 9), "-" if n < 0 else ""
    forms = [f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}", f"{sign}\\dfrac{{{abs(n)}}}{{{d}}}", f"{n * k}/{d * k}",
             f"$\\frac{{{n * k}}}{{{d * k}}}$", f"\\frac{{{n}}}{{{d}}} + 0", f"x = {n}/{d}", f"{n * k} \\div {d * k}",
             f"\\sqrt{{{d * d}}}^{{-1}} \\cdot ({n})"]
    if abs(n) > d > 1:
        forms += [f"{sign}{abs(n) // d} {abs(n) % d}/{d}", f"{sign}{abs(n) // d}\\frac{{{abs(n) % d}}}{{{d}}}"]
    if 10**9 % d == 0:  # a finite decimal
        whole, part = divmod(abs(n) * 10**9 // d, 10**9)
        decimal = f"{whole}.{part:09d}".rstrip("0").rstrip(".")
        forms += [sign + decimal, f"{sign}{whole:,}.{part:09d}", f"{sign}{decimal}e0", f"\\text{{{sign}{decimal}}}",
                  f"{sign}{decimal} \\times 10^{{0}}", f"({sign}{decimal})", f"{sign}${decimal}"]
    return rng.choice(forms)


def test_ten_thousand_generated_pairs():
    rng = random.Random(0)
    for _ in range(10_000):
        top, bottom = rng.randint(0, rng.choice([9, 99, 10**6])), rng.choice([1, 1, 2, 3, 4, 5, 7, 8, 10, 100, 999])
        value = Fraction(rng.choice([-1, 1]) * top, bottom)
        other = value + Fraction(rng.choice([-1, 1]), rng.choice([1, 10, 997, 10**6]))
        a, b, c = notations(value, rng), notations(value, rng), notations(other, rng)
        assert is_equivalent(a, b) is True, (a, b)
        assert is_equivalent(a, c) is False and is_equivalent(c, a) is False, (a, c)


def pieces_of(text):
    return [piece.replace("␣", " ").replace("⏎", "\n") for piece in text.split()]


def hostile_inputs():
    rng = random.Random(0)
    pieces = pieces_of(r"\boxed{ } { \frac \sqrt ^ 9 1e9 , ( ) [ ] \{ \pm ␣or␣ #### <answer> $ \text{ ² \ - / . x= %"
                       r" ␣ ⏎ = _{ \, \boxed␣ ␣apples f(")
    for _ in range(1000):
        yield "".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
        yield bytes(rng.randrange(256) for _ in range(rng.randint(1, 60))).decode("latin-1")
        yield "".join(chr(rng.choice([rng.randrange(0x3000), rng.randrange(0xD800, 0xE000)])) for _ in range(20))


def long_inputs(n):
    for piece in pieces_of(r"9 { } ( \boxed{ \frac \sqrt ^ 9^ - 1, ␣ # ####␣ ####␣1⏎ <answer> </think> a answer␣is␣"
                           r" answer:␣ 1␣ \text{ \text{a $ \ x= . 1/ % √ ² \pm ␣or␣ ½ 1e9 \{ \cup 1,000 (( __ * ␣=␣ 1="
                           r" _{ ^{ because␣ answer␣is␣as␣ \boxed␣ correct␣option␣is␣( ␣apples 1\,000 f(1)= x^2␣"
                           r" \mathbf{\frac{1}{2}} (1+\sqrt2)^{16}+ (1/3)^{999}+ \sqrt{99999989}+ 2^{7999}*"
                           r" (\sqrt2+\sqrt3+\sqrt5)^9*"):
        text = piece * (n // len(piece))
        yield from (text, "\\boxed{" + text + "}", "#### " + text, text[:900])


def test_no_input_raises_or_gets_another_type():
    for text in hostile_inputs():
        for response, reference in ((text, "1"), (f"\\boxed{{{text}}}", text), ("1", text)):
            assert type(verify(response, reference)) is bool and type(is_equivalent(response, reference)) is bool
        assert extract_answer(text) is None or type(extract_answer(text)) is str
        assert is_equivalent(text, "5 - 4.5") == is_equivalent("5 - 4.5", text)


def test_long_inputs_cost_time_in_proportion_to_their_length():
    def seconds(text):
        start = time.process_time()
        assert type(verify(text, "1")) is type(verify("\\boxed{1}", text)) is type(verify(text, text)) is bool
        assert type(verify(text, "B")) is bool
        return time.process_time() - start

    for short, long in zip(long_inputs(4_000), long_inputs(40_000)):
        assert any(seconds(long) < 20 * seconds(short) + 0.002 for _ in range(5)), long[:20]  # again if disturbed
    nested = "\\boxed{" + "\\{" * 20 + "1" + "\\}" * 20 + "}"
    assert any(seconds(nested) < 0.1 for _ in range(5))


def test_eight_threads_give_the_same_verdicts():
    cases = [tuple(case.values) for case in [*pairs(EQUAL), *pairs(UNEQUAL)]] * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda case: is_equivalent(*case), cases)) == [is_equivalent(*case) for case in cases]


def test_verify_uses_nothing_but_arithmetic_and_regular_expressions():
    source = Path(inspect.getsourcefile(verify)).read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported == {"math", "re", "collections", "fractions"}
    assert not re.search(r"\b(eval|exec|compile_|signal|thread|subprocess|global)\b", source.split('"""')[2])


@pytest.mark.parametrize("name", ["train", "test"])
def test_gsm8k_references(name):
    path = Path(os.environ.get("GSM8K", "gsm8k"), f"{name}.jsonl")
    if not path.exists():
        pytest.skip("GSM8K=folder says where train.jsonl and test.jsonl are")
    answers = [row["answer"] for row in rows_of(path)]
    numbers = [Fraction(answer.split("####")[1].replace(",", "").strip()) for answer in answers]
    for i, answer in enumerate(answers):
        final = answer.split("####")[1].strip()
        assert verify(answer, answer) and verify(f"so \\boxed{{{final}}}.", answer) and verify(answer, final)
        assert verify(answers[i - 1], answer) == (numbers[i - 1] == numbers[i])
