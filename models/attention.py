"""Keys and values of earlier tokens, and attention over them.

`Cache` grows token by token, `Prefix` stands before every row, `Packed` keeps the documents of a row apart, `NoCache`
does none of this. Each tells a layer through a `LayerCache` what its tokens see. B rows, T new tokens, H heads,
K key/value heads, E head size, S earlier keys.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 256  # tokens of a row, up to which `written_out` trains faster
SCORES = 2**28  # attention scores that are held at once, where rows come after a prefix
KeysAndValues = tuple[Tensor, Tensor]  # of one layer, [B, K, S, E] each


class LayerCache(NamedTuple):
    """A cache's part in one layer: what a row's tokens see, and where their keys and values go."""

    # [B, 1, T, S], True where seen; None: each sees its own row up to itself
    mask: Tensor | None = None
    stored: KeysAndValues | None = None  # new ones are written into these …
    slots: Tensor | None = None  # … at these places [B, T]
    kept: list[Tensor] | None = None  # new keys and values are appended to it
    prefix: KeysAndValues | None = None  # [1, K, S, E] each, seen by all rows

    def update(self, k: Tensor, v: Tensor) -> KeysAndValues:
        """Put new k, v [B, K, T, E] where they go; the keys and values to attend to."""
        if self.kept is not None:
            self.kept.extend((k, v))
        if self.stored is None:
            return k, v
        index = self.slots[:, None, :, None].expand_as(k)
        keys, values = self.stored
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        if self.mask is None:  # the first call: nothing was stored before
            return k, v
        return keys, values


class NoCache:
    """Rows that begin at their first token and are read at once."""

    def positions(self, tokens: int, device) -> Tensor:
        return torch.arange(tokens, device=device)

    def layer(self, layer: int) -> LayerCache:
        return LayerCache()


class Prefix(NoCache):
    """Keys and values of the tokens that every row begins with: demonstrations, computed once.

    Per layer one [1, K, S, E] tensor of keys and one of values, shared by all rows. Fill it by running the model on one
    row of ids [1, S] with it as `cache`. Gradients flow through it.
    """

    def __init__(self):
        self.layers: list[list[Tensor]] = []  # of each layer keys and values

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    def past(self, layer: int) -> KeysAndValues:
        k, v, *_ = self.layers[layer]  # a checkpointed block computes them once more
        return k, v

    def layer(self, layer: int) -> LayerCache:
        assert layer == len(self.layers), "a prefix is filled by one pass over all layers"
        self.layers.append([])
        return LayerCache(kept=self.layers[-1])


class AfterPrefix:
    """A cache whose rows all come after a prefix."""

    def __init__(self, prefix: Prefix, cache: "Cache | Packed | NoCache"):
        self.prefix = prefix
        self.cache = cache

    def positions(self, tokens: int, device) -> Tensor:
        return self.prefix.length + self.cache.positions(tokens, device)

    def layer(self, layer: int) -> LayerCache:
        own = self.cache.layer(layer)
        return own._replace(prefix=self.prefix.past(layer))


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

    def to(self, send: Callable[[Tensor], Tensor]) -> "Packed":
        """The same on another device; `send` copies one tensor there."""
        sees = None if self.sees is None else send(self.sees)
        return Packed(send(self.documents), send(self.places), sees)

    @cached_property
    def mask(self) -> Tensor:
        """[B, 1, T, T], True where a token sees another."""
        asking = self.documents[:, None, :, None]
        asked = self.documents[:, None, None, :]
        if self.sees is None:
            seen = asking == asked
        else:
            seen = self.sees[asking, asked]
        return seen.tril()

    def positions(self, tokens: int, device) -> Tensor:
        return self.places

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(self.mask)


class Cache:
    """Keys and values of a batch that grows token by token; rows may hold prompts of different length.

    Prompts are right-padded. Row b's next token goes to slot `lengths[b]`, over any padding there, and sees slots up to
    its own. After each call of the model the caller says how many of the new tokens were real: `cache.lengths += n`.
    With `fixed_shape`, every call but the first attends to all slots under a mask, so that it can be recorded.
    """

    def __init__(self, config, rows: int, capacity: int, like: Tensor, fixed_shape: bool = False):
        """Room for `capacity` tokens of each row, in the dtype and on the device of `like`, a weight of the model."""
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [like.new_zeros(shape) for _ in layers]
        self.values = [like.new_zeros(shape) for _ in layers]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.filled = 0  # slots that any row may have written
        self.visible = 0  # slots that attention reads
        self.fixed_shape = fixed_shape

    def positions(self, tokens: int, device) -> Tensor:
        """Reserve slots for the next `tokens` tokens of each row, and set their mask: the slots, [B, T] int64."""
        is_first = self.filled == 0
        capacity = self.keys[0].shape[2]
        self.filled += tokens
        full = f"the cache holds {capacity} tokens a row, not {self.filled}"
        assert self.filled <= capacity, full
        self.visible = self.filled
        if self.fixed_shape and not is_first:
            self.visible = capacity
        new = torch.arange(tokens, device=device)
        self.slots = self.lengths[:, None] + new
        self.mask = None
        if not is_first:
            earlier = torch.arange(self.visible, device=device)
            seen = earlier <= self.slots[..., None]
            self.mask = seen[:, None]  # [B, 1, T, S]
        return self.slots

    def layer(self, layer: int) -> LayerCache:
        keys = self.keys[layer][:, :, : self.visible]
        values = self.values[layer][:, :, : self.visible]
        return LayerCache(self.mask, (keys, values), self.slots)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (int64 indices), in this order."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    """Grouped-query attention of q [B, H, T, E] over k, v [B, K, T, E] and what the cache has: [B, H, T, E]."""
    k, v = cache.update(k, v)
    mask = cache.mask
    if cache.prefix is not None:
        return attend_after_prefix(q, k, v, mask, cache.prefix)
    if mask is not None and q.is_cuda:
        return heads_as_rows(q, k, v, mask)
    if q.is_cuda and q.dtype == torch.float32:
        return expanded(q, k, v)
    if q.requires_grad and slow_backward(q):
        return written_out(q, k, v, mask)
    # right padding needs no mask: a real token never sees the padding after it
    causal = mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def slow_backward(q: Tensor) -> bool:
    """Whether the fused kernel's backward pass takes longer than `written_out`: short rows of a CPU's half precision.

    Longer rows would keep too many scores.
    """
    half_on_cpu = q.device.type == "cpu" and q.dtype != torch.float32
    return half_on_cpu and q.shape[2] <= SHORT


def causal_mask(q: Tensor) -> Tensor:
    """[T, T], True where a token of q [B, H, T, E] sees another."""
    T = q.shape[2]
    everything = torch.ones(T, T, dtype=torch.bool, device=q.device)
    return everything.tril()


def by_key_head(x: Tensor, K: int) -> Tensor:
    """x [B, H, T, n] as [B, K, H / K * T, n]: the heads that share a key/value head stand together."""
    B, _, _, n = x.shape
    return x.reshape(B, K, -1, n)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `attend`, in three operations that autograd differentiates one by one: scores, softmax, sum of values."""
    B, H, T, E = q.shape
    K = k.shape[1]
    if mask is None:
        mask = causal_mask(q)
    scaled = by_key_head(q, K) * E**-0.5
    scores = scaled @ k.mT
    zeros = torch.zeros_like(mask, dtype=q.dtype)
    bias = zeros.masked_fill(~mask, -torch.inf)
    scores = scores.view(B, H, T, -1) + bias
    weights = scores.softmax(-1)  # summed in float32
    z = by_key_head(weights, K) @ v
    return z.view(B, H, T, E)


def attend_after_prefix(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prefix: KeysAndValues
) -> Tensor:
    """As `attend`, after keys and values [1, K, S, E] of a prefix: one softmax over these and own keys.

    All rows share the prefix: its keys and values are multiplied with all of them at once, never copied. Where there
    would be more than `SCORES` scores, parts of the queries come one after another.
    """
    B, H, T, E = q.shape
    K = k.shape[1]
    prefix_keys, prefix_values = prefix
    if mask is None:
        mask = causal_mask(q)
    keys = prefix_keys.shape[2] + k.shape[2]
    scores = B * H * T * keys
    if scores > SCORES and T > 1:
        parts = math.ceil(scores / SCORES)
        found = []
        queries = q.chunk(parts, 2)
        masks = mask.chunk(parts, -2)
        for some_queries, some_mask in zip(queries, masks):
            found.append(attend_after_prefix(some_queries, k, v, some_mask, prefix))
        return torch.cat(found, 2)
    scaled = by_key_head(q, K) * E**-0.5
    before = all_rows(scaled) @ prefix_keys[0].mT  # [K, B * H / K * T, S]
    before = by_row(before, B).reshape(B, H, T, -1)
    own = (scaled @ k.mT).view(B, H, T, -1)
    own = own.masked_fill(~mask, -torch.inf)
    sizes = [before.shape[-1], own.shape[-1]]
    scores = torch.cat((before, own), -1)
    weights = scores.softmax(-1, dtype=torch.float32)
    before, own = weights.to(q.dtype).split(sizes, -1)
    z_before = all_rows(by_key_head(before, K)) @ prefix_values[0]  # [K, B * H / K * T, E]
    z_before = by_row(z_before, B).reshape(B, H, T, E)
    z_own = by_key_head(own, K) @ v
    return z_before + z_own.view(B, H, T, E)


def all_rows(x: Tensor) -> Tensor:
    """x [B, K, n, E] as [K, B * n, E]."""
    return x.transpose(0, 1).flatten(1, 2)


def by_row(x: Tensor, rows: int) -> Tensor:
    """x [K, rows * n, E] as [rows, K, n, E]."""
    return x.unflatten(1, (rows, -1)).transpose(0, 1)


def heads_as_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention with the heads that share a key/value head as further rows of it.

    A GPU's fused kernel that takes a mask refuses `enable_gqa`, and PyTorch would fall back to whole score matrices.
    """
    K = k.shape[1]
    shared = q.shape[1] // K
    mask = mask.repeat(1, 1, shared, 1)
    q_rows = by_key_head(q, K)
    z = F.scaled_dot_product_attention(q_rows, k, v, attn_mask=mask)
    return z.view(q.shape)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with a copy of each key/value head for every head that shares it.

    A GPU's fused kernel that takes float32 refuses `enable_gqa`, and PyTorch would fall back to whole score matrices.
    """
    shared = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(shared, dim=1)  # [B, H, T, E]
    v = v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
