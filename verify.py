"""A verifiable reward: does a response give the reference answer? Standard library only; works when copied alone.

    verify("... so the total is \\boxed{\\frac{3}{4}}", "0.75")  ->  True

Extraction takes the explicit marker that starts last: \\boxed{...} or \\fbox{...}, <answer>...</answer>, or a numeric "#### 18". A
marker that is empty or never closed means no answer; nothing falls back to an earlier one. Without a marker, and unless strict, it
takes what follows the last "answer is" or "answer:", else the last number. Text before the last </think> does not count.

Equivalence is exact (fractions.Fraction; no float, no tolerance, no eval) and looks at the whole answer:
    numbers     1,234.50 = 1234.5    -3/4 = \\frac{-3}{4} = -0.75    1 3/4 = 1\\frac{3}{4} = 7/4    1/3 is not 0.333
    percent     50% = 1/2, and the sign may be missing: 50% = 50
    units       currency signs, degrees and plain unit words may be missing: $5 = 5 = 5 dollars; 5 cm is not 5 m
    wrappers    \\text{...}, \\mathrm{...}, \\left, \\right, $...$, \\( ... \\), spaces such as \\, and a closing full stop do not count
    letters     if the reference is a single letter A to J: B = (B) = B. = B) 12
    text        anything else: equal but for case and spaces
An empty or missing reference never matches.
"""

import re
from fractions import Fraction

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
SIGNED = re.compile(rf"[+-]?(?:{NUMBER})")
FRACTION = re.compile(rf"([+-]?)(?:(\d+)(?: |(?=\\frac)))?(?:\\frac\{{([+-]?(?:{NUMBER}))\}}\{{([+-]?(?:{NUMBER}))\}}|({NUMBER})/({NUMBER}))")
QUANTITY = re.compile(rf"([+-]?)([$€£¥]?)([+-]?)(.*?)(%|°| ?[a-z]+(?: [a-z]+)?)?", re.DOTALL)
WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")
SPELLINGS = {"−": "-", "–": "-", "×": "*", "\u00a0": " ", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\$": "$", "\\%": "%", "^\\circ": "°",
             "^{\\circ}": "°", "\\left": "", "\\right": "", "\\,": " ", "\\!": "", "\\;": " ", "\\ ": " ", "\\(": "", "\\)": "", "\\[": "", "\\]": ""}
CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}


def extract_answer(response: str, strict: bool = False) -> str | None:
    """The final answer of a response as it is written, or None. strict: from an explicit marker only."""
    text = response.rsplit("</think>", 1)[-1]
    boxed = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    tag = text.rfind("<answer>")
    hashes = max((match.start() for match in re.finditer(r"#### *[-+$€£¥]{0,2}\.?\d", text)), default=-1)
    last = max(boxed, tag, hashes)
    if last >= 0:
        if last == hashes:
            answer = text[last + 4:].split("\n", 1)[0]
        elif last == tag:
            answer = text[last + 8:].partition("</answer>")[0] if "</answer>" in text[last:] else ""
        else:
            answer = braced(text, text.index("{", last))
        return answer.strip() or None
    if strict:
        return None
    phrase = max(text.lower().rfind("answer is"), text.lower().rfind("answer:"))
    if phrase >= 0:
        line = re.sub(r"^answer(?: is)?[: ]*", "", text[phrase:], flags=re.IGNORECASE).split("\n", 1)[0]
        return re.split(r"[.;] |[.;]$", line, maxsplit=1)[0].strip(" *") or None
    numbers = re.findall(rf"-?(?:\d+/\d+|{NUMBER})%?", text.replace("−", "-"))
    return numbers[-1] if numbers else None


def braced(text: str, start: int) -> str:
    """What stands between the brace at `start` and the one that closes it; "" if none does."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1:i]
    return ""


def tidy(text: str) -> str:
    for spelling, plain in SPELLINGS.items():
        text = text.replace(spelling, plain)
    text = WRAPPER.sub(r" \1 ", text)
    if text.count("$") == 2 and text.strip()[:1] == text.strip()[-1:] == "$":
        text = text.replace("$", "")
    return " ".join(text.split()).removesuffix(".").strip().casefold()


def quantity(text: str) -> tuple[Fraction, str] | None:
    """The exact value of a tidy text and its unit ("" if none, "%" for percent), or None if it is not a single number."""
    match = QUANTITY.fullmatch(text) if len(text) < 200 else None
    if not match:
        return None
    outer, currency, inner, body, unit = match.groups()
    if outer and inner or currency and unit:
        return None
    body, unit = body.strip(), CURRENCIES.get(currency) or (unit or "").strip()
    fraction = FRACTION.fullmatch(body)
    if SIGNED.fullmatch(body):
        value = Fraction(body.replace(",", ""))
    elif fraction:
        sign, whole, *parts = fraction.groups()
        top, bottom = (Fraction(part.replace(",", "")) for part in parts if part)
        if bottom == 0:
            return None
        value = Fraction(whole or 0) + top / bottom
        value = -value if sign == "-" else value
    else:
        return None
    unit = unit[:-1] if unit.endswith("s") and len(unit) > 3 else unit
    return (-value if "-" in outer + inner else value), unit


def is_equivalent(answer: str, reference: str) -> bool:
    """Whether two answers are the same, by the rules at the top of this file."""
    if answer is None or reference is None:
        return False
    answer, reference = tidy(str(answer)), tidy(str(reference))
    if not answer or not reference:
        return False
    if re.fullmatch(r"\(?[a-j]\)?", reference):
        letter = re.match(r"\(?([a-j])(?:[).:]|$)", answer)
        return bool(letter) and letter[1] == reference.strip("()")
    a, b = quantity(answer), quantity(reference)
    if a is None or b is None:
        return answer.replace(" ", "") == reference.replace(" ", "") if a is b else False
    (a, unit_a), (b, unit_b) = a, b
    if unit_a != unit_b and unit_a and unit_b:
        return False
    as_fraction = a / 100 if unit_a == "%" and not unit_b else a, b / 100 if unit_b == "%" and not unit_a else b
    return a == b or as_fraction[0] == as_fraction[1]


def verify(response: str, reference: str) -> bool:
    """Whether the response's final answer is the reference's. The reference may be a worked solution with a marker. Never raises."""
    try:
        answer = extract_answer(response)
        return answer is not None and is_equivalent(answer, extract_answer(reference, strict=True) or reference)
    except (TypeError, ValueError, AttributeError, RecursionError):  # not a string, or digits beyond what int() reads
        return False


def compute_score(data_source, solution_str: str, ground_truth: str, extra_info=None, **kwargs) -> float:
    """The reward function of verl."""
    return float(verify(solution_str, ground_truth))


def reward_func(completions, answer=None, solution=None, ground_truth=None, **kwargs) -> list[float | None]:
    """The reward function of TRL; None, which TRL skips, where there is no reference. Completions are strings or message lists."""
    references = next((column for column in (answer, solution, ground_truth) if column is not None), [None] * len(completions))
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(verify(text, str(reference))) if reference is not None and str(reference).strip() else None for text, reference in zip(texts, references)]
