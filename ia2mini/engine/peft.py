"""Adapters in PEFT's own format, written and read."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import UsageError
from ..adapters import IA3, Adapter, LoRA, unpack
from ..errors import out_of_memory
from ..files import check_name, is_there, read_json, write, write_text
from ..models.layers import Linear

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
KINDS = ("LORA", "IA3")
BIASES = ("none", "all", "lora_only")
DEFAULT = 8  # peft's rank and alpha, where a configuration says none
# fields that change more than the matrices of LoRA and (IA)3, besides all that begin with use_ or end in _config …
EXTRAS = (
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
)
# … but for these, of training and loading, or looked at elsewhere
HARMLESS = (
    "use_rslora",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "velora_config",
    "runtime_config",
    "megatron_config",
)
# ways to begin that also change the base's weights
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_config(adapter: Adapter, base: str) -> dict:
    """adapter_config.json of peft for LoRA and (IA)3."""
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    if isinstance(adapter, LoRA):
        config["peft_type"] = "LORA"
        config["r"] = adapter.rank
        config["lora_alpha"] = adapter.alpha
        config["lora_dropout"] = 0.0
        config["bias"] = "none"
        config["target_modules"] = list(adapter.targets)
        config["layers_to_transform"] = None
        return config
    assert isinstance(adapter, IA3)
    config["peft_type"] = "IA3"
    config["target_modules"] = list(adapter.linears)
    config["feedforward_modules"] = sorted(adapter.inputs)
    return config


def peft_tensors(adapter: Adapter, theta: Tensor) -> dict[str, Tensor]:
    """adapter_model.safetensors of one run, theta [M], under peft's names."""
    found = {}
    inputs = adapter.inputs if isinstance(adapter, IA3) else ()
    for name, weights in unpack(theta[None].cpu(), adapter.shapes).items():
        weight = weights[0]
        if isinstance(adapter, LoRA):
            name, letter = name.rsplit(".", 1)
            found[f"{PEFT_PREFIX}{name}.lora_{letter}.weight"] = weight
        elif name in inputs:
            found[f"{PEFT_PREFIX}{name}.ia3_l"] = weight[None]
        else:
            found[f"{PEFT_PREFIX}{name}.ia3_l"] = weight[:, None]
    return found


def save_adapter(
    adapter: Adapter, theta: Tensor, folder: Path, base: str, revision: str | None = None
) -> None:
    """Write one run's adapter, theta [M], so that peft loads it onto `base` at `revision`."""
    tensors = {name: t.contiguous() for name, t in peft_tensors(adapter, theta).items()}
    write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    config = peft_config(adapter, base)
    config["revision"] = revision
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> dict:
    """adapter_config.json of a folder. Raises UsageError that says what is there instead of an adapter."""
    check_name(folder)
    if not is_there(folder / CONFIG):
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        if inside:
            named = ", ".join(inside[:5])
            raise UsageError(f"{folder}: no {CONFIG}, but in {named}; give one of these folders")
        if (folder / "config.json").is_file():
            raise UsageError(f"{folder}: a checkpoint and no adapter; give it as --model")
    return read_json(folder / CONFIG)


def read_adapter(folder: Path, model: nn.Module) -> tuple[Adapter, Tensor]:
    """The adapter that peft, or `save_adapter`, wrote into `folder`, and its weights [1, M] on the model's device.

    LoRA (rank and alpha patterns, rsLoRA, targets by name or pattern) and (IA)3. Raises UsageError, by name, for what
    changes more than these: DoRA, biases, modules_to_save, prompt tuning and other methods.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise UsageError(f"{folder}: peft_type {repr(kind)[:80]}; only LORA and IA3 are read")
    extras = changes_more(config)
    if extras:
        said = f"{extras[0]} = {repr(config[extras[0]])[:80]}"
        raise UsageError(f"{folder}: {said}; LORA and IA3 are read without extras")
    tensors = read_tensors(folder, config)
    try:
        compare_names(folder, config, tensors, model)
        reader = read_lora if kind == "LORA" else read_ia3
        adapter, weights = reader(config, tensors, model)
    except UsageError:
        raise
    except Exception as error:  # whatever comes of a configuration that says anything
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{folder}: its tensors do not fit this model ({reason})") from None
    theta = torch.cat([weights[name].flatten() for name in adapter.shapes])
    if not theta.isfinite().all():
        raise UsageError(f"{folder}: holds NaN or infinity: damaged, or its training failed")
    return adapter, theta[None].to(next(model.parameters()).device)


def changes_more(config: dict) -> list[str]:
    """Fields of a configuration that change more than the matrices of LoRA or (IA)3."""
    found = []
    for name, value in config.items():
        extra = name in EXTRAS or name.startswith("use_") or name.endswith("_config")
        if value and extra and name not in HARMLESS:
            found.append(name)
    if str(config.get("init_lora_weights")).startswith(CHANGE_BASE):
        found.append("init_lora_weights")
    return found


def read_tensors(folder: Path, config: dict) -> dict[str, Tensor]:
    """Tensors of adapter_model.safetensors by the base's names, float32. Raises UsageError."""
    path = folder / WEIGHTS
    if not is_there(path):
        pickled = folder / "adapter_model.bin"
        if pickled.exists():
            raise UsageError(f"{path}: missing; {pickled.name} is not read: save as safetensors")
        raise UsageError(f"{path}: missing")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(f"{path}: truncated or corrupt ({error})") from None
    found = {name.removeprefix(PEFT_PREFIX): tensor.float() for name, tensor in stored.items()}
    if len(found) < len(stored):
        raise UsageError(f"{path}: tensors twice, with and without {PEFT_PREFIX!r}; save it again")
    bias = config.get("bias", "none")
    biases = [name for name in found if name.endswith(".bias")]
    if bias not in BIASES or biases:  # "all" and "lora_only" mean nothing where no map has a bias
        there = f", the file changes {biases[0].replace('.base_layer', '')}" if biases else ""
        raise UsageError(f"{folder}: bias = {repr(bias)[:80]}{there}; train without")
    return found


def compare_names(folder: Path, config: dict, tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Raises UsageError unless configuration and tensors name the same maps, and nothing else is in the file."""
    held = {name.rsplit(".lora_" if ".lora_" in name else ".", 1)[0] for name in tensors}
    maps = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    for name in sorted(held - set(maps)):
        raise UsageError(f"{folder}: changes {name}, no matrix of this model that can be adapted")
    odd = held ^ targeted(config, maps)
    if odd:
        same = f"{CONFIG} and the tensors do not name the same matrices"
        raise UsageError(f"{folder}: {same} ({min(odd)})")


def targeted(config: dict, maps: list[str]) -> set[str]:
    """Of these maps those that a configuration names, by peft's own rules (`check_target_module_exists`)."""
    targets = config.get("target_modules")
    excluded = config.get("exclude_modules") or []
    layers = config.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(targets, str) and layers:
        raise ValueError("layers_to_transform beside target_modules that are a pattern")
    found = set()
    for name in maps:
        wanted = targets == "all-linear" or is_named_by(targets or [], name)
        if layers and name not in targets:  # a full name counts in any layer
            wanted = wanted and layer_of(name, config.get("layers_pattern")) in layers
        if wanted and not is_named_by(excluded, name):
            found.add(name)
    return found


def is_named_by(wanted: str | list, name: str) -> bool:
    """Whether a pattern is the whole of a map's name, or one of several names is, or ends it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted)


def layer_of(name: str, patterns: str | list | None) -> int | None:
    """The number of a map's layer; None where none of `patterns` is what its blocks are called."""
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns or [r"[^.]*"]:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match[1])
    return None


def by_pattern(patterns: dict | None, name: str, default):
    """The value of the first pattern that is the end of a map's name, as peft's `get_pattern_key` has it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_lora(
    config: dict, tensors: dict[str, Tensor], model: nn.Module
) -> tuple[Adapter, dict[str, Tensor]]:
    """Matrices of lower rank are padded with zeros, and each one's scale is put into its B."""
    ending = ".lora_A.weight"
    maps = {name.removesuffix(ending) for name in tensors if name.endswith(ending)}
    if not maps:
        raise ValueError(f"no name ends in lora_A.weight, the first is {min(tensors)}")
    rank = max(len(tensors[f"{name}.lora_A.weight"]) for name in maps)
    targets = sorted({name.rsplit(".", 1)[1] for name in maps})
    adapter = LoRA(model, targets, rank=rank, alpha=float(rank))
    for name in sorted(maps):  # before memory is taken for what the ranks say
        linear = adapter.linears[name]
        own = by_pattern(config.get("rank_pattern"), name, config.get("r", DEFAULT))
        sizes = {"A": (own, linear.in_features), "B": (linear.out_features, own)}
        for letter, size in sizes.items():
            shape = tuple(tensors[f"{name}.lora_{letter}.weight"].shape)
            if shape != size:
                raise ValueError(f"the shape of {name}.lora_{letter} is {shape}, not {size}")
    if len(tensors) != 2 * len(maps):
        raise KeyError("a tensor beside lora_A.weight and lora_B.weight")
    weights = {name: torch.zeros(shape) for name, shape in adapter.shapes.items()}
    for name in maps:
        A = tensors[f"{name}.lora_A.weight"]
        B = tensors[f"{name}.lora_B.weight"]
        alpha = config.get("lora_alpha", DEFAULT)
        alpha = by_pattern(config.get("alpha_pattern"), name, alpha)
        scale = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        weights[f"{name}.A"][: len(A)] = A
        weights[f"{name}.B"][:, : len(A)] = scale * B
    return adapter, weights


def read_ia3(
    config: dict, tensors: dict[str, Tensor], model: nn.Module
) -> tuple[Adapter, dict[str, Tensor]]:
    """Each map's tensor says which side it scales, [out, 1] or [1, in]; maps without one keep a scale of one."""
    found = {name.removesuffix(".ia3_l"): tensor for name, tensor in tensors.items()}
    inputs = {name for name, tensor in found.items() if tensor.shape[0] == 1}
    feedforward = config.get("feedforward_modules")
    for name in found:
        if isinstance(feedforward, str):
            scales_input = re.fullmatch(feedforward, name) is not None
        else:
            scales_input = name.endswith(tuple(feedforward or ()))
        if feedforward is not None and scales_input != (name in inputs):
            raise ValueError(f"feedforward_modules and the shape of {name}.ia3_l disagree")
    targets = sorted({name.rsplit(".", 1)[1] for name in found})
    adapter = IA3(model, targets, scale_inputs=inputs)
    weights = {name: torch.ones(shape) for name, shape in adapter.shapes.items()}
    for name, tensor in found.items():
        size = len(weights[name])
        if tuple(tensor.shape) != ((1, size) if name in inputs else (size, 1)):
            raise ValueError(f"the shape of {name}.ia3_l is {tuple(tensor.shape)}")
        weights[name] = tensor
    return adapter, weights
