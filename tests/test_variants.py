"""experiments/variants.py against definitions.   python -m pytest tests/test_variants.py"""
import inspect
import math
import sys

import pytest
import torch
from torch.autograd import grad

import grpo
import variants
from grpo import group_advantage, grpo_loss
from policy_variants import (batch_baseline, centred_advantage, drgrpo_loss, gspo_loss, no_baseline,
                             policy_gradient_loss, rloo_advantage)
from preference_variants import ipo_loss
from test_grpo import batch
from test_ppo import tree
from variants import VARIANTS

STATEFUL = ("process", "kto")              # these need what came before: test_family.py
REWARD = torch.tensor([1., 0., 0., 1., 3., -1., .5, .5]).double()


def test_baselines_are_means_of_the_other_responses():
    """By loops: of all others in the rollout, and of the others of the group, which makes
    G/(G-1) times the mean-centred reward (RLOO's identity)."""
    r, G = REWARD.tolist(), 4
    of_all, of_group = [], []
    for i, x in enumerate(r):
        start = i // G * G
        of_all.append(x - sum(r[:i] + r[i + 1:]) / 7)
        of_group.append(x - sum(r[start:i] + r[i + 1:start + G]) / 3)
    torch.testing.assert_close(batch_baseline(REWARD, G), torch.tensor(of_all).double())
    rloo, centred = rloo_advantage(REWARD, G), centred_advantage(REWARD, G)
    torch.testing.assert_close(rloo, torch.tensor(of_group).double())
    torch.testing.assert_close(rloo, G / (G - 1) * centred, rtol=0, atol=1e-14)
    std = REWARD.view(-1, G).std(1).repeat_interleave(G)
    torch.testing.assert_close(centred, group_advantage(REWARD, G) * (std + 1e-4))
    assert torch.equal(no_baseline(REWARD, G), REWARD)


def test_losses_are_their_formulas_by_plain_loops():
    logp, old, ref, adv, mask = batch()

    def surrogate(ratio, a):
        return min(ratio * a, max(.8, min(1.2, ratio)) * a)

    policy_gradient = constant = sequence = 0.0
    cut = tokens = 0
    for i in range(8):
        a = adv[i].item()
        columns = mask[i].nonzero()[:, 0].tolist()
        log_ratio = [(logp[i, t] - old[i, t]).item() for t in columns]
        policy_gradient -= a * sum(logp[i, columns].tolist()) / 8
        constant -= sum(surrogate(math.exp(d), a) for d in log_ratio) / (8 * 24)
        s = math.exp(sum(log_ratio) / len(columns))            # one ratio for the response
        sequence -= surrogate(s, a) / 8
        tokens += len(columns)
        if a < 0 and s < .8 or a > 0 and s > 1.2:
            cut += len(columns)
    for loss_function, expected in ((policy_gradient_loss, policy_gradient),
                                    (drgrpo_loss, constant), (gspo_loss, sequence)):
        loss, _ = loss_function(logp, old, ref, adv, mask, 0.2, 0.5)
        assert math.isclose(loss, expected, rel_tol=1e-12), loss_function.__name__
        in_pieces = 0.0                                        # of one optimiser batch
        for i in torch.arange(8).split(3):
            loss, _ = loss_function(logp[i], old[i], ref[i], adv[i], mask[i], 0.2, 0.5, n=8)
            in_pieces += loss.item()
        assert math.isclose(in_pieces, expected, rel_tol=1e-12)
    _, stats = gspo_loss(logp, old, ref, adv, mask, 0.2, 0.5)
    clipped = stats["clip_low"] + stats["clip_high"]
    assert math.isclose(clipped, cut / tokens, rel_tol=1e-6) and cut > 0


def test_ipo_is_a_squared_distance_to_a_finite_margin():
    """(h - 1/(2β))² by hand, and no gradient where h is 1/(2β)."""
    beta = 0.25
    logp_w = torch.tensor([-3.0, -1.0]).requires_grad_()
    logp_l, ref_w, ref_l = torch.tensor([[-4.0, -5.0], [-2.0, -2.0], [-2.5, -4.0]])
    loss, _ = ipo_loss(logp_w, logp_l, ref_w, ref_l, beta)     # h = 0.5 and 2, the optimum
    assert math.isclose(loss.item(), ((0.5 - 2) ** 2 + 0) / 2)
    slope, = grad(loss, logp_w)
    assert slope.tolist() == [0.5 - 2, 0]
    first, _ = ipo_loss(logp_w[:1], logp_l[:1], ref_w[:1], ref_l[:1], beta, n=2)
    assert math.isclose(first.item(), (0.5 - 2) ** 2 / 2)


def test_gspo_clips_a_response_as_a_whole_where_grpo_clips_tokens():
    """Two tokens with ratios 1.5 and 1 / 1.5 and a positive advantage: s = 1, all flows; GRPO cuts
    the first."""
    logp = torch.tensor([[math.log(1.5), -math.log(1.5)]], requires_grad=True)
    zero, one, adv = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1)

    def slope(loss_function, old_logp):
        loss, _ = loss_function(logp, old_logp, zero, adv, one, 0.2, 0.0)
        return grad(loss, logp)[0]

    assert torch.equal(slope(gspo_loss, zero), torch.full((1, 2), -.5))
    by_token = slope(grpo_loss, zero)
    assert by_token[0, 0] == 0 and by_token[0, 1] != 0
    assert (slope(gspo_loss, zero - 1) == 0).all()


def test_every_variant_has_the_arguments_of_what_it_replaces_and_can_still_call_it(monkeypatch):
    logp, old, ref, adv, mask = batch()
    arguments = {"group_advantage": (REWARD, 4),
                 "grpo_loss": (logp, old, ref, adv, mask, 0.2, 0.1, None, old),
                 "dapo_loss": (logp, old, adv, mask, 0.2, 0.3, None, old),
                 "dpo_loss": (*torch.randn(4, 7), 0.1)}
    called = 0
    for variant, (script, replacements) in VARIANTS.items():
        for name, function in replacements.items():
            ours = list(inspect.signature(getattr(script, name)).parameters)
            theirs = list(inspect.signature(function).parameters)
            assert theirs[:len(ours)] == ours, (variant, name)
        with monkeypatch.context() as patch:
            for name, function in replacements.items():
                patch.setattr(script, name, function)
            for name in replacements.keys() & arguments.keys() if variant not in STATEFUL else ():
                getattr(script, name)(*arguments[name])
                called += 1
    assert called >= 18


def test_dr_grpo_divides_by_the_longest_response_that_its_run_allows(monkeypatch):
    """24 in the place of 512 would make its gradient 21 times as large."""
    losses = []
    for name in ("__doc__", "group_advantage", "grpo_loss"):       # which `run` replaces
        monkeypatch.setattr(grpo, name, getattr(grpo, name))
    monkeypatch.setattr(grpo, "train",
                        lambda cfg: losses.append(grpo.grpo_loss(*batch(), 0.2, 0.0)[0].item()))
    monkeypatch.setattr(sys, "argv", ["variants.py"])
    variants.run("drgrpo", ["--max_new_tokens", "512"])
    variants.run("constant", [])
    expected = drgrpo_loss(*batch(), 0.2, 0.0)[0].item()           # by 24
    assert math.isclose(losses[0] * 512, expected * 24, rel_tol=1e-9)
    assert math.isclose(losses[1], expected, rel_tol=1e-9)


@pytest.mark.parametrize("advantage, scale", [
    (no_baseline, 1), (batch_baseline, 1), (rloo_advantage, 1), (centred_advantage, .5)])
def test_expected_gradient_is_that_of_the_mean_reward_by_enumerating_all_pairs_of_responses(
        advantage, scale):
    """No baseline, and one that does not depend on the response, leave the expected gradient as it
    is; one that the response is a part of shrinks it by (G-1)/G, here 1/2, and turns nothing."""
    model, _, mask, logp, _ = tree(5)
    params = list(model.parameters())
    reward = torch.randn(15).double()
    p = logp.sum(1).exp()
    exact = grad((p * reward).sum(), params, retain_graph=True)
    total = 0.0
    for i in range(15):
        for j in range(15):
            pair = torch.tensor([i, j])
            x, old, adv = logp[pair], logp[pair].detach(), advantage(reward[pair], 2)
            loss, _ = policy_gradient_loss(x, old, old, adv, mask[pair], 0.0, 0.0)
            total = total - (p[i] * p[j]).detach() * loss
    for found, expected in zip(grad(total, params), exact):
        torch.testing.assert_close(found, scale * expected, rtol=0, atol=1e-12)
