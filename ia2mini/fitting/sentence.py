"""What `fit` tells a person in a few sentences: what is shipped, what it is worth, beside what, and what to do."""

import math

from ..engine.options import LABELS
from ..files import count

NAMES = LABELS | {"commonest": "commonest answer", "shipped": "as shipped", "probe": "linear probe"}
CHANCE = 0.1  # a p-value from which on a difference may be chance
HELP = "What may help: more rows, or a larger model."
NAMED = 10  # labels that are named
EACH = "each by a choice made on the other folds"


def sentence(report: dict) -> str:
    """The outcome in words, from the numbers of `fitting.make_report`."""
    told = [outcome(report)]
    if report["chosen"] != "base":
        told += differences(report)
    return " ".join([*told, *others(report), *never_right(report), *price(report)])


def outcome(report: dict) -> str:
    """What is shipped and what it is worth, or why nothing is shipped."""
    if report["chosen"] == "base":
        return nothing(report)
    if "kl" in report:
        return context_shipped(report)
    return shipped(report)


def shipped(report: dict) -> str:
    """What is shipped, and what held-out rows say of the whole choice."""
    worth, chosen = report["shipped"], report["chosen"]
    what = f"{NAMES[chosen]} is shipped"
    if chosen == "probe":
        what = "A linear probe on the base's last hidden state is shipped, without an adapter"
    if chosen == "icl":
        what = "Demonstrations in the prompt (ICL) are shipped, without an adapter"
    if report.get("wanted"):
        what += ", as requested"
    sure = f", ECE {worth['ece']:.2f}" if "ece" in worth else ""
    return f"{what}: {percent(worth['acc'])} of {count(report['rows'], 'held-out row')} right{sure}, {EACH}."


def context_shipped(report: dict) -> str:
    """The same of a context."""
    worth, chosen = report["shipped"], report["chosen"]
    text = f"{NAMES[chosen]} is shipped: it answers as the model that sees the context on {percent(worth['acc'])}"
    text += f" of {count(report['rows'], 'held-out prompt')}, KL {worth['nll'][0]:.2f} nats a token"
    return f"{text} (base {report['kl']['base']:.2f}), {EACH}."


def nothing(report: dict) -> str:
    """Why nothing is shipped, and what to do."""
    found, rows = report["candidates"], count(report["rows"], "held-out row")
    tried = [NAMES[name] for name in found if name not in ("base", "commonest")]
    if "kl" in report:
        tried.remove(NAMES["icl"])
    verb = "was" if len(tried) == 1 else "were"
    what = f"Nothing is shipped. {listed(tried)} {verb} tried"
    if "commonest" in found:
        base, commonest = (found[name]["acc"][0] for name in ("base", "commonest"))
        than = f"the base ({share(base)} right) and significantly better than always giving the commonest answer"
        warning = ""
        if commonest > base:
            warning = (
                "The base is worse than always giving the commonest answer: do not use it either. "
            )
        return f"{what}; on {rows} none was both better than {than} ({share(commonest)}). {warning}{near(report)}{HELP}"
    if "kl" not in report and not any(one["acc"][0] for one in found.values()):
        judged = (
            "so held-out rows cannot judge answers that all differ"
            if report["all_differ"]
            else HELP.lower()
        )
        return f"{what}; none gave any held-out answer exactly, {judged.rstrip('.')}."
    agreed = "in agreement with the model that sees the context" if "kl" in report else "right"
    than = f"the base ({share(found['base']['acc'][0])} {agreed})"
    failed = f"none had a significantly lower loss than {than} and was {agreed.split()[0]} on more"
    return f"{what}; on {rows} {failed}. {HELP}"


def near(report: dict) -> str:
    """Which candidate came nearest, and how to have it all the same."""
    if not report.get("nearest"):
        return ""
    name, more, less, p = report["nearest"]
    rows = f"against the base {count(more, 'row')} gained, {less} lost ({probability(p)})"
    return f"{NAMES[name]} has the lowest loss; {rows}, which may be chance. `--ship {name}` ships it anyway. "


def differences(report: dict) -> list[str]:
    """What is shipped against base, ICL and SFT, row by row."""
    told = []
    for name, (more, less, p) in report["against"].items():
        beside = f"Compared with {against(name, report)}"
        if more == less == 0:
            told.append(f"{beside}: right on the same rows.")
            continue
        gained = f"{count(more, 'row')} gained" if more else "no row gained"
        lost = f"{less} lost" if less else "none lost"
        chance = ": it may be chance" if name == "base" and p >= CHANCE else ""
        told.append(f"{beside}: {gained}, {lost} ({probability(p)}{chance}).")
    return told


def against(name: str, report: dict) -> str:
    """A rival with its share of right rows; of demonstrations also what they cost."""
    said = f"{NAMES[name]} ({share(report['candidates'][name]['acc'][0])}"
    if name == "icl":
        said += (
            f" at {report['tokens']['icl'] / max(1, report['tokens']['query']):.1f} × the tokens"
        )
    return f"{said})"


def others(report: dict) -> list[str]:
    """What else a reader should know: the commonest answer."""
    found = report["candidates"]
    if "commonest" in found and report["chosen"] != "base":
        return [f"Always giving the commonest answer: {share(found['commonest']['acc'][0])}."]
    return []


def never_right(report: dict) -> list[str]:
    """The labels that no held-out row was rightly given."""
    missed = [
        repr(one["label"]) for one in report.get("classes", []) if one["rows"] and not one["recall"]
    ]
    if len(missed) > NAMED:
        missed = [*missed[:NAMED], f"{len(missed) - NAMED} more"]
    return [f"Never answered correctly: {listed(missed)}."] if missed else []


def price(report: dict) -> list[str]:
    """What a query costs in tokens."""
    if "tokens" not in report:
        return []
    query, icl = (f"{report['tokens'][name]:.0f}" for name in ("query", "icl"))
    if report["chosen"] == "icl":
        return [f"A query costs {icl} tokens instead of {query}."]
    return [f"A query costs {query} tokens instead of {icl}."] if "kl" in report else []


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def percent(value: list[float]) -> str:
    """A share with its interval, if it has one: "83 % (63 to 95)"."""
    mean, low, high = value
    if low is None or math.isnan(low):
        return share(mean)
    return f"{share(mean)} ({100 * low:.0f} to {100 * high:.0f})"


def probability(p: float) -> str:
    """ "p = .12", as few digits as tell something."""
    if p < 0.001:
        return "p < .001"
    digits = 3 if p < 0.01 else 2
    return f"p = {p:.{digits}f}".replace("0.", ".", 1)
