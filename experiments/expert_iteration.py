"""
Expert iteration, or rejection-sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825): sample
responses from a policy, keep the right ones, and fine-tune on them by sft.py. variants.py runs it.
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import load  # noqa: E402
from common.data import load_prompts, tokenize_demonstration  # noqa: E402
from common.models import ensure_checkpoint, load_or_create_model  # noqa: E402
from common.tokenizer import decode_responses  # noqa: E402
from common.train import eval_batch_size  # noqa: E402
from common.verifier import checked_score, is_right  # noqa: E402
from sft import score  # noqa: E402


def load_initial(cfg, device):
    """In place of load_or_create_model: runs sft.py first if the default --init is missing."""
    ensure_checkpoint(cfg.init, "sft.py", "out/sft", cfg.seed)
    return load_or_create_model(cfg, device)


def sampled_demonstrations(cfg, tokenizer, block_size, built_in, sampler="", prompts=1600, skip=0,
                           samples=8, keep=4, control=False):
    """In place of load_demonstrations: sample responses to prompts from the policy `sampler` (""
    means --init), and keep of each prompt at most `keep` distinct ones that are right; with control
    as many random ones. Held-out rows are the built-in ones, or sampled too."""
    policy, _ = load(sampler or cfg.init, kind="GPT")
    splits = load_prompts(cfg, tokenizer, score, block_size)
    generator = torch.Generator().manual_seed(cfg.seed)
    demonstrations = []
    for i, rows in enumerate(splits):
        if i and built_in:
            demonstrations.append([tokenize_demonstration(row, tokenizer) for row in built_in[i]])
            continue
        rows = rows[skip:skip + prompts] if i == 0 else rows
        kept = []
        for row, texts in zip(rows, sample_texts(policy, tokenizer, rows, samples, cfg, generator)):
            kept += keep_right(row, texts, keep, control, generator)
        if i == 0:
            print(f"expert iteration: {len(kept)} responses kept of {len(rows) * samples}")
        demonstrations.append([tokenize_demonstration(row, tokenizer) for row in kept])
    return demonstrations


def keep_right(row, texts, keep, control, generator):
    """At most `keep` distinct right responses to one prompt, as rows; control: as many of all that
    ended, drawn at random."""
    ended = [text for text in texts if text]
    right = {text: None for text in ended if is_right(checked_score(score, row, text))}
    kept = list(right)[:keep]
    if control:
        order = torch.randperm(len(ended), generator=generator).tolist()
        kept = [ended[i] for i in order[:len(kept)]]
    return [row | {"response": text} for text in kept]


def sample_texts(policy, tokenizer, rows, samples, cfg, generator):
    """`samples` responses at temperature 1 to each row -> a list of texts each, None if
    truncated."""
    uniform = torch.rand(len(rows) * samples, cfg.max_new_tokens, generator=generator,
                         dtype=torch.float64)
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new_tokens
    size = eval_batch_size(policy, longest, samples)                      # prompts at a time
    texts = []
    for i in range(0, len(rows), size):
        ids = [row["ids"] for row in rows[i:i + size]]
        tokens, mask, _ = policy.generate(ids, samples, cfg.max_new_tokens,
                                          uniform=uniform[i * samples:(i + size) * samples])
        texts += decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
    return [texts[i:i + samples] for i in range(0, len(texts), samples)]
