"""
Data-parallel training: torchrun starts several processes, the ranks. Each holds the whole model and
works on its share of the prompts. Without torchrun there is one rank, and all of this is the
identity.
"""
import functools
import os

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.tokenizer import InputError

BUCKET = 2 ** 25                                       # gradients in one message, at most


# ----------------------------------------------------------------------------- this rank and others


def number_from_torchrun(name, alone):
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def world_size():
    """The number of ranks."""
    return number_from_torchrun("WORLD_SIZE", alone=1)


def rank():
    return number_from_torchrun("RANK", alone=0)


def local_rank():
    """The number of this rank on its machine, and of its GPU there."""
    return number_from_torchrun("LOCAL_RANK", alone=0)


def environment_of_one_process():
    """Environment variables for a script that a rank starts and that is no rank itself."""
    return {name: x for name, x in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}


def connect(device):
    """Find the other ranks: gloo sends what is on the CPU, nccl what is on GPUs."""
    if world_size() == 1:
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"torchrun: only one process can use {device.type}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=shared_store(), rank=rank(), world_size=world_size())


def disconnect():
    if world_size() > 1:
        dist.destroy_process_group()


@functools.cache
def shared_store():
    """torchrun's own key-value store, which outlives every rank."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def is_first_to_fail():
    """Whether no other rank has failed before: one rank says why a run has ended."""
    return world_size() == 1 or shared_store().add("failed", 1) == 1


def is_lost_connection(error):
    """Whether gloo or nccl has lost another rank."""
    return world_size() > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError))


# ------------------------------------------------------------------------ sharing out and adding up


def share(items):
    """This rank's part of a list or a tensor: consecutive, of the others' length or one more."""
    start = len(items) * rank() // world_size()
    end = len(items) * (rank() + 1) // world_size()
    return items[start:end]


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. x is on the CPU."""
    if world_size() == 1:
        return [x]
    found = [None] * world_size()
    dist.all_gather_object(found, x)
    return found


def gather_list(items):
    """The list whose parts `share` made."""
    return [x for part in gather(items) for x in part]


def total(x):
    """The sum of a tensor's elements over all ranks, on its device."""
    x = x.sum()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def first_of_all(keep, n):
    """keep (b,) bool, without those after the n-th True of all ranks, one after another."""
    before = sum(gather(int(keep.sum()))[:rank()])
    return keep & (before + keep.cumsum(0) <= n)


def buckets(tensors):
    """Lists of tensors with at most BUCKET elements together, or of one larger tensor."""
    bucket, size = [], 0
    for x in tensors:
        if bucket and size + x.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.numel()
    yield bucket


def sum_gradients(*models):
    """Add up the gradients of all ranks. The losses have the denominator of the whole batch, so the
    sum is the gradient of one process."""
    if world_size() == 1:
        return
    grads = []
    for p in [p for model in models for p in model.parameters() if p.requires_grad]:
        if p.grad is None:                             # this rank had no row
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    for bucket in buckets(grads):
        message = parameters_to_vector(bucket)
        dist.all_reduce(message)
        vector_to_parameters(message, bucket)          # the gradients are now parts of the message
