"""What only a CUDA device can show; skipped elsewhere.   python -m pytest tests/test_cuda.py"""
import copy
import warnings

import pytest
import torch

import model as M
from common.evaluate import repeated_uniform
from common.models import setup
from common.optimizers import make_optimizer
from common.train import compute_logp, configure_blocks, micro_batches
from conftest import bf16_devices
from grpo import Config, grpo_loss
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PROMPTS = [list(range(40, 40 + n)) for n in (3, 9, 17, 30)]


@pytest.fixture
def model():
    setup(Config(seed=0))
    model = GPT(GPTConfig(vocab_size=512, block_size=256, n_layer=3, n_embd=128, n_head=4,
                          n_kv_head=2, stop_token_ids=tuple(range(24))))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.1)          # logits that differ, blocks that are not 0
    return model.cuda()


def generate(model, **more):
    uniform = repeated_uniform(8 * len(PROMPTS), 150, seed=0)
    return model.generate(PROMPTS, 8, 150, uniform=uniform, **more)


def test_float32_on_the_gpu_is_float32_on_the_cpu(model, monkeypatch):
    bf16_devices(monkeypatch, set())
    tokens, mask, sampled = generate(model)
    cpu, _ = copy.deepcopy(model).cpu().token_logp(tokens.cpu(), mask.cpu())
    scored, _ = model.token_logp(tokens, mask)
    torch.testing.assert_close(sampled.cpu(), cpu, rtol=0, atol=2e-4)
    torch.testing.assert_close(scored.cpu(), cpu, rtol=0, atol=2e-4)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("bf16", (False, True))
def test_a_replayed_graph_samples_what_eager_steps_sample(model, bf16, temperature, monkeypatch):
    bf16_devices(monkeypatch, {"cuda"} if bf16 else set())
    graph = generate(model, temperature=temperature)
    monkeypatch.setattr(M, "capture_cuda_graph", lambda step, device: step)
    eager = generate(model, temperature=temperature)
    for a, b in zip(graph, eager):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_in_bf16_the_sampler_and_the_scorer_agree_to_its_rounding(model):
    tokens, mask, sampled = generate(model)
    with M.autocast(model):
        scored, _ = model.token_logp(tokens, mask)
    gap = (sampled - scored).abs()[mask > 0]
    assert 0 < gap.mean() < 0.02 and gap.max() < 0.3
    exact, _ = model.token_logp(tokens, mask)
    assert (exact - scored).abs().max() > 1e-3         # bf16 was at work
    assert all(p.dtype == torch.float32 for p in model.parameters())


def waits(f):
    """How often f waits for the GPU, by torch's sync debug mode."""
    f()                                                # libraries are loaded, kernels tuned
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
    """Where nothing ends, 128 steps are run: a look every 8, a few waits at both ends."""
    def decode():
        model.generate(PROMPTS, 8, 128, stop_token_ids=[511])

    assert waits(decode) < 128 / 8 + 16


def test_an_optimiser_step_waits_at_most_once(model):
    tokens, mask, _ = generate(model)
    mask_cpu = mask.cpu()
    optimizer = make_optimizer(model, 1e-4)
    adv = torch.randn(len(tokens), device="cuda")
    old_logp = compute_logp(model, tokens, mask_cpu)
    every_row = torch.arange(len(tokens))

    def step():
        optimizer.zero_grad()
        for rows, width, index in micro_batches(mask_cpu, every_row, 2000, tokens.device):
            with M.autocast(model):
                logp, _ = model.token_logp(tokens[rows, :width], index=index)
            old = old_logp[rows, :width]
            loss, _ = grpo_loss(logp, old, old, adv[rows], mask[rows, :width], 0.2, 0.02,
                                n=len(tokens))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    assert waits(step) <= 1


def test_compiled_blocks_give_the_same_gradients(model, monkeypatch):
    bf16_devices(monkeypatch, set())
    tokens = torch.randint(24, 512, (4, 60), device="cuda")
    gradients = []
    for compile in (False, True):
        configure_blocks(model, False, compile)
        model.zero_grad()
        model.token_logp(tokens)[0].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
