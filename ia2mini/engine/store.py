"""Results on disk. A run folder belongs to one set of options, data and checkpoint: the same command goes on there.

Only safetensors and JSON; every file is written beside its place and renamed into it, so what is there is whole.
"""

import hashlib
import json
import platform
import resource
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import UsageError
from ..errors import out_of_memory
from ..files import finite, is_there, read_sealed, sealed, write, write_json
from ..scale import ranks as parallel


class RunFolder:
    """The folder that `what` makes: tensors and texts computed once, seconds per stage over all its sessions."""

    def __init__(self, out: Path, name: str, what: dict):
        """Open `out`/`name`-<digest of `what`>; nothing is written yet."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        self.path, self.whole = out / f"{name}-{key}", set()  # stamps of files that were checked
        nothing = {"seconds": {}, "seconds_by_phase": {}, "peak_memory_bytes": 0}
        self.spent: dict = self.kept(self.path / "seconds.json", read_sealed) or nothing

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of file `name`: read if they are there, else made and saved. On the CPU either way."""
        path = self.path / f"{name}.safetensors"
        read = load_file if stamp(path) in self.whole else read_tensors
        if (kept := parallel.first(lambda: self.kept(path, read))) is None:
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in make().items()}
            if parallel.writes():
                about = {"sha256": digest(kept, path)}
                write(path, lambda temporary: save_file(kept, temporary, metadata=about))
                kept = load_file(path)
        self.whole.add(stamp(path))
        return kept

    def json_once(self, name: str, make: Callable[[], dict]) -> dict:
        """The content of JSON file `name`: read if it is there, else made and saved. Raises UsageError."""
        path = self.path / name
        if (kept := parallel.first(lambda: self.kept(path, read_sealed))) is None:
            kept = finite(make())
            parallel.first(lambda: write_json(path, sealed(path, kept)))
        return kept

    def kept(self, path: Path, read: Callable):
        """What a file holds; None where it is not there, or damaged: then it is set aside, with a warning."""
        try:
            return read(path) if is_there(path) else None
        except (UsageError, SafetensorError, OSError) as error:
            if out_of_memory(error):
                raise
            path.replace(aside := path.with_name(f"{path.name}.bad"))
            reason = str(error).removeprefix(f"{path}: ")
            warnings.warn(f"{path}: damaged ({reason}); set aside as {aside.name} and computed again", stacklevel=3)
            return None

    @contextmanager
    def stage(self, name: str, phase: str):
        """Count the seconds of the block, and the peak memory so far, towards stage `name` and its `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            for kind, key in (("seconds", name), ("seconds_by_phase", phase)):
                self.spent[kind][key] = self.spent[kind].get(key, 0.0) + took
            self.spent["peak_memory_bytes"] = max(self.spent["peak_memory_bytes"], peak_memory())
            if parallel.chief:
                path = self.path / "seconds.json"
                write_json(path, sealed(path, self.spent))


def stamp(path: Path) -> tuple | None:
    """What changes with a file's content, without reading it; None where there is no file."""
    try:
        about = path.stat()
    except OSError:
        return None
    return path, about.st_ino, about.st_size, about.st_mtime_ns


def digest(tensors: dict[str, Tensor], path: Path) -> str:
    """sha256 over names, shapes, dtypes and bytes, and the file's place: another file's content is no better."""
    found = hashlib.sha256("/".join(path.parts[-2:]).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `RunFolder.once` wrote. Raises SafetensorError, or UsageError for other content."""
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get("sha256")
    tensors = load_file(path)
    if digest(tensors, path) != expected:
        raise UsageError(f"{path}: its content is not what was written")
    return tensors


def peak_memory() -> int:
    """Bytes: the most GPU memory allocated, or without a GPU in use the most resident memory of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if platform.system() == "Darwin" else rss * 1024


def versions() -> dict[str, str]:
    """What computed the results: Python, packages, processor."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
    found |= {package: version(package) for package in ("ia2mini", "tokenizers", "safetensors", "numpy")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if torch.are_deterministic_algorithms_enabled():
        found["algorithms"] = "deterministic"
    return found


def checkpoint_digest(folder: Path) -> str:
    """sha256 over a checkpoint's config, tokenizer and weights (a hub cache's files are named by their sha256)."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors") and p.is_file()):
        target = file.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:
            digest.update(target.name.encode())
            continue
        with target.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
