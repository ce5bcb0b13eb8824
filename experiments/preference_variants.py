"""
Variants of dpo.py: functions and a small class that replace functions of the script. variants.py
runs them.

They replace dpo_loss. Log-probs (P,) are sums over tokens, as in DPO, or means (mean_logp, in place
of sequence_logp). label_smoothing is not used.
"""
import copy
import itertools
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import InputError  # noqa: E402
from common.data import filter_rows, split_rows, tokenize_rows  # noqa: E402
from common.models import load_policy  # noqa: E402
from common.preferences import load_pairs  # noqa: E402
from common.rows import normalise, read_objects  # noqa: E402
from common.tokenizer import encode_response  # noqa: E402
from common.train import compute_logp, freeze, pad_batch, pad_pairs  # noqa: E402
from dpo import dpo_loss  # noqa: E402


def mean_logp(logp, mask):
    """In place of sequence_logp: the mean over the tokens of each response, (B,)."""
    return torch.where(mask > 0, logp, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """IPO, Eq. 17: draws h to 1 / (2β), where DPO draws it to infinity."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    h = (logp_w - logp_l) - (ref_w - ref_l)                               # (P,)
    if n is None:
        n = len(h)
    return (h - 1 / (2 * beta)).square().sum() / n, stats


def simpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None, gamma_ratio=0.5):
    """SimPO, Eq. 6: -log σ(β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ), γ = gamma_ratio β.
    Log-probs are means; no reference."""
    _, stats = dpo_loss(logp_w, logp_l, 0 * ref_w, 0 * ref_l, beta)
    margin = beta * (logp_w - logp_l) - gamma_ratio * beta                # (P,)
    if n is None:
        n = len(margin)
    return -F.logsigmoid(margin).sum() / n, stats


def orpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """ORPO, Eq. 6 and 7: -log P(y_w) - β log σ(log odds(y_w) - log odds(y_l)), β being the paper's
    λ, P = exp(mean log-prob) and odds = P / (1 - P). No reference."""
    _, stats = dpo_loss(logp_w, logp_l, 0 * ref_w, 0 * ref_l, beta)
    log_odds_ratio = log_odds(logp_w) - log_odds(logp_l)                  # (P,)
    if n is None:
        n = len(logp_w)
    return (-logp_w - beta * F.logsigmoid(log_odds_ratio)).sum() / n, stats


def log_odds(logp):
    """log P/(1 - P) of P = exp(logp). 1 - P is -expm1(logp), exact also where P is near 1; P stays
    1e-6 below 1, or the odds would be infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-torch.expm1(logp)).log()


class KTO:
    """KTO, Eq. 7 and 8. Each row holds a desirable and an undesirable response, of one prompt if
    the data are pairs, else of two; the rarer label is repeated, so λ_D = λ_U = 1.

        L = mean over responses of 1 - v,   v = σ(β (h - z0)) or, if undesirable, σ(β (z0 - h))

    with h = log π/π_ref of the response and z0 = max(0, mean of h over mismatched prompts and
    responses of the batch), without gradient."""

    def load_policy(self, cfg, device):
        self.policy, tokenizer = load_policy(cfg, device)
        self.reference = freeze(copy.deepcopy(self.policy))
        self.cfg = cfg
        return self.policy, tokenizer

    def load_pairs(self, path, test_path, tokenizer, block_size):
        """Preferences, or rows {"prompt", "completion", "label"}."""
        if not any("label" in row for _, row in itertools.islice(read_objects(path), 1)):
            return load_pairs(path, test_path, tokenizer, block_size)
        splits = split_rows(read_labelled(path), read_labelled(test_path) if test_path else None)
        return [pair_labels(rows, tokenizer, block_size) for rows in splits]

    def pad_pairs(self, rows):
        """As in common/train.py. z0 of these rows is kept for the loss."""
        tokens, mask = mismatched(rows, self.policy.cfg.block_size)
        tokens = tokens.to(self.policy.device)
        h = 0.0
        for sign, model in ((1, self.policy), (-1, self.reference)):
            logp = compute_logp(model, tokens, mask, 1.0, self.cfg.micro_batch_tokens)
            h = h + sign * logp.sum(1)                                    # (2 P,)
        self.z0 = h.mean().clamp(min=0)
        return pad_pairs(rows)

    def dpo_loss(self, logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
        z0 = self.z0.to(logp_w.device)
        return kto_loss(logp_w, logp_l, ref_w, ref_l, beta, z0, n)


def kto_loss(logp_w, logp_l, ref_w, ref_l, beta, z0, n=None):
    """The mean of 1 - v over P desirable (w) and P undesirable (l) responses."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    v_w = torch.sigmoid(beta * (logp_w - ref_w - z0))                     # (P,)
    v_l = torch.sigmoid(beta * (z0 - (logp_l - ref_l)))
    if n is None:
        n = len(v_w)
    loss = ((1 - v_w) + (1 - v_l)).sum() / (2 * n)
    return loss, stats | {"z0": z0}


def mismatched(rows, block_size):
    """tokens, mask (N, T): each prompt of the rows with a response to another one. N is 2 P, less
    what does not fit and what has no other prompt."""
    examples = []                                                         # prompt ids, response ids
    for row in rows:
        for tokens, mask in zip(row["tokens"], row["mask"]):
            start = len(mask) - sum(mask)
            examples.append((tokens[:start], tokens[start:]))
    sequences, masks = [], []
    for i, (prompt, _) in enumerate(examples):
        for j in range(i + 1, i + len(examples)):
            other, response = examples[j % len(examples)]
            if other != prompt and len(prompt + response) <= block_size:
                sequences.append(prompt + response)
                masks.append([0] * len(prompt) + [1] * len(response))
                break
    if not sequences:
        raise InputError("kto: the KL needs a batch of at least two prompts")
    return pad_batch(sequences, masks)


def read_labelled(path):
    """Rows {"prompt", "completion", "label"} -> demonstrations with a "label", true or false."""
    rows = []
    for location, raw in read_objects(path):
        label = raw.pop("label", None)
        if label not in (True, False):
            raise InputError(f'{location}: field "label" must be true or false, not {label!r}')
        rows.append(normalise(raw, location, ("prompt", "response")) | {"label": bool(label)})
    rows = filter_rows(rows, lambda row: "_dropped" not in row, "see docs/data_and_models.md")
    return filter_rows(rows, lambda row: row["response"].strip(), "the completion is empty")


def pair_labels(rows, tokenizer, block_size):
    """Each desirable response beside an undesirable one, of another prompt; the rarer label is
    repeated."""
    def encode(row):
        tokens, mask = encode_response(tokenizer, row, row["response"])
        return row | {"tokens": tokens, "mask": mask}

    rows = tokenize_rows(rows, tokenizer, encode, need=False)
    reason = f"longer than the model's {block_size} tokens"
    rows = filter_rows(rows, lambda row: len(row["tokens"]) <= block_size, reason, need=False)
    good = [row for row in rows if row["label"]]
    bad = [row for row in rows if not row["label"]]
    if not good or not bad:
        return []
    pairs = []
    for i in range(max(len(good), len(bad))):
        w, l = good[i % len(good)], bad[i % len(bad)]
        pairs.append(w | {"tokens": (w["tokens"], l["tokens"]), "mask": (w["mask"], l["mask"]),
                          "chosen": w["response"], "rejected": l["response"]})
    return pairs
