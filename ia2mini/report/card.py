"""The model card of what `fit` ships, with the code that loads it elsewhere."""

import re
import shlex
from pathlib import Path

from ..adapters import LoRA
from ..files import plain
from .page import loading
from .tables import markdown

CARD = """---
library_name: {library}
{hub}tags: [ia2mini, {method}]
---

# {name}

{sentence}

Fitted by [ia2mini](https://arxiv.org/abs/2509.22621) {version}: {command}. Template, labels, temperature and held-out
numbers are in `ia2mini.json`, every held-out row in `held_out.jsonl`, the report in `report.html`.

The prompt is {template}{turn}; the answer follows it at once.

```
ia2mini predict {folder} NEW_ROWS
```

{code}"""


def card(fitted, folder: Path, command: str) -> str:
    """The model card."""
    spec, report, subject = fitted.spec, fitted.report, fitted.subject
    peft = fitted.adapter is not None
    text = {
        "library": "peft" if peft else "transformers",
        "method": spec["method"],
        "name": markdown(report["name"]),
    }
    text |= {
        "hub": f"base_model: {subject.base}\n" if subject.revision else "",
        "sentence": markdown(report["sentence"]),
    }
    text |= {
        "version": spec["versions"]["ia2mini"],
        "command": span(command),
        "template": span(repr(spec["template"])),
    }
    text |= {
        "turn": ", a turn of the chat template" if spec["chat"] else "",
        "code": code(fitted, str(folder), peft),
    }
    return CARD.format(**text, folder=plain(shlex.quote(str(folder)), ""))


def span(text: str) -> str:
    """A text in Markdown's backticks, more of them than it holds in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return (
        f"{fence} {plain(text, '')} {fence}" if "`" in text else f"{fence}{plain(text, '')}{fence}"
    )


def code(fitted, folder: str, peft: bool) -> str:
    """How others load what was shipped: transformers, after it peft, and vLLM, which takes LoRA alone."""
    adapter, base, revision = fitted.adapter, fitted.subject.base, fitted.subject.revision
    source = repr(base) + f", revision={revision!r}" * bool(revision)
    # it was fitted, and is right, in
    dtype = str(next(fitted.subject.model.parameters()).dtype).removeprefix("torch.")
    lines = [
        "```python",
        loading(source, folder if peft else None, f", dtype={dtype!r}"),
        "```",
        "",
    ]
    if isinstance(adapter, LoRA) and base != "tiny":
        at = f" --revision {revision}" if revision else ""
        rank = (
            f" --max-lora-rank {1 << (adapter.rank - 1).bit_length()}" if adapter.rank > 16 else ""
        )
        modules = f"--lora-modules {shlex.quote(fitted.report['name'] + '=' + folder)}"
        lines += [
            "vLLM: " + span(f"vllm serve {shlex.quote(base)}{at} --enable-lora{rank} {modules}"),
            "",
        ]
    return "\n".join(lines)
