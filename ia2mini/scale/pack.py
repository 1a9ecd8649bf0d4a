"""Batches with little padding: short rows of a run are packed into one line, long rows get batches of their own.

R runs, B rows a run, T tokens.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch

from ..batch import Batch, TokenRow, by_length, collate
from ..models.attention import Packed

MOST_TOKENS = 512  # of a packed line; attention is computed over the whole line
# rows are packed if the longest line has at most this share of a run's padded tokens
WORTH_PACKING = 0.8
ONE_BATCH_TOKENS = 4096  # with their padding: so many are always one batch
MOST_PADDED = 2  # times the rows' own tokens: with more, a batch is mostly padding
LONG_ROW = 2  # times the median length: a longer row leaves a batch that is mostly padding


def pack(batch: Batch) -> Batch:
    """The batch on the CPU, with the rows of each run packed into one line [R, T] if that saves enough padding."""
    R, B = batch.lengths.shape
    T = batch.ids.shape[1]
    longest_line = int(batch.lengths.sum(1).max())
    if longest_line > min(MOST_TOKENS, WORTH_PACKING * B * T):
        return batch
    starts = batch.lengths.cumsum(1) - batch.lengths  # [R, B], where a row begins in its line
    real = torch.arange(T) < batch.lengths[..., None]  # [R, B, T]
    run, row, place = real.nonzero(as_tuple=True)
    in_line = run, starts[run, row] + place
    ids = torch.zeros(R, longest_line, dtype=torch.int64)
    documents = torch.full_like(ids, -1)
    places = torch.zeros_like(ids)
    ids[in_line] = batch.ids.view(R, B, T)[real]
    documents[in_line] = row
    places[in_line] = place
    rows, columns = batch.at
    run = rows // B
    columns = columns + starts.flatten()[rows]
    packed = Packed(documents, places)
    return replace(batch, ids=ids, at=(run, columns), packed=packed)


def in_one_batch(runs: list[list[TokenRow]]) -> list[Batch]:
    """A `collate` hook: one packed batch with `Batch.rows`."""
    batch = collate(runs)
    R, B = batch.lengths.shape
    rows, _ = batch.at
    row_of_position = rows.view(R, 1, -1) % B  # [R, 1, P / R]
    every_row = torch.arange(B)[:, None]
    real = batch.weights[:, None] > 0
    belongs = (row_of_position == every_row) & real  # [R, B, P / R]
    return [pack(replace(batch, rows=belongs.float()))]


def in_batches(runs: list[list[TokenRow]]) -> list[Batch]:
    """A `collate` hook: one packed batch or, if most of it would be padding, several batches whose losses add up.

    Rows longer than `LONG_ROW` times the median are batched with one another.
    """
    lengths = [len(row) for rows in runs for row in rows]
    most_rows = max(map(len, runs))
    padded = len(runs) * most_rows * max(lengths)
    tolerated = MOST_PADDED * sum(lengths)
    mostly_padding = padded > max(ONE_BATCH_TOKENS, tolerated)
    longest_line = max(sum(map(len, rows)) for rows in runs)
    if longest_line <= MOST_TOKENS or not mostly_padding:
        return [pack(collate(runs))]
    usual = LONG_ROW * float(np.median(lengths))
    short = defaultdict(list)  # run -> its rows
    long = []
    for r, rows in enumerate(runs):
        for row in rows:
            if len(row) <= usual:
                short[r].append(row)
            else:
                long.append((r, row))
    parts = [short]
    long_lengths = [len(row) for _, row in long]
    for group in by_length(long_lengths, ONE_BATCH_TOKENS):
        part = defaultdict(list)
        for i in group:
            r, row = long[i]
            part[r].append(row)
        parts.append(part)
    return [some_rows(runs, part) for part in parts if part]


def some_rows(runs: list[list[TokenRow]], part: dict[int, list[TokenRow]]) -> Batch:
    """A batch of the rows in `part`. Each row keeps the weight that it has among all rows of its run."""
    batch = pack(collate(list(part.values())))
    shares = [len(rows) / len(runs[r]) for r, rows in part.items()]
    weights = batch.weights * torch.tensor(shares)[:, None]
    return replace(batch, weights=weights, runs=torch.tensor(list(part)))
