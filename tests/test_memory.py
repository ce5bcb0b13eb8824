"""What a run holds in memory: the estimate against what is really allocated, and ways to hold less.

    python -m pytest tests/test_memory.py
"""
import copy
import os
import re
import types

import pytest
import torch

import common.train
import dapo
import dpo
import grpo
import memory
import model as M
import ppo
from common.lora import add_adapters, share_base, train_adapters
from common.memory import estimate_memory, peak_memory
from common.models import make_reference
from common.optimizers import Optimizers, make_optimizer
from common.train import default_micro_batch_tokens, eval_batch_size, freeze
from conftest import FAMILIES, PROMPTS, ROOT, bf16_devices, gradients, tiny
from model import GPT, GPTConfig, ScalarModel

CPU = torch.device("cpu")


def size(tensors):
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def kept_for_backward(model, tokens):
    """Bytes that autograd keeps for the backward pass, without the weights, each tensor once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x       # held, or another tensor gets its address
        return x

    with M.autocast(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens)
    for address in weights & kept.keys():
        del kept[address]
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("bf16", (False, True))
def test_the_estimate_counts_what_is_allocated(family, bf16, monkeypatch, capsys):
    """Weights, gradients, moments, frozen copy and cache to the byte, activations within 3%."""
    bf16_devices(monkeypatch, {"cpu"} if bf16 else set())
    shape = dict(vocab_size=100, block_size=256, n_layer=4, n_embd=128, n_head=4,
                 intermediate_size=320)
    model = GPT(GPTConfig(**shape | FAMILIES[family]))
    optimizer = make_optimizer(model, 1e-3, muon_lr=1e-3)
    reference = freeze(copy.deepcopy(model))
    tokens = torch.randint(100, (4, 128))
    responses, longest = 200, 1000
    plan = estimate_memory(CPU, optimizer, [model], [reference, None], 512, responses, longest)
    assert capsys.readouterr().out.count("\n") == 1

    with M.autocast(model):
        logp, _ = model.token_logp(tokens)
    logp.sum().backward()
    optimizer.step()
    assert plan["weights"] == size(model.parameters())
    assert plan["gradients"] == size(p.grad for p in model.parameters())
    moments = []
    for part in optimizer.parts:
        for state in part.state.values():
            moments += [x for x in state.values() if torch.is_tensor(x) and x.dim()]
    assert plan["moments"] == size(moments)
    assert plan["frozen"] == size(reference.parameters())
    assert plan["frozen"] < plan["weights"] * (0.6 if bf16 else 1.01)

    caches = []
    expand_prompts = M.KVCache.expand_prompts

    def expand_and_measure(self, length, group_size):
        expand_prompts(self, length, group_size)
        caches.append(sum(size(pair) for pair in self.layers))

    monkeypatch.setattr(M.KVCache, "expand_prompts", expand_and_measure)
    model.generate(PROMPTS, group_size=3, max_new_tokens=9)
    cache_tokens = len(PROMPTS) * 3 * M.KVCache.BLOCK["cpu"]
    assert plan["cache"] / (responses * longest) == caches[0] / cache_tokens

    casts = 0                                          # the estimate counts them apart
    if bf16:
        casts = sum(p.numel() * 2 for p in model.blocks.parameters() if p.dim() == 2)
    whole = kept_for_backward(model, tokens) - casts
    assert abs(plan["activations"] / whole - 1) < 0.03
    model.gradient_checkpointing = True
    inputs = kept_for_backward(model, tokens)          # and in backward one block at a time
    again = estimate_memory(CPU, optimizer, [model], micro_batch_tokens=512)["activations"]
    assert abs(again / (inputs + whole / 4) - 1) < 0.1 and again < 0.5 * whole


def test_the_documented_plan_of_whole_models_and_adapters_is_the_one_that_runs_print(
        monkeypatch):
    """The table of docs/data_and_models.md, whole / LoRA, with the smallest card of each."""
    monkeypatch.setattr(M, "BF16_MIN_WIDTH", dict(M.BF16_MIN_WIDTH))
    with open(os.path.join(ROOT, "docs/data_and_models.md"), encoding="utf-8") as f:
        rows = re.findall(r"^\| `(\w+\.py)` \| (.* / .*) \|$", f.read(), re.M)
    plans = memory.peaks(16)
    assert {name for name, _ in rows} == set(plans)
    for name, cells in rows:
        for cell, both in zip(cells.split(" | "), plans[name].values(), strict=True):
            said = re.findall(r"([\d.]+) \((\d+|-)\)", cell)
            assert said == [(f"{x:.1f}", str(memory.smallest_card(x) or "-")) for x in both]


@pytest.mark.parametrize("bf16", (False, True))
def test_the_estimate_counts_a_shared_base_once(family, bf16, monkeypatch, capsys):
    """Under LoRA: policy, reference, reward model and critic. Gradients and moments are those of
    adapters and head."""
    bf16_devices(monkeypatch, {"cpu"} if bf16 else set())
    shape = dict(vocab_size=100, block_size=256, n_layer=4, n_embd=128, n_head=4,
                 intermediate_size=320)
    policy = add_adapters(freeze(GPT(GPTConfig(**shape | FAMILIES[family]))), 8, 16.0)
    critic = train_adapters(ScalarModel(share_base(policy)))
    reward_model = share_base(critic).requires_grad_(False)
    frozen = [make_reference(policy), reward_model]
    optimizer = Optimizers(*make_optimizer(policy, 1e-3).parts, *make_optimizer(critic, 1e-3).parts)
    tokens = torch.randint(100, (4, 128))
    plan = estimate_memory(CPU, optimizer, [policy, critic], frozen, 512)
    assert capsys.readouterr().out.count("\n") == 1

    with M.autocast(policy):
        logp, _ = policy.token_logp(tokens)
        value = critic.value(tokens)
    (logp.sum() + value.sum()).backward()
    optimizer.step()
    trained = {id(p): p for model in (policy, critic) for p in model.parameters()}
    assert plan["weights"] == size(trained.values())
    whole = {id(p): p for model in (policy, critic, *frozen) for p in model.parameters()}
    assert plan["weights"] + plan["frozen"] == size(whole.values())
    grads = [p.grad for p in trained.values() if p.grad is not None]
    assert plan["gradients"] == size(grads)
    moments = []
    for part in optimizer.parts:
        for state in part.state.values():
            moments += [x for x in state.values() if x.dim()]
    assert plan["moments"] == size(moments) == 2 * size(grads)
    casts = 0
    if bf16:
        casts = sum(p.numel() * 2 for p in policy.parameters() if p.requires_grad)
    kept = kept_for_backward(policy, tokens) - casts
    assert abs(plan["activations"] / kept - 1) < 0.03
    policy.gradient_checkpointing = True
    inputs = kept_for_backward(policy, tokens)
    again = estimate_memory(CPU, optimizer, [policy], micro_batch_tokens=512)["activations"]
    assert abs(again / (inputs + kept / 4) - 1) < 0.1


def test_an_evaluation_at_a_large_vocabulary_takes_fewer_prompts_at_a_time(monkeypatch):
    """A row holds its cache, and 12 bytes for every token of the vocabulary while it is sampled:
    5 GB for 3,000 rows at 151,936."""
    monkeypatch.setattr(common.train, "EVAL_BATCH_BYTES", {"cpu": 2 ** 30})
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=151_936, n_layer=1, n_embd=32, n_head=1, n_kv_head=1))
    model = types.SimpleNamespace(cfg=model.cfg, device=CPU)
    row = 12 * 151_936 + 40 * 2 * 32 * 4
    for samples in (1, 8):
        n = eval_batch_size(model, longest=40, samples=samples)
        assert n * samples * row <= 2 ** 30 < (n + 1) * samples * row
    assert eval_batch_size(model, 40, samples=10 ** 6) == 1
    monkeypatch.setattr(common.train, "EVAL_BATCH_TOKENS", 400)
    assert eval_batch_size(model, 40) == 10


def test_gradient_checkpointing_gives_the_same_gradient(family):
    model = tiny(family)
    tokens = torch.randint(0, 23, (3, 20))

    def logp(model):
        return model.token_logp(tokens)[0]

    def value(model):
        return ScalarModel(model, std=0.0).double().value(tokens)

    for read in (logp, value):
        found = []
        for model.gradient_checkpointing in (False, True):
            model.zero_grad()
            read(model).sum().backward()
            found.append(gradients(model))
        plain, recomputed = found
        assert all(torch.equal(x, recomputed[name]) for name, x in plain.items())


def test_frozen_matrices_in_bf16_give_the_products_that_autocast_gives(family, monkeypatch):
    """Exactly those for weights that came in bf16; for others the embedding is rounded besides,
    which adds no more than bf16's own noise."""
    model = tiny(family, torch.float32)
    tokens = torch.randint(0, 23, (3, 20))

    @torch.no_grad()
    def logp(model):
        with M.autocast(model):
            return model.token_logp(tokens)[0]

    exact = logp(model)
    bf16_devices(monkeypatch, {"cpu"})
    noise = (logp(model) - exact).abs().max()
    assert noise > 0
    for came_in_bf16 in (False, True):
        if came_in_bf16:
            for p in model.parameters():
                p.data = p.data.bfloat16().float()
        frozen = freeze(copy.deepcopy(model))
        for name, p in frozen.named_parameters():
            in_a_product = p.dim() == 2 and name not in ("embedding.weight", "position.weight")
            assert p.dtype == (torch.bfloat16 if in_a_product else torch.float32), name
            assert not p.requires_grad
        assert torch.equal(logp(frozen), logp(model))          # or the KL would not start at 0
    moving = freeze(copy.deepcopy(model), bf16=False)
    assert all(p.dtype == torch.float32 for p in moving.parameters())
    reward_model = freeze(ScalarModel(copy.deepcopy(model), std=1.0))
    with M.autocast(reward_model):
        value, score = reward_model.value_and_score(tokens, torch.ones(3, 20))
    assert reward_model.head.weight.dtype == value.dtype == score.dtype == torch.float32


QWEN = dict(vocab_size=151_936, block_size=32_768, n_kv_head=2, qkv_bias=True, rope_theta=1e6)
SMALL = dict(n_layer=24, n_embd=896, n_head=14, intermediate_size=4864)    # Qwen2.5-0.5B
LARGE = dict(n_layer=28, n_embd=1536, n_head=12, intermediate_size=8960)   # Qwen2.5-1.5B


@pytest.mark.parametrize("script, shape, gib, peak", [
    (ppo, SMALL, 24, 21.8), (grpo, SMALL, 24, 13.3), (dapo, SMALL, 24, 12.1),
    (dpo, SMALL, 24, 11.7), (grpo, LARGE, 48, 36.7), (dpo, LARGE, 48, 32.0)])
def test_pretrained_models_fit_their_cards_by_the_estimate(script, shape, gib, peak, monkeypatch,
                                                           capsys):
    """With the defaults for pretrained models, prompts of up to 300 tokens and responses of 512.
    `peak` in GiB is what the documentation says."""
    card = types.SimpleNamespace(total_memory=gib * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = torch.device("cuda")
    cfg = script.Config(**script.PRETRAINED)
    with torch.device("meta"):
        policy = GPT(GPTConfig(**QWEN | shape))
        reference = GPT(GPTConfig(**QWEN | shape))
        critic = ScalarModel(GPT(GPTConfig(**QWEN | shape)))
    policy.gradient_checkpointing = cfg.gradient_checkpointing
    critic.trunk.gradient_checkpointing = cfg.gradient_checkpointing
    bf16_devices(monkeypatch, {"cuda", "meta"})
    freeze(reference)
    trained, frozen = [policy], []
    if script is ppo:
        trained, frozen = [policy, critic], [reference, copy.deepcopy(reference)]   # reward model
    if script is grpo:
        frozen = [reference]
    optimizer = Optimizers(*[part for x in trained for part in make_optimizer(x, 1e-6).parts])
    responses = getattr(cfg, "prompts", 0) * getattr(cfg, "group_size", 1)
    longest = 300 + cfg.max_new_tokens
    plan = estimate_memory(cuda, optimizer, trained, frozen, 0, responses, longest)
    assert "too much" not in capsys.readouterr().out
    total = peak_memory(plan)
    assert total < gib * 2 ** 30 and round(total / 2 ** 30, 1) == peak

    policy.gradient_checkpointing = False
    tokens = default_micro_batch_tokens(cuda)
    estimate_memory(cuda, optimizer, trained, [], 4 * tokens, responses, longest)
    line = capsys.readouterr().out
    assert "--gradient_checkpointing" in line and f"--micro_batch_tokens {tokens}" in line
