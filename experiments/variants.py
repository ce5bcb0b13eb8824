"""
Variants of the six algorithms. Each replaces a few functions of a script (policy_variants.py,
preference_variants.py, expert_iteration.py); the training loop stays. A variant may change
defaults, add flags, and refuse flags that it does not use.

    python experiments/variants.py rloo          -> out/rloo
    python experiments/variants.py rloo --help      all its flags

grpo.py with
    reinforce   no baseline, ratio, clip and KL penalty (Williams 1992)
    baseline    reinforce minus the mean reward of all other responses of the rollout
    rloo        reinforce minus the mean reward of the other responses to the prompt (2402.14740)
    drgrpo      no division by std and length, and no KL penalty (2503.20783)
    constant    Dr. GRPO's constant in place of 1/|o_i|, and no KL penalty
    gspo        one ratio per response, clipped as a whole, no KL penalty (2507.18071)
    process     a reward for every running total, not for the response alone (2402.03300, §4.1.3)
    distill     a teacher's log-probs in place of the reward (2306.13649)
    tis, mis    importance weights π_old/π_sampler per token, truncated (1606.02647) or masked
                (IcePop, 2510.18855); --stale K: sample with the weights of K rollouts ago
    stale       the same sampler without importance weights
    replay      an SFT loss on demonstrations in every update, as in PPO-ptx (2203.02155, Eq. 2)
ppo.py with
    reinforce++ returns instead of GAE advantages, whitened over the whole rollout (2501.03262)
dapo.py with
    cispo       the ratio as a clipped, detached weight: no token loses its gradient (2506.13585)
    dppo        a bound on the change of the probability, not on the ratio (2602.04879)
dpo.py with
    ipo         a squared loss, whose optimum is finite (2310.12036)
    kto         single responses, desirable or undesirable, instead of pairs (2402.01306)
    simpo       mean log-probs, a margin and no reference (2405.14734)
    orpo        SFT and the odds ratio of the two responses, no reference (2403.07691)
sft.py with
    expert      expert iteration, or rejection-sampling fine-tuning: SFT on sampled responses that
                are right (2308.01825)

experiments/compare.py compares them. best_of_n.py is best-of-n, without training.
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
import ppo  # noqa: E402
import sft  # noqa: E402
from common import InputError  # noqa: E402
from common.distributed import world_size  # noqa: E402
from common.flags import AT_LEAST, AT_MOST  # noqa: E402
from common.run import main  # noqa: E402
from expert_iteration import ExpertIteration  # noqa: E402
from policy_variants import (Distillation, ProcessSupervision, Replay, batch_baseline,  # noqa: E402
                             centred_advantage, cispo_loss, distillation_loss, dppo_loss,
                             drgrpo_loss, gspo_loss, mis_loss, no_baseline, policy_gradient_loss,
                             returns_to_go, rloo_advantage, stale_policy, tis_loss)
from preference_variants import (KTO, evaluate_without_reference, ipo_loss, mean_logp,  # noqa: E402
                                 orpo_loss, simpo_loss)

process = ProcessSupervision()
distillation = Distillation()
replay = Replay()
kto = KTO()
expert = ExpertIteration()
# name: script, {function of the script: its replacement}
VARIANTS = {
    "reinforce": (grpo, {"group_advantage": no_baseline, "grpo_loss": policy_gradient_loss}),
    "baseline": (grpo, {"group_advantage": batch_baseline, "grpo_loss": policy_gradient_loss}),
    "rloo": (grpo, {"group_advantage": rloo_advantage, "grpo_loss": policy_gradient_loss}),
    "drgrpo": (grpo, {"group_advantage": centred_advantage, "grpo_loss": drgrpo_loss}),
    "constant": (grpo, {"grpo_loss": drgrpo_loss}),
    "gspo": (grpo, {"grpo_loss": gspo_loss}),
    "process": (grpo, {"load_policy": process.load_policy,
                       "compute_reward": process.compute_reward,
                       "group_advantage": process.group_advantage}),
    "distill": (grpo, {"load_policy": distillation.load_policy,
                       "load_prompts": distillation.load_prompts,
                       "measure_reward": distillation.measure_reward,
                       "compute_reward": distillation.compute_reward,
                       "group_advantage": distillation.group_advantage,
                       "make_reference": distillation.make_reference,
                       "grpo_loss": distillation_loss}),
    "tis": (grpo, {"load_policy": stale_policy, "grpo_loss": tis_loss}),
    "mis": (grpo, {"load_policy": stale_policy, "grpo_loss": mis_loss}),
    "stale": (grpo, {"load_policy": stale_policy}),
    "replay": (grpo, {"load_policy": replay.load_policy, "micro_batches": replay.micro_batches}),
    "reinforce++": (ppo, {"gae": returns_to_go}),
    "cispo": (dapo, {"dapo_loss": cispo_loss}),
    "dppo": (dapo, {"dapo_loss": dppo_loss}),
    "ipo": (dpo, {"dpo_loss": ipo_loss}),
    "kto": (dpo, {"load_policy": kto.load_policy, "load_pairs": kto.load_pairs,
                  "batches": kto.batches, "evaluate_pairs": kto.evaluate_pairs,
                  "dpo_loss": kto.dpo_loss}),
    "simpo": (dpo, {"sequence_logp": mean_logp, "dpo_loss": simpo_loss,
                    "evaluate_pairs": evaluate_without_reference}),
    "orpo": (dpo, {"sequence_logp": mean_logp, "dpo_loss": orpo_loss,
                   "evaluate_pairs": evaluate_without_reference}),
    "expert": (sft, {"load_or_create_model": expert.load_or_create_model,
                     "load_demonstrations": expert.load_demonstrations}),
}
# defaults that differ from those of the script or of the function
DEFAULTS = {
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
# limits of the flags that variants add
AT_LEAST.update(cap=1, highest=1, samples=1, keep=1)
AT_MOST.update(lowest=1)
# help of the flags that variants add
HELP = {
    "teacher": "checkpoint with the policy's tokenizer",
    "cap": "C, largest weight",
    "lowest": "C_min, smallest weight that is not masked",
    "highest": "C_max, largest weight that is not masked",
    "stale": "age of the sampler's weights, in rollouts; 0: the sampler is the policy",
    "replay": 'JSON lines of demonstrations; "": the built-in ones',
    "sft_coef": "weight of the SFT loss on the demonstrations",
    "gamma_ratio": "γ/β, target margin between the mean log-probs of chosen and rejected",
    "sampler": 'checkpoint that generates the responses; "": --init',
    "prompts": "number of training prompts",
    "skip": "training prompts to skip, those of earlier rounds",
    "samples": "responses sampled per prompt",
    "keep": "maximum number of distinct right responses per prompt",
    "control": "control: as many responses, right or wrong, drawn at random",
}


def further_arguments(function, replaced):
    """The arguments that a function has beyond those of what it replaces: {name: default}."""
    own, others = inspect.signature(function).parameters, inspect.signature(replaced).parameters
    return {name: own[name].default for name in own if name not in others}


def make_config(name):
    """The script's Config with the variant's defaults, and its further arguments as flags."""
    script, replacements = VARIANTS[name]
    defaults = DEFAULTS.get(name, {})
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
    Config.__module__ = script.__name__     # parse_config reads the flags' help in its source
    return Config


def run(name, flags):
    """Train a variant: its script with the functions replaced."""
    script, replacements = VARIANTS[name]
    # script_name reads the docstring: --resume refuses a run of another variant
    script.__doc__ = f"{name}: a variant of {script.__doc__.strip()}"
    sys.argv[1:] = flags
    Config = make_config(name)

    def train(cfg):
        if world_size() > 1:
            raise InputError("torchrun: a variant runs in one process")
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
