"""
The numeric verifier: the number that a text states, compared exactly. Nothing is evaluated or
guessed: what is not wholly one number is none. A right response that is not recognised loses a
reward; a wrong one that is paid teaches the model to be wrong.
"""
import functools
import math
import os
import re
import traceback
from fractions import Fraction

from common.tokenizer import InputError

RULES = ("rule", "math")          # values of --reward that name no reward model
LONGEST = 200                     # characters of a number with its unit; a longer text is none

# minus signs, full-width signs and digits, spaces; \0 is used below
SAME = str.maketrans(
    "\u2212\u2013\u2010\u2011\ufe63\uff0d\uff0b\uff0e\uff0c\uff05\uff04"
    "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19"
    "\u00a0\u2002\u2003\u2009\u200a\u202f\u3000\t\0",
    "------+.,%$" + "0123456789" + " " * 9)
# LaTeX that sets a number and is no part of it
LATEX = [(r"\\!", ""), (r"\{,\}", ","), (r"\\\$", "$"), (r"\\%|\bper ?cent\b", "%"),
         (r"\\[()\[\]]|\$\$|\\(?:left|right)(?![a-z])|\\displaystyle|\\q?quad(?![a-z])", "  "),
         (r"\\[,;: ]|(?<=[0-9])~", " "),
         (r"(?:\^\{?\\circ\}?|\\degree\b|\u00b0)(?: ?(?:[CF]\b|\\(?:text|mathrm)\{ ?[CF]\}))?",
          " degrees "),
         (r"\\times(?![a-z])|\\cdot(?![a-z])|\u00d7", "*"),
         (r"(?<=[0-9])\\([dt]?frac)", r" \\\1"),                            # 3\frac{1}{2} -> 3 1/2
         (r"\\[dt]?frac ?\{ ?(-?) ?([0-9.]+) ?\} ?\{ ?([0-9.]+) ?\}", r"\1\2/\3"),
         (r"\\[dt]?frac ?([0-9])(?: ?([0-9])(?![0-9])| ?\{([0-9]+)\})", r"\1/\2\3"),  # \frac12
         (r"(?<=[0-9]) (?=[0-9]{3}(?: [0-9]{3}){0,5}(?![0-9]))(?<![0-9]{4} )", "\0")]
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
INTEGER = "(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)"  # 12,34,567
VALUE = re.compile(rf"""
    (?: (?P<sign>[-+]) (?P<space>[ ]*) )? (?: [{CURRENCY}] [ ]* (?P<inner>-?) [ ]* )?
    (?: (?P<whole>[0-9]+) [ ] (?=[0-9]+/[0-9]) )?                           # the 3 of 3 1/2
    (?P<number> {INTEGER} (?:\.[0-9]+)? | \.[0-9]+ )
    (?: / (?P<below>[0-9]+(?:\.[0-9]+)?)                                    # the 2 of 1/2
      | (?: [eE] (?P<power>[-+]?[0-9]{{1,3}})                                 # 6e5
        | [ ]?[*x][ ]?10\^ (?: \{{ (?P<braced>[-+]?[0-9]{{1,3}}) \}} | (?P<digit>-?[0-9]) ) ) )?
    (?! [0-9] )""", re.X)

# what may stand behind a number in a row's answer or in a box
UNITS = set("""degrees degree percent unit units square cubic sq cu per
    mm cm dm km meter meters metre metres centimeter centimeters kilometer kilometers inch inches ft
    foot feet yd yard yards mi mile miles acre acres hectare hectares
    sec second seconds min minute minutes hr hrs hour hours day days week weeks month months year
    years mg kg gram grams kilogram kilograms lb lbs pound pounds oz ounce ounces ton tons tonne
    tonnes ml liter liters litre litres gallon gallons quart quarts pint pints cup cups
    mph kph kmh radian radians hz watt watts volt volts joule joules newton newtons
    dollar dollars cent cents usd euro euros eur yen rupee rupees pesos peso rs gbp
    point points people person students ways""".split())
LETTER_UNITS = set("mgshL")       # in \text{} alone: elsewhere a letter is a variable
LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox) ?\{([A-Za-z ./~]*)\}")
# words behind a number, or before one without a mark, with which it is another number or none
OTHER = set("""hundred hundreds thousand thousands million millions billion billions trillion
    trillions k m bn mn mio mil tn lakh lakhs crore crores dozen dozens score pair pairs squared
    cubed factorial half halves third thirds quarter quarters fourth fourths fifth fifths sixths
    sevenths eighths ninths tenth tenths hundredth hundredths thousandth thousandths doubled
    tripled halved twice mln quadrillion repeating recurring
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety zero
    or nor to through until by times x plus minus over divided multiplied mod modulo remainder r
    root of out more less fewer than point pi base binary choose vs versus
    not no never wrong incorrect maybe perhaps approximately about around roughly nearly almost
    isn't if unless otherwise below above negative
    am pm noon o'clock bc ad bce ce january february march april may june july august september
    october november december jan feb mar apr jun jul aug sep sept oct nov dec""".split())
BEFORE = set("""not no least most than about around roughly nearly almost approximately maybe
    perhaps by times plus minus over twice half between or except base page step chapter sqrt log ln
    sin cos tan""".split())
WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+|\.[A-Za-z](?![A-Za-z]))*")         # isn't, p.m


def plain(text):
    """A text with one spelling for each sign, and without the LaTeX that only sets numbers."""
    text = text.translate(SAME)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    return text.replace("\0", "")                      # 1 234 567 -> 1234567


def value_of(found):
    """The exact Fraction of a match of VALUE, or None."""
    signs = (found["sign"] or "") + (found["inner"] or "")
    power = found["power"] or found["braced"] or found["digit"] or 0
    try:
        value = Fraction(found["number"].replace(",", "")) / Fraction(found["below"] or 1)
        if found["whole"] and (not 0 < value < 1 or "." in found["below"]):      # 3 5/2
            return None
        value = (value + int(found["whole"] or 0)) * Fraction(10) ** int(power)
    except (ZeroDivisionError, ValueError):            # ValueError: thousands of digits
        return None
    if len(signs) > 1:
        return None
    return -value if signs == "-" else value


def is_unit(text):
    """Whether what stands behind a number is nothing, or a unit that is known."""
    if text[:1] in ("-", "/", "'") or text.startswith(".."):
        return False
    for found in LATEX_TEXT.finditer(text):
        inner = found[1].strip(" ~")
        text = text.replace(found[0], " units " if inner in LETTER_UNITS else f" {inner} ", 1)
    text = re.sub(r"(?<=[A-Za-z]) ?(?:\^\{?[23]\}?|[\u00b2\u00b3])", "", text)   # cm^2
    text = text.strip().strip(f".%{CURRENCY} ")
    return re.fullmatch("[A-Za-z ./-]*", text) is not None and UNITS.issuperset(words_of(text))


def words_of(text):
    """Its words in lower case, p.m. as pm."""
    return [word.replace(".", "") for word in WORD.findall(text.lower())]


def is_sentence(text):
    """Whether words follow a number that do not change it: no digit, sign, number or negation."""
    text = text.strip().strip("*_`")
    words = words_of(text)
    if not re.fullmatch(r"[,;]? ?[A-Za-z][A-Za-z ,;.!?'\"-]*", text) or len(words) > 20:
        return False
    is_word = len(words[0]) > 2 or words[0] in UNITS | {"is", "in", "at", "on"}
    return is_word and OTHER.isdisjoint(words)


def whole_number(text, in_sentence=False):
    """The Fraction that a text is as a whole, but for a unit; None if it is anything else.
    in_sentence: words may follow."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    text = text.strip("*_` ")
    if text.count("$") == 2:                           # $42$ is mathematics, $42 is money
        text = text.strip("*_`$ ")
    text = plain(text).strip()
    inner = re.fullmatch(r"\\(?:text|mathrm|mathbf|textbf|bf) ?\{([^{}]*)\}", text)
    text = inner[1].strip() if inner else text
    text = re.sub(r"^[A-Za-z] ?= ?", "", text)         # x = 42
    found = VALUE.match(text)
    if not found:
        return None
    rest = text[found.end():]
    if is_unit(rest) or in_sentence and rest[:1] in (" ", ",", "*") and is_sentence(rest):
        return value_of(found)
    return None


# what stands beside a last number that is not the answer
NOT_BEFORE = [
    r"[^\s=\"'(:]$|[^A-Za-z]:$",                               # v1.42, x_42, 12:42
    r"[^\sA-Za-z=.,!?)\"'>:]\s*$|\s:\s*$",                     # 5 - 42, 3 / 42, 3 : 42
    r"[<>!~]=\s*$|[<>]\s*$",                                   # x > 42, x != 42
    r"[0-9][,'\"]\s*$|\(-?[0-9.]*,?\s*$",                      # 1, 42; (42
    r"\\[a-zA-Z]+\s*$|\bout of\s*$",                           # \neq 42, 3 out of 42
    r"[0-9]\W*(?:or|and)?\W*[A-Za-z] ?=\s*$",                  # x = 4 or x = 42
    r"[0-9]\S*(?: [A-Za-z]+){0,3}(?:,| or| and)\s*$",          # 1, 2 and 42
    r"[0-9]\S*(?: [A-Za-z]+)? (?:to|through)\s*$",             # 5 km to 42
    rf"(?i)[0-9] ?(?:{'|'.join(sorted(UNITS))})\s*$",          # 4 hours 42
    rf"(?i)\b(?:{'|'.join(sorted(BEFORE))}|\w+n't)\s*$",       # not 42, twice 42
]
NOT_AFTER = [
    rf"[^\s.,;:!?)%\"'*\]{CURRENCY}A-Za-z]|[A-Za-z](?![A-Za-z])",            # 42^2, 42x
    rf"(?i)(?!(?:{'|'.join(sorted(UNITS))}|st|nd|rd|th)\b)[a-z]",            # 42xy
    r"\s+[B-Zb-z](?![A-Za-z'])",                               # 42 x
]


def last_number(text):
    """The last number of a text without a mark, unless it is a part of a formula, a list or a
    larger number, or is hedged: "1 or 2", "\\sqrt{2}", "3x", "5 million", "not 7" give None."""
    is_cut = len(text) > 5 * LONGEST
    text = plain(re.sub("<<[^<>]*>>", "", text[-5 * LONGEST:]))                 # GSM8K's calculator
    text = re.sub(r"\*\*(?=[^*]*\*\*)([^*]*)\*\*", r" \1 ", text)               # bold
    found = None
    for found in VALUE.finditer(text):
        pass
    if found is None or is_cut and found.start() == 0:
        return None
    before, after = text[:found.start()], text[found.end():]
    if any(re.search(pattern, before) for pattern in NOT_BEFORE):
        return None
    if any(re.match(pattern, after) for pattern in NOT_AFTER):
        return None
    if found["sign"] and (found["space"] or re.search(r"\)\s*$|\b[A-Za-z]\s*$", before)):
        return None                                    # x - 42
    words = words_of(after)
    return None if words and words[0] in OTHER else value_of(found)


# what stands beside a box that is not the answer: a sign, factor, power, operator or alternative
BOX = r"\\f?boxed"
NOT_BEFORE_BOX = r"[-+*/^_{<>]$|\\[a-z]+$|\b(?:or|not|and)$"
NOT_AFTER_BOX = r"[\^_!*/+=<>]|\\(?:pi|sqrt|cdot|times|frac|pm)|[a-zA-Z]\b"


def box_contents(text):
    """The contents of all \\boxed{...}, "" where braces do not close."""
    return [in_braces(part.lstrip()) for part in re.split(BOX, text)[1:]]


def is_last_box_alone(text):
    """Whether nothing beside the last \\boxed{...} makes its content another number, or one of
    several: -\\boxed{5}, \\boxed{5}\\pi, \\boxed{5} million, \\boxed{4} or \\boxed{5}."""
    contents = box_contents(text)
    parts = re.split(BOX, text)
    before = parts[-2].rstrip(" $\n")
    if re.search(NOT_BEFORE_BOX, before):
        return False
    if len(contents) > 1:
        between = before[len(contents[-2]) + 1:].lstrip("} ")
        if re.fullmatch(r"[\s,;:$]*(?:or|and)?[\s,;:$]*", between):
            return False
    after = parts[-1].lstrip()[len(contents[-1]) + 2:].lstrip(" $")
    after = LATEX_TEXT.sub(r" \1 ", after).lstrip()
    if re.match(NOT_AFTER_BOX, after):
        return False
    word = words_of(after[:30])[:1] if after[:1].isalpha() else []
    return (OTHER - {"if", "not"}).isdisjoint(word)    # these two may begin the next sentence


def answer_number(text):
    """The number that a response gives as its answer, as an exact Fraction, or None.

    What stands after the last "####" must begin with it, or the last \\boxed{...}, if that comes
    later, must be it; without either the text is it, or it is the last number of the text. 5% is 5;
    "42." and "42.0" are 42."""
    if text.rfind("\\boxed") > text.rfind("####"):
        return whole_number(box_contents(text)[-1]) if is_last_box_alone(text) else None
    if "####" in text:
        line = text.rpartition("####")[2].strip().split("\n")[0]
        if re.match(r"[0-9]+[.)] +[A-Za-z]", line):    # "#### 1. Check" is a heading
            return None
        return whole_number(line, in_sentence=True)
    number = whole_number(text)
    return last_number(text) if number is None else number


def gold_number(answer):
    """The number that a row calls right, as an exact Fraction: of what stands after "####", in its
    boxes, which must agree, or of all of it. It must be wholly one number with at most a unit. None
    for anything else, for which a row is dropped."""
    try:
        text = str(answer)
    except ValueError:                                 # thousands of digits
        return None
    if "####" in text:
        text = text.rpartition("####")[2]
    if "\\boxed" not in text:
        return whole_number(text)
    numbers = {whole_number(content) for content in box_contents(text)}
    return numbers.pop() if len(numbers) == 1 and is_last_box_alone(text) else None


def math_score(row, response):
    """The score of --reward math: mathematics beyond numbers (radicals, intervals, sets, symbols),
    compared by the package math-verify. None for a row whose answer it cannot read."""
    gold = parse_gold(str(row.get("answer")))
    if not gold:
        return None
    from math_verify import parse, verify
    return float(verify(gold, parse(response)))


@functools.lru_cache(maxsize=100_000)
def parse_gold(answer):
    """What math-verify reads in a row's answer, [] for nothing."""
    try:
        from math_verify import parse
    except ImportError:
        raise InputError("--reward math: pip install math-verify") from None
    if "####" in answer:
        answer = answer.rpartition("####")[2]
    if "\\boxed" not in answer:
        answer = f"\\boxed{{{answer.strip()}}}"
    return parse(answer)


def states_number(text):
    """Whether a text marks its answer, once: alone after a last "####", or in \\boxed{...}."""
    marks = text.count("####") + text.count("\\boxed")
    if marks != 1 or answer_number(text) is None:
        return False
    tail = plain(text.rpartition("####")[2]).strip().rstrip(".%")
    return "\\boxed" in text or VALUE.fullmatch(tail) is not None


def is_right(score):
    """Whether a score, or each of a tensor of them, is full: 1 or more. Partial credit may sum to 1
    but for rounding, as .7 + .2 + .1 does."""
    return score >= 1 - 1e-6


def in_braces(text):
    """"{a{b}}c" -> "a{b}"; "" where the braces do not close."""
    depth = 0
    for i, c in enumerate(text):
        if c == "{":
            depth += 1
        if c == "}":
            depth -= 1
        if depth == 0:
            return text[1:i] if i else ""
    return ""


def checked_score(score, row, text, need=True):
    """score(row, text), a finite number; without `need` also None, for a row that does not say what
    is right. Any other value, or an exception, is one line with the row."""
    try:
        x = score(row, text)
        if x is None and not need:
            return None
        if hasattr(x, "__float__") and math.isfinite(x):
            return x
        problem = f"returned {x!r}, which is no finite number"
    except InputError:
        raise
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        message = " ".join(str(e).split())
        file = os.path.basename(last.filename)
        problem = f"raised {type(e).__name__}: {message} ({file}:{last.lineno})"
    where = row.get("_line") or repr(row["prompt"])
    raise InputError(f"score {problem}, on {where} with the response {text[:80]!r}")
