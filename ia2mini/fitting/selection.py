"""What `fit` ships: a setting of each method, the temperature and the method, by held-out rows alone.

n rows, F folds, S settings of a method (its learning rates, or a probe's penalties), C labels (1 of texts: the true
answer's own log-probability). Every choice that a fold's rows are judged by is made on the rows of the other folds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine.intervals import surely_more, surely_positive
from ..metrics import fit_temperature, row_losses
from .measures import log_frequencies

# always says the most frequent label, with the labels' frequencies as probabilities
COMMONEST = "commonest"
SIGNIFICANCE = 0.1  # the level of the one-sided tests
LEAST_GAIN = 0.01  # nats: a smaller difference of mean losses is none
BASELINES = ("base", COMMONEST)  # what a candidate must beat
# adapters that are taken first, because few rows cannot rank them: these did best on public data (docs/results.md)
PREFERRED = ("hidden-sft", "ia2-sft")
# no adapter that peft loads, or demonstrations at every query
SECOND_CHOICE = ("probe", "icl", "icl-sft")


@dataclass
class HeldOut:
    """The scores of held-out rows by one candidate, at each of its settings."""

    name: str
    scores: Tensor  # [S, n, C] log-probabilities; -inf: training has failed
    troubles: list[str] = field(default_factory=list)  # sentences about runs that failed
    # of texts alone: the generated answers [n], how sure each is, and whether it is the true one. A fold's answers are
    # generated once, at the learning rate that all other folds choose, also where fewer folds judge them
    texts: list[str] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    right: Tensor | None = None


@dataclass
class Candidate:
    """A candidate on some held-out rows [m]. Its setting and temperature for a row come from the other folds."""

    name: str
    scores: Tensor  # [m, C] log-probabilities
    losses: Tensor  # [m] negative log-likelihood of the true answer, at `temperatures`
    right: Tensor  # [m] whether the answer is the true one
    temperatures: Tensor | None = None  # [m] that each row is judged with; None: 1
    temperature: float = 1.0  # by all m rows: what is shipped
    setting: int = 0  # index of the setting, by all m rows
    # mean loss at temperature 1, and at those of the other folds
    calibration: tuple[float, float] | None = None


@dataclass
class Selection:
    """Chooses settings, temperatures and the candidate to ship, from held-out rows in folds."""

    test_rows: list[list[int]]  # indices of the rows that each fold holds out
    gold: Tensor  # [n] index of the true label
    calibrate: bool  # whether a temperature may be fitted

    def rows(self, folds: Sequence[int]) -> list[int]:
        return sorted(row for fold in folds for row in self.test_rows[fold])

    def others(self, fold: int, within: Sequence[int]) -> list[int]:
        """The rows of the other folds; for a single fold its own."""
        return self.rows([other for other in within if other != fold] or [fold])

    def losses(self, held_out: HeldOut) -> Tensor:
        """Losses [S, n]; infinite at a setting that failed in any fold."""
        losses = row_losses(held_out.scores, self.gold)
        failed = ~held_out.scores.isfinite().all(-1).all(-1)
        losses[failed] = math.inf
        return losses

    def picks(self, losses: Tensor, within: Sequence[int]) -> dict[int, int]:
        """fold -> setting that its rows are judged with, by the `losses` [S, n] of the other folds `within`."""
        picks = {}
        for fold in within:
            others = self.others(fold, within)
            picks[fold] = int(losses[:, others].mean(1).argmin())
        return picks

    def judge(self, held_out: HeldOut, within: Sequence[int]) -> Candidate:
        """A candidate on the rows of the folds `within`, judged by these rows alone."""
        losses = self.losses(held_out)
        scores = held_out.scores[0].clone()  # rows outside `within` are not read
        for fold, setting in self.picks(losses, within).items():
            test = self.test_rows[fold]
            scores[test] = held_out.scores[setting, test]
        temperatures, temperature, calibration = self.fit_temperatures(scores, within)
        all_losses = row_losses(scores, self.gold, temperatures[:, None])
        rows = self.rows(within)
        return Candidate(
            name=held_out.name,
            scores=scores[rows],
            losses=all_losses[rows],
            right=self.right(held_out, scores[rows], rows),
            temperatures=temperatures[rows],
            temperature=temperature,
            setting=int(losses[:, rows].mean(1).argmin()),
            calibration=calibration,
        )

    def right(self, held_out: HeldOut, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Whether each row's answer is the true one: the generated text, else the likeliest label of `scores`."""
        if held_out.right is not None:
            return held_out.right[rows]
        return scores.argmax(-1) == self.gold[rows]

    def fit_temperatures(
        self, scores: Tensor, within: Sequence[int]
    ) -> tuple[Tensor, float, tuple[float, float] | None]:
        """Temperatures [n] of the rows and the one to ship; 1 where those of the other folds lower no mean loss.

        Also the mean loss at 1 and at the other folds' temperatures; None where none were fitted.
        """
        ones = torch.ones(len(scores))
        if not self.calibrate or scores.shape[1] == 1:
            return ones, 1.0, None
        rows = self.rows(within)
        temperatures = ones.clone()
        for fold in within:
            others = self.others(fold, within)
            temperatures[self.test_rows[fold]] = fit_temperature(scores[others], self.gold[others])
        before = row_losses(scores, self.gold)[rows].mean().item()
        after = row_losses(scores, self.gold, temperatures[:, None])[rows].mean().item()
        if after < before:
            return temperatures, fit_temperature(scores[rows], self.gold[rows]), (before, after)
        return ones, 1.0, (before, after)

    def commonest(self, labels: int, within: Sequence[int]) -> Candidate:
        """Always the most frequent label of these rows, with the labels' frequencies among them as probabilities.

        Not the frequencies of the other folds' rows: a held-out row's label is rarer among these, so that on balanced
        rows they would be worse than chance.
        """
        gold = self.gold[self.rows(within)]
        frequencies = log_frequencies(gold, labels)
        scores = frequencies.expand(len(gold), -1)
        return Candidate(
            COMMONEST, scores, losses=-frequencies[gold], right=gold == frequencies.argmax()
        )

    def candidates(
        self, held_out: dict[str, HeldOut], within: Sequence[int]
    ) -> dict[str, Candidate]:
        """All candidates on the rows of these folds; for labels also the commonest one."""
        found = {name: self.judge(one, within) for name, one in held_out.items()}
        labels = held_out["base"].scores.shape[-1]
        if labels > 1:
            found[COMMONEST] = self.commonest(labels, within)
        return found

    def judge_the_choice(self, held_out: dict[str, HeldOut]) -> tuple[Candidate, list[str]]:
        """Nested cross-validation: each fold's rows by what `choose` takes on the other folds; its choice for each."""
        every = range(len(self.test_rows))
        scores = torch.empty_like(held_out["base"].scores[0])
        losses = torch.zeros(len(scores))
        right = torch.zeros(len(scores), dtype=torch.bool)
        choices = []
        for fold in every:
            found = self.candidates(held_out, [other for other in every if other != fold])
            name = choose(found)
            choices.append(name)
            candidate = found[name]
            rows = self.test_rows[fold]
            chosen_scores = held_out[name].scores[candidate.setting, rows]
            losses[rows] = row_losses(chosen_scores, self.gold[rows], candidate.temperature)
            scores[rows] = chosen_scores / candidate.temperature
            right[rows] = self.right(held_out[name], chosen_scores, rows)
        return Candidate("shipped", scores, losses, right), choices


def significantly_better(one: Candidate, other: Candidate, of_labels: bool) -> bool:
    """Whether the mean loss is lower by more than `LEAST_GAIN`, and significantly (one-sided, `SIGNIFICANCE`).

    By Student's t test of the rows' losses or, of labels, by the sign test of the rows on which only one is right: a
    few rows that it is sure of and wrong spread the losses so far that t sees nothing.
    """
    if has_lower_loss(one, other):
        return True
    gained = (other.losses - one.losses).mean()
    if not of_labels or gained <= LEAST_GAIN:
        return False
    more, less = right_alone(one, other)
    return surely_more(more, less, SIGNIFICANCE)


def has_lower_loss(one: Candidate, other: Candidate) -> bool:
    """Whether the mean loss is significantly lower by more than `LEAST_GAIN`, by Student's t test."""
    gained = other.losses - one.losses - LEAST_GAIN
    return surely_positive(gained.tolist(), SIGNIFICANCE)


def right_alone(one: Candidate, other: Candidate) -> tuple[int, int]:
    """On how many rows only `one` is right, and on how many only `other`."""
    more = int((one.right & ~other.right).sum())
    less = int((other.right & ~one.right).sum())
    return more, less


def may_be_shipped(candidate: Candidate, candidates: dict[str, Candidate]) -> bool:
    """Whether a candidate has learned something and is better than the base.

    Of labels it is significantly better than the commonest one, has a lower loss than the base, and is right on no
    fewer rows than either: few rows cannot prove more. A probe, or what needs demonstrations in the prompt ("icl",
    "icl-sft"), is significantly better than the base, too. Of texts, where nothing shows that it has learned at all, it
    is significantly better than the base and right on more rows.
    """
    base = candidates["base"]
    right = int(candidate.right.sum())
    of_labels = COMMONEST in candidates
    # Texts have no commonest answer to compare with.
    if not of_labels:
        more_right = right > int(base.right.sum())
        return more_right and significantly_better(candidate, base, of_labels)
    # What peft cannot load, or costs tokens at every query, must be significantly better than the base.
    if candidate.name in SECOND_CHOICE and not significantly_better(candidate, base, of_labels):
        return False
    # Its loss must be lower than the base's.
    if (base.losses - candidate.losses).mean() <= LEAST_GAIN:
        return False
    # It must have learned more than how frequent the labels are.
    if not significantly_better(candidate, candidates[COMMONEST], of_labels):
        return False
    # A lower loss with fewer right answers is only better calibration.
    return right >= max(int(candidates[name].right.sum()) for name in BASELINES)


def choose(candidates: dict[str, Candidate]) -> str:
    """What to ship, of candidates on the same rows; "base": nothing.

    Of those that `may_be_shipped` it is the first by `preference`, or what is significantly better than that.
    """
    allowed = {}
    for name, candidate in candidates.items():
        if name not in BASELINES and may_be_shipped(candidate, candidates):
            allowed[name] = candidate
    if not allowed:
        return "base"
    best = min(allowed, key=lambda name: preference(allowed[name]))
    for name in allowed:
        if significantly_better(allowed[name], allowed[best], COMMONEST in candidates):
            best = name
    return best


def preference(candidate: Candidate) -> tuple[int, float]:
    """The lowest is taken first: `PREFERRED` adapters, then others, then `SECOND_CHOICE`; of equals the lower loss."""
    group = len(PREFERRED)
    if candidate.name in PREFERRED:
        group = PREFERRED.index(candidate.name)
    elif candidate.name in SECOND_CHOICE:
        group = len(PREFERRED) + 1
    return group, candidate.losses.mean().item()
