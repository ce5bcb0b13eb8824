"""
Everything that needs a GPU to measure, in one command of about seven minutes: a JSON line a
section.

    python experiments/bench.py gpu          on a GPU
    python experiments/bench_gpu.py --dry    tiny sizes on the CPU, to see that the command works

The most important section comes first. An error in one is a line, and the next one runs; one that
would start after six minutes is skipped. Random weights, except in the scripts' own runs. Beside
transformers and liger-kernel where they are installed.
"""
import argparse
import functools
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as M  # noqa: E402
from bench import (LOGP_FORMS, forward_backward, logp_inputs, our_generate, quiet)  # noqa: E402
from common.evaluate import repeated_uniform  # noqa: E402
from common.export import new_files  # noqa: E402
from common.lora import add_adapters  # noqa: E402
from common.memory import estimate_memory  # noqa: E402
from common.models import setup  # noqa: E402
from common.optimizers import make_optimizer  # noqa: E402
from common.tokenizer import make_tokenizer  # noqa: E402
from common.train import (cache_bytes, compute_logp, configure_blocks, freeze,  # noqa: E402
                          micro_batches)
from grpo import Config, grpo_loss  # noqa: E402
from model import GPT, GPTConfig, autocast, linear_logp  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 360                                                # seconds, after which nothing is started

GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_embd=768, n_head=12, norm="layer",
            positions="learned", mlp="gelu", bias=True)
QWEN2 = dict(vocab_size=151936, block_size=4096, n_layer=24, n_embd=896, n_head=14, n_kv_head=2,
             intermediate_size=4864, rope_theta=1e6, qkv_bias=True)
QWEN3 = dict(vocab_size=151936, block_size=4096, n_layer=28, n_embd=1024, n_head=16, n_kv_head=8,
             head_dim=128, intermediate_size=3072, rope_theta=1e6, qk_norm=True)


class Sizes:
    device = torch.device("cuda")
    shapes = {"gpt2 124M": GPT2, "qwen2 0.5B": QWEN2, "qwen3 0.6B": QWEN3}   # family first
    rows = (64, 256, 512)
    prompt, new = 128, 256                                 # tokens
    peer_new = 24                                          # transformers takes as long for these
    product = 8192
    logp = ((768, 50257), (896, 151936))                   # C, V
    logp_rows = 4096
    requests = 256
    longest = 1024                                         # of a request's prompt and response
    repeats = 3


class DrySizes(Sizes):
    device = torch.device("cpu")
    shapes = {"gpt2": GPT2 | dict(vocab_size=300, n_layer=2, n_embd=48, n_head=3),
              "qwen2": QWEN2 | dict(vocab_size=300, n_layer=2, n_embd=56, n_head=7, n_kv_head=1,
                                    intermediate_size=64),
              "qwen3": QWEN3 | dict(vocab_size=300, n_layer=2, n_embd=48, n_head=4, n_kv_head=2,
                                    head_dim=16, intermediate_size=64)}
    rows = (8, 16)
    prompt, new = 6, 12
    peer_new = 4
    product = 64
    logp = ((32, 300),)
    logp_rows = 64
    requests = 8
    longest = 40
    repeats = 1


# -------------------------------------------------------------------------------------------- tools


def on_gpu(sizes):
    return sizes.device.type == "cuda"


def median_seconds(sizes, function):
    """Of sizes.repeats calls after one that warms up, the GPU's work included."""
    seconds = []
    for _ in range(sizes.repeats + 1):
        if on_gpu(sizes):
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if on_gpu(sizes):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[sizes.repeats // 2]


def peak_gib(sizes, function):
    """Peak of the allocated memory above what is allocated now."""
    if not on_gpu(sizes):
        function()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def random_model(sizes, name, std=0.02):
    torch.manual_seed(0)
    with torch.device(sizes.device):
        model = GPT(GPTConfig(**sizes.shapes[name]))
        for p in model.parameters():
            if p.dim() == 2:                               # also those that begin at 0
                torch.nn.init.normal_(p, std=std)
    return model


def random_prompts(model, n, length):
    generator = torch.Generator().manual_seed(1)
    shape = (n, length)
    return torch.randint(0, model.cfg.vocab_size, shape, generator=generator).tolist()


def matrix_parameters(model):
    """Numbers in the matrices that a token is multiplied with."""
    n = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if model.position is not None:
        n -= model.position.weight.numel()                 # a table that is only read
    return n


@functools.cache
def device_limits(sizes):
    """Bytes per second of a copy, read and written, and operations per second of a bf16 product."""
    n = sizes.product
    source = torch.empty(16 * n * n, dtype=torch.uint8, device=sizes.device)
    matrix = torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16)
    bandwidth = 2 * source.numel() / median_seconds(sizes, source.clone)
    rate = 2 * n ** 3 / median_seconds(sizes, functools.partial(torch.mm, matrix, matrix))
    return bandwidth, rate


def transformers_generate(sizes, name, model, n):
    """A function that samples sizes.peer_new tokens with a model of the same shape in bf16."""
    import transformers
    quiet(transformers)
    files = new_files(model.cfg, name.split()[0], make_tokenizer())
    config = transformers.AutoConfig.for_model(**json.loads(files["config.json"]))
    with torch.device(sizes.device):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.tensor(random_prompts(model, n // 8, sizes.prompt), device=sizes.device)
    return functools.partial(
        torch.no_grad()(peer.generate), ids, attention_mask=torch.ones_like(ids), do_sample=True,
        top_k=0, top_p=1.0, num_return_sequences=8, max_new_tokens=sizes.peer_new, pad_token_id=0,
        eos_token_id=None)


def run_script(sizes, *args):
    """Seconds of `python script.py ...` in the folder of all runs."""
    start = time.perf_counter()
    command = [sys.executable, os.path.join(ROOT, args[0]), *args[1:]]
    done = subprocess.run(command, cwd=sizes.folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{args[0]}: {done.stderr[-300:] or done.stdout[-300:]}")
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------- sections


def card(sizes):
    result = {"torch": torch.__version__}
    if on_gpu(sizes):
        card = torch.cuda.get_device_properties(0)
        result |= {"gpu": card.name, "GiB": card.total_memory / 2 ** 30,
                   "capability": [card.major, card.minor]}
    bandwidth, rate = device_limits(sizes)
    return result | {"copy_GB_s": bandwidth / 1e9, "bf16_TFLOP_s": rate / 1e12}


def tests(sizes):
    """tests/test_cuda.py; skipped tests on a CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return {"summary": lines[-1], "failed": [x for x in lines if x.startswith("FAILED")]}


def correctness(sizes):
    """Graph against eager steps, sampler against scorer, bf16 against float32, in nats a token."""
    result = {}
    captured, widths = M.capture_cuda_graph, M.BF16_MIN_WIDTH
    for name in sizes.shapes:
        model = random_model(sizes, name, std=0.05)
        prompts = random_prompts(model, sizes.rows[0] // 8, sizes.prompt)
        stop = list(range(model.cfg.vocab_size // 60))     # about 60 tokens in the mean
        new = sizes.new // 2
        uniform = repeated_uniform(sizes.rows[0], new, seed=0)
        generate = functools.partial(model.generate, prompts, 8, new, stop_token_ids=stop,
                                     uniform=uniform)
        tokens, mask, logp = generate()
        scored = compute_logp(model, tokens, mask.cpu())
        try:
            M.capture_cuda_graph = lambda step, device: step
            eager = generate()
            M.BF16_MIN_WIDTH = {}
            exact = compute_logp(model, tokens, mask.cpu())
        finally:
            M.capture_cuda_graph, M.BF16_MIN_WIDTH = captured, widths
        inside = mask > 0
        result[name] = {
            "graph_is_eager": torch.equal(tokens, eager[0]),
            "sampler_scorer": (logp - scored).abs()[inside].mean().item(),
            "bf16_float32": (scored - exact).abs()[inside].mean().item()}
    return result


def default_run(sizes):
    """Seconds of the README's command, and what it reaches."""
    short = []
    if not on_gpu(sizes):
        short = ["--steps", "2", "--warmup", "1", "--eval_every", "2", "--eval_prompts", "8"]
    result = {"sft_s": run_script(sizes, "sft.py", *short),
              "grpo_s": run_script(sizes, "grpo.py", *short)}
    with open(f"{sizes.folder}/out/grpo/metrics.jsonl") as f:
        rows = [json.loads(line) for line in f]
    for name in ("gen_s", "upd_s", "sampler_logp_error"):
        values = sorted(row[name] for row in rows if row["step"] > len(rows) // 4)
        result[name] = values[len(values) // 2]
    return result | {"val_greedy": rows[-1]["val_greedy"]}


def scripts(sizes):
    """Every other script, from the default run's checkpoint, and flags that it does not touch."""
    few = ["--steps", "2", "--warmup", "1", "--eval_every", "2", "--eval_prompts", "8"]
    small = [*few, "--prompts", "4", "--minibatch", "16"]
    todo = [["reward.py", "--length_bias", "0.1", "--prompts", "100", "--batch", "8"],
            ["dpo.py", "--eval_prompts", "8", "--data", "out/reward/preferences.jsonl"],
            ["ppo.py", *few, "--prompts", "16", "--minibatch", "16", "--reward", "out/reward"],
            ["dapo.py", *small, "--max_generations", "2"],
            ["grpo.py", *small, "--ref_every", "1", "--gradient_checkpointing", "true"],
            ["grpo.py", "--out", "out/grpo", "--resume", "--steps", "51" if on_gpu(sizes) else "3"]]
    if on_gpu(sizes):
        todo.append(["grpo.py", *small, "--compile", "true"])
    result = {}
    for args in todo:
        out = [] if "--out" in args or args[0] == "reward.py" else ["--out", f"out/{len(result)}"]
        result[" ".join(args[:1] + args[-2:])] = run_script(sizes, *args, *out)
    return result


def generate(sizes):
    """Tokens per second of whole rollouts, 8 responses a prompt and none that ends early, beside
    transformers and the limit of the memory: bytes of a decoding step over the speed of a copy."""
    result = {}
    bandwidth, _ = device_limits(sizes)
    has_peer = importlib.util.find_spec("transformers") is not None
    for name in sizes.shapes:
        model = random_model(sizes, name)
        cfg = model.cfg
        for n in sizes.rows:
            prompts = random_prompts(model, n // 8, sizes.prompt)
            ours = functools.partial(our_generate, model, prompts, 8, sizes.new, [cfg.vocab_size])
            rate = n * sizes.new / median_seconds(sizes, ours)
            # weights in bf16; the cache is half full on average
            cache = n * (sizes.prompt + sizes.new / 2) * cache_bytes(model)
            limit = n * bandwidth / (2 * matrix_parameters(model) + cache)
            figures = {"tok_s": rate, "of_limit": rate / limit}
            if has_peer:
                theirs = transformers_generate(sizes, name, model, n)
                figures["transformers"] = n * sizes.peer_new / median_seconds(sizes, theirs)
            result[f"{name}, {n} rows"] = figures
    return result


def requests(sizes):
    """nano-vllm's public benchmark (github.com/GeeeekExplorer/nano-vllm, bench.py): 256 requests of
    100 to 1,024 tokens for prompt and response each, 133,966 response tokens, as one batch. Row i
    ends where its random number is 0, which draws the stop token 0."""
    model = random_model(sizes, list(sizes.shapes)[-1])
    rng = random.Random(0)
    shortest = min(100, sizes.longest // 4)
    prompts = []
    for _ in range(sizes.requests):
        n = rng.randint(shortest, sizes.longest)
        prompts.append([rng.randint(0, 10_000) % model.cfg.vocab_size for _ in range(n)])
    lengths = torch.tensor([rng.randint(shortest, sizes.longest) for _ in prompts])
    uniform = repeated_uniform(len(prompts), sizes.longest, seed=0) * 0.98 + 0.01
    uniform[torch.arange(len(prompts)), lengths - 1] = 0.0
    counts = []

    def generate():
        _, mask, _ = model.generate(prompts, 1, sizes.longest, stop_token_ids=[0], uniform=uniform)
        counts.append(int(mask.sum()))

    peak = peak_gib(sizes, generate)
    start = time.perf_counter()
    generate()
    seconds = time.perf_counter() - start
    return {"tokens": counts[-1], "expected_tokens": int(lengths.sum()), "s": seconds,
            "tok_s": counts[-1] / seconds, "peak_GiB": peak}


def update(sizes):
    """A GRPO update on 32 responses, whole and by LoRA: share of the large product's rate, and peak
    beside estimate. The second product with the vocabulary, in backward, is not counted; products
    for the gradients of frozen weights are, though LoRA does not compute them."""
    result = {}
    _, product_rate = device_limits(sizes)
    T = sizes.prompt + sizes.new
    for name, rank in itertools.product(sizes.shapes, (0, 16)):
        model = random_model(sizes, name)
        if rank:
            add_adapters(freeze(model), rank, 32.0)
        cfg, device = model.cfg, sizes.device
        optimizer = make_optimizer(model, 1e-5)
        tokens = torch.randint(0, cfg.vocab_size, (32, T), device=device)
        mask = (torch.arange(T) >= sizes.prompt).float().expand(32, -1)
        mask_dev, adv = mask.to(device), torch.randn(32, device=device)
        ref_logp = torch.zeros(32, T, device=device)
        head = cfg.vocab_size * cfg.n_embd
        look = cfg.n_layer * cfg.n_head * cfg.head_dim * T
        work = tokens.numel() * (matrix_parameters(model) - head + look) + int(mask.sum()) * head

        def step():
            optimizer.zero_grad()
            for rows, width, index in micro_batches(mask, torch.arange(32), 0, device):
                with autocast(model):
                    logp, _ = model.token_logp(tokens[rows, :width], index=index)
                loss, _ = grpo_loss(logp, logp.detach(), ref_logp[rows, :width], adv[rows],
                                    mask_dev[rows, :width], 0.2, 0.0, 32)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        step()                                             # moments are allocated
        optimizer.zero_grad()
        peak = peak_gib(sizes, step)
        plan = estimate_memory(device, optimizer, [model])
        parts = ("gradients", "bf16 copies", "activations", "logits")
        figures = {"peak_GiB": peak, "estimate_GiB": sum(plan[x] for x in parts) / 2 ** 30}
        for form in ("eager", "compiled") if on_gpu(sizes) and not rank else ("eager",):
            configure_blocks(model, False, form == "compiled")
            seconds = median_seconds(sizes, step)
            figures[form] = {"ms": 1000 * seconds, "of_product": 6 * work / seconds / product_rate}
        result[f"{name}, LoRA" if rank else name] = figures
    return result


def cast_weight(form):
    """`form` on a bf16 copy of the matrix: only ours takes a float32 matrix beside bf16 rows."""
    def call(hidden, weight, targets):
        return form(hidden, weight.bfloat16(), targets)
    return call


def log_probs(sizes):
    """Forward and backward in bf16 over a float32 matrix, by the size of our tiles, beside the
    naive form and Liger's fused loss, which has no entropy: milliseconds, MiB above the inputs."""
    result = {}
    ours = M.LinearLogp.TILE[sizes.device.type]
    forms = {"naive": (cast_weight(LOGP_FORMS["naive"]), ours), "ours": (linear_logp, ours)}
    for millions in (12, 32, 64, 128):
        forms[f"tiles of {millions} M"] = (linear_logp, millions * 2 ** 20)
    if on_gpu(sizes) and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")

        def liger_logp(hidden, weight, targets):
            return [-liger(weight, hidden, targets)]

        forms["Liger"] = cast_weight(liger_logp), ours
    for C, V in sizes.logp:
        hidden, weight, targets = logp_inputs(C, V)
        hidden = hidden.detach()[:sizes.logp_rows].to(sizes.device).bfloat16().requires_grad_()
        weight = weight.detach().to(sizes.device).requires_grad_()
        targets = targets[:sizes.logp_rows].to(sizes.device)
        for name, (form, tile) in forms.items():
            both = functools.partial(forward_backward, form, hidden, weight, targets)
            try:
                M.LinearLogp.TILE[sizes.device.type] = tile
                ms = 1000 * median_seconds(sizes, both)
                hidden.grad = weight.grad = None
                result[f"V={V}, {name}"] = [ms, 1024 * peak_gib(sizes, both)]
            finally:
                M.LinearLogp.TILE[sizes.device.type] = ours
    return result


def pieces(sizes):
    """Tokens per second of rollouts of ragged length, as the sampler is now, and with one of its
    rules changed: when rows are dropped, how the cache grows, how attention is computed."""
    device = sizes.device.type
    attention = M.decode_attention

    def use(share, rows, block, attend):
        M.DROP_BELOW[device], M.KEEP_ROWS[device] = share, rows
        M.KVCache.BLOCK[device], M.decode_attention = block, attend

    def fused(q, k, v, bias, has_key_bias):
        grouped = q.view(len(q), k.size(1), -1, q.size(3))
        y = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
        return y.reshape(q.shape)

    now = M.DROP_BELOW[device], M.KEEP_ROWS[device], M.KVCache.BLOCK[device], attention
    forms = {"now": now, "drop at 3/4, blocks of 128": (0.75, 0, 128, attention),
             "keep no rows": (now[0], 0, now[2], attention), "fused attention": (*now[:3], fused)}
    n = sizes.rows[-1]
    lengths = torch.distributions.LogNormal(4.5, 0.7)
    torch.manual_seed(0)
    lengths = lengths.sample((n,)).long().clamp(1, sizes.new)
    uniform = repeated_uniform(n, sizes.new, seed=0) * 0.98 + 0.01
    uniform[torch.arange(n), lengths - 1] = 0.0            # draws the stop token, 0
    result = {"mean_length": lengths.float().mean().item()}
    for name in list(sizes.shapes)[:2]:
        model = random_model(sizes, name)
        prompts = random_prompts(model, n // 8, sizes.prompt)
        for form, rules in forms.items():
            try:
                use(*rules)
                seconds = median_seconds(sizes, functools.partial(
                    model.generate, prompts, 8, sizes.new, stop_token_ids=[0], uniform=uniform))
            finally:
                use(*now)
            result[f"{name}, {form}"] = int(lengths.sum()) / seconds
    return result


SECTIONS = [card, tests, correctness, default_run, scripts, generate, update, log_probs, requests,
            pieces]


def rounded(x):
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return x


def run_section(section, sizes):
    """Its figures, or its error: the next section still counts."""
    try:
        return section(sizes)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:400]}
    finally:
        if on_gpu(sizes):
            torch.cuda.empty_cache()


def main(sizes=Sizes):
    setup(Config())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as sizes.folder:    # of the scripts' runs
        for section in SECTIONS:
            began = time.perf_counter()
            result = {"skipped": f"after {LIMIT} s"}
            if began - start < LIMIT:
                result = run_section(section, sizes)
            seconds = round(time.perf_counter() - began, 1)
            line = {"section": section.__name__, "seconds": seconds} | rounded(result)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    main(DrySizes if parser.parse_args().dry else Sizes)
