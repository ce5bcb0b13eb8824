"""
DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).

The policy is its own reward model: fit it to comparisons, without a reward model, a critic or a sample of its own.

    1. RLHF wants the policy      max_π  E_{y~π} r(x, y) - β KL(π(.|x) ‖ π_ref(.|x))                             (Eq. 3)
    2. that has a closed form     π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x),  Z(x) = Σ_y π_ref(y|x) exp(r(x, y)/β)
                                  for what 1 maximises is β log Z(x) - β KL(π ‖ π*)                              (Eq. 4)
    3. and tells its reward       r(x, y) = β log π*(y|x)/π_ref(y|x) + β log Z(x)                                (Eq. 5)
    4. people choose by it        P(y_w > y_l | x) = σ(r(x, y_w) - r(x, y_l))               Bradley-Terry        (Eq. 1)
    5. and Z(x) cancels           minimise  L(θ) = - E log σ(β h),                                               (Eq. 7)
                                  h = log π_θ(y_w|x)/π_ref(y_w|x) - log π_θ(y_l|x)/π_ref(y_l|x)

    gradient    ∇L(θ) = - E β σ(-β h) [∇ log π_θ(y_w|x) - ∇ log π_θ(y_l|x)]:  pairs in the wrong order pull hardest

    paper   π_θ     log π_θ(y|x), a sum over tokens   log π_ref(y|x)   β     y_w, y_l          β log π_θ/π_ref
    here    policy  logp_w, logp_l (P,)               ref_w, ref_l     beta  chosen, rejected  reward_w, reward_l

h sees a difference alone, so both log-probs may fall, and what they lose goes to answers that nobody compared; watch
logp_w. Beyond its best step plain DPO (--nll 0) falls in this way here too; the README shows the curve. The default
adds `nll` times SFT's loss on the chosen answers (as in arXiv 2404.19733, there a mean per answer), which holds
them up. Label smoothing ε is cDPO: if a share ε of the labels is wrong, the optimum is no longer infinite but σ(β h) =
1 - ε. The reference is the policy before its first step: its log-probs are computed then, once for all pairs, and no
second model is ever in memory.

Run:     python dpo.py        half a minute on two CPU cores, after out/sft and its comparisons -> out/dpo
Yours:   python dpo.py --data pairs.jsonl --init out/mine       {"prompt", "chosen", "rejected"}, HH-RLHF's own files,
                                                                or {"prompt", "responses": [best, ..., worst]}
Ablate:  --nll 0 --lr 2e-5     --beta 0.5     --smoothing 0.1
"""
import hashlib
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import (Folder, Guard, InputError, Mean, answer_number, batches, check, encode_answer, encoded, evaluate,
                   frozen_logp, half_interval, load, main, make_first, make_optimizer, memory_plan, micro_batches,
                   pad_batch, read_checkpoint, read_preferences, set_blocks, set_lr, setup, split, sums, table, usable)

PAIRS = "out/reward/preferences.jsonl"                                    # where reward.py leaves what it collected


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines of preferences; "" is the built-in task's, out/reward/preferences.jsonl
    test: str = ""            # JSON lines to report on; "": the twentieth of --data that a hash of the prompt holds out
    init: str = "out/sft"         # folder of the policy to start from, and reference: a checkpoint, or a public model
    out: str = "out/dpo"          # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": a lone prompt is a user's turn, "plain": bare text, "auto": as --init has it
    system: str = ""              # system line of a chat that has none; "" keeps that of --init
    seed: int = 0                 # of the order of the data and the sampling
    resume: bool = False          # go on with the run in --out
    # objective
    beta: float = 0.1             # β, the price of leaving the reference in the objective that this is the optimum of
    smoothing: float = 0.0        # ε of cDPO, the share of pairs believed to be the wrong way round, below .5
    nll: float = 3.0              # weight of SFT's loss on the chosen answers, nats a token; 0 is plain DPO
    # optimisation
    epochs: int = 1               # passes over the pairs
    batch: int = 64               # pairs in an optimiser step
    micro_tokens: int = 0         # tokens in one forward: bounds the memory, changes no gradient; 0: by device
    recompute: bool = False       # keep each block's input alone and run it again in backward: more time, less memory
    compile: bool = False         # torch.compile the blocks, where that works: a slow start, faster updates
    lr: float = 1e-4              # peak rate of AdamW; for a real pretrained model 5e-7
    warmup: int = 5               # steps of linear warm-up, before half a cosine down to 0
    grad_clip: float = 1.0        # largest gradient norm
    # watching
    max_new: int = 24             # longest answer in the evaluation, tokens
    eval_every: int = 20          # steps between evaluations on validation prompts, and between checkpoints
    guard: bool = True            # stop a run that has gone wrong, and say why


# defaults where --init is a public model, or a checkpoint that was made from one
PUBLIC = dict(nll=0.0, lr=5e-7, warmup=10, max_new=512, eval_every=50, recompute=True)


# -------------------------------------------------------------------------------------------------------- the algorithm


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta, smoothing=0.0, n=None):
    """Eq. 7, and cDPO with smoothing > 0. logp_w, logp_l, ref_w, ref_l (P,) log-probs of the chosen and the rejected
    answers, summed over their tokens; n: pairs in the whole optimiser batch, None if this is all of it. Returns the
    loss and statistics, means over the pairs: implicit rewards of both, their difference, how often it is positive, and
    the policy's log-probs themselves."""
    reward_w, reward_l = beta * (logp_w - ref_w), beta * (logp_l - ref_l)                    # (P,)    β log π_θ/π_ref
    margin = reward_w - reward_l                                                             # (P,)    β h
    per_pair = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    loss = per_pair.sum() / (len(margin) if n is None else n)
    ordered = (logp_w - ref_w > logp_l - ref_l).float()
    stats = {"reward_w": reward_w, "reward_l": reward_l, "margin": margin, "pair_acc": ordered, "logp_w": logp_w,
             "logp_l": logp_l}
    return loss, {name: x.detach().mean() for name, x in stats.items()}


# ------------------------------------------------------------------------------------------------------------- the task


def score(row, text):
    """1 for a right answer, 0 for a wrong one, None where the row does not say. The built-in sums: one '#', then the
    sum in two digits. Your own rows: the number of "answer"."""
    if "two_digits" in row:
        return float(text.count("#") == 1 and text.split("#")[1] == row["two_digits"])
    gold = answer_number(str(row.get("answer")))
    return None if gold is None else float(answer_number(text) == gold)


def comparisons(cfg, tokenizer, context):
    """Pairs to learn from, to validate on and to report on, each with the "tokens" of prompt, answer and end token and
    the "mask" of its two answers, the chosen one first."""
    parts = split(*[read_preferences(path) for path in (cfg.data or PAIRS, cfg.test) if path])
    for pairs in parts:
        for row in pairs:
            both = [encode_answer(tokenizer, row, row[which]) for which in ("chosen", "rejected")]
            row["tokens"], row["mask"] = zip(*both)
    fits = lambda row: max(map(len, row["tokens"])) <= context
    why = f"an answer is longer than the context of {context} tokens"
    return [usable(pairs, fits, why, need=pairs is parts[0]) for pairs in parts]


def questions(pairs, which, cfg, tokenizer, context):
    """Prompts to try the policy on: those of the pairs, or, where they are of the built-in task, all that it holds out:
    a prompt whose answers are all right or all wrong has no pairs."""
    builtin = any("two_digits" in row for row in pairs)
    size = {"val": 500, "test": 1_000}[which]
    rows = sums(size, which) if builtin else {row["prompt"]: row for row in pairs}.values()
    return encoded(rows, tokenizer, cfg.max_new, context, need=False)


# ----------------------------------------------------------------------------------------------------------- the script


def stacked(rows):
    """tokens, mask (P, 2, T) of pairs, the chosen answer first."""
    tokens, mask = pad_batch(*[[x for row in rows for x in row[name]] for name in ("tokens", "mask")])
    return tokens.view(len(rows), 2, -1), mask.view(len(rows), 2, -1)


def summed_logp(model, rows, cfg, device):
    """log π(y|x) of both answers of every pair, (P, 2), without gradient."""
    found = [torch.zeros(0, 2)]
    for i in range(0, len(rows), 256):
        tokens, mask = (x.flatten(0, 1) for x in stacked(rows[i:i + 256]))
        logp, _ = frozen_logp(model, tokens.to(device), mask, 1.0, cfg.micro_tokens)
        found.append(logp.sum(1).view(-1, 2).cpu())
    return torch.cat(found)


def held_out(policy, tokenizer, asked, pairs, cfg, device, samples=1):
    """What `evaluate` says of the answers to held-out prompts, and dpo_loss of held-out pairs, with ±, half of the 95%
    interval of pair_acc: a dict, and the greedy answers."""
    found, texts = evaluate(policy, tokenizer, asked, score, cfg.max_new, samples)
    if pairs:
        logp, ref = summed_logp(policy, pairs, cfg, device), torch.tensor([row["ref"] for row in pairs])
        loss, stats = dpo_loss(*logp.T, *ref.T, cfg.beta, cfg.smoothing)
        right = (logp - ref)[:, 0] > (logp - ref)[:, 1]                   # of equal ones, as at the start, neither
        prompts = {row["prompt"]: i for i, row in enumerate(pairs)}
        group = torch.tensor([prompts[row["prompt"]] for row in pairs])
        stats |= {"±": half_interval(right.float(), group), "pair_loss": loss}
        found |= {name: x.item() for name, x in stats.items()}
    return found, texts


def train(cfg):
    device = setup(cfg.seed)
    check(cfg, epochs=1, batch=1, max_new=1, eval_every=1, grad_clip=0)
    check(cfg, lr=0, warmup=0, micro_tokens=0, beta=0, smoothing=0, nll=0)
    if cfg.smoothing >= 0.5:
        raise InputError(f"--smoothing {cfg.smoothing}: must be below 0.5, or the labels say nothing or the opposite")

    # policy and pairs: all that can be wrong is found here, before the first step
    if not cfg.data:
        make_first(cfg.init, "sft.py", Config.init, cfg.seed)
        if cfg.init == Config.init and not os.path.exists(PAIRS):
            make_first("out/reward", "reward.py", "out/reward", cfg.seed, "--collect_only")
    policy, tokenizer = load(cfg.init, device, "GPT", cfg.chat, cfg.system)
    set_blocks(policy, cfg.recompute, cfg.compile)
    rows, val, test = comparisons(cfg, tokenizer, policy.cfg.context)
    asked = questions(val, "val", cfg, tokenizer, policy.cfg.context)
    asked_test = questions(test, "test", cfg, tokenizer, policy.cfg.context)
    batch = min(cfg.batch, len(rows))
    steps = cfg.epochs * len(rows) // batch
    optimizer = make_optimizer(policy, cfg.lr)
    print(f"dpo: {sum(p.numel() for p in policy.parameters()):,} parameters on {device.type}, {len(rows):,} pairs, "
          f"{len(val)} to validate, {len(test)} to report")
    memory_plan(device, optimizer, [policy], [], cfg.micro_tokens)
    which = hashlib.sha256(repr([row["tokens"] for row in rows + val + test]).encode()).hexdigest()
    if cfg.resume and read_checkpoint(cfg.out)["more"]["which"] != which:
        raise InputError(f"{cfg.out}: this run began with other pairs than {cfg.data or PAIRS} has now")
    out = Folder(cfg.out, cfg, steps, tokenizer, Guard() if cfg.guard else None)
    first, saved = out.begin(policy, optimizer, cfg.resume)
    ref = saved["ref"] if saved else [summed_logp(policy, part, cfg, device) for part in (rows, val, test)]   # (P, 2)
    for row, both in zip(rows + val + test, torch.cat(ref).tolist()):
        row["ref"] = both                                             # until step 1 the policy is its own reference
    before, texts_before = saved.get("before") or held_out(policy, tokenizer, asked_test, test, cfg, device, samples=8)
    if first == 0:
        found, _ = held_out(policy, tokenizer, asked, val, cfg, device)
        out.log(0, "val_greedy val_acc val_length", **{f"val_{name}": x for name, x in found.items()})
    todo = batches(rows, batch, cfg.seed, start=first)

    for step in range(first + 1, steps + 1):
        # 1. update: both answers of a pair in one forward
        t0 = time.perf_counter()
        some, stats = next(todo), Mean()
        tokens, mask = stacked(some)                                                         # (P, 2, T)
        n, tokens_dev = mask[:, 0].sum().item(), tokens.to(device)                         # n: tokens of chosen answers
        ref_w, ref_l = torch.tensor([row["ref"] for row in some], device=device).T           # (P,)
        optimizer.zero_grad()
        for j, t, at in micro_batches(mask, torch.arange(batch), cfg.micro_tokens, device):
            logp, entropy = policy.token_logp(tokens_dev[j, :, :t].flatten(0, 1), None, 1.0, at)              # (2 p, t)
            logp_w, logp_l = logp.sum(1).view(-1, 2).T                                       # (p,)
            loss, found = dpo_loss(logp_w, logp_l, ref_w[j], ref_l[j], cfg.beta, cfg.smoothing, batch)
            (loss - cfg.nll * logp_w.sum() / n).backward()                                # Eq. 7, and SFT's loss on y_w
            stats.add(found | {"loss": loss.detach() * batch / len(j)}, len(j))
            stats.add({"ent": entropy.sum() / len(at)}, len(at))
        lr = set_lr(optimizer, step, steps, cfg.warmup)
        gnorm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()

        # 2. log, evaluate, save
        metrics = stats.read() | {"gnorm": float(gnorm), "lr": lr, "epoch": step * batch / len(rows)}
        metrics["step_s"] = round(time.perf_counter() - t0, 3)
        last = step == steps
        if last or step % cfg.eval_every == 0:
            found, _ = held_out(policy, tokenizer, asked, val, cfg, device)
            metrics |= {f"val_{name}": x for name, x in found.items()}
        shown = "loss pair_acc margin reward_w reward_l logp_w logp_l gnorm step_s val_pair_acc val_greedy val_acc"
        why = out.log(step, shown, **metrics)
        if why:
            out.stop(policy, optimizer, step, why)
        if last or out.leaving or step % cfg.eval_every == 0:
            out.save(policy, optimizer, step, ref=ref, which=which, before=(before, texts_before))

    after, texts = held_out(policy, tokenizer, asked_test, test, cfg, device, samples=8)
    print(f"\n{len(asked_test)} held-out prompts, {len(test)} pairs, before -> after\n{table(before, after)}")
    print("before\n" + out.samples("before", asked_test, texts_before)
          + "after\n" + out.samples("after", asked_test, texts))
    out.plot("loss val_pair_loss", "val_acc val_greedy", "reward_w reward_l", "logp_w logp_l", "val_length", "ent")


if __name__ == "__main__":
    main(train, Config)
