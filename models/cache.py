"""Keys and values of earlier tokens, and attention over them.

`Cache` grows token by token, `Prefix` stands before every row, `Packed` keeps the documents of a row apart; each tells
a layer through a `LayerCache` what its tokens see. B rows, T new tokens, H heads, K key/value heads, E head size,
S earlier keys, G groups of rows that share a prefix.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .shard import Weight, is_split, local

Past = tuple[Tensor, Tensor]  # a prefix's keys and values of one layer, [G, K, S, E] each


class LayerCache(NamedTuple):
    """A cache's part in one layer: what a row's tokens see, and where their keys and values go."""

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

    One [G, K, S, E] tensor of each a layer. Rows come in G equal groups, each group sharing one prefix (G = 1: all rows
    share it). Filled by running the model with `cache=Prefix()`; attached to the graph.
    """

    def __init__(self, layers: Iterable[Sequence[Tensor]] = ()):
        self.layers = [list(pair) for pair in layers]  # keys, values

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
    With `branches` all documents go on from document 0 of their row, and see that too: what labels need.
    """

    def __init__(self, documents: Tensor, positions: Tensor, branches: bool = False):
        self.places = positions
        same = documents[:, None, :, None] == documents[:, None, None, :]
        self.mask = (same | (documents == 0)[:, None, None, :] if branches else same).tril()  # [B, 1, T, T]

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

    def __init__(self, config, rows: int, capacity: int, like: Weight, static: bool = False):
        """Room for `capacity` tokens of each row, in the dtype and on the device of `like`, a weight of the model."""
        ranks = like.device_mesh.size() if is_split(like) else 1  # of a split one: each keeps its heads
        shape = (rows, config.num_key_value_heads // ranks, capacity, config.head_dim)
        self.keys = [local(like).new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.filled, self.static = 0, static  # slots that any row may have written

    def positions(self, tokens: int, device) -> Tensor:
        """Where the next `tokens` tokens of each row go: [B, T] int64."""
        self.slots, fresh = self.lengths[:, None] + torch.arange(tokens, device=device), self.filled == 0
        capacity = self.keys[0].shape[2]
        self.filled = capacity if self.static and not fresh else self.filled + tokens
        assert self.filled <= capacity, f"the cache holds {capacity} tokens a row, not {self.filled}"
        seen = torch.arange(self.filled, device=device) <= self.slots[..., None]
        self.mask = None if fresh else seen[:, None]  # [B, 1, T, S]
        return self.slots

    def layer(self, layer: int) -> LayerCache:
        stored = self.keys[layer][:, :, : self.filled], self.values[layer][:, :, : self.filled]
        return LayerCache(self.mask, stored, self.slots)

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
    if past is None and mask is not None and q.is_cuda:
        return folded(q, k, v, mask)
    if past is None and q.is_cuda and q.dtype == torch.float32:
        return expanded(q, k, v)
    if past is None:  # right padding needs no mask: a real token never sees the padding behind it
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    k0, v0 = past  # one softmax over these and own keys; they are multiplied once a group, never copied
    (B, H, T, E), K, (G, _, S, _) = q.shape, k.shape[1], k0.shape
    q = q.reshape(B, K, H // K * T, E) * E**-0.5  # the heads that share a key/value head stand together
    by_group = q.view(G, B // G, K, -1, E).transpose(1, 2).reshape(G, K, -1, E)
    before = (by_group @ k0.mT).view(G, K, B // G, -1, S).transpose(1, 2).reshape(B, H, T, S)
    own = (q @ k.mT).view(B, H, T, -1)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = torch.cat((before, own.masked_fill(~mask, -torch.inf)), -1)
    before, own = scores.softmax(-1, dtype=torch.float32).to(q.dtype).split((S, own.shape[-1]), -1)
    by_group = before.reshape(G, B // G, K, -1, S).transpose(1, 2).reshape(G, K, -1, S)
    z = (by_group @ v0).view(G, K, B // G, -1, E).transpose(1, 2).reshape(B, H, T, E)
    return z + (own.reshape(B, K, -1, own.shape[-1]) @ v).view(B, H, T, E)


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention with the heads that share a key/value head as further rows of it.

    A GPU's fused kernel that takes a mask refuses `enable_gqa`, and PyTorch would fall back to whole score matrices.
    """
    K, shared = k.shape[1], q.shape[1] // k.shape[1]
    rows = q.reshape(q.shape[0], K, -1, q.shape[-1])  # [B, K, H / K * T, E]
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(1, 1, shared, 1)).view(q.shape)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with a copy of each key/value head for every head that shares it.

    A GPU's fused kernel that takes float32 refuses `enable_gqa`, and PyTorch would fall back to whole score matrices.
    """
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)  # [B, H, T, E]
    v = v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
