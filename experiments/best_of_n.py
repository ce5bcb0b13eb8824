"""
Best-of-n: sample n responses to a prompt and keep the one with the highest score. It needs no
training and is a baseline for every algorithm here (Stiennon et al. 2020, arXiv 2009.01325; Gao et
al. 2022, arXiv 2210.10760).

    python experiments/best_of_n.py out/sft                             by out/reward
    python experiments/best_of_n.py out/smollm2 --data test.jsonl --reward out/smollm2_reward

For n = 1, 2, 4, ...: accuracy and score of the response that the reward model prefers; accuracy of
the one that the rule prefers, which is pass@n; and log n - (n-1)/n nats, an upper bound of the KL
to the policy, close if every response is improbable (arXiv 2401.01879).

All come from the same samples: the mean over every subset of n of them, in closed form.
"""
import argparse
import math
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import grpo  # noqa: E402
from common import InputError, load  # noqa: E402
from common.data import filter_rows, read_rows, running_sums, tokenize_prompts  # noqa: E402
from common.evaluate import repeated_uniform  # noqa: E402
from common.models import ensure_checkpoint, read_reward_model  # noqa: E402
from common.tokenizer import decode_responses  # noqa: E402
from common.train import eval_batch_size, score_responses  # noqa: E402
from common.verifier import checked_score, is_right  # noqa: E402


def mean_best_of(n, score, value):
    """Mean over all subsets of n of the N samples: the value of the one with the highest score.
    score, value (P, N) -> (P,). A sample with k lower ones is the highest in C(k, n-1) of the
    C(N, n) subsets. Tied samples share their mean value."""
    N = score.size(1)
    weight = torch.tensor([math.comb(k, n - 1) / math.comb(N, n) for k in range(N)],
                          dtype=torch.float64)
    order = score.argsort(dim=1, stable=True)
    same = score[:, :, None] == score[:, None, :]                         # (P, N, N)
    shared = (same * value[:, None, :]).sum(2) / same.sum(2)              # (P, N)
    return (shared.gather(1, order).double() * weight).sum(1)


def kl_of_best_of(n):
    """The upper bound of the KL to the policy that was sampled, in nats."""
    return math.log(n) - (n - 1) / n


@torch.no_grad()
def sample_and_score(policy, tokenizer, reward_model, rows, samples, max_new_tokens, seed):
    """`samples` responses at temperature 1 to each row with "ids" -> scores by the reward model,
    and 1 for right ones, (P, N) each. A truncated response has the lowest score and is wrong."""
    uniform = repeated_uniform(len(rows) * samples, max_new_tokens, seed)
    longest = max(len(row["ids"]) for row in rows) + max_new_tokens
    size = eval_batch_size(policy, longest, samples)            # prompts at a time
    scores, right, ended = [], [], []
    for i in range(0, len(rows), size):
        chunk = rows[i:i + size]
        tokens, mask, _ = policy.generate(
            [row["ids"] for row in chunk], samples, max_new_tokens,
            uniform=uniform[i * samples:(i + size) * samples])
        scores.append(score_responses(reward_model, tokens, mask.cpu()))
        texts = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        for k, text in enumerate(texts):
            row = chunk[k // samples]
            ended.append(text is not None)
            right.append(text is not None and is_right(checked_score(grpo.score, row, text)))
    if not any(ended):
        raise InputError(f"no response ended within --max_new_tokens {max_new_tokens}")
    score, ended = torch.cat(scores), torch.tensor(ended)
    score = torch.where(ended, score, score[ended].min())
    return score.view(-1, samples), torch.tensor(right, dtype=torch.float32).view(-1, samples)


def curve(score, right):
    """A row for every power of two up to the number of samples, and for that number."""
    N = score.size(1)
    sizes, n = [], 1
    while n < N:
        sizes.append(n)
        n *= 2
    rows = []
    for n in sizes + [N]:
        rows.append({
            "n": n, "kl": kl_of_best_of(n),
            "score": mean_best_of(n, score, score).mean().item(),
            "accuracy": mean_best_of(n, score, right).mean().item(),
            "pass@n": mean_best_of(n, right, right).mean().item()})
    return rows


def load_rows(path, tokenizer, max_new_tokens, block_size):
    """Prompts with answers: the built-in test prompts, or those of a file."""
    rows = read_rows(path, "prompt") if path else running_sums(1_000, "test")
    reason = '"answer" is not wholly one number'
    rows = filter_rows(rows, lambda row: grpo.score(row, "") is not None, reason)
    return tokenize_prompts(rows, tokenizer, max_new_tokens, block_size)


def main(cfg):
    for name in ("samples", "max_new_tokens"):
        if getattr(cfg, name) < 1:
            raise InputError(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if not cfg.data and cfg.model == "out/sft":
        ensure_checkpoint(cfg.model, "sft.py", "out/sft", cfg.seed)
        ensure_checkpoint(cfg.reward, "reward.py", "out/reward", cfg.seed)
    policy, tokenizer = load(cfg.model, kind="GPT")
    reward_model = read_reward_model(cfg.reward, policy, tokenizer)
    rows = load_rows(cfg.data, tokenizer, cfg.max_new_tokens, policy.cfg.block_size)
    score, right = sample_and_score(policy, tokenizer, reward_model, rows, cfg.samples,
                                    cfg.max_new_tokens, cfg.seed)
    print(f"{cfg.model}, {len(rows)} prompts, {cfg.samples} samples each")
    print("   n     KL <=   score  accuracy  pass@n")
    for row in curve(score, right):
        print(f"{row['n']:4}  {row['kl']:8.3f}  {row['score']:6.2f}  {row['accuracy']:8.3f}  "
              f"{row['pass@n']:6.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("model", help="checkpoint or Hugging Face folder that is sampled from")
    parser.add_argument("--reward", default="out/reward", help="reward model")
    parser.add_argument("--data", default="", help="JSON lines with answers; default: built-in")
    parser.add_argument("--samples", type=int, default=16, help="of each prompt, N")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    try:
        main(parser.parse_args())
    except InputError as e:
        sys.exit(f"best_of_n.py: {e}")
