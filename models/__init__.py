"""What is computed: Llama and Qwen3, their taps, and checkpoints in the Hugging Face layout."""

from .checkpoint import load
from .common import Taps, UsageError

__all__ = ["load", "Taps", "UsageError"]
