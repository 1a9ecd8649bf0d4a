"""The training loop: R runs side by side over one frozen model, each with its own rate, dev loss and patience."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, adapted
from .batch import Batch, Row, in_batches, send
from .cost import run_bytes
from .errors import out_of_memory
from .losses import activation_mse, cross_entropy, fused, per_run, per_run_in_bfloat16, soft_cross_entropy
from .models.taps import Taps
from .scale import ranks as parallel
from .scale.blocks import checkpoint_blocks, is_checkpointed
from .scale.graphs import CapturedStep, launch_bound

RACE_FROM, PACE, AHEAD = 10, 3, 30  # looks at the dev loss: see `EarlyStopping`


@dataclass(frozen=True)
class Settings:
    """How long and in what portions every run trains (protocol section 4)."""

    batch_size: int = 4
    epochs: int = 50
    patience: int = 5  # looks at the dev loss without improvement
    layers: list[int] | None = None  # whose attention outputs are aligned; None: all
    keep_last: bool = False  # keep a run's last weights, not its best: what the paper's released scripts do
    bfloat16_losses: bool = False  # MSE and KL of each row are rounded: as in the released scripts
    steps: int | None = None  # exactly so many, whatever the dev loss, and the last weights are kept


@dataclass
class Runs:
    """R runs to be trained: for each its first weights, learning rate, rows and the mix of its losses.

    A loss is "mse" (attention outputs), "hidden" (the residual stream; not with "mse"), "ce" (answers), "kl" (the
    teacher's distribution), or a function of one's own: `loss(student, batch) -> [R]`, where `student` is called as the
    model is and `batch` is a `Batch` of R runs.
    """

    theta: Tensor  # [R, M]
    rates: Tensor  # [R]
    train: list[list[Row]]  # R lists of equally many rows
    dev: list[list[Row]]
    mix: dict[str | Callable, Tensor]  # loss -> weight [R]
    order: Sequence[Callable[[int], list[int]]]  # for each run: epoch -> the order of its rows
    config: Tensor | None = None  # [R] number of each one's rate (and β); those that are beaten leave (None: none do)
    hear: Callable | None = None  # (configs, dev losses) -> these of every process that trains a part of the runs
    after_look: Callable | None = None  # (step, runs [r], weights [r, M]) -> which go on, [r] bool, at epochs' ends;
    # the dev rows are then not looked at, and the weights with which a run leaves are kept

    def __len__(self) -> int:
        return len(self.rates)

    def take(self, runs: Tensor) -> "Runs":
        """Only these runs (indices on the CPU), in this order; rates are no longer compared where some are missing."""
        here = send(runs, self.theta.device)
        some = runs.tolist()
        train, dev = ([rows[r] for r in some] for rows in (self.train, self.dev))
        mix = {name: weight[here] for name, weight in self.mix.items()}
        config = None if self.config is None or len(some) < len(self) else self.config[some]
        order = [self.order[r] for r in some]
        return Runs(self.theta[here], self.rates[some], train, dev, mix, order, config, after_look=self.after_look)


@dataclass
class Trained:
    """What training R runs gave: each run's weights at its best dev loss; NaN where no dev loss was finite."""

    theta: Tensor  # [R, M] float32
    dev_loss: Tensor  # [R] float32, the last phase's; infinite: the run has failed
    steps: Tensor  # [R] int64, all phases together
    best: Tensor  # [R] int64, the last phase's steps up to these weights
    broken: Tensor  # [R] int64, the last phase's step at which a dev loss was NaN or infinite; 0: it never was

    def troubles(self) -> list[str]:
        """What went wrong in each run; "" where nothing did."""
        how = "failed at step {}: no finite loss", "diverged at step {}, kept as of step {}"
        both = zip(self.broken.tolist(), self.best.tolist())
        return [how[best > 0].format(step, best) if step else "" for step, best in both]


def warn_of_failed(method: str, found: Trained, names: list[str], sets: int) -> list[str]:
    """A warning, returned too, that names the runs of which a loss was not finite; the R runs are `sets` × rates.

    Raises UsageError where no rate is left that did not fail in any set.
    """
    told = [f"{name} {trouble}" for name, trouble in zip(names, found.troubles()) if trouble]
    if not found.dev_loss.isfinite().view(sets, -1).all(0).any():
        mend = "use lower --rates or --dtype float32"
        raise UsageError(f"training {method} gave no rate a finite loss throughout ({told[0]}, …); {mend}")
    told = [f"{method}: {'; '.join(told)}"] if told else []
    for text in told:
        warnings.warn(text, stacklevel=2)
    return told


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

    A run ends after `patience` looks without improvement, and at once where its dev loss is NaN or infinite, as it is
    after any such gradient. Where `config` [R] numbers the runs' rates (and β), it also ends when its own is beaten.
    From the tenth look on the means over sets of the best dev losses are compared: a rate is beaten whose mean would
    still be above that of the best if it fell as in the last `PACE` looks for `AHEAD` more.
    `hear` tells of all runs, where these are some of them; when it no longer does, no rate is beaten any more.
    """

    def __init__(self, theta: Tensor, settings: Settings, config: Tensor | None = None, hear: Callable | None = None):
        self.settings, self.theta, self.config, self.means = settings, theta * torch.nan, config, []
        self.hear = hear or (lambda mine: [mine])
        self.after_look: Callable | None = None  # see `Runs`
        self.dev_loss = torch.full((len(theta),), torch.inf)  # on the CPU, as all but the weights
        self.misses, self.steps, self.best, self.broken = torch.zeros(4, len(theta), dtype=torch.int64)

    def look(self, runs: Tensor, theta: Tensor, dev_loss: Tensor | None, step: int) -> Tensor:
        """Note the weights [r, M] and dev losses [r] of `runs` after `step`; which go on, [r] bool on the CPU.

        Without dev losses the weights are kept, and `after_look` says which go on.
        """
        if dev_loss is None:
            self.keep(runs, theta, step)
            return self.after_look(step, runs, theta)
        dev_loss = dev_loss.cpu()  # the only wait for the device
        better, finite = dev_loss < self.dev_loss[runs], dev_loss.isfinite()
        keeps = finite if self.settings.keep_last else better
        kept = keeps.nonzero()[:, 0]
        self.theta[send(runs[kept], theta.device)] = theta[send(kept, theta.device)]
        self.dev_loss[runs[better]] = dev_loss[better]
        self.misses[runs] = torch.where(better, 0, self.misses[runs] + 1)
        self.steps[runs] = step
        self.best[runs[keeps]] = step
        self.broken[runs[~finite]] = step
        going = finite & (self.misses[runs] < self.settings.patience)
        return going if self.config is None else going & ~self.beaten()[runs]

    def beaten(self) -> Tensor:
        """Which runs have a rate that is beaten, after one more look, [R] bool on the CPU."""
        unbeaten, heard = torch.zeros_like(self.config, dtype=torch.bool), self.hear((self.config, self.dev_loss))
        if heard is None:
            self.config = None
            return unbeaten
        config, dev_loss = map(torch.cat, zip(*heard))
        means = torch.zeros(int(config.max()) + 1)
        means.scatter_reduce_(0, config, dev_loss, "mean", include_self=False)
        self.means.append(means)
        if len(self.means) < RACE_FROM or means.min().isinf():
            return unbeaten
        reached = means - AHEAD * (self.means[-1 - PACE] - means) / PACE
        return ~(reached <= means.min())[self.config]  # NaN: a rate of which a run has diverged

    def keep(self, runs: Tensor, theta: Tensor, step: int) -> None:
        """Keep the weights [r, M] of `runs` as they are after `step`."""
        self.theta[runs.to(theta.device)] = theta
        self.steps[runs] = step
        self.best[runs] = step


def losses(student: Callable, batch: Batch, mix: dict, layers: list[int] | None = None) -> Tensor:
    """Each run's loss [R]: the sum of the losses in `mix`, each times its weight [R]; what is tapped over `layers`."""
    tapped = "mse" if "mse" in mix else "hidden" if "hidden" in mix else None
    taps = Taps(batch.at, layers, tapped == "hidden") if tapped else None
    values = {loss: loss(student, batch) for loss in mix if callable(loss)}

    def of_runs(each: Tensor, count: int = 1) -> Tensor:
        if batch.rows is None:
            return per_run(each, batch.weights)
        return per_run_in_bfloat16(each, batch.weights, batch.rows, count)

    def head(states: Tensor, weight: Tensor) -> None:
        if "ce" in mix:
            values["ce"] = per_run(cross_entropy(states, weight, batch.targets), batch.weights)
        if "kl" in mix:
            values["kl"] = of_runs(soft_cross_entropy(states, weight, batch.soft, batch.soft_ids))

    if named := mix.keys() - values.keys():
        positions = batch.at if named - {tapped} else False
        student(batch.ids, taps=taps, logits=positions, cache=batch.packed, head=head)
    if tapped:
        wanted = batch.activations if tapped == "mse" else batch.states
        values[tapped] = of_runs(activation_mse(taps.each(), wanted), len(wanted))
    return sum(weight * values[loss] for loss, weight in mix.items())


def gradient(model: nn.Module, adapter: Adapter, theta: Tensor, batches: Sequence[Batch], mix, layers) -> Tensor:
    """The gradient [R, M] of each run's loss by its weights, of several batches summed one after another."""
    total = torch.zeros_like(theta)
    for batch in batches:
        with adapted(model, adapter, of_runs(theta, batch)) as student:
            found = losses(student, batch, {loss: of_runs(w, batch) for loss, w in mix.items()}, layers)
            total += torch.autograd.grad(found.sum(), theta)[0]
    return total


@torch.no_grad()
def summed_losses(model: nn.Module, adapter: Adapter, theta: Tensor, batches: Sequence[Batch], mix, layers) -> Tensor:
    """Each run's loss [R] over several batches."""
    total = torch.zeros(len(theta), device=theta.device)
    for batch in batches:
        with adapted(model, adapter, of_runs(theta, batch)) as student:
            found = losses(student, batch, {loss: of_runs(w, batch) for loss, w in mix.items()}, layers)
        if batch.runs is None:
            total = total + found
        else:
            total.index_add_(0, batch.runs, found)
    return total


def of_runs(values: Tensor, batch: Batch) -> Tensor:
    """Those of values [R, …] that belong to the runs of a batch."""
    return values if batch.runs is None else values[batch.runs]


def dev_rows(runs: Runs, device, form: dict) -> list[Batch]:
    """The dev rows of all runs; none where there are none, or `after_look` is asked instead."""
    if runs.after_look or not runs.dev[0]:
        return []
    return in_batches(runs.dev, device, **form)


def train_runs(
    model: nn.Module, adapter: Adapter, runs: Runs, settings: Settings = Settings(), watch: Callable | None = None
) -> Trained:
    """Train R runs by `losses`; a run that has not improved for `patience` looks leaves the batch.

    Where steps are recorded and cost more to launch than to compute, half of the batch leaves at once: shapes stay.
    Looks at the dev loss after every second step and at each epoch's end; where the runs have an `after_look`, it is
    asked at each epoch's end instead. `watch(step, best dev losses of live runs)` after each look. Raises what says
    `out_of_memory` where R runs do not fit (see `train_in_parts`).
    """
    device, rows = runs.theta.device, len(runs.train[0])
    stopping = EarlyStopping(runs.theta, settings, runs.config, runs.hear)
    stopping.after_look = runs.after_look
    adam = Adam(runs.theta, runs.rates.to(device))
    live, going = torch.arange(len(runs)), runs  # those in the batch, in its order
    places = torch.arange(len(runs))  # which of them still train; the others' weights are kept already
    form = {"by_row": settings.bfloat16_losses}
    dev_batches = dev_rows(runs, device, form)
    batches, step = None, 0

    def update(*batches: Batch) -> None:
        adam.step(gradient(model, adapter, adam.theta, batches, going.mix, settings.layers))

    def dev_losses(*batches: Batch) -> Tensor:
        return summed_losses(model, adapter, adam.theta, batches, going.mix, settings.layers)

    def recorded() -> list[CapturedStep]:
        return [CapturedStep(function, device, fewer=len(live) > 1) for function in (update, dev_losses)]

    train_step, look = recorded()
    portions = range(0, rows, settings.batch_size)
    epochs = settings.epochs if settings.steps is None else -(-settings.steps // len(portions))
    for epoch, start in product(range(epochs), portions):
        if batches is None or rows > settings.batch_size:
            portion = slice(start, start + settings.batch_size)
            chosen = [[run[i] for i in order(epoch)[portion]] for run, order in zip(going.train, going.order)]
            batches = in_batches(chosen, device, **form)
        train_step(*batches)
        step += 1
        theta, here = adam.theta.detach(), send(places, device)
        if step == settings.steps:
            stopping.keep(live, theta, step)
            break
        ended = start + settings.batch_size >= rows  # an epoch
        if settings.steps or not ended and (runs.after_look or step % 2):
            continue
        dev = look(*dev_batches)[here] if dev_batches else None
        places = places[stopping.look(live[places], theta[here], dev, step)]
        if watch:
            watch(step, stopping.dev_loss[live[places]])
        if not len(places):
            break
        if len(places) <= (len(live) // 2 if launch_bound(model.config, batches[0]) else len(live) - 1):
            live, going = live[places], going.take(places)
            adam.keep(send(places, device))
            places = torch.arange(len(live))
            dev_batches = dev_rows(going, device, form)
            batches = None
            train_step, look = recorded()  # for fewer runs
    return Trained(stopping.theta, stopping.dev_loss, stopping.steps, stopping.best, stopping.broken)


def train_in_parts(
    model: nn.Module, adapter: Adapter, runs: Runs, settings: Settings, at_once: int | None = None, watch=None
) -> tuple[Trained, int | None]:
    """`train_runs`, spread over processes, in each `at_once` runs side by side (None: all), fewer where memory is too
    small; also `at_once`, lowered to these. What memory holds is estimated before, and halved where it still runs out;
    a single run that does not fit is checkpointed. Raises UsageError where that does not help. Rates are compared only
    where all runs train at the same time.
    """
    racing = runs.config is not None and len(runs) <= (at_once or len(runs))
    rounds = parallel.Rounds((torch.zeros(0, dtype=torch.int64), torch.zeros(0)))

    def train(rest: Tensor) -> tuple[list[Trained], int | None]:
        parts, config, every = [], runs.config if racing else None, len(rest)
        most = min(at_once or every, fitting(model, runs, settings.batch_size)) if every else len(runs)
        if config is not None and most < every:
            config = rounds.hear(None)
        while len(rest):
            some = rest[:most]
            here = replace(runs.take(some), config=None if config is None else config[some], hear=rounds.hear)
            here.after_look = numbered(runs.after_look, some)
            try:
                parts.append(train_runs(model, adapter, here, settings, watch))
                rest = rest[len(some) :]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if parallel.same:  # the others wait for this process within a pass
                    raise UsageError(f"not enough memory for {len(some)} runs; use a lower --side-by-side") from None
                if len(some) == 1:
                    if not checkpoint_blocks(model):
                        mend = "use a smaller --batch-size or a smaller model"
                        raise UsageError(f"not enough memory for a single run; {mend}") from None
                    warnings.warn("out of memory with a single run; going on with --checkpointing", stacklevel=2)
                    continue
                if config is not None:
                    config = rounds.hear(None)
                most = len(some) // 2
                now = f"going on with {most} (--side-by-side {most})"
                warnings.warn(f"out of memory with {len(some)} runs side by side; {now}", stacklevel=2)
        if racing:
            rounds.end()
        return parts, most if most < min(at_once or every, every) else None

    found, most = zip(*parallel.spread(train, torch.arange(len(runs)).tensor_split(parallel.size)))
    parts = sum(found, [])
    whole = Trained(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
    return whole, min(filter(None, most), default=at_once)


def numbered(after_look: Callable | None, some: Tensor) -> Callable | None:
    """An `after_look` for `some` of the runs, which is told their numbers among all."""
    return after_look and (lambda step, runs, theta: after_look(step, some[runs], theta))


def fitting(model: nn.Module, runs: Runs, batch_size: int) -> int:
    """How many of the runs free memory holds by estimate, at least one."""
    rows = [sorted(run, key=len)[-batch_size:] for run in runs.train]
    tokens, positions = (max(sum(map(of, run)) for run in rows) for of in (len, lambda row: len(row.answer)))
    weight = model.model.embed_tokens.weight
    each = run_bytes(model.config, tokens, positions, weight.itemsize, runs.theta.shape[1], is_checkpointed(model))
    return max(1, int(min(len(runs), 0.9 * free_memory(weight.device) / each)))


def free_memory(device: torch.device) -> float:
    """Bytes that tensors may still take; a CPU cannot say, so there without bound."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
