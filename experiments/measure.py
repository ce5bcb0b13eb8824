"""
What compare.py reports of a trained model on the built-in task's 1,000 test prompts.
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import grpo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from common import load  # noqa: E402
from common.data import running_sums, split_rows, tokenize_demonstration  # noqa: E402
from common.evaluate import evaluate, evaluate_rankings, repeated_uniform  # noqa: E402
from common.preferences import read_preferences, tokenize_rankings  # noqa: E402
from common.tokenizer import decode_responses, encode_prompt  # noqa: E402
from common.verifier import is_right  # noqa: E402
from grpo import score  # noqa: E402


def measure_reward_model(out):
    """evaluate_rankings on the pairs of test prompts that the run collected."""
    model, tokenizer = load(out)
    _, _, test = split_rows(read_preferences(f"{out}/preferences.jsonl"))
    rows = tokenize_rankings(test, tokenizer, model.trunk.cfg.block_size)
    metrics, _ = evaluate_rankings(model, rows, score, reward.Config())
    return metrics


def measure_policy(out, sft_out, seed):
    """Accuracy, KL to the SFT model, loss on the held-out demonstrations, length and shown working
    of a policy on the test prompts. Each seed has random numbers of its own, so that the interval
    over seeds is that of new samples."""
    model, tokenizer = load(out)
    reference, _ = load(sft_out)
    demonstrations = [tokenize_demonstration(row, tokenizer) for row in sft.demonstrations(0)[2]]
    rows = []
    for row in running_sums(1_000, "test"):
        rows.append(row | {"ids": encode_prompt(tokenizer, row)})
    cfg = grpo.Config(seed=seed)
    result, texts = evaluate(model, tokenizer, rows, score, cfg, 8, reference=reference,
                             retained=demonstrations)
    right = torch.tensor([one_if_right(row, text) for row, text in zip(rows, texts)])
    # hasty guesses are multiples of five
    in_fives = torch.tensor([int(row["_two_digits"]) % 5 == 0 for row in rows])
    result["greedy, sums in fives"] = right[in_fives].mean().item()
    result["greedy, other sums"] = right[~in_fives].mean().item()
    result["length_wrong"] = length_of_wrong_responses(model, tokenizer, rows, seed)
    return result | measure_working(model, tokenizer, rows, seed)


def one_if_right(row, text):
    """1.0 for a right response, 0.0 for a wrong or truncated one."""
    return float(text is not None and is_right(score(row, text)))


def length_of_wrong_responses(model, tokenizer, rows, seed):
    """Mean tokens of the wrong ones among the first of eight responses to each prompt, which
    `evaluate` drew too."""
    max_new_tokens = grpo.Config.max_new_tokens
    uniform = repeated_uniform(8 * len(rows), max_new_tokens, seed)[::8]
    prompts = [row["ids"] for row in rows]
    tokens, mask, _ = model.generate(prompts, 1, max_new_tokens, uniform=uniform)
    texts = decode_responses(tokenizer, tokens, mask, model.cfg.stop_token_ids)
    wrong = torch.tensor([1 - one_if_right(row, text) for row, text in zip(rows, texts)])
    return ((wrong * mask.sum(1)).sum() / wrong.sum().clamp(min=1)).item()


def measure_working(model, tokenizer, rows, seed, samples=4):
    """How often a policy shows its working at temperature 1, how often it is then right, and its
    greedy accuracy where the response is forced to begin with a running total instead of "#"."""
    max_new_tokens, stop = grpo.Config.max_new_tokens, model.cfg.stop_token_ids
    prompts = [row["ids"] for row in rows]
    uniform = repeated_uniform(len(rows) * samples, max_new_tokens, 100 + seed)
    tokens, mask, _ = model.generate(prompts, samples, max_new_tokens, uniform=uniform)
    texts = decode_responses(tokenizer, tokens, mask, stop)
    shown, right = 0, 0.0
    for i, text in enumerate(texts):
        if text and "," in text:
            shown += 1
            right += one_if_right(rows[i // samples], text)

    digits = tokenizer.encode("01")                     # the first running total is 02 to 18
    likelier = likelier_digit(model, prompts, digits)
    forced = [ids + [digits[k]] for ids, k in zip(prompts, likelier)]
    tokens, mask, _ = model.generate(forced, 1, max_new_tokens, temperature=0)
    rest = decode_responses(tokenizer, tokens, mask, stop)
    n_right = 0.0
    for row, text in zip(rows, rest):
        if text is not None:
            n_right += score(row, "0" + text)           # what counts comes after "#"
    return {"shows its working": shown / len(texts), "right when it does": right / max(1, shown),
            "greedy, made to begin with a total": n_right / len(rows)}


@torch.no_grad()
def likelier_digit(model, prompts, digits):
    """Which of two token ids is likelier to follow each prompt: a list of 0 and 1."""
    last = torch.tensor([len(ids) - 1 for ids in prompts])
    T = int(last.max()) + 1
    tokens = torch.tensor([ids + [0] * (T - len(ids)) for ids in prompts])        # (B, T)
    hidden = model(tokens)[torch.arange(len(prompts)), last]                      # (B, C)
    logits = hidden @ model.unembedding[digits].T                                 # (B, 2)
    return logits.argmax(1).tolist()
