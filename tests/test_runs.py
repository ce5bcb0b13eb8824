"""The scripts as a user runs them: they learn, repeat themselves, resume, and explain their flags.
python -m pytest tests/test_runs.py"""
import dataclasses
import importlib
import inspect
import json
import math
import os
import re
import shutil

import pytest
import torch

import common.run
import grpo
import ppo
import reward
from common import load
from common.checkpoint import read_checkpoint, save_checkpoint
from common.data import read_rows, split_of, split_rows
from common.flags import parse_config
from common.preferences import read_preferences
from common.tokenizer import encode_response
from common.train import compute_values, pad_batch
from conftest import (PPO, QUICK, SCRIPTS, SHORT, SMALL, bf16_devices, metrics, quick,
                      run_whole_and_cut, script)
from model import GPT


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    if "curves" not in request.node.name:                  # they cost more than a quick run
        monkeypatch.setattr(common.run.Run, "plot", lambda *_: None)


def module_of(name):
    return importlib.import_module(name.removesuffix(".py"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def before_after(log, name):
    """Two numbers of the table that ends a run."""
    lines = [line.split() for line in log.splitlines() if "->" in line]
    row = [line for line in lines if line[0] == name][-1]
    return float(row[1]), float(row[3])


# ------------------------------------------------------------------------------------ default runs


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder of default runs: grpo.py by way of sft.py, dpo.py by way of reward.py's comparisons,
    ppo.py by way of the reward model, and a shorter dapo.py. What each printed is in a file of its
    name."""
    home = tmp_path_factory.mktemp("home")
    for name, *more in (("grpo.py",), ("dpo.py",), ("ppo.py",), ("dapo.py", "--steps", 20)):
        done = script(name, *more, cwd=home)
        assert done.returncode == 0, done.stderr
        (home / name).write_text(done.stdout)
    return home


@pytest.mark.slow
def test_one_command_trains_sft_then_grpo_and_improves_held_out_accuracy(home):
    """With room: SFT .4 to .65 greedy and .45 or more at T=1; GRPO .93 greedy, .85 at T=1, and
    longer responses (README has the figures)."""
    log = (home / "grpo.py").read_text()
    assert "running sft.py first" in log
    greedy, greedy_after = before_after(log, "greedy")
    accuracy, accuracy_after = before_after(log, "accuracy")
    length, length_after = before_after(log, "length")
    assert .4 < greedy < .65 and accuracy > .45 and before_after(log, "pass@8")[0] > .90
    assert greedy_after > .93 and accuracy_after > .85 and length_after > length + 2
    rows = metrics(home / "out/grpo")
    assert [row["step"] for row in rows] == list(range(51))
    assert all(row["sampler_logp_error"] < 1e-5 for row in rows[1:])
    files = {"config.json", "metrics.jsonl", "ckpt.pt", "samples.txt"}
    assert files <= set(os.listdir(home / "out/grpo"))


@pytest.mark.slow
def test_one_command_collects_comparisons_then_trains_dpo(home):
    """With room: greedy .93, T=1 .75, longer responses; held-out pairs from 0 in order at the start
    to .9, rejected responses far less likely."""
    log = (home / "dpo.py").read_text()
    assert "running reward.py first" in log and "running sft.py" not in log
    greedy, greedy_after = before_after(log, "greedy")
    _, accuracy_after = before_after(log, "accuracy")
    length, length_after = before_after(log, "length")
    pair_acc, pair_acc_after = before_after(log, "pair_acc")
    assert greedy < .65 and greedy_after > .93 and accuracy_after > .75
    assert length_after > length + 2 and pair_acc == 0 and pair_acc_after > .9
    rows = metrics(home / "out/dpo")
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > 100
    assert abs(rows[1]["loss"] - math.log(2)) < 1e-4 and rows[-1]["loss"] < .6
    assert rows[-1]["val_logp_l"] < rows[0]["val_logp_l"] - 3
    assert rows[-1]["val_logp_w"] > rows[0]["val_logp_w"] - 1


@pytest.mark.slow
def test_dapo_learns_and_counts_what_it_samples(home):
    """Twenty rollouts, with room: greedy .9; more is sampled than is learned from, and counted."""
    log = (home / "dapo.py").read_text()
    _, greedy_after = before_after(log, "greedy")
    accuracy, accuracy_after = before_after(log, "accuracy")
    length, length_after = before_after(log, "length")
    assert greedy_after > .9 and accuracy_after > accuracy + .2 and length_after > length + 2
    rows = metrics(home / "out/dapo")[1:]
    assert any(row["generations"] > 1 for row in rows)
    for row in rows:
        assert row["sampler_logp_error"] < 1e-5 and "kl" not in row
        assert row["tokens"] >= 256 * row["length"] - 1 and 0 <= row["frac_zero_std"] < 1


@pytest.mark.slow
def test_one_command_trains_a_reward_model_then_ppo_and_improves_accuracy_by_the_rule(home):
    """With room: pair accuracy .93 and well above "the longer response is better"; PPO .93 greedy
    and .85 at T=1 by the rule, which only reports."""
    log = (home / "ppo.py").read_text()
    assert "running reward.py first" in log and "kept as out/reward.1" in log
    pairs, log = log.split("\nppo: ")
    _, acc = before_after(pairs, "acc")
    _, acc_longer = before_after(pairs, "acc_longer")
    assert acc > .93 and acc > acc_longer + .05
    assert before_after(pairs, "ece")[1] < .06 and before_after(pairs, "acc_same_style")[1] > .85
    greedy, greedy_after = before_after(log, "greedy")
    _, accuracy_after = before_after(log, "accuracy")
    score, score_after = before_after(log, "score")
    assert greedy < .65 and greedy_after > .93 and accuracy_after > .85 and score_after > score + 1
    rows = metrics(home / "out/ppo")
    assert [row["step"] for row in rows] == list(range(41))
    assert abs(rows[1]["kl"]) < 1e-6 < rows[-1]["kl"]
    assert rows[-1]["explained_var"] > .2 > rows[1]["explained_var"]
    for row in rows[1:]:
        assert row["sampler_logp_error"] < 1e-5
        assert 0 <= row["clip_low"] < .1 and 0 <= row["clip_high"] < .1
    # several updates per rollout: the clip has work to do
    assert any(row["clip_high"] > 0 for row in rows[1:])


@pytest.mark.slow
def test_a_default_reward_model_is_centred_on_demonstrations_and_keeps_its_pairs(home):
    model, tokenizer = load(str(home / "out/reward"))
    rows = read_rows(str(home / "out/sft/demonstrations.jsonl"), "prompt", "response")
    encoded = [encode_response(tokenizer, row, row["response"]) for row in rows]
    tokens, mask = pad_batch(*zip(*encoded))
    _, scores = compute_values(model, tokens, mask)
    assert abs(scores.mean()) < 1e-3 and scores.std() > .5
    pairs = read_preferences(str(home / "out/reward/preferences.jsonl"))
    assert len(pairs) > 5000
    for pair in pairs:
        assert grpo.score(pair, pair["chosen"]) > grpo.score(pair, pair["rejected"])
    assert {split_of(pair["prompt"]) for pair in pairs} == {"train", "val", "test"}


@pytest.mark.slow
def test_no_prompt_of_the_preferences_is_in_two_splits(home):
    """Train, validation and test prompts, of collected pairs and of those that are read."""
    policy, tokenizer = load(str(home / "out/sft"))
    out = str(home / "out/reward")
    collected = reward.Config(prompts=40, responses=2, out=out, resume=True)
    for cfg in (collected, reward.Config(data=f"{out}/preferences.jsonl")):
        splits, _ = reward.load_preferences(cfg, policy, tokenizer)
        for rows, name in zip(splits, ("train", "val", "test")):
            assert {split_of(pair["prompt"]) for pair in rows} == {name}


# ---------------------------------------------------------------- the same run again, and resumed


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_seed_gives_the_same_metrics_again_and_another_seed_does_not(
        name, adder, reward_model, run):
    args = quick(name, adder, reward_model)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(name, *args, "--out", out, "--seed", seed) is None
    a, b, c = map(metrics, "abc")
    assert a == b and a != c and a[-1]["step"] > 2


@pytest.mark.parametrize("name, more", [
    ("sft.py", ""),
    ("reward.py", ""),
    ("ppo.py", ""),
    ("ppo.py", "--reward REWARD_MODEL"),
    ("grpo.py", ""),
    ("grpo.py", "--ref_every 2 --epochs 2"),
    ("grpo.py", "--reward REWARD_MODEL"),
    ("dpo.py", ""),
    ("dapo.py", ""),
    ("dapo.py", "--reward REWARD_MODEL --max_generations 2"),
])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
        name, more, adder, reward_model, run, monkeypatch):
    args = quick(name, adder, reward_model)
    args += [reward_model if x == "REWARD_MODEL" else x for x in more.split()]
    run_whole_and_cut(run, name, args, monkeypatch)
    cut, whole = read_checkpoint("cut")["model"], read_checkpoint("whole")["model"]
    assert all(torch.equal(cut[x], whole[x]) for x in whole)


@pytest.mark.parametrize("name", SCRIPTS)
def test_gradient_checkpointing_changes_no_metric_and_bf16_keeps_float32_weights(
        name, adder, reward_model, tmp_path, monkeypatch, capsys):
    """Blocks that backward recomputes give the same metrics; under bf16 products, frozen models
    included, what is saved is float32."""
    module = module_of(name)
    args = [str(x) for x in quick(name, adder, reward_model)]
    if name == "grpo.py":
        args += ["--ref_every", "2"]
    for out, more, bf16 in (("plain", [], set()),
                            ("again", ["--gradient_checkpointing"], set()),
                            ("bf16", ["--gradient_checkpointing"], {"cpu"})):
        bf16_devices(monkeypatch, bf16)
        argv = [*args, *more, "--out", str(tmp_path / out)]
        module.train(parse_config(module.Config, argv))
    plain, bf16 = metrics(tmp_path / "plain"), metrics(tmp_path / "bf16")
    assert metrics(tmp_path / "again") == plain
    assert bf16 != plain and bf16[-1]["step"] >= 3      # in bf16 reward.py collects other pairs
    for row in bf16:
        assert all(math.isfinite(x) for x in row.values())
    assert bf16[0].get("val_kl_seq", 0) == 0            # frozen or not, the same products
    if name == "grpo.py":                               # in bf16 small moves would be rounded away
        reference = read_checkpoint(tmp_path / "bf16")["modules"]["reference"].values()
        assert {x.dtype for x in reference} == {torch.float32}
    assert capsys.readouterr().out.count("memory in MiB: weights") == 3
    weights = read_checkpoint(tmp_path / "bf16")["model"].values()
    assert {x.dtype for x in weights} == {torch.float32}


@pytest.mark.parametrize("name", ["grpo.py", "ppo.py"])
def test_the_reference_is_not_saved_but_must_stay_what_it_was(name, adder, run, tmp_path):
    """It is --init again. With other weights there the KL penalty would pull elsewhere."""
    shutil.copytree(adder / "out/sft", tmp_path / "init")
    args = [*quick(name, adder), "--init", "init", "--out", "out"]
    assert run(name, *args) is None
    assert "reference" not in read_checkpoint("out")["modules"]
    assert run(name, "--out", "out", "--resume", "--steps", 7) is None
    model, tokenizer = load("init")
    with torch.no_grad():
        model.embedding.weight[0] += 0.1
    save_checkpoint("init", model, tokenizer)
    assert "--init" in run(name, "--out", "out", "--resume", "--steps", 8)


def test_an_evaluation_is_bounded_and_what_it_found_is_printed_first(
        adder, run, tmp_path, capsys, monkeypatch):
    """--eval_prompts bounds validation, test and the prompts that the reward is measured on."""
    sampled = []
    generate = GPT.generate

    def recorded(self, prompts, *args, **more):
        sampled.append(len(prompts))
        return generate(self, prompts, *args, **more)

    monkeypatch.setattr(GPT, "generate", recorded)
    for n, most in ((0, 500), (5, 5)):
        sampled.clear()
        assert run("grpo.py", *quick("grpo.py", adder), "--eval_prompts", n, "--steps", 1,
                   "--out", f"out{n}") is None
        assert max(sampled[:5]) == (5 if n else pytest.approx(most, abs=60))
    log = capsys.readouterr().out
    assert "5 validation and 5 test rows" in log
    before, table = log.index("before the first step, in "), log.index("step ")
    assert before < table and "greedy" in log[before:table]
    assert "a rollout has 16 responses and 2 updates" in log


def test_what_a_truncated_response_said_is_shown(adder, run, tmp_path):
    """A model that rambles is seen to do so."""
    assert run("grpo.py", *quick("grpo.py", adder), "--max_new_tokens", 1, "--steps", 1,
               "--early_stopping", "false", "--out", "out") is None
    shown = (tmp_path / "out/samples.txt").read_text()
    assert re.search(r"-> '[0-9] \[truncated\]'", shown), shown


def test_rows_of_one_split_by_are_in_one_split(tmp_path):
    """Also those whose prompt has another hash; and none of --test's is trained on."""
    rows = [{"prompt": f"{text} {i}", "split_by": str(i)} for i in range(300) for text in "ab"]
    for splits in (split_rows(rows), split_rows(rows[100:], rows[:50])):
        keys = [{row["split_by"] for row in part} for part in splits]
        assert all(keys) and not keys[0] & keys[1] and not keys[0] & keys[2]
        assert not keys[1] & keys[2]
    assert sum(map(len, split_rows(rows))) == 600


@pytest.mark.slow
def test_an_earlier_run_is_kept_and_a_bool_can_stand_alone(small, tmp_path):
    for _ in range(2):
        done = script("grpo.py", *QUICK, "--init", small, "--early_stopping", "--out", "out/grpo/",
                      cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "out/grpo.1" in done.stdout
    assert metrics(tmp_path / "out/grpo") == metrics(tmp_path / "out/grpo.1")


def test_a_run_that_diverges_is_stopped_and_the_good_checkpoint_stays(adder, run, tmp_path):
    """A good start, then a rate that throws the weights to infinity."""
    assert run("grpo.py", *quick("grpo.py", adder), "--out", "out") is None
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    line = run("grpo.py", "--out", "out", "--resume", "--steps", 40, "--lr", "1e30",
               "--eval_every", 40)
    assert line is not None and "stopped early at step" in line and "out/ckpt.pt" in line
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before
    assert (tmp_path / "out/stopped.pt").exists()


def test_curves_are_drawn_where_matplotlib_is_installed(adder, run, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("grpo.py", *quick("grpo.py", adder), "--out", "out") is None
    assert (tmp_path / "out/curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_flag_under_its_heading_with_its_comment_and_default(name, capsys):
    Config = module_of(name).Config
    with pytest.raises(SystemExit) as end:
        parse_config(Config, ["--help"])
    assert not end.value.code
    shown, heading, flag = {}, None, None                  # heading, flag -> default and help
    for line in capsys.readouterr().out.splitlines():
        if found := re.match(r"(\S.*):$", line):
            heading = found[1]
        elif found := re.match(r"  --(\w+) (.+)", line):
            flag = found[1]
            shown[heading, flag] = found[2]
        elif flag:
            shown[heading, flag] += line
    flags, heading = set(), None
    for line in inspect.getsource(Config).splitlines():
        if found := re.match(r"    # (.+)", line):
            heading = found[1]
        elif found := re.match(r"    (\w+): .*?#\s*(.+)$", line):
            flag, comment = found.groups()
            default = getattr(Config, flag)
            if isinstance(default, bool):
                default = str(default).lower()
            text = shown[heading, flag].strip("[").replace(" ", "")
            assert text.startswith(str(default) or '""'), flag
            assert comment.replace(" ", "") in text, flag
            flags.add(flag)
    assert flags == {field.name for field in dataclasses.fields(Config)}


def test_a_pretrained_model_and_what_was_trained_from_one_have_defaults_of_their_own(
        tmp_path, capsys):
    """The built-in model's rates would ruin a pretrained one; what the user says comes first."""
    settings = {"hub": {"model_type": "qwen2"},
                "tuned": {"script": "SFT", "pretrained": True},
                "ours": {"script": "SFT", "pretrained": False}}
    for folder, config in settings.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    for name in SCRIPTS:
        module = module_of(name)
        assert set(module.PRETRAINED) <= {f.name for f in dataclasses.fields(module.Config)}
        for folder in ("hub", "tuned", "ours", "none"):
            pretrained = folder in ("hub", "tuned")
            given = {"init": str(tmp_path / folder), "max_new_tokens": 7}
            argv = ["--init", given["init"], "--max_new_tokens", "7"]
            cfg = parse_config(module.Config, argv)
            defaults = module.PRETRAINED if pretrained else {}
            assert cfg == module.Config(**defaults | given)
            assert ("pretrained" in capsys.readouterr().out) is pretrained


# ----------------------------------------------------------------- what single flags and updates do


def test_the_reference_moves_by_its_one_rule(adder, run, capsys):
    """ref <- a policy + (1 - a) ref: with a = 1 after every rollout and one update each, the KL to
    it is 0; with a = 0 it never moves. The KL that is reported at the end is to --init."""
    args = [*quick("grpo.py", adder), "--minibatch", 16, "--lr", 1e-3]
    for out, more in (("fixed", []),
                      ("a0", ["--ref_every", 1, "--ref_mix", 0.0]),
                      ("a1", ["--ref_every", 1, "--ref_mix", 1.0])):
        assert run("grpo.py", *args, *more, "--out", out) is None
    fixed = metrics("fixed")
    assert fixed == metrics("a0") and abs(fixed[-1]["kl"]) > 1e-4
    assert all(abs(row["kl"]) < 1e-6 for row in metrics("a1")[1:])
    reported = re.findall(r"kl_seq +(\S+) -> (\S+)", capsys.readouterr().out)
    before, after = zip(*reported)
    assert set(before) == {"0.000"} and "0.000" not in after and after[0] == after[1]
    # one update per rollout: the clip never cuts
    assert all(row["clip_low"] == row["clip_high"] == 0 for row in fixed[1:])


def test_grpo_with_a_reward_model_logs_its_score_and_the_accuracy_by_the_rule(
        adder, reward_model, run):
    args = quick("grpo.py", adder)
    assert run("grpo.py", *args, "--reward", reward_model, "--out", "out") is None
    rows = metrics("out")
    assert "val_score" in rows[0]
    assert all(0 <= row["accuracy"] <= 1 for row in rows[1:])
    # under the rule they would be equal
    assert all(abs(row["reward"] - row["accuracy"]) > 1e-4 for row in rows[1:])


def test_ppo_with_the_rule_logs_one_number_twice_and_its_critic_starts_at_0(adder, run):
    flags = ["--prompts", 64, "--minibatch", 64, "--out", "out"]
    assert run("ppo.py", *quick("ppo.py", adder), *flags) is None
    rows = metrics("out")
    assert "val_score" not in rows[0] and 0 < rows[1]["accuracy"] < 1
    for row in rows[1:]:
        assert row["reward"] == pytest.approx(row["accuracy"], abs=1e-6)
    assert abs(rows[1]["explained_var"]) < 1e-6            # a critic of zeros explains nothing yet


def test_the_parts_of_ppos_update(adder, reward_model, tmp_path, monkeypatch):
    """One gradient norm for each network, advantages whitened over the rollout, Adam's eps 1e-5,
    and rates that fall on a line to 0."""
    norms, whitened, losses, rates = [], [], [], []
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_

    def clip(params, max_norm):
        params = list(params)
        norms.append((len(params), max_norm))
        return clip_grad_norm_(params, max_norm)

    def whiten(x, mask, total, inner=ppo.whiten):
        adv = inner(x, mask, total)
        whitened.append(adv[mask > 0])
        return adv

    def set_lr(optimizer, *args, inner=ppo.set_lr, **more):
        lr = inner(optimizer, *args, **more)
        rates.append([(group["lr"], group["eps"]) for group in optimizer.param_groups])
        return lr

    def ppo_loss(logp, old_logp, adv, mask, *more, inner=ppo.ppo_loss):
        losses.append(adv[mask > 0])
        return inner(logp, old_logp, adv, mask, *more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for spy in (whiten, set_lr, ppo_loss):
        monkeypatch.setattr(ppo, spy.__name__, spy)
    ppo.train(ppo.Config(
        init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"), reward=str(reward_model),
        out=str(tmp_path / "out"), max_new_tokens=6, steps=8, warmup=2, prompts=16, minibatch=8,
        epochs=1, eval_every=8, lr=1e-3, critic_lr=2e-3, grad_clip=0.7))
    n_policy, n_critic = (len(list(load(str(folder))[0].parameters()))
                          for folder in (adder / "out/sft", reward_model))
    assert n_policy != n_critic and set(norms) == {(n_policy, 0.7), (n_critic, 0.7)}
    assert len(norms) == 2 * 2 * 8
    for adv in whitened:
        assert abs(adv.mean()) < 1e-5 and abs(adv.var(correction=0) - 1) < 1e-3
    # and these are what the loss got
    assert torch.equal(torch.cat(losses).sort()[0], torch.cat(whitened).sort()[0])
    shares = [groups[0][0] / 1e-3 for groups in rates]
    assert shares == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    for groups in rates:
        assert all(eps == 1e-5 for _, eps in groups)
        assert groups[-1][0] == pytest.approx(2 * groups[0][0])           # the critic's own peak


# ------------------------------------------------------------------------------------ own data


def pair(i):
    return {"prompt": f"{i}?", "chosen": f"{i}!", "rejected": f"{i}", "margin": i % 3}


def dialogue(i):
    prompt = f"\n\nHuman: {i}?\n\nAssistant:"
    return {"chosen": f"{prompt} {i}!", "rejected": f"{prompt} {i}"}


def ranking(i):
    return {"prompt": f"{i}?", "responses": [f"{i}!!", f"{i}!", str(i)], "ranks": [0, 1, 1 + i % 2]}


@pytest.mark.slow
@pytest.mark.parametrize("make", [pair, dialogue, ranking])
def test_a_reward_model_learns_own_preferences(make, small, tmp_path):
    """Pairs with margins, HH-RLHF's dialogues, rankings with ties."""
    write_lines(tmp_path / "rows.jsonl", [make(i) for i in range(200)])
    done = script("reward.py", "--init", small, "--data", "rows.jsonl", "--batch", 8, "--lr", 3e-3,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out/reward/preferences.jsonl").exists()
    assert before_after(done.stdout, "acc")[1] > .8
    assert before_after(done.stdout, "acc_longer")[1] == 1


def test_preferences_can_be_collected_on_own_rows_without_training(adder, run, tmp_path):
    assert run("reward.py", "--init", adder / "out/sft", "--data", adder / "rows.jsonl", *SHORT,
               "--collect_only", "--out", "out") is None
    assert not (tmp_path / "out/ckpt.pt").exists()
    pairs = read_preferences("out/preferences.jsonl")
    assert len(pairs) > 10 and not (tmp_path / "out/preferences_test.jsonl").exists()
    for pair in pairs:
        assert grpo.score(pair, pair["chosen"]) > grpo.score(pair, pair["rejected"])


def test_preferences_on_test_prompts_go_into_a_file_of_their_own(adder, run, tmp_path):
    """dpo.py would train on them."""
    rows = read_rows(str(adder / "rows.jsonl"))
    write_lines(tmp_path / "train.jsonl", [row | {"split_by": row["prompt"]} for row in rows[50:]])
    write_lines(tmp_path / "test.jsonl", rows[:50])
    assert run("reward.py", "--init", adder / "out/sft", "--data", "train.jsonl", "--test",
               "test.jsonl", *SHORT, "--collect_only", "--out", "out") is None
    tested = {row["prompt"] for row in rows[:50]}
    trained = read_preferences("out/preferences.jsonl")
    held_out = read_preferences("out/preferences_test.jsonl")
    assert trained and not {pair["prompt"] for pair in trained} & tested
    assert held_out and {pair["prompt"] for pair in held_out} <= tested
    assert all(pair["split_by"] == pair["prompt"] for pair in trained)


@pytest.mark.parametrize("name", ["ppo.py", "dapo.py"])
def test_a_reward_model_trains_on_own_prompts_that_do_not_say_what_is_right(
        name, adder, reward_model, run, tmp_path, capsys):
    rows = [{"prompt": f"{i}+{i}=", "answer": "in words"} for i in range(99)]
    write_lines(tmp_path / "prompts.jsonl", rows)
    args = PPO if name == "ppo.py" else QUICK
    assert run(name, *args, *SHORT, "--init", adder / "out/sft", "--reward", reward_model,
               "--data", "prompts.jsonl", "--out", "out") is None
    table = capsys.readouterr().out.partition("before -> after")[2]
    assert "score" in table and "greedy" not in table and "accuracy" not in table
    rows = metrics("out")
    assert all("accuracy" not in row and "val_accuracy" not in row for row in rows)


def gsm8k_row(i, j):
    return {"question": f"What is {i} + {j}?",
            "answer": f"It is <<{i}+{j}={i + j}>>{i + j}.\n#### {i + j}"}


@pytest.mark.slow
def test_rows_like_gsm8ks_train_sft_then_grpo_and_test_rows_are_never_trained_on(tmp_path):
    """The held-out rows are found by hash, or given by --test."""
    rows = [gsm8k_row(i, j) for i in range(20) for j in range(20)]
    write_lines(tmp_path / "rows.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", rows[:7])
    done = script("sft.py", *SMALL, "--data", "rows.jsonl", "--block_size", 64, "--max_new_tokens",
                  30, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = before_after(done.stdout, "loss")
    assert after < before and "pass@8" in done.stdout
    done = script("grpo.py", *QUICK, "--data", "rows.jsonl", "--test", "test.jsonl",
                  "--max_new_tokens", 30, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 test rows" in done.stdout and "its prompt is in --test" in done.stdout


def test_sft_trains_on_messages(run, tmp_path):
    rows = []
    for i in range(200):
        rows.append({"messages": [{"role": "user", "content": f"say {i}"},
                                  {"role": "assistant", "content": str(i)}]})
    write_lines(tmp_path / "chat.jsonl", rows)
    assert run("sft.py", *SMALL, "--data", "chat.jsonl", "--out", "chat") is None
    before, after = metrics("chat")[0]["nll"], metrics("chat")[-1]["nll"]
    assert after < before
