"""docs/rivals.md: the tables and sentences between its two marks, from the kept results of `python -m bench rivals`."""

import json
from pathlib import Path
from statistics import fmean

from ia2mini import UsageError
from ia2mini.engine.intervals import LEAST_ROWS, PairedTest, paired_test

from .cost_page import number, table_head, table_row
from .report import RESULTS, newest
from .studies.rivals import NAMES, cell_of

PAGE = Path(__file__).parents[1] / "docs/rivals.md"
BEGIN = "<!-- from here on written by `python -m bench rivals --page` -->"
END = "<!-- until here -->"
TITLES = {"sst2": "SST2", "ag_news": "AG News", "financial_phrasebank": "Financial PhraseBank"}
OURS = NAMES["shipped"]
THEIRS = NAMES["setfit"]
NONE = "No result is kept in bench/results yet: `python -m bench rivals --save` measures one."
SURE = 0.05
# what is compared with SetFit: digits, and whether more is better
COMPARED = {
    "% accuracy": (".1f", True),
    "% macro-F1": (".1f", True),
    "NLL": (".2f", False),
    "ECE": (".2f", False),
}
COSTS = ("ms a row alone", "ms a row in batch", "MB shipped", "MB with its base")


class Table:
    """Every rival's numbers in every cell of one kept result."""

    def __init__(self, lines: list[dict]):
        self.rates: dict[tuple, dict[str, dict]] = {}  # cell -> rival -> numbers
        self.shipped: list[str] = []
        for line in lines:
            cell = cell_of(line["what"])
            self.rates.setdefault(cell, {})[line["stack"]] = line["rates"]
            if line["stack"] == OURS:
                self.shipped.append(line["note"].removeprefix("ships "))
        self.tasks = list(dict.fromkeys(task for task, _, _ in self.rates))
        self.sizes = sorted({size for _, size, _ in self.rates})
        self.rivals = [name for name in NAMES.values() if self.values(name, "% accuracy")]

    def cells(self, task: str | None = None, size: int | None = None) -> list[tuple]:
        """The cells of a data set and size; None: of all."""
        return [cell for cell in self.rates if task in (None, cell[0]) and size in (None, cell[1])]

    def values(self, rival: str, rate: str, task=None, size=None) -> list[float]:
        every = (self.rates[cell].get(rival) for cell in self.cells(task, size))
        return [rates[rate] for rates in every if rates]

    def difference(self, rate: str, task=None, size=None) -> PairedTest:
        """What fit ships minus SetFit, over the cells that have both."""
        ours = []
        theirs = []
        for cell in self.cells(task, size):
            rivals = self.rates[cell]
            if OURS in rivals and THEIRS in rivals:
                ours.append(rivals[OURS][rate])
                theirs.append(rivals[THEIRS][rate])
        return paired_test(ours, theirs)


def page(text: str, folder: Path = RESULTS) -> str:
    """The page's text with what lies between its marks written anew. Raises UsageError without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{PAGE}: lacks the line {END if begin else BEGIN}")
    return "\n".join([before + BEGIN, "", *found(folder), END]) + after


def found(folder: Path) -> list[str]:
    """The newest kept result of every model, each with its tables."""
    paths = newest("*-rivals-*.json", folder).values()
    if not paths:
        return [NONE, ""]
    return [text for path in paths for text in section(json.loads(path.read_text()), path.name)]


def section(document: dict, file: str) -> list[str]:
    """What one model's results say."""
    result = document["results"][0]
    machine = document["hardware"]
    out = [f"## {result['about'].partition(':')[0]}", "", *tables(result)]
    cores = f"{machine['cores']} cores, {machine['threads']} threads, {machine['cpu']}"
    out += [f"`{document['command']}`, {document['date']}, {cores}; `bench/results/{file}`.", ""]
    out += [f"{result['about']}. {result['remarks'][0]}.", ""]
    return out


def tables(result: dict) -> list[str]:
    """The answer in sentences, then the numbers, of one result as JSON has it."""
    table = Table(result["lines"])
    out = [*answer(table), ""]
    for task in table.tasks:
        out += [f"### {TITLES.get(task, task)}", "", *accuracies(table, task), ""]
    if table.difference("ECE").pairs:
        out += ["### What `fit` ships minus SetFit", "", *differences(table), ""]
    return out + ["### What it costs", "", *costs(table), ""]


def accuracies(table: Table, task: str) -> list[str]:
    """One data set: mean accuracy by rows a class with its interval over draws, the rest over all sizes."""
    sizes = [f"accuracy (%), {size} a class" for size in table.sizes]
    out = table_head("", *sizes, "macro-F1 (%)", "NLL", "ECE (null)")
    for rival in table.rivals:
        entries = [
            mean_of_draws(table.values(rival, "% accuracy", task, size)) for size in table.sizes
        ]
        f1, nll, ece, null = (
            mean(table.values(rival, rate, task), form)
            for rate, form in (
                ("% macro-F1", ".1f"),
                ("NLL", ".2f"),
                ("ECE", ".2f"),
                ("ECE null", ".2f"),
            )
        )
        out.append(table_row(rival, *entries, f1, nll, f"{ece} ({null})"))
    return out


def mean(values: list[float], form: str) -> str:
    return f"{fmean(values):{form}}" if values else "–"


def mean_of_draws(values: list[float]) -> str:
    """Mean, and Student's 95 % interval of it where there are draws enough."""
    if not values:
        return "–"
    test = paired_test(values, [0.0] * len(values))
    if test.low != test.low:  # NaN: too few draws, or all alike
        return f"{test.mean:.1f}"
    return f"{test.mean:.1f} ({test.low:.1f} to {test.high:.1f})"


def differences(table: Table) -> list[str]:
    """Paired differences over all cells, those of a data set and those of a size."""
    groups = {"all": (None, None)}
    groups |= {TITLES.get(task, task): (task, None) for task in table.tasks}
    if len(table.sizes) > 1:
        groups |= {f"{size} a class": (None, size) for size in table.sizes}
    out = table_head("", "pairs", "accuracy (points)", "macro-F1 (points)", "NLL", "ECE")
    for name, (task, size) in groups.items():
        entries = []
        for rate, (form, _) in COMPARED.items():
            test = table.difference(rate, task, size)
            entries.append(with_interval(test, form))
        out.append(table_row(name, str(test.pairs), *entries))
    return out


def with_interval(test: PairedTest, form: str) -> str:
    if not test.pairs:
        return "–"
    text = f"{test.mean:+{form}}"
    if test.p == test.p:
        text += f" ({test.low:+{form}} to {test.high:+{form}}, p = {test.p:.2g})"
    return text


def costs(table: Table) -> list[str]:
    """Seconds of training by rows a class, milliseconds a prediction and megabytes, means over all cells."""
    sizes = [f"s of training, {size} a class" for size in table.sizes]
    out = table_head("", *sizes, *COSTS)
    for rival in table.rivals:
        means = [mean_or_none(table.values(rival, "s training", size=s)) for s in table.sizes]
        means += [mean_or_none(table.values(rival, name)) for name in COSTS]
        out.append(table_row(rival, *means))
    return out


def mean_or_none(values: list[float]) -> str:
    return number(fmean(values)) if values else "–"


def answer(table: Table) -> list[str]:
    """Why not SetFit, in sentences that the numbers decide."""
    if not table.difference("ECE").pairs:
        return ["SetFit was not measured here."]
    cells = table.difference("ECE").pairs
    if cells < LEAST_ROWS:
        return [f"Too few cases to tell whether `fit` or SetFit is better: {cells}."]
    out = []
    wins = {"more": [], "less": [], "": []}
    for task in table.tasks:
        verdict = sure(table.difference("% accuracy", task), True)
        wins[verdict].append(TITLES.get(task, task))
    called = {
        "more": "What `fit` ships is significantly more accurate than SetFit (p < .05) on",
        "less": "It is significantly less accurate on",
        "": "The accuracy of what `fit` ships and of SetFit does not differ significantly on",
    }
    for verdict, tasks in wins.items():
        if tasks:
            out.append(f"- {called[verdict]}: {', '.join(tasks)}.")
    out += [f"- {compared_loss(table, rate)}" for rate in ("NLL", "ECE")]
    out.append(f"- {compared_cost(table)}")
    out.append(f"- {shipped(table)}")
    out.append(f"- {advice(wins)}")
    return out


def sure(test: PairedTest, more_is_better: bool) -> str:
    """ "more" or "less" good where that is no chance, else ""."""
    if not test.p < SURE:  # also of too few pairs
        return ""
    return "more" if (test.mean > 0) == more_is_better else "less"


def compared_loss(table: Table, rate: str) -> str:
    ours = mean(table.values(OURS, rate), ".2f")
    theirs = mean(table.values(THEIRS, rate), ".2f")
    verdict = sure(table.difference(rate), False)
    words = {
        "more": "significantly lower",
        "less": "significantly higher",
        "": "the difference is not significant",
    }
    text = f"Mean {rate}: {ours} for what `fit` ships, {theirs} for SetFit; {words[verdict]}"
    if rate == "ECE":
        null = mean(table.values(OURS, "ECE null"), ".2f")
        text += f". A calibrated model with the same confidences as `fit` would show {null}"
    return text + "."


def compared_cost(table: Table) -> str:
    said = []
    for name, rate in (
        ("training", "s training"),
        ("one row alone", "ms a row alone"),
        ("a row in a batch", "ms a row in batch"),
    ):
        ratio = fmean(table.values(OURS, rate)) / fmean(table.values(THEIRS, rate))
        said.append(f"{name} {ratio:.2g} ×")
    ours = number(fmean(table.values(OURS, "MB with its base")))
    theirs = number(fmean(table.values(THEIRS, "MB with its base")))
    times = f"In multiples of SetFit's time, `fit` needs: {', '.join(said)}"
    return f"{times}. On disk, with the base model, it needs {ours} MB; SetFit needs {theirs}."


def shipped(table: Table) -> str:
    times = {name: table.shipped.count(name) for name in table.shipped}
    listed = ", ".join(f"{name} {count}" for name, count in times.items())
    return f"What `fit` shipped in {len(table.shipped)} cases: {listed} (base: the model as it is)."


def advice(wins: dict[str, list[str]]) -> str:
    """When to use what, as far as accuracy says it."""
    said = []
    if wins["more"]:
        said.append(f"take `fit` for tasks like {', '.join(wins['more'])}")
    if wins["less"]:
        said.append(f"take SetFit for tasks like {', '.join(wins['less'])}")
    if wins[""]:
        rest = ", ".join(wins[""])
        said.append(f"for tasks like {rest} decide by the other lines of this list")
    text = "; ".join(said)
    return f"Advice for this model: {text}."
