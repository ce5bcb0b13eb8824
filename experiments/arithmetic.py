"""
Arithmetic in words, a task that a small language model can half do: prompts with an answer, and a
right response as a demonstration, "3 * 7 = 21".

    python experiments/arithmetic.py out/arithmetic

    train.jsonl test.jsonl              "What is 3 times 7?", "Calculate 10 plus 14."
    stories.jsonl test_stories.jsonl    "A box holds 6 pens. How many pens are in 9 boxes?"
    test_minus.jsonl                    "What is 31 minus 14?", in no file to train on

A fifth of all pairs of numbers is held out, by a hash of the pair, whatever the wording, the
operation and the order: no pair is both in a file to train on and in a file to test on. By
"split_by" the scripts choose validation rows in the same way.
"""
import hashlib
import json
import os
import random
import sys

SIGNS = {"plus": "+", "times": "*", "minus": "-"}
QUESTIONS = {
    "plus": ["What is {a} plus {b}?", "Calculate {a} plus {b}.", "What is {a} + {b}?",
             "Add {a} and {b}.", "What is the sum of {a} and {b}?"],
    "times": ["What is {a} times {b}?", "Calculate {a} times {b}.", "What is {a} * {b}?",
              "Multiply {a} by {b}.", "What is the product of {a} and {b}?"],
    "minus": ["What is {a} minus {b}?", "Calculate {a} minus {b}.", "What is {a} - {b}?"],
}
STORIES = {
    "plus": ["Tom has {a} apples and buys {b} more. How many apples does he have now?",
             "There are {a} red and {b} blue balls in a bag. How many balls are in the bag?",
             "Anna read {a} pages on Monday and {b} pages on Tuesday. How many pages did she read?",
             "{a} people are on a bus and {b} more get on. How many people are on the bus?"],
    "times": ["A box holds {a} pens. How many pens are in {b} boxes?",
              "A ticket costs {a} dollars. How many dollars do {b} tickets cost?",
              "Each of {b} children has {a} books. How many books do they have together?",
              "Ben runs {a} miles a day. How many miles does he run in {b} days?"],
}
LARGEST = {"plus": 20, "times": 10, "minus": 20}       # operand; the smallest is 2
SIZES = {"train": 500, "test": 100}                     # rows for each operation, at most


def is_held_out(numbers):
    return int(hashlib.sha256(numbers.encode()).hexdigest(), 16) % 5 == 2


def make_rows(split, wordings, n, rng):
    """n rows for each operation, or as many as there are, whose numbers belong to the split."""
    rows = []
    for operation, texts in wordings.items():
        found = []
        for a in range(2, LARGEST[operation] + 1):
            for b in range(2, LARGEST[operation] + 1):
                numbers = f"{min(a, b)} and {max(a, b)}"
                if is_held_out(numbers) != (split == "test") or operation == "minus" and a < b:
                    continue
                result = {"plus": a + b, "times": a * b, "minus": a - b}[operation]
                for text in texts:
                    found.append({"prompt": text.format(a=a, b=b), "answer": str(result),
                                  "split_by": numbers,
                                  "response": f"{a} {SIGNS[operation]} {b} = {result}"})
        rows += rng.sample(found, min(n, len(found)))
    rng.shuffle(rows)
    return rows


def main(folder):
    rng = random.Random(0)
    minus = {"minus": QUESTIONS["minus"]}
    asked = {"plus": QUESTIONS["plus"], "times": QUESTIONS["times"]}
    files = {
        "train": make_rows("train", asked, SIZES["train"], rng),
        "test": make_rows("test", asked, SIZES["test"], rng),
        "stories": make_rows("train", STORIES, SIZES["train"], rng),
        "test_stories": make_rows("test", STORIES, SIZES["test"], rng),
        "test_minus": make_rows("test", minus, SIZES["test"], rng),
    }
    os.makedirs(folder, exist_ok=True)
    for name, rows in files.items():
        with open(os.path.join(folder, f"{name}.jsonl"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}.jsonl: {len(rows)} rows, such as {rows[0]['prompt']!r}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/arithmetic.py FOLDER")
    main(sys.argv[1])
