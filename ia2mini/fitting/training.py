"""The training of a fit: every method at every learning rate on every fold, then the chosen one on all rows.

Every phase trains for a fixed number of epochs: no row decides when to stop.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from torch import Tensor

from .. import UsageError
from ..engine.experiment import in_order, make_trainer
from ..engine.options import TUNED, last_phase, losses_of, need_teacher
from ..episode import Episode, seeded
from ..methods import METHODS, STARTS_FROM, Grid
from ..models.taps import device_of
from ..scale import ranks
from ..scale.decode import fast_decoding
from ..scale.graphs import recorded
from ..scale.pack import in_batches
from ..teacher import Taught, TeacherSettings, teach, true_rows
from ..train import Hooks, Settings, State, Trained
from .crossval import CrossValidation, before_unlabelled, choose_demonstrations, mean_tokens
from .folds import demonstrations_among
from .selection import Candidate

SOFT_K = 1024  # likeliest tokens of a distribution that is matched


@dataclass
class TaughtFolds:
    """All folds after the teacher's pass, at all learning rates."""

    grid: Grid
    estimate: str  # how long all training will take; "" once a progress bar has said it


def train_folds(cv: CrossValidation) -> dict[str, Trained]:
    """The R runs of each method: every fold at every learning rate. The teacher runs only if a result is missing."""
    taught_folds = cache(partial(teach_folds, cv))
    trained: dict[str, Trained] = {}
    for method in in_order(cv.options.methods):
        start = trained.get(STARTS_FROM.get(method, ""))
        make = partial(train_on_folds, cv, taught_folds, method, start)
        kept = dict(cv.cached(f"fit-{method}", make))
        kept["theta"] = kept["theta"].to(device_of(cv.subject.model))
        trained[method] = Trained(**kept)
    return trained


def train_on_folds(
    cv: CrossValidation,
    taught_folds: Callable[[], TaughtFolds],
    method: str,
    start: Trained | None,
) -> dict[str, Tensor]:
    """The fields of `Trained` of one method."""
    taught = taught_folds()
    trained = train_phase(cv, taught.grid, cv.folds[0], method, start, taught.estimate)
    taught.estimate = ""
    return vars(trained)


def teach_folds(cv: CrossValidation) -> TaughtFolds:
    """Every fold after the teacher's pass over it, and how long training will take."""
    grid = make_grid(cv, teach_episodes(cv, cv.folds, cv.options.methods), cv.rates)
    return TaughtFolds(grid, estimate(cv, grid))


def teach_episodes(
    cv: CrossValidation, episodes: Sequence[Episode], methods: tuple[str, ...]
) -> list[Taught]:
    """What the methods train on in each episode: the true answers and, if needed, the teacher's pass."""
    subject = cv.subject
    demonstrated = TUNED in methods
    if not need_teacher(methods):
        of_text = cv.max_tokens > 1
        return [true_rows(subject.tokenizer, one, of_text, demonstrated) for one in episodes]
    needed = losses_of(methods)
    settings = TeacherSettings(
        max_tokens=cv.max_tokens,
        soft_k=SOFT_K if "soft" in needed else None,
        layers=cv.layers,
        stop=cv.stop,
        residual="hidden" in needed,
        demonstrated=demonstrated,
        hooks=fast_decoding(device_of(subject.model), cv.max_tokens),
    )
    queries = sum(len(episode.demonstrations) for episode in episodes)
    with cv.bar("collecting", queries) as bar:

        def teach_one(episode: Episode) -> Taught:
            return teach(
                subject.model, subject.tokenizer, episode, settings=settings, watch=bar.update
            )

        return ranks.spread(teach_one, episodes)


def make_grid(cv: CrossValidation, sets: list[Taught], rates: Sequence[float]) -> Grid:
    """Every taught episode at every learning rate."""
    options = cv.options
    return Grid(
        model=cv.subject.model,
        adapter=cv.adapter,
        sets=sets,
        rates=rates,
        seed=options.seed,
        settings=Settings(options.batch_size, options.epochs, layers=cv.layers),
        trainer=make_trainer(None),
    )


def estimate(cv: CrossValidation, grid: Grid) -> str:
    """How long all training will take, from one timed step of SFT."""
    one_step = replace(grid.settings, steps=1)
    grid = replace(grid, settings=one_step, hooks=Hooks(in_batches))
    METHODS["sft"](grid)  # the first is slower
    begun = time.perf_counter()
    METHODS["sft"](grid)
    seconds = time.perf_counter() - begun
    tokens = mean_tokens(cv)
    steps = 0.0  # of SFT, which take as long as all phases do
    for method in in_order(cv.options.methods):
        longer = tokens["icl"] / tokens["query"] if method == TUNED else 1.0
        steps += longer * count_steps(cv, cv.folds[0], method)
    final = 1 + 2 / len(cv.rates) / len(cv.folds)  # then the chosen one on all rows
    return f" (all training: about {duration(seconds * steps * final)})"


def count_steps(cv: CrossValidation, episode: Episode, method: str) -> int:
    """Number of steps of a method's last phase on an episode."""
    rows = len(episode.train)
    if last_phase(method) != "sft":
        rows += len(episode.unlabelled)
    return cv.options.epochs * math.ceil(rows / cv.options.batch_size)


def train_phase(
    cv: CrossValidation,
    grid: Grid,
    episode: Episode,
    method: str,
    start: Trained | None,
    estimate: str = "",
) -> Trained:
    """Train one method on a grid of episodes as long as this one. `start`: its first phase, if it has one."""
    with cv.bar(f"training {method}{estimate}", count_steps(cv, episode, method)) as bar:

        def after_evaluation(state: State) -> bool:
            bar.update(state.step - bar.n)
            return False

        record = partial(recorded, device=device_of(cv.subject.model))
        grid = replace(grid, hooks=Hooks(in_batches, record, after_evaluation))
        if start is None:
            return METHODS[method](grid)
        return METHODS[method](grid, start)


def train_final(cv: CrossValidation, candidate: Candidate) -> Tensor:
    """Weights [1, M] of a candidate, trained on every row at its learning rate. Raises UsageError if it diverges."""
    rows = cv.rows
    rate = cv.rates[candidate.setting]
    number = len(cv.folds)  # draws that no fold has made
    choose = partial(choose_demonstrations, cv)
    rng = seeded(cv.options.seed, number, "final")
    episode = Episode(
        train=rows,
        dev=[],
        demonstrations=demonstrations_among(rows, choose, rng),
        icl=[],
        unlabelled=cv.unlabelled,
        more_demonstrations=before_unlabelled(cv, number, rows),
    )
    methods = (candidate.name,)
    grid = make_grid(cv, teach_episodes(cv, [episode], methods), [rate])
    trained = None
    for method in in_order(methods):
        trained = train_phase(cv, grid, episode, method, trained)
    if not trained.theta.isfinite().all():
        mend = "use lower --rates or --dtype float32"
        raise UsageError(
            f"{candidate.name} at rate {rate:g} diverged when trained on every row; {mend}"
        )
    return trained.theta


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
