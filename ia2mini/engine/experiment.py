"""Teach and train all episodes × learning rates on one frozen model; every result is kept in the store."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .. import UsageError
from ..adapters import IA3, TARGETS, Adapter, LoRA, adapted
from ..episode import Episode
from ..methods import ICL, METHODS, STARTS_FROM, TRUTH, Grid, configs
from ..models.taps import device_of
from ..scale import ranks
from ..scale.graphs import launch_bound, recorded
from ..scale.memory import within_memory
from ..scale.pack import in_batches
from ..scale.parts import over_ranks
from ..scale.race import Race
from ..scale.shrink import shrinking
from ..teacher import Taught, TeacherSettings, balanced, teach, true_rows
from ..train import Hooks, Settings, State, Trained, train
from .options import ICL_SFT, AdapterOptions, last_phase, matrices, need_teacher
from .progress import Progress
from .store import Store
from .subject import Subject


def make_trainer(side_by_side: int | None = None) -> Callable:
    """The training loop with all its wrappers from scale/; `side_by_side`: runs trained at once (None: all)."""
    trainer = within_memory(shrinking(train, launch_bound), side_by_side)
    return over_ranks(trainer) if ranks.size > 1 else trainer


def make_adapter(model: nn.Module, options: AdapterOptions, scale_inputs: bool = False) -> Adapter:
    """The adapter that the options describe. Raises UsageError for targets that the model lacks."""
    targets = matrices(options.targets) or TARGETS
    if options.adapter == "ia3":
        return IA3(model, targets, scale_inputs=scale_inputs)
    return LoRA(model, targets, rank=options.rank, alpha=options.alpha)


def in_order(methods: tuple[str, ...], tuned: bool = False) -> list[str]:
    """The methods to train, in order: each after the phase that it starts from, a tuned teacher first."""
    found = [ICL_SFT] if tuned else []
    for method in methods:
        if method in STARTS_FROM:
            found.append(STARTS_FROM[method])
        if method in METHODS:
            found.append(method)
    return list(dict.fromkeys(found))


@dataclass
class Experiment:
    """What to teach and train, and where to keep the results."""

    name: str  # of its folder in the store
    subject: Subject
    adapter: Adapter
    episodes: list[Episode]  # all without dev rows, or none
    methods: list[str]  # to train, in order (`in_order`)
    rates: tuple[float, ...]
    seed: int
    settings: Settings
    teacher_settings: TeacherSettings
    store: Store
    progress: Progress
    betas: tuple[float, ...] = (0.5,)
    labels: str = TRUTH  # what cross-entropy trains on: TRUTH or ICL
    tuned: bool = False  # the teacher is the model as `ICL_SFT` has trained it, else the base
    racing: bool = False  # whether hopeless learning rates stop early
    balanced: bool = False  # whether every answer weighs the same in cross-entropy
    collate: Callable = in_batches  # `Hooks.collate`
    trainer: Callable = field(default_factory=make_trainer)

    @property
    def has_teacher(self) -> bool:
        """Whether a method learns from what the teacher does or answers."""
        return bool(self.methods) and (need_teacher(self.methods) or self.labels == ICL)

    @contextmanager
    def phase(self, stage: str, phase: str, total: int):
        """Count the seconds of the block towards a stage (collect, train or evaluate), under a bar."""
        with (
            self.store.stage(stage, phase),
            self.progress.phase(f"{self.name}: {phase}", total) as bar,
        ):
            yield bar

    def configs(self, method: str) -> list[tuple]:
        """(episode, learning rate, β or None) of each run of a method, in the order of the R axis."""
        return configs(method, len(self.episodes), self.rates, self.betas)

    def place(self, method: str) -> str:
        """Where the store keeps what a method has trained."""
        return f"{self.name}/fit-{method}"


def teach_all(experiment: Experiment, tuned: Trained | None = None) -> list[Taught]:
    """What the methods train on: every episode's rows with the true answers and, if needed, the teacher's pass.

    The teacher is the base, or `tuned` at its best learning rate by dev loss.
    """
    if not experiment.has_teacher:
        return true_sets(experiment)
    tokenizer = experiment.subject.tokenizer
    settings = experiment.teacher_settings
    rows = sum(len(episode.demonstrations) for episode in experiment.episodes)
    with experiment.phase("collect", "collecting", rows) as bar:

        def teach_one(number: int) -> Taught:
            episode = experiment.episodes[number]
            with teacher(experiment, tuned, number) as model:
                return teach(model, tokenizer, episode, settings=settings, watch=bar.update)

        return ranks.spread(teach_one, range(len(experiment.episodes)))


def teacher(experiment: Experiment, tuned: Trained | None, number: int) -> AbstractContextManager:
    """A context with the teacher of episode `number`: the base, or the run of `tuned` on that episode."""
    theta = None
    if tuned is not None:
        sets = len(experiment.episodes)
        weights = tuned.theta.unflatten(0, (sets, -1))  # [S, learning rates, M]
        dev_losses = tuned.dev_loss.view(sets, -1)
        rate = int(dev_losses.mean(0).argmin())
        theta = weights[number, [rate]]
    return adapted(experiment.subject.model, experiment.adapter, theta)


def true_sets(experiment: Experiment) -> list[Taught]:
    """Every episode's rows with their true answers; for `ICL_SFT` also with demonstrations in the prompt."""
    tokenizer = experiment.subject.tokenizer
    of_text = experiment.teacher_settings.max_tokens > 1
    demonstrated = ICL_SFT in experiment.methods
    return [true_rows(tokenizer, one, of_text, demonstrated) for one in experiment.episodes]


def train_all(experiment: Experiment) -> dict[str, Trained]:
    """Train every method at every learning rate on every episode. Kept results are read.

    The teacher runs only if some are missing. Warns of runs whose dev loss was not finite. Raises
    UsageError if no learning rate of a method is left.
    """
    trained: dict[str, Trained] = {}
    taught = None
    for method in experiment.methods:
        fields = experiment.store.tensors(experiment.place(method))
        if fields is not None:
            experiment.progress.kept()
        elif method == ICL_SFT and experiment.tuned:
            fields = train_method(experiment, method, true_sets(experiment), trained)
        else:
            if taught is None:
                taught = teach_all(experiment, trained[ICL_SFT] if experiment.tuned else None)
            fields = train_method(experiment, method, taught, trained)
        fields["theta"] = fields["theta"].to(device_of(experiment.subject.model))
        trained[method] = Trained(**fields)
        if experiment.episodes[0].dev:
            warn_of_failed_runs(experiment, method, trained[method])
    if experiment.has_teacher and taught is None:
        experiment.progress.kept()  # the phase of collecting
    return trained


def train_method(
    experiment: Experiment, method: str, taught: list[Taught], trained: dict[str, Trained]
) -> dict[str, Tensor]:
    """Train one method, all its runs side by side, and keep the result: the fields of `Trained`.

    It starts from its first phase in `trained`, if it has one.
    """
    runs = experiment.configs(method)
    race = make_race(experiment, method, len(runs))
    steps = count_steps(experiment.settings, experiment.episodes[0], method)
    with experiment.phase("train", f"training {method}", steps) as bar:

        def after_evaluation(state: State) -> bool:
            bar.update(state.step - bar.n)
            going = state.dev_loss[state.going]
            if going.isfinite().any():  # there are dev rows
                losses = f"{going.min():.3g} to {going.max():.3g}"
                told = f"{len(going)} of {len(runs)} runs going, dev loss {losses}"
                bar.set_postfix_str(told, refresh=False)
            return race(state) if race else False

        record = partial(recorded, device=device_of(experiment.subject.model))
        hooks = Hooks(experiment.collate, record, after_evaluation)
        grid = make_grid(experiment, taught, hooks)
        first = STARTS_FROM.get(method)
        found = METHODS[method](grid, trained[first]) if first else METHODS[method](grid)
    return experiment.store.keep(experiment.place(method), vars(found))


def count_steps(settings: Settings, episode: Episode, method: str) -> int:
    """The most steps of a method's last phase on an episode."""
    rows = len(episode.train)
    if last_phase(method) != "sft":
        rows += len(episode.unlabelled)
    return settings.epochs * math.ceil(rows / settings.batch_size)


def make_grid(experiment: Experiment, taught: list[Taught], hooks: Hooks) -> Grid:
    """Every taught episode at every learning rate."""
    return Grid(
        model=experiment.subject.model,
        adapter=experiment.adapter,
        sets=[balanced(one) for one in taught] if experiment.balanced else taught,
        rates=experiment.rates,
        betas=experiment.betas,
        seed=experiment.seed,
        labels=experiment.labels,
        settings=experiment.settings,
        hooks=hooks,
        trainer=experiment.trainer,
    )


def make_race(experiment: Experiment, method: str, runs: int) -> Race | None:
    """Stop hopeless learning rates early, unless a later phase starts from all of them."""
    goes_on = method in [STARTS_FROM.get(later) for later in experiment.methods]
    if not experiment.racing or goes_on:
        return None
    rates = runs // len(experiment.episodes)
    return Race(torch.arange(runs) % rates)


def warn_of_failed_runs(experiment: Experiment, method: str, found: Trained) -> None:
    """Warn of the runs whose dev loss was not finite. Raises UsageError if no learning rate is left."""
    told = []
    for (number, rate, beta), trouble in zip(experiment.configs(method), troubles(found)):
        mix = "" if beta is None else f" β {beta}"
        if trouble:
            told.append(f"set {number} at rate {rate:g}{mix} {trouble}")
    finite = found.dev_loss.isfinite().view(len(experiment.episodes), -1)
    warn_of_failed(f"{experiment.name}, {method}", told, bool(finite.all(0).any()))


def troubles(trained: Trained) -> list[str]:
    """What went wrong in each run; "" where nothing did."""
    found = []
    for broken, best in zip(trained.broken.tolist(), trained.best.tolist()):
        if not broken:
            found.append("")
        elif best == 0:
            found.append(f"failed at step {broken}: no finite loss")
        else:
            found.append(f"diverged at step {broken}, kept as of step {best}")
    return found


def warn_of_failed(method: str, told: list[str], rate_left: bool) -> list[str]:
    """Warn of failed runs, a sentence of `told` for each, and return the warning.

    Raises UsageError if no learning rate is left: each failed in some set.
    """
    if not rate_left:
        failed = f"training {method} gave no rate a finite loss throughout ({told[0]}, …)"
        raise UsageError(f"{failed}; use lower --rates or --dtype float32")
    if not told:
        return []
    line = f"{method}: {'; '.join(told)}"
    warnings.warn(line, stacklevel=2)
    return [line]
