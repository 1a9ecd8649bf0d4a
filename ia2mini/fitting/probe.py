"""A linear probe: logistic regression on the base's last hidden state. It needs no training of the model.

n rows, D hidden, C labels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import UsageError
from ..batch import TokenRow, by_length, collate, join_groups
from ..files import write
from ..models.taps import device_of

PROBE = "probe.safetensors"

# of the squared weights, for standardised states and the sum of the rows' losses; cross-validation picks one
PENALTIES = (0.1, 1.0, 10.0, 100.0)
UNSEEN = -87.0  # log-probability of a label without a training row


@dataclass
class Probe:
    """log-probabilities = log_softmax(states @ weight.T + bias)."""

    weight: Tensor  # [C, D] float32
    bias: Tensor  # [C]

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Of the labels, [n, C], of rows whose prompts end with `states` [n, D]."""
        return (states @ self.weight.T + self.bias).log_softmax(-1)


@torch.no_grad()
def last_states(model: Callable, prompts: list[list[int]], budget: int = 4096) -> Tensor:
    """The head's input [Q, D] at the last token of each prompt, float32 on the CPU."""
    groups = by_length(list(map(len, prompts)), budget)
    parts = []
    for group in groups:
        # any token in place of an answer: the state that would predict it is the one at the prompt's end
        rows = [TokenRow(prompts[i], [0]) for i in group]
        batch = collate([rows]).to(device_of(model))
        states = model(batch.ids, logits=batch.at, head=False)
        parts.append(states.float())
    return join_groups(parts, groups, dim=0).cpu()


def fit_probe(states: Tensor, gold: Tensor, labels: int, penalty: float) -> Probe:
    """Logistic regression with an L2 penalty on standardised `states` [n, D]; `gold` [n] are indices of labels.

    Minimises the sum of the rows' losses + penalty / 2 * squared weights by L-BFGS, as scikit-learn does with
    C = 1 / penalty. A label without a row gets `UNSEEN`.
    """
    wide = states.double()
    mean = wide.mean(0)
    deviation = wide.std(0, correction=0)
    deviation[deviation == 0] = 1
    standardised = (wide - mean) / deviation
    seen = gold.unique()
    target = torch.searchsorted(seen, gold)
    # the penalty keeps the weights in the span of the rows: fewer coordinates, at right angles
    U, S, Vh = torch.linalg.svd(standardised, full_matrices=False)
    reduced = U * S
    coefficients = torch.zeros(len(seen), len(S), dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros(len(seen), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients, intercept],
        max_iter=1000,
        history_size=30,
        tolerance_grad=1e-7,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = reduced @ coefficients.T + intercept
        total = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        total = total + penalty / 2 * coefficients.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    W = coefficients.detach() @ Vh
    W = W / deviation  # of states as they are
    weight = torch.zeros(labels, states.shape[1])
    bias = torch.full((labels,), UNSEEN)
    weight[seen] = W.float()
    bias[seen] = (intercept.detach() - W @ mean).float()
    return Probe(weight, bias)


def held_out_scores(states: Tensor, gold: Tensor, folds: list[list[int]], labels: int) -> Tensor:
    """Log-probabilities [penalties, n, C] of rows with `states` [n, D], each fold's by a probe of the other folds'.

    Labels that none of m other rows has share a probability of 1 / (m + 1): one such row must not decide everything.
    """
    scores = torch.zeros(len(PENALTIES), len(states), labels)
    for number, penalty in enumerate(PENALTIES):
        for test in folds:
            others = sorted(set(range(len(states))) - set(test))
            probe = fit_probe(states[others], gold[others], labels, penalty)
            found = probe.log_probabilities(states[test])
            there = torch.bincount(gold[others], minlength=labels) > 0
            unseen = int((~there).sum())
            if unseen:
                share = 1 / (len(others) + 1)
                found[:, there] += math.log(1 - share)
                found[:, ~there] = math.log(share / unseen)
            scores[number, test] = found
    return scores


def write_probe(probe: Probe, path: Path) -> None:
    """Write a probe's two tensors as one file."""
    tensors = {"weight": probe.weight.contiguous(), "bias": probe.bias.contiguous()}
    write(path, partial(save_file, tensors))


def read_probe(folder: Path, labels: int, hidden: int) -> Probe:
    """The probe of a folder, for so many labels and this hidden size. Raises UsageError where it is damaged."""
    path = folder / PROBE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: the probe is missing or damaged ({error}); fit again") from None
    wanted = {"weight": (labels, hidden), "bias": (labels,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        raise UsageError(f"{path}: holds {shapes} in place of {wanted}; fit it again")
    return Probe(found["weight"].float(), found["bias"].float())
