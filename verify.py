r"""A verifiable reward: does a response give the reference answer? Standard library only; works copied alone.

    verify(r"... so the total is \boxed{\frac{3}{4}}", "0.75")  ->  True

Order. Text up to the last </think>, or from a later <think> on, does not count. In the rest, the first of:
    marker   \boxed{}, \fbox{}, <answer></answer> or a line "#### 18", whichever starts last; if it is empty
             or not closed there is no answer. With strict, best for training, nothing else counts
    phrase   the last "answer is" or "answer:" that says more than "correct", to the end of the sentence
    number   the only word, or the last number if it ends the last line, save for a unit or a few words
For a reference A to J it is the first of them that names a letter; "I pick B" and "B is correct" are phrases
too, and in place of a number counts a last or first line like "B" or "B) 12", if it is the only one.

Finished. verify wants a number worked out: a literal reference is matched only by a literal, such as 12,
0.75, 6/8, 1 3/4, 1.5 \times 10^3, any of them with %, a unit or a noun, or by a true chain that ends in one.
2(3), 12/2 and \sqrt{36} are not 6 to verify. To is_equivalent they are, which compares values.

Equivalence of whole answers is exact, of roots to 1,000 digits. Without a [convention] it is symmetric.
    numbers      1,234.50 = 1\,234.5     -3/4 = \frac{-3}{4} = -0.75     1 3/4 = 1\frac34 = 7/4
                 1.5e3 = 1.5 \times 10^3     2 million = 2,000,000     0.333 is not 1/3, 1 234 is not 1234
    expressions  + - * / ^ of numbers, square roots and pi: \frac{1}{\sqrt{2}} = \frac{\sqrt{2}}{2}
    units        %, a unit or a noun may be missing: 50% = 0.5 = 50, 5 cm = 5, 12 apples = 12 [convention];
                 5 cm is not 5 m, nor 0.05 m, 5 mW is not 5 MW, and 12 dozen is not 12
    names        x = 5 is 5 [convention], but not y = 5; f(2) = 9, x \in [0, 1]; x = 1, y = 2 is (1, 2)
    chains       2 \cdot 8 = 16 is 16; 2 \cdot 8 = 15 and x = y = 5 are text; \frac13 \approx 0.333 is 1/3
    tuples       (1, 2), matrices, intervals [0, 1); [1, 2] is "1, 2", [1, 2, 3] is (1, 2, 3) [convention]
    sets, lists  {1, 2} = {2, 1} = "2, 1" = "1 or 2"; 2 \pm 1 = {1, 3}; {2, 2, 9} = {2, 9}, but not "2, 2, 9"
    letters      B = (B) = [B] = B. = Option B = "B) 12" = "B, which ...", but not "B or A" [convention]
    text         all else, ignoring spaces at symbols, $...$, \text{} and word case; yes = true [convention]
A reference is text, a number or bool, also of numpy, a list, or a solution with a marker or phrase; one that
is empty or unreadable never matches. No part of an answer is executed. What is too large is compared as text.
"""

import math
import re
from collections import namedtuple
from fractions import Fraction

MAX_LENGTH, MAX_DEPTH, MAX_ITEMS, MAX_TOKENS, MAX_BITS = 1000, 20, 64, 200, 20_000

# ---------------------------------------------------------------------------------------------- Extraction
MARKER = re.compile(r"<answer>|\\fbox|\\?boxed")
# Without braces a box holds one token, and nothing may be attached to it: of \boxed 12, TeX would box the 1.
BOX = re.compile(r"(?![A-Za-z])\s*(?:\{|(\\[A-Za-z]+|[0-9A-Za-z])(?=[$.)\]}*\\]*(?:\s|\Z)))")
NUMERIC = r"[-+]?[$€£¥]?[-+]?[0-9.][0-9,./]*(?: ?(?:%|\\%|[a-z]+))?\.?"
HASHES = re.compile(rf"(?<!#)####(?!#)[^\S\n]*({NUMERIC}|\(?[A-J]\)?)[^\S\n]*(?=[\n<]|\Z)")
IS = r"(?i:(?: is| was| (?:would|should|must|will|seems to) be|\*{0,2}:)(?![\w']))[:* ]*+"
SURELY = r"(?:(?:therefore|thus|definitely|approximately|\.\.\.)[,:]* |(?:the )?(?:letter|option|number) )*+"
PHRASE = rf"(?:[Aa]nswer|ANSWER){IS}{SURELY}(?:\s*+(?:\\\[|\$\$)\s*\n)?"
LETTER_PHRASE = (
    rf"{PHRASE}|(?<!in)[Cc]orrect (?:option|choice){IS}{SURELY}|(?<!not |ver )(?:pick|choose) {SURELY}|"
    rf"(?<![\w(])(?<!nor )(?<![Ii]f )(?<!e that )(?=\(?[A-J]\)? is {SURELY}(?:the )?(?:correct|right)\b)")
PHRASES = {False: re.compile(PHRASE), True: re.compile(LETTER_PHRASE)}
PHRASE_END = re.compile(
    r"[.!?](?: |$)|;(?: [A-Za-z]{2}|$)|,? (?:because|since|so that|as(?! (?:well|many|much|long)\b))\b|"
    r", (?:so|which|not|in|although)\b| \((?!or\b)[a-z]{2}| [-–—] (?:that|which|so|the|it)\b")
LAST_NUMBER = re.compile(
    r"(?!.*\b(?:Since|If|Because)\b[^,.:=]*$).*"  # the conclusion was cut off
    r"(?<![\w({}\[\])^/+×·,;.–—−-])(?<![^*]\*)(?<![-+*/×·^<>≤≥≠0-9] )(?<![<>]= )(?<!\\[lg][et] )(?<![-−]\$)"
    r"(?<!\\times )(?<!\\cdot )(?<![0-9]:)(?<![0-9], )(?<![0-9] and )(?<![0-9], and )(?<![0-9] to )"
    r"(?<!\bor )(?<!\bnot )(?<!\bthan )(?:\\?\$)?"  # no part of a formula, range or list
    r"((?:[-−](?:\\?\$)?)?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|"
    r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?\\?%?))"
    r"\*{0,2}\$?(?: ?(?:(?:[kcm]?m|[km]?g|m?[lL]|h|mph|[nrst][dht]|[A-Z])\b|°[CF]?|€))?\*{0,2}"
    r"(?:[ ,(/]+(?:[^\W\d_][\w'’&-]+|[aA-J]\b)\)?){0,15}")
LABEL = re.compile(r"(?:[Oo]ption |[Cc]hoice )?[\[(]?(?:[A-J](?:[\]).:]|$)|[a-j][\])]?$)")
LABELS = re.compile(r"(?m)(?<![\w'(])(?:\(?[A-Ja-j]\)|[A-J][.:](?=[\s*]|$)|(?:^|(?<=ption ))[A-J](?=\W*$))")
CHOICE = re.compile(
    r"(?:[Oo]ption |[Cc]hoice )?[\[(]?(?P<letter>[A-J]|[a-j](?=[\])]|$))"
    r"(?:[\])]|(?=$|[:,;}]|\.(?:$| (?![a-z]|[A-Z]\.))| (?:[-–—(]|(?:or|and|which|is|because|since|as)\b)))"
    r"(?P<alone>(?!\W*(?:or|and)\W+\(?[A-J]\b)(?!\W+[A-J](?:[).:]|$))"  # no other letter is named
    r"(?!(?:(?!\. |\b(?:as|because|since)\b).)*?(?<!\w)[\[(][A-Ja-h][\])])"
    r"(?!(?<![\])])(?![.:])(?:(?!\. |\b(?:as|because|since)\b).)*?\b(?:[B-HJ]\b|[AI]\b(?! [a-z]))))?")


def marked(text: str) -> str | None:
    """What the marker that starts last holds, "" if it is empty or not closed; None if there is no marker."""
    marker = MARKER.match(text, max(map(text.rfind, ("<answer>", "\\fbox", "\\boxed", "boxed{"))))
    lines = HASHES.findall(text, marker.end() if marker else 0) if "####" in text else []
    if lines or not marker:
        return lines[-1] if lines else None
    text, depth = text[marker.end():], 0
    if marker[0] == "<answer>":
        return text.partition("</answer>")[0].strip() if "</answer>" in text else ""
    box = BOX.match(text)
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL) if box and not box[1] else ():
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[box.end():brace.start()].strip()
    return box[1] or "" if box else ""


def stated(text: str, letter: bool = False) -> str | None:
    """What the last phrase says that says anything; of a whole sentence, the number that ends it."""
    for start in (max(0, len(text) - 300), 0):  # the end usually suffices
        for phrase in reversed([*PHRASES[letter].finditer(text, start)]):
            line = text[phrase.end():phrase.end() + MAX_LENGTH].lstrip().split("\n", 1)[0]
            answer = PHRASE_END.split(line, maxsplit=1)[0].replace("** ", " ").strip(" *")  # **18** dollars
            number = re.match(r"[A-Za-z]{2,} \S*[A-Za-z]\S* \S+ \S", answer) and LAST_NUMBER.fullmatch(answer)
            answer = letter_of(line) if letter else number[1] if number else answer
            empty = not letter and re.fullmatch(r"\W*((correct|right|consistent)\b.*)?", answer)
            if answer is not None and not empty:
                return answer


def letter_of(text: str) -> str | None:
    """The letter that a text begins with, "" if it names another too; None if it begins with none."""
    choice = CHOICE.match(normalize(text[:200]))
    return choice and ("" if choice["alone"] is None else choice["letter"])


def extract_answer(response: str, strict: bool = False, letter: bool = False) -> str | None:
    """The final answer of a response, as written. strict: only from a marker; letter: it is an option's."""
    text = response.rsplit("</think>", 1)[-1].split("<think>", 1)[0].strip()
    answer = marked(text)
    if strict or answer == "" or answer and not (letter and letter_of(answer) is None):
        return answer or None
    answer = stated(text.replace("**", "") if letter else text, letter)
    if answer is None and letter and len(LABELS.findall(text)) < 2:
        lines = [normalize(line[:200]) for line in (text.split("\n", 1)[0], text.rsplit("\n", 1)[-1])]
        *_, answer = None, *[letter_of(line) for line in lines if LABEL.match(line)]
    elif answer is None and not letter:
        last = text.rstrip(" \n.,*$\\])\"").rsplit("\n", 1)[-1]
        answer = re.fullmatch("([A-Za-z]{2,})", text) or LAST_NUMBER.fullmatch(last)
        return answer and answer[1]
    return answer or None


# ----------------------------------------------------------------------------------------------- Notations
SYNONYMS = dict(re.findall(r"(\S+) (\S+)",
    r"½ 1/2 ⅓ 1/3 ⅔ 2/3 ¼ 1/4 ¾ 3/4 ⅕ 1/5 ⅖ 2/5 ⅗ 3/5 ⅘ 4/5 ⅙ 1/6 ⅚ 5/6 ⅛ 1/8 ⅜ 3/8 ⅝ 5/8 ⅞ 7/8 √ sqrt π \pi "
    r"∞ \infty ± \pm ∪ , ∈ \in ≤ \le ≥ \ge ≠ \ne ≈ \approx ∅ \emptyset ｛ \{ ｝ \} ＄ \$ ⁰ ^{0} ¹ ^{1} ² ^{2} "
    r"³ ^{3} ⁴ ^{4} ⁵ ^{5} ⁶ ^{6} ⁷ ^{7} ⁸ ^{8} ⁹ ^{9} ⁻ ^{-} \dfrac \frac \tfrac \frac \cfrac \frac "
    r"\lbrace \{ \rbrace \} \leq \le \geq \ge \neq \ne <= \le >= \ge != \ne \lt < \gt > \cdot * \times * "
    r"\div / \cup , \degree ° \% % \varnothing \emptyset \Omega Ω \mu µ million *10^6 billion *10^9"))
CHARACTERS = str.maketrans({
    **{character: f" {name} " for character, name in SYNONYMS.items() if len(character) == 1},
    **dict(zip("−－＋＝×·⋅∗÷⁄，．（）［］％º０１２３４５６７８９Ωμ&", "--+=****//,.()[]%°0123456789Ωµ,")),
    **dict.fromkeys("\u00a0\u2009\u202f", "\\,"), "\u3000": " "})  # no-break and thin spaces as TeX's
INSIDE = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # of braces that hold braces, as for \frac{\sqrt{3}}{2}
WRAPPER = re.compile(rf"\\(?:text(?:..|normal)?|math..|mbox|operatorname|boldsymbol) ?\{{({INSIDE})\}} ?")
# In this order: a thin space in a number before it becomes a plain one, and white space last, since other
# rules leave some. After each rule: what it matches | what it does not.
RULES = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![A-Za-z])\.?", ""),  # \left( | \leftarrow
    (r"(?:\\\\ ?)?\\end\{[bp]matrix\}", "]]"),  # \end{bmatrix} | \end{vmatrix}
    (r"\\begin\{[bp]matrix\}", "[["),  # \begin{pmatrix} | \begin{cases}
    (r"\\\\", "], ["),  # 1 \\ 2 | 1 \ 2
    (r"(?<=[-0-9])\} *\^\{(?=[0-9])", ""),  # 10^{2}  ^{3} of 10²³ | x^{a}^{b}
    (r"\\frac ?([A-Za-z0-9])(?= ?(?:\{|[A-Za-z0-9](?!\.?[0-9])))", r"\\frac{\1}"),  # \frac12 | \frac123
    (r"(\\frac ?\{[^{}]*\}) ?([A-Za-z0-9])(?!\.?[0-9])", r"\1{\2}"),  # \frac{1}2 | \frac{1}23
    (r" ?([_^]|\\sqrt) ?([A-Za-z0-9])(?!\.?[0-9])", r"\1{\2}"),  # x^2 | x^12, to TeX x^{1}2
    (r"\{,\}|,\\! ?", ","),  # 1{,}000 | f{a, b}
    (r"\\!", ""),  # 12\!500 | 5!
    (r"(?<=[0-9])(?<![0-9]{4})(?<!\.[0-9]{3})\\,(?=[0-9]{3}(?![0-9/]))", ""),  # 12\,500 | 1\,25
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),  # a~b | a \\ b
    (r"\+ ?(?=\\infty)", ""),  # +\infty | -\infty
    (r"(?<!\\)\\[][()]", ""),  # \(x\) | (x)
    (r"(?<!\\)\$\$?([^$]*)(?<!\\)\$\$?", r" \1 "),  # $x$ | $5
    (r"\^ ?\{? ?\\circ ?\}? ?", "°"),  # 90^\circ | f \circ g
    (r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", "*"),  # 4.5 x 10^{33} | 4 x 4
    (r"(\\?\$|[€£¥]) ?([-+]?[0-9][0-9.,]*(?: \*10\^\{[69]\})?)", r"\2 \1"),  # $5 | 5 $
    (r"\b([ap])\.m\.", r"\1m"),  # 9 a.m. | a.b.
    (r"(?<![\\A-Za-z])sqrt ?([0-9]+)", r"\\sqrt{\1}"),  # sqrt 12 | \sqrt12
    (r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1"),  # 2pi | pie
    (r"(\\(?:ln|log|sin|cos|tan)) ?\(([0-9A-Za-z]+)\)(?! ?[\w^({\\])", r"\1 \2"),  # \ln(2) | \ln(2)x
    (r"(?<=[0-9] )(?:square|sq) ([a-z]+)", r"\1^{2}"),  # 5 square cm | square root
    (r" per ", "/"),  # 12 miles per hour | 5 percent
    (r"\A([^,({]*)\\pm (.+)\Z", r"\1+(\2), \1-(\2)"),  # 2 \pm 1 | (2 \pm 1)
    (r"""\A\s*(["'`]+)(.+)\1\s*\Z""", r"\2"),  # 'y' | y'
    (r"\s+", " ")]]  # a  b | ab
GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])(?![^()\[\]]*[)\]])(?!.*\\\})")


def normalize(text: str) -> str:
    """The answer without what does not count, its notations made one."""
    text = text.translate(CHARACTERS)
    if not re.fullmatch(r"[-+0-9/.]+%?", text):
        text = WRAPPER.sub(r" \1 ", WRAPPER.sub(r" \1 ", text))  # 5\text{cm} is 5 cm
        text = re.sub(r"\\([A-Za-z]+|%)|[<>!]=|\b[mb]illion\b", lambda m: SYNONYMS.get(m[0], m[0]), text)
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
        text = GROUPED.sub(lambda match: match[0].replace(",", ""), text)  # but (1,234) are two numbers
    return text.strip(" *").removesuffix(".").strip()


# ------------------------------------------------------------------------------------------------- Answers
Number = namedtuple("Number", "value exact unit optional literal")  # optional: the unit may be missing
Group = namedtuple("Group", "brackets items")  # "" of a list
Named = namedtuple("Named", "name answer")  # x and 5 of x = 5
PREFIXES, SYMBOLS = ["", *"kMGTdcmµnp", "Ki", "Mi", "Gi"], "m g s L J N W Wh K Hz eV Pa V A C F T H Ω mol B"
UNITS = {p + name: p + name for name in SYMBOLS.split() for p in PREFIXES if p + name != "pm"}  # a time
for aliases in (
        r"$ \$ dollar USD; € euro EUR; ¥ yen; £ pound; ¢ cent; % percent; ° degree; °C celsius; °F; in inch;"
        "ft foot feet; mi mile; mi/h mph; km/h kmh; lb; oz; m meter; cm centimeter; km kilometer; g gram;"
        "kg kilogram; L l liter; mL ml; s second; min minute; h hr hour").split(";"):
    UNITS = {alias + plural: aliases.split()[0] for alias in aliases.split() for plural in ("", "s")} | UNITS
NOUN = re.compile(
    "(?!(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|lakh|pair|dozen|third|"
    "hal[fv]e?|quarter|[a-z]+(?:teen|ty|th|sand|illion|ed|ing|ly|ary|orial)|not|than|over|under|more|less|"
    "plus|minus|time|percentage|mod|root|power|inverse|mega|square|maybe|sin)s?$)(?=.*[aeiouy])[a-z]{3,}")
UNIT_NAME = r"(?!(?:and|or)\b)(?:\\?\$|[A-Za-zµΩ]++|°[CF]?|[€¥£¢%])"
UNIT = re.compile(rf"(?:(?: |/|(?![A-Za-z]\b))(?:{UNIT_NAME} ?(?:\^\{{?-?[0-9]\}}?)?[ */]?)++)?(?<![ */])")
ARITHMETIC = re.compile(r"(?:[-+*/^(){}0-9. ]|[eE](?=[-+]?[0-9])|\\(?:frac|sqrt|pi)(?![A-Za-z]))*")
DIGITS = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
FRACTION = r"(?:\\frac ?\{[-+]?[0-9]+\} ?\{[-+]?[0-9]+\}|[0-9]+ ?/ ?[-+]?[0-9]+)"
SCIENTIFIC = rf"(?:{DIGITS} ?\* ?)?10 ?\^ ?\{{?[-+]?[0-9]+\}}?|{DIGITS}(?:[eE][-+]?[0-9]+)?"
LITERAL = re.compile(rf"[-+]? ?[({{]? ?(?:[0-9]* ?{FRACTION}|{SCIENTIFIC})[)}} ]*")
VARIABLE = r"(?:[A-Za-z]|\\(?!(?:frac|sqrt|pi)\b)[A-Za-z]+)(?:_(?:[A-Za-z0-9]+|\{[A-Za-z0-9]+\}))?"
ARGUMENT = r"\((?:[A-Za-z]|(?:\\frac|\\sqrt|\\pi|[-+*/^0-9.,{} ])+)\)"  # f(2) | f(x + 1)
NAMES = rf"{VARIABLE}(?:{ARGUMENT})?|[A-Z]{{2}}|\((?:[a-z], ?)+[a-z]\)"
NAME = re.compile(rf"({NAMES}) ?(?:=|\\(?:in|approx)(?![a-z])) ?(?=[^ =])")
SEPARATOR = re.compile(r"(?P<open>\\?[(\[{])|(?P<close>\\?[)\]}])|[,;] ?(?:and |or )?|\b(?:and|or)\b")


def equal(a, b, finished: bool = False) -> bool:
    """Whether two parsed answers are the same. finished: only a literal equals a literal of b."""
    if isinstance(a, Named) and isinstance(b, Named) and a.name != b.name:
        return False
    a, b = (x.answer if isinstance(x, Named) else x for x in (a, b))
    if isinstance(a, Number) and isinstance(b, Number):
        x, y = (number.value / 100 if number.unit == "%" else number.value for number in (a, b))
        tolerance = 0 if a.exact and b.exact else TOLERANCE
        same_value = any(abs(x - y) <= tolerance * max(1, abs(x)) for x, y in ((x, y), (a.value, b.value)))
        same_unit = a.unit == b.unit or not a.unit and b.optional or not b.unit and a.optional
        return same_value and same_unit and (a.literal or not (finished and b.literal))
    if not isinstance(a, Group) or not isinstance(b, Group):
        return a == b
    brackets, rest = {a.brackets, b.brackets}, list(b.items)
    if len(a.items) != len(b.items) or len(brackets) > 1 and brackets not in ({"", "{}"}, {"", "[]"}):
        return False
    for x in a.items:  # in any order if neither has an order
        places = [i for i, y in enumerate(rest) if equal(x, y, finished)]
        if not places or places[0] > 0 and not brackets <= {"", "{}"}:
            return False
        del rest[places[0]]
    return True


def parse(text: str, depth: int = 0) -> Number | Group | Named | str:
    """A normalized answer, as the first of the kinds below that it can be read as."""
    # In this order, since {7} is a number, x = 1, 2 is a name of a list, and (1, 2), (3, 4) is a list.
    if depth <= MAX_DEPTH and (answer := as_number(text) or as_equation(text, depth)):
        return answer
    parts, brackets = split(text), ""
    if len(parts) < 2 and (match := re.fullmatch(r"(\\?[(\[{])(.*?)(\\?[)\]}])", text)):
        parts, brackets = split(match[2].strip()), match[1][-1] + match[3][-1]
    whole = brackets in ("{}", "()", "[]", "(]", "[)") or not brackets and len(parts) > 1
    if depth > MAX_DEPTH or not whole or not all(parts or [""]):
        text = re.sub(r"(?<=[0-9]) (?=[A-Za-z\\])| ?([^\w\s]) ?", r"\1", text)
        symbols = re.search(r"[^\w\s.,'-]|[\d_]|[a-z][A-Z]|\b[b-hj-zB-HJ-Z]\b", text)
        text = text if symbols else text.casefold()
        return {"yes": "true", "no": "false"}.get(text, text)
    items = [parse(part, depth + 1) for part in parts]
    if brackets == "{}":  # a set has each element once
        items = [x for i, x in enumerate(items) if not any(equal(x, y) for y in items[:i])]
    named = {item.name: item.answer for item in items if isinstance(item, Named)}
    if not brackets and len(named) == len(items):  # x = 1, y = 2 is (x, y) = (1, 2)
        names, answers = zip(*sorted(named.items(), key=lambda item: item[0]))
        return Named(f"({','.join(names)})", Group("()" if len(names) == 2 else "[]", answers))
    return Group("[]" if brackets == "()" and len(items) > 2 else brackets, items)


def split(text: str) -> list[str]:
    """The items of a list, separated outside all brackets; none if a bracket closes that none opened."""
    parts, start, depth = [], 0, 0
    for match in SEPARATOR.finditer(text):
        depth += bool(match["open"]) - bool(match["close"])
        if depth < 0 or len(parts) == MAX_ITEMS:
            return []
        if depth == 0 and not match["close"]:
            parts.append(text[start:match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def as_number(text: str) -> Number | None:
    number = ARITHMETIC.match(text)[0].rstrip()
    unit, literal = text[len(number):].replace("µ ", "µ"), bool(LITERAL.fullmatch(number))
    words = [name.lower() for name in re.findall(UNIT_NAME, unit) if name not in UNITS]
    noun = literal and unit[:1] == " " and all(len(word) > 2 for word in words)
    if not UNIT.fullmatch(unit) or words and not noun:
        return None
    try:
        tokens = ["", *reversed(TOKEN.findall(MIXED.sub(r"(\1+\2)", number)))]  # "" is the end
        value = climb(tokens, 1) if len(tokens) < MAX_TOKENS else PI
    except (ValueError, ArithmeticError):
        return None
    optional = not words or " " not in unit[1:] and all(map(NOUN.fullmatch, words))
    unit = re.sub(UNIT_NAME, lambda name: UNITS.get(name[0], name[0].lower()), unit).replace(" ", "")
    divided = value.denominator == 1 and re.search("/|frac", number)  # 12/2 is not worked out
    number = Number(value, not re.search("sqrt|pi", number), unit, optional, literal and not divided)
    return number if tokens == [""] else None


def as_equation(text: str, depth: int) -> Number | Group | Named | str | None:
    """x = 5 or f(2) = 9: a name and its answer. 2 * 8 = 16: the last side, if all sides are equal numbers."""
    name = NAME.match(text)
    exact, about, decimal = text[name.end() if name else 0:].partition("\\approx ")
    sides = [as_number(side.strip()) for side in exact.split("=")] if "=" in exact or about else []
    answer = parse(exact, depth + 1) if name and not sides else None
    if sides and all(sides) and all(equal(side, sides[-1]) for side in sides):
        digits = re.match(r"-?[0-9]+\.?([0-9]*)|", decimal)  # 1/3 if it rounds to 0.333
        rounded = digits[0] and round(sides[-1].value, len(digits[1])) == Fraction(digits[0])
        answer = sides[-1] if rounded or not about else None
    return Named(name[1].replace(" ", ""), answer) if name and answer else answer


# ---------------------------------------------------------------------------------------------- Arithmetic
# Rationals are exact. A root has more digits than an answer can have, so nothing rational passes for it. An
# identity in pi, which is transcendental, holds for any number; this one is too long to be written.
SCALE, TOLERANCE = 10 ** (MAX_LENGTH + 100), Fraction(1, 10 ** (MAX_LENGTH + 50))
PI = Fraction(math.pi) + Fraction(1, SCALE)
TOKEN = re.compile(rf" ?({DIGITS}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?|\\[a-z]+|\S)")
MIXED = re.compile(r"(?<![\w.^/}])([0-9]+) ?((?<= )[0-9]+/[0-9]+(?![\w.])|\\frac ?\{[0-9]+\} ?\{[0-9]+\})")
CLOSING = {"(": ")", "{": "}"}
PRECEDENCE = {"+": 1, "-": 1} | dict.fromkeys(["*", "/", "(", "{", "\\frac", "\\sqrt", "\\pi"], 2)  # 2(3)


def climb(tokens: list[str], level: int) -> Fraction:
    """The value of the next tokens, as far as operators of this precedence or a higher one go."""
    token = tokens.pop()
    if level > 3 and token not in CLOSING:  # TeX reads \sqrt12 as \sqrt{1}2
        raise ValueError("no argument")
    if token in CLOSING:
        value = climb(tokens, 1)
        if tokens.pop() != CLOSING[token]:
            raise ValueError("not closed")
    elif token in ("+", "-"):
        value = climb(tokens, 3) * int(token + "1")
    elif token == "\\frac":
        value = climb(tokens, 4) / climb(tokens, 4)
    elif token == "\\sqrt":
        value = climb(tokens, 4)
        root = math.isqrt(value.numerator * value.denominator * SCALE**2)
        value = Fraction(root, value.denominator * SCALE)  # sqrt(a / b) = sqrt(a b) / b
    else:
        value = PI if token == "\\pi" else Fraction(token)
    if tokens[-1] == "^" and level < 4:
        tokens.pop()
        exponent = climb(tokens, 3)
        bits = max(map(int.bit_length, value.as_integer_ratio())) * abs(exponent)
        if exponent.denominator > 1 or exponent <= 0 == value or bits > MAX_BITS:
            raise ValueError("a root, 0 to the power 0, or too large")
        value **= int(exponent)
    while (precedence := PRECEDENCE.get(tokens[-1], 0)) >= level:
        operator = tokens.pop() if tokens[-1] in "*/" else ""
        right = climb(tokens, precedence + 1)  # of a sum, its sign is left for it to read
        value = value + right if precedence == 1 else value / right if operator == "/" else value * right
        if max(map(int.bit_length, value.as_integer_ratio())) > MAX_BITS:
            raise ValueError("too large")
    return value


# ------------------------------------------------------------------------------------------------ Verdicts
def readable(answer, depth: int = 0) -> str:
    """An answer as text, "" if nothing equals it: None, NaN, empty text, an empty or unclosed marker."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer  # numpy's
    if isinstance(answer, (list, tuple)) and depth < MAX_DEPTH:
        items = [readable(item, depth + 1) for item in answer]
        return items[0] if len(items) == 1 else f"[{', '.join(items)}]" if items and all(items) else ""
    if isinstance(answer, (int, float)) and abs(answer) < 10**MAX_LENGTH:
        return str(answer)
    inside = marked(answer) if isinstance(answer, str) else ""
    return (stated(answer) or answer if inside is None else inside).strip()


def option(reference) -> str | None:
    """The letter of a reference that names an option: B, (B) or (B) Paris."""
    reference = normalize(readable(reference)[:MAX_LENGTH])
    return letter_of(reference) if LABEL.match(reference) else None


def is_equivalent(answer: str, reference, finished: bool = False) -> bool:
    """Whether two answers are the same, by the rules at the top of this file. Never raises."""
    letter, answer, reference = option(reference), readable(answer), readable(reference)
    if max(len(answer), len(reference)) > MAX_LENGTH:
        return answer.split() == reference.split()
    if letter:
        named = letter_of(answer)  # only a reference written a, not A or (a), is strict on case
        return bool(named) and letter in (named if reference in "abcdefghij" else named + named.swapcase())
    answer, reference = parse(normalize(answer)), parse(normalize(reference))
    return answer != "" and equal(answer, reference, finished)


def verify(response: str, reference, strict: bool = False) -> bool:
    """Whether the response's final answer is the reference, which may be a whole solution. Never raises."""
    answer = extract_answer(response, strict, bool(option(reference))) if isinstance(response, str) else None
    return is_equivalent(answer, reference, finished=True)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, strict=False, **kwargs) -> float:
    """The reward as verl calls it."""
    return float(verify(solution_str, ground_truth, strict))


def reward_func(completions, answer=None, solution=None, ground_truth=None, strict=False, **kwargs) -> list:
    """The reward as TRL calls it, of strings or messages; None, which TRL skips, if there is no reference."""
    references = next(x for x in (answer, solution, ground_truth, [None] * len(completions)) if x is not None)
    texts = [item if isinstance(item, str) else item[-1]["content"] if item else "" for item in completions]
    return [float(verify(*pair, strict)) if readable(pair[1]) else None for pair in zip(texts, references)]
