"""
How the rows of a file are read: what the model is fed, and what of it is trained.

    python -m common.show rows.jsonl                         with the built-in tokenizer
    python -m common.show rows.jsonl --init out/smollm2      as a model's own template writes them
    python -m common.show rows.jsonl --rows 10 --chat plain
"""
import argparse
import sys

from common.checkpoint import load
from common.data import tokenize_demonstration
from common.preferences import read_preferences
from common.rows import normalise, read_objects, read_rows
from common.tokenizer import (InputError, chat_by_default, encode_prompt, encode_response,
                              make_tokenizer)
from common.verifier import gold_number


def kind_of(path):
    """"preference", "demonstration" or "prompt", by the fields of the first row."""
    location, row = next(read_objects(path), ("", None))
    if row is None:
        raise InputError(f"{path}: the file is empty")
    if {"chosen", "responses", "preferred_output"} & row.keys():
        return "preference"
    row = normalise(row, location, ("prompt", "response"))
    ends_with_user = "messages" in row and row["messages"][-1]["role"] == "user"
    if "response" not in row or ends_with_user and "answer" in row:
        return "prompt"
    return "demonstration"


def print_parts(tokenizer, tokens, mask):
    """The text of each stretch of tokens that are fed, or trained."""
    start = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or mask[i] != mask[start]:
            name = "trained" if mask[start] else "fed"
            text = tokenizer.decode(tokens[start:i])
            print(f"    {name:8} {i - start:5} tokens  {text!r}")
            start = i


def show_row(row, kind, tokenizer):
    if kind == "preference":
        for name in ("chosen", "rejected"):
            print(f"  {name}")
            print_parts(tokenizer, *encode_response(tokenizer, row, row[name]))
    elif kind == "demonstration":
        row = tokenize_demonstration(row, tokenizer)
        print_parts(tokenizer, row["tokens"], row["mask"])
    else:
        ids = encode_prompt(tokenizer, row)
        print_parts(tokenizer, ids, [0] * len(ids))


def show(path, tokenizer, n, kind=None):
    kind = kind or kind_of(path)
    if kind == "preference":
        rows = read_preferences(path)
    elif kind == "demonstration":
        rows = read_rows(path, "prompt", "response")
    else:
        rows = read_rows(path, "prompt")
    print(f"{path}: {len(rows)} rows, each a {kind}")
    for row in rows[:n]:
        print(row["_line"])
        try:
            show_row(row, kind, tokenizer)
        except InputError as e:                        # of the chat template
            print(f"    dropped: {e}")
        if "answer" in row:
            gold = gold_number(row["answer"])
            right = "none, and grpo.py drops this row" if gold is None else gold
            print(f"    right is {right}, from {str(row['answer'])[-60:]!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("data", help="a file of rows")
    parser.add_argument("--init", help="checkpoint or Hugging Face folder; default: built-in bytes")
    parser.add_argument("--kind", choices=["prompt", "demonstration", "preference"],
                        help="what the script takes the rows for; default: by the first row")
    parser.add_argument("--rows", type=int, default=3, help="how many to show")
    parser.add_argument("--chat", default="auto", help="as in the scripts")
    parser.add_argument("--system", default="auto", help="as in the scripts")
    args = parser.parse_args()
    try:
        if args.init:
            _, tokenizer = load(args.init, chat=args.chat, system=args.system)
        else:
            turns = chat_by_default(args.chat, False, args.system)
            tokenizer = make_tokenizer(turns=turns, system=args.system)
        show(args.data, tokenizer, args.rows, args.kind)
    except InputError as e:
        sys.exit(f"show: {e}")


if __name__ == "__main__":
    main()
