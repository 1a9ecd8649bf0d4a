"""What the results document of `runs.py` shows: tables (terminal, Markdown, LaTeX, CSV), seconds, figures, one HTML page."""

import base64
import csv
import html as markup
import io
import json
import math
import re
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from ia2mini.models.checkpoint import write

METHODS = {  # name: (label, colour), in the order of every table and figure; after Okabe and Ito, blue for IA2 and what follows it
    "base": ("base", "#b0b0b0"), "icl": ("ICL", "#404040"), "sft": ("SFT", "#d55e00"), "sft-sft": ("SFT→SFT", "#f0a070"),
    "soft": ("soft labels", "#e6b000"), "ia2": ("IA2", "#56b4e9"), "sft-ia2": ("SFT→IA2", "#cc79a7"), "ia2+sft": ("IA2+SFT", "#009e73"),
    "ia2-sft": ("IA2→SFT", "#0072b2"),
}  # fmt: skip
UNTRAINED = ("base", "icl")
LEFT, RIGHT = ("acc", "ece", "asim", "rate"), ("acc", "ece", "rate")
ARROWS = {"acc": "acc ↑", "ece": "ece ↓", "asim": "asim ↑"}
CHOICES = {"dev": "rate by lowest dev loss", "eval": "rate by accuracy on the evaluation rows, the paper's choice"}
TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "→": r"$\rightarrow$",
}
TEX = str.maketrans(TEX | {"↑": r"$\uparrow$", "↓": r"$\downarrow$"} | {c: "\\" + c for c in "&%$#_{}"})


def _known(cells, field: str) -> list[float]:
    return [c[field] for c in cells if c and c.get(field) is not None and not math.isnan(c[field])]


def _groups(document: dict) -> dict:
    """(model, n, adapter) -> (task, eval, ood) -> rows by method: (cell to report, cell of the paper's choice beside it or None)."""
    rank = {method: i for i, method in enumerate(METHODS)}
    cells = sorted(document["cells"], key=lambda c: rank.get(c["method"], len(rank)))
    groups = {(c["model"], c["n"], c["adapter"]): {} for c in cells if c["method"] not in UNTRAINED}
    for c in cells:
        key, pair = (c["model"], c["n"], c["adapter"]), (c["task"], c["eval"], c["ood"])
        shared = [k for k in groups if k[:2] == key[:2]] if c["method"] in UNTRAINED else []
        for pairs in [groups[k] for k in shared] or [groups.setdefault(key, {})]:
            pairs.setdefault(pair, {}).setdefault(c["method"], {})[c.get("selected_by") or "dev"] = c
    for pairs in groups.values():
        for pair, methods in pairs.items():
            pairs[pair] = [(m.get("dev") or m["eval"], m.get("eval") if "dev" in m else None) for m in methods.values()]
    return groups


def _average(pairs: dict) -> list[tuple]:
    """Rows of the methods that every evaluation has, means and deviations averaged over the evaluations."""

    def mean(cells):
        fields = ("acc_mean", "acc_std", "ece_mean", "ece_std", "asim_mean")
        return {"method": cells[0]["method"]} | {f: fmean(known) for f in fields if (known := _known(cells, f))}

    methods = {}
    for row in sum(pairs.values(), []):
        methods.setdefault(row[0]["method"], []).append(row)
    full = [zip(*rows, strict=True) for rows in methods.values() if len(rows) == len(pairs)]
    return [(mean(cells), mean(others) if all(others) else None) for cells, others in full]


def _gain(mean: list[tuple]) -> str:
    """What IA2 before SFT brought, in one line; empty without both methods."""
    cells = {cell["method"]: cell for cell, _ in mean}
    acc, ece = (_known([cells.get("ia2-sft"), cells.get("sft")], field) for field in ("acc_mean", "ece_mean"))
    calibration = f", ECE {ece[0] - ece[1]:+.2f}" if len(ece) == 2 else ""
    return f"ia2-sft against sft: accuracy {100 * (acc[0] - acc[1]):+.1f} points{calibration}" if len(acc) == 2 else ""


def _text(cell: dict, metric: str) -> str:
    """The mean and, where there is one, (the standard deviation), written as in the paper's Table 1; the rate with its β."""
    if metric == "rate":
        return " β".join(f"{cell[key]:g}" for key in ("rate", "beta") if cell.get(key) is not None) or "–"
    known = _known([cell], f"{metric}_mean"), _known([cell], f"{metric}_std")
    mean, std = ([f"{100 * v:04.1f}" if metric == "acc" else f"{v:.2f}" for v in values] for values in known)
    return " ".join(mean + [f"({v})" for v in std]) or "–"


def _entries(cells, metrics: tuple[str, ...]) -> list[list[tuple[str, bool]]]:
    """(text, bold) of each metric for each cell: bold shows the same mean as the best trained method; empty where there is no cell."""
    trained = [c for c in cells if c and c["method"] not in UNTRAINED]
    best = {m: pick(known) for m, pick in (("acc", max), ("ece", min)) if (known := _known(trained, f"{m}_mean"))}
    shown = {m: _text({f"{m}_mean": value}, m) for m, value in best.items()}
    return [
        [(_text(c, m), c in trained and _text(c, m).split()[0] == shown.get(m)) if c else ("", False) for m in metrics]
        for c in cells
    ]


def _sections(document: dict) -> list[tuple]:
    """(title, header, blocks, gain) of each model, N and adapter; a block is (heading, lines), a line (text, bold) entries."""
    sections = []
    for (model, n, adapter), pairs in _groups(document).items():
        mean = _average(pairs)
        rows_of = {f"{task} → {evaluation}{'*' * ood}": rows for (task, evaluation, ood), rows in pairs.items()}
        rows_of |= {f"mean of {len(pairs)} evaluations": mean} if mean and len(pairs) > 1 else {}
        right, blocks = RIGHT if any(other for _, other in sum(pairs.values(), [])) else (), []
        for heading, rows in rows_of.items():
            cells, others = zip(*rows, strict=True)
            halves = zip(cells, _entries(cells, LEFT), _entries(others, right), strict=True)
            blocks.append((heading, [[(c["method"], False), *first, *second] for c, first, second in halves]))
        sets = max(cell.get("sets") or 0 for cell, _ in sum(pairs.values(), []))
        title = " · ".join(filter(None, [str(model), f"N = {n}", adapter, sets and f"{sets} set{'s' * (sets > 1)}"]))
        sections.append((title, ["method"] + [ARROWS.get(m, m) for m in LEFT + right], blocks, _gain(mean)))
    return sections


def _legend(document: dict, bold: bool = True) -> list[str]:
    sides = [text for choice, text in CHOICES.items() if choice in {c.get("selected_by") for c in document["cells"]}]
    sides = [f"left half: {sides[0]}", f"right half: {sides[1]}"] if len(sides) == 2 else sides
    signs = (
        "asim: similarity of attention outputs to ICL's; * out of distribution" + "; bold: best trained method" * bold
    )
    return ["mean (standard deviation) over sets of accuracy in % and expected calibration error", signs, *sides]


def _terminal(document: dict, color: bool) -> str:
    def paint(text, code):
        return f"\x1b[{code}m{text}\x1b[0m" if color and code and text.strip() else text

    out = []
    for title, header, blocks, gain in _sections(document):
        blocks = [(paint(title, "1"), [[(name, False) for name in header]]), *blocks]
        widths = [
            max(len(text) for text, _ in column)
            for column in zip(*(line for _, lines in blocks for line in lines), strict=True)
        ]
        for heading, lines in blocks:
            out.append(heading)
            for line in lines:
                padded = [
                    f"{text:{'>' if i else '<'}{w}}" for i, ((text, _), w) in enumerate(zip(line, widths, strict=True))
                ]
                left = [paint(text, "1" * bold) for text, (_, bold) in zip(padded, line[: len(LEFT) + 1], strict=False)]
                right = ["│", paint("  ".join(padded[len(left) :]), "2")] * (len(line) > len(left))
                out.append("  " + "  ".join(left + right).rstrip())
        out += [gain] * bool(gain) + [""]
    return "\n".join(out + [paint(line, "2") for line in _legend(document, bold=color)])


def _markdown(document: dict) -> str:
    escape, out = partial(re.sub, r"([\\`*_|<~\[\]])", r"\\\1"), []
    for title, header, blocks, gain in _sections(document):
        out += [
            f"**{escape(title)}**",
            "",
            f"| trained → evaluated | {' | '.join(header)} |",
            "|---|---|" + "---:|" * (len(header) - 1),
        ]
        rows = [[(heading, False), *line] for heading, lines in blocks for line in lines]
        out += [
            "| " + " | ".join(f"**{escape(text)}**" if bold else escape(text) for text, bold in row) + " |"
            for row in rows
        ]
        out += ["", *[gain, ""] * bool(gain)]
    return "\n".join(out + [escape("  \n".join(_legend(document)))])


def _latex(document: dict) -> str:
    """A table as the paper's Table 1 for each model, N, adapter and choice of rate; needs the package booktabs."""
    out = []
    for (model, n, adapter), pairs in _groups(document).items():
        rows = sum(pairs.values(), [])
        methods = list(dict.fromkeys(cell["method"] for cell, _ in rows))
        metrics = tuple(m for m in ("acc", "ece", "asim") if _known((cell for cell, _ in rows), f"{m}_mean"))
        for side in (0, 1)[: 1 + any(other for _, other in rows)]:
            chosen = [CHOICES[row[side]["selected_by"]] for row in rows if row[side] and row[side].get("selected_by")]
            caption = "; ".join(filter(None, [f"{model}, N = {n}", adapter, *chosen[:1], "* out of distribution"]))
            spans = [
                rf"\multicolumn{{{len(metrics)}}}{{c}}{{{METHODS.get(m, [m.translate(TEX)])[0]}}}" for m in methods
            ]
            out += [r"\begin{table}", r"\centering", rf"\caption{{{caption.translate(TEX)}}}"]
            out += [
                rf"\begin{{tabular}}{{ll{'r' * len(metrics) * len(methods)}}}",
                r"\toprule",
                rf"Source & Eval & {' & '.join(spans)} \\",
            ]
            out += [rf" & & {' & '.join(ARROWS[m] for m in metrics * len(methods))} \\", r"\midrule"]
            for (task, evaluation, ood), rows_of in pairs.items():
                cells = {
                    cell["method"]: cell if cell["method"] in UNTRAINED else (cell, other)[side]
                    for cell, other in rows_of
                }
                entries = [entry for line in _entries([cells.get(m) for m in methods], metrics) for entry in line]
                texts = [rf"\textbf{{{text}}}" if bold else text for text, bold in entries]
                out.append(" & ".join([task.translate(TEX), evaluation.translate(TEX) + "*" * ood, *texts]) + r" \\")
            out += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(out).translate({ord(c): TEX[ord(c)] for c in "–→↑↓"})


def _csv(document: dict) -> str:
    lists = {key for c in document["cells"] for key in c if isinstance(c[key], list)}
    fields = dict.fromkeys(key for c in document["cells"] for key in c if key not in lists)
    writer = csv.DictWriter(out := io.StringIO(), fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["cells"])
    return out.getvalue().rstrip("\n")


def table(document: dict, style: str = "terminal", color: bool = False) -> str:
    """Results like the paper's Table 1, at the rate of the lowest dev loss, then at the paper's choice: the best on the evaluation rows.

    `style`: terminal (ANSI bold and dim with `color`), markdown, latex or csv (every cell's numbers, unrounded); KeyError on another.
    """
    return (
        _terminal(document, color)
        if style == "terminal"
        else {"markdown": _markdown, "latex": _latex, "csv": _csv}[style](document)
    )


def seconds_line(document: dict) -> str:
    """Time by stage and in all, and peak memory: "collect 1.2 s · train 2.5 min · total 2.5 min · peak memory 0.52 GiB"."""
    seconds, peak = dict(document.get("seconds") or {}), document.get("peak_memory_bytes")
    seconds["total"] = seconds.pop("total", sum(seconds.values()))
    times = [f"{stage} {s:.1f} s" if s < 60 else f"{stage} {s / 60:.1f} min" for stage, s in seconds.items()]
    return " · ".join(times + ([f"peak memory {peak / 2**30:.2f} GiB"] if peak else []))


def _panels(figure, cells: list[dict]):
    """(axis, metric, scale) for accuracy and, where there is one, ECE."""
    metrics = [m for m in ("acc", "ece") if _known(cells, f"{m}_mean")]
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        axis.set_ylabel({"acc": "accuracy (%) ↑", "ece": "ECE ↓"}[metric])
        yield axis, metric, 100 if metric == "acc" else 1


def _draw_methods(figure, cells: list[dict], methods: dict):
    for axis, metric, scale in _panels(figure, cells):
        for method, style in methods.items():
            mine = [c for c in cells if c["method"] == method]
            if means := _known(mine, f"{metric}_mean"):
                spread = scale * fmean(_known(mine, f"{metric}_std") or [0])
                bar = axis.bar(
                    style["label"], scale * fmean(means), yerr=spread, error_kw={"lw": 0.8, "capsize": 3}, **style
                )
                axis.bar_label(bar, fmt="%.1f" if metric == "acc" else "%.2f", fontsize=8, padding=1)
        axis.set_xticks([])


def _draw_layers(figure, cells: list[dict], methods: dict):
    models = list(dict.fromkeys(c["model"] for c in cells))
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False, sharey=True)[0], models, strict=True):
        for method, style in methods.items():
            rows = np.array(
                [c["asim_layers"] for c in cells if (c["method"], c["model"]) == (method, model)]
            )  # [cells, L]
            if len(rows):
                layers, mean, std = range(1, rows.shape[1] + 1), rows.mean(0), rows.std(0)
                axis.plot(layers, mean, marker="o", ms=3, **style)
                axis.fill_between(layers, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
        axis.set(title=model, xlabel="layer", ylabel="asim with ICL" if model == models[0] else "")
        axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_scatter(figure, cells: list[dict], methods: dict):
    for axis, metric, scale in _panels(figure, cells):
        for method, style in methods.items():
            mine = [
                c for c in cells if c["method"] == method and _known([c], "asim_mean") and _known([c], f"{metric}_mean")
            ]
            if mine:
                x, y = [c["asim_mean"] for c in mine], [scale * c[f"{metric}_mean"] for c in mine]
                faces = ["white" if c["ood"] else style["color"] for c in mine]
                axis.scatter(x, y, s=16, alpha=0.7, facecolors=faces, edgecolors=style["color"])
                axis.scatter(fmean(x), fmean(y), s=110, marker="D", edgecolors="white", zorder=3, **style)
        axis.set_xlabel("asim with ICL")


def _draw_reliability(figure, cells: list[dict], methods: dict):
    curves, where = figure.subplots(1, 2)
    curves.plot([0, 1], [0, 1], color="#dddddd", zorder=0)
    for method, style in methods.items():
        rows, confidence, right = np.sum([c["reliability"] for c in cells if c["method"] == method], 0).T  # of each bin
        full = rows >= 0.005 * rows.sum()  # a bin of a few rows is noise
        curves.plot(confidence[full] / rows[full], right[full] / rows[full], marker="o", ms=3, **style)
        where.plot((np.arange(len(rows)) + 0.5) / len(rows), 100 * rows / rows.sum(), color=style["color"])
    curves.set(xlabel="confidence", ylabel="accuracy")
    where.set(xlabel="confidence", ylabel="rows (%)")


FIGURES = {  # name: what draws it, the field it needs, caption
    "methods": (
        _draw_methods,
        "acc_mean",
        "Means and standard deviations over sets, averaged over evaluations (paper Figure 1).",
    ),
    "asim_layers": (
        _draw_layers,
        "asim_layers",
        "Similarity to ICL by layer, mean and deviation over evaluations (paper Figure 2).",
    ),
    "asim_scatter": (
        _draw_scatter,
        "asim_mean",
        "A point an evaluation, hollow out of distribution; large: the mean (paper Figure 3).",
    ),
    "reliability": (
        _draw_reliability,
        "reliability",
        "Accuracy of rows with equal confidence, all sets and evaluations together.",
    ),
}


def figures(document: dict, folder) -> list[Path]:
    """The figures of the reported cells that have data, as PNG files in `folder`; none without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return []
    legend = {
        "frameon": False,
        "columnspacing": 1.2,
        "handlelength": 1.2,
        "handletextpad": 0.4,
        "loc": "outside upper center",
    }
    shown = {id(c): c for pairs in _groups(document).values() for rows in pairs.values() for c, _ in rows}.values()
    paths = []
    for name, (draw, field, _) in FIGURES.items():
        # the similarity of ICL to itself is 1
        if not (
            cells := [c for c in shown if c.get(field) is not None and not (c["method"] == "icl" and "asim" in field)]
        ):
            continue
        styles = {c["method"]: METHODS.get(c["method"], (c["method"], "#777777")) for c in cells}
        with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(figsize=(7, 3), dpi=160, layout="constrained")
            draw(figure, cells, {method: {"label": label, "color": color} for method, (label, color) in styles.items()})
            keys = {
                label: handle
                for axis in figure.axes
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
            figure.legend(keys.values(), keys.keys(), ncols=len(keys), **legend)
            paths.append(Path(folder) / f"{name}.png")
            write(
                paths[-1], lambda part, figure=figure: figure.savefig(part, format="png", metadata={"Software": None})
            )
    return paths


def html(document: dict, figures: list[Path]) -> str:
    """One self-contained page: the table, the seconds, the figures inlined, then the configuration and versions."""
    text = re.sub(r"\x1b\[(\d)m(.*?)\x1b\[0m", r"<span class=s\1>\2</span>", markup.escape(table(document, color=True)))
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in figures}
    shown = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{data}"><br>{FIGURES[name][2]}</p>'
        for name, data in images.items()
    )
    made = markup.escape(json.dumps({key: document.get(key) for key in ("config", "versions")}, indent=2, default=str))
    style = "body{font:15px sans-serif;margin:2em auto;max-width:60em}.s1{font-weight:bold}.s2{color:#888}img{max-width:100%}"
    return f"""<!doctype html><meta charset="utf-8"><title>ia2mini</title><style>{style}</style>
<pre>{text}</pre>
<p>{markup.escape(seconds_line(document))}</p>
{shown}
<details><summary>Configuration and versions</summary><pre>{made}</pre></details>
"""
