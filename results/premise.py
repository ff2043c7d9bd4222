"""Where does the premise of ICPO hold? Asks an untrained model if its less probable answers are better.

    python results/premise.py          print the table of the log
    python results/premise.py --run    the same, after measuring what the log lacks

What `preference/agreement` would show in the first steps of a run, by task and temperature: 8 steps of 8
prompts and 8 responses to each, with no update; some ten minutes on two cores. A line of the table is one of
premise.jsonl, and is not measured again. real_model.py says where the weights come from; --model takes a
folder or hub name.
"""

import random
import re
import sys
import unicodedata

import torch

import real_model  # which puts icpo.py in the path
import icpo
import study
from tables import level, markdown
from examples.plain_answers import verify

CAPITALS = dict(pair.split(": ") for pair in (
    "Afghanistan: Kabul, Albania: Tirana, Algeria: Algiers, Angola: Luanda, Argentina: Buenos Aires, "
    "Australia: Canberra, Austria: Vienna, Bangladesh: Dhaka, Belgium: Brussels, Brazil: Brasilia, "
    "Bulgaria: Sofia, Cambodia: Phnom Penh, Canada: Ottawa, Chile: Santiago, China: Beijing, Colombia: "
    "Bogota, Croatia: Zagreb, Cuba: Havana, Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo, Estonia: "
    "Tallinn, Ethiopia: Addis Ababa, Finland: Helsinki, France: Paris, Germany: Berlin, Ghana: Accra, "
    "Greece: Athens, Hungary: Budapest, Iceland: Reykjavik, India: New Delhi, Indonesia: Jakarta, Iran: "
    "Tehran, Iraq: Baghdad, Ireland: Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, "
    "Kenya: Nairobi, Latvia: Riga, Lebanon: Beirut, Lithuania: Vilnius, Mongolia: Ulaanbaatar, Morocco: "
    "Rabat, Nepal: Kathmandu, New Zealand: Wellington, Nigeria: Abuja, Norway: Oslo, Pakistan: Islamabad, "
    "Peru: Lima, Poland: Warsaw, Portugal: Lisbon, Romania: Bucharest, Russia: Moscow, Senegal: Dakar, "
    "Serbia: Belgrade, South Korea: Seoul, Spain: Madrid, Sweden: Stockholm, Thailand: Bangkok, Turkey: "
    "Ankara, Ukraine: Kyiv, Zimbabwe: Harare").split(", "))
TASKS = {
    "products": [(f"What is {a} * {b}?", a * b) for a in range(2, 13) for b in range(2, 13)],
    "one-digit sums": [(f"What is {a} + {b}?", a + b) for a in range(1, 10) for b in range(1, 10)],
    "two-digit sums": [(f"What is {a} + {b}?", a + b) for a in range(10, 100) for b in range(10, 100)],
    "differences": [(f"What is {a} - {b}?", a - b) for a in range(2, 21) for b in range(1, a)],
    "capitals": [(f"What is the capital of {country}?", city) for country, city in CAPITALS.items()],
}
SETTINGS = {name: value for name, value in real_model.STEP.items() if name != "micro_batch"}  # no update
STEPS = 8
COLUMNS = {
    "agreement": "preference/agreement", "accuracy": "reward/verified",
    "groups all alike": "groups/uniform_frac", "truncated": "length/truncated_frac", "entropy": "entropy"}


def names_capital(response: str, reference: str) -> float:
    """1 if the response names this capital and no other of the list: a chat model answers in sentences."""
    plain = unicodedata.normalize("NFKD", response).encode("ascii", "ignore").decode().lower()
    named = {city for city in CAPITALS.values() if re.search(rf"\b{city.lower()}\b", plain)}
    return float(named == {reference})


def measure(job: dict) -> dict:
    """The job with what each step would show."""
    torch.set_num_threads(1)
    config = icpo.Config(temperature=job["temperature"], **job["settings"])
    policy, tokenizer, eos_ids = icpo.load_model(real_model.located(job["model"]), "cpu")
    P, G = config.prompts_per_step, config.group_size
    questions = random.Random(0).sample(TASKS[job["task"]], STEPS * P)
    examples = [icpo.encode({"prompt": prompt, "answer": answer}, tokenizer, config)
                for prompt, answer in questions]
    torch.manual_seed(0)
    reward, rows = names_capital if job["task"] == "capitals" else verify, []
    for step in range(STEPS):
        batch = examples[step * P:(step + 1) * P]
        prompts = [example.ids for example in batch]
        rollout = icpo.sample(policy, prompts, G, config.max_new_tokens, eos_ids, config.temperature)
        rewards, _ = icpo.score_responses(reward, icpo.texts_of(rollout, tokenizer, batch), batch)
        confidence = icpo.sequence_log_prob(rollout.log_probs, rollout.mask).view(P, G)
        rows.append(icpo.rollout_metrics(rollout, rewards, confidence, config.beta))
    return job | {name: [round(row[name], 3) for row in rows] for name in COLUMNS.values()}


def plan(model: str) -> list[dict]:
    """The jobs. Products come a third time, with room to finish: is it truncation that is seen?"""
    cases = [(task, temperature, {}) for temperature in (1.0, 0.5) for task in TASKS]
    return [dict(model=model, task=task, temperature=temperature, settings=SETTINGS | longer)
            for task, temperature, longer in [*cases, ("products", 1.0, dict(max_new_tokens=96))]]


def shown(row: dict, name: str) -> str:
    """Mean over the steps with its 95% interval; agreement of those where rewards differ in a group."""
    known = [value for value, alike in zip(row[name], row["groups/uniform_frac"])
             if name != "preference/agreement" or alike < 1]
    return level(known) if len(known) > 1 else "unknown"


def table(rows: list[dict]) -> str:
    return markdown(["task", "temperature", "tokens", *COLUMNS], [
        [row["task"], str(row["temperature"]), str(row["settings"]["max_new_tokens"]),
         *(shown(row, name) for name in COLUMNS.values())]
        for row in rows])


def main(arguments: list[str] | None = None) -> None:
    parser = study.parser_of(__doc__)
    parser.add_argument("--model", type=real_model.model_of, default=real_model.WEIGHTS,
                        help=f"folder or hub name (default {real_model.WEIGHTS})")
    args = parser.parse_args(arguments)
    print(table(study.complete(real_model.RESULTS / "premise.jsonl", plan(args.model), args, measure,
                               lambda *_: real_model.prepare(args.model))))


if __name__ == "__main__":
    sys.exit(real_model.guarded(main))
