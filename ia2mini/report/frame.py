"""Tables as files, from one frame: Markdown, LaTeX and CSV are written by pandas."""

from pathlib import Path

from ..files import write_text
from .summary import parts, verdict
from .terminal import HEADS, known_columns, texts

SYMBOLS = {"→": r"$\rightarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "–": "--"}
SYMBOLS |= {"β": r"$\beta$", "·": r"$\cdot$"}
ESCAPES = {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
ESCAPES = str.maketrans(ESCAPES | {c: "\\" + c for c in "&%$#_{}"})


def write_tables(document: dict, folder: Path) -> None:
    """table.md, table.tex (booktabs), table.csv (every cell, unrounded), in the layout of the paper's Table 1.

    Nothing without pandas and its writers.
    """
    try:
        import jinja2  # noqa: F401
        import pandas
        import tabulate  # noqa: F401
    except ImportError:
        return
    markdown, latex = [], []
    for part in parts(document):
        cells = sorted(part["cells"], key=lambda c: (c["task"], c["ood"], c["eval"]))
        columns = known_columns(cells)
        rows = [[c["task"], c["eval"] + "*" * c["ood"], *texts(c, columns)] for c in cells]
        table = pandas.DataFrame(rows, columns=["trained on", "evaluated on", "method", *map(HEADS.get, columns)])
        plain, said = table.map(lambda text: text.replace("|", r"\|")), "\n".join(verdict(part["cells"]))
        lines = plain.to_markdown(index=False, disable_numparse=True)
        markdown.append(f"**{part['title']}**\n\n{lines}\n\n{said}\n")
        latex.append(table.to_latex(index=False, escape=True, caption=part["title"].translate(ESCAPES)))
    write_text(folder / "table.md", "\n".join(markdown))
    write_text(folder / "table.tex", "\n".join(latex).translate(str.maketrans(SYMBOLS)))
    flat = [{key: v for key, v in cell.items() if not isinstance(v, list)} for cell in document["cells"]]
    write_text(folder / "table.csv", pandas.DataFrame(flat).to_csv(index=False))
