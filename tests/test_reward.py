"""The reward model's losses and read-out by closed forms, brute force and finite differences; what the labellers and the reader of pairs do.
python -m pytest tests/test_reward.py"""
import copy
import itertools
import json
import math
import random

import pytest
import torch

import reward
from conftest import PROMPTS, tiny
from model import (GPTConfig, Optimizers, ScalarModel, frozen_scalars, load, make_tokenizer, micro_batches, pad_batch, read_preferences,
                   save)
from reward import bradley_terry_loss, ranking_loss

LN2 = math.log(2)


def brute_force(scores, ranks):
    """InstructGPT's Eq. 1 by loops: for each prompt the mean over its pairs, then the mean over prompts."""
    total = 0.0
    for r, rank in zip(scores.tolist(), ranks.tolist()):
        pairs = [(w, l) for w, l in itertools.permutations(range(len(r)), 2) if 0 <= rank[w] < rank[l]]
        total += sum(math.log1p(math.exp(-(r[w] - r[l]))) for w, l in pairs) / max(1, len(pairs))
    return total / len(scores)


# -------------------------------------------------------------------------------------------------------------------- the losses


def test_equal_scores_cost_ln_2():
    x = torch.randn(5).double()
    assert math.isclose(bradley_terry_loss(x, x)[0].item(), LN2, rel_tol=1e-12)
    assert math.isclose(ranking_loss(x[:, None].expand(5, 4), torch.arange(4).expand(5, 4))[0].item(), LN2, rel_tol=1e-12)


def test_pairwise_loss_is_the_closed_form_with_its_margin():
    """-log σ(r_w - r_l - m) = log(1 + exp(-(r_w - r_l - m))), and its gradient is -σ(-(r_w - r_l - m)) on the chosen, the opposite on the other."""
    torch.manual_seed(0)
    w, l, m = (torch.randn(7).double() * 3 for _ in range(3))
    w.requires_grad_(), l.requires_grad_()
    loss, stats = bradley_terry_loss(w, l, m)
    assert math.isclose(loss.item(), sum(math.log1p(math.exp(-(a - b - c))) for a, b, c in zip(w.tolist(), l.tolist(), m.tolist())) / 7, rel_tol=1e-12)
    dw, dl = torch.autograd.grad(loss, (w, l))
    expected = -torch.tensor([1 / (1 + math.exp(a - b - c)) for a, b, c in zip(w.tolist(), l.tolist(), m.tolist())]).double() / 7
    torch.testing.assert_close(dw, expected)
    torch.testing.assert_close(dl, -expected)
    assert stats["acc"] == sum(a > b for a, b in zip(w.tolist(), l.tolist())) / 7 and math.isclose(stats["margin"], (w - l).mean().item(), rel_tol=1e-12)
    assert bradley_terry_loss(w, w)[1]["acc"] == 0                                           # a tie is not a success
    halves = [bradley_terry_loss(w[i], l[i], m[i], n=7)[0] for i in (slice(0, 3), slice(3, 7))]
    assert torch.isclose(sum(halves), loss)                                                  # micro-batches change nothing


@pytest.mark.parametrize("loss", [lambda x: bradley_terry_loss(x[:, 0], x[:, 1], 0.3)[0], lambda x: ranking_loss(x, torch.tensor([[0, 1, 1, 2], [1, 0, -1, -1], [2, 0, 0, 0]]))[0]])
def test_gradients_by_finite_differences_and_no_gradient_along_a_common_shift(loss):
    torch.manual_seed(1)
    x = torch.randn(3, 4).double().requires_grad_()
    grad, = torch.autograd.grad(loss(x), x)
    for i, j in itertools.product(range(3), range(4)):
        e = torch.zeros(3, 4).double()
        e[i, j] = 1e-6
        assert abs((loss(x + e) - loss(x - e)).item() / 2e-6 - grad[i, j].item()) < 1e-8
    assert abs(loss(x + torch.randn(3, 1)) - loss(x)) < 1e-12                               # r + c(x): Bradley-Terry cannot see it
    assert grad.sum(1).abs().max() < 1e-12 and grad.abs().max() > 0.01


def test_huge_differences_stay_finite():
    """log(1 + exp(.)) written out would overflow (ALGORITHMS 12.11)."""
    loss, _ = bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert loss == 1e4


def test_two_answers_are_a_pair():
    x = torch.randn(6, 2).double()
    a, b = ranking_loss(x, torch.tensor([0, 1]).expand(6, 2)), bradley_terry_loss(x[:, 0], x[:, 1])
    assert torch.isclose(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.isclose(a[1][k].double(), b[1][k].double()) for k in a[1])


def test_ranking_loss_is_the_mean_over_prompts_of_means_over_pairs():
    """Not a mean over all pairs of the batch: with ties and absent answers prompts have 6, 5, 4, 1 and 0 pairs."""
    torch.manual_seed(2)
    ranks = torch.tensor([[0, 1, 2, 3], [2, 0, 0, 1], [0, 0, 1, 1], [1, 0, -1, -1], [0, 0, 0, 0]])
    scores = torch.randn(5, 4).double() * 2
    loss, stats = ranking_loss(scores, ranks)
    assert math.isclose(loss.item(), brute_force(scores, ranks), rel_tol=1e-12)
    lead = [[r[w] - r[l] for w, l in itertools.permutations(range(4), 2) if 0 <= k[w] < k[l]] for r, k in zip(scores.tolist(), ranks.tolist())]
    assert math.isclose(stats["margin"], sum(sum(x) / len(x) for x in lead if x) / 4, rel_tol=1e-6)
    assert math.isclose(stats["acc"], sum(sum(y > 0 for y in x) / len(x) for x in lead if x) / 4, rel_tol=1e-6)
    halves = [ranking_loss(scores[i], ranks[i], n=5)[0] for i in (slice(0, 2), slice(2, 5))]
    assert torch.isclose(sum(halves), loss)                                                  # micro-batches change nothing


def test_a_prompt_with_ties_alone_gives_0_and_a_finite_gradient():
    x = torch.randn(1, 4).requires_grad_()
    loss, stats = ranking_loss(x, torch.zeros(1, 4, dtype=torch.long))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and not any(math.isnan(s) for s in stats.values())


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_an_absent_answer_changes_nothing(rubbish):
    ranks = torch.tensor([[0, 1, -1], [1, 0, 2]])
    scores = torch.randn(2, 3)
    clean, dirty = scores.clone().requires_grad_(), torch.where(ranks >= 0, scores, rubbish).requires_grad_()
    (a, sa), (b, sb) = ranking_loss(clean, ranks), ranking_loss(dirty, ranks)
    a.backward(), b.backward()
    assert a == b and sa == sb and torch.equal(clean.grad, dirty.grad)


# -------------------------------------------------------------------------------------------------------------------- the score


def test_the_score_is_read_at_the_end_token_alone_padded_and_in_a_batch(family):
    """One column right of the last value; nothing to the right of the end token matters, and neither do neighbours, width or pad id."""
    model = ScalarModel(tiny(family, stop=(3, 4, 5)), std=0.5).double()
    rows = [p + [9, 11, 10, 8][:i + 1] + [3] for i, p in enumerate(PROMPTS[:4])]
    masks = [[0] * len(p) + [1] * (len(r) - len(p)) for p, r in zip(PROMPTS, rows)]
    alone = torch.stack([model(torch.tensor([r]))[0, -1] for r in rows])
    tokens, mask = pad_batch(rows, masks)
    for filler in (0, 3, 7):
        wide = torch.cat([tokens.masked_fill(torch.arange(tokens.size(1)) >= torch.tensor(list(map(len, rows)))[:, None], filler), torch.full((4, 5), filler)], 1)
        m = torch.cat([mask, torch.zeros(4, 5)], 1)
        torch.testing.assert_close(model.score(wide, m), alone, rtol=0, atol=1e-10)
        for budget in (1, 20, 10 ** 6):
            value, score = frozen_scalars(model, wide, m, budget)
            torch.testing.assert_close(score, alone, rtol=0, atol=1e-10)
            torch.testing.assert_close(value[m > 0], model.value(wide)[m > 0], rtol=0, atol=1e-10)
    one = model(torch.tensor([rows[0]]))[0]
    value = model.value(torch.tensor([rows[0]]))[0]
    assert value[0] == 0 and torch.equal(value[1:], one[:-1]) and (value[-1] - alone[0]).abs() > 1e-3


def test_rows_that_stand_for_a_group_stay_together_and_count_in_full():
    """Of four answers to a prompt the longest counts, and `at` finds those of all four in the flattened piece."""
    mask = torch.ones(6, 4, 10)
    mask[:, 1:, 4:] = 0
    tokens = torch.arange(240).view(6, 4, 10)
    pieces = list(micro_batches(mask, torch.arange(6), 80, torch.device("cpu")))
    assert [(j.tolist(), t) for j, t, _ in pieces] == [([0, 1], 10), ([2, 3], 10), ([4, 5], 10)]
    for j, t, at in pieces:
        chosen = tokens[j][mask[j] > 0]
        assert torch.equal(tokens[j, :, :t].flatten()[at], chosen[chosen % 10 > 0])          # nothing is chosen at t = 0


# -------------------------------------------------------------------------------------------------------------------- the people


def cfg(**more):
    return reward.Config(**more)


ROW, TEXTS, LENGTH = {"two_digits": "20"}, ["13,20#20", "#20", "#25", "13,21#21"], [9, 4, 4, 9]


def test_people_follow_the_rule_and_tie_what_it_ties():
    assert reward.rank(ROW, TEXTS, LENGTH, cfg(), random.Random(0)) == [0, 0, 1, 1]


def test_a_taste_for_length_breaks_ties_and_can_outweigh_the_truth():
    assert reward.rank(ROW, TEXTS, LENGTH, cfg(length_taste=.1), random.Random(0)) == [0, 1, 3, 2]
    assert reward.rank(ROW, TEXTS, LENGTH, cfg(length_taste=.5), random.Random(0)) == [0, 2, 3, 1]


def test_the_share_of_wrong_labels_is_the_share_asked_for():
    rng = random.Random(0)
    ranks = [reward.rank(ROW, TEXTS, LENGTH, cfg(flip=.3), rng) for _ in range(4000)]
    assert {tuple(r) for r in ranks} == {(0, 0, 1, 1), (1, 1, 0, 0)}
    assert abs(sum(r[0] for r in ranks) / 4000 - .3) < .03                                  # 4 standard errors


def test_people_who_are_torn_call_it_a_tie():
    """1 + .1 x 4 and 0 + .1 x 14 are one value, whatever floating point says."""
    assert reward.rank(ROW, ["#20", "12,21,30#30"], [4, 14], cfg(length_taste=.1), random.Random(0)) == [0, 0]


def test_collection_keeps_the_better_answer_first_and_drops_what_was_cut_empty_or_the_same():
    """A policy whose four answers are known: one right, twice, one wrong, one of spaces; then one right, one cut, one wrong, one empty."""
    tokenizer = make_tokenizer("bytes")

    class Policy:
        cfg = GPTConfig()

        def generate(self, prompts, group, max_new):
            assert group == 4 and len(prompts) == 2
            said = [p + tokenizer.encode_ordinary(t) + end for p, texts in zip(prompts, (["#05", "#05", "#06", "  "], ["#07", "#0", "#09", ""]))
                    for t, end in zip(texts, [[256], [256] if texts[1] == "#05" else [], [256], [256]])]
            return (*pad_batch(said, [[0] * 4 + [1] * (len(x) - 4) for x in said]), None)

    rows = [{"prompt": p, "two_digits": d, "ids": tokenizer.encode_ordinary(p)} for p, d in (("2+3=", "05"), ("3+6=", "09"))]
    pairs = reward.collect(Policy(), tokenizer, rows, cfg(), random.Random(0))
    assert [(p["prompt"], p["chosen"], p["rejected"], p["two_digits"]) for p in pairs] == [("2+3=", "#05", "#06", "05"), ("3+6=", "#09", "#07", "09")]
    liked = reward.collect(Policy(), tokenizer, rows, cfg(flip=1.0), random.Random(0))
    assert [(p["chosen"], p["rejected"]) for p in liked] == [("#06", "#05"), ("#07", "#09")]


def test_many_pairs_of_one_prompt_cost_no_square():
    pairs = [{"prompt": "p", "chosen": f"w{i}", "rejected": f"l{i}"} for i in range(20_000)]
    assert len(reward.rankings(pairs)) == 20_000


def test_pairs_of_one_ranking_are_put_together_again_and_no_others():
    def pairs(texts, ranks, prompt="p"):
        return [{"prompt": prompt, "chosen": w, "rejected": l} for w, a in zip(texts, ranks) for l, b in zip(texts, ranks) if a < b]

    one = reward.rankings(pairs("abcd", [0, 1, 1, 2]))
    assert len(one) == 1 and one[0]["responses"] == list("abcd")
    assert [one[0]["ranks"][i] < one[0]["ranks"][j] for i, j in ((0, 1), (1, 2), (2, 1), (2, 3))] == [True, False, False, True]
    assert len(reward.rankings(pairs("ab", [0, 1]) + pairs("cd", [0, 1]))) == 2              # a against d was never asked
    circle = pairs("ab", [0, 1]) + pairs("bc", [0, 1]) + pairs("ca", [0, 1])
    assert [row["responses"] for row in reward.rankings(circle)] == [["a", "b"], ["b", "c"], ["c", "a"]]
    assert len(reward.rankings([x | {"margin": 1.0} for x in pairs("abc", [0, 1, 2])])) == 3
    assert len(reward.rankings(pairs("ab", [0, 1]) + pairs("ab", [0, 1], "q"))) == 2


# -------------------------------------------------------------------------------------------------------------------- the report


def test_the_report_on_scores_that_are_known(monkeypatch):
    """Three prompts with a pair each, won, lost and tied; every figure by hand."""
    tokenizer = make_tokenizer("bytes")
    pairs = [("1+1=", "01,02#02", "#05", "02"), ("2+2=", "#04", "02,03#03", "04"), ("3+3=", "#06", "#05", "06")]
    rows = reward.ready([{"prompt": p, "chosen": w, "rejected": l, "two_digits": d} for p, w, l, d in pairs], tokenizer, 64)
    monkeypatch.setattr(reward, "read_scores", lambda *a: torch.tensor([2.0, 0.0, 1.0, 2.0, 0.5, 0.5]))
    found, _ = reward.assess(None, rows, cfg(), None)
    sigma = lambda x: 1 / (1 + math.exp(-x))
    assert found["acc"] == pytest.approx(1 / 3)                                              # won, lost, tied
    assert found["±"] == pytest.approx(1.96 * (4 / 9 + 1 / 9 + 1 / 9) ** .5 / 3)
    assert found["alike"] == 0 and found["gold"] == pytest.approx(1 / 3)
    assert found["margin"] == pytest.approx(1 / 3)
    assert found["loss"] == pytest.approx((-math.log(sigma(2)) - math.log(sigma(-1)) + LN2) / 3)
    assert found["longer"] == pytest.approx(1.5 / 3)                                         # a tie in length is a toss of a coin
    assert found["ece"] == pytest.approx((abs(1 - sigma(2)) + abs(0 - sigma(1)) + 0) / 3)
    length, score = [9.0, 4.0, 4.0, 9.0, 4.0, 4.0], [2.0, 0.0, 1.0, 2.0, 0.5, 0.5]
    ml, ms = sum(length) / 6, sum(score) / 6
    cov = sum((a - ml) * (b - ms) for a, b in zip(length, score))
    assert found["corr"] == pytest.approx(cov / (sum((a - ml) ** 2 for a in length) * sum((b - ms) ** 2 for b in score)) ** .5)


def test_swapping_the_answers_turns_the_lead_around_and_the_interval_knows_that_pairs_of_a_prompt_go_together(monkeypatch):
    tokenizer = make_tokenizer("bytes")
    pair = lambda p, w, l: {"prompt": p, "chosen": w, "rejected": l}
    rows = reward.ready([pair(p, w, l) for p in "abcdefgh" for w in "uv" for l in "xy"], tokenizer, 64)
    assert len(rows) == 8 and all(row["responses"] == ["u", "v", "x", "y"] for row in rows)
    r = torch.tensor([[1.0, 1, 0, 0]] * 6 + [[0, 0, 1.0, 1]] * 2).flatten()
    monkeypatch.setattr(reward, "read_scores", lambda *a: r)
    one, _ = reward.assess(None, rows, cfg(), None)
    monkeypatch.setattr(reward, "read_scores", lambda *a: -r)
    other, _ = reward.assess(None, rows, cfg(), None)
    assert one["acc"] == .75 and other["acc"] == .25 and one["margin"] == -other["margin"] == .5
    assert one["±"] == pytest.approx(1.96 * (.75 * .25 / 8) ** .5)                           # 8 prompts, not 32 pairs


# -------------------------------------------------------------------------------------------------------------------- the reader


def read(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(str(tmp_path / "rows.jsonl"))


def test_the_three_formats_of_preferences(tmp_path, capsys):
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    pair, ranking, ties, dialogue = read(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}, {"prompt": "q", "responses": ["a", "b"]},
                                         {"prompt": "r", "responses": ["a", "b"], "ranks": [1, 0]}, {"chosen": talk + " yes", "rejected": talk + " no"})
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("a", "b", 2)
    assert (ranking["chosen"], ranking["rejected"], ties["chosen"], ties["rejected"]) == ("a", "b", "b", "a")
    assert (dialogue["prompt"], dialogue["chosen"], dialogue["rejected"]) == (talk, " yes", " no")
    three = read(tmp_path, {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]})
    assert [(x["chosen"], x["rejected"]) for x in three] == [("a", "b"), ("a", "c")]
    whole, = read(tmp_path, {"prompt": talk, "chosen": talk + " yes", "rejected": talk + " no"})
    assert (whole["prompt"], whole["chosen"], whole["rejected"]) == (talk, " yes", " no")    # texts that repeat the prompt
    assert "dropped" not in capsys.readouterr().out


def test_pairs_that_say_nothing_are_dropped_and_counted(tmp_path, capsys):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    kept = read(tmp_path, good, good | {"chosen": "b"}, good | {"rejected": " "}, {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
                {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 0]})
    assert len(kept) == 1
    said = capsys.readouterr().out
    assert "dropped 1 of 5 rows: the two prompts differ; the first is" in said and "rows.jsonl:4" in said
    assert "dropped 1 of 4 rows: a text is empty" in said and "dropped 2 of 3 rows: its answers are equal" in said


# -------------------------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("budget", [10 ** 6, 30])
@pytest.mark.parametrize("kind", ["pairs with margins", "rankings with ties"])
def test_one_step_of_the_script_is_its_equation_whatever_the_pieces(kind, budget, tmp_path, monkeypatch):
    """All prompts in one batch, a plain gradient step of size 1: what the weights lose is the gradient of the mean over prompts of means over
    their pairs, margins taken off, from scores that are read one answer at a time."""
    rows = [{"prompt": f"{i}?", "chosen": "ab" * (1 + i % 5), "rejected": "c" * (1 + i % 4), "margin": i % 3} if kind == "pairs with margins" else
            {"prompt": f"{i}?", "responses": ["ab" * (1 + i % 5), "c" * (1 + i % 4), "d"], "ranks": [0, 1, 1 + i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "init").mkdir()
    save(str(tmp_path / "init"), tiny(vocab=257, dtype=torch.float32), make_tokenizer())
    began = []
    sgd = lambda model, *a: began.append(copy.deepcopy(model)) or Optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
    monkeypatch.setattr(reward, "make_optimizer", sgd)
    monkeypatch.setattr(reward, "set_lr", lambda *a: 1.0)
    monkeypatch.setattr(reward.Folder, "plot", lambda *names: None)
    paths = {name: str(tmp_path / path) for name, path in (("init", "init"), ("data", "rows.jsonl"), ("out", "out"))}
    config = cfg(**paths, batch=1000, micro_tokens=budget, grad_clip=1e9)
    reward.train(config)
    tokenizer, losses = load(str(tmp_path / "init"))[1], []
    for row in reward.ready(reward.preferences(config, None, tokenizer)[0][0], tokenizer, 48):
        r = [began[0](torch.tensor([ids]))[0, -1] for ids in row["tokens"]]
        pairs = [(a, b) for (a, i), (b, j) in itertools.product(zip(r, row["ranks"]), repeat=2) if i < j]
        losses.append(sum(torch.log1p(torch.exp(row.get("margin", 0) - a + b)) for a, b in pairs) / len(pairs))
    after = dict(load(str(tmp_path / "out"))[0].named_parameters())
    unread = ("trunk.head.weight", "head.bias")                           # and the level of the scores is set by hand, from demonstrations
    names, params = zip(*[(name, p) for name, p in began[0].named_parameters() if name not in unread])
    for name, p, g in zip(names, params, torch.autograd.grad(sum(losses) / len(losses), params)):
        torch.testing.assert_close(p - after[name], g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6)
