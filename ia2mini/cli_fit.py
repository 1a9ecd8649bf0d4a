"""The practitioner's commands: fit, predict, score, merge."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from . import UsageError
from .cli import file_option, load_subject, main, many, model_options, options_of, prepare, progress
from .options import FitOptions

COLUMNS = "  [default: guessed from the header]"
column_options = many(
    click.option("--prompt-column", help=f"what is asked{COLUMNS}"),
    click.option("--answer-column", help=f"what is answered{COLUMNS}"),
    click.option("--template", help="prompt, columns in braces  [default: 'Text:{text}\\nLabel:']"),
)
adapter_options = many(
    click.argument("adapter", type=click.Path(path_type=Path, exists=True, file_okay=False)),
    click.option("--model", help="base model  [default: the one it was fitted on]"),
    click.option("--device", help="cpu, cuda, cuda:1 …  [default: a GPU if there is one]"),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="of frozen weights"),
)


@main.command()
@click.argument("rows", type=click.Path(path_type=Path), metavar="ROWS")
@model_options
@options_of(FitOptions)
@column_options
@file_option("--unlabelled", "more rows without answers: the teacher answers them, IA2 learns from them too")
@file_option("--out", "folder of the adapter; the same command goes on where it was", required=True)
def fit(rows, model, device, dtype, revision, prompt_column, answer_column, template, unlabelled, out, **given):
    """Fit an adapter to your own ROWS (JSONL, JSON, CSV, TSV, Parquet), and say what it is worth.

    \b
      ia2mini fit tickets.csv --model llama-3.2-1b --out tickets
      ia2mini predict tickets new.csv > answers.jsonl

    Every method and rate is cross-validated side by side; the one with the lowest held-out loss is trained on all rows.
    Where nothing beats the base model, no adapter is shipped.
    """
    from .fit import Columns, read_own
    from .fit import fit as fit_rows
    from .report.fit import write_fit_report, write_fit_table

    columns = Columns(prompt_column, answer_column, template)
    read_own(rows, columns)  # its mistakes show before a model is loaded
    subject = load_subject(model, device, dtype, revision)
    prepare(subject.model, None, False)
    fitted = fit_rows(rows, subject, FitOptions(**given), columns, unlabelled or (), keep=out, bar=progress)
    fitted.save(out)
    write_fit_report(fitted, out, " ".join(["ia2mini", *sys.argv[1:]]))
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)
    click.echo(write_fit_table(fitted.report))
    click.echo(f"{out}: adapter, ia2mini.json, README.md, report.html, held_out.jsonl")
    click.echo(f"next: ia2mini predict {out} NEW_ROWS")


def read_new(rows: str, strict: bool) -> Iterator:
    """Rows of a file, or JSON objects line by line from standard input; a wrong line is told on stderr and left out."""
    from .tasks.rows import Row, read_rows

    if rows != "-":
        yield from read_rows(Path(rows))
        return
    for number, line in enumerate(sys.stdin, 1):
        try:
            columns = json.loads(line)
            if not isinstance(columns, dict):
                raise ValueError("one object a line is expected")
            yield Row(f"-:{number}", columns)
        except (ValueError, RecursionError) as error:
            complain(UsageError(f"-:{number}: not JSON ({error})"), strict)


def complain(error: UsageError, strict: bool) -> None:
    if strict:
        raise error from None
    click.echo(f"ia2mini: {error}; left out", err=True)


@main.command()
@adapter_options
@click.argument("rows", metavar="ROWS|-")
@click.option("--coverage", type=float, help="answer only the most certain rows: this share of them")
@click.option("--icl", is_flag=True, help="the base model with demonstrations in its prompt instead, to compare")
@click.option("--strict", is_flag=True, help="stop at the first wrong row")
def predict(adapter, model, device, dtype, rows, coverage, icl, strict):
    """Answer ROWS, or JSON lines from standard input (-): JSONL with answer, confidence, probabilities and own columns."""
    predictor = open_adapter(adapter, model, device, dtype)
    for row in predictor.predict(read_new(rows, strict), icl, coverage, wrong=lambda error: complain(error, strict)):
        click.echo(json.dumps(row, ensure_ascii=False))


@main.command()
@adapter_options
@click.argument("rows", metavar="ROWS", type=click.Path(path_type=Path))
@click.option("--icl", is_flag=True, help="the base model with demonstrations in its prompt instead, to compare")
def score(adapter, model, device, dtype, rows, icl):
    """How good an adapter is on labelled ROWS: accuracy, ECE, Brier and NLL with intervals."""
    from .report.fit import score_rows, write_fit_table
    from .tasks.rows import read_rows

    predictor = open_adapter(adapter, model, device, dtype)
    click.echo(write_fit_table(score_rows(predictor, read_rows(rows), icl)))


@main.command()
@adapter_options
@file_option("--out", "folder of the whole checkpoint", required=True)
def merge(adapter, model, device, dtype, out):
    """Write a whole checkpoint with the adapter merged into the base model's matrices."""
    from .peft_format import save_merged

    predictor = open_adapter(adapter, model, device, dtype)
    if predictor.adapter is None:
        raise UsageError(f"{adapter}: no adapter was shipped, so there is nothing to merge; use the base model")
    subject = predictor.subject
    gap = save_merged(subject.model, predictor.adapter, predictor.theta[0], out, subject.tokenizer, subject.folder)
    click.echo(f"{out}: merged; largest difference of a logit to the unmerged model {gap:.1e}")


def open_adapter(folder: Path, model: str | None, device: str | None, dtype: str | None):
    """A saved adapter on its base model."""
    from .predictor import base_name, load_adapter

    return load_adapter(folder, load_subject(model or base_name(folder), device, dtype, None))
