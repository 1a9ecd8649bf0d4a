"""Teach and train all episodes × learning rates on one frozen model; every result is kept on disk."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from .. import UsageError
from ..adapters import Adapter, adapted
from ..episode import Episode
from ..methods import METHODS, STARTS_FROM, Grid, configs
from ..models.taps import device_of
from ..scale import ranks
from ..scale.dealt import over_ranks
from ..scale.device import then_emptied
from ..scale.graphs import launch_bound, recorded
from ..scale.memory import within_memory
from ..scale.race import Race
from ..scale.shrink import shrinking
from ..teacher import Taught, TeacherSettings, teach, true_rows
from ..train import Hooks, Settings, State, Trained, train
from .options import TUNED
from .progress import Progress
from .store import Store
from .subject import Subject


def make_trainer(side_by_side: int | None) -> Callable:
    """The training loop with all its wrappers from scale/; `side_by_side`: runs trained at once (None: all)."""
    trainer = then_emptied(within_memory(shrinking(train, launch_bound), side_by_side))
    return over_ranks(trainer) if ranks.size > 1 else trainer


def in_order(methods: tuple[str, ...], tuned: bool = False) -> list[str]:
    """The methods to train, in order: each after the phase that it starts from, a tuned teacher first."""
    found = [TUNED] if tuned else []
    for method in methods:
        if method in METHODS:
            found += [STARTS_FROM.get(method), method]
    return [method for method in dict.fromkeys(found) if method]


@dataclass
class Experiment:
    """What to teach and train, and where to keep the results."""

    name: str  # of its folder in the store
    subject: Subject
    adapter: Adapter
    episodes: list[Episode]
    methods: list[str]  # to train, in order (`in_order`)
    rates: tuple[float, ...]
    betas: tuple[float, ...]
    seed: int
    labels: str  # what cross-entropy trains on
    settings: Settings
    collate: Callable  # `Hooks.collate`
    teacher_settings: TeacherSettings
    tuned: bool  # the teacher is the model as `TUNED` has trained it, else the base
    racing: bool  # whether hopeless learning rates stop early
    trainer: Callable
    store: Store
    progress: Progress
    episode_is: str = "set"  # what messages call an episode

    @contextmanager
    def phase(self, stage: str, phase: str, total: int):
        """Count the seconds of the block towards a stage (collect, train or evaluate), under a bar."""
        with (
            self.store.stage(stage, phase),
            self.progress.phase(f"{self.name}: {phase}", total) as bar,
        ):
            yield bar


def teach_all(x: Experiment, tuned: Trained | None = None) -> list[Taught]:
    """The teacher's pass over every episode: by the base, or by `tuned` at its best learning rate by dev loss."""
    rows = sum(len(episode.demonstrations) for episode in x.episodes)
    with x.phase("collect", "collecting", rows) as bar:

        def teach_one(number: int) -> Taught:
            with teacher(x, tuned, number) as model:
                tokenizer = x.subject.tokenizer
                return teach(
                    model,
                    tokenizer,
                    x.episodes[number],
                    settings=x.teacher_settings,
                    watch=bar.update,
                )

        return ranks.spread(teach_one, range(len(x.episodes)))


def teacher(x: Experiment, tuned: Trained | None, number: int) -> AbstractContextManager:
    """A context with the teacher of episode `number`: the base, or the run of `tuned` on that episode."""
    if tuned is None:
        return nullcontext(x.subject.model)
    weights = tuned.theta.unflatten(0, (len(x.episodes), -1))  # [S, learning rates, M]
    dev_losses = tuned.dev_loss.view(len(x.episodes), -1)
    rate = int(dev_losses.mean(0).argmin())
    return adapted(x.subject.model, x.adapter, weights[number, [rate]])


def true_sets(x: Experiment) -> list[Taught]:
    """Every episode's rows with their true answers, without and with demonstrations in the prompt."""
    of_text = x.teacher_settings.max_tokens > 1
    return [true_rows(x.subject.tokenizer, one, of_text, demonstrated=True) for one in x.episodes]


def train_all(x: Experiment) -> dict[str, Trained]:
    """Train every method at every learning rate on every episode. Kept results are read.

    The teacher runs only if some are missing. Warns of runs whose loss was not finite. Raises
    UsageError if no learning rate of a method is left.
    """
    trained: dict[str, Trained] = {}
    taught = None
    for method in x.methods:
        kept = x.store.tensors(f"{x.name}/fit-{method}")
        if kept is not None:
            x.progress.kept()
        else:
            if method == TUNED and x.tuned:
                found = train_method(x, method, true_sets(x), trained)
            else:
                if taught is None:
                    taught = teach_all(x, trained[TUNED] if x.tuned else None)
                found = train_method(x, method, taught, trained)
            kept = x.store.keep(f"{x.name}/fit-{method}", vars(found))
        kept["theta"] = kept["theta"].to(device_of(x.subject.model))
        trained[method] = Trained(**kept)
        warn_of_failed_runs(x, method, trained[method])
    if x.methods and taught is None:
        x.progress.kept()
    return trained


def train_method(
    x: Experiment, method: str, taught: list[Taught], trained: dict[str, Trained]
) -> Trained:
    """Train one method, all its runs side by side, starting from its first phase if it has one."""
    runs = configs(method, len(x.episodes), x.rates, x.betas)
    race = make_race(x, method, len(runs))
    rows = len(x.episodes[0].train)
    steps = x.settings.epochs * -(-rows // x.settings.batch_size)
    with x.phase("train", f"training {method}", steps) as bar:

        def after_evaluation(state: State) -> bool:
            bar.update(state.step - bar.n)
            going = state.dev_loss[state.going]
            if len(going):
                losses = f"{going.min():.3g} to {going.max():.3g}"
                bar.set_postfix_str(
                    f"{len(going)} of {len(runs)} runs going, dev loss {losses}", refresh=False
                )
            return race(state) if race else False

        hooks = Hooks(
            x.collate, partial(recorded, device=device_of(x.subject.model)), after_evaluation
        )
        grid = Grid(
            model=x.subject.model,
            adapter=x.adapter,
            sets=taught,
            rates=x.rates,
            betas=x.betas,
            seed=x.seed,
            labels=x.labels,
            settings=x.settings,
            hooks=hooks,
            trainer=x.trainer,
        )
        first = STARTS_FROM.get(method)
        return METHODS[method](grid, trained[first]) if first else METHODS[method](grid)


def make_race(x: Experiment, method: str, runs: int) -> Race | None:
    """Stop hopeless learning rates early, unless a later phase starts from all of them."""
    goes_on = method in [STARTS_FROM.get(later) for later in x.methods]
    if not x.racing or goes_on:
        return None
    rates = runs // len(x.episodes)
    return Race(torch.arange(runs) % rates)


def warn_of_failed_runs(x: Experiment, method: str, found: Trained) -> None:
    """Warn of the runs whose loss was not finite. Raises UsageError if no learning rate is left."""
    told = []
    for name, trouble in zip(run_names(x, method), found.troubles()):
        if trouble:
            told.append(f"{name} {trouble}")
    finite = found.dev_loss.isfinite().view(len(x.episodes), -1)
    warn_of_failed(f"{x.name}, {method}", told, bool(finite.all(0).any()))


def run_names(x: Experiment, method: str) -> list[str]:
    """The names of a method's runs in messages."""
    names = []
    for number, rate, beta in configs(method, len(x.episodes), x.rates, x.betas):
        name = f"{x.episode_is} {number} at rate {rate:g}"
        names.append(name if beta is None else f"{name} β {beta}")
    return names


def warn_of_failed(method: str, told: list[str], rate_left: bool) -> list[str]:
    """Warn of failed runs, a sentence of `told` for each, and return the warning.

    Raises UsageError if no learning rate is left: each failed in some set.
    """
    if not rate_left:
        mend = "use lower --rates or --dtype float32"
        raise UsageError(
            f"training {method} gave no rate a finite loss throughout ({told[0]}, …); {mend}"
        )
    if not told:
        return []
    line = f"{method}: {'; '.join(told)}"
    warnings.warn(line, stacklevel=2)
    return [line]
