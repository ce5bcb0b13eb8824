"""
Optimisers and learning rates: AdamW, Muon, several that step as one, warm-up and decay.
"""
import math

import torch
import torch.nn as nn

from common.tokenizer import InputError


class Optimizers:
    """Several optimisers that step as one."""

    def __init__(self, *parts):
        self.parts = parts
        for group in self.param_groups:
            group["peak"] = group["lr"]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict()["state"] for part in self.parts]

    def load_state_dict(self, state):
        """The moments only: learning rates and weight decay are those of this run's flags."""
        fits = len(state) == len(self.parts)
        for part, moments in zip(self.parts, state):
            params = [p for group in part.param_groups for p in group["params"]]
            for i, p in enumerate(params):
                for x in moments.get(i, {}).values():
                    fits = fits and (x.dim() == 0 or x.shape == p.shape)
        if not fits:
            raise InputError("the checkpoint was written with other optimisers (--muon_lr)")
        for part, moments in zip(self.parts, state):
            part.load_state_dict(part.state_dict() | {"state": moments})


def orthogonalize(x, steps=5):
    """Matrices x (..., m, n) with singular values near 1, by Newton-Schulz iterations in x's own
    precision. The coefficients are those of https://kellerjordan.github.io/posts/muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.size(-2) > x.size(-1):
        return orthogonalize(x.mT, steps).mT
    for _ in range(steps):
        gram = x @ x.mT                                                     # (..., m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Muon):
    """torch's Muon in float32. torch iterates in bf16, which most CPUs emulate: an SFT step took
    three times as long. Matrices of one shape, those of all layers, are one batch: on a GPU what
    counts is the number of operations."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            same_shape = {}                                    # shape: parameters, directions
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                params, directions = same_shape.setdefault(p.shape, ([], []))
                params.append(p)
                directions.append(p.grad.lerp(average, momentum))           # Nesterov
            for params, directions in same_shape.values():
                updates = orthogonalize(torch.stack(directions))            # (layers, m, n)
                for p, update in zip(params, updates):
                    p.mul_(1 - lr * group["weight_decay"])
                    # of AdamW's size, so that both share a learning rate and a decay
                    p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))  # arXiv 2502.16982


def make_optimizer(model, lr, weight_decay=0.0, muon_lr=0.0, eps=1e-8):
    """AdamW; matrices decay, vectors (norms, biases) and embeddings do not. With muon_lr the
    matrices of the blocks are Muon's instead, which learns faster from scratch."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    muon, decayed, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if muon_lr and "blocks." in name and p.dim() == 2:
            muon.append(p)
        elif p.dim() == 2 and id(p) not in tables:
            decayed.append(p)
        else:
            others.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    device = next(model.parameters()).device
    fused = device.type in ("cpu", "cuda")             # one kernel for all parameters
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=fused)
    if not muon:
        return Optimizers(adamw)
    return Optimizers(adamw, Muon(muon, lr=muon_lr, weight_decay=weight_decay))


def set_lr(optimizer, step, steps, warmup=0, floor=0.0, linear=False):
    """Set every group's rate to a share of its peak, for step 1 .. steps: linear warm-up to 1, then
    half a cosine, or a straight line, from 1 to `floor`, which the step after the last would have:
    every step learns. Returns the first group's rate."""
    if step <= warmup:
        share = step / warmup
    else:
        done = (step - 1 - warmup) / (steps - warmup)          # 0 at first, below 1 at the end
        left = 1 - done if linear else 0.5 * (1 + math.cos(math.pi * done))
        share = floor + (1 - floor) * left
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
    return optimizer.param_groups[0]["lr"]
