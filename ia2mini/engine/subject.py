"""The model that a command or a notebook works with, and how it is opened by name."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import UsageError
from ..files import check_text, plain, read_json
from ..models.checkpoint import SHORT_NAMES, TINY, load, locate
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """The model under study."""

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path  # of its checkpoint
    name: str  # in tables and folder names
    base: str  # what peft shall load the adapters onto: hub id or absolute folder
    revision: str | None = None  # commit on the hub

    @property
    def dtype(self) -> str:
        """The number format of the frozen weights, as "float32"."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def reads(self) -> int:
        """How many tokens the model reads at most, its own included."""
        return self.model.config.max_position_embeddings

    def check_room(
        self, prompt: str, tokens: int, mend: str = "cut the row or leave it out"
    ) -> None:
        """Raises UsageError where a prompt with its answer, so many `tokens`, is longer than what the model reads."""
        if tokens > self.reads:
            need = f"{tokens} tokens with its answer, more than the {self.reads} tokens the model reads"
            raise UsageError(f"the prompt {' '.join(prompt.split())[:60]!r} … has {need}; {mend}")


def usable(device: str | None) -> str:
    """The device, or where none is named a GPU if there is one. Raises UsageError for what cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise UsageError(f"--device {device}: ia2mini runs on cpu and cuda; use --device cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {device}: not usable here ({reason}); use --device cpu"
        ) from None
    return device


def usual_dtype(folder: Path, device: str) -> str:
    """bfloat16 on a GPU, and on a CPU that computes in it if the checkpoint is stored so; else float32."""
    if device != "cpu":
        return "bfloat16"
    config = folder / "config.json"
    if not config.is_file():
        return "float32"  # loading will say what is missing
    raw = read_json(config)
    stored = raw.get("dtype", raw.get("torch_dtype"))
    return "bfloat16" if stored == "bfloat16" and bfloat16_in_hardware() else "float32"


def bfloat16_in_hardware() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself: AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def open_subject(
    model: str = "tiny", device=None, dtype=None, revision=None, check: bool = True
) -> Subject:
    """The model of a folder, hub id or short name; on a GPU if there is one. Raises UsageError.

    `dtype` of the frozen weights: None is `usual_dtype`. `check`: no weight may be NaN or infinite.
    """
    device = usable(device)
    folder = locate(model, revision)
    check_text(str(folder.resolve()), "the folder", "give it, and those above it, names in UTF-8")
    dtype = getattr(torch, dtype or usual_dtype(folder, device))
    network, tokenizer = load(folder, dtype, device, check=check)
    local = folder == TINY or Path(model).is_dir()
    name = plain(folder.resolve().name if local else model.replace("/", "--"), "")
    base = SHORT_NAMES.get(model.lower(), model)
    if local:
        base = "tiny" if folder == TINY else str(folder.resolve())
    # a snapshot's folder
    return Subject(network, tokenizer, folder, name, base, None if local else folder.name)
