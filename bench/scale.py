"""`scale`: how our time grows with runs side by side, rows a set, answer length and depth, as figures."""

from collections.abc import Callable
from dataclasses import replace

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
        from matplotlib import use
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure (needs matplotlib: pip install 'ia2mini[report]')"
    use("Agg")
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(2, 2).flat, found.items()):
        xs = list(points)
        for stage in points[xs[0]]:
            axes.plot(xs, [points[x][stage] for x in xs], marker="o", label=stage)
        total = [sum(points[x].values()) for x in xs]
        axes.plot(xs, total, color="black", marker="o", label="all")
        axes.plot(
            xs, [total[-1] * x / xs[-1] for x in xs], color="grey", linestyle=":", label="linear"
        )
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds", xticks=xs)
        axes.set_xticklabels([str(x) for x in xs])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(f"ia2mini, {shape}, {device}: time of a cell's stages")
    path = RESULTS / f"scale-{shape}-{device}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"figure: {path.relative_to(RESULTS.parents[1])}"
