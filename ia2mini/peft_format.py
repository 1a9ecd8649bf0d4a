"""Adapters in PEFT's own format, and checkpoints with the adapter merged in."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import UsageError
from .adapters import IA3, Adapter, Full, LoRA, PrefixTuning, Prompt, unpack
from .files import is_there, read_json, write, write_text
from .models.checkpoint import save
from .models.common import Linear

PEFT_PREFIX = "base_model.model."
EXTRAS = ("modules_to_save", "use_dora", "trainable_token_indices", "lora_bias", "layer_replication", "use_qalora")
EXTRAS += ("alora_invocation_tokens", "target_parameters", "arrow_config", "use_bdlora", "monteclora_config")
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that also change the base's weights


def peft_config(adapter: Adapter, base: str, model: nn.Module) -> dict:
    """adapter_config.json of peft for LoRA, (IA)3, prompt and prefix tuning."""
    config = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    if isinstance(adapter, LoRA):
        config |= {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0}
        return config | {"bias": "none", "target_modules": list(adapter.targets), "layers_to_transform": adapter.layers}
    if isinstance(adapter, IA3):  # peft cannot restrict (IA)3 to layers but takes full module names
        names = list(adapter.linears)
        return config | {"peft_type": "IA3", "target_modules": names, "feedforward_modules": sorted(adapter.inputs)}
    assert isinstance(adapter, Prompt | PrefixTuning)
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
        return {f"{PEFT_PREFIX}{n}.ia3_l": w[None] if n in adapter.inputs else w[:, None] for n, w in weights.items()}
    if isinstance(adapter, Prompt):
        return {"prompt_embeddings": weights["embeddings"]}
    layers = weights["prefix"]  # [L, 2, K, tokens, E]; peft: a row a virtual token, its keys and values layer by layer
    return {"prompt_embeddings": layers.permute(3, 0, 1, 2, 4).flatten(1)}


def save_adapter(
    model: nn.Module, adapter: Adapter, theta: Tensor, folder: Path, base: str, tokenizer=None, revision=None
) -> None:
    """Write one run's adapter, theta [M], so that peft loads it onto `base` at `revision`; `Full` as `save_merged`."""
    if isinstance(adapter, Full):
        return save_merged(model, adapter, theta, folder, tokenizer)
    tensors = {name: t.contiguous() for name, t in peft_tensors(adapter, theta).items()}
    write(folder / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    config = peft_config(adapter, base, model) | {"revision": revision}
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_adapter(folder: Path, model: nn.Module) -> tuple[Adapter, Tensor]:
    """The adapter that peft, or `save_adapter`, wrote into `folder`, and its weights [1, M] on the model's device.

    LoRA (rank and alpha patterns, rsLoRA, targets by name or pattern) and (IA)3, prompt and prefix tuning. Raises
    UsageError, by name, for what changes more than these: DoRA, biases, modules_to_save, other methods.
    """
    path = folder / "adapter_model.safetensors"
    config = read_json(folder / "adapter_config.json")
    kind = config.get("peft_type")
    extras = [name for name in EXTRAS if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    extras += ["init_lora_weights"] * str(config.get("init_lora_weights")).startswith(CHANGE_BASE)
    if not isinstance(kind, str) or kind not in READERS or extras:
        what = f"{extras[0]} = {config[extras[0]]!r}" if extras else f"peft_type {kind!r}"
        raise UsageError(f"{folder}: {what} is not supported (supported: {', '.join(READERS)}, without extras)")
    try:
        if not is_there(path):
            raise UsageError(f"{path}: missing")
        tensors = {name.removeprefix(PEFT_PREFIX): t.float() for name, t in load_file(path).items()}
        held = {name.rsplit(".lora_" if ".lora_" in name else ".", 1)[0] for name in tensors}
        if kind in ("LORA", "IA3") and (odd := held ^ targeted(config, model)):
            same = "adapter_config.json and the tensors do not name the same matrices"
            raise UsageError(f"{folder}: {same} ({min(odd)})")
        adapter, weights = READERS[kind](config, tensors, model)
        theta = torch.cat([weights[name].reshape(shape).reshape(-1) for name, shape in adapter.shapes.items()])
    except UsageError:
        raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: truncated or corrupt ({error})") from None
    except Exception as error:  # whatever comes of a configuration that says anything
        raise UsageError(f"{folder}: its tensors do not fit this model ({type(error).__name__}: {error})") from None
    if not theta.isfinite().all():
        raise UsageError(f"{folder}: the adapter holds NaN or infinity: damaged, or its training failed")
    return adapter, theta[None].to(next(model.parameters()).device)


def targeted(config: dict, model: nn.Module) -> set[str]:
    """The maps that peft's configuration names: endings or a pattern, less those excluded, in its layers."""

    def named(wanted: str | list | None, name: str) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or bool(re.fullmatch(wanted, name))
        return any(f".{name}".endswith(f".{end}") for end in wanted or ())

    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    maps = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    maps = [name for name in maps if not layers or int(name.split(".")[2]) in layers]
    return {n for n in maps if named(config.get("target_modules"), n) and not named(config.get("exclude_modules"), n)}


def read_lora(config: dict, tensors: dict[str, Tensor], model: nn.Module) -> tuple[Adapter, dict[str, Tensor]]:
    """Matrices of lower rank are padded with zeros, and each one's scale is put into its B."""
    maps = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    rank = max(len(tensors[f"{name}.lora_A.weight"]) for name in maps)
    adapter = LoRA(model, sorted({name.rsplit(".", 1)[1] for name in maps}), None, rank, float(rank))
    if unknown := [name for name in tensors if name.rsplit(".", 2)[0] not in adapter.linears]:
        raise KeyError(f"unknown tensor {unknown[0]}")
    for name in maps:  # before memory is taken for what the ranks say
        if tensors[f"{name}.lora_A.weight"].shape[1:] != (adapter.linears[name].in_features,):
            raise ValueError(f"the shape of {name}.lora_A")
    weights = {name: torch.zeros(shape) for name, shape in adapter.shapes.items()}
    alphas = config.get("alpha_pattern") or {}  # by a pattern of the end of a name; the first that matches
    for name in maps:
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        own = (value for end, value in alphas.items() if re.match(rf"(.*\.)?({end})$", name))
        scale = next(own, config["lora_alpha"]) / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
        weights[f"{name}.A"][: len(A)], weights[f"{name}.B"][:, : len(A)] = A, scale * B
    return adapter, weights


def read_ia3(config: dict, tensors: dict[str, Tensor], model: nn.Module) -> tuple[Adapter, dict[str, Tensor]]:
    """Maps without a tensor keep a scale of one."""
    found = {name.removesuffix(".ia3_l"): t for name, t in tensors.items()}
    inputs = tuple({name.rsplit(".", 1)[1] for name, t in found.items() if t.shape[0] == 1})
    adapter = IA3(model, sorted({name.rsplit(".", 1)[1] for name in found}), None, inputs)
    return adapter, {name: found.get(name, torch.ones(shape)) for name, shape in adapter.shapes.items()}


def read_virtual(config: dict, tensors: dict[str, Tensor], model: nn.Module) -> tuple[Adapter, dict[str, Tensor]]:
    """Virtual tokens of prompt or prefix tuning; of the latter a row holds keys and values layer by layer."""
    (table,) = tensors.values()
    if config["peft_type"] == "PROMPT_TUNING":
        return Prompt(model, len(table)), {"embeddings": table}
    adapter = PrefixTuning(model, len(table))
    L, two, K, tokens, E = adapter.shapes["prefix"]
    return adapter, {"prefix": table.view(tokens, L, two, K, E).permute(1, 2, 3, 0, 4)}


READERS = {"LORA": read_lora, "IA3": read_ia3, "PROMPT_TUNING": read_virtual, "PREFIX_TUNING": read_virtual}


class Merged(Adapter):
    """LoRA or (IA)3 merged into the frozen matrices, rounded to bfloat16: what the paper's released scripts score.

    A matrix is merged anew for every pass, so that not all of R runs are held at once.
    """

    def __init__(self, adapter: Adapter):
        self.adapter, self.shapes = adapter, adapter.shapes
        self.linears = adapter.linears

    def change(self, name: str, weights: dict[str, Tensor]) -> Callable:
        mine = {key: tensor for key, tensor in weights.items() if key in (name, f"{name}.A", f"{name}.B")}
        return partial(self.product, name, mine)

    def product(self, name: str, weights: dict[str, Tensor], base: Callable, x: Tensor) -> Tensor:
        """The merged map of each run on its group of x [R * rows, T, in]."""
        linear = self.linears[name]
        runs = len(next(iter(weights.values())))
        outputs = []
        for r, rows in enumerate(x.chunk(runs)):
            change = merged(self.adapter, name, {key: tensor[r] for key, tensor in weights.items()}, linear)
            change = {key: tensor.bfloat16().to(x.dtype) for key, tensor in change.items()}
            outputs.append(F.linear(rows, change[f"{name}.weight"], change.get(f"{name}.bias", linear.bias)))
        return torch.cat(outputs)


@torch.no_grad()
def save_merged(model: nn.Module, adapter: Adapter, theta: Tensor, folder: Path, tokenizer=None) -> None:
    """Write a checkpoint whose matrices hold the adapter's change, computed in float32; the model stays as it is.

    With `tokenizer` the checkpoint is complete: its tokenizer.json and its end-of-sequence ids are written too.
    Raises UsageError for prompt and prefix tuning, which change no matrix.
    """
    if not adapter.linears:
        before = f"a {type(adapter).__name__} adapter stands before the text"
        raise UsageError(f"{before} and cannot be merged into matrices; save it for peft")
    weights = unpack(theta[None].to(next(model.parameters()).device), adapter.shapes)
    weights, changed = {name: w[0] for name, w in weights.items()}, {}
    for name, linear in adapter.linears.items():
        changed |= {key: t.to(linear.weight.dtype) for key, t in merged(adapter, name, weights, linear).items()}
    words, ends = (tokenizer.backend.to_str(), list(tokenizer.eos_ids) or None) if tokenizer else (None, None)
    save(model, folder, words, ends, changed)


def merged(adapter: Adapter, name: str, weights: dict[str, Tensor], linear: nn.Linear) -> dict[str, Tensor]:
    """The tensors of one map that the adapter changes, by name, float32."""
    weight = linear.weight.float()
    if isinstance(adapter, LoRA):
        return {f"{name}.weight": weight + adapter.alpha / adapter.rank * weights[f"{name}.B"] @ weights[f"{name}.A"]}
    if isinstance(adapter, Full):
        return {f"{name}.weight": weight + weights[name]}
    assert isinstance(adapter, IA3)
    if name in adapter.inputs:
        return {f"{name}.weight": weight * weights[name]}
    bias = {} if linear.bias is None else {f"{name}.bias": linear.bias.float() * weights[name]}
    return bias | {f"{name}.weight": weight * weights[name][:, None]}
