"""The task that `python icpo.py` trains: sums by columns, for a tiny model whose teacher has a bad habit.

The teacher writes half of the sums in his usual way, and then mostly forgets to carry; the other half in one of
seven other ways, and then mostly carries. A Qwen2 of 0.2M parameters that has imitated him is sure where it errs,
and its right answers are the less probable ones: ICPO's premise. With --task-usual-error 0.05 the usual way is
the right one, and the premise fails.
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


OTHER_WAYS = [way for way in itertools.product((False, True), repeat=3) if any(way)]
USUAL_WAY = (False, False, False)


def worked_addition(a: int, b: int, way: tuple[bool, bool, bool] = USUAL_WAY, carry: bool = True) -> str:
    """47+85 by columns: 7+5=12 4+8=12+1=13 #### 132, or without the carry: 7+5=12 4+8=12+0=12 #### 122.

    way: whether to swap the units (5+7=12), to swap the tens (8+4=12), and to put a comma between the columns.
    """
    (tens_a, units_a), (tens_b, units_b) = divmod(a, 10), divmod(b, 10)
    swap_units, swap_tens, comma = way
    units, tens, total = units_a + units_b, tens_a + tens_b, tens_a + tens_b + carry
    first = f"{units_b}+{units_a}={units}" if swap_units else f"{units_a}+{units_b}={units}"
    second = f"{tens_b}+{tens_a}={tens}" if swap_tens else f"{tens_a}+{tens_b}={tens}"
    return f"{first}{',' * comma} {second}+{carry:d}={total} #### {total}{units % 10}"


def demonstration(a: int, b: int, usual_error: float) -> str:
    """What the teacher writes: in half of the cases his usual way, else one of the seven others at random.

    He forgets the carry with probability usual_error in the usual way, 1 - usual_error in the others.
    """
    usual = random.random() < 0.5
    way = USUAL_WAY if usual else random.choice(OTHER_WAYS)
    return worked_addition(a, b, way, carry=random.random() >= (usual_error if usual else 1 - usual_error))


def prepare(config, out: Path):
    """The config that trains the model of out/task on its sums; both are written first, unless it resumes."""
    if not config.resume:
        write_task(out, config)
    task = out / "task"
    return replace(config, model=f"{task}/model", train_data=f"{task}/train.jsonl", eval_data=f"{task}/eval.jsonl")


def write_task(out: Path, config):
    """Writes sums to out/task, and a tiny Qwen2 that has imitated the teacher.

    config: icpo.Config with seed, task_usual_error and task_warmup_steps. What is in out is moved aside.
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
    sums = [(a, b) for a, b in itertools.product(range(10, 100), repeat=2) if a % 10 + b % 10 > 9]
    random.shuffle(sums)
    held_out, sums = sums[:512], sums[512:]
    task = out / "task"
    task.mkdir(parents=True)
    for name, part in (("eval", held_out), ("train", sums)):
        rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in part]
        (task / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=257, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, rope_theta=30.0, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=256,
        pad_token_id=256, bos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(config.task_warmup_steps), desc="imitating the teacher"):
        rise, fall = (step + 1) / 50, 2 * (1 - step / config.task_warmup_steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, rise, fall)
        texts = [f"{a}+{b}=" + demonstration(a, b, config.task_usual_error) + tokenizer.eos_token
                 for a, b in random.sample(sums, 32)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)  # padding on the right
        labels[:, :len("47+85=")] = -100  # the teacher shows answers, not prompts
        optimizer.zero_grad()
        model(batch.input_ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    model.save_pretrained(task / "model")
    tokenizer.save_pretrained(task / "model")

