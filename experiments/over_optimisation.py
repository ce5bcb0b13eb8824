"""
Over-optimisation of a reward model (Gao et al. 2022, arXiv 2210.10760).

    python experiments/over_optimisation.py      three seeds, about a quarter of an hour
                                                 -> out/over_optimisation, assets/
    python experiments/over_optimisation.py --seeds 1

PPO optimises reward models; the rule, which none of them sees, is the gold score:

    weak      a reward model of 200 prompts, with the ranking of three in ten inverted; without KL
              penalty and with the default one
    accurate  reward.py's default; without KL penalty and with the default one
    long      of 3,000 prompts, by annotators whose bonus per token is what being right is worth;
              default KL penalty
    short     the same with a penalty per token of that size

Best-of-n of the SFT model, n = 1 to 64, is drawn beside PPO, by the weak and by the accurate reward
model (best_of_n.py): it maximises the same score without training.

PPO is measured on one response to each validation prompt at temperature 1: score, accuracy, length,
and the KL to the SFT model in nats per response; best-of-n on 64. Early stopping is off. Runs that
are already in out/over_optimisation are not repeated; SFT and reward models are shared with
compare.py.
"""
import argparse
import math
import os

import best_of_n
import grpo
from common import load
from common.data import running_sums, tokenize_prompts
from compare import interval, read_json, read_log, train, write_json

# reward model: flags of reward.py
REWARD_MODELS = {
    "accurate": [],
    "weak": ["--prompts", "200", "--label_noise", "0.3"],
    "long": ["--prompts", "3000", "--length_bias", "1"],
    "short": ["--prompts", "3000", "--length_bias", "-1"],
}
# run: reward model, --kl_beta, colour
RUNS = {
    "weak, β = 0": ("weak", "0", "tab:red"),
    "weak, β = .3": ("weak", "0.3", "tab:green"),
    "accurate, β = 0": ("accurate", "0", "tab:orange"),
    "accurate, β = .3": ("accurate", "0.3", "tab:gray"),
    "long, β = .3": ("long", "0.3", "tab:purple"),
    "short, β = .3": ("short", "0.3", "tab:brown"),
}
BEST_OF_N = {"weak": "tab:pink", "accurate": "tab:olive"}           # reward model, colour
AGAINST_KL = ("weak, β = 0", "weak, β = .3", "accurate, β = 0")     # the others: length by rollout


def read_evaluations(folder, metric):
    """The rows of a run's log that have a metric of the evaluation."""
    return [row for row in read_log(folder) if metric in row]


def best_of_n_curve(sft, reward_folder, path):
    """The rows of best_of_n.curve on the validation prompts; kept in a file."""
    if not os.path.exists(path):
        policy, tokenizer = load(sft)
        reward_model, _ = load(reward_folder)
        rows = tokenize_prompts(running_sums(500, "val"), tokenizer, grpo.Config.max_new_tokens,
                                policy.cfg.block_size)
        score, right = best_of_n.sample_and_score(policy, tokenizer, reward_model, rows, 64,
                                                  grpo.Config.max_new_tokens, 0)
        write_json(path, best_of_n.curve(score, right))
    return read_json(path)


def run_seed(seed):
    """Train all of one seed -> {reward model: its last evaluation}, {run: its evaluations},
    {reward model: its best-of-n curve}."""
    sft = f"out/compare/sft_{seed}"
    common = ["--seed", str(seed), "--init", sft]
    train("sft.py", sft, "--seed", str(seed))
    reward_folder, quality = {}, {}
    for name, flags in REWARD_MODELS.items():
        folder = f"out/over_optimisation/reward_{name}_{seed}"
        if name == "accurate":
            folder = f"out/compare/reward_{seed}"
        train("reward.py", folder, *common, *flags)
        reward_folder[name] = folder
        quality[name] = read_evaluations(folder, "val_acc")[-1]
    runs = {}
    for name, (reward_model, beta, _) in RUNS.items():
        folder = f"out/over_optimisation/{reward_model}_{beta}_{seed}"
        train("ppo.py", folder, *common, "--reward", reward_folder[reward_model], "--kl_beta", beta,
              "--eval_every", "2", "--early_stopping", "false")
        runs[name] = read_evaluations(folder, "val_accuracy")
    curves = {}
    for name in BEST_OF_N:
        path = f"out/over_optimisation/best_of_n_{name}_{seed}.json"
        curves[name] = best_of_n_curve(sft, reward_folder[name], path)
    return quality, runs, curves


def column(rows, metric):
    return [row.get("val_" + metric, 0.0) for row in rows]


def print_intervals(title, rows, *metrics):
    """Mean and interval over seeds of these metrics; rows: one per seed."""
    cells = [f"{metric} {interval(column(rows, metric))}" for metric in metrics]
    print(f"{title} " + " | ".join(cells))


def print_run(name, seeds):
    """Start, best accuracy and end of a run, over seeds."""
    moments = {"start": [], "best": [], "end": []}
    for runs in seeds:
        rows = runs[name]
        accuracy = column(rows, "accuracy")
        moments["start"].append(rows[0])
        moments["best"].append(rows[accuracy.index(max(accuracy))])
        moments["end"].append(rows[-1])
    for moment, rows in moments.items():
        print_intervals(f"{name:16} {moment:5}", rows, "score", "accuracy", "kl_seq", "length")


def print_best_of_n(name, curves):
    """A line for each n, over seeds."""
    for rows in zip(*(of_seed[name] for of_seed in curves)):
        cells = [f"{metric} {interval([row[metric] for row in rows])}"
                 for metric in ("score", "accuracy", "pass@n")]
        print(f"best of {rows[0]['n']:2}, {name}: KL {rows[0]['kl']:.2f} | " + " | ".join(cells))


def draw(seeds, curves, path):
    """Proxy and gold against sqrt(KL); length against rollouts. seeds: the runs of each; curves:
    its best-of-n curves."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    proxy, gold, length = axes
    for i, runs in enumerate(seeds):
        for name, rows in runs.items():
            style = {"color": RUNS[name][2], "lw": 1, "label": None if i else name}
            if name in AGAINST_KL:
                distance = [math.sqrt(max(0.0, kl)) for kl in column(rows, "kl_seq")]
                score = column(rows, "score")
                rise = max(score) - score[0] or 1.0
                proxy.plot(distance, [(x - score[0]) / rise for x in score], **style)
                gold.plot(distance, column(rows, "accuracy"), **style)
            else:
                length.plot([row["step"] for row in rows], column(rows, "length"), **style)
        for name, rows in curves[i].items():
            style = {"color": BEST_OF_N[name], "lw": 1, "ls": "--",
                     "label": None if i else f"best of n, {name}"}
            distance = [math.sqrt(row["kl"]) for row in rows]
            score = column(runs[f"{name}, β = 0"], "score")     # in the unit of PPO's curve
            rise = max(score) - score[0] or 1.0
            proxy.plot(distance, [(row["score"] - score[0]) / rise for row in rows], **style)
            gold.plot(distance, [row["accuracy"] for row in rows], **style)
    proxy.set_title("proxy: score, 0 at the start and 1 at its highest", fontsize=10)
    gold.set_title("gold: accuracy", fontsize=10)
    length.set_title("response length, tokens", fontsize=10)
    proxy.set_xlabel("sqrt(KL to the SFT model)")
    gold.set_xlabel("sqrt(KL to the SFT model)")
    length.set_xlabel("PPO rollouts")
    for axis in axes:
        axis.legend(fontsize=8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    args = parser.parse_args()
    qualities, seeds, curves = [], [], []
    for seed in range(args.seeds):
        quality, runs, curves_of_seed = run_seed(seed)
        qualities.append(quality)
        seeds.append(runs)
        curves.append(curves_of_seed)
    for name in REWARD_MODELS:
        rows = [quality[name] for quality in qualities]
        print_intervals(f"reward model {name:8}", rows, "acc", "acc_vs_rule", "length_corr",
                        "acc_longer")
    for name in RUNS:
        print_run(name, seeds)
    for name in BEST_OF_N:
        print_best_of_n(name, curves)
    draw(seeds, curves, "assets/over_optimisation.png")


if __name__ == "__main__":
    main()
