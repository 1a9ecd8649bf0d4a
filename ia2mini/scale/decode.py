"""Faster decoding: finished rows leave the batch, and a GPU records the steps."""

from functools import partial

import torch
from torch import nn

from ..generate import Decoding, DecodingHooks
from ..models.taps import device_of
from .graphs import RECORDERS, recorded

WORTH_RECORDING = 8  # recording the steps pays for responses of at least this many tokens


def fast_decoding(device: torch.device, max_tokens: int) -> DecodingHooks:
    """Hooks for responses of up to so many tokens: where steps are recorded, rows leave by halves, so shapes stay."""
    if device.type not in RECORDERS or max_tokens < WORTH_RECORDING:
        return DecodingHooks(who_stays=who_stays)
    return DecodingHooks(
        wrap=partial(recorded, device=device),
        fixed_shape=True,
        who_stays=partial(who_stays, by_halves=True),
    )


def decoding_for(model: nn.Module, max_tokens: int, stop: str | None) -> Decoding:
    """Responses of up to so many tokens, or up to the `stop` text, as fast as the model's device allows."""
    return Decoding(max_tokens, stop, hooks=fast_decoding(device_of(model), max_tokens))


def who_stays(going: list[bool], runs: int, by_halves: bool = False) -> list[int] | None:
    """The rows that stay in the batch where finished ones leave, `by_halves` only half of the batch; None: all.

    Runs with fewer unfinished rows keep finished ones, so that all runs have equally many.
    """
    size = len(going) // runs
    rows_of_runs = []
    for start in range(0, len(going), size):
        rows = range(start, start + size)
        going_first = sorted(rows, key=lambda row: not going[row])
        rows_of_runs.append(going_first)
    longest = 0
    for rows in rows_of_runs:
        unfinished = [row for row in rows if going[row]]
        longest = max(longest, len(unfinished))
    staying = []
    for rows in rows_of_runs:
        staying += rows[:longest]
    most = len(going) - 1
    if by_halves:
        most = len(going) // 2
    return staying if len(staying) <= most else None
