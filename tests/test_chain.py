"""From the policy gradient to TRPO, PPO and GRPO: each step of the chain by another route.   python -m pytest tests/test_chain.py

TRPO (arXiv 1502.05477), which PPO came from, is no script of its own; its step stands here, for a policy that is a table of logits.
"""
import math

import pytest
import torch
from torch.autograd import grad

from dapo import dapo_loss
from grpo import group_advantage, grpo_loss, kl_k3
from ppo import ppo_loss
from reward import bradley_terry_loss
from sft import sft_loss
from test_ppo import tree

# ---------------------------------------------------------------------------------------------------- TRPO, a reference for comparison


def trpo_step(theta, tokens, mask, adv, delta=0.01, damping=0.0, iterations=20):
    """maximise the surrogate, mean_t ratio Â, subject to mean_t KL(π_old(.|s_t) ‖ π_θ(.|s_t)) <= δ, near θ_old (arXiv 1502.05477, Eq. 14
    and Appendix C): x = F⁻¹ g by conjugate gradients from products F v alone, a step sqrt(2 δ / x'F x) x, halved until it keeps the
    constraint and improves the surrogate. theta (S, V) are the logits of step s whatever came before; tokens, mask, adv (B, S). Returns θ
    and what happened."""
    n, old = mask.sum(), theta.detach().log_softmax(-1)                                      # (S, V)
    weight = mask.sum(0) / n                                                                 # (S,) how often each state was seen
    picked = lambda logits: logits.log_softmax(-1).expand(len(tokens), -1, -1).gather(2, tokens[:, :, None])[..., 0]
    surrogate = lambda logits: ((picked(logits) - picked(old)).exp() * adv * mask).sum() / n
    kl = lambda logits: (weight * (old.exp() * (old - logits.log_softmax(-1))).sum(-1)).sum()
    theta = theta.detach().clone().requires_grad_()
    g, = grad(surrogate(theta), theta)
    slope, = grad(kl(theta), theta, create_graph=True)
    fisher = lambda v: grad((slope * v).sum(), theta, retain_graph=True)[0] + damping * v    # the Hessian of the KL at θ_old
    x, r = torch.zeros_like(g), g.clone()
    p, rr = r.clone(), (r * r).sum()
    for _ in range(iterations):
        if rr < 1e-20:
            break
        Fp = fisher(p)
        a = rr / (p * Fp).sum()
        x, r = x + a * p, r - a * Fp
        rr, last = (r * r).sum(), rr
        p = r + rr / last * p
    full = (2 * delta / (x * fisher(x)).sum()).sqrt() * x
    for half in range(11):
        new = (theta + 0.5 ** half * full).detach()
        if surrogate(new) > surrogate(theta) and kl(new) <= delta:
            break
    else:
        new = theta.detach()
    gain = (surrogate(new) - surrogate(theta)).item()
    return new, dict(g=g, x=x, fisher=fisher, full=full, halvings=half, kl=kl(new).item(), gain=gain)


def sampled(spread, S=3, V=5, B=400, seed=0):
    """A table policy with logits of this spread, answers of length S from it, and an advantage for each token."""
    torch.manual_seed(seed)
    theta = spread * torch.randn(S, V).double()
    tokens = torch.multinomial(theta.softmax(-1), B, replacement=True).T
    return theta, tokens, torch.ones(B, S).double(), torch.randn(S, V).double().expand(B, -1, -1).gather(2, tokens[:, :, None])[..., 0]


def ppo_gradient(theta, tokens, mask, adv):
    """What PPO's first step follows: minus the gradient of its loss at ratio 1."""
    theta = theta.clone().requires_grad_()
    logp = theta.log_softmax(-1).expand(len(tokens), -1, -1).gather(2, tokens[:, :, None])[..., 0]
    return -grad(ppo_loss(logp, logp.detach(), adv, mask, 0.2)[0], theta)[0]


def test_trpos_fisher_products_are_those_of_the_enumerated_fisher_matrix():
    """F = Σ_s w_s E_v[∇ log π ∇ log π'], built densely over every token of every state: symmetric, with no negative eigenvalue."""
    theta, tokens, mask, adv = sampled(1.0)
    mask = mask * (torch.rand_like(mask) < .7)
    _, told = trpo_step(theta, tokens, mask, adv)
    S, V = theta.shape
    dense, p = torch.zeros(S * V, S * V).double(), theta.softmax(-1)
    for s in range(S):
        for v in range(V):
            score = torch.zeros(S, V).double()
            score[s] = -p[s]
            score[s, v] += 1
            dense += mask[:, s].sum() / mask.sum() * p[s, v] * torch.outer(score.flatten(), score.flatten())
    product = torch.stack([told["fisher"](e.view(S, V)).flatten() for e in torch.eye(S * V).double()])
    torch.testing.assert_close(product, dense, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(product).min() > -1e-12
    torch.testing.assert_close((dense @ told["x"].flatten()).view(S, V), told["g"], rtol=0, atol=1e-8)   # and x solves F x = g


@pytest.mark.parametrize("delta", (1e-4, 1e-2, 0.5))
def test_trpos_step_keeps_to_the_trust_region_and_improves_the_surrogate(delta):
    theta, tokens, mask, adv = sampled(1.5)
    new, told = trpo_step(theta, tokens, mask, adv, delta)
    assert told["gain"] > 0 and 0 < told["kl"] <= delta
    if delta <= 1e-2:                                     # near θ_old the KL is its quadratic form, and no more than a halving is needed
        assert told["halvings"] <= 1 and told["kl"] > .2 * delta
    ahead = math.sqrt(2 * delta) * (told["g"] * told["x"]).sum().sqrt().item() * .5 ** told["halvings"]
    assert delta > 1e-4 or told["gain"] == pytest.approx(ahead, rel=.05)                      # g'd of the linearised problem


def test_ppos_first_gradient_is_trpos_and_their_directions_agree_only_where_the_policy_is_uniform():
    """At ratio 1 both surrogates have one gradient, for any policy. But TRPO follows F⁻¹ g. Where all tokens are equally likely F is the
    identity over V (on logits that sum to 0), so the directions are one; on a skewed policy they part: TRPO moves the logit of a rare token
    as far as its advantage says, PPO's gradient is p times smaller there."""
    cosine = lambda a, b: torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    for spread, agree in ((0.0, True), (2.0, False)):
        theta, tokens, mask, adv = sampled(spread)
        _, told = trpo_step(theta, tokens, mask, adv)
        g = ppo_gradient(theta, tokens, mask, adv)
        torch.testing.assert_close(g, told["g"], rtol=0, atol=1e-12)
        assert (cosine(g, told["x"]) > 1 - 1e-9) is agree
    assert cosine(g, told["x"]) < 0.8


def test_trpos_step_does_not_depend_on_the_parameters_and_a_gradient_step_does():
    """Logits θ, or logits A φ: to first order TRPO changes the policy alike, since its measure is the KL; plain gradient ascent does
    not."""
    theta, tokens, mask, adv = sampled(1.0)
    _, told = trpo_step(theta, tokens, mask, adv, delta=1e-6)
    A = torch.diag(torch.tensor([1., 3., .5, 2., 1.]).double())
    F = torch.stack([told["fisher"](e.view(3, 5)).flatten() for e in torch.eye(15).double()])
    J = torch.block_diag(A, A, A)                                                             # logits = J φ
    g_phi, F_phi = J.T @ told["g"].flatten(), J.T @ F @ J
    x_phi = torch.linalg.lstsq(F_phi, g_phi[:, None], driver="gelsd").solution[:, 0]
    change = lambda d: d.view(3, 5) - (theta.softmax(-1) * d.view(3, 5)).sum(1, keepdim=True)  # of the log-probs
    torch.testing.assert_close(change(J @ x_phi), change(told["x"]), rtol=1e-6, atol=1e-9)
    assert (change(J @ g_phi) - change(told["g"])).norm() > .3 * change(told["g"]).norm()


def test_where_trpo_stops_at_a_distance_ppo_stops_each_token():
    """Ten times the step: TRPO's line search refuses it. PPO's loss has no gradient left on tokens whose ratio left the clip in the
    direction of their advantage, and says nothing of the distance: with the others clipped, one token may go on."""
    theta, tokens, mask, adv = sampled(1.0)
    _, told = trpo_step(theta, tokens, mask, adv, delta=.05)
    far = (theta + 10 * told["full"]).requires_grad_()
    old, logp = (x.log_softmax(-1).expand(len(tokens), -1, -1).gather(2, tokens[:, :, None])[..., 0] for x in (theta, far))
    weight = (theta.softmax(-1) * (theta.log_softmax(-1) - far.log_softmax(-1))).sum(1).mean()
    assert weight > 10 * .05                                               # which the line search would refuse
    loss, stats = ppo_loss(logp, old, adv, mask, 0.2)
    per_token, = grad(loss, logp)
    ratio = (logp - old).exp()
    stopped = (ratio > 1.2) & (adv > 0) | (ratio < .8) & (adv < 0)
    assert torch.equal(per_token == 0, stopped) and stopped.any() and not stopped.all()
    assert stats["clip_low"] + stats["clip_high"] == pytest.approx(stopped.double().mean().item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ PPO and its descendants


def test_grpo_is_ppo_with_the_group_as_baseline():
    """On answers of one length, without its price: to the digit, in value and gradient. On ragged ones GRPO weighs each token by 1/|o_i|
    and PPO by one over all tokens: PPO's loss with advantages scaled by that is GRPO's again."""
    torch.manual_seed(0)
    old = -torch.rand(8, 6).double() * 2
    adv = group_advantage(torch.randn(8).double(), 4)
    for mask in (torch.ones(8, 6).double(), (torch.arange(6) < torch.tensor([1, 6, 3, 2, 5, 4, 6, 2])[:, None]).double()):
        logp = (old + .4 * torch.randn_like(old)).requires_grad_()
        length = mask.sum(1, keepdim=True)
        theirs, _ = ppo_loss(logp, old, adv[:, None] * mask.sum() / (8 * length), mask, 0.2)
        ours, _ = grpo_loss(logp, old, old, adv, mask, 0.2, 0.0)
        assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-12)
        torch.testing.assert_close(*grad(ours, logp), *grad(theirs, logp), rtol=1e-10, atol=1e-14)
    mask = torch.ones(8, 6).double()
    theirs, ours = ppo_loss(logp, old, adv[:, None].expand(8, 6), mask, .2)[0], grpo_loss(logp, old, old, adv, mask, .2, 0.)[0]
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-12)


def test_k1_k2_and_k3_and_what_the_gradient_of_each_really_is():
    """By enumeration over six tokens, d = log π - log π_ref. As a number on samples of π: k1 = d and k3 = e^-d - 1 + d have mean KL(π ‖
    ref), k2 = d²/2 has not. Differentiated on those samples as a loss: k1's mean gradient is 0, k2's is that of KL(π ‖ ref), k3's that of
    KL(ref ‖ π). k1 as a reward gives the gradient of KL(π ‖ ref) again."""
    torch.manual_seed(0)
    z = torch.randn(6).double().requires_grad_()
    logp, ref = z.log_softmax(0), torch.randn(6).double().log_softmax(0)
    d, p = logp - ref, logp.exp().detach()
    reverse, forward = (logp.exp() * d).sum(), (ref.exp() * -d).sum()
    k1, k2, k3 = d, d ** 2 / 2, kl_k3(logp, ref)
    mean, g = lambda k: (p * k).sum(), lambda loss: grad(loss, z, retain_graph=True)[0]
    assert torch.isclose(mean(k1), reverse) and torch.isclose(mean(k3), reverse) and not torch.isclose(mean(k2), reverse, rtol=.02)
    torch.testing.assert_close(g(mean(k1)), torch.zeros(6).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(g(mean(k2)), g(reverse))
    torch.testing.assert_close(g(mean(k3)), g(forward))
    torch.testing.assert_close(g(mean(logp * k1.detach())), g(reverse))
    assert (g(reverse) - g(forward)).norm() > .1 * g(reverse).norm()
    assert (p * k1 ** 2).sum() - reverse ** 2 > 2 * ((p * k3 ** 2).sum() - reverse ** 2)      # and k3 is the quieter estimate


def test_sfts_expected_gradient_is_that_of_the_kl_from_the_data_by_enumerating_every_answer():
    """Answers y with frequencies q(y), each token counting alike: E_q[grad Σ_t -log π] = grad KL(q ‖ π)."""
    model, _, mask, logp, _ = tree(3)
    q, params = torch.rand(15).double().softmax(0), list(model.parameters())
    loss = sum(q[i] * sft_loss(logp[i:i + 1], mask[i:i + 1], n=1)[0] for i in range(15))
    for a, b in zip(grad(loss, params, retain_graph=True), grad((q * (q.log() - logp.sum(1))).sum(), params)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bradley_terrys_expected_gradient_is_the_error_of_its_probabilities():
    """Scores r of four answers, pairs labelled by true rewards s: E[grad] = Σ_j (σ(r_i - r_j) - σ(s_i - s_j)) / pairs, 0 at r = s + c."""
    torch.manual_seed(0)
    s, r = torch.randn(4).double(), torch.randn(4).double().requires_grad_()
    pairs = [(i, j) for i in range(4) for j in range(i)]

    def expected(r):
        ordered = pairs + [(j, i) for i, j in pairs]
        return sum((s[a] - s[b]).sigmoid() * bradley_terry_loss(r[a:a + 1], r[b:b + 1])[0] for a, b in ordered) / len(pairs)

    error = lambda i, j: ((r[i] - r[j]).sigmoid() - (s[i] - s[j]).sigmoid()).item()
    by_hand = [sum(error(i, j) for j in range(4) if j != i) / len(pairs) for i in range(4)]
    torch.testing.assert_close(grad(expected(r), r)[0], torch.tensor(by_hand, dtype=torch.double), rtol=0, atol=1e-12)
    shifted = (s + 3).requires_grad_()
    assert grad(expected(shifted), shifted)[0].abs().max() < 1e-12


def test_dapos_expected_gradient_over_informative_groups_by_enumerating_all_pairs_of_answers():
    """G = 2 and rewards 1 or 0: of the groups with one right answer w and one wrong l, Â = ±1/√2, and Eq. 8 is E[(Σ_t log π(w) - Σ_t log
    π(l)) / (√2 (|w| + |l|))] in gradient; groups that are all right or all wrong give nothing either way."""
    model, _, mask, logp, _ = tree(5)
    right, p, params = torch.arange(15) % 3 == 0, logp.sum(1).exp().detach(), list(model.parameters())
    length, total, closed = mask.sum(1), 0.0, 0.0
    for i in range(15):
        for j in range(15):
            g = torch.tensor([i, j])
            adv = group_advantage(right[g].double(), 2)
            total = total - p[i] * p[j] * dapo_loss(logp[g], logp[g].detach(), adv, mask[g], 0.2, 0.28)[0]
            if right[i] != right[j]:
                sign = 1 if right[i] else -1
                closed = closed + p[i] * p[j] * sign * (logp[i].sum() - logp[j].sum()) / (2 ** .5 * (length[i] + length[j]))
    for a, b in zip(grad(total, params, retain_graph=True), grad(closed, params)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)                                # std + 1e-4 in Â
