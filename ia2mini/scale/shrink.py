"""Finished runs leave the batch: the loop stops, and continues with the runs that still train."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..train import Hooks, State
from .parts import put_state, take_runs, take_state


def shrinking(train: Callable, by_halves: Callable | None = None) -> Callable:
    """Wrap `train`: whenever runs have finished, it is called again for the others.

    If `by_halves(model, runs, settings)` is true, they leave only when half of the batch has finished.
    """

    def shrinking_train(model, adapter, runs, settings, state: State, hooks: Hooks) -> State:
        live = torch.arange(len(runs))
        while len(live):
            going = take_runs(runs, live)
            most = len(live) - 1  # if this many or fewer still train, the finished ones leave
            if by_halves is not None and by_halves(model, going, settings):
                most = len(live) // 2
            some_left = False

            def after_evaluation(part: State, most: int = most) -> bool:
                nonlocal some_left
                if hooks.after_evaluation(part):
                    return True
                some_left = int(part.going.sum()) <= most
                return some_left

            watched = replace(hooks, after_evaluation=after_evaluation)
            part = train(model, adapter, going, settings, take_state(state, live), watched)
            put_state(state, live, part)
            if not some_left:
                break
            live = live[part.going]
        return state

    return shrinking_train
