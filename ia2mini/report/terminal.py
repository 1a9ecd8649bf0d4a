"""The table in the terminal: one screen, the mean first, every evaluation only when asked for."""

from .summary import LABELS, average, count, parts, verdict

COLUMNS = ("acc", "ece", "ece_null", "asim", "rate")
HEADS = {"acc": "accuracy (%) ↑", "ece": "ECE ↓", "ece_null": "(null)", "asim": "asim ↑", "rate": "rate"}


def write_table(document: dict, full: bool = False, color: bool = False) -> str:
    """A study's results: of each model, N and choice of rate the mean over evaluations and what IA2 brought.

    With `full`, every evaluation too. `color`: ANSI codes.
    """

    def paint(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if color and text else text

    out = []
    for part in parts(document):
        cells, mean = part["cells"], average(part["cells"])
        evaluations = {(c["task"], c["eval"], c["ood"]): [] for c in cells}
        for cell in cells:
            evaluations[cell["task"], cell["eval"], cell["ood"]].append(cell)
        heading = f"mean of {count(len(evaluations), 'evaluation')}"
        blocks = [(heading, mean)] if mean else []
        if full and len(evaluations) > 1 or not mean:
            blocks += [(f"{task} → {name}{'*' * ood}", rows) for (task, name, ood), rows in evaluations.items()]
        columns = [
            c for c in COLUMNS if c == "rate" or any(r.get(f"{c}_mean") is not None for _, b in blocks for r in b)
        ]
        lines = [["", *(HEADS[c] for c in columns)]]
        for _, rows in blocks:
            lines += [[LABELS.get(row["method"], row["method"]), *(entry(row, c) for c in columns)] for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines = [
            "  ".join(f"{t:{'>' if i else '<'}{w}}" for i, (t, w) in enumerate(zip(line, widths))) for line in lines
        ]
        out += [paint(part["title"], "1"), paint(lines.pop(0).rstrip(), "2")]
        for heading, rows in blocks:
            out.append(heading)
            marked = [LABELS.get(row["method"]) == LABELS["ia2-sft"] for row in rows]
            out += [paint(lines.pop(0).rstrip(), "1") if bold else lines.pop(0).rstrip() for bold in marked]
        out += [paint(line, "1" if i == 0 else "33") for i, line in enumerate(verdict(cells))] + [""]
    return "\n".join(out + [paint(line, "2") for line in legend(document)])


def entry(row: dict, column: str) -> str:
    """Mean ± standard deviation over sets, or the rate with its β."""
    if column == "rate":
        return " β ".join(f"{row[key]:g}" for key in ("rate", "beta") if row.get(key) is not None) or "–"
    mean, std = row.get(f"{column}_mean"), row.get(f"{column}_std")
    if mean is None:
        return "–"
    if column == "acc":
        return f"{100 * mean:.1f} ± {100 * std:.1f}"
    return f"{mean:.2f}" if column in ("ece_null", "asim") else f"{mean:.2f} ± {std:.2f}"


def legend(document: dict) -> list[str]:
    sets = max(cell["sets"] for cell in document["cells"])
    lines = [f"mean ± standard deviation over {count(sets, 'set')}"]
    if any(c.get("ece_mean") is not None for c in document["cells"]):
        lines[0] += "; (null): the ECE that perfect calibration would show on these rows"
    lines.append("asim: likeness of attention outputs to those with demonstrations")
    if any(c["ood"] for c in document["cells"]):
        lines[-1] += "; means include evaluations out of distribution (*)"
    return lines


def seconds_line(document: dict) -> str:
    """Time by stage and in all, and peak memory: "collect 1.2 s · train 2.5 min · total 2.5 min · peak memory 0.5 GiB"."""
    seconds, peak = dict(document.get("seconds") or {}), document.get("peak_memory_bytes")
    seconds["total"] = sum(seconds.values())
    times = [f"{stage} {s:.1f} s" if s < 60 else f"{stage} {s / 60:.1f} min" for stage, s in seconds.items()]
    return " · ".join(times + ([f"peak memory {peak / 2**30:.2f} GiB"] if peak else []))
