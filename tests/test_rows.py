"""Files as people have them: formats of other projects, what changes a row's meaning, encodings.
python -m pytest tests/test_rows.py"""
import gzip
import json
import subprocess
import sys

import pytest

import grpo
from common import InputError
from common.data import load_demonstrations, tokenize_demonstration
from common.preferences import load_pairs, read_preferences
from common.rows import read_rows
from common.show import show
from common.tokenizer import encode_prompt, encode_response, make_tokenizer
from common.verifier import gold_number
from conftest import ROOT


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def s(text):
    return {"role": "system", "content": text}


@pytest.fixture
def write(tmp_path):
    """Rows, text or bytes -> the path of a file that holds them."""
    def write(content, name="rows.jsonl"):
        if isinstance(content, (dict, list)):
            rows = content if isinstance(content, list) else [content]
            content = "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)
    return write


TALK = [u("Hi"), a("Hello!"), u("Bye"), a("Goodbye.")]
WITH_SYSTEM = [s("Be brief."), *TALK]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Goodbye."}]
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
DEMONSTRATIONS = [
    # row, the same as messages, or as a plain prompt and response
    ({"prompt": "Hi", "completion": "Hello!"}, ("Hi", "Hello!")),                        # TRL
    ({"prompt": [u("Hi")], "completion": [a("Hello!")]}, [u("Hi"), a("Hello!")]),
    ({"prompt": "Hi", "completion": [a("Hello!")]}, [u("Hi"), a("Hello!")]),
    ({"prompt": [u("Hi")], "response": "Hello!"}, [u("Hi"), a("Hello!")]),
    ({"prompt": "Hi", "completion": "Hello!", "label": True}, ("Hi", "Hello!")),
    ({"messages": TALK}, TALK),
    ({"messages": [u("Hi"), {"role": "assistant", "content": PARTS}]}, [u("Hi"), a("Hello!")]),
    ({"messages": [u("Hi") | {"name": None}, a("Hello!") | {"tool_calls": []}]},
     [u("Hi"), a("Hello!")]),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, ("Add.\n1 2\n", "3")),      # Alpaca
    ({"instruction": "Add.", "input": "", "output": "3"}, ("Add.\n", "3")),
    ({"instruction": "Add.", "output": "3", "input": None}, ("Add.\n", "3")),
    ({"instruction": "Add.", "context": "1 2", "response": "3"}, ("Add.\n1 2\n", "3")),  # Dolly
    ({"input": "Add 1 2.", "output": "3"}, ("Add 1 2.\n", "3")),
    ({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello!"},
     [s("Be brief."), u("Hi"), a("Hello!")]),                                            # OpenOrca
    ({"prompt": "Hi", "messages": [u("Hi"), a("Hello!")], "chosen": [u("Hi"), a("Hello!")],
      "rejected": [u("Hi"), a("No")]}, [u("Hi"), a("Hello!")]),             # ultrafeedback's SFT
    ({"prompt": [u("Hi"), a("Hello!"), u("Bye")], "completion": [a("Goodbye.")]},
     [u("Hi"), a("Hello!") | {"weight": 0}, u("Bye"), a("Goodbye.")]),
    ({"messages": [{"role": "developer", "content": "Be brief."}, {"role": "User", "content": "Hi"},
                   a("Hello!") | {"weight": None}]}, [s("Be brief."), u("Hi"), a("Hello!")]),
    ({"instruction": "Bye", "output": "Goodbye.", "system": "Be brief.",
      "history": [["Hi", "Hello!"]]},
     [s("Be brief."), u("Hi"), a("Hello!") | {"weight": 0}, u("Bye"), a("Goodbye.")]),
    ({"messages": [{"role": None, "from": "human", "value": "Hi", "content": None}, a("Hello!")],
      "system": " "}, [u("Hi"), a("Hello!")]),
    ({"conversations": SHAREGPT}, TALK),                                                 # ShareGPT
    ({"conversations": SHAREGPT, "system": "Be brief."}, WITH_SYSTEM),
    ({"conversations": TALK}, TALK),                                                     # minimind
    ({"question": "1+2?", "answer": "It is\n#### 3"}, ("1+2?\n", "It is\n#### 3")),      # GSM8K
    ({"problem": "1+2?", "solution": r"It is $\boxed{3}$."},
     ("1+2?\n", r"It is $\boxed{3}$.")),                                                 # MATH
    ({"prompt": "Hi", "response": "Hello!", "system": "Be brief."},
     [s("Be brief."), u("Hi"), a("Hello!")]),
    ({"prompt": "Hi", "response": "Hello!", "weight": 1, "id": 7, "source": "x", "tokens": 3},
     ("Hi", "Hello!")),
]


@pytest.mark.parametrize("row, same", DEMONSTRATIONS)
def test_a_demonstration_is_trained_as_if_it_were_written_in_our_fields(row, same, write):
    tokenizer = make_tokenizer()
    if isinstance(same, tuple):
        same = dict(zip(("prompt", "response"), same))
    else:
        same = {"messages": same}
    found, expected = [], []
    for content, rows in ((row, found), (same, expected)):
        for x in read_rows(write(content), "prompt", "response"):
            x = tokenize_demonstration(x, tokenizer)
            rows.append((x["prompt"], x["response"], x["tokens"], x["mask"]))
    assert found == expected and sum(found[0][3]) > 1


PROMPTS = [
    # row, the prompt as text or messages, the number that is right
    ({"prompt": [u("1+2?")], "reward_model": {"style": "rule", "ground_truth": "3"},
      "data_source": "x", "ability": "math", "extra_info": {"index": 1}}, [u("1+2?")], 3),  # verl
    ({"prompt": "1+2?", "reward_model": {"ground_truth": 3}}, "1+2?", 3),
    ({"problem": "1+2?", "solution": r"So \boxed{3}.", "answer": "3", "level": 1}, "1+2?\n", 3),
    ({"problem": "1+2?", "solution": r"Or \boxed{2}, no, \boxed{3}."}, "1+2?\n", None),
    ({"question": "1+2?", "answer": "1+2=3\n#### 3"}, "1+2?\n", 3),
    ({"prompt": "1+2?", "answer": 3}, "1+2?", 3),
    ({"messages": [u("1+2?"), a("3")], "answer": "3"}, [u("1+2?")], 3),
    ({"prompt": "1+2?", "answer": "3", "two_digits": "05", "other": 1, "mask": 1}, "1+2?", 3),
    ({"prompt": "1+2?", "answer": "2 or 3"}, "1+2?", None),
    ({"problem": "1+2?", "solution": r"(a) \boxed{2} (b) \boxed{3}"}, "1+2?\n", None),
    ({"problem": "1+2?", "solution": r"\boxed{3}, that is \boxed{3.0}"}, "1+2?\n", 3),
    ({"messages": [u("1+2?")], "reference_answer": "3"}, [u("1+2?")], 3),                  # OpenAI
    ({"messages": [u("1+2?")], "ground_truth": "3", "dataset": "x"}, [u("1+2?")], 3),      # Tulu
]


@pytest.mark.parametrize("row, prompt, number", PROMPTS)
def test_a_prompt_is_fed_as_it_stands_and_its_answer_is_the_number(row, prompt, number, write):
    tokenizer = make_tokenizer()
    row, = read_rows(write(row), "prompt")
    name = "prompt" if isinstance(prompt, str) else "messages"
    expected = {"prompt": "", name: prompt}
    assert encode_prompt(tokenizer, row) == encode_prompt(tokenizer, expected)
    assert gold_number(row["answer"]) == number
    if number is not None:
        assert [grpo.score(row, text) for text in ("3", "05", "2")] == [1, 0, 0]


PAIRS = [
    # row, prompt as text or messages, chosen, rejected
    ({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi"}, "Hi", "Hi there", "Hi"),
    ({"prompt": "Hello", "chosen": "Hello! Yes.", "rejected": "Hello!"}, "Hello", "Hello! Yes.",
     "Hello!"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.",
     " green."),                                                          # TRL, implicit prompt
    ({"prompt": [u("Hi")], "chosen": [a("Yes")], "rejected": [a("No")]}, [u("Hi")], "Yes", "No"),
    ({"chosen": [u("Hi"), a("Yes")], "rejected": [u("Hi"), a("No")]}, [u("Hi")], "Yes", "No"),
    ({"prompt": "Hi", "chosen": [u("Hi"), a("Yes")], "rejected": [u("Hi"), a("No")],
      "messages": [u("Hi"), a("Yes")], "score_chosen": 8.0},
     [u("Hi")], "Yes", "No"),                                             # ultrafeedback
    ({"prompt": "Hi", "chosen": [a("Yes")], "rejected": [a("No")]}, "Hi", "Yes", "No"),
    ({"prompt": [u("Hi")], "chosen": "Yes", "rejected": "No"}, [u("Hi")], "Yes", "No"),
    ({"input": {"messages": [s("Brief."), u("Hi")], "tools": []}, "preferred_output": [a("Yes")],
      "non_preferred_output": [a("No")]}, [s("Brief."), u("Hi")], "Yes", "No"),          # OpenAI
    ({"input": "Hi", "preferred_output": "Yes", "non_preferred_output": "No"}, "Hi", "Yes", "No"),
    ({"prompt": [u("Hi"), a("Hm"), u("So?")], "chosen": [u("Hi"), a("Hm"), u("So?"), a("Yes")],
      "rejected": [u("Hi"), a("Hm"), u("So?"), a("No")]}, [u("Hi"), a("Hm"), u("So?")], "Yes",
     "No"),
    ({"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " a\n\nHuman: x\n\nAssistant: b",
      "rejected": " a\n\nHuman: x\n\nAssistant: c"}, "\n\nHuman: hi\n\nAssistant:",
     " a\n\nHuman: x\n\nAssistant: b", " a\n\nHuman: x\n\nAssistant: c"),
    ({"conversations": [{"from": "human", "value": "Hi"}],
      "chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}},
     [u("Hi")], "Yes", "No"),                                             # LLaMA-Factory
    ({"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}, "Add.\n1 2\n", "3",
     "4"),
    ({"system": "", "question": "Hi", "chosen": "Yes", "rejected": "No"}, "Hi\n", "Yes", "No"),
    ({"system": "Brief.", "input": "Hi", "chosen": "Yes", "rejected": "No"}, [s("Brief."), u("Hi")],
     "Yes", "No"),                                                        # distilabel
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
      "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "\n\nHuman: Hi\n\nAssistant:", " Yes", " No"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
     "\n\nHuman: Hi\n\nAssistant:", " Yes", " No"),                                      # HH-RLHF
]


@pytest.mark.parametrize("row, prompt, chosen, rejected", PAIRS)
def test_a_preference_is_its_prompt_and_two_responses_from_which_nothing_is_cut(
        row, prompt, chosen, rejected, write):
    tokenizer = make_tokenizer()
    row, = read_preferences(write(row))
    assert (row["chosen"], row["rejected"]) == (chosen, rejected)
    name = "prompt" if isinstance(prompt, str) else "messages"
    expected = {"prompt": "", name: prompt}
    for text in (chosen, rejected):
        assert encode_response(tokenizer, row, text) == encode_response(tokenizer, expected, text)


REFUSED = [
    # row, what the line names
    ({"prompt": "Hi", "response": "x", "context": "c"}, '"context"'),
    ({"prompt": "Hi", "response": "x", "choices": ["a", "b"]}, '"choices"'),
    ({"question": "Hi", "answer": "A", "options": {"A": "x"}}, '"options"'),
    ({"prompt": "Hi", "response": "x", "input": "c"}, '"input"'),
    ({"prompt": "Hi", "response": "x", "instruction": "c"}, '"instruction"'),
    ({"prompt": "Hi", "response": "x", "reasoning_content": "c"}, '"reasoning_content"'),
    ({"messages": TALK, "tools": [{"type": "function"}]}, '"tools"'),
    ({"messages": TALK, "images": ["a.png"]}, '"images"'),
    ({"messages": TALK, "history": [["a", "b"]]}, '"history"'),
    ({"messages": WITH_SYSTEM, "system": "Other."}, '"system"'),
    ({"prompt": "Hi", "response": "x", "history": "c"}, '"history"'),
    ({"prompt": "Hi", "response": "x", "ranks": [0, 1]}, '"ranks"'),
    ({"prompt": "Hi", "response": "x", "weight": 0.5}, '"weight"'),
    ({"messages": [u("Hi"), a("x") | {"weight": 2}]}, '"weight"'),
    ({"messages": [u("Hi") | {"name": "Ann"}, a("x")]}, '"name"'),
    ({"messages": [u("Hi"), a("x") | {"reasoning_content": "c"}]}, '"reasoning_content"'),
    ({"messages": [u("Hi"), a("") | {"tool_calls": [{"id": 1}]}]}, '"tool_calls"'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, a("x")]}, "image_url"),
    ({"conversations": "Hi"}, '"messages"'),
    ({"messages": [s("x") | {"tools": "[{}]"}, u("Hi"), a("x")]}, '"tools"'),
    ({"instruction": "Hi", "messages": TALK}, '"instruction"'),
    ({"question": "Hi", "messages": TALK}, '"question"'),
    ({"conversations": TALK, "messages": [u("a"), a("b")]}, '"conversations"'),
    ({"completion": "x", "response": "y", "prompt": "Hi"}, '"completion"'),
    ({"question": "Hi", "prompt": "Bye", "response": "x"}, '"question"'),
    ({"question": "Hi", "answer": "x", "passage": "c"}, '"passage"'),
    ({"instruction": "Hi", "input": 5, "output": "x"}, '"input"'),
    ({"prompt": "Hi", "response": "x", "history": [["a", "b", "c"]]}, '"history"'),
    ({"text": "Hi"}, '"prompt"'),
]


@pytest.mark.parametrize("row, name", REFUSED)
def test_a_field_that_changes_what_a_row_says_is_refused_by_name(row, name, write):
    with pytest.raises(InputError, match="rows.jsonl:2") as error:
        read_rows(write([{"prompt": "a", "response": "b"}, row]), "prompt", "response")
    assert name in str(error.value)
    empty = {key: None for key in row if f'"{key}"' == name}   # null is absent
    read_rows(write({"prompt": "a", "response": "b"} | empty), "prompt", "response")


@pytest.mark.parametrize("row, reason", [
    ({"messages": [u("Hi")]}, "must end with the assistant"),
    ({"messages": [u("Hi"), a(" ")]}, "empty"),
    ({"messages": [u("Hi"), a(""), u("Hi"), a("x")]}, "empty"),
    ({"messages": [u("Hi"), a("x") | {"weight": 0}]}, '"weight" 0'),
    ({"prompt": "Hi", "response": "x", "weight": 0}, '"weight" is 0'),
    ({"prompt": "Hi", "completion": "x", "label": False}, '"label" is false'),
    ({"prompt": "Hi", "completion": "x", "label": 0}, '"label" is false'),
    ({"messages": TALK, "label": False}, '"label" is false'),
    ({"conversations": []}, '"messages" is empty'),
    ({"messages": [u("Hi"), {"role": "tool", "content": "1"}, a("x")]}, "role 'tool'"),
    ({"prompt": [u("Hi"), a("{")], "completion": [a("x")]}, "ends with a turn of the assistant"),
])
def test_a_row_that_cannot_be_trained_is_dropped_and_counted(row, reason, write, capsys):
    good = {"prompt": "a", "response": "b"}
    rows = read_rows(write([good, row, good, row]), "prompt", "response")
    line = capsys.readouterr().out
    assert len(rows) == 2 and "dropped 2 of 4" in line and reason in line
    assert "rows.jsonl:2" in line
    with pytest.raises(InputError, match="no row is left"):
        read_rows(write(row), "prompt", "response")


def test_a_turn_of_weight_0_is_context_and_not_trained(write):
    row, = read_rows(write({"messages": [u("Hi"), a("No!") | {"weight": 0}, u("So?"), a("Yes.")]}),
                     "prompt", "response")
    tokenizer = make_tokenizer()
    row = tokenize_demonstration(row, tokenizer)
    trained = [x for x, m in zip(row["tokens"], row["mask"]) if m]
    assert tokenizer.decode(trained) == "Yes.<|im_end|>"
    assert "No!" in tokenizer.decode(row["tokens"])


def test_a_row_that_the_template_refuses_is_dropped_and_a_special_token_is_told(write, capsys):
    """Mistral's and Gemma's templates raise at a system message."""
    tokenizer = make_tokenizer()
    tokenizer.template = ("{% for m in messages %}{% if m.role == 'system' %}"
                          "{{ raise_exception('no system') }}{% endif %}"
                          "{{ m.role }}: {{ m.content }}<|im_end|>"
                          "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    good = {"messages": [u("Say <|im_end|>."), a("x")]}
    bad = {"messages": [s("1"), u("Hi"), a("x")]}

    class Cfg:
        data, test, eval_prompts = write([bad] + [good | {"split_by": i} for i in range(40)]), "", 0

    train, val, test = load_demonstrations(Cfg, tokenizer, 200, None)
    out = capsys.readouterr().out
    assert len(train) + len(val) + len(test) == 40
    assert "dropped 1 of 41 rows that the chat template refuses" in out and "no system" in out
    assert "rows.jsonl:1" in out and "warning" in out and "<|im_end|> in" in out
    Cfg.data = write(bad)
    with pytest.raises(InputError, match="rows.jsonl:1: .*no system"):
        load_demonstrations(Cfg, tokenizer, 200, None)


@pytest.mark.parametrize("row, reason", [
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Thanks!",
      "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "not a turn of the assistant"),
    ({"prompt": "Cats?", "chosen": [u("Hi"), a("Yes")], "rejected": [u("Hi"), a("No")]},
     "not among the turns"),
    ({"chosen": [u("Hi"), a("1"), a("Yes")], "rejected": [u("Hi"), a("1"), a("No")]},
     "ends with a turn of the assistant"),
    ({"chosen": [u("Hi"), a("Yes"), u("So?")], "rejected": [u("Hi"), a("No")]},
     "not a turn of the assistant"),
])
def test_a_pair_that_cannot_be_read_as_one_is_dropped_and_counted(row, reason, write, capsys):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert len(read_preferences(write([good, row]))) == 1
    line = capsys.readouterr().out
    assert "dropped 1 of 2" in line and reason in line and "rows.jsonl:2" in line


def test_dpo_refuses_margins_which_it_does_not_use(write):
    rows = [{"prompt": f"a{i}", "chosen": "b", "rejected": "c", "margin": 0.5} for i in range(30)]
    with pytest.raises(InputError, match='rows.jsonl:1: field "margin"'):
        load_pairs(write(rows), None, make_tokenizer(), 64)


ROW = '{"prompt": "é", "response": "b\\u2028c"}'
FILES = {
    "rows.jsonl": (ROW + "\n" + ROW).encode(),
    "crlf.jsonl": (ROW + "\r\n" + ROW + "\r\n").encode(),
    "cr.jsonl": (ROW + "\r" + ROW).encode(),
    "separator.jsonl": (ROW.replace("\\u2028", "\u2028") + "\n" + ROW).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + (ROW + "\n" + ROW).encode(),
    "utf16.jsonl": (ROW + "\n" + ROW).encode("utf-16"),
    "array.json": f"[{ROW},\n\n {ROW}]".encode(),
    "lines.json": (ROW + "\n" + ROW).encode(),
    "rows.jsonl.gz": gzip.compress((ROW + "\n" + ROW).encode()),
    "array.json.gz": gzip.compress(f"[{ROW}, {ROW}]".encode("utf-16")),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_encoding_hold_the_same_rows(name, write):
    rows = read_rows(write(FILES[name], name), "prompt", "response")
    assert [(row["prompt"], row["response"]) for row in rows] == [("é", "b\u2028c")] * 2
    assert all(name in row["_line"] for row in rows)


def test_parquet_is_read_where_pyarrow_is_installed_and_csv_is_refused(
        write, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="rows.csv: CSV"):
        read_rows(write("prompt,response\na,b\n", "rows.csv"), "prompt")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_rows(write(b"PAR1", "rows.parquet"), "prompt")
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = str(tmp_path / "good.parquet")
    parquet.write_table(pyarrow.table({"messages": [TALK], "answer": [3]}), path)
    row, = read_rows(path, "prompt", "response")
    assert row["response"] == "Goodbye." and row["answer"] == "3"
    with pytest.raises(InputError, match="not a parquet file"):
        read_rows(write(b"PAR1", "rows.parquet"), "prompt")


def test_show_prints_what_is_fed_and_what_is_trained(write, capsys):
    tokenizer = make_tokenizer()
    show(write({"messages": TALK}), tokenizer, 3)
    parts = [line.split("tokens  ") for line in capsys.readouterr().out.splitlines()
             if "tokens" in line]
    assert [(name.split()[0], text) for name, text in parts] == [
        ("fed", repr("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")),
        ("trained", repr("Hello!<|im_end|>")),
        ("fed", repr("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n")),
        ("trained", repr("Goodbye.<|im_end|>"))]
    show(write({"prompt": "1+2?", "chosen": "3", "rejected": "4"}), tokenizer, 3)
    out = capsys.readouterr().out
    assert "a preference" in out and out.count("fed ") == 2 and "'4<|endoftext|>'" in out
    show(write({"prompt": "1+2?", "answer": "3"}), tokenizer, 3)
    assert "right is 3" in capsys.readouterr().out
    show(write({"messages": [u("1+2?")], "ground_truth": "2 or 3"}), tokenizer, 3)
    assert "a prompt" in capsys.readouterr().out
    with pytest.raises(InputError, match="empty"):
        show(write(""), tokenizer, 3)


def test_show_is_a_command(write):
    path = write({"prompt": "Hi", "response": "x"})
    command = [sys.executable, "-m", "common.show", path, "--chat", "chat"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "<|im_start|>user" in done.stdout and "trained" in done.stdout, done.stderr
    command[3] = path + "x"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith("show: ") and done.stderr.count("\n") == 1
