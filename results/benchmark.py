"""Seconds and memory of one training step: bare transformers, icpo.py, and TRL's GRPOTrainer, side by side.

    python results/benchmark.py                          every setting: a table, and benchmark.json
    python results/benchmark.py --settings short long    some of them, the others as benchmark.json has them

The contestants:
    bare      model.generate, then forward, backward and AdamW on the same tokens: no reward, no clipping
    icpo      train() of icpo.py as it is: sampling, a trivial reward, advantages, update, metrics and logs
    trl       GRPOTrainer as configured by default, in float32 and with as many rows a step as the others
    trl best  the same without gradient checkpointing, and with all rows in one micro-batch
TRL takes part if it is installed. All do the same work: the same random model, similar prompts, as many
responses and new tokens, no early end but in the setting "ends". Each contestant is a process of its own; they take
their steps in turns, so that a noisy machine treats them alike, but in "smollm2", where they come one after
another: all of them together do not fit into 24 GB. The first step is not counted. The table gives the median
of a step's process CPU time, for the others as a multiple of bare; tokens sampled per second of wall time;
and the peak of memory above that of the loaded model. The JSON has the wall time too.
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

from study import markdown

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("bare", "icpo", "trl", "trl best")
SMALL = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
LARGE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=151936)
HALF_B = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
              vocab_size=151936)
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, vocab_size=49152)
# Prompts P of `prompt` tokens and up to 7 more, responses to each G, new tokens T; "ends": one of 32 tokens is an end
SETTINGS = {
    "short": dict(P=8, G=8, T=16, model=SMALL | dict(vocab_size=257)),
    "long": dict(P=8, G=8, T=64, model=SMALL | dict(vocab_size=257)),
    "ends": dict(P=8, G=8, T=64, model=SMALL | dict(vocab_size=32), ends=True),
    "vocabulary": dict(P=2, G=8, T=64, model=LARGE),
    "vocabulary, T=128": dict(P=2, G=8, T=128, model=LARGE),
    "smollm2": dict(P=4, G=8, T=16, model=SMOLLM2, micro_batch=16, prompt=32, threads=2, in_turns=False),
    "gpu": dict(P=32, G=8, T=256, model=HALF_B, micro_batch=32),
}


# ------------------------------------------------------------------------------------------- A contestant's own process


class Clock:
    """Called at the start of each step: reports what the step before took, and waits for leave to begin the next."""

    def __init__(self, device):
        self.device, self.start, self.tokens = device, None, 0

    def memory(self, peak: bool) -> int:
        import torch
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024

    def reset_peak(self) -> None:
        import torch
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def tick(self, model=None) -> None:
        import torch
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.start is None:
            sum(parameter.sum().item() for parameter in model.parameters())  # weights may be mapped from the file until touched
            self.reset_peak()
            self.loaded = self.memory(peak=False)
            report = {}
        else:
            report = {"wall": time.perf_counter() - self.start[0], "cpu": time.process_time() - self.start[1],
                      "tokens": self.tokens, "peak": self.memory(peak=True) - self.loaded}
        print("@" + json.dumps(report), flush=True)
        sys.stdin.readline()
        self.start = time.perf_counter(), time.process_time()


def load(folder: str, device: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), tokenizer


def bare(folder: str, steps: int, setting: dict, clock: Clock) -> None:
    import torch
    model, tokenizer = load(folder, clock.device)
    prompts = [json.loads(line)["prompt"] for line in (Path(folder) / "train.jsonl").open()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    size = setting.get("micro_batch", setting["P"] * setting["G"])
    for step in range(steps):
        clock.tick(model)
        batch = [prompt for prompt in prompts[:setting["P"]] for _ in range(setting["G"])]
        inputs = tokenizer(batch, return_tensors="pt", padding=True).to(clock.device)
        with torch.autocast(clock.device, dtype=torch.bfloat16, enabled=clock.device == "cuda"):
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=setting["T"], do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
            new = ids[:, inputs.input_ids.shape[1]:]
            alive = torch.nn.functional.pad((new == tokenizer.eos_token_id).cumsum(dim=1), (1, 0))[:, :-1] == 0
            labels = torch.cat([torch.full_like(inputs.input_ids, -100), new.masked_fill(~alive, -100)], dim=1)
            mask = torch.cat([inputs.attention_mask, alive.long()], dim=1)
            for rows in torch.arange(len(ids), device=clock.device).split(size):
                loss = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tokens = int(alive.sum())


def icpo(folder: str, steps: int, setting: dict, clock: Clock) -> None:
    import icpo as project
    project.Qwen2Tokenizer.vocab_size = 0  # not refused: its end is out of the model's reach on purpose
    sample = project.sample

    def timed_sample(model, prompts, group_size, *args):
        if group_size == setting["G"]:  # not the trial when the model is loaded
            clock.tick(model)
        rollout = sample(model, prompts, group_size, *args)
        clock.tokens = int(rollout.lengths.sum())
        return rollout

    project.sample = timed_sample
    rows = setting["P"] * setting["G"]
    project.train(project.Config(
        model=folder, train_data=f"{folder}/train.jsonl", output_dir=f"{folder}/icpo", reward="benchmark:length_reward",
        prompts_per_step=setting["P"], group_size=setting["G"], max_new_tokens=setting["T"], steps=steps, save_every=10**6,
        micro_batch=setting.get("micro_batch", rows), device=clock.device))


def length_reward(response: str, reference: str) -> float:
    """Something in which random responses differ, so that no row goes without a gradient."""
    return float(hash(response) % 1000)


def trl(folder: str, steps: int, setting: dict, clock: Clock, best: bool = False) -> None:
    import torch
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
    model, tokenizer = load(folder, clock.device)
    prompts = [json.loads(line)["prompt"] for line in (Path(folder) / "train.jsonl").open()]
    GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=reward, callbacks=[Tick()],
                train_dataset=Dataset.from_dict({"prompt": prompts}), args=GRPOConfig(
        output_dir=f"{folder}/trl", per_device_train_batch_size=size, gradient_accumulation_steps=rows // size,
        num_generations=setting["G"], max_completion_length=setting["T"], max_steps=steps, bf16=clock.device == "cuda",
        use_cpu=clock.device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, **options)).train()


# ------------------------------------------------------------------------------------------------------- The comparison


def write_model(folder: Path, setting: dict) -> None:
    """A random model with a byte-level tokenizer; the end of a sequence is out of its reach, but in the setting "ends"."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    torch.manual_seed(0)
    words = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    eos = 31 if setting.get("ends") else setting["model"]["vocab_size"]
    words |= {f"<{i}>": i for i in range(256, eos)} if eos > 256 else {}
    character = next((word for word, i in words.items() if i == eos), "<|endoftext|>")
    Qwen2Tokenizer(vocab=words | {character: eos}, merges=[], eos_token=character, pad_token="!",
                   unk_token=None).save_pretrained(folder)
    config = Qwen2Config(**setting["model"], max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=eos,
                         pad_token_id=0, bos_token_id=None)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(64):
            length = setting.get("prompt", 9) - 3 + i % 8
            file.write(json.dumps({"prompt": str(1234567**6 * (i + 7))[:length] + "+1=", "answer": "0"}) + "\n")


def compare(name: str, steps: int, threads: int, device: str, contestants: list[str]) -> dict:
    """The steps of every contestant in one setting: {contestant: {measure: median}}."""
    setting, result = SETTINGS[name], {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), setting)
        for group in [contestants] if setting.get("in_turns", True) else [[contestant] for contestant in contestants]:
            for contestant, reports in take_turns(folder, name, steps, threads, device, group).items():
                counted = reports[2:]  # the first report is of nothing, the second of the step that warms up
                result[contestant] = {key: statistics.median(report[key] for report in counted)
                                      for key in ("wall", "cpu", "tokens")}
                result[contestant]["peak"] = max(report["peak"] for report in counted)
    return result


def take_turns(folder: str, name: str, steps: int, threads: int, device: str, contestants: list[str]) -> dict:
    """The reports of contestants, each a process of its own, that take their steps one after another."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(SETTINGS[name].get("threads", threads)), "PYTHONPATH": f"{ROOT}:{ROOT / 'results'}",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
    errors = {contestant: Path(folder) / f"{contestant}.err" for contestant in contestants}
    workers = {contestant: subprocess.Popen(
        [sys.executable, __file__, "--worker", contestant, folder, name, str(steps), device], cwd=folder, text=True,
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(errors[contestant], "w"))
        for contestant in contestants}
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
            shown = f"\r{name}: step {step + 1} of {steps}, {contestant}          "
            print(shown, end="", file=sys.stderr, flush=True)
            workers[contestant].stdin.write("go\n")
            workers[contestant].stdin.flush()
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
            row = result[contestant]
            cpu = f"{row['cpu']:.2f} s" if contestant == "bare" else f"× {row['cpu'] / result['bare']['cpu']:.2f}"
            fields.append(f"{cpu}, {row['tokens'] / row['wall']:.0f}/s, {row['peak'] / 1e6:.0f} MB")
        lines.append([name, *fields])
    return markdown(["setting", *contestants], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[name for name in SETTINGS if name != "gpu"])
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each contestant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--output", default=str(ROOT / "results" / "benchmark.json"))
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import torch
        contestant, folder, name, steps, device = args.worker
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        run = {"bare": bare, "icpo": icpo, "trl": trl, "trl best": lambda *a: trl(*a, best=True)}[contestant]
        clock = Clock(device)
        run(folder, int(steps) + 1, SETTINGS[name], clock)
        clock.tick()
        return
    contestants = args.contestants or [c for c in CONTESTANTS if not c.startswith("trl") or importlib.util.find_spec("trl")]
    log = Path(args.output)
    results = json.loads(log.read_text()) if log.exists() else {}
    for name in args.settings:
        results[name] = compare(name, args.steps + 1, args.threads, args.device, contestants)
        log.write_text(json.dumps(results, indent=1) + "\n")
    print(table({name: results[name] for name in SETTINGS if name in results}))


if __name__ == "__main__":
    main()
