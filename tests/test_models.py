"""Models and tokenizers that people bring: what is loaded, trained and saved is what they brought."""

import json
import math
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import icpo
from icpo import Config
from test_icpo import draw, plain_log_probs
from tests.common import PLAIN, SHAPE, by_letters, saved, tiny_run
from tests.test_run import REWARD, error_of, learning_run, run, texts

# ----------------------------------------------------------------------- The model comes out as it went in

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_saved_is_the_given_folder_with_new_weights_and_ends(tmp_path, monkeypatch, dtype):
    def reward(response, reference):
        os.chdir("/")
        torch.set_grad_enabled(False)  # for everyone
        return by_letters(response, reference)

    source, out = tmp_path / "model", tmp_path / "model/run"  # a run in the folder of its model
    saved(source, PLAIN, attention_dropout=0.1, rope_theta=500.0, of_a_later_version=[1])
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    (source / "preprocessor_config.json").write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [257, 9]}')
    for path in source.glob("*.json"):
        path.write_text(path.read_text() + "\n\n")  # as transformers would not write it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(icpo, "load_reward", lambda spec: reward)
    with torch.enable_grad():  # and again for everyone, afterwards
        assert run(*learning_run(Path("model"), "model/run", "--kl-coef", 0)) == 0
    given, written = (
        {path.name: path.read_bytes() for path in folder.glob("*.*")} for folder in (source, out / "model"))
    assert given.pop("one.jsonl")  # no file of a model
    assert {"chat_template.jinja", "preprocessor_config.json"} < given.keys() == written.keys()
    changed = {name for name in given if given[name] != written[name]}
    assert changed == {"generation_config.json", "model.safetensors"}
    assert json.loads(written["generation_config.json"]) == {"temperature": 0.9, "eos_token_id": [9, 257]}
    rounded = {name: x.to(dtype) for name, x in torch.load(out / "checkpoint.pt")["policy"].items()}
    assert_close(load_file(out / "model/model.safetensors"), rounded, atol=0, rtol=0)


VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
ARCHITECTURES = {  # special in cache, head or body; with images, dropout, noise, or more outputs
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5),
    "Gemma2": dict(head_dim=8, final_logit_softcapping=1.5, attn_logit_softcapping=0.5, sliding_window=4),
    "Gemma3": dict(text_config=SHAPE | dict(head_dim=8, sliding_window=4, attention_dropout=0.4),
                   vision_config=VISION, image_token_index=291, mm_tokens_per_image=4),
    "Gemma3nText": dict(  # NaN for a gradient at zeros, as its pad token has
        head_dim=8, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 2, layer_types=["full_attention"] * 2),
    "Mistral3": dict(text_config=SHAPE | dict(head_dim=8, model_type="mistral"), image_token_index=291,
                     vision_config=VISION | dict(model_type="pixtral")),
    "Granite": dict(logits_scaling=3.0), "Cohere": dict(logit_scale=0.2),
    "Mixtral": dict(num_local_experts=4, output_router_logits=True, router_jitter_noise=0.3),
    "Phimoe": dict(num_local_experts=4),  # jitter in eval mode too
    "Llama4Text": dict(intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "Qwen3_5Text": dict(num_hidden_layers=4, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
                        linear_key_head_dim=8, linear_value_head_dim=8),
    "Falcon": dict(attention_dropout=0.1, hidden_dropout=0.1, alibi=False),
    "Afmoe": dict(head_dim=8, moe_intermediate_size=32, num_experts=8),  # names the mask in calling attention
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
    rollout = draw(model, group_size=3, eos_ids=range(0, 258, 7))
    assert len(set(rollout.lengths.tolist())) > 1
    for log_probs in (rollout.log_probs, icpo.token_log_probs(model, rollout, max_logits=1500)):
        assert_close(log_probs[rollout.mask].double(), plain_log_probs(plain, rollout), atol=5e-5, rtol=0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = icpo.update(model, sgd, rollout, torch.randn(9), Config(micro_batch=4))
    assert metrics["sampling/logp_difference"] < 1e-4 and 0 < metrics["grad_norm"] < math.inf
    icpo.save_model(model, eos_ids, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (source / "config.json").read_bytes()
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", source))
    assert_close(again, first, atol=0, rtol=0)  # the same names and dtypes, too


@pytest.mark.parametrize("kind, config, message", [
    ("Qwen2ForSequenceClassification", config_of("Qwen2"), ""),
    ("Qwen2ForCausalLM", config_of("Qwen2", eos_token_id=None), "no eos token"),
    ("Qwen2ForCausalLM", config_of("Qwen2", quantization_config={"quant_method": "fp8"}), "is quantized"),
    ("MambaForCausalLM", transformers.MambaConfig(hidden_size=32, num_hidden_layers=2), ""),  # no cache
    ("BertLMHeadModel", transformers.BertConfig(**SHAPE), "log-probs differ"),  # looks ahead
    ("OPTForCausalLM", config_of("OPT", layerdrop=0.0), "log-probs differ")])  # has dropout in its layers
def test_models_that_cannot_be_trained_get_one_line_and_write_nothing(tmp_path, capfd, kind, config, message):
    tokenizer = saved(tmp_path / "model", make=getattr(transformers, kind), config=config)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [*REWARD, "--gradient-checkpointing"]
    error = error_of(capfd, *tiny_run(tmp_path / "model", tmp_path / "run", *flags))
    assert message in error and error.startswith(f"--model {tmp_path / 'model'}: ")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- The tokenizer is its file

def sentencepiece(first, *normalizer):
    """The layouts of Llama 2, Mistral and Gemma: spaces as ▁, bytes for what has no token."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij0123.", "▁a", "ab"]
    vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b")]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence(list(normalizer))
    else:
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", first, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer


def byte_level(split, prefix=False):
    """The layouts of GPT-2, SmolLM2, Qwen and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=prefix, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=285, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator(["so 12 and 123 is a sum, and so is 1234\n\nand the end"] * 3, trainer)
    return tokenizer


START, SPACES = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
THREES, ONES = (
    Split(Regex(digits + r"|[^\s\p{N}]+|\s+"), "isolated") for digits in (r"\p{N}{1,3}", r"\p{N}"))
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
    "SmolLM2": ("GPT2Tokenizer", byte_level(Digits(True)), False, {}),
    "GPT-2": ("GPT2Tokenizer", byte_level(Digits(True), prefix=True), False, {"add_prefix_space": True})}


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
    _, loaded, _ = icpo.load_model(str(tmp_path), "cpu")
    for text in ("so 1234 and 56", " a  ab\n\nis it 3 + 4 = 7 .", "é日本\u00a0🙂 don't", "</s>a",
                 "\ta b ", "a<think>b <|im_end|>  a wide b"):
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special).ids
            assert loaded(text, add_special_tokens=special).input_ids == ids, (text, special)
            assert texts(loaded, [ids], truncated=True) == [tokenizer.decode(ids, skip_special_tokens=False)]
    for template, text in ((None, "2+2"), ("<s>{{ messages[0].content }}", "<s>2+2")):  # it begins once
        loaded.chat_template = template
        ids = tokenizer.encode(text, add_special_tokens=template is None).ids
        assert icpo.encode({"prompt": "2+2", "answer": 4}, loaded, Config()).ids == ids


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        icpo.sample(Mock(), [[1], []], group_size=2, max_new_tokens=3, eos_ids=[])
