"""The number that a response gives as its answer: an adversarial table, and all of GSM8K where its
files are.   python -m pytest tests/test_numbers.py"""
import json
import os
import random
import sys
from fractions import Fraction

import pytest

import grpo
from common.verifier import (answer_number, gold_number, math_score, parse_gold,
                             states_number)
from conftest import ROOT, quick

TABLE = [
    # "####" first, the last one; then the last \boxed{}; then the last number
    ("so 7\n#### 42", 42), ("#### 1\n#### 42", 42), ("#### 42\nand 7 more", 42),
    (r"\boxed{7} #### 42", 42), ("####42", 42),
    (r"it is \boxed{42}, not 7", 42), (r"\boxed{7} then \boxed{42}", 42),
    (r"\boxed {42}", 42), (r"\boxed{42\,}", 42), (r"\boxed{\text{42}}", 42),
    ("first 7, then 42", 42), ("The answer is 42.", 42), ("42", 42), ("A: 42\n", 42),
    (r"#### \boxed{42}", 42), ("#### **42**", 42),
    # the forms of one number
    ("#### 42.", 42), ("#### 42.0", 42), ("#### 42.00", 42), ("#### 042", 42), ("#### +42", 42),
    ("#### $42", 42), ("$42.00.", 42),
    ("#### 1,234", 1234), ("#### $1,234,567.50", Fraction("1234567.5")), ("1{,}234", 1234),
    (r"\$42", 42), ("#### 42 dollars", 42), ("#### .5", Fraction(1, 2)),
    ("#### -42", -42), ("#### \u221242", -42), ("#### -$42", -42), ("#### $-42", -42),
    ("it fell to -42", -42), ("10-5=5", 5),
    ("#### 5%", 5), ("5 %", 5), ("#### 0.05", Fraction(1, 20)), ("#### 3/4", Fraction(3, 4)),
    (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
    (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)), ("#### 6/8", Fraction(3, 4)),
    ("#### -1/2", Fraction(-1, 2)), ("#### 1.5/3", Fraction(1, 2)), ("#### 0", 0), ("#### -0", 0),
    (r"\boxed{3\frac{1}{2}}", Fraction(7, 2)), ("#### 3 1/2", Fraction(7, 2)),
    ("#### -3 1/2", Fraction(-7, 2)), (r"\boxed{5\%}", 5), (r"\boxed{1{,}234}", 1234),
    (r"\boxed{\$42}", 42), (r"\boxed{42\text{ km}}", 42), (r"\boxed{42 \mathrm{~cm}^2}", 42),
    ("#### - 42", -42), ("#### \u201342", -42), ("#### \uff14\uff12", 42), ("#### 42 \u20ac", 42),
    ("#### \u00a342", 42), ("#### 1 234 567", 1234567), ("#### 1\u2009234", 1234),
    ("#### 1\u202f234,567", None), (r"\boxed{1\,234}", 1234),
    (r"\boxed{1~234.5}", Fraction("1234.5")),
    ("#### 12,34,567", 1234567), (r"\boxed{\frac12}", Fraction(1, 2)),
    (r"\boxed{\frac{-1}{2}}", Fraction(-1, 2)), (r"\boxed{\tfrac1{20}}", Fraction(1, 20)),
    (r"\boxed{1\frac12}", Fraction(3, 2)), (r"\boxed{6 \times 10^5}", 600_000),
    (r"\boxed{6\cdot10^{-2}}", Fraction(6, 100)), ("#### 6e5", 600_000), ("#### 1e5", 100_000),
    ("1e-5", Fraction(1, 100_000)), ("12.5e3", 12_500), ("#### 5 percent", 5),
    (r"\boxed{45^\circ}", 45),
    (r"\boxed{45^{\circ}\text{C}}", 45), ("#### 45\u00b0", 45), (r"\boxed{5\text{ m}}", 5),
    (r"\boxed{$42$}", 42), (r"\(42\)", 42), ("so it is $42$.", 42),
    ("#### 42 clips were sold.", 42),
    ("#### 42 square feet", 42), ("#### 42 cm^2", 42), ("42kg", 42), ("42nd", 42), ("x = 42", 42),
    ("2*21=42", 42), ("<<6*7=42>>42", 42), ("Answer:42", 42), ("equal to 42", 42),
    # what is not wholly one number
    (r"\boxed{\text{so } 42}", None), (r"#### \boxed{\text{7 or }42}", None),
    (r"\boxed{x=42, y=43}", None),
    (r"\boxed{3\sqrt{7}}", None), (r"\boxed{(2, 5)}", None), (r"\boxed{[0, 1]}", None),
    (r"\boxed{1 \text{ or } 2}", None), (r"\boxed{42, 43}", None), (r"\boxed{42 + x}", None),
    (r"\boxed{42x}", None), (r"\boxed{2\pi}", None), (r"\boxed{5!}", None),
    (r"\boxed{\pm 5}", None),
    (r"\boxed{5 \text{ or more}}", None), (r"\boxed{\frac123}", None), (r"\boxed{5^2}", None),
    (r"\boxed{0.\overline{3}}", None), (r"\boxed{\approx 5}", None), (r"\boxed{5 m}", None),
    ("#### 42 or 43", None), ("#### 42 + 1", None), ("#### 42, 43", None), ("#### 42x", None),
    ("#### 42 million", None), ("#### 42/7/2", None), ("#### 42 and a half", None),
    ("#### so 42", None), ("#### x = 42", 42), (r"\boxed{x=42}", 42),
    ("#### 42 = 6 * 7", None), ("#### --42", None), ("#### 1.234.567", None), ("#### 1,23", None),
    ("#### 12:30", None), ("#### 5 May", None), ("#### 7 pm", None),
    # without a mark: nothing of a list, a formula or a larger number
    ("1,2,3", None), ("on 1, 2 and 3", None), ("1 or 2", None), ("1,23", None), ("12:30", None),
    ("5-42", None), ("5 - 42", None), ("x - 42", None), ("9**9**9", None), ("3x", None),
    ("3 x", None), ("3 y", None),
    (r"it is 2\pi", None), (r"it is \sqrt{42}", None), ("x^42", None), ("x_42", None),
    ("(1, 42)", None),
    ("about 42 million", None), ("v1.42", None), ("between 5 and 42", None),
    ("from 5 km to 42", None),
    # no number, and nothing that may hang or be run
    ("", None), ("none", None), ("####", None), ("7 ####", None), ("#### forty-two\n7", None),
    (r"\boxed{}", None), (r"\boxed{42", None), (r"\boxed{a{42}", None), (r"\boxed 42", None),
    ("#### 1/0", None), ("9" * 5000, None),
    ("__import__('os').system('true')", None), ("nan", None), ("inf", None),
    ("#### 1e9999999999", None), ("1e99999", None), ("#### -$-42", None), ("#### 1234 567", None),
    ("1.2.3", None),
    (r"\boxed{\sqrt{2}}", None), (r"\boxed{\frac{\sqrt{3}}{2}}", None), (r"\boxed{2^{10}}", None),
    ("\u0664\u0662", None), ("...", None), ("$", None), ("%", None), ("-", None),
]


@pytest.mark.parametrize("text, number", TABLE)
def test_the_answer_is_after_the_last_marker_or_in_the_last_box_or_the_last_number(text, number):
    assert answer_number(text) == number


@pytest.mark.parametrize("text, right", [
    ("#### 42", 1), ("42.0", 1), ("142", 0), ("4.2", 0), ("-42", 0), ("42 or 43", 0), ("", 0),
    ("84/2", 1), ("42%", 1),
])
def test_equal_numbers_are_right_and_substrings_are_not(text, right):
    row = {"prompt": "?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
    assert grpo.score(row, text) == right


@pytest.mark.parametrize("piece, n", [
    ("1", 200_000), ("1,", 100_000), ("1/", 100_000), ("-", 200_000), ("{", 100_000),
    ("\\boxed{", 20_000), ("$", 200_000), ("1 ", 100_000), (".", 200_000), ("1.", 100_000),
])
def test_long_garbage_is_read_without_backtracking(piece, n):
    """Each of these would hang a pattern that tries every split."""
    answer_number(piece * n)


@pytest.mark.parametrize("text, stated", [
    ("6 * 7 = 42\n#### 42", True), ("#### 42", True), ("#### 42.\n", True),
    ("#### $1,234.50 ", True), ("#### -3/4", True), ("#### 5%", True),
    (r"so it is \boxed{42}.", True), (r"\boxed{\frac{3}{4}}", True),
    ("42", False), ("The answer is 42.", False), ("", False),
    ("####", False), ("#### 42 clips", False), ("#### 6 * 7 = 42", False),
    ("#### 42\nor 43", False), ("#### 41\n#### 42", False), (r"\boxed{41} \boxed{42}", False),
    (r"\boxed{42} #### 42", False),
    ("######## 42", False), (r"\boxed{}", False), (r"\boxed{42", False), ("#### x", False),
])
def test_the_format_reward_asks_for_a_number_stated_once_and_alone(text, stated):
    """A format reward that counts markers is hacked by writing many of them."""
    assert states_number(text) is stated


# ------------------------------------------------------------------------- what a row calls right

GOLDS = [                                              # as MATH's and others' rows have them
    ("42", 42), ("-3", -3), (r"\frac{3}{4}", Fraction(3, 4)), (r"-\frac{1}{2}", Fraction(-1, 2)),
    (r"\frac43", Fraction(4, 3)), (r"\dfrac{7}{2}", Fraction(7, 2)), ("0.25", Fraction(1, 4)),
    (r"5\%", 5), (r"\$18.90", Fraction("18.9")), (r"120^\circ", 120), (r"10,\!080", 10_080),
    (r"12\text{ cm}^2", 12), (r"3 \frac{1}{2}", Fraction(7, 2)), ("1,234", 1234), ("$5", 5),
    ("42 apples", None), ("42 feet", 42), ("x = 5", 5), ("5 cm^2", 5), 
    (r"2.5 \times 10^{3}", 2500), ("17 dollars", 17), (42, 42), (-0.0, 0),
    (4.5, Fraction(9, 2)), ("so 6 * 7\n#### 42", 42), (r"thus \boxed{42}.", 42),
    # more than a number, or none
    (r"3\sqrt{7}", None), ("(2, 5)", None), ("x=1 or 2", None), ("[0, 1]", None), ("2x + 1", None),
    (r"\frac{\sqrt{3}}{2}", None), ("B", None), (r"\text{Evelyn}", None), ("(C)", None),
    ("5 May", None), ("2020-01-05", None), ("6 pm", None), (r"\pi", None), (r"2\pi", None),
    ("1, 2, 3", None), ("x^2", None), ("p - q", None), (r"\infty", None), ("i", None),
    ("3 + 4i", None), ("2^{10}", None), ("", None), ("None", None), ("True", None), (None, None),
    ([1], None), ("The answer is 42", None), ("42 or so", None), (r"4210_{5}", None),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", None), (r"\text{(D)}", None), (r"11\sqrt2", None),
    ("three", None), ("1:2", None), ("5 million", None), ("12 and 15", None),
    (r"\text{42 units}", 42), ("$1,50", None), ("4i", None), ("1 2", None), ("5 - 2", None),
]


@pytest.mark.parametrize("gold, number", GOLDS)
def test_a_row_is_kept_if_its_answer_is_wholly_one_number_and_then_its_gold_is_right(gold, number):
    """In a box, after ####, and alone; the numbers beside it are not."""
    assert gold_number(gold) == number
    row = {"prompt": "?", "answer": gold}
    if number is None:
        assert grpo.score(row, "42") is None
        return
    text = str(gold)
    if "####" not in text and "boxed" not in text:
        for response in (rf"so \boxed{{{text}}}.", f"so\n#### {text}", text):
            assert grpo.score(row, response) == 1, response
    for other in (number + 1, -number - 2, number * 10 + 1, number + Fraction(1, 1000)):
        for response in (rf"\boxed{{{other}}}", f"#### {other}", f"{other}"):
            assert grpo.score(row, response) == 0, response


MATH = [
    (r"3\sqrt{7}", r"so \boxed{\sqrt{63}}", 1), (r"3\sqrt{7}", r"so \boxed{\sqrt{62}}", 0),
    ("(2, 5)", r"\boxed{(2,5)}", 1), ("(2, 5)", r"\boxed{(5,2)}", 0), ("42", "#### 42", 1),
    ("2x + 1", r"\boxed{1+2x}", 1), ("so\n#### 42", r"\boxed{42}", 1), ("", "1", None),
]


@pytest.mark.parametrize("gold, response, score", MATH)
def test_mathematics_beyond_numbers_is_left_to_math_verify(gold, response, score):
    pytest.importorskip("math_verify")
    assert math_score({"answer": gold}, response) == score


def test_reward_math_without_its_package_is_one_line(adder, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    parse_gold.cache_clear()
    line = run("grpo.py", *quick("grpo.py", adder), "--reward", "math", "--out", "out")
    assert "pip install math-verify" in line
    monkeypatch.undo()
    parse_gold.cache_clear()


def test_a_run_is_rewarded_by_math_verify(adder, run):
    pytest.importorskip("math_verify")
    assert run("grpo.py", *quick("grpo.py", adder), "--reward", "math", "--out", "out") is None


def written(rng, sign, digits, decimals):
    """A number in one of the ways in which people write it, and its value."""
    value = Fraction(sign + digits + "." + (decimals or "0"))
    groups = f"{int(digits):,}"
    whole = rng.choice([digits, groups, groups.replace(",", " "), groups.replace(",", "{,}"),
                        groups.replace(",", r"\,"), groups.replace(",", "\u202f")])
    text = whole + ("." + decimals if decimals else "")
    minus = rng.choice(["-", "\u2212", "- ", "\u2013"]) if sign else ""
    form = rng.choice(["@", "$@", r"\$@", "@%", r"@\%", "@ km", r"@\text{ km}", "@.", "**@**",
                       r"@^\circ", "@ \u20ac", r"\mathbf{@}"])
    return form.replace("@", minus + text), value


def test_numbers_in_random_spellings_are_read_and_no_other_number_is_taken_for_them():
    rng = random.Random(0)
    read = 0
    for _ in range(3000):
        digits = str(rng.randrange(10 ** rng.randrange(1, 8)))
        decimals = str(rng.randrange(1, 1000)) if rng.random() < 0.3 else ""
        text, value = written(rng, rng.choice(["", "-"]), digits, decimals)
        for response in (rf"\boxed{{{text}}}", f"therefore\n#### {text}"):
            found = answer_number(response)
            assert found in (value, None), (response, found, value)
            read += found == value
        alone = answer_number(f"It is {text}")
        assert alone in (value, None), (text, alone, value)
        # a formula, a list or a larger number around it is never the number
        for around in ("@, 7", "7, @", "@ or 7", "@ x", r"\sqrt{@}", "2^@", "@!", "(@, 7)", "@ + y",
                       "@ million", "x + 1 = @", r"@\pi", r"\frac{@}{y}", "@:7", "@ and a half"):
            formula = around.replace("@", text)
            assert answer_number(rf"\boxed{{{formula}}}") is None, formula
            assert gold_number(formula) is None, formula
    assert read == 6000


# -------------------------------------------------------------------- what a reader tried to sell

NOT_A_NUMBER = [                   # golds, and responses in a box or after ####
    r"5\text{ p.m.}", "5 a.m.", "12 o'clock", "2020 B.C.", "2020 BCE", "0,125", "01,234", "5½",
    "5²",
    "2⁵", "101₂", "5π", "5 θ", "5ｘ", "5xy", "5 ab", "6xy^2", r"5\mathrm{i}", r"5\text{M}",
    "1010 base two", r"1010\text{ base two}", "1010 binary", "0xFF", "5 half-dozen",
    "5 thousandths",
    "5 sixths", "0.333...", "0.333 repeating", "5 hours, thirty minutes", "2 hours five minutes",
    "5 feet, three inches", "3, four", "3 versus four", "1 in six", r"1\quad 200\quad 300",
    "3 5/2", "5 1/2.5", r"12\times10^35", "5 below zero", "5 negative", "5 mln", "5 quadrillion",
    "5万", "5月", "5 IV", "5①", "5 log two", "5 choose two", "5 maybe", "5?",
    "5 no solution", "5 if even", "~5", r"5\cdot", "5×", r"\(5\)\(6\)", "$$5$$$$6$$", r"4\left2",
    "5\x001", r"5\pm 2", "5'", "5 feet 3 inches", "10:30", "5/0", "5%%x", "5 x 10", "V", "½",
]
HEDGED = [                         # responses
    r"-\boxed{5}", r"\boxed{5}\pi", r"\boxed{5}x", r"\boxed{5}^2", r"\sqrt{\boxed{5}}",
    r"\frac{\boxed{5}}{2}", r"\boxed{5} million", r"\boxed{6} or \boxed{5}",
    r"\boxed{6}, \boxed{5}",
    r"\boxed{43 + \boxed{5}}", r"not \boxed{5}", "#### 5 is wrong", "#### 5, but it could be six",
    "#### 5 doubled", "#### 5 choose two", "#### 5 maybe", "#### 1. Check", "#### 5. Conclusion",
    "x ≥ 5", "x > 5", "x <= 5", r"x \neq 5", "4 < x < 5", "at least 5", "more than 5", "not 5",
    "it isn't 5", "±5", "about 5", "3 × 5", "3 * 5", r"3 \times 5", "2 ^ 5", "3 times 5", "twice 5",
    "3 / 5", "3 : 5", "3 out of 5", "√5", r"\sqrt 5", r"\log 5", "5²", "5π", "5xy", "5 over x",
    "5 or more", "5 and a half is close, no, 5 or six", "$5$ million", "5 pm", "42 base 5",
    "x = 4 or x = 5", "4; 5", "4 | 5", "4 hours 5 minutes", "4 feet 5 inches", "4'5\"",
    "between 4 big apples and 5", "the values are 4 5", "It is 7 not 5", "page 5", "Step 5",
]


@pytest.mark.parametrize("text", NOT_A_NUMBER)
def test_what_is_more_than_a_number_is_none(text):
    assert gold_number(text) is None
    assert answer_number(rf"\boxed{{{text}}}") is None
    assert answer_number(f"#### {text}") is None


@pytest.mark.parametrize("text", HEDGED)
def test_a_hedged_or_changed_number_is_not_the_answer(text):
    assert answer_number(text) is None


@pytest.mark.parametrize("text", [
    "2 + 5 = 7", "2 + 5 is equal to 7.", "we get 2 by 5: 7.",
    "The sum of 2 and 5 is 7.", "So, the sum of 2 and 5 equals 7.", "2 times 3.5 is 7",
    "Tom has 4 + 3 = 7 apples.", "The answer is **7**.", "**Answer: 7**",
    "Final Answer: **7 apples**",
    "It is 7!", "She pays $7.", "he has 7 dollars left", "= 7 cm", "x = 7",
    r"It is \(7\).", r"\[ x = 7 \]", r"\[ \boxed{7} \]", r"$\boxed{7}$.", r"\boxed{n = 7}",
    r"\boxed{7} apples", r"so \boxed{7}\text{ apples}", "#### Conclusion\n" + r"So \boxed{7}.",
    "####\n7", "#### 7 dollars per day", "#### 7, which is right", r"\boxed{7 \text{ dollars}}",
])
def test_common_ways_to_say_seven_are_read(text):
    assert answer_number(text) == 7


@pytest.mark.parametrize("piece", ["12,", "12,34,", "123 ", "123 456 ", "5 ", "~", "\\,", "\\quad",
                                   "\\text{a}", "°", "\\boxed{", "\\boxed{5}", "#### 5 ", "**5",
    "5**",
                                   "<<5>>", "<<", "5 apples "])
def test_long_repetition_is_read(piece):
    """Models repeat themselves; quadratic patterns took seconds for each of these."""
    text = piece * (100_000 // len(piece)) + "x"
    answer_number(text)
    gold_number(text)


# ------------------------------------------------------------------------------------------- GSM8K

DATA = os.path.join(os.path.dirname(ROOT), "shared", "data", "gsm8k")
needs_gsm8k = pytest.mark.skipif(not os.path.exists(DATA), reason="GSM8K's files are absent")


def lines(name):
    with open(os.path.join(DATA, name), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@needs_gsm8k
def test_every_gold_answer_of_gsm8k_is_read_and_accepted():
    rows = lines("train.jsonl") + lines("test.jsonl")
    assert len(rows) == 8792
    for row in rows:
        gold = row["answer"].split("####")[1].strip().replace(",", "")
        assert answer_number(row["answer"]) == Fraction(gold)
        assert grpo.score(row, row["answer"]) == 1


@needs_gsm8k
def test_right_and_wrong_solutions_of_gsm8k_are_told_apart():
    """3,868 model-written solutions with their labels: no disagreement."""
    row_of = {row["question"]: row for row in lines("test.jsonl")}
    pairs = lines("preferences.jsonl")
    assert len(pairs) == 1934
    for pair in pairs:
        row = row_of[pair["prompt"]]
        assert grpo.score(row, pair["chosen"]) == 1
        assert grpo.score(row, pair["rejected"]) == 0


@needs_gsm8k
def test_every_gold_answer_of_gsm8k_states_its_number():
    assert all(states_number(row["answer"]) for row in lines("test.jsonl"))
