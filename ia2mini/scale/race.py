"""Stop learning rates that cannot win any more; they are compared over all sets during training."""

import torch
from torch import Tensor

from ..train import State

# all three in evaluations of the dev loss
FIRST = 10  # the first at which learning rates are compared
PACE = 3  # the fall of the loss is measured over the last so many
AHEAD = 30  # and extrapolated this many ahead


class Race:
    """An `after_evaluation` hook. A rate is beaten, and its runs end, when its mean best dev loss over sets would still
    be above that of the best rate if it went on falling for `AHEAD` evaluations as it did in the last `PACE`.

    Rates are compared only while all runs that still train do so side by side: where memory or processes take them in
    parts, each part trains to its end.
    """

    def __init__(self, config: Tensor):
        self.config = config  # [R] int64, the number of each run's learning rate (and β)
        self.dev_loss = torch.full((len(config),), torch.inf)
        self.going = torch.ones(len(config), dtype=torch.bool)
        self.over = False
        self.means: list[Tensor] = []  # of each evaluation, a mean a rate

    def __call__(self, state: State) -> bool:
        elsewhere = self.going.clone()
        elsewhere[state.index] = False
        self.over |= bool(elsewhere.any())
        if self.over:
            return False
        self.dev_loss[state.index] = state.dev_loss
        state.going &= ~self.beaten()[state.index]
        self.going[state.index] = state.going
        return False

    def beaten(self) -> Tensor:
        """Which runs have a rate that is beaten, after one more evaluation, [R] bool."""
        nobody = torch.zeros(len(self.config), dtype=torch.bool)
        means = torch.zeros(int(self.config.max()) + 1)
        means.scatter_reduce_(0, self.config, self.dev_loss, "mean", include_self=False)
        self.means.append(means)
        if len(self.means) < FIRST or means.min().isinf():
            return nobody
        fall = (self.means[-1 - PACE] - means) / PACE
        reached = means - AHEAD * fall
        may_win = reached <= means.min()  # False for NaN: a rate of which a run has diverged
        return ~may_win[self.config]
