"""PPO against brute force, closed forms and enumeration.   python -m pytest tests/test_ppo.py"""
import itertools
import json
import math
import statistics

import pytest
import torch
from torch.autograd import grad

import common.train
import grpo
import ppo
from common import InputError, load
from common.checkpoint import save_checkpoint
from common.evaluate import explained_variance
from common.tokenizer import make_tokenizer
from common.train import compute_reward, compute_values, micro_batches
from conftest import PROMPTS, gradients, metrics, naive_logp, tiny
from model import GPT, GPTConfig, ScalarModel
from ppo import gae, ppo_loss, token_reward, value_loss, whiten
from test_grpo import RUBBISH, every_response, flat_grad, randomise, three_token_model

CPU = torch.device("cpu")


def batch(B=8, T=10, seed=0):
    """Ragged responses, each 1 to 6 tokens in one piece: logp, old_logp, ref_logp, adv, value,
    old_value, ret and mask, (B, T) each."""
    torch.manual_seed(seed)
    mask = torch.zeros(B, T).double()
    for i, row in enumerate(mask):
        start = int(torch.randint(1, 4, ()))
        row[start:start + 1 + i % 6] = 1
    old_logp = -torch.rand(B, T).double() * 3
    logp = old_logp + torch.randn(B, T).double() * .3
    ref_logp = old_logp + torch.randn(B, T).double() * .3
    adv, value, old_value, ret = torch.randn(4, B, T).double()
    return logp, old_logp, ref_logp, adv, value, old_value, ret, mask


def chosen_columns(mask_row):
    return mask_row.nonzero()[:, 0].tolist()


def spoil(mask, *tensors):
    """The same tensors with garbage outside the mask, once for each kind of garbage."""
    for rubbish in RUBBISH:
        yield [torch.where(mask > 0, x, rubbish) for x in tensors]


# -------------------------------------------------------------------------------------- the reward


def test_the_score_lands_on_the_last_token_and_every_token_pays_the_kl_penalty():
    logp, _, ref, *_, mask = batch()
    score = torch.randn(len(mask)).double()
    reward = token_reward(score, logp, ref, mask, 0.7)
    for i in range(len(mask)):
        columns = chosen_columns(mask[i])
        for t in range(mask.size(1)):
            expected = 0.0
            if t in columns:
                expected -= 0.7 * (logp[i, t] - ref[i, t])
            if t == columns[-1]:
                expected += score[i]
            assert math.isclose(reward[i, t], expected, abs_tol=1e-12)
    assert (logp < ref)[mask > 0].any() and (reward[mask > 0] > 0).any()   # k1 < 0 is not clamped
    for spoiled in spoil(mask, logp, ref):
        assert torch.equal(token_reward(score, *spoiled, mask, 0.7), reward)
    assert (token_reward(score, logp, ref, torch.zeros_like(mask), 0.7) == 0).all()


# ----------------------------------------------------------------------------------- the advantage


def brute_force_gae(reward, value, mask, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k} by a double sum over the tokens of each response, with V = 0 after
    the last."""
    adv = torch.zeros_like(value)
    for i in range(len(mask)):
        columns = chosen_columns(mask[i])
        V = value[i, columns].tolist() + [0.0]
        delta = []
        for k, t in enumerate(columns):
            delta.append(reward[i, t].item() + gamma * V[k + 1] - V[k])
        for k, t in enumerate(columns):
            adv[i, t] = sum((gamma * lam) ** n * d for n, d in enumerate(delta[k:]))
    return adv


@pytest.mark.parametrize("gamma, lam", [
    (1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 1.0), (1.0, 0.0), (0.5, 0.0)])
def test_gae_is_the_sum_of_discounted_errors_on_ragged_rows(gamma, lam):
    reward, _, _, _, value, *_, mask = batch()
    adv, ret = gae(reward, value, mask, gamma, lam)
    expected = brute_force_gae(reward, value, mask, gamma, lam)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ret, (adv + value) * mask, rtol=0, atol=1e-12)
    for spoiled in spoil(mask, reward, value):
        copies = [x.clone() for x in spoiled]
        other_adv, other_ret = gae(*spoiled, mask, gamma, lam)
        assert torch.equal(other_adv, adv) and torch.equal(other_ret, ret)
        for a, b in zip(spoiled, copies):                      # the inputs stay as they were
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_lambda_1_is_monte_carlo_and_lambda_0_trusts_the_next_value():
    reward, _, _, _, value, *_, mask = batch()
    _, monte_carlo = gae(reward, value, mask, 0.9, 1.0)
    _, one_step = gae(reward, value, mask, 0.9, 0.0)
    for i in range(len(mask)):
        columns = chosen_columns(mask[i])
        for k, t in enumerate(columns):
            discounted = sum(0.9 ** n * reward[i, s] for n, s in enumerate(columns[k:]))
            assert math.isclose(monte_carlo[i, t], discounted, abs_tol=1e-12)
            next_value = value[i, columns[k + 1]] if k + 1 < len(columns) else 0.0
            assert math.isclose(one_step[i, t], reward[i, t] + 0.9 * next_value, abs_tol=1e-12)


def test_a_perfect_critic_leaves_no_advantage():
    """V_t = the return from t on: every δ is 0, at the end token too, after which V is 0."""
    reward, *_, mask = batch()
    _, value = gae(reward, torch.zeros_like(reward), mask, 1.0, 1.0)
    adv, _ = gae(reward, value, mask, 1.0, 0.95)
    assert adv.abs().max() < 1e-12


def test_whitening_is_over_the_mask_alone_and_leaves_its_inputs():
    reward, _, _, _, value, *_, mask = batch()
    adv, ret = gae(reward, value, mask, 1.0, 0.95)
    adv_copy, ret_copy = adv.clone(), ret.clone()
    white = whiten(adv, mask)
    x, y = adv[mask > 0], white[mask > 0]
    assert abs(y.mean()) < 1e-12 and math.isclose(y.var(correction=0), 1.0, rel_tol=1e-6)
    assert (white[mask == 0] == 0).all()
    slope = (y - y.flip(0)) / (x - x.flip(0))                  # a line with a positive slope
    slope = slope[slope.isfinite()]
    assert (slope > 0).all() and slope.std() < 1e-9
    assert torch.equal(adv, adv_copy) and torch.equal(ret, ret_copy)
    for spoiled, in spoil(mask, adv):
        assert torch.equal(whiten(spoiled, mask), white)
    assert (whiten(torch.full_like(adv, 0.3), mask).abs() < 1e-9).all()
    assert (whiten(adv, torch.zeros_like(mask)) == 0).all()


# -------------------------------------------------------------------------------------- the losses


def test_policy_loss_is_equation_5_as_a_token_mean():
    logp, old, _, adv, *_, mask = batch()
    loss, stats = ppo_loss(logp, old, adv, mask, 0.2)
    surrogate, cut_low, cut_high, kl = [], [], [], []
    for i in range(len(mask)):
        for t in chosen_columns(mask[i]):
            r, a = math.exp(logp[i, t] - old[i, t]), adv[i, t].item()
            surrogate.append(min(r * a, min(max(r, .8), 1.2) * a))
            cut_low.append(r < .8 and a < 0)
            cut_high.append(r > 1.2 and a > 0)
            kl.append(r - 1 - math.log(r))
    n = len(surrogate)
    assert math.isclose(loss, -sum(surrogate) / n, rel_tol=1e-12)
    assert math.isclose(stats["clip_low"], sum(cut_low) / n, rel_tol=1e-6) and any(cut_low)
    assert math.isclose(stats["clip_high"], sum(cut_high) / n, rel_tol=1e-6) and any(cut_high)
    assert math.isclose(stats["approx_kl"], sum(kl) / n, rel_tol=1e-9)


@pytest.mark.parametrize("adv, ratio, flows", [
    (1, 0.5, True), (1, 2.0, False), (-1, 0.5, False), (-1, 2.0, True)])
def test_the_clip_cuts_the_gradient_only_where_it_would_overshoot(adv, ratio, flows):
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    one = torch.ones(1, 1)
    loss, stats = ppo_loss(logp, 0 * one, adv * one, one, 0.2)
    assert (grad(loss, logp)[0].item() != 0) is flows
    assert stats["clip_low"] == float(adv < 0 and not flows)
    assert stats["clip_high"] == float(adv > 0 and not flows)


@pytest.mark.parametrize("value, ret, error, flows", [
    (0.1, 1.0, 0.9, True),        # within the clip: the plain error
    (0.5, 1.0, 0.8, False),       # beyond it towards the return: the clipped error, no gradient
    (-0.5, 1.0, 1.5, True),       # beyond it on the wrong side: the plain error pulls back
    (2.0, 1.0, 1.0, True),        # overshot: the plain error is the larger
    (-0.5, -1.0, 0.8, False)])
def test_the_value_clip_keeps_the_larger_error(value, ret, error, flows):
    """old value 0, ε_v = .2."""
    one = torch.ones(1, 1)
    value = (value * one).requires_grad_()
    loss, stats = value_loss(value, 0 * one, ret * one, one, 0.2)
    assert math.isclose(loss.item(), 0.5 * error ** 2, rel_tol=1e-6)
    assert (grad(loss, value)[0].item() != 0) is flows
    assert stats["value_clip_frac"] == float(not flows)
    assert math.isclose(stats["value_loss"], 0.5 * (value.item() - ret) ** 2, rel_tol=1e-6)


def test_value_loss_is_half_the_token_mean_and_a_clip_of_0_is_none():
    *_, value, old_value, ret, mask = batch()
    plain, larger = [], []
    for i in range(len(mask)):
        for t in chosen_columns(mask[i]):
            v, old, g = value[i, t].item(), old_value[i, t].item(), ret[i, t].item()
            clipped = min(max(v, old - .2), old + .2)
            plain.append((v - g) ** 2)
            larger.append(max((v - g) ** 2, (clipped - g) ** 2))
    n = len(plain)
    loss, _ = value_loss(value, old_value, ret, mask, 0.2)
    assert math.isclose(loss, sum(larger) / n / 2, rel_tol=1e-12)
    for off in (None, 0, 0.0, 1e9):
        loss, _ = value_loss(value, old_value, ret, mask, off)
        assert math.isclose(loss, sum(plain) / n / 2, rel_tol=1e-12)


def test_garbage_outside_the_mask_changes_neither_loss_nor_gradient_nor_statistics():
    logp, old, _, adv, value, old_value, ret, mask = batch()
    for loss_function, inputs in ((ppo_loss, (logp, old, adv)),
                                  (value_loss, (value, old_value, ret))):
        clean = inputs[0].clone().requires_grad_()
        loss, stats = loss_function(clean, *inputs[1:], mask, 0.2)
        loss.backward()
        for dirty, *others in spoil(mask, *inputs):
            dirty.requires_grad_()
            other, other_stats = loss_function(dirty, *others, mask, 0.2)
            other.backward()
            assert other == loss and other_stats == stats and torch.equal(dirty.grad, clean.grad)
        assert (clean.grad[mask == 0] == 0).all() and (clean.grad[mask > 0] != 0).any()


def test_an_empty_row_contributes_nothing():
    logp, old, _, adv, value, old_value, ret, mask = batch()
    for loss_function, inputs in ((ppo_loss, (logp, old, adv)),
                                  (value_loss, (value, old_value, ret))):
        longer = [torch.cat([x, x[:1]]) for x in inputs]
        longer.append(torch.cat([mask, torch.zeros_like(mask[:1])]))
        loss, stats = loss_function(*inputs, mask, 0.2)
        longer_loss, longer_stats = loss_function(*longer, 0.2)
        assert longer_loss == loss and longer_stats == stats
        loss, stats = loss_function(*inputs, torch.zeros_like(mask), 0.2)
        assert loss == 0 and not any(math.isnan(x) for x in stats.values())


@pytest.mark.parametrize("n, lam", [(18, .95), (300, .95), (300, 1.0)])
def test_with_lambda_below_1_the_first_tokens_of_a_long_response_earn_nothing(n, lam):
    """At V = 0 the advantage k tokens before the last is λ^k of the reward: .42 of it reaches the
    first of 18 tokens, 2e-7 the first of 300."""
    reward, mask = torch.zeros(1, n).double(), torch.ones(1, n)
    reward[0, -1] = 1
    adv, _ = gae(reward, torch.zeros(1, n).double(), mask, 1.0, lam)
    expected = torch.tensor([lam ** (n - 1 - t) for t in range(n)]).double()
    torch.testing.assert_close(adv[0], expected)
    if n == 300:
        assert (adv[0, 0] < 1e-6) == (lam < 1)
        assert (ppo.Config().gae_lambda, "gae_lambda" in ppo.PRETRAINED) == (1, False)


def test_explained_variance_is_of_the_monte_carlo_return_not_of_the_critics_own_target():
    """A critic of pure noise, one constant a response, 300 tokens: against Â + V with λ = .95 it
    seems to explain .93 of the variance; of what was earned it explains less than nothing."""
    torch.manual_seed(0)
    reward, mask = torch.zeros(256, 300).double(), torch.ones(256, 300)
    reward[:, -1] = torch.randn(256)
    value = torch.randn(256, 1).double().expand(256, 300)
    _, own_target = gae(reward, value, mask, 1.0, .95)
    _, monte_carlo = gae(reward, value, mask, 1.0, 1.0)
    earned = reward.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(monte_carlo, earned)
    assert explained_variance(value, own_target, mask) > .9
    assert explained_variance(value, monte_carlo, mask) < -.7


def test_explained_variance_of_a_perfect_a_constant_and_a_contrary_critic():
    *_, ret, mask = batch()
    assert explained_variance(ret, ret, mask) == 1 == explained_variance(ret + 3, ret, mask)
    assert abs(explained_variance(torch.full_like(ret, 0.7), ret, mask)) < 1e-12
    assert math.isclose(explained_variance(-ret, ret, mask), -3.0, rel_tol=1e-9)
    inside = ret[mask > 0]
    half = explained_variance(ret / 2, ret, mask)
    assert math.isclose(half, 1 - (inside / 2).var() / inside.var(), rel_tol=1e-9)
    for spoiled in spoil(mask, ret / 2, ret):
        assert explained_variance(*spoiled, mask) == half


# --------------------------------------------------------------------------------- with two models


def rollout(policy, critic, temperature=0.8):
    tokens, mask, sampled = policy.generate(PROMPTS, 4, 12, temperature)
    value, _ = compute_values(critic, tokens, mask)
    score = torch.randn(len(tokens)).double()
    reward = token_reward(score, sampled, sampled - 0.1, mask, 0.1)
    adv, ret = gae(reward, value, mask, 1.0, 0.95)
    return tokens, mask, sampled, whiten(adv, mask), value, ret


def test_the_first_step_has_ratio_1_and_approximate_kl_0(family):
    policy = tiny(family)
    critic = ScalarModel(tiny(family, seed=1), std=0.5).double()
    tokens, mask, sampled, adv, value, ret = rollout(policy, critic)
    n = mask.sum()
    logp, _ = policy.token_logp(tokens, mask, 0.8)
    loss, stats = ppo_loss(logp, sampled, adv, mask, 1e-6)
    assert stats["clip_low"] == stats["clip_high"] == 0 and stats["approx_kl"].abs() < 1e-15
    assert math.isclose(loss.item(), -(adv * mask).sum() / n, abs_tol=1e-9)
    loss, stats = value_loss(critic.value(tokens), value, ret, mask, 1e-6)
    expected = 0.5 * ((value - ret).square() * mask).sum() / n
    assert stats["value_clip_frac"] < 1e-9 and math.isclose(loss.item(), expected, rel_tol=1e-4)


def test_micro_batches_change_no_gradient_of_policy_or_critic():
    found = []
    for budget in (10 ** 6, 1, 40):
        policy, critic = tiny(), ScalarModel(tiny(seed=1), std=0.5).double()
        torch.manual_seed(3)
        critic.head.weight.data.normal_()
        tokens, mask, sampled, adv, value, ret = rollout(policy, critic)
        old = sampled + 0.3 * torch.randn_like(sampled)
        old_value = value + 0.3 * torch.randn_like(value)
        minibatch = torch.randperm(len(tokens))
        n = int(mask[minibatch].sum())
        for rows, width, index in micro_batches(mask, minibatch, budget, CPU):
            chosen = mask[rows, :width]
            logp, _ = policy.token_logp(tokens[rows, :width], None, 0.8, index)
            loss, _ = ppo_loss(logp, old[rows, :width], adv[rows, :width], chosen, 0.2, n)
            loss.backward()
            new_value = critic.value(tokens[rows, :width])
            loss, _ = value_loss(
                new_value, old_value[rows, :width], ret[rows, :width], chosen, 0.2, n)
            loss.backward()
        found.append((gradients(policy), gradients(critic)))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert len(a) == len(b) > 10
            for name, g in a.items():
                torch.testing.assert_close(b[name], g, rtol=0, atol=1e-12)


def tree(seed):
    """A model of 3 tokens and all of its 15 responses (test_grpo.py): model, tokens, mask, their
    log-probs, and those of a reference."""
    torch.manual_seed(seed)
    model, reference = three_token_model(), three_token_model()
    randomise(model, reference)
    tokens, mask = every_response()
    logp, _ = model.token_logp(tokens, mask)
    ref_logp, _ = reference.token_logp(tokens, mask)
    return model, tokens, mask, logp, ref_logp.detach()


@pytest.mark.parametrize("seed, alone, in_pairs", [(5, .996, .999), (7, .709, .767)])
def test_the_kl_penalty_in_the_reward_gives_the_gradient_of_the_rlhf_objective(
        seed, alone, in_pairs):
    """By enumeration of every response: with the sum over tokens, γ = λ = 1, ratio 1 and no
    whitening, the expected gradient of ppo_loss on token_reward is the gradient of Eq. 1,
    E[r] - β KL(π ‖ π_ref), whatever the critic says (a baseline that the action does not change).

    The token mean divides by the tokens of the batch, which depend on the responses. Of one
    response alone that is |y|, and turns the gradient by the first cosine above; of two, by the
    second; of very many it is nearly a constant, and turns nothing.
    """
    model, tokens, mask, logp, ref = tree(seed)
    beta, score = 0.6, torch.randn(15).double()
    params = list(model.parameters())
    p = logp.sum(1).exp()
    assert math.isclose(p.sum().item(), 1.0, rel_tol=1e-12)
    kl = (p * (logp - ref).sum(1)).sum()
    exact = flat_grad((p * score).sum() - beta * kl, params)

    # a critic is a function of the prefix, so it has one number for equal prefixes
    value, number = torch.zeros(15, 5).double(), {}
    for i in range(15):
        for t in range(5):
            prefix = tuple(tokens[i, :t].tolist())
            value[i, t] = number.setdefault(prefix, torch.randn(()).item())

    def expected(reward, size, n=None):
        """Σ over batches of `size` responses of their probability times -grad ppo_loss."""
        adv, _ = gae(reward, value, mask, 1.0, 1.0)
        total = 0.0
        for responses in itertools.product(range(15), repeat=size):
            i = list(responses)
            loss, _ = ppo_loss(logp[i], logp[i].detach(), adv[i], mask[i], 0.2, n)
            total = total - p[i].prod().detach() * loss
        return flat_grad(total, params)

    old = logp.detach()
    reward = token_reward(score, old, ref, mask, beta)
    torch.testing.assert_close(expected(reward, 1, n=1), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected(reward, 2, n=2), exact, rtol=0, atol=1e-12)
    for size, cosine in ((1, alone), (2, in_pairs)):
        found = torch.cosine_similarity(expected(reward, size), exact, dim=0).item()
        assert found == pytest.approx(cosine, abs=0.01)
    # with k1 clamped at 0, or with its sign turned, it is another gradient
    clamped = token_reward(score, torch.max(old, ref), ref, mask, beta)
    turned = token_reward(score, ref, old, mask, beta)
    for wrong in (clamped, turned):
        assert (expected(wrong, 1, n=1) - exact).norm() > 0.05 * exact.norm()


# -------------------------------------------------------------------------------- the reward model


def test_a_truncated_response_gets_its_penalty_and_never_a_score():
    """Under the rule and under a reward model; it is never right."""
    tokenizer = make_tokenizer()
    reward_model = ScalarModel(GPT(GPTConfig()), std=1.0)
    rows = [{"prompt": "5+8+7=", "_two_digits": "20"}] * 3
    responses = ["13,20#20", "#25", None]
    tokens, mask = torch.zeros(3, 15, dtype=torch.long), torch.zeros(3, 15)
    for i, response in enumerate(responses):
        ids = tokenizer.encode("5+8+7=" + (response or "13,2"))
        if response:
            ids.append(tokenizer.end)
        tokens[i, :len(ids)] = torch.tensor(ids)
        mask[i, 6:len(ids)] = 1

    def earned(reward_model, rows):
        cfg = ppo.Config()
        return compute_reward(cfg, reward_model, ppo.score, rows, tokens, mask, responses, -3.0)

    reward, _, correct = earned(None, rows)
    assert reward.tolist() == [1, 0, -3] and correct.tolist() == [1, 0, 0]
    reward, _, correct = earned(reward_model, rows)
    score = reward_model.score(tokens, mask).detach()
    torch.testing.assert_close(reward[:2], score[:2])
    assert reward[2] == -3 and correct.tolist() == [1, 0, 0]
    _, _, correct = earned(reward_model, [{"prompt": "x"}] * 3)
    assert correct is None
    reward_model.head.bias.data.fill_(math.nan)
    with pytest.raises(InputError, match="--reward"):
        earned(reward_model, rows)


class Sampler:
    """A policy that gives `right` of 100 prompts the response "1" and truncates every tenth."""
    cfg, device = GPTConfig(stop_token_ids=(256,)), torch.device("cpu")

    def __init__(self, right):
        self.right = right

    def generate(self, prompts, group_size, max_new_tokens, temperature, uniform):
        rows = []
        for i in range(len(prompts)):
            rows.append([9, 48 + (i < self.right), 48 if i % 10 == 9 else 256])
        return torch.tensor(rows), torch.tensor([[0, 1, 1]] * len(rows)).float(), None


def measured(monkeypatch, right, scores=None, **flags):
    """measure_reward over 100 prompts, under the rule or a reward model with these scores."""
    if scores is not None:
        monkeypatch.setattr(common.train, "score_responses", lambda *args: scores)
    rows = [{"prompt": "p", "ids": [9], "answer": "1"}] * 100
    return common.train.measure_reward(
        ppo.Config(**flags), Sampler(right), make_tokenizer(), scores, ppo.score, rows)


def test_a_truncated_response_has_one_reward_for_the_whole_run(monkeypatch, capsys):
    """The lowest of a sample at the start: taken from each batch, it would fall as batches grow."""
    scores = torch.arange(100.0) - 80                          # of truncated ones: -71, -61, ...
    assert measured(monkeypatch, 50, scores)["truncated_reward"] == -80
    assert "-80.000" in capsys.readouterr().out
    assert measured(monkeypatch, 50, scores, truncated_reward=-99)["truncated_reward"] == -99
    assert measured(monkeypatch, 50, scores + 100)["truncated_reward"] == 0
    # the standard deviation is that of what is paid out
    paid = [0.0 if i % 10 == 9 else 20.0 + i for i in range(100)]
    found = measured(monkeypatch, 50, scores + 100)["reward_std"]
    assert found == pytest.approx(statistics.pstdev(paid))


def test_the_unit_of_the_reward_does_not_jump_where_hardly_any_response_is_right(
        monkeypatch, capsys):
    """At a success rate of 1% a sample has none, one or two right responses by luck: the standard
    deviation is 0, .10 or .14, and 0 must not count as 1."""
    found = [measured(monkeypatch, right)["reward_std"] for right in (0, 1, 2, 3)]
    assert "warning" in capsys.readouterr().out
    assert found == pytest.approx([.1, .1, .14, .1706], abs=1e-4)
    measured(monkeypatch, 40)
    assert "warning" not in capsys.readouterr().out


def test_equal_responses_have_equal_scores_and_so_no_advantage(monkeypatch):
    """In bf16 two micro-batches round unlike, here by 1e-3; a group's standard deviation would turn
    that into advantages of more than 1, where 0 is right."""
    model = ScalarModel(tiny(dtype=torch.float32), std=1.0)
    torch.manual_seed(0)
    tokens = torch.randint(5, 23, (6, 9)).repeat_interleave(8, 0)      # eight equal responses each
    lengths = torch.arange(48) // 8 % 3 + 6
    mask = ((torch.arange(9) >= 4) & (torch.arange(9) < lengths[:, None])).float()
    found = common.train.score_responses(model, tokens, mask, 40)
    torch.testing.assert_close(found, model.score(tokens, mask).detach(), rtol=0, atol=1e-5)

    def rounded(*args):
        value, score = compute_values(*args)
        return value, score + 1e-3 * torch.randn_like(score)

    apart = rounded(model, tokens, mask)[1]
    monkeypatch.setattr(common.train, "compute_values", rounded)
    together = common.train.score_responses(model, tokens, mask, 40)
    assert grpo.group_advantage(apart, 8).abs().max() > 1
    assert (grpo.group_advantage(together, 8) == 0).all()


# -------------------------------------------------------------------------------------- the script


def test_what_the_update_gets_is_what_was_sampled_scored_and_valued(tmp_path, monkeypatch):
    """The whole script at temperature .7, two epochs of two minibatches in micro-batches:
    advantages and returns that reach the losses are computed again from the tokens, one response at
    a time and all logits at once. The reward model and the reference are the initial ones in every
    rollout; the critic starts as the reward model, in units of one standard deviation of its
    scores; whitening is over the rollout, after the returns; nothing has moved before a rollout's
    first step, and old log-probs and values stay for both epochs."""
    stop = tuple(range(60))
    shape = dict(vocab_size=257, stop_token_ids=stop, dtype=torch.float32)
    models = {"init": tiny(**shape), "reward": ScalarModel(tiny(**shape, seed=1), std=0.5)}
    for folder, model in models.items():
        (tmp_path / folder).mkdir()
        save_checkpoint(tmp_path / folder, model, make_tokenizer())
    with open(tmp_path / "rows.jsonl", "w") as f:
        for i in range(300):
            f.write(json.dumps({"prompt": f"{i}?"}) + "\n")

    forwards = []                                              # tokens of every token_logp
    initial_rewards = []                                       # of measure_reward_std and evaluate
    rollouts = []                                              # tokens, mask, {(loss, ids): calls}
    first_gaps = {}                                            # largest |new - old| before a step
    token_logp = GPT.token_logp

    def recorded_token_logp(self, tokens, *args, **more):
        forwards.append(tokens)
        return token_logp(self, tokens, *args, **more)

    def recorded_initial_reward(*args):
        *_, responses, truncated_reward = args
        reward, raw, correct = compute_reward(*args)
        initial_rewards.append([None if text is None else r.item()
                                for text, r in zip(responses, reward)])
        return reward, raw, correct

    def recorded_reward(*args):
        *_, tokens, mask, responses, truncated_reward = args
        rollouts.append((tokens, mask, {}))
        return compute_reward(*args)

    def recorded(loss):
        def record(new, old, x, mask, clip_eps, n, *more):     # x: adv or ret
            gap = ((new - old).detach() * mask).abs().max().item()
            first_gaps.setdefault((loss.__name__, len(rollouts)), gap)
            for i, ids in enumerate(forwards[-1]):
                columns = chosen_columns(mask[i])
                key = loss.__name__, tuple(ids[:columns[-1] + 1].tolist())
                call = n, old[i, columns].tolist(), x[i, columns].tolist()
                rollouts[-1][2].setdefault(key, []).append(call)
            return loss(new, old, x, mask, clip_eps, n, *more)
        return record

    monkeypatch.setattr(GPT, "token_logp", recorded_token_logp)
    monkeypatch.setattr(common.train, "compute_reward", recorded_initial_reward)
    monkeypatch.setattr(ppo, "compute_reward", recorded_reward)
    monkeypatch.setattr(ppo, "ppo_loss", recorded(ppo_loss))
    monkeypatch.setattr(ppo, "value_loss", recorded(value_loss))
    monkeypatch.setattr(ppo.Run, "plot", lambda *names: None)
    beta, gamma, lam = 0.5, 0.9, 0.8
    ppo.train(ppo.Config(
        init=str(tmp_path / "init"), reward=str(tmp_path / "reward"), out=str(tmp_path / "out"),
        data=str(tmp_path / "rows.jsonl"), prompts=12, minibatch=6, epochs=2, steps=3,
        max_new_tokens=12, temperature=0.7, truncated_reward=-1.0, kl_beta=beta, gamma=gamma,
        gae_lambda=lam, lr=1e-3, critic_lr=1e-3, warmup=0, micro_batch_tokens=60, eval_every=100,
        early_stopping=False))
    logged = metrics(tmp_path / "out")[1:]
    policy, _ = load(str(tmp_path / "init"))
    reward_model, _ = load(str(tmp_path / "reward"))
    worst = min([-1.0] + [x for x in initial_rewards[0] if x is not None])
    reward_std = statistics.pstdev(worst if x is None else x for x in initial_rewards[0])
    assert len(initial_rewards[0]) > 100 and reward_std > 0.1 and worst < -1
    assert len(rollouts) == 3 and len(first_gaps) == 6 and max(first_gaps.values()) < 1e-4

    for step, (tokens, mask, calls) in enumerate(rollouts):
        assert len(calls) == 24                                # 12 responses in two losses
        responses, scores, earned, valued = [], [], [], []
        for row, chosen in zip(tokens, mask):
            columns = chosen_columns(chosen)
            ids = row[:columns[-1] + 1]
            responses.append((ids, columns))
            ended = int(ids[-1]) in stop
            scores.append(reward_model(ids[None])[0, -1].item() if ended else None)
        expected_adv, expected_ret, found_adv, found_ret, tokens_in = [], [], [], [], {}
        for (ids, columns), score in zip(responses, scores):
            policy_calls = calls["ppo_loss", tuple(ids.tolist())]
            critic_calls = calls["value_loss", tuple(ids.tolist())]
            for loss, both in (("policy", policy_calls), ("critic", critic_calls)):
                assert len(both) == 2 and both[0][1:] == both[1][1:]       # the same in both epochs
                for epoch, (n, _, _) in enumerate(both):
                    key = loss, epoch, n
                    tokens_in[key] = tokens_in.get(key, 0) + len(columns)
            _, old, adv = policy_calls[0]
            _, value, ret = critic_calls[0]
            with torch.no_grad():
                ref = naive_logp(policy, ids[None], 0.7)[0, columns].tolist()
                before = [t - 1 for t in columns]
                first_value = (reward_model(ids[None])[0, before] / reward_std).tolist()
            if step == 0:
                assert old == pytest.approx(ref, abs=1e-4)
                assert value == pytest.approx(first_value, abs=1e-4)
            reward = [-beta * (a - b) for a, b in zip(old, ref)]
            reward[-1] += (worst if score is None else score) / reward_std
            for t in range(len(columns)):                      # the Monte-Carlo return
                earned.append(sum(gamma ** k * r for k, r in enumerate(reward[t:])))
            valued += value
            own_adv = brute_force_gae(
                torch.tensor([reward]).double(), torch.tensor([value]).double(),
                torch.ones(1, len(columns)), gamma, lam)[0].tolist()
            expected_adv += own_adv
            expected_ret += [a + v for a, v in zip(own_adv, value)]
            found_adv += adv
            found_ret += ret
        mean, std = statistics.mean(expected_adv), statistics.pstdev(expected_adv)
        assert found_adv == pytest.approx([(x - mean) / std for x in expected_adv], abs=1e-3)
        assert found_ret == pytest.approx(expected_ret, abs=1e-3)
        left = [g - v for g, v in zip(earned, valued)]
        explained = 1 - statistics.pvariance(left) / statistics.pvariance(earned)
        assert logged[step]["explained_var"] == pytest.approx(explained, abs=1e-3)
        for (_, _, n), total in tokens_in.items():             # two steps per epoch, maybe of one n
            assert n in (total, total / 2)
