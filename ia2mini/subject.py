"""The model that a command or a notebook works with, and how it is opened by name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import UsageError
from .models.checkpoint import SHORT_NAMES, TINY, load, locate
from .shard import start
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """The model under study."""

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path  # of its checkpoint
    name: str  # in tables and folder names
    base: str  # what peft shall load the adapters onto: hub id or absolute folder
    revision: str | None = None  # commit on the hub


def open_subject(
    model: str = "tiny", device: str | None = None, dtype: str | None = None, revision: str | None = None, shard=False
) -> Subject:
    """The model of a folder, hub id or short name; on a GPU if there is one, there in bfloat16. Raises UsageError.

    With `shard` it is split over the processes of torchrun.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise UsageError(f"--device {device}: ia2mini runs on cpu and cuda; use --device cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: not usable here ({reason}); use --device cpu") from None
    folder = locate(model, revision)
    dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    mesh, device = start(device) if shard else (None, device)
    network, tokenizer = load(folder, dtype, device, mesh=mesh)
    local = folder == TINY or Path(model).is_dir()
    name = folder.resolve().name if local else model.replace("/", "--")
    base = str(folder.resolve()) if local else SHORT_NAMES.get(model.lower(), model)
    return Subject(network, tokenizer, folder, name, base, None if local else folder.name)  # a snapshot's folder
