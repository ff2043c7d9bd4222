"""ICPO in one file: Intrinsic Confidence-Driven Group Relative Preference Optimization (arXiv 2511.21005).

GRPO samples a group of responses to a prompt, verifies each, and makes a response more likely in so far as it did
better than its group. ICPO also compares how probable the model itself finds the responses of the group: of a pair the
less probable one is preferred, so that confident errors are pushed down harder and undervalued right answers up harder.

One step of the algorithm:
  1. Sample G responses to each of P prompts, and keep their token log-probs.                 sample
  2. Verify each response against the reference answer: reward R.                             verify.py
  3. Sequence log-prob l: the mean token log-prob of a response, its "confidence". [S]        sequence_log_prob
  4. Preference advantage s: compare l by pairs within the group; less probable wins. [P S O] preference_advantage
  5. Join s with R and normalise over the group as GRPO does: advantage A. [P O]              icpo_advantage
  6. Push every token of a response by its A, through the clipped loss of PPO and GRPO.       policy_loss

Where each part comes from. The full text of the paper was not at hand, its abstract, its authors' README and a public
summary were:  [P] the abstract or the authors' README say it  [S] the summary says it  [O] our reading or choice.
What is marked [O] may differ from the paper, and no result shown here is the paper's.

Glossary, with P prompts, G responses to each, B = P * G rows in prompt-major order, T response positions, V vocabulary:
  o_i         rollout.ids      (B, S)  prompt, response, padding          sample
  L_i         rollout.lengths  (B,)    response tokens, the last included sample
  log pi_old  old_log_probs    (B, T)  before the first optimizer step    update
  log pi      log_probs        (B, T)                                     token_log_probs
  l_i         seq_log_probs    (P, G)  "confidence" in the metrics        sequence_log_prob
  s_i         preference       (P, G)  in (-1, 1)                         preference_advantage
  R_i         rewards          (P, G)                                     verify.verify, or a function of yours
  A_i         advantages       (P, G)                                     group_advantage (GRPO), icpo_advantage
  rho         ratio            (B, T)  exp(log pi - log pi_old)           policy_loss
  alpha, beta alpha, beta      scalar  weight of s, sharpness of the comparison

Deliberate: no critic; no scoring pass of its own, since the sampler yields l and the update's first pass log pi_old.
"""

import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM,
                          Qwen2Tokenizer, set_seed)
from transformers.cache_utils import DynamicLayer
from transformers.hf_argparser import HfArg, HfArgumentParser

from verify import extract_answer


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2."""


# --------------------------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    """The flags of the command line: group_size is --group-size. Where the default is None, __post_init__ sets it."""

    # What to train, and on what
    model: str | None = HfArg(default=None, help="model directory or hub name; without it the built-in task runs")
    train_data: str | None = HfArg(default=None, help="JSON Lines of prompts and reference answers, for --model")
    eval_data: str | None = HfArg(default=None, help="the same, held out; without it nothing is evaluated")
    prompt_key: str = HfArg(default="prompt", help="key of the prompt in a line")
    answer_key: str = HfArg(default="answer", help="key of the reference answer in a line")
    system_prompt: str = HfArg(default="", help="system message; without a chat template, text before every prompt")
    prompt_suffix: str = HfArg(default="", help="text after every prompt")
    no_chat_template: bool = HfArg(default=False, help="use prompts as they are, without the chat template")
    reward: str = HfArg(default="verify:verify", help="module:function, called as f(response, reference) -> float")
    reward_noise: float = HfArg(default=0.0, help="probability of turning a training reward R into 1 - R")
    # The run
    output_dir: str | None = HfArg(default=None, help="the run's own folder, by default runs/<task or model name>")
    resume: bool = HfArg(default=False, help="go on from the last checkpoint in --output-dir")
    save_every: int = HfArg(default=20, help="steps between checkpoints")
    seed: int = HfArg(default=0, help="every random number follows from the seed and the step")
    device: str = HfArg(default="auto", help="auto, cpu, cuda or cuda:N")
    # Sampling and optimisation
    steps: int | None = HfArg(default=None, help="RL steps in all, also after --resume (built-in task 60, else 500)")
    prompts_per_step: int = HfArg(default=16, help="prompts in a step (P)")
    group_size: int = HfArg(default=8, help="responses to each prompt (G)")
    max_new_tokens: int | None = HfArg(default=None, help="longest response in tokens (built-in task 32, else 512)")
    max_prompt_tokens: int = HfArg(default=512, help="longer prompts are skipped")
    temperature: float = HfArg(default=1.0, help="of sampling and scoring alike")
    inner_epochs: int = HfArg(default=1, help="optimizer steps on each rollout")
    micro_batch: int | None = HfArg(default=None, help="rows in a forward pass (built-in task 128, else 8)")
    lr: float | None = HfArg(default=None, help="AdamW's learning rate (built-in task 1e-4, else 1e-6)")
    warmup_steps: int = HfArg(default=5, help="steps in which the learning rate rises linearly")
    weight_decay: float = HfArg(default=0.0, help="AdamW's weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="larger gradients are scaled down to this norm")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, more time")
    # The method
    alpha: float | None = HfArg(default=None, help="weight of preference; 0 is GRPO (form gated 0.9, form reward 0.4)")
    alpha_end: float | None = HfArg(default=None, help="alpha moves linearly to this over the run, by default it stays")
    beta: float = HfArg(default=10.0, help="sharpness of the comparison, per nat of mean token log-prob")
    shaping: Literal["reward", "gated"] = HfArg(default="gated", help="how preference joins the reward: icpo_advantage")
    keep_uniform_groups: bool = HfArg(default=False, help="form reward: preference pushes groups of equal rewards too")
    clip_low: float = HfArg(default=0.2, help="the ratio is clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.28, help="the ratio is clipped above 1 + clip_high")
    aggregation: Literal["token", "sequence"] = HfArg(default="token", help="what weighs the same: tokens or responses")
    kl_coef: float = HfArg(default=0.0, help="weight of the KL to the initial model, which then stays in memory")
    # Evaluation, and the built-in task
    eval_every: int = HfArg(default=10, help="steps between evaluations")
    eval_rows: int = HfArg(default=256, help="rows of the evaluation data that are used")
    eval_samples: int = HfArg(default=8, help="samples k of each row for mean@k and pass@k; 0: greedy only")
    task_teacher_error: float = HfArg(default=0.9, help="share of demonstrations in which the teacher forgets to carry")
    task_warmup_steps: int = HfArg(default=1200, help="steps of imitating the teacher before RL")

    def __post_init__(self):
        names = ("output_dir", "steps", "max_new_tokens", "micro_batch", "lr")
        values = ("runs/addition", 60, 32, 128, 1e-4)
        if self.model:
            values = (f"runs/{Path(self.model).resolve().name}", 500, 512, 8, 1e-6)
        for name, value in zip(names, values):
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.alpha is None:
            self.alpha = 0.9 if self.shaping == "gated" else 0.4
        self.alpha_end = self.alpha if self.alpha_end is None else self.alpha_end


# ------------------------------------------------------------------------------------------------------------- Sampling


@dataclass
class Rollout:
    """B responses with their prompts; row b answers prompt b // G. Masks come from positions, not from token values."""

    ids: Tensor             # (B, S) prompt, response, padding: positions are 0, 1, 2, ... in every row
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor         # (B,) tokens of the response, its end-of-sequence token included
    truncated: Tensor       # (B,) bool, True if max_new_tokens came before an end of sequence
    log_probs: Tensor       # (B, T) float32, nats: each response token's log-prob as it was sampled, 0 in the padding
    entropies: Tensor       # (B, T) float32, nats: entropy of the distribution it was drawn from, 0 in the padding

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


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def shift(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature (N, V), in float32 and less the largest of each row: with weights = exp of this,
    p = weights / sum(weights). A pass over a large V costs as much as the network, so p and log p are not written out."""
    x = logits.float() if temperature == 1 else logits.float() / temperature
    return x - x.amax(dim=-1, keepdim=True)


def entropy_of(shifted: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Entropies (N,) in nats, total (N,) being the sum of the weights. 0 * -inf counts as 0."""
    return total.log() - torch.linalg.vecdot(weights, shifted.clamp(min=torch.finfo(shifted.dtype).min)) / total


class RoomyLayer(DynamicLayer):
    """transformers' key-value cache of one layer, copied once in 64 tokens to make room, and not for each of them."""

    room: tuple[Tensor, Tensor] | None = None  # self.keys and self.values are views of its first positions

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(keys, values, *args, **kwargs)
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if self.room is None or self.room[0].data_ptr() != self.keys.data_ptr() or self.room[0].shape[2] < end:
            self.room = tuple(pad(old, (0, 0, 0, end - start + 63)) for old in (self.keys, self.values))
        self.room[0][:, :, start:end], self.room[1][:, :, start:end] = keys, values
        self.keys, self.values = (full[:, :, :end] for full in self.room)
        return self.keys, self.values


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (N,) in proportion to weights (N, V), by inverse CDF of uniforms (N,), which are float64 in [0, 1).

    Sums of many terms are float64: exact in a long tail, and a token of weight 0 is never drawn. Of a large vocabulary
    first a block is drawn, then a token of it: float64 sums over all V take several times as long, multinomial fifty.
    """

    def pick(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # a bin (N,), and how far into it u lies, in [0, 1)
        cdf = weights.cumsum(dim=-1, dtype=torch.float64)
        place = u[:, None] * cdf[:, -1:]
        i = torch.searchsorted(cdf, place, right=True)
        beyond = (cdf.gather(1, i) - place) / weights.gather(1, i)
        return i.squeeze(1), (1 - beyond).clamp(0, 1 - 2**-53).squeeze(1)

    N, V = weights.shape
    if V <= 8192:
        return pick(weights, uniforms)[0]
    blocks = (pad(weights, (0, -V % 128)) if V % 128 else weights).view(N, -1, 128)
    block, u = pick(blocks.sum(dim=-1), uniforms)
    return block * 128 + pick(blocks[torch.arange(N, device=weights.device), block], u)[0]


@torch.no_grad()
def sample(model, prompts: list[list[int]], group_size: int, max_new_tokens: int, eos_ids: list[int],
           temperature: float = 1.0, generator: torch.Generator | None = None) -> Rollout:
    """Draws group_size responses to each prompt from softmax(logits / temperature), and from nothing else.

    `generate` would take what is left unset (top_k, top_p, repetition_penalty) from the model's generation_config, and
    the log-probs would not be those of the tokens drawn. A prompt is prefilled once and its cache shared by its group;
    rows leave the batch when they end. temperature 0 is greedy, with the log-probs of temperature 1. `generator` is a CPU
    one. Leaves the model in eval mode. Raises ValueError if a prompt is empty. Returns len(prompts) * group_size rows.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    model.eval()
    device, B, width = model.device, len(prompts) * group_size, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # left-padded
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    # All random numbers at once: what a row samples depends neither on its neighbours nor on the device.
    uniforms = torch.rand(B, max_new_tokens, dtype=torch.float64, generator=generator).to(device)
    ends, rows = torch.tensor(eos_ids, device=device), torch.arange(B, device=device)  # rows: those not yet ended
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    log_probs, entropies = torch.zeros(2, B, max_new_tokens, device=device)
    lengths, truncated = torch.full_like(rows, max_new_tokens), torch.ones_like(rows, dtype=torch.bool)

    with autocast(device):
        cache = DynamicCache(config=model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        logits = model(input_ids=ids, attention_mask=real, position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(group_size)
        logits, real, positions = (x.repeat_interleave(group_size, dim=0) for x in (logits, real, positions[:, -1:]))
        for t in range(max_new_tokens):
            shifted = shift(logits, temperature or 1)
            weights = shifted.exp()
            total = weights.sum(dim=-1)
            token = draw(weights, uniforms[rows, t]) if temperature else shifted.argmax(dim=-1)
            tokens[rows, t] = token
            log_probs[rows, t] = shifted.gather(1, token[:, None]).squeeze(1) - total.log()
            entropies[rows, t] = entropy_of(shifted, weights, total)

            ended = torch.isin(token, ends)
            lengths[rows[ended]], truncated[rows[ended]] = t + 1, False
            going = (~ended).nonzero().squeeze(1)
            if len(going) == 0 or t + 1 == max_new_tokens:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, token, real, positions = rows[going], token[going], real[going], positions[going]
            real, positions = torch.cat([real, torch.ones_like(token[:, None])], dim=1), positions + 1
            logits = model(input_ids=token[:, None], attention_mask=real, position_ids=positions, past_key_values=cache,
                           use_cache=True).logits[:, -1]

    T = int(lengths.max())
    drawn = zip(tokens.tolist(), lengths.tolist())
    sequences = [torch.tensor(prompts[b // group_size] + row[:length]) for b, (row, length) in enumerate(drawn)]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(group_size)
    return Rollout(pad_sequence(sequences, batch_first=True).to(device), prompt_lengths, lengths, truncated,
                   log_probs[:, :T], entropies[:, :T])


# -------------------------------------------------------------------------------------------------------------- Scoring


def token_log_probs(model, rollout: Rollout, temperature: float = 1.0, entropy: bool = True,
                    max_logits: int = 2**25) -> tuple[Tensor, Tensor | None]:
    """Log-probs (B, T) of the response tokens under softmax(logits / temperature) and entropies (B, T), float32, in nats.

    Both are 0 in the padding. Gradients flow through the log-probs; entropies are None unless asked for. Only response
    positions get logits, at most max_logits numbers at a time and recomputed in the backward pass, so that memory does
    not grow with B * T * V. Causal attention never looks right: padding on the right needs no attention mask.
    """
    row, t = rollout.mask.nonzero(as_tuple=True)  # the N response tokens of the batch, in one line
    at = rollout.prompt_lengths[row] + t
    targets = rollout.ids[row, at]

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return TargetLogProb.apply(output_logits(model, outputs, hidden), targets, temperature, entropy)

    with autocast(rollout.ids.device):
        outputs = model.base_model(input_ids=rollout.ids, use_cache=False)
        size = max(1, max_logits // model.config.vocab_size)
        chunks = list(zip(outputs.last_hidden_state[row, at - 1].split(size), targets.split(size)))
        if torch.is_grad_enabled() and len(chunks) > 1:
            scores = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        else:
            scores = [score(*chunk) for chunk in chunks]

    def place(values: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros(rollout.mask.shape, device=rollout.ids.device).index_put((row, t), torch.cat(values))

    log_probs, entropies = zip(*scores)
    return place(log_probs), place(entropies) if entropy else None


class TargetLogProb(torch.autograd.Function):
    """log_softmax(logits / temperature) at the targets, logits (N, V), targets (N,) -> (N,), and entropies (N,) or None.

    The gradient is (onehot(target) - p) / temperature. Autograd would find it too, by way of two more (N, V) buffers.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
        shifted = shift(logits, temperature)
        at_target = shifted.gather(1, targets[:, None]).squeeze(1)
        weights = shifted.exp() if entropy else shifted.exp_()
        total = weights.sum(dim=-1)
        ctx.save_for_backward(weights, total, targets)
        ctx.temperature = temperature
        entropies = entropy_of(shifted, weights, total) if entropy else None
        ctx.mark_non_differentiable(*[entropies] if entropy else [])
        return at_target - total.log(), entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None, None]:
        weights, total, targets = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        return (weights * (-grad / total[:, None])).scatter_add_(1, targets[:, None], grad), None, None, None


def output_logits(model, outputs, hidden: Tensor) -> Tensor:
    """Logits (N, V) of hidden states (N, hidden size), `outputs` being what the model's body gave.

    By the model's own forward with the body's result put in, since some models cap or scale what their head gives.
    """
    body = model.base_model
    body.forward = lambda *args, **kwargs: replace(outputs, last_hidden_state=hidden[None])
    try:
        return model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits[0]
    finally:
        del body.forward


def sequence_log_prob(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Length-normalised log-prob of each response [S]:  l_i = (1 / L_i) * sum over t of log pi_old(o_i,t | q, o_i,<t)

    log_probs (B, T), mask (B, T) bool -> (B,) float32, nats per token: the mean, so that long and short compare.
    """
    return torch.where(mask, log_probs.float(), 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


# ------------------------------------------------------------------------------------------------- Preference advantage


def preference_advantage(seq_log_probs: Tensor, beta: float) -> Tensor:
    """How far each response is preferred to the others of its group, from the model's own log-probs alone.

        P(i > j) = sigmoid(beta * (l_j - l_i))                     less probable is preferred; Bradley-Terry form [O]
        s_i = mean over j != i of 2 P(i > j) - 1                   one score from pairwise comparison [P]; the form [O]
            = mean over j != i of tanh(beta * (l_j - l_i) / 2)

    seq_log_probs (P, G) in nats per token, beta > 0 in 1 / nats -> (P, G) float32 in (-1, 1), detached. Sums to 0 over
    a group, is 0 for a tie, and tends to the rank score as beta grows. Raises ValueError if G < 2.
    """
    G = seq_log_probs.shape[-1]
    if G < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    l = seq_log_probs.detach().float()
    gaps = l[:, None, :] - l[:, :, None]  # (P, G, G): [p, i, j] is l_j - l_i
    return torch.tanh(beta * gaps / 2).sum(dim=-1) / (G - 1)


def group_advantage(rewards: Tensor) -> Tensor:
    """GRPO's advantage:  A_i = (r_i - mean(r)) / std(r)  over the group, with the unbiased std.

    rewards (P, G) -> (P, G) float32. A group whose rewards are equal up to rounding gets exactly 0. Adding a small number
    to the std would not do that: the std of eight float32 rewards of 0.7 is 6e-8. Raises ValueError if G < 2.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group needs at least 2 responses to compare")
    r = rewards.detach().float()
    spread = r.amax(dim=-1, keepdim=True) - r.amin(dim=-1, keepdim=True)
    uniform = spread <= 1e-6 * r.abs().amax(dim=-1, keepdim=True)
    return torch.where(uniform, 0, (r - r.mean(dim=-1, keepdim=True)) / r.std(dim=-1, keepdim=True))


def icpo_advantage(rewards: Tensor, seq_log_probs: Tensor, alpha: float, beta: float, shaping: str = "gated",
                   keep_uniform_groups: bool = False) -> Tensor:
    """The preference advantage joined with the verifiable reward [P], in one of two forms; alpha 0 is GRPO, to the bit.

        reward:  A = group_advantage(R + alpha * s)                 at the reward, as the authors do [P]; the sum [O]
        gated:   A = A_GRPO + alpha * trust * |A_GRPO| * s          verifier gives direction, confidence strength [O]
                 trust = clip(2 * agreement, 0, 1),  agreement = sum(A_GRPO * s) / sum(|A_GRPO * s|)             [O]

    The sums run over all responses given, those of a step: agreement is 1 if every less probable response did better than
    its group, -1 if every more probable one did, and preference that the verifier contradicts counts for nothing.
    For rewards of 0 and 1: in form `reward` a right response outranks every wrong one if alpha < 1/2; in form `gated` no
    sign ever flips if alpha < 1. A group of equal rewards gets 0; in form `reward` with keep_uniform_groups, alpha * s.
    rewards, seq_log_probs (P, G) -> (P, G) float32. Raises ValueError for another form.
    """
    preference, advantages = preference_advantage(seq_log_probs, beta), group_advantage(rewards)
    if shaping == "gated":
        push = advantages.abs() * preference
        agreement = (advantages * preference).sum() / push.abs().sum().clamp(min=1e-9)
        return advantages + alpha * (2 * agreement).clamp(0, 1) * push
    if shaping != "reward":
        raise ValueError(f"shaping is 'reward' or 'gated', not {shaping!r}")
    uniform = (advantages == 0).all(dim=-1, keepdim=True)
    shaped = group_advantage(rewards + alpha * preference)
    return torch.where(uniform, alpha * preference if keep_uniform_groups else 0, shaped)


# ---------------------------------------------------------------------------------------------------------- Policy loss


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
                clip_high: float = 0.28, aggregation: str = "token", normalizer: float | None = None,
                ref_log_probs: Tensor | None = None, kl_coef: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss of PPO and GRPO, with DAPO's separate upper clip and an optional KL to a reference model.

        rho = exp(log pi - log pi_old)
        loss = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A) + kl_coef * (exp(d) - d - 1)
        d = log pi_ref - log pi, so that the last term is Schulman's k3: unbiased for KL(pi || pi_ref), never negative

    log_probs, old_log_probs, ref_log_probs (B, T), advantages (B,), mask (B, T) bool -> scalar. Aggregation `token`:
    every token weighs 1 / normalizer; `sequence`: every response does, its tokens evenly. The normalizer counts the
    tokens, or the responses, of the whole optimizer batch; by default those given here. Also returns sums over the
    tokens ("tokens", "clipped", "kl_old", "kl_ref") for micro-batches to add up. Raises ValueError for another one.
    """
    if aggregation == "token":
        weights = mask / (normalizer or mask.sum())
    elif aggregation == "sequence":
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / (normalizer or len(mask))
    else:
        raise ValueError(f"aggregation is 'token' or 'sequence', not {aggregation!r}")

    A = advantages[:, None]
    change = torch.where(mask, log_probs - old_log_probs, 0)
    ratio = change.exp()
    losses = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    clipped = (A > 0) & (ratio > 1 + clip_high) | (A < 0) & (ratio < 1 - clip_low)
    stats = {"tokens": mask.sum(), "clipped": clipped.sum(), "kl_old": (ratio - change - 1).detach().sum()}
    if ref_log_probs is not None:
        d = torch.where(mask, ref_log_probs - log_probs, 0)
        kl = d.exp() - d - 1
        losses, stats["kl_ref"] = losses + kl_coef * kl, kl.detach().sum()
    return (losses * weights).sum(), stats


# ----------------------------------------------------------------------------------------------- Reward, model and data


def load_reward(spec: str):
    """The reward function f(response, reference) -> float called module:function. Raises UserError if there is none."""
    module, _, name = spec.partition(":")
    sys.path.append(os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module runs when it is imported, and may raise anything
        raise UserError(f"--reward {spec}: {error!r}; give module:function, importable from this folder") from error
    if not callable(reward):
        raise UserError(f"--reward {spec}: not a function")
    return reward


@functools.cache
def show_failure(reward) -> None:
    """Shows the exception in hand, once for each reward function."""
    tqdm.write("a call of the reward function failed; such calls score 0 and are counted in reward/errors. The first:\n"
               + traceback.format_exc(), file=sys.stderr)


def score_responses(reward, responses: list[str], references: list[str]) -> tuple[Tensor, int]:
    """Rewards (B,) float32, and how many calls failed: those that raised or gave no finite number. They score 0."""

    def call(response: str, reference: str) -> float:
        try:
            return float(reward(response, reference))
        except Exception:  # the user's code may raise anything, and one response must not end a run of hours
            show_failure(reward)
            return math.nan

    rewards = torch.tensor([call(*pair) for pair in zip(responses, references, strict=True)])
    failed = ~rewards.isfinite()
    return rewards.masked_fill(failed, 0), int(failed.sum())


class Example(NamedTuple):
    prompt: str     # as it stands in the file
    reference: str  # what the reward function compares with
    ids: list[int]  # the whole prompt in tokens: system prompt, chat template and suffix included


def load_model(path: str, device: torch.device):
    """The model, its tokenizer, and the ids of the tokens that end a response. Raises UserError.

    Parameters are float32 whatever the checkpoint holds: in bf16 an AdamW step of 1e-6 is rounded away.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    except Exception as error:  # a damaged file raises whatever its reader does
        raise UserError(f"--model {path}: {(str(error) or repr(error)).strip().splitlines()[0]}") from error
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise UserError(f"--model {path}: no eos token in its tokenizer or generation_config.json, so nothing would end")
    return model, tokenizer, sorted(ends)


def load_examples(path: str, tokenizer, config: Config) -> list[Example]:
    """Reads JSON Lines. A reference that marks its answer, as GSM8K's "... #### 18", is cut to it. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    examples, skipped = [], 0
    for number, line in enumerate(tqdm(lines, desc=f"reading {Path(path).name}", leave=False), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
        keys = sorted(row) if isinstance(row, dict) else []
        for key in (config.prompt_key, config.answer_key):
            if key not in keys:
                raise UserError(f"{path}, line {number}: no {key!r} among the keys {keys}; set --prompt-key, --answer-key")
        prompt, answer = row[config.prompt_key], str(row[config.answer_key])
        if not isinstance(prompt, str):
            raise UserError(f"{path}, line {number}: {config.prompt_key!r} is not a string")
        if tokenizer.chat_template and not config.no_chat_template:
            messages = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
            messages += [{"role": "user", "content": prompt + config.prompt_suffix}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(config.system_prompt + prompt + config.prompt_suffix).input_ids
        if 0 < len(ids) <= config.max_prompt_tokens:
            examples.append(Example(prompt, extract_answer(answer, strict=True) or answer, ids))
        else:
            skipped += 1
    if skipped:
        print(f"{path}: skipped {skipped} prompts, empty or longer than --max-prompt-tokens {config.max_prompt_tokens}")
    if not examples:
        raise UserError(f"{path}: no usable row")
    return examples


# ------------------------------------------------------------------------------------------------------------- Training


def update(policy, optimizer, rollout: Rollout, advantages: Tensor, config: Config, reference=None) -> dict[str, float]:
    """inner_epochs optimizer steps on one rollout, advantages (B,). Returns the metrics of the last step.

    Micro-batches bound memory and change nothing else: the normalizer is that of the whole batch. Rows whose advantage
    is exactly 0 count in it, but are not computed unless the KL needs them. A non-finite loss or gradient makes no step.
    """
    normalizer = rollout.mask.sum() if config.aggregation == "token" else len(advantages)
    rows = torch.arange(len(advantages), device=advantages.device) if reference else advantages.nonzero().squeeze(1)
    rows = rows[(rollout.prompt_lengths + rollout.lengths)[rows].argsort(stable=True)]  # alike in length: less padding
    batches = [(chunk, rollout.select(chunk)) for chunk in rows.split(config.micro_batch) if len(chunk)]
    old_log_probs, ref_log_probs = [], [None] * len(batches)
    metrics = dict.fromkeys(("loss", "grad_norm", "ratio/clip_frac", "kl/old", "kl/ref", "update/skipped"), 0.0)
    if reference:
        with torch.no_grad():
            ref_log_probs = [token_log_probs(reference, batch, config.temperature, False)[0] for _, batch in batches]
    for layer in policy.modules():  # transformers checkpoints layers in training mode only; dropout inside them stays off
        layer.training = getattr(layer, "gradient_checkpointing", False)
    for epoch in range(config.inner_epochs if batches else 0):
        optimizer.zero_grad()
        sums = dict.fromkeys(("loss", "tokens", "clipped", "kl_old", "kl_ref"), 0.0)
        for i, (chunk, batch) in enumerate(batches):
            log_probs, _ = token_log_probs(policy, batch, config.temperature, entropy=False)
            if epoch == 0:  # before any step: this is log pi_old, from the very kernels that the ratio will see
                old_log_probs.append(log_probs.detach())
            loss, stats = policy_loss(
                log_probs, old_log_probs[i], advantages[chunk], batch.mask, config.clip_low, config.clip_high,
                config.aggregation, normalizer, ref_log_probs[i], config.kl_coef)
            loss.backward()
            for name, value in (stats | {"loss": loss}).items():
                sums[name] += value.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if math.isfinite(sums["loss"]) and math.isfinite(norm):
            optimizer.step()
        else:
            metrics["update/skipped"] += 1
        metrics |= {"loss": sums["loss"], "grad_norm": norm, "ratio/clip_frac": sums["clipped"] / sums["tokens"],
                    "kl/old": sums["kl_old"] / sums["tokens"], "kl/ref": sums["kl_ref"] / sums["tokens"]}
    return metrics


def rollout_metrics(rollout: Rollout, verified: Tensor, rewards: Tensor, confidence: Tensor, advantages: Tensor,
                    beta: float) -> dict[str, float | None]:
    """What a step's metrics say of its rollout, tensors (P, G); see the README. The mean of nothing is None."""

    def mean(x: Tensor) -> float | None:
        return x.float().mean().item() if x.numel() else None

    right, plain, preference = verified > 0.5, group_advantage(rewards), preference_advantage(confidence, beta)
    agreement = plain * preference  # see icpo_advantage
    surest_is_right = right.gather(1, confidence.argmax(dim=1, keepdim=True)).squeeze(1)
    return {
        "reward/mean": mean(rewards), "reward/verified": mean(verified), "reward/std": mean(rewards.std(dim=1)),
        "groups/uniform_frac": mean((plain == 0).all(dim=1)),
        "advantage/abs_mean": mean(advantages.abs()),
        "preference/abs_mean": mean(preference.abs()),
        "preference/agreement": (agreement.sum() / agreement.abs().sum().clamp(min=1e-9)).item(),
        "confidence/correct": mean(confidence[right]), "confidence/wrong": mean(confidence[~right]),
        "confidence/overconfident_frac": mean(right.any(dim=1) & ~surest_is_right),
        "entropy": mean(rollout.entropies[rollout.mask]),
        "length/mean": mean(rollout.lengths), "length/truncated_frac": mean(rollout.truncated),
    }


def evaluate(policy, tokenizer, eos_ids: list[int], examples: list[Example], reward, config: Config):
    """Mean reward of greedy responses; with eval_samples k, also the mean of k samples and the mean of the best of k.

    The samples have a random stream of their own, the same at each call. Returns the metrics and the greedy responses.
    """
    generator = torch.Generator().manual_seed(config.seed)

    def run(k: int, temperature: float) -> tuple[Tensor, list[str]]:  # rewards (rows, k), responses
        responses, rows = [], max(1, config.prompts_per_step * config.group_size // k)
        for start in tqdm(range(0, len(examples), rows), desc="evaluating", leave=False):
            prompts = [example.ids for example in examples[start:start + rows]]
            rollout = sample(policy, prompts, k, config.max_new_tokens, eos_ids, temperature, generator)
            responses += tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
        rewards, _ = score_responses(reward, responses, [example.reference for example in examples for _ in range(k)])
        return rewards.view(-1, k), responses

    rewards, greedy = run(1, temperature=0)
    metrics = {"eval/accuracy": rewards.mean().item()}
    if config.eval_samples:
        rewards, _ = run(config.eval_samples, config.temperature)
        metrics |= {"eval/mean_at_k": rewards.mean().item(), "eval/pass_at_k": rewards.amax(dim=1).mean().item()}
    return metrics, greedy


def check(config: Config) -> None:
    """Raises UserError for settings that cannot work, before anything is loaded or written."""
    for names, wanted, holds in [
        ("steps prompts_per_step max_new_tokens max_prompt_tokens inner_epochs micro_batch save_every eval_every "
         "eval_rows", "at least 1", lambda x: x >= 1),
        ("group_size", "at least 2: responses are compared", lambda x: x >= 2),
        ("lr temperature beta max_grad_norm", "above 0", lambda x: 0 < x < math.inf),
        ("weight_decay clip_high kl_coef eval_samples warmup_steps task_warmup_steps", "at least 0", lambda x: x >= 0),
        ("reward_noise clip_low task_teacher_error", "from 0 to 1", lambda x: 0 <= x <= 1),
        ("seed", "from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
        ("alpha alpha_end", "at least 0 and below 1/2 in form reward, below 1 in form gated, or preference could overrule "
         "the verifier", lambda x: 0 <= x < (0.5 if config.shaping == "reward" else 1)),
    ]:
        for name in names.split():
            if not holds(getattr(config, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be {wanted}")
    if config.model and not config.train_data:
        raise UserError("--model needs --train-data")
    if not config.model and (config.train_data or config.eval_data):
        raise UserError("--train-data and --eval-data need --model")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if config.device not in (devices := ["auto", "cpu", *gpus, *(gpus and ["cuda"])]):
        raise UserError(f"--device {config.device}: there is no such device here, but {', '.join(devices)}")
    out = Path(config.output_dir)
    if config.resume:
        if not (out / "checkpoint" / "state.pt").exists():
            raise UserError(f"--resume: no checkpoint in {out}")
        saved, free = json.loads((out / "config.json").read_text()), ("resume", "steps", "device", "save_every")
        changed = [f"--{name.replace('_', '-')} {value} (was {saved.get(name)})" for name, value in asdict(config).items()
                   if name not in free and value != saved.get(name)]
        if changed:
            raise UserError(f"--resume: the run was started with other settings: {', '.join(changed)}")
    elif out.exists() and (out.is_file() or any(out.iterdir())) and (config.model or out != Path(Config().output_dir)):
        raise UserError(f"--output-dir {out} is not empty: choose another, or go on with its run by --resume")


def batch_indices(examples: int, step: int, count: int, seed: int) -> list[int]:
    """Which examples step 1, 2, ... takes: every example once an epoch, in an order of the epoch's own."""
    places = [divmod(place, examples) for place in range((step - 1) * count, step * count)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch, _ in places}
    return [int(orders[epoch][i]) for epoch, i in places]


@contextlib.contextmanager
def writing(path: Path):
    """Makes a UserError of what a full disk or a folder without permission raises."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk, torch.save makes a RuntimeError
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"{path} cannot be written: {reason}; make room, or choose another --output-dir") from error


def append(path: Path, rows: list[dict]) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def replace_file(path: Path, write) -> None:
    """Calls write(another path), then renames: the file at path is whole at every moment, the old one or the new."""
    with writing(path):
        write(path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def save_model(model, tokenizer, folder: Path) -> None:
    with writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def until_interrupted(steps):
    """Passes steps on. Ctrl-C or SIGTERM lets the one in hand finish and ends them; a second time it does not wait."""
    interrupts = []

    def note(number, frame):
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)
        tqdm.write("\nicpo.py: finishing the step in hand; again to stop at once", file=sys.stderr)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in steps:
            yield step
            if interrupts:
                return
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(config: Config) -> dict[str, float]:
    """Trains, evaluates and saves as config says; returns the metrics of the last evaluation. Raises UserError.

    Every random number of a step follows from (seed, step): a resumed run repeats an unbroken one, no states stored.
    """
    check(config)
    out, reward = Path(config.output_dir), load_reward(config.reward)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    source, train_data, eval_data = config.model, config.train_data, config.eval_data
    if not config.model:  # from here on the built-in task is a model directory and two files like any other
        source, train_data, eval_data = (str(out / "task" / name) for name in ("model", "train.jsonl", "eval.jsonl"))
        if not config.resume:
            if out.exists():
                aside = (out.with_name(f"{out.name}-{n}") for n in itertools.count(1))
                print(f"the earlier run in {out} is now {out.rename(next(path for path in aside if not path.exists()))}")
            write_task(out / "task", config, device)
    policy, tokenizer, eos_ids = load_model(source, device)
    reference = load_model(source, device)[0] if config.kl_coef else None
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    examples = load_examples(train_data, tokenizer, config)
    held_out = load_examples(eval_data, tokenizer, config)[:config.eval_rows] if eval_data else []
    longest = max(len(example.ids) for example in examples + held_out) + config.max_new_tokens
    context = getattr(policy.config, "max_position_embeddings", longest)
    if longest > context:
        raise UserError(f"prompt and response reach {longest} tokens, the model's context {context}: "
                        "lower --max-new-tokens or --max-prompt-tokens")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def measure() -> tuple[dict[str, float], list[str]]:
        return evaluate(policy, tokenizer, eos_ids, held_out, reward, config) if held_out else ({}, [])

    def save() -> None:
        state = {"step": step, "policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "skipped": skipped,
                 "evaluations": (before, after)}
        replace_file(out / "checkpoint" / "state.pt", lambda path: torch.save(state, path))

    replace_file(out / "config.json", lambda path: path.write_text(json.dumps(asdict(config), indent=2) + "\n"))
    if config.resume:
        state = torch.load(out / "checkpoint" / "state.pt", map_location=device, weights_only=True)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        step, skipped, before, after = state["step"], state["skipped"], *state["evaluations"]
        for path, count in ((out / "metrics.jsonl", step + 1), (out / "samples.jsonl", step * config.group_size)):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            replace_file(path, lambda path: path.write_bytes(b"".join(lines[:count])))  # later ones will be written again
    else:
        step, skipped, before = 0, 0, measure()
        after = before
        append(out / "metrics.jsonl", [{"step": 0} | before[0]])
        save()

    P, G, truncation_told = config.prompts_per_step, config.group_size, False
    bar = tqdm(range(step + 1, config.steps + 1), desc="training", initial=step, total=config.steps)
    for step in until_interrupted(bar):  # the numbers below are those of the algorithm at the top
        set_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        optimizer.param_groups[0]["lr"] = lr = config.lr * min(1, step / max(1, config.warmup_steps))
        alpha = config.alpha + (config.alpha_end - config.alpha) * (step - 1) / max(1, config.steps - 1)
        batch = [examples[i] for i in batch_indices(len(examples), step, P, config.seed)]
        prompts = [example.ids for example in batch]
        references = [example.reference for example in batch for _ in range(G)]

        start = time.perf_counter()
        rollout = sample(policy, prompts, G, config.max_new_tokens, eos_ids, config.temperature)  # 1
        responses = tokenizer.batch_decode(rollout.responses(), skip_special_tokens=True)
        sampled = time.perf_counter()
        verified, errors = score_responses(reward, responses, references)  # 2
        verified = verified.view(P, G)
        rewards = torch.where(torch.rand(P, G) < config.reward_noise, 1 - verified, verified)
        confidence = sequence_log_prob(rollout.log_probs, rollout.mask).view(P, G).cpu()  # 3
        advantages = icpo_advantage(  # 4 and 5
            rewards, confidence, alpha, config.beta, config.shaping, config.keep_uniform_groups)
        scored = time.perf_counter()
        metrics = update(policy, optimizer, rollout, advantages.flatten().to(device), config, reference)  # 6
        done = time.perf_counter()

        row = rollout_metrics(rollout, verified, rewards, confidence, advantages, config.beta)
        row = {"step": step} | row | metrics | {
            "reward/errors": errors, "alpha": alpha, "lr": lr,
            "time/sample": sampled - start, "time/score": scored - sampled, "time/update": done - scored,
            "tokens_per_s": rollout.lengths.sum().item() / (done - start)}
        if step % config.eval_every == 0 or step == config.steps:
            after = measure()
            row |= after[0]
        append(out / "metrics.jsonl", [row])
        append(out / "samples.jsonl", [
            {"step": step, "prompt": batch[0].prompt, "reference": batch[0].reference, "response": responses[i],
             "verified": verified[0, i].item(), "reward": rewards[0, i].item(), "confidence": confidence[0, i].item(),
             "advantage": advantages[0, i].item()} for i in range(G)])
        bar.set_postfix({"reward": f"{row['reward/verified']:.2f}", "entropy": f"{row['entropy']:.2f}"} |
                        {name.removeprefix("eval/"): f"{value:.2f}" for name, value in after[0].items()})

        if row["length/truncated_frac"] > 0.5 and not truncation_told:
            truncation_told = True
            bar.write(f"step {step}: {row['length/truncated_frac']:.0%} of the responses were cut at --max-new-tokens "
                      f"{config.max_new_tokens}, and are verified as they stand; raise it if answers get lost", file=sys.stderr)
        skipped = skipped + 1 if metrics["update/skipped"] else 0
        if skipped == 10:
            raise UserError(f"ten steps in a row had a non-finite loss or gradient: lower --lr ({out}/checkpoint holds)")
        if step % config.save_every == 0 and step < config.steps:
            save()
    save()
    if step < config.steps:
        raise KeyboardInterrupt

    save_model(policy, tokenizer, out / "model")
    report(held_out, reward, before, after)
    print(f"model: {out / 'model'}\nlog: {out / 'metrics.jsonl'}, {out / 'samples.jsonl'}")
    return after[0]


def report(examples: list[Example], reward, before: tuple[dict, list[str]], after: tuple[dict, list[str]]) -> None:
    """Prints the evaluations before and after, and an example that was wrong and is right, if there is one."""
    for name, value in after[0].items():
        print(f"{name}: {before[0][name]:.3f} before, {value:.3f} after ({len(examples)} held-out prompts)")
    references = [example.reference for example in examples]
    (was, _), (now, _) = (score_responses(reward, responses, references) for _, responses in (before, after))
    if examples:
        i = int((now - was).argmax())
        print(f"{examples[i].prompt}   (answer: {references[i]})\n  before: {before[1][i]}\n  after:  {after[1][i]}")


# -------------------------------------------------------------------------------------------------------- Built-in task


def worked_addition(a: int, b: int, carry: bool = True) -> str:
    """47+85 by columns: 7+5=12 4+8=12+1=13 #### 132, or by someone who forgets the carry: 7+5=12 4+8=12+0=12 #### 122."""
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = int(carry and units > 9)
    final = 10 * (tens + carried) + units % 10
    return f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}+{carried}={tens + carried} #### {final}"


def write_task(folder: Path, config: Config, device: torch.device) -> None:
    """Writes a tiny Qwen2 model that has imitated a sloppy teacher, and the sums to train it and to evaluate it on.

    The teacher forgets the carry in task_teacher_error of the demonstrations. So the student can add, is sure of a wrong
    answer and seldom gives the right one: a confident error and an undervalued good response, made small [O].
    """
    set_seed(config.seed)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.shuffle(sums)
    for name, part in (("eval", sums[:1024]), ("train", sums[1024:])):
        append(folder / f"{name}.jsonl", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in part])
    # A token is a byte: the kind of tokenizer that transformers rebuilds from a saved Qwen2 directory.
    bytes_ = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer, eos = Qwen2Tokenizer(vocab=bytes_ | {"<|endoftext|>": 256}, merges=[]), 256
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=257, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=eos, pad_token_id=eos,
        bos_token_id=None)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(config.task_warmup_steps), desc="imitating the teacher"):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, 2 * (1 - step / config.task_warmup_steps))
        rows, labels = [], []
        for a, b in random.sample(sums[1024:], 32):
            prompt = tokenizer(f"{a}+{b}=").input_ids
            working = worked_addition(a, b, carry=random.random() >= config.task_teacher_error)
            answer = tokenizer(working).input_ids + [eos]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        ids, labels = pad_sequence(rows, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
        optimizer.zero_grad()
        model(input_ids=ids.to(device), labels=labels.to(device)).loss.backward()
        optimizer.step()
    save_model(model, tokenizer, folder / "model")


# --------------------------------------------------------------------------------------------------------- Command line


def main(arguments: list[str] | None = None) -> int:
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0],
                              usage="python icpo.py [--flag value ...], where --help lists the flags")
    try:
        train(Config(**vars(parser.parse_args(arguments))))
    except UserError as error:
        print(f"icpo.py: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print("icpo.py: error: out of memory: lower --micro-batch, --prompts-per-step or --max-new-tokens, or add "
              "--gradient-checkpointing", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nicpo.py: stopped; once training has begun, the same command with --resume goes on from the last checkpoint",
              file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
