"""
SFT: supervised fine-tuning, the first step of InstructGPT (Ouyang et al. 2022, arXiv 2203.02155,
section 3.5).

Imitate demonstrations: raise the log-likelihood of every response token given what precedes it.

    minimise  L(θ) = - Σ_i Σ_t m_it log π_θ(y_it | x_i, y_i,<t)  /  Σ_i Σ_t m_it              (1)

    paper   θ       x, y           log π_θ   m, 1 on response and end token   Σ m, over the batch
    here    model   tokens (B, T)  logp      mask                             n

Details that are often missed:

    1. The prompt is context, not a target (m = 0).
    2. The end token is a target like any other, or the model never learns to stop. An example that
       does not fit is dropped: cutting it would teach a false end.
    3. The denominator is counted before the batch is split into micro-batches, so that their size
       changes no gradient.
    4. From scratch, Muon trains the blocks' matrices, which is faster; --muon_lr 0 is AdamW alone.

The demonstrators of the built-in task are careful on short sums and hasty on long ones:

    7+5+2=    careful  12,14#14     running totals, then # and the answer
              slip     02,04#04     careful, but a carry was forgotten (p = .08); the error stays
              hasty    #15          no working; the sum rounded to the nearest 5, right 1 time in 5

About 56% of them are right, and imitation can hardly do better: that is what grpo.py is for.

Run:     python sft.py                                          -> out/sft
Yours:   python sft.py --data rows.jsonl --block_size 1024   {"prompt", "response"} or {"messages"}
         python sft.py --data rows.jsonl --init SmolLM2-135M    a Hugging Face folder
"""
import random
import time
from dataclasses import dataclass

import torch

from common.data import (DEMONSTRATIONS, filter_rows, load_demonstrations, load_retained,
                         running_sums)
from common.distributed import sum_gradients, sum_over_ranks
from common.evaluate import MetricMean, evaluate, mean_nll
from common.memory import estimate_memory
from common.models import load_or_create_model, setup
from common.optimizers import make_optimizer, set_lr
from common.run import Run, main, prefixed
from common.train import batches, micro_batches, pad_batch
from common.verifier import answer_number, gold_number
from model import autocast


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to train on; "" is the built-in task
    test: str = ""                # JSON lines to test on; "": a twentieth of --data
    init: str = ""                # checkpoint or Hugging Face folder; "": from scratch
    out: str = "out/sft"          # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": prompts are user turns; "plain": text; "auto": as --init
    system: str = "auto"          # system message of chats that have none; "auto": as --init
    seed: int = 0                 # random seed of weights, data order and sampling
    resume: bool = False          # continue the run in --out
    # model, from scratch only
    tokenizer: str = "bytes"      # "bytes", or a vocabulary that tiktoken downloads, such as gpt2
    block_size: int = 64          # longest sequence; longer examples are dropped
    n_layer: int = 3              # transformer blocks
    n_embd: int = 96              # channels of the residual stream
    n_head: int = 3               # attention heads of n_embd / n_head channels
    # optimisation
    steps: int = 1200             # optimiser steps
    batch: int = 64               # examples in an optimiser step
    micro_batch_tokens: int = 0   # tokens in one forward, changes no gradient; 0: by device
    gradient_checkpointing: bool = False  # recompute blocks in backward: slower, less memory
    compile: bool = False         # torch.compile the blocks: a slow start, faster steps
    lora_rank: int = 0            # r of LoRA, which trains adapters alone; 0: all weights learn
    lora_alpha: float = 32.0      # α of LoRA, whose adapters are scaled by α / r
    lr: float = 3e-3              # peak rate of AdamW; for a pretrained model 1e-5
    muon_lr: float = 3e-3        # peak rate of Muon on the blocks' matrices, from scratch; 0: AdamW
    warmup: int = 30              # steps of linear warm-up, then half a cosine down to 0
    weight_decay: float = 0.1     # on matrices, not on norms, biases and embeddings
    grad_clip: float = 1.0        # largest gradient norm
    # evaluation
    max_new_tokens: int = 24      # longest response in the evaluation
    eval_prompts: int = 0         # validation and test rows, at most so many of each; 0: all
    eval_every: int = 300         # steps between evaluations, and between checkpoints
    retain: str = ""              # demonstrations whose loss is reported; "": those in --init
    early_stopping: bool = True   # stop a run that has gone wrong, and say by which rule


# defaults where --init is a Hugging Face folder, or a checkpoint that began as one
PRETRAINED = dict(
    steps=470, batch=32, lr=1e-5, weight_decay=0.0, max_new_tokens=512, eval_every=100,
    gradient_checkpointing=True)
COLUMNS = "nll entropy grad_norm epoch tok_s val_loss val_greedy val_accuracy"


# ------------------------------------------------------------------------------------ the algorithm
# To use it elsewhere copy this function; it needs `import torch`.


def sft_loss(logp, mask, n=None):
    """Eq. 1. logp, mask (B, T), mask 1 on response tokens; n: response tokens in the whole
    optimiser batch, None if this is all of it. Returns the loss and statistics: nats per token, and
    nats per token averaged per response, where long responses weigh no more than short ones."""
    logp = torch.where(mask > 0, logp, 0.0)                   # nothing outside counts, not even NaN
    if n is None:
        n = mask.sum().clamp(min=1)
    loss = -logp.sum() / n                                      # - Σ m log π / Σ m
    with torch.no_grad():
        length = mask.sum(1)                                    # (B,)
        per_response = -logp.sum(1) / length.clamp(min=1)       # (B,)
        stats = {"nll": -logp.sum() / length.sum().clamp(min=1),
                 "nll_response": per_response.sum() / (length > 0).sum().clamp(min=1)}
    return loss, stats


# ---------------------------------------------------------------------------------------- the task

CAREFUL = {3: .75, 4: .65, 5: .40, 6: .35}                  # P(shows the working | number of terms)
SLIP = .08                                                      # P(forgets the ten | a carry)


def demonstrate(prompt, rng):
    """A demonstrator's response to "5+8+7="."""
    terms = [int(x) for x in prompt[:-1].split("+")]
    if rng.random() > CAREFUL[len(terms)]:
        return f"#{5 * round(sum(terms) / 5):02d}"
    total, totals = terms[0], []
    for x in terms[1:]:
        carry = total % 10 + x > 9
        total += x
        if carry and rng.random() < SLIP:
            total -= 10
        totals.append(f"{total:02d}")
    return ",".join(totals) + f"#{totals[-1]}"


def score(row, response):
    """1 for a right response, 0 for a wrong one, None where the row does not say what is right. The
    built-in task: one '#', then the sum in two digits. Other rows: the number in "answer"."""
    if "_two_digits" in row:
        return float(response.count("#") == 1 and response.split("#")[1] == row["_two_digits"])
    answer = gold_number(row.get("answer"))
    return None if answer is None else float(answer_number(response) == answer)


def demonstrations(seed):
    """The built-in demonstrations to train on, to validate on and to report on."""
    rng, splits = random.Random(seed), []
    for n, split in ((50_000, "train"), (500, "val"), (1_000, "test")):
        rows = running_sums(n, split, seed if split == "train" else 0)
        splits.append([row | {"response": demonstrate(row["prompt"], rng)} for row in rows])
    return splits


# ---------------------------------------------------------------------------------------- training


def train(cfg):
    device = setup(cfg)
    model, tokenizer = load_or_create_model(cfg, device)
    block_size = model.cfg.block_size
    built_in = [] if cfg.data else demonstrations(cfg.seed)
    train_rows, val_rows, test_rows = load_demonstrations(cfg, tokenizer, block_size, built_in)

    def has_room(row):
        return len(row["ids"]) + cfg.max_new_tokens <= block_size

    reason = f"held out; prompt + --max_new_tokens {cfg.max_new_tokens} exceed {block_size}"
    val_rows = filter_rows(val_rows, has_room, reason)
    test_rows = filter_rows(test_rows, has_room, reason)
    retained = load_retained(cfg, tokenizer, block_size)
    muon_lr = 0 if cfg.init else cfg.muon_lr
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay, muon_lr)
    estimate_memory(device, optimizer, [model], [], cfg.micro_batch_tokens)
    splits = train_rows, val_rows, test_rows
    run = Run(cfg, cfg.steps, model, optimizer, tokenizer, splits, COLUMNS)
    held_out = []                                               # for reward.py and --retain
    fields = ("prompt", "response", "messages")
    for row in val_rows[:500]:
        held_out.append({name: row[name] for name in fields if name in row})
    if held_out:
        run.write_rows(DEMONSTRATIONS, held_out)

    def evaluate_loss(rows):
        return {"loss": mean_nll(model, rows, cfg.micro_batch_tokens)} if rows else {}

    def evaluate_model(rows, samples=1):
        metrics, texts = evaluate(model, tokenizer, rows, score, cfg, samples, retained=retained)
        return evaluate_loss(rows) | metrics, texts

    if run.is_new and cfg.init:
        run.state["before"] = evaluate_model(test_rows, samples=8)
    elif run.is_new:                                            # untrained: no responses yet
        run.state["before"] = evaluate_loss(test_rows), []
    batch_iter = batches(train_rows, cfg.batch, cfg.seed, start=run.step)

    for step in run.remaining_steps():
        # 1. update: the token mean over the whole batch, in micro-batches
        start, stats = time.perf_counter(), MetricMean()
        batch = next(batch_iter)
        tokens, mask = pad_batch([row["tokens"] for row in batch], [row["mask"] for row in batch])
        n = int(sum_over_ranks(mask))                           # response tokens in the batch
        tokens_dev, mask_dev = tokens.to(device), mask.to(device)
        optimizer.zero_grad()
        every_row = torch.arange(len(batch))
        for rows, width, index in micro_batches(mask, every_row, cfg.micro_batch_tokens, device):
            with autocast(model):                               # bf16 where the hardware has it
                logp, entropy = model.token_logp(tokens_dev[rows, :width], index=index)
            loss, loss_stats = sft_loss(logp, mask_dev[rows, :width], n)
            loss.backward()
            stats.add({"nll": loss_stats["nll"], "entropy": entropy.sum() / len(index)}, len(index))
            stats.add({"nll_response": loss_stats["nll_response"]}, len(rows))
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup)
        sum_gradients(model)                                    # of all processes
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()

        # 2. log, evaluate, save
        metrics = stats.read()                                  # the only wait for the GPU
        metrics |= {"grad_norm": float(grad_norm), "lr": lr}
        metrics["epoch"] = step * cfg.batch / len(train_rows)
        metrics["tok_s"] = int(n / (time.perf_counter() - start))
        if run.is_eval_step(step):
            val, texts = evaluate_model(val_rows)
            metrics |= prefixed("val_", val)
            run.write_samples(f"step {step}", val_rows, texts)
        run.end_step(step, metrics)

    run.report(test_rows, run.state["before"], evaluate_model(test_rows, samples=8))
    run.plot("nll val_loss", "val_greedy val_accuracy", "val_length", "entropy")


if __name__ == "__main__":
    main(train, Config)
