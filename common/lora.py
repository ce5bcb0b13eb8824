"""
LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685). The weights stay as they are; beside
every linear layer of the blocks two small matrices learn.

    h = W x + α/r B A x        W (out, in) is frozen, A (r, in), B (out, r)                 (Eq. 3)

A is Gaussian with standard deviation 1/sqrt(in), which the paper leaves open, and B is 0. So the
model starts as the base, and in the first step only B has a gradient. Query, key and value share
one A here, and so do gate and up. Models that differ in their adapters share the base: policy,
reference, critic and reward model take the memory of one.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """Eq. 3. Weight and bias are those of `linear`, not a copy."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)                       # nn.Linear's would draw a weight
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        A = torch.randn(rank, self.in_features) * self.in_features ** -0.5
        self.lora_A = nn.Parameter(A.to(linear.weight.device, dtype))                   # (r, in)
        self.lora_B = nn.Parameter(self.lora_A.new_zeros(self.out_features, rank))      # (out, r)
        self.scale = alpha / rank

    def forward(self, x):
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * low_rank

    def to_linear(self, merge=False):
        """The layer without its adapter, or with the product of A and B in its weight."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        if merge:
            weight = self.weight + self.scale * self.lora_B @ self.lora_A
            linear.weight = nn.Parameter(weight.detach())
        return linear


def trunk_of(model):
    return getattr(model, "trunk", model)


def replace_layers(model, kind, make):
    """Every linear layer of the blocks that is a `kind` becomes make(layer)."""
    for block in trunk_of(model).blocks:
        for module in (block.attention, block.mlp):
            for name, layer in list(module.named_children()):
                if isinstance(layer, kind):
                    setattr(module, name, make(layer))
    return model


def lora_of(model):
    """Rank, alpha and base of a model's adapters; None if it has none."""
    return getattr(trunk_of(model), "lora", None)


def add_adapters(model, rank, alpha, **base):
    """Freeze the trunk of a GPT or ScalarModel and add adapters; they are trained, and a scalar
    head. base: path and hash of the base, for the checkpoint (`base`, `base_hash`)."""
    replace_layers(model, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha))
    trunk_of(model).lora = {"rank": rank, "alpha": alpha} | base
    return train_adapters(model)


def base_parameters(model):
    """All of a trunk but its adapters."""
    return [p for name, p in trunk_of(model).named_parameters() if "lora_" not in name]


def train_adapters(model):
    """Adapters and the scalar head learn, and nothing else."""
    model.requires_grad_(True)
    for p in base_parameters(model):
        p.requires_grad_(False)
    return model


def share_base(model):
    """A copy with adapters and scalar head of its own; the other weights are the same tensors."""
    return copy.deepcopy(model, {id(p): p for p in base_parameters(model)})


def trained_state(model):
    """The state_dict for a checkpoint: without the base, where there are adapters."""
    state = model.state_dict()
    if lora_of(model) is None:
        return state
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: x for name, x in state.items() if name in trained}


def remove_adapters(model, merge=False):
    """The base of a model, frozen; or, merged, the model as one without adapters, which learns."""
    replace_layers(model, LoRALinear, lambda layer: layer.to_linear(merge))
    trunk_of(model).lora = None
    return model.requires_grad_(merge)
