"""The sentences of `fit`: what is shipped, how good it is, how it compares, and what to do."""

import math

from ..engine.options import METHOD_NAMES
from ..files import plural
from ..methods import WITH_DEMONSTRATIONS
from .selection import SECOND_CHOICE

NAMES = METHOD_NAMES | {
    "commonest": "commonest answer",
    "shipped": "as shipped",
    "probe": "linear probe",
}
EXPLAINED = {  # what is shipped, where its name does not say enough
    "hidden": "hidden (IA2 on the residual stream) is shipped",
    "hidden-sft": "hidden→SFT (IA2 on the residual stream, then SFT) is shipped",
    "probe": "A linear probe on the base's last hidden state is shipped, without an adapter",
    "icl": "Demonstrations in the prompt (ICL) are shipped, without an adapter",
    "icl-sft": "Demonstrations in the prompt are shipped with an adapter that is fine-tuned to them (icl-sft)",
}
CHANCE = 0.1  # at this p-value and above a difference may be chance
# that are recommended. With 4, `fit` shipped nothing in 7 of 15 fits; with 8 in 4 of 20; with 16 in none of 6
ROWS_OF_A_LABEL = (8, 16)
MAX_NAMED = 10  # labels that are named
EACH = "each by a choice made on the other folds"


def sentence(report: dict) -> str:
    """The result of a fit in words, from the numbers of `make_report`."""
    sentences = [outcome(report)]
    if report["chosen"] != "base":
        sentences += differences(report)
        sentences += commonest_answer(report)
    sentences += never_right(report)
    sentences += query_cost(report)
    return " ".join(sentences)


def outcome(report: dict) -> str:
    """What is shipped and how good it is, or why nothing is shipped."""
    if report["chosen"] == "base":
        return nothing_shipped(report)
    if "kl" in report:
        return context_shipped(report)
    return shipped(report)


def shipped(report: dict) -> str:
    """What is shipped, and the held-out accuracy of the whole choice."""
    measures = report["shipped"]
    calibration = f", ECE {measures['ece']:.2f}" if "ece" in measures else ""
    rows = plural(report["rows"], "held-out row")
    right = f"{with_interval(measures['acc'])} of {rows} right{calibration}"
    return f"{opening(report)}: {right}, {EACH}."


def opening(report: dict) -> str:
    """What is shipped."""
    chosen = report["chosen"]
    words = EXPLAINED.get(chosen, f"{NAMES[chosen]} is shipped")
    return f"{words}, as requested" if report["wanted"] else words


def context_shipped(report: dict) -> str:
    """The same for a context."""
    measures = report["shipped"]
    prompts = plural(report["rows"], "held-out prompt")
    kl = f"KL {measures['nll'][0]:.2f} nats a token (base {report['kl']['base']:.2f})"
    distance = f"{kl} from the model that sees the context"
    same = f"word for word its answer on {with_interval(measures['acc'])} of {prompts}"
    return f"{opening(report)}: {distance}, {same}, {EACH}."


def nothing_shipped(report: dict) -> str:
    """Why nothing is shipped, and what to do."""
    candidates = report["candidates"]
    tried = [NAMES[name] for name in candidates if name not in ("base", "commonest")]
    if "kl" in report:
        tried.remove(NAMES["icl"])
    verb = "was" if len(tried) == 1 else "were"
    opening = f"Nothing is shipped. {join_names(tried)} {verb} tried"
    rows = plural(report["rows"], "held-out row")
    base = percent(candidates["base"]["acc"][0])
    if "commonest" in candidates:
        second = join_names([NAMES[name] for name in candidates if name in SECOND_CHOICE])
        return (
            f"{opening}; on {rows} none was both better than the base ({base} right; "
            f"{second} must be significantly better) and significantly better than always giving the commonest "
            f"answer ({percent(candidates['commonest']['acc'][0])}). "
            f"{bad_base(report)}{nearest_candidate(report)}{help_for(report)}"
        )
    lower = f"{opening}; on {rows} none had a significantly lower loss than the base ({base}"
    if "kl" in report:
        agreed = "in agreement with the model that sees the context"
        return f"{lower} {agreed}) and was in agreement on more. {help_for(report)}"
    if any(candidate["acc"][0] for candidate in candidates.values()):
        return f"{lower} right) and was right on more. {help_for(report)}"
    none = f"{opening}; none gave any held-out answer exactly"
    if report["all_differ"]:
        return f"{none}, so held-out rows cannot judge answers that all differ."
    return f"{none}. {help_for(report)}"


def help_for(report: dict) -> str:
    """What may help where nothing is shipped."""
    rows_of_labels = [row["rows"] for row in report.get("classes", [])]
    low, high = ROWS_OF_A_LABEL
    more = "more rows"
    if rows_of_labels and min(rows_of_labels) < high:
        more = f"more rows ({low} to {high} of each label)"
    return f"What may help: {more}, or a larger model."


def bad_base(report: dict) -> str:
    """A warning of a base that is worse than the commonest answer."""
    if not commonest_beats_base(report):
        return ""
    return "The base is worse than always giving the commonest answer: do not use it either. "


def commonest_beats_base(report: dict) -> bool:
    """Whether nothing is shipped, and the base is worse than always giving the commonest answer."""
    candidates = report["candidates"]
    if report["chosen"] != "base" or "commonest" not in candidates:
        return False
    return candidates["commonest"]["acc"][0] > candidates["base"]["acc"][0]


def nearest_candidate(report: dict) -> str:
    """The best candidate that is not shipped, and how to ship it anyway."""
    if not report["nearest"]:
        return ""
    name, gained, lost, p = report["nearest"]
    rows = f"against the base {plural(gained, 'row')} gained, {lost} lost ({p_value(p)})"
    candidate = "The linear probe" if name == "probe" else NAMES[name]
    return f"{candidate} has the lowest loss; {rows}, which may be chance. `--ship {name}` ships it anyway. "


def differences(report: dict) -> list[str]:
    """Compare the shipped model with base, ICL and SFT, row by row."""
    sentences = []
    for name, (gained_rows, lost_rows, p) in report["against"].items():
        beside = f"Compared with {named_with_accuracy(name, report)}"
        if gained_rows == lost_rows == 0:
            sentences.append(f"{beside}: right on the same rows.")
            continue
        gained = f"{plural(gained_rows, 'row')} gained" if gained_rows else "no row gained"
        lost = f"{lost_rows} lost" if lost_rows else "none lost"
        chance = ": it may be chance" if p >= CHANCE else ""
        if chance and name in report.get("lower_loss", ()):
            chance += ", but its loss is significantly lower"
        sentences.append(f"{beside}: {gained}, {lost} ({p_value(p)}{chance}).")
    return sentences


def named_with_accuracy(name: str, report: dict) -> str:
    """A rival with its accuracy; for demonstrations also their cost in tokens."""
    right = percent(report["candidates"][name]["acc"][0])
    if name != "icl":
        return f"{NAMES[name]} ({right})"
    tokens = report["tokens"]["icl"] / max(1, report["tokens"]["query"])
    return f"{NAMES[name]} ({right} at {tokens:.1f} × the tokens)"


def commonest_answer(report: dict) -> list[str]:
    """The accuracy of always giving the commonest answer, and a warning where that is better."""
    if "commonest" not in report["candidates"]:
        return []
    right = report["candidates"]["commonest"]["acc"][0]
    sentences = [f"Always giving the commonest answer: {percent(right)}."]
    if report["shipped"]["acc"][0] < right:
        sentences.append("That is better: do not rely on what is shipped. More rows may help.")
    return sentences


def never_right(report: dict) -> list[str]:
    """The labels that were never right on held-out rows."""
    missed = []
    for row in report.get("classes", []):
        if row["rows"] and not row["recall"]:
            missed.append(repr(row["label"]))
    if len(missed) > MAX_NAMED:
        missed = [*missed[:MAX_NAMED], f"{len(missed) - MAX_NAMED} more"]
    return [f"Never answered correctly: {join_names(missed)}."] if missed else []


def query_cost(report: dict) -> list[str]:
    """The tokens of a query."""
    query = f"{report['tokens']['query']:.0f}"
    icl = f"{report['tokens']['icl']:.0f}"
    if report["chosen"] in WITH_DEMONSTRATIONS:
        return [f"A query costs {icl} tokens instead of {query}."]
    return [f"A query costs {query} tokens instead of {icl}."] if "kl" in report else []


def join_names(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def with_interval(value: list[float]) -> str:
    """A share with its interval, if it has one: "83 % (63 to 95)"."""
    mean, low, high = value
    if low is None or math.isnan(low):
        return percent(mean)
    return f"{percent(mean)} ({100 * low:.0f} to {100 * high:.0f})"


def p_value(p: float) -> str:
    """ "p = .12", with few digits."""
    if p < 0.001:
        return "p < .001"
    digits = 3 if p < 0.01 else 2
    return f"p = {p:.{digits}f}".replace("0.", ".", 1)
