"""The report of a study: tables as files, figures, and one HTML page."""

from pathlib import Path

from ..files import write_text
from .figures import draw_figures
from .page import write_page
from .tables import write_table, write_tables


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
