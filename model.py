"""
model.py: one transformer, and all that the scripts share.

    GPT                      the GPT-2, Llama, Qwen 2.5 and Qwen 3 families, chosen by fields of GPTConfig
    GPT.token_logp           log-probability and entropy of every answer token, without ever holding (B, T, V)
    GPT.generate             ragged prompts in, sampled answers and their log-probabilities out, with a KV cache
    ScalarModel              the same trunk with one number per position: reward model and critic
    load, save               checkpoints, and public models' folders; a checkpoint is a folder
    python model.py export out/grpo FOLDER                           writes one as a public model's folder

One index convention holds everywhere. `tokens` (B, T) holds prompt and answer together, right-padded, always: causal
attention never looks to its right, so there is no attention mask, no left padding and no position arithmetic. `mask[b,
t]` is 1 where token t was chosen by the policy, the end token included, and 0 on prompt and pads. `logp[b, t]` is the
log-probability of `tokens[b, t]` given `tokens[b, :t]`, so `logp[:, 0] = 0`; `value[b, t]` is the value of `tokens[b,
:t]`, before token t is chosen. The one shift that this needs happens here, and nothing downstream slices.

Letters: B sequences, T tokens, C width, H query heads, K key/value heads, D head size, V vocabulary, P longest prompt,
G answers a prompt.

Sources: nanoGPT (github.com/karpathy/nanoGPT) for the shape of such a file; RoPE arXiv 2104.09864, grouped queries
arXiv 2305.13245.
"""
import argparse, base64, functools, hashlib, inspect, json, math, os, random, re, shutil, signal, subprocess, sys
import threading, time, traceback, unicodedata, zipfile
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from fractions import Fraction

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------------------- config


class InputError(Exception):
    """Something a user gave is wrong; the message is the one line that they see."""


@dataclass
class GPTConfig:
    """The defaults are the built-in model: Llama's layout at 0.36 million parameters."""
    vocab: int = 259              # V, token ids
    context: int = 64             # longest sequence, prompt and answer together
    layers: int = 3
    width: int = 96               # C, the residual stream
    heads: int = 3                # H, query heads
    kv_heads: int = 0             # K, key/value heads, each serving H / K query heads; 0: as many as heads
    head_dim: int = 0             # D; 0: C / H. Qwen 3 sets it apart from the width
    mlp_width: int = 0            # hidden units of the MLP; 0: 4 C for gelu and 8/3 C for swiglu, which cost the same
    norm: str = "rms"             # "rms", or "layer" (GPT-2)
    norm_eps: float = 1e-6
    positions: str = "rope"       # "rope", or "learned" (GPT-2)
    rope_base: float = 10_000.0   # θ of RoPE
    rope_scaling: tuple = ()      # Llama 3's (factor, low_freq_factor, high_freq_factor, original context)
    mlp: str = "swiglu"           # "swiglu", or "gelu" (GPT-2, tanh form)
    bias: bool = False            # biases in every linear layer (GPT-2)
    qkv_bias: bool = False        # biases on query, key and value alone (Qwen 2.5)
    qk_norm: bool = False         # RMSNorm on each query and key head (Qwen 3)
    tied: bool = True             # the output matrix is the embedding
    stop: tuple = (256,)          # ids that end an answer; the first is the end token that SFT appends

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.head_dim = self.head_dim or self.width // self.heads
        self.mlp_width = self.mlp_width or (4 * self.width if self.mlp == "gelu" else 8 * self.width // 3)


# --------------------------------------------------------------------------------------------------------- small layers


def make_norm(cfg, width):
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[cfg.norm](width, eps=cfg.norm_eps)


@functools.cache
@torch.inference_mode(False)                                          # training reads a table that sampling made first
def rope_table(context, dim, base, scaling, device):
    """cos, sin of position x frequency, (context, D / 2). Not a buffer: a model cast to bf16 must keep float32
    angles."""
    freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)                     # (D/2,)
    if scaling:                                   # Llama 3: slow the frequencies that the first training never saw turn
        factor, low, high, original = scaling
        keep = ((original * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)      # 1: as it was, 0: slowed
        freq = freq * (keep + (1 - keep) / factor)
    angle = torch.arange(context, dtype=torch.float64)[:, None] * freq                       # (context, D/2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D/2]) by the angle of their position. x (B, T, heads, D); cos, sin (T, 1, D/2) or (B,
    T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        self.up = nn.Linear(cfg.width, cfg.mlp_width * (1 + self.gated), bias=cfg.bias)     # gate and up are one matrix
        self.down = nn.Linear(cfg.mlp_width, cfg.width, bias=cfg.bias)

    def forward(self, x):
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h, approximate="tanh"))


# ------------------------------------------------------------------------------------------------- attention with cache


class KVCache:
    """Keys and values of a batch, one pair (B, K, columns, D) a layer.

    Prompts are right-padded into columns 0 .. P-1, and the n-th answer token of every row goes to column P + n,
    whatever its prompt's length. Attention does not care where a key is stored; the row's own position is inside the
    key (RoPE, learned), and columns that are pads or not yet written are masked. Columns are made a block at a time:
    most answers are short, and on a CPU rows that lie close together are read a sixth faster than with room for the
    longest answer between them. Within a block no shape and no address changes, so that a GPU can replay a step.
    """

    BLOCK = {"cpu": 32, "cuda": 128, "mps": 128}                           # columns

    def __init__(self, layers):
        self.layers, self.bias = [None] * layers, None

    def attend(self, layer, q, k, v):
        """Store k, v (B, K, T, D) and let q (B, H, T, D) look at all that it may see -> (B, H, T, D)."""
        if self.bias is None:                                                    # prefill: nothing before, plain causal
            self.layers[layer] = k, v
            return causal_attention(q, k, v)
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.at, k)
        values.index_copy_(2, self.at, v)
        grouped = q.view(len(q), keys.size(1), -1, q.size(3))              # the H/K heads that share a key are its rows
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.bias).reshape(q.shape)

    def prefilled(self, length, group):
        """After the prefill: every row `group` times, and only the prompts are seen. length (B,)."""
        k = self.layers[0][0]
        self.used = P = k.size(2)
        self.at = torch.tensor([P], device=k.device)                                         # the next column
        pad = torch.arange(P) >= length.repeat_interleave(group)[:, None]
        self.bias = torch.zeros(pad.shape, dtype=k.dtype).masked_fill_(pad, -math.inf)[:, None, None].to(k.device)
        self.layers = [tuple(x.repeat_interleave(group, 0) for x in pair) for pair in self.layers]
        self.grow()

    def grow(self):
        """Room for answers, up to the next full block."""
        block = self.BLOCK[self.bias.device.type]
        room = (0, block - self.used % block)
        self.bias = F.pad(self.bias, room, value=-math.inf)                                  # (B, 1, 1, columns)
        for i, pair in enumerate(self.layers):                            # one by one: never two caches at a time
            self.layers[i] = tuple(F.pad(x, (0, 0, *room)) for x in pair)

    @property
    def full(self):
        return self.used == self.bias.size(3)

    def advance(self):
        self.at += 1
        self.used += 1

    def keep(self, rows):
        """Drop every row but these."""
        for i, pair in enumerate(self.layers):
            self.layers[i] = tuple(x[rows] for x in pair)
        self.bias = self.bias[rows]


def causal_attention(q, k, v):
    """q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D); each key/value head serves H / K query heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.qkv = nn.Linear(cfg.width, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim, bias=cfg.bias or cfg.qkv_bias)
        self.out = nn.Linear(cfg.heads * cfg.head_dim, cfg.width, bias=cfg.bias)
        self.q_norm, self.k_norm = (make_norm(cfg, cfg.head_dim) if cfg.qk_norm else None for _ in "qk")

    def forward(self, x, rope, cache):
        (B, T, _), H, K = x.shape, self.heads, self.kv_heads
        qk, v = self.qkv(x).view(B, T, -1, self.head_dim).split((H + K, K), dim=2)       # (B, T, H + K, D), (B, T, K, D)
        if self.q_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], dim=2)
        if rope:
            qk = rotate(qk, *rope)                              # queries and keys at once: half the small operations
        q, k = qk.to(v.dtype).split((H, K), dim=2)                                # under bf16 a norm hands out float32
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)             # (B, H, T, D), (B, K, T, D) twice
        y = causal_attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))                                 # (B, T, C)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.norm1, self.attention = make_norm(cfg, cfg.width), Attention(cfg, layer)
        self.norm2, self.mlp = make_norm(cfg, cfg.width), MLP(cfg)

    def forward(self, x, rope, cache=None):
        x = x + self.attention(self.norm1(x), rope, cache)
        return x + self.mlp(self.norm2(x))


# ------------------------------------------------------------------------------------------------------- fused log-prob


def row_logits(hidden, weight, temperature):
    """Tempered logits, float32 or wider: hidden (n, C), weight (V, C) -> (n, V). The sampler and the scorer share
    this."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


class LinearLogp(torch.autograd.Function):
    """log softmax(hidden @ weight.T / τ)[target] without the (N, V) matrix: it is walked in tiles, one log-sum-exp a row
    is kept, and backward computes each tile's logits again:  dL/dz = g (1[v = target] - softmax(z)_v) / τ.

    On a CPU a tile fits into the cache: exponentials and sums cost little there, which pays for the second product.
    """

    ROWS = 4096                                                              # of a tile, at most
    TILE = {"cpu": 2 ** 20, "cuda": 12 * 2 ** 20, "mps": 12 * 2 ** 20}       # its logits, 4 MiB or 48 MiB in float32

    @staticmethod
    def tiles(hidden, weight):
        """Slices of the rows, and of the vocabulary."""
        for i in range(0, len(hidden), LinearLogp.ROWS):
            rows = slice(i, min(i + LinearLogp.ROWS, len(hidden)))
            step = max(1, LinearLogp.TILE[hidden.device.type] // (rows.stop - i))
            for v in range(0, len(weight), step):
                yield rows, slice(v, v + step)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        cast = weight.to(hidden.dtype)                              # once, under bf16; float32 masters stay as they are
        wide, targets = torch.promote_types(hidden.dtype, torch.float32), targets[:, None]
        total, dot, picked = (hidden.new_zeros(len(hidden), 1, dtype=wide) for _ in range(3))
        top = torch.full_like(total, -math.inf)
        for rows, part in LinearLogp.tiles(hidden, cast):
            z = row_logits(hidden[rows], cast[part], temperature)                            # (n, v)
            higher = torch.maximum(top[rows], z.amax(1, keepdim=True))
            shrink = (top[rows] - higher).exp_()                               # what was summed, to the new largest z
            p = (z - higher).exp_()
            at, here = LinearLogp.place(targets[rows], part, z)
            picked[rows] = torch.where(here, z.gather(1, at), picked[rows])
            total[rows] = total[rows] * shrink + p.sum(1, keepdim=True)                      # Σ_v exp(z_v - top)
            dot[rows] = dot[rows] * shrink + p.mul_(z).sum(1, keepdim=True)                  # Σ_v exp(z_v - top) z_v
            top[rows] = higher
            del z, p
        lse = top + total.log()                                                              # (N, 1)
        entropy = (lse - dot / total)[:, 0]                                                  # H = lse - Σ_v p_v z_v
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return (picked - lse)[:, 0], entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        cast, grad = weight.to(hidden.dtype), grad[:, None] / ctx.temperature
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows, part in LinearLogp.tiles(hidden, cast):
            h, w, g = hidden[rows], cast[part], grad[rows]
            dz = row_logits(h, w, ctx.temperature).sub_(lse[rows]).exp_().mul_(-g)           # -g p, (n, v)
            at, here = LinearLogp.place(targets[rows], part, dz)
            dz = dz.scatter_add_(1, at, torch.where(here, g, 0.0)).to(h.dtype)               # + g on the target
            for total, a, b in ((d_hidden, dz, w), (d_weight, dz.T, h)):
                if total is not None:
                    total = total[rows if b is w else part]
                    total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)
        return d_hidden if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None

    @staticmethod
    def place(targets, part, z):
        """Where each row's target stands in a tile, (n, 1), and whether it does."""
        at = targets - part.start
        return at.clamp(0, z.size(1) - 1), (at >= 0) & (at < z.size(1))


def linear_logp(hidden, weight, targets, temperature=1.0):
    """Log-probability of each row's target, and the entropy of each row's distribution, under softmax(hidden @ weight.T
    / temperature).

    hidden (N, C), weight (V, C), targets (N,) int64 -> logp (N,), entropy (N,), in nats, float32 or wider. Gradients
    reach hidden and weight through logp; the entropy is for watching and carries none. Peak extra memory is one chunk
    of logits, not (N, V).
    """
    with torch.autocast(hidden.device.type, enabled=False):    # the precision is that of `hidden`, forward and backward
        return LinearLogp.apply(hidden, weight, targets, temperature or 1.0)


# ------------------------------------------------------------------------------------------------------------------ GPT


BF16 = {"cuda"}     # devices whose matrix products run in bf16; the weights stay float32, and others compute in float32


EVALUATED = 2 ** 17                                                  # tokens that evaluation has in the cache at a time


# decoding steps between looks for finished rows, since a look waits for the GPU, and the share of live rows below which
# the others are dropped, since a GPU has to capture its steps anew
LOOK = {"cpu": (1, 0.9), "cuda": (8, 0.75), "mps": (8, 0.9)}


def autocast(device):
    """bf16 matrix products over float32 weights, where the device is in BF16; in one such block a weight is cast
    once."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in BF16)


def sample(p, generator=None):
    """One draw from each row of p (n, V) -> (n,), without a wait for the GPU. nan gives some id: the guard tells of it.

    On a CPU by the inverse of the cumulative distribution, 15x faster than torch.multinomial at V = 259; u stays clear
    of 1, where rounding could pick a token of probability 0. Elsewhere by a race of exponentials, arg min E_v / p_v.
    """
    if p.device.type != "cpu":
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
    c = p.cumsum(-1)
    u = torch.rand(len(p), 1, dtype=p.dtype, generator=generator).clamp_(max=1 - 2 ** -23)
    return torch.searchsorted(c, u * c[:, -1:], right=True)[:, 0].clamp_(max=p.size(1) - 1)


@functools.cache
def side_stream():
    """One for all captures: each stream that multiplies keeps a workspace for good. Never two graphs at a time on
    it."""
    return torch.cuda.Stream()


def replayed(step, device):
    """`step`, a function of tensors that stay where they are, as a CUDA graph: one launch for some hundreds. The first
    call is outside of the graph, since libraries allocate there. Elsewhere itself."""
    if device.type != "cuda":
        return step
    side = side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = step()

    def replay():
        graph.replay()
        return out

    return replay


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.recompute = cfg, False      # recompute: keep a block's input alone, and run it again in backward
        self.embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.position = nn.Embedding(cfg.context, cfg.width) if cfg.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.norm = make_norm(cfg, cfg.width)
        self.head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocab, bias=False)
        # Linear layers keep PyTorch's start, uniform of standard deviation 0.58 / sqrt(fan-in): .06 at width 96, where
        # GPT-2's .02 (right for width 768) learns far more slowly. Embeddings start small: first logits are near 0.
        # The matrices that write into the stream start at 0: a new block is the identity.
        for table in (self.embedding, self.position, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    @property
    def device(self):
        return self.embedding.weight.device

    @property
    def unembedding(self):
        """The output matrix, (V, C)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens, positions=None, cache=None):
        """tokens (B, T) -> hidden states (B, T, C) after the last norm. positions (B, T), None for 0 .. T-1."""
        cfg = self.cfg
        assert tokens.size(1) <= cfg.context, f"{tokens.size(1)} tokens exceed the context of {cfg.context}"
        with autocast(tokens.device):
            x = self.embedding(tokens).to(self.norm.weight.dtype)                            # (B, T, C)
            where = slice(tokens.size(1)) if positions is None else positions
            if self.position is not None:
                x = x + self.position.weight[where]
            rope = None
            if cfg.positions == "rope":
                table = rope_table(cfg.context, cfg.head_dim, cfg.rope_base, cfg.rope_scaling, x.device)
                rope = [angle[where].unsqueeze(-2) for angle in table]                   # (T, 1, D/2) or (B, T, 1, D/2)
            for block in self.blocks:
                if cache:
                    x = block.forward(x, rope, cache)                     # never compiled: shapes change with every row
                elif self.recompute and torch.is_grad_enabled():
                    x = checkpoint(block, x, rope, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, rope)
            return self.norm(x)

    def token_logp(self, tokens, mask=None, temperature=1.0, at=None):
        """logp, entropy (B, T), float32 or wider: logp[b, t] = log π(tokens[b, t] | tokens[b, :t]); 0 at t = 0 and off
        the mask.

        Only positions under the mask meet the vocabulary; no mask means every position but the first. `at`, the flat
        indices of those positions, saves a wait for the GPU where the caller knows them (see micro_batches).
        Temperature 0 counts as 1.
        """
        B, T = tokens.shape
        if at is None:
            chosen = torch.ones_like(tokens) if mask is None else mask > 0
            at = F.pad(chosen[:, 1:], (1, 0)).flatten().nonzero()[:, 0]                      # (N,)
        hidden = self(tokens).flatten(0, 1)[at - 1]                               # (N, C): position t is read off t - 1
        if tokens.device.type in BF16 and hidden.dtype == torch.float32:
            hidden = hidden.bfloat16()                                                 # the last norm hands out float32
        flat = linear_logp(hidden, self.unembedding, tokens.flatten()[at], temperature)
        return tuple(x.new_zeros(B * T).index_copy(0, at, x).view(B, T) for x in flat)

    @torch.no_grad()
    def generate(self, prompts, group=1, max_new=64, temperature=1.0, stop=None, pad=0, generator=None):
        """Sample `group` answers to every prompt.

        prompts: lists of token ids, ragged; the answers of one prompt are adjacent rows. An answer ends with the first
        id of `stop` (default: the model's own), which belongs to it, or after `max_new` tokens. temperature 0 is
        greedy. Returns tokens (B G, T) right-padded with `pad`, mask (B G, T) and logp (B G, T) of what was sampled,
        equal to token_logp's. The same seed (torch's, or `generator`'s), batch and device give the same answers.
        """
        device, stop, tau = self.device, torch.tensor(self.cfg.stop if stop is None else stop), temperature or 1.0
        length, P = torch.tensor([len(p) for p in prompts]), max(map(len, prompts))
        if length.min() < 1:
            raise ValueError("an empty prompt: the first answer token must follow something")
        if P + max_new > self.cfg.context:
            raise ValueError(f"prompt of {P} + max_new {max_new} tokens exceed the context of {self.cfg.context}")
        tokens = torch.tensor([list(p) + [pad] * (P - len(p)) for p in prompts])             # (B, P)
        stop, (every, share) = stop.to(device), LOOK[device.type]

        # around the loop, autocast casts each weight once a rollout; in inference mode it would cast at every token
        with autocast(device) if device.type in BF16 else torch.inference_mode():
            cache = KVCache(self.cfg.layers)
            last = (torch.arange(len(prompts)) * P + length - 1).to(device)
            hidden = self(tokens.to(device), cache=cache).flatten(0, 1)[last]             # (B, C), each prompt run once
            cache.prefilled(length, group)
            logits = row_logits(hidden, self.unembedding, tau).repeat_interleave(group, 0)   # (N, V), N = B G

            length = length.repeat_interleave(group)                                         # (N,)
            N, position = len(length), length[:, None].to(device, copy=True)       # (N, 1), where the next token stands
            answer = torch.full((N, max_new), pad, device=device)
            logp = logits.new_zeros(N, max_new)
            count = torch.zeros(N, dtype=torch.long, device=device)                          # answer tokens so far
            alive, done = torch.arange(N, device=device), torch.zeros(N, dtype=torch.bool, device=device)

            def decode():
                cache.bias.index_fill_(3, cache.at, 0.0)                                     # it may see itself
                hidden = self(token[:, None], position, cache)[:, 0]                         # (alive, C)
                return row_logits(hidden, self.unembedding, tau)

            step = None
            for n in range(max_new):
                p = logits.softmax(-1)                                                       # (alive, V)
                drawn = logits.argmax(-1) if temperature == 0 else sample(p, generator)      # (alive,)
                answer[alive, n] = torch.where(done, pad, drawn)
                logp[alive, n] = torch.where(done, 0.0, p.gather(1, drawn[:, None])[:, 0].log())
                count[alive] += ~done
                done = done | (drawn[:, None] == stop).any(1)
                if n + 1 == max_new:
                    break
                if (n + 1) % every == 0:
                    keep = (~done).nonzero()[:, 0]
                    if len(keep) == 0:
                        break
                    if len(keep) < share * len(done):          # a finished row costs as much as a live one, a copy also
                        cache.keep(keep)
                        alive, done, drawn, position = alive[keep], done[keep], drawn[keep], position[keep]
                        step = None
                if cache.full:
                    cache.grow()
                    step = None
                if step is None:                                                             # tensors are in new places
                    token = drawn
                    step = replayed(decode, device)
                token.copy_(drawn)
                logits = step()
                position += 1
                cache.advance()

        total = length.to(device) + count                                                    # (N,)
        T = int(total.max())
        column = torch.arange(T, device=device)
        mask = (column >= length.to(device)[:, None]) & (column < total[:, None])            # (N, T)
        given = torch.arange(max_new, device=device) < count[:, None]                 # (N, max_new), as many as in mask
        out = F.pad(tokens.repeat_interleave(group, 0).to(device), (0, T - P), value=pad)    # (N, T)
        out, logp = out.masked_scatter(mask, answer[given]), logp.new_zeros(N, T).masked_scatter(mask, logp[given])
        return out, mask.float(), logp


# ---------------------------------------------------------------------------------------------------------- scalar head


class ScalarModel(nn.Module):
    """A trunk with one number per position: a reward model or a critic, by the read-out that is used."""

    def __init__(self, trunk, std=0.0):
        """std of the head's first weights: 1 / sqrt(C + 1) for a reward model, 0 for a critic that expects nothing."""
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(trunk.cfg.width, 1)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """(B, T) -> (B, T): the number after reading tokens[b, :t + 1], in the head's own precision."""
        return self.head(self.trunk(tokens).to(self.head.weight.dtype))[..., 0]

    def read(self, tokens, mask):
        """Both read-outs, value (B, T) and score (B,), in one forward."""
        after = self(tokens)                                                                 # (B, T)
        last = (torch.arange(tokens.size(1), device=mask.device) * (mask > 0)).amax(1, keepdim=True)
        return F.pad(after[:, :-1], (1, 0)), after.gather(1, last.to(after.device))[:, 0]

    def value(self, tokens):
        """(B, T): value[b, t] is that of tokens[b, :t], before token t is chosen; the empty prefix has 0."""
        return F.pad(self(tokens)[:, :-1], (1, 0))

    def score(self, tokens, mask):
        """(B,): read at the last answer token itself, the end token, after the last choice: one column right of
        value."""
        return self.read(tokens, mask)[1]


# ------------------------------------------------------------------------------------------------------------ tokenizer


CHAT = {"chatml": ("<|im_start|>", "<|im_end|>"),                   # marks of the formats that messages are written in,
        "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}          # the last of which ends a turn


class Tokenizer(tiktoken.Encoding):
    """A tiktoken Encoding, and how a model's prompts are written with it.

    nfc: text is normalised to Unicode's form C first (Qwen). plain: added tokens that are found in any text (Qwen 3's
    <think>). first: ids that a bare prompt begins with (Llama). end: the id that ends a plain answer. vocab: the
    model's rows; an id that no token has still decodes. chat: the format of messages, a key of CHAT, or "". turns: a
    lone prompt is a user's turn as well. lead: ids before the first turn of a chat. preamble: what every system turn
    opens with (Llama 3.1's dates). system: what follows it in a chat that has no system turn. files: those of a public
    model.
    """

    def __init__(self, name, pattern, ranks, special, end, first=(), plain=(), nfc=False, vocab=0, chat="", turns=False,
                 system="", files=None):
        top = max(vocab - 1, *ranks.values(), *special.values())
        gaps = set(range(top + 1)) - set(ranks.values()) - set(special.values())
        unused = {f"<|no token {i}|>": i for i in gaps}                  # a young model may sample any id
        super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=unused | special)
        self.end, self.first, self.plain, self.nfc, self.marks = end, list(first), set(plain), nfc, special
        self.chat, self.turns, self.system, self.files = chat, turns, system, files or {}
        self.lead, self.preamble = self.first, ""                         # a template may have others, see set_chat

    @property
    def turn_end(self):
        """The id that ends a turn of a chat."""
        return self.marks[CHAT[self.chat][-1]]

    def encode(self, text, *, allowed_special=(), disallowed_special="all"):
        """As tiktoken's; special tokens are cut out of the text before it is normalised."""
        cut = self.plain | set(self.marks if allowed_special == "all" else allowed_special)
        never = set(self.marks) - cut if disallowed_special == "all" else disallowed_special
        longest_first = "|".join(map(re.escape, sorted(cut, key=len, reverse=True)))
        ids = []
        for piece in re.split(f"({longest_first})", text) if cut else [text]:
            if piece in cut:
                ids.append(self.marks[piece])
            elif piece:
                piece = unicodedata.normalize("NFC", piece) if self.nfc else piece
                ids += super().encode(piece, disallowed_special=never)
        return ids

    def encode_ordinary(self, text):
        """Text as text: a special token's name in it is spelled out."""
        return self.encode(text, disallowed_special=())


def make_tokenizer(name="bytes", turns=False, system=""):
    """"bytes" is built in, any other name is one of tiktoken's own; ChatML's two marks are added."""
    if name == "bytes":
        pattern, ranks, special = r"[\s\S]+", {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    else:
        try:
            base = tiktoken.get_encoding(name)
        except ValueError:
            known = ", ".join(tiktoken.list_encoding_names())
            raise InputError(f"tokenizer {name!r} is unknown: use bytes or one of {known}")
        except Exception as e:                              # requests' own errors; tiktoken downloads a vocabulary once
            raise InputError(f"tokenizer {name!r}: no download of its ranks ({type(e).__name__}); bytes needs none")
        pattern, ranks, special = base._pat_str, base._mergeable_ranks, dict(base._special_tokens)
    for mark in CHAT["chatml"]:
        special.setdefault(mark, 1 + max(*ranks.values(), *special.values()))
    return Tokenizer(name, pattern, ranks, special, end=special["<|endoftext|>"], chat="chatml", turns=turns,
                     system=system)


def as_turns(chat, own, system=""):
    """Whether a lone prompt is a user's turn, by --chat; "auto" leaves it at `own`. A bare prompt has no --system."""
    if chat not in ("auto", "chat", "plain"):
        raise InputError(f"--chat {chat}: must be auto, chat or plain")
    turns = own if chat == "auto" else chat == "chat"
    if system and not turns:
        raise InputError(f"--system {system}: prompts are bare text here; --chat chat makes them turns")
    return turns


def stop_ids(tokenizer):
    """The ids that end an answer: the end of the text, which SFT appends to a response, and the end of a chat turn."""
    return tokenizer.end, tokenizer.turn_end


def encode_chat(tokenizer, messages):
    """Messages -> ids, mask: 1 on what the assistant wrote and the mark that ends its turn, 0 on headers and all else.

    ChatML:   <|im_start|>ROLE line break TEXT<|im_end|> line break, and so on.
    Llama 3:  <|start_header_id|>ROLE<|end_header_id|> two line breaks TEXT<|eot_id|>, and so on, the texts stripped.
    """
    if not tokenizer.chat:
        raise InputError("a chat (messages, or --chat chat) needs ChatML's or Llama 3's marks, and this tokenizer has "
                         "neither; use plain prompts")
    if (tokenizer.preamble or tokenizer.system) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": tokenizer.system}] + messages
    ids, mask = list(tokenizer.lead), [0] * len(tokenizer.lead)
    for m in messages:
        head, gap = header(tokenizer, m["role"])
        opening = tokenizer.preamble if m["role"] == "system" else ""
        body = tokenizer.encode_ordinary(opening + trimmed(tokenizer, m["content"])) + [tokenizer.turn_end]
        ids += head + body + gap
        mask += [0] * len(head) + [int(m["role"] == "assistant")] * len(body) + [0] * len(gap)
    return ids[:len(ids) - len(gap)], mask[:len(ids) - len(gap)]


def header(tokenizer, role):
    """The ids before a turn's text, and those behind its end."""
    text, (start, *middle, _) = tokenizer.encode_ordinary, [tokenizer.marks[x] for x in CHAT[tokenizer.chat]]
    if tokenizer.chat == "chatml":
        return [start] + text(role + "\n"), text("\n")
    return [start] + text(role) + middle + text("\n\n"), []


def trimmed(tokenizer, text):
    """The text of a turn, as the format has it."""
    return text.strip() if tokenizer.chat == "llama3" else text


def prompt_ids(tokenizer, row):
    """What the model reads before it answers: the prompt, or the turns before the assistant's last and its header."""
    if "messages" in row:
        turns = asked(row["messages"])
    elif tokenizer.turns:
        turns = [{"role": "user", "content": row["prompt"].removesuffix("\n")}]
    else:
        return tokenizer.first + tokenizer.encode_ordinary(row["prompt"])
    return encode_chat(tokenizer, turns + [{"role": "assistant", "content": ""}])[0][:-1]


def encode_answer(tokenizer, row, text):
    """Prompt, answer and end token -> tokens, mask. Prompt and answer are encoded apart, so the mask's edge is
    exact."""
    ids, chat = prompt_ids(tokenizer, row), "messages" in row or tokenizer.turns
    answer = tokenizer.encode_ordinary(trimmed(tokenizer, text) if chat else text)
    answer.append(tokenizer.turn_end if chat else tokenizer.end)
    return ids + answer, [0] * len(ids) + [1] * len(answer)


def asked(messages):
    """The turns before the assistant's last one."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def answers(tokenizer, tokens, mask, stop):
    """The decoded response of every row without its end token; None for an answer that was cut before it ended."""
    texts = []
    for row, chosen in zip(tokens.cpu(), mask.cpu()):
        ids = row[chosen > 0].tolist()
        texts.append(tokenizer.decode(ids[:-1]) if ids and ids[-1] in stop else None)
    return texts


# ---------------------------------------------------------------------------- public models, as Hugging Face keeps them

FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}
SIZES = {"vocab": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",      # ours: theirs
         "width": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
         "head_dim": "head_dim", "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps"}
GPT2_SIZES = {"vocab": "vocab_size", "context": "n_positions", "layers": "n_layer", "width": "n_embd",
              "heads": "n_head", "mlp_width": "n_inner", "norm_eps": "layer_norm_epsilon"}
PARTS = {"embedding": "embed_tokens", "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "norm": "norm",
         "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attention.out": "self_attn.o_proj",
         "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm", "head": "lm_head",
         "mlp.up": "mlp.gate_proj mlp.up_proj", "mlp.down": "mlp.down_proj"}
GPT2_PARTS = {"embedding": "wte", "position": "wpe", "norm1": "ln_1", "norm2": "ln_2", "norm": "ln_f",
              "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc",
              "mlp.down": "mlp.c_proj", "head": "lm_head"}
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ONLY = {"hidden_act": ["silu"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_weights": [True],
        "partial_rotary_factor": [1.0]}                                   # options, and all that GPT can do of them
NO_MATTER = (r"_|unsloth_|summary_|.+_pdrop$|(attention_dropout|transformers_version|torch_dtype|dtype|use_cache|n_ctx|"
             r"initializer_range|pretraining_tp|bos_token_id|pad_token_id|max_window_layers|sliding_window|is_decoder|"
             r"task_specific_params|reorder_and_upcast_attn|gradient_checkpointing|predict_special_tokens|n_special|"
             r"output_past|id2label|label2id|return_dict|tokenizer_class|is_llama_config|transformers\.js_config)$")
KEPT = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja",
        "special_tokens_map.json", "tokenizer.json")                      # files that go where the model goes
READ = ("model.safetensors.index.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
         r"|\s+")
SPLIT = {"gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "qwen2": WORDS,
         "qwen3": WORDS, "llama": WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")}
OTHERWISE = r"\{[0-9,]+\}\+|(?<!\[)\^|\$|\\[ABbGHhKQRXYZz]|\(\?[a-z-]*m|\[\[|&&"   # what Oniguruma reads in another way
LLAMA3 = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
          8: "<|eom_id|>", 9: "<|eot_id|>"}                               # special tokens behind the last rank


def json_of(path, files, name, default=None):
    """The object in one of a folder's JSON files."""
    try:
        found = json.loads(files[name]) if name in files else default
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: {name} is not JSON ({e})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: {name} " + ("holds no JSON object" if name in files else "is missing"))
    return found


def public_config(path, files):
    """config.json -> its model_type, GPTConfig. What GPT cannot do is named, never ignored; null, false, 0, [] are
    off."""
    def refuse(name, x, instead=""):
        raise InputError(f'{path}: config.json: "{name}": {json.dumps(x)} is not supported{instead}')

    c = json_of(path, files, "config.json")
    family, made = c.pop("model_type", None), c.pop("architectures", None)
    if family not in FAMILIES:
        refuse("model_type", family, f"; {', '.join(FAMILIES)} are")
    if made not in (None, [FAMILIES[family]]):
        refuse("architectures", made, f"; {FAMILIES[family]} is")
    ours = dict(tied=c.pop("tie_word_embeddings", family == "gpt2"))
    for field, name in (GPT2_SIZES if family == "gpt2" else SIZES).items():
        x = c.pop(name, None)
        if x is None and field in ("kv_heads", "head_dim", "mlp_width"):
            continue
        if type(x) not in ((int, float) if field == "norm_eps" else (int,)) or x <= 0:
            refuse(name, x, "; it must be a number above 0")
        ours[field] = x
    if family == "gpt2":
        ours |= dict(norm="layer", positions="learned", mlp="gelu", bias=True)
    else:
        rope = {"rope_theta": c.pop("rope_theta", 10_000.0)}
        rope |= (c.pop("rope_scaling", None) or {}) | (c.pop("rope_parameters", None) or {})              # old and new
        kind = rope.pop("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            refuse("rope_type", kind, "; default and llama3 are")
        ours |= dict(rope_base=float(rope.pop("rope_theta")), qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
                     rope_scaling=tuple(float(rope.pop(x)) for x in ROPE) if kind == "llama3" else ())
        if kind == "llama3" and not (ours["rope_scaling"][0] > 0 and ours["rope_scaling"][2] > ours["rope_scaling"][1]):
            refuse("rope_type", kind, f" with {dict(zip(ROPE, ours['rope_scaling']))}")
        if family == "llama" and c.get("attention_bias") and c.get("mlp_bias"):
            ours["bias"] = c.pop("attention_bias") and c.pop("mlp_bias")
        c |= {name: x for name, x in rope.items() if name != "type"}
    stop = [x.get("eos_token_id") for x in (c, json_of(path, files, "generation_config.json", {}))]
    stop = sum([x if isinstance(x, list) else [x] for x in stop if x is not None], [])
    if not stop or any(type(i) is not int or not 0 <= i < ours["vocab"] for i in stop):
        refuse("eos_token_id", stop, "; ids of the vocabulary must end an answer")
    c |= {"eos_token_id": 0, "layer_types": [x for x in c.get("layer_types") or [] if x != "full_attention"]}
    for name, x in c.items():
        if not re.match(NO_MATTER, name) and (x not in ONLY[name] if name in ONLY else x):
            refuse(name, x, f"; {', '.join(map(str, ONLY[name]))} is" if name in ONLY else "")
    return family, GPTConfig(**ours, stop=tuple(dict.fromkeys(stop)))


def public_views(model, family):
    """Every tensor of a public file, by its name there, as a view of ours."""
    cfg, views, gpt2 = model.cfg, {}, family == "gpt2"
    qkv = [n * cfg.head_dim for n in (cfg.heads, cfg.kv_heads, cfg.kv_heads)]
    for name, x in model.state_dict().items():
        layer, ours, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        trunk = "" if ours == "head" else "transformer." if gpt2 else "model."
        block = f"{'h' if gpt2 else 'layers'}.{layer}." if layer else ""
        theirs = (GPT2_PARTS if gpt2 else PARTS)[ours].split()
        rows = {1: [len(x)], 2: [cfg.mlp_width] * 2, 3: qkv}[len(theirs)]
        for their, view in zip(theirs, x.split(rows)):
            turned = gpt2 and layer and x.dim() == 2                      # a matrix is (in, out) there
            views[f"{trunk}{block}{their}.{kind}"] = view.T if turned else view
    return views


def public_weights(path, files, family, cfg, device):
    """*.safetensors, one or many, mapped and not read whole -> GPT in float32."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(f"{path}: pip install safetensors, to read a public model's weights") from None
    index, found = {"weight_map": {"all": "model.safetensors"}}, {}
    for shard in set(json_of(path, files, "model.safetensors.index.json", index).get("weight_map", {}).values()):
        try:
            f = safe_open(os.path.join(path, shard), framework="pt")
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: {shard} cannot be read ({e})") from None
        found |= {re.sub("^(?=wte|wpe|h[.]|ln_f)", "transformer.", name): (f, name) for name in f.keys()}
    with torch.device("meta"):
        model = GPT(cfg)
    model = model.to_empty(device=device)
    views = public_views(model, family)
    for name, view in views.items():
        if name not in found:
            raise InputError(f"{path}: tensor {name} is missing, of shape {list(view.shape)}")
        f, own = found[name]
        kind, shape = f.get_slice(own).get_dtype(), f.get_slice(own).get_shape()
        if shape != list(view.shape) or kind not in ("F32", "BF16", "F16"):
            raise InputError(f"{path}: tensor {name} is {kind} {shape}; F32, BF16 or F16 {list(view.shape)} is needed")
        view.copy_(f.get_tensor(own))
    f, own = found.get("lm_head.weight", (None, None))
    if cfg.tied and f and torch.equal(f.get_tensor(own).to(model.unembedding), model.unembedding):
        del found["lm_head.weight"]                                       # the embedding once more
    for name in sorted(found.keys() - views.keys()):
        if not re.search(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$", name):              # tables, not weights
            raise InputError(f"{path}: tensor {name} has no place in the {family} that config.json describes")
    return model


PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]      # bytes that stand for themselves in a vocabulary
LETTER = {b: chr(b) for b in PRINTED} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTED)))}
BYTE = {letter: b for b, letter in LETTER.items()}


def spelled(token):
    """Bytes in the letters of a byte-level vocabulary."""
    return "".join(map(LETTER.get, token))


def unspelled(text):
    return bytes(map(BYTE.get, text))


def merged(token, ranks):
    """What byte-pair encoding makes of the bytes of `token` by the merges that come before its own."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        if pairs[i] == ranks[token]:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def unlike(ranks, pairs, loose):
    """A token that tiktoken's rule and a list of merges do not make in the same way, and its parts; None if none is.

    tiktoken joins the two neighbours whose union has the lowest id, a BPE file the two that come first in its list.
    They agree if for each token the last merge, the pair that its own bytes come to, is in the list, and these pairs
    stand in the order of the ids. loose (ignore_merges): words are looked up whole first, so there may be tokens
    without such a pair; then the list must have every pair whose union is a token.
    """
    place, last = {pair: i for i, pair in enumerate(pairs)}, -1
    parts = {token: tuple(merged(token, ranks)) for token in sorted(ranks, key=ranks.get) if len(token) > 1}
    whole = all(len(x) == 2 for x in parts.values())
    for token, made in parts.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [made] if whole else [(a, b) for a, b in halves if a in ranks and b in ranks]
        where = [place.get(x, -1) for x in halves]
        if len(made) > 2 and not loose or min(where, default=last + 1) <= last:
            return token, made
        last = max(where, default=last)


def tokenizer_json(vocab, pattern, nfc, added, first=(), merges=None):
    """What the `tokenizers` package reads, as an object. vocab is in letters; merges are found where there are none;
    first names the tokens that every text begins with."""
    ids, found = {x["content"]: x["id"] for x in added}, merges is None
    if found:
        ranks = {unspelled(token): i for token, i in vocab.items() if token not in ids}
        pairs = [merged(token, ranks) for token in sorted(ranks, key=ranks.get)]
        merges = [list(map(spelled, pair)) for pair in pairs if len(pair) == 2]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    begin = [{"SpecialToken": {"id": x, "type_id": 0}} for x in first]
    pair = [{"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB")]
    template = {"type": "TemplateProcessing", "single": begin + pair[:1], "pair": begin + pair,
                "special_tokens": {x: {"id": x, "ids": [ids[x]], "tokens": [x]} for x in first}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [flags | x for x in added],
            "normalizer": {"type": "NFC"} if nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": template if first else level, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": found,
                      "vocab": vocab, "merges": merges}}


def older_tokenizer(path, files, family):
    """vocab.json with merges.txt (GPT-2, Qwen), or a tiktoken file (Llama 3), as tokenizer.json."""
    added = json_of(path, files, "tokenizer_config.json", {}).get("added_tokens_decoder", {})
    added = {x["content"]: x | {"id": int(i)} for i, x in added.items()}
    if "vocab.json" in files and "merges.txt" in files and family != "llama":
        vocab = json_of(path, files, "vocab.json")
        more = json_of(path, files, "added_tokens.json", {}) | {x: vocab[x] for x in ["<|endoftext|>"] if x in vocab}
        added = {x: {"content": x, "id": i, "special": True} for x, i in more.items()} | added
        merges = [line for line in files["merges.txt"].splitlines() if line and not line.startswith("#version")]
        return tokenizer_json(vocab, SPLIT[family], family != "gpt2", added.values(), merges=merges)
    if "tokenizer.model" not in files:
        raise InputError(f"{path}: it has no tokenizer.json, no tiktoken file, and no vocab.json with merges.txt of "
                         f"GPT-2 or Qwen")
    try:
        lines = [line.split() for line in files["tokenizer.model"].splitlines() if line]
        vocab = {spelled(base64.b64decode(x, validate=True)): int(i) for x, i in lines}
    except ValueError:
        raise InputError(f"{path}: no tiktoken Encoding can stand for its tokenizer: tokenizer.model is no tiktoken "
                         f"file, and SentencePiece, as in Llama 2, is no byte-level BPE") from None
    llama3 = {x: {"content": x, "id": len(vocab) + i, "special": True} for i, x in LLAMA3.items()}
    return tokenizer_json(vocab, SPLIT["llama"], False, (added or llama3).values(), first=[LLAMA3[0]])


def public_tokenizer(path, files, family, cfg, chat="auto", system=""):
    """tokenizer.json -> Tokenizer, or in one line why it cannot be."""
    def refuse(why):
        raise InputError(f"{path}: no tiktoken Encoding can stand for its tokenizer: {why}")

    t = json_of(path, files, "tokenizer.json")
    bpe, added, first = t["model"], t.get("added_tokens") or [], []
    listed = lambda x, steps: [] if x is None else x[steps] if x["type"] == "Sequence" else [x]

    # what is done to a text before and after the merges
    normal = listed(t.get("normalizer"), "normalizers")
    if normal not in ([], [{"type": "NFC"}]):
        refuse(f"its normaliser is {normal}")
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    cuts = [(level if x["type"] == "ByteLevel" else {}) | x for x in listed(t.get("pre_tokenizer"), "pretokenizers")]
    cuts = [{name: y for name, y in x.items() if name != "trim_offsets"} for x in cuts]
    pattern = cuts[0].get("pattern", {}).get("Regex") if cuts else None
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if cuts in ([level], [level | {"use_regex": False}]):
        pattern = SPLIT["gpt2"] if cuts == [level] else r"[\s\S]+"
    elif cuts != [split, level | {"use_regex": False}] or re.search(OTHERWISE, pattern):
        refuse(f"its pre-tokeniser is {cuts}")
    for x in listed(t.get("post_processor"), "processors"):
        if x["type"] == "TemplateProcessing" and "Sequence" in x["single"][-1]:
            first = [i for y in x["single"][:-1] for i in x["special_tokens"][y["SpecialToken"]["id"]]["ids"]]
        elif x["type"] != "ByteLevel":
            refuse(f"its post-processor is {x['type']}, or adds a token behind the text")
    for x in added:
        if any(map(x.get, ("lstrip", "rstrip", "single_word"))) or normal and x.get("normalized") or not x["content"]:
            refuse(f"the added token {x['content']!r} is empty, is normalised or looks at its surroundings")

    # the merges
    usual = ("type", "vocab", "merges", "ignore_merges", "unk_token", "fuse_unk")
    on = [name for name, x in bpe.items() if x and name not in usual]
    if bpe.get("type", "BPE") != "BPE" or on:
        refuse(f"its model is {bpe.get('type', 'BPE')}" + f" with {', '.join(on)}" * bool(on))
    special = {x["content"]: x["id"] for x in added}
    odd = [x for x in bpe["vocab"] if x not in special and not BYTE.keys() >= set(x)]
    odd += BYTE.keys() - bpe["vocab"].keys()
    if odd:
        refuse(f"its vocabulary is not byte-level, see {odd[0]!r}")
    ranks = {unspelled(x): i for x, i in bpe["vocab"].items() if x not in special}
    ids = sorted([*ranks.values(), *special.values()])
    if ids[0] < 0 or ids[-1] >= cfg.vocab or len(set(ids)) < len(ids):
        refuse(f"it has ids from {ids[0]} to {ids[-1]}, {len(ids) - len(set(ids))} of them twice, and the model "
               f"{cfg.vocab} rows")
    pairs = [x.split(" ") if isinstance(x, str) else x for x in bpe["merges"]]
    odd = unlike(ranks, [tuple(map(unspelled, pair)) for pair in pairs], bpe.get("ignore_merges"))
    if odd:
        refuse(f"its merges are not those that the ids imply: {odd[0]!r} is made of {odd[1]}")

    name = hashlib.sha256(repr((pattern, normal, first, sorted(ranks.items()), special)).encode()).hexdigest()[:12]
    tokenizer = Tokenizer(f"{family} {name}", pattern, ranks, special, end=cfg.stop[0], first=first, nfc=bool(normal),
                          plain=[x["content"] for x in added if not x.get("special")], vocab=cfg.vocab, files=files)
    probe = "aA1 \u00e9\u6f22\u0e01\u0301\U0001f642\t\r\n  _\x00\u200b.\ud7ff"
    if tokenizer.decode(tokenizer.encode_ordinary(probe)) != (unicodedata.normalize("NFC", probe) if normal else probe):
        refuse("its split pattern leaves parts of a text out")
    set_chat(path, tokenizer, chat, system)
    return tokenizer


def set_chat(path, tokenizer, chat, system):
    """How chats are written, by the template in the folder. It is a program in jinja: it is run in jinja's sandbox on a
    short talk, and what it writes must be what encode_chat writes, or it is refused."""
    settings = json_of(path, tokenizer.files, "tokenizer_config.json", {})
    template = tokenizer.files.get("chat_template.jinja") or settings.get("chat_template") or ""
    if isinstance(template, list):
        template = {x["name"]: x["template"] for x in template}.get("default", "")
    known = [name for name, marks in CHAT.items() if tokenizer.marks.keys() >= set(marks)]
    known = [name for name in known if not template or CHAT[name][0] in template]
    tokenizer.turns, tokenizer.chat, tokenizer.system = as_turns(chat, bool(template)), (known or [""])[0], system
    if not template:
        return
    try:
        if not known:
            raise ValueError("its marks are neither ChatML's nor Llama 3's")
        from jinja2.sandbox import ImmutableSandboxedEnvironment                             # comes with torch
        write = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
        word = lambda x: x["content"] if isinstance(x, dict) else x or ""
        words = {name: word(settings.get(name)) for name in ("bos_token", "eos_token")}
        turn = lambda role, text: {"role": role, "content": text}
        talk = [turn("user", "U"), turn("assistant", "A"), turn("user", "V")]
        talks = talk, [turn("system", "S")] + talk
        theirs = [write(messages=x, add_generation_prompt=True, **words) for x in talks]
        head, end = tokenizer.decode(header(tokenizer, "system")[0]), CHAT[known[0]][-1]
        bare, own = (x.split(head)[1].split(end)[0] if head in x else "" for x in theirs)    # texts of the system turns
        tokenizer.lead = tokenizer.encode(theirs[0].split(CHAT[known[0]][0])[0], allowed_special="all")
        tokenizer.preamble = own.removesuffix("S")
        tokenizer.system = bare.removeprefix(tokenizer.preamble)
        ours = [tokenizer.decode(prompt_ids(tokenizer, {"messages": x})) for x in talks]
        if theirs != ours:
            raise ValueError(f"it writes {theirs} where {known[0]} has {ours}")
        tokenizer.system = system or tokenizer.system
    except Exception as e:                                                # a template may fail in any way
        if chat != "plain":
            why = " ".join(str(e).split())
            raise InputError(f"{path}: its chat template is not understood ({why}); --chat plain goes without")
        tokenizer.chat = ""


def read_public(path, device="cpu", chat="auto", system=""):
    """A folder with config.json, *.safetensors and tokenizer files -> model, tokenizer."""
    files = {}
    for name in KEPT + READ:
        if os.path.exists(os.path.join(path, name)):
            with open(os.path.join(path, name), encoding="utf-8", errors="replace") as f:
                files[name] = f.read()
    try:
        family, cfg = public_config(path, files)
        if "tokenizer.json" not in files:
            files["tokenizer.json"] = json.dumps(older_tokenizer(path, files, family))
        kept = {name: files[name] for name in KEPT if name in files}
        tokenizer = public_tokenizer(path, kept, family, cfg, chat, system)
        as_turns("auto", tokenizer.turns, system)
        if tokenizer.chat:
            cfg.stop = tuple(dict.fromkeys((*cfg.stop, tokenizer.turn_end)))
        return public_weights(path, files, family, cfg, device), tokenizer
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as e:
        raise InputError(f"{path}: its files are not as expected ({type(e).__name__}: {e})") from None


def own_files(cfg, family, tokenizer):
    """config.json, tokenizer.json and, where prompts are turns, chat_template.jinja of a model that began here."""
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    config = {"model_type": family, "architectures": [FAMILIES[family]], "tie_word_embeddings": cfg.tied}
    config |= {theirs: getattr(cfg, ours) for ours, theirs in sizes.items()} | {"bos_token_id": None}
    if family == "llama":
        config |= {"attention_bias": cfg.bias, "mlp_bias": cfg.bias}
    vocab = {spelled(token): i for token, i in tokenizer._mergeable_ranks.items()}
    added = [{"content": x, "id": i, "special": True} for x, i in tokenizer.marks.items()]
    files = {"config.json": json.dumps(config),
             "tokenizer.json": json.dumps(tokenizer_json(vocab, tokenizer._pat_str, False, added))}
    if tokenizer.turns:
        turn = "{{ '<|im_start|>' + %s + '\\n' + %s + '<|im_end|>\\n' }}"
        system = turn % ("'system'", json.dumps(tokenizer.system)) if tokenizer.system else ""
        files["chat_template.jinja"] = (
            "{% if messages[0].role != 'system' %}" + system + "{% endif %}{% for m in messages %}"
            + turn % ("m.role", "m.content") + "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    return files


def write_public(folder, model, tokenizer):
    """What read_public and transformers read: float32 weights; the files that came with a model go with it."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(f"{folder}: pip install safetensors, to write a public model") from None
    if os.path.exists(folder):
        raise InputError(f"{folder}: it exists already; name a new folder")
    cfg, stop = model.cfg, {"eos_token_id": list(model.cfg.stop)}
    family = "gpt2" if cfg.positions == "learned" else "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    files = dict(tokenizer.files) or own_files(cfg, family, tokenizer)
    config = json_of(folder, files, "config.json") | stop | {"torch_dtype": "float32"}
    if family != "gpt2":                                             # spelled as every version of transformers reads it
        *factors, original = cfg.rope_scaling or [0]
        scaling = {"rope_type": "llama3"} | dict(zip(ROPE, [*factors, int(original)])) if factors else None
        config |= {"rope_theta": cfg.rope_base, "rope_scaling": scaling}
    config = {name: x for name, x in config.items() if name not in ("dtype", "rope_parameters")}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.decode([tokenizer.end])}
    settings = json_of(folder, files, "tokenizer_config.json", plain)
    more = json_of(folder, files, "generation_config.json", {}) | stop
    files |= {name: json.dumps(x, indent=2, ensure_ascii=False) for name, x in
              (("config.json", config), ("tokenizer_config.json", settings), ("generation_config.json", more))}
    again = asdict(public_config(folder, files)[1])
    for field, x in asdict(cfg).items():
        if again[field] != x:
            raise InputError(f"{folder}: a {family} config.json cannot say {field} = {x}")
    unfinished = os.path.normpath(folder) + ".tmp"
    os.makedirs(unfinished)
    try:
        for name, text in files.items():
            with open(os.path.join(unfinished, name), "w", encoding="utf-8") as f:
                f.write(text)
        save_file({name: x.contiguous() for name, x in public_views(model, family).items()},
                  os.path.join(unfinished, "model.safetensors"), metadata={"format": "pt"})
        os.replace(unfinished, folder)
    except SafetensorError as e:
        raise InputError(f"{folder}: could not be written ({e})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)                     # nothing is left of one that failed


# --------------------------------------------------------------------------------------------- checkpoints, saved whole


def save(folder, model, tokenizer, name="ckpt.pt", **state):
    """Write folder/name in one step: a reader finds the old file or the new one, whole, whatever happens in between."""
    trunk = getattr(model, "trunk", model)
    spoken = dict(name=tokenizer.name, turns=tokenizer.turns, system=tokenizer.system, files=tokenizer.files)
    data = dict(kind=type(model).__name__, config=asdict(trunk.cfg), tokenizer=spoken, model=model.state_dict())
    path = os.path.join(folder, name)
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(data | state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:                  # torch's writer hides a full disk behind an error of its own
        why = e.__context__ if isinstance(e.__context__, OSError) else e
        raise InputError(f"{path}: could not be written ({why.args[-1]}); the checkpoint before it is untouched") from e
    finally:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")                              # nothing is left of one that failed


def read_checkpoint(folder):
    """The dictionary that `save` wrote, on the CPU; no code in the file is ever run (weights_only)."""
    path = os.path.join(folder, "ckpt.pt")
    if not os.path.exists(path):
        raise InputError(f"{folder}: no checkpoint here (no ckpt.pt), nor a public model's folder (no config.json)")
    try:
        with zipfile.ZipFile(path) as f:
            whole = f.testzip() is None                   # torch.load checks no sums: a flipped bit would be a weight
        data = torch.load(path, map_location="cpu", weights_only=True)
        data["config"], data["tokenizer"], data["kind"]
        dense = lambda name, x: isinstance(name, str) and x.is_floating_point() and x.layout == torch.strided
        if not whole or not all(dense(name, x) for name, x in data["model"].items()):
            raise ValueError
        return data
    except Exception as e:                                # a torn zip, a pickle with code in it, another program's file
        raise InputError(f"{path}: not a nanoPO checkpoint, or a damaged one ({type(e).__name__})") from e


def is_public(folder, made=False):
    """Whether a folder holds a public model's config.json, and no run's; with made, or a run's that began with one."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            saved = json.load(f)
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True                                                       # reading it will say what is wrong
    run = isinstance(saved, dict) and "script" in saved
    return bool(made and saved.get("public")) if run else True


def load(path, device="cpu", kind=None, chat="auto", system=""):
    """A checkpoint folder or a public model's -> model, tokenizer. kind: "GPT" or "ScalarModel" where nothing else will
    do. chat: "chat" makes a lone prompt a user's turn, "plain" leaves it bare; "auto", and a system line of "", keep
    what the checkpoint was trained with, or the public model's template says."""
    public = is_public(path) and not os.path.exists(os.path.join(path, "ckpt.pt"))
    data = {"kind": "GPT"} if public else read_checkpoint(path)
    if kind and data["kind"] != kind:
        name = {"GPT": "a policy", "ScalarModel": "a reward model"}
        raise InputError(f"{path}: this is {name.get(str(data['kind']), 'neither')}, and {name[kind]} is needed here")
    if public:
        return read_public(path, device, chat, system)
    try:
        model = GPT(GPTConfig(**data["config"]))
    except Exception as e:
        raise InputError(f"{path}: its config does not describe a model ({type(e).__name__}: {e})") from None
    model = model if data["kind"] == "GPT" else ScalarModel(model)
    load_weights(model, data["model"], path, "its config asks for")
    return model.to(device), saved_tokenizer(path, data["tokenizer"], chat, system)


def saved_tokenizer(path, saved, chat, system):
    """The tokenizer of a checkpoint, with prompts written as they were, or as --chat and --system say now."""
    saved = saved if isinstance(saved, dict) else {"name": saved}         # a name alone: from before there were others
    turns, system = as_turns(chat, saved.get("turns", False), system), system or saved.get("system", "")
    if not saved.get("files"):
        return make_tokenizer(saved.get("name"), turns, system)
    family, cfg = public_config(path, saved["files"])
    return public_tokenizer(path, saved["files"], family, cfg, "chat" if turns else "plain", system)


def load_reward(path, policy, tokenizer):
    """The frozen reward model in `path`, made for the texts and the shape of this policy; None for "rule"."""
    if path == "rule":
        return None
    model, own = load(path, policy.device, "ScalarModel")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"--reward {path}: its weights are not finite, and neither are its scores")
    facts = [("tokenizer", own.name, tokenizer.name), ("chat", own.turns, tokenizer.turns),
             ("system line", own.system, tokenizer.system)]
    facts += [(name, getattr(model.trunk.cfg, name), getattr(policy.cfg, name)) for name in ("width", "context")]
    for name, theirs, ours in facts:
        if theirs != ours:
            raise InputError(f"--reward {path}: made for {name} {theirs}, and the policy has {ours}; make one by "
                             f"reward.py --init with the policy's checkpoint")
    return freeze(model)


def load_weights(model, weights, where, wanted):
    """load_state_dict, after the first tensor that is missing, unknown or of another shape has been told."""
    own, got = ({name: tuple(x.shape) for name, x in state.items()} for state in (model.state_dict(), weights))
    for name in sorted(own.keys() | got.keys()):
        if own.get(name) != got.get(name):
            raise InputError(f"{where}: tensor {name} has shape {got.get(name)}, {wanted} {own.get(name)}")
    model.load_state_dict(weights)


# -------------------------------------------------------------------------------------------- prompts, rows and numbers


def part(prompt):
    """"train", "val" (1 in 20, to choose settings by) or "test" (1 in 20, to report), by a hash that never changes."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return {0: "val", 1: "test"}.get(int(digest, 16) % 20, "train")


def sums(n, which, seed=0):
    """n rows of the built-in task: "5+8+7=", 3 to 6 digits from 1 to 9, and their sum in two digits. Prompts that are
    held out are distinct, so there are fewer short ones: a twentieth of the 729 prompts of 3 terms is all there is."""
    rng, rows, seen, lengths = random.Random(f"{which} {seed}"), [], set(), [3, 4, 5, 6]
    while len(rows) < n:
        k = rng.choice(lengths)
        for _ in range(5000):
            terms = [rng.randint(1, 9) for _ in range(k)]
            prompt = "+".join(map(str, terms)) + "="
            if part(prompt) == which and (which == "train" or prompt not in seen):
                rows.append({"prompt": prompt, "two_digits": f"{sum(terms):02d}"})
                seen.add(prompt)
                break
        else:
            lengths.remove(k)                                        # none of this length is left
    return rows


def read_rows(path, *needed):
    """JSON lines -> list of dicts in which every field in `needed` is text, with their file and line in "at".

    GSM8K's {"question", "answer"} is read as prompt (with a line break after it), response and answer. Where there is
    {"messages": [...]}, it stands for prompt and response. The first thing that is wrong is told by file, line and
    field.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    rows = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            at = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:                # bad UTF-8 is a ValueError too
                raise InputError(f"{at}: not a JSON line ({e})") from None
            if not isinstance(row, dict):
                raise InputError(f"{at}: expected an object {{...}}, found {type(row).__name__}")
            if isinstance(row.get("question"), str) and "prompt" not in row:
                row = {"response": row.get("answer")} | row | {"prompt": row["question"] + "\n"}
            if "messages" in row:
                check_messages(row["messages"], at, "response" in needed)
                said = [f"{m['role']}: {m['content']}" for m in asked(row["messages"])]
                row |= {"prompt": "\n".join(said), "response": row["messages"][-1]["content"]}
            if isinstance(row.get("answer"), (int, float)) and not isinstance(row["answer"], bool):
                row["answer"] = format(Decimal(repr(row["answer"])), "f")                    # 1e-05 -> 0.00001
            rows.append(row | {"at": at})
            need_text(rows[-1], *needed)
    if not rows:
        raise InputError(f"{path}: the file is empty")
    return rows


def read_preferences(path):
    r"""JSON lines of preferences -> rows with text "prompt", "chosen" and "rejected", one for each pair.

    Read are pairs, with a number "margin" if there is one; pairs without "prompt", which are dialogues as HH-RLHF has
    them, split behind the last "\n\nAssistant:"; and {"prompt", "responses": [best, ..., worst]}, with "ranks" where
    some tie, as all the pairs that it implies. Pairs that say nothing are dropped and counted.
    """
    rows, last = [], "\n\nAssistant:"
    for row in read_rows(path):
        if "responses" in row:
            texts, ranks = row["responses"], row.get("ranks")
            if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(x, str) for x in texts):
                raise InputError(f'{row["at"]}: field "responses" must be a list of two texts or more, the best first')
            ranks = list(range(len(texts))) if ranks is None else ranks
            if not isinstance(ranks, list) or len(ranks) != len(texts) or not all(type(r) is int for r in ranks):
                raise InputError(f'{row["at"]}: field "ranks" must be a list of whole numbers, one for each response')
            some = [{"chosen": w, "rejected": l} for w, l in ordered(texts, ranks)]
            if not some or len(set(texts)) < len(texts):
                some = [{"chosen": texts[0], "rejected": texts[0]}]                          # to be dropped below
            row = {name: x for name, x in row.items() if name not in ("responses", "ranks")}
            rows += [row | pair for pair in some]
        elif "prompt" not in row and all(last in str(row.get(x)) for x in ("chosen", "rejected")):
            (prompt, _, chosen), (other, _, rejected) = (row[x].rpartition(last) for x in ("chosen", "rejected"))
            rows.append(row | {"prompt": prompt + last, "other": other + last, "chosen": chosen, "rejected": rejected})
        else:
            rows.append(row)
    for row in rows:
        need_text(row, "prompt", "chosen", "rejected")
        if all(row[x].startswith(row["prompt"]) for x in ("chosen", "rejected")):            # they repeat the prompt
            row |= {x: row[x][len(row["prompt"]):] for x in ("chosen", "rejected")}
        if type(row.get("margin", 0)) not in (int, float) or not math.isfinite(row.get("margin", 0)):
            raise InputError(f'{row["at"]}: field "margin" must be a number')
    rows = usable(rows, lambda row: row["prompt"] == row.get("other", row["prompt"]), "the two prompts differ")
    rows = usable(rows, lambda row: all(row[x].strip() for x in ("prompt", "chosen", "rejected")), "a text is empty")
    return usable(rows, lambda row: row["chosen"] != row["rejected"], "its answers are equal, all tie or repeat")


def ordered(things, ranks):
    """Every (better, worse) of a ranking, rank 0 the best; ties make no pair."""
    return [(w, l) for w, i in zip(things, ranks) for l, j in zip(things, ranks) if i < j]


def need_text(row, *needed):
    for name in needed:
        if not isinstance(row.get(name), str):
            problem = "is missing" if row.get(name) is None else f"is {type(row[name]).__name__}, not text"
            raise InputError(f'{row["at"]}: field "{name}" {problem}; a row needs {", ".join(needed)}')


def check_messages(messages, at, answered):
    turn = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    if not isinstance(messages, list) or not messages or not all(map(turn, messages)):
        raise InputError(f'{at}: field "messages" must be a list of {{"role": text, "content": text}}')
    if answered and messages[-1]["role"] != "assistant":
        raise InputError(f'{at}: field "messages" must end with the assistant\'s turn, not {messages[-1]["role"]!r}')


def usable(rows, good, why, need=True):
    """The rows for which good(row), the others counted aloud with the first one's line; with need, an error if none
    remain."""
    kept, bad = [row for row in rows if good(row)], [row for row in rows if not good(row)]
    if bad:
        print(f"dropped {len(bad)} of {len(rows)} rows: {why}; the first is {bad[0].get('at', repr(bad[0]['prompt']))}")
    if bad and need and not kept:
        raise InputError(f"no row is left: {why}")
    return kept


def encoded(rows, tokenizer, max_new, context, need=True):
    """Rows with their prompt's "ids", of those that leave room for an answer of max_new tokens."""
    rows = [row | {"ids": prompt_ids(tokenizer, row)} for row in rows]
    fits = lambda row: len(row["ids"]) + max_new <= context
    return usable(rows, fits, f"prompt + --max_new {max_new} exceed the context of {context} tokens", need)


def split(rows, test=None):
    """Train, val and test rows by the hash of the prompt; or val by it, the given test rows, and the others to
    train."""
    parts = {"train": [], "val": [], "test": []}
    for row in rows:
        parts[part(row["prompt"])].append(row)
    train, val = parts["train"], parts["val"]
    if test is None:
        test = parts["test"]
    else:
        told = {row["prompt"] for row in test}
        untold = lambda rows: usable(rows, lambda row: row["prompt"] not in told, "its prompt is in --test", need=False)
        train, val = untold(train + parts["test"]), untold(val)
    if not train:
        raise InputError("no row is left to train on: all are held out, by a hash of the prompt; give more rows")
    return train, val, test


NUMBER = re.compile(r"""
    (?<![0-9A-Za-z.]) (?<![0-9][eE][-+])                            # not inside a word, a decimal or an exponent
    ([-+]?) \$? (?: ([0-9]+) [ ]+ (?=[0-9]+/[0-9]) )?               # sign; the 3 of 3 1/2
    ( (?: [0-9]{1,3} (?:,[0-9]{3})+ | [0-9]+ ) (?:\.[0-9]+)? | \.[0-9]+ )    # 1,234.5 or 1234.5 or .5
    (?! [0-9] | \.[0-9] | [eE][-+]?[0-9] )                          # and all of it
    (?: / ([0-9]+ (?:\.[0-9]+)?) )?                                 # the denominator of a fraction""", re.X)


def answer_number(text):
    """The number that an answer states, as an exact Fraction, or None.

    After the last "####" if there is one, else in the last \\boxed{...}, else the last number of the text. Commas, $
    and % fall away (5% is 5), signs, decimals, fractions and mixed numbers count, "42." and "42.0" are 42. A formula
    such as \\sqrt{2} after "####" or in a box is no number. Nothing is evaluated.
    """
    text, which = text.replace("\u2212", "-"), -1
    if "####" in text:
        text, which = text.rpartition("####")[2].split("\n")[0], 0
    if "\\boxed" in text:
        text, which = boxed(text.rpartition("\\boxed")[2].lstrip()), 0
    text = re.sub(r"(?<=[0-9])\\([dt]?frac)", r" \\\1", text)                                # 3\frac{1}{2} -> 3 1/2
    text = re.sub(r"\\[dt]?frac\{([0-9.]+)\}\{([0-9.]+)\}", r"\1/\2", text)
    for latex, plain in (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\!", ""), ("\\text", ""), ("$-", "-$")):
        text = text.replace(latex, plain)
    found = NUMBER.findall(text)
    if not found or which == 0 and ("\\" in text or "^" in text):
        return None
    sign, whole, top, bottom = found[which]
    try:
        value = Fraction(whole or 0) + Fraction(top.replace(",", "")) / Fraction(bottom or 1)
    except (ZeroDivisionError, ValueError):                          # ValueError: thousands of digits
        return None
    return -value if sign == "-" else value


def states_number(text):
    """Whether an answer says where its number is, once: alone behind a last "####", or in a \\boxed{...}."""
    tail = text.replace("\u2212", "-").rpartition("####")[2].strip().rstrip(".%")
    alone = "\\boxed" in text or NUMBER.fullmatch(tail)
    return bool(alone and text.count("####") + text.count("\\boxed") == 1 and answer_number(text) is not None)


def boxed(text):
    """"{a{b}}c" -> "a{b}"; "" where the braces do not close."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[1:i] if i else ""
    return ""


# --------------------------------------------------------------------------------------------- batches and optimisation


def batches(rows, size, seed, start=0):
    """Endless batches of `size` rows, each epoch shuffled by (seed, epoch) alone; a resumed run skips `start` of
    them."""
    def shuffled(epoch):
        return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()

    epoch, i = divmod(start * size, len(rows))
    order = shuffled(epoch)
    while True:
        while len(order) < i + size:
            order, epoch, i = order[i:] + shuffled(epoch + 1), epoch + 1, 0
        yield [rows[k] for k in order[i:i + size]]
        i += size


def pad_batch(sequences, masks):
    """Lists of token ids and of 0/1 -> tokens (B, T) int64, mask (B, T), right-padded with 0; a pad is what mask
    says."""
    T = max(map(len, sequences))
    tokens = torch.tensor([list(x) + [0] * (T - len(x)) for x in sequences])
    return tokens, torch.tensor([list(x) + [0] * (T - len(x)) for x in masks], dtype=torch.float32)


def token_budget(device):
    """Tokens in a forward: few on a CPU, where short pieces save more pads than they cost calls, a seventh of an SFT
    step."""
    return 1024 if device.type == "cpu" else 16384


def micro_batches(mask, rows, budget, device):
    """Cut `rows` of a batch into pieces of at most `budget` tokens, rows of like length together and trimmed to fit.

    mask (B, T), or (B, K, T) where a row is K sequences that must stay together, on the CPU; rows (b,). Yields (j, t,
    at): row indices, a width, and the flat positions of the mask in tokens[j, ..., :t], which is token_logp's `at`. All
    is known before the GPU starts, so nothing waits for it. budget 0: by device.
    """
    budget = budget or token_budget(device)
    some = mask.view(len(mask), -1, mask.size(-1))[rows] > 0                                 # (b, K, T)
    width = (some * torch.arange(1, mask.size(-1) + 1)).amax((1, 2)).clamp(min=1)            # columns a row needs
    width, order = width.sort(stable=True)
    rows, some = rows[order], some[order]
    while len(rows):
        take = max(1, int((width * some.size(1) * torch.arange(1, len(rows) + 1) <= budget).sum()))
        j, t = rows[:take], int(width[take - 1])
        at = F.pad(some[:take, :, 1:t], (1, 0)).flatten().nonzero()[:, 0]
        if device.type == "cuda":
            j, at = (x.pin_memory().to(device, non_blocking=True) for x in (j, at))
        yield j, t, at.to(device)
        rows, some, width = rows[take:], some[take:], width[take:]


@torch.no_grad()
def frozen_logp(model, tokens, mask, temperature, budget):
    """token_logp of a whole rollout without gradient, in pieces. mask (B, T) on the CPU -> logp, entropy (B, T)."""
    dtype = torch.promote_types(model.unembedding.dtype, torch.float32)
    logp, entropy = torch.zeros((2, *tokens.shape), dtype=dtype, device=tokens.device)
    for j, t, at in micro_batches(mask, torch.arange(len(tokens)), budget, tokens.device):
        logp[j, :t], entropy[j, :t] = model.token_logp(tokens[j, :t], None, temperature, at)
    return logp, entropy


@torch.no_grad()
def frozen_scalars(model, tokens, mask, budget):
    """value (B, T) and score (B,) of a whole rollout without gradient, in pieces. mask (B, T) on the CPU."""
    value = torch.zeros(tokens.shape, device=tokens.device, dtype=model.head.weight.dtype)
    score = value.new_zeros(len(tokens))
    mask_dev = mask.to(tokens.device)
    for j, t, _ in micro_batches(mask, torch.arange(len(tokens)), budget, tokens.device):
        value[j, :t], score[j] = model.read(tokens[j, :t], mask_dev[j, :t])
    return value, score


def freeze(model):
    """No gradient; and, where products are made in bf16 anyway, matrices that are kept in it: half of the memory, the
    same products. Norms, biases and the scalar head stay as they are."""
    trunk = getattr(model, "trunk", model)
    for p in trunk.parameters():
        if p.dim() == 2 and p.device.type in BF16:
            p.data = p.data.bfloat16()
    return model.requires_grad_(False)


def set_blocks(model, recompute, compile):
    """How the blocks of a trained model run: again in backward instead of kept, and through torch.compile where that
    works. One block is compiled for all of them, and for every length."""
    model.recompute = recompute
    if compile:
        try:
            torch.compile(torch.sin)(torch.zeros(2, device=model.device))
        except Exception as e:                                  # no C++ compiler, no Triton, an unknown device: anything
            print(f"--compile: torch.compile does not work here ({type(e).__name__}), so nothing is compiled")
            return
        for block in model.blocks:
            block.compile(dynamic=True)


def memory_plan(device, optimizer, models, frozen=(), budget=0, rollout=0):
    """Print what a run will hold, and return it in bytes.

    models are trained, frozen ones only read (None: there is none); budget is --micro_tokens, rollout the tokens that
    are in the cache at once. Activations are those of one forward of the largest model: of each token the input of
    every norm and product of a block, and of the block's input alone where it is computed again (--recompute). The
    sampler and the update have the memory in turns.
    """
    trunk, e = lambda x: getattr(x, "trunk", x), 2 if device.type in BF16 else 4
    size = lambda x: sum(p.numel() * p.element_size() for p in x.parameters())
    cfg, budget = trunk(models[0]).cfg, budget or token_budget(device)
    C, H, K, D, M, gated = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.mlp_width, cfg.mlp == "swiglu"
    norms = 2 * C * (8 if cfg.norm == "rms" else 4)                     # its input, and for RMS the input over its size
    heads = (3 * H + 3 * K) * D if cfg.positions == "rope" else (2 * H + 2 * K) * D          # query, key, value, result
    block = norms + e * (2 * C + heads + (4 if gated else 2) * M) + (H + K) * D * cfg.qk_norm * (12 - 2 * e)
    kept = norms // 2 + (cfg.layers * 4 * C + block if trunk(models[0]).recompute else cfg.layers * block)
    plan = {"weights": sum(map(size, models)), "gradients": sum(map(size, models)),
            "moments": sum(p.numel() * 4 * (1 if isinstance(part, torch.optim.Muon) else 2)
                           for part in optimizer.parts for group in part.param_groups for p in group["params"]),
            "frozen": sum(size(x) for x in frozen if x), "bf16 copies": size(models[0]) // 2 if e == 2 else 0,
            "cache": max(rollout, EVALUATED) * 2 * cfg.layers * K * D * e,
            "activations": budget * kept,
            "logits": 2 * 4 * LinearLogp.TILE[device.type] + cfg.vocab * C * (4 + (e == 2) * 2)}
    most = sum(plan.values()) - min(plan["cache"], plan["activations"])
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    unit, scale = ("GiB", 2 ** 30) if most > 2 ** 30 else ("MiB", 2 ** 20)
    parts = ", ".join(f"{name} {x / scale:.1f}" for name, x in plan.items() if x)
    line = f"memory in {unit}: {parts}; about {most / scale:.1f} at a time"
    if total:
        line += f" of {total / scale:.1f}"
    if total and most > total:
        line += f": too much; try --recompute and --micro_tokens {budget // 4}"
    print(line)
    return plan


class Optimizers:
    """Several optimisers that step as one."""

    def __init__(self, *parts):
        self.parts = parts
        for group in self.param_groups:
            group["peak"] = group["lr"]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict()["state"] for part in self.parts]

    def load_state_dict(self, state):
        """The moments alone: rates and decay are those of this run's settings."""
        fits = len(state) == len(self.parts)
        for part, moments in zip(self.parts, state):
            for i, p in enumerate(p for group in part.param_groups for p in group["params"]):
                fits = fits and all(not x.dim() or x.shape == p.shape for x in moments.get(i, {}).values())
        if not fits:
            raise InputError("the checkpoint was left by another choice of optimisers (--muon_lr)")
        for part, moments in zip(self.parts, state):
            part.load_state_dict(part.state_dict() | {"state": moments})


def make_optimizer(model, lr, weight_decay=0.0, muon_lr=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW; matrices decay, vectors (norms, biases) and embeddings do not. With muon_lr the blocks' matrices are
    Muon's instead, which learns faster from scratch."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {name: p for name, p in params.items() if muon_lr and "blocks." in name and p.dim() == 2}
    rest = [p for name, p in params.items() if name not in muon]
    groups = [{"params": [p for p in rest if p.dim() == 2 and id(p) not in tables], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() != 2 or id(p) in tables], "weight_decay": 0.0}]
    fused = rest[0].device.type in ("cpu", "cuda")                   # one kernel for all parameters
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused)
    if not muon:
        return Optimizers(adamw)
    alike = dict(weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")         # steps of AdamW's size
    return Optimizers(adamw, torch.optim.Muon(muon.values(), lr=muon_lr, **alike))


def set_lr(optimizer, step, steps, warmup=0, floor=0.0, linear=False):
    """Every group's rate as a share of its own peak, steps 1 .. steps: linear warm-up, then half a cosine, or a line,
    down to `floor`. Returns the first group's rate."""
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = (steps + 1 - step) / max(1, steps - warmup) if linear else 0.5 * (1 + math.cos(math.pi * done))
    share = step / warmup if step <= warmup else floor + (1 - floor) * left
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
    return optimizer.param_groups[0]["lr"]


class Mean:
    """Weighted means of the statistics of many micro-batches; read once, so that adding never waits for the GPU."""

    def __init__(self):
        self.sums = {}

    def add(self, stats, weight=1.0):
        for name, x in stats.items():
            total, w = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = total + x * weight, w + weight

    def read(self):
        return {name: float(total / w) for name, (total, w) in self.sums.items()}


# ----------------------------------------------------------------------------------------------------------- evaluation


def scored(score, row, text, need=True):
    """score(row, text), a finite number; without need, None too, for a row that does not say what is right. What else
    it gives, or what it raises, ends in one line."""
    try:
        x = score(row, text)
        if x is None and not need or hasattr(x, "__float__") and math.isfinite(x):
            return x
        problem = f"gave {x!r}, which is no finite number"
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        problem = f"raised {type(e).__name__}: {' '.join(str(e).split())} ({os.path.basename(at.filename)}:{at.lineno})"
    raise InputError(f"score {problem}, on {row.get('at', repr(row['prompt']))} with the answer {text[:80]!r}")


def evaluate(model, tokenizer, rows, score, max_new, samples=8, seed=0, watch=None):
    """How a policy does on rows with "ids" (the encoded prompt): one greedy answer each, and `samples` at temperature
    1.

    Returns a dict and the list of greedy texts. greedy: accuracy by `score`, an answer that did not end being wrong;
    acc: the same at temperature 1; pass@k, k = samples > 1: any of them right; end: share that ended at temperature 1;
    length: their mean tokens, end token included. Rows for which score gives None have no accuracies. `watch(rows,
    tokens, mask, texts)` -> {name: (B,)} looks at an answer to every prompt at temperature 1, and its means are
    reported. The noise has a seed of its own: evaluating changes nothing in a training run, and is the same before and
    after.
    """
    if not rows:
        return {}, []
    generator = torch.Generator(model.device).manual_seed(seed)
    longest = max(len(row["ids"]) for row in rows) + max_new
    size = max(1, EVALUATED // (samples * longest))                  # prompts at a time
    greedy, right, ended, length, shown, watched = [], [], [], [], [], Mean()
    known = all(scored(score, row, "", need=False) is not None for row in rows)
    judge = lambda row, text: known and text is not None and scored(score, row, text) > 0
    for i in range(0, len(rows), size):
        chunk = rows[i:i + size]
        prompts = [row["ids"] for row in chunk]
        tokens, mask, _ = model.generate(prompts, 1, max_new, temperature=0.0)
        texts = answers(tokenizer, tokens, mask, model.cfg.stop)
        greedy += [judge(row, text) for row, text in zip(chunk, texts)]
        shown += texts
        tokens, mask, _ = model.generate(prompts, samples, max_new, temperature=1.0, generator=generator)
        texts = answers(tokenizer, tokens, mask, model.cfg.stop)
        right += [judge(chunk[j // samples], text) for j, text in enumerate(texts)]
        ended += [text is not None for text in texts]
        length += mask.sum(1).tolist()
        if watch:
            found = watch(chunk, tokens[::samples], mask[::samples].cpu(), texts[::samples])
            watched.add({name: x.mean() for name, x in found.items()}, len(chunk))
    right = torch.tensor(right, dtype=torch.float32).view(-1, samples)
    mean = lambda x: sum(x) / len(x)
    accuracies = {"greedy": mean(greedy), "acc": right.mean().item()}
    if samples > 1:
        accuracies[f"pass@{samples}"] = right.amax(1).mean().item()
    return (accuracies if known else {}) | {"end": mean(ended), "length": mean(length)} | watched.read(), shown


def distinct(tokens, mask, n=2):
    """Distinct-n of a batch of answers: different n-grams over all n-grams; falls as answers become the same."""
    both = mask.cpu()[:, n - 1:] > 0
    for i in range(n - 1):
        both &= mask.cpu()[:, i:i - n + 1] > 0
    grams = tokens.cpu().unfold(1, n, 1)[both]                                               # (number of n-grams, n)
    return len(grams.unique(dim=0)) / max(1, len(grams))


def told(reward, gold, mask, texts, group=1):
    """What the log says of the answers of a rollout: mean reward, mean length in tokens, share that ended, share that
    the rule finds right and, of groups, share with a right answer. reward, gold (B,), mask (B, T) on the CPU."""
    ended = sum(text is not None for text in texts) / len(texts)
    stats = {"reward": reward.mean(), "len": mask.sum(1).mean(), "end": ended}
    if gold is not None:
        right = (gold > 0).float().view(-1, group)
        stats |= {"gold": right.mean()} | ({"solved": right.amax(1).mean()} if group > 1 else {})
    return stats


def half_interval(x, group):
    """Half of the 95% interval of mean(x), x (N,), where those of one group (N,), numbered from 0, are not
    independent."""
    off = torch.zeros(int(group.max()) + 1).index_add(0, group, x - x.mean())           # what a group adds to the error
    return 1.96 * off.norm() / len(x)


# ------------------------------------------------------------------------------ settings, devices and what a run leaves


def parse_config(Config, argv=None):
    """`--field value` for every field of a dataclass; the comment beside the field is its --help. A bool may stand
    alone: --resume. With --resume the settings of the run in --out are the defaults."""
    comment = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", inspect.getsource(Config), re.M))

    def true_or_false(text):
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int("")

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (--help lists all flags)")

    parser = Parser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
                    description=inspect.getmodule(Config).__doc__.strip().split("\n")[0])
    for f in fields(Config):
        alone = dict(nargs="?", const=True) if f.type is bool else {}
        parser.add_argument(f"--{f.name}", type=true_or_false if f.type is bool else f.type, default=f.default,
                            metavar=f.type.__name__, help=comment[f.name].replace("%", "%%"), **alone)

    def parsed():
        cfg = Config(**vars(parser.parse_args(argv)))
        for name in {"out", "init", "reward"} & comment.keys():
            setattr(cfg, name, getattr(cfg, name) and os.path.normpath(getattr(cfg, name)).replace(os.sep, "/"))
        return cfg

    cfg = parsed()
    if not cfg.resume:
        ours = inspect.getmodule(Config).__dict__.get("PUBLIC", {})
        if ours and cfg.init and is_public(cfg.init, made=True):
            parser.set_defaults(**ours)
            told = " ".join(f"--{name} {x}" for name, x in ours.items())
            print(f"{cfg.init} is or was made from a public model: defaults are {told}")
        return parsed()
    path = os.path.join(cfg.out, "config.json")
    if not os.path.exists(path):
        raise InputError(f"{cfg.out}: nothing to resume (no config.json)")
    with open(path, encoding="utf-8") as f:
        try:
            saved = dict(json.load(f))
        except (ValueError, TypeError) as e:
            raise InputError(f"{path}: not a run's settings ({e})") from None
    if saved.get("script") != script_name(Config):
        raise InputError(f"{cfg.out}: this is a run of {saved.get('script')}, not of {script_name(Config)}")
    kept = {name: str(x) for name, x in saved.items() if name in comment and name not in ("out", "resume")}
    parser.set_defaults(**kept)                                       # as text, so that each is checked as a flag is
    cfg = parsed()
    if not os.path.exists(os.path.join(cfg.out, "ckpt.pt")):
        print(f"{cfg.out}: no checkpoint yet, so this run begins again")
        cfg.resume = False
    return cfg


def script_name(Config):
    """What a script's docstring begins with: SFT, Reward model, PPO for RLHF."""
    return inspect.getmodule(Config).__doc__.split(":")[0].strip()


def check(cfg, **least):
    """Every setting named is at least so much: check(cfg, steps=1, group=2)."""
    for name, low in least.items():
        x = getattr(cfg, name)
        if not low <= x < math.inf:                                  # nor nan
            raise InputError(f"--{name} {x}: must be " + ("finite" if x == math.inf else f"at least {low}"))


def setup(seed):
    """Seed torch and choose the device: cuda, else mps, else cpu."""
    if not 0 <= seed < 2 ** 32:
        raise InputError(f"--seed {seed}: must be from 0 to 2**32 - 1")
    torch.manual_seed(seed)
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)                # it plans anew for every shape, and ours keep changing
    return torch.device(kind)


def make_first(folder, script, default, seed, *flags):
    """Run the script that makes the checkpoint in `folder`, if that is the default one and missing or unfinished."""
    state = read_checkpoint(folder) if os.path.exists(os.path.join(folder, "ckpt.pt")) else None
    if folder != default or state and state.get("finished"):
        return
    print(f"{folder} {'is unfinished' if state else 'does not exist'}: running {script} first", flush=True)
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    more = ["--resume"] if state else ["--seed", str(seed), *flags]
    child = subprocess.Popen([sys.executable, here, "--out", folder, *more])
    try:
        failed = child.wait()
    except KeyboardInterrupt:                                         # it is waited for until it has saved
        if os.name == "posix":
            child.terminate()                                         # a scheduler may have told this script alone
        child.wait()
        raise KeyboardInterrupt("the same command goes on from what is saved") from None
    if failed:
        raise InputError(f"{script} failed, see above; {folder} is needed here")


class Guard:
    """Says when a run has gone wrong, and by which rule. It keeps only counts, which a resumed run replays."""

    def __init__(self, max_kl=float("inf"), patience=5, barren=50, val=0):
        """val: validation prompts, which say how far held-out accuracy may fall by chance."""
        self.max_kl, self.limit, self.count = max_kl, {"kl": patience, "end": patience, "barren": barren}, {}
        self.val, self.best, self.hacked = val, (0.0, 0.0), 0

    def check(self, m):
        """The rule that this step's metrics break, or None. Metrics that a script does not have break nothing."""
        for name, x in m.items():
            if not math.isfinite(x):
                return f"{name} is {x}"
        sick = {"kl": m.get("kl_seq", 0) > self.max_kl, "end": m.get("end", 1) < .05,
                "barren": m.get("solved", 1) == 0 and m.get("dead", 1) == 1}        # a reward model may tell them apart
        for name, bad in sick.items():
            self.count[name] = self.count.get(name, 0) + 1 if bad else 0
        if self.count["kl"] >= self.limit["kl"]:
            return f"KL to the reference above {self.max_kl} nats an answer for {self.count['kl']} steps"
        if self.count["end"] >= self.limit["end"]:
            return f"fewer than 5% of answers end, for {self.count['end']} steps"
        if self.count["barren"] >= self.limit["barren"]:
            return f"no answer of any group was right for {self.count['barren']} steps: there is nothing to learn from"
        if self.val and "val_acc" in m and "val_score" in m:
            best, its_score, acc = *self.best, m["val_acc"]
            noise = 2 * math.sqrt((best * (1 - best) + acc * (1 - acc)) / self.val)                # two standard errors
            self.hacked = self.hacked + 1 if acc < best - noise and m["val_score"] > its_score else 0
            self.best = max(self.best, (acc, m["val_score"]))
            if self.hacked == 2:
                return (f"the reward model's score rose from {its_score:.2f} to {m['val_score']:.2f} while held-out "
                        f"accuracy fell from {best:.3f} to {acc:.3f}: it is being deceived")


class Folder:
    """What a run leaves behind: config.json, metrics.jsonl, ckpt.pt, samples.txt, curves.png. Nothing is written before
    `begin`."""

    def __init__(self, out, cfg, steps, tokenizer, guard):
        self.out, self.cfg, self.steps, self.tokenizer, self.guard = out, cfg, steps, tokenizer, guard
        self.rows, self.clock, self.leaving = [], None, False

    def path(self, name):
        return os.path.join(self.out, name)

    def begin(self, model, optimizer, resume):
        """Open the folder. Returns the step to go on from and what `save` was given besides, {} for a new run.

        A resumed run gets its weights, moments and random state back as they were, and metrics.jsonl loses the steps
        after the checkpoint, which are done again. A new run finds its folder empty: an earlier one is renamed.
        """
        state = read_checkpoint(self.out) if resume else {"step": 0, "more": {}}
        if resume:
            if not {"step", "more", "optimizer", "rng"} <= state.keys():
                raise InputError(f"{self.out}: its checkpoint is a model alone; --init {self.out} starts a run from it")
            where = f"{self.out}: its checkpoint has another shape than the flags say"
            load_weights(model, state["model"], where, "they ask for")
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available() and "rng_cuda" in state:
                torch.cuda.set_rng_state(state["rng_cuda"])
        try:
            self.open(state["step"], resume)
        except OSError as e:
            raise InputError(f"{self.out}: cannot write here ({e.strerror})") from None
        return state["step"], state["more"]

    def open(self, step, resume):
        if resume:
            if os.path.exists(self.path("metrics.jsonl")):
                try:
                    with open(self.path("metrics.jsonl"), encoding="utf-8") as f:
                        self.rows = [json.loads(line) for line in f if line.endswith("\n")]     # a torn line goes
                    self.rows = [row for row in self.rows if row["step"] <= step]
                except (ValueError, KeyError, TypeError) as e:
                    raise InputError(f"{f.name}: not what a run has logged ({type(e).__name__}: {e})") from None
            self.write_rows("metrics.jsonl", self.rows)
            for row in self.rows if self.guard else []:
                self.guard.check(row)
        elif is_public(self.out):
            raise InputError(f"--out {self.out}: a model that no run left is there; name another folder")
        elif os.path.exists(self.path("config.json")):               # nothing that an earlier run made is lost
            old = next(f"{self.out}.{i}" for i in range(1, 10_000) if not os.path.exists(f"{self.out}.{i}"))
            os.replace(self.out, old)
            print(f"{self.out}: the earlier run is kept as {old}")
        os.makedirs(self.out, exist_ok=True)
        made = {"script": script_name(type(self.cfg)), "public": bool(self.tokenizer.files)}
        settings = made | asdict(self.cfg) | {"resume": False}
        self.write("config.json", json.dumps(settings, indent=2))
        self.metrics = open(self.path("metrics.jsonl"), "a", buffering=1, encoding="utf-8")

    def write(self, name, text):
        """A whole text file in one step."""
        with open(self.path(name + ".tmp"), "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(self.path(name + ".tmp"), self.path(name))

    def write_rows(self, name, rows):
        """JSON lines, as read_rows reads them."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def save(self, model, optimizer, step, name="ckpt.pt", **more):
        """All that `begin` needs to go on from here; `more` is kept as it is."""
        cuda = {"rng_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        save(self.out, model, self.tokenizer, name, step=step, finished=step == self.steps,
             optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), more=more, **cuda)
        if self.leaving and name == "ckpt.pt":
            raise KeyboardInterrupt(f"step {step} is saved, the same command with --resume goes on from it")
        if step == self.steps:                                       # nothing is left to be saved
            self.heed(self.leave, signal.default_int_handler)

    def heed(self, old, new):
        """Ctrl-C and a scheduler's SIGTERM call `new`, where they would have called `old`."""
        if threading.current_thread() is threading.main_thread():    # Python's rule
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) == old:
                    signal.signal(number, new)

    def leave(self, number, frame):
        """The scripts save at the end of the step when `leaving` is set; the same signal again ends the run at
        once."""
        signal.signal(number, signal.default_int_handler)
        self.leaving = True
        print("\ninterrupted: this step is finished and saved first; once more ends it at once", file=sys.stderr)

    def log(self, step, shown, **metrics):
        """One object into metrics.jsonl, one line on the screen with the metrics that `shown` names. Returns the
        guard's verdict."""
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
        else:
            try:
                import resource                                      # not on Windows; macOS counts bytes, Linux KiB
                unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
            except ImportError:
                memory = 0.0
        row = {"step": step} | metrics | {"mem_gb": round(memory, 3)}
        self.rows.append(row)
        self.metrics.write(json.dumps(row) + "\n")
        numbers = " | ".join(f"{name} {pretty(row[name])}" for name in shown.split() if name in row)
        line = f"step {step:4}/{self.steps} | {numbers} | {memory:.1f} GB"
        if self.clock is None:                                       # time left is told from the second line on
            self.clock = step, time.perf_counter()
            self.heed(signal.default_int_handler, self.leave)
        else:
            left = int((time.perf_counter() - self.clock[1]) / (step - self.clock[0]) * (self.steps - step))
            line += f" | {left // 60}:{left % 60:02} left"
        print(line, flush=True)
        return self.guard and self.guard.check(row)

    def stop(self, model, optimizer, step, why):
        """The guard spoke: the sick state goes to stopped.pt, the last good checkpoint stays, the run ends."""
        self.save(model, optimizer, step, "stopped.pt")
        good = self.path("ckpt.pt") if os.path.exists(self.path("ckpt.pt")) else "not there yet"
        raise InputError(f"stopped by the guard at step {step}: {why}; the last good checkpoint is {good}, "
                         f"the state now is {self.path('stopped.pt')}; --guard false runs on")

    def samples(self, title, rows, texts, n=3):
        """Append a few prompts with their greedy answers to samples.txt; returns them as text."""
        text = "".join(f"    {row['prompt']!r} -> {answer!r}\n" for row, answer in list(zip(rows, texts))[:n])
        with open(self.path("samples.txt"), "a", encoding="utf-8") as f:
            f.write(f"{title}\n{text}")
        return text

    def plot(self, *names):
        """curves.png: one panel a metric against the step, where matplotlib is installed."""
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            print("pip install matplotlib to get curves.png")
            return
        figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 2.8), layout="constrained")
        for axis, name in zip(axes, names):
            for key in name.split():
                points = [(row["step"], row[key]) for row in self.rows if key in row]
                axis.plot(*(zip(*points) if points else ([], [])), label=key)
            axis.set_xlabel("step")
            axis.legend()
        figure.savefig(self.path("curves.png"), dpi=120)
        plt.close(figure)


def pretty(x):
    """Five characters, so that the lines of a run stand in columns."""
    if isinstance(x, int) or abs(x) >= 1000:
        return f"{x:5.0f}"
    return f"{x:5.0e}" if 0 < abs(x) < 0.001 else f"{x:5.3f}" if abs(x) < 10 else f"{x:5.1f}"


def table(before, after):
    """The before -> after lines that end a run; what was not measured before has a blank there."""
    first = {name: f"{x:.3f}" for name, x in before.items()}
    return "\n".join(f"    {name:8} {first.get(name, ''):>7} -> {x:.3f}" for name, x in after.items())


def main(train, Config):
    """What `python script.py` does: parse, train, and end in one clear line if something was wrong with what was
    given."""
    name = os.path.basename(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")                # a log file in an old encoding has no ε
    signal.signal(signal.SIGTERM, signal.default_int_handler)        # a scheduler's way to say Ctrl-C
    try:
        train(parse_config(Config))
    except InputError as e:
        sys.exit(f"{name}: {e}")
    except OSError as e:                                             # a full disk, a folder that went away
        sys.exit(f"{name}: {e.filename or 'output'}: {e.strerror or e}; what was saved before stands, see --resume")
    except KeyboardInterrupt as e:
        sys.exit(f"\n{name}: interrupted; {str(e) or 'what was saved before stands, see --resume'}")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "export":
        sys.exit("python model.py export out/grpo FOLDER    writes a checkpoint as a Hugging Face model folder")
    try:
        model, tokenizer = load(sys.argv[2], kind="GPT")
        write_public(sys.argv[3], model, tokenizer)
    except InputError as e:
        sys.exit(f"model.py: {e}")
    except OSError as e:
        sys.exit(f"model.py: {e.filename or sys.argv[3]}: {e.strerror or e}")
    print(f"{sys.argv[3]}: {sum(p.numel() for p in model.parameters()):,} parameters in float32, and a tokenizer")
    if tokenizer.turns and tokenizer.system:
        print(f"its prompts opened with the system line {tokenizer.system!r}")
