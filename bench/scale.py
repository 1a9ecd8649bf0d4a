"""`scale`: how our time grows with runs side by side, rows a set, answer length and depth, as figures."""

from collections.abc import Callable
from dataclasses import replace

from ia2mini.report.charts import PANEL
from ia2mini.report.drawing import (
    FAINT,
    INK,
    OTHER,
    name_ends,
    new_figure,
    save,
    set_heading,
    set_note,
    styled,
)

from .report import RESULTS, Line, Result
from .shapes import SST2_LENGTHS, Stand, stand
from .timing import Timing
from .training import Size, our_cell

BASE = Size(steps=2, rows=20)  # of 50 steps and 500 rows: growth is asked for, not the total
# runs a method -> sets × rates
RUNS = {1: (1, 1), 2: (2, 1), 5: (5, 1), 15: (5, 3), 30: (10, 3), 60: (20, 3)}
COUNTS = (2, 4, 8, 16, 32, 64, 128)
ANSWERS = (2, 8, 32, 100, 200)
DEPTHS = (1, 2, 4, 8, 16)
STAGES = {"collect": "#0072b2", "train": "#d55e00", "evaluate": "#009e73"}


def sweep(
    points: dict[int, Callable[[], dict[str, float]]], repeats: int = 2
) -> dict[int, dict[str, float]]:
    """Seconds a stage at every point: the least of `repeats` rounds, after one over the first point.

    What takes 5 s is done once.
    """
    next(iter(points.values()))()
    found: dict[int, dict[str, float]] = {}
    for _ in range(repeats):
        for x, run in points.items():
            if sum(found.get(x, {}).values()) > 5:
                continue
            spent = run()
            found[x] = {
                stage: min(seconds, found.get(x, spent)[stage]) for stage, seconds in spent.items()
            }
    return found


def scale(shape: str = "tiny", device: str = "cpu", dtype=None) -> Result:
    """Cell time against R, N, answer length and depth; PNG figures in bench/results."""
    ground = stand(shape, device, dtype)

    def cell(ground: Stand, size: Size, tokens: int = 1) -> Callable[[], dict[str, float]]:
        return lambda: our_cell(
            ground, size, ground.prompts(size.rows, SST2_LENGTHS, seed=99), tokens
        )[0]

    usual = (
        f"{BASE.runs} runs a method, N = {BASE.n}, {BASE.steps} steps, {BASE.rows} evaluation rows"
    )
    result = Result("scale", f"{ground.about}; where not said otherwise {usual}", [])
    short = replace(BASE, sets=2, rates=2)
    sweeps = {
        "runs a method": {
            r: cell(ground, replace(BASE, sets=s, rates=k)) for r, (s, k) in RUNS.items()
        },
        "rows a set (N), an epoch of 4 runs": {
            n: cell(ground, replace(short, n=n, steps=max(1, n // 4))) for n in COUNTS
        },
        "answer tokens (collect and train; 4 runs, 2 steps)": {
            g: cell(ground, short, g) for g in ANSWERS
        },
        "layers": {depth: cell(stand(shape, device, dtype, depth), BASE) for depth in DEPTHS},
    }
    found = {}
    for name, points in sweeps.items():
        found[name] = sweep(points)
        totals = {x: sum(spent.values()) for x, spent in found[name].items()}
        for x, spent in found[name].items():
            line = Line(
                f"{x} {name}",
                "us",
                Timing.of([totals[x]]),
                "",
                {f"s {stage}": seconds for stage, seconds in spent.items()},
            )
            result.add(line)
        (a, b) = (min(totals), max(totals))
        result.ratios[f"{name}: time grows by, from {a} to {b} ({b / a:g} ×)"] = (
            totals[b] / totals[a]
        )
    result.remarks.append(plot(found, ground.shape, ground.device.type))
    return result


def plot(found: dict[str, dict[int, dict[str, float]]], shape: str, device: str) -> str:
    """Draw seconds a stage against each quantity, with a line of slope one; where the figure is."""
    try:
        style = styled()
    except ImportError:
        return "no figure (needs matplotlib: pip install 'ia2mini[report]')"
    with style:
        figure = new_figure(0.8 + (PANEL + 0.8) * len(found))
        axes = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axis, (name, points) in zip(axes, found.items()):
            plot_sweep(axis, points)
            axis.set_title("seconds")
            axis.set_xlabel(name)
        set_heading(figure, f"Time of a cell's stages: ia2mini, {shape}, {device}")
        set_note(figure, "Dotted: all, if it grew in proportion.")
        path = RESULTS / f"scale-{shape}-{device}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    return f"figure: {path.relative_to(RESULTS.parents[1])}"


def plot_sweep(axis, points: dict[int, dict[str, float]]) -> None:
    """One panel: a line a stage, each named at its end."""
    sizes = list(points)
    ends = []
    for stage in points[sizes[0]]:
        seconds = [points[size][stage] for size in sizes]
        color = STAGES.get(stage, OTHER)
        axis.plot(sizes, seconds, marker="o", color=color)
        ends.append((sizes[-1], seconds[-1], stage, color))
    total = [sum(points[size].values()) for size in sizes]
    axis.plot(sizes, total, marker="o", color=INK)
    ends.append((sizes[-1], total[-1], "all", INK))
    proportional = [total[-1] * size / sizes[-1] for size in sizes]
    axis.plot(sizes, proportional, color=FAINT, linestyle=":")
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sizes, map(str, sizes))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    name_ends(axis, ends, PANEL)
