"""
What things cost, one line a figure: name, value, unit, and what it is a ratio to.

    python tests/bench.py              all figures, some twenty minutes on one CPU thread
    python tests/bench.py logp         one group: logp, generate, shares, step or growth
    python tests/bench.py --peers      beside transformers and liger-kernel, and a group more, trl, where they are installed: an hour, 14 GB
    python tests/bench.py cuda         the group for a GPU

Everything is compared with the plain form of the same work, in one process, interleaved, on random numbers; times are medians, with the
fastest and slowest run beside them. Memory is the peak above what was there before, each form in a process of its own. A peer's model is
read from our export, and what both say is compared before anything is timed.
"""
import copy
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import dpo  # noqa: E402
import grpo  # noqa: E402
import model as M  # noqa: E402
import sft  # noqa: E402
from model import (GPT, GPTConfig, Mean, freeze, frozen_logp, linear_logp, make_optimizer, make_tokenizer, micro_batches,  # noqa: E402
                   pad_batch, write_public)

N = 4096
PEERS = "--peers" in sys.argv
SHAPES = [(256, 50257), (768, 50257), (256, 151936), (768, 151936)]       # C, V


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


def resident(what):
    """Megabytes of this process now (VmRSS), or at most since `restart` (VmHWM). Linux only."""
    with open("/proc/self/status") as status:
        return int(re.search(rf"{what}:\s+(\d+)", status.read())[1]) / 1024


def restart():
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def line(name, value, unit, ratio=""):
    print(f"{name:44} {value:10.3f} {unit:8} {ratio}", flush=True)


# ------------------------------------------------------------------------------------------------------------------------ log-prob


def naive(hidden, weight, targets):
    """The textbook: all logits, log-softmax, gather, and the entropy."""
    full = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(full.exp() * full).sum(-1)
    return full.gather(1, targets[:, None])[:, 0], entropy


def chunked(hidden, weight, targets):
    """torch's own form: the sum of the log-probs alone, without entropy, in chunks as it chooses them."""
    options = torch.nn.LinearCrossEntropyOptions()
    return [-torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)]


FORMS = {"naive": naive, "fused": linear_logp} | ({"torch": chunked} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {})


def logp_inputs(C, V):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, C), torch.randn(V, C).mul_(C ** -0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,))


def logp_mb(form, C, V):
    hidden, weight, targets = logp_inputs(C, V)
    before = resident("VmRSS")
    FORMS[form](hidden, weight, targets)[0].sum().backward()
    return resident("VmHWM") - before


def bench_logp():
    for C, V in SHAPES:
        label = f"N={N} C={C} V={V}"
        words = [sys.executable, __file__, "peak"]
        mb = {f: float(subprocess.run([*words, f, str(C), str(V)], capture_output=True, text=True, check=True).stdout) for f in FORMS}
        for form in FORMS:
            line(f"logp memory, {form}, {label}", mb[form], "MB", f"1/{mb['naive'] / mb[form]:.1f} of naive")
        assert mb["fused"] * 8 <= mb["naive"], "the fused log-prob must need at most an eighth of the naive form's memory"
    for C, V in SHAPES:
        label, inputs = f"N={N} C={C} V={V}", logp_inputs(C, V)
        a, b = linear_logp(*inputs), naive(*inputs)
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-3)
        for form in FORMS:
            torch.testing.assert_close(FORMS[form](*inputs)[0].sum(), a[0].sum(), rtol=1e-4, atol=0)
        del a, b

        def both(form):
            hidden, weight, targets = inputs
            hidden.grad = weight.grad = None
            form(hidden, weight, targets)[0].sum().backward()

        s = interleave({name: lambda form=form: both(form) for name, form in FORMS.items()}, repeats=3 if V < 100_000 else 1)
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


def transformers_generate(model, prompts, group, max_new, dtype=torch.float32, ends=True):
    """The same model in transformers, and a function that samples from it: prompts padded on the left, cached, to the last row's end."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_public(os.path.join(folder, "x"), model, make_tokenizer())
        peer = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "x"), dtype=dtype).to(model.device)
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stop = torch.tensor(model.cfg.stop, device=model.device)

    def sample(**how):
        with torch.no_grad():
            return peer.generate(ids, attention_mask=seen, pad_token_id=0, top_k=0, top_p=1.0, **how)[:, T:]

    ours, mask, _ = model.generate(prompts, 1, 16, temperature=0, stop=[model.cfg.vocab])
    theirs = sample(max_new_tokens=16, do_sample=False, eos_token_id=None)
    alike = (ours[mask > 0] == theirs.flatten()).float().mean()           # in bf16 a tie may fall either way
    assert alike == 1 or dtype != torch.float32 and alike > 0.5, "the two models are not the same"

    def count():
        out = sample(max_new_tokens=max_new, do_sample=True, temperature=1.0, num_return_sequences=group,
                     eos_token_id=stop.tolist() if ends else None)
        ended = torch.isin(out, stop)
        return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.size(1)).sum())

    return count


def workload(layers, width, heads, P):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=1024, context=512, layers=layers, width=width, heads=heads, stop=tuple(range(32))))
    return model, [torch.randint(32, 1024, (int(n),)).tolist() for n in torch.linspace(16, 128, P)]


def bench_generate():
    """Rollouts as RL has them: prompts of 16 to 128 tokens, 8 answers each, up to 256 tokens long, with a mean of 30 to 90."""
    for layers, width, heads, P in ((4, 128, 4, 1), (4, 128, 4, 8), (4, 128, 4, 32), (6, 384, 6, 1), (6, 384, 6, 8), (6, 384, 6, 32),
                                     (12, 768, 12, 8)):
        model, prompts = workload(layers, width, heads, P)
        count = {"ours": lambda: int(model.generate(prompts, 8, 256)[1].sum())}
        if PEERS:
            count["transformers"] = transformers_generate(model, prompts, 8, 256)
        tokens = {name: [] for name in count}                                 # as many as were sampled: each draws its own
        forms = {name: lambda name=name: tokens[name].append(count[name]()) for name in count}
        s = interleave(forms, repeats=1 if P == 32 or width == 768 else 3)
        rate = {name: statistics.mean(tokens[name][1:]) / s[name][0] for name in forms}
        for name in forms:
            ratio = "" if name == "ours" else f"ours is {rate['ours'] / rate[name]:.1f}x "
            spread = f"({rate[name] * s[name][0] / s[name][2]:.0f}-{rate[name] * s[name][0] / s[name][1]:.0f})"
            line(f"generate, {layers} x {width}, {8 * P} answers, {name}", rate[name], "tok/s", ratio + spread)
        if (layers, P) == (4, 8):
            t = time.perf_counter()
            slow = without_cache(model, prompts, 8, 256, None) / (time.perf_counter() - t)                # once: it takes two minutes
            line(f"generate, {layers} x {width}, {8 * P} answers, loop without cache", slow, "tok/s", f"ours is {rate['ours'] / slow:.1f}x")


def bench_shares():
    """Where a rollout's time goes: a stopwatch around what attends, what meets the vocabulary and what draws."""
    parts = {"attention": (M.KVCache, "attend"), "vocabulary": (M, "row_logits"), "sampling": (M, "sample")}
    plain = {name: getattr(*place) for name, place in parts.items()}
    for shape in ((4, 128, 4, 8), (6, 384, 6, 8), (6, 384, 6, 32)):
        model, prompts = workload(*shape)
        model.generate(prompts, 8, 256)
        seconds = dict.fromkeys(parts, 0.0)

        def watched(name):
            def f(*args):
                t = time.perf_counter()
                out = plain[name](*args)
                seconds[name] += time.perf_counter() - t
                return out
            return f

        for name, place in parts.items():
            setattr(*place, watched(name))
        t = time.perf_counter()
        model.generate(prompts, 8, 256)
        total = time.perf_counter() - t
        for name, place in parts.items():
            setattr(*place, plain[name])
            line(f"share of generation, {shape[0]} x {shape[1]}, {8 * shape[3]} answers, {name}", 100 * seconds[name] / total, "%")


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


# ---------------------------------------------------------------------------------------------------------- training step beside TRL

LONG, GROUP, BETA = 50257, 4, 0.04                                        # V, answers to a prompt, GRPO's price of the KL


def as_sampled(ragged):
    """A prompt for each of 16 answers, and the answers, 64 and 64 ids long; ragged: 16 to 128, and 8 to 207 with a mean of 71."""
    ask = torch.linspace(16, 128, 4).int().tolist() if ragged else [64] * 4
    tail = -72 * torch.linspace(1, 1 / 16, 16).log()                      # quantiles of an exponential: the same lengths at any seed
    length = (8 + tail).int()[torch.randperm(16)].tolist() if ragged else [64] * 16
    draw = lambda n: torch.randint(LONG, (n,)).tolist()
    return [p for p in map(draw, ask) for _ in range(GROUP)], list(map(draw, length))


def descend(model, optimizer, losses):
    """One optimiser step from the losses of its pieces -> their sum and the gradient norm."""
    total = 0.0
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
        total += loss.item()
    gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    return total, gnorm


def our_sft(model, tokens, mask):
    """The pieces of sft.py's step."""
    n, stats = int(mask.sum()), Mean()
    for j, t, at in micro_batches(mask, torch.arange(len(tokens)), 0, tokens.device):
        logp, entropy = model.token_logp(tokens[j, :t], at=at)
        loss, found = sft.sft_loss(logp, mask[j, :t], n)
        stats.add(found | {"ent": entropy.sum() / len(at)}, len(at))
        yield loss
    stats.read()


def our_dpo(model, tokens, mask, ref):
    """Those of dpo.py's, with --nll 0; tokens, mask (P, 2, T)."""
    stats = Mean()
    for j, t, at in micro_batches(mask, torch.arange(len(tokens)), 0, tokens.device):
        logp, entropy = model.token_logp(tokens[j, :, :t].flatten(0, 1), None, 1.0, at)
        loss, found = dpo.dpo_loss(*logp.sum(1).view(-1, 2).T, *ref[j].T, 0.1, n=len(tokens))
        stats.add(found | {"ent": entropy.sum() / len(at)}, len(j))
        yield loss
    stats.read()


def grpo_losses(model, tokens, mask, adv, old_logp, ref_logp, i, stats):
    """The pieces of an optimiser step of grpo.py on rows i."""
    for j, t, at in micro_batches(mask, i, 0, tokens.device):
        logp, entropy = model.token_logp(tokens[j, :t], None, 1.0, at)
        loss, found = grpo.grpo_loss(logp, old_logp[j, :t], ref_logp[j, :t], adv[j], mask[j, :t], 0.2, BETA, len(i))
        stats.add(found | {"ent": entropy.sum() / len(at)}, len(at))
        yield loss


def our_grpo(model, reference, optimizer, tokens, mask, reward):
    """grpo.py from the sampled answers on, two updates: old and reference log-probs once for both."""
    ref_logp, old_logp = (frozen_logp(x, tokens, mask, 1.0, 0)[0] for x in (reference, model))
    adv, stats = grpo.group_advantage(reward, GROUP), Mean()
    losses = lambda i: grpo_losses(model, tokens, mask, adv, old_logp, ref_logp, i, stats)
    told = [descend(model, optimizer, losses(i)) for i in torch.randperm(len(tokens)).split(len(tokens) // 2)]
    stats.read()
    return told


def trl_trainer(kind, folder, rows, size, pieces, **options):
    """TRL's trainer of the model in `folder` and the same AdamW: float32, and nothing is computed a second time to save memory."""
    import datasets
    import transformers
    import trl
    options = dict(per_device_train_batch_size=size // pieces, gradient_accumulation_steps=pieces, gradient_checkpointing=False, bf16=False,
                   use_cpu=True, learning_rate=1e-4, weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, max_steps=10 ** 6,
                   report_to="none", disable_tqdm=True, output_dir=os.path.join(folder, "out")) | options
    trainer = getattr(trl, kind + "Trainer")(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder), args=getattr(trl, kind + "Config")(**options),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        **({"reward_funcs": lambda prompts, **_: [0.0] * len(prompts)} if kind == "GRPO" else {}))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = pieces
    return trainer


def trl_step(trainer, batches, n=None):
    """What the loop of Trainer.train does in an optimiser step -> loss and gradient norm."""
    loss = sum(trainer.training_step(trainer.model, batch, n).item() for batch in batches)
    gnorm = float(trainer._clip_grad_norm(trainer.model))
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return loss, gnorm


def trl_forms(folder, each, answers, ref, reward):
    """name -> TRL's step on the same rows, in pieces of four: about as many tokens as ours, and half the time of a step in one piece."""
    import transformers
    rows = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in zip(each, answers)]
    pairs = [{"prompt_ids": p, "chosen_ids": w, "rejected_ids": l, "ref_chosen_logps": x, "ref_rejected_logps": y}
             for p, w, l, (x, y) in zip(each[::2], answers[::2], answers[1::2], ref.tolist())]
    start, text = os.path.join(folder, "policy"), {"prompt": "x", "chosen": "y", "rejected": "z"}
    s = trl_trainer("SFT", start, rows, 16, 4, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    d = trl_trainer("DPO", start, [text], 8, 4, precompute_ref_log_probs=True, max_length=None)
    g = trl_trainer("GRPO", start, [text] * 16, 8, 2, beta=BETA, loss_type="grpo", num_generations=GROUP, steps_per_generation=4,
                    max_completion_length=256)
    g.ref_model.load_state_dict(transformers.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "reference")).state_dict())
    g.rollout_func = lambda prompts, trainer: {"prompt_ids": each, "completion_ids": answers, "logprobs": None}
    g.reward_funcs[0] = lambda prompts, **_: reward.tolist()
    collated = lambda trainer, rows, size: [trainer.data_collator(rows[i:i + size]) for i in range(0, len(rows), size)]
    count = torch.tensor(sum(map(len, answers)))
    return {"SFT": lambda: [trl_step(s, collated(s, rows, 4), count)],
            "DPO": lambda: [trl_step(d, collated(d, pairs, 2))],
            "GRPO": lambda: [trl_step(g, [[text] * 16] * 2) for _ in range(2)]}


def bench_trl():
    """A step of SFT on 16 rows, of DPO on 8 pairs, and two of GRPO on 8 answers each, from the sampled answers on. On a CPU TRL has every
    position meet the vocabulary; on a GPU with Triton those of answers alone, which "answers only" makes it do here as well."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import datasets
    import transformers
    import trl.trainer.utils
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for case in ("equal", "ragged"):
        torch.manual_seed(0)
        each, answers = as_sampled(case == "ragged")
        tokens, mask = pad_batch([p + a for p, a in zip(each, answers)], [[0] * len(p) + [1] * len(a) for p, a in zip(each, answers)])
        pairs = [x.view(-1, 2, x.size(1)) for x in (tokens, mask)]
        reward = torch.randn(len(answers))
        policy = GPT(GPTConfig(vocab=LONG, context=512, layers=4, width=256, heads=4))
        for p in policy.parameters():
            p.data += 0.02 * torch.randn_like(p)                          # or every block would be the identity
        reference = freeze(copy.deepcopy(policy))
        for p in reference.parameters():
            p.data += 0.002 * torch.randn_like(p)
        ref = frozen_logp(reference, tokens, mask, 1.0, 0)[0].sum(1).view(-1, 2)
        models = {name: copy.deepcopy(policy) for name in ("SFT", "DPO", "GRPO")}
        adam = {name: make_optimizer(model, 1e-4) for name, model in models.items()}
        ours = {"SFT": lambda: [descend(models["SFT"], adam["SFT"], our_sft(models["SFT"], tokens, mask))],
                "DPO": lambda: [descend(models["DPO"], adam["DPO"], our_dpo(models["DPO"], *pairs, ref))],
                "GRPO": lambda: our_grpo(models["GRPO"], reference, adam["GRPO"], tokens, mask, reward)}
        with tempfile.TemporaryDirectory() as folder:
            for name, model in (("policy", policy), ("reference", reference)):
                write_public(os.path.join(folder, name), model, make_tokenizer())
            theirs, compact = (trl_forms(folder, each, answers, ref, reward) for _ in range(2))
        for name in ours:
            said = {form: [] for form in ("ours", "TRL", "TRL, answers only")}

            def run(form, f):
                trl.trainer.utils._use_triton = lambda device: form == "TRL, answers only"
                torch.manual_seed(0)                                      # both shuffle a rollout by torch.randperm
                said[form].append(f())

            forms = {form: lambda form=form, f=f[name]: run(form, f) for form, f in zip(said, (ours, theirs, compact))}
            s = interleave(forms, repeats=3)
            for form in forms:      # losses and gradient norms of the first updates; in float64 ragged GRPO's first norm is 5.873367, here
                #                     5.873367 too and in TRL, which pads on the left, 5.8759: for it 5e-3 instead of 1e-3
                rtol = 5e-3 if (name, case) == ("GRPO", "ragged") else 1e-3
                torch.testing.assert_close(torch.tensor(said[form][0]), torch.tensor(said["ours"][0]), rtol=rtol, atol=1e-6)
                ratio = f"ours is {s[form][0] / s['ours'][0]:.1f}x" if form != "ours" else ""
                line(f"{name} step, {case}, {form}", s[form][0], "s", f"{ratio} ({s[form][1]:.2f}-{s[form][2]:.2f})")


# ------------------------------------------------------------------------------------------------------------------- how cost grows


BASE = {"prompts": 8, "length": 64, "group": 8, "vocab": 4096, "width": 128}


def cost(prompts, length, group, vocab, width, layers=4):
    """Seconds and peak megabytes of a rollout, and of its update: prompts and answers of `length` tokens each, none ends early."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=vocab, context=2 * length, layers=layers, width=width, heads=width // 32))
    optimizer, asked = make_optimizer(model, 1e-4), torch.randint(0, vocab, (prompts, length)).tolist()

    def update(tokens, mask, old):
        descend(model, optimizer, grpo_losses(model, tokens, mask, torch.randn(len(tokens)), old, old, torch.arange(len(tokens)), Mean()))

    small = model.generate(asked[:1], 2, 8, stop=[vocab])                        # warm-up
    update(*small)
    before, t0 = resident("VmRSS"), time.perf_counter()
    restart()
    rollout = model.generate(asked, group, length, stop=[vocab])
    rollout_mb, t1 = resident("VmHWM") - before, time.perf_counter()
    restart()
    update(*rollout)
    return t1 - t0, time.perf_counter() - t1, rollout_mb, resident("VmHWM") - before


def products(prompts, length, group, vocab, width, layers=4):
    """What the algorithm says: multiplications of a rollout and of an update, and bytes. A block's matrices have 12 C² numbers; an update
    does each product of a block three times and of the vocabulary four; attention looks back over half of the tokens. A rollout holds its
    cache, an update gradients, two moments and a micro-batch of 1024 tokens, 30 numbers a channel and layer."""
    N, weights, look = prompts * group, 12 * width ** 2 * layers, 2 * width * layers
    prefill = prompts * length * (weights + look * length / 2)
    decode = N * length * (weights + look * 1.5 * length + vocab * width)
    update = 3 * N * 2 * length * (weights + look * length) + 4 * N * length * vocab * width
    cache, micro = 2 * layers * N * 2 * length * width, 1024 * 30 * width * layers
    return prefill + decode, update, 4 * cache, 4 * (weights + vocab * width + micro + 2 ** 20)


def bench_growth():
    """Time and memory with one size doubled, as multiples of the base, each in a process of its own."""
    def measure(sizes):
        words = [sys.executable, __file__, "cost", *map(str, sizes.values())]
        runs = [[float(x) for x in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()] for _ in range(3)]
        return [statistics.median(x) for x in zip(*runs)]

    base, figures = measure(BASE), ("rollout", "update", "memory of the rollout", "memory of the update")
    for figure, value, unit in zip(figures, base, ("s", "s", "MB", "MB")):
        line(figure + ", " + " ".join(f"{k} {v}" for k, v in BASE.items()), value, unit)
    for name in BASE:
        sizes = BASE | {name: 2 * BASE[name]}
        says = [a / b for a, b in zip(products(**sizes), products(**BASE))]
        for figure, value, old, expected in zip(figures, measure(sizes), base, says):
            line(f"{figure}, {name} doubled", value / old, "x", f"expected {expected:.2f}x")


# ----------------------------------------------------------------------------------------------------------------------------- GPU


GPUS = {"GPT-2 124M": dict(vocab=50257, context=1024, layers=12, width=768, heads=12, norm="layer", positions="learned", mlp="gelu",
                           bias=True),
        "Qwen2.5 0.5B": dict(vocab=151936, context=4096, layers=24, width=896, heads=14, kv_heads=2, mlp_width=4864, rope_base=1e6,
                             qkv_bias=True)}


def seconds(f, device, repeats=5):
    """Median of f's time, the device's work included."""
    wait, times = (torch.cuda.synchronize if device.type == "cuda" else lambda: None), []
    for _ in range(repeats + 1):
        wait()
        t = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - t)
    return statistics.median(times[1:])


def bench_cuda(device=torch.device("cuda"), shapes=GPUS, batches=(64, 128, 256, 512), lengths=(128, 256), size=8192):
    """What the GPU can do, and how near to it sampling and training come: bytes that a decoding step must read over the speed of a copy,
    and multiplications of an update over the rate of a large product in bf16. Random weights, equal lengths: no answer ends early."""
    P, new = lengths
    M.setup(0)
    source = torch.empty(size * size, device=device)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    copied = 2 * source.numel() * 4 / seconds(lambda: source.clone(), device)                       # bytes a second, read and written
    product = 2 * size ** 3 / seconds(lambda: matrix @ matrix, device)                              # operations a second
    line("copy bandwidth", copied / 1e9, "GB/s")
    line("matrix product, bf16", product / 1e12, "TFLOP/s")
    for name, shape in shapes.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**shape)).to(device)
        cfg, optimizer = model.cfg, make_optimizer(model, 1e-5)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - (cfg.positions == "learned") * cfg.context * cfg.width
        for N in batches:
            prompts = torch.randint(0, cfg.vocab, (N // 8, P)).tolist()
            forms = {"ours": lambda: model.generate(prompts, 8, new, stop=[cfg.vocab])}
            if PEERS:
                forms["transformers"] = transformers_generate(model, prompts, 8, new, torch.bfloat16, ends=False)
            cache = N * (P + new / 2) * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * 2             # bytes, bf16, on average
            limit = N / ((2 * matrices + cache) / copied)
            rate = {form: N * new / seconds(f, device, 3) for form, f in forms.items()}
            for form in forms:
                note = f"{rate[form] / limit:.2f} of the limit, ours is {rate['ours'] / rate[form]:.1f}x"
                line(f"generate, {name}, {N} answers, {form}", rate[form], "tok/s", note)
        del forms                                                         # and the peer's weights with it
        tokens = torch.randint(0, cfg.vocab, (32, P + new), device=device)
        mask = (torch.arange(P + new) >= P).float().expand(32, -1)
        old, adv, held = torch.zeros(32, P + new, device=device), torch.randn(32, device=device), mask.to(device)
        head, look = cfg.vocab * cfg.width, cfg.layers * cfg.heads * cfg.head_dim * (P + new)
        work = 6 * (tokens.numel() * (matrices - head + look) + int(mask.sum()) * head)         # the head's second product is not counted

        def update():
            optimizer.zero_grad()
            for j, t, at in micro_batches(mask, torch.arange(32), 0, device):
                logp, _ = model.token_logp(tokens[j, :t], None, 1.0, at)
                grpo.grpo_loss(logp, logp.detach(), old[j, :t], adv[j], held[j, :t], 0.2, 0.0, 32)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        for compiled in (False, True):
            M.set_blocks(model, False, compiled)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds(update, device)
            peak = f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB at most" if device.type == "cuda" else ""
            label = f"GRPO update, {name}, {'compiled' if compiled else 'eager'}"
            line(label, work / took / 1e12, "TFLOP/s", f"{work / took / product:.2f} of the product's rate, {peak}")
    bench_logp_cuda(device)


def bench_logp_cuda(device, N=N, shapes=SHAPES):
    """Forward and backward in bf16 over a float32 matrix, beside the naive form and Liger's fused loss, which has no entropy."""
    forms = {"naive": naive, "ours": linear_logp}
    if PEERS:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        forms["Liger"] = lambda h, w, t: [-LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, t)]
    for C, V in shapes:
        hidden, weight, targets = (x.detach().to(device) for x in logp_inputs(C, V))
        hidden = hidden.bfloat16().requires_grad_()
        weight.requires_grad_()
        for form, f in forms.items():
            def both():
                hidden.grad = weight.grad = None
                f(hidden, weight if form == "ours" else weight.bfloat16(), targets)[0].sum().backward()

            both()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            took = seconds(both, device)
            peak = (torch.cuda.max_memory_allocated() - before) / 2 ** 20 if device.type == "cuda" else 0
            line(f"logp on the GPU, {form}, C={C} V={V}", took * 1000, "ms", f"{peak:.0f} MB above the inputs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["peak"]:
        print(logp_mb(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    elif sys.argv[1:2] == ["cost"]:
        print(*cost(*map(int, sys.argv[2:])))
    else:
        print(f"torch {torch.__version__}, one CPU thread")
        groups = ["logp", "generate", "shares", "step", "growth"] + ["trl"] * (PEERS and bool(importlib.util.find_spec("trl")))
        for name in [x for x in sys.argv[1:] if x != "--peers"] or groups:
            globals()[f"bench_{name}"]()
