"""Models and tokenizers that people bring: what is loaded, trained and saved is what they brought."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import icpo
from icpo import Config
from test_icpo import responses_of
from tests.common import SHAPE, by_letters, saved, tiny, tiny_run
from tests.test_run import REWARD, error_of, learning_run, run, texts

# ----------------------------------------------------------------------- The model comes out as it went in

def edit(path, **changes):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def log_probs_alone(model, rollout):
    """The log-probs of all response tokens by plain forward passes over one row each, in float64."""
    rows = []
    for b, response in enumerate(responses_of(rollout)):
        prompt = rollout.prompts[b, -rollout.prompt_lengths[b]:].tolist()
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        rows.append(logits.double().log_softmax(dim=1)[range(len(response)), response])
    return torch.cat(rows)


def draw(model):
    generator = torch.Generator().manual_seed(0)
    prompts, eos_ids = [[3, 1, 4, 1, 5], [9], [2, 6, 5]], [*range(0, 258, 7)]
    return icpo.sample(model, prompts, 3, 9, eos_ids, generator=generator)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_saved_is_the_given_folder_with_new_weights_and_ends(tiny, tmp_path, monkeypatch, dtype):
    def reward(response, reference):
        os.chdir("/")
        torch.set_grad_enabled(False)  # for everyone
        return by_letters(response, reference)

    source, target = tmp_path / "model", tmp_path / "run/model"
    shutil.copytree(tiny, source)
    edit(source / "generation_config.json", temperature=None)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    edit(source / "config.json", attention_dropout=0.1, rope_theta=500.0, of_a_later_version=[1])
    edit(source / "tokenizer_config.json", model_max_length=77, extra="kept")
    (source / "preprocessor_config.json").write_text('{"do_resize":  true}\n\n')
    (source / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [257, 9]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    try:
        assert run(*learning_run(Path("model"), "run", "--kl-coef", 0)) == 0
    finally:
        torch.set_grad_enabled(True)
    given, written = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (source, target))
    assert given.pop("one.jsonl")  # no file of a model
    assert {"chat_template.jinja", "preprocessor_config.json"} < given.keys() == written.keys()
    changed = {name for name in given if given[name] != written[name]}
    assert changed == {"generation_config.json", "model.safetensors"}
    assert json.loads(written["generation_config.json"]) == {"temperature": 0.9, "eos_token_id": [9, 257]}
    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["policy"]
    small = [(x != x.bfloat16()).flatten() for x in trained.values()]
    assert torch.cat(small).float().mean() > 0.5  # whatever the checkpoint held, float32 is trained
    rounded = {name: x.to(getattr(torch, dtype)) for name, x in trained.items()}
    assert_close(load_file(target / "model.safetensors"), rounded, atol=0, rtol=0)
    loaded, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (target, source))
    assert loaded.dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(target)("is").input_ids == [256]
    rollout = draw(loaded.float())
    plain.float().load_state_dict(rounded)
    assert_close(log_probs_alone(loaded, rollout), log_probs_alone(plain, rollout), atol=1e-6, rtol=0)


def test_a_run_in_the_folder_of_its_model_does_not_save_itself(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    assert run(*tiny_run(tmp_path / "model", tmp_path / "model/runs/a", *REWARD)) == 0
    assert not (tmp_path / "model/runs/a/model/runs/a/model").exists()


VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
ARCHITECTURES = {  # special in cache, head or body; with images, dropout, noise, or more outputs
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5),
    "Gemma2": dict(head_dim=8, final_logit_softcapping=1.5, attn_logit_softcapping=0.5, sliding_window=4),
    "Gemma3": dict(
        text_config=SHAPE | dict(head_dim=8, sliding_window=4, attention_dropout=0.4), vision_config=VISION,
        image_token_index=291, boi_token_index=292, eoi_token_index=293, mm_tokens_per_image=4),
    "Gemma3nText": dict(  # NaN for a gradient at zeros, as its pad token has
        head_dim=8, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2, layer_types=["full_attention"] * 2),
    "Mistral3": dict(
        text_config=SHAPE | dict(head_dim=8, model_type="mistral"), image_token_index=291,
        vision_config=VISION | dict(model_type="pixtral")),
    "Granite": dict(logits_scaling=3.0), "Cohere": dict(logit_scale=0.2),
    "Mixtral": dict(num_local_experts=4, output_router_logits=True, router_jitter_noise=0.3),
    "Phimoe": dict(num_local_experts=4),  # jitter in eval mode too
    "Llama4Text": dict(intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "Qwen3_5Text": dict(
        num_hidden_layers=4, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8),
    "Falcon": dict(attention_dropout=0.1, hidden_dropout=0.1, alibi=False),
    "Afmoe": dict(  # names the mask in the call of its attention
        head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    "Mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64, resid_pdrop=0.1, emb_pdrop=0.1),
    "Qwen2": dict(output_hidden_states=True, return_dict=False)}


def config_of(name, **changes):
    kind, settings = getattr(transformers, f"{name}Config"), ARCHITECTURES[name] | changes
    return kind(**settings if "text_config" in settings else SHAPE | settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_models_get_what_each_row_alone_gets_train_and_are_saved_as_they_were(tmp_path, name):
    end = "ForConditionalGeneration" if name in ("Gemma3", "Mistral3") else "ForCausalLM"
    kind, source = getattr(transformers, name.removesuffix("Text") + end), tmp_path / "model"
    saved(source, make=kind, config=config_of(name))
    plain = kind.from_pretrained(  # sdpa leaves out what some architectures have
        source, dtype=torch.float32, attn_implementation="eager", return_dict=True).eval()
    noisy = name in ("OPT", "Falcon")  # in the layers, which checkpointing puts in train mode
    model, _, eos_ids = icpo.load_model(str(source), "cpu", gradient_checkpointing=not noisy)
    assert model.is_gradient_checkpointing is not noisy
    rollout = draw(model)
    assert len(set(rollout.lengths.tolist())) > 1
    for log_probs in (rollout.log_probs, icpo.token_log_probs(model, rollout, max_logits=1500)):
        assert_close(log_probs[rollout.mask].double(), log_probs_alone(plain, rollout), atol=5e-5, rtol=0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = icpo.update(model, sgd, rollout, torch.randn(9), Config(micro_batch=4))
    assert metrics["sampling/logp_difference"] < 1e-4 and 0 < metrics["grad_norm"] < math.inf
    icpo.save_model(model, eos_ids, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (source / "config.json").read_bytes()
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", source))
    assert_close(again, first, atol=0, rtol=0)  # the same names and dtypes, too


DIFFER = "sampled and scored log-probs differ"


@pytest.mark.parametrize("kind, config, message", [
    ("Qwen2ForSequenceClassification", config_of("Qwen2"), ""), ("Qwen2Model", config_of("Qwen2"), ""),
    ("Qwen2ForCausalLM", config_of("Qwen2", eos_token_id=None), "no eos token"),
    ("MambaForCausalLM", transformers.MambaConfig(hidden_size=32, num_hidden_layers=2), ""),  # no cache
    ("OpenAIGPTLMHeadModel", transformers.OpenAIGPTConfig(vocab_size=258, n_embd=36), ""),
    ("BertLMHeadModel", transformers.BertConfig(**SHAPE), DIFFER),  # looks ahead
    ("OPTForCausalLM", config_of("OPT", layerdrop=0.0), DIFFER)])  # has dropout in its layers
def test_models_that_cannot_be_trained_get_one_line_and_write_nothing(tmp_path, capfd, kind, config, message):
    tokenizer = saved(tmp_path / "model", make=getattr(transformers, kind), config=config)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    flags = tiny_run(tmp_path / "model", tmp_path / "run", *REWARD, "--gradient-checkpointing")
    error = error_of(capfd, *flags)
    assert message in error and error.startswith(f"--model {tmp_path / 'model'}: ")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- The tokenizer is its file

START, SPACES, SPACES_BACK = (
    normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), decoders.Replace("▁", " "))


def sentencepiece(first, *normalizer):
    """The layouts of Llama 2, Mistral and Gemma: spaces as ▁, bytes for what has no token."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij0123.", "▁a", "ab"]
    vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b")]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence(list(normalizer))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [SPACES_BACK, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", first, 0)])
    return tokenizer


def byte_level(split, prefix=False):
    """The layouts of GPT-2, SmolLM2, Qwen and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=285, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(["so 12 and 123 is a sum, and so is 1234\n\nand the end"] * 3, trainer)
    return tokenizer


THREES, ONES = (pre_tokenizers.Split(Regex(digits + r"|[^\s\p{N}]+|\s+"), "isolated") for digits in (
    r"\p{N}{1,3}", r"\p{N}"))
DIGITS = pre_tokenizers.Digits(individual_digits=True)
LAYOUTS = {  # the class that tokenizer_config.json names, the file, and whether a token begins a text
    "deepseek-math": ("LlamaTokenizerFast", byte_level(ONES), True, {"legacy": True}),
    "R1-Distill-Llama": ("LlamaTokenizer", byte_level(THREES), True, {"add_bos_token": True}),
    "deepseek-coder": ("LlamaTokenizerFast", byte_level(ONES), False, {"add_bos_token": False}),
    "Llama 2": ("LlamaTokenizer", sentencepiece(1, START, SPACES), True, {"legacy": False}),
    "no BOS": ("LlamaTokenizerFast", sentencepiece(1, START, SPACES), False, {}),
    "Llama 3": ("PreTrainedTokenizerFast", byte_level(THREES), True, {}),
    "Mistral": ("LlamaTokenizer", sentencepiece(1), True, {"add_prefix_space": None}),
    "Gemma": ("GemmaTokenizer", sentencepiece(0, SPACES), True, {"add_bos_token": True}),
    "Qwen": ("Qwen2Tokenizer", byte_level(ONES), False, {"add_prefix_space": False}),
    "SmolLM2": ("GPT2Tokenizer", byte_level(DIGITS), False, {}),
    "GPT-2": ("GPT2Tokenizer", byte_level(DIGITS, prefix=True), False, {"add_prefix_space": True})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_texts_are_those_of_the_tokenizer_file(tmp_path, layout):
    kind, tokenizer, begin, settings = LAYOUTS[layout]
    saved(tmp_path, vocab_size=400)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken(" wide ", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), "<s>", "</s>"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": kind, "bos_token": "<s>" if begin else None, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | settings))
    oracle = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    _, loaded, _ = icpo.load_model(str(tmp_path), "cpu")
    for text in ("so 1234 and 56", " a  ab\n\nis it 3 + 4 = 7 .", "é日本\u00a0🙂 don't", "</s>a",
                 "\ta b ", "a<think>b <|im_end|>  a wide b"):
        for special in (True, False):
            ids = oracle.encode(text, add_special_tokens=special).ids
            assert loaded(text, add_special_tokens=special).input_ids == ids, (text, special)
            assert texts(loaded, [ids], truncated=True) == [oracle.decode(ids, skip_special_tokens=False)]


def test_an_empty_prompt_is_refused(tiny):
    model, _, eos_ids = icpo.load_model(str(tiny), "cpu")
    with pytest.raises(ValueError, match="at least one token"):
        icpo.sample(model, [[1], []], 2, 3, eos_ids)
