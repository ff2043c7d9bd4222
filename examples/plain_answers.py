r"""A lenient verifier for outputs that follow no format: for evaluation, and an example of a reward.

    python icpo.py --reward examples.plain_answers:verify ...

What verify.py accepts counts; if there is a \boxed{}, <answer> or ####, it alone decides. Else, in order:

 1. the last "answer is ..." or "answer: ..." that says something, up to the end of its clause;
 2. for an option, a sentence like "It is B" or "So B is correct", or a first or last line "B" or "B) 12";
 3. the whole response, if it is one short line; else what the last sentence ends in, a number or an equation.

A sentence that denies, doubts, supposes or asks says nothing. Of several answers, none counts.
A policy trained on this learns whatever it lets through: train on verify.py if you can.
"""

import re

from verify import MARKER, is_equivalent, option, texts
from verify import verify as strict

SPECIAL_TOKENS = r"(?:\s*<[|/]?[a-z_]+\|?>)+\s*\Z"
BE = r"(?: is| was| equals| (?:should|must|would|will|seems to) be|(?: is)?:| seems)(?![\w'])"
SURELY = r"therefore|thus|definitely|approximately|about|clearly|(?:most )?likely(?: to be)?|for sure|\.\.\."
HEDGE = rf"(?:[ :]*(?:{SURELY})\b,?)*"
ANSWER = re.compile(rf"(?i)answer\s?(?:\([^()\n]*\))?{BE}{HEDGE}(?: (?:letter|option|choice))?[ :]*")
HEADING = re.compile(r"(?i)^\W*(?:final )?answer:?\W*\n+", re.MULTILINE)
CLAUSE_END = re.compile(
    r"(?<!\bvs)(?<!\bsq)[.!?](?=[\s$\"]|$)|\n|;|,? (?:because|since|as (?!well)|so that)\b|"
    r", (?:so|not|in|although|it|I|for)\b|"
    r" \((?!or\b)[a-z]{2}| [-–—] |--|, (?!which is \S*\d)(?=[a-z\"“][a-z]+)")
DENIAL = re.compile(
    r"(?i)\b(?:not|no|never|neither|nor|cannot|wrong|incorrect|false|doubt|whether|if|suppose|assume|"
    r"might|maybe|perhaps|either|except|unless|rules? out|unclear|any|but)\b|n't\b|n’t\b|\?")
QUESTION = r"is there anything else[^.?!]*\?|do you have any other[^.?!]*\?"
CHATTER = re.compile(rf"(?i)\s*(?:{QUESTION}|i hope (?:this|it|that)[^.?!]*[.!])\s*$")
LETTER = re.compile(
    r"(?i:answer|choice|option|it|so|hence|thus|therefore|choose|pick|found|think it)(?i: is|'s)?:? (?:in )?"
    r"[\"'“(*$]*([A-J])[\"'”)*$]*(?=[.,;:]|$| (?:is|because|since)\b| [—-])")
CORRECT = re.compile(r"(?:^|[ (])([A-J])\)? is (?:the )?(?:(?:correct|right|best)\b|answer)")
VALUE = r"(?:\\?\$|[€£])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\\?%?"
NUMBER = re.compile(
    rf"(?:.*(?<![\w.,/:({{^+*×÷<>=≤≥-])(?<![-+*/×÷<>≤≥:] )(?<![\d,] )|)(-?{VALUE})"
    r"(?:['°]|\s?[a-zA-Z][\w/^]*|\s?square|\s?cubic){0,6}$")
ALTERNATIVES = re.compile(
    r"(?i)\b(?:or|and|to|between|than|log|root|minus|negative|of|x)\s*$|\d[;,]? (?:\w+ )?(?:or|and) ")
NO_BARE_ANSWER = re.compile(r"(?i)(?:so|it|is|the|hence|thus) |.*\d-\d|(?=.*(?:[a-z]{3}|=))\S+(?: \S+){3}")


def sentence_before(text: str, at: int) -> str:
    return re.split(r"[.!?\n]\s", text[max(0, at - 300):at])[-1]


def stated(text: str) -> str | None:
    """What the last phrase with "answer" says that says something; "" if it is denied."""
    for phrase in reversed([*ANSWER.finditer(text), *HEADING.finditer(text)]):
        said = text[phrase.end():phrase.end() + 300].lstrip("\n *:")
        clause = CLAUSE_END.split(said, maxsplit=1)[0].strip(" *\"'“”`")
        if clause.count("$") == 1 and clause[0] == "$" and said[len(clause):][:1] == ".":  # $40_9.$
            clause = clause[1:]
        if re.search(r"(?i)\b(?:wrong|incorrect)\s*$", text[:phrase.start()][-20:]):
            return ""
        if re.match(r"\W*$|(?:correct|right|consistent|unknown|chosen)\b", clause):
            continue
        asked = said[len(clause):].lstrip(" *")[:1] == "?"
        return "" if asked or DENIAL.search(sentence_before(text, phrase.start())) else clause
    return None


def letter(text: str) -> str | None:
    """The option that a text decides for, if it is one."""
    said = stated(text)
    if said is not None:
        said = re.sub(r"^(?:I think it is|it is|it's) ", "", said)
        named = re.fullmatch(r"[\w ]+ \(([A-J])\)", said)
        return named[1] if named else option(re.sub(r"[\"'“”`]", "", said))[0]
    found = {x[1] for pattern in (LETTER, CORRECT) for x in pattern.finditer(text)
             if not DENIAL.search(sentence_before(text, x.end()) + re.split(r"[.\n]", text[x.end():])[0])}
    if found:
        return found.pop() if len(found) == 1 else None
    lines = [line.strip(" \"'“”") for line in (text.split("\n", 1)[0], text.rsplit("\n", 1)[-1])]
    named = {option(line)[0] for line in lines} - {""}
    return named.pop() if len(named) == 1 and len(re.findall(r"(?m)^\W?[A-Ja-j][).:]", text)) < 2 else None


def answer(text: str) -> str | None:
    """What a text gives as its answer, if it is not an option."""
    said = stated(text)
    if said is not None:
        number = NUMBER.fullmatch(said) if re.match(r"[A-Za-z]{2,} \S+ \S", said) else None
        if number and (DENIAL.search(said) or ALTERNATIVES.search(said[:number.start(1)])):
            return None
        return said[number.start(1):] if number else re.sub(r"^.*?(?:, which is|\bis) (?=\S*\d)", "", said)
    last = text.rsplit("\n", 1)[-1].strip()
    if last == text and len(last) < 60 and not NO_BARE_ANSWER.match(last):
        return last
    last = re.split(r"[.!?] (?=[A-Z])", last.rstrip(" .*$`\"'"))[-1].replace("*", "").replace("`", "")
    if DENIAL.search(last) or ALTERNATIVES.search(last):
        return None
    if re.search(r"[^<>]= *[^=]+$", last) and not re.search(r"[a-z]{3,} \d+ [a-z]{3,}", last):
        return re.sub(r"^.*=", "", last.strip("$ "))
    number = NUMBER.fullmatch(last)
    if number is None or ALTERNATIVES.search(last[:number.start(1)]):
        return None
    return last[number.start(1):]


def verify(response: str, reference) -> bool:
    """Whether a response without a format gives the reference answer. Never raises."""
    if not isinstance(response, str) or strict(response, reference):
        return isinstance(response, str)
    text = response.rsplit("</think>", 1)[-1].split("<think>", 1)[0]
    if MARKER.search(text):
        return False
    text = re.sub(SPECIAL_TOKENS, "", text[-2000:].replace("**", "").replace("\r", "")).strip()
    text = CHATTER.sub("", text).strip()
    options = {option(right)[0] for right in texts(reference)} - {""}
    return is_equivalent(letter(text) if options else answer(text), reference, finished=True)
