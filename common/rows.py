"""
Rows in the formats of other projects -> three kinds of rows.

    prompt          "prompt", or the "messages" before the response; perhaps "answer", what is right
    demonstration   "prompt" and "response", or "messages" that end with the assistant
    preference      "prompt", "chosen" and "rejected"; perhaps "messages" before the response

`read_rows` reads a file and names file, line and field where it cannot; `normalise` turns the
formats of other projects into these kinds. A field that changes what a row says is used or refused.
"""
import gzip
import json
import os
import re
import zlib
from decimal import Decimal

from common.tokenizer import InputError, before_response

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
         "bing": "assistant", "model": "assistant", "developer": "system"}
# fields that change the meaning of a row or a turn, and that nothing here reads
MEANING = ["context", "passage", "document", "documents", "choices", "options", "tools",
           "functions", "tool_calls", "images", "image", "videos", "video", "audios", "audio",
           "reasoning_content", "thinking", "instruction", "input", "history", "system"]
TURN_MEANING = ["name", "tools", "tool_calls", "tool_call_id", "function_call", "refusal",
                "thought", "thinking", "reasoning_content", "images", "audio"]
# set by us later; a user's field of that name would collide
OURS = {"ids", "tokens", "mask", "turns", "_line", "_dropped", "_dialogue", "_ranking",
        "_prompt_of_rejected"}


# -------------------------------------------------------------------------------------------- files


def read_rows(path, *needed):
    """A file of rows -> list of dicts in which every field in `needed` is text; "_line" is where.
    Without `needed`, preferences. Rows that cannot be used are dropped and counted by reason."""
    rows, dropped = [], {}
    for location, raw in read_objects(path):
        row = normalise(raw, location, needed)
        if "_dropped" in row:
            dropped.setdefault(row["_dropped"], []).append(location)
            continue
        require_text(row, *needed)
        rows.append(row)
    total = len(rows) + sum(len(x) for x in dropped.values())
    for reason, where in dropped.items():
        print(f"dropped {len(where)} of {total} rows: {reason}; the first is {where[0]}")
    if not rows and dropped:
        reason, where = next(iter(dropped.items()))
        raise InputError(f"{where[0]}: no row is left: {reason}")
    if not rows:
        raise InputError(f"{path}: the file is empty")
    return rows


def read_objects(path):
    """Yields location, object: of JSON lines or a JSON array, either gzipped, in UTF-8 or in UTF-16
    with a byte order mark; of a parquet file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    name = path.lower()
    if name.endswith((".csv", ".tsv")):
        raise InputError(f"{path}: CSV is not read; write one JSON object a line")
    if name.endswith(".parquet"):
        yield from read_parquet(path)
        return
    with open(path, "rb") as f:
        data = f.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{path}:1: a damaged gzip file ({e})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            data = data.decode("utf-16").encode("utf-8", "surrogatepass")
        except ValueError as e:
            raise InputError(f"{path}:1: not UTF-16 ({e})") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    array = parse(data) if data.lstrip()[:1] == b"[" else None
    if isinstance(array, Exception) and name.endswith((".json", ".json.gz")):
        raise InputError(f"{path}:1: not a JSON array ({array})")
    if isinstance(array, list) and any(isinstance(x, dict) for x in array):
        found = [(f"{path}: row {i}", x) for i, x in enumerate(array, 1)]
    else:
        lines = enumerate(re.split(b"\r\n|\n|\r", data), 1)
        found = ((f"{path}:{i}", parse(line)) for i, line in lines if line.strip())
    for location, x in found:
        if isinstance(x, Exception):
            raise InputError(f"{location}: not a JSON line ({x})")
        if not isinstance(x, dict):
            raise InputError(f"{location}: expected an object {{...}}, found {type(x).__name__}")
        yield location, x


def parse(data):
    """What JSON bytes hold, or the error."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:          # invalid UTF-8 is a ValueError too
        return e


def read_parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: pip install pyarrow, to read it") from None
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as e:
        raise InputError(f"{path}: not a parquet file ({e})") from None
    for i, x in enumerate(table.to_pylist(), 1):
        yield f"{path}: row {i}", x


# ----------------------------------------------------------------------- rows of other projects


def normalise(raw, location, needed):
    """A row of one of the formats of docs/data_and_models.md as one of the three kinds. "_line" is
    where, and "_dropped" why it cannot be used, if so. null is absent."""
    row = {name: x for name, x in raw.items() if x is not None and name not in OURS}
    row["_line"] = location
    is_preference = not needed
    name_fields(row)
    row = {name: x for name, x in row.items() if x is not None}
    for name in ("messages", "prompt", "response", "chosen", "rejected"):
        if isinstance(row.get(name), dict):
            row[name] = [row[name]]                    # one turn
        if row.get(name) == []:
            return row | {"_dropped": f'"{name}" is empty'}
        if isinstance(row.get(name), list) or name == "messages" and name in row:
            row[name] = read_turns(row[name], location, name)
    if is_preference and "messages" in row and row["messages"] == row.get("chosen"):
        del row["messages"]                            # ultrafeedback's: chosen, once more
    join_conversation(row)
    if is_preference and any(isinstance(row.get(x), list) for x in ("chosen", "rejected")):
        split_conversations(row)
    add_context(row)
    if "messages" in row:
        write_prompt(row, "response" in needed)
    for name in MEANING:
        if row.get(name):
            raise InputError(f'{location}: field "{name}" changes what the row says, and is not '
                             "read; put it into the prompt, or remove it")
    if "ranks" in row and "responses" not in row:
        raise InputError(f'{location}: field "ranks" needs a field "responses"')
    roles = {m["role"] for m in row.get("messages", [])} - {"system", "user", "assistant"}
    if roles:
        row.setdefault("_dropped", f"a turn has the role {min(roles)!r}")
    check_weight(row)
    if "response" in needed and row.get("label") in (False, 0, "false", "False"):
        row.setdefault("_dropped", '"label" is false')
    if isinstance(row.get("answer"), (int, float)) and not isinstance(row["answer"], bool):
        row["answer"] = format(Decimal(repr(row["answer"])), "f")           # 1e-05 -> 0.00001
    return row


def rename(row, old, new):
    """row[old] becomes row[new]; where both stand, they must agree."""
    if old in row:
        x = row.pop(old)
        if row.setdefault(new, x) != x:
            raise InputError(f'{row["_line"]}: fields "{old}" and "{new}" differ; remove one')


def name_fields(row):
    """The names of other projects -> ours."""
    rename(row, "conversations", "messages")           # ShareGPT
    rename(row, "system_prompt", "system")
    if "preferred_output" in row:                      # OpenAI's preferences
        given = row.pop("input", {})
        given = dict(given) if isinstance(given, dict) else {"messages": given}
        row |= {"prompt": given.pop("messages", None), "chosen": row.pop("preferred_output"),
                "rejected": row.pop("non_preferred_output", None)}
        row |= {name: x for name, x in given.items() if name in MEANING}
    has_prompt = "prompt" in row or "messages" in row
    if not has_prompt and isinstance(row.get("instruction"), str):          # Alpaca, Dolly
        parts = [row.pop("instruction"), row.pop("input", ""), row.pop("context", "")]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f'{row["_line"]}: fields "input" and "context" must be text')
        row["prompt"] = "\n".join(part for part in parts if part) + "\n"
        rename(row, "output", "response")
    elif not has_prompt and isinstance(row.get("input"), str):
        row["prompt"] = row.pop("input") + "\n"
        rename(row, "output", "response")
    for name in ("question", "problem"):               # GSM8K, MATH
        if not isinstance(row.get(name), str):
            continue
        if row.setdefault("prompt", row[name] + "\n").strip() != row[name].strip():
            raise InputError(f'{row["_line"]}: field "{name}" stands beside another prompt')
        if "messages" in row:
            raise InputError(f'{row["_line"]}: field "{name}" stands beside "messages"')
        row.setdefault("answer", row.get("solution"))
        row.setdefault("response", row.get("solution", row["answer"]))
    if isinstance(row.get("reward_model"), dict):      # verl
        row.setdefault("answer", row["reward_model"].get("ground_truth"))
    for name in ("ground_truth", "reference_answer"):
        if name in row:
            row.setdefault("answer", row[name])
    rename(row, "completion", "response")              # TRL


def turn(role, content):
    return {"role": role, "content": content}


def join_conversation(row):
    """"prompt" and "response", of which one or both are lists of turns -> "messages". Turns of the
    prompt are not trained."""
    prompt, response = row.get("prompt"), row.get("response")
    if isinstance(prompt, str) and isinstance(response, list):
        prompt = [turn("user", prompt)]
    if not isinstance(prompt, list):
        return
    if isinstance(response, str):
        response = [turn("assistant", response)]
    for message in prompt:
        if message["role"] == "assistant":
            message["weight"] = 0
    if prompt[-1]["role"] == "assistant":
        row.setdefault("_dropped", "the prompt ends with a turn of the assistant")
    row["messages"] = prompt + (response or [])
    row.pop("prompt")
    row.pop("response", None)


def read_turns(turns, location, field):
    """[{"role" or "from", "content" or "value"}] -> [{"role", "content"}], contents as text; with
    "weight" 0 a turn of the assistant is not trained."""
    messages = []
    for given in turns if isinstance(turns, list) else []:
        given = given if isinstance(given, dict) else {}
        given = {name: x for name, x in given.items() if x is not None}
        for name in TURN_MEANING:
            if given.get(name):
                raise InputError(f'{location}: field "{name}" of "{field}" changes what the turn '
                                 "says, and is not read; remove it")
        role = given.get("role", given.get("from"))
        content = given.get("content", given.get("value"))
        if isinstance(content, list):
            content = join_parts(content, location, field)
        if not isinstance(role, str) or not isinstance(content, str):
            messages = []
            break
        messages.append(turn(ROLES.get(role.lower(), role.lower()), content))
        if given.get("weight", 1) != 1:
            messages[-1]["weight"] = given["weight"]
    if not messages:
        raise InputError(f'{location}: field "{field}" must be a list of {{"role": text, '
                         '"content": text}')
    return messages


def join_parts(parts, location, field):
    """[{"type": "text", "text": ...}] -> text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f'{location}: field "{field}" has a part of the type {kind}, and only '
                             "text is read")
        texts.append(part["text"])
    return "".join(texts)


def add_context(row):
    """"system" and "history" ([[user, assistant], ...]) become turns before the prompt."""
    before = []
    system = row.get("system")
    if isinstance(system, str):
        row.pop("system")
        before += [turn("system", system)] if system.strip() else []
    if "messages" not in row and isinstance(row.get("history"), list):
        for pair in row.pop("history"):
            texts = pair if isinstance(pair, list) else []
            if len(texts) != 2 or not all(isinstance(x, str) for x in texts):
                raise InputError(f'{row["_line"]}: field "history" must be a list of [text, text]')
            before += [turn("user", pair[0]), turn("assistant", pair[1]) | {"weight": 0}]
    if not before:
        return
    if "messages" not in row and isinstance(row.get("prompt"), str):
        row["messages"] = [turn("user", row["prompt"].removesuffix("\n"))]
        if isinstance(row.get("response"), str):
            row["messages"].append(turn("assistant", row["response"]))
    if "messages" not in row:
        raise InputError(f'{row["_line"]}: field "system" without a prompt; put it into the texts')
    if row["messages"][0]["role"] == "system":
        raise InputError(f'{row["_line"]}: field "system" stands beside a system message; remove '
                         "one of them")
    row["messages"] = before + row["messages"]


def write_prompt(row, needs_response):
    """"prompt" and "response" of a conversation, as text."""
    messages = row["messages"]
    turns = [f"{m['role']}: {m['content']}" for m in before_response(messages)]
    row["prompt"] = "\n".join(turns)
    if not needs_response:
        return
    row["response"] = messages[-1]["content"]
    responses = [m for m in messages if m["role"] == "assistant"]
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        row.setdefault("_dropped", f'"messages" must end with the assistant, not {role!r}')
    elif not all(m["content"].strip() for m in responses):
        row.setdefault("_dropped", "a turn of the assistant is empty")
    elif not any(m.get("weight", 1) for m in responses):
        row.setdefault("_dropped", 'every turn of the assistant has "weight" 0')


def check_weight(row):
    """0 means that a row, or a turn, is not trained; no other weight is read but 1."""
    weights = [row.get("weight", 1)] + [m.get("weight", 1) for m in row.get("messages", [])]
    for x in weights:
        if isinstance(x, bool) or x not in (0, 1):
            raise InputError(f'{row["_line"]}: field "weight" is {x!r}; it must be 0 or 1')
    if row.get("weight", 1) == 0:
        row.setdefault("_dropped", '"weight" is 0')


def split_conversations(row):
    """"chosen" and "rejected" that are conversations -> "messages" before the response, and the two
    responses as text. Either holds the response alone, or the prompt before it."""
    line = row["_line"]
    both = [row["chosen"], row.get("rejected")]
    for i, name in enumerate(("chosen", "rejected")):
        if isinstance(both[i], str):                   # beside a conversation
            both[i] = [turn("assistant", both[i])]
        if not isinstance(both[i], list):
            kind = type(both[i]).__name__
            raise InputError(f'{line}: field "{name}" is {kind}, not a list of turns')
    prompts = [turns[:-1] for turns in both]
    if any(turns[-1]["role"] != "assistant" for turns in both):
        row.setdefault("_dropped", "a response is not a turn of the assistant")
    row["chosen"], row["rejected"] = (turns[-1]["content"] for turns in both)
    if prompts[0] and prompts[0][-1]["role"] == "assistant":
        row.setdefault("_dropped", "the prompt ends with a turn of the assistant")
    if prompts[0] != prompts[1]:
        row.setdefault("_dropped", "the two prompts differ")
    said = [message["content"].strip() for message in prompts[0]]
    if isinstance(row.get("prompt"), str) and said and row["prompt"].strip() not in said:
        row.setdefault("_dropped", "the prompt is not among the turns before the response")
    given = [turn(message["role"], message["content"]) for message in row.get("messages", [])]
    if given and prompts[0] and prompts[0] != given:
        raise InputError(f'{line}: field "chosen" must be one turn, or begin with the turns of the '
                         "prompt")
    messages = given or prompts[0]
    if messages:
        row["messages"] = messages
    elif "prompt" not in row:
        raise InputError(f'{line}: field "prompt" is missing; a row needs prompt, chosen, rejected')


def require_text(row, *needed):
    for name in needed:
        if isinstance(row.get(name), str):
            continue
        problem = "is missing"
        if row.get(name) is not None:
            problem = f"is {type(row[name]).__name__}, not text"
        names = ", ".join(name for name in row if not name.startswith("_"))
        raise InputError(f'{row["_line"]}: field "{name}" {problem}; a row needs '
                         f'{", ".join(needed)}, and this one has {names[:200]}')
