"""
What things cost, one line a figure: name, value, unit, and what it is a ratio to.

    python tests/bench.py              all figures, about five minutes on one CPU thread
    python tests/bench.py logp         one group: logp, generate or step

Everything is compared with the plain form of the same work, in one process, interleaved, on random numbers; times are medians, with the
fastest and slowest run beside them. Memory is the peak above what was there before, each form in a process of its own.
"""
import os
import statistics
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import grpo  # noqa: E402
from model import GPT, GPTConfig, linear_logp, make_optimizer  # noqa: E402

N = 4096
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


def logp_inputs(C, V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, C), torch.randn(V, C).mul_(C ** -0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,))


def peak_mb(form, C, V):
    """In this process: megabytes above the inputs at the worst moment of forward and backward."""
    import resource
    hidden, weight, targets = logp_inputs(C, V)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    {"fused": linear_logp, "naive": naive}[form](hidden, weight, targets)[0].sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def bench_logp():
    for C, V in SHAPES:                                                   # before this process grows: a child inherits its peak
        label = f"N={N} C={C} V={V}"
        mb = {f: float(subprocess.run([sys.executable, __file__, "peak", f, str(C), str(V)], capture_output=True, text=True, check=True).stdout)
              for f in ("naive", "fused")}
        line(f"logp memory, naive, {label}", mb["naive"], "MB")
        line(f"logp memory, fused, {label}", mb["fused"], "MB", f"1/{mb['naive'] / mb['fused']:.1f} of naive")
        assert mb["fused"] * 8 <= mb["naive"], "the fused log-prob must need at most an eighth of the naive form's memory"
    for C, V in SHAPES:
        label, inputs = f"N={N} C={C} V={V}", logp_inputs(C, V)
        a, b = linear_logp(*inputs), naive(*inputs)
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(a[1], -(b[1].exp() * b[1]).sum(-1), rtol=0, atol=1e-3)
        del a, b

        def both(form):
            hidden, weight, targets = inputs
            hidden.grad = weight.grad = None
            form(hidden, weight, targets)[0].sum().backward()

        s = interleave({"naive": lambda: both(naive), "fused": lambda: both(linear_logp)}, repeats=2)
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


def bench_generate():
    """Prompts of 16 to 128 tokens, 8 answers each, answers that end at very different steps: an end token has probability 1/50."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=256, context=256, layers=4, width=128, heads=4, stop=tuple(range(5))))
    prompts = [torch.randint(5, 256, (int(n),)).tolist() for n in torch.linspace(16, 128, 8)]
    tokens = {}

    def ours():
        tokens["ours"] = int(model.generate(prompts, 8, 64, generator=torch.Generator().manual_seed(1))[1].sum())

    def loop():
        tokens["loop"] = without_cache(model, prompts, 8, 64, torch.Generator().manual_seed(1))

    s = interleave({"ours": ours, "loop": loop}, repeats=1)
    rate = {name: tokens[name] / s[name][0] for name in s}
    line("generate, 64 answers, loop without cache", rate["loop"], "tok/s")
    line("generate, 64 answers, ours", rate["ours"], "tok/s", f"{rate['ours'] / rate['loop']:.1f}x the loop")


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
        for name in sys.argv[1:] or ["logp", "generate", "step"]:
            {"logp": bench_logp, "generate": bench_generate, "step": bench_step}[name]()
