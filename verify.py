r"""A verifiable reward: does a response give the reference answer? Standard library only; works copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

 1. Only the last marker counts: \boxed{}, \fbox{}, <answer></answer> or #### before a number or option, not
    in <think>; empty or unclosed, it is no answer. Else a last line may end in "answer is X" or "answer: X".
 2. Numbers and expressions of + - * / ^, square roots, pi and letters are equal if their values are, exactly.
 3. Words and % at a number may be missing on one side; $ is skipped. 2 million is a number, 12 dozen is not
    12. N% is N, and N/100 if the reference has a % or is no whole number.
 4. "1, 2", "1 or 2", {1, 2}, 2 \pm 1 have no order. Tuples, intervals and matrices have, and need brackets.
 5. x = 5, x_1 = 5 and m + n = 5 are 5; x \in (0, 1) is (0, 1); a true chain, 2 + 3 = 5, is its last side.
 6. An option A to J: "B", "(B)", "B. cells", if no other is named; but "B. cells" is not "B. bones".
 7. All else is text: x \le 5 (or \leq), x^2 + y^2 = 25, lists of words. Blanks and case do not count.
 8. verify wants the answer worked out. For a number, one number or fraction: 6/8 for 0.75, but not 12/2 for 6
    nor 10^2 for 100. With letters, the reference's letters and numbers; with roots or pi, no further number,
    bracket, power or root in a denominator. What the reference leaves to work out, like 2^2 * 3, is repeated.
 9. References are text, numbers, bools, or solutions with a marker; of a list, any item. Nothing raises.
"""

import math
import re
import unicodedata
from collections import namedtuple
from contextlib import suppress
from fractions import Fraction
from itertools import accumulate, pairwise, product

# ------------------------------------------------------------------------------------------------ Extraction
MAX_LENGTH = 1000  # of an answer
INSIDE = r"[^{}\\]"
for _ in range(9):  # levels of braces
    INSIDE = rf"(?:[^{{}}\\]|\\.|\{{{INSIDE}\}})*+"
NUMBER = r"[^\w\n\r<]{0,5}(?:(?:[a-z] ?=|frac)[^\w\n]{0,5})?\d|[ *(]{0,5}[A-J][ *.)]{0,5}(?:[\n<]|\Z)"
HEADING = r"[^\n\r<]{0,40}(?:[A-Z][a-z]|\d[.)] +\w)"  # "#### 3. Check"
TAG = rf"<answer>|\\?boxed(?=\s*\{{)|\\fbox(?![a-z])|(?<!#)####(?!#)(?={NUMBER})(?!{HEADING})"
MARKER = re.compile(rf"(?:(?<![\d)\]}}])(?<![\d)\]}}] )([-−])\$?)?({TAG})")  # with the sign of -\boxed{5}
CONTENT = re.compile(rf"(?s)<answer>(.*?)</answer>|\\?\w+\s*\{{({INSIDE})\}}|####([^\n\r<]*)")
# What denies or doubts an answer stands before "the answer", so a clause must start there.
CLAUSE = r"(?i)(?:\A|\n|[.!?:;,] )\W{0,3}(?:(?:so|thus|hence|therefore|then|and),? )?"
REST = r"(?:the |my |our )?(?:final |correct )?answer(?: is:?|:) ?((?:[^.!?;\n]|\.(?=[^\s<]))+?)\.*"
IN_WORDS = re.compile(CLAUSE + REST + r"(?:\s|<[|/]?[a-z_]+\|?>)*\Z")  # at the end, but for special tokens


def extract_answer(text, default=None):
    """What the last marker holds, as written; "" if it is empty or not closed; default without a marker."""
    text = re.sub(r"(?s)\A.*</think>|<think>.*", "", text)
    *_, marker = None, *MARKER.finditer(text)
    if marker is None:
        answer = IN_WORDS.search(text[-MAX_LENGTH:].replace("**", ""))
        return answer[1].strip() if answer else default
    content = CONTENT.match(text[marker.start(2):][:MAX_LENGTH])
    return "-" * bool(marker[1]) + content[content.lastindex].strip() if content else ""


# -------------------------------------------------------------------------------------------------- Notation
# A word has a quotation mark before it. Pairs apply before the rules and after them.
SYNONYMS = dict(pair.split(" ", 1) for pair in r'''
\leq \le,≤ \le,<= \le,\geq \ge,≥ \ge,>= \ge,\neq \ne,≠ \ne,!= \ne,\lt <,\gt >,∈ =,\in =,≈ \approx,∪ \cup,
∅ \emptyset,\varnothing \emptyset,\cdot *,× *,\times *,· *,⋅ *,\div /,÷ /,⁄ /,− -,– -,‐ -,± \pm ,π \pi ,
pi \pi ,√ \sqrt ,sqrt \sqrt ,∞ \infty ,\degree °,\% %,\dfrac \frac,\tfrac \frac,\Omega "Ω,½  1/2,⅓  1/3,
⅔  2/3,¼  1/4,¾  3/4,"percent %,"degree °,"centimeter "cm,"meter "m,"kilometer "km,"kilogram "kg,"gram "g,
"liter "L,"hr "h,"second "s,"minute "min,"hour "h,"inche "in,"inch "in,"feet "ft,"foot "ft,"sq "square,
"true "yes,"false "no,"hundred *10^{2},"thousand *10^{3},"million *10^{6},"billion *10^{9}
'''.replace("\n", "").split(","))
NAMED = re.compile(r'\\[A-Za-z]+|\\[%$]|"[A-Za-z]+|(?<![A-Za-z])(?:sqrt|pi)(?![A-Za-z])|[<>!]=|[^\x00-\x7f]')
LOWER = re.compile(r'"(?:[A-Za-z]{4,}|[A-Z]?[a-z]{2,}|No)')
# In this order: what is replaced, by what, and an example.
RULES = [line.split("⇒") for line in r'''
["\u200b-\u200f\u2060\ufeff]⇒ ⇒zero-width characters never join digits
(?<!\\)\\\\(?=[A-Za-z]{2})⇒\\⇒JSON's \\frac
^\s*=|\\!|(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|large)(?![a-z])\.?⇒⇒\left(
(?<![A-Za-z])([A-Za-z])\.(?=[A-Za-z]\b)⇒\1⇒U.K., 9 p.m.
\\mathrm ?\{([ei])\}|\\(?:math(?:bf|it|cal)|boldsymbol|bm) ?\{([^{}]*)\}|(?<=_)\{(\w)\}⇒\1\2\3⇒\mathbf{x_{1}}
\\(?:text[a-z]*|mbox|mathrm|operatorname) ?\{[ ~]*([^{}]*)\}⇒ "\1 ⇒\text{ cm}
\\begin\{\w*(?:matrix|array)\}(?:\{[\w|]*\})?⇒[[⇒a matrix is a tuple of rows
(?:\\\\\s*)?\\end\{\w*(?:matrix|array)\}⇒]]⇒
\\\\⇒],[⇒
\{,\}|\\,(?=\d{3})|[&;]|\\cup(?![a-z])|,?\s*"?\b(?:and|or)\b⇒,⇒1{,}000, 1 or 2
(?:\\[,;: ]|\\q?quad(?![a-z])|(?<=[\d}$])~|~(?=[\\\d])|\\?\$|\s)+⇒ ⇒$5$, \$5
([€£¥₹]) ?(-?[\d.,]*\d)⇒\2\1⇒€5
\^ ?\{? ?\\circ ?\}? ?⇒°⇒90^\circ
(?<=\d) ?(?:\^ ?\{ ?)?"?(?:th|st|nd|rd)\b ?\}?⇒⇒12^{th}
(\\(?:ln|log(?:_\w)?|sin|cos|tan)) ?\((\w+)\)⇒\1 \2⇒\ln(2)
(?<=\d) ?[xX] ?(?=\d)⇒*⇒4.5 x 10^{33}
(?<!\d{4})(?<=\d),(?=(?:\d{3},)*\d{3}(?!,?\d)(?![^(\[]*[)\]])(?!.*\\\}))⇒⇒1,234
\^ ?(-?\d+)⇒^{\1}⇒2^10
^\s*([*_'`]{1,3})(.+)\1\s*$⇒\2⇒**18**
\\frac ?(\w)⇒\\frac{\1}⇒\frac12
(\\frac\{[^{}]*\}) ?(\w)⇒\1{\2}⇒
(?<![\d.^_])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}⇒\1 \2/\3⇒1\frac34
^(.*\\(?:frac|sqrt|pi).*)\\approx[ \d.-]*$⇒\1⇒\frac13 \approx 0.333
((?:^|(?<=,)|(?<=\{))(?:(?!\\pm|\\[{}])[^,])*)\\pm((?:(?!\\[{}])[^,])*)⇒\1+\2,\1-\2⇒2 \pm 1
(?<![\\A-Za-z"])(?=[A-Za-z]*[aeiouyAEIOUY])(?=[A-Za-z]{3}|[Nn]o\b)⇒"⇒words
(?<=[\d)}°%]) *(?=(?:[kcdmMGnμ][mgLlsJNWVAΩ]|[kMG]B|[kMG]?Hz|[A-Z]{2,3}s)(?![A-Za-z(_]))⇒"⇒5cm, CDs
(?<=[\d)}°%]) *(?=(?:eV|Pa|ft|lbs?|oz|hrs?|mph|in|sq|(?i:[ap]m))(?![A-Za-z(_]))⇒"⇒
(?<=[\d}]) +([mgsLJNWVAKhCFΩ])(?=(?:\^\{\d\})? *$)⇒"\1⇒5 N
'''.strip().split("\n")]
BLANKS = re.compile(r"(?<![A-Za-z]) +(?=\D)|(?<=\D) +(?![A-Za-z])|[ .]+$")
NUMBERS = r" ?(?:\d+ \d+/\d+|\d+\.?\d*(?:[eE][-+]?\d{1,3}(?!\d))?|\.\d+)"
SYMBOLS = r'\\sqrt\[\w\]|(?:[A-Za-zΩμ]|\\[A-Za-z]+)(?:_(?:\w|\{[^{}]*\}))?|\\.|"[A-Za-zΩμ]+|[^\s"]'
TOKEN = re.compile(f"{NUMBERS}|{SYMBOLS}")


# Values are computed modulo a prime, so nothing grows. All primes below 200 are squares modulo it, and
# x**((P + 1) / 4) is the root that respects products, so identities between roots hold. A name's value is its
# hash, so that no other identities do. Fractions of up to 40 digits can be had back.
P = 33 * math.lcm(*range(1, 200)) - 1
OPERATOR = re.compile(r"([-+])|([*/(A-Za-zΩμ]|\\[A-Za-z])|(\^)")  # by rank; an atom is a factor


def rational(value):  # the fraction of least size
    a, b, s, t = P, value % P, 0, 1
    while b * b > P:
        a, b, s, t = b, a % b, t, s - a // b * t
    return Fraction(b, t)


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
    elif token == "\\sqrt":
        square = climb(tokens, 4)
        root, size = pow(square, (P + 1) // 4, P), math.prod(rational(square).as_integer_ratio())
        known = 0 < size < 200**2 and root * root % P == square  # a larger square may have another root
        value = root if known else hash(f"root {square}")
    elif OPERATOR.match(token):
        value = hash(token)
    else:  # 1 3/4
        value = sum(x.numerator * pow(x.denominator, -1, P) for x in map(Fraction, token.split()))
    while (found := OPERATOR.match(tokens[-1])) and (rank := found.lastindex) >= level:
        operator = tokens.pop() if tokens[-1] in "*/^" else ""  # of a sum, its sign is left to read
        right = climb(tokens, rank + 1)
        if operator == "^":
            n = rational(right)
            value = pow(value, n.numerator, P) if n.denominator == 1 else hash(f"{value} ^ {n}")
        else:
            value = value + right if rank == 1 else value * pow(right, 1 - 2 * (operator == "/"), P)
    return value % P


Quantity = namedtuple("Quantity", "value tokens unit")
Group = namedtuple("Group", "brackets items")  # brackets "{}": also of a bare list, or the names in it
NAME = r"(?:[A-Za-z_|'\"]|\\(?!(?:frac|sqrt|pi)(?![a-z]))[a-z]++|\{[^{}]*\}|(?<=_)\d|"
NAME += r"\([A-Za-z,]*\)|(?<=[A-Za-z])\([^()]*\))++="  # f(2) too
NAMING = re.compile(r"(?![A-Z]=[A-Z]$)(?=.{,25}=)" + NAME + r"|[A-Za-z+]++=(?=[^A-Za-z]+$)")
OPENING, CLOSING = r"([{\{", r")]}\}"
UNIT = re.compile(r'(?:(?:"[A-Za-zΩμ]+|[%°¢€£¥₹])(?:[A-Za-zΩμ/.*"°]|\^\{?-?\d\}?)*)?')
KNOWN = "frac|sqrt|pi|infty|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|phi|omega"
WORD = re.compile(r"[A-Za-zΩμ]{2,}?(?=s?(?![A-Za-zΩμ]))|(?<![A-Za-zΩμ])[A-Za-zΩμ]|[°¢€£¥₹/%\d]")  # apples
WORDS = r'(?:[A-Za-z* ]*[A-Za-z] [A-Za-z][A-Za-z* ]*|[A-Za-z* ]+".*)$'  # rather than a product
NO_PRODUCT = re.compile(rf".*(?:[<>]|\\(?!(?i:{KNOWN})(?![a-z]))[A-Za-z])|{WORDS}")
CHANGING = set("""one two three four five six seven eight nine ten eleven twelve twenty dozen score couple
gross pair mil mln lakh crore trillion half halve third fourth fifth sixth tenth hundredth thousandth mega
kilo micro squared cubed not no factorial time twice doubled plus am pm minus over divided less mod power root
inverse than repeating roughly because since maybe perhaps probably wrong incorrect""".split())  # no units


def split(tokens, separator):  # outside brackets; nothing if one closes that is not open
    depths = [*accumulate((token in OPENING) - (token in CLOSING) for token in tokens)]
    cuts = [-1, *(i for i, depth in enumerate(depths) if depth == 0 and tokens[i] == separator), len(tokens)]
    return [tokens[i + 1:j] for i, j in pairwise(cuts) if min(depths) >= 0]


def read(tokens):
    """A Group or a Quantity; raises an error if the tokens are text."""
    if len(parts := split(tokens, ",")) > 1:
        names = ["".join(part[:part.index("=")]) for part in parts if "=" in part]
        return Group(",".join(names) if len({*names}) > 1 else "{}", [*map(read, parts)])
    if len(sides := split(tokens, "=")) > 1:  # x = 2 * 8 = 16, of which the last side counts
        values = [read(side) for side in sides[bool(NAMING.match("".join(tokens))):]]
        if "%" not in tokens and all(equal(value, values[0]) for value in values):
            return values[-1]  # else it is false, or a formula: text, as "=" is no unit
    if tokens[0] in OPENING and tokens[-1] in CLOSING and (inside := split(tokens[1:-1], ",")):
        if len(inside) == 1 and tokens[0] in "({":
            return read(inside[0])
        return Group(tokens[0][-1] + tokens[-1][-1], [*map(read, inside)])
    rest = [";", *reversed(tokens)]
    value, unit = climb(rest), "".join(rest[:0:-1])
    if NO_PRODUCT.match(" ".join(tokens)) or not UNIT.fullmatch(unit):
        raise ValueError  # neither a number nor a product
    return Quantity(value, tokens[:len(tokens) - len(rest) + 1], WORD.findall(unit))


def parse(text):
    """What read makes of a text; or the text without blanks, in lower case unless it is letters only."""
    def renamed(match):
        name = match[0].lower() if LOWER.fullmatch(match[0]) else match[0]
        return SYNONYMS.get(name) or SYNONYMS.get(name.removesuffix("s"), name)

    text = re.sub("([⁰¹²³⁴-⁹⁻]+)", r"^{\1}", NAMED.sub(renamed, text))  # 10⁻¹²
    for pattern, replacement, _ in RULES:
        text = re.sub(pattern, replacement, unicodedata.normalize("NFKC", text))
    tokens = TOKEN.findall(BLANKS.sub("", NAMED.sub(renamed, text)).strip())
    try:
        return read(tokens * (len(tokens) < 120))  # in bounded time
    except (ArithmeticError, IndexError, RecursionError, ValueError):
        text = "".join(tokens).replace('"', "")
        return text if re.fullmatch("[A-Za-z*]+", text) else text.lower()


# -------------------------------------------------------------------------------------------------- Verdicts
LITERAL = re.compile(r"[-+]?(?:[\d ]+/\d+|\\frac(?:\{-?\d+\}){2}|\d*\.?\d*(?:\*10\^\{-?\d+\}|[eE]-?\d+)?)")
TO_DO = re.compile(r"(?<!sqrt)[(^]|\}\{[^{}]*\\sqrt|/\(?[^-+/]*\\sqrt|\\sqrt\{?\d*(?:/|\\frac)")  # rule 8
LETTER = r"(?:[(\[<] ?(?=\w ?[)\]>])|(?=\w(?:$| ?[.:,;)]| \(| - [A-Za-z]{2})))"
BEFORE = r"(?!E\. ?coli|\w\. ?[A-Z]\.|[ei]$)(?:(?i:option|choice) )?"
OPTION = re.compile(rf"{BEFORE}{LETTER}([A-Ja-j])[ )\]>.:,;]*(.*)|.*")
OTHER_OPTION = re.compile(
    r"(?<!\d )(?<![\w°^])[B-HJ](?![\w'])|[(\[][A-Ja-j][)\]]|\b[A-J][.:)]|(?:^| )[a-j][.)] |"
    r"(?:^|[,/|&] ?|\b(?:or|and) )[AIa-j]\b(?! ?[\w=+*/^(-])|\ball (?:of )?the (?!above)")


def equal(a, b, finished=False):
    """Whether two answers are the same; finished: and a is worked out as far as b."""
    if type(a) is not type(b) or isinstance(a, str):
        return a == b != ""
    if isinstance(a, Group):
        brackets = {a.brackets, b.brackets}
        sides = [sorted(x.items, key=str) if brackets == {"{}"} else x.items for x in (a, b)]
        alike = len(brackets) == 1 or "{}" in brackets and "," in "".join(brackets)
        return alike and len(a.items) == len(b.items) and all(equal(*pair, finished) for pair in zip(*sides))
    if a.unit != b.unit and (a.unit and b.unit or CHANGING & {*a.unit, *b.unit}):
        return False
    x, y = (a, b) if b.unit else (b, a)  # the unit is y's
    of_hundred = y.unit == ["%"] != x.unit and (y is b or rational(x.value).denominator > 1)
    same = x.value == y.value or of_hundred and x.value * 100 % P == y.value
    return same and not (finished and a.tokens != b.tokens and unfinished(a, b))


def unfinished(a, b):  # whether an answer leaves more to work out than the reference of the same value
    both = answer, reference = "".join(a.tokens), "".join(b.tokens)
    if LITERAL.fullmatch(answer) and LITERAL.fullmatch(reference):
        return re.search("/|frac", answer) and rational(a.value).denominator == 1  # 12/2
    names, others = (sorted(re.sub(r"\\(?:frac|sqrt|pi)|\d[eE](?=[-+]?\d)|[^A-Za-z]", "", x)) for x in both)
    values = [map(Fraction, re.findall(r"\d*\.?\d+(?:[eE][-+]?\d{1,3}(?!\d))?", x)) for x in both]
    numbers, more = (sorted(n for x in side for n in x.as_integer_ratio() if n != 1) for side in values)
    if names or not re.search(r"\\(?:sqrt|pi)", reference):  # like 2^2 * 3
        return not names or names != others or numbers != more
    return not {*numbers} <= {*more} or len(TO_DO.findall(answer)) > len(TO_DO.findall(reference))


def option(text):  # the letter of the option that a text names, "" for none or several, and the rest
    text = re.sub(r"\\(?:text|math|boxed)[a-z]*|[{}$*~\\]|\b(?i:answer):", " ", text)
    letter, rest = OPTION.fullmatch(" ".join(text.split())).groups("")
    return letter.upper() * (not OTHER_OPTION.search(rest)), "".join(rest.lower().split()).strip(".")


def texts(answer):
    """An answer, or the items of a list, as text, or what its marker holds; none of what cannot be read."""
    items = answer.tolist() if hasattr(answer, "tolist") else answer  # numpy's
    found = []
    for x in items if isinstance(items, (list, tuple)) else [items]:
        with suppress(ArithmeticError, TypeError, ValueError):  # no number, or one that str() refuses
            found += [extract_answer(str(x), str(x)).strip()] * (isinstance(x, str) or abs(x) < math.inf)
    return [text for text in found if 0 < len(text) <= MAX_LENGTH]


def is_equivalent(answer, reference, finished=False):
    """Whether two answers are the same, by the rules at the top of this file; finished: rule 8 too."""
    given, wanted = ([(option(text), parse(text)) for text in texts(x)[:100]] for x in (answer, reference))
    return any(a[0] == b[0] and (a == b or "" in a + b) if b[0] else equal(x, y, finished)
               for (a, x), (b, y) in product(given, wanted))


def verify(response, reference):
    """Whether the response's final answer is the reference, worked out. Never raises."""
    return isinstance(response, str) and is_equivalent(extract_answer(response, ""), reference, True)


def compute_score(data_source, solution_str, ground_truth, **kwargs):  # the reward as verl calls it
    return float(verify(solution_str, ground_truth))


def reward_func(completions, *others, answer=None, solution=None, ground_truth=None, **kwargs):
    """The reward as TRL calls it, by name; None, which TRL skips, for a completion without a reference."""
    references = [column for column in (answer, solution, ground_truth) if column is not None]
    if not references:
        raise TypeError("reward_func needs the references by name: answer, solution or ground_truth")
    rewards = []
    for text, reference in zip(completions, references[0], strict=True):
        text = text[-1]["content"] if text and isinstance(text, list) else text  # of a chat's last message
        text = text if isinstance(text, str) else "".join(part["text"] for part in text or [])
        rewards.append(float(verify(text, reference)) if texts(reference) else None)
    return rewards
