"""Whatever goes wrong ends in one clear line, and nothing that was saved is lost.
python -m pytest tests/test_failures.py"""
import dataclasses
import errno
import importlib
import json
import math
import ntpath
import os
import random
import re
import shlex
import signal
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common.checkpoint
import common.models
import common.run
import grpo
import model as M
import ppo
from common import InputError, load
from common.checkpoint import read_checkpoint, save_checkpoint
from common.early_stopping import EarlyStopping
from common.flags import check_limits, parse_config
from common.models import load_reward_model
from common.run import hash_rows
from common.tokenizer import TiktokenTokenizer, make_tokenizer
from conftest import SCRIPTS, equal, metrics, quick, script, tiny


def config_class(name):
    return importlib.import_module(name.removesuffix(".py")).Config


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(common.run.Run, "plot", lambda *_: None)


UNINTERRUPTED = {}                                         # arguments -> metrics, checkpoint


@pytest.fixture
def assert_uninterrupted(run):
    """That a folder holds what the same run leaves where nothing goes wrong; it is run once."""
    def assert_uninterrupted(folder, *args):
        key = " ".join(map(str, args))
        if key not in UNINTERRUPTED:
            assert run(*args, "--out", "uninterrupted") is None
            UNINTERRUPTED[key] = metrics("uninterrupted"), read_checkpoint("uninterrupted")
        expected_metrics, expected_checkpoint = UNINTERRUPTED[key]
        assert metrics(folder) == expected_metrics
        assert equal(read_checkpoint(folder), expected_checkpoint)

    return assert_uninterrupted


# --------------------------------------------------------------------------------------- bad flags


def limits(name):
    """The lowest and the highest value that make sense for a flag."""
    if name in ("steps", "prompts", "epochs", "batch", "minibatch", "max_new_tokens", "eval_every",
                "n_layer", "n_embd", "n_head"):
        return 1, math.inf
    if name in ("group_size", "responses", "block_size"):
        return 2, math.inf
    if name in ("gamma", "gae_lambda", "label_noise", "ref_mix"):
        return 0.0, 1.0
    if name in ("truncated_reward", "length_bias"):
        return -math.inf, math.inf
    return {
        "seed": (0, 2 ** 32 - 1),
        "temperature": (math.nextafter(0.0, 1.0), math.inf),
        "lora_alpha": (math.nextafter(0.0, 1.0), math.inf),
        "label_smoothing": (0.0, math.nextafter(0.5, 0.0)),
    }.get(name, (0, math.inf))


def numeric_flags():
    flags = []
    for name in SCRIPTS:
        for field in dataclasses.fields(config_class(name)):
            if field.type in (int, float):
                flags.append((name, field.name, field.type))
    return flags


@pytest.mark.parametrize("name, flag, kind", numeric_flags())
def test_every_number_is_taken_up_to_its_limits_and_refused_beyond(name, flag, kind):
    Config = config_class(name)
    base = {"minibatch": 1, "overlong_cache": 0}           # so that no other flag limits this one
    if flag == "lora_alpha":
        base["lora_rank"] = 1
    base = {key: x for key, x in base.items() if hasattr(Config, key)}
    low, high = limits(flag)
    inside = [x for x in (low, high) if math.isfinite(x)]
    outside = []
    if kind is int:
        outside = [x for x in (low - 1, high + 1) if math.isfinite(x)]
    else:
        outside = [math.nan, math.inf, -math.inf]
        if math.isfinite(low):
            outside.append(math.nextafter(low, -math.inf))
        if math.isfinite(high):
            outside.append(math.nextafter(high, math.inf))
    for x in inside:
        check_limits(Config(**base | {flag: kind(x)}))
    for x in outside:
        with pytest.raises(InputError, match=f"--{flag} "):
            check_limits(Config(**base | {flag: x}))


def test_flags_that_belong_together_must_fit():
    check_limits(config_class("grpo.py")(prompts=3, group_size=4, minibatch=6))
    check_limits(config_class("dapo.py")(max_new_tokens=9, overlong_cache=9))
    for name, flags in (("grpo.py", dict(prompts=3, group_size=4, minibatch=5)),
                        ("ppo.py", dict(prompts=12, minibatch=24)),
                        ("dapo.py", dict(prompts=3, group_size=4, minibatch=24))):
        with pytest.raises(InputError, match="--minibatch"):
            check_limits(config_class(name)(**flags))
    with pytest.raises(InputError, match="--overlong_cache"):
        check_limits(config_class("dapo.py")(max_new_tokens=9, overlong_cache=10))


FLAGS = [
    # script, flags, what the one line names
    ("sft.py", "--lr -1", "--lr"),
    ("sft.py", "--lr nan", "--lr"),
    ("sft.py", "--lr inf", "--lr"),
    ("sft.py", "--lr", "--lr"),
    ("sft.py", "--seed -1", "--seed"),
    ("sft.py", "--seed 1" + "0" * 400, "--seed"),
    ("grpo.py", "--test rows.jsonl", "--test --data"),
    ("sft.py", "--seed 4294967296", "--seed"),
    ("sft.py", "--grad_clip -1", "--grad_clip"),
    ("sft.py", "--widht 64", "--widht"),
    ("sft.py", "--steps many", "--steps many"),
    ("sft.py", "--steps 2.5", "--steps 2.5"),
    ("sft.py", "--steps 0", "--steps"),
    ("sft.py", "--early_stopping perhaps", "--early_stopping perhaps"),
    ("sft.py", "--n_embd 50", "--n_embd --n_head"),
    ("sft.py", "--block_size 8", "--block_size 8"),
    ("sft.py", "--tokenizer gpt5", "tokenizer gpt5 bytes"),
    ("sft.py", "--chat yes", "--chat"),
    ("sft.py", "--init nowhere", "nowhere:"),
    ("sft.py", "--resume", "out/sft:"),
    ("sft.py", "--init SMALL --n_layer 6", "--n_layer"),
    ("sft.py", "--init SMALL --tokenizer gpt2", "--tokenizer"),
    ("sft.py", "--init REWARD_MODEL", "reward model policy"),
    ("sft.py", "--data nowhere.jsonl", "nowhere.jsonl:"),
    ("sft.py", "--data .", ".:"),
    ("grpo.py", "--chat yes", "--chat"),
    ("grpo.py", "--format_reward -1", "--format_reward"),
    ("grpo.py", "--temperature 0", "--temperature"),
    ("grpo.py", "--temperature nan", "--temperature"),
    ("grpo.py", "--group_size 1", "--group_size"),
    ("grpo.py", "--minibatch 100", "--minibatch 256"),
    ("grpo.py", "--max_new_tokens 60", "--max_new_tokens 64"),
    ("grpo.py", "--init nowhere", "nowhere:"),
    ("grpo.py", "--init REWARD_MODEL", "reward model policy"),
    ("grpo.py", "--reward SMALL", "reward model policy"),
    ("grpo.py", "--reward Rule", "Rule:"),
    ("ppo.py", "--reward nowhere", "nowhere:"),
    ("ppo.py", "--reward rule --gae_lambda 1.5", "--gae_lambda"),
    ("ppo.py", "--reward rule --gamma nan", "--gamma"),
    ("ppo.py", "--reward rule --minibatch 100", "--minibatch 256"),
    ("ppo.py", "--reward rule --temperature 0", "--temperature"),
    ("reward.py", "--init REWARD_MODEL", "reward model policy"),
    ("reward.py", "--label_noise 1.5", "--label_noise"),
    ("reward.py", "--responses 1", "--responses"),
    ("dpo.py", "", "out/reward/preferences.jsonl:"),
    ("dpo.py", "--data rows.jsonl --init REWARD_MODEL", "reward model policy"),
    ("dpo.py", "--data rows.jsonl --label_smoothing 0.5", "--label_smoothing"),
    ("dpo.py", "--data rows.jsonl --label_smoothing nan", "--label_smoothing"),
    ("dapo.py", "--clip_high -0.1", "--clip_high"),
    ("dapo.py", "--overlong_cache 25", "--overlong_cache --max_new_tokens 24"),
]
GOOD = '{"prompt": "2+2=", "response": "4", "answer": "4"}\n'
FILES = [
    # script, flags, content of rows.jsonl, what the one line names
    ("sft.py", "--data rows.jsonl --block_size 8", '{"prompt": "aaaaaaaaa", "response": "b"}\n',
     "--block_size 8"),
    ("sft.py", "--data rows.jsonl --test nowhere.jsonl", GOOD, "nowhere.jsonl:"),
    ("sft.py", "--data rows.jsonl --out ''", GOOD, "write"),
    ("grpo.py", "--init rows.jsonl", "x", "rows.jsonl:"),
    ("grpo.py", "--out rows.jsonl", "x", "rows.jsonl: write"),
    ("grpo.py", "--out rows.jsonl/out", "x", "rows.jsonl/out: write"),
    ("reward.py", "--data rows.jsonl --collect_only",
     '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "--collect_only rows.jsonl"),
]
LONG_PAIR = json.dumps({"prompt": "a", "chosen": "b" * 99, "rejected": "c"}) + "\n"
ROWS = [
    # script, content of rows.jsonl, what the one line names
    ("sft.py", "", "rows.jsonl: empty"),
    ("sft.py", "\n \n", "rows.jsonl: empty"),
    ("sft.py", GOOD * 2 + '{"prompt": \n', "rows.jsonl:3:"),
    ("sft.py", GOOD + "[1, 2]\n", "rows.jsonl:2: list"),
    ("sft.py", GOOD + "null\n", "rows.jsonl:2: NoneType"),
    ("sft.py", "prompt,response\n2+2=,4\n", "rows.jsonl:1:"),
    ("sft.py", "[" * 100_000 + "\n", "rows.jsonl:1:"),
    ("sft.py", '{"prompt": ' + "1" * 5000 + "}\n", "rows.jsonl:1:"),
    ("sft.py", b"\x1f\x8b\x08\x00\xff\xfe\n", "rows.jsonl:1:"),
    ("sft.py", GOOD.encode() + b'{"prompt": "\xe9", "response": "a"}\n', "rows.jsonl:2:"),
    ("sft.py", GOOD + '{"prompt": "a"}\n', 'rows.jsonl:2: "response"'),
    ("sft.py", '{"prompt": 3, "response": "a"}\n', 'rows.jsonl:1: "prompt" int'),
    ("sft.py", '{"prompt": "a", "response": ["b"]}\n', 'rows.jsonl:1: "response" list'),
    ("sft.py", '{"question": null, "answer": "4"}\n', 'rows.jsonl:1: "prompt"'),
    ("sft.py", '{"question": "a"}\n', 'rows.jsonl:1: "response"'),
    ("sft.py", '{"messages": []}\n', 'rows.jsonl:1: "messages" empty'),
    ("sft.py", '{"messages": [{"role": "user"}]}\n', 'rows.jsonl:1: "messages"'),
    ("sft.py", '{"prompt": "a", "messages": null}\n', 'rows.jsonl:1: "response"'),
    ("sft.py", '{"messages": [{"role": "user", "content": "a"}]}\n',
     'rows.jsonl:1: "messages" assistant user'),
    ("sft.py", '{"prompt": "", "response": "a"}\n', "prompt empty"),
    ("sft.py", GOOD.replace('"4"', '" "', 1), "response empty"),
    ("sft.py", GOOD.replace("2+2=", "2"), "train"),        # the one row is held out
    ("grpo.py", '{"prompt": "a"}\n', 'rows.jsonl:1 "answer"'),
    ("grpo.py", '{"prompt": "a", "answer": "b"}\n', 'number "answer"'),
    ("grpo.py", '{"prompt": "a", "answer": true}\n', 'rows.jsonl:1 "answer"'),
    ("grpo.py", '{"prompt": "a", "answer": NaN}\n', 'number "answer"'),
    ("grpo.py", '{"prompt": "", "answer": "1"}\n', "prompt empty"),
    ("ppo.py", '{"prompt": "a"}\n', 'rows.jsonl:1 "answer"'),
    ("reward.py", '{"prompt": "a", "chosen": "b"}\n', 'rows.jsonl:1: "rejected"'),
    ("reward.py", '{"chosen": "a", "rejected": "b"}\n', 'rows.jsonl:1: "prompt"'),
    ("reward.py", '{"prompt": "p", "chosen": "a", "rejected": 3}\n',
     'rows.jsonl:1: "rejected" int'),
    ("reward.py", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "equal"),
    ("reward.py", LONG_PAIR, "64 tokens"),
    ("reward.py", '{"prompt": "p", "responses": ["a"]}\n', 'rows.jsonl:1: "responses"'),
    ("reward.py", '{"prompt": "p", "responses": ["a", "b"], "ranks": [0]}\n',
     'rows.jsonl:1: "ranks"'),
    ("reward.py", '{"prompt": "p", "responses": ["a", "b", "a"]}\n', "repeat"),
    ("reward.py", '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}\n',
     'rows.jsonl:1: "margin"'),
    ("reward.py", '{"prompt": "p", "chosen": "a", "rejected": "b", "margin": NaN}\n',
     'rows.jsonl:1: "margin"'),
    ("reward.py", '{"chosen": "\\n\\nHuman: x\\n\\nAssistant: a", '
     '"rejected": "\\n\\nHuman: y\\n\\nAssistant: b"}\n', "prompts differ"),
    ("dpo.py", '{"prompt": "a", "chosen": "b"}\n', 'rows.jsonl:1: "rejected"'),
    ("dpo.py", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "equal"),
    ("dpo.py", LONG_PAIR, "64 tokens"),
]
BAD = [(name, flags, None, names) for name, flags, names in FLAGS]
BAD += FILES
for name, content, names in ROWS:
    more = " --reward rule" if name == "ppo.py" else ""
    BAD.append((name, "--data rows.jsonl" + more, content, names))


@pytest.mark.parametrize("name, flags, content, names", BAD, ids=[
    f"{name[:-3]} {flags} {i}" for i, (name, flags, *_) in enumerate(BAD)])
def test_bad_input_gets_one_line_that_names_it_and_leaves_nothing(
        name, flags, content, names, small, reward_model, run, tmp_path):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "rows.jsonl").write_bytes(content)
    files = set(os.listdir(tmp_path))
    args = shlex.split(flags)
    if name != "sft.py" and "--init" not in args:
        args += ["--init", "SMALL"]
    folders = {"SMALL": small, "REWARD_MODEL": reward_model}
    line = run(name, *[folders.get(x, x) for x in args])
    assert line is not None
    for part in names.split():
        assert part in line, line
    assert set(os.listdir(tmp_path)) == files


def test_a_reward_model_that_does_not_fit_the_policy_is_refused(
        small, adder, reward_model, run, tmp_path, monkeypatch):
    """Another tokenizer, chat format, width or block size, and weights that are not finite: one
    line, before the first step."""
    policy, tokenizer = load(str(small))
    model, _ = load(str(reward_model))
    cfg = ppo.Config(init=str(small), data="rows.jsonl", reward=str(reward_model))

    def refused(tokenizer, *names):
        with pytest.raises(InputError) as error:
            load_reward_model(cfg, policy, tokenizer)
        for name in ("--reward", *names):
            assert name in str(error.value)

    with monkeypatch.context() as patch:
        ranks = {bytes([i]): i for i in range(256)}
        other = TiktokenTokenizer("gpt2", ".", ranks, {"<|endoftext|>": 256}, end=256)
        patch.setattr(common.models, "load", lambda *_, **__: (model, other))
        refused(tokenizer, "tokenizer", "gpt2", "bytes")
    refused(make_tokenizer(turns=True), "chat", "True", "False")
    refused(make_tokenizer(system="Hm."), "system", "Hm.")

    def reshaped(**more):
        cfg = dataclasses.replace(model.trunk.cfg, intermediate_size=0, head_dim=0, **more)
        return M.ScalarModel(M.GPT(cfg))

    not_finite, _ = load(str(reward_model))
    not_finite.head.bias.data.fill_(math.nan)
    for names, bad_model in (("n_embd 32 16", reshaped(n_embd=32)),
                             ("block_size 128 64", reshaped(block_size=128)),
                             ("weights finite", not_finite)):
        save_checkpoint(tmp_path, bad_model, tokenizer)
        for name in ("ppo.py", "grpo.py"):
            line = run(name, *quick(name, adder), "--reward", ".", "--out", "out")
            for part in ("--reward", *names.split()):
                assert part in line, line
            assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- refusing to resume

RUN_FILES = ("config.json", "metrics.jsonl", "ckpt.pt")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RUN_FILES}


def test_a_resume_that_is_refused_destroys_nothing(adder, run, tmp_path):
    """Another shape, other optimisers, another script's folder, damaged files: one line each, and
    the plain --resume still works."""
    assert run("sft.py", *quick("sft.py", adder), "--out", "out") is None
    out = tmp_path / "out"
    files = contents(out)

    def refused(names, *args, name="sft.py", damaged={}):
        for file, content in damaged.items():
            (out / file).write_bytes(content)
        now = contents(out)
        line = run(name, "--out", "out", "--resume", *args)
        assert line is not None
        for part in names.split():
            assert part in line, line
        assert contents(out) == now
        for file, content in files.items():
            (out / file).write_bytes(content)

    settings, logged, checkpoint = files.values()
    refused("out: tensor", "--n_embd", 32)
    refused("--muon_lr", "--muon_lr", 0)
    refused("out: SFT GRPO", name="grpo.py")
    for content in (settings[:40], b"7"):
        refused("out/config.json:", damaged={"config.json": content})
    content = settings.replace(b'"steps": 6', b'"steps": null')
    refused("--steps", damaged={"config.json": content})
    content = settings.replace(b'"lr": 0.003', b'"lr": "fast"')
    refused("--lr fast", damaged={"config.json": content})
    for content in (logged.replace(b"{", b"", 1), b"{}\n", b"\xff\n"):
        refused("out/metrics.jsonl:", damaged={"metrics.jsonl": content})
    refused("out/ckpt.pt:", damaged={"ckpt.pt": checkpoint[:-100]})
    save_checkpoint("out", *load("out"))
    model_only = (out / "ckpt.pt").read_bytes()
    refused("out: --init out", damaged={"ckpt.pt": model_only})
    os.rename(out, tmp_path / "moved")
    assert run("sft.py", "--out", "moved", "--resume", "--steps", 8) is None
    assert metrics("moved")[-1]["step"] == 8 and not out.exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_resumes_on_the_data_that_it_began_with_and_on_no_other(
        name, adder, reward_model, run, tmp_path):
    """A row changed, gone or added is refused, and nothing is lost; the same rows in another file
    are accepted."""
    source = adder / "rows.jsonl"
    if name in ("reward.py", "dpo.py"):
        source = reward_model / "preferences.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(lines))
    args = quick(name, adder, reward_model)
    assert run(name, *args, "--data", "rows.jsonl", "--out", "out") is None
    files = contents(tmp_path / "out")
    first = json.loads(lines[0])
    changed = "chosen" if "chosen" in first else "answer"
    first[changed] += "0"
    new = {"prompt": "77+77=", "response": "154", "answer": "154"}
    if changed == "chosen":
        new = {"prompt": "77+77=", "chosen": "154", "rejected": "155"}
    for other in ([json.dumps(first) + "\n", *lines[1:]],
                  lines[:-1],
                  [*lines, json.dumps(new) + "\n"]):
        data.write_text("".join(other))
        line = run(name, "--out", "out", "--resume")
        assert line is not None and "out:" in line and "--data" in line
        assert contents(tmp_path / "out") == files
    (tmp_path / "same.jsonl").write_text("\n" + "".join(lines))    # only the line numbers differ
    assert run(name, "--out", "out", "--resume", "--data", "same.jsonl") is None


def test_the_hash_of_the_data_is_that_of_its_rows_in_order_and_not_of_their_lines():
    a, b = {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}
    numbered = [row | {"_line": f"rows.jsonl:{i}"} for i, row in enumerate((a, b))]
    digest = hash_rows(([a, b], [], []))
    assert hash_rows((numbered, [], [])) == digest
    for other in ([b, a], [a], [a, a, b], [a, b | {"answer": "3"}], [a, b | {"more": ""}]):
        assert hash_rows((other, [], [])) != digest
    assert hash_rows(([a | {"prompt": "\ud800"}, b], [], [])) != digest    # no valid UTF-8


# ----------------------------------------------------------------------------- damaged checkpoints


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    model, tokenizer = tiny(), make_tokenizer()
    save_checkpoint(tmp_path, model, tokenizer)
    before = (tmp_path / "ckpt.pt").read_bytes()

    def half(data, f):
        f.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(InputError, match="ckpt.pt.*No space left on device"):
        save_checkpoint(tmp_path, model, tokenizer)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="ckpt.pt"):
        load(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_a_checkpoint_of_another_shape_is_refused_with_the_tensor_and_both_shapes(tmp_path):
    model = tiny(dtype=torch.float32)
    model.cfg.intermediate_size = 77
    save_checkpoint(tmp_path, model, make_tokenizer())
    with pytest.raises(InputError, match=r"blocks.0.mlp.down.weight .*\(32, 85\).*\(32, 77\)"):
        load(tmp_path)


def test_a_flipped_bit_is_refused_or_changes_nothing(small, tmp_path):
    """torch.load verifies no check sums: nine flips in ten were taken for weights."""
    data = (small / "ckpt.pt").read_bytes()
    good = read_checkpoint(small)
    refused, rng = 0, random.Random(0)
    for _ in range(100):
        byte, bit = divmod(rng.randrange(8 * len(data)), 8)
        flipped = bytearray(data)
        flipped[byte] ^= 1 << bit
        (tmp_path / "ckpt.pt").write_bytes(flipped)
        try:
            assert equal(read_checkpoint(tmp_path), good), (byte, bit)
        except InputError as e:
            assert "ckpt.pt" in str(e)
            refused += 1
    assert refused > 80


def test_a_checkpoint_cut_short_or_of_another_program_is_refused(small, run, tmp_path):
    data = (small / "ckpt.pt").read_bytes()
    torch.save({"model": {}}, tmp_path / "old", _use_new_zipfile_serialization=False)
    old_format = (tmp_path / "old").read_bytes()
    torn = [data[:len(data) // 2], data[:-1], data[100:], data[:4], b""]
    for content in (*torn, b"hello", old_format):
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "./ckpt.pt:" in run("grpo.py", "--init", ".")


NONSENSE = [
    dict(kind=[]),
    dict(kind="Chimera"),
    dict(tokenizer=5),
    dict(tokenizer=None),
    dict(tokenizer={}),
    dict(tokenizer={"name": "bytes"}),
    dict(tokenizer={"name": "x", "files": {"config.json": "{}"}}),
    dict(config=[1]),
    dict(config={"n_head": 0}),
    dict(config={"n_layer": -1}),
    dict(config={"n_embd": 10 ** 15}),
    dict(config={"norm": "none"}),
    dict(config={"depth": 3}),
    dict(model=[1]),
    dict(model={"a": 1}),
    dict(model={1: torch.ones(1)}),
    dict(model={"embedding.weight": torch.ones(259, 16, dtype=torch.int64)}),
    dict(model={"embedding.weight": torch.ones(259, 16).to_sparse()}),
    dict(model={"embedding.weight": torch.ones(259, 16, dtype=torch.complex64)}),
]


@pytest.mark.parametrize("change", NONSENSE)
def test_a_checkpoint_with_nonsense_in_it_is_refused(change, small, run, tmp_path):
    data = torch.load(small / "ckpt.pt", weights_only=True)
    for name, x in change.items():
        if isinstance(x, dict) and name != "tokenizer":
            x = data[name] | x
        data[name] = x
    torch.save(data, tmp_path / "ckpt.pt")
    assert run("grpo.py", "--init", ".") is not None
    assert os.listdir(tmp_path) == ["ckpt.pt"]


# -------------------------------------------------------------------------------------- full disks


class Disk:
    """open() on a disk with `left` bytes left; then every write raises `error`, an errno."""

    def __init__(self, left, error):
        self.left = left
        self.error = OSError(error, os.strerror(error))
        self.full = False

    def open(self, path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        return file if mode[0] == "r" else Writer(file, self)


class Writer:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        disk = self.disk
        if len(data) > disk.left:
            disk.full = True
        if disk.full:
            self.file.write(data[:disk.left])
            self.file.flush()
            disk.left = 0
            raise disk.error
        disk.left -= len(data)
        self.file.write(data)
        self.file.flush()
        return len(data)


@pytest.mark.parametrize("left", [0, 100, 700, 1_500, 20_000, 100_000, 200_000, 300_000])
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(
        left, adder, run, assert_uninterrupted, tmp_path, monkeypatch):
    """In config.json, in the log, halfway through the first checkpoint, in a later one: what is
    there stays whole."""
    args = [*quick("grpo.py", adder), "--eval_every", 1]
    disk = Disk(left, errno.ENOSPC)
    with monkeypatch.context() as patch:
        for module in (common.checkpoint, common.run):
            patch.setattr(module, "open", disk.open, raising=False)
        line = run("grpo.py", *args, "--out", "out")
    assert disk.full and "No space left on device" in line
    assert not (tmp_path / "out/ckpt.pt.tmp").exists()
    again = ["--resume"] if (tmp_path / "out/config.json").exists() else args
    assert run("grpo.py", *again, "--out", "out") is None
    assert_uninterrupted("out", "grpo.py", *args)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(
        name, adder, reward_model, run, monkeypatch, capsys):
    for module in (common.checkpoint, common.run):
        monkeypatch.setattr(module, "open", Disk(0, errno.EROFS).open, raising=False)
    line = run(name, *quick(name, adder, reward_model), "--out", "out")
    assert line.startswith(f"{name}: out:") and "Read-only file system" in line
    assert not step_lines(capsys.readouterr().out)


@pytest.mark.slow
def test_a_limit_on_file_sizes_ends_in_one_line_and_keeps_the_last_checkpoint(adder, tmp_path):
    """The limit stands for a full disk, in a process of its own."""
    resource = pytest.importorskip("resource")
    done = script("grpo.py", *quick("grpo.py", adder), "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = (tmp_path / "out/ckpt.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    done = script("grpo.py", "--out", "out", "--resume", "--steps", "9", cwd=tmp_path,
                  preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "out/ckpt.pt:" in done.stderr
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before
    assert not (tmp_path / "out/ckpt.pt.tmp").exists()


# --------------------------------------------------------------- gradients and rewards gone wrong


@pytest.mark.parametrize("name, every", [
    *[(name, 3) for name in SCRIPTS],                      # between evaluations
    ("grpo.py", 1),                                        # before one
])
def test_a_nan_in_a_gradient_stops_the_run_and_the_checkpoint_before_it_goes_on(
        name, every, adder, reward_model, run, assert_uninterrupted, tmp_path, monkeypatch):
    args = quick(name, adder, reward_model)
    if every != 3:
        args += ["--eval_every", every]
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    checkpoints = []

    def clip(params, max_norm):
        params = list(params)
        if os.path.exists("out/ckpt.pt"):
            checkpoints.append((tmp_path / "out/ckpt.pt").read_bytes())
            params[0].grad.view(-1)[0] = math.nan
        return clip_grad_norm_(params, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        line = run(name, *args, "--out", "out")
    for part in (f"step {every + 1}:", " is nan", "out/ckpt.pt", "out/stopped.pt"):
        assert part in line, line
    assert (tmp_path / "out/ckpt.pt").read_bytes() == checkpoints[0]
    assert read_checkpoint("out")["step"] == every
    assert run(name, "--out", "out", "--resume") is None
    assert_uninterrupted("out", name, *args)


def raises(*_):
    raise ValueError("no number\nin it")


WRONG = {                                                  # a reward, and what the one line says
    "raises": (raises, "ValueError: no number in it (test_failures.py:"),
    "nan": (lambda *_: math.nan, "nan"),
    "inf": (lambda *_: math.inf, "inf"),
    "text": (lambda *_: "1.0", "'1.0'"),
    "None": (lambda *_: None, "None"),
    "list": (lambda *_: [1.0], "[1.0]"),
    "tensor": (lambda *_: torch.ones(2), "score"),
    "KeyError": (lambda row, text: row["truth"], "KeyError: 'truth'"),
}


@pytest.mark.parametrize("name, how", [
    *[("grpo.py", how) for how in WRONG],
    *[(name, "raises") for name in ("sft.py", "ppo.py", "dpo.py", "dapo.py")],
])
def test_a_reward_function_that_fails_is_reported_with_its_row_and_response(
        name, how, adder, reward_model, run, monkeypatch):
    """Wrong from the first checkpoint on, which stays; sft.py and dpo.py only evaluate by it."""
    module = importlib.import_module(name[:-3])
    wrong, says = WRONG[how]
    right = module.score

    def score(row, text):
        if text and os.path.exists("out/ckpt.pt"):
            return wrong(row, text)
        return right(row, text)

    monkeypatch.setattr(module, "score", score)
    line = run(name, *quick(name, adder, reward_model), "--out", "out")
    assert line.startswith(f"{name}: score ") and says in line, line
    assert re.search(r"\.jsonl:\d+ ", line) and "response" in line, line
    assert read_checkpoint("out")["step"] == 3 and metrics("out")[-1]["step"] >= 3


def test_annotators_who_rank_by_a_score_that_is_nan_are_reported(adder, run, monkeypatch):
    module = importlib.import_module("reward")
    monkeypatch.setattr(module, "score", lambda row, text: math.nan if text else 0.0)
    line = run("reward.py", *quick("reward.py", adder), "--out", "out")
    assert line.startswith("reward.py: score ") and "nan" in line
    assert not os.path.exists("out")


# ------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("name, twice", [
    *[(name, False) for name in SCRIPTS], ("sft.py", True), ("grpo.py", True)])
def test_ctrl_c_saves_the_step_and_a_second_one_leaves_the_checkpoint_before_it(
        name, twice, adder, reward_model, run, assert_uninterrupted, monkeypatch, capsys):
    """After the log line of step 4, with a checkpoint at step 3; the second Ctrl-C comes in the
    middle of the write."""
    args = quick(name, adder, reward_model)
    save, log = torch.save, common.run.Run.log

    def log_then_interrupt(self, step, metrics):
        reason = log(self, step, metrics)
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return reason

    def save_half(data, f):
        if data["step"] != 4:
            return save(data, f)
        f.write(b"half of it")
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(common.run.Run, "log", log_then_interrupt)
        if twice:
            patch.setattr(torch, "save", save_half)
        capsys.readouterr()
        line = run(name, *args, "--out", "out")
    assert "interrupted" in capsys.readouterr().err        # at once, before the step is saved
    assert line.startswith(f"{name}: interrupted") and "--resume" in line
    assert ("step 4 is saved" in line) is not twice
    assert read_checkpoint("out")["step"] == (3 if twice else 4)
    assert not os.path.exists("out/ckpt.pt.tmp")
    assert run(name, "--out", "out", "--resume") is None
    assert_uninterrupted("out", name, *args)
    # after the last step nothing is left to be saved
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


# ---------------------------------------------------------------------------------- early stopping


def val(accuracy, score):
    return {"val_accuracy": accuracy, "val_score": score}


@pytest.mark.parametrize("stream, rule", [
    ([{"loss": 1.0}] * 3 + [{"loss": math.nan}], "loss is nan"),
    ([{"grad_norm": math.inf}], "grad_norm is inf"),
    ([{"kl_seq": 11.0}] * 5, "KL 10"),
    ([{"eos_rate": 0.01}] * 5, "5% ended"),
    ([{"pass_at_g": 0.0}] * 50, "right 50"),
    ([val(.5, 0.), val(.7, 1.), val(.6, 1.5), {"reward": 1.0}, val(.5, 2.)],
     "score 1.00 2.00 accuracy 0.700 0.500"),
    ([val(.7, 1.)] + [val(.66, 2.)] * 9, None),            # within two standard errors
    ([val(.7, 1.)] + [val(.2, .5)] * 9, None),             # both fell: no over-optimisation
    ([val(.7, 1.)] + [val(.5, 2.), val(.7, 2.)] * 4, None),       # never twice in a row
    ([{"kl_seq": 11.0}] * 4 + [{"kl_seq": 9.0}] + [{"kl_seq": 11.0}] * 4, None),
    ([{"pass_at_g": 0.0}] * 49 + [{"pass_at_g": 0.1}] + [{"pass_at_g": 0.0}] * 49, None),
    # no response is right, but a reward model or a truncated one makes a difference
    ([{"pass_at_g": 0.0, "frac_zero_std": 0.9}] * 100, None),
    ([{"loss": 1.0, "kl_seq": 1.0, "eos_rate": 1.0, "pass_at_g": 0.5}] * 100, None),
])
def test_early_stopping_fires_at_the_last_of_these_metrics_by_this_rule(stream, rule):
    early_stopping = EarlyStopping(max_kl=10.0, n_val=500)
    verdicts = [early_stopping.check(m) for m in stream]
    assert not any(verdicts[:-1])
    if rule is None:
        assert verdicts[-1] is None
    else:
        assert all(part in verdicts[-1] for part in rule.split())


# ------------------------------------------------------------------------- logs and other machines


def step_lines(log):
    """The lines of a log that hold the metrics of a step."""
    return [line for line in log.splitlines() if re.match(r" *\d+/\d+ ", line)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_log_is_a_line_per_step_under_a_header_and_says_the_time_left_from_the_second_on(
        name, adder, reward_model, run, capsys):
    assert run(name, *quick(name, adder, reward_model), "--out", "out") is None
    log = capsys.readouterr().out
    header = next(line for line in log.splitlines() if line.split()[:1] == ["step"])
    columns = importlib.import_module(name[:-3]).COLUMNS
    assert header.split() == ["step", *columns.split(), "mem_gb", "left"]
    lines, rows = step_lines(log), metrics("out")
    assert "\r" not in log and len(lines) == len(rows) > 1
    ends = [word.end() for word in re.finditer(r"\S+", header)]
    for i, (line, row) in enumerate(zip(lines, rows)):
        assert int(line.split("/")[0]) == row["step"]
        line, time_left, _ = re.fullmatch(r"(.*?)(  (\d+:\d\d))?", line).groups()
        assert (time_left is not None) is (i > 0)
        _, *numbers = re.finditer(r"\S+", line)            # each ends where its name ends
        assert all(word.end() in ends for word in numbers), f"\n{header}\n{line}"
    assert lines[-1].endswith(" 0:00")


def test_help_fits_an_old_encoding(tmp_path):
    """A log file on Windows has no ε; what cannot be written in it is spelled out."""
    done = script("grpo.py", "--help", cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u03b5" in done.stdout, done.stderr


def test_default_folders_are_recognised_where_paths_have_backslashes(monkeypatch):
    """grpo.py makes out/sft where it is missing: by that name, however the system spells it."""
    monkeypatch.setattr(os.path, "normpath", ntpath.normpath)
    monkeypatch.setattr(os, "sep", "\\")
    for name in SCRIPTS:
        Config = config_class(name)
        assert parse_config(Config, []) == Config()
        assert parse_config(Config, ["--out", ".\\out\\mine\\"]).out == "out/mine"


@pytest.mark.parametrize("files, advice", [
    (("adapter_config.json", "adapter_model.safetensors"), "merge_and_unload"),
    (("config.json", "pytorch_model.bin"), "save_pretrained"), (("model.gguf",), "safetensors")])
def test_other_kinds_of_weights_are_refused_with_what_to_do(files, advice, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=advice):
        load(str(tmp_path))
    if files == ("model.gguf",):
        with pytest.raises(InputError, match=advice):
            load(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["grpo.py", "sft.py"])
def test_a_gpu_out_of_memory_ends_in_one_line_with_the_flags_that_help(
        name, adder, run, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(M.GPT, "token_logp", full)
    line = run(name, *quick(name, adder), "--out", "out")
    assert "CUDA out of memory" in line
    for flag in ("--gradient_checkpointing", "--micro_batch_tokens"):
        assert flag in line


def test_a_gpu_that_cannot_be_used_is_told_at_the_start(adder, run, monkeypatch, capsys):
    """A driver that is too old, where the CPU is used, and a card without kernels in this torch."""
    def old_driver():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\nmore")
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    assert common.models.setup(grpo.Config()).type != "cuda"
    assert "no GPU is used: CUDA initialization: The NVIDIA" in capsys.readouterr().out

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    line = run("grpo.py", *quick("grpo.py", adder), "--out", "out")
    assert "no kernel image" in line and "CUDA_VISIBLE_DEVICES=" in line and "install" in line
    assert not os.path.exists("out")


class NoFloat64(TorchDispatchMode):
    """But for random numbers that wait on the CPU, and rows of them."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in (torch.ops.aten.rand, torch.ops.aten.slice, torch.ops.aten.view):
            return out
        for x in out if isinstance(out, (list, tuple)) else [out]:
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_tensor_is_float64_which_macs_do_not_have(name, adder, reward_model, run, monkeypatch):
    """But for the angles of RoPE, which are computed on the CPU, once."""
    monkeypatch.setitem(M.SAMPLE_DTYPE, "cpu", M.SAMPLE_DTYPE["mps"])
    policy, _ = load(str(adder / "out/sft"))
    policy.token_logp(torch.zeros(1, 2, dtype=torch.int64))
    with NoFloat64():
        assert run(name, *quick(name, adder, reward_model), "--out", "out") is None
