"""The loss on demonstrations that a run is not trained on.
python -m pytest tests/test_retained.py"""
import json
import math

import pytest
import torch

import grpo
import sft
from common import InputError, load
from common.data import load_retained, split_of
from common.evaluate import evaluate, mean_nll
from conftest import metrics, naive_logp, quick

WITH_POLICY = ["sft.py", "ppo.py", "dpo.py", "grpo.py", "dapo.py"]


def nll_by_hand(policy, tokenizer, rows):
    """Nats per response token, a row at a time, from all logits."""
    total = count = 0
    for row in rows:
        ids = tokenizer.encode(row["prompt"])
        response = tokenizer.encode(row["response"]) + [tokenizer.end]
        logp = naive_logp(policy, torch.tensor([ids + response]))[0, len(ids):]
        total -= logp.sum().item()
        count += len(response)
    return total / count


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_default_demonstrations_are_the_held_out_ones_of_sft(adder):
    policy, tokenizer = load(str(adder / "out/sft"))
    cfg = grpo.Config(init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"))
    rows = load_retained(cfg, tokenizer, policy.cfg.block_size)
    held_out = read(adder / "out/sft/demonstrations.jsonl")
    assert len(rows) == len(held_out) > 10
    found = mean_nll(policy, rows)
    assert math.isclose(found, nll_by_hand(policy, tokenizer, held_out), rel_tol=1e-5)
    assert math.isclose(mean_nll(policy, rows, 16), found, rel_tol=1e-5)     # in pieces


def test_a_file_takes_their_place_and_no_file_is_no_metric(adder, tmp_path):
    policy, tokenizer = load(str(adder / "out/sft"))
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "9+9=", "response": "18"}\n{"prompt": "1+1=", "response": " "}\n')
    cfg = grpo.Config(init=str(adder / "out/sft"), retain=str(path))
    rows = load_retained(cfg, tokenizer, policy.cfg.block_size)
    assert [row["response"] for row in rows] == ["18"]          # the empty one is dropped
    assert load_retained(sft.Config(), tokenizer, 64) == []     # from scratch
    assert load_retained(grpo.Config(init=str(tmp_path)), tokenizer, 64) == []
    with pytest.raises(InputError, match="nowhere.jsonl"):
        load_retained(grpo.Config(retain="nowhere.jsonl"), tokenizer, 64)
    found, texts = evaluate(policy, tokenizer, [], grpo.score, cfg, retained=rows)
    assert found.keys() == {"retained_loss"} and texts == []  # also without held-out prompts


@pytest.mark.parametrize("name", WITH_POLICY)
def test_every_script_with_a_policy_reports_it(name, adder, reward_model, run, tmp_path, capsys):
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "9+9=", "response": "18"}\n')
    flags = quick(name, adder, reward_model)
    assert run(name, *flags, "--retain", path, "--out", tmp_path / "out") is None
    last = metrics(tmp_path / "out")[-1]
    policy, tokenizer = load(str(tmp_path / "out"))
    expected = nll_by_hand(policy, tokenizer, read(path))
    assert math.isclose(last["val_retained_loss"], expected, rel_tol=1e-4)
    assert "    retained_loss " in capsys.readouterr().out      # before -> after


def test_it_changes_nothing_in_a_run(adder, run, tmp_path):
    flags = quick("grpo.py", adder)
    (tmp_path / "other.jsonl").write_text('{"prompt": "9+9=", "response": "18"}\n')
    found = []
    for out, more in (("a", []), ("b", ["--retain", tmp_path / "other.jsonl"])):
        assert run("grpo.py", *flags, *more, "--out", tmp_path / out) is None
        rows = metrics(tmp_path / out)
        found.append([{k: x for k, x in row.items() if k != "val_retained_loss"} for row in rows])
    assert found[0] == found[1]


def test_only_held_out_rows_are_left_for_later_runs(adder, run, tmp_path):
    """A file whose rows are all trained on leaves no demonstrations: their loss would not be that
    of other text."""
    rows = read(adder / "rows.jsonl")
    rows = [row for row in rows if split_of(row["prompt"]) == "train"][:30]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--n_layer", 1, "--n_embd", 16, "--n_head", 2, "--steps", 2, "--batch", 8,
             "--max_new_tokens", 6, "--data", tmp_path / "train.jsonl", "--out", tmp_path / "out"]
    assert run("sft.py", *flags) is None
    assert not (tmp_path / "out/demonstrations.jsonl").exists()
