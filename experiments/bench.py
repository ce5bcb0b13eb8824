"""
What things cost: a line per figure with name, value, unit, and what it is compared with.

    python experiments/bench.py            all groups, some twenty minutes on one CPU thread
    python experiments/bench.py logp       one group: logp, generate, shares, step or growth
    python experiments/bench.py --peers    beside transformers, and a further group, trl, where they
                                           are installed: an hour, 14 GB
    python experiments/bench.py bf16       bf16 against float32 on a CPU that multiplies it
    python experiments/bench.py lora       adapters in place against merged weights
    python experiments/bench.py gpu        all that a GPU can show (bench_gpu.py), seven minutes

Everything is compared with the plain form of the same work, in one process, interleaved, on random
numbers; times are medians, with the fastest and the slowest run beside them. Memory is the peak
above what was there before, each form in a process of its own. A peer's model is read from our
export, and the outputs of both are compared before anything is timed.
"""
import argparse
import copy
import functools
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as M  # noqa: E402
from common import load  # noqa: E402
from common.checkpoint import load_base, read_checkpoint  # noqa: E402
from common.data import running_sums  # noqa: E402
from common.evaluate import MetricMean  # noqa: E402
from common.export import write_folder  # noqa: E402
from common.lora import add_adapters  # noqa: E402
from common.optimizers import make_optimizer  # noqa: E402
from common.tokenizer import encode_prompt, make_tokenizer  # noqa: E402
from common.train import compute_logp, freeze, micro_batches, pad_batch  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from grpo import group_advantage, grpo_loss  # noqa: E402
from model import GPT, GPTConfig, autocast, linear_logp  # noqa: E402
from sft import sft_loss  # noqa: E402

Timing = namedtuple("Timing", "median fastest slowest")


def interleave(forms, repeats=5):
    """{name: Timing} of functions without arguments, run in turn; a first round warms up."""
    seconds = {name: [] for name in forms}
    for i in range(repeats + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def resident_mb(field):
    """Megabytes of this process: now (VmRSS), or at most since reset_peak (VmHWM). Linux only."""
    with open("/proc/self/status") as f:
        return int(re.search(rf"{field}:\s+(\d+)", f.read())[1]) / 1024


def reset_peak():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def in_own_process(*args):
    """The numbers that `bench.py ARGS` prints."""
    command = [sys.executable, __file__, *(str(x) for x in args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split()]


def print_line(name, value, unit, note=""):
    print(f"{name:44} {value:10.3f} {unit:8} {note}", flush=True)


# ---------------------------------------------------------------------------------- logp: log-probs

N = 4096                                                                  # rows
SHAPES = [(256, 50257), (768, 50257), (256, 151936), (768, 151936)]       # C, V


def naive_logp(hidden, weight, targets):
    """The textbook form: all logits, log-softmax, gather, and the entropy."""
    full = (hidden @ weight.T).float().log_softmax(-1)                    # (N, V)
    with torch.no_grad():
        entropy = -(full.exp() * full).sum(-1)
    return full.gather(1, targets[:, None])[:, 0], entropy


def torch_logp(hidden, weight, targets):
    """torch's own: the sum of the log-probs only, without entropy, in chunks of its choice."""
    options = torch.nn.LinearCrossEntropyOptions()
    return [-F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)]


LOGP_FORMS = {"naive": naive_logp, "fused": linear_logp}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LOGP_FORMS["torch"] = torch_logp


def logp_inputs(C, V):
    torch.manual_seed(0)
    hidden = torch.randn(N, C)
    weight = torch.randn(V, C).mul_(C ** -0.5)
    targets = torch.randint(0, V, (N,))
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def forward_backward(form, hidden, weight, targets):
    hidden.grad = weight.grad = None
    form(hidden, weight, targets)[0].sum().backward()


def measure_logp_memory(form, C, V):
    """Peak megabytes of one form; run in a process of its own."""
    inputs = logp_inputs(C, V)
    before = resident_mb("VmRSS")
    forward_backward(LOGP_FORMS[form], *inputs)
    return resident_mb("VmHWM") - before


def compare_logp_outputs(inputs):
    logp, entropy = linear_logp(*inputs)
    naive, naive_entropy = naive_logp(*inputs)
    torch.testing.assert_close(logp, naive, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropy, naive_entropy, rtol=0, atol=1e-3)
    for form in LOGP_FORMS.values():
        torch.testing.assert_close(form(*inputs)[0].sum(), logp.sum(), rtol=1e-4, atol=0)


def bench_logp(peers):
    """Memory, and seconds of forward and backward, of the log-probs of N tokens."""
    for C, V in SHAPES:
        mb = {form: in_own_process("--logp_memory", form, C, V)[0] for form in LOGP_FORMS}
        for form in LOGP_FORMS:
            print_line(f"logp memory, {form}, N={N} C={C} V={V}", mb[form], "MB",
                       f"1/{mb['naive'] / mb[form]:.1f} of naive")
        assert mb["fused"] * 8 <= mb["naive"], "fused needs at most an eighth of naive's memory"
    for C, V in SHAPES:
        inputs = logp_inputs(C, V)
        compare_logp_outputs(inputs)
        forms = {}
        for name, form in LOGP_FORMS.items():
            forms[name] = functools.partial(forward_backward, form, *inputs)
        timings = interleave(forms, repeats=3 if V < 100_000 else 1)
        for name, (median, fastest, slowest) in timings.items():
            ratio = median / timings["naive"].median
            print_line(f"logp forward + backward, {name}, N={N} C={C} V={V}", median, "s",
                       f"{ratio:.2f}x naive ({fastest:.2f}-{slowest:.2f})")


# ----------------------------------------------------------------------------- generate: generation


def random_policy(n_layer, n_embd, n_head, n_prompts):
    """A model whose responses end after 30 to 90 tokens on average, and prompts of 16 to 128."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1024, block_size=512, n_layer=n_layer, n_embd=n_embd,
                          n_head=n_head, stop_token_ids=tuple(range(32))))
    lengths = torch.linspace(16, 128, n_prompts).int().tolist()
    return model, [torch.randint(32, 1024, (n,)).tolist() for n in lengths]


@torch.no_grad()
def generate_without_cache(model, prompts, group_size, max_new_tokens):
    """The loop of most small repositories: the whole batch through the model for every token, and
    finished rows stay in it. Returns the number of response tokens."""
    rows = [list(prompt) for prompt in prompts for _ in range(group_size)]
    done = [False] * len(rows)
    n_tokens = 0
    for _ in range(max_new_tokens):
        T = max(len(row) for row in rows)
        tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = model(tokens)[torch.arange(len(rows)), last] @ model.unembedding.T
        drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
        for i, token in enumerate(drawn):
            if not done[i]:
                rows[i].append(token)
                n_tokens += 1
                done[i] = token in model.cfg.stop_token_ids
        if all(done):
            break
    return n_tokens


def our_generate(model, prompts, group_size, max_new_tokens, stop_token_ids=None):
    """Returns the number of response tokens."""
    _, mask, _ = model.generate(prompts, group_size, max_new_tokens, stop_token_ids=stop_token_ids)
    return int(mask.sum())


class TransformersGenerate:
    """The same model in transformers: left-padded prompts, a cache, until the last row ends."""

    def __init__(self, model, prompts, dtype=torch.float32):
        import transformers
        quiet(transformers)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model")
            write_folder(path, model, make_tokenizer())
            peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.peer = peer.to(model.device)
        self.P = max(len(prompt) for prompt in prompts)
        pads = [self.P - len(prompt) for prompt in prompts]
        ids = [[0] * pad + prompt for pad, prompt in zip(pads, prompts)]
        seen = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts)]
        self.ids = torch.tensor(ids, device=model.device)
        self.seen = torch.tensor(seen, device=model.device)
        self.stop = torch.tensor(model.cfg.stop_token_ids, device=model.device)
        self.compare_outputs(model, prompts, exact=dtype == torch.float32)

    @torch.no_grad()
    def sample(self, **settings):
        out = self.peer.generate(self.ids, attention_mask=self.seen, pad_token_id=0, top_k=0,
                                 top_p=1.0, **settings)
        return out[:, self.P:]

    def compare_outputs(self, model, prompts, exact):
        """Both models continue greedily with the same tokens; in bf16 ties may fall either way."""
        none = [model.cfg.vocab_size]                                     # no id ends a response
        ours, mask, _ = model.generate(prompts, 1, 16, temperature=0, stop_token_ids=none)
        theirs = self.sample(max_new_tokens=16, do_sample=False, eos_token_id=None)
        equal = (ours[mask > 0] == theirs.flatten()).float().mean()
        assert equal == 1 or not exact and equal > 0.5, "the two models are not the same"

    def count(self, group_size, max_new_tokens, ends=True):
        """Sample responses -> their number of tokens, end tokens included."""
        eos = self.stop.tolist() if ends else None
        out = self.sample(max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0,
                          num_return_sequences=group_size, eos_token_id=eos)
        is_end = torch.isin(out, self.stop)
        length = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, out.size(1))
        return int(length.sum()) if ends else out.numel()


def quiet(transformers):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def bench_generate(peers):
    """Tokens per second of rollouts as RL has them: 8 responses per prompt, up to 256 tokens."""
    for n_layer, n_embd, n_head, n_prompts in (
            (4, 128, 4, 1), (4, 128, 4, 8), (4, 128, 4, 32),
            (6, 384, 6, 1), (6, 384, 6, 8), (6, 384, 6, 32),
            (12, 768, 12, 8)):
        model, prompts = random_policy(n_layer, n_embd, n_head, n_prompts)
        title = f"generate, {n_layer} x {n_embd}, {8 * n_prompts} responses"
        counts = {"ours": functools.partial(our_generate, model, prompts, 8, 256)}
        if peers:
            peer = TransformersGenerate(model, prompts)
            counts["transformers"] = functools.partial(peer.count, 8, 256)
        repeats = 1 if n_prompts == 32 or n_embd == 768 else 3
        rates = measure_rates(counts, repeats)
        for name, rate in rates.items():
            note = "" if name == "ours" else f"ours is {rates['ours'].median / rate.median:.1f}x "
            note += f"({rate.slowest:.0f}-{rate.fastest:.0f})"
            print_line(f"{title}, {name}", rate.median, "tok/s", note)
        if (n_layer, n_prompts) == (4, 8):                      # once: it takes two minutes
            start = time.perf_counter()
            n_tokens = generate_without_cache(model, prompts, 8, 256)
            rate = n_tokens / (time.perf_counter() - start)
            print_line(f"{title}, loop without cache", rate, "tok/s",
                       f"ours is {rates['ours'].median / rate:.1f}x")


def measure_rates(counts, repeats):
    """{name: Timing in tokens per second} of functions that return how many tokens they sampled.
    Every run samples its own number, so the mean number is divided by each time."""
    n_tokens = {name: [] for name in counts}

    def run(name):
        n_tokens[name].append(counts[name]())

    timings = interleave({name: functools.partial(run, name) for name in counts}, repeats)
    rates = {}
    for name, seconds in timings.items():
        mean = statistics.mean(n_tokens[name][1:])                        # without the warm-up
        rates[name] = Timing(*(mean / s for s in seconds))
    return rates


# ---------------------------------------------------------------------- shares: parts of generation


def timed(function, seconds, name):
    """`function`, which adds its time to seconds[name]."""
    def wrapper(*args):
        start = time.perf_counter()
        out = function(*args)
        seconds[name] += time.perf_counter() - start
        return out
    return wrapper


def bench_shares(peers):
    """Share of a rollout's time in attention, in products with the vocabulary and in sampling."""
    parts = {"attention": (M.KVCache, "attend"), "vocabulary": (M, "compute_logits"),
             "sampling": (M, "sample")}
    for shape in ((4, 128, 4, 8), (6, 384, 6, 8), (6, 384, 6, 32)):
        model, prompts = random_policy(*shape)
        model.generate(prompts, 8, 256)                                   # warm-up
        seconds = dict.fromkeys(parts, 0.0)
        originals = {}
        for name, (owner, attribute) in parts.items():
            originals[name] = getattr(owner, attribute)
            setattr(owner, attribute, timed(originals[name], seconds, name))
        start = time.perf_counter()
        model.generate(prompts, 8, 256)
        total = time.perf_counter() - start
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, originals[name])
            title = f"{shape[0]} x {shape[1]}, {8 * shape[3]} responses, {name}"
            print_line(f"share of generation, {title}", 100 * seconds[name] / total, "%")


# ------------------------------------------------------------------------------ step: training step


def plain_token_logp(model, tokens):
    full = (model(tokens) @ model.unembedding.T).log_softmax(-1)          # (B, T, V)
    return F.pad(full[:, :-1].gather(2, tokens[:, 1:, None])[..., 0], (1, 0))


def bench_step(peers):
    """A GRPO optimiser step on the built-in model: 128 rows of 30 tokens, 14 of them trained."""
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    optimizer = make_optimizer(model, 1e-4)
    tokens = torch.randint(0, 256, (128, 30))
    mask = torch.zeros(128, 30)
    mask[:, 8:22] = 1
    adv = torch.randn(128)
    old_logp = model.token_logp(tokens, mask)[0].detach()

    def update(logp):
        optimizer.zero_grad()
        grpo_loss(logp, old_logp, old_logp, adv, mask, 0.2, 0.02)[0].backward()
        optimizer.step()

    def fused():
        update(model.token_logp(tokens, mask)[0])

    def plain():
        update(plain_token_logp(model, tokens))

    timings = interleave({"plain": plain, "fused": fused}, repeats=20)
    for name, (median, fastest, slowest) in timings.items():
        ratio = median / timings["plain"].median
        print_line(f"GRPO step, built-in model, {name} log-prob", median * 1000, "ms",
                   f"{ratio:.2f}x plain ({fastest * 1000:.0f}-{slowest * 1000:.0f})")


# ------------------------------------------------------------- steps of our scripts, without I/O


def descend(model, optimizer, losses):
    """One optimiser step from the losses of its micro-batches -> their sum, the gradient norm."""
    total = 0.0
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
        total += loss.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    return total, grad_norm


def sft_losses(model, tokens, mask):
    """The losses of a step of sft.py, one per micro-batch."""
    n, stats = int(mask.sum()), MetricMean()
    for rows, width, index in micro_batches(mask, torch.arange(len(tokens)), 0, tokens.device):
        logp, entropy = model.token_logp(tokens[rows, :width], index=index)
        loss, loss_stats = sft_loss(logp, mask[rows, :width], n)
        stats.add(loss_stats | {"entropy": entropy.sum() / len(index)}, len(index))
        yield loss
    stats.read()


def dpo_losses(model, tokens, mask, ref):
    """Those of dpo.py, with --sft_coef 0; tokens, mask (P, 2, T), ref (P, 2)."""
    stats = MetricMean()
    for rows, width, index in micro_batches(mask, torch.arange(len(tokens)), 0, tokens.device):
        logp, entropy = model.token_logp(tokens[rows, :, :width].flatten(0, 1), index=index)
        logp_w, logp_l = logp.sum(1).view(-1, 2).T
        ref_w, ref_l = ref[rows].T
        loss, loss_stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, 0.1, n=len(tokens))
        stats.add(loss_stats | {"entropy": entropy.sum() / len(index)}, len(rows))
        yield loss
    stats.read()


def grpo_losses(model, tokens, mask, adv, old_logp, ref_logp, minibatch, kl_beta):
    """Those of grpo.py, on the rows in minibatch."""
    stats = MetricMean()
    for rows, width, index in micro_batches(mask, minibatch, 0, tokens.device):
        logp, entropy = model.token_logp(tokens[rows, :width], index=index)
        loss, loss_stats = grpo_loss(logp, old_logp[rows, :width], ref_logp[rows, :width],
                                     adv[rows], mask[rows, :width], 0.2, kl_beta, len(minibatch))
        stats.add(loss_stats | {"entropy": entropy.sum() / len(index)}, len(index))
        yield loss
    stats.read()


# ------------------------------------------------------------------------ trl: a step beside TRL's

LONG_VOCAB = 50257
GROUP_SIZE = 4
KL_BETA = 0.04


def random_ids(n):
    return torch.randint(LONG_VOCAB, (n,)).tolist()


def random_rollout(ragged):
    """A prompt for each of 16 responses, and the responses: 64 and 64 ids long, or ragged: 16 to
    128, and 8 to 207 with a mean of 71."""
    prompt_lengths, lengths = [64] * 4, [64] * 16
    if ragged:
        prompt_lengths = torch.linspace(16, 128, 4).int().tolist()
        # quantiles of an exponential distribution: the same lengths at any seed
        tail = -72 * torch.linspace(1, 1 / 16, 16).log()
        lengths = (8 + tail).int()[torch.randperm(16)].tolist()
    prompts = []
    for n in prompt_lengths:
        prompts += [random_ids(n)] * GROUP_SIZE
    return prompts, [random_ids(n) for n in lengths]


class OurSteps:
    """Steps of sft.py, dpo.py and grpo.py on the same rollout, each on a copy of the policy. A step
    returns a list of loss and gradient norm, one per optimiser step."""

    def __init__(self, policy, reference, prompts, responses, reward):
        sequences, masks = [], []
        for prompt, response in zip(prompts, responses):
            sequences.append(prompt + response)
            masks.append([0] * len(prompt) + [1] * len(response))
        self.tokens, self.mask = pad_batch(sequences, masks)              # (16, T)
        self.reference, self.reward = reference, reward
        logp = compute_logp(reference, self.tokens, self.mask)            # (16, T)
        self.ref_logp = logp.sum(1).view(-1, 2)                           # (8, 2)
        self.models, self.optimizers = {}, {}
        for name in ("SFT", "DPO", "GRPO"):
            self.models[name] = copy.deepcopy(policy)
            self.optimizers[name] = make_optimizer(self.models[name], 1e-4)

    def sft(self):
        model = self.models["SFT"]
        losses = sft_losses(model, self.tokens, self.mask)
        return [descend(model, self.optimizers["SFT"], losses)]

    def dpo(self):
        model, T = self.models["DPO"], self.tokens.size(1)
        tokens, mask = self.tokens.view(-1, 2, T), self.mask.view(-1, 2, T)
        losses = dpo_losses(model, tokens, mask, self.ref_logp)
        return [descend(model, self.optimizers["DPO"], losses)]

    def grpo(self):
        """From the sampled responses on: old and reference log-probs once for both updates."""
        model, tokens, mask = self.models["GRPO"], self.tokens, self.mask
        ref_logp = compute_logp(self.reference, tokens, mask)
        old_logp = compute_logp(model, tokens, mask)
        adv = group_advantage(self.reward, GROUP_SIZE)
        steps = []
        for minibatch in torch.randperm(len(tokens)).split(len(tokens) // 2):
            losses = grpo_losses(model, tokens, mask, adv, old_logp, ref_logp, minibatch, KL_BETA)
            steps.append(descend(model, self.optimizers["GRPO"], losses))
        return steps

    def forms(self):
        return {"SFT": self.sft, "DPO": self.dpo, "GRPO": self.grpo}


class TRLSteps:
    """TRL's steps on the same rollout, in pieces of four rows: about as many tokens as ours, and
    half the time of a step in one piece."""

    ROW = {"prompt": "x", "chosen": "y", "rejected": "z"}   # stands for rows that are given as ids

    def __init__(self, folder, prompts, responses, ref_logp, reward):
        self.prompts, self.responses, self.reward = prompts, responses, reward
        self.policy_folder = os.path.join(folder, "policy")
        self.rows = []
        for prompt, response in zip(prompts, responses):
            labels = [-100] * len(prompt) + response
            self.rows.append({"input_ids": prompt + response, "labels": labels})
        self.pairs = []
        for i, (ref_w, ref_l) in enumerate(ref_logp.tolist()):
            self.pairs.append({"prompt_ids": prompts[2 * i], "chosen_ids": responses[2 * i],
                               "rejected_ids": responses[2 * i + 1], "ref_chosen_logps": ref_w,
                               "ref_rejected_logps": ref_l})
        self.sft_trainer = self.make_trainer(
            "SFT", self.rows, 16, 4, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        self.dpo_trainer = self.make_trainer(
            "DPO", [self.ROW], 8, 4, precompute_ref_log_probs=True, max_length=None)
        self.grpo_trainer = self.make_grpo_trainer(os.path.join(folder, "reference"))

    def make_trainer(self, kind, rows, size, pieces, more=None, **options):
        """TRL's trainer with the same AdamW: float32, and nothing is recomputed to save memory."""
        import datasets
        import transformers
        import trl
        model = transformers.AutoModelForCausalLM.from_pretrained(self.policy_folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.policy_folder)
        config = getattr(trl, kind + "Config")(
            per_device_train_batch_size=size // pieces, gradient_accumulation_steps=pieces,
            gradient_checkpointing=False, bf16=False, use_cpu=True, learning_rate=1e-4,
            weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, max_steps=10 ** 6,
            report_to="none", disable_tqdm=True,
            output_dir=os.path.join(self.policy_folder, "out"), **options)
        trainer = getattr(trl, kind + "Trainer")(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, **more or {})
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = pieces
        return trainer

    def make_grpo_trainer(self, reference_folder):
        """Its rollout and its rewards are ours."""
        import transformers

        def rollout(prompts, trainer):
            return {"prompt_ids": self.prompts, "completion_ids": self.responses, "logprobs": None}

        def reward(prompts, **_):
            return self.reward.tolist()

        trainer = self.make_trainer(
            "GRPO", [self.ROW] * 16, 8, 2, more={"reward_funcs": reward}, beta=KL_BETA,
            loss_type="grpo", num_generations=GROUP_SIZE, steps_per_generation=4,
            max_completion_length=256)
        reference = transformers.AutoModelForCausalLM.from_pretrained(reference_folder)
        trainer.ref_model.load_state_dict(reference.state_dict())
        trainer.rollout_func = rollout
        return trainer

    def step(self, trainer, batches, n=None):
        """What the loop of Trainer.train does in an optimiser step -> loss and gradient norm."""
        loss = 0.0
        for batch in batches:
            loss += trainer.training_step(trainer.model, batch, n).item()
        grad_norm = float(trainer._clip_grad_norm(trainer.model))
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return loss, grad_norm

    def collate(self, trainer, rows, size):
        return [trainer.data_collator(rows[i:i + size]) for i in range(0, len(rows), size)]

    def sft(self):
        n = torch.tensor(sum(len(response) for response in self.responses))
        return [self.step(self.sft_trainer, self.collate(self.sft_trainer, self.rows, 4), n)]

    def dpo(self):
        return [self.step(self.dpo_trainer, self.collate(self.dpo_trainer, self.pairs, 2))]

    def grpo(self):
        return [self.step(self.grpo_trainer, [[self.ROW] * 16] * 2) for _ in range(2)]

    def forms(self):
        return {"SFT": self.sft, "DPO": self.dpo, "GRPO": self.grpo}


def random_pair_of_models():
    """A policy, and a reference that differs from it a little."""
    policy = GPT(GPTConfig(vocab_size=LONG_VOCAB, block_size=512, n_layer=4, n_embd=256, n_head=4))
    for p in policy.parameters():
        p.data += 0.02 * torch.randn_like(p)                  # or every block is the identity
    reference = freeze(copy.deepcopy(policy))
    for p in reference.parameters():
        p.data += 0.002 * torch.randn_like(p)
    return policy, reference


def bench_trl(peers):
    """A step of SFT on 16 rows, of DPO on 8 pairs, and two of GRPO on 8 responses each, from the
    sampled responses on. On a CPU TRL multiplies every position with the vocabulary; on a GPU with
    Triton those of responses only, which "responses only" makes it do here as well."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import datasets
    import transformers
    quiet(transformers)
    datasets.disable_progress_bars()
    for case in ("equal", "ragged"):
        torch.manual_seed(0)
        prompts, responses = random_rollout(case == "ragged")
        reward = torch.randn(len(responses))
        policy, reference = random_pair_of_models()
        ours = OurSteps(policy, reference, prompts, responses, reward)
        with tempfile.TemporaryDirectory() as folder:
            write_folder(os.path.join(folder, "policy"), policy, make_tokenizer())
            write_folder(os.path.join(folder, "reference"), reference, make_tokenizer())
            theirs = TRLSteps(folder, prompts, responses, ours.ref_logp, reward)
            compact = TRLSteps(folder, prompts, responses, ours.ref_logp, reward)
        for name in ("SFT", "DPO", "GRPO"):
            forms = {"ours": ours.forms()[name], "TRL": theirs.forms()[name],
                     "TRL, responses only": compact.forms()[name]}
            compare_steps(name, case, forms)


def compare_steps(name, case, forms):
    """Time forms of the same step; losses and gradient norms of their first updates are equal."""
    import trl.trainer.utils
    outputs = {form: [] for form in forms}

    def run(form):
        trl.trainer.utils._use_triton = lambda device: form == "TRL, responses only"
        torch.manual_seed(0)                                  # both shuffle by torch.randperm
        outputs[form].append(forms[form]())

    timings = interleave({form: functools.partial(run, form) for form in forms}, repeats=3)
    # In float64 the first norm of ragged GRPO is 5.873367; it is 5.873367 here too, and 5.8759 in
    # TRL, which pads on the left.
    rtol = 5e-3 if (name, case) == ("GRPO", "ragged") else 1e-3
    expected = torch.tensor(outputs["ours"][0])
    for form, (median, fastest, slowest) in timings.items():
        torch.testing.assert_close(torch.tensor(outputs[form][0]), expected, rtol=rtol, atol=1e-6)
        note = "" if form == "ours" else f"ours is {median / timings['ours'].median:.1f}x "
        note += f"({fastest:.2f}-{slowest:.2f})"
        print_line(f"{name} step, {case}, {form}", median, "s", note)


# ------------------------------------------------------------------------- growth: how costs grow

BASE = {"prompts": 8, "length": 64, "group_size": 8, "vocab_size": 4096, "n_embd": 128}
LAYERS = 4


def measure_cost(prompts, length, group_size, vocab_size, n_embd):
    """Seconds of a rollout and of its update, and peak megabytes of each: prompts and responses of
    `length` tokens, none ends early. Run in a process of its own."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=2 * length, n_layer=LAYERS,
                          n_embd=n_embd, n_head=n_embd // 32))
    optimizer = make_optimizer(model, 1e-4)
    ids = torch.randint(0, vocab_size, (prompts, length)).tolist()
    none = [vocab_size]                                                   # no id ends a response

    def update(tokens, mask, logp):
        adv = torch.randn(len(tokens))
        every_row = torch.arange(len(tokens))
        losses = grpo_losses(model, tokens, mask, adv, logp, logp, every_row, KL_BETA)
        descend(model, optimizer, losses)

    update(*model.generate(ids[:1], 2, 8, stop_token_ids=none))           # warm-up
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    reset_peak()
    rollout = model.generate(ids, group_size, length, stop_token_ids=none)
    rollout_mb = resident_mb("VmHWM") - before
    middle = time.perf_counter()
    reset_peak()
    update(*rollout)
    end = time.perf_counter()
    return middle - start, end - middle, rollout_mb, resident_mb("VmHWM") - before


def expected_cost(prompts, length, group_size, vocab_size, n_embd):
    """What the algorithm says: multiplications of a rollout and of an update, and bytes of each.

    A block's matrices have 12 C² numbers; an update does each product of a block three times and
    of the vocabulary four; attention looks back over half of the tokens. A rollout holds its
    cache; an update gradients, two moments and a micro-batch of 1024 tokens, 30 numbers per channel
    and layer.
    """
    N, C = prompts * group_size, n_embd
    weights = 12 * C ** 2 * LAYERS
    look = 2 * C * LAYERS                                       # per token that is looked at
    prefill = prompts * length * (weights + look * length / 2)
    decode = N * length * (weights + look * 1.5 * length + vocab_size * C)
    update = 3 * N * 2 * length * (weights + look * length) + 4 * N * length * vocab_size * C
    cache = 2 * LAYERS * N * 2 * length * C
    micro_batch = 1024 * 30 * C * LAYERS
    held = weights + vocab_size * C + micro_batch + 2 ** 20
    return prefill + decode, update, 4 * cache, 4 * held


def median_cost(sizes):
    """The medians of three processes."""
    runs = [in_own_process("--cost", *sizes.values()) for _ in range(3)]
    return [statistics.median(values) for values in zip(*runs)]


def bench_growth(peers):
    """Time and memory with one size doubled, as multiples of the base."""
    figures = ("rollout", "update", "memory of the rollout", "memory of the update")
    base, expected_base = median_cost(BASE), expected_cost(**BASE)
    sizes = " ".join(f"{name} {n}" for name, n in BASE.items())
    for figure, value, unit in zip(figures, base, ("s", "s", "MB", "MB")):
        print_line(f"{figure}, {sizes}", value, unit)
    for name in BASE:
        doubled = BASE | {name: 2 * BASE[name]}
        cost = median_cost(doubled)
        expected = expected_cost(**doubled)
        for i, figure in enumerate(figures):
            print_line(f"{figure}, {name} doubled", cost[i] / base[i], "x",
                       f"expected {expected[i] / expected_base[i]:.2f}x")


# ------------------------------------------------------------------------- bf16: products on a CPU

BF16_SHAPES = {                   # narrow models, and SmolLM2-135M
    "96 channels": dict(vocab_size=259, n_layer=3, n_embd=96, n_head=3),
    "192 channels": dict(vocab_size=4096, n_layer=6, n_embd=192, n_head=6),
    "256 channels": dict(vocab_size=4096, n_layer=6, n_embd=256, n_head=4),
    "384 channels": dict(vocab_size=4096, n_layer=6, n_embd=384, n_head=6),
    "SmolLM2-135M": dict(vocab_size=49152, n_layer=30, n_embd=576, n_head=9, n_kv_head=3,
                         intermediate_size=1536),
}


def bench_bf16(peers):
    """A rollout of 32 responses of 64 tokens to 8 prompts of 64, its log-probs, and its update, in
    float32 and in bf16; and what share of the update the vocabulary has, its products and the rest
    of LinearLogp."""
    wide, narrow = {"cpu": 1}, {}
    for name, shape in BF16_SHAPES.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=256, **shape))
        prompts = [torch.randint(3, 250, (64,)).tolist() for _ in range(8)]
        tokens = torch.randint(3, 250, (32, 128))
        mask = torch.zeros(32, 128)
        mask[:, 64:] = 1
        every_row = torch.arange(32)
        uniform = torch.rand(32, 64, dtype=torch.float64)

        def rollout():
            model.generate(prompts, 4, 64, stop_token_ids=[-1], uniform=uniform)

        def log_probs():
            compute_logp(model, tokens, mask)

        def update():
            model.zero_grad()
            for rows, width, index in micro_batches(mask, every_row, 0, model.device):
                with autocast(model):
                    logp, _ = model.token_logp(tokens[rows, :width], index=index)
                (-logp.sum() / mask.sum()).backward()

        def in_precision(work, widths):
            M.BF16_MIN_WIDTH = widths
            work()

        for work in (rollout, log_probs, update):
            forms = {"float32": functools.partial(in_precision, work, narrow),
                     "bf16": functools.partial(in_precision, work, wide)}
            times = interleave(forms, repeats=3)
            ratio = times["float32"].median / times["bf16"].median
            print_line(f"{name}, {work.__name__}, bf16", times["bf16"].median, "s",
                       f"float32 {times['float32'].median:.3f} s, {ratio:.2f}x")
        seconds = {"all": 0.0, "vocabulary": 0.0}
        plain = M.LinearLogp.forward, M.LinearLogp.backward
        M.LinearLogp.forward = staticmethod(timed(plain[0], seconds, "vocabulary"))
        M.LinearLogp.backward = staticmethod(timed(plain[1], seconds, "vocabulary"))
        timed(update, seconds, "all")()
        M.LinearLogp.forward, M.LinearLogp.backward = map(staticmethod, plain)
        print_line(f"{name}, the vocabulary's share of an update",
                   seconds["vocabulary"] / seconds["all"], "")


# ------------------------------------------------------------- lora: adapters in place or merged


def bench_lora(peers):
    """64 responses of up to 24 tokens, sampled with adapters in place and with merged weights, at
    three widths. And, for the adapters in out/lora, how log-probs differ: of merged weights in
    float32, and, in bf16, of adapters in place and of weights that are merged into bf16."""
    for n_layer, n_embd in ((3, 96), (6, 384), (4, 768)):
        torch.manual_seed(0)
        plain = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 32))
        in_place = add_adapters(copy.deepcopy(plain), 16, 32.0)
        prompts = [[5] * 12] * 8
        forms = {"plain": functools.partial(our_generate, plain, prompts, 8, 24, [0]),
                 "in place": functools.partial(our_generate, in_place, prompts, 8, 24, [0])}
        times = interleave(forms)
        ratio = times["in place"].median / times["plain"].median
        print_line(f"{n_layer} layers of {n_embd}, adapters in place", times["in place"].median,
                   "s", f"merged {times['plain'].median:.3f} s, {ratio:.2f}x")

    if not os.path.exists("out/lora/ckpt.pt"):
        print("no out/lora: python grpo.py --lora_rank 16 --lr 1e-3 --out out/lora")
        return
    merged, tokenizer = load("out/lora")
    data = read_checkpoint("out/lora")
    in_place = add_adapters(load_base("out/lora", data["lora"], None), **data["lora"])
    in_place.load_state_dict(data["model"], strict=False)
    prompts = [encode_prompt(tokenizer, row) for row in running_sums(500, "val")]
    torch.manual_seed(0)
    tokens, mask, _ = in_place.generate(prompts, 4, 24)
    exact = compute_logp(in_place, tokens, mask)
    differences = {"float32, merged": compute_logp(merged, tokens, mask) - exact}
    usual = M.BF16_MIN_WIDTH
    M.BF16_MIN_WIDTH = {"cpu": 1}
    for name, model in (("in place", in_place), ("merged", merged)):
        differences[f"bf16, {name}"] = compute_logp(freeze(model), tokens, mask) - exact
    M.BF16_MIN_WIDTH = usual
    differences["bf16, both"] = differences["bf16, merged"] - differences["bf16, in place"]
    for name, difference in differences.items():
        mean = (difference.abs().sum() / mask.sum()).item()
        print(f"{name:30} mean |difference of log-probs| {mean:.1e}", flush=True)


def bench_on_gpu(peers):
    import bench_gpu
    bench_gpu.main()


GROUPS = {"logp": bench_logp, "generate": bench_generate, "shares": bench_shares,
          "step": bench_step, "growth": bench_growth, "trl": bench_trl, "bf16": bench_bf16,
          "lora": bench_lora, "gpu": bench_on_gpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; default: all but "
                        "bf16, lora and gpu, and trl only with --peers")
    parser.add_argument("--peers", action="store_true", help="also time other libraries")
    parser.add_argument("--logp_memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cost", nargs=len(BASE), type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not GROUPS.keys() >= set(args.groups):
        parser.error(f"the groups are {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    if args.logp_memory:
        form, C, V = args.logp_memory
        return print(measure_logp_memory(form, int(C), int(V)))
    if args.cost:
        return print(*measure_cost(*args.cost))
    print(f"torch {torch.__version__}, one CPU thread")
    groups = args.groups
    if not groups:
        groups = ["logp", "generate", "shares", "step", "growth"]
        if args.peers and importlib.util.find_spec("trl"):
            groups.append("trl")
    for name in groups:
        GROUPS[name](args.peers)


if __name__ == "__main__":
    main()
