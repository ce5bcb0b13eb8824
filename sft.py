"""
SFT: supervised fine-tuning, the first step of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

Imitate demonstrations: raise the likelihood of every response token given the prompt and the response so far.

    minimise  L(θ) = - Σ_i Σ_t m_it log π_θ(y_it | x_i, y_i,<t)  /  Σ_i Σ_t m_it                                     (1)

    paper   θ       x, y           log π_θ   m, 1 on the response and its end token   Σ m, over the optimiser batch
    here    model   tokens (B, T)  logp      mask                                     n

The prompt is context and not a target (m = 0): the model is to answer, not to ask. The end token is a target like any
other, or the model never learns to stop; an example that does not fit the context is dropped, since cutting it would
teach a false stop. The denominator is counted before the batch is split, so that micro-batches of any size give the
same gradient.

The demonstrators of the built-in task work with care on short sums and get lazier on long ones:

    5+8+7=    careful  13,20#20     running totals, then # and the answer
              hasty    #20          no working; the true sum rounded to the nearest 5, right one time in five
              slip     03,10#10     careful, but at a carry the ten was forgotten (p = .08), and the error runs on

About 56% of them are right, and imitation can hardly do better: that is what grpo.py is for.

Run:     python sft.py                                    about a minute on two CPU cores -> out/sft
Yours:   python sft.py --data rows.jsonl --context 1024   {"prompt", "response"} or {"messages": [{"role", "content"}]}
"""
import random
import time
from dataclasses import dataclass

import torch

from model import (GPT, Folder, GPTConfig, Guard, InputError, Mean, answer_number, as_turns, batches, check,
                   encode_answer, encode_chat, evaluate, frozen_logp, load, main, make_optimizer, make_tokenizer,
                   memory_plan, micro_batches, pad_batch, prompt_ids, read_rows, set_blocks, set_lr, setup, split,
                   stop_ids, sums, table, usable)


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to learn from; "" is the built-in task
    test: str = ""            # JSON lines to report on; "": the twentieth of --data that a hash of the prompt holds out
    init: str = ""                # checkpoint or public model to start from; "": from scratch, of the shape below
    out: str = "out/sft"          # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": a lone prompt is a user's turn, "plain": bare text, "auto": as --init has it
    system: str = ""              # system line of a chat that has none; "" keeps that of --init
    seed: int = 0                 # of the weights, the order of the data and the sampling
    resume: bool = False          # go on with the run in --out
    # model, from scratch only
    tokenizer: str = "bytes"      # "bytes" (built in), or a vocabulary that tiktoken downloads, such as gpt2
    context: int = 64            # longest sequence in tokens, prompt and response together; longer examples are dropped
    layers: int = 3               # transformer blocks
    width: int = 96               # C, the residual stream
    heads: int = 3                # attention heads of size C / heads
    # optimisation
    steps: int = 1200             # optimiser steps
    batch: int = 64               # examples in an optimiser step
    micro_tokens: int = 0         # tokens in one forward: bounds the memory, changes no gradient; 0: by device
    recompute: bool = False       # keep each block's input alone and run it again in backward: more time, less memory
    compile: bool = False         # torch.compile the blocks, where that works: a slow start, faster updates
    lr: float = 3e-3              # peak rate of AdamW; for a real pretrained model 1e-5
    muon_lr: float = 3e-3     # peak rate of Muon on the blocks' matrices, used from scratch only; 0: AdamW has them too
    warmup: int = 30              # steps of linear warm-up, before half a cosine down to 0
    weight_decay: float = 0.1     # on matrices, not on norms, biases and embeddings
    grad_clip: float = 1.0        # largest gradient norm
    # watching
    max_new: int = 24             # longest answer in the evaluation, tokens
    eval_every: int = 300         # steps between evaluations on validation prompts, and between checkpoints
    guard: bool = True            # stop a run that has gone wrong, and say why


# defaults where --init is a public model, or a checkpoint that was made from one
PUBLIC = dict(steps=470, batch=32, lr=1e-5, weight_decay=0.0, max_new=512, eval_every=100, recompute=True)


# -------------------------------------------------------------------------------------------------------- the algorithm


def sft_loss(logp, mask, n=None):
    """Eq. 1. logp, mask (B, T), mask 1 on response tokens; n: response tokens in the whole optimiser batch, None if
    this is all of it.

    Returns the loss, and its two readings: nats a token, and nats a token averaged per response, in which long ones
    weigh no more.
    """
    logp = torch.where(mask > 0, logp, 0.0)                            # nothing outside the mask counts, not even a nan
    loss = -logp.sum() / (mask.sum().clamp(min=1) if n is None else n)    # - Σ m log π / Σ m
    length = mask.sum(1)                                                  # (B,)
    with torch.no_grad():
        per_token = -logp.sum() / length.sum().clamp(min=1)
        per_answer = -(logp.sum(1) / length.clamp(min=1)).sum() / (length > 0).sum().clamp(min=1)
    return loss, {"nll": per_token, "nll_answer": per_answer}


# ------------------------------------------------------------------------------------------------------------- the task

CAREFUL = {3: .75, 4: .65, 5: .40, 6: .35}                                # P(shows the working | number of terms)
SLIP = .08                                                                # P(forgets the ten | a carry)


def demonstrate(prompt, rng):
    """A demonstrator's response to "5+8+7="."""
    terms = [int(x) for x in prompt[:-1].split("+")]
    if rng.random() > CAREFUL[len(terms)]:
        return f"#{5 * round(sum(terms) / 5):02d}"
    total, totals = terms[0], []
    for x in terms[1:]:
        carry = total % 10 + x > 9
        total += x - 10 * (carry and rng.random() < SLIP)
        totals.append(f"{total:02d}")
    return ",".join(totals) + f"#{totals[-1]}"


def score(row, text):
    """1 for a right answer, 0 for a wrong one, None where the row does not say. The built-in sums: one '#', then the
    sum in two digits. Your own rows: the number of "answer"."""
    if "two_digits" in row:
        return float(text.count("#") == 1 and text.split("#")[1] == row["two_digits"])
    gold = answer_number(str(row.get("answer")))
    return None if gold is None else float(answer_number(text) == gold)


def prepare(row, tokenizer):
    """Add what the model reads: "ids" of the prompt, "tokens" of prompt, response and end token, and their "mask"."""
    if "messages" in row:                                                 # every turn of the assistant is trained
        tokens, mask = encode_chat(tokenizer, row["messages"])
    else:
        tokens, mask = encode_answer(tokenizer, row, row["response"])
    return row | {"ids": prompt_ids(tokenizer, row), "tokens": tokens, "mask": mask}


def demonstrations(cfg, tokenizer, context):
    """Rows to learn from, to validate on and to report on."""
    def ready(rows):
        rows = usable(rows, lambda x: x["prompt"] and x["response"].strip(), "the prompt or the response is empty")
        rows = [prepare(row, tokenizer) for row in rows]
        fits = lambda x: len(x["tokens"]) <= context
        return usable(rows, fits, f"longer than the context of {context} tokens (--context)")

    if cfg.data:
        return split(*[ready(read_rows(path, "prompt", "response")) for path in (cfg.data, cfg.test) if path])
    rng = random.Random(cfg.seed)
    parts = sums(50_000, "train", cfg.seed), sums(500, "val"), sums(1_000, "test")
    return [ready([row | {"response": demonstrate(row["prompt"], rng)} for row in rows]) for rows in parts]


# ----------------------------------------------------------------------------------------------------------- the script


def heldout_loss(model, rows, cfg, device):
    """Nats per response token."""
    total = count = 0
    for i in range(0, len(rows), 256):
        tokens, mask = pad_batch([row["tokens"] for row in rows[i:i + 256]], [row["mask"] for row in rows[i:i + 256]])
        logp, _ = frozen_logp(model, tokens.to(device), mask, 1.0, cfg.micro_tokens)
        total, count = total - logp.sum().item(), count + int(mask.sum())
    return total / count


def report(model, tokenizer, rows, cfg, device, samples=8):
    """Held-out loss of demonstrations; and, with samples, what evaluate says of the answers, and the greedy ones."""
    if not rows:
        return {}, []
    found, texts = evaluate(model, tokenizer, rows, score, cfg.max_new, samples) if samples else ({}, [])
    return {"loss": heldout_loss(model, rows, cfg, device)} | found, texts


def train(cfg):
    device = setup(cfg.seed)
    check(cfg, steps=1, batch=1, context=2, layers=1, width=1, heads=1, max_new=1, eval_every=1, grad_clip=0)
    check(cfg, lr=0, muon_lr=0, weight_decay=0, warmup=0, micro_tokens=0)

    # data and model: all that can be wrong is found here, before the first step
    if cfg.init:
        model, tokenizer = load(cfg.init, device, "GPT", cfg.chat, cfg.system)
        for name in ("context", "layers", "width", "heads"):
            if getattr(cfg, name) not in (getattr(Config, name), getattr(model.cfg, name)):
                raise InputError(f"--{name} {getattr(cfg, name)}: {cfg.init} has {getattr(model.cfg, name)}, kept")
        if cfg.tokenizer not in (Config.tokenizer, tokenizer.name):
            raise InputError(f"--tokenizer {cfg.tokenizer}: {cfg.init} has its own, kept")
    else:
        tokenizer = make_tokenizer(cfg.tokenizer, as_turns(cfg.chat, False, cfg.system), cfg.system)
        if cfg.width % cfg.heads or cfg.width // cfg.heads % 2:
            raise InputError(f"--width {cfg.width} --heads {cfg.heads}: a head needs an even whole number of channels")
        model = GPT(GPTConfig(vocab=tokenizer.n_vocab, stop=stop_ids(tokenizer), context=cfg.context, layers=cfg.layers,
                              width=cfg.width, heads=cfg.heads)).to(device)
    set_blocks(model, cfg.recompute, cfg.compile)
    rows, val, test = demonstrations(cfg, tokenizer, model.cfg.context)
    room = lambda row: len(row["ids"]) + cfg.max_new <= model.cfg.context
    why = f"held out; prompt + --max_new {cfg.max_new} exceed {model.cfg.context}"
    val, test = usable(val, room, why), usable(test, room, why)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay, 0 if cfg.init else cfg.muon_lr)
    print(f"sft: {sum(p.numel() for p in model.parameters()):,} parameters on {device.type}, "
          f"{len(rows):,} demonstrations, {len(val)} to validate, {len(test)} to report")
    memory_plan(device, optimizer, [model], [], cfg.micro_tokens)
    out = Folder(cfg.out, cfg, cfg.steps, tokenizer, Guard() if cfg.guard else None)
    first, saved = out.begin(model, optimizer, cfg.resume)
    own = lambda row: {name: row[name] for name in ("prompt", "response", "messages") if name in row}
    out.write_rows("demonstrations.jsonl", map(own, (val or rows)[:500]))
    before = saved.get("before") or report(model, tokenizer, test, cfg, device, samples=8 if cfg.init else 0)[0]
    todo = batches(rows, cfg.batch, cfg.seed, start=first)

    for step in range(first + 1, cfg.steps + 1):
        # 1. update: the token mean over the whole batch, in pieces that fit the memory
        t0 = time.perf_counter()
        batch = next(todo)
        tokens, mask = pad_batch([row["tokens"] for row in batch], [row["mask"] for row in batch])
        n, stats = int(mask.sum()), Mean()                                # response tokens in the batch
        tokens_dev, mask_dev = tokens.to(device), mask.to(device)
        optimizer.zero_grad()
        for j, t, at in micro_batches(mask, torch.arange(len(tokens)), cfg.micro_tokens, device):
            logp, entropy = model.token_logp(tokens_dev[j, :t], at=at)
            loss, found = sft_loss(logp, mask_dev[j, :t], n)
            loss.backward()
            stats.add({"nll": found["nll"], "ent": entropy.sum() / len(at)}, len(at))
            stats.add({"nll_answer": found["nll_answer"]}, len(j))
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup)
        gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()

        # 2. log, evaluate, save
        metrics = stats.read() | {"gnorm": float(gnorm), "lr": lr, "epoch": step * cfg.batch / len(rows)}
        metrics["tok_s"] = int(n / (time.perf_counter() - t0))
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            found, texts = report(model, tokenizer, val, cfg, device, samples=1)
            metrics |= {f"val_{name}": x for name, x in found.items()}
            out.samples(f"step {step}", val, texts)
        why = out.log(step, "nll ent gnorm epoch tok_s val_loss val_greedy val_acc", **metrics)
        if why:
            out.stop(model, optimizer, step, why)
        if last or out.leaving or step % cfg.eval_every == 0:
            out.save(model, optimizer, step, before=before)

    after, texts = report(model, tokenizer, test, cfg, device)
    print(f"\n{len(test)} held-out prompts, before -> after\n{table(before, after)}")
    print(out.samples("after", test, texts))
    out.plot("nll val_loss", "val_greedy val_acc", "val_length", "ent")


if __name__ == "__main__":
    main(train, Config)
