"""
DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (Yu et al. 2025, arXiv 2503.14476).

GRPO with four changes, and without the KL penalty and its reference model: `diff grpo.py dapo.py`.

    J(θ) = E 1/Σ_i |o_i| Σ_i Σ_t min(r_it Â_i, clip(r_it, 1-ε_low, 1+ε_high) Â_i)          (Eq. 8)
           over groups with 0 < #{i: o_i is right} < G

    r_it = π_θ(o_it | q, o_i,<t) / π_old(o_it | q, o_i,<t)
    Â_i  = (R_i - mean(R_1 .. R_G)) / std(R_1 .. R_G), the same for every token of o_i     (Eq. 9)

    1. clip-higher        ε_high > ε_low: at 1.28 a token of probability .01 may rise to .0128,
                          not only to .012, which keeps exploration alive                 (Eq. 10)
    2. dynamic sampling   groups that are all right or all wrong have Â = 0; the current policy
                          samples others in their place until the batch is full           (Eq. 11)
    3. token-level loss   one mean over the tokens of the optimiser batch: a token of a long
                          response weighs as much as one of a short response              (Eq. 12)
    4. overlong shaping   R_i = rule + (L_max - L_cache - |o_i|) / L_cache, the second term clipped
                          to [-1, 0]: a penalty for nearly reaching the limit             (Eq. 13)

    paper  π_old     r_it   Â_i  ε_low, ε_high        G           L_max           L_cache
    here   old_logp  ratio  adv  clip_low, clip_high  group_size  max_new_tokens  overlong_cache

What the paper leaves open or does otherwise:

    1. The rule gives 1 and 0, not 1 and -1: the length penalty weighs twice what it does there.
    2. A group is informative if its scores differ, before bonus and penalty; with 1 and 0 this is
       Eq. 11. A reward model's scores hardly ever tie, so nearly all groups are.
    3. Sampling stops after max_generations; a batch that is not full then stays smaller.
    4. Reward, accuracy, length and eos_rate are logged of all that was sampled, kept or not.

Run:     python dapo.py                                      -> out/dapo, from out/sft
Yours:   python dapo.py --data rows.jsonl --init out/mine --max_new_tokens 300 --overlong_cache 60
Ablate:  --clip_high 0.2     --max_generations 0     --overlong_cache 0
"""
import math
import time
from dataclasses import dataclass

import torch

from common.data import load_prompts, load_retained
from common.distributed import first_over_ranks, sum_gradients, sum_over_ranks, world_size
from common.evaluate import MetricMean, distinct_ngrams, evaluate, rollout_stats
from common.memory import estimate_memory
from common.models import load_policy, load_reward_model, setup
from common.optimizers import make_optimizer, set_lr
from common.run import Run, main, prefixed
from common.tokenizer import decode_responses
from common.train import (batches, compute_logp, compute_reward, measure_reward, micro_batches,
                          select_groups)
from common.verifier import RULES, answer_number, gold_number, math_score
from model import autocast


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to train on; "" is the built-in task
    test: str = ""                # JSON lines to test on; "": a twentieth of --data
    init: str = "out/sft"         # policy to start from: a checkpoint or a Hugging Face folder
    reward: str = "rule"          # "rule": `score` below; "math": math-verify; else a reward model
    out: str = "out/dapo"         # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": prompts are user turns; "plain": text; "auto": as --init
    system: str = "auto"          # system message of chats that have none; "auto": as --init
    seed: int = 0                 # random seed of data order and sampling
    resume: bool = False          # continue the run in --out
    # rollout
    prompts: int = 32             # prompts in a rollout
    group_size: int = 8           # G, responses per prompt; their mean reward is the baseline
    max_new_tokens: int = 24      # longest response; one that has not ended by then is truncated
    temperature: float = 1.0      # divides the logits, in sampling and in every log-prob
    truncated_reward: float = 0.0 # of a truncated response; the lowest reward at the start if lower
    format_reward: float = 0.0    # bonus for one number marked once, by #### or \boxed{}; 0: none
    # objective
    clip_low: float = 0.2         # ε_low, how far the ratio may fall below 1
    clip_high: float = 0.28       # ε_high, how far it may rise above 1
    max_generations: int = 10     # generations for one rollout, at most; 0: no dynamic sampling
    overlong_cache: int = 6       # L_cache, the last tokens before the limit are penalised; 0: none
    # optimisation
    steps: int = 50               # rollouts
    epochs: int = 1               # passes over each rollout
    minibatch: int = 64           # responses in an optimiser step; divides prompts * group_size
    micro_batch_tokens: int = 0   # tokens in one forward, changes no gradient; 0: by device
    gradient_checkpointing: bool = False  # recompute blocks in backward: slower, less memory
    compile: bool = False         # torch.compile the blocks: a slow start, faster updates
    lora_rank: int = 0            # r of LoRA, which trains adapters alone; 0: all weights learn
    lora_alpha: float = 32.0      # α of LoRA, whose adapters are scaled by α / r
    lr: float = 1.5e-4            # peak rate of AdamW; for a pretrained model 1e-6
    warmup: int = 3               # rollouts of linear warm-up, then half a cosine down to a tenth
    grad_clip: float = 1.0        # largest gradient norm
    # evaluation
    eval_every: int = 10          # rollouts between evaluations, and between checkpoints
    eval_prompts: int = 0         # validation and test prompts, at most so many of each; 0: all
    retain: str = ""              # demonstrations whose loss is reported; "": those in --init
    early_stopping: bool = True   # stop a run that has gone wrong, and say by which rule


# defaults where --init is a Hugging Face folder, or a checkpoint that began as one
PRETRAINED = dict(
    max_new_tokens=512, steps=200, lr=1e-6, warmup=10, eval_every=20,
    overlong_cache=128, gradient_checkpointing=True)
COLUMNS = ("reward accuracy frac_zero_std length eos_rate entropy grad_norm generations "
           "val_greedy val_accuracy")


# ------------------------------------------------------------------------------------ the algorithm
# To use it elsewhere copy from here to "the reward": pure functions of tensors that need
# `import torch`.
# experiments/grpo_on_transformers.py is such a copy of GRPO.


def group_advantage(reward, group_size):
    """Â of §4.1.2. reward (B,), the responses of one prompt adjacent -> adv (B,); a group of equal
    rewards gets exactly 0."""
    r = reward.view(-1, group_size)
    adv = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    # compare the rewards: the float mean of equal rewards can differ from them
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(equal, 0.0, adv).flatten()


def informative(score, group_size):
    """Eq. 11. score (B,), the responses of one prompt adjacent -> (P,) whether those of a prompt
    differ."""
    r = score.view(-1, group_size)
    return r.amax(1) > r.amin(1)


def soft_overlong(length, max_len, cache):
    """The length penalty of Eq. 13, at most 0. length (B,) in tokens, the end token included;
    max_len: L_max; cache: L_cache."""
    return ((max_len - cache - length) / max(cache, 1)).clamp(-1, 0)


def dapo_loss(logp, old_logp, adv, mask, clip_low, clip_high, n=None, sampler_logp=None):
    """-J of Eq. 8. logp, old_logp, mask (B, T), mask 1 on response tokens; adv (B,), or (B, T) by
    token; n: response tokens in the whole optimiser batch, None if this is all of it.
    sampler_logp (B, T): log-probs by which the tokens were sampled, for sampler_logp_error.
    Returns the loss and statistics, means over the tokens in the mask."""
    logp = torch.where(mask > 0, logp, 0.0)                               # or exp may be inf
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    if n is None:
        n = mask.sum().clamp(min=1)                                       #         Σ_i |o_i|
    ratio = (logp - old_logp).clamp(max=20).exp()                         # (B, T)  r_it, 1 at first
    adv = adv.view(len(adv), -1)                                          # (B, 1)  Â_i, or Â_it
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    loss = -(surrogate * mask).sum() / n                                  # 1/Σ_i |o_i| Σ_i Σ_t
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        clipped_low = (ratio < 1 - clip_low) & (adv < 0)                  # their gradient is cut
        clipped_high = (ratio > 1 + clip_high) & (adv > 0)
        stats = {"clip_low": (clipped_low * mask).sum() / tokens,
                 "clip_high": (clipped_high * mask).sum() / tokens}
        if sampler_logp is not None:                                      # sampler = policy: near 0
            error = (old_logp - sampler_logp).abs() * mask
            stats["sampler_logp_error"] = error.sum() / tokens
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
    optimizer = make_optimizer(policy, cfg.lr)
    B = cfg.prompts * cfg.group_size // world_size()            # responses of this process
    micro_tokens = cfg.micro_batch_tokens
    longest = max(len(row["ids"]) for row in train_rows) + cfg.max_new_tokens
    frozen = [reward_model]
    estimate_memory(device, optimizer, [policy], frozen, micro_tokens, B, longest)
    run = Run(cfg, cfg.steps, policy, optimizer, tokenizer, splits, COLUMNS)

    def evaluate_policy(rows, samples=1):
        return evaluate(policy, tokenizer, rows, rule, cfg, samples, reward_model, None,
                        run.state["truncated_reward"], retained)

    if run.is_new:                                              # measured once, kept when resumed
        run.state |= measure_reward(cfg, policy, tokenizer, reward_model, rule, train_rows)
        run.state["before"] = evaluate_policy(test_rows, samples=8)
        run.log(0, prefixed("val_", evaluate_policy(val_rows)[0]))
        run.state["prompts_used"] = 0
    batch_iter = batches(train_rows, world_size(), cfg.seed, start=run.state["prompts_used"])
    on_policy = cfg.epochs == 1 and cfg.minibatch == cfg.prompts * cfg.group_size  # one update

    for step in run.remaining_steps():
        # 1. rollout: group_size responses to every prompt, new prompts for uninformative groups
        start, stats = time.perf_counter(), MetricMean()
        generations, keep = [], torch.zeros(0, dtype=torch.bool)
        while sum_over_ranks(keep) < cfg.prompts and len(generations) < max(1, cfg.max_generations):
            missing = cfg.prompts - int(sum_over_ranks(keep))   # groups, of all processes
            batch = [next(batch_iter)[0] for _ in range(math.ceil(missing / world_size()))]
            prompts = [row["ids"] for row in batch]
            tokens, mask, sampler_logp = policy.generate(       # (b G, T) each
                prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature)
            mask_cpu = mask.cpu()                               # micro-batches are cut on the CPU

            # 2. reward: as in GRPO, and a penalty near the limit of tokens
            responses = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
            reward, raw, correct = compute_reward(              # (b G,) each
                cfg, reward_model, rule, batch, tokens, mask_cpu, responses,
                run.state["truncated_reward"])
            differs = informative(raw, cfg.group_size)          # (b,)
            reward = reward + soft_overlong(mask_cpu.sum(1), cfg.max_new_tokens, cfg.overlong_cache)
            rollout = rollout_stats(reward, correct, mask_cpu, responses, cfg.group_size)
            rollout["frac_zero_std"] = 1 - differs.float().mean()
            stats.add(rollout, len(batch))
            keep = torch.cat([keep, differs | (cfg.max_generations == 0)])  # (groups so far,)
            generations.append((tokens, mask, mask_cpu, sampler_logp, reward))
        keep = first_over_ranks(keep, cfg.prompts)              # without those beyond cfg.prompts
        tokens, mask, mask_cpu, sampler_logp, reward = select_groups(
            generations, keep, cfg.group_size)
        B = len(tokens)                                         # smaller if sampling has stopped
        if not on_policy:
            old_logp = compute_logp(policy, tokens, mask_cpu, cfg.temperature, micro_tokens)
        run.state["prompts_used"] += len(keep)

        # 3. advantage: no critic, the group is the baseline
        adv = group_advantage(reward, cfg.group_size)[:, None].to(device)  # (B, 1)
        rollout_end = time.perf_counter()

        # 4. update: clipped epochs over the same rollout
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup, floor=0.1)
        for _ in range(cfg.epochs):
            kept = int(sum_over_ranks(keep)) * cfg.group_size   # responses of all processes
            n_steps = max(1, math.ceil(kept / cfg.minibatch))   # of equal size, up to one response
            for minibatch in torch.randperm(B).tensor_split(n_steps):
                n = int(sum_over_ranks(mask_cpu[minibatch]))    # response tokens in this step
                optimizer.zero_grad()
                for rows, width, index in micro_batches(mask_cpu, minibatch, micro_tokens, device):
                    with autocast(policy):                      # bf16 where the hardware has it
                        logp, entropy = policy.token_logp(
                            tokens[rows, :width], temperature=cfg.temperature, index=index)
                    old = logp.detach() if on_policy else old_logp[rows, :width]
                    loss, loss_stats = dapo_loss(
                        logp, old, adv[rows, :width], mask[rows, :width],
                        cfg.clip_low, cfg.clip_high, n, sampler_logp[rows, :width])
                    loss.backward()
                    loss_stats["entropy"] = entropy.sum() / len(index)
                    stats.add(loss_stats, len(index))
                sum_gradients(policy)                           # of all processes
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
                optimizer.step()
                stats.add({"grad_norm": grad_norm})

        # 5. log, evaluate, save
        metrics = stats.read()                                  # the only wait for the GPU since 3
        update_end = time.perf_counter()
        groups = len(keep) * world_size()                       # sampled by all processes
        metrics |= {"lr": lr, "tokens": round(metrics["length"] * groups * cfg.group_size)}
        metrics["distinct_2"] = distinct_ngrams(tokens, mask)
        metrics["generations"] = len(generations)
        if run.is_eval_step(step):
            metrics |= prefixed("val_", evaluate_policy(val_rows)[0])
        metrics |= {"gen_s": rollout_end - start, "upd_s": update_end - rollout_end}
        metrics["tok_s"] = int(metrics["tokens"] / (update_end - start))
        run.end_step(step, metrics)

    run.report(test_rows, run.state["before"], evaluate_policy(test_rows, samples=8))
    run.plot("reward val_accuracy val_greedy", "length val_length", "frac_zero_std", "entropy")


if __name__ == "__main__":
    main(train, Config)
