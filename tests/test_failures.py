"""What goes wrong ends in one clear line, and nothing that was saved is lost.   python -m pytest tests/test_failures.py"""
import dataclasses
import errno
import importlib
import json
import math
import ntpath
import os
import random
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as M
from conftest import PPO, QUICK, equal, metrics, quick, script, tiny
from model import Guard, InputError, load, make_tokenizer, save

SCRIPTS = ["sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py", "dapo.py"]


# -------------------------------------------------------------------------------------------------------------------- bad input


GOOD = json.dumps({"prompt": "2+2=", "response": "4", "answer": "4"}) + "\n"
BAD = [
    # script, arguments, content of rows.jsonl, what the one line says
    ("sft.py", ["--data", "nowhere.jsonl"], None, "nowhere.jsonl: no such file"),
    ("sft.py", ["--data", "rows.jsonl"], "", "rows.jsonl: the file is empty"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD * 2 + '{"prompt": \n', "rows.jsonl:3: not a JSON line"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD + "[1, 2]\n", "rows.jsonl:2: expected an object {...}, found list"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD + '{"prompt": "a"}\n', 'rows.jsonl:2: field "response" is missing; a row needs prompt, response'),
    ("sft.py", ["--data", "rows.jsonl"], '{"prompt": 3, "response": "a"}\n', 'rows.jsonl:1: field "prompt" is int, not text'),
    ("sft.py", ["--data", "rows.jsonl"], '{"messages": [{"role": "user"}]}\n', 'rows.jsonl:1: field "messages" must be a list'),
    ("sft.py", ["--data", "rows.jsonl"], '{"messages": [{"role": "user", "content": "a"}]}\n', "must end with the assistant's turn, not 'user'"),
    ("sft.py", ["--data", "rows.jsonl", "--context", "8"], json.dumps({"prompt": "a" * 9, "response": "b"}) + "\n", "longer than the context of 8 tokens"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD.replace('"4"', '" "', 1), "the response is empty"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD.replace("2+2=", "2"), "no row is left to train on"),
    ("sft.py", ["--data", "rows.jsonl"], '{"question": null, "answer": "4"}\n', 'rows.jsonl:1: field "prompt" is missing'),
    ("sft.py", ["--data", "rows.jsonl"], '{"question": "a"}\n', 'rows.jsonl:1: field "response" is missing'),
    ("sft.py", ["--data", "rows.jsonl"], '{"prompt": "a", "messages": null}\n', 'rows.jsonl:1: field "messages" must be a list'),
    ("sft.py", ["--data", "rows.jsonl"], '{"prompt": "", "response": "a"}\n', "the prompt or the response is empty"),
    ("sft.py", ["--data", "rows.jsonl"], "[" * 100_000 + "\n", "rows.jsonl:1: not a JSON line"),
    ("sft.py", ["--context", "8"], None, "longer than the context of 8 tokens"),
    ("sft.py", ["--lr", "-1"], None, "--lr -1.0: must be at least 0"),
    ("sft.py", ["--seed", "-1"], None, "--seed -1: must be from 0"),
    ("sft.py", ["--widht", "64"], None, "unrecognized arguments: --widht 64"),
    ("sft.py", ["--steps", "many"], None, "argument --steps: invalid int value: 'many'"),
    ("sft.py", ["--steps", "0"], None, "--steps 0: must be at least 1"),
    ("sft.py", ["--guard", "perhaps"], None, "argument --guard: invalid true_or_false value: 'perhaps'"),
    ("sft.py", ["--width", "50"], None, "--width 50 --heads 3"),
    ("sft.py", ["--tokenizer", "gpt5"], None, "tokenizer 'gpt5' is unknown: use bytes or one of"),
    ("sft.py", ["--init", "nowhere"], None, "nowhere: no checkpoint here"),
    ("sft.py", ["--resume"], None, "out/sft: nothing to resume"),
    ("sft.py", ["--init", "SMALL", "--layers", "6"], None, "--layers 6: "),
    ("sft.py", ["--init", "SMALL", "--tokenizer", "gpt2"], None, "--tokenizer gpt2: "),
    ("sft.py", ["--chat", "yes"], None, "--chat yes: must be auto, chat or plain"),
    ("grpo.py", ["--init", "SMALL", "--chat", "yes"], None, "--chat yes: must be auto, chat or plain"),
    ("grpo.py", ["--init", "SMALL", "--format_reward", "-1"], None, "--format_reward -1.0: must be at least 0"),
    ("grpo.py", ["--init", "SMALL", "--temperature", "0"], None, "--temperature 0.0: must be above 0"),
    ("grpo.py", ["--init", "SMALL", "--group", "1"], None, "--group 1: must be at least 2"),
    ("grpo.py", ["--init", "SMALL", "--minibatch", "100"], None, "--minibatch 100 does not divide the 256 answers"),
    ("grpo.py", ["--init", "nowhere"], None, "nowhere: no checkpoint here"),
    ("grpo.py", ["--init", "SMALL", "--max_new", "60"], None, "prompt + --max_new 60 exceed the context of 64 tokens"),
    ("grpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a"}\n', 'rows.jsonl:1: field "answer" is missing'),
    ("grpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "answer": "b"}\n', 'no number in "answer"'),
    ("grpo.py", ["--init", "rows.jsonl"], "x", "rows.jsonl: no checkpoint here"),
    ("sft.py", ["--init", "JUDGE"], None, "this is a reward model, and a policy is needed here"),
    ("grpo.py", ["--init", "JUDGE"], None, "this is a reward model, and a policy is needed here"),
    ("grpo.py", ["--init", "SMALL", "--reward", "SMALL"], None, "this is a policy, and a reward model is needed here"),
    ("ppo.py", ["--init", "SMALL", "--reward", "nowhere"], None, "nowhere: no checkpoint here"),
    ("ppo.py", ["--init", "SMALL", "--reward", "rule", "--data", "rows.jsonl"], '{"prompt": "a"}\n', 'rows.jsonl:1: field "answer" is missing'),
    ("ppo.py", ["--init", "SMALL", "--reward", "rule", "--lam", "1.5"], None, "--lam 1.5: must be at most 1"),
    ("ppo.py", ["--init", "SMALL", "--reward", "rule", "--minibatch", "100"], None, "--minibatch 100 does not divide the 256 answers"),
    ("ppo.py", ["--init", "SMALL", "--reward", "rule", "--temperature", "0"], None, "--temperature 0.0: must be above 0"),
    ("reward.py", ["--init", "JUDGE"], None, "this is a reward model, and a policy is needed here"),
    ("reward.py", ["--init", "SMALL", "--flip", "1.5"], None, "--flip 1.5: must be at most 1"),
    ("reward.py", ["--init", "SMALL", "--answers", "1"], None, "--answers 1: must be at least 2"),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "chosen": "b"}\n', 'rows.jsonl:1: field "rejected" is missing'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "its answers are equal, all tie or repeat"),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], json.dumps({"prompt": "a", "chosen": "b" * 99, "rejected": "c"}) + "\n", "longer than the context of 64"),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl", "--collect_only"], '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "there is nothing to collect"),
    ("dpo.py", ["--init", "SMALL"], None, "out/reward/preferences.jsonl: no such file"),
    ("dpo.py", ["--init", "JUDGE", "--data", "rows.jsonl"], None, "this is a reward model, and a policy is needed here"),
    ("dpo.py", ["--init", "SMALL", "--data", "rows.jsonl", "--smoothing", "0.5"], None, "--smoothing 0.5: must be below 0.5"),
    ("dpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "chosen": "b"}\n', 'rows.jsonl:1: field "rejected" is missing'),
    ("dpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "its answers are equal, all tie or repeat"),
    ("dpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], json.dumps({"prompt": "a", "chosen": "b" * 99, "rejected": "c"}) + "\n", "longer than the context of 64"),
    ("dapo.py", ["--init", "SMALL", "--tries", "0"], None, "--tries 0: must be at least 1"),
    ("dapo.py", ["--init", "SMALL", "--clip_high", "-0.1"], None, "--clip_high -0.1: must be at least 0"),
    ("dapo.py", ["--init", "SMALL", "--overlong_cache", "25"], None, "--overlong_cache 25: must be at most --max_new 24"),
    ("grpo.py", ["--init", "SMALL", "--out", "rows.jsonl"], "x", "rows.jsonl: cannot write here"),
    # flags
    ("sft.py", ["--lr", "nan"], None, "--lr nan: must be at least 0"),
    ("sft.py", ["--lr", "inf"], None, "--lr inf: must be finite"),
    ("sft.py", ["--grad_clip", "-1"], None, "--grad_clip -1.0: must be at least 0"),
    ("sft.py", ["--seed", "4294967296"], None, "--seed 4294967296: must be from 0 to 2**32 - 1"),
    ("sft.py", ["--steps", "2.5"], None, "argument --steps: invalid int value: '2.5'"),
    ("sft.py", ["--lr"], None, "argument --lr: expected one argument"),
    ("sft.py", ["--out", ""], None, ": cannot write here"),
    ("grpo.py", ["--init", "SMALL", "--temperature", "nan"], None, "--temperature nan: must be above 0"),
    ("grpo.py", ["--init", "SMALL", "--reward", "Rule"], None, "Rule: no checkpoint here"),
    ("grpo.py", ["--init", "SMALL", "--out", "rows.jsonl/out"], "x", "rows.jsonl/out: cannot write here"),
    ("ppo.py", ["--init", "SMALL", "--reward", "rule", "--gamma", "nan"], None, "--gamma nan: must be at least 0"),
    ("dpo.py", ["--init", "SMALL", "--smoothing", "nan"], None, "--smoothing nan: must be at least 0"),
    # rows
    ("sft.py", ["--data", "."], None, ".: no such file"),
    ("sft.py", ["--data", "rows.jsonl", "--test", "nowhere.jsonl"], GOOD, "nowhere.jsonl: no such file"),
    ("sft.py", ["--data", "rows.jsonl"], "\n \n", "rows.jsonl: the file is empty"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD + "null\n", "rows.jsonl:2: expected an object {...}, found NoneType"),
    ("sft.py", ["--data", "rows.jsonl"], "prompt,response\n2+2=,4\n", "rows.jsonl:1: not a JSON line"),
    ("sft.py", ["--data", "rows.jsonl"], '{"prompt": "a", "response": ["b"]}\n', 'rows.jsonl:1: field "response" is list, not text'),
    ("sft.py", ["--data", "rows.jsonl"], '{"prompt": ' + "1" * 5000 + "}\n", "rows.jsonl:1: not a JSON line"),
    ("sft.py", ["--data", "rows.jsonl"], '{"messages": []}\n', 'rows.jsonl:1: field "messages" must be a list of {"role": text, "content": text}'),
    ("sft.py", ["--data", "rows.jsonl"], b"\x1f\x8b\x08\x00\xff\xfe\n", "rows.jsonl:1: not a JSON line"),
    ("sft.py", ["--data", "rows.jsonl"], GOOD.encode() + b'{"prompt": "\xe9", "response": "a"}\n', "rows.jsonl:2: not a JSON line"),
    ("grpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "answer": true}\n', 'rows.jsonl:1: field "answer" is bool, not text'),
    ("grpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "a", "answer": NaN}\n', 'no row is left: no number in "answer"'),
    ("grpo.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "", "answer": "1"}\n', "no row is left: the prompt is empty"),
    # preferences
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"chosen": "a", "rejected": "b"}\n', 'rows.jsonl:1: field "prompt" is missing'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "p", "chosen": "a", "rejected": 3}\n', 'rows.jsonl:1: field "rejected" is int, not text'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "p", "responses": ["a"]}\n', 'rows.jsonl:1: field "responses" must be a list of two texts or more'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "p", "responses": ["a", "b"], "ranks": [0]}\n',
     'rows.jsonl:1: field "ranks" must be a list of whole numbers, one for each'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}\n', 'rows.jsonl:1: field "margin" must be a number'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}\n', 'rows.jsonl:1: field "margin" must be a number'),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"prompt": "p", "responses": ["a", "b", "a"]}\n', "no row is left: its answers are equal, all tie or repeat"),
    ("reward.py", ["--init", "SMALL", "--data", "rows.jsonl"], '{"chosen": "\\n\\nHuman: x\\n\\nAssistant: a", "rejected": "\\n\\nHuman: y\\n\\nAssistant: b"}\n',
     "no row is left: the two prompts differ"),
]


@pytest.mark.parametrize("name, args, content, says", BAD, ids=[f"{name[:-3]} {says[:50]}" for name, *_, says in BAD])
def test_bad_input_gets_one_clear_line_and_leaves_nothing(name, args, content, says, small, judge, run, tmp_path):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    there = set(os.listdir(tmp_path))
    line = run(name, *[{"SMALL": small, "JUDGE": judge}.get(a, a) for a in args])
    assert says in line and set(os.listdir(tmp_path)) == there, line


def test_a_reward_model_made_for_something_else_or_gone_wrong_is_refused(small, judge, run, tmp_path, monkeypatch):
    """Another tokenizer, width or context, and scores that are no numbers: one line, before the first step."""
    policy, tokenizer = M.load(str(small))
    model, _ = M.load(str(judge))
    with monkeypatch.context() as patch:
        patch.setattr(M, "load", lambda *a: (model, M.Tokenizer("gpt2", ".", {b"a": 0}, {"b": 1}, end=1)))
        with pytest.raises(M.InputError, match="made for tokenizer gpt2, and the policy has bytes"):
            M.load_reward("out/x", policy, tokenizer)
    for chat, system, says in ((True, "", "made for chat False, and the policy has True"), (False, "Hm.", "made for system line , and the policy has Hm.")):
        with pytest.raises(M.InputError, match=says):
            M.load_reward(str(judge), policy, M.make_tokenizer(turns=chat, system=system))
    other = lambda **more: M.ScalarModel(M.GPT(dataclasses.replace(model.trunk.cfg, mlp_width=0, head_dim=0, **more)))
    sick, _ = M.load(str(judge))
    sick.head.bias.data.fill_(float("nan"))
    for says, model in (("made for width 32", other(width=32)), ("made for context 128", other(context=128)), ("weights are not finite", sick)):
        M.save(str(tmp_path), model, tokenizer)
        for name, args in (("ppo.py", PPO), ("grpo.py", QUICK)):
            assert says in run(name, *args, "--init", small, "--reward", ".", "--out", "out") and not (tmp_path / "out").exists()


def test_a_resume_that_is_refused_destroys_nothing(adder, run, tmp_path, monkeypatch):
    """Another shape, other optimisers, another script's folder, files that were meddled with: one line each, and the plain --resume still
    works."""
    assert run("sft.py", *quick("sft.py", adder), "--out", "out") is None
    files = {f: (tmp_path / "out" / f).read_bytes() for f in ("config.json", "metrics.jsonl", "ckpt.pt")}

    def refused(says, name="sft.py", *more, **meddled):
        for f, content in meddled.items():
            (tmp_path / "out" / f.replace("__", ".")).write_bytes(content)
        now = {f: (tmp_path / "out" / f).read_bytes() for f in files}
        line = run(name, "--out", "out", "--resume", *more)
        assert line and says in line, line
        assert now == {f: (tmp_path / "out" / f).read_bytes() for f in files}
        for f, content in files.items():
            (tmp_path / "out" / f).write_bytes(content)

    refused("another shape", "sft.py", "--width", 32)
    refused("another choice of optimisers", "sft.py", "--muon_lr", 0)
    refused("this is a run of SFT, not of GRPO", "grpo.py")
    refused("config.json: not a run's settings", config__json=files["config.json"][:40])
    refused("config.json: not a run's settings", config__json=b"7")
    refused("argument --steps: invalid int value: 'None'", config__json=files["config.json"].replace(b'"steps": 6', b'"steps": null'))
    refused("argument --lr: invalid float value: 'fast'", config__json=files["config.json"].replace(b'"lr": 0.003', b'"lr": "fast"'))
    refused("metrics.jsonl: not what a run has logged (JSONDecodeError", metrics__jsonl=files["metrics.jsonl"].replace(b"{", b"", 1))
    refused("metrics.jsonl: not what a run has logged (KeyError", metrics__jsonl=b"{}\n")
    refused("metrics.jsonl: not what a run has logged (UnicodeDecodeError", metrics__jsonl=b"\xff\n")
    refused("ckpt.pt: not a nanoPO checkpoint, or a damaged one", ckpt__pt=files["ckpt.pt"][:-100])
    model, tokenizer = load("out")
    save("out", model, tokenizer)
    refused("its checkpoint is a model alone; --init out starts a run from it", ckpt__pt=(tmp_path / "out/ckpt.pt").read_bytes())
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert run("sft.py", "--out", "moved", "--resume", "--steps", 8) is None
    assert metrics(tmp_path / "moved")[-1]["step"] == 8 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- damaged checkpoints


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    model, tokenizer = tiny(), make_tokenizer()
    save(tmp_path, model, tokenizer)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def half(data, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(InputError, match="No space left on device.*untouched"):
        save(tmp_path, model, tokenizer)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="not a nanoPO checkpoint"):
        load(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    model = tiny(dtype=torch.float32)
    model.cfg.mlp_width = 77
    save(tmp_path, model, make_tokenizer())
    with pytest.raises(InputError, match=r"blocks.0.mlp.down.weight has shape \(32, 85\), its config asks for \(32, 77\)"):
        load(tmp_path)


def test_a_flipped_bit_is_refused_or_changes_nothing(small, tmp_path):
    """torch.load checks no sums: nine flips in ten were taken for weights."""
    data, good, refused = (small / "ckpt.pt").read_bytes(), M.read_checkpoint(str(small)), 0
    rng = random.Random(0)
    for i in [rng.randrange(8 * len(data)) for _ in range(100)]:
        (tmp_path / "ckpt.pt").write_bytes(data[:i // 8] + bytes([data[i // 8] ^ 1 << i % 8]) + data[i // 8 + 1:])
        try:
            assert equal(M.read_checkpoint(str(tmp_path)), good), i
        except InputError as e:
            assert "ckpt.pt: not a nanoPO checkpoint, or a damaged one" in str(e)
            refused += 1
    assert refused > 80


def test_a_checkpoint_cut_short_or_of_another_program_is_refused(small, run, tmp_path):
    data = (small / "ckpt.pt").read_bytes()
    torch.save({"model": {}}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for content in (data[:len(data) // 2], data[:-1], data[100:], data[:4], b"", b"hello", (tmp_path / "old").read_bytes()):
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "./ckpt.pt: not a nanoPO checkpoint, or a damaged one" in run("grpo.py", "--init", ".")


@pytest.mark.parametrize("change", [
    dict(kind=[]), dict(kind="Chimera"),
    dict(tokenizer=5), dict(tokenizer=None), dict(tokenizer={}), dict(tokenizer={"name": "x", "files": {"config.json": "{}"}}),
    dict(config=[1]), dict(config={"heads": 0}), dict(config={"norm": "none"}), dict(config={"layers": -1}), dict(config={"depth": 3}),
    dict(config={"width": 10 ** 15}), dict(model=[1]), dict(model={"a": 1}), dict(model={1: torch.ones(1)}),
    dict(model={"embedding.weight": torch.ones(259, 16, dtype=torch.int64)}), dict(model={"embedding.weight": torch.ones(259, 16).to_sparse()}),
    dict(model={"embedding.weight": torch.ones(259, 16, dtype=torch.complex64)}),
])
def test_a_checkpoint_with_nonsense_in_it_is_refused(change, small, run, tmp_path):
    data = torch.load(small / "ckpt.pt", weights_only=True)
    for name, x in change.items():
        data[name] = data[name] | x if isinstance(x, dict) and name != "tokenizer" else x
    torch.save(data, tmp_path / "ckpt.pt")
    assert run("grpo.py", "--init", ".") is not None and os.listdir(tmp_path) == ["ckpt.pt"]


# -------------------------------------------------------------------------------------------------------------------- full disks


class Disk:
    """open() on a disk with so many bytes left; `broken` is the error of all that comes after."""

    def __init__(self, left, broken):
        self.left, self.broken, self.full = left, OSError(broken, os.strerror(broken)), False

    def open(self, path, mode="r", *args, **kwargs):
        file, disk = open(path, mode, *args, **kwargs), self
        if mode[0] == "r":
            return file

        class Writer:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, data):
                n = len(data)
                disk.full |= n > disk.left
                file.write(data[:max(0, disk.left)] if disk.full else data)
                file.flush()
                disk.left -= n
                if disk.full:
                    disk.left = 0
                    raise disk.broken
                return n

        return Writer()


@pytest.mark.parametrize("left", [0, 100, 700, 1_500, 20_000, 100_000, 200_000, 300_000])
def test_a_disk_that_fills_up_ends_in_one_line_and_the_run_goes_on_when_there_is_room(left, adder, run, tmp_path, monkeypatch):
    """In config.json, in the log, halfway through the first checkpoint, a later one: what is there stays whole."""
    args = [*quick("grpo.py", adder), "--eval_every", 1]
    assert run("grpo.py", *args, "--out", "whole") is None
    disk = Disk(left, errno.ENOSPC)
    with monkeypatch.context() as patch:
        patch.setattr(M, "open", disk.open, raising=False)
        line = run("grpo.py", *args, "--out", "out")
    assert disk.full and "No space left on device" in line, (disk.left, line)
    assert not (tmp_path / "out/ckpt.pt.tmp").exists()
    again = ["--resume"] if (tmp_path / "out/config.json").exists() else args
    assert run("grpo.py", *again, "--out", "out") is None
    assert metrics("out") == metrics("whole") and equal(M.read_checkpoint("out"), M.read_checkpoint("whole"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_step(name, adder, judge, run, monkeypatch, capsys):
    monkeypatch.setattr(M, "open", Disk(0, errno.EROFS).open, raising=False)
    assert run(name, *quick(name, adder, judge), "--out", "out") == f"{name}: out: cannot write here (Read-only file system)"
    assert "step " not in capsys.readouterr().out


def test_no_space_to_write_ends_in_one_line_and_keeps_the_last_checkpoint(adder, tmp_path):
    """A limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    assert script("grpo.py", *quick("grpo.py", adder), "--out", "out", cwd=tmp_path).returncode == 0
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
    done = script("grpo.py", "--out", "out", "--resume", "--steps", "9", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "could not be written" in done.stderr, done.stderr
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before and not (tmp_path / "out/ckpt.pt.tmp").exists()


# ------------------------------------------------------------------------------------------- gradients and rewards gone wrong


@pytest.mark.parametrize("name, every", [(name, 3) for name in SCRIPTS] + [("grpo.py", 1)])        # between evaluations, and before one
def test_a_gradient_that_is_nan_stops_the_run_and_the_checkpoint_before_it_goes_on(name, every, adder, judge, run, tmp_path, monkeypatch):
    args = [*quick(name, adder, judge), "--eval_every", every]
    assert run(name, *args, "--out", "whole") is None
    inner, before = torch.nn.utils.clip_grad_norm_, []

    def clip(params, most):
        params = list(params)
        if os.path.exists("out/ckpt.pt"):
            before.append((tmp_path / "out/ckpt.pt").read_bytes())
            params[0].grad.view(-1)[0] = math.nan
        return inner(params, most)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        line = run(name, *args, "--out", "out")
    assert f"stopped by the guard at step {every + 1}: " in line
    assert " is nan; the last good checkpoint is out/ckpt.pt, the state now is out/stopped.pt" in line
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before[0] and M.read_checkpoint("out")["step"] == every
    assert run(name, "--out", "out", "--resume") is None
    assert metrics("out") == metrics("whole") and equal(M.read_checkpoint("out"), M.read_checkpoint("whole"))


def raises(*_):
    raise ValueError("no number\nin it")


WRONG = {
    "raises": (raises, "score raised ValueError: no number in it (test_failures.py:"),
    "nan": (lambda *_: math.nan, "score gave nan, which is no finite number"),
    "inf": (lambda *_: math.inf, "score gave inf, which is no finite number"),
    "text": (lambda *_: "1.0", "score gave '1.0', which is no finite number"),
    "None": (lambda *_: None, "score gave None, which is no finite number"),
    "list": (lambda *_: [1.0], "score gave [1.0], which is no finite number"),
    "tensor": (lambda *_: torch.ones(2), "score raised "),
    "KeyError": (lambda row, text: row["gold"], "score raised KeyError: 'gold'"),
}


@pytest.mark.parametrize("name, how", [("grpo.py", how) for how in WRONG] + [(name, "raises") for name in SCRIPTS if name not in ("grpo.py", "reward.py")])
def test_a_reward_function_that_goes_wrong_is_told_with_its_row_and_the_checkpoint_stays(name, how, adder, judge, run, monkeypatch):
    """Wrong from the first checkpoint on; sft.py and dpo.py only evaluate by it."""
    module, (score, says) = importlib.import_module(name[:-3]), WRONG[how]
    good = module.score
    monkeypatch.setattr(module, "score", lambda row, text: score(row, text) if os.path.exists("out/ckpt.pt") and text else good(row, text))
    line = run(name, *quick(name, adder, judge), "--out", "out")
    assert says in line and ".jsonl:" in line and " with the answer '" in line, line
    assert M.read_checkpoint("out")["step"] == 3 and metrics("out")[-1]["step"] >= 3


def test_people_who_rank_by_a_score_that_goes_wrong_are_told(adder, run, monkeypatch):
    monkeypatch.setattr(importlib.import_module("reward"), "score", lambda row, text: math.nan if text else 0.0)
    assert "reward.py: score gave nan, which is no finite number, on " in run("reward.py", *quick("reward.py", adder), "--out", "out")
    assert not os.path.exists("out")


# ----------------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("name, twice", [(name, False) for name in SCRIPTS] + [("sft.py", True), ("grpo.py", True)])
def test_ctrl_c_saves_the_step_and_a_second_one_leaves_the_checkpoint_before_it(name, twice, adder, judge, run, monkeypatch, capsys):
    """After the log line of step 4, with a checkpoint at step 3; the second one comes in the middle of the write."""
    assert run(name, *quick(name, adder, judge), "--out", "whole") is None
    write, log = torch.save, M.Folder.log

    def logged(self, step, *args, **metrics):
        why = log(self, step, *args, **metrics)
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return why

    def half(data, f):
        if data["step"] != 4:
            return write(data, f)
        f.write(b"half of it")
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(M.Folder, "log", logged)
        if twice:
            patch.setattr(torch, "save", half)
        capsys.readouterr()
        line = run(name, *quick(name, adder, judge), "--out", "out")
    assert "\ninterrupted: this step is finished and saved first; once more ends it at once" in capsys.readouterr().err
    saved = "step 4 is saved, the same command with --resume goes on from it"
    assert line == f"{name}: interrupted; " + ("what was saved before stands, see --resume" if twice else saved)
    assert M.read_checkpoint("out")["step"] == (3 if twice else 4) and not os.path.exists("out/ckpt.pt.tmp")
    assert run(name, "--out", "out", "--resume") is None
    assert metrics("out") == metrics("whole") and equal(M.read_checkpoint("out"), M.read_checkpoint("whole"))
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler                     # nothing is left to be saved


# --------------------------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("stream, rule", [
    ([{"loss": 1.0}] * 3 + [{"loss": float("nan")}], "loss is nan"),
    ([{"gnorm": float("inf")}], "gnorm is inf"),
    ([{"kl_seq": 11.0}] * 5, "KL to the reference above 10"),
    ([{"end": 0.01}] * 5, "fewer than 5% of answers end"),
    ([{"solved": 0.0}] * 50, "no answer of any group was right"),
    ([{"val_acc": .5, "val_score": 0.0}, {"val_acc": .7, "val_score": 1.0}, {"val_acc": .6, "val_score": 1.5}, {"reward": 1.0}, {"val_acc": .5, "val_score": 2.0}],
     "the reward model's score rose from 1.00 to 2.00 while held-out accuracy fell from 0.700 to 0.500"),
    ([{"val_acc": .7, "val_score": 1.0}] + [{"val_acc": .66, "val_score": 2.0}] * 9, None),          # within two standard errors
    ([{"val_acc": .7, "val_score": 1.0}] + [{"val_acc": .2, "val_score": 0.5}] * 9, None),           # both fell: another illness
    ([{"val_acc": .7, "val_score": 1.0}] + [{"val_acc": .5, "val_score": 2.0}, {"val_acc": .7, "val_score": 2.0}] * 4, None),
    ([{"kl_seq": 11.0}] * 4 + [{"kl_seq": 9.0}] + [{"kl_seq": 11.0}] * 4, None),
    ([{"solved": 0.0}] * 49 + [{"solved": 0.1}] + [{"solved": 0.0}] * 49, None),
    ([{"solved": 0.0, "dead": 0.9}] * 100, None),                        # nothing right, but a reward model or a cut answer makes a difference
    ([{"loss": 1.0, "kl_seq": 1.0, "end": 1.0, "solved": 0.5}] * 100, None),
])
def test_each_rule_of_the_guard(stream, rule):
    guard = Guard(max_kl=10.0, val=500)
    verdicts = [guard.check(m) for m in stream]
    assert not any(verdicts[:-1])
    assert (verdicts[-1] is None) if rule is None else rule in verdicts[-1]


# ----------------------------------------------------------------------------------------------------- logs and other machines


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_log_is_lines_and_every_one_but_the_first_says_how_long_it_takes(name, adder, judge, run, capsys):
    assert run(name, *quick(name, adder, judge), "--out", "out") is None
    log = capsys.readouterr().out
    first, *others = [line for line in log.splitlines() if line.startswith("step ")]
    assert "\r" not in log and " left" not in first and others
    for line, row in zip(others, metrics("out")[1:], strict=True):
        assert line.startswith(f"step {row['step']:4}/") and line.endswith(" left")
    assert others[-1].endswith("| 0:00 left")


def test_help_and_log_fit_an_old_encoding(tmp_path):
    """A log file on Windows has no ε; what cannot be written in it is spelled out."""
    done = script("grpo.py", "--help", cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u03b5, how far the ratio may leave 1" in done.stdout, done.stderr


def test_default_folders_are_known_where_paths_have_backslashes(monkeypatch):
    """grpo.py makes out/sft where it is missing: by that name, however the system spells it."""
    monkeypatch.setattr(os.path, "normpath", ntpath.normpath)
    monkeypatch.setattr(os, "sep", "\\")
    for name in SCRIPTS:
        Config = importlib.import_module(name[:-3]).Config
        assert M.parse_config(Config, []) == Config()
        assert M.parse_config(Config, ["--out", ".\\out\\mine\\"]).out == "out/mine"


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (list, tuple)) else [out]:
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func
        return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_tensor_is_float64_which_macs_have_not(name, adder, judge, run):
    """But for the angles of RoPE, which are made on the CPU, once."""
    load(str(adder / "out/sft"))[0].token_logp(torch.zeros(1, 2, dtype=torch.int64))
    with NoFloat64():
        assert run(name, *quick(name, adder, judge), "--out", "out") is None
