"""
PPO for RLHF: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347) on a learned reward with a price on
leaving the SFT model (Ziegler et al. 2019, arXiv 1909.08593; InstructGPT, arXiv 2203.02155).

Answer, let a reward model score the answer, and let a critic say, token by token, what was better than expected.

    maximise  E_{y ~ π_θ} [ r(x, y) - β log(π_θ(y | x) / π_ref(y | x)) ]              the RLHF objective             (1)

    R_t  = -β (log π_old(y_t) - log π_ref(y_t)),  and + r(x, y) on the last token     the reward, token by token     (2)
    δ_t  = R_t + γ V_{t+1} - V_t,   Â_t = δ_t + γλ Â_{t+1},   V = Â = 0 after the end    GAE, arXiv 1506.02438       (3)
    G_t  = Â_t + V_t                                                                  what the critic is to say      (4)
    L(θ) = - mean_t min(ρ_t Â_t, clip(ρ_t, 1-ε, 1+ε) Â_t),   ρ_t = π_θ(y_t) / π_old(y_t)     1707.06347, Eq. 7       (5)
    L(ψ) = ½ mean_t max((V_t - G_t)², (clip(V_t, V_old ± ε_v) - G_t)²)                                               (6)

    paper  θ       ψ, V           r      π_ref      π_old     V_old      ρ_t    Â_t  G_t  ε         ε_v         β
    here   policy  critic, value  judge  reference  old_logp  old_value  ratio  adv  ret  clip_eps  value_clip  kl_beta

Four models: policy and critic learn, reference and reward model are frozen. The critic starts as the reward model, head
included; under `--reward rule` as the SFT model with a head of zeros. What the papers leave open, and is done here:

    unit      rewards are divided by their standard deviation over answers of the SFT model (as in 1909.08593), so that
              β and ε_v mean the same for every reward model and for the rule; the log shows them undivided
    the end   the score lands on the last token, the end token, and V after it is 0; elsewhere it is sometimes put one
              column later, on a pad that counts as a state. An answer that was cut has no end token to read a score at,
              and gets `--no_end_reward` instead, or the worst score of the rollout where that is lower
    price     β multiplies the log-ratio of the policy that sampled, a number without gradient; it may be negative,
              which keeps the price unbiased, so nothing clamps it
    whitening over all answer tokens of the rollout, after the returns are taken
    networks  two, with two losses, two gradient norms to clip and no coefficient between them; Adam's eps is 1e-5, the
              rates fall on a line to 0. There is no entropy bonus and no adaptive β

With the sum over tokens, λ = γ = 1 and no whitening, (5) has the gradient of (1), exactly. The token mean divides it by
the tokens of the batch: in a large one a mere scale, in a small one a bias towards short answers (tests/test_ppo.py).

Run:     python ppo.py                 a minute on two CPU cores; out/sft, out/reward made first if missing -> out/ppo
         python ppo.py --reward rule   the verifier instead of the reward model
Yours:   python ppo.py --init out/mine --reward out/reward_mine --data rows.jsonl --max_new 300            {"prompt"}
Ablate:  --kl_beta 0     --lam 1     --value_clip 0     --epochs 4
"""
import copy
import math
import time
from dataclasses import dataclass

import torch

from model import (EVALUATED, Folder, Guard, InputError, Mean, Optimizers, ScalarModel, answer_number, answers, batches,
                   check, distinct, encoded, evaluate, freeze, frozen_logp, frozen_scalars, load, load_reward, main,
                   make_first, make_optimizer, memory_plan, micro_batches, read_rows, scored, set_blocks, set_lr, setup,
                   split, states_number, sums, table, told, usable)


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to learn from; "" is the built-in task
    test: str = ""            # JSON lines to report on; "": the twentieth of --data that a hash of the prompt holds out
    init: str = "out/sft"         # folder of the policy to start from, and reference: a checkpoint, or a public model
    reward: str = "out/reward"    # "rule", the function `score` below, or the folder of a reward model
    out: str = "out/ppo"          # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": a lone prompt is a user's turn, "plain": bare text, "auto": as --init has it
    system: str = ""              # system line of a chat that has none; "" keeps that of --init
    seed: int = 0                 # of the order of the data and the sampling
    resume: bool = False          # go on with the run in --out
    # rollout
    prompts: int = 256            # prompts in a rollout, with an answer each
    max_new: int = 24             # longest answer in tokens; one that has not ended by then is cut
    temperature: float = 1.0      # divides the logits, in sampling and in every log-prob
    no_end_reward: float = 0.0    # reward of an answer that was cut, or the rollout's worst score if that is lower
    format_reward: float = 0.0    # earned besides, under the rule, by an answer that says where its number is
    # objective
    clip_eps: float = 0.2         # ε, how far the ratio may leave 1 before its gradient is cut
    value_clip: float = 0.2       # ε_v, the same for the critic, in standard deviations of the reward; 0: no clip
    kl_beta: float = 0.3         # β, price of a nat away from the reference, in the same unit; 0 leaves the policy free
    gamma: float = 1.0            # γ, discount; 1: a right answer is worth the same however long it took
    lam: float = 0.95             # λ, 0 trusts the critic's next value alone, 1 what really followed
    # optimisation
    steps: int = 40               # rollouts
    epochs: int = 2               # passes over each rollout
    minibatch: int = 64           # answers in an optimiser step; divides prompts
    micro_tokens: int = 0         # tokens in one forward: bounds the memory, changes no gradient; 0: by device
    recompute: bool = False       # keep each block's input alone and run it again in backward: more time, less memory
    compile: bool = False         # torch.compile the blocks, where that works: a slow start, faster updates
    lr: float = 1e-4              # peak rate of the policy's AdamW; for a real pretrained model 1e-6
    critic_lr: float = 3e-4       # peak rate of the critic's; for a real pretrained model 1e-5
    warmup: int = 3               # rollouts of linear warm-up, before a line down to 0
    grad_clip: float = 1.0        # largest gradient norm, of each network
    # watching
    eval_every: int = 10          # rollouts between evaluations on validation prompts, and between checkpoints
    max_kl: float = 50.0          # the guard's limit for the KL to the reference, nats an answer
    guard: bool = True            # stop a run that has gone wrong, and say why


# defaults where --init is a public model, or a checkpoint that was made from one
PUBLIC = dict(max_new=512, format_reward=0.1, steps=100, lr=1e-6, critic_lr=1e-5, warmup=10, recompute=True)


# -------------------------------------------------------------------------------------------------------- the algorithm


def token_reward(score, logp, ref_logp, mask, kl_beta):
    """R of Eq. 2. score (B,), one for each answer; logp of the policy that sampled, ref_logp, mask (B, T) -> (B, T)."""
    k1 = torch.where(mask > 0, logp - ref_logp, 0.0)                      # its mean over samples of π is KL(π ‖ π_ref)
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & (mask > 0)     # the end token, or where the answer was cut
    return -kl_beta * k1 + torch.where(last, score[:, None], 0.0)


def gae(reward, value, mask, gamma, lam):
    """Eq. 3 and 4, from the end backwards. reward, value, mask (B, T) -> adv, ret (B, T), 0 where the mask is."""
    reward, value = (torch.where(mask > 0, x, 0.0) for x in (reward, value))
    adv, next_value, next_adv = torch.zeros_like(value), 0.0, 0.0
    for t in reversed(range(value.size(1))):
        delta = reward[:, t] + gamma * next_value - value[:, t]           # δ_t = R_t + γ V_{t+1} - V_t
        adv[:, t] = next_adv = torch.where(mask[:, t] > 0, delta + gamma * lam * next_adv, 0.0)     # Â_t
        next_value = value[:, t]
    return adv, adv + value                                               # Â, G


def whiten(x, mask):
    """Mean 0 and variance 1 over the mask, 0 elsewhere. x, mask (B, T)."""
    x, n = torch.where(mask > 0, x, 0.0), mask.sum().clamp(min=1)
    centred = (x - x.sum() / n) * mask
    return centred / (centred.square().sum() / n + 1e-8).sqrt()


def ppo_loss(logp, old_logp, adv, mask, clip_eps, n=None):
    """Eq. 5. logp, old_logp, adv, mask (B, T), mask 1 on answer tokens; n: answer tokens in the whole optimiser batch,
    None if this is all of it. Returns the loss and statistics, means over the tokens under the mask."""
    logp, old_logp, adv = (torch.where(mask > 0, x, 0.0) for x in (logp, old_logp, adv))            # or exp is inf
    ratio = (logp - old_logp).exp()                                      # (B, T)  ρ_t, 1 until the first optimiser step
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    loss = -(surrogate * mask).sum() / (mask.sum().clamp(min=1) if n is None else n)                # mean_t
    with torch.no_grad():
        mean = lambda x: (x * mask).sum() / mask.sum().clamp(min=1)
        stats = {"approx_kl": mean(ratio - 1 - (logp - old_logp)),        # of this update's steps, KL(π_old ‖ π_θ)
                 "clip_low": mean((ratio < 1 - clip_eps) & (adv < 0)),    # tokens whose gradient the clip has cut
                 "clip_high": mean((ratio > 1 + clip_eps) & (adv > 0))}
    return loss, stats


def value_loss(value, old_value, ret, mask, clip_eps, n=None):
    """Eq. 6. value, old_value, ret, mask (B, T); clip_eps None or 0: no clip; n as in ppo_loss. Returns the loss and
    statistics, means over the tokens under the mask."""
    value, old_value, ret = (torch.where(mask > 0, x, 0.0) for x in (value, old_value, ret))
    eps = clip_eps or math.inf
    clipped = value.clamp(old_value - eps, old_value + eps)
    error, clipped_error = (value - ret).square(), (clipped - ret).square()
    loss = 0.5 * (torch.max(error, clipped_error) * mask).sum() / (mask.sum().clamp(min=1) if n is None else n)
    with torch.no_grad():
        mean = lambda x: (x * mask).sum() / mask.sum().clamp(min=1)
        return loss, {"value_loss": 0.5 * mean(error), "value_clip": mean(clipped_error > error)}


def explained_variance(value, ret, mask):
    """1 - Var(G - V) / Var(G) over the mask: 1 for a perfect critic, 0 for a constant one, less for a harmful one."""
    mean = lambda x: torch.where(mask > 0, x, 0.0).sum() / mask.sum().clamp(min=1)
    var = lambda x: mean((x - mean(x)).square())
    return 1 - var(ret - value) / var(ret).clamp(min=1e-8)


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
    B = cfg.prompts
    check(cfg, steps=1, prompts=1, epochs=1, minibatch=1, max_new=1, eval_every=1, grad_clip=0)
    check(cfg, lr=0, critic_lr=0, warmup=0, micro_tokens=0, format_reward=0, clip_eps=0, value_clip=0, kl_beta=0)
    check(cfg, gamma=0, lam=0)
    if not cfg.temperature > 0:
        raise InputError(f"--temperature {cfg.temperature}: must be above 0, or all answers to a prompt are the same")
    if cfg.gamma > 1 or cfg.lam > 1:
        raise InputError(f"--gamma {cfg.gamma} --lam {cfg.lam}: must be at most 1")
    if B % cfg.minibatch:
        raise InputError(f"--minibatch {cfg.minibatch} does not divide the {B} answers of --prompts")

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
    critic = copy.deepcopy(judge) if judge else ScalarModel(copy.deepcopy(policy)).to(device)
    set_blocks(critic.float().requires_grad_(True).trunk, cfg.recompute, cfg.compile)
    optimizer = Optimizers(*make_optimizer(policy, cfg.lr, eps=1e-5).parts,
                           *make_optimizer(critic, cfg.critic_lr, eps=1e-5).parts)
    print(f"ppo: {sum(p.numel() for p in policy.parameters()):,} parameters on {device.type}, {len(rows):,} prompts, "
          f"{len(val)} to validate, {len(test)} to report")
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new
    memory_plan(device, optimizer, [policy, critic], [reference, judge], cfg.micro_tokens, B * longest)
    out = Folder(cfg.out, cfg, cfg.steps, tokenizer, Guard(cfg.max_kl, val=len(val)) if cfg.guard else None)
    first, saved = out.begin(policy, optimizer, cfg.resume)
    if saved:
        reference.load_state_dict(saved["reference"])
        critic.load_state_dict(saved["critic"])
        unit = saved["unit"]
    else:                                                             # one standard deviation of the SFT model's reward
        some = rows[:min(512, max(2, EVALUATED // longest))]
        tokens, mask, _ = policy.generate([row["ids"] for row in some], 1, cfg.max_new, cfg.temperature)
        texts = answers(tokenizer, tokens, mask, policy.cfg.stop)
        unit = float(rewards(cfg, judge, some, tokens, mask.cpu(), texts)[0].std(correction=0)) or 1.0
        with torch.no_grad():
            for p in critic.head.parameters():                            # the critic speaks in the same unit
                p /= unit
    before, texts_before = saved.get("before") or validate(policy, tokenizer, test, cfg, judge, reference, samples=8)
    if first == 0:
        found, _ = validate(policy, tokenizer, val, cfg, judge, reference)
        out.log(0, "val_greedy val_acc val_length val_score", **{f"val_{name}": x for name, x in found.items()})
    todo = batches(rows, cfg.prompts, cfg.seed, start=first)

    for step in range(first + 1, cfg.steps + 1):
        # 1. rollout: an answer to every prompt
        t0, stats = time.perf_counter(), Mean()
        batch = next(todo)
        asked = [row["ids"] for row in batch]
        tokens, mask, sampled_logp = policy.generate(asked, 1, cfg.max_new, cfg.temperature)              # (B, T) each
        host_mask = mask.cpu()                               # what is chosen by it is found without waiting for the GPU
        ref_logp, _ = frozen_logp(reference, tokens, host_mask, cfg.temperature, cfg.micro_tokens)
        old_logp, _ = frozen_logp(policy, tokens, host_mask, cfg.temperature, cfg.micro_tokens)
        old_value, _ = frozen_scalars(critic, tokens, host_mask, cfg.micro_tokens)

        # 2. reward: the rule or the reward model reads the answer, if it ended; each token pays for its KL
        texts = answers(tokenizer, tokens, mask, policy.cfg.stop)
        reward, gold = rewards(cfg, judge, batch, tokens, host_mask, texts)                               # (B,)
        stats.add(told(reward, gold, host_mask, texts))
        per_token = token_reward(reward.to(device) / unit, old_logp, ref_logp, mask, cfg.kl_beta)         # (B, T)

        # 3. advantage: the critic is the baseline
        adv, ret = gae(per_token, old_value, mask, cfg.gamma, cfg.lam)
        adv = whiten(adv, mask)
        t1 = time.perf_counter()

        # 4. update: clipped passes over the same rollout
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup, linear=True)
        for _ in range(cfg.epochs):
            for i in torch.randperm(B).split(cfg.minibatch):
                n = int(host_mask[i].sum())                               # answer tokens in this optimiser step
                optimizer.zero_grad()
                for j, t, at in micro_batches(host_mask, i, cfg.micro_tokens, device):
                    m, old = mask[j, :t], old_logp[j, :t]
                    logp, entropy = policy.token_logp(tokens[j, :t], None, cfg.temperature, at)
                    loss, found = ppo_loss(logp, old, adv[j, :t], m, cfg.clip_eps, n)
                    loss.backward()
                    value = critic.value(tokens[j, :t])
                    loss, more = value_loss(value, old_value[j, :t], ret[j, :t], m, cfg.value_clip, n)
                    loss.backward()
                    gap = (old - sampled_logp[j, :t]).abs().sum()    # the sampler and the scorer are one model: about 0
                    stats.add(found | more | {"ent": entropy.sum() / len(at), "gap": gap / len(at)}, len(at))
                gnorm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
                critic_gnorm = torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.grad_clip)
                optimizer.step()
                stats.add({"gnorm": gnorm, "critic_gnorm": critic_gnorm})
        stats.add({"kl": (old_logp - ref_logp).sum() / mask.sum(), "ev": explained_variance(old_value, ret, mask)})
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
        shown = "reward gold len end kl ent clip_low clip_high ev gnorm gen_s upd_s tok_s val_greedy val_acc"
        why = out.log(step, shown, **metrics)
        if why:
            out.stop(policy, optimizer, step, why)
        if last or out.leaving or step % cfg.eval_every == 0:
            out.save(policy, optimizer, step, reference=reference.state_dict(), critic=critic.state_dict(), unit=unit,
                     before=(before, texts_before))

    after, texts = validate(policy, tokenizer, test, cfg, judge, reference, samples=8)
    print(f"\n{len(test)} held-out prompts, before -> after\n{table(before, after)}")
    print("before\n" + out.samples("before", test, texts_before) + "after\n" + out.samples("after", test, texts))
    out.plot("reward val_score", "val_acc val_greedy", "len val_length", "kl_seq", "ent", "ev")


if __name__ == "__main__":
    main(train, Config)
