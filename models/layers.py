"""What all families share unchanged: norm, linear map with a place for an adapter, rotary embedding.

B rows, T tokens, D hidden, H heads, E head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of `Rope.scaling`
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
Rotation = tuple[Tensor, Tensor]  # cos and signed sin of positions, [(B, 1,) T, E] each


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; normalised in float32, cast back, then scaled (as Hugging Face)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return Normalise.apply(x, self.weight, self.eps)


class Normalise(torch.autograd.Function):
    """RMSNorm with its backward pass written out: half the time of autograd's own on a CPU, keeps less."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        D = x.shape[-1]
        wide = x.float()
        mean_square = torch.linalg.vecdot(wide, wide).div_(D)
        inverse = mean_square.add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        D = x.shape[-1]
        wide = x.float()
        scaled = (grad * weight).float()
        dot = torch.linalg.vecdot(scaled, wide)[..., None]
        along = dot * (inverse**3 / -D)
        grad_x = scaled.mul_(inverse).addcmul_(wide, along).to(x.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normalised = (wide * inverse).to(x.dtype)
            grad_weight = (grad * normalised).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None


class Linear(nn.Linear):
    """nn.Linear with a place for an adapter: `adapted(base, x)` is called instead of the frozen map `base(x)`."""

    adapted: Callable | None = None  # no parameter: names stay the checkpoint's own

    def forward(self, x: Tensor) -> Tensor:
        if self.adapted is None:
            return self.base(x)
        return self.adapted(self.base, x)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding without first weights: they come from a checkpoint, or from whoever trains from nothing."""

    def reset_parameters(self) -> None:
        """No draw: on the meta device it would import torch's compiler, a second at every start."""


class Head(nn.Linear):
    """The map to logits, which no adapter changes."""

    def forward(self, x: Tensor) -> Tensor:
        few_tokens = x.dim() == 2 and 6 <= len(x) <= 16
        if few_tokens and x.device.type == "cpu":
            return (self.weight @ x.mT).mT  # a batch that decodes: up to twice as fast this way
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta`; `scaling` holds the four numbers of type "llama3" (from Llama 3.1 on) or None."""

    theta: float
    scaling: dict | None = None

    def inverse_frequencies(self, head_dim: int, device) -> Tensor:
        """Radians per position of each pair of coordinates, float32 [E/2]; as `_compute_llama3_parameters` upstream."""
        pairs = torch.arange(0, head_dim, 2, device=device).float()
        inverse = 1.0 / self.theta ** (pairs / head_dim)
        if self.scaling is None:
            return inverse
        factor, low, high, context = (self.scaling[name] for name in LLAMA3)
        turns = context * inverse / (2 * math.pi)  # full turns within the original context
        smooth = (turns - low) / (high - low)
        smooth = smooth.clamp(0, 1)  # 0: slowed down by `factor`; 1: left as it is
        return inverse * (smooth + (1 - smooth) / factor)

    def at(self, positions: Tensor, head_dim: int, dtype: torch.dtype) -> Rotation:
        """What `rotate` needs for positions [T] or [B, T]: cos and signed sin, each [(B, 1,) T, E] in `dtype`."""
        frequencies = self.inverse_frequencies(head_dim, positions.device)
        angles = positions[..., None].float() * frequencies
        if positions.dim() == 2:
            angles = angles[:, None]  # for all heads
        cos = angles.cos().to(dtype)
        sin = angles.sin().to(dtype)
        both_cos = torch.cat((cos, cos), -1)
        both_sin = torch.cat((-sin, sin), -1)
        return both_cos, both_sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, E], split-halves layout: coordinate i pairs with i + E/2."""
    half = x.shape[-1] // 2
    partner = x.roll(half, -1)
    return x * cos + partner * sin
