"""
The relatives of GRPO and DPO, each as what differs: functions of a few lines that take the place of those in grpo.py and dpo.py.

    python tests/relatives.py rloo              -> out/rloo; the flags are grpo.py's, and ipo takes dpo.py's

From REINFORCE to GSPO on one skeleton: the same groups, the same minibatches, the same optimiser. compare.py puts them in a table.
"""
import math
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dpo  # noqa: E402
import grpo  # noqa: E402
from model import main  # noqa: E402

grpo_loss, dpo_loss, LONGEST = grpo.grpo_loss, dpo.dpo_loss, 24           # as they are before anything is swapped


# what stands for the critic: reward (B,), the answers of one prompt adjacent -> adv (B,)


def reward_itself(reward, group):
    """REINFORCE (Williams 1992): no baseline."""
    return reward


def leave_one_out_of_all(reward, group):
    """A baseline that does not depend on the answer: the mean reward of all others in the rollout, whatever their prompt."""
    return reward - (reward.sum() - reward) / (len(reward) - 1)


def leave_one_out(reward, group):
    """RLOO (arXiv 2402.14740): the mean reward of the other answers to the same prompt; G/(G-1) (r - mean)."""
    r = reward.view(-1, group)
    return (r - (r.sum(1, keepdim=True) - r) / (group - 1)).flatten()


def centred(reward, group):
    """Dr. GRPO (arXiv 2503.20783): the group's mean, without the division by its std, which favours prompts that are nearly always right or wrong."""
    r = reward.view(-1, group)
    return (r - r.mean(1, keepdim=True)).flatten()


# the loss: arguments and statistics of grpo_loss


def policy_gradient_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """-1/B Σ_i A_i Σ_t log π(o_it): a sum over the tokens, and neither ratio nor clip nor price."""
    _, stats = grpo_loss(logp.detach(), old_logp, ref_logp, adv, mask, math.inf, 0.0)
    return -(adv[:, None] * torch.where(mask > 0, logp, 0.0)).sum() / (len(adv) if n is None else n), stats


def drgrpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """Dr. GRPO: every token of every answer divided by one constant, the default --max_new, and no price."""
    return grpo_loss(logp, old_logp, ref_logp, adv * mask.sum(1) / LONGEST, mask, clip_eps, 0.0, n)


def gspo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """GSPO (arXiv 2507.18071, Eq. 5 and 7): one ratio an answer, s_i = exp(1/|o_i| Σ_t log r_it), clipped as a whole, and no price."""
    per_answer = lambda x: (torch.where(mask > 0, x, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(x)
    _, stats = grpo_loss(logp.detach(), old_logp, ref_logp, adv, mask, clip_eps, 0.0)
    loss, clipped = grpo_loss(per_answer(logp), per_answer(old_logp), per_answer(old_logp), adv, mask, clip_eps, 0.0, n)
    return loss, clipped | {"kl": stats["kl"]}


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta, smoothing=0.0, n=None):
    """IPO (arXiv 2310.12036, Eq. 17): h is drawn to 1/(2β) and not to infinity. Log-probs are sums over tokens, as in DPO."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    h = (logp_w - logp_l) - (ref_w - ref_l)
    return (h - 1 / (2 * beta)).square().sum() / (len(h) if n is None else n), stats


RELATIVES = {
    "reinforce": (grpo, {"group_advantage": reward_itself, "grpo_loss": policy_gradient_loss}),
    "baseline": (grpo, {"group_advantage": leave_one_out_of_all, "grpo_loss": policy_gradient_loss}),
    "rloo": (grpo, {"group_advantage": leave_one_out, "grpo_loss": policy_gradient_loss}),
    "drgrpo": (grpo, {"group_advantage": centred, "grpo_loss": drgrpo_loss}),
    "gspo": (grpo, {"grpo_loss": gspo_loss}),
    "constant": (grpo, {"grpo_loss": drgrpo_loss}),
    "ipo": (dpo, {"dpo_loss": ipo_loss}),
}


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in RELATIVES:
        sys.exit(f"relatives.py: the first argument is one of {', '.join(RELATIVES)}")
    relative = sys.argv.pop(1)
    script, swapped = RELATIVES[relative]
    for name, function in swapped.items():
        setattr(script, name, function)
    script.__doc__ = f"{relative}: a relative of {script.__doc__.strip()}"                   # and its runs are not mistaken for the script's
    for flag, value in [("--out", f"out/{relative}")] + [("--nll", "0")] * (relative == "ipo"):
        sys.argv += [] if flag in sys.argv else [flag, value]
    main(script.train, script.Config)
