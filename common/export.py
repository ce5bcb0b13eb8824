"""
A checkpoint as a Hugging Face folder, `python -m common.hf export out/grpo FOLDER`, or its LoRA
adapters as PEFT's, `export-adapter`.
"""
import json
import os
import shutil
from dataclasses import asdict

from common.checkpoint import base_folder, load, read_checkpoint
from common.hf import (FAMILIES, GPT2_SIZE_FIELDS, ROPE_FIELDS, SIZE_FIELDS, hf_views,
                       is_hf_folder, parse_json, read_config)
from common.tokenizer import InputError
from model import GPTConfig


def byte_letters():
    """The letter that stands for each byte in a byte-level vocabulary: printable ones for
    themselves, the others from U+0100 on, as GPT-2 has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    letters = {b: chr(b) for b in printable}
    letters |= {b: chr(256 + i) for i, b in enumerate(others)}
    return letters


def merges_of(ranks):
    """The merge of every token of a tiktoken vocabulary: the last two parts that byte-pair encoding
    leaves of its bytes when only tokens before it may be merged."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pair_ranks.index(min(pair_ranks))
            if pair_ranks[i] == rank:                  # no merge comes before it
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def tokenizer_json(tokenizer):
    """A tiktoken tokenizer as tokenizer.json, made by the `tokenizers` package."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    letters = byte_letters()

    def spell(token):
        return "".join(letters[b] for b in token)

    vocab = {spell(token): i for token, i in tokenizer.ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks)]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])
    backend.decoder = decoders.ByteLevel()
    # ids follow in order, so gaps are filled; in the vocabulary itself names would be found in text
    names = {i: f"<|unused {i}|>" for i in range(len(vocab), tokenizer.n_vocab)}
    names |= {i: name for name, i in tokenizer.special.items()}
    backend.add_special_tokens([AddedToken(names[i], normalized=False) for i in sorted(names)])
    return backend.to_str()


def new_files(cfg, family, tokenizer):
    """config.json, tokenizer.json and, where prompts are turns, chat_template.jinja of a model that
    began here."""
    config = {"model_type": family, "architectures": [FAMILIES[family]], "bos_token_id": None}
    config["tie_word_embeddings"] = cfg.tie_embeddings
    for field, name in (GPT2_SIZE_FIELDS if family == "gpt2" else SIZE_FIELDS).items():
        config[name] = getattr(cfg, field)
    if family == "llama":
        config |= {"attention_bias": cfg.bias, "mlp_bias": cfg.bias}
    files = {"config.json": json.dumps(config), "tokenizer.json": tokenizer_json(tokenizer)}
    if tokenizer.turns:
        template = tokenizer.template
        if tokenizer.system != "auto":                 # the template writes the system line itself
            turn = f"<|im_start|>system\n{tokenizer.system}<|im_end|>\n"
            turn = json.dumps(turn, ensure_ascii=False)
            first = "{% if messages[0].role != 'system' %}{{ " + turn + " }}{% endif %}"
            template = first + template
        files["chat_template.jinja"] = template
    return files


def family_of(cfg):
    if cfg.positions == "learned":
        return "gpt2"
    if cfg.qk_norm:
        return "qwen3"
    return "qwen2" if cfg.qkv_bias else "llama"


def write_files(folder, files, tensors, name):
    """A new folder with text files and a file of tensors, whole or not at all."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(f"{folder}: pip install safetensors tokenizers, to write it") from None
    if os.path.exists(folder):
        raise InputError(f"{folder}: it exists already; name a new folder")
    unfinished = os.path.normpath(folder) + ".tmp"
    os.makedirs(unfinished)
    try:
        for file, text in files.items():
            with open(os.path.join(unfinished, file), "w", encoding="utf-8") as f:
                f.write(text)
        tensors = {key: x.contiguous() for key, x in tensors.items()}
        save_file(tensors, os.path.join(unfinished, name), metadata={"format": "pt"})
        os.replace(unfinished, folder)
    except SafetensorError as e:
        raise InputError(f"{folder}: could not be written ({e})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)          # nothing is left of a failed export


def write_folder(folder, model, tokenizer):
    """Write what read_folder and transformers read: float32 weights, and the files that came with
    the model."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise InputError(f"{folder}: pip install safetensors tokenizers, to write it") from None
    cfg, family = model.cfg, family_of(model.cfg)
    files = dict(tokenizer.files) or new_files(cfg, family, tokenizer)

    stop = {"eos_token_id": list(cfg.stop_token_ids)}
    config = parse_json(folder, files, "config.json") | stop | {"torch_dtype": "float32"}
    config.pop("dtype", None)
    config.pop("rope_parameters", None)
    if family != "gpt2":                         # spelled as every version of transformers reads it
        config |= {"rope_theta": cfg.rope_theta, "rope_scaling": None}
        if cfg.rope_scaling:
            *factors, original = cfg.rope_scaling
            scaling = dict(zip(ROPE_FIELDS, [*factors, int(original)]))
            config["rope_scaling"] = {"rope_type": "llama3"} | scaling
    eos_token = tokenizer.decode([tokenizer.end])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    settings = parse_json(folder, files, "tokenizer_config.json", settings)
    generation = parse_json(folder, files, "generation_config.json", {}) | stop
    for name, x in (("config.json", config), ("tokenizer_config.json", settings),
                    ("generation_config.json", generation)):
        files[name] = json.dumps(x, indent=2, ensure_ascii=False)
    again = asdict(read_config(folder, files)[1])
    for field, x in asdict(cfg).items():
        if again[field] != x:
            raise InputError(f"{folder}: a {family} config.json cannot say {field} = {x}")

    tensors = hf_views(cfg, family, model.state_dict())
    write_files(folder, files, tensors, "model.safetensors")


def write_adapter(folder, path):
    """The adapters in a checkpoint as PEFT has them. Matrices that are one here and several there
    (query, key and value; gate and up) share A; their B is a part of ours. Returns the base."""
    data = read_checkpoint(path)
    if data["kind"] != "GPT":
        raise InputError(f"{path}: a reward model; PEFT's format is written for policies only")
    if "lora" not in data:
        raise InputError(f"{path}: it has no adapters; `export` writes the whole model")
    cfg, lora = GPTConfig(**data["config"]), data["lora"]
    base = base_folder(path, lora)
    if not os.path.exists(base):
        raise InputError(f"{path}: its adapters belong to {base}, which does not exist")
    family = family_of(cfg)
    tensors, modules = {}, set()
    for name, B in data["model"].items():
        if not name.endswith("lora_B"):
            continue
        A = data["model"][name.replace("lora_B", "lora_A")]                 # (r, in)
        for theirs, part in hf_views(cfg, family, {name.replace("lora_B", "weight"): B}).items():
            module = theirs.removesuffix(".weight")
            part = part.T if family == "gpt2" else part                     # (part of out, r)
            tensors[f"base_model.model.{module}.lora_A.weight"] = A.clone()
            tensors[f"base_model.model.{module}.lora_B.weight"] = part
            modules.add(module.rpartition(".")[2])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": sorted(modules),
              "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": family == "gpt2"}
    files = {"adapter_config.json": json.dumps(config, indent=2)}
    write_files(folder, files, tensors, "adapter_model.safetensors")
    return base


def export(command, path, folder):
    """What `python -m common.hf` does: write a folder and say what is in it."""
    if command == "export-adapter":
        base = write_adapter(folder, path)
        print(f"{folder}: an adapter for {base}")
        if not is_hf_folder(base):
            print(f"PEFT cannot read that; `export {base} FOLDER` writes it as it can")
        return
    model, tokenizer = load(path, kind="GPT")
    write_folder(folder, model, tokenizer)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {n_params:,} parameters in float32, and the tokenizer")
    if tokenizer.files and tokenizer.turns and tokenizer.system != "auto":
        print(f"its chat template does not have the system message {tokenizer.system!r}")
