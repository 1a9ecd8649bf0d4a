"""The table in the terminal (means; every evaluation with --full), and tables as files."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean

from ..engine.options import method_name
from ..engine.select import grouped
from ..files import plain, plural, write_text
from ..methods import WITH_DEMONSTRATIONS
from ..study.table import METRICS
from .summary import average, parts, verdict

USUAL_METRICS = ("acc", "ece", "ece_null", "asim")  # where no others are asked for
HEADS = {**METRICS, "rate": "rate", "paper": "paper (% / ECE)"}  # these two always the last
PERCENT = ("acc", "acc_labels")  # metrics that are shown in percent
WITHOUT_DEVIATION = ("ece_null", "asim")
TO_LATEX = str.maketrans(
    {
        "→": r"$\rightarrow$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "±": r"$\pm$",
        "–": "--",
        "β": r"$\beta$",
        "·": r"$\cdot$",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{sign: "\\" + sign for sign in "&%$#_{}"},
    }
)
MARKUP = str.maketrans({"<": "&lt;", "&": "&amp;", **{sign: "\\" + sign for sign in "\\|`["}})
BOLD = "1"
DIM = "2"
YELLOW = "33"
FORMULA = tuple("=+-@＝＋－＠")  # what a spreadsheet's formula may begin with


def paint(text: str, code: str, color: bool) -> str:
    """A text for the terminal, with `color` in colour or bold."""
    return f"\x1b[{code}m{text}\x1b[0m" if color and text else text


def write_table(document: dict, full: bool = False, color: bool = False) -> str:
    """Of each model, N and choice of rate the mean over evaluations (`full`: and each one), and what IA2 brought."""
    painted = partial(paint, color=color)
    lines = []
    for part in parts(document):
        blocks = blocks_of(part["cells"], full)
        every = list(chain.from_iterable(rows for _, rows in blocks))
        head, *body = aligned(method_rows(every, document, ""))
        lines += [painted(plain(part["title"], ""), BOLD), painted(head, DIM)]
        for heading, rows in blocks:
            lines.append(heading)
            for row in rows:
                line = body.pop(0)
                lines.append(painted(line, BOLD) if row["method"] == "ia2-sft" else line)
        for i, line in enumerate(verdict(part["cells"])):
            lines.append(painted(line, YELLOW if i else BOLD))
        lines.append("")
    lines += [painted(line, DIM) for line in legend(document)]
    return "\n".join(lines)


def blocks_of(cells: list[dict], full: bool) -> list[tuple[str, list[dict]]]:
    """The rows of a part's table under their headings: the mean over evaluations, and with `full` each of them."""
    evaluations = grouped(cells, "task", "eval", "ood")
    means = average(cells)
    blocks = []
    if means:
        blocks.append((f"mean of {plural(len(evaluations), 'evaluation')}", means))
    each_differs = len(evaluations) > 1 or any("paper" in cell for cell in cells)
    if not means or (full and each_differs):
        for (task, name, ood), rows in evaluations.items():
            blocks.append((plain(f"{task} → {starred(name, ood)}", ""), rows))
    return blocks


def starred(evaluation: str, ood: bool) -> str:
    """An evaluation's name, with a star where it is out of distribution."""
    return f"{evaluation}*" if ood else evaluation


def aligned(table: Sequence[Sequence[str]], others: Callable = str.rjust) -> list[str]:
    """A line for each row: the first column flush left, the others flush right unless `others` is str.ljust."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for first, *rest in table:
        entries = [others(text, width) for text, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *entries]).rstrip())
    return lines


def known_columns(rows: list[dict], document: dict) -> list[str]:
    """The requested columns that have a value in some row."""
    columns = []
    asked = document.get("columns") or USUAL_METRICS
    for column in (*asked, "rate", "paper"):
        values = [row.get(f"{column}_mean", row.get(column)) for row in rows]
        if column == "rate" or any(value is not None for value in values):
            columns.append(column)
    return columns


def method_rows(rows: list[dict], document: dict, corner: str = "method") -> list[list[str]]:
    """Headings, `corner` above the methods; then the method of each row, and its entries in the known columns."""
    columns = known_columns(rows, document)
    found = [[corner, *map(HEADS.get, columns)]]
    for row in rows:
        method = plain(method_name(row["method"]), "")
        found.append([method, *(table_entry(row, column) for column in columns)])
    return found


def markdown(text: str) -> str:
    """A name for Markdown: in one line, without HTML, code or links."""
    return plain(text, "").translate(MARKUP)


def latex(text: str) -> str:
    return plain(text, "").translate(TO_LATEX)


def spreadsheet_safe(value):
    """A value of a CSV file; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = plain(value, "")
    return f"'{text}" if value.startswith(FORMULA) else text


def table_entry(row: dict, column: str) -> str:
    """Mean ± standard deviation over sets (of one set the mean alone), or the rate with its β."""
    if column == "rate":
        known = [f"{row[key]:g}" for key in ("rate", "beta") if row.get(key) is not None]
        return " β ".join(known) or "–"
    if column == "paper":
        return row.get("paper", "–")
    mean = row.get(f"{column}_mean")
    deviation = row.get(f"{column}_std")
    if mean is None:
        return "–"
    if column in WITHOUT_DEVIATION:
        deviation = None
    numbers = [value for value in (mean, deviation) if value is not None]
    if column in PERCENT:
        return " ± ".join(f"{100 * value:.1f}" for value in numbers)
    return " ± ".join(f"{value:.2f}" for value in numbers)


def legend(document: dict) -> list[str]:
    """The legend of the table, and the runs that failed."""
    cells = document["cells"]
    columns = known_columns(cells, document)
    sets = max(cell["sets"] for cell in cells)
    spread = "one set, so no deviation"
    if sets > 1:
        spread = f"mean ± standard deviation over {sets:,} sets"
    if "ece_null" in columns:
        spread += "; (null): the ECE that perfect calibration would show on these rows"
    lines = [spread]
    if any(cell.get("acc_labels_mean") is not None for cell in cells):
        right = "accuracy: of all tokens the likeliest is the label; among labels, as `fit` counts: of the labels"
        if "acc_labels" not in columns:
            right += " (--columns acc_labels)"
        lines.append(right)
    if "asim" in columns:
        lines.append("asim: likeness of attention outputs to those with demonstrations")
    if any(cell["ood"] for cell in cells):
        lines[-1] += "; means include evaluations out of distribution (*)"
    return lines + tokens_of_a_query(cells) + failures(document)


def tokens_of_a_query(cells: list[dict]) -> list[str]:
    """The mean tokens of a query without and with demonstrations, if both were scored."""
    alone = []
    demonstrated = []
    for cell in cells:
        mine = demonstrated if cell["method"] in WITH_DEMONSTRATIONS else alone
        if cell.get("tokens_mean") is not None:
            mine.append(cell["tokens_mean"])
    if not alone or not demonstrated:
        return []
    shown = f"with demonstrations (ICL) {fmean(demonstrated):.0f}"
    return [f"a query has {fmean(alone):.0f} tokens, {shown}"]


def failures(document: dict) -> list[str]:
    """The failed runs: one line for those of a method that failed alike at one learning rate."""
    several = []
    for name in ("model", "adapter"):
        values = {cell[name] for cell in document["cells"] if cell[name]}
        if len(values) > 1:
            several.append(name)
    broken = [record for record in document.get("training") or [] if record.get("trouble")]
    alike = grouped(broken, "model", "adapter", "task", "n", "method", "rate", "beta", "trouble")
    return [plain(failure(runs, several), "") for runs in alike.values()]


def failure(runs: list[dict], several: list[str]) -> str:
    """What went wrong in the runs of some sets at one learning rate; `several`: fields with several values."""
    first = runs[0]
    method = method_name(first["method"])
    names = [str(first.get(name)) for name in several]
    where = ", ".join([*names, first["task"], f"N = {first['n']}"])
    sets = ", ".join(str(run["set"]) for run in runs)
    return f"{where}: {method} at rate {table_entry(first, 'rate')}, set {sets}: {first['trouble']}"


def seconds_line(document: dict) -> str:
    """Time by stage, peak memory: "collect 1.2 s · train 2.5 min · total 2.5 min · peak memory 0.5 GiB"."""
    seconds = dict(document.get("seconds") or {})
    seconds["total"] = sum(seconds.values())
    said = []
    for stage, took in seconds.items():
        said.append(f"{stage} {took:.1f} s" if took < 60 else f"{stage} {took / 60:.1f} min")
    peak = document.get("peak_memory_bytes")
    if peak:
        said.append(f"peak memory {peak / 2**30:.2f} GiB")
    return " · ".join(said)


def write_tables(document: dict, folder: Path) -> None:
    """table.md, table.tex (booktabs) and table.csv (every cell, unrounded); nothing without pandas and its writers."""
    try:
        import jinja2  # noqa: F401
        import pandas
        import tabulate  # noqa: F401
    except ImportError:
        return
    of_markdown = []
    of_latex = []
    for part in parts(document):
        heads, *rows = evaluation_rows(part["cells"], document)
        table = pandas.DataFrame(rows, columns=heads)
        lines = table.map(markdown).to_markdown(index=False, disable_numparse=True)
        said = "\n".join(verdict(part["cells"]))
        of_markdown.append(f"**{markdown(part['title'])}**\n\n{lines}\n\n{said}\n")
        entries = table.map(latex).rename(columns=latex)
        of_latex.append(entries.to_latex(index=False, escape=False, caption=latex(part["title"])))
    write_text(folder / "table.md", "\n".join(of_markdown))
    write_text(folder / "table.tex", "\n".join(of_latex))
    flat = []
    for cell in document["cells"]:
        numbers = {name: value for name, value in cell.items() if not isinstance(value, list)}
        flat.append({name: spreadsheet_safe(value) for name, value in numbers.items()})
    write_text(folder / "table.csv", pandas.DataFrame(flat).to_csv(index=False))


def evaluation_rows(cells: list[dict], document: dict) -> list[list[str]]:
    """Headings, then a line for each cell: its task, its evaluation, the method and the entries."""
    cells = sorted(cells, key=lambda cell: (cell["task"], cell["ood"], cell["eval"]))
    heads, *rows = method_rows(cells, document)
    found = [["trained on", "evaluated on", *heads]]
    for cell, row in zip(cells, rows):
        found.append([cell["task"], starred(cell["eval"], cell["ood"]), *row])
    return found
