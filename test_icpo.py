"""The proof of icpo.py's formulas, on tiny models made in memory. Run: python -m pytest -q test_icpo.py

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
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import icpo
from icpo import (Config, Example, group_advantage, icpo_advantage, policy_loss, preference_advantage, sample,
                  sequence_log_prob, token_log_probs, uniform_groups)

torch.set_num_threads(1)  # several threads that wait for each other crawl on a busy machine
# Thirty groups of five: all that have both 0 and 1; random multiples of 1/1024, whose differences are exact.
BINARY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5))[1:-1])
L, REWARDS = torch.randint(-3072, 1, (2, 30, 5), generator=torch.Generator().manual_seed(0)) / 1024

# ---------------------------------------------------------------------------------- Confidence and preference

@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_l_is_the_mean_over_the_tokens_of_the_response_in_float32(dtype):
    log_probs = torch.tensor([[-1.0, -1.0078125, math.nan], [-4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=dtype)
    l = sequence_log_prob(log_probs.bfloat16(), mask)  # which has no number between those of the first row
    assert l.tolist() == [-1.00390625, -4.0, 0.0]


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
    expected = [loop_preference(group, beta) for group in L.tolist()]
    assert_close(preference_advantage(L, beta), torch.tensor(expected))


@pytest.mark.parametrize("beta", [0.1, 10.0, 1e6])
def test_s_sums_to_zero_over_a_group_and_lies_between_minus_one_and_one(beta):
    s = preference_advantage(L, beta)
    assert_close(s.sum(dim=1), torch.zeros(30), atol=1e-6, rtol=0)
    assert s.abs().max() <= 1


def test_s_ignores_a_constant_added_to_all_l():
    assert torch.equal(preference_advantage(L + 4, 10.0), preference_advantage(L, 10.0))


def test_s_permutes_with_its_group():
    order = [3, 0, 4, 1, 2]
    assert_close(preference_advantage(L[:, order], 2.0), preference_advantage(L, 2.0)[:, order])


def test_as_beta_grows_s_is_wins_minus_losses_over_the_number_of_others():
    l = (2 * L).round()  # many ties
    wins = [[sum(other > own for other in group) for own in group] for group in l.tolist()]
    losses = [[sum(other < own for other in group) for own in group] for group in l.tolist()]
    assert_close(preference_advantage(l, 1e6), (torch.tensor(wins) - torch.tensor(losses)) / 4)


def test_minus_beta_negates_s():
    assert_close(preference_advantage(L, -2.0), -preference_advantage(L, 2.0))


@pytest.mark.parametrize("G", range(2, 17))
def test_s_of_ties_is_exactly_zero(G):
    assert preference_advantage(torch.full((1, G), -0.7), 1e6).eq(0).all()


@pytest.mark.filterwarnings("ignore:std")  # torch says that one reward has no std
def test_a_group_of_one_is_compared_with_nothing_and_gets_zero():
    one = -torch.ones(2, 1)
    assert preference_advantage(one, 10.0).eq(0).all() and group_advantage(one).eq(0).all()
    assert all(icpo_advantage(one, -one, 0.3, 10.0, keep).eq(0).all() for keep in (False, True))


# ---------------------------------------------------------------------------------- Group and ICPO advantages

def loop_icpo(rewards, l, alpha, beta):
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    joined = [r + alpha * s for r, s in zip(rewards, loop_preference(l, beta))]
    mean, std = statistics.mean(joined), statistics.stdev(joined)
    return [(r - mean) / std for r in joined]


def test_a_is_its_definition():
    rewards = REWARDS.round()  # 0, -1, -2 and -3, some at the mean of their group
    expected = [loop_icpo(*group, 0.3, 7.0) for group in zip(rewards.tolist(), L.tolist())]
    assert_close(icpo_advantage(rewards, L, 0.3, 7.0), torch.tensor(expected), atol=1e-5, rtol=0)


def test_alpha_zero_is_grpo_to_the_bit():
    assert torch.equal(icpo_advantage(REWARDS, L, 0.0, 7.0), group_advantage(REWARDS))


@pytest.mark.parametrize("beta", [1e4, -1e4, Config.beta])
@pytest.mark.parametrize("l", [L, (BINARY - 1) * 5, -BINARY], ids=["random", "wrong ramble", "wrong is sure"])
def test_alpha_below_a_half_ranks_and_below_one_over_g_keeps_the_signs(l, beta):
    for alpha in (0.499, 0.199):
        A = icpo_advantage(BINARY, l, alpha, beta)
        lowest_correct = A.masked_fill(BINARY == 0, math.inf).amin(dim=1)
        highest_wrong = A.masked_fill(BINARY == 1, -math.inf).amax(dim=1)
        assert (lowest_correct > highest_wrong).all()
    assert (lowest_correct > 0).all() and (highest_wrong < 0).all()


@pytest.mark.parametrize("beta", [10.0, -10.0, 1e6])
@pytest.mark.parametrize("of_correct, of_wrong", [(-0.5, -0.1), (-0.1, -0.5), (-2.0, -1e-4)])
def test_where_correct_share_one_l_and_wrong_another_a_is_that_of_grpo(of_correct, of_wrong, beta):
    l = torch.where(BINARY == 1, of_correct, of_wrong)
    assert_close(icpo_advantage(BINARY, l, 0.4, beta), group_advantage(BINARY), atol=1e-6, rtol=0)


def test_with_three_values_of_l_a_is_not_that_of_grpo():
    for l in itertools.product([-0.2, -0.4, -0.6], repeat=5):
        if len(set(l)) == 3:
            A = icpo_advantage(BINARY, torch.tensor([l]).expand(30, 5), 0.1, 10.0)
            assert ((A - group_advantage(BINARY)).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 0.6, 0.7, 0.9, 1.0, -5.0])
def test_equal_rewards_give_exactly_zero(reward):
    for G in range(2, 17):
        rewards, l = torch.full((1, G), reward), torch.arange(G)[None] / -7
        assert group_advantage(rewards).eq(0).all() and icpo_advantage(rewards, l, 0.4, 10.0).eq(0).all()


def test_equal_rewards_give_alpha_times_s_if_uniform_groups_are_kept():
    expected = [[0.4 * s for s in loop_preference(group, 10.0)] for group in L.tolist()]
    kept = icpo_advantage(torch.full((30, 5), 0.7), L, 0.4, 10.0, keep_uniform_groups=True)
    assert_close(kept, torch.tensor(expected))


def test_rounding_is_no_difference_in_reward_but_a_small_one_is():
    rewards = torch.full((1, 8), 0.7)
    rewards[0, 3] = torch.nextafter(rewards[0, 3], torch.tensor(1.0))
    for scale in (1, -1, 1e4):
        assert group_advantage(scale * rewards).eq(0).all()
    assert group_advantage(torch.tensor([[0.7, 0.7, 0.7, 0.701]])).max() > 1


def test_nothing_flows_through_a_and_its_inputs_stay_as_they_are():
    rewards, l = BINARY.clone().requires_grad_(), L.clone().requires_grad_()
    for keep in (False, True):
        assert not icpo_advantage(rewards, l, 0.3, 5.0, keep).requires_grad
    assert torch.equal(rewards, BINARY) and torch.equal(l, L)


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.numpy, torch.Tensor.tolist])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)])
def test_groups_have_any_leading_dimensions_and_may_be_lists(shape, kind):
    rewards, l = (kind(x.flatten()[:math.prod(shape)].view(shape)) for x in (REWARDS.round(), L))
    A = icpo_advantage(REWARDS.round(), L, 0.3, 3.0)
    assert torch.equal(icpo_advantage(rewards, l, 0.3, 3.0), A.flatten()[:math.prod(shape)].view(shape))


@pytest.mark.parametrize("rewards, l", [((8, 1), (1, 8)), ((8,), (1, 8)), ((2, 4), (4, 2)), ((2, 4), (2, 1))])
def test_rewards_and_l_of_different_shapes_are_refused(rewards, l):
    with pytest.raises(ValueError, match="rewards are.*confidence is"):
        icpo_advantage(torch.ones(rewards), torch.ones(l), 0.1, 10.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    bad = BINARY.clone()
    bad[7, 2] = value
    for function, *arguments in (
            (preference_advantage, bad, 10.0), (preference_advantage, L, value), (group_advantage, bad),
            (icpo_advantage, bad, L, 0.1, 10.0), (icpo_advantage, BINARY, bad, 0.0, 10.0)):
        with pytest.raises(ValueError, match="not finite"):
            function(*arguments)


METHOD = {sequence_log_prob: (L, BINARY), preference_advantage: (L, 5.0), uniform_groups: (BINARY,),
          group_advantage: (BINARY,), icpo_advantage: (BINARY, L, 0.3, 5.0),
          policy_loss: (L, L - 0.1, L[:, 0], BINARY)}


@pytest.mark.parametrize("function", METHOD)
def test_the_functions_work_pasted_with_those_they_call(function):
    pasted = {}
    exec("import torch", pasted)
    called = [function]
    for caller in called:  # which grows
        exec(inspect.getsource(caller), pasted)
        called += [callee for callee in (*METHOD, icpo.finite) if callee.__name__ in caller.__code__.co_names]
    assert_close(pasted[function.__name__](*METHOD[function]), function(*METHOD[function]))


# ------------------------------------------------------------------------------------------------ Policy loss

@pytest.mark.parametrize("A, ratio, slope", [
    (1, 0.5, 1), (1, 1.27, 1), (1, 1.29, 0), (1, 1.5, 0), (1, math.exp(200), 0),  # which no float32 holds
    (-1, 0.5, 0), (-1, 0.79, 0), (-1, 0.81, -1), (-1, 1.5, -1)])
def test_clip_table(A, ratio, slope):
    """The objective's derivative by the ratio: A inside, 0 where the ratio moved far enough in A's favor."""
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1))
    loss.backward()
    assert -log_probs.grad.item() / ratio == pytest.approx(slope, rel=1e-5)  # d ratio = ratio * d log_prob
    assert stats["clipped"] == (slope == 0)


@pytest.fixture
def batch():
    """Arguments of policy_loss for five responses, with rubbish in the padding."""
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 5])[:, None]
    numbers = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.4
    new, old, ref = torch.where(mask, numbers[:3] - 1, torch.nan)
    return dict(log_probs=new, old_log_probs=old, ref_log_probs=ref, advantages=numbers[3, :, 0], mask=mask,
                kl_coef=0.3, clip_low=0.1, clip_high=0.3)


def loop_terms(batch):
    """For each token of each response: its loss, whether its ratio is clipped, its estimate of the KL."""
    rows = []
    for b, A in enumerate(batch["advantages"].tolist()):
        rows.append([])
        for t in range(batch["mask"][b].sum()):
            new, old, ref = (math.exp(batch[name + "log_probs"][b, t]) for name in ("", "old_", "ref_"))
            ratio = new / old
            bounded = min(max(ratio, 0.9), 1.3)
            k3 = ref / new - math.log(ref / new) - 1
            loss = -min(ratio * A, bounded * A) + 0.3 * k3
            rows[-1].append((loss, bounded * A < ratio * A, k3))
    return rows


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_loss_equals_a_loop_over_tokens_and_the_stats_are_its_sums(batch, dtype):
    losses, clipped, kl_ref = zip(*itertools.chain(*loop_terms(batch)))
    batch["mask"] = batch["mask"].to(dtype)
    loss, stats = policy_loss(**batch)
    assert loss.item() == pytest.approx(statistics.mean(losses))
    sums = dict(tokens=18, clipped=sum(clipped), kl_ref=sum(kl_ref))
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(sums)


@pytest.mark.parametrize("shape", [(5, 1), (5, 7)])
def test_advantages_may_be_given_per_token(batch, shape):
    loss, stats = policy_loss(**batch)
    batch["advantages"] = batch["advantages"][:, None].expand(shape)
    if shape == (5, 7):
        batch["advantages"] = batch["advantages"].where(batch["mask"], torch.nan)
    assert_close(policy_loss(**batch), (loss, stats), rtol=0, atol=0)


def test_aggregation_by_sequence_weights_all_responses_equally(batch):
    means = [statistics.mean(loss for loss, *_ in terms) for terms in loop_terms(batch)]
    loss, _ = policy_loss(**batch, aggregation="sequence")
    assert loss.item() == pytest.approx(statistics.mean(means))
    with pytest.raises(ValueError, match="mean"):
        policy_loss(**batch, aggregation="mean")


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_padding_gets_no_gradient_and_the_inputs_of_the_loss_stay_as_they_are(batch, aggregation):
    before, mask = copy.deepcopy(batch), batch["mask"]
    batch["log_probs"].requires_grad_()
    loss, _ = policy_loss(**batch, aggregation=aggregation)
    gradient, = torch.autograd.grad(loss, batch["log_probs"])
    assert gradient[mask].ne(0).any() and gradient[~mask].eq(0).all()
    assert_close(batch, before, rtol=0, atol=0, equal_nan=True)
    batch["mask"] = torch.zeros(5, 7)
    assert policy_loss(**batch, aggregation=aggregation)[0] == 0


def test_the_mean_of_the_kl_estimator_over_what_pi_samples_is_the_kl():
    pi, ref = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    kl = (pi * (pi / ref).log()).sum()  # KL(pi || ref); KL(ref || pi) is another
    ids = [0] * 7 + [1] * 2 + [2]  # each token as often as pi draws it
    log_pi, log_ref = pi.log()[ids, None], ref.log()[ids, None]
    zeros, mask = torch.zeros(10), torch.ones(10, 1)
    loss, _ = policy_loss(log_pi, log_pi, zeros, mask, ref_log_probs=log_ref, kl_coef=1.0)
    assert_close(loss, kl)


def test_the_worked_example_of_the_readme():
    readme = (Path(icpo.__file__).parent / "README.md").read_text().replace("−", "-")
    rows = re.findall(r"^\| (?:correct|wrong), .*", readme, re.MULTILINE)
    numbers = [[float(cell.strip("* ")) for cell in row.split("|")[2:7]] for row in rows]
    l, s, R, of_grpo, of_icpo = torch.tensor(numbers).T[:, None]
    assert R.tolist() == [[1, 1, 0, 0]]
    assert_close(preference_advantage(l, Config.beta), s, atol=5e-4, rtol=0)
    assert_close(group_advantage(R), of_grpo, atol=5e-4, rtol=0)
    assert_close(icpo_advantage(R, l, Config.alpha, Config.beta), of_icpo, atol=5e-4, rtol=0)


# --------------------------------------------------------------------------------------- Sampling and scoring

DEVICE = os.environ.get("ICPO_TEST_DEVICE", "cpu")  # of the sampler, the scorer and the update
if DEVICE != "cpu":  # in float32, since bf16 autocast would leave nothing exact to compare
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
VOCAB, EOS, ENDS = 23, 7, [7, 0, 11, 14]  # several ends: responses of several lengths
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
        num_key_value_heads=2, eos_token_id=EOS, bos_token_id=None, pad_token_id=0)))


def gpt2():  # absolute positions and dropout
    return scaled(lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, eos_token_id=EOS, bos_token_id=None)))


@pytest.fixture(params=[qwen2, gpt2])
def model(request):
    return request.param()


def responses_of(rollout):
    return [ids[:length] for ids, length in zip(rollout.ids.tolist(), rollout.lengths.tolist())]


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
    for b, response in enumerate(responses_of(rollout)):
        prompt = rollout.prompts[b, -rollout.prompt_lengths[b]:].tolist()
        rows.append(alone(model, prompt, response, temperature)[range(len(response)), response])
    return torch.cat(rows)


@pytest.fixture
def nine(model):
    """Nine rows, drawn at temperature 0.7 from a model with a hostile generation_config."""
    model.generation_config.update(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1)
    rollout = draw(model, 3, 8, seed=4, temperature=0.7, eos_ids=ENDS)
    assert len(set(rollout.lengths.tolist())) > 2
    return rollout


def test_a_sampled_row_is_what_it_would_be_alone_whatever_the_generation_config_asks(model, nine):
    uniforms = torch.rand(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).tolist()
    for b, response in enumerate(responses_of(nine)):
        n, log_p = len(response), alone(model, PROMPTS[b // 3], response, 0.7).detach()
        cdfs = log_p.exp().cumsum(dim=1).tolist()
        assert response == [bisect.bisect(cdf, uniform) for cdf, uniform in zip(cdfs, uniforms[b])]
        assert_close(nine.log_probs[b, :n].double(), log_p[range(n), response], atol=1e-5, rtol=0)
        assert_close(nine.entropies[b, :n].double(), -(log_p.exp() * log_p).sum(dim=1), atol=1e-4, rtol=0)
    assert nine.log_probs[~nine.mask].eq(0).all() and nine.entropies[~nine.mask].eq(0).all()


def test_a_scored_row_is_what_it_would_be_alone_whatever_is_in_the_padding(model, nine):
    inside = on(range(5)) >= 5 - nine.prompt_lengths[:, None]
    padded = copy.copy(nine)
    padded.prompts = torch.nn.functional.pad(torch.where(inside, nine.prompts, 13), (6, 0), value=EOS)
    padded.ids = torch.nn.functional.pad(torch.where(nine.mask, nine.ids, 13), (0, 6), value=EOS)
    scored = token_log_probs(model, padded, 0.7)
    assert scored.dtype == torch.float32 and scored[~padded.mask].eq(0).all()
    assert_close(scored[padded.mask].double(), plain_log_probs(model, nine, 0.7), atol=1e-5, rtol=0)


def test_a_row_ends_with_its_first_end_token_or_is_truncated(nine):
    for response, truncated in zip(responses_of(nine), nine.truncated.tolist()):
        *before, last = [token in ENDS for token in response]
        assert not any(before) and last != truncated and (last or len(response) == 8)
    assert nine.truncated.any() and not nine.truncated.all()
    assert nine.ids[~nine.mask].eq(PROMPTS[0][0]).all()  # the padding is a token in use


def test_a_prompt_is_read_once_for_its_group_and_rows_leave_the_batch_as_they_end(model):
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, _: rows.append(len(args[0])))
    lengths = draw(model, 3, 8, seed=4, eos_ids=ENDS).lengths.tolist()
    assert rows == [3, *(sum(n > t for n in lengths) for t in range(1, max(lengths)))]


def test_temperature_zero_equals_greedy_generate(model):
    rollout = draw(model, group_size=1, max_new_tokens=12, temperature=0)
    for prompt, response in zip(PROMPTS, responses_of(rollout)):
        generated = model.generate(on([prompt]), do_sample=False, max_new_tokens=12)
        assert response == generated[0, len(prompt):].tolist()
    model.get_output_embeddings().weight.data.zero_()
    assert draw(model, temperature=0).ids.eq(0).all()  # of tied tokens the first


TAIL = [n / 50 for n in range(1, 50)]  # ways through 20,000 tokens of 1e-8; 1 + 1e-8 is 1 in float32


@pytest.mark.parametrize("logits, uniforms, tokens", [
    ([-math.inf, 0, -math.inf, 0, -math.inf], [0, 0.5 - 2**-53, 0.5, 1 - 2**-53], [1, 1, 3, 3]),
    ([math.nan] * 5, [0, 0.9], [0, 0]),
    ([0] + [math.log(1e-8)] * 20_000, [(1 + x * 2e-4) / 1.0002 for x in TAIL], [x * 20_000 for x in TAIL])],
    ids=["the ends of the unit interval", "NaN draws a token that exists", "a tail too fine for float32"])
def test_inverse_cdf(logits, uniforms, tokens, monkeypatch):
    def forward(input_ids, **kwargs):
        return SimpleNamespace(logits=on(logits).expand(len(input_ids), 1, -1))

    model, numbers = qwen2(), torch.tensor(uniforms, dtype=torch.float64)[:, None]
    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: numbers)
    rollout = sample(model, [[1]], len(uniforms), 1, [])
    assert rollout.ids[:, 0].tolist() == pytest.approx(tokens, abs=len(logits) // 20_000)
    assert rollout.entropies.isfinite().all()  # the impossible add nothing


def gradient_of(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("max_logits", [2**25, 5 * VOCAB, 1])
def test_gradient_in_chunks_equals_autograd_of_the_plain_formula(model, max_logits):
    rollout = draw(model).select(on([0, 4, 8]))
    expected = gradient_of(plain_log_probs(model, rollout, 0.7).square().sum(), model)
    actual = gradient_of(token_log_probs(model, rollout, 0.7, max_logits).square().sum(), model)
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


def update_gradient(model, rollout, advantages, **kwargs):
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = icpo.update(model, sgd, rollout, advantages, settings(**kwargs))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


def random_advantages():
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    advantages[[2, 5, 6]] = 0  # rows that are not computed
    return on(advantages)


def moved(model, before):
    return torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before.parameters())])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_gradient_does_not_depend_on_micro_batches_or_row_order(model, aggregation):
    rollout, advantages = draw(model, eos_ids=ENDS, temperature=0.7), random_advantages()
    lengths = rollout.lengths
    weights = 1 / lengths.sum().expand(12) if aggregation == "token" else 1 / (lengths * 12)
    # At ratio 1 the gradient of the clipped loss is that of -A * log pi.
    log_probs = plain_log_probs(model, rollout, 0.7)
    expected = gradient_of(-(log_probs * (advantages * weights).repeat_interleave(lengths)).sum(), model)
    for order, size in ((range(12), 1), (range(12), 100), ([7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4], 5)):
        rows = on(order)
        actual, _ = update_gradient(model, rollout.select(rows), advantages[rows], micro_batch=size,
                                    aggregation=aggregation, temperature=0.7)
        assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [qwen2, gpt2])
def test_checkpointing_recomputes_layers_and_keeps_the_gradient(make):
    model, calls = make(), []
    rollout, advantages = draw(model), random_advantages()
    expected, _ = update_gradient(model, rollout, advantages)
    model.gradient_checkpointing_enable()
    layer = next(module for module in model.modules() if hasattr(module, "mlp"))
    layer.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    actual, _ = update_gradient(model, rollout, advantages)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert_close(draw(model).log_probs, rollout.log_probs)  # sampling still has its cache


def updated(model, inner_epochs, reference):
    """A copy of the model after an update, its metrics, and the rollout, with log-probs a little off."""
    rollout, policy = draw(model), copy.deepcopy(model).train()  # its dropout must not act
    rollout.log_probs += rollout.mask * on(torch.linspace(-0.01, 0.01, rollout.mask.shape[1]))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    config = settings(inner_epochs=inner_epochs, micro_batch=5, kl_coef=0.1)
    metrics = icpo.update(policy, optimizer, rollout, random_advantages(), config, reference)
    return policy.eval(), metrics, rollout


def test_first_ratio_is_exactly_one(model, monkeypatch):
    def spy(log_probs, old_log_probs, *args):
        ratios.append((log_probs - old_log_probs).exp())
        return policy_loss(log_probs, old_log_probs, *args)

    ratios = []
    monkeypatch.setattr(icpo, "policy_loss", spy)
    updated(model, 2, copy.deepcopy(model))
    assert all(ratio.eq(1).all() for ratio in ratios[:3])
    assert all(ratio.ne(1).any() for ratio in ratios[3:]) and len(ratios) == 6


def test_metrics_of_an_update_are_those_of_its_last_epoch(model):
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(0.9)
    after_one, _, _ = updated(model, 1, reference)
    _, metrics, rollout = updated(model, 2, reference)
    old, new, ref = (plain_log_probs(m, rollout).detach() for m in (model, after_one, reference))
    ratio, A = (new - old).exp(), random_advantages().repeat_interleave(rollout.lengths)
    clipped = (A > 0) & (ratio > 1.28) | (A < 0) & (ratio < 0.8)
    expected = {
        "ratio/clip_frac": clipped.double(), "kl/ref": (ref - new).exp() - (ref - new) - 1,
        "sampling/logp_difference": (old - rollout.log_probs[rollout.mask]).abs()}
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(values.mean().item(), rel=1e-3) and values.any(), name


def test_uniform_batches_and_gradients_that_are_not_finite_make_no_step():
    model = qwen2()
    rollout, before = draw(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=0.1)  # gradients of others must go, too
    assert icpo.update(model, optimizer, rollout, on([math.inf] * 12), settings())["grad_norm"] is None
    assert icpo.update(model, optimizer, rollout, on([0.0] * 12), settings())["grad_norm"] == 0
    assert moved(model, before).eq(0).all()


def test_gradients_are_clipped_to_a_norm():
    model, before = qwen2(), qwen2()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    icpo.update(model, optimizer, draw(model), random_advantages(), settings(max_grad_norm=0.01))
    assert moved(model, before).norm().item() == pytest.approx(0.01, rel=1e-2)


def test_log_probs_that_were_not_sampled_stop_the_first_update_before_any_weight_moves():
    def update(difference):
        rollout.log_probs = sampled + difference * rollout.mask
        return icpo.update(model, optimizer, rollout, on([1.0] * 12), settings())

    model, before = qwen2(), qwen2()
    rollout, optimizer = draw(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    limit = 0.01 if DEVICE == "cpu" else 0.1
    sampled = token_log_probs(model, rollout).detach()
    for wrong in (1.1 * limit, -1.1 * limit, math.nan):
        with pytest.raises(icpo.UserError, match="nats per token"):
            update(wrong)
    assert moved(model, before).eq(0).all()
    assert update(0.9 * limit)["sampling/logp_difference"] == pytest.approx(0.9 * limit, abs=1e-5)
    update(-3)  # from the second step on it is a metric, and stops nothing


def test_train_step_is_the_six_lines_of_the_header():
    def reward(text, p):  # fails for the last prompt
        return sum(map(ord, text)) % 2 / (p < 2)

    model, before = qwen2(), qwen2()
    letters = SimpleNamespace(decode=lambda ids, **kwargs: "".join(chr(65 + i) for i in ids))
    examples = [Example(f"prompt {p}", p, ids, "<think>" * (p == 1)) for p, ids in enumerate(PROMPTS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = settings(group_size=4, max_new_tokens=6, alpha=0.3, beta=5.0, micro_batch=3)
    torch.manual_seed(1)
    metrics, samples = icpo.train_step(model, letters, ENDS, optimizer, examples, reward, config)
    torch.manual_seed(1)
    rollout = sample(before, PROMPTS, 4, 6, ENDS)
    texts = ["".join(chr(65 + i) for i in ids if i not in ENDS) for ids in responses_of(rollout)]
    texts[4:8] = ["<think>" + text for text in texts[4:8]]
    rewards = [sum(map(ord, text)) % 2 for text in texts[:8]] + [0] * 4
    l = [statistics.mean(row[:n]) for row, n in zip(rollout.log_probs.tolist(), rollout.lengths)]
    A = [a for b in (0, 4, 8) for a in loop_icpo(rewards[b:b + 4], l[b:b + 4], 0.3, 5.0)]
    for b, row in enumerate(samples):
        assert (row["prompt"], row["reference"], row["response"]) == (f"prompt {b // 4}", b // 4, texts[b])
        assert (row["reward"], row["confidence"]) == (rewards[b], pytest.approx(l[b]))
        assert row["advantage"] == pytest.approx(A[b], abs=1e-4)
    assert metrics["reward/verified"] == pytest.approx(statistics.mean(rewards))
    assert metrics["reward/errors"] == 4 and any(A[:4]) and any(A[4:])
    gradient, _ = update_gradient(before, rollout, on(A))
    assert_close(moved(model, before), -0.1 * gradient, atol=1e-6, rtol=1e-3)
    with pytest.raises(icpo.UserError, match="all calls of the first step failed"):
        icpo.train_step(model, letters, ENDS, optimizer, examples[2:], reward, config)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        icpo.train_step(model, letters, ENDS, optimizer, examples[:2], reward, config)


