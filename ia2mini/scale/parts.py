"""Take some of the runs out of a batch of runs, and put their results back.

With several processes each one trains a part of the runs (`over_ranks`).
"""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..batch import send
from ..train import Runs, State
from . import ranks


def take_runs(runs: Runs, places: Tensor) -> Runs:
    """The runs at these places (int64 on the CPU), in this order."""
    chosen = places.tolist()
    mix = {}
    for loss, weights in runs.mix.items():
        mix[loss] = at_places(weights, places)
    return Runs(
        theta=at_places(runs.theta, places),
        rates=runs.rates[places],
        train=[runs.train[r] for r in chosen],
        dev=[runs.dev[r] for r in chosen],
        mix=mix,
        order=None if runs.order is None else [runs.order[r] for r in chosen],
    )


def take_state(state: State, places: Tensor) -> State:
    """A copy of the training state of the runs at these places."""
    taken = {}
    for name, values in fields_by_run(state).items():
        taken[name] = at_places(values.detach(), places)
    taken["theta"].requires_grad_()
    return State(**taken, t=state.t.clone(), step=state.step)


def put_state(state: State, places: Tensor, part: State) -> None:
    """Copy the training state `part` back to these places."""
    trained = fields_by_run(part)
    for name, values in fields_by_run(state).items():
        index = send(places, values.device)
        values.detach()[index] = trained[name].detach()
    state.t = part.t
    state.step = part.step


def fields_by_run(state: State) -> dict[str, Tensor]:
    """The fields of a state that have a row for each run."""
    found = {}
    for field in fields(state):
        if field.name not in ("t", "step"):
            found[field.name] = getattr(state, field.name)
    return found


def at_places(values: Tensor, places: Tensor) -> Tensor:
    return values[send(places, values.device)]


def over_ranks(train: Callable) -> Callable:
    """Wrap `train` so that each process trains a part of the runs to the end; all get the results of all."""

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
