r"""A verifiable reward: does a response give the reference answer? Standard library only; works copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

 1. Only the last marker counts: \boxed{}, \fbox{}, <answer></answer> or "#### 18", never inside <think>; an
    empty or unclosed one is no answer. Else the last line may end in "answer is X" or "answer: X".
 2. Numbers and expressions of + - * / ^, square roots, pi and letters are equal if their values are, exactly.
 3. Words, % and $ at a number may be missing on one side. 2 million is a number, 12 dozen is not 12. N% is N,
    and N/100 if the reference has a % or is no whole number.
 4. "1, 2", "1 or 2", {1, 2}, 2 \pm 1 have no order. Tuples, intervals and matrices have, and need brackets.
 5. x = 5 and m + n = 5 are 5. Of a true chain 2 + 3 = 5 the last side counts. x^2 + y^2 = 25 is only itself.
 6. An option A to J: "B", "(B)", "B. cells", if no other is named. All else is text; case does not count.
 7. verify wants the answer worked out as far as the reference: no operator or term that it lacks, no larger
    number under a root, no more roots in denominators. 6/8 is 0.75, but 12/2 is not 6.
 8. References are text, numbers, bools, or solutions with a marker; of a list, any item. Nothing raises.
"""

import math
import random
import re
import unicodedata
from collections import namedtuple
from fractions import Fraction
from numbers import Number

MAX_LENGTH, MAX_TOKENS = 1000, 200  # an answer beyond these is compared as text

# ---------------------------------------------------------------------------------------------- Extraction
INSIDE = r"[^{}\\]"
for _ in range(9):  # levels of braces
    INSIDE = rf"(?:[^{{}}\\]|\\.|\{{{INSIDE}\}})*+"
NUMERIC = r"[-+−]?(?:\\?[$€£₹])?[-+−]?[\d.][\d.,/]*+(?: ?(?:\\?%|[a-z]+))?"
HASHES = rf"####(?<!#####)(?!#)[ *]*+(?:{NUMERIC}|\(?[A-J]\)?)[ *.]*+(?=[\n\r<]|\Z)"  # no heading
MARKER = re.compile(rf"<answer>|\\boxed(?![a-z])|\\fbox(?![a-z])|boxed(?=\{{)|{HASHES}")
CONTENT = re.compile(rf"(?s)<answer>(.*?)</answer>|\\?\w+\s*\{{({INSIDE})\}}|####([^\n\r<]*)")
SIGN = re.compile(r"(?<![\d)\]}])(?<![\d)\]}] )[-−]\$?\Z")  # -\boxed{5}
# What denies or doubts an answer stands before "the answer", so a clause must start there.
CLAUSE = r"(?i)(?:\A|\n|[.!?:;,] )\W{0,3}(?:(?:so|thus|hence|therefore|then|and),? )?(?:(?:the|my|our) )?"
REST = r"(?:final |correct )?answer(?: is:?|:) ?((?:[^.!?;\n]|\.(?=[^\s<]))+?)\.*"
IN_WORDS = re.compile(CLAUSE + REST + r"(?:\s|<[|/]?[a-z_]+\|?>)*\Z")  # at the end, but for special tokens


def marked(text):
    """What the last marker holds, "" if it is empty or not closed; None if there is no marker."""
    text = re.sub(r"(?s)\A.*</think>|<think>.*", "", text)
    *_, marker = None, *MARKER.finditer(text)
    if marker is None:
        answer = IN_WORDS.search(text[-MAX_LENGTH:].replace("**", ""))
        return answer and answer[1].strip()
    sign = SIGN.search(text[:marker.start()][-9:])
    content = CONTENT.match(text[marker.start():][:2 * MAX_LENGTH])
    return "-" * bool(sign) + content[content.lastindex].strip() if content else ""


def extract_answer(response: str) -> str | None:
    """The final answer of a response, as written."""
    return marked(response) or None


# ------------------------------------------------------------------------------------------------ Notation
# A word has a quotation mark before it. Pairs apply before the rules and after them.
SYNONYMS = dict(pair.split(" ", 1) for pair in r'''
\leq \le,≤ \le,<= \le,\geq \ge,≥ \ge,>= \ge,\neq \ne,≠ \ne,!= \ne,\lt <,\gt >,∈ \in,≈ \approx,∪ \cup,
∅ \emptyset,\varnothing \emptyset,\cdot *,× *,\times *,· *,⋅ *,∗ *,\div /,÷ /,⁄ /,− -,– -,— -,‐ -,‑ -,
π \pi ,√ \sqrt ,∞ \infty ,± \pm ,\degree °,\% %,\lbrace \{,\rbrace \},\dfrac \frac,\tfrac \frac,
\cfrac \frac,\Omega "Ω,½  1/2,⅓  1/3,⅔  2/3,¼  1/4,¾  3/4,⅕  1/5,⅙  1/6,⅛  1/8,⁰ ^{0},¹ ^{1},² ^{2},³ ^{3},
⁴ ^{4},⁵ ^{5},⁶ ^{6},⁷ ^{7},⁸ ^{8},⁹ ^{9},⁻ ^{-},"dollar $,\$ $,"usd $,"cent ¢,"percent %,"degree °,
"centimeter "cm,"meter "m,"kilometer "km,"kilogram "kg,"gram "g,"liter "L,"second "s,"minute "min,"hour "h,
"hr "h,"inche "in,"inch "in,"feet "ft,"foot "ft,"sq "square,"per /,"th ,"st ,"nd ,"rd ,"true "yes,
"false "no,"hundred *10^{2},"thousand *10^{3},"million *10^{6},"billion *10^{9}
'''.replace("\n", "").split(","))
NAMED = re.compile(r'\\[A-Za-z]+|\\[%$]|"[A-Za-z]+|[<>!]=|[^\x00-\x7f]')
# In this order: what is replaced, by what (␣ is a blank), and an example.
RULES = [re.split(" {3,}", line)[:2] for line in r'''
["\u200b-\u200f\u2060\ufeff]   ␣   zero-width characters never join digits
\^\{(-?\d?)\}\^\{(\d)\}(?:\^\{(\d)\})?   ^{\1\2\3}   10⁻¹²
^(\d+)-(\d+)$   \1"to\2   2004-2008 is a range
(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|pi|infty|cdot|text|left|right|begin|end|pm)(?![a-z]))   \\   JSON's
,\\! ?|\{,\}   ,   1{,}000
\\(?:left|right|[bB]igg?[lrm]?|displaystyle|[lL]arge|limits)(?![A-Za-z])\.?|\\!   nothing   \left(
\\mathrm ?\{([ei])\}   \1   \mathrm{e}
\b([ap])\.m\.?   \1m   9 p.m.
\\(?:text[a-z]*|mbox|mathrm|operatorname) ?\{[ ~]*([A-Za-z]+)([^{}]*)\}   ␣"\1\2␣   \text{ cm}
\\(?:text[a-z]*|mbox|mathrm|operatorname) ?\{([^{}]*)\}   ␣\1␣   \text{(B)}
\\(?:mathbf|mathit|mathcal|boldsymbol|bm) ?\{([^{}]*)\}   \1   \mathbf{x}
\\begin\{(?:[pb]matrix|array)\}(?:\{[lcr|]*\})?   [[   a matrix is a tuple of rows
(?:\\\\\s*)?\\end\{(?:[pb]matrix|array)\}   ]]
\\\\   ],[
[&;]|\\cup(?![a-z])|,?\s*"?\b(?:and|or)\b   ,   1 or 2
(?<=\d)(?<!\.\d{3})\\,(?=\d{3}(?![\d/]))   nothing   12\,500
\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s   ␣
\\[()\[\]]   nothing   \(x\)
(?<!\\)\$((?:\\.|[^$\\])*)\$   ␣\1␣   $x$
\\?([$€£¥₹]) ?(-?[\d.,]*\d)( ?[mb]illion| thousand)?(?![A-Za-z\d])   \2\3␣\1   $5, but not $5B
\^ ?\{? ?\\circ ?\}? ?   °   90^\circ
\^ ?\{ ?"?(th|st|nd|rd) ?\}   \1   12^{th}
_\{(\w)\}   _\1   x_{1}
(?<=\d) ?[xX] ?(?=10 ?\^)   *   4.5 x 10^{33}
\^ ?(-?\d+)   ^{\1}   2^10
\\frac ?(\d) ?(\d)   \\frac{\1}{\2}   \frac12
(?<![\d.^_])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}   \1␣\2/\3   1\frac{3}{4}
(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])   \\\1   sqrt(2)
\\((?:sqrt|ln|log|sin|cos|tan)(?:_\w)?) ?\(([^()]*)\)   \\\1{\2}   \ln(2)
(?<![\d.]\d{3}),(?=(?:\d{3},)*\d{3}(?![\d]|,\d)(?![^()\[\]]*[)\]])(?!.*\\\}))   nothing   1,234
^ *(?:(?i:the )?(?i:final )?(?i:answer)(?::| is)|=|\\approx(?![a-z]))   nothing   = 5
^(.*(?:\\frac|\\sqrt|\\pi|/).*)\\approx *-?[\d.]+ *$   \1   1/3 \approx 0.333
^\s*([*_'`]{1,3})(.+)\1\s*$   \2   **18**
((?:^|(?<=,)|(?<=\{))(?:(?!\\pm|\\[{}])[^,])*)\\pm((?:(?!\\[{}])[^,])*)   \1+\2,\1-\2   2 \pm 1
(?<![\\A-Za-z"])(?=[A-Za-z]*[aeiouyAEIOUY])(?=[A-Za-z]{3}|[Nn]o\b)   "   words
(?<=[\d)}°%]) *(?=(?:[kcdmMGnμ](?:m|g|[lL]|s|J|N|W|V|A|Ω|Hz|eV|Pa|i?B)|eV|Hz|Pa)(?![A-Za-z(_]))   "   5cm
(?<=[\d)}°%]) *(?=(?:ft|lbs?|oz|hrs?|mph|in|th|st|nd|rd|am|pm|sq|[A-Z]{2,3}s)(?![A-Za-z(_]))   "
(?<=[\d}]) +([mgsLJNWVAKhCFΩ])(?=(?:\^\{\d\})? *$)   "\1   5 N
("[A-Za-z]{2,}[^\Ws\d])s(?![A-Za-z])   \1   apples
'''.strip().split("\n")]
LOWER = re.compile(r'"(?:[A-Za-z]{4,}|[A-Z]?[a-z]{2,}|No)')
BLANKS = re.compile(r"(?<![A-Za-z]) +(?=\D)|(?<=\D) +(?![A-Za-z])|[ .]+$")
NUMBERS = r" ?(?:\d+ \d+/\d+|\d+\.?\d*(?:[eE][-+]?\d{1,3}(?!\d))?|\.\d+)"
SYMBOLS = r'\\sqrt\[\w\]|(?:[A-Za-zΩμ]|\\[A-Za-z]+)(?:_(?:\w|\{[^{}]*\}))?|\\.|"[A-Za-zΩμ]+|\S'
TOKEN = re.compile(f"{NUMBERS}|{SYMBOLS}")


def renamed(match):
    name = match[0].lower() if LOWER.fullmatch(match[0]) else match[0]
    return SYNONYMS.get(name, name)


# --------------------------------------------------------------------------------------------- Expressions
# Values are computed modulo a prime, so nothing grows. All primes below 200 are squares modulo it, and
# x**((P + 1) / 4) is the root that respects products, so identities between roots hold. A name is a random
# number, so that no other identities do. Fractions of up to 40 digits can be had back.
P = 57 * 4 * math.prod(n for n in range(2, 200) if all(n % d for d in range(2, n))) - 1


def rational(value):
    """The fraction of least size with this value."""
    a, b, s, t = P, value % P, 0, 1
    while b * b > P:
        a, b, s, t = b, a % b, t, s - a // b * t
    return Fraction(b, t)


def named(name):
    return random.Random(name).randrange(P)


def root(value):
    radicand = rational(value)
    size = radicand.numerator * radicand.denominator
    result = pow(value, (P + 1) // 4, P) if 0 < size < 200**2 else 0  # a larger square may have another
    return result if result * result % P == value else named(f"root {value}")


FUNCTION = re.compile(r"\\(?:sqrt|a?r?c?(?:sin|cos|tan|cot|sec|csc)|log|ln|lg|exp)")
FACTOR = re.compile(r"[*/(A-Za-zΩμ]|\\[A-Za-z]")


def climb(tokens, level=1):
    """The value of the last tokens, up to an operator below this level; they are removed."""
    token = tokens.pop()
    if token in "({":
        value = climb(tokens)
        tokens.pop()
    elif token in "+-":
        value = climb(tokens, 3) * int(token + "1")
    elif token == "\\frac":
        value = climb(tokens, 4) * pow(climb(tokens, 4), -1, P)
    elif FUNCTION.match(token):
        value = root(climb(tokens, 4)) if token == "\\sqrt" else named(f"{token} {climb(tokens, 4)}")
    elif FACTOR.match(token):
        value = named(token)
    else:
        value = sum(map(Fraction, token.split()), Fraction())  # 1 3/4
        value = value.numerator * pow(value.denominator, -1, P)
    if tokens[-1] == "^" and level < 4:
        tokens.pop()
        exponent = rational(climb(tokens, 4))
        if exponent.denominator > 1 or abs(exponent) > 10**6 or exponent <= 0 == value:
            value = named(f"{value} ^ {exponent}")
        else:
            value = pow(value, int(exponent), P)
    while (precedence := 1 if tokens[-1] in "+-" else 2 * bool(FACTOR.match(tokens[-1]))) >= level:
        operator = tokens.pop() if tokens[-1] in "*/" else ""
        right = climb(tokens, precedence + 1)  # of a sum, its sign is left for it to read
        right = pow(right, -1, P) if operator == "/" else right
        value = value + right if precedence == 1 else value * right
    return value % P


# ------------------------------------------------------------------------------------------------- Answers
Quantity = namedtuple("Quantity", "value text unit")
Group = namedtuple("Group", "brackets items")  # "": a list; ",": of names; or the signs of a relation
Named = namedtuple("Named", "name answer")
OPENING, CLOSING = r"( [ { \{".split(), r") ] } \}".split()
RELATIONS = r"= \approx \in < > \le \ge \ne".split()
NAME = r"(?![A-Z]=[A-Z]$)(?:(?!\\(?:frac|sqrt|pi))[A-Za-z\\{}|+,()' ])+"
NAMING = re.compile(NAME + r"(?:=|\\(?:in|approx)(?![a-z]))")
UNIT = re.compile(r'(?:(?:"[A-Za-zΩμ]+|[%°$€£₹¢])(?:[A-Za-zΩμ/.*"°$]|\^\{?-?\d\}?)*)?')
FRACTION = r"(?:\d+ )?\d+/(\d+)|\\frac\{-?\d+\}\{-?(\d+)\}"
LITERAL = re.compile(rf"[-+]?(?:{FRACTION}|\d*\.?\d+\*10\^\{{-?\d+\}}|\d*\.?\d*(?:[eE]-?\d+)?)")
BELOW = re.compile(rf"\\frac\{{{INSIDE}\}}\{{[^{{}}]*\\sqrt|/\(?[^-+/]*\\sqrt|\\sqrt\{{?\d*(?:/|\\frac)")
CHANGING = set(  # after a number, these make another of it
    "one two three four five six seven eight nine ten eleven twelve twenty dozen score gross pair couple "
    "lakh crore mln half halve third fourth fifth sixth tenth hundredth thousandth mega kilo micro "
    "squared cubed factorial time plus am minus over divided less mod power root inverse repeating "
    "percentage approximately roughly binary not no than because since maybe pm perhaps probably wrong "
    "incorrect trillion quadrillion mil doubled twice".split())


def spelled(tokens):
    return "".join(tokens).replace('"', " ").strip()


def split(tokens, separators):
    """The parts, and the separators between them, outside brackets; [] if a part or a bracket is missing."""
    parts, depth = [[]], 0
    for token in tokens:
        depth += (token in OPENING) - (token in CLOSING)
        if depth < 0:
            return []
        if depth or token not in separators:
            parts[-1].append(token)
        else:
            parts += [token], []
    return parts if depth == 0 and all(parts) else []


def read(tokens):
    """A Group, Named or Quantity, or else the text of the tokens."""
    parts = split(tokens, ",")
    if len(parts) > 1:
        return listed("", parts[::2])
    if len(sides := split(tokens, RELATIONS)) > 1:
        return related(sides)
    inside = split(tokens[1:-1], ",") if parts and tokens[0] in OPENING else []
    if len(inside) == 1 and tokens[0] in "({":
        return read(inside[0])
    if inside:
        return listed(tokens[0][-1] + tokens[-1][-1], inside[::2])
    rest = [";", *reversed(tokens)]
    try:
        value = climb(rest)
    except (ValueError, ArithmeticError, IndexError):
        return spelled(tokens)
    unit, number = "".join(rest[:0:-1]), tokens[:len(tokens) - len(rest) + 1]
    if not parts or not UNIT.fullmatch(unit):
        return spelled(tokens)
    return Quantity(value, spelled(number), sorted(re.findall(r"[A-Za-zΩμ]+|[°$€£₹¢/%]|\d", unit)))


def listed(brackets, parts):
    items = [read(part) for part in parts]
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) == 1:  # x = 1 or x = 2
        items = [getattr(item, "answer", item) for item in items]
    brackets = brackets or "," * (len(names) > 1)
    return Group("[]" if brackets == "()" and len(items) > 2 else brackets, items)


def related(sides):
    """x = 5; 2 * 8 = 16, of which the last side counts; of any other relation the sides."""
    answers, signs = [read(side) for side in sides[::2]], "".join(sum(sides[1::2], []))
    text = spelled(sum(sides, []))
    name = NAMING.match(re.sub(r"_(?:\w|\{[^{}]*\})|(?<=[A-Za-z])\([^()]*\)", "", text))  # f(2) and x_1 too
    values, equals = (answers[1:], "=" + signs[len(sides[1][0]):]) if name else (answers, signs)
    if set(equals) != {"="} or "%" in text or not all(equal(value, values[0]) for value in values):
        return Group(signs, answers)
    return Named(spelled(sides[0]), values[-1]) if name else values[-1]


# ------------------------------------------------------------------------------------------------ Verdicts
def equal(a, b, finished=False):
    """Whether two answers are the same; finished: and a is worked out as far as b."""
    if isinstance(a, Named) and isinstance(b, Named) and a.name != b.name:
        return False
    a, b = (getattr(x, "answer", x) for x in (a, b))
    if type(a) is not type(b) or isinstance(a, str):
        return a == b != ""
    if isinstance(a, Quantity):
        return same(a, b) and (not finished or worked_out(a, b))
    brackets = f"{a.brackets} {b.brackets}"  # the answer's and the reference's
    alike = re.fullmatch(r"(.*) \1|\{\} |, .*|.* ,", brackets) and len(a.items) == len(b.items)
    unordered = brackets in (" ", "{} ", "{} {}", ", ,")
    sides = [sorted(x.items, key=str) if unordered else x.items for x in (a, b)]
    return bool(alike) and all(equal(x, y, finished) for x, y in zip(*sides))


def same(a, b):
    if a.unit != b.unit and (a.unit and b.unit or CHANGING & {*a.unit, *b.unit}):
        return False
    x, y = a.value * 100 ** ("%" in b.unit), b.value * 100 ** ("%" in a.unit)
    of_hundred = a.unit != b.unit and ("%" in b.unit or rational(b.value).denominator > 1)
    return a.value == b.value or of_hundred and x % P == y % P


def work(text):
    """What is left to work out: operators, terms, the largest number under a root, roots in denominators."""
    below = len(BELOW.findall(text))
    roots = re.findall(rf"\\sqrt(\w|\{{{INSIDE}\}})", text)
    largest = max((math.prod(map(int, re.findall(r"\d+", inside))) for inside in roots), default=0)
    text = re.sub(r"\\sqrt(\w|\{[^{}]*\})\\sqrt", "*", text)
    operators = set(re.findall(r"[*/^(]", text.replace("\\frac", "/")))
    return operators, len(re.findall(r"(?<=[\w)}])[+-]", text)), largest, below


def worked_out(a, b):
    if literal := LITERAL.fullmatch(a.text):
        return not any(literal.groups()) or rational(a.value).denominator > 1  # 12/2
    symbols, others = (sorted(re.sub(r"\\[A-Za-z]+|\W|(?<!\d)1(?!\d)", "", x.text)) for x in (a, b))
    if LITERAL.fullmatch(b.text) or symbols != others and symbols[-1:] >= ["A"]:
        return False
    return all(x <= y for x, y in zip(work(a.text), work(b.text)))


# E. coli and J. S. Mill are no options.
EPITHETS = r"(?!\w\. ?(?:coli|elegans|difficile|pylori|subtilis|albicans|sapiens|[A-Z]\.))"
LETTER = r"(?:[(\[<](?=\w[)\]>])|(?=[A-J](?:$|[.:,;)]| [-(]))|(?=\w(?:$|[.)])))([A-Ja-j])(.*)"
OPTION = re.compile(EPITHETS + "(?:(?i:option|choice) )?" + LETTER)
OTHER_OPTION = re.compile(
    r"(?<!\d )(?<![\w°\\])[B-HJ](?![\w'])|[(\[][A-Ja-j][)\]]|\b[A-J][.:)]| [a-j][.)] |^\W*[AI]\b(?! [a-z])|"
    r"[,/|&] ?[a-j]\b(?![=+*/^(-])|\ball (?:of )?the (?!above)")


def option(text: str) -> str | None:
    """The letter of the option that a text names, "" if it names others too; None if it names none."""
    text = re.sub(r"\\(?:text|math|boxed)[a-z]*|[{}$*~]|\\(?=[ :;,])|\b(?i:answer):", " ", text[:MAX_LENGTH])
    words = " ".join(re.sub(r"\b(?:and|or)\b", ",", text).split())
    found = OPTION.fullmatch(words.replace("( ", "(").replace(" :", ":"))
    return found and ("" if OTHER_OPTION.search(found[2]) else found[1].upper())


def texts(answer):
    """An answer, or the items of a list, as text, or what its marker holds; none of what cannot be read."""
    items = answer.tolist() if hasattr(answer, "tolist") else answer  # numpy's
    items = items if isinstance(items, (list, tuple)) else [items]
    found = []
    for x in items:
        try:
            known = isinstance(x, str) or isinstance(x, Number) and abs(x) < math.inf  # no NaN either
            text = str(x) if known else ""
        except (ArithmeticError, ValueError):  # a signaling NaN, or more digits than Python writes
            continue
        found.append(text.strip() if marked(text) is None else marked(text))
    return [text for text in found if text]


def parse(text):
    if len(text) > MAX_LENGTH:
        return " ".join(text.split())
    text = unicodedata.normalize("NFKC", NAMED.sub(renamed, text))
    for pattern, replacement, *_ in RULES:
        text = re.sub(pattern, replacement.replace("nothing", "").replace("␣", " "), text)
    tokens = TOKEN.findall(BLANKS.sub("", NAMED.sub(renamed, text)))
    return read(tokens) if len(tokens) <= MAX_TOKENS else spelled(tokens)


def is_equivalent(answer, reference, finished: bool = False) -> bool:
    """Whether two answers are the same, by the rules at the top of this file; finished: rule 7 too."""
    answers = [(option(text), parse(text)) for text in texts(answer)]
    for other in texts(reference)[:100]:  # of a list, in bounded time
        letter = None if "a" <= other < "k" else option(other)  # a lower-case letter is a name
        expected = parse(other)
        if any(named_option == letter if letter else equal(value, expected, finished)
               for named_option, value in answers):
            return True
    return False


def verify(response: str, reference) -> bool:
    """Whether the response's final answer is the reference, worked out. Never raises."""
    return isinstance(response, str) and is_equivalent(marked(response) or [], reference, True)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    """The reward as verl calls it."""
    return float(verify(solution_str, ground_truth))


def reward_func(completions, answer=None, solution=None, ground_truth=None, **kwargs) -> list:
    """The reward as TRL calls it, of strings or messages; None, which TRL skips, if there is no reference."""
    given = [column for column in (answer, solution, ground_truth) if column is not None]
    references = given[0] if given else [None] * len(completions)
    responses = [x if isinstance(x, str) else x[-1]["content"] if x else "" for x in completions]
    return [float(verify(*pair)) if texts(pair[1]) else None for pair in zip(responses, references)]
