"""The three losses, each a value per answer position in float32; `per_run` turns positions into one loss a run (protocol section 4)."""

import warnings
from collections.abc import Callable, Sequence
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor


def per_run(values: Tensor, weights: Tensor) -> Tensor:
    """Losses [R] from values at positions [P], with weights [R, P / R] that average over positions of a row, then over rows."""
    return (values.view(weights.shape) * weights).sum(1)


def activation_mse(outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Equation 4: squared difference of attention outputs, L times [P, D], and targets [L, P, D]: mean over hidden units, summed over
    layers, [P]."""
    return sum(SquaredError.apply(output, target) for output, target in zip(outputs, targets, strict=True))


class SquaredError(torch.autograd.Function):
    """Mean over D of (output - target)² in float32, [P, D] twice -> [P]. Keeps its inputs as they are: no float32 copy lives on."""

    @staticmethod
    def forward(ctx, output: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(output, target)
        return squared_error(output, target)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return squared_error_gradient(*ctx.saved_tensors, grad), None


def fused(function: Callable) -> Callable:
    """`function` as one kernel on a GPU, through torch.compile; as it is on a CPU, or where no compiler works."""
    kernel = None

    @wraps(function)
    def call(*tensors: Tensor) -> Tensor:
        nonlocal kernel
        if not tensors[0].is_cuda or kernel is function:
            return function(*tensors)
        kernel = kernel or torch.compile(function, dynamic=True)  # only now: the compiler alone takes seconds to import
        try:
            return kernel(*tensors)
        except Exception as error:  # a missing compiler shows as one of many
            warnings.warn(f"{function.__name__} runs unfused: {type(error).__name__}", stacklevel=2)
            kernel = function
            return function(*tensors)

    return call


@fused
def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean(-1)


@fused
def squared_error_gradient(output: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    return ((output.float() - target.float()) * (grad[:, None] * (2 / output.shape[-1]))).to(output.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation 2: cross-entropy of logits [P, V] against answer tokens [P]: [P]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def soft_cross_entropy(logits: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """KL(teacher || student) of logits [P, V] against the teacher's log-probabilities [P, k] of tokens `ids` [P, k]: [P].

    Renormalised over the k tokens on the teacher's side; exact for k = V (paper section 6, soft labels).
    """
    student = logits.float().log_softmax(-1).gather(1, ids)
    teacher = teacher.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)
