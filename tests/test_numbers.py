"""The number that a response gives as its answer: an adversarial table, and all of GSM8K where its
files are.   python -m pytest tests/test_numbers.py"""
import json
import os
from fractions import Fraction

import pytest

import grpo
from common.verifier import answer_number, states_number
from conftest import ROOT

TABLE = [
    # "####" first, the last one; then the last \boxed{}; then the last number
    ("so 7\n#### 42", 42), ("#### 1\n#### 42", 42), ("#### 42\nand 7 more", 42),
    (r"\boxed{7} #### 42", 42), ("####42", 42),
    (r"it is \boxed{42}, not 7", 42), (r"\boxed{7} then \boxed{42}", 42),
    (r"\boxed{\text{so } 42}", 42), (r"\boxed {42}", 42),
    ("first 7, then 42", 42), ("The answer is 42.", 42), ("42", 42), ("A: 42\n", 42),
    (r"#### \boxed{42}", 42), ("#### **42**", 42),
    # the forms of one number
    ("#### 42.", 42), ("#### 42.0", 42), ("#### 42.00", 42), ("#### 042", 42), ("#### +42", 42),
    ("#### $42", 42), ("$42.00.", 42),
    ("#### 1,234", 1234), ("#### $1,234,567.50", Fraction("1234567.5")), ("1{,}234", 1234),
    (r"\$42", 42), ("#### 42 dollars", 42), ("#### .5", Fraction(1, 2)),
    ("#### -42", -42), ("#### \u221242", -42), ("#### -$42", -42), ("#### $-42", -42),
    ("it fell to -42", -42), ("10-5=5", 5), ("5-42", 42),
    ("#### 5%", 5), ("5 %", 5), ("#### 0.05", Fraction(1, 20)), ("#### 3/4", Fraction(3, 4)),
    (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
    (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)), ("#### 6/8", Fraction(3, 4)),
    ("#### -1/2", Fraction(-1, 2)), ("#### 1.5/3", Fraction(1, 2)), ("#### 0", 0), ("#### -0", 0),
    (r"\boxed{3\frac{1}{2}}", Fraction(7, 2)), ("#### 3 1/2", Fraction(7, 2)),
    ("#### -3 1/2", Fraction(-7, 2)), (r"\boxed{5\%}", 5), (r"\boxed{1{,}234}", 1234),
    (r"\boxed{\$42}", 42), (r"\boxed{42\text{ km}}", 42), (r"#### \boxed{\text{7 or }42}", 7),
    # lists and units are not thousands
    ("1,2,3", 3), ("on 1, 2 and 3", 3), ("1,23", 23), ("12:30", 30), ("42kg", 42), ("42nd", 42),
    ("x = 42", 42), ("2*21=42", 42), ("<<6*7=42>>42", 42),
    # no number, and nothing that may hang or be run
    ("", None), ("none", None), ("####", None), ("7 ####", None), ("#### forty-two\n7", None),
    (r"\boxed{}", None), (r"\boxed{42", None), (r"\boxed{a{42}", None), (r"\boxed 42", None),
    ("#### 1/0", None), ("9" * 5000, None), ("9**9**9", 9),
    ("__import__('os').system('true')", None), ("nan", None), ("inf", None),
    ("#### 1e9999999999", None), ("#### 1e5", None), ("1e-5", None), ("12.5e3", None),
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
