"""Decoding made fast: rows that have ended leave the batch, and on a GPU steps are recorded."""

from functools import partial

import torch

from ..generate import DecodingHooks
from .graphs import RECORDERS, recorded

WORTH_RECORDING = 8  # tokens of a response from which on recording its steps pays


def fast_decoding(device: torch.device, max_tokens: int) -> DecodingHooks:
    """Hooks for responses of up to so many tokens: where steps are recorded, rows leave by halves, so shapes stay."""
    if device.type in RECORDERS and max_tokens >= WORTH_RECORDING:
        return DecodingHooks(partial(recorded, device=device), static=True, who_stays=half_leaves)
    return DecodingHooks(who_stays=ended_leave)


def ended_leave(going: list[bool], runs: int) -> list[int] | None:
    staying = equally_many(going, runs)
    return staying if len(staying) < len(going) else None


def half_leaves(going: list[bool], runs: int) -> list[int] | None:
    staying = equally_many(going, runs)
    return staying if len(staying) <= len(going) // 2 else None


def equally_many(going: list[bool], runs: int) -> list[int]:
    """The rows still going and, in runs with fewer of them, ended ones up to equal numbers."""
    size = len(going) // runs
    most = max(sum(going[start : start + size]) for start in range(0, len(going), size))
    staying = []
    for start in range(0, len(going), size):
        # those going first
        mine = sorted(range(start, start + size), key=lambda row: not going[row])
        staying += mine[:most]
    return staying
