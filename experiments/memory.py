"""
What a GPU must have: the memory plan of every script for Qwen 2.5's sizes, trained whole and by
LoRA, with the defaults for pretrained models, prompts of up to 300 tokens and responses of 512.

    python experiments/memory.py                     no GPU is needed, nothing is allocated
    python experiments/memory.py --micro_batch_tokens 4096 --lora_rank 64
"""
import argparse
import contextlib
import io
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import dapo  # noqa: E402
import dpo  # noqa: E402
import grpo  # noqa: E402
import model as M  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from common.lora import add_adapters  # noqa: E402
from common.memory import estimate_memory, peak_memory  # noqa: E402
from common.models import make_critic, make_reference  # noqa: E402
from common.optimizers import Optimizers, make_optimizer  # noqa: E402
from common.train import freeze  # noqa: E402
from model import GPT, GPTConfig, ScalarModel  # noqa: E402

LONGEST_PROMPT = 300
CARDS = (8, 16, 24, 48, 80)                                     # GB
CUDA = 2 ** 29                                                  # bytes of CUDA itself
QWEN = dict(vocab_size=151_936, block_size=32_768, qkv_bias=True, rope_theta=1e6)
SIZES = {
    "0.5B": dict(n_layer=24, n_embd=896, n_head=14, n_kv_head=2, intermediate_size=4864),
    "1.5B": dict(n_layer=28, n_embd=1536, n_head=12, n_kv_head=2, intermediate_size=8960),
    "3B": dict(n_layer=36, n_embd=2048, n_head=16, n_kv_head=2, intermediate_size=11_008),
    "7B": dict(n_layer=28, n_embd=3584, n_head=28, n_kv_head=4, intermediate_size=18_944,
               vocab_size=152_064, tie_embeddings=False),
}
SCRIPTS = {"sft.py": sft, "reward.py": reward, "dpo.py": dpo, "dapo.py": dapo, "grpo.py": grpo,
           "ppo.py": ppo}


def make_model(size, cfg):
    """A policy without memory, as load_policy gives it."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**QWEN | SIZES[size]))
        model.gradient_checkpointing = cfg.gradient_checkpointing
        if cfg.lora_rank:
            add_adapters(freeze(model), cfg.lora_rank, cfg.lora_alpha)
    return model


def plan(script, size, lora_rank=0, micro_batch_tokens=0):
    """{part: bytes} of a run of the script."""
    module = SCRIPTS[script]
    cfg = module.Config(**module.PRETRAINED, lora_rank=lora_rank)
    M.BF16_MIN_WIDTH["meta"] = 1                                  # as on CUDA
    trained, frozen = [make_model(size, cfg)], []
    if script in ("grpo.py", "ppo.py"):
        frozen.append(make_reference(trained[0]))
    with torch.device("meta"):
        if script == "reward.py":
            trained = [ScalarModel(trained[0])]
        if script == "ppo.py":
            reward_model = freeze(ScalarModel(make_model(size, cfg)))
            if lora_rank:                                       # on the policy's base
                reward_model = make_critic(cfg, trained[0], None).requires_grad_(False)
            frozen.append(reward_model)
            trained.append(make_critic(cfg, trained[0], reward_model))
    optimizer = Optimizers(*[part for x in trained for part in make_optimizer(x, 1e-6).parts])
    responses = longest = 0
    if hasattr(cfg, "minibatch"):
        responses = cfg.prompts * getattr(cfg, "group_size", 1)
        longest = LONGEST_PROMPT + cfg.max_new_tokens
    with contextlib.redirect_stdout(io.StringIO()):
        return estimate_memory(torch.device("cuda"), optimizer, trained, frozen,
                               micro_batch_tokens, responses, longest)


def peaks(lora_rank, micro_batch_tokens=0):
    """{script: {size: (peak of the whole model, peak of LoRA) in GiB}}"""
    table = {}
    for script in SCRIPTS:
        table[script] = {}
        for size in SIZES:
            both = [peak_memory(plan(script, size, rank, micro_batch_tokens))
                    for rank in (0, lora_rank)]
            table[script][size] = [x / 2 ** 30 for x in both]
    return table


def smallest_card(gib):
    """A card with room for the peak, 5% of it for the allocator, and CUDA itself."""
    for card in CARDS:
        if 1.05 * gib + CUDA / 2 ** 30 <= card:
            return card
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--micro_batch_tokens", type=int, default=0)
    args = parser.parse_args()
    print(f"peak in GiB, whole / LoRA of rank {args.lora_rank}; in brackets the smallest card, GB")
    print(f"{'':12}" + "".join(f"{size:>26}" for size in SIZES))
    for script, row in peaks(args.lora_rank, args.micro_batch_tokens).items():
        cells = ""
        for both in row.values():
            texts = [f"{x:.1f} ({smallest_card(x) or '-'})" for x in both]
            cells += f"{' / '.join(texts):>26}"
        print(f"{script:12}{cells}")


if __name__ == "__main__":
    main()
