"""IA2 in closed form: what is missing in each attention output, as a ridge regression on what W_O reads."""

from functools import partial

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, LoRA, adapted, unpack
from .batch import Batch
from .models.shard import mesh_of

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the penalty, as shares of the mean squared length of what W_O reads


@torch.no_grad()
def solve(model: nn.Module, adapter: Adapter, theta: Tensor, batch: Batch, layers: list[int] | None = None) -> Tensor:
    """Weights [R, M] with LoRA's update of every W_O solved for the batch's `activations`, in one forward pass.

    Layer by layer, so that each sees what the layers before it have become. Raises UsageError where LoRA leaves W_O.
    """
    theta, depth = theta.clone(), model.config.num_hidden_layers
    weights = unpack(theta, adapter.shapes)  # views: what is written there is what the pass goes on with
    if not isinstance(adapter, LoRA) or "o_proj" not in adapter.targets:
        raise UsageError("method ridge solves for LoRA's o_proj: use --adapter lora, with o_proj among --targets")
    if mesh_of(model) is not None:
        raise UsageError("method ridge needs the whole of W_O at once: leave out --shard")
    with adapted(model, adapter, theta) as student:
        for wanted, layer in zip(batch.activations, range(depth) if layers is None else layers):
            name = f"model.layers.{layer}.self_attn.o_proj"
            linear = adapter.linears[name]
            factors = weights[f"{name}.A"], weights[f"{name}.B"]
            linear.adapter = partial(solved, linear.adapter, factors, wanted, batch, adapter.alpha / adapter.rank)
        student(batch.ids, logits=False, cache=batch.packed)
    return theta


def solved(
    change, factors: tuple[Tensor, Tensor], wanted: Tensor, batch: Batch, scale: float, base, x: Tensor
) -> Tensor:
    """A seam of W_O that first solves for its own `factors` A [R, r, in] and B [R, out, r]."""
    A, B = factors
    share = batch.weights.double().sqrt()[..., None]  # [R, P, 1]: rows count alike, however long their answers are
    read, missing = (
        t.double().view(len(A), -1, t.shape[-1]) * share for t in (x[batch.at], wanted - base(x)[batch.at])
    )
    left, size, right = ridge(read, missing)
    kept = (size > 1e-6 * size[:, :1])[:, : A.shape[1], None]
    root = (size / scale).sqrt()[:, None]
    r = kept.shape[1]
    A[:, :r] = torch.where(kept, (right * root).mT[:, :r].float(), A[:, :r])
    B[:, :, :r] = (left * root)[..., :r].float() * kept.mT
    return change(base, x)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W [R, out, in] with W x ≈ y of x [R, P, in], y [R, P, out]: its left vectors, singular values, right vectors.

    Each run's strength is the one of `STRENGTHS` with the least error on positions left out one at a time.
    """
    gram, eye = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    unit = (lengths.sum(-1) / (lengths > 0).sum(-1))[:, None, None]
    inverse = torch.stack([torch.linalg.inv(gram + strength * unit * eye) for strength in STRENGTHS])  # [S, R, P, P]
    dual = inverse @ y
    left_out = dual / inverse.diagonal(dim1=-2, dim2=-1)[..., None]  # the errors, without a fit for each
    best = left_out.square().sum((-2, -1)).argmin(0)
    dual = dual[best, torch.arange(len(x), device=x.device)]  # [R, P, out]: W = dual^T x
    (left, a), (right, b) = torch.linalg.qr(dual.mT), torch.linalg.qr(x.mT)
    u, size, v = torch.linalg.svd(a @ b.mT, full_matrices=False)
    return left @ u, size, right @ v.mT
