"""The task that `python icpo.py` trains: sums by columns, for a tiny model that was taught to forget the carry.

A Qwen2 of 0.3M parameters imitates a teacher who forgets to carry in most demonstrations. Where a carry is
due it is then sure of a wrong answer, and the right one is undervalued: the situation that ICPO is meant for.
"""

import itertools
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from transformers.convert_slow_tokenizer import bytes_to_unicode

DEFAULTS = dict(steps=60, max_new_tokens=32, micro_batch=128, lr=1e-4)  # in place of those of icpo.Config


def worked_addition(a: int, b: int, carry: bool = True) -> str:
    """47+85 by columns: 7+5=12 4+8=12+1=13 #### 132, or without the carry: 7+5=12 4+8=12+0=12 #### 122."""
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = int(carry and units > 9)
    final = 10 * (tens + carried) + units % 10
    return f"{a % 10}+{b % 10}={units} {a // 10}+{b // 10}={tens}+{carried}={tens + carried} #### {final}"


def prepare(config, out: Path):
    """The config that trains the model of out/task on its sums; both are written first, unless it resumes."""
    if not config.resume:
        write_task(out, config)
    task = out / "task"
    return replace(config, model=f"{task}/model", train_data=f"{task}/train.jsonl", eval_data=f"{task}/eval.jsonl")


def write_task(out: Path, config):
    """Writes sums to out/task, and a tiny Qwen2 taught to forget the carry: it is sure of wrong sums.

    config: icpo.Config with seed, task_teacher_error and task_warmup_steps. What is in out is moved aside.
    """
    if earlier := [*out.glob("[!.]*")]:
        aside = Path(f"{out}-{time.strftime('%Y-%m-%d-%H%M%S')}")
        aside.mkdir()
        for path in earlier:
            path.rename(aside / path.name)
        print(f"the earlier run in {out} is now in {aside}")
    set_seed(config.seed)
    # A token is a byte: the kind of tokenizer that transformers rebuilds from a saved Qwen2 directory.
    vocabulary = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[])
    sums = list(itertools.product(range(10, 100), repeat=2))
    random.shuffle(sums)
    held_out, sums = sums[:1024], sums[1024:]
    task = out / "task"
    task.mkdir(parents=True)
    for name, part in (("eval", held_out), ("train", sums)):
        rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in part]
        (task / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=257, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=256,
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
    model.save_pretrained(task / "model")
    tokenizer.save_pretrained(task / "model")
