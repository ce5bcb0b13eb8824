"""Public models go in and come out: weights, tokenizers, chat formats, held against transformers and tokenizers.   python -m pytest tests/test_public_weights.py

The checkpoints are random, of each family's shape, made from its own configuration; nothing is downloaded."""
import base64
import copy
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from tokenizers import Tokenizer as PublicTokenizer  # noqa: E402

import model as M  # noqa: E402
from conftest import ROOT, metrics, script  # noqa: E402
from model import GPT, GPTConfig, InputError, load, make_tokenizer  # noqa: E402

V = 640                                                               # rows of the embedding, some more than the tokenizers have ids
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
HARD = ["", " ", "a", "汉字测试 日本語 русский العربية ไทย हिन्दी", "🙂👩‍👩‍👧🏽 🇩🇪", "e\u0301 a\u0323\u0308 \u1e9b\u0323 \ufb01 \u212a \u2126", "x" + " " * 70 + "y \n\n  \n\tz  ",
        "1 12 123 1234567 1,234.5 ٣٤", "it's I'LL don'T we'Ve \u017f's", "<|im_start|>user\nhi <think>so</think><|im_end|>\u0338\n", "x\u0085y\u00a0z\u2003w\u200b", "\x00\x7f\r\n\r",
        "<|endoftext|>" * 3, "<|eot_id|><|start_header_id|>", "a\ud7ffb\U0010ffff", "naïve café Ångström", "def f(x):\n    return x**2  # ok\n"]
TEXT = HARD * 3 + ["How many clips did she sell altogether in April and May? 48 + 24 = 72 clips. #### 72", "the of and to a in that it is was", "汉字 测试 测试 汉字"] * 20


def public_tokenizer(kind, size=500):
    """A tokenizer of the family's kind, trained on a few lines."""
    t = PublicTokenizer(models.BPE(ignore_merges=kind == "llama"))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind != "gpt2":
        split = pre_tokenizers.Split(Regex(M.SPLIT[kind]), "isolated")
        t.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.normalizer = normalizers.NFC() if "qwen" in kind else t.normalizer
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    marks = {"gpt2": [], "llama": list(M.LLAMA3.values())}.get(kind, ["<|im_start|>", "<|im_end|>"])
    t.add_special_tokens(["<|endoftext|>"] * (kind != "llama") + marks)
    if kind == "llama":
        bos = "<|begin_of_text|>"
        t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, t.token_to_id(bos))])])
    if kind == "qwen3":
        t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return t


SHAPE = dict(vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, max_position_embeddings=256, initializer_range=.3)
SCALED = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4, n_positions=256, initializer_range=.3),
    "llama2": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=4, tie_word_embeddings=False),
    "llama3": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=SCALED, rms_norm_eps=1e-5),
    "llama3.2": lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, rope_parameters=SCALED),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)}


def make(folder, name, dtype=torch.float32, **more):
    """A random checkpoint of this family, whose norms and biases are not trivial, with its tokenizer and chat template."""
    kind = name if name in M.FAMILIES else "llama"
    t = public_tokenizer(kind)
    end = t.token_to_id("<|im_end|>" if "qwen" in kind else "<|eot_id|>" if kind == "llama" else "<|endoftext|>")
    config = CONFIGS[name]()
    config.update(dict(eos_token_id=end, bos_token_id=t.token_to_id("<|begin_of_text|>")) | more)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * .2 * (p.dim() == 1))
    model.to(dtype).save_pretrained(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": t.id_to_token(end)}
    settings |= {"bos_token": "<|begin_of_text|>"} if kind == "llama" else {}
    settings |= {"chat_template": LLAMA3 if kind == "llama" else CHATML} if kind != "gpt2" else {}
    t.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(settings, f)
    return model.float()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """One folder of each family, made once."""
    root = tmp_path_factory.mktemp("hub")
    return {name: (str(root / name), make(str(root / name), name)) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def public(hub, request):
    """name, folder, transformers' model"""
    return request.param, *hub[request.param]


def edited(folder, tmp_path, file="config.json", drop=(), **more):
    """A copy of a folder with one JSON file changed."""
    out = tmp_path / f"edited {len(os.listdir(tmp_path))}"
    shutil.copytree(folder, out, dirs_exist_ok=True)
    with open(out / file) as f:
        old = {name: x for name, x in json.load(f).items() if name not in drop}
    (out / file).write_text(json.dumps(old | more))
    return str(out)


def same(a, b):
    return a.cfg == b.cfg and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# weights


def test_log_probs_gradients_and_greedy_answers_are_those_of_transformers(public):
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
    views = M.public_views(grads, theirs.config.model_type)
    for tensor, p in theirs.named_parameters():
        assert (views[tensor] - p.grad).abs().max() < 1e-4 * max(1, p.grad.abs().max()), tensor
    prompts = [tokens[0, :7].tolist(), tokens[1, :3].tolist()]
    found, mask, _ = ours.generate(prompts, max_new=24, temperature=0, stop=[V])
    for row, m, prompt in zip(found, mask, prompts):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
        assert row[:len(prompt) + 24].tolist() == want.tolist()


def test_a_model_that_is_written_and_read_again_is_the_same_and_transformers_agrees(public, tmp_path):
    name, folder, theirs = public
    model, tokenizer = load(folder)
    M.save(str(tmp_path), model, tokenizer)                               # by way of a checkpoint, as after training
    checkpoint, again = load(str(tmp_path))
    assert same(checkpoint, model) and again.name == tokenizer.name
    assert [again.encode(x, allowed_special="all") for x in HARD] == [tokenizer.encode(x, allowed_special="all") for x in HARD]
    out = str(tmp_path / "out")
    M.write_public(out, checkpoint, again)
    back, third = load(out)
    assert same(back, model) and third.name == tokenizer.name
    assert (third.turns, third.system, third.end, third.first) == (tokenizer.turns, tokenizer.system, tokenizer.end, tokenizer.first)
    with open(os.path.join(out, "config.json")) as f:
        config = json.load(f)
    assert config["eos_token_id"] == list(model.cfg.stop) and "rope_parameters" not in config      # transformers 4 would not see it, and turn by another angle
    read = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(V, (2, 30))
    assert torch.equal(read(tokens).logits, theirs(tokens).logits)
    assert read.generation_config.eos_token_id == list(model.cfg.stop)
    assert transformers.AutoTokenizer.from_pretrained(out)("Hi 汉字", add_special_tokens=False).input_ids == tokenizer.encode("Hi 汉字")
    with pytest.raises(InputError, match="exists already"):
        M.write_public(out, back, third)


def test_shards_are_one_model(public, tmp_path):
    name, folder, theirs = public
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    shutil.copy(os.path.join(folder, "tokenizer.json"), tmp_path / "sharded")
    assert len([x for x in os.listdir(tmp_path / "sharded") if x.endswith(".safetensors")]) > 1
    assert same(load(str(tmp_path / "sharded"))[0], load(folder)[0])
    os.remove(next(p for p in (tmp_path / "sharded").iterdir() if p.suffix == ".safetensors"))
    with pytest.raises(InputError, match=r"model-000\d\d-of-000\d\d.safetensors cannot be read"):
        load(str(tmp_path / "sharded"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_checkpoints_become_float32_masters_exactly(dtype, tmp_path):
    make(str(tmp_path / "in"), "qwen2", dtype)
    stored = load_file(tmp_path / "in/model.safetensors")
    model, tokenizer = load(str(tmp_path / "in"))
    for name, view in M.public_views(model, "qwen2").items():
        assert stored[name].dtype == dtype and view.dtype == torch.float32 and torch.equal(view, stored[name].float())
    M.write_public(str(tmp_path / "out"), model, tokenizer)                   # and leave as float32, whatever config.json said before
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
    with pytest.raises(InputError, match="lm_head.weight has no place"):
        load(str(tmp_path / "x"))
    untied, _ = load(edited(str(tmp_path / "x"), tmp_path, tie_word_embeddings=False))
    assert torch.equal(untied.head.weight, tensors["lm_head.weight"])


def test_old_files_without_prefix_and_with_tables_are_read(hub, tmp_path):
    """The first GPT-2 files lack "transformer." and hold the causal mask; the first Llama files hold RoPE's frequencies."""
    for name, extra in (("gpt2", "h.0.attn.bias"), ("llama2", "model.layers.0.self_attn.rotary_emb.inv_freq")):
        shutil.copytree(hub[name][0], tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors = {x.removeprefix("transformer."): y for x, y in tensors.items()} | {extra: torch.ones(3)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        assert same(load(str(tmp_path / name))[0], load(hub[name][0])[0])


def test_wrong_and_missing_tensors_are_named(hub, tmp_path):
    folder, _ = hub["qwen3"]
    whole = load_file(os.path.join(folder, "model.safetensors"))
    wrong = "model.layers.1.mlp.up_proj.weight"
    for tensors, message in (({x: y for x, y in whole.items() if x != wrong}, rf"{wrong} is missing, of shape \[80, 48\]"),
                             (whole | {wrong: torch.ones(80, 47)}, rf"{wrong} is F32 \[80, 47\]; F32, BF16 or F16 \[80, 48\]"),
                             (whole | {wrong: torch.ones(80, 48, dtype=torch.int8)}, rf"{wrong} is I8"),
                             (whole | {"model.layers.2.mlp.up_proj.weight": whole[wrong].clone()}, "layers.2.mlp.up_proj.weight has no place in the qwen3")):
        shutil.copytree(folder, tmp_path / "x", dirs_exist_ok=True)
        save_file(tensors, tmp_path / "x/model.safetensors")
        with pytest.raises(InputError, match=message):
            load(str(tmp_path / "x"))
    (tmp_path / "x/model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        load(str(tmp_path / "x"))


@pytest.mark.parametrize("name, change, named", [
    ("qwen2", dict(model_type="mixtral"), '"model_type": "mixtral"'), ("qwen2", dict(architectures=["Qwen2ForSequenceClassification"]), "Qwen2ForSequenceClassification"),
    ("qwen2", dict(use_sliding_window=True), '"use_sliding_window": true'), ("qwen2", dict(hidden_act="gelu"), '"hidden_act": "gelu"'),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"), ("qwen2", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("qwen2", dict(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}), '"rope_type": "yarn"'), ("qwen2", dict(some_new_option=3), '"some_new_option": 3'),
    ("qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mscale": 2}), '"mscale": 2'), ("qwen2", dict(eos_token_id=None), "eos_token_id"),
    ("qwen2", dict(hidden_size="wide"), '"hidden_size": "wide"'), ("qwen2", dict(rms_norm_eps=None), '"rms_norm_eps": null'), ("qwen3", dict(attention_bias=True), "attention_bias"),
    ("llama2", dict(attention_bias=True), "attention_bias"), ("llama2", dict(mlp_bias=True), "mlp_bias"), ("llama2", dict(partial_rotary_factor=.5), "partial_rotary_factor"),
    ("gpt2", dict(activation_function="gelu"), '"activation_function": "gelu"'), ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"), ("gpt2", dict(add_cross_attention=True), "add_cross_attention")])
def test_what_gpt_cannot_do_is_named(hub, tmp_path, name, change, named):
    drop = ("rope_parameters",) if "rope_parameters" in change and change["rope_parameters"] is None else ()
    folder = edited(hub[name][0], tmp_path, drop=drop, **{x: y for x, y in change.items() if x not in drop})
    if "eos_token_id" in change:
        folder = edited(folder, tmp_path, "generation_config.json", drop=["eos_token_id"])
    with pytest.raises(InputError, match="config.json: ") as e:
        load(folder)
    assert named in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("more", [
    dict(predict_special_tokens=True, n_special=0, output_past=True, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, return_dict=True, tokenizer_class="GPT2Tokenizer"),
    dict(_attn_implementation_autoset=True, unsloth_fixed=True, is_llama_config=True, torch_dtype="bfloat16", sliding_window=4096, use_mrope=False, rope_interleaved=False)])
def test_what_changes_nothing_is_let_through(hub, tmp_path, more):
    """Fields that the public gpt2-medium, distilgpt2, gpt2-xl and others carry along."""
    for name in ("gpt2", "llama3", "qwen2"):
        assert same(load(edited(hub[name][0], tmp_path, **more))[0], load(hub[name][0])[0])


@pytest.mark.parametrize("file, change", [
    ("config.json", dict(rope_scaling=[1])), ("config.json", dict(rope_scaling="yarn")), ("config.json", dict(rope_parameters={"rope_theta": None})), ("config.json", dict(rope_parameters={"rope_theta": "big"})),
    ("config.json", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5})), ("config.json", dict(rope_parameters=SCALED | {"high_freq_factor": 1.0})),
    ("config.json", dict(model_type=["qwen2"])), ("config.json", dict(eos_token_id=[[1]])), ("config.json", dict(eos_token_id="</s>")), ("config.json", dict(eos_token_id=V)),
    ("config.json", dict(eos_token_id=-1)), ("config.json", dict(layer_types=5)), ("config.json", dict(hidden_size=-48)), ("config.json", dict(num_hidden_layers=0)),
    ("config.json", dict(num_hidden_layers=True)), ("generation_config.json", dict(eos_token_id=1.5)), ("tokenizer_config.json", dict(chat_template=7)),
    ("tokenizer.json", dict(added_tokens=[{"id": 600}])), ("tokenizer.json", dict(model=[])), ("tokenizer.json", dict(model={"vocab": [], "merges": []}))])
def test_strange_files_end_in_one_line(hub, tmp_path, file, change):
    with pytest.raises(InputError) as e:
        load(edited(hub["llama3"][0], tmp_path, file, **change))
    assert "\n" not in str(e.value)


def test_strange_indices_and_torn_files_end_in_one_line(hub, tmp_path):
    shutil.copytree(hub["gpt2"][0], tmp_path / "x")
    for name, text in (("model.safetensors.index.json", '{"weight_map": []}'), ("model.safetensors.index.json", "null"), ("model.safetensors.index.json", '{"a": 1}'),
                       ("tokenizer.json", '{"model"'), ("tokenizer.json", "[" * 100_000), ("tokenizer.json", ""), ("config.json", '{"model_type": "gpt2"')):
        old = (tmp_path / "x" / name).read_bytes() if (tmp_path / "x" / name).exists() else None
        (tmp_path / "x" / name).write_text(text)
        with pytest.raises(InputError) as e:
            load(str(tmp_path / "x"))
        assert "\n" not in str(e.value)
        (tmp_path / "x" / name).write_bytes(old) if old else os.remove(tmp_path / "x" / name)
    assert same(load(str(tmp_path / "x"))[0], load(hub["gpt2"][0])[0])


def test_export_takes_nothing_over_and_leaves_nothing_half_done(hub, tmp_path):
    M.save(str(tmp_path), *load(hub["gpt2"][0]))
    export = lambda *args: subprocess.run([sys.executable, os.path.join(ROOT, "model.py"), *args], cwd=tmp_path, capture_output=True, text=True)
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "mine.tmp/config.json").write_text("precious")
    (tmp_path / "file").write_text("")
    for args in (["export", ".", "mine"], ["export", ".", ""], ["export", ".", "file/x"], ["export", ".", "mine.tmp"], ["export", "nowhere", "x"], ["export", "."], ["improt", ".", "x"]):
        done = export(*args)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "mine.tmp/config.json").read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["ckpt.pt", "file", "mine.tmp"]
    assert export("export", ".", "new/folder/").returncode == 0 and same(load(str(tmp_path / "new/folder"))[0], load(hub["gpt2"][0])[0])
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_the_tokenizer_of_the_first_gpt2_file_has_no_type(hub, tmp_path):
    folder = changed(hub["gpt2"][0], tmp_path, lambda t: t["model"].pop("type"))
    assert load(folder)[1].name == load(hub["gpt2"][0])[1].name


def test_both_spellings_of_rope(hub, tmp_path):
    folder, _ = hub["llama3"]
    scaling = {name: x for name, x in SCALED.items() if name != "rope_theta"}
    old = edited(folder, tmp_path, drop=["rope_parameters"], rope_theta=5e5, rope_scaling=scaling)
    assert same(load(old)[0], load(folder)[0]) and load(old)[0].cfg.rope_scaling == (8, 1, 4, 32)
    oldest = edited(folder, tmp_path, drop=["rope_parameters", "rope_theta"], rope_scaling=None)
    assert load(oldest)[0].cfg.rope_base == 10_000 and load(oldest)[0].cfg.rope_scaling == ()


def test_every_id_that_ends_an_answer_is_a_stop(hub, tmp_path):
    """config.json's own first, which ends a plain answer; generation_config.json's (Llama 3's list), and the end of a chat's turn."""
    folder, _ = hub["llama3"]
    turn_end = load(folder)[1].turn_end
    folder = edited(folder, tmp_path, eos_token_id=[7, 9])
    folder = edited(folder, tmp_path, "generation_config.json", eos_token_id=[9, 11])
    model, tokenizer = load(folder)
    assert model.cfg.stop == (7, 9, 11, turn_end) and tokenizer.end == 7


def test_biases_everywhere_are_read_in_llama(tmp_path):
    theirs = make(str(tmp_path), "llama2", attention_bias=True, mlp_bias=True)
    tokens = torch.randint(V, (2, 20))
    ours, tokenizer = load(str(tmp_path))
    assert ours.cfg.bias and (ours(tokens) @ ours.unembedding.T - theirs(tokens).logits).abs().max() < 1e-4
    M.write_public(str(tmp_path / "out"), ours, tokenizer)
    assert same(load(str(tmp_path / "out"))[0], ours)


def test_a_model_made_here_is_written_with_its_tokenizer(tmp_path):
    """All four layouts, and the built-in tokenizer, which is 256 bytes and no merge."""
    from conftest import FAMILIES, tiny
    for family in FAMILIES:
        model, tokenizer = tiny(family, torch.float32, vocab=259, stop=(256, 258)), make_tokenizer()
        M.write_public(str(tmp_path / family), model, tokenizer)
        theirs, public = (x.from_pretrained(tmp_path / family) for x in (transformers.AutoModelForCausalLM, transformers.PreTrainedTokenizerFast))
        tokens = torch.randint(259, (2, 20))
        assert (theirs(tokens).logits - model(tokens) @ model.unembedding.T).abs().max() < 1e-4
        assert same(load(str(tmp_path / family))[0], model)
        for text in HARD:
            assert public(text, add_special_tokens=False).input_ids == tokenizer.encode(text, allowed_special="all") == load(str(tmp_path / family))[1].encode(text, allowed_special="all")
        assert public.decode([53, 43, 256]) == "5+<|endoftext|>" and public.eos_token_id == 256
    with pytest.raises(InputError, match="llama config.json cannot say norm = layer"):
        M.write_public(str(tmp_path / "odd"), GPT(GPTConfig(norm="layer")), tokenizer)


# tokenizers


@pytest.mark.parametrize("kind", ("gpt2", "llama", "qwen2", "qwen3"))
def test_ids_are_those_of_the_tokenizers_package(hub, kind):
    folder = hub[kind if kind in hub else "llama3"][0]
    theirs, ours = PublicTokenizer.from_file(os.path.join(folder, "tokenizer.json")), load(folder)[1]
    rng = random.Random(0)
    some = [rng.choice(HARD + ["'s", " ", "\n", "\u0301", "12"]) for _ in range(2000)]
    joined = ["".join(some[i:i + 5]) for i in range(0, 2000, 5)]
    chaos = ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0xe000, 0x1ffff)])) for _ in range(40)) for _ in range(300)]
    for text in HARD + joined + chaos:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allowed_special="all") == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    first = theirs.encode("hi").ids
    assert M.prompt_ids(load(folder, chat="plain")[1], {"prompt": "hi"}) == first and (len(first) > 1) == (ours.encode("hi") != first)


def test_text_never_becomes_a_control_token(hub):
    for name, (folder, _) in hub.items():
        tokenizer = load(folder)[1]
        control = {i for x, i in tokenizer.marks.items() if x not in tokenizer.plain}
        for text in HARD:
            ids = tokenizer.encode_ordinary(text)
            assert not control & set(ids) and tokenizer.decode(ids) == (M.unicodedata.normalize("NFC", text) if tokenizer.nfc else text)
    assert tokenizer.encode_ordinary("<think>") == [tokenizer.marks["<think>"]]                # an added token that is not special is text
    with pytest.raises(ValueError, match="disallowed special token"):
        tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([V - 1])                                                         # a row of the model that no token has


@pytest.mark.parametrize("kind", ("gpt2", "qwen2"))
def test_vocab_and_merges_are_tokenizer_json(hub, tmp_path, kind):
    folder, _ = hub[kind]
    shutil.copytree(folder, tmp_path / "x")
    t = PublicTokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    t.model.save(str(tmp_path / "x"))
    os.remove(tmp_path / "x/tokenizer.json")
    vocab = json.loads((tmp_path / "x/vocab.json").read_text())
    added = {x["content"]: x["id"] for x in json.loads(t.to_str())["added_tokens"]}
    if kind == "gpt2":                                                    # as its own files have it
        (tmp_path / "x/vocab.json").write_text(json.dumps(vocab | added))
    decoder = {i: {"content": x, "special": True, "lstrip": False, "rstrip": False, "single_word": False} for x, i in added.items()}
    old = edited(str(tmp_path / "x"), tmp_path, "tokenizer_config.json", **{"added_tokens_decoder": decoder} if kind != "gpt2" else {})
    model, ours = load(old)
    for text in HARD:
        assert ours.encode(text, allowed_special="all") == t.encode(text, add_special_tokens=False).ids
    M.write_public(str(tmp_path / "out"), model, ours)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Hi 汉字 e\u0301").input_ids == ours.encode("Hi 汉字 e\u0301")


def test_a_tiktoken_file_is_tokenizer_json(hub, tmp_path):
    folder, _ = hub["llama3"]
    shutil.copytree(folder, tmp_path / "x")
    t = PublicTokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    ranks = load(folder)[1]._mergeable_ranks
    lines = [base64.b64encode(token).decode() + f" {i}" for token, i in sorted(ranks.items(), key=lambda x: x[1])]
    (tmp_path / "x/tokenizer.model").write_text("\n".join(lines))
    os.remove(tmp_path / "x/tokenizer.json")
    names = json.loads(t.to_str())["added_tokens"]                        # here they follow each other; Llama 3 has others between them
    model, ours = load(edited(str(tmp_path / "x"), tmp_path, "tokenizer_config.json", added_tokens_decoder={x["id"]: x for x in names}))
    for text in HARD:
        assert ours.encode(text, allowed_special="all") == t.encode(text, add_special_tokens=False).ids
    M.write_public(str(tmp_path / "out"), model, ours)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("Hi 汉字 e\u0301").input_ids == t.encode("Hi 汉字 e\u0301").ids
    bare = load(str(tmp_path / "x"))[1]                                       # without any configuration: Llama 3's own places
    assert [bare.marks[x] - len(ranks) for x in ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")] == [0, 1, 6, 9]
    assert bare.first == [len(ranks)] and bare.decode([len(ranks) + 2])
    (tmp_path / "x/tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    with pytest.raises(InputError, match="SentencePiece"):
        load(str(tmp_path / "x"))


def changed(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
    with open(os.path.join(folder, "tokenizer.json")) as f:
        t = json.load(f)
    change(t)
    (tmp_path / "changed/tokenizer.json").write_text(json.dumps(t))
    return str(tmp_path / "changed")


def swap(x, i, j):
    x[i], x[j] = x[j], x[i]


@pytest.mark.parametrize("change, why", [
    (lambda t: t["model"].update(type="Unigram"), "its model is Unigram"), (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda t: t["model"].update(dropout=.1), "dropout"), (lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"), (lambda t: t.update(pre_tokenizer=None), "pre-tokeniser is []"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "add_prefix_space"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "Removed"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}), "Digits"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{L}+"}), "leaves parts of a text out"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}), "not as expected"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\p{N}{1,3}+|[\s\S]"}), "{1,3}+"),       # a repeat there, possessive here
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"^\s+|[\s\S]"}), "^"),                   # every line's start there
    (lambda t: t.update(post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["a", 1]}), "BertProcessing"),
    (lambda t: t["added_tokens"][0].update(lstrip=True), "looks at its surroundings"), (lambda t: t["model"]["vocab"].pop("a"), "not byte-level, see 'a'"),
    (lambda t: t["model"]["vocab"].update({"▁the": 600}), "not byte-level, see '▁the'"), (lambda t: swap(t["model"]["merges"], 5, 90), "its merges are not those"),
    (lambda t: t["model"]["merges"].pop(30), "its merges are not those"), (lambda t: t["added_tokens"][0].update(id=V), f"ids from 0 to {V}, 0 of them twice, and the model {V} rows"), (lambda t: t["added_tokens"][0].update(id=-1), "ids from -1"),
    (lambda t: t["added_tokens"][0].update(id=70), "1 of them twice"), (lambda t: t["added_tokens"][0].update(content=""), "is empty"),
    (lambda t: t["added_tokens"][0].update(normalized=True), "is normalised"),
    (lambda t: t.pop("model"), "not as expected")])
def test_a_tokenizer_that_cannot_be_represented_is_refused_with_the_reason(hub, tmp_path, change, why):
    with pytest.raises(InputError, match="tokenizer") as e:
        load(changed(hub["qwen2"][0], tmp_path, change))
    assert why in str(e.value) and "\n" not in str(e.value)


def test_merges_that_are_accepted_give_the_same_ids_on_every_text():
    """Random lists of merges over three letters, most of which no training could give: what passes the check is what agrees. Some have
    their ids in another order, a token that no merge makes, or every pair that makes a token, as Llama 3's file has."""
    rng, accepted, refused = random.Random(0), 0, 0
    letters = list(M.LETTER.values())
    files = {"config.json": json.dumps(dict(model_type="llama", vocab_size=400, eos_token_id=1, **{x: 8 for x in M.SIZES.values() if x != "vocab_size"}))}
    family, cfg = M.public_config("x", files)
    while accepted < 300 or refused < 300:
        vocab, merges = {x: i for i, x in enumerate(letters)}, []
        known = ["a", "b", "c"]
        for _ in range(rng.randrange(1, 7)):
            pair = [rng.choice(known), rng.choice(known)]
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
                known = list(dict.fromkeys([*known, "".join(pair)]))
        if rng.random() < .3:
            swap(merges, 0, -1)
        if rng.random() < .3:                                             # a token that no merge makes
            vocab.setdefault("".join(rng.choices("abc", k=4)), len(vocab))
        loose = rng.random() < .5
        own = [x for x in vocab if len(x) > 1]
        if rng.random() < .3:
            vocab |= dict(zip(own, rng.sample(range(256, 256 + len(own)), len(own))))
        if rng.random() < .3:
            every = [[x[:i], x[i:]] for x in sorted(own, key=vocab.get) for i in range(1, len(x)) if x[:i] in vocab and x[i:] in vocab]
            merges = every or merges
        t = M.tokenizer_json(vocab, M.SPLIT["llama"], False, [], merges=merges)
        t["model"]["ignore_merges"] = loose
        try:
            ours = M.public_tokenizer("x", files | {"tokenizer.json": json.dumps(t)}, family, cfg)
        except InputError as e:
            assert "its merges" in str(e)
            refused += 1
            continue
        accepted += 1
        theirs = PublicTokenizer.from_str(json.dumps(t))
        for _ in range(60):
            text = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 14)))
            assert ours.encode_ordinary(text) == theirs.encode(text).ids, (merges, loose, text)


# chat


TALK = [dict(role="user", content="What is 2+2? "), dict(role="assistant", content="4"), dict(role="user", content="<|im_end|> and 汉字?"), dict(role="assistant", content="no idea")]


@pytest.mark.parametrize("name", ("llama3", "qwen2", "qwen3"))
def test_messages_are_rendered_as_the_models_own_template_does(hub, name):
    folder, _ = hub[name]
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load(folder)[1]
    talk = [m | {"content": m["content"].replace("<|im_end|>", "so")} for m in TALK]         # theirs would let a text end a turn
    for said in (talk, talk[:2], [dict(role="system", content="Be brief.")] + talk):
        ids, mask = M.encode_chat(ours, said)
        want = theirs.apply_chat_template(said, return_dict=False)
        assert ids == want[:len(ids)] and theirs.decode(want[len(ids):]).strip() == ""       # ChatML ends with a line break that nobody reads
        assert ours.decode([i for i, m in zip(ids, mask) if m]) == "".join(m["content"] + M.CHAT[ours.chat][-1] for m in said if m["role"] == "assistant")
        prompt = M.prompt_ids(ours, {"messages": said})
        assert prompt == theirs.apply_chat_template(said[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[:len(prompt)] == prompt                                # a prompt is a prefix of prompt and response
        assert M.encode_answer(ours, {"messages": said}, "no idea" if len(said) > 2 else "4") == (ids, [0] * len(prompt) + mask[len(prompt):])


@pytest.mark.parametrize("name", ("llama3", "qwen2"))
def test_a_lone_prompt_is_a_users_turn_where_the_model_has_a_template(hub, name, tmp_path):
    folder, _ = hub[name]
    theirs, row = transformers.AutoTokenizer.from_pretrained(folder), {"prompt": "2+2?\n"}
    ask = lambda *more: theirs.apply_chat_template([*more, dict(role="user", content="2+2?")], add_generation_prompt=True, return_dict=False)
    model, ours = load(folder)
    assert M.prompt_ids(ours, row) == ask() and ours.turn_end in model.cfg.stop
    tokens, mask = M.encode_answer(ours, row, "4")
    assert tokens[:len(ask())] == ask() and tokens[-1] == ours.turn_end and mask[-1] == 1
    told = load(folder, system="Be brief.")[1]
    assert M.prompt_ids(told, row) == ask(dict(role="system", content="Be brief."))
    plain = load(folder, chat="plain")[1]
    assert M.prompt_ids(plain, row) == plain.first + plain.encode_ordinary("2+2?\n") and M.encode_answer(plain, row, "4")[0][-1] == plain.end
    M.save(str(tmp_path), model, told)                                    # a checkpoint keeps how its prompts were written
    assert M.prompt_ids(load(str(tmp_path))[1], row) == M.prompt_ids(told, row)
    assert M.prompt_ids(load(str(tmp_path), chat="plain")[1], row) == M.prompt_ids(plain, row)


SYSTEM = "{%% if messages[0]['role'] != 'system' %%}{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{%% endif %%}"
DATES = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
         "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + s + '<|eot_id|>' }}"
         + LLAMA3.removeprefix("{{ bos_token }}"))                        # as Llama 3.1 and 3.2 have it, by the date that they fall back to


@pytest.mark.parametrize("name, template, system", [
    ("qwen2", SYSTEM % "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." + CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ("qwen2", SYSTEM % "Reason, and put your answer within \\\\boxed{}." + CHATML, "Reason, and put your answer within \\boxed{}."),
    ("qwen2", SYSTEM % "You\\'re A.\\nBe <brief>." + CHATML, "You're A.\nBe <brief>."), ("llama3", DATES, ""),
    ("qwen2", "<|endoftext|>" + CHATML, "")])
def test_what_a_template_writes_besides_the_turns_is_written(hub, tmp_path, name, template, system):
    folder = edited(hub[name][0], tmp_path, "tokenizer_config.json", chat_template=template)
    theirs, (model, ours) = transformers.AutoTokenizer.from_pretrained(folder), load(folder)
    assert ours.system == system
    for said in (TALK[:1], [dict(role="system", content=" Be brief. ")] + TALK[:1], TALK[:3]):
        said = [m | {"content": m["content"].replace("<|im_end|>", "so")} for m in said]
        assert M.prompt_ids(ours, {"messages": said}) == theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    M.save(str(tmp_path), model, ours)
    for again in (load(str(tmp_path))[1], load(str(tmp_path), system="Be brief.")[1]):
        said = [dict(role="system", content="Be brief.")] * (again.system == "Be brief.") + [dict(role="user", content="2+2?")]
        assert M.prompt_ids(again, {"prompt": "2+2?"}) == theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template, why", [
    ("{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}", "its marks are neither ChatML's nor Llama 3's"),
    ("{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{% endfor %}", "its marks are neither"), ("{% for %}", "not understood"),
    (CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}", "it writes"), (CHATML.replace("<|im_end|>\n", "<|im_end|>"), "it writes"),
    (CHATML.replace("{% for", "{{ raise_exception('no system') if messages[0].role == 'system' }}{% for"), "not understood")])
def test_a_template_that_writes_other_prompts_is_refused(hub, tmp_path, template, why):
    folder = edited(hub["qwen2"][0], tmp_path, "tokenizer_config.json", chat_template=template)
    with pytest.raises(InputError, match="--chat plain goes without") as e:
        load(folder)
    assert why in str(e.value) and "\n" not in str(e.value)
    plain = load(folder, chat="plain")[1]
    assert not plain.turns and M.prompt_ids(plain, {"prompt": "hi"}) == plain.encode("hi")
    with pytest.raises(InputError, match="a chat .* needs ChatML's or Llama 3's marks"):
        M.prompt_ids(plain, {"messages": TALK})


def test_prompts_stay_as_they_were_on_the_way_out(tmp_path, hub):
    """A model that began here gets a template of its own; --system says nothing where prompts are bare."""
    model = M.GPT(GPTConfig())
    for system in ("", 'Say "{{ hi }}"\nand 汉字 \\boxed{}.'):
        M.write_public(str(tmp_path / f"out{len(system)}"), model, make_tokenizer(turns=True, system=system))
        back = load(str(tmp_path / f"out{len(system)}"))[1]
        assert back.turns and back.system == system
        assert back.decode(M.prompt_ids(back, {"prompt": "2+2?"})) == make_tokenizer().decode(M.prompt_ids(make_tokenizer(turns=True, system=system), {"prompt": "2+2?"}))
    M.write_public(str(tmp_path / "plain"), model, make_tokenizer())
    assert not load(str(tmp_path / "plain"))[1].turns
    for folder in (str(tmp_path / "plain"), hub["gpt2"][0]):
        with pytest.raises(InputError, match="--system Hm: prompts are bare text here; --chat chat"):
            load(folder, system="Hm")


# the scripts


FEW = ["--data", "rows.jsonl", "--eval_every", 1]
RL = FEW + ["--steps", 2, "--max_new", 8, "--reward", "reward", "--prompts", 4]      # a random model is never right, and a reward model tells its answers apart
START = {"sft.py": FEW + ["--steps", 2, "--batch", 4, "--max_new", 8], "dpo.py": ["--data", "pairs.jsonl", "--batch", 16, "--max_new", 8, "--eval_every", 1],
         "ppo.py": RL + ["--minibatch", 2], "grpo.py": RL + ["--group", 2, "--minibatch", 4],
         "dapo.py": RL + ["--group", 2, "--minibatch", 4, "--tries", 2, "--overlong_cache", 4]}


@pytest.fixture(scope="session")
def home(hub, tmp_path_factory):
    """A folder with rows, with pairs, and with a reward model that reward.py made from a public folder in two steps."""
    home = tmp_path_factory.mktemp("public")
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "response": f"{i} + {i} is\n#### {2 * i}"} for i in range(90)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"} for row in rows[:40]]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder, _ = hub["qwen2"]                                              # a tenth of all ids end an answer: a random model says few of them
    shutil.copytree(edited(folder, home, eos_token_id=[load(folder)[1].turn_end, *range(30, 90)]), home / "public")
    done = script("reward.py", "--init", "public", *START["dpo.py"], "--out", "reward", cwd=home)
    assert done.returncode == 0 and len(metrics(home / "reward")) == 2, done.stderr
    return home


@pytest.mark.parametrize("name", START)
def test_every_script_starts_from_a_public_folder_and_its_result_goes_back(home, name):
    """Two steps on the user's own rows; what is exported is what was trained."""
    out = name.removesuffix(".py")
    done = script(name, "--init", "public", "--out", out, *START[name], cwd=home)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[:4]
    assert "public model: defaults are" in first[0] and "--recompute True" in first[0] and any("memory in MiB: weights" in line for line in first)
    assert len(metrics(home / out)) >= 2 and json.loads((home / out / "config.json").read_text())["public"]
    export = lambda old: subprocess.run([sys.executable, os.path.join(ROOT, "model.py"), "export", old, f"{out} back"], cwd=home, capture_output=True, text=True)
    assert "this is a reward model, and a policy is needed here" in export("reward").stderr
    done = export(out)
    assert done.returncode == 0, done.stderr
    (trained, _), (before, _) = load(str(home / out)), load(str(home / "public"))
    assert trained.cfg == before.cfg and not same(trained, before)
    tokens = torch.randint(V, (2, 20))
    read = transformers.AutoModelForCausalLM.from_pretrained(home / f"{out} back")
    assert (read(tokens).logits - trained(tokens) @ trained.unembedding.T).abs().max() < 1e-4
    if name == "grpo.py":                                                 # and on from the checkpoint, with its prompts as they were
        done = script("dapo.py", "--init", out, "--out", "on", *START["dapo.py"], cwd=home)
        assert done.returncode == 0 and "public model" in done.stdout, done.stderr
        done = script("grpo.py", "--out", out, "--resume", "--steps", 3, cwd=home)
        assert done.returncode == 0 and [x["step"] for x in metrics(home / out)] == [0, 1, 2, 3], done.stderr


def test_without_safetensors_one_line_says_what_to_install(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load(hub["qwen2"][0])
