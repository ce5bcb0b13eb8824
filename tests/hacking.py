"""
Reward hacking and over-optimisation, to be seen (Gao et al. 2022, arXiv 2210.10760): the README's second figure.

    python tests/hacking.py             three seeds, about a quarter of an hour -> out/hacking, assets/hacking.png
    python tests/hacking.py --seeds 1

PPO optimises reward models, and the rule, which none of them knows, keeps the true score:

    weak      a reward model of 200 prompts, three in ten of them ranked upside down; with no price on leaving the SFT model
              and with the default price
    accurate  reward.py's default, without a price and with the default price
    long      of 3,000 prompts, and of people to whom one more token is worth as much as being right; at the default price
    short     the same of people to whom it is worth as much as being wrong

Everything is measured on validation prompts, an answer each at temperature 1: score, accuracy and length, and the KL to the
SFT model, in nats an answer. Runs that are already there are not done again; compare.py shares its SFT and reward models.
"""
import argparse
import json
import os

from compare import interval, train

RUNS = {"weak, β = 0": ("weak", "0"), "weak, β = .3": ("weak", "0.3"), "accurate, β = 0": ("accurate", "0"),
        "accurate, β = .3": ("accurate", "0.3"), "long, β = .3": ("long", "0.3"), "short, β = .3": ("short", "0.3")}
PEOPLE = {"accurate": [], "weak": ["--prompts", "200", "--flip", "0.3"], "long": ["--prompts", "3000", "--length_taste", "1"],
          "short": ["--prompts", "3000", "--length_taste", "-1"]}


def read(folder):
    with open(f"{folder}/metrics.jsonl") as f:
        return [row for row in map(json.loads, f) if "val_acc" in row]


def one(seed):
    """Reward models -> what they are worth; runs -> their validation metrics."""
    sft, judges, worth = f"out/compare/sft_{seed}", {"accurate": f"out/compare/reward_{seed}"}, {}
    train("sft.py", sft, "--seed", str(seed))
    for name, people in PEOPLE.items():
        judges.setdefault(name, f"out/hacking/reward_{name}_{seed}")
        train("reward.py", judges[name], "--seed", str(seed), "--init", sft, *people)
        worth[name] = read(judges[name])[-1]
    runs = {}
    for name, (judge, beta) in RUNS.items():
        folder = f"out/hacking/{judge}_{beta}_{seed}"
        train("ppo.py", folder, "--seed", str(seed), "--init", sft, "--reward", judges[judge], "--kl_beta", beta, "--eval_every", "2", "--guard", "false")
        runs[name] = read(folder)
    return worth, runs


def figure(seeds, path):
    """Proxy and gold against sqrt(KL); length against rollouts for three tastes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colour = dict(zip(RUNS, ("tab:red", "tab:green", "tab:orange", "tab:gray", "tab:purple", "tab:brown")))
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for runs in seeds:
        for name, rows in runs.items():
            label = name if runs is seeds[0] else None
            if name in ("weak, β = 0", "weak, β = .3", "accurate, β = 0"):
                distance = [max(0.0, row["val_kl"]) ** 0.5 for row in rows]
                start, spread = rows[0]["val_score"], max(row["val_score"] for row in rows) - rows[0]["val_score"]
                axes[0].plot(distance, [(row["val_score"] - start) / spread for row in rows], color=colour[name], lw=1, label=label)
                axes[1].plot(distance, [row["val_acc"] for row in rows], color=colour[name], lw=1, label=label)
            else:
                axes[2].plot([row["step"] for row in rows], [row["val_length"] for row in rows], color=colour[name], lw=1, label=label)
    for axis, title, x in zip(axes, ("proxy: score, 0 at the start and 1 at its highest", "gold: accuracy", "answer length, tokens"),
                              ("sqrt(KL to the SFT model)", "sqrt(KL to the SFT model)", "PPO rollouts")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x)
        axis.legend(fontsize=8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    worths, seeds = zip(*[one(seed) for seed in range(parser.parse_args().seeds)])
    for name in worths[0]:
        print(f"reward model {name}: " + ", ".join(f"{key} {interval([worth[name]['val_' + key] for worth in worths])}" for key in ("acc", "gold", "corr", "longer")))
    for name in RUNS:
        best = [max(runs[name], key=lambda row: row["val_acc"]) for runs in seeds]
        for when, rows in (("start", [runs[name][0] for runs in seeds]), ("best", best), ("end", [runs[name][-1] for runs in seeds])):
            print(f"{name:14} {when:5} " + " | ".join(f"{key} {interval([row.get('val_' + key, 0.0) for row in rows])}" for key in ("score", "acc", "kl", "length")))
    figure(seeds, "assets/hacking.png")


if __name__ == "__main__":
    main()
