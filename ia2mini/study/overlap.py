"""Overlap of the column spaces of two methods' updates (paper section 5.2, Figure 4)."""

from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor

from ..adapters import LoRA, unpack
from ..train import Trained
from .cells import Cell
from .records import cell_fields


def subspace_overlap(delta1: Tensor, delta2: Tensor, rank: int) -> Tensor:
    """||U1^T U2||_F^2 / rank [...], from 0 to 1: overlap of two updates' columns (paper section 5.2, Figure 4).

    U is the basis of the first `rank` left singular vectors. delta [..., out, r] is LoRA's B, or [..., out, in] its
    product BA, which spans the same columns when A has full row rank. A zero update overlaps by 0.
    """
    bases = []
    for delta in (delta1, delta2):
        u, s, _ = torch.linalg.svd(delta.double(), full_matrices=False)
        kept = s > s[..., :1] * 1e-6  # float32's rounding is not a direction
        basis = u * kept.unsqueeze(-2)
        bases.append(basis[..., :rank])
    shared = bases[0].mT @ bases[1]
    return shared.square().sum((-2, -1)) / rank


def overlaps(
    cell: Cell, trained: dict[str, Trained], chosen_runs: dict[str, list[int]]
) -> list[dict]:
    """Share of LoRA's subspace that two chosen methods have in common by set (paper Figure 4), and that of chance."""
    adapter = cell.study.adapter
    if not isinstance(adapter, LoRA):
        return []
    weights = {
        method: unpack(trained[method].theta[runs].cpu(), adapter.shapes)
        for method, runs in chosen_runs.items()
    }
    names = [name for name in adapter.shapes if name.endswith(".B")]
    chance = fmean(adapter.rank / adapter.shapes[name][0] for name in names)
    records = []
    for one, other in combinations(chosen_runs, 2):
        shared = [
            subspace_overlap(weights[one][name], weights[other][name], adapter.rank).tolist()
            for name in names
        ]
        by_set = [fmean(values) for values in zip(*shared)]  # over matrices
        record = cell_fields(cell)
        record["adapter"] = cell.study.options.adapter_name
        record["methods"] = [one, other]
        record["overlap"] = by_set
        record["mean"] = fmean(by_set)
        record["chance"] = chance
        records.append(record)
    return records
