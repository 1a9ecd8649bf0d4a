"""Qwen3 (dense), as one reads it: config, attention, MLP, block, model. Parameter names are the checkpoint's own.

What sets it apart from Llama: queries and keys are normalised per head before rotary, and the head size is a field of
its own (Qwen3-0.6B: 16 heads × 128 = 2048, hidden 1024). Reference: transformers `models/qwen3/modeling_qwen3.py`.

B rows, T tokens, D hidden, H heads, K key/value heads, E head size, V vocabulary, P chosen positions.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AfterPrefix, Cache, LayerCache, NoCache, Packed, Prefix, attend
from .layers import Embedding, Head, Linear, RMSNorm, Rope, Rotation, rotate
from .taps import At, Taps


@dataclass(frozen=True)
class Config:
    """The fields of config.json that change what is computed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int = 128  # its own field: heads × head_dim need not be hidden_size
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope(10000.0)
    tie_word_embeddings: bool = False  # 0.6B to 4B share head and embedding
    attention_bias: bool = False
    max_position_embeddings: int = 32768
    model_type: str = "qwen3"

    def __post_init__(self):
        object.__setattr__(
            self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads
        )


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D = config.hidden_size
        E = config.head_dim
        H = config.num_attention_heads
        K = config.num_key_value_heads
        bias = config.attention_bias
        self.head_dim = E
        self.q_proj = Linear(D, H * E, bias=bias)
        self.k_proj = Linear(D, K * E, bias=bias)
        self.v_proj = Linear(D, K * E, bias=bias)
        self.o_proj = Linear(H * E, D, bias=bias)
        self.q_norm = RMSNorm(E, config.rms_norm_eps)
        self.k_norm = RMSNorm(E, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        by_head = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2)  # [B, H, T, E]
        k = self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2)  # [B, K, T, E]
        v = self.v_proj(x).view(by_head).transpose(1, 2)  # [B, K, T, E]
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        z = attend(q, k, v, cache)  # [B, H, T, E]
        return self.o_proj(z.transpose(1, 2).reshape(B, T, -1))  # [B, T, D]


class MLP(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=False)
        self.up_proj = Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def attention_output(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        """What this block's attention adds to the residual stream x [B, T, D]; the tensor that IA2 aligns."""
        return self.self_attn(self.input_layernorm(x), rope, cache)

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """Qwen3 with a language-model head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.model["layers"] = nn.ModuleList(blocks)
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        taps: Taps | None = None,
        logits: bool | At = True,
        cache: Cache | Packed | Prefix | None = None,
        prefix: Prefix | None = None,
        head: bool = True,
    ) -> Tensor | None:
        """Logits for right-padded `ids` [B, T] int64.

        `logits`: True for all [B, T, V]; (rows, cols) for those positions only [P, V]; False for none: returns None and
        stops after the attention of the last tapped layer (the last layer, without taps). `taps` is filled on the way.
        `cache`: a Cache of each row's earlier tokens, which is extended, a Packed that keeps documents apart, or a
        Prefix to be filled; `prefix`: the Prefix that stands before every row. Without `head` the states that
        `lm_head` would map to logits are returned, [B, T, D] or [P, D].
        """
        x = self.model.embed_tokens(ids)  # [B, T, D]
        cache = cache or NoCache()
        if prefix is not None:
            cache = AfterPrefix(prefix, cache)
        positions = cache.positions(x.shape[1], x.device)
        rope = self.config.rope.at(positions, self.config.head_dim, x.dtype)
        depth = len(self.model.layers)
        last = depth - 1
        stop = last if taps is None else taps.last(depth)
        for layer, block in enumerate(self.model.layers):
            a = block.attention_output(x, rope, cache.layer(layer))  # [B, T, D]: attention output
            x = x + a
            if taps is not None:
                taps.record(layer, a, x)
            if logits is False and layer == stop:
                return None
            if layer == last and isinstance(logits, tuple):
                x = x[logits]  # [P, D]: from here on only the positions asked for
            x = x + block.mlp_output(x)
        x = self.model.norm(x)
        return self.lm_head(x) if head else x
