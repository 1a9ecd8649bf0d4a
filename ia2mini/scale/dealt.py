"""Spread runs over the processes that torchrun has started: each process trains its part to the end."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..train import State
from . import ranks
from .parts import put_state, take_runs, take_state


def over_ranks(train: Callable) -> Callable:
    """Wrap `train` so that each process trains a part of the runs."""

    def train_a_part(model, adapter, runs, settings, state: State, hooks) -> State:
        def trained(part: Tensor) -> State | None:
            if not len(part):
                return None
            mine = take_runs(runs, part)
            return train(model, adapter, mine, settings, take_state(state, part), hooks)

        parts = torch.arange(len(runs)).tensor_split(ranks.size)
        for part, found in zip(parts, ranks.spread(trained, parts)):
            if found is not None:
                put_state(state, part, found)
        return state

    return train_a_part
