"""Held-out rows in training: every fold's runs score theirs after each epoch, and a rate that no longer gains ends."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..metrics import row_losses
from ..scale import ranks
from ..train import State, Trained
from .selection import Selection, best_epoch


class Looks:
    """An `after_look` hook of all folds × rates: keeps what each run says of its fold's held-out rows after an epoch.

    A rate trains until the mean loss of held-out rows has not improved for `patience` epochs. Each choice that is made
    later leaves out the rows of one or two folds; it waits for the mean loss over the rows of the others, too, so that
    no row decides how long what judges it may train. It trains to the end where some folds train elsewhere, in another
    process or later; no choice changes by that.
    """

    def __init__(self, score: Callable, selection: Selection, rates: int, epoch_steps: int):
        self.score = score  # (fold, weights [runs, M]) -> log-probabilities [runs, rows, C]
        self.selection = selection
        self.rates = rates
        self.epoch_steps = epoch_steps
        # of every epoch [rates, n, C]; NaN where nothing was trained
        self.scores: list[Tensor] = []
        self.subsets = self.all_but_two()

    def all_but_two(self) -> list[list[int]]:
        """The folds, and these without every one and every two of them."""
        folds = range(len(self.selection.folds))
        left_out = {frozenset((first, second)) for first in folds for second in folds}
        subsets = [[fold for fold in folds if fold not in gone] for gone in left_out]
        return [list(folds), *filter(None, subsets)]

    def __call__(self, state: State) -> bool:
        """Score the held-out rows of the runs still going, and end those of rates that no longer gain."""
        epoch = state.step // self.epoch_steps - 1
        going = state.going.nonzero()[:, 0]
        runs = state.index[going]
        folds = runs // self.rates
        rates = runs % self.rates
        theta = state.theta.detach()[going.to(state.theta.device)]
        for fold in folds.unique().tolist():
            here = folds == fold
            found = self.score(fold, theta[here.to(theta.device)])
            found = torch.where(found.isfinite().all(-1, keepdim=True), found, -torch.inf)
            self.note(epoch, rates[here], self.selection.folds[fold], found)
        goes_on = torch.tensor([self.goes_on(epoch, rate) for rate in range(self.rates)])
        state.going[going] = goes_on[rates]
        return False

    def note(self, epoch: int, rates: Tensor, rows: list[int], found: Tensor) -> None:
        while len(self.scores) <= epoch:
            shape = self.rates, len(self.selection.gold), found.shape[-1]
            self.scores.append(torch.full(shape, torch.nan))
        self.scores[epoch][rates[:, None], torch.tensor(rows)] = found

    def goes_on(self, epoch: int, rate: int) -> bool:
        """Whether a rate may still gain: on some of the rows that a choice will look at."""
        scores = torch.stack([scores[rate] for scores in self.scores[: epoch + 1]])
        losses = row_losses(scores, self.selection.gold)
        if (scores[-1] == -torch.inf).any():
            return False  # a run has failed: this epoch and later ones cannot be chosen
        if losses.isnan().any():
            return True  # the others train elsewhere
        patience = self.selection.patience
        for folds in self.subsets:
            curve = losses[:, self.selection.rows(folds)].mean(1).tolist()
            if epoch - best_epoch(curve, patience) < patience:
                return True
        return False

    def gathered(self) -> Tensor:
        """What the runs of all processes have said, [epochs, rates, n, C]."""
        parts = ranks.gather(torch.stack(self.scores) if self.scores else None)
        parts = [part for part in parts if part is not None]
        whole = torch.full_like(max(parts, key=len), torch.nan)
        for part in parts:
            known = ~part.isnan()
            whole[: len(part)][known] = part[known]
        return whole


def failures(scores: Tensor, folds: list[list[int]], epoch_steps: int) -> Trained:
    """From held-out scores [epochs, rates, n, C] which runs (folds × rates) failed after which step."""
    failed = (scores == -torch.inf).any(-1)
    known = ~scores.isnan().any(-1) & ~failed
    bad = torch.stack([failed[:, :, rows].any(-1) for rows in folds], 1).flatten(1)  # [epochs, R]
    good = torch.stack([known[:, :, rows].all(-1) for rows in folds], 1).flatten(1)
    steps = (torch.arange(len(scores))[:, None] + 1) * epoch_steps
    best = (good * steps).amax(0)
    broken = (bad * steps).amax(0)
    dev_loss = torch.where(best > 0, 0.0, torch.inf)
    return Trained(torch.zeros(0), dev_loss, torch.maximum(best, broken), best, broken)
