"""
The numeric verifier: the number that a text states, compared exactly. Nothing is evaluated.
"""
import math
import os
import re
import traceback
from fractions import Fraction

from common.tokenizer import InputError

NUMBER = re.compile(r"""
    (?<![0-9A-Za-z.]) (?<![0-9][eE][-+])               # not inside a word, a decimal or an exponent
    ([-+]?) \$? (?: ([0-9]+) [ ]+ (?=[0-9]+/[0-9]) )?               # sign; the 3 of 3 1/2
    ( (?: [0-9]{1,3} (?:,[0-9]{3})+ | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )  # 1,234.5 or 1234.5 or .5
    (?! [0-9] | \.[0-9] | [eE][-+]?[0-9] )                          # and all of it
    (?: / ([0-9]+ (?:\.[0-9]+)?) )?                        # the denominator of a fraction""", re.X)


def answer_number(text):
    """The number that a text gives as its answer, as an exact Fraction, or None.

    After the last "####" if there is one, else in the last \\boxed{...}, else the last number of
    the text. Commas, $ and % are dropped (5% is 5); signs, decimals, fractions and mixed numbers
    count; "42." and "42.0" are 42. A formula such as \\sqrt{2} after "####" or in a box is no
    number. Nothing is evaluated."""
    text = text.replace("\u2212", "-")                 # the minus sign of Unicode
    marked = "####" in text or "\\boxed" in text
    if "####" in text:
        text = text.rpartition("####")[2].split("\n")[0]
    if "\\boxed" in text:
        text = in_braces(text.rpartition("\\boxed")[2].lstrip())
    text = re.sub(r"(?<=[0-9])\\([dt]?frac)", r" \\\1", text)               # 3\frac{1}{2} -> 3 1/2
    text = re.sub(r"\\[dt]?frac\{([0-9.]+)\}\{([0-9.]+)\}", r"\1/\2", text)
    for latex, plain in (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\!", ""), ("\\text", ""),
                         ("$-", "-$")):
        text = text.replace(latex, plain)
    found = NUMBER.findall(text)
    if not found or marked and ("\\" in text or "^" in text):
        return None
    sign, whole, numerator, denominator = found[0] if marked else found[-1]
    try:
        value = Fraction(numerator.replace(",", "")) / Fraction(denominator or 1)
        value += Fraction(whole or 0)
    except (ZeroDivisionError, ValueError):            # ValueError: thousands of digits
        return None
    return -value if sign == "-" else value


def states_number(text):
    """Whether a text marks its answer, once: alone after a last "####", or in \\boxed{...}."""
    tail = text.replace("\u2212", "-").rpartition("####")[2].strip().rstrip(".%")
    alone = "\\boxed" in text or NUMBER.fullmatch(tail)
    marks = text.count("####") + text.count("\\boxed")
    return bool(alone and marks == 1 and answer_number(text) is not None)


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
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        message = " ".join(str(e).split())
        file = os.path.basename(last.filename)
        problem = f"raised {type(e).__name__}: {message} ({file}:{last.lineno})"
    where = row.get("_line") or repr(row["prompt"])
    raise InputError(f"score {problem}, on {where} with the response {text[:80]!r}")
