"""The relatives of GRPO against their definitions: what compare.py's table stands on.   python -m pytest tests/test_relatives.py"""
import math

import pytest
import torch

import relatives
from grpo import group_advantage, grpo_loss
from relatives import RELATIVES, centred, drgrpo_loss, gspo_loss, leave_one_out, leave_one_out_of_all, policy_gradient_loss, reward_itself
from test_grpo import batch
from test_ppo import tree

REWARD = torch.tensor([1., 0., 0., 1., 3., -1., .5, .5]).double()


def test_baselines_are_means_of_the_other_answers():
    """By loops: of all others in the rollout, and of the others of the group, which is G/(G-1) times the mean-centred reward (RLOO's identity)."""
    r, G = REWARD.tolist(), 4
    others = [x - sum(r[:i] + r[i + 1:]) / 7 for i, x in enumerate(r)]
    of_group = [x - (sum(r[i // G * G:i // G * G + G]) - x) / 3 for i, x in enumerate(r)]
    torch.testing.assert_close(leave_one_out_of_all(REWARD, G), torch.tensor(others).double())
    torch.testing.assert_close(leave_one_out(REWARD, G), torch.tensor(of_group).double())
    torch.testing.assert_close(leave_one_out(REWARD, G), G / (G - 1) * centred(REWARD, G), rtol=0, atol=1e-14)
    std = REWARD.view(-1, G).std(1, keepdim=True).expand(2, G).flatten()
    torch.testing.assert_close(centred(REWARD, G), group_advantage(REWARD, G) * (std + 1e-4))
    assert torch.equal(reward_itself(REWARD, G), REWARD)


def test_losses_are_their_formulas_by_plain_loops():
    logp, old, ref, adv, mask = batch()
    rows = [[t for t in range(9) if mask[i, t]] for i in range(8)]
    ratio = lambda i, t: math.exp(logp[i, t] - old[i, t])
    clip = lambda r: max(.8, min(1.2, r))
    term = lambda r, a: min(r * a, clip(r) * a)
    a = adv.tolist()
    gradient = -sum(a[i] * sum(logp[i, t].item() for t in rows[i]) for i in range(8)) / 8
    constant = -sum(term(ratio(i, t), a[i]) for i in range(8) for t in rows[i]) / (8 * 24)
    s = [math.exp(sum((logp[i, t] - old[i, t]).item() for t in rows[i]) / len(rows[i])) for i in range(8)]
    sequence = -sum(term(s[i], a[i]) for i in range(8)) / 8
    for loss, expected in ((policy_gradient_loss, gradient), (drgrpo_loss, constant), (gspo_loss, sequence)):
        got, stats = loss(logp, old, ref, adv, mask, 0.2, 0.5)
        assert math.isclose(got, expected, rel_tol=1e-12), loss.__name__
        assert math.isclose(stats["kl"], grpo_loss(logp, old, ref, adv, mask, .2, 0.)[1]["kl"], rel_tol=1e-12)
        parts = [loss(logp[i], old[i], ref[i], adv[i], mask[i], 0.2, 0.5, 8)[0].item() for i in torch.arange(8).split(3)]
        assert math.isclose(sum(parts), expected, rel_tol=1e-12)          # pieces of an optimiser batch
    share = sum(len(rows[i]) for i in range(8) if a[i] < 0 and s[i] < .8 or a[i] > 0 and s[i] > 1.2) / sum(map(len, rows))
    assert math.isclose(stats["clip_low"] + stats["clip_high"], share, rel_tol=1e-6) and share > 0


def test_gspo_cuts_an_answer_as_a_whole_where_grpo_cuts_tokens():
    """Two tokens with ratios 1.5 and 1 / 1.5 and a positive advantage: s = 1, all flows; GRPO cuts the first."""
    logp = torch.tensor([[math.log(1.5), -math.log(1.5)]], requires_grad=True)
    z, a, one = torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2)
    whole, = torch.autograd.grad(gspo_loss(logp, z, z, a, one, 0.2, 0.0)[0], logp)
    tokens, = torch.autograd.grad(grpo_loss(logp, z, z, a, one, 0.2, 0.0)[0], logp)
    assert torch.equal(whole, torch.full((1, 2), -.5)) and tokens[0, 0] == 0 and tokens[0, 1] != 0
    far, = torch.autograd.grad(gspo_loss(logp, z - 1, z, a, one, 0.2, 0.0)[0], logp)
    assert (far == 0).all()


def test_every_relative_takes_the_place_of_a_function_that_it_can_still_call(monkeypatch):
    arguments = {"group_advantage": (REWARD, 4), "grpo_loss": (*batch(), 0.2, 0.1), "dpo_loss": (*torch.randn(4, 7), 0.1)}
    for script, swapped in RELATIVES.values():
        with monkeypatch.context() as patch:
            for name, function in swapped.items():
                patch.setattr(script, name, function)
            for name in swapped:
                getattr(script, name)(*arguments[name])
        for name, function in swapped.items():
            ours = getattr(script, name)
            assert ours.__code__.co_varnames[:ours.__code__.co_argcount] == function.__code__.co_varnames[:function.__code__.co_argcount], name
    assert relatives.LONGEST == relatives.grpo.Config.max_new


@pytest.mark.parametrize("advantage, scale", [(reward_itself, 1), (leave_one_out_of_all, 1), (leave_one_out, 1), (centred, .5)])
def test_expected_gradient_is_that_of_the_mean_reward_by_enumerating_all_pairs_of_answers(advantage, scale):
    """No baseline, and one that the answer does not know, leave the expected gradient as it is; one that it is a part of shrinks it by
    (G-1)/G, here 1/2, and turns nothing."""
    model, _, mask, logp, _ = tree(5)
    reward, p, params = torch.randn(15).double(), logp.sum(1).exp(), list(model.parameters())
    exact = torch.autograd.grad((p * reward).sum(), params, retain_graph=True)
    total = 0.0
    for i in range(15):
        for j in range(15):
            g = torch.tensor([i, j])
            total = total - (p[i] * p[j]).detach() * policy_gradient_loss(logp[g], logp[g].detach(), logp[g].detach(), advantage(reward[g], 2), mask[g], 0, 0)[0]
    for got, expected in zip(torch.autograd.grad(total, params), exact):
        torch.testing.assert_close(got, scale * expected, rtol=0, atol=1e-12)
