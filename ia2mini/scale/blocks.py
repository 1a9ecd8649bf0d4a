"""Compile or checkpoint both halves of every block of a model."""

from functools import partial
from itertools import product

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

HALVES = ("attention_output", "mlp_output")  # of a block


def compile_blocks(model: nn.Module, **options) -> None:
    """Put torch.compile with these `options` around both halves of every block.

    Without a working compiler they run uncompiled, with a warning.
    """
    config = torch._dynamo.config
    # the latter in 2.6
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, 64)  # with and without gradients, adapter, mask, cache and prefix
    config.suppress_errors = not options.get("fullgraph")
    for half in HALVES:  # one function serves all layers: one compilation
        function = torch.compile(
            getattr(type(model.model.layers[0]), half), dynamic=True, **options
        )
        for block in model.model.layers:
            setattr(block, half, partial(function, block))


def checkpoint_blocks(model: nn.Module) -> bool:
    """Checkpoint both halves of every block: only their inputs are kept, and the backward pass computes the rest again.

    Returns False if they were checkpointed already. Call it after `compile_blocks`.
    """
    if is_checkpointed(model):
        return False
    for block, half in product(model.model.layers, HALVES):
        anew = partial(
            checkpoint, getattr(block, half), use_reentrant=False, preserve_rng_state=False
        )
        setattr(block, half, anew)
    return True


def is_checkpointed(model: nn.Module) -> bool:
    return getattr(model.model.layers[0].mlp_output, "func", None) is checkpoint
