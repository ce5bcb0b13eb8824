"""What the tests share: tiny models of every family, with weights large enough that a wrong logit shows."""
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from model import GPT, GPTConfig  # noqa: E402

FAMILIES = {
    "gpt2": dict(norm="layer", positions="learned", mlp="gelu", bias=True),
    "llama3": dict(heads=4, kv_heads=2, tied=False, rope_base=500_000.0, rope_scaling=(8.0, 1.0, 4.0, 16.0)),
    "qwen2": dict(heads=4, kv_heads=1, qkv_bias=True),
    "qwen3": dict(heads=4, kv_heads=2, head_dim=12, qk_norm=True),
}


def tiny(family="llama3", dtype=torch.float64, seed=0, **more):
    """A model of 2 layers and width 32 whose logits have a standard deviation of at least 1, and whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab=23, context=48, layers=2, width=32, heads=2, stop=(3, 4, 5, 18, 19, 20, 21, 22)) | FAMILIES[family] | more)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.4 if "embedding" in name or "head" in name else 0.2) + ("norm" in name and p.dim() == 1))
        logits = model(torch.randint(0, model.cfg.vocab, (4, 20))) @ model.unembedding.T
    assert logits.std() >= 1, logits.std()
    return model


def naive_logp(model, tokens, temperature=1.0):
    """log-prob of every token by the textbook, (B, T), 0 at t = 0: all logits at once."""
    logp = ((model(tokens) @ model.unembedding.T).to(torch.promote_types(model.unembedding.dtype, torch.float32)) / temperature).log_softmax(-1)
    picked = logp[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros_like(picked[:, :1]), picked], 1)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PROMPTS = [[7, 8, 9], [10], [3, 4, 11, 12, 13, 14, 15], [16, 17], [3]]      # ragged; some hold stop ids, one is nothing else


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
