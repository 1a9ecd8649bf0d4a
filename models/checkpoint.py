"""From a folder or a hub id to a model and its tokenizer, and back to a folder: strict, safetensors and JSON only."""

import difflib
import functools
import json
import os
import re
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ia2mini import UsageError
from ia2mini.errors import out_of_memory
from ia2mini.files import check_name, is_there, read_json, write, write_text
from ia2mini.files.hub import hub_errors, patiently
from ia2mini.tokenizer import Tokenizer

from .config import CLASSES, FAMILIES, read_folder_config, written_fields

TINY = Path(__file__).parent / "tiny"  # the embedded checkpoint

HUB_IDS = {  # how they begin -> how they go on
    "Qwen/Qwen3": "0.6B-Base 1.7B-Base 4B-Base 8B-Base 14B-Base 0.6B 1.7B 4B 8B 14B 32B",
    "meta-llama/Llama": "3.2-1B 3.2-3B 3.2-1B-Instruct 3.2-3B-Instruct 3.1-8B 3.1-70B 3.1-8B-Instruct 3.1-70B-Instruct",
    "HuggingFaceTB/SmolLM2": "135M 360M 1.7B 135M-Instruct 360M-Instruct 1.7B-Instruct",
    "Qwen/Qwen2.5": "0.5B 1.5B 3B 7B 0.5B-Instruct 1.5B-Instruct 3B-Instruct 7B-Instruct",
    "HuggingFaceTB/SmolLM3": "3B 3B-Base",
    "mistralai/Mistral": "7B-v0.3 7B-Instruct-v0.3",
    "ibm-granite/granite": "3.3-2b-base 3.3-2b-instruct 3.3-8b-instruct",
    "allenai/OLMo-2": "0425-1B 0425-1B-Instruct 1124-7B 1124-7B-Instruct 1124-13B 1124-13B-Instruct",
}
SHORT_NAMES: dict[str, str] = {}
for beginning, rest in HUB_IDS.items():
    for end in rest.split():
        hub_id = f"{beginning}-{end}"
        name = hub_id.partition("/")[2].lower()
        SHORT_NAMES[re.sub(r"olmo-2-\d+", "olmo2", name)] = hub_id  # without the month
FILES = "config.json generation_config.json tokenizer*.json special_tokens_map.json chat_template.jinja".split()
FILES += ["added_tokens.json", "adapter_config.json", "chat_template.json"]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ["model*.safetensors", INDEX]
STORED = ("F32", "BF16", "F16", "F64")
LARGEST = "5GB"  # of a file of weights that is written
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NUMBER = r"\d+(?:\.\d+)?"  # in a model's name
NEAR = 0.6  # least likeness of an unknown name to one that may have been meant, of 1


def load(
    name: str | Path,
    dtype=torch.float32,
    device: str = "cpu",
    revision: str | None = None,
    check: bool = True,
) -> tuple[nn.Module, Tokenizer]:
    """Load `name`, a folder, a short name ("qwen3-4b-base", "tiny") or a hub id: (model, tokenizer).

    The model is in evaluation mode with every weight frozen, in `dtype` on `device`; weights are streamed one tensor at
    a time; none on "meta". `check`: none may be NaN or infinite. Raises UsageError for anything a user can mend.

        model, tokenizer = load("tiny")
        logits = model(torch.tensor([tokenizer.encode("Text:a lovely film\\nLabel:")]))   # [1, T, V]
    """
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"dtype {dtype!r}: give torch.float32, torch.bfloat16 or torch.float16")
    folder = locate(name, revision)
    config, family = read_folder_config(folder)
    weightless = str(device) == "meta"
    where = {} if weightless else tensor_files(folder, config)  # before so many layers are made
    with torch.device("meta"):
        model = family(config)
    if weightless:
        model.to(dtype)
    else:
        fill_parameters(model, folder, where, dtype, torch.device(device), check)
    return model.eval().requires_grad_(False), Tokenizer.from_folder(folder)


def locate(name: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a checkpoint; downloads (or finds in the cache) what a hub id needs. Raises UsageError."""
    if str(name) == "tiny":
        return TINY
    if os.path.isdir(name):
        folder = Path(name)
        check_name(folder)
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            layout = "give a folder in the Hugging Face layout (config.json, *.safetensors)"
            raise UsageError(f"{folder}: no config.json there; {layout}")
        return folder
    hub_id = SHORT_NAMES.get(str(name).lower(), str(name))
    if hub_id.count("/") != 1 or str(name).startswith((".", "/", "~")):
        shown = repr(str(name))[:200]
        raise UsageError(
            f"unknown model {shown}: not a folder, a short name or a hub id owner/name; {hint(str(name))}"
        )
    from huggingface_hub import snapshot_download

    files = FILES + WEIGHT_FILES if weights else FILES
    with hub_errors(hub_id, "model", revision, "give a folder"):
        folder = Path(
            patiently(lambda: snapshot_download(hub_id, revision=revision, allow_patterns=files))
        )
    refuse_adapter(folder)
    return folder


def refuse_adapter(folder: Path) -> None:
    """Raises UsageError for a folder that holds an adapter, with a checkpoint or alone.

    Of a folder with both transformers loads the model that the adapter names, and puts the adapter on it.
    """
    config = folder / "adapter_config.json"
    if not is_there(config):
        return
    base = repr(read_json(config).get("base_model_name_or_path"))[:200]
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: an adapter and no checkpoint; give the model it was trained on ({base})"
        )
    ways = f"an adapter on {base}, or the checkpoint without it; move {config.name} into a folder of its own"
    raise UsageError(f"{folder}: holds a checkpoint and an adapter, and may mean {ways}")


def hint(name: str) -> str:
    """What may have been meant by an unknown name.

    Letters but the first may be misspelt; another number is another model.
    """
    name = name.lower()
    known = []
    for near in ["tiny", *SHORT_NAMES]:
        if near[0] == name[:1] and has_numbers_of(name, near):
            known.append(near)
    nearest = difflib.get_close_matches(name, known, 3, NEAR)
    nearest = nearest or [near for near in known if near.startswith(name)][:3]
    if nearest:
        return f"did you mean {' or '.join(map(repr, nearest))}?"
    return f"families: {', '.join(FAMILIES)}; `ia2mini models` lists the short names"


def has_numbers_of(name: str, known: str) -> bool:
    """Whether every number in `name` stands in a known name, too, in the same order."""
    numbers = iter(re.findall(NUMBER, known))
    return all(number in numbers for number in re.findall(NUMBER, name))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that a checkpoint consists of, by its index if it has one. Raises UsageError."""
    index = folder / INDEX
    single = folder / SINGLE
    if not index.is_file():
        return [single]
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or not all(re.fullmatch(r"[\w.-]{1,200}", name) for name in names):
        raise UsageError(
            f"{index}: weight_map is missing or empty, or names files elsewhere; download it again"
        )
    files = [folder / name for name in names]
    if single.is_file() and single not in files:
        if all(file.is_file() for file in files):
            mend = f"delete {INDEX} and its files, or {SINGLE} (which transformers would take)"
            raise UsageError(
                f"{folder}: holds two sets of weights, {SINGLE} and the files of {INDEX}; {mend}"
            )
        return [single]  # an index that was left behind, as transformers reads it
    return files


def what_it_needs(folder: Path) -> str:
    """What to do about a checkpoint's missing file of weights."""
    if (folder / INDEX).is_file():
        return f"the checkpoint needs every shard of {INDEX}"
    for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth", "*.safetensors"):
        other = min(folder.glob(pattern), default=None)
        if other is not None:
            return f"{other.name} is not read; the checkpoint needs its weights in {SINGLE}, or in shards with {INDEX}"
    return "the checkpoint needs it"


def tensor_files(folder: Path, config) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it; only headers are read.

    Raises UsageError for missing, truncated or corrupt files, and for another number of layers than the config's.
    """
    where: dict[str, Path] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise UsageError(f"{file}: no such file; {what_it_needs(folder)}")
        # of the hub's cache
        if file.resolve().parent != folder.resolve() and file.resolve().parent.name != "blobs":
            raise UsageError(f"{file}: a link out of its folder; put the file itself there")
        try:
            with safe_open(file, "pt") as f:
                names = list(f.keys())
        except (SafetensorError, OSError, struct.error) as error:
            if out_of_memory(error):
                raise
            # a link of the hub's cache would be kept
            mend = f"delete {file.resolve()} and download it again"
            raise UsageError(
                f"{file}: truncated or corrupt safetensors file ({error}); {mend}"
            ) from None
        for name in names:
            if name in where:
                raise UsageError(
                    f"{file}: tensor {name} stands in {where[name].name} too; download the folder again"
                )
            where[name] = file
    numbers = {name.split(".")[2] for name in where if name.startswith("model.layers.")}
    if where and not numbers:
        named = f"no tensor is called model.layers.…, the first is {min(where)[:80]}"
        raise UsageError(f"{folder}: {named}; save it as a model for causal language modelling")
    if len(numbers) != config.num_hidden_layers:
        says = f"config.json says num_hidden_layers = {config.num_hidden_layers}"
        raise UsageError(
            f"{folder}: {says}, the files hold {len(numbers)}; they do not belong together"
        )
    return where


def fill_parameters(
    model: nn.Module,
    folder: Path,
    where: dict[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    check: bool,
) -> None:
    """Give every parameter of `model` (on the meta device) its tensor. Raises UsageError naming the first misfit."""
    wanted = {name: p.shape for name, p in model.named_parameters()}
    unknown = [
        name for name in where if name not in wanted and not name.endswith("rotary_emb.inv_freq")
    ]
    if model.config.tie_word_embeddings and HEAD in unknown:
        unknown.remove(HEAD)
    for problem, names in (
        ("missing", [name for name in wanted if name not in where]),
        ("unknown", unknown),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"{folder}: {problem} tensor {names[0]}{more}; the files do not fit config.json"
            )
    for name, shape in wanted.items():
        # one open a tensor: its pages are let go again
        with safe_open(where[name], "pt", device=str(device)) as f:
            found = f.get_slice(name)
            if found.get_shape() != list(shape) or found.get_dtype() not in STORED:
                stored = f"is {found.get_dtype()} of shape {found.get_shape()}"
                asked = f"config.json asks for {list(shape)}, and {', '.join(STORED)} can be read"
                raise UsageError(f"{where[name]}: tensor {name} {stored}; {asked}")
            tensor = f.get_tensor(name).to(dtype)
        # NaN is both least and most
        if check and not torch.stack(tensor.aminmax()).isfinite().all():
            way = "use other weights, another --dtype, or --no-check to load them anyway"
            raise UsageError(f"{where[name]}: tensor {name} holds NaN or infinity; {way}")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    if model.config.tie_word_embeddings and HEAD in where:
        with safe_open(where[HEAD], "pt", device=str(device)) as f:
            head = f.get_tensor(HEAD).to(dtype)
        if not torch.equal(head, model.get_parameter(EMBEDDING)):
            says = f"config.json ties head and embedding (tie_word_embeddings), but {HEAD} is another than {EMBEDDING}"
            mend = "set tie_word_embeddings to false to use it (as transformers 5 does), or remove it from the file"
            raise UsageError(f"{folder}: {says}; {mend}")
    model.tie()


def save(
    model: nn.Module,
    folder: Path,
    tokenizer_json=None,
    eos_token_id=None,
    changed: dict | None = None,
) -> None:
    """Write `model`, with the tensors in `changed` (by name) for its own, in the Hugging Face layout into `folder`.

    config.json, model.safetensors (in shards above 5 GB) and, if given, tokenizer.json. Raises UsageError.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    raw = written_fields(model.config)
    rope = raw.pop("rope")
    kind = model.config.model_type
    raw |= {
        "architectures": [f"{CLASSES.get(kind, kind.capitalize())}ForCausalLM"],
        "hidden_act": "silu",
        "rope_theta": rope["theta"],
    }
    raw["rope_scaling"] = rope["scaling"] and {"rope_type": "llama3", **rope["scaling"]}
    raw["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    raw["eos_token_id"] = eos_token_id
    raw["pad_token_id"] = None  # SmolLM3's default may be outside of the vocabulary
    tensors = dict(model.named_parameters()) | (changed or {})  # a tied head is named once
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=LARGEST)
    for file, names in plan.filename_to_tensors.items():
        some = {name: tensors[name] for name in names}
        write(folder / file, functools.partial(save_file, some, metadata={"format": "pt"}))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    if tokenizer_json is not None:
        write_text(folder / "tokenizer.json", tokenizer_json)
    # last: without it this is no checkpoint
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")
