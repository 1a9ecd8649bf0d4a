"""The methods of the paper, each a few lines: which losses a phase sums, on whose answers, from which weights."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from .adapters import Adapter
from .batch import collate, in_batches
from .episode import seeded
from .ridge import solve
from .teacher import Taught
from .train import Runs, Settings, Trained, summed_losses, train_in_parts


def configs(method: str, sets: int, rates: Sequence[float], betas: Sequence[float]) -> list[tuple]:
    """(set, rate, β or None) of each run of a method, in the order of the R axis."""
    return list(product(range(sets), rates, betas if method == "ia2+sft" else [None]))


@dataclass
class Grid:
    """Every set with every learning rate (and β): the runs that are trained side by side over one frozen model."""

    model: nn.Module
    adapter: Adapter
    sets: list[Taught]
    rates: Sequence[float]
    betas: Sequence[float] = (0.5,)
    seed: int = 0
    labels: str = "truth"  # what cross-entropy trains on; "icl": the teacher's responses
    settings: Settings = Settings()
    side_by_side: int | None = None  # runs trained together; None: all
    race: Sequence[str] = ()  # methods whose rates leave when they are beaten (`EarlyStopping`)
    progress: Callable = nullcontext  # of (phase, runs, most steps): a context manager that yields `train_runs`' watch
    first: Callable[[str], Trained] | None = None  # where to get the method that another begins with; None: train it
    after_look: Callable | None = None  # `Runs.after_look` of every phase that is trained

    def configs(self, method: str) -> list[tuple[int, float, float | None]]:
        return configs(method, len(self.sets), self.rates, self.betas)

    def start(self, configs) -> Tensor:
        """First weights [R, M]: the same for all rates of a set."""
        rows = []
        for number in range(len(self.sets)):
            generator = torch.Generator().manual_seed(int(seeded(self.seed, number, "adapter").integers(2**62)))
            rows.append(self.adapter.init(self.model, generator))
        return torch.stack([rows[number] for number, _, _ in configs]).to(next(self.model.parameters()).device)

    def order(self, number: int, rows: int, epoch: int) -> list[int]:
        return seeded(self.seed, number, f"epoch {epoch}").permutation(rows).tolist()

    def train(self, method: str, mix: dict, icl_rows: bool, start: Trained | None = None) -> Trained:
        """One phase of all runs: on the true or the teacher's rows, from fresh or a phase's weights, by `Runs.mix`."""
        configs = self.configs(method)
        theta = self.start(configs) if start is None else start.theta
        sets = [self.sets[number] for number, _, _ in configs]
        rows = [(s.icl_train, s.icl_dev) if icl_rows else (s.train, s.dev) for s in sets]
        weights = {name: torch.as_tensor(w, device=theta.device).expand(len(sets)).float() for name, w in mix.items()}
        rates = torch.tensor([rate for _, rate, _ in configs])
        orders = [partial(self.order, number, len(train)) for (number, _, _), (train, _) in zip(configs, rows)]
        runs = Runs(theta, rates, [train for train, _ in rows], [dev for _, dev in rows], weights, orders)
        runs.after_look = self.after_look
        if method in self.race:
            runs.config = torch.arange(len(configs)) % (len(configs) // len(self.sets))
        steps = self.settings.epochs * -(-len(runs.train[0]) // self.settings.batch_size)
        with self.progress((method, len(runs), steps)) as watch:
            watch = watch if callable(watch) else None
            asked = self.settings, self.side_by_side, watch
            found, self.side_by_side = train_in_parts(self.model, self.adapter, runs, *asked)  # lowered, later too
        if start is not None:
            found.steps += start.steps
        return found

    def begun(self, method: str) -> Trained:
        """What the method that another one begins with has given."""
        return self.first(method) if self.first else METHODS[method](self)


def sft(grid: Grid) -> Trained:
    """Equation 2: cross-entropy on the answers."""
    return grid.train("sft", {"ce": 1.0}, icl_rows=grid.labels == "icl")


def ia2(grid: Grid) -> Trained:
    """Equation 4: the model's own attention outputs with demonstrations, on the teacher's responses."""
    return grid.train("ia2", {"mse": 1.0}, icl_rows=True)


def then_sft(first: str, grid: Grid) -> Trained:
    """Section 4, IA2 → SFT: align first, then cross-entropy from there. The same after another first phase.

    After SFT it is a control: SFT begun again from its own best weights, so that a second phase alone cannot explain
    IA2 → SFT.
    """
    return grid.train(f"{first}-sft", {"ce": 1.0}, icl_rows=grid.labels == "icl", start=grid.begun(first))


def sft_ia2(grid: Grid) -> Trained:
    """The order reversed."""
    return grid.train("sft-ia2", {"mse": 1.0}, icl_rows=True, start=grid.begun("sft"))


def ia2_plus_sft(grid: Grid) -> Trained:
    """Section 6, IA2 + SFT: (1 - β) MSE + β CE at once, on the teacher's responses; a run for every β."""
    betas = torch.tensor([beta for _, _, beta in grid.configs("ia2+sft")])
    return grid.train("ia2+sft", {"mse": 1 - betas, "ce": betas}, icl_rows=True)


def soft(grid: Grid) -> Trained:
    """Section 6, soft labels: KL to the teacher's distribution on its responses (Hinton et al. 2015)."""
    return grid.train("soft", {"kl": 1.0}, icl_rows=True)


def hidden(grid: Grid) -> Trained:
    """As IA2, but the whole residual stream after every attention instead of what attention adds to it."""
    return grid.train("hidden", {"hidden": 1.0}, icl_rows=True)


def ridge(grid: Grid) -> Trained:
    """IA2 in closed form (`ridge.solve`): no steps, no rate; what attention lacks is solved for, layer by layer."""
    configs, device = grid.configs("ridge"), next(grid.model.parameters()).device
    each, theta, dev = len(configs) // len(grid.sets), [], []
    with grid.progress(("ridge", len(configs), len(grid.sets))):
        for first, taught in zip(grid.start(configs)[::each], grid.sets):
            rows = collate([taught.icl_train], device, pack=True)
            theta.append(solve(grid.model, grid.adapter, first[None], rows, grid.settings.layers))
            judges = in_batches([taught.icl_dev or taught.icl_train], device)
            mix = {"mse": torch.ones(1, device=device)}
            dev.append(summed_losses(grid.model, grid.adapter, theta[-1], judges, mix, grid.settings.layers))
    none = [torch.zeros(len(configs), dtype=torch.int64) for _ in range(3)]  # steps
    dev_loss = torch.cat(dev).cpu().repeat_interleave(each)
    return Trained(torch.cat(theta).repeat_interleave(each, 0), dev_loss, *none)


def responses(grid: Grid) -> Trained:
    """Cross-entropy on the teacher's responses (sequence-level distillation, Kim and Rush 2016)."""
    return grid.train("responses", {"ce": 1.0}, icl_rows=True)


METHODS = {"sft": sft, "ia2": ia2, "sft-ia2": sft_ia2, "ia2+sft": ia2_plus_sft}
METHODS |= {"soft": soft, "hidden": hidden, "ridge": ridge, "responses": responses}
FIRST = ("sft", "ia2", "soft", "hidden", "ridge", "responses")
METHODS |= {f"{first}-sft": partial(then_sft, first) for first in FIRST}
BEGINS_WITH = {name: name.partition("-")[0] for name in METHODS if "-" in name}
