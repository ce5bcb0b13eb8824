"""
The README's table and figure: every algorithm from the same SFT checkpoints over several seeds, on the 1,000 test prompts.

    python tests/compare.py             five seeds, about half an hour on two CPU cores -> out/compare, assets/grpo.png
    python tests/compare.py --seeds 1

Runs that are already in out/compare are not done again. Settings were chosen on the validation prompts; this reports on the test prompts.
"""
import argparse
import json
import os
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import reward  # noqa: E402
from grpo import score  # noqa: E402
from model import answers, evaluate, load, read_preferences, split, sums  # noqa: E402

ALGORITHMS = {"grpo": ("grpo.py", []), "ppo": ("ppo.py", []), "ppo_rule": ("ppo.py", ["--reward", "rule"])}

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}     # Student's t, two-sided 95%, by number of seeds


def train(script, out, *more):
    """Run a script into `out` unless it has already finished there; wall and CPU seconds are kept beside the run."""
    if not os.path.exists(f"{out}/seconds.json"):
        t, c = time.perf_counter(), sum(os.times()[2:4])
        subprocess.run([sys.executable, f"{ROOT}/{script}", "--out", out, *more], check=True, stdout=subprocess.DEVNULL)
        with open(f"{out}/seconds.json", "w") as f:
            json.dump({"wall_s": time.perf_counter() - t, "cpu_s": sum(os.times()[2:4]) - c}, f)
    with open(f"{out}/seconds.json") as f:
        return json.load(f)


def careful(model, tokenizer, rows):
    """share: of T=1 answers that show their working; right: of those, how many are right; forced: greedy accuracy where the answer is
    made to begin with a running total instead of '#'."""
    generator = torch.Generator().manual_seed(1)
    tokens, mask, _ = model.generate([r["ids"] for r in rows], 4, 24, generator=generator)
    texts = answers(tokenizer, tokens, mask, model.cfg.stop)
    shown = [(rows[i // 4], t) for i, t in enumerate(texts) if t and "," in t]
    right = sum(score(row, t) for row, t in shown) / len(shown)
    starts = [tokenizer.encode_single_token(d) for d in "01"]             # the first total is 02 to 18
    last = torch.tensor([len(r["ids"]) - 1 for r in rows])
    T = int(last.max()) + 1
    tokens = torch.tensor([r["ids"] + [0] * (T - len(r["ids"])) for r in rows])
    with torch.no_grad():
        logits = model(tokens)[torch.arange(len(rows)), last] @ model.unembedding[starts].T
    begun = [r["ids"] + [starts[i]] for r, i in zip(rows, logits.argmax(1).tolist())]
    tokens, mask, _ = model.generate(begun, 1, 24, temperature=0)
    rest = answers(tokenizer, tokens, mask, model.cfg.stop)
    forced = sum(t is not None and score(r, "0" + t) for r, t in zip(rows, rest)) / len(rows)
    return {"shows its working": len(shown) / len(texts), "right when it does": right, "greedy, made to begin with a total": forced}


def on_test_pairs(folder):
    """What reward.py's report says of the reward model in `folder`, on the pairs of test prompts that it kept there."""
    model, tokenizer = load(folder)
    _, _, test = split(read_preferences(f"{folder}/preferences.jsonl"))
    return reward.assess(model, reward.ready(test, tokenizer, model.trunk.cfg.context), reward.Config(), torch.device("cpu"))[0]


def interval(values):
    """mean ± half of the 95% interval over seeds."""
    x = torch.tensor(values, dtype=torch.float64)
    half = T95.get(len(x), 1.96) * x.std().item() / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return f"{x.mean():.3f} ± {half:.3f}"


def figure(folders, path):
    """Validation accuracy and answer length against the step, every seed thin and the mean thick."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = []
    for folder in folders:
        with open(f"{folder}/metrics.jsonl") as f:
            runs.append([json.loads(line) for line in f])
    fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, names in zip(axes, (("val_greedy", "val_acc"), ("val_length",))):
        for name, colour in zip(names, ("tab:blue", "tab:orange")):
            curves = [[(row["step"], row[name]) for row in run if name in row] for run in runs]
            for curve in curves:
                axis.plot(*zip(*curve), color=colour, alpha=0.25, lw=1)
            mean = [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*curves)]
            axis.plot(*zip(*mean), color=colour, lw=2, label={"val_greedy": "accuracy, greedy", "val_acc": "accuracy, T = 1",
                                                             "val_length": "answer length, tokens"}[name])
        axis.set_xlabel("GRPO rollouts")
        axis.legend()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    seeds = range(parser.parse_args().seeds)
    measured, worth = {name: [] for name in ("sft", *ALGORITHMS)}, []
    for seed in seeds:
        sft, judge = f"out/compare/sft_{seed}", f"out/compare/reward_{seed}"
        from_sft = ["--seed", str(seed), "--init", sft]
        seconds = {"sft": train("sft.py", sft, "--seed", str(seed))}
        spent = train("reward.py", judge, *from_sft)
        worth.append(on_test_pairs(judge) | spent)
        for name, (script, more) in ALGORITHMS.items():
            seconds[name] = train(script, f"out/compare/{name}_{seed}", *from_sft, *more, *(["--reward", judge] if name == "ppo" else []))
        for name in measured:
            model, tokenizer = load(f"out/compare/{name}_{seed}")
            test = [row | {"ids": tokenizer.encode_ordinary(row["prompt"])} for row in sums(1_000, "test")]
            found, _ = evaluate(model, tokenizer, test, score, 24)
            measured[name].append(found | careful(model, tokenizer, test) | seconds[name])
            print(seed, name, {k: round(v, 3) for k, v in measured[name][-1].items()}, flush=True)
    measured["reward model"] = worth
    for name, rows in measured.items():
        print(f"\n{name}, {len(rows)} seeds, 1,000 test prompts")
        for key in rows[0]:
            values = [row[key] for row in rows]
            print(f"    {key:36} {interval(values)}    {min(values):.3f} to {max(values):.3f}")
    figure([f"out/compare/grpo_{seed}" for seed in seeds], "assets/grpo.png")


if __name__ == "__main__":
    main()
