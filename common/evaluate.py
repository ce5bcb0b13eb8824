"""
Statistics of a rollout, and the evaluation on held-out prompts and rankings.
"""
import math

import torch
import torch.nn.functional as F

from common.distributed import gather, gather_shards, shard, sum_over_ranks
from common.preferences import better_worse
from common.tokenizer import decode_responses
from common.train import (compute_logp, compute_reward, compute_values, eval_batch_size,
                          pad_batch)
from common.verifier import checked_score, is_right


class MetricMean:
    """Weighted means of the statistics of many micro-batches, of all ranks. They stay on the GPU
    until `read`."""

    def __init__(self):
        self.sums = {}

    def add(self, stats, weight=1.0):
        for name, x in stats.items():
            weighted, w = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (weighted + x * weight, w + weight)

    def read(self):
        own = {name: (on_cpu(x), on_cpu(w)) for name, (x, w) in self.sums.items()}
        sums = {}
        for of_rank in gather(own):
            for name, (x, w) in of_rank.items():
                weighted, weight = sums.get(name, (0.0, 0.0))
                sums[name] = (weighted + x, weight + w)
        return {name: float(x / w) for name, (x, w) in sums.items()}


def on_cpu(x):
    return x.cpu() if torch.is_tensor(x) else x


def rollout_stats(reward, correct, mask, responses, group_size=1):
    """What is logged of a rollout: mean reward, mean length in tokens, share that ended, share that
    is right and, for groups, share of groups with a right response. reward, correct (B,), mask
    (B, T), all on the CPU."""
    ended = [text is not None for text in responses]
    stats = {"reward": reward.mean(), "length": mask.sum(1).mean()}
    stats["eos_rate"] = sum(ended) / len(ended)
    if correct is not None:
        stats["accuracy"] = correct.mean()
        if group_size > 1:
            stats["pass_at_g"] = correct.view(-1, group_size).amax(1).mean()
    return stats


def distinct_ngrams(tokens, mask, n=2):
    """Distinct-n (arXiv 1510.03055) of a batch of responses: different n-grams over all n-grams. It
    falls as responses become the same. tokens, mask (B, T)."""
    inside = mask.cpu() > 0
    both = inside[:, n - 1:]
    for i in range(n - 1):
        both = both & inside[:, i:i - n + 1]
    grams = torch.cat(gather(tokens.cpu().unfold(1, n, 1)[both]))           # (number of n-grams, n)
    return len(grams.unique(dim=0)) / max(1, len(grams))


def explained_variance(value, ret, mask):
    """1 - Var(G - V) / Var(G) over the mask: 1 for a perfect critic, 0 for a constant one, negative
    for a harmful one. 0 where G does not vary: there is nothing to explain."""
    def mean(x):
        return sum_over_ranks(torch.where(mask > 0, x, 0.0)) / sum_over_ranks(mask).clamp(min=1)

    def variance(x):
        return mean((x - mean(x)).square())

    explained = 1 - variance(ret - value) / variance(ret).clamp(min=1e-8)
    return torch.where(variance(ret) > 1e-8, explained, 0.0)


def half_interval(x, group):
    """Half of the 95% interval of mean(x), x (N,), where the values of one group are not
    independent; group (N,), the number of its group. Too narrow below some twenty groups."""
    groups = len(group.unique())
    zeros = x.new_zeros(int(group.max()) + 1)
    error = zeros.index_add(0, group, x - x.mean())            # each group's part
    return 1.96 * error.norm() / len(x) * math.sqrt(groups / max(1, groups - 1))


def calibrate(lead):
    """Predicted against true win rate of the favourite, in five bins. lead (pairs,), r_w - r_l ->
    mean gap, lines of text."""
    predicted = lead.abs().sigmoid()
    won = (lead > 0) + 0.5 * (lead == 0)
    bins = ((predicted - 0.5) * 10).int().clamp(max=4)
    gap, lines = 0.0, ""
    for b in bins.unique():
        inside = bins == b
        n = int(inside.sum())
        x = predicted[inside].mean().item()
        y = won[inside].mean().item()
        gap += n / len(lead) * abs(x - y)
        lines += f"    predicted {x:.3f}, won {y:.3f} of {n} pairs\n"
    return gap, lines


def repeated_uniform(n, max_new_tokens, seed):
    """Random numbers to sample n responses by, (n, max_new_tokens), the same at every call. A row
    has its own, so that what is sampled does not depend on which rows share a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, max_new_tokens, generator=generator, dtype=torch.float64)


def mark_truncated(tokenizer, tokens, mask, texts):
    """What decode_responses gave, with the text of truncated responses, marked at its end."""
    shown = []
    for row, chosen, text in zip(tokens.cpu(), mask.cpu(), texts):
        if text is None:
            text = tokenizer.decode(row[chosen > 0].tolist()) + " [truncated]"
        shown.append(text)
    return shown


def mean_nll(model, rows, micro_batch_tokens=0):
    """Mean negative log-likelihood of the tokens in the masks, nats per token; 0 if there are
    none."""
    nll = count = 0
    rows = shard(rows)
    for i in range(0, len(rows), 256):
        chunk = rows[i:i + 256]
        tokens, mask = pad_batch([row["tokens"] for row in chunk], [row["mask"] for row in chunk])
        logp = compute_logp(model, tokens.to(model.device), mask, 1.0, micro_batch_tokens)
        nll -= logp.sum().item()
        count += int(mask.sum())
    return sum(gather(nll)) / max(1, sum(gather(count)))


def evaluate(policy, tokenizer, rows, score, cfg, samples=1, reward_model=None, reference=None,
             truncated_reward=0.0, retained=()):
    """How a policy does on held-out rows with "ids": a greedy response to each, and `samples` at
    temperature 1 -> metrics, and the greedy responses as text, truncated ones marked.

    greedy: accuracy of the greedy response: it ended and has a full score (is_right); accuracy: the
    same at temperature 1; pass@k, k = samples > 1: any of the samples is right; eos_rate and length
    (in tokens, end token included) at temperature 1. Where `score` gives None for a row, there are
    no accuracies. score: the reward model's mean, with truncated_reward for a truncated response;
    kl_seq: mean of log π/π_ref summed over a response, in nats; both of the first sample per
    prompt. retained_loss: nats per token on the demonstrations `retained`. Sampling uses random
    numbers of its own, by --seed: evaluation changes nothing in a training run, and repeats itself.
    """
    retention = {}
    if retained:
        retention["retained_loss"] = mean_nll(policy, retained, cfg.micro_batch_tokens)
    if not rows:
        return retention, []
    uniform = repeated_uniform(len(rows) * samples, cfg.max_new_tokens, cfg.seed)
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new_tokens
    size = eval_batch_size(policy, longest, samples)
    has_answers = all(checked_score(score, row, "", need=False) is not None for row in rows)

    def has_full_score(row, text):
        return has_answers and text is not None and is_right(checked_score(score, row, text))

    uniform = shard(uniform.view(len(rows), samples, -1)).flatten(0, 1)
    rows = shard(rows)
    greedy, right, ended, length, scores, kl = [], [], [], [], [], []
    greedy_texts = []
    for i in range(0, len(rows), size):
        chunk = rows[i:i + size]
        prompts = [row["ids"] for row in chunk]
        tokens, mask, _ = policy.generate(prompts, 1, cfg.max_new_tokens, temperature=0.0)
        texts = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        greedy += [has_full_score(row, text) for row, text in zip(chunk, texts)]
        greedy_texts += mark_truncated(tokenizer, tokens, mask, texts)

        tokens, mask, _ = policy.generate(
            prompts, samples, cfg.max_new_tokens,
            uniform=uniform[i * samples:(i + size) * samples])
        texts = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        right += [has_full_score(chunk[k // samples], text) for k, text in enumerate(texts)]
        ended += [text is not None for text in texts]
        length += mask.sum(1).tolist()

        # the first sample of every prompt
        tokens = tokens[::samples]
        mask_cpu = mask[::samples].cpu()
        texts = texts[::samples]
        if reward_model is not None:
            reward, _, _ = compute_reward(
                cfg, reward_model, score, chunk, tokens, mask_cpu, texts, truncated_reward)
            scores += reward.tolist()
        if reference is not None:
            logp = compute_logp(policy, tokens, mask_cpu, 1.0, cfg.micro_batch_tokens)
            ref_logp = compute_logp(reference, tokens, mask_cpu, 1.0, cfg.micro_batch_tokens)
            kl += (logp - ref_logp).sum(1).tolist()

    greedy, right, ended = gather_shards(greedy), gather_shards(right), gather_shards(ended)
    length, scores, kl = gather_shards(length), gather_shards(scores), gather_shards(kl)
    greedy_texts = gather_shards(greedy_texts)
    metrics = {}
    if has_answers:
        right = torch.tensor(right, dtype=torch.float32).view(-1, samples)
        metrics["greedy"] = sum(greedy) / len(greedy)
        metrics["accuracy"] = right.mean().item()
        if samples > 1:
            metrics[f"pass@{samples}"] = right.amax(1).mean().item()
    metrics["eos_rate"] = sum(ended) / len(ended)
    metrics["length"] = sum(length) / len(length)
    if scores:
        metrics["score"] = sum(scores) / len(scores)
    if kl:
        metrics["kl_seq"] = sum(kl) / len(kl)
    return metrics | retention, greedy_texts


def compute_scores(model, encoded, cfg):
    """(tokens, mask) of N responses -> scores (N,) on the CPU, without gradient."""
    scores, encoded = torch.zeros(0), shard(encoded)
    if encoded:
        tokens, mask = pad_batch(*zip(*encoded))
        tokens = tokens.to(model.trunk.device)
        scores = compute_values(model, tokens, mask, cfg.micro_batch_tokens)[1].cpu()
    return torch.cat(gather(scores))


def evaluate_rankings(model, rows, score, cfg):
    """How a reward model's scores predict held-out rankings: metrics, and the calibration as lines
    of text. score: the rule, which may return None.

    acc: share of pairs in the right order, a tie being wrong; acc_ci95: half of its 95% interval,
    the pairs of one prompt not being independent; acc_same_style: acc where both responses show
    their working or neither does; acc_vs_rule: agreement with the rule, whatever the labels say;
    acc_longer: of "the longer response is better"; margin: mean difference; loss: in nats; ece:
    mean gap between predicted and true win rate; length_corr: correlation of score and length.
    """
    if not rows:
        return {}, ""
    encoded = []
    for row in rows:
        encoded += zip(row["tokens"], row["mask"])
    r = compute_scores(model, encoded, cfg)                     # (N,)  every response of every row
    length = torch.tensor([float(sum(mask)) for _, mask in encoded])
    number = {row["prompt"]: i for i, row in enumerate(rows)}
    pairs, start = [], 0                            # prompt, better, worse, same style, rule's lead
    for row in rows:
        texts = row["responses"]
        right = [checked_score(score, row, text, need=False) or 0.0 for text in texts]
        for w, l in better_worse(range(len(texts)), row["ranks"]):
            same_style = "_two_digits" in row and ("," in texts[w]) == ("," in texts[l])
            rule_lead = right[w] - right[l]
            pairs.append((number[row["prompt"]], start + w, start + l, same_style, rule_lead))
        start += len(texts)
    p, w, l, same_style, rule_lead = (torch.tensor(x) for x in zip(*pairs))  # (pairs,) each
    lead = r[w] - r[l]
    longer = length[w] - length[l]
    in_order = (lead > 0).float()
    metrics = {"acc": in_order.mean(), "acc_ci95": half_interval(in_order, p)}
    if same_style.any():
        metrics["acc_same_style"] = in_order[same_style].mean()
    if rule_lead.any():
        metrics["acc_vs_rule"] = (lead * rule_lead > 0)[rule_lead != 0].float().mean()
    ece, calibration = calibrate(lead)
    metrics |= {"margin": lead.mean(), "loss": F.softplus(-lead).mean(), "ece": ece,
                "acc_longer": ((longer > 0) + 0.5 * (longer == 0)).mean()}
    if length.std() > 0 and r.std() > 0:
        metrics["length_corr"] = torch.corrcoef(torch.stack([r, length]))[0, 1]
    return {name: float(x) for name, x in metrics.items()}, calibration
