"""The training loop: R runs side by side over one frozen model, each with its own learning rate, dev loss and patience.

With R = 1 this is the textbook loop. What makes it faster, or makes it fit into memory, wraps it from outside (scale/).
R runs, M weights of a run, B rows of a run in a step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, adapted
from .batch import Batch, TokenRow, collate, send
from .losses import (
    activation_mse,
    cross_entropy,
    kl_divergence,
    mean_of_run,
    own_loss,
    per_run,
)
from .models.fused import fused
from .models.taps import Taps, network_of

BETA1 = 0.9
BETA2 = 0.999
EPSILON = 1e-8
# loss -> what it compares with in a `TokenRow`
TARGETS = {"ce": "answer", "kl": "soft", "mse": "activations", "hidden": "states"}


@dataclass(frozen=True)
class Settings:
    """How long and in what portions every run trains (protocol section 4)."""

    batch_size: int = 4
    epochs: int = 50
    patience: int = 5  # evaluations of the dev loss without improvement until a run ends
    layers: list[int] | None = None  # whose attention outputs are aligned; None: all
    # keep a run's last weights, not its best: what the paper's released scripts do
    keep_last: bool = False


@dataclass
class Runs:
    """R runs to be trained: for each its first weights, learning rate, rows and the mix of its losses.

    A loss is "mse" (attention outputs), "hidden" (the residual stream; not with "mse"), "ce" (answers), "kl" (the
    teacher's distribution), or a function of one's own: `loss(student, batch) -> [R]`, where `student` is called as the
    model is and `batch` is a `Batch` of R runs.
    """

    theta: Tensor  # [R, M]
    rates: Tensor  # [R], on the CPU
    train: list[list[TokenRow]]  # R lists of equally many rows
    dev: list[list[TokenRow]]
    mix: dict[str | Callable, Tensor]  # loss -> weight [R]
    # for each run: epoch -> the order of its rows; None: as they stand
    order: Sequence[Callable[[int], list[int]]] | None = None

    def __len__(self) -> int:
        return len(self.rates)


@dataclass
class Trained:
    """What training R runs gave: weights at the best dev loss (NaN: none was finite), or the last ones."""

    theta: Tensor  # [R, M] float32
    dev_loss: Tensor  # [R] float32, the last phase's; infinite: no finite one, or none computed (no dev rows)
    steps: Tensor  # [R] int64, all phases together
    best: Tensor  # [R] int64, the last phase's steps up to these weights
    # [R] int64, the last phase's step at which a dev loss was NaN or infinite; 0: it never was
    broken: Tensor


@dataclass
class State:
    """Training so far. It can be resumed, also for only some of the runs (`scale.parts`)."""

    # [R] int64, each run's number among all runs; on the CPU, as everything but theta, m, v, t and best_theta
    index: Tensor
    theta: Tensor  # [R, M] float32, the weights now
    m: Tensor  # [R, M], Adam's mean of gradients
    v: Tensor  # [R, M], Adam's mean of their squares
    t: Tensor  # [], Adam's step count; a tensor, so that a CUDA graph of the step can increase it
    best_theta: Tensor  # [R, M], the weights that are kept
    dev_loss: Tensor  # [R], the lowest so far
    misses: Tensor  # [R] int64, evaluations since the lowest dev loss
    last_step: Tensor  # [R] int64, of the last evaluation
    best_step: Tensor  # [R] int64, of the weights that are kept
    broken_step: Tensor  # [R] int64, at which the dev loss was not finite; 0: none
    going: Tensor  # [R] bool, who still trains
    step: int = 0

    @classmethod
    def begin(cls, theta: Tensor) -> "State":
        """The state of R runs before their first step, from weights [R, M]."""
        R = len(theta)
        return cls(
            index=torch.arange(R),
            theta=theta.clone().requires_grad_(),
            m=torch.zeros_like(theta),
            v=torch.zeros_like(theta),
            t=torch.zeros((), device=theta.device),
            best_theta=torch.full_like(theta, torch.nan),
            dev_loss=torch.full((R,), torch.inf),
            misses=torch.zeros(R, dtype=torch.int64),
            last_step=torch.zeros(R, dtype=torch.int64),
            best_step=torch.zeros(R, dtype=torch.int64),
            broken_step=torch.zeros(R, dtype=torch.int64),
            going=torch.ones(R, dtype=torch.bool),
        )

    @torch.no_grad()
    def note(self, losses: Tensor, settings: Settings) -> None:
        """Note the dev losses [R] of the weights now: keep the best, and end the runs that do not improve any more.

        A run ends after `patience` evaluations without improvement, and at once where its loss is NaN or infinite.
        """
        losses = losses.cpu()  # the only wait for the device
        finite = losses.isfinite()
        better = self.going & (losses < self.dev_loss)
        kept = self.going & finite if settings.keep_last else better
        self.keep(kept)
        self.dev_loss[better] = losses[better]
        self.misses += 1
        self.misses[better] = 0
        self.broken_step[self.going & ~finite] = self.step
        self.going &= finite & (self.misses < settings.patience)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Keep the weights of these runs, [R] bool, as they are now; note the step of all that still train."""
        on_device = send(kept[:, None], self.theta.device)
        self.best_theta = torch.where(on_device, self.theta, self.best_theta)
        self.best_step[kept] = self.step
        self.last_step[self.going] = self.step

    def trained(self) -> Trained:
        return Trained(
            theta=self.best_theta,
            dev_loss=self.dev_loss,
            steps=self.last_step,
            best=self.best_step,
            broken=self.broken_step,
        )


def one_batch(runs: list[list[TokenRow]]) -> list[Batch]:
    """The rows of R runs as one padded batch."""
    return [collate(runs)]


def never_stop(state: State) -> bool:
    return False


@dataclass(frozen=True)
class Hooks:
    """Where scale/ hooks into the loop; a notebook needs none of it."""

    # the rows of R runs -> one batch, or several whose losses add up (packed, or by length)
    collate: Callable[[list[list[TokenRow]]], list[Batch]] = one_batch
    # takes the training step or the evaluation and returns a faster one, e.g. recorded as a CUDA graph
    wrap: Callable[[Callable], Callable] | None = None
    # True ends the loop; it may also end runs
    after_evaluation: Callable[[State], bool] = never_stop


def train(
    model: nn.Module,
    adapter: Adapter,
    runs: Runs,
    settings: Settings = Settings(),
    state: State | None = None,
    hooks: Hooks = Hooks(),
) -> State:
    """Train R runs by Adam on the sum of their losses; no run's gradient depends on another's.

    Evaluates the dev loss after every second step and at each epoch's end, keeps each run's best weights, and ends with
    the last run. Without dev rows the last weights are kept, and the hook is called at each epoch's end.
    `state`: training so far, to go on with. Returns the state reached; `.trained()` is its result.
    Raises UsageError for an unknown loss, and where the rows lack what a loss compares with.
    """
    check_targets(runs)
    device = runs.theta.device
    if state is None:
        state = State.begin(runs.theta)
    rates = send(runs.rates[:, None], device)
    dev = []
    if runs.dev[0]:
        dev = [batch.to(device) for batch in hooks.collate(runs.dev)]

    def step(*batches: Batch) -> None:
        gradient = torch.zeros_like(state.theta)
        for batch in batches:
            with adapted(model, adapter, batch.of_runs(state.theta)) as student:
                loss = run_losses(student, batch, runs.mix, settings.layers)  # [R]
                gradient += torch.autograd.grad(loss.sum(), state.theta)[0]
        adam(state.theta.detach(), gradient, state.m, state.v, state.t, rates)

    def evaluate(*batches: Batch) -> Tensor:
        return loss_over_batches(model, adapter, state.theta, batches, runs.mix, settings.layers)

    if hooks.wrap is not None:
        step = hooks.wrap(step)
        evaluate = hooks.wrap(evaluate)
    for batches, evaluates in portions(runs, settings, state.step, hooks.collate):
        step(*batches)
        state.step += 1
        if evaluates:
            if dev:
                state.note(evaluate(*dev), settings)
            else:
                state.keep(state.going)
            if hooks.after_evaluation(state) or not state.going.any():
                break
    return state


def train_runs(
    model: nn.Module,
    adapter: Adapter,
    runs: Runs,
    settings: Settings = Settings(),
    hooks: Hooks = Hooks(),
) -> Trained:
    """`train` from the beginning, and what it gave."""
    return train(model, adapter, runs, settings, hooks=hooks).trained()


def portions(
    runs: Runs, settings: Settings, start: int, collate: Callable
) -> Iterator[tuple[list[Batch], bool]]:
    """What each step from `start` on trains on, and whether it is followed by an evaluation."""
    rows = len(runs.train[0])
    size = settings.batch_size
    steps_an_epoch = math.ceil(rows / size)
    batches = []
    for step in range(start, settings.epochs * steps_an_epoch):
        epoch, place = divmod(step, steps_an_epoch)
        same_again = batches and steps_an_epoch == 1  # every step has all rows
        if not same_again:
            portion = slice(place * size, (place + 1) * size)
            chosen = []
            for r, train_rows in enumerate(runs.train):
                order = range(rows) if runs.order is None else runs.order[r](epoch)
                chosen.append([train_rows[i] for i in order[portion]])
            batches = [batch.to(runs.theta.device) for batch in collate(chosen)]
        epoch_ends = place == steps_an_epoch - 1
        every_second = step % 2 == 1 and bool(runs.dev[0])
        yield batches, every_second or epoch_ends


@fused
def adam(theta: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: Tensor, rates: Tensor) -> None:
    """One step of Adam (Kingma & Ba 2015) in place: theta, gradient, m, v [R, M], t [], a learning rate a run [R, 1].

    It never waits for the CPU, so it can be recorded as a CUDA graph.
    """
    t.add_(1)
    m.lerp_(gradient, 1 - BETA1)
    v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    step_size = rates / torch.expm1(t * math.log(BETA1))  # negative: the step goes against m
    root = v.div(-torch.expm1(t * math.log(BETA2))).sqrt_().add_(EPSILON)
    theta.addcdiv_(m * step_size, root)


def run_losses(
    student: Callable, batch: Batch, mix: dict, layers: list[int] | None = None
) -> Tensor:
    """Each run's loss [R]: the sum of the losses in `mix`, each times its weight [R]. `layers`: those aligned."""
    values: dict = {loss: own_loss(loss, student, batch) for loss in mix if callable(loss)}
    residual = "hidden" in mix
    needs_taps = residual or "mse" in mix
    needs_states = "ce" in mix or "kl" in mix
    taps = Taps(batch.at, layers, residual) if needs_taps else None
    if needs_states:  # the losses apply the head themselves: the logits [P, V] are never kept whole
        states = student(batch.ids, taps=taps, logits=batch.at, cache=batch.packed, head=False)
        head = network_of(student).lm_head.weight
    elif needs_taps:
        student(batch.ids, taps=taps, logits=False, cache=batch.packed)
    if "ce" in mix:  # averaged in float32 in the released scripts, too
        of_answers = cross_entropy(states, head, batch.targets)
        values["ce"] = per_run(of_answers, batch.weights)
    if "kl" in mix:
        values["kl"] = mean_of_run(kl_divergence(states, head, batch.soft, batch.soft_ids), batch)
    if "mse" in mix:
        of_layers = activation_mse(taps.each(), batch.activations)
        values["mse"] = mean_of_run(of_layers, batch, len(batch.activations))
    if "hidden" in mix:
        of_layers = activation_mse(taps.each(), batch.states)
        values["hidden"] = mean_of_run(of_layers, batch, len(batch.states))
    return sum(batch.of_runs(weight) * values[loss] for loss, weight in mix.items())


def check_targets(runs: Runs) -> None:
    """Raises UsageError for an unknown loss, and where the rows lack what a loss compares with."""
    mix = runs.mix
    rows = runs.train[0] + runs.dev[0]
    for loss in mix:
        if callable(loss):
            continue
        if loss not in TARGETS:
            raise UsageError(f"loss {loss!r}: use {', '.join(TARGETS)}, or a function")
        if any(getattr(row, TARGETS[loss]) is None for row in rows):
            lacking = f"the rows have no {TARGETS[loss]}"
            raise UsageError(f"loss {loss!r}: {lacking}; `TeacherSettings` asks `teach` for them")
    if "mse" in mix and "hidden" in mix:
        raise UsageError("losses 'mse' and 'hidden': a pass records one of the two; use one")


@torch.no_grad()
def loss_over_batches(
    model: nn.Module, adapter: Adapter, theta: Tensor, batches: Sequence[Batch], mix, layers
) -> Tensor:
    """Each run's loss [R] over several batches."""
    total = torch.zeros(len(theta), device=theta.device)
    for batch in batches:
        with adapted(model, adapter, batch.of_runs(theta)) as student:
            loss = run_losses(student, batch, mix, layers)
        if batch.runs is None:
            total = total + loss
        else:
            total.index_add_(0, batch.runs, loss)
    return total
