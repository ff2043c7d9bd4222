"""Seconds and memory of one training step: bare transformers, icpo.py, and TRL's GRPOTrainer, side by side.

    python results/benchmark.py                          every setting: a table, and benchmark.json
    python results/benchmark.py --settings short long    some of them, the others as benchmark.json has them

The contestants:
    bare      model.generate, then forward, backward and AdamW on the same tokens: no reward, no clipping
    icpo      train() of icpo.py as it is: sampling, a trivial reward, advantages, update, metrics and logs
    trl       GRPOTrainer as configured by default, in float32 and with as many rows a step as the others
    trl best  the same without gradient checkpointing, and with all rows in one micro-batch
TRL takes part if it is installed. All do the same work: the same random model, similar prompts, as many
responses and new tokens, no early end but in the setting "ends". Each is a process of its own. They take
their steps in turns, so that a noisy machine treats them alike, but in "smollm2" and on a GPU, for want of
memory, one after another. The first step is not counted. The table gives the median of a step's process CPU
time, on a GPU of its wall time, for the others as a multiple of bare; tokens sampled per second of wall time;
and the peak of memory above the loaded model. On a GPU all have float32 weights and bf16 autocast, and none
cuDNN's attention, which plans anew for every length.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tables import markdown

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("bare", "icpo", "trl", "trl best")
SMALL, ENDS, LARGE, HALF_B, SMOLLM2 = (
    dict(hidden_size=width, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
         num_key_value_heads=kv_heads, vocab_size=words)
    for width, wide, layers, heads, kv_heads, words in (
        (128, 256, 3, 4, 2, 257), (128, 256, 3, 4, 2, 32), (256, 512, 4, 4, 2, 151936),
        (896, 4864, 24, 14, 2, 151936), (576, 1536, 30, 9, 3, 49152)))
SAMPLING = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
# P prompts of `prompt` tokens and up to 7 more, G responses each, T new tokens; "ends": one of 32 tokens ends
SETTINGS = {
    "short": dict(P=8, G=8, T=16, model=SMALL),
    "long": dict(P=8, G=8, T=64, model=SMALL),
    "ends": dict(P=8, G=8, T=64, model=ENDS, ends=True),
    "vocabulary": dict(P=2, G=8, T=64, model=LARGE),
    "vocabulary, T=128": dict(P=2, G=8, T=128, model=LARGE),
    "smollm2": dict(P=4, G=8, T=16, model=SMOLLM2, micro_batch=16, prompt=32, threads=2, in_turns=False),
    "gpu": dict(P=8, G=8, T=256, model=HALF_B, micro_batch=32),
}


# ------------------------------------------------------------------------------ A contestant's own process


class Clock:
    """Called at the start of each step: reports what the last one took, and waits for leave to begin."""

    def __init__(self, device):
        self.device, self.start, self.tokens = device, None, 0

    def memory(self, peak: bool) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def tick(self, model=None) -> None:
        wall, cpu = self.now()
        report = {}
        if self.start is None:
            for parameter in model.parameters():  # weights may be mapped from the file until touched
                parameter.sum().item()
            self.reset_peak()
            self.loaded = self.memory(peak=False)
        else:
            report = {"wall": wall - self.start[0], "cpu": cpu - self.start[1], "tokens": self.tokens,
                      "peak": self.memory(peak=True) - self.loaded}
        print("@" + json.dumps(report), flush=True)
        sys.stdin.readline()
        self.start = self.now()


def autocast(device: str):
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def load(folder: str, device: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    prompts = [json.loads(line)["prompt"] for line in (Path(folder) / "train.jsonl").open()]
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left"), prompts


def bare(folder: str, steps: int, setting: dict, clock: Clock) -> None:
    model, tokenizer, prompts = load(folder, clock.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    size = setting.get("micro_batch", setting["P"] * setting["G"])
    for step in range(steps):
        clock.tick(model)
        batch = [prompt for prompt in prompts[:setting["P"]] for _ in range(setting["G"])]
        inputs = tokenizer(batch, return_tensors="pt", padding=True).to(clock.device)
        with autocast(clock.device):
            ids = model.generate(**inputs, **SAMPLING, max_new_tokens=setting["T"])
        new = ids[:, inputs.input_ids.shape[1]:]
        alive = torch.nn.functional.pad((new == tokenizer.eos_token_id).cumsum(dim=1), (1, 0))[:, :-1] == 0
        labels = torch.cat([torch.full_like(inputs.input_ids, -100), new.masked_fill(~alive, -100)], dim=1)
        mask = torch.cat([inputs.attention_mask, alive.long()], dim=1)
        for rows in torch.arange(len(ids), device=clock.device).split(size):
            with autocast(clock.device):
                loss = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tokens = int(alive.sum())


def icpo(folder: str, steps: int, setting: dict, clock: Clock) -> None:
    import icpo as project
    sample = project.sample

    def timed_sample(model, prompts, group_size, *args, **kwargs):
        if group_size == setting["G"]:  # not the trial when the model is loaded
            clock.tick(model)
        rollout = sample(model, prompts, group_size, *args, **kwargs)
        clock.tokens = int(rollout.lengths.sum())
        return rollout

    project.sample = timed_sample
    rows = setting["P"] * setting["G"]
    project.train(project.Config(
        model=folder, train_data=f"{folder}/train.jsonl", output_dir=f"{folder}/icpo",
        reward="benchmark:length_reward", prompts_per_step=setting["P"], group_size=setting["G"],
        max_new_tokens=setting["T"], micro_batch=setting.get("micro_batch", rows), steps=steps,
        save_every=10**6, device=clock.device))


def length_reward(response: str, reference: str) -> float:
    """Something in which random responses differ, so that no row goes without a gradient."""
    return float(hash(response) % 1000)


def trl(folder: str, steps: int, setting: dict, clock: Clock, best: bool = False) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Tick(TrainerCallback):
        def on_step_begin(self, *args, model=None, **kwargs):
            clock.tick(model)

    def reward(completions, completion_ids, **kwargs):
        clock.tokens = sum(map(len, completion_ids))
        return [length_reward(completion, "") for completion in completions]

    rows = setting["P"] * setting["G"]
    size = setting.get("micro_batch", rows) if best else 8
    options = dict(gradient_checkpointing=False) if best else {}
    model, tokenizer, prompts = load(folder, clock.device)
    config = GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=size, num_generations=setting["G"],
        gradient_accumulation_steps=rows // size, max_completion_length=setting["T"], max_steps=steps,
        bf16=clock.device == "cuda", use_cpu=clock.device == "cpu", report_to="none", save_strategy="no",
        disable_tqdm=True, **options)
    GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=reward, callbacks=[Tick()], args=config,
                train_dataset=Dataset.from_dict({"prompt": prompts})).train()


# ------------------------------------------------------------------------------------------ The comparison


def write_model(folder: Path, setting: dict) -> None:
    """A random model with a byte-level tokenizer; an end of sequence is out of its reach, but in "ends"."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    torch.manual_seed(0)
    words = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    eos = 31 if setting.get("ends") else setting["model"]["vocab_size"]
    words |= {f"<{i}>": i for i in range(256, eos)} if eos > 256 else {}
    character = next((word for word, i in words.items() if i == eos), "<|endoftext|>")
    Qwen2Tokenizer(vocab=words | {character: eos}, merges=[], eos_token=character, pad_token="!",
                   unk_token=None).save_pretrained(folder)
    config = Qwen2Config(**setting["model"], max_position_embeddings=1024, tie_word_embeddings=True,
                         eos_token_id=eos, pad_token_id=0, bos_token_id=None)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(64):
            digits = str(1234567**6 * (i + 7))[:setting.get("prompt", 9) - 3 + i % 8]
            file.write(json.dumps({"prompt": f"{digits}+1=", "answer": "0"}) + "\n")


def compare(name: str, args, contestants: list[str]):
    """The steps of every contestant in one setting: yields {contestant: {measure: median}} as it grows."""
    setting, result = SETTINGS[name], {}
    in_turns = args.device == "cpu" and setting.get("in_turns", True)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), setting)
        for group in [contestants] if in_turns else [[contestant] for contestant in contestants]:
            for contestant, reports in take_turns(folder, name, args, group).items():
                counted = reports[1 + args.warmup:]  # the first report is of nothing
                result[contestant] = {key: statistics.median(report[key] for report in counted)
                                      for key in ("wall", "cpu", "tokens")}
                result[contestant]["peak"] = max(report["peak"] for report in counted)
                if args.device == "cuda":
                    result[contestant]["device"] = torch.cuda.get_device_name()
            yield result


def take_turns(folder: str, name: str, args, contestants: list[str]) -> dict:
    """The reports of contestants, each a process of its own, that take their steps one after another."""
    steps = args.warmup + args.steps
    environment = os.environ | {
        "OMP_NUM_THREADS": str(SETTINGS[name].get("threads", args.threads)), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'results'}:{os.environ.get('PYTHONPATH', '')}"}
    errors = {contestant: Path(folder) / f"{contestant}.err" for contestant in contestants}
    command = [sys.executable, __file__, "--device", args.device, "--worker", folder, name, str(steps)]
    workers = {contestant: subprocess.Popen(
        [*command, contestant], cwd=folder, text=True, env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=open(error, "w")) for contestant, error in errors.items()}
    reports = {contestant: [] for contestant in contestants}

    def turn(contestant: str) -> None:
        for line in workers[contestant].stdout:
            if line.startswith("@"):
                reports[contestant].append(json.loads(line[1:]))
                return
        sys.exit(f"{contestant}:\n{errors[contestant].read_text()[-3000:]}")

    for contestant in contestants:
        turn(contestant)  # loaded
    for step in range(steps):
        for contestant in contestants:
            print(f"\r{name}: step {step + 1} of {steps}, {contestant:9}", end="", file=sys.stderr)
            print("go", file=workers[contestant].stdin, flush=True)
            turn(contestant)
    for worker in workers.values():
        worker.kill()
        worker.wait()
    print("\r" + " " * 60, end="\r", file=sys.stderr)
    return reports


def table(results: dict) -> str:
    contestants = list(dict.fromkeys(name for result in results.values() for name in result))
    lines = []
    for name, result in results.items():
        fields = []
        for contestant in contestants:
            if contestant not in result:  # it took no part the last time
                fields.append("")
                continue
            row, bare = result[contestant], result["bare"]
            time = "wall" if "device" in row else "cpu"
            taken = f"{row[time]:.2f} s" if contestant == "bare" else f"× {row[time] / bare[time]:.2f}"
            fields.append(f"{taken}, {row['tokens'] / row['wall']:.0f}/s, {row['peak'] / 1e6:.0f} MB")
        lines.append([", ".join([name, *filter(None, [bare.get("device")])]), *fields])
    return markdown(["setting", *contestants], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="by default all of the device")
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each contestant")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them that are not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--output", help="by default benchmark.json beside this file, or benchmark_cuda.json")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, name, steps, contestant = args.worker
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        run = {"bare": bare, "icpo": icpo, "trl": trl, "trl best": lambda *a: trl(*a, best=True)}[contestant]
        torch.backends.cuda.enable_cudnn_sdp(False)
        clock = Clock(args.device)
        run(folder, int(steps) + 1, SETTINGS[name], clock)
        clock.tick()
        return
    found = [name for name in CONTESTANTS if not name.startswith("trl") or importlib.util.find_spec("trl")]
    log = Path(args.output or ROOT / "results" / f"benchmark{'_cuda' * (args.device == 'cuda')}.json")
    results = json.loads(log.read_text()) if log.exists() else {}
    for name in args.settings or [name for name in SETTINGS if (name == "gpu") == (args.device == "cuda")]:
        for results[name] in compare(name, args, args.contestants or found):
            log.write_text(json.dumps(results, indent=1) + "\n")
    print(table({name: results[name] for name in SETTINGS if name in results}))


if __name__ == "__main__":
    main()
