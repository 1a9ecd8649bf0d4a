"""Tables as files, from one frame: Markdown, LaTeX and CSV are written by pandas."""

from pathlib import Path

from ..files import write_text
from .summary import LABELS, parts, verdict
from .terminal import COLUMNS, HEADS, entry

SYMBOLS = {"→": r"$\rightarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "–": "--"}
SYMBOLS |= {"β": r"$\beta$", "·": r"$\cdot$"}
ESCAPES = str.maketrans(
    {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "} | {c: "\\" + c for c in "&%$#_{}"}
)


def frame(cells: list[dict]):
    """A pandas frame as the paper's Table 1: a row an evaluation and method, the table's columns."""
    import pandas

    rows, columns = [], [c for c in COLUMNS if c == "rate" or any(x.get(f"{c}_mean") is not None for x in cells)]
    for cell in sorted(cells, key=lambda c: (c["task"], c["ood"], c["eval"])):
        row = {"trained on": cell["task"], "evaluated on": cell["eval"] + "*" * cell["ood"]}
        row["method"] = LABELS.get(cell["method"], cell["method"])
        rows.append(row | {HEADS[c]: entry(cell, c) for c in columns})
    return pandas.DataFrame(rows)


def write_tables(document: dict, folder: Path) -> None:
    """table.md, table.tex (booktabs) and table.csv (every cell's numbers, unrounded).

    Nothing without pandas and what it writes Markdown and LaTeX with.
    """
    try:
        import jinja2  # noqa: F401
        import pandas
        import tabulate  # noqa: F401
    except ImportError:
        return
    markdown, latex = [], []
    for part in parts(document):
        table = frame(part["cells"])
        plain, said = table.map(lambda text: text.replace("|", r"\|")), "\n".join(verdict(part["cells"]))
        lines = plain.to_markdown(index=False, disable_numparse=True)
        markdown.append(f"**{part['title']}**\n\n{lines}\n\n{said}\n")
        latex.append(table.to_latex(index=False, escape=True, caption=part["title"].translate(ESCAPES)))
    write_text(folder / "table.md", "\n".join(markdown))
    write_text(folder / "table.tex", "\n".join(latex).translate(str.maketrans(SYMBOLS)))
    lists = {key for cell in document["cells"] for key in cell if isinstance(cell[key], list)}
    flat = [{key: value for key, value in cell.items() if key not in lists} for cell in document["cells"]]
    write_text(folder / "table.csv", pandas.DataFrame(flat).to_csv(index=False))
