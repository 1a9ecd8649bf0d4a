"""Several processes as one, where torchrun has started several: all run the same program in step, and hear all results.

The first one (`chief`) keeps the files and shows the progress. What `spread` hands out is worked on alone: there `size`
is 1, and what would be spread again is not.
"""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from .. import UsageError
from ..errors import out_of_memory

LOST = "another process has ended; what was finished is kept, and the same command goes on from there"
rank, size = 0, 1  # of this process among those that share the work at hand
chief = True  # whether it is the first of all
same = False  # whether all compute the same, on one model that is split over them (models/shard.py)
store = None  # keys that all processes see
watch: "Watch | None" = None  # over the next process, where a pass would not notice its end
FOREVER = timedelta(days=7)  # who has nothing left to do waits for the others, however long they work


def start() -> None:
    """Join the processes that torchrun has started with this one, each with a GPU of its own where there are enough."""
    global rank, size, chief, store
    if store is not None or int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        return
    import torch
    import torch.distributed as dist

    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if enough:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with together():
        # What processes say to one another goes by gloo, where the end of one is an error; by NCCL it is an abort
        dist.init_process_group("cpu:gloo,cuda:nccl" if enough else "gloo", timeout=FOREVER)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, size = dist.get_rank(), dist.get_world_size()
    chief = rank == 0


def share() -> int:
    """Have all processes compute the same from here on; nothing is spread. Raises UsageError where there is but one."""
    global rank, size, same
    if size == 1:
        raise UsageError("--shard splits the model over processes: torchrun --nproc-per-node K -m -- ia2mini … --shard")
    count, (rank, size), same = size, (0, 1), True
    return count


def writes() -> bool:
    """Whether this process writes what those that share the work have computed."""
    return chief if same else rank == 0


def stop() -> bool:
    """Part from the others; whether this process is the one that goes on."""
    global rank, size, watch
    if size > 1 or same:
        import torch.distributed as dist

        rank, size = 0, 1
        if watch is not None:
            watch.end()
            watch = None
        dist.destroy_process_group()
    return chief


def says(line: str) -> bool:
    """Whether this process is the first to say `line`."""
    try:
        return store is None or store.add(line, 1) == 1
    except RuntimeError:  # who kept the keys is gone
        return True


class Watch(threading.Thread):
    """Ends this process with a line when the next one ends without a word. All processes make one at the same time.

    For passes that talk by NCCL: of a process that has died these wait for ever, or abort.
    """

    def __init__(self):
        import torch
        import torch.distributed as dist

        super().__init__(daemon=True)
        self.dist = dist
        self.group = dist.new_group(backend="gloo", timeout=FOREVER)
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self.word = torch.zeros(1)

    def run(self) -> None:
        try:
            self.dist.recv(self.word, src=(self.rank + 1) % self.count, group=self.group)
        except RuntimeError:
            if says("the end"):
                print(f"ia2mini: {LOST}", file=sys.stderr, flush=True)
            os._exit(2)

    def end(self) -> None:
        """Say the word to the process before this one, and wait for the next one's."""
        with together():
            self.dist.send(self.word, dst=(self.rank - 1) % self.count, group=self.group)
        self.join()


def lost(error: Exception) -> bool:
    """Whether an error says that another process has ended: torch's own classes, or gloo's words."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


@contextmanager
def together() -> Iterator[None]:
    """Turn what the end of another process does to this one into a single line."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        for number in (signal.SIGINT, signal.SIGTERM):  # of torchrun, which ends who is left: it ends already
            signal.signal(number, signal.SIG_IGN)
        raise UsageError(LOST) from error


@contextmanager
def alone() -> Iterator[None]:
    """Work in which the other processes have no part."""
    global rank, size
    before, (rank, size) = (rank, size), (0, 1)
    try:
        yield
    finally:
        rank, size = before


def everyone(value) -> list:
    """What each of all processes says, in order of rank."""
    import torch.distributed as dist

    found = [None] * dist.get_world_size()
    with together():
        dist.all_gather_object(found, value)
    return found


def gather(value) -> list:
    """What each process that shares the work says; tensors from a GPU come to this process's own."""
    return [value] if size == 1 else [unpacked(packed) for packed in everyone(pack(value))]


def first(function: Callable):
    """What `function` gives the first process, for all; the others do not call it."""
    if size == 1 and not same:
        return function()
    import torch.distributed as dist

    box = [pack(function()) if writes() else None]
    with together():
        dist.broadcast_object_list(box)
    return unpacked(box[0])


def pack(value) -> bytes:
    import torch

    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def unpacked(packed: bytes):
    import torch

    def here(storage, location: str):
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(packed), map_location=here, weights_only=False)


def spread(function: Callable, items: Sequence, watch: Callable | None = None) -> list:
    """`function` of every item, in order: item i is computed by process i mod `size`, alone.

    `watch` is told of what is finished, as many items at once as there are processes.
    """
    mine, step = [], size
    for i in range(rank, len(items), step):
        with alone():
            mine.append(function(items[i]))
        if watch:
            watch(sum(map(len, items[i : i + step])))
    parts = gather(mine)
    return [parts[i % step][i // step] for i in range(len(items))]


class Rounds:
    """Rounds in which each process says something and hears all; one that has ended repeats itself until all have.

    None, from any of them, ends the rounds for all.
    """

    def __init__(self, nothing):
        self.said, self.open, self.alone = nothing, True, size == 1  # `nothing`: said by who never has more to say

    def hear(self, said) -> list | None:
        """What each process says in this round; None where one of them has said None, now or before."""
        self.said = said
        if self.open:
            found = [said] if self.alone else [one for one, _ in everyone((said, False))]
            self.open = all(one is not None for one in found)
        return found if self.open else None

    def end(self) -> None:
        while not self.alone and not all(ended for _, ended in everyone((self.said, True))):
            pass
