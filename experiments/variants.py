"""
Variants of GRPO, DAPO and DPO, each written as what differs: functions of a few lines that replace
those of the script. Groups, minibatches, optimiser and flags stay the same.

    python experiments/variants.py rloo        -> out/rloo; flags are those of the script

    reinforce   grpo.py without baseline, ratio, clip and KL penalty (Williams 1992)
    baseline    reinforce minus the mean reward of all other responses of the rollout
    rloo        reinforce minus the mean reward of the other responses to the prompt (2402.14740)
    drgrpo      grpo.py without division by std and length, and without KL penalty (2503.20783)
    gspo        grpo.py with one ratio per response, clipped as a whole, no KL penalty (2507.18071)
    constant    grpo.py with Dr. GRPO's constant in place of 1/|o_i|, and without KL penalty
    cispo       dapo.py with the ratio as a clipped weight without gradient: every token keeps a
                gradient (2506.13585)
    dppo        dapo.py with a bound on the change of the probability, not of the ratio (2602.04879)
    ipo         dpo.py with a squared loss whose optimum is finite (2310.12036)

experiments/compare.py puts them side by side.
"""
import math
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dapo  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
from common.run import main  # noqa: E402
from dapo import dapo_loss  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from grpo import grpo_loss  # noqa: E402

# these losses stay the originals after `run` has replaced them in the scripts

LONGEST = grpo.Config.max_new_tokens        # the constant by which Dr. GRPO divides; `run` sets it


# --------------------------------------------------------------------------------------- advantages
# In place of group_advantage: reward (B,), the responses of one prompt adjacent -> adv (B,).


def no_baseline(reward, group_size):
    """REINFORCE: the reward itself."""
    return reward


def batch_baseline(reward, group_size):
    """Baseline: the mean reward of all other responses of the rollout, whatever their prompt, which
    does not depend on the response."""
    others = (reward.sum() - reward) / (len(reward) - 1)                  # (B,)
    return reward - others


def rloo_advantage(reward, group_size):
    """RLOO. Baseline: the mean reward of the other responses to the same prompt. The advantage is
    G / (G - 1) times the centred reward."""
    r = reward.view(-1, group_size)
    others = (r.sum(1, keepdim=True) - r) / (group_size - 1)              # (P, G)
    return (r - others).flatten()


def centred_advantage(reward, group_size):
    """Dr. GRPO: the reward minus the mean of its group. Division by the group's std would weight
    prompts more whose responses are nearly all right or nearly all wrong."""
    r = reward.view(-1, group_size)
    return (r - r.mean(1, keepdim=True)).flatten()


# ------------------------------------------------------------------------------------------- losses
# In place of grpo_loss, dapo_loss and dpo_loss: the same arguments and statistics.


def policy_gradient_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """-1/B Σ_i A_i Σ_t log π(o_it): a sum over tokens, without ratio, clip and KL penalty."""
    _, stats = grpo_loss(logp.detach(), old_logp, ref_logp, adv, mask, math.inf, 0.0)
    if n is None:
        n = len(adv)
    logp = torch.where(mask > 0, logp, 0.0)
    loss = -(adv[:, None] * logp).sum() / n
    return loss, stats


def drgrpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """Dr. GRPO: every token is divided by one constant, LONGEST, not by the length of its response.
    No KL penalty."""
    weighted = adv * mask.sum(1) / LONGEST                  # cancels the 1/|o_i| of grpo_loss
    return grpo_loss(logp, old_logp, ref_logp, weighted, mask, clip_eps, 0.0, n)


def gspo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """GSPO, Eq. 5 and 7: one ratio per response, s_i = exp(1/|o_i| Σ_t log r_it). No KL penalty."""
    def response_mean(x):
        total = torch.where(mask > 0, x, 0.0).sum(1, keepdim=True)        # (B, 1)
        return (total / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(x)

    old = response_mean(old_logp)
    return grpo_loss(response_mean(logp), old, old, adv, mask, clip_eps, 0.0, n)


def cispo_loss(logp, old_logp, adv, mask, clip_low, clip_high, n=None):
    """CISPO, Eq. 4 and 5: the ratio is a weight, clipped at 1 + clip_high and detached. So every
    token keeps a gradient, which DAPO's clip would remove. There is no lower bound. The statistics
    are the shares of tokens that DAPO's clip would cut."""
    _, stats = dapo_loss(logp.detach(), old_logp, adv, mask, clip_low, clip_high)
    if n is None:
        n = mask.sum().clamp(min=1)
    logp = torch.where(mask > 0, logp, 0.0)
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    weight = (logp.detach() - old_logp).clamp(max=20).exp().clamp(max=1 + clip_high)
    loss = -(weight * adv[:, None] * logp).sum() / n                      # 1/Σ_i |o_i| Σ_i Σ_t
    return loss, stats


def dppo_loss(logp, old_logp, adv, mask, clip_low, clip_high, n=None):
    """DPPO with binary total variation: a token has no gradient where its probability has moved in
    the direction of its advantage by more than clip_high, up, or clip_low, down. A rare token keeps
    its gradient whatever its ratio."""
    _, stats = dapo_loss(logp.detach(), old_logp, adv, mask, clip_low, clip_high)
    if n is None:
        n = mask.sum().clamp(min=1)
    logp = torch.where(mask > 0, logp, 0.0)
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    adv = adv[:, None]
    moved = logp.detach().exp() - old_logp.exp()                          # (B, T)  π - π_old
    cut = (moved > clip_high) & (adv > 0) | (moved < -clip_low) & (adv < 0)
    ratio = (logp - old_logp).clamp(max=20).exp()
    loss = -torch.where(cut, 0.0, ratio * adv * mask).sum() / n
    tokens = mask.sum().clamp(min=1)
    stats |= {"clip_low": (cut * (adv < 0) * mask).sum() / tokens,
              "clip_high": (cut * (adv > 0) * mask).sum() / tokens}
    return loss, stats


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """IPO, Eq. 17: draws h to 1 / (2β), where DPO draws it to infinity. Log-probs are sums over
    tokens, as in DPO; label_smoothing is not used."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    h = (logp_w - logp_l) - (ref_w - ref_l)                               # (P,)
    if n is None:
        n = len(h)
    return (h - 1 / (2 * beta)).square().sum() / n, stats


# flags that a variant has by default
FLAGS = {"dppo": ["--clip_low", "0.2", "--clip_high", "0.2"], "ipo": ["--sft_coef", "0"]}
# name: script, and the functions that are replaced in it
VARIANTS = {
    "reinforce": (grpo, {"group_advantage": no_baseline, "grpo_loss": policy_gradient_loss}),
    "baseline": (grpo, {"group_advantage": batch_baseline, "grpo_loss": policy_gradient_loss}),
    "rloo": (grpo, {"group_advantage": rloo_advantage, "grpo_loss": policy_gradient_loss}),
    "drgrpo": (grpo, {"group_advantage": centred_advantage, "grpo_loss": drgrpo_loss}),
    "gspo": (grpo, {"grpo_loss": gspo_loss}),
    "constant": (grpo, {"grpo_loss": drgrpo_loss}),
    "cispo": (dapo, {"dapo_loss": cispo_loss}),
    "dppo": (dapo, {"dapo_loss": dppo_loss}),
    "ipo": (dpo, {"dpo_loss": ipo_loss}),
}


def run(name, flags):
    """Train a variant: its script with the functions replaced."""
    script, replaced = VARIANTS[name]
    for function_name, function in replaced.items():
        setattr(script, function_name, function)
    # config.json names the script by its docstring, so that --resume takes it for no other
    script.__doc__ = f"{name}: a variant of {script.__doc__.strip()}"
    defaults = ["--out", f"out/{name}"]
    if "--resume" not in flags:
        defaults += FLAGS.get(name, [])
    sys.argv[1:] = defaults + flags                           # of equal flags the last one counts

    def train(cfg):
        global LONGEST
        LONGEST = cfg.max_new_tokens
        script.train(cfg)

    main(train, script.Config)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
    elif sys.argv[1] in VARIANTS:
        run(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(f"variants.py: {sys.argv[1]!r} is not a variant; these are: {', '.join(VARIANTS)}")
