"""CUDA graphs: a computation that repeats in the same shapes is recorded once and replayed without Python."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import out_of_memory
from ..train import Runs, Settings

OFTEN = 1  # calls of a shape before it is recorded; libraries also initialise themselves in these
MOST_RECORDINGS = (
    8  # recordings of one function; each keeps a batch and a graph of thousands of kernels
)
SECONDS_PER_LAUNCH = 5e-6  # of a kernel: assumed, to be measured on a GPU
FLOP_PER_SECOND = 4e14  # of a step: assumed, to be measured on a GPU
KERNELS_PER_LAYER = 170  # in a training step with LoRA, counted for Qwen3 in bfloat16
COUNTED: Counter = Counter()  # calls, recordings and replays of all steps where there is a recorder


class CudaRecorder:
    """Records a function's kernels -> (what replays them, the function's result, the same tensors every time)."""

    def __init__(self, device: torch.device):
        self.device = device
        # shared: a replay may overwrite another recording's result
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable) -> tuple[Callable, object]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.device)
        # "global" would have NCCL's own threads, which ask for events, break the capture
        mode = "thread_local"
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode=mode),
            ):
                return graph.replay, function()
        except BaseException:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
            self.end_allocation()
            raise

    def end_allocation(self) -> None:
        """Tell PyTorch's allocator that the capture has ended. After a failed capture PyTorch before 2.12 does not.

        While the allocator believes in a capture it frees no memory, and reports too early that memory has run out.
        """
        before = "_cuda_endAllocateCurrentStreamToPool"  # its name before 2.8
        end = getattr(torch._C, "_cuda_endAllocateToPool", None) or getattr(torch._C, before)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(RuntimeError):  # the allocator knew already
            end(index, self.pool)


RECORDERS: dict[str, type] = {"cuda": CudaRecorder}  # device type -> what can record there


def recorded(function: Callable, device: torch.device) -> Callable:
    """A `wrap` hook of the loop: a `CapturedStep` of the function where steps can be recorded, else the function."""
    return CapturedStep(function, device) if device.type in RECORDERS else function


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a batch that a forward pass reads, on its device."""
    found = [batch.ids, *batch.at, batch.targets, batch.weights]
    given = [batch.activations, batch.soft, batch.soft_ids, batch.states, batch.runs, batch.rows]
    found += [tensor for tensor in given if tensor is not None]
    if batch.packed is not None:
        found += [batch.packed.mask, batch.packed.places]
    return found


def launch_bound(model: nn.Module, runs: Runs, settings: Settings) -> bool:
    """Whether a training step is recorded, and launching its kernels takes longer than computing them.

    Then finished runs leave only when half have finished, because every new shape needs a new recording.
    """
    weight = model.model.embed_tokens.weight
    if weight.device.type not in RECORDERS:
        return False
    config = model.config
    block_weights = sum(weights.numel() for weights in model.model.layers[0].parameters())
    longest = max(len(row) for rows in runs.train for row in rows)
    tokens = len(runs) * min(settings.batch_size, len(runs.train[0])) * longest
    # forward, and the gradient of every input
    operations = 4 * tokens * block_weights * config.num_hidden_layers
    kernels = KERNELS_PER_LAYER * config.num_hidden_layers
    return kernels * SECONDS_PER_LAUNCH > operations / FLOP_PER_SECOND


class CapturedStep:
    """`function(*batches)`, recorded for every shape of its batches that comes often, and replayed from then on.

    The function changes tensors in place, the same ones every time, and brings no value back from the device. Its
    result is overwritten by the next call; so is the batch that was recorded, when others of its shape follow. Where
    there is no recorder the function is called as it is; where recording fails too, with a warning, and nothing is
    recorded there again. Where memory runs out in recording a batch of several runs, torch.OutOfMemoryError says so:
    fewer runs may do. With one run, or none, what is recorded already has to do.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function = function
        self.device = device
        self.most = MOST_RECORDINGS
        self.recorder: Callable | None = None
        self.calls: Counter = Counter()
        self.recordings: dict = {}

    def __call__(self, *batches: Batch):
        if self.device.type not in RECORDERS:
            return self.function(*batches)
        shapes = tuple(t.shape for batch in batches for t in tensors_of(batch))
        self.calls[shapes] += 1
        COUNTED["calls"] += 1
        if (
            shapes not in self.recordings
            and self.calls[shapes] > OFTEN
            and len(self.recordings) < self.most
        ):
            self.record(shapes, batches)
        if shapes not in self.recordings:
            return self.function(*batches)
        own, replay, result = self.recordings[shapes]
        for mine, batch in zip(own, batches):
            for target, source in zip(tensors_of(mine), tensors_of(batch)):
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
                if batches and len(batches[0].weights) > 1:
                    raise torch.OutOfMemoryError(str(error)) from None
                return
            self.recordings.clear()
            RECORDERS.pop(self.device.type)
            reason = str(error.__context__ or error).partition("\n")[0]
            warnings.warn(f"no CUDA graphs from now on: {reason}", stacklevel=3)
