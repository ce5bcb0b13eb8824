"""Checkpoints, written atomically and read without running code; and `load`, which reads either a
checkpoint folder or a Hugging Face folder."""
import os
import zipfile
from dataclasses import asdict

import torch

from common.hf import (folder_tokenizer, is_hf_folder, read_config, read_folder,
                       refuse_other_weights, stop_at_turn_end)
from common.tokenizer import InputError, chat_by_default, make_tokenizer
from model import GPT, GPTConfig, ScalarModel


TOKENIZER_FIELDS = ("name", "turns", "system", "today", "files")


def save_checkpoint(folder, model, tokenizer, name="ckpt.pt", **state):
    """Write folder/name atomically: a reader finds the old file or the new one, whole."""
    trunk = getattr(model, "trunk", model)
    data = {
        "kind": type(model).__name__,
        "config": asdict(trunk.cfg),
        "tokenizer": {name: getattr(tokenizer, name) for name in TOKENIZER_FIELDS},
        "model": model.state_dict(),
    }
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
        for name, x in data["model"].items():
            if not isinstance(name, str) or not x.is_floating_point() or x.layout != torch.strided:
                raise ValueError(name)
        return data
    except Exception as e:                  # a torn zip, a pickle with code, another program's file
        raise InputError(f"{path}: not a nanoPO checkpoint, or a damaged one "
                         f"({type(e).__name__})") from e


def load(path, device="cpu", kind=None, chat="auto", system="auto", today=""):
    """A checkpoint folder or a Hugging Face folder -> model, tokenizer.

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
    try:
        model = GPT(GPTConfig(**data["config"]))
    except Exception as e:
        raise InputError(f"{path}: its config does not describe a model ({e})") from None
    if data["kind"] == "ScalarModel":
        model = ScalarModel(model)
    load_weights(model, data["model"], path)
    tokenizer = saved_tokenizer(path, data["tokenizer"], chat, system)
    stop_at_turn_end(getattr(model, "trunk", model).cfg, tokenizer)
    return model.to(device), tokenizer


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
    """load_state_dict; the first tensor that is missing, unknown or of another shape is named."""
    ours = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    theirs = {name: tuple(x.shape) for name, x in weights.items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(f"{path}: tensor {name} has shape {theirs.get(name)}, and "
                             f"{ours.get(name)} is needed")
    model.load_state_dict(weights)
