"""Make the adapter that the options describe."""

from torch import nn

from ..adapters import IA3, TARGETS, Adapter, LoRA
from .options import AdapterOptions, matrices


def make_adapter(model: nn.Module, options: AdapterOptions, scale_inputs: bool = False) -> Adapter:
    """Raises UsageError for targets that the model lacks."""
    targets = matrices(options.targets)
    if not targets:
        targets = TARGETS
    if options.adapter == "ia3":
        return IA3(model, targets, scale_inputs=scale_inputs)
    return LoRA(model, targets, rank=options.rank, alpha=options.alpha)
