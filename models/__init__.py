"""What is computed: Llama and Qwen3, their taps, and checkpoints in the Hugging Face layout."""

from .checkpoint import load
from .taps import Taps

__all__ = ["load", "Taps"]
