"""Train fewer runs at once if memory is too small for all of them."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from .. import UsageError
from ..batch import count_positions
from ..errors import out_of_memory
from ..models.taps import device_of
from ..train import Runs, State
from .blocks import checkpoint_blocks, is_checkpointed
from .device import empty_mps_cache, free_bytes
from .parts import put_state, take_runs, take_state

MARGIN = 0.9  # of what is free
RANK = 8  # of LoRA: small beside the rest
WEIGHTS_KEPT = 7  # best and current weights, gradients, and four tensors of Adam
FLOAT32 = 4  # bytes


def within_memory(train: Callable, at_once: int | None = None) -> Callable:
    """Wrap `train` so that it trains at most `at_once` runs at a time (None: all), and fewer if memory is too small.

    The number that fits is estimated first, and halved if memory still runs out; later calls keep it. A single run
    that does not fit is checkpointed. Raises UsageError if that does not help.
    """
    most_ever = at_once

    def train_in_parts(model, adapter, runs, settings, state: State, hooks) -> State:
        nonlocal most_ever
        most = min(most_ever or len(runs), runs_that_fit(model, runs, settings.batch_size))
        begun = replace(state)  # the same tensors, but every part begins at its step
        rest = torch.arange(len(runs))
        while len(rest):
            part = rest[:most]
            some = take_runs(runs, part)
            try:
                found = train(model, adapter, some, settings, take_state(begun, part), hooks)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                most = halve_or_checkpoint(model, len(part))
                continue
            put_state(state, part, found)
            rest = rest[most:]
        if most < len(runs):
            most_ever = most
        empty_mps_cache(device_of(model))
        return state

    return train_in_parts


def halve_or_checkpoint(model: nn.Module, runs: int) -> int:
    """How many runs to try next if this many did not fit; a single run is checkpointed. Raises UsageError."""
    if runs > 1:
        now = f"going on with {runs // 2} (--side-by-side {runs // 2})"
        warnings.warn(f"out of memory with {runs} runs side by side; {now}", stacklevel=3)
        return runs // 2
    if not checkpoint_blocks(model):
        raise UsageError(
            "not enough memory for a single run; use a smaller --batch-size or a smaller model"
        )
    warnings.warn("out of memory with a single run; going on with --checkpointing", stacklevel=3)
    return 1


def runs_that_fit(model: nn.Module, runs: Runs, batch_size: int) -> int:
    """Estimate how many of the runs fit into free memory, at least one."""
    weight = model.model.embed_tokens.weight
    free = free_bytes(weight.device)
    if math.isinf(free):
        return len(runs)
    longest = [sorted(rows, key=len)[-batch_size:] for rows in runs.train]
    tokens = max(sum(map(len, rows)) for rows in longest)
    positions = max(count_positions(rows) for rows in longest)
    each = run_bytes(
        model.config,
        tokens,
        positions,
        weight.itemsize,
        runs.theta.shape[1],
        is_checkpointed(model),
    )
    return max(1, int(min(len(runs), MARGIN * free / each)))


def run_bytes(
    config, tokens: float, positions: float, size: int, trained: int, checkpointing: bool = False
) -> float:
    """Bytes that training one run needs beside the model: mostly what a step keeps for the backward pass.

    A layer keeps, a token: what its norms and LoRA read, queries, keys (also before their norm), values, what attention
    gives, three states of the MLP, LoRA's and the norms' small ones; checkpointed, what both halves read, and one layer
    is there as a whole. Weights count seven times (best, now, gradients, Adam's), an answer its targets and gradient.
    """
    hidden = config.hidden_size
    mlp = config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    depth = config.num_hidden_layers
    layer = size * (3 * hidden + 2 * queries + 2 * keys + 3 * mlp) + 24 * RANK
    if config.model_type == "qwen3":
        layer += size * (queries + keys)
    if config.model_type == "olmo2":  # its norms read float32
        layer += FLOAT32 * (2 * hidden + queries + keys) - size * 2 * hidden
    last_mlp = size * (3 * mlp + hidden)  # only answer positions reach it
    layers = depth * layer - last_mlp
    if checkpointing:
        layers = depth * 2 * hidden * size + layer
    answers = positions * (depth + 2) * hidden * size
    return tokens * layers + answers + WEIGHTS_KEPT * FLOAT32 * trained
