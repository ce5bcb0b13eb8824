"""
GRPO: Group Relative Policy Optimization (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, §4.1).

PPO without the critic: sample G responses to a prompt, and their mean reward is the baseline.

    J(θ) = E 1/G Σ_i 1/|o_i| Σ_t { min(r_it Â_i, clip(r_it, 1-ε, 1+ε) Â_i) - β D_it }     (Eq. 3)

    r_it = π_θ(o_it | q, o_i,<t) / π_old(o_it | q, o_i,<t)
    Â_i  = (R_i - mean(R_1 .. R_G)) / std(R_1 .. R_G), the same for every token of o_i     (§4.1.2)
    D_it = π_ref/π_θ - log(π_ref/π_θ) - 1, whose mean over π_θ is KL(π_θ ‖ π_ref)          (Eq. 4)

    paper  θ       o_i                π_old     π_ref     r_it   Â_i  R_i     ε         β
    here   policy  tokens[mask == 1]  old_logp  ref_logp  ratio  adv  reward  clip_eps  kl_beta

What the paper leaves open or does otherwise:

    1. std divides by G - 1 and has 1e-4 added; a group of equal rewards has advantage exactly 0.
    2. The reward is a rule, or a fixed reward model; no outer loop retrains it.
    3. D has the value of KL(π_θ ‖ π_ref), but the gradient of KL(π_ref ‖ π_θ). 1/|o_i| and std bias
       the gradient of the mean reward. tests/test_grpo.py proves both. The log's kl is the mean of
       log π_old/π_ref: after a step, D on old responses is no estimate of a KL.
    4. Temperature divides the logits everywhere, so π is the distribution that was sampled from.

Run:     python grpo.py                                      -> out/grpo, from out/sft
Yours:   python grpo.py --data rows.jsonl --init Qwen2.5-0.5B    {"prompt", "answer"}, or GSM8K's
Ablate:  --kl_beta 0     --group_size 2     --epochs 4     --temperature 0.7
"""
import time
from dataclasses import dataclass

import torch

from common.data import load_prompts, load_retained
from common.distributed import sum_gradients, sum_over_ranks, world_size
from common.evaluate import MetricMean, distinct_ngrams, evaluate, rollout_stats
from common.memory import estimate_memory
from common.models import load_policy, load_reward_model, make_reference, setup
from common.optimizers import make_optimizer, set_lr
from common.run import Run, main, prefixed
from common.tokenizer import decode_responses
from common.train import batches, compute_logp, compute_reward, measure_reward, micro_batches
from common.verifier import RULES, answer_number, gold_number, math_score
from model import autocast


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines to train on; "" is the built-in task
    test: str = ""                # JSON lines to test on; "": a twentieth of --data
    init: str = "out/sft"         # policy to start from: a checkpoint or a Hugging Face folder
    reward: str = "rule"          # "rule": `score` below; "math": math-verify; else a reward model
    out: str = "out/grpo"         # folder for the checkpoint, metrics, samples and curves
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
    clip_eps: float = 0.2         # ε, how far the ratio may leave 1 before its gradient is cut
    kl_beta: float = 0.02         # β, weight of the KL penalty; 0: none
    ref_every: int = 0            # rollouts between updates of the reference; 0: it never moves
    ref_mix: float = 0.6          # a in such an update, ref <- a policy + (1 - a) ref
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
    max_kl: float = 50.0          # early stopping: largest KL to the reference, nats per response
    retain: str = ""              # demonstrations whose loss is reported; "": those in --init
    early_stopping: bool = True   # stop a run that has gone wrong, and say by which rule


# defaults where --init is a Hugging Face folder, or a checkpoint that began as one
PRETRAINED = dict(
    max_new_tokens=512, steps=200, lr=1e-6, warmup=10, eval_every=20,
    max_kl=500.0, gradient_checkpointing=True)
COLUMNS = ("reward accuracy frac_zero_std length eos_rate entropy grad_norm kl_seq val_greedy "
           "val_accuracy")


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


def kl_k3(logp, ref_logp):
    """D of Eq. 4, per token and never negative; its mean over samples of π is KL(π ‖ π_ref). expm1
    keeps digits when the two are close; the clamp is there so that it cannot overflow."""
    log_ratio = (ref_logp - logp).clamp(max=20)
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None):
    """-J of Eq. 3. logp, old_logp, ref_logp, mask (B, T), mask 1 on response tokens; adv (B,), or
    (B, T) by token; n: responses in the whole optimiser batch, None if this is all of it.
    sampler_logp (B, T): log-probs by which the tokens were sampled, for sampler_logp_error.
    Returns the loss and statistics, means over the tokens in the mask."""
    logp = torch.where(mask > 0, logp, 0.0)                               # or exp may be inf
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    ref_logp = torch.where(mask > 0, ref_logp, 0.0)
    length = mask.sum(1)                                                  # (B,)    |o_i|
    if n is None:
        n = (length > 0).sum().clamp(min=1)
    ratio = (logp - old_logp).clamp(max=20).exp()                         # (B, T)  r_it, 1 at first
    adv = adv.view(len(adv), -1)                                          # (B, 1)  Â_i, or Â_it
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    kl = kl_k3(logp, ref_logp)                                            # (B, T)  D_it
    per_token = (surrogate - kl_beta * kl) * mask
    loss = -(per_token.sum(1) / length.clamp(min=1)).sum() / n            # 1/G Σ_i 1/|o_i| Σ_t
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        clipped_low = (ratio < 1 - clip_eps) & (adv < 0)                  # their gradient is cut
        clipped_high = (ratio > 1 + clip_eps) & (adv > 0)
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
    reference = None                                            # without a KL penalty
    if cfg.kl_beta:
        reference = make_reference(policy, moves=cfg.ref_every > 0)
    optimizer = make_optimizer(policy, cfg.lr)
    B = cfg.prompts * cfg.group_size // world_size()            # responses of this process
    micro_tokens = cfg.micro_batch_tokens
    longest = max(len(row["ids"]) for row in train_rows) + cfg.max_new_tokens
    frozen = [reference, reward_model]
    estimate_memory(device, optimizer, [policy], frozen, micro_tokens, B, longest)
    run = Run(cfg, cfg.steps, policy, optimizer, tokenizer, splits, COLUMNS, reference)

    def evaluate_policy(rows, samples=1):
        return evaluate(policy, tokenizer, rows, rule, cfg, samples, reward_model, reference,
                        run.state["truncated_reward"], retained)

    if run.is_new:                                              # measured once, kept when resumed
        run.state |= measure_reward(cfg, policy, tokenizer, reward_model, rule, train_rows)
        run.state["before"] = evaluate_policy(test_rows, samples=8)
        run.log(0, prefixed("val_", evaluate_policy(val_rows)[0]))
    batch_iter = batches(train_rows, cfg.prompts, cfg.seed, start=run.step)
    on_policy = cfg.epochs == 1 and cfg.minibatch == cfg.prompts * cfg.group_size  # one update

    for step in run.remaining_steps():
        # 1. rollout: group_size responses to every prompt
        start, stats = time.perf_counter(), MetricMean()
        batch = next(batch_iter)
        prompts = [row["ids"] for row in batch]
        tokens, mask, sampler_logp = policy.generate(           # (B, T) each
            prompts, cfg.group_size, cfg.max_new_tokens, cfg.temperature)
        mask_cpu = mask.cpu()                                   # micro-batches are cut on the CPU
        ref_logp = torch.zeros_like(sampler_logp)
        if reference is not None:
            ref_logp = compute_logp(reference, tokens, mask_cpu, cfg.temperature, micro_tokens)
        if not on_policy:
            old_logp = compute_logp(policy, tokens, mask_cpu, cfg.temperature, micro_tokens)

        # 2. reward: the rule or the reward model reads every response that ended
        responses = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        reward, _, correct = compute_reward(                    # (B,) each
            cfg, reward_model, rule, batch, tokens, mask_cpu, responses,
            run.state["truncated_reward"])
        stats.add(rollout_stats(reward, correct, mask_cpu, responses, cfg.group_size))

        # 3. advantage: no critic, the group is the baseline
        adv = group_advantage(reward, cfg.group_size).view(B, -1)  # (B, 1), or (B, T) by token
        is_zero = (adv == 0).all(1)                             # (B,)
        stats.add({"frac_zero_std": is_zero.view(-1, cfg.group_size).all(1).float().mean()})
        has_gradient = ~is_zero | (cfg.kl_beta > 0)             # (B,)
        adv = adv.to(device)
        rollout_end = time.perf_counter()

        # 4. update: clipped epochs over the same rollout
        lr = set_lr(optimizer, step, cfg.steps, cfg.warmup, floor=0.1)
        for _ in range(cfg.epochs):
            for minibatch in torch.randperm(B).split(cfg.minibatch // world_size()):
                optimizer.zero_grad()
                kept = minibatch[has_gradient[minibatch]]
                for rows, width, index in micro_batches(mask_cpu, kept, micro_tokens, device):
                    with autocast(policy):                      # bf16 where the hardware has it
                        logp, entropy = policy.token_logp(
                            tokens[rows, :width], temperature=cfg.temperature, index=index)
                    old = logp.detach() if on_policy else old_logp[rows, :width]
                    loss, loss_stats = grpo_loss(
                        logp, old, ref_logp[rows, :width], adv[rows, :width], mask[rows, :width],
                        cfg.clip_eps, cfg.kl_beta, cfg.minibatch, sampler_logp[rows, :width])
                    loss.backward()
                    loss_stats["entropy"] = entropy.sum() / len(index)
                    if reference is not None:                   # k1 of the policy that sampled
                        loss_stats["kl"] = (old - ref_logp[rows, :width]).sum() / len(index)
                    stats.add(loss_stats, len(index))
                sum_gradients(policy)                           # of all processes
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
                optimizer.step()
                stats.add({"grad_norm": grad_norm})
        if cfg.ref_every and step % cfg.ref_every == 0:
            with torch.no_grad():
                for ref, p in zip(reference.parameters(), policy.parameters()):
                    ref.lerp_(p, cfg.ref_mix)

        # 5. log, evaluate, save
        metrics = stats.read()                                  # the only wait for the GPU since 3
        update_end = time.perf_counter()
        metrics |= {"lr": lr, "tokens": int(sum_over_ranks(mask_cpu))}
        metrics["distinct_2"] = distinct_ngrams(tokens, mask)
        if reference is not None:
            metrics["kl_seq"] = metrics["kl"] * metrics["length"]   # nats per response
        if run.is_eval_step(step):
            metrics |= prefixed("val_", evaluate_policy(val_rows)[0])
        metrics |= {"gen_s": rollout_end - start, "upd_s": update_end - rollout_end}
        metrics["tok_s"] = int(metrics["tokens"] / (update_end - start))
        run.end_step(step, metrics)

    if cfg.ref_every:                                           # the KL reported is that to --init
        reference, _ = load_policy(cfg, device)
    run.report(test_rows, run.state["before"], evaluate_policy(test_rows, samples=8))
    run.plot("reward val_accuracy val_greedy", "length val_length", "frac_zero_std", "entropy")


if __name__ == "__main__":
    main(train, Config)
