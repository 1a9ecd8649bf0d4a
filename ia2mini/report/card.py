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
NO_DECISION = "The decision pipeline of transformers cannot give these answers:"
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

{code}"""


def card(predictor: Predictor, folder: Path, command: str) -> str:
    """The model card."""
    spec = predictor.spec
    report = predictor.report
    base = predictor.subject.base
    has_adapter = predictor.adapter is not None
    template = spec["template"]
    follows = "the answer follows it at once"
    if blank_of(template):
        template = template.rstrip(" ")
        follows = "the answer follows with a blank before it"
    return CARD.format(
        library="peft" if has_adapter else "transformers",
        hub=f"base_model: {base}\n" if predictor.subject.revision else "",
        method=spec["method"],
        name=markdown(report["name"]),
        sentence=markdown(report["sentence"]),
        version=spec["versions"]["ia2mini"],
        command=inline_code(command),
        template=inline_code(repr(template)),
        turn=", a turn of the chat template" if spec["chat"] else "",
        follows=follows,
        demonstrations=demonstrations(predictor),
        folder=plain(shlex.quote(str(folder)), ""),
        code=usage_section(predictor, str(folder), has_adapter),
    )


def demonstrations(predictor: Predictor) -> str:
    """The demonstrations before every prompt, if they were shipped."""
    number = len(predictor.demonstrations())
    if not number:
        return ""
    return f" Before it stand {plural(number, 'demonstration')}, with blank lines between; `ia2mini.json` has them."


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


def usage_section(predictor: Predictor, folder: str, has_adapter: bool) -> str:
    """Code that loads and serves the shipped model with other tools."""
    base = predictor.subject.base
    source = repr(base)
    if predictor.subject.revision:
        source += f", revision={predictor.subject.revision!r}"
    dtype = f", dtype={predictor.subject.dtype!r}"
    loaded = loading_code(source, folder if has_adapter else None, dtype)
    refused = why_not(predictor)
    if predictor.probe is not None:
        loaded += probing(predictor, folder)
    lines = [*fenced(loaded, "python"), ""]
    if refused:
        lines += [
            "## Serve it",
            "",
            f"{NO_DECISION} {inline_code(refused)}. `ia2mini predict` does.",
            "",
        ]
    else:
        lines += decisions(predictor, folder)
    lines += vllm(predictor, folder)
    if has_adapter and base != "tiny":
        lines += llama_cpp(predictor, folder)
    return "\n".join(lines)


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


def fenced(text: str, language: str = "") -> list[str]:
    """A block of code, its fence longer than any row of backticks in the text."""
    fence = "`" * max(3, 1 + longest_row(text))
    return [fence + language, plain(text), fence]


def decisions(predictor: Predictor, folder: str) -> list[str]:
    """Serving with transformers: the pipeline, HTTP, and thresholds of confidence."""
    spec = predictor.spec
    row = dict.fromkeys(placeholders(spec["template"]), "A text")
    question = {"type": "choice", "criteria": dict.fromkeys(predictor.written_labels())}
    pipeline = f"""\
decide = transformers.pipeline(
    "decision", model=model, tokenizer=tokenizer, decision_config={folder!r}
)
question = {question!r}
answers = decide({{"state": {row!r}, "questions": {{"label": question}}}})
answers["label"]["probabilities"]"""
    lines = [
        "## Serve it",
        "",
        "By transformers 5.24 or newer, with the probabilities of `ia2mini predict`, after the lines above:",
        "",
        *fenced(pipeline, "python"),
        "",
        "Without `decision_config` it asks a question of its own, not the one that was fitted. A `state` is a row, its",
        "columns by name. The labels are given in this order. Instructions and descriptions are not read.",
        "",
    ]
    lines += over_http(predictor, folder, {"state": row, "questions": {"label": question}})
    enough = thresholds(predictor)
    if enough:
        lines += [
            "`ia2mini predict --coverage` gives no answer where the largest probability is below a threshold. To do so",
            f"elsewhere, answer from these on: {enough}.",
            "Compare them with the largest of `probabilities`, not with the pipeline's rescaled `confidence`.",
            "",
        ]
    return lines


def over_http(predictor: Predictor, folder: str, body: dict) -> list[str]:
    """`transformers serve` with a merged adapter, or with the base and the files of `fit`."""
    base = predictor.subject.base
    revision = predictor.subject.revision
    if predictor.adapter is not None:
        model = f"{folder}-merged"
        commands = [merging(folder), f"transformers serve {shlex.quote(model)}"]
    elif base == "tiny":
        return []
    else:
        model = f"{base}@{revision}" if revision else base
        config = shlex.quote(f"{folder}/decision.json")
        how = f"--dtype {predictor.subject.dtype} --decision-config {config}"
        commands = [f"transformers serve {shlex.quote(model)} {how}"]
    request = json_line({"model": model, **body})
    header = "-H 'Content-Type: application/json'"
    ask = f"curl localhost:8000/v1/systemone {header} -d {shlex.quote(request)}"
    return [
        "Over HTTP (`pip install 'transformers[serving]'`), and a request to it:",
        "",
        *fenced("\n".join(commands)),
        "",
        *fenced(ask),
        "",
    ]


def merging(folder: str) -> str:
    return f"ia2mini merge {shlex.quote(folder)} --out {shlex.quote(folder + '-merged')}"


def thresholds(predictor: Predictor) -> str:
    """The confidence at which `predict --coverage` begins to answer, for some shares; rounded down."""
    if not predictor.spec["confidences"]:
        return ""
    said = []
    for coverage in COVERAGES:
        least = confidence_threshold(predictor.spec["confidences"], coverage)
        if least > 0:
            said.append(f"{math.floor(1e6 * least) / 1e6:.6f} (coverage {coverage:g})")
    return ", ".join(said)


def vllm(predictor: Predictor, folder: str) -> list[str]:
    """Serving with vLLM, which reads LoRA only."""
    adapter = predictor.adapter
    base = predictor.subject.base
    revision = predictor.subject.revision
    if not isinstance(adapter, LoRA) or base == "tiny":
        return []
    at = f" --revision {revision}" if revision else ""
    rank = ""
    if adapter.rank > 16:
        rank = f" --max-lora-rank {1 << (adapter.rank - 1).bit_length()}"
    modules = f"--lora-modules {shlex.quote(predictor.report['name'] + '=' + folder)}"
    command = f"vllm serve {shlex.quote(base)}{at} --enable-lora{rank} {modules}"
    return ["vLLM, which generates the answer as text: " + inline_code(command), ""]


def llama_cpp(predictor: Predictor, folder: str) -> list[str]:
    """llama.cpp reads a merged checkpoint after conversion."""
    merged = f"{folder}-merged"
    form = GGUF[predictor.subject.dtype]
    file = shlex.quote(f"{merged}/model.gguf")
    commands = [
        merging(folder),
        f"python convert_hf_to_gguf.py {shlex.quote(merged)} --outfile {file} --outtype {form}",
        f"llama-server -m {file}",
    ]
    return ["llama.cpp, likewise, from its own folder:", "", *fenced("\n".join(commands)), ""]
