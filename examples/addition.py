"""The task that `python icpo.py` trains: sums by columns, for a tiny model whose teacher has a bad habit.

The teacher writes half of the sums in his usual way, and then mostly forgets to carry; the other half in one
of seven other ways, and then mostly carries. A Qwen2 of 0.2M parameters that has imitated him is sure where
it errs, and its right answers are the less probable ones: ICPO's premise. With

    python examples/addition.py --usual-error 0.05

the usual way is the right one, and the premise fails.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, logging, set_seed
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROOT = Path(__file__).resolve().parent.parent
OTHER_WAYS = [way for way in itertools.product((False, True), repeat=3) if any(way)]
USUAL_WAY = (False, False, False)


def worked_addition(a: int, b: int, way: tuple[bool, bool, bool] = USUAL_WAY, carry: bool = True) -> str:
    """47+85 by columns: 7+5=12 4+8=12+1=13 #### 132, or without the carry: 7+5=12 4+8=12+0=12 #### 122.

    way: whether to swap the units (5+7=12), to swap the tens (8+4=12), to put a comma between the columns.
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


def prepare(seed: int = 0, usual_error: float = 0.95, imitation_steps: int = 1800) -> list[str]:
    """The flags of icpo.py that train the tiny model on its sums; both are made first, if need be."""
    torch.set_num_threads(1)  # on a busy machine, several wait for each other
    folder = ROOT / f"runs/task/{usual_error}-{imitation_steps}-{seed}"
    if not folder.exists():
        print("first the tiny model imitates the teacher, for a minute or two", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            write_task(Path(scratch) / "task", seed, usual_error, imitation_steps)
            (Path(scratch) / "task").rename(folder)
    return [f"--model={folder}/addition", f"--train-data={folder}/train.jsonl",
            f"--eval-data={folder}/eval.jsonl", "--eval-every=20", "--eval-rows=128",
            "--steps=60", "--max-new-tokens=32", "--micro-batch=128", "--lr=1e-4"]


def write_task(folder: Path, seed: int, usual_error: float, imitation_steps: int):
    """Writes sums to the folder, and a tiny Qwen2 that has imitated the teacher."""
    logging.disable_progress_bar()  # transformers' own, for files
    set_seed(seed)
    # A token is a byte.
    vocabulary = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[])
    sums = [(a, b) for a, b in itertools.product(range(10, 100), repeat=2) if a % 10 + b % 10 > 9]
    random.shuffle(sums)
    held_out, sums = sums[:512], sums[512:]
    folder.mkdir(parents=True)
    for name, part in (("eval", held_out), ("train", sums)):
        rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=257, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, rope_theta=30.0, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=256, pad_token_id=256, bos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(imitation_steps), desc="imitating the teacher", disable=None):
        rise, fall = (step + 1) / 50, 2 * (1 - step / imitation_steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, rise, fall)
        texts = [f"{a}+{b}=" + demonstration(a, b, usual_error) + tokenizer.eos_token
                 for a, b in random.sample(sums, 32)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)  # padding on the right
        labels[:, :len("47+85=")] = -100  # the teacher shows answers, not prompts
        optimizer.zero_grad()
        model(batch.input_ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "addition")
    tokenizer.save_pretrained(folder / "addition")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import icpo
    parser = argparse.ArgumentParser(description="The task of `python icpo.py`; other flags go to icpo.py.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--usual-error", type=float, default=0.95, help="of the usual way; of others: 1 - it")
    parser.add_argument("--imitation-steps", type=int, default=1800, help="steps of imitating the teacher")
    task, rest = parser.parse_known_args()
    sys.exit(icpo.main(prepare(**vars(task)) + [f"--seed={task.seed}", *rest]))
