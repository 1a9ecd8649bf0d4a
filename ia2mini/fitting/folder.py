"""The folder of a fitted adapter: writing it, checking it when it is loaded, and merging."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import UsageError
from ..adapters import Adapter
from ..engine.merge import MERGED, claim, save_merged
from ..engine.peft import read_adapter, read_config, save_adapter
from ..engine.store import checkpoint_digest, versions
from ..engine.subject import Subject
from ..files import finite, is_there, read_json, write, write_json, write_text
from ..files.tokenizer_files import read_tokenizer
from ..models.checkpoint import load
from ..models.taps import device_of
from ..tokenizer import Rendered
from .probe import PROBE, write_probe
from .serving import write_decision
from .spec import SPEC, read_spec

if TYPE_CHECKING:
    from .predictor import Predictor

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
CHECKPOINT_FILES = (  # small files of the base's checkpoint that are copied beside merged weights
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "added_tokens.json",
)
CARD_MARK = b"tags: [ia2mini, "  # of a model card that ia2mini wrote
CANARY_TOKENS = 5  # likeliest tokens of the test prompt that are kept
# mean difference of a canary's log-probabilities
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


def check_out_folder(folder: Path, sources: Iterable[Path | None] = ()) -> None:
    """Raises UsageError for a folder with files that are not from an earlier fit, or with one that the fit reads."""
    mend = "choose a new or empty folder with --out"
    for source in sources:
        if source is not None and source.resolve().parent == folder.resolve():
            raise UsageError(f"{folder}: holds {source.name!r}, which this fit reads; {mend}")
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{folder}: is a file; {mend}")
        return
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    ours = SPEC in files or any(name.startswith("unfinished-") for name in files)
    if files and not ours:
        raise UsageError(f"{folder}: holds {files[0]!r} and is no folder of an earlier fit; {mend}")
    card = folder / "README.md"
    if card.is_file() and CARD_MARK not in card.read_bytes():
        raise UsageError(f"{card}: not by ia2mini, and would be replaced; move it, or {mend}")


def save(predictor: "Predictor", folder: Path) -> None:
    """Write the adapter in peft's format and `ia2mini.json`. Raises UsageError, also for a folder of others."""
    check_out_folder(folder)
    subject = predictor.subject
    for name in (*ADAPTER, PROBE):  # of an earlier fit
        (folder / name).unlink(missing_ok=True)
    if predictor.probe is not None:
        write_probe(predictor.probe, folder / PROBE)
    if predictor.adapter:
        theta = predictor.theta[0]
        save_adapter(predictor.adapter, theta, folder, subject.base, subject.revision)
    write_decision(predictor, folder)
    spec = predictor.spec
    spec["base"] = {
        "name": subject.base,
        "revision": subject.revision,
        "digest": checkpoint_digest(subject.folder),
    }
    spec["versions"] = versions()
    spec["report"] = predictor.report
    spec["canary"] = canary(predictor)
    spec["adapter_digest"] = digest(folder / ADAPTER[0])
    spec["probe_digest"] = digest(folder / PROBE)
    text = json.dumps(finite(spec), indent=1, ensure_ascii=False)
    write_text(folder / SPEC, text + "\n")


def digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@torch.no_grad()
def canary(predictor: "Predictor", kept: dict | None = None) -> dict:
    """A test prompt's likeliest next tokens (or those of `kept`); log-probabilities with and without the adapter."""
    subject = predictor.subject
    prompt = predictor.as_turn(predictor.spec["example"])
    measured: dict = {"dtype": subject.dtype}
    if predictor.spec["chat"]:
        # a template may write today's date, so the kept prompt is used again
        prompt = Rendered((kept or {}).get("prompt", prompt))
        measured["prompt"] = str(prompt)
    ids = subject.tokenizer.encode(prompt)
    subject.check_room(prompt, len(ids), "fit the adapter again")
    for name, with_adapter in (("base", False), ("adapted", True)):
        with predictor.student(with_adapter) as student:
            batch = torch.tensor([ids], device=device_of(subject.model))
            logits = student(batch)[0, -1].float().cpu().log_softmax(-1)
        tokens = kept[name]["tokens"] if kept else logits.topk(CANARY_TOKENS).indices.tolist()
        in_vocabulary = [token for token in tokens if 0 <= token < len(logits)]
        measured[name] = {"tokens": tokens, "log_probabilities": logits[in_vocabulary].tolist()}
    return measured


def check_canary(predictor: "Predictor", folder: Path) -> None:
    """Compare a test prompt's probabilities with the saved ones. UsageError for another base or a damaged adapter."""
    spec = predictor.spec
    kept = spec["canary"]
    now = canary(predictor, kept)
    about = f"fitted on {spec['base']['name']}, loaded on {predictor.subject.base}"
    tolerance = max(TOLERANCE.get(result["dtype"], 0) for result in (kept, now))
    other = f"the base model is not the one it was fitted on ({about})"
    for name, blame in {"base": other, "adapted": "the adapter is damaged"}.items():
        then = kept[name]["log_probabilities"]
        again = now[name]["log_probabilities"]
        # `not … <=` in place of `>`: a difference of NaN is a fault, too
        if len(then) != len(again) or not np.abs(np.subtract(then, again)).mean() <= tolerance:
            raise UsageError(f"{folder}: {blame}: its test prompt gives other probabilities")


def check_digests(spec: dict, folder: Path) -> None:
    """Raises UsageError if the adapter or the probe is not the file that was saved."""
    for what, name in {"adapter": ADAPTER[0], "probe": PROBE}.items():
        if spec.get(f"{what}_digest") != digest(folder / name):
            damage = f"{name} is not the file that was saved"
            raise UsageError(f"{folder}: the {what} is damaged: {damage}")


def ships_adapter(folder: Path, kept: dict | None) -> bool:
    """Whether an adapter belongs to what is described by `kept` (None: any folder of peft). Raises UsageError."""
    if kept is None or kept["adapter_digest"] is not None:
        return True
    for name in (*ADAPTER, "config.json"):  # the latter of full fine-tuning, which 0.3.0 had
        if (folder / name).exists():
            beside = f"its {SPEC} says that the base model answers, but {name} lies beside it"
            raise UsageError(f"{folder}: {beside}; move one of the two into a folder of its own")
    return False


def read_weights(
    folder: Path, kept: dict | None, subject: Subject
) -> tuple[Adapter | None, torch.Tensor | None]:
    """The adapter in a folder and its weights [1, M]; None twice where what is described by `kept` ships none.

    Raises UsageError, also for a base into which this very adapter has been merged: it would count twice.
    """
    if not ships_adapter(folder, kept):
        return None, None
    adapter, theta = read_adapter(folder, subject.model)
    if kept is None:
        compare_base(folder, subject)
    marker = subject.folder / MERGED
    if is_there(marker) and read_json(marker).get("adapter_digest") == weights_digest(theta):
        base = f"{subject.base} holds this adapter already, merged"
        raise UsageError(f"{folder}: {base}; give as --model what it was trained on")
    return adapter, theta


def compare_base(folder: Path, subject: Subject) -> None:
    """Warns where an adapter of peft names another model of the hub than its base, and does `compare_tokens`."""
    named = read_config(folder).get("base_model_name_or_path")
    from_hub = subject.revision is not None
    if from_hub and isinstance(named, str) and named.lower() != subject.base.lower():
        told = f"{folder}: names {named[:200]!r} as its base and is used on {subject.base}"
        warnings.warn(told, stacklevel=4)
    if is_there(folder / "tokenizer.json"):
        compare_tokens(folder, subject)


def compare_tokens(folder: Path, subject: Subject) -> None:
    """Raises UsageError if an adapter's own tokenizer gives tokens other ids than its base's; warns of further tokens.

    Rows are read by the base's. Training often adds a padding token, which no row needs.
    """
    ours = subject.tokenizer.backend.get_vocab()
    theirs = read_tokenizer(folder).get_vocab()
    moved = [token for token, number in ours.items() if theirs.get(token) != number]
    if moved:
        other = f"its tokenizer.json is another than that of {subject.base} (token {min(moved)!r})"
        mend = "give as --model a checkpoint with this tokenizer, or move the file elsewhere"
        raise UsageError(f"{folder}: {other}; {mend}")
    further = sorted(theirs.keys() - ours.keys())
    if further:
        named = ", ".join(map(repr, further[:3]))
        lacking = f"tokens that the base lacks, read as plain text: {named}"
        warnings.warn(f"{folder}: its tokenizer.json has {lacking}", stacklevel=4)


def weights_digest(theta: torch.Tensor) -> str:
    return hashlib.sha256(theta.cpu().numpy().tobytes()).hexdigest()


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base that a saved adapter names, and its commit on the hub. Raises UsageError."""
    kept = read_spec(folder)
    if kept:
        return kept["base"]["name"], kept["base"]["revision"]
    config = read_config(folder)
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            wrong = f"{key} = {repr(config[key])[:80]} is not a text"
            raise UsageError(f"{folder / ADAPTER[1]}: {wrong}; give --model")
    name = config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{folder}: names no base model; give --model")
    return name, config.get("revision")


def what_answers(predictor: "Predictor") -> str:
    """For a folder without an adapter: what answers its rows, and what to do instead."""
    base = predictor.subject.base
    method = predictor.spec["method"]
    if method == "icl":
        return f"what answers is {base} with demonstrations in its prompt; use `ia2mini predict`"
    if method == "probe":
        return f"what answers is a linear probe on {base}; use `ia2mini predict`"
    return f"what answers is {base} as it is, a whole model; use --model {base}"


@torch.no_grad()
def merge(predictor: "Predictor", out: Path) -> float:
    """Write a checkpoint with the adapter in its matrices; the largest difference of a logit on a prompt.

    Raises UsageError for a folder `out` that holds anything but this same merge.
    """
    subject = predictor.subject
    if predictor.adapter is None:
        raise UsageError(f"there is no adapter to merge; {what_answers(predictor)}")
    weights = weights_digest(predictor.theta)
    sources = {"base": subject.base, "adapter_digest": weights, "dtype": subject.dtype}
    claim(out, sources)
    save_merged(subject.model, predictor.adapter, predictor.theta[0], out, subject.tokenizer)
    for name in CHECKPOINT_FILES:
        if (subject.folder / name).is_file():
            write(out / name, partial(shutil.copyfile, subject.folder / name))
    if not (subject.folder / "tokenizer_config.json").is_file():
        # from tokenizer.json alone transformers may guess another class
        write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_decision(predictor, out)
    device = device_of(subject.model)
    prompt = predictor.as_turn(predictor.spec.get("example", "Once upon a time"))
    ids = torch.tensor([subject.tokenizer.encode(prompt)], device=device)
    merged, _ = load(out, next(subject.model.parameters()).dtype, str(device))
    with predictor.student() as student:
        return (merged(ids) - student(ids)).abs().max().item()
