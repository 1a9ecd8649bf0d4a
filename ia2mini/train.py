"""One loop, R runs side by side; one short function a method, in the paper's order (protocol section 4)."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, adapted
from .episode import Batch, Row, collate, seeded
from .graphs import Replayed
from .losses import activation_mse, cross_entropy, fused, per_run, soft_cross_entropy
from .models.common import Taps


@dataclass(frozen=True)
class Settings:
    """How long and in what portions every run trains (protocol section 4)."""

    batch_size: int = 4
    epochs: int = 50
    patience: int = 5  # looks at the dev loss without improvement
    layers: list[int] | None = None  # whose attention outputs are aligned; None: all
    keep_last: bool = False  # keep a run's last weights, not its best: what the paper's released scripts do


@dataclass
class Fit:
    """What training R runs gave: each run's weights at its best dev loss."""

    theta: Tensor  # [R, M] float32
    dev_loss: Tensor  # [R] float32, the last phase's
    steps: Tensor  # [R] int64, all phases together


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


class Keeper:
    """Keeps each run's weights at its best dev loss, and says which runs go on."""

    def __init__(self, theta: Tensor, settings: Settings):
        self.settings, self.theta = settings, theta.clone()
        self.dev_loss = torch.full((len(theta),), torch.inf, device=theta.device)
        self.misses = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        self.steps = torch.zeros(len(theta), dtype=torch.int64)

    def look(self, runs: Tensor, theta: Tensor, dev_loss: Tensor, step: int) -> Tensor:
        """Take note of the weights [r, M] and dev losses [r] of `runs` after `step`; which of them go on, [r] bool on the CPU."""
        live = runs.to(theta.device)
        better = dev_loss < self.dev_loss[live]
        kept = torch.ones_like(better) if self.settings.keep_last else better
        self.theta[live[kept]] = theta[kept]
        self.dev_loss[live[better]] = dev_loss[better]
        self.misses[live] = torch.where(better, 0, self.misses[live] + 1)
        self.steps[runs] = step
        return (self.misses[live] < self.settings.patience).cpu()


def losses(student: Callable, batch: Batch, mix: dict[str, Tensor], layers: list[int] | None = None) -> Tensor:
    """Each run's loss [R]: the weighted sum of "mse" (over `layers`), "ce" and "kl", with weights [R].

    Only what a loss needs is computed: no logits for "mse", no taps without it.
    """
    taps = Taps(batch.at, layers) if "mse" in mix else None

    def head(states: Tensor, weight: Tensor) -> dict[str, Tensor]:
        found = {}
        if "ce" in mix:
            found["ce"] = cross_entropy(states, weight, batch.targets)
        if "kl" in mix:
            found["kl"] = soft_cross_entropy(states, weight, batch.soft, batch.soft_ids)
        return found

    positions = batch.at if mix.keys() - {"mse"} else False
    values = student(batch.ids, taps=taps, logits=positions, cache=batch.packed, head=head) or {}
    if "mse" in mix:
        values["mse"] = activation_mse(taps.each(), batch.activations)
    return sum(weight * per_run(values[name], batch.weights) for name, weight in mix.items())


def fit(
    model: nn.Module,
    adapter: Adapter,
    theta: Tensor,
    rates: Tensor,
    train: list[list[Row]],
    dev: list[list[Row]],
    mix: dict[str, Tensor],
    order: Callable[[int, int], list[int]],
    settings: Settings = Settings(),
    watch: Callable[[int, Tensor], None] | None = None,
) -> Fit:
    """Train R runs from theta [R, M] by `losses`; a run that has not improved for `patience` looks leaves the batch.

    `rates` [R]; `train`, `dev`: R lists of rows; `mix`: loss name -> weight [R]; `order(run, epoch)`: the order of a run's rows.
    Looks at the dev loss after every second step and at each epoch's end. `watch(step, best dev losses of live runs)` after each look.
    """
    device, rows = theta.device, len(train[0])
    keeper, adam = Keeper(theta, settings), Adam(theta, rates.to(device))
    runs = torch.arange(len(theta))  # those still training, in the order of the batch
    live_mix, dev_batch, batch, step = mix, collate(dev, device, pack=True), None, 0

    def update(batch: Batch) -> None:
        with adapted(model, adapter, adam.theta) as student:
            adam.step(*torch.autograd.grad(losses(student, batch, live_mix, settings.layers).sum(), adam.theta))

    @torch.no_grad()
    def dev_losses(batch: Batch) -> Tensor:
        with adapted(model, adapter, adam.theta) as student:
            return losses(student, batch, live_mix, settings.layers)

    train_step, look = Replayed(update, device), Replayed(dev_losses, device)
    for epoch, start in product(range(settings.epochs), range(0, rows, settings.batch_size)):
        if batch is None or rows > settings.batch_size:
            portion = slice(start, start + settings.batch_size)
            batch = collate([[train[r][i] for i in order(r, epoch)[portion]] for r in runs.tolist()], device, pack=True)
        train_step(batch)
        step += 1
        if step % 2 and start + settings.batch_size < rows:
            continue
        staying = keeper.look(runs, adam.theta.detach(), look(dev_batch), step)
        if watch:
            watch(step, keeper.dev_loss[runs[staying].to(device)])
        if not staying.any():
            break
        if not staying.all():
            runs = runs[staying]
            adam.keep(staying.to(device))
            live_mix = {name: weight[runs.to(device)] for name, weight in mix.items()}
            dev_batch, batch = collate([dev[r] for r in runs.tolist()], device, pack=True), None
            train_step, look = (
                Replayed(update, device),
                Replayed(dev_losses, device),
            )  # what was recorded for more runs is done with
    return Fit(keeper.theta, keeper.dev_loss, keeper.steps)


@dataclass(frozen=True)
class SetRows:
    """A set's rows as ids: with the true answers, and with the teacher's responses and targets."""

    train: list[Row]
    dev: list[Row]
    icl_train: list[Row]
    icl_dev: list[Row]


@dataclass
class Job:
    """All runs of one cell: every set with every rate (and β), over one frozen model."""

    model: nn.Module
    adapter: Adapter
    sets: list[SetRows]
    rates: Sequence[float]
    betas: Sequence[float] = (0.5,)
    seed: int = 0
    labels: str = "truth"  # or "icl": cross-entropy on the teacher's responses
    settings: Settings = Settings()
    side_by_side: int | None = None  # runs trained together; None: all
    progress: Callable = nullcontext  # progress((phase, runs, steps at most)) -> context manager yielding `fit`'s watch
    first: Callable[[str], Fit] | None = (
        None  # where to get the fit of a method that another begins with; None: train it
    )

    def grid(self, betas: bool = False) -> list[tuple[int, float, float | None]]:
        """(set, rate, β) of each run, in the order of the R axis."""
        return list(product(range(len(self.sets)), self.rates, self.betas if betas else [None]))

    def start(self, grid) -> Tensor:
        """First weights [R, M]: the same for all rates of a set."""
        rows = []
        for number in range(len(self.sets)):
            generator = torch.Generator().manual_seed(int(seeded(self.seed, number, "adapter").integers(2**62)))
            rows.append(self.adapter.init(self.model, generator))
        return torch.stack([rows[number] for number, _, _ in grid]).to(next(self.model.parameters()).device)

    def train(self, phase: str, icl_rows: bool, betas: bool = False, start: Fit | None = None, **mix) -> Fit:
        """One phase of all runs: on the true rows or the teacher's, from fresh weights or another phase's, by the losses in `mix`."""
        grid = self.grid(betas)
        theta = self.start(grid) if start is None else start.theta
        weights = {name: torch.as_tensor(w, device=theta.device).expand(len(grid)).float() for name, w in mix.items()}
        rates = torch.tensor([rate for _, rate, _ in grid])
        data = [(s.icl_train, s.icl_dev) if icl_rows else (s.train, s.dev) for s in self.sets]
        parts, rest = [], torch.arange(len(grid))
        with self.progress((phase, len(grid), self.most_steps())) as watch:
            while len(rest):
                runs = rest[: self.side_by_side or len(rest)]
                numbers, here = [grid[r][0] for r in runs.tolist()], runs.to(theta.device)
                part = (
                    theta[here],
                    rates[runs],
                    [data[n][0] for n in numbers],
                    [data[n][1] for n in numbers],
                    {name: w[here] for name, w in weights.items()},
                    lambda r, epoch, numbers=numbers: self.order(numbers[r], epoch),
                )
                try:
                    parts.append(
                        fit(self.model, self.adapter, *part, self.settings, watch if callable(watch) else None)
                    )
                    rest = rest[len(runs) :]
                except torch.OutOfMemoryError:
                    self.side_by_side = fewer(len(runs))
        whole = Fit(*(torch.cat([getattr(p, name) for p in parts]) for name in ("theta", "dev_loss", "steps")))
        if start is not None:
            whole.steps += start.steps
        return whole

    def order(self, number: int, epoch: int) -> list[int]:
        return seeded(self.seed, number, f"epoch {epoch}").permutation(len(self.sets[number].train)).tolist()

    def most_steps(self) -> int:
        return self.settings.epochs * -(-len(self.sets[0].train) // self.settings.batch_size)

    def begun(self, method: str) -> Fit:
        """The fit of the method that another one begins with."""
        return self.first(method) if self.first else METHODS[method](self)


def fewer(runs: int) -> int:
    """How many runs to try next where `runs` side by side do not fit into memory. Raises UsageError when one does not."""
    if runs == 1:
        raise UsageError(
            "not enough memory for a single run; use --checkpointing, a smaller --batch-size or a smaller model"
        ) from None
    warnings.warn(
        f"out of memory with {runs} runs side by side; going on with {runs // 2} (--side-by-side {runs // 2})",
        stacklevel=3,
    )
    return runs // 2


def sft(job: Job) -> Fit:
    """Equation 2: cross-entropy on the answers."""
    return job.train("sft", icl_rows=job.labels == "icl", ce=1.0)


def ia2(job: Job) -> Fit:
    """Equation 4: the model's own attention outputs with demonstrations, on the teacher's responses."""
    return job.train("ia2", icl_rows=True, mse=1.0)


def ia2_sft(job: Job) -> Fit:
    """Section 4, IA2 → SFT: align first, then cross-entropy from there."""
    return job.train("ia2-sft", icl_rows=job.labels == "icl", start=job.begun("ia2"), ce=1.0)


def sft_ia2(job: Job) -> Fit:
    """The order reversed."""
    return job.train("sft-ia2", icl_rows=True, start=job.begun("sft"), mse=1.0)


def sft_sft(job: Job) -> Fit:
    """A control: SFT begun again from its own best weights, so that a second phase alone cannot explain IA2 → SFT."""
    return job.train("sft-sft", icl_rows=job.labels == "icl", start=job.begun("sft"), ce=1.0)


def ia2_plus_sft(job: Job) -> Fit:
    """Section 6, IA2 + SFT: (1 - β) MSE + β CE at once, on the teacher's responses; a run for every β."""
    betas = torch.tensor([beta for _, _, beta in job.grid(betas=True)])
    return job.train("ia2+sft", icl_rows=True, betas=True, mse=1 - betas, ce=betas)


def soft(job: Job) -> Fit:
    """Section 6, soft labels: KL to the teacher's distribution on its responses (Hinton et al. 2015)."""
    return job.train("soft", icl_rows=True, kl=1.0)


METHODS = {
    "sft": sft,
    "ia2": ia2,
    "ia2-sft": ia2_sft,
    "sft-ia2": sft_ia2,
    "sft-sft": sft_sft,
    "ia2+sft": ia2_plus_sft,
    "soft": soft,
}
