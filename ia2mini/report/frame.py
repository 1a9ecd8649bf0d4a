"""Tables as files, from one frame: Markdown, LaTeX and CSV are written by pandas."""

from pathlib import Path

from ..files import write_text
from .summary import LABELS, parts, verdict
from .terminal import COLUMNS, HEADS, entry

SYMBOLS = {"→": r"$\rightarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "–": "--"}
ESCAPES = str.maketrans(
    {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "} | {c: "\\" + c for c in "&%$#_{}"}
)


def frame(cells: list[dict]):
    """A pandas frame as the paper's Table 1: a row an evaluation and method, the table's columns."""
    import pandas

    rows = []
    for cell in sorted(cells, key=lambda c: (c["task"], c["ood"], c["eval"])):
        row = {"trained on": cell["task"], "evaluated on": cell["eval"] + "*" * cell["ood"]}
        row["method"] = LABELS.get(cell["method"], cell["method"])
        rows.append(
            row | {HEADS[c]: entry(cell, c) for c in COLUMNS if c == "rate" or cell.get(f"{c}_mean") is not None}
        )
    return pandas.DataFrame(rows).fillna("–")


def write_tables(document: dict, folder: Path) -> None:
    """table.md, table.tex (booktabs) and table.csv (every cell's numbers, unrounded); nothing without pandas."""
    try:
        import pandas
    except ImportError:
        return
    markdown, latex = [], []
    for part in parts(document):
        table = frame(part["cells"])
        plain, said = table.map(lambda text: text.replace("|", r"\|")), "\n".join(verdict(part["cells"]))
        markdown.append(f"**{part['title']}**\n\n{plain.to_markdown(index=False)}\n\n{said}\n")
        latex.append(table.to_latex(index=False, escape=True, caption=part["title"].translate(ESCAPES)))
    write_text(folder / "table.md", "\n".join(markdown))
    write_text(folder / "table.tex", "\n".join(latex).translate(str.maketrans(SYMBOLS)))
    lists = {key for cell in document["cells"] for key in cell if isinstance(cell[key], list)}
    flat = [{key: value for key, value in cell.items() if key not in lists} for cell in document["cells"]]
    write_text(folder / "table.csv", pandas.DataFrame(flat).to_csv(index=False))
