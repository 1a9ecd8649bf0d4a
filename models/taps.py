"""Activation taps: what a forward pass is asked to keep.

P chosen positions, L layers, B rows, T tokens, D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from ia2mini import UsageError

At = tuple[Tensor, Tensor]  # (rows, columns), int64 [P] each: positions in a [B, T] batch


class Taps:
    """Asks a forward pass for attention outputs: what each attention block adds to the residual stream (after W_O).

    `at`: (rows, cols), two int64 vectors of length P, or None for every position. `layers`: layer indices, or None for
    all. After the pass `stack()` is [L, P, D] in the order given ([L, B, T, D] without `at`), attached to the graph.
    With `residual` it is the stream after that addition instead.

        taps = Taps()
        logits = model(ids, taps=taps)   # ids [B, T] -> [B, T, V]
        taps.stack()                     # [L, B, T, D]
    """

    def __init__(
        self, at: At | None = None, layers: list[int] | None = None, residual: bool = False
    ):
        self.at = at
        self.layers = layers
        self.residual = residual
        self.outputs: dict[int, Tensor] = {}

    def record(self, layer: int, attention_output: Tensor, stream: Tensor) -> None:
        """Keep layer `layer`'s attention output [B, T, D], or the `stream` after it, where it was asked for."""
        if self.layers is None or layer in self.layers:
            wanted = stream if self.residual else attention_output
            if self.at is not None:
                wanted = wanted[self.at]
            self.outputs[layer] = wanted

    def last(self, depth: int) -> int:
        """The last layer asked for, in a model of `depth` layers."""
        if self.layers is None:
            return depth - 1
        if not self.layers or not all(0 <= i < depth for i in self.layers):
            raise UsageError(
                f"taps on layers {self.layers}: give layer indices from 0 to {depth - 1}"
            )
        return max(self.layers)

    def each(self) -> list[Tensor]:
        """The attention outputs, a tensor a layer, in the order of `layers`."""
        return [self.outputs[layer] for layer in self.layers or self.outputs]

    def stack(self) -> Tensor:
        return torch.stack(self.each())


def network_of(model: Any) -> Any:
    """The model itself, or the one inside `partial(model, prefix=…)`: a model with a shared prefix."""
    return getattr(model, "func", model)


def device_of(model: Any) -> torch.device:
    """Where a model is, or the one with a shared prefix."""
    return network_of(model).model.embed_tokens.weight.device
