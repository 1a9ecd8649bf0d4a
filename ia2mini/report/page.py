"""A study as one HTML page that needs no other file: outcome, figures, tasks, the adapter to take, how it was made."""

import html
import json
from base64 import b64encode
from datetime import date
from pathlib import Path

from ..engine.options import LABELS, UNTRAINED
from ..files import count
from .figures import CAPTIONS, views
from .summary import average, paired, parts, title, verdict
from .tables import HEADS, known_columns, legend, seconds_line, texts

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; line-height: 1.3 } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem }
small, figcaption, table { font-size: .875rem } code, pre { font-size: .8125rem }
pre { white-space: pre-wrap; padding: .7rem; border: 1px solid #8886 } .box { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; white-space: nowrap }
caption { text-align: left; white-space: normal; font-weight: 600; max-width: calc(100vw - 2rem) }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #8884; vertical-align: top }
th:first-child, .text *, .evaluations :nth-child(2) { text-align: left } tbody th { font-weight: normal }
.text tbody * { white-space: pre-wrap; min-width: 3.5rem } .text tbody th { min-width: 13rem; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figure .box { background: white; border: 1px solid #8884; padding: .5rem }
img { display: block; max-width: max(100%, 34rem); height: auto; margin: auto } summary { font-weight: 600 }
@media (max-width: 30rem) { table { font-size: .8rem } th, td { padding: .2rem .3rem } }
"""


def write_page(document: dict, folder: Path, command: str) -> str:
    """The page as HTML, with the figures that are in `folder`."""
    drawn, found = list(views(document)), parts(document)
    about, (head, *more) = (
        drawn[0]["parts"][-1]["title"],
        verdict(drawn[0]["cells"]) or ["Comparison of methods"],
    )
    several = len(found) > 1
    results = [
        measures(p["title"], average(p["cells"]), document) + lines(verdict(p["cells"]) * several)
        for p in found
    ]
    results.append(f"<small>{lines(legend(document))}</small>")
    tasks = dict.fromkeys(cell["task"] for cell in document["cells"])
    body = [section("Results", results)]
    body.append(
        section("Figures", [figure(name, view, folder) for view in drawn for name in CAPTIONS])
    )
    body.append(section("Tasks", [task(name, document) for name in tasks]))
    body.append(section("Which adapter to take", adapter(document, drawn[0]["cells"], folder)))
    versions = ", ".join(
        f"{name} {version}" for name, version in document.get("versions", {}).items()
    )
    made = [f"<pre>{shown(command)}</pre>" * bool(command)]
    made.append(lines([f"Written on {date.today()}; {versions}.", seconds_line(document)]))
    config = shown(json.dumps(document["config"], indent=2, ensure_ascii=False))
    made.append(f"<details><summary>Configuration</summary><pre>{config}</pre></details>")
    body.append(section("How this was made", made))
    return whole(about, head, lines([*more, about]), body)


def whole(title: str, head: str, about: str, sections: list[str]) -> str:
    """A page that needs no other file, from its headline, what stands below it as HTML, and its sections."""
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    start = f'<!doctype html><html lang="en"><head>{meta}<title>{shown(title)}</title><style>{STYLE}</style></head>'
    top = f"{start}<body><header><h1>{shown(head)}</h1>{about}</header><main>"
    return "\n".join([top, *sections, "</main></body></html>\n"])


def shown(text) -> str:
    r"""Text for HTML: markup escaped, control characters and whatever else has no face made visible (\x1b)."""
    text = "–" if text is None else str(text)
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))


def lines(texts: list[str]) -> str:
    return "".join(f"<p>{shown(text)}</p>" for text in texts)


def section(heading: str, body: list[str]) -> str:
    return f"<section><h2>{heading}</h2>{''.join(body)}</section>" if any(body) else ""


def table(caption: str, heads: list[str], rows: list[list[str]], kind: str) -> str:
    """A table that scrolls in its own box; the first entry of a row is its heading."""
    top = "".join(f'<th scope="col">{shown(head)}</th>' for head in heads)
    entries = ["".join(f"<td>{shown(text)}</td>" for text in row[1:]) for row in rows]
    body = "".join(
        f'<tr><th scope="row">{shown(row[0])}</th>{rest}</tr>' for row, rest in zip(rows, entries)
    )
    start = f'<div class="box" role="region" tabindex="0" aria-label="{shown(caption)}"><table class="{kind}">'
    inside = (
        f"<caption>{shown(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    )
    return f"{start}{inside}</table></div>"


def measures(caption: str, rows: list[dict], document: dict) -> str:
    """The terminal's columns: of the cells of evaluations, or of their means."""
    columns = known_columns(rows, document)
    heads = ["method", *map(HEADS.get, columns)]
    if not rows or "eval" not in rows[0]:
        return table(caption, heads, [texts(row, columns) for row in rows], "means") if rows else ""
    body = [[row["eval"] + "*" * row["ood"], *texts(row, columns)] for row in rows]
    return table(caption, ["evaluated on", *heads], body, "evaluations")


def figure(name: str, view: dict, folder: Path) -> str:
    """A figure inlined with its caption, as PNG or else as SVG; nothing where it was not drawn."""
    for form, kind in (("png", "png"), ("svg", "svg+xml")):
        if (path := folder / f"{name}{view['suffix']}.{form}").is_file():
            data = path.read_bytes()
            # half its pixels: sharp
            width = f'width="{int.from_bytes(data[16:20], "big") // 2}"' * (form == "png")
            source = f'src="data:image/{kind};base64,{b64encode(data).decode()}"'
            image = f'<img alt="{name}: {shown(view["title"])}" {width} {source}>'
            return f'<figure><div class="box">{image}</div><figcaption>{CAPTIONS[name]}</figcaption></figure>'
    return ""


def task(name: str, document: dict) -> str:
    """One task, folded: its evaluations, one whole prompt at the largest N, right and wrong answers."""
    body = []
    for part in parts(document):
        mine = sorted(
            (c for c in part["cells"] if c["task"] == name), key=lambda c: (c["ood"], c["eval"])
        )
        body += [measures(title(mine, part["by"]), mine, document)] if mine else []
    samples = [sample for sample in document.get("samples") or [] if sample["task"] == name]
    for sample in sorted(samples, key=lambda sample: sample["n"])[-1:]:
        body.append(
            f"<h3>What the model saw, N = {sample['n']}</h3><pre>{shown(sample['prompt'])}</pre>"
        )
        body += [answers(sample, right) for right in (True, False) if sample["rows"]]
    return f"<details><summary>{shown(name)}</summary>{''.join(body)}</details>"


def answers(sample: dict, right: bool) -> str:
    """A table of the sample's right or wrong rows: what was asked, what it should be, what was said, how sure."""
    rows = [row for row in sample["rows"] if row["right"] == right]
    fields = ["prompt", "answer", "said"] + ["confidence"] * any(
        row["confidence"] is not None for row in rows
    )
    body = [
        [f"{v:.2f}" if isinstance(v, float) else v for v in map(row.get, fields)] for row in rows
    ]
    who = f"{LABELS.get(sample['method'], sample['method'])}, set {sample['set']}"
    caption = f"{who}: {count(len(rows), 'row')} that it got {'right' if right else 'wrong'}"
    return table(caption, fields, body, "text") if rows else lines([caption])


def adapter(document: dict, cells: list[dict], folder: Path) -> list[str]:
    """Adapters to take, and how: IA2→SFT's, SFT's where it is surely better, else those of the most accurate method."""
    means = {
        row["method"]: row["acc_mean"] for row in average(cells) if row["method"] not in UNTRAINED
    }
    method = "ia2-sft" if "ia2-sft" in means else max(means, key=means.get, default=None)
    gain = paired(cells, "acc")
    if gain and gain.mean < 0 and gain.p < 0.05:
        method = "sft"
    names = {}  # of each adapter the study that it is of, where several are joined
    for cell in cells:
        name = f"adapters/{cell['task']}-n{cell['n']}-{method}-set0"
        if "study" in cell:
            name = f"{cell['study']}/{name}"
        if cell["method"] == method and name in document.get("adapters", []):
            names[name] = cell.get("study")
    if not names:
        return []
    items = "".join(f"<li><code>{shown(name)}</code></li>" for name in names)
    about = f"{LABELS.get(method, method)}, trained on the first set of N = {cells[0]['n']}:"
    first, study = next(iter(names.items()))
    config = document["studies"][study] if study else document["config"]
    code = loading(repr(config["model"]), first if study else str(folder / first))
    return [lines([about]), f"<ul>{items}</ul><pre>{shown(code)}</pre>"]


def loading(source: str, adapter: str | None = None, dtype: str = "") -> str:
    """Python that loads a checkpoint by transformers, and the folder `adapter` onto it by peft."""
    code = ["import peft, transformers" if adapter else "import transformers", ""]
    if source == repr("tiny"):
        code.insert(1, "from ia2mini.models.checkpoint import TINY")
        source = "TINY"
    code.append(f"tokenizer = transformers.AutoTokenizer.from_pretrained({source})")
    code.append(f"model = transformers.AutoModelForCausalLM.from_pretrained({source}{dtype})")
    return "\n".join(
        code + [f"model = peft.PeftModel.from_pretrained(model, {adapter!r})"] * bool(adapter)
    )
