"""GRPO's loss against enumeration, closed forms and brute force.   python -m pytest tests/test_grpo.py"""
import itertools
import json
import math
import statistics

import pytest
import torch

import dapo
import grpo
import ppo
import sft
from conftest import PROMPTS, gradients, naive_logp, tiny
from grpo import group_advantage, grpo_loss, kl_k3
from model import GPT, GPTConfig, load, make_tokenizer, micro_batches, save

DEVICE = torch.device("cpu")


def batch(B=8, T=9):
    """Ragged masks, unequal advantages, ratios on both sides of the clip."""
    torch.manual_seed(0)
    mask = torch.zeros(B, T).double()
    for row in mask:
        start = int(torch.randint(1, 4, ()))
        row[start:start + int(torch.randint(1, T - 3, ()))] = 1
    old = -torch.rand(B, T).double() * 3
    return old + torch.randn(B, T) * 0.3, old, old + torch.randn(B, T) * 0.3, torch.randn(B).double(), mask


# -------------------------------------------------------------------------------------------------------------------- the advantage


def test_advantage_is_the_standardised_reward_of_its_own_group():
    """§4.1.2, with the unbiased std: (1, 0, 0, 0) has mean 1/4 and variance 1/4."""
    adv = group_advantage(torch.tensor([1., 0., 0., 0., 3., 5., 3., 5.]), 4)
    expected = torch.tensor([1.5, -.5, -.5, -.5, -.75 ** .5, .75 ** .5, -.75 ** .5, .75 ** .5])
    torch.testing.assert_close(adv, expected, rtol=1e-3, atol=0)
    assert adv.view(2, 4).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("reward", [0.3, 0.1, 1 / 3, 1.0, 0.0, -7.7])
def test_equal_rewards_have_advantage_exactly_zero(reward):
    """In float32 the mean of sixteen .3 is not .3, and a tiny eps would turn that into an advantage of about 1 (ALGORITHMS 5.1)."""
    assert (group_advantage(torch.full((16,), reward), 16) == 0).all()
    mixed = group_advantage(torch.tensor([reward] * 16 + [0.2] * 8 + [0.9] * 8), 16)
    assert (mixed[:16] == 0).all() and (mixed[16:] != 0).all()


# ------------------------------------------------------------------------------------------------------------------- the loss


def brute_force(logp, old, ref, adv, mask, eps, beta):
    """-J of Eq. 3 by two loops in plain Python."""
    total = 0.0
    for i in range(len(logp)):
        tokens = [t for t in range(logp.size(1)) if mask[i, t] == 1]
        inner = 0.0
        for t in tokens:
            r, a = math.exp(logp[i, t] - old[i, t]), adv[i].item()
            q = math.exp(ref[i, t] - logp[i, t])
            inner += min(r * a, max(1 - eps, min(1 + eps, r)) * a) - beta * (q - math.log(q) - 1)
        total += inner / len(tokens)
    return -total / len(logp)


def test_loss_is_equation_3():
    args = batch()
    loss, stats = grpo_loss(*args, clip_eps=0.2, kl_beta=0.3)
    assert math.isclose(loss.item(), brute_force(*args, 0.2, 0.3), rel_tol=1e-12)
    logp, old, ref, adv, mask = args
    ratio = (logp - old).exp()[mask > 0]
    a = adv[:, None].expand_as(mask)[mask > 0]
    k3 = ((ref - logp).exp() - (ref - logp) - 1)[mask > 0]
    expected = {"kl": k3.mean(), "clip_low": ((ratio < .8) & (a < 0)).double().mean(), "clip_high": ((ratio > 1.2) & (a > 0)).double().mean()}
    assert all(math.isclose(stats[name], x, rel_tol=1e-9) for name, x in expected.items()) and all(x > 0 for x in expected.values())


@pytest.mark.parametrize("adv, ratio, flows", [(1, 0.5, True), (1, 2.0, False), (-1, 0.5, False), (-1, 2.0, True)])
def test_the_clip_cuts_the_gradient_only_where_it_would_overshoot(adv, ratio, flows):
    """The min, for both signs of the advantage; a max for negative ones is a popular bug (STYLE 2)."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    z = torch.zeros(1, 1)
    loss, stats = grpo_loss(logp, z, z, torch.tensor([float(adv)]), torch.ones(1, 1), clip_eps=0.2, kl_beta=0.0)
    assert (torch.autograd.grad(loss, logp)[0].item() != 0) is flows
    assert (stats["clip_low"], stats["clip_high"]) == (float(adv < 0 and not flows), float(adv > 0 and not flows))


def test_k3_is_the_kl_in_value_and_the_other_kl_in_gradient():
    """By enumeration over six tokens: E_π[k3] = KL(π ‖ ref), as Eq. 4 says; but differentiated as a loss on samples of π it pulls along the
    gradient of KL(ref ‖ π) (ALGORITHMS 3.1.3)."""
    torch.manual_seed(0)
    z = torch.randn(6).double().requires_grad_()
    logp, ref = z.log_softmax(0), torch.randn(6).double().log_softmax(0)
    p = logp.exp().detach()
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    # every token once as a sequence of one, weighted by its probability: through the loss itself, and through kl_k3
    price = torch.stack([grpo_loss(l.view(1, 1), l.detach().view(1, 1), r.view(1, 1), torch.zeros(1), torch.ones(1, 1), .2, 1.)[0]
                         for l, r in zip(logp, ref)])
    assert torch.isclose((p * price).sum(), reverse) and torch.isclose((p * kl_k3(logp, ref)).sum(), reverse)
    assert not torch.isclose(reverse, forward, rtol=.05)
    as_loss, = torch.autograd.grad((p * price).sum(), z, retain_graph=True)
    d_forward, = torch.autograd.grad(forward, z, retain_graph=True)
    d_reverse, = torch.autograd.grad(reverse, z)
    torch.testing.assert_close(as_loss, d_forward)
    assert (as_loss - d_reverse).norm() > .1 * d_reverse.norm()


def test_k3_keeps_its_digits_near_zero():
    """Two models a hair apart, float32: k3 = d²/2, where exp(d) - d - 1 would give 0 or 1e-7."""
    d = torch.tensor(1e-4)
    assert math.isclose(kl_k3(torch.zeros(()), d).item(), 0.5e-8, rel_tol=0.5) and kl_k3(d, d) == 0


def test_garbage_outside_the_mask_changes_neither_loss_nor_gradient_nor_statistics():
    logp, old, ref, adv, mask = batch()
    clean = logp.clone().requires_grad_()
    loss, stats = grpo_loss(clean, old, ref, adv, mask, 0.2, 0.3)
    loss.backward()
    for rubbish in (math.nan, math.inf, -math.inf, 1e6):
        dirty = torch.where(mask > 0, logp, rubbish).requires_grad_()
        inputs = [dirty, torch.where(mask > 0, old, -rubbish), torch.where(mask > 0, ref, rubbish), adv, mask]
        kept = [x.detach().clone() for x in inputs]
        other, other_stats = grpo_loss(*inputs, 0.2, 0.3)
        other.backward()
        assert other == loss and other_stats == stats and torch.equal(dirty.grad, clean.grad)
        assert all(torch.equal(a.detach().nan_to_num(), b.nan_to_num()) for a, b in zip(inputs, kept))
    assert torch.equal(clean.grad != 0, (mask > 0) & (clean.grad != 0)) and (clean.grad[mask > 0] != 0).any()


def test_an_empty_row_contributes_nothing():
    logp, old, ref, adv, mask = batch()
    longer = [torch.cat([x, x[:1]]) for x in (logp, old, ref, adv)] + [torch.cat([mask, torch.zeros_like(mask[:1])])]
    (a, sa), (b, sb) = grpo_loss(logp, old, ref, adv, mask, 0.2, 0.3), grpo_loss(*longer, 0.2, 0.3)
    assert a == b and sa == sb
    loss, stats = grpo_loss(logp, old, ref, adv, torch.zeros_like(mask), 0.2, 0.3)
    assert loss == 0 and not any(math.isnan(x) for x in stats.values())


def test_the_four_reductions_by_their_closed_forms():
    """ALGORITHMS 0.5 for l = r A (no clip, no price), by plain loops. Sequence mean is grpo_loss, token mean is sft_loss; sum and constant
    are grpo_loss with an advantage that carries |o_i|, and another denominator. What compare.py swaps in stands on this."""
    logp, old, _, adv, mask = batch()
    length, B, L = mask.sum(1), len(mask), 20
    l = [[math.exp(logp[i, t] - old[i, t]) * adv[i].item() for t in range(mask.size(1)) if mask[i, t]] for i in range(B)]
    call = lambda a, n=None: -grpo_loss(logp, old, old, a, mask, 1e9, 0.0, n)[0].item()
    expected = {"sequence mean": sum(sum(x) / len(x) for x in l) / B, "sum": sum(map(sum, l)) / B,
                "constant": sum(map(sum, l)) / (B * L), "token mean": sum(map(sum, l)) / sum(map(len, l))}
    got = {"sequence mean": call(adv), "sum": call(adv * length), "constant": call(adv * length, B * L),
           "token mean": -sft.sft_loss((logp - old).exp() * adv[:, None], mask)[0].item()}
    for name, x in expected.items():
        assert math.isclose(got[name], x, rel_tol=1e-9), name
    assert len({round(x, 6) for x in got.values()}) == 4


# ------------------------------------------------------------------------------------------------------------- with a model under it


def rollout(model, group=4):
    tokens, mask, logp = model.generate(PROMPTS, group, 12, 0.8)
    reward = torch.rand(len(tokens), dtype=torch.float64)
    return tokens, mask, logp, group_advantage(reward, group)


def test_the_first_step_has_ratio_1_and_nothing_is_clipped(family):
    """Old log-probs scored, sampled and current agree to rounding, so the first gradient is the plain policy gradient."""
    model = tiny(family)
    tokens, mask, sampled, adv = rollout(model)
    logp, _ = model.token_logp(tokens, mask, 0.8)
    assert ((logp - sampled).exp() - 1).abs().max() < 1e-9
    loss, stats = grpo_loss(logp, sampled, logp.detach(), adv, mask, 1e-6, 1.0)          # even a clip at 1e-6 stays idle
    assert stats["clip_low"] == stats["clip_high"] == 0 and stats["kl"] < 1e-15
    surrogate = -(adv[:, None] * logp * mask).sum(1) / mask.sum(1)
    params = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, params, retain_graph=True), torch.autograd.grad(surrogate.mean(), params)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_micro_batches_change_no_gradient():
    """One forward of 20 answers = 20 of one = by a token budget, on ragged rows with a clip and a price at work."""
    grads = []
    for budget in (10 ** 6, 1, 40):
        model = tiny()
        torch.manual_seed(3)
        tokens, mask, sampled, adv = rollout(model)
        old, ref = sampled + 0.3 * torch.randn_like(sampled), sampled + 0.3 * torch.randn_like(sampled)
        i = torch.randperm(len(tokens))
        for j, t, at in micro_batches(mask, i, budget, DEVICE):
            logp, _ = model.token_logp(tokens[j, :t], None, 0.8, at)
            grpo_loss(logp, old[j, :t], ref[j, :t], adv[j], mask[j, :t], 0.2, 0.5, len(i))[0].backward()
        grads.append(gradients(model))
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


def test_the_end_token_gets_gradient_prompt_and_pads_get_none():
    model = tiny()
    tokens, mask, sampled, adv = rollout(model)
    logp = sampled.clone().requires_grad_()
    grpo_loss(logp, sampled, sampled, adv + 1, mask, 0.2, 0.0)[0].backward()
    assert torch.equal(logp.grad != 0, mask > 0)
    last = (mask * torch.arange(mask.size(1))).argmax(1)
    ended = torch.isin(tokens[torch.arange(len(tokens)), last], torch.tensor(model.cfg.stop))
    assert ended.any() and (logp.grad[torch.arange(len(tokens)), last][ended] != 0).all()


@pytest.mark.parametrize("seed, by_length, by_std, by_both", [(5, .933, .992, .844), (7, .989, -.013, -.183)])
def test_expected_gradient_by_enumerating_every_answer(seed, by_length, by_std, by_both):
    """A model of 3 tokens (id 0 ends) and answers of at most 3: all 1 + 2 + 4·3 = 15 answers, all pairs of them as groups of 2.

    Exact: with |o_i| in the advantage (sum reduction), ratio 1 and r - mean without std, the expected gradient of grpo_loss is
    (G-1)/G = 1/2 of the gradient of J(θ) = Σ_o π(o) R(o). Biased, as ALGORITHMS 5.2 says: 1/|o_i| and std turn it, by the cosines above.
    With G = 2 std leaves only the sign of the difference, so that a rare great reward counts like a frequent small one, and on the second
    model the expected step goes downhill.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab=3, context=5, layers=1, width=8, heads=1, stop=(0,))).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
    ends = [(0,)] + [(a, 0) for a in (1, 2)] + [(a, b, c) for a, b, c in itertools.product((1, 2), (1, 2), (0, 1, 2))]
    tokens = torch.tensor([[1, 2, *o] + [0] * (3 - len(o)) for o in ends])               # prompt (1, 2)
    mask = torch.tensor([[0., 0.] + [1.] * len(o) + [0.] * (3 - len(o)) for o in ends]).double()
    reward = torch.randn(len(ends)).double()
    params = list(model.parameters())
    flat = lambda grads: torch.cat([g.flatten() for g in grads])

    logp, _ = model.token_logp(tokens, mask)
    p = logp.sum(1).exp()
    assert torch.isclose(p.sum(), torch.ones(()).double())                               # the answers are all there are
    exact = flat(torch.autograd.grad((p * reward).sum(), params, retain_graph=True))

    def expected(advantage):
        """Σ over groups (o_1, o_2) of π(o_1) π(o_2) grad grpo_loss, one loss per group."""
        total = 0.0
        for i, j in itertools.product(range(len(ends)), repeat=2):
            g = torch.tensor([i, j])
            loss, _ = grpo_loss(logp[g], logp[g].detach(), logp[g].detach(), advantage(reward[g], mask[g].sum(1)), mask[g], 0.2, 0.0)
            total = total - (p[i] * p[j]).detach() * loss
        return flat(torch.autograd.grad(total, params, retain_graph=True))

    centre = lambda r: r - r.mean()
    torch.testing.assert_close(expected(lambda r, n: centre(r) * n), exact / 2, rtol=0, atol=1e-12)

    cosine = lambda g: torch.cosine_similarity(g, exact, dim=0).item()
    found = [cosine(expected(a)) for a in (lambda r, n: centre(r), lambda r, n: group_advantage(r, 2) * n, lambda r, n: group_advantage(r, 2))]
    assert found == pytest.approx([by_length, by_std, by_both], abs=0.01)


# ------------------------------------------------------------------------------------------------------------------------ the reward


def test_the_rule_of_the_built_in_task():
    row = {"prompt": "5+8+7=", "two_digits": "20"}
    for text, right in [("13,20#20", 1), ("#20", 1), ("13,20#2", 0), ("13,20#020", 0), ("13,20#20 ", 0), ("13,20#20#", 0), ("#20#20", 0),
                        ("20", 0), ("", 0), ("#", 0), ("99,99#20", 1), ("5+8+7=#20", 1), ("13,20# 20", 0)]:
        assert grpo.score(row, text) == right, text


def test_the_format_reward_is_a_bonus_of_the_rule_alone():
    """Right or wrong as before, and what accuracy is does not change; a cut answer earns none of it."""
    rows = [{"answer": "42"}] * 5
    texts = ["so #### 42", "so 42", "so #### 41", "so 41", None]
    mask = torch.ones(5, 3)
    for script in (grpo, ppo, dapo):
        reward, gold = script.rewards(script.Config(format_reward=0.25), None, rows, torch.zeros(5, 3), mask, texts)
        assert reward.tolist() == [1.25, 1, .25, 0, 0] and gold.tolist() == [1, 1, 0, 0, 0]
        assert script.rewards(script.Config(), None, rows, torch.zeros(5, 3), mask, texts)[0].tolist() == [1, 1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------------------ the script


def test_what_the_update_gets_is_what_was_said_and_earned(tmp_path, monkeypatch):
    """The whole script at temperature .7, two epochs of two minibatches in small pieces: whatever reaches the loss is found again from the
    tokens alone. The reference is the policy of the start in every rollout; the ratio is 1 before a rollout's first step and not after it,
    and old log-probs stay for both epochs; an answer has the advantage of its own prompt's group; the log tells means over all pieces."""
    (tmp_path / "init").mkdir()
    save(str(tmp_path / "init"), tiny(vocab=257, stop=tuple(range(60)), dtype=torch.float32), make_tokenizer("bytes"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i % 4}:{i}?", "answer": "0"}) + "\n" for i in range(300)))
    rule = lambda prompt, text: float(len(text) % 4 == int(prompt[0]))    # what is right for one prompt is wrong for another
    monkeypatch.setattr(grpo, "score", lambda row, text: rule(row["prompt"], text))
    calls, read, token_logp, loss = [], [], GPT.token_logp, grpo.grpo_loss

    def reading(self, tokens, *args):
        read.append((tokens, token_logp(self, tokens, *args)))
        return read[-1][1]

    def watching(*args):
        calls.append((read[-1][0], [x.detach() for x in args[:5]], args[7:], read[-1][1][1]))
        return loss(*args)

    monkeypatch.setattr(GPT, "token_logp", reading)
    monkeypatch.setattr(grpo, "grpo_loss", watching)
    monkeypatch.setattr(grpo.Folder, "plot", lambda *names: None)
    grpo.train(grpo.Config(init=str(tmp_path / "init"), data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), max_new=12, prompts=6,
                           group=4, minibatch=12, epochs=2, steps=3, temperature=0.7, lr=1e-3, warmup=0, micro_tokens=60, eval_every=100,
                           guard=False))
    start, tokenizer = load(str(tmp_path / "init"))
    rows = [json.loads(line) for line in open(tmp_path / "out/metrics.jsonl")][1:]
    rollouts = [[] for _ in rows]
    for call in calls:
        full = next(r for r in rollouts if sum(len(tokens) for tokens, *_ in r) < 2 * 24)    # every answer is learned from twice
        full.append(call)
    moved = nonzero = shuffled = 0
    for row, pieces in zip(rows, rollouts):
        assert len(pieces) > 4 and sum(len(tokens) for tokens, *_ in pieces) == 48
        done, olds, said, order = 0, {}, {}, []
        for tokens, (logp, old, ref, adv, mask), n, _ in pieces:
            torch.testing.assert_close(ref, naive_logp(start, tokens, 0.7).detach() * mask, rtol=0, atol=1e-4)
            gap = (logp - old).abs().max()
            assert n == (12,) and (gap < 1e-5 if done < 12 else True)
            moved, done = moved + (done >= 12 and gap.item() > 1e-3), done + len(tokens)
            for ids, m, o, a in zip(tokens, mask, old, adv.tolist()):
                ids, chosen = tuple(ids[:int(m.nonzero().max()) + 1].tolist()), m > 0
                torch.testing.assert_close(olds.setdefault(ids, o[chosen]), o[chosen])
                order.append(ids)
                prompt, text = tokenizer.decode(ids[:int(m.argmax())]), tokenizer.decode(ids[int(m.argmax()):-1])
                said.setdefault(prompt, []).append((rule(prompt, text) if ids[-1] < 60 else 0.0, a))
        shuffled += set(order[:12]) != set(order[24:36])                  # each epoch has minibatches of its own
        for both in said.values():
            reward, adv = zip(*both)                                      # four answers, twice
            mean, std = statistics.mean(reward), statistics.stdev(sorted(reward)[::2])
            assert len(both) == 8 and adv == pytest.approx([(r - mean) / (std + 1e-4) if std else 0.0 for r in reward], abs=1e-4)
            nonzero += std > 0
        inside = lambda x: torch.cat([x(piece)[piece[1][4] > 0] for piece in pieces])
        d = inside(lambda piece: piece[1][2] - piece[1][0])
        assert row["kl"] == pytest.approx((d.exp() - d - 1).mean().item(), rel=1e-3, abs=1e-6)
        assert row["ent"] == pytest.approx(inside(lambda piece: piece[3]).mean().item(), rel=1e-3)
        assert row["reward"] == pytest.approx(statistics.mean(r for both in said.values() for r, _ in both))
    assert moved > 6 and nonzero > 6 and shuffled and rows[-1]["kl"] > 1e-4


def test_the_walk_of_one_token_runs_on_any_checkpoint(tmp_path, capsys):
    """The README's worked example, here on a model that has learned nothing."""
    import walk
    from model import make_tokenizer, save
    torch.manual_seed(0)
    save(tmp_path, GPT(GPTConfig()), make_tokenizer())
    walk.walk(str(tmp_path))
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == "prompt answers tokens hidden logit sampler reward loss gradient one afterwards".split()
