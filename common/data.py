"""
Rows of data: the built-in task, a user's own files, splits, and rows as token ids.

A row is a dict. A prompt has "prompt" and perhaps "answer" (what is right); a demonstration has
"prompt" and "response", or "messages"; a preference has "prompt", "chosen" and "rejected".
"""
import hashlib
import json
import os
import random
from decimal import Decimal

from common.tokenizer import (InputError, before_response, encode_chat, encode_prompt,
                              encode_response)
from common.verifier import checked_score

# ------------------------------------------------------------------------------- the built-in task


def split_of(prompt):
    """"train", "val" (1 in 20, to choose settings by) or "test" (1 in 20, to report), by a hash."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return {0: "val", 1: "test"}.get(int(digest, 16) % 20, "train")


def running_sums(n, split, seed=0):
    """n rows of the built-in task: "5+8+7=", 3 to 6 digits from 1 to 9, and their two-digit sum.

    Held-out prompts are distinct, so short ones are fewer: there are 729 prompts of 3 terms, and a
    twentieth of them is held out."""
    rng = random.Random(f"{split} {seed}")
    rows, seen, lengths = [], set(), [3, 4, 5, 6]
    while len(rows) < n:
        k = rng.choice(lengths)
        for _ in range(5000):
            terms = [rng.randint(1, 9) for _ in range(k)]
            prompt = "+".join(map(str, terms)) + "="
            if split_of(prompt) == split and (split == "train" or prompt not in seen):
                rows.append({"prompt": prompt, "two_digits": f"{sum(terms):02d}"})
                seen.add(prompt)
                break
        else:
            lengths.remove(k)                          # no prompt of this length is left
    return rows


# ------------------------------------------------------------------------------------ files of rows


def read_rows(path, *needed):
    """JSON lines -> list of dicts in which every field in `needed` is text; "_line" is where.

    GSM8K's {"question", "answer"} is read as prompt (with a line break), response and answer.
    {"messages": [...]} stands for prompt and response. An error names file, line and field."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                rows.append(read_row(line, f"{path}:{number}", needed))
    if not rows:
        raise InputError(f"{path}: the file is empty")
    return rows


def read_row(line, location, needed):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:          # invalid UTF-8 is a ValueError too
        raise InputError(f"{location}: not a JSON line ({e})") from None
    if not isinstance(row, dict):
        raise InputError(f"{location}: expected an object {{...}}, found {type(row).__name__}")
    if isinstance(row.get("question"), str) and "prompt" not in row:
        row.setdefault("response", row.get("answer"))
        row["prompt"] = row["question"] + "\n"
    if "messages" in row:
        check_messages(row["messages"], location, "response" in needed)
        turns = [f"{m['role']}: {m['content']}" for m in before_response(row["messages"])]
        row["prompt"] = "\n".join(turns)
        if "response" in needed:
            row["response"] = row["messages"][-1]["content"]
    if isinstance(row.get("answer"), (int, float)) and not isinstance(row["answer"], bool):
        row["answer"] = format(Decimal(repr(row["answer"])), "f")           # 1e-05 -> 0.00001
    row["_line"] = location
    require_text(row, *needed)
    return row


def require_text(row, *needed):
    for name in needed:
        if isinstance(row.get(name), str):
            continue
        problem = "is missing"
        if row.get(name) is not None:
            problem = f"is {type(row[name]).__name__}, not text"
        raise InputError(f'{row["_line"]}: field "{name}" {problem}; a row needs '
                         f'{", ".join(needed)}')


def check_messages(messages, location, needs_response):
    def is_message(x):
        return (isinstance(x, dict) and isinstance(x.get("role"), str)
                and isinstance(x.get("content"), str))

    is_list = isinstance(messages, list) and len(messages) > 0
    if not is_list or not all(is_message(message) for message in messages):
        raise InputError(f'{location}: field "messages" must be a list of {{"role": text, '
                         '"content": text}')
    if needs_response and messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise InputError(f'{location}: field "messages" must end with the assistant, not {role!r}')


# ------------------------------------------------------------------------ filters, splits, prompts


def filter_rows(rows, keep, reason, need=True):
    """The rows for which keep(row); the dropped ones are counted on the screen, with the line of
    the first. With `need`, it is an error if none is left."""
    kept = [row for row in rows if keep(row)]
    dropped = len(rows) - len(kept)
    if dropped:
        first = next(row for row in rows if not keep(row))
        where = first.get("_line") or repr(first["prompt"])
        print(f"dropped {dropped} of {len(rows)} rows: {reason}; the first is {where}")
        if need and not kept:
            raise InputError(f"no row is left: {reason}; the first is {where}")
    return kept


def at_line(row, encode, *args):
    """encode(*args); an error, such as of a chat template, names the row's file and line."""
    try:
        return encode(*args)
    except InputError as e:
        raise InputError(f"{row.get('_line') or repr(row['prompt'])}: {e}") from None


def tokenize_prompts(rows, tokenizer, max_new_tokens, block_size, need=True):
    """Rows with their prompt's "ids", of those that leave room for max_new_tokens."""
    def has_room(row):
        return len(row["ids"]) + max_new_tokens <= block_size

    rows = [row | {"ids": at_line(row, encode_prompt, tokenizer, row)} for row in rows]
    rows = filter_rows(rows, lambda row: row["ids"], "the prompt has no token", need)
    reason = f"prompt + --max_new_tokens {max_new_tokens} exceed the model's {block_size} tokens"
    return filter_rows(rows, has_room, reason, need)


def split_key(row):
    """What decides the split of a row: its "split_by", equal in rows that ask the same in other
    words, else its prompt."""
    return str(row.get("split_by", row["prompt"]))


def split_rows(rows, test=None):
    """Train, validation and test rows by the hash of split_key. Where test rows are given, only
    validation rows are held out, and no row whose split_key is among the test rows' is kept."""
    splits = {"train": [], "val": [], "test": []}
    for row in rows:
        splits[split_of(split_key(row))].append(row)
    train, val = splits["train"], splits["val"]
    if test is None:
        test = splits["test"]
    else:
        reported = {split_key(row) for row in test}

        def is_new(row):
            return split_key(row) not in reported

        train = filter_rows(train + splits["test"], is_new, "its prompt is in --test", need=False)
        val = filter_rows(val, is_new, "its prompt is in --test", need=False)
    if not train:
        raise InputError("no row is left to train on: all are held out, by a hash of the prompt; "
                         "give more rows")
    return train, val, test


def spread(rows, n):
    """At most n of the rows, evenly spaced; 0: all."""
    if n == 0:
        return rows
    step = max(1, len(rows) // n)
    return rows[::step][:n]


def load_prompts(cfg, tokenizer, score, block_size, need_answer=True, eval_prompts=0):
    """Train, validation and test prompts, each with its "ids". need_answer: drop the rows for which
    `score` returns None. eval_prompts: validation and test rows, at most; 0: all."""
    def has_answer(row):
        return checked_score(score, row, "", need=False) is not None

    def prepare(rows):
        rows = filter_rows(rows, lambda row: row["prompt"], "the prompt is empty")
        if need_answer:
            reason = '"answer" is not wholly one number, so `score` returns None'
            rows = filter_rows(rows, has_answer, reason)
        return tokenize_prompts(rows, tokenizer, cfg.max_new_tokens, block_size)

    if not cfg.data:
        train = running_sums(20_000, "train", cfg.seed)
        val, test = running_sums(500, "val"), running_sums(1_000, "test")
        train, val, test = prepare(train), prepare(val), prepare(test)
    else:
        rows = prepare(read_rows(cfg.data, "prompt"))
        test = prepare(read_rows(cfg.test, "prompt")) if cfg.test else None
        train, val, test = split_rows(rows, test)
    return train, spread(val, eval_prompts), spread(test, eval_prompts)


# ---------------------------------------------------------------------------------- demonstrations


def tokenize_demonstration(row, tokenizer):
    """Add "ids" of the prompt, "tokens" of prompt, response and end token, their "mask", and the
    number of assistant "turns" in it."""
    if "messages" in row:                                   # every turn of the assistant is trained
        tokens, mask, turns = at_line(row, encode_chat, tokenizer, row["messages"])
    else:
        tokens, mask = at_line(row, encode_response, tokenizer, row, row["response"])
        turns = 1
    ids = at_line(row, encode_prompt, tokenizer, row)
    return row | {"ids": ids, "tokens": tokens, "mask": mask, "turns": turns}


def load_demonstrations(cfg, tokenizer, block_size, built_in):
    """Rows to train on, to validate on and to report on, those of --data or the built-in ones."""
    def has_text(row):
        return row["prompt"] and row["response"].strip()

    def fits(row):
        return len(row["tokens"]) <= block_size

    def prepare(rows):
        rows = filter_rows(rows, has_text, "the prompt or the response is empty")
        rows = [tokenize_demonstration(row, tokenizer) for row in rows]
        rows = filter_rows(rows, lambda row: row["ids"], "the prompt has no token")
        return filter_rows(rows, fits, f"longer than {block_size} tokens (--block_size)")

    if not cfg.data:
        train, val, test = [prepare(rows) for rows in built_in]
    else:
        rows = prepare(read_rows(cfg.data, "prompt", "response"))
        test = prepare(read_rows(cfg.test, "prompt", "response")) if cfg.test else None
        report_rewritten_turns(rows)
        train, val, test = split_rows(rows, test)
    return train, spread(val, cfg.eval_prompts), spread(test, cfg.eval_prompts)


def report_rewritten_turns(rows):
    """Say how many conversations train their last turn only (see encode_chat)."""
    chats = [row for row in rows if "messages" in row]
    last_only = 0
    for row in chats:
        turns = sum(message["role"] == "assistant" for message in row["messages"])
        last_only += row["turns"] < turns
    if last_only:
        print(f"the chat template rewrites earlier turns: {last_only} of {len(chats)} "
              "conversations train their last turn only")


