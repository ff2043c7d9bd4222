"""Parts of gpu.sh: python results/gpu.py sampling | memory, on the GPU; with TINY=1 small shapes, on a CPU.

    sampling    icpo.sample beside model.generate on the same model, prompts and tokens: ms a token
    memory      peak of sampling and of an update, by size of the model
Neither has cuDNN's attention, which plans anew for every length.
"""

import os
import statistics
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2ForCausalLM

from benchmark import HALF_B, ROOT, SAMPLING, SMALL, SMOLLM2, Clock, autocast
from tables import markdown

sys.path.insert(0, str(ROOT))

import icpo

TINY = bool(os.environ.get("TINY"))
CLOCK = Clock("cpu" if TINY else "cuda")
NAME = "CPU" if TINY else torch.cuda.get_device_name()
QWEN_1_5B = HALF_B | dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
# As in icpo.load_model
torch.backends.cuda.enable_cudnn_sdp(False)
AttentionInterface.register("grouped", icpo.grouped_attention)
AttentionMaskInterface.register("grouped", AttentionMaskInterface()["sdpa"])


def make(shape: dict, P: int):
    """A random model that ends no response, and P prompts."""
    with torch.device(CLOCK.device):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True, eos_token_id=None,
                                             bos_token_id=None, pad_token_id=0)).eval()
    model.set_attn_implementation("grouped")
    return model, [[3 + i] * (9 + i) for i in range(P)]


def generate(model, prompts, G: int, T: int) -> None:
    rows = [prompt for prompt in prompts for _ in range(G)]
    N = max(map(len, rows))
    ids = torch.tensor([[0] * (N - len(row)) + row for row in rows], device=CLOCK.device)
    model.set_attn_implementation("sdpa")
    with autocast(CLOCK.device):
        out = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=T, **SAMPLING)
    model.set_attn_implementation("grouped")
    assert out.shape == (len(rows), N + T)


def sampling() -> None:
    P, G, T, turns = (2, 2, 8, 1) if TINY else (8, 8, 256, 2)
    model, prompts = make(SMALL if TINY else HALF_B, P)
    ways = {"icpo.sample": lambda: icpo.sample(model, prompts, G, T, []),
            "model.generate": lambda: generate(model, prompts, G, T)}
    seconds, peaks = {way: [] for way in ways}, {}
    for turn in range(1 + turns):  # the first one warms up
        for way, function in ways.items():
            CLOCK.reset_peak()
            before, start = CLOCK.memory(peak=False), CLOCK.now()[0]
            function()
            seconds[way].append(CLOCK.now()[0] - start)
            peaks[way] = CLOCK.memory(peak=True) - before
    rows = []
    for way, taken in seconds.items():
        median = statistics.median(taken[1:])
        rows.append([way, f"{median / T * 1e3:.2f}", f"{P * G * T / median:.0f}", f"{peaks[way] / 1e6:.0f}"])
    print(f"{NAME}, {model.num_parameters() / 1e6:.1f}M parameters, {P * G} rows, {T} new tokens\n")
    print(markdown(["sampler", "ms a token", "tokens/s", "MB above the model"], rows))


def memory() -> None:
    cases = [(SMALL, 2, 6)] if TINY else [(shape, 8, 256) for shape in (SMOLLM2, HALF_B, QWEN_1_5B)]
    config, rows = icpo.Config(micro_batch=8), []
    for shape, P, T in cases:
        model, prompts = make(shape, P)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        advantages = torch.randn(8 * P, device=CLOCK.device)
        for tokens in (2, T):  # the short one makes the optimizer's state
            CLOCK.reset_peak()
            rollout = icpo.sample(model, prompts, 8, tokens, [])
            sampled = CLOCK.memory(peak=True)
            CLOCK.reset_peak()
            icpo.update(model, optimizer, rollout, advantages, config)
            updated = CLOCK.memory(peak=True)
        rows.append([f"{model.num_parameters() / 1e6:.1f}M", str(8 * P), str(T),
                     *(f"{peak / 1e9:.2f} GB" for peak in (sampled, updated))])
        print(*rows[-1], flush=True)  # the next one may not fit
        del model, optimizer, rollout
    print(f"\n{NAME}: peak of all memory, with AdamW's state and micro-batches of 8 rows\n")
    print(markdown(["parameters", "rows", "new tokens", "sampling", "update"], rows))


if __name__ == "__main__":
    {"sampling": sampling, "memory": memory}[sys.argv[1]]()
