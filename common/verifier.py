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

# minus signs, full-width signs and digits, spaces
SAME = str.maketrans(
    "\u2212\u2013\u2010\u2011\ufe63\uff0d\uff0b\uff0e\uff0c\uff05\uff04"
    "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19"
    "\u00a0\u2002\u2003\u2009\u200a\u202f\u3000\t",
    "------+.,%$" + "0123456789" + " " * 8)
# LaTeX that sets a number and is no part of it
LATEX = [(r"\\[()\[\]!]|\$\$|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle", ""),
         (r"\\[,;: ]|~|\\q?quad(?![a-z])", " "), (r"\{,\}", ","), (r"\\\$", "$"),
         (r"\\%|\bper ?cent\b", "%"),
         (r"(?:\^\{?\\circ\}?|\\degree\b|\u00b0) *(?:[CF]\b)?", " degrees "),
         (r"\\times(?![a-z])|\\cdot(?![a-z])|\u00d7", "*"),
         (r"(?<=[0-9])\\([dt]?frac)", r" \\\1"),                            # 3\frac{1}{2} -> 3 1/2
         (r"\\[dt]?frac *\{ *(-?) *([0-9.]+) *\} *\{ *([0-9.]+) *\}", r"\1\2/\3"),
         (r"\\[dt]?frac *([0-9])(?: *([0-9])(?![0-9])| *\{([0-9]+)\})", r"\1/\2\3"),  # \frac12
         (r"(?<=[0-9]) +(?=[0-9]{3}(?: [0-9]{3})*(?![0-9]))(?<![0-9]{4} )", "\0")]
CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
INTEGER = "(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)"  # 12,34,567 too
VALUE = re.compile(rf"""
    (?: (?P<sign>[-+]) (?P<space>[ ]*) )? (?: [{CURRENCY}] [ ]* (?P<inner>-?) [ ]* )?
    (?: (?P<whole>[0-9]+) [ ]+ (?=[0-9]+/[0-9]) )?                          # the 3 of 3 1/2
    (?P<number> {INTEGER} (?:\.[0-9]+)? | \.[0-9]+ )
    (?: / (?P<below>[0-9]+(?:\.[0-9]+)?)                                    # the 2 of 1/2
      | (?:[eE] | [ ]*[*x][ ]*10\^\{{?) (?P<power>[-+]?[0-9]{{1,3}}) \}}? )?   # 6e5, 6 x 10^5
    (?! [0-9] )""", re.X)

# words that make another number of the one before them
SCALES = set("""hundred hundreds thousand thousands million millions billion billions trillion
    trillions k bn mn lakh lakhs crore crores dozen dozens score squared cubed factorial half halves
    third thirds quarter quarters fourth fourths fifth fifths tenth tenths hundredth
    hundredths""".split())
# words with which it is an expression, a list, a time or a date
OTHER = SCALES | set("""or and to through until by times x plus minus over divided multiplied mod
    modulo remainder r root of out more less fewer than point pi am pm noon bc ad january february
    march april may june july august september october november december jan feb mar apr jun jul aug
    sep sept oct nov dec""".split())
WORD = re.compile(r"[^\W\d_]+(?:['.-][^\W\d_]+)*")
LATEX_UNIT = re.compile(r" *\\(?:text|mathrm|textrm|mbox) *\{([^\W\d_]|[ ./'-])*\}")


def plain(text):
    """A text with one spelling for each sign, and without the LaTeX that only sets numbers."""
    text = text.translate(SAME)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    return text.replace("\0", "")                      # 1 234 567 -> 1234567


def value_of(found):
    """The exact Fraction of a match of VALUE, or None."""
    signs = (found["sign"] or "") + (found["inner"] or "")
    try:
        value = Fraction(found["number"].replace(",", "")) / Fraction(found["below"] or 1)
        value += Fraction(found["whole"] or 0)
        value *= Fraction(10) ** int(found["power"] or 0)
    except (ZeroDivisionError, ValueError):            # ValueError: thousands of digits
        return None
    if len(signs) > 1:
        return None
    return -value if signs == "-" else value


def is_unit(text, max_words):
    """Whether what stands behind a number is a unit of at most so many words, or nothing. With many
    words it may be a sentence, which says no more about the number."""
    if re.match(r"[*_` ]*[-/!:'(]", text) or max_words <= 3 and re.search("[(!]", text):
        return False
    for found in LATEX_UNIT.finditer(text):            # a letter in \\text is no variable
        if OTHER.isdisjoint(WORD.findall(found[0].lower())):
            text = text.replace(found[0], " units", 1)
    text = re.sub(r"(?<=[A-Za-z])\^\{?[23]\}?|[\u00b2\u00b3]", "", text)         # cm^2
    text = text.strip().strip(f".%*{CURRENCY} ")
    if re.search(r"""[^\w\s.,;:!?()"'/-]|[\d_]""", text):
        return False
    words = WORD.findall(text.lower())
    if len(words) > max_words or not OTHER.isdisjoint(words):
        return False
    letters = words if max_words <= 3 else words[:1]   # 3x; behind a sentence's number also "a"
    return not any(len(word) == 1 and word.isascii() for word in letters)


def whole_number(text, max_words=3):
    """The Fraction that a text is as a whole, but for a unit; None if it is anything else."""
    text = plain(text).strip().strip("*_`").strip()
    inner = re.fullmatch(r"\\(?:text|mathrm|mathbf|textbf|bf) *\{([^{}]*)\}", text)
    text = inner[1].strip() if inner else text
    found = VALUE.match(text)
    if not found or not is_unit(text[found.end():], max_words):
        return None
    return value_of(found)


def last_number(text):
    """The last number of a text without a mark, unless it is a part of a formula, a list or a
    larger number: "1 or 2", "\\sqrt{2}", "3x" and "5 million" give None."""
    text = plain(text)
    found = None
    for found in VALUE.finditer(text):
        pass
    if found is None:
        return None
    before, after = text[:found.start()], text[found.end():]
    if re.search(r"\d", after) or re.search(r"[\w.^/\\*({\[]$|\d[,:]$", before):
        return None
    operator = re.search(r"(?:\d|\)|\b[A-Za-z]) *$", before)         # 5 - 42, x - 42
    if found["sign"] and (operator or found["space"]):
        return None
    if re.search(r"\d[^\s\d]*(?: [A-Za-z]+)?(?:,| or| and| to| through)\s*$", before):
        return None
    if re.match(r"\s*[\^_\\{(\[*/+=<>!-]|\s?[A-Za-z]\b", after):
        return None
    word = WORD.match(after.strip().lower())
    if word and word[0] in SCALES:
        return None
    return value_of(found)


def answer_number(text):
    """The number that a response gives as its answer, as an exact Fraction, or None.

    What stands after the last "####" must begin with it, else the last \\boxed{...} must be it,
    else the text is it, or it is the last number of the text. 5% is 5; "42." and "42.0" are 42."""
    if "####" in text:
        text = text.rpartition("####")[2].split("\n")[0]
        if "\\boxed" not in text:
            return whole_number(text, max_words=1000)
    if "\\boxed" in text:
        return whole_number(in_braces(text.rpartition("\\boxed")[2].lstrip()))
    number = whole_number(text)
    return last_number(text) if number is None else number


def gold_number(answer):
    """The number that a row calls right, as an exact Fraction: of what stands after "####", in a
    last box, or of all of it, which must be one number with at most a unit. None for anything else,
    for which a row is dropped."""
    text = str(answer)
    if "####" in text:
        text = text.rpartition("####")[2]
    if "\\boxed" in text:
        text = in_braces(text.rpartition("\\boxed")[2].lstrip())
    return whole_number(text)


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
    return "\\boxed" in text or whole_number(text.rpartition("####")[2], max_words=0) is not None


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
