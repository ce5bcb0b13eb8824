"""
What a script starts from: its device and its models.
"""
import copy
import os
import subprocess
import sys
import warnings

import torch

from common.checkpoint import hash_weights, load, read_checkpoint
from common.distributed import (connect, environment_of_one_process, local_rank, rank,
                                wait_for_all_ranks, world_size)
from common.flags import check_limits, read_settings
from common.lora import add_adapters, lora_of, remove_adapters, share_base, train_adapters
from common.tokenizer import InputError, chat_by_default, make_tokenizer
from common.train import configure_blocks, freeze
from common.verifier import RULES
from model import GPT, GPTConfig, ScalarModel


def setup(cfg):
    """Check the flags, seed torch, return the device: cuda, else mps, else cpu; and find the other
    ranks."""
    check_limits(cfg)
    torch.manual_seed(cfg.seed)
    # oneDNN, which multiplies bf16 on CPUs, keeps what it compiled for 1,024 shapes by default, and
    # ours vary: 40 MB more at every step of a model of 135 million parameters
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if cuda_works():
        torch.backends.cuda.enable_cudnn_sdp(False)   # it plans anew for every shape, and ours vary
        # partial sums of bf16 products stay float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        device = torch.device("cuda")
    connect(device)
    return device


def cuda_works():
    """Whether torch can use a GPU. If the driver is too old, print a warning and use the CPU; if
    the GPU cannot run a kernel, raise InputError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    for warning in caught:
        if "CUDA" in str(warning.message) and not available:
            print(f"warning: no GPU is used: {first_line(warning.message)}")
    if available and world_size() > 1:
        n = torch.cuda.device_count()
        if local_rank() >= n:
            raise InputError(f"torchrun starts more processes than this machine has GPUs, {n}")
        torch.cuda.set_device(local_rank())
    if available:
        try:
            torch.ones(1, device="cuda").add_(1)
        except RuntimeError as e:
            advice = "free it"
            if "no kernel image" in str(e):
                advice = "install a torch build for it"
            raise InputError(f"the GPU cannot be used: {first_line(e)}; {advice}, or set "
                             "CUDA_VISIBLE_DEVICES= to use the CPU") from None
    return available


def first_line(error):
    return str(error).strip().partition("\n")[0]


def ensure_checkpoint(folder, script, default, seed, *flags, unless=""):
    """Run the script that makes the checkpoint in `folder`, if `folder` is the default one and the
    checkpoint is missing or unfinished, unless a file exists. Rank 0 does, in one process, and the
    other ranks wait."""
    if rank() == 0 and not os.path.exists(unless):
        run_if_missing(folder, script, default, seed, flags)
    wait_for_all_ranks()


def run_if_missing(folder, script, default, seed, flags):
    exists = os.path.exists(os.path.join(folder, "ckpt.pt"))
    unfinished = exists and not read_checkpoint(folder).get("finished")
    if folder != default or exists and not unfinished:
        return
    state = "is unfinished" if unfinished else "does not exist"
    print(f"{folder} {state}: running {script} first", flush=True)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    more = ["--resume"] if unfinished else ["--seed", str(seed), *flags]
    child = subprocess.Popen([sys.executable, os.path.join(root, script), "--out", folder, *more],
                             env=environment_of_one_process())
    try:
        failed = child.wait()
    except KeyboardInterrupt:                          # wait until it has saved
        if os.name == "posix":
            child.terminate()                      # a scheduler may have signalled this script only
        child.wait()
        raise KeyboardInterrupt("the same command goes on from what is saved") from None
    if failed:
        raise InputError(f"{script} failed, see above; {folder} is needed here")


def first_day(cfg):
    """The date that the templates of a resumed run print, or its prompts would change overnight."""
    return read_settings(cfg.out).get("today", "") if cfg.resume else ""


def load_init(cfg, device):
    """The model in --init, with adapters if --lora_rank says so, and its tokenizer."""
    at = "cpu" if cfg.lora_rank else device            # a base is bf16 before it is on a GPU
    model, tokenizer = load(cfg.init, at, "GPT", cfg.chat, cfg.system, first_day(cfg))
    bases = getattr(model, "merged_from", [])
    if cfg.lora_rank:
        bases = [cfg.init, *bases]
    if os.path.realpath(cfg.out) in map(os.path.realpath, bases):
        raise InputError(f"--out {cfg.out}: the base of adapters is there; name another folder")
    if cfg.lora_rank:
        base = {"base": cfg.init, "base_hash": hash_weights(model)}
        freeze(model, device=device)
        add_adapters(model, cfg.lora_rank, cfg.lora_alpha, **base).to(device)
    return model, tokenizer


def load_policy(cfg, device):
    """The policy in --init and its tokenizer. Runs sft.py first if the default one is missing."""
    if not cfg.data:
        ensure_checkpoint(cfg.init, "sft.py", type(cfg).init, cfg.seed)
    policy, tokenizer = load_init(cfg, device)
    configure_blocks(policy, cfg.gradient_checkpointing, cfg.compile)
    return policy, tokenizer


def load_or_create_model(cfg, device):
    """The model in --init, or a new one of the shape in the flags, and its tokenizer."""
    if cfg.init:
        model, tokenizer = load_init(cfg, device)
        for name in ("block_size", "n_layer", "n_embd", "n_head"):
            ours, its = getattr(cfg, name), getattr(model.cfg, name)
            if ours not in (getattr(type(cfg), name), its):
                raise InputError(f"--{name} {ours}: {cfg.init} has {its}, which stays")
        if cfg.tokenizer not in (type(cfg).tokenizer, tokenizer.name):
            raise InputError(f"--tokenizer {cfg.tokenizer}: {cfg.init} has its own, which stays")
    else:
        if cfg.lora_rank:
            raise InputError(f"--lora_rank {cfg.lora_rank}: needs --init; adapters alone do not "
                             "train a model from scratch")
        turns = chat_by_default(cfg.chat, False, cfg.system)
        tokenizer = make_tokenizer(cfg.tokenizer, turns, cfg.system)
        if cfg.n_embd % cfg.n_head or cfg.n_embd // cfg.n_head % 2:
            raise InputError(f"--n_embd {cfg.n_embd} --n_head {cfg.n_head}: a head needs an even "
                             "whole number of channels")
        stop_token_ids = tokenizer.end, tokenizer.special[tokenizer.turn_end]
        model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=cfg.block_size,
                              n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_head=cfg.n_head,
                              stop_token_ids=stop_token_ids)).to(device)
    configure_blocks(model, cfg.gradient_checkpointing, cfg.compile)
    return model, tokenizer


def load_reward_model(cfg, policy, tokenizer):
    """The frozen reward model in --reward, which must fit the policy; None for a rule. Runs
    reward.py first where the default one is missing."""
    if cfg.reward in RULES:
        return None
    if not cfg.data and cfg.init == type(cfg).init:
        ensure_checkpoint(cfg.reward, "reward.py", "out/reward", cfg.seed)
    return read_reward_model(cfg.reward, policy, tokenizer)


def read_reward_model(path, policy, tokenizer):
    """The frozen reward model in a folder, which must fit the policy."""
    model, own = load(path, policy.device, "ScalarModel", policy=policy)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"--reward {path}: its weights are not finite")
    for name, theirs, ours in (
            ("tokenizer", own.name, tokenizer.name),
            ("chat", own.turns, tokenizer.turns),
            ("system message", own.system, tokenizer.system),
            ("n_embd", model.trunk.cfg.n_embd, policy.cfg.n_embd),
            ("block_size", model.trunk.cfg.block_size, policy.cfg.block_size)):
        if theirs != ours:
            raise InputError(f"--reward {path}: made for {name} {theirs!r}, the policy has "
                             f"{ours!r}; make one by reward.py with the same --init, --chat and "
                             "--system")
    return freeze(model)


def make_reference(policy, moves=False):
    """The policy as it is now, frozen; float32 if it moves. Under LoRA it is the policy without its
    adapters, with the same tensors."""
    if lora_of(policy) is not None:
        return remove_adapters(share_base(policy))
    return freeze(copy.deepcopy(policy), bf16=not moves)


def make_critic(cfg, policy, reward_model):
    """The critic starts as the reward model; under the rule as the policy, with a head of zeros.
    Under LoRA it shares their base."""
    if cfg.lora_rank:
        critic = share_base(reward_model or policy)
    else:
        critic = copy.deepcopy(reward_model or policy)
        critic.to(policy.unembedding.dtype).requires_grad_(True)
    if reward_model is None:
        critic = ScalarModel(critic).to(policy.device)
    if cfg.lora_rank and lora_of(critic) is None:              # the reward model was trained whole
        base_hash = hash_weights(reward_model)
        add_adapters(critic, cfg.lora_rank, cfg.lora_alpha, base_hash=base_hash)
    elif cfg.lora_rank:
        train_adapters(critic)
    configure_blocks(critic.trunk, cfg.gradient_checkpointing, cfg.compile)
    return critic
