"""Results on disk. A run folder belongs to one set of options, data and checkpoint; the same command resumes there.

It holds only safetensors and JSON. Every file is written under another name and then renamed, so it is always complete.
"""

import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import UsageError
from ..errors import out_of_memory
from ..files import finite, is_there, read_json, write, write_json
from ..scale import ranks


class Store:
    """A folder that keeps computed tensors and texts, and the seconds of each stage over all sessions."""

    def __init__(self, out: Path, name: str, what: dict):
        """Open `out`/`name`-<digest of `what`>; nothing is written yet."""
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        self.path = out / f"{name}-{key}"
        before = self.json("seconds.json") or {}
        self.spent: dict = {
            "seconds": numbers(before.get("seconds")),
            "seconds_by_phase": numbers(before.get("seconds_by_phase")),
            "peak_memory_bytes": numbers(before).get("peak_memory_bytes", 0),
        }

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors kept under a name, on the CPU; None if there are none."""
        path = self.path / f"{name}.safetensors"
        return ranks.first(lambda: self.read(path, load_file))

    def keep(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep tensors under a name, and return them as kept, on the CPU."""
        path = self.path / f"{name}.safetensors"
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        if ranks.chief:
            write(path, lambda temporary: save_file(kept, temporary))
        return kept

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors kept under a name; if there are none, they are made and kept."""
        kept = self.tensors(name)
        if kept is None:
            kept = self.keep(name, make())
        return kept

    def json(self, name: str) -> dict | None:
        """The content of the JSON file `name`; None if there is none."""
        return ranks.first(lambda: self.read(self.path / name, read_json))

    def keep_json(self, name: str, content: dict) -> dict:
        content = finite(content)
        if ranks.chief:
            write_json(self.path / name, content)
        return content

    def read(self, path: Path, reader: Callable):
        """The content of a file; None if there is none. A damaged file is renamed, with a warning, and gives None."""
        try:
            return reader(path) if is_there(path) else None
        except (UsageError, SafetensorError, OSError) as error:
            if out_of_memory(error):
                raise
            aside = path.with_name(f"{path.name}.bad")
            path.replace(aside)
            reason = str(error).removeprefix(f"{path}: ")
            told = f"{path}: damaged ({reason}); set aside as {aside.name} and computed again"
            warnings.warn(told, stacklevel=3)
            return None

    @contextmanager
    def stage(self, name: str, phase: str) -> Iterator[None]:
        """Count the seconds of the block, and the peak memory so far, towards stage `name` and its `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            by_phase = self.spent["seconds_by_phase"]
            seconds = self.spent["seconds"]
            by_phase[phase] = by_phase.get(phase, 0.0) + took
            seconds[name] = seconds.get(name, 0.0) + took
            self.spent["peak_memory_bytes"] = max(self.spent["peak_memory_bytes"], peak_memory())
            if ranks.chief:
                write_json(self.path / "seconds.json", self.spent)


class NoStore(Store):
    """In place of a store, where nothing is to be kept."""

    def __init__(self):
        self.spent = {}

    def tensors(self, name: str) -> None:
        return None

    def keep(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    @contextmanager
    def stage(self, name: str, phase: str) -> Iterator[None]:
        yield


def numbers(value) -> dict[str, float]:
    """Only the entries of a dict from a file that are numbers."""
    if not isinstance(value, dict):
        return {}
    return {key: number for key, number in value.items() if isinstance(number, (int, float))}


def peak_memory() -> int:
    """Bytes: the most GPU memory allocated, or without a GPU in use the most resident memory of this process.

    0 if the system does not report it (Windows).
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if platform.system() == "Darwin" else rss * 1024


def versions() -> dict[str, str]:
    """The versions of Python and packages, and the processor, that computed the results."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "ia2mini", "tokenizers", "safetensors", "numpy"):
        found[package] = version(package)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if torch.are_deterministic_algorithms_enabled():
        found["algorithms"] = "deterministic"
    return found


def checkpoint_digest(folder: Path) -> str:
    """sha256 over a checkpoint's config, tokenizer and weights (a hub cache's files are named by their sha256)."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".safetensors") or not file.is_file():
            continue
        target = file.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:
            digest.update(target.name.encode())
            continue
        with target.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
