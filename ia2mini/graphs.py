"""CUDA graphs: what is computed over and over in the same shapes is recorded once and replayed, without Python between the kernels."""

import warnings
from collections.abc import Callable
from copy import deepcopy

import torch

from .episode import Batch


class CudaRecorder:
    """Records a function's kernels as a CUDA graph -> (what replays them, the function's result, the same tensors every time)."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()  # shared: no recording's result is needed when another one is replayed

    def __call__(self, function: Callable) -> tuple[Callable, object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        return graph.replay, result


RECORDERS: dict[str, type] = {"cuda": CudaRecorder}  # device type -> what can record there


class Replayed:
    """`function(*batches)`, recorded for every shape of its batches when that comes for the second time, and replayed from then on.

    The function changes tensors in place, the same ones every time, and brings no value back from the device. Its result is overwritten
    by the next call. Where there is no recorder, or recording fails (with a warning), it is called as it is.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.seen = function, {}
        self.record = RECORDERS[device.type]() if device.type in RECORDERS else None

    def __call__(self, *batches: Batch):
        shapes = tuple(t.shape for batch in batches for t in batch.tensors())
        if self.record is None or shapes not in self.seen:
            self.seen[shapes] = None  # a first time as it is: libraries initialise, compilers compile
            return self.function(*batches)
        if self.seen[shapes] is None:
            own = deepcopy(batches)
            try:
                self.seen[shapes] = own, *self.record(lambda: self.function(*own))
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph: {str(error).splitlines()[0]}", stacklevel=2)
                self.record = None
                return self.function(*batches)
        own, replay, result = self.seen[shapes]
        for mine, batch in zip(own, batches):
            for target, source in zip(mine.tensors(), batch.tensors()):
                target.copy_(source)
        replay()
        return result
