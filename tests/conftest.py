"""What the tests share: tiny models of every family, with weights large enough that a wrong logit shows; and small runs of the scripts."""
import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import model as M  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

FAMILIES = {
    "gpt2": dict(norm="layer", positions="learned", mlp="gelu", bias=True),
    "llama3": dict(heads=4, kv_heads=2, tied=False, rope_base=500_000.0, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "qwen2": dict(heads=4, kv_heads=1, qkv_bias=True),
    "qwen3": dict(heads=4, kv_heads=2, head_dim=12, qk_norm=True),
}


def tiny(family="llama3", dtype=torch.float64, seed=0, **more):
    """A model of 2 layers and width 32 whose logits have a standard deviation of at least 1, and whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab=23, context=48, layers=2, width=32, heads=2, stop=(3, 4, 5, 18, 19, 20, 21, 22)) | FAMILIES[family] | more)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.4 if "embedding" in name or "head" in name else 0.2) + ("norm" in name and p.dim() == 1))
        logits = model(torch.randint(0, model.cfg.vocab, (4, 20))) @ model.unembedding.T
    assert logits.std() >= 1, logits.std()
    return model


def naive_logp(model, tokens, temperature=1.0):
    """log-prob of every token by the textbook, (B, T), 0 at t = 0: all logits at once."""
    logp = ((model(tokens) @ model.unembedding.T).to(torch.promote_types(model.unembedding.dtype, torch.float32)) / temperature).log_softmax(-1)
    picked = logp[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros_like(picked[:, :1]), picked], 1)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PROMPTS = [[7, 8, 9], [10], [3, 4, 11, 12, 13, 14, 15], [16, 17], [3]]      # ragged; some hold stop ids, one is nothing else


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--steps", "12", "--eval_every", "5", "--batch", "8"]
QUICK = ["--steps", "6", "--prompts", "4", "--group", "4", "--minibatch", "8", "--eval_every", "3"]
PPO = ["--steps", "6", "--prompts", "16", "--minibatch", "8", "--eval_every", "3"]
SHORT = ["--max_new", "6"]
PAIRS = ["--prompts", "64", "--batch", "4", "--length_taste", "0.1", "--eval_every", "3"]                     # a taste that any answers can meet


def script(name, *args, cwd, **kwargs):
    return subprocess.run([sys.executable, os.path.join(ROOT, name), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=900, **kwargs)


def metrics(folder):
    """metrics.jsonl without what depends on the clock and the machine."""
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s") and k != "mem_gb"} for line in f]


def equal(a, b):
    """Nested dictionaries and lists of tensors and plain values, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A job in the background ignores Ctrl-C, and so would the runs that it starts."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture(scope="session")
def adder(tmp_path_factory):
    """A small policy that answers rows of its own, "3+4=", in a token or two; out/sft and rows.jsonl, in seconds."""
    folder = tmp_path_factory.mktemp("adder")
    rows = [{"prompt": f"{i}+{j}=", "response": str(i + j), "answer": str(i + j)} for i in range(24) for j in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = script("sft.py", *SMALL, "--steps", 300, "--batch", 16, "--eval_every", 300, "--data", "rows.jsonl", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def judge(adder):
    """A reward model of its answers by people who like length."""
    done = script("reward.py", *PAIRS, *SHORT, "--data", "rows.jsonl", cwd=adder)
    assert done.returncode == 0, done.stderr
    return adder / "out/reward"


def quick(name, adder, judge=None):
    """Arguments of a run of about a second, with a checkpoint at every third step; dpo.py learns from the judge's pairs."""
    own = ["--init", adder / "out/sft", "--data", adder / "rows.jsonl", *SHORT]
    pairs = ["--init", adder / "out/sft", "--data", judge and judge / "preferences.jsonl", "--batch", 12, "--eval_every", 3, *SHORT]
    sft = [*SMALL, "--steps", 6, "--eval_every", 3, "--data", adder / "rows.jsonl", *SHORT]
    return {"sft.py": sft, "reward.py": [*PAIRS, *own], "ppo.py": [*PPO, *own, "--reward", "rule"], "dpo.py": pairs,
            "grpo.py": [*QUICK, *own], "dapo.py": [*QUICK, *own]}[name]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A policy too small to be good, in a second."""
    folder = tmp_path_factory.mktemp("small")
    assert script("sft.py", *SMALL, cwd=folder).returncode == 0
    return folder / "out/sft"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A script in this process, which saves seconds: None, or the one line that ended it."""
    def run(name, *args):
        module = importlib.import_module(name[:-3])
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            M.main(module.train, module.Config)
        except SystemExit as end:
            line = str(end.code).strip()
            assert len(line.splitlines()) == 1 and line.startswith(f"{name}: "), line
            return line

    monkeypatch.chdir(tmp_path)
    ours = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in ours:
        signal.signal(number, handler)
