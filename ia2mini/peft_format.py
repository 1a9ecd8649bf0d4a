"""Adapters in PEFT's own format, and checkpoints with the adapter merged in."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import UsageError
from .adapters import IA3, Adapter, Full, LoRA, Prompt, unpack
from .files import write, write_text
from .models.checkpoint import save
from .tokenizer import Tokenizer

PEFT_PREFIX = "base_model.model."


def peft_config(adapter: Adapter, base: str, model: nn.Module) -> dict:
    """adapter_config.json of peft for LoRA, (IA)3, prompt and prefix tuning."""
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    if isinstance(adapter, LoRA):
        config |= {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0}
        config |= {"bias": "none", "target_modules": list(adapter.targets)}
        return config | {"layers_to_transform": adapter.layers}
    if isinstance(adapter, IA3):  # peft cannot restrict (IA)3 to layers but takes full module names
        names = list(adapter.linears)
        inputs = names if adapter.scale_inputs else []
        return config | {"peft_type": "IA3", "target_modules": names, "feedforward_modules": inputs}
    c = model.config
    config |= {"num_virtual_tokens": adapter.tokens, "num_layers": c.num_hidden_layers, "num_transformer_submodules": 1}
    if isinstance(adapter, Prompt):
        kind, heads, token_dim = "PROMPT_TUNING", c.num_attention_heads, c.hidden_size
    else:
        kind, heads, token_dim = "PREFIX_TUNING", c.num_key_value_heads, c.num_key_value_heads * c.head_dim
    return config | {"peft_type": kind, "token_dim": token_dim, "num_attention_heads": heads}


def peft_tensors(adapter: Adapter, theta: Tensor) -> dict[str, Tensor]:
    """adapter_model.safetensors of one run, theta [M], under peft's names."""
    weights = {name: w[0] for name, w in unpack(theta[None].cpu(), adapter.shapes).items()}
    if isinstance(adapter, LoRA):
        return {f"{PEFT_PREFIX}{name[:-2]}.lora_{name[-1]}.weight": w for name, w in weights.items()}
    if isinstance(adapter, IA3):
        return {
            f"{PEFT_PREFIX}{name}.ia3_l": w[None] if adapter.scale_inputs else w[:, None] for name, w in weights.items()
        }
    if isinstance(adapter, Prompt):
        return {"prompt_embeddings": weights["embeddings"]}
    layers = weights["prefix"]  # [L, 2, K, tokens, E]; peft: a row a virtual token, its keys and values layer by layer
    return {"prompt_embeddings": layers.permute(3, 0, 1, 2, 4).flatten(1)}


def save_adapter(
    model: nn.Module, adapter: Adapter, theta: Tensor, folder: Path, base: str, tokenizer: Tokenizer | None = None
) -> None:
    """Write one run's adapter, theta [M], into `folder` so that peft loads it onto `base`; a full fine-tuning is merged instead."""
    if isinstance(adapter, Full):
        return save_merged(model, adapter, theta, folder, tokenizer)
    tensors = {name: t.contiguous() for name, t in peft_tensors(adapter, theta).items()}
    write(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_text(folder / "adapter_config.json", json.dumps(peft_config(adapter, base, model), indent=2) + "\n")


@torch.no_grad()
def save_merged(
    model: nn.Module, adapter: Adapter, theta: Tensor, folder: Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write a checkpoint whose matrices hold the adapter's change, computed in float32; the model in memory stays as it is.

    With `tokenizer` the checkpoint is complete: its tokenizer.json and its end-of-sequence ids are written too.
    Raises UsageError for prompt and prefix tuning, which change no matrix.
    """
    if not adapter.linears:
        kind = type(adapter).__name__
        raise UsageError(
            f"a {kind} adapter stands before the text and cannot be merged into matrices; save it for peft"
        )
    weights = unpack(theta[None].to(next(model.parameters()).device), adapter.shapes)
    weights, changed = {name: w[0] for name, w in weights.items()}, {}
    for name, linear in adapter.linears.items():
        changed |= {key: t.to(linear.weight.dtype) for key, t in merged(adapter, name, weights, linear).items()}
    files = (tokenizer.backend.to_str(), list(tokenizer.eos_ids) or None) if tokenizer else ()
    save(model, folder, *files, changed=changed)


def merged(adapter: Adapter, name: str, weights: dict[str, Tensor], linear: nn.Linear) -> dict[str, Tensor]:
    """The tensors of one map that the adapter changes, by name, float32."""
    weight = linear.weight.float()
    if isinstance(adapter, LoRA):
        return {f"{name}.weight": weight + adapter.alpha / adapter.rank * weights[f"{name}.B"] @ weights[f"{name}.A"]}
    if isinstance(adapter, Full):
        return {f"{name}.weight": weight + weights[name]}
    if adapter.scale_inputs:
        return {f"{name}.weight": weight * weights[name]}
    bias = {} if linear.bias is None else {f"{name}.bias": linear.bias.float() * weights[name]}
    return bias | {f"{name}.weight": weight * weights[name][:, None]}
