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
        return DecodingHooks(who_stays=ended_leave)
    record = partial(recorded, device=device)
    return DecodingHooks(record, fixed_shape=True, who_stays=half_leaves)


def decoding_for(model: nn.Module, max_tokens: int, stop: str | None) -> Decoding:
    """Responses of up to so many tokens, or up to the `stop` text, as fast as the model's device allows."""
    return Decoding(max_tokens, stop, hooks=fast_decoding(device_of(model), max_tokens))


def ended_leave(going: list[bool], runs: int) -> list[int] | None:
    staying = equally_many(going, runs)
    if len(staying) == len(going):
        return None
    return staying


def half_leaves(going: list[bool], runs: int) -> list[int] | None:
    staying = equally_many(going, runs)
    if len(staying) > len(going) // 2:
        return None
    return staying


def equally_many(going: list[bool], runs: int) -> list[int]:
    """The unfinished rows; runs with fewer of them keep finished rows, so that all runs have equally many."""
    size = len(going) // runs
    starts = range(0, len(going), size)
    most = max(sum(going[start : start + size]) for start in starts)
    staying = []
    for start in starts:
        rows = range(start, start + size)
        going_first = sorted(rows, key=lambda row: not going[row])
        staying += going_first[:most]
    return staying
