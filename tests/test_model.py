"""The transformer: fused log-probs, the cache, sampling, the scalar head, checkpoints and the tokenizer.   python -m pytest tests/test_model.py"""
import json
import math
import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as M
from conftest import PROMPTS, naive_logp, tiny
from model import GPTConfig, InputError, ScalarModel, batches, linear_logp, load, make_optimizer, make_tokenizer, micro_batches, save, set_lr

# ------------------------------------------------------------------------------------------------------------------ fused log-prob


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_logp_and_entropy_equal_the_naive_form_in_value_and_gradient(temperature, monkeypatch):
    """ALGORITHMS 0.4. Tiles of 4 rows x 15 tokens over 10 x 50: the last of a row and of a column are parts of one."""
    monkeypatch.setattr(M.LinearLogp, "ROWS", 4)
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": 4 * 15})
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8).double().requires_grad_(), torch.randn(50, 8).double().requires_grad_()
    targets, upstream = torch.randint(0, 50, (10,)), torch.randn(10).double()
    logp, entropy = linear_logp(hidden, weight, targets, temperature)
    got = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))

    full = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = full.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=full).entropy(), rtol=0, atol=1e-9)
    for a, b in zip(got, torch.autograd.grad((expected * upstream).sum(), (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(lambda h, w: linear_logp(h, w, targets, temperature)[0], (hidden, weight))


def test_entropy_of_a_uniform_distribution_is_log_V():
    assert math.isclose(linear_logp(torch.zeros(1, 4), torch.randn(50, 4), torch.tensor([0]))[1].item(), math.log(50), rel_tol=1e-6)


@pytest.mark.parametrize("tile", (1, 2))
def test_fused_logp_survives_logits_that_overflow_exp(tile, monkeypatch):
    """In one tile, and where the largest logit stands in the first or in the last of two."""
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": tile})
    for sign in (1.0, -1.0):
        logp, entropy = linear_logp(torch.full((1, 1), 1e4), torch.tensor([[sign], [-sign]]), torch.tensor([int(sign > 0)]))
        assert logp.item() == -2e4 and entropy.item() == 0


def test_no_tensor_of_rows_times_vocabulary_ever_exists(monkeypatch):
    """Watch every operation of a forward and a backward pass: none may return as much as an eighth of (N, V)."""
    monkeypatch.setattr(M.LinearLogp, "TILE", {"cpu": 2 ** 14})
    N, V, C = 512, 1000, 16

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    hidden, weight = torch.randn(N, C).requires_grad_(), torch.randn(V, C).requires_grad_()
    with Largest() as seen:
        linear_logp(hidden, weight, torch.zeros(N, dtype=torch.long))[0].sum().backward()
    assert 0 < seen.numel < N * V / 8, seen.numel


def test_half_precision_inputs_give_float32_results_and_gradients_of_the_masters():
    hidden, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(30, 8).requires_grad_()
    logp, entropy = linear_logp(hidden, weight, torch.arange(5))
    logp.sum().backward()
    assert logp.dtype == entropy.dtype == torch.float32
    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    expected = (hidden.float() @ weight.bfloat16().float().T).log_softmax(-1).diagonal()
    torch.testing.assert_close(logp, expected, rtol=0, atol=0.05)
    rounded = torch.nn.functional.linear(hidden, weight.bfloat16()).float().log_softmax(-1).diagonal()       # the logits are bf16's, no more
    torch.testing.assert_close(logp, rounded, rtol=0, atol=1e-5)


def test_token_logp_scores_masked_positions_and_no_others(family):
    model = tiny(family)
    tokens, mask = torch.randint(0, 23, (3, 9)), (torch.rand(3, 9) < 0.5).double()
    logp, entropy = model.token_logp(tokens, mask, 0.7)
    mask[:, 0] = 0                                              # nothing predicts the first token
    torch.testing.assert_close(logp, naive_logp(model, tokens, 0.7) * mask, rtol=0, atol=1e-9)
    assert ((entropy > 0) == (mask > 0)).all()
    everything, _ = model.token_logp(tokens)
    torch.testing.assert_close(everything, naive_logp(model, tokens), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ the transformer


def test_the_future_and_the_pads_change_nothing(family):
    """A row alone, padded by 5 with any id, and inside a ragged batch: the same log-probs (1e-10)."""
    model = tiny(family)
    rows = [torch.randint(0, 23, (n,)) for n in (4, 9, 6)]
    batch = torch.stack([torch.cat([r, torch.randint(0, 23, (14 - len(r),))]) for r in rows])
    together, _ = model.token_logp(batch)
    for row, got in zip(rows, together):
        alone, _ = model.token_logp(row[None])
        torch.testing.assert_close(got[:len(row)], alone[0], rtol=0, atol=1e-10)


def test_rotary_attention_sees_only_the_distance():
    """RoPE, arXiv 2104.09864 Eq. 16: <R_m q, R_n k> depends on m - n alone."""
    cos, sin = (x.double() for x in M.rope_table(32, 8, 10_000.0, (), torch.device("cpu")))
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    dot = lambda m, n: (M.rotate(q, cos[m], sin[m]) * M.rotate(k, cos[n], sin[n])).sum().item()
    assert math.isclose(dot(3, 1), dot(20, 18), abs_tol=1e-5) and abs(dot(3, 1) - dot(3, 2)) > 1e-3


def test_llama3_slows_only_the_slow_frequencies():
    """factor 8, low 1, high 4, original context 64: waves longer than 64 run 8 times slower, shorter than 16 as before."""
    plain, scaled = (M.rope_table(2, 32, 10_000.0, s, torch.device("cpu"))[1][1] for s in ((), (8.0, 1.0, 4.0, 64.0)))   # sin at position 1
    wave = 2 * math.pi / plain.asin()
    torch.testing.assert_close(scaled[wave < 16], plain[wave < 16])
    torch.testing.assert_close(scaled[wave > 64].asin(), plain[wave > 64].asin() / 8)
    between = (wave > 16) & (wave < 64)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_grouped_queries_equal_repeated_keys():
    """arXiv 2305.13245: K key/value heads, each copied for H / K query heads, in plain matrix products."""
    q, k, v = torch.randn(2, 4, 6, 8).double(), torch.randn(2, 2, 6, 8).double(), torch.randn(2, 2, 6, 8).double()
    K, V = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ K.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    torch.testing.assert_close(M.causal_attention(q, k, v), scores.softmax(-1) @ V)


# -------------------------------------------------------------------------------------------------------------------- generation


def greedy_without_cache(model, prompt, max_new, stop):
    """The definition: a full forward pass for every token."""
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(int((model(torch.tensor([ids]))[0, -1] @ model.unembedding.T).argmax()))
        if ids[-1] in stop:
            break
    return ids


@pytest.mark.parametrize("block", (3, 32))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sampled_logp_is_the_scored_logp(family, dtype, tolerance, block, monkeypatch):
    """The law of DESIGN 2: cache, shared prefill, per-row positions, dropped rows and columns made in time give the full forward's log-probs."""
    monkeypatch.setattr(M.KVCache, "BLOCK", {"cpu": block})
    model = tiny(family, dtype)
    tokens, mask, logp = model.generate(PROMPTS, group=4, max_new=12, temperature=1.5)
    scored, _ = model.token_logp(tokens, mask, 1.5)
    torch.testing.assert_close(logp, scored, rtol=0, atol=tolerance)
    torch.testing.assert_close(logp, naive_logp(model, tokens, 1.5) * mask, rtol=0, atol=tolerance)
    assert len(mask.sum(1).unique()) > 3, "the lengths must be ragged, or nothing was tested"


def test_rows_that_finished_may_stay_a_while(monkeypatch):
    """As on a GPU, where finished rows are looked for every 8 tokens: what they say after their end counts for nothing."""
    monkeypatch.setattr(M, "LOOK", {"cpu": (8, 0.75)})
    model = tiny()
    tokens, mask, logp = model.generate(PROMPTS, group=4, max_new=20, temperature=1.5)
    torch.testing.assert_close(logp, model.token_logp(tokens, mask, 1.5)[0], rtol=0, atol=1e-9)
    ended = [set(row[m > 0][:-1].tolist()) & set(model.cfg.stop) for row, m in zip(tokens, mask)]
    assert not any(ended) and mask.sum(1).max() > 8 and (tokens[mask == 0].view(-1) >= 0).all()


def test_a_rollout_casts_every_weight_once(monkeypatch):
    """To bf16, on a CPU that is told to. Autocast keeps its casts for the time of a block; not in inference mode, nor when blocks are entered
    one by one."""
    monkeypatch.setattr(M, "BF16", {"cpu"})
    model = tiny("qwen3", torch.float32)
    matrices = [p for p in model.parameters() if p.dim() == 2]

    class Casts(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                self.seen.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with Casts() as casts:
        mask = model.generate(PROMPTS, 2, 12, stop=[23])[1]
    assert mask.sum() == len(PROMPTS) * 2 * 12 and [casts.seen.count(p.data_ptr()) for p in matrices] == [1] * len(matrices)


def test_a_decoding_step_can_be_replayed(family, monkeypatch):
    """What a CUDA graph needs, held on any device: between two captures a step's tensors stay where they are, it may run twice before it
    counts (once to warm up), and it leaves its result in one place. Blocks of 3 columns and dropped rows: many captures."""
    monkeypatch.setattr(M.KVCache, "BLOCK", {"cpu": 3})
    model, captures = tiny(family), []
    sampled = lambda: model.generate(PROMPTS, group=4, max_new=12, temperature=1.5, generator=torch.Generator().manual_seed(0))
    plain = sampled()

    def recorded(step, device):
        held = lambda: {name: cell.cell_contents for name, cell in zip(step.__code__.co_freevars, step.__closure__)}

        def places():
            cache = held()["cache"]
            tensors = held()["token"], held()["position"], cache.at, cache.bias, *(x for pair in cache.layers for x in pair)
            return [x.data_ptr() for x in tensors]

        first, out = places(), (step(), step())[1]
        captures.append(0)

        def replay():
            assert places() == first, "a captured tensor has moved"
            captures[-1] += 1
            return out.copy_(step())

        return replay

    monkeypatch.setattr(M, "replayed", recorded)
    for a, b in zip(plain, sampled()):
        assert torch.equal(a, b)
    assert len(captures) > 3 and max(captures) > 1 and 0 not in captures


@pytest.mark.parametrize("family", ("gpt2", "qwen3"))
def test_compiled_blocks_give_the_same_gradients_and_sampling_leaves_them_alone(family, monkeypatch):
    """All that torch.compile does but the last step, its C++ or Triton code: that needs a compiler."""
    torch._dynamo.reset()
    compile, model, tokens, grads = torch.compile, tiny(family), torch.randint(0, 23, (3, 20)), []
    monkeypatch.setattr(torch, "compile", lambda f, **more: compile(f, **more | {"backend": "aot_eager"}))
    for recompute, compiled in ((False, False), (False, True), (True, True)):
        M.set_blocks(model, recompute, compiled)
        model.zero_grad()
        model.token_logp(tokens)[0].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-9, atol=1e-9)
    count = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    before = count()
    model.generate(PROMPTS, 2, 8)
    assert count() == before > 0


def test_where_torch_compile_does_not_work_the_run_goes_on(monkeypatch, capsys):
    def broken(f, **more):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    M.set_blocks(tiny(), True, True)
    assert capsys.readouterr().out == "--compile: torch.compile does not work here (RuntimeError), so nothing is compiled\n"


def test_what_was_sampled_can_be_trained_on():
    """Sampling runs in inference mode; neither its results nor the rotary table that it may have made carry that further."""
    model = tiny()
    M.rope_table.cache_clear()
    tokens, mask, logp = model.generate(PROMPTS, 2, 5)
    assert not any(x.is_inference() for x in (tokens, mask, logp))
    ((model.token_logp(tokens, mask)[0] - logp) * mask).sum().backward()


def test_greedy_answers_are_those_of_a_loop_without_cache_in_any_batch(family):
    model = tiny(family)
    tokens, mask, logp = model.generate(PROMPTS, group=2, max_new=12, temperature=0)
    ends = set()
    for i in range(len(tokens)):
        prompt, n = PROMPTS[i // 2], int(mask[i].sum())
        expected = greedy_without_cache(model, prompt, 12, model.cfg.stop)
        assert tokens[i, :len(prompt) + n].tolist() == expected
        assert mask[i].nonzero()[0] == len(prompt) and n == len(expected) - len(prompt)
        alone = model.generate([prompt], max_new=12, temperature=0)
        torch.testing.assert_close(alone[2][0][alone[1][0] > 0], logp[i][mask[i] > 0], rtol=0, atol=1e-9)
        ends.add(expected[-1] in model.cfg.stop)
    torch.testing.assert_close(logp, model.token_logp(tokens, mask, 0)[0], rtol=0, atol=1e-9)      # temperature 0 is scored at 1
    assert len({int(n) for n in mask.sum(1)}) > 1


def test_the_end_token_is_the_last_of_the_mask_and_pads_follow():
    model = tiny()
    tokens, mask, _ = model.generate(PROMPTS, group=8, max_new=12)
    cut = 0
    for i, (row, m) in enumerate(zip(tokens, mask)):
        start, n = len(PROMPTS[i // 8]), int(m.sum())
        assert row[:start].tolist() == PROMPTS[i // 8] and m[start:start + n].all() and not m[start + n:].any() and not m[:start].any()
        body, end = row[start:start + n - 1], int(row[start + n - 1])
        assert not set(body.tolist()) & set(model.cfg.stop) and (row[start + n:] == 0).all()
        cut += end not in model.cfg.stop
        assert end in model.cfg.stop or n == 12
    assert cut < len(tokens)


def test_pad_may_be_the_end_token():
    """Masks come from lengths: with pad = eos nothing changes but the ids of the pads (ALGORITHMS 0.2)."""
    model, out = tiny(), []
    for pad in (0, 3):
        torch.manual_seed(1)
        out.append(model.generate(PROMPTS, group=4, max_new=12, pad=pad))
    (tokens, mask, logp), (tokens3, mask3, logp3) = out
    assert torch.equal(mask, mask3) and torch.equal(logp, logp3) and torch.equal(tokens[mask > 0], tokens3[mask > 0])
    torch.testing.assert_close(model.token_logp(tokens3, mask3)[0], logp, rtol=0, atol=1e-9)


def test_the_same_seed_gives_the_same_text_and_a_generator_leaves_torch_alone():
    model = tiny()
    a = model.generate(PROMPTS, 4, 12, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    b = model.generate(PROMPTS, 4, 12, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and torch.equal(state, torch.get_rng_state())
    c = model.generate(PROMPTS, 4, 12, generator=torch.Generator().manual_seed(6))
    assert a[0].shape != c[0].shape or not torch.equal(a[0], c[0])


def test_other_stop_ids_and_one_token_answers():
    model = tiny()
    tokens, mask, _ = model.generate(PROMPTS, 1, 12, 0, stop=())
    assert (mask.sum(1) == 12).all()
    tokens, mask, _ = model.generate(PROMPTS, 3, 1)
    assert (mask.sum(1) == 1).all() and tokens.shape == (15, 8)


def test_a_prompt_that_does_not_fit_or_is_empty_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        tiny().generate([[1], []])
    with pytest.raises(AssertionError, match="49 tokens exceed the context of 48"):
        tiny()(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match="exceed the context of 48"):
        tiny().generate([[1] * 40], max_new=9)


def test_sampling_follows_the_tempered_softmax():
    """First tokens of 20,000 answers against softmax(z / 0.7): within 5 standard errors, every token."""
    model = tiny(dtype=torch.float32)
    tokens, _, _ = model.generate([[7, 8, 9]], group=20_000, max_new=1, temperature=0.7)
    p = ((model(torch.tensor([[7, 8, 9]]))[0, -1] @ model.unembedding.T) / 0.7).softmax(-1)
    share = torch.bincount(tokens[:, 3], minlength=23) / 20_000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-6).all()


def test_sampling_never_picks_a_token_of_probability_zero(monkeypatch):
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).repeat(50_000, 1)
    assert set(M.sample(p).tolist()) == {1, 3}
    for u in (0.0, 1 - 2 ** -24):                                # the ends of what torch.rand can return
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full((50_000, 1), u))
        assert set(M.sample(p * 0.1 / 3).tolist()) == {1 if u == 0 else 3}


def test_bf16_path_keeps_float32_masters(monkeypatch, family):
    """What CUDA runs, run on a CPU: products in bf16, log-probs and weight gradients in float32, sampler and scorer close."""
    monkeypatch.setattr(M, "BF16", {"cpu"})
    model = tiny(family, torch.float32)
    tokens, mask, logp = model.generate(PROMPTS, 4, 12)
    scored, entropy = model.token_logp(tokens, mask)
    assert scored.dtype == entropy.dtype == logp.dtype == torch.float32
    assert (logp - scored).abs().max() < 0.25 and (logp - scored).abs().sum() / mask.sum() < 0.03
    scored.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    monkeypatch.setattr(M, "BF16", set())
    assert (model.token_logp(tokens, mask)[0] - scored).abs().sum() / mask.sum() < 0.05


# ------------------------------------------------------------------------------------------------------------------ the scalar head


def test_value_is_read_one_column_before_the_score():
    """A head that returns its own position: value[t] comes from t - 1, before the choice; score from the end token itself (ALGORITHMS 0.1)."""

    class Position(ScalarModel):
        def forward(self, tokens):
            return torch.arange(tokens.size(1)).expand(tokens.shape).double() + 100

    model = Position(tiny())
    tokens = torch.randint(0, 23, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    assert model.value(tokens).tolist() == [[0, 100, 101, 102, 103, 104]] * 2
    assert model.score(tokens, mask).tolist() == [103, 105]


def test_a_score_is_the_value_of_the_longer_prefix_whatever_the_padding(family):
    model = ScalarModel(tiny(family), std=1.0).double()
    tokens, mask = torch.randint(0, 23, (3, 9)), torch.zeros(3, 9)
    for row, (start, end) in zip(mask, ((2, 5), (1, 9), (4, 7))):
        row[start:end] = 1
    score, value = model.score(tokens, mask), model.value(torch.cat([tokens, tokens[:, :1]], 1))
    score, value = score.detach(), value.detach()
    for i, end in enumerate((5, 9, 7)):
        assert math.isclose(score[i], value[i, end], abs_tol=1e-10)
        assert math.isclose(score[i], model.score(tokens[i:i + 1, :end], mask[i:i + 1, :end]).item(), abs_tol=1e-10)
    assert ScalarModel(tiny()).double().value(tokens).abs().max() == 0       # a new critic expects nothing


# ------------------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("n, size", [(10, 3), (10, 10), (3, 7), (5, 1)])
def test_batches_are_one_stream_of_shuffled_epochs_from_any_start(n, size):
    stream = [i for epoch in range(60) for i in torch.randperm(n, generator=torch.Generator().manual_seed(2 * 1_000_003 + epoch)).tolist()]
    for start in (0, 1, 4, 11):
        for k, batch in zip(range(start, start + 9), batches(list(range(n)), size, 2, start)):
            assert batch == stream[k * size:(k + 1) * size]


def test_micro_batches_cover_every_row_once_within_the_budget():
    torch.manual_seed(0)
    mask = torch.zeros(20, 30)
    for i, n in enumerate(torch.randint(1, 20, (20,)).tolist()):
        mask[i, 5:5 + n] = 1
    mask[3] = 0                                                 # an empty row is carried along
    model = tiny()
    tokens = torch.randint(0, 23, mask.shape)
    rows, seen, padded = torch.randperm(20)[:15], [], 0
    whole, _ = model.token_logp(tokens, mask)
    for j, t, at in micro_batches(mask, rows, 60, torch.device("cpu")):
        seen += j.tolist()
        assert len(j) * t <= 60 or len(j) == 1
        assert not mask[j, t:].any()                            # nothing that counts is trimmed
        torch.testing.assert_close(model.token_logp(tokens[j, :t], at=at)[0], whole[j, :t], rtol=0, atol=1e-10)
        padded += len(j) * t
    assert sorted(seen) == sorted(rows.tolist()) and padded < 15 * 30


# ----------------------------------------------------------------------------------------------- optimiser, evaluation, rows


def test_matrices_decay_and_vectors_and_embeddings_do_not(family):
    model = tiny(family)
    adamw, = make_optimizer(model, 1e-3, weight_decay=0.1).parts
    decays = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decays.pop(id(p)) == (0.1 if p.dim() == 2 and "embedding" not in name and "position" not in name else 0.0), name
    assert not decays
    adamw, muon = make_optimizer(model, 1e-3, 0.1, muon_lr=1e-2).parts
    hidden = {id(p) for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2}
    assert {id(p) for p in muon.param_groups[0]["params"]} == hidden and muon.param_groups[0]["lr"] == 1e-2
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == {id(p) for p in model.parameters()} - hidden


def test_the_rate_warms_up_and_comes_down():
    optimizer = make_optimizer(tiny(), 2.0, muon_lr=4.0)
    rates = [set_lr(optimizer, step, 110, warmup=10, floor=0.1) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert rates[59] == pytest.approx(2 * 0.55) and rates[109] == pytest.approx(0.2) and rates[9:] == sorted(rates[9:], reverse=True)
    assert optimizer.parts[1].param_groups[0]["lr"] == pytest.approx(0.4)            # each group by its own peak
    assert set_lr(optimizer, 5, 5) == 0 and set_lr(optimizer, 1, 1, warmup=3) == pytest.approx(2 / 3)


def test_evaluate_counts_what_it_says():
    """A model that speaks from a script, None being an answer that was cut: every figure by hand."""
    said = {1: ["a", None, "b"], 2: ["a", "b", "b", None, "b", "b"]}             # one greedy answer a prompt; two sampled

    class Scripted:
        device, cfg = torch.device("cpu"), GPTConfig(stop=(256,))

        def generate(self, prompts, group, max_new, temperature, generator=None):
            assert (group, temperature) in ((1, 0.0), (2, 1.0)) and len(prompts) == 3
            rows = [[9] + ([97, 97, 97] if text is None else [ord(text), 256, 0]) for text in said[group]]
            return torch.tensor(rows), torch.tensor([[0, 1, 1, text is None] for text in said[group]]).float(), None

    rows = [{"ids": [9], "answer": ""}] * 3
    found, texts = M.evaluate(Scripted(), make_tokenizer(), rows, lambda row, text: float(text == "a"), 3, samples=2)
    assert found == pytest.approx({"greedy": 1 / 3, "acc": 1 / 6, "pass@2": 1 / 3, "end": 5 / 6, "length": 13 / 6}) and texts == said[1]
    def watch(rows, tokens, mask, texts):                          # sees one answer to every prompt
        assert rows == [{"ids": [9]}] * 3 and texts == said[2][::2]
        return {"n": mask.sum(1)}

    unknown, _ = M.evaluate(Scripted(), make_tokenizer(), [{"ids": [9]}] * 3, lambda row, text: None, 3, samples=2, watch=watch)
    assert unknown.pop("n") == 2.0
    assert set(unknown) == {"end", "length"} and M.evaluate(Scripted(), None, [], None, 3) == ({}, [])


def test_distinct_bigrams():
    tokens = torch.tensor([[9, 1, 2, 1, 2], [9, 1, 2, 3, 7]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    assert M.distinct(tokens, mask) == 3 / 5                       # 12 21 12 and 12 23: three kinds of five


def test_test_rows_are_kept_from_training(capsys):
    rows = [{"prompt": str(i)} for i in range(400)]
    train, val, test = M.split(rows)
    assert len(train) + len(val) + len(test) == 400 and 5 < len(val) < 40 and 5 < len(test) < 40
    train, val, test = M.split(rows, rows[:7])
    assert test == rows[:7] and len(train) + len(val) == 393 and "its prompt is in --test" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- checkpoints and tokenizer


def test_a_checkpoint_comes_back_as_it_was(tmp_path, family):
    model, tokenizer = tiny(family, torch.float32, vocab=259), make_tokenizer()
    save(tmp_path, model, tokenizer, step=7)
    again, tok = load(tmp_path)
    assert again.cfg == model.cfg and tok.n_vocab == 259 and os.listdir(tmp_path) == ["ckpt.pt"]
    tokens = torch.randint(0, 259, (2, 9))
    assert torch.equal(model.token_logp(tokens)[0], again.token_logp(tokens)[0])
    critic = ScalarModel(model, std=1.0)
    save(tmp_path, critic, tokenizer)
    assert torch.equal(load(tmp_path)[0].value(tokens), critic.value(tokens))


def test_the_byte_tokenizer_knows_every_byte_and_text_cannot_make_special_tokens():
    tok = make_tokenizer()
    for text in ("", "13,20#20", "naïve 汉字 🙂 e\u0301 \x00\x7f", "<|endoftext|><|im_end|>", " \n\t  " * 50, "9" * 5000):
        ids = tok.encode_ordinary(text)
        assert tok.decode(ids) == text and len(ids) == len(text.encode()) and max(ids, default=0) < 256
    assert tok.decode(list(range(128, 256))) and (tok.eot_token, tok.n_vocab) == (256, 259)      # broken UTF-8 is text, not a crash


def test_chat_trains_the_assistant_and_the_mark_that_ends_its_turn():
    tok = make_tokenizer()
    ids, mask = M.encode_chat(tok, [dict(role="user", content="hi"), dict(role="assistant", content="yo"),
                                    dict(role="user", content="<|im_end|>"), dict(role="assistant", content="ok")])
    assert tok.decode(ids) == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
                               "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\nok<|im_end|>")
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == "yo<|im_end|>ok<|im_end|>"
    assert ids.count(258) == 4                                   # the user's own text made none


def test_a_lone_prompt_may_be_a_users_turn_and_a_checkpoint_keeps_how_prompts_are_written(tmp_path):
    row, tok = {"prompt": "2+2?\n"}, make_tokenizer(turns=True, system="Be brief.")
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(M.prompt_ids(tok, row)) == asked
    tokens, mask = M.encode_answer(tok, row, "4")
    assert tok.decode(tokens) == asked + "4<|im_end|>" and mask == [0] * (len(tokens) - 2) + [1, 1]
    assert tok.decode(M.encode_answer(make_tokenizer(), row, "4")[0]) == "2+2?\n4<|endoftext|>"
    own = {"messages": [dict(role="system", content="Sing."), dict(role="user", content="hi")]}
    assert tok.decode(M.prompt_ids(tok, own)).startswith("<|im_start|>system\nSing.<|im_end|>\n<|im_start|>user\nhi")          # its own system line
    save(tmp_path, tiny(dtype=torch.float32, vocab=259), tok)
    for chat, system, says in (("auto", "", asked), ("plain", "", "2+2?\n"), ("chat", "Shout.", asked.replace("Be brief", "Shout"))):
        assert tok.decode(M.prompt_ids(load(tmp_path, chat=chat, system=system)[1], row)) == says
    with pytest.raises(InputError, match="--chat yes: must be auto, chat or plain"):
        load(tmp_path, chat="yes")


def test_llama_3s_chat_format():
    marks = {x: 256 + i for i, x in M.LLAMA3.items()}
    tok = M.Tokenizer("l", r"[\s\S]+", {bytes([i]): i for i in range(256)}, marks, end=257, first=[256], vocab=300, chat="llama3", turns=True)
    assert tok.decode(M.prompt_ids(tok, {"prompt": " hi "})) == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
                                                               "<|start_header_id|>assistant<|end_header_id|>\n\n")
    ids, mask = M.encode_chat(tok, [dict(role="user", content="<|eot_id|>"), dict(role="assistant", content="yo"), dict(role="user", content="so"), dict(role="assistant", content="ok")])
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == "yo<|eot_id|>ok<|eot_id|>" and ids.count(265) == 4 and ids.count(256) == 1
    assert tok.n_vocab == 300 and tok.decode([299]) and 299 not in tok.encode("<|no token 299|>", allowed_special="all")


def test_normal_forms_and_added_tokens_are_cut_where_the_tokenizers_package_cuts():
    """A special token is found before its neighbours are composed with it: > and U+0338 together are another letter."""
    tok = M.Tokenizer("q", r"[\s\S]+", {bytes([i]): i for i in range(256)}, {"<|a|>": 256, "<b>": 257, "<b>>": 258}, end=256, nfc=True, plain=["<b>", "<b>>"])
    assert tok.encode("<|a|>\u0338", allowed_special="all") == [256, *"\u0338".encode()]
    assert tok.encode_ordinary("e\u0301") == list("é".encode()) and tok.encode_ordinary(">\u0338") == list("≯".encode())
    assert tok.encode_ordinary("<b>>x<b>") == [258, ord("x"), 257]                               # the longest one
    assert 256 not in tok.encode_ordinary("<|a|>")


def test_a_folder_that_is_no_model_is_told_from_a_public_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError, match=r'config.json: "model_type": "mamba" is not supported; gpt2, llama, qwen2, qwen3 are'):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json holds no JSON object"):
        load(str(tmp_path))
    public = dict(model_type="llama", vocab_size=300, eos_token_id=299, **{x: 8 for x in M.SIZES.values() if x != "vocab_size"})
    (tmp_path / "config.json").write_text(json.dumps(public))
    with pytest.raises(InputError, match="no tokenizer.json, no tiktoken file"):
        load(str(tmp_path))
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    t = M.tokenizer_json(dict(M.BYTE), M.SPLIT["gpt2"], False, [{"content": "<|end|>", "id": 299}])
    (tmp_path / "tokenizer.json").write_text(json.dumps(t | {"pre_tokenizer": level}))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load(str(tmp_path))
    with pytest.raises(InputError, match="pip install safetensors"):
        M.write_public(str(tmp_path / "out"), tiny(), make_tokenizer())
