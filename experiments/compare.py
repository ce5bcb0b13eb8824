"""
The README's tables and figures: every algorithm and variant from the same SFT checkpoints over
several seeds, measured on the 1,000 test prompts.

    python experiments/compare.py      five seeds, about three hours on two CPU cores
                                       -> out/compare, assets/
    python experiments/compare.py --seeds 1 --tables algorithms
    python experiments/compare.py --seeds 3 --tables preferences stale     variants; see TABLES

Runs that are already in out/compare are not repeated; --jobs 2 trains two at a time on one thread
each. Settings were chosen on the validation prompts; this reports on the test prompts.
"""
import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import reward  # noqa: E402
from measure import measure_policy, measure_reward_model  # noqa: E402

PAIRS = "--data out/compare/reward_{seed}/preferences.jsonl"
VARIANT = "experiments/variants.py"
TEACHER = "--teacher out/compare/grpo_{seed}"
HALF = "--init out/compare/sft_half_{seed}"
# as many responses and updates as the default, each update from the current policy
FRESH = "--prompts 8 --steps 200 --warmup 12 --eval_every 40"
LORA = "--lr 1e-3"                                              # best at each rank, of six
# dapo.py without three of its changes
BARE = "--clip_high 0.2 --max_generations 0 --overlong_cache 0"

# name: command, to which --seed, --init and --out are added
RUNS = {
    "sft": "sft.py",
    "reward": "reward.py",
    "dpo": f"dpo.py {PAIRS}",
    "ppo": "ppo.py --reward out/compare/reward_{seed}",
    "ppo_rule": "ppo.py --reward rule",
    "lambda_50": "ppo.py --gae_lambda 0.5 --reward out/compare/reward_{seed}",
    "lambda_95": "ppo.py --gae_lambda 0.95 --reward out/compare/reward_{seed}",
    "grpo": "grpo.py",
    "dapo": "dapo.py",
    "dpo_plain": f"dpo.py --sft_coef 0 {PAIRS}",
    "dpo_slow": f"dpo.py --sft_coef 0 --lr 2e-5 {PAIRS}",
    "ipo": f"{VARIANT} ipo --lr 2e-5 {PAIRS}",
    "kto": f"{VARIANT} kto {PAIRS}",
    "simpo": f"{VARIANT} simpo {PAIRS}",
    "orpo": f"{VARIANT} orpo {PAIRS}",
    "chosen": f"dpo.py --beta 0 {PAIRS}",       # only SFT on the chosen responses is left
    "reinforce": f"{VARIANT} reinforce --early_stopping false",
    "baseline": f"{VARIANT} baseline --early_stopping false",
    "rloo": f"{VARIANT} rloo --early_stopping false",
    "drgrpo": f"{VARIANT} drgrpo --early_stopping false",
    "gspo": f"{VARIANT} gspo --clip_eps 0.02",
    "reinforce_fresh": f"{VARIANT} reinforce {FRESH}",
    "baseline_fresh": f"{VARIANT} baseline {FRESH}",
    "rloo_fresh": f"{VARIANT} rloo {FRESH}",
    "drgrpo_fresh": f"{VARIANT} drgrpo {FRESH}",
    "free_fresh": f"grpo.py --kl_beta 0 {FRESH}",
    "grpo_free": "grpo.py --kl_beta 0",
    "token_mean": f"dapo.py {BARE}",
    "clip_higher": "dapo.py --max_generations 0 --overlong_cache 0",
    "overlong": "dapo.py --max_generations 0",
    # about as many responses as dapo.py samples, and all of them are trained on
    "wide": "grpo.py --kl_beta 0 --prompts 128 --minibatch 256",
    "lora_4": f"grpo.py --lora_rank 4 {LORA}",
    "lora_16": f"grpo.py --lora_rank 16 {LORA}",
    "lora_64": f"grpo.py --lora_rank 64 {LORA}",
    "group_2": "grpo.py --group_size 2 --prompts 128",
    "group_32": "grpo.py --group_size 32 --prompts 8",
    "one_update": "grpo.py --minibatch 256",
    "four_epochs": "grpo.py --epochs 4",
    "constant": f"{VARIANT} constant",
    "cispo": f"{VARIANT} cispo",
    "dppo": f"{VARIANT} dppo",
    "reinforce_pp": f"{VARIANT} reinforce++ --reward rule",
    "process": f"{VARIANT} process --eval_every 5",
    "outcome": "grpo.py --eval_every 5",
    # a narrower student
    "sft_half": "sft.py --n_embd 48",
    "grpo_half": f"grpo.py {HALF} --eval_every 5",
    "distill": f"{VARIANT} distill {TEACHER} --eval_every 5",
    "distill_half": f"{VARIANT} distill {TEACHER} {HALF} --eval_every 5",
    # as many samples as grpo.py: expert iteration, random control, three rounds
    "expert": f"{VARIANT} expert",
    "expert_control": f"{VARIANT} expert --control",
    "round_1": f"{VARIANT} expert --prompts 533",
    "round_2": f"{VARIANT} expert --prompts 533 --skip 533 --init out/compare/round_1_{{seed}}",
    "round_3": f"{VARIANT} expert --prompts 534 --skip 1066 --init out/compare/round_2_{{seed}}",
    # forgetting: KL penalty, replay, SFT term
    "grpo_kl_10": "grpo.py --kl_beta 0.1",
    "grpo_kl_50": "grpo.py --kl_beta 0.5",
    "replay": f"{VARIANT} replay --kl_beta 0",
    "replay_10": f"{VARIANT} replay --kl_beta 0 --sft_coef 0.1",
    "dpo_sft_1": f"dpo.py --sft_coef 1 {PAIRS}",
    "dpo_sft_10": f"dpo.py --sft_coef 10 {PAIRS}",
}
for k in (1, 4, 16):                                            # a sampler k rollouts old
    for name in ("stale", "tis", "mis"):
        RUNS[f"{name}_{k}"] = f"{VARIANT} {name} --stale {k} --early_stopping false"
RUNS |= {"tis_0": f"{VARIANT} tis", "mis_0": f"{VARIANT} mis"}
TABLES = {
    "algorithms": ["sft", "dpo", "ppo", "ppo_rule", "grpo", "dapo"],
    "lambda": ["ppo", "lambda_95", "lambda_50"],
    "dapo": ["grpo_free", "token_mean", "clip_higher", "overlong", "dapo"],
    "dpo": ["dpo", "dpo_plain", "dpo_slow", "ipo", "chosen"],
    "chain": ["reinforce", "baseline", "rloo", "drgrpo", "grpo_free", "gspo", "grpo"],
    "fresh": ["reinforce_fresh", "baseline_fresh", "rloo_fresh", "drgrpo_fresh", "free_fresh"],
    "ablations": ["grpo", "grpo_free", "group_2", "group_32", "one_update", "four_epochs",
                  "constant", "token_mean", "wide", "dapo"],
    # only with --tables
    "clips": ["dapo", "cispo", "dppo"],
    "preferences": ["dpo_plain", "dpo_slow", "ipo", "kto", "simpo", "orpo", "dpo"],
    "reinforce++": ["ppo_rule", "reinforce_pp", "grpo"],
    "stale": ["grpo", "tis_0", "mis_0", "stale_1", "tis_1", "mis_1", "stale_4", "tis_4", "mis_4",
              "stale_16", "tis_16", "mis_16"],
    "stale_16": ["grpo", "stale_16", "tis_16", "mis_16"],
    "lora": ["grpo", "lora_4", "lora_16", "lora_64"],
    "process": ["outcome", "process"],
    "distill": ["outcome", "distill"],
    "distill_half": ["grpo_half", "distill_half"],
    "expert": ["grpo", "expert_control", "expert", "round_1", "round_2", "round_3"],
    "retained": ["sft", "dpo", "ppo", "ppo_rule", "grpo", "dapo", "grpo_free", "grpo_kl_10",
                 "grpo_kl_50", "replay_10", "replay", "dpo_plain", "dpo_sft_1", "dpo_sft_10"],
}
BY_TOKENS = ["process", "distill", "distill_half"]
MAIN_TABLES = ["algorithms", "lambda", "dapo", "dpo", "chain", "fresh", "ablations"]
COLUMNS = ["greedy", "accuracy", "pass@8", "kl_seq", "retained_loss", "length", "length_wrong",
           "eos_rate", "ktokens", "seconds", "mem_gb"]
# models in memory, and how many of them are trained
MODELS = {"sft": (1, 1), "dpo": (1, 1), "ppo": (4, 2), "ppo_rule": (3, 2), "grpo": (2, 1),
          "dapo": (1, 1)}
# optimiser steps per line of the log
UPDATES = {"ppo": 8, "grpo": 4, "dapo": 4, "dpo": 1}
# Student's t, two-sided 95%, by number of seeds
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# --------------------------------------------------------------------------------------------- runs


def folder(name, seed):
    return f"out/compare/{name}_{seed}"


def read_json(path):
    with open(path) as f:
        return json.load(f)


def write_json(path, data):
    with open(path, "w") as f:
        json.dump(data, f)


def read_log(out):
    """The rows of a run's metrics.jsonl."""
    with open(f"{out}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def train(script, out, *flags, **env):
    """Run a script into `out` unless it has already finished there. What it prints is in a file
    beside that folder. Its seconds are kept in seconds.json, which marks a finished run."""
    if os.path.exists(f"{out}/seconds.json"):
        return
    start = time.perf_counter()
    command = [sys.executable, os.path.join(ROOT, script), *flags, "--out", out]
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, env=os.environ | env)
    write_json(f"{out}/seconds.json", {"seconds": time.perf_counter() - start})


def init_of(name, seed):
    """The checkpoint that a run starts from; an SFT run is measured against itself."""
    script, *flags = RUNS[name].format(seed=seed).split()
    if script == "sft.py":
        return folder(name, seed)
    return flags[flags.index("--init") + 1] if "--init" in flags else folder("sft", seed)


def origin(name, seed):
    """The SFT model that a run goes back to."""
    while not RUNS[name].startswith("sft.py"):
        name = os.path.basename(init_of(name, seed)).removesuffix(f"_{seed}")
    return folder(name, seed)


def dependencies(name):
    """The runs that a run starts from."""
    found = re.findall(r"out/compare/(\w+)_\{seed\}", RUNS[name])
    if not RUNS[name].startswith("sft.py") and "--init" not in RUNS[name]:
        found.append("sft")
    return found


def depth(name):
    """0 for a run that needs no other, else one more than the highest of those that it needs."""
    return 1 + max([depth(other) for other in dependencies(name)], default=-1)


def with_dependencies(names):
    """The runs and all that they need, each once."""
    found = []
    for name in names:
        for other in with_dependencies(dependencies(name)) + [name]:
            if other not in found:
                found.append(other)
    return found


def run(name, seed, env):
    """Train and measure one run, unless that has been done -> its result."""
    out = folder(name, seed)
    script, *flags = RUNS[name].format(seed=seed).split()
    flags += ["--seed", str(seed)]
    if script != "sft.py":
        flags += ["--init", init_of(name, seed)]
    train(script, out, *flags, **env)
    if not os.path.exists(f"{out}/result.json"):        # in a process with threads of its own
        command = [sys.executable, __file__, "--measure", name, str(seed)]
        subprocess.run(command, check=True, env=os.environ | env)
    result = read_json(f"{out}/result.json")
    print(seed, name, {key: round(x, 3) for key, x in result.items()}, flush=True)
    return result


def run_all(names, seeds, jobs):
    """{name: [the result of each seed]} of these runs and of those that they need."""
    env = {} if jobs == 1 else {"OMP_NUM_THREADS": "1"}
    waves = {}                                                  # each needs those before it
    for name in with_dependencies(["sft", "reward", *names]):
        waves.setdefault(depth(name), []).append(name)
    results = {}
    with ThreadPoolExecutor(jobs) as pool:
        for _, wave in sorted(waves.items()):
            pending = []
            for name in wave:
                for seed in seeds:
                    pending.append((name, pool.submit(run, name, seed, env)))
            for name, future in pending:
                results.setdefault(name, []).append(future.result())
    return results


# -------------------------------------------------------------------------------------- measurement


def measure(name, seed):
    """Measure one run and write its result.json."""
    out = folder(name, seed)
    if name == "reward":
        result = measure_reward_model(out)
    else:
        result = measure_policy(out, origin(name, seed), seed)
        rows = read_log(out)
        result["ktokens"] = ktokens_before(name, seed) + ktokens(rows)
        result["mem_gb"] = rows[-1]["mem_gb"]
    write_json(f"{out}/result.json", result | read_json(f"{out}/seconds.json"))


def ktokens_before(name, seed):
    """Thousands of tokens that were sampled before training: the compared responses, or those of
    expert iteration."""
    _, *flags = RUNS[name].split()
    if "reward_{seed}" in RUNS[name]:
        n = reward.Config.prompts * reward.Config.responses
    elif "expert" in flags:
        n_prompts = int(flags[flags.index("--prompts") + 1]) if "--prompts" in flags else 1600
        n = 8 * n_prompts                       # the samples and prompts of expert_iteration.py
    else:
        return 0.0
    sampler = read_json(f"{init_of(name, seed)}/result.json")
    return sampler["ktokens"] + n * sampler["length"] / 1000    # with those of earlier rounds


def ktokens(rows):
    """Thousands of response tokens that were sampled up to the last of these rows of a log."""
    return sum(row.get("tokens", 0) for row in rows) / 1000


# ------------------------------------------------------------------------------- tables and figures


def interval(values):
    """mean ± half of the 95% interval over seeds."""
    x = torch.tensor(values, dtype=torch.float64)
    half = float("nan")
    if len(x) > 1:
        half = T95.get(len(x), 1.96) * x.std().item() / len(x) ** 0.5
    return f"{x.mean():.3f} ± {half:.3f}"


def print_table(table, results):
    """A row per run; the last column is the change of accuracy from the row above, by seed."""
    n = len(results["sft"])
    print(f"\n{table}: {n} seeds, 1,000 test prompts, mean ± half of the 95% interval over seeds")
    header = "".join(f"{column:>18}" for column in COLUMNS)
    print(f"    {'':16}{header}   accuracy, change from the row above, by seed")
    above = None
    for name in TABLES[table]:
        cells = ""
        for column in COLUMNS:
            cells += f"{interval([result[column] for result in results[name]]):>18}"
        change = ""
        if above:
            pairs = zip(results[above], results[name])
            change = interval([b["accuracy"] - a["accuracy"] for a, b in pairs])
        print(f"    {name:16}{cells}   {change}")
        above = name
    if table == "algorithms":                           # gradients and two moments when trained
        for name in TABLES[table]:
            models, trained = MODELS[name]
            print(f"    {name:16} {models} models in memory, {trained} trained: "
                  f"{models + 3 * trained} times the size of the weights")


def accuracy_at(rows, budget):
    """Accuracy on the validation prompts after so many thousand generated tokens, by linear
    interpolation between evaluations; beyond the last evaluation, its accuracy."""
    before = None
    for i, row in enumerate(rows):
        if "val_accuracy" not in row:
            continue
        x, y = ktokens(rows[:i + 1]), row["val_accuracy"]
        if x >= budget:
            if before is None:
                return y
            x0, y0 = before
            return y0 + (y - y0) * (budget - x0) / (x - x0)
        before = x, y
    return before[1]


def print_by_tokens(table, seeds):
    """Accuracy at equal numbers of generated tokens, and the change from the row above."""
    above = {}
    for name in TABLES[table]:
        logs = [read_log(folder(name, seed)) for seed in seeds]
        cells = []
        for budget in (25, 50, 100):
            found = [accuracy_at(rows, budget) for rows in logs]
            cell = f"{budget}k tokens {interval(found)}"
            if budget in above:
                cell += f" ({interval([b - a for a, b in zip(above[budget], found)])})"
            above[budget] = found
            cells.append(cell)
        print(f"    {name:16} " + " | ".join(cells))


def print_all_metrics(name, results):
    """Every metric of a run, with its range over seeds."""
    for key in results[name][0]:
        values = [result[key] for result in results[name]]
        print(f"    {name:8} {key:36} {interval(values)}    {min(values):.3f} to {max(values):.3f}")


def last_step(rows):
    return rows[-1]["step"]


def updates(rows, per_row):
    """Optimiser steps up to the last of these rows of a log."""
    return rows[-1]["step"] * per_row


def plot_seeds(axis, runs, metric, x, **style):
    """One metric of several runs against x(rows so far): every seed thin and their mean thick."""
    curves = []                                         # per seed: xs, ys
    for rows in runs:
        xs, ys = [], []
        for i, row in enumerate(rows):
            if metric in row:
                xs.append(x(rows[:i + 1]))
                ys.append(row[metric])
        axis.plot(xs, ys, alpha=0.2, lw=1, color=style["color"])
        curves.append((xs, ys))
    length = min(len(xs) for xs, _ in curves)
    curves = [(xs[:length], ys[:length]) for xs, ys in curves]
    mean_x, mean_y = torch.tensor(curves, dtype=torch.float64).mean(0).tolist()
    axis.plot(mean_x, mean_y, lw=2, **style)


def draw(path, seeds, panels):
    """A figure of panels (xlabel, ylabel, curves), a curve being (run, metric, x, label)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    width = 4.2 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.2), layout="constrained")
    for axis, (xlabel, ylabel, curves) in zip(axes, panels):
        for i, (name, metric, x, label) in enumerate(curves):
            runs = [read_log(folder(name, seed)) for seed in seeds]
            plot_seeds(axis, runs, metric, x, color=f"C{i}", label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.legend()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_grpo(seeds):
    """assets/grpo.png: accuracy and length rise together."""
    accuracy = [("grpo", "val_greedy", last_step, "greedy"),
                ("grpo", "val_accuracy", last_step, "T = 1")]
    length = [("grpo", "val_length", last_step, "response length")]
    draw("assets/grpo.png", seeds, [
        ("GRPO rollouts", "accuracy", accuracy),
        ("GRPO rollouts", "response length, tokens", length)])


def draw_algorithms(seeds):
    """assets/compare.png: all algorithms against optimiser steps and against generated tokens."""
    greedy, sampled, by_tokens = [], [], []
    for name, per_row in UPDATES.items():
        x = functools.partial(updates, per_row=per_row)
        greedy.append((name, "val_greedy", x, name))
        sampled.append((name, "val_accuracy", x, name))
        if name != "dpo":
            by_tokens.append((name, "val_accuracy", ktokens, name))
    draw("assets/compare.png", seeds, [
        ("optimiser steps", "accuracy, greedy", greedy),
        ("optimiser steps", "accuracy, T = 1", sampled),
        ("thousand tokens generated in training", "accuracy, T = 1", by_tokens)])


def draw_dpo(seeds):
    """assets/dpo.png: plain DPO beyond its best step."""
    labels = {"dpo": "default", "dpo_plain": "plain", "dpo_slow": "plain, a fifth of the rate"}
    panels = []
    for metric, ylabel in (
            ("val_greedy", "accuracy, greedy"),
            ("val_accuracy", "accuracy, T = 1"),
            ("val_logp_w", "log π(chosen), nats"),
            ("val_margin", "margin β h of held-out pairs")):
        curves = [(name, metric, last_step, label) for name, label in labels.items()]
        panels.append(("DPO steps", ylabel, curves))
    draw("assets/dpo.png", seeds, panels)


# lines of the figure: the coefficient that grows, and the runs
RETAINED = {
    "GRPO, β = 0, .02, .1, .5": ["grpo_free", "grpo", "grpo_kl_10", "grpo_kl_50"],
    "GRPO with replay, weight .1, 1": ["replay_10", "replay"],
    "DPO, SFT term 0, 1, 3, 10": ["dpo_plain", "dpo_sft_1", "dpo", "dpo_sft_10"],
    "PPO": ["ppo"],
    "PPO by the rule": ["ppo_rule"],
    "DAPO": ["dapo"],
    "SFT": ["sft"],
}


def draw_retained(results):
    """assets/retained.png: loss on the demonstrations against accuracy, a mean over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for label, names in RETAINED.items():
        xs, ys = [], []
        for name in names:
            xs.append(sum(result["accuracy"] for result in results[name]) / len(results[name]))
            ys.append(sum(result["retained_loss"] for result in results[name]) / len(results[name]))
        axis.plot(xs, ys, marker="o", label=label)
    axis.set(xlabel="accuracy at T = 1, test prompts", yscale="log",
             ylabel="nats per token on the demonstrations")
    axis.legend(fontsize=8)
    os.makedirs("assets", exist_ok=True)
    figure.savefig("assets/retained.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--tables", nargs="+", default=MAIN_TABLES, choices=list(TABLES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread if > 1")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, seed = args.measure
        return measure(name, int(seed))
    seeds = range(args.seeds)
    names = [name for table in args.tables for name in TABLES[table] if name != "sft"]
    results = run_all(list(dict.fromkeys(names)), seeds, args.jobs)
    for table in args.tables:
        print_table(table, results)
        if table in BY_TOKENS:
            print_by_tokens(table, seeds)
    shown = TABLES["dpo"] if "dpo" in args.tables else ["grpo"]
    for name in ["sft", "reward"] + shown:
        if name in results:
            print_all_metrics(name, results)
    if "algorithms" in args.tables:
        draw_grpo(seeds)
        draw_algorithms(seeds)
    if "dpo" in args.tables:
        draw_dpo(seeds)
    if "retained" in args.tables:
        draw_retained(results)


if __name__ == "__main__":
    main()
