"""Two processes under torchrun against one: the same gradients, the same evaluation, one writer;
and how a run ends when one of them fails.

    python -m pytest tests/test_distributed.py            one script; -m slow: all of them
"""
import os
import re
import subprocess
import sys

import pytest
import torch

import common.distributed
import common.run
import sft
from common.checkpoint import read_checkpoint
from common.distributed import first_over_ranks, gather_shards, shard
from common.flags import check_limits
from common.tokenizer import InputError
from common.train import batches
from conftest import ROOT, SCRIPTS, equal, metrics, quick
from grpo import Config

slow = pytest.mark.slow
needs_torchrun = pytest.mark.skipif(not torch.distributed.is_available() or os.name != "posix",
                                    reason="no torchrun here")


def start(n, script, *args, cwd):
    """n processes of a script, one of them without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
    command = [*(launcher if n > 1 else []), os.path.join(ROOT, script), *args]
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(*children):
    """What the last one printed."""
    ended = [(*child.communicate(), child.returncode) for child in children]
    for out, err, code in ended:
        assert code == 0, err
    return out


# ------------------------------------------------------------------------------- the same gradients

# several minibatches or epochs of a rollout
SEVERAL = {"ppo.py": ["--epochs", 2], "grpo.py": ["--epochs", 2],
           "dapo.py": ["--minibatch", 16, "--epochs", 2, "--max_generations", 1]}
CASES = [pytest.param(name, dtype, id=f"{name}-{dtype}",
                      marks=[] if (name, dtype) == ("grpo.py", "float32") else slow)
         for name in SCRIPTS for dtype in ("float32", "float64")
         if dtype == "float32" or name in ("ppo.py", "dapo.py")]


@needs_torchrun
@pytest.mark.parametrize("name, dtype", CASES)
def test_the_number_of_processes_changes_no_gradient(name, dtype, adder, reward_model, tmp_path):
    """In float32 the first gradient; in float64, where Adam does not blow rounding up, those of all
    steps, and all metrics. dapo.py draws one generation, as the prompts of a second one depend on
    the number of processes; some of its rollouts have no informative group."""
    minibatches = 1 if name == "dapo.py" else 2
    args = [*quick(name, adder, reward_model), *SEVERAL.get(name, [])]
    if name not in ("reward.py", "dpo.py"):
        args += ["--steps", 3]
    if name == "ppo.py":
        args += ["--reward", reward_model]
    children = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        children.append(start(n, "tests/record_gradients.py", folder, dtype, minibatches, name,
                              *args, "--out", "run", cwd=folder))
    finish(*children)
    one = torch.load(tmp_path / "1/rank0.pt")["gradients"]
    two = torch.load(tmp_path / "2/rank0.pt")["gradients"]
    assert equal(two, torch.load(tmp_path / "2/rank1.pt")["gradients"])
    assert len(one) == len(two) >= 3
    tolerance = 1e-6 if dtype == "float32" else 1e-10
    assert any(one)
    for a, b in zip(one[:1] if dtype == "float32" else one, two):
        if not a:                                          # no informative group, on any process
            assert not b
            continue
        scale = max(x.abs().max() for x in a)
        error = max((x - y).abs().max() for x, y in zip(a, b))
        assert 0 < scale and error <= tolerance * scale
    logs = [metrics(tmp_path / f"{n}/run") for n in (1, 2)]
    for a, b in list(zip(*logs))[:2 if dtype == "float32" else None]:
        tolerance = 1e-3 if dtype == "float32" else 1e-5
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    before = [read_checkpoint(tmp_path / f"{n}/run")["state"]["before"] for n in (1, 2)]
    if name != "reward.py":
        assert before[0][1] == before[1][1]                    # greedy responses, in order
        before = [evaluation for evaluation, _ in before]
    assert before[0] == pytest.approx(before[1], rel=1e-5, abs=1e-5)


@slow
@needs_torchrun
def test_dynamic_sampling_fills_the_rollout_over_all_processes(adder, tmp_path):
    """As many groups as one process keeps, not twice as many, and not so many on each."""
    args = [*quick("dapo.py", adder), "--prompts", 6, "--minibatch", 24, "--max_generations", 99]
    finish(start(2, "tests/record_gradients.py", tmp_path, "float32", 1, "dapo.py", *args,
                 "--out", "run", cwd=tmp_path))
    sizes = [torch.load(tmp_path / f"rank{i}.pt")["sizes"] for i in (0, 1)]
    assert all(a + b == 6 * 4 for a, b in zip(*sizes))
    assert any(a != b for a, b in zip(*sizes))
    assert any(row["generations"] > 1 for row in metrics(tmp_path / "run")[1:])


# ----------------------------------------------------------------------------- shares, by hand


def ranks(monkeypatch, n):
    """Run what follows as each of n ranks in turn."""
    monkeypatch.setattr(common.distributed, "world_size", lambda: n)
    for i in range(n):
        monkeypatch.setattr(common.distributed, "rank", lambda: i)
        yield i


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_shares_are_all_rows_once_in_order(n, monkeypatch):
    for length in (0, 1, 7, 8, 50):
        parts = [shard(list(range(length))) for _ in ranks(monkeypatch, n)]
        monkeypatch.setattr(common.distributed, "gather", lambda _: parts)
        assert gather_shards(None) == list(range(length))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_batches_of_all_ranks_are_those_of_one_process(n, monkeypatch):
    rows = list(range(20))
    whole = batches(rows, 6, seed=0)
    whole = [next(whole) for _ in range(9)]
    parts = []
    for _ in ranks(monkeypatch, n):
        own = batches(rows, 6, seed=0)
        parts.append([next(own) for _ in range(9)])
    assert [sum(part, []) for part in zip(*parts)] == whole


def test_what_is_kept_of_all_ranks_is_the_first_n(monkeypatch):
    torch.manual_seed(0)
    for trial in range(50):
        keep = torch.rand(3, 5) < 0.5
        n = trial % 16
        monkeypatch.setattr(common.distributed, "gather", lambda _: keep.sum(1).tolist())
        kept = torch.stack([first_over_ranks(keep[i], n) for i in ranks(monkeypatch, 3)]).flatten()
        chosen = keep.flatten().nonzero()[:n, 0]
        assert kept.nonzero()[:, 0].tolist() == chosen.tolist()


def test_a_rank_draws_random_numbers_of_its_own_and_writes_nothing(adder, run, monkeypatch):
    seeds = []
    for i in (0, 1):
        monkeypatch.setattr(sys, "stdout", sys.stdout)         # rank 1 prints nothing, either
        monkeypatch.setattr(common.run, "rank", lambda: i)
        assert run("sft.py", *quick("sft.py", adder), "--out", f"rank{i}") is None
        seeds.append(torch.initial_seed())
    assert seeds[0] != seeds[1]
    assert os.path.exists("rank0/ckpt.pt") and not os.path.exists("rank1")


def test_sizes_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr("common.flags.world_size", lambda: 3)
    for flags, name in (({}, "--prompts"), ({"prompts": 30}, "--minibatch")):
        with pytest.raises(InputError, match=name):
            check_limits(Config(**flags))
    check_limits(Config(prompts=30, minibatch=60))
    with pytest.raises(InputError, match="--batch 2"):
        check_limits(sft.Config(batch=2))


# ------------------------------------------------------------------------ resuming, and failing


@slow
@needs_torchrun
def test_two_processes_resume_to_the_bit_and_one_is_refused(adder, tmp_path):
    """Killed after the checkpoint of step 3, in step 4. Rank 0 alone prints, and each process draws
    random numbers of its own."""
    name = "dapo.py"
    args = [*quick(name, adder), "--out"]
    out = finish(start(2, name, *args, "whole", cwd=tmp_path))
    assert len(re.findall(r"^ *6/6 ", out, re.M)) == 1 and out.count("held-out prompts") == 1
    child = start(2, "tests/fail_on_a_rank.py", 1, 4, "kill", name, *args, "cut", cwd=tmp_path)
    child.communicate()
    assert child.returncode and read_checkpoint(tmp_path / "cut")["step"] == 3
    child = start(1, name, "--out", "cut", "--resume", cwd=tmp_path)
    _, err = child.communicate()
    assert child.returncode == 1 and "2 processes" in err and len(err.strip().splitlines()) == 1
    finish(start(2, name, "--out", "cut", "--resume", cwd=tmp_path))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    whole = read_checkpoint(tmp_path / "whole")
    assert equal(read_checkpoint(tmp_path / "cut"), whole)
    a, b = whole["rng"]
    assert not torch.equal(a, b)


@slow
@needs_torchrun
@pytest.mark.parametrize("how, said, step", [
    ("error", "rank 1 met a bad row", 3),
    ("memory", "out of memory", 3),
    ("signal", "step 4 is saved", 4),
    ("kill", "another process has ended", 3),
])
def test_what_ends_one_process_ends_all_with_one_line(how, said, step, adder, tmp_path):
    """torchrun adds a report of its own. The last checkpoint is whole; a signal saves another."""
    child = start(2, "tests/fail_on_a_rank.py", 1, 4, how, "grpo.py", *quick("grpo.py", adder),
                  "--out", "run", cwd=tmp_path)
    _, err = child.communicate()
    assert child.returncode
    lines = [line for line in err.splitlines() if line.startswith("grpo.py: ")]
    assert len(lines) == 1 and said in lines[0]
    assert read_checkpoint(tmp_path / "run")["step"] == step
    assert [row["step"] for row in metrics(tmp_path / "run")][:4] == [0, 1, 2, 3]


@slow
@needs_torchrun
def test_an_error_that_all_processes_meet_is_said_once(tmp_path):
    child = start(2, "grpo.py", "--data", "missing.jsonl", cwd=tmp_path)
    _, err = child.communicate()
    assert child.returncode and err.count("grpo.py: out/sft: no checkpoint here") == 1
