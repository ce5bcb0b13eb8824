"""SFT's loss and its demonstrations.   python -m pytest tests/test_sft.py"""
import json
import random

import pytest
import torch

import sft
from conftest import gradients, naive_logp, tiny
from model import InputError, Optimizers, load, make_tokenizer, micro_batches, pad_batch, part, save, sums

DEVICE = torch.device("cpu")


def ragged():
    torch.manual_seed(0)
    rows = [torch.randint(0, 23, (n,)).tolist() for n in (4, 11, 7, 5, 14, 6, 9, 12)]
    return pad_batch(rows, [[0] * 3 + [1] * (len(r) - 3) for r in rows])


def test_loss_is_the_token_mean_of_equation_1():
    logp, mask = torch.tensor([[0., -1., -2., -9.], [0., -4., 7., 7.]]), torch.tensor([[0., 1., 1., 0.], [0., 1., 0., 0.]])
    loss, stats = sft.sft_loss(logp, mask)
    assert torch.isclose(loss, torch.tensor(7 / 3))                       # (1 + 2 + 4) / 3; a mean of means would be (1.5 + 4) / 2
    assert torch.isclose(stats["nll"], torch.tensor(7 / 3)) and torch.isclose(stats["nll_answer"], torch.tensor(2.75))


def test_accumulation_changes_no_gradient():
    """ALGORITHMS 0.6, the known bug: the mean over micro-batches of their means is not the mean. One batch of 8 = 8 of 1 = by budget."""
    tokens, mask = ragged()
    n, found = int(mask.sum()), []
    for budget in (10 ** 6, 1, 30):
        model = tiny()
        for j, t, at in micro_batches(mask, torch.arange(8), budget, DEVICE):
            logp, _ = model.token_logp(tokens[j, :t], at=at)
            sft.sft_loss(logp, mask[j, :t], n)[0].backward()
        found.append(gradients(model))
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


def test_the_loss_trains_the_response_and_its_end_token_and_nothing_else():
    """d loss / d logits is 0 in every row but those that predict a token under the mask, the end token included."""
    row = sft.prepare({"prompt": "1+2+3=", "response": "#06"}, make_tokenizer())
    assert row["tokens"][-1] == 256 and row["mask"] == [0] * 6 + [1] * 4 and row["ids"] == row["tokens"][:6]
    tokens, mask = pad_batch([row["tokens"], row["tokens"] + [9, 9]], [row["mask"], row["mask"] + [0, 0]])
    logp = torch.randn(tokens.shape).requires_grad_()
    sft.sft_loss(logp, mask)[0].backward()
    assert torch.equal(logp.grad != 0, mask > 0)


def test_garbage_outside_the_mask_changes_nothing_and_inputs_stay():
    tokens, mask = ragged()
    clean = torch.randn(mask.shape)
    dirty = torch.where(mask > 0, clean, torch.tensor([float("nan"), float("inf")] * 7)).requires_grad_()
    copy, m = dirty.detach().clone(), mask.clone()
    (loss, stats), (expected, stats0) = sft.sft_loss(dirty, mask), sft.sft_loss(clean, mask)
    loss.backward()
    assert loss == expected and stats == stats0 and dirty.grad.isfinite().all()
    assert torch.equal(dirty.detach().nan_to_num(), copy.nan_to_num()) and torch.equal(mask, m)
    loss, stats = sft.sft_loss(clean, torch.zeros_like(mask))
    assert loss == 0 and all(x == 0 for x in stats.values())


def test_demonstrators_get_lazier_and_56_percent_are_right():
    rng, rows = random.Random(0), sums(20_000, "train", 1)
    right = 0
    by_length = {3: [], 4: [], 5: [], 6: []}
    for row in rows:
        text = sft.demonstrate(row["prompt"], rng)
        right += sft.score(row, text)
        by_length[row["prompt"].count("+") + 1].append("," in text)
        assert len(text) + 1 <= 18
    assert abs(right / 20_000 - .56) < .015
    for k, p in sft.CAREFUL.items():
        assert abs(sum(by_length[k]) / len(by_length[k]) - p) < .03


def test_a_slip_forgets_the_ten_and_runs_on(monkeypatch):
    monkeypatch.setattr(sft, "SLIP", 1.0)
    monkeypatch.setattr(sft, "CAREFUL", {3: 1.0})
    assert sft.demonstrate("5+8+7=", random.Random(0)) == "03,00#00"      # 5+8 -> 3, 3+7 -> 0
    monkeypatch.setattr(sft, "SLIP", 0.0)
    assert sft.demonstrate("5+8+7=", random.Random(0)) == "13,20#20"
    monkeypatch.setattr(sft, "CAREFUL", {3: 0.0})
    assert [sft.demonstrate(p, random.Random(0)) for p in ("5+8+8=", "5+8+5=", "1+1+1=")] == ["#20", "#20", "#05"]


def test_held_out_prompts_are_fixed_distinct_and_never_trained_on():
    test, val, train = sums(1000, "test"), sums(500, "val"), sums(5000, "train", 3)
    prompts = [{row["prompt"] for row in rows} for rows in (test, val, train)]
    assert len(prompts[0]) == 1000 and len(prompts[1]) == 500
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert test[:3] == sums(1000, "test")[:3] and [row["prompt"] for row in test[:2]] == FIRST_TEST_PROMPTS
    assert all(int(row["two_digits"]) == sum(map(int, row["prompt"][:-1].split("+"))) for row in test)
    assert part("1+2+3=") == "val" and 0.08 < sum(part(str(i)) != "train" for i in range(5000)) / 5000 < 0.12


FIRST_TEST_PROMPTS = ["7+3+5+8=", "4+6+1+6="]                         # the same in every process and version


def test_long_examples_are_dropped_and_counted_never_cut(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {i}", "response": "x" * (10 if i % 4 else 60)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = sft.demonstrations(sft.Config(data=str(path)), make_tokenizer(), 48)
    assert f"dropped 50 of 200 rows: longer than the context of 48 tokens (--context); the first is {path}:1" in capsys.readouterr().out
    assert sum(map(len, split)) == 150 and all(row["tokens"][-1] == 256 for rows in split for row in rows)
    with pytest.raises(InputError, match="no row is left"):
        sft.demonstrations(sft.Config(data=str(path)), make_tokenizer(), 12)


def test_messages_train_the_assistant_only_and_generation_starts_at_its_header():
    tok = make_tokenizer()
    row = sft.prepare({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, tok)
    assert tok.decode(row["ids"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert row["tokens"][:len(row["ids"])] == row["ids"]
    assert tok.decode([i for i, m in zip(row["tokens"], row["mask"]) if m]) == "yo<|im_end|>"


@pytest.mark.parametrize("budget", [10 ** 6, 30])
def test_one_step_of_the_script_is_equation_1_whatever_the_pieces(budget, tmp_path, monkeypatch):
    """All rows in one batch, a plain gradient step of size 1: what the weights lose is the gradient of the token mean, computed here."""
    (tmp_path / "init").mkdir()
    save(str(tmp_path / "init"), tiny(vocab=257, dtype=torch.float32), make_tokenizer())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?", "response": "ab" * (1 + i % 7)}) + "\n" for i in range(40)))
    monkeypatch.setattr(sft, "make_optimizer", lambda model, *a: Optimizers(torch.optim.SGD(model.parameters(), lr=1.0)))
    monkeypatch.setattr(sft, "set_lr", lambda *a: 1.0)
    monkeypatch.setattr(sft.Folder, "plot", lambda *names: None)
    (model, tokenizer), cfg = load(str(tmp_path / "init")), sft.Config(data=str(tmp_path / "rows.jsonl"), max_new=4)
    rows, _, _ = sft.demonstrations(cfg, tokenizer, 48)
    sft.train(sft.Config(init=str(tmp_path / "init"), data=cfg.data, out=str(tmp_path / "out"), steps=1, batch=len(rows), micro_tokens=budget,
                         max_new=4, grad_clip=1e9))
    tokens, mask = pad_batch([row["tokens"] for row in rows], [row["mask"] for row in rows])
    loss = -(naive_logp(model, tokens) * mask).sum() / mask.sum()
    after, _ = load(str(tmp_path / "out"))
    for p, q, g in zip(model.parameters(), after.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(p - q, g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6)
