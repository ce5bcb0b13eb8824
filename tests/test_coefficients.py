"""Every algorithm here is ∇ = E[ Σ_t GC_t ∇ log π(y_t) ] (2402.03300, §5.2): the table of
coefficients in docs/algorithms.md, each row against autograd.
python -m pytest tests/test_coefficients.py"""
import math
import os
import re

import pytest
import torch
from torch.autograd import grad

from conftest import ROOT
from dapo import dapo_loss
from dpo import dpo_loss
from grpo import grpo_loss
from policy_variants import (cispo_loss, distillation_loss, dppo_loss, drgrpo_loss, gspo_loss,
                             mis_loss, policy_gradient_loss, tis_loss)
from ppo import ppo_loss
from preference_variants import ipo_loss, kto_loss, mean_logp, orpo_loss, simpo_loss
from sft import sft_loss

B, T = 6, 7
LOW, HIGH, BETA, DELTA = 0.2, 0.28, 0.1, 0.05


def ragged(seed=0):
    """logp, old_logp, ref_logp, mask (B, T) and adv (B,): random, with some ratios beyond every
    clip, and responses of 1 to 6 tokens behind prompts."""
    torch.manual_seed(seed)
    old = -torch.rand(B, T).double() * 3
    logp = (old + 0.4 * torch.randn(B, T)).clamp(max=-0.01).requires_grad_()
    ref = old + 0.3 * torch.randn(B, T)
    mask = torch.zeros(B, T).double()
    for i in range(B):
        mask[i, 1:2 + i] = 1
    return logp, old, ref, mask, torch.randn(B).double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def clipped(ratio, adv, low, high):
    return adv > 0 and ratio > 1 + high or adv < 0 and ratio < 1 - low


def slopes(loss, logp):
    """d(-loss)/d logp, whose rows the table has."""
    return -grad(loss, logp, retain_graph=True)[0]


def expected(coefficient, mask):
    out = torch.zeros(B, T).double()
    for i in range(B):
        for t in range(T):
            if mask[i, t]:
                out[i, t] = coefficient(i, t)
    return out


def rows(seed=0, change=0.0):
    """name: the loss, and the coefficient of token t of response i by its formula; change (B, T) is
    added to logp."""
    logp, old, ref, mask, adv = ragged(seed)
    logp = (logp + change).detach().requires_grad_()
    x, A = logp.detach(), adv.tolist()
    length, tokens = mask.sum(1).tolist(), mask.sum().item()
    ratio = (x - old).exp()
    per_token_adv = torch.randn(B, T).double()

    def surrogate(i, t, a, low, high):
        return 0.0 if clipped(ratio[i, t], a, low, high) else a * ratio[i, t]

    def of_sequence(i):                                        # GSPO's s_i
        return math.exp(((x - old) * mask)[i].sum() / length[i])

    def probability_moved(i, t):
        moved = x[i, t].exp() - old[i, t].exp()
        return A[i] > 0 and moved > DELTA or A[i] < 0 and moved < -DELTA

    longest = 24                                               # max_new_tokens
    sampler = old + 0.5 * torch.randn(B, T)
    w = (old - sampler).exp()
    kept = torch.tensor([1., 0, 1, 1, 0, 1]).double()          # right responses
    return {
        "SFT": (sft_loss(logp, mask)[0], lambda i, t: 1 / tokens),
        "Expert iteration": (sft_loss(logp, mask * kept[:, None])[0],
                             lambda i, t: kept[i] / sum(k * n for k, n in zip(kept, length))),
        "Distillation": (distillation_loss(logp, old, ref, adv, mask, LOW, BETA)[0],
                         lambda i, t: surrogate(i, t, (ref - old)[i, t], LOW, LOW) / longest / B),
        "TIS": (tis_loss(logp, old, ref, adv, mask, LOW, 0.0, None, sampler)[0],
                lambda i, t: min(w[i, t], 2.0) * surrogate(i, t, A[i], LOW, LOW) / length[i] / B),
        "MIS": (mis_loss(logp, old, ref, adv, mask, LOW, 0.0, None, sampler)[0],
                lambda i, t: (w[i, t] if 0.5 <= w[i, t] <= 2 else 0.0)
                * surrogate(i, t, A[i], LOW, LOW) / length[i] / B),
        "PPO": (ppo_loss(logp, old, per_token_adv, mask, LOW)[0],
                lambda i, t: surrogate(i, t, per_token_adv[i, t], LOW, LOW) / tokens),
        "GRPO": (grpo_loss(logp, old, ref, adv, mask, LOW, BETA)[0],
                 lambda i, t: (surrogate(i, t, A[i], LOW, LOW)
                               + BETA * ((ref - x)[i, t].exp() - 1)) / length[i] / B),
        "Dr. GRPO": (drgrpo_loss(logp, old, ref, adv, mask, LOW, BETA)[0],
                     lambda i, t: surrogate(i, t, A[i], LOW, LOW) / longest / B),
        "GSPO": (gspo_loss(logp, old, ref, adv, mask, LOW, BETA)[0],
                 lambda i, t: 0.0 if clipped(of_sequence(i), A[i], LOW, LOW)
                 else A[i] * of_sequence(i) / length[i] / B),
        "REINFORCE, RLOO": (policy_gradient_loss(logp, old, ref, adv, mask, LOW, BETA)[0],
                            lambda i, t: A[i] / B),
        "DAPO": (dapo_loss(logp, old, adv, mask, LOW, HIGH)[0],
                 lambda i, t: surrogate(i, t, A[i], LOW, HIGH) / tokens),
        "CISPO": (cispo_loss(logp, old, adv, mask, LOW, HIGH)[0],
                  lambda i, t: A[i] * min(ratio[i, t], 1 + HIGH) / tokens),
        "DPPO": (dppo_loss(logp, old, adv, mask, DELTA, DELTA)[0],
                 lambda i, t: 0.0 if probability_moved(i, t) else A[i] * ratio[i, t] / tokens),
    }, logp, mask


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_weighs_the_score_of_each_token_by_its_row_of_the_table(seed):
    table, logp, mask = rows(seed)
    for name, (loss, coefficient) in table.items():
        found = slopes(loss, logp)
        torch.testing.assert_close(found, expected(coefficient, mask), rtol=0, atol=1e-12, msg=name)


def test_the_statistics_of_dppo_and_of_weights_are_shares_of_the_tokens_in_the_mask():
    logp, old, ref, mask, _ = ragged()
    adv = torch.tensor([1., 1, 1, -1, 1, -1]).double()
    sampler = old + 0.5 * torch.randn(B, T)
    inside = mask.nonzero().tolist()
    count = {"low": 0, "high": 0, "capped": 0, "masked": 0}
    capped, masked = [], []
    for i, t in inside:
        moved = (logp[i, t].exp() - old[i, t].exp()).item()
        count["low"] += adv[i].item() < 0 and moved < -DELTA
        count["high"] += adv[i].item() > 0 and moved > 2 * DELTA
        w = math.exp(old[i, t] - sampler[i, t])
        capped.append(min(w, 1.5))
        masked.append(w if 0.8 <= w <= 1.2 else 0.0)
        count["capped"] += w > 1.5
        count["masked"] += not 0.8 <= w <= 1.2
    share = {name: n / len(inside) for name, n in count.items()}
    assert min(count.values()) > 0 and count["low"] != count["high"]
    _, stats = dppo_loss(logp, old, adv, mask, DELTA, 2 * DELTA)
    assert stats["clip_low"] == pytest.approx(share["low"])
    assert stats["clip_high"] == pytest.approx(share["high"])
    grpo_arguments = logp.detach(), old, ref, adv, mask, LOW, BETA, None, sampler
    for found, used, cut in ((tis_loss(*grpo_arguments, 1.5), capped, share["capped"]),
                             (mis_loss(*grpo_arguments, 0.8, 1.2), masked, share["masked"])):
        assert found[1]["weight"].item() == pytest.approx(sum(used) / len(used))
        assert found[1]["weight_cut"].item() == pytest.approx(cut)


@pytest.mark.parametrize("name", ["DPPO", "GRPO", "DAPO", "GSPO", "TIS", "Distillation"])
def test_the_slope_of_a_loss_is_its_finite_difference(name):
    """For losses without a detached weight, where no clip is within a step."""
    def loss_at(change):
        table, logp, mask = rows(change=change)
        return table[name][0], logp, mask

    loss, logp, mask = loss_at(torch.zeros(B, T).double())
    found, step = slopes(loss, logp), 1e-6
    for i, t in mask.nonzero().tolist():
        change = torch.zeros(B, T).double()
        change[i, t] = step
        difference = (loss_at(-change)[0] - loss_at(change)[0]).item() / (2 * step)
        assert math.isclose(found[i, t], difference, rel_tol=1e-5, abs_tol=1e-8), (i, t)


def test_the_random_batches_reach_every_case_of_the_clips():
    cut = {"ratio": 0, "probability": 0, "weight": 0}
    for seed in range(3):
        logp, old, _, mask, adv = ragged(seed)
        ratio, moved = (logp - old).exp(), logp.exp() - old.exp()
        up = (adv[:, None] > 0) & (mask > 0)
        cut["ratio"] += (up & (ratio > 1 + HIGH)).sum()
        cut["probability"] += (up & (moved > DELTA)).sum()
        cut["weight"] += ((mask > 0) & (ratio > 1 + HIGH)).sum()
    assert min(cut.values()) > 2


@pytest.mark.parametrize("loss_function, slope", [
    (dpo_loss, lambda h: BETA * sigmoid(-BETA * h)),
    (ipo_loss, lambda h: 2 * (1 / (2 * BETA) - h))])
def test_a_pair_pulls_its_two_responses_apart_by_one_coefficient(loss_function, slope):
    """Of all tokens of the chosen response, and of the rejected one with the other sign."""
    logp, _, ref, mask, _ = ragged()
    total, ref_total = (logp * mask).sum(1), (ref * mask).sum(1)
    h = (total[0::2] - ref_total[0::2]) - (total[1::2] - ref_total[1::2])
    loss, _ = loss_function(total[0::2], total[1::2], ref_total[0::2], ref_total[1::2], BETA)
    found = slopes(loss, logp)
    sign = (1, -1)
    wanted = expected(lambda i, t: sign[i % 2] * slope(h[i // 2].item()) / (B // 2), mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_kto_pulls_every_response_by_a_coefficient_of_its_own():
    """± β v (1 - v), v by the distance of h from z0: those that are far from it move least."""
    logp, _, ref, mask, _ = ragged()
    z0 = 0.3
    total, ref_total = (logp * mask).sum(1), (ref * mask).sum(1)
    h = (total - ref_total).tolist()
    pairs = total[0::2], total[1::2], ref_total[0::2], ref_total[1::2]
    loss, _ = kto_loss(*pairs, BETA, z0)

    def coefficient(i, t):
        sign = (1, -1)[i % 2]
        v = sigmoid(sign * BETA * (h[i] - z0))
        return sign * BETA * v * (1 - v) / B

    torch.testing.assert_close(slopes(loss, logp), expected(coefficient, mask), rtol=0, atol=1e-12)


def test_simpo_and_orpo_divide_by_the_length_of_each_response():
    logp, _, ref, mask, _ = ragged()
    length = mask.sum(1).tolist()
    mean = mean_logp(logp, mask)                      # (B,)
    m = mean.tolist()
    none = torch.zeros(B // 2).double()
    sign = (1, -1)
    simpo, _ = simpo_loss(mean[0::2], mean[1::2], none, none, 2.0, gamma_ratio=0.6)
    orpo, _ = orpo_loss(mean[0::2], mean[1::2], none, none, 0.4)

    def of_simpo(i, t):
        margin = 2.0 * (m[i // 2 * 2] - m[i // 2 * 2 + 1]) - 1.2
        return sign[i % 2] * 2.0 * sigmoid(-margin) / length[i] / (B // 2)

    def of_orpo(i, t):
        p_w, p_l = math.exp(m[i // 2 * 2]), math.exp(m[i // 2 * 2 + 1])
        odds_ratio = p_w / (1 - p_w) / (p_l / (1 - p_l))
        pull = 0.4 / (1 + odds_ratio) / (1 - math.exp(m[i]))
        return (sign[i % 2] * pull + (i % 2 == 0)) / length[i] / (B // 2)

    found = slopes(simpo, logp)
    torch.testing.assert_close(found, expected(of_simpo, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes(orpo, logp), expected(of_orpo, mask), rtol=0, atol=1e-12)


def test_at_one_update_a_rollout_grpo_cispo_dapo_and_reinforce_have_one_gradient():
    """For responses of one length, without a KL penalty: the ratio is 1."""
    logp, _, ref, mask, adv = ragged()
    mask = torch.zeros(B, T).double()
    mask[:, 2:5] = 1
    old = logp.detach()
    losses = [dapo_loss(logp, old, adv, mask, LOW, HIGH)[0],
              cispo_loss(logp, old, adv, mask, LOW, HIGH)[0],
              dppo_loss(logp, old, adv, mask, DELTA, DELTA)[0],
              grpo_loss(logp, old, ref, adv, mask, LOW, 0.0)[0],
              gspo_loss(logp, old, ref, adv, mask, LOW, 0.0)[0],
              policy_gradient_loss(logp, old, ref, adv, mask, LOW, 0.0)[0] / 3]
    first, *others = [slopes(loss, logp) for loss in losses]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-14)


def test_every_row_of_the_table_in_the_documentation_is_tested():
    with open(os.path.join(ROOT, "docs/algorithms.md"), encoding="utf-8") as f:
        section = f.read().split("## One gradient, many coefficients")[1].split("\n## ")[0]
    named = re.findall(r"^\| ([A-Z][^|]*?) \|", section, re.M)
    tested = [*rows()[0], "DPO", "IPO", "KTO", "SimPO", "ORPO"]
    assert sorted(named) == sorted(tested)
