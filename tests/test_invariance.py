"""No number that a run logs or reports depends on how its work is cut: into micro-batches, into
chunks of an evaluation, into minibatches and epochs while nothing learns, or on the order of the
prompts.   python -m pytest tests/test_invariance.py"""
import zlib
from pathlib import Path

import pytest
import torch

import common.train
import grpo
import ppo
from common.run import Run, prefixed
from common.models import make_reference
from common.train import batches
from conftest import metrics, quick
from model import GPT

PROMPTS = 16                          # in a rollout of grpo.py and dapo.py, with 4 responses each
RESPONSES = 64                        # in a rollout
PPO = ["--steps", 3, "--prompts", RESPONSES, "--minibatch", 16]
GROUPS = ["--steps", 3, "--prompts", PROMPTS, "--minibatch", 16]
# many responses are truncated, and get the lowest reward at the start
SHORTER = ["--max_new_tokens", 3, "--truncated_reward", 9]
CASES = {
    "sft": ["--steps", 3, "--batch", 16],
    "reward": ["--batch", 16],
    "dpo": ["--batch", 16],
    "ppo with a rule": PPO,
    "ppo with a reward model": PPO + SHORTER,
    "grpo with a rule": GROUPS,
    "grpo with a reward model": GROUPS + SHORTER,
    "dapo with a rule": GROUPS,
}
ROLLOUTS = [case for case in CASES if "with" in case]


@pytest.fixture(scope="module")
def few(adder, reward_model, tmp_path_factory):
    """A folder with every fourth line of the prompts and of the preferences."""
    folder = tmp_path_factory.mktemp("few")
    for path in (adder / "rows.jsonl", reward_model / "preferences.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[::4]))
    return folder


def make_reference_elsewhere(policy, moves=False):
    """A reference that differs from the policy at the start: its KL is not 0, and the gradient of
    the KL is not mere rounding, which Adam would scale up to a whole step."""
    reference = make_reference(policy, moves)
    for p in reference.parameters():
        p.data *= 1.1
    return reference


@pytest.fixture
def numbers(run, adder, few, reward_model, monkeypatch):
    """All numbers of a run: the metrics of every step and the table that ends it."""
    tables = {}

    def keep_tables(self, rows, before, after):
        tables.update(prefixed("before ", before[0]) | prefixed("after ", after[0]))

    monkeypatch.setattr(Run, "report", keep_tables)
    monkeypatch.setattr(Run, "plot", lambda *_: None)
    monkeypatch.setattr(grpo, "make_reference", make_reference_elsewhere)
    monkeypatch.setattr(ppo, "make_reference", make_reference_elsewhere)

    def numbers(case, *more):
        name = case.split()[0] + ".py"
        data = "preferences.jsonl" if case == "dpo" else "rows.jsonl"
        flags = [*quick(name, adder, reward_model), "--data", few / data, *CASES[case]]
        if case == "sft":
            flags += ["--init", adder / "out/sft"]
        if case.endswith("a reward model"):
            flags += ["--reward", reward_model]
        tables.clear()
        assert run(name, *flags, "--out", "out", *more) is None
        found = dict(tables)
        for row in metrics("out"):
            found |= prefixed(f"step {row['step']} ", row)
        if case.endswith("a reward model"):
            assert .1 < found["before eos_rate"] < .9
        return found

    return numbers


def differences(one, other, but=()):
    """The numbers that differ by more than rounding, except some metrics. Seen: 1e-7, the rounding
    that sampler_logp_error is, and 1e-5 of a kl_seq after three steps."""
    assert one.keys() == other.keys()
    found = []
    for name, x in one.items():
        if name.split()[-1] not in but and other[name] != pytest.approx(x, rel=1e-3, abs=1e-5):
            found.append(f"{name}: {x} and {other[name]}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_size_of_a_micro_batch_changes_nothing(case, numbers):
    """40 tokens are a few responses, one or two pairs, or one ranking."""
    whole = numbers(case, "--micro_batch_tokens", 100_000)
    cut = numbers(case, "--micro_batch_tokens", 40)
    assert differences(whole, cut) == []


def cut_evaluation(monkeypatch):
    """Into chunks of one prompt with eight samples, or a few prompts with one, the last shorter."""
    monkeypatch.setattr(common.train, "EVAL_BATCH_TOKENS", 40)


@pytest.mark.parametrize("case", CASES)
def test_the_chunks_of_an_evaluation_change_nothing(case, numbers, monkeypatch):
    whole = numbers(case)
    cut_evaluation(monkeypatch)
    assert differences(whole, numbers(case)) == []


def test_the_chunks_of_a_collection_change_no_preference(numbers, monkeypatch):
    numbers("reward")
    whole = Path("out/preferences.jsonl").read_text()
    cut_evaluation(monkeypatch)
    numbers("reward")
    assert Path("out/preferences.jsonl").read_text() == whole


@pytest.fixture
def sampling_by_prompt(monkeypatch):
    """The random numbers to sample by belong to a prompt, not to a row or to a rollout."""
    generate = GPT.generate

    def generate_by_prompt(self, prompts, group_size, max_new_tokens, temperature=1.0,
                           uniform=None):
        uniform = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(str(prompt).encode()))
            uniform.append(torch.rand(group_size, max_new_tokens, generator=generator))
        uniform = torch.cat(uniform)
        return generate(self, prompts, group_size, max_new_tokens, temperature, uniform=uniform)

    monkeypatch.setattr(GPT, "generate", generate_by_prompt)


@pytest.mark.slow
@pytest.mark.parametrize("case", ROLLOUTS)
def test_minibatches_and_epochs_change_nothing_at_rest(case, numbers, sampling_by_prompt):
    """Except the norm of a minibatch's gradient, while nothing learns."""
    at_rest = ["--lr", 0]
    if case.startswith("ppo"):
        at_rest += ["--critic_lr", 0]
    norms = ["grad_norm", "critic_grad_norm"]
    whole = numbers(case, *at_rest, "--minibatch", RESPONSES, "--epochs", 1)
    cut = numbers(case, *at_rest, "--minibatch", 8, "--epochs", 1)
    twice = numbers(case, *at_rest, "--minibatch", RESPONSES, "--epochs", 2)
    assert differences(whole, cut, but=norms) == []
    assert differences(whole, twice, but=norms) == []


def reversed_batches(rows, size, seed, start=0):
    """The same rollouts, each with its prompts in reverse. dapo.py draws them one by one."""
    in_order = batches(rows, size, seed, start)
    while True:
        rollout = []
        while len(rollout) < max(size, PROMPTS):
            rollout += next(in_order)
        rollout.reverse()
        for i in range(0, len(rollout), size):
            yield rollout[i:i + size]


@pytest.mark.parametrize("case", ROLLOUTS)
def test_the_order_of_the_prompts_changes_nothing(case, numbers, sampling_by_prompt, monkeypatch):
    """With one minibatch. dapo.py samples once, or other prompts would fill up the batch."""
    flags = ["--minibatch", RESPONSES]
    if case.startswith("dapo"):
        flags += ["--max_generations", 1]
    in_order = numbers(case, *flags)
    monkeypatch.setattr(f"{case.split()[0]}.batches", reversed_batches)
    assert differences(in_order, numbers(case, *flags)) == []
