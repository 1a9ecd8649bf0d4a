"""What `fit` ships: the learning rate, the number of epochs, the temperature and the method, by held-out rows alone.

n rows, F folds, C labels (1 of texts: the true answer's own log-probability). Every choice that a fold's rows are
judged by is made on the rows of the other folds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..intervals import surely_more, surely_positive
from ..metrics import fit_temperature, row_losses

# always says the most frequent label, with the labels' frequencies as probabilities
COMMONEST = "commonest"
MATTERS = 0.01  # nats: a smaller difference of mean losses is none
UNSHIPPED = ("base", COMMONEST)  # what a candidate must beat


@dataclass
class Tried:
    """What one way to answer says of held-out rows after every epoch at every learning rate."""

    name: str
    # [epochs, rates, n, C] log-probabilities; -inf: the run had failed, NaN: training had ended
    scores: Tensor
    right: Tensor | None = None  # [n] of texts alone: whether the generated answer is the true one


@dataclass
class Candidate:
    """One way to answer some held-out rows [m], each by the choices that the other folds' rows make."""

    name: str
    scores: Tensor  # [m, C] log-probabilities
    losses: Tensor  # [m] negative log-likelihood of the true answer, at `temperatures`
    right: Tensor  # [m] whether the answer is the true one
    temperatures: Tensor | None = None  # [m] that each row is judged with; None: 1
    temperature: float = 1.0  # by all m rows: what is shipped
    epoch: int = 0  # index of the epoch, and of the rate, by all m rows
    rate: int = 0
    # fold -> epoch and rate that its rows are judged with
    picks: dict[int, tuple[int, int]] | None = None
    # mean loss at temperature 1, and at those of the other folds
    calibration: tuple[float, float] | None = None


def best_epoch(curve: list[float], patience: int) -> int:
    """Index of the last loss that was lower by what matters, until `patience` epochs in a row have brought none."""
    best = 0
    for epoch, loss in enumerate(curve):
        if loss < curve[best] - MATTERS:
            best = epoch
        if epoch - best >= patience:
            break
    return best


@dataclass
class Selection:
    """The choices, on held-out rows that are dealt into folds."""

    folds: list[list[int]]  # rows of each
    gold: Tensor  # [n] index of the true label
    patience: int
    calibrate: bool  # whether a temperature may be fitted

    def rows(self, folds: list[int]) -> list[int]:
        return sorted(row for fold in folds for row in self.folds[fold])

    def others(self, fold: int, within: list[int]) -> list[int]:
        """The rows of the other folds; a single fold has only its own."""
        return self.rows([other for other in within if other != fold] or [fold])

    def pick(self, losses: Tensor, rows: list[int]) -> tuple[int, int]:
        """Epoch and rate (indices) of the lowest mean loss over `rows`, of losses [epochs, rates, n]."""
        means = losses[:, :, rows].mean(-1)
        found = []
        for rate, curve in enumerate(means.T.tolist()):
            epoch = best_epoch(curve, self.patience)
            found.append((curve[epoch], epoch, rate))
        _, epoch, rate = min(found, key=lambda each: each[0])
        return epoch, rate

    def losses(self, tried: Tried) -> Tensor:
        """[epochs, rates, n], infinite where the run of any fold had failed or training had ended."""
        losses = row_losses(tried.scores, self.gold)
        gone = ~tried.scores.isfinite().all(-1).all(-1)
        losses[gone] = math.inf
        return losses

    def judge(self, tried: Tried, within: list[int]) -> Candidate:
        """A way to answer, on the rows of the folds `within` and by nothing but these rows."""
        losses, scores = self.losses(tried), tried.scores[0, 0].clone()
        picks = {}
        for fold in within:
            epoch, rate = self.pick(losses, self.others(fold, within))
            picks[fold] = epoch, rate
            scores[self.folds[fold]] = tried.scores[epoch, rate, self.folds[fold]]
        rows = self.rows(within)
        temperatures, temperature, calibration = self.heat(scores, within)
        judged = row_losses(scores, self.gold, temperatures[:, None])[rows]
        right = scores.argmax(-1) == self.gold if tried.right is None else tried.right
        epoch, rate = self.pick(losses, rows)
        about = temperatures[rows], temperature, epoch, rate, picks, calibration
        return Candidate(tried.name, scores[rows], judged, right[rows], *about)

    def heat(
        self, scores: Tensor, within: list[int]
    ) -> tuple[Tensor, float, tuple[float, float] | None]:
        """Temperatures [n] of the rows and the one to ship; 1 where those of the other folds lower no mean loss.

        Also the mean loss at 1 and at the other folds' temperatures; None where none were fitted.
        """
        temperatures = torch.ones(len(scores))
        if not self.calibrate or scores.shape[1] == 1:
            return temperatures, 1.0, None
        rows = self.rows(within)
        for fold in within:
            others = self.others(fold, within)
            temperatures[self.folds[fold]] = fit_temperature(scores[others], self.gold[others])
        before = row_losses(scores, self.gold)[rows].mean().item()
        after = row_losses(scores, self.gold, temperatures[:, None])[rows].mean().item()
        if after < before:
            return temperatures, fit_temperature(scores[rows], self.gold[rows]), (before, after)
        return torch.ones(len(scores)), 1.0, (before, after)

    def commonest(self, labels: int, within: list[int]) -> Candidate:
        """Always the most frequent label of these rows, with the labels' frequencies among them as probabilities.

        Not the frequencies of the other folds' rows: a held-out row's label is rarer among these, so that on balanced
        rows they would be worse than chance.
        """
        gold = self.gold[self.rows(within)]
        shares = torch.bincount(gold, minlength=labels) / len(gold)
        scores = shares.log().clamp_min(-100).expand(len(gold), -1)
        return Candidate(
            COMMONEST, scores, -scores[range(len(gold)), gold], gold == shares.argmax()
        )

    def judged(self, tried: list[Tried], within: list[int]) -> dict[str, Candidate]:
        """All candidates on the rows of these folds; of labels also the commonest."""
        found = {each.name: self.judge(each, within) for each in tried}
        labels = tried[0].scores.shape[-1]
        if labels > 1:
            found[COMMONEST] = self.commonest(labels, within)
        return found

    def shipped(self, tried: list[Tried]) -> tuple[Candidate, list[str]]:
        """What the whole rule is worth: each fold's rows by what it chooses on the other folds; that choice a fold."""
        every = range(len(self.folds))
        scores = tried[0].scores[0, 0].clone()
        losses, right = torch.zeros(len(scores)), torch.zeros(len(scores), dtype=torch.bool)
        chosen = []
        for fold in every:
            found = self.judged(tried, [other for other in every if other != fold])
            chosen.append(choose(found))
            candidate = found[chosen[-1]]
            source = next(each for each in tried if each.name == candidate.name)
            rows = self.folds[fold]
            said = source.scores[candidate.epoch, candidate.rate, rows]
            losses[rows] = row_losses(said, self.gold[rows], candidate.temperature)
            right[rows] = (
                said.argmax(-1) == self.gold[rows] if source.right is None else source.right[rows]
            )
            scores[rows] = said / candidate.temperature
        return Candidate("shipped", scores, losses, right), chosen


def surely_better(one: Candidate, other: Candidate, labels: bool) -> bool:
    """Whether the mean loss is lower by more than what matters, and that is no chance (one-sided, 5 %).

    By Student's t test of the rows' losses or, of labels, by the sign test of the rows on which only one is right: a
    few rows that it is sure of and wrong spread the losses so far that t sees nothing.
    """
    gained = other.losses - one.losses - MATTERS
    if surely_positive(gained.tolist()):
        return True
    more = int((one.right & ~other.right).sum())
    less = int((other.right & ~one.right).sum())
    return labels and bool(gained.mean() > 0) and surely_more(more, less)


def may_be_shipped(candidate: Candidate, found: dict[str, Candidate]) -> bool:
    """Whether it is surely better than the base and than the commonest label, as `choose` says."""
    labels = COMMONEST in found
    for name in UNSHIPPED if labels else ("base",):
        if not surely_better(candidate, found[name], labels):
            return False
        more = int(candidate.right.sum()) - int(found[name].right.sum())
        if more < 0 or (more == 0 and not labels):
            return False
    return True


def choose(found: dict[str, Candidate]) -> str:
    """What to ship, of candidates on the same rows; "base": nothing.

    Only what is surely better than the base and than the commonest label, and right on no fewer rows than either; of
    texts on more rows than the base. Of these the adapter with the lowest loss; demonstrations ("icl") where no adapter
    is among them, or where they are surely better than that one.
    """
    means = {}
    for name, candidate in found.items():
        if name not in UNSHIPPED and may_be_shipped(candidate, found):
            means[name] = candidate.losses.mean().item()
    adapters = [name for name in means if name != "icl"]
    if not adapters:
        return "icl" if "icl" in means else "base"
    best = min(adapters, key=means.__getitem__)
    if "icl" in means and surely_better(found["icl"], found[best], COMMONEST in found):
        return "icl"
    return best
