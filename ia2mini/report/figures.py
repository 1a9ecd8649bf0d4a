"""The figures of a study: their names, captions and files."""

from pathlib import Path

from .. import UsageError
from .charts import asim_layers, asim_scatter, by_n, methods, overlap, reliability
from .drawing import LEFT_OUT, new_figure, save, set_heading, styled
from .summary import views

CAPTIONS = {  # in the order of the page
    "methods": "Means over evaluations.",
    "by_n": "The methods over N, the training rows of a set (paper Figures 5 and 6).",
    "asim_layers": "Likeness of attention outputs to those with demonstrations (asim; 1: the same), layer by layer.",
    "asim_scatter": "What likeness to the model with demonstrations brings; a dot an evaluation (paper Figure 3).",
    "reliability": "Are confident answers right as often as they should be (dashed)? Larger dots: more rows.",
    "overlap": "Share of LoRA's subspace that two methods have in common, beside that of random ones (paper Figure 4).",
}
DRAWN = {
    "methods": methods,
    "by_n": by_n,
    "asim_layers": asim_layers,
    "asim_scatter": asim_scatter,
    "reliability": reliability,
    "overlap": overlap,
}


def draw_figures(document: dict, folder: Path, formats: tuple[str, ...] = ("png",)) -> list[str]:
    """Draw a study into `folder`; file names, none without matplotlib. UsageError at once for an unknown format."""
    for form in formats:
        if form not in LEFT_OUT:
            known = ", ".join(LEFT_OUT)
            raise UsageError(f"--figures {form}: unknown format; figures are written as {known}")
    try:
        style = styled()
    except ImportError:
        return []
    names = []
    with style:
        for view in views(document):
            for name in CAPTIONS:
                figure = draw(name, view)
                if figure is None:
                    continue
                for form in formats:
                    names.append(f"{name}{view['suffix']}.{form}")
                    save(figure, folder / names[-1])
    return names


def draw(name: str, view: dict):
    """The figure called `name` as a matplotlib Figure; None where the view has no data for it."""
    several = len(view["parts"]) > 1
    if name == ("methods" if several else "by_n"):
        return None
    figure = new_figure()
    heading = DRAWN[name](figure, view)
    if heading is None:
        return None
    if several and name != "by_n":
        heading += f"; here N = {view['cells'][0]['n']}"
    about = view["title"].replace(" · rate by", "\nrate by")
    set_heading(figure, heading, *about.split("\n"))
    return figure
