"""What the tests share: tiny models of every family, and small runs of the scripts.

    python -m pytest -q            all but the slow tests
    python -m pytest -q -m slow    the slow ones: default runs of the scripts, kills, the bug zoo
"""
import importlib
import json
import os
import signal
import subprocess
import sys

# One thread, here and in the scripts that tests start: the models are tiny, and with several the
# order of a sum, hence the last digits, may depend on how busy the machine is.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "experiments")]

import common.run  # noqa: E402
import common.train  # noqa: E402
import model as M  # noqa: E402
from common.tokenizer import InputError  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

SCRIPTS = ["sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py", "dapo.py"]
FAMILIES = {
    "gpt2": dict(norm="layer", positions="learned", mlp="gelu", bias=True),
    "llama3": dict(n_head=4, n_kv_head=2, tie_embeddings=False, rope_theta=500_000.0,
                   rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "qwen2": dict(n_head=4, n_kv_head=1, qkv_bias=True),
    "qwen3": dict(n_head=4, n_kv_head=2, head_dim=12, qk_norm=True),
}
PROMPTS = [[7, 8, 9], [10], [3, 4, 11, 12, 13, 14, 15], [16, 17], [3]]   # ragged; some are stop ids


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than a few seconds; run by -m slow")
    if not config.option.markexpr and not config.option.keyword:
        config.option.markexpr = "not slow"


# ------------------------------------------------------------------------------------- tiny models


def tiny(family="llama3", dtype=torch.float64, seed=0, **more):
    """A model of 2 layers and 32 channels whose logits have a standard deviation of at least 1, so
    that a wrong one shows, and whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=23, block_size=48, n_layer=2, n_embd=32, n_head=2,
                 stop_token_ids=(3, 4, 5, 18, 19, 20, 21, 22))
    model = GPT(GPTConfig(**shape | FAMILIES[family] | more)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.4 if "embedding" in name or "head" in name else 0.2
            mean = 1 if "norm" in name and p.dim() == 1 else 0
            p.copy_(torch.randn_like(p) * std + mean)
        logits = model(torch.randint(0, model.cfg.vocab_size, (4, 20))) @ model.unembedding.T
    assert logits.std() >= 1, logits.std()
    return model


def naive_logp(model, tokens, temperature=1.0):
    """log-prob of every token by the textbook, (B, T), 0 at t = 0: all logits at once."""
    logits = model(tokens) @ model.unembedding.T / temperature
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros_like(logp[:, :1]), logp], 1)


def bf16_devices(monkeypatch, devices):
    """Devices on which every model counts as one to run in bf16."""
    monkeypatch.setattr(M, "BF16_MIN_WIDTH", dict.fromkeys(devices, 1))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


# --------------------------------------------------------------------------- small runs of scripts

SMALL = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--steps", "12", "--eval_every", "5",
         "--batch", "8"]
QUICK = ["--steps", "6", "--prompts", "4", "--group_size", "4", "--minibatch", "8",
         "--eval_every", "3"]
PPO = ["--steps", "6", "--prompts", "16", "--minibatch", "8", "--eval_every", "3"]
SHORT = ["--max_new_tokens", "6"]
PAIRS = ["--prompts", "64", "--batch", "4", "--length_bias", "0.1", "--eval_every", "3"]


def script(name, *args, cwd, **kwargs):
    """Run a script in a process of its own."""
    command = [sys.executable, os.path.join(ROOT, name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)


def metrics(folder):
    """metrics.jsonl without what depends on the clock and the machine."""
    rows = []
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        for line in f:
            row = json.loads(line)
            rows.append({k: x for k, x in row.items() if not k.endswith("_s") and k != "mem_gb"})
    return rows


def equal(a, b):
    """Nested dictionaries and lists of tensors and plain values, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """A job in the background ignores Ctrl-C, and so would the runs that it starts."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture(scope="session")
def adder(tmp_path_factory):
    """A small policy that answers rows of its own, "3+4=", in a token or two: out/sft and
    rows.jsonl."""
    folder = tmp_path_factory.mktemp("adder")
    lines = []
    for i in range(24):
        for j in range(24):
            row = {"prompt": f"{i}+{j}=", "response": str(i + j), "answer": str(i + j)}
            lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    done = script("sft.py", *SMALL, "--steps", 300, "--batch", 16, "--eval_every", 300, *SHORT,
                  "--data", "rows.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def reward_model(adder):
    """The folder of a reward model of its responses, by annotators who like length."""
    done = script("reward.py", *PAIRS, *SHORT, "--data", "rows.jsonl", cwd=adder)
    assert done.returncode == 0, done.stderr
    return adder / "out/reward"


def quick(name, adder, reward_model=None):
    """Flags of a run of about a second, with a checkpoint at every third step; dpo.py trains on the
    reward model's pairs."""
    own = ["--init", adder / "out/sft", "--data", adder / "rows.jsonl", *SHORT]
    if name == "sft.py":
        return [*SMALL, "--steps", 6, "--eval_every", 3, "--data", adder / "rows.jsonl", *SHORT]
    if name == "reward.py":
        return [*PAIRS, *own]
    if name == "ppo.py":
        return [*PPO, *own, "--reward", "rule"]
    if name == "dpo.py":
        return ["--init", adder / "out/sft", "--data", reward_model / "preferences.jsonl",
                "--batch", 12, "--eval_every", 3, *SHORT]
    return [*QUICK, *own]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a policy that is too small to be good."""
    folder = tmp_path_factory.mktemp("small")
    assert script("sft.py", *SMALL, cwd=folder).returncode == 0
    return folder / "out/sft"


def run_whole_and_cut(run, name, args, monkeypatch):
    """A run into "whole"; the same into "cut", which ends between two checkpoints and is resumed:
    the steps after the last one are done again, and no line of the log is lost or doubled."""
    assert run(name, *args, "--out", "whole") is None
    log = common.run.Run.log

    def interrupt(self, step, metrics):
        if step == (7 if self.steps > 6 else 4):
            raise InputError("interrupted here")
        return log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(common.run.Run, "log", interrupt)
        assert "interrupted here" in run(name, *args, "--out", "cut")
    assert run(name, "--out", "cut", "--resume") is None   # its settings are remembered
    assert metrics("cut") == metrics("whole")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A script in this process, which saves seconds: None, or the one line that ended it."""
    def run(name, *args):
        module = importlib.import_module(name[:-3])
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            common.run.main(module.train, module.Config)
        except SystemExit as end:
            line = str(end.code).strip()
            assert len(line.splitlines()) == 1 and line.startswith(f"{name}: "), line
            return line

    monkeypatch.chdir(tmp_path)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in handlers:
        signal.signal(number, handler)
