"""
What six bugs of the zoo do to learning: assets/train_with_bugs.png.

    python experiments/train_with_bugs.py      three seeds, 45 minutes on two CPU cores -> out/bugs
    python experiments/train_with_bugs.py --seeds 1 --bugs no_shift inverted_clip \\
        --flags "--steps 4 --eval_every 2" --figure out/try.png

Each bug is put into a copy of the code (tests/bug_zoo.py has its line, and the test that finds it),
which then trains as RUNS says; our own code trains in the same way, from the same seed and SFT
checkpoint. No bug of these touches the rule, the sampler or the evaluation, so both are measured
alike. Five show in the curves; the sixth, an inverted clip that was copied six times, does not, and
only a test finds it. Early stopping is off. Runs that are already there are not repeated; the SFT
checkpoints are shared with compare.py.
"""
import argparse
import os
import sys

from compare import ROOT, last_step, plot_seeds, read_log, train

sys.path.insert(0, os.path.join(ROOT, "tests"))
from bug_zoo import BUGS, copied, infected  # noqa: E402

SFT = "sft.py --steps 400 --eval_every 40"
# bug: how to train, the metric to show beside accuracy, and its label
RUNS = {
    "no_shift": (SFT, "nll", "training loss, nats per token"),
    "end_token_untrained": (SFT, "val_length", "response length, tokens"),
    "ranking_upside_down": ("reward.py", "loss", "training loss, nats per pair"),
    "rewards_of_other_prompts": ("grpo.py --eval_every 5", "reward", "reward in training"),
    "kl_penalty_with_the_wrong_sign": ("grpo.py --eval_every 5", "kl",
                                       "KL to the SFT model, nats per token"),
    "inverted_clip": ("grpo.py --eval_every 5 --epochs 4", "kl",
                      "KL to the SFT model, nats per token"),
}


def accuracy_of(command):
    """Name of the accuracy in the log, and its label."""
    if command.startswith("reward.py"):
        return "val_acc", "held-out accuracy, pairs"
    return "val_accuracy", "held-out accuracy, T = 1"


def train_in(code, command, name, seed):
    """The log of a run of the code in a folder, which is trained unless it is there."""
    script, *flags = command.split()
    settings = "_".join(command.split()).replace("--", "")
    out = f"out/bugs/{name}{settings}_{seed}"
    if script != "sft.py":
        flags += ["--init", f"out/compare/sft_{seed}"]
    flags += ["--seed", str(seed), "--early_stopping", "false"]
    train(os.path.join(os.path.abspath(code), script), out, *flags, PYTHONDONTWRITEBYTECODE="1")
    return read_log(out)


def last_value(rows, metric):
    return [row[metric] for row in rows if metric in row][-1]


def draw(runs, path):
    """Held-out accuracy above, the other metric below. runs: {bug: our logs, logs with the bug}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, len(runs), figsize=(3.1 * len(runs), 5.2), layout="constrained",
                                squeeze=False)
    for i, (name, (ours, theirs)) in enumerate(runs.items()):
        command, metric, label = RUNS[name]
        above, below = axes[:, i]
        for axis, shown, ylabel in ((above, *accuracy_of(command)), (below, metric, label)):
            plot_seeds(axis, ours, shown, last_step, color="tab:gray", label="our code")
            plot_seeds(axis, theirs, shown, last_step, color="tab:red", label="with the bug")
            axis.set(xlabel=f"{command.split()[0]}, steps", ylabel=ylabel)
        above.set_title(name.replace("_", " "), fontsize=10)
        above.set_ylim(0, 1)
        if metric in ("nll", "kl"):
            below.set_yscale("log")
    axes[0, 0].legend(fontsize=8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--bugs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--flags", default="", help="more flags for every run, for a quick look")
    parser.add_argument("--figure", default="assets/train_with_bugs.png", help="where to draw")
    args = parser.parse_args()
    bugs = {bug.name: bug for bug in BUGS}
    code = copied("out/bugs/code")
    runs = {name: ([], []) for name in args.bugs}
    for seed in range(args.seeds):
        train("sft.py", f"out/compare/sft_{seed}", "--seed", str(seed))
        for name, (ours, theirs) in runs.items():
            command, metric, _ = RUNS[name]
            command = f"{command} {args.flags}".strip()
            ours.append(train_in(code, command, "ours_", seed))
            with infected(code, bugs[name]):
                theirs.append(train_in(code, command, f"{name}_", seed))
            print(f"seed {seed} {name:28}", end="")
            for shown in (accuracy_of(command)[0], metric):
                print(f"  {shown} {last_value(ours[-1], shown):.3f}, "
                      f"with the bug {last_value(theirs[-1], shown):.3f}", end="")
            print(flush=True)
    draw(runs, args.figure)


if __name__ == "__main__":
    main()
