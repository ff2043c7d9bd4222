"""ICPO in one file: Intrinsic Confidence-Driven Group Relative Preference Optimization (arXiv 2511.21005).

GRPO samples a group of responses to a prompt, verifies each, and makes a response more likely to the extent
that it beats its group. ICPO also compares how probable the model itself finds them: of each pair the less
probable one is preferred: confident errors are pushed down harder, and undervalued right answers up harder.

One training step, numbered as in train_step:
  1. Sample G responses to each of P prompts, and keep the log-prob of every token.       sample
  2. Verify each response against the reference answer: reward R.                         verify.py
  3. Sequence log-prob l, the "confidence": mean log-prob of its tokens [summary]         sequence_log_prob
  4. Preference advantage s: l compared in pairs [paper], less probable wins [ours]       preference_advantage
  5. Advantage A: s joins the reward [paper], R + alpha * s [ours]; GRPO normalizes it.   icpo_advantage
  6. Weight every token of a response by its A in the clipped loss of PPO and GRPO.       policy_loss, update

Marks: [paper] the abstract or the authors' README, [summary] a public summary, [ours] our reading or choice,
such as which response of a pair is preferred. We did not have the full text, and no number here is from it.

Glossary. P prompts, G responses each, B = P * G prompt-major rows, N positions for the prompt (padded on the
left), T positions for the response (padded on the right), V vocabulary size:
  o_i         rollout.ids          (B, T)
  L_i         rollout.lengths      (B,)    tokens of the response, its end-of-sequence token included
  l_i, s_i    confidence, preference  (P, G)
  R_i, A_i    rewards, advantages     (P, G)
  log pi      log_probs            (B, T)  from the update's current forward pass
  log pi_old  (B, T), computed twice: by the sampler, for l (rollout.log_probs), and by the update's first
              forward pass, for the ratio (old_log_probs)
"""

import copy
import inspect
import json
import os
import pkgutil
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import strftime
from typing import Literal, NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------- The method
def sequence_log_prob(log_probs, mask):
    """The confidence of each response [summary]: its mean log-prob per token, so that lengths compare:

        l_i = (1 / L_i) * sum over t of log pi_old(o_i,t | q, o_i,<t)

    log_probs (B, T); mask (B, T) of any dtype, nonzero on the response -> (B,) float32 in nats per token,
    0 for a response without tokens.
    """
    mask = mask.bool()
    sums = torch.where(mask, log_probs.float(), 0).sum(dim=-1)
    return sums / mask.sum(dim=-1).clamp(min=1)


def finite(values):
    """A tensor or lists as float32, detached. ValueError: NaN or infinity, which would spoil the group."""
    values = torch.as_tensor(values, dtype=torch.float32).detach()
    if not values.isfinite().all():
        raise ValueError("a reward, a confidence or beta is not finite: has the model diverged?")
    return values


def preference_advantage(confidence, beta):
    """How much each response is preferred to the rest of its group, by the model's own log-probs alone.

        P(i > j) = sigmoid(beta * (l_j - l_i))      less probable is preferred; Bradley-Terry form [ours]
        s_i = mean over j != i of 2 P(i > j) - 1    a score from pairwise comparisons [paper]; its form [ours]

    confidence (..., G), l in nats per token; beta in tokens per nat (below 0 the more probable response is
    preferred) -> s (..., G) float32 in [-1, 1], detached. It sums to 0 over a group, is 0 if all tie, and
    tends to (wins - losses) / (G - 1) as beta grows. Raises ValueError if a value is not finite.
    """
    confidence = finite(confidence)
    gaps = confidence[..., None, :] - confidence[..., :, None]  # (..., G, G): gaps[..., i, j] is l_j - l_i
    # 2 sigmoid(x) - 1 = tanh(x / 2), and j = i adds 0 to the sum.
    return torch.tanh(finite(beta * gaps) / 2).sum(dim=-1) / max(1, gaps.shape[-1] - 1)


def uniform_groups(rewards):
    """True for each group whose rewards are all equal, up to rounding: (..., G) -> (..., 1) bool."""
    low, high = finite(rewards).aminmax(dim=-1, keepdim=True)
    return high - low <= 1e-6 * torch.maximum(high, -low)  # relative to the largest |r|


def group_advantage(rewards):
    """GRPO's advantage:  A_i = (r_i - mean(r)) / std(r)  over the group, with the unbiased std (of G - 1).

    rewards (..., G) -> (..., G) float32. Groups of equal rewards get exactly 0, as does a group of one.
    An epsilon of 1e-8 in the denominator would not ensure it: by rounding alone, eight rewards of 0.7 have a
    std of 6e-8. Raises ValueError if a reward is not finite.
    """
    r = finite(rewards)
    centered = r - r.mean(dim=-1, keepdim=True)
    std = r.std(dim=-1, keepdim=True)
    return torch.where(uniform_groups(r), 0, centered / std)


def icpo_advantage(rewards, confidence, alpha, beta, keep_uniform_groups=False):
    """Adds the preference advantage to the verified reward: at the reward [paper], as a sum [ours].

        A = group_advantage(R + alpha * s)

    alpha = 0 is GRPO's A, to the bit. With R in {0, 1}, a correct response outranks every wrong one if alpha
    is below 1/2, and A has the sign of GRPO's if alpha is below 1/G. If alpha is below 1/2, all correct
    responses of a group share one l, and all wrong ones another, R + alpha * s is an increasing affine
    function of R, and A is GRPO's: ICPO acts where correct responses, or wrong ones, differ in l.
    Groups of equal rewards get 0 [ours]: with only s left, normalizing would blow it up to the size of a
    reward. keep_uniform_groups gives them alpha * s instead, not normalized.
    rewards, confidence (..., G) -> (..., G) float32. ValueError: shapes differ, or a value is not finite.
    """
    rewards, confidence = finite(rewards), finite(confidence)
    if rewards.shape != confidence.shape:
        raise ValueError(f"rewards are {rewards.shape}, confidence is {confidence.shape}")
    preference = preference_advantage(confidence, beta)
    advantages = group_advantage(rewards + alpha * preference)
    if_uniform = alpha * preference if keep_uniform_groups else 0
    return torch.where(uniform_groups(rewards), if_uniform, advantages)


def policy_loss(log_probs, old_log_probs, advantages, mask, clip_low=0.2, clip_high=0.28, aggregation="token",
                normalizer=None, ref_log_probs=None, kl_coef=0.0):
    """The clipped loss of PPO and GRPO, with DAPO's separate upper clip and an optional KL penalty.

        ratio = exp(log pi - log pi_old)
        loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * (exp(d) - d - 1)
        d = log pi_ref - log pi; the last term is Schulman's k3, whose mean under pi is KL(pi || pi_ref)

    log_probs, old_log_probs, ref_log_probs (B, T), advantages (B,), (B, 1) or (B, T), mask (B, T) of any
    dtype -> a scalar, and a dict of sums over tokens, for micro-batches to add up: tokens, clipped, kl_ref.
    aggregation: "token" weights all tokens equally, "sequence" all responses; else ValueError. normalizer:
    how many there are in the whole batch; None counts this call's.
    """
    mask = mask.bool()
    if aggregation == "token":
        token_weights = mask / (normalizer or mask.sum().clamp(min=1))
    elif aggregation == "sequence":
        token_weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / (normalizer or len(mask))
    else:
        raise ValueError(f"aggregation is 'token' or 'sequence', not {aggregation!r}")

    A = torch.where(mask, advantages.reshape(len(mask), -1), 0)
    ratio = torch.where(mask, log_probs - old_log_probs, 0).clamp(max=80).exp()  # exp(89) is infinite
    objective = ratio * A
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    losses = -torch.minimum(objective, clipped)
    stats = {"tokens": mask.sum(), "clipped": (clipped < objective).sum()}
    if ref_log_probs is not None:
        d = torch.where(mask, ref_log_probs - log_probs, 0)
        k3 = d.exp() - d - 1
        losses = losses + kl_coef * k3
        stats["kl_ref"] = k3.detach().sum()
    return (losses * token_weights).sum(), stats


# ---------------------------------------------------------- Sampling, scoring, rewards and one training step
@dataclass
class Rollout:
    """B responses with their prompts: P * G in prompt order, fewer after select. Masks come from lengths."""
    prompts: Tensor         # (B, N) token ids, padded on the left
    prompt_lengths: Tensor  # (B,)
    ids: Tensor             # (B, T) token ids of the responses, padded on the right
    lengths: Tensor         # (B,) tokens of the response, its end-of-sequence token included
    truncated: Tensor       # (B,) bool, True if max_new_tokens came before an end of sequence
    log_probs: Tensor       # (B, T) float32, nats: log-prob of each token as it was sampled, 0 in the padding
    entropies: Tensor       # (B, T) float32, nats: entropy of the distribution at a token, 0 in the padding

    @property
    def mask(self):
        """(B, T) bool, True on response tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def positions(self):
        """(B, N + T) 0 at the first token of the prompt, below 0 on the padding before it."""
        columns = torch.arange(-self.prompts.shape[1], self.ids.shape[1], device=self.ids.device)
        return columns + self.prompt_lengths[:, None]

    def select(self, rows):
        """The given rows (indices, not empty, or a slice) in that order, trimmed to the longest of them."""
        prompt_lengths = self.prompt_lengths[rows]
        lengths = self.lengths[rows]
        N, T = prompt_lengths.max(), lengths.max()
        return Rollout(self.prompts[rows, -N:], prompt_lengths, self.ids[rows, :T], lengths,
                       self.truncated[rows], self.log_probs[rows, :T], self.entropies[rows, :T])


def response_logits(model, ids, positions, count, cache=None):
    """Logits (B, count, V) after each of the last `count` tokens of ids (B, S), at positions (B, cached + S).

    The mask hides the padding on the left, where positions are below 0; causal attention that on the right.
    """
    return model(
        input_ids=ids, attention_mask=(positions >= 0).long(), past_key_values=cache,
        position_ids=positions[:, -ids.shape[1]:].clamp(min=0), use_cache=cache is not None,
        logits_to_keep=count).logits[:, -count:]  # cut again: some models ignore logits_to_keep


@torch.no_grad()
def sample(model, prompts, group_size, max_new_tokens, eos_ids, temperature=1.0, generator=None):
    """A Rollout of group_size responses to each prompt, a list of ids, from softmax(logits / temperature).

    `generate` would take what is left unset (top_k, top_p, repetition_penalty) from the generation_config,
    and its log-probs would not be those of the distribution that is trained. A prompt is prefilled once for
    its group, and rows leave the batch as they end. Temperature 0 is greedy: the first of tied tokens.
    generator: on the CPU; None: torch's own. Leaves the model in eval mode. ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    model.eval()
    device = model.device
    B = len(prompts) * group_size
    T = max_new_tokens
    repeated = [torch.tensor(prompt, device=device) for prompt in prompts for _ in range(group_size)]
    filler = prompts[0][0]  # a real token: Gemma3n's pad token is zeros, and its gradient NaN
    prompt_ids = torch.nn.utils.rnn.pad_sequence(repeated, True, filler, padding_side="left")
    prompt_lengths = prompt_ids.new_tensor(list(map(len, repeated)))
    rollout = Rollout(
        prompt_ids, prompt_lengths, prompt_ids.new_full((B, T), filler), torch.zeros_like(prompt_lengths),
        prompt_lengths > 0, *torch.zeros(2, B, T, device=device))  # truncated, until it ends
    positions = rollout.positions
    # All random numbers at once, on the CPU: a row's do not depend on when other rows end, nor on the device.
    uniforms = torch.rand(B, T, dtype=torch.float64, generator=generator).to(device) * (temperature > 0)
    eos = prompt_ids.new_tensor(eos_ids)
    cache = transformers.DynamicCache(config=model.config)
    with torch.autocast("cuda", torch.bfloat16, enabled=prompt_ids.is_cuda):
        # A prompt is read once for its group; from then on, there is a row for each response.
        logits = response_logits(model, prompt_ids[::group_size], positions[::group_size, :-T], 1, cache)
        rows = torch.arange(B, device=device)  # those in the batch
        cache.reorder_cache(rows // group_size)
        logits = logits[rows // group_size]
        for t in range(T):
            log_p = (logits[:, 0].float() / (temperature or 1e-30)).log_softmax(dim=-1)
            p = log_p.exp()
            # Inverse CDF: how many tokens lie below the random number? float32 sums would lose a long tail.
            cdf = p.cumsum(dim=-1, dtype=torch.float64)
            token = (cdf <= uniforms[rows, t, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)
            rollout.ids[rows, t, None] = token
            rollout.log_probs[rows, t, None] = log_p.gather(1, token)
            rollout.entropies[rows, t] = -(p * log_p).nansum(dim=-1)  # 0 * -inf counts as 0
            rollout.lengths[rows] = t + 1
            unfinished = ~torch.isin(token.squeeze(1), eos)
            rollout.truncated[rows] = unfinished
            stay = torch.where(unfinished)[0]  # waits for the GPU
            if not len(stay) or t == T - 1:
                break
            if len(stay) < len(rows):
                cache.reorder_cache(stay)
                rows = rows[stay]
            seen = positions[rows, :t + 1 - T]  # of the N + T positions, those that have a token by now
            logits = response_logits(model, token[stay], seen, 1, cache)
    return rollout.select(slice(None))


def token_log_probs(model, rollout, temperature=1.0, max_logits=2**25):
    """Log-probs (B, T) of the response tokens under softmax(logits / temperature): float32, 0 in the padding.

    float32 copies exist for a chunk of max_logits elements at a time (at least B * V), and are made again in
    the backward pass: only the model's own logits, in bf16 on a GPU, and their gradient take B * T * V.
    """
    input_ids = torch.cat([rollout.prompts, rollout.ids], dim=1)
    with torch.autocast("cuda", torch.bfloat16, enabled=input_ids.is_cuda):
        logits = response_logits(model, input_ids, rollout.positions, rollout.ids.shape[1] + 1)[:, :-1]

    def score(logits, ids):
        log_p = (logits.float() / temperature).log_softmax(dim=-1)
        return log_p.gather(-1, ids[..., None]).squeeze(-1)

    columns = max(1, max_logits // logits[:, 0].numel())
    scores = [torch.utils.checkpoint.checkpoint(score, *chunk, use_reentrant=False)
              for chunk in zip(logits.split(columns, dim=1), rollout.ids.split(columns, dim=1))]
    return torch.where(rollout.mask, torch.cat(scores, dim=1), 0)


class UserError(Exception):
    """An error that the user can fix: shown as one line, exit status 2."""
    __repr__ = Exception.__str__  # inside of another message, too


def require(holds, message):
    """Raises UserError(message) unless `holds`."""
    if not holds:
        raise UserError(message)


class Example(NamedTuple):
    prompt: str        # as it stands in the file
    reference: object  # what the reward function compares with, as it stands in the file
    ids: list[int]     # the whole prompt in tokens: system prompt, chat template and suffix included
    opening: str = ""  # the <think> that ends the prompt, where it does: the response begins with it


def texts_of(rollout, tokenizer, examples):
    """The responses as the model wrote them, its special tokens too, up to the end-of-sequence token."""
    G = len(rollout.lengths) // len(examples)
    written = rollout.lengths + rollout.truncated.long() - 1
    return [
        examples[b // G].opening + tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        for b, (ids, length) in enumerate(zip(rollout.ids.tolist(), written.tolist()))]


def score_responses(reward, responses, examples):
    """Rewards (P, G) float32 of G responses to each example, and which calls failed, (P, G) bool."""
    G = len(responses) // len(examples)
    rewards = torch.full((len(examples), G), torch.nan)
    for b, response in enumerate(responses):
        reference = copy.deepcopy(examples[b // G].reference)  # a reward may change its own
        try:
            rewards[b // G, b % G] = float(reward(response, reference))
        except (Exception, SystemExit):  # one response must not end a run of hours
            transformers.logging.get_logger("icpo").warning_once(
                "\na reward failed, for the first time", exc_info=True)
    failed = ~rewards.isfinite()
    # A failed call scores as the lowest of its group (0 if all of it failed): never above a wrong answer.
    lowest = rewards.masked_fill(failed, torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0)
    return torch.where(failed, lowest, rewards), failed


def rollout_metrics(rollout, rewards, confidence, beta):
    """Metrics of a rollout, from tensors (P, G); the mean of nothing is None. Correct: a reward above 1/2."""
    correct = rewards > 0.5
    # In [-1, 1] once normalized: did the less probable responses earn the reward, whatever beta's sign?
    agreement = group_advantage(rewards) * preference_advantage(confidence, abs(beta))
    values = {
        "reward/verified": rewards,
        "groups/uniform_frac": uniform_groups(rewards),
        "preference/agreement": agreement.sum() / agreement.abs().sum().clamp(min=1e-9),
        "confidence/correct": confidence[correct],
        "confidence/wrong": confidence[~correct],
        "entropy": rollout.entropies[rollout.mask],
        "length/mean": rollout.lengths,
        "length/truncated_frac": rollout.truncated}
    return {name: float(value.float().mean()) if value.numel() else None for name, value in values.items()}


@torch.enable_grad()  # the user's reward function may have switched gradients off
def update(policy, optimizer, rollout, advantages, config, ref_model=None):
    """Takes inner_epochs optimizer steps on a rollout with advantages (B,). Returns the last one's metrics.

    Rows of advantage 0 count in the loss, but are computed only if the KL needs them. No step is taken if the
    gradient is not finite. UserError: scored and sampled log-probs disagree in the first step.
    """
    normalizer = rollout.lengths.sum() if config.aggregation == "token" else len(advantages)
    rows = torch.where((advantages != 0) | (ref_model is not None))[0]
    rows = rows[rollout.lengths[rows].argsort(stable=True)]  # less padding
    chunks = rows.split(config.micro_batch) if len(rows) else ()
    old_log_probs = []
    ref_log_probs = {}
    for module in policy.modules():
        # Train mode only where checkpointing needs it: elsewhere it would switch dropout on.
        module.training = getattr(module, "gradient_checkpointing", False)
    for epoch in range(config.inner_epochs):
        policy.zero_grad()  # all of it: weights that the optimizer lacks count in the norm, too
        sums = Counter()  # a missing key reads as 0: no reference model, or no rows
        for i, chunk in enumerate(chunks):
            batch = rollout.select(chunk)
            log_probs = token_log_probs(policy, batch, config.temperature)
            if epoch == 0:  # before any step these are log pi_old, by the same kernels: the ratio is 1
                old_log_probs.append(log_probs.detach())
                if ref_model is not None:
                    with torch.no_grad():
                        ref_log_probs[i] = token_log_probs(ref_model, batch, config.temperature)
            loss, stats = policy_loss(
                log_probs, old_log_probs[i], advantages[chunk], batch.mask, config.clip_low,
                config.clip_high, config.aggregation, normalizer, ref_log_probs.get(i), config.kl_coef)
            loss.backward()
            difference = (old_log_probs[i] - batch.log_probs).abs().sum()
            sums.update(stats, loss=loss.detach(), difference=difference)
        means = Counter({name: float(value / sums["tokens"]) for name, value in sums.items()})
        tolerance = 0.1 if rollout.ids.is_cuda else 0.01  # of bf16, of float32
        require(optimizer.state or means["difference"] <= tolerance,  # AdamW has none before its first step
                f"sampled and scored log-probs differ by {means['difference']:.2g} nats per token")
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        if isfinite(norm):
            optimizer.step()
    return {
        "loss": float(sums["loss"]),
        "grad_norm": norm if isfinite(norm) else None,
        "sampling/logp_difference": means["difference"],
        "ratio/clip_frac": means["clipped"],
        "kl/ref": means["kl_ref"]}


def train_step(policy, tokenizer, eos_ids, optimizer, examples, reward, config, ref_model=None):
    """One step of the algorithm on P examples, numbered as at the top. Returns its metrics and B samples.

    ValueError: log-probs are not finite (--lr is too high?). UserError: all rewards fail in the first step.
    """
    G = config.group_size
    # 1. Sample.
    rollout = sample(
        policy, [example.ids for example in examples], G, config.max_new_tokens, eos_ids, config.temperature)
    responses = texts_of(rollout, tokenizer, examples)
    # 2. Verify.
    rewards, failed = score_responses(reward, responses, examples)
    require(optimizer.state or not failed.all(),  # the first step, as in update
            f"--reward {config.reward or 'verify:verify'}: all calls of the first step failed")
    # 3. Sequence log-probs.
    confidence = sequence_log_prob(rollout.log_probs, rollout.mask).view_as(rewards).cpu()
    # 4. and 5. Preference advantage, joined with the reward. icpo_advantage does both.
    advantages = icpo_advantage(rewards, confidence, config.alpha, config.beta, config.keep_uniform_groups)
    # 6. Update.
    metrics = update(policy, optimizer, rollout, advantages.flatten().to(policy.device), config, ref_model)
    metrics |= rollout_metrics(rollout, rewards, confidence, config.beta)
    metrics["reward/errors"] = int(failed.sum())
    samples = [
        {"prompt": examples[b // G].prompt, "reference": examples[b // G].reference,
         "response": responses[b], "reward": R, "confidence": l, "advantage": A}
        for b, (R, l, A) in enumerate(torch.stack([rewards, confidence, advantages]).flatten(1).T.tolist())]
    return metrics, samples


# --------------------- The algorithm ends here. Below is what it takes to run it. ---------------------
@dataclass
class Config:
    """The flags of the command line: group_size is --group-size, and the comments are its --help."""
    model: str = ""  # model folder or hub name; without it the task of examples/addition.py is trained
    train_data: str = ""  # JSON Lines of prompts and reference answers
    eval_data: str = ""  # the same, held out; without it nothing is evaluated
    prompt_key: str = "prompt"  # key of the prompt in a line
    answer_key: str = "answer"  # key of the reference answer in a line
    system_prompt: str = ""  # system message; without a chat template, text before every prompt
    prompt_suffix: str = ""  # text after every prompt
    no_chat_template: bool = False  # use prompts as they are, without the chat template
    chat_template_kwargs: str = "{}"  # JSON for the chat template, such as '{"enable_thinking": false}'
    reward: str = ""  # module:function, f(response, reference) -> float; by default verify.py's verify
    # The run
    output_dir: str = ""  # the run's own folder, new or empty; by default runs/<model>-<date>-<time>
    resume: str = ""  # folder of a run to continue with its settings, except for the flags that are given
    save_every: int = 10  # steps between checkpoints
    seed: int = 0  # every random number follows from the seed and the step
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda or cpu
    # Sampling and optimization
    steps: int = 500  # training steps in all, those before --resume included
    prompts_per_step: int = 16  # prompts in a step (P)
    group_size: int = 8  # responses to each prompt (G)
    max_new_tokens: int = 512  # longest response in tokens
    temperature: float = 1.0  # of sampling and scoring alike
    inner_epochs: int = 1  # optimizer steps on each rollout (PPO's epochs, GRPO's mu)
    micro_batch: int = 8  # rows in a forward pass; changes memory and speed only
    lr: float = 1e-6  # AdamW's learning rate
    warmup_steps: int = 5  # steps in which the learning rate rises linearly
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    # The method
    alpha: float = 0.1  # weight of the preference advantage; 0 is GRPO, below 1/2 correct outranks wrong
    beta: float = 10.0  # sharpness of the comparison, per nat of mean token log-prob; below 0 it is reversed
    keep_uniform_groups: bool = False  # groups of equal rewards get alpha * s, not 0
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.28  # the ratio is clipped above 1 + clip_high
    aggregation: Literal["token", "sequence"] = "token"  # what has equal weight
    kl_coef: float = 0.0  # weight of the KL to the initial model, which then stays in memory
    # Evaluation
    eval_every: int = 10  # steps between evaluations
    eval_rows: int = 256  # rows of the evaluation data that are used
    eval_samples: int = 8  # samples k of each row for mean@k and pass@k; 0: greedy only

    def __post_init__(self):
        may_be_0 = "seed steps lr warmup_steps alpha clip_low clip_high kl_coef eval_samples".split()
        for name, value in vars(self).items():
            value = np.asarray(value).item()  # a number of numpy, say of a sweep, becomes Python's
            setattr(self, name, value)
            if type(value) in (int, float):
                require(isfinite(value) and (value > 0 or value == 0 and name in may_be_0 or name == "beta"),
                        f"--{name.replace('_', '-')} {value}: out of range")
        require(self.group_size > 1, "--group-size: must be at least 2, to compare responses")


# --------------------------------------------------------------------------------------------- Model and data
CLOSING = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # of a message in chat templates: end a response too
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")  # of a model's folder, when it is saved again
LOGS = ("metrics.jsonl", "samples.jsonl")


def grouped_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention that, for one new token, treats query heads that share a key-value head as queries of one.

    transformers' sdpa expands the cache to all query heads where there is padding, token after token.
    """
    B, H, T, D = query.shape
    if T > 1:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(B, key.shape[1], -1, D)
    out = scaled_dot_product_attention(grouped, key, value, attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(B, 1, H, -1), None


def load_model(path, device, gradient_checkpointing=False):
    """A model that samples as it scores (it is tried), its tokenizer, and the tokens that end a response."""
    transformers.logging.disable_progress_bar()  # transformers' own, for files
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for up to half a second, for every length
    transformers.AttentionInterface.register("grouped", grouped_attention)
    transformers.AttentionMaskInterface.register("grouped", transformers.AttentionMaskInterface()["sdpa"])
    folder = Path(path).absolute()  # to be found again when the model is saved
    try:
        if not folder.exists():
            folder = snapshot_download(path, allow_patterns=[*COPIED, "model*.safetensors"])
        config = transformers.AutoConfig.from_pretrained(folder)
        require(not hasattr(config, "quantization_config"), "it is quantized")
        text_config = config.get_text_config()
        config.return_dict = True
        text_config.output_router_logits = False  # routers would add their loss
        # tokenizer.json as it stands: AutoTokenizer rebuilds some, losing spaces or the splits of digits.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        # float32 whatever the checkpoint holds: bf16 would round an AdamW step of 1e-6 away.
        model, loaded = getattr(transformers, config.architectures[0]).from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True)
        require(not loaded["missing_keys"], f"no weights in it for {loaded['missing_keys']}")
        ends = {*np.ravel(model.generation_config.eos_token_id), tokenizer.eos_token_id,
                *map(tokenizer.get_vocab().get, CLOSING)} - {None}
        require(ends, "no eos token in its tokenizer or generation_config.json")
        if model.config._attn_implementation == "sdpa":  # which leaves out the soft cap of Gemma 2
            capped = getattr(text_config, "attn_logit_softcapping", None)
            model.set_attn_implementation("eager" if capped else "grouped")
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.to(device)
        # Padding on the left, a cache, rows that share a prompt, noise in the layers.
        rollout = sample(model, [[0], [0, 0]], 2, 3, [])
        update(model, torch.optim.SGD(model.parameters(), lr=0.0), rollout, torch.ones(4, device=device),
               Config())
        model.zero_grad()
    except Exception as error:  # a damaged file or a foreign model raises what it likes
        raise UserError(
            f"--model {path}: {error!r:.200}; it must fit in memory, and be the folder or hub name of a "
            "whole model with a tokenizer.json (of a run, its folder model), no LoRA adapter, no file")
    tokenizer.model_max_length = getattr(text_config, "max_position_embeddings", tokenizer.model_max_length)
    return model, tokenizer, sorted(map(int, ends))


def save_model(policy, eos_ids, target):
    """Copies the folder that the policy was loaded from, with new weights, of its dtype, and end tokens."""
    source = policy.name_or_path
    config = transformers.AutoConfig.from_pretrained(source)
    policy.generation_config = transformers.GenerationConfig()  # some that can be loaded cannot be saved
    policy.to(config.dtype or config.get_text_config().dtype or torch.float32).save_pretrained(target)
    for pattern in COPIED:
        for path in Path(source).glob(pattern):
            if not path.name.endswith(".index.json"):  # of weights in several files
                shutil.copyfile(path, target / path.name)
    path = target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos_ids}, indent=2))


def load_reward(spec):
    """The reward function f(response, reference) -> float named module:function. Raises UserError."""
    sys.path.insert(0, "" if spec else os.path.dirname(__file__))  # the user's first; verify.py is ours
    try:
        return pkgutil.resolve_name(spec or "verify:verify")
    except (Exception, SystemExit) as error:  # the user's module runs when it is imported
        raise UserError(f"--reward {spec or 'verify:verify'}: {error!r}; give module:function, found here")


def encode(row, tokenizer, config):
    """The Example of one row, through the chat template if there is one. May raise anything."""
    prompt = row[config.prompt_key]
    reference = row[config.answer_key]
    require(reference is not None, "no answer")
    system = config.system_prompt
    user = prompt + config.prompt_suffix
    text = system + user
    templated = tokenizer.chat_template and not config.no_chat_template
    if templated:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(
            messages if system else messages[1:], tokenize=False, add_generation_prompt=True,
            **json.loads(config.chat_template_kwargs))
        require(system.strip() in text and user.strip() in text,
                "the chat template leaves out the prompt, or --system-prompt (--no-chat-template)")
    ids = tokenizer(text, add_special_tokens=not templated).input_ids
    return Example(prompt, reference, ids, re.search(r"(<think>\s*)?\Z", text)[0])


def load_examples(path, tokenizer, config, context=None):
    """Examples from JSON Lines that leave room in the context, by default the model's. Raises UserError."""
    examples = []
    longest = (context or tokenizer.model_max_length) - config.max_new_tokens
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = encode(json.loads(line), tokenizer, config)
        except Exception as error:  # no JSON, no such key, or a chat template, which raises what it likes
            raise UserError(
                f"{path}, line {number}: {error!r}; give a JSON object with {config.prompt_key!r} and "
                f"{config.answer_key!r} (--prompt-key, --answer-key) that the chat template takes")
        if 0 < len(example.ids) <= longest:
            examples.append(example)
    print(f"{path}: {len(examples)} prompts of 1 to {longest} tokens, which leave room for responses")
    require(examples, f"{path}: no usable line; a lower --max-new-tokens leaves more of the context")
    return examples


# --------------------------------------------------------------------------------------------------- Training
def evaluate(policy, tokenizer, eos_ids, examples, reward, config):
    """Metrics of greedy responses and of k = eval_samples more; shows them, and the first greedy response."""
    generator = torch.Generator().manual_seed(config.seed)  # its own, so that every evaluation draws alike

    def respond(k, temperature):  # responses and rewards (examples, k), in batches as large as in training
        responses = []
        size = max(1, config.prompts_per_step * config.group_size // k)
        for start in tqdm(range(0, len(examples), size), "evaluation", leave=False, disable=None):
            batch = examples[start:start + size]
            rollout = sample(
                policy, [example.ids for example in batch], k, config.max_new_tokens, eos_ids, temperature,
                generator)
            responses += texts_of(rollout, tokenizer, batch)
        rewards, failed = score_responses(reward, responses, examples)
        return responses, rewards.masked_fill(failed, 0)
    greedy, rewards = respond(1, temperature=0)
    metrics = {"eval/accuracy": float(rewards.mean())}
    if config.eval_samples:
        _, rewards = respond(config.eval_samples, config.temperature)
        metrics["eval/mean_at_k"] = float(rewards.mean())
        metrics["eval/pass_at_k"] = float(rewards.amax(1).mean())
    shown = ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items())
    tqdm.write(f"{shown}: {examples[0].prompt[-20:]!r} -> {greedy[0][-40:]!r}")
    return metrics


def batch_of(examples, step, config):
    """The examples of step 1, 2, ...: each once per epoch, in an order that follows from (seed, epoch)."""
    total = len(examples)
    P = config.prompts_per_step

    def order(epoch):
        return np.random.default_rng([config.seed, epoch]).permutation(total)
    return [examples[order(n // total)[n % total]] for n in range((step - 1) * P, step * P)]


def train(config):
    """Trains, evaluates, logs and saves, or continues the run in config.resume. Raises UserError, OSError."""
    require(config.model and config.train_data, "--model and --train-data need each other")
    out = Path(config.resume or config.output_dir or
               f"runs/{Path(config.model).name}-{strftime('%Y%m%d-%H%M%S')}").absolute()  # rewards may chdir
    require(config.resume or not any(out.glob("*")),
            f"--output-dir {out} is not empty: choose another, or continue its run with --resume")
    reward = load_reward(config.reward)
    policy, tokenizer, eos_ids = load_model(config.model, config.device, config.gradient_checkpointing)
    ref_model = copy.deepcopy(policy) if config.kl_coef else None
    examples = load_examples(config.train_data, tokenizer, config)
    held_out = load_examples(config.eval_data, tokenizer, config) if config.eval_data else []
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    saved = -1  # the step of the last checkpoint
    if config.resume:
        state = torch.load(out / "checkpoint.pt", map_location="cpu")
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        for log, size in zip(LOGS, state["log_sizes"]):
            os.truncate(out / log, size)  # the steps after the checkpoint will be taken, and logged, again
        saved = state["step"]
        del state  # three times the size of the model
    os.makedirs(out, exist_ok=True)
    with open(out / "config.json", "w" if config.resume else "x") as file:  # of two runs at once, one fails
        json.dump(vars(config), file, indent=2)
    print(f"{out}: {policy.num_parameters() / 1e6:.1f}M parameters, {config.device}; the first prompt, as "
          f"the model gets it:\n{tokenizer.decode(examples[0].ids)!r}")
    try:
        for step in tqdm(range(saved + 1, config.steps + 1), disable=None):  # no bar in a file
            metrics = {}
            samples = []
            if step:  # step 0 is an evaluation only
                # Every random number follows from (seed, step): a resumed run repeats an unbroken one.
                transformers.set_seed(np.random.SeedSequence([config.seed, step]).generate_state(1).item())
                optimizer.param_groups[0]["lr"] = config.lr * min(1, step / (config.warmup_steps or 1))
                metrics, samples = train_step(
                    policy, tokenizer, eos_ids, optimizer, batch_of(examples, step, config), reward, config,
                    ref_model)
                agreement = metrics["preference/agreement"]  # 0: no group has both right and wrong responses
                tqdm.write(
                    f"{step}/{config.steps} reward {metrics['reward/verified']:.2f}, entropy "
                    f"{metrics['entropy']:.2f}, agree {f'{agreement:.2f}' if agreement else '-'}, cut "
                    f"{metrics['length/truncated_frac']:.2f}, {strftime('%H:%M:%S')}")
            if held_out and (step % config.eval_every == 0 or step == config.steps):
                metrics |= evaluate(policy, tokenizer, eos_ids, held_out[:config.eval_rows], reward, config)
            for log, rows in zip(LOGS, ([metrics], samples[:config.group_size])):
                with open(out / log, "a") as file:
                    file.writelines(json.dumps({"step": step} | row) + "\n" for row in rows)
            if step % config.save_every == 0 or step == config.steps:
                torch.save({"step": step, "log_sizes": [os.path.getsize(out / log) for log in LOGS],
                            "policy": policy.state_dict(), "optimizer": optimizer.state_dict()},
                           out / "checkpoint.part")
                os.replace(out / "checkpoint.part", out / "checkpoint.pt")  # whole, or not at all
                saved = step
        save_model(policy, eos_ids, out / "model")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"--resume {out} continues after step {saved}" if saved >= 0 else "")
    print(f"model: {out}/model\nlogs: {out}/metrics.jsonl, {out}/samples.jsonl")


def parse(arguments):
    """The Config that the arguments give, beside what the run that they resume was given."""
    for name, comment in re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config)):
        Config.__dataclass_fields__[name].metadata = {"help": comment}
    arguments = [re.sub(r"^-(?=[\d.])", " -", word) for word in arguments]  # -1e1 is a number, not a flag
    parser = transformers.HfArgumentParser(Config)
    folder = parser.parse_args(arguments).resume
    if folder:
        parser.set_defaults(**json.loads(Path(folder, "config.json").read_text()))
    return Config(**vars(parser.parse_args(arguments)))


def main(arguments):
    try:
        config = parse(arguments)
        if not config.model and not config.train_data:
            from examples.addition import prepare
            config = parse(prepare(config.seed) + arguments)
        train(config)
        return 0
    except KeyboardInterrupt as stop:
        print("\nicpo.py: stopped;", *stop.args, file=sys.stderr)
        return 130
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"icpo.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too
    sys.exit(main(sys.argv[1:]))
