"""
SmolLM2-135M-Instruct post-trained by every algorithm: the tables and figures of docs/smollm2.md.

    python experiments/smollm2.py out/smollm2
    python experiments/arithmetic.py out/arithmetic
    python experiments/smollm2_runs.py                  all, hours on two CPU cores
    python experiments/smollm2_runs.py --runs grpo      one of them, here with its three seeds

Runs that are already in out/smollm2_runs are not repeated. Two train at a time, on one thread each;
--jobs 12 trains twelve at a time, on a GPU.
The settings are those of the first try. The tables show questions that were in no file to train on.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import grpo  # noqa: E402
from common import load  # noqa: E402
from common.data import read_rows  # noqa: E402
from common.evaluate import evaluate  # noqa: E402
from common.tokenizer import encode_prompt  # noqa: E402
from compare import (interval, ktokens, plot_seeds, read_json, read_log, train,  # noqa: E402
                     write_json)
from evaluate import response_loss  # noqa: E402

OUT, BASE, ROWS = "out/smollm2_runs", "out/smollm2", "out/arithmetic"
GSM8K = "out/gsm8k_test.jsonl"    # its test file, if it is at hand: text that nothing trains on
SYSTEM = "Answer briefly."
COMMON = "--init out/smollm2 --gradient_checkpointing false"
QUESTIONS = f"{COMMON} --max_new_tokens 32 --data {ROWS}/train.jsonl --test {ROWS}/test.jsonl"
# longer, as responses that did not end are not ranked
COLLECTED = QUESTIONS.replace("--max_new_tokens 32", "--max_new_tokens 64")
STORIES = (f"{COMMON} --max_new_tokens 48 --data {ROWS}/stories.jsonl "
           f"--test {ROWS}/test_stories.jsonl")
HELD_OUT = "--eval_prompts 48 --eval_every 10"
GROUPS = f"{HELD_OUT} --prompts 8 --group_size 8 --minibatch 32 --warmup 3 --lr 2e-5"
PPO = f"{HELD_OUT} --prompts 64 --minibatch 32 --steps 20 --warmup 3 --lr 2e-5 --critic_lr 2e-5"
PAIRS = f"--data {OUT}/reward_0/preferences.jsonl --test {OUT}/reward_0/preferences_test.jsonl"

# name: seeds, command
RUNS = {
    "reward": (1, f"reward.py {COLLECTED} --prompts 800 --responses 8 --batch 16"),
    "grpo": (3, f"grpo.py {QUESTIONS} {GROUPS} --steps 40"),
    "sft": (1, f"sft.py {QUESTIONS} {HELD_OUT} --steps 48 --batch 16 --warmup 3 --lr 2e-5"),
    "dapo": (1, f"dapo.py {QUESTIONS} {GROUPS} --steps 40 --overlong_cache 8"),
    "dpo": (3, f"dpo.py {COMMON} {PAIRS} {HELD_OUT} --max_new_tokens 32 --batch 16 --warmup 3 "
               "--lr 5e-6"),
    "ppo_rule": (1, f"ppo.py {QUESTIONS} {PPO} --reward rule"),
    "ppo": (1, f"ppo.py {QUESTIONS} {PPO} --reward {OUT}/reward_0"),
    "dapo_stories": (3, f"dapo.py {STORIES} {GROUPS} --steps 12 --overlong_cache 8"),
    "grpo_stories": (3, f"grpo.py {STORIES} {GROUPS} --steps 30"),
}
COLUMNS = ["greedy", "accuracy", "pass@8", "eos_rate", "length", "kl_seq", "minus greedy",
           "other text", "ktokens", "minutes", "mem_gb"]


def folder(name, seed):
    return f"{OUT}/{name}_{seed}"


def run(name, seed, needed=()):
    """Train and measure one run, unless that has been done. needed: runs to wait for."""
    for future in needed:
        future.result()
    script, *flags = RUNS[name][1].split()
    train(script, folder(name, seed), *flags, "--system", SYSTEM, "--seed", str(seed),
          OMP_NUM_THREADS="1")
    if name != "reward" and not os.path.exists(f"{folder(name, seed)}/result.json"):
        command = [sys.executable, __file__, "--measure", name, str(seed)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{folder(name, seed)} is done", flush=True)


def read_prompts(path, tokenizer):
    rows = read_rows(path, "prompt")
    return [row | {"ids": encode_prompt(tokenizer, row)} for row in rows]


def measure(path, seed, stories):
    """Metrics of a policy on all test questions, on subtractions, and on GSM8K's solutions where
    they are at hand."""
    model, tokenizer = load(path, system=SYSTEM)
    base, _ = load(BASE)
    name = "test_stories" if stories else "test"
    cfg = grpo.Config(seed=seed, max_new_tokens=48 if stories else 32)
    rows = read_prompts(f"{ROWS}/{name}.jsonl", tokenizer)
    result, texts = evaluate(model, tokenizer, rows, grpo.score, cfg, 8, reference=base)
    minus, minus_texts = evaluate(
        model, tokenizer, read_prompts(f"{ROWS}/test_minus.jsonl", tokenizer), grpo.score, cfg)
    result["minus greedy"] = minus["greedy"]
    if os.path.exists(GSM8K):
        result["other text"] = response_loss(model, tokenizer, GSM8K)
    with open(f"{path}/responses.txt", "w", encoding="utf-8") as f:
        for row, text in zip(rows, texts):
            f.write(f"{row['prompt']!r} -> {text!r}\n")
        for text in minus_texts[:20]:
            f.write(f"minus: {text!r}\n")
    return result


def measure_run(name, seed):
    result = measure(folder(name, seed), seed, "stories" in name)
    rows = read_log(folder(name, seed))
    result["ktokens"] = ktokens(rows)
    result["mem_gb"] = rows[-1]["mem_gb"]
    result["minutes"] = read_json(f"{folder(name, seed)}/seconds.json")["seconds"] / 60
    write_json(f"{folder(name, seed)}/result.json", result)


def print_table(names):
    print("    " + "".join(f"{name:>16}" for name in ["", *COLUMNS]))
    for name in names:
        results = [read_json(f"{folder(name, seed)}/result.json") for seed in range(RUNS[name][0])]
        cells = ""
        for column in COLUMNS:
            values = [result[column] for result in results if column in result]
            cell = ""
            if values:
                cell = interval(values) if len(values) > 1 else f"{values[0]:.3f}"
            cells += f"{cell:>16}"
        print(f"    {name:16}{cells}")


def minutes(rows):
    """Minutes of rollouts and updates up to the last of these rows of a log."""
    return sum(row.get("gen_s", 0) + row.get("upd_s", 0) for row in rows) / 60


def draw(path, panels):
    """A figure of panels (xlabel, ylabel, x, curves), a curve being (run, metric, label)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    size = (4.6 * len(panels), 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (xlabel, ylabel, x, curves) in zip(axes, panels):
        for i, (name, metric, label) in enumerate(curves):
            logs = [read_log(folder(name, seed)) for seed in range(RUNS[name][0])]
            plot_seeds(axis, logs, metric, x, color=f"C{i}", label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.legend()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_figures():
    draw("assets/smollm2.png", [
        ("minutes on one core", "GRPO: share right", minutes,
         [("grpo", "accuracy", "training questions"), ("grpo", "val_accuracy", "held out, T = 1"),
          ("grpo", "val_greedy", "held out, greedy")]),
        ("thousand tokens generated", "stories: share right in a rollout", ktokens,
         [("grpo_stories", "accuracy", "GRPO"), ("dapo_stories", "accuracy", "DAPO")])])


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, 6 to 9 GB each")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, seed = args.measure
        return measure_run(name, int(seed))
    names = [name for name in RUNS if name in args.runs]
    if {"dpo", "ppo"} & set(names) and "reward" not in names:
        names.insert(0, "reward")
    futures = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for name in names:
            needed = [futures["reward", 0]] if name in ("dpo", "ppo") else []
            for seed in range(RUNS[name][0]):
                futures[name, seed] = pool.submit(run, name, seed, needed)
    for future in futures.values():
        future.result()
    print_table([name for name in names if name != "reward"])
    if names == list(RUNS):
        draw_figures()


if __name__ == "__main__":
    main()
