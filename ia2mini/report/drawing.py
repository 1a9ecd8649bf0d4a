"""One style for every figure: colours, text, how an interval is drawn, and where the name of a line stands.

Figures are as wide as a phone's screen: at 400 pixels their text is 10 pixels high. An interval is a thin line through
its point, drawn whole, and the note below a figure says which interval it is. Names stand beside what they name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import fill

from ..files import write

WIDTH = 4.4  # inches
CHARACTERS = 64  # of a line of a title
INK = "#222222"
FAINT = "#595959"
# after Okabe and Ito, who chose them to be told apart by every eye; blue for IA2 and what follows it
COLORS = {
    "base": "#999999",
    "icl": "#404040",
    "icl-sft": "#8c564b",
    "sft": "#d55e00",
    "sft-sft": "#f0a070",
    "soft": "#e6b000",
    "soft-sft": "#a07800",
    "hidden": "#8fd0b0",
    "hidden-sft": "#3a8a60",
    "ridge": "#9a8fd0",
    "ridge-sft": "#5a48a0",
    "ia2": "#56b4e9",
    "sft-ia2": "#cc79a7",
    "ia2+sft": "#009e73",
    "ia2-sft": "#0072b2",
}
OTHER = "#777777"  # a method without a colour
OTHER_SFT = "#882255"  # and SFT from there
STYLE = Path(__file__).parent / "figures.mplstyle"
# format of a file -> the metadata that is left out, so that a document gives the same bytes again
FORMATS = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}
LINE_OF_TEXT = 0.165  # inches


@dataclass
class ChartRow:
    """A line of a chart: a point with its interval, and its value as text at the right."""

    name: str
    color: str
    mean: float | None = None
    low: float | None = None  # of the interval; None where there is none
    high: float | None = None
    text: str = "–"
    mark: float | None = None  # what to compare it with


def styled():
    """A context in which matplotlib draws in this style. ImportError where matplotlib is not installed."""
    from matplotlib import rc_context

    return rc_context(fname=STYLE)


def new_figure(height: float = WIDTH):
    """A matplotlib Figure of the usual width, so many inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def panels(figure, height: float, rows: int = 1, columns: int = 1, **shared: bool) -> list:
    """The axes of a figure that is made so many inches high, row by row; `shared` as in matplotlib's `subplots`."""
    figure.set_size_inches(WIDTH, height)
    return list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def set_heading(figure, *lines: str) -> None:
    """Lines at the top left, broken where they are too long."""
    text = "\n".join(fill(line, CHARACTERS) for line in lines)
    figure.suptitle(text, x=0.01, horizontalalignment="left")


def set_note(figure, text: str) -> None:
    """Write a note below the figure: what marks and lines mean."""
    note = fill(text, CHARACTERS)
    figure.supxlabel(note, x=0.01, horizontalalignment="left", fontsize=9, color=FAINT)


def draw_interval(
    axis, at: float, low: float, high: float, color: str, level: bool = False
) -> None:
    """An interval as every figure has it: upright, or level where values run to the right."""
    draw = axis.hlines if level else axis.vlines
    draw(at, low, high, color=color, linewidth=1.4, zorder=2)


def draw_rows(axis, rows: Sequence[ChartRow]) -> None:
    """A line for each row, from the top: its interval, its point, and its value right of the axes."""
    for place, row in enumerate(rows):
        if row.low is not None:
            draw_interval(axis, place, row.low, row.high, row.color, level=True)
        if row.mark is not None:
            axis.vlines(row.mark, place - 0.32, place + 0.32, color=INK, linewidth=1.2, zorder=3)
        if row.mean is not None:
            axis.plot(row.mean, place, "o", color=row.color, zorder=4)
        beside = axis.get_yaxis_transform()
        axis.text(1.03, place, row.text, transform=beside, verticalalignment="center")
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)


def keep_whole(axis, which: str, low: float, high: float) -> None:
    """Limits of the x or y axis: `low` to `high` and whatever is drawn beyond, with room for marks at the ends."""
    drawn = getattr(axis.dataLim, f"interval{which}")
    first = min(low, drawn[0])
    last = max(high, drawn[1])
    room = 0.04 * (last - first) or 0.04
    axis.set(**{f"{which}lim": (first - room, last + room)})


def name_ends(axis, ends: Sequence[tuple[float, float, str, str]], height: float) -> None:
    """Write names right of the axes, each tied to its point (x, y) by a line of its colour, none over another.

    `ends`: (x, y, name, colour); `height` of the axes in inches. Limits and scale must be set before.
    """
    shares = []
    for x, y, _, _ in ends:
        place = axis.transLimits.transform(axis.transScale.transform((x, y)))
        shares.append(float(place[1]))
    for place, (x, y, name, color) in zip(spread(shares, LINE_OF_TEXT / height), ends):
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkB": 3},
        )


def spread(shares: Sequence[float], apart: float) -> list[float]:
    """The places nearest to `shares` of a height, in their order, that lie so far apart and, if they fit, within it."""
    order = sorted(range(len(shares)), key=lambda i: shares[i])
    places = [0.0] * len(shares)
    least = 0.0
    for i in order:
        places[i] = max(shares[i], least)
        least = places[i] + apart
    most = 1.0
    for i in reversed(order):
        places[i] = min(places[i], most)
        most = places[i] - apart
    return places


def image_of(figure, form: str) -> bytes:
    """A figure as the bytes of a file of this format."""
    buffer = BytesIO()
    figure.savefig(buffer, format=form, metadata={FORMATS[form]: None})
    return buffer.getvalue()


def save(figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the name ends with."""
    image = image_of(figure, path.suffix[1:])
    write(path, lambda temporary: temporary.write_bytes(image))
