"""ICPO in one file: Intrinsic Confidence-Driven Group Relative Preference Optimization (arXiv 2511.21005).

GRPO samples a group of responses to a prompt, verifies each, and makes a response more likely to the extent
that it beats its group. ICPO also compares how probable the model itself finds the responses of a group: of
each pair the less probable one is preferred, so that confident errors are pushed down harder and undervalued
correct answers are pushed up harder.

One training step, numbered as in train_step:
  1. Sample G responses to each of P prompts, and keep the log-prob of every token.       sample
  2. Verify each response against the reference answer: reward R.                         verify.py
  3. Sequence log-prob l, the "confidence": mean log-prob of a response's tokens. [S]     sequence_log_prob
  4. Preference advantage s: compare l in pairs; the less probable response wins. [P S O] preference_advantage
  5. Advantage A: R + alpha * s, normalized over the group as GRPO does with R. [P O]     icpo_advantage
  6. Weight every token of a response by its A in the clipped loss of PPO and GRPO.       policy_loss, update

Where each part comes from: [P] the paper's abstract or its authors' README, [S] a public summary, [O] our own
reading or choice, such as which response of a pair is preferred, or the values of alpha and beta. We did not
have the full text: what is marked [O] may differ from it, and no number here comes from the paper.

Glossary. P prompts, G responses each, B = P * G prompt-major rows, T response positions, V vocabulary size:
  o_i         rollout.ids      (B, S)  prompt, response, padding: S positions in all
  L_i         rollout.lengths  (B,)    tokens of the response, its end-of-sequence token included
  l_i         confidence       (P, G)  from the log-probs that the sampler recorded, without another pass
  s_i         preference       (P, G)  in [-1, 1]
  R_i, A_i    rewards, advantages (P, G)
  log pi_old  old_log_probs    (B, T)  in the ratio: from the update's first forward pass, before any step
  log pi      log_probs        (B, T)  from the update's current forward pass
  alpha, beta                          weight of s, sharpness of the comparison
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("icpo.py: error: this is Python {}.{}; 3.11 or newer is needed".format(*sys.version_info))

import contextlib
import copy
import inspect
import itertools
import json
import logging
import math
import os
import pkgutil
import random
import re
import signal
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from filelock import FileLock, Timeout
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer,
                          DynamicCache, GenerationConfig, HfArgumentParser, PretrainedConfig, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2Tokenizer, set_seed)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.logging import disable_progress_bar

from verify import extract_answer

# ------------------------------------------------------------------------------------------------- The method

def sequence_log_prob(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Log-prob per token of each response, its confidence [S]; a mean, so that short and long ones compare:

        l_i = (1 / L_i) * sum over t of log pi_old(o_i,t | q, o_i,<t)

    log_probs (B, T); mask (B, T) of any dtype, 1 on the response -> (B,) float32, nats a token; 0 if none.
    """
    mask = mask.bool()
    return torch.where(mask, log_probs.float(), 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def preference_advantage(seq_log_probs: Tensor, beta: float) -> Tensor:
    """How far each response is preferred to the others of its group, by the model's own log-probs alone.

        P(i > j) = sigmoid(beta * (l_j - l_i))           less probable is preferred; Bradley-Terry form [O]
        s_i = mean over j != i of 2 P(i > j) - 1         a score from pairwise comparisons [P]; its form [O]
            = mean over j != i of tanh(beta * (l_j - l_i) / 2)

    seq_log_probs (P, G) in nats per token, beta > 0 in 1 / nats -> (P, G) float32 in [-1, 1], detached. Sums
    to 0 over a group, is 0 if all tie; for large beta, (wins - losses) / (G - 1). Raises ValueError if G < 2.
    """
    G = seq_log_probs.shape[-1]
    if G < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    l = seq_log_probs.detach().float()
    gaps = l[:, None, :] - l[:, :, None]  # (P, G, G): gaps[p, i, j] is l_j - l_i
    return torch.tanh(beta * gaps / 2).sum(dim=-1) / (G - 1)


def group_advantage(rewards: Tensor) -> Tensor:
    """GRPO's advantage:  A_i = (r_i - mean(r)) / std(r)  over the group, with the unbiased std.

    rewards (P, G) -> (P, G) float32. A group of rewards that are equal up to rounding gets exactly 0: an
    epsilon of 1e-8 is too small, as eight rewards of 0.7 have a std of 6e-8. Raises ValueError if G < 2.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    r = rewards.detach().float()
    low, high = r.aminmax(dim=-1, keepdim=True)
    uniform = high - low <= 1e-6 * torch.maximum(high, -low)
    return torch.where(uniform, 0, (r - r.mean(dim=-1, keepdim=True)) / r.std(dim=-1, keepdim=True))


def icpo_advantage(rewards: Tensor, seq_log_probs: Tensor, alpha: float, beta: float,
                   keep_uniform_groups: bool = False) -> Tensor:
    """The preference advantage joined with the verifiable reward: at the reward [P], as a sum [O].

        A = group_advantage(R + alpha * s)

    alpha = 0 is GRPO, to the bit. With R in {0, 1}, a correct response outranks every wrong one if alpha is
    below 1/2, and A has the sign of GRPO's if alpha is below 1/G. A group of equal rewards gets 0 [O], or
    alpha * s with keep_uniform_groups: divided by its std, s would push at full size there with no reward
    behind it, and a model that errs at random collapses.
    rewards, seq_log_probs (P, G) -> (P, G) float32. Raises ValueError if G < 2.
    """
    preference = preference_advantage(seq_log_probs, beta)
    advantages = group_advantage(rewards + alpha * preference)
    uniform = (group_advantage(rewards) == 0).all(dim=-1, keepdim=True)
    return torch.where(uniform, alpha * preference if keep_uniform_groups else 0, advantages)


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28, aggregation: str = "token",
                normalizer: Tensor | int | None = None, ref_log_probs: Tensor | None = None,
                kl_coef: float = 0.0) -> tuple[Tensor, dict]:
    """The clipped loss of PPO and GRPO, with DAPO's separate upper clip and an optional KL penalty.

        ratio = exp(log pi - log pi_old)
        loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * (exp(d) - d - 1)
        d = log pi_ref - log pi; the last term is Schulman's k3, whose mean under pi is KL(pi || pi_ref)

    log_probs, old_log_probs, ref_log_probs (B, T), advantages (B,), mask (B, T) of any dtype -> scalar, and
    sums over tokens, for micro-batches to add up. Aggregation "token" weights all tokens alike, "sequence"
    all responses, else ValueError. normalizer: their number in the optimizer batch; if None, in this call.
    """
    mask = mask.bool()
    if aggregation == "token":
        token_weights = mask / (normalizer or mask.sum().clamp(min=1))
    elif aggregation == "sequence":
        token_weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / (normalizer or len(mask))
    else:
        raise ValueError(f"aggregation is 'token' or 'sequence', not {aggregation!r}")

    A = advantages[:, None]
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0)
    ratio = log_ratio.exp()
    losses = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    clipped = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    stats = {"tokens": mask.sum(), "clipped": clipped.sum(), "kl_old": (ratio - log_ratio - 1).detach().sum()}
    if ref_log_probs is not None:
        ref_log_ratio = torch.where(mask, ref_log_probs - log_probs, 0)
        k3 = ref_log_ratio.exp() - ref_log_ratio - 1
        losses = losses + kl_coef * k3
        stats["kl_ref"] = k3.detach().sum()
    return (losses * token_weights).sum(), stats


# --------------------------------------------------------------------------------------- Sampling and scoring

@dataclass
class Rollout:
    """B responses with their prompts; row b answers prompt b // G. Masks come from lengths, not token ids."""

    ids: Tensor             # (B, S) prompt, response, padding: positions are 0, 1, 2, ... in every row
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor         # (B,) tokens of the response, its end-of-sequence token included
    truncated: Tensor       # (B,) bool, True if max_new_tokens came before an end of sequence
    log_probs: Tensor       # (B, T) float32, nats: log-prob of each token as it was sampled, 0 in the padding
    entropies: Tensor       # (B, T) float32, nats: entropy of the distribution drawn from, 0 in the padding

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, True on response tokens."""
        return torch.arange(self.log_probs.shape[1], device=self.ids.device) < self.lengths[:, None]

    def select(self, rows: Tensor) -> "Rollout":
        """The given rows, in that order, trimmed to the longest of them."""
        prompt_lengths, lengths = self.prompt_lengths[rows], self.lengths[rows]
        S, T = (prompt_lengths + lengths).max(), lengths.max()
        return Rollout(self.ids[rows, :S], prompt_lengths, lengths, self.truncated[rows],
                       self.log_probs[rows, :T], self.entropies[rows, :T])

    def responses(self) -> list[list[int]]:
        """The token ids of each response."""
        spans = zip(self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist())
        return [row[start:start + length] for row, start, length in spans]


def padded(rows: list[list[int]], device: torch.device, side: str = "right") -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side).to(device)


@torch.no_grad()
def sample(model, prompts: list[list[int]], group_size: int, max_new_tokens: int, eos_ids: list[int],
           temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:
    """Draws group_size responses to each prompt from softmax(logits / temperature), and nothing else.

    `generate` would take what is left unset (top_k, top_p, repetition_penalty) from the generation_config,
    and its log-probs would not be those of the distribution that is trained. A prompt is prefilled once for
    its group, and rows leave the batch as they end. Temperature 0 is greedy, with log-probs of temperature 1.
    `generator` lives on the CPU. Leaves the model in eval mode. Raises ValueError if a prompt is empty.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    model.eval()
    device, B = model.device, len(prompts) * group_size
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    cache = DynamicCache(config=model.config)
    # Only these caches can be repeated and selected by row. With others, prefill every row and keep them all.
    by_row = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    prefilled = prompts if by_row else repeated
    # Padding on the left: every prompt ends in the last column, whose logits give the first response token.
    ids = padded(prefilled, device, "left")
    attention_mask = padded([[1] * len(prompt) for prompt in prefilled], device, "left")
    # All random numbers at once: those of a row depend neither on its neighbors nor on the device.
    uniforms = torch.rand(B, max_new_tokens, dtype=torch.float64, generator=generator).to(device)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    log_probs, entropies = torch.zeros(2, B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    truncated = torch.ones(B, dtype=torch.bool, device=device)
    eos, rows = torch.tensor(eos_ids, device=device), torch.arange(B, device=device)  # the rows in the batch

    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for t in tqdm(range(max_new_tokens), "tokens", leave=False, delay=5):
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            logits = model(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids,
                           past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if t == 0 and by_row:  # the prompts have been read: from here on, a row for each response
                cache.batch_repeat_interleave(group_size)
                logits = logits.repeat_interleave(group_size, dim=0)
                attention_mask = attention_mask.repeat_interleave(group_size, dim=0)
            log_p = (logits.float() / (temperature or 1)).log_softmax(dim=-1)
            p = log_p.exp()
            if temperature:
                # Inverse CDF: in float64, exact in a long tail; a token of probability 0 is never drawn.
                cdf = p.cumsum(dim=-1, dtype=torch.float64)
                token = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True)
            else:
                token = log_p.argmax(dim=-1, keepdim=True)
            log_probs[rows, t] = log_p.gather(1, token).squeeze(1)
            entropies[rows, t] = -(p * log_p).nansum(dim=-1)  # 0 * -inf counts as 0
            tokens[rows, t] = token.squeeze(1)

            ended = rows[torch.isin(token.squeeze(1), eos)]
            lengths[ended], truncated[ended] = lengths[ended].clamp(max=t + 1), False
            unfinished = lengths[rows] > t + 1
            if not unfinished.any():
                break
            if by_row and not unfinished.all():
                cache.batch_select_indices(unfinished.nonzero().squeeze(1))
                rows, attention_mask = rows[unfinished], attention_mask[unfinished]
            ids, attention_mask = tokens[rows, t, None], pad(attention_mask, (0, 1), value=1)

    T, responses = int(lengths.max()), zip(repeated, tokens.tolist(), lengths.tolist())
    ids = padded([prompt + row[:length] for prompt, row, length in responses], device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in repeated], device=device)
    after_end = torch.arange(T, device=device) >= lengths[:, None]
    log_probs, entropies = (x[:, :T].masked_fill(after_end, 0) for x in (log_probs, entropies))
    return Rollout(ids, prompt_lengths, lengths, truncated, log_probs, entropies)


def token_log_probs(model, rollout: Rollout, temperature: float = 1.0, max_logits: int = 2**25) -> Tensor:
    """Log-probs (B, T) of the response tokens under softmax(logits / temperature): float32, 0 in the padding.

    Only response positions get logits, max_logits numbers at a time and recomputed in the backward pass, so
    that memory does not grow with B * T * V. Padding on the right needs no mask: causal attention looks left.
    """
    row, t = rollout.mask.nonzero(as_tuple=True)  # the N response tokens of all rows, flattened
    position = rollout.prompt_lengths[row] + t
    targets = rollout.ids[row, position]
    decoder = model.get_decoder()  # without the head; the model itself (all logits) where it names no decoder

    with torch.autocast(rollout.ids.device.type, torch.bfloat16, enabled=rollout.ids.is_cuda):
        outputs = decoder(input_ids=rollout.ids, use_cache=False)
        features = outputs.logits if decoder is model else outputs.last_hidden_state

        def score(features: Tensor, targets: Tensor) -> Tensor:
            logits = features
            if decoder is not model:  # its own head, the decoder stubbed: some models scale or cap logits
                given = replace(outputs, last_hidden_state=features[None])
                with patch.object(decoder, "forward", lambda *args, **kwargs: given):
                    logits = model(input_ids=targets[None]).logits[0]
            # A division by 1 would cost three passes over (N, V), with its gradient.
            logits = logits.float() if temperature == 1 else logits.float() / temperature
            return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)

        size = max(1, max_logits // model.config.get_text_config().vocab_size)
        chunks = list(zip(features[row, position - 1].split(size), targets.split(size)))
        scores = [checkpoint(score, *chunk, use_reentrant=False) if len(chunks) > 1 else score(*chunk)
                  for chunk in chunks]
    return torch.zeros_like(rollout.log_probs).index_put((row, t), torch.cat(scores))


# ------------------------------------------------------------------------------------------ One training step

@torch.enable_grad()  # whatever the reward function has switched off
def update(policy, optimizer, rollout: Rollout, advantages: Tensor, config: "Config", ref_model=None) -> dict:
    """Takes inner_epochs optimizer steps on a rollout with advantages (B,). Returns the metrics of the last.

    Micro-batches only bound memory: the normalizer is the whole batch's. Rows whose advantage is exactly 0
    count in it, but are computed only if the KL needs them. A non-finite loss or gradient makes no step.
    Raises UserError before the first step if scored and sampled log-probs disagree.
    """
    normalizer = rollout.mask.sum() if config.aggregation == "token" else len(advantages)
    rows = ((advantages != 0) | (ref_model is not None)).nonzero().squeeze(1)
    rows = rows[(rollout.prompt_lengths + rollout.lengths)[rows].argsort(stable=True)]  # less padding
    batches = [(chunk, rollout.select(chunk)) for chunk in rows.split(config.micro_batch) if len(chunk)]
    old_log_probs, ref_log_probs = [], [None] * len(batches)
    if ref_model is not None:
        with torch.no_grad():
            ref_log_probs = [token_log_probs(ref_model, batch, config.temperature) for _, batch in batches]
    policy.train(policy.is_gradient_checkpointing)  # no layer is checkpointed in eval mode
    skipped = 0
    for epoch in range(config.inner_epochs):
        optimizer.zero_grad()
        sums = Counter()
        for i, (chunk, batch) in enumerate(tqdm(batches, "micro-batches", leave=False, delay=5)):
            log_probs = token_log_probs(policy, batch, config.temperature)
            if epoch == 0:  # before any step this is log pi_old, by the very kernels that the ratio will see
                old_log_probs.append(log_probs.detach())
            loss, stats = policy_loss(
                log_probs, old_log_probs[i], advantages[chunk], batch.mask, config.clip_low, config.clip_high,
                config.aggregation, normalizer, ref_log_probs[i], config.kl_coef)
            loss.backward()
            stats |= {"loss": loss, "difference": (old_log_probs[i] - batch.log_probs).abs().sum()}
            sums.update({name: value.item() for name, value in stats.items()})
        tokens = max(1, sums["tokens"])
        difference = sums["difference"] / tokens
        # Before the very first step. The tolerances are for bf16 and float32; "not <=" refuses NaN as well.
        if not optimizer.state and not difference <= (0.25 if rollout.ids.is_cuda else 0.01):
            raise UserError(f"--model: {UNEQUAL.format(difference)}")
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if math.isfinite(sums["loss"] + norm):
            optimizer.step()
        else:
            skipped += 1
    return {"loss": sums["loss"], "grad_norm": norm, "ratio/clip_frac": sums["clipped"] / tokens,
            "kl/old": sums["kl_old"] / tokens, "kl/ref": sums["kl_ref"] / tokens,
            "sampling/logp_difference": difference, "update/skipped": skipped}


def train_step(policy, tokenizer, eos_ids: list[int], optimizer, examples: list["Example"], reward,
               config: "Config", ref_model=None) -> tuple[dict, list]:
    """One step of the algorithm on P examples, numbered as at the top. Returns its metrics and B samples."""
    P, G, start = len(examples), config.group_size, time.perf_counter()
    # 1. Sample.
    rollout = sample(policy, [x.ids for x in examples], G, config.max_new_tokens, eos_ids, config.temperature)
    responses = texts_of(rollout, tokenizer, examples)
    sampled = time.perf_counter()
    # 2. Verify; --reward-noise then flips some of the rewards.
    verified, errors = score_responses(reward, responses, examples)
    if len(errors) == P * G and not optimizer.state:  # before anything was learned: it is the function
        raise UserError(f"--reward {config.reward}: all {P * G} calls of the first step failed: {errors[0]}")
    rewards = torch.where(torch.rand(P, G) < config.reward_noise, 1 - verified, verified)
    # 3. Sequence log-probs.
    confidence = sequence_log_prob(rollout.log_probs, rollout.mask).view(P, G).cpu()
    # 4. and 5. Preference advantage, joined with the reward. icpo_advantage does both.
    advantages = icpo_advantage(rewards, confidence, config.alpha, config.beta, config.keep_uniform_groups)
    scored = time.perf_counter()
    # 6. Update.
    metrics = update(policy, optimizer, rollout, advantages.flatten().to(policy.device), config, ref_model)
    done = time.perf_counter()

    metrics |= rollout_metrics(rollout, verified, rewards, confidence, advantages, config.beta)
    metrics |= {"reward/errors": len(errors), "time/sample": sampled - start, "time/score": scored - sampled,
                "time/update": done - scored, "tokens_per_s": rollout.lengths.sum().item() / (done - start)}
    numbers = {"verified": verified, "reward": rewards, "confidence": confidence, "advantage": advantages}
    samples = [{"prompt": examples[b // G].prompt, "reference": examples[b // G].reference,
                "response": response} | {name: x.flatten()[b].item() for name, x in numbers.items()}
               for b, response in enumerate(responses)]
    return metrics, samples


# --------------------- The algorithm ends here. Below is what it takes to run it. ---------------------

OWN_DEFAULTS = dict(steps=500, max_new_tokens=512, micro_batch=8, lr=1e-6)
TASK_DEFAULTS = dict(output_dir="runs/addition", steps=60, max_new_tokens=32, micro_batch=128, lr=1e-4)
LOGGER = logging.getLogger("icpo")
UNEQUAL = "log-probs with a cache and without (sampled, scored) differ by {:.2g} nats a token: choose another"


@dataclass
class Config:
    """The flags of the command line: group_size is --group-size, and the comments are its --help."""

    # What to train, and on what
    model: str | None = None  # model directory or hub name; without it the built-in task runs
    train_data: str | None = None  # JSON Lines of prompts and reference answers, for --model
    eval_data: str | None = None  # the same, held out; without it nothing is evaluated
    prompt_key: str = "prompt"  # key of the prompt in a line
    answer_key: str = "answer"  # key of the reference answer in a line
    system_prompt: str = ""  # system message; without a chat template, text before every prompt
    prompt_suffix: str = ""  # text after every prompt
    no_chat_template: bool = False  # use prompts as they are, without the chat template
    reward: str = "verify:verify"  # module:function, called as f(response, reference) -> float
    reward_noise: float = 0.0  # probability of turning a training reward R into 1 - R
    # The run
    output_dir: str | None = None  # the run's own folder, by default runs/<task or model name>
    resume: bool = False  # continue from the last checkpoint in --output-dir
    save_every: int = 20  # steps between checkpoints
    seed: int = 0  # every random number follows from the seed and the step
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU, if there is one
    # Sampling and optimization
    steps: int | None = None  # training steps in all, also after --resume (built-in task 60, else 500)
    prompts_per_step: int = 16  # prompts in a step (P)
    group_size: int = 8  # responses to each prompt (G)
    max_new_tokens: int | None = None  # longest response in tokens (built-in task 32, else 512)
    max_prompt_tokens: int = 512  # longer prompts are skipped
    temperature: float = 1.0  # of sampling and scoring alike
    inner_epochs: int = 1  # optimizer steps on each rollout (PPO's epochs, GRPO's mu)
    micro_batch: int | None = None  # rows in a forward pass (built-in task 128, else 8)
    lr: float | None = None  # AdamW's learning rate (built-in task 1e-4, else 1e-6)
    warmup_steps: int = 5  # steps in which the learning rate rises linearly
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    gradient_checkpointing: bool = False  # recompute activations: less memory, more time
    # The method
    alpha: float = 0.1  # weight of the preference advantage; 0 is GRPO, below 1/G keeps the signs of its A
    beta: float = 10.0  # sharpness of the comparison, per nat of mean token log-prob
    keep_uniform_groups: bool = False  # groups of equal rewards get alpha * s, not 0
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.28  # the ratio is clipped above 1 + clip_high
    aggregation: Literal["token", "sequence"] = "token"  # what has equal weight: tokens or responses
    kl_coef: float = 0.0  # weight of the KL to the initial model, which then stays in memory
    # Evaluation, and the built-in task
    eval_every: int = 10  # steps between evaluations
    eval_rows: int = 256  # rows of the evaluation data that are used
    eval_samples: int = 8  # samples k of each row for mean@k and pass@k; 0: greedy only
    task_teacher_error: float = 0.9  # fraction of demonstrations in which the teacher forgets to carry
    task_warmup_steps: int = 1200  # steps of imitating the teacher before RL

    def __post_init__(self):
        if self.model:  # the built-in task's are set in train: replace(config, model=...) may come before
            self.fill_in(OWN_DEFAULTS)

    def fill_in(self, defaults: dict):
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


class UserError(Exception):
    """An error that the user can fix: shown as one line, exit status 2."""


def check(config: Config):
    """Raises UserError for settings that cannot work, before anything is loaded or written."""
    for names, wanted, holds in [
        ("steps prompts_per_step max_new_tokens max_prompt_tokens inner_epochs micro_batch save_every "
         "eval_every eval_rows", "at least 1", lambda x: x >= 1),
        ("group_size", "at least 2: responses are compared", lambda x: x >= 2),
        ("lr temperature beta max_grad_norm", "above 0", lambda x: 0 < x < math.inf),
        ("clip_high kl_coef eval_samples warmup_steps task_warmup_steps", "at least 0", lambda x: x >= 0),
        ("reward_noise clip_low task_teacher_error", "from 0 to 1", lambda x: 0 <= x <= 1),
        ("device", "cpu: torch sees no CUDA GPU", lambda x: x == "cpu" or torch.cuda.is_available()),
        ("seed", "from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
        ("alpha", "from 0 to below 1/2, or wrong could outrank correct responses", lambda x: 0 <= x < 0.5),
    ]:
        for name in names.split():
            if not holds(getattr(config, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {wanted}")
    if bool(config.model) != bool(config.train_data) or config.eval_data and not config.model:
        raise UserError("--model and --train-data need each other, and --eval-data needs both")
    out = Path(config.output_dir)
    if config.resume and not (out / "checkpoint/state.pt").exists():
        raise UserError(f"--resume: no checkpoint in {out}: begin anew in another --output-dir")
    fresh = not config.resume and (config.model or str(out) != TASK_DEFAULTS["output_dir"])
    if fresh and (out.is_file() or any(out.glob("[!.]*"))):
        raise UserError(f"--output-dir {out} is not empty: choose another, or continue its run with --resume")


def load_reward(spec: str):
    """The reward function f(response, reference) -> float named module:function. Raises UserError."""
    sys.path.append("")
    try:
        with contextlib.chdir("."), torch.enable_grad():  # what the module may change here is changed back
            reward = pkgutil.resolve_name(spec)
        if not callable(reward):
            raise TypeError("not a function")
    except (Exception, SystemExit) as error:  # the user's module runs when it is imported
        raise UserError(f"--reward {spec}: {error!r}; give module:function, importable from here")
    return reward


def score_responses(reward, responses: list[str], examples: list) -> tuple[Tensor, list[str]]:
    """Rewards (P, G) float32 of G responses to each example; the errors of failed calls, which score 0."""
    G, owner = len(responses) // len(examples), os.getpid()
    rewards, errors = torch.zeros(len(responses)), []
    for i, response in enumerate(responses):
        try:
            value = float(reward(response, examples[i // G].reference))
            if not math.isfinite(value):
                raise ValueError(f"the reward is {value}")
            rewards[i] = value
        except BaseException as error:  # even SystemExit: one response must not end a run of hours
            if isinstance(error, KeyboardInterrupt) or os.getpid() != owner:  # a forked process is to end
                raise
            errors.append(repr(error))
            LOGGER.warning_once("\na reward failed: it is 0, and counted in reward/errors", exc_info=True)
    return rewards.view(-1, G), errors


def quietened(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without dropout or noise in training mode, for a model that returns logits and a cache only."""
    config = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            setattr(config, name, quietened(value))
        elif isinstance(value, float) and re.search("drop|jitter", name):
            setattr(config, name, 0.0)
        elif re.search("output_(router_logits|hidden_states|attentions)", name):
            setattr(config, name, False)
    config.return_dict = True
    return config


def closing_token(tokenizer) -> set[int]:
    """The special token, if there is one, with which the chat template closes an assistant's message."""
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well"}]
    try:
        after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("Well")[2].strip()
    except Exception:  # no template, or a broken one, which is told where a prompt goes through it
        return set()
    return {i for token, i in tokenizer.get_added_vocab().items() if after.startswith(token)}


def load_model(path: str, device: str):
    """A model fit for training, its tokenizer, and the ids of the tokens that end a response.

    Raises UserError for what is no model, cannot be trained here, or could not be saved again afterwards.
    """
    def refuse(problems: dict):
        for problem, holds in problems.items():
            if holds:
                raise UserError(problem)

    disable_progress_bar()  # transformers' own, for files
    folder = Path(path)
    try:
        refuse({
            "a file: give the folder of a model in transformers' format": folder.is_file(),
            "a LoRA adapter: merge it into its model first": (folder / "adapter_config.json").exists(),
            f"for --resume: the model is in {folder.parent}/model": (folder / "state.pt").exists(),
            f"a run's folder: its model is {folder}/model, in the end": (folder / "checkpoint").is_dir(),
            "no config.json in it, so no model": folder.is_dir() and not (folder / "config.json").exists(),
            "no such folder": not folder.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path)})
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        wrapped = type(config) in AutoModelForImageTextToText._model_mapping.keys()
        loader = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
        # float32 whatever the checkpoint holds: bf16 would round an AdamW step of 1e-6 away.
        model, loaded = loader.from_pretrained(
            path, config=quietened(config), dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True)
        rows = model.get_input_embeddings().weight.shape[0]
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        missing = sorted(loaded["missing_keys"])
        refuse({
            f"no weights in it for {', '.join(missing[:3])}: not a whole language model": missing,
            "no tokenizer in it: save it there too": not tokenizer("1", add_special_tokens=False).input_ids,
            f"tokenizer of {tokenizer.vocab_size}, model of {rows} tokens: save its own tokenizer there":
                tokenizer.vocab_size > rows,
            "no eos token in its tokenizer or generation_config.json": not ends})
        rollout = sample(model, [[0], [0, 0]], 2, 3, [])  # does it work at all?
        difference = (token_log_probs(model, rollout) - rollout.log_probs).abs().mean().item()
        refuse({UNEQUAL.format(difference): not difference <= 1e-4})
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # loaded as it is, but it could not be saved
            model.generation_config = GenerationConfig(eos_token_id=sorted(ends))
        model.config_to_save = config
        context = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        return model.to(device), tokenizer, sorted(ends | closing_token(tokenizer))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged file or a foreign model raises whatever its reader does
        reason = " ".join((str(error) or repr(error)).split())[:300]
        here = folder.exists() or isinstance(error, UserError)
        raise UserError(f"--model {path}: {'' if here else 'no such folder; '}{reason}")


class Example(NamedTuple):
    prompt: str        # as it stands in the file
    reference: object  # what the reward function compares with: as in the file; of a solution, its answer
    ids: list[int]     # the whole prompt in tokens: system prompt, chat template and suffix included
    opening: str = ""  # the <think> that ends the prompt, where it does: the response begins with it


def encode(prompt: str, tokenizer, config: Config) -> tuple[list[int], str]:
    """A prompt's tokens, in the chat template if there is one, and the <think> that it leaves open, or ""."""
    asked, special = prompt + config.prompt_suffix, False
    if tokenizer.chat_template and not config.no_chat_template:
        messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        messages.append({"role": "user", "content": asked})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if asked.strip() not in text:
            raise UserError("the chat template leaves the prompt out; --no-chat-template goes without it")
    else:
        text = config.system_prompt + asked
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids = tokenizer(text, add_special_tokens=special).input_ids
    if special and ids[-1:] == [tokenizer.eos_token_id]:  # some tokenizers end every text
        ids = ids[:-1]
    behind = text.rpartition(asked.strip())[2]  # a <think> in the middle of the prompt opens nothing
    opening = re.search(r"(<think>(?!.*</think>).*)?\Z", behind, re.DOTALL)[0]
    return ids, opening or re.search(r"(<think>\s*)?\Z", text)[0]


def load_examples(path: str, tokenizer, config: Config, context: int | None = None) -> list[Example]:
    """Reads JSON Lines; cuts a reference to the answer it marks, like GSM8K's "#### 18".

    context: tokens of a prompt and its response together, by default the model's. Raises UserError.
    """
    examples, keys = [], (config.prompt_key, config.answer_key)
    context = context or tokenizer.model_max_length
    longest = min(config.max_prompt_tokens, context - config.max_new_tokens)
    lines = [(n, line) for n, line in enumerate(Path(path).read_bytes().splitlines(), 1) if line.strip()]
    for number, line in tqdm(lines, desc=f"reading {Path(path).name}", leave=False):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError("not an object; give JSON Lines, an object a line")
            prompt, answer = map(row.get, keys)
            if not isinstance(prompt, str) or answer is None:
                raise UserError(f"needs a string {keys[0]!r} and an {keys[1]!r}, has {list(row)}; set "
                                f"--prompt-key and --answer-key")
            ids, opening = encode(prompt, tokenizer, config)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}; give JSON Lines, an object a line, "
                            f"in UTF-8")
        except Exception as error:  # a chat template may raise anything, and a tokenizer refuses surrogates
            reason = error if isinstance(error, UserError) else f"tokenizer or chat template fails: {error!r}"
            raise UserError(f"{path}, line {number}: {reason}")
        if 0 < len(ids) <= longest:
            cut = isinstance(answer, str) and extract_answer(answer, strict=True)
            examples.append(Example(prompt, cut or answer, ids, opening))
    if skipped := len(lines) - len(examples):
        print(f"{path}: skipped {skipped} prompts that are empty or longer than {longest} tokens")
    if not lines:
        raise UserError(f"{path} is empty")
    if not examples:
        raise UserError(f"{path}: no usable row of {len(lines)}; --max-prompt-tokens, and the context of "
                        f"{context} less --max-new-tokens, leave {longest} tokens for a prompt")
    return examples


def texts_of(rollout: Rollout, tokenizer, examples: list[Example]) -> list[str]:
    """The responses as the model wrote them, its special tokens too, up to the end-of-sequence token."""
    G = len(rollout.lengths) // len(examples)
    texts = [tokenizer.decode(ids if cut else ids[:-1], clean_up_tokenization_spaces=False)
             for ids, cut in zip(rollout.responses(), rollout.truncated.tolist())]
    return [examples[b // G].opening + text for b, text in enumerate(texts)]


def rollout_metrics(rollout: Rollout, verified, rewards, confidence, advantages, beta: float) -> dict:
    """Metrics of one rollout, from tensors (P, G); the mean of nothing is None."""
    def mean(x):
        return x.float().mean().item() if x.numel() else None

    correct, grpo = verified > 0.5, group_advantage(rewards)
    surest_is_correct = correct[torch.arange(len(correct)), confidence.argmax(dim=1)]
    preference = preference_advantage(confidence, beta)
    agreement = grpo * preference
    return {
        "reward/mean": mean(rewards), "reward/verified": mean(verified),
        "reward/std": mean(rewards.std(dim=1)), "groups/uniform_frac": mean((grpo == 0).all(dim=1)),
        "advantage/abs_mean": mean(advantages.abs()), "preference/abs_mean": mean(preference.abs()),
        "preference/agreement": (agreement.sum() / agreement.abs().sum().clamp(min=1e-9)).item(),
        "confidence/correct": mean(confidence[correct]), "confidence/wrong": mean(confidence[~correct]),
        "confidence/overconfident_frac": mean(correct.any(dim=1) & ~surest_is_correct),
        "entropy": mean(rollout.entropies[rollout.mask]),
        "length/mean": mean(rollout.lengths), "length/truncated_frac": mean(rollout.truncated),
    }


def evaluate(policy, tokenizer, eos_ids: list[int], examples: list[Example], reward, config: Config):
    """Metrics of greedy responses, and of k = eval_samples more; and the greedy ones with their rewards."""
    if not examples:
        return {}, []
    generator = torch.Generator().manual_seed(config.seed)  # its own, so that every evaluation draws alike

    def respond(k: int, temperature: float):  # the responses, rewards (examples, k)
        responses, size = [], max(1, config.prompts_per_step * config.group_size // k)
        bar = tqdm(total=len(examples), desc=f"evaluating, {k} each", leave=False)
        for start in range(0, len(examples), size):
            batch = examples[start:start + size]
            prompts = [example.ids for example in batch]
            rollout = sample(policy, prompts, k, config.max_new_tokens, eos_ids, temperature, generator)
            responses += texts_of(rollout, tokenizer, batch)
            bar.update(len(batch))
        bar.close()
        return responses, score_responses(reward, responses, examples)[0]

    greedy, rewards = respond(1, temperature=0)
    metrics = {"eval/accuracy": rewards.mean().item()}
    if config.eval_samples:
        R = respond(config.eval_samples, config.temperature)[1]
        metrics |= {"eval/mean_at_k": R.mean().item(), "eval/pass_at_k": R.amax(dim=1).mean().item()}
    return metrics, list(zip(greedy, rewards.flatten().tolist()))


# --------------------------------------------------------------------------------------------------- Training

def batch_indices(examples: int, step: int, count: int, seed: int) -> list[int]:
    """The numbers of the examples of a step: each once an epoch, each epoch in an order of its own."""
    return [int(np.random.default_rng([seed, place // examples]).permutation(examples)[place % examples])
            for place in range((step - 1) * count, step * count)]


@contextlib.contextmanager
def writing(path: Path):
    """Turns what a full disk or a folder without permission raises into a UserError that names the path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, or what torch.save and safetensors raise on a full disk
        reason = getattr(error, "strerror", None) or f"the disk may be full ({error})"
        raise UserError(f"{path} cannot be written: {reason}; make room or change --output-dir")


def claim(out: Path) -> FileLock:
    """Keeps other runs out of the folder while the lock is referred to. Raises UserError if one is in it."""
    with writing(out / ".lock"):
        try:
            lock = FileLock(out / ".lock", is_singleton=True)
            lock.acquire(timeout=0)
            return lock
        except Timeout:
            raise UserError(f"--output-dir {out}: another run is writing there; choose another")


def append(path: Path, rows: list[dict]):
    # A lone surrogate, which JSON allows and UTF-8 does not, is written as it stood: \ud800.
    with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def replace_file(path: Path, write):
    """Calls write(another path), then renames: at every moment the file at path is whole, old or new."""
    with writing(path):
        write(part := path.with_suffix(".tmp"))
        part.replace(path)


def until_interrupted(steps):
    """Yields steps. Ctrl-C or SIGTERM finishes the current step, then stops; a second one stops at once."""
    signals = []

    def handler(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        tqdm.write("\nicpo.py: finishing this step; once more stops at once", file=sys.stderr)

    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:  # no other may set a handler
        FORMER_HANDLERS.update({number: signal.signal(number, handler) for number in STOPPING})
    try:
        yield from itertools.takewhile(lambda step: not signals, steps)
    finally:
        if main_thread:
            restore_handlers()


def restore_handlers():
    while FORMER_HANDLERS:
        signal.signal(*FORMER_HANDLERS.popitem())


STOPPING, FORMER_HANDLERS = (signal.SIGINT, signal.SIGTERM), {}
if hasattr(os, "register_at_fork"):  # a process that a reward forks has the former handlers from the start
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING),
        after_in_child=lambda: [restore_handlers(), signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)])


def load_checkpoint(out: Path, config: Config) -> dict:
    """The state that train saved in out. Raises UserError if it is damaged, or the config another."""
    try:
        state = torch.load(out / "checkpoint/state.pt", map_location="cpu", weights_only=True)
        saved = state["config"]
    except Exception:  # whatever the reader of a damaged file raises
        raise UserError(f"--resume: the checkpoint in {out} is damaged: begin anew in another --output-dir")
    free = "resume output_dir steps device save_every micro_batch gradient_checkpointing".split()
    for name, was in saved.items():
        if name not in free and was != (now := getattr(config, name)):
            raise UserError(f"--resume: the run has another --{name.replace('_', '-')}: {was}, not {now}")
    return state


def train(config: Config) -> dict:
    """Trains, evaluates and saves as config says; returns the last evaluation's metrics. Raises UserError."""
    config = replace(config)  # a copy, with the defaults of a model that was set after the config was made
    for name in ("model", "train_data", "eval_data", "output_dir"):
        if path := getattr(config, name):
            setattr(config, name, os.path.expanduser(path))
    named = {"output_dir": f"runs/{Path(config.model).resolve().name}"} if config.model else TASK_DEFAULTS
    config.fill_in(named)
    check(config)
    out = Path(config.output_dir).resolve()  # the reward function may change the working folder
    state = load_checkpoint(out, config) if config.resume else None
    reward = load_reward(config.reward)
    if not (config.model or state):
        lock = claim(out)
        write_task(out, config)
    source = config.model or str(out / "task/model")
    policy, tokenizer, eos_ids = load_model(source, config.device)
    ref_model = load_model(source, config.device)[0] if config.kl_coef else None
    if config.gradient_checkpointing and not policy.supports_gradient_checkpointing:
        raise UserError(f"--gradient-checkpointing: {type(policy).__name__} has none")
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    examples = load_examples(config.train_data or out / "task/train.jsonl", tokenizer, config)
    eval_data = config.eval_data if config.model else out / "task/eval.jsonl"
    held_out = load_examples(eval_data, tokenizer, config)[:config.eval_rows] if eval_data else []
    last_id = max(max(example.ids) for example in examples + held_out)
    rows = policy.get_input_embeddings().weight.shape[0]
    if last_id >= rows:
        raise UserError(f"--model {source}: a prompt has the token {last_id}, its embedding only {rows} rows")
    data = zlib.crc32(repr([examples, held_out]).encode())
    lock = claim(out)
    tokens = len(held_out) * (1 + config.eval_samples) * config.max_new_tokens
    print(f"{config.device}, {torch.get_num_threads()} threads, {policy.num_parameters() / 1e6:.1f}M "
          f"parameters, {len(examples)} prompts; an evaluation takes up to {tokens:,} tokens: "
          f"{len(held_out)} --eval-rows, each greedy and {config.eval_samples} --eval-samples, of "
          f"--max-new-tokens {config.max_new_tokens}")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    logs = metrics_log, samples_log = out / "metrics.jsonl", out / "samples.jsonl"

    def report():
        if held_out:
            i = min(range(len(held_out)), key=lambda i: before[1][i][1])  # of those that were wrong at first
            values = ", ".join(f"{name.split('/')[1]} {value:.3f}" for name, value in after[0].items())
            tqdm.write(f"step {step}: {values}\n  {held_out[i].prompt[-40:]!r} -> {after[1][i][0][-60:]!r}")

    def save():
        state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                 "before": before, "after": after, "config": asdict(config), "data": data,
                 "log_sizes": [log.stat().st_size for log in logs]}
        replace_file(out / "config.json", lambda path: path.write_text(json.dumps(asdict(config), indent=2)))
        replace_file(out / "checkpoint/state.pt", lambda path: torch.save(state, path))

    if state:
        if state["data"] != data:
            raise UserError("--resume: the training or evaluation data are not those that the run began with")
        policy.load_state_dict(state.pop("policy"))
        optimizer.load_state_dict(state.pop("optimizer"))
        step, before, after = state["step"], state["before"], state["after"]
        for log, size in zip(logs, state["log_sizes"]):
            os.truncate(log, size)  # the steps after the checkpoint will be taken, and logged, again
    else:
        step, (before, after) = 0, [evaluate(policy, tokenizer, eos_ids, held_out, reward, config)] * 2
        report()
        append(metrics_log, [{"step": 0} | before[0]])
        append(samples_log, [])  # makes the file, whose size the checkpoint notes
        save()

    bar = tqdm(range(step + 1, config.steps + 1), initial=step, total=config.steps,
               bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}")
    for step in until_interrupted(bar):
        # Every random number of a step follows from (seed, step), so a resumed run repeats an unbroken one.
        set_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        optimizer.param_groups[0]["lr"] = lr = config.lr * min(1, step / max(1, config.warmup_steps))
        indices = batch_indices(len(examples), step, config.prompts_per_step, config.seed)
        metrics, samples = train_step(
            policy, tokenizer, eos_ids, optimizer, [examples[i] for i in indices], reward, config, ref_model)
        if step % config.eval_every == 0 or step == config.steps:
            after = evaluate(policy, tokenizer, eos_ids, held_out, reward, config)
            report()
            metrics |= after[0]
        append(metrics_log, [{"step": step, "lr": lr} | metrics])
        append(samples_log, [{"step": step} | row for row in samples[:config.group_size]])
        shown = {"acc": (after[0] | metrics).get("eval/accuracy"), "reward": metrics["reward/verified"],
                 "entropy": metrics["entropy"], "agree": metrics["preference/agreement"]}
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value is not None})
        if metrics["length/truncated_frac"] > 0.5:
            LOGGER.warning_once(f"\nover half of the responses were cut at --max-new-tokens "
                                f"{config.max_new_tokens}; raise it if answers get lost")
        if step % config.save_every == 0 and step < config.steps:
            save()
    save()
    if step < config.steps:
        raise KeyboardInterrupt

    policy.config = policy.config_to_save
    with writing(out / "model"):
        policy.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    for name, value in after[0].items():
        print(f"{name}: {before[0][name]:.3f} before, {value:.3f} after ({len(held_out)} held-out prompts)")
    print(f"model: {out / 'model'}\nlog: {metrics_log}, {samples_log}")
    return after[0]


def worked_addition(a: int, b: int, carry: bool = True) -> str:
    """47+85 by columns: 7+5=12 4+8=12+1=13 #### 132, or without the carry: 7+5=12 4+8=12+0=12 #### 122."""
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = int(carry and units > 9)
    final = 10 * (tens + carried) + units % 10
    return f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}+{carried}={tens + carried} #### {final}"


def write_task(out: Path, config: Config):
    """Writes sums to out/task, and a tiny Qwen2 taught to forget the carry: it is sure of wrong sums [O]."""
    if earlier := [*out.glob("[!.]*")]:
        aside = next(x for n in itertools.count(1) if not (x := Path(f"{out}-{n}")).exists())
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        print(f"the earlier run in {out} is now in {aside}")
    set_seed(config.seed)
    # A token is a byte: the kind of tokenizer that transformers rebuilds from a saved Qwen2 directory.
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[])
    sums = list(itertools.product(range(10, 100), repeat=2))
    random.shuffle(sums)
    held_out, sums = sums[:1024], sums[1024:]
    for name, part in (("eval", held_out), ("train", sums)):
        append(out / f"task/{name}.jsonl", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in part])
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=257, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=256,
        pad_token_id=256, bos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(config.task_warmup_steps), desc="imitating the teacher"):
        rise, fall = (step + 1) / 50, 2 * (1 - step / config.task_warmup_steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, rise, fall)
        texts = [f"{a}+{b}=" + worked_addition(a, b, carry=random.random() >= config.task_teacher_error)
                 + tokenizer.eos_token for a, b in random.sample(sums, 32)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        labels[:, :len("47+85=")] = -100  # the teacher shows answers, not prompts
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    with writing(out / "task/model"):
        model.save_pretrained(out / "task/model")
        tokenizer.save_pretrained(out / "task/model")


def main(arguments: list[str] | None = None) -> int:
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0],
                              usage="python icpo.py [--flag value ...], where --help lists the flags")
    comments = dict(re.findall(r"^    (\w+):.*  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may not know the characters that a model writes
        sys.stdout.reconfigure(errors="backslashreplace")
    config = Config(**vars(parser.parse_args(arguments)))
    if not config.model:
        torch.set_num_threads(1)  # threads that wait for each other make minutes of seconds on a busy machine
    try:
        train(config)
        return 0
    except KeyboardInterrupt:
        tqdm.write("\nicpo.py: stopped; once training has begun, --resume continues it", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate memory|MemoryError", repr(error)):
            raise
        message = ("out of memory: lower --micro-batch or add --gradient-checkpointing, as --resume allows, "
                   "or begin anew with a lower --max-new-tokens or --prompts-per-step")
    print(f"icpo.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
