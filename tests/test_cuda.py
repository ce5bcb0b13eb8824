"""What only a CUDA device can show; skipped elsewhere.   python -m pytest tests/test_cuda.py"""
import copy
import warnings

import pytest
import torch

import model as M
from model import GPT, GPTConfig, frozen_logp, make_optimizer, micro_batches, set_blocks
from grpo import grpo_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PROMPTS = [list(range(40, 40 + n)) for n in (3, 9, 17, 30)]


@pytest.fixture
def model():
    M.setup(0)
    model = GPT(GPTConfig(vocab=512, context=256, layers=3, width=128, heads=4, kv_heads=2, stop=tuple(range(24))))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.1)                             # logits that differ, and blocks that do something
    return model.cuda()


def seeded(model, **more):
    return model.generate(PROMPTS, 8, 150, generator=torch.Generator("cuda").manual_seed(0), **more)


def test_float32_on_the_gpu_is_float32_on_the_cpu(model, monkeypatch):
    monkeypatch.setattr(M, "BF16", set())
    tokens, mask, logp = seeded(model)
    cpu, _ = copy.deepcopy(model).cpu().token_logp(tokens.cpu(), mask.cpu())
    torch.testing.assert_close(logp.cpu(), cpu, rtol=0, atol=2e-4)
    torch.testing.assert_close(model.token_logp(tokens, mask)[0].cpu(), cpu, rtol=0, atol=2e-4)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("bf16", (False, True))
def test_a_replayed_graph_samples_what_eager_steps_sample(model, bf16, temperature, monkeypatch):
    monkeypatch.setattr(M, "BF16", {"cuda"} if bf16 else set())
    graph = seeded(model, temperature=temperature)
    monkeypatch.setattr(M, "replayed", lambda step, device: step)
    for a, b in zip(graph, seeded(model, temperature=temperature)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_in_bf16_the_sampler_and_the_scorer_agree_to_its_rounding(model):
    tokens, mask, logp = seeded(model)
    scored, _ = model.token_logp(tokens, mask)
    gap = (logp - scored).abs()[mask > 0]
    assert gap.mean() < 0.02 and gap.max() < 0.3
    assert all(p.dtype == torch.float32 for p in model.parameters())


def waits(f):
    """How often f waits for the GPU, by torch's sync debug mode."""
    f()                                                                      # warm-up: libraries are loaded, kernels tuned
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            f()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in seen)


def test_decoding_does_not_wait_for_every_token(model):
    """Tokens that end nothing, so that 128 steps are run: a look every 8, and a few at the beginning and at the end."""
    assert waits(lambda: model.generate(PROMPTS, 8, 128, stop=[511])) < 128 / 8 + 16


def test_an_optimiser_step_waits_at_most_once(model):
    tokens, mask, _ = seeded(model)
    host, optimizer, adv = mask.cpu(), make_optimizer(model, 1e-4), torch.randn(len(tokens), device="cuda")
    old, _ = frozen_logp(model, tokens, host, 1.0, 0)

    def step():
        optimizer.zero_grad()
        for j, t, at in micro_batches(host, torch.arange(len(tokens)), 2000, tokens.device):
            logp, _ = model.token_logp(tokens[j, :t], None, 1.0, at)
            grpo_loss(logp, old[j, :t], old[j, :t], adv[j], mask[j, :t], 0.2, 0.02, len(tokens))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert waits(step) <= 1


def test_compiled_blocks_give_the_same_gradients(model, monkeypatch):
    monkeypatch.setattr(M, "BF16", set())
    tokens, grads = torch.randint(24, 512, (4, 60), device="cuda"), []
    for compile in (False, True):
        set_blocks(model, False, compile)
        model.zero_grad()
        model.token_logp(tokens)[0].sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
