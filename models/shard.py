"""One model split over ranks, for frozen weights that are too large for one device: tensor parallelism.

All ranks compute the same rows; each has its own share of every layer's heads and hidden units and, of the embedding
and the head, its own columns. Each half of a block ends in one sum over the ranks, so what leaves it (the taps too) is
whole and the same everywhere. A split weight is PyTorch's DTensor: it holds a rank's part and has the whole shape.
Without ranks every function here hands on what it is given. Reference: Shoeybi et al. 2019, section 3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ia2mini import UsageError

Weight = Any  # a Tensor, or of a split model a DTensor, whose import would take a second
OUT, INTO = 0, 1  # dimensions of a matrix [out, in]
DIMENSION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), OUT)  # along which each is split
DIMENSION |= dict.fromkeys(("o_proj", "down_proj", "embed_tokens", "lm_head"), INTO)
EVEN = ("num_key_value_heads", "intermediate_size", "hidden_size")  # what the ranks divide evenly


def check(config, ranks: int) -> None:
    """Raises UsageError for a model that so many ranks cannot share evenly."""
    if odd := [name for name in EVEN if getattr(config, name) % ranks]:
        most = max(n for n in range(1, ranks) if all(getattr(config, name) % n == 0 for name in EVEN))
        what = f"{odd[0]} = {getattr(config, odd[0])} is not a multiple of {ranks} ranks"
        raise UsageError(f"--shard: {what}; use --nproc-per-node {most}")


def part(piece, name: str, dtype: torch.dtype, mesh) -> Tensor:
    """This rank's part of the tensor `name`, of which `piece` is safetensors' slice: only that is read."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    (owner, leaf), rank = name.split(".")[-2:], mesh.get_local_rank()
    dim = DIMENSION.get(owner)
    if dim is None:  # a norm
        return piece[:].to(dtype)
    if leaf == "bias" and dim == INTO:  # counts once in the sum over ranks
        return DTensor.from_local(piece[:].to(dtype) * (rank == 0), mesh, [Partial()], run_check=False)
    size = piece.get_shape()[dim] // mesh.size()
    own = slice(rank * size, (rank + 1) * size)
    own = piece[own] if dim == OUT else piece[:, own]  # a view of the mapped file
    own = own.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, [Shard(dim)], run_check=False)


def join(model: nn.Module, mesh) -> None:
    """Make both halves of every block, whose weights are parts, give their sum over the ranks."""
    model.mesh = mesh
    for block in model.model.layers:
        for half in (block.self_attn, block.mlp):
            half.register_forward_pre_hook(lambda half, args: (shared(args[0], mesh), *args[1:]))
            half.register_forward_hook(lambda half, args, y: whole(y, mesh))


def mesh_of(model: nn.Module):
    """The ranks that a model is split over; None for a whole one."""
    return getattr(model, "mesh", None)


def is_split(weight: Weight) -> bool:
    return hasattr(weight, "device_mesh")


def local(weight: Weight) -> Tensor:
    """A weight, or this rank's part of it."""
    return weight.to_local() if is_split(weight) else weight


def own(t: Tensor, dim: int, weight: Weight, side: int) -> Tensor:
    """This rank's part of t along `dim`, which goes along the side OUT or INTO of a map with this `weight`."""
    if not is_split(weight) or not weight.placements[0].is_shard(side):
        return t
    return t.chunk(weight.device_mesh.size(), dim)[weight.device_mesh.get_local_rank()]


def shared(x: Tensor, mesh) -> Tensor:
    """x, the same on all ranks, for what each computes of it alone: its gradient is the sum of theirs."""
    if mesh is None or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def whole(y: Tensor, mesh) -> Tensor:
    """The ranks' y summed: the same on all."""
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(y, mesh, [Partial()], run_check=False).full_tensor()


def through(function: Callable, x: Tensor, weight: Weight) -> Tensor:
    """function(x, weight), whole on all ranks, for a weight that may be split."""
    if not is_split(weight):
        return function(x, weight)
    from torch.distributed.tensor import DTensor, Replicate

    return function(DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False), weight).full_tensor()
