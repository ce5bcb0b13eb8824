"""Hugging Face models come in and go out: weights, configs, checkpoints and exports, held against
transformers.   python -m pytest tests/test_hf_models.py

The models are random, of each family's shape, made from its own configuration; nothing is
downloaded. Tokenizers and chat templates: test_chat_templates.py."""
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from common import InputError, load  # noqa: E402
from common.checkpoint import hash_weights, save_checkpoint  # noqa: E402
from common.export import export as export_as  # noqa: E402
from common.export import write_folder  # noqa: E402
from common.hf import hf_views  # noqa: E402
from common.lora import add_adapters  # noqa: E402
from common.tokenizer import (encode_chat, encode_prompt, encode_response,  # noqa: E402
                              make_tokenizer)
from conftest import ROOT, metrics, script, tiny  # noqa: E402
from model import GPT, GPTConfig, ScalarModel  # noqa: E402
from test_chat_templates import (HARD, SPECIAL, TEMPLATES, TURN_END, apply, raw_ids,  # noqa: E402
                                 talk, theirs)

V = 640                           # rows of the embedding, more than the tokenizers have ids
SHAPE = dict(vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=80, max_position_embeddings=256, initializer_range=.3)
SCALED = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
PLAIN_ROPE = dict(rope_type="default", rope_theta=1e6)
CONFIGS = {                       # family, its settings, tokenizer, chat template
    "gpt2": ("GPT2", dict(vocab_size=V, n_embd=48, n_layer=2, n_head=4, n_positions=256,
                          initializer_range=.3), "gpt2", None),
    "llama2": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=False),
               "sentencepiece", None),
    "llama3": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=False, rms_norm_eps=1e-5,
                             rope_parameters=SCALED), "llama3", "llama3.2"),
    "llama3.2": ("Llama", dict(num_key_value_heads=1, tie_word_embeddings=True, head_dim=16,
                               rope_parameters=SCALED), "llama3", "llama3.2"),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True,
                            rope_parameters=PLAIN_ROPE), "qwen", "qwen2.5"),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=16),
              "qwen", "qwen3"),
}


def make(folder, name, dtype=torch.float32, **more):
    """A random model of this family, whose norms and biases are not trivial, with a tokenizer and
    the chat template of such models."""
    family, settings, kind, template = CONFIGS[name]
    tokenizer = theirs(kind, TEMPLATES.get(template))
    end = SPECIAL[kind][0]
    if template:
        end = tokenizer.eos_token = TURN_END[template]
    shape = {} if family == "GPT2" else SHAPE
    config = getattr(transformers, f"{family}Config")(**shape | settings)
    config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    config.bos_token_id = tokenizer.bos_token_id
    config.update(more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * .2)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.float()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """One folder of each family, made once: {name: (folder, transformers' model)}."""
    root = tmp_path_factory.mktemp("hub")
    return {name: (str(root / name), make(str(root / name), name)) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def public(hub, request):
    return request.param, *hub[request.param]


def edited(folder, tmp_path, file="config.json", drop=(), **more):
    """A copy of a folder with one JSON file changed."""
    out = tmp_path / f"edited {len(os.listdir(tmp_path))}"
    shutil.copytree(folder, out)
    old = json.loads((out / file).read_text(encoding="utf-8")) if (out / file).exists() else {}
    kept = {name: x for name, x in old.items() if name not in drop}
    (out / file).write_text(json.dumps(kept | more), encoding="utf-8")
    return str(out)


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return a.cfg == b.cfg and all(torch.equal(x, y) for x, y in pairs)


def logits(model, tokens):
    return model(tokens) @ model.unembedding.T


def export(folder, *args):
    """python -m common.hf"""
    return subprocess.run([sys.executable, "-m", "common.hf", *args], cwd=folder, text=True,
                          env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True)


def ways(tokenizer):
    """How a tokenizer writes texts, prompts and chats."""
    rows = [{"prompt": "2+2?\n"}]
    if tokenizer.template:
        rows.append({"messages": talk("2+2? ", "4", "<|im_end|>?")})
        rows.append({"messages": talk("2+2? ", "4", "<|im_end|>?", system="Be brief. ")})
    return [[tokenizer.encode(x) for x in HARD], [tokenizer.encode(x, special=True) for x in HARD],
            [encode_prompt(tokenizer, row) for row in rows],
            [encode_response(tokenizer, row, "4 <|im_end|>") for row in rows],
            [encode_chat(tokenizer, row["messages"][:-1]) for row in rows[1:]],
            tokenizer.name, tokenizer.turns, tokenizer.system, tokenizer.end, tokenizer.first]


# ------------------------------------------------------------------------------------------ weights


def test_log_probs_gradients_and_greedy_responses_are_those_of_transformers(public):
    name, folder, theirs = public
    ours, _ = load(folder)
    torch.manual_seed(1)
    tokens = torch.randint(V, (3, 50))
    want = theirs(tokens).logits.log_softmax(-1)
    assert want.std() > 1
    want = want[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    got = ours.token_logp(tokens)[0][:, 1:]
    assert (got - want).abs().max() < 1e-4
    theirs.zero_grad()
    want.mean().backward()
    got.mean().backward()
    grads = copy.deepcopy(ours)
    for p, g in zip(grads.parameters(), ours.parameters()):
        p.data = g.grad
    views = hf_views(ours.cfg, theirs.config.model_type, grads.state_dict())
    for tensor, p in theirs.named_parameters():
        assert (views[tensor] - p.grad).abs().max() < 1e-4 * max(1, p.grad.abs().max()), tensor
    prompts = [tokens[0, :7].tolist(), tokens[1, :3].tolist()]
    found, _, _ = ours.generate(prompts, max_new_tokens=24, temperature=0, stop_token_ids=[V])
    for row, prompt in zip(found, prompts):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[0]
        assert row[:len(prompt) + 24].tolist() == want.tolist()


def test_a_model_that_is_written_and_read_again_is_the_same(public, tmp_path):
    name, folder, theirs = public
    model, tokenizer = load(folder)
    save_checkpoint(str(tmp_path), model, tokenizer)   # by way of a checkpoint, as after training
    checkpoint, again = load(str(tmp_path))
    assert same(checkpoint, model) and ways(again) == ways(tokenizer)
    out = str(tmp_path / "out")
    write_folder(out, checkpoint, again)
    back, third = load(out)
    assert same(back, model) and ways(third) == ways(tokenizer)
    with open(os.path.join(out, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    assert config["eos_token_id"] == list(model.cfg.stop_token_ids)
    assert "rope_parameters" not in config             # transformers 4 would use another angle
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(V, (2, 30))
    assert torch.equal(read(tokens).logits, theirs(tokens).logits)
    assert read.generation_config.eos_token_id == list(model.cfg.stop_token_ids)
    auto = transformers.AutoTokenizer.from_pretrained(out)
    for text in HARD:
        assert raw_ids(auto, text) == tokenizer.encode(text, special=True)
    with pytest.raises(InputError):                    # it exists already
        write_folder(out, back, third)


def test_shards_are_one_model(public, tmp_path):
    name, folder, theirs = public
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if os.path.exists(os.path.join(folder, file)):
            shutil.copy(os.path.join(folder, file), tmp_path / "sharded")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1 and same(load(str(tmp_path / "sharded"))[0], load(folder)[0])
    os.remove(shards[0])
    with pytest.raises(InputError, match=shards[0].name):
        load(str(tmp_path / "sharded"))


def test_names_of_tensors_as_trainers_write_them_are_read(public, tmp_path):
    """torch.compile and DDP put a prefix in front, and a trunk is saved without its own."""
    name, folder, _ = public
    stored = load_file(os.path.join(folder, "model.safetensors"))
    trunk = "transformer." if name == "gpt2" else "model."
    for i, rename in enumerate((lambda x: "module." + x, lambda x: "_orig_mod." + x,
                                lambda x: x.removeprefix(trunk))):
        out = shutil.copytree(folder, tmp_path / str(i))
        save_file({rename(x): tensor for x, tensor in stored.items()}, out / "model.safetensors")
        assert same(load(str(out))[0], load(folder)[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_files_become_float32_masters_exactly(dtype, tmp_path):
    make(str(tmp_path / "in"), "qwen2", dtype)
    stored = load_file(tmp_path / "in/model.safetensors")
    model, tokenizer = load(str(tmp_path / "in"))
    for name, view in hf_views(model.cfg, "qwen2", model.state_dict()).items():
        assert stored[name].dtype == dtype and view.dtype == torch.float32
        assert torch.equal(view, stored[name].float())
    write_folder(str(tmp_path / "out"), model, tokenizer)      # always as float32
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.dtype == torch.float32 and torch.equal(read.lm_head.weight, model.unembedding)


def test_tied_weights_may_be_stored_twice_but_not_differ(hub, tmp_path):
    folder, _ = hub["qwen2"]
    shutil.copytree(folder, tmp_path / "x")
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    assert "lm_head.weight" not in tensors and load(folder)[0].head is None
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "x/model.safetensors")
    assert same(load(str(tmp_path / "x"))[0], load(folder)[0])
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "x/model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight"):
        load(str(tmp_path / "x"))
    untied, _ = load(edited(str(tmp_path / "x"), tmp_path, tie_word_embeddings=False))
    assert torch.equal(untied.head.weight, tensors["lm_head.weight"])


def test_old_files_without_prefix_and_with_tables_are_read(hub, tmp_path):
    """The first GPT-2 files lack "transformer." and hold the causal mask; the first Llama files
    hold RoPE's frequencies."""
    tables = {"gpt2": "h.0.attn.bias", "llama2": "model.layers.0.self_attn.rotary_emb.inv_freq"}
    for name, extra in tables.items():
        shutil.copytree(hub[name][0], tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors = {x.removeprefix("transformer."): y for x, y in tensors.items()}
        save_file(tensors | {extra: torch.ones(3)}, tmp_path / name / "model.safetensors")
        assert same(load(str(tmp_path / name))[0], load(hub[name][0])[0])


def test_wrong_and_missing_tensors_are_named(hub, tmp_path):
    folder, _ = hub["qwen3"]
    whole = load_file(os.path.join(folder, "model.safetensors"))
    wrong, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    rest = {name: x for name, x in whole.items() if name != wrong}
    for tensors, named in (
            (rest, rf"{wrong}.*\[80, 48\]"),
            (rest | {wrong: torch.ones(80, 47)}, rf"{wrong}.*\[80, 47\].*\[80, 48\]"),
            (rest | {wrong: torch.ones(80, 48, dtype=torch.int8)}, rf"{wrong}.*I8"),
            (whole | {extra: whole[wrong].clone()}, extra)):
        shutil.copytree(folder, tmp_path / "x", dirs_exist_ok=True)
        save_file(tensors, tmp_path / "x/model.safetensors")
        with pytest.raises(InputError, match=named):
            load(str(tmp_path / "x"))
    (tmp_path / "x/model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="model.safetensors"):
        load(str(tmp_path / "x"))


def test_biases_everywhere_are_read_in_llama(tmp_path):
    theirs = make(str(tmp_path), "llama2", attention_bias=True, mlp_bias=True)
    tokens = torch.randint(V, (2, 20))
    ours, tokenizer = load(str(tmp_path))
    assert ours.cfg.bias and (logits(ours, tokens) - theirs(tokens).logits).abs().max() < 1e-4
    write_folder(str(tmp_path / "out"), ours, tokenizer)
    assert same(load(str(tmp_path / "out"))[0], ours)


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("name, field, x", [
    ("qwen2", "model_type", "mixtral"),
    ("qwen2", "architectures", ["Qwen2ForSequenceClassification"]),
    ("qwen2", "use_sliding_window", True), ("qwen2", "hidden_act", "gelu"),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
    ("qwen2", "quantization_config", {"bits": 4}), ("qwen2", "some_new_option", 3),
    ("qwen2", "eos_token_id", None), ("qwen2", "hidden_size", "wide"),
    ("qwen2", "rms_norm_eps", None), ("qwen3", "attention_bias", True),
    ("llama2", "attention_bias", True), ("llama2", "mlp_bias", True),
    ("llama2", "partial_rotary_factor", .5), ("gpt2", "activation_function", "gelu"),
    ("gpt2", "scale_attn_weights", False), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True)])
def test_what_gpt_cannot_compute_is_named(hub, tmp_path, name, field, x):
    folder = edited(hub[name][0], tmp_path, **{field: x})
    if field == "eos_token_id":
        folder = edited(folder, tmp_path, "generation_config.json", drop=["eos_token_id"])
    with pytest.raises(InputError, match=f"config.json.*{field}") as e:
        load(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("rope, named", [
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "yarn"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mscale": 2}), "mscale")])
def test_a_rope_that_gpt_cannot_compute_is_named(hub, tmp_path, rope, named):
    with pytest.raises(InputError, match=f"config.json.*{named}"):
        load(edited(hub["qwen2"][0], tmp_path, drop=["rope_parameters"], **rope))


@pytest.mark.parametrize("more", [
    dict(predict_special_tokens=True, n_special=0, output_past=True, id2label={"0": "LABEL_0"},
         label2id={"LABEL_0": 0}, return_dict=True, tokenizer_class="GPT2Tokenizer"),
    dict(_attn_implementation_autoset=True, unsloth_fixed=True, is_llama_config=True,
         torch_dtype="bfloat16", sliding_window=4096, use_mrope=False, rope_interleaved=False)])
def test_what_changes_nothing_is_let_through(hub, tmp_path, more):
    """Fields that the public gpt2-medium, distilgpt2, gpt2-xl and others carry along."""
    for name in ("gpt2", "llama3", "qwen2"):
        assert same(load(edited(hub[name][0], tmp_path, **more))[0], load(hub[name][0])[0])


@pytest.mark.parametrize("change", [
    dict(rope_scaling=[1]), dict(rope_scaling="yarn"), dict(rope_parameters={"rope_theta": None}),
    dict(rope_parameters={"rope_theta": "big"}), dict(layer_types=5), dict(model_type=["qwen2"]),
    dict(rope_parameters=SCALED | {"high_freq_factor": 1.0}), dict(hidden_size=-48),
    dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), dict(num_hidden_layers=0),
    dict(num_hidden_layers=True), dict(eos_token_id=[[1]]), dict(eos_token_id="</s>"),
    dict(eos_token_id=V), dict(eos_token_id=-1), dict(file="tokenizer.json", model=[]),
    dict(file="generation_config.json", eos_token_id=1.5),
    dict(file="tokenizer.json", added_tokens=[{"id": 600}]),
    dict(file="tokenizer.json", model={"vocab": [], "merges": []})])
def test_strange_fields_end_in_one_line(hub, tmp_path, change):
    with pytest.raises(InputError) as e:
        load(edited(hub["llama3"][0], tmp_path, **change))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("template", (7, [7], ["text"], [{"name": "default"}], {"default": "text"}))
def test_strange_chat_templates_end_in_one_line(hub, tmp_path, template):
    with pytest.raises(InputError) as e:
        load(edited(hub["gpt2"][0], tmp_path, "tokenizer_config.json", chat_template=template))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("file, text", [
    ("model.safetensors.index.json", '{"weight_map": []}'), ("tokenizer.json", '{"model"'),
    ("model.safetensors.index.json", "null"), ("model.safetensors.index.json", '{"a": 1}'),
    ("tokenizer.json", "[" * 100_000), ("tokenizer.json", ""), ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", "{"), ("config.json", '{"model_type": "gpt2"'),
    ("chat_template.jinja", "{% if")])
def test_torn_files_end_in_one_line(hub, tmp_path, file, text):
    shutil.copytree(hub["gpt2"][0], tmp_path / "x")
    (tmp_path / "x" / file).write_text(text)
    with pytest.raises(InputError) as e:
        load(str(tmp_path / "x"))
    assert "\n" not in str(e.value)


def test_both_spellings_of_rope(hub, tmp_path):
    folder, _ = hub["llama3"]
    scaling = {name: x for name, x in SCALED.items() if name != "rope_theta"}
    bare = edited(folder, tmp_path, drop=["rope_parameters", "rope_theta"])
    old, _ = load(edited(bare, tmp_path, rope_theta=5e5, rope_scaling=scaling))
    assert same(old, load(folder)[0]) and old.cfg.rope_scaling == (8, 1, 4, 32)
    oldest, _ = load(edited(bare, tmp_path, rope_scaling=None))
    assert oldest.cfg.rope_theta == 10_000 and oldest.cfg.rope_scaling == ()


def test_every_id_that_ends_a_response_is_a_stop(hub, tmp_path):
    """config.json's own first, which ends a plain response; generation_config.json's (Llama 3's
    list), and the end of a chat's turn, also where a plain checkpoint goes on with turns."""
    folder = edited(hub["llama3"][0], tmp_path, eos_token_id=[7, 9])
    folder = edited(folder, tmp_path, "generation_config.json", eos_token_id=[9, 11])
    model, tokenizer = load(folder)
    turn_end = tokenizer.special[TURN_END["llama3.2"]]
    assert model.cfg.stop_token_ids == (7, 9, 11, turn_end) and tokenizer.end == 7
    plain, tokenizer = load(folder, chat="plain")
    assert plain.cfg.stop_token_ids[:3] == (7, 9, 11) and not tokenizer.turns
    save_checkpoint(str(tmp_path), plain, tokenizer)
    again, tokenizer = load(str(tmp_path), chat="chat")
    assert tokenizer.turns and turn_end in again.cfg.stop_token_ids


# -------------------------------------------------------------------------- checkpoints and exports


def test_a_checkpoint_keeps_how_its_prompts_were_written(hub, tmp_path):
    for name in ("llama3", "qwen2"):
        folder, row = hub[name][0], {"prompt": "2+2?\n"}
        model, brief = load(folder, system="Be brief.")
        plain = load(folder, chat="plain")[1]
        save_checkpoint(str(tmp_path), model, brief)
        assert ways(load(str(tmp_path))[1]) == ways(brief)
        brief.today = "2001-02-03"                     # a resumed run keeps its date
        save_checkpoint(str(tmp_path), model, brief)
        again = load(str(tmp_path))[1]
        shows_date = "03 Feb 2001" in again.decode(encode_prompt(again, row))
        assert again.today == "2001-02-03" and shows_date == (name == "llama3")
        assert encode_prompt(load(str(tmp_path), chat="plain")[1], row) == encode_prompt(plain, row)
        save_checkpoint(str(tmp_path), model, plain)
        assert ways(load(str(tmp_path))[1]) == ways(plain)


def lora_run(folder, tmp_path):
    """A checkpoint of adapters whose B is not 0 on a model folder, and what it computes."""
    base, tokenizer = load(folder)
    origin = {"base": str(folder), "base_hash": hash_weights(base)}
    torch.manual_seed(0)
    model = add_adapters(base, 3, 6.0, **origin)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * .1
    save_checkpoint(str(tmp_path), model, tokenizer)
    tokens = torch.randint(0, 200, (2, 12))
    with torch.no_grad():
        return tokens, model(tokens) @ model.unembedding.T


def test_merged_adapters_are_exported_as_a_model_that_transformers_loads(public, tmp_path):
    _, folder, _ = public
    (tmp_path / "run").mkdir()
    tokens, logits = lora_run(folder, tmp_path / "run")
    export_as("export", str(tmp_path / "run"), str(tmp_path / "out"))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (read(tokens).logits - logits).abs().max() < 1e-4 * logits.abs().max()


def test_peft_loads_the_adapters_beside_their_base(public, tmp_path):
    """Query, key and value share A here and have one each there; GPT-2 stores (in, out)."""
    peft = pytest.importorskip("peft")
    _, folder, theirs = public
    (tmp_path / "run").mkdir()
    tokens, logits = lora_run(folder, tmp_path / "run")
    export_as("export-adapter", str(tmp_path / "run"), str(tmp_path / "out"))
    before = theirs(tokens).logits
    model = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "out")
    assert (model(tokens).logits - logits).abs().max() < 1e-4 * logits.abs().max()
    assert (before - logits).abs().max() > 0.1
    with pytest.raises(InputError, match="exists already"):
        export_as("export-adapter", str(tmp_path / "run"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="out: no checkpoint|LoRA adapter; merge it"):
        export_as("export-adapter", str(tmp_path / "out"), str(tmp_path / "again"))


def test_a_model_that_is_no_policy_or_has_no_adapters_is_not_exported_as_them(small, tmp_path):
    model, tokenizer = load(small)
    reward_model = add_adapters(ScalarModel(model), 2, 4.0, base=str(small), base_hash="x")
    save_checkpoint(str(tmp_path), reward_model, tokenizer)
    with pytest.raises(InputError, match="a reward model"):
        export_as("export-adapter", str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(InputError, match="no adapters"):
        export_as("export-adapter", str(small), str(tmp_path / "out"))


def test_export_takes_nothing_over_and_leaves_nothing_half_done(hub, tmp_path):
    save_checkpoint(str(tmp_path), *load(hub["gpt2"][0]))

    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "mine.tmp/config.json").write_text("precious")
    (tmp_path / "file").write_text("")
    for args in (("export", ".", "mine"), ("export", ".", ""), ("export", ".", "file/x"),
                 ("export", ".", "mine.tmp"), ("export", "nowhere", "x"), ("export", "."),
                 ("improt", ".", "x")):
        done = export(tmp_path, *args)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "mine.tmp/config.json").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "file", "mine.tmp"]
    assert export(tmp_path, "export", ".", "new/folder/").returncode == 0
    assert same(load(str(tmp_path / "new/folder"))[0], load(hub["gpt2"][0])[0])
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_a_model_that_began_here_is_written_with_its_tokenizer(family, tmp_path):
    """All four layouts, and the built-in tokenizer, which is 256 bytes and no merge."""
    model = tiny(family, torch.float32, vocab_size=259, stop_token_ids=(256, 258))
    tokenizer, out = make_tokenizer(), str(tmp_path / family)
    write_folder(out, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    reader = transformers.AutoTokenizer
    if family == "qwen2":                              # it ignores the file and makes Qwen's own
        reader = transformers.PreTrainedTokenizerFast
    auto = reader.from_pretrained(out)
    tokens = torch.randint(259, (2, 20))
    assert (theirs(tokens).logits - logits(model, tokens)).abs().max() < 1e-4
    read, back = load(out)
    assert same(read, model) and back.special == tokenizer.special and not back.turns
    for text in HARD + list(tokenizer.special):
        ids = tokenizer.encode(text, special=True)
        assert raw_ids(auto, text) == back.encode(text, special=True) == ids
        assert back.encode(text) == tokenizer.encode(text), text
        assert back.decode(ids) == tokenizer.decode(ids) == auto.decode(ids) == text
    assert auto.decode([53, 43, 256]) == "5+<|endoftext|>" and auto.eos_token_id == 256


def test_a_config_that_no_family_has_is_refused_by_its_field(tmp_path):
    with pytest.raises(InputError, match="norm"):
        write_folder(str(tmp_path / "odd"), GPT(GPTConfig(norm="layer")), make_tokenizer())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("system", ("", 'Say "{{ hi }}" {% x %}\nand 汉字 \\boxed{}.', "Smile 🙂."))
def test_prompts_stay_as_they_were_on_the_way_out(tmp_path, system):
    """A model that began here gets a template of its own, which writes its system line."""
    tokenizer = make_tokenizer(turns=True, system=system)
    write_folder(str(tmp_path / "out"), GPT(GPTConfig(stop_token_ids=(256, 258))), tokenizer)
    back = load(str(tmp_path / "out"))[1]
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.turns
    for messages in (talk("2+2?"), talk(" a ", "b", "\nc"), talk("2+2?", system=" Own. ")):
        ids = encode_prompt(tokenizer, {"messages": messages})
        assert encode_prompt(back, {"messages": messages}) == ids
        assert apply(auto, messages) == ids
    row = {"prompt": "2+2?\n"}
    assert encode_prompt(back, row) == encode_prompt(tokenizer, row)
    assert encode_response(back, row, "4") == encode_response(tokenizer, row, "4")


def test_a_system_line_without_turns_is_refused(tmp_path, hub):
    write_folder(str(tmp_path / "plain"), GPT(GPTConfig()), make_tokenizer())
    for folder in (str(tmp_path / "plain"), hub["gpt2"][0]):
        with pytest.raises(InputError, match="--system"):
            load(folder, system="Hm")


@pytest.mark.parametrize("package", ("safetensors", "tokenizers"))
def test_without_a_package_one_line_says_what_to_install(hub, tmp_path, monkeypatch, package):
    model, tokenizer = GPT(GPTConfig()), make_tokenizer()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install.* {package}"):
        load(hub["qwen2"][0])
    with pytest.raises(InputError, match=f"pip install.* {package}"):
        write_folder(str(tmp_path / "out"), model, tokenizer)


# -------------------------------------------------------------------------------------- the scripts

FEW = ["--data", "rows.jsonl", "--eval_every", 1]
# a random model is never right, but a reward model tells its responses apart
RL = [*FEW, "--steps", 2, "--max_new_tokens", 8, "--reward", "reward", "--prompts", 4]
START = {
    "sft.py": [*FEW, "--steps", 2, "--batch", 4, "--max_new_tokens", 8],
    "dpo.py": ["--data", "pairs.jsonl", "--batch", 16, "--max_new_tokens", 8, "--eval_every", 1],
    "ppo.py": [*RL, "--minibatch", 2],
    "grpo.py": [*RL, "--group_size", 2, "--minibatch", 4],
    "dapo.py": [*RL, "--group_size", 2, "--minibatch", 4, "--max_generations", 2,
                "--overlong_cache", 4],
}


@pytest.fixture(scope="session")
def home(hub, tmp_path_factory):
    """A folder with rows, with pairs, and with a reward model that reward.py made from a Hugging
    Face folder in three steps: 38 pairs in batches of 16."""
    home = tmp_path_factory.mktemp("public")
    rows, pairs = [], []
    for i in range(90):
        prompt, response = f"{i} + {i}?", f"{i} + {i} is\n#### {2 * i}"
        row = {"prompt": prompt, "answer": str(2 * i), "response": response}
        rows.append(json.dumps(row) + "\n")
        pair = {"prompt": prompt, "chosen": response, "rejected": "no"}
        pairs.append(json.dumps(pair) + "\n")
    (home / "rows.jsonl").write_text("".join(rows))
    (home / "pairs.jsonl").write_text("".join(pairs[:40]))
    folder, _ = hub["qwen2"]
    model, _ = load(folder)                            # a tenth of all ids end its responses
    stop = [*model.cfg.stop_token_ids, *range(30, 90)]
    shutil.copytree(edited(folder, home, eos_token_id=stop), home / "public")
    done = script("reward.py", "--init", "public", *START["dpo.py"], "--out", "reward", cwd=home)
    assert done.returncode == 0 and len(metrics(home / "reward")) == 3, done.stderr
    return home


@pytest.mark.slow
@pytest.mark.parametrize("name", START)
def test_every_script_starts_from_a_hugging_face_folder_and_its_result_goes_back(home, name):
    """Two steps on the user's own rows; what is exported is what was trained."""
    out = name.removesuffix(".py")
    done = script(name, "--init", "public", "--out", out, *START[name], cwd=home)
    assert done.returncode == 0, done.stderr
    assert "--gradient_checkpointing True" in done.stdout.splitlines()[0]
    settings = json.loads((home / out / "config.json").read_text())
    assert len(metrics(home / out)) >= 2 and settings["pretrained"]
    assert export(home, "export", "reward", "x").returncode == 1    # no policy
    done = export(home, "export", out, f"{out} back")
    assert done.returncode == 0, done.stderr
    trained, tokenizer = load(str(home / out))
    before, _ = load(str(home / "public"))
    assert trained.cfg == before.cfg and not same(trained, before)
    tokens = torch.randint(V, (2, 20))
    read = transformers.AutoModelForCausalLM.from_pretrained(home / f"{out} back")
    assert (read(tokens).logits - logits(trained, tokens)).abs().max() < 1e-4
    assert ways(load(str(home / f"{out} back"))[1]) == ways(tokenizer)
    if name == "grpo.py":                              # on from the checkpoint
        done = script("dapo.py", "--init", out, "--out", "on", *START["dapo.py"], cwd=home)
        assert done.returncode == 0 and "--gradient_checkpointing True" in done.stdout, done.stderr
        done = script("grpo.py", "--out", out, "--resume", "--steps", 3, cwd=home)
        assert done.returncode == 0, done.stderr
        assert [row["step"] for row in metrics(home / out)] == [0, 1, 2, 3]


def test_the_copy_of_grpo_trains_a_transformers_model(hub, tmp_path):
    """experiments/grpo_on_transformers.py for two rollouts on a random Qwen model."""
    folder, _ = hub["qwen2"]
    done = script("experiments/grpo_on_transformers.py", folder, "--steps", 2, "--out", "out",
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 2:" in done.stdout and load(str(tmp_path / "out"))[0].cfg.n_layer == 2
