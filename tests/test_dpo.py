"""DPO's loss against closed forms, enumeration and finite differences.   python -m pytest tests/test_dpo.py"""
import gc
import itertools
import json
import math
import random
import shutil

import pytest
import torch

import dpo
import relatives
import sft
from conftest import gradients, naive_logp, tiny
from dpo import dpo_loss, stacked, summed_logp
from model import GPT, InputError, Optimizers, encode_answer, load, make_tokenizer, micro_batches, save

DEVICE = torch.device("cpu")


def four(P=7):
    """Log-probs of ragged sums, chosen and rejected, policy and reference."""
    torch.manual_seed(0)
    return [-torch.rand(P).double() * 30 for _ in range(4)]


# -------------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_equation_7_by_the_textbook_and_its_statistics_are_means_over_pairs(smoothing):
    w, l, rw, rl = four()
    loss, stats = dpo_loss(w, l, rw, rl, 0.3, smoothing)
    sigmoid, total = lambda x: 1 / (1 + math.exp(-x)), 0.0
    for a, b, c, d in zip(w.tolist(), l.tolist(), rw.tolist(), rl.tolist()):
        h = (a - c) - (b - d)
        total -= (1 - smoothing) * math.log(sigmoid(.3 * h)) + smoothing * math.log(sigmoid(-.3 * h))
    assert math.isclose(loss, total / 7, rel_tol=1e-12)
    expected = {"reward_w": .3 * (w - rw).mean(), "reward_l": .3 * (l - rl).mean(), "margin": .3 * (w - rw - l + rl).mean(),
                "pair_acc": ((w - rw) > (l - rl)).double().mean(), "logp_w": w.mean(), "logp_l": l.mean()}
    assert stats.keys() == expected.keys() and all(math.isclose(stats[k], x, rel_tol=1e-6) for k, x in expected.items())
    assert 0 < expected["pair_acc"] < 1


def test_at_the_start_the_loss_is_ln_2_and_no_pair_is_in_order():
    w, l, _, _ = four()
    w.requires_grad_(), l.requires_grad_()
    loss, stats = dpo_loss(w, l, w.detach(), l.detach(), 0.1)
    assert loss.item() == math.log(2) and stats["pair_acc"] == stats["margin"] == 0
    gw, gl = torch.autograd.grad(loss, (w, l))
    torch.testing.assert_close(gw, torch.full_like(gw, -0.1 / 2 / 7), rtol=1e-12, atol=0)
    assert torch.equal(gl, -gw)


def test_the_gradient_is_the_closed_form_of_the_docstring_through_a_model():
    """- β σ(-β h) [∇ log π(y_w) - ∇ log π(y_l)], each ∇ log π of one answer taken alone, padded nowhere."""
    model = tiny()
    reference = tiny(seed=1)
    pairs = [dict(tokens=([7, 8, 9, 3], [7, 8, 10, 11, 12, 4]), mask=([0, 0, 1, 1], [0, 0, 1, 1, 1, 1])),
             dict(tokens=([5, 6, 7, 8, 9, 3], [5, 6, 3]), mask=([0, 0, 1, 1, 1, 1], [0, 0, 1]))]
    beta, params = 0.4, list(model.parameters())
    expected = [torch.zeros_like(p) for p in params]
    for row in pairs:
        logp, ref = [], []
        for tokens, mask in zip(row["tokens"], row["mask"]):
            one, m = torch.tensor([tokens]), torch.tensor([mask])
            logp.append((naive_logp(model, one) * m).sum())
            ref.append((naive_logp(reference, one) * m).sum().item())
        h = (logp[0] - ref[0] - logp[1] + ref[1]).item()
        scale = -beta / (1 + math.exp(beta * h)) / len(pairs)
        for e, gw, gl in zip(expected, torch.autograd.grad(logp[0], params), torch.autograd.grad(logp[1], params)):
            e += scale * (gw - gl)
    tokens, mask = stacked(pairs)
    logp, _ = model.token_logp(tokens.flatten(0, 1), mask.flatten(0, 1))
    ref_w, ref_l = summed_logp(reference, pairs, dpo.Config(), DEVICE).double().T
    loss, _ = dpo_loss(*logp.sum(1).view(-1, 2).T, ref_w, ref_l, beta)
    for e, g in zip(expected, torch.autograd.grad(loss, params)):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", [lambda w, l, rw, rl: dpo_loss(w, l, rw, rl, 0.3)[0], lambda w, l, rw, rl: dpo_loss(w, l, rw, rl, 0.3, 0.1)[0],
                                  lambda w, l, rw, rl: relatives.ipo_loss(w, l, rw, rl, 0.3)[0]], ids=["dpo", "cdpo", "ipo"])
def test_finite_differences(loss):
    w, l, rw, rl = four()
    assert torch.autograd.gradcheck(lambda w, l: loss(w, l, rw, rl), (w.requires_grad_(), l.requires_grad_()))


def test_huge_margins_stay_finite_and_their_gradient_is_the_limit():
    w = torch.tensor([-1e4, 0.], requires_grad=True)
    loss, _ = dpo_loss(w, torch.tensor([0., -1e4]), torch.zeros(2), torch.zeros(2), 1.0)
    assert loss == 5000 and torch.equal(torch.autograd.grad(loss, w)[0], torch.tensor([-.5, 0.]))


def test_a_batch_in_pieces_has_the_gradient_of_the_whole():
    w, l, rw, rl = four()
    w.requires_grad_()
    whole, = torch.autograd.grad(dpo_loss(w, l, rw, rl, 0.3)[0], w)
    parts = sum(torch.autograd.grad(dpo_loss(w[i], l[i], rw[i], rl[i], 0.3, n=7)[0], w)[0] for i in torch.arange(7).split(3))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------------------------- the optimum


REWARD, REF = torch.tensor([1., .3, -.5, .9, -1.2]).double(), torch.tensor([.1, .4, .2, .05, .25]).double().log()


def trained(weights, beta, smoothing=0.0, steps=200, loss=dpo_loss):
    """Log-probs of five answers after minimising the loss over all ordered pairs of them, pair (i, j) weighing weights[i, j]."""
    z = REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=steps, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")
    w, l = zip(*itertools.permutations(range(5), 2))

    def closure():
        optimizer.zero_grad()
        logp = z.log_softmax(0)
        total = sum(weights[i, j] * loss(logp[[i]], logp[[j]], REF[[i]], REF[[j]], beta, smoothing)[0] for i, j in zip(w, l))
        total.backward()
        return total

    optimizer.step(closure)
    return z.detach().log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_over_all_pairs_by_their_bradley_terry_probabilities_is_the_rlhf_optimum(beta):
    """π_ref exp(r/β) / Z by enumeration (Eq. 4), and the implicit reward is r up to a constant, β log Z (Eq. 5)."""
    logp = trained((REWARD[:, None] - REWARD[None, :]).sigmoid(), beta)
    torch.testing.assert_close(logp, (REF + REWARD / beta).log_softmax(0), rtol=0, atol=1e-5)
    constant = REWARD - beta * (logp - REF)
    torch.testing.assert_close(constant, (beta * (REF + REWARD / beta).logsumexp(0)).expand(5), rtol=0, atol=1e-5)
    assert (logp - (REF - REWARD / beta).log_softmax(0)).abs().max() > .5                    # upside down it is another policy


def test_hard_labels_have_no_optimum_and_smoothed_ones_do():
    """If the better answer always wins, every margin grows for ever; with cDPO's ε it stops at σ(β h) = 1 - ε; IPO stops at h = 1/(2β)."""
    beta, chain = 0.5, torch.zeros(5, 5).double()
    chain[0, 1] = 1                                                       # one pair, labelled alike for ever
    h = lambda logp: ((logp - REF)[0] - (logp - REF)[1]).item()
    grown = [h(trained(chain, beta, steps=n)) for n in (3, 6, 12, 24)]
    assert all(b > a + 1 for a, b in zip(grown, grown[1:])) and grown[-1] > 20
    for smoothing in (0.1, 0.3):
        assert math.isclose(h(trained(chain, beta, smoothing)), math.log((1 - smoothing) / smoothing) / beta, rel_tol=1e-5)
    for beta in (0.1, 0.5, 2.0):
        assert math.isclose(h(trained(chain, beta, loss=relatives.ipo_loss)), 1 / (2 * beta), rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------------------- with a model under it


def pairs(n=9):
    rng, tokenizer, rows = random.Random(0), make_tokenizer("bytes"), []
    for i in range(n):
        row = {"prompt": "q" * rng.randint(1, 5), "chosen": "ab"[:rng.randint(1, 2)] * rng.randint(1, 4), "rejected": "c" * rng.randint(1, 6)}
        row["tokens"], row["mask"] = zip(*[encode_answer(tokenizer, row, row[which]) for which in ("chosen", "rejected")])
        rows.append(row)
    return rows


def test_log_probs_are_sums_over_answer_and_end_token_in_any_batch():
    """Against one answer at a time, by all logits; the prompt does not count, the end token does, nothing is divided by the length."""
    model, rows = tiny(vocab=257), pairs()
    expected = []
    for row in rows:
        for which in ("chosen", "rejected"):
            ids = list((row["prompt"] + row[which]).encode())
            logp = naive_logp(model, torch.tensor([ids + [256]]))[0]       # 256 ends a text
            expected.append(logp[len(row["prompt"]):].sum())
    expected = torch.stack(expected).view(-1, 2).detach()
    for budget in (1, 30, 10 ** 6):
        got = summed_logp(model, rows, dpo.Config(micro_tokens=budget), DEVICE)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert summed_logp(model, [], dpo.Config(), DEVICE).shape == (0, 2)


def test_pieces_of_any_size_leave_the_gradient_as_it_is():
    rows, grads = pairs(), []
    for budget in (10 ** 6, 1, 60):
        model = tiny(vocab=257)
        tokens, mask = stacked(rows)
        ref = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(1)).double()
        for j, t, at in micro_batches(mask, torch.arange(len(rows)), budget, DEVICE):
            logp, _ = model.token_logp(tokens[j, :, :t].flatten(0, 1), None, 1.0, at)
            dpo_loss(*logp.sum(1).view(-1, 2).T, *ref[j].T, 0.3, n=len(rows))[0].backward()
        grads.append(gradients(model))
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A tiny policy, and pairs of its own, three a prompt, in a file."""
    folder = tmp_path_factory.mktemp("dpo")
    model = tiny(vocab=257, stop=(256,), dtype=torch.float32)
    (folder / "init").mkdir()
    save(str(folder / "init"), model, make_tokenizer("bytes"))
    rows = [{"prompt": f"{i}?", "chosen": "ab" * (1 + (i + k) % 3), "rejected": f"{k}c" * (1 + i % 2)} for i in range(40) for k in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(own, out, **more):
    cfg = dpo.Config(**dict(init=str(own / "init"), data=str(own / "pairs.jsonl"), out=str(own / out), max_new=4, eval_every=100) | more)
    dpo.train(cfg)
    with open(own / out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def test_reference_log_probs_made_once_are_those_made_on_the_fly(own, monkeypatch):
    """A policy that never moves stays its own reference: in every batch of two shuffled epochs its log-probs are the stored ones, pair for
    pair; and no second model is kept."""
    seen, models, inner = [], [], dpo.dpo_loss
    alive = lambda: sum(type(x) is GPT for x in gc.get_objects())
    before = alive()

    def spy(w, l, rw, rl, *a):
        seen.append((w, l, rw, rl)), models.append(alive() - before)
        return inner(w, l, rw, rl, *a)

    monkeypatch.setattr(dpo, "dpo_loss", spy)
    rows = run(own, "still", lr=0.0, epochs=2, batch=16, nll=0.0)
    assert set(models) == {1} and rows[0]["val_pair_acc"] == rows[0]["val_margin"] == 0      # the start, to the last bit
    for w, l, rw, rl in seen:
        torch.testing.assert_close(w, rw, rtol=0, atol=1e-4), torch.testing.assert_close(l, rl, rtol=0, atol=1e-4)
    assert torch.cat([rw for _, _, rw, _ in seen]).std() > 1 and (torch.cat([rw - rl for _, _, rw, rl in seen]).abs() > 1).any()
    assert all(abs(row["loss"] - math.log(2)) < 1e-5 for row in rows[1:])


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_one_step_of_the_script_is_equation_7_and_sfts_loss_on_the_chosen(own, nll, monkeypatch):
    """All pairs in one batch, a plain gradient step of size 1: what the weights lose is the gradient of DPO + nll * SFT, computed here."""
    monkeypatch.setattr(dpo, "make_optimizer", lambda model, lr: Optimizers(torch.optim.SGD(model.parameters(), lr=1.0)))
    monkeypatch.setattr(dpo, "set_lr", lambda *a: 1.0)
    run(own, f"step{nll}", batch=1000, nll=nll, beta=0.5, grad_clip=1e9, smoothing=0.2)
    (model, tokenizer), (after, _) = load(str(own / "init")), load(str(own / f"step{nll}"))
    rows, _, _ = dpo.comparisons(dpo.Config(data=str(own / "pairs.jsonl")), tokenizer, 48)
    tokens, mask = stacked(rows)
    logp = naive_logp(model, tokens.flatten(0, 1)) * mask.flatten(0, 1)
    w, l = logp.sum(1).view(-1, 2).T
    h = 0.5 * (w - l - (w - l).detach())                                  # the reference is the policy, as it was
    loss = -(.8 * h.sigmoid().log() + .2 * (-h).sigmoid().log()).mean() + nll * sft.sft_loss(logp[::2], mask[:, 0])[0]
    for p, q, g in zip(model.parameters(), after.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(p - q, g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6)


def test_a_resumed_run_keeps_its_reference_and_refuses_other_pairs(own, tmp_path):
    """The stored log-probs are those of the first start, even where --init has changed since; pairs that came or went are told."""
    copy = tmp_path / "copy"
    shutil.copytree(own, copy)
    whole = run(copy, "whole", batch=20, eval_every=2)
    run(copy, "cut", batch=20, eval_every=2)
    state = torch.load(copy / "cut/ckpt.pt", weights_only=True)
    model, tokenizer = load(str(copy / "init"))
    with torch.no_grad():
        model.embedding.weight += 0.1
    save(str(copy / "init"), model, tokenizer)
    again = run(copy, "cut", batch=20, eval_every=2, epochs=2, resume=True)
    assert [row["loss"] for row in again[1:len(whole)]] == [row["loss"] for row in whole[1:]] and len(again) > len(whole)
    kept = torch.load(copy / "cut/ckpt.pt", weights_only=True)["more"]["ref"]
    assert all(map(torch.equal, kept, state["more"]["ref"]))
    (copy / "pairs.jsonl").write_text((copy / "pairs.jsonl").read_text() + '{"prompt": "new", "chosen": "a", "rejected": "b"}\n')
    files = {f: (copy / "cut" / f).read_bytes() for f in ("config.json", "metrics.jsonl", "ckpt.pt")}
    with pytest.raises(InputError, match="began with other pairs than .*pairs.jsonl has now"):
        run(copy, "cut", batch=20, eval_every=2, epochs=3, resume=True)
    assert files == {f: (copy / "cut" / f).read_bytes() for f in files}  # and nothing is lost by the refusal


def test_no_prompt_is_in_two_parts_and_pairs_that_do_not_fit_are_dropped(own, capsys):
    tokenizer = make_tokenizer("bytes")
    parts = dpo.comparisons(dpo.Config(data=str(own / "pairs.jsonl")), tokenizer, 48)
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert sum(map(len, parts)) == 120 and not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    for row in parts[0] + parts[1] + parts[2]:
        for which, tokens, mask in zip(("chosen", "rejected"), row["tokens"], row["mask"]):  # in this order
            assert tokens == [*(row["prompt"] + row[which]).encode(), 256] and mask == [0] * len(row["prompt"]) + [1] * (len(row[which]) + 1)
    parts = dpo.comparisons(dpo.Config(data=str(own / "pairs.jsonl")), tokenizer, 8)
    assert 0 < sum(map(len, parts)) < 120 and "longer than the context of 8 tokens" in capsys.readouterr().out


def test_what_is_said_of_held_out_pairs_and_how_sure_it_is(own):
    """Against loops, with references that make some pairs wrong; the pairs of one prompt count as one observation for the interval."""
    model, tokenizer = load(str(own / "init"))
    pairs = dpo.comparisons(dpo.Config(data=str(own / "pairs.jsonl")), tokenizer, 48)[0]
    logp = summed_logp(model, pairs, dpo.Config(), DEVICE)
    torch.manual_seed(0)
    for row, both in zip(pairs, (logp + torch.randn_like(logp)).tolist()):
        row["ref"] = both
    found, _ = dpo.held_out(model, tokenizer, [], pairs, dpo.Config(beta=0.5), DEVICE)
    h = [a - row["ref"][0] - b + row["ref"][1] for row, (a, b) in zip(pairs, logp.tolist())]
    acc, off = sum(x > 0 for x in h) / len(h), {}
    for row, x in zip(pairs, h):
        off[row["prompt"]] = off.get(row["prompt"], 0.0) + (x > 0) - acc
    assert 0 < acc < 1 and len(off) < len(h)
    expected = {"pair_acc": acc, "±": 1.96 * math.sqrt(sum(x * x for x in off.values())) / len(h), "margin": .5 * sum(h) / len(h),
                "pair_loss": sum(math.log(1 + math.exp(-.5 * x)) for x in h) / len(h), "logp_w": logp[:, 0].mean().item()}
    assert all(math.isclose(found[name], x, rel_tol=1e-4) for name, x in expected.items())
    assert "±" not in dpo.held_out(model, tokenizer, [], [], dpo.Config(), DEVICE)[0]


def test_built_in_pairs_are_tried_on_every_held_out_prompt_and_own_pairs_on_theirs():
    tokenizer = make_tokenizer("bytes")
    own = [{"prompt": "a?"}, {"prompt": "a?"}, {"prompt": "b?"}, {"prompt": "c" * 30}]
    assert [row["prompt"] for row in dpo.questions(own, "val", dpo.Config(), tokenizer, 48)] == ["a?", "b?"]
    builtin = [{"prompt": "1+2+3=", "two_digits": "06"}]
    assert [len(dpo.questions(builtin, which, dpo.Config(), tokenizer, 64)) for which in ("val", "test")] == [500, 1000]
