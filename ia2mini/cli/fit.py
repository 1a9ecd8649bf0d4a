"""The command for one's own rows: fit."""

import math
import shlex
import shutil
from pathlib import Path

import click

from .. import UsageError
from ..engine.options import FitOptions
from ..engine.progress import progress
from ..files import plain, read_text
from ..scale import ranks
from .group import command_line, main
from .options import (
    column_options,
    compile_and_checkpoint,
    file_option,
    model_options,
    options_of,
    pop_options,
)
from .rows import print_remarks, refuse_unnamed_model

FEW = 30  # fewer rows are told to be few


@main.command()
@click.argument("rows", required=False, type=click.Path(path_type=Path), metavar="[ROWS]")
@model_options
@options_of(FitOptions)
@column_options
@click.option(
    "--labels/--text",
    "labelled",
    default=None,
    help="Treat the answers as labels or as free text.  [default: labels where they repeat]",
)
@file_option(
    "--unlabelled",
    help="Add rows without answers: the teacher answers them, and IA2 learns from these answers.",
)
@file_option(
    "--context",
    help="Put this text (an instruction, a policy) into the weights: the teacher sees it before every query.",
)
@file_option(
    "--prompts", help="Take the queries for --context from this file; they need no answers."
)
@file_option(
    "--out",
    help="Write into this folder; if the command is interrupted, it resumes there when it is typed again.",
    required=True,
)
def fit(rows, labelled, unlabelled, context, prompts, out, **given):
    """Fit an adapter to your own rows and measure it.

    ROWS is a JSONL, JSON, CSV, TSV, Excel or Parquet file, or a folder that `datasets` saved.

    \b
    Examples:
      ia2mini fit tickets.csv --model smollm2-135m-instruct --out tickets
      ia2mini fit --context policy.txt --prompts queries.jsonl \\
          --model llama-3.2-1b-instruct --chat --out policy

    Every method is cross-validated. An adapter is shipped if it is better than the base model on held-out rows, and
    significantly better than always giving the commonest answer. A linear probe, or demonstrations in the prompt, must
    be significantly better than the base, too. Otherwise nothing is shipped, and the report says what came closest.
    """
    from ..engine.subject import open_subject
    from ..fitting.crossval import check_number, check_options
    from ..fitting.fit import fit as fit_rows
    from ..fitting.folder import check_out_folder
    from ..fitting.rows import Columns, read_own
    from ..fitting.spec import SPEC
    from ..report.fit import fit_table, wrapped, write_fit_report
    from ..tasks.rows import as_rows

    check_out_folder(out, (rows, unlabelled, context, prompts))
    only_rows = rows is not None and context is None and prompts is None
    only_context = rows is None and context is not None and prompts is not None
    if not only_rows and not only_context:
        raise UsageError("give ROWS, or --context with --prompts")
    refuse_unnamed_model("ROWS" if only_rows else "--context")
    model_arguments = pop_options(given, "model", "device", "dtype", "revision", "check")
    if labelled is not None and only_context:
        raise UsageError("--labels and --text are about answers in ROWS; --context has none")
    answer_kind = {True: "labels", False: "text"}.get(labelled)
    columns = Columns(
        given.pop("prompt_column"), given.pop("answer_column"), given.pop("template"), answer_kind
    )
    options = FitOptions(**given, context=read_context(context) if only_context else "")
    own = as_rows(rows or prompts)
    # mistakes in rows and options show before a model is loaded
    complete, task = read_own(own, columns, only_context, options.chat)
    check_options(options, task)
    check_number([task.prompt_of(row) for row in complete])
    subject = open_subject(**model_arguments)
    compile_and_checkpoint(subject.model)
    few = few_rows_note(len(complete), len(task.labels)) if only_rows else []
    print_remarks([*task.remarks, *few, dtype_note(subject)])
    if (out / SPEC).is_file():
        print_remarks([f"{out}: holds an earlier fit, which is replaced when this one ends"])
    predictor = fit_rows(own, subject, options, columns, unlabelled or (), keep=out, bar=progress)
    ranks.stop()
    if not ranks.chief:
        return
    predictor.save(out)
    write_fit_report(predictor, out, command_line(), own)
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)
    click.echo(plain(fit_table(predictor.report, task.remarks)))
    click.echo(wrapped(f"{out}: {files_of(predictor, out)}"))
    click.echo(plain(next_step(predictor.report, out)))


def read_context(path: Path) -> str:
    text = read_text(path).replace("\r\n", "\n").strip()
    if not text:
        raise UsageError(f"{path}: the file is empty")
    return text


def files_of(predictor, out: Path) -> str:
    """The files in the folder of a fit, in words."""
    from ..report.fit import SUSPECTS

    kinds = {
        "base": "no adapter",
        "icl": "demonstrations",
        "icl-sft": "adapter and demonstrations",
        "probe": "probe.safetensors",
    }
    shipped = kinds.get(predictor.spec["method"], "adapter")
    files = [shipped, "ia2mini.json", "README.md", "report.html", "held_out.jsonl"]
    if (out / "decision.json").is_file():
        files.append("decision.json and its template (to serve it)")
    if (out / SUSPECTS).is_file():
        files.append(f"{SUSPECTS} (rows whose answers may be wrong)")
    return ", ".join(files)


def next_step(report: dict, out: Path) -> str:
    """What to type next."""
    from ..fitting.sentence import commonest_beats_base

    predict = f"ia2mini predict {shlex.quote(str(out))} NEW_ROWS"
    if report["chosen"] != "base":
        return f"next: {predict}"
    again = "next: add rows and type the same command again"
    if commonest_beats_base(report):
        return again
    return f"{again}, or let the model answer as it is: {predict}"


def few_rows_note(rows: int, labels: int) -> list[str]:
    """A line, before training, on how little few rows can show; for text `labels` is 0."""
    from ..fitting.sentence import ROWS_OF_A_LABEL

    if rows >= FEW:
        return []
    within = f"they measure accuracy to within about {margin(rows):.0f} points"
    note = f"{rows} rows are few: {within} (100 rows: {margin(100):.0f}). Only large differences between methods show"
    if labels:
        low, high = ROWS_OF_A_LABEL
        more = f"{low} to {high} rows of each label ({low * labels} to {high * labels})"
        note += f", and often nothing is shipped; {more} are better"
    return [note]


def margin(rows: int) -> float:
    """Half the width of a 95 % interval, in points, around 80 % right of so many rows (normal approximation)."""
    return 100 * 1.96 * math.sqrt(0.8 * 0.2 / rows)


def dtype_note(subject) -> str:
    """A line that says in which dtype the model computes, and what the other would bring."""
    from ..models.taps import device_of
    from ..scale.device import bfloat16_in_hardware

    note = f"{subject.name} computes in {subject.dtype}"
    if subject.dtype != "float32":
        return f"{note} (--dtype float32 is more exact)"
    if bfloat16_in_hardware(device_of(subject.model).type):
        note += " (--dtype bfloat16 is faster)"
    return note
