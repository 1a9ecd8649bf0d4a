"""The methods of the paper, each a few lines: which losses a phase sums, on whose answers, from which weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter
from .batch import TokenRow, collate
from .episode import seeded
from .models.taps import device_of
from .ridge import solve
from .teacher import Taught
from .train import Hooks, Runs, Settings, State, Trained, loss_over_batches, train

TRUTH = "truth"  # the rows with their true answers
ICL = "icl"  # the rows with the teacher's responses
DEMONSTRATED = "demonstrated"  # the rows with demonstrations in the prompt and their true answers


def configs(method: str, sets: int, rates: Sequence[float], betas: Sequence[float]) -> list[tuple]:
    """(set, rate, β or None) of each run of a method, in the order of the R axis."""
    mixes = betas if method == "ia2+sft" else [None]
    return list(product(range(sets), rates, mixes))


@dataclass
class Grid:
    """Every set with every learning rate (and β): the runs that are trained side by side over one frozen model."""

    model: nn.Module
    adapter: Adapter
    sets: list[Taught]
    rates: Sequence[float]
    betas: Sequence[float] = (0.5,)
    seed: int = 0
    labels: str = TRUTH  # what cross-entropy trains on: TRUTH or ICL
    settings: Settings = Settings()
    hooks: Hooks = Hooks()
    trainer: Callable = train  # or `train` with what wraps it

    def configs(self, method: str) -> list[tuple[int, float, float | None]]:
        return configs(method, len(self.sets), self.rates, self.betas)

    def first_weights(self, number: int) -> Tensor:
        """First weights [M] of a set: the same at all its rates, so that rates are compared from one start."""
        generator = torch.Generator().manual_seed(
            int(seeded(self.seed, number, "adapter").integers(2**62))
        )
        return self.adapter.init(generator)

    def order(self, number: int, rows: int, epoch: int) -> list[int]:
        """The order of a set's rows in an epoch."""
        return seeded(self.seed, number, f"epoch {epoch}").permutation(rows).tolist()

    def train(self, method: str, mix: dict, answers: str, start: Trained | None = None) -> Trained:
        """One phase of all runs of a method.

        `method` only says how many runs there are (`configs`). `mix`: loss -> its weight, a number or [R]; `answers`:
        TRUTH, ICL or DEMONSTRATED. It starts from the weights of `start`, an earlier phase, or from fresh ones.
        """
        device = device_of(self.model)
        configs = self.configs(method)
        numbers = [number for number, _, _ in configs]  # each run's set
        if start is None:
            of_sets = [self.first_weights(number) for number in range(len(self.sets))]
            theta = torch.stack([of_sets[number] for number in numbers]).to(device)
        else:
            theta = start.theta
        train_rows = []
        dev_rows = []
        orders = []
        for number in numbers:
            rows, dev = rows_with(self.sets[number], answers)
            train_rows.append(rows)
            dev_rows.append(dev)
            orders.append(partial(self.order, number, len(rows)))
        weights = {}
        for loss, weight in mix.items():
            weight = torch.as_tensor(weight, device=device)
            weights[loss] = weight.expand(len(configs)).float()
        rates = torch.tensor([rate for _, rate, _ in configs])
        runs = Runs(theta, rates, train_rows, dev_rows, weights, orders)
        state = State.begin(theta)
        state = self.trainer(self.model, self.adapter, runs, self.settings, state, self.hooks)
        trained = state.trained()
        if start is not None:
            trained.steps += start.steps
        return trained


def rows_with(taught: Taught, answers: str) -> tuple[list[TokenRow], list[TokenRow]]:
    """The training and dev rows of a set with these answers. Raises UsageError where the teacher made none."""
    rows = {
        TRUTH: (taught.train, taught.dev),
        ICL: (taught.icl_train, taught.icl_dev),
        DEMONSTRATED: (taught.demonstrated_train, taught.demonstrated_dev),
    }
    if answers not in rows:
        raise UsageError(f"answers {answers!r}: use {', '.join(rows)}")
    train_rows, dev_rows = rows[answers]
    if not train_rows:
        raise UsageError(f"no rows with the answers {answers!r}: `teach` was not asked for them")
    return train_rows, dev_rows


def sft(grid: Grid) -> Trained:
    """Equation 2: cross-entropy on the answers."""
    return grid.train("sft", {"ce": 1.0}, grid.labels)


def icl_sft(grid: Grid) -> Trained:
    """Cross-entropy on the answers with demonstrations in the prompt, where they stay (arXiv 2512.19879)."""
    return grid.train("icl-sft", {"ce": 1.0}, DEMONSTRATED)


def ia2(grid: Grid) -> Trained:
    """Equation 4: match the model's own attention outputs with demonstrations, on the teacher's responses."""
    return grid.train("ia2", {"mse": 1.0}, ICL)


def then_sft(first: str) -> Callable:
    """Section 4, IA2 → SFT: the method that runs `first`, then cross-entropy from its weights.

    "sft-sft" is a control: SFT begun again from its own best weights, so that a second phase alone cannot explain
    IA2 → SFT.
    """

    def both_phases(grid: Grid, start: Trained | None = None) -> Trained:
        start = start or METHODS[first](grid)
        return grid.train(f"{first}-sft", {"ce": 1.0}, grid.labels, start)

    return both_phases


def sft_ia2(grid: Grid, start: Trained | None = None) -> Trained:
    """IA2 → SFT in reverse: cross-entropy first, then alignment."""
    start = start or sft(grid)
    return grid.train("sft-ia2", {"mse": 1.0}, ICL, start)


def ia2_plus_sft(grid: Grid) -> Trained:
    """Section 6, IA2 + SFT: (1 - β) MSE + β CE at once, on the teacher's responses; a run for every β."""
    betas = torch.tensor([beta for _, _, beta in grid.configs("ia2+sft")])
    return grid.train("ia2+sft", {"mse": 1 - betas, "ce": betas}, ICL)


def soft(grid: Grid) -> Trained:
    """Section 6, soft labels: KL to the teacher's distribution on its responses (Hinton et al. 2015)."""
    return grid.train("soft", {"kl": 1.0}, ICL)


def hidden(grid: Grid) -> Trained:
    """As IA2, but the whole residual stream after every attention instead of what attention adds to it."""
    return grid.train("hidden", {"hidden": 1.0}, ICL)


def ridge(grid: Grid) -> Trained:
    """IA2 in closed form (`ridge.solve`): a ridge regression for each layer, without steps or a learning rate."""
    device = device_of(grid.model)
    layers = grid.settings.layers
    mse = {"mse": torch.ones(1, device=device)}
    theta = []
    dev_loss = []
    for number, taught in enumerate(grid.sets):
        first = grid.first_weights(number).to(device)
        rows = collate([taught.icl_train]).to(device)
        dev_batches = grid.hooks.collate([taught.icl_dev or taught.icl_train])
        dev = [batch.to(device) for batch in dev_batches]
        solved = solve(grid.model, grid.adapter, first[None], rows, layers)
        theta.append(solved)
        dev_loss.append(loss_over_batches(grid.model, grid.adapter, solved, dev, mse, layers))
    runs = len(grid.configs("ridge"))
    runs_of_a_set = runs // len(grid.sets)
    no_steps = torch.zeros(runs, dtype=torch.int64)
    return Trained(
        theta=torch.cat(theta).repeat_interleave(runs_of_a_set, 0),
        dev_loss=torch.cat(dev_loss).cpu().repeat_interleave(runs_of_a_set),
        steps=no_steps,
        best=no_steps.clone(),
        broken=no_steps.clone(),
    )


METHODS: dict[str, Callable] = {
    "sft": sft,
    "icl-sft": icl_sft,
    "ia2": ia2,
    "ia2-sft": then_sft("ia2"),
    "sft-sft": then_sft("sft"),
    "sft-ia2": sft_ia2,
    "ia2+sft": ia2_plus_sft,
    "soft": soft,
    "soft-sft": then_sft("soft"),
    "hidden": hidden,
    "hidden-sft": then_sft("hidden"),
    "ridge": ridge,
    "ridge-sft": then_sft("ridge"),
}
WITH_DEMONSTRATIONS = ("icl", "icl-sft")  # evaluated with demonstrations in the prompt
# method -> its first phase
STARTS_FROM = {
    "ia2-sft": "ia2",
    "sft-sft": "sft",
    "sft-ia2": "sft",
    "soft-sft": "soft",
    "hidden-sft": "hidden",
    "ridge-sft": "ridge",
}
