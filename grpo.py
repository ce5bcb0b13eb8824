"""
GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4.1).

PPO without the critic: sample G answers to one prompt and let their mean reward be the baseline.

    maximise  J(θ) = E  1/G Σ_i 1/|o_i| Σ_t { min(r_it Â_i, clip(r_it, 1-ε, 1+ε) Â_i) - β D_it }             (Eq. 3)

              r_it = π_θ(o_it | q, o_i,<t) / π_old(o_it | q, o_i,<t)
              Â_i  = (R_i - mean(R_1 .. R_G)) / std(R_1 .. R_G),  the same for every token of o_i             (§4.1.2)
              D_it = π_ref/π_θ - log(π_ref/π_θ) - 1,  whose mean over samples of π_θ is KL(π_θ ‖ π_ref)       (Eq. 4)

    paper   θ       q       o_i                π_old     π_ref     r_it   Â_i  R_i     ε         β        G
    here    policy  prompt  tokens[mask == 1]  old_logp  ref_logp  ratio  adv  reward  clip_eps  kl_beta  group

What the paper leaves open, and what is done here: std divides by G - 1 and has 1e-4 added, and a group of equal rewards
has advantage exactly 0. The reward is a rule, and there is no outer loop that retrains a reward model. The price D sits
inside the loss as in the paper; there its value is that of KL(π_θ ‖ π_ref), but its gradient is that of KL(π_ref ‖ π_θ)
(tests/test_grpo.py shows both). 1/|o_i| and std make the gradient a biased one of the mean reward; the tests say by how
much. Temperature divides the logits everywhere, so π is the distribution that was sampled from.

Run:     python grpo.py                under a minute on two CPU cores; out/sft is made first if missing -> out/grpo
Yours:   python grpo.py --init out/mine --data rows.jsonl --max_new 300     {"prompt", "answer"}, or GSM8K's own file
         python grpo.py --init Qwen2.5-0.5B-Instruct --data rows.jsonl       a public model (README, Public models)
Ablate:  --kl_beta 0     --group 2     --epochs 4     --temperature 0.7
"""
import copy
import time
from dataclasses import dataclass

import torch

from model import (Folder, Guard, InputError, Mean, answer_number, answers, batches, check, distinct, encoded, evaluate,
                   freeze, frozen_logp, frozen_scalars, load, load_reward, main, make_first, make_optimizer,
                   memory_plan, micro_batches, read_rows, scored, set_blocks, set_lr, setup, split, states_number, sums,
                   table, told, usable)


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to learn from; "" is the built-in task
    test: str = ""            # JSON lines to report on; "": the twentieth of --data that a hash of the prompt holds out
    init: str = "out/sft"         # folder of the policy to start from, and reference: a checkpoint, or a public model
    reward: str = "rule"          # "rule", the function `score` below, or the folder of a reward model
    out: str = "out/grpo"         # folder for the checkpoint, metrics, samples and curves
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
    clip_eps: float = 0.2         # ε, how far the ratio may leave 1 before its gradient is cut
    kl_beta: float = 0.02         # β, price of leaving the reference; 0 leaves the policy free
    ref_every: int = 0         # rollouts between refreshes of the reference, ref <- a policy + (1 - a) ref; 0: it stays
    ref_mix: float = 0.6          # a, the policy's share in a refresh
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
    max_kl: float = 50.0          # the guard's limit for the KL to the reference, nats an answer
    guard: bool = True            # stop a run that has gone wrong, and say why


# defaults where --init is a public model, or a checkpoint that was made from one
PUBLIC = dict(max_new=512, format_reward=0.1, steps=200, lr=1e-6, warmup=10, eval_every=20, recompute=True)


# -------------------------------------------------------------------------------------------------------- the algorithm


def group_advantage(reward, group):
    """Â of §4.1.2. reward (B,), the `group` answers of one prompt adjacent -> adv (B,); a group of equal rewards gets
    exactly 0."""
    r = reward.view(-1, group)
    adv = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)       # asked exactly: the mean of .3, .3, .3 may miss .3
    return torch.where(equal, 0.0, adv).flatten()


def kl_k3(logp, ref_logp):
    """D of Eq. 4, per token and never negative; its mean over samples of π is KL(π ‖ π_ref). expm1 keeps digits when
    the two are close."""
    return torch.expm1(ref_logp - logp) - (ref_logp - logp)


def grpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None):
    """-J of Eq. 3. logp, old_logp, ref_logp, mask (B, T), mask 1 on answer tokens; adv (B,); n: answers in the whole
    optimiser batch, None if this is all of it. Returns the loss and statistics, means over the tokens under the
    mask."""
    logp, old_logp, ref_logp = (torch.where(mask > 0, x, 0.0) for x in (logp, old_logp, ref_logp))  # or exp is inf
    length = mask.sum(1)                                                  # (B,)    |o_i|
    n = (length > 0).sum().clamp(min=1) if n is None else n
    ratio = (logp - old_logp).exp()                                     # (B, T)  r_it, 1 until the first optimiser step
    adv = adv[:, None]                                                    # (B, 1)  Â_i
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    price = kl_k3(logp, ref_logp)                                         # (B, T)  D_it
    per_token = (surrogate - kl_beta * price) * mask
    loss = -(per_token.sum(1) / length.clamp(min=1)).sum() / n            # 1/G Σ_i 1/|o_i| Σ_t
    with torch.no_grad():
        mean = lambda x: (x * mask).sum() / length.sum().clamp(min=1)
        stats = {"kl": mean(price),
                 "clip_low": mean((ratio < 1 - clip_eps) & (adv < 0)),    # tokens whose gradient the clip has cut
                 "clip_high": mean((ratio > 1 + clip_eps) & (adv > 0))}
    return loss, stats


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
    check(cfg, lr=0, warmup=0, micro_tokens=0, format_reward=0, ref_every=0, ref_mix=0, clip_eps=0, kl_beta=0)
    if not cfg.temperature > 0:
        raise InputError(f"--temperature {cfg.temperature}: must be above 0, or all answers to a prompt are the same")
    if B % cfg.minibatch:
        raise InputError(f"--minibatch {cfg.minibatch} does not divide the {B} answers of --prompts x --group")

    # models and data: all that can be wrong is found here, before the first step
    if not cfg.data:
        make_first(cfg.init, "sft.py", Config.init, cfg.seed)
    policy, tokenizer = load(cfg.init, device, "GPT", cfg.chat, cfg.system)
    set_blocks(policy, cfg.recompute, cfg.compile)
    rows, val, test = prompts(cfg, tokenizer, policy.cfg.context, cfg.reward == "rule")
    if not cfg.data and cfg.init == Config.init:
        make_first(cfg.reward, "reward.py", "out/reward", cfg.seed)
    judge = load_reward(cfg.reward, policy, tokenizer)
    reference = freeze(copy.deepcopy(policy))
    optimizer = make_optimizer(policy, cfg.lr)
    print(f"grpo: {sum(p.numel() for p in policy.parameters()):,} parameters on {device.type}, {len(rows):,} prompts, "
          f"{len(val)} to validate, {len(test)} to report")
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new
    memory_plan(device, optimizer, [policy], [reference, judge], cfg.micro_tokens, B * longest)
    out = Folder(cfg.out, cfg, cfg.steps, tokenizer, Guard(cfg.max_kl, val=len(val)) if cfg.guard else None)
    first, saved = out.begin(policy, optimizer, cfg.resume)
    if saved:
        reference.load_state_dict(saved["reference"])
    before, texts_before = saved.get("before") or validate(policy, tokenizer, test, cfg, judge, reference, samples=8)
    if first == 0:
        found, _ = validate(policy, tokenizer, val, cfg, judge, reference)
        out.log(0, "val_greedy val_acc val_length val_score", **{f"val_{name}": x for name, x in found.items()})
    todo = batches(rows, cfg.prompts, cfg.seed, start=first)
    once = cfg.epochs == 1 and cfg.minibatch == B             # one update a rollout: old log-probs are the current ones

    for step in range(first + 1, cfg.steps + 1):
        # 1. rollout: G answers to every prompt
        t0, stats = time.perf_counter(), Mean()
        batch = next(todo)
        asked = [row["ids"] for row in batch]
        tokens, mask, sampled_logp = policy.generate(asked, cfg.group, cfg.max_new, cfg.temperature)      # (B, T) each
        host_mask = mask.cpu()                               # what is chosen by it is found without waiting for the GPU
        ref_logp, _ = frozen_logp(reference, tokens, host_mask, cfg.temperature, cfg.micro_tokens)
        if not once:
            old_logp, _ = frozen_logp(policy, tokens, host_mask, cfg.temperature, cfg.micro_tokens)

        # 2. reward: the rule or the reward model reads the answer, if it ended
        texts = answers(tokenizer, tokens, mask, policy.cfg.stop)
        each = [row for row in batch for _ in range(cfg.group)]
        reward, gold = rewards(cfg, judge, each, tokens, host_mask, texts)                                # (B,)
        stats.add(told(reward, gold, host_mask, texts, cfg.group))

        # 3. advantage: no critic, the group is the baseline
        adv = group_advantage(reward, cfg.group).to(device)
        stats.add({"dead": (adv.view(-1, cfg.group) == 0).all(1).float().mean()})
        t1 = time.perf_counter()

        # 4. update: clipped passes over the same rollout
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup, floor=0.1)
        for _ in range(cfg.epochs):
            for i in torch.randperm(B).split(cfg.minibatch):
                optimizer.zero_grad()
                for j, t, at in micro_batches(host_mask, i, cfg.micro_tokens, device):
                    logp, entropy = policy.token_logp(tokens[j, :t], None, cfg.temperature, at)
                    old = logp.detach() if once else old_logp[j, :t]
                    loss, found = grpo_loss(logp, old, ref_logp[j, :t], adv[j], mask[j, :t],
                                            cfg.clip_eps, cfg.kl_beta, len(i))
                    loss.backward()
                    gap = (old - sampled_logp[j, :t]).abs().sum()    # the sampler and the scorer are one model: about 0
                    stats.add(found | {"ent": entropy.sum() / len(at), "gap": gap / len(at)}, len(at))
                gnorm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
                optimizer.step()
                stats.add({"gnorm": gnorm})
        if cfg.ref_every and step % cfg.ref_every == 0:
            with torch.no_grad():
                for ref, new in zip(reference.parameters(), policy.parameters()):
                    ref.lerp_(new.to(ref.dtype), cfg.ref_mix)
        metrics = stats.read() | {"lr": lr}                               # waits for the GPU
        t2 = time.perf_counter()

        # 5. log, evaluate, save
        metrics |= {"tokens": round(metrics["len"] * B), "dist2": distinct(tokens, host_mask)}
        metrics["kl_seq"] = metrics["kl"] * metrics["len"]
        last = step == cfg.steps
        if last or step % cfg.eval_every == 0:
            found, _ = validate(policy, tokenizer, val, cfg, judge, reference)
            metrics |= {f"val_{name}": x for name, x in found.items()}
        metrics |= {"gen_s": round(t1 - t0, 3), "upd_s": round(t2 - t1, 3), "tok_s": int(metrics["tokens"] / (t2 - t0))}
        shown = "reward gold dead len end kl ent clip_low clip_high gnorm gen_s upd_s tok_s val_greedy val_acc"
        why = out.log(step, shown, **metrics)
        if why:
            out.stop(policy, optimizer, step, why)
        if last or out.leaving or step % cfg.eval_every == 0:
            out.save(policy, optimizer, step, reference=reference.state_dict(), before=(before, texts_before))

    after, texts = validate(policy, tokenizer, test, cfg, judge, reference, samples=8)
    print(f"\n{len(test)} held-out prompts, before -> after\n{table(before, after)}")
    print("before\n" + out.samples("before", test, texts_before) + "after\n" + out.samples("after", test, texts))
    out.plot("reward val_acc val_greedy", "len val_length", "kl_seq", "ent")


if __name__ == "__main__":
    main(train, Config)
