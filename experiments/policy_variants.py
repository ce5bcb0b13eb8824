"""
Variants of grpo.py, dapo.py and ppo.py: functions and small classes that replace functions of the
scripts. variants.py runs them and says which replaces what.
"""
import copy
import itertools
import math
import os
import sys
from collections import deque

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import InputError, load  # noqa: E402
from common.data import load_prompts, tokenize_demonstrations  # noqa: E402
from common.models import ensure_checkpoint, load_policy  # noqa: E402
from common.rows import read_rows  # noqa: E402
from common.train import (batches, compute_reward, freeze, measure_reward,  # noqa: E402
                          micro_batches, pad_batch)
from common.verifier import checked_score  # noqa: E402
from dapo import dapo_loss  # noqa: E402
from grpo import grpo_loss  # noqa: E402
from model import autocast  # noqa: E402
from ppo import gae  # noqa: E402
from sft import demonstrations, sft_loss  # noqa: E402

# variants.py replaces functions in the scripts; the names imported here stay the originals


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
    """REINFORCE++, in place of ppo.gae: A_t = Σ_{k >= t} γ^(k-t) R_k, the reward minus the KL
    penalty of this token and of those that follow. ppo.py whitens it over the rollout. The critic
    is still trained, but only explained_var uses it."""
    return gae(reward, torch.zeros_like(value), mask, gamma, 1.0)


class ProcessSupervision:
    """DeepSeekMath §4.1.3: a reward at the end of every step, and A_it is the sum of the normalised
    rewards of the steps that end at or after token t. A step is a running total of the built-in
    task, right or wrong given the prompt; the last step is the response, by the rule."""

    def load_policy(self, cfg, device):
        policy, tokenizer = load_policy(cfg, device)
        if cfg.data or tokenizer.name != "bytes":
            raise InputError("process: steps are known for the built-in task alone, without --data "
                             "and with bytes as tokens")
        return policy, tokenizer

    def compute_reward(self, cfg, reward_model, score, rows, tokens, mask, responses,
                       truncated_reward):
        """As in common/train.py. The rewards of the steps are kept for group_advantage."""
        reward, raw, correct = compute_reward(cfg, reward_model, score, rows, tokens, mask,
                                              responses, truncated_reward)
        group_size = len(responses) // len(rows)
        self.step_reward = torch.zeros(mask.shape)                        # (B, T)
        self.is_step = torch.zeros(mask.shape, dtype=torch.bool)
        for i, text in enumerate(responses):
            columns = mask[i].nonzero()[:, 0]                             # of the response
            first, last = int(columns[0]), int(columns[-1])
            if text is not None:                                          # if truncated: no steps
                row, ids = rows[i // group_size], tokens[i, first:last].tolist()
                for t, right in running_totals(row, ids):
                    self.step_reward[i, first + t] = right
                    self.is_step[i, first + t] = True
            self.step_reward[i, last] = reward[i]
            self.is_step[i, last] = True
        return reward, raw, correct

    def group_advantage(self, reward, group_size):
        return process_advantage(self.step_reward, self.is_step, group_size)


def running_totals(row, ids):
    """The running totals of a response to the built-in task, whose tokens are bytes: the index of
    the token that ends each, a comma or #, and 1.0 if the total is right."""
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
    """step_reward (B, T), 0 except where a step ends; is_step (B, T) bool -> adv (B, T). With one
    step per response it equals group_advantage."""
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


# ------------------------------------------------------------------------------------------- losses
# In place of grpo_loss and dapo_loss: the same arguments and statistics. Further arguments are
# flags.


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
    """Dr. GRPO: every token is divided by one constant, max_new_tokens, not by the length of its
    response. No KL penalty."""
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
    adv = adv.view(len(adv), -1)
    moved = logp.detach().exp() - old_logp.exp()                          # (B, T)  π - π_old
    cut_high = (moved > clip_high) & (adv > 0)
    cut_low = (moved < -clip_low) & (adv < 0)
    kept = torch.where(cut_high | cut_low, 0.0, adv)                      # (B, T)
    loss, stats = dapo_loss(logp, old_logp, kept, mask, math.inf, math.inf, n, sampler_logp)
    tokens = mask.sum().clamp(min=1)
    return loss, stats | {"clip_low": (cut_low * mask).sum() / tokens,
                          "clip_high": (cut_high * mask).sum() / tokens}


def sampler_weight(old_logp, sampler_logp, mask):
    """w = π_old / π_sampler of every token, (B, T): 1 where the sampler is the policy."""
    return torch.where(mask > 0, old_logp - sampler_logp, 0.0).clamp(max=20).exp()


def weighted_loss(exact, weight, logp, old_logp, ref_logp, adv, mask, *more):
    """grpo_loss with the surrogate of every token times `weight`, (B, T). Two more statistics: the
    mean weight, and the share of tokens whose weight is not the `exact` one."""
    weighted = adv.view(len(adv), -1) * weight
    loss, stats = grpo_loss(logp, old_logp, ref_logp, weighted, mask, *more)
    tokens = mask.sum().clamp(min=1)
    return loss, stats | {"weight": (weight * mask).sum() / tokens,
                          "weight_cut": ((weight != exact) * mask).sum() / tokens}


def tis_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None,
             cap=2.0):
    """Truncated importance sampling: the surrogate of every token times min(w, cap)."""
    exact = sampler_weight(old_logp, sampler_logp, mask)
    weight = exact.clamp(max=cap)
    return weighted_loss(exact, weight, logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n,
                         sampler_logp)


def mis_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None,
             lowest=0.5, highest=2.0):
    """Masked importance sampling: times w, or 0 where w is not from lowest to highest."""
    exact = sampler_weight(old_logp, sampler_logp, mask)
    weight = torch.where((exact >= lowest) & (exact <= highest), exact, 0.0)
    return weighted_loss(exact, weight, logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n,
                         sampler_logp)


def stale_policy(cfg, device, stale=0):
    """In place of load_policy: a policy whose rollouts are sampled by its weights of `stale`
    rollouts ago. Evaluation, which is greedy or brings its own random numbers, sees the weights of
    now. The log's kl is then a mean over the sampler's responses, no KL of the policy."""
    policy, tokenizer = load_policy(cfg, device)
    if not stale:
        return policy, tokenizer
    if cfg.resume:
        raise InputError("--stale: earlier weights are not in the checkpoint, so it cannot resume")
    sampler = copy.deepcopy(policy)
    generate = policy.generate                                            # by the current weights
    history = deque(maxlen=stale + 1)                                     # the oldest one samples

    def generate_stale(prompts, group_size=1, max_new_tokens=64, temperature=1.0, uniform=None):
        if uniform is not None or temperature == 0:
            return generate(prompts, group_size, max_new_tokens, temperature, uniform=uniform)
        history.append(copy.deepcopy(policy.state_dict()))
        sampler.load_state_dict(history[0])
        return sampler.generate(prompts, group_size, max_new_tokens, temperature)

    policy.generate = generate_stale
    return policy, tokenizer


class Distillation:
    """On-policy distillation (GKD with the student's own samples and the reverse KL): the teacher
    takes the reference's place, and A_t = log π_teacher(y_t) - log π_old(y_t), each token for
    itself. kl_seq of the log is then the KL to the teacher. The reward is only logged, so prompts
    need no answers."""

    def load_policy(self, cfg, device, teacher="out/grpo"):
        if cfg.ref_every:
            raise InputError(f"--ref_every {cfg.ref_every}: the teacher does not move")
        policy, tokenizer = load_policy(cfg, device)
        if not cfg.data:
            ensure_checkpoint(teacher, "grpo.py", "out/grpo", cfg.seed)
        self.teacher, own = load(teacher, device, "GPT")
        theirs, ours = self.teacher.cfg, policy.cfg
        for what, its, needed in (("tokenizer", own.name, tokenizer.name),
                                  ("chat", own.turns, tokenizer.turns),
                                  ("system message", own.system, tokenizer.system),
                                  ("vocab_size", theirs.vocab_size, ours.vocab_size)):
            if its != needed:
                raise InputError(f"--teacher {teacher}: made for {what} {its!r}, the student has "
                                 f"{needed!r}")
        if theirs.block_size < ours.block_size:
            raise InputError(f"--teacher {teacher}: it reads {theirs.block_size} tokens, the "
                             f"student {ours.block_size}")
        return policy, tokenizer

    def load_prompts(self, cfg, tokenizer, score, block_size, need_answer=True, eval_prompts=0):
        """Also those without an answer."""
        return load_prompts(cfg, tokenizer, score, block_size, False, eval_prompts)

    def measure_reward(self, cfg, policy, tokenizer, reward_model, score, rows):
        """As in common/train.py; 1 and 0 where there are no answers."""
        if self.has_answers(score, rows):
            return measure_reward(cfg, policy, tokenizer, reward_model, score, rows)
        return {"reward_std": 1.0, "truncated_reward": 0.0}

    def compute_reward(self, cfg, reward_model, score, rows, tokens, mask, responses,
                       truncated_reward):
        """As in common/train.py; zeros where there are no answers."""
        if self.has_answers(score, rows):
            return compute_reward(cfg, reward_model, score, rows, tokens, mask, responses,
                                  truncated_reward)
        return torch.zeros(len(responses)), torch.zeros(len(responses)), None

    def has_answers(self, score, rows):
        return all(checked_score(score, row, "", need=False) is not None for row in rows)

    def group_advantage(self, reward, group_size):
        """Not used by the loss. Nonzero, because every response has a gradient."""
        return torch.ones_like(reward)

    def make_reference(self, policy, moves=False):
        """The teacher, in place of the copy that grpo.py makes of the policy."""
        return freeze(self.teacher)


def distillation_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None,
                      sampler_logp=None, max_new_tokens=24):
    """A surrogate whose expected gradient at the first update is that of KL(π(.|s) ‖ teacher(.|s)),
    summed over the states s that the student visits and divided by max_new_tokens."""
    adv = torch.where(mask > 0, ref_logp - old_logp, 0.0)                 # (B, T)
    return drgrpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, 0.0, n, sampler_logp,
                       max_new_tokens)


class Replay:
    """PPO-ptx: to the gradient of every update add sft_coef times that of the SFT loss on as many
    demonstrations as the update has responses. --resume starts again from the first ones."""

    def load_policy(self, cfg, device, replay="", sft_coef=1.0):
        if cfg.data and not replay:
            raise InputError("--replay: needs a file of demonstrations, as --data is not built in")
        self.policy, tokenizer = load_policy(cfg, device)
        self.sft_coef = sft_coef
        if replay:
            rows = read_rows(replay, "prompt", "response")
        else:
            rows = demonstrations(cfg.seed)[0]
        rows = tokenize_demonstrations(rows, tokenizer, self.policy.cfg.block_size)
        self.batches = batches(rows, cfg.minibatch, cfg.seed)
        return self.policy, tokenizer

    def micro_batches(self, mask, rows, micro_batch_tokens, device):
        """Those of the update; before the first of them, the demonstrations' gradient."""
        batch = next(self.batches)
        tokens, chosen = pad_batch([row["tokens"] for row in batch],
                                   [row["mask"] for row in batch])
        n = int(chosen.sum())
        tokens, chosen_dev = tokens.to(device), chosen.to(device)
        every_row = torch.arange(len(tokens))
        for part, width, index in micro_batches(chosen, every_row, micro_batch_tokens, device):
            with autocast(self.policy):
                logp, _ = self.policy.token_logp(tokens[part, :width], index=index)
            loss, _ = sft_loss(logp, chosen_dev[part, :width], n)
            (self.sft_coef * loss).backward()
        yield from micro_batches(mask, rows, micro_batch_tokens, device)
