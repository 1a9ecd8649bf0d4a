"""What a person should know about a fitted adapter: a sentence, a small table, per-class figures, held-out rows."""

import math
import re
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UsageError
from ..adapters import LoRA
from ..files import json_line, plain, write_text
from ..metrics import ece, ece_null, row_losses, smooth_ece, smooth_ece_interval
from ..tasks import same_answer
from ..tasks.rows import Row, whole_number
from .page import lines, loading, section, shown, table, whole
from .summary import LABELS, count
from .tables import markdown

DRAWS = 1000  # resamples of the rows for an interval
HEADS = {"acc": "accuracy (%)", "ece": "ECE", "ece_null": "(null)", "brier": "Brier", "nll": "NLL"}


def measures(scores: Tensor, gold: Tensor, temperature: float, right: Tensor | None = None) -> dict:
    """Accuracy, ECE, Brier and NLL of held-out `scores` (`crossval.Candidate`), each with its 95 % bootstrap interval.

    Of text, `right` [n] says which answers were right, and only accuracy and NLL (a token) are known.
    """
    n, rng = len(scores), np.random.default_rng(0)
    draws = [np.arange(n), *rng.integers(n, size=(DRAWS, n))]
    if right is not None:
        rows = {"acc": right.double().numpy()}
    else:
        p = (scores.double() / temperature).softmax(-1)
        confidence, best = (t.numpy() for t in p.max(-1))
        correct = (best == gold.numpy()).astype(float)
        distance = ((p - torch.nn.functional.one_hot(gold, p.shape[1])) ** 2).sum(-1).numpy()
        rows = {"acc": correct, "brier": distance}
    rows["nll"] = row_losses(scores.double(), gold, temperature).numpy()
    found = {name: [values[draw].mean() for draw in draws] for name, values in rows.items()}
    if right is None:
        found["ece"] = [ece(confidence[draw], correct[draw]) for draw in draws]
    known: dict = {name: [float(v[0]), *map(float, np.quantile(v[1:], [0.025, 0.975]))] for name, v in found.items()}
    if right is None:
        raw = scores.double().softmax(-1).max(-1).values.numpy()
        known |= {
            "smooth_ece": [smooth_ece(confidence, correct), *smooth_ece_interval(confidence, correct)],
            "ece_null": ece_null(confidence),
            "ece_without_temperature": ece(raw, correct),
            "temperature": temperature,
        }
    return known


def classes(scores: Tensor, gold: Tensor, labels: tuple[str, ...]) -> dict:
    """Confusion matrix [true][said] and, for each label, its rows, precision and recall (None where undefined)."""
    said, C = scores.argmax(-1), len(labels)
    matrix = torch.bincount(gold * C + said, minlength=C * C).view(C, C)
    rows = []
    for c, label in enumerate(labels):
        hit, true, named = (int(x) for x in (matrix[c, c], matrix[c].sum(), matrix[:, c].sum()))
        about = {"label": label, "rows": true}
        rows.append(about | {"precision": hit / named if named else None, "recall": hit / true if true else None})
    return {"confusion": matrix.tolist(), "classes": rows}


def sentence(report: dict) -> str:
    """What a person should know, from the numbers."""
    found, chosen, n = report["candidates"], report["chosen"], report["rows"]

    def said(name: str) -> str:
        one = found[name]
        return f"{100 * one['acc'][0]:.0f} % right" + (f", ECE {one['ece'][0]:.2f}" if "ece" in one else "")

    if "kl" in report:
        text = f"{LABELS[chosen]} answers as the model that sees the context: {100 * found[chosen]['acc'][0]:.0f} % of"
        text += f" {count(n, 'held-out prompt')}, KL {report['kl'][chosen]:.2f} nats a token"
        text += f" (base {100 * found['base']['acc'][0]:.0f} %, {report['kl']['base']:.2f})"
        return f"{text}. A query costs {report['tokens']['query']:.0f} tokens instead of {report['tokens']['icl']:.0f}."
    others = [name for name in ("sft", "ia2-sft", "base") if name in found and name != chosen]
    beside = "; ".join(f"{LABELS[name]} {said(name)}" for name in others)
    beside += f"; ICL {said('icl')} at {report['tokens']['icl'] / max(1, report['tokens']['query']):.1f} × the tokens"
    text = f"{LABELS[chosen] if chosen != 'base' else 'No adapter'}: {said(chosen)} ({beside})."
    p = found[chosen]["acc"][0]
    chance = 100 * 1.96 * math.sqrt(2 * max(p * (1 - p), 1 / (n + 2)) / n)
    text += f" Over {count(n, 'row')} a difference of {chance:.0f} points may be chance."
    if chosen == "base":
        text += " Nothing that was trained is better than the base model, so none is shipped."
    if report.get("icl_behind"):
        less = "Demonstrations teach this model less than SFT does"
        taken = {"sft": ", and SFT was taken", "base": ""}
        text += f" {less}{taken.get(chosen, f'; still, {LABELS[chosen]} is surely right on more rows than SFT')}."
    if "probe" in found and found["probe"]["nll"][0] < found[chosen]["nll"][0]:
        text += f" A linear probe on the base's last hidden state would do better: {said('probe')}."
    return text


def write_fit_table(report: dict) -> str:
    """The short report for the terminal."""
    rows = measured(report)
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(f"{t:{'>' if i else '<'}{w}}" for i, (t, w) in enumerate(zip(r, widths))).rstrip() for r in rows]
    note = "95 % intervals by bootstrap" + "; *: shipped" * bool(report["chosen"])
    table.append(note + "; (null): the ECE that perfect calibration would show" * (HEADS["ece_null"] in rows[0]))
    return "\n".join([about(report), *table, "", report["sentence"], *report["remarks"]])


def measured(report: dict) -> list[list[str]]:
    """The table of the candidates: its heads, then a line for each, the shipped one marked."""
    known = [name for name in HEADS if any(name in one for one in report["candidates"].values())]
    heads = HEADS | ({"nll": "KL"} if "kl" in report else {})
    rows = [["", *map(heads.get, known)]]
    for name, one in report["candidates"].items():
        mark = " *" if name == report["chosen"] else ""
        rows.append([LABELS.get(name, name) + mark, *(entry(one.get(column), column) for column in known)])
    return rows


def entry(value, name: str) -> str:
    if value is None:
        return "–"
    if name == "ece_null":
        return f"{value:.2f}"
    factor, form = (100, ".0f") if name == "acc" else (1, ".2f")
    mean, low, high = (factor * v + 0.0 for v in value)  # no -0
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def write_fit_report(fitted, folder: Path, command: str) -> None:
    """report.html, held_out.jsonl (every row with what was said of it before it was trained on), the model card."""
    report = fitted.report
    write_text(folder / "held_out.jsonl", "".join(json_line(row) + "\n" for row in report["held_out"]))
    write_text(folder / "report.html", fit_page(report, command))
    write_text(folder / "README.md", card(fitted, folder, command))


def fit_page(report: dict, command: str) -> str:
    """The report as one HTML page."""
    heads, *rows = measured(report)
    results, notes = [table("Held-out rows, 95 % intervals by bootstrap; *: shipped", heads, rows, "means")], []
    chosen, tokens = report["candidates"][report["chosen"]], report["tokens"]
    if "temperature" in chosen:
        before, after = chosen["ece_without_temperature"], chosen["ece"][0]
        notes.append(f"One temperature, {chosen['temperature']:.2f}: ECE {before:.2f} before, {after:.2f} after.")
    notes.append(f"A query costs {tokens['query']:.0f} tokens; with demonstrations {tokens['icl']:.0f}.")
    results.append(lines([*notes, f"{report['seconds']:.0f} s in all."]))
    answers = []
    if "classes" in report:
        labels = [c["label"] for c in report["classes"]]
        rows = [[c["label"], c["rows"], share(c["precision"]), share(c["recall"])] for c in report["classes"]]
        answers.append(table("By answer", ["answer", "rows", "precision", "recall"], rows, "means"))
        rows = [[label, *row] for label, row in zip(labels, report["confusion"])]
        answers.append(table("Rows true, columns said", ["", *labels], rows, "means"))
    held = [[r["prompt"], r["true"], r["said"], f"{r['confidence']:.2f}"] for r in report["held_out"] if not r["right"]]
    wrong, heads = f"{count(len(held), 'held-out row')} answered wrong", ["prompt", "answer", "said", "confidence"]
    answers.append(table(wrong, heads, held, "text") if held else lines([wrong]))
    sections = [section("Candidates", results), section("Answers", answers)]
    sections.append(section("How this was made", [f"<pre>{shown(command)}</pre>", lines([about(report)])]))
    return whole(f"{report['name']}: fitted", report["sentence"], lines(report["remarks"]), sections)


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def about(report: dict) -> str:
    """Rows, model and folds in one line."""
    folds = [f"held out in {count(report['folds'], 'fold')}"] * bool(report["folds"])
    return " · ".join([report["name"], count(report["rows"], "row"), report["model"], *folds])


CARD = """---
library_name: {library}
{hub}tags: [ia2mini, {method}]
---

# {name}

{sentence}

Fitted by [ia2mini](https://arxiv.org/abs/2509.22621) {version}: {command}. Template, labels, temperature and held-out
numbers are in `ia2mini.json`, every held-out row in `held_out.jsonl`, the report in `report.html`.

The prompt is {template}{turn}; the answer follows it at once.

```
ia2mini predict {folder} NEW_ROWS
```

{code}"""


def card(fitted, folder: Path, command: str) -> str:
    """The model card."""
    spec, report, subject = fitted.spec, fitted.report, fitted.subject
    peft = fitted.adapter is not None
    text = {"library": "peft" if peft else "transformers", "method": spec["method"], "name": markdown(report["name"])}
    text |= {"hub": f"base_model: {subject.base}\n" if subject.revision else "", "sentence": report["sentence"]}
    text |= {"version": spec["versions"]["ia2mini"], "command": span(command), "template": span(repr(spec["template"]))}
    text |= {"turn": ", a turn of the chat template" if spec["chat"] else "", "code": code(fitted, str(folder), peft)}
    return CARD.format(**text, folder=plain(shlex.quote(str(folder)), ""))


def span(text: str) -> str:
    """A text in Markdown's backticks, more of them than it holds in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {plain(text, '')} {fence}" if "`" in text else f"{fence}{plain(text, '')}{fence}"


def code(fitted, folder: str, peft: bool) -> str:
    """How others load what was shipped: transformers, after it peft, and vLLM, which takes LoRA alone."""
    adapter, base, revision = fitted.adapter, fitted.subject.base, fitted.subject.revision
    source = repr(base) + f", revision={revision!r}" * bool(revision)
    dtype = str(next(fitted.subject.model.parameters()).dtype).removeprefix("torch.")  # it was fitted, and is right, in
    lines = ["```python", loading(source, folder if peft else None, f", dtype={dtype!r}"), "```", ""]
    if isinstance(adapter, LoRA) and base != "tiny":
        at = f" --revision {revision}" if revision else ""
        rank = f" --max-lora-rank {1 << (adapter.rank - 1).bit_length()}" if adapter.rank > 16 else ""
        modules = f"--lora-modules {shlex.quote(fitted.report['name'] + '=' + folder)}"
        lines += ["vLLM: " + span(f"vllm serve {shlex.quote(base)}{at} --enable-lora{rank} {modules}"), ""]
    return "\n".join(lines)


def score_rows(fitted, rows: list[Row], icl: bool, column: str | None = None) -> dict:
    """The report of an adapter (or of the base with demonstrations) on rows with answers."""
    spec, column = fitted.spec, column or fitted.spec.get("answer_column") or "label"
    if wrong := [row for row in rows if not str(row.get(column, "")).strip()]:
        there = ", ".join(map(repr, wrong[0]))
        raise UsageError(f"{wrong[0].where}: no answer in column {column!r} (of {there}); see --answer-column")
    true = [row.text(column) for row in rows]
    name = "icl" if icl else spec["method"]
    labels = spec["labels"]
    true = [text if text in labels else whole_number(text) for text in true]
    if unknown := [(row.where, text) for row, text in zip(rows, true) if labels and text not in labels]:
        (where, text), known = unknown[0], ", ".join(map(repr, labels))
        raise UsageError(f"{where}: answer {text!r} is none of the labels {known}")
    found = [answer for _, answer in fitted.answers(rows, icl)]
    if labels:
        gold = torch.tensor([labels.index(text) for text in true])
        scores = torch.tensor([answer["log_probabilities"] for answer in found], dtype=torch.float64)
        numbers = measures(scores, gold, 1.0)
    else:
        right = torch.tensor([same_answer(spec["parser"], f["answer"], text) for f, text in zip(found, true)])
        numbers = measures(torch.tensor([[f["confidence"]] for f in found]).log(), torch.zeros(0), 1.0, right)
        numbers.pop("nll")
    sentence = f"{LABELS.get(name, name)}: {100 * numbers['acc'][0]:.0f} % right."
    told = {"name": Path(rows[0].where.partition(":")[0]).stem, "model": fitted.subject.name, "rows": len(rows)}
    return told | {"folds": 0, "candidates": {name: numbers}, "chosen": None, "sentence": sentence, "remarks": []}
