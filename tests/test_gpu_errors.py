"""Memory that runs out, recordings that fail, processes that end: what a device's errors are taken for."""

import errno
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import ia2mini.models.checkpoint as checkpoint
import numpy as np
import pytest
import torch
from commands import invoke
from ia2mini.models.fused import fused
from pretend_gpu import pretended_gpu
from reference import from_start, in_order, make_checkpoint, make_rows, relative, starts

import ia2mini.train
from ia2mini import UsageError
from ia2mini.adapters import LoRA
from ia2mini.engine.store import Store
from ia2mini.errors import out_of_memory
from ia2mini.scale import graphs, ranks
from ia2mini.scale.memory import within_memory
from ia2mini.tokenizer import Tokenizer
from ia2mini.train import Runs, Settings, train, train_runs

TOO_MUCH = 2**60


def no_room(*given, **more):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def raised(function) -> Exception:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def chained(error: Exception, wrapped: Exception | None = None) -> Exception:
    """`error` as it is raised in the care of another one."""
    try:
        try:
            raise error
        except type(error):
            previous = RuntimeError("operation failed due to a previous error during capture")
            raise wrapped or previous  # noqa: B904
    except RuntimeError as found:
        return found


def compiled_badly() -> Exception:
    from torch._dynamo.exc import BackendCompilerFailed

    return BackendCompilerFailed(lambda: None, torch.OutOfMemoryError("CUDA out of memory"), None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: raised(lambda: torch.empty(TOO_MUCH)),  # this PyTorch's own words
        lambda: raised(lambda: np.empty(2**46)),  # numpy's own error
        lambda: RuntimeError(
            "DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."
        ),
        lambda: RuntimeError(
            "unable to mmap 9 bytes from file <model.safetensors>: Cannot allocate memory (12)"
        ),
        lambda: checkpoint.SafetensorError("Os { code: 12, message: Cannot allocate memory }"),
        lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
        lambda: MemoryError(),
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        lambda: RuntimeError("CUDA error: out of memory"),
        lambda: RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        ),
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        lambda: RuntimeError("std::bad_alloc"),
        lambda: ImportError("libtorch.so: cannot map zero-fill pages: Cannot allocate memory"),
        lambda: Exception("Cannot allocate memory (os error 12)"),  # as tokenizers raises it
        lambda: chained(torch.OutOfMemoryError("CUDA out of memory")),
        compiled_badly,
    ],
)
def test_memory_that_has_run_out_is_known_by_whoever_says_so(make):
    assert out_of_memory(make())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.csv"),
        OSError(errno.ENOSPC, "No space left on device"),
        UsageError("the row 'we are out of memory' has two labels"),
        KeyError("out of memory"),
        None,
    ],
)
def test_nothing_else_is_taken_for_it(error):
    assert not out_of_memory(error)


@pytest.mark.parametrize("failing", [lambda: torch.empty(TOO_MUCH), lambda: np.empty(2**46)])
def test_runs_are_halved_on_a_cpu_too(model, monkeypatch, failing):
    """What the CPU's allocator raises in a step; each run ends as it does with all side by side."""
    adapter = LoRA(model)
    room = 2
    most = []
    plain = ia2mini.train.run_losses
    rows = [make_rows(4, r) for r in range(5)]
    dev = [make_rows(2, 50 + r) for r in range(5)]
    orders = [partial(in_order, r) for r in range(5)]
    runs = Runs(
        starts(adapter, model, 5), torch.full((5,), 1e-2), rows, dev, {"mse": torch.ones(5)}, orders
    )
    settings = Settings(epochs=4)
    whole = train_runs(model, adapter, runs, settings)

    def losses(student, batch, *more):
        most.append(len(batch.weights))
        if most[-1] > room:
            failing()
        return plain(student, batch, *more)

    monkeypatch.setattr(ia2mini.train, "run_losses", losses)
    train_in_parts = from_start(within_memory(train))
    with pytest.warns(UserWarning, match="out of memory with 5 runs side by side; going on with 2"):
        found = train_in_parts(model, adapter, runs, settings).trained()
    assert relative(found.theta, whole.theta) < 1e-5 and torch.equal(found.steps, whole.steps)
    most.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = train_in_parts(model, adapter, runs, settings).trained()
    assert set(most) == {1, 2} and torch.equal(again.theta, found.theta), "as many as went before"
    room = 0
    with (
        pytest.warns(UserWarning),
        pytest.raises(UsageError, match="not enough memory for a single run"),
    ):
        train_in_parts(model, adapter, runs, settings)
    monkeypatch.setattr(
        ia2mini.train, "run_losses", lambda *arguments: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        train_in_parts(model, adapter, runs, settings)


@pytest.mark.parametrize("part", ["safe_open", "fill_parameters"])
@pytest.mark.parametrize(
    "failing",
    [
        lambda *given, **more: torch.empty(TOO_MUCH),
        lambda *given, **more: np.empty(2**46),
        no_room,
    ],
)
def test_a_model_that_the_machine_cannot_hold_is_one_line(monkeypatch, folder, part, failing):
    monkeypatch.setattr(checkpoint, part, failing)
    found = invoke("generate", "--model", folder, "--device", "cpu", "--prompt", "a")
    assert found.exit_code == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("ia2mini: the device has too little memory; use a smaller --model")


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the size of a process, and limits it")
def test_a_real_limit_is_one_line_too(tmp_path):
    """Less room than the weights take, once everything is imported."""
    folder = make_checkpoint(
        tmp_path / "model", "llama", vocab_size=60_000, hidden_size=512, num_hidden_layers=2
    )
    code = f"""
import resource, torch, ia2mini.engine.subject, ia2mini.fitting.predictor
from pathlib import Path
from ia2mini.cli.main import main
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + 80_000_000
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main(["generate", "--model", {str(folder)!r}, "--device", "cpu", "--prompt", "a"])
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("ia2mini: the device has too little memory")


def test_a_good_file_is_not_called_damaged_where_memory_runs_out(tmp_path, monkeypatch, folder):
    kept = Store(tmp_path, "run", {})
    kept.once("numbers", lambda: {"x": torch.ones(3)})
    files = sorted(kept.path.iterdir())
    with pytest.raises(OSError, match="Cannot allocate"):
        kept.read(files[0], no_room)
    assert sorted(kept.path.iterdir()) == files
    monkeypatch.setattr(checkpoint, "safe_open", no_room)
    with pytest.raises(OSError, match="Cannot allocate"):
        checkpoint.load(folder)
    monkeypatch.undo()
    monkeypatch.setattr(
        "ia2mini.files.tokenizer_files.Tokenizer", SimpleNamespace(from_file=no_room)
    )
    with pytest.raises(OSError, match="Cannot allocate"):
        Tokenizer.from_folder(folder)


class Kernel:
    """What `torch.compile` gives, which fails a number of times."""

    def __init__(self, error: Exception, times: int):
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, function, **options):
        self.function = function
        return self.run

    def run(self, *tensors):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.function(*tensors)


def test_no_memory_for_a_fused_kernel_is_no_missing_compiler(monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), compiled_badly()):
        with pretended_gpu(), warnings.catch_warnings():
            warnings.simplefilter("error")
            x, kernel, double = (
                torch.ones(2, device="cuda"),
                Kernel(error, 1),
                fused(lambda x: 2 * x),
            )
            monkeypatch.setattr(torch, "compile", kernel)
            with pytest.raises(RuntimeError) as caught:
                double(x)
            assert out_of_memory(caught.value)
            assert double(x).tolist() == [2, 2] and kernel.calls == 2, (
                "the next step is fused again"
            )
            monkeypatch.undo()


def test_without_a_compiler_a_kernel_runs_unfused(monkeypatch):
    with pretended_gpu(), monkeypatch.context() as patch:
        x, kernel = (
            torch.ones(2, device="cuda"),
            Kernel(RuntimeError("Cannot find a working triton installation"), 9),
        )
        patch.setattr(torch, "compile", kernel)
        double = fused(lambda x: 2 * x)
        with pytest.warns(UserWarning, match="runs unfused: RuntimeError"):
            assert double(x).tolist() == [2, 2]
        assert double(x).tolist() == [2, 2] and kernel.calls == 1
        broken = fused(lambda x: x @ torch.ones(3, device="cuda"))
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="size"):
            warnings.simplefilter("error")
            broken(x)


class Cuda:
    """What a recording asks of torch.cuda; `underway` are the pools for which the allocator believes in a capture."""

    def __init__(self, monkeypatch, ends_by_itself: bool, name: str):
        self.underway, self.modes, self.streams = [], [], []
        self.ends_by_itself = ends_by_itself
        for attribute, value in {
            "graph_pool_handle": lambda: (0, 1),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: "replayed"),
            "current_stream": lambda device: "before",
            "current_device": lambda: 0,
            "set_stream": self.streams.append,
            "device": lambda device: nullcontext(),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, attribute, value)
        for old in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            monkeypatch.delattr(torch._C, old, raising=False)
        monkeypatch.setattr(torch._C, name, self.end, raising=False)

    def end(self, index: int, pool: tuple) -> None:
        assert index == 0
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    @contextmanager
    def graph(self, graph, pool, capture_error_mode="global"):
        self.modes.append(capture_error_mode)
        self.underway.append(pool)
        try:
            yield
        except Exception as error:  # so ends a capture: by an error of its own
            if self.ends_by_itself:
                self.underway.remove(pool)
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.underway.remove(pool)


@pytest.mark.parametrize(
    "name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]
)
@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_a_recording_that_fails_is_over_for_the_allocator_too(monkeypatch, ends_by_itself, name):
    cuda = Cuda(monkeypatch, ends_by_itself, name)
    recorder = graphs.CudaRecorder(torch.device("cuda"))
    replay, found = recorder(lambda: 7)
    assert (replay(), found, cuda.underway, cuda.streams) == ("replayed", 7, [], [])
    with pytest.raises(RuntimeError, match="previous error"):
        recorder(lambda: torch.ones(2) @ torch.ones(3))
    assert cuda.underway == [] and cuda.streams == ["before"]
    assert set(cuda.modes) == {"thread_local"}, (
        "other threads, as NCCL's, may ask for events meanwhile"
    )


def test_what_processes_say_goes_by_gloo_also_where_each_has_a_gpu(monkeypatch):
    """Only then is the end of one an error that becomes a line."""
    asked = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **more: asked.append(backend)
    )
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *address, **more: "store")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    address = {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "",
        "MASTER_PORT": "1",
    }
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    for gpus in (2, 1):
        monkeypatch.setattr(ranks, "store", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        ranks.start()
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]
