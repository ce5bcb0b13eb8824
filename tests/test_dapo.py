"""DAPO against tables, brute force and GRPO.   python -m pytest tests/test_dapo.py"""
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import dapo
import grpo
import sft
from common import load
from common.checkpoint import save_checkpoint
from common.data import running_sums
from common.optimizers import Optimizers
from common.tokenizer import decode_responses, make_tokenizer
from common.train import micro_batches, select_groups
from conftest import PROMPTS, gradients, metrics, tiny
from dapo import dapo_loss, informative, soft_overlong
from grpo import grpo_loss
from test_grpo import RUBBISH, batch

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- the loss


def brute_force(logp, old_logp, adv, mask, low, high):
    """-J of Eq. 8 by two loops in plain Python, and the shares of tokens whose gradient is cut."""
    total, n, cut_low, cut_high = 0.0, 0, 0, 0
    for i in range(len(logp)):
        a = adv[i].item()
        for t in range(logp.size(1)):
            if mask[i, t] == 1:
                r = math.exp(logp[i, t] - old_logp[i, t])
                total += min(r * a, max(1 - low, min(1 + high, r)) * a)
                n += 1
                cut_low += a < 0 and r < 1 - low
                cut_high += a > 0 and r > 1 + high
    return -total / n, cut_low / n, cut_high / n


def test_loss_is_equation_8_one_mean_over_all_tokens():
    logp, old, _, adv, mask = batch()
    loss, stats = dapo_loss(logp, old, adv, mask, 0.2, 0.28)
    expected, cut_low, cut_high = brute_force(logp, old, adv, mask, 0.2, 0.28)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert stats["clip_low"].item() == pytest.approx(cut_low, rel=1e-9) and cut_low > 0
    assert stats["clip_high"].item() == pytest.approx(cut_high, rel=1e-9) and cut_high > 0
    means = []
    for i in torch.arange(8).split(1):
        means.append(dapo_loss(logp[i], old[i], adv[i], mask[i], 0.2, 0.28)[0].item())
    assert abs(loss.item() - sum(means) / 8) > 1e-3            # a mean of means is something else


@pytest.mark.parametrize("adv, ratio, flows", [
    (1, 1.25, True), (1, 1.30, False), (1, 0.5, True),
    (-1, 0.85, True), (-1, 0.75, False), (-1, 1.25, True), (-1, 2.0, True)])
def test_the_clip_is_wider_above_than_below(adv, ratio, flows):
    """Eq. 10: with .2 and .28 a ratio of 1.25 still rises where GRPO's clip has stopped it, and .75
    has stopped falling in both."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    zero, one, a = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([float(adv)])
    loss, stats = dapo_loss(logp, zero, a, one, clip_low=0.2, clip_high=0.28)
    assert (grad(loss, logp)[0].item() != 0) is flows
    assert stats["clip_low"] == float(adv < 0 and not flows)
    assert stats["clip_high"] == float(adv > 0 and not flows)
    if ratio == 1.25 and adv == 1:
        loss, _ = grpo_loss(logp, zero, zero, a, one, 0.2, 0.0)
        assert grad(loss, logp)[0] == 0


@pytest.mark.parametrize("eps", [0.1, 0.2, 1e9])
def test_with_a_symmetric_clip_it_is_token_mean_grpo_without_a_kl_penalty(eps):
    """grpo_loss with the advantage times |o_i| and n the number of tokens: value and gradient."""
    logp, old, ref, adv, mask = batch()
    logp.requires_grad_()
    ours, _ = dapo_loss(logp, old, adv, mask, eps, eps)
    theirs, _ = grpo_loss(logp, old, ref, adv * mask.sum(1), mask, eps, 0.0, n=mask.sum())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad(ours, logp), grad(theirs, logp), rtol=0, atol=1e-12)


def test_garbage_outside_the_mask_and_empty_rows_change_nothing():
    logp, old, _, adv, mask = batch()
    clean = logp.clone().requires_grad_()
    loss, stats = dapo_loss(clean, old, adv, mask, 0.2, 0.28)
    loss.backward()
    for rubbish in RUBBISH:
        dirty = torch.where(mask > 0, logp, rubbish).requires_grad_()
        dirty_old = torch.where(mask > 0, old, -rubbish)
        other, other_stats = dapo_loss(dirty, dirty_old, adv, mask, 0.2, 0.28)
        other.backward()
        assert other == loss and other_stats == stats and torch.equal(dirty.grad, clean.grad)
    longer = [torch.cat([x, x[:1]]) for x in (logp, old, adv)]
    longer.append(torch.cat([mask, torch.zeros_like(mask[:1])]))
    longer_loss, longer_stats = dapo_loss(*longer, 0.2, 0.28)
    torch.testing.assert_close(longer_loss, loss, rtol=1e-12, atol=0)
    for name, x in stats.items():
        assert math.isclose(longer_stats[name], x, rel_tol=1e-9), name
    loss, stats = dapo_loss(logp, old, adv, torch.zeros_like(mask), 0.2, 0.28)
    assert loss == 0 and not any(math.isnan(x) for x in stats.values())


def test_micro_batches_change_no_gradient():
    found = []
    for budget in (10 ** 6, 1, 40):
        model = tiny()
        torch.manual_seed(3)
        tokens, mask, sampled = model.generate(PROMPTS, 4, 12, 0.8)
        adv = torch.randn(len(tokens)).double()
        old = sampled + 0.3 * torch.randn_like(sampled)
        minibatch = torch.randperm(len(tokens))
        for rows, width, index in micro_batches(mask, minibatch, budget, CPU):
            logp, _ = model.token_logp(tokens[rows, :width], None, 0.8, index)
            loss, _ = dapo_loss(logp, old[rows, :width], adv[rows], mask[rows, :width], 0.2, 0.28,
                                n=int(mask.sum()))
            loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


# ----------------------------------------------------------------- length penalty, dynamic sampling


@pytest.mark.parametrize("max_len, cache", [(20480, 4096), (24, 6), (10, 10), (5, 1)])
def test_the_length_penalty_is_equation_13_over_a_table_of_lengths(max_len, cache):
    edge = max_len - cache
    lengths = [1, edge - 1, edge, edge + 1, max_len - cache // 2, max_len - 1, max_len, max_len + 1,
               2 * max_len]
    found = soft_overlong(torch.tensor(lengths, dtype=torch.float32), max_len, cache)
    for n, penalty in zip(lengths, found.tolist()):
        expected = 0
        if n > edge:
            expected = (edge - n) / cache
        if n > max_len:
            expected = -1
        assert penalty == pytest.approx(expected, abs=1e-7), n
    assert (soft_overlong(torch.arange(1, 25), 24, 0) == 0).all()      # a cache of 0: no penalty


def test_the_default_length_penalty_spares_every_demonstration():
    """The longest one has 18 tokens with its end token; each token more costs a sixth."""
    rng, tokenizer, cfg = random.Random(0), make_tokenizer(), dapo.Config()
    lengths = set()
    for row in running_sums(3000, "train"):
        lengths.add(len(tokenizer.encode(sft.demonstrate(row["prompt"], rng))) + 1)
    assert max(lengths) == 18
    lengths = torch.tensor(sorted(lengths) + [19, 24])
    penalty = soft_overlong(lengths, cfg.max_new_tokens, cfg.overlong_cache)
    assert (penalty[:-2] == 0).all() and penalty[-2:].tolist() == pytest.approx([-1 / 6, -1])


def test_a_group_is_informative_if_its_rewards_differ():
    """With 1 and 0: if some are right and some wrong. With partial credit also where none is right,
    or all are. Equal ones need no exact mean."""
    right = [0, 1 / 8, .5, 7 / 8, 1.]
    reward = torch.cat([(torch.arange(8) < 8 * x).float() for x in right])
    assert informative(reward, 8).tolist() == [False, True, True, True, False]
    reward = torch.tensor([.1, 0, .1, .1, 1, 1, .1, 1, .3, .3, .3, .3, -2, 0, 0, 0])
    assert informative(reward, 4).tolist() == [True, True, False, True]


def test_groups_are_selected_from_all_generations_with_all_that_belongs_to_them():
    """Two generations of unlike width, groups of 2; every tensor is picked and padded alike, and
    prompts keep their own responses."""
    wide = torch.arange(24).view(6, 4)                         # 3 groups
    narrow = 100 + torch.arange(12).view(4, 3)                 # 2 groups
    generations = [(wide, torch.arange(6.)), (narrow, 10 + torch.arange(4.))]
    keep = torch.tensor([False, True, False, True, True])
    padded = F.pad(narrow, (0, 1))
    tokens, reward = select_groups(generations, keep, 2)
    assert torch.equal(tokens, torch.cat([wide[2:4], padded]))
    assert reward.tolist() == [2, 3, 10, 11, 12, 13]
    tokens, reward = select_groups(generations, keep & False, 2)
    assert tokens.shape == (0, 4) and reward.shape == (0,)


# -------------------------------------------------------------------------------------- the script


def write_rows(folder, kinds):
    """Prompts e..., h... and m..., scored by `rule`."""
    with open(folder / "rows.jsonl", "w") as f:
        for i in range(300):
            for kind in kinds:
                f.write(json.dumps({"prompt": f"{kind}{i}?", "answer": str(i)}) + "\n")


def rule(row, response):
    """Easy prompts have right responses only, hard ones wrong ones only, medium ones right ones
    where the response has an even number of bytes."""
    kind = row["prompt"][0]
    if kind == "m":
        return float(len(response) % 2 == 0)
    return float(kind == "e")


def sgd(model, lr):
    """Adam turns rounding into whole steps where a gradient is 0."""
    return Optimizers(torch.optim.SGD(model.parameters(), lr=2.0))


def train(folder, out, monkeypatch, module=dapo, score=rule, **flags):
    """Run a script in this process -> its metrics, but those of the clock, one row per step."""
    init = folder / "init"
    if not init.exists():                                      # of a model whose responses end soon
        init.mkdir()
        model = tiny(vocab_size=257, stop_token_ids=tuple(range(200)), dtype=torch.float32)
        save_checkpoint(init, model, make_tokenizer())
    monkeypatch.setattr(module, "score", score)
    monkeypatch.setattr(module.Run, "plot", lambda *names: None)
    defaults = dict(init=str(init), data=str(folder / "rows.jsonl"), out=str(folder / out),
                    prompts=6, group_size=4, minibatch=12, steps=4, max_new_tokens=12, lr=1e-2,
                    warmup=0, eval_every=100, early_stopping=False)
    module.train(module.Config(**defaults | flags))
    return metrics(folder / out)[1:]


@pytest.fixture
def selected(monkeypatch):
    """The arguments of every call of select_groups, and the batch that it returned."""
    calls = []

    def recorded(*args):
        calls.append((args, select_groups(*args)))
        return calls[-1][1]

    monkeypatch.setattr(dapo, "select_groups", recorded)
    return calls


def test_dynamic_sampling_fills_the_batch_with_informative_groups_of_the_current_policy(
        tmp_path, monkeypatch, selected):
    """Groups are filtered by their scores before the length penalty: those all right or all wrong
    have responses of unlike lengths, so that many of their shaped rewards differ."""
    write_rows(tmp_path, "ehm")
    logged = train(tmp_path, "out", monkeypatch, overlong_cache=11, max_generations=50)
    tokenizer = make_tokenizer()
    assert len(selected) == 4 and any(row["generations"] > 2 for row in logged)
    for row, (arguments, in_batch) in zip(logged, selected):
        generations, keep, group_size = arguments
        tokens, _, _, _, _ = in_batch
        assert (group_size, len(tokens)) == (4, 24) and keep.sum() == 6
        assert (tokens[:, 0] == ord("m")).all()                # only these are sometimes right

        # the responses of all that was sampled, kept or not
        kinds, shaped, lengths, right = [], [], [], []
        for tokens, mask, _, _, reward in generations:
            texts = decode_responses(tokenizer, tokens, mask, tuple(range(200)))
            length = mask.sum(1)
            for text, first, n, r in zip(texts, tokens[:, 0], length.tolist(), reward.tolist()):
                kinds.append(chr(first))
                lengths.append(n)
                shaped.append(r)
                correct = text is not None and rule({"prompt": kinds[-1]}, text)
                right.append(float(correct))
                # Eq. 13 with L_max 12 and L_cache 11: from the second token on
                assert r == pytest.approx(right[-1] + min(0, (1 - n) / 11))
        assert set(kinds) == set("ehm") and len(kinds) == 4 * len(keep)
        uninformative = torch.tensor([kind != "m" for kind in kinds[::4]])
        spread = torch.tensor(shaped).view(-1, 4).std(1)
        assert (spread[uninformative] > 0).float().mean() > .3

        # they are what is counted and logged
        groups = torch.tensor(right).view(-1, 4)
        assert row["generations"] == len(generations) and row["tokens"] == sum(lengths)
        assert row["length"] == pytest.approx(sum(lengths) / len(lengths))
        assert row["frac_zero_std"] == pytest.approx(1 - 6 / len(keep))
        assert row["accuracy"] == pytest.approx(groups.mean().item())
        assert 0 < row["accuracy"] < 1
        assert row["pass_at_g"] == pytest.approx(groups.amax(1).mean().item())
        # every response is from the policy that is about to be updated
        assert row["sampler_logp_error"] < 1e-4
        # each generation has one prompt for every group that is still missing
        before = 0
        for generation in generations:
            n = len(generation[0]) // 4
            assert n == 6 - int(keep[:before].sum())
            before += n


def test_sampling_stops_at_the_bound_and_a_batch_that_is_not_full_is_smaller(
        tmp_path, monkeypatch, selected):
    """Groups that teach nothing neither fill the batch nor stand in its denominator."""
    write_rows(tmp_path, "h")
    logged = train(tmp_path, "out", monkeypatch, max_generations=3, overlong_cache=0)
    for row, (arguments, in_batch) in zip(logged, selected, strict=True):
        generations, keep, _ = arguments
        assert row["generations"] == len(generations) == 3
        assert len(keep) == 18 and not keep.any() and len(in_batch[0]) == 0
        assert row["frac_zero_std"] == 1 and row["grad_norm"] == 0
        assert row["accuracy"] == row["pass_at_g"] == 0
    logged = train(tmp_path, "long", monkeypatch, max_generations=3, overlong_cache=11)
    assert logged[-1]["grad_norm"] == 0                        # the length alone teaches nothing
    write_rows(tmp_path, "hm")
    selected.clear()
    denominators = []

    def recorded_loss(logp, old, adv, mask, low, high, n, sampler_logp):
        denominators.append(n)
        return dapo_loss(logp, old, adv, mask, low, high, n, sampler_logp)

    monkeypatch.setattr(dapo, "dapo_loss", recorded_loss)
    logged = train(tmp_path, "once", monkeypatch, max_generations=1, minibatch=24)
    smaller = 0
    for row, (arguments, in_batch) in zip(logged, selected, strict=True):
        _, keep, _ = arguments
        tokens, mask = in_batch[:2]
        assert row["generations"] == 1 and len(keep) == 6 and len(tokens) == 4 * keep.sum()
        assert (tokens[:, 0] == ord("m")).all()
        if len(tokens):                                        # one optimiser step in one piece
            assert denominators.pop(0) == mask.sum()
        smaller += len(tokens) < 24
    assert smaller > 0


def test_partial_credit_is_not_right_and_hides_no_group(tmp_path, monkeypatch):
    """.1 for a wrong response in place of 0: the first rollout has the same responses, the same
    accuracy and the same informative groups."""
    def partial_credit(row, response):
        return 0.1 + 0.9 * rule(row, response)

    write_rows(tmp_path, "ehm")
    flags = dict(steps=1, overlong_cache=0)
    plain, = train(tmp_path, "plain", monkeypatch, **flags)
    partial, = train(tmp_path, "partial", monkeypatch, score=partial_credit, **flags)
    assert partial["tokens"] == plain["tokens"] and 0 < plain["accuracy"] < 1
    for name in ("accuracy", "pass_at_g", "frac_zero_std", "generations"):
        assert partial[name] == plain[name], name
    assert partial["reward"] > plain["reward"] + .01 and partial["grad_norm"] > 0


def test_without_its_four_changes_it_trains_as_token_mean_grpo_without_a_kl_penalty(
        tmp_path, monkeypatch):
    """The whole script against the whole of grpo.py with the reduction swapped: the same responses,
    the same metrics, the same weights."""
    write_rows(tmp_path, "ehm")
    monkeypatch.setattr(dapo, "make_optimizer", sgd)
    monkeypatch.setattr(grpo, "make_optimizer", sgd)
    whole = dict(micro_batch_tokens=10 ** 6, steps=5, epochs=3, temperature=0.8)
    unchanged = dict(clip_high=0.2, max_generations=0, overlong_cache=0)

    def token_mean_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n, sampler_logp):
        adv = adv * mask.sum(1, keepdim=True)
        return grpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, mask.sum(),
                         sampler_logp)

    def weights(out):
        return load(str(tmp_path / out))[0].parameters()

    ours = train(tmp_path, "dapo", monkeypatch, **whole | unchanged)
    train(tmp_path, "pieces", monkeypatch, **whole | unchanged | {"micro_batch_tokens": 40})
    monkeypatch.setattr(grpo, "grpo_loss", token_mean_loss)
    # at β = 0 GRPO leaves out what has no gradient; here it is too small to count
    theirs = train(tmp_path, "grpo", monkeypatch, grpo, kl_beta=1e-20, **whole)
    assert any(row["clip_low"] > 0 for row in ours)
    assert any(row["clip_high"] > 0 for row in ours)
    for a, b in zip(ours, theirs, strict=True):
        for name in ("reward", "accuracy", "frac_zero_std", "length", "eos_rate", "entropy",
                     "clip_low", "clip_high", "grad_norm", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    for p, q, r in zip(weights("dapo"), weights("grpo"), weights("pieces")):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
        torch.testing.assert_close(p, r, rtol=0, atol=1e-4)    # n is of the whole optimiser batch
    for out, change in (("clip", {"clip_high": 5.0}), ("length", {"overlong_cache": 11})):
        changed = train(tmp_path, out, monkeypatch, **whole | unchanged | change)
        assert changed != ours, out


def test_with_one_update_per_rollout_clip_higher_changes_nothing(tmp_path, monkeypatch):
    """The ratio is 1 until the first optimiser step, so that no clip has anything to cut; with two
    steps it has."""
    write_rows(tmp_path, "m")
    monkeypatch.setattr(dapo, "make_optimizer", sgd)
    last = {}
    for minibatch in (24, 12):
        for high in (0.2, 5.0):
            out = f"{minibatch}_{high}"
            logged = train(tmp_path, out, monkeypatch, minibatch=minibatch, clip_high=high)
            last[minibatch, high] = load(str(tmp_path / out))[0].embedding.weight
            clipped = any(row["clip_high"] > 0 for row in logged)
            assert clipped == (minibatch == 12 and high == 0.2)
    assert torch.equal(last[24, 0.2], last[24, 5.0])
    assert not torch.equal(last[12, 0.2], last[12, 5.0])
