"""Several processes started by torchrun: all run the same program and receive all results.

The first process (`chief`) keeps the files and shows the progress; what is dealt out each process keeps itself. Work is
dealt out at one level: sets when teaching and scoring, runs when training. The command line asks here before it
computes: torch is imported where it is used.
"""

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from .. import UsageError
from ..errors import out_of_memory

LOST = "another process has ended; finished work is kept, and the same command resumes it"
NEVER = timedelta(days=7)  # an idle process waits for the others, however long they work
rank = 0
size = 1
chief = True  # whether this process is the first
store = None  # keys that all processes see


def torchrun_started_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ


def start() -> None:
    """Join the other processes of torchrun; each process gets its own GPU if there are enough."""
    global rank, size, chief, store
    if store is not None or not torchrun_started_several():
        return
    import torch
    import torch.distributed as dist

    enough_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if enough_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with one_line_when_lost():
        # what processes say to one another goes by gloo, where the end of one is an error; by NCCL it is an abort
        dist.init_process_group("cpu:gloo,cuda:nccl" if enough_gpus else "gloo", timeout=NEVER)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
    rank = dist.get_rank()
    size = dist.get_world_size()
    chief = rank == 0


def stop() -> None:
    """Leave the group. From here on only the first process works."""
    global rank, size
    if size > 1:
        import torch.distributed as dist

        rank = 0
        size = 1
        dist.destroy_process_group()


def says(line: str) -> bool:
    """Whether this process is the first to say `line`."""
    try:
        return store is None or store.add(line, 1) == 1
    except RuntimeError:  # the process that kept the keys has ended
        return True


def lost(error: Exception) -> bool:
    """Whether an error means that another process has ended, by torch's classes or gloo's messages."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


@contextmanager
def one_line_when_lost() -> Iterator[None]:
    """If another process ends, print one line instead of this process's error."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        # of torchrun, which ends who is left: it ends already
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise UsageError(LOST) from error


def gather(value) -> list:
    """The values of all processes, in order of rank. Tensors from another GPU are moved to this process's GPU."""
    if size == 1:
        return [value]
    import torch.distributed as dist

    found = [b""] * size
    with one_line_when_lost():
        dist.all_gather_object(found, packed(value))
    return [unpacked(content) for content in found]


def first(function: Callable):
    """Call `function` on the first process only, and give its result to all."""
    return gather(function() if chief else None)[0]


def packed(value) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(content: bytes):
    import torch

    def here(storage, location: str):
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(content), map_location=here, weights_only=False)


@contextmanager
def alone() -> Iterator[None]:
    """A block that this process computes by itself; it also writes the files that the block keeps."""
    global rank, size, chief
    before = rank, size, chief
    rank = 0
    size = 1
    chief = True
    try:
        yield
    finally:
        rank, size, chief = before


def spread(function: Callable, items: Sequence) -> list:
    """`function` of every item, in order: item i is computed by process i mod `size`, alone."""
    mine = items[rank::size]
    with alone():
        found = [function(item) for item in mine]
    parts = gather(found)
    return [parts[i % size][i // size] for i in range(len(items))]
