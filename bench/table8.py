"""`table8`: the paper's Table 8 of the studies in several run folders: is IA2→SFT better than SFT, N by N?"""

import math
from pathlib import Path

from ia2mini import UsageError
from ia2mini.files import read_json
from ia2mini.report.paper import table_8


def table8(folders: list[Path]) -> list[str]:
    """Lines of N, t, p and pairs for each kind of task, metric and choice of the rate. Raises UsageError."""
    documents = {str(folder): read_json(folder / "results.json") for folder in folders}
    try:
        found = table_8(documents)
    except (KeyError, TypeError, AttributeError):
        names = ", ".join(documents)
        raise UsageError(f"{names}: at least one results.json is not of `ia2mini run`; leave it out") from None
    if not found:
        raise UsageError("no cells of SFT and IA2→SFT with LoRA on true answers; Table 8 compares these")
    lines = [f"{'task':<14}{'metric':<8}{'rate by':<9}{'N':>4}{'t':>9}{'p':>12}{'pairs':>7}"]
    for kind, n, metric, by, test in found:
        tested = "–".rjust(9) + "–".rjust(12) if math.isnan(test.p) else f"{test.t:>9.4f}{test.p:>12.4g}"
        lines.append(f"{kind:<14}{metric:<8}{by:<9}{n:>4}{tested}{test.pairs:>7}")
    return lines + ["A pair is one set on one evaluation; pairs of one evaluation share its rows: not independent."]
