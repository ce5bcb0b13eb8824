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


def estimate_memory(device, optimizer, trained, frozen=(), micro_batch_tokens=0, responses=0,
                    longest=0):
    """Print what a run will hold, and return it: {part: bytes}.

    frozen may contain None. A rollout has `responses` sequences of up to `longest` tokens.
    Activations are those of one micro-batch of the largest model: per token, the input of every
    norm and product of a block, or only the block's input where it is recomputed.
    """
    counted = set()

    def size(params):
        """Bytes of the parameters that no model before has; models may share a base."""
        new = {id(p): p for p in params if id(p) not in counted}
        counted.update(new)
        return sum(p.numel() * p.element_size() for p in new.values())

    learning = [p for model in trained for p in model.parameters() if p.requires_grad]
    in_lora = lora_of(trained[0]) is not None
    bf16 = uses_bf16(trained[0])
    e = 2 if bf16 else 4                               # bytes per activation
    cfg = trained[0].cfg
    budget = micro_batch_tokens or default_micro_batch_tokens(device)
    C, D, H, K, M = cfg.n_embd, cfg.head_dim, cfg.n_head, cfg.n_kv_head, cfg.intermediate_size
    # an RMSNorm that learns also keeps its normalised input
    scaled = 4 if cfg.norm == "rms" and not in_lora else 0
    norms = 2 * C * (4 + scaled)
    heads = (3 if cfg.positions == "rope" else 2) * (H + K) * D             # q, k, v and the result
    hidden = (4 if cfg.mlp == "swiglu" else 2) * M
    block = norms + e * (2 * C + heads + hidden) + (H + K) * D * cfg.qk_norm * (8 + scaled - 2 * e)
    if in_lora:
        block += 4 * e * lora_of(trained[0])["rank"]   # what A gives in four layers
    if trunk_of(trained[0]).gradient_checkpointing:
        kept = cfg.n_layer * 4 * C + block
    else:
        kept = cfg.n_layer * block

    moments = 0
    for part in optimizer.parts:
        copies = 1 if isinstance(part, torch.optim.Muon) else 2
        for group in part.param_groups:
            moments += sum(p.numel() * 4 * copies for p in group["params"])
    weights = size(p for model in trained for p in model.parameters())
    cast = sum(p.numel() for p in trained[0].parameters() if p.requires_grad)
    unembedding = trunk_of(trained[0]).unembedding
    logits = 4 * unembedding.numel() if unembedding.requires_grad else 0    # its gradient
    if bf16 and unembedding.dtype == torch.float32:
        logits += 2 * unembedding.numel()                                   # and a copy
    per_token = cache_bytes(trained[0])
    eval_tokens = min(EVAL_BATCH_TOKENS, eval_byte_limit(device) // per_token)
    tile = min(LinearLogp.TILE[device.type], budget * cfg.vocab_size)
    plan = {
        "weights": weights,
        "gradients": sum(p.numel() * p.element_size() for p in learning),
        "moments": moments,
        "frozen": size(p for model in frozen if model is not None for p in model.parameters()),
        "bf16 copies": 2 * cast if bf16 else 0,
        "cache": max(responses * longest, eval_tokens) * per_token,
        "sampling": responses * sampling_bytes(trained[0]),
        "activations": budget * (norms // 2 + kept),
        "logits": 2 * 4 * tile + logits,
    }
    peak = peak_memory(plan)
    unit, scale = ("GiB", 2 ** 30) if peak > 2 ** 30 else ("MiB", 2 ** 20)
    parts = ", ".join(f"{name} {x / scale:.1f}" for name, x in plan.items() if x)
    line = f"memory in {unit}: {parts}; peak about {peak / scale:.1f}"
    saved = (plan["gradients"] + plan["moments"]) / scale      # weights are as large as gradients
    if device.type == "cuda" and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device).total_memory
        line += f" of {total / scale:.1f}"
        if peak > total:
            line += ": too much; try --gradient_checkpointing and "
            line += f"--micro_batch_tokens {budget // 4}"
    print(f"{line}; a checkpoint takes {saved:.1f}, weights and moments")
    return plan
