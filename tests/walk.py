"""
One token on its way through model.py and grpo.py, with shapes and numbers: the first of an answer to 7+5+2+4+6+3=

    python tests/walk.py [FOLDER]         after python sft.py; the README shows what it prints
"""
import copy
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from grpo import Config, group_advantage, grpo_loss, score  # noqa: E402
from model import answers, load, make_optimizer, set_lr  # noqa: E402

PROMPT, TOTAL, G, SEED = "7+5+2+4+6+3=", "27", 4, 1


def walk(folder="out/sft"):
    policy, tokenizer = load(folder, torch.device("cpu"))
    reference, optimizer = copy.deepcopy(policy).requires_grad_(False), make_optimizer(policy, Config.lr)
    size = lambda x: "x".join(map(str, x.shape))

    # rollout: the prompt is run once, and four answers are drawn from it, a token a step
    ids = tokenizer.encode_ordinary(PROMPT)
    torch.manual_seed(SEED)
    tokens, mask, sampled = policy.generate([ids], G, Config.max_new)
    texts = answers(tokenizer, tokens, mask, policy.cfg.stop)
    right = [i for i, text in enumerate(texts) if text and score({"two_digits": TOTAL}, text)]
    i = (right or [0])[0]                                                     # a right answer
    t = len(ids)                                                              # its first token: a running total, or # and a guess
    told = tokenizer.decode([tokens[i, t].item()])
    print(f"prompt      {PROMPT!r} -> ids {ids}, {len(ids)} tokens")
    print(f"answers     {texts}")
    print(f"tokens      {size(tokens)}, mask {size(mask)} with {int(mask.sum())} ones; follow tokens[{i}, {t}] = {tokens[i, t]}, {told!r}")

    # model.py: what the network makes of tokens[i, :t], and the probability it gave to the token
    hidden = policy(tokens)
    logits = hidden[i, t - 1] @ policy.unembedding.T
    logp, entropy = policy.token_logp(tokens, mask)
    print(f"hidden      {size(hidden)}; column {t - 1}, the last that {told!r} may know of, times the embedding "
          f"{size(policy.unembedding)}: {len(logits)} logits")
    print(f"logit       {logits[tokens[i, t]]:.3f}, log Σ exp {logits.logsumexp(0):.3f}, so logp[{i}, {t}] = {logp[i, t]:.4f}, π = {logp[i, t].exp():.4f}; "
          f"entropy {entropy[i, t]:.3f} nats")
    print(f"sampler     said {sampled[i, t]:.4f} when it drew it from the cache: {(sampled - logp).abs().max():.0e} apart at most")

    # grpo.py: reward, advantage, loss
    reward = torch.tensor([score({"two_digits": TOTAL}, text or "") for text in texts])
    adv = group_advantage(reward, G)
    ref, _ = reference.token_logp(tokens, mask)
    old = logp.detach()
    print(f"reward      {reward.tolist()}; mean {reward.mean():.2f}, std {reward.std():.3f}; adv {[round(a, 3) for a in adv.tolist()]}")
    logp.retain_grad()
    loss, stats = grpo_loss(logp, old, ref, adv, mask, Config.clip_eps, Config.kl_beta)
    loss.backward()
    n = int(mask[i].sum())
    print(f"loss        {loss:.4f}, about 0: advantages of a group sum to 0, and only its gradient speaks")
    print(f"gradient    d loss / d logp[{i}, {t}] = {logp.grad[i, t]:.5f} = -adv / (|o| G) = -{adv[i]:.3f} / ({n} x {G})")
    lr = set_lr(optimizer, 1, Config.steps, Config.warmup, floor=0.1)
    optimizer.step()
    now, _ = policy.token_logp(tokens, mask)
    ratio = (now - old).exp()
    whole = [round(x, 3) for x in ((now - old) * mask).sum(1).exp().tolist()]
    print(f"one step    of AdamW at {lr:.0e}, where the warm-up begins: ratio[{i}, {t}] = {ratio[i, t]:.4f}, of whole answers {whole}")
    loss, stats = grpo_loss(now, old, ref, adv, mask, Config.clip_eps, Config.kl_beta)
    clipped = stats["clip_low"] + stats["clip_high"]
    print(f"afterwards  loss {loss:.4f}, kl {stats['kl']:.1e} nats a token, clipped {clipped:.3f} of the tokens")


if __name__ == "__main__":
    walk(*sys.argv[1:])
