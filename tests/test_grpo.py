"""GRPO against enumeration, closed forms and brute force.   python -m pytest tests/test_grpo.py"""
import itertools
import json
import math
import statistics

import pytest
import torch
from torch.autograd import grad

import grpo
import sft
from common import load
from common.checkpoint import save_checkpoint
from common.tokenizer import make_tokenizer
from common.evaluate import rollout_stats
from common.optimizers import Optimizers
from common.train import compute_reward, micro_batches
from conftest import PROMPTS, bf16_devices, gradients, naive_logp, script, tiny
from grpo import group_advantage, grpo_loss, kl_k3
from model import GPT, GPTConfig

CPU = torch.device("cpu")
RUBBISH = (math.nan, math.inf, -math.inf, 1e6)


def batch(B=8, T=9):
    """Ragged masks, unequal advantages, ratios on both sides of the clip: logp, old_logp, ref_logp
    (B, T), adv (B,), mask (B, T)."""
    torch.manual_seed(0)
    mask = torch.zeros(B, T).double()
    for row in mask:
        start = int(torch.randint(1, 4, ()))
        row[start:start + int(torch.randint(1, T - 3, ()))] = 1
    old_logp = -torch.rand(B, T).double() * 3
    logp = old_logp + torch.randn(B, T) * 0.3
    ref_logp = old_logp + torch.randn(B, T) * 0.3
    return logp, old_logp, ref_logp, torch.randn(B).double(), mask


# ----------------------------------------------------------------------------------- the advantage


def test_advantage_is_the_standardised_reward_of_its_own_group():
    """§4.1.2, with the unbiased std: (1, 0, 0, 0) has mean 1/4 and variance 1/4."""
    adv = group_advantage(torch.tensor([1., 0., 0., 0., 3., 5., 3., 5.]), 4)
    a = .75 ** .5
    expected = torch.tensor([1.5, -.5, -.5, -.5, -a, a, -a, a])
    torch.testing.assert_close(adv, expected, rtol=1e-3, atol=0)
    assert adv.view(2, 4).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("reward", [0.3, 0.1, 1 / 3, 1.0, 0.0, -7.7])
def test_equal_rewards_have_advantage_exactly_zero(reward):
    """In float32 the mean of sixteen .3 is not .3, and a tiny eps would turn the difference into an
    advantage of about 1."""
    assert (group_advantage(torch.full((16,), reward), 16) == 0).all()
    mixed = group_advantage(torch.tensor([reward] * 16 + [0.2] * 8 + [0.9] * 8), 16)
    assert (mixed[:16] == 0).all() and (mixed[16:] != 0).all()


# ---------------------------------------------------------------------------------------- the loss


def brute_force(logp, old_logp, ref_logp, adv, mask, eps, beta):
    """-J of Eq. 3 by two loops in plain Python."""
    total = 0.0
    for i in range(len(logp)):
        a, inner, length = adv[i].item(), 0.0, 0
        for t in range(logp.size(1)):
            if mask[i, t] == 1:
                r = math.exp(logp[i, t] - old_logp[i, t])
                q = math.exp(ref_logp[i, t] - logp[i, t])
                inner += min(r * a, max(1 - eps, min(1 + eps, r)) * a)
                inner -= beta * (q - math.log(q) - 1)
                length += 1
        total += inner / length
    return -total / len(logp)


def test_loss_is_equation_3():
    logp, old, ref, adv, mask = batch()
    loss, stats = grpo_loss(logp, old, ref, adv, mask, clip_eps=0.2, kl_beta=0.3)
    expected = brute_force(logp, old, ref, adv, mask, 0.2, 0.3)
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)
    ratio = (logp - old).exp()[mask > 0]
    a = adv[:, None].expand_as(mask)[mask > 0]
    expected = {"clip_low": ((ratio < .8) & (a < 0)).double().mean(),
                "clip_high": ((ratio > 1.2) & (a > 0)).double().mean()}
    for name, x in expected.items():
        assert x > 0 and math.isclose(stats[name], x, rel_tol=1e-9), name


@pytest.mark.parametrize("adv, ratio, flows", [
    (1, 0.5, True), (1, 2.0, False), (-1, 0.5, False), (-1, 2.0, True)])
def test_the_clip_cuts_the_gradient_only_where_it_would_overshoot(adv, ratio, flows):
    """The min, for both signs of the advantage; a max for negative ones is a common bug."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, stats = grpo_loss(logp, zero, zero, torch.tensor([float(adv)]), one, 0.2, kl_beta=0.0)
    assert (grad(loss, logp)[0].item() != 0) is flows
    assert stats["clip_low"] == float(adv < 0 and not flows)
    assert stats["clip_high"] == float(adv > 0 and not flows)


def test_k3_is_the_kl_in_value_and_the_other_kl_in_gradient():
    """By enumeration over six tokens: E_π[k3] = KL(π ‖ π_ref), as Eq. 4 says; but differentiated as
    a loss on samples of π it has the gradient of KL(π_ref ‖ π)."""
    torch.manual_seed(0)
    z = torch.randn(6).double().requires_grad_()
    logp = z.log_softmax(0)
    ref = torch.randn(6).double().log_softmax(0)
    p = logp.exp().detach()
    reverse = (logp.exp() * (logp - ref)).sum()
    forward = (ref.exp() * (ref - logp)).sum()
    # every token as a response of length 1: the KL penalty through the loss itself, and by kl_k3
    zero, one = torch.zeros(1), torch.ones(1, 1)
    penalty = []
    for v in range(6):
        x, r = logp[v].view(1, 1), ref[v].view(1, 1)
        penalty.append(grpo_loss(x, x.detach(), r, zero, one, clip_eps=0.2, kl_beta=1.0)[0])
    expected_penalty = (p * torch.stack(penalty)).sum()
    assert torch.isclose(expected_penalty, reverse)
    assert torch.isclose((p * kl_k3(logp, ref)).sum(), reverse)
    assert not torch.isclose(reverse, forward, rtol=.05)
    as_loss, = grad(expected_penalty, z, retain_graph=True)
    d_forward, = grad(forward, z, retain_graph=True)
    d_reverse, = grad(reverse, z)
    torch.testing.assert_close(as_loss, d_forward)
    assert (as_loss - d_reverse).norm() > .1 * d_reverse.norm()


def test_k3_keeps_its_digits_near_zero():
    """For a difference of 1e-4 in float32, k3 = d²/2, where exp(d) - d - 1 would give 0 or 1e-7."""
    d = torch.tensor(1e-4)
    assert math.isclose(kl_k3(torch.zeros(()), d).item(), 0.5e-8, rel_tol=0.5)
    assert kl_k3(d, d) == 0


def test_ratio_and_k3_are_exact_up_to_20_nats_and_never_infinite():
    """exp(100) is infinite in float32, and inf - inf is NaN."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for d in (-1000.0, -30.0, -19.9, 0.5, 19.9):               # log π_ref - log π
        expected = math.exp(d) - 1 - d
        assert kl_k3(zero.double(), zero.double() + d).item() == pytest.approx(expected, rel=1e-12)
        if d > -30:
            for loss in (grpo_loss(zero.double() - d, zero, zero, -one[0], one, 0.2, 0.0)[0],):
                assert loss.item() == pytest.approx(max(0.8, math.exp(-d)), rel=1e-12)
    for far in (100.0, 1e4):
        logp = torch.full((1, 1), far, requires_grad=True)
        for advantage in (one[0], -one[0]):
            loss, _ = grpo_loss(logp, zero, zero + far + far, advantage, one, 0.2, 0.1)
            assert loss.isfinite() and grad(loss, logp)[0].isfinite().all()


def test_garbage_outside_the_mask_changes_neither_loss_nor_gradient_nor_statistics():
    logp, old, ref, adv, mask = batch()
    clean = logp.clone().requires_grad_()
    loss, stats = grpo_loss(clean, old, ref, adv, mask, 0.2, 0.3)
    loss.backward()
    for rubbish in RUBBISH:
        dirty = torch.where(mask > 0, logp, rubbish).requires_grad_()
        dirty_old = torch.where(mask > 0, old, -rubbish)
        dirty_ref = torch.where(mask > 0, ref, rubbish)
        inputs = [dirty, dirty_old, dirty_ref, adv, mask]
        copies = [x.detach().clone() for x in inputs]
        other, other_stats = grpo_loss(*inputs, 0.2, 0.3)
        other.backward()
        assert other == loss and other_stats == stats and torch.equal(dirty.grad, clean.grad)
        for a, b in zip(inputs, copies):                       # and the inputs stay as they were
            assert torch.equal(a.detach().nan_to_num(), b.nan_to_num())
    assert (clean.grad[mask == 0] == 0).all() and (clean.grad[mask > 0] != 0).any()


def test_an_empty_row_contributes_nothing():
    logp, old, ref, adv, mask = batch()
    longer = [torch.cat([x, x[:1]]) for x in (logp, old, ref, adv)]
    longer.append(torch.cat([mask, torch.zeros_like(mask[:1])]))
    loss, stats = grpo_loss(logp, old, ref, adv, mask, 0.2, 0.3)
    longer_loss, longer_stats = grpo_loss(*longer, 0.2, 0.3)
    assert longer_loss == loss and longer_stats == stats
    loss, stats = grpo_loss(logp, old, ref, adv, torch.zeros_like(mask), 0.2, 0.3)
    assert loss == 0 and not any(math.isnan(x) for x in stats.values())


def test_the_four_reductions_by_their_closed_forms():
    """For l = r A (no clip, no KL penalty), by plain loops. The sequence mean is grpo_loss, the
    token mean is sft_loss; sum and constant are grpo_loss with an advantage that carries |o_i|, and
    another denominator. experiments/variants.py stands on this."""
    logp, old, _, adv, mask = batch()
    length, B, L = mask.sum(1), len(mask), 20
    rows = []                                                  # l_it, by response
    for i in range(B):
        tokens = [t for t in range(mask.size(1)) if mask[i, t]]
        rows.append([math.exp(logp[i, t] - old[i, t]) * adv[i].item() for t in tokens])
    total = sum(sum(row) for row in rows)
    expected = {"sequence mean": sum(sum(row) / len(row) for row in rows) / B,
                "sum": total / B,
                "constant": total / (B * L),
                "token mean": total / sum(len(row) for row in rows)}

    def objective(adv, n=None):
        loss, _ = grpo_loss(logp, old, old, adv, mask, clip_eps=1e9, kl_beta=0.0, n=n)
        return -loss.item()

    token_mean, _ = sft.sft_loss((logp - old).exp() * adv[:, None], mask)
    found = {"sequence mean": objective(adv),
             "sum": objective(adv * length),
             "constant": objective(adv * length, B * L),
             "token mean": -token_mean.item()}
    for name, x in expected.items():
        assert math.isclose(found[name], x, rel_tol=1e-9), name
    assert len({round(x, 6) for x in found.values()}) == 4


# ------------------------------------------------------------------------------------ with a model


def rollout(model, group_size=4):
    tokens, mask, sampled = model.generate(PROMPTS, group_size, 12, 0.8)
    reward = torch.rand(len(tokens), dtype=torch.float64)
    return tokens, mask, sampled, group_advantage(reward, group_size)


def test_the_first_step_has_ratio_1_and_nothing_is_clipped(family):
    """Sampled, scored and current log-probs agree to rounding, so the first gradient is the plain
    policy gradient."""
    model = tiny(family)
    tokens, mask, sampled, adv = rollout(model)
    logp, _ = model.token_logp(tokens, mask, 0.8)
    assert ((logp - sampled).exp() - 1).abs().max() < 1e-9
    loss, stats = grpo_loss(logp, sampled, logp.detach(), adv, mask, clip_eps=1e-6, kl_beta=1.0)
    assert stats["clip_low"] == stats["clip_high"] == 0
    policy_gradient_loss = -((adv[:, None] * logp * mask).sum(1) / mask.sum(1)).mean()
    params = list(model.parameters())
    found = grad(loss, params, retain_graph=True)
    for a, b in zip(found, grad(policy_gradient_loss, params)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_micro_batches_change_no_gradient():
    """One forward of 20 responses, 20 of one, and by a token budget, on ragged rows with clip and
    KL penalty at work."""
    found = []
    for budget in (10 ** 6, 1, 40):
        model = tiny()
        torch.manual_seed(3)
        tokens, mask, sampled, adv = rollout(model)
        old = sampled + 0.3 * torch.randn_like(sampled)
        ref = sampled + 0.3 * torch.randn_like(sampled)
        minibatch = torch.randperm(len(tokens))
        for rows, width, index in micro_batches(mask, minibatch, budget, CPU):
            logp, _ = model.token_logp(tokens[rows, :width], None, 0.8, index)
            loss, _ = grpo_loss(logp, old[rows, :width], ref[rows, :width], adv[rows],
                                mask[rows, :width], 0.2, 0.5, n=len(minibatch))
            loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


def test_the_end_token_gets_gradient_and_prompt_and_pads_get_none():
    model = tiny()
    tokens, mask, sampled, adv = rollout(model)
    logp = sampled.clone().requires_grad_()
    loss, _ = grpo_loss(logp, sampled, sampled, adv + 1, mask, 0.2, 0.0)
    loss.backward()
    assert torch.equal(logp.grad != 0, mask > 0)
    every_row = torch.arange(len(tokens))
    last = (mask * torch.arange(mask.size(1))).argmax(1)
    ended = torch.isin(tokens[every_row, last], torch.tensor(model.cfg.stop_token_ids))
    assert ended.any() and (logp.grad[every_row, last][ended] != 0).all()


def every_response():
    """A vocabulary of 3, where id 0 ends, prompt (1, 2), responses of at most 3 tokens: all
    1 + 2 + 4·3 = 15 of them, tokens and mask (15, 5)."""
    responses = [(0,), (1, 0), (2, 0)] + list(itertools.product((1, 2), (1, 2), (0, 1, 2)))
    tokens, mask = [], []
    for response in responses:
        pads = [0] * (3 - len(response))
        tokens.append([1, 2, *response] + pads)
        mask.append([0, 0] + [1] * len(response) + pads)
    return torch.tensor(tokens), torch.tensor(mask).double()


def three_token_model():
    """Random weights, from torch's random state."""
    cfg = GPTConfig(vocab_size=3, block_size=5, n_layer=1, n_embd=8, n_head=1, stop_token_ids=(0,))
    return GPT(cfg).double()


def randomise(*models):
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.7)


def flat_grad(loss, params):
    return torch.cat([g.flatten() for g in grad(loss, params, retain_graph=True)])


@pytest.mark.parametrize("seed, by_length, by_std, by_both", [
    (5, .933, .992, .844), (7, .989, -.013, -.183)])
def test_expected_gradient_by_enumerating_every_response(seed, by_length, by_std, by_both):
    """A model of 3 tokens and all its 15 responses, all pairs of them as groups of 2.

    Exact: with |o_i| in the advantage (sum reduction), ratio 1 and r - mean without std, the
    expected gradient of grpo_loss is (G-1)/G = 1/2 of the gradient of J(θ) = Σ_o π(o) R(o).
    Biased: 1/|o_i| and std turn it, by the cosines above. With G = 2 std leaves only the sign of
    the difference, so that a rare great reward counts like a frequent small one, and on the second
    model the expected step goes downhill.
    """
    torch.manual_seed(seed)
    model = three_token_model()
    randomise(model)
    tokens, mask = every_response()
    reward = torch.randn(15).double()
    params = list(model.parameters())
    logp, _ = model.token_logp(tokens, mask)
    p = logp.sum(1).exp()
    assert math.isclose(p.sum().item(), 1.0, rel_tol=1e-12)          # there are no other responses
    exact = flat_grad((p * reward).sum(), params)

    def expected(advantage):
        """Σ over groups (o_1, o_2) of π(o_1) π(o_2) grad grpo_loss, one loss per group."""
        total = 0.0
        for i, j in itertools.product(range(15), repeat=2):
            group = torch.tensor([i, j])
            x = logp[group]
            adv = advantage(reward[group], mask[group].sum(1))
            loss, _ = grpo_loss(x, x.detach(), x.detach(), adv, mask[group], 0.2, 0.0)
            total = total - (p[i] * p[j]).detach() * loss
        return flat_grad(total, params)

    def centred(reward, length):
        return reward - reward.mean()

    def centred_sum(reward, length):
        return centred(reward, length) * length

    def standardised(reward, length):
        return group_advantage(reward, 2)

    def standardised_sum(reward, length):
        return group_advantage(reward, 2) * length

    torch.testing.assert_close(expected(centred_sum), exact / 2, rtol=0, atol=1e-12)
    for advantage, cosine in ((centred, by_length), (standardised_sum, by_std),
                              (standardised, by_both)):
        found = torch.cosine_similarity(expected(advantage), exact, dim=0).item()
        assert found == pytest.approx(cosine, abs=0.01), advantage.__name__


# -------------------------------------------------------------------------------------- the reward


def test_the_rule_of_the_built_in_task():
    row = {"prompt": "5+8+7=", "_two_digits": "20"}
    right = ["13,20#20", "#20", "99,99#20", "5+8+7=#20"]
    wrong = ["13,20#2", "13,20#020", "13,20#20 ", "13,20#20#", "#20#20", "20", "", "#", "13,20# 20"]
    for text in right:
        assert grpo.score(row, text) == 1, text
    for text in wrong:
        assert grpo.score(row, text) == 0, text


def test_the_format_reward_is_a_bonus_of_the_rule_alone():
    """It does not change what is right, and a truncated response earns none of it."""
    rows = [{"answer": "42"}] * 5
    responses = ["so #### 42", "so 42", "so #### 41", "so 41", None]
    tokens, mask = torch.zeros(5, 3, dtype=torch.long), torch.ones(5, 3)
    for bonus in (0.0, 0.25):
        cfg = grpo.Config(format_reward=bonus)
        reward, raw, correct = compute_reward(
            cfg, None, grpo.score, rows, tokens, mask, responses, 0.0)
        assert reward.tolist() == [1 + bonus, 1, bonus, 0, 0] and raw.tolist() == [1, 1, 0, 0, 0]
        assert correct.tolist() == [1, 1, 0, 0, 0]


def test_only_a_full_score_is_right_whatever_the_partial_credit():
    """.1 for a number, about 1 for the right one, 1.5 for a short one: the last two are right."""
    def partial_credit(row, response):
        if response == row["answer"]:
            return 1.5
        if response.endswith(row["answer"]):
            return 0.7 + 0.2 + 0.1                             # 0.9999999999999999
        return 0.1 * response.isdigit()

    rows = [{"prompt": "p", "answer": "42"}] * 5
    responses = ["42", "so 42", "41", "no", None]
    tokens, mask = torch.zeros(5, 3, dtype=torch.long), torch.ones(5, 3)
    reward, _, correct = compute_reward(
        grpo.Config(), None, partial_credit, rows, tokens, mask, responses, -0.5)
    assert reward.tolist() == pytest.approx([1.5, 1, 0.1, 0, -0.5])
    assert correct.tolist() == [1, 1, 0, 0, 0]
    stats = rollout_stats(reward, correct, mask, responses, 5)
    assert stats["accuracy"].item() == pytest.approx(2 / 5) and stats["pass_at_g"] == 1


# -------------------------------------------------------------------------------------- the script


def test_what_the_update_gets_is_what_was_sampled_and_earned(tmp_path, monkeypatch):
    """The whole script at temperature .7, two epochs of two minibatches in micro-batches: whatever
    reaches the loss is computed again from the tokens alone. The reference is the initial policy in
    every rollout; the ratio is 1 before a rollout's first step and not after it; old log-probs stay
    for both epochs; a response has the advantage of its own prompt's group; the logged metrics are
    means over all micro-batches."""
    (tmp_path / "init").mkdir()
    initial = tiny(vocab_size=257, stop_token_ids=tuple(range(60)), dtype=torch.float32)
    save_checkpoint(tmp_path / "init", initial, make_tokenizer())
    with open(tmp_path / "rows.jsonl", "w") as f:
        for i in range(300):
            f.write(json.dumps({"prompt": f"{i % 4}:{i}?", "answer": "0"}) + "\n")

    def rule(prompt, text):
        return float(len(text) % 4 == int(prompt[0]))          # what is right depends on the prompt

    forwards, calls = [], []
    token_logp, loss = GPT.token_logp, grpo.grpo_loss

    def recorded_token_logp(self, tokens, *args, **more):
        logp, entropy = token_logp(self, tokens, *args, **more)
        forwards.append((tokens, entropy))
        return logp, entropy

    def recorded_loss(logp, old, ref, adv, mask, clip_eps, kl_beta, n, sampler_logp):
        tokens, entropy = forwards[-1]
        calls.append((tokens, entropy, logp.detach(), old, ref, adv, mask, n))
        torch.testing.assert_close(sampler_logp * mask, old * mask, rtol=0, atol=1e-5)
        return loss(logp, old, ref, adv, mask, clip_eps, kl_beta, n, sampler_logp)

    monkeypatch.setattr(grpo, "score", lambda row, text: rule(row["prompt"], text))
    monkeypatch.setattr(GPT, "token_logp", recorded_token_logp)
    monkeypatch.setattr(grpo, "grpo_loss", recorded_loss)
    monkeypatch.setattr(grpo.Run, "plot", lambda *names: None)
    grpo.train(grpo.Config(
        init=str(tmp_path / "init"), data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"),
        prompts=6, group_size=4, minibatch=12, epochs=2, steps=3, max_new_tokens=12,
        temperature=0.7, lr=1e-3, warmup=0, micro_batch_tokens=60, eval_every=100,
        early_stopping=False))
    reference, tokenizer = load(str(tmp_path / "init"))
    with open(tmp_path / "out/metrics.jsonl") as f:
        logged = [json.loads(line) for line in f][1:]
    rollouts = [[] for _ in logged]
    for call in calls:                                         # 24 responses, twice, are a rollout
        next(r for r in rollouts if sum(len(x[0]) for x in r) < 48).append(call)

    moved = nonzero = shuffled = 0
    for metrics, pieces in zip(logged, rollouts):
        assert len(pieces) > 4 and sum(len(piece[0]) for piece in pieces) == 48
        done, old_of, by_prompt, order = 0, {}, {}, []
        for tokens, _, logp, old, ref, adv, mask, n in pieces:
            expected = naive_logp(reference, tokens, 0.7).detach() * mask
            torch.testing.assert_close(ref, expected, rtol=0, atol=1e-4)
            assert n == 12
            gap = (logp - old).abs().max().item()
            if done < 12:                                      # before the first optimiser step
                assert gap < 1e-5
            moved += done >= 12 and gap > 1e-3
            done += len(tokens)
            for i in range(len(tokens)):
                column = mask[i].nonzero()[:, 0].tolist()
                ids = tuple(tokens[i, :column[-1] + 1].tolist())
                own_old = old[i, column]
                torch.testing.assert_close(old_of.setdefault(ids, own_old), own_old)
                order.append(ids)
                prompt = tokenizer.decode(ids[:column[0]])
                response = tokenizer.decode(ids[column[0]:-1])
                reward = rule(prompt, response) if ids[-1] < 60 else 0.0
                by_prompt.setdefault(prompt, []).append((reward, adv[i].item()))
        shuffled += set(order[:12]) != set(order[24:36])       # each epoch has its own minibatches

        rewards = []
        for group in by_prompt.values():
            reward, adv = zip(*group)                          # four responses, twice
            mean, std = statistics.mean(reward), statistics.stdev(sorted(reward)[::2])
            expected = [(r - mean) / (std + 1e-4) if std else 0.0 for r in reward]
            assert len(group) == 8 and adv == pytest.approx(expected, abs=1e-4)
            nonzero += std > 0
            rewards += reward
        k1, entropies = [], []                                 # of the policy that sampled
        for _, entropy, _, old, ref, _, mask, _ in pieces:
            k1.append((old - ref)[mask > 0])
            entropies.append(entropy[mask > 0])
        assert metrics["kl"] == pytest.approx(torch.cat(k1).mean().item(), rel=1e-3, abs=1e-6)
        assert metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-3)
        assert metrics["reward"] == pytest.approx(statistics.mean(rewards))
    assert moved > 6 and nonzero > 6 and shuffled
    assert abs(logged[0]["kl"]) < 1e-6 and abs(logged[-1]["kl"]) > 1e-4


def test_without_a_kl_penalty_no_reference_is_held_and_groups_of_equal_rewards_cost_nothing(
        adder, tmp_path, monkeypatch):
    """The weights are those of a penalty too small to count, in which every response passes through
    the update; only minibatches that hold no unequal group move nothing, by no momentum either."""
    trained, held = [], []
    token_logp, evaluate = GPT.token_logp, grpo.evaluate

    def recorded_token_logp(self, tokens, *args, **more):
        if torch.is_grad_enabled():
            trained[-1] += len(tokens)
        return token_logp(self, tokens, *args, **more)

    def recorded_evaluate(*args):
        held.append(args[7])                                   # the reference
        return evaluate(*args)

    monkeypatch.setattr(GPT, "token_logp", recorded_token_logp)
    def plain_sgd(model, lr):                                  # Adam would magnify rounding
        return Optimizers(torch.optim.SGD(model.parameters(), lr=1.0))

    monkeypatch.setattr(grpo, "make_optimizer", plain_sgd)
    monkeypatch.setattr(grpo, "evaluate", recorded_evaluate)
    monkeypatch.setattr(grpo.Run, "plot", lambda *names: None)
    weights, logs = [], []
    for kl_beta in (0.0, 1e-30):
        trained.append(0)
        out = tmp_path / str(kl_beta)
        grpo.train(grpo.Config(
            init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"), out=str(out), steps=4,
            prompts=8, group_size=4, minibatch=32, max_new_tokens=6, kl_beta=kl_beta, lr=1e-3,
            warmup=0, eval_every=100))
        weights.append(load(str(out))[0].state_dict())
        logs.append([json.loads(line) for line in open(out / "metrics.jsonl")][1:])
    for name, x in weights[0].items():
        torch.testing.assert_close(x, weights[1][name], rtol=0, atol=1e-4)
    assert any(0 < row["frac_zero_std"] < 1 for row in logs[0])
    assert trained[1] == 4 * 32
    assert trained[0] == sum(32 * (1 - row["frac_zero_std"]) for row in logs[0])
    without = len(held) // 2
    assert all(x is None for x in held[:without]) and None not in held[without:]
    assert "kl" not in logs[0][-1] and "kl_seq" in logs[1][-1]


def test_the_trace_of_one_token_runs_on_any_checkpoint(tmp_path):
    """Here on a model that has learned nothing."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path, GPT(GPTConfig()), make_tokenizer())
    done = script("experiments/trace_one_token.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prompt" in done.stdout and "logit" in done.stdout


def test_in_bf16_too_the_first_step_has_ratio_1(adder, tmp_path, monkeypatch):
    """Old and new log-probs come from the same autocast: with one of them in float32 the ratio
    would differ from 1 by bf16's rounding, and the clip would act on noise."""
    bf16_devices(monkeypatch, {"cpu"})
    gaps = []

    def recorded_loss(logp, old, ref, adv, mask, *more):
        gaps.append(((logp - old) * mask).abs().max().item())
        return grpo_loss(logp, old, ref, adv, mask, *more)

    monkeypatch.setattr(grpo, "grpo_loss", recorded_loss)
    monkeypatch.setattr(grpo.Run, "plot", lambda *names: None)
    grpo.train(grpo.Config(
        init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"), out=str(tmp_path / "out"),
        prompts=8, group_size=4, minibatch=16, steps=1, max_new_tokens=6, lr=1e-2, warmup=0,
        micro_batch_tokens=10 ** 6, eval_prompts=8, early_stopping=False))
    assert gaps[0] < 1e-6 < 1e-3 < gaps[-1]
