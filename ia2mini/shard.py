"""Ranks that compute one split model (models/shard.py): all do the same work; the first writes, speaks and decides."""

import os
import sys

from . import UsageError

ranks: list[int] = []  # of this process, where a model is split


def first() -> bool:
    """Whether this process writes and speaks: the only one, or the first of those that share a model."""
    return ranks in ([], [0])


def start(device: str):
    """The mesh of all processes that torchrun has started, and the device of this one. Raises UsageError."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from .graphs import RECORDERS

    if "LOCAL_RANK" not in os.environ:
        raise UsageError("--shard splits the model over processes; begin with torchrun --nproc-per-node K -m ia2mini")
    if (kind := torch.device(device).type) == "cuda":
        torch.cuda.set_device(device := f"cuda:{os.environ['LOCAL_RANK']}")
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
    ranks[:] = [mesh.get_rank()]
    RECORDERS.clear()  # no CUDA graphs: what the ranks say to one another has not been tried in one
    if not first():
        sys.stdout = open(os.devnull, "w")
    return mesh, device


def agreed(value=None):
    """The first rank's value, on every rank that shares its model; none goes on before the first is here."""
    if ranks:
        from torch.distributed import broadcast_object_list

        broadcast_object_list(held := [value], src=0)
        return held[0]
    return value


def lost(error: Exception) -> bool:
    """Whether an error says that another rank has ended: torch's own classes, or gloo's words."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)
