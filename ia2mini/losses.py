"""The losses (protocol section 4), float32 per answer position; `mean_of_run` averages them to one loss per run.

R runs, B rows of a run, P answer positions, L layers, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import UsageError
from .batch import Batch
from .models.fused import fused

LOSS_LOGITS = 2**25  # logits computed at once: 128 MB in float32


def per_run(values: Tensor, weights: Tensor) -> Tensor:
    """Losses [R] from values [P], with weights [R, P / R] that average over positions of a row, then over rows."""
    weighted = values.view(weights.shape) * weights
    return weighted.sum(1)


def per_run_in_bfloat16(values: Tensor, rows: Tensor, layers: int = 1) -> Tensor:
    """As `per_run`, with each row's loss rounded to bfloat16, as the paper's released scripts have it: [R].

    `rows` [R, B, P / R] is 1 where a position belongs to a row. A row's mean over layers is rounded, and so is that
    mean times the number of layers; the mean over rows is float32.
    """
    positions = rows.sum(-1)  # [R, B] of each row
    of_run = values.view(len(rows), 1, -1)
    row_sums = (of_run * rows).sum(-1)
    row_means = row_sums / positions.clamp_min(1)
    rounded = (row_means / layers).bfloat16() * layers
    rows_of_run = (positions > 0).sum(-1)
    return rounded.float().sum(-1) / rows_of_run


def mean_of_run(values: Tensor, batch: Batch, layers: int = 1) -> Tensor:
    """Each run's mean [R] of losses `values` [P], which are sums over so many layers."""
    if batch.rows is None:
        return per_run(values, batch.weights)
    return per_run_in_bfloat16(values, batch.rows, layers)


def activation_mse(outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Equation 4: squared error of outputs, L times [P, D], to targets [L, P, D]; mean over D, sum over L: [P]."""
    layers = zip(outputs, targets, strict=True)
    return sum(SquaredError.apply(output, target) for output, target in layers)


class SquaredError(torch.autograd.Function):
    """Mean over D of (output - target)² in float32, [P, D] twice -> [P]; no float32 copy of its inputs lives on."""

    @staticmethod
    def forward(ctx, output: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(output, target)
        return squared_error(output, target)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return squared_error_gradient(*ctx.saved_tensors, grad), None


@fused
def squared_error(output: Tensor, target: Tensor) -> Tensor:
    difference = output.float() - target.float()
    return difference.square().mean(-1)


@fused
def squared_error_gradient(output: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    D = output.shape[-1]
    difference = output.float() - target.float()
    slope = grad[:, None] * (2 / D)
    gradient = difference * slope
    return gradient.to(output.dtype)


def kl_divergence(states: Tensor, head: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """KL(teacher || student) [P] of states [P, D] through the frozen head [V, D] (paper section 6, soft labels).

    `teacher` are log-probabilities [P, k] of tokens `ids` [P, k], renormalised over the k; exact for k = V.
    """
    return HeadDivergence.apply(states, head, teacher.float().log_softmax(-1), ids)


def cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Equation 2: cross-entropy [P] of states [P, D] through the frozen head [V, D] against answer tokens [P]."""
    # KL to a teacher who is certain: log 1 = 0
    certain = torch.zeros(len(targets), 1, device=targets.device)
    return HeadDivergence.apply(states, head, certain, targets[:, None])


class HeadDivergence(torch.autograd.Function):
    """KL [P], sum(exp(t) * (t - log q)): t [P, k] the teacher's log-probabilities of tokens `ids`, log q the student's.

    exp(t) sums to one. The forward pass also computes the gradient for `states`, portion by portion, so that the logits
    [P, V] are never in memory as a whole.
    """

    @staticmethod
    def forward(ctx, states: Tensor, head: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        assert not ctx.needs_input_grad[1], "the head is frozen"
        portion = max(1, LOSS_LOGITS // len(head))
        portions = zip(states.split(portion), teacher.split(portion), ids.split(portion))
        values = []
        gradients = []
        for x, t, i in portions:
            logits = F.linear(x, head)
            student = logits.float().log_softmax(-1)
            share = t.exp()
            difference = t - student.gather(1, i)
            values.append((share * difference).sum(-1))
            if ctx.needs_input_grad[0]:
                # the gradient of KL for logits: softmax - exp(t)
                grad_logits = student.exp_()
                grad_logits.scatter_add_(1, i, -share)
                gradients.append(grad_logits.to(x.dtype) @ head)
        ctx.save_for_backward(*gradients)
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = torch.cat(ctx.saved_tensors)
        return gradient * grad[:, None].to(gradient.dtype), None, None, None


def own_loss(loss: Callable, student: Callable, batch: Batch) -> Tensor:
    """The values [R] of a loss of one's own. Raises UsageError for another shape, or if nothing can be learned."""
    values = loss(partial(student, cache=batch.packed), batch)
    name = getattr(loss, "__name__", repr(loss))
    shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    R = len(batch.weights)
    if shape != (R,):
        expected = f"one number for each of the {R} runs, a tensor of shape ({R},)"
        raise UsageError(f"the loss {name} returned {shape}; return {expected}")
    if torch.is_grad_enabled() and not values.requires_grad:
        raise UsageError(f"the loss {name} does not depend on what `student` computes; call it")
    return values
