"""config.json: which families there are, what their fields mean, and what is refused.

Reference: the configuration classes of transformers.
"""

from dataclasses import MISSING, asdict, fields
from pathlib import Path

from ia2mini import UsageError
from ia2mini.files import read_json

from . import llama, olmo2, qwen3
from .layers import LLAMA3, Rope

# model_type -> its config and its model
FAMILIES = {
    "llama": (llama.Config, llama.Llama),
    "qwen3": (qwen3.Config, qwen3.Qwen3),
    "qwen2": (llama.Config, llama.Llama),
    "mistral": (llama.Config, llama.Llama),
    "smollm3": (llama.Config, llama.Llama),
    "seed_oss": (llama.Config, llama.Llama),
    "granite": (llama.Config, llama.Llama),
    "olmo2": (olmo2.Config, olmo2.Olmo2),
}
# of other numbers 2**20
MOST = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**40, "rms_norm_eps": 1}

CLASSES = {"seed_oss": "SeedOss", "smollm3": "SmolLM3"}  # of others: the first letter in upper case
# model_type -> what a field is that its config.json does not have, where that is not Llama's
FAMILY_DEFAULTS: dict[str, dict] = {
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 2**15},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 2**17, "sliding_window": 4096},
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 2**15,
        "tie_word_embeddings": True,
    },
    "seed_oss": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 2**19,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    "granite": {"attention_multiplier": 1.0},
}
# … and what it is whatever config.json says: transformers does not read the field
ALWAYS: dict[str, dict] = {
    "qwen2": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "seed_oss": {"mlp_bias": False},
    "olmo2": {"mlp_bias": False},
}
# field -> the only family that reads it
OWN_FIELDS = {
    "attention_out_bias": "seed_oss",
    "no_rope_layers": "smollm3",
    "embedding_multiplier": "granite",
    "attention_multiplier": "granite",
    "residual_multiplier": "granite",
    "logits_scaling": "granite",
}
ROPE_THETA = {"smollm3": 2e6}  # of others 1e4
# model_type -> what ia2mini lacks for it, and a model of the same size that it has
REFUSED = {
    "gemma3_text": ("windowed layers and other norms", "qwen3-1.7b or smollm2-1.7b"),
    "gemma3": ("windowed layers and other norms", "qwen3-4b or llama-3.2-3b"),
    "olmo3": ("windowed layers", "olmo2-7b or qwen3-8b"),
    "phi3": ("fused matrices of q, k and v", "qwen3-4b or llama-3.2-3b"),
    "qwen3_moe": ("experts", "qwen3-8b"),
    "qwen3_next": ("layers of linear attention", "qwen3-8b"),
    "qwen3_5_text": ("layers of linear attention", "qwen3-4b"),
    "qwen3_5": ("layers of linear attention", "qwen3-4b"),
    "lfm2": ("convolutions in place of attention", "qwen3-0.6b or smollm2-360m"),
    "granitemoehybrid": ("Mamba layers", "granite-3.3-2b-instruct"),
}


def read_folder_config(folder: Path):
    """The Config of a checkpoint folder and its model's class. UsageError for a missing or unsupported field."""
    where = folder / "config.json"
    raw = read_json(where)
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        lacks, instead = REFUSED[kind]
        raise UsageError(
            f"{where}: model_type {kind!r} is not supported: it has {lacks}; use {instead}"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UsageError(
            f"{where}: model_type {repr(kind)[:80]} is not supported (supported: {', '.join(FAMILIES)})"
        )
    cls, family = FAMILIES[kind]
    raw = {**FAMILY_DEFAULTS.get(kind, {}), **raw}
    found = {"rope": read_rope(raw, where), **family_fields(kind, raw, where)}
    layers = raw.get("layer_types") or []
    for name, fine, values in (
        ("hidden_act", raw.get("hidden_act", "silu") == "silu", "silu"),
        ("quantization_config", not raw.get("quantization_config"), "unquantised checkpoints"),
        ("use_sliding_window", not raw.get("use_sliding_window"), "no sliding window"),
        ("is_causal", raw.get("is_causal") in (None, True), "true"),
        (
            "layer_types",
            isinstance(layers, list) and layers == ["full_attention"] * len(layers),
            "all full_attention",
        ),
    ):
        if not fine:
            raise UsageError(
                f"{where}: {name} = {repr(raw[name])[:80]} is not supported (supported: {values})"
            )
    missing = [f.name for f in fields(cls) if f.default is MISSING and raw.get(f.name) is None]
    if missing:
        raise UsageError(f"{where}: needed fields are missing: {', '.join(missing)}")
    for f in fields(cls):
        if OWN_FIELDS.get(f.name, kind) != kind:
            continue
        if f.name not in found and raw.get(f.name) is not None:
            found[f.name] = checked(
                raw[f.name], f.type, f"{where}: {f.name}", MOST.get(f.name, 2**20)
            )
    config = cls(**found)
    heads = config.num_attention_heads
    shared = config.num_key_value_heads
    if heads % shared:
        raise UsageError(
            f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {shared}"
        )
    if config.head_dim % 2 or not config.head_dim:
        raise UsageError(
            f"{where}: head_dim = {config.head_dim} (or hidden_size over heads) is not an even number"
        )
    return config, family


def family_fields(kind: str, raw: dict, where: Path) -> dict:
    """The fields of a config that its family sets whatever the file says, or spells in its own way. UsageError."""
    window = raw.get("sliding_window")
    if kind == "mistral" and window is not None:
        longest = raw["max_position_embeddings"]
        if type(window) is not int or type(longest) is not int or window < longest:
            mend = f"shorten max_position_embeddings to {window!r}, or use mistral-7b-v0.3"
            raise UsageError(
                f"{where}: sliding_window = {window!r} is not supported: prompts may be longer; {mend}"
            )
    found: dict = dict(ALWAYS.get(kind, {}))
    if kind == "smollm3":
        found["no_rope_layers"] = layers_that_rotate(raw, where)
    return found


def layers_that_rotate(raw: dict, where: Path) -> tuple[int, ...]:
    """SmolLM3: of each layer 1 where queries and keys are rotated, else 0. Raises UsageError."""
    depth = raw.get("num_hidden_layers")
    told = raw.get("no_rope_layers")
    if told is None and type(depth) is int and 0 < depth <= MOST["num_hidden_layers"]:
        interval = raw.get("no_rope_layer_interval", 4)
        checked(interval, int, f"{where}: no_rope_layer_interval", 2**20)
        told = [int((layer + 1) % interval != 0) for layer in range(depth)]
    if not isinstance(told, list) or len(told) != depth or not all(one in (0, 1) for one in told):
        wanted = "a 0 or 1 for each layer"
        raise UsageError(f"{where}: no_rope_layers = {repr(told)[:80]} is not {wanted}")
    return tuple(told)


def checked(value, kind, where: str, most: float):
    """A config's value if it is of its field's type and, a number, within reason. Raises UsageError."""
    if kind in (int, int | None):
        fine = type(value) is int and 0 < value <= most
        wanted = f"a whole number from 1 to {most:,}"
    elif kind in (float, float | None):
        fine = type(value) in (int, float) and 1e-12 <= value <= most
        wanted = f"a number from 1e-12 to {most:g}"
    else:
        kind = bool if kind == (bool | None) else kind
        fine = type(value) is kind
        wanted = kind.__name__
    if not fine:
        raise UsageError(f"{where} = {repr(value)[:80]} is not {wanted}")
    return value


def read_rope(raw: dict, where: Path) -> Rope:
    """The rotary embedding of a config, as transformers 5 or as the hub until then spells it. Raises UsageError."""
    told = [name for name in ("rope_parameters", "rope_scaling") if raw.get(name)]
    if len(told) == 2:
        readings = [read_rope(raw | {name: None}, where) for name in told]
        if readings[0] != readings[1]:
            raise UsageError(
                f"{where}: rope_parameters and rope_scaling say different things; remove the wrong one"
            )
    rope = raw[told[0]] if told else {}
    if isinstance(rope, dict):
        kind = rope.get("rope_type", rope.get("type", "default"))
    else:
        kind = type(rope).__name__
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        raise UsageError(
            f"{where}: rope_scaling type {repr(kind)[:80]} is not supported (supported: default, llama3)"
        )
    for partial in (raw.get("partial_rotary_factor"), rope.get("partial_rotary_factor")):
        if partial not in (1.0, None):
            raise UsageError(
                f"{where}: partial_rotary_factor = {repr(partial)[:80]} is not supported (supported: 1.0)"
            )
    # readers differ in which of the two they take
    for name in ("rope_theta", "original_max_position_embeddings"):
        outer = raw.get(name)
        inner = rope.get(name)
        if outer is not None and inner is not None and outer != inner:
            raise UsageError(
                f"{where}: {name} is {repr(outer)[:80]}, and {repr(inner)[:80]} in {told[0]}; remove one"
            )
    needed = LLAMA3 if kind == "llama3" else ()
    missing = [name for name in needed if name not in rope]
    if missing:
        raise UsageError(f"{where}: rope_scaling of type llama3 lacks {', '.join(missing)}")
    usual = ROPE_THETA.get(raw["model_type"], 1e4)
    theta = rope.get("rope_theta", raw.get("rope_theta", usual))
    scaling = {name: rope[name] for name in needed}
    for name, value in {"rope_theta": theta, **scaling}.items():
        checked(value, float, f"{where}: {name}", 1e12)
    if scaling and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise UsageError(
            f"{where}: rope_scaling: high_freq_factor is below low_freq_factor; mend the two"
        )
    return Rope(float(theta), scaling or None)


def written_fields(config) -> dict:
    """A config's fields as config.json has them; without those of other families."""
    raw = asdict(config)
    kind = config.model_type
    return {name: value for name, value in raw.items() if OWN_FIELDS.get(name, kind) == kind}
