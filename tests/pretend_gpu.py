"""A pretended GPU: tensors that say they are on cuda:0, and are computed on the CPU.

    with pretended_gpu() as gpu:
        model, tokenizer = load("tiny", device="cuda")
        ...
    gpu.waits  # what made Python wait for the GPU: (kind, place in our code) -> times

What a GPU refuses is refused: operands on two devices, and numpy. What makes Python wait for a GPU is counted with the
line that asks for it; while a step is recorded it is refused, as in a CUDA graph. Attention for which a GPU has no
fused kernel is counted in `gpu.unfused`.

To C++ a pretended tensor is on the CPU, so that autograd runs. What C++ makes from nothing in a backward pass is
therefore on the CPU; it is taken as the GPU's. A tensor that our own backward code makes on the CPU is not noticed.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import ia2mini.models.checkpoint as checkpoint
import torch
import torch.nn.functional as F
from tape import Tape
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ia2mini.scale import graphs

aten = torch.ops.aten
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in ("ia2mini", "models", "bench"))
GB = 2**30

WAITS = {  # operations whose result Python needs, or whose size the GPU must tell
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default}
INDEXING |= {aten.index_put_.default, aten._index_put_impl_.default}


class GpuTensor(torch.Tensor):
    """Says that it is on the GPU; `inner` is the CPU tensor that holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
        }
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=CPU, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} on a pretended GPU's tensor outside of `pretended_gpu`")

    def to(self, *args, **kwargs):
        device, dtype = asked(args, kwargs)
        if device is not None and device.type == "cpu":
            with gpu_now().copying_down():
                return aten._to_copy.default(self, dtype=dtype, device=CPU)
        if dtype in (None, self.dtype) and not kwargs.get("copy"):
            return self
        return aten._to_copy.default(self, dtype=dtype)

    def cpu(self):
        return self.to("cpu")

    def cuda(self, *device):
        return self

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()


def asked(args: tuple, kwargs: dict) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype that the arguments of `Tensor.to` ask for."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0].device, args[0].dtype
    known = {
        name: value for name, value in kwargs.items() if name in ("device", "dtype", "non_blocking")
    }
    return torch._C._nn._parse_to(*args, **known)[:2]


def inner(value):
    """An argument with the CPU's tensors in place of the GPU's; lists of tensors too."""
    if isinstance(value, GpuTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return [inner(each) for each in value]
    return value


def on_gpu(value):
    """What an operation has given, with the GPU's tensors in place of the CPU's."""
    if isinstance(value, torch.Tensor):
        return GpuTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(on_gpu(each) for each in value)
    return value


def tensors_in(values) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class PretendedGpu(TorchDispatchMode):
    """Takes every operation on tensors: computes it on the CPU, and notes what a GPU would have to wait for."""

    def __init__(self):
        super().__init__()
        self.waits: Counter = Counter()  # (kind, place) -> times
        self.sent: Counter = Counter()  # place -> copies to the GPU that nobody waits for
        self.unfused: Counter = Counter()  # (why, place) -> attention by whole score matrices
        self.recording = False
        self.down = False  # a copy to the CPU is under way

    def wait(self, kind: str) -> None:
        self.waits[kind, place()] += 1
        if self.recording:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing ({kind}, {place()})"
            )

    @contextmanager
    def copying_down(self) -> Iterator[None]:
        self.down = True
        try:
            yield
        finally:
            self.down = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        ours = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
        device = kwargs.get("device")
        wanted = device is not None and torch.device(device).type == "cuda"
        made_in_backward = (
            device is not None and not tensors and torch._C._current_graph_task_id() >= 0
        )
        if not ours and not wanted and not made_in_backward:
            return function(*args, **kwargs)
        if function is aten._to_copy.default and self.down:
            self.wait("copy to the CPU")
            return function(inner(args[0]), **kwargs)
        self.check(function, args, tensors, ours)
        if device is not None:
            kwargs["device"] = CPU
        named = {name: inner(value) for name, value in kwargs.items()}
        found = function(*inner(args), **named)
        return self.given_back(function, args, kwargs, found)

    def check(self, function, args: tuple, tensors: list, ours: list) -> None:
        """Note what waits for the GPU. Raises RuntimeError for operands on two devices."""
        if function in WAITS:
            self.wait(WAITS[function])
        others = [tensor for tensor in tensors if not isinstance(tensor, GpuTensor)]
        if function is aten.copy_.default and ours and others:
            self.wait("copy between devices")
            return
        if function in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("index by a mask")
            if isinstance(args[0], GpuTensor) and any(
                not isinstance(index, GpuTensor) for index in indices
            ):
                self.wait("index on the CPU")
                others = [
                    tensor for tensor in others if all(tensor is not index for index in indices)
                ]
        if ours and any(tensor.dim() for tensor in others):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({function}, {place()})"
            )

    def given_back(self, function, args: tuple, kwargs: dict, found):
        """What an operation gave as the GPU's; of one that writes into an argument that argument itself."""
        for position, argument in enumerate(function._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(found, torch.Tensor):
                return args[position] if position < len(args) else kwargs[argument.name]
        return on_gpu(found)


class Calls(TorchFunctionMode):
    """Takes calls that end before they are operations where PyTorch has no CUDA."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor):
            return self.made(function, args, kwargs)
        if function is torch.Tensor.to:
            return self.moved(args, kwargs)
        if function is torch.Tensor.cuda:
            return self.moved((args[0], GPU), kwargs)
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pretended_pinned = True
            return pinned
        if function is F.scaled_dot_product_attention:
            self.attended(*args, **kwargs)
        return function(*args, **kwargs)

    def made(self, function, args: tuple, kwargs: dict):
        device = kwargs.pop("device", None)
        if isinstance(args[0], GpuTensor):
            return args[0]
        found = function(*args, **kwargs)
        return found if device is None else self.moved((found, torch.device(device)), {})

    def moved(self, args: tuple, kwargs: dict):
        tensor, *rest = args
        device, dtype = asked(tuple(rest), kwargs)
        if isinstance(tensor, GpuTensor):
            return tensor.to(*rest, **kwargs)
        if device is None or device.type != "cuda":
            return torch.Tensor.to(tensor, *rest, **kwargs)
        assert not tensor.requires_grad, "the pretended GPU passes no gradient to the CPU"
        if getattr(tensor, "pretended_pinned", False) and kwargs.get("non_blocking"):
            self.gpu.sent[place()] += 1
        else:
            self.gpu.wait("copy to the GPU")
        return GpuTensor(tensor.detach().to(dtype or tensor.dtype, copy=True))

    def attended(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """Of a GPU's fused kernels one takes masks and float32, the other grouped heads, none both."""
        if not isinstance(q, GpuTensor) or q.shape[1] == k.shape[1] or not enable_gqa:
            return
        if attn_mask is not None:
            self.gpu.unfused["a mask and grouped heads", place()] += 1
        if q.dtype == torch.float32:
            self.gpu.unfused["float32 and grouped heads", place()] += 1


class Recorder:
    """A tape in place of a CUDA graph, which refuses to wait."""

    def __init__(self, device: torch.device):
        self.gpu = gpu_now()

    def __call__(self, function):
        self.gpu.recording = True
        try:
            return Tape()(function)
        finally:
            self.gpu.recording = False


class Weights:
    """`safe_open`, which reads to the CPU; its tensors are then sent to the device that was asked for."""

    plain = checkpoint.safe_open

    def __init__(self, file, framework: str, device: str = "cpu"):
        self.file = Weights.plain(file, framework)
        self.device = device

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name).to(self.device)


def place() -> str:
    """File and line of the innermost of our own lines that are being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


NOW: list[PretendedGpu] = []


def gpu_now() -> PretendedGpu:
    assert NOW, "there is no pretended GPU here"
    return NOW[-1]


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """One GPU, for PyTorch and for ia2mini, within the block; nothing is compiled."""
    gpu = PretendedGpu()
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *device: "Pretended",
        "mem_get_info": lambda *device: (100 * GB, 100 * GB),
        "memory_reserved": lambda *device: 0,
        "memory_allocated": lambda *device: 0,
        "max_memory_allocated": lambda *device: GB,
        "reset_peak_memory_stats": lambda *device: None,
        "synchronize": lambda *device: gpu.wait("synchronize"),
    }
    with ExitStack() as stack:
        for name, function in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stack.enter_context(patch.object(torch, "compile", lambda function, **options: function))
        stack.enter_context(patch.object(checkpoint, "safe_open", Weights))
        stack.enter_context(patch.dict(graphs.RECORDERS, {"cuda": Recorder}))
        stack.callback(NOW.remove, gpu)
        NOW.append(gpu)
        stack.enter_context(gpu)
        stack.enter_context(Calls(gpu))
        yield gpu
