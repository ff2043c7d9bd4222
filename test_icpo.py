"""Tests of icpo.py and verify.py: offline, on tiny models made here. Run: python -m pytest -q

Each formula is held against an oracle that shares no code with it: numbers by hand, a plain Python loop, or
transformers' own generate and forward. More tests of the verifier are in results/test_verdicts.py.
"""

import bisect
import contextlib
import copy
import importlib
import inspect
import io
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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import (
    AddedToken, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config,
    Qwen2ForCausalLM, Qwen2Tokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.logging import warning_once

import icpo
from examples.addition import prepare, write_task
from icpo import (
    Config, group_advantage, icpo_advantage, policy_loss, preference_advantage, sample, sequence_log_prob,
    token_log_probs, uniform_groups)
from verify import is_equivalent, verify

# One thread, here and in the runs started here: several that wait for each other crawl on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(icpo.__file__).parent
LN3 = math.log(3)

# --------------------------------------------------------------------------------------- Preference advantage

def test_the_worked_example_of_the_readme():
    table = (ROOT / "README.md").read_text().replace("−", "-")
    rows = [row.split("|")[2:7] for row in re.findall(r"^\| (?:correct|wrong), .*", table, re.MULTILINE)]
    columns = torch.tensor([[float(x.strip("* ")) for x in row] for row in rows]).T
    l, s, R, grpo, icpo_ = columns[:, None]
    close = dict(atol=5e-4, rtol=0)
    assert_close(preference_advantage(l, Config().beta), s, **close)
    assert_close(group_advantage(R), grpo, **close)
    assert_close(icpo_advantage(R, l, Config().alpha, Config().beta), icpo_, **close)
    assert R.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("l, beta, expected", [
    # A gap of ln 3 at beta 1 is a preference of 3/4, so a score of 2 * 3/4 - 1 = 1/2; 2 ln 3: 9/10, so 4/5.
    ([0.0, -LN3], 1.0, [-0.5, 0.5]), ([0.0, -LN3], -1.0, [0.5, -0.5]), ([0.0, -LN3 / 10], 10.0, [-0.5, 0.5]),
    ([0.0, -LN3, -2 * LN3], 1.0, [-0.65, 0.0, 0.65]), ([-0.7] * 5, 10.0, [0.0] * 5),
    ([-0.4, -0.1, -0.9, -0.2], 1e6, [1 / 3, -1.0, 1.0, -1 / 3])])  # (more - less probable ones) / (G - 1)
def test_preference_by_hand(l, beta, expected):
    s = preference_advantage(torch.tensor([l], requires_grad=True), beta)
    assert_close(s, torch.tensor([expected]))
    assert not s.requires_grad


def loop_preference(group, beta):
    """Steps 3 and 4 of the method from the Bradley-Terry probability, in plain Python."""
    scores = []
    for i, l_i in enumerate(group):
        wins = [2 / (1 + math.exp(-beta * (l_j - l_i))) - 1 for j, l_j in enumerate(group) if j != i]
        scores.append(sum(wins) / len(wins))
    return scores


# ---------------------------------------------------------------------------------- Group and ICPO advantages

def loop_advantage(group):
    if len(set(group)) == 1:
        return [0.0] * len(group)
    return [(r - statistics.mean(group)) / statistics.stdev(group) for r in group]


def loop_icpo(rewards, l, alpha, beta):
    shaped = [r + alpha * s for r, s in zip(rewards, loop_preference(l, beta))]
    return loop_advantage(shaped if len(set(rewards)) > 1 else rewards)


def test_icpo_advantage_equals_loop_and_at_alpha_zero_grpo_to_the_bit():
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randint(0, 3, (30, 5), generator=generator).float() / 2  # some at the mean of their group
    l = -torch.rand(30, 5, generator=generator)
    expected = [loop_icpo(*group, 0.3, 7.0) for group in zip(rewards.tolist(), l.tolist())]
    assert_close(icpo_advantage(rewards, l, 0.3, 7.0), torch.tensor(expected), atol=1e-5, rtol=0)
    assert torch.equal(icpo_advantage(rewards, l, 0.0, 7.0), group_advantage(rewards))


@pytest.mark.parametrize("alpha, beta", [(0.499, 1e4), (0.199, 1e4), (Config().alpha, Config().beta)])
def test_the_verifier_is_never_overruled(alpha, beta):
    """Not by repetition, with log-probs near 0, and not by rambling; alpha below 1/G keeps the signs."""
    rewards = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5))[1:-1])  # all that have both
    repetitive, rambling = (torch.where(rewards == 1, -0.2, wrong) for wrong in (-1e-4, -5.0))
    for l in (-torch.rand(30, 5) * 3, repetitive, rambling):
        A = icpo_advantage(rewards, l, alpha, beta)
        correct = torch.where(rewards == 1, A, math.inf).amin(dim=1)
        wrong = torch.where(rewards == 0, A, -math.inf).amax(dim=1)
        assert (correct > wrong).all()
        assert alpha > 1 / 5 or (correct > 0).all() and (wrong < 0).all()


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.6, 0.7, 0.9, 1.0, -5.0])
def test_equal_rewards_give_exactly_zero_or_alpha_times_preference(reward):
    for G in range(2, 17):
        rewards, l = torch.full((3, G), reward), -torch.rand(3, G)
        assert torch.equal(group_advantage(rewards), torch.zeros(3, G))
        assert torch.equal(icpo_advantage(rewards, l, 0.4, 10.0), torch.zeros(3, G))
        kept = icpo_advantage(rewards, l, 0.4, 10.0, keep_uniform_groups=True)
        expected = 0.4 * torch.tensor([loop_preference(group, 10.0) for group in l.tolist()])
        assert_close(kept, expected, atol=1e-6, rtol=0)


def test_rounding_is_no_difference_in_reward_but_a_small_one_is():
    rewards = torch.full((1, 8), 0.7)
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))
    assert group_advantage(rewards).abs().max() < 1e-3
    assert group_advantage(torch.tensor([[0.7, 0.7, 0.7, 0.701]])).abs().max() > 1


def test_groups_of_one_empty_prompts_and_unknown_aggregations_are_refused():
    one = torch.zeros(1, 1)
    for function in (lambda: preference_advantage(one, 1.0), lambda: icpo_advantage(one, one, 0.1, 1.0)):
        with pytest.raises(ValueError, match="at least 2"):
            function()
    with pytest.raises(ValueError, match="at least one token"):
        sample(qwen2(), [[1], []], 2, 3, [])
    with pytest.raises(ValueError, match="mean"):
        policy_loss(one, one, torch.zeros(1), one, aggregation="mean")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_sequence_log_prob_is_the_mean_over_the_response(dtype):
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, math.nan], [-4.0, 9.0, 9.0, 9.0]])  # rubbish in the padding
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=dtype)
    assert sequence_log_prob(log_probs, mask).tolist() == [-2.0, -4.0]
    neighbors = torch.tensor([[-1.0, -1.0078125]], dtype=torch.bfloat16)  # no number of bf16 is between them
    assert sequence_log_prob(neighbors, torch.ones(1, 2)).tolist() == [-1.00390625]


@pytest.mark.parametrize("function", [
    sequence_log_prob, preference_advantage, uniform_groups, group_advantage, icpo_advantage, policy_loss])
def test_pure_functions_work_pasted_alone(function):
    l, mask = -torch.rand(3, 4), (torch.rand(3, 4) < 0.7).long()
    needed, arguments = {
        sequence_log_prob: ([], (l, mask)), preference_advantage: ([], (l, 5.0)), uniform_groups: ([], (l,)),
        group_advantage: ([uniform_groups], (l,)),
        icpo_advantage: ([uniform_groups, group_advantage, preference_advantage], (l.round(), l, 0.3, 5.0)),
        policy_loss: ([], (l, l - 0.1, l[:, 0], mask))}[function]
    pasted = {}
    sources = map(inspect.getsource, [*needed, function])
    exec("import torch\nfrom torch import Tensor\n" + "".join(sources), pasted)
    assert_close(pasted[function.__name__](*arguments), function(*arguments))


# ------------------------------------------------------------------------------------------------ Policy loss

@pytest.mark.parametrize("A, ratio, slope", [
    (1, 0.5, 1), (1, 1.0, 1), (1, 1.27, 1), (1, 1.29, 0), (1, 1.5, 0),
    (-1, 0.5, 0), (-1, 0.79, 0), (-1, 0.81, -1), (-1, 1.0, -1), (-1, 1.5, -1)])
def test_clip_table(A, ratio, slope):
    """The objective's derivative by the ratio: A inside, 0 where the ratio moved far enough in A's favor."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([float(A)]), torch.ones(1, 1))
    loss.backward()
    assert -log_probs.grad.item() / ratio == pytest.approx(slope, abs=1e-6)  # d ratio = ratio * d log_prob
    assert stats["clipped"] == (slope == 0)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_loss_and_stats_equal_loop_over_tokens(aggregation, dtype):
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 5])[:, None]
    numbers = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64) * 0.4 - 1
    log_probs, old, ref = torch.where(mask, numbers[:3], torch.nan)  # rubbish in the padding
    A = numbers[3, :, 0] + 1
    inputs = [log_probs.requires_grad_(), old, A, mask.to(dtype)]
    before = copy.deepcopy(inputs)
    loss, stats = policy_loss(*inputs, aggregation=aggregation, ref_log_probs=ref, kl_coef=0.3)
    rows, clipped, kl_old, kl_ref = [], 0, 0.0, 0.0
    for b in range(len(mask)):
        terms = []
        for t in range(int(mask[b].sum())):
            new_p, old_p, ref_p = (math.exp(x[b, t].item()) for x in (log_probs, old, ref))
            r, a = new_p / old_p, A[b].item()
            bounded = min(max(r, 0.8), 1.28)
            k3 = ref_p / new_p - math.log(ref_p / new_p) - 1  # its mean under pi is KL(pi || pi_ref)
            terms.append(-min(r * a, bounded * a) + 0.3 * k3)
            clipped += bounded * a < r * a
            kl_old += r - math.log(r) - 1
            kl_ref += k3
        rows.append(terms)
    of_all, of_rows = statistics.mean(itertools.chain(*rows)), statistics.mean(map(statistics.mean, rows))
    assert loss.item() == pytest.approx(of_all if aggregation == "token" else of_rows)
    assert (stats["tokens"], stats["clipped"]) == (18, clipped) and clipped > 0
    assert (stats["kl_old"].item(), stats["kl_ref"].item()) == pytest.approx((kl_old, kl_ref))
    gradient, = torch.autograd.grad(loss, log_probs)
    assert gradient[mask].ne(0).any() and gradient[~mask].eq(0).all()
    assert_close(inputs, before, rtol=0, atol=0, equal_nan=True)  # nothing was changed in place
    nothing = torch.zeros_like(mask)
    assert policy_loss(log_probs, old, A, nothing, aggregation=aggregation)[0] == 0


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


# --------------------------------------------------------------------------------------- Sampling and scoring

DEVICE = os.environ.get("ICPO_TEST_DEVICE", "cpu")  # of the sampler, the scorer and the update
if DEVICE != "cpu":  # in float32, since bf16 autocast would leave nothing exact to compare
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
VOCAB, EOS = 23, 7
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None, pad_token_id=0)


def on(values):
    return torch.as_tensor(values, device=DEVICE)


def scaled(make):
    """The model with larger weights: its distributions differ from the uniform one and from each other."""
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


@pytest.fixture(params=["qwen2", "grouped", "gpt2"])
def model(request):
    model = gpt2() if request.param == "gpt2" else qwen2()
    if request.param == "grouped":  # as load_model sets it
        model.set_attn_implementation("grouped")
    return model


def draw(model, group_size=4, max_new_tokens=9, seed=0, eos_ids=(EOS,), temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    return sample(model, PROMPTS, group_size, max_new_tokens, list(eos_ids), temperature, generator)


def alone(model, prompt, response, temperature=1.0):
    """The log-probs (n, V) at every token of a response, by a plain forward pass over one row, in float64."""
    logits = model(input_ids=on([prompt + response])).logits[0, len(prompt) - 1:-1]
    return (logits.double() / temperature).log_softmax(dim=1)


def plain_log_probs(model, rollout, temperature=1.0):
    """The log-probs of all response tokens, row after row."""
    rows = []
    for b, response in enumerate(rollout.responses()):
        prompt = rollout.prompts[b, -rollout.prompt_lengths[b]:].tolist()
        rows.append(alone(model, prompt, response, temperature)[range(len(response)), response])
    return torch.cat(rows)


def prefix_log_prob(model, tokens, position):
    """log p(tokens[position] | tokens[:position])."""
    return alone(model, tokens[:position], tokens[position:position + 1])[0, tokens[position]].item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_row_is_what_it_would_be_alone(model, temperature):
    """Rows end, leave the batch and share prefills of different lengths; each alone gives the same tokens,
    log-probs and entropies, sampled and scored, whatever is in the generation config and in the padding."""
    model.generation_config.update(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1)
    eos_ids = [EOS, 0, 11, 14]  # the padding id too
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    rollout = draw(model, 3, 8, seed=4, temperature=temperature, eos_ids=eos_ids)
    hook.remove()
    lengths, width = rollout.lengths.tolist(), rollout.ids.shape[1]
    running = [sum(n > t for n in lengths) for t in range(1, width)]
    assert rows == [3, *running]  # a prefill a prompt, and no row past its end

    inside = on(range(5)) >= 5 - rollout.prompt_lengths[:, None]
    padded = copy.copy(rollout)
    padded.prompts = pad(torch.where(inside, rollout.prompts, 13), (6, 0), value=EOS)
    padded.ids = pad(torch.where(rollout.mask, rollout.ids, 13), (0, 6), value=EOS)
    scored = token_log_probs(model, padded, temperature)
    assert scored.dtype == torch.float32 and scored.shape == (9, width + 6)
    uniforms = torch.rand(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).tolist()
    for b, response in enumerate(rollout.responses()):
        prompt, n = PROMPTS[b // 3], lengths[b]
        log_p = alone(model, prompt, response, temperature).detach()
        inverse_cdf = zip(log_p.exp().cumsum(dim=1).tolist(), uniforms[b])
        assert response == [bisect.bisect(sums, uniform) for sums, uniform in inverse_cdf]
        for log_probs in (rollout.log_probs, scored):
            assert_close(log_probs[b, :n].double(), log_p[range(n), response], atol=1e-5, rtol=0)
        assert_close(rollout.entropies[b, :n].double(), -(log_p.exp() * log_p).sum(dim=1), atol=1e-4, rtol=0)
        ends = [token in eos_ids for token in response]
        assert not any(ends[:-1]) and (ends[-1] or n == 8) and rollout.truncated[b].item() != ends[-1]
        assert rollout.prompts[b, -rollout.prompt_lengths[b]:].tolist() == prompt
        assert rollout.mask[b].tolist() == [t < n for t in range(width)]
        assert rollout.ids[b, n:].eq(PROMPTS[0][0]).all()  # the padding is a token in use
        assert all(x[b, n:].eq(0).all() for x in (rollout.log_probs, scored, rollout.entropies))
    assert rollout.truncated.any() and not rollout.truncated.all() and len(set(lengths)) > 2
    row = rollout.select(on([5]))
    assert (row.prompts.shape[1], row.ids.shape[1]) == (len(PROMPTS[1]), lengths[5])  # trimmed


TEXT = SHAPE | dict(vocab_size=300)
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
ARCHITECTURES = {  # special in cache, head or body; with images, dropout, noise, or more outputs
    "OPTForCausalLM": transformers.OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5),
    "Gemma2ForCausalLM": transformers.Gemma2Config(
        **TEXT, head_dim=8, final_logit_softcapping=1.5, attn_logit_softcapping=0.5, sliding_window=4),
    "Gemma3ForConditionalGeneration": transformers.Gemma3Config(
        text_config=TEXT | dict(head_dim=8, sliding_window=4, attention_dropout=0.4),
        vision_config=VISION, image_token_index=291, boi_token_index=292, eoi_token_index=293,
        mm_tokens_per_image=4),
    "Gemma3nForCausalLM": transformers.Gemma3nTextConfig(  # NaN for a gradient at zeros, as its pad token has
        **TEXT, head_dim=8, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2, layer_types=["full_attention"] * 2),
    "Mistral3ForConditionalGeneration": transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, head_dim=8), image_token_index=291,
        vision_config=transformers.PixtralVisionConfig(**VISION)),
    "GraniteForCausalLM": transformers.GraniteConfig(**TEXT, logits_scaling=3.0),
    "CohereForCausalLM": transformers.CohereConfig(**TEXT, logit_scale=0.2),
    "MixtralForCausalLM": transformers.MixtralConfig(
        **TEXT, num_local_experts=4, output_router_logits=True, router_jitter_noise=0.3),
    "PhimoeForCausalLM": transformers.PhimoeConfig(**TEXT, num_local_experts=4),  # jitter in eval mode too
    "Llama4ForCausalLM": transformers.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "Qwen3_5ForCausalLM": transformers.Qwen3_5TextConfig(
        **TEXT | dict(num_hidden_layers=4), head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8),
    "FalconForCausalLM": transformers.FalconConfig(
        **TEXT, attention_dropout=0.1, hidden_dropout=0.1, alibi=False),
    "AfmoeForCausalLM": transformers.AfmoeConfig(  # names the mask in the call of its attention
        **TEXT, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "MptForCausalLM": transformers.MptConfig(
        vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, resid_pdrop=0.1, emb_pdrop=0.1),
    "Qwen2ForCausalLM": Qwen2Config(**TEXT, output_hidden_states=True, return_dict=False)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_models_get_what_each_row_alone_gets_train_and_are_saved_as_they_were(tmp_path, name):
    kind = getattr(transformers, name)
    saved(tmp_path / "model", make=kind, config=copy.deepcopy(ARCHITECTURES[name]))
    plain = scaled(lambda: kind.from_pretrained(  # sdpa leaves out what some architectures have
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager", return_dict=True))
    model = scaled(lambda: icpo.load_model(str(tmp_path / "model"), DEVICE, gradient_checkpointing=True)[0])
    assert not torch.backends.cuda.cudnn_sdp_enabled() and model.is_gradient_checkpointing
    rollout = draw(model, group_size=3, eos_ids=range(0, 300, 7))
    assert len(set(rollout.lengths.tolist())) > 1
    for log_probs in (rollout.log_probs, token_log_probs(model, rollout, max_logits=1500)):
        assert_close(log_probs[rollout.mask].double(), plain_log_probs(plain, rollout), atol=5e-5, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = icpo.update(model, optimizer, rollout, on(torch.randn(9)), settings())
    assert metrics["sampling/logp_difference"] < 1e-4 and 0 < metrics["grad_norm"] < math.inf
    model.config = model.config_to_save
    model.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / f"{name}/config.json").read_text()) for name in ("model", "again"))
    changed = {key for key in first if first[key] != again.get(key)}
    assert changed <= {"dtype", "text_config", "vision_config"}, changed


def test_greedy_equals_generate(model):
    rollout = draw(model, group_size=1, max_new_tokens=12, temperature=0)
    for prompt, response in zip(PROMPTS, rollout.responses()):
        expected = model.generate(
            on([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0)
        assert response == expected[0, len(prompt):].tolist()


TAIL = [n / 50 for n in range(1, 50)]  # ways through 20,000 tokens of 1e-8; 1 + 1e-8 is 1 in float32


@pytest.mark.parametrize("logits, uniforms, tokens", [
    ([-math.inf, 0, -math.inf, 0, -math.inf], [0, 0.5 - 2**-53, 0.5, 1 - 2**-53], [1, 1, 3, 3]),
    ([0] + [math.log(1e-8)] * 20_000, [(1 + x * 2e-4) / 1.0002 for x in TAIL], [x * 20_000 for x in TAIL])],
    ids=["the ends of the unit interval draw possible tokens", "a tail too fine for float32 is drawn"])
def test_uniform_numbers_draw(logits, uniforms, tokens, monkeypatch):
    model, numbers = qwen2(), torch.tensor(uniforms, dtype=torch.float64)[:, None]
    logits = torch.tensor(logits, dtype=torch.float32, device=DEVICE)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: numbers)
    monkeypatch.setattr(model, "forward", lambda input_ids, **kwargs: SimpleNamespace(
        logits=logits.expand(len(input_ids), 1, -1)))
    rollout = sample(model, [[1]], len(uniforms), 1, [])
    assert rollout.ids[:, 0].tolist() == pytest.approx(tokens, abs=1 if len(logits) > 5 else 0)
    p = logits.double().softmax(dim=0)
    entropy = -p.xlogy(p).sum().item()  # the impossible add nothing
    assert rollout.entropies[:, 0].tolist() == pytest.approx([entropy] * len(uniforms), abs=1e-4)


def test_gradient_in_chunks_equals_autograd_of_the_plain_formula(model):
    rollout = draw(model).select(on([0, 4, 8]))
    total = plain_log_probs(model, rollout, 0.7).square().sum()
    expected = torch.autograd.grad(total, list(model.parameters()))
    for max_logits in (2**25, 5 * VOCAB, 1):
        log_probs = token_log_probs(model, rollout, 0.7, max_logits)
        actual = torch.autograd.grad(log_probs.square().sum(), list(model.parameters()))
        assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_bf16_logits_are_normalized_in_float32():
    def coarse(module, args, outputs):
        outputs.logits = (outputs.logits * 50).bfloat16()  # their exponentials overflow

    model = qwen2()
    model.register_forward_hook(coarse)
    rollout = draw(model, 1, 4)  # few tokens, since other kernels may round a logit to its neighbor
    for log_probs in (token_log_probs(model, rollout), rollout.log_probs):
        assert log_probs.dtype == torch.float32
        assert_close(log_probs[rollout.mask].double(), plain_log_probs(model, rollout), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------- The update

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
    rollout = draw(model, max_new_tokens=12)
    advantages = on(torch.randn(12, generator=torch.Generator().manual_seed(0)))
    advantages[[2, 5, 6]] = 0
    # The oracle: -sum of A * log-prob * weight. At ratio 1 the clipped loss has its gradient.
    lengths, total = rollout.lengths.tolist(), 0.0
    for b, log_probs in enumerate(plain_log_probs(model, rollout).split(lengths)):
        weight = 1 / sum(lengths) if aggregation == "token" else 1 / (lengths[b] * 12)
        total = total - advantages[b] * log_probs.sum() * weight
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    assert len(set(lengths)) > 2
    shuffled = on(torch.randperm(12))
    for order, size in ((on(range(12)), 1), (on(range(12)), 2), (on(range(12)), 100), (shuffled, 5)):
        rows, A = rollout.select(order), advantages[order]
        actual, _ = update_gradient(model, rows, A, aggregation=aggregation, micro_batch=size)
        assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_gradient_checkpointing_recomputes_layers_and_keeps_the_gradient(make):
    model = scaled(lambda: AutoModelForCausalLM.from_config(icpo.quietened(make().config)))
    rollout, advantages, calls = draw(model), on(torch.randn(12)), []
    expected, _ = update_gradient(model, rollout, advantages)
    model.gradient_checkpointing_enable()
    layer = next(module for module in model.modules() if hasattr(module, "mlp"))
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    actual, _ = update_gradient(model, rollout, advantages)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert_close(draw(model).log_probs, rollout.log_probs)  # sampling still has its cache


def test_first_ratio_is_exactly_one_and_metrics_are_those_of_the_last_epoch(model, monkeypatch):
    def spy(log_probs, old_log_probs, *args, **kwargs):
        ratios.append((log_probs - old_log_probs).exp())
        return policy_loss(log_probs, old_log_probs, *args, **kwargs)

    def updated(inner_epochs):
        policy = copy.deepcopy(model).train()  # its dropout must not act
        config = settings(inner_epochs=inner_epochs, micro_batch=5, kl_coef=0.1)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        return policy.eval(), icpo.update(policy, optimizer, rollout, advantages, config, ref_model)

    rollout, advantages, ref_model = draw(model), on(torch.randn(12)), copy.deepcopy(model)
    advantages[3] = 0  # counts all the same, since the KL needs it
    otherwise = on(torch.linspace(-0.01, 0.01, rollout.mask.shape[1]))
    rollout.log_probs += rollout.mask * otherwise  # as if sampled otherwise
    with torch.no_grad():
        for parameter in ref_model.parameters():
            parameter.mul_(0.9)
    ratios, calls = [], []
    monkeypatch.setattr(icpo, "policy_loss", spy)
    hook = ref_model.register_forward_pre_hook(lambda *args: calls.append(1))
    copied, _ = updated(1)  # the first epoch, to do the second one again by hand
    ratios, calls = [], []
    _, metrics = updated(2)
    hook.remove()
    assert len(calls) == 3  # a micro-batch's reference log-probs are taken once, not in every epoch
    assert all(ratio.eq(1).all() for ratio in ratios[:3]) and all(ratio.ne(1).any() for ratio in ratios[3:])
    old, new, ref = (plain_log_probs(m, rollout).detach() for m in (model, copied, ref_model))
    ratio, A = (new - old).exp(), advantages.repeat_interleave(rollout.lengths)
    clipped = (A > 0) & (ratio > 1.28) | (A < 0) & (ratio < 0.8)
    expected = {
        "ratio/clip_frac": clipped.double().mean(), "kl/old": (ratio - (new - old) - 1).mean(),
        "kl/ref": ((ref - new).exp() - (ref - new) - 1).mean(),
        "sampling/logp_difference": (old - rollout.log_probs[rollout.mask]).abs().mean()}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-3) and value > 0, name


def test_uniform_batches_and_broken_gradients_make_no_step(caplog):
    warning_once.cache_clear()
    model = qwen2()
    rollout, before = draw(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert icpo.update(model, optimizer, rollout, on([0.0] * 12), settings())["grad_norm"] == 0
    metrics = icpo.update(model, optimizer, rollout, on([math.inf] * 12), settings())
    assert metrics["update/skipped"] == caplog.text.count("an update was skipped") == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    icpo.update(model, optimizer, rollout, on(torch.randn(12)), settings(max_grad_norm=0.01))
    moved = torch.cat([(value - before[name]).flatten() for name, value in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-2)
    optimizer = torch.optim.SGD(model.model.norm.parameters(), lr=0.0)  # gradients of others must not add up
    rollout, advantages = draw(model), on(torch.randn(12))
    once, again = (icpo.update(model, optimizer, rollout, advantages, settings()) for _ in range(2))
    assert once["grad_norm"] == pytest.approx(again["grad_norm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_that_were_not_sampled_stop_the_first_update_before_any_weight_moves(dtype):
    model = qwen2().to(dtype)
    rollout, before = draw(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    limit = 0.01 if DEVICE == "cpu" and dtype == torch.float32 else 0.1
    sampled = token_log_probs(model, rollout).detach()

    def update(difference):
        rollout.log_probs = sampled + difference * rollout.mask
        return icpo.update(model, optimizer, rollout, on(torch.randn(12)), settings())

    for wrong in (1.1 * limit, -1.1 * limit, math.nan):
        with pytest.raises(icpo.UserError, match="nats a token"):
            update(wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert update(0.9 * limit)["sampling/logp_difference"] == pytest.approx(0.9 * limit, abs=1e-5)
    update(-3)  # from the second step on it is a metric, and stops nothing


def test_weights_that_are_not_finite_end_the_run_though_they_leave_nothing_to_update(tiny):
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    example, optimizer = icpo.Example("", "", [5]), torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(icpo.UserError, match="no longer finite"):
        icpo.train_step(model, tokenizer, eos_ids, optimizer, [example], lambda *args: 1.0, settings())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_a_notebook_changes_nothing(tiny, default):
    def trained():
        model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return icpo.train_step(model, tokenizer, eos_ids, optimizer, [icpo.Example("", "", [5])],
                               lambda response, reference: len(response) % 3 / 3, settings())[1]

    expected = trained()
    torch.set_default_dtype(default)
    try:
        assert trained() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_rollout_metrics_by_hand():
    rollout = SimpleNamespace(
        entropies=torch.tensor([[1.0, 2.0], [3.0, 0.0]]), mask=torch.tensor([[1, 1], [1, 0]]).bool(),
        lengths=torch.tensor([2, 1]), truncated=torch.tensor([True, False]))
    rewards = torch.tensor([[0, 0.5, 0.5, 1], [1, 1, 1, 1], [0, 0, 0, 1]])  # at the mean, all equal, neither
    l = torch.tensor([[-1.0, -2.0, -4.0, -3.0], [-1.0] * 4, [-4.0, -3.0, -2.0, -1.0]])
    metrics = icpo.rollout_metrics(rollout, rewards, l, 1e4)
    # s: (-1, -1/3, 1, 1/3), 0 and (1, 1/3, -1/3, -1). A: (-1, 0, 0, 1) * first, 0 and (-1, -1, -1, 3) * last.
    first, last = math.sqrt(3 / 2), 1 / 2
    assert metrics == pytest.approx({
        "reward/verified": 7 / 12, "reward/std": (math.sqrt(1 / 6) + 1 / 2) / 3, "groups/uniform_frac": 1 / 3,
        "preference/agreement": (first * 4 / 3 - last * 4) / (first * 4 / 3 + last * (1 + 1 / 3 + 1 / 3 + 3)),
        "confidence/correct": (-3 - 4 - 1) / 6, "confidence/wrong": (-1 - 2 - 4 - 4 - 3 - 2) / 6,
        "confidence/overconfident_frac": 1 / 3, "entropy": 2.0, "length/mean": 1.5,
        "length/truncated_frac": 0.5})
    assert icpo.rollout_metrics(rollout, rewards, l, -1e4) == metrics  # it tells of the model, not of beta
    assert icpo.rollout_metrics(rollout, torch.ones(3, 4), l, 1.0)["confidence/wrong"] is None


# ------------------------------------------------------------------------------------------------- Whole runs

PLAIN = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}[assistant]{% endif %}")


def run(*flags):
    return icpo.main([str(flag) for flag in flags])


def in_a_process(*flags, cwd=None, **environment):
    command = [sys.executable, icpo.__file__, *map(str, flags)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


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


def edit(path, **changes):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved(folder, template=None, plain=(), special=(), make=Qwen2ForCausalLM, config=None, **changes):
    """Saves a tiny model in bf16, its byte-level tokenizer and data of one row; returns the tokenizer."""
    vocabulary = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"is": 256, "<|endoftext|>": 257}, merges=[("i", "s")])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.chat_template = template
    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=257) | changes
    make(config or Qwen2Config(**shape)).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "one.jsonl", [{"prompt": "1", "answer": "1"}])
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A saved model with a chat template, and a token that has no row: fine as long as no prompt has it."""
    folder = tmp_path_factory.mktemp("tiny")
    saved(folder, PLAIN, special=["<image>"], vocab_size=258)
    (folder / "generation_config.json").write_text('{"temperature": 0.9}')  # invalid when saved as it is
    return folder


def tiny_run(model, out, *flags):
    """The flags of a run of one step; where one is given twice, the later one holds."""
    return ["--model", model, "--train-data", model / "one.jsonl", "--output-dir", out, "--device", "cpu",
            "--max-new-tokens", 4, "--steps", 1, *flags]


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """The built-in task with a shorter apprenticeship to a less sloppy teacher."""
    folder = tmp_path_factory.mktemp("task") / "run"
    write_task(folder, Config(task_warmup_steps=500, task_teacher_error=0.7, device="cpu"))
    return folder / "task"


def task_run(task, out, *flags):
    """The flags of a short run on the built-in task, with a checkpoint in every step."""
    return tiny_run(
        task / "model", out, "--train-data", task / "train.jsonl", "--eval-data", task / "eval.jsonl",
        "--max-new-tokens", 32, "--micro-batch", 128, "--lr", 2e-4, "--steps", 12, "--save-every", 1,
        "--prompts-per-step", 4, "--group-size", 4, "--eval-rows", 4, "--eval-samples", 0, *flags)


def examples_of(folder, tokenizer, rows, **changes):
    data = write_jsonl(folder / "data.jsonl", rows)
    return icpo.load_examples(str(data), tokenizer, Config(max_new_tokens=9, **changes))


@pytest.mark.parametrize("direction", [1, -1], ids=["learns", "negated advantages un-learn"])
def test_task_learns(task, tmp_path, monkeypatch, direction):
    monkeypatch.setattr(icpo, "icpo_advantage", lambda *args: direction * icpo_advantage(*args))
    flags = ["--prompts-per-step", 16, "--group-size", 8, "--eval-rows", 128]
    assert run(*task_run(task, tmp_path / "run", *flags)) == 0
    first, *_, last = rows_of(tmp_path / "run/metrics.jsonl")
    assert (last["eval/accuracy"] - first["eval/accuracy"]) * direction > 0.1


def test_train_step_is_the_six_lines_of_the_header(tiny, tmp_path):
    """Called as in a notebook, with every number of its samples made again from the parts."""
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    before = copy.deepcopy(model)
    config = Config(group_size=4, max_new_tokens=6, lr=1e-2, alpha=0.3, beta=5.0, micro_batch=3)
    examples = examples_of(tmp_path, tokenizer, [{"prompt": f"{n} is", "answer": "1"} for n in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)
    metrics, samples = icpo.train_step(
        model, tokenizer, eos_ids, optimizer, examples, lambda text, reference: 1 / (len(text) % 3), config)
    torch.manual_seed(1)
    rollout = sample(before, [example.ids for example in examples], 4, 6, eos_ids)
    responses = tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
    l = [statistics.mean(row[:n]) for row, n in zip(rollout.log_probs.tolist(), rollout.lengths.tolist())]
    rewards = [{0: 0.0, 1: 1.0, 2: 0.5}[len(response) % 3] for response in responses]  # 1 / 0 fails, so 0
    groups = [slice(start, start + 4) for start in (0, 4, 8)]
    expected = [A for group in groups for A in loop_icpo(rewards[group], l[group], 0.3, 5.0)]
    assert any(expected) and len(samples) == 12
    assert [row["response"] for row in samples] == responses and [row["reward"] for row in samples] == rewards
    assert [row["prompt"] for row in samples] == [f"{b // 4} is" for b in range(12)]
    assert [row["confidence"] for row in samples] == pytest.approx(l, abs=1e-5)
    assert [row["advantage"] for row in samples] == pytest.approx(expected, abs=1e-4)
    assert metrics["reward/verified"] == pytest.approx(statistics.mean(rewards))
    assert metrics["reward/errors"] == rewards.count(0.0) > 0
    gradient, _ = update_gradient(before, rollout, torch.tensor(expected), lr=1e-2)
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before.parameters())])
    assert_close(moved, -0.1 * gradient, atol=1e-6, rtol=1e-3)


def test_own_model_and_data(tiny, tmp_path, monkeypatch, capfd):
    (tmp_path / "my_reward.py").write_text("def count(response, reference): return len(response) % 5 / 4")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "mine")
    edit(tmp_path / "mine/config.json", attention_dropout=0.1)
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "x" * 300, "solution": "1"}, *(
        {"question": f"What is {n} and {n}?", "solution": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(9))])
    assert run(*tiny_run(
        Path("mine"), "run", "--train-data", data, "--eval-data", data, "--prompt-key", "question",
        "--answer-key", "solution", "--max-new-tokens", 8, "--max-prompt-tokens", 200, "--steps", 2,
        "--prompts-per-step", 3, "--group-size", 4, "--eval-samples", 2, "--reward", "my_reward:count",
        "--system-prompt", "Brief.", "--kl-coef", 0.1, "--inner-epochs", 2, "--micro-batch", 5)) == 0
    assert "skipped 1 prompts" in capfd.readouterr().out
    metrics, samples = rows_of("run/metrics.jsonl"), rows_of("run/samples.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2] and len(samples) == 2 * 4
    explained = (ROOT / "results/README.md").read_text()
    assert len(metrics[2]) == 27 and all(f"`{name}`" in explained for name in set(metrics[2]) - {"step"})
    assert metrics[2]["reward/errors"] == 0 and metrics[2]["lr"] == pytest.approx(1e-6 * 2 / 5)
    assert metrics[2]["sampling/logp_difference"] < 1e-5 and type(metrics[2]["kl/ref"]) is float
    group, = torch.load("run/checkpoint/state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (metrics[2]["lr"], 0)
    assert {sample["reference"] for sample in samples} <= {row["solution"] for row in rows_of(data)}
    policy, tokenizer = (kind.from_pretrained("run/model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert policy.config.attention_dropout == 0.1  # it was off while training
    assert policy.dtype == torch.float32 and tokenizer("this").input_ids[-1] == 256
    # float32 masters: in bf16, two steps of at most 4e-7 would be lost, and yet most weights moved.
    old = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    moved = [(value != old[name]).flatten() for name, value in policy.named_parameters() if "layers" in name]
    assert torch.cat(moved).float().mean() > 0.5


def test_prompts_go_through_the_chat_template_and_references_stay_as_they_are(tiny, tmp_path):
    model, tokenizer, eos_ids = icpo.load_model(str(tiny), "cpu")
    assert eos_ids == [257] and model.dtype == torch.float32
    values = [72, 0.5, True, [12, 13], ["a"], {"target": 5, "numbers": [2, None]}, "plain"]
    rows = [{"prompt": "2+2 is 4", "answer": value} for value in [*values, "so\n#### 18", "\\boxed{4}"]]
    examples = examples_of(tmp_path, tokenizer, rows, system_prompt="S", prompt_suffix="!")
    assert {tokenizer.decode(example.ids) for example in examples} == {"[system]S[user]2+2 is 4![assistant]"}
    assert [example.reference for example in examples] == [row["answer"] for row in rows]
    example, *_ = examples_of(tmp_path, tokenizer, rows, prompt_suffix="!", no_chat_template=True)
    assert tokenizer.decode(example.ids) == "2+2 is 4!" and 256 in example.ids
    for tokenizer.chat_template in ("{{ messages[0].content }}", "{{ messages[1].content }}"):
        with pytest.raises(icpo.UserError, match="leaves out the prompt, or --system-prompt"):
            examples_of(tmp_path, tokenizer, rows, system_prompt="S")
    assert verify("The answer is 12, 13", [12, 13]) and not verify("The answer is 12", [12, 13])


def test_evaluation_equals_loops(tiny, capsys):
    def reward(text, reference):
        seen.append((text, reference, sum(map(ord, text)) % 3 / 2))
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


def test_random_numbers_follow_from_the_seed_and_the_step(tiny, tmp_path):
    responses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ["--steps", 2, "--seed", seed, "--lr", 1e-30, "--prompts-per-step", 1]
        assert run(*tiny_run(tiny, tmp_path / name, *flags)) == 0
        responses.append([row["response"] for row in rows_of(tmp_path / name / "samples.jsonl")])
    a, b, c = responses
    assert a == b and a != c and a[:8] != a[8:] and len(a) == 16


def test_every_example_once_an_epoch():
    taken = [i for step in range(1, 16) for i in icpo.batch_indices(10, step, 4, seed=0)]
    epochs = [taken[start:start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert icpo.batch_indices(10, 1, 10, seed=1) != epochs[0]


def test_failing_rewards_score_zero_are_counted_and_shown_once(caplog):
    class Reward(dict):  # without a hash
        def __call__(self, response, reference):
            return self[response]

    reward = Reward(a=1.0, b=math.nan, c="no number", d=1e300)
    for responses, shown in (("abcdea", "reward is nan"), ("acbdea", "'no number'"), ("adbcea", "overflow")):
        warning_once.cache_clear()
        caplog.clear()
        for _ in range(2):
            rewards, failed = icpo.score_responses(reward, list(responses), [icpo.Example("", "r", [])] * 3)
            assert rewards.tolist() == [[1, 0], [0, 0], [0, 1]]
            assert len(failed) == 4 and "KeyError('e')" in failed
        assert caplog.text.count(shown) == caplog.text.count("Traceback") == 1


def test_rewards_that_all_fail_end_the_first_step_and_no_later_one(tiny, tmp_path, monkeypatch, capfd):
    def reward(response, reference):
        calls.append(1)
        if len(calls) > working:
            raise (SystemExit, BaseException)[len(calls) % 2]("out of time")  # neither is an Exception
        return len(calls) % 2

    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    flags = ["--steps", 3, "--prompts-per-step", 1, "--group-size", 4]
    calls, working = [], 0
    assert "all 4 calls of the first step" in error_of(capfd, *tiny_run(tiny, tmp_path / "a", *flags))
    calls, working = [], 4
    assert run(*tiny_run(tiny, tmp_path / "b", *flags)) == 0
    assert [row.get("reward/errors") for row in rows_of(tmp_path / "b/metrics.jsonl")] == [None, 0, 4, 4]


def test_help_names_and_explains_every_flag_and_unknown_ones_are_refused(capsys):
    with pytest.raises(SystemExit, match="0"), contextlib.redirect_stdout(io.StringIO()):  # as in a notebook
        run("--help")
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    with pytest.raises(SystemExit, match="2"):
        run("--alhpa", 1)
    shown = capsys.readouterr()
    assert "unrecognized arguments: --alhpa 1\n" in shown.err
    text = re.sub(r"\s+", " ", shown.out)
    assert "0 is GRPO, below 1/G keeps the signs of its A (default: 0.1)" in text
    assert re.search(r"The method: --alpha .* --aggregation {token,sequence} .* Evaluation, ", text)
    for name in Config.__dataclass_fields__:
        assert re.search(rf"--{name.replace('_', '-')}( [A-Z_]+| {{[a-z,]+}})? [a-zA-Z]\w* ", text), name


def test_the_task_has_defaults_of_its_own_and_one_thread(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(icpo, "train", lambda config: seen.append((config, torch.get_num_threads())))
    for flags in ([], ["--lr", 0.5], ["--steps", 500], ["--model", "m", "--train-data", "d"]):
        torch.set_num_threads(2)
        assert run(*flags) == 0
    torch.set_num_threads(1)
    assert [(c.steps, c.max_new_tokens, c.micro_batch, c.lr, threads) for c, threads in seen] == [
        (60, 32, 128, 1e-4, 1), (60, 32, 128, 0.5, 1), (500, 32, 128, 1e-4, 1), (500, 512, 8, 1e-6, 2)]
    assert seen[3][0] == Config(model="m", train_data="d")
    config = prepare(Config(resume=True, output_dir=str(tmp_path)), tmp_path)
    assert config.model == f"{tmp_path}/task/model" and not any(tmp_path.iterdir())  # it was written before


def test_training_from_python_in_a_thread_has_the_defaults_of_a_model(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(model=tiny, train_data=tiny / "one.jsonl", steps=1, max_new_tokens=4, device="cpu")
    thread = threading.Thread(target=icpo.train, args=[config])
    thread.start()
    thread.join()
    assert rows_of(f"runs/{tiny.name}/metrics.jsonl")[1]["lr"] == pytest.approx(1e-6 / 5)
    assert Path(f"runs/{tiny.name}/model/config.json").exists()


def test_what_a_run_shows_fits_80_columns_of_ascii_and_tells_what_it_does(task, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "café 12+34=", "answer": "\ud800"}] * 2)
    flags = task_run(
        task, tmp_path / "run", "--train-data", data, "--eval-data", data, "--steps", 2, "--eval-every", 1,
        "--max-new-tokens", 5, "--eval-samples", 2, "--eval-rows", 1)
    shown = in_a_process(*flags, COLUMNS="80", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert shown.returncode == 0 and not re.search("Loading weights|model shards", shown.stderr), shown.stderr
    told = "cpu, 1 threads, 0.3M parameters, 2 prompts; an evaluation samples up to 15 tokens"
    assert told in shown.stdout
    line = r"accuracy 0.000, mean_at_k 0.000, pass_at_k 0.000: 'caf\\xe9 12\+34=' -> '."
    assert len(re.findall(line, shown.stdout)) == 3
    bars = [line for line in re.split(r"[\r\n]", shown.stderr) if "acc=" in line]
    values = r"acc=\d\.\d\d, reward=\d\.\d\d, entropy=\d"
    assert bars and all(len(line) <= 80 and re.search(values, line) for line in bars)
    assert shown.stderr.count("over half of the responses were cut") == 1  # of two steps
    assert {row["reference"] for row in rows_of(tmp_path / "run/samples.jsonl")} == {"\ud800"}


# ----------------------------------------------------------------------------------------------------- Faults

@pytest.mark.parametrize("flags, message", [
    ("--group-size 1", "--group-size: must be at least 2"), ("--alpha 0.5", "below 1/2"), ("--seed -1", "-1"),
    ("--beta inf", "--beta: must be finite"), ("--beta nan", "--beta: must be finite"), ("--steps 0", "0"),
    ("--lr nan", "--lr nan: must be above 0"), ("--clip-low -1", "--clip-low -1.0: must be at least 0"),
    ("--kl-coef -1", "--kl-coef"), ("--temperature 0", "--temperature"), ("--alpha -1", "--alpha -1"),
    ("--model=", "--model and --train-data need each other"), ("--train-data=", "need each other"),
    ("--model= --train-data= --eval-data good.jsonl", "--eval-data needs both"),
    ("--resume", "no checkpoint in"), ("--output-dir ~/run", "/proc/run/.lock cannot be written: [Errno 2]"),
    ("--output-dir .", "not empty"), ("--max-prompt-tokens 1", "no usable row"),
    ("--max-new-tokens 500", "context 256 less"),
    ("--reward nowhere:f", "No module named 'nowhere'"), ("--reward verify:nothing", "nothing"),
    ("--reward verify:MAX_BITS", "not a function"), ("--train-data .", "Is a directory"),
    ("--train-data absent.jsonl", "No such file or directory: 'absent.jsonl'"),
    ("--train-data ~/absent", "No such file or directory: '/proc/absent'"),
    ("--eval-data ~/absent", "No such file or directory: '/proc/absent'"),
    ("--model models/typo", "no such folder; We couldn"), ("--model a/b/c", "a/b/c: no such folder"),
    ("--model ~/absent", "/proc/absent: no such folder"), ("--model ./absent", "./absent: no such folder"),
    ("--model data.jsonl", "no LoRA adapter, no file"),
    pytest.param("--device cuda", "sees no CUDA GPU", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one"))])
def test_bad_flags_get_one_line_and_write_nothing(tiny, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/proc")  # where nothing can be written
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("data.jsonl").write_text("")
    assert message in error_of(capfd, *tiny_run(tiny, "new", *flags.split()))
    assert os.listdir() == ["data.jsonl"]


GOOD = '{"prompt": "1+1=", "answer": "2"}'


@pytest.mark.parametrize("name, text, message", [
    ("data.jsonl", f"{GOOD}\n\n{{oops\n", "data.jsonl, line 3: JSONDecodeError"),
    ("data.jsonl", f'{GOOD}\r\n{{"prompt": "1", "reply": "1"}}', "line 2: KeyError('answer') in"),
    ("data.jsonl", "prompt,answer\n1+1=,2\n", "data.jsonl, line 1: JSONDecodeError"),
    ("data.jsonl", "oops", "in b'oops'; give JSON Lines in UTF-8, in each 'prompt' and 'answer'"),
    ("data.jsonl", f"[{GOOD}]", "line 1: TypeError"), ("data.jsonl", "null", "line 1: TypeError"),
    ("data.jsonl", '{"prompt": 1, "answer": 1}', "no string for a prompt, or no answer"),
    ("data.jsonl", '{"prompt": "", "answer": null}', "no string for a prompt, or no answer"),
    ("data.jsonl", f"{GOOD}\né", "utf-8"), ("data.jsonl", "\n", "no usable row of 0"),
    ("data.jsonl", '{"prompt": "\\ud800", "answer": "1"}', "prompts that tokenizer and chat template take"),
    ("data.jsonl", '{"prompt": "<image>", "answer": "1"}', "a token beyond the 258 rows"),
    ("reward.py", "def f(", "SyntaxError"), ("reward.py", "import sys\nsys.exit()", "SystemExit"),
    ("model/chat_template.jinja", "no prompt", "the chat template leaves out the prompt"),
    ("model/chat_template.jinja", "{{ raise_exception('No system role') }}", "No system role"),
    ("model/chat_template.jinja", "{% if %}", "TemplateSyntaxError"),
    *(("model/chat_template.jinja", template, "chat template take") for template in (
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
    flags = tiny_run(Path("model"), "new", "--train-data", "data.jsonl", "--reward", reward)
    assert message in error_of(capfd, *flags)
    assert sorted(tmp_path.rglob("*")) == before


FEW = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2)
SOME = FEW | dict(num_attention_heads=4, intermediate_size=48, eos_token_id=257)


@pytest.mark.parametrize("kind, config, message", [
    ("Qwen2Model", Qwen2Config(**SOME), "no weights in it for lm_head"),
    ("Qwen2ForSequenceClassification", Qwen2Config(**SOME), "no weights in it for lm_head"),
    ("Qwen2ForCausalLM", Qwen2Config(**SOME | {"vocab_size": 250}), "tokenizer of 258, model of 250 tokens"),
    ("Qwen2ForCausalLM", Qwen2Config(**SOME | {"eos_token_id": None}), "no eos token"),
    ("MambaForCausalLM", transformers.MambaConfig(**FEW), "nats a token"),  # states in place of a cache
    ("RwkvForCausalLM", transformers.RwkvConfig(**FEW, attention_hidden_size=32), "nats a token"),
    ("BertForMaskedLM", transformers.BertConfig(**SOME), "nats a token"),  # looks ahead
    ("OpenAIGPTLMHeadModel", transformers.OpenAIGPTConfig(vocab_size=258, n_embd=36), "--model")])  # no cache
def test_models_that_cannot_be_trained_get_one_line_and_write_nothing(tmp_path, capfd, kind, config, message):
    make = getattr(transformers, kind)
    tokenizer = saved(tmp_path / "model", make=lambda config: scaled(lambda: make(config)), config=config)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert message in error_of(capfd, *tiny_run(tmp_path / "model", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_hub_that_fails_a_check_is_not_called_a_missing_folder(tiny, monkeypatch):
    monkeypatch.setattr(icpo, "token_log_probs", lambda model, rollout: 0 * rollout.log_probs)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(icpo.UserError, match=rf"--model {tiny}: sampled \(with a cache\) and scored"):
        icpo.load_model(str(tiny), "cpu")


def test_a_folder_belongs_to_one_run_of_the_same_settings_and_data(tiny, tmp_path, capfd):
    paths = [write_jsonl(tmp_path / name, [{"prompt": "1", "answer": "1"}] * 2) for name in ("train", "eval")]
    flags = tiny_run(tiny, tmp_path / "run", "--train-data", paths[0], "--eval-data", paths[1])
    lock = icpo.claim(tmp_path / "run")
    assert "use an --output-dir no run is in" in in_a_process(*flags).stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    lock.lock.release()
    assert run(*flags) == 0
    assert "is not empty" in error_of(capfd, *flags)
    free = ["--micro-batch", 3, "--gradient-checkpointing", "--save-every", 9, "--steps", 2]
    assert "began with another {'beta': 10.0}" in error_of(capfd, *flags, "--resume", "--beta", 3, *free)
    assert run(*flags, "--resume", *free) == 0
    for path, answers in itertools.product(paths, ("1", "12", "111")):
        whole = path.read_bytes()
        write_jsonl(path, [{"prompt": "1", "answer": answer} for answer in answers])
        assert "began with another {'data" in error_of(capfd, *flags, "--resume", "--steps", 3)
        path.write_bytes(whole)
    checkpoint, log = tmp_path / "run/checkpoint/state.pt", tmp_path / "run/metrics.jsonl"
    log.write_bytes(log.read_bytes()[:1])
    assert run(*flags, "--resume", "--steps", 2) == 0 and log.read_bytes() == b"{"  # not filled up
    whole = checkpoint.read_bytes()
    torch.save(torch.load(checkpoint, weights_only=True) | {"policy": {}}, checkpoint)
    assert "--model is another by now" in error_of(capfd, *flags, "--resume", "--steps", 3)
    checkpoint.write_bytes(whole[:999])
    assert "is damaged" in error_of(capfd, *flags, "--resume", "--steps", 3)


def result_of(out):
    """The checkpoint, and the logs without their times."""
    state, logs = torch.load(out / "checkpoint/state.pt", weights_only=True), []
    for row in rows_of(out / "metrics.jsonl") + rows_of(out / "samples.jsonl"):
        logs.append({name: value for name, value in row.items() if not name.startswith("time/")})
    tensors = torch.utils._pytree.tree_leaves([state["policy"], state["optimizer"]])
    return state["step"], [torch.as_tensor(x).tolist() for x in tensors if x is not None], logs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_the_step_in_hand(task, tmp_path, number):
    flags = map(str, task_run(task, tmp_path / "run", "--save-every", 100))
    process = subprocess.Popen([sys.executable, icpo.__file__, *flags], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(rows_of(log)) > 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in shown and "Traceback" not in shown, shown
    step = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)["step"]
    assert 2 <= step == len(rows_of(log)) - 1 < 12


@pytest.mark.skipif("SLOW" not in os.environ, reason="takes half a minute; SLOW=1 python -m pytest runs it")
def test_killed_at_random_moments_a_run_ends_as_an_unbroken_one(task, tmp_path):
    def process(out, *flags):
        flags = list(map(str, task_run(task, out, *flags)))
        process = context.Process(target=icpo.main, args=[flags])
        process.start()
        return process

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["icpo"])  # saves each process the seconds that it takes to import torch
    out, checkpoint = tmp_path / "run", tmp_path / "run/checkpoint/state.pt"
    for name in ("first", "whole"):  # the first time the server still imports torch
        begin = time.perf_counter()
        process(tmp_path / name).join()
        seconds = time.perf_counter() - begin
    expected, random_, ended = result_of(tmp_path / "whole"), random.Random(0), 0
    for _ in range(20):
        if not checkpoint.exists():
            shutil.rmtree(out, ignore_errors=True)
        running = process(out, *["--resume"] * checkpoint.exists())
        running.join(random_.random() * seconds)  # while it reads, evaluates, trains or saves
        running.kill()
        running.join()
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


def test_after_a_full_disk_a_lost_log_and_a_move_a_run_ends_as_an_unbroken_one(task, tmp_path, capsys):
    # capsys, not capfd, whose file would have the limit too
    out, log, flags = tmp_path / "run", tmp_path / "run/metrics.jsonl", ["--eval-every", 2, "--kl-coef", 0.1]
    resumed = task_run(task, out, *flags, "--steps", 4, "--resume")
    assert run(*task_run(task, out, *flags, "--steps", 2)) == 0
    with files_of_at_most(100_000):
        error = error_of(capsys, *resumed)
    assert f"{out / 'checkpoint/state.pt'} cannot be written" in error and "make room" in error
    kept = log.read_bytes().splitlines(keepends=True)[:3]
    with files_of_at_most(sum(map(len, kept)) + 99):  # in the middle of a line
        assert ".jsonl cannot be written" in error_of(capsys, *resumed)
    log.rename(tmp_path / "log")
    assert f"No such file or directory: '{log}'" in error_of(capsys, *resumed)
    (tmp_path / "log").rename(log)
    out.rename(tmp_path / "moved")
    assert run(*resumed, "--output-dir", tmp_path / "moved") == 0
    assert run(*task_run(task, tmp_path / "whole", *flags, "--steps", 4)) == 0
    step, weights, logs = result_of(tmp_path / "whole")
    assert result_of(tmp_path / "moved") == (step, weights, logs)
    assert step == 4 and len(weights) > 60 and len(logs) == 5 + 4 * 4 and logs[4]["kl/ref"] > 0


def test_no_room_or_no_folder_for_the_task_is_one_line(tmp_path, capfd):
    flags = ["--task-warmup-steps", 1, "--device", "cpu", "--output-dir"]
    with files_of_at_most(500_000):  # the sums fit in, 0.3M parameters do not
        assert f"{tmp_path / 'run/task'} cannot be written" in error_of(capfd, *flags, tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "cannot be written: [Errno 20] Not a directory" in error_of(capfd, *flags, tmp_path / "file/run")


def test_checkpoints_are_saved_every_save_every_steps_and_at_the_end(tiny, tmp_path, monkeypatch):
    saved_at = []
    monkeypatch.setattr(icpo, "save_checkpoint", lambda out, step, *rest: saved_at.append(step))
    assert run(*tiny_run(tiny, tmp_path / "run"), "--steps", 5, "--save-every", 2) == 0
    assert saved_at == [0, 2, 4, 5]


def test_out_of_memory_names_the_flags(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(icpo, "update", lambda *args: torch.empty(2**50))
    assert "lower --micro-batch" in error_of(capfd, *tiny_run(tiny, tmp_path / "run"))


# -------------------------------------------------------------------------------- What people bring, and meet

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def texts(tokenizer, responses, openings=("",), truncated=False):
    """What the reward gets of these responses to one prompt, or to prompts that end with these openings."""
    cut = torch.full((len(responses),), truncated)
    rollout = SimpleNamespace(lengths=cut, truncated=cut, responses=lambda: responses)
    return icpo.texts_of(rollout, tokenizer, [icpo.Example("", "", [5], opening) for opening in openings])


@pytest.mark.parametrize("end, opening", [
    ("<think>\n", "<think>\n"), ("", ""), ("<think>\n\n", "<think>\n\n"), ("<think>\n\n</think>\n\n", "")])
def test_a_thought_that_the_template_opens_belongs_to_the_response(tmp_path, end, opening):
    saved(tmp_path, template=CHATML.replace("assistant\n{% endif", f"assistant\n{end}{{% endif"))
    tokenizer = icpo.load_model(str(tmp_path), "cpu")[1]
    example, = examples_of(tmp_path, tokenizer, [{"prompt": "Write <think> first.", "answer": "7"}])
    assert example.opening == opening and tokenizer.decode(example.ids).startswith("<|im_start|>user")
    ids = tokenizer("maybe 3+4=7").input_ids
    cut, other = texts(tokenizer, [ids, ids], [example.opening, "<x>"], truncated=True)
    assert (cut, other) == (opening + "maybe 3+4=7", "<x>maybe 3+4=7") and verify(cut, "7") is (opening == "")


@pytest.mark.parametrize("kind", ["plain", "special"])
def test_the_token_that_closes_a_message_is_all_that_the_reward_does_not_see(tmp_path, kind):
    tokenizer = saved(tmp_path, CHATML, **{kind: ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    assert icpo.load_model(str(tmp_path), "cpu")[2] == [257, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    written = "<think>3 + 4 .</think>7"
    for end in ("<|im_end|>", "<|endoftext|>"):
        ids = tokenizer(written + end).input_ids
        assert texts(tokenizer, [ids, ids[-1:]]) == [written, ""]
        assert texts(tokenizer, [ids], truncated=True) == [written + end]  # the last token did not end it
    for template in (PLAIN, "{{ 1 / 0 }}", None):
        tokenizer.chat_template = template
        assert icpo.closing_token(tokenizer) == set()


def test_a_prompt_begins_once_and_does_not_end(tmp_path):
    tokenizer = saved(tmp_path, special=["<s>", "</s>"])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    plain, config = tokenizer("2+2").input_ids, Config(max_new_tokens=9)
    processor = importlib.import_module("tokenizers.processors").TemplateProcessing
    for single in ("$A", "<s> $A", "$A </s>", "<s> $A </s>"):
        added = processor(single=single, special_tokens=[("<s>", bos), ("</s>", eos)])
        tokenizer.backend_tokenizer.post_processor = added
        begun = [bos] if "<s>" in single else []
        assert icpo.encode("2+2", tokenizer, config) == (begun + plain, "")
        assert icpo.encode("<s>2+2", tokenizer, config) == ([bos, *plain], "")
        assert icpo.encode("2+2 <think>", tokenizer, config)[1] == "<think>"


def test_a_template_that_tells_the_time_leaves_resume_possible(tmp_path, capfd):
    saved(tmp_path / "model", template=PLAIN.replace("[assistant]", "{{ strftime_now('%f') }}[assistant]"))
    flags = tiny_run(tmp_path / "model", tmp_path / "run", "--reward", "operator:eq")
    assert run(*flags) == run(*flags, "--resume", "--steps", 2) == 0


@pytest.mark.parametrize("settings", [
    {"early_stopping": True}, {"length_penalty": 0.6}, {"output_scores": True}, {"pad_token_id": -1},
    {"temperature": 0.9}, {"top_k": 7, "do_sample": True}], ids=str)
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_what_could_not_be_saved_is_mended_before_the_first_step(tiny, tmp_path, settings, place):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [257, 9]}')
    edit(tmp_path / "model" / place, **settings)
    assert run(*tiny_run(tmp_path / "model", tmp_path / "run")) == 0
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").generation_config.eos_token_id
    assert {257, 9} <= set(ends)


def test_a_process_that_a_reward_forks_does_not_train_on(monkeypatch):
    parent = os.getpid()

    def forks(response, reference):
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)  # as in a child
        sys.exit()

    with pytest.raises(SystemExit):
        icpo.score_responses(forks, ["a"], [icpo.Example("", "r", [])])


def test_signals_end_what_a_reward_forks_and_the_second_one_of_either_kind_the_run():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    began, begins = os.pipe()
    with icpo.caught_signals() as caught:
        for number in (signal.SIGINT, signal.SIGTERM):
            if (child := os.fork()) == 0:
                try:
                    os.write(begins, b".")
                    time.sleep(20)
                    os._exit(1)
                finally:  # KeyboardInterrupt, as Python has it
                    os._exit(-number % 256)
            os.read(began, 1)
            os.kill(child, number)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-number, -number % 256)
        assert not caught
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # outside of a run a fork changes nothing
    if (child := os.fork()) == 0:
        os._exit(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def test_a_pool_that_a_reward_terminates_ends(tiny, tmp_path):
    """Its workers may be told to end in the very moment in which they begin."""
    (tmp_path / "pooled.py").write_text(
        "import multiprocessing\ndef f(response, reference):\n"
        "    pool = multiprocessing.get_context('fork').Pool(2)\n"
        "    x = pool.map(len, [response])[0]\n"
        "    pool.terminate()\n    pool.join()\n    return x % 2\n")
    flags = ["--steps", 2, "--prompts-per-step", 4, "--reward", "pooled:f"]
    assert in_a_process(*tiny_run(tiny, "run", *flags), cwd=tmp_path).returncode == 0
    assert rows_of(tmp_path / "run/metrics.jsonl")[-1]["reward/errors"] == 0


def test_a_reward_that_changes_the_folder_leaves_the_run_where_it_was(tiny, tmp_path, monkeypatch):
    def moving(response="", reference=""):
        os.chdir("/")
        torch.set_grad_enabled(False)  # for everyone
        return len(response) % 2

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "mine")
    monkeypatch.setattr(icpo, "load_reward", lambda spec: moving() or moving)
    try:
        assert run(*tiny_run(Path("mine"), "run", "--eval-data", "mine/one.jsonl", "--steps", 2)) == 0
    finally:
        torch.set_grad_enabled(True)
    assert (tmp_path / "run/model/config.json").exists() and len(rows_of(tmp_path / "run/metrics.jsonl")) == 3


def test_an_old_python_is_told_so():
    source = Path(icpo.__file__).read_text().split("\nimport contextlib")[0]
    python = SimpleNamespace(version_info=(3, 10), exit=sys.exit)
    with pytest.raises(SystemExit, match="Python 3.10; 3.11 or newer"):
        exec(source.replace("import sys\n", ""), {"sys": python})


# --------------------------------------------------------------------------------------------------- Verifier

@pytest.mark.parametrize("a, b, equal", [
    ("0.75", r"\frac{3}{4}", True), ("75%", "3/4", True), ("1.5e3", "1,500", True), ("x = 5", "5", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True), (r"2 \cdot 8 = 16", "16", True), (r"\{1, 2\}", r"\{2,1\}", True),
    ("(1, 2)", "(1,2.0)", True), ("(1, 2)", "(2, 1)", False), ("1 or 2", "1", False), ("0.333", "1/3", False),
    (r"2 \cdot 8 = 15", "15", False), (r"\pi", "3.14", False), ("12,34", "1234", False),
    ("72057594037927937", "72057594037927936", False)])
def test_equivalence_is_exact(a, b, equal):
    assert is_equivalent(a, b) is is_equivalent(b, a) is equal
