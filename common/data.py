"""
Rows of data: the built-in task, splits, and rows as token ids. rows.py says what a row is.
"""
import hashlib
import os
import random

from common.rows import read_rows
from common.tokenizer import InputError, encode_chat, encode_prompt, encode_response
from common.verifier import checked_score

DEMONSTRATIONS = "demonstrations.jsonl"           # held-out demonstrations in the folder of sft.py


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
                rows.append({"prompt": prompt, "_two_digits": f"{sum(terms):02d}"})
                seen.add(prompt)
                break
        else:
            lengths.remove(k)                          # no prompt of this length is left
    return rows


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


def tokenize_rows(rows, tokenizer, encode, need=True):
    """encode(row) of the rows that the chat template accepts; the others are dropped and counted.
    With `need`, it is an error if none is left."""
    report_special_tokens(rows, tokenizer)
    kept, refused = [], []
    for row in rows:
        try:
            kept.append(encode(row))
        except InputError as e:
            refused.append(f"{row.get('_line') or repr(row['prompt'])}: {e}")
    if refused and need and not kept:
        raise InputError(refused[0])
    if refused:
        print(f"dropped {len(refused)} of {len(rows)} rows that the chat template refuses; the "
              f"first is {refused[0]}")
    return kept


def report_special_tokens(rows, tokenizer):
    """Say how many rows spell out a special token: it stays text (see FolderTokenizer.encode)."""
    found = []
    for row in rows:
        texts = [row.get(name) for name in ("prompt", "response", "chosen", "rejected")]
        text = "".join(x for x in texts if isinstance(x, str))
        names = [name for name in tokenizer.special if name in text]
        if names:
            found.append(f"{names[0]} in {row.get('_line') or repr(row['prompt'])}")
    if found:
        print(f"warning: {len(found)} rows spell out special tokens, which stay text; the first is "
              f"{found[0]}")


def tokenize_prompts(rows, tokenizer, max_new_tokens, block_size, need=True):
    """Rows with their prompt's "ids", of those that leave room for max_new_tokens."""
    def has_room(row):
        return len(row["ids"]) + max_new_tokens <= block_size

    def encode(row):
        return row | {"ids": encode_prompt(tokenizer, row)}

    rows = tokenize_rows(rows, tokenizer, encode, need)
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
            if getattr(cfg, "reward", "") == "rule":
                reason += " (--reward math reads more than numbers)"
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
        tokens, mask, turns = encode_chat(tokenizer, row["messages"])
    else:
        tokens, mask = encode_response(tokenizer, row, row["response"])
        turns = 1
    ids = encode_prompt(tokenizer, row)
    return row | {"ids": ids, "tokens": tokens, "mask": mask, "turns": turns}


def tokenize_demonstrations(rows, tokenizer, block_size):
    """Rows of prompt and response with their "tokens" and "mask", of those that fit."""
    def has_text(row):
        return row["prompt"] and row["response"].strip()

    def fits(row):
        return len(row["tokens"]) <= block_size

    def encode(row):
        return tokenize_demonstration(row, tokenizer)

    rows = filter_rows(rows, has_text, "the prompt or the response is empty")
    rows = tokenize_rows(rows, tokenizer, encode)
    rows = filter_rows(rows, lambda row: row["ids"], "the prompt has no token")
    return filter_rows(rows, fits, f"longer than {block_size} tokens (--block_size)")


def load_demonstrations(cfg, tokenizer, block_size, built_in):
    """Rows to train on, to validate on and to report on, those of --data or the built-in ones."""
    def prepare(rows):
        return tokenize_demonstrations(rows, tokenizer, block_size)

    if not cfg.data:
        train, val, test = [prepare(rows) for rows in built_in]
    else:
        rows = prepare(read_rows(cfg.data, "prompt", "response"))
        test = prepare(read_rows(cfg.test, "prompt", "response")) if cfg.test else None
        report_rewritten_turns(rows)
        train, val, test = split_rows(rows, test)
    return train, spread(val, cfg.eval_prompts), spread(test, cfg.eval_prompts)


def load_retained(cfg, tokenizer, block_size):
    """Demonstrations whose loss shows forgetting, at most 500: those of --retain, else the held-out
    ones that sft.py wrote to --init; [] if there are none. They are not trained on."""
    path = cfg.retain
    if not path:
        path = os.path.join(cfg.init, DEMONSTRATIONS)
        if not cfg.init or not os.path.exists(path):
            return []
    rows = read_rows(path, "prompt", "response")
    return spread(tokenize_demonstrations(rows, tokenizer, block_size), 500)


def report_rewritten_turns(rows):
    """Say how many conversations train their last turn only (see encode_chat)."""
    chats = [row for row in rows if "messages" in row]
    last_only = 0
    for row in chats:
        turns = sum(message["role"] == "assistant" and message.get("weight", 1) != 0
                    for message in row["messages"])
        last_only += row["turns"] < turns
    if last_only:
        print(f"the chat template rewrites earlier turns: {last_only} of {len(chats)} "
              "conversations train their last turn only")


