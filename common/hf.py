"""
Models as Hugging Face keeps them: a folder with config.json, *.safetensors and tokenizer.json, read
and written. safetensors and tokenizers are optional packages.

    python -m common.hf export out/grpo FOLDER     writes a checkpoint as such a folder

What GPT cannot compute is refused by the name of its field or tensor, never ignored.
"""
import json
import os
import re
import sys

import torch

from common.tokenizer import FolderTokenizer, InputError, chat_by_default
from model import GPT, GPTConfig

FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZE_FIELDS = {                   # GPTConfig -> config.json of Llama and Qwen
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
GPT2_SIZE_FIELDS = {              # GPTConfig -> config.json of GPT-2
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_layer": "n_layer",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "intermediate_size": "n_inner",
    "norm_eps": "layer_norm_epsilon",
}
OPTIONAL_SIZES = ("n_kv_head", "head_dim", "intermediate_size")
TENSOR_NAMES = {                # our module -> theirs, in the order of its rows where it is several
    "embedding": "embed_tokens",
    "norm1": "input_layernorm",
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.up": "mlp.gate_proj mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "norm",
    "head": "lm_head",
}
GPT2_TENSOR_NAMES = {
    "embedding": "wte",
    "position": "wpe",
    "norm1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "norm": "ln_f",
    "head": "lm_head",
}
ROPE_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SUPPORTED_VALUES = {              # fields of config.json of which GPT can do these values only
    "hidden_act": ["silu"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "scale_attn_weights": [True],
    "partial_rotary_factor": [1.0],
}
IGNORED_FIELDS = re.compile(      # fields of config.json that change nothing that GPT computes
    r"_|unsloth_|summary_|.+_pdrop$|(attention_dropout|transformers_version|torch_dtype|dtype"
    r"|use_cache|n_ctx|initializer_range|pretraining_tp|bos_token_id|pad_token_id"
    r"|max_window_layers|sliding_window"
    r"|is_decoder|task_specific_params|reorder_and_upcast_attn|gradient_checkpointing"
    r"|predict_special_tokens|n_special|output_past|id2label|label2id|return_dict|tokenizer_class"
    r"|is_llama_config|transformers\.js_config)$")
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$")  # tables, not weights
COPIED_FILES = ("config.json", "generation_config.json", "tokenizer_config.json",
                "chat_template.jinja", "special_tokens_map.json", "tokenizer.json")


# ---------------------------------------------------------------------- a Hugging Face folder: read


def parse_json(path, files, name, default=None):
    """The object in one of a folder's JSON files."""
    if name not in files:
        if default is None:
            raise InputError(f"{path}: {name} is missing")
        return default
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: {name} is not JSON ({e})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: {name} holds no JSON object")
    return found


def read_config(path, files):
    """config.json -> its model_type, GPTConfig. Fields that are null, false, 0 or [] are off."""
    def refuse(name, x, instead=""):
        value = json.dumps(x)
        raise InputError(f'{path}: config.json: "{name}": {value} is not supported{instead}')

    config = dict(parse_json(path, files, "config.json"))
    family = config.pop("model_type", None)
    if not isinstance(family, str) or family not in FAMILIES:
        refuse("model_type", family, f"; {', '.join(FAMILIES)} are")
    architectures = config.pop("architectures", None)
    if architectures not in (None, [FAMILIES[family]]):
        refuse("architectures", architectures, f"; {FAMILIES[family]} is")

    ours = {"tie_embeddings": config.pop("tie_word_embeddings", family == "gpt2")}
    for field, name in (GPT2_SIZE_FIELDS if family == "gpt2" else SIZE_FIELDS).items():
        x = config.pop(name, None)
        if x is None and field in OPTIONAL_SIZES:
            continue
        allowed = (int, float) if field == "norm_eps" else (int,)
        if type(x) not in allowed or x <= 0:
            refuse(name, x, "; it must be a number above 0")
        ours[field] = x

    if family == "gpt2":
        ours |= {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True}
    else:
        ours |= read_rope(config, refuse)
        ours["qkv_bias"] = family == "qwen2"
        ours["qk_norm"] = family == "qwen3"
        if family == "llama" and config.get("attention_bias") and config.get("mlp_bias"):
            del config["attention_bias"], config["mlp_bias"]
            ours["bias"] = True

    ours["stop_token_ids"] = read_stop_token_ids(path, files, config, ours["vocab_size"], refuse)
    config.pop("eos_token_id", None)
    config["layer_types"] = [x for x in config.get("layer_types") or [] if x != "full_attention"]
    for name, x in config.items():
        if name in SUPPORTED_VALUES:
            if x not in SUPPORTED_VALUES[name]:
                refuse(name, x, f"; {', '.join(map(str, SUPPORTED_VALUES[name]))} is")
        elif x and not IGNORED_FIELDS.match(name):
            refuse(name, x)
    return family, GPTConfig(**ours)


def read_rope(config, refuse):
    """Take RoPE's fields out of config.json, in the old spelling (rope_theta, rope_scaling) or the
    new one (rope_parameters) -> fields of GPTConfig. What is left of them stays in config."""
    rope = {"rope_theta": config.pop("rope_theta", 10_000.0)}
    rope |= config.pop("rope_scaling", None) or {}
    rope |= config.pop("rope_parameters", None) or {}
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if kind not in ("default", "llama3"):
        refuse("rope_type", kind, "; default and llama3 are")
    scaling = ()
    if kind == "llama3":
        scaling = tuple(float(rope.pop(name)) for name in ROPE_FIELDS)
        factor, low, high, _ = scaling
        if factor <= 0 or high <= low:
            refuse("rope_type", kind, f" with {dict(zip(ROPE_FIELDS, scaling))}")
    theta = float(rope.pop("rope_theta"))
    config |= rope
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_stop_token_ids(path, files, config, vocab_size, refuse):
    """The ids in eos_token_id of config.json, then of generation_config.json, each once."""
    generation = parse_json(path, files, "generation_config.json", {})
    ids = []
    for source in (config, generation):
        eos = source.get("eos_token_id")
        if eos is not None:
            ids += eos if isinstance(eos, list) else [eos]
    if not ids or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        refuse("eos_token_id", ids, "; ids of the vocabulary must end a response")
    return tuple(dict.fromkeys(ids))


def hf_views(cfg, family, state):
    """{name of a tensor in a Hugging Face file: view of our tensor that holds it}. state: our
    tensors by name, as state_dict gives them."""
    views = {}
    gpt2 = family == "gpt2"
    names = GPT2_TENSOR_NAMES if gpt2 else TENSOR_NAMES
    trunk = "transformer." if gpt2 else "model."
    layers = "h" if gpt2 else "layers"
    pattern = re.compile(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)")
    for name, x in state.items():
        layer, module, kind = pattern.fullmatch(name).groups()
        prefix = "" if module == "head" else trunk
        if layer:
            prefix += f"{layers}.{layer}."
        theirs = names[module].split()
        rows = [len(x)]
        if len(theirs) == 2:
            rows = [cfg.intermediate_size] * 2
        if len(theirs) == 3:
            rows = [cfg.n_head * cfg.head_dim] + [cfg.n_kv_head * cfg.head_dim] * 2
        for their, view in zip(theirs, x.split(rows)):
            if gpt2 and layer and x.dim() == 2:        # GPT-2 stores matrices as (in, out)
                view = view.T
            views[f"{prefix}{their}.{kind}"] = view
    return views


def refuse_other_weights(path):
    """An error that says what to do, where a folder or file holds no weights that are read here."""
    names = os.listdir(path) if os.path.isdir(path) else [os.path.basename(path)]
    names = sorted(name.lower() for name in names)
    if {"adapter_config.json", "adapter_model.safetensors"} & set(names):
        raise InputError(f"{path}: a LoRA adapter; merge it first, by PEFT's merge_and_unload() "
                         "and save_pretrained()")
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.endswith(".gguf") for name in names):
        raise InputError(f"{path}: GGUF is not read; take the model's *.safetensors")
    for name in names:
        is_weights = name.startswith(("pytorch_model", "consolidated"))
        if is_weights and name.endswith((".bin", ".pth", ".pt")):
            raise InputError(f"{path}: {name} is a pickle, which may run code; let transformers "
                             "write it again, from_pretrained() and save_pretrained()")


def read_weights(path, files, family, cfg, device):
    """*.safetensors, one file or shards -> GPT in float32."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(f"{path}: pip install safetensors, to read its weights") from None
    index = {"weight_map": {"": "model.safetensors"}}
    shards = parse_json(path, files, "model.safetensors.index.json", index).get("weight_map", {})
    found = {}                                         # name -> open file, name in that file
    for shard in sorted(set(shards.values())):
        try:
            file = safe_open(os.path.join(path, shard), framework="pt")
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: {shard} cannot be read ({e})") from None
        for name in file.keys():                       # trunks are saved without the prefix, too
            ours = name.replace("_orig_mod.", "").removeprefix("module.")    # torch.compile, DDP
            ours = re.sub("^(?=wte|wpe|h[.]|ln_f)", "transformer.", ours)
            ours = re.sub("^(?=layers[.]|embed_tokens|norm[.])", "model.", ours)
            found[ours] = (file, name)
    with torch.device("meta"):
        model = GPT(cfg)
    model = model.to_empty(device=device)
    views = hf_views(cfg, family, model.state_dict())
    for name, view in views.items():
        if name not in found:
            raise InputError(f"{path}: tensor {name} is missing, of shape {list(view.shape)}")
        file, their = found[name]
        tensor = file.get_slice(their)
        dtype, shape = tensor.get_dtype(), tensor.get_shape()
        if shape != list(view.shape) or dtype not in ("F32", "BF16", "F16"):
            raise InputError(f"{path}: tensor {name} is {dtype} {shape}; F32, BF16 or F16 "
                             f"{list(view.shape)} is needed")
        view.copy_(file.get_tensor(their))
    if cfg.tie_embeddings and "lm_head.weight" in found:      # the embedding once more, or an error
        file, their = found["lm_head.weight"]
        if torch.equal(file.get_tensor(their).to(model.unembedding), model.unembedding):
            del found["lm_head.weight"]
    for name in sorted(found.keys() - views.keys()):
        if not IGNORED_TENSORS.search(name):
            raise InputError(f"{path}: tensor {name} has no place in the {family} of config.json")
    return model


def chat_template(files):
    """The chat template of a folder, "" if it has none."""
    template = files.get("chat_template.jinja")
    if template is None:
        settings = parse_json("chat template", files, "tokenizer_config.json", {})
        template = settings.get("chat_template") or ""
    if isinstance(template, list):                     # several, by name
        template = {x["name"]: x["template"] for x in template}.get("default", "")
    if not isinstance(template, str):
        raise InputError("tokenizer_config.json: chat_template is not text; --chat plain does "
                         "without it")
    return template


def stop_at_turn_end(cfg, tokenizer):
    """The token that ends a turn of the chat ends a response."""
    if tokenizer.template:
        turn_end = tokenizer.special[tokenizer.turn_end]
        cfg.stop_token_ids = tuple(dict.fromkeys((*cfg.stop_token_ids, turn_end)))


def folder_tokenizer(path, files, cfg, chat="auto", system="auto", today=""):
    """The tokenizer of a folder, with its chat template; --chat plain does without a broken one."""
    tokenizer = FolderTokenizer(path, files, cfg.stop_token_ids[0], system=system, today=today)
    if tokenizer.n_vocab > cfg.vocab_size:
        raise InputError(f"{path}: tokenizer.json has ids up to {tokenizer.n_vocab - 1}, and the "
                         f"model {cfg.vocab_size} rows")
    try:
        tokenizer.template = chat_template(files)
        if tokenizer.template:
            tokenizer.turn_end                         # renders a chat
    except InputError as e:
        if chat != "plain":
            raise InputError(f"{path}: {e}") from None
        tokenizer.template = ""
    tokenizer.turns = chat_by_default(chat, bool(tokenizer.template), system)
    if tokenizer.turns and not tokenizer.template:
        raise InputError(f"{path}: no chat template, which --chat chat needs; use --chat plain")
    return tokenizer


def is_hf_folder(folder, or_run_from_one=False):
    """Whether a folder holds a Hugging Face config.json; or the config.json of a run that began
    with such a model."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True                                    # reading it will say what is wrong
    if isinstance(config, dict) and "script" in config:
        return bool(or_run_from_one and config.get("pretrained"))
    return True


def read_folder(path, device="cpu", chat="auto", system="auto", today=""):
    """A Hugging Face folder -> model, tokenizer."""
    refuse_other_weights(path)
    files = {}
    for name in (*COPIED_FILES, "model.safetensors.index.json"):
        if os.path.exists(os.path.join(path, name)):
            with open(os.path.join(path, name), encoding="utf-8", errors="replace") as f:
                files[name] = f.read()
    try:
        family, cfg = read_config(path, files)
        copied = {name: text for name, text in files.items() if name in COPIED_FILES}
        tokenizer = folder_tokenizer(path, copied, cfg, chat, system, today)
        stop_at_turn_end(cfg, tokenizer)
        return read_weights(path, files, family, cfg, device), tokenizer
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise InputError(f"{path}: unexpected content ({type(e).__name__}: {e})") from None


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("export", "export-adapter"):
        sys.exit("usage: python -m common.hf export out/grpo FOLDER, or export-adapter")
    from common.export import export
    try:
        export(*sys.argv[1:])
    except InputError as e:
        sys.exit(f"export: {e}")
    except OSError as e:
        sys.exit(f"export: {e.filename or sys.argv[3]}: {e.strerror or e}")
