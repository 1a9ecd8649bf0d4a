"""The table in the terminal, one screen: the mean first, every evaluation only when asked for; and tables as files."""

from functools import partial
from pathlib import Path

from ..engine.options import LABELS
from ..engine.select import grouped
from ..files import count, plain, write_text
from ..study.table import METRICS
from .summary import average, parts, verdict

COLUMNS = ("acc", "ece", "ece_null", "asim")  # where no others are asked for
# of own rows, which `fit` judges among the labels
OWN_COLUMNS = ("acc", "acc_labels", *COLUMNS[1:])
HEADS = METRICS | {"rate": "rate", "paper": "paper (% / ECE)"}  # these always the last
SYMBOLS: dict = {
    "→": r"$\rightarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "±": r"$\pm$",
    "–": "--",
}
SYMBOLS |= {"β": r"$\beta$", "·": r"$\cdot$"}
COMMANDS = {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
ESCAPES = str.maketrans(COMMANDS | {c: "\\" + c for c in "&%$#_{}"})
MARKUP = str.maketrans({"<": "&lt;", "&": "&amp;"} | {c: "\\" + c for c in "\\|`["})


def write_table(document: dict, full: bool = False, color: bool = False) -> str:
    """Of each model, N and choice of rate the mean over evaluations (`full`: and each one), and what IA2 brought."""

    def paint(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if color and code and text else text

    out = []
    for part in parts(document):
        cells, mean = part["cells"], average(part["cells"])
        evaluations = grouped(cells, "task", "eval", "ood")
        blocks = [(f"mean of {count(len(evaluations), 'evaluation')}", mean)] * bool(mean)
        several = len(evaluations) > 1 or any("paper" in cell for cell in cells)
        if full and several or not mean:
            for (task, name, ood), rows in evaluations.items():
                blocks.append((plain(f"{task} → {name}{'*' * ood}", ""), rows))
        every = [row for _, rows in blocks for row in rows]
        columns = known_columns(every, document)
        table = [["", *map(HEADS.get, columns)], *(texts(row, columns) for row in every)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join([t[0].ljust(widths[0]), *map(str.rjust, t[1:], widths[1:])]).rstrip()
            for t in table
        ]
        out += [paint(plain(part["title"], ""), "1"), paint(lines.pop(0), "2")]
        for heading, rows in blocks:
            out += [
                heading,
                *(paint(lines.pop(0), "1" * (row["method"] == "ia2-sft")) for row in rows),
            ]
        out += [paint(line, "1" if i == 0 else "33") for i, line in enumerate(verdict(cells))] + [
            ""
        ]
    return "\n".join(out + [paint(line, "2") for line in legend(document)])


def known_columns(rows: list[dict], document: dict) -> list[str]:
    """The columns that are asked for and some row has a value of."""
    asked = (*document.get("columns", COLUMNS), "rate", "paper")
    return [
        c
        for c in asked
        if c == "rate" or any(row.get(f"{c}_mean", row.get(c)) is not None for row in rows)
    ]


def texts(row: dict, columns: list[str]) -> list[str]:
    """A line of a table: the method, then its entries."""
    return [
        plain(LABELS.get(row["method"], row["method"]), ""),
        *(entry(row, column) for column in columns),
    ]


def markdown(text: str) -> str:
    """A name for Markdown: in one line, without HTML, code or links."""
    return plain(text, "").translate(MARKUP)


def cell(value):
    """A value of a CSV file; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) + plain(value, "")


def entry(row: dict, column: str) -> str:
    """Mean ± standard deviation over sets (of one set the mean alone), or the rate with its β."""
    if column == "rate":
        return (
            " β ".join(f"{row[key]:g}" for key in ("rate", "beta") if row.get(key) is not None)
            or "–"
        )
    if column == "paper":
        return row.get("paper", "–")
    mean, std = row.get(f"{column}_mean"), row.get(f"{column}_std")
    if mean is None:
        return "–"
    percent = column in ("acc", "acc_labels")
    shown = f"{100 * mean:.1f}" if percent else f"{mean:.2f}"
    if std is None or column in ("ece_null", "asim"):
        return shown
    return f"{shown} ± {100 * std:.1f}" if percent else f"{shown} ± {std:.2f}"


def legend(document: dict) -> list[str]:
    """What stands in the table, and which runs failed, in lines."""
    cells, columns = document["cells"], known_columns(document["cells"], document)
    sets = max(cell["sets"] for cell in cells)
    lines = [
        f"mean ± standard deviation over {sets:,} sets" if sets > 1 else "one set, so no deviation"
    ]
    if "ece_null" in columns:
        lines[0] += "; (null): the ECE that perfect calibration would show on these rows"
    if any(cell.get("acc_labels_mean") is not None for cell in cells):
        lines.append(
            "accuracy: of all tokens the likeliest is the label; among labels, as `fit` counts: of the labels"
        )
        lines[-1] += "" if "acc_labels" in columns else " (--columns acc_labels)"
    lines += ["asim: likeness of attention outputs to those with demonstrations"] * (
        "asim" in columns
    )
    if any(cell["ood"] for cell in cells):
        lines[-1] += "; means include evaluations out of distribution (*)"
    broken = [record for record in document.get("training") or [] if record.get("trouble")]
    apart = [name for name in ("model", "adapter") if len({c[name] for c in cells if c[name]}) > 1]
    for runs in grouped(
        broken, "model", "adapter", "task", "n", "method", "rate", "beta", "trouble"
    ).values():
        lines.append(plain(failure(runs, apart), ""))
    return lines


def failure(runs: list[dict], apart: list[str]) -> str:
    """What went wrong in some sets' runs at one rate; `apart`: fields that tell them from others of the document."""
    first = runs[0]
    method = LABELS.get(first["method"], first["method"])
    where = ", ".join(
        [str(first.get(name)) for name in apart] + [first["task"], f"N = {first['n']}"]
    )
    sets = ", ".join(str(run["set"]) for run in runs)
    return f"{where}: {method} at rate {entry(first, 'rate')}, set {sets}: {first['trouble']}"


def seconds_line(document: dict) -> str:
    """Time by stage, peak memory: "collect 1.2 s · train 2.5 min · total 2.5 min · peak memory 0.5 GiB"."""
    seconds, peak = dict(document.get("seconds") or {}), document.get("peak_memory_bytes")
    seconds["total"] = sum(seconds.values())
    times = [
        f"{stage} {s:.1f} s" if s < 60 else f"{stage} {s / 60:.1f} min"
        for stage, s in seconds.items()
    ]
    return " · ".join(times + ([f"peak memory {peak / 2**30:.2f} GiB"] if peak else []))


def write_tables(document: dict, folder: Path) -> None:
    """table.md, table.tex (booktabs) and table.csv (every cell, unrounded); nothing without pandas and its writers."""
    try:
        import jinja2  # noqa: F401
        import pandas
        import tabulate  # noqa: F401
    except ImportError:
        return
    md, latex = [], []
    for part in parts(document):
        cells = sorted(part["cells"], key=lambda c: (c["task"], c["ood"], c["eval"]))
        columns = known_columns(cells, document)
        rows = [[c["task"], c["eval"] + "*" * c["ood"], *texts(c, columns)] for c in cells]
        table = pandas.DataFrame(
            rows, columns=["trained on", "evaluated on", "method", *map(HEADS.get, columns)]
        )
        lines = table.map(markdown).to_markdown(index=False, disable_numparse=True)
        md.append(
            "\n\n".join(
                [f"**{markdown(part['title'])}**", lines, "\n".join(verdict(part["cells"])) + "\n"]
            )
        )
        caption = plain(part["title"], "").translate(ESCAPES)
        latex.append(
            table.map(partial(plain, kept="")).to_latex(index=False, escape=True, caption=caption)
        )
    write_text(folder / "table.md", "\n".join(md))
    write_text(folder / "table.tex", "\n".join(latex).translate(str.maketrans(SYMBOLS)))
    flat = [
        {key: cell(v) for key, v in one.items() if not isinstance(v, list)}
        for one in document["cells"]
    ]
    write_text(folder / "table.csv", pandas.DataFrame(flat).to_csv(index=False))
