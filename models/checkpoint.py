"""From a folder or a hub id to a model and its tokenizer, and back to a folder. Strict both ways; safetensors and JSON only."""

import difflib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ia2mini import UsageError

from . import llama, qwen3
from .common import read_config

FAMILIES = {"llama": (llama.Config, llama.Llama), "qwen3": (qwen3.Config, qwen3.Qwen3)}
TINY = Path(__file__).parent / "tiny"  # the embedded checkpoint

SHORT_NAMES = {
    **{f"qwen3-{size.lower()}-base": f"Qwen/Qwen3-{size}-Base" for size in ("0.6B", "1.7B", "4B", "8B", "14B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")},
    **{f"llama-3.2-{size.lower()}": f"meta-llama/Llama-3.2-{size}" for size in ("1B", "3B")},
    **{f"llama-3.2-{size.lower()}-instruct": f"meta-llama/Llama-3.2-{size}-Instruct" for size in ("1B", "3B")},
    **{f"llama-3.1-{size.lower()}": f"meta-llama/Llama-3.1-{size}" for size in ("8B", "70B")},
    **{f"llama-3.1-{size.lower()}-instruct": f"meta-llama/Llama-3.1-{size}-Instruct" for size in ("8B", "70B")},
}
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]


def load(name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", revision: str | None = None):
    """Load `name`, a folder, a short name ("qwen3-4b-base", "tiny") or a hub id: (model, tokenizer).

    The model is in evaluation mode with every weight frozen, in `dtype` on `device`. Weights are streamed one tensor at a time,
    memory-mapped where the file already holds `dtype`. Raises UsageError for anything a user can mend.
    """
    from ia2mini.tokenizer import Tokenizer  # the one look upwards: a checkpoint is not usable without its tokenizer

    folder = locate(name, revision)
    config, family = read_folder_config(folder)
    with torch.device("meta"):
        model = family(config)
    fill(model, folder, dtype, torch.device(device))
    return model.eval().requires_grad_(False), Tokenizer.from_folder(folder)


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; downloads (or finds in the cache) what a hub id needs. Raises UsageError."""
    if str(name) == "tiny":
        return TINY
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"{folder}: no config.json there; give a folder in the Hugging Face layout (config.json, *.safetensors)"
            )
        return folder
    hub_id = SHORT_NAMES.get(str(name).lower(), str(name))
    if hub_id.count("/") != 1 or str(name).startswith((".", "/", "~")):
        near = difflib.get_close_matches(str(name).lower(), ["tiny", *SHORT_NAMES], 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"short names: tiny, {', '.join(SHORT_NAMES)}"
        raise UsageError(f"unknown model {str(name)!r}: not a folder, a short name or a hub id owner/name; {hint}")
    return download(hub_id, revision)


def download(hub_id: str, revision: str | None) -> Path:
    """The snapshot folder of a model repository on the hub, fetching only the files needed. Raises UsageError."""
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id, "model", revision, "give a folder"):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=FILES))


@contextmanager
def hub_errors(repo: str, kind: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turn whatever goes wrong with repository `repo` (a "model" or "dataset") on the hub into a UsageError; `instead`: a way around."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except UsageError:
        raise
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
        raise UsageError(f"{repo} is gated: accept its terms at {page}, then {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(f"{repo}: no such {kind} on the hub (or private: {log_in})") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{repo}: the hub has no revision {revision} of it; {instead}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise UsageError(
            f"{repo}: not in the local cache, and the hub is out of reach; check the network, or {instead}"
        ) from None
    except Exception as error:  # bad ids and the client's own network errors, whose classes differ between its versions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UsageError(f"{repo}: cannot be downloaded ({reason}); check the network, or {instead}") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def read_folder_config(folder: Path):
    """The Config of a checkpoint folder and the class that it describes. Raises UsageError."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") not in FAMILIES:
        raise UsageError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported (supported: {', '.join(FAMILIES)})"
        )
    config_class, family = FAMILIES[raw["model_type"]]
    return read_config(config_class, raw, str(path)), family


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises UsageError for missing, truncated or corrupt files."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
        if not names:
            raise UsageError(f"{index}: weight_map is missing or empty; download it again")
    where = {}
    for file in sorted(folder / name for name in names):
        if not file.is_file():
            raise UsageError(
                f"{file}: no such file; the checkpoint needs {'every shard of its index' if index.is_file() else 'it'}"
            )
        try:
            with safe_open(file, "pt") as f:
                where.update(dict.fromkeys(f.keys(), file))
        except (SafetensorError, OSError, struct.error) as error:
            raise UsageError(f"{file}: truncated or corrupt safetensors file ({error}); download it again") from None
    return where


def fill(model: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter of `model` (on the meta device) its tensor from `folder`. Raises UsageError naming the first misfit."""
    where = shards(folder)
    wanted = {name: p.shape for name, p in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    unknown = [
        n
        for n in where
        if n not in wanted and not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")
    ]
    for problem, names in (("missing", [n for n in wanted if n not in where]), ("unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(f"{folder}: {problem} tensor {names[0]}{more}; the files do not fit config.json")
    for name, shape in wanted.items():
        with safe_open(
            where[name], "pt", device=str(device)
        ) as f:  # one open a tensor: pages of converted ones are let go
            tensor = f.get_tensor(name)
        if tensor.shape != shape:
            raise UsageError(
                f"{where[name]}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    model.tie()


def save(
    model: nn.Module,
    folder: Path,
    tokenizer_json: str | None = None,
    eos_token_id: int | list[int] | None = None,
    changed: dict[str, Tensor] | None = None,
) -> None:
    """Write `model`, with the tensors in `changed` for its own, in the Hugging Face layout into `folder`: config.json,
    model.safetensors and, if given, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(model.config)
    rope = raw.pop("rope")
    raw |= {"architectures": [f"{type(model).__name__}ForCausalLM"], "hidden_act": "silu", "rope_theta": rope["theta"]}
    raw["rope_scaling"] = rope["scaling"] and {"rope_type": "llama3", **rope["scaling"]}
    raw["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    raw["eos_token_id"] = eos_token_id
    tensors = dict(model.named_parameters()) | (changed or {})  # a tied head is named once
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    write(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write(folder / "config.json", lambda path: path.write_text(json.dumps(raw, indent=2) + "\n"))
    if tokenizer_json is not None:
        write(folder / "tokenizer.json", lambda path: path.write_text(tokenizer_json, encoding="utf-8"))


def write(path: Path, writer) -> None:
    """Run `writer(temporary path)` beside `path`, then rename into place: the file is whole or not there. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise UsageError(
            f"{path.parent}: cannot write there ({error.strerror}); choose another folder with --out"
        ) from None
    try:
        writer(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: cannot be written ({reason}); free some space or choose another folder with --out"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
