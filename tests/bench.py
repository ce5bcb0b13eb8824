"""
What things cost, one line a figure: name, value, unit, and what it is a ratio to.

    python tests/bench.py              all figures, about ten minutes on one CPU thread
    python tests/bench.py logp         one group: logp, generate or step
    python tests/bench.py --peers      beside transformers too, where it is installed, and as long again

Everything is compared with the plain form of the same work, in one process, interleaved, on random numbers; times are medians, with the
fastest and slowest run beside them. Memory is the peak above what was there before, each form in a process of its own. A peer's model is read
from our export, and what both say is compared before anything is timed.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import grpo  # noqa: E402
from model import GPT, GPTConfig, linear_logp, make_optimizer, make_tokenizer, write_public  # noqa: E402

N = 4096
PEERS = "--peers" in sys.argv
SHAPES = [(256, 50257), (768, 50257)]                                     # C, V


def interleave(forms, repeats=5):
    """name -> median, fastest and slowest seconds of each function, run in turn."""
    seconds = {name: [] for name in forms}
    for round in range(repeats + 1):
        for name, f in forms.items():
            t = time.perf_counter()
            f()
            if round:                                                     # the first round warms up
                seconds[name].append(time.perf_counter() - t)
    return {name: (statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def line(name, value, unit, ratio=""):
    print(f"{name:44} {value:10.3f} {unit:8} {ratio}", flush=True)


# ------------------------------------------------------------------------------------------------------------------------ log-prob


def naive(hidden, weight, targets):
    """The textbook: all logits, log-softmax, gather. The fused form gives the entropy besides, at its own cost."""
    full = (hidden @ weight.T).float().log_softmax(-1)
    return full.gather(1, targets[:, None])[:, 0], full


def chunked(hidden, weight, targets):
    """torch's own form of the same: the sum of the log-probs alone, in chunks as it chooses them."""
    options = torch.nn.LinearCrossEntropyOptions()
    return [-torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)]


FORMS = {"naive": naive, "fused": linear_logp} | ({"torch": chunked} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {})


def logp_inputs(C, V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, C), torch.randn(V, C).mul_(C ** -0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,))


def peak_mb(form, C, V):
    """In this process: megabytes above the inputs at the worst moment of forward and backward."""
    import resource
    hidden, weight, targets = logp_inputs(C, V)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    FORMS[form](hidden, weight, targets)[0].sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def bench_logp():
    for C, V in SHAPES:                                                   # before this process grows: a child inherits its peak
        label = f"N={N} C={C} V={V}"
        mb = {f: float(subprocess.run([sys.executable, __file__, "peak", f, str(C), str(V)], capture_output=True, text=True, check=True).stdout)
              for f in FORMS}
        for form in FORMS:
            line(f"logp memory, {form}, {label}", mb[form], "MB", f"1/{mb['naive'] / mb[form]:.1f} of naive")
        assert mb["fused"] * 8 <= mb["naive"], "the fused log-prob must need at most an eighth of the naive form's memory"
    for C, V in SHAPES:
        label, inputs = f"N={N} C={C} V={V}", logp_inputs(C, V)
        a, b = linear_logp(*inputs), naive(*inputs)
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(a[1], -(b[1].exp() * b[1]).sum(-1), rtol=0, atol=1e-3)
        for form in FORMS:
            torch.testing.assert_close(FORMS[form](*inputs)[0].sum(), a[0].sum(), rtol=1e-4, atol=0)
        del a, b

        def both(form):
            hidden, weight, targets = inputs
            hidden.grad = weight.grad = None
            form(hidden, weight, targets)[0].sum().backward()

        s = interleave({name: lambda form=form: both(form) for name, form in FORMS.items()}, repeats=3)
        for form, (median, low, high) in s.items():
            line(f"logp forward + backward, {form}, {label}", median, "s", f"{median / s['naive'][0]:.2f}x naive ({low:.2f}-{high:.2f})")


# ---------------------------------------------------------------------------------------------------------------------- generation


def without_cache(model, prompts, group, max_new, generator):
    """The loop of most small repositories: the whole batch through the model for every token; finished rows stay."""
    rows = [list(p) for p in prompts for _ in range(group)]
    done = [False] * len(rows)
    with torch.no_grad():
        for _ in range(max_new):
            T = max(map(len, rows))
            tokens = torch.tensor([r + [0] * (T - len(r)) for r in rows])
            last = torch.tensor([len(r) - 1 for r in rows])
            logits = model(tokens)[torch.arange(len(rows)), last] @ model.unembedding.T
            for i, token in enumerate(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()):
                if not done[i]:
                    rows[i].append(token)
                    done[i] = token in model.cfg.stop
            if all(done):
                break
    return sum(map(len, rows)) - group * sum(map(len, prompts))


def transformers_generate(model, prompts, group, max_new):
    """The same model in transformers, and a function that samples from it: prompts padded on the left, cached, until the last row is done."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_public(os.path.join(folder, "x"), model, make_tokenizer())
        peer = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "x"))
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    stop = torch.tensor(model.cfg.stop)

    def sample(**how):
        with torch.no_grad():
            return peer.generate(ids, attention_mask=seen, pad_token_id=0, top_k=0, top_p=1.0, **how)[:, T:]

    ours, mask, _ = model.generate(prompts, 1, 16, temperature=0, stop=[model.cfg.vocab])
    theirs = sample(max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert ours[mask > 0].tolist() == theirs.flatten().tolist(), "the two models are not the same"

    def count():
        out = sample(max_new_tokens=max_new, do_sample=True, temperature=1.0, num_return_sequences=group, eos_token_id=stop.tolist())
        ended = torch.isin(out, stop)
        return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.size(1)).sum())

    return count


def bench_generate():
    """Rollouts as RL has them: prompts of 16 to 128 tokens, 8 answers each, up to 256 tokens long and most far shorter (a mean of 30 to 90)."""
    for layers, width, heads, P in ((4, 128, 4, 1), (4, 128, 4, 8), (4, 128, 4, 32), (6, 384, 6, 1), (6, 384, 6, 8), (6, 384, 6, 32)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab=1024, context=512, layers=layers, width=width, heads=heads, stop=tuple(range(32))))
        prompts = [torch.randint(32, 1024, (int(n),)).tolist() for n in torch.linspace(16, 128, P)]
        count = {"ours": lambda: int(model.generate(prompts, 8, 256)[1].sum())}
        if (layers, P) == (4, 8):
            count["loop without cache"] = lambda: without_cache(model, prompts, 8, 256, None)
        if PEERS:
            count["transformers"] = transformers_generate(model, prompts, 8, 256)
        tokens = {name: [] for name in count}                                 # as many as were sampled: each draws its own
        forms = {name: lambda name=name: tokens[name].append(count[name]()) for name in count}
        s = interleave(forms, repeats=1 if P == 32 or "loop without cache" in forms else 3)
        rate = {name: statistics.mean(tokens[name][1:]) / s[name][0] for name in forms}
        for name in forms:
            ratio = "" if name == "ours" else f"ours is {rate['ours'] / rate[name]:.1f}x"
            line(f"generate, {layers} x {width}, {8 * P} answers, {name}", rate[name], "tok/s", ratio)


# -------------------------------------------------------------------------------------------------------------------- training step


def bench_step():
    """A GRPO optimiser step on the built-in model: 128 answers of 30 tokens, 14 of them trained."""
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    optimizer = make_optimizer(model, 1e-4)
    tokens, mask = torch.randint(0, 256, (128, 30)), torch.zeros(128, 30)
    mask[:, 8:22] = 1
    adv, old = torch.randn(128), model.token_logp(tokens, mask)[0].detach()

    def fused():
        logp, _ = model.token_logp(tokens, mask)
        update(logp)

    def plain():
        full = (model(tokens) @ model.unembedding.T).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        update(torch.nn.functional.pad(full, (1, 0)))

    def update(logp):
        optimizer.zero_grad()
        grpo.grpo_loss(logp, old, old, adv, mask, 0.2, 0.02)[0].backward()
        optimizer.step()

    s = interleave({"plain": plain, "fused": fused}, repeats=20)
    for form, (median, low, high) in s.items():
        spread = f"({low * 1000:.0f}-{high * 1000:.0f})"
        line(f"GRPO step, built-in model, {form} log-prob", median * 1000, "ms", f"{median / s['plain'][0]:.2f}x plain {spread}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["peak"]:
        print(peak_mb(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    else:
        print(f"torch {torch.__version__}, one CPU thread")
        for name in [x for x in sys.argv[1:] if x != "--peers"] or ["logp", "generate", "step"]:
            {"logp": bench_logp, "generate": bench_generate, "step": bench_step}[name]()
