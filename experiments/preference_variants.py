"""
Variants of dpo.py: functions and a small class that replace functions of the script. variants.py
runs them.

The losses replace dpo_loss. Their log-probs (P,) are sums over tokens, as in DPO, or means, where
mean_logp replaces sequence_logp: then logp_w and logp_l in the log are per token. label_smoothing
is not used.
"""
import copy
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import InputError  # noqa: E402
from common.data import filter_rows, split_rows, tokenize_rows  # noqa: E402
from common.models import load_policy  # noqa: E402
from common.preferences import load_pairs  # noqa: E402
from common.rows import normalise, read_objects, require_text  # noqa: E402
from common.tokenizer import encode_response  # noqa: E402
from common.train import batches, compute_logp, freeze, pad_batch  # noqa: E402
from dpo import dpo_loss, evaluate_pairs  # noqa: E402


def mean_logp(logp, mask):
    """In place of sequence_logp: the mean over the tokens of each response, (B,)."""
    return torch.where(mask > 0, logp, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def ipo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """IPO, Eq. 17: its optimum is h = 1 / (2β), DPO's is at infinity."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    h = (logp_w - logp_l) - (ref_w - ref_l)                               # (P,)
    if n is None:
        n = len(h)
    return (h - 1 / (2 * beta)).square().sum() / n, stats


def simpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None, gamma_ratio=0.5):
    """SimPO, Eq. 6: -log σ(β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ), γ = gamma_ratio β.
    Log-probs are means; no reference."""
    zero = torch.zeros_like(logp_w)
    _, stats = dpo_loss(logp_w, logp_l, zero, zero, beta)
    margin = beta * (logp_w - logp_l) - gamma_ratio * beta                # (P,)
    if n is None:
        n = len(margin)
    return -F.logsigmoid(margin).sum() / n, stats


def orpo_loss(logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
    """ORPO, Eq. 6 and 7: -log P(y_w) - β log σ(log odds(y_w) - log odds(y_l)), β being the paper's
    λ, P = exp(mean log-prob) and odds = P / (1 - P). No reference."""
    zero = torch.zeros_like(logp_w)
    _, stats = dpo_loss(logp_w, logp_l, zero, zero, beta)
    log_odds_ratio = log_odds(logp_w) - log_odds(logp_l)                  # (P,)
    if n is None:
        n = len(logp_w)
    return (-logp_w - beta * F.logsigmoid(log_odds_ratio)).sum() / n, stats


def evaluate_without_reference(policy, pairs, cfg):
    """As in dpo.py; the stored reference log-probs count as 0."""
    return evaluate_pairs(policy, [row | {"ref": (0.0, 0.0)} for row in pairs], cfg)


def log_odds(logp):
    """log P/(1 - P) of P = exp(logp). 1 - P is -expm1(logp), exact also where P is near 1; P stays
    1e-6 below 1, or the odds would be infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-torch.expm1(logp)).log()


class KTO:
    """KTO, Eq. 7 and 8. Each row holds a desirable and an undesirable response, of one prompt if
    the data are pairs, else of two; the rarer label is repeated, so λ_D = λ_U = 1.

        L = mean over responses of 1 - v,   v = σ(β (r - z0)) or, if undesirable, σ(β (z0 - r))

    with r = log π/π_ref of the response and z0 = max(0, mean of r over mismatched pairs of prompt
    and response in the optimiser batch), without gradient."""

    def load_policy(self, cfg, device):
        self.policy, tokenizer = load_policy(cfg, device)
        self.reference = freeze(copy.deepcopy(self.policy))
        return self.policy, tokenizer

    def load_pairs(self, path, test_path, tokenizer, block_size):
        """Preferences, or rows {"prompt", "completion", "label"}."""
        _, first = next(read_objects(path), ("", {}))
        if "label" not in first or "chosen" in first:
            splits = load_pairs(path, test_path, tokenizer, block_size)
        else:
            test = read_labelled(test_path) if test_path else None
            train, *held_out = split_rows(read_labelled(path), test)
            splits = [pair_labels(train, tokenizer, block_size, path)]
            splits += [pair_labels(rows, tokenizer, block_size) for rows in held_out]
        if not mismatched(splits[0], block_size):
            raise InputError(f"{path}: all training rows have one prompt; KTO's KL is estimated "
                             "with the responses of other prompts")
        return splits

    def batches(self, rows, size, seed, start=0):
        """As in common/train.py. z0 of a batch is estimated before it is trained on."""
        for batch in batches(rows, size, seed, start):
            self.z0 = self.estimate_z0(batch)
            yield batch

    def evaluate_pairs(self, policy, pairs, cfg):
        """As in dpo.py, with the z0 of these pairs."""
        self.z0 = self.estimate_z0(pairs)
        return evaluate_pairs(policy, pairs, cfg)

    def estimate_z0(self, rows):
        """z0, a number; 0 if all rows have one prompt."""
        sequences = mismatched(rows, self.policy.cfg.block_size)
        total = 0.0
        for i in range(0, len(sequences), 256):
            tokens, mask = pad_batch(*zip(*sequences[i:i + 256]))
            tokens = tokens.to(self.policy.device)
            total += compute_logp(self.policy, tokens, mask).sum().item()
            total -= compute_logp(self.reference, tokens, mask).sum().item()
        return max(0.0, total / max(1, len(sequences)))

    def dpo_loss(self, logp_w, logp_l, ref_w, ref_l, beta, label_smoothing=0.0, n=None):
        return kto_loss(logp_w, logp_l, ref_w, ref_l, beta, self.z0, n)


def kto_loss(logp_w, logp_l, ref_w, ref_l, beta, z0, n=None):
    """The mean of 1 - v over P desirable (w) and P undesirable (l) responses; z0 is a number. Of
    the statistics margin and pair_acc compare the two of a row, which may have two prompts."""
    _, stats = dpo_loss(logp_w, logp_l, ref_w, ref_l, beta)
    v_w = torch.sigmoid(beta * (logp_w - ref_w - z0))                     # (P,)
    v_l = torch.sigmoid(beta * (z0 - (logp_l - ref_l)))
    if n is None:
        n = len(v_w)
    loss = ((1 - v_w) + (1 - v_l)).sum() / (2 * n)
    return loss, stats | {"z0": torch.as_tensor(z0)}


def mismatched(rows, block_size):
    """Mismatched pairs for z0: every prompt with the next response of the same label to another
    prompt that fits in block_size -> a list of (token ids, mask)."""
    sequences = []
    for k in (0, 1):                                                      # desirable, undesirable
        examples = []                                                     # prompt ids, response ids
        for row in rows:
            tokens, mask = row["tokens"][k], row["mask"][k]
            start = len(mask) - sum(mask)
            examples.append((tokens[:start], tokens[start:]))
        for i, (prompt, _) in enumerate(examples):
            for j in range(i + 1, i + len(examples)):
                other, response = examples[j % len(examples)]
                if other != prompt and len(prompt + response) <= block_size:
                    sequences.append((prompt + response, [0] * len(prompt) + [1] * len(response)))
                    break
    return sequences


def read_labelled(path):
    """Rows {"prompt", "completion", "label"} -> demonstrations with a "label", true or false."""
    rows = []
    for location, raw in read_objects(path):
        label = raw.pop("label", None)
        if label not in (True, False):
            raise InputError(f'{location}: field "label" must be true or false, not {label!r}')
        row = normalise(raw, location, ("prompt", "response")) | {"label": bool(label)}
        if "_dropped" not in row:
            require_text(row, "prompt", "response")
        rows.append(row)
    for reason in {row["_dropped"] for row in rows if "_dropped" in row}:
        rows = filter_rows(rows, lambda row: row.get("_dropped") != reason, reason)

    def has_text(row):
        return row["prompt"] and row["response"].strip()

    return filter_rows(rows, has_text, "the prompt or the completion is empty")


def pair_labels(rows, tokenizer, block_size, path=""):
    """Each desirable response beside an undesirable one, of any prompt; the rarer label is
    repeated. path: the file of the training rows, an error if they have one label only; "" for
    held-out rows."""
    def encode(row):
        tokens, mask = encode_response(tokenizer, row, row["response"])
        return row | {"tokens": tokens, "mask": mask}

    rows = tokenize_rows(rows, tokenizer, encode, need=bool(path))
    reason = f"longer than the model's {block_size} tokens"
    rows = filter_rows(rows, lambda row: len(row["tokens"]) <= block_size, reason, bool(path))
    good = [row for row in rows if row["label"]]
    bad = [row for row in rows if not row["label"]]
    if path and not (good and bad):
        raise InputError(f'{path}: "label" is {bool(good)} in all training rows; KTO needs both')
    if not (good and bad):
        return []
    pairs = []
    for i in range(max(len(good), len(bad))):
        w, l = good[i % len(good)], bad[i % len(bad)]
        pairs.append(w | {"tokens": (w["tokens"], l["tokens"]), "mask": (w["mask"], l["mask"]),
                          "chosen": w["response"], "rejected": l["response"]})
    return pairs
