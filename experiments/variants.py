"""
Variants of the six algorithms, each written as what differs: functions of a few lines that replace
those of the script (policy_variants.py, preference_variants.py, expert_iteration.py). Groups,
minibatches, optimiser and flags stay the same.

    python experiments/variants.py rloo          -> out/rloo, with the flags of the script
    python experiments/variants.py rloo --help      those flags, and those of the variant

grpo.py with
    reinforce   no baseline, ratio, clip and KL penalty (Williams 1992)
    baseline    reinforce minus the mean reward of all other responses of the rollout
    rloo        reinforce minus the mean reward of the other responses to the prompt (2402.14740)
    drgrpo      no division by std and length, and no KL penalty (2503.20783)
    constant    Dr. GRPO's constant in place of 1/|o_i|, and no KL penalty
    gspo        one ratio per response, clipped as a whole, no KL penalty (2507.18071)
    process     a reward for every running total, not for the response alone (2402.03300, §4.1.3)
    distill     a teacher's log-probs in place of the reward (2306.13649)
    tis, mis    weights for a sampler that is not the policy, truncated (1606.02647) or masked
                (2510.18855); --stale K: a sampler that is K rollouts old
    stale       such a sampler, without weights
    replay      an SFT loss on demonstrations in every update, as in PPO-ptx (2203.02155, Eq. 2)
ppo.py with
    reinforce++ returns without a critic, whitened over the whole rollout (2501.03262)
dapo.py with
    cispo       the ratio as a clipped weight without gradient: every token keeps a gradient
                (2506.13585)
    dppo        a bound on the change of the probability, not of the ratio (2602.04879)
dpo.py with
    ipo         a squared loss, whose optimum is finite (2310.12036)
    kto         single responses that are desirable or not, instead of pairs (2402.01306)
    simpo       mean log-probs, a margin and no reference (2405.14734)
    orpo        SFT and the odds ratio of the two responses, no reference (2403.07691)
sft.py with
    expert      demonstrations that a policy sampled and the rule found right: expert iteration,
                rejection-sampling fine-tuning (2308.01825)

experiments/compare.py puts them side by side. Best-of-n, which trains nothing, is best_of_n.py.
"""
import dataclasses
import functools
import inspect
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dapo  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import policy_variants as policy  # noqa: E402
import ppo  # noqa: E402
import preference_variants as preference  # noqa: E402
import sft  # noqa: E402
from common import InputError, flags as limits  # noqa: E402
from common.run import main  # noqa: E402
from expert_iteration import ExpertIteration  # noqa: E402

process = policy.ProcessSupervision()
distillation = policy.Distillation()
replay = policy.Replay()
kto = preference.KTO()
expert = ExpertIteration()
# name: script, and the functions that are replaced in it
VARIANTS = {
    "reinforce": (grpo, {"group_advantage": policy.no_baseline,
                         "grpo_loss": policy.policy_gradient_loss}),
    "baseline": (grpo, {"group_advantage": policy.batch_baseline,
                        "grpo_loss": policy.policy_gradient_loss}),
    "rloo": (grpo, {"group_advantage": policy.rloo_advantage,
                    "grpo_loss": policy.policy_gradient_loss}),
    "drgrpo": (grpo, {"group_advantage": policy.centred_advantage,
                      "grpo_loss": policy.drgrpo_loss}),
    "constant": (grpo, {"grpo_loss": policy.drgrpo_loss}),
    "gspo": (grpo, {"grpo_loss": policy.gspo_loss}),
    "process": (grpo, {"load_policy": process.load_policy,
                       "compute_reward": process.compute_reward,
                       "group_advantage": process.group_advantage}),
    "distill": (grpo, {"load_policy": distillation.load_policy,
                       "load_prompts": distillation.load_prompts,
                       "measure_reward": distillation.measure_reward,
                       "compute_reward": distillation.compute_reward,
                       "group_advantage": distillation.group_advantage,
                       "freeze": distillation.freeze,
                       "grpo_loss": policy.distillation_loss}),
    "tis": (grpo, {"load_policy": policy.stale_policy, "grpo_loss": policy.tis_loss}),
    "mis": (grpo, {"load_policy": policy.stale_policy, "grpo_loss": policy.mis_loss}),
    "stale": (grpo, {"load_policy": policy.stale_policy}),
    "replay": (grpo, {"load_policy": replay.load_policy, "micro_batches": replay.micro_batches}),
    "reinforce++": (ppo, {"gae": policy.returns_to_go}),
    "cispo": (dapo, {"dapo_loss": policy.cispo_loss}),
    "dppo": (dapo, {"dapo_loss": policy.dppo_loss}),
    "ipo": (dpo, {"dpo_loss": preference.ipo_loss}),
    "kto": (dpo, {"load_policy": kto.load_policy, "load_pairs": kto.load_pairs,
                  "batches": kto.batches, "evaluate_pairs": kto.evaluate_pairs,
                  "dpo_loss": kto.dpo_loss}),
    "simpo": (dpo, {"sequence_logp": preference.mean_logp, "dpo_loss": preference.simpo_loss,
                    "evaluate_pairs": preference.evaluate_without_reference}),
    "orpo": (dpo, {"sequence_logp": preference.mean_logp, "dpo_loss": preference.orpo_loss,
                   "evaluate_pairs": preference.evaluate_without_reference}),
    "expert": (sft, {"load_or_create_model": expert.load_or_create_model,
                     "load_demonstrations": expert.load_demonstrations}),
}
# flags of the script that have another default
FLAGS = {
    "distill": {"kl_beta": 1.0, "max_kl": 1e6},    # the teacher is the reference, and may be far
    "stale": {"stale": 4},
    "dppo": {"clip_low": 0.2, "clip_high": 0.2},
    "ipo": {"sft_coef": 0.0},
    "kto": {"sft_coef": 0.0, "lr": 5e-5},
    "simpo": {"sft_coef": 0.0, "lr": 5e-5, "beta": 2.0},
    "orpo": {"sft_coef": 0.0},
    "expert": {"init": "out/sft", "steps": 100, "lr": 3e-4},
}
# flags of the script that a variant does not use, and so refuses
UNUSED = {
    "reinforce": ["kl_beta", "clip_eps"], "baseline": ["kl_beta", "clip_eps"],
    "rloo": ["kl_beta", "clip_eps"], "drgrpo": ["kl_beta"], "constant": ["kl_beta"],
    "gspo": ["kl_beta"], "distill": ["kl_beta"], "reinforce++": ["gae_lambda"],
    "ipo": ["label_smoothing"], "kto": ["label_smoothing"],
    "simpo": ["label_smoothing", "sft_coef"], "orpo": ["label_smoothing", "sft_coef"],
    "expert": ["eval_prompts"],
}
AT_LEAST = {"cap": 1, "highest": 1, "samples": 1, "keep": 1}
AT_MOST = {"lowest": 1}
# of the flags that a variant adds
HELP = {
    "teacher": "checkpoint with the policy's tokenizer",
    "cap": "C, largest weight",
    "lowest": "C_min, smallest weight that counts",
    "highest": "C_max, largest weight that counts",
    "stale": "how many rollouts ago the sampler's weights were the policy's; 0: it is the policy",
    "replay": 'JSON lines of demonstrations; "": the built-in ones',
    "sft_coef": "weight of the SFT loss on the demonstrations",
    "gamma_ratio": "γ/β, the lead in mean log-prob that the chosen response should have",
    "sampler": 'checkpoint that samples; "": --init',
    "prompts": "training prompts that are sampled from",
    "skip": "training prompts before them, of earlier rounds",
    "samples": "responses to each",
    "keep": "distinct right responses kept of each prompt, at most",
    "control": "keep as many random responses instead",
}


limits.AT_LEAST.update(AT_LEAST)
limits.AT_MOST.update(AT_MOST)


def further_arguments(function, replaced):
    """The arguments that a function has beyond those of what it replaces: {name: default}."""
    own, others = inspect.signature(function).parameters, inspect.signature(replaced).parameters
    return {name: own[name].default for name in own if name not in others}


def make_config(name):
    """The script's Config with the variant's defaults, and its further arguments as flags."""
    script, replacements = VARIANTS[name]
    defaults = FLAGS.get(name, {})
    given = {f.name: f for f in dataclasses.fields(script.Config)}
    entries = [("out", str, f"out/{name}")]
    for flag, default in defaults.items():
        if flag in given:
            entries.append((flag, given[flag].type, default))
    for function_name, function in replacements.items():
        for flag, default in further_arguments(function, getattr(script, function_name)).items():
            if flag not in given:
                default = defaults.get(flag, default)
                field = dataclasses.field(default=default, metadata={"help": HELP[flag]})
                entries.append((flag, type(default), field))
    Config = dataclasses.make_dataclass("Config", entries, bases=(script.Config,))
    Config.__module__ = script.__name__                     # whose source has the other flags' help
    return Config


def run(name, flags):
    """Train a variant: its script with the functions replaced."""
    script, replacements = VARIANTS[name]
    # config.json names the script by its docstring, so that --resume takes it for no other
    script.__doc__ = f"{name}: a variant of {script.__doc__.strip()}"
    sys.argv[1:] = flags
    Config = make_config(name)

    def train(cfg):
        for flag in UNUSED.get(name, ()):
            if getattr(cfg, flag) != getattr(Config, flag):
                raise InputError(f"--{flag}: {name} does not use it")
        for function_name, function in replacements.items():
            replaced = getattr(script, function_name)
            values = {flag: getattr(cfg, flag) for flag in further_arguments(function, replaced)}
            setattr(script, function_name, functools.partial(function, **values))
        script.train(cfg)

    main(train, Config)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
    elif sys.argv[1] in VARIANTS:
        run(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(f"variants.py: {sys.argv[1]!r} is not a variant; these are: {', '.join(VARIANTS)}")
