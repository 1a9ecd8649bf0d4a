"""Llama 2 to 3.2, and families that differ from it only in config fields: config, attention, MLP, block, model.

Parameter names are the checkpoint's own. From Llama 3.1 on the rotary frequencies are scaled (type "llama3", `Rope` in
layers.py). Its neighbours: Qwen2 and Seed-OSS (biases on q, k, v alone), Mistral, SmolLM3 (layers without rotary),
Granite (four scalars). Reference: transformers `models/llama/modeling_llama.py`, and `qwen2`, `seed_oss`, `mistral`,
`smollm3`, `granite` beside it.

B rows, T tokens, D hidden, H heads, K key/value heads, E head size, V vocabulary, P chosen positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AfterPrefix, Cache, LayerCache, NoCache, Packed, Prefix, attend
from .layers import Embedding, Head, Linear, RMSNorm, Rope, Rotation, rotate
from .taps import At, Taps


@dataclass(frozen=True)
class Config:
    """The fields of config.json that the code uses."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope(10000.0)
    tie_word_embeddings: bool = False  # 3.2 1B and 3B share head and embedding
    attention_bias: bool = False
    attention_out_bias: bool | None = None  # of o_proj; None: as attention_bias. Qwen2, Seed-OSS
    # for each layer 1: rotary, 0: none; empty: rotary in all. SmolLM3
    no_rope_layers: tuple[int, ...] = ()
    # what embeddings, scores of attention, and each half of a block are multiplied with. Granite
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # None: 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # what logits are divided by
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    model_type: str = "llama"

    def __post_init__(self):
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if self.attention_out_bias is None:
            object.__setattr__(self, "attention_out_bias", self.attention_bias)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
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
        self.o_proj = Linear(H * E, D, bias=config.attention_out_bias)
        self.rotates = not config.no_rope_layers or bool(config.no_rope_layers[layer])
        self.scale = 1.0  # of queries; `attend` divides by sqrt(E)
        if config.attention_multiplier is not None:
            self.scale = config.attention_multiplier * E**0.5

    def forward(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        by_head = (B, T, -1, self.head_dim)
        q = self.q_proj(x).view(by_head).transpose(1, 2)  # [B, H, T, E]
        k = self.k_proj(x).view(by_head).transpose(1, 2)  # [B, K, T, E]
        v = self.v_proj(x).view(by_head).transpose(1, 2)  # [B, K, T, E]
        if self.rotates:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        z = attend(times(q, self.scale), k, v, cache)  # [B, H, T, E]
        return self.o_proj(z.transpose(1, 2).reshape(B, T, -1))  # [B, T, D]


def times(x: Tensor, factor: float) -> Tensor:
    """x * factor; x itself where the factor is 1, as in all families but Granite."""
    return x if factor == 1.0 else x * factor


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention_output(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        """What this block's attention adds to the residual stream x [B, T, D]; the tensor that IA2 aligns."""
        a = self.self_attn(self.input_layernorm(x), rope, cache)
        return times(a, self.residual_multiplier)

    def mlp_output(self, x: Tensor) -> Tensor:
        return times(self.mlp(self.post_attention_layernorm(x)), self.residual_multiplier)


class Llama(nn.Module):
    """Llama with a language-model head. OLMo 2 (olmo2.py) replaces `block`, `norm` and `rotary_dtype`."""

    block: type[nn.Module] = Block
    norm: type[RMSNorm] = RMSNorm  # after the last block
    rotary_dtype: torch.dtype | None = None  # None: the embeddings'

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.model["layers"] = nn.ModuleList(self.block(config, layer) for layer in layers)
        self.model["norm"] = self.norm(config.hidden_size, config.rms_norm_eps)
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
        x = times(x, self.config.embedding_multiplier)
        cache = cache or NoCache()
        if prefix is not None:
            cache = AfterPrefix(prefix, cache)
        positions = cache.positions(x.shape[1], x.device)
        dtype = self.rotary_dtype or x.dtype
        rope = self.config.rope.at(positions, self.config.head_dim, dtype)
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
        x = times(self.model.norm(x), 1 / self.config.logits_scaling)
        return self.lm_head(x) if head else x
