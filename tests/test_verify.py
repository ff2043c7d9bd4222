"""Tests of verify.py: the verdicts beside, generated answers, hostile ones, GSM8K's. Run: python -m pytest -q

verdicts.json holds answers by category. Those in one list are equal; of others only the pairs in "also", in that
order; and what stands in "never" equals nothing.
"""

import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

import verify as module
from tests.common import ROOT, rows_of
from verify import compute_score, extract_answer, is_equivalent, reward_func, verify

EXTRACTED = r"""
markers   so \boxed{42} ~ 42 ;; \boxed{\frac{1}{2}} done ~ \frac{1}{2} ;; \boxed{1} then \boxed{2} ~ 2 ;; \fbox{3} ~ 3
markers   \boxed {4} ~ 4 ;; \boxed{\boxed{5}} ~ 5 ;; \boxed{\{1, 2\}} ~ \{1, 2\}
markers   \boxed{\left\{ x \right.} ~ \left\{ x \right. ;; \boxed 5 ~ 5 ;; $\boxed 7$. ~ 7 ;; \fbox B ~ B
markers   \boxed\pi⏎ ~ \pi ;; <answer> 7 </answer> ~ 7 ;; <answer>\boxed{8}</answer> ~ 8 ;; <answer>⏎#### 9</answer> ~ 9
markers   \boxed{1} <answer>2</answer> ~ 2 ;; \boxed{1}⏎#### 5 ~ 5 ;; #### 5⏎\boxed{1} ~ 1
markers   work⏎#### -1,200 ⏎bye ~ -1,200 ;; #### $18 ~ $18 ;; #### 18 dollars ~ 18 dollars ;; #### 12 apples ~ 12 apples
markers   #### Summary⏎#### 12 ~ 12 ;; #### 12⏎#### Summary ~ 12 ;; #### 12⏎#### 3. Check the result ~ 12
markers   ##### 5 apples and 6 ~ 6 ;; \boxed{9} <think>\boxed{1}</think> \boxed{2} ~ 2
markers   </think> a \boxed{1} </think> \boxed{2} ~ 2
phrases   The answer is 12. Bye ~ 12 ;; Answer: x ~ x ;; The final answer is: **3.5**. ~ 3.5 ;; Answer:⏎⏎42⏎bye ~ 42
phrases   **Answer:** (B) ~ (B) ;; the answer is 1 or 2 ~ 1 or 2 ;; the answer is 7, the answer is 8. ~ 8
phrases   The answer is 12 because 3 * 4 = 12. ~ 12 ;; The answer is **12**, since 3 * 4 is ~ 12
phrases   The answer is:⏎\[⏎18⏎\] ~ 18 ;; Answer:⏎⏎$$⏎x + 1⏎$$ ~ x + 1 ;; The answer is **18** dollars. ~ 18 dollars
phrases   The answer is A as 7 is prime ~ A ;; the answer is 4 so that 5 is not ~ 4
phrases   the answer is 5 as well as 6 ~ 5 as well ;; the answer is basic ~ basic ;; the answer is 4 so what ~ 4 so what
phrases   first 3 then 4/5 ~ 4/5 ;; costs -7 in all ~ -7 ;; = 7 ~ 7 ;; 1,234.5% more ~ 1,234.5%
numbers   so \frac{1}{2}. ~ \frac{1}{2} ;; a debt of -$5. ~ -$5 ;; it is 5. <think> Or 6? ~ 5
nothing   <think> \boxed{5}, or ~ None ;; <think>\boxed{1}</think> none here ~ None ;; B ~ None ;; nothing here ~ None
nothing   \boxed{1} \boxed 12 ~ None
nothing   \boxed 7.5 ~ None ;; \boxed 7/8 ~ None ;; \boxed 7, 8 ~ None ;; \boxed -7 ~ None ;; \boxedx 5 ~ None
nothing   \boxed{1} \boxed{} ~ None ;; \boxed{1} \boxed{2 ~ None ;; #### 4⏎<answer>5 ~ None
nothing   \boxed{3} <answer></answer> ~ None ;; the answer is 4 \boxed{ ~ None
phrases   The answer is therefore 18. ~ 18 ;; answer is approximately 3.14 ~ 3.14 ;; The answer is ... 5. ~ 5
phrases   The answer is 72, in total, so it is 72. ~ 72 ;; The answer is 18 (rounded). ~ 18 ;; answer: 18 - that is all ~ 18
phrases   Final Answer: The largest n is 34. ~ 34 ;; The answer must be 4. ~ 4 ;; Answer: He had 3 hours left. ~ 3
phrases   The answer is 7. Indeed, the answer is correct. ~ 7 ;; The answer is 7.⏎Final answer: ~ 7
phrases   answer is 2; 3. ~ 2; 3
numbers   the price is $29.00. ~ 29.00 ;; It is therefore **18** dollars. ~ 18 ;; So it is 5 N ~ 5 ;; = 25°C. ~ 25
nothing   the derivative is 3x ~ None ;; I think H2O ~ None ;; 1. First 2. Second 3. Third ~ None
nothing   See equation (7). ~ None
nothing   x = 1/2x^{12} ~ None ;; it lies in $[0,1)$ ~ None ;; 10-7 ~ None ;; it is 3, and 4, ok ~ None ;; 3 or 4 ~ None
nothing   it is 5. But why ~ None ;; Since the distance is 1 ~ None ;; 2 * 3 ~ None ;; it is not 5 ~ None ;; 1 3/4 ~ None
"""


def pairs(table):
    for line in table.strip().splitlines():
        category, cases = line.split(None, 1)
        for case in cases.split(" ;; "):
            a, b = case.strip().replace("⍽", "\u00a0").replace("⏎", "\n").rsplit(" ~ ", 1)
            yield pytest.param(a, b, id=f"{category}: {case.strip()}")


@pytest.mark.parametrize("response, answer", [*pairs(EXTRACTED)])
def test_extraction(response, answer):
    assert str(extract_answer(response)) == answer


def test_strict_extraction_stops_before_letter_phrase_and_number():
    assert extract_answer("The answer is 12", strict=True) is None and extract_answer("it is 12", strict=True) is None
    assert extract_answer("B", strict=True, letter=True) is None and extract_answer("#### 12", strict=True) == "12"
    assert extract_answer("") is None and extract_answer("x" * 1000 + " 5 " + "y" * 1000) == "5"


VERDICTS = json.loads(Path(__file__).with_name("verdicts.json").read_text())


@pytest.mark.parametrize("category", VERDICTS)
def test_any_two_answers_of_a_category(category):
    kept = {"also": [], "never": []} | VERDICTS[category]
    place = {answer: i for i, answers in enumerate(kept["equal"]) for answer in answers}
    wrong = [(a, b) for a, b in itertools.product(place, place)
             if is_equivalent(a, b) != (place[a] == place[b] or [a, b] in kept["also"])]
    wrong += [(a, b) for a in kept["never"] for b in [*place, a] if is_equivalent(a, b) or is_equivalent(b, a)]
    assert not wrong and len(place) > 16


def test_number_with_a_noun_is_the_number_if_that_is_the_reference():
    for answer in ("12 apples", "12 \\text{ apples}", "12.0 Apples.", "24/2 cups", "**12 men**", "\\frac{24}{2} cups",
                   "12 dollars per day", "\\$12 per box", "12 miles per hour"):
        assert is_equivalent(answer, "12") and is_equivalent("12", answer), answer
        assert not is_equivalent(answer, "$12") and not is_equivalent(answer, "13"), answer
    others = ("3 dozen; 3 millions; 3 thousandths; 3 quarters; 3 halves; 3 squared; 3 more; 3 times; 3 less; 3 over; "
              "3 percentage; 3 repeating; 3 five; 3 binary; 3 sin; 3√; 3 of 5 apples; 3 apples and 5; 3 5 apples; "
              "1 + 2 apples; 3, 5 apples; 3 or 5 apples; not 3 apples; -3 apples; 3 xy; 3 pm; 3 x; 3apples; 3 dozen per day; "
              "3 per dozen; 3 twelfths; $3 million; 3 million per year")
    for answer in others.split("; "):
        assert not is_equivalent(answer, "3") and not is_equivalent("3", answer), answer
    assert is_equivalent("12 percent", "0.12") and not is_equivalent("12 apples", "12 oranges")


def test_beyond_the_bounds_the_text_is_compared():
    many = r"(1+\sqrt2)(1+\sqrt3)(1+\sqrt5)(1+\sqrt7)(1+\sqrt{11})"
    for zero in (r"2^{9999}*2^{9999}*2^{9999}*0", r"(1+\sqrt2)^9*0", f"{many}*\\sqrt3*0", "(" * 150 + "0" + ")" * 150, "0e1000"):
        assert is_equivalent(zero, zero) and not is_equivalent(zero, "0"), zero
    for long, short in [(", ".join("1" * 65), "1, 1"), ("0" * 1000 + "1", "1"), ("[" * 30 + "1" + "]" * 30, "1")]:
        assert is_equivalent(long, long) and not is_equivalent(long, short), long
    assert not is_equivalent("[" * 30 + "0.5" + "]" * 30, "[" * 30 + ".50" + "]" * 30)


# Response ~ reference: what verify takes, and what it does not.
TAKEN = r"""
\boxed{2 \cdot 8 = 16} ~ 16 ;; \boxed{6/8} ~ 0.75 ;; \boxed{1 3/4} ~ 7/4 ;; \boxed{3.2 \times 10^{-19} \text{ J}} ~ 3.2e-19
\boxed{50\%} ~ 1/2 ;; \boxed{12 \text{ apples}} ~ 12 ;; \boxed{x = 5} ~ 5 ;; \boxed{\sqrt{12}} ~ 2\sqrt3
\boxed{(1, 4/6)} ~ (1, \frac23)
so \boxed{8} ~ 8 \text{ meals} ;; so 350,000 ~ 350,000 pages ;; The answer is 28.3 MeV ~ 28.3 ;; \boxed{25 \ \Omega} ~ 25
The answer is B (Paris). ~ B ;; Answer: B - Paris ~ B ;; It is B, which is odd. The answer is B, which is odd. ~ B
The answer is (G). The derived answer is correct. ~ G ;; \boxed{300} minutes. The answer is (E). ~ E
The answer is (E). Answer: ~ E
So option B is correct. ~ B ;; I would pick B — a safe choice. ~ B ;; The answer should be letter B. ~ B
\boxed{Answer: B} ~ B
B ~ (B) Paris ;; The answer is ... I. ~ I ;; (b) ~ B ;; ANSWER IS D. A is wrong. ~ D ;; \boxed{300} The answer is (E) ~ 300
The answer is Yes. ~ True ;; True ~ True ;; \boxed{180} ~ So 90 * 2.⏎The answer is: 180. ;; so <boxed{70}\).</answer> ~ 70
"""
REFUSED = r"""
\boxed{102^2 - 98^2} ~ 800 ;; \boxed{2+3} ~ 5 ;; \boxed{12/2} ~ 6 ;; \boxed{\frac{4}{2}} ~ 2 ;; \boxed{1*5} ~ 5
\boxed{5^1} ~ 5
\boxed{\sqrt{25}} ~ 5 ;; \boxed{x=2+3} ~ 5 ;; \boxed{5=2+3} ~ 5 ;; \boxed{2(3)} ~ 6 ;; \boxed{--5} ~ 5
\boxed{2\frac{6}{2}} ~ 5
\boxed{(1+1, 3)} ~ (2, 3) ;; \boxed{\{1+1, 3\}} ~ \{2, 3\} ;; \boxed{2 \pm 1} ~ 1, 3 ;; \boxed{2+3 \approx 5.0} ~ 5
\boxed{4 + 1 cm} ~ 5 cm
\boxed{\frac{0.5}{1}} ~ 0.5 ;; \boxed{5\pi/\pi} ~ 5 ;; \boxed{5!} ~ 5 ;; \boxed{5 mln} ~ 5 ;; \boxed{5 inverse} ~ 5
\boxed{5 mega} ~ 5
options: 4, 5, 6 ~ 6 ;; 4 or 5 ~ 5 ;; from 4 to 5 ~ 5 ;; x <= 5 ~ 5 ;; it is 10:5 ~ 5 ;; The answer is 5, maybe 6 ~ 5
\boxed{5}\boxed{6} ~ 5
The answer is 12 apples, not 13. ~ 13 ;; 4 - 5 ~ 5 ;; Answer: The number is not 5 ~ 5 ;; \boxed{M/m} ~ m/M
\boxed{3, 2} ~ x=2, y=3
(a) The focal length is long. ~ A ;; a) The heat ~ A ;; It is caused by⏎C. difficile ~ C ;; The answer is J. S. Mill. ~ J
I would pick B ~ A
A⏎B⏎C ~ C ;; Option A⏎Option B ~ B ;; Do not pick B ~ B ;; If B is correct ~ B ;; Neither A nor B is correct ~ B
\boxed{E} ~ e
The answer is (A) 3, or maybe (B) 4 ~ A ;; The answer is B (or C) ~ B ;; The answer is A, B ~ A
The answer is A. The answer is A or B ~ A
A) 3 B) 4 ~ A ;; The answer is I don't know. ~ I ;; I am ~ I ;; <answer></answer> The answer is A ~ A ;; \boxed{} B ~ B
"""


@pytest.mark.parametrize("response, reference", [*pairs("yes " + TAKEN.strip().replace("\n", "\nyes "))])
def test_what_verify_takes(response, reference):
    assert verify(response, reference)


@pytest.mark.parametrize("response, reference", [*pairs("no " + REFUSED.strip().replace("\n", "\nno "))])
def test_what_verify_refuses(response, reference):
    assert not verify(response, reference)


def test_strict_wants_a_marker_everywhere():
    assert verify("so 5", "5") and not verify("so 5", "5", strict=True) and verify("\\boxed{5}", "5", strict=True)
    assert compute_score("", "so 5", "5") == 1 and compute_score("", "so 5", "5", strict=True) == 0
    assert reward_func(["so 5", "\\boxed{5}"], answer=["5", "5"], strict=True) == [0, 1]


def test_references_of_numpy_and_json():
    numpy = pytest.importorskip("numpy")
    for response, reference in (("0.25", numpy.float64(0.25)), ("5", numpy.int64(5)), ("True", numpy.bool_(True)),
                                ("12, 13", numpy.array([12, 13])), ("12, 13", [12, 13]), ("[[1, 0], [2, 3]]", [[1, 0], [2, 3]]),
                                ("[12, 13]", (12, "13")), ("5", ["5"]), ("True", True), ("1e-05", 1e-05)):
        assert verify(f"\\boxed{{{response}}}", reference), (response, reference)
    assert not verify("\\boxed{13, 12}", [12, 13]) and not verify("\\boxed{12}", [12, 13]) and not verify("5", numpy.nan)


# What a pattern takes and what it leaves, by name; the rules of verify.py say it themselves.
PATTERNS = {
    "MARKER": (r"\boxed", "box"), "BOX": (" {5}", "x 5"), "HASHES": ("#### 18", "#### Summary"), "LAST_NUMBER": ("so 5 N", "H2O"),
    "PHRASE_END": ("5, so 6", "5, 6"), "LABEL": ("B) 12", "Because"), "LABELS": ("B) 12", "Because"), "CHOICE": ("B, which", "E. coli"),
    "WRAPPER": (r"\text{cm}", r"\theta{cm}"), "GROUPED": ("1,234", "(1,234)"), "NOUN": ("apples", "dozens"), "UNIT": (" m/s^2", "m"),
    "ARITHMETIC": (r"\frac{1}{2}", "apples"), "LITERAL": (r"1.5 * 10^{3}", "2(3)"), "NAME": ("f(2) = 9", "x + 1 = 9"),
    "SEPARATOR": ("1, 2", "1 2"), "TOKEN": (r"\pi", " "), "MIXED": ("1 3/4", "13/4"), "answer": ("The answer is 5", "The answer to it"),
    "letter": ("B is correct", "B is wrong")}


def test_each_pattern_takes_and_leaves():
    patterns = {name: x for name, x in vars(module).items() if isinstance(x, re.Pattern)}
    patterns |= {"answer": module.PHRASES[False], "letter": module.PHRASES[True]}
    assert patterns.keys() == PATTERNS.keys()
    for name, (takes, leaves) in PATTERNS.items():
        whole = name in ("LAST_NUMBER", "NOUN", "UNIT", "LITERAL", "ARITHMETIC")
        start = name in ("BOX", "LABEL", "CHOICE", "NAME")
        judge = patterns[name].fullmatch if whole else patterns[name].match if start else patterns[name].search
        assert judge(takes) and not judge(leaves), name
    source = Path(module.__file__).read_text()
    lines = re.findall(r"^    \((r\".*\"|r\"\"\".*\"\"\"), r?\".*?\"\),?\]*  # (.+?) \| (.+)$", source, re.MULTILINE)
    assert len(lines) > 20
    for (pattern, replacement), (_, takes, leaves) in zip(module.RULES, lines, strict=True):
        assert pattern.search(takes) and not pattern.search(leaves.split(",")[0]), (takes, leaves)


def test_units_that_differ_by_a_letter():
    for a, b in (("5 ms", "5 m"), ("5 mW", "5 MW"), ("5 Ms", "5 ms"), ("5 mins", "5 m"), ("5 mm", "5 m"), ("5 K", "5 kg")):
        assert not is_equivalent(a, b) and not is_equivalent(b, a) and is_equivalent(a, a), (a, b)


def test_adapters():
    assert verify("... #### 72", "48/2 = 24\n#### 72") and not verify("#### 71", "#### 72") and not verify("no", "5")
    assert verify(None, "5") is False and verify("5", None) is False
    assert compute_score("gsm8k", "#### 5", "5", extra_info={}) == 1.0 and compute_score("x", "#### 5", 6) == 0.0
    chat = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "\\boxed{3}"}], []]
    assert reward_func(["\\boxed{3}", "4"], answer=["3", "3"], prompts=["", ""]) == [1.0, 0.0]
    assert reward_func(chat, solution=["3", "3"]) == [1.0, 0.0]
    assert reward_func(["1", "1"], ground_truth=[None, ""]) == [None, None] and reward_func(["1"]) == [None]


def test_verify_works_copied_alone(tmp_path):
    shutil.copy(ROOT / "verify.py", tmp_path)
    command = [sys.executable, "-S", "-c", "from verify import verify; print(verify('so 0.75', '3/4'), verify('7', '8'))"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "True False\n"


def test_letters_of_multiple_choice():
    for answer in ("B", "(B)", "B.", "Option B", "B) 12", "(B) twelve", "\\text{(B)}", "B: 12", "\\textbf{B}",
                   "B) as (A) is odd", "B. Both of A. and C."):
        assert is_equivalent(answer, "B") and is_equivalent(answer, "(B)"), answer
    for answer in ("C", "BAD", "A or B", "12", "Because", "B and C", "AB", "not B", "",
                   "(B) or (A)", "(B), (A)", "(B), or (A)", "B) or A)", "(B) (A) (C)", "B. A. C. D."):
        assert not is_equivalent(answer, "B"), answer


def test_response_that_ends_on_the_letter_of_an_option():
    for response in ("B", "b", "(b)", "**B**\n", "x = 12, so the correct option is (B).", "Correct choice is **B**",
                     "B) 12", "**B. 12**", "Option B", "The answer is option B.", "The correct option is (B) 12. I see.",
                     "It is 12.\n\n**B**", "So 12.\nB) 12", "The answer is **B**: 12", "Correct option: B", "12\n#### (B)"):
        assert verify(response, "B") and verify(response, "\\boxed{(B)}") and not verify(response, "A"), response
    for response in ("A B", "BB", "the correct option is not (B)", "incorrect option is (B)", "The correct option is Bo",
                     "the correct option is (B) or (C)", "The correct option is (B). The answer is (C)",
                     "\\boxed{C} The correct option is (B)", "B) 12 C) 13", "B or C: both",
                     "b) 12\nc) 13", "(B)12\n(C)13", "The answer is (B) or C", "<answer>(B)|(C)</answer>"):
        assert not verify(response, "B"), response
    assert verify("x = 12, so the correct option is (B)", "12")


def test_references_that_cannot_be_read_never_match():
    for reference in (None, "", " ", "\\boxed{}", "\\boxed{5", "<answer>", math.nan, math.inf, [], [None], {}, b"5", 10**5000):
        for answer in ("5", "", "\\boxed{}", None):
            assert is_equivalent(answer, reference) is False
        assert verify("\\boxed{5}", reference) is False
        assert reward_func(["\\boxed{5}"], answer=[reference]) == [None]
    assert verify("\\boxed{5}", 5) and verify("\\boxed{0.25}", 0.25) and not verify("\\boxed{5}", 6)


def test_verify_uses_nothing_but_arithmetic_and_regular_expressions():
    source = Path(inspect.getsourcefile(verify)).read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported == {"math", "re", "collections", "fractions"}
    assert not re.search(r"\b(eval|exec|compile_|signal|thread|subprocess|global)\b", source.split('"""')[2])


def notations(value, rng):
    """The rational in notations drawn at random; every one of them names exactly this value."""
    n, d = value.numerator, value.denominator
    k, sign = rng.randint(2, 9), "-" if n < 0 else ""
    forms = [f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}", f"{sign}\\dfrac{{{abs(n)}}}{{{d}}}", f"{n * k}/{d * k}",
             f"$\\frac{{{n * k}}}{{{d * k}}}$", f"\\frac{{{n}}}{{{d}}} + 0", f"x = {n}/{d}", f"{n * k} \\div {d * k}",
             f"\\sqrt{{{d * d}}}^{{-1}} \\cdot ({n})"]
    if abs(n) > d > 1:
        forms += [f"{sign}{abs(n) // d} {abs(n) % d}/{d}", f"{sign}{abs(n) // d}\\frac{{{abs(n) % d}}}{{{d}}}"]
    if 10**9 % d == 0:  # a finite decimal
        whole, part = divmod(abs(n) * 10**9 // d, 10**9)
        decimal = f"{whole}.{part:09d}".rstrip("0").rstrip(".")
        forms += [sign + decimal, f"{sign}{whole:,}.{part:09d}", f"{sign}{decimal}e0", f"\\text{{{sign}{decimal}}}",
                  f"{sign}{decimal} \\times 10^{{0}}", f"({sign}{decimal})", f"{sign}${decimal}"]
    return rng.choice(forms)


def test_ten_thousand_generated_pairs():
    rng = random.Random(0)
    for _ in range(10_000):
        top, bottom = rng.randint(0, rng.choice([9, 99, 10**6])), rng.choice([1, 1, 2, 3, 4, 5, 7, 8, 10, 100, 999])
        value = Fraction(rng.choice([-1, 1]) * top, bottom)
        other = value + Fraction(rng.choice([-1, 1]), rng.choice([1, 10, 997, 10**6]))
        a, b, c = notations(value, rng), notations(value, rng), notations(other, rng)
        assert is_equivalent(a, b) is True, (a, b)
        assert is_equivalent(a, c) is False and is_equivalent(c, a) is False, (a, c)


def pieces_of(text):
    return [piece.replace("␣", " ").replace("⏎", "\n") for piece in text.split()]


def hostile_inputs():
    rng = random.Random(0)
    pieces = pieces_of(r"\boxed{ } { \frac \sqrt ^ 9 1e9 , ( ) [ ] \{ \pm ␣or␣ #### <answer> $ \text{ ² \ - / . x= %"
                       r" ␣ ⏎ = _{ \, \boxed␣ ␣apples f(")
    for _ in range(1000):
        yield "".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
        yield bytes(rng.randrange(256) for _ in range(rng.randint(1, 60))).decode("latin-1")
        yield "".join(chr(rng.choice([rng.randrange(0x3000), rng.randrange(0xD800, 0xE000)])) for _ in range(20))


def long_inputs(n):
    for piece in pieces_of(r"9 { } ( \boxed{ \frac \sqrt ^ 9^ - 1, ␣ # ####␣ ####␣1⏎ <answer> </think> a answer␣is␣"
                           r" answer:␣ 1␣ \text{ \text{a $ \ x= . 1/ % √ ² \pm ␣or␣ ½ 1e9 \{ \cup 1,000 (( __ * ␣=␣ 1="
                           r" _{ ^{ because␣ answer␣is␣as␣ \boxed␣ correct␣option␣is␣( ␣apples 1\,000 f(1)= x^2␣"
                           r" \mathbf{\frac{1}{2}} (1+\sqrt2)^{16}+ (1/3)^{999}+ \sqrt{99999989}+ 2^{7999}*"
                           r" (\sqrt2+\sqrt3+\sqrt5)^9*"):
        text = piece * (n // len(piece))
        yield from (text, "\\boxed{" + text + "}", "#### " + text, text[:900])


def test_no_input_raises_or_gets_another_type():
    for text in hostile_inputs():
        for response, reference in ((text, "1"), (f"\\boxed{{{text}}}", text), ("1", text)):
            assert type(verify(response, reference)) is bool and type(is_equivalent(response, reference)) is bool
        assert extract_answer(text) is None or type(extract_answer(text)) is str
        assert is_equivalent(text, "5 - 4.5") == is_equivalent("5 - 4.5", text)


def test_long_inputs_cost_time_in_proportion_to_their_length():
    def seconds(text):
        start = time.process_time()
        assert type(verify(text, "1")) is type(verify("\\boxed{1}", text)) is type(verify(text, text)) is bool
        assert type(verify(text, "B")) is bool
        return time.process_time() - start

    for short, long in zip(long_inputs(4_000), long_inputs(40_000)):
        assert any(seconds(long) < 20 * seconds(short) + 0.002 for _ in range(5)), long[:20]  # again if disturbed
    for tail in ("a" * 300 + "!", "ab " * 200 + "!", "m/" * 200, "(" * 500, "a, " * 300 + "b"):  # no way to split them twice
        for start in ("5 ", "so it is 5 ", "The answer is B, ", "f(", "\\text{"):
            assert any(seconds(start + tail) < 0.1 for _ in range(5)), (start, tail[:9])
    nested = "\\boxed{" + "\\{" * 20 + "1" + "\\}" * 20 + "}"
    assert any(seconds(nested) < 0.1 for _ in range(5))


def test_eight_threads_give_the_same_verdicts():
    lists = [answers for kept in VERDICTS.values() for answers in kept["equal"]]
    cases = [(a, b) for these, those in itertools.pairwise(lists) for a, b in itertools.product(these, those)] * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda case: is_equivalent(*case), cases)) == [is_equivalent(*case) for case in cases]


@pytest.mark.parametrize("name", ["train", "test"])
def test_gsm8k_references(name):
    path = Path(os.environ.get("GSM8K", "gsm8k"), f"{name}.jsonl")
    if not path.exists():
        pytest.skip("GSM8K=folder says where train.jsonl and test.jsonl are")
    answers = [row["answer"] for row in rows_of(path)]
    numbers = [Fraction(answer.split("####")[1].replace(",", "").strip()) for answer in answers]
    for i, answer in enumerate(answers):
        final = answer.split("####")[1].strip()
        assert verify(answer, answer) and verify(f"so \\boxed{{{final}}}.", answer) and verify(answer, final)
        assert verify(answers[i - 1], answer) == (numbers[i - 1] == numbers[i])


@pytest.mark.parametrize("a, b, equal", [
    ("0.75", r"\frac{3}{4}", True), ("75%", "3/4", True), ("1.5e3", "1,500", True), ("x = 5", "5", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True), (r"2 \cdot 8 = 16", "16", True), (r"\{1, 2\}", r"\{2,1\}", True),
    ("(1, 2)", "(1,2.0)", True), ("(1, 2)", "(2, 1)", False), ("1 or 2", "1", False), ("0.333", "1/3", False),
    (r"2 \cdot 8 = 15", "15", False), (r"\pi", "3.14", False), ("12,34", "1234", False),
    ("72057594037927937", "72057594037927936", False)])
def test_equivalence_is_exact(a, b, equal):
    assert is_equivalent(a, b) is is_equivalent(b, a) is equal
