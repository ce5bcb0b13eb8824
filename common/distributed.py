"""
Data-parallel training: torchrun starts several processes, the ranks. Each holds the whole model and
works on its shard of the prompts. Without torchrun there is one rank, and these functions return
what they are given.
"""
import functools
import os

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.tokenizer import InputError

BUCKET = 2 ** 25                                       # gradients in one message, at most
PARENT = os.getppid()                                  # torchrun


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


def torchrun_is_gone():
    """Whether torchrun was killed, and could not end its ranks."""
    return world_size() > 1 and os.getppid() != PARENT


def is_first_to_fail():
    """Whether no other rank has failed before: one rank says why a run has ended."""
    if world_size() == 1 or torchrun_is_gone():
        return True
    return shared_store().add("failed", 1) == 1


def is_lost_connection(error):
    """Whether gloo or nccl has lost another rank."""
    return world_size() > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError))


# ------------------------------------------------------------------------- sharing out, adding up


def shard(items):
    """This rank's consecutive slice of a list or a tensor. Slices differ in length by at most 1."""
    start = len(items) * rank() // world_size()
    end = len(items) * (rank() + 1) // world_size()
    return items[start:end]


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. x is on the CPU."""
    if world_size() == 1:
        return [x]
    of_ranks = [None] * world_size()
    dist.all_gather_object(of_ranks, x)
    return of_ranks


def gather_shards(items):
    """The list that `shard` cut, from the slices of all ranks."""
    whole = []
    for slice_of_rank in gather(items):
        whole += slice_of_rank
    return whole


def wait_for_all_ranks():
    gather(None)


def sum_over_ranks(x):
    """The sum of the elements of a tensor on all ranks; a tensor on x's device."""
    x = x.sum()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def first_over_ranks(keep, n):
    """keep (b,) bool with only the first n True values, counted through rank 0, then rank 1, ..."""
    before = sum(gather(int(keep.sum()))[:rank()])
    return keep & (before + keep.cumsum(0) <= n)


def buckets(tensors):
    """Lists of tensors with at most BUCKET elements together, or of one larger tensor."""
    bucket = []
    size = 0
    for x in tensors:
        if bucket and size + x.numel() > BUCKET:
            yield bucket
            bucket = []
            size = 0
        bucket.append(x)
        size += x.numel()
    if bucket:
        yield bucket


def sum_gradients(*models):
    """Add up the gradients of all ranks. The losses have the denominator of the whole batch, so the
    sum is the gradient of one process. A parameter without a gradient on any rank stays without
    one, and optimisers skip it."""
    if world_size() == 1:
        return
    params = []
    for model in models:
        params += model.parameters()
    n_ranks = torch.tensor([p.grad is not None for p in params]).int()      # with a gradient
    dist.all_reduce(n_ranks)
    grads = []
    for p, n in zip(params, n_ranks.tolist()):
        if n > 0 and p.grad is None:                   # this rank had no row
            p.grad = torch.zeros_like(p)
        if n > 0:
            grads.append(p.grad)
    for bucket in buckets(grads):
        message = parameters_to_vector(bucket)
        dist.all_reduce(message)
        vector_to_parameters(message, bucket)          # the gradients are now parts of the message
