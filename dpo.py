"""
DPO: Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290).

The policy is its own reward model: fit it to comparisons, without a reward model, a critic or
sampling.

    1. the RLHF objective      max_π  E_{y~π} r(x, y) - β KL(π(.|x) ‖ π_ref(.|x))           (Eq. 3)
    2. has a closed form       π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x)                   (Eq. 4)
                               with Z(x) = Σ_y π_ref(y|x) exp(r(x, y)/β), because what 1
                               maximises is β log Z(x) - β KL(π ‖ π*)
    3. which gives the reward  r(x, y) = β log π*(y|x)/π_ref(y|x) + β log Z(x)              (Eq. 5)
    4. Bradley-Terry           P(y_w > y_l | x) = σ(r(x, y_w) - r(x, y_l))                  (Eq. 1)
    5. and Z(x) cancels        L(θ) = - E log σ(β h)                                        (Eq. 7)
                               h = log π_θ(y_w|x)/π_ref(y_w|x) - log π_θ(y_l|x)/π_ref(y_l|x)

    gradient    - E β σ(-β h) [∇ log π_θ(y_w|x) - ∇ log π_θ(y_l|x)]; pairs in wrong order weigh most

    paper   π_θ     log π_θ(y|x), summed over tokens   log π_ref(y|x)   β     β log π_θ/π_ref
    here    policy  logp_w, logp_l (P,)                ref_w, ref_l     beta  reward_w, reward_l

What the paper leaves open or does otherwise:

    1. h sees a difference only, so both log-probs may fall, and what they lose goes to responses
       that nobody compared; watch logp_w. The default adds sft_coef times the SFT loss on the
       chosen responses (arXiv 2404.19733 takes a mean per response); --sft_coef 0 is plain DPO.
    2. Label smoothing ε is cDPO: if a share ε of the labels is wrong, the optimum is no longer
       infinite but σ(β h) = 1 - ε.
    3. The reference is the policy before its first step. Its log-probs are computed once, for all
       pairs, so no second model is in memory.

Run:     python dpo.py                                       -> out/dpo, from out/sft
Yours:   python dpo.py --data pairs.jsonl --init out/mine    {"prompt", "chosen", "rejected"},
         HH-RLHF's own files, or {"prompt", "responses": [best, ..., worst]}
Ablate:  --sft_coef 0 --lr 2e-5     --beta 0.5     --label_smoothing 0.1
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.data import load_retained, running_sums, spread, tokenize_prompts
from common.distributed import gather, shard, sum_gradients, sum_over_ranks
from common.evaluate import MetricMean, evaluate, half_interval
from common.memory import estimate_memory
from common.models import ensure_checkpoint, load_policy, setup
from common.optimizers import make_optimizer, set_lr
from common.preferences import load_pairs
from common.run import Run, main, prefixed
from common.train import batches, compute_logp, micro_batches, pad_pairs
from common.verifier import answer_number, gold_number
from model import autocast

PAIRS = "out/reward/preferences.jsonl"                    # where reward.py leaves what it collected


@dataclass
class Config:
    # data
    data: str = ""                # JSON lines of preferences; "": out/reward/preferences.jsonl
    test: str = ""                # JSON lines to test on; "": a twentieth of --data
    init: str = "out/sft"         # policy and reference: a checkpoint or a Hugging Face folder
    out: str = "out/dpo"          # folder for the checkpoint, metrics, samples and curves
    chat: str = "auto"            # "chat": prompts are user turns; "plain": text; "auto": as --init
    system: str = "auto"          # system message of chats that have none; "auto": as --init
    seed: int = 0                 # random seed of data order and sampling
    resume: bool = False          # continue the run in --out
    # objective
    beta: float = 0.1             # β, weight of the KL penalty in the objective that DPO solves
    label_smoothing: float = 0.0  # ε of cDPO, share of pairs that are labelled wrongly, below .5
    sft_coef: float = 3.0         # weight of the SFT loss on the chosen responses; 0: plain DPO
    # optimisation
    epochs: int = 1               # passes over the pairs
    batch: int = 64               # pairs in an optimiser step
    micro_batch_tokens: int = 0   # tokens in one forward, changes no gradient; 0: by device
    gradient_checkpointing: bool = False  # recompute blocks in backward: slower, less memory
    compile: bool = False         # torch.compile the blocks: a slow start, faster steps
    lora_rank: int = 0            # r of LoRA, which trains adapters alone; 0: all weights learn
    lora_alpha: float = 32.0      # α of LoRA, whose adapters are scaled by α / r
    lr: float = 1e-4              # peak rate of AdamW; for a pretrained model 5e-7
    warmup: int = 5               # steps of linear warm-up, then half a cosine down to 0
    grad_clip: float = 1.0        # largest gradient norm
    # evaluation
    max_new_tokens: int = 24      # longest response in the evaluation
    eval_every: int = 20          # steps between evaluations, and between checkpoints
    eval_prompts: int = 0         # held-out prompts that get responses, at most; 0: all
    retain: str = ""              # demonstrations whose loss is reported; "": those in --init
    early_stopping: bool = True   # stop a run that has gone wrong, and say by which rule


# defaults where --init is a Hugging Face folder, or a checkpoint that began as one
PRETRAINED = dict(sft_coef=0.0, lr=5e-7, warmup=10, max_new_tokens=512, eval_every=50,
                  gradient_checkpointing=True)
COLUMNS = ("loss pair_acc margin reward_w reward_l logp_w logp_l grad_norm val_pair_acc "
           "val_greedy val_accuracy")


# ------------------------------------------------------------------------------------ the algorithm
# To use them elsewhere copy these two functions; they need torch and torch.nn.functional as F.


def sequence_logp(logp, mask):
    """log π(y|x) of each response, the sum over its tokens. logp, mask (B, T) -> (B,)."""
    return torch.where(mask > 0, logp, 0.0).sum(1)


def dpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """Eq. 7, and cDPO with label_smoothing > 0. logp_w, logp_l, ref_w, ref_l (P,): log-probs of the
    chosen and the rejected responses, summed over tokens; n: pairs in the whole optimiser batch,
    None if this is all of it. Returns the loss and statistics, means over the pairs: both implicit
    rewards, their difference, the share of pairs in the right order, and the policy's log-probs."""
    reward_w = beta * (logp_w - ref_w)                          # (P,)  β log π_θ/π_ref
    reward_l = beta * (logp_l - ref_l)
    margin = reward_w - reward_l                                # (P,)  β h
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    per_pair = -(1 - label_smoothing) * right - label_smoothing * wrong
    loss = per_pair.sum() / (len(margin) if n is None else n)
    h = (logp_w - ref_w) - (logp_l - ref_l)
    in_order = (h > 1e-3).float()                               # less is rounding, as at the start
    stats = {"reward_w": reward_w, "reward_l": reward_l, "margin": margin, "pair_acc": in_order,
             "logp_w": logp_w, "logp_l": logp_l}
    return loss, {name: x.detach().mean() for name, x in stats.items()}


# ---------------------------------------------------------------------------------------- the task


def score(row, response):
    """1 for a right response, 0 for a wrong one, None where the row does not say what is right. The
    built-in task: one '#', then the sum in two digits. Other rows: the number in "answer"."""
    if "_two_digits" in row:
        return float(response.count("#") == 1 and response.split("#")[1] == row["_two_digits"])
    answer = gold_number(row.get("answer"))
    return None if answer is None else float(answer_number(response) == answer)


def held_out_prompts(pairs, split, cfg, tokenizer, block_size):
    """Prompts to evaluate the policy on: those of the pairs; of the built-in task all that are held
    out, because a prompt whose responses are all right or all wrong has no pairs."""
    if any("_two_digits" in row for row in pairs):
        rows = running_sums(500 if split == "val" else 1_000, split)
    else:
        rows = {row["prompt"]: row for row in pairs}.values()
    rows = tokenize_prompts(rows, tokenizer, cfg.max_new_tokens, block_size, need=False)
    return spread(rows, cfg.eval_prompts)


# ---------------------------------------------------------------------------------------- training


def response_logp(model, rows, cfg):
    """log π(y|x) of both responses of every pair, (P, 2), without gradient, on the CPU."""
    found, rows = [torch.zeros(0, 2)], shard(rows)
    for i in range(0, len(rows), 256):
        tokens, mask = pad_pairs(rows[i:i + 256])
        tokens, mask = tokens.flatten(0, 1).to(model.device), mask.flatten(0, 1)
        logp = compute_logp(model, tokens, mask, 1.0, cfg.micro_batch_tokens)
        found.append(sequence_logp(logp.cpu(), mask).view(-1, 2))
    return torch.cat(gather(torch.cat(found)))


def evaluate_pairs(policy, pairs, cfg):
    """dpo_loss and its statistics on held-out pairs; pair_acc_ci95 is half of the 95% interval of
    pair_acc, the pairs of one prompt not being independent."""
    if not pairs:
        return {}
    logp = response_logp(policy, pairs, cfg)
    ref = torch.tensor([row["ref"] for row in pairs])           # (P, 2)
    loss, stats = dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], cfg.beta,
                           cfg.label_smoothing)
    h = (logp - ref)[:, 0] - (logp - ref)[:, 1]                 # (P,)
    in_order = h > 1e-3                                         # as in dpo_loss
    number = {row["prompt"]: i for i, row in enumerate(pairs)}
    group = torch.tensor([number[row["prompt"]] for row in pairs])
    stats |= {"pair_acc_ci95": half_interval(in_order.float(), group), "pair_loss": loss}
    return {name: x.item() for name, x in stats.items()}


def train(cfg):
    device = setup(cfg)
    policy, tokenizer = load_policy(cfg, device)                # runs sft.py if out/sft is missing
    if not cfg.data and cfg.init == Config.init:
        ensure_checkpoint("out/reward", "reward.py", "out/reward", cfg.seed, "--collect_only",
                          unless=PAIRS)
    block_size = policy.cfg.block_size
    splits = load_pairs(cfg.data or PAIRS, cfg.test, tokenizer, block_size)
    train_pairs, val_pairs, test_pairs = splits
    val_prompts = held_out_prompts(val_pairs, "val", cfg, tokenizer, block_size)
    test_prompts = held_out_prompts(test_pairs, "test", cfg, tokenizer, block_size)
    retained = load_retained(cfg, tokenizer, block_size)
    batch_size = min(cfg.batch, len(train_pairs))
    steps = math.ceil(cfg.epochs * len(train_pairs) / batch_size)
    optimizer = make_optimizer(policy, cfg.lr)
    estimate_memory(device, optimizer, [policy], [], cfg.micro_batch_tokens)
    run = Run(cfg, steps, policy, optimizer, tokenizer, splits, COLUMNS)
    if run.is_new:                                              # the policy is its own reference
        run.state["ref"] = [response_logp(policy, pairs, cfg) for pairs in splits]
    for pairs, ref in zip(splits, run.state["ref"]):
        for row, both in zip(pairs, ref.tolist()):
            row["ref"] = both

    def evaluate_policy(prompts, pairs, samples=1):
        metrics, texts = evaluate(policy, tokenizer, prompts, score, cfg, samples,
                                  retained=retained)
        return metrics | evaluate_pairs(policy, pairs, cfg), texts

    if run.is_new:
        run.state["before"] = evaluate_policy(test_prompts, test_pairs, samples=8)
        run.log(0, prefixed("val_", evaluate_policy(val_prompts, val_pairs)[0]))
    batch_iter = batches(train_pairs, batch_size, cfg.seed, start=run.step)

    for step in run.remaining_steps():
        # 1. update: both responses of a pair in one forward
        start, stats = time.perf_counter(), MetricMean()
        batch = next(batch_iter)
        tokens, mask = pad_pairs(batch)                         # (P, 2, T)
        n_chosen = int(sum_over_ranks(mask[:, 0]))              # tokens of the chosen responses
        tokens, mask_dev = tokens.to(device), mask.to(device)
        ref_w, ref_l = torch.tensor([row["ref"] for row in batch], device=device).T  # (P,)
        optimizer.zero_grad()
        every_pair = torch.arange(len(batch))
        for rows, width, index in micro_batches(mask, every_pair, cfg.micro_batch_tokens, device):
            with autocast(policy):                              # bf16 where the hardware has it
                logp, entropy = policy.token_logp(              # (2 p, width)
                    tokens[rows, :, :width].flatten(0, 1), index=index)
            piece_mask = mask_dev[rows, :, :width].flatten(0, 1)  # (2 p, width)
            logp_w, logp_l = sequence_logp(logp, piece_mask).view(-1, 2).T  # (p,)
            loss, loss_stats = dpo_loss(logp_w, logp_l, ref_w[rows], ref_l[rows], cfg.beta,
                                        cfg.label_smoothing, batch_size)
            loss_with_sft = loss - cfg.sft_coef * logp_w.sum() / n_chosen
            loss_with_sft.backward()
            loss_stats["loss"] = loss.detach() * batch_size / len(rows)
            stats.add(loss_stats, len(rows))
            stats.add({"entropy": entropy.sum() / len(index)}, len(index))
        lr = set_lr(optimizer, step, steps, cfg.warmup)
        sum_gradients(policy)                                   # of all processes
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()

        # 2. log, evaluate, save
        metrics = stats.read()                                  # the only wait for the GPU
        metrics |= {"grad_norm": float(grad_norm), "lr": lr}
        metrics["epoch"] = step * batch_size / len(train_pairs)
        metrics["step_s"] = time.perf_counter() - start
        if run.is_eval_step(step):
            metrics |= prefixed("val_", evaluate_policy(val_prompts, val_pairs)[0])
        run.end_step(step, metrics)

    after = evaluate_policy(test_prompts, test_pairs, samples=8)
    run.report(test_prompts, run.state["before"], after)
    run.plot("loss val_pair_loss", "val_accuracy val_greedy", "reward_w reward_l", "logp_w logp_l",
             "val_length", "entropy")


if __name__ == "__main__":
    main(train, Config)
