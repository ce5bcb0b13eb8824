"""From the policy gradient to TRPO, PPO and GRPO: each step of the chain by another route.

    python -m pytest tests/test_chain.py

TRPO (arXiv 1502.05477), which PPO came from, is no script of its own; its step stands here, for a
policy that is a table of logits.
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

# -------------------------------------------------------------------- TRPO, a reference to compare


def table_logp(theta, tokens):
    """theta (S, V), the logits of step s whatever came before; tokens (B, S) -> logp (B, S)."""
    logp = theta.log_softmax(-1).expand(len(tokens), -1, -1)               # (B, S, V)
    return logp.gather(2, tokens[:, :, None])[..., 0]


def table_kl(old, new):
    """KL(π_old(.|s) ‖ π_new(.|s)) of every state, (S,)."""
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


def conjugate_gradient(product, g, iterations):
    """x with product(x) = g."""
    x, r, p = torch.zeros_like(g), g.clone(), g.clone()
    rr = (r * r).sum()
    for _ in range(iterations):
        if rr < 1e-20:
            break
        Fp = product(p)
        a = rr / (p * Fp).sum()
        x = x + a * p
        r = r - a * Fp
        last, rr = rr, (r * r).sum()
        p = r + rr / last * p
    return x


def trpo_step(theta, tokens, mask, adv, delta=0.01, iterations=20):
    """maximise    mean_t ratio Â    subject to    mean_t KL(π_old(.|s_t) ‖ π_θ(.|s_t)) <= δ

    near θ_old (arXiv 1502.05477, Eq. 14 and Appendix C): x = F⁻¹ g by conjugate gradients from
    products F v alone, a step sqrt(2 δ / x'F x) x, halved until it keeps the constraint and
    improves the surrogate. theta (S, V); tokens, mask, adv (B, S). Returns θ and what happened.
    """
    n = mask.sum()
    weight = mask.sum(0) / n                                               # (S,)  of each state
    old = theta.detach()

    def surrogate(theta):
        ratio = (table_logp(theta, tokens) - table_logp(old, tokens)).exp()
        return (ratio * adv * mask).sum() / n

    def kl(theta):
        return (weight * table_kl(old, theta)).sum()

    theta = old.clone().requires_grad_()
    g, = grad(surrogate(theta), theta)
    slope, = grad(kl(theta), theta, create_graph=True)

    def fisher(v):
        """F v: F is the Hessian of the KL at θ_old."""
        return grad((slope * v).sum(), theta, retain_graph=True)[0]

    x = conjugate_gradient(fisher, g, iterations)
    full = (2 * delta / (x * fisher(x)).sum()).sqrt() * x
    before = surrogate(old)
    for halvings in range(11):
        new = old + 0.5 ** halvings * full
        if surrogate(new) > before and kl(new) <= delta:
            break
    else:
        new = old
    return new, {"g": g, "x": x, "fisher": fisher, "full": full, "halvings": halvings,
                 "kl": kl(new).item(), "gain": (surrogate(new) - before).item()}


def sample_table(spread, S=3, V=5, B=400, seed=0):
    """A table policy with logits of this spread, responses of length S from it, and an advantage
    for every token of every state: theta (S, V), tokens, mask and adv (B, S)."""
    torch.manual_seed(seed)
    theta = spread * torch.randn(S, V).double()
    tokens = torch.multinomial(theta.softmax(-1), B, replacement=True).T
    mask = torch.ones(B, S).double()
    adv = torch.randn(S, V).double().expand(B, -1, -1).gather(2, tokens[:, :, None])[..., 0]
    return theta, tokens, mask, adv


def ppo_gradient(theta, tokens, mask, adv):
    """What PPO's first step follows: minus the gradient of its loss at ratio 1."""
    theta = theta.clone().requires_grad_()
    logp = table_logp(theta, tokens)
    loss, _ = ppo_loss(logp, logp.detach(), adv, mask, 0.2)
    return -grad(loss, theta)[0]


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def dense(fisher, S, V):
    """The matrix (S V, S V) of a product."""
    columns = [fisher(e.view(S, V)).flatten() for e in torch.eye(S * V).double()]
    return torch.stack(columns)


def test_trpos_fisher_products_are_those_of_the_enumerated_fisher_matrix():
    """F = Σ_s w_s E_v[∇ log π ∇ log π'], built densely over every token of every state: symmetric,
    with no negative eigenvalue."""
    theta, tokens, mask, adv = sample_table(1.0)
    mask = mask * (torch.rand_like(mask) < .7)
    _, step = trpo_step(theta, tokens, mask, adv)
    S, V = theta.shape
    p, weight = theta.softmax(-1), mask.sum(0) / mask.sum()
    expected = torch.zeros(S * V, S * V).double()
    for s in range(S):
        for v in range(V):
            d_logp = torch.zeros(S, V).double()
            d_logp[s] = -p[s]
            d_logp[s, v] += 1
            expected += weight[s] * p[s, v] * torch.outer(d_logp.flatten(), d_logp.flatten())
    found = dense(step["fisher"], S, V)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(found).min() > -1e-12
    Fx = (expected @ step["x"].flatten()).view(S, V)           # and x solves F x = g
    torch.testing.assert_close(Fx, step["g"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("delta", (1e-4, 1e-2, 0.5))
def test_trpos_step_keeps_to_the_trust_region_and_improves_the_surrogate(delta):
    theta, tokens, mask, adv = sample_table(1.5)
    _, step = trpo_step(theta, tokens, mask, adv, delta)
    assert step["gain"] > 0 and 0 < step["kl"] <= delta
    if delta <= 1e-2:                                          # there the KL is its quadratic form
        assert step["halvings"] <= 1 and step["kl"] > .2 * delta
    if delta <= 1e-4:                                          # and the gain is linear in the step
        linear = math.sqrt(2 * delta * (step["g"] * step["x"]).sum())
        assert step["gain"] == pytest.approx(linear * .5 ** step["halvings"], rel=.05)


def test_ppos_first_gradient_is_trpos_and_their_directions_agree_only_for_a_uniform_policy():
    """At ratio 1 both surrogates have one gradient, for any policy. But TRPO follows F⁻¹ g. Where
    all tokens are equally likely F is the identity over V (on logits that sum to 0), so the
    directions are one; on a skewed policy they part: TRPO moves the logit of a rare token as far as
    its advantage says, PPO's gradient is p times smaller there."""
    found = []
    for spread in (0.0, 2.0):
        theta, tokens, mask, adv = sample_table(spread)
        _, step = trpo_step(theta, tokens, mask, adv)
        g = ppo_gradient(theta, tokens, mask, adv)
        torch.testing.assert_close(g, step["g"], rtol=0, atol=1e-12)
        found.append(cosine(g, step["x"]))
    uniform, skewed = found
    assert uniform > 1 - 1e-9 and skewed < 0.8


def test_trpos_step_does_not_depend_on_the_parameters_and_a_gradient_step_does():
    """Logits θ, or logits A φ: to first order TRPO changes the policy alike, since its measure is
    the KL; plain gradient ascent does not."""
    theta, tokens, mask, adv = sample_table(1.0)
    p = theta.softmax(-1)
    _, step = trpo_step(theta, tokens, mask, adv, delta=1e-6)
    g, F = step["g"].flatten(), dense(step["fisher"], 3, 5)
    A = torch.diag(torch.tensor([1., 3., .5, 2., 1.]).double())
    J = torch.block_diag(A, A, A)                              # logits = J φ
    g_phi, F_phi = J.T @ g, J.T @ F @ J
    x_phi = torch.linalg.lstsq(F_phi, g_phi[:, None], driver="gelsd").solution[:, 0]

    def logp_change(d):
        """Of the log-probs, to first order, where the logits change by d."""
        d = d.view(3, 5)
        return d - (p * d).sum(1, keepdim=True)

    change = logp_change(step["x"])
    torch.testing.assert_close(logp_change(J @ x_phi), change, rtol=1e-6, atol=1e-9)
    by_gradient, gradient_in_phi = logp_change(g), logp_change(J @ g_phi)
    assert (gradient_in_phi - by_gradient).norm() > .3 * by_gradient.norm()


def test_where_trpo_stops_at_a_distance_ppo_stops_each_token():
    """Ten times the step: TRPO's line search refuses it. PPO's loss has no gradient left on tokens
    whose ratio left the clip in the direction of their advantage, and says nothing of the distance:
    with the others clipped, one token may go on."""
    theta, tokens, mask, adv = sample_table(1.0)
    delta = .05
    _, step = trpo_step(theta, tokens, mask, adv, delta)
    far = (theta + 10 * step["full"]).requires_grad_()
    assert table_kl(theta, far).mean() > 10 * delta            # which the line search would refuse
    old, logp = table_logp(theta, tokens), table_logp(far, tokens)
    loss, stats = ppo_loss(logp, old, adv, mask, 0.2)
    per_token, = grad(loss, logp)
    ratio = (logp - old).exp()
    stopped = (ratio > 1.2) & (adv > 0) | (ratio < .8) & (adv < 0)
    assert torch.equal(per_token == 0, stopped) and stopped.any() and not stopped.all()
    clipped = stats["clip_low"] + stats["clip_high"]
    assert clipped == pytest.approx(stopped.double().mean().item(), rel=1e-6)


# ------------------------------------------------------------------------- PPO and its descendants


def test_grpo_is_ppo_with_the_group_as_baseline():
    """On responses of one length, without its KL penalty: to the digit, in value and gradient. On
    ragged ones GRPO weights each token by 1/|o_i| and PPO by one over all tokens: PPO's loss with
    advantages scaled by that is GRPO's again."""
    torch.manual_seed(0)
    old = -torch.rand(8, 6).double() * 2
    adv = group_advantage(torch.randn(8).double(), 4)
    lengths = torch.tensor([1, 6, 3, 2, 5, 4, 6, 2])[:, None]
    equal, ragged = torch.ones(8, 6).double(), (torch.arange(6) < lengths).double()
    for mask in (equal, ragged):
        logp = (old + .4 * torch.randn_like(old)).requires_grad_()
        scaled = adv[:, None] * mask.sum() / (8 * mask.sum(1, keepdim=True))
        theirs, _ = ppo_loss(logp, old, scaled, mask, 0.2)
        ours, _ = grpo_loss(logp, old, old, adv, mask, 0.2, 0.0)
        assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-12)
        torch.testing.assert_close(grad(ours, logp), grad(theirs, logp), rtol=1e-10, atol=1e-14)
    theirs, _ = ppo_loss(logp, old, adv[:, None].expand(8, 6), equal, 0.2)
    ours, _ = grpo_loss(logp, old, old, adv, equal, 0.2, 0.0)
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-12)
    torch.testing.assert_close(grad(ours, logp), grad(theirs, logp), rtol=1e-10, atol=1e-14)


def test_k1_k2_and_k3_and_what_the_gradient_of_each_really_is():
    """By enumeration over six tokens, d = log π - log π_ref. As a number on samples of π: k1 = d
    and k3 = e^-d - 1 + d have mean KL(π ‖ π_ref), k2 = d²/2 has not. Differentiated on those
    samples as a loss: k1's mean gradient is 0, k2's is that of KL(π ‖ π_ref), k3's that of
    KL(π_ref ‖ π). k1 as a reward gives the gradient of KL(π ‖ π_ref) again."""
    torch.manual_seed(0)
    z = torch.randn(6).double().requires_grad_()
    logp = z.log_softmax(0)
    ref = torch.randn(6).double().log_softmax(0)
    d, p = logp - ref, logp.exp().detach()
    k1, k2, k3 = d, d ** 2 / 2, kl_k3(logp, ref)
    reverse = (logp.exp() * d).sum()                           # KL(π ‖ π_ref)
    forward = (ref.exp() * -d).sum()                           # KL(π_ref ‖ π)

    def mean(x):
        """Over samples of π, which are not differentiated."""
        return (p * x).sum()

    def slope(x):
        return grad(x, z, retain_graph=True)[0]

    assert torch.isclose(mean(k1), reverse) and torch.isclose(mean(k3), reverse)
    assert not torch.isclose(mean(k2), reverse, rtol=.02)
    torch.testing.assert_close(slope(mean(k1)), torch.zeros(6).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(slope(mean(k2)), slope(reverse))
    torch.testing.assert_close(slope(mean(k3)), slope(forward))
    torch.testing.assert_close(slope(mean(logp * k1.detach())), slope(reverse))
    assert (slope(reverse) - slope(forward)).norm() > .1 * slope(reverse).norm()
    k1_variance, k3_variance = mean(k1 ** 2) - reverse ** 2, mean(k3 ** 2) - reverse ** 2
    assert k1_variance > 2 * k3_variance                       # k3 is the less noisy estimate


def test_sfts_expected_gradient_is_that_of_the_kl_from_the_data_by_enumerating_every_response():
    """Responses y with frequencies q(y), every token counting alike:
    E_q[grad Σ_t -log π] = grad KL(q ‖ π)."""
    model, _, mask, logp, _ = tree(3)
    params = list(model.parameters())
    q = torch.rand(15).double().softmax(0)
    expected_loss = 0.0
    for i in range(15):
        expected_loss = expected_loss + q[i] * sft_loss(logp[i:i + 1], mask[i:i + 1], n=1)[0]
    kl = (q * (q.log() - logp.sum(1))).sum()
    found = grad(expected_loss, params, retain_graph=True)
    for a, b in zip(found, grad(kl, params)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_bradley_terrys_expected_gradient_is_the_error_of_its_probabilities():
    """Scores r of four responses, pairs labelled by true rewards s:
    E[grad] = Σ_j (σ(r_i - r_j) - σ(s_i - s_j)) / pairs, which is 0 at r = s + c."""
    torch.manual_seed(0)
    s = torch.randn(4).double()
    r = torch.randn(4).double().requires_grad_()

    def expected_loss(r):
        total = 0.0
        for i in range(4):
            for j in range(4):
                if i != j:
                    loss, _ = bradley_terry_loss(r[i:i + 1], r[j:j + 1])
                    total = total + (s[i] - s[j]).sigmoid() * loss
        return total / 6

    by_hand = torch.zeros(4).double()
    for i in range(4):
        for j in range(4):
            by_hand[i] += ((r[i] - r[j]).sigmoid() - (s[i] - s[j]).sigmoid()).item() / 6
    torch.testing.assert_close(grad(expected_loss(r), r)[0], by_hand, rtol=0, atol=1e-12)
    shifted = (s + 3).requires_grad_()
    assert grad(expected_loss(shifted), shifted)[0].abs().max() < 1e-12


def test_dapos_expected_gradient_over_informative_groups_by_enumerating_all_pairs_of_responses():
    """G = 2 and rewards 1 or 0: of the groups with one right response w and one wrong l,
    Â = ±1/√2, and Eq. 8 is E[(Σ_t log π(w) - Σ_t log π(l)) / (√2 (|w| + |l|))] in gradient; groups
    that are all right or all wrong give nothing either way."""
    model, _, mask, logp, _ = tree(5)
    params = list(model.parameters())
    right = torch.arange(15) % 3 == 0
    p, length = logp.sum(1).exp().detach(), mask.sum(1)
    total = closed_form = 0.0
    for i in range(15):
        for j in range(15):
            pair = torch.tensor([i, j])
            adv = group_advantage(right[pair].double(), 2)
            loss, _ = dapo_loss(logp[pair], logp[pair].detach(), adv, mask[pair], 0.2, 0.28)
            total = total - p[i] * p[j] * loss
            if right[i] != right[j]:
                chosen, rejected = (i, j) if right[i] else (j, i)
                margin = logp[chosen].sum() - logp[rejected].sum()
                weight = p[i] * p[j] / (2 ** .5 * (length[i] + length[j]))
                closed_form = closed_form + weight * margin
    found = grad(total, params, retain_graph=True)
    for a, b in zip(found, grad(closed_form, params)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)             # std + 1e-4 in Â
