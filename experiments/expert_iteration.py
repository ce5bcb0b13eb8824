"""
Expert iteration, or rejection-sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825): sample
responses from a policy, keep the right ones, and fine-tune on them by sft.py. variants.py runs it.
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import InputError, load  # noqa: E402
from common.data import load_prompts, tokenize_demonstration  # noqa: E402
from common.models import ensure_checkpoint, load_or_create_model  # noqa: E402
from common.tokenizer import before_response  # noqa: E402
from common.verifier import checked_score, is_right  # noqa: E402
from evaluate import sample_responses  # noqa: E402
from sft import score  # noqa: E402


class ExpertIteration:
    """Sampled demonstrations for sft.py. Both methods replace functions of the script."""

    def load_or_create_model(self, cfg, device):
        """Runs sft.py first if the default --init is missing."""
        if not cfg.data:
            ensure_checkpoint(cfg.init, "sft.py", "out/sft", cfg.seed)
        self.device = device
        return load_or_create_model(cfg, device)

    def load_demonstrations(self, cfg, tokenizer, block_size, built_in, sampler="", prompts=1600,
                            skip=0, samples=8, keep=4, control=False):
        """Responses of the policy `sampler` ("" means --init) to `prompts` training prompts, of
        each at most `keep` distinct ones that are right; with control as many random ones. Held-out
        rows are the built-in demonstrations, or the prompts of --data, which have no loss."""
        policy, own = load(sampler or cfg.init, self.device, "GPT")
        if (own.name, own.n_vocab) != (tokenizer.name, tokenizer.n_vocab):
            raise InputError(f"--sampler {sampler}: its tokenizer is not that of --init")
        train, val, test = load_prompts(cfg, tokenizer, score, block_size)
        if skip >= len(train):
            raise InputError(f"--skip {skip}: there are {len(train)} training prompts")
        train = train[skip:skip + prompts]
        texts, _ = sample_responses(policy, tokenizer, train, samples, cfg.max_new_tokens, 1.0,
                                    cfg.seed)
        generator = torch.Generator().manual_seed(cfg.seed)               # of the control
        kept = []
        for i, row in enumerate(train):
            responses = texts[i * samples:(i + 1) * samples]
            for text in keep_right(row, responses, keep, control, generator):
                kept.append(tokenize_demonstration(with_response(row, text), tokenizer))
        n = len(train) * samples
        print(f"expert iteration: {len(kept)} of {n} responses are kept")
        if not kept:
            raise InputError(f"expert: none of {n} responses is right; train --init further, or "
                             "give easier prompts")
        if built_in:
            _, val, test = built_in
            val = [tokenize_demonstration(row, tokenizer) for row in val]
            test = [tokenize_demonstration(row, tokenizer) for row in test]
            return kept, val, test
        for row in val + test:                                            # no response, no loss
            row.update(tokens=row["ids"], mask=[0] * len(row["ids"]))
        return kept, val, test


def with_response(row, text):
    """The row with this response; in a conversation only the new turn has a loss."""
    if "messages" not in row:
        return row | {"response": text}
    messages = []
    for message in before_response(row["messages"]):
        messages.append(message | {"weight": 0} if message["role"] == "assistant" else message)
    messages.append({"role": "assistant", "content": text})
    return row | {"response": text, "messages": messages}


def keep_right(row, texts, keep, control, generator):
    """At most `keep` distinct right ones of the responses to a prompt; with control as many of all
    that ended and are not empty, drawn at random."""
    ended = [text for text in texts if text]
    right = []
    for text in ended:
        if text not in right and is_right(checked_score(score, row, text)):
            right.append(text)
    right = right[:keep]
    if not control:
        return right
    order = torch.randperm(len(ended), generator=generator)
    return [ended[i] for i in order[:len(right)]]
