"""
How often a model answers right, as it is or with examples in its prompt.

    python experiments/evaluate.py out/smollm2 test.jsonl --max_new_tokens 128
    python experiments/evaluate.py out/smollm2 test.jsonl --examples train.jsonl --shots 2
    python experiments/evaluate.py out/grpo test.jsonl --loss_on gsm8k_test.jsonl

Rows are {"prompt", "answer"} or GSM8K's. Three readings of a response that ended: "rule" is what
grpo.py rewards (the number after ####, else in a box, else the last one), "last" the last number
whatever the marks, "strict" only a number after ####. Each line: greedy, accuracy at temperature 1,
pass@k, and half of the 95% interval of each over rows, those of one "split_by" together. --loss_on:
demonstrations, whose loss in nats per token tells what else a training run has changed.
"""
import argparse
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from common import InputError, load  # noqa: E402
from common.data import filter_rows, read_rows, tokenize_demonstration  # noqa: E402
from common.evaluate import half_interval, mean_nll, repeated_uniform  # noqa: E402
from common.tokenizer import decode_responses, encode_prompt  # noqa: E402
from common.train import eval_batch_size  # noqa: E402
from common.verifier import answer_number, gold_number  # noqa: E402

READINGS = ("rule", "last", "strict")


def read_answer(text, reading):
    """The number that a response gives, None for none."""
    if reading == "last":
        text = text.replace("####", " ").replace("\\boxed", " ")
    if reading == "strict" and "####" not in text:
        return None
    return answer_number(text)


def with_examples(row, examples):
    """The row's prompt as a chat that begins with examples of right responses."""
    messages = []
    for example in examples:
        messages.append({"role": "user", "content": example["prompt"].strip()})
        messages.append({"role": "assistant", "content": example["response"]})
    messages.append({"role": "user", "content": row["prompt"].strip()})
    return row | {"messages": messages}


@torch.no_grad()
def sample_responses(policy, tokenizer, rows, samples, max_new_tokens, temperature, seed):
    """samples responses to each row -> texts, None for a truncated one, and lengths in tokens."""
    uniform = repeated_uniform(len(rows) * samples, max_new_tokens, seed)
    longest = max(len(row["ids"]) for row in rows) + max_new_tokens
    size = eval_batch_size(policy, longest, samples)            # prompts at a time
    texts, lengths = [], []
    for i in range(0, len(rows), size):
        prompts = [row["ids"] for row in rows[i:i + size]]
        tokens, mask, _ = policy.generate(
            prompts, samples, max_new_tokens, temperature,
            uniform=uniform[i * samples:(i + size) * samples])
        texts += decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        lengths += mask.sum(1).tolist()
    return texts, lengths


def response_loss(policy, tokenizer, path, n=200):
    """Nats per response token on the first n demonstrations of a file."""
    rows = read_rows(path, "prompt", "response")[:n]
    rows = [tokenize_demonstration(row, tokenizer) for row in rows]
    return mean_nll(policy, rows)


def main(cfg):
    policy, tokenizer = load(cfg.model, kind="GPT", system=cfg.system)
    def gold_of(row):
        return gold_number(row.get("answer", row.get("response")))

    rows = read_rows(cfg.data, "prompt")
    reason = "the answer is not wholly one number"
    rows = filter_rows(rows, lambda row: gold_of(row) is not None, reason)
    if cfg.prompts:
        rows = rows[:cfg.prompts]
    if cfg.shots:
        examples = read_rows(cfg.examples, "prompt", "response")[:cfg.shots]
        rows = [with_examples(row, examples) for row in rows]
    gold = []
    for row in rows:
        row["ids"] = encode_prompt(tokenizer, row)
        gold.append(gold_of(row))
    keys = [row.get("split_by", row["_line"]) for row in rows]
    number = {key: i for i, key in enumerate(keys)}
    group = torch.tensor([number[key] for key in keys])         # rows that are not independent

    greedy, _ = sample_responses(
        policy, tokenizer, rows, 1, cfg.max_new_tokens, 0.0, cfg.seed)
    sampled, lengths = sample_responses(
        policy, tokenizer, rows, cfg.samples, cfg.max_new_tokens, 1.0, cfg.seed)
    ended = sum(text is not None for text in sampled) / len(sampled)
    print(f"{cfg.model} on {len(rows)} rows of {cfg.data}, up to {cfg.max_new_tokens} tokens: "
          f"{ended:.3f} of the samples ended, mean length {sum(lengths) / len(lengths):.1f}")
    for reading in READINGS:
        def right(text, i):
            return float(text is not None and read_answer(text, reading) == gold[i])

        by_row = torch.tensor([right(text, k // cfg.samples) for k, text in enumerate(sampled)])
        by_row = by_row.view(-1, cfg.samples)                   # (rows, samples)
        columns = {
            "greedy": torch.tensor([right(text, i) for i, text in enumerate(greedy)]),
            "T = 1": by_row.mean(1),
            f"pass@{cfg.samples}": by_row.amax(1),
        }
        cells = [f"{name} {x.mean():.3f} ± {half_interval(x, group):.3f}"
                 for name, x in columns.items()]
        print(f"    {reading:8}" + "    ".join(cells))
    if cfg.loss_on:
        loss = response_loss(policy, tokenizer, cfg.loss_on)
        print(f"    {loss:.3f} nats per token on {cfg.loss_on}")
    for row, text in list(zip(rows, greedy))[:cfg.show]:
        print(f"    {row['prompt']!r} -> {text!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("model", help="checkpoint or Hugging Face folder")
    parser.add_argument("data", help="JSON lines with answers")
    parser.add_argument("--examples", help="JSON lines of demonstrations, for --shots")
    parser.add_argument("--shots", type=int, default=0, help="examples in every prompt")
    parser.add_argument("--prompts", type=int, default=0, help="rows to read, 0: all")
    parser.add_argument("--samples", type=int, default=8, help="k of pass@k")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--system", default="auto", help="system message, default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss_on", help="JSON lines of demonstrations")
    parser.add_argument("--show", type=int, default=0, help="greedy responses to print")
    try:
        main(parser.parse_args())
    except InputError as e:
        sys.exit(f"evaluate.py: {e}")
