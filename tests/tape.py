"""A tape in place of a CUDA graph: it replays operations, never Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Notes operations with their tensors, as a CUDA graph does: the same memory at every replay, shapes frozen.

    As a capture on the GPU, it refuses to bring values back from the device, and leaves no effect behind.
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
        self.operations.append((function, arguments, named, out))
        return out

    @torch.no_grad()
    def replay(self):
        Tape.replays += 1
        for function, arguments, named, out in self.operations:
            for old, new in zip(
                tree_leaves(out), tree_leaves(function(*arguments, **named)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
