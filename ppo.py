"""
PPO for RLHF: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347) on a learned
reward with a KL penalty (Ziegler et al. 2019, arXiv 1909.08593; InstructGPT, arXiv 2203.02155).

A critic predicts the reward at every token; what turns out better than predicted becomes likelier.

    the RLHF objective    E_{y ~ π_θ} [ r(x, y) - β log(π_θ(y | x) / π_ref(y | x)) ]             (1)
    R_t  = -β (log π_old(y_t) - log π_ref(y_t)),  and + r(x, y) on the last token                (2)
    δ_t  = R_t + γ V_{t+1} - V_t,   Â_t = δ_t + γλ Â_{t+1},   V = Â = 0 after the end            (3)
    G_t  = Â_t + V_t                                                GAE, arXiv 1506.02438        (4)
    L(θ) = - mean_t min(ρ_t Â_t, clip(ρ_t, 1-ε, 1+ε) Â_t),   ρ_t = π_θ(y_t) / π_old(y_t)         (5)
    L(ψ) = ½ mean_t max((V_t - G_t)², (clip(V_t, V_old ± ε_v) - G_t)²)                           (6)

    paper  θ, ψ            r             π_old     π_ref     V_old      ρ_t    Â_t  G_t  ε
    here   policy, critic  reward_model  old_logp  ref_logp  old_value  ratio  adv  ret  clip_eps

What the papers leave open or do otherwise:

    1. The critic starts as the reward model; under the rule as the SFT model with a head of zeros.
    2. Rewards are divided by their std over SFT responses (1909.08593); the log has them undivided.
    3. The reward is on the last token, the end token, and V after it is 0. A truncated response has
       no end token, hence no score: it gets --truncated_reward, or the lowest at the start.
    4. The KL penalty has no gradient and is not clamped: a token's may be negative. β is fixed.
    5. Advantages are whitened over the response tokens of the rollout, after the returns are taken.
    6. With a sum over tokens, λ = γ = 1 and no whitening, (5) has exactly the gradient of (1). The
       token mean only scales it in a large batch, and favours short responses in a small one.
    7. λ = 1: at V = 0 a token n steps before the end gets λ^n of the reward. The usual .95 comes
       from responses of 53 tokens; it leaves 5e-4 of the reward at n = 150 and 2e-7 at n = 300.

Run:     python ppo.py                 -> out/ppo, from out/sft and out/reward (or --reward rule)
Yours:   python ppo.py --data rows.jsonl --init out/mine --reward out/my_reward    {"prompt"}
Ablate:  --kl_beta 0     --gae_lambda 0.5     --value_clip_eps 0     --epochs 4
"""
import math
import time
from dataclasses import dataclass

import torch

from common.data import load_prompts, load_retained
from common.distributed import sum_gradients, sum_over_ranks, world_size
from common.evaluate import MetricMean, distinct_ngrams, evaluate, explained_variance, rollout_stats
from common.memory import estimate_memory
from common.models import load_policy, load_reward_model, make_critic, make_reference, setup
from common.optimizers import Optimizers, make_optimizer, set_lr
from common.run import Run, main, prefixed
from common.tokenizer import decode_responses
from common.train import (batches, compute_logp, compute_reward, compute_values, measure_reward,
                          micro_batches)
from common.verifier import RULES, answer_number, gold_number, math_score
from model import autocast


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to train on; "" is the built-in task
    test: str = ""                # JSON lines to test on; "": a twentieth of --data
    init: str = "out/sft"         # policy to start from: a checkpoint or a Hugging Face folder
    reward: str = "out/reward"    # "rule": `score` below; "math": math-verify; else a reward model
    out: str = "out/ppo"          # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": prompts are user turns; "plain": text; "auto": as --init
    system: str = "auto"          # system message of chats that have none; "auto": as --init
    seed: int = 0                 # random seed of data order and sampling
    resume: bool = False          # continue the run in --out
    # rollout
    prompts: int = 256            # prompts in a rollout, with one response each
    max_new_tokens: int = 24      # longest response; one that has not ended by then is truncated
    temperature: float = 1.0      # divides the logits, in sampling and in every log-prob
    truncated_reward: float = 0.0 # of a truncated response; the lowest reward at the start if lower
    format_reward: float = 0.0    # bonus for one number marked once, by #### or \boxed{}; 0: none
    # objective
    clip_eps: float = 0.2         # ε, how far the ratio may leave 1 before its gradient is cut
    value_clip_eps: float = 0.2   # ε_v, the same for values, in units of the reward's std; 0: none
    kl_beta: float = 0.3          # β, weight of the KL penalty, in the same unit; 0: none
    gamma: float = 1.0            # γ, discount per token; 1: none
    gae_lambda: float = 1.0       # λ; 0: one-step TD error, 1: Monte-Carlo return minus value
    # optimisation
    steps: int = 40               # rollouts
    epochs: int = 2               # passes over each rollout
    minibatch: int = 64           # responses in an optimiser step; divides prompts
    micro_batch_tokens: int = 0   # tokens in one forward, changes no gradient; 0: by device
    gradient_checkpointing: bool = False  # recompute blocks in backward: slower, less memory
    compile: bool = False         # torch.compile the blocks: a slow start, faster updates
    lora_rank: int = 0            # r of LoRA, which trains adapters alone; 0: all weights learn
    lora_alpha: float = 32.0      # α of LoRA, whose adapters are scaled by α / r
    lr: float = 1e-4              # peak rate of the policy's AdamW; for a pretrained model 1e-6
    critic_lr: float = 3e-4       # peak rate of the critic's; for a pretrained model 1e-5
    warmup: int = 3               # rollouts of linear warm-up, then linearly down to 0
    grad_clip: float = 1.0        # largest gradient norm, of each network
    # evaluation
    eval_every: int = 10          # rollouts between evaluations, and between checkpoints
    eval_prompts: int = 0         # validation and test prompts, at most so many of each; 0: all
    max_kl: float = 50.0          # early stopping: largest KL to the reference, nats per response
    retain: str = ""              # demonstrations whose loss is reported; "": those in --init
    early_stopping: bool = True   # stop a run that has gone wrong, and say by which rule


# defaults where --init is a Hugging Face folder, or a checkpoint that began as one
PRETRAINED = dict(
    max_new_tokens=512, kl_beta=0.05, steps=100, lr=1e-6, critic_lr=1e-5,
    warmup=10, max_kl=500.0, gradient_checkpointing=True)
COLUMNS = ("reward accuracy explained_var length eos_rate entropy grad_norm kl_seq val_greedy "
           "val_accuracy")


# ------------------------------------------------------------------------------------ the algorithm
# To use it elsewhere copy from here to "the reward": pure functions of tensors that need
# `import math, torch`.


def token_reward(score, logp, ref_logp, mask, kl_beta):
    """R of Eq. 2. score (B,), one per response; logp of the policy that sampled, ref_logp, mask
    (B, T) -> (B, T)."""
    k1 = torch.where(mask > 0, logp - ref_logp, 0.0)                      # mean: KL(π ‖ π_ref)
    last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & (mask > 0)
    return -kl_beta * k1 + torch.where(last, score[:, None], 0.0)


def gae(reward, value, mask, gamma, lam):
    """Eq. 3 and 4, from the end backwards. reward, value, mask (B, T) -> adv, ret (B, T), 0 outside
    the mask."""
    reward = torch.where(mask > 0, reward, 0.0)
    value = torch.where(mask > 0, value, 0.0)                             # V = 0 after the end
    adv = torch.zeros_like(value)
    next_value = next_adv = 0.0
    for t in reversed(range(value.size(1))):
        delta = reward[:, t] + gamma * next_value - value[:, t]           # δ_t
        next_adv = torch.where(mask[:, t] > 0, delta + gamma * lam * next_adv, 0.0)
        adv[:, t] = next_adv                                              # Â_t
        next_value = value[:, t]
    return adv, adv + value                                               # Â, G


def whiten(x, mask, total=torch.sum):
    """Mean 0 and variance 1 over the mask, 0 elsewhere. x, mask (B, T). total(x): the sum of x's
    elements; with several processes, over all of them."""
    x = torch.where(mask > 0, x, 0.0)
    n = total(mask).clamp(min=1)
    centred = (x - total(x) / n) * mask
    return centred / (total(centred.square()) / n + 1e-8).sqrt()


def ppo_loss(logp, old_logp, adv, mask, clip_eps, n=None, sampler_logp=None):
    """Eq. 5. logp, old_logp, adv, mask (B, T), mask 1 on response tokens; n: response tokens in the
    whole optimiser batch, None if this is all of it.
    sampler_logp (B, T): log-probs by which the tokens were sampled, for sampler_logp_error.
    Returns the loss and statistics, means over the tokens in the mask."""
    logp = torch.where(mask > 0, logp, 0.0)                               # or exp may be inf
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    adv = torch.where(mask > 0, adv, 0.0)
    if n is None:
        n = mask.sum().clamp(min=1)
    log_ratio = (logp - old_logp).clamp(max=20)                           # or exp may be inf
    ratio = log_ratio.exp()                                               # (B, T)  ρ_t, 1 at first
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    loss = -(surrogate * mask).sum() / n                                  # mean_t
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        approx_kl = ratio - 1 - log_ratio                                 # KL(π_old ‖ π_θ)
        clipped_low = (ratio < 1 - clip_eps) & (adv < 0)                  # their gradient is cut
        clipped_high = (ratio > 1 + clip_eps) & (adv > 0)
        stats = {"approx_kl": (approx_kl * mask).sum() / tokens,
                 "clip_low": (clipped_low * mask).sum() / tokens,
                 "clip_high": (clipped_high * mask).sum() / tokens}
        if sampler_logp is not None:                                      # sampler = policy: near 0
            error = (old_logp - sampler_logp).abs() * mask
            stats["sampler_logp_error"] = error.sum() / tokens
    return loss, stats


def value_loss(value, old_value, ret, mask, clip_eps, n=None):
    """Eq. 6. value, old_value, ret, mask (B, T); clip_eps None or 0: no clip; n as in ppo_loss.
    Returns the loss and statistics, means over the tokens in the mask."""
    value = torch.where(mask > 0, value, 0.0)
    old_value = torch.where(mask > 0, old_value, 0.0)
    ret = torch.where(mask > 0, ret, 0.0)
    if n is None:
        n = mask.sum().clamp(min=1)
    eps = clip_eps or math.inf
    clipped = value.clamp(old_value - eps, old_value + eps)
    error = (value - ret).square()
    clipped_error = (clipped - ret).square()
    loss = 0.5 * (torch.max(error, clipped_error) * mask).sum() / n
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        stats = {"value_loss": 0.5 * ((error * mask).sum() / tokens),
                 "value_clip_frac": ((clipped_error > error) * mask).sum() / tokens}
    return loss, stats


# --------------------------------------------------------------------------------------- the reward


def score(row, response):
    """1 for a right response, 0 for a wrong one, None where the row does not say what is right. The
    built-in task: one '#', then the sum in two digits. Other rows: the number in "answer"."""
    if "_two_digits" in row:
        return float(response.count("#") == 1 and response.split("#")[1] == row["_two_digits"])
    answer = gold_number(row.get("answer"))
    return None if answer is None else float(answer_number(response) == answer)


# ----------------------------------------------------------------------------------------- training


def train(cfg):
    device = setup(cfg)
    policy, tokenizer = load_policy(cfg, device)                # runs sft.py if out/sft is missing
    rule = math_score if cfg.reward == "math" else score        # compares with the row's answer
    splits = load_prompts(cfg, tokenizer, rule, policy.cfg.block_size, cfg.reward in RULES,
                          cfg.eval_prompts)
    train_rows, val_rows, test_rows = splits
    retained = load_retained(cfg, tokenizer, policy.cfg.block_size)
    reward_model = load_reward_model(cfg, policy, tokenizer)    # None for a rule
    reference = make_reference(policy)
    critic = make_critic(cfg, policy, reward_model)
    policy_optimizer = make_optimizer(policy, cfg.lr, eps=1e-5)
    critic_optimizer = make_optimizer(critic, cfg.critic_lr, eps=1e-5)
    optimizer = Optimizers(*policy_optimizer.parts, *critic_optimizer.parts)
    B, micro_tokens = cfg.prompts // world_size(), cfg.micro_batch_tokens  # of this process
    longest = max(len(row["ids"]) for row in train_rows) + cfg.max_new_tokens
    frozen = [reference, reward_model]
    estimate_memory(device, optimizer, [policy, critic], frozen, micro_tokens, B, longest)
    run = Run(cfg, cfg.steps, policy, optimizer, tokenizer, splits, COLUMNS, reference,
              critic=critic)

    def evaluate_policy(rows, samples=1):
        return evaluate(policy, tokenizer, rows, rule, cfg, samples, reward_model, reference,
                        run.state["truncated_reward"], retained)

    if run.is_new:                                              # measured once, kept when resumed
        run.state |= measure_reward(cfg, policy, tokenizer, reward_model, rule, train_rows)
        with torch.no_grad():                                   # rescale head to normalised rewards
            for param in critic.head.parameters():
                param /= run.state["reward_std"]
        run.state["before"] = evaluate_policy(test_rows, samples=8)
        run.log(0, prefixed("val_", evaluate_policy(val_rows)[0]))
    reward_std = run.state["reward_std"]
    batch_iter = batches(train_rows, cfg.prompts, cfg.seed, start=run.step)

    for step in run.remaining_steps():
        # 1. rollout: a response to every prompt
        start, stats = time.perf_counter(), MetricMean()
        batch = next(batch_iter)
        prompts = [row["ids"] for row in batch]
        tokens, mask, sampler_logp = policy.generate(           # (B, T) each
            prompts, 1, cfg.max_new_tokens, cfg.temperature)
        mask_cpu = mask.cpu()                                   # micro-batches are cut on the CPU
        ref_logp = compute_logp(reference, tokens, mask_cpu, cfg.temperature, micro_tokens)
        old_logp = compute_logp(policy, tokens, mask_cpu, cfg.temperature, micro_tokens)
        old_value, _ = compute_values(critic, tokens, mask_cpu, micro_tokens)

        # 2. reward: of every response that ended, and a KL penalty on every token
        responses = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        reward, _, correct = compute_reward(                    # (B,) each
            cfg, reward_model, rule, batch, tokens, mask_cpu, responses,
            run.state["truncated_reward"])
        stats.add(rollout_stats(reward, correct, mask_cpu, responses))
        per_token = token_reward(                               # (B, T)
            reward.to(device) / reward_std, old_logp, ref_logp, mask, cfg.kl_beta)

        # 3. advantage: the critic is the baseline
        adv, ret = gae(per_token, old_value, mask, cfg.gamma, cfg.gae_lambda)  # (B, T) each
        adv = whiten(adv, mask, sum_over_ranks)
        rollout_end = time.perf_counter()

        # 4. update: clipped epochs over the same rollout
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup, linear=True)
        for _ in range(cfg.epochs):
            for minibatch in torch.randperm(B).split(cfg.minibatch // world_size()):
                n = int(sum_over_ranks(mask_cpu[minibatch]))    # response tokens in this step
                optimizer.zero_grad()
                for rows, width, index in micro_batches(mask_cpu, minibatch, micro_tokens, device):
                    chosen, old = mask[rows, :width], old_logp[rows, :width]
                    with autocast(policy):                      # bf16 where the hardware has it
                        logp, entropy = policy.token_logp(
                            tokens[rows, :width], temperature=cfg.temperature, index=index)
                    loss, loss_stats = ppo_loss(
                        logp, old, adv[rows, :width], chosen, cfg.clip_eps, n,
                        sampler_logp[rows, :width])
                    loss.backward()
                    with autocast(critic):
                        value = critic.value(tokens[rows, :width])   # after backward: less memory
                    loss, value_stats = value_loss(
                        value, old_value[rows, :width], ret[rows, :width], chosen,
                        cfg.value_clip_eps, n)
                    loss.backward()
                    loss_stats["entropy"] = entropy.sum() / len(index)
                    stats.add(loss_stats | value_stats, len(index))
                sum_gradients(policy, critic)                   # of all processes
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
                critic_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.grad_clip)
                optimizer.step()
                stats.add({"grad_norm": grad_norm, "critic_grad_norm": critic_norm})
        kl = sum_over_ranks(old_logp - ref_logp) / sum_over_ranks(mask)
        stats.add({"kl": kl})
        # of the Monte-Carlo return: `ret` is made of the critic's own values where λ < 1
        _, monte_carlo = gae(per_token, old_value, mask, cfg.gamma, 1.0)
        stats.add({"explained_var": explained_variance(old_value, monte_carlo, mask)})

        # 5. log, evaluate, save
        metrics = stats.read()                                  # the only wait for the GPU since 3
        update_end = time.perf_counter()
        metrics |= {"lr": lr, "tokens": int(sum_over_ranks(mask_cpu))}
        metrics["distinct_2"] = distinct_ngrams(tokens, mask)
        metrics["kl_seq"] = metrics["kl"] * metrics["length"]   # nats per response
        if run.is_eval_step(step):
            metrics |= prefixed("val_", evaluate_policy(val_rows)[0])
        metrics |= {"gen_s": rollout_end - start, "upd_s": update_end - rollout_end}
        metrics["tok_s"] = int(metrics["tokens"] / (update_end - start))
        run.end_step(step, metrics)

    run.report(test_rows, run.state["before"], evaluate_policy(test_rows, samples=8))
    run.plot("reward val_accuracy val_greedy", "length val_length", "kl_seq", "explained_var")


if __name__ == "__main__":
    main(train, Config)
