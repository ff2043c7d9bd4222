r"""A verifiable reward: does a response give the reference answer?  Standard library only; works when copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

Extraction. Text before the last </think> does not count. Of a \boxed{} or \fbox{}, an <answer></answer> pair and a numeric
line "#### 18", the one that starts last decides; if it is empty or never closed there is no answer, and nothing falls back to
an earlier one. Without such a marker, and unless strict: what follows the last "answer is" or "answer:", else the last number.

Equivalence looks at the whole answer and is exact: rationals of any size, no floats, no tolerance.
    numbers       1,234.50 = 1234.5     -3/4 = \frac{-3}{4} = -0.75     1 3/4 = 1\frac34 = 7/4     1.5e3 = 1.5 \times 10^3
                  0.333 is not 1/3; 1,23 is a list of two
    expressions   + - * / ^ of numbers, square roots and pi: \frac{1}{\sqrt{2}} = \frac{\sqrt{2}}{2}, 2(3) = 6, 2^{10} = 1024
    percent       50% = 0.5 by value, and the sign may be missing: 50% = 50 [convention]
    units         $ EUR cm kg hours degrees ... may be missing on one side; 5 cm is not 5 m, nor 0.05 m [convention]
    names         x = 5 is 5, but not y = 5; likewise x \in [0, 1]
    tuples        (1, 2) in order; intervals [0, 1) with their brackets; unions of intervals in any order
    sets, lists   {1, 2} = {2, 1} = "2, 1" = "1 or 2" = "1 and 2", never one of its elements; 2 \pm 1 = {1, 3}
    letters       if the reference is a letter A to J: B = (B) = B. = "B) because ..." [convention]
    text          all else, matrices and algebra too: equal but for case, spaces, $...$, \text{}, \left, a full stop and the like
Where no convention [convention] is involved, is_equivalent(a, b) == is_equivalent(b, a).

An empty, missing or unreadable reference never matches. Nothing of an answer is ever executed; digits, exponents, nesting and
length are bounded before anything is computed, and beyond the bounds the text is compared. Time is linear in the input.
"""

import math
import re
from fractions import Fraction

MAX_LENGTH, MAX_DEPTH, MAX_ITEMS, MAX_TERMS, MAX_BITS = 1000, 20, 64, 16, 8000

# ----------------------------------------------------------------------------------------------------------- Extraction

BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text
HASHES = re.compile(r"(?<!#)####(?!#)([^\n<]*)")
NUMERIC_LINE = re.compile(r"[-+]?[$€£¥]?[-+]?[0-9.][0-9,./]*(?: ?(?:%|\\%|[a-z]+))?\.?")
PHRASE = re.compile(r"\banswer(?: is|:|\*\*:)[:* ]*", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])[-−])?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?")


def marked(text: str) -> str | None:
    """What the explicit marker that starts last holds, "" if it is empty or not closed; None if there is no marker."""
    box, tag = max(text.rfind("\\boxed"), text.rfind("\\fbox")), text.rfind("<answer>")
    hashes = HASHES.finditer(text, max(box, tag, 0)) if "####" in text else ()
    lines = [match for match in hashes if NUMERIC_LINE.fullmatch(match[1].strip())]
    if lines:
        return lines[-1][1].strip()
    if tag > box:
        inside, closed, _ = text[tag + len("<answer>"):].partition("</answer>")
        return inside.strip() if closed else ""
    if box < 0:
        return None
    start, depth = text.find("{", box), 0
    if text[box:start].strip() not in ("\\boxed", "\\fbox"):
        return ""
    for match in BRACE.finditer(text, start):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[start + 1:match.start()].strip()
        if depth > MAX_LENGTH:
            break
    return ""


def extract_answer(response: str, strict: bool = False) -> str | None:
    """The final answer of a response, as written, or None. strict: only from an explicit marker, best for training."""
    text = response.rsplit("</think>", 1)[-1]
    answer = marked(text)
    if answer is not None or strict:
        return answer or None
    *_, phrase = None, *(PHRASE.finditer(text) if "answer" in text.lower() else ())
    if phrase:
        line = text[phrase.end():].lstrip().split("\n", 1)[0]
        return re.split(r"[.;!?](?: |$)", line, maxsplit=1)[0].strip(" *") or None
    end = max(0, len(text) - 200)  # mostly the end suffices, from a space on, since no number holds one
    numbers = NUMBER.findall(text, text.rfind(" ", 0, end) + 1) or NUMBER.findall(text)
    return numbers[-1] if numbers else None


# -------------------------------------------------------------------------------------------------------------- Reading

CHARACTERS = str.maketrans({
    "−": "-", "－": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "⁄": "/", "＋": "+", "＝": "=", "，": ",", "．": ".",
    "（": "(", "）": ")", "［": "[", "］": "]", "｛": "\\{", "｝": "\\}", "％": "%", "＄": "\\$", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ", "\u3000": " ", "π": "\\pi ", "∞": "\\infty ", "√": "sqrt ", "±": "\\pm ", "∪": "\\cup ", "∈": "\\in ",
    "º": "°", **dict(zip("０１２３４５６７８９", "0123456789")),
    **{char: f" {top}/{bottom}" for char, top, bottom in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888")}})
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-"))
SPELLINGS = [(re.compile(pattern), plain) for pattern, plain in [
    ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + "".join(SUPERSCRIPTS[char] for char in match[0]) + "}"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?", ""),
    (r"\\(?:text|text[a-z]{2}|math[a-z]{2}|mbox|operatorname|boldsymbol) ?\{([^{}]*)\}", r" \1 "), (r"\{,\}", ","), (r"\\!", ""), (r"\+ ?(?=\\infty)", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "), (r"(?<!\\)\\[][()]", ""), (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"), (r"\^ ?\{? ?\\circ ?\}?|\\degree(?![A-Za-z])", "°"), (r"\\%", "%"), (r"\s+", " ")]]
PLAIN = re.compile(r"[-+0-9/,]+(?:\.[0-9]+)?%?")
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
NAME = re.compile(r"([A-Za-z]|\\[a-z]+)(_\{?[A-Za-z0-9]+\}?)?(\([a-z]\))? ?(?:=|\\in(?![a-z])) ?(?=[^ =])")
LETTER = re.compile(r"\(?([A-Ja-j])(?:\)\.?|[.:](?= |$)|$)")
UNITS = {alias: unit for unit, aliases in {
    "$": "$ \\$ dollar dollars usd", "€": "€ euro euros eur", "£": "£ pound pounds gbp", "¥": "¥ yen", "¢": "¢ cent cents",
    "%": "% percent", "°": "° degree degrees", "°C": "°C celsius", "°F": "°F fahrenheit", "mm": "mm millimeter millimeters",
    "cm": "cm centimeter centimeters", "m": "m meter meters metre metres", "km": "km kilometer kilometers", "in": "in inch inches",
    "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles", "mg": "mg milligram milligrams", "g": "g gram grams",
    "kg": "kg kilogram kilograms", "lb": "lb lbs", "oz": "oz ounce ounces", "ml": "ml mL milliliter milliliters",
    "l": "l L liter liters litre litres", "s": "s sec second seconds", "min": "min minute minutes", "h": "h hr hour hours",
    "day": "day days", "week": "week weeks", "month": "month months", "year": "year years", "mph": "mph", "km/h": "km/h kmh",
    "m/s": "m/s", "unit": "unit units", "point": "point points"}.items() for alias in aliases.split()}
PREFIX = re.compile(r"([-+]?) ?(\\?\$|[€£¥]) ?(.+)")
SUFFIX = re.compile(r"(.*?[0-9)}. ])((?:(?:square|cubic|sq) )?(?:\\?\$|[€£¥%¢]|°[CF]?|[a-zA-Z]+(?:/[a-z])?))\.?(?: ?\^\{?([23])\}?)?")


class Unreadable(Exception):
    """The text is not an expression of the kind that is compared by value."""


def tidy(text: str) -> str:
    """The answer without what does not count, its notations made one."""
    if PLAIN.fullmatch(text):
        return text
    text = text.translate(CHARACTERS)
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    if text.replace("\\$", "").count("$") % 2 == 0:  # in pairs they enclose mathematics, alone it is a currency
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip(" *`\"'").removesuffix(".").strip()


def split(text: str, separators: re.Pattern) -> list[str]:
    """The parts of a text between separators that stand outside all brackets; none if a bracket closes that none opened."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"\\?[(\[{{]|\\?[)\]}}]|{separators.pattern}", text):
        depth += (match[0][-1] in "([{") - (match[0][-1] in ")]}")
        if depth < 0:
            return []
        if depth == 0 and match[0][-1] not in ")]}":
            parts.append(text[start:match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


CUP, PM, COMMA = re.compile(r"\\cup(?![a-z])"), re.compile(r"\\pm(?![a-z])"), re.compile(r",(?: and | or )?| (?:and|or) ")
BRACKETS = re.compile(r"(\\\{|[(\[{])(.*?)(\\?[)\]}])", re.DOTALL)


def read(text: str, depth: int = 0) -> tuple:
    """A tidy answer as ("number", value, unit), ("tuple", brackets, items), ("set", items), ("named", name, answer), ("text", text)."""
    if depth > MAX_DEPTH or len(text) > MAX_LENGTH or not text:
        return as_text(text)
    name = NAME.match(text)
    if name and "=" not in text[name.end():]:
        return "named", name[0].replace(" ", "").rstrip("=").removesuffix("\\in"), read(text[name.end():], depth + 1)
    flat = text if re.search(r"[(\[]|\\\{", text) else GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    stem, unit = split_unit(flat)
    try:
        return "number", value_of(stem), unit
    except Unreadable:
        pass  # not a number, so one of the kinds below
    for separators in (CUP, COMMA):
        parts = split(flat, separators)
        if 1 < len(parts) <= MAX_ITEMS and all(parts):
            return "set", [read(part, depth + 1) for part in parts]
    parts = split(flat, PM)
    if len(parts) == 2 and parts[1]:
        return "set", [read(f"{parts[0]}{sign}({parts[1]})", depth + 1) for sign in "+-"]
    match = BRACKETS.fullmatch(text)
    parts = split(match[2].strip(), COMMA) if match else []
    if 0 < len(parts) <= MAX_ITEMS and (match[1][-1] == "{") == (match[3][-1] == "}"):
        items = [read(part, depth + 1) for part in parts]
        return ("set", items) if match[1][-1] == "{" else ("tuple", match[1] + match[3], items)
    return as_text(text)


def as_text(text: str) -> tuple[str, str]:
    return "text", re.sub(r" ?([^\w\s]) ?", r"\1", text).casefold()  # spaces count only between words


def split_unit(text: str) -> tuple[str, str]:
    """A text without its unit, and the unit ("" if none that is known). A unit of one letter needs a space: 5m may be algebra."""
    prefix, suffix = PREFIX.fullmatch(text), SUFFIX.fullmatch(text)
    if prefix:
        return prefix[1] + prefix[3], UNITS[prefix[2]]
    if suffix:
        *kind, word = suffix[2].split()
        power = suffix[3] or {"cubic": "3", "square": "2", "sq": "2"}.get("".join(kind), "")
        word = word if word in UNITS else word.lower()
        if word in UNITS and not (len(word) == 1 and word.isalpha() and suffix[1][-1] != " "):
            return suffix[1].strip(), UNITS[word] + power
    return text, ""


# ------------------------------------------------------------------------------------------------------ Exact arithmetic
# A value is a sum of terms, {(square-free radicand, power of pi): rational coefficient}, so that equal values are equal dicts.

MIXED = re.compile(r"(?<![\w.^/}])([0-9]+)(?: ([0-9]+/[0-9]+)(?![\w.])| ?(\\frac ?(?:\{[0-9]+\} ?\{[0-9]+\}|[0-9] ?[0-9])))")
TOKEN = re.compile(r" ?(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([-+]?[0-9]+))?|(\\[A-Za-z]+|sqrt(?![a-z])|pi(?![a-z])|[-+*/^(){}\[\]]))")
COMMANDS, ONE = ("\\frac", "\\sqrt", "sqrt", "\\pi", "pi"), (1, 0)


def value_of(text: str) -> dict:
    """The exact value of an expression. Raises Unreadable."""
    text = MIXED.sub(lambda match: f"({match[1]}+{match[2] or match[3]})", text)  # 1 3/4 and 1\frac34 are sums
    tokens = [(number or symbol, number and (exponent or "0")) for number, exponent, symbol in TOKEN.findall(text)]
    if TOKEN.sub("", text) or sum(symbol in ("(", "{", "^", *COMMANDS) for symbol, _ in tokens) > 2 * MAX_DEPTH:
        raise Unreadable
    reader = Expression(tokens)
    value = reader.sum()
    if reader.tokens:
        raise Unreadable
    return value


class Expression:
    """A recursive descent over tokens: (digits, exponent) or (symbol, "")."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens = tokens[::-1]

    def next(self) -> str:
        return self.tokens[-1][0] if self.tokens else ""

    def take(self, expected: str | None = None) -> tuple[str, str]:
        if not self.tokens or expected and self.next() != expected:
            raise Unreadable
        return self.tokens.pop()

    def sum(self) -> dict:
        value = self.product()
        while self.next() in ("+", "-"):
            sign = -1 if self.take()[0] == "-" else 1
            value = add(value, scale(self.product(), sign))
        return value

    def product(self) -> dict:
        value = self.signed()
        while self.next() in ("*", "/", "(", "{", *COMMANDS):
            if self.next() not in ("*", "/"):
                value = multiply(value, self.power())  # implied, as in 2(3) or 3\pi
            elif self.take()[0] == "*":
                value = multiply(value, self.signed())
            else:
                value = multiply(value, inverse(self.signed()))
        return value

    def signed(self) -> dict:
        sign = 1
        while self.next() in ("+", "-"):
            sign = -sign if self.take()[0] == "-" else sign
        return scale(self.power(), sign)

    def power(self) -> dict:
        base = self.atom()
        if self.next() != "^":
            return base
        self.take()
        exponent = self.signed()
        if set(exponent) - {ONE}:
            raise Unreadable
        return raise_to(base, exponent.get(ONE, Fraction(0)))

    def atom(self) -> dict:
        symbol, exponent = self.take()
        if exponent:
            return number(symbol, exponent)
        if symbol in ("\\pi", "pi"):
            return {(1, 1): Fraction(1)}
        if symbol == "\\frac":
            top = self.argument()
            return multiply(top, inverse(self.argument()))
        if symbol in ("\\sqrt", "sqrt"):
            degree = "2"
            if self.next() == "[":
                _, (degree, _), _ = self.take(), self.take(), self.take("]")
            if degree not in ("2", "3", "4", "5", "6"):
                raise Unreadable
            return raise_to(self.argument() if symbol == "\\sqrt" else self.atom(), Fraction(1, int(degree)))
        if symbol in ("(", "{"):
            value = self.sum()
            self.take(")" if symbol == "(" else "}")
            return value
        raise Unreadable

    def argument(self) -> dict:
        """What a command takes: braces, or the next atom; of a number without braces, its next digit, as in \\frac34."""
        digits, exponent = self.tokens[-1] if self.tokens else ("", "")
        if exponent == "0" and digits.isdecimal() and len(digits) > 1:
            self.tokens[-1] = digits[1:], "0"
            return number(digits[0], "0")
        return self.atom()


def number(digits: str, exponent: str) -> dict:
    if len(exponent) > 4 or abs(int(exponent)) * 4 > MAX_BITS:
        raise Unreadable
    return bounded({ONE: Fraction(digits.removesuffix(".")) * Fraction(10) ** int(exponent)})


def bounded(value: dict) -> dict:
    """Without terms of 0. Raises Unreadable beyond the bounds."""
    value = {key: x for key, x in value.items() if x}
    if len(value) > MAX_TERMS or any(max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS for x in value.values()):
        raise Unreadable
    return value


def scale(a: dict, factor: int | Fraction) -> dict:
    return {key: x * factor for key, x in a.items()}


def add(a: dict, b: dict) -> dict:
    return bounded({key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}})


def multiply(a: dict, b: dict) -> dict:
    product = {}
    for (r, p), x in a.items():
        for (s, q), y in b.items():
            common = math.gcd(r, s)  # sqrt(r) * sqrt(s) = common * sqrt(r / common * s / common)
            key = r // common * (s // common), p + q
            product[key] = product.get(key, 0) + x * y * common
    return bounded(product)


def inverse(a: dict) -> dict:
    if len(a) == 2:  # 1 / (x + y) = (x - y) / (x^2 - y^2)
        (x, first), (y, second) = a.items()
        conjugate = {x: first, y: -second}
        return multiply(conjugate, raise_to(multiply(a, conjugate), Fraction(-1)))
    return raise_to(a, Fraction(-1))


def raise_to(base: dict, exponent: Fraction) -> dict:
    n, degree = exponent.numerator, exponent.denominator
    base = root(base, degree) if degree > 1 else base
    if len(base) == 1:
        ((r, p), x), = base.items()
        if abs(n) * max(x.numerator.bit_length(), x.denominator.bit_length(), r.bit_length()) > MAX_BITS:
            raise Unreadable
        return bounded({(r if n % 2 else 1, p * n): x**n * Fraction(r) ** (n // 2)})
    if not 1 <= n <= 8:  # 0 to the power 0, 1 / 0, and sums whose powers would be long
        raise Unreadable
    return base if n == 1 else multiply(base, raise_to(base, exponent - 1))


def root(base: dict, degree: int) -> dict:
    """The root of a moderate rational: a rational, or a square root with its square factors taken out."""
    x = base.get(ONE, Fraction(0))
    rest = x.numerator * x.denominator  # sqrt(a / b) = sqrt(a * b) / b
    if len(base) > 1 or base and rest <= 0 or rest > 10**15 or degree > 6:
        raise Unreadable
    whole = Fraction(round(x.numerator ** (1 / degree)), round(x.denominator ** (1 / degree)))
    if whole**degree == x:
        return {ONE: whole} if base else base
    if degree != 2 or rest > 10**8:
        raise Unreadable
    outside = next(d for d in range(math.isqrt(rest), 0, -1) if rest % d**2 == 0)
    return {(rest // outside**2, 0): Fraction(outside, x.denominator)}


# ----------------------------------------------------------------------------------------------------------- Comparison


def same(a: tuple, b: tuple) -> bool:
    """Whether two answers as read are the same."""
    if a[0] == "named" or b[0] == "named":
        if a[0] == b[0] and a[1] != b[1]:
            return False
        return same(a[2] if a[0] == "named" else a, b[2] if b[0] == "named" else b)
    if a[0] != b[0]:
        return False
    if a[0] == "number":
        (_, x, unit), (_, y, other) = a, b
        if unit and other and unit != other:
            return False
        share = {"%": Fraction(1, 100)}
        return x == y or unit != other and scale(x, share.get(unit, 1)) == scale(y, share.get(other, 1))
    if a[0] == "tuple":
        return a[1] == b[1] and len(a[2]) == len(b[2]) and all(map(same, a[2], b[2]))
    if a[0] == "set":
        return all(any(same(x, y) for y in b[1]) for x in a[1]) and all(any(same(x, y) for x in a[1]) for y in b[1])
    return a == b


def readable(reference) -> str:
    """A reference as text; "" for one that cannot be compared with: empty, None, NaN, a marker that is empty or not closed."""
    if isinstance(reference, int) and reference.bit_length() <= MAX_BITS or isinstance(reference, float) and math.isfinite(reference):
        return str(reference)
    if not isinstance(reference, str):
        return ""
    inside = marked(reference)
    return (reference if inside is None else inside).strip()


def is_equivalent(answer: str, reference: str | int | float) -> bool:
    """Whether two answers are the same, by the rules at the top of this file. Never raises."""
    answer, reference = readable(answer), readable(reference)
    if not answer or not reference:
        return False
    if max(len(answer), len(reference)) > 10 * MAX_LENGTH:
        return answer.casefold().split() == reference.casefold().split()
    answer, reference = tidy(answer), tidy(reference)
    letter = re.fullmatch(r"\(?([A-Ja-j])\)?", reference)
    if letter:
        chosen = LETTER.match(answer)
        return bool(chosen) and chosen[1].upper() == letter[1].upper()
    return bool(answer and reference) and same(read(answer), read(reference))


def verify(response: str, reference: str | int | float) -> bool:
    """Whether the response's final answer is the reference, which may be a whole solution with a marker. Never raises."""
    return isinstance(response, str) and is_equivalent(extract_answer(response), reference)


# ------------------------------------------------------------------------------------------------------------- Adapters


def compute_score(data_source, solution_str: str, ground_truth, extra_info=None, **kwargs) -> float:
    """The reward as verl calls it."""
    return float(verify(solution_str, ground_truth))


def reward_func(completions, answer=None, solution=None, ground_truth=None, **kwargs) -> list[float | None]:
    """The reward as TRL calls it, for completions that are strings or lists of messages. None, and so skipped by TRL, where the
    reference of the first of these columns that is there cannot be read."""
    column = next((column for column in (answer, solution, ground_truth) if column is not None), [None] * len(completions))
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] if completion else "" for completion in completions]
    return [float(verify(text, reference)) if readable(reference) else None for text, reference in zip(texts, column)]
