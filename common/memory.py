"""
Memory: what a run will hold, and what it has held.
"""
import sys

import torch

from common.lora import lora_of, trunk_of
from common.train import (EVAL_BATCH_TOKENS, cache_bytes, default_micro_batch_tokens,
                          eval_byte_limit, sampling_bytes)
from model import LinearLogp, uses_bf16


def memory_gb():
    """Most memory held so far: the GPU's, or the process's. 0 where neither is known (Windows)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20    # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_memory(plan):
    """Bytes at most, of a plan of estimate_memory: generation and update never overlap."""
    return sum(plan.values()) - min(plan["cache"] + plan["sampling"], plan["activations"])


def activation_bytes(model, tokens):
    """Bytes that the forward of so many tokens keeps for backward: per token, the input of every
    norm and product of a block, or only the block's input where it is recomputed."""
    cfg, lora = model.cfg, lora_of(model)
    e = 2 if uses_bf16(model) else 4                   # bytes per activation
    C, D, H, K, M = cfg.n_embd, cfg.head_dim, cfg.n_head, cfg.n_kv_head, cfg.intermediate_size
    normalised = 0
    if cfg.norm == "rms" and lora is None:             # a trained RMSNorm also keeps its result
        normalised = 4
    norms = 2 * C * (4 + normalised)
    heads = (3 if cfg.positions == "rope" else 2) * (H + K) * D             # q, k, v and the result
    hidden = (4 if cfg.mlp == "swiglu" else 2) * M
    block = norms + e * (2 * C + heads + hidden)
    if cfg.qk_norm:
        block += (H + K) * D * (8 + normalised - 2 * e)
    if lora is not None:
        block += 4 * e * lora["rank"]                  # what A gives in four layers
    kept = cfg.n_layer * block
    if trunk_of(model).gradient_checkpointing:
        kept = cfg.n_layer * 4 * C + block
    return tokens * (norms // 2 + kept)


def logit_bytes(model, device, tokens):
    """Bytes of two tiles of logits, of the gradient of the output matrix and of its bf16 copy."""
    weight = trunk_of(model).unembedding
    tile = min(LinearLogp.TILE[device.type], tokens * model.cfg.vocab_size)
    size = 2 * 4 * tile
    if weight.requires_grad:
        size += 4 * weight.numel()
    if uses_bf16(model) and weight.dtype == torch.float32:
        size += 2 * weight.numel()
    return size


def moment_bytes(optimizer):
    """Bytes of the optimiser's moments: two of AdamW, one of Muon."""
    size = 0
    for part in optimizer.parts:
        copies = 1 if isinstance(part, torch.optim.Muon) else 2
        for group in part.param_groups:
            for p in group["params"]:
                size += 4 * copies * p.numel()
    return size


def distinct_parameters(models):
    """{id: parameter} of models that may share a base; a model may be None."""
    params = {}
    for model in models:
        if model is not None:
            params |= {id(p): p for p in model.parameters()}
    return params


def bytes_of(params):
    return sum(p.numel() * p.element_size() for p in params)


def estimate_memory(device, optimizer, trained, frozen=(), micro_batch_tokens=0, responses=0,
                    longest=0):
    """Print what a run will hold, and return it: {part: bytes}.

    frozen may contain None. A rollout has `responses` sequences of up to `longest` tokens.
    Activations are those of one micro-batch of the first trained model."""
    model = trained[0]
    tokens = micro_batch_tokens or default_micro_batch_tokens(device)
    weights = distinct_parameters(trained)
    others = distinct_parameters(frozen)
    per_token = cache_bytes(model)
    eval_tokens = min(EVAL_BATCH_TOKENS, eval_byte_limit(device) // per_token)
    plan = {
        "weights": bytes_of(weights.values()),
        "gradients": bytes_of(p for p in weights.values() if p.requires_grad),
        "moments": moment_bytes(optimizer),
        "frozen": bytes_of(p for key, p in others.items() if key not in weights),
        "bf16 copies": 0,
        "cache": max(responses * longest, eval_tokens) * per_token,
        "sampling": responses * sampling_bytes(model),
        "activations": activation_bytes(model, tokens),
        "logits": logit_bytes(model, device, tokens),
    }
    if uses_bf16(model):                               # of what is trained, at half its bytes
        plan["bf16 copies"] = bytes_of(p for p in model.parameters() if p.requires_grad) // 2
    peak = peak_memory(plan)
    unit, scale = "MiB", 2 ** 20
    if peak > 2 ** 30:
        unit, scale = "GiB", 2 ** 30
    parts = ", ".join(f"{name} {x / scale:.1f}" for name, x in plan.items() if x)
    line = f"memory in {unit}: {parts}; peak about {peak / scale:.1f}"
    if device.type == "cuda" and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device).total_memory
        line += f" of {total / scale:.1f}"
        if peak > total:
            line += ": too much; try --gradient_checkpointing and "
            line += f"--micro_batch_tokens {tokens // 4}"
    saved = (plan["gradients"] + plan["moments"]) / scale      # trained weights are as large
    print(f"{line}; a checkpoint takes {saved:.1f}, weights and moments")
    return plan
