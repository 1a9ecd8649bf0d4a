"""What both families share to the letter: norm, linear with a seam for adapters, rotary, attention, caches, taps, config reading.

Shape letters: B rows, T tokens, P chosen positions, L layers, D hidden, H heads, K key/value heads, E head size,
S earlier keys, G groups of rows that share a prefix, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ia2mini import UsageError

At = tuple[Tensor, Tensor]  # (rows, columns), int64 [P] each: positions in a [B, T] batch
Past = tuple[Tensor, Tensor]  # a prefix's keys and values of one layer, [G, K, S, E] each


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; normalised in float32, cast back, then scaled (Hugging Face's order)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return Normalise.apply(x, self.weight, self.eps)


class Normalise(torch.autograd.Function):
    """RMSNorm with its backward pass written out: half the time of autograd's own on a CPU, and nothing kept but x and 1 / rms."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, scaled = x.float(), (grad * weight).float()
        along = torch.linalg.vecdot(scaled, wide)[..., None] * (inverse**3 / -x.shape[-1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * inverse).to(x.dtype)).flatten(0, -2).sum(0)
        return scaled.mul_(inverse).addcmul_(wide, along).to(x.dtype), grad_weight, None


class Linear(nn.Linear):
    """nn.Linear with a seam: an adapter, `adapter(base, x)`, may change what goes into the frozen map `base` and what comes out.

    The seam is a plain attribute, so parameter names stay the checkpoint's own and the frozen weight is never touched.
    """

    adapter = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.adapter is None else self.adapter(super().forward, x)


class Embedding(nn.Embedding):
    """nn.Embedding without first weights: they come from a checkpoint, or from whoever trains from nothing."""

    def reset_parameters(self) -> None:
        """No draw: on the meta device it would import torch's compiler, a second at every start."""


class Head(nn.Linear):
    """The map to logits, without a seam."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == "cpu" and x.dim() == 2 and 6 <= len(x) <= 16
        ):  # a batch that decodes: MKL is up to twice as fast so
            return (self.weight @ x.mT).mT
        return super().forward(x)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta`; `scaling` holds the four numbers of type "llama3" (Llama 3.1 and on) or is None."""

    theta: float
    scaling: dict | None = None

    def inverse_frequencies(self, head_dim: int, device) -> Tensor:
        """Radians per position of each pair of coordinates, float32 [E/2] (as transformers' `_compute_llama3_parameters`)."""
        inv = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
        if self.scaling is None:
            return inv
        factor, low, high, context = (
            self.scaling[k]
            for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        turns = context * inv / (2 * math.pi)  # full turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slowed down by `factor`; 1: left as it is
        return inv * (smooth + (1 - smooth) / factor)

    def at(self, positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rotate` needs for positions [T] or [B, T]: cos and signed sin, each [(B, 1,) T, E] in `dtype`."""
        angles = positions[..., None].float() * self.inverse_frequencies(head_dim, positions.device)
        angles = angles if positions.dim() == 1 else angles[:, None]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, E], split-halves layout: coordinate i pairs with i + E/2."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class LayerCache(NamedTuple):
    """A cache's part in one layer: what a row's tokens see of one another and of earlier ones, and where their keys and values go."""

    mask: Tensor | None = None  # [B, 1, T, S], True where seen; None: each sees its own row up to itself
    stored: Past | None = None  # [B, K, S, E] each, written into …
    slots: Tensor | None = None  # … at these places [B, T]
    kept: list[Tensor] | None = None  # is given keys and values as they are

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put new k, v [B, K, T, E] where they go; the keys and values to attend to."""
        if self.kept is not None:
            self.kept.extend((k, v))
        if self.stored is None:
            return k, v
        index = self.slots[:, None, :, None].expand_as(k)
        stored = self.stored[0].scatter_(2, index, k), self.stored[1].scatter_(2, index, v)
        return (k, v) if self.mask is None else stored


class Prefix:
    """Keys and values that stand before every row's own tokens: demonstrations computed once, or virtual tokens.

    One [G, K, S, E] tensor of each a layer. Rows come in G equal groups, each group sharing one prefix (G = 1: all rows share it).
    Filled by running the model with `cache=Prefix()`; attached to the graph.
    """

    def __init__(self, layers: Iterable[Sequence[Tensor]] = ()):
        self.layers = list(layers)  # keys, values

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    def positions(self, tokens: int, device) -> Tensor:
        return torch.arange(tokens, device=device)

    def past(self, layer: int) -> Past:
        k, v, *_ = self.layers[layer]  # a checkpointed block computes them once more
        return k, v

    def layer(self, layer: int) -> LayerCache:
        assert layer == len(self.layers), "a prefix is filled by one pass over all layers"
        self.layers.append([])
        return LayerCache(kept=self.layers[-1])


class Packed:
    """Passed as `cache`, it keeps apart documents that stand one after another in a row: each sees itself alone and counts from 0.

    `documents` [B, T]: which document of its row a token belongs to; `positions` [B, T]: its place there, both int64.
    """

    def __init__(self, documents: Tensor, positions: Tensor):
        self.places = positions
        self.mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()  # [B, 1, T, T]

    def positions(self, tokens: int, device) -> Tensor:
        return self.places

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(self.mask)


class Cache:
    """Keys and values of a batch that grows token by token; rows may hold prompts of different length.

    Prompts are right-padded. Row b's next token goes to slot `lengths[b]`, over any padding there, and sees slots up to its own.
    After each call of the model the caller says how many of the new tokens were real: `cache.lengths += n`. With `static`, every call
    but the first attends to all slots under a mask: shapes stay the same, so that it can be recorded.
    """

    def __init__(self, config, rows: int, capacity: int, dtype: torch.dtype, device, static: bool = False):
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.filled, self.static = 0, static  # slots that any row may have written

    def positions(self, tokens: int, device) -> Tensor:
        """Where the next `tokens` tokens of each row go: [B, T] int64."""
        self.slots, fresh = self.lengths[:, None] + torch.arange(tokens, device=device), self.filled == 0
        capacity = self.keys[0].shape[2]
        self.filled = capacity if self.static and not fresh else self.filled + tokens
        assert self.filled <= capacity, f"the cache holds {capacity} tokens a row, not {self.filled}"
        self.mask = (
            None if fresh else (torch.arange(self.filled, device=device) <= self.slots[..., None])[:, None]
        )  # [B, 1, T, S]
        return self.slots

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(
            self.mask, (self.keys[layer][:, :, : self.filled], self.values[layer][:, :, : self.filled]), self.slots
        )

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (int64 indices), in this order."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, past: Past | None) -> Tensor:
    """Grouped-query attention of q [B, H, T, E] over k, v [B, K, T, E], cached keys and a shared prefix: [B, H, T, E].

    Right padding needs no mask: a real token never sees the padding behind it.
    """
    mask = None
    if cache is not None:
        k, v = cache.update(k, v)
        mask = cache.mask
    if past is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return attend_with_prefix(q, k, v, mask, *past)


def attend_with_prefix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k0: Tensor, v0: Tensor) -> Tensor:
    """One softmax over prefix k0, v0 [G, K, S, E] and own keys; the prefix is multiplied once a group, never copied per row."""
    (B, H, T, E), K, (G, _, S, _) = q.shape, k.shape[1], k0.shape
    q = q.reshape(B, K, H // K * T, E) * E**-0.5  # the heads that share a key/value head stand together
    by_group = q.view(G, B // G, K, -1, E).transpose(1, 2).reshape(G, K, -1, E)
    before = (by_group @ k0.mT).view(G, K, B // G, -1, S).transpose(1, 2).reshape(B, H, T, S)
    own = (q @ k.mT).view(B, H, T, -1)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    weights = torch.cat((before, own.masked_fill(~mask, -torch.inf)), -1).softmax(-1, dtype=torch.float32).to(q.dtype)
    before, own = weights.split((S, own.shape[-1]), -1)
    by_group = before.reshape(G, B // G, K, -1, S).transpose(1, 2).reshape(G, K, -1, S)
    z = (by_group @ v0).view(G, K, B // G, -1, E).transpose(1, 2).reshape(B, H, T, E)
    return z + (own.reshape(B, K, -1, own.shape[-1]) @ v).view(B, H, T, E)


def wrap_blocks(model: nn.Module, *wraps: Callable) -> None:
    """Put `wraps`, the first one innermost, around both halves of every block; each half stands in one function for all layers.

    `compiled` fuses what is small in them (one compilation, whatever layer and length), `checkpointed` trades time for memory.
    """
    for half in ("attention_output", "mlp_output"):
        function = getattr(type(model.model.layers[0]), half)
        for wrap in wraps:
            function = wrap(function)
        for block in model.model.layers:
            setattr(block, half, partial(function, block))


def compiled(function: Callable, **options) -> Callable:
    """`function` of a block through torch.compile."""
    torch._dynamo.config.recompile_limit = 64  # with and without gradients, adapter, mask, cache and prefix
    torch._dynamo.config.suppress_errors = not options.get(
        "fullgraph"
    )  # where no compiler works it runs as it is, with a warning
    return torch.compile(function, dynamic=True, **options)


def checkpointed(function: Callable) -> Callable:
    """`function` that keeps only its inputs for the backward pass, where it is computed again."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


class Taps:
    """Asks a forward pass for attention outputs: what each attention block adds to the residual stream (after W_O, before the add).

    `at`: (rows, cols), two int64 vectors of length P, or None for every position. `layers`: layer indices, or None for all.
    After the pass `stack()` is [L, P, D] in the order given ([L, B, T, D] without `at`), attached to the graph.
    """

    def __init__(self, at: At | None = None, layers: list[int] | None = None):
        self.at, self.layers = at, layers
        self.outputs: dict[int, Tensor] = {}

    def record(self, layer: int, attention_output: Tensor) -> None:
        """Keep layer `layer`'s attention output [B, T, D] at the positions asked for, if the layer was asked for."""
        if self.layers is None or layer in self.layers:
            self.outputs[layer] = attention_output if self.at is None else attention_output[self.at]

    def last(self, layers: int) -> int:
        """The last layer asked for, in a model of `layers` layers."""
        if self.layers is None:
            return layers - 1
        if not self.layers or not all(0 <= i < layers for i in self.layers):
            raise UsageError(f"taps on layers {self.layers}: give layer indices from 0 to {layers - 1}")
        return max(self.layers)

    def each(self) -> list[Tensor]:
        """The attention outputs, a tensor a layer, in the order of `layers`."""
        return [self.outputs[i] for i in (self.layers or sorted(self.outputs))]

    def stack(self) -> Tensor:
        return torch.stack(self.each())


def read_config(cls, raw: dict, where: str):
    """Fill a family's Config dataclass from a Hugging Face config dict, in either spelling; refuse by name what we do not compute.

    Raises UsageError naming `where` and the field for a missing field or an unsupported value.
    """

    def refuse(name: str, value, supported: str):
        raise UsageError(f"{where}: {name} = {value!r} is not supported (supported: {supported})")

    raw = dict(raw)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 | the hub until now
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()):
        refuse("rope_scaling type", kind, "default, llama3")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        refuse("partial_rotary_factor", rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")), "1.0")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", raw["hidden_act"], "silu")
    if raw.get("quantization_config"):
        refuse("quantization_config", raw["quantization_config"].get("quant_method", "?"), "unquantised checkpoints")
    sliding = raw.get("use_sliding_window") or any(kind != "full_attention" for kind in raw.get("layer_types") or ())
    if sliding:
        refuse("sliding-window attention", True, "use_sliding_window = false, layer_types all full_attention")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    scaling = None
    if kind == "llama3":
        needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [k for k in needed if k not in rope]:
            raise UsageError(f"{where}: rope_scaling of type llama3 lacks {', '.join(missing)}")
        scaling = {k: rope[k] for k in needed}
    raw["rope"] = Rope(float(theta), scaling)
    required = [f.name for f in fields(cls) if f.default is MISSING]
    if missing := [name for name in required if raw.get(name) is None]:
        raise UsageError(f"{where}: needed field{'s' * (len(missing) > 1)} missing: {', '.join(missing)}")
    return cls(**{f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None})
