"""Which device can be used, the number format of the weights on it, and its free memory."""

import math
import warnings
from pathlib import Path

import torch

from .. import UsageError
from ..files import read_json

KNOWN = ("cpu", "cuda", "mps")
SLOW = "--dtype bfloat16: this CPU has no instructions for it; float32 is many times faster here"
EXPERIMENT = "--device mps is an experiment: nobody has run ia2mini on an Apple GPU; compare with --device cpu"


def usable(device: str | None) -> str:
    """The named device, or by default a GPU if there is one. Raises UsageError for a device that cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in KNOWN:
            raise UsageError(f"--device {device}: ia2mini runs on cpu and cuda; use --device cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--device {device}: not usable here ({reason}); use --device cpu"
        ) from None
    return device


def is_mps(device: str | torch.device) -> bool:
    return torch.device(device).type == "mps"


def weight_dtype(folder: Path, device: str, asked: str | None) -> torch.dtype:
    """The number format of the frozen weights: the given one, else `usual_dtype`. Raises UsageError."""
    if is_mps(device):
        if asked not in (None, "float32"):
            raise UsageError(f"--dtype {asked}: on mps ia2mini computes in float32 alone")
        warnings.warn(EXPERIMENT, stacklevel=3)
        return torch.float32
    if asked == "bfloat16" and not bfloat16_in_hardware(device):
        warnings.warn(SLOW, stacklevel=3)
    return getattr(torch, asked or usual_dtype(folder, device))


def usual_dtype(folder: Path, device: str) -> str:
    """bfloat16 on a GPU, and on a CPU that computes in it if the checkpoint is stored so; else float32."""
    if device != "cpu":
        return "bfloat16"
    config = folder / "config.json"
    if not config.is_file():
        return "float32"  # loading will say what is missing
    raw = read_json(config)
    stored = raw.get("dtype", raw.get("torch_dtype"))
    return "bfloat16" if stored == "bfloat16" and bfloat16_in_hardware(device) else "float32"


def bfloat16_in_hardware(device: str) -> bool:
    """Whether a device multiplies bfloat16 matrices itself: a GPU does, of CPUs those with AVX512-BF16 or AMX."""
    if device != "cpu":
        return not is_mps(device)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def free_bytes(device: torch.device) -> float:
    """Free bytes for tensors; infinity on a CPU and on Apple's GPU, which do not report it."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def empty_mps_cache(device: torch.device) -> None:
    """Free what PyTorch keeps of Apple's GPU memory, which is also the machine's; nothing on other devices."""
    if is_mps(device):
        torch.mps.empty_cache()
