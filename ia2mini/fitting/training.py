"""The training of a fit: every method at every learning rate on every fold, then the chosen one on all rows.

Every phase trains for a fixed number of epochs: no row decides when to stop.
"""

import time
from dataclasses import replace

from torch import Tensor

from .. import UsageError
from ..engine.experiment import Experiment, count_steps, in_order, make_grid, train_all, true_sets
from ..engine.options import ICL_SFT, phases_of
from ..engine.progress import Progress
from ..episode import Episode
from ..methods import sft
from ..models.taps import device_of
from ..scale.decode import fast_decoding
from ..scale.pack import in_batches
from ..teacher import TeacherSettings
from ..train import Hooks, Trained
from .crossval import CrossValidation, episode_of_all_rows, mean_tokens
from .selection import PREFERRED, Candidate

LONG = 180  # seconds of training, above which it says what takes less
SOFT_K = 1024  # likeliest tokens of a distribution that is matched


def train_folds(cv: CrossValidation) -> dict[str, Trained]:
    """The R runs of each method: every fold at every learning rate."""
    experiment = experiment_of_folds(cv)
    last = experiment.methods[-1]
    if cv.store.tensors(experiment.place(last)) is None:
        time_a_step(cv, experiment)
    return train_all(experiment)


def experiment_of_folds(cv: CrossValidation) -> Experiment:
    return make_experiment(cv, "folds", list(cv.folds), cv.options.methods, cv.rates)


def make_experiment(
    cv: CrossValidation,
    name: str,
    episodes: list[Episode],
    methods: tuple[str, ...],
    rates: tuple[float, ...],
) -> Experiment:
    """What to teach and train in some episodes of a user's rows."""
    phases = phases_of(methods)
    teacher_settings = TeacherSettings(
        max_tokens=cv.max_tokens,
        soft_k=SOFT_K if "soft" in phases else None,
        layers=cv.settings.layers,
        stop=cv.stop,
        residual="hidden" in phases,
        demonstrated=ICL_SFT in phases,
        hooks=fast_decoding(device_of(cv.subject.model), cv.max_tokens),
    )
    return Experiment(
        name=name,
        subject=cv.subject,
        adapter=cv.adapter,
        episodes=episodes,
        methods=in_order(methods),
        rates=rates,
        seed=cv.options.seed,
        settings=cv.settings,
        teacher_settings=teacher_settings,
        store=cv.store,
        progress=Progress(cv.bar),
        balanced=cv.options.balance,
    )


def time_a_step(cv: CrossValidation, experiment: Experiment) -> None:
    """Say how long all training will take, from one timed step of SFT."""
    first_batches = []
    for taught in true_sets(experiment):
        first_batches.append(replace(taught, train=taught.train[: cv.settings.batch_size]))
    one_step = replace(experiment, settings=replace(cv.settings, epochs=1))
    grid = make_grid(one_step, first_batches, Hooks(in_batches))
    with cv.bar("timing a step", 2) as bar:
        sft(grid)  # the first is slower
        bar.update()
        begun = time.perf_counter()
        sft(grid)
        seconds = time.perf_counter() - begun
        bar.update()
        if not bar.disable:
            bar.clear()
            bar.fp.write(f"{estimate(cv, experiment.methods, seconds)}\n")


def estimate(cv: CrossValidation, methods: list[str], seconds: float) -> str:
    """How long all training takes, from the `seconds` of a step of SFT; of a long one what takes less."""
    whole = seconds * steps_of_sft(cv, methods)
    said = f"all training: about {duration(whole)}"
    preferred, *_ = PREFERRED
    if whole > LONG and preferred in methods and cv.options.methods != (preferred,):
        less = seconds * steps_of_sft(cv, in_order((preferred,)))
        said += f"; with --methods {preferred} alone {duration(less)}"
    return said


def steps_of_sft(cv: CrossValidation, methods: list[str]) -> float:
    """How many steps of SFT on all folds take as long as all training of a fit."""
    tokens = mean_tokens(cv)
    steps = 0.0
    for method in methods:
        longer = tokens["icl"] / tokens["query"] if method == ICL_SFT else 1.0
        steps += longer * count_steps(cv.settings, cv.folds[0], method)
    # all rows are one run more, after rates × folds of them; it counts twice, for alone it is slower than beside others
    final = 2 / len(cv.rates) / len(cv.folds)
    return steps * (1 + final)


def train_final(cv: CrossValidation, candidate: Candidate) -> Tensor:
    """Weights [1, M] of a candidate, trained on every row at its learning rate. Raises UsageError if it diverges."""
    rate = cv.rates[candidate.setting]
    name = f"all rows at rate {rate:g}"
    episodes = [episode_of_all_rows(cv)]
    experiment = make_experiment(cv, name, episodes, (candidate.name,), (rate,))
    theta = train_all(experiment)[candidate.name].theta
    if not theta.isfinite().all():
        diverged = f"{candidate.name} at rate {rate:g} diverged when trained on every row"
        raise UsageError(f"{diverged}; use lower --rates or --dtype float32")
    return theta


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
