"""
Reward model: learn from comparisons what people like (Bradley & Terry 1952; InstructGPT, Ouyang et al. 2022, arXiv
2203.02155, sections 3.4-3.5).

Sample several answers to a prompt, let a person rank them, and fit a score whose differences predict the ranking.

    P(y_w > y_l | x) = σ(r(x, y_w) - r(x, y_l))                           Bradley-Terry: the difference is the log-odds
    minimise  L(φ) = - E  log σ(r(x, y_w) - r(x, y_l) - m)                                                           (1)
              L(φ) = - E_x  1/#pairs(x)  Σ_{(w,l) in pairs(x)}  log σ(r(x, y_w) - r(x, y_l))       (InstructGPT, Eq. 1)

    paper   φ, r   x, y           y_w, y_l           m       K                 pairs(x)
    here    model  tokens (N, T)  chosen, rejected   margin  answers, (P, K)   ranks[p, w] < ranks[p, l]

All the pairs of one ranking are one element of a batch and every answer is read once: pairs that share answers are
correlated, and as separate rows they would be seen K - 1 times in one epoch. Ties are dropped, and the divisor is the
number of pairs kept (the paper, without ties, has K choose 2). m is Llama 2's margin (arXiv 2307.09288, Eq. 2), 0
unless the data has one. Only differences count in the loss, so the level of r is free: afterwards the mean score of
demonstrations is made 0, as in InstructGPT, so that a number such as the reward of a cut answer means something. The
trunk is the SFT model, the head starts at standard deviation 1 / sqrt(C + 1) (arXiv 1909.08593), the score is read at
the end token, and there is one epoch, for a second one overfits.

The people of the built-in task follow the rule, and can be made worse: `--flip` is the share of prompts whose answers
they rank upside down, `--length_taste` what one more token of an answer is worth to them when being right is worth 1;
below 0 they like it short.

Run:     python reward.py                    half a minute on two CPU cores after out/sft -> out/reward
         python reward.py --collect_only     the comparisons alone, out/reward/preferences.jsonl
Yours:   python reward.py --data pairs.jsonl --init out/mine    {"prompt", "chosen", "rejected"}, HH-RLHF's own files,
                                                                or {"prompt", "responses": [best, ..., worst]}
         python reward.py --data rows.jsonl  {"prompt", "answer"}: answers are collected, and ranked by the rule
"""
import os
import random
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import (EVALUATED, Folder, Guard, InputError, Mean, ScalarModel, answer_number, answers, batches, check,
                   encode_answer, encoded, frozen_scalars, half_interval, load, main, make_first, make_optimizer,
                   memory_plan, micro_batches, ordered, pad_batch, read_preferences, read_rows, scored, set_blocks,
                   set_lr, setup, split, sums, table, usable)


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines of preferences, or of prompts to collect them on; "" is the built-in task
    test: str = ""            # JSON lines to report on; "": the twentieth of --data that a hash of the prompt holds out
    init: str = "out/sft"         # folder of the policy that answers, and trunk: a checkpoint, or a public model
    out: str = "out/reward"       # folder for the preferences, the checkpoint, metrics and curves
    chat: str = "auto"            # "chat": a lone prompt is a user's turn, "plain": bare text, "auto": as --init has it
    system: str = ""              # system line of a chat that has none; "" keeps that of --init
    seed: int = 0                 # of the sampling, the labels, the head and the order of the data
    resume: bool = False          # go on with the run in --out
    # collection
    collect_only: bool = False    # stop when preferences.jsonl is written
    prompts: int = 9000           # prompts to collect on for training; those held out come besides
    answers: int = 4              # K, answers to each
    max_new: int = 24             # longest answer in tokens; one that has not ended by then is not shown to anybody
    flip: float = 0.0             # share of prompts whose answers are ranked upside down, 0 to 1
    length_taste: float = 0.0     # what a token more is worth to the labeller, where being right is worth 1
    # optimisation, one epoch
    batch: int = 32               # prompts in an optimiser step
    micro_tokens: int = 0         # tokens in one forward: bounds the memory, changes no gradient; 0: by device
    recompute: bool = False       # keep each block's input alone and run it again in backward: more time, less memory
    compile: bool = False         # torch.compile the blocks, where that works: a slow start, faster updates
    lr: float = 5e-4              # peak rate of AdamW; for a real pretrained model 1e-5
    warmup: int = 5               # steps of linear warm-up, before half a cosine down to 0
    weight_decay: float = 0.0     # on matrices, not on norms, biases and embeddings
    grad_clip: float = 1.0        # largest gradient norm
    # watching
    eval_every: int = 10          # steps between evaluations on validation prompts, and between checkpoints
    guard: bool = True            # stop a run that has gone wrong, and say why


# defaults where --init is a public model, or a checkpoint that was made from one
PUBLIC = dict(prompts=2000, max_new=512, lr=1e-5, recompute=True)


# -------------------------------------------------------------------------------------------------------- the algorithm


def bradley_terry_loss(chosen, rejected, margin=0, n=None):
    """Eq. 1. chosen, rejected (P,) scores of the better and the worse answer; margin a number or (P,); n: pairs in the
    whole optimiser batch, None if this is all of it. Returns the loss and statistics, means over the pairs: acc, a tie
    counting as wrong, and margin, by how much the better one leads."""
    lead = chosen - rejected                                              # (P,)
    loss = -F.logsigmoid(lead - margin).sum() / (len(lead) if n is None else n)
    return loss, {"acc": (lead > 0).float().mean(), "margin": lead.detach().mean()}


def ranking_loss(scores, ranks, n=None):
    """InstructGPT's Eq. 1. scores, ranks (P, K), rank 0 is the best, equal ranks are ties, a negative rank marks a
    place without an answer; n: prompts in the whole optimiser batch, None if this is all of it. A prompt with ties
    alone gives 0. Returns the loss and statistics, means over prompts of means over their pairs."""
    scores = torch.where(ranks >= 0, scores, 0.0)
    kept = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] >= 0)                # (P, K, K)  w before l
    lead = scores[:, :, None] - scores[:, None, :]                                           # (P, K, K)  r_w - r_l
    per_prompt = lambda x: (x * kept).sum((1, 2)) / kept.sum((1, 2)).clamp(min=1)            # 1/#pairs Σ
    loss = -per_prompt(F.logsigmoid(lead)).sum() / (len(scores) if n is None else n)
    with torch.no_grad():
        mean = lambda x: per_prompt(x).sum() / kept.any(2).any(1).sum().clamp(min=1)
        return loss, {"acc": mean((lead > 0).float()), "margin": mean(lead)}


# ------------------------------------------------------------------------------------------------------------- the task


def score(row, text):
    """1 for a right answer, 0 for a wrong one, None where the row does not say. The built-in sums: one '#', then the
    sum in two digits. Your own rows: the number of "answer"."""
    if "two_digits" in row:
        return float(text.count("#") == 1 and text.split("#")[1] == row["two_digits"])
    gold = answer_number(str(row.get("answer")))
    return None if gold is None else float(answer_number(text) == gold)


def rank(row, texts, length, cfg, rng):
    """A person's ranks of the answers to one prompt, 0 for the best, equal ranks for ties."""
    like = [round(scored(score, row, text) + cfg.length_taste * n, 9) for text, n in zip(texts, length)]
    ranks = [sorted(set(like), reverse=True).index(x) for x in like]
    return [max(ranks) - r for r in ranks] if rng.random() < cfg.flip else ranks


def collect(policy, tokenizer, rows, cfg, rng):
    """Sample K answers to every prompt, have those that ended ranked, and return all pairs that are no ties."""
    pairs, own = [], ("prompt", "messages", "two_digits", "answer")
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new
    size = min(256, max(1, EVALUATED // (cfg.answers * longest)))                            # prompts at a time
    for i in range(0, len(rows), size):
        chunk = rows[i:i + size]
        tokens, mask, _ = policy.generate([row["ids"] for row in chunk], cfg.answers, cfg.max_new)
        texts, length = answers(tokenizer, tokens, mask, policy.cfg.stop), mask.sum(1).int().tolist()
        for j, row in enumerate(chunk):
            k = slice(j * cfg.answers, (j + 1) * cfg.answers)
            seen = {text: n for text, n in zip(texts[k], length[k]) if text and text.strip()}    # the same answer once
            ranks = rank(row, list(seen), seen.values(), cfg, rng) if seen else []
            pairs += [{name: row[name] for name in own if name in row} | {"chosen": w, "rejected": l}
                      for w, l in ordered(seen, ranks)]
    return pairs


def rankings(pairs):
    """Pairs -> rows of "responses", best first, and their "ranks". The pairs of a prompt make one row where they are
    all the pairs of one ranking; where they are not, or where margins are given, each is a row of its own."""
    rows, of, margins = [], {}, any("margin" in pair for pair in pairs)
    for pair in pairs:
        of.setdefault(pair["prompt"], []).append(pair)
    for group in of.values():
        given = {(pair["chosen"], pair["rejected"]) for pair in group}
        beaten = Counter(l for _, l in given)                             # by how many others
        texts = sorted({text for pair in given for text in pair}, key=lambda text: (beaten[text], text))
        ties = sum(n * (n - 1) // 2 for n in Counter(beaten[text] for text in texts).values())
        whole = len(given) == len(texts) * (len(texts) - 1) // 2 - ties and all(beaten[w] < beaten[l] for w, l in given)
        if whole and not margins:
            rows.append(group[0] | {"responses": texts, "ranks": [beaten[text] for text in texts]})
        else:
            rows += [pair | {"responses": [pair["chosen"], pair["rejected"]], "ranks": [0, 1]} for pair in group]
    return rows


def prompts(cfg, tokenizer, context, rule=True):
    """Rows to learn from, to validate on and to report on, each with its prompt's "ids"; for the rule, rows must say
    what is right."""
    def ready(rows):
        rows = usable(rows, lambda row: row["prompt"], "the prompt is empty")
        if rule:
            rows = usable(rows, lambda row: scored(score, row, "", need=False) is not None, 'no number in "answer"')
        return encoded(rows, tokenizer, cfg.max_new, context)

    if cfg.data:
        needed = ("prompt", "answer") if rule else ("prompt",)
        return split(*[ready(read_rows(path, *needed)) for path in (cfg.data, cfg.test) if path])
    return [ready(rows) for rows in (sums(20_000, "train", cfg.seed), sums(500, "val"), sums(1_000, "test"))]


def preferences(cfg, policy, tokenizer):
    """Pairs to learn from, to validate on and to report on: those of --data, or collected from the policy; and all that
    were collected, to be kept."""
    first = read_rows(cfg.data)[0] if cfg.data else {"answer": ""}
    if "answer" not in first or "chosen" in first or "responses" in first:
        if cfg.collect_only:
            raise InputError(f"--collect_only: {cfg.data} holds preferences, there is nothing to collect")
        return split(*[read_preferences(path) for path in (cfg.data, cfg.test) if path]), []
    rows, *heldout = prompts(cfg, tokenizer, policy.cfg.context)
    rows = list({row["prompt"]: row for row in rows}.values())[:cfg.prompts]
    part = {row["prompt"]: i for i, some in enumerate((rows, *heldout)) for row in some}
    if cfg.resume:
        pairs = read_preferences(os.path.join(cfg.out, "preferences.jsonl"))
    else:
        pairs = collect(policy, tokenizer, sum(heldout, rows), cfg, random.Random(cfg.seed))
    if not any(part.get(pair["prompt"]) == 0 for pair in pairs):
        raise InputError(f"{len(rows)} prompts gave no pair: the answers of each are all right, all wrong or all cut")
    return [[pair for pair in pairs if part.get(pair["prompt"]) == i] for i in range(3)], pairs


def ready(pairs, tokenizer, context, need=True):
    """Rankings, each answer with the "tokens" of prompt, answer and end token, and their "mask"."""
    rows = rankings(pairs)
    for row in rows:
        row["tokens"], row["mask"] = zip(*[encode_answer(tokenizer, row, text) for text in row["responses"]])
    fits = lambda row: max(map(len, row["tokens"])) <= context
    return usable(rows, fits, f"an answer is longer than the context of {context} tokens", need)


def demonstrated(cfg, tokenizer, context):
    """Tokens and masks of the demonstrations that sft.py left in --init, none if it left none."""
    path = os.path.join(cfg.init, "demonstrations.jsonl")
    rows = read_rows(path, "prompt", "response") if os.path.exists(path) else []
    both = [encode_answer(tokenizer, row, row["response"]) for row in rows]
    return [[x[i] for x in both if len(x[0]) <= context] for i in range(2)]


# ----------------------------------------------------------------------------------------------------------- the script


def read_scores(model, tokens, mask, cfg, device):
    """Lists of tokens and of masks -> scores (N,) on the CPU."""
    tokens, mask = pad_batch(tokens, mask)
    return frozen_scalars(model, tokens.to(device), mask, cfg.micro_tokens)[1].cpu()


def centre(model, demos, cfg, device):
    """Make the mean score of demonstrations 0: no difference changes, so neither does any loss."""
    with torch.no_grad():
        model.head.bias -= read_scores(model, *demos, cfg, device).mean().to(device)


def assess(model, rows, cfg, device):
    """How the scores predict rankings that were not learned from: a dict, and the calibration as lines of text.

    acc: share of pairs in the right order, a tie being wrong; ±: half of its 95% interval, the pairs of one prompt not
    being independent; alike: acc where both answers show their working or neither does; gold: agreement with the rule,
    whatever the labels say; margin: mean lead of the better answer; loss: log-loss in nats; ece: mean gap between
    predicted and true win rate; corr: of score with length in tokens; longer: acc of "the longer answer is better".
    """
    if not rows:
        return {}, ""
    tokens, masks = ([x for row in rows for x in row[name]] for name in ("tokens", "mask"))
    r = read_scores(model, tokens, masks, cfg, device)                    # (N,)  every answer of every row
    length, pairs, start = torch.tensor([float(sum(m)) for m in masks]), [], 0
    for p, row in enumerate(rows):
        texts, ours = row["responses"], "two_digits" in row
        right = [scored(score, row, text, need=False) or 0.0 for text in texts]
        for w, l in ordered(range(len(texts)), row["ranks"]):
            alike = ours and ("," in texts[w]) == ("," in texts[l])
            pairs.append((p, start + w, start + l, alike, right[w] - right[l]))
        start += len(texts)
    p, w, l, alike, better = (torch.tensor(x) for x in zip(*pairs))       # (pairs,) each
    lead, longer = r[w] - r[l], length[w] - length[l]
    found = {"acc": (lead > 0).float().mean(), "±": half_interval((lead > 0).float(), p)}
    if alike.any():
        found["alike"] = (lead[alike] > 0).float().mean()
    if better.any():
        found["gold"] = (lead * better > 0)[better != 0].float().mean()
    sure = lead.abs().sigmoid()                                           # predicted chance of the favourite
    wins = (lead > 0) + 0.5 * (lead == 0)
    bins, lines, gap = ((sure - 0.5) * 10).int().clamp(max=4), "", 0.0
    for b in bins.unique():
        x, y, n = sure[bins == b].mean().item(), wins[bins == b].mean().item(), int((bins == b).sum())
        gap += n / len(lead) * abs(x - y)
        lines += f"    predicted {x:.3f}, won {y:.3f} of {n} pairs\n"
    found |= {"margin": lead.mean(), "loss": F.softplus(-lead).mean(), "ece": gap,
              "longer": ((longer > 0) + 0.5 * (longer == 0)).mean()}
    if length.std() > 0 and r.std() > 0:
        found["corr"] = torch.corrcoef(torch.stack([r, length]))[0, 1]
    return {name: float(x) for name, x in found.items()}, lines


def train(cfg):
    device = setup(cfg.seed)
    check(cfg, prompts=1, answers=2, batch=1, max_new=1, eval_every=1, grad_clip=0)
    check(cfg, lr=0, warmup=0, weight_decay=0, micro_tokens=0, flip=0)
    if cfg.flip > 1:
        raise InputError(f"--flip {cfg.flip}: must be at most 1")

    # policy, preferences and model: all that can be wrong is found here, before the first step
    if not cfg.data:
        make_first(cfg.init, "sft.py", Config.init, cfg.seed)
    policy, tokenizer = load(cfg.init, device, "GPT", cfg.chat, cfg.system)
    set_blocks(policy, cfg.recompute, cfg.compile)
    parts, collected = preferences(cfg, policy, tokenizer)
    rows, val, test = (ready(pairs, tokenizer, policy.cfg.context, pairs is parts[0]) for pairs in parts)
    K = max(len(row["responses"]) for row in rows)
    batch = min(cfg.batch, len(rows))
    steps = len(rows) // batch                                        # one epoch, without a last batch that is not full
    model = ScalarModel(policy, std=(policy.cfg.width + 1) ** -0.5).to(device)
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay)
    demos = demonstrated(cfg, tokenizer, policy.cfg.context)
    if not demos[0]:
        demos = [[row[name][0] for row in rows[:500]] for name in ("tokens", "mask")]    # the answers that people chose
    print(f"reward: {sum(p.numel() for p in model.parameters()):,} parameters on {device.type}, "
          f"{len(parts[0]):,} pairs on {len(rows):,} prompts, {len(val)} to validate, {len(test)} to report")
    memory_plan(device, optimizer, [model], [], cfg.micro_tokens)
    out = Folder(cfg.out, cfg, steps, tokenizer, Guard() if cfg.guard else None)
    first, saved = out.begin(model, optimizer, cfg.resume)
    if collected and not cfg.resume:
        out.write_rows("preferences.jsonl", collected)
        print(f"{len(collected):,} pairs are in {out.path('preferences.jsonl')}")
    if cfg.collect_only:
        return
    before = saved.get("before") or assess(model, test, cfg, device)[0]
    todo = batches(rows, batch, cfg.seed, start=first)

    for step in range(first + 1, steps + 1):
        # 1. update: every answer is read once, all the pairs of a prompt are one element
        t0 = time.perf_counter()
        some, stats = next(todo), Mean()
        filled = lambda name, none: [x for row in some for x in [*row[name]] + [none] * (K - len(row[name]))]
        tokens, mask = pad_batch(filled("tokens", [0]), filled("mask", [0]))
        tokens, mask = tokens.view(batch, K, -1), mask.view(batch, K, -1)                    # (P, K, T)
        tokens_dev, mask_dev = tokens.to(device), mask.to(device)
        ranks = torch.tensor(filled("ranks", -1), device=device).view(batch, K)
        margin = torch.tensor([row.get("margin", 0.0) for row in some], device=device)                           # (P,)
        optimizer.zero_grad()
        for j, t, _ in micro_batches(mask, torch.arange(batch), cfg.micro_tokens, device):
            here = ranks[j] >= 0                                          # (p, K)  the answers that there are
            r = model.score(tokens_dev[j, :, :t][here], mask_dev[j, :, :t][here])
            r = r.new_zeros(here.shape).masked_scatter(here, r)           # (p, K)
            if K == 2:
                loss, found = bradley_terry_loss(r[:, 0], r[:, 1], margin[j], batch)
            else:
                loss, found = ranking_loss(r, ranks[j], batch)
            loss.backward()
            stats.add(found, len(j))
            stats.add({"loss": loss.detach() * batch / len(j)}, len(j))
        lr = set_lr(optimizer, step, steps, cfg.warmup)
        gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()

        # 2. log, evaluate, save
        metrics = stats.read() | {"gnorm": float(gnorm), "lr": lr, "step_s": round(time.perf_counter() - t0, 3)}
        last = step == steps
        if last or step % cfg.eval_every == 0:
            centre(model, demos, cfg, device)
            metrics |= {f"val_{name}": x for name, x in assess(model, val, cfg, device)[0].items()}
        why = out.log(step, "loss acc margin gnorm step_s val_loss val_acc val_alike", **metrics)
        if why:
            out.stop(model, optimizer, step, why)
        if last or out.leaving or step % cfg.eval_every == 0:
            out.save(model, optimizer, step, before=before)

    after, calibration = assess(model, test, cfg, device)
    print(f"\n{len(test)} held-out prompts, before -> after\n{table(before, after)}\n{calibration}")
    some = [(row, *answer) for row in test[:3] for answer in zip(row["responses"], row["tokens"], row["mask"])]
    if some:
        asked, texts, tokens, mask = zip(*some)
        texts = [f"{r:+.2f}  {text}" for r, text in zip(read_scores(model, tokens, mask, cfg, device), texts)]
        print("scores\n" + out.samples("scores", asked, texts, n=len(texts)))
    out.plot("loss val_loss", "acc val_acc", "margin val_margin")


if __name__ == "__main__":
    main(train, Config)
