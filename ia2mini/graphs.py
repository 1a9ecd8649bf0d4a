"""CUDA graphs: what is computed over and over in the same shapes is recorded once and replayed without Python."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import torch

from .batch import Batch
from .cost import RANK, Pass
from .errors import out_of_memory

OFTEN = 1  # calls of a shape before it is recorded: these also have libraries set themselves up
MOST = 8  # recordings of one function: each keeps a batch, and a graph of thousands of kernels
LAUNCH, RATE = 5e-6, 4e14  # seconds to launch a kernel, FLOP/s of a step: assumed, to be measured on a GPU
COUNTED: Counter = Counter()  # calls, recordings and replays of all steps where there is a recorder


class CudaRecorder:
    """Records a function's kernels -> (what replays them, the function's result, the same tensors every time)."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()  # shared: a replay may overwrite another recording's result

    def __call__(self, function: Callable) -> tuple[Callable, object]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.device)
        mode = "thread_local"  # "global" would have NCCL's own threads, which ask for events, break the capture
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, capture_error_mode=mode):
                return graph.replay, function()
        except BaseException:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
            self.end_allocation()
            raise

    def end_allocation(self) -> None:
        """Tell PyTorch's allocator that the capture has ended: where that fails, PyTorch before 2.12 does not.

        As long as it believes one to be under way it gives no memory back, and says too early that there is none.
        """
        before = "_cuda_endAllocateCurrentStreamToPool"  # its name before 2.8
        end = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(torch._C, before)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(RuntimeError):  # it knew
            end(index, self.pool)


RECORDERS: dict[str, type] = {"cuda": CudaRecorder}  # device type -> what can record there


def launch_bound(config, batch: Batch) -> bool:
    """Whether a training step on `batch` is recorded and takes longer to launch than to compute, by `cost`."""
    if batch.ids.device.type not in RECORDERS:
        return False
    rows, tokens = batch.ids.shape
    step = Pass(rows, tokens, len(batch.targets), True, True, RANK).cost(config)
    return step.kernels * LAUNCH > step.flops / RATE


class CapturedStep:
    """`function(*batches)`, recorded for every shape of its batches that comes often, and replayed from then on.

    The function changes tensors in place, the same ones every time, and brings no value back from the device. Its
    result is overwritten by the next call; so is the batch that was recorded, when others of its shape follow. Where
    there is no recorder the function is called as it is; where recording fails too, with a warning, and nothing is
    recorded there again. Where memory runs out in recording, torch.OutOfMemoryError says so to callers that can do with
    `fewer` runs; others go on with what is recorded.
    """

    def __init__(self, function: Callable, device: torch.device, fewer: bool = False):
        self.function, self.device, self.fewer, self.most = function, device, fewer, MOST
        self.recorder: Callable | None = None
        self.calls, self.recordings = Counter(), {}

    def __call__(self, *batches: Batch):
        if self.device.type not in RECORDERS:
            return self.function(*batches)
        shapes = tuple(t.shape for batch in batches for t in batch.tensors())
        self.calls[shapes] += 1
        COUNTED["calls"] += 1
        if shapes not in self.recordings and self.calls[shapes] > OFTEN and len(self.recordings) < self.most:
            self.record(shapes, batches)
        if shapes not in self.recordings:
            return self.function(*batches)
        own, replay, result = self.recordings[shapes]
        for mine, batch in zip(own, batches):
            for target, source in zip(mine.tensors(), batch.tensors()):
                if target is not source:
                    target.copy_(source)
        replay()
        COUNTED["replays"] += 1
        return result

    def record(self, shapes: tuple, batches: tuple[Batch, ...]) -> None:
        self.recorder = self.recorder or RECORDERS[self.device.type](self.device)
        try:
            self.recordings[shapes] = batches, *self.recorder(lambda: self.function(*batches))
            COUNTED["recordings"] += 1
        except RuntimeError as error:
            if out_of_memory(error):  # or what it followed: ending a capture that failed fails too
                self.most = len(self.recordings)
                if self.fewer:
                    raise torch.OutOfMemoryError(str(error)) from None
                return
            self.recordings.clear()
            RECORDERS.pop(self.device.type)
            reason = str(error.__context__ or error).partition("\n")[0]
            warnings.warn(f"no CUDA graphs from now on: {reason}", stacklevel=3)
