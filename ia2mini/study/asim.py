"""Similarity of the attention outputs of adapted models and ICL for text answers (asim, paper section 2).

R runs, S sets, L layers, P positions of a run's answers in a batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import TokenRow, by_length, collate, count_positions
from ..metrics import asim
from ..models.taps import Taps, device_of
from .evaluation import Evaluation
from .texts import with_end


def asim_of_responses(
    e: Evaluation, model: Callable, rows: list[list[TokenRow]], responses: list
) -> Tensor:
    """asim of R runs to their set's rows, [R, L]; of one run (the base) to every set's, [S, L].

    As the released scripts have it, on the runs' own responses.
    """
    pairs = max(len(rows), len(responses))  # runs come set by set
    of_a_set = pairs // len(rows)
    of_a_run = pairs // len(responses)
    compared = []
    for i in range(pairs):
        mine = rows[i // of_a_set]
        if e.options.paper_compat:
            mine = cut_rows(e, mine, responses[i // of_a_run])
        compared.append(mine)
    return layer_asim(model, compared, by_row=e.options.paper_compat)


@torch.no_grad()
def layer_asim(
    model: Callable, runs: list[list[TokenRow]], budget: int = 4096, by_row: bool = False
) -> Tensor:
    """Mean cosine similarity [R, L] of R runs' attention outputs to the `activations` of each one's rows.

    The mean is over all positions; `by_row` over those of a row, then over rows, as in the released scripts.
    """
    device = device_of(model)
    R = len(runs)
    lengths = [1 + max(map(len, rows)) for rows in zip(*runs)]  # of the same row in all runs
    total = 0
    for group in by_length(lengths, budget // R):
        rows_of_runs = [[rows[i] for i in group] for rows in runs]
        batch = collate(rows_of_runs).to(device)
        taps = Taps(batch.at)
        model(batch.ids, taps=taps, logits=False)
        similar = asim(taps.stack(), batch.activations)
        similar = similar.unflatten(1, (R, -1))  # [L, R, P / R]
        if by_row:
            means = (similar * batch.weights).sum(-1)
            total = total + means * len(group)
        else:
            real = batch.weights > 0
            total = total + (similar * real).sum(-1)
    counts = list(map(len if by_row else count_positions, runs))
    return (total / torch.tensor(counts, device=device)).T.cpu()


def summed_asim(outputs: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarities of `outputs` [L, R, n, D] to `reference` [L, S, n, D], summed over the n rows: [R, L].

    A single run is compared with every set, [S, L]; S × k runs: each k successive runs with one set.
    """
    runs = outputs.shape[1]
    sets = min(reference.shape[1], runs)
    by_set = outputs.unflatten(1, (sets, -1))  # [L, sets, runs of a set, n, D]
    similar = asim(by_set, reference[:, :, None])
    return similar.sum(-1).flatten(1).T


def cut_rows(e: Evaluation, rows: list[TokenRow], responses: list[list[int]]) -> list[TokenRow]:
    """The rows with other responses; each response is cut to the shorter of the two."""
    shortened = []
    for row, response in zip(rows, responses):
        cut = with_end(e, response)[: len(row.answer)]
        shortened.append(TokenRow(row.prompt, cut, row.activations[:, : len(cut)]))
    return shortened
