"""Runs dealt out to processes, where torchrun has started several: each trains a part of them to its end."""

from collections.abc import Callable

import torch

from ..train import DEFAULTS, NO_HOOKS, Hooks, Runs, Settings, State
from . import ranks


def over_ranks(train: Callable) -> Callable:
    """`train` of a part of the runs on each process."""

    def train_a_part(
        model,
        adapter,
        runs: Runs,
        settings: Settings = DEFAULTS,
        state: State | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> State:
        if ranks.size == 1:
            return train(model, adapter, runs, settings, state, hooks)
        whole = State.begin(runs.theta) if state is None else state
        parts = torch.arange(len(runs)).tensor_split(ranks.size)

        def trained(part: torch.Tensor) -> State:
            return (
                train(model, adapter, runs.take(part), settings, whole.take(part), hooks)
                if len(part)
                else None
            )

        for part, found in zip(parts, ranks.spread(trained, parts)):
            if len(part):
                whole.put(part, found)
        return whole

    return train_a_part
