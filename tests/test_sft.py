"""SFT's loss and its demonstrations.   python -m pytest tests/test_sft.py"""
import json
import random

import pytest
import torch

import sft
from common import InputError, load
from common.checkpoint import save_checkpoint
from common.data import load_demonstrations, running_sums, split_of, tokenize_demonstration
from common.optimizers import Optimizers
from common.tokenizer import make_tokenizer
from common.train import micro_batches, pad_batch
from conftest import gradients, naive_logp, tiny

DEVICE = torch.device("cpu")


def ragged():
    """tokens, mask (8, 14) of sequences of 4 to 14 tokens with prompts of 3."""
    torch.manual_seed(0)
    rows = [torch.randint(0, 23, (n,)).tolist() for n in (4, 11, 7, 5, 14, 6, 9, 12)]
    return pad_batch(rows, [[0] * 3 + [1] * (len(row) - 3) for row in rows])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_token_mean_of_equation_1():
    logp = torch.tensor([[0., -1., -2., -9.], [0., -4., 7., 7.]])
    mask = torch.tensor([[0., 1., 1., 0.], [0., 1., 0., 0.]])
    loss, stats = sft.sft_loss(logp, mask)
    assert torch.isclose(loss, torch.tensor(7 / 3))        # (1 + 2 + 4) / 3, no mean of means
    assert torch.isclose(stats["nll"], torch.tensor(7 / 3))
    assert torch.isclose(stats["nll_response"], torch.tensor(2.75))       # (1.5 + 4) / 2


def test_micro_batches_of_any_size_leave_the_gradient_as_it_is():
    """A common bug: the mean of the means of micro-batches is not the mean of the batch. One
    batch of 8 = 8 of 1 = by budget."""
    tokens, mask = ragged()
    n = int(mask.sum())
    found = []
    for budget in (10 ** 6, 1, 30):
        model = tiny()
        for rows, width, index in micro_batches(mask, torch.arange(8), budget, DEVICE):
            logp, _ = model.token_logp(tokens[rows, :width], index=index)
            loss, _ = sft.sft_loss(logp, mask[rows, :width], n)
            loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        for name, g in found[0].items():
            torch.testing.assert_close(other[name], g, rtol=0, atol=1e-12)


def test_the_loss_trains_the_response_and_its_end_token_and_nothing_else():
    row = tokenize_demonstration({"prompt": "1+2+3=", "response": "#06"}, make_tokenizer())
    assert row["tokens"] == [*b"1+2+3=#06", 256]
    assert row["mask"] == [0] * 6 + [1] * 4
    assert row["ids"] == row["tokens"][:6]
    tokens, mask = pad_batch([row["tokens"], row["tokens"] + [9, 9]],
                             [row["mask"], row["mask"] + [0, 0]])
    logp = torch.randn(tokens.shape).requires_grad_()
    loss, _ = sft.sft_loss(logp, mask)
    loss.backward()
    assert torch.equal(logp.grad != 0, mask > 0)


def test_garbage_outside_the_mask_changes_nothing_and_inputs_stay_as_they_are():
    _, mask = ragged()
    clean = torch.randn(mask.shape)
    garbage = torch.tensor([float("nan"), float("inf")] * 7)
    dirty = torch.where(mask > 0, clean, garbage).requires_grad_()
    dirty_before = dirty.detach().clone()
    mask_before = mask.clone()
    loss, stats = sft.sft_loss(dirty, mask)
    loss.backward()
    assert (loss, stats) == sft.sft_loss(clean, mask)
    assert dirty.grad.isfinite().all()
    assert torch.equal(dirty.detach().nan_to_num(), dirty_before.nan_to_num())
    assert torch.equal(mask, mask_before)
    loss, stats = sft.sft_loss(clean, torch.zeros_like(mask))      # an empty mask: 0, no NaN
    assert loss == 0 and all(x == 0 for x in stats.values())


# ---------------------------------------------------------------------------------- demonstrations


def test_demonstrators_get_lazier_with_length_and_56_percent_are_right():
    rng = random.Random(0)
    right = 0
    careful = {3: [], 4: [], 5: [], 6: []}
    for row in running_sums(20_000, "train", 1):
        text = sft.demonstrate(row["prompt"], rng)
        right += sft.score(row, text)
        careful[row["prompt"].count("+") + 1].append("," in text)
        assert len(text) + 1 <= 18
    assert abs(right / 20_000 - .56) < .015
    for n_terms, p in sft.CAREFUL.items():
        assert abs(sum(careful[n_terms]) / len(careful[n_terms]) - p) < .03


def test_a_slip_forgets_the_ten_and_the_error_stays(monkeypatch):
    monkeypatch.setattr(sft, "SLIP", 1.0)
    monkeypatch.setattr(sft, "CAREFUL", {3: 1.0})
    assert sft.demonstrate("5+8+7=", random.Random(0)) == "03,00#00"      # 5+8 -> 3, 3+7 -> 0
    monkeypatch.setattr(sft, "SLIP", 0.0)
    assert sft.demonstrate("5+8+7=", random.Random(0)) == "13,20#20"
    monkeypatch.setattr(sft, "CAREFUL", {3: 0.0})
    for prompt, rounded in (("5+8+8=", "#20"), ("5+8+5=", "#20"), ("1+1+1=", "#05")):
        assert sft.demonstrate(prompt, random.Random(0)) == rounded


def test_held_out_prompts_are_fixed_and_distinct_and_never_trained_on():
    test = running_sums(1000, "test")
    val = running_sums(500, "val")
    train = running_sums(5000, "train", 3)
    prompts = [{row["prompt"] for row in rows} for rows in (test, val, train)]
    assert len(prompts[0]) == 1000 and len(prompts[1]) == 500
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert test[:3] == running_sums(1000, "test")[:3]
    # the same in every process and version
    assert [row["prompt"] for row in test[:2]] == ["7+3+5+8=", "4+6+1+6="]
    for row in test:
        terms = row["prompt"][:-1].split("+")
        assert int(row["_two_digits"]) == sum(map(int, terms))
    assert split_of("1+2+3=") == "val"
    held_out = sum(split_of(str(i)) != "train" for i in range(5000))
    assert 0.08 < held_out / 5000 < 0.12


def test_long_examples_are_dropped_and_counted_and_never_cut(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"prompt": f"question {i}", "response": "x" * (10 if i % 4 else 60)}
                       for i in range(200)])
    cfg, tokenizer = sft.Config(data=str(path)), make_tokenizer()
    splits = load_demonstrations(cfg, tokenizer, 48, [])
    said = capsys.readouterr().out
    assert "dropped 50 of 200 rows" in said and "--block_size" in said and f"{path}:1" in said
    assert sum(len(rows) for rows in splits) == 150
    for rows in splits:
        assert all(row["tokens"][-1] == 256 for row in rows)
    with pytest.raises(InputError, match="--block_size"):
        load_demonstrations(cfg, tokenizer, 12, [])


def test_messages_train_the_assistant_only_and_generation_starts_at_its_header():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    row = tokenize_demonstration({"messages": messages}, tokenizer)
    header = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["ids"]) == header
    assert row["tokens"][:len(row["ids"])] == row["ids"]
    trained = [i for i, m in zip(row["tokens"], row["mask"]) if m]
    assert tokenizer.decode(trained) == "yo<|im_end|>"


# ------------------------------------------------------------------------------------- the script


START, END = 257, 258                                      # <|im_start|>, <|im_end|>


def plain_row(i):
    return {"prompt": f"{i}?", "response": "ab" * (1 + i % 7)}


def encode_plain(row):
    """A prompt and its response by hand: tokens, mask."""
    prompt, response = list(row["prompt"].encode()), list(row["response"].encode())
    return prompt + response + [256], [0] * len(prompt) + [1] * (len(response) + 1)


def two_turns(i):
    return {"messages": [{"role": "user", "content": f"{i}?"},
                         {"role": "assistant", "content": "ab" * (1 + i % 3)},
                         {"role": "user", "content": "and?"},
                         {"role": "assistant", "content": "c" * (1 + i % 4)}]}


def encode_two_turns(row):
    """ChatML by hand: both assistant turns are trained, each with the token that ends it."""
    tokens, mask = [], []
    for i, message in enumerate(row["messages"]):
        break_before = b"\n" if i else b""
        header = [*break_before, START, *f"{message['role']}\n".encode()]
        text = [*message["content"].encode(), END]
        tokens += header + text
        mask += [0] * len(header) + [int(message["role"] == "assistant")] * len(text)
    return tokens, mask


@pytest.mark.parametrize("budget", [10 ** 6, 30])
@pytest.mark.parametrize("make, encode", [(plain_row, encode_plain), (two_turns, encode_two_turns)],
                         ids=["prompts", "two turns"])
def test_one_step_of_the_script_is_equation_1_whatever_the_micro_batches(
        make, encode, budget, tmp_path, monkeypatch):
    """All rows in one batch, a plain gradient step of size 1: what the weights lose is the gradient
    of the token mean, over every assistant turn and its end token, computed here."""
    def sgd(model, *_):
        return Optimizers(torch.optim.SGD(model.parameters(), lr=1.0))

    init, data = tmp_path / "init", tmp_path / "rows.jsonl"
    init.mkdir()
    before = tiny(vocab_size=259, block_size=96, dtype=torch.float32)
    save_checkpoint(init, before, make_tokenizer())
    write_lines(data, [make(i) for i in range(40)])
    monkeypatch.setattr(sft, "make_optimizer", sgd)
    monkeypatch.setattr(sft, "set_lr", lambda *_: 1.0)
    monkeypatch.setattr(sft.Run, "plot", lambda *_: None)
    cfg = sft.Config(init=str(init), data=str(data), out=str(tmp_path / "out"), max_new_tokens=4,
                     steps=1, micro_batch_tokens=budget, grad_clip=1e9)
    rows, _, _ = load_demonstrations(cfg, make_tokenizer(), 96, [])
    cfg.batch = len(rows)
    sft.train(cfg)
    tokens, mask = pad_batch(*zip(*[encode(row) for row in rows]))
    loss = -(naive_logp(before, tokens) * mask).sum() / mask.sum()
    expected = torch.autograd.grad(loss, list(before.parameters()))
    after, _ = load(str(tmp_path / "out"))
    for p, q, g in zip(before.parameters(), after.parameters(), expected):
        torch.testing.assert_close(p - q, g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6)
