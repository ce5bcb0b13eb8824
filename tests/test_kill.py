"""Kill -9 at random moments and in the middle of a checkpoint: --resume goes on, to the bit.

    python -m pytest -m slow tests/test_kill.py     a few kills
    python tests/test_kill.py 54                    nine for each script, about ten minutes
"""
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from common.checkpoint import read_checkpoint
from conftest import ROOT, SCRIPTS, equal, metrics, quick, script

KILLS = int(os.environ.get("KILLS", 4))                    # in all
KILLED = SCRIPTS if KILLS >= 6 else ["sft.py", "ppo.py"]
KILLS_PER_SCRIPT = -(-KILLS // len(KILLED))
MEMORY = r"memory in "                                     # what a script says before it writes
STEP = r" *\d+/\d+ "                                       # the log line of a step
pytestmark = pytest.mark.slow


def start(name, *args, cwd, until, n=1):
    """A script that has written n lines that match `until`, and the last of them."""
    command = [sys.executable, os.path.join(ROOT, name), *map(str, args)]
    child = subprocess.Popen(command, cwd=cwd, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stdout:
        n -= bool(re.match(until, line))
        if n == 0:
            return child, line
    raise AssertionError(child.communicate())


def kill(child, out, rng, seconds, aimed):
    """Kill -9 within `seconds`, at random; or, aimed, as soon as a checkpoint is begun, not always
    the first one. None if the run ended before that, else whether it left half a checkpoint."""
    unfinished = os.path.join(out, "ckpt.pt.tmp")
    moment = time.perf_counter() + rng.uniform(0, seconds)
    skip = rng.randrange(3)
    while child.poll() is None:
        if not aimed and time.perf_counter() > moment:
            break
        if aimed and os.path.exists(unfinished):
            if skip == 0:
                break
            skip -= 1
            while os.path.exists(unfinished) and child.poll() is None:
                pass
        if not aimed:
            time.sleep(0.001)
    alive = child.poll() is None
    child.kill()
    child.communicate()
    return os.path.exists(unfinished) if alive else None


@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(name, adder, reward_model, tmp_path):
    """Moments are drawn over the whole run, and every other kill waits for a checkpoint;
    metrics.jsonl has no gap and no line twice."""
    rng = random.Random(name)
    args = [*quick(name, adder, reward_model), "--eval_every", 2]
    child, _ = start(name, *args, "--out", "whole", cwd=tmp_path, until=MEMORY)
    began = time.perf_counter()
    child.communicate()
    seconds = time.perf_counter() - began                  # only scales the moments of the kills
    whole = read_checkpoint(tmp_path / "whole")
    kills = halves = runs = 0
    while kills < KILLS_PER_SCRIPT:
        runs += 1
        out = str(tmp_path / f"run{runs}")

        def command():
            resume = os.path.exists(os.path.join(out, "config.json"))
            return [name, "--out", out, *(["--resume"] if resume else args)]

        for _ in range(min(4, KILLS_PER_SCRIPT - kills)):  # a run is killed up to four times
            child, _ = start(*command(), cwd=tmp_path, until=MEMORY)
            half = kill(child, out, rng, seconds, aimed=kills % 2 == 0)
            if half is None:
                break
            kills += 1
            halves += half
            if os.path.exists(os.path.join(out, "ckpt.pt")):
                read_checkpoint(out)
        done = script(*command(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert metrics(out) == metrics(tmp_path / "whole")
        assert equal(read_checkpoint(out), whole)
    print(f"\n{name}: {kills} kills in {runs} runs, {halves} in the middle of a checkpoint")


posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between programs")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_saves_its_step_and_says_how_to_go_on(number, adder, tmp_path):
    """So many steps that the run cannot end before the signal comes."""
    steps = 10 ** 6
    args = [*quick("sft.py", adder), "--steps", steps, "--eval_every", steps]
    child, _ = start("sft.py", *args, cwd=tmp_path, until=STEP, n=5)
    child.send_signal(number)
    _, said = child.communicate()
    step = read_checkpoint(tmp_path / "out/sft")["step"]
    assert child.returncode == 1 and 5 <= step < steps
    assert metrics(tmp_path / "out/sft")[-1]["step"] == step
    at_once, at_the_end = [line for line in said.splitlines() if line]
    assert "interrupted" in at_once
    assert at_the_end.startswith("sft.py: interrupted")
    assert f"step {step} is saved" in at_the_end and "--resume" in at_the_end


@posix
def test_sigterm_reaches_the_script_that_another_waits_for_and_the_same_command_goes_on(tmp_path):
    """SIGTERM for grpo.py alone, while sft.py makes out/sft for it."""
    child, _ = start("grpo.py", cwd=tmp_path, until=STEP, n=3)
    child.terminate()
    _, said = child.communicate()
    step = read_checkpoint(tmp_path / "out/sft")["step"]
    assert step >= 3 and not (tmp_path / "out/grpo").exists()
    assert "sft.py: interrupted" in said and f"step {step} is saved" in said
    assert said.splitlines()[-1].startswith("grpo.py: interrupted")
    child, line = start("grpo.py", cwd=tmp_path, until=STEP)
    child.terminate()
    child.communicate()
    assert int(line.split("/")[0]) == step + 1


if __name__ == "__main__":
    os.environ["KILLS"] = sys.argv[1]
    sys.exit(pytest.main([__file__, "-q", "-s", "-m", "slow", "-k", "killed"]))
