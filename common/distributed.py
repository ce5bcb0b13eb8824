"""
Data-parallel training: torchrun starts several processes, the ranks. Each holds the whole model and
works on its share of the prompts. Without torchrun there is one rank, and all of this is the
identity.
"""
import functools
import os

import torch
import torch.distributed as dist

from common.tokenizer import InputError

BUCKET = 2 ** 25                                       # gradients in one message


def world_size():
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank():
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def local_rank():
    """The number of this process on its machine, which is also that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0


def environment_of_one_process():
    """Environment variables for a script that one rank starts and that is no rank itself."""
    return {k: x for k, x in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}


def connect(device):
    """Find the other ranks: gloo sends what is on the CPU, nccl what is on GPUs."""
    if world_size() == 1 or dist.is_initialized():
        return
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"torchrun: one process only on {device.type}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=shared_store(), rank=rank(), world_size=world_size())


def disconnect():
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def shared_store():
    """The key-value store of torchrun itself, which outlives every rank."""
    store, _, _ = next(dist.rendezvous("env://"))
    return store


def is_first_to_fail():
    """Whether no other rank has failed before: one rank says why a run has ended."""
    return world_size() == 1 or shared_store().add("failed", 1) == 1


def is_lost_connection(error):
    """Whether gloo or nccl has lost another rank."""
    return world_size() > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError))


def share(items):
    """This rank's part of a list or a tensor: consecutive, and as long as the others' up to one."""
    n = len(items)
    return items[n * rank() // world_size():n * (rank() + 1) // world_size()]


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank. x is on the CPU."""
    found = [x]
    if world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, x)
    return found


def gather_list(items):
    """The parts that `share` made as one list again."""
    return [x for part in gather(items) for x in part]


def total(x):
    """The sum of a tensor's elements over all ranks, on its device."""
    x = x.sum()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def first_of_all(keep, n):
    """keep (b,) bool without those after the n-th that is True, the ranks one after another."""
    before = sum(gather(int(keep.sum()))[:rank()])
    return keep & (before + keep.cumsum(0) <= n)


def sum_gradients(*models):
    """Add up the gradients of all ranks. Each rank's loss has the denominator of the whole batch,
    so the sum is the gradient of one process."""
    if world_size() == 1:
        return
    bucket, size = [], 0
    params = [p for model in models for p in model.parameters() if p.requires_grad]
    for i, p in enumerate(params):
        if p.grad is None:                             # this rank had no row
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        size += p.numel()
        if size >= BUCKET or i == len(params) - 1:
            message = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(message)
            for grad, x in zip(bucket, message.split([grad.numel() for grad in bucket])):
                grad.copy_(x.view_as(grad))
            bucket, size = [], 0
