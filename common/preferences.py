"""
Preferences: pairs of a better and a worse response, and rankings of several.
"""
import os
import re
from collections import Counter

from common.data import DEMONSTRATIONS, filter_rows, split_rows, tokenize_rows
from common.rows import read_rows, require_text
from common.tokenizer import InputError, encode_response

LAST_TURN = "\n\nAssistant:"      # before a response of HH-RLHF


def read_preferences(path):
    r"""JSON lines of preferences -> rows with text "prompt", "chosen" and "rejected", one per pair.

    A row is a pair, optionally with a number "margin"; or a pair without "prompt", two dialogues as
    in HH-RLHF, split after the last "\n\nAssistant:", or two texts whose common beginning is the
    prompt; or {"prompt", "responses": [best, ..., worst]}, optionally with "ranks", which gives all
    the pairs that it implies. Pairs without a preference are dropped and counted."""
    rows = []
    for row in read_rows(path):
        if "responses" in row:
            rows += ranking_to_pairs(row)
        elif holds_dialogues(row):
            rows.append(split_dialogues(row))
        elif "prompt" not in row:
            rows.append(split_common_beginning(row))
        else:
            rows.append(row)
    for row in rows:
        require_text(row, "prompt", "chosen", "rejected")
        margin = row.get("margin", 0)
        if type(margin) not in (int, float) or not abs(margin) < 1e9:      # nan, infinity
            raise InputError(f'{row["_line"]}: field "margin" must be a number')

    def same_prompt(row):
        return row["prompt"] == row.get("_prompt_of_rejected", row["prompt"])

    def has_text(row):
        return row["prompt"].strip() and row["chosen"].strip() and row["rejected"].strip()

    def differs(row):
        return row["chosen"] != row["rejected"]

    def ends_with_assistant(row):                      # HH-RLHF has some that end with the human
        return "_dialogue" not in row or "\n\nHuman:" not in row["chosen"] + row["rejected"]

    rows = filter_rows(rows, same_prompt, "the two prompts differ")
    rows = filter_rows(rows, ends_with_assistant, "a response is not a turn of the assistant")
    rows = filter_rows(rows, has_text, "a text is empty")
    return filter_rows(rows, differs, "its responses are equal, all tie or repeat")


def ranking_to_pairs(row):
    """All the pairs of {"prompt", "responses", "ranks"}. A ranking with only ties, or a response
    twice, gives one pair of equal texts, which read_preferences drops and counts."""
    texts = row["responses"]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(x, str) for x in texts):
        raise InputError(f'{row["_line"]}: field "responses" must be a list of two texts or more, '
                         'the best first')
    ranks = row.get("ranks")
    if ranks is None:
        ranks = list(range(len(texts)))
    fits = isinstance(ranks, list) and len(ranks) == len(texts)
    if not fits or not all(type(rank) is int for rank in ranks):
        raise InputError(f'{row["_line"]}: field "ranks" must be a list of whole numbers, one for '
                         'each response')
    pairs = better_worse(texts, ranks)
    if not pairs or len(set(texts)) < len(texts):
        pairs = [(texts[0], texts[0])]
    rest = {name: x for name, x in row.items() if name not in ("responses", "ranks")}
    rest["_ranking"] = row["_line"]
    return [rest | {"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def holds_dialogues(row):
    """Whether both texts are whole dialogues as in HH-RLHF, which repeat the prompt if there is
    one."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "messages" in row or not isinstance(chosen, str) or not isinstance(rejected, str):
        return False
    if LAST_TURN not in chosen or LAST_TURN not in rejected:
        return False
    if "prompt" not in row:
        return True
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.endswith(LAST_TURN):
        return False
    return chosen.startswith(prompt) and rejected.startswith(prompt)


def split_dialogues(row):
    """HH-RLHF's pair of whole dialogues -> prompt, chosen, rejected, and the prompt as messages for
    models that chat."""
    prompt, _, chosen = row["chosen"].rpartition(LAST_TURN)
    other, _, rejected = row["rejected"].rpartition(LAST_TURN)
    row = row | {"prompt": prompt + LAST_TURN, "chosen": chosen, "rejected": rejected,
                 "_prompt_of_rejected": other + LAST_TURN}
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    if turns and not before.strip() and turns[0] == "Human":
        row["_dialogue"] = join_turns(turns[::2], turns[1::2])
    return row


def split_common_beginning(row):
    """TRL's pair with an implicit prompt: what both texts begin with, up to a space."""
    if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
        return row                                     # require_text will say what is wrong
    n = os.path.commonprefix([row["chosen"], row["rejected"]]).rfind(" ")
    if n <= 0:
        return row
    return row | {"prompt": row["chosen"][:n], "chosen": row["chosen"][n:],
                  "rejected": row["rejected"][n:]}


def join_turns(speakers, texts):
    """HH-RLHF's turns -> messages; turns in a row by one speaker are one, as templates want it."""
    messages = []
    for speaker, text in zip(speakers, texts):
        role = {"Human": "user", "Assistant": "assistant"}[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def better_worse(items, ranks):
    """Every (better, worse) of a ranking, rank 0 the best; ties make no pair."""
    pairs = []
    for better, i in zip(items, ranks):
        for worse, j in zip(items, ranks):
            if i < j:
                pairs.append((better, worse))
    return pairs


def tokenize_responses(rows, tokenizer, need):
    """Rows with the "tokens" of prompt, response and end token, and their "mask", for each of the
    "responses", or for "chosen" and "rejected"."""
    def encode(row):
        texts = row.get("responses") or (row["chosen"], row["rejected"])
        tokens, mask = zip(*(encode_response(tokenizer, row, text) for text in texts))
        return row | {"tokens": tokens, "mask": mask}

    return tokenize_rows(rows, tokenizer, encode, need)


def filter_long_responses(rows, block_size, need):
    """The rows whose responses all fit the model, each with its prompt."""
    def fits(row):
        return max(len(ids) for ids in row["tokens"]) <= block_size

    reason = f"a response is longer than the model's {block_size} tokens"
    return filter_rows(rows, fits, reason, need)


def load_pairs(path, test_path, tokenizer, block_size):
    """Pairs to train on, to validate on and to report on, each with the "tokens" and the "mask" of
    its two responses, the chosen one first."""
    rows = read_preferences(path)
    for row in rows:
        if row.get("margin"):
            raise InputError(f'{row["_line"]}: field "margin" is read by reward.py alone')
    splits = []
    for pairs in split_rows(rows, read_preferences(test_path) if test_path else None):
        need = not splits                              # the training pairs come first
        pairs = tokenize_responses(pairs, tokenizer, need)
        splits.append(filter_long_responses(pairs, block_size, need))
    return splits


def pairs_to_rankings(pairs):
    """Pairs -> rows with "responses", best first, and their "ranks".

    The pairs of a row with "responses" become its ranking again. Other pairs are grouped by prompt:
    if they are exactly the pairs that one ranking implies, they become that ranking, else each pair
    is a row. Each pair is also a row if there are margins, or if two responses are compared more
    than once: annotators who agree would count once, those who disagree several times."""
    groups, counts = {}, Counter()
    for pair in pairs:
        groups.setdefault((pair["prompt"], pair.get("_ranking")), []).append(pair)
        if "_ranking" not in pair:
            counts[pair["prompt"], frozenset((pair["chosen"], pair["rejected"]))] += 1
    repeated = max(counts.values(), default=0) > 1
    has_margins = any("margin" in pair for pair in pairs)
    rows = []
    for (_, row_of_ranking), group in groups.items():
        ranking = find_ranking(group)
        if ranking is None or has_margins or repeated and not row_of_ranking:
            for pair in group:
                responses = [pair["chosen"], pair["rejected"]]
                rows.append(pair | {"responses": responses, "ranks": [0, 1]})
        else:
            rows.append(ranking)
    return rows


def find_ranking(group):
    """The row of the ranking that implies these pairs and no others, or None."""
    given = {(pair["chosen"], pair["rejected"]) for pair in group}
    beaten = Counter(rejected for _, rejected in given)         # by how many others
    texts = {text for pair in given for text in pair}
    texts = sorted(texts, key=lambda text: (beaten[text], text))
    levels = Counter(beaten[text] for text in texts)
    ties = sum(n * (n - 1) // 2 for n in levels.values())
    complete = len(given) == len(texts) * (len(texts) - 1) // 2 - ties
    consistent = all(beaten[chosen] < beaten[rejected] for chosen, rejected in given)
    if complete and consistent:
        return group[0] | {"responses": texts, "ranks": [beaten[text] for text in texts]}
    return None


def tokenize_rankings(pairs, tokenizer, block_size, need=True):
    """Rankings of the pairs, with the "tokens" and the "mask" of every response."""
    rows = tokenize_responses(pairs_to_rankings(pairs), tokenizer, need)
    return filter_long_responses(rows, block_size, need)


def load_centring_responses(cfg, tokenizer, block_size, rows):
    """Tokens and masks of the responses whose mean score reward.py sets to 0: the demonstrations
    that sft.py left in --init, or the chosen responses if there are none."""
    path = os.path.join(cfg.init, DEMONSTRATIONS)
    demonstrations = read_rows(path, "prompt", "response") if os.path.exists(path) else []
    encoded = [encode_response(tokenizer, row, row["response"]) for row in demonstrations]
    encoded = [(tokens, mask) for tokens, mask in encoded if len(tokens) <= block_size]
    if not encoded:
        encoded = [(row["tokens"][0], row["mask"][0]) for row in rows[:500]]
    return encoded
