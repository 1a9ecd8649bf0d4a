"""A tape in place of a CUDA graph: it replays operations, never Python."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Address:
    """Where a tensor's memory is, as a CUDA graph knows it: it keeps nothing alive."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.view = tensor.storage_offset(), tensor.size(), tensor.stride()
        # the tensor of a pretended GPU stands around one of the CPU
        self.around = type(tensor) if hasattr(tensor, "inner") else None

    def tensor(self) -> torch.Tensor:
        """Raises RuntimeError where the memory was given back: a CUDA graph would read what lies there now."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError("a recording reads memory that was given back")
        found = torch.empty(0, dtype=self.dtype).set_(storage, *self.view)
        return self.around(found) if self.around else found


class Tape(TorchDispatchMode):
    """Notes operations with their tensors, as a CUDA graph does: the same memory at every replay, shapes frozen.

    As a capture on the GPU, it refuses to bring values back from the device, and leaves no effect behind. What was made
    in the recording stays; of all else it knows the address alone.
    """

    replays = recordings = 0

    def __init__(self, device=None):
        super().__init__()
        self.operations, self.made, self.before = [], set(), {}

    def __call__(self, function):
        Tape.recordings += 1
        try:
            with (tape := Tape()):
                return tape.replay, function()
        finally:
            with torch.no_grad():
                for tensor, value in tape.before.values():
                    tensor.copy_(value)
            tape.before.clear()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, arguments, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            place = value.untyped_storage().data_ptr() if written else None
            if written and place not in self.made:
                self.before.setdefault(value.data_ptr(), (value.detach(), value.detach().clone()))
        out = function(*arguments, **named)
        self.made |= {
            t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        } - {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((arguments, named))
            if isinstance(t, torch.Tensor)
        }
        given = tree_map(self.kept, (arguments, named))
        self.operations.append((function, *given, tree_map(self.kept, out)))
        return out

    def kept(self, value):
        """What is kept of an argument or a result: of memory that was there before the recording its address."""
        if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in self.made:
            return value
        return Address(value)

    @torch.no_grad()
    def replay(self):
        Tape.replays += 1
        for operation in self.operations:
            function, arguments, named, out = tree_map(found_again, operation)
            results = tree_leaves(function(*arguments, **named))
            for old, new in zip(tree_leaves(out), results, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def found_again(value):
    return value.tensor() if isinstance(value, Address) else value
