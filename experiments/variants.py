"""
Variants of the six algorithms, each written as what differs: functions of a few lines that replace
those of the script. Groups, minibatches, optimiser and flags stay the same.

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
import copy
import dataclasses
import functools
import inspect
import itertools
import math
import os
import sys
from collections import deque

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dapo  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from common import InputError, load  # noqa: E402
from common.data import (filter_rows, load_prompts, split_rows, tokenize_demonstration,  # noqa: E402
                         tokenize_rows)
from common.models import ensure_checkpoint, load_or_create_model, load_policy  # noqa: E402
from common.preferences import load_pairs  # noqa: E402
from common.rows import normalise, read_objects, read_rows  # noqa: E402
from common.run import main  # noqa: E402
from common.tokenizer import decode_responses, encode_response  # noqa: E402
from common.train import (batches, compute_logp, compute_reward, eval_batch_size,  # noqa: E402
                          freeze, micro_batches, pad_batch, pad_pairs)
from common.verifier import checked_score, is_right  # noqa: E402
from dapo import dapo_loss  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from grpo import grpo_loss  # noqa: E402
from model import autocast  # noqa: E402
from ppo import gae  # noqa: E402
from sft import sft_loss  # noqa: E402

# the imported functions stay the originals after `run` has replaced them in the scripts


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


def returns_to_go(reward, value, mask, gamma, lam):
    """REINFORCE++, in place of ppo.gae: A_t = Σ_{k >= t} R_k, the reward minus the KL penalty of this
    token and of those that follow. ppo.py whitens it over the rollout. The critic is still trained,
    and used for nothing but explained_var."""
    return gae(reward, torch.zeros_like(value), mask, gamma, 1.0)


class ProcessSupervision:
    """DeepSeekMath §4.1.3: a reward at the end of every step, and A_it is the sum of the normalised
    rewards of the steps that end at or after token t. A step is a running total of the built-in
    task, right or wrong given the prompt; the last step is the response, by the rule."""

    def compute_reward(self, cfg, reward_model, score, rows, tokens, mask, responses,
                       truncated_reward):
        """As in common/train.py. The rewards of the steps are kept for group_advantage."""
        outcome = compute_reward(cfg, reward_model, score, rows, tokens, mask, responses,
                                 truncated_reward)
        rows = [row for row in rows for _ in range(len(tokens) // len(rows))]
        self.step_reward = torch.zeros(mask.shape)                        # (B, T)
        self.is_step = torch.zeros(mask.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            first, *_, last = mask[i].nonzero()[:, 0].tolist() * 2        # columns of the response
            if responses[i] is not None:                                  # a truncated one: no steps
                for t, right in running_totals(row, tokens[i, first:last].tolist()):
                    self.step_reward[i, first + t] = right
                    self.is_step[i, first + t] = True
            self.step_reward[i, last] = outcome[0][i]
            self.is_step[i, last] = True
        return outcome

    def group_advantage(self, reward, group_size):
        return process_advantage(self.step_reward, self.is_step, group_size)


def running_totals(row, ids):
    """The running totals of a response to the built-in task, whose tokens are bytes: the index of the
    token that ends each, a comma or #, and 1.0 if the total is right."""
    if "_two_digits" not in row:
        raise InputError("process: only the built-in task has steps that are right or wrong")
    terms = [int(x) for x in row["prompt"][:-1].split("+")]
    expected = [f"{total:02d}" for total in itertools.accumulate(terms)][1:]
    found, total = [], ""
    for t, byte in enumerate(ids):
        char = chr(byte)
        if char == "#" and not found and not total:                       # no working is shown
            break
        if char in ",#":
            right = len(found) < len(expected) and total == expected[len(found)]
            found.append((t, float(right)))
            total = ""
        else:
            total += char
        if char == "#":
            break
    return found


def process_advantage(step_reward, is_step, group_size):
    """step_reward (B, T), 0 but at the steps' ends; is_step (B, T) bool -> adv (B, T). With one step
    a response it is group_advantage."""
    B, T = step_reward.shape
    r = step_reward.view(-1, group_size * T)                              # (P, G T)
    inside = is_step.view(-1, group_size * T)
    n = inside.sum(1, keepdim=True)                                       # steps of the group
    centred = torch.where(inside, r - r.sum(1, keepdim=True) / n, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (n - 1)).sqrt()
    highest = r.masked_fill(~inside, -math.inf).amax(1, keepdim=True)
    lowest = r.masked_fill(~inside, math.inf).amin(1, keepdim=True)
    normalised = torch.where(highest == lowest, 0.0, centred / (std + 1e-4)).view(B, T)
    return normalised.flip(1).cumsum(1).flip(1)                           # Σ over steps from t on


# ----------------------------------------------------------------------- losses of a policy gradient
# In place of grpo_loss and dapo_loss: the same arguments and statistics. Further arguments are flags.


def policy_gradient_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None,
                         sampler_logp=None):
    """-1/B Σ_i A_i Σ_t log π(o_it): a sum over tokens, without ratio, clip and KL penalty."""
    _, stats = grpo_loss(logp.detach(), old_logp, ref_logp, adv, mask, math.inf, 0.0,
                         sampler_logp=sampler_logp)
    if n is None:
        n = len(adv)
    logp = torch.where(mask > 0, logp, 0.0)
    loss = -(adv.view(len(adv), -1) * logp).sum() / n
    return loss, stats


def drgrpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None,
                max_new_tokens=24):
    """Dr. GRPO: every token is divided by one constant, the longest response, not by the length of
    its own. No KL penalty."""
    length = mask.sum(1, keepdim=True)
    weighted = adv.view(len(adv), -1) * length / max_new_tokens  # cancels the 1/|o_i| of grpo_loss
    return grpo_loss(logp, old_logp, ref_logp, weighted, mask, clip_eps, 0.0, n, sampler_logp)


def gspo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None):
    """GSPO, Eq. 5 and 7: one ratio per response, s_i = exp(1/|o_i| Σ_t log r_it). No KL penalty."""
    def response_mean(x):
        total = torch.where(mask > 0, x, 0.0).sum(1, keepdim=True)        # (B, 1)
        return (total / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(x)

    _, by_token = grpo_loss(logp.detach(), old_logp, ref_logp, adv, mask, clip_eps, 0.0, n,
                            sampler_logp)
    old = response_mean(old_logp)
    loss, stats = grpo_loss(response_mean(logp), old, old, adv, mask, clip_eps, 0.0, n)
    return loss, by_token | stats                           # the clipped shares are of responses


def cispo_loss(logp, old_logp, adv, mask, clip_low, clip_high, n=None, sampler_logp=None):
    """CISPO, Eq. 4 and 5: the ratio is a weight, clipped at 1 + clip_high and detached. So every
    token keeps a gradient, which DAPO's clip would remove. There is no lower bound. The statistics
    are the shares of tokens that DAPO's clip would cut."""
    _, stats = dapo_loss(logp.detach(), old_logp, adv, mask, clip_low, clip_high,
                         sampler_logp=sampler_logp)
    if n is None:
        n = mask.sum().clamp(min=1)
    logp = torch.where(mask > 0, logp, 0.0)
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    weight = (logp.detach() - old_logp).clamp(max=20).exp().clamp(max=1 + clip_high)
    loss = -(weight * adv.view(len(adv), -1) * logp).sum() / n            # 1/Σ_i |o_i| Σ_i Σ_t
    return loss, stats


def dppo_loss(logp, old_logp, adv, mask, clip_low, clip_high, n=None, sampler_logp=None):
    """DPPO with binary total variation: a token has no gradient where its probability has moved in
    the direction of its advantage by more than clip_high, up, or clip_low, down. A rare token keeps
    its gradient whatever its ratio."""
    _, stats = dapo_loss(logp.detach(), old_logp, adv, mask, clip_low, clip_high,
                         sampler_logp=sampler_logp)
    if n is None:
        n = mask.sum().clamp(min=1)
    logp = torch.where(mask > 0, logp, 0.0)
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    adv = adv.view(len(adv), -1)
    moved = logp.detach().exp() - old_logp.exp()                          # (B, T)  π - π_old
    cut = (moved > clip_high) & (adv > 0) | (moved < -clip_low) & (adv < 0)
    ratio = (logp - old_logp).clamp(max=20).exp()
    loss = -torch.where(cut, 0.0, ratio * adv * mask).sum() / n
    tokens = mask.sum().clamp(min=1)
    stats |= {"clip_low": (cut * (adv < 0) * mask).sum() / tokens,
              "clip_high": (cut * (adv > 0) * mask).sum() / tokens}
    return loss, stats


def sampler_weight(old_logp, sampler_logp, mask):
    """w = π_old / π_sampler of every token, (B, T): 1 where the sampler is the policy."""
    return torch.where(mask > 0, old_logp - sampler_logp, 0.0).clamp(max=20).exp()


def tis_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None,
             cap=2.0):
    """Truncated importance sampling: the surrogate of every token times min(w, cap)."""
    weight = sampler_weight(old_logp, sampler_logp, mask).clamp(max=cap)
    return grpo_loss(logp, old_logp, ref_logp, adv.view(len(adv), -1) * weight, mask, clip_eps,
                     kl_beta, n, sampler_logp)


def mis_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None,
             lowest=0.5, highest=2.0):
    """Masked importance sampling: times w, or 0 where w is not from lowest to highest."""
    weight = sampler_weight(old_logp, sampler_logp, mask)
    weight = torch.where((weight >= lowest) & (weight <= highest), weight, 0.0)
    return grpo_loss(logp, old_logp, ref_logp, adv.view(len(adv), -1) * weight, mask, clip_eps,
                     kl_beta, n, sampler_logp)


def stale_policy(cfg, device, stale=0):
    """In place of load_policy: a policy whose rollouts are sampled by its weights of `stale` rollouts
    ago. Evaluation, which is greedy or brings its own random numbers, sees the weights of now."""
    policy, tokenizer = load_policy(cfg, device)
    if not stale:
        return policy, tokenizer
    if cfg.resume:
        raise InputError("--stale: earlier weights are not in the checkpoint, so it cannot resume")
    generate, sampler = policy.generate, copy.deepcopy(policy)
    history = deque(maxlen=stale + 1)

    def generate_stale(prompts, group_size=1, max_new_tokens=64, temperature=1.0, uniform=None):
        if uniform is not None or temperature == 0:
            return generate(prompts, group_size, max_new_tokens, temperature, uniform=uniform)
        history.append(copy.deepcopy(policy.state_dict()))
        sampler.load_state_dict(history[0])
        return sampler.generate(prompts, group_size, max_new_tokens, temperature)

    policy.generate = generate_stale
    return policy, tokenizer


class Distillation:
    """On-policy distillation (GKD, Eq. 1, with the student's own samples and the reverse KL): the
    teacher takes the reference's place, and A_t = log π_teacher(y_t) - log π_old(y_t), each token for
    itself. kl_seq of the log is then the KL to the teacher. The reward is only logged."""

    def load_policy(self, cfg, device, teacher="out/grpo"):
        policy, tokenizer = load_policy(cfg, device)
        ensure_checkpoint(teacher, "grpo.py", "out/grpo", cfg.seed)
        self.teacher, own = load(teacher, device, "GPT")
        if own.name != tokenizer.name or self.teacher.cfg.vocab_size != policy.cfg.vocab_size:
            raise InputError(f"--teacher {teacher}: its tokenizer is {own.name}, the student's "
                             f"{tokenizer.name}; they must be the same")
        if self.teacher.cfg.block_size < policy.cfg.block_size:
            raise InputError(f"--teacher {teacher}: it reads {self.teacher.cfg.block_size} tokens, "
                             f"the student {policy.cfg.block_size}")
        return policy, tokenizer

    def freeze(self, model, bf16=True):
        """In place of the copy that grpo.py makes of the policy."""
        return freeze(self.teacher, bf16)


def distillation_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None,
                      sampler_logp=None, max_new_tokens=24):
    """A surrogate whose expected gradient at the first update is that of KL(π(.|s) ‖ teacher(.|s)),
    summed over the states s that the student visits and divided by max_new_tokens."""
    adv = torch.where(mask > 0, ref_logp - old_logp, 0.0)                 # (B, T)
    return drgrpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, 0.0, n, sampler_logp,
                       max_new_tokens)


class Replay:
    """PPO-ptx: to the gradient of every update add sft_coef times that of the SFT loss on as many
    demonstrations as the update has responses. --resume begins with the first demonstrations."""

    def load_policy(self, cfg, device, replay="", sft_coef=1.0):
        if cfg.data and not replay:
            raise InputError("--replay: needs a file of demonstrations, as --data is not built in")
        self.policy, tokenizer = load_policy(cfg, device)
        self.sft_coef = sft_coef
        if replay:
            rows = read_rows(replay, "prompt", "response")
        else:
            rows = sft.demonstrations(cfg.seed)[0]
        rows = tokenize_rows(rows, tokenizer, lambda row: tokenize_demonstration(row, tokenizer))
        block_size = self.policy.cfg.block_size
        reason = f"longer than the model's {block_size} tokens"
        rows = filter_rows(rows, lambda row: len(row["tokens"]) <= block_size, reason)
        self.batches = batches(rows, cfg.minibatch, cfg.seed)
        return self.policy, tokenizer

    def micro_batches(self, mask, rows, micro_batch_tokens, device):
        """Those of the update; before the first of them, the demonstrations' gradient."""
        demonstrations = next(self.batches)
        tokens, chosen = pad_batch([row["tokens"] for row in demonstrations],
                                   [row["mask"] for row in demonstrations])
        n = int(chosen.sum())
        tokens, chosen_dev = tokens.to(device), chosen.to(device)
        every_row = torch.arange(len(tokens))
        for part, width, index in micro_batches(chosen, every_row, micro_batch_tokens, device):
            with autocast(self.policy):
                logp, _ = self.policy.token_logp(tokens[part, :width], index=index)
            loss, _ = sft_loss(logp, chosen_dev[part, :width], n)
            (self.sft_coef * loss).backward()
        yield from micro_batches(mask, rows, micro_batch_tokens, device)


# ------------------------------------------------------------------------------ losses of preferences
# In place of dpo_loss. Log-probs (P,) are sums over tokens, as in DPO, or means (mean_logp).
# label_smoothing is not used.


def mean_logp(logp, mask):
    """In place of sequence_logp: the mean over the tokens of each response, (B,)."""
    return torch.where(mask > 0, logp, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """IPO, Eq. 17: draws h to 1 / (2β), where DPO draws it to infinity."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    h = (logp_w - logp_l) - (ref_w - ref_l)                               # (P,)
    if n is None:
        n = len(h)
    return (h - 1 / (2 * beta)).square().sum() / n, stats


def simpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None, gamma_ratio=0.5):
    """SimPO, Eq. 6: -log σ(β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ), γ = gamma_ratio β. Log-probs
    are means; no reference."""
    _, stats = dpo_loss(logp_w, logp_l, 0 * ref_w, 0 * ref_l, beta)
    margin = beta * (logp_w - logp_l) - gamma_ratio * beta                # (P,)
    if n is None:
        n = len(margin)
    return -F.logsigmoid(margin).sum() / n, stats


def orpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """ORPO, Eq. 6 and 7: -log P(y_w) - β log σ(log odds(y_w) - log odds(y_l)), β being the paper's
    λ, P = exp(mean log-prob) and odds = P / (1 - P). No reference."""
    _, stats = dpo_loss(logp_w, logp_l, 0 * ref_w, 0 * ref_l, beta)
    log_odds_ratio = log_odds(logp_w) - log_odds(logp_l)                  # (P,)
    if n is None:
        n = len(logp_w)
    return (-logp_w - beta * F.logsigmoid(log_odds_ratio)).sum() / n, stats


def log_odds(logp):
    """log P/(1 - P) of P = exp(logp). 1 - P is -expm1(logp), exact also where P is near 1; P stays
    1e-6 below 1, or the odds would be infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-torch.expm1(logp)).log()


class KTO:
    """KTO, Eq. 7 and 8. Each row holds a desirable and an undesirable response, of one prompt if the
    data are pairs, else of two; the rarer label is repeated, so λ_D = λ_U = 1.

        L = mean over responses of 1 - v,   v = σ(β (h - z0)) or, if undesirable, σ(β (z0 - h))

    with h = log π/π_ref of the response and z0 = max(0, mean of h over mismatched prompts and
    responses of the batch), without gradient."""

    def load_policy(self, cfg, device):
        self.policy, tokenizer = load_policy(cfg, device)
        self.reference = freeze(copy.deepcopy(self.policy))
        self.cfg = cfg
        return self.policy, tokenizer

    def load_pairs(self, path, test_path, tokenizer, block_size):
        """Preferences, or rows {"prompt", "completion", "label"}."""
        if not any("label" in row for _, row in itertools.islice(read_objects(path), 1)):
            return load_pairs(path, test_path, tokenizer, block_size)
        splits = split_rows(read_labelled(path), read_labelled(test_path) if test_path else None)
        return [pair_labels(rows, tokenizer, block_size) for rows in splits]

    def pad_pairs(self, rows):
        """As in common/train.py. z0 of these rows is kept for the loss."""
        tokens, mask = mismatched(rows, self.policy.cfg.block_size)
        tokens = tokens.to(self.policy.device)
        h = 0.0
        for sign, model in ((1, self.policy), (-1, self.reference)):
            logp = compute_logp(model, tokens, mask, 1.0, self.cfg.micro_batch_tokens)
            h = h + sign * logp.sum(1)                                    # (2 P,)
        self.z0 = h.mean().clamp(min=0)
        return pad_pairs(rows)

    def dpo_loss(self, logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
        z0 = self.z0.to(logp_w.device)
        return kto_loss(logp_w, logp_l, ref_w, ref_l, beta, z0, n)


def kto_loss(logp_w, logp_l, ref_w, ref_l, beta, z0, n=None):
    """The mean of 1 - v over P desirable (w) and P undesirable (l) responses."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    v_w = torch.sigmoid(beta * (logp_w - ref_w - z0))                     # (P,)
    v_l = torch.sigmoid(beta * (z0 - (logp_l - ref_l)))
    if n is None:
        n = len(v_w)
    loss = ((1 - v_w) + (1 - v_l)).sum() / (2 * n)
    return loss, stats | {"z0": z0}


def mismatched(rows, block_size):
    """tokens, mask (N, T): each prompt of the rows with a response to another one. N is 2 P, less what
    does not fit, and what has no other prompt."""
    examples = []                                                         # prompt ids, response ids
    for row in rows:
        for tokens, mask in zip(row["tokens"], row["mask"]):
            start = len(mask) - sum(mask)
            examples.append((tokens[:start], tokens[start:]))
    sequences, masks = [], []
    for i, (prompt, _) in enumerate(examples):
        for j in range(i + 1, i + len(examples)):
            other, response = examples[j % len(examples)]
            if other != prompt and len(prompt + response) <= block_size:
                sequences.append(prompt + response)
                masks.append([0] * len(prompt) + [1] * len(response))
                break
    if not sequences:
        raise InputError("kto: the KL needs a batch of at least two prompts")
    return pad_batch(sequences, masks)


def read_labelled(path):
    """Rows {"prompt", "completion", "label"} -> demonstrations with a "label", true or false."""
    rows = []
    for location, raw in read_objects(path):
        label = raw.pop("label", None)
        if label not in (True, False):
            raise InputError(f'{location}: field "label" must be true or false, not {label!r}')
        rows.append(normalise(raw, location, ("prompt", "response")) | {"label": bool(label)})
    rows = filter_rows(rows, lambda row: "_dropped" not in row, "see docs/data_and_models.md")
    return filter_rows(rows, lambda row: row["response"].strip(), "the completion is empty")


def pair_labels(rows, tokenizer, block_size):
    """Each desirable response beside an undesirable one, of another prompt; the rarer label is
    repeated."""
    def encode(row):
        tokens, mask = encode_response(tokenizer, row, row["response"])
        return row | {"tokens": tokens, "mask": mask}

    rows = tokenize_rows(rows, tokenizer, encode, need=False)
    reason = f"longer than the model's {block_size} tokens"
    rows = filter_rows(rows, lambda row: len(row["tokens"]) <= block_size, reason, need=False)
    good = [row for row in rows if row["label"]]
    bad = [row for row in rows if not row["label"]]
    if not good or not bad:
        return []
    pairs = []
    for i in range(max(len(good), len(bad))):
        w, l = good[i % len(good)], bad[i % len(bad)]
        pairs.append(w | {"tokens": (w["tokens"], l["tokens"]), "mask": (w["mask"], l["mask"]),
                          "chosen": w["response"], "rejected": l["response"]})
    return pairs


# ----------------------------------------------------------------------------------- expert iteration


def load_initial(cfg, device):
    """In place of load_or_create_model: runs sft.py first if the default --init is missing."""
    ensure_checkpoint(cfg.init, "sft.py", "out/sft", cfg.seed)
    return load_or_create_model(cfg, device)


def sampled_demonstrations(cfg, tokenizer, block_size, built_in, sampler="", prompts=1600, skip=0,
                           samples=8, keep=4, control=False):
    """In place of load_demonstrations: sample responses to prompts from the policy `sampler` (""
    means --init), and keep of each prompt at most `keep` distinct ones that are right. control: keep as
    many random ones. Held-out rows are the built-in ones, or sampled too."""
    policy, _ = load(sampler or cfg.init, kind="GPT")
    splits = load_prompts(cfg, tokenizer, sft.score, block_size)
    generator = torch.Generator().manual_seed(cfg.seed)
    demonstrations = []
    for i, rows in enumerate(splits):
        if i and built_in:
            demonstrations.append([tokenize_demonstration(row, tokenizer) for row in built_in[i]])
            continue
        rows = rows[skip:skip + prompts] if i == 0 else rows
        kept = []
        for row, texts in zip(rows, sample_texts(policy, tokenizer, rows, samples, cfg, generator)):
            kept += keep_right(row, texts, keep, control, generator)
        if i == 0:
            print(f"expert iteration: {len(kept)} responses kept of {len(rows) * samples}")
        demonstrations.append([tokenize_demonstration(row, tokenizer) for row in kept])
    return demonstrations


def keep_right(row, texts, keep, control, generator):
    """At most `keep` distinct right responses to one prompt, as rows; control: as many of all that
    ended, drawn at random."""
    ended = [text for text in texts if text]
    right = {text: None for text in ended if is_right(checked_score(sft.score, row, text))}
    kept = list(right)[:keep]
    if control:
        order = torch.randperm(len(ended), generator=generator).tolist()
        kept = [ended[i] for i in order[:len(kept)]]
    return [row | {"response": text} for text in kept]


def sample_texts(policy, tokenizer, rows, samples, cfg, generator):
    """`samples` responses at temperature 1 to each row -> a list of texts each, None if truncated."""
    uniform = torch.rand(len(rows) * samples, cfg.max_new_tokens, generator=generator,
                         dtype=torch.float64)
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new_tokens
    size = eval_batch_size(policy, longest, samples)                      # prompts at a time
    texts = []
    for i in range(0, len(rows), size):
        ids = [row["ids"] for row in rows[i:i + size]]
        tokens, mask, _ = policy.generate(ids, samples, cfg.max_new_tokens,
                                          uniform=uniform[i * samples:(i + size) * samples])
        texts += decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
    return [texts[i:i + samples] for i in range(0, len(texts), samples)]


# ------------------------------------------------------------------------------------------ the table

process, distillation, replay, kto = ProcessSupervision(), Distillation(), Replay(), KTO()
# name: script, and the functions that are replaced in it
VARIANTS = {
    "reinforce": (grpo, {"group_advantage": no_baseline, "grpo_loss": policy_gradient_loss}),
    "baseline": (grpo, {"group_advantage": batch_baseline, "grpo_loss": policy_gradient_loss}),
    "rloo": (grpo, {"group_advantage": rloo_advantage, "grpo_loss": policy_gradient_loss}),
    "drgrpo": (grpo, {"group_advantage": centred_advantage, "grpo_loss": drgrpo_loss}),
    "constant": (grpo, {"grpo_loss": drgrpo_loss}),
    "gspo": (grpo, {"grpo_loss": gspo_loss}),
    "process": (grpo, {"compute_reward": process.compute_reward,
                       "group_advantage": process.group_advantage}),
    "distill": (grpo, {"load_policy": distillation.load_policy, "freeze": distillation.freeze,
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
                  "pad_pairs": kto.pad_pairs, "dpo_loss": kto.dpo_loss}),
    "simpo": (dpo, {"sequence_logp": mean_logp, "dpo_loss": simpo_loss}),
    "orpo": (dpo, {"sequence_logp": mean_logp, "dpo_loss": orpo_loss}),
    "expert": (sft, {"load_or_create_model": load_initial,
                     "load_demonstrations": sampled_demonstrations}),
}
# flags of the script that have another default
FLAGS = {
    "distill": {"kl_beta": 1.0},                            # not 0, or there is no reference
    "stale": {"stale": 4},
    "dppo": {"clip_low": 0.2, "clip_high": 0.2},
    "ipo": {"sft_coef": 0.0},
    "kto": {"sft_coef": 0.0, "lr": 5e-5},
    "simpo": {"sft_coef": 0.0, "lr": 5e-5, "beta": 2.0},
    "orpo": {"sft_coef": 0.0},
    "expert": {"init": "out/sft", "steps": 100, "lr": 3e-4},
}
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


def further_arguments(function, replaced):
    """The arguments that a function has beyond those of the one that it replaces: {name: default}."""
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

    def train(cfg):
        for function_name, function in replacements.items():
            replaced = getattr(script, function_name)
            values = {flag: getattr(cfg, flag) for flag in further_arguments(function, replaced)}
            setattr(script, function_name, functools.partial(function, **values))
        script.train(cfg)

    main(train, make_config(name))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
    elif sys.argv[1] in VARIANTS:
        run(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(f"variants.py: {sys.argv[1]!r} is not a variant; these are: {', '.join(VARIANTS)}")
