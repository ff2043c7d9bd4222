r"""A verifiable reward: does a response give the reference answer? Standard library only; works copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

Extraction. Text up to the last </think>, or from a later <think> on, does not count. Of a \boxed{} or
\fbox{}, an <answer></answer> pair and a numeric line "#### 18", the one that starts last decides; if it is
empty or not closed there is no answer, and nothing falls back to an earlier one. Without such a marker, and
unless strict, the first of: what follows the last "answer is" or "answer:" (for a letter, "correct option
is" too), up to the end of the sentence, because, since, as or so that; for a letter, a response or last line
like "B" or "B) 12", if it marks no other; the last number.

Equivalence looks at the whole answer and is exact: rationals of any size, no floats, no tolerance.
    numbers      1,234.50 = 1\,234.5     -3/4 = \frac{-3}{4} = -0.75     1 3/4 = 1\frac34 = 7/4
                 1.5e3 = 1.5 \times 10^3     0.333 is not 1/3; 1 234 is not 1234; 1,23 is a list of two
    expressions  + - * / ^ of numbers, square roots and pi: \frac{1}{\sqrt{2}} = \frac{\sqrt{2}}{2}, 2(3) = 6
    percent      50% = 0.5 by value, and the sign may be missing: 50% = 50 [convention]
    units        $ EUR cm kg hours ... may be missing on one side; 5 cm is not 5 m, nor 0.05 m [convention]
    nouns        12 apples or $12 per day is 12 if 12 is the reference; 12 dozen is not [convention]
    names        x = 5 is 5, but not y = 5; likewise f(2) = 9, (x, y) = (1, 2) and x \in [0, 1]
    chains       2 \cdot 8 = 16 is 16; 2 \cdot 8 = 15 is not 15, and x = y = 5 is not 5
    tuples       (1, 2) in order; intervals [0, 1) with their brackets; unions of intervals in any order
    sets, lists  {1, 2} = {2, 1} = "2, 1" = "1 or 2" = "1 and 2", never one of its elements; 2 \pm 1 = {1, 3}
    letters      for a reference A to J: B = (B) = B. = Option B = "B) 12", but not "B or A" [convention]
    text         all else, matrices and algebra too: equal but for case, spaces, $...$, \text{} and the like
Where no convention [convention] is involved, is_equivalent(a, b) == is_equivalent(b, a).

An empty, missing or unreadable reference never matches. Nothing of an answer is executed. Digits, exponents,
nesting and length are bounded before anything is computed, beyond them the text is compared. Time is linear.
"""

import math
import re
from collections import namedtuple
from fractions import Fraction

MAX_LENGTH, MAX_DEPTH, MAX_ITEMS, MAX_TERMS, MAX_BITS = 1000, 20, 64, 16, 8000

# ---------------------------------------------------------------------------------------------- Extraction

# Without braces a box holds one token, and nothing may be attached to it: of \boxed 12, TeX would box the 1.
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|(\\[A-Za-z]+|[0-9A-Za-z])(?=[$.)\]}*\\]*(?:\s|\Z)))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text
NUMERIC = r"[-+]?[$€£¥]?[-+]?[0-9.][0-9,./]*(?: ?(?:%|\\%|[a-z]+))?\.?"
HASHES = re.compile(rf"(?<!#)####(?!#)[^\S\n]*({NUMERIC}|\(?[A-J]\)?)[^\S\n]*(?=[\n<]|\Z)")
OPTION = re.compile(r"\bcorrect (?:option|choice)(?: is|:)", re.IGNORECASE)
LETTERED = re.compile(r"(?<![\w'(])(?:\(?[A-Ja-j]\)|[A-J][.:](?=[\s*]|\Z))")
PHRASE = re.compile(r"\banswer(?: is|:|\*\*:)[:* ]*+(?:\s*+(?:\\\[|\$\$)\s*\n)?", re.IGNORECASE)
PHRASE_END = re.compile(r"[.;!?](?: |$)|,? (?:because|since|so that|as(?! (?:well|many|much|long)\b))\b")
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])[-−](?:\\?\$)?)?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|"
                    r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?)")


def marked(text: str) -> str | None:
    """What the marker that starts last holds, "" if it is empty or not closed; None if there is no marker."""
    box, tag = max(text.rfind("\\boxed"), text.rfind("\\fbox")), text.rfind("<answer>")
    lines = HASHES.findall(text, max(box, tag, 0)) if "####" in text else []
    if lines:
        return lines[-1]
    if tag > box:
        inside, closed, _ = text[tag + len("<answer>"):].partition("</answer>")
        return inside.strip() if closed else ""
    if box < 0:
        return None
    start, depth = BOX.match(text, box), 0
    if not start or start[1]:
        return start[1] if start else ""
    for brace in BRACE.finditer(text, start.end() - 1):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[start.end():brace.start()].strip()
    return ""


def extract_answer(response: str, strict: bool = False, letter: bool = False) -> str | None:
    """The final answer of a response, as written, or None. strict: only from an explicit marker, best for
    training; letter: it may be the letter of an option."""
    text = response.rsplit("</think>", 1)[-1].split("<think>", 1)[0]
    answer = marked(text)
    if answer is not None or strict:
        return answer or None
    if letter:
        text = OPTION.sub("answer is", text.replace("**", ""))
    *_, phrase = None, *(PHRASE.finditer(text) if "answer" in text.lower() else ())
    if phrase:
        line = text[phrase.end():].lstrip().split("\n", 1)[0]
        return PHRASE_END.split(line, maxsplit=1)[0].replace("** ", " ").strip(" *") or None  # **18** dollars
    if letter:  # no number is a letter; is_equivalent judges "B) 12" by its beginning
        last = text.strip().rsplit("\n", 1)[-1].strip()
        return None if len(LETTERED.findall(text)) > 1 else last if CHOICE.match(last) else text.strip()
    end = max(0, len(text) - 200)  # mostly the end suffices, from a space on, since no number holds one
    numbers = NUMBER.findall(text, text.rfind(" ", 0, end) + 1) or NUMBER.findall(text)
    return numbers[-1] if numbers else None


# ----------------------------------------------------------------------------------------------- Notations

SYNONYMS = dict(re.findall(r"(\S+) (\S+)", r"""
    ½ 1/2 ⅓ 1/3 ⅔ 2/3 ¼ 1/4 ¾ 3/4 ⅕ 1/5 ⅖ 2/5 ⅗ 3/5 ⅘ 4/5 ⅙ 1/6 ⅚ 5/6 ⅛ 1/8 ⅜ 3/8 ⅝ 5/8 ⅞ 7/8 √ sqrt π \pi
    ∞ \infty ± \pm ∪ \cup ∈ \in ≤ \le ≥ \ge ≠ \ne ｛ \{ ｝ \} ＄ \$ \dfrac \frac \tfrac \frac \cfrac \frac
    \lbrace \{ \rbrace \} \leq \le \geq \ge \neq \ne \cdot * \times * \div / \degree ° \% %"""))
CHARACTERS = str.maketrans({
    **{character: f" {name} " for character, name in SYNONYMS.items() if len(character) == 1},
    **dict(zip("−－＋＝×·⋅∗÷⁄，．（）［］％º０１２３４５６７８９", "--+=****//,.()[]%°0123456789")),
    **dict.fromkeys("\u00a0\u2009\u202f", "\\,"), "\u3000": " "})  # no-break and thin spaces as TeX's
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
INSIDE = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # of braces that hold braces, as for \frac{\sqrt{3}}{2}
WRAPPER = rf"\\(?:text|text[a-z]{{2}}|math[a-z]{{2}}|mbox|operatorname|boldsymbol) ?\{{({INSIDE})\}}"

# Applied from the first to the last. Synonyms come before rules that know one of them, wrappers before what
# they may hold, a thin space in a number before it is a space, and white space last, since others leave it.
RULES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?", ""),  # \right. shows no bracket
    (r"\\(?:[a-z]+|%)", lambda match: SYNONYMS.get(match[0], match[0])),
    (WRAPPER, r" \1 "),  # 5\text{cm} is 5 cm
    (WRAPPER, r" \1 "),  # a wrapper in a wrapper
    (r"\\frac ?([0-9]) ?([0-9])(?!\.?[0-9])", r"\\frac{\1}{\2}"),
    (r"\{,\}", ","),  # 1{,}000
    (r"\\! ?", ""),  # 12,\! 500: a space of negative width
    (r"(?<![0-9.,])[0-9]{1,3}(?:\\,[0-9]{3})+(?![0-9/]|\\,[0-9])", lambda match: match[0].replace("\\,", "")),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),  # \\ is no space: it ends a row
    (r"\+ ?(?=\\infty)", ""),
    (r"(?<!\\)\\[][()]", ""),  # \( and \[ enclose mathematics
    (r"\^ ?\{? ?\\circ ?\}?", "°"),
    (r"\s+", " ")]]


def normalize(text: str) -> str:
    """The answer without what does not count, its notations made one."""
    if re.fullmatch(r"[-+0-9/,]+(?:\.[0-9]+)?%?", text):  # as it is
        return text
    text = text.translate(CHARACTERS)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    if text.replace("\\$", "").count("$") % 2 == 0:  # pairs enclose mathematics, one is a currency
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip(" *`\"'").removesuffix(".").strip()


# ------------------------------------------------------------------------------------------------- Answers

Number = namedtuple("Number", "value unit")  # a Value; "" if there is no unit
Tuple = namedtuple("Tuple", "brackets items")  # "[)" are the brackets of an interval
Set = namedtuple("Set", "items")
Named = namedtuple("Named", "name answer")  # x and 5 of x = 5
Text = namedtuple("Text", "text")
Answer = Number | Tuple | Set | Named | Text


def equal(a: Answer, b: Answer) -> bool:
    """Whether two parsed answers are the same."""
    if isinstance(a, Named) or isinstance(b, Named):
        same_name = type(a) is not type(b) or a.name == b.name
        return same_name and equal(*(x.answer if isinstance(x, Named) else x for x in (a, b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, Number):
        x, y = (number.value * PERCENT if number.unit == "%" else number.value for number in (a, b))
        return a == b or (not a.unit or not b.unit) and (a.value == b.value or x == y)
    if isinstance(a, Tuple):
        return a.brackets == b.brackets and len(a.items) == len(b.items) and all(map(equal, a.items, b.items))
    if isinstance(a, Set):  # each pair is compared once, lest time double with each level
        table = [[equal(x, y) for y in b.items] for x in a.items]
        return all(map(any, table)) and all(map(any, zip(*table)))
    return a == b


UNITS = {alias: aliases.split()[0] for aliases in r"""$ \$ dollar dollars usd; € euro euros eur; ¥ yen;
    £ pound pounds gbp; ¢ cent cents; % percent; ° degree degrees; °C celsius; °F fahrenheit; in inch inches;
    mm millimeter millimeters; cm centimeter centimeters; m meter meters metre metres; mi mile miles; mph;
    m/s; km kilometer kilometers; km/h kmh; ft foot feet; yd yard yards; mg milligram milligrams;
    g gram grams; lb lbs; kg kilogram kilograms; oz ounce ounces; ml mL milliliter milliliters;
    l L liter liters litre litres; s sec second seconds; min minute minutes; h hr hour hours; day days;
    week weeks; month months; year years; unit units; point points""".split(";") for alias in aliases.split()}
CURRENCY = re.compile(r"\A([-+]?) ?(\\?\$|[€£¥]) ?(.+)")
MEASURE = re.compile(r"""(?P<number> .*?[0-9)}.\ ]) (?:(?P<power> square|cubic|sq)\ )?
    (?P<unit> \\?\$ | [€£¥%¢] | °[CF]? | [A-Za-z]{2,}(?:/[a-z])? | [A-Za-z]/[a-z] | (?<=\ )[A-Za-z])\.?
    (?:\ ?\^\{?(?P<exponent> [23])\}?)?""", re.VERBOSE)  # a single letter follows a space: 5m is algebra
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
VARIABLE = r"(?:[A-Za-z]|\\(?!(?:frac|sqrt|pi)\b)[a-z]+)(?:_\{?[A-Za-z0-9]+\}?)?"  # a value is no name
ARGUMENT = r"\((?:[A-Za-z]|(?:\\frac|\\sqrt|\\pi|[-+*/^0-9.,{} ])+)\)"
NAMES = rf"{VARIABLE}(?:{ARGUMENT})?|[A-Z]{{2}}|\((?:[a-z], ?)+[a-z]\)"  # x, f(2), AB, (x, y)
NAME = re.compile(rf"({NAMES}) ?(?:=|\\in(?![a-z])) ?(?=[^ =])")
BRACKET = r"(?P<open>\\?[(\[{])|(?P<close>\\?[)\]}])"
CUP, PLUS_MINUS = re.compile(rf"{BRACKET}|\\cup(?![a-z])"), re.compile(rf"{BRACKET}|\\pm(?![a-z])")
COMMA = re.compile(rf"{BRACKET}|,(?: and | or )?| (?:and|or) ")
SCRIPT = re.compile(r"([_^]) ?([A-Za-z0-9])(?!\.?[0-9])")  # not x^12: x^{12} to some, x^{1}2 to TeX


def parse(text: str, depth: int = 0) -> Answer:
    """A normalized answer, as the first of the kinds below that it can be read as."""
    if depth > MAX_DEPTH or len(text) > MAX_LENGTH or not text:
        return as_text(text)

    # Before lists and brackets: 1,234 is a number, and so are (7) and {7}; x = 1, 2 is a name of a list.
    if answer := as_number(text) or as_equation(text, depth):
        return answer

    # Before brackets: (1, 2), (3, 4) is a list, though it begins and ends with one.
    flat = ungrouped(text)
    for separator in (CUP, COMMA):
        parts = split(flat, separator)
        if 1 < len(parts) <= MAX_ITEMS and all(parts):
            return Set([parse(part, depth + 1) for part in parts])
    parts = split(flat, PLUS_MINUS)
    if len(parts) == 2 and parts[1]:
        return Set([parse(f"{parts[0]}{sign}({parts[1]})", depth + 1) for sign in "+-"])

    match = re.fullmatch(r"(\\\{|[(\[{])(.*?)(\\?[)\]}])", text, re.DOTALL)
    parts = split(match[2].strip(), COMMA) if match else []
    if 0 < len(parts) <= MAX_ITEMS and (match[1][-1] == "{") == (match[3][-1] == "}"):
        items = [parse(part, depth + 1) for part in parts]
        return Set(items) if match[1][-1] == "{" else Tuple(match[1] + match[3], items)
    return as_text(text)


def as_text(text: str) -> Text:
    """Spaces count only between words, and a single character of an exponent or index has braces."""
    return Text(re.sub(r" ?([^\w\s]) ?", r"\1", SCRIPT.sub(r"\1{\2}", text)).casefold())


def as_number(text: str) -> Number | None:
    text, unit = CURRENCY.sub(r"\1\3 \2", ungrouped(text)), ""  # $5 as 5 $
    measure = MEASURE.fullmatch(text)
    known = measure and (UNITS.get(measure["unit"]) or UNITS.get(measure["unit"].lower()))
    if known:
        power = {None: "", "cubic": "3"}.get(measure["power"], "2")
        text, unit = measure["number"].strip(), known + (measure["exponent"] or power)
    try:
        return Number(Expression(text).value, unit)
    except ValueError:
        return None


def as_equation(text: str, depth: int) -> Answer | None:
    """x = 5 or f(2) = 9: a name and its answer. 2 * 8 = 16: the last side, if all sides are equal numbers."""
    name = NAME.match(text)
    right = text[name.end():] if name else text
    answer = parse(right, depth + 1) if name and "=" not in right else None
    if "=" in right:
        sides = [as_number(side.strip()) for side in right.split("=")]
        answer = sides[-1] if all(sides) and all(equal(side, sides[-1]) for side in sides) else None
    return Named(SCRIPT.sub(r"\1{\2}", name[1].replace(" ", "")), answer) if name and answer else answer


def ungrouped(text: str) -> str:
    """1,234 as 1234, but not among brackets: (1,234) are two numbers."""
    brackets = re.search(r"[(\[]|\\\{", text)
    return text if brackets else GROUPED.sub(lambda match: match[0].replace(",", ""), text)


def split(text: str, separator: re.Pattern) -> list[str]:
    """The parts between separators outside all brackets; none if a bracket closes that none opened."""
    parts, start, depth = [], 0, 0
    for match in separator.finditer(text):
        depth += bool(match["open"]) - bool(match["close"])
        if depth < 0:
            return []
        if depth == 0 and not match["close"]:
            parts.append(text[start:match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


# ---------------------------------------------------------------------------------------- Exact arithmetic

class Value(dict):
    """A sum of terms, {(square-free radicand, power of pi): rational coefficient}, none of them 0, so that
    equal values are equal dicts: 3/2 + 2 sqrt(3) pi is {(1, 0): 3/2, (3, 1): 2}, and 0 is {}."""

    def __init__(self, terms: dict):
        super().__init__({key: x for key, x in terms.items() if x})
        largest = max([max(abs(x.numerator), x.denominator) for x in self.values()], default=0)
        if len(self) > MAX_TERMS or largest.bit_length() > MAX_BITS:
            raise ValueError("too large")

    def __add__(self, other: "Value") -> "Value":
        return Value({key: self.get(key, 0) + other.get(key, 0) for key in self | other})

    def __mul__(self, other: "Value") -> "Value":
        """Term by term: sqrt(r) sqrt(s) = g sqrt(r/g s/g), with g the greatest common divisor of r and s."""
        terms = {}
        for (r, p), x in self.items():
            for (s, q), y in other.items():
                g = math.gcd(r, s)
                key = (r // g) * (s // g), p + q
                terms[key] = terms.get(key, 0) + x * y * g
        return Value(terms)

    def inverse(self) -> "Value":
        """Of two terms, 1 / (x + y) = (x - y) / (x^2 - y^2)."""
        if len(self) != 2:
            return self.raise_to(-1)
        (first, x), (second, y) = self.items()
        conjugate = Value({first: x, second: -y})
        return conjugate * (self * conjugate).raise_to(-1)

    def raise_to(self, n: int) -> "Value":
        """Of one term, (x sqrt(r) pi^p)^n = x^n r^(n // 2) sqrt(r)^(n % 2) pi^(n p). Sums are multiplied."""
        if len(self) == 1:
            ((r, p), x), = self.items()
            if abs(n) * max(abs(x.numerator), x.denominator, r).bit_length() > MAX_BITS:
                raise ValueError("too large")
            return Value({(r if n % 2 else 1, p * n): x**n * Fraction(r) ** (n // 2)})
        if not 1 <= n <= 8:
            raise ValueError("0 to the power 0, 1 / 0, or a power of a sum that would be long")
        return self if n == 1 else self * self.raise_to(n - 1)

    def root(self, degree: int) -> "Value":
        """A rational root; or sqrt(a / b) = sqrt(a b) / b, with the square factors of a b taken out."""
        x = self.rational()
        radicand = x.numerator * x.denominator
        if x < 0 or radicand > 10**15 or degree not in range(2, 7):
            raise ValueError("not real, too large or of another degree")
        guess = Fraction(round(x.numerator ** (1 / degree)), round(x.denominator ** (1 / degree)))
        if guess**degree == x:
            return Value({RATIONAL: guess})
        if degree != 2 or radicand > 10**8:
            raise ValueError("no square root, or its square factors would take long to find")
        outside = next(d for d in range(math.isqrt(radicand), 0, -1) if radicand % d**2 == 0)
        return Value({(radicand // outside**2, 0): Fraction(outside, x.denominator)})

    def rational(self) -> Fraction:
        if self.keys() - {RATIONAL}:
            raise ValueError("irrational")
        return self.get(RATIONAL, Fraction(0))


RATIONAL = (1, 0)  # the key of a rational term
PERCENT = Value({RATIONAL: Fraction(1, 100)})
COMMANDS, CLOSING = ("\\frac", "\\sqrt", "sqrt", "\\pi", "pi"), {"(": ")", "{": "}", "[": "]"}
DIGITS = r"((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)"
TOKEN = re.compile(rf" ?(?:{DIGITS}|(\\[A-Za-z]+|sqrt(?![a-z])|pi(?![a-z])|(?<=sqrt)\[|[-+*/^(){{}}\]]))")
MIXED = re.compile(r"(?<![\w.^/}])([0-9]+) ?((?<= )[0-9]+/[0-9]+(?![\w.])|\\frac ?\{[0-9]+\} ?\{[0-9]+\})")


class Expression:
    """A recursive descent: each method takes the tokens of one level of precedence and gives their value."""

    def __init__(self, text: str):
        text = MIXED.sub(r"(\1+\2)", text)  # 1 3/4 and 1\frac34 are sums
        tokens = [Fraction(digits) if digits else symbol for digits, symbol in TOKEN.findall(text)]
        if TOKEN.sub("", text) or len(re.findall(r"[({^]|frac|sqrt|pi", text)) > 2 * MAX_DEPTH:
            raise ValueError("unknown symbols, or too many that nest")
        self.tokens = ["", *reversed(tokens)]  # "" is the end
        self.value = self.sum()
        if self.tokens != [""]:
            raise ValueError("not one expression")

    def take(self, *expected: str) -> str:
        return self.tokens.pop() if self.tokens[-1] in expected else ""

    def sum(self) -> Value:
        value = self.product()
        while self.tokens[-1] in ("+", "-"):
            value += self.product()  # with its sign
        return value

    def product(self) -> Value:
        value = self.power()
        while self.tokens[-1] in ("*", "/", *CLOSING, *COMMANDS):
            operator = self.take("*", "/")  # or none, as in 2(3) and 3\pi
            factor = self.power()
            value *= factor.inverse() if operator == "/" else factor
        return value

    def power(self) -> Value:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.atom()
        if self.take("^"):
            exponent = self.power().rational()
            value = value.root(exponent.denominator) if exponent.denominator > 1 else value
            value = value.raise_to(exponent.numerator)
        return Value({key: -x for key, x in value.items()}) if negative else value

    def atom(self) -> Value:
        token = self.tokens.pop()
        if isinstance(token, Fraction):
            return Value({RATIONAL: token})
        if token in CLOSING:
            value = self.sum()
            if self.take(CLOSING[token]):
                return value
        if token in ("\\pi", "pi"):
            return Value({(1, 1): Fraction(1)})
        if token == "\\frac":
            return self.argument() * self.argument().inverse()
        if token in ("\\sqrt", "sqrt"):
            degree = self.atom().rational() if self.tokens[-1] == "[" else 2
            return (self.argument() if token == "\\sqrt" else self.atom()).root(degree)
        raise ValueError(f"{token} out of place")

    def argument(self) -> Value:
        """What a command takes: braces, a command or a single digit; TeX reads \\sqrt12 as \\sqrt{1}2."""
        if isinstance(self.tokens[-1], Fraction) and self.tokens[-1] not in range(10):
            raise ValueError("several digits")
        return self.atom()


# ------------------------------------------------------------------------------------------------ Verdicts

LETTER = re.compile(r"\(?([A-Ja-j])\)?")
CHOICE = re.compile(r"""  # but "(A) or (B)" is no choice
    (?:(?:[Oo]ption|[Cc]hoice)\ )?\(?([A-Ja-j])(?:\)\.?|[.:](?=\ |$)|$)
    (?!\W*(?:(?:or|and)\W+)?(?:\([A-Ja-j]\)|[A-J](?:[).:]|$)))""", re.VERBOSE)
NO_NOUNS = """one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty
    fifty sixty seventy eighty ninety hundred thousand million billion trillion lakh crore pair couple dozen
    score gross half halve third quarter fourth fifth sixth seventh eighth ninth tenth twelfth hundredth
    thousandth about approximately around above below over under and but nor not than till until per percent
    percentage fewer less least more most maximum minimum almost nearly roughly maybe perhaps possibly
    probably false wrong doubled invalid incorrect negative plus minus time divided mod root power square
    cubed squared factorial repeating recurring remainder base binary hexadecimal bce theta sin cos log sqrt
    tan""".split()
NOUN = rf"(?!(?:{'|'.join(NO_NOUNS)})s?\b)[a-z]{{3,}}"  # not 5 xy, 5 pm
COUNTED = re.compile(rf"""([-+]?(?:\\?\$)?[0-9.,/ ]* (?:\\frac\ ?\{{[0-9]+\}}\ ?\{{[0-9]+\}})?)
    (?:\ {NOUN})? (?:\ per\ {NOUN})?""", re.VERBOSE | re.IGNORECASE)


def readable(reference) -> str:
    """A reference, or a list of them, as text; "" if nothing equals it: None, NaN, empty text, a marker empty
    or not closed."""
    if isinstance(reference, (list, tuple)):
        return ", ".join(map(readable, reference))
    if isinstance(reference, (int, float)):
        return str(reference) if abs(reference) < 2**MAX_BITS else ""
    inside = marked(reference) if isinstance(reference, str) else ""
    return (reference if inside is None else inside).strip()


def is_equivalent(answer: str, reference: str | int | float) -> bool:
    """Whether two answers are the same, by the rules at the top of this file. Never raises."""
    answer, reference = readable(answer), readable(reference)
    if answer and answer.replace("\\,", " ") == reference.replace("\\,", " "):  # whatever it means
        return True
    if max(len(answer), len(reference)) > 10 * MAX_LENGTH:
        return answer.casefold().split() == reference.casefold().split()
    answer, reference = normalize(answer), normalize(reference)
    if letter := LETTER.fullmatch(reference):
        chosen = CHOICE.match(answer)
        return bool(chosen) and chosen[1].upper() == letter[1].upper()
    expected, counted = parse(reference), COUNTED.fullmatch(answer)
    if counted and isinstance(expected, Number) and not expected.unit:
        answer = counted[1]
    return answer != "" and equal(parse(answer), expected)


def verify(response: str, reference: str | int | float) -> bool:
    """Whether the response's final answer is the reference, which may be a whole solution. Never raises."""
    letter = bool(LETTER.fullmatch(normalize(readable(reference)[:40])))
    return isinstance(response, str) and is_equivalent(extract_answer(response, letter=letter), reference)


def compute_score(data_source, solution_str: str, ground_truth, extra_info=None, **kwargs) -> float:
    """The reward as verl calls it."""
    return float(verify(solution_str, ground_truth))


def reward_func(completions, answer=None, solution=None, ground_truth=None, **kwargs) -> list[float | None]:
    """The reward as TRL calls it, for completions that are strings or lists of messages. The reference is in
    the first of these columns that is there. None, and so skipped by TRL, where it cannot be read."""
    references = next(x for x in (answer, solution, ground_truth, [None] * len(completions)) if x is not None)
    texts = [item if isinstance(item, str) else item[-1]["content"] if item else "" for item in completions]
    return [float(verify(*pair)) if readable(pair[1]) else None for pair in zip(texts, references)]
