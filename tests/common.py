"""What the tests share: files, and tiny saved models with data."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# One thread, here and in the runs started here: several that wait for each other crawl on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=257, bos_token_id=None, pad_token_id=0)
PLAIN = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}[assistant]{% endif %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(folder, template=None, tokens=(), make=Qwen2ForCausalLM, config=None, **changes):
    """Saves a tiny model in bf16, its byte-level tokenizer and data of one row; returns the tokenizer."""
    vocabulary = {character: i for i, character in enumerate(sorted(bytes_to_unicode().values()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary | {"is": 256, "<|endoftext|>": 257}, merges=[("i", "s")])
    tokenizer.add_tokens(list(tokens))
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = make(config or Qwen2Config(**SHAPE | changes))
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() > 1 else 1  # distributions that differ from each other
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "one.jsonl", [{"prompt": "1", "answer": "1"}])
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A saved model with a chat template, and settings for `generate` that transformers refuses to save."""
    folder = tmp_path_factory.mktemp("tiny")
    saved(folder, PLAIN)
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 257}')
    return folder


def tiny_run(model, out, *flags):
    """The flags of a run of one step; where one is given twice, the later one holds."""
    return ["--model", model, "--train-data", model / "one.jsonl", "--output-dir", out, "--device", "cpu",
            "--max-new-tokens", 4, "--steps", 1, *flags]


def by_letters(response, reference):
    """A reward that differs within nearly every group."""
    return sum(map(ord, response)) % 3 / 2
