"""Keys and values of earlier tokens, and attention over them.

`Cache` grows token by token, `Prefix` stands before every row, `Packed` keeps the documents of a row apart; each tells
a layer through a `LayerCache` what its tokens see. B rows, T new tokens, H heads, K key/value heads, E head size,
S earlier keys.
"""

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 256  # tokens of a row
Past = tuple[Tensor, Tensor]  # a prefix's keys and values of one layer, [1, K, S, E] each


class LayerCache(NamedTuple):
    """A cache's part in one layer: what a row's tokens see, and where their keys and values go."""

    # [B, 1, T, S], True where seen; None: each sees its own row up to itself
    mask: Tensor | None = None
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
        keys, values = self.stored
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return (k, v) if self.mask is None else (keys, values)


class Prefix:
    """Keys and values of the tokens that every row begins with: demonstrations, computed once.

    One [1, K, S, E] tensor of each a layer, shared by all rows. Filled by running the model on one row of ids [1, S]
    with `cache=Prefix()`; attached to the graph.
    """

    def __init__(self):
        self.layers: list[list[Tensor]] = []  # of each layer keys and values

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
    """Passed as `cache`, it keeps apart documents that stand one after another in a row: each sees itself alone.

    `documents` [B, T]: which document of its row a token belongs to; `positions` [B, T]: its place there, both int64.
    With `sees` [n, n] document i sees document j where sees[i, j] is True: what a tree of labels needs, whose branches
    go on from document 0 and from one another.
    """

    def __init__(self, documents: Tensor, positions: Tensor, sees: Tensor | None = None):
        self.documents = documents
        self.places = positions
        self.sees = sees

    @cached_property
    def mask(self) -> Tensor:
        """[B, 1, T, T], True where a token sees another."""
        asking = self.documents[:, None, :, None]
        asked = self.documents[:, None, None, :]
        seen = asking == asked if self.sees is None else self.sees[asking, asked]
        return seen.tril()

    def positions(self, tokens: int, device) -> Tensor:
        return self.places

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(self.mask)


class Cache:
    """Keys and values of a batch that grows token by token; rows may hold prompts of different length.

    Prompts are right-padded. Row b's next token goes to slot `lengths[b]`, over any padding there, and sees slots up to
    its own. After each call of the model the caller says how many of the new tokens were real: `cache.lengths += n`.
    With `static`, every call but the first attends to all slots under a mask: shapes stay, so it can be captured.
    """

    def __init__(self, config, rows: int, capacity: int, like: Tensor, static: bool = False):
        """Room for `capacity` tokens of each row, in the dtype and on the device of `like`, a weight of the model."""
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.filled, self.static = 0, static  # slots that any row may have written

    def positions(self, tokens: int, device) -> Tensor:
        """Where the next `tokens` tokens of each row go: [B, T] int64."""
        fresh = self.filled == 0
        capacity = self.keys[0].shape[2]
        self.filled = capacity if self.static and not fresh else self.filled + tokens
        assert self.filled <= capacity, (
            f"the cache holds {capacity} tokens a row, not {self.filled}"
        )
        self.slots = self.lengths[:, None] + torch.arange(tokens, device=device)
        self.mask = None
        if not fresh:
            seen = torch.arange(self.filled, device=device) <= self.slots[..., None]
            self.mask = seen[:, None]  # [B, 1, T, S]
        return self.slots

    def layer(self, layer: int) -> LayerCache:
        keys = self.keys[layer][:, :, : self.filled]
        values = self.values[layer][:, :, : self.filled]
        return LayerCache(self.mask, (keys, values), self.slots)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (int64 indices), in this order."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, past: Past | None) -> Tensor:
    """Grouped-query attention of q [B, H, T, E] over k, v [B, K, T, E], cached keys and a prefix: [B, H, T, E]."""
    mask = cache and cache.mask
    if cache is not None:
        k, v = cache.update(k, v)
    if past is not None:
        return attend_behind(q, k, v, mask, *past)
    if mask is not None and q.is_cuda:
        return folded(q, k, v, mask)
    if q.is_cuda and q.dtype == torch.float32:
        return expanded(q, k, v)
    if q.requires_grad and slow_backward(q):
        return written_out(q, k, v, mask)
    # right padding needs no mask: a real token never sees the padding behind it
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def slow_backward(q: Tensor) -> bool:
    """Whether the fused kernel's backward pass takes longer than `written_out`: short rows of a CPU's half precision.

    Longer rows would keep too many scores.
    """
    return q.device.type == "cpu" and q.dtype != torch.float32 and q.shape[2] <= SHORT


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `attend`, in three operations that autograd takes back one by one: scores, softmax, sum of values."""
    B, H, T, E = q.shape
    K = k.shape[1]
    # the heads that share a key/value head stand together
    scores = (q.reshape(B, K, H // K * T, E) * E**-0.5) @ k.mT
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    shares = (scores.view(B, H, T, -1) + hidden).softmax(-1)  # summed in float32
    return (shares.view(B, K, H // K * T, -1) @ v).view(B, H, T, E)


def attend_behind(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k0: Tensor, v0: Tensor
) -> Tensor:
    """As `attend`, behind a prefix with keys and values k0, v0 [1, K, S, E]: one softmax over these and own keys.

    All rows share the prefix: its keys and values are multiplied with all of them at once, never copied.
    """
    B, H, T, E = q.shape
    K, S = k0.shape[1:3]
    # the heads that share a key/value head stand together
    q = q.reshape(B, K, H // K * T, E) * E**-0.5
    before = all_rows(q) @ k0[0].mT  # [K, B * H / K * T, S]
    before = by_row(before, B).reshape(B, H, T, S)
    own = (q @ k.mT).view(B, H, T, -1)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = torch.cat((before, own.masked_fill(~mask, -torch.inf)), -1)
    shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    before, own = shares.split((S, own.shape[-1]), -1)
    z = all_rows(before.reshape(B, K, -1, S)) @ v0[0]  # [K, B * H / K * T, E]
    z = by_row(z, B).reshape(B, H, T, E)
    return z + (own.reshape(B, K, -1, own.shape[-1]) @ v).view(B, H, T, E)


def all_rows(x: Tensor) -> Tensor:
    """x [B, K, n, E] as [K, B * n, E]."""
    return x.transpose(0, 1).flatten(1, 2)


def by_row(x: Tensor, rows: int) -> Tensor:
    """x [K, rows * n, E] as [rows, K, n, E]."""
    return x.unflatten(1, (rows, -1)).transpose(0, 1)


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention with the heads that share a key/value head as further rows of it.

    A GPU's fused kernel that takes a mask refuses `enable_gqa`, and PyTorch would fall back to whole score matrices.
    """
    K, shared = k.shape[1], q.shape[1] // k.shape[1]
    rows = q.reshape(q.shape[0], K, -1, q.shape[-1])  # [B, K, H / K * T, E]
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(1, 1, shared, 1)).view(
        q.shape
    )


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with a copy of each key/value head for every head that shares it.

    A GPU's fused kernel that takes float32 refuses `enable_gqa`, and PyTorch would fall back to whole score matrices.
    """
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)  # [B, H, T, E]
    v = v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
