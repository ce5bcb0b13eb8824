"""PPO's pieces against brute force, closed forms and enumeration.   python -m pytest tests/test_ppo.py"""
import itertools
import json
import math
import statistics

import pytest
import torch

import ppo
from conftest import PROMPTS, gradients, naive_logp, tiny
from model import GPT, GPTConfig, InputError, ScalarModel, frozen_scalars, load, make_tokenizer, micro_batches, save
from ppo import explained_variance, gae, ppo_loss, token_reward, value_loss, whiten

DEVICE = torch.device("cpu")
RUBBISH = (math.nan, math.inf, -math.inf, 1e6)


def batch(B=8, T=10, seed=0):
    """Ragged answers, each 1 to 6 tokens in one piece; logp, old_logp, ref_logp, adv, value, old_value, ret (B, T) and mask."""
    torch.manual_seed(seed)
    mask = torch.zeros(B, T).double()
    for i, row in enumerate(mask):
        start = int(torch.randint(1, 4, ()))
        row[start:start + 1 + i % 6] = 1
    old = -torch.rand(B, T).double() * 3
    noise = lambda scale: torch.randn(B, T).double() * scale
    return old + noise(.3), old, old + noise(.3), noise(1), noise(1), noise(1), noise(1), mask


def spoil(mask, *tensors):
    for rubbish in RUBBISH:
        yield [torch.where(mask > 0, x, rubbish) for x in tensors]


# -------------------------------------------------------------------------------------------------------------------- the reward


def test_the_score_lands_on_the_last_token_and_every_token_pays_k1():
    logp, _, ref, *_, mask = batch()
    score = torch.randn(len(mask)).double()
    reward = token_reward(score, logp, ref, mask, 0.7)
    for i in range(len(mask)):
        chosen = [t for t in range(mask.size(1)) if mask[i, t]]
        for t in range(mask.size(1)):
            expected = (-0.7 * (logp[i, t] - ref[i, t]) if t in chosen else 0.0) + (score[i] if t == chosen[-1] else 0.0)
            assert math.isclose(reward[i, t], expected, abs_tol=1e-12)
    assert (logp < ref)[mask > 0].any() and (reward[mask > 0] > 0).any()                     # negative k1 is not clamped: it pays
    for spoiled in spoil(mask, logp, ref):
        assert torch.equal(token_reward(score, *spoiled, mask, 0.7), reward)
    assert (token_reward(score, logp, ref, torch.zeros_like(mask), 0.7) == 0).all()


# -------------------------------------------------------------------------------------------------------------------- the advantage


def brute_gae(reward, value, mask, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k} by a double sum over the tokens of each answer, with V = 0 after the last."""
    adv = torch.zeros_like(value)
    for i in range(len(mask)):
        at = [t for t in range(mask.size(1)) if mask[i, t]]
        V = [value[i, t].item() for t in at] + [0.0]
        delta = [reward[i, t].item() + gamma * V[k + 1] - V[k] for k, t in enumerate(at)]
        for k, t in enumerate(at):
            adv[i, t] = sum((gamma * lam) ** n * d for n, d in enumerate(delta[k:]))
    return adv


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 1.0), (1.0, 0.0), (0.5, 0.0)])
def test_gae_is_the_sum_of_discounted_errors_on_ragged_rows(gamma, lam):
    reward, _, _, _, value, *_, mask = batch()
    adv, ret = gae(reward, value, mask, gamma, lam)
    torch.testing.assert_close(adv, brute_gae(reward, value, mask, gamma, lam), rtol=0, atol=1e-12)
    torch.testing.assert_close(ret, (adv + value) * mask, rtol=0, atol=1e-12)
    for spoiled in spoil(mask, reward, value):
        kept = [x.clone() for x in spoiled]
        assert all(torch.equal(a, b) for a, b in zip(gae(*spoiled, mask, gamma, lam), (adv, ret)))
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(spoiled, kept))      # what it was given stays as it was


def test_lambda_1_is_monte_carlo_and_lambda_0_trusts_the_next_value():
    reward, _, _, _, value, *_, mask = batch()
    _, ret = gae(reward, value, mask, 0.9, 1.0)
    _, td = gae(reward, value, mask, 0.9, 0.0)
    for i in range(len(mask)):
        at = [t for t in range(mask.size(1)) if mask[i, t]]
        for k, t in enumerate(at):
            assert math.isclose(ret[i, t], sum(0.9 ** n * reward[i, s] for n, s in enumerate(at[k:])), abs_tol=1e-12)      # whatever the critic says
            assert math.isclose(td[i, t], reward[i, t] + (0.9 * value[i, at[k + 1]] if k + 1 < len(at) else 0.0), abs_tol=1e-12)


def test_a_critic_that_knows_leaves_no_advantage():
    """V_t = the return from t on: every δ is 0, at the end token too, after which V is 0."""
    reward, *_, mask = batch()
    value = gae(reward, torch.zeros_like(reward), mask, 1.0, 1.0)[1]
    assert gae(reward, value, mask, 1.0, 0.95)[0].abs().max() < 1e-12


def test_whitening_is_over_the_mask_alone_and_leaves_the_returns():
    reward, _, _, _, value, *_, mask = batch()
    adv, ret = gae(reward, value, mask, 1.0, 0.95)
    kept = adv.clone(), ret.clone()
    white = whiten(adv, mask)
    inside = white[mask > 0]
    assert abs(inside.mean()) < 1e-12 and math.isclose(inside.var(correction=0), 1.0, rel_tol=1e-6) and (white[mask == 0] == 0).all()
    slope = (inside - inside.flip(0)) / (adv[mask > 0] - adv[mask > 0].flip(0))
    assert (slope[slope.isfinite()] > 0).all() and slope[slope.isfinite()].std() < 1e-9      # a line with a positive slope
    assert torch.equal(adv, kept[0]) and torch.equal(ret, kept[1])
    for spoiled, in spoil(mask, adv):
        assert torch.equal(whiten(spoiled, mask), white)
    assert (whiten(torch.full_like(adv, 0.3), mask).abs() < 1e-9).all() and (whiten(adv, torch.zeros_like(mask)) == 0).all()


# -------------------------------------------------------------------------------------------------------------------- the losses


def test_policy_loss_is_equation_7_as_a_token_mean():
    logp, old, _, adv, *_, mask = batch()
    loss, stats = ppo_loss(logp, old, adv, mask, 0.2)
    at = [(i, t) for i, t in itertools.product(*map(range, mask.shape)) if mask[i, t]]
    r, a = [math.exp(logp[x] - old[x]) for x in at], [adv[x].item() for x in at]
    mean = lambda x: sum(x) / len(at)
    assert math.isclose(loss, -mean([min(x * y, min(max(x, .8), 1.2) * y) for x, y in zip(r, a)]), rel_tol=1e-12)
    assert math.isclose(stats["clip_low"], mean([x < .8 and y < 0 for x, y in zip(r, a)]), rel_tol=1e-6) and stats["clip_low"] > 0
    assert math.isclose(stats["clip_high"], mean([x > 1.2 and y > 0 for x, y in zip(r, a)]), rel_tol=1e-6) and stats["clip_high"] > 0
    assert math.isclose(stats["approx_kl"], mean([x - 1 - math.log(x) for x in r]), rel_tol=1e-9)


@pytest.mark.parametrize("adv, ratio, flows", [(1, 0.5, True), (1, 2.0, False), (-1, 0.5, False), (-1, 2.0, True)])
def test_the_clip_cuts_the_gradient_only_where_it_would_overshoot(adv, ratio, flows):
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    one = torch.ones(1, 1)
    loss, stats = ppo_loss(logp, 0 * one, adv * one, one, 0.2)
    assert (torch.autograd.grad(loss, logp)[0].item() != 0) is flows
    assert (stats["clip_low"], stats["clip_high"]) == (float(adv < 0 and not flows), float(adv > 0 and not flows))


@pytest.mark.parametrize("value, ret, expected, flows", [
    (0.1, 1.0, 0.5 * 0.9 ** 2, True),       # within the clip: the plain error
    (0.5, 1.0, 0.5 * 0.8 ** 2, False),      # beyond it on the way to the target: the larger, clipped error, and no gradient
    (-0.5, 1.0, 0.5 * 1.5 ** 2, True),      # beyond it on the wrong side: the plain error is the larger, and pulls back
    (2.0, 1.0, 0.5 * 1.0 ** 2, True),       # overshot: the plain error is the larger
    (-0.5, -1.0, 0.5 * 0.8 ** 2, False)])
def test_the_value_clip_keeps_the_larger_error(value, ret, expected, flows):
    """old value 0, ε_v = .2."""
    v, one = torch.tensor([[value]]).requires_grad_(), torch.ones(1, 1)
    loss, stats = value_loss(v, 0 * one, ret * one, one, 0.2)
    assert math.isclose(loss.item(), expected, rel_tol=1e-6) and (torch.autograd.grad(loss, v)[0].item() != 0) is flows
    assert stats["value_clip"] == float(not flows) and math.isclose(stats["value_loss"], 0.5 * (value - ret) ** 2, rel_tol=1e-6)


def test_value_loss_is_half_the_token_mean_and_off_means_off():
    *_, value, old, ret, mask = batch()
    loss, _ = value_loss(value, old, ret, mask, 0.2)
    at = [(i, t) for i, t in itertools.product(*map(range, mask.shape)) if mask[i, t]]
    error = lambda v, x: (v - ret[x].item()) ** 2
    both = [max(error(value[x].item(), x), error(min(max(value[x].item(), old[x].item() - .2), old[x].item() + .2), x)) for x in at]
    assert math.isclose(loss, sum(both) / len(at) / 2, rel_tol=1e-12)
    plain = sum(error(value[x].item(), x) for x in at) / len(at) / 2
    assert all(math.isclose(value_loss(value, old, ret, mask, off)[0], plain, rel_tol=1e-12) for off in (None, 0, 0.0, 1e9))


def test_garbage_outside_the_mask_changes_neither_loss_nor_gradient_nor_statistics():
    logp, old, _, adv, value, old_value, ret, mask = batch()
    for loss_of, args in ((lambda *x: ppo_loss(*x, mask, 0.2), (logp, old, adv)), (lambda *x: value_loss(*x, mask, 0.2), (value, old_value, ret))):
        clean = args[0].clone().requires_grad_()
        loss, stats = loss_of(clean, *args[1:])
        loss.backward()
        for spoiled in spoil(mask, *args):
            dirty = spoiled[0].requires_grad_()
            other, other_stats = loss_of(dirty, *spoiled[1:])
            other.backward()
            assert other == loss and other_stats == stats and torch.equal(dirty.grad, clean.grad)
        assert torch.equal(clean.grad != 0, (clean.grad != 0) & (mask > 0))

def test_an_empty_row_contributes_nothing():
    logp, old, _, adv, value, old_value, ret, mask = batch()
    for f, args in ((ppo_loss, (logp, old, adv)), (value_loss, (value, old_value, ret))):
        longer = [torch.cat([x, x[:1]]) for x in args] + [torch.cat([mask, torch.zeros_like(mask[:1])])]
        (a, sa), (b, sb) = f(*args, mask, 0.2), f(*longer, 0.2)
        assert a == b and sa == sb
        loss, stats = f(*args, torch.zeros_like(mask), 0.2)
        assert loss == 0 and not any(math.isnan(x) for x in stats.values())


def test_explained_variance_of_a_perfect_a_constant_and_a_contrary_critic():
    *_, ret, mask = batch()
    assert explained_variance(ret, ret, mask) == 1 and explained_variance(ret + 3, ret, mask) == 1
    assert abs(explained_variance(torch.full_like(ret, 0.7), ret, mask)) < 1e-12
    assert math.isclose(explained_variance(-ret, ret, mask), -3.0, rel_tol=1e-9)
    inside = ret[mask > 0]
    half = explained_variance(ret / 2, ret, mask)
    assert math.isclose(half, 1 - ((inside / 2).var() / inside.var()), rel_tol=1e-9)
    for spoiled in spoil(mask, ret / 2, ret):
        assert explained_variance(*spoiled, mask) == half


# -------------------------------------------------------------------------------------------------------------------- with models under it


def rollout(policy, critic, tau=0.8):
    tokens, mask, sampled = policy.generate(PROMPTS, 4, 12, tau)
    value, _ = frozen_scalars(critic, tokens, mask, 0)
    reward = token_reward(torch.randn(len(tokens)).double(), sampled, sampled - 0.1, mask, 0.1)
    adv, ret = gae(reward, value, mask, 1.0, 0.95)
    return tokens, mask, sampled, whiten(adv, mask), value, ret


def test_the_first_step_has_ratio_1_and_approximate_kl_0(family):
    policy = tiny(family)
    critic = ScalarModel(tiny(family, seed=1), std=0.5).double()
    tokens, mask, sampled, adv, value, ret = rollout(policy, critic)
    logp, _ = policy.token_logp(tokens, mask, 0.8)
    loss, stats = ppo_loss(logp, sampled, adv, mask, 1e-6)
    assert stats["clip_low"] == stats["clip_high"] == 0 and stats["approx_kl"].abs() < 1e-15
    assert math.isclose(loss.item(), -(adv * mask).sum() / mask.sum(), abs_tol=1e-9)
    vloss, stats = value_loss(critic.value(tokens), value, ret, mask, 1e-6)
    assert stats["value_clip"] < 1e-9 and math.isclose(vloss.item(), 0.5 * ((value - ret).square() * mask).sum() / mask.sum(), rel_tol=1e-4)


def test_micro_batches_change_no_gradient_of_policy_or_critic():
    grads = []
    for budget in (10 ** 6, 1, 40):
        policy, critic = tiny(), ScalarModel(tiny(seed=1), std=0.5).double()
        torch.manual_seed(3)
        critic.head.weight.data.normal_()
        tokens, mask, sampled, adv, value, ret = rollout(policy, critic)
        old, old_value = sampled + 0.3 * torch.randn_like(sampled), value + 0.3 * torch.randn_like(value)
        i = torch.randperm(len(tokens))
        n = int(mask[i].sum())
        for j, t, at in micro_batches(mask, i, budget, DEVICE):
            logp, _ = policy.token_logp(tokens[j, :t], None, 0.8, at)
            ppo_loss(logp, old[j, :t], adv[j, :t], mask[j, :t], 0.2, n)[0].backward()
            value_loss(critic.value(tokens[j, :t]), old_value[j, :t], ret[j, :t], mask[j, :t], 0.2, n)[0].backward()
        grads.append((gradients(policy), gradients(critic)))
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert len(a) == len(b) > 10
            for name, g in a.items():
                torch.testing.assert_close(b[name], g, rtol=0, atol=1e-12)


def tree(seed):
    """A model of 3 tokens (id 0 ends) and answers of at most 3: all 15 of them, their tokens, mask and log-probs."""
    torch.manual_seed(seed)
    model, ref = (GPT(GPTConfig(vocab=3, context=5, layers=1, width=8, heads=1, stop=(0,))).double() for _ in range(2))
    with torch.no_grad():
        for p in [*model.parameters(), *ref.parameters()]:
            p.copy_(torch.randn_like(p) * 0.7)
    ends = [(0,)] + [(a, 0) for a in (1, 2)] + [(a, b, c) for a, b, c in itertools.product((1, 2), (1, 2), (0, 1, 2))]
    tokens = torch.tensor([[1, 2, *o] + [0] * (3 - len(o)) for o in ends])
    mask = torch.tensor([[0., 0.] + [1.] * len(o) + [0.] * (3 - len(o)) for o in ends]).double()
    return model, tokens, mask, model.token_logp(tokens, mask)[0], ref.token_logp(tokens, mask)[0].detach()


@pytest.mark.parametrize("seed, alone, in_pairs", [(5, .996, .999), (7, .709, .767)])
def test_the_price_in_the_reward_gives_the_gradient_of_the_rlhf_objective(seed, alone, in_pairs):
    """By enumeration of every answer: with the sum over tokens, γ = λ = 1, ratio 1 and no whitening, the expected gradient of ppo_loss on
    token_reward is the gradient of Eq. 1, E[r] - β KL(π ‖ π_ref), whatever the critic says (a baseline that the action does not know).
    The token mean divides by the tokens of the batch, which depend on the answers. Of one answer alone that is |y|, and turns the gradient by
    the first cosine above; of two, by the second; of very many it is nearly a constant, and turns nothing."""
    model, tokens, mask, logp, ref = tree(seed)
    beta, score = 0.6, torch.randn(15).double()
    params = list(model.parameters())
    flat = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])
    p = logp.sum(1).exp()
    assert math.isclose(p.sum(), 1.0, rel_tol=1e-12)
    kl = (p * (logp - ref).sum(1)).sum()
    exact = flat((p * score).sum() - beta * kl)

    # a critic is a function of the prefix, so it has one number for equal prefixes
    number = {}
    value = torch.tensor([[number.setdefault(tuple(row[:t].tolist()), torch.randn(()).item()) for t in range(5)] for row in tokens]).double()
    reward = token_reward(score, logp.detach(), ref, mask, beta)
    adv, _ = gae(reward, value, mask, 1.0, 1.0)

    def expected(size, n=None):
        """Σ over batches of `size` answers of their probability times grad ppo_loss."""
        total = 0.0
        for rows in itertools.product(range(15), repeat=size):
            i = list(rows)
            total = total + p[i].prod().detach() * ppo_loss(logp[i], logp[i].detach(), adv[i], mask[i], 0.2, n)[0]
        return -flat(total)

    torch.testing.assert_close(expected(1, n=1), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected(2, n=2), exact, rtol=0, atol=1e-12)
    found = [torch.cosine_similarity(expected(size), exact, dim=0).item() for size in (1, 2)]
    assert found == pytest.approx([alone, in_pairs], abs=0.01)
    # the price as a number: the same with a k1 clamped at 0, or with its sign turned, is another gradient
    for wrong in (token_reward(score, torch.max(logp.detach(), ref), ref, mask, beta), token_reward(score, ref, logp.detach(), mask, beta)):
        adv, _ = gae(wrong, value, mask, 1.0, 1.0)
        assert (expected(1, n=1) - exact).norm() > 0.05 * exact.norm()


# -------------------------------------------------------------------------------------------------------------------- the judge


def test_a_cut_answer_gets_its_penalty_and_never_a_score():
    """Rule and reward model alike; gold is the rule's opinion, 0 for what was cut."""
    tokenizer = make_tokenizer("bytes")
    judge = ScalarModel(GPT(GPTConfig()), std=1.0)
    rows = [{"prompt": "5+8+7=", "two_digits": "20"}] * 3
    texts = ["13,20#20", "#25", None]
    said = [tokenizer.encode_ordinary("5+8+7=" + (t or "13,2")) + ([256] if t else []) for t in texts]
    T = max(map(len, said))
    tokens = torch.tensor([x + [0] * (T - len(x)) for x in said])
    mask = torch.tensor([[0.] * 6 + [1.] * (len(x) - 6) + [0.] * (T - len(x)) for x in said])
    cfg = ppo.Config(no_end_reward=-3.0)
    reward, gold = ppo.rewards(cfg, None, rows, tokens, mask, texts)
    assert reward.tolist() == [1, 0, -3] and gold.tolist() == [1, 0, 0]
    assert ppo.rewards(ppo.Config(), None, rows, tokens, mask, texts)[0].tolist() == [1, 0, 0]
    for level in (10.0, -50.0):                                           # being cut never beats the worst answer that ended
        judge.head.bias.data.fill_(level)
        reward, gold = ppo.rewards(cfg, judge, rows, tokens, mask, texts)
        torch.testing.assert_close(reward[:2], judge.score(tokens, mask)[:2].detach())
        assert reward[2] == min(-3, reward[:2].min()) and gold.tolist() == [1, 0, 0]
    assert ppo.rewards(cfg, judge, [{"prompt": "x"}] * 3, tokens, mask, texts)[1] is None
    judge.head.bias.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        ppo.rewards(cfg, judge, rows, tokens, mask, texts)


# -------------------------------------------------------------------------------------------------------------------- the script


def test_what_the_update_gets_is_what_was_said_scored_and_valued(tmp_path, monkeypatch):
    """The whole script at temperature .7, two epochs of two minibatches in small pieces: advantages and returns that reach the losses are
    made again from the tokens, one answer at a time and all logits at once. The judge and the reference are those of the start in every
    rollout; the critic begins as the judge, in units of one standard deviation of its scores; whitening is over the rollout, after the
    returns; nothing has moved before a rollout's first step, and old log-probs and values stay for both epochs."""
    stop, own = tuple(range(60)), dict(vocab=257, stop=tuple(range(60)), dtype=torch.float32)
    for folder, model in (("init", tiny(**own)), ("judge", ScalarModel(tiny(**own, seed=1), std=0.5))):
        (tmp_path / folder).mkdir()
        save(str(tmp_path / folder), model, make_tokenizer("bytes"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(300)))
    read, rollouts, gaps, token_logp, earned, ppo_loss, value_loss = [], [], {}, GPT.token_logp, ppo.rewards, ppo.ppo_loss, ppo.value_loss

    def reading(self, tokens, *args):
        read.append(tokens)
        return token_logp(self, tokens, *args)

    def judging(cfg, judge, rows, tokens, mask, texts):
        reward = earned(cfg, judge, rows, tokens, mask, texts)
        rollouts.append((tokens, mask, reward[0], {}))
        return reward

    def watching(loss):
        def spy(new, old, x, mask, *args):                                # logp, old_logp, adv, or value, old_value, ret; then clip and n
            gaps.setdefault((loss.__name__, len(rollouts)), ((new - old).detach() * mask).abs().max().item())
            for ids, m, *row in zip(read[-1], mask, old, x):
                key = loss.__name__, tuple(ids[:int(m.nonzero().max()) + 1].tolist())
                rollouts[-1][3].setdefault(key, []).append([args[1:]] + [y[m > 0].tolist() for y in row])
            return loss(new, old, x, mask, *args)
        return spy

    monkeypatch.setattr(GPT, "token_logp", reading)
    monkeypatch.setattr(ppo, "rewards", judging)
    monkeypatch.setattr(ppo, "ppo_loss", watching(ppo_loss))
    monkeypatch.setattr(ppo, "value_loss", watching(value_loss))
    monkeypatch.setattr(ppo.Folder, "plot", lambda *names: None)
    beta, gamma, lam = 0.5, 0.9, 0.8
    paths = {name: str(tmp_path / path) for name, path in (("init", "init"), ("reward", "judge"), ("data", "rows.jsonl"), ("out", "out"))}
    ppo.train(ppo.Config(**paths, prompts=12, minibatch=6, epochs=2, steps=3, max_new=12, temperature=0.7, no_end_reward=-1.0, kl_beta=beta,
                         gamma=gamma, lam=lam, lr=1e-3, critic_lr=1e-3, warmup=0, micro_tokens=60, eval_every=100, guard=False))
    (start, _), (judge, _) = load(str(tmp_path / "init")), load(str(tmp_path / "judge"))
    unit = statistics.pstdev(rollouts[0][2].tolist())                     # of many answers of the start
    rollouts = [r for r in rollouts if r[3]]
    assert len(rollouts) == 3 and unit > 0.1
    assert len(gaps) == 6 and max(gaps.values()) < 1e-4
    for i, (tokens, mask, _, seen) in enumerate(rollouts):
        assert len(seen) == 24
        answers, scores = [ids[:int(m.nonzero().max()) + 1] for ids, m in zip(tokens, mask)], []
        for ids in answers:
            scores.append(judge(ids[None])[0, -1].item() if int(ids[-1]) in stop else None)
        worst = min([-1.0] + [x for x in scores if x is not None])
        raw, rets, advs, tokens_of = [], [], [], {}
        for ids, m, score in zip(answers, mask, scores):
            policy, critic = (seen[name, tuple(ids.tolist())] for name in ("ppo_loss", "value_loss"))
            assert len(policy) == len(critic) == 2 and policy[0][1:] == policy[1][1:] and critic[0][1:] == critic[1][1:]
            at, (_, old, adv), (_, value, ret) = m.nonzero()[:, 0].tolist(), policy[0], critic[0]
            for loss, epochs in (("policy", policy), ("critic", critic)):
                for epoch, (n, *_) in enumerate(epochs):
                    tokens_of[loss, epoch, n] = tokens_of.get((loss, epoch, n), 0) + len(at)
            with torch.no_grad():
                ref = naive_logp(start, ids[None], 0.7)[0, at].tolist()
                first = (judge(ids[None])[0, [t - 1 for t in at]] / unit).tolist()
            if i == 0:
                assert old == pytest.approx(ref, abs=1e-4) and value == pytest.approx(first, abs=1e-4)
            reward = [-beta * (a - b) for a, b in zip(old, ref)]
            reward[-1] += (worst if score is None else score) / unit
            both = [torch.tensor([x]).double() for x in (reward, value)]
            here = brute_gae(*both, torch.ones(1, len(at)), gamma, lam)[0].tolist()
            raw, rets, advs = raw + here, rets + [(a + v, x) for a, v, x in zip(here, value, ret)], advs + adv
        mean, std = statistics.mean(raw), statistics.pstdev(raw)
        assert advs == pytest.approx([(x - mean) / std for x in raw], abs=1e-3)
        assert [x for _, x in rets] == pytest.approx([x for x, _ in rets], abs=1e-3)
        assert all(n in ((total,), (total / 2,)) for (*_, n), total in tokens_of.items())     # two steps an epoch, maybe of equal length
