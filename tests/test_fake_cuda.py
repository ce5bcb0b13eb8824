"""The CUDA code where there is no GPU, on a fake device (fake_cuda.py): no
operation mixes devices, nothing waits inside a graph, and a graph samples what eager steps sample.

    python -m pytest tests/test_fake_cuda.py
"""
import copy

import pytest
import torch

import model as M
from common.evaluate import repeated_uniform
from common.lora import add_adapters
from common.models import make_reference
from common.optimizers import make_optimizer
from common.train import compute_logp, freeze, micro_batches
from conftest import PROMPTS, SCRIPTS, bf16_devices, quick, tiny
from grpo import grpo_loss
from fake_cuda import FakeCuda

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """The device, empty caches around it, and graphs of a few columns and rows."""
    monkeypatch.setattr(M.KVCache, "BLOCK", {"cpu": 32, "cuda": 6})
    monkeypatch.setattr(M, "KEEP_ROWS", {"cpu": 0, "cuda": 4})
    M.rope_table.cache_clear()
    M.capture_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    M.rope_table.cache_clear()
    M.capture_stream.cache_clear()


@pytest.mark.parametrize("temperature", (0.0, 1.5))
def test_replayed_graphs_sample_what_the_cpu_samples(gpu, family, temperature, monkeypatch):
    """In float32. Graphs are captured anew where rows are dropped and where the cache grows."""
    bf16_devices(monkeypatch, set())
    model = tiny(family, torch.float32)
    uniform = repeated_uniform(4 * len(PROMPTS), 20, seed=0)
    expected = model.generate(PROMPTS, 4, 20, temperature, uniform=uniform)
    with gpu:
        found = copy.deepcopy(model).to(CUDA).generate(PROMPTS, 4, 20, temperature, uniform=uniform)
        assert all(x.device.type == "cuda" for x in found)
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert gpu.captures > 1


def test_a_rollout_and_its_update_are_those_of_the_cpu(gpu, family, monkeypatch):
    """In float32: log-probs and gradients. In bf16 sampler and scorer agree to its rounding, with
    the output matrix padded to a multiple of 64 rows."""
    bf16_devices(monkeypatch, set())
    model = tiny(family, torch.float32)
    uniform = repeated_uniform(4 * len(PROMPTS), 20, seed=0)
    tokens, mask, logp = model.generate(PROMPTS, 4, 20, 1.5, uniform=uniform)
    model.token_logp(tokens, mask, 1.5)[0].sum().backward()
    with gpu:
        twin = copy.deepcopy(model).to(CUDA)
        twin.zero_grad()
        scored = compute_logp(twin, tokens.to(CUDA), mask, 1.5)
        torch.testing.assert_close(scored.cpu(), logp, rtol=0, atol=1e-4)
        twin.token_logp(tokens.to(CUDA), mask.to(CUDA), 1.5)[0].sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-3, msg=name)

        bf16_devices(monkeypatch, {"cuda"})
        assert M.sampling_unembedding(twin).shape == (64, model.cfg.n_embd)          # of 23 tokens
        tokens, mask, sampled = twin.generate(PROMPTS, 4, 20, 1.5, uniform=uniform)
        scored = compute_logp(twin, tokens, mask.cpu(), 1.5)
        error = (sampled - scored).abs().sum() / mask.sum()
        assert 0 < error.item() < 0.05
        assert int(tokens.max()) < model.cfg.vocab_size


def test_adapters_are_captured_in_the_graph(gpu, family, monkeypatch):
    """LoRA on a base whose matrices are bf16: sampler and scorer agree to bf16's rounding."""
    bf16_devices(monkeypatch, {"cuda"})
    model = tiny(family, torch.float32)
    uniform = repeated_uniform(4 * len(PROMPTS), 20, seed=0)
    with gpu:
        freeze(model, device=CUDA)
        model = add_adapters(model, 3, 6.0).to(CUDA)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.05)
        tokens, mask, sampled = model.generate(PROMPTS, 4, 20, 1.5, uniform=uniform)
        scored = compute_logp(model, tokens, mask.cpu(), 1.5)
        error = (sampled - scored).abs().sum() / mask.sum()
        assert 0 < error.item() < 0.05
        base = compute_logp(make_reference(model), tokens, mask.cpu(), 1.5)
        assert ((base - scored).abs().sum() / mask.sum()).item() > 2 * error.item()


def test_decoding_waits_once_in_eight_tokens(gpu):
    model = tiny("llama3", torch.float32, block_size=200)
    with gpu:
        model = model.to(CUDA)
        gpu.waits.clear()
        _, mask, _ = model.generate(PROMPTS, 4, 160, stop_token_ids=[-1])
        assert mask.sum().item() == 4 * len(PROMPTS) * 160
    assert gpu.waits.count("nonzero") == 160 // 8 - 1
    assert len(gpu.waits) < 160 / 8 + 14, gpu.waits


def test_an_update_does_not_wait(gpu):
    """But for what the caller reads: micro-batches, loss, clipping and AdamW."""
    model = tiny("qwen3", torch.float32)
    with gpu:
        model = model.to(CUDA)
        tokens, mask, _ = model.generate(PROMPTS, 4, 12)
        mask_cpu, adv = mask.cpu(), torch.randn(len(tokens), device=CUDA)
        optimizer = make_optimizer(model, 1e-3, muon_lr=1e-3)
        gpu.waits.clear()
        old_logp = compute_logp(model, tokens, mask_cpu)
        for rows, width, index in micro_batches(mask_cpu, torch.arange(len(tokens)), 60, CUDA):
            with M.autocast(model):
                logp, _ = model.token_logp(tokens[rows, :width], index=index)
            old = old_logp[rows, :width]
            loss, _ = grpo_loss(logp, old, old, adv[rows], mask[rows, :width], 0.2, 0.1, n=16)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert gpu.waits == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs(name, gpu, adder, reward_model, run):
    with gpu:
        assert run(name, *quick(name, adder, reward_model), "--out", "out") is None


def test_what_cuda_would_refuse_is_refused(gpu, monkeypatch):
    """Or the tests above would show nothing."""
    with gpu:
        x = torch.ones(3, device=CUDA)
        for mix in (lambda: x + torch.ones(3), lambda: torch.ones(3)[x.long()],
                    lambda: torch.where(torch.ones(3) > 0, x, 0.0)):
            with pytest.raises(RuntimeError, match="cuda:0 and on the CPU"):
                mix()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="waits for the GPU in a capture"):
            with torch.cuda.graph(graph, stream=None):
                float(x.sum())


def test_a_graph_replays_on_the_tensors_that_it_was_captured_with(gpu):
    with gpu:
        x, total = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA)
        replay = M.capture_cuda_graph(lambda: total.add_(x) * 2, CUDA)
        total.zero_()
        x.fill_(5.0)
        out = replay()
        assert out.tolist() == [10.0] * 3
        x = torch.zeros(3, device=CUDA)                # another tensor: the graph does not see it
        assert replay() is out and out.tolist() == [20.0] * 3
