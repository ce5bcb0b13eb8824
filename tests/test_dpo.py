"""DPO's loss against closed forms, enumeration and finite differences; the script's pairs,
reference and evaluation.   python -m pytest tests/test_dpo.py"""
import gc
import itertools
import json
import math
import random
import shutil

import pytest
import torch

import dpo
import sft
from common import InputError, load
from common.checkpoint import read_checkpoint, save_checkpoint
from common.optimizers import Optimizers
from common.preferences import load_pairs
from common.tokenizer import encode_response, make_tokenizer
from common.train import micro_batches, pad_pairs
from conftest import gradients, naive_logp, tiny
from dpo import dpo_loss, response_logp
from model import GPT
from preference_variants import ipo_loss

DEVICE = torch.device("cpu")


def four(P=7):
    """Summed log-probs (P,): chosen and rejected under the policy, then under the reference."""
    torch.manual_seed(0)
    return [-torch.rand(P).double() * 30 for _ in range(4)]


# ---------------------------------------------------------------------------------------- the loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loss_is_equation_7_by_the_textbook_and_its_statistics_are_means(label_smoothing):
    w, l, rw, rl = four()
    beta = 0.3
    loss, stats = dpo_loss(w, l, rw, rl, beta, label_smoothing)
    total = 0.0
    for a, b, c, d in zip(w.tolist(), l.tolist(), rw.tolist(), rl.tolist()):
        h = (a - c) - (b - d)
        total -= (1 - label_smoothing) * math.log(sigmoid(beta * h))
        total -= label_smoothing * math.log(sigmoid(-beta * h))
    assert math.isclose(loss, total / 7, rel_tol=1e-12)
    expected = {
        "reward_w": beta * (w - rw).mean(),
        "reward_l": beta * (l - rl).mean(),
        "margin": beta * (w - rw - l + rl).mean(),
        "pair_acc": ((w - rw) > (l - rl)).double().mean(),
        "logp_w": w.mean(),
        "logp_l": l.mean(),
    }
    assert stats.keys() == expected.keys()
    for name, x in expected.items():
        assert math.isclose(stats[name], x, rel_tol=1e-6), name
    assert 0 < expected["pair_acc"] < 1


def test_at_the_start_the_loss_is_ln_2_and_no_pair_is_in_order():
    w, l, _, _ = four()
    w.requires_grad_()
    l.requires_grad_()
    loss, stats = dpo_loss(w, l, w.detach(), l.detach(), 0.1)
    assert loss.item() == math.log(2)
    assert stats["pair_acc"] == stats["margin"] == 0
    gw, gl = torch.autograd.grad(loss, (w, l))
    torch.testing.assert_close(gw, torch.full_like(gw, -0.1 / 2 / 7), rtol=1e-12, atol=0)
    assert torch.equal(gl, -gw)


def test_the_gradient_through_a_model_is_the_closed_form_of_the_docstring():
    """- β σ(-β h) [∇ log π(y_w) - ∇ log π(y_l)], each ∇ log π of one response alone, unpadded."""
    model = tiny()
    reference = tiny(seed=1)
    pairs = [dict(tokens=([7, 8, 9, 3], [7, 8, 10, 11, 12, 4]),
                  mask=([0, 0, 1, 1], [0, 0, 1, 1, 1, 1])),
             dict(tokens=([5, 6, 7, 8, 9, 3], [5, 6, 3]),
                  mask=([0, 0, 1, 1, 1, 1], [0, 0, 1]))]
    beta, params = 0.4, list(model.parameters())
    expected = [torch.zeros_like(p) for p in params]
    for row in pairs:
        logp, ref = [], []
        for tokens, mask in zip(row["tokens"], row["mask"]):
            tokens, mask = torch.tensor([tokens]), torch.tensor([mask])
            logp.append((naive_logp(model, tokens) * mask).sum())
            ref.append((naive_logp(reference, tokens) * mask).sum().item())
        h = (logp[0] - ref[0] - logp[1] + ref[1]).item()
        scale = -beta * sigmoid(-beta * h) / len(pairs)
        grad_w = torch.autograd.grad(logp[0], params)
        grad_l = torch.autograd.grad(logp[1], params)
        for e, gw, gl in zip(expected, grad_w, grad_l):
            e += scale * (gw - gl)
    tokens, mask = pad_pairs(pairs)
    logp, _ = model.token_logp(tokens.flatten(0, 1), mask.flatten(0, 1))
    ref_w, ref_l = response_logp(reference, pairs, dpo.Config()).double().T
    loss, _ = dpo_loss(*logp.sum(1).view(-1, 2).T, ref_w, ref_l, beta)
    for e, g in zip(expected, torch.autograd.grad(loss, params)):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-6)


LOSSES = {"dpo": (dpo_loss, ()), "cdpo": (dpo_loss, (0.1,)), "ipo": (ipo_loss, ())}


@pytest.mark.parametrize("loss, more", LOSSES.values(), ids=LOSSES)
def test_the_gradient_is_that_of_finite_differences(loss, more):
    w, l, rw, rl = four()

    def loss_of(w, l):
        return loss(w, l, rw, rl, 0.3, *more)[0]

    assert torch.autograd.gradcheck(loss_of, (w.requires_grad_(), l.requires_grad_()))


def test_huge_margins_stay_finite_and_their_gradient_is_the_limit():
    w = torch.tensor([-1e4, 0.], requires_grad=True)
    loss, _ = dpo_loss(w, torch.tensor([0., -1e4]), torch.zeros(2), torch.zeros(2), 1.0)
    assert loss == 5000
    assert torch.equal(torch.autograd.grad(loss, w)[0], torch.tensor([-.5, 0.]))


def test_a_batch_in_pieces_has_the_gradient_of_the_whole():
    w, l, rw, rl = four()
    w.requires_grad_()
    loss, _ = dpo_loss(w, l, rw, rl, 0.3)
    whole, = torch.autograd.grad(loss, w)
    parts = torch.zeros_like(whole)
    for i in torch.arange(7).split(3):
        loss, _ = dpo_loss(w[i], l[i], rw[i], rl[i], 0.3, n=7)
        parts += torch.autograd.grad(loss, w)[0]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------- the optimum


REWARD = torch.tensor([1., .3, -.5, .9, -1.2]).double()
REF = torch.tensor([.1, .4, .2, .05, .25]).double().log()


def minimise(weights, beta, label_smoothing=0.0, steps=200, loss=dpo_loss):
    """Log-probs of five responses that minimise the loss over all ordered pairs of them, pair
    (i, j) weighing weights[i, j]."""
    z = REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=steps, tolerance_grad=1e-13, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logp, total = z.log_softmax(0), 0.0
        for i, j in itertools.permutations(range(5), 2):
            pair = logp[[i]], logp[[j]], REF[[i]], REF[[j]]
            total = total + weights[i, j] * loss(*pair, beta, label_smoothing)[0]
        total.backward()
        return total

    optimizer.step(closure)
    return z.detach().log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_under_bradley_terry_labels_is_the_rlhf_optimum(beta):
    """π_ref exp(r/β) / Z by enumeration (Eq. 4), and the implicit reward is r up to a constant,
    β log Z (Eq. 5)."""
    bradley_terry = (REWARD[:, None] - REWARD[None, :]).sigmoid()
    logp = minimise(bradley_terry, beta)
    optimum = (REF + REWARD / beta).log_softmax(0)
    torch.testing.assert_close(logp, optimum, rtol=0, atol=1e-5)
    beta_log_z = beta * (REF + REWARD / beta).logsumexp(0)
    constant = REWARD - beta * (logp - REF)
    torch.testing.assert_close(constant, beta_log_z.expand(5), rtol=0, atol=1e-5)
    reversed_optimum = (REF - REWARD / beta).log_softmax(0)
    assert (logp - reversed_optimum).abs().max() > .5      # with the sign wrong, another policy


def test_hard_labels_have_no_optimum_and_smoothed_labels_have_one():
    """If one response always wins, its margin grows without end; with cDPO's ε it stops at
    σ(β h) = 1 - ε; IPO stops at h = 1/(2β)."""
    one_pair = torch.zeros(5, 5).double()
    one_pair[0, 1] = 1

    def margin(beta, **more):
        logp = minimise(one_pair, beta, **more)
        return ((logp - REF)[0] - (logp - REF)[1]).item()

    grown = [margin(0.5, steps=n) for n in (3, 6, 12, 24)]
    assert all(b > a + 1 for a, b in zip(grown, grown[1:])) and grown[-1] > 20
    for eps in (0.1, 0.3):
        h = math.log((1 - eps) / eps) / 0.5
        assert math.isclose(margin(0.5, label_smoothing=eps), h, rel_tol=1e-5)
    for beta in (0.1, 0.5, 2.0):
        h = margin(beta, loss=ipo_loss)
        assert math.isclose(h, 1 / (2 * beta), rel_tol=1e-5)


# -------------------------------------------------------------------- with a model under the loss


def random_pairs(n=9):
    rng, tokenizer, rows = random.Random(0), make_tokenizer(), []
    for _ in range(n):
        row = {"prompt": "q" * rng.randint(1, 5),
               "chosen": "ab"[:rng.randint(1, 2)] * rng.randint(1, 4),
               "rejected": "c" * rng.randint(1, 6)}
        encoded = [encode_response(tokenizer, row, row[name]) for name in ("chosen", "rejected")]
        row["tokens"], row["mask"] = zip(*encoded)
        rows.append(row)
    return rows


def test_log_probs_are_sums_over_response_and_end_token_in_any_batch():
    """Against one response at a time, by all logits: the prompt does not count, the end token does,
    and nothing is divided by the length."""
    model, rows = tiny(vocab_size=257), random_pairs()
    expected = []
    for row in rows:
        for name in ("chosen", "rejected"):
            ids = [*(row["prompt"] + row[name]).encode(), 256]
            logp = naive_logp(model, torch.tensor([ids]))[0]
            expected.append(logp[len(row["prompt"]):].sum())
    expected = torch.stack(expected).view(-1, 2).detach()
    for budget in (1, 30, 10 ** 6):
        found = response_logp(model, rows, dpo.Config(micro_batch_tokens=budget))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert response_logp(model, [], dpo.Config()).shape == (0, 2)


def test_micro_batches_of_any_size_leave_the_gradient_as_it_is():
    pairs, found = random_pairs(), []
    every_pair = torch.arange(len(pairs))
    ref = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1)).double()
    tokens, mask = pad_pairs(pairs)
    for budget in (10 ** 6, 1, 60):
        model = tiny(vocab_size=257)
        for rows, width, index in micro_batches(mask, every_pair, budget, DEVICE):
            logp, _ = model.token_logp(tokens[rows, :, :width].flatten(0, 1), index=index)
            loss, _ = dpo_loss(*logp.sum(1).view(-1, 2).T, *ref[rows].T, 0.3, n=len(pairs))
            loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny policy in init/, and 120 pairs, three a prompt, in pairs.jsonl."""
    folder = tmp_path_factory.mktemp("dpo")
    model = tiny(vocab_size=257, stop_token_ids=(256,), dtype=torch.float32)
    (folder / "init").mkdir()
    save_checkpoint(folder / "init", model, make_tokenizer())
    with open(folder / "pairs.jsonl", "w") as f:
        for i in range(40):
            for k in range(3):
                row = {"prompt": f"{i}?", "chosen": "ab" * (1 + (i + k) % 3),
                       "rejected": f"{k}c" * (1 + i % 2)}
                f.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(dpo.Run, "plot", lambda *_: None)


def config(folder, out="out", **more):
    base = dict(init=str(folder / "init"), data=str(folder / "pairs.jsonl"),
                out=str(folder / out), max_new_tokens=4, eval_every=100)
    return dpo.Config(**base | more)


def train(folder, out, **more):
    """The rows of metrics.jsonl."""
    dpo.train(config(folder, out, **more))
    with open(folder / out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def test_reference_log_probs_computed_once_are_those_computed_on_the_fly(own, monkeypatch):
    """A policy that never moves stays its own reference: in every batch of two shuffled epochs its
    log-probs are the stored ones, pair for pair; and no second model is in memory."""
    def count_models():
        return sum(type(x) is GPT for x in gc.get_objects())

    seen, n_models = [], []
    gc.collect()
    before = count_models()

    def spy(w, l, ref_w, ref_l, *more):
        seen.append((w, l, ref_w, ref_l))
        n_models.append(count_models() - before)
        return dpo_loss(w, l, ref_w, ref_l, *more)

    monkeypatch.setattr(dpo, "dpo_loss", spy)
    rows = train(own, "still", lr=0.0, epochs=2, batch=32, sft_coef=0.0)
    assert set(n_models) == {1}
    assert rows[0]["val_pair_acc"] == rows[0]["val_margin"] == 0      # the start, to the last bit
    for w, l, ref_w, ref_l in seen:
        torch.testing.assert_close(w, ref_w, rtol=0, atol=1e-4)
        torch.testing.assert_close(l, ref_l, rtol=0, atol=1e-4)
    ref_w = torch.cat([ref_w for _, _, ref_w, _ in seen])
    ref_l = torch.cat([ref_l for _, _, _, ref_l in seen])
    assert ref_w.std() > 1 and ((ref_w - ref_l).abs() > 1).any()      # a mix-up would show
    assert all(abs(row["loss"] - math.log(2)) < 1e-5 for row in rows[1:])


@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
def test_one_step_of_the_script_is_equation_7_and_the_sft_loss(own, sft_coef, monkeypatch):
    """All pairs in one batch, a plain gradient step of size 1: what the weights lose is the
    gradient of DPO + sft_coef * SFT, computed here."""
    def sgd(model, lr):
        return Optimizers(torch.optim.SGD(model.parameters(), lr=1.0))

    monkeypatch.setattr(dpo, "make_optimizer", sgd)
    monkeypatch.setattr(dpo, "set_lr", lambda *_: 1.0)
    out = f"step{sft_coef}"
    train(own, out, batch=1000, sft_coef=sft_coef, beta=0.5, grad_clip=1e9, label_smoothing=0.2)
    model, tokenizer = load(str(own / "init"))
    after, _ = load(str(own / out))
    pairs, _, _ = load_pairs(str(own / "pairs.jsonl"), "", tokenizer, 48)
    tokens, mask = pad_pairs(pairs)
    logp = naive_logp(model, tokens.flatten(0, 1)) * mask.flatten(0, 1)   # (2 P, T)
    w, l = logp.sum(1).view(-1, 2).T
    h = 0.5 * (w - l - (w - l).detach())                   # the reference is the policy, as it was
    loss = -(.8 * h.sigmoid().log() + .2 * (-h).sigmoid().log()).mean()
    loss = loss + sft_coef * sft.sft_loss(logp[::2], mask[:, 0])[0]
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for p, q, g in zip(model.parameters(), after.parameters(), expected):
        torch.testing.assert_close(p - q, g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6)


def test_a_resumed_run_keeps_its_reference_and_refuses_other_pairs(own, tmp_path):
    """The reference log-probs are those of the first start, even where --init has changed since;
    pairs that came are refused, and nothing is lost by that."""
    copy = tmp_path / "copy"
    shutil.copytree(own, copy)
    whole = train(copy, "whole", batch=20, eval_every=2)
    train(copy, "cut", batch=20, eval_every=2)
    ref = read_checkpoint(copy / "cut")["state"]["ref"]
    model, tokenizer = load(str(copy / "init"))
    with torch.no_grad():
        model.embedding.weight += 0.1
    save_checkpoint(copy / "init", model, tokenizer)
    again = train(copy, "cut", batch=20, eval_every=2, epochs=2, resume=True)
    losses = [row["loss"] for row in whole[1:]]
    assert [row["loss"] for row in again[1:len(whole)]] == losses and len(again) > len(whole)
    kept = read_checkpoint(copy / "cut")["state"]["ref"]
    assert all(map(torch.equal, kept, ref))
    with open(copy / "pairs.jsonl", "a") as f:
        f.write('{"prompt": "new", "chosen": "a", "rejected": "b"}\n')
    names = ("config.json", "metrics.jsonl", "ckpt.pt")
    files = {name: (copy / "cut" / name).read_bytes() for name in names}
    with pytest.raises(InputError, match="--data"):
        train(copy, "cut", batch=20, eval_every=2, epochs=3, resume=True)
    assert files == {name: (copy / "cut" / name).read_bytes() for name in names}


def test_no_prompt_is_in_two_splits_and_pairs_that_do_not_fit_are_dropped(own, capsys):
    tokenizer = make_tokenizer()
    splits = load_pairs(str(own / "pairs.jsonl"), "", tokenizer, 48)
    prompts = [{row["prompt"] for row in rows} for rows in splits]
    assert sum(map(len, splits)) == 120
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    for row in splits[0] + splits[1] + splits[2]:
        for name, tokens, mask in zip(("chosen", "rejected"), row["tokens"], row["mask"]):
            assert tokens == [*(row["prompt"] + row[name]).encode(), 256]
            assert mask == [0] * len(row["prompt"]) + [1] * (len(row[name]) + 1)
    splits = load_pairs(str(own / "pairs.jsonl"), "", tokenizer, 8)
    said = capsys.readouterr().out
    assert 0 < sum(map(len, splits)) < 120
    assert "dropped" in said and "8 tokens" in said


def test_metrics_of_held_out_pairs_and_their_confidence_interval(own):
    """Against loops, with references that make some pairs wrong; the pairs of one prompt count as
    one observation for the interval."""
    model, tokenizer = load(str(own / "init"))
    pairs, _, _ = load_pairs(str(own / "pairs.jsonl"), "", tokenizer, 48)
    logp = response_logp(model, pairs, dpo.Config())       # (P, 2)
    torch.manual_seed(0)
    for row, ref in zip(pairs, (logp + torch.randn_like(logp)).tolist()):
        row["ref"] = ref
    found = dpo.evaluate_pairs(model, pairs, dpo.Config(beta=0.5))
    h = [w - row["ref"][0] - l + row["ref"][1] for row, (w, l) in zip(pairs, logp.tolist())]
    acc = sum(x > 0 for x in h) / len(h)
    error = {}                                             # each prompt's part
    for row, x in zip(pairs, h):
        error[row["prompt"]] = error.get(row["prompt"], 0.0) + (x > 0) - acc
    assert 0 < acc < 1 and len(error) < len(h)
    prompts = len(error)
    variance = sum(x * x for x in error.values()) * prompts / (prompts - 1)
    expected = {
        "pair_acc": acc,
        "pair_acc_ci95": 1.96 * math.sqrt(variance) / len(h),
        "margin": .5 * sum(h) / len(h),
        "pair_loss": sum(math.log(1 + math.exp(-.5 * x)) for x in h) / len(h),
        "logp_w": logp[:, 0].mean().item(),
    }
    for name, x in expected.items():
        assert math.isclose(found[name], x, rel_tol=1e-4), name
    assert dpo.evaluate_pairs(model, [], dpo.Config()) == {}


def test_the_built_in_task_evaluates_on_all_held_out_prompts_and_own_pairs_on_theirs():
    tokenizer, cfg = make_tokenizer(), dpo.Config()
    pairs = [{"prompt": "a?"}, {"prompt": "a?"}, {"prompt": "b?"}, {"prompt": "c" * 30}]
    rows = dpo.held_out_prompts(pairs, "val", cfg, tokenizer, 48)
    assert [row["prompt"] for row in rows] == ["a?", "b?"]
    pairs = [{"prompt": "1+2+3=", "_two_digits": "06"}]
    for split, n in (("val", 500), ("test", 1000)):
        assert len(dpo.held_out_prompts(pairs, split, cfg, tokenizer, 64)) == n
