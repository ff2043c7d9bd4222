"""The proof of icpo.py's formulas: offline, on tiny models made in memory. Run: python -m pytest -q test_icpo.py

Each formula is held against an oracle that shares no code with it: numbers by hand, a plain Python loop, or
transformers' own generate and forward. Whole runs and the verifier have their tests in tests/.
"""

import bisect
import contextlib
import copy
import inspect
import itertools
import math
import os
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import (
    AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM)
from transformers.utils.logging import warning_once

import icpo
from icpo import (
    Config, Example, group_advantage, icpo_advantage, policy_loss, preference_advantage, sample,
    score_responses, sequence_log_prob, token_log_probs, train_step, uniform_groups)

torch.set_num_threads(1)  # several threads that wait for each other crawl on a busy machine
LN3 = math.log(3)


def random_groups(P=30, G=5, seed=0):
    """Confidences (P, G) between -3 and 0, in multiples of 1/1024: their differences have no rounding."""
    generator = torch.Generator().manual_seed(seed)
    return -torch.randint(0, 3 * 1024, (P, G), generator=generator) / 1024


# ------------------------------------------------------------------------------------------------- Confidence

@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_l_is_the_mean_over_the_tokens_of_the_response(dtype):
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, math.nan], [-4.0, 9.0, 9.0, 9.0]])  # rubbish in the padding
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=dtype)
    assert sequence_log_prob(log_probs, mask).tolist() == [-2.0, -4.0]
    assert sequence_log_prob(log_probs, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_l_is_float32_whatever_the_log_probs_are():
    neighbors = torch.tensor([[-1.0, -1.0078125]], dtype=torch.bfloat16)  # no number of bf16 is between them
    assert sequence_log_prob(neighbors, torch.ones(1, 2)).tolist() == [-1.00390625]


# --------------------------------------------------------------------------------------- Preference advantage

def loop_preference(l, beta):
    """The definition, one pair at a time, from the Bradley-Terry probability that i is preferred to j."""
    scores = []
    for i in range(len(l)):
        against = []
        for j in range(len(l)):
            if j != i:
                preferred = 1 / (1 + math.exp(-beta * (l[j] - l[i])))
                against.append(2 * preferred - 1)
        scores.append(sum(against) / len(against))
    return scores


@pytest.mark.parametrize("beta", [10.0, 0.5, -3.0])
def test_s_is_its_definition(beta):
    l = random_groups()
    expected = torch.tensor([loop_preference(group, beta) for group in l.tolist()])
    assert_close(preference_advantage(l, beta), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("l, beta, expected", [
    # A gap of ln 3 at beta 1 is a preference of 3/4, so a score of 2 * 3/4 - 1 = 1/2; 2 ln 3: 9/10, so 4/5.
    ([0.0, -LN3], 1.0, [-0.5, 0.5]), ([0.0, -LN3 / 10], 10.0, [-0.5, 0.5]),
    ([0.0, -LN3, -2 * LN3], 1.0, [-0.65, 0.0, 0.65])])
def test_s_by_hand(l, beta, expected):
    assert_close(preference_advantage(torch.tensor([l]), beta), torch.tensor([expected]))


@pytest.mark.parametrize("beta", [0.1, 10.0, 1e6])
def test_s_sums_to_zero_over_a_group_and_lies_between_minus_one_and_one(beta):
    s = preference_advantage(torch.cat([random_groups(), random_groups() * 1000]), beta)
    assert_close(s.sum(dim=1), torch.zeros(60), atol=1e-6, rtol=0)
    assert s.abs().max() <= 1 and s.abs().amax(dim=1).min() > 0


def test_s_ignores_a_constant_added_to_all_l():
    l = random_groups()
    assert torch.equal(preference_advantage(l + 4, 10.0), preference_advantage(l, 10.0))


def test_s_permutes_with_its_group():
    l, order = random_groups(), [3, 0, 4, 1, 2]
    assert_close(preference_advantage(l[:, order], 2.0), preference_advantage(l, 2.0)[:, order])


def test_s_of_a_group_does_not_depend_on_other_groups():
    l = random_groups()
    each = [preference_advantage(group[None], 2.0) for group in l]
    assert_close(preference_advantage(l, 2.0), torch.cat(each))


def test_as_beta_grows_s_is_wins_minus_losses_over_the_number_of_others():
    l = (random_groups(100) * 2).round()  # many ties
    ranked = [[(sum(y > x for y in group) - sum(y < x for y in group)) / 4 for x in group] for group in l.tolist()]
    assert len({len(set(group)) for group in l.tolist()}) > 2
    assert_close(preference_advantage(l, 1e6), torch.tensor(ranked))


def test_minus_beta_negates_s():
    assert_close(preference_advantage(random_groups(), -2.0), -preference_advantage(random_groups(), 2.0))


@pytest.mark.parametrize("G", range(2, 17))
def test_s_of_ties_is_exactly_zero(G):
    for l in (-0.7, -1e-3, -20.1):
        assert torch.equal(preference_advantage(torch.full((3, G), l), 1e6), torch.zeros(3, G))


def test_a_group_of_one_is_refused():
    one = torch.zeros(1, 1)
    for function in (lambda: preference_advantage(one, 1.0), lambda: icpo_advantage(one, one, 0.1, 1.0)):
        with pytest.raises(ValueError, match="at least 2"):
            function()


# ---------------------------------------------------------------------------------- Group and ICPO advantages

def loop_advantage(group):
    if len(set(group)) == 1:
        return [0.0] * len(group)
    return [(r - statistics.mean(group)) / statistics.stdev(group) for r in group]


def loop_icpo(rewards, l, alpha, beta):
    joined = [r + alpha * s for r, s in zip(rewards, loop_preference(l, beta))]
    return loop_advantage(joined if len(set(rewards)) > 1 else rewards)


def binary_rewards(G):
    """All groups of 0 and 1 that have both."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=G))[1:-1])


def test_a_is_its_definition():
    rewards, l = random_groups(seed=2).remainder(1).mul(3).floor() / 2, random_groups()  # 0, 0.5 and 1
    expected = [loop_icpo(*group, 0.3, 7.0) for group in zip(rewards.tolist(), l.tolist())]
    assert_close(icpo_advantage(rewards, l, 0.3, 7.0), torch.tensor(expected), atol=1e-5, rtol=0)


def test_alpha_zero_is_grpo_to_the_bit():
    rewards = random_groups(seed=2)
    assert torch.equal(icpo_advantage(rewards, random_groups(), 0.0, 7.0), group_advantage(rewards))


def test_the_std_of_a_group_is_unbiased():
    A = group_advantage(torch.tensor([[1.0] + [0.0] * 7]))
    assert_close(A, torch.tensor([[math.sqrt(8) * 7 / 8] + [-math.sqrt(8) / 8] * 7]))  # 2.474; biased: 2.646


@pytest.mark.parametrize("alpha, beta", [(0.499, 1e4), (0.499, -1e4), (0.199, 1e4), (Config.alpha, Config.beta)])
@pytest.mark.parametrize("wrong", ["random", "repetitive", "rambling"])
def test_alpha_below_a_half_ranks_correct_first_and_below_one_over_g_keeps_the_signs(alpha, beta, wrong):
    rewards, l = binary_rewards(5), random_groups()
    if wrong != "random":  # log-probs near 0, or far below those of the correct responses
        l = torch.where(rewards == 1, -0.2, {"repetitive": -1e-4, "rambling": -5.0}[wrong])
    A = icpo_advantage(rewards, l, alpha, beta)
    lowest_correct = torch.where(rewards == 1, A, math.inf).amin(dim=1)
    highest_wrong = torch.where(rewards == 0, A, -math.inf).amax(dim=1)
    assert (lowest_correct > highest_wrong).all()
    assert alpha > 1 / 5 or (lowest_correct > 0).all() and (highest_wrong < 0).all()


@pytest.mark.parametrize("beta", [10.0, -10.0, 1e6])
@pytest.mark.parametrize("of_correct, of_wrong", [(-0.5, -0.1), (-0.1, -0.5), (-2.0, -1e-4)])
def test_where_all_correct_share_one_l_and_all_wrong_another_a_is_that_of_grpo(of_correct, of_wrong, beta):
    rewards = binary_rewards(8)
    l = torch.where(rewards == 1, of_correct, of_wrong)
    assert_close(icpo_advantage(rewards, l, 0.4, beta), group_advantage(rewards), atol=1e-6, rtol=0)


def test_with_three_values_of_l_a_is_not_that_of_grpo():
    rewards = binary_rewards(8)
    for l in itertools.product([-0.2, -0.4, -0.6], repeat=8):
        if len(set(l)) == 3 and l[:3] == (-0.2, -0.4, -0.6):  # three among eight: 3^5 groups
            A = icpo_advantage(rewards, torch.tensor([l]).expand_as(rewards), 0.1, 10.0)
            assert ((A - group_advantage(rewards)).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.6, 0.7, 0.9, 1.0, -5.0])
def test_equal_rewards_give_exactly_zero_or_if_asked_alpha_times_s(reward):
    for G in range(2, 17):
        rewards, l = torch.full((3, G), reward), random_groups(3, G)
        assert torch.equal(group_advantage(rewards), torch.zeros(3, G))
        assert torch.equal(icpo_advantage(rewards, l, 0.4, 10.0), torch.zeros(3, G))
        kept = icpo_advantage(rewards, l, 0.4, 10.0, keep_uniform_groups=True)
        expected = 0.4 * torch.tensor([loop_preference(group, 10.0) for group in l.tolist()])
        assert_close(kept, expected, atol=1e-6, rtol=0)


def test_rounding_is_no_difference_in_reward_but_a_small_one_is():
    rewards = torch.full((1, 8), 0.7)
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))
    for scale in (1, -1, 1e4):
        assert uniform_groups(scale * rewards).all() and group_advantage(scale * rewards).eq(0).all()
    assert group_advantage(torch.tensor([[0.7, 0.7, 0.7, 0.701]])).abs().max() > 1


def test_nothing_flows_through_a_and_its_inputs_stay_as_they_are():
    rewards, l = random_groups(seed=1).requires_grad_(), random_groups().requires_grad_()
    for A in (icpo_advantage(rewards, l, 0.3, 5.0), icpo_advantage(rewards, l, 0.3, 5.0, True),
              preference_advantage(l, 5.0), group_advantage(rewards)):
        assert not A.requires_grad and A.dtype == torch.float32
    assert torch.equal(rewards, random_groups(seed=1)) and torch.equal(l, random_groups())


@pytest.mark.parametrize("function", [
    sequence_log_prob, preference_advantage, uniform_groups, group_advantage, icpo_advantage, policy_loss])
def test_the_functions_work_pasted_alone(function):
    l, mask = random_groups(), random_groups(seed=1) < -1
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


@pytest.fixture
def batch():
    """Arguments of policy_loss for five responses, with rubbish in the padding."""
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 5])[:, None]
    numbers = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.4 - 1
    log_probs, old, ref = torch.where(mask, numbers[:3], torch.nan)
    return dict(log_probs=log_probs.requires_grad_(), old_log_probs=old, advantages=numbers[3, :, 0] + 1,
                mask=mask, ref_log_probs=ref, kl_coef=0.3, clip_low=0.1, clip_high=0.3)


def loop_terms(batch):
    """For each token: its loss, whether its ratio is clipped, and its estimates of both KLs."""
    rows = []
    for b, length in enumerate(batch["mask"].sum(dim=1).tolist()):
        rows.append([])
        for t in range(length):
            new, old, ref = (math.exp(batch[name + "log_probs"][b, t].item()) for name in ("", "old_", "ref_"))
            ratio, A = new / old, batch["advantages"][b].item()
            bounded = min(max(ratio, 0.9), 1.3)
            kl_old, kl_ref = ratio - math.log(ratio) - 1, ref / new - math.log(ref / new) - 1
            loss = -min(ratio * A, bounded * A) + 0.3 * kl_ref
            rows[-1].append((loss, bounded * A < ratio * A, kl_old, kl_ref))
    return rows


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_loss_equals_a_loop_over_tokens_and_the_stats_are_its_sums(batch, dtype):
    losses, clipped, kl_old, kl_ref = zip(*itertools.chain(*loop_terms(batch)))
    loss, stats = policy_loss(**batch | dict(mask=batch["mask"].to(dtype)))
    assert loss.item() == pytest.approx(statistics.mean(losses))
    assert (stats["tokens"], stats["clipped"]) == (18, sum(clipped)) and 0 < sum(clipped) < 18
    assert (stats["kl_old"].item(), stats["kl_ref"].item()) == pytest.approx((sum(kl_old), sum(kl_ref)))


def test_aggregation_sequence_weights_all_responses_equally(batch):
    means = [statistics.mean(loss for loss, *_ in row) for row in loop_terms(batch)]
    assert policy_loss(**batch, aggregation="sequence")[0].item() == pytest.approx(statistics.mean(means))
    with pytest.raises(ValueError, match="mean"):
        policy_loss(**batch, aggregation="mean")


@pytest.mark.parametrize("aggregation, normalizer", [("token", 18), ("token", torch.tensor(18)), ("sequence", 5)])
def test_with_the_normalizer_of_the_whole_batch_losses_of_micro_batches_add_up(batch, aggregation, normalizer):
    whole, total = policy_loss(**batch, aggregation=aggregation)[0], 0.0
    for rows in (slice(0, 1), slice(1, 5)):
        part = {name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()}
        total += policy_loss(**part, aggregation=aggregation, normalizer=normalizer)[0].item()
    assert total == pytest.approx(whole.item())


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_padding_gets_no_gradient_and_the_inputs_of_the_loss_stay_as_they_are(batch, aggregation):
    before, mask = copy.deepcopy(batch), batch["mask"]
    gradient, = torch.autograd.grad(policy_loss(**batch, aggregation=aggregation)[0], batch["log_probs"])
    assert gradient[mask].ne(0).any() and gradient[~mask].eq(0).all()
    assert_close(batch, before, rtol=0, atol=0, equal_nan=True)
    nothing = policy_loss(**batch | dict(mask=torch.zeros_like(mask)), aggregation=aggregation)[0]
    assert nothing == 0


def test_the_kl_estimator_is_unbiased_and_points_from_the_policy_to_the_reference():
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


def test_the_worked_example_of_the_readme():
    table = (Path(icpo.__file__).parent / "README.md").read_text().replace("−", "-")
    rows = [row.split("|")[2:7] for row in re.findall(r"^\| (?:correct|wrong), .*", table, re.MULTILINE)]
    columns = torch.tensor([[float(x.strip("* ")) for x in row] for row in rows]).T
    l, s, R, of_grpo, of_icpo = columns[:, None]
    close = dict(atol=5e-4, rtol=0)
    assert_close(preference_advantage(l, Config.beta), s, **close)
    assert_close(group_advantage(R), of_grpo, **close)
    assert_close(icpo_advantage(R, l, Config.alpha, Config.beta), of_icpo, **close)
    assert R.tolist() == [[1, 1, 0, 0]]


# --------------------------------------------------------------------------------------- Sampling and scoring

DEVICE = os.environ.get("ICPO_TEST_DEVICE", "cpu")  # of the sampler, the scorer and the update
if DEVICE != "cpu":  # in float32, since bf16 autocast would leave nothing exact to compare
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
VOCAB, EOS = 23, 7
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


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
    return scaled(lambda: Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=EOS, bos_token_id=None, pad_token_id=0)))


def gpt2():  # absolute positions and dropout
    return scaled(lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, embd_pdrop=0.1,
        attn_pdrop=0.1, eos_token_id=EOS, bos_token_id=None)))


@pytest.fixture(params=["qwen2", "grouped", "gpt2"])
def model(request):
    model = gpt2() if request.param == "gpt2" else qwen2()
    if request.param == "grouped":  # as load_model sets it
        AttentionInterface.register("grouped", icpo.grouped_attention)
        AttentionMaskInterface.register("grouped", AttentionMaskInterface()["sdpa"])
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


@pytest.fixture(params=[1.0, 0.7])
def nine(request, model):
    """A temperature, and nine rows drawn at it; some end, among them one at the id of the padding."""
    model.generation_config.update(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1)
    rollout = draw(model, 3, 8, seed=4, temperature=request.param, eos_ids=[EOS, 0, 11, 14])
    assert len(set(rollout.lengths.tolist())) > 2
    return request.param, rollout


def test_a_sampled_row_is_what_it_would_be_alone_whatever_the_generation_config_asks_for(model, nine):
    temperature, rollout = nine
    uniforms = torch.rand(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).tolist()
    for b, response in enumerate(rollout.responses()):
        prompt, n = PROMPTS[b // 3], len(response)
        assert rollout.prompts[b, -rollout.prompt_lengths[b]:].tolist() == prompt
        log_p = alone(model, prompt, response, temperature).detach()
        inverse_cdf = zip(log_p.exp().cumsum(dim=1).tolist(), uniforms[b])
        assert response == [bisect.bisect(sums, uniform) for sums, uniform in inverse_cdf]
        assert_close(rollout.log_probs[b, :n].double(), log_p[range(n), response], atol=1e-5, rtol=0)
        assert_close(rollout.entropies[b, :n].double(), -(log_p.exp() * log_p).sum(dim=1), atol=1e-4, rtol=0)
        assert rollout.ids[b, n:].eq(PROMPTS[0][0]).all()  # the padding is a token in use
        assert rollout.log_probs[b, n:].eq(0).all() and rollout.entropies[b, n:].eq(0).all()


def test_a_scored_row_is_what_it_would_be_alone_whatever_is_in_the_padding(model, nine):
    temperature, rollout = nine
    inside = on(range(5)) >= 5 - rollout.prompt_lengths[:, None]
    padded = copy.copy(rollout)
    padded.prompts = pad(torch.where(inside, rollout.prompts, 13), (6, 0), value=EOS)
    padded.ids = pad(torch.where(rollout.mask, rollout.ids, 13), (0, 6), value=EOS)
    scored = token_log_probs(model, padded, temperature)
    assert scored.dtype == torch.float32 and scored.shape == padded.ids.shape
    assert_close(scored[padded.mask].double(), plain_log_probs(model, rollout, temperature), atol=1e-5, rtol=0)
    assert scored[~padded.mask].eq(0).all()


def test_a_row_ends_with_its_first_end_token_or_is_truncated(nine):
    _, rollout = nine
    for b, response in enumerate(rollout.responses()):
        ends = [token in (EOS, 0, 11, 14) for token in response]
        assert not any(ends[:-1]) and (ends[-1] or len(response) == 8)
        assert rollout.truncated[b].item() != ends[-1]
        assert rollout.mask[b].tolist() == [t < len(response) for t in range(rollout.ids.shape[1])]
    assert rollout.truncated.any() and not rollout.truncated.all()


def test_a_prompt_is_read_once_for_its_group_and_rows_leave_the_batch_as_they_end(model):
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    lengths = draw(model, 3, 8, seed=4, eos_ids=[EOS, 0, 11, 14]).lengths.tolist()
    assert rows == [3, *(sum(n > t for n in lengths) for t in range(1, max(lengths)))]


def test_selected_rows_are_trimmed_to_the_longest_of_them():
    rollout = draw(qwen2())
    part, order = rollout.select(on([9, 5])), [9, 5]
    assert part.responses() == [rollout.responses()[b] for b in order]
    lengths, prompt_lengths = rollout.lengths[on(order)], rollout.prompt_lengths[on(order)]
    assert part.log_probs.shape == part.entropies.shape == (2, lengths.max())
    assert part.prompts.shape == (2, prompt_lengths.max()) and part.prompts.shape != rollout.prompts.shape
    assert_close(part.log_probs[part.mask], torch.cat([rollout.log_probs[b, :rollout.lengths[b]] for b in order]))


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        sample(qwen2(), [[1], []], 2, 3, [])


def test_greedy_equals_generate(model):
    rollout = draw(model, group_size=1, max_new_tokens=12, temperature=0)
    for prompt, response in zip(PROMPTS, rollout.responses()):
        expected = model.generate(
            on([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0)
        assert response == expected[0, len(prompt):].tolist()
    assert_close(rollout.log_probs[rollout.mask].double(), plain_log_probs(model, rollout), atol=1e-5, rtol=0)


TAIL = [n / 50 for n in range(1, 50)]  # ways through 20,000 tokens of 1e-8; 1 + 1e-8 is 1 in float32


@pytest.mark.parametrize("logits, uniforms, tokens", [
    ([-math.inf, 0, -math.inf, 0, -math.inf], [0, 0.5 - 2**-53, 0.5, 1 - 2**-53], [1, 1, 3, 3]),
    ([0] + [math.log(1e-8)] * 20_000, [(1 + x * 2e-4) / 1.0002 for x in TAIL], [x * 20_000 for x in TAIL])],
    ids=["the ends of the unit interval draw possible tokens", "a tail too fine for float32 is drawn"])
def test_inverse_cdf(logits, uniforms, tokens, monkeypatch):
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


# ---------------------------------------------------------------------- From token ids to rewards and metrics

def test_a_failed_call_scores_as_the_lowest_of_its_group_is_told_and_shown_once(caplog):
    def reward(response, reference):
        return {"-": -1.0, "+": 1.0, "?": math.nan, "<": -math.inf, "x": "no number"}[response]

    warning_once.cache_clear()
    examples = [Example("", "r", [])] * 4
    rewards, failed = score_responses(reward, list("+-?" "x+<" "-?!" "?x!"), examples)
    assert rewards.tolist() == [[1, -1, -1], [1, 1, 1], [-1, -1, -1], [0, 0, 0]]
    assert failed.tolist() == [[False, False, True], [True, False, True], [False, True, True], [True] * 3]
    assert caplog.text.count("Traceback") == caplog.text.count("'no number'") == 1


def test_exit_in_a_reward_is_a_failed_call_but_an_interrupt_is_not():
    def reward(response, reference):
        raise {"exit": SystemExit, "interrupt": KeyboardInterrupt}[response]

    rewards, failed = score_responses(reward, ["exit"], [Example("", "r", [])])
    assert failed.all() and rewards.eq(0).all()
    with pytest.raises(KeyboardInterrupt):
        score_responses(reward, ["interrupt"], [Example("", "r", [])])


def test_a_reward_that_changes_its_reference_changes_only_its_own_copy():
    def reward(response, reference):
        reference["left"].append(response)
        return len(reference["left"])

    examples = [Example("", {"left": []}, []), Example("", {"left": [0]}, [])]
    assert score_responses(reward, list("abcd"), examples)[0].tolist() == [[1, 1], [2, 2]]
    assert [example.reference for example in examples] == [{"left": []}, {"left": [0]}]


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
        "reward/verified": 7 / 12, "groups/uniform_frac": 1 / 3,
        "preference/agreement": (first * 4 / 3 - last * 4) / (first * 4 / 3 + last * (1 + 1 / 3 + 1 / 3 + 3)),
        "confidence/correct": (-3 - 4 - 1) / 6, "confidence/wrong": (-1 - 2 - 4 - 4 - 3 - 2) / 6,
        "confidence/overconfident_frac": 1 / 3, "entropy": 2.0, "length/mean": 1.5,
        "length/truncated_frac": 0.5})
    assert icpo.rollout_metrics(rollout, rewards, l, -1e4) == metrics  # it tells of the model, not of beta
    assert icpo.rollout_metrics(rollout, torch.ones(3, 4), l, 1.0)["confidence/wrong"] is None


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
    rollout = draw(model, max_new_tokens=12, temperature=0.7)
    advantages = on(torch.randn(12, generator=torch.Generator().manual_seed(0)))
    advantages[[2, 5, 6]] = 0
    # The oracle: -sum of A * log-prob * weight. At ratio 1 the clipped loss has its gradient.
    lengths, total = rollout.lengths.tolist(), 0.0
    for b, log_probs in enumerate(plain_log_probs(model, rollout, 0.7).split(lengths)):
        weight = 1 / sum(lengths) if aggregation == "token" else 1 / (lengths[b] * 12)
        total = total - advantages[b] * log_probs.sum() * weight
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    assert len(set(lengths)) > 2
    shuffled = on(torch.randperm(12))
    for order, size in ((on(range(12)), 1), (on(range(12)), 2), (on(range(12)), 100), (shuffled, 5)):
        rows, A, flags = rollout.select(order), advantages[order], dict(aggregation=aggregation, temperature=0.7)
        actual, _ = update_gradient(model, rows, A, micro_batch=size, **flags)
        assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_checkpointing_recomputes_layers_and_keeps_the_gradient(make):
    model = make()
    rollout, advantages, calls = draw(model), on(torch.randn(12)), []
    expected, _ = update_gradient(model, rollout, advantages)
    model.gradient_checkpointing_enable()
    layer = next(module for module in model.modules() if hasattr(module, "mlp"))
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    actual, _ = update_gradient(model, rollout, advantages)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert_close(draw(model).log_probs, rollout.log_probs)  # sampling still has its cache


def shifted(model, rollout, advantages, ref_model, inner_epochs):
    """A copy of the model after an update with the KL to ref_model, and the metrics of that."""
    policy = copy.deepcopy(model).train()  # its dropout must not act
    config = settings(inner_epochs=inner_epochs, micro_batch=5, kl_coef=0.1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    metrics = icpo.update(policy, optimizer, rollout, advantages, config, ref_model)
    return policy.eval(), metrics


@pytest.fixture
def drawn_otherwise(model):
    """A rollout whose log-probs are a little off, its advantages, and another model as reference."""
    rollout, advantages, ref_model = draw(model), on(torch.randn(12)), copy.deepcopy(model)
    advantages[3] = 0  # counts all the same, since the KL needs it
    rollout.log_probs += rollout.mask * on(torch.linspace(-0.01, 0.01, rollout.mask.shape[1]))
    with torch.no_grad():
        for parameter in ref_model.parameters():
            parameter.mul_(0.9)
    return rollout, advantages, ref_model


def test_first_ratio_is_exactly_one(model, drawn_otherwise, monkeypatch):
    def spy(log_probs, old_log_probs, *args, **kwargs):
        ratios.append((log_probs - old_log_probs).exp())
        return policy_loss(log_probs, old_log_probs, *args, **kwargs)

    ratios, calls = [], []
    monkeypatch.setattr(icpo, "policy_loss", spy)
    drawn_otherwise[2].register_forward_pre_hook(lambda *args: calls.append(1))
    shifted(model, *drawn_otherwise, inner_epochs=2)
    assert len(ratios) == 6 and len(calls) == 3  # the reference is not asked again in the second epoch
    assert all(ratio.eq(1).all() for ratio in ratios[:3]) and all(ratio.ne(1).any() for ratio in ratios[3:])


def test_metrics_of_an_update_are_those_of_its_last_epoch(model, drawn_otherwise):
    rollout, advantages, ref_model = drawn_otherwise
    copied, _ = shifted(model, *drawn_otherwise, inner_epochs=1)
    _, metrics = shifted(model, *drawn_otherwise, inner_epochs=2)
    old, new, ref = (plain_log_probs(m, rollout).detach() for m in (model, copied, ref_model))
    ratio, A = (new - old).exp(), advantages.repeat_interleave(rollout.lengths)
    clipped = (A > 0) & (ratio > 1.28) | (A < 0) & (ratio < 0.8)
    expected = {
        "ratio/clip_frac": clipped.double().mean(), "kl/old": (ratio - (new - old) - 1).mean(),
        "kl/ref": ((ref - new).exp() - (ref - new) - 1).mean(),
        "sampling/logp_difference": (old - rollout.log_probs[rollout.mask]).abs().mean()}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-3) and value > 0, name


def test_uniform_batches_and_gradients_that_are_not_finite_make_no_step(caplog):
    warning_once.cache_clear()
    model = qwen2()
    rollout, before = draw(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    metrics = icpo.update(model, optimizer, rollout, on([0.0] * 12), settings())
    assert metrics["grad_norm"] == metrics["update/skipped"] == 0
    metrics = icpo.update(model, optimizer, rollout, on([math.inf] * 12), settings())
    assert metrics["update/skipped"] == caplog.text.count("an update was skipped") == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_are_clipped_to_the_norm_and_do_not_add_up_between_updates():
    model = qwen2()
    rollout, advantages, before = draw(model), on(torch.randn(12)), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    icpo.update(model, optimizer, rollout, advantages, settings(max_grad_norm=0.01))
    moved = torch.cat([(value - before[name]).flatten() for name, value in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-2)
    optimizer, rollout = torch.optim.SGD(model.model.norm.parameters(), lr=0.0), draw(model)  # lacks the others
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
        with pytest.raises(icpo.UserError, match="nats per token"):
            update(wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert update(0.9 * limit)["sampling/logp_difference"] == pytest.approx(0.9 * limit, abs=1e-5)
    update(-3)  # from the second step on it is a metric, and stops nothing


# ------------------------------------------------------------------------------------------- The training step

LETTERS = SimpleNamespace(decode=lambda ids, **kwargs: "".join(chr(65 + i) for i in ids))  # a tokenizer
EXAMPLES = [Example(f"prompt {p}", p, ids, "<think>" * (p == 1)) for p, ids in enumerate(PROMPTS)]


def step(model, reward, **kwargs):
    """train_step, called as in a notebook, with the random numbers of seed 1."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_step(model, LETTERS, [EOS], optimizer, EXAMPLES, reward, settings(
        group_size=4, max_new_tokens=6, alpha=0.3, beta=5.0, micro_batch=3, **kwargs))


def test_train_step_is_the_six_lines_of_the_header():
    model = qwen2()
    before, third = copy.deepcopy(model), [0.0, 1.0, 0.5]
    metrics, samples = step(model, lambda text, reference: 1 / (len(text) % 3))  # 1 / 0 fails
    torch.manual_seed(1)
    rollout = sample(before, PROMPTS, 4, 6, [EOS])
    responses = ["".join(chr(65 + i) for i in ids if i != EOS) for ids in rollout.responses()]
    responses[4:8] = ["<think>" + response for response in responses[4:8]]
    l = [statistics.mean(row[:n]) for row, n in zip(rollout.log_probs.tolist(), rollout.lengths.tolist())]
    groups = [slice(start, start + 4) for start in (0, 4, 8)]
    values = [third[len(response) % 3] for response in responses]
    lowest = [min(filter(None, values[group]), default=0.0) for group in groups]
    rewards = [value or lowest[b // 4] for b, value in enumerate(values)]
    expected = [A for group in groups for A in loop_icpo(rewards[group], l[group], 0.3, 5.0)]
    assert any(expected) and len(samples) == 12
    assert [row["response"] for row in samples] == responses and [row["reward"] for row in samples] == rewards
    assert [(row["prompt"], row["reference"]) for row in samples] == [(f"prompt {b // 4}", b // 4) for b in range(12)]
    assert [row["confidence"] for row in samples] == pytest.approx(l, abs=1e-5)
    assert [row["advantage"] for row in samples] == pytest.approx(expected, abs=1e-4)
    assert metrics["reward/verified"] == pytest.approx(statistics.mean(rewards))
    assert metrics["reward/errors"] == values.count(0.0) > 0
    gradient, _ = update_gradient(before, rollout, on(expected).float())
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before.parameters())])
    assert_close(moved, -0.1 * gradient, atol=1e-6, rtol=1e-3)


def test_rewards_that_all_fail_end_the_first_step():
    with pytest.raises(icpo.UserError, match="all calls of the first step failed"):
        step(qwen2(), lambda text, reference: None)


def test_weights_that_are_not_finite_end_the_run_though_they_leave_nothing_to_update():
    model = qwen2()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(icpo.UserError, match="no longer finite"):
        step(model, lambda text, reference: 1.0)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_a_notebook_changes_nothing(default):
    def reward(text, reference):
        return len(text) % 3 / 3

    expected, model = step(qwen2(), reward), qwen2()
    torch.set_default_dtype(default)
    try:
        assert step(model, reward) == expected
    finally:
        torch.set_default_dtype(torch.float32)
