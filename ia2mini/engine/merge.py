"""Checkpoints with a merged adapter: in memory, as the released scripts score them, or written to a folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import UsageError
from ..adapters import Adapter, unpack
from ..files import check_name, read_json, write_json
from ..models.checkpoint import save
from ..tokenizer import Tokenizer

MERGED = "merged.json"  # in a merged checkpoint: what was merged


def claim(folder: Path, merge: dict) -> None:
    """Have a new or empty folder take a merged checkpoint, told by `merge`; the same merge, begun before, may go on.

    Raises UsageError for a folder that holds anything else: another checkpoint, or a person's files.
    """
    check_name(folder)
    marker = folder / MERGED
    if folder.is_dir() and not marker.exists():
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):
                raise UsageError(f"{folder}: holds {path.name}; --out needs a new or empty folder")
    if marker.exists() and read_json(marker) != merge:
        raise UsageError(f"{folder}: holds another merged checkpoint; give another --out")
    write_json(marker, merge)


class Merged(Adapter):
    """LoRA or (IA)3 merged into the frozen matrices, rounded to bfloat16: what the paper's released scripts score.

    A matrix is merged anew for every pass, so that not all of R runs are held at once.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.shapes = adapter.shapes
        self.linears = adapter.linears

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        own = (name, f"{name}.A", f"{name}.B")
        mine = {key: tensor for key, tensor in weights.items() if key in own}
        return partial(self.product, name, mine)

    def product(self, name: str, weights: dict[str, Tensor], base: Callable, x: Tensor) -> Tensor:
        """The merged map of each run on its group of x [R * rows, T, in]."""
        linear = self.linears[name]
        runs = len(next(iter(weights.values())))
        outputs = []
        for r, rows in enumerate(x.chunk(runs)):
            of_run = {key: tensor[r] for key, tensor in weights.items()}
            merged = self.adapter.merged(name, of_run)
            rounded = {key: tensor.bfloat16().to(x.dtype) for key, tensor in merged.items()}
            bias = rounded.get(f"{name}.bias", linear.bias)
            outputs.append(F.linear(rows, rounded[f"{name}.weight"], bias))
        return torch.cat(outputs)


@torch.no_grad()
def save_merged(
    model: nn.Module, adapter: Adapter, theta: Tensor, folder: Path, tokenizer: Tokenizer
) -> None:
    """Write a checkpoint whose matrices hold the adapter's change, computed in float32; the model stays as it is."""
    theta = theta.to(next(model.parameters()).device)
    weights = {name: w[0] for name, w in unpack(theta[None], adapter.shapes).items()}
    changed = {}
    for name, linear in adapter.linears.items():
        for key, tensor in adapter.merged(name, weights).items():
            changed[key] = tensor.to(linear.weight.dtype)
    ends = list(tokenizer.eos_ids) or None
    save(model, folder, tokenizer.backend.to_str(), ends, changed)
