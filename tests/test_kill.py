"""Kill -9 at random moments and in the middle of a checkpoint: --resume goes on, to the bit.   python -m pytest tests/test_kill.py

A few kills, that is; `python tests/test_kill.py 54` is nine for each script and takes about ten minutes.
"""
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, equal, metrics, quick, script
from model import read_checkpoint

KILLS = int(os.environ.get("KILLS", 4))                                   # in all
SCRIPTS = ["sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py", "dapo.py"] if KILLS >= 6 else ["sft.py", "ppo.py"]


def start(name, *args, cwd, until, steps=1):
    """A script that has said so many lines that begin with `until`."""
    env, pipe = os.environ | {"PYTHONUNBUFFERED": "1"}, subprocess.PIPE
    command = [sys.executable, os.path.join(ROOT, name), *map(str, args)]
    child = subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)
    for line in child.stdout:
        steps -= line.startswith(until)
        if steps == 0:
            return child, line
    raise AssertionError(child.communicate())


def kill(child, out, rng, seconds, aimed):
    """Kill -9 within so many seconds; or, aimed, as soon as a checkpoint is begun, not always the first. None if the run ended before that,
    else whether it left half a checkpoint."""
    unfinished, end, skip = os.path.join(out, "ckpt.pt.tmp"), time.perf_counter() + rng.uniform(0, seconds), rng.randrange(3)
    while child.poll() is None:
        if not aimed and time.perf_counter() > end:
            break
        if aimed and os.path.exists(unfinished):
            if not skip:
                break
            while os.path.exists(unfinished):
                pass
            skip -= 1
        if not aimed:
            time.sleep(0.001)
    alive = child.poll() is None
    child.kill()
    child.communicate()
    return os.path.exists(unfinished) if alive else None


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(name, adder, judge, tmp_path):
    """Moments are drawn over the whole run, and every other kill waits for a checkpoint; metrics.jsonl has no gap and no line twice."""
    rng, todo, args = random.Random(name), -(-KILLS // len(SCRIPTS)), [*quick(name, adder, judge), "--eval_every", 2]
    child, _ = start(name, *args, "--out", "whole", cwd=tmp_path, until="memory in")            # what it says before it writes
    begun = time.perf_counter()
    child.communicate()
    seconds, whole = time.perf_counter() - begun, read_checkpoint(str(tmp_path / "whole"))
    kills = hits = runs = 0
    while kills < todo:
        runs, out = runs + 1, str(tmp_path / f"run{runs}")
        for _ in range(min(4, todo - kills)):                             # a run is killed up to four times
            begun = os.path.exists(os.path.join(out, "config.json"))
            child, _ = start(name, *([] if begun else args), "--out", out, *["--resume"] * begun, cwd=tmp_path, until="memory in")
            hit = kill(child, out, rng, seconds, aimed=kills % 2 == 0)
            if hit is None:
                break
            kills, hits = kills + 1, hits + hit
            if os.path.exists(os.path.join(out, "ckpt.pt")):
                read_checkpoint(out)
        begun = os.path.exists(os.path.join(out, "config.json"))
        done = script(name, *([] if begun else args), "--out", out, *["--resume"] * begun, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert metrics(out) == metrics(tmp_path / "whole")
        assert equal(read_checkpoint(out), whole)
    print(f"\n{name}: {kills} kills in {runs} runs, {hits} in the middle of a checkpoint; all runs are the uninterrupted one to the bit")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between programs")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_saves_its_step_and_says_how_to_go_on(number, adder, tmp_path):
    args = [*quick("sft.py", adder), "--steps", 200, "--eval_every", 200]
    child, _ = start("sft.py", *args, cwd=tmp_path, until="step ", steps=5)
    child.send_signal(number)
    _, said = child.communicate()
    step = read_checkpoint(str(tmp_path / "out/sft"))["step"]
    assert child.returncode == 1 and 5 <= step < 200 and metrics(tmp_path / "out/sft")[-1]["step"] == step
    assert said.splitlines() == ["", "interrupted: this step is finished and saved first; once more ends it at once", "",
                                 f"sft.py: interrupted; step {step} is saved, the same command with --resume goes on from it"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between programs")
def test_a_script_that_waits_for_another_passes_a_schedulers_word_on_and_the_same_command_goes_on(tmp_path):
    """SIGTERM for grpo.py alone, while sft.py makes out/sft for it."""
    child, _ = start("grpo.py", cwd=tmp_path, until="step ", steps=3)
    child.terminate()
    _, said = child.communicate()
    step = read_checkpoint(str(tmp_path / "out/sft"))["step"]
    assert step >= 3 and f"sft.py: interrupted; step {step} is saved" in said and not (tmp_path / "out/grpo").exists()
    assert said.splitlines()[-1] == "grpo.py: interrupted; the same command goes on from what is saved"
    child, line = start("grpo.py", cwd=tmp_path, until="step ")
    child.terminate()
    child.communicate()
    assert line.startswith(f"step {step + 1:4}/")


if __name__ == "__main__":
    os.environ["KILLS"] = sys.argv[1]
    sys.exit(pytest.main([__file__, "-q", "-s", "-k", "killed"]))
