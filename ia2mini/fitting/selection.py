"""What `fit` ships: a setting of each method, the temperature and the method, by held-out rows alone.

n rows, F folds, S settings of a method (its learning rates, or a probe's penalties), C labels (1 of texts: the true
answer's own log-probability). Every choice that a fold's rows are judged by is made on the rows of the other folds.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.intervals import surely_more, surely_positive
from ..metrics import fit_temperature, row_losses

# always says the most frequent label, with the labels' frequencies as probabilities
COMMONEST = "commonest"
SURE = 0.1  # the level of the one-sided tests
MATTERS = 0.01  # nats: a smaller difference of mean losses is none
UNSHIPPED = ("base", COMMONEST)  # what a candidate must beat
NO_ADAPTER = ("probe", "icl")  # what answers without one


@dataclass
class Tried:
    """What one way to answer says of held-out rows, at each of its settings."""

    name: str
    scores: Tensor  # [S, n, C] log-probabilities; -inf: training has failed
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
    setting: int = 0  # index of the setting, by all m rows
    picks: dict[int, int] | None = None  # fold -> setting that its rows are judged with
    # mean loss at temperature 1, and at those of the other folds
    calibration: tuple[float, float] | None = None


@dataclass
class Selection:
    """The choices, on held-out rows that are dealt into folds."""

    folds: list[list[int]]  # rows of each
    gold: Tensor  # [n] index of the true label
    calibrate: bool  # whether a temperature may be fitted

    def rows(self, folds: list[int]) -> list[int]:
        return sorted(row for fold in folds for row in self.folds[fold])

    def others(self, fold: int, within: list[int]) -> list[int]:
        """The rows of the other folds; a single fold has only its own."""
        return self.rows([other for other in within if other != fold] or [fold])

    def losses(self, tried: Tried) -> Tensor:
        """[S, n], infinite at a setting that failed in any fold."""
        losses = row_losses(tried.scores, self.gold)
        failed = ~tried.scores.isfinite().all(-1).all(-1)
        losses[failed] = math.inf
        return losses

    def judge(self, tried: Tried, within: list[int]) -> Candidate:
        """A way to answer, on the rows of the folds `within` and by nothing but these rows."""
        losses = self.losses(tried)
        scores = tried.scores[0].clone()
        picks = {}
        for fold in within:
            others = self.others(fold, within)
            setting = int(losses[:, others].mean(1).argmin())
            picks[fold] = setting
            mine = self.folds[fold]
            scores[mine] = tried.scores[setting, mine]
        rows = self.rows(within)
        temperatures, temperature, calibration = self.heat(scores, within)
        right = scores.argmax(-1) == self.gold if tried.right is None else tried.right
        return Candidate(
            tried.name,
            scores[rows],
            row_losses(scores, self.gold, temperatures[:, None])[rows],
            right[rows],
            temperatures[rows],
            temperature,
            int(losses[:, rows].mean(1).argmin()),
            picks,
            calibration,
        )

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
        scores = tried[0].scores[0].clone()
        losses, right = torch.zeros(len(scores)), torch.zeros(len(scores), dtype=torch.bool)
        chosen = []
        for fold in every:
            found = self.judged(tried, [other for other in every if other != fold])
            chosen.append(choose(found))
            candidate = found[chosen[-1]]
            source = next(each for each in tried if each.name == candidate.name)
            rows = self.folds[fold]
            said = source.scores[candidate.setting, rows]
            losses[rows] = row_losses(said, self.gold[rows], candidate.temperature)
            right[rows] = (
                said.argmax(-1) == self.gold[rows] if source.right is None else source.right[rows]
            )
            scores[rows] = said / candidate.temperature
        return Candidate("shipped", scores, losses, right), chosen


def surely_better(one: Candidate, other: Candidate, labels: bool) -> bool:
    """Whether the mean loss is lower by more than what matters, and that is no chance (one-sided, `SURE`).

    By Student's t test of the rows' losses or, of labels, by the sign test of the rows on which only one is right: a
    few rows that it is sure of and wrong spread the losses so far that t sees nothing.
    """
    gained = other.losses - one.losses - MATTERS
    if surely_positive(gained.tolist(), SURE):
        return True
    more = int((one.right & ~other.right).sum())
    less = int((other.right & ~one.right).sum())
    return labels and bool(gained.mean() > 0) and surely_more(more, less, SURE)


def may_be_shipped(candidate: Candidate, found: dict[str, Candidate]) -> bool:
    """Whether it knows something and is better than the base, as `choose` says."""
    base = found["base"]
    labels = COMMONEST in found
    if not labels:
        more = int(candidate.right.sum()) > int(base.right.sum())
        return more and surely_better(candidate, base, labels)
    gained = (base.losses - candidate.losses).mean()
    if gained <= MATTERS or not surely_better(candidate, found[COMMONEST], labels):
        return False
    return all(int(candidate.right.sum()) >= int(found[name].right.sum()) for name in UNSHIPPED)


def choose(found: dict[str, Candidate]) -> str:
    """What to ship, of candidates on the same rows; "base": nothing.

    Of labels only what is surely better than the commonest one and has a lower loss than the base, and is right on no
    fewer rows than either: few rows cannot prove more. Of texts, where nothing shows that a candidate has learned at
    all, only what is surely better than the base and right on more rows. Of these the adapter with the lowest loss. A
    probe or demonstrations ("icl") where no adapter is among them, or where they are surely better than that one.
    """
    means = {}
    for name, candidate in found.items():
        if name not in UNSHIPPED and may_be_shipped(candidate, found):
            means[name] = candidate.losses.mean().item()
    adapters = [name for name in means if name not in NO_ADAPTER]
    others = [name for name in means if name in NO_ADAPTER]
    if not means:
        return "base"
    best = min(adapters or others, key=means.__getitem__)
    for name in others:
        if surely_better(found[name], found[best], COMMONEST in found):
            best = name
    return best
