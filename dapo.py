"""
DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (Yu et al. 2025, arXiv 2503.14476).

GRPO with four changes, and with the KL and its reference model taken out: `diff grpo.py dapo.py` is the paper.

    maximise  J(θ) = E  1/Σ_i |o_i|  Σ_i Σ_t  min(r_it Â_i, clip(r_it, 1-ε_low, 1+ε_high) Â_i)                   (Eq. 8)
              over groups with  0 < #{i: o_i is right} < G

              r_it = π_θ(o_it | q, o_i,<t) / π_old(o_it | q, o_i,<t),   Â_i = (R_i - mean(R)) / std(R)           (Eq. 9)

    1. clip-higher         ε_high > ε_low: at 1.28 a token of .01 may rise to .0128 instead of .012, so that rare tokens
                           are not kept down; ε_low stays small, so that none is pushed to 0                    (Eq. 10)
    2. dynamic sampling    groups all right or all wrong have Â = 0; others are sampled in their place, by the current
                           policy, until the batch is full                                                      (Eq. 11)
    3. token-level loss    one mean over all tokens of the optimiser batch: a token of a long answer weighs as much as
                           one of a short answer                                                                (Eq. 12)
    4. overlong shaping    R_i = rule + (L_max - L_cache - |o_i|) / L_cache, the second part clipped to [-1, 0]:
                           answers that ramble lose up to 1, all others nothing                                 (Eq. 13)

    paper   θ       o_i                π_old     r_it   Â_i  ε_low, ε_high       G      L_max    L_cache
    here    policy  tokens[mask == 1]  old_logp  ratio  adv  clip_low, clip_high  group  max_new  overlong_cache

What differs from the paper: the rule gives 1 and 0, not 1 and -1, so that a whole punishment is as large as being
wrong, where there it is half of that. Sampling stops after `tries`, and what is missing is filled up with groups that
were put aside and have no advantage; with --tries 1 there is no dynamic sampling. A reward model's scores hardly ever
tie, so with --reward FOLDER every group counts as informative, and the punishment is in units of its scores. Filtering
changes which prompts are learned from, so reward, accuracy, length and end rate are logged of all that were sampled,
kept or not; entropy, the clip and distinct-2 are of the batch that is learned from.

Run:     python dapo.py                about a minute on two CPU cores; out/sft is made first if missing -> out/dapo
Yours:   python dapo.py --init out/mine --data rows.jsonl --max_new 300 --overlong_cache 60
         python dapo.py --init Qwen2.5-0.5B-Instruct --data rows.jsonl       a public model (README, Public models)
Ablate:  --clip_high 0.2     --tries 1     --overlong_cache 0
"""
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import (Folder, Guard, InputError, Mean, answer_number, answers, batches, check, distinct, encoded, evaluate,
                   frozen_logp, frozen_scalars, load, load_reward, main, make_first, make_optimizer, memory_plan,
                   micro_batches, read_rows, scored, set_blocks, set_lr, setup, split, states_number, sums, table, told,
                   usable)


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to learn from; "" is the built-in task
    test: str = ""            # JSON lines to report on; "": the twentieth of --data that a hash of the prompt holds out
    init: str = "out/sft"         # folder of the policy to start from: a checkpoint, or a public model
    reward: str = "rule"          # "rule", the function `score` below, or the folder of a reward model
    out: str = "out/dapo"         # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": a lone prompt is a user's turn, "plain": bare text, "auto": as --init has it
    system: str = ""              # system line of a chat that has none; "" keeps that of --init
    seed: int = 0                 # of the order of the data and the sampling
    resume: bool = False          # go on with the run in --out
    # rollout
    prompts: int = 32             # prompts in a rollout
    group: int = 8                # G, answers to each; their mean reward is the baseline
    max_new: int = 24             # longest answer in tokens; one that has not ended by then is cut
    temperature: float = 1.0      # divides the logits, in sampling and in every log-prob
    no_end_reward: float = 0.0    # reward of an answer that was cut, or the rollout's worst score if that is lower
    format_reward: float = 0.0    # earned besides, under the rule, by an answer that says where its number is
    # objective
    clip_low: float = 0.2         # ε_low, how far the ratio may fall below 1 before its gradient is cut
    clip_high: float = 0.28       # ε_high, how far it may rise above 1
    tries: int = 10               # at most so often are prompts sampled for one rollout; 1: no dynamic sampling
    overlong_cache: int = 6       # L_cache, the last tokens before max_new, each dearer than the one before; 0: free
    # optimisation
    steps: int = 50               # rollouts
    epochs: int = 1               # passes over each rollout
    minibatch: int = 64           # answers in an optimiser step; divides prompts * group
    micro_tokens: int = 0         # tokens in one forward: bounds the memory, changes no gradient; 0: by device
    recompute: bool = False       # keep each block's input alone and run it again in backward: more time, less memory
    compile: bool = False         # torch.compile the blocks, where that works: a slow start, faster updates
    lr: float = 1.5e-4            # peak rate of AdamW; for a real pretrained model 1e-6
    warmup: int = 3               # rollouts of linear warm-up, before half a cosine down to a tenth
    grad_clip: float = 1.0        # largest gradient norm
    # watching
    eval_every: int = 10          # rollouts between evaluations on validation prompts, and between checkpoints
    guard: bool = True            # stop a run that has gone wrong, and say why


# defaults where --init is a public model, or a checkpoint that was made from one
PUBLIC = dict(max_new=512, format_reward=0.1, overlong_cache=128, steps=200, lr=1e-6, warmup=10, eval_every=20,
              recompute=True)


# -------------------------------------------------------------------------------------------------------- the algorithm


def group_advantage(reward, group):
    """Â of §4.1.2. reward (B,), the `group` answers of one prompt adjacent -> adv (B,); a group of equal rewards gets
    exactly 0."""
    r = reward.view(-1, group)
    adv = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)       # asked exactly: the mean of .3, .3, .3 may miss .3
    return torch.where(equal, 0.0, adv).flatten()


def informative(accuracy):
    """Eq. 11. accuracy (P,), of each group by the rule alone -> (P,) whether some of its answers are right and some
    wrong."""
    return (accuracy > 0) & (accuracy < 1)


def soft_overlong(length, max_len, cache):
    """R_length of Eq. 13, at most 0. length (B,) in tokens, the end token included; max_len: L_max; cache: L_cache."""
    return ((max_len - cache - length) / max(cache, 1)).clamp(-1, 0)


def dapo_loss(logp, old_logp, adv, mask, clip_low, clip_high, n=None):
    """-J of Eq. 8. logp, old_logp, mask (B, T), mask 1 on answer tokens; adv (B,); n: answer tokens in the whole
    optimiser batch, None if this is all of it. Returns the loss and statistics, means over the tokens under the
    mask."""
    logp, old_logp = (torch.where(mask > 0, x, 0.0) for x in (logp, old_logp))               # or exp is inf
    n = mask.sum().clamp(min=1) if n is None else n                       #         Σ_i |o_i|
    ratio = (logp - old_logp).exp()                                     # (B, T)  r_it, 1 until the first optimiser step
    adv = adv[:, None]                                                    # (B, 1)  Â_i
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    loss = -(surrogate * mask).sum() / n                                  # 1/Σ_i |o_i| Σ_i Σ_t
    with torch.no_grad():
        mean = lambda x: (x * mask).sum() / mask.sum().clamp(min=1)
        stats = {"clip_low": mean((ratio < 1 - clip_low) & (adv < 0)),    # tokens whose gradient the clip has cut
                 "clip_high": mean((ratio > 1 + clip_high) & (adv > 0))}
    return loss, stats


def full(parts, keep, prompts, group):
    """A whole batch out of several rollouts. parts: tuples of tensors, (b group,) or (b group, T) of any width T; keep:
    which groups of all of them are informative -> the same tensors for `prompts` groups, the informative ones and, if
    they are too few, the first of the others."""
    T = max(x.size(1) for part in parts for x in part if x.dim() == 2)
    wide = lambda x: F.pad(x, (0, T - x.size(1))) if x.dim() == 2 else x
    chosen = keep.int().argsort(descending=True, stable=True)[:prompts].sort()[0]            # (prompts,)
    rows = (chosen[:, None] * group + torch.arange(group)).flatten()                         # (B,)
    return [torch.cat(list(map(wide, some)))[rows.to(some[0].device)] for some in zip(*parts)]


# ------------------------------------------------------------------------------------------------------------- the task


def score(row, text):
    """1 for a right answer, 0 for a wrong one, None where the row does not say. The built-in sums: one '#', then the
    sum in two digits. Your own rows: the number of "answer"."""
    if "two_digits" in row:
        return float(text.count("#") == 1 and text.split("#")[1] == row["two_digits"])
    gold = answer_number(str(row.get("answer")))
    return None if gold is None else float(answer_number(text) == gold)


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


def rewards(cfg, judge, rows, tokens, mask, texts):
    """What every answer earns, (B,): the score of the reward model, or the rule's where judge is None; if it was cut,
    no_end_reward, or the worst score here where that is lower: or being cut would beat being wrong. And the rule's
    opinion alone, (B,), None where a row does not say what is right. A row for each answer; mask on the CPU, as both
    results are."""
    ended = torch.tensor([text is not None for text in texts])
    gold = [scored(score, row, text or "", need=not judge) for row, text in zip(rows, texts)]
    gold = None if None in gold else torch.where(ended, torch.tensor(gold), 0.0)
    earned = frozen_scalars(judge, tokens, mask, cfg.micro_tokens)[1].cpu() if judge else gold
    if cfg.format_reward and not judge:
        earned = earned + cfg.format_reward * torch.tensor([float(states_number(text or "")) for text in texts])
    if not earned[ended].isfinite().all():
        raise InputError(f"--reward {cfg.reward}: gave an answer a score that is not finite")
    return torch.where(ended, earned, min([cfg.no_end_reward, *earned[ended].tolist()])), gold


# ----------------------------------------------------------------------------------------------------------- the script


def validate(policy, tokenizer, rows, cfg, judge, reference=None, samples=1):
    """What `evaluate` says of held-out prompts, with the reward model's score and the KL to the reference, k1 in nats
    an answer, of an answer each at temperature 1."""
    def watch(rows, tokens, mask, texts):
        seen = {"score": rewards(cfg, judge, rows, tokens, mask, texts)[0]} if judge else {}
        if reference:
            logp, ref_logp = (frozen_logp(x, tokens, mask, 1.0, cfg.micro_tokens)[0] for x in (policy, reference))
            seen["kl"] = (logp - ref_logp).sum(1)
        return seen

    return evaluate(policy, tokenizer, rows, score, cfg.max_new, samples, watch=watch)


def train(cfg):
    device = setup(cfg.seed)
    B = cfg.prompts * cfg.group
    check(cfg, steps=1, prompts=1, group=2, epochs=1, minibatch=1, max_new=1, eval_every=1, grad_clip=0)
    check(cfg, lr=0, warmup=0, micro_tokens=0, format_reward=0, clip_low=0, clip_high=0, tries=1, overlong_cache=0)
    if not cfg.temperature > 0:
        raise InputError(f"--temperature {cfg.temperature}: must be above 0, or all answers to a prompt are the same")
    if B % cfg.minibatch:
        raise InputError(f"--minibatch {cfg.minibatch} does not divide the {B} answers of --prompts x --group")
    if cfg.overlong_cache > cfg.max_new:
        raise InputError(f"--overlong_cache {cfg.overlong_cache}: must be at most --max_new {cfg.max_new}")

    # models and data: all that can be wrong is found here, before the first step
    if not cfg.data:
        make_first(cfg.init, "sft.py", Config.init, cfg.seed)
    policy, tokenizer = load(cfg.init, device, "GPT", cfg.chat, cfg.system)
    set_blocks(policy, cfg.recompute, cfg.compile)
    rows, val, test = prompts(cfg, tokenizer, policy.cfg.context, cfg.reward == "rule")
    if not cfg.data and cfg.init == Config.init:
        make_first(cfg.reward, "reward.py", "out/reward", cfg.seed)
    judge = load_reward(cfg.reward, policy, tokenizer)
    optimizer = make_optimizer(policy, cfg.lr)
    print(f"dapo: {sum(p.numel() for p in policy.parameters()):,} parameters on {device.type}, {len(rows):,} prompts, "
          f"{len(val)} to validate, {len(test)} to report")
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new
    memory_plan(device, optimizer, [policy], [judge], cfg.micro_tokens, B * longest)
    out = Folder(cfg.out, cfg, cfg.steps, tokenizer, Guard(val=len(val)) if cfg.guard else None)
    first, saved = out.begin(policy, optimizer, cfg.resume)
    before, texts_before = saved.get("before") or validate(policy, tokenizer, test, cfg, judge, samples=8)
    if first == 0:
        found, _ = validate(policy, tokenizer, val, cfg, judge)
        out.log(0, "val_greedy val_acc val_length val_score", **{f"val_{name}": x for name, x in found.items()})
    used = saved.get("used", 0)                                       # prompts, so far
    todo = batches(rows, 1, cfg.seed, start=used)
    once = cfg.epochs == 1 and cfg.minibatch == B             # one update a rollout: old log-probs are the current ones

    for step in range(first + 1, cfg.steps + 1):
        # 1. rollout: G answers to every prompt, and to others in place of those that teach nothing (Eq. 11)
        t0, stats = time.perf_counter(), Mean()
        parts, keep = [], torch.zeros(0, dtype=torch.bool)
        while keep.sum() < cfg.prompts and len(parts) < cfg.tries:
            batch = [next(todo)[0] for _ in range(cfg.prompts - int(keep.sum()))]
            asked = [row["ids"] for row in batch]
            tokens, mask, sampled_logp = policy.generate(asked, cfg.group, cfg.max_new, cfg.temperature)  # (B, T) each
            host_mask = mask.cpu()                           # what is chosen by it is found without waiting for the GPU

            # 2. reward: the rule or the reward model reads the answer, if it ended; long ones pay (Eq. 13)
            texts = answers(tokenizer, tokens, mask, policy.cfg.stop)
            each = [row for row in batch for _ in range(cfg.group)]
            reward, gold = rewards(cfg, judge, each, tokens, host_mask, texts)                            # (B,)
            reward = reward + soft_overlong(host_mask.sum(1), cfg.max_new, cfg.overlong_cache)
            stats.add(told(reward, gold, host_mask, texts, cfg.group), len(batch))
            good = torch.ones(len(batch)) if judge else informative((gold > 0).float().view(-1, cfg.group).mean(1))
            keep, good = torch.cat([keep, good.bool()]), good.repeat_interleave(cfg.group)                # (B,)
            parts.append((tokens, mask, host_mask, sampled_logp, reward, good))
        tokens, mask, host_mask, sampled_logp, reward, good = full(parts, keep, cfg.prompts, cfg.group)
        if not once:
            old_logp, _ = frozen_logp(policy, tokens, host_mask, cfg.temperature, cfg.micro_tokens)
        used += len(keep)
        stats.add({"dead": 1 - keep.float().mean()})

        # 3. advantage: no critic, the group is the baseline; a group that only fills up has none, whatever its lengths
        adv = (group_advantage(reward, cfg.group) * good).to(device)
        t1 = time.perf_counter()

        # 4. update: clipped passes over the same rollout
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup, floor=0.1)
        for _ in range(cfg.epochs):
            for i in torch.randperm(B).split(cfg.minibatch):
                n = int(host_mask[i].sum())                               # answer tokens in this optimiser step
                optimizer.zero_grad()
                for j, t, at in micro_batches(host_mask, i, cfg.micro_tokens, device):
                    logp, entropy = policy.token_logp(tokens[j, :t], None, cfg.temperature, at)
                    old = logp.detach() if once else old_logp[j, :t]
                    loss, found = dapo_loss(logp, old, adv[j], mask[j, :t], cfg.clip_low, cfg.clip_high, n)
                    loss.backward()
                    gap = (old - sampled_logp[j, :t]).abs().sum()    # the sampler and the scorer are one model: about 0
                    stats.add(found | {"ent": entropy.sum() / len(at), "gap": gap / len(at)}, len(at))
                gnorm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
                optimizer.step()
                stats.add({"gnorm": gnorm})
        metrics = stats.read() | {"lr": lr}                               # waits for the GPU
        t2 = time.perf_counter()

        # 5. log, evaluate, save
        metrics |= {"tokens": round(metrics["len"] * len(keep) * cfg.group), "dist2": distinct(tokens, host_mask)}
        metrics["tries"] = len(parts)
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            found, _ = validate(policy, tokenizer, val, cfg, judge)
            metrics |= {f"val_{name}": x for name, x in found.items()}
        metrics |= {"gen_s": round(t1 - t0, 3), "upd_s": round(t2 - t1, 3), "tok_s": int(metrics["tokens"] / (t2 - t0))}
        shown = "reward gold dead tries len end ent clip_low clip_high gnorm gen_s upd_s tok_s val_greedy val_acc"
        why = out.log(step, shown, **metrics)
        if why:
            out.stop(policy, optimizer, step, why)
        if last or out.leaving or step % cfg.eval_every == 0:
            out.save(policy, optimizer, step, used=used, before=(before, texts_before))

    after, texts = validate(policy, tokenizer, test, cfg, judge, samples=8)
    print(f"\n{len(test)} held-out prompts, before -> after\n{table(before, after)}")
    print("before\n" + out.samples("before", test, texts_before) + "after\n" + out.samples("after", test, texts))
    out.plot("reward val_acc val_greedy", "len val_length", "dead", "ent")


if __name__ == "__main__":
    main(train, Config)
