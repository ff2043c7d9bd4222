r"""A verifiable reward: does a response give the reference answer?  Standard library only, works when copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

Extraction. Text before the last </think> does not count. Of a \boxed{} or \fbox{}, an <answer></answer> pair and
a numeric line "#### 18", the one that starts last decides; if it is empty or never closed there is no answer, and
nothing falls back to an earlier one. Without such a marker, and unless strict, the first of these: if the
reference is a letter, one that is the whole response or ends it as in "the correct option is (B)"; what follows
the last "answer is" or "answer:", up to a full stop, because, since, as or so that; the last number.

Equivalence looks at the whole answer and is exact: rationals of any size, no floats, no tolerance.
    numbers      1,234.50 = 1\,234.5     -3/4 = \frac{-3}{4} = -0.75     1 3/4 = 1\frac34 = 7/4
                 1.5e3 = 1.5 \times 10^3     0.333 is not 1/3, 1 234 is not 1234, 1,23 is a list of two
    expressions  + - * / ^ of numbers, square roots and pi: \frac{1}{\sqrt{2}} = \frac{\sqrt{2}}{2}, 2(3) = 6
    percent      50% = 0.5 by value, and the sign may be missing: 50% = 50 [convention]
    units        $ EUR cm kg hours ... may be missing on one side; 5 cm is not 5 m, nor 0.05 m [convention]
    nouns        12 apples is 12 if the reference is 12; 12 is not 12 apples, 12 dozen is not 12 [convention]
    names        x = 5 is 5, but not y = 5; likewise f(2) = 9 and x \in [0, 1]
    chains       2 \cdot 8 = 16 is 16; 2 \cdot 8 = 15 is not 15, and x = y = 5 is not 5
    tuples       (1, 2) in order; intervals [0, 1) with their brackets; unions of intervals in any order
    sets, lists  {1, 2} = {2, 1} = "2, 1" = "1 or 2" = "1 and 2", never one of its elements; 2 \pm 1 = {1, 3}
    letters      if the reference is a letter A to J: B = (B) = B. = "B) because ..." [convention]
    text         all else, matrices and algebra too: equal but for case, spaces, $...$, \text{}, \left, a full
                 stop and the like; y^{3} = y^3, \leq = \le
Where no convention [convention] is involved, is_equivalent(a, b) == is_equivalent(b, a).

An empty, missing or unreadable reference never matches. Nothing of an answer is ever executed; digits, exponents,
nesting and length are bounded before anything is computed, and beyond the bounds the text is compared. Time is
linear in the input.
"""

import math
import re
from collections import namedtuple
from fractions import Fraction

MAX_LENGTH, MAX_DEPTH, MAX_ITEMS, MAX_TERMS, MAX_BITS = 1000, 20, 64, 16, 8000

# ---------------------------------------------------------------------------------------------- Extraction

# Without braces a box holds one token, if nothing is attached to it: of \boxed 12, TeX would box the 1.
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|(\\[A-Za-z]+|[0-9A-Za-z])(?=[$.)\]}*\\]*(?:\s|\Z)))")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text
HASHES = re.compile(r"(?<!#)####(?!#)([^\n<]*)")
NUMERIC_LINE = re.compile(r"[-+]?[$€£¥]?[-+]?[0-9.][0-9,./]*(?: ?(?:%|\\%|[a-z]+))?\.?")
LONE_LETTER = re.compile(r"[\s*(]*([A-Ja-j])[\s*).]*")
OPTION = re.compile(r"\b[Cc]orrect (?:option|choice) is:?[\s*(]*([A-J])[\s*).]*\Z")  # "is a" may be cut short
PHRASE = re.compile(r"\banswer(?: is|:|\*\*:)[:* ]*", re.IGNORECASE)
PHRASE_END = re.compile(r"[.;!?](?: |$)|,? (?:because|since|as(?! (?:well|many|much|long|soon|if)\b)|so that)\b")
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])[-−])?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?")


def marked(text: str) -> str | None:
    """What the marker that starts last holds, "" if it is empty or not closed; None if there is no marker."""
    box, tag = max(text.rfind("\\boxed"), text.rfind("\\fbox")), text.rfind("<answer>")
    hashes = HASHES.finditer(text, max(box, tag, 0)) if "####" in text else ()
    lines = [match for match in hashes if NUMERIC_LINE.fullmatch(match[1].strip())]
    if lines:
        return lines[-1][1].strip()
    if tag > box:
        inside, closed, _ = text[tag + len("<answer>"):].partition("</answer>")
        return inside.strip() if closed else ""
    return boxed(text, box) if box >= 0 else None


def boxed(text: str, start: int) -> str:
    """What the box that starts there holds, "" if it is not closed."""
    box, depth = BOX.match(text, start), 0
    if not box or box[1]:
        return box[1] if box else ""
    for brace in BRACE.finditer(text, box.end() - 1):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[box.end():brace.start()].strip()
        if depth > MAX_LENGTH:
            break
    return ""


def extract_answer(response: str, strict: bool = False, letter: bool = False) -> str | None:
    """The final answer of a response, as written, or None.
    strict: only from an explicit marker, best for training; letter: the reference is the letter of an option."""
    text = response.rsplit("</think>", 1)[-1]
    answer = marked(text)
    if answer is not None or strict:
        return answer or None
    option = (LONE_LETTER.fullmatch(text) or OPTION.search(text)) if letter else None
    if option:
        return option[1]
    *_, phrase = None, *(PHRASE.finditer(text) if "answer" in text.lower() else ())
    if phrase:
        line = text[phrase.end():].lstrip().split("\n", 1)[0]
        return PHRASE_END.split(line, maxsplit=1)[0].strip(" *") or None
    end = max(0, len(text) - 200)  # mostly the end suffices, from a space on, since no number holds one
    numbers = NUMBER.findall(text, text.rfind(" ", 0, end) + 1) or NUMBER.findall(text)
    return numbers[-1] if numbers else None


# ----------------------------------------------------------------------------------------------- Notations

SYMBOLS = r"""½ 1/2 ⅓ 1/3 ⅔ 2/3 ¼ 1/4 ¾ 3/4 ⅕ 1/5 ⅖ 2/5 ⅗ 3/5 ⅘ 4/5 ⅙ 1/6 ⅚ 5/6 ⅛ 1/8 ⅜ 3/8 ⅝ 5/8 ⅞ 7/8
    √ sqrt π \pi ∞ \infty ± \pm ∪ \cup ∈ \in ≤ \le ≥ \ge ≠ \ne ｛ \{ ｝ \} ＄ \$""".split()
CHARACTERS = str.maketrans({
    **dict(zip("−－＋＝×·⋅∗÷⁄，．（）［］％º０１２３４５６７８９", "--+=****//,.()[]%°0123456789")),
    **{symbol: f" {name} " for symbol, name in zip(SYMBOLS[::2], SYMBOLS[1::2])},
    **dict.fromkeys("\u00a0\u2009\u202f", "\\,"), "\u3000": " "})  # no-break and thin spaces, as TeX's thin one
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
FLAT = r"[^{}]*"  # between braces, where there are no others; then with others, and with others in these
NESTED = rf"{FLAT}(?:\{{{FLAT}\}}{FLAT})*"
DEEPER = rf"{FLAT}(?:\{{{NESTED}\}}{FLAT})*"
WRAPPER = rf"\\(?:text|text[a-z]{{2}}|math[a-z]{{2}}|mbox|operatorname|boldsymbol) ?\{{({DEEPER})\}}"

# Applied from the first to the last. Wrappers come off before what they may hold; a thin space within a number is
# taken out before it would separate, as other spaces do; white space is last, since the others leave it.
RULES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),  # the same in another size
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?", ""),  # \right. shows no bracket
    (WRAPPER, r" \1 "),  # 5\text{cm} is 5 cm
    (WRAPPER, r" \1 "),  # a wrapper in a wrapper
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(le|ge|ne)q?(?![A-Za-z]) ?", r"\\\1 "),  # \leq is \le
    (r"\{,\}", ","),  # 1{,}000
    (r"\\!", ""),  # 12\!500, a space of negative width
    (r"(?<![0-9.,])[0-9]{1,3}(?:\\,[0-9]{3})+(?![0-9/]|\\,[0-9])", lambda match: match[0].replace("\\,", "")),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),  # \\ is no space: it ends a row
    (r"\+ ?(?=\\infty)", ""),
    (r"(?<!\\)\\[][()]", ""),  # \( and \[ enclose mathematics
    (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\^ ?\{? ?\\circ ?\}?|\\degree(?![A-Za-z])", "°"),
    (r"\\%", "%"),
    (r"\s+", " ")]]
PLAIN = re.compile(r"[-+0-9/,]+(?:\.[0-9]+)?%?")


def normalize(text: str) -> str:
    """The answer without what does not count, its notations made one."""
    if PLAIN.fullmatch(text):
        return text
    text = text.translate(CHARACTERS)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    if text.replace("\\$", "").count("$") % 2 == 0:  # in pairs they enclose mathematics, alone it is a currency
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip(" *`\"'").removesuffix(".").strip()


# ----------------------------------------------------------------------------------------- Parsed answers

Number = namedtuple("Number", "value unit")  # a value as under "Exact arithmetic"; "" if there is no unit
Tuple = namedtuple("Tuple", "brackets items")  # brackets: "()", or "[)" of an interval
Set = namedtuple("Set", "items")
Named = namedtuple("Named", "name answer")  # x and 5 of x = 5
Text = namedtuple("Text", "text")
Answer = Number | Tuple | Set | Named | Text


def equal(a: Answer, b: Answer) -> bool:
    """Whether two parsed answers are the same."""
    match a, b:
        case Named(), Named():
            return a.name == b.name and equal(a.answer, b.answer)
        case Named(), _:
            return equal(a.answer, b)
        case _, Named():
            return equal(a, b.answer)
        case Number(), Number():
            if a.unit and b.unit:
                return a == b
            x, y = (add({}, n.value, Fraction(1, 100 if n.unit == "%" else 1)) for n in (a, b))
            return a.value == b.value or x == y
        case Tuple(), Tuple():
            return a.brackets == b.brackets and len(a.items) == len(b.items) and all(map(equal, a.items, b.items))
        case Set(), Set():  # each pair is compared once, lest time double with each level
            table = [[equal(x, y) for y in b.items] for x in a.items]
            return all(map(any, table)) and all(map(any, zip(*table)))
    return type(a) is type(b) and a == b


# ------------------------------------------------------------------------------------------------- Parsing

UNITS = {alias: aliases.split()[0] for aliases in r"""$ \$ dollar dollars usd; € euro euros eur; £ pound pounds gbp;
    ¥ yen; ¢ cent cents; % percent; ° degree degrees; °C celsius; °F fahrenheit; mm millimeter millimeters;
    cm centimeter centimeters; m meter meters metre metres; km kilometer kilometers; in inch inches; ft foot feet;
    yd yard yards; mi mile miles; mg milligram milligrams; g gram grams; kg kilogram kilograms; lb lbs;
    oz ounce ounces; ml mL milliliter milliliters; l L liter liters litre litres; s sec second seconds;
    min minute minutes; h hr hour hours; day days; week weeks; month months; year years; mph; km/h kmh; m/s;
    unit units; point points""".split(";") for alias in aliases.split()}
CURRENCY = re.compile(r"([-+]?) ?(\\?\$|[€£¥]) ?(.+)")
MEASURE = re.compile(r"""
    (?P<number>.*?[0-9)}.\ ])
    (?:(?P<power>square|cubic|sq)\ )?
    (?P<unit>\\?\$ | [€£¥%¢] | °[CF]? | [A-Za-z]{2,}(?:/[a-z])? | [A-Za-z]/[a-z] | (?<=\ )[A-Za-z])\.?
    (?:\ ?\^\{?(?P<exponent>[23])\}?)?""", re.VERBOSE)  # a single letter after a space: 5m is algebra
POWERS = {None: "", "square": "2", "sq": "2", "cubic": "3"}
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
VARIABLE = r"(?:[A-Za-z]|\\(?!(?:frac|sqrt|pi)\b)[a-z]+)(?:_\{?[A-Za-z0-9]+\}?)?"  # what has a value is no name
ARGUMENT = r"\((?:[A-Za-z]|(?:\\frac|\\sqrt|\\pi|[-+*/^0-9.,{} ])+)\)"
NAME = re.compile(rf"({VARIABLE}(?:{ARGUMENT})?) ?(?:=|\\in(?![a-z])) ?(?=[^ =])")
BRACKET = r"(?P<open>\\?[(\[{])|(?P<close>\\?[)\]}])"
CUP, PLUS_MINUS = re.compile(BRACKET + r"|\\cup(?![a-z])"), re.compile(BRACKET + r"|\\pm(?![a-z])")
COMMA = re.compile(BRACKET + r"|,(?: and | or )?| (?:and|or) ")
ENCLOSED = re.compile(r"(\\\{|[(\[{])(.*?)(\\?[)\]}])", re.DOTALL)
SCRIPT = re.compile(r"([_^]) ?([A-Za-z0-9])(?!\.?[0-9])")  # not x^12, which is x^{12} to some and x^{1}2 to TeX


def parse(text: str, depth: int = 0) -> Answer:
    """A normalized answer, as the first of the kinds below that it can be read as."""
    if depth > MAX_DEPTH or len(text) > MAX_LENGTH or not text:
        return as_text(text)

    # Before lists and brackets: 1,234 is a number, and so are (7) and {7}; x = 1, 2 is a name of a list.
    answer = as_number(text) or as_equation(text, depth)
    if answer:
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

    match = ENCLOSED.fullmatch(text)
    parts = split(match[2].strip(), COMMA) if match else []
    if 0 < len(parts) <= MAX_ITEMS and (match[1][-1] == "{") == (match[3][-1] == "}"):
        items = [parse(part, depth + 1) for part in parts]
        return Set(items) if match[1][-1] == "{" else Tuple(match[1] + match[3], items)
    return as_text(text)


def as_text(text: str) -> Text:
    """Spaces count only between words, and a single character of an exponent or index has braces."""
    return Text(re.sub(r" ?([^\w\s]) ?", r"\1", SCRIPT.sub(r"\1{\2}", text)).casefold())


def as_number(text: str) -> Number | None:
    text, unit = ungrouped(text), ""
    currency, measure = CURRENCY.fullmatch(text), MEASURE.fullmatch(text)
    if currency:
        text, unit = currency[1] + currency[3], UNITS[currency[2]]
    elif measure:
        known = UNITS.get(measure["unit"]) or UNITS.get(measure["unit"].lower())
        if known:
            text, unit = measure["number"].strip(), known + (measure["exponent"] or POWERS[measure["power"]])
    try:
        return Number(value_of(text), unit)
    except ValueError:
        return None


def as_equation(text: str, depth: int) -> Answer | None:
    """x = 5 and f(2) = 9: a name and its answer. 2 * 8 = 16: the last side, if all sides are equal numbers."""
    name = NAME.match(text)
    right = text[name.end():] if name else text
    answer = parse(right, depth + 1) if name and "=" not in right else None
    if "=" in right:
        sides = [as_number(side.strip()) for side in right.split("=")]
        answer = sides[-1] if all(sides) and all(equal(side, sides[-1]) for side in sides) else None
    return Named(SCRIPT.sub(r"\1{\2}", name[1].replace(" ", "")), answer) if name and answer else answer


def ungrouped(text: str) -> str:
    """1,234 as 1234, but not among brackets: (1,234) are two numbers."""
    if "," not in text or re.search(r"[(\[]|\\\{", text):
        return text
    return GROUPED.sub(lambda match: match[0].replace(",", ""), text)


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
# A value is a sum of terms, {(square-free radicand, power of pi): rational coefficient}, without terms of 0, so that
# equal values are equal dicts: 3/2 + 2 sqrt(3) pi is {(1, 0): 3/2, (3, 1): 2}, and 0 is {}. Whatever cannot be
# read or would be too large raises ValueError.

RATIONAL = (1, 0)  # sqrt(1) pi^0, the key of a rational term
COMMANDS = ("\\frac", "\\sqrt", "sqrt", "\\pi", "pi")
CLOSING = {"(": ")", "{": "}"}
TOKEN = re.compile(r"""\ ?(?:
    ((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)
    | (\\[A-Za-z]+|sqrt(?![a-z])|pi(?![a-z])|[-+*/^(){}\[\]]))""", re.VERBOSE)
MIXED = re.compile(r"""(?<![\w.^/}])([0-9]+)
    (?:\ ([0-9]+/[0-9]+)(?![\w.]) | \ ?(\\frac\ ?(?:\{[0-9]+\}\ ?\{[0-9]+\}|[0-9]\ ?[0-9])))""", re.VERBOSE)


class Digits(str):
    """A token that is a number; the others are plain strings."""


def value_of(text: str) -> dict:
    """The exact value of an expression."""
    text = MIXED.sub(lambda match: f"({match[1]}+{match[2] or match[3]})", text)  # 1 3/4 and 1\frac34 are sums
    tokens = [Digits(digits) if digits else symbol for digits, symbol in TOKEN.findall(text)]
    if TOKEN.sub("", text) or sum(token in ("^", *CLOSING, *COMMANDS) for token in tokens) > 2 * MAX_DEPTH:
        raise ValueError
    expression = Expression(tokens)
    value = expression.sum()
    if expression.tokens != [""]:
        raise ValueError
    return value


class Expression:
    """A recursive descent: each method takes the tokens of one level of precedence and gives their value."""

    def __init__(self, tokens: list[str]):
        self.tokens = ["", *reversed(tokens)]  # "" is the end

    def take(self, *expected: str) -> str:
        return self.tokens.pop() if self.tokens[-1] in expected else ""

    def sum(self) -> dict:
        value = self.product()
        while sign := self.take("+", "-"):
            value = add(value, self.product(), -1 if sign == "-" else 1)
        return value

    def product(self) -> dict:
        value = self.signed()
        while self.tokens[-1] in ("*", "/", *CLOSING, *COMMANDS):
            if self.take("*"):
                value = multiply(value, self.signed())
            elif self.take("/"):
                value = multiply(value, inverse(self.signed()))
            else:
                value = multiply(value, self.power())  # implied, as in 2(3) or 3\pi
        return value

    def signed(self) -> dict:
        factor = 1
        while sign := self.take("+", "-"):
            factor *= -1 if sign == "-" else 1
        return add({}, self.power(), factor)

    def power(self) -> dict:
        base = self.atom()
        return raise_to(base, rational(self.signed())) if self.take("^") else base

    def atom(self) -> dict:
        token = self.tokens.pop()
        if isinstance(token, Digits):
            return bounded({RATIONAL: Fraction(token)})
        if token in CLOSING:
            value = self.sum()
            if self.take(CLOSING[token]):
                return value
        if token in ("\\pi", "pi"):
            return {(1, 1): Fraction(1)}
        if token == "\\frac":
            top = self.argument()
            return multiply(top, inverse(self.argument()))
        if token in ("\\sqrt", "sqrt"):
            degree = self.take("[") and self.take("2", "3", "4", "5", "6") + self.take("]")
            return root(self.argument() if token == "\\sqrt" else self.atom(), int(degree.rstrip("]") or 2))
        raise ValueError

    def argument(self) -> dict:
        """What a command takes: braces, or the next token; of several digits the first, as in \\frac34."""
        token = self.tokens[-1]
        if isinstance(token, Digits) and token.isdecimal() and len(token) > 1:
            self.tokens[-1:] = [Digits(token[1:]), Digits(token[0])]
        return self.atom()


def bits(x: Fraction) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def bounded(value: dict) -> dict:
    """The value without terms of 0, if it is not too large."""
    value = {key: x for key, x in value.items() if x}
    if len(value) > MAX_TERMS or any(bits(x) > MAX_BITS for x in value.values()):
        raise ValueError
    return value


def rational(value: dict) -> Fraction:
    if set(value) - {RATIONAL}:
        raise ValueError
    return value.get(RATIONAL, Fraction(0))


def add(a: dict, b: dict, factor: int | Fraction = 1) -> dict:
    """a + factor * b"""
    return bounded({key: a.get(key, 0) + factor * b.get(key, 0) for key in {**a, **b}})


def multiply(a: dict, b: dict) -> dict:
    """Term by term; with g the greatest common divisor of r and s, sqrt(r) sqrt(s) = g sqrt(r/g s/g)."""
    product = {}
    for (r, p), x in a.items():
        for (s, q), y in b.items():
            g = math.gcd(r, s)
            key = (r // g) * (s // g), p + q
            product[key] = product.get(key, 0) + x * y * g
    return bounded(product)


def inverse(a: dict) -> dict:
    """Of two terms, 1 / (x + y) = (x - y) / (x^2 - y^2)."""
    if len(a) != 2:
        return raise_to(a, Fraction(-1))
    (first, x), (second, y) = a.items()
    conjugate = {first: x, second: -y}
    return multiply(conjugate, raise_to(multiply(a, conjugate), Fraction(-1)))


def raise_to(base: dict, exponent: Fraction) -> dict:
    """Of one term, (x sqrt(r) pi^p)^n = x^n r^(n // 2) sqrt(r)^(n % 2) pi^(p n); a sum is multiplied out."""
    n = exponent.numerator
    if exponent.denominator > 1:
        base = root(base, exponent.denominator)
    if len(base) == 1:
        ((r, p), x), = base.items()
        if abs(n) * max(bits(x), r.bit_length()) > MAX_BITS:
            raise ValueError
        return bounded({(r if n % 2 else 1, p * n): x**n * Fraction(r) ** (n // 2)})
    if not 1 <= n <= 8:  # 0 to the power 0, 1 / 0, and sums whose powers would be long
        raise ValueError
    return base if n == 1 else multiply(base, raise_to(base, Fraction(n - 1)))


def root(base: dict, degree: int) -> dict:
    """A rational root of a rational; or sqrt(a / b) = sqrt(a b) / b, with the square factors of a b taken out."""
    x = rational(base)
    radicand = x.numerator * x.denominator
    if x < 0 or radicand > 10**15 or degree > 6:
        raise ValueError
    guess = Fraction(round(x.numerator ** (1 / degree)), round(x.denominator ** (1 / degree)))
    if guess**degree == x:
        return bounded({RATIONAL: guess})
    if degree != 2 or radicand > 10**8:
        raise ValueError
    outside = next(d for d in range(math.isqrt(radicand), 0, -1) if radicand % d**2 == 0)
    return {(radicand // outside**2, 0): Fraction(outside, x.denominator)}


# ------------------------------------------------------------------------------------------------ Verdicts

LETTER = re.compile(r"\(?([A-Ja-j])\)?")
CHOSEN = re.compile(r"\(?([A-Ja-j])(?:\)\.?|[.:](?= |$)|$)")
COUNTED = re.compile(r"([-+]?[0-9.,/ ]*(?:\\frac ?\{[0-9]+\} ?\{[0-9]+\})?) ([A-Za-z]{3,})")  # not 5 xy, 5 pm
NO_NOUNS = set("""
    one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty
    ninety hundred thousand million billion trillion lakh crore pair couple dozen score gross half halve third
    quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth about above almost and approximately
    around below but cubed divided factorial false fewer inf infinity least less maximum maybe minimum minus mod
    modulo more most nan nearly negative nor not over per percent percentage perhaps plus possibly power probably
    recurring remainder repeating root roughly sqrt square squared than till times under until wrong
    alpha beta gamma lambda theta sin cos tan log exp""".split())


def without_noun(text: str) -> str:
    """12 apples as 12; a word that may change the number, as in 12 dozen, stays."""
    match = COUNTED.fullmatch(text)
    word = match[2].lower() if match else ""
    return match[1] if word and word not in UNITS and not {word, word.removesuffix("s")} & NO_NOUNS else text


def readable(reference) -> str:
    """A reference as text; "" if it cannot be compared with: empty, None, NaN, a marker that is empty or open."""
    if isinstance(reference, int) and reference.bit_length() <= MAX_BITS:
        return str(reference)
    if isinstance(reference, float) and math.isfinite(reference):
        return str(reference)
    inside = marked(reference) if isinstance(reference, str) else ""
    return (reference if inside is None else inside).strip()


def is_equivalent(answer: str, reference: str | int | float) -> bool:
    """Whether two answers are the same, by the rules at the top of this file. Never raises."""
    answer, reference = readable(answer), readable(reference)
    if max(len(answer), len(reference)) > 10 * MAX_LENGTH:
        return answer.casefold().split() == reference.casefold().split()
    answer, reference = normalize(answer), normalize(reference)
    if not answer or not reference:
        return False
    letter, chosen = LETTER.fullmatch(reference), CHOSEN.match(answer)
    if letter:
        return bool(chosen) and chosen[1].upper() == letter[1].upper()
    expected = parse(reference)
    if isinstance(expected, Number) and not expected.unit:
        answer = without_noun(answer)
    return equal(parse(answer), expected)


def verify(response: str, reference: str | int | float) -> bool:
    """Whether the response's final answer is the reference, which may be a whole solution. Never raises."""
    if not isinstance(response, str):
        return False
    letter = bool(LETTER.fullmatch(normalize(readable(reference)[:40])))
    return is_equivalent(extract_answer(response, letter=letter), reference)


# ------------------------------------------------------------------------------------------------ Adapters


def compute_score(data_source, solution_str: str, ground_truth, extra_info=None, **kwargs) -> float:
    """The reward as verl calls it."""
    return float(verify(solution_str, ground_truth))


def reward_func(completions, answer=None, solution=None, ground_truth=None, **kwargs) -> list[float | None]:
    """The reward as TRL calls it, for completions that are strings or lists of messages.
    None, and so skipped by TRL, where the reference of the first of these columns that is there cannot be read."""
    columns = [column for column in (answer, solution, ground_truth, [None] * len(completions)) if column is not None]
    texts = [message if isinstance(message, str) else message[-1]["content"] if message else "" for message in completions]
    return [float(verify(text, reference)) if readable(reference) else None for text, reference in zip(texts, columns[0])]
