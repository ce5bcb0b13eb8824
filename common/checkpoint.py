"""Checkpoints, written atomically and read without running code; and `load`, which reads either a
checkpoint folder or a Hugging Face folder."""
import hashlib
import math
import os
import zipfile
from dataclasses import asdict, replace

import torch

from common.hf import (folder_tokenizer, is_hf_folder, read_config, read_folder,
                       refuse_other_weights, stop_at_turn_end)
from common.lora import (add_adapters, lora_of, remove_adapters, share_base, trained_state,
                         trunk_of)
from common.tokenizer import InputError, chat_by_default, make_tokenizer
from model import GPT, GPTConfig, ScalarModel


TOKENIZER_FIELDS = ("name", "turns", "system", "today", "files")


def save_checkpoint(folder, model, tokenizer, name="ckpt.pt", **state):
    """Write folder/name atomically: a reader finds the old file or the new one, whole. Of a model
    with adapters it holds what is trained, and names the base."""
    data = {
        "kind": type(model).__name__,
        "config": asdict(trunk_of(model).cfg),
        "tokenizer": {name: getattr(tokenizer, name) for name in TOKENIZER_FIELDS},
        "model": trained_state(model),
    }
    lora = lora_of(model)
    if lora:
        base = lora["base"]
        if not os.path.isabs(base):                    # the two may move together
            base = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
            base = base.replace(os.sep, "/")
        data["lora"] = lora | {"base": base}
    path = os.path.join(folder, name)
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(data | state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:               # torch's writer hides the system's own error
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise InputError(f"{path}: could not be written ({cause.args[-1]}); the checkpoint before "
                         "it is untouched") from e
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")


def read_checkpoint(folder):
    """The dictionary that save_checkpoint wrote, on the CPU. No code in the file is ever run."""
    path = os.path.join(folder, "ckpt.pt")
    if not os.path.exists(path):
        if os.path.exists(folder):
            refuse_other_weights(folder)
        raise InputError(f"{folder}: no checkpoint here (no ckpt.pt), nor a Hugging Face model (no "
                         "config.json)")
    try:
        with zipfile.ZipFile(path) as f:               # torch.load does not verify the check sums
            if f.testzip() is not None:
                raise ValueError("check sum")
        data = torch.load(path, map_location="cpu", weights_only=True)
        if not data.keys() >= {"kind", "config", "model"}:
            raise ValueError("keys")
        if not data["tokenizer"].keys() >= set(TOKENIZER_FIELDS):
            raise ValueError("tokenizer")
        if "lora" in data and not is_lora(data["lora"], data["model"]):
            raise ValueError("lora")
        for name, x in data["model"].items():
            if not isinstance(name, str) or not x.is_floating_point() or x.layout != torch.strided:
                raise ValueError(name)
        return data
    except Exception as e:                  # a torn zip, a pickle with code, another program's file
        raise InputError(f"{path}: not a nanoPO checkpoint, or a damaged one "
                         f"({type(e).__name__})") from e


def is_lora(lora, weights):
    """Whether the entry of a checkpoint describes its adapters."""
    kinds = {"rank": int, "alpha": float, "base": str, "base_hash": str}
    if lora.keys() != kinds.keys() or any(type(lora[name]) is not kinds[name] for name in kinds):
        return False
    ranks = {len(A) for name, A in weights.items() if name.endswith("lora_A")}
    return ranks == {lora["rank"]} and 0 < lora["alpha"] < math.inf


def hash_tensors(tensors):
    """SHA-256 of at most 4,096 evenly spaced values of every tensor. They are rounded to bf16,
    because frozen models are stored in bf16."""
    digest = hashlib.sha256()
    for x in tensors:
        x = x.flatten()[::1 + x.numel() // 4096].bfloat16().cpu().contiguous()
        digest.update(x.view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_weights(model):
    """What identifies the weights of a model as it was loaded. For merged adapters it is made of
    the base's and the adapters': their product rounds differently on another machine."""
    return getattr(model, "merged_hash", None) or hash_tensors(model.state_dict().values())


def load(path, device="cpu", kind=None, chat="auto", system="auto", today="", policy=None):
    """A checkpoint folder or a Hugging Face folder -> model, tokenizer. Adapters are merged into
    their base; but if that is the base of `policy`, too, its weights are shared.

    kind: "GPT" or "ScalarModel", where the other one is an error. chat: "chat" makes a lone prompt
    a user's turn, "plain" leaves it plain text. system: message of chats that have none; "" is an
    empty one. "auto" keeps what the checkpoint was trained with or the folder's template says.
    today: date that a template may print; "": now."""
    is_checkpoint = os.path.exists(os.path.join(path, "ckpt.pt")) or not is_hf_folder(path)
    data = read_checkpoint(path) if is_checkpoint else {"kind": "GPT"}
    if kind and data["kind"] != kind:
        names = {"GPT": "a policy", "ScalarModel": "a reward model"}
        found = names.get(str(data["kind"]), "neither a policy nor a reward model")
        raise InputError(f"{path}: this is {found}, and {names[kind]} is needed here")
    if not is_checkpoint:
        return read_folder(path, device, chat, system, today)
    base = load_base(path, data["lora"], policy) if "lora" in data else None
    try:
        cfg = GPTConfig(**data["config"])
        model = GPT(cfg) if base is None else base
    except Exception as e:
        raise InputError(f"{path}: its config does not describe a model ({e})") from None
    # the ids that end a response are a setting of the run, the rest is the base's
    if replace(cfg, stop_token_ids=()) != replace(model.cfg, stop_token_ids=()):
        raise InputError(f"{path}: its adapters were trained on another shape than their base has")
    model.cfg = cfg
    if data["kind"] == "ScalarModel":
        model = ScalarModel(model)
    if base is not None:
        add_adapters(model, **data["lora"])
    load_weights(model, data["model"], path)
    if base is not None and not has_base(policy, data["lora"]):
        remove_adapters(model, merge=True)
        model.merged_hash = data["lora"]["base_hash"] + hash_tensors(data["model"].values())
        model.merged_from = [base_folder(path, data["lora"]), *getattr(base, "merged_from", [])]
    tokenizer = saved_tokenizer(path, data["tokenizer"], chat, system)
    stop_at_turn_end(cfg, tokenizer)
    return model.to(device), tokenizer


def has_base(policy, lora):
    """Whether a policy has adapters on the same base."""
    ours = None if policy is None else lora_of(policy)
    return ours is not None and ours["base_hash"] == lora["base_hash"]


def load_base(path, lora, policy):
    """The model that the adapters of a checkpoint belong to."""
    if has_base(policy, lora):
        return remove_adapters(share_base(policy))
    folder = base_folder(path, lora)
    if not os.path.exists(folder):
        raise InputError(f"{path}: its adapters belong to {folder}, which does not exist")
    base, _ = load(folder, kind="GPT", chat="plain")   # its tokenizer is not used
    if hash_weights(base) != lora["base_hash"]:
        raise InputError(f"{path}: its adapters were trained on other weights than {folder} has; "
                         f"those of an earlier run may be in {folder}.1")
    return base


def base_folder(path, lora):
    """Where the base of the adapters in a checkpoint folder is."""
    return os.path.normpath(os.path.join(os.path.realpath(path), lora["base"]))


def saved_tokenizer(path, saved, chat, system):
    """The tokenizer of a checkpoint, with prompts written as in its training, or as --chat and
    --system now say."""
    turns = chat_by_default(chat, saved["turns"], system)
    if system == "auto" and turns:
        system = saved["system"]
    if not saved["files"]:
        return make_tokenizer(saved["name"], turns, system)
    _, cfg = read_config(path, saved["files"])
    chat = "chat" if turns else "plain"
    return folder_tokenizer(path, saved["files"], cfg, chat, system, saved["today"])


def load_weights(model, weights, path):
    """What trained_state gave; the first tensor that is missing, unknown or of another shape is
    named."""
    ours = {name: tuple(x.shape) for name, x in trained_state(model).items()}
    theirs = {name: tuple(x.shape) for name, x in weights.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(f"{path}: tensor {name} has shape {theirs.get(name)}, and "
                             f"{ours.get(name)} is needed")
    model.load_state_dict(weights, strict=False)       # without the base of adapters
