"""OLMo 2, as one reads it: config, attention, block, model; the MLP is Qwen3's. Names are the checkpoint's own.

What sets it apart from Llama: each half of a block is normalised when it is done, not before it begins, so that the
norm's output is what is added to the stream; queries and keys are normalised over all heads together, before rotary.
Norms and rotary are computed in float32 and then cast. Reference: transformers `models/olmo2/modeling_olmo2.py`.

B rows, T tokens, D hidden, H heads, K key/value heads, E head size, V vocabulary, P chosen positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import AfterPrefix, Cache, LayerCache, NoCache, Packed, Prefix, attend
from .layers import Embedding, Head, Linear, RMSNorm, Rope, Rotation, rotate
from .qwen3 import MLP
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
    head_dim: int | None = None  # None: hidden_size / heads
    rms_norm_eps: float = 1e-5
    rope: Rope = Rope(10000.0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = 2048
    model_type: str = "olmo2"

    def __post_init__(self):
        heads = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)


class Float32RMSNorm(RMSNorm):
    """As in the other families, but scaled in float32, before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


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
        self.q_norm = Float32RMSNorm(H * E, config.rms_norm_eps)
        self.k_norm = Float32RMSNorm(K * E, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        B, T, _ = x.shape
        by_head = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x)).view(by_head).transpose(1, 2)
        k = self.k_norm(self.k_proj(x)).view(by_head).transpose(1, 2)
        v = self.v_proj(x).view(by_head).transpose(1, 2)  # [B, K, T, E]
        q = rotate(q, *rope).to(v.dtype)  # [B, H, T, E]
        k = rotate(k, *rope).to(v.dtype)  # [B, K, T, E]
        z = attend(q, k, v, cache)  # [B, H, T, E]
        return self.o_proj(z.transpose(1, 2).reshape(B, T, -1))  # [B, T, D]


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_output(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        """What this block's attention adds to the residual stream x [B, T, D]; the tensor that IA2 aligns."""
        return self.post_attention_layernorm(self.self_attn(x, rope, cache))

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(self.mlp(x))


class Olmo2(nn.Module):
    """OLMo 2 with a language-model head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.model["layers"] = nn.ModuleList(blocks)
        self.model["norm"] = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        head: Callable | None = None,
    ) -> Tensor | None:
        """Logits for right-padded `ids`; arguments and result are those of `Llama.forward`."""
        x = ids if ids.is_floating_point() else self.model.embed_tokens(ids)  # [B, T, D]
        cache = cache or NoCache()
        if prefix is not None:
            cache = AfterPrefix(prefix, cache)
        positions = cache.positions(x.shape[1], x.device)
        rope = self.config.rope.at(positions, self.config.head_dim, torch.float32)
        last = len(self.model.layers) - 1
        stop = last if taps is None else taps.last(last + 1)
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
        if head is None:
            return self.lm_head(x)
        return head(x, self.lm_head.weight)
