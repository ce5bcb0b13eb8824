"""
One token on its way through model.py and grpo.py, with shapes and numbers: the first token of a
response to 7+5+2+4+6+3=.

    python experiments/trace_one_token.py [FOLDER]      after python sft.py
"""
import copy
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import InputError, load  # noqa: E402
from common.optimizers import make_optimizer, set_lr  # noqa: E402
from common.tokenizer import decode_responses, encode_prompt  # noqa: E402
from common.train import freeze  # noqa: E402
from grpo import Config, group_advantage, grpo_loss, score  # noqa: E402

ROW = {"prompt": "7+5+2+4+6+3=", "_two_digits": "27"}
G = 4
SEED = 1


def shape(x):
    return "x".join(str(n) for n in x.shape)


def rounded(x):
    return [round(number, 3) for number in x.tolist()]


def trace(folder="out/sft"):
    policy, tokenizer = load(folder, kind="GPT")
    reference = freeze(copy.deepcopy(policy))
    optimizer = make_optimizer(policy, Config.lr)

    # rollout: the prompt is run once, and four responses are sampled from it, one token per step
    ids = encode_prompt(tokenizer, ROW)
    torch.manual_seed(SEED)
    tokens, mask, sampler_logp = policy.generate([ids], G, Config.max_new_tokens)
    responses = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
    reward = torch.tensor([score(ROW, text or "") for text in responses])         # (G,)
    i = int(reward.argmax())                                    # a right response, if there is one
    t = len(ids)                                                # its first token
    token = tokens[i, t].item()
    text = repr(tokenizer.decode([token]))
    print(f"prompt      {ROW['prompt']!r} -> ids {ids}, {len(ids)} tokens")
    print(f"responses   {responses}")
    print(f"tokens      {shape(tokens)}, mask {shape(mask)} with {int(mask.sum())} ones; "
          f"follow tokens[{i}, {t}] = {token}, {text}")

    # model.py: what the network makes of tokens[i, :t], and the probability that it gave the token
    hidden = policy(tokens)                                     # (G, T, C)
    logits = hidden[i, t - 1] @ policy.unembedding.T            # (V,)
    logp, entropy = policy.token_logp(tokens, mask)             # (G, T)
    print(f"hidden      {shape(hidden)}; column {t - 1}, the last one before {text}, times the "
          f"output matrix {shape(policy.unembedding)}: {len(logits)} logits")
    print(f"logit       {logits[token]:.3f}, log Σ exp {logits.logsumexp(0):.3f}, "
          f"so logp[{i}, {t}] = {logp[i, t]:.4f}, π = {logp[i, t].exp():.4f}; "
          f"entropy {entropy[i, t]:.3f} nats")
    print(f"sampler     gave {sampler_logp[i, t]:.4f} when it sampled from the cache; largest "
          f"difference of any token {(sampler_logp - logp).abs().max():.0e}")

    # grpo.py: advantage, loss and gradient
    adv = group_advantage(reward, G)                            # (G,)
    print(f"reward      {reward.tolist()}; mean {reward.mean():.2f}, std {reward.std():.3f}; "
          f"adv {rounded(adv)}")
    ref_logp, _ = reference.token_logp(tokens, mask)
    old_logp = logp.detach()
    logp.retain_grad()
    loss, _ = grpo_loss(logp, old_logp, ref_logp, adv, mask, Config.clip_eps, Config.kl_beta)
    loss.backward()
    length = int(mask[i].sum())
    print(f"loss        {loss:.4f}: about 0, because the advantages of a group sum to 0; "
          "its gradient is not")
    print(f"gradient    d loss / d logp[{i}, {t}] = {logp.grad[i, t]:.5f} "
          f"= -adv / (|o| G) = -{adv[i]:.3f} / ({length} x {G})")

    # one step of AdamW, and the ratio that it moved
    lr = set_lr(optimizer, 1, Config.steps, Config.warmup, floor=0.1)
    optimizer.step()
    logp, _ = policy.token_logp(tokens, mask)
    ratio = (logp - old_logp).exp()
    whole = ((logp - old_logp) * mask).sum(1).exp()             # (G,)
    print(f"one step    of AdamW at {lr:.0e}, the first of the warm-up: "
          f"ratio[{i}, {t}] = {ratio[i, t]:.4f}, of whole responses {rounded(whole)}")
    loss, stats = grpo_loss(logp, old_logp, ref_logp, adv, mask, Config.clip_eps, Config.kl_beta)
    clipped = stats["clip_low"] + stats["clip_high"]
    print(f"afterwards  loss {loss:.4f}, clipped {clipped:.3f} of the tokens")


if __name__ == "__main__":
    try:
        trace(*sys.argv[1:])
    except InputError as e:
        sys.exit(f"trace_one_token.py: {e}")
