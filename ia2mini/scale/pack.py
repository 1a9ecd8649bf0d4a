"""Rows of R runs in batches with little padding: packed into one line, or apart by their length.

R runs, B rows a run, T tokens.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch

from ..batch import Batch, Row, by_length, collate
from ..models.attention import Packed

MOST_TOKENS = 512  # of a line: its attention is computed whole
WORTH_IT = 0.8  # packed when the longest line has at most this share of a run's padded tokens
TOGETHER = 4096  # tokens that are always one batch, with their padding
FAR = 2  # times the median length: a longer row leaves the batch where that is mostly padding


def pack(batch: Batch) -> Batch:
    """The batch, on the CPU, with the rows of each run in one line [R, T] where that is worth it; else as it is."""
    R, B = batch.lengths.shape
    totals = batch.lengths.sum(1)
    padded_tokens = B * batch.ids.shape[1]
    if totals.max() > min(MOST_TOKENS, WORTH_IT * padded_tokens):
        return batch
    starts = batch.lengths.cumsum(1) - batch.lengths  # [R, B], where a row begins in its line
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[..., None]  # [R, B, T]
    run, row, place = real.nonzero(as_tuple=True)
    target = run, starts[run, row] + place
    ids = torch.zeros(R, int(totals.max()), dtype=torch.int64)
    documents = torch.full_like(ids, -1)
    places = torch.zeros_like(ids)
    ids[target] = batch.ids.view(R, B, -1)[real]
    documents[target] = row
    places[target] = place
    rows, columns = batch.at
    at = rows // B, columns + starts.flatten()[rows]
    return replace(batch, ids=ids, at=at, packed=Packed(documents, places))


def in_one_batch(runs: list[list[Row]]) -> list[Batch]:
    """A `collate` hook: one packed batch with `Batch.rows`."""
    return [pack(collate(runs, by_row=True))]


def in_batches(runs: list[list[Row]]) -> list[Batch]:
    """A `collate` hook: one packed batch or, where most of it would be padding, several whose losses add up to its own.

    Rows of more than `FAR` times the median length leave it, and are batched with one another.
    """
    lengths = [len(row) for rows in runs for row in rows]
    padded = len(runs) * max(map(len, runs)) * max(lengths)
    longest_line = max(sum(map(len, rows)) for rows in runs)
    if longest_line <= MOST_TOKENS or padded <= max(TOGETHER, FAR * sum(lengths)):
        return [pack(collate(runs))]
    usual = FAR * float(np.median(lengths))
    short = defaultdict(list)
    long = []
    for r, rows in enumerate(runs):
        for row in rows:
            if len(row) <= usual:
                short[r].append(row)
            else:
                long.append((r, row))
    parts = [short]
    for group in by_length([len(row) for _, row in long], TOGETHER):
        part = defaultdict(list)
        for i in group:
            r, row = long[i]
            part[r].append(row)
        parts.append(part)
    return [portion(runs, part) for part in parts if part]


def portion(runs: list[list[Row]], part: dict[int, list[Row]]) -> Batch:
    """The rows `part` of some of the runs; their weights are as among all rows of their run."""
    batch = pack(collate(list(part.values())))
    shares = torch.tensor([len(rows) / len(runs[r]) for r, rows in part.items()])
    return replace(batch, weights=batch.weights * shares[:, None], runs=torch.tensor(list(part)))
