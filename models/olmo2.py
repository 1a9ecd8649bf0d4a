"""OLMo 2: Llama with other norms. Reference: transformers `models/olmo2/modeling_olmo2.py`.

Each half of a block is normalised when it is done, not before it begins, so that the norm's output is what is added to
the stream. Queries and keys are normalised over all heads together, before rotary. Norms and rotary are computed in
float32 and then cast. B rows, T tokens, D hidden, H heads, K key/value heads, E head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import llama
from .attention import LayerCache, attend
from .layers import RMSNorm, Rotation, rotate


@dataclass(frozen=True)
class Config(llama.Config):
    rms_norm_eps: float = 1e-5
    model_type: str = "olmo2"


class Float32RMSNorm(RMSNorm):
    """As in the other families, but scaled in float32, before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(llama.Attention):
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_norm = Float32RMSNorm(queries, config.rms_norm_eps)
        self.k_norm = Float32RMSNorm(keys, config.rms_norm_eps)

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
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = llama.MLP(config)
        self.post_feedforward_layernorm = Float32RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_output(self, x: Tensor, rope: Rotation, cache: LayerCache) -> Tensor:
        """What this block's attention adds to the residual stream x [B, T, D]; the tensor that IA2 aligns."""
        return self.post_attention_layernorm(self.self_attn(x, rope, cache))

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.post_feedforward_layernorm(self.mlp(x))


class Olmo2(llama.Llama):
    block = Block
    norm = Float32RMSNorm
    rotary_dtype = torch.float32
