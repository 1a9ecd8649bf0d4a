"""Rows as ids, and batches of them: right-padded, or packed without padding.

R runs, B rows a run, T tokens, P answer positions (flattened over rows), L layers, D hidden.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .models.attention import Packed
from .models.taps import At
from .tasks import Example
from .tasks.chat import ChatPrompt
from .tokenizer import Tokenizer

MOST_PACKED, WORTH_PACKING = 512, 0.8  # tokens of a packed line (its attention is computed whole); share of the padded
TOGETHER, FAR = 4096, 2  # tokens that are always one batch, with their padding; times the median: a row of its own
Watch = Callable[[int], object] | None  # is called with the number of rows of each finished pass


@dataclass
class Row:
    """One row as ids. P positions predict the answer: the last prompt token, then each answer token but the last."""

    prompt: list[int]
    answer: list[int]
    activations: Tensor | None = None  # [L, P, D], the teacher's attention outputs there
    soft: Tensor | None = None  # [P, k], the teacher's log-probabilities of its k likeliest tokens there
    soft_ids: Tensor | None = None  # [P, k], those tokens
    states: Tensor | None = None  # [L, P, D], its residual stream after each attention

    def __len__(self) -> int:
        """Tokens that a pass reads: the last answer token predicts nothing."""
        return len(self.prompt) + len(self.answer) - 1


def truth_row(example: Example, tokenizer: Tokenizer, end: bool) -> Row:
    """The row with its true answer; with `end` closed as the chat template closes a turn, else as the tokenizer does.

    Raises UsageError when prompt and label merge.
    """
    if isinstance(example.prompt, ChatPrompt):
        tokenizer = tokenizer.ending_with(example.prompt.chat.end)
    answer = tokenizer.encode_answer(example.prompt, example.answer, apart=example.label is None)
    if end:
        answer = answer + tokenizer.closing
    return Row(tokenizer.encode(example.prompt), answer)


@dataclass
class Batch:
    """Rows of R runs, run by run: each right-padded, or all of a run one after another in a single line (`packed`)."""

    ids: Tensor  # [R * B, T], packed [R, T]
    packed: Packed | None
    at: At  # rows and columns of the P answer positions, run by run
    targets: Tensor  # [P] answer tokens
    weights: Tensor  # [R, P / R]: mean over positions of a row, mean over rows; 0 where a run has fewer positions
    activations: Tensor | None  # [L, P, D]
    soft: Tensor | None  # [P, k]
    soft_ids: Tensor | None  # [P, k]
    states: Tensor | None  # [L, P, D]
    runs: Tensor | None = None  # [R] which of more runs these are; None: there are no others
    rows: Tensor | None = None  # [R, B, P / R] 1 where a position belongs to a row: losses are rounded row by row

    def tensors(self) -> list[Tensor]:
        packed = (self.packed.mask, self.packed.places) if self.packed else ()
        kept = self.activations, self.soft, self.soft_ids, self.states, self.runs, self.rows
        return [t for t in (self.ids, *packed, *self.at, self.targets, self.weights, *kept) if t is not None]


def collate(runs: list[list[Row]], device="cpu", pack: bool = False, by_row: bool = False) -> Batch:
    """One batch of R lists of rows, shorter ones padded with empty rows; `pack`: no padding where it is worth it.

    `by_row`: with `Batch.rows`.
    """
    R, B, device = len(runs), max(map(len, runs)), torch.device(device)
    lengths = np.array([[*map(len, run), *[0] * (B - len(run))] for run in runs])
    totals = lengths.sum(1)
    pack = pack and totals.max() <= min(MOST_PACKED, WORTH_PACKING * B * lengths.max())
    lines = np.arange(R)[:, None].repeat(B, 1) if pack else np.arange(R * B).reshape(R, B)
    starts = lengths.cumsum(1) - lengths if pack else np.zeros_like(lengths)
    ids = np.zeros((R, totals.max()) if pack else (R * B, lengths.max()), np.int64)
    documents, places = np.full(ids.shape, -1), np.zeros_like(ids)
    most = max(sum(len(row.answer) for row in run) for run in runs)
    at, targets = np.zeros((2, R, most), np.int64), np.zeros((R, most), np.int64)
    weights = np.zeros((R, most), np.float32)
    belongs = np.zeros((R, B, most), np.float32)
    at[0] = lines[:, :1]  # positions of no weight stay within the run
    for r, run in enumerate(runs):
        p = 0
        for i, row in enumerate(run):
            line, here = lines[r, i], slice(starts[r, i], starts[r, i] + lengths[r, i])
            ids[line, here] = row.prompt + row.answer[:-1]
            documents[line, here], places[line, here] = i, np.arange(lengths[r, i])
            span = slice(p, p := p + len(row.answer))
            at[0, r, span] = line
            at[1, r, span] = here.start + len(row.prompt) - 1 + np.arange(len(row.answer))
            targets[r, span] = row.answer
            weights[r, span] = 1 / (len(row.answer) * len(run))
            belongs[r, i, span] = 1

    def there(array):
        return send(torch.from_numpy(array), device)

    packed = Packed(there(documents), there(places)) if pack else None
    positions = there(at[0].reshape(-1)), there(at[1].reshape(-1))
    kept = {"activations": 1, "soft": 0, "soft_ids": 0, "states": 1}  # along which dimension positions are
    kept = (join_positions(runs, name, most, dim) for name, dim in kept.items())
    batch = Batch(there(ids), packed, positions, there(targets.reshape(-1)), there(weights), *kept)
    batch.rows = there(belongs) if by_row else None
    return batch


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without waiting for what a GPU is doing."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def in_batches(runs: list[list[Row]], device="cpu", by_row: bool = False) -> list[Batch]:
    """R lists of rows as one batch or, where most of that would be padding, as several: their losses add up to its own.

    Rows of more than `FAR` times the median length leave it, and are batched with one another. `by_row`: one batch,
    with `Batch.rows`.
    """
    if by_row:
        return [collate(runs, device, pack=True, by_row=True)]
    lengths = [len(row) for rows in runs for row in rows]
    padded = len(runs) * max(map(len, runs)) * max(lengths)
    lines = max(sum(map(len, rows)) for rows in runs)
    if lines <= MOST_PACKED or padded <= max(TOGETHER, FAR * sum(lengths)):
        return [collate(runs, device, pack=True)]
    usual = FAR * float(np.median(lengths))
    short = {r: [row for row in rows if len(row) <= usual] for r, rows in enumerate(runs)}
    long = [(r, row) for r, rows in enumerate(runs) for row in rows if len(row) > usual]
    parts = [{r: rows for r, rows in short.items() if rows}]
    for group in by_length([len(row) for _, row in long], TOGETHER):
        part = defaultdict(list)
        for i in group:
            r, row = long[i]
            part[r].append(row)
        parts.append(part)
    return [portion(runs, part, device) for part in parts]


def portion(runs: list[list[Row]], part: dict[int, list[Row]], device) -> Batch:
    """The rows `part` of some of the runs; their weights are as among all rows of their run."""
    batch = collate(list(part.values()), device, pack=True)
    shares = torch.tensor([len(rows) / len(runs[r]) for r, rows in part.items()])
    weights = batch.weights * shares[:, None].to(batch.weights.device)
    return replace(batch, weights=weights, runs=torch.tensor(list(part), device=weights.device))


def join_positions(runs: list[list[Row]], name: str, most: int, dim: int) -> Tensor | None:
    """The rows' tensors `name` along `dim`, each run's padded to `most` positions; None where rows have none."""
    if getattr(runs[0][0], name) is None:
        return None
    parts = []
    for run in runs:
        tensors = [getattr(row, name) for row in run]
        parts += tensors
        if short := most - sum(t.shape[dim] for t in tensors):
            parts.append(tensors[0].narrow(dim, 0, 1).repeat_interleave(short, dim))
    return torch.cat(parts, dim)


def by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in groups of similar length: rows × longest row stays within `budget` tokens (one row at least)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # longest first: memory trouble shows at once
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups
