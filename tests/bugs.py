"""
What six animals of the bug zoo do to learning: the README's figure of mistakes.

    python tests/bugs.py                 three seeds, about three quarters of an hour on two CPU cores -> out/bugs, assets/bugs.png
    python tests/bugs.py --seeds 1 --bugs no_shift price_paid_out
    python tests/bugs.py --seeds 1 --flags "--steps 4 --eval_every 2" --figure out/try.png

Each bug is put into a copy of the code (test_bug_zoo.py has the line, and the test that finds it), which then trains as written beside it
here; our own code trains in the same way, from the same seed and SFT checkpoint. None of the six touches the rule, the sampler or the
evaluation, so both are measured alike. Five show in the curves; the sixth, a clip that was copied six times, does not, and only a test
finds it. The guard is off: a run that goes wrong goes on. Runs that are already there are not done again; compare.py shares its SFT
checkpoints.
"""
import argparse
import json
import os

from compare import panel, train
from test_bug_zoo import BUGS, copied, infected

SFT = "sft.py --steps 400 --eval_every 40"
RUNS = {                                                                  # bug: how to train, and what to show beside accuracy
    "no_shift": (SFT, "nll", "training loss, nats a token"),
    "end_token_untrained": (SFT, "val_length", "answer length, tokens"),
    "ranking_upside_down": ("reward.py", "loss", "training loss, nats a pair"),
    "rewards_of_other_prompts": ("grpo.py --eval_every 5", "reward", "reward in training"),
    "price_paid_out": ("grpo.py --eval_every 5", "kl", "KL to the SFT model, nats a token"),
    "inverted_clip": ("grpo.py --eval_every 5 --epochs 4", "kl", "KL to the SFT model, nats a token"),
}


def log(folder):
    with open(f"{folder}/metrics.jsonl") as f:
        return list(map(json.loads, f))


def trained(how, code, name, seed):
    """The log of a run of the code in a folder, which is made unless it is there."""
    script, *flags = how.split()
    start = [] if script == "sft.py" else ["--init", f"out/compare/sft_{seed}"]
    out = f"out/bugs/{name}{'_'.join(how.split()).replace('--', '')}_{seed}"
    flags += ["--seed", str(seed), "--guard", "false"]
    train(os.path.join(os.path.abspath(code), script), out, *flags, *start, PYTHONDONTWRITEBYTECODE="1")
    return log(out)


def figure(runs, path):
    """Above held-out accuracy, below what else the log shows; every seed thin and the mean thick."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, len(runs), figsize=(3.1 * len(runs), 5.2), layout="constrained", squeeze=False)
    for (name, (ours, theirs)), (above, below) in zip(runs.items(), axes.T):
        how, metric, says = RUNS[name]
        accuracy = "held-out accuracy, pairs" if how == "reward.py" else "held-out accuracy, T = 1"
        for axis, shown, label in ((above, "val_acc", accuracy), (below, metric, says)):
            panel(axis, ours, shown, lambda rows: rows[-1]["step"], color="tab:gray", label="as it is")
            panel(axis, theirs, shown, lambda rows: rows[-1]["step"], color="tab:red", label="with the bug")
            axis.set(xlabel=f"{how.split('.')[0]}.py, steps", ylabel=label)
        if metric in ("nll", "kl"):
            below.set_yscale("log")
        above.set_title(name.replace("_", " "), fontsize=10)
        above.set_ylim(0, 1)
    axes[0, 0].legend(fontsize=8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fig.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--bugs", nargs="+", default=list(RUNS), choices=list(RUNS), help="which of them")
    parser.add_argument("--flags", default="", help="more flags for every run, for a quick look")
    parser.add_argument("--figure", default="assets/bugs.png", help="where to draw")
    args = parser.parse_args()
    bugs, code, runs = {bug.name: bug for bug in BUGS}, copied("out/bugs/code"), {name: ([], []) for name in args.bugs}
    for seed in range(args.seeds):
        train("sft.py", f"out/compare/sft_{seed}", "--seed", str(seed))
        for name in args.bugs:
            how, metric, _ = RUNS[name]
            how = f"{how} {args.flags}".strip()
            ours = trained(how, code, "ours_", seed)
            with infected(code, bugs[name]):
                theirs = trained(how, code, f"{name}_", seed)
            runs[name][0].append(ours), runs[name][1].append(theirs)
            last = {x: [[row[x] for row in rows if x in row][-1] for rows in (ours, theirs)] for x in ("val_acc", metric)}
            print(f"seed {seed} {name:28}", *[f"{x} {a:.3f}, with the bug {b:.3f}" for x, (a, b) in last.items()], sep="  ", flush=True)
    figure(runs, args.figure)


if __name__ == "__main__":
    main()
