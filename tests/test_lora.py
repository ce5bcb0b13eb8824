"""LoRA: adapters against merged weights and their gradients, four models on one base, checkpoints.

    python -m pytest tests/test_lora.py                   some runs; -m slow: those of all scripts
"""
import copy
import json
import shutil
import types

import pytest
import torch

import common.checkpoint
import common.models
import common.run
import model as M
from common import InputError, load
from common.checkpoint import hash_weights, read_checkpoint, save_checkpoint
from common.lora import LoRALinear, add_adapters, lora_of, remove_adapters, trained_state
from common.models import make_critic, make_reference, read_reward_model
from common.tokenizer import make_tokenizer
from common.train import freeze
from conftest import (PAIRS, PROMPTS, SCRIPTS, SHORT, bf16_devices, equal, gradients, metrics,
                      quick, run_whole_and_cut, script, tiny)
from model import ScalarModel
from ppo import value_loss

TOKENS = torch.randint(0, 23, (4, 20), generator=torch.Generator().manual_seed(0))


def adapted(model, rank=3, alpha=6.0, seed=1, **base):
    """Adapters whose B is not 0, so that they change the function."""
    torch.manual_seed(seed)
    add_adapters(model, rank, alpha, **base)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.3
    return model


def layers(model):
    return {name: x for name, x in model.named_modules() if isinstance(x, LoRALinear)}


def logp(model):
    return model.token_logp(TOKENS)[0]


# ------------------------------------------------------------------------------------- the function


def test_new_adapters_sit_on_every_linear_layer_of_the_blocks_and_change_nothing(family):
    model = tiny(family)
    before = logp(model)
    add_adapters(model, 3, 6.0)
    assert len(layers(model)) == 4 * model.cfg.n_layer
    assert torch.equal(logp(model), before)
    learning = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"lora_A", "lora_B"}
    for layer in layers(model).values():
        assert (layer.lora_B == 0).all() and layer.scale == 2
        std = layer.lora_A.std() * layer.in_features ** 0.5
        assert 0.7 < std < 1.3 and layer.lora_A.shape == (3, layer.in_features)


def test_adapters_compute_what_the_merged_weights_compute_and_have_their_gradient(family):
    """With W' = W + s B A: dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW', from a model whose
    weights are W' and all learn."""
    model = adapted(tiny(family))
    whole = tiny(family)
    for name, layer in layers(model).items():
        merged = layer.weight + 2 * layer.lora_B @ layer.lora_A
        whole.get_submodule(name).weight.data = merged.detach()
    assert (logp(model) - logp(whole)).abs().max() < 1e-12
    logp(model).square().sum().backward()
    logp(whole).square().sum().backward()
    assert gradients(model).keys() == {name for name, p in model.named_parameters()
                                       if p.requires_grad}
    for name, layer in layers(model).items():
        g = whole.get_submodule(name).weight.grad
        scale = g.abs().max()
        assert (layer.lora_B.grad - 2 * g @ layer.lora_A.T).abs().max() < 1e-10 * scale
        assert (layer.lora_A.grad - 2 * layer.lora_B.T @ g).abs().max() < 1e-10 * scale
    remove_adapters(model, merge=True)
    assert (logp(model) - logp(whole)).abs().max() < 1e-12 and not layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_as_wide_as_their_layers_reach_every_model(family):
    """Any other model of the shape, by A = 1 and B = (W' - W) / s, with the rest learning too."""
    model, target = add_adapters(tiny(family), 3, 6.0), tiny(family, seed=5)
    assert (logp(model) - logp(target)).abs().max() > 1
    with torch.no_grad():
        for name, layer in layers(model).items():
            wide = LoRALinear(layer, rank=layer.in_features, alpha=6.0)
            wide.lora_A.copy_(torch.eye(layer.in_features))
            wide.lora_B.copy_((target.get_submodule(name).weight - layer.weight) / wide.scale)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wide)
        rest = {name: p for name, p in model.named_parameters() if "lora_" not in name}
        adapted_weights = {name + ".weight" for name in layers(model)}
        for name, p in target.named_parameters():
            if name not in adapted_weights:
                rest[name].copy_(p)
    assert (logp(model) - logp(target)).abs().max() < 1e-10


@pytest.mark.parametrize("bf16", [False, True])
def test_sampling_runs_the_adapters_in_place_and_so_follows_the_scored_policy(
        family, bf16, monkeypatch):
    """In bf16 the base's matrices are stored in bf16, the adapters in float32."""
    model = tiny(family, torch.float32)
    bf16_devices(monkeypatch, {"cpu"} if bf16 else set())
    adapted(freeze(model))
    for name, p in model.named_parameters():
        table = name in ("embedding.weight", "position.weight")
        small = bf16 and p.dim() == 2 and not table and "lora_" not in name
        assert p.dtype == (torch.bfloat16 if small else torch.float32), name
    tokens, mask, sampled = model.generate(PROMPTS, group_size=2, max_new_tokens=9)
    with torch.no_grad(), M.autocast(model):
        scored = model.token_logp(tokens, mask)[0]
    assert (sampled - scored).abs().max() < (0.1 if bf16 else 1e-4)
    with torch.no_grad(), M.autocast(model):
        base = make_reference(model).token_logp(tokens, mask)[0]
    assert (base - scored).abs().max() > 0.5


@pytest.mark.parametrize("width", [32, 96])
def test_a_hash_is_of_the_weights_however_a_frozen_model_stores_them(width, monkeypatch):
    """Above 4,096 values a matrix is sampled. One step of training changes the hash."""
    model = tiny("qwen2", torch.float32, n_embd=width)
    before = hash_weights(model)
    bf16_devices(monkeypatch, {"cpu"})
    assert hash_weights(freeze(copy.deepcopy(model))) == before
    for p in model.parameters():
        p.data += 1e-4 * torch.randn_like(p).sign()
    assert hash_weights(model) != before


# ----------------------------------------------------------------------------- models on one base


def distinct(*models):
    return {id(p): p for model in models for p in model.parameters()}


def on_one_base(tmp_path, tokenizer):
    """Policy, reference, reward model and critic, as ppo.py makes them."""
    base = tiny("qwen2", torch.float32, vocab_size=259)
    origin = {"base": "base", "base_hash": hash_weights(base)}
    reward_model = ScalarModel(copy.deepcopy(base), std=0.3)
    save_checkpoint(tmp_path, adapted(reward_model, rank=2, **origin), tokenizer)
    policy = adapted(freeze(base), seed=2, **origin)
    found = read_reward_model(str(tmp_path), policy, tokenizer)
    cfg = types.SimpleNamespace(lora_rank=3, lora_alpha=6.0, gradient_checkpointing=False,
                                compile=False)
    models = [policy, make_reference(policy), found, make_critic(cfg, policy, found)]
    return models, reward_model


def test_four_models_on_one_base_are_four_separate_ones_in_value_and_gradient(tmp_path):
    tokenizer = make_tokenizer()
    models, saved = on_one_base(tmp_path, tokenizer)
    policy, reference, reward_model, critic = models
    n_base = sum(p.numel() for p in tiny("qwen2", vocab_size=259).parameters())
    own = sum(p.numel() for name, p in policy.named_parameters() if "lora_" in name)
    own += 2 * sum(x.numel() for x in trained_state(saved).values())
    assert sum(p.numel() for p in distinct(*models).values()) == n_base + own
    assert all(not p.requires_grad for p in distinct(reference, reward_model).values())

    separate = [copy.deepcopy(model) for model in models]      # each with a base of its own
    assert len(distinct(*separate)) == sum(len(list(model.parameters())) for model in models)
    assert (logp(reference) - logp(tiny("qwen2", torch.float32, vocab_size=259))).abs().max() == 0
    mask = torch.ones_like(TOKENS).float()
    mask[:, :4] = 0
    assert torch.equal(reward_model.score(TOKENS, mask), saved.score(TOKENS, mask))
    assert torch.equal(critic.value(TOKENS), reward_model.value(TOKENS))
    results = []
    for policy, reference, reward_model, critic in (models, separate):
        value = critic.value(TOKENS)
        loss, _ = value_loss(value, value.detach() + 0.1, torch.ones_like(value), mask, 0.2)
        loss = loss + (logp(policy) - logp(reference)).square().sum()
        loss.backward()
        results.append((loss.detach(), reward_model.score(TOKENS, mask), gradients(policy),
                        gradients(critic)))
    assert equal(*results)
    assert results[0][3].keys() == trained_state(saved).keys()
    assert any("head" in name for name in results[0][3])


def test_a_critic_of_a_whole_reward_model_shares_its_weights():
    """The rule: the policy's base. A reward model that was trained whole: its own."""
    policy = adapted(tiny("qwen2", torch.float32), base="base", base_hash="x")
    whole = freeze(ScalarModel(tiny("qwen2", torch.float32, seed=3), std=0.3))
    cfg = types.SimpleNamespace(lora_rank=3, lora_alpha=6.0, gradient_checkpointing=False,
                                compile=False)
    for reward_model, base in ((None, policy), (whole, whole.trunk)):
        critic = make_critic(cfg, policy, reward_model)
        shared = distinct(critic).keys() & distinct(base).keys()
        names = {name for name, p in critic.named_parameters() if id(p) not in shared}
        assert names == {name for name, p in critic.named_parameters() if p.requires_grad}
        assert names == {"head.weight", "head.bias", *(f"{name}.lora_{x}" for x in "AB"
                                                      for name in layers(critic))}
    assert torch.equal(critic.value(TOKENS), whole.value(TOKENS))


# ----------------------------------------------------------------------------- runs and checkpoints


@pytest.fixture(scope="session")
def lora_reward(adder):
    """A reward model that is adapters and a head on out/sft."""
    done = script("reward.py", *PAIRS, *SHORT, "--data", "rows.jsonl", "--out", "out/lora_reward",
                  "--lora_rank", 4, cwd=adder)
    assert done.returncode == 0, done.stderr
    return adder / "out/lora_reward"


def flags(name, adder, reward_model):
    args = quick(name, adder, reward_model)
    if name == "sft.py":
        args = ["--init", adder / "out/sft", *args[args.index("--steps"):]]
    return [*args, "--lora_rank", 4, "--lr", 3e-3]


def slow_but(*quick_names):
    return [pytest.param(name, marks=[] if name in quick_names else pytest.mark.slow)
            for name in SCRIPTS]


@pytest.mark.parametrize("name", slow_but("sft.py", "reward.py", "grpo.py"))
def test_a_run_trains_adapters_alone_and_its_checkpoint_names_the_base(
        name, adder, reward_model, run, tmp_path):
    args = flags(name, adder, reward_model)
    assert run(name, *args, "--out", "out") is None
    data = read_checkpoint("out")
    head = {"head.weight", "head.bias"} if name == "reward.py" else set()
    assert all("lora_" in x for x in data["model"].keys() - head)
    assert len(data["model"]) == 4 * 2 + len(head)
    base, _ = load(adder / "out/sft")
    assert data["lora"]["base_hash"] == hash_weights(base)
    assert data["lora"]["base"] == str(adder / "out/sft")
    model, _ = load("out")
    assert lora_of(model) is None and not layers(model)
    trunk = getattr(model, "trunk", model)
    changed = {x for x, p in trunk.state_dict().items() if not torch.equal(p, base.state_dict()[x])}
    assert changed == {f"blocks.0.{x}.weight" for x in
                       ("attention.qkv", "attention.out", "mlp.up", "mlp.down")}


@pytest.mark.parametrize("name", slow_but("ppo.py"))
def test_a_resumed_run_of_adapters_is_the_uninterrupted_one(
        name, adder, reward_model, lora_reward, run, monkeypatch):
    args = flags(name, adder, reward_model)
    if name == "ppo.py":
        args += ["--reward", lora_reward]
    run_whole_and_cut(run, name, args, monkeypatch)
    assert equal(read_checkpoint("cut"), read_checkpoint("whole"))


def test_ppo_on_one_base_is_ppo_of_four_separate_models(adder, lora_reward, run, monkeypatch):
    """To the last digit: the second run has four copies of the base."""
    args = [*flags("ppo.py", adder, None), "--reward", lora_reward]
    assert run("ppo.py", *args, "--out", "one") is None
    for module in (common.checkpoint, common.models):
        monkeypatch.setattr(module, "share_base", copy.deepcopy)
    assert run("ppo.py", *args, "--out", "four") is None
    assert metrics("one") == metrics("four")
    assert equal(read_checkpoint("one")["model"], read_checkpoint("four")["model"])
    assert equal(read_checkpoint("one")["modules"], read_checkpoint("four")["modules"])


def test_adapters_on_adapters_and_a_base_that_moves_with_them(adder, run, tmp_path):
    """--init relative, as most write it: the checkpoint says where the base is from its folder."""
    shutil.copytree(adder / "out/sft", "out/sft")
    more = ["--data", adder / "rows.jsonl", "--steps", 2, "--eval_every", 2, "--batch", 4,
            "--max_new_tokens", 6, "--lora_rank", 2]
    assert run("sft.py", "--init", "out/sft", *more, "--out", "out/a") is None
    assert run("sft.py", "--init", "out/a", *more, "--out", "out/b") is None
    assert read_checkpoint("out/b")["lora"]["base"] == "../a"
    model, _ = load("out/b")
    shutil.move("out", "elsewhere")
    moved, _ = load("elsewhere/b")
    assert equal(model.state_dict(), moved.state_dict())

    # each would rename a base of its adapters, or of those that it starts from
    for rank, out in ((2, "elsewhere/b"), (2, "elsewhere/sft"), (0, "elsewhere/sft")):
        line = run("sft.py", "--init", "elsewhere/b", *more, "--lora_rank", rank,
                   "--out", f"./out/../{out}")
        assert f"--out {out}" in line and "base" in line
    shutil.copytree("elsewhere/sft", "kept")
    save_checkpoint("elsewhere/sft", tiny(dtype=torch.float32), make_tokenizer())
    with pytest.raises(InputError, match="elsewhere/a.*other weights"):
        load("elsewhere/a")
    shutil.rmtree("elsewhere/sft")
    with pytest.raises(InputError, match="elsewhere/a.*elsewhere/sft, which does not exist"):
        load("elsewhere/b")


@pytest.mark.slow
def test_a_critic_does_not_resume_on_another_base(adder, reward_model, run):
    """A reward model that was trained whole is the base of the critic's adapters."""
    shutil.copytree(reward_model, "reward")
    args = [*flags("ppo.py", adder, None), "--reward", "reward", "--out", "out"]
    assert run("ppo.py", *args) is None
    assert run("ppo.py", "--out", "out", "--resume", "--steps", 7) is None
    model, tokenizer = load("reward")
    with torch.no_grad():
        model.trunk.blocks[0].mlp.up.weight.mul_(1.01)
    save_checkpoint("reward", model, tokenizer)
    assert "--reward" in run("ppo.py", "--out", "out", "--resume", "--steps", 8)


@pytest.mark.parametrize("change", [
    dict(base=5), dict(rank="4"), dict(rank=0), dict(rank=8), dict(rank=10 ** 9), dict(alpha="x"),
    dict(alpha=float("nan")), dict(alpha=0.0), dict(more=1), dict(base_hash=None)])
def test_nonsense_about_adapters_ends_in_one_line(change, small, tmp_path):
    model, tokenizer = load(small)
    save_checkpoint(tmp_path, add_adapters(model, 4, 8.0, base=str(small), base_hash="x"),
                    tokenizer)
    data = torch.load(tmp_path / "ckpt.pt")
    torch.save(data | {"lora": data["lora"] | change}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="ckpt.pt.*damaged"):
        load(tmp_path)


def test_a_base_of_another_shape_and_a_link_to_a_run(adder, run, tmp_path):
    shutil.copytree(adder / "out/sft", "disk/sft")
    more = ["--data", adder / "rows.jsonl", "--steps", 2, "--eval_every", 2, "--batch", 4,
            "--max_new_tokens", 6, "--lora_rank", 2]
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert run("sft.py", "--init", "disk/sft", *more, "--out", "runs/a") is None
    for path in ("runs/a", "disk/a"):
        load(path)
    data = torch.load("disk/a/ckpt.pt")
    data["config"]["norm_eps"] = 1e-3
    torch.save(data, "disk/a/ckpt.pt")
    with pytest.raises(InputError, match="another shape"):
        load("disk/a")


@pytest.mark.slow
def test_a_run_does_not_resume_on_another_base(adder, run):
    shutil.copytree(adder / "out/sft", "base")
    args = [*flags("dapo.py", adder, None), "--init", "base", "--out", "out"]
    assert run("dapo.py", *args) is None
    model, tokenizer = load("base")
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(1.01)
    save_checkpoint("base", model, tokenizer)
    assert "--init" in run("dapo.py", "--out", "out", "--resume", "--steps", 9)
    assert "other weights" in run("grpo.py", *args, "--init", "out", "--out", "new")


@pytest.mark.parametrize("args, said", [
    (["sft.py", "--lora_rank", 4], "--lora_rank 4"),
    (["grpo.py", "--lora_rank", 4, "--ref_every", 2], "--ref_every"),
    (["grpo.py", "--lora_rank", 4, "--lora_alpha", 0], "--lora_alpha"),
    (["grpo.py", "--lora_rank", -1], "--lora_rank"),
    (["grpo.py", "--lora_alpha", 7], "--lora_alpha"),
])
def test_what_adapters_cannot_do_is_refused(args, said, run):
    assert said in run(*args)


def test_a_resume_with_another_rank_or_alpha_is_refused(adder, run):
    assert run("grpo.py", *flags("grpo.py", adder, None), "--out", "out") is None
    for flag, x in (("--lora_alpha", 64), ("--lora_rank", 8), ("--lora_rank", 0)):
        line = run("grpo.py", "--out", "out", "--resume", "--steps", 9, flag, x)
        assert line.startswith(f"grpo.py: out: {flag} stays")
    settings = json.loads(open("out/config.json").read())
    assert settings["lora_rank"] == 4 and settings["lora_alpha"] == 32.0
