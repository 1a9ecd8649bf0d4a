"""Rows as ids, and batches of them: right-padded.

R runs, B rows a run, T tokens, P answer positions (flattened over rows), L layers, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .models.attention import Packed
from .models.taps import At
from .tasks import Example
from .tasks.chat import ChatPrompt
from .tokenizer import Tokenizer

Watch = Callable[[int], object] | None  # is called with the number of rows of each finished pass


@dataclass
class TokenRow:
    """One row as ids. P positions predict the answer: the last prompt token, then each answer token but the last."""

    prompt: list[int]
    answer: list[int]
    activations: Tensor | None = None  # [L, P, D], the teacher's attention outputs there
    # [P, k], the teacher's log-probabilities of its k likeliest tokens there
    soft: Tensor | None = None
    soft_ids: Tensor | None = None  # [P, k], those tokens
    states: Tensor | None = None  # [L, P, D], its residual stream after each attention
    weight: float = 1.0  # in the mean loss of its run

    def __len__(self) -> int:
        """Tokens that a pass reads: the last answer token predicts nothing."""
        return len(self.prompt) + len(self.answer) - 1


def truth_row(example: Example, tokenizer: Tokenizer, end: bool) -> TokenRow:
    """The row with its true answer. `end` appends the end of sequence: a chat template's own, else the tokenizer's.

    Raises UsageError when prompt and label merge.
    """
    if isinstance(example.prompt, ChatPrompt):
        tokenizer = tokenizer.ending_with(example.prompt.chat.end)
    answer = tokenizer.encode_answer(example.prompt, example.answer, apart=example.label is None)
    if end:
        answer = answer + tokenizer.closing
    return TokenRow(tokenizer.encode(example.prompt), answer)


@dataclass
class Batch:
    """Rows of R runs, run by run, each right-padded."""

    ids: Tensor  # [R * B, T]
    at: At  # rows and columns of the P answer positions, run by run
    targets: Tensor  # [P] answer tokens
    # [R, P / R]: weights of the mean over a row's positions, then over rows; 0 at padding
    weights: Tensor
    lengths: Tensor  # [R, B] tokens of each row; on the CPU
    activations: Tensor | None  # [L, P, D]
    soft: Tensor | None  # [P, k]
    soft_ids: Tensor | None  # [P, k]
    states: Tensor | None  # [L, P, D]
    packed: Packed | None = None  # keeps apart rows that are packed into one sequence
    runs: Tensor | None = None  # [R] numbers of these runs among all runs; None: these are all
    # [R, B, P / R] 1 where a position belongs to a row; only where each row's loss is rounded (`--paper-compat`)
    rows: Tensor | None = None

    def of_runs(self, values: Tensor) -> Tensor:
        """The entries of `values` [all runs, …] that belong to the runs of this batch."""
        return values if self.runs is None else values[self.runs]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; what the teacher gave is there already."""
        packed = self.packed
        if packed is not None:
            packed = packed.to(partial(send, device=device))
        return replace(
            self,
            ids=send(self.ids, device),
            at=(send(self.at[0], device), send(self.at[1], device)),
            targets=send(self.targets, device),
            weights=send(self.weights, device),
            packed=packed,
            runs=None if self.runs is None else send(self.runs, device),
            rows=None if self.rows is None else send(self.rows, device),
        )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; to a GPU without waiting for the work in its queue."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def collate(runs: list[list[TokenRow]]) -> Batch:
    """One right-padded batch of R lists of rows, shorter lists filled up with empty rows; on the CPU."""
    R = len(runs)
    B = max(map(len, runs))
    T = max(len(row) for rows in runs for row in rows)
    width = max(map(count_positions, runs))  # answer positions of a run
    ids = np.zeros((R, B, T), np.int64)
    lengths = np.zeros((R, B), np.int64)
    at_rows = np.zeros((R, width), np.int64)
    at_columns = np.zeros((R, width), np.int64)
    targets = np.zeros((R, width), np.int64)
    weights = np.zeros((R, width), np.float32)
    for r, rows in enumerate(runs):
        start = 0
        for b, row in enumerate(rows):
            end = start + len(row.answer)
            last = len(row.prompt) - 1  # this token predicts the answer's first
            ids[r, b, : len(row)] = row.prompt + row.answer[:-1]
            lengths[r, b] = len(row)
            at_rows[r, start:end] = r * B + b
            at_columns[r, start:end] = np.arange(last, last + len(row.answer))
            targets[r, start:end] = row.answer
            weights[r, start:end] = row.weight / (len(row.answer) * len(rows))
            start = end
        at_rows[r, start:] = r * B  # what fills up a shorter run: its first token, with weight 0
    return Batch(
        ids=torch.from_numpy(ids).view(R * B, T),
        at=(torch.from_numpy(at_rows).flatten(), torch.from_numpy(at_columns).flatten()),
        targets=torch.from_numpy(targets).flatten(),
        weights=torch.from_numpy(weights),
        lengths=torch.from_numpy(lengths),
        activations=join_positions(runs, "activations", width),
        soft=join_positions(runs, "soft", width),
        soft_ids=join_positions(runs, "soft_ids", width),
        states=join_positions(runs, "states", width),
    )


def count_positions(rows: list[TokenRow]) -> int:
    """Positions that predict the rows' answers."""
    return sum(len(row.answer) for row in rows)


def join_positions(runs: list[list[TokenRow]], name: str, width: int) -> Tensor | None:
    """The rows' tensors `name`, [(L,) positions, n] each, one after another; None where rows have none.

    Each run's last one is padded with zeros, so that the run has `width` positions.
    """
    if getattr(runs[0][0], name) is None:
        return None
    parts = []
    for rows in runs:
        parts += [getattr(row, name) for row in rows]
        missing = width - count_positions(rows)
        if missing:
            parts[-1] = F.pad(parts[-1], (0, 0, 0, missing))
    return torch.cat(parts, -2)


def pad_prompts(prompts: list[list[int]], runs: int, device) -> tuple[Tensor, Tensor]:
    """The prompts once for every run: ids [runs * prompts, T], right-padded, and where the last token of each is."""
    ids = pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)
    last = torch.tensor(list(map(len, prompts))) - 1
    return send(ids, device).repeat(runs, 1), send(last, device).repeat(runs)


def by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in groups of similar length: rows × longest row stays within `budget` tokens (one row at least).

    Longest first, so that running out of memory shows at once.
    """
    groups: list[list[int]] = []
    longest = 0  # of the last group
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def join_groups(parts: Sequence[Tensor], groups: list[list[int]], dim: int) -> Tensor:
    """Results of each of the groups, joined along `dim` in the order of the rows."""
    joined = torch.cat(list(parts), dim)
    order = torch.tensor(sum(groups, [])).argsort()
    return joined.index_select(dim, send(order, joined.device))
