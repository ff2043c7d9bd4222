r"""A verifiable reward: does a response give the reference answer? Standard library only; works copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

 1. Only the last marker counts, \boxed{}, \fbox{}, <answer></answer> or "#### 18", never inside <think>; empty or
    unclosed is no answer. If there is none, the last line may end in "answer is X" or "answer: X".
 2. Numbers and expressions of + - * / ^, square roots, pi and letters are equal if their values are, exactly.
 3. Words, % and $ at a number may be missing on one side. 2 million is a number; 12 dozen is not 12. N% is N, and
    N/100 if the reference has a % or is no whole number.
 4. "1, 2", "1 or 2", {1, 2}, 2 \pm 1 have no order; tuples, intervals and matrices have one, and need brackets.
 5. x = 5 and m + n = 5 are 5. Of a true chain 2 + 3 = 5 the last side counts. x^2 + y^2 = 25 is only itself.
 6. For an option A to J: "B", "(B)", "B. cells", if no other is named. All else is text; words lose their case.
 7. verify also wants the answer worked out as far as the reference: no operators or terms that it lacks, no larger
    number under a root, no more roots in denominators. 6/8 is 0.75, but 12/2 is not 6.
 8. A reference is text, a number, a bool, or a solution with a marker; of a list any item suffices. Nothing raises.
"""

import math
import random
import re
import unicodedata
from collections import namedtuple
from fractions import Fraction
from numbers import Number

MAX_LENGTH, MAX_TOKENS, MAX_DEPTH = 1000, 200, 16  # an answer beyond these is compared as text

# ---------------------------------------------------------------------------------------------- Extraction
NUMERIC = r"[-+−]?(?:\\?[$€£₹])?[-+−]?[\d.][\d.,/]*+(?: ?(?:\\?%|[a-z]+))?"
HASHES = rf"(?<!#)####(?!#)[ *]*+({NUMERIC}|\(?[A-J]\)?)[ *.]*+(?=[\n\r<]|\Z)"  # no heading
MARKER = re.compile(rf"<answer>|\\(?:boxed|fbox)(?![A-Za-z])|boxed(?=\{{)|{HASHES}")
SPECIAL_TOKENS = re.compile(r"(?:\s*<[|/]?[a-z_]+\|?>)+\s*\Z")
# A new clause must start here: what denies or doubts an answer stands before "the answer".
CLAUSE = r"(?i)(?:^|[.!?:;,] )(?:(?:so|thus|hence|therefore|then|and),? )?(?:(?:the|my|our) )?"
IN_WORDS = re.compile(CLAUSE + r"(?:final |correct )?answer(?: is:?|:) ?((?:[^.!?;]|\.(?=[^\s$*]))+)[.$* ]*\Z")


def marked(text: str) -> str | None:
    """What the last marker holds, "" if it is empty or not closed; None if there is no marker."""
    text = text.rsplit("</think>", 1)[-1].split("<think>", 1)[0]
    *_, marker = None, *MARKER.finditer(text)
    if marker is None:
        line = SPECIAL_TOKENS.sub("", text[-MAX_LENGTH:]).rstrip().rsplit("\n", 1)[-1]
        answer = IN_WORDS.search(line.replace("**", "").strip())
        return answer and answer[1].strip()
    if marker[1]:
        return marker[1]
    rest = text[marker.end():marker.end() + 2 * MAX_LENGTH].lstrip()
    if marker[0] == "<answer>":
        return rest.partition("</answer>")[0].strip() if "</answer>" in rest else ""
    before = text[max(0, marker.start() - 9):marker.start()].rstrip("$")
    sign, depth = "-" if re.search(r"(?:^|[^\d)\]}\s])\s*[-−]\Z", before) else "", 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL) if rest[:1] == "{" else ():
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return sign + rest[1:brace.start()].strip()
    return ""


def extract_answer(response: str) -> str | None:
    """The final answer of a response, as written."""
    return marked(response) or None


# ------------------------------------------------------------------------------------------------ Notation
SYNONYMS = dict(pair.split(" ", 1) for pair in (
    r"\leq \le,≤ \le,<= \le,\geq \ge,≥ \ge,>= \ge,\neq \ne,≠ \ne,!= \ne,\lt <,\gt >,∈ \in,≈ \approx,\cdot *,× *,"
    r"\times *,· *,⋅ *,∗ *,\div /,÷ /,⁄ /,− -,– -,— -,‐ -,π \pi ,√ \sqrt ,∞ \infty ,± \pm ,\degree °,\% %,\lbrace \{,"
    r"\rbrace \},\varnothing \emptyset,∅ \emptyset,\dfrac \frac,\tfrac \frac,\cfrac \frac,\Omega Ω,"
    '"dollar $,\\$ $,"usd $,"cent ¢,"percent %,"degree °,"centimeter "cm,"meter "m,"kilometer "km,"kilogram "kg,'
    '"gram "g,"liter "L,"second "s,"minute "min,"hour "h,"hr "h,"inche "in,"inch "in,"feet "ft,"foot "ft,"sq "square,'
    '"per /,"th ,"st ,"nd ,"rd ,"hundred *10^2,"thousand *10^3,"million *10^6,"billion *10^9').split(","))
UNITS = r"[kcdmMGnμ](?:m|g|[lL]|s|J|N|W|V|A|Ω|Hz|eV|Pa|i?B)|ft|lbs?|oz|hrs?|mph|in|th|st|nd|rd|am|pm|eV|Hz|Pa|sq"
# In this order. From the fourth on, words have a quotation mark before them; the bare letter of "5 m" has '"m?'.
RULES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|[lL]arge|limits)(?![A-Za-z])\.?|\\!", ""),
    (r"\\mathrm ?\{([ei])\}|\\(?:mathbf|mathit|mathcal|boldsymbol|bm) ?\{([^{}]*)\}", r"\1\2"),
    (r"\b([ap])\.m\.?", r"\1m"),
    (r"\\(?:text[a-z]*|mbox|mathrm|operatorname) ?\{([^{}]*)\}",
     lambda match: " " + re.sub(r"(?<![A-Za-z\\])(?=[A-Za-z])", '"', match[1]) + " "),
    (r"\\begin\{(?:[pb]matrix|array)\}(?:\{[lcr|]*\})?", "[["),
    (r"(?:\\\\\s*)?\\end\{(?:[pb]matrix|array)\}", "]]"),
    (r"\\\\", "],["),
    (r"[&;∪]|\\cup(?![a-z])|\{,\}|,?\s*\"?\b(?:and|or)\b", ","),  # 1{,}000
    (r"(?<=\d)(?:\\,|, (?= ?\d{3}\b)(?!.*, \d\d?\b))(?=\d{3}(?!\d))", ""),  # 12\,500
    (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s", " "),
    (r"\\[()\[\]]", ""),
    (r"(?<!\\)\$([^$]*)(?<!\\)\$", r" \1 "),  # $x$, but not $5
    (r"\\?([$€£¥₹]) ?([-−]?[\d.,]*\d)(?![A-Za-z\d])", r"\2 \1"),  # $5 is 5 $, but $5B is not
    (r"\^ ?\{? ?\\circ ?\}? ?", "°"),
    (r"\^ ?\{ ?\"?(th|st|nd|rd) ?\}", r"\1"),
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"),
    (r"\\([dtc]?frac) ?(\d) ?(\d)", r"\\\1{\2}{\3}"),
    (r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1"),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!\d|,\d)(?![^()\[\]]*[)\]])(?!.*\\\})",
     lambda match: match[0].replace(",", "")),
    (r"^ *(?:(?i:the )?(?i:final )?(?i:answer)(?::| is)|=|\\approx(?![a-z]))", ""),
    (r"^\s*([*_'`]+)(.+)\1\s*$", r"\2"),
    (r"^ *\"?(?:(yes|Yes|true|True)|(?:no|No|false|False)) *$", lambda match: '"yes' if match[1] else '"no'),
    (r"(?<![\\A-Za-z\"])(?=[A-Za-z]*[aeiouyAEIOUY])(?=[A-Za-z]{3})", '"'),
    (rf"(?<=[\d)}}°%]) *(?=(?:{UNITS})(?![A-Za-z(^_]))", '"'),
    (r"(?<=[\d}]) +([mgsLJNWVAKhCFΩ])(?= *$)", r'"\1?'),
    (r'("[A-Za-z]{2,}[^\Ws\d])s(?![A-Za-z])', r"\1"),
    (r'"(?:[A-Za-z]{4,}|[A-Z]?[a-z]{2,})(?![A-Za-z])', lambda match: match[0].lower()),
    (r"(?<![A-Za-z]) +(?=\D)|(?<=\D) +(?![A-Za-z])", "")]]
MIXED = r"(?<![\d./^_])\d+(?: (?=\d+/)|(?=\\frac))(?:\d+/\d+|\\frac\{\d+\}\{\d+\})(?![\d.])"
DIGITS = r" ?\d+\.?\d*(?:[eE][-+]?\d{1,3}(?!\d))?|\.\d+"
TOKEN = re.compile(rf'{MIXED}|{DIGITS}|\\[A-Za-z]+|\\.|"[A-Za-zΩμ]+\??|\S')


def plain(match: re.Match) -> str:
    """A character beyond ASCII in the notation of TeX: ² ½ １ ١ and zero-width ones, which never join digits."""
    kind, same = unicodedata.decomposition(match[0])[:5], unicodedata.normalize("NFKC", match[0])
    if kind == "<supe":
        return f"^{{{same}}}"
    if same.isdecimal():
        return str(int(same))
    return " " if unicodedata.category(same[0]) == "Cf" else f" {same} ".replace("⁄", "/") if kind == "<frac" else same


def normalize(text: str) -> str:
    text = re.sub(r"[^\x00-\x7f]", plain, text.replace('"', "")).replace("}^{", "")
    if "\\begin" not in text or "\\\\begin" in text:  # of output that was escaped for JSON
        text = text.replace("\\\\", "\\")
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    text = re.sub(r'\\[A-Za-z]+|\\[%$]|"[a-z]+|[<>!]=|[^\x00-\x7f]', lambda m: SYNONYMS.get(m[0], m[0]), text)
    return text.strip().rstrip(" .")


# --------------------------------------------------------------------------------------------- Expressions
# Values are computed modulo a prime. All primes below 200 are squares modulo it, and x**((P + 1) / 4) is the square
# root that respects products, so identities between roots hold; a name is a random number, so that no others do.
# Fractions of up to 40 digits can be had back. Nothing grows, so no power or product takes long.
SMALL = [n for n in range(2, 200) if all(n % d for d in range(2, n))]
P = 57 * 4 * math.prod(SMALL) - 1


def rational(value: int) -> Fraction:
    """The fraction of least size with this value."""
    a, b, s, t = P, value, 0, 1
    while b * b > P:
        a, b, s, t = b, a % b, t, s - a // b * t
    return Fraction(b, t)


class Reader:
    """Computes the expression that tokens start with, and notes its roots."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth = [*(token.strip() for token in tokens), ""], 0, 0
        self.radicand = self.roots_below = 0

    def take(self, *wanted: str) -> str:
        """The next token; with wanted, only if it is one of these, or else nothing."""
        token = self.tokens[self.at]
        if wanted and token not in wanted:
            return ""
        self.at += 1
        return token

    def sum(self) -> int:
        value = self.product()
        while sign := self.take("+", "-"):
            value += int(sign + "1") * self.product()
        return value % P

    def product(self) -> int:
        value = self.power()
        while True:
            before, operator = self.tokens[self.at - 1], self.take("*", "/")
            if not operator and not re.match(r"[(A-Za-zΩμ]|\\[A-Za-z]", self.tokens[self.at]):
                return value
            if before[-1].isdigit() and self.tokens[self.at] == "\\frac" and not operator:
                raise ValueError("neither a mixed number nor a product")
            value = value * self.power() % P if operator != "/" else self.divide(value, self.power)

    def divide(self, value: int, read) -> int:
        start = self.at
        divisor = read()
        self.roots_below += "\\sqrt" in self.tokens[start:self.at]
        return value * pow(divisor, -1, P) % P

    def power(self) -> int:
        sign = self.take("+", "-")
        start, value = self.at, self.atom()
        if self.take("^"):
            exponent = rational(int(self.take("-") + "1") * self.atom() % P)
            if exponent == Fraction(1, 2):
                value = self.root(value, start)
            elif exponent.denominator == 1 and abs(exponent) < 10**6 and (value or exponent > 0):
                value = pow(value, int(exponent), P)
            else:
                value = self.name(start)
        return -value if sign == "-" else value

    def root(self, value: int, start: int) -> int:
        radicand = rational(value)
        n = rest = radicand.numerator * radicand.denominator
        for prime in SMALL:
            while n > 0 and rest % prime**2 == 0:
                rest //= prime**2
        root = pow(value, (P + 1) // 4, P)
        if not 0 < rest < 200**2 or root * root % P != value:  # a larger square may have the other root
            return self.name(start)
        self.radicand, self.roots_below = max(self.radicand, n), self.roots_below + (radicand.denominator > 1)
        return root

    def name(self, start: int) -> int:
        return random.Random(re.sub(r"[{}() ]", "", "|".join(self.tokens[start:self.at]))).randrange(P)

    def index(self) -> None:
        """Over a subscript, or what stands in brackets."""
        depth, start = 0, self.at
        while self.at == start or depth or self.tokens[self.at - 1] in ("_", "^"):
            token = self.take()
            depth += (token in OPENING) - (token in CLOSING)

    def atom(self) -> int:
        self.depth += 1
        start, token = self.at, self.take()
        if self.depth > MAX_DEPTH:
            raise ValueError("too deep")
        if mixed := re.fullmatch(r"(\d+)(?: |\\frac\{)(\d+)(?:/|\}\{)(\d+)\}?", token):
            whole, top, bottom = map(int, mixed.groups())
            value = (whole * bottom + top) * pow(bottom, -1, P)
        elif re.match(r"\.?\d", token):
            number = Fraction(token)
            value = number.numerator * pow(number.denominator, -1, P) % P
        elif token in ("(", "{"):
            value = self.sum()
            if not self.take({"(": ")", "{": "}"}[token]):
                raise ValueError("not closed")
        elif token == "\\frac":
            value = self.divide(self.atom(), self.atom)
        elif token == "\\sqrt" and self.tokens[self.at] != "[":
            value = self.root(self.atom(), start)
        elif token in FUNCTIONS:
            while self.tokens[self.at] in ("[", "_", "^"):
                self.index()
            self.atom()
            value = self.name(start)
        elif re.fullmatch(r"[A-Za-zΩμ]|\\[A-Za-z]+", token):
            if self.tokens[self.at] == "_":
                self.index()
            value = self.name(start)
        else:
            raise ValueError(token)
        self.depth -= 1
        return value % P


# ------------------------------------------------------------------------------------------------- Answers
Quantity = namedtuple("Quantity", "value unit text radicand roots_below")
Group = namedtuple("Group", "brackets items")  # no brackets: a list; of a relation its signs
Named = namedtuple("Named", "name answer")
OPENING, CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
RELATIONS = ("=", "\\approx", "\\in", "<", ">", "\\le", "\\ge", "\\ne")
FUNCTIONS = tuple(r"\sqrt \sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \log \ln \lg \exp".split())
CHANGING = set(  # after a number, these make another of it
    "one two three four five six seven eight nine ten eleven twelve twenty dozen score gross pair couple lakh crore mln "
    "half halve third fourth fifth sixth tenth hundredth thousandth mega kilo micro squared cubed factorial time plus am "
    "minus over divided less mod power root inverse repeating percentage binary not than because since maybe pm "
    "perhaps probably wrong incorrect".split())
UNIT = re.compile(r'(?:(?:"[A-Za-zΩμ]+\??|[%°$€£₹¢])(?:[A-Za-zΩμ/.*]|\^\{?-?\d\}?)*)*')
LITERAL = re.compile(
    r"-?(?:\d+/(\d+)|\\frac\{-?\d+\}\{-?(\d+)\}|(?:\d+ )?\d+/\d+|\d*\\frac\{\d+\}\{\d+\}|"
    r"(?:\d*\.?\d+\*)?10\^\{?-?\d+\}?|\d*\.?\d*(?:[eE]-?\d+)?)")


def split(tokens: list[str], separators) -> tuple[list[list[str]], list[str]]:
    """The parts between the separators that stand outside all brackets, and these separators."""
    parts, found, depth = [[]], [], 0
    for token in [*tokens, None]:
        depth += (token in OPENING) - (token in CLOSING)
        if depth < 0 or token is None and (depth or not all(parts)):
            raise ValueError("brackets, or an empty part")
        if depth == 0 and token in separators:
            parts.append([])
            found.append(token)
        elif token:
            parts[-1].append(token)
    return parts, found


def spelled(tokens: list[str]) -> str:
    return "".join(tokens).replace('"', " ").replace("?", "").strip()


def read(tokens: list[str], depth: int = 0):
    """A Group, Named or Quantity, or else the text of the tokens."""
    try:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        return read_group(tokens, depth + 1) or read_relation(tokens, depth + 1) or read_quantity(tokens)
    except ValueError:
        return spelled(tokens)


def read_group(tokens: list[str], depth: int) -> Group | Named | None:
    """What has items: by commas, brackets, or a plus-minus."""
    (parts, commas), brackets = split(tokens, (",",)), ""
    if not commas and tokens.count("\\pm") == 1:
        at = tokens.index("\\pm")
        parts = [[*tokens[:at], sign, *tokens[at + 1:]] for sign in "+-"]
    elif not commas:
        try:
            parts, commas = split(tokens[1:-1], (",",))
        except ValueError:  # (1 + 2)(3 + 4)
            return None
        if tokens[0] not in OPENING or tokens[-1] not in CLOSING:
            return None
        if not commas and tokens[0] in ("(", "{"):
            return read(parts[0], depth)
        brackets = tokens[0][-1] + tokens[-1][-1]
    items = [read(part, depth) for part in parts]
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) == 1:  # x = 1 or x = 2
        items = [item.answer if isinstance(item, Named) else item for item in items]
    elif names and not brackets:
        return Group(",", items)
    nested = [item.items if isinstance(item, Group) and not item.brackets else [item] for item in items]
    return Group(brackets, [item for items in nested for item in items])


def read_relation(tokens: list[str], depth: int):
    """x = 5; 2 * 8 = 16, of which the last side counts; of any other relation the sides."""
    parts, signs = split(tokens, RELATIONS)
    if not signs:
        return None
    sides, text = [read(part, depth) for part in parts], spelled(parts[0])
    name = re.sub(r"_(\{[^{}]*\}|\w)|(?<=[A-Za-z])\([^()]*\)", "", text)
    named = re.fullmatch(r"(?!.*\\(?:frac|sqrt|cdot))[A-Za-z\\{}|+,()' ]+", name)
    named = named and signs[0] in ("=", "\\in", "\\approx") and not re.fullmatch("[A-Z]=[A-Z]", spelled(tokens))
    value, *others = sides[1:] if named else sides
    for sign, side in zip(signs[len(parts) - 1 - len(others):], others):
        about = sign == "\\approx" and isinstance(value, Quantity) and re.search("[a-z/]", value.text)
        if not about and (sign != "=" or not equal(value, side) or "%" in f"{value}{side}"):
            return Group("".join(signs), sides)
        value = value if about else side
    if text[0] == "(" and isinstance(value, Group):
        return Group(",", [Named(*pair) for pair in zip(text.strip("()").split(","), value.items)])
    return Named(text, value) if named else value


def read_quantity(tokens: list[str]) -> Quantity:
    reader = Reader(tokens)
    value, unit = reader.sum(), "".join(tokens[reader.at:])
    if not UNIT.fullmatch(unit):
        raise ValueError("no unit")
    unit = sorted(re.findall(r"[A-Za-zΩμ]+|[^\w\".{}*]|\d", unit))
    return Quantity(value, unit, spelled(tokens[:reader.at]), reader.radicand, reader.roots_below)


# ------------------------------------------------------------------------------------------------ Verdicts
OPTION = re.compile(
    r"(?!\w\. ?(?:coli|elegans|difficile|pylori|subtilis|albicans|sapiens|[A-Z]\.))"  # E. coli, J. S. Mill
    r"(?:(?i:option|choice) )?(?:[(\[<]([A-Ja-j])[)\]>]|([A-J])(?=$|[.:,;)]| [-(])|([a-j])(?=$|[.)]))(.*)")
OTHER_OPTION = re.compile(
    r"(?<!\d )(?<![\w°\\])[B-HJ](?![\w'])|[(\[][A-Ja-j][)\]]|\b[A-J][.:)]|^\W*[AI]\b(?! [a-z])|"
    r"[,/|&] ?[a-j]\b(?![=+*/^(-])|\ball (?:of )?the (?!above)")


def option(text: str) -> str | None:
    """The letter of the option that a text names, "" if it names others too; None if it names none."""
    text = re.sub(r"\\(?:text[a-z]*|math[a-z]+|boxed)|[{}$*~]|\\(?=[ :;,])|\b(?i:answer):", " ", text[:MAX_LENGTH])
    found = OPTION.fullmatch(" ".join(re.sub(r"\b(?:and|or)\b", ",", text).split()).replace("( ", "("))
    return found and ("" if OTHER_OPTION.search(found[4]) else (found[1] or found[2] or found[3]).upper())


def equal(a, b, finished: bool = False) -> bool:
    """Whether two answers are the same; finished: and a is worked out as far as b."""
    if isinstance(a, Named) and isinstance(b, Named) and a.name != b.name:
        return False
    a, b = (x.answer if isinstance(x, Named) else x for x in (a, b))
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return same_quantity(a, b) and (not finished or worked_out(a, b))
    if not isinstance(a, Group) or not isinstance(b, Group):
        return a == b
    brackets, rest = (a.brackets, b.brackets), list(b.items)
    alike = brackets in (("{}", ""), (",", ""), ("", ","), (",", "()"), ("()", ","))
    alike |= len(a.items) > 2 and brackets in (("[]", "()"), ("()", "[]"))
    if len(a.items) != len(rest) or not (alike or a.brackets == b.brackets):
        return False
    for x in a.items:
        places = [i for i, y in enumerate(rest) if equal(x, y, finished)]
        if not places or places[0] > 0 and brackets not in ((",", ","), ("", ""), ("{}", "{}"), ("{}", "")):
            return False
        del rest[places[0]]
    return True


def same_quantity(a: Quantity, b: Quantity) -> bool:
    unit, other = ([word for word in x.unit if word not in "%?"] for x in (a, b))
    percent, percents = a.unit.count("%"), b.unit.count("%")
    if unit != other and (unit and other or CHANGING & {*unit, *other} or "?" in b.unit) or max(percent, percents) > 1:
        return False
    larger, smaller = (a, b) if percent else (b, a)
    hundredth = percents > percent or percent > percents and rational(b.value).denominator > 1
    return a.value == b.value or hundredth and larger.value == smaller.value * 100 % P


def worked_out(a: Quantity, b: Quantity) -> bool:
    if literal := LITERAL.fullmatch(a.text):
        return not (literal[1] or literal[2]) or rational(a.value).denominator > 1  # 12/2
    operators, others = (re.findall(r"(?<=[\w})])[+-]|[*/^(]|\\frac|\}\\sqrt", x.text.replace("\\frac", "/")) for x in (a, b))
    if LITERAL.fullmatch(b.text) or not {*operators} - {"+", "-"} <= {*others}:
        return False
    if re.search(r"[A-Za-z]", re.sub(r"\\(?:frac|sqrt|pi)", "", a.text)):
        return sorted(a.text) == sorted(b.text)
    sums = [sum(operator in "+-" for operator in x) for x in (operators, others)]
    return sums[0] <= sums[1] and a.radicand <= b.radicand and a.roots_below <= b.roots_below


def parse(text: str):
    tokens = [token for token in TOKEN.findall(normalize(text)) if token.strip()]
    if len(tokens) > MAX_TOKENS or re.fullmatch(r"\d+[-–−]\d+", text):  # a range
        return spelled(tokens)
    return read(tokens)


def texts(reference, depth: int = 0) -> list[str]:
    """The texts any of which is the answer; none of what cannot be read."""
    reference = reference.tolist() if hasattr(reference, "tolist") else reference  # numpy's
    if isinstance(reference, (list, tuple)) and depth < MAX_DEPTH:
        return [text for item in reference for text in texts(item, depth + 1)]
    if not isinstance(reference, (str, Number)) or reference != reference:
        return []
    try:
        text = str(reference).strip()
    except ValueError:  # an integer of thousands of digits
        return []
    inside = marked(text)
    return [text] if text and inside is None else [inside] if inside else []


def is_equivalent(answer: str, reference, finished: bool = False) -> bool:
    """Whether two answers are the same, by the rules at the top of this file; finished: rule 7 too."""
    for left in texts(answer):
        for right in texts(reference):
            letter = None if re.fullmatch("[a-z]", right) else option(right)
            if letter or max(len(left), len(right)) > MAX_LENGTH:
                same = option(left) == letter if letter else left.split() == right.split()
            else:
                same = equal(parse(left), parse(right), finished)
            if same:
                return True
    return False


def verify(response: str, reference) -> bool:
    """Whether the response's final answer is the reference, worked out. Never raises."""
    answer = extract_answer(response) if isinstance(response, str) else None
    return answer is not None and is_equivalent(answer, reference, True)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """The reward as verl calls it."""
    return float(verify(solution_str, ground_truth))


def reward_func(completions, answer=None, solution=None, ground_truth=None, **kwargs) -> list:
    """The reward as TRL calls it, of strings or messages; None, which TRL skips, if there is no reference."""
    references = next(x for x in (answer, solution, ground_truth, [None] * len(completions)) if x is not None)
    responses = [item if isinstance(item, str) else item[-1]["content"] if item else "" for item in completions]
    return [float(verify(*pair)) if texts(pair[1]) else None for pair in zip(responses, references)]
