"""The transformer: fused log-probs, KV cache, sampling and the scalar head; and what surrounds it:
micro-batches, optimisers, evaluation, checkpoints and tokenizers.

    python -m pytest tests/test_model.py
"""
import itertools
import json
import math
import os
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as M
from common import InputError, load
from common.checkpoint import save_checkpoint
from common.data import split_rows
from common.evaluate import distinct_ngrams, evaluate, repeated_uniform
from common.export import byte_letters, tokenizer_json, write_folder
from common.hf import SIZE_FIELDS
from common.optimizers import Muon, make_optimizer, orthogonalize, set_lr
from common.tokenizer import (FolderTokenizer, TiktokenTokenizer, encode_chat, encode_prompt,
                              encode_response, make_tokenizer)
from common.train import batches, configure_blocks, micro_batches
from conftest import FAMILIES, PROMPTS, bf16_devices, naive_logp, tiny
from model import GPT, GPTConfig, ScalarModel, linear_logp

CPU = torch.device("cpu")
BYTES = {bytes([i]): i for i in range(256)}


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------- fused log-prob


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_logp_and_entropy_and_their_gradient_are_the_naive_ones(temperature, monkeypatch):
    """Tiles of 4 rows x 15 tokens over 10 x 50: the last ones are not full."""
    monkeypatch.setattr(M.LinearLogp, "ROWS", 4)
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": 4 * 15})
    torch.manual_seed(0)
    hidden = torch.randn(10, 8).double().requires_grad_()
    weight = torch.randn(50, 8).double().requires_grad_()
    targets = torch.randint(0, 50, (10,))
    upstream = torch.randn(10).double()
    logp, entropy = linear_logp(hidden, weight, targets, temperature)
    got = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))

    full = (hidden @ weight.T / temperature).log_softmax(-1)
    naive = full.gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((naive * upstream).sum(), (hidden, weight))
    close(logp, naive, 1e-9)
    close(entropy, torch.distributions.Categorical(logits=full).entropy(), 1e-9)
    for a, b in zip(got, expected):
        close(a, b, 1e-9)
    assert not entropy.requires_grad

    def logp_alone(hidden, weight):
        return linear_logp(hidden, weight, targets, temperature)[0]

    assert torch.autograd.gradcheck(logp_alone, (hidden, weight))


def test_entropy_of_a_uniform_distribution_is_log_V():
    _, entropy = linear_logp(torch.zeros(1, 4), torch.randn(50, 4), torch.tensor([0]))
    assert math.isclose(entropy.item(), math.log(50), rel_tol=1e-6)


@pytest.mark.parametrize("tile", (1, 2))
def test_fused_logp_survives_logits_that_overflow_exp(tile, monkeypatch):
    """In one tile, and where the largest logit is in the first or in the last of two."""
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": tile})
    hidden = torch.full((1, 1), 1e4)
    for sign in (1.0, -1.0):
        weight = torch.tensor([[sign], [-sign]])
        smaller = torch.tensor([int(sign > 0)])
        logp, entropy = linear_logp(hidden, weight, smaller)
        assert logp.item() == -2e4 and entropy.item() == 0


def test_no_tensor_of_rows_times_vocabulary_ever_exists(monkeypatch):
    """No operation of a forward and a backward pass returns as much as an eighth of (N, V)."""
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": 2 ** 14})
    N, V, C = 512, 1000, 16

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    hidden = torch.randn(N, C).requires_grad_()
    weight = torch.randn(V, C).requires_grad_()
    with Largest() as largest:
        linear_logp(hidden, weight, torch.zeros(N, dtype=torch.long))[0].sum().backward()
    assert 0 < largest.numel < N * V / 8, largest.numel


def test_half_precision_inputs_give_float32_results_and_gradients_of_the_master_weights():
    hidden = torch.randn(5, 8).bfloat16().requires_grad_()
    weight = torch.randn(30, 8).requires_grad_()
    logp, entropy = linear_logp(hidden, weight, torch.arange(5))
    logp.sum().backward()
    assert logp.dtype == entropy.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    cast = weight.bfloat16()
    close(logp, (hidden.float() @ cast.float().T).log_softmax(-1).diagonal(), 0.05)
    bf16_logits = (hidden @ cast.T).float()                    # rounded here and nowhere else
    close(logp, bf16_logits.log_softmax(-1).diagonal(), 1e-5)


@pytest.mark.parametrize("N, V, rows, tile", [(4, 600, 4, 4), (600, 4, 1, 4)])
def test_gradients_of_half_precision_inputs_are_summed_over_tiles_in_float32(N, V, rows, tile,
                                                                             monkeypatch):
    """600 tiles, of one column or one row: sums in bf16 would be wrong by 3%, rounded products are
    by less than 1%."""
    monkeypatch.setattr(M.LinearLogp, "ROWS", rows)
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": tile})
    torch.manual_seed(0)
    hidden = torch.randn(N, 16).bfloat16()
    weight = torch.randn(V, 16).bfloat16().float()
    targets = torch.arange(N) % V
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_logp(h, w, targets)[0].sum().backward()
    exact_h, exact_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    linear_logp(exact_h, exact_w, targets)[0].sum().backward()
    for found, exact in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
        assert (found - exact).abs().max() < 0.015 * exact.abs().max()


def test_token_logp_scores_masked_positions_and_no_others(family):
    model = tiny(family)
    tokens = torch.randint(0, 23, (3, 9))
    mask = (torch.rand(3, 9) < 0.5).double()
    logp, entropy = model.token_logp(tokens, mask, 0.7)
    mask[:, 0] = 0                                             # nothing predicts the first token
    close(logp, naive_logp(model, tokens, 0.7) * mask, 1e-9)
    assert ((entropy > 0) == (mask > 0)).all()
    everywhere, _ = model.token_logp(tokens)
    close(everywhere, naive_logp(model, tokens), 1e-9)


# --------------------------------------------------------------------------------- the transformer


def test_future_tokens_and_pads_change_no_logp(family):
    """A row alone, padded with any ids, and inside a ragged batch: the same log-probs."""
    model = tiny(family)
    rows = [torch.randint(0, 23, (n,)) for n in (4, 9, 6)]
    batch = torch.stack([torch.cat([row, torch.randint(0, 23, (14 - len(row),))]) for row in rows])
    together, _ = model.token_logp(batch)
    for row, got in zip(rows, together):
        alone, _ = model.token_logp(row[None])
        close(got[:len(row)], alone[0], 1e-10)


def test_rotary_attention_sees_only_the_distance():
    """RoPE, arXiv 2104.09864 Eq. 16: <R_m q, R_n k> depends on m - n alone."""
    cos, sin = M.rope_table(32, 8, 10_000.0, (), CPU)
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def product(m, n):
        at_m = M.rotate(q, cos[m].double(), sin[m].double())
        at_n = M.rotate(k, cos[n].double(), sin[n].double())
        return (at_m * at_n).sum().item()

    assert math.isclose(product(3, 1), product(20, 18), abs_tol=1e-5)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_llama3_scaling_stretches_only_long_wavelengths():
    """factor 8, low 1, high 4, original context 64: wavelengths above 64 are 8 times longer, those
    below 16 as before."""
    def sin_at_1(scaling):
        _, sin = M.rope_table(2, 32, 10_000.0, scaling, CPU)
        return sin[1]                                          # of the frequency itself

    plain, scaled = sin_at_1(()), sin_at_1((8.0, 1.0, 4.0, 64.0))
    wavelength = 2 * math.pi / plain.asin()
    short, long = wavelength < 16, wavelength > 64
    between = ~short & ~long
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long].asin(), plain[long].asin() / 8)
    assert between.any() and (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_grouped_queries_equal_repeated_keys():
    """arXiv 2305.13245: K key/value heads, each copied for H / K query heads, as plain products."""
    q = torch.randn(2, 4, 6, 8).double()
    k, v = torch.randn(2, 2, 2, 6, 8).double()
    repeated_k, repeated_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    future = torch.ones(6, 6).triu(1).bool()
    scores = (q @ repeated_k.transpose(-1, -2) / math.sqrt(8)).masked_fill(future, -math.inf)
    torch.testing.assert_close(M.causal_attention(q, k, v), scores.softmax(-1) @ repeated_v)


# -------------------------------------------------------------------------------------- generation


def greedy_without_cache(model, prompt, max_new_tokens, stop):
    """The definition: a full forward pass for every token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids]))[0, -1] @ model.unembedding.T
        ids.append(int(logits.argmax()))
        if ids[-1] in stop:
            break
    return ids


@pytest.mark.parametrize("block", (3, 32))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sampled_logp_is_the_scored_logp(family, dtype, tolerance, block, monkeypatch):
    """The law of sampling: cache, shared prefill, positions by row, dropped rows and added columns
    give the log-probs of a full forward."""
    monkeypatch.setattr(M.KVCache, "BLOCK", {"cpu": block})
    model = tiny(family, dtype)
    tokens, mask, logp = model.generate(PROMPTS, group_size=4, max_new_tokens=12, temperature=1.5)
    scored, _ = model.token_logp(tokens, mask, 1.5)
    close(logp, scored, tolerance)
    close(logp, naive_logp(model, tokens, 1.5) * mask, tolerance)
    assert len(mask.sum(1).unique()) > 3, "the lengths must be ragged, or nothing was tested"


def test_finished_rows_may_stay_in_the_batch_for_some_steps(monkeypatch):
    """As on a GPU, which looks for finished rows every 8 tokens: what is sampled after the end
    counts for nothing."""
    monkeypatch.setattr(M, "CHECK_EVERY", {"cpu": 8})
    monkeypatch.setattr(M, "DROP_BELOW", {"cpu": 0.75})
    model = tiny()
    stop = set(model.cfg.stop_token_ids)
    tokens, mask, logp = model.generate(PROMPTS, group_size=4, max_new_tokens=20, temperature=1.5)
    close(logp, model.token_logp(tokens, mask, 1.5)[0], 1e-9)
    for row, chosen in zip(tokens, mask):
        assert not stop & set(row[chosen > 0][:-1].tolist())
    assert mask.sum(1).max() > 8 and (tokens[mask == 0] >= 0).all()


def test_generation_casts_every_weight_to_bf16_once(monkeypatch):
    """Autocast keeps its casts until its block ends, but not in inference mode, nor where a block
    is entered for every layer."""
    bf16_devices(monkeypatch, {"cpu"})
    model = tiny("qwen3", torch.float32)
    cast = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                cast.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with Casts():
        _, mask, _ = model.generate(PROMPTS, 2, 12, stop_token_ids=[23])
    assert mask.sum() == len(PROMPTS) * 2 * 12
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert cast.count(p.data_ptr()) == 1, name


def test_only_wide_models_run_in_bf16_and_only_where_the_device_has_it(monkeypatch):
    """The built-in model is float32 on every CPU, so that its numbers are the same on each."""
    narrow = GPT(GPTConfig())
    wide = GPT(GPTConfig(n_embd=256, n_head=4, n_layer=1))
    monkeypatch.setattr(M, "BF16_MIN_WIDTH", {"cpu": 256})
    assert [M.uses_bf16(narrow), M.uses_bf16(wide), M.uses_bf16(ScalarModel(wide))] == [0, 1, 1]
    with M.autocast(narrow):
        assert narrow.blocks[0].mlp.up(torch.ones(1, 96)).dtype == torch.float32
    with M.autocast(wide):
        assert wide.blocks[0].mlp.up(torch.ones(1, 256)).dtype == torch.bfloat16
    monkeypatch.setattr(M, "BF16_MIN_WIDTH", {"cuda": 1})
    assert not M.uses_bf16(wide)
    for capability, has_bf16 in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        on_a_card = types.SimpleNamespace(device=torch.device("cuda"), cfg=narrow.cfg)
        assert M.uses_bf16(on_a_card) == has_bf16          # a T4 emulates it


def test_a_decoding_step_can_be_replayed(family, monkeypatch):
    """What a CUDA graph needs, on any device: between two captures a step's tensors stay where they
    are, it may run twice before it counts (once to warm up), and it leaves its result in one place.
    Blocks of 3 columns and dropped rows make many captures."""
    monkeypatch.setattr(M.KVCache, "BLOCK", {"cpu": 3})
    model = tiny(family)
    replays = []                                               # of each capture

    def generate():
        uniform = repeated_uniform(4 * len(PROMPTS), 12, seed=0)
        return model.generate(PROMPTS, 4, 12, temperature=1.5, uniform=uniform)

    def capture(step, device):
        _, _, token, position, cache, _ = step.args

        def addresses():
            tensors = [token, position, cache.column, cache.bias]
            for pair in cache.layers:
                tensors += pair
            return [x.data_ptr() for x in tensors]

        captured = addresses()
        step()                                                 # the warm-up
        out = step()
        replays.append(0)

        def replay():
            assert addresses() == captured, "a captured tensor has moved"
            replays[-1] += 1
            return out.copy_(step())

        return replay

    plain = generate()
    monkeypatch.setattr(M, "capture_cuda_graph", capture)
    replayed = generate()
    for a, b in zip(plain, replayed):
        assert torch.equal(a, b)
    tokens, mask, logp = replayed
    close(logp, model.token_logp(tokens, mask, 1.5)[0], 1e-9)
    assert len(replays) > 3 and max(replays) > 1 and 0 not in replays


@pytest.mark.slow
@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_compiled_blocks_give_the_same_gradients_and_do_not_serve_sampling(family, monkeypatch):
    """All that torch.compile does but its last step, C++ or Triton code, which needs a compiler."""
    torch._dynamo.reset()
    compile = torch.compile
    model = tiny(family)
    tokens = torch.randint(0, 23, (3, 20))
    gradients = []

    def compile_without_code(f, **more):
        return compile(f, **more | {"backend": "aot_eager"})

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    monkeypatch.setattr(torch, "compile", compile_without_code)
    for gradient_checkpointing, compiled in ((False, False), (False, True), (True, True)):
        configure_blocks(model, gradient_checkpointing, compiled)
        model.zero_grad()
        model.token_logp(tokens)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-9, atol=1e-9)
    before = graphs()
    model.generate(PROMPTS, 2, 8)
    assert graphs() == before > 0


def test_where_torch_compile_does_not_work_the_run_goes_on(monkeypatch, capsys):
    def broken(f, **more):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny()
    configure_blocks(model, True, True)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "--compile" in line and "RuntimeError" in line
    assert model.gradient_checkpointing and model(torch.tensor([[1, 2]])).shape == (1, 2, 32)


def test_sampled_responses_can_be_trained_on():
    """Sampling runs in inference mode; neither its results nor the RoPE table that it may have
    built are inference tensors, which autograd refuses."""
    model = tiny()
    M.rope_table.cache_clear()
    tokens, mask, logp = model.generate(PROMPTS, 2, 5)
    assert not any(x.is_inference() for x in (tokens, mask, logp))
    ((model.token_logp(tokens, mask)[0] - logp) * mask).sum().backward()


def test_greedy_responses_are_those_of_a_loop_without_cache_in_any_batch(family):
    model = tiny(family)
    stop = model.cfg.stop_token_ids
    tokens, mask, logp = model.generate(PROMPTS, group_size=2, max_new_tokens=12, temperature=0)
    for i in range(len(tokens)):
        prompt, n = PROMPTS[i // 2], int(mask[i].sum())
        expected = greedy_without_cache(model, prompt, 12, stop)
        assert tokens[i, :len(prompt) + n].tolist() == expected
        assert mask[i].nonzero()[0] == len(prompt) and n == len(expected) - len(prompt)
        _, mask_alone, logp_alone = model.generate([prompt], max_new_tokens=12, temperature=0)
        close(logp_alone[mask_alone > 0], logp[i][mask[i] > 0], 1e-9)
    close(logp, model.token_logp(tokens, mask, 0)[0], 1e-9)    # temperature 0 is scored at 1
    assert len(mask.sum(1).unique()) > 1


def test_the_end_token_is_the_last_of_the_mask_and_pads_follow():
    model = tiny()
    stop = set(model.cfg.stop_token_ids)
    tokens, mask, _ = model.generate(PROMPTS, group_size=8, max_new_tokens=12)
    truncated = 0
    for i, (row, chosen) in enumerate(zip(tokens, mask)):
        prompt = PROMPTS[i // 8]
        start, n = len(prompt), int(chosen.sum())
        assert row[:start].tolist() == prompt and not chosen[:start].any()
        assert chosen[start:start + n].all() and not chosen[start + n:].any()
        *body, end = row[start:start + n].tolist()
        assert not set(body) & stop and (row[start + n:] == 0).all()
        assert end in stop or n == 12
        truncated += end not in stop
    assert truncated < len(tokens)


def test_pad_may_be_the_end_token():
    """Masks come from lengths: with pad = eos nothing changes but the pads."""
    model = tiny()
    torch.manual_seed(1)
    tokens, mask, logp = model.generate(PROMPTS, group_size=4, max_new_tokens=12, pad=0)
    torch.manual_seed(1)
    tokens3, mask3, logp3 = model.generate(PROMPTS, group_size=4, max_new_tokens=12, pad=3)
    assert torch.equal(mask, mask3) and torch.equal(logp, logp3)
    assert torch.equal(tokens[mask > 0], tokens3[mask > 0])
    close(model.token_logp(tokens3, mask3)[0], logp, 1e-9)


def test_given_random_numbers_fix_the_responses_and_leave_torchs_random_state_alone():
    model = tiny()

    def generate(seed):
        return model.generate(PROMPTS, 4, 12, uniform=repeated_uniform(4 * len(PROMPTS), 12, seed))

    first = generate(5)
    state = torch.get_rng_state()
    again = generate(5)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert torch.equal(state, torch.get_rng_state())
    other = generate(6)
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_what_is_sampled_does_not_depend_on_the_rows_beside_it(family):
    """Each response has random numbers of its own: prompts alone, in pairs and all together."""
    model = tiny(family)
    uniform = repeated_uniform(4 * len(PROMPTS), 12, seed=0)

    def responses(size):
        found = []
        for i in range(0, len(PROMPTS), size):
            rows = uniform[4 * i:4 * (i + size)]
            tokens, mask, _ = model.generate(PROMPTS[i:i + size], 4, 12, uniform=rows)
            for ids, chosen in zip(tokens, mask):
                found.append(ids[chosen > 0].tolist())
        return found

    assert responses(1) == responses(2) == responses(5)


def test_no_stop_ids_and_responses_of_one_token():
    model = tiny()
    _, mask, _ = model.generate(PROMPTS, 1, 12, 0, stop_token_ids=())
    assert (mask.sum(1) == 12).all()
    tokens, mask, _ = model.generate(PROMPTS, 3, 1)
    assert (mask.sum(1) == 1).all() and tokens.shape == (15, 8)


def test_a_prompt_that_does_not_fit_or_is_empty_is_refused():
    with pytest.raises(ValueError, match="empty"):
        tiny().generate([[1], []])
    with pytest.raises(AssertionError, match="49.*48"):
        tiny()(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="48"):
        tiny().generate([[1] * 40], max_new_tokens=9)


def test_sampling_follows_the_tempered_softmax():
    """First tokens of 20,000 responses against softmax(z / 0.7): within 5 standard errors, each."""
    model = tiny(dtype=torch.float32)
    n = 20_000
    tokens, _, _ = model.generate([[7, 8, 9]], group_size=n, max_new_tokens=1, temperature=0.7)
    z = model(torch.tensor([[7, 8, 9]]))[0, -1] @ model.unembedding.T
    p = (z / 0.7).softmax(-1)
    share = torch.bincount(tokens[:, 3], minlength=23) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_sampling_never_picks_a_token_of_probability_zero(monkeypatch):
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).repeat(50_000, 1)
    for dtype in (torch.float32, torch.float64):               # float32 on MPS alone
        assert set(M.sample(p, torch.rand(50_000, dtype=dtype)).tolist()) == {1, 3}
        eps = torch.finfo(dtype).eps
        for u, picked in ((0.0, 1), (1 - eps / 2, 3)):         # the extremes of torch.rand
            u = torch.full((50_000,), u, dtype=dtype)
            assert set(M.sample(p * 0.1 / 3, u).tolist()) == {picked}


@pytest.mark.parametrize("V", (128, 300, 420, 1000))
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(V):
    """Found in two steps, by blocks of 128 tokens; some tokens and whole blocks have no
    probability."""
    torch.manual_seed(0)
    p = torch.rand(2000, V) * (torch.rand(2000, V) < 0.3)
    p[:, V - 150:V - 10] = 0.0
    p[:, 0] = 0.0
    u = torch.rand(2000, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1.0])
    drawn = M.sample(p, u)
    c = p.double().cumsum(1)
    expected = (c <= u[:, None] * c[:, -1:]).sum(1)            # the first token beyond u
    expected[1] = p[1].nonzero().max()
    assert torch.equal(drawn, expected)
    if V == 128:
        return
    # at a block's end two sums of its tokens, in two orders, may differ in the last digit
    p[:, 128] = 0.0
    for dtype in (torch.float32, torch.float64):               # float32 on MPS alone
        end = (p[:, :128].double().sum(1) / p.double().sum(1)).to(dtype)
        for u in (end, torch.nextafter(end, torch.zeros((), dtype=dtype))):
            drawn = M.sample(p, u)
            assert (p.gather(1, drawn[:, None]) > 0).all()
    p[:, 128:] = 0.0                                           # the last blocks are empty
    drawn = M.sample(p, torch.ones(2000, dtype=torch.float64))
    assert (p.gather(1, drawn[:, None]) > 0).all()


def test_tiles_of_log_probs_cover_the_vocabulary_once_in_widths_of_128(monkeypatch):
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": 2 ** 16})
    for rows in (1, 77, 200, 513):
        seen = torch.zeros(rows, 1000)
        for r, v in M.LinearLogp.tiles(torch.empty(rows, 1), torch.empty(1000, 1)):
            seen[r, v] += 1
            width = seen[0, v].numel()
            assert width % 128 == 0 or width < 128 or v.stop >= 1000
            assert seen[r, v].numel() <= 2 ** 16
        assert (seen == 1).all()


def test_attention_over_the_cache_is_the_textbook_s_in_both_precisions(family):
    """The plain products of bf16 and torch's fused kernel, with hidden columns."""
    torch.manual_seed(0)
    H, K = 4, FAMILIES[family].get("n_kv_head", 4)
    q, k, v = torch.randn(3, H, 1, 16), torch.randn(3, K, 9, 16), torch.randn(3, K, 9, 16)
    bias = torch.zeros(3, 1, 1, 9)
    bias[0, ..., 5:] = bias[1, ..., 2:4] = -math.inf
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        found = M.decode_attention(*(x.to(dtype) for x in (q, k, v, bias)))
        assert found.dtype == dtype
        # keys with a large bias: scores of a hundred, which bf16 would round by a half
        far, near = q + 8, k + 8
        fused = torch.nn.functional.scaled_dot_product_attention(
            far.to(dtype), near.to(dtype).repeat_interleave(H // K, 1),
            v.to(dtype).repeat_interleave(H // K, 1), attn_mask=bias.to(dtype))
        shifted = M.decode_attention(*(x.to(dtype) for x in (far, near, v, bias)), True)
        torch.testing.assert_close(shifted, fused, rtol=0, atol=max(tolerance, 1e-4))
        for b in range(3):
            for h in range(H):
                scores = k[b, h * K // H] @ q[b, h, 0] / 4 + bias[b, 0, 0]
                expected = scores.softmax(0) @ v[b, h * K // H]
                torch.testing.assert_close(found[b, h, 0].float(), expected, rtol=0,
                                           atol=tolerance)


def test_the_cache_holds_keys_and_values_alone(family):
    """Views of all queries, keys and values would hold 9 times as much for Qwen 2.5."""
    model = tiny(family)
    cache = M.KVCache(model.cfg)
    model(torch.zeros(2, 7, dtype=torch.long), cache=cache)
    for pair in cache.layers:
        for x in pair:
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_every_token_of_a_large_vocabulary_can_be_drawn():
    """Of 151,936 tokens those that a float32 sum gives no interval of their own: they carry 5e-4 of
    the probability. Each is hit by the middle of its interval, computed exactly."""
    torch.manual_seed(0)
    p = torch.randn(151_936).mul(3).softmax(0)
    c = p.cumsum(0)
    lost = (c[1:] == c[:-1]).nonzero()[:, 0] + 1
    assert len(lost) > 1000 and p[lost].sum() > 2e-4
    weights = [int(x * 2 ** 90) for x in p.tolist()]           # a float32 is a fraction
    before = list(itertools.accumulate(weights, initial=0))
    lost = lost[::len(lost) // 100]
    middles = []
    for v in lost.tolist():
        middles.append((2 * before[v] + weights[v]) / (2 * before[-1]))    # rounded once
    drawn = M.sample(p.expand(len(lost), -1), torch.tensor(middles, dtype=torch.float64))
    assert drawn.tolist() == lost.tolist()


def test_entropy_is_never_negative_and_keeps_its_digits_where_it_is_small():
    """lse - Σ p z cancels where z is large: at logits near 1,000 float32 leaves nothing of an
    entropy of 1e-4."""
    for gap in (5.0, 12.0, 30.0):
        for level in (0.0, 1000.0):
            hidden = torch.tensor([[level + gap, level]])      # two logits, of a unit matrix
            _, entropy = M.linear_logp(hidden, torch.eye(2), torch.tensor([0]), 1.0)
            q = 1 / (1 + math.exp(gap))
            expected = -q * math.log(q) - (1 - q) * math.log1p(-q)
            assert entropy >= 0 and entropy.item() == pytest.approx(expected, rel=1e-3)
    torch.manual_seed(0)
    hidden = torch.randn(500, 8) * 30
    _, entropy = M.linear_logp(hidden, torch.randn(300, 8) * 3, torch.zeros(500).long(), 1.0)
    assert (entropy >= 0).all()


def test_bf16_products_keep_float32_master_weights(monkeypatch, family):
    """What CUDA runs, on a CPU: products in bf16, log-probs and weight gradients in float32,
    sampler and scorer close."""
    bf16_devices(monkeypatch, {"cpu"})
    model = tiny(family, torch.float32)
    tokens, mask, logp = model.generate(PROMPTS, 4, 12)
    with M.autocast(model):
        scored, entropy = model.token_logp(tokens, mask)
    assert scored.dtype == entropy.dtype == logp.dtype == torch.float32
    error = (logp - scored).abs()
    assert error.max() < 0.25 and error.sum() / mask.sum() < 0.03
    scored.sum().backward()
    for p in model.parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all()
    exact, _ = model.token_logp(tokens, mask)                  # outside autocast
    rounding = (exact - scored).abs().sum() / mask.sum()
    assert 1e-4 < rounding < 0.05


# --------------------------------------------------------------------------------- the scalar head


def test_value_is_read_one_column_before_the_score():
    """A head that returns its own position: value[t] is read at t - 1, before token t is chosen,
    the score at the end token itself."""
    class Position(ScalarModel):
        def forward(self, tokens):
            return torch.arange(tokens.size(1)).expand(tokens.shape).double() + 100

    model = Position(tiny())
    tokens = torch.randint(0, 23, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    assert model.value(tokens).tolist() == [[0, 100, 101, 102, 103, 104]] * 2
    assert model.score(tokens, mask).tolist() == [103, 105]
    value, score = model.value_and_score(tokens, mask)
    assert torch.equal(value, model.value(tokens)) and torch.equal(score, model.score(tokens, mask))


def test_a_score_is_the_value_of_the_longer_prefix_whatever_the_padding(family):
    model = ScalarModel(tiny(family), std=1.0).double().requires_grad_(False)
    tokens = torch.randint(0, 23, (3, 9))
    mask = torch.zeros(3, 9)
    ends = (5, 9, 7)
    for row, start, end in zip(mask, (2, 1, 4), ends):
        row[start:end] = 1
    score = model.score(tokens, mask)
    value = model.value(torch.cat([tokens, tokens[:, :1]], 1))
    hidden = model.trunk(tokens)                               # after the last norm, once
    by_hand = (hidden * model.head.weight[0]).sum(-1) + model.head.bias
    torch.testing.assert_close(model.value(tokens)[:, 1:], by_hand[:, :-1], rtol=0, atol=1e-10)
    for i, end in enumerate(ends):
        trimmed = model.score(tokens[i:i + 1, :end], mask[i:i + 1, :end])
        assert math.isclose(score[i], value[i, end], abs_tol=1e-10)
        assert math.isclose(score[i], trimmed.item(), abs_tol=1e-10)
    new_critic = ScalarModel(tiny()).double()
    assert (new_critic.value(tokens) == 0).all()               # it expects nothing


# ----------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("n, size", [(10, 3), (10, 10), (3, 7), (5, 1)])
def test_batches_are_one_stream_of_shuffled_epochs_from_any_start(n, size):
    stream = []
    for epoch in range(60):
        generator = torch.Generator().manual_seed(2 * 1_000_003 + epoch)
        stream += torch.randperm(n, generator=generator).tolist()
    for start in (0, 1, 4, 11):
        batch_iter = batches(list(range(n)), size, 2, start)
        for k in range(start, start + 9):
            assert next(batch_iter) == stream[k * size:(k + 1) * size]


def test_micro_batches_cover_every_row_once_within_the_budget():
    torch.manual_seed(0)
    mask = torch.zeros(20, 30)
    for i, n in enumerate(torch.randint(1, 20, (20,)).tolist()):
        mask[i, 5:5 + n] = 1
    mask[3] = 0                                                # an empty row is carried along
    model = tiny()
    tokens = torch.randint(0, 23, mask.shape)
    whole, _ = model.token_logp(tokens, mask)
    chosen = torch.randperm(20)[:15]
    seen, padded = [], 0
    for rows, width, index in micro_batches(mask, chosen, 60, CPU):
        assert len(rows) * width <= 60 or len(rows) == 1
        assert not mask[rows, width:].any()                    # nothing that counts is trimmed
        logp, _ = model.token_logp(tokens[rows, :width], index=index)
        close(logp, whole[rows, :width], 1e-10)
        seen += rows.tolist()
        padded += len(rows) * width
    assert sorted(seen) == sorted(chosen.tolist()) and padded < 15 * 30


# --------------------------------------------------------------------- optimiser, evaluation, rows


def test_matrices_decay_and_vectors_and_embeddings_do_not(family):
    model = tiny(family)
    adamw, = make_optimizer(model, 1e-3, weight_decay=0.1).parts
    decay = {}
    for group in adamw.param_groups:
        for p in group["params"]:
            decay[id(p)] = group["weight_decay"]
    for name, p in model.named_parameters():
        matrix = p.dim() == 2 and "embedding" not in name and "position" not in name
        assert decay.pop(id(p)) == (0.1 if matrix else 0.0), name
    assert not decay

    adamw, muon = make_optimizer(model, 1e-3, 0.1, muon_lr=1e-2).parts
    hidden, others = set(), set()
    for name, p in model.named_parameters():
        if "blocks" in name and p.dim() == 2:
            hidden.add(id(p))
        else:
            others.add(id(p))
    assert {id(p) for p in muon.param_groups[0]["params"]} == hidden
    assert muon.param_groups[0]["lr"] == 1e-2
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == others


def test_the_learning_rate_warms_up_and_decays():
    optimizer = make_optimizer(tiny(), 2.0, muon_lr=4.0)
    rates = [set_lr(optimizer, step, 110, warmup=10, floor=0.1) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert rates[10] == 2 and rates[60] == pytest.approx(2 * 0.55)
    assert rates[109] == pytest.approx(0.2, abs=1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    muon, = optimizer.parts[1].param_groups
    assert muon["lr"] == 2 * set_lr(optimizer, 110, 110, warmup=10, floor=0.1)     # its own peak


def test_muon_is_torchs_but_for_its_precision():
    """Five steps on matrices of both shapes, two of one shape; torch iterates in bf16. An update's
    singular values are near 1."""
    torch.manual_seed(0)
    start = [torch.randn(12, 40), torch.randn(40, 12), torch.randn(12, 40)]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = [Muon(ours, lr=0.1, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1,
                                   adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.01 * (q - s).norm()
        singular = torch.linalg.svdvals(orthogonalize(p.grad))
        assert 0.6 < singular.min() and singular.max() < 1.3


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("steps, warmup", [
    (1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (7, 6), (7, 7), (9, 0), (200, 5)])
def test_every_step_learns_the_first_and_the_last_included(steps, warmup, linear):
    """A rate of exactly 0 at the last step reads a batch and learns nothing."""
    optimizer = make_optimizer(tiny(), 2.0)
    rates = [set_lr(optimizer, k + 1, steps, warmup, linear=linear) for k in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
    n = steps - warmup
    if n <= 0:
        assert rates[-1] == pytest.approx(2 * steps / warmup)
    else:
        assert rates[warmup] == 2                              # the first one after the warm-up
        last = 1 / n if linear else math.sin(math.pi / 2 / n) ** 2
        assert rates[-1] == pytest.approx(2 * last)


GREEDY = ["a", None, "b"]                                      # one response per prompt
SAMPLED = ["a", "b", None, "b", "b", "b"]                      # two per prompt; None is truncated


class Scripted:
    """A policy whose responses are those above, with the same log-prob on every token; and a reward
    model whose score is the code of the first response token."""
    device, cfg = CPU, GPTConfig(stop_token_ids=(256,))
    unembedding = torch.zeros(1)
    head = torch.nn.Linear(1, 1)

    def __init__(self, logp=0.0):
        self.logp = logp

    def generate(self, prompts, group_size, max_new_tokens, temperature=1.0, uniform=None):
        assert len(prompts) == 3 and (group_size, temperature) in ((1, 0.0), (2, 1.0))
        rows, mask = [], []
        for text in GREEDY if group_size == 1 else SAMPLED:
            rows.append([9, 97, 97, 97] if text is None else [9, ord(text), 256, 0])
            mask.append([0, 1, 1, 1] if text is None else [0, 1, 1, 0])
        return torch.tensor(rows), torch.tensor(mask).float(), None

    def token_logp(self, tokens, mask, temperature, index):
        logp = torch.zeros(tokens.numel())
        logp[index] = self.logp
        return logp.view_as(tokens), None

    def value_and_score(self, tokens, mask):
        return torch.zeros(tokens.shape), tokens[:, 1].float()


def test_evaluation_metrics_are_those_counted_by_hand():
    cfg = types.SimpleNamespace(max_new_tokens=3, micro_batch_tokens=0, format_reward=0.0,
                                reward="out/reward", seed=0)
    tokenizer = make_tokenizer()

    def score(row, text):                                      # partial credit is not right
        return 1.0 if text == "a" else 0.9

    rows = [{"ids": [9], "answer": ""}] * 3
    metrics, texts = evaluate(Scripted(), tokenizer, rows, score, cfg, samples=2)
    assert texts == ["a", "aaa [truncated]", "b"]
    assert metrics == pytest.approx(
        {"greedy": 1 / 3, "accuracy": 1 / 6, "pass@2": 1 / 3, "eos_rate": 5 / 6, "length": 13 / 6})

    # the score and the KL are those of the first sample of each prompt: "a", truncated, "b"
    def unknown(row, text):
        return None

    metrics, _ = evaluate(Scripted(-1.0), tokenizer, [{"ids": [9]}] * 3, unknown, cfg, samples=2,
                          reward_model=Scripted(), reference=Scripted(-3.0),
                          truncated_reward=-1.0)
    assert metrics == pytest.approx({"eos_rate": 5 / 6, "length": 13 / 6,
                                     "score": (97 - 1 + 98) / 3, "kl_seq": 2 * (2 + 3 + 2) / 3})
    assert evaluate(Scripted(), None, [], None, cfg) == ({}, [])


def test_distinct_bigrams():
    tokens = torch.tensor([[9, 1, 2, 1, 2], [9, 1, 2, 3, 7]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert distinct_ngrams(tokens, mask) == 3 / 5              # 12 21 12, 12 23: 3 kinds of 5


def test_test_rows_are_kept_out_of_training(capsys):
    rows = [{"prompt": str(i)} for i in range(400)]
    train, val, test = split_rows(rows)
    assert len(train) + len(val) + len(test) == 400
    assert 5 < len(val) < 40 and 5 < len(test) < 40
    train, val, test = split_rows(rows, rows[:7])
    assert test == rows[:7] and len(train) + len(val) == 393
    assert not any(row in test for row in train + val)
    assert "--test" in capsys.readouterr().out                 # what is dropped is counted


# ---------------------------------------------------------------------- checkpoints and tokenizers


def test_a_checkpoint_comes_back_as_it_was(tmp_path, family):
    tokenizer = make_tokenizer()
    stop = tokenizer.end, tokenizer.special[tokenizer.turn_end]
    model = tiny(family, torch.float32, vocab_size=259, stop_token_ids=stop)
    tokens = torch.randint(0, 259, (2, 9))
    save_checkpoint(tmp_path, model, tokenizer, step=7)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    again, its_tokenizer = load(tmp_path)
    assert again.cfg == model.cfg and its_tokenizer.n_vocab == 259
    assert torch.equal(model.token_logp(tokens)[0], again.token_logp(tokens)[0])
    critic = ScalarModel(model, std=1.0)
    save_checkpoint(tmp_path, critic, tokenizer)
    again, _ = load(tmp_path)
    assert torch.equal(again.value(tokens), critic.value(tokens))


def test_the_byte_tokenizer_knows_every_byte_and_text_cannot_make_special_tokens():
    tokenizer = make_tokenizer()
    for text in ("", "13,20#20", "naïve 汉字 🙂 e\u0301 \x00\x7f", "<|endoftext|><|im_end|>",
                 " \n\t  " * 50, "9" * 5000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
        assert max(ids, default=0) < 256
    assert tokenizer.encode("<|endoftext|>x<|im_end|>", special=True) == [256, ord("x"), 258]
    assert tokenizer.decode(list(range(128, 256)))             # broken UTF-8 is text, not a crash
    assert (tokenizer.end, tokenizer.n_vocab) == (256, 259)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def masked_text(tokenizer, ids, mask):
    return tokenizer.decode([i for i, m in zip(ids, mask) if m])


def test_chat_trains_the_assistants_turns_and_the_tokens_that_end_them():
    tokenizer = make_tokenizer()
    messages = [user("hi"), assistant("yo"), user("<|im_end|>"), assistant("ok")]
    ids, mask, turns = encode_chat(tokenizer, messages)
    assert turns == 2
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\nok<|im_end|>")
    assert masked_text(tokenizer, ids, mask) == "yo<|im_end|>ok<|im_end|>"
    assert ids.count(258) == 4                                 # the user's own text made none


def test_a_lone_prompt_may_be_a_users_turn_and_a_checkpoint_keeps_how_prompts_are_written(tmp_path):
    row = {"prompt": "2+2?\n"}
    tokenizer = make_tokenizer(turns=True, system="Be brief.")
    chat = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n")
    assert tokenizer.decode(encode_prompt(tokenizer, row)) == chat
    tokens, mask = encode_response(tokenizer, row, "4")
    assert tokenizer.decode(tokens) == chat + "4<|im_end|>"
    assert mask == [0] * (len(tokens) - 2) + [1, 1]
    plain, _ = encode_response(make_tokenizer(), row, "4")
    assert tokenizer.decode(plain) == "2+2?\n4<|endoftext|>"
    own_system = {"messages": [{"role": "system", "content": "Sing."}, user("hi")]}
    text = tokenizer.decode(encode_prompt(tokenizer, own_system))
    assert text.startswith("<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\nhi")

    save_checkpoint(tmp_path, tiny(dtype=torch.float32, vocab_size=259), tokenizer)
    for mode, system, expected in (
            ("auto", "auto", chat), ("plain", "auto", "2+2?\n"),
            ("chat", "Shout.", chat.replace("Be brief", "Shout")),
            ("auto", "", chat.replace("Be brief.", ""))):      # an empty message, not the saved one
        _, loaded = load(tmp_path, chat=mode, system=system)
        assert tokenizer.decode(encode_prompt(loaded, row)) == expected
    with pytest.raises(InputError, match="--chat yes"):
        load(tmp_path, chat="yes")


LLAMA3 = (                                                     # Meta-Llama-3-8B-Instruct's own
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def test_llama_3s_chat_format():
    special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|start_header_id|>": 262,
               "<|end_header_id|>": 263, "<|eot_id|>": 265, "<|reserved|>": 299}
    files = {"tokenizer_config.json": json.dumps({"bos_token": "<|begin_of_text|>"})}
    tokenizer = TiktokenTokenizer("llama", r"[\s\S]+", BYTES, special, end=257, template=LLAMA3,
                                  turns=True, files=files)
    assert tokenizer.decode(encode_prompt(tokenizer, {"prompt": " hi "})) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    messages = [user("<|eot_id|>"), assistant("yo"), user("so"), assistant("ok")]
    ids, mask, turns = encode_chat(tokenizer, messages)
    assert masked_text(tokenizer, ids, mask) == "yo<|eot_id|>ok<|eot_id|>" and turns == 2
    assert ids.count(265) == 4 and ids.count(256) == 1         # not the one in the user's text
    assert tokenizer.n_vocab == 300
    unused = tokenizer.decode([298])                           # an untrained model may sample it
    assert unused and 298 not in tokenizer.encode(unused, special=True)


def test_normal_forms_and_added_tokens_are_cut_where_the_tokenizers_package_cuts():
    """A special token is found before its neighbours are composed with it: > and U+0338 together
    are another letter. The vocabulary itself, as in public files, has no special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        {letter: byte for byte, letter in byte_letters().items()}, []))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<|a|>", normalized=False)])
    backend.add_tokens([tokenizers.AddedToken(x, normalized=False) for x in ("<b>", "<b>>")])
    tokenizer = FolderTokenizer("folder", {"tokenizer.json": backend.to_str()}, end=256)
    assert tokenizer.encode("<|a|>\u0338", special=True) == [256, *"\u0338".encode()]
    assert tokenizer.encode("e\u0301") == list("é".encode())
    assert tokenizer.encode(">\u0338") == list("≯".encode())
    assert tokenizer.encode("<b>>x<b>") == [258, ord("x"), 257]            # the longest one
    assert tokenizer.encode("<|a|>") == list(b"<|a|>")
    assert tokenizer.special == {"<|a|>": 256} and tokenizer.n_vocab == 259


def test_the_name_of_a_special_token_stays_text_in_a_model_folder_that_was_written():
    pytest.importorskip("tokenizers")
    tokenizer = make_tokenizer()
    written = FolderTokenizer("folder", {"tokenizer.json": tokenizer_json(tokenizer)}, end=256)
    for name, i in tokenizer.special.items():
        for text in (name, name + "x", "x" + name, name + name):
            assert written.encode(text) == list(text.encode()) == tokenizer.encode(text)
        assert written.encode(name, special=True) == [i]


def test_a_folder_that_cannot_be_read_is_refused_with_the_reason(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match='config.json: "model_type": "mamba"'):
        load(str(tmp_path))
    config.write_text("[]")
    with pytest.raises(InputError, match="config.json"):
        load(str(tmp_path))
    sizes = {name: 8 for name in SIZE_FIELDS.values()}
    config.write_text(json.dumps(
        sizes | {"model_type": "llama", "vocab_size": 300, "eos_token_id": 299}))
    with pytest.raises(InputError, match="tokenizer.json"):
        load(str(tmp_path))
    plain = TiktokenTokenizer("bytes", r"[\s\S]+", BYTES, {"<|end|>": 256}, end=256)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(plain))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load(str(tmp_path))
    out = tmp_path / "out"
    with pytest.raises(InputError, match="pip install safetensors"):
        write_folder(str(out), tiny(), make_tokenizer())
    assert not out.exists()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers"):
        load(str(tmp_path))
