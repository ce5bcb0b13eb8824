"""
What a training loop calls: batches and micro-batches, log-probs and rewards of a whole rollout, and
models that are frozen or compiled. What a paper shows is in the scripts.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.data import spread
from common.distributed import gather_shards, shard
from common.lora import trunk_of
from common.tokenizer import InputError, decode_responses
from common.verifier import checked_score, is_right, states_number
from model import autocast, uses_bf16

# evaluation samples so many tokens at a time, and responses that take so many bytes
EVAL_BATCH_TOKENS = 2 ** 17
EVAL_BATCH_BYTES = {"cpu": 2 ** 30}                       # elsewhere 8 GiB
MIN_REWARD_STD = 0.1              # PPO divides rewards by their standard deviation, or by this


# ----------------------------------------------------------------------- batches and micro-batches


def batches(rows, size, seed, start=0):
    """Endless batches of `size` rows, of which each rank gets its shard. Each epoch is shuffled by
    (seed, epoch) alone, so that a resumed run skips `start` batches and goes on."""
    def shuffled(epoch):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(rows), generator=generator).tolist()

    epoch, i = divmod(start * size, len(rows))
    order = shuffled(epoch)
    while True:
        while len(order) < i + size:
            epoch += 1
            order = order[i:] + shuffled(epoch)
            i = 0
        yield [rows[k] for k in shard(order[i:i + size])]
        i += size


def pad_batch(sequences, masks):
    """Lists of token ids and of 0/1 -> tokens (B, T) int64, mask (B, T), right-padded with 0."""
    T = max(len(ids) for ids in sequences)
    tokens = torch.tensor([list(ids) + [0] * (T - len(ids)) for ids in sequences])
    mask = torch.tensor([list(m) + [0] * (T - len(m)) for m in masks], dtype=torch.float32)
    return tokens, mask


def pad_pairs(rows):
    """tokens, mask (P, 2, T) of pairs, the chosen response first."""
    tokens = [ids for row in rows for ids in row["tokens"]]
    mask = [m for row in rows for m in row["mask"]]
    tokens, mask = pad_batch(tokens, mask)
    return tokens.view(len(rows), 2, -1), mask.view(len(rows), 2, -1)


def pad_rankings(batch, K):
    """tokens, mask (P, K, T) and ranks (P, K) of rows with up to K responses; a missing one has
    rank -1 and an empty mask."""
    tokens, masks, ranks = [], [], []
    for row in batch:
        missing = K - len(row["ranks"])
        tokens += [*row["tokens"]] + [[0]] * missing
        masks += [*row["mask"]] + [[0]] * missing
        ranks += row["ranks"] + [-1] * missing
    tokens, mask = pad_batch(tokens, masks)
    P = len(batch)
    return tokens.view(P, K, -1), mask.view(P, K, -1), torch.tensor(ranks).view(P, K)


def cache_bytes(model):
    """Bytes of a token's keys and values."""
    cfg = model.cfg
    size = 2 if uses_bf16(model) else 4
    return 2 * cfg.n_layer * cfg.n_kv_head * cfg.head_dim * size


def sampling_bytes(model):
    """Bytes of a row while a token is sampled: logits, probabilities, and a copy of them."""
    return 3 * 4 * model.cfg.vocab_size


def eval_byte_limit(device):
    """Bytes that the responses which evaluation samples at a time may take."""
    return EVAL_BATCH_BYTES.get(device.type, 2 ** 33)


def eval_batch_size(model, longest, samples=1):
    """Prompts that evaluation runs at a time. longest: tokens of the longest sequence."""
    limit = eval_byte_limit(model.device)
    rows = limit // (longest * cache_bytes(model) + sampling_bytes(model))
    rows = min(rows, EVAL_BATCH_TOKENS // longest)
    return max(1, rows // samples)


def default_micro_batch_tokens(device):
    """On a CPU small micro-batches cost little and need fewer pads: an SFT step takes 1/7 less."""
    return 1024 if device.type == "cpu" else 16384


def micro_batches(mask, rows, micro_batch_tokens, device):
    """Cut `rows` of a batch into pieces of at most micro_batch_tokens tokens, rows of like length
    together and trimmed to their width.

    mask (B, T), or (B, K, T) where a row is K sequences that stay together, on the CPU; rows (b,).
    Yields rows, width, index: the rows of a piece, its width, and the flat positions of the mask in
    tokens[rows, ..., :width], which token_logp takes instead of the mask. All is computed on the
    CPU, so that nothing waits for the GPU. micro_batch_tokens 0: by device.
    """
    budget = micro_batch_tokens or default_micro_batch_tokens(device)
    chosen = mask[rows] > 0
    if mask.dim() == 2:
        chosen = chosen[:, None]                                            # (b, K, T)
    column = torch.arange(1, mask.size(-1) + 1)
    width = (chosen * column).amax((1, 2)).clamp(min=1)                   # (b,)  last chosen column
    width, order = width.sort(stable=True)
    rows, chosen = rows[order], chosen[order]
    while len(rows):
        cost = width * chosen.size(1) * torch.arange(1, len(rows) + 1)  # of the first n rows
        n = max(1, int((cost <= budget).sum()))
        t = int(width[n - 1])
        index = F.pad(chosen[:n, :, 1:t], (1, 0)).flatten().nonzero()[:, 0]
        yield to_device(rows[:n], device), t, to_device(index, device)
        rows, chosen, width = rows[n:], chosen[n:], width[n:]


def to_device(x, device):
    """A copy that does not wait for the GPU: from pinned memory, on CUDA."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def select_groups(generations, keep, group_size):
    """The groups to keep out of several generations, each a tuple of tensors (b G, T), of any
    width T, or (b G,). keep: whether to keep each group of all of them -> the same tensors for the
    groups that are kept."""
    groups = keep.nonzero()                                                 # (kept, 1)
    rows = (groups * group_size + torch.arange(group_size)).flatten()       # (B,)
    T = max(x.size(1) for generation in generations for x in generation if x.dim() == 2)
    batch = []
    for parts in zip(*generations):
        if parts[0].dim() == 2:
            parts = [F.pad(x, (0, T - x.size(1))) for x in parts]
        batch.append(torch.cat(parts)[rows.to(parts[0].device)])
    return batch


# ------------------------------------------------- log-probs, values and rewards of a whole rollout


@torch.no_grad()
def compute_logp(model, tokens, mask, temperature=1.0, micro_batch_tokens=0):
    """token_logp of a whole rollout without gradient, in pieces. tokens (B, T), mask (B, T) on the
    CPU -> logp (B, T)."""
    dtype = torch.promote_types(model.unembedding.dtype, torch.float32)
    logp = torch.zeros(tokens.shape, dtype=dtype, device=tokens.device)
    every_row = torch.arange(len(tokens))
    for rows, width, index in micro_batches(mask, every_row, micro_batch_tokens, tokens.device):
        with autocast(model):
            logp[rows, :width], _ = model.token_logp(tokens[rows, :width], None, temperature, index)
    return logp


@torch.no_grad()
def compute_values(model, tokens, mask, micro_batch_tokens=0):
    """value (B, T) and score (B,) of a ScalarModel for a whole rollout without gradient, in pieces.
    mask (B, T) on the CPU."""
    value = torch.zeros(tokens.shape, device=tokens.device, dtype=model.head.weight.dtype)
    score = value.new_zeros(len(tokens))
    mask_dev = mask.to(tokens.device)
    every_row = torch.arange(len(tokens))
    for rows, width, _ in micro_batches(mask, every_row, micro_batch_tokens, tokens.device):
        with autocast(model):
            piece = model.value_and_score(tokens[rows, :width], mask_dev[rows, :width])
        value[rows, :width], score[rows] = piece
    return value, score


@torch.no_grad()
def score_responses(reward_model, tokens, mask, micro_batch_tokens=0):
    """The reward model's score of every response, (B,), on the CPU, as mask (B, T) is. Equal
    responses to a prompt are scored once: in bf16 the scores of two micro-batches differ in the
    third digit, which a group's standard deviation would turn into advantages."""
    T = tokens.size(1)
    rows = torch.cat([tokens.cpu(), mask.long()], 1)                        # (B, 2 T)
    distinct, number = rows.unique(dim=0, return_inverse=True)              # (n, 2 T), (B,)
    tokens = distinct[:, :T].to(tokens.device)
    _, score = compute_values(reward_model, tokens, distinct[:, T:], micro_batch_tokens)
    return score.cpu()[number]


def compute_reward(cfg, reward_model, score, rows, tokens, mask, responses, truncated_reward):
    """reward, raw and correct of every response, (B,) each, on the CPU, as mask (B, T) is. rows: of
    the prompts.

    raw: the reward model's score, or that of the function `score` where reward_model is None;
    truncated_reward for a truncated response. reward: raw plus --format_reward, which a reward
    model's score never gets. correct: 1 if the response ended with a full score (is_right) by
    `score`, else 0; None if a row does not say what is right."""
    group_size = len(responses) // len(rows)
    rows = [row for row in rows for _ in range(group_size)]                 # one per response
    ended = torch.tensor([text is not None for text in responses])
    by_rule = [checked_score(score, row, text or "", need=reward_model is None)
               for row, text in zip(rows, responses)]
    correct = None
    if None not in by_rule:
        by_rule = torch.tensor([float(x) for x in by_rule])
        correct = (ended & is_right(by_rule)).float()
    raw = by_rule
    if reward_model is not None:
        raw = score_responses(reward_model, tokens, mask, cfg.micro_batch_tokens)
    if not raw[ended].isfinite().all():
        raise InputError(f"--reward {cfg.reward}: it gave a response a score that is not finite")
    raw = torch.where(ended, raw, truncated_reward)
    reward = raw
    if reward_model is None and cfg.format_reward:
        form = [float(states_number(text or "")) for text in responses]
        reward = raw + cfg.format_reward * torch.tensor(form)
    return reward, raw, correct


def measure_reward(cfg, policy, tokenizer, reward_model, score, rows):
    """Two numbers that a run measures once, on a response to each of 512 of its training prompts
    (--eval_prompts, if that is fewer), and prints. reward_std: the standard deviation of the
    reward, at least MIN_REWARD_STD. truncated_reward: --truncated_reward, or the lowest reward of
    these responses if that is lower, so that being truncated does not pay."""
    rows = spread(rows, min(512, cfg.eval_prompts or 512))
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new_tokens
    size = eval_batch_size(policy, longest)
    rows = shard(rows)
    uniform = torch.rand(len(rows), cfg.max_new_tokens, dtype=torch.float64)
    rewards, ended = [], []
    for i in range(0, len(rows), size):
        chunk = rows[i:i + size]
        prompts = [row["ids"] for row in chunk]
        tokens, mask, _ = policy.generate(
            prompts, 1, cfg.max_new_tokens, cfg.temperature, uniform=uniform[i:i + size])
        responses = decode_responses(tokenizer, tokens, mask, policy.cfg.stop_token_ids)
        reward, _, _ = compute_reward(
            cfg, reward_model, score, chunk, tokens, mask.cpu(), responses, cfg.truncated_reward)
        rewards += reward.tolist()
        ended += [text is not None for text in responses]
    ended, reward = torch.tensor(gather_shards(ended)), torch.tensor(gather_shards(rewards))
    lowest = min([cfg.truncated_reward, *reward[ended].tolist()])
    reward = torch.where(ended, reward, lowest)
    std = float(reward.std(correction=0))
    print(f"reward of {len(reward)} responses: mean {reward.mean():.3f}, standard deviation "
          f"{std:.3f}; a truncated response gets {lowest:.3f}")
    if std < MIN_REWARD_STD:
        print("warning: rewards hardly differ; where they are divided by their standard deviation, "
              f"it counts as {MIN_REWARD_STD}")
    return {"reward_std": max(std, MIN_REWARD_STD), "truncated_reward": lowest}


# ------------------------------------------------------------------------------------------ models


def freeze(model, bf16=True, device=None):
    """No gradients. With bf16, and where the forward is in bf16 anyway, on the device where it is
    or will be, the weights of its products are stored in bf16: half of the memory, the same
    products. Embeddings, which are looked up in float32, norms, biases, adapters and the scalar
    head stay float32."""
    bf16 = bf16 and uses_bf16(model, device)
    for module in trunk_of(model).modules():
        if bf16 and isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()
    return model.requires_grad_(False)


def configure_blocks(model, gradient_checkpointing, compile):
    """How the blocks of a trained model run. One is compiled for all blocks and for all lengths."""
    model.gradient_checkpointing = gradient_checkpointing
    if not compile:
        return
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=model.device))
    except Exception as e:                           # no C++ compiler, no Triton, an unknown device
        print(f"--compile: torch.compile does not work here ({type(e).__name__})")
        return
    for block in model.blocks:
        block.compile(dynamic=True)
