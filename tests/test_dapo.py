"""DAPO's four changes against tables, brute force and GRPO.   python -m pytest tests/test_dapo.py"""
import json
import math
import random

import pytest
import torch

import dapo
import grpo
import sft
from conftest import PROMPTS, gradients, tiny
from dapo import dapo_loss, full, informative, soft_overlong
from grpo import grpo_loss
from model import Optimizers, answers, load, make_tokenizer, micro_batches, save, sums
from test_grpo import batch

DEVICE = torch.device("cpu")


# -------------------------------------------------------------------------------------------------------------------- the loss


def brute_force(logp, old, adv, mask, low, high):
    """-J of Eq. 8 by two loops in plain Python, and the shares of tokens whose gradient is cut."""
    total, count, cut = 0.0, 0, [0, 0]
    for i in range(len(logp)):
        for t in range(logp.size(1)):
            if mask[i, t] == 1:
                r, a = math.exp(logp[i, t] - old[i, t]), adv[i].item()
                total, count = total + min(r * a, max(1 - low, min(1 + high, r)) * a), count + 1
                cut = [cut[0] + (a < 0 and r < 1 - low), cut[1] + (a > 0 and r > 1 + high)]
    return -total / count, cut[0] / count, cut[1] / count


def test_loss_is_equation_8_one_mean_over_all_tokens():
    logp, old, _, adv, mask = batch()
    loss, stats = dapo_loss(logp, old, adv, mask, 0.2, 0.28)
    expected = brute_force(logp, old, adv, mask, 0.2, 0.28)
    assert (loss.item(), stats["clip_low"].item(), stats["clip_high"].item()) == pytest.approx(expected, rel=1e-9) and min(expected[1:]) > 0
    tokens = [dapo_loss(logp[[i]], old[[i]], adv[[i]], mask[[i]], 0.2, 0.28)[0].item() for i in range(8)]
    assert abs(loss.item() - sum(tokens) / 8) > 1e-3                      # a mean of means is something else


@pytest.mark.parametrize("adv, ratio, flows", [(1, 1.25, True), (1, 1.30, False), (1, 0.5, True), (-1, 0.85, True), (-1, 0.75, False),
                                               (-1, 1.25, True), (-1, 2.0, True)])
def test_the_clip_is_wider_above_than_below(adv, ratio, flows):
    """Eq. 10: with .2 and .28 a ratio of 1.25 still rises where GRPO's clip has stopped it, and .75 has stopped falling in both."""
    logp = torch.tensor([[ratio]]).log().requires_grad_()
    z, a, one = torch.zeros(1, 1), torch.tensor([float(adv)]), torch.ones(1, 1)
    loss, stats = dapo_loss(logp, z, a, one, clip_low=0.2, clip_high=0.28)
    assert (torch.autograd.grad(loss, logp)[0].item() != 0) is flows
    assert (stats["clip_low"], stats["clip_high"]) == (float(adv < 0 and not flows), float(adv > 0 and not flows))
    if ratio == 1.25 and adv == 1:
        assert torch.autograd.grad(grpo_loss(logp, z, z, a, one, 0.2, 0.0)[0], logp)[0] == 0


@pytest.mark.parametrize("eps", [0.1, 0.2, 1e9])
def test_with_a_symmetric_clip_it_is_token_mean_grpo_without_a_price(eps):
    """grpo_loss with the advantage times |o_i| and the tokens as denominator: value and gradient."""
    logp, old, ref, adv, mask = batch()
    logp.requires_grad_()
    ours, theirs = dapo_loss(logp, old, adv, mask, eps, eps)[0], grpo_loss(logp, old, ref, adv * mask.sum(1), mask, eps, 0.0, mask.sum())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, logp)[0], torch.autograd.grad(theirs, logp)[0], rtol=0, atol=1e-12)


def test_garbage_outside_the_mask_and_empty_rows_change_nothing():
    logp, old, _, adv, mask = batch()
    clean = logp.clone().requires_grad_()
    loss, stats = dapo_loss(clean, old, adv, mask, 0.2, 0.28)
    loss.backward()
    for rubbish in (math.nan, math.inf, -math.inf, 1e6):
        dirty = torch.where(mask > 0, logp, rubbish).requires_grad_()
        other, other_stats = dapo_loss(dirty, torch.where(mask > 0, old, -rubbish), adv, mask, 0.2, 0.28)
        other.backward()
        assert other == loss and other_stats == stats and torch.equal(dirty.grad, clean.grad)
    longer = [torch.cat([x, x[:1]]) for x in (logp, old, adv)] + [torch.cat([mask, torch.zeros_like(mask[:1])])]
    again, again_stats = dapo_loss(*longer, 0.2, 0.28)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    assert all(math.isclose(again_stats[k], x, rel_tol=1e-9) for k, x in stats.items())
    loss, stats = dapo_loss(logp, old, adv, torch.zeros_like(mask), 0.2, 0.28)
    assert loss == 0 and not any(math.isnan(x) for x in stats.values())


def test_micro_batches_change_no_gradient():
    grads = []
    for budget in (10 ** 6, 1, 40):
        model = tiny()
        torch.manual_seed(3)
        tokens, mask, sampled = model.generate(PROMPTS, 4, 12, 0.8)
        adv, old = torch.randn(len(tokens)).double(), sampled + 0.3 * torch.randn_like(sampled)
        i = torch.randperm(len(tokens))
        for j, t, at in micro_batches(mask, i, budget, DEVICE):
            logp, _ = model.token_logp(tokens[j, :t], None, 0.8, at)
            dapo_loss(logp, old[j, :t], adv[j], mask[j, :t], 0.2, 0.28, int(mask.sum()))[0].backward()
        grads.append(gradients(model))
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the length and the filter


@pytest.mark.parametrize("max_len, cache", [(20480, 4096), (24, 6), (10, 10), (5, 1)])
def test_overlong_punishment_is_equation_13_over_a_table_of_lengths(max_len, cache):
    lengths = sorted({1, max_len - cache - 1, max_len - cache, max_len - cache + 1, max_len - cache // 2, max_len - 1, max_len, max_len + 1, 2 * max_len})
    for n, got in zip(lengths, soft_overlong(torch.tensor(lengths, dtype=torch.float32), max_len, cache).tolist()):
        expected = 0 if n <= max_len - cache else (max_len - cache - n) / cache if n <= max_len else -1
        assert got == pytest.approx(expected, abs=1e-7), n
    assert (soft_overlong(torch.arange(1, 25), 24, 0) == 0).all()         # a cache of 0 is no punishment


def test_the_default_punishment_touches_every_rambler_and_no_well_formed_answer():
    """The longest answer that anybody demonstrates has 18 tokens with its end token; a token more costs a sixth."""
    rng, tokenizer, cfg = random.Random(0), make_tokenizer("bytes"), dapo.Config()
    lengths = {len(tokenizer.encode_ordinary(sft.demonstrate(row["prompt"], rng))) + 1 for row in sums(3000, "train")}
    assert max(lengths) == 18
    punished = soft_overlong(torch.tensor(sorted(lengths) + [19, 24]), cfg.max_new, cfg.overlong_cache)
    assert (punished[:-2] == 0).all() and punished[-2:].tolist() == pytest.approx([-1 / 6, -1])


def test_a_group_is_informative_if_some_answers_are_right_and_some_wrong():
    assert informative(torch.tensor([0., 1 / 8, .5, 7 / 8, 1.])).tolist() == [False, True, True, True, False]


def test_a_full_batch_takes_all_informative_groups_and_others_where_sampling_stopped():
    """Two rollouts of unlike width, groups of 2; every tensor is picked and padded alike, and prompts keep their own answers."""
    wide, narrow = torch.arange(24).view(6, 4), 100 + torch.arange(12).view(4, 3)            # 3 groups, 2 groups
    reward = (torch.arange(6.), 10 + torch.arange(4.))
    keep = torch.tensor([False, True, False, True, True])
    tokens, r = full([(wide, reward[0]), (narrow, reward[1])], keep, 3, 2)
    padded = torch.nn.functional.pad(narrow, (0, 1))
    assert torch.equal(tokens, torch.cat([wide[2:4], padded])) and r.tolist() == [2, 3, 10, 11, 12, 13]
    tokens, r = full([(wide, reward[0]), (narrow, reward[1])], keep, 4, 2)                   # one too few: the first of the others
    assert torch.equal(tokens, torch.cat([wide[:4], padded])) and r.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


# ------------------------------------------------------------------------------------------------------------------- the script


def write(folder, kinds):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{kind}{i}?", "answer": str(i)}) + "\n" for i in range(300) for kind in kinds))


def run(folder, out, monkeypatch, **more):
    """Rows e... have right answers alone, h... wrong ones, m... right ones where the answer has an even number of bytes, if it ended."""
    rule = {"e": lambda text: 1.0, "h": lambda text: 0.0, "m": lambda text: float(len(text) % 2 == 0)}
    if not (folder / "init").exists():
        (folder / "init").mkdir()
        model = tiny(vocab=257, stop=tuple(range(200)), dtype=torch.float32)                  # an answer ends soon
        save(str(folder / "init"), model, make_tokenizer("bytes"))
    defaults = dict(init=str(folder / "init"), data=str(folder / "rows.jsonl"), out=str(folder / out), max_new=12, prompts=6, group=4, minibatch=12, steps=4,
                    eval_every=100, lr=1e-2, warmup=0, guard=False)
    module = more.pop("module", dapo)
    monkeypatch.setattr(module, "score", lambda row, text: rule[row["prompt"][0]](text))
    if more.pop("plain", False):                                          # Adam turns rounding into whole steps where a gradient is 0
        monkeypatch.setattr(module, "make_optimizer", lambda model, lr: Optimizers(torch.optim.SGD(model.parameters(), lr=2.0)))
    module.train(module.Config(**defaults | more))
    with open(folder / out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f][1:]


@pytest.fixture
def spied(monkeypatch):
    """Every call of `full`: what was sampled, and the batch made of it."""
    calls = []
    monkeypatch.setattr(dapo, "full", lambda *a: calls.append((a, full(*a))) or calls[-1][1])
    return calls


def test_dynamic_sampling_fills_the_batch_with_informative_groups_of_the_current_policy(tmp_path, monkeypatch, spied):
    """Filtered on the rule alone: groups all right or all wrong are of unlike lengths, so that the shaped rewards of nearly all of them differ."""
    write(tmp_path, "ehm")
    rows = run(tmp_path, "out", monkeypatch, overlong_cache=11, tries=50)
    assert len(spied) == 4 and any(row["tries"] > 2 for row in rows)
    for row, ((parts, keep, prompts, group), (tokens, mask, _, logp, reward, good)) in zip(rows, spied):
        assert (prompts, group, tokens.size(0)) == (6, 4, 24) and keep.sum() == 6 and good.all()
        assert (tokens[:, 0] == ord("m")).all()                                              # one kind alone has both right and wrong answers
        said = torch.cat([part[0][:, 0] for part in parts]).view(-1, 4)[:, 0]                # what the prompts begin with
        assert set(map(chr, said.tolist())) == set("ehm") and len(said) == len(keep)
        shaped = torch.cat([part[4] for part in parts]).view(-1, 4)
        assert (shaped[said != ord("m")].std(1) > 0).float().mean() > .5
        # what is counted and reported is all that was sampled, kept or not
        every = torch.cat([part[1].sum(1) for part in parts])
        assert row["tokens"] == every.sum() and row["tries"] == len(parts) and row["len"] == pytest.approx(every.mean().item())
        assert row["dead"] == pytest.approx(1 - 6 / len(keep))
        gold = []
        for part in parts:
            texts = answers(make_tokenizer("bytes"), part[0], part[1], tuple(range(200)))
            right = [float(t is not None and dapo.score({"prompt": chr(p)}, t)) for t, p in zip(texts, part[0][:, 0].tolist())]
            for r, n, earned in zip(right, part[1].sum(1).tolist(), part[4].tolist()):       # L_max 12, L_cache 11: from the second token on
                assert earned == pytest.approx(r + min(0, (1 - n) / 11))
            gold += right
        assert row["gold"] == pytest.approx(sum(gold) / len(every)) and 0 < row["gold"] < 1
        assert row["solved"] == pytest.approx(sum(any(gold[i:i + 4]) for i in range(0, len(gold), 4)) / len(keep))
        assert row["gap"] < 1e-4                                          # every kept answer is from the policy that is about to move
        batches = [len(part[0]) // 4 for part in parts]
        assert batches[0] == 6 and batches == [6 - int(keep[:sum(batches[:k])].sum()) for k in range(len(batches))]


def test_sampling_stops_at_the_bound_and_goes_on_with_what_there_is(tmp_path, monkeypatch, spied):
    write(tmp_path, "h")
    rows = run(tmp_path, "out", monkeypatch, tries=3, overlong_cache=0)
    for row, ((parts, keep, *_), (tokens, *_)) in zip(rows, spied):
        assert row["tries"] == len(parts) == 3 and len(keep) == 18 and not keep.any() and len(tokens) == 24
        assert row["dead"] == 1 and row["gold"] == row["solved"] == 0 and row["gnorm"] == 0
    assert run(tmp_path, "long", monkeypatch, tries=3, overlong_cache=11)[-1]["gnorm"] == 0      # length alone teaches nothing
    write(tmp_path, "hm")
    spied.clear()
    rows = run(tmp_path, "once", monkeypatch, tries=1)
    assert all(row["tries"] == 1 and len(keep) == 6 for row, ((_, keep, *_), _) in zip(rows, spied))


def test_without_its_four_changes_it_trains_as_token_mean_grpo_without_a_price(tmp_path, monkeypatch):
    """The whole script against the whole of grpo.py with the reduction swapped: the same answers, the same metrics, the same weights."""
    write(tmp_path, "ehm")
    whole = dict(micro_tokens=10 ** 6, steps=5, epochs=3, temperature=0.8, plain=True)
    ours = run(tmp_path, "dapo", monkeypatch, clip_high=0.2, tries=1, overlong_cache=0, **whole)
    monkeypatch.setattr(grpo, "grpo_loss", lambda logp, old, ref, adv, mask, eps, beta, n: grpo_loss(logp, old, ref, adv * mask.sum(1), mask, eps, beta, mask.sum()))
    theirs = run(tmp_path, "grpo", monkeypatch, module=grpo, kl_beta=0.0, **whole)
    assert any(row["clip_low"] > 0 for row in ours) and any(row["clip_high"] > 0 for row in ours)
    for a, b in zip(ours, theirs):
        for name in ("reward", "gold", "dead", "len", "end", "ent", "clip_low", "clip_high", "gnorm", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    (a, _), (b, _) = (load(str(tmp_path / out)) for out in ("dapo", "grpo"))
    run(tmp_path, "pieces", monkeypatch, clip_high=0.2, tries=1, overlong_cache=0, **whole | {"micro_tokens": 40})
    c, _ = load(str(tmp_path / "pieces"))
    for p, q, r in zip(a.parameters(), b.parameters(), c.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
        torch.testing.assert_close(p, r, rtol=0, atol=1e-4)               # in pieces, with the denominator of the whole optimiser batch
    assert run(tmp_path, "clip", monkeypatch, tries=1, overlong_cache=0, **whole)[-1] != ours[-1]      # and each change changes something
    assert run(tmp_path, "length", monkeypatch, clip_high=0.2, tries=1, overlong_cache=6, **whole)[-1] != ours[-1]


def test_with_one_update_a_rollout_clip_higher_changes_nothing(tmp_path, monkeypatch):
    """The ratio is 1 until the first optimiser step, so that no clip, however wide, has anything to cut; with two it has."""
    write(tmp_path, "m")
    last = {}
    for minibatch in (24, 12):
        for high in (0.2, 5.0):
            rows = run(tmp_path, f"{minibatch}_{high}", monkeypatch, minibatch=minibatch, clip_high=high, epochs=1, plain=True)
            last[minibatch, high] = load(str(tmp_path / f"{minibatch}_{high}"))[0].embedding.weight
            assert any(row["clip_high"] > 0 for row in rows) == (minibatch == 12 and high == 0.2)
    assert torch.equal(last[24, 0.2], last[24, 5.0]) and not torch.equal(last[12, 0.2], last[12, 5.0])
