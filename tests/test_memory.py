"""What a run holds in memory: the plan against what is really allocated, and the ways to hold less.   python -m pytest tests/test_memory.py"""
import copy
import os
import types

import pytest
import torch

import dapo
import dpo
import grpo
import model as M
import ppo
from conftest import FAMILIES, PROMPTS, ROOT, gradients, tiny
from model import GPT, GPTConfig, ScalarModel, freeze, make_optimizer, memory_plan


def kept_for_backward(model, tokens):
    """Bytes that autograd keeps for the backward pass, weights apart, each tensor once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x                          # held on to, or its address would serve another
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens)
    return sum(x.untyped_storage().nbytes() for where, x in kept.items() if where not in own)


@pytest.mark.parametrize("bf16", (False, True))
def test_the_plan_counts_what_is_allocated(family, bf16, monkeypatch, capsys):
    """Weights, gradients, moments, frozen copy and cache to the byte, activations within 3%."""
    monkeypatch.setattr(M, "BF16", {"cpu"} if bf16 else set())
    model = GPT(GPTConfig(**dict(vocab=100, context=256, layers=4, width=128, heads=4, mlp_width=320) | FAMILIES[family]))
    optimizer, reference, cpu = make_optimizer(model, 1e-3, muon_lr=1e-3), freeze(copy.deepcopy(model)), torch.device("cpu")
    tokens, caches = torch.randint(100, (4, 128)), []
    plan = memory_plan(cpu, optimizer, [model], [reference, None], budget=512, rollout=200_000)
    assert capsys.readouterr().out.count("\n") == 1
    model.token_logp(tokens)[0].sum().backward()
    optimizer.step()
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    assert plan["weights"] == plan["gradients"] == size(model.parameters()) == size(p.grad for p in model.parameters())
    state = [x for part in optimizer.parts for s in part.state.values() for x in s.values() if torch.is_tensor(x) and x.dim()]
    assert plan["moments"] == size(state)
    assert plan["frozen"] == size(reference.parameters()) < plan["weights"] * (.6 if bf16 else 1.01)
    prefilled = M.KVCache.prefilled
    monkeypatch.setattr(M.KVCache, "prefilled", lambda self, *more: (prefilled(self, *more), caches.append(size(x for pair in self.layers for x in pair))))
    model.generate(PROMPTS, group=3, max_new=9)
    assert plan["cache"] / 200_000 == caches[0] / (len(PROMPTS) * 3 * M.KVCache.BLOCK["cpu"])

    casts = sum(p.numel() * 2 for block in model.blocks for p in block.parameters() if p.dim() == 2) if bf16 else 0
    whole = kept_for_backward(model, tokens) - casts                      # the plan has them in a place of their own
    assert abs(plan["activations"] / whole - 1) < .03
    model.recompute = True
    inputs = kept_for_backward(model, tokens)                             # and in backward one block more at a time
    again = memory_plan(cpu, optimizer, [model], budget=512)["activations"]
    assert abs(again / (inputs + whole / 4) - 1) < .1 and again < .5 * whole


def test_a_block_that_is_run_again_gives_the_same_gradient(family):
    model = tiny(family)
    tokens = torch.randint(0, 23, (3, 20))
    for head in (lambda x: x.token_logp(tokens)[0].sum(), lambda x: ScalarModel(x, std=0.0).double().value(tokens).sum()):
        grads = []
        for model.recompute in (False, True):
            model.zero_grad()
            head(model).backward()
            grads.append(gradients(model))
        assert all(torch.equal(x, grads[1][name]) for name, x in grads[0].items())


def test_frozen_matrices_in_bf16_give_the_products_that_autocast_gives(family, monkeypatch):
    """Exactly those for weights that came in bf16; else the embedding's rounding is all that differs, no more than bf16's own noise."""
    model = tiny(family, torch.float32)
    tokens = torch.randint(0, 23, (3, 20))
    exact = model.token_logp(tokens)[0].detach()
    monkeypatch.setattr(M, "BF16", {"cpu"})
    noise = (model.token_logp(tokens)[0].detach() - exact).abs().max()
    for rounded in (False, True):
        if rounded:
            for p in model.parameters():
                p.data = p.data.bfloat16().float()
        frozen = freeze(copy.deepcopy(model))
        assert {p.dtype for p in frozen.parameters() if p.dim() == 2} == {torch.bfloat16} and {p.dtype for p in frozen.parameters() if p.dim() == 1} == {torch.float32}
        assert not any(p.requires_grad for p in frozen.parameters())
        with torch.no_grad():
            gap = (frozen.token_logp(tokens)[0] - model.token_logp(tokens)[0]).abs().max()
        assert gap == 0 if rounded else 0 < gap < 2 * noise
    judge = freeze(ScalarModel(copy.deepcopy(model), std=1.0))
    assert judge.head.weight.dtype == torch.float32 and judge.read(tokens, torch.ones(3, 20))[0].dtype == torch.float32


QWEN = dict(vocab=151_936, context=32_768, kv_heads=2, qkv_bias=True, rope_base=1e6)
SMALL = dict(layers=24, width=896, heads=14, mlp_width=4864)              # Qwen2.5-0.5B
LARGE = dict(layers=28, width=1536, heads=12, mlp_width=8960)             # Qwen2.5-1.5B


@pytest.mark.parametrize("script, shape, gib", [(ppo, SMALL, 24), (grpo, SMALL, 24), (dapo, SMALL, 24), (dpo, SMALL, 24), (grpo, LARGE, 48), (dpo, LARGE, 48)])
def test_the_true_shapes_fit_by_plan(script, shape, gib, monkeypatch, capsys):
    """With the defaults for public models, questions of up to 300 tokens and answers of 512; the README's table says the same."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=gib * 2 ** 30))
    cfg, cuda = types.SimpleNamespace(**script.Config().__dict__ | script.PUBLIC), torch.device("cuda")
    with torch.device("meta"):
        policy, reference = (GPT(GPTConfig(**QWEN | shape)) for _ in range(2))
        critic = ScalarModel(GPT(GPTConfig(**QWEN | shape)))
    policy.recompute = critic.trunk.recompute = cfg.recompute
    for p in reference.parameters():
        p.data = p.data.bfloat16()
    models = [policy, critic] if script is ppo else [policy]
    optimizer = M.Optimizers(*[part for x in models for part in make_optimizer(x, 1e-6).parts])
    rollout = getattr(cfg, "prompts", 0) * getattr(cfg, "group", 1) * (300 + cfg.max_new)
    plan = memory_plan(cuda, optimizer, models, {ppo: [reference, reference], grpo: [reference]}.get(script, []), cfg.micro_tokens, rollout)
    said = capsys.readouterr().out
    most = sum(plan.values()) - min(plan["cache"], plan["activations"])
    assert most < gib * 2 ** 30 and "too much" not in said, said
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        row = next(line for line in f if line.startswith(f"| {'0.5B' if shape is SMALL else '1.5B'}, {script.__name__}.py"))
    assert [float(x.strip() or 0) for x in row.split("|")[2:-1]] == [round(x / 2 ** 30, 1) for x in (*plan.values(), most)]
    policy.recompute = False
    memory_plan(cuda, optimizer, models, [], 4 * M.token_budget(cuda), rollout)
    assert "too much; try --recompute and --micro_tokens 16384" in capsys.readouterr().out
