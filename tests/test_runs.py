"""The scripts as a user runs them: they learn, resume, repeat themselves, and refuse bad input in one line.   python -m pytest tests/test_runs.py"""
import dataclasses
import importlib
import json
import math
import os
import re
import sys

import pytest
import torch

import model as M
import grpo
import ppo
import reward
from conftest import PPO, QUICK, ROOT, SHORT, SMALL, metrics, quick, script

SCRIPTS = ["sft.py", "reward.py", "ppo.py", "dpo.py", "grpo.py", "dapo.py"]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder in which all ways have been gone, with default settings but for a shorter dapo.py: from SFT to GRPO, to DPO by way of the
    comparisons, to PPO by way of the reward model, and to DAPO."""
    home = tmp_path_factory.mktemp("home")
    for name, *more in (("grpo.py",), ("dpo.py",), ("ppo.py",), ("dapo.py", "--steps", 20)):
        done = script(name, *more, cwd=home)
        assert done.returncode == 0, done.stderr
        (home / name).write_text(done.stdout)
    return home


def final(log, name):
    """before, after of one line of the table that ends a run."""
    line = [line.split() for line in log.splitlines() if line.split()[:1] == [name] and "->" in line][-1]
    return float(line[1]), float(line[3])


def test_one_command_trains_sft_then_grpo_and_learns_on_held_out_prompts(home):
    """With room: SFT .4 to .65 greedy and .45 or more at T=1; GRPO .93 greedy, .85 at T=1, and longer answers (README has the figures)."""
    log = (home / "grpo.py").read_text()
    assert "out/sft does not exist: running sft.py first" in log
    (g0, g1), (a0, a1), (n0, n1) = final(log, "greedy"), final(log, "acc"), final(log, "length")
    assert .4 < g0 < .65 and a0 > .45 and final(log, "pass@8")[0] > .90
    assert g1 > .93 and a1 > .85 and n1 > n0 + 2
    rows = metrics(home / "out/grpo")
    assert [row["step"] for row in rows] == list(range(51))
    assert all(row["gap"] < 1e-5 for row in rows[1:]), "the sampler and the scorer disagree"
    assert {"config.json", "metrics.jsonl", "ckpt.pt", "samples.txt"} <= set(os.listdir(home / "out/grpo"))


def test_one_command_collects_comparisons_then_trains_dpo(home):
    """With room: greedy .93, T=1 .75, longer answers; held-out pairs from 0 in order at the start to .9, rejected answers pushed far down."""
    log = (home / "dpo.py").read_text()
    assert "out/reward does not exist: running reward.py first" in log and "running sft.py" not in log
    (g0, g1), (_, a1), (n0, n1), (p0, p1) = (final(log, name) for name in ("greedy", "acc", "length", "pair_acc"))
    assert g0 < .65 and g1 > .93 and a1 > .75 and n1 > n0 + 2 and p0 == 0 and p1 > .9
    rows = metrics(home / "out/dpo")
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > 100
    assert abs(rows[1]["loss"] - math.log(2)) < 1e-4 and rows[-1]["loss"] < .6
    assert rows[-1]["val_logp_l"] < rows[0]["val_logp_l"] - 3 and rows[-1]["val_logp_w"] > rows[0]["val_logp_w"] - 1


def test_dapo_learns_and_counts_what_it_samples(home):
    """Twenty rollouts, with room: greedy .9; more is sampled than what is learned from, and it is counted."""
    log = (home / "dapo.py").read_text()
    (_, g1), (a0, a1), (n0, n1) = (final(log, name) for name in ("greedy", "acc", "length"))
    assert g1 > .9 and a1 > a0 + .2 and n1 > n0 + 2
    rows = metrics(home / "out/dapo")[1:]
    assert all(row["gap"] < 1e-5 and "kl" not in row for row in rows) and any(row["tries"] > 1 for row in rows)
    assert all(row["tokens"] >= 256 * row["len"] - 1 and 0 <= row["dead"] < 1 for row in rows)


def test_one_command_trains_a_reward_model_then_ppo_and_lifts_what_the_reward_model_never_saw(home):
    """With room: pair accuracy .93 and well above "the longer answer is better"; PPO .93 greedy and .85 at T=1 by the rule, which only reports."""
    log = (home / "ppo.py").read_text()
    assert "running reward.py first" in log and "out/reward: the earlier run is kept as out/reward.1" in log
    pairs, log = log.split("\nppo: ")
    pair_acc, longer, ece = (final(pairs, name)[1] for name in ("acc", "longer", "ece"))
    assert pair_acc > .93 and pair_acc > longer + .05 and ece < .06 and final(pairs, "alike")[1] > .85
    (g0, g1), (_, a1), (s0, s1) = (final(log, name) for name in ("greedy", "acc", "score"))
    assert g0 < .65 and g1 > .93 and a1 > .85 and s1 > s0 + 1
    rows = metrics(home / "out/ppo")
    assert [row["step"] for row in rows] == list(range(41))
    assert all(row["gap"] < 1e-5 for row in rows[1:]) and abs(rows[1]["kl"]) < 1e-6 < rows[-1]["kl"]
    assert rows[-1]["ev"] > .2 > rows[1]["ev"] and all(0 <= row["clip_low"] < .1 and 0 <= row["clip_high"] < .1 for row in rows[1:])
    assert any(row["clip_high"] > 0 for row in rows[1:])                  # several updates a rollout: the clip has work


def test_the_reward_model_of_a_default_run_is_centred_on_demonstrations_and_keeps_its_pairs(home):
    model, tokenizer = M.load(str(home / "out/reward"))
    rows = M.read_rows(str(home / "out/sft/demonstrations.jsonl"), "prompt", "response")
    tokens, mask = M.pad_batch(*zip(*[M.encode_answer(tokenizer, row, row["response"]) for row in rows]))
    scores = M.frozen_scalars(model, tokens, mask, 0)[1]
    assert abs(scores.mean()) < 1e-3 and scores.std() > .5
    pairs = M.read_preferences(str(home / "out/reward/preferences.jsonl"))
    assert len(pairs) > 5000 and all(grpo.score(p, p["chosen"]) > grpo.score(p, p["rejected"]) for p in pairs)
    assert {M.part(p["prompt"]) for p in pairs} == {"train", "val", "test"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_runs_with_one_seed_write_the_same_metrics_and_another_seed_does_not(name, adder, judge, run):
    args = quick(name, adder, judge)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(name, *args, "--out", out, "--seed", seed) is None
    a, b, c = map(metrics, "abc")
    assert a == b and a != c and a[-1]["step"] > 2


@pytest.mark.parametrize("name, more", [("sft.py", []), ("reward.py", []), ("ppo.py", []), ("ppo.py", ["--reward", "JUDGE"]), ("grpo.py", []),
                                        ("grpo.py", ["--ref_every", "2", "--epochs", "2"]), ("grpo.py", ["--reward", "JUDGE"]),
                                        ("dpo.py", []), ("dapo.py", []), ("dapo.py", ["--reward", "JUDGE", "--tries", "2"])])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, more, adder, judge, run, monkeypatch):
    """Cut between two checkpoints: the steps after the last one are done again, and no line is lost or doubled."""
    args = quick(name, adder, judge) + [judge if x == "JUDGE" else x for x in more]
    assert run(name, *args, "--out", "whole") is None
    log = M.Folder.log

    def cut(self, step, *told, **metrics):
        if step == 4 + 3 * (self.steps > 6):
            raise M.InputError("cut")
        return log(self, step, *told, **metrics)

    with monkeypatch.context() as patch:
        patch.setattr(M.Folder, "log", cut)
        assert run(name, *args, "--out", "cut") == f"{name}: cut"
    assert run(name, "--out", "cut", "--resume") is None                                     # its settings are remembered
    assert metrics("cut") == metrics("whole")
    a, b = (M.read_checkpoint(x)["model"] for x in ("cut", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", SCRIPTS)
def test_less_memory_changes_no_number_and_bf16_keeps_float32_masters(name, adder, judge, tmp_path, monkeypatch, capsys):
    """Blocks that are run again in backward give the same metrics; under bf16 products, frozen models included, what is saved is float32."""
    script = importlib.import_module(name.removesuffix(".py"))
    args = [str(x) for x in quick(name, adder, judge)] + {"grpo.py": ["--ref_every", "2"]}.get(name, [])
    for out, more, bf16 in (("plain", [], set()), ("again", ["--recompute"], set()), ("bf16", ["--recompute"], {"cpu"})):
        monkeypatch.setattr(M, "BF16", bf16)
        script.train(M.parse_config(script.Config, [*args, *more, "--out", str(tmp_path / out)]))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "plain")
    half, whole = (metrics(tmp_path / x) for x in ("bf16", "plain"))
    assert len(half) == len(whole) and half != whole and all(math.isfinite(x) for row in half for x in row.values())
    assert capsys.readouterr().out.count("memory in MiB: weights") == 3
    assert {x.dtype for x in M.read_checkpoint(str(tmp_path / "bf16"))["model"].values()} == {torch.float32}


def test_an_earlier_run_is_kept_and_a_bool_can_stand_alone(small, tmp_path):
    for _ in range(2):
        done = script("grpo.py", *QUICK, "--init", small, "--guard", "--out", "out/grpo/", cwd=tmp_path)
        assert done.returncode == 0
    assert "the earlier run is kept as out/grpo.1" in done.stdout
    assert metrics(tmp_path / "out/grpo") == metrics(tmp_path / "out/grpo.1")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as end:
        M.parse_config(importlib.import_module(name[:-3]).Config, ["--help"])
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.split())
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        flags = dict(re.findall(r"^    (\w+): \w+ = .*?#\s*(.+)$", f.read(), re.M))
    assert {"seed", "init", "out", "data", "resume"} <= set(flags)
    for flag, comment in flags.items():
        assert f"--{flag} " in text and "".join(comment.split()) in "".join(text.split())


def test_the_reference_moves_by_its_one_rule(home, tmp_path):
    """ref <- a policy + (1 - a) ref: with a = 1 after every rollout and one update each, the KL to it is 0; with a = 0 it never moves."""
    args = [*QUICK, "--init", home / "out/sft", "--minibatch", "16"]
    for out, more in (("fixed", []), ("a0", ["--ref_every", 1, "--ref_mix", 0.0]), ("a1", ["--ref_every", 1, "--ref_mix", 1.0])):
        assert script("grpo.py", *args, *more, "--out", out, cwd=tmp_path).returncode == 0
    fixed, a0, a1 = (metrics(tmp_path / x) for x in ("fixed", "a0", "a1"))
    assert fixed == a0 and fixed[-1]["kl"] > 1e-4 and all(row["kl"] < 1e-9 for row in a1[1:])
    assert all(row["clip_low"] == row["clip_high"] == 0 for row in fixed[1:])       # a single update a rollout: the clip is idle


def test_a_reward_model_scores_grpos_groups_and_the_rule_scores_ppo(home, tmp_path):
    """The reward logged is the score, gold the rule's opinion of the same answers; under the rule they are one, and PPO's critic starts at 0."""
    done = script("grpo.py", *QUICK, "--init", home / "out/sft", "--reward", home / "out/reward", "--out", "grpo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "grpo")
    assert all(0 <= row["gold"] <= 1 for row in rows[1:]) and any(abs(row["reward"] - row["gold"]) > .1 for row in rows[1:]) and "val_score" in rows[0]
    done = script("ppo.py", *PPO, "--init", home / "out/sft", "--reward", "rule", "--out", "ppo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "ppo")
    assert all(row["reward"] == pytest.approx(row["gold"], abs=1e-6) for row in rows[1:]) and "val_score" not in rows[0]
    assert abs(rows[1]["ev"]) < 1e-6                                      # a critic of zeros explains nothing yet


def test_own_preferences_end_to_end(small, adder, judge, tmp_path):
    """Pairs with margins, HH-RLHF's dialogues, rankings, and rows to collect on; then PPO on prompts alone."""
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("pairs.jsonl", [{"prompt": f"{i}?", "chosen": f"{i}!", "rejected": f"{i}", "margin": i % 3} for i in range(200)])
    write("talk.jsonl", [{"chosen": f"\n\nHuman: {i}?\n\nAssistant: {i}!", "rejected": f"\n\nHuman: {i}?\n\nAssistant: {i}"} for i in range(200)])
    write("ranks.jsonl", [{"prompt": f"{i}?", "responses": [f"{i}!!", f"{i}!", str(i)], "ranks": [0, 1, 1 + i % 2]} for i in range(200)])
    for name in ("pairs", "talk", "ranks"):
        done = script("reward.py", "--init", small, "--data", f"{name}.jsonl", "--batch", 8, "--out", name, "--lr", 3e-3, cwd=tmp_path)
        assert done.returncode == 0 and not (tmp_path / name / "preferences.jsonl").exists(), done.stderr
        assert final(done.stdout, "acc")[1] > .8 and final(done.stdout, "longer")[1] == 1
    done = script("reward.py", "--init", adder / "out/sft", "--data", adder / "rows.jsonl", *SHORT, "--collect_only", "--out", "collected", cwd=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "collected/ckpt.pt").exists(), done.stderr
    pairs = M.read_preferences(str(tmp_path / "collected/preferences.jsonl"))
    assert len(pairs) > 10 and all(grpo.score(p, p["chosen"]) > grpo.score(p, p["rejected"]) for p in pairs)
    write("prompts.jsonl", [{"prompt": f"{i}+{i}=", "answer": "in words"} for i in range(99)])
    done = script("ppo.py", *PPO, *SHORT, "--init", adder / "out/sft", "--reward", judge, "--data", "prompts.jsonl", "--out", "ppo", cwd=tmp_path)
    assert done.returncode == 0 and "greedy" not in done.stdout and "score" in done.stdout, done.stderr
    assert all("gold" not in row and "val_acc" not in row for row in metrics(tmp_path / "ppo"))
    done = script("dapo.py", *QUICK, *SHORT, "--init", adder / "out/sft", "--reward", judge, "--data", "prompts.jsonl", "--out", "dapo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(row["dead"] == 0 and row["tries"] == 1 and "gold" not in row for row in metrics(tmp_path / "dapo")[1:])


def test_no_prompt_is_in_two_parts_of_the_preferences(home):
    """What is learned from, validated on and reported on, collected or read."""
    policy, tokenizer = M.load(str(home / "out/sft"))
    cfg = reward.Config(prompts=40, answers=2, out=str(home / "out/reward"), resume=True)
    for cfg in (cfg, reward.Config(data=str(home / "out/reward/preferences.jsonl"))):
        parts, _ = reward.preferences(cfg, policy, tokenizer)
        assert [{M.part(pair["prompt"]) for pair in part} for part in parts] == [{"train"}, {"val"}, {"test"}]


def test_what_ppos_update_is_made_of(adder, judge, tmp_path, monkeypatch):
    """One gradient norm for each network, advantages whitened over the rollout, Adam's eps 1e-5, and rates that fall on a line to 0."""
    norms, advs, rates, inner = [], [], [], torch.nn.utils.clip_grad_norm_

    def clip(params, most):
        params = list(params)
        norms.append((len(params), most))
        return inner(params, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    whiten, set_lr = ppo.whiten, ppo.set_lr
    monkeypatch.setattr(ppo, "whiten", lambda x, mask: advs.append((whiten(x, mask), mask)) or advs[-1][0])
    monkeypatch.setattr(ppo, "set_lr", lambda optimizer, *a, **k: (set_lr(optimizer, *a, **k), rates.append([(g["lr"], g["eps"]) for g in optimizer.param_groups]))[0])
    seen, loss = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda logp, old, adv, mask, *a: seen.append(adv[mask > 0]) or loss(logp, old, adv, mask, *a))
    ppo.train(ppo.Config(init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"), reward=str(judge), max_new=6, steps=8, warmup=2, prompts=16, minibatch=8,
                         epochs=1, eval_every=8, out=str(tmp_path / "out"), lr=1e-3, critic_lr=2e-3, grad_clip=0.7))
    policy, critic = (sum(1 for _ in M.load(str(path))[0].parameters()) for path in (adder / "out/sft", judge))
    assert set(norms) == {(policy, 0.7), (critic, 0.7)} and policy != critic and len(norms) == 2 * 2 * 8
    for adv, mask in advs:
        inside = adv[mask > 0]
        assert abs(inside.mean()) < 1e-5 and abs(inside.var(correction=0) - 1) < 1e-3
    assert torch.equal(torch.cat(seen).sort()[0], torch.cat([adv[mask > 0] for adv, mask in advs]).sort()[0])     # and these are what the loss got
    first = [step[0][0] / 1e-3 for step in rates]
    assert first == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]) and all(eps == 1e-5 for step in rates for _, eps in step)
    assert all(step[-1][0] == pytest.approx(2 * step[0][0]) for step in rates)               # the critic's own peak


def test_curves_are_drawn_where_matplotlib_is(small, tmp_path):
    pytest.importorskip("matplotlib")
    assert script("grpo.py", *QUICK, "--init", small, "--out", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out/curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_own_data_end_to_end(tmp_path):
    """GSM8K's format: SFT, then GRPO from that checkpoint; the held-out rows are found by hash or given by --test."""
    rows = [{"question": f"What is {i} + {j}?", "answer": f"It is <<{i}+{j}={i + j}>>{i + j}.\n#### {i + j}"} for i in range(20) for j in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:7]))
    done = script("sft.py", *SMALL, "--data", "rows.jsonl", "--context", 64, "--max_new", 30, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = final(done.stdout, "loss")
    assert after < before and "pass@8" in done.stdout
    done = script("grpo.py", *QUICK, "--data", "rows.jsonl", "--test", "test.jsonl", "--max_new", 30, cwd=tmp_path)
    assert done.returncode == 0 and "7 to report" in done.stdout and "its prompt is in --test" in done.stdout, done.stderr
    chat = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]} for i in range(200)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chat))
    assert script("sft.py", *SMALL, "--data", "chat.jsonl", "--out", "chat", cwd=tmp_path).returncode == 0


def test_a_run_that_goes_wrong_is_stopped_and_the_good_checkpoint_stays(home, tmp_path):
    """A good start, then a rate that throws the weights to infinity: one line, and the checkpoint is the one of before."""
    assert script("grpo.py", *QUICK, "--init", home / "out/sft", "--out", "out", cwd=tmp_path).returncode == 0
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    done = script("grpo.py", "--out", "out", "--resume", "--steps", "40", "--lr", "1e30", "--eval_every", "40", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "stopped by the guard at step" in done.stderr, done.stderr
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before and (tmp_path / "out/stopped.pt").exists()


def test_a_public_model_and_what_was_made_from_one_have_defaults_of_their_own(tmp_path, capsys):
    """Its rates would ruin a pretrained model; what the user says comes first, and a resumed run keeps what it began with."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text('{"model_type": "qwen2"}')
    for name, public in (("tuned", True), ("ours", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"script": "SFT", "public": public}))
    for name in SCRIPTS:
        script = importlib.import_module(name.removesuffix(".py"))
        assert set(script.PUBLIC) <= {f.name for f in dataclasses.fields(script.Config)}
        for init, public in (("hub", True), ("tuned", True), ("ours", False), ("nothing", False)):
            cfg = M.parse_config(script.Config, ["--init", str(tmp_path / init), "--max_new", "7"])
            want = dataclasses.asdict(script.Config()) | (script.PUBLIC if public else {}) | {"init": str(tmp_path / init), "max_new": 7}
            assert dataclasses.asdict(cfg) == want
            assert ("public model" in capsys.readouterr().out) is public
