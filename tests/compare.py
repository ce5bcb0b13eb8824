"""
The README's tables and figures: every algorithm and its relatives from the same SFT checkpoints over several seeds, on the 1,000 test prompts.

    python tests/compare.py             five seeds, three hours or so on two CPU cores -> out/compare, assets/
    python tests/compare.py --seeds 1 --tables algorithms

Runs that are already in out/compare are not done again; --jobs 2 does two at a time on one thread each. Settings were chosen on the
validation prompts; this reports on the test prompts.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import reward  # noqa: E402
from grpo import score  # noqa: E402
from model import answers, evaluate, frozen_logp, load, read_preferences, split, sums  # noqa: E402

FROM_PAIRS = "--data out/compare/reward_{seed}/preferences.jsonl"
FRESH = "--prompts 8 --steps 200 --warmup 12 --eval_every 40"            # as many answers and updates, each from the current policy
BARE = "--clip_high 0.2 --tries 1 --overlong_cache 0"                     # dapo.py without three of its changes
RUNS = {                                                                  # name: command, to which seed, init and out are added
    "sft": "sft.py",
    "reward": "reward.py",
    "dpo": f"dpo.py {FROM_PAIRS}",
    "ppo": "ppo.py --reward out/compare/reward_{seed}",
    "ppo_rule": "ppo.py --reward rule",
    "grpo": "grpo.py",
    "dapo": "dapo.py",
    "dpo_plain": f"dpo.py --nll 0 {FROM_PAIRS}",
    "dpo_slow": f"dpo.py --nll 0 --lr 2e-5 {FROM_PAIRS}",
    "ipo": f"tests/relatives.py ipo --lr 2e-5 {FROM_PAIRS}",
    "chosen": f"dpo.py --beta 0 {FROM_PAIRS}",                            # what is left is SFT on the chosen answers
    "reinforce": "tests/relatives.py reinforce --guard false",
    "baseline": "tests/relatives.py baseline --guard false",
    "rloo": "tests/relatives.py rloo --guard false",
    "drgrpo": "tests/relatives.py drgrpo --guard false",
    "gspo": "tests/relatives.py gspo --clip_eps 0.02",
    "reinforce_fresh": f"tests/relatives.py reinforce {FRESH}",
    "baseline_fresh": f"tests/relatives.py baseline {FRESH}",
    "rloo_fresh": f"tests/relatives.py rloo {FRESH}",
    "drgrpo_fresh": f"tests/relatives.py drgrpo {FRESH}",
    "free_fresh": f"grpo.py --kl_beta 0 {FRESH}",
    "grpo_free": "grpo.py --kl_beta 0",
    "token_mean": f"dapo.py {BARE}",
    "clip_higher": "dapo.py --tries 1 --overlong_cache 0",
    "overlong": "dapo.py --tries 1",
    "wide": "grpo.py --kl_beta 0 --prompts 128 --minibatch 256",          # about as many answers as dapo.py samples, and all are learned from
    "group_2": "grpo.py --group 2 --prompts 128",
    "group_32": "grpo.py --group 32 --prompts 8",
    "one_update": "grpo.py --minibatch 256",
    "four_epochs": "grpo.py --epochs 4",
    "constant": "tests/relatives.py constant",
}
TABLES = {
    "algorithms": ["sft", "dpo", "ppo", "ppo_rule", "grpo", "dapo"],
    "dapo": ["grpo_free", "token_mean", "clip_higher", "overlong", "dapo"],
    "dpo": ["dpo", "dpo_plain", "dpo_slow", "ipo", "chosen"],
    "chain": ["reinforce", "baseline", "rloo", "drgrpo", "grpo_free", "gspo", "grpo"],
    "fresh": ["reinforce_fresh", "baseline_fresh", "rloo_fresh", "drgrpo_fresh", "free_fresh"],
    "ablations": ["grpo", "grpo_free", "group_2", "group_32", "one_update", "four_epochs", "constant", "token_mean", "wide", "dapo"],
}
MODELS = {"sft": (1, 1), "dpo": (1, 1), "ppo": (4, 2), "ppo_rule": (3, 2), "grpo": (2, 1), "dapo": (1, 1)}      # in memory, and of them trained

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}     # Student's t, two-sided 95%, by number of seeds


def folder(name, seed):
    return f"out/compare/{name}_{seed}"


def log(name, seed):
    with open(f"{folder(name, seed)}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def ktokens(rows):
    """Thousands of answer tokens that were sampled up to the last of these lines of a log."""
    return sum(row.get("tokens", 0) for row in rows) / 1000


def train(script, out, *more, **env):
    """Run a script into `out` unless it has already finished there; the seconds that it took are kept beside the run."""
    if not os.path.exists(f"{out}/seconds.json"):
        t = time.perf_counter()
        subprocess.run([sys.executable, os.path.join(ROOT, script), *more, "--out", out], check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
        with open(f"{out}/seconds.json", "w") as f:
            json.dump({"seconds": time.perf_counter() - t}, f)


def run(name, seed, threads):
    """Train into out/compare unless it is there; how it does on the test prompts and what it cost is kept beside the run."""
    out, (script, *flags) = folder(name, seed), RUNS[name].format(seed=seed).split()
    train(script, out, *flags, "--seed", str(seed), *([] if name == "sft" else ["--init", folder("sft", seed)]), **threads)
    if not os.path.exists(f"{out}/result.json"):
        subprocess.run([sys.executable, __file__, "--measure", name, str(seed)], check=True, env=os.environ | threads)
    with open(f"{out}/result.json") as f:
        found = json.load(f)
    print(seed, name, {k: round(v, 3) for k, v in found.items()}, flush=True)
    return found


def measure(name, seed):
    """Accuracy, KL to the SFT model, length, working and cost of one run, written into its folder."""
    out = folder(name, seed)
    if name == "reward":
        found = on_test_pairs(out)
    else:
        (model, tokenizer), (sft, _) = load(out), load(folder("sft", seed))
        test = [row | {"ids": tokenizer.encode_ordinary(row["prompt"])} for row in sums(1_000, "test")]

        def watch(rows, tokens, mask, texts):
            """k1 to the SFT model, nats an answer; length of wrong answers, as a sum and a share."""
            logp, ref_logp = (frozen_logp(x, tokens, mask, 1.0, 0)[0] for x in (model, sft))
            wrong = torch.tensor([float(not (text and score(row, text))) for row, text in zip(rows, texts)])
            return {"kl": (logp - ref_logp).sum(1), "wrong_tokens": wrong * mask.sum(1), "wrong": wrong}

        found, texts = evaluate(model, tokenizer, test, score, 24, watch=watch)
        right = torch.tensor([float(bool(text and score(row, text))) for row, text in zip(test, texts)])
        round_sum = torch.tensor([int(row["two_digits"]) % 5 == 0 for row in test])          # what the hasty guess at
        found |= {"greedy, sums in fives": right[round_sum].mean().item(), "greedy, other sums": right[~round_sum].mean().item()}
        found["length_wrong"] = found.pop("wrong_tokens") / max(found.pop("wrong"), 1e-9)
        rows = log(name, seed)
        found |= careful(model, tokenizer, test) | {"ktokens": ktokens(rows), "mem_gb": rows[-1]["mem_gb"]}
        if "reward_{seed}" in RUNS[name]:                                 # the answers that were compared were generated too
            with open(f"{folder('sft', seed)}/result.json") as f:
                found["ktokens"] += reward.Config.prompts * reward.Config.answers * json.load(f)["length"] / 1000
    with open(f"{out}/seconds.json") as f:
        found |= json.load(f)
    with open(f"{out}/result.json", "w") as f:
        json.dump(found, f)


def careful(model, tokenizer, rows):
    """share: of T=1 answers that show their working; right: of those, how many are right; forced: greedy accuracy where the answer is
    made to begin with a running total instead of '#'."""
    generator = torch.Generator().manual_seed(1)
    tokens, mask, _ = model.generate([r["ids"] for r in rows], 4, 24, generator=generator)
    texts = answers(tokenizer, tokens, mask, model.cfg.stop)
    shown = [(rows[i // 4], t) for i, t in enumerate(texts) if t and "," in t]
    right = sum(score(row, t) for row, t in shown) / max(1, len(shown))
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


def panel(axis, runs, name, x, **style):
    """One metric of several seeds against x(rows so far), every seed thin and the mean thick."""
    curves = [[(x(rows[:i + 1]), row[name]) for i, row in enumerate(rows) if name in row] for rows in runs]
    for curve in curves:
        axis.plot(*zip(*curve), alpha=0.2, lw=1, color=style["color"])
    mean = [[sum(values) / len(values) for values in zip(*points)] for points in zip(*curves)]
    axis.plot(*zip(*mean), lw=2, **style)


def figures(tables, seeds):
    """assets/grpo.png: accuracy and length rise together. assets/compare.png: all algorithms against optimiser steps and against generated
    tokens. assets/dpo.png: plain DPO beyond its best step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    os.makedirs("assets", exist_ok=True)
    step = lambda rows: rows[-1]["step"]
    updates = lambda each: lambda rows: step(rows) * each

    def draw(path, *panels):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained")
        for axis, (xlabel, ylabel, curves) in zip(axes, panels):
            for i, (name, metric, x, label) in enumerate(curves):
                panel(axis, [log(name, seed) for seed in seeds], metric, x, color=f"C{i}", label=label)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.legend()
        figure.savefig(path, dpi=120)

    if "algorithms" in tables:
        draw("assets/grpo.png",
             ("GRPO rollouts", "accuracy", [("grpo", "val_greedy", step, "greedy"), ("grpo", "val_acc", step, "T = 1")]),
             ("GRPO rollouts", "answer length, tokens", [("grpo", "val_length", step, "answer length")]))
        each = {"ppo": 8, "grpo": 4, "dapo": 4, "dpo": 1}                 # optimiser steps a line of the log
        draw("assets/compare.png",
             *[("optimiser steps", ylabel, [(name, metric, updates(n), name) for name, n in each.items()])
               for metric, ylabel in (("val_greedy", "accuracy, greedy"), ("val_acc", "accuracy, T = 1"))],
             ("thousand tokens generated in training", "accuracy, T = 1", [(name, "val_acc", ktokens, name) for name in each if name != "dpo"]))
    if "dpo" in tables:
        several = [("dpo", "default"), ("dpo_plain", "plain"), ("dpo_slow", "plain, a fifth of the rate")]
        draw("assets/dpo.png", *[("DPO steps", ylabel, [(name, metric, step, label) for name, label in several])
                                 for metric, ylabel in (("val_greedy", "accuracy, greedy"), ("val_acc", "accuracy, T = 1"),
                                                        ("val_logp_w", "log π(chosen), nats"), ("val_margin", "margin β h of held-out pairs"))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES), help="which comparisons")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than one run on one thread each")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], int(args.measure[1]))
    seeds, threads = range(args.seeds), {} if args.jobs == 1 else {"OMP_NUM_THREADS": "1"}
    names, of = list(dict.fromkeys(name for table in args.tables for name in TABLES[table] if name != "sft")), {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for wave in (["sft"], ["reward"], names):                         # each needs those before it
            jobs = [(name, seed) for name in wave for seed in seeds]
            for (name, _), found in zip(jobs, pool.map(lambda job: run(*job, threads), jobs)):
                of.setdefault(name, []).append(found)
    for table in args.tables:
        print(f"\n{table}: {args.seeds} seeds, 1,000 test prompts, mean ± half of the 95% interval over seeds")
        columns = ["greedy", "acc", "pass@8", "kl", "length", "length_wrong", "end", "ktokens", "seconds", "mem_gb"]
        print(f"    {'':16}" + "".join(f"{column:>18}" for column in columns) + "   acc, change from the row above, by seed")
        for above, name in zip([None, *TABLES[table]], TABLES[table]):
            change = interval([b["acc"] - a["acc"] for a, b in zip(of[above], of[name])]) if above else ""
            print(f"    {name:16}" + "".join(f"{interval([found[column] for found in of[name]]):>18}" for column in columns) + f"   {change}")
        for name in TABLES[table] if table == "algorithms" else []:       # a trained one has gradients and two moments besides
            models, trained = MODELS[name]
            print(f"    {name:16} {models} models in memory, {trained} trained: {models + 3 * trained} times the size of the weights")
    for name in ("sft", "reward", *(TABLES["dpo"] if "dpo" in args.tables else ["grpo"])):
        for key in of.get(name, [{}])[0]:
            values = [found[key] for found in of[name]]
            print(f"    {name:8} {key:36} {interval(values)}    {min(values):.3f} to {max(values):.3f}")
    figures(args.tables, seeds)


if __name__ == "__main__":
    main()
