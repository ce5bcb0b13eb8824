"""
GRPO on a transformers model: the algorithm of grpo.py, copied into a loop of another project. It
needs torch and transformers, and nothing of this repository.

    python experiments/grpo_on_transformers.py MODEL_FOLDER [--steps 2] [--data rows.jsonl]
                                               [--out FOLDER]

Rows are {"prompt", "answer"}; without --data they are 0+0= to 9+9=. A response is right if
its last number is the answer's. What loops around generate() often get wrong:

    1. generate() takes what is not set from the folder's generation_config.json (top_k, top_p,
       repetition_penalty, ...) and then samples from another distribution than the one that is
       scored. Here the policy's generation config is replaced.
    2. generate() needs prompts padded on the left. Here its result is padded on the right again:
       positions start at 0 and causal attention sees no pad, so scoring needs no attention mask.
    3. A response ends with its first end token, which is in the mask. Pads are never found by their
       id: the pad may be the end token.
    4. Dropout is off, or the ratio would not be 1 before the first optimiser step.
    5. Weights are float32: bf16 weights would round away updates at a rate of 1e-6.
"""
import argparse
import copy
import json
import random
import re
from decimal import Decimal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PROMPTS = 8                 # prompts in a rollout
GROUP_SIZE = 8              # responses per prompt
MAX_NEW_TOKENS = 256        # longest response
TEMPERATURE = 1.0           # divides the logits, in sampling and in every log-prob
CLIP_EPS = 0.2
KL_BETA = 0.02
EPOCHS = 1                  # passes over each rollout
MINIBATCH = 32              # responses in an optimiser step
MICRO_BATCH = 8             # responses in one forward, changes no gradient
LR = 1e-6
GRAD_CLIP = 1.0

# ------------------------------------------- copied from grpo.py, "the algorithm", without a change


def group_advantage(reward, group_size):
    """Â of §4.1.2. reward (B,), the responses of one prompt adjacent -> adv (B,); a group of equal
    rewards gets exactly 0."""
    r = reward.view(-1, group_size)
    adv = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    # compare the rewards: the float mean of equal rewards can differ from them
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    return torch.where(equal, 0.0, adv).flatten()


def kl_k3(logp, ref_logp):
    """D of Eq. 4, per token and never negative; its mean over samples of π is KL(π ‖ π_ref). expm1
    keeps digits when the two are close; the clamp is there so that it cannot overflow."""
    log_ratio = (ref_logp - logp).clamp(max=20)
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(logp, old_logp, ref_logp, adv, mask, clip_eps, kl_beta, n=None, sampler_logp=None):
    """-J of Eq. 3. logp, old_logp, ref_logp, mask (B, T), mask 1 on response tokens; adv (B,), or
    (B, T) by token; n: responses in the whole optimiser batch, None if this is all of it.
    sampler_logp (B, T): log-probs by which the tokens were sampled, for sampler_logp_error.
    Returns the loss and statistics, means over the tokens in the mask."""
    logp = torch.where(mask > 0, logp, 0.0)                               # or exp may be inf
    old_logp = torch.where(mask > 0, old_logp, 0.0)
    ref_logp = torch.where(mask > 0, ref_logp, 0.0)
    length = mask.sum(1)                                                  # (B,)    |o_i|
    if n is None:
        n = (length > 0).sum().clamp(min=1)
    ratio = (logp - old_logp).clamp(max=20).exp()                         # (B, T)  r_it, 1 at first
    adv = adv.view(len(adv), -1)                                          # (B, 1)  Â_i, or Â_it
    surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    kl = kl_k3(logp, ref_logp)                                            # (B, T)  D_it
    per_token = (surrogate - kl_beta * kl) * mask
    loss = -(per_token.sum(1) / length.clamp(min=1)).sum() / n            # 1/G Σ_i 1/|o_i| Σ_t
    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        clipped_low = (ratio < 1 - clip_eps) & (adv < 0)                  # their gradient is cut
        clipped_high = (ratio > 1 + clip_eps) & (adv > 0)
        stats = {"clip_low": (clipped_low * mask).sum() / tokens,
                 "clip_high": (clipped_high * mask).sum() / tokens}
        if sampler_logp is not None:                                      # sampler = policy: near 0
            error = (old_logp - sampler_logp).abs() * mask
            stats["sampler_logp_error"] = error.sum() / tokens
    return loss, stats


# ------------------------------------------------------------------------------------- end of copy


def last_number(text):
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return Decimal(found[-1].replace(",", "")) if found else None


def score(row, response):
    """1 for a right response, 0 for a wrong one and for None, which did not end."""
    answer = last_number(str(row["answer"]))
    return float(response is not None and answer is not None and last_number(response) == answer)


def autocast(device):
    """bf16 products over float32 weights on CUDA, the same in sampling and in scoring."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def sampling_config(policy, tokenizer):
    """Plain sampling: no top-k, no top-p, no penalties; the end tokens are the folder's."""
    end = policy.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    end = end if isinstance(end, list) else [end]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end[0])
    return GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS,
        num_return_sequences=GROUP_SIZE, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)


@torch.no_grad()
def sample_responses(policy, tokenizer, rows):
    """GROUP_SIZE responses to every row, adjacent: tokens, mask (B, T), right-padded, the mask 1 on
    responses and their end tokens; and their texts, None for one that did not end."""
    texts = [row["prompt"] for row in rows]
    if tokenizer.chat_template:                                  # a prompt is a user's turn
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    special = not tokenizer.chat_template                        # the template wrote its own
    prompts = tokenizer(texts, padding=True, add_special_tokens=special, return_tensors="pt")
    ids, attention_mask = prompts.input_ids, prompts.attention_mask       # (b, P), left-padded
    with autocast(policy.device):
        out = policy.generate(input_ids=ids.to(policy.device),
                              attention_mask=attention_mask.to(policy.device)).cpu()
    P = ids.size(1)
    length = attention_mask.sum(1).repeat_interleave(GROUP_SIZE)          # (B,)  of the prompts
    end = torch.tensor(policy.generation_config.eos_token_id)
    is_end = torch.isin(out[:, P:], end)                                  # (B, N)
    ended = is_end.any(1)
    # (B,)  tokens of the response, up to its first end token, and of prompt and response
    count = torch.where(ended, is_end.int().argmax(1) + 1, is_end.size(1))
    total = length + count
    start = P - length
    sequences = [row[i:i + n] for row, i, n in zip(out, start.tolist(), total.tolist())]
    tokens = pad_sequence(sequences, batch_first=True)                    # (B, T)
    column = torch.arange(tokens.size(1))
    mask = (column >= length[:, None]) & (column < total[:, None])        # (B, T)
    texts = []
    for row, chosen, whole in zip(tokens, mask, ended):
        texts.append(tokenizer.decode(row[chosen], skip_special_tokens=True) if whole else None)
    return tokens.to(policy.device), mask.float().to(policy.device), texts


def token_logp(model, tokens, mask):
    """(B, T): log π(tokens[b, t] | tokens[b, :t]), 0 where the mask is 0."""
    with autocast(tokens.device):
        logits = model(tokens, use_cache=False).logits[:, :-1]            # (B, T-1, V)
    logits = logits.float() / TEMPERATURE
    logp = logits.gather(2, tokens[:, 1:, None])[..., 0] - logits.logsumexp(2)
    return torch.where(mask > 0, F.pad(logp, (1, 0)), 0.0)


@torch.no_grad()
def compute_logp(model, tokens, mask):
    """token_logp of a whole rollout, without gradient."""
    pieces = zip(tokens.split(MICRO_BATCH), mask.split(MICRO_BATCH))
    return torch.cat([token_logp(model, *piece) for piece in pieces])


def load_rows(path):
    if path:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f if line.strip()]
    rows = []
    for a in range(10):
        for b in range(10):
            rows.append({"prompt": f"{a}+{b}=", "answer": a + b})
    return rows


def train(model_folder, data, steps, out):
    torch.manual_seed(0)
    rng = random.Random(0)
    rows = load_rows(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model_folder).float().to(device)
    policy.eval()                                                         # no dropout, see 4
    own_config = policy.generation_config
    policy.generation_config = sampling_config(policy, tokenizer)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)

    for step in range(1, steps + 1):
        # 1. rollout, scored by the policy as it is now and by the reference
        batch = rng.sample(rows, min(PROMPTS, len(rows)))
        tokens, mask, texts = sample_responses(policy, tokenizer, batch)
        old_logp = compute_logp(policy, tokens, mask)                     # (B, T)
        ref_logp = compute_logp(reference, tokens, mask)                  # (B, T)

        # 2. reward and advantage
        reward = [score(batch[i // GROUP_SIZE], text) for i, text in enumerate(texts)]
        reward = torch.tensor(reward, device=device)                      # (B,)
        adv = group_advantage(reward, GROUP_SIZE)                         # (B,)

        # 3. update
        for _ in range(EPOCHS):
            for minibatch in torch.randperm(len(tokens)).split(MINIBATCH):
                optimizer.zero_grad()
                for i in minibatch.split(MICRO_BATCH):
                    logp = token_logp(policy, tokens[i], mask[i])
                    loss, _ = grpo_loss(logp, old_logp[i], ref_logp[i], adv[i], mask[i],
                                        CLIP_EPS, KL_BETA, n=len(minibatch))
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), GRAD_CLIP)
                optimizer.step()

        kl = (kl_k3(old_logp, ref_logp) * mask).sum() / mask.sum()        # before the update
        print(f"step {step}: reward {reward.mean():.3f}, length {mask.sum(1).mean():.1f}, "
              f"kl {kl:.5f}", flush=True)

    if out:
        policy.generation_config = own_config
        policy.save_pretrained(out)
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GRPO on a transformers model")
    parser.add_argument("model", help="a Hugging Face model folder")
    parser.add_argument("--data", default="", help="JSON lines of prompt and answer")
    parser.add_argument("--steps", type=int, default=100, help="rollouts")
    parser.add_argument("--out", default="", help="folder for the trained model")
    args = parser.parse_args()
    train(args.model, args.data, args.steps, args.out)
