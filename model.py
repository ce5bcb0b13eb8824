"""
model.py: the transformer.

    GPT              the GPT-2, Llama 3, Qwen 2.5 and Qwen 3 families, by fields of GPTConfig
    GPT.token_logp   log-prob and entropy of every response token, without a (B, T, V) tensor
    GPT.generate     ragged prompts -> sampled responses and their log-probs, with a KV cache
    ScalarModel      the same trunk with one number per position: reward model and critic

One index convention holds everywhere. `tokens` (B, T) holds prompt and response together, always
right-padded: causal attention never looks to its right, so training needs no attention mask and no
position arithmetic. `mask[b, t]` is 1 where token t was chosen by the policy, the end token
included, and 0 on prompt and pads. `logp[b, t]` is the log-probability of `tokens[b, t]` given
`tokens[b, :t]`, so `logp[:, 0] = 0`; `value[b, t]` is the value of the prefix `tokens[b, :t]`,
before token t is chosen. The shift by one happens here, once; callers never slice.

Shapes: B sequences, T tokens, C channels (n_embd), H query heads, K key/value heads, D head_dim,
V vocabulary, P longest prompt, G responses per prompt.

Sources: nanoGPT (github.com/karpathy/nanoGPT) for the form of this file; RoPE arXiv 2104.09864,
grouped-query attention arXiv 2305.13245.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------ config


@dataclass
class GPTConfig:
    """The defaults are the built-in model: Llama's layout with 0.36 million parameters."""
    vocab_size: int = 259         # V
    block_size: int = 64          # longest sequence, prompt and response together
    n_layer: int = 3
    n_embd: int = 96              # C, channels of the residual stream
    n_head: int = 3               # H, query heads
    n_kv_head: int = 0            # K, key/value heads, each shared by H / K query heads; 0: H
    head_dim: int = 0             # D; 0: C / H. Qwen 3 sets it independently of C
    intermediate_size: int = 0    # hidden units of the MLP; 0: 4 C for gelu, 8/3 C for swiglu
    norm: str = "rms"             # "rms", or "layer" (GPT-2)
    norm_eps: float = 1e-6
    positions: str = "rope"       # "rope", or "learned" (GPT-2)
    rope_theta: float = 10_000.0
    rope_scaling: tuple = ()      # Llama 3: factor, low and high frequency factor, original context
    mlp: str = "swiglu"           # "swiglu", or "gelu" (GPT-2, tanh approximation)
    bias: bool = False            # biases in every linear layer (GPT-2)
    qkv_bias: bool = False        # biases on query, key and value only (Qwen 2.5)
    qk_norm: bool = False         # RMSNorm on each query and key head (Qwen 3)
    tie_embeddings: bool = True   # the output matrix is the embedding
    stop_token_ids: tuple = (256,)    # ids that end a response; the first ends a plain one in SFT

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if not self.intermediate_size:
            gelu = self.mlp == "gelu"
            self.intermediate_size = 4 * self.n_embd if gelu else 8 * self.n_embd // 3


# ------------------------------------------------------------------------------ norm, RoPE and MLP


def make_norm(cfg, width):
    norm = nn.RMSNorm if cfg.norm == "rms" else nn.LayerNorm
    return norm(width, eps=cfg.norm_eps)


@functools.cache
@torch.inference_mode(False)    # may be built while sampling; autograd refuses inference tensors
def rope_table(block_size, dim, theta, scaling, device):
    """cos, sin of position x frequency, (block_size, D/2) each. Not a buffer: a model that is cast
    to bf16 keeps float32 angles."""
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)   # (D/2,)
    if scaling:                   # Llama 3 divides low frequencies by `factor`, keeps high ones
        factor, low, high, original = scaling
        keep = ((original * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / factor)
    angle = torch.arange(block_size, dtype=torch.float64)[:, None] * freq   # (block_size, D/2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) by the angle of their position. x (B, T, heads, D);
    cos, sin ([B,] T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        width = cfg.intermediate_size * (2 if self.gated else 1)           # gate and up, one matrix
        self.up = nn.Linear(cfg.n_embd, width, bias=cfg.bias)
        self.down = nn.Linear(cfg.intermediate_size, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h, approximate="tanh"))


# --------------------------------------------------------------------------- attention and KV cache


class KVCache:
    """Keys and values of a batch, per layer a pair (B, K, columns, D).

    Prompts are right-padded into columns 0 .. P-1, and the n-th response token of every row goes to
    column P + n, whatever the length of its prompt. This is exact because a key already contains
    its position (RoPE, learned) and `bias` is -inf on columns that hold a pad or nothing yet. The
    cache grows by BLOCK columns at a time: most responses are short, and a compact cache is read
    faster. Until it grows, no shape and no address changes, so a CUDA graph can replay a step.
    """

    BLOCK = {"cpu": 32, "cuda": 256, "mps": 128}                            # columns

    def __init__(self, cfg):
        self.layers = [None] * cfg.n_layer
        self.has_key_bias = cfg.bias or cfg.qkv_bias
        self.used = 0                                                       # columns with a token
        self.column = None                                                  # the next one, a tensor
        self.bias = None                                                    # (B, 1, 1, columns)

    def attend(self, layer, q, k, v):
        """Store k, v (B, K, T, D) and return the attention of q (B, H, T, D) over the cache."""
        if self.bias is None:                                 # prefill: the prompt sees only itself
            self.layers[layer] = (k.contiguous(), v.contiguous())     # views would keep all of qkv
            return causal_attention(q, k, v)
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        return decode_attention(q, keys, values, self.bias, self.has_key_bias)

    def expand_prompts(self, length, group_size):
        """After the prefill: repeat each row group_size times and hide the pads. length (B,)."""
        k = self.layers[0][0]
        P = k.size(2)
        self.used = P                                                       # columns with a token
        self.column = torch.tensor([P], device=k.device)                    # the next one
        pad = torch.arange(P) >= length.repeat_interleave(group_size)[:, None]  # (B G, P)
        bias = torch.zeros(pad.shape, dtype=k.dtype).masked_fill_(pad, -math.inf)
        self.bias = bias[:, None, None].to(k.device)
        for i, (k, v) in enumerate(self.layers):
            k, v = k.repeat_interleave(group_size, 0), v.repeat_interleave(group_size, 0)
            self.layers[i] = (k, v)
        self.grow()

    def grow(self):
        """Add columns up to the next multiple of the block size."""
        block = self.BLOCK[self.bias.device.type]
        new = block - self.used % block
        self.bias = F.pad(self.bias, (0, new), value=-math.inf)
        for i, (k, v) in enumerate(self.layers):     # layer by layer: old and new never both whole
            self.layers[i] = (F.pad(k, (0, 0, 0, new)), F.pad(v, (0, 0, 0, new)))

    @property
    def full(self):
        return self.used == self.bias.size(3)

    def advance(self):
        self.column += 1
        self.used += 1

    def keep(self, rows):
        """Drop every row but these."""
        self.bias = self.bias[rows]
        for i, (k, v) in enumerate(self.layers):
            self.layers[i] = (k[rows], v[rows])


def causal_attention(q, k, v):
    """q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def decode_attention(q, k, v, bias, has_key_bias=False):
    """One token over the cache: q (B, H, 1, D), k and v (B, K, columns, D) -> (B, H, 1, D).

    In bf16 plain products are several times faster than torch's fused kernels. They are used on
    CUDA where every query head has its own keys, with float32 scores, and on a CPU, which rounds
    scores to bf16, where no bias of the keys makes scores large."""
    # the H/K query heads that share a key head become the rows of one product
    grouped = q.view(len(q), k.size(1), -1, q.size(3))                      # (B, K, H/K, D)
    is_bf16 = q.dtype == torch.bfloat16
    if is_bf16 and q.is_cuda and q.size(1) == k.size(1):
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32)
        scores = scores.view(*grouped.shape[:3], -1)                        # (B, K, H/K, columns)
    elif is_bf16 and q.device.type == "cpu" and not has_key_bias:
        scores = (grouped @ k.mT).float()
    else:
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
        return y.reshape(q.shape)
    scores = scores * q.size(3) ** -0.5 + bias
    y = scores.softmax(-1).to(v.dtype) @ v
    return y.reshape(q.shape)


class Attention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        width = (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim
        self.qkv = nn.Linear(cfg.n_embd, width, bias=cfg.bias or cfg.qkv_bias)
        self.out = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=cfg.bias)
        self.q_norm = make_norm(cfg, cfg.head_dim) if cfg.qk_norm else None
        self.k_norm = make_norm(cfg, cfg.head_dim) if cfg.qk_norm else None

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        H, K = self.n_head, self.n_kv_head
        qkv = self.qkv(x).view(B, T, H + 2 * K, self.head_dim)
        qk, v = qkv.split((H + K, K), dim=2)                                # (B, T, heads, D)
        if self.q_norm is not None:
            qk = qk.to(self.q_norm.weight.dtype)               # from bf16, under autocast
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], dim=2)
        if rope:
            qk = rotate(qk, *rope)                             # queries and keys in one operation
        q, k = qk.to(v.dtype).split((H, K), dim=2)           # under autocast a norm returns float32
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, heads, T, D)
        if cache is None:
            y = causal_attention(q, k, v)                                   # (B, H, T, D)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))                # (B, T, C)


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.norm1 = make_norm(cfg, cfg.n_embd)
        self.attention = Attention(cfg, layer)
        self.norm2 = make_norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, cache=None):
        x = x + self.attention(self.norm1(x), rope, cache)
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------- fused log-prob


def compute_logits(hidden, weight, temperature):
    """hidden (n, C), weight (V, C), of one dtype -> logits / temperature (n, V), float32 or wider.
    Sampling and scoring both call it."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:      # sums that are never rounded to bf16
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def locate_target(targets, vocab, width):
    """Column of each row's target in a tile of the vocabulary, (n, 1), and whether it is there."""
    column = targets - vocab.start
    inside = (column >= 0) & (column < width)
    return column.clamp(0, width - 1), inside


def add_product_(total, a, b):
    """total += a @ b. Under bf16 the products are bf16 and the total float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


class LinearLogp(torch.autograd.Function):
    """logp = z_y - log Σ_v exp(z_v) with z = a / τ, a = hidden @ weight.T, y the target, without
    the (N, V) matrix. Forward walks it in tiles and keeps a log-sum-exp per row; backward computes
    each tile again. On a CPU a tile fits in the cache, which saves more than recomputing costs.

        dL/da_v = g (1[v = y] - p_v),    p_v = exp(z_v - log Σ exp z),    g = dL/dlogp / τ
        dL/dhidden = dL/da @ weight,     dL/dweight = dL/da.T @ hidden
    """

    ROWS = 4096                                                      # rows of a tile, at most
    TILE = {"cpu": 2 ** 20, "cuda": 2 ** 25, "mps": 12 * 2 ** 20}           # logits of a tile

    @staticmethod
    def tiles(hidden, weight):
        """Slices of the rows and of the vocabulary, row blocks outermost."""
        N, V = len(hidden), len(weight)
        for i in range(0, N, LinearLogp.ROWS):
            rows = slice(i, min(i + LinearLogp.ROWS, N))
            width = max(1, LinearLogp.TILE[hidden.device.type] // (rows.stop - i))
            if width > 128:
                width -= width % 128           # cuBLAS is slow at other widths
            for v in range(0, V, width):
                yield rows, slice(v, v + width)

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        cast = weight.to(hidden.dtype)                         # to bf16 once, where hidden is bf16
        targets = targets[:, None]                                          # (N, 1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lowest = torch.finfo(wide).min                         # not -inf, or 0 * -inf would be nan
        top = hidden.new_full((len(hidden), 1), lowest, dtype=wide)         # largest z so far
        total = hidden.new_zeros(len(hidden), 1, dtype=wide)   # Σ_v exp(z_v - top), at least 1
        dot = torch.zeros_like(total)          # Σ_v exp(z_v - top) (z_v - top), at most 0
        picked = torch.zeros_like(total)                                    # z_y
        for rows, vocab in LinearLogp.tiles(hidden, cast):
            z = compute_logits(hidden[rows], cast[vocab], temperature)      # (n, v)
            column, inside = locate_target(targets[rows], vocab, z.size(1))
            picked[rows] = torch.where(inside, z.gather(1, column), picked[rows])
            new_top = torch.maximum(top[rows], z.amax(1, keepdim=True))
            shift = top[rows] - new_top                                     # of the sums so far
            rescale = shift.exp()
            z = z.sub_(new_top)
            p = z.exp()
            dot[rows] = (dot[rows] + shift * total[rows]) * rescale
            dot[rows] += z.mul_(p).sum(1, keepdim=True)
            total[rows] = total[rows] * rescale + p.sum(1, keepdim=True)
            top[rows] = new_top
            del z, p                                           # before the next tile is allocated
        lse = top + total.log()                                             # log Σ_v exp(z_v)
        logp = (picked - lse)[:, 0]
        entropy = (total.log() - dot / total)[:, 0]            # lse - Σ_v p_v z_v, never below 0
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad = grad[:, None] / ctx.temperature                              # (N, 1)  g
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
        for rows, vocab in LinearLogp.tiles(hidden, cast):
            h, w, g = hidden[rows], cast[vocab], grad[rows]
            da = compute_logits(h, w, ctx.temperature)                      # (n, v)
            da = da.sub_(lse[rows]).exp_().mul_(-g)                         # -g p_v
            column, inside = locate_target(targets[rows], vocab, da.size(1))
            da.scatter_add_(1, column, torch.where(inside, g, 0.0))         # + g where v = y
            da = da.to(h.dtype)
            if d_hidden is not None:
                add_product_(d_hidden[rows], da, w)                         # (n, C)
            if d_weight is not None:
                add_product_(d_weight[vocab], da.T, h)                      # (v, C)
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, None, None


def linear_logp(hidden, weight, targets, temperature=1.0):
    """Log-prob of each row's target and entropy of each row under softmax(hidden @ weight.T / τ).

    hidden (N, C), weight (V, C), targets (N,) int64 -> logp (N,), entropy (N,), in nats, float32
    or wider. Gradients reach hidden and weight through logp; entropy is for logging and has none.
    Extra memory is a tile of logits, not (N, V). Temperature 0 counts as 1."""
    with torch.autocast(hidden.device.type, enabled=False):  # products in the precision of `hidden`
        return LinearLogp.apply(hidden, weight, targets, temperature or 1.0)


# --------------------------------------------------------------------------------------------- GPT

# The forward is in bf16 on these devices, for models of at least so many channels. A CPU that
# multiplies bf16 in hardware gains from 256 channels on (python experiments/bench.py bf16).
BF16_MIN_WIDTH = {"cuda": 1}
if hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("avx512_bf16"):
    BF16_MIN_WIDTH["cpu"] = 256


def uses_bf16(model, device=None):
    """Whether the forward of a GPT or ScalarModel is in bf16, on its own device or on `device`."""
    device = device or model.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False                           # a T4 or RTX 20: bf16 is emulated, float32 is faster
    return model.cfg.n_embd >= BF16_MIN_WIDTH.get(device.type, math.inf)


def autocast(model):
    """bf16 matrix products over float32 weights, where uses_bf16(model). Within one `with`
    statement each weight is cast once."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bf16(model))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.gradient_checkpointing = False    # store only block inputs, recompute blocks
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position = None
        if cfg.positions == "learned":
            self.position = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = make_norm(cfg, cfg.n_embd)
        self.head = None
        if not cfg.tie_embeddings:
            self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        # Linear layers keep PyTorch's init, std 0.58 / sqrt(fan-in): .06 at 96 channels, where
        # GPT-2's .02 (right for 768) learns far more slowly. Embeddings start small, so the first
        # logits are near 0. The two projections into the residual stream start at 0, so a new
        # block is the identity.
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
        """The output matrix (V, C)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens, positions=None, cache=None):
        """tokens (B, T) -> hidden states (B, T, C) after the last norm; positions (B, T), by
        default 0 .. T-1."""
        cfg, T = self.cfg, tokens.size(1)
        assert T <= cfg.block_size, f"{T} tokens exceed the block size of {cfg.block_size}"
        if positions is None:
            positions = slice(T)
        x = self.embedding(tokens).to(self.norm.weight.dtype)               # (B, T, C)
        rope = None
        if cfg.positions == "learned":
            x = x + self.position.weight[positions]
        else:
            table = rope_table(cfg.block_size, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling,
                               x.device)
            rope = [angle[positions].unsqueeze(-2) for angle in table]      # ([B,] T, 1, D/2)
        for block in self.blocks:
            if cache is not None:
                x = block.forward(x, rope, cache)              # never compiled: its shapes change
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope)
        return self.norm(x)

    def token_logp(self, tokens, mask=None, temperature=1.0, index=None):
        """logp, entropy (B, T), float32 or wider: logp[b, t] = log π(tokens[b, t] | tokens[b, :t]),
        0 at t = 0 and where mask is 0. Without a mask, all but the first position.

        `index`: flat indices of the positions in the mask, given in place of the mask. The caller
        computes them on the CPU, so nothing waits for the GPU (micro_batches, common/train.py)."""
        B, T = tokens.shape
        if index is None:
            chosen = torch.ones_like(tokens) if mask is None else mask > 0
            index = F.pad(chosen[:, 1:], (1, 0)).flatten().nonzero()[:, 0]  # (N,)
        hidden = self(tokens).flatten(0, 1)[index - 1]         # (N, C): t is predicted from t - 1
        if torch.is_autocast_enabled(tokens.device.type):      # the last norm returned float32
            hidden = hidden.to(torch.get_autocast_dtype(tokens.device.type))
        targets = tokens.flatten()[index]
        logp, entropy = linear_logp(hidden, self.unembedding, targets, temperature)  # (N,)
        zeros = logp.new_zeros(B * T)
        logp = zeros.index_copy(0, index, logp).view(B, T)
        entropy = zeros.index_copy(0, index, entropy).view(B, T)
        return logp, entropy

    @torch.no_grad()
    def generate(self, prompts, group_size=1, max_new_tokens=64, temperature=1.0,
                 stop_token_ids=None, pad=0, uniform=None):
        """Sample group_size responses to every prompt; those to one prompt are adjacent rows.

        prompts: lists of token ids of any lengths. A response ends with the first id of
        stop_token_ids (default: the model's own), which belongs to it, or after max_new_tokens.
        Temperature 0 is greedy. uniform (B G, max_new_tokens): the random numbers from [0, 1) to
        sample by; None draws new ones. Returns tokens (B G, T), right-padded with `pad`, mask
        (B G, T) and logp (B G, T) of the sampled tokens, which equals token_logp's."""
        device = self.device
        length = torch.tensor([len(prompt) for prompt in prompts])          # (B,)
        if length.min() < 1:
            raise ValueError("empty prompt: the first response token must follow a token")
        if length.max() + max_new_tokens > self.cfg.block_size:
            raise ValueError(f"prompt of {length.max()} + max_new_tokens {max_new_tokens} "
                             f"exceed the block size of {self.cfg.block_size}")
        if stop_token_ids is None:
            stop_token_ids = self.cfg.stop_token_ids
        stop = torch.tensor(stop_token_ids, device=device)
        dtype = SAMPLE_DTYPE[device.type]
        if uniform is None:
            N = len(prompts) * group_size if temperature else 0             # greedy: none needed
            uniform = torch.rand(N, max_new_tokens, device=device, dtype=dtype)
        uniform = uniform.to(dtype).to(device)
        # Autocast casts each weight once per `with` statement, but at every token in inference
        # mode; without autocast inference mode is faster.
        with autocast(self) if uses_bf16(self) else torch.inference_mode():
            cache = KVCache(self.cfg)
            prompt_tokens, hidden = prefill(self, prompts, length, cache, pad)  # (B, P), (B, C)
            cache.expand_prompts(length, group_size)
            length = length.repeat_interleave(group_size).to(device)        # (N,), N = B G
            unembedding = sampling_unembedding(self)                        # (V', C)
            logits = next_token_logits(self, unembedding, hidden, temperature or 1.0)  # (B, V')
            response, logp, count = decode_loop(
                self, unembedding, cache, logits.repeat_interleave(group_size, 0), length,
                max_new_tokens, temperature, stop, pad, uniform)

        # prompt and response side by side, right-padded
        total = length + count                                              # (N,)
        T = int(total.max())
        column = torch.arange(T, device=device)
        mask = (column >= length[:, None]) & (column < total[:, None])      # (N, T)
        # masked_scatter fills the places of `mask` in row order with the tokens of `kept`, as many
        kept = torch.arange(max_new_tokens, device=device) < count[:, None]  # (N, max_new_tokens)
        tokens = prompt_tokens.repeat_interleave(group_size, 0)             # (N, P)
        tokens = F.pad(tokens, (0, T - tokens.size(1)), value=pad)          # (N, T)
        tokens = tokens.masked_scatter(mask, response[kept])
        logp = logp.new_zeros(len(tokens), T).masked_scatter(mask, logp[kept])
        return tokens, mask.float(), logp


# ---------------------------------------------------------------------------------------- sampling

# decode_loop checks for finished rows every CHECK_EVERY tokens, because a check waits for the GPU.
# It drops them once the share of unfinished rows is below DROP_BELOW, because after a drop CUDA
# must capture a new graph. A batch of at most KEEP_ROWS rows stays whole: reading the weights takes
# most of the time of its steps, so that fewer rows save nothing.
CHECK_EVERY = {"cpu": 1, "cuda": 8, "mps": 8}
DROP_BELOW = {"cpu": 0.9, "cuda": 0.5, "mps": 0.9}
KEEP_ROWS = {"cpu": 0, "cuda": 64, "mps": 0}
SAMPLE_DTYPE = {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}   # see `sample`


def prefill(model, prompts, length, cache, pad):
    """Run every prompt once and fill the cache -> prompts (B, P) right-padded, and the hidden state
    of each prompt's last token (B, C)."""
    P = int(length.max())
    rows = [list(prompt) + [pad] * (P - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(rows, device=model.device)                        # (B, P)
    hidden = model(tokens, cache=cache).flatten(0, 1)                       # (B P, C)
    last = torch.arange(len(prompts)) * P + length - 1
    return tokens, hidden[last.to(model.device)]


def sampling_unembedding(model):
    """The output matrix as sampling multiplies it, (V', C): in bf16 where the model runs in bf16,
    and on CUDA then padded with rows of zeros to a multiple of 64, because cuBLAS takes 0.44 ms for
    512 x 768 by 50,257 and 0.08 ms by 50,304."""
    weight = model.unembedding                                              # (V, C)
    if not uses_bf16(model):
        return weight
    rows = -len(weight) % 64 if weight.is_cuda else 0
    return F.pad(weight.bfloat16(), (0, 0, 0, rows))


def next_token_logits(model, unembedding, hidden, temperature):
    """hidden (n, C), unembedding (V', C) -> logits (n, V'), -inf in the columns of the padding."""
    logits = compute_logits(hidden.to(unembedding.dtype), unembedding, temperature)
    logits[:, model.cfg.vocab_size:] = -math.inf
    return logits


def decode_one_token(model, unembedding, token, position, cache, temperature):
    """token (n,) at position (n, 1) -> logits of the next token (n, V'). Shapes and addresses are
    those of the step before, so that a CUDA graph can replay it."""
    cache.bias.index_fill_(3, cache.column, 0.0)                            # the token sees itself
    hidden = model(token[:, None], position, cache)[:, 0]                   # (n, C)
    return next_token_logits(model, unembedding, hidden, temperature)


def decode_loop(model, unembedding, cache, logits, length, max_new_tokens, temperature, stop, pad,
                uniform):
    """Sample, stop, drop finished rows, grow the cache. unembedding (V', C); logits (N, V') of the
    first token; length (N,) of the prompts; uniform (N, max_new_tokens) -> response and logp
    (N, max_new_tokens), count (N,) of response tokens."""
    N, device = logits.size(0), logits.device
    response = torch.full((N, max_new_tokens), pad, device=device)
    logp = logits.new_zeros(N, max_new_tokens)
    count = torch.zeros(N, dtype=torch.long, device=device)
    alive = torch.arange(N, device=device)                     # rows that are still in the cache
    done = torch.zeros(N, dtype=torch.bool, device=device)     # which of them have ended
    position = length[:, None].clone()                         # of the next token, by row
    tau = temperature or 1.0                                   # greedy: logits as they are
    step = None
    for n in range(max_new_tokens):
        p = logits.softmax(-1)                                              # (alive, V')
        token = logits.argmax(-1) if temperature == 0 else sample(p, uniform[alive, n])  # (alive,)
        response[alive, n] = torch.where(done, pad, token)
        logp[alive, n] = torch.where(done, 0.0, p.gather(1, token[:, None])[:, 0].log())
        count[alive] += ~done
        done = done | (token[:, None] == stop).any(1)
        if n + 1 == max_new_tokens:
            break
        if (n + 1) % CHECK_EVERY[device.type] == 0:
            unfinished = (~done).nonzero()[:, 0]
            if len(unfinished) == 0:
                break
            few = len(unfinished) < DROP_BELOW[device.type] * len(done)
            if few and len(done) > KEEP_ROWS[device.type]:
                cache.keep(unfinished)
                alive, done = alive[unfinished], done[unfinished]
                token, position = token[unfinished], position[unfinished]
                step = None
        if cache.full:
            cache.grow()
            step = None
        if step is None:                                       # at the start, or shapes changed
            step_token = token
            step = functools.partial(decode_one_token, model, unembedding, step_token, position,
                                     cache, tau)
            step = capture_cuda_graph(step, device)
        step_token.copy_(token)
        logits = step()                                                     # (alive, V')
        position += 1
        cache.advance()
    return response, logp, count


def sample(p, u):
    """One draw from each row of p (n, V) -> (n,): the cumulative distribution inverted at u (n,),
    first over blocks of 128 tokens, then within one. Sums are float64, where the device has it: in
    float32, at V = 151,936, rounding loses 5e-4 of the mass. The value that is looked up stays
    below the total, or rounding could pick a token of probability 0. A row with NaN yields an
    arbitrary id; early stopping catches it."""
    V = p.size(1)
    below_1 = 1 - torch.finfo(u.dtype).eps
    if V % 128:
        p = F.pad(p, (0, -V % 128))
    blocks = p.unflatten(1, (-1, 128))                                      # (n, blocks, 128)
    c = blocks.sum(-1, dtype=u.dtype).cumsum(-1)                            # (n, blocks)
    u = u[:, None].clamp(max=below_1) * c[:, -1:]                           # (n, 1)
    block = torch.searchsorted(c, u, right=True).clamp_(max=c.size(1) - 1)  # (n, 1)
    u = u - F.pad(c, (1, 0)).gather(1, block)                  # what is left of u in this block
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, 128))[:, 0]  # (n, 128)
    c = inside.cumsum(-1, dtype=u.dtype)
    u = torch.minimum(u, c[:, -1:] * below_1)
    index = block * 128 + torch.searchsorted(c, u, right=True)              # (n, 1)
    return index[:, 0].clamp_(max=V - 1)


@functools.cache
def capture_stream():
    """cuBLAS keeps a workspace per stream, so all captures share one stream."""
    return torch.cuda.Stream()


def capture_cuda_graph(step, device):
    """`step()`, a function of tensors that stay where they are, as a CUDA graph: one launch instead
    of hundreds. Off CUDA, `step` itself."""
    if device.type != "cuda":
        return step
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()                          # warm-up: a first call allocates, which a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()

    def replay():
        graph.replay()
        return out

    return replay


# ------------------------------------------------------------------------------------- ScalarModel


class ScalarModel(nn.Module):
    """A trunk with one number per position: a reward model (`score`) or a critic (`value`)."""

    def __init__(self, trunk, std=0.0):
        """std of the head's initial weights: 1 / sqrt(C + 1) for a reward model, 0 for a critic."""
        super().__init__()
        self.cfg = trunk.cfg
        self.trunk = trunk
        self.head = nn.Linear(trunk.cfg.n_embd, 1)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    @property
    def device(self):
        return self.trunk.device

    def forward(self, tokens):
        """(B, T) -> (B, T): the number after reading tokens[b, :t + 1]. The head is never bf16."""
        hidden = self.trunk(tokens).to(self.head.weight.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.head(hidden)[..., 0]

    def value(self, tokens):
        """(B, T): value[b, t] of the prefix tokens[b, :t], before token t is chosen; 0 at t = 0."""
        return F.pad(self(tokens)[:, :-1], (1, 0))

    def score(self, tokens, mask):
        """(B,): read at the last response token, the end token, one column right of value."""
        return self.value_and_score(tokens, mask)[1]

    def value_and_score(self, tokens, mask):
        """Both read-outs, (B, T) and (B,), in one forward."""
        after = self(tokens)                                                # (B, T)
        column = torch.arange(tokens.size(1), device=tokens.device)
        last = (column * (mask > 0)).amax(1, keepdim=True)                  # (B, 1)
        return F.pad(after[:, :-1], (1, 0)), after.gather(1, last)[:, 0]
