"""The report of a study: tables as files, figures, and one HTML page.

The page shows the verdict, a table and a figure; the rest is folded below them.
"""

import json
from datetime import date
from pathlib import Path

from ..engine.options import method_name
from ..files import plural, write_text
from .figures import FIGURES, alt_text, draw_figures
from .markup import details, escaped, figure, first_screen, html_page, lines, table, table_of
from .summary import average, best, parts, title, verdict, views
from .tables import evaluation_rows, legend, method_rows, seconds_line, write_table, write_tables

MIME = {"png": "png", "svg": "svg+xml"}  # the formats of figures that a page can show


def write_report(
    document: dict, folder: Path, command: str = "", formats: tuple[str, ...] = ("png",)
) -> list[str]:
    """Write tables (text, Markdown, LaTeX, CSV), figures in `formats` and report.html into `folder`; figures' names.

    No figures without matplotlib; without pandas only the text table and the page.
    """
    write_text(folder / "table.txt", write_table(document, full=True) + "\n")
    write_tables(document, folder)
    drawn = draw_figures(document, folder, formats)
    write_text(folder / "report.html", write_page(document, folder, command))
    return drawn


def write_page(document: dict, folder: Path, command: str) -> str:
    """The page as HTML, with the figures that are in `folder`."""
    drawn = list(views(document))
    first = drawn[0]["parts"][-1]
    figures = drawn_figures(drawn, folder)
    other_tables = []
    for part in parts(document):
        if part["title"] != first["title"]:
            other_tables.append(means_table(part, document) + lines(verdict(part["cells"])))
    tasks = list(dict.fromkeys(cell["task"] for cell in document["cells"]))
    outcome = verdict(first["cells"]) or [best(first["cells"])]
    body = [
        first_screen([means_table(first, document), *figures[:1]]),
        details("What the columns mean", [lines(legend(document))]),
        details("Other tables", other_tables),
        details("More figures", figures[1:]),
        details("Tasks", [task_section(name, document) for name in tasks]),
        details("How this was made", how_made_section(document, folder, command)),
    ]
    on = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    return html_page(f"Methods compared on {on}", lines(outcome), body)


def drawn_figures(drawn: list[dict], folder: Path) -> list[str]:
    """The figures that are in `folder`, as PNG or else as SVG, in the order of the page."""
    found = []
    for view in drawn:
        for name, about in FIGURES.items():
            paths = [folder / f"{name}{view['suffix']}.{form}" for form in MIME]
            there = [path for path in paths if path.is_file()]
            if there:
                kind = MIME[there[0].suffix[1:]]
                image = there[0].read_bytes()
                found.append(figure(image, kind, alt_text(name, view), about.caption))
    return found


def means_table(part: dict, document: dict) -> str:
    """The means of a part with the terminal's columns; nothing where no method has every evaluation."""
    rows = average(part["cells"])
    if not rows:
        return ""
    heads, *body = method_rows(rows, document)
    return table(part["title"], heads, body, "means")


def task_section(name: str, document: dict) -> str:
    """One task, folded: its evaluations, one whole prompt at the largest N, right and wrong answers."""
    body = []
    for part in parts(document):
        mine = [cell for cell in part["cells"] if cell["task"] == name]
        if mine:
            heads, *rows = [row[1:] for row in evaluation_rows(mine, document)]
            caption = title(mine, part["n"], part["by"])
            body.append(table(caption, heads, rows, "evaluations"))
    samples = [sample for sample in document.get("samples") or [] if sample["task"] == name]
    if samples:
        sample = max(samples, key=lambda sample: sample["n"])
        body.append(f"<h2>What the model saw, N = {sample['n']}</h2>")
        body.append(f"<pre>{escaped(sample['prompt'])}</pre>")
        if sample["rows"]:
            body += [sample_table(sample, right=True), sample_table(sample, right=False)]
    return details(name, body)


def sample_table(sample: dict, right: bool) -> str:
    """A table of the sample's right or wrong rows: prompt, true answer, given answer, confidence."""
    rows = [row for row in sample["rows"] if row["right"] == right]
    method = method_name(sample["method"])
    how = "right" if right else "wrong"
    caption = f"{method}, set {sample['set']}: {plural(len(rows), 'row')} that it got {how}"
    if not rows:
        return lines([caption])
    fields = ["prompt", "answer", "said"]
    if any(row["confidence"] is not None for row in rows):
        fields.append("confidence")
    return table_of(caption, rows, dict(zip(fields, fields)))


def how_made_section(document: dict, folder: Path, command: str) -> list[str]:
    """The command, versions, seconds and options of the study, and code that loads one of its adapters."""
    said = [f"{name} {version}" for name, version in document.get("versions", {}).items()]
    written = f"Written on {date.today()}; {', '.join(said)}."
    config = json.dumps(document["config"], indent=2, ensure_ascii=False)
    body = [lines([written, seconds_line(document)])]
    body.append(details("Configuration", [f"<pre>{escaped(config)}</pre>"]))
    if command:
        body.insert(0, f"<pre>{escaped(command)}</pre>")
    if document.get("adapters"):
        about = f"Load one of {plural(len(document['adapters']), 'adapter')}, the others likewise:"
        body.append(lines([about]) + f"<pre>{escaped(adapter_code(document, folder))}</pre>")
    return body


def adapter_code(document: dict, folder: Path) -> str:
    """Python that loads the last adapter of a study, or of joined ones."""
    name = document["adapters"][-1]
    if "studies" not in document:
        return loading_code(repr(document["config"]["model"]), str(folder / name))
    study = name.rpartition("/adapters/")[0]
    return loading_code(repr(document["studies"][study]["model"]), name)


def loading_code(source: str, adapter: str | None = None, dtype: str = "") -> str:
    """Python that loads a checkpoint by transformers, and the folder `adapter` onto it by peft."""
    code = ["import peft, transformers" if adapter else "import transformers", ""]
    if source == repr("tiny"):
        code.insert(1, "from ia2mini.models.checkpoint import TINY")
        source = "TINY"
    code.append(f"tokenizer = transformers.AutoTokenizer.from_pretrained({source})")
    code.append(f"model = transformers.AutoModelForCausalLM.from_pretrained({source}{dtype})")
    if adapter:
        code.append(f"model = peft.PeftModel.from_pretrained(model, {adapter!r})")
    return "\n".join(code)
