"""The model card of what `fit` ships: the values of card.md.jinja, which has its text and its code for other tools."""

import math
import re
import shlex
from pathlib import Path

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..adapters import LoRA
from ..files import json_line, plain, plural
from ..fitting.measures import confidence_threshold
from ..fitting.predictor import Predictor
from ..fitting.serving import why_not
from ..tasks.rows import blank_of, placeholders
from .page import loading_code
from .tables import markdown

TEMPLATE = Path(__file__).parent / "card.md.jinja"
GGUF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
COVERAGES = (0.95, 0.9, 0.8, 0.5)


def card(predictor: Predictor, folder: Path, command: str) -> str:
    """The model card. What strangers may have written goes in as values, and is no template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters["markdown"] = markdown
    environment.filters["code"] = inline_code
    environment.filters["fenced"] = fenced
    environment.filters["plain"] = lambda text: plain(text, "")
    environment.filters["quote"] = shlex.quote
    environment.filters["repr"] = repr
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(command=command, **values(predictor, str(folder)))


def values(predictor: Predictor, folder: str) -> dict:
    """What the template is filled with."""
    spec = predictor.spec
    subject = predictor.subject
    adapter = predictor.adapter
    merged = f"{folder}-merged"
    source = repr(subject.base)
    served = subject.base
    if subject.revision:
        source += f", revision={subject.revision!r}"
        served += f"@{subject.revision}"
    if adapter:
        served = merged
    loading = loading_code(source, folder if adapter else None, f", dtype={subject.dtype!r}")
    blank = blank_of(spec["template"])
    shown = len(predictor.demonstrations())
    state = dict.fromkeys(placeholders(spec["template"]), "A text")
    question = {"type": "choice", "criteria": dict.fromkeys(predictor.written_labels())}
    rank = adapter.rank if isinstance(adapter, LoRA) else 0
    return {
        "adapter": adapter is not None,
        "base": subject.base,
        "blank": blank,
        "demonstrations": plural(shown, "demonstration") if shown else "",
        "dtype": subject.dtype,
        "folder": folder,
        "gguf": GGUF[subject.dtype],
        "loading": loading,
        "max_rank": 1 << (rank - 1).bit_length() if rank else 0,  # vLLM takes powers of two
        "merge": f"ia2mini merge {shlex.quote(folder)} --out {shlex.quote(merged)}",
        "merged": merged,
        "name": predictor.report["name"],
        "probe": predictor.probe is not None,
        "question": question,
        "rank": rank,  # of LoRA, else 0
        "refused": why_not(predictor),
        "request": json_line({"model": served, "state": state, "questions": {"label": question}}),
        "revision": subject.revision,
        "sentence": predictor.report["sentence"],
        "served": served,
        "spec": spec,
        "state": state,
        "template": spec["template"].rstrip(" ") if blank else spec["template"],
        "thresholds": thresholds(spec["confidences"]),
    }


def longest_row(text: str) -> int:
    """The length of the longest row of backticks in a text."""
    return max(map(len, re.findall("`+", text)), default=0)


def inline_code(text: str) -> str:
    """A text as Markdown code, in more backticks than it has in a row."""
    fence = "`" * (1 + longest_row(text))
    inside = plain(text, "")
    if "`" in text:
        inside = f" {inside} "
    return f"{fence}{inside}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Lines as a block of code, its fence longer than any row of backticks in them."""
    fence = "`" * max(3, 1 + longest_row(text))
    return f"{fence}{language}\n{plain(text)}{fence}"


def thresholds(confidences: list[float]) -> str:
    """The confidence at which `predict --coverage` begins to answer, for some shares; rounded down."""
    said = []
    for coverage in COVERAGES if confidences else ():
        least = confidence_threshold(confidences, coverage)
        if least > 0:
            said.append(f"{math.floor(1e6 * least) / 1e6:.6f} (coverage {coverage:g})")
    return ", ".join(said)
