"""
A checkpoint as a Hugging Face folder, `python -m common.hf export out/grpo FOLDER`.
"""
import json
import os
import shutil
from dataclasses import asdict

from common.hf import (FAMILIES, GPT2_SIZE_FIELDS, ROPE_FIELDS, SIZE_FIELDS, hf_views, parse_json,
                       read_config)
from common.tokenizer import InputError


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


def write_folder(folder, model, tokenizer):
    """Write what read_folder and transformers read: float32 weights, and the files that came with
    the model."""
    try:
        import tokenizers  # noqa: F401
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(f"{folder}: pip install safetensors tokenizers, to write it") from None
    if os.path.exists(folder):
        raise InputError(f"{folder}: it exists already; name a new folder")
    cfg = model.cfg
    family = "llama"
    if cfg.positions == "learned":
        family = "gpt2"
    elif cfg.qk_norm:
        family = "qwen3"
    elif cfg.qkv_bias:
        family = "qwen2"
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

    unfinished = os.path.normpath(folder) + ".tmp"
    os.makedirs(unfinished)
    try:
        for name, text in files.items():
            with open(os.path.join(unfinished, name), "w", encoding="utf-8") as f:
                f.write(text)
        tensors = {name: view.contiguous() for name, view in hf_views(model, family).items()}
        save_file(tensors, os.path.join(unfinished, "model.safetensors"), metadata={"format": "pt"})
        os.replace(unfinished, folder)
    except SafetensorError as e:
        raise InputError(f"{folder}: could not be written ({e})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)          # nothing is left of a failed export
