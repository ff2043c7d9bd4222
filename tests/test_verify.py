r"""The contract of verify.py, in the order of its docstring, a table a rule.

In the tables, ";;" separates cases, "~" a response or answer from its reference; ⏎ is a line end.
"""

import math
import random
import shutil
import time
from decimal import Decimal
from fractions import Fraction

import pytest

from examples import plain_answers
from tests.common import ROOT
from tests.test_run import in_a_process
from verify import compute_score, extract_answer, is_equivalent, reward_func, verify


def table(text):
    """Pairs, with whether they should be equal: a line that starts with "no" holds what must not."""
    cases = []
    for line in filter(None, text.split("\n")):
        verdict, pairs = line.split(" ", 1)
        for pair in pairs.split(" ;; "):
            left, right = pair.strip().replace("⏎", "\n").rsplit(" ~ ", 1)
            cases.append(pytest.param(left, right, verdict == "yes", id=f"{verdict} {pair.strip()}"))
    return cases


EXTRACTED = r"""
yes so \boxed{42} ~ 42 ;; \boxed{\frac{1}{2}} done ~ \frac{1}{2} ;; \boxed{1} then \boxed{2} ~ 2
yes \fbox{3} ~ 3 ;; \boxed {4} ~ 4 ;; \boxed{\boxed{5}} ~ 5 ;; \boxed{\{1, 2\}} ~ \{1, 2\} ;; 7-\boxed{5} ~ 5
yes <answer> 7 </answer> ~ 7 ;; \boxed{1} <answer>2</answer> ~ 2 ;; \boxed{1}⏎#### 5 ~ 5 ;; (3)-\boxed{5} ~ 5
yes #### 5⏎\boxed{1} ~ 1 ;; <answer>\boxed{8}</answer> ~ 8 ;; work⏎#### -1,200 ⏎bye ~ -1,200
yes #### $18 ~ $18 ;; #### $18$ ~ $18$ ;; #### x = 18 ~ x = 18 ;; #### 1 1/2 ~ 1 1/2 ;; #### (B) ~ (B)
yes 7+9=16 #### 136 ~ 136 ;; #### 18 per day ~ 18 per day ;; #### 18<|im_end|> ~ 18 ;; The answer is 18. ~ 18
yes #### 12⏎#### Summary ~ 12 ;; #### 12⏎#### 3. Check ~ 12 ;; so = -\boxed{5} ~ -5
yes \boxed{9} <think>\boxed{1}</think> \boxed{2} ~ 2 ;; it is \boxed{5}. Or 6? ~ 5
yes **Answer:** $\frac12$ ~ $\frac12$ ;; Yes.⏎So the answer is (B) ~ (B) ;; The answer is: **5**. ~ 5
yes 3 * 6 = 18, so the final answer is 18.</s> ~ 18
no \boxed{1} \boxed{} ~ 1 ;; \boxed{1} \boxed{2 ~ 1 ;; #### 4⏎<answer>5 ~ 4 ;; <think> \boxed{5} ~ 5 ;; B ~ B
no ##### 5 ~ 5 ;; #### 2 Ways ~ 2 Ways ;; it is 5 ~ 5 ;; The answer is 5. I hope so. ~ 5
no I doubt the answer is 5 ~ 5 ;; The wrong answer is 5 ~ 5 ;; The answer is 5.⏎Next ~ 5
no The answer is B? No, it is D. ~ B ;; The answer is 4 \boxed{} ~ 4
"""


@pytest.mark.parametrize("response, answer, right", table(EXTRACTED))
def test_1_only_the_last_marker_counts(response, answer, right):
    assert (extract_answer(response) == answer) == right


EQUAL = r"""
yes 18 ~ 18.0 ;; +18 ~ 18 ;; -3/4 ~ \frac{-3}{4} ;; 1,234.50 ~ 1234.5 ;; 1{,}000 ~ 1\,000 ;; 007 ~ 7
yes −4 ~ -4 ;; 1 3/4 ~ 7/4 ;; 1\frac34 ~ 1.75 ;; ½ ~ 0.5 ;; 4.5 x 10^{33} ~ 4.5e33 ;; 2^{10} ~ 1024
yes १२ ~ 12 ;; 10⁻¹² ~ 1e-12 ;; ‑5 ~ -5 ;; \sqrt{12} ~ 2\sqrt3 ;; \frac{1}{\sqrt{2}} ~ \frac{\sqrt{2}}{2}
yes (1+\sqrt2)^2 ~ 3+2\sqrt2 ;; 4\sqrt(2) ~ \sqrt{32} ;; 2\pi r ~ r \cdot 2\pi ;; (x+1)^2 ~ x^2+2x+1
yes \frac x2 ~ 0.5x ;; \frac{1}{1+\sqrt2} ~ \sqrt2-1 ;; \\frac{1}{2} ~ 0.5 ;; 6 - 5i ~ 6-5i ;; 4x ~ 4 * x
yes \sqrt[3]{8} ~ \sqrt[3]{8} ;; \mathrm{e}^2 ~ e^2 ;; {2}^{3} ~ 8 ;; 2π r ~ 2\pi r ;; 12/2/3 ~ 2
no 0.333 ~ 1/3 ;; 100001 ~ 100000 ;; 1 234 ~ 1234 ;; 13/4 ~ 1 3/4 ;; 1​3 ~ 13 ;; 528 ~ 52_8 ;; 5! ~ 5
no 1.2.3 ~ 1.2 ;; 2\pi r ~ 2\pi R ;; XY ~ xy ;; M/m ~ m/M ;; \sqrt[3]{9} ~ \sqrt[3]{8} ;; \pi ~ 3.14159
no \sqrt2 ~ 1.41421356 ;; 1/0 ~ 1 ;; 5 6 ~ 5 ;; 5- ~ 5 ;; *5 ~ 5 ;; x\sin 2 ~ \sin 2x ;; slt ~ tls
no \sqrt{2}+\sqrt{3} ~ \sqrt5 ;; \sqrt{-1} ~ 1 ;; 40_9 ~ 40 ;; DdGg \times Ddgg ~ DDgg \times ddGg
no \sqrt{227}^2 ~ -227 ;; \sqrt{51529} ~ -227 ;; 4^{\frac12} ~ 4
"""
UNITS = r"""
yes 12 apples ~ 12 ;; 12 ~ 12\text{ cm} ;; 12\text{ square units} ~ 12 ;; 25\pi \text{ inches} ~ 25\pi
yes 12 months ~ 12 ;; \$12 ~ 12 ;; 12 ₹ ~ 12 ;; 5 cm ~ 5.0 centimeters ;; 1 foot ~ 1 ft ;; 60^\circ ~ 60
yes 25^\circ \text{C} ~ 25 °C ;; 12th ~ 12 ;; $1.5 million ~ 1,500,000 ;; \$1.5\text{ million} ~ 1500000
yes 12 pieces of candy ~ 12 ;; 5 N ~ 5 ;; 0.5 N ~ \frac12 \text{ N} ;; 50\% ~ 0.5 ;; 50\% ~ 50 ;; 50 ~ 50\%
yes 0.5 ~ 50\% ;; 12 dozen ~ 12 dozen ;; 18 per day ~ 18
no 5 cm ~ 5 m ;; 5 mW ~ 5 MW ;; 12 dozen ~ 12 ;; 12 crore ~ 12 ;; 12 million ~ 12 ;; 500 cents ~ $5 ;; 6x ~ 6
no $5B ~ 5 ;; 5 squared ~ 5 ;; 5 times ~ 5 ;; 9 am ~ 9 pm ;; 12 apples ~ 12 oranges ;; five ~ 5 ;; 0.25 ~ 25
no 5 of 6 apples ~ 5 ;; 5 not 6 ~ 5 ;; 2500\% ~ 25 ;; 2500 = 2500\% ~ 25 ;; 5%% ~ 5 ;; 5\% ~ 500\%
"""
LISTS = r"""
yes 1, 2 ~ 2 and 1 ;; \{2, 1\} ~ 1, 2 ;; 1, 2 ~ \{1,2\} ;; $69$,$84$ ~ 84, 69 ;; 2 \pm 1 ~ 1, 3
yes (1,2) ~ \left( 1, 2 \right) ;; \{1\pm\sqrt5, 3\} ~ \{3, 1-\sqrt5, 1+\sqrt5\} ;; x=\pm2 ~ 2,-2
yes (-\infty, 2) \cup (3, 4) ~ (-\infty,2)\cup(3,4) ;; [1, 2, 3] ~ [1,2,3.0]
yes \begin{pmatrix} 1/2 \\ 2 \end{pmatrix} ~ \begin{bmatrix}\frac12\\2\end{bmatrix}
yes \frac{1\pm\sqrt5}{2} ~ \frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}
no 1, 2 ~ [1, 2] ;; [0, 1) ~ (0, 1) ;; (2, 1) ~ (1, 2) ;; 2, 9 ~ 2, 2, 9 ;; 1 ~ 1, 2 ;; 4 or 5 ~ 5
no 2021 ~ \pm 2021 ;; \begin{pmatrix} 1 \\ 2 \end{pmatrix} ~ \begin{pmatrix} 2 \\ 1 \end{pmatrix}
no 3 \pm 2 ~ 5 ;; (1,234) ~ 1234 ;; £40 ~ €40 ;; (1, 2 ~ 1, 2
"""
NAMES = r"""
yes x = 5 ~ 5 ;; 5 ~ m+n = 5 ;; |AB| = 5 ~ 5 ;; P(X=2) = 5 ~ 5 ;; \text{Area} = 5 ~ 5 ;; x\in(0,1) ~ (0,1)
yes n+1 ~ k=n+1 ;; 2+3 = 5 ~ 5 ;; m+n = 2+3 = 5 ~ 5 ;; \frac13 \approx 0.333 ~ 1/3 ;; x=5,y=6 ~ 5,6
yes a=2, h=-1, k=3 ~ 2,-1,3 ;; x = 1 \text{ or } x = 2 ~ 2, 1 ;; = 5 ~ 5
no n=3k ~ 3 ;; 25 ~ x^2+y^2=25 ;; C ~ B=C ;; x=5=6 ~ 6 ;; 3, 2 ~ x=2, y=3 ;; 2x = 5 ~ 5 ;; 2 + 2 = 5 ~ 5
no 50 = 50\% ~ 0.5 ;; a+c=d+e ~ a+b=d+e ;; x=1, y=2 ~ y=1, x=2 ;; I = const ~ N = const
"""
LETTERS = r"""
yes B ~ B ;; (B) ~ B ;; b ~ (B) ;; B ~ b ;; \text{B. x=5} ~ B ;; B. mitochondria ~ B ;; $B$ ~ B ;; (B) 12 ~ B
yes Option B ~ B ;; \text{(E)}\ a + b ~ E ;; \mathrm{(C) \ } 30^\circ ~ C ;; D. all of the above ~ D
yes B ~ (B) Paris ;; (b) paris ~ B. Paris ;; Answer: B ~ B
no C ~ B ;; A. b. c. ~ A ;; A or b ~ A ;; B and D ~ B ;; A. 5 B. 6 C. 7 ~ A ;; A/B/C ~ A ;; ABCD ~ A ;; E ~ e
no (B) vs. (D) ~ B ;; not B ~ B ;; E. coli ~ E ;; J. S. Mill ~ J ;; A, all of the options ~ A ;; 12 ~ B
no B? ~ B ;; Ⓐ ~ B ;; A ~ A - 5 ;; A - 5 ~ A ;; (B) Rome ~ (B) Paris ;; J. Cole ~ J. Edgar Hoover
no I, III only ~ I, II only ;; F. Scott Fitzgerald ~ F. Murray Abraham
"""
TEXT = r"""
yes Yes ~ true ;; \text{Paris} ~ PARIS ;; June 20 ~ \text{June 20} ;; U.K. ~ UK ;; -3 \le x<5 ~ -3 \leq x < 5
yes 10:30 \text{ AM} ~ 10:30 a.m. ;; E. coli ~ \text{E. coli} ;; \emptyset ~ \varnothing ;; x \ne3 ~ x \neq 3
yes x^2+y^2=25 ~ x^2 + y^2 = 25 ;; \ln 2 ~ \ln(2) ;; \sin\theta ~ \sin \theta
no 4:30 ~ 4:30 p.m. ;; <6 ~ 5 ;; 5 \neq 6 ~ 6 ;; 5 \approx 6 ~ 5 ;; x < 5 ~ x \le 5 ;; x > 5 ~ 5 ;; $ ~ .
no LCR circuit ~ LRC circuit ;; f(-1) \le f(2) ~ f(-1) \ge f(2) ;; q \to p ~ p \to q
no (\forall x)(Fx \supset ~Sx) ~ (\forall x)(Fx \supset Sx)
no random selection, random assignment ~ random assignment, random selection
"""


@pytest.mark.parametrize("answer, reference, right", table(EQUAL + UNITS + LISTS + NAMES + LETTERS + TEXT))
def test_2_to_7_equal_answers(answer, reference, right):
    assert is_equivalent(answer, reference) is right
    assert verify(f"\\boxed{{{answer}}}", reference) <= right


FINISHED = r"""
yes \pi ~ \frac{2\pi}{2} ;; 12/8 ~ 1.5 ;; 6/8 ~ 0.75 ;; 7/4 ~ 1 3/4 ;; 1.5 \times 10^3 ~ 1500 ;; 2+3 = 5 ~ 5
yes \frac{35}{25} ~ \frac75 ;; 0.5x ~ \frac x2 ;; \frac12+\frac{\sqrt3}{2} ~ \frac{1+\sqrt3}{2} ;; 1+x ~ x+1
yes \frac{\sqrt2}{2} ~ \frac{1}{\sqrt2} ;; \frac12\sqrt3 ~ \frac{\sqrt3}{2} ;; 2yx ~ 2xy ;; 10/5 ~ 10/5
yes (3+x)(x+2) ~ (x+2)(x+3) ;; 4\cdot\sqrt2 ~ 4\sqrt2 ;; 2^2 \times 3 ~ 2^2 \cdot 3
no 12/2 ~ 6 ;; 2(3) ~ 6 ;; 3+3 ~ 6 ;; \sqrt{36} ~ 6 ;; 2 \cdot 3 ~ 6 ;; 3^3 ~ 27 ;; -(-6) ~ 6 ;; 5\pi/\pi ~ 5
no \frac{0.5}{1} ~ 0.5 ;; 10^2 ~ 100 ;; \sqrt{242} ~ 11\sqrt{2} ;; \frac{1}{\sqrt2} ~ \frac{\sqrt2}{2}
no 3\sqrt2+2\sqrt2 ~ 5\sqrt2 ;; 2\cdot3\sqrt2 ~ 6\sqrt2 ;; \frac{4\sqrt2}{2} ~ 2\sqrt2 ;; 3-5 days ~ 4-6 days
no \sqrt2\sqrt3 ~ \sqrt6 ;; (\sqrt{5}-5)(2\sqrt{5}-1) ~ 15-11\sqrt{5} ;; \frac{210\pi}{180} ~ \frac{7\pi}{6}
no \frac{2-5\sqrt5}{4\sqrt{13}} ~ \frac{2\sqrt{13}-5\sqrt{65}}{52} ;; \frac12\cdot\frac34 ~ 3/8 ;; x+x ~ 2x
no \frac{\frac12}{\frac34} ~ 2/3 ;; x^2-4 ~ (x-2)(x+2) ;; (x+1)^2 ~ x^2+2x+1 ;; 2(x+1) ~ 2x+2 ;; 22^0 ~ 30^0
no x \cdot x ~ x^2 ;; 5^1 ~ 5 ;; 2x+2 ~ 2(x+1) ;; \frac{8\sqrt3}{6} ~ \frac{4\sqrt3}{3} ;; -4 ~ 2004-2008
no 2004 ~ 2^2 \cdot 3 \cdot 167 ;; 2020-01-02 ~ 2021-01-03
"""


@pytest.mark.parametrize("answer, reference, right", table(FINISHED))
def test_8_answers_are_worked_out(answer, reference, right):
    assert is_equivalent(answer, reference) is True
    assert verify(f"\\boxed{{{answer}}}", reference) is right


def test_9_references():
    numpy = pytest.importorskip("numpy")
    for answer, reference in (
            ("5", 5), ("0.25", 0.25), ("0.25", numpy.float64(0.25)), ("5", numpy.int64(5)),
            ("True", numpy.bool_(True)), ("True", True), ("1e-05", 1e-05), ("0.75", Fraction(3, 4)),
            ("0.1", Decimal("0.1")), ("12", [12, 13]), ("13", numpy.array([12, 13])), ("5", ["5"]),
            ("72", "48/2 = 24\n#### 72"), ("2", "so $x = 7$ and \\boxed{2}."),
            ("180", "It would take 180 days.\nTherefore, the answer is: 180.")):
        assert verify(f"\\boxed{{{answer}}}", reference) is True, (answer, reference)
        assert verify("\\boxed{6}", reference) is False
    for reference in (None, "", " ", "\\boxed{}", "\\boxed{5", math.nan, math.inf, [], [None], 10**5000):
        for answer in ("5", "", "\\boxed{}", None, "nan", "inf"):
            assert is_equivalent(answer, reference) is False and verify(answer, reference) is False
        assert reward_func(["\\boxed{5}"], answer=[reference]) == [None]
    assert verify(None, "5") is False and verify(5, "5") is False and not verify("\\boxed{12, 13}", [12, 13])


def test_adapters():
    assert compute_score("gsm8k", "#### 5", "5", extra_info={}) == 1 and compute_score("x", "#### 5", 6) == 0
    parts = [{"type": "text", "text": "\\boxed"}, {"type": "text", "text": "{3}"}]
    chat = [[{"role": "user", "content": "?"}, {"role": "x", "content": x}] for x in ("\\boxed{3}", parts)]
    assert reward_func(["\\boxed{3}", "4"], answer=["3", "3"], prompts=["", ""]) == [1.0, 0.0]
    assert reward_func(completions=[*chat, []], solution=["3", "3", "3"]) == [1.0, 1.0, 0.0]
    assert reward_func(["1", "1"], ground_truth=[None, ""]) == [None, None]
    for call in (lambda: reward_func(["1"]), lambda: reward_func(["1"], ["?"], ["1"])):
        with pytest.raises(TypeError, match="references"):
            call()
    with pytest.raises(ValueError):
        reward_func(["1"], answer=["1", "2"])


def test_the_module_works_copied_alone(tmp_path):
    shutil.copy(ROOT / "verify.py", tmp_path)
    script = "from verify import verify; print(verify('#### 0.75', '3/4'), verify('7', '7'))"
    assert in_a_process("-S", "-c", script, cwd=tmp_path).stdout == "True False\n"


def notations(value, rng):
    """The rational in a notation drawn at random; every one of them names exactly this value."""
    n, d = value.as_integer_ratio()
    k, decimal = rng.randint(2, 9), Decimal(n) / d
    forms = [f"{n * k}/{d * k}", f"\\frac{{{n}}}{{{d}}} + 0", f"x = {n}/{d}", f"{n} \\div {d}"]
    if abs(n) > d > 1:
        forms.append("-" * (n < 0) + f"{abs(n) // d} {abs(n) % d}/{d}")
    if 10**9 % d == 0:
        forms += [f"{decimal:,f}", f"{decimal:f}e0", f"${decimal:f}"]
    return rng.choice(forms)


def test_generated_pairs():
    rng = random.Random(0)
    for _ in range(2000):
        size, d = rng.choice([9, 99, 10**6]), rng.choice([1, 2, 3, 4, 5, 7, 8, 100, 999])
        value, step = Fraction(rng.randint(-size, size), d), Fraction(1, rng.choice([-1, 10, 997, 10**6]))
        a, b, c = (notations(x, rng) for x in (value, value, value + step))
        assert is_equivalent(a, b) is True, (a, b)
        assert is_equivalent(a, c) is False and is_equivalent(c, a) is False, (a, c)


def test_no_input_raises_or_gets_another_type():
    rng = random.Random(0)
    pieces = (r"\boxed{ } { \frac \sqrt ^ 9 1e9 , ( ) [ ] \{ \pm or #### <answer> $ \text{ ² \ - / . x= % "
              r"= _{ \, f( | \begin{pmatrix} \\ & \approx \le B <think> million answer:").split(" ")
    points = [*range(12288), *range(55296, 57344)]
    for i in range(2000):
        text = "".join(rng.choices(pieces if i % 2 else [*map(chr, points)], k=rng.randint(1, 40)))
        for response, reference in ((text, "1"), (f"\\boxed{{{text}}}", text), ("\\boxed{1}", text)):
            assert type(verify(response, reference)) is bool
            assert type(plain_answers.verify(response, reference)) is bool
        assert extract_answer(text) is None or type(extract_answer(text)) is str


PIECES = (
    r"9 { } ( \boxed{ \frac \sqrt ^ 9^ - 1, # ####_ ####_1⏎ <answer> </think> <eos> a the_answer_is_ "
    r"answer:_ \text{a $ \ x= / % √ ² \pm _or_ ½ 1e9 \{ 1,000 * = _{ because_ \sqrt{2+ "
    r"(1+\sqrt2)^{16}+ (1/3)^{999}+ \sqrt{ \pi^5+ \sqrt{39989}+ 2^{7999}* 1/3,").split()


@pytest.mark.parametrize("piece", PIECES)
def test_no_input_takes_long(piece):
    text = piece.replace("_", " ").replace("⏎", "\n") * 100_000
    inside = [f"\\boxed{{{text[:n // len(piece) * len(piece)]}}}" for n in (390, 790)]
    for response in (text[:100_000], *inside):
        for pair in ((response, "1"), ("\\boxed{1}", response), (response, "B")):
            times = []
            while not times or min(times) > 0.05 and len(times) < 5:  # again if disturbed
                start = time.process_time()
                verify(*pair)
                times.append(time.process_time() - start)
            assert min(times) <= 0.05, (pair[0][:20], min(times))
