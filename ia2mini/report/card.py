"""The model card of what `fit` ships, with the code that loads and serves it elsewhere."""

import math
import re
import shlex
from pathlib import Path

from ..adapters import LoRA
from ..files import json_line, plain, plural
from ..fitting.measures import confidence_threshold
from ..fitting.predictor import Predictor
from ..fitting.serving import why_not
from ..tasks.rows import blank_of, placeholders
from .page import loading_code
from .tables import markdown

GGUF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
COVERAGES = (0.95, 0.9, 0.8, 0.5)
CARD = """---
library_name: {library}
{hub}tags: [ia2mini, {method}]
---

# {name}

{sentence}

Fitted by [ia2mini](https://arxiv.org/abs/2509.22621) {version}: {command}. Template, labels, temperature and held-out
numbers are in `ia2mini.json`, every held-out row in `held_out.jsonl`, the report in `report.html`.

The prompt is {template}{turn}; {follows}.{demonstrations}

```
ia2mini predict {folder} NEW_ROWS
```

{code}
"""


def card(predictor: Predictor, folder: Path, command: str) -> str:
    """The model card."""
    spec = predictor.spec
    report = predictor.report
    template = spec["template"]
    follows = "the answer follows it at once"
    if blank_of(template):
        template = template.rstrip(" ")
        follows = "the answer follows with a blank before it"
    shown = len(predictor.demonstrations())
    demonstrations = ""
    if shown:
        before = f"Before it stand {plural(shown, 'demonstration')}, with blank lines between"
        demonstrations = f" {before}; `ia2mini.json` has them."
    return CARD.format(
        library="peft" if predictor.adapter else "transformers",
        hub=f"base_model: {predictor.subject.base}\n" if predictor.subject.revision else "",
        method=spec["method"],
        name=markdown(report["name"]),
        sentence=markdown(report["sentence"]),
        version=spec["versions"]["ia2mini"],
        command=inline_code(command),
        template=inline_code(repr(template)),
        turn=", a turn of the chat template" if spec["chat"] else "",
        follows=follows,
        demonstrations=demonstrations,
        folder=plain(shlex.quote(str(folder)), ""),
        code="\n\n".join(usage(predictor, str(folder))),
    )


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
    """A block of code, its fence longer than any row of backticks in the text."""
    fence = "`" * max(3, 1 + longest_row(text))
    return f"{fence}{language}\n{plain(text)}\n{fence}"


def usage(predictor: Predictor, folder: str) -> list[str]:
    """Paragraphs with the code that loads and serves the shipped model with other tools."""
    subject = predictor.subject
    source = repr(subject.base)
    if subject.revision:
        source += f", revision={subject.revision!r}"
    loaded = loading_code(
        source, folder if predictor.adapter else None, f", dtype={subject.dtype!r}"
    )
    if predictor.probe is not None:
        loaded += probing(predictor, folder)
    parts = [fenced(loaded, "python"), "## Serve it"]
    refused = why_not(predictor)
    if refused:
        cannot = "The decision pipeline of transformers cannot give these answers"
        parts.append(f"{cannot}: {inline_code(refused)}. `ia2mini predict` does.")
    else:
        parts += decisions(predictor, folder)
    if subject.base == "tiny":
        return parts
    if isinstance(predictor.adapter, LoRA):
        parts.append(vllm(predictor, predictor.adapter.rank, folder))
    if predictor.adapter:
        parts += llama_cpp(subject.dtype, folder)
    return parts


def probing(predictor: Predictor, folder: str) -> str:
    """Python that answers by a probe, after the model is loaded."""
    example = predictor.spec["example"]
    return f"""
from safetensors.torch import load_file

probe = load_file({folder + "/probe.safetensors"!r})
prompt = tokenizer({example!r}, return_tensors="pt")
state = model.model(**prompt).last_hidden_state[0, -1].float()
scores = probe["weight"] @ state + probe["bias"]
shares = (scores.log_softmax(-1) / {predictor.spec["temperature"]}).softmax(-1)
dict(zip({predictor.spec["labels"]!r}, shares.tolist()))"""


def decisions(predictor: Predictor, folder: str) -> list[str]:
    """Serving with transformers: the pipeline, HTTP, and thresholds of confidence."""
    row = dict.fromkeys(placeholders(predictor.spec["template"]), "A text")
    question = {"type": "choice", "criteria": dict.fromkeys(predictor.written_labels())}
    pipeline = f"""\
decide = transformers.pipeline(
    "decision", model=model, tokenizer=tokenizer, decision_config={folder!r}
)
question = {question!r}
answers = decide({{"state": {row!r}, "questions": {{"label": question}}}})
answers["label"]["probabilities"]"""
    parts = [
        "By transformers 5.24 or newer, with the probabilities of `ia2mini predict`, after the lines above:",
        fenced(pipeline, "python"),
        "Without `decision_config` it asks a question of its own, not the one that was fitted. A `state` is a row,\n"
        "its columns by name. The labels are given in this order. Instructions and descriptions are not read.",
    ]
    parts += over_http(predictor, folder, {"state": row, "questions": {"label": question}})
    enough = thresholds(predictor.spec["confidences"])
    if enough:
        parts.append(
            "`ia2mini predict --coverage` gives no answer where the largest probability is below a threshold. To do\n"
            f"so elsewhere, answer from these on: {enough}.\n"
            "Compare them with the largest of `probabilities`, not with the pipeline's rescaled `confidence`."
        )
    return parts


def over_http(predictor: Predictor, folder: str, body: dict) -> list[str]:
    """`transformers serve` with a merged adapter, or with the base and the files of `fit`."""
    model = predictor.subject.base
    if predictor.adapter:
        model = f"{folder}-merged"
        serving = f"{merging(folder)}\ntransformers serve {shlex.quote(model)}"
    elif model == "tiny":
        return []
    else:
        if predictor.subject.revision:
            model += f"@{predictor.subject.revision}"
        config = shlex.quote(f"{folder}/decision.json")
        how = f"--dtype {predictor.subject.dtype} --decision-config {config}"
        serving = f"transformers serve {shlex.quote(model)} {how}"
    request = shlex.quote(json_line({"model": model, **body}))
    header = "-H 'Content-Type: application/json'"
    return [
        "Over HTTP (`pip install 'transformers[serving]'`), and a request to it:",
        fenced(serving),
        fenced(f"curl localhost:8000/v1/systemone {header} -d {request}"),
    ]


def merging(folder: str) -> str:
    return f"ia2mini merge {shlex.quote(folder)} --out {shlex.quote(folder + '-merged')}"


def thresholds(confidences: list[float]) -> str:
    """The confidence at which `predict --coverage` begins to answer, for some shares; rounded down."""
    said = []
    for coverage in COVERAGES if confidences else ():
        least = confidence_threshold(confidences, coverage)
        if least > 0:
            said.append(f"{math.floor(1e6 * least) / 1e6:.6f} (coverage {coverage:g})")
    return ", ".join(said)


def vllm(predictor: Predictor, rank: int, folder: str) -> str:
    """Serving with vLLM, which reads LoRA only."""
    command = f"vllm serve {shlex.quote(predictor.subject.base)}"
    if predictor.subject.revision:
        command += f" --revision {predictor.subject.revision}"
    command += " --enable-lora"
    if rank > 16:
        command += f" --max-lora-rank {1 << (rank - 1).bit_length()}"
    command += f" --lora-modules {shlex.quote(predictor.report['name'] + '=' + folder)}"
    return f"vLLM, which generates the answer as text: {inline_code(command)}"


def llama_cpp(dtype: str, folder: str) -> list[str]:
    """llama.cpp reads a merged checkpoint after conversion."""
    merged = shlex.quote(f"{folder}-merged")
    file = shlex.quote(f"{folder}-merged/model.gguf")
    commands = f"""\
{merging(folder)}
python convert_hf_to_gguf.py {merged} --outfile {file} --outtype {GGUF[dtype]}
llama-server -m {file}"""
    return ["llama.cpp, likewise, from its own folder:", fenced(commands)]
