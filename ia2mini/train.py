"""The training loop: R runs side by side over one frozen model, each with its own rate, dev loss and patience."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, adapted
from .batch import Batch, Row, collate
from .graphs import CapturedStep
from .losses import activation_mse, cross_entropy, fused, per_run, soft_cross_entropy
from .models.common import Taps
from .models.shard import mesh_of

RACE_FROM, PACE, AHEAD = 10, 3, 30  # looks at the dev loss: see `EarlyStopping`


@dataclass(frozen=True)
class Settings:
    """How long and in what portions every run trains (protocol section 4)."""

    batch_size: int = 4
    epochs: int = 50
    patience: int = 5  # looks at the dev loss without improvement
    layers: list[int] | None = None  # whose attention outputs are aligned; None: all
    keep_last: bool = False  # keep a run's last weights, not its best: what the paper's released scripts do
    steps: int | None = None  # exactly so many, whatever the dev loss, and the last weights are kept


@dataclass
class Runs:
    """R runs to be trained: for each its first weights, learning rate, rows and the mix of its losses.

    A loss is "mse" (attention outputs), "ce" (answers), "kl" (the teacher's distribution), or a function of one's own:
    `loss(student, batch) -> [R]`, where `student` is called as the model is and `batch` is a `Batch` of R runs.
    """

    theta: Tensor  # [R, M]
    rates: Tensor  # [R]
    train: list[list[Row]]  # R lists of equally many rows
    dev: list[list[Row]]
    mix: dict[str | Callable, Tensor]  # loss -> weight [R]
    order: list[Callable[[int], list[int]]]  # for each run: epoch -> the order of its rows
    config: Tensor | None = None  # [R] number of each one's rate (and β); those that are beaten leave (None: none do)

    def __len__(self) -> int:
        return len(self.rates)

    def take(self, runs: Tensor) -> "Runs":
        """Only these runs (indices on the CPU), in this order; rates are no longer compared where some are missing."""
        here, some = runs.to(self.theta.device), runs.tolist()
        train, dev, order = ([values[r] for r in some] for values in (self.train, self.dev, self.order))
        mix = {name: weight[here] for name, weight in self.mix.items()}
        config = None if self.config is None or len(some) < len(self) else self.config[some]
        return Runs(self.theta[here], self.rates[here], train, dev, mix, order, config)


@dataclass
class Trained:
    """What training R runs gave: each run's weights at its best dev loss."""

    theta: Tensor  # [R, M] float32
    dev_loss: Tensor  # [R] float32, the last phase's
    steps: Tensor  # [R] int64, all phases together
    best: Tensor  # [R] int64, the last phase's steps up to that dev loss


def warn_of_failed(method: str, found: Trained, names: list[str]) -> None:
    """A warning that names the runs which never had a finite dev loss. Raises UsageError where all are such."""
    failed = [name for name, fine in zip(names, found.dev_loss.isfinite().tolist()) if not fine]
    if len(failed) == len(names):
        raise UsageError(f"training {method} gave no finite loss; use lower --rates or --dtype float32")
    if failed:
        warnings.warn(f"{method}: no finite loss, so failed: {', '.join(failed)}", stacklevel=2)


class Adam:
    """Adam (Kingma & Ba 2015) on theta [R, M] with a learning rate a run, [R]; runs can leave."""

    b1, b2, eps = 0.9, 0.999, 1e-8

    def __init__(self, theta: Tensor, rates: Tensor):
        self.theta, self.rates = theta.clone().requires_grad_(), rates[:, None]
        self.m, self.v, self.t = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros((), device=theta.device)

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        """One update by the gradient [R, M], on the device alone: it can be recorded."""
        self.update(self.theta.detach(), grad, self.m, self.v, self.t, self.rates)

    @staticmethod
    @fused
    def update(theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, t: Tensor, rates: Tensor) -> None:
        t.add_(1)
        m.lerp_(grad, 1 - Adam.b1)
        v.mul_(Adam.b2).addcmul_(grad, grad, value=1 - Adam.b2)
        rates = rates / torch.expm1(t * math.log(Adam.b1))  # b1^t - 1: minus the bias of m
        theta.addcdiv_(m * rates, v.div(-torch.expm1(t * math.log(Adam.b2))).sqrt_().add_(Adam.eps))

    @torch.no_grad()
    def keep(self, runs: Tensor) -> None:
        self.theta = self.theta[runs].clone().requires_grad_()
        self.m, self.v, self.rates = self.m[runs], self.v[runs], self.rates[runs]


class EarlyStopping:
    """Keeps each run's weights at its best dev loss, and says which runs go on.

    A run ends after `patience` looks without improvement. Where `config` [R] numbers the runs' rates (and β), it also
    ends when its own is beaten. From the tenth look on the means over sets of the best dev losses are compared: a rate
    is beaten whose mean would still be above that of the best if it fell as in the last `PACE` looks for `AHEAD` more.
    """

    def __init__(self, theta: Tensor, settings: Settings, config: Tensor | None = None):
        self.settings, self.theta, self.config, self.means = settings, theta.clone(), config, []
        self.dev_loss = torch.full((len(theta),), torch.inf, device=theta.device)
        self.misses = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        self.steps, self.best = torch.zeros(2, len(theta), dtype=torch.int64)

    def look(self, runs: Tensor, theta: Tensor, dev_loss: Tensor, step: int) -> Tensor:
        """Note the weights [r, M] and dev losses [r] of `runs` after `step`; which go on, [r] bool on the CPU."""
        live = runs.to(theta.device)
        better = dev_loss < self.dev_loss[live]
        kept = torch.ones_like(better) if self.settings.keep_last else better
        self.theta[live[kept]] = theta[kept]
        self.dev_loss[live[better]] = dev_loss[better]
        self.misses[live] = torch.where(better, 0, self.misses[live] + 1)
        self.steps[runs] = step
        self.best[runs[better.cpu()]] = step
        going = (self.misses[live] < self.settings.patience).cpu()
        return going if self.config is None else going & ~self.beaten()[runs]

    def beaten(self) -> Tensor:
        """Which runs have a rate that is beaten, after one more look, [R] bool on the CPU."""
        means = torch.zeros(int(self.config.max()) + 1)
        means.scatter_reduce_(0, self.config, self.dev_loss.cpu(), "mean", include_self=False)
        self.means.append(means)
        if len(self.means) < RACE_FROM or means.min().isinf():
            return torch.zeros_like(self.config, dtype=torch.bool)
        reached = means - AHEAD * (self.means[-1 - PACE] - means) / PACE
        return ~(reached <= means.min())[self.config]  # NaN: a rate of which a run has diverged

    def stop(self, theta: Tensor, step: int) -> None:
        """Keep the weights [R, M] of all runs as they are after `step`."""
        self.theta, self.steps[:], self.best[:] = theta, step, step


def losses(student: Callable, batch: Batch, mix: dict, layers: list[int] | None = None) -> Tensor:
    """Each run's loss [R]: the sum of the losses in `mix`, each times its weight [R]; "mse" is over `layers`."""
    taps = Taps(batch.at, layers) if "mse" in mix else None
    values = {loss: loss(student, batch) for loss in mix if callable(loss)}

    def head(states: Tensor, weight: Tensor) -> None:
        if "ce" in mix:
            values["ce"] = per_run(cross_entropy(states, weight, batch.targets), batch.weights)
        if "kl" in mix:
            values["kl"] = per_run(soft_cross_entropy(states, weight, batch.soft, batch.soft_ids), batch.weights)

    if named := mix.keys() - values.keys():
        positions = batch.at if named - {"mse"} else False
        student(batch.ids, taps=taps, logits=positions, cache=batch.packed, head=head)
    if "mse" in mix:
        values["mse"] = per_run(activation_mse(taps.each(), batch.activations), batch.weights)
    return sum(weight * values[loss] for loss, weight in mix.items())


def train_runs(
    model: nn.Module, adapter: Adapter, runs: Runs, settings: Settings = Settings(), watch: Callable | None = None
) -> Trained:
    """Train R runs by `losses`; a run that has not improved for `patience` looks leaves the batch.

    Looks at the dev loss after every second step and at each epoch's end. `watch(step, best dev losses of live runs)`
    after each look. Raises torch.OutOfMemoryError where R runs do not fit (see `train_in_parts`).
    """
    device, rows = runs.theta.device, len(runs.train[0])
    stopping, adam = EarlyStopping(runs.theta, settings, runs.config), Adam(runs.theta, runs.rates.to(device))
    live, going = torch.arange(len(runs)), runs  # those still training, in the order of the batch
    dev_batch = None if settings.steps else collate(runs.dev, device, pack=True)
    batch, step = None, 0

    def update(batch: Batch) -> None:
        with adapted(model, adapter, adam.theta) as student:
            adam.step(*torch.autograd.grad(losses(student, batch, going.mix, settings.layers).sum(), adam.theta))

    @torch.no_grad()
    def dev_losses(batch: Batch) -> Tensor:
        with adapted(model, adapter, adam.theta) as student:
            return losses(student, batch, going.mix, settings.layers)

    train_step, look = CapturedStep(update, device), CapturedStep(dev_losses, device)
    portions = range(0, rows, settings.batch_size)
    epochs = settings.epochs if settings.steps is None else -(-settings.steps // len(portions))
    for epoch, start in product(range(epochs), portions):
        if batch is None or rows > settings.batch_size:
            portion = slice(start, start + settings.batch_size)
            chosen = [[run[i] for i in order(epoch)[portion]] for run, order in zip(going.train, going.order)]
            batch = collate(chosen, device, pack=True)
        train_step(batch)
        step += 1
        if step == settings.steps:
            stopping.stop(adam.theta.detach(), step)
            break
        if settings.steps or step % 2 and start + settings.batch_size < rows:
            continue
        staying = stopping.look(live, adam.theta.detach(), look(dev_batch), step)
        if watch:
            watch(step, stopping.dev_loss[live[staying].to(device)])
        if not staying.any():
            break
        if not staying.all():
            live, going = live[staying], going.take(staying.nonzero()[:, 0])
            adam.keep(staying.to(device))
            dev_batch, batch = collate(going.dev, device, pack=True), None
            train_step, look = CapturedStep(update, device), CapturedStep(dev_losses, device)  # for fewer runs
    return Trained(stopping.theta, stopping.dev_loss, stopping.steps, stopping.best)


def train_in_parts(
    model: nn.Module, adapter: Adapter, runs: Runs, settings: Settings, at_once: int | None = None, watch=None
) -> Trained:
    """`train_runs`, `at_once` runs side by side (None: all), halved where memory is too small. UsageError below one."""
    parts, rest = [], torch.arange(len(runs))
    while len(rest):
        some = rest[: at_once or len(rest)]
        try:
            parts.append(train_runs(model, adapter, runs.take(some), settings, watch))
            rest = rest[len(some) :]
        except torch.OutOfMemoryError:
            if mesh_of(model) is not None:  # the others wait for this rank within a pass
                raise UsageError(f"not enough memory for {len(some)} runs; use a lower --side-by-side") from None
            if len(some) == 1:
                mend = "use --checkpointing, a smaller --batch-size or a smaller model"
                raise UsageError(f"not enough memory for a single run; {mend}") from None
            at_once = len(some) // 2
            now = f"going on with {at_once} (--side-by-side {at_once})"
            warnings.warn(f"out of memory with {len(some)} runs side by side; {now}", stacklevel=2)
    return Trained(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
