"""A script that saves its gradients, and whose random numbers do not depend on the number of
processes:   python tests/record_gradients.py FOLDER DTYPE MINIBATCHES script.py --flag ...

What is sampled follows from the prompt, and a rollout has the minibatches that two processes make.
For dapo.py the sizes of the rollouts are saved too.
"""
import importlib
import os
import sys
import zlib

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import common.distributed  # noqa: E402
import common.run  # noqa: E402
from common.train import select_groups  # noqa: E402
from model import GPT  # noqa: E402

folder, dtype, minibatches = sys.argv[1:4]
sys.argv = sys.argv[4:]
torch.set_default_dtype(getattr(torch, dtype))
torch.set_num_threads(1)
generate, randperm, clip = GPT.generate, torch.randperm, torch.nn.utils.clip_grad_norm_
gradients, sizes = [], []


def generate_by_prompt(self, prompts, group_size=1, max_new_tokens=64, temperature=None, **more):
    """Rollouts give a temperature. Evaluation and collection give none, and random numbers that do
    not depend on the number of processes by themselves."""
    if temperature is None:
        return generate(self, prompts, group_size, max_new_tokens, **more)
    if temperature > 0:
        draws = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(bytes(prompt)))
            draws.append(torch.rand(group_size, max_new_tokens, generator=generator))
        more["uniform"] = torch.cat(draws)
    return generate(self, prompts, group_size, max_new_tokens, temperature, **more)


def minibatches_of_two_processes(n, **more):
    """A process of two has its own half of the rows, in order; one process has both halves."""
    if more:
        return randperm(n, **more)
    halves = 2 // common.distributed.world_size()
    return torch.arange(n).view(halves, int(minibatches), -1).transpose(0, 1).flatten()


def record_and_clip(params, max_norm):
    params = list(params)
    gradients.append([p.grad.clone() for p in params if p.grad is not None])
    return clip(params, max_norm)


def record_size(*args):
    batch = select_groups(*args)
    sizes.append(len(batch[0]))
    return batch


GPT.generate = generate_by_prompt
torch.randperm = minibatches_of_two_processes
torch.nn.utils.clip_grad_norm_ = record_and_clip
script = importlib.import_module(sys.argv[0][:-3])
if hasattr(script, "select_groups"):
    script.select_groups = record_size
common.run.main(script.train, script.Config)
path = os.path.join(folder, f"rank{common.distributed.rank()}.pt")
torch.save({"gradients": gradients, "sizes": sizes}, path)
