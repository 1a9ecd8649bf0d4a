"""Qwen3 (dense): Llama with queries and keys normalised per head before rotary. Reference: transformers
`models/qwen3/modeling_qwen3.py`.

The head size is a field of its own (Qwen3-0.6B: 16 heads × 128 = 2048, hidden 1024). B rows, T tokens, D hidden, H
heads, K key/value heads, E head size.
"""

from dataclasses import dataclass

from torch import Tensor

from . import llama
from .attention import LayerCache, attend
from .layers import RMSNorm, Rotation, rotate


@dataclass(frozen=True)
class Config(llama.Config):
    head_dim: int | None = 128  # heads × head_dim need not be hidden_size
    max_position_embeddings: int = 32768
    model_type: str = "qwen3"


class Attention(llama.Attention):
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

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


class Block(llama.Block):
    attention = Attention


class Qwen3(llama.Llama):
    block = Block
