"""IA2 in closed form: what is missing in each attention output, as a ridge regression on what W_O reads.

R runs, P answer positions of a run, S strengths of the penalty.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, LoRA, adapted, unpack
from .batch import Batch

# of the penalty, as shares of the mean squared length of what W_O reads
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
NEGLIGIBLE = 1e-6  # share of the largest singular value, below which one is dropped


@torch.no_grad()
def solve(
    model: nn.Module, adapter: Adapter, theta: Tensor, batch: Batch, layers: list[int] | None = None
) -> Tensor:
    """Weights [R, M] with LoRA's update of every W_O solved for the batch's `activations`, in one forward pass.

    Layer by layer, so that each layer sees the changed output of those before it. Raises UsageError unless the adapter
    is LoRA on W_O, and for OLMo 2.
    """
    if not isinstance(adapter, LoRA) or "o_proj" not in adapter.targets:
        raise UsageError(
            "method ridge solves for LoRA's o_proj: use --adapter lora, with o_proj among --targets"
        )
    if theta.device.type == "mps":
        raise UsageError("method ridge computes in float64, which mps has not; use --device cpu")
    if model.config.model_type == "olmo2":
        raise UsageError(
            "method ridge solves for what o_proj gives, and OLMo 2 normalises that before it is added; "
            "use ia2"
        )
    # Granite's multiplier, which o_proj's output still lacks
    factor = getattr(model.config, "residual_multiplier", 1.0)
    theta = theta.clone()
    # views of theta: the rest of the pass uses what is written into them
    weights = unpack(theta, adapter.shapes)
    if layers is None:
        layers = list(range(model.config.num_hidden_layers))
    with adapted(model, adapter, theta) as student:
        for target, layer in zip(batch.activations, layers):
            name = f"model.layers.{layer}.self_attn.o_proj"
            A = weights[f"{name}.A"]
            B = weights[f"{name}.B"]
            linear = adapter.linears[name]
            solver = partial(solve_one, A, B, target / factor, batch, adapter.scale)
            linear.adapted = partial(solved_first, solver, linear.adapted)
        student(batch.ids, logits=False, cache=batch.packed)
    return theta


def solved_first(solver: Callable, change: Callable, base: Callable, x: Tensor) -> Tensor:
    """The adapter of W_O: first solve for its factors from the input x, then apply it."""
    solver(base, x)
    return change(base, x)


def solve_one(
    A: Tensor, B: Tensor, target: Tensor, batch: Batch, scale: float, base: Callable, x: Tensor
) -> None:
    """Write into A [R, rank, in], B [R, out, rank] the factors with scale * B A x ≈ target - base(x), [R * P, out]."""
    R, rank, _ = A.shape
    # [R, P, 1]: rows count alike, however long their answers are
    root_weights = batch.weights.double().sqrt()[..., None]
    inputs = x[batch.at].double()
    inputs = inputs.unflatten(0, (R, -1))  # [R, P, in]
    output = base(x)[batch.at]
    residual = (target - output).double()
    residual = residual.unflatten(0, (R, -1))  # [R, P, out]
    left, singular, right = ridge_regression(inputs * root_weights, residual * root_weights)
    rank = min(rank, singular.shape[1])
    largest = singular[:, :1]
    is_significant = singular > NEGLIGIBLE * largest
    is_significant = is_significant[:, :rank, None]
    root = (singular / scale).sqrt()[:, None]  # each factor takes the root of a singular value
    solved_A = (right * root).mT.float()
    solved_B = (left * root).float()
    A[:, :rank] = torch.where(is_significant, solved_A[:, :rank], A[:, :rank])
    B[:, :, :rank] = solved_B[..., :rank] * is_significant.mT


def ridge_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W [R, out, in] with W x ≈ y of x [R, P, in], y [R, P, out]: its left vectors, singular values, right vectors.

    Each run's strength is the one of `STRENGTHS` with the least error on positions left out one at a time.
    """
    R, P, _ = x.shape
    gram = x @ x.mT  # [R, P, P]
    squared_lengths = gram.diagonal(dim1=-2, dim2=-1)
    positions = (squared_lengths > 0).sum(-1)
    mean_square = (squared_lengths.sum(-1) / positions)[:, None, None]
    identity = torch.eye(P, dtype=x.dtype, device=x.device)
    inverses = []
    for strength in STRENGTHS:
        penalty = strength * mean_square * identity
        inverses.append(torch.linalg.inv(gram + penalty))
    inverse = torch.stack(inverses)  # [S, R, P, P]
    dual = inverse @ y
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    left_out_errors = dual / diagonal[..., None]  # exact: the residuals of ridge, leave one out
    errors = left_out_errors.square().sum((-2, -1))  # [S, R]
    best = errors.argmin(0)
    every_run = torch.arange(R, device=x.device)
    dual = dual[best, every_run]  # [R, P, out]: W = dual^T x
    # the singular vectors of dual^T x by those of a small core: [out, in] is never formed
    left, a = torch.linalg.qr(dual.mT)
    right, b = torch.linalg.qr(x.mT)
    core = a @ b.mT
    u, size, v = torch.linalg.svd(core, full_matrices=False)
    return left @ u, size, right @ v.mT
