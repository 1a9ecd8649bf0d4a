"""Runs that have ended leave the batch: the loop stops, and goes on with those that still train."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..train import DEFAULTS, NO_HOOKS, Hooks, Runs, Settings, State


def never(model: nn.Module, runs: Runs, settings: Settings) -> bool:
    return False


def shrinking(train: Callable, by_halves: Callable = never) -> Callable:
    """`train`, called again for the runs still going whenever some have ended.

    Where `by_halves(model, runs, settings)` says so they leave only when half of the batch has ended.
    """

    def shrinking_train(
        model,
        adapter,
        runs: Runs,
        settings: Settings = DEFAULTS,
        state: State | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> State:
        whole = State.begin(runs.theta) if state is None else state
        live = torch.arange(len(runs))
        while len(live):
            mine = runs.take(live)
            most = len(live) // 2 if by_halves(model, mine, settings) else len(live) - 1
            some_left = False

            def after_look(part: State, most: int = most) -> bool:
                nonlocal some_left
                if hooks.after_look(part):
                    return True
                some_left = int(part.going.sum()) <= most
                return some_left

            part = train(
                model,
                adapter,
                mine,
                settings,
                whole.take(live),
                replace(hooks, after_look=after_look),
            )
            whole.put(live, part)
            if not some_left:
                break
            live = live[part.going]
        return whole

    return shrinking_train
