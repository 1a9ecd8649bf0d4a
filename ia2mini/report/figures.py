"""The figures of a study: their names, captions and files."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..engine.options import method_name
from . import charts
from .charts import by_method, by_pair
from .drawing import FORMATS, new_figure, save, set_heading, styled
from .summary import views


class StudyFigure(NamedTuple):
    """How a figure is drawn and what is said of it."""

    draw: Callable  # (matplotlib figure, view) -> its heading; None where the view has no data
    caption: str
    numbers: Callable | None = None  # view -> numbers that no table has, for the alt text


def layers_in_words(view: dict) -> str:
    """The layers where each method is most and least similar to ICL."""
    said = []
    for method, cells in by_method(view["cells"], "asim_layers").items():
        if method == "icl":
            continue
        mean = np.mean([cell["asim_layers"] for cell in cells], axis=0)
        low = f"{mean.min():.2f} in layer {mean.argmin()}"
        high = f"{mean.max():.2f} in layer {mean.argmax()}"
        said.append(f"{method_name(method)} from {low} to {high}")
    return ", ".join(said)


def reliability_in_words(view: dict) -> str:
    """The mean confidence and accuracy of each method."""
    said = []
    for method, cells in by_method(view["cells"], "reliability").items():
        rows, confidences, right = np.sum([cell["reliability"] for cell in cells], axis=(0, 1))
        sure = f"{100 * confidences / rows:.1f} % sure"
        said.append(f"{method_name(method)} {sure}, {100 * right / rows:.1f} % right")
    return "; ".join(said)


def overlap_in_words(view: dict) -> str:
    """The overlap of each pair of methods."""
    said = []
    for pair, records in by_pair(view["overlap"]).items():
        mean = np.mean([record["overlap"] for record in records])
        names = " and ".join(map(method_name, pair))
        said.append(f"{names} {mean:.2f} (chance {records[-1]['chance']:.2f})")
    return ", ".join(said)


FIGURES = {  # in the order of the page
    "methods": StudyFigure(charts.methods, "Means over evaluations."),
    "by_n": StudyFigure(
        charts.by_n, "The methods over N, the training rows of a set (paper Figures 5 and 6)."
    ),
    "asim_layers": StudyFigure(
        charts.asim_layers,
        "Likeness of attention outputs to those with demonstrations (asim; 1: the same), layer by layer.",
        layers_in_words,
    ),
    "asim_scatter": StudyFigure(
        charts.asim_scatter,
        "What likeness to the model with demonstrations brings (paper Figure 3).",
    ),
    "reliability": StudyFigure(
        charts.reliability,
        "Are answers right as often as their confidence says?",
        reliability_in_words,
    ),
    "overlap": StudyFigure(
        charts.overlap,
        "Share of LoRA's subspace that two methods have in common (paper Figure 4).",
        overlap_in_words,
    ),
}


def draw_figures(document: dict, folder: Path, formats: tuple[str, ...] = ("png",)) -> list[str]:
    """Draw a study into `folder`; file names, none without matplotlib."""
    if not formats:
        return []
    try:
        style = styled()
    except ImportError:
        return []
    names = []
    with style:
        for view in views(document):
            for name in FIGURES:
                figure = draw(name, view)
                if figure is None:
                    continue
                for form in formats:
                    names.append(f"{name}{view['suffix']}.{form}")
                    save(figure, folder / names[-1])
    return names


def remove_figures(document: dict, folder: Path) -> None:
    """Remove what an earlier report drew under the names of this one's figures: its page shows those that are there."""
    for view in views(document):
        for name in FIGURES:
            for form in FORMATS:
                (folder / f"{name}{view['suffix']}.{form}").unlink(missing_ok=True)


def draw(name: str, view: dict):
    """The figure called `name` as a matplotlib Figure; None where the view has no data for it."""
    several = len(view["parts"]) > 1
    if name == ("methods" if several else "by_n"):
        return None
    figure = new_figure()
    heading = FIGURES[name].draw(figure, view)
    if heading is None:
        return None
    if several and name != "by_n":
        heading += f"; here N = {view['cells'][0]['n']}"
    about = view["title"].replace(" · rate by", "\nrate by")
    set_heading(figure, heading, *about.split("\n"))
    return figure


def alt_text(name: str, view: dict) -> str:
    """The title and caption of a figure, and its numbers where no table has them."""
    about = FIGURES[name]
    text = f"{view['title']}. {about.caption}"
    if about.numbers is None:
        return text
    return f"{text} {about.numbers(view)}."
