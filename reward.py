"""
Reward model: learn from comparisons what annotators prefer (Bradley & Terry 1952; InstructGPT,
Ouyang et al. 2022, arXiv 2203.02155, sections 3.4-3.5).

Sample several responses to a prompt, let an annotator rank them, and fit a score whose differences
predict the ranking.

    P(y_w > y_l | x) = σ(r(x, y_w) - r(x, y_l))     Bradley-Terry: the difference is the log-odds
    L(φ) = - E  log σ(r(x, y_w) - r(x, y_l) - m)                                              (1)
    L(φ) = - E_x  1/#pairs(x)  Σ_{(w,l) in pairs(x)}  log σ(r(x, y_w) - r(x, y_l))            (2)

    paper   φ, r   y_w, y_l           m       K                   pairs(x)
    here    model  chosen, rejected   margin  responses, (P, K)   ranks[p, w] < ranks[p, l]

(2) is InstructGPT's Eq. 1 with ties. Details that are often missed:

    1. All pairs of one ranking are one element of the batch, and each response is read once: as
       separate rows, pairs that share responses would be seen K - 1 times in one epoch.
    2. Ties are dropped, and the divisor is the number of pairs that remain.
    3. m is the margin of Llama 2 (arXiv 2307.09288, Eq. 2), 0 unless the data has one.
    4. The loss sees differences only, so the level of r is free. Afterwards the mean score of
       demonstrations is set to 0, as in InstructGPT, so that --truncated_reward has a meaning.
    5. The trunk is the SFT model, the head starts with standard deviation 1 / sqrt(C + 1)
       (arXiv 1909.08593), the score is read at the end token. One epoch: a second one overfits.

The annotators of the built-in task follow the rule, and can be made worse: --label_noise is the
share of prompts whose ranking they invert, --length_bias their bonus per token, where being right
is worth 1.

Run:     python reward.py                   -> out/reward, from out/sft
         python reward.py --collect_only    the comparisons only, out/reward/preferences.jsonl
Yours:   python reward.py --data pairs.jsonl --init out/mine    {"prompt", "chosen", "rejected"},
         HH-RLHF's own files, or {"prompt", "responses": [best, ..., worst]}
         python reward.py --data rows.jsonl     {"prompt", "answer"}: collected, ranked by the rule
"""
import math
import os
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import InputError
from common.data import load_prompts, read_rows, split_rows
from common.distributed import gather_shards, shard, sum_gradients
from common.evaluate import MetricMean, compute_scores, evaluate_rankings
from common.memory import estimate_memory
from common.models import load_policy, setup
from common.optimizers import make_optimizer, set_lr
from common.preferences import (better_worse, load_centring_responses, read_preferences,
                                tokenize_rankings)
from common.run import Run, main, prefixed
from common.tokenizer import decode_responses
from common.train import batches, eval_batch_size, micro_batches, pad_rankings
from common.verifier import answer_number, checked_score, gold_number
from model import ScalarModel, autocast


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines of preferences, or of prompts to collect them on
    test: str = ""                # JSON lines to test on; "": a twentieth of --data
    init: str = "out/sft"         # policy that responds, and trunk: checkpoint or model folder
    out: str = "out/reward"       # folder for the preferences, the checkpoint, metrics and curves
    chat: str = "auto"            # "chat": prompts are user turns; "plain": text; "auto": as --init
    system: str = "auto"          # system message of chats that have none; "auto": as --init
    seed: int = 0                 # random seed of sampling, labels, the head and the data order
    resume: bool = False          # continue the run in --out
    # collection
    collect_only: bool = False    # stop when preferences.jsonl is written
    prompts: int = 9000           # prompts to collect on for training; held-out ones are extra
    responses: int = 4            # K, responses per prompt
    max_new_tokens: int = 24      # longest response; truncated ones are not ranked
    label_noise: float = 0.0      # share of prompts whose ranking is inverted, 0 to 1
    length_bias: float = 0.0      # annotators' bonus per token, where being right is worth 1
    # optimisation, one epoch
    batch: int = 32               # prompts in an optimiser step
    micro_batch_tokens: int = 0   # tokens in one forward, changes no gradient; 0: by device
    gradient_checkpointing: bool = False  # recompute blocks in backward: slower, less memory
    compile: bool = False         # torch.compile the blocks: a slow start, faster steps
    lora_rank: int = 0            # r of LoRA, which trains adapters alone; 0: all weights learn
    lora_alpha: float = 32.0      # α of LoRA, whose adapters are scaled by α / r
    lr: float = 5e-4              # peak rate of AdamW; for a pretrained model 1e-5
    warmup: int = 5               # steps of linear warm-up, then half a cosine down to 0
    weight_decay: float = 0.0     # on matrices, not on norms, biases and embeddings
    grad_clip: float = 1.0        # largest gradient norm
    # evaluation
    eval_every: int = 10          # steps between evaluations, and between checkpoints
    early_stopping: bool = True   # stop a run that has gone wrong, and say by which rule


# defaults where --init is a Hugging Face folder, or a checkpoint that began as one
PRETRAINED = dict(prompts=2000, max_new_tokens=512, lr=1e-5, gradient_checkpointing=True)
COLLECTED, COLLECTED_TEST = "preferences.jsonl", "preferences_test.jsonl"
COLUMNS = "loss acc margin grad_norm step_s val_loss val_acc val_acc_same_style"


# ------------------------------------------------------------------------------------ the algorithm
# To use them elsewhere copy these two functions; they need torch and torch.nn.functional as F.


def bradley_terry_loss(chosen, rejected, margin=0, n=None):
    """Eq. 1. chosen, rejected (P,): scores of the better and the worse response; margin a number or
    (P,); n: pairs in the whole optimiser batch, None if this is all of it. Returns the loss and
    statistics, means over the pairs: acc, where a tie is wrong, and margin, the difference."""
    lead = chosen - rejected                                    # (P,)
    loss = -F.logsigmoid(lead - margin).sum() / (len(lead) if n is None else n)
    return loss, {"acc": (lead > 0).float().mean(), "margin": lead.detach().mean()}


def ranking_loss(scores, ranks, n=None):
    """Eq. 2. scores, ranks (P, K), rank 0 is best, equal ranks are ties, a negative rank marks a
    missing response; n: prompts in the whole optimiser batch, None if this is all of it. A prompt
    with only ties gives 0. Returns the loss and statistics, means over prompts of means over their
    pairs."""
    scores = torch.where(ranks >= 0, scores, 0.0)
    present = ranks[:, :, None] >= 0
    kept = (ranks[:, :, None] < ranks[:, None, :]) & present    # (P, K, K)  w before l
    lead = scores[:, :, None] - scores[:, None, :]              # (P, K, K)  r_w - r_l
    pairs = kept.sum((1, 2)).clamp(min=1)                       # (P,)
    log_p = (F.logsigmoid(lead) * kept).sum((1, 2)) / pairs     # 1/#pairs Σ
    loss = -log_p.sum() / (len(scores) if n is None else n)
    with torch.no_grad():
        prompts = kept.any(2).any(1).sum().clamp(min=1)         # with at least one pair
        acc = ((lead > 0).float() * kept).sum((1, 2)) / pairs
        margin = (lead * kept).sum((1, 2)) / pairs
        stats = {"acc": acc.sum() / prompts, "margin": margin.sum() / prompts}
    return loss, stats


# ---------------------------------------------------------------------------------------- the task


def score(row, response):
    """1 for a right response, 0 for a wrong one, None where the row does not say what is right. The
    built-in task: one '#', then the sum in two digits. Other rows: the number in "answer"."""
    if "_two_digits" in row:
        return float(response.count("#") == 1 and response.split("#")[1] == row["_two_digits"])
    answer = gold_number(row.get("answer"))
    return None if answer is None else float(answer_number(response) == answer)


def rank_responses(row, texts, length, cfg, rng):
    """An annotator's ranks of the responses to one prompt, 0 for the best, equal ranks for ties."""
    utility = [round(checked_score(score, row, text) + cfg.length_bias * n, 9)
               for text, n in zip(texts, length)]
    order = sorted(set(utility), reverse=True)
    ranks = [order.index(x) for x in utility]
    if rng.random() < cfg.label_noise:
        ranks = [max(ranks) - rank for rank in ranks]
    return ranks


def collect(policy, tokenizer, rows, cfg, rng):
    """Sample K responses to every prompt, rank those that ended, and return all pairs that are not
    ties."""
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new_tokens
    size = min(256, eval_batch_size(policy, longest, cfg.responses))  # prompts at a time
    uniform = torch.rand(len(rows), cfg.responses, cfg.max_new_tokens, dtype=torch.float64)
    uniform, own_rows = shard(uniform).flatten(0, 1), shard(rows)
    lengths = []                            # of each prompt: text -> length; equal responses once
    for i in range(0, len(own_rows), size):
        chunk = own_rows[i:i + size]
        prompts = [row["ids"] for row in chunk]
        tokens, mask, _ = policy.generate(
            prompts, cfg.responses, cfg.max_new_tokens,
            uniform=uniform[i * cfg.responses:(i + size) * cfg.responses])
        texts = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        length = mask.sum(1).int().tolist()
        for j in range(0, len(texts), cfg.responses):
            distinct = {}
            for text, n in zip(texts[j:j + cfg.responses], length[j:j + cfg.responses]):
                if text and text.strip():
                    distinct[text] = n
            lengths.append(distinct)

    pairs = []
    for row, distinct in zip(rows, gather_shards(lengths)):
        if not distinct:
            continue
        ranks = rank_responses(row, list(distinct), distinct.values(), cfg, rng)
        kept = ("prompt", "messages", "split_by", "_two_digits", "answer")
        given = {name: row[name] for name in kept if name in row}
        for chosen, rejected in better_worse(distinct, ranks):
            pairs.append(given | {"chosen": chosen, "rejected": rejected})
    return pairs


def load_preferences(cfg, policy, tokenizer):
    """Train, validation and test pairs, from --data or collected from the policy; and whether they
    were newly collected."""
    has_preferences = False
    if cfg.data:
        row = read_rows(cfg.data)[0]
        has_preferences = "answer" not in row or "chosen" in row or "responses" in row
    if has_preferences:
        if cfg.collect_only:
            raise InputError(f"--collect_only: {cfg.data} holds preferences already")
        pairs = read_preferences(cfg.data)
        return split_rows(pairs, read_preferences(cfg.test) if cfg.test else None), False
    rows, val, test = load_prompts(cfg, tokenizer, score, policy.cfg.block_size)
    rows = list({row["prompt"]: row for row in rows}.values())[:cfg.prompts]
    split_by_prompt = {}
    for i, split in enumerate((rows, val, test)):
        split_by_prompt |= {row["prompt"]: i for row in split}
    if cfg.resume:
        paths = [os.path.join(cfg.out, name) for name in (COLLECTED, COLLECTED_TEST)]
        pairs = []
        for path in paths:
            if os.path.exists(path) and os.path.getsize(path):
                pairs += read_preferences(path)
    else:
        n = len(rows + val + test)
        print(f"sampling {cfg.responses} responses to each of {n:,} prompts", flush=True)
        rng = random.Random(cfg.seed)
        pairs = collect(policy, tokenizer, rows + val + test, cfg, rng)
    splits = [[], [], []]
    for pair in pairs:
        if pair["prompt"] in split_by_prompt:
            splits[split_by_prompt[pair["prompt"]]].append(pair)
    if not splits[0]:
        raise InputError(f"{len(rows)} prompts gave no pair: the responses of each are all right, "
                         "all wrong or all truncated")
    return splits, not cfg.resume


# ---------------------------------------------------------------------------------------- training


def centre_scores(model, encoded, cfg):
    """Make the mean score of these responses 0. No difference changes, hence no loss."""
    mean = compute_scores(model, encoded, cfg).mean()
    with torch.no_grad():
        model.head.bias -= mean.to(model.head.bias.device)


def train(cfg):
    device = setup(cfg)
    policy, tokenizer = load_policy(cfg, device)                # runs sft.py if out/sft is missing
    block_size = policy.cfg.block_size
    pairs, newly_collected = load_preferences(cfg, policy, tokenizer)
    train_rows = tokenize_rankings(pairs[0], tokenizer, block_size)
    val_rows = tokenize_rankings(pairs[1], tokenizer, block_size, need=False)
    test_rows = tokenize_rankings(pairs[2], tokenizer, block_size, need=False)
    centring_responses = load_centring_responses(cfg, tokenizer, block_size, train_rows)
    K = max(len(row["responses"]) for row in train_rows)
    batch_size = min(cfg.batch, len(train_rows))
    steps = math.ceil(len(train_rows) / batch_size)             # an epoch; the last batch is filled
    model = ScalarModel(policy, std=(policy.cfg.n_embd + 1) ** -0.5).to(device)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    estimate_memory(device, optimizer, [model], [], cfg.micro_batch_tokens)
    run = Run(cfg, steps, model, optimizer, tokenizer, (train_rows, val_rows, test_rows), COLUMNS)
    if newly_collected and cfg.test:                            # dpo.py must not train on them
        run.write_rows(COLLECTED, pairs[0] + pairs[1])
        run.write_rows(COLLECTED_TEST, pairs[2])
    elif newly_collected:
        run.write_rows(COLLECTED, pairs[0] + pairs[1] + pairs[2])
    if newly_collected:
        print(f"{sum(map(len, pairs)):,} pairs are in {run.path(COLLECTED)}")
    if cfg.collect_only:
        return
    if run.is_new:
        run.state["before"], _ = evaluate_rankings(model, test_rows, score, cfg)
    batch_iter = batches(train_rows, batch_size, cfg.seed, start=run.step)

    for step in run.remaining_steps():
        # 1. update: each response is read once, all pairs of a prompt are one element
        start, stats = time.perf_counter(), MetricMean()
        batch = next(batch_iter)
        tokens, mask, ranks = pad_rankings(batch, K)            # (P, K, T), (P, K, T), (P, K)
        margin = torch.tensor([row.get("margin", 0.0) for row in batch], device=device)  # (P,)
        tokens_dev, mask_dev, ranks = tokens.to(device), mask.to(device), ranks.to(device)
        optimizer.zero_grad()
        every_prompt = torch.arange(len(batch))
        for rows, width, _ in micro_batches(mask, every_prompt, cfg.micro_batch_tokens, device):
            present = ranks[rows] >= 0                          # (p, K)
            with autocast(model):                               # bf16 where the hardware has it
                r = model.score(tokens_dev[rows, :, :width][present],
                                mask_dev[rows, :, :width][present])
            r = r.new_zeros(present.shape).masked_scatter(present, r)       # (p, K)
            if K == 2:
                loss, loss_stats = bradley_terry_loss(r[:, 0], r[:, 1], margin[rows], batch_size)
            else:
                loss, loss_stats = ranking_loss(r, ranks[rows], batch_size)
            loss.backward()
            loss_stats["loss"] = loss.detach() * batch_size / len(rows)
            stats.add(loss_stats, len(rows))
        lr = set_lr(optimizer, step, steps, cfg.warmup)
        sum_gradients(model)                                    # of all processes
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()

        # 2. log, evaluate, save
        metrics = stats.read()                                  # the only wait for the GPU
        metrics |= {"grad_norm": float(grad_norm), "lr": lr, "step_s": time.perf_counter() - start}
        if run.is_eval_step(step):
            centre_scores(model, centring_responses, cfg)
            metrics |= prefixed("val_", evaluate_rankings(model, val_rows, score, cfg)[0])
        run.end_step(step, metrics)

    after, calibration = evaluate_rankings(model, test_rows, score, cfg)
    run.report(test_rows, (run.state["before"], []), (after, []))
    print(calibration)
    prompts, texts = [], []
    for row in test_rows[:3]:
        scores = compute_scores(model, list(zip(row["tokens"], row["mask"])), cfg)
        prompts += [row] * len(scores)
        texts += [f"{r:+.2f}  {text}" for r, text in zip(scores, row["responses"])]
    if texts:
        print("scores\n" + run.write_samples("scores", prompts, texts, n=len(texts)))
    run.plot("loss val_loss", "acc val_acc", "margin val_margin")


if __name__ == "__main__":
    main(train, Config)
