"""The reward model's losses and its score by closed forms, brute force and finite differences; what
the annotators and the reader of preferences do.   python -m pytest tests/test_reward.py"""
import copy
import itertools
import json
import math
import random

import pytest
import torch

import common.evaluate
import reward
from common import load
from common.checkpoint import save_checkpoint
from common.data import read_rows
from common.optimizers import Optimizers
from common.preferences import better_worse, pairs_to_rankings, read_preferences, tokenize_rankings
from common.run import hash_rows
from common.tokenizer import encode_prompt, encode_response, make_tokenizer
from common.train import compute_values, micro_batches, pad_batch
from conftest import PROMPTS, tiny
from model import GPTConfig, ScalarModel
from reward import bradley_terry_loss, ranking_loss

LN2 = math.log(2)


def ordered_pairs(ranks):
    """All (better, worse) of one prompt, by loops; a negative rank is a missing response."""
    pairs = []
    for w, l in itertools.permutations(range(len(ranks)), 2):
        if 0 <= ranks[w] < ranks[l]:
            pairs.append((w, l))
    return pairs


def brute_force(scores, ranks):
    """InstructGPT's Eq. 1 by loops: for each prompt the mean over its pairs, then the mean over
    prompts."""
    total = 0.0
    for r, rank in zip(scores.tolist(), ranks.tolist()):
        pairs = ordered_pairs(rank)
        losses = [math.log1p(math.exp(-(r[w] - r[l]))) for w, l in pairs]
        total += sum(losses) / max(1, len(pairs))
    return total / len(scores)


# -------------------------------------------------------------------------------------- the losses


def test_equal_scores_have_loss_ln_2():
    x = torch.randn(5).double()
    loss, _ = bradley_terry_loss(x, x)
    assert math.isclose(loss.item(), LN2, rel_tol=1e-12)
    loss, _ = ranking_loss(x[:, None].expand(5, 4), torch.arange(4).expand(5, 4))
    assert math.isclose(loss.item(), LN2, rel_tol=1e-12)


def test_the_pairwise_loss_is_the_closed_form_with_its_margin():
    """-log σ(r_w - r_l - m) = log(1 + exp(-(r_w - r_l - m))); its gradient is -σ(-(r_w - r_l - m))
    on the chosen, the opposite on the rejected."""
    torch.manual_seed(0)
    w, l, m = (torch.randn(7).double() * 3 for _ in range(3))
    w.requires_grad_()
    l.requires_grad_()
    loss, stats = bradley_terry_loss(w, l, m)
    lead = (w - l - m).tolist()
    expected = sum(math.log1p(math.exp(-x)) for x in lead) / 7
    assert math.isclose(loss.item(), expected, rel_tol=1e-12)
    dw, dl = torch.autograd.grad(loss, (w, l))
    expected = -torch.tensor([1 / (1 + math.exp(x)) for x in lead]).double() / 7
    torch.testing.assert_close(dw, expected)
    torch.testing.assert_close(dl, -expected)
    assert stats["acc"] == sum(a > b for a, b in zip(w.tolist(), l.tolist())) / 7
    assert math.isclose(stats["margin"], (w - l).mean().item(), rel_tol=1e-12)
    assert bradley_terry_loss(w, w)[1]["acc"] == 0         # a tie is wrong
    first, _ = bradley_terry_loss(w[:3], l[:3], m[:3], n=7)
    second, _ = bradley_terry_loss(w[3:], l[3:], m[3:], n=7)
    assert torch.isclose(first + second, loss)             # micro-batches change nothing


def pairwise_of_columns(x):
    return bradley_terry_loss(x[:, 0], x[:, 1], 0.3)[0]


def ranking_of_three(x):
    return ranking_loss(x, torch.tensor([[0, 1, 1, 2], [1, 0, -1, -1], [2, 0, 0, 0]]))[0]


@pytest.mark.parametrize("loss", [pairwise_of_columns, ranking_of_three])
def test_gradients_are_finite_differences_and_vanish_along_a_common_shift(loss):
    torch.manual_seed(1)
    x = torch.randn(3, 4).double().requires_grad_()
    grad, = torch.autograd.grad(loss(x), x)
    for i, j in itertools.product(range(3), range(4)):
        e = torch.zeros(3, 4).double()
        e[i, j] = 1e-6
        slope = (loss(x + e) - loss(x - e)).item() / 2e-6
        assert abs(slope - grad[i, j].item()) < 1e-8
    # Bradley-Terry cannot see r + c(x)
    assert abs(loss(x + torch.randn(3, 1)) - loss(x)) < 1e-12
    assert grad.sum(1).abs().max() < 1e-12 and grad.abs().max() > 0.01


def test_huge_differences_stay_finite():
    """log(1 + exp(.)) written out would overflow."""
    loss, _ = bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert loss == 1e4


def test_a_ranking_of_two_responses_is_a_pair():
    x = torch.randn(6, 2).double()
    loss, stats = ranking_loss(x, torch.tensor([0, 1]).expand(6, 2))
    expected, expected_stats = bradley_terry_loss(x[:, 0], x[:, 1])
    assert torch.isclose(loss, expected) and stats.keys() == expected_stats.keys()
    for name, s in stats.items():
        assert torch.isclose(s.double(), expected_stats[name].double()), name


def test_the_ranking_loss_is_the_mean_over_prompts_of_means_over_pairs():
    """Not a mean over all pairs of the batch: with ties and missing responses prompts have 6, 5, 4,
    1 and 0 pairs."""
    torch.manual_seed(2)
    ranks = torch.tensor([[0, 1, 2, 3], [2, 0, 0, 1], [0, 0, 1, 1], [1, 0, -1, -1], [0, 0, 0, 0]])
    scores = torch.randn(5, 4).double() * 2
    loss, stats = ranking_loss(scores, ranks)
    assert math.isclose(loss.item(), brute_force(scores, ranks), rel_tol=1e-12)
    acc = margin = 0.0
    for r, rank in zip(scores[:4].tolist(), ranks[:4].tolist()):   # the last one has no pair
        leads = [r[w] - r[l] for w, l in ordered_pairs(rank)]
        acc += sum(x > 0 for x in leads) / len(leads) / 4
        margin += sum(leads) / len(leads) / 4
    assert math.isclose(stats["margin"], margin, rel_tol=1e-6)
    assert math.isclose(stats["acc"], acc, rel_tol=1e-6)
    first, _ = ranking_loss(scores[:2], ranks[:2], n=5)
    second, _ = ranking_loss(scores[2:], ranks[2:], n=5)
    assert torch.isclose(first + second, loss)             # micro-batches change nothing


def test_a_prompt_with_ties_alone_gives_0_and_a_finite_gradient():
    x = torch.randn(1, 4).requires_grad_()
    loss, stats = ranking_loss(x, torch.zeros(1, 4, dtype=torch.long))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()
    assert not any(math.isnan(s) for s in stats.values())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_the_score_of_a_missing_response_changes_nothing(garbage):
    ranks = torch.tensor([[0, 1, -1], [1, 0, 2]])
    clean = torch.randn(2, 3)
    dirty = torch.where(ranks >= 0, clean, garbage).requires_grad_()
    clean.requires_grad_()
    loss, stats = ranking_loss(dirty, ranks)
    expected, expected_stats = ranking_loss(clean, ranks)
    loss.backward()
    expected.backward()
    assert loss == expected and stats == expected_stats
    assert torch.equal(clean.grad, dirty.grad)


# --------------------------------------------------------------------------------------- the score


def test_the_score_is_read_at_the_end_token_alone_or_padded_in_a_batch(family):
    """One column right of the last value; nothing to the right of the end token matters, and
    neither do neighbours, width or pad id."""
    model = ScalarModel(tiny(family, stop_token_ids=(3, 4, 5)), std=0.5).double()
    rows, masks = [], []
    for i, prompt in enumerate(PROMPTS[:4]):
        response = [9, 11, 10, 8][:i + 1] + [3]
        rows.append(prompt + response)
        masks.append([0] * len(prompt) + [1] * len(response))
    alone = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])
    tokens, mask = pad_batch(rows, masks)
    length = torch.tensor([len(row) for row in rows])
    is_pad = torch.arange(tokens.size(1)) >= length[:, None]
    for pad in (0, 3, 7):
        wide = torch.cat([tokens.masked_fill(is_pad, pad), torch.full((4, 5), pad)], 1)
        wide_mask = torch.cat([mask, torch.zeros(4, 5)], 1)
        torch.testing.assert_close(model.score(wide, wide_mask), alone, rtol=0, atol=1e-10)
        inside = wide_mask > 0
        for budget in (1, 20, 10 ** 6):
            value, score = compute_values(model, wide, wide_mask, budget)
            torch.testing.assert_close(score, alone, rtol=0, atol=1e-10)
            expected = model.value(wide)[inside]
            torch.testing.assert_close(value[inside], expected, rtol=0, atol=1e-10)
    one = model(torch.tensor([rows[0]]))[0]
    value = model.value(torch.tensor([rows[0]]))[0]
    assert value[0] == 0 and torch.equal(value[1:], one[:-1])
    assert (value[-1] - alone[0]).abs() > 1e-3


def test_the_responses_of_a_prompt_stay_in_one_micro_batch_and_count_in_full():
    """Of four responses to a prompt the longest sets the width, and `index` finds the tokens of all
    four in the flattened piece."""
    mask = torch.ones(6, 4, 10)
    mask[:, 1:, 4:] = 0
    tokens = torch.arange(240).view(6, 4, 10)
    pieces = list(micro_batches(mask, torch.arange(6), 80, torch.device("cpu")))
    assert [rows.tolist() for rows, _, _ in pieces] == [[0, 1], [2, 3], [4, 5]]
    assert [width for _, width, _ in pieces] == [10, 10, 10]
    for rows, width, index in pieces:
        chosen = tokens[rows][mask[rows] > 0]
        expected = chosen[chosen % 10 > 0]                 # nothing is chosen at t = 0
        assert torch.equal(tokens[rows, :, :width].flatten()[index], expected)


# --------------------------------------------------------------------------------- the annotators


ROW = {"_two_digits": "20"}
TEXTS = ["13,20#20", "#20", "#25", "13,21#21"]
LENGTH = [9, 4, 4, 9]


def rank(texts=TEXTS, length=LENGTH, rng=None, **flags):
    cfg = reward.Config(**flags)
    return reward.rank_responses(ROW, texts, length, cfg, rng or random.Random(0))


def test_annotators_follow_the_rule_and_call_equals_a_tie():
    assert rank() == [0, 0, 1, 1]


def test_a_length_bias_breaks_ties_and_can_outweigh_the_truth():
    assert rank(length_bias=.1) == [0, 1, 3, 2]
    assert rank(length_bias=.5) == [0, 2, 3, 1]


def test_the_share_of_inverted_rankings_is_the_label_noise():
    rng = random.Random(0)
    ranks = [tuple(rank(label_noise=.3, rng=rng)) for _ in range(4000)]
    assert set(ranks) == {(0, 0, 1, 1), (1, 1, 0, 0)}
    inverted = sum(r == (1, 1, 0, 0) for r in ranks) / 4000
    assert abs(inverted - .3) < .03                        # 4 standard errors


def test_equal_utilities_are_a_tie_whatever_floating_point_says():
    """1 + .1 x 4 and 0 + .1 x 14 are one utility."""
    assert rank(["#20", "12,21,30#30"], [4, 14], length_bias=.1) == [0, 0]


class KnownPolicy:
    """A policy that gives these responses to the n-th prompt; "CUT" does not end."""
    cfg, device = GPTConfig(stop_token_ids=(256, 258)), torch.device("cpu")

    def __init__(self, *responses):
        self.responses = responses

    def generate(self, prompts, group_size, max_new_tokens, uniform):
        sequences, masks = [], []
        for prompt, texts in zip(prompts, self.responses, strict=True):
            assert len(texts) == group_size
            for text in texts:
                response = [*text.encode(), 256] if text != "CUT" else [*b"#0"]
                sequences.append(prompt + response)
                masks.append([0] * len(prompt) + [1] * len(response))
        return (*pad_batch(sequences, masks), None)


def collect(policy, rows, **flags):
    tokenizer = make_tokenizer()
    rows = [row | {"ids": encode_prompt(tokenizer, row)} for row in rows]
    return reward.collect(policy, tokenizer, rows, reward.Config(**flags), random.Random(0))


def test_collection_drops_truncated_empty_and_repeated_responses():
    """One right, twice, one wrong, one of spaces; then one wrong, one truncated, one right, one
    empty. The better response is the chosen one."""
    policy = KnownPolicy(["#05", "#05", "#06", "  "], ["#07", "CUT", "#09", ""])
    rows = [{"prompt": "2+3=", "_two_digits": "05"}, {"prompt": "3+6=", "_two_digits": "09"}]
    assert collect(policy, rows) == [rows[0] | {"chosen": "#05", "rejected": "#06"},
                                     rows[1] | {"chosen": "#09", "rejected": "#07"}]
    inverted = collect(policy, rows, label_noise=1.0)
    assert [(pair["chosen"], pair["rejected"]) for pair in inverted] == [
        ("#06", "#05"), ("#07", "#09")]


@pytest.mark.parametrize("row", [
    {"prompt": "2+3=", "answer": "5"},
    {"messages": [{"role": "user", "content": "2+3"}], "answer": "5"},
    {"question": "2+3", "answer": "2+3 = 5\n#### 5"},
])
def test_collected_pairs_are_read_again_as_they_were(row, tmp_path):
    """Else a resumed run, which reads them, refuses its own data."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = read_rows(str(tmp_path / "rows.jsonl"), "prompt", "answer")
    pairs = collect(KnownPolicy(["5", "6", "7", "8"]), rows)
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    again = read_preferences(str(path))
    assert len(pairs) == len(again) == 3
    rankings, rankings_again = (tokenize_rankings(x, make_tokenizer(), 64)
                                for x in (pairs, again))
    assert hash_rows([rankings]) == hash_rows([rankings_again])


def test_many_pairs_of_one_prompt_stay_pairs_and_take_no_quadratic_time():
    """A quadratic pass over 50,000 pairs would never end."""
    pairs = [{"prompt": "p", "chosen": f"w{i}", "rejected": f"l{i}"} for i in range(50_000)]
    assert len(pairs_to_rankings(pairs)) == 50_000


def pairs_of(texts, ranks, prompt="p"):
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in better_worse(texts, ranks)]


def test_the_pairs_of_one_ranking_are_put_together_again_and_no_others():
    row, = pairs_to_rankings(pairs_of("abcd", [0, 1, 1, 2]))
    assert row["responses"] == list("abcd")
    a, b, c, d = row["ranks"]
    assert a < b == c < d
    # a against d was never compared
    two = pairs_of("ab", [0, 1]) + pairs_of("cd", [0, 1])
    assert len(pairs_to_rankings(two)) == 2
    circle = pairs_of("ab", [0, 1]) + pairs_of("bc", [0, 1]) + pairs_of("ca", [0, 1])
    rows = pairs_to_rankings(circle)
    assert [row["responses"] for row in rows] == [["a", "b"], ["b", "c"], ["c", "a"]]
    # a comparison that is there twice, alike or not, makes each of the file's a row
    whole = pairs_of("abc", [0, 1, 2], "q")
    assert len(pairs_to_rankings(whole + two)) == 3
    for ranks in ([0, 1], [1, 0]):
        assert len(pairs_to_rankings(whole + two + pairs_of("ab", ranks))) == 6
    with_margins = [pair | {"margin": 1.0} for pair in pairs_of("abc", [0, 1, 2])]
    assert len(pairs_to_rankings(with_margins)) == 3
    two_prompts = pairs_of("ab", [0, 1]) + pairs_of("ab", [0, 1], "q")
    assert len(pairs_to_rankings(two_prompts)) == 2


def test_every_annotator_counts_when_several_judge_the_same_pair():
    """Three annotators prefer the better response with probability .8 each, on 1,000 prompts. Were
    unanimous comparisons one row and contested ones three, the share would be .699."""
    rng, pairs = random.Random(0), []
    for i in range(1000):
        for _ in range(3):
            ranks = [0, 1] if rng.random() < .8 else [1, 0]
            pairs += pairs_of(["good", "bad"], ranks, f"p{i}")
    rows = pairs_to_rankings(pairs)
    assert len(rows) == 3000
    share = sum(row["responses"][0] == "good" for row in rows) / len(rows)
    assert share == sum(pair["chosen"] == "good" for pair in pairs) / 3000
    assert abs(share - .8) < .02


def test_rankings_of_one_prompt_by_several_annotators_stay_rankings(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "p", "responses": ["a", "b", "c"]},
             {"prompt": "p", "responses": ["c", "a", "b"]},
             {"prompt": "p", "responses": ["a", "b", "c"]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = pairs_to_rankings(read_preferences(str(path)))
    assert [row["responses"] for row in rows] == [["a", "b", "c"], ["c", "a", "b"], ["a", "b", "c"]]


# -------------------------------------------------------------------------------------- evaluation


def evaluate(rows, scores, monkeypatch):
    monkeypatch.setattr(common.evaluate, "compute_scores", lambda *_: scores)
    metrics, _ = common.evaluate.evaluate_rankings(None, rows, reward.score, reward.Config())
    return metrics


def test_every_metric_of_known_scores_is_the_one_computed_by_hand(monkeypatch):
    """Three prompts with a pair each: in the right order, in the wrong one, tied."""
    pairs = [("1+1=", "01,02#02", "#05", "02"), ("2+2=", "#04", "02,03#03", "04"),
             ("3+3=", "#06", "#05", "06")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected, "_two_digits": right}
            for prompt, chosen, rejected, right in pairs]
    rows = tokenize_rankings(rows, make_tokenizer(), 64)
    score = [2.0, 0.0, 1.0, 2.0, 0.5, 0.5]
    length = [9.0, 4.0, 4.0, 9.0, 4.0, 4.0]
    metrics = evaluate(rows, torch.tensor(score), monkeypatch)

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    mean_l, mean_s = sum(length) / 6, sum(score) / 6
    cov = sum((a - mean_l) * (b - mean_s) for a, b in zip(length, score))
    var_l = sum((a - mean_l) ** 2 for a in length)
    var_s = sum((b - mean_s) ** 2 for b in score)
    assert metrics == pytest.approx({
        "acc": 1 / 3,
        "acc_ci95": 1.96 * (4 / 9 + 1 / 9 + 1 / 9) ** .5 / 3 * (3 / 2) ** .5,
        "acc_same_style": 0,                               # the tied pair alone
        "acc_vs_rule": 1 / 3,
        "margin": 1 / 3,
        "loss": (-math.log(sigma(2)) - math.log(sigma(-1)) + LN2) / 3,
        "acc_longer": 1.5 / 3,                             # a tie in length counts half
        "ece": (abs(1 - sigma(2)) + abs(0 - sigma(1)) + 0) / 3,
        "length_corr": cov / (var_l * var_s) ** .5,
    })


def test_negated_scores_reverse_the_margin_and_pairs_of_a_prompt_count_as_one(monkeypatch):
    pairs = []
    for prompt, chosen, rejected in itertools.product("abcdefgh", "uv", "xy"):
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    rows = tokenize_rankings(pairs, make_tokenizer(), 64)
    assert len(rows) == 8
    assert all(row["responses"] == ["u", "v", "x", "y"] for row in rows)
    scores = torch.tensor([[1.0, 1, 0, 0]] * 6 + [[0, 0, 1.0, 1]] * 2).flatten()
    metrics = evaluate(rows, scores, monkeypatch)
    negated = evaluate(rows, -scores, monkeypatch)
    assert metrics["acc"] == .75 and negated["acc"] == .25
    assert metrics["margin"] == -negated["margin"] == .5
    # the interval of 8 prompts, not of 32 pairs
    assert metrics["acc_ci95"] == pytest.approx(1.96 * (.75 * .25 / 7) ** .5)
    # which are one prompt's also where each is a row
    apart = tokenize_rankings(pairs + pairs, make_tokenizer(), 64)
    assert len(apart) == 64
    scores = [float(row["responses"][0] == "u" and row["prompt"] < "g") for row in apart]
    scores = torch.tensor([[x, 0.5] for x in scores]).flatten()
    found = evaluate(apart, scores, monkeypatch)
    # six prompts have 4 of 8 in order, two have none: 1 more than the mean of 3, and 3 less
    assert found["acc"] == 24 / 64
    error = (6 * 1 ** 2 + 2 * 3 ** 2) ** .5 / 64
    assert found["acc_ci95"] == pytest.approx(1.96 * error * (8 / 7) ** .5)


# --------------------------------------------------------------------------- files of preferences


def read(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in read_preferences(str(path))]


def test_pairs_rankings_and_dialogues_are_read(tmp_path, capsys):
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant:"
    assert read(
        tmp_path,
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": "q", "responses": ["a", "b"]},
        {"prompt": "r", "responses": ["a", "b"], "ranks": [1, 0]},
        {"chosen": talk + " yes", "rejected": talk + " no"},
    ) == [("p", "a", "b"), ("q", "a", "b"), ("r", "b", "a"), (talk, " yes", " no")]
    pair, *_ = read_preferences(str(tmp_path / "rows.jsonl"))
    assert pair["margin"] == 2
    ranking = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [0, 1, 1]}
    assert read(tmp_path, ranking) == [("q", "a", "b"), ("q", "a", "c")]
    # texts that repeat the prompt
    repeats = {"prompt": talk, "chosen": talk + " yes", "rejected": talk + " no"}
    assert read(tmp_path, repeats) == [(talk, " yes", " no")]
    assert "dropped" not in capsys.readouterr().out


def test_a_model_that_chats_reads_a_dialogue_as_turns(tmp_path):
    """HH-RLHF's text as one user turn would show it roles that it was never trained on. Two turns
    in a row by one speaker are one; the response loses the space before it; without turns, the text
    is what it was."""
    talk = "\n\nHuman: hi\n\nAssistant: hello \n\nHuman: and\n\nHuman: so?\n\nAssistant:"
    rows = [{"chosen": talk + " yes\n", "rejected": talk + " no"}]
    read(tmp_path, *rows)
    pair, = read_preferences(str(tmp_path / "rows.jsonl"))
    chats, plain = make_tokenizer(turns=True), make_tokenizer()
    tokens, mask = encode_response(chats, pair, pair["chosen"])
    assert chats.decode(tokens) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nand\n\nso?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>")
    assert chats.decode([t for t, m in zip(tokens, mask) if m]) == "yes<|im_end|>"
    tokens, _ = encode_response(plain, pair, pair["chosen"])
    assert plain.decode(tokens) == talk + " yes\n<|endoftext|>"


def test_pairs_that_say_nothing_are_dropped_and_counted(tmp_path, capsys):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read(
        tmp_path,
        good,
        good | {"chosen": "b"},
        good | {"rejected": " "},
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b"},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 0]},
    ) == [("p", "a", "b")]
    differing_prompts, empty, equal = capsys.readouterr().out.splitlines()
    assert "dropped 1 of 5 rows" in differing_prompts and "rows.jsonl:4" in differing_prompts
    assert "dropped 1 of 4 rows" in empty and "rows.jsonl:3" in empty
    assert "dropped 2 of 3 rows" in equal and "rows.jsonl:2" in equal


# -------------------------------------------------------------------------------------- the script


def pair_with_margin(i):
    return {"prompt": f"{i}?", "chosen": "ab" * (1 + i % 5), "rejected": "c" * (1 + i % 4),
            "margin": i % 3}


def ranking_with_ties(i):
    return {"prompt": f"{i}?", "responses": ["ab" * (1 + i % 5), "c" * (1 + i % 4), "d"],
            "ranks": [0, 1, 1 + i % 2]}


@pytest.mark.parametrize("budget", [10 ** 6, 30])
@pytest.mark.parametrize("make", [pair_with_margin, ranking_with_ties])
def test_one_step_of_the_script_is_its_equation_whatever_the_micro_batches(
        make, budget, tmp_path, monkeypatch):
    """All prompts in one batch, a plain gradient step of size 1: what the weights lose is the
    gradient of the mean over prompts of means over their pairs, margins subtracted, from scores
    that are read one response at a time."""
    models = []

    def sgd(model, *_):
        models.append(copy.deepcopy(model))                # as it began
        return Optimizers(torch.optim.SGD(model.parameters(), lr=1.0))

    init, data = tmp_path / "init", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(make(i)) + "\n" for i in range(40)))
    init.mkdir()
    save_checkpoint(init, tiny(vocab_size=257, dtype=torch.float32), make_tokenizer())
    monkeypatch.setattr(reward, "make_optimizer", sgd)
    monkeypatch.setattr(reward, "set_lr", lambda *_: 1.0)
    monkeypatch.setattr(reward.Run, "plot", lambda *_: None)
    cfg = reward.Config(init=str(init), data=str(data), out=str(tmp_path / "out"), batch=1000,
                        micro_batch_tokens=budget, grad_clip=1e9)
    reward.train(cfg)
    before, = models
    _, tokenizer = load(str(init))
    splits, _ = reward.load_preferences(cfg, None, tokenizer)
    losses = []
    for row in tokenize_rankings(splits[0], tokenizer, 48):
        r = [before(torch.tensor([ids]))[0, -1] for ids in row["tokens"]]
        pairs = better_worse(r, row["ranks"])
        margin = row.get("margin", 0)
        losses.append(sum(torch.log1p(torch.exp(margin - a + b)) for a, b in pairs) / len(pairs))
    loss = sum(losses) / len(losses)
    # the level of the scores, head.bias, is set from demonstrations; the trunk's head is not used
    names = [name for name, _ in before.named_parameters()
             if name not in ("trunk.head.weight", "head.bias")]
    params = [before.get_parameter(name) for name in names]
    after, _ = load(str(tmp_path / "out"))
    for name, p, g in zip(names, params, torch.autograd.grad(loss, params)):
        step = p - after.get_parameter(name)
        torch.testing.assert_close(step, g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6)
