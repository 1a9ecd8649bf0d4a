"""The researcher's commands: run, report, tasks."""

import json
import os
import sys
from pathlib import Path

import click

from .. import UsageError
from ..engine.options import Options
from ..engine.progress import progress
from ..files import plain, plural, write_json
from ..report.drawing import FORMATS
from ..scale import ranks
from ..study.table import METRICS
from .group import command_line, main
from .options import (
    CommaSeparated,
    checkpoint_options,
    combine_options,
    compile_and_checkpoint,
    data_options,
    file_option,
    flag,
    model_options,
    options_of,
    pop_options,
)
from .rows import find_tasks, print_remarks, refuse_unnamed_model

DEMO_ROWS = 120  # about a minute
# default columns with --data; `acc_labels` is the accuracy that `fit` prints
OWN_COLUMNS = ("acc", "acc_labels", "ece", "ece_null", "asim")
COLUMNS_HELP = (
    "Show these columns; there are also nll, brier and others (docs/reference.md)."
    "  [default: acc,ece,ece_null,asim; for --data also acc_labels]"
)
table_options = combine_options(
    flag("--full", help="Print a line for every task and evaluation, not only their mean."),
    flag(
        "--with-paper",
        help="Print the paper's numbers beside ours where it has them; implies --full.",
    ),
    click.option(
        "--columns",
        type=CommaSeparated(str, tuple(METRICS)),
        default="",
        show_default=False,
        help=COLUMNS_HELP,
    ),
    click.option(
        "--figures",
        type=CommaSeparated(str, tuple(FORMATS)),
        default="png",
        help="Draw the figures in these formats: png,pdf,svg.",
    ),
    flag("--json", "as_json", help="Print one JSON document on the last line of standard output."),
)


@main.command()
@click.argument("names", nargs=-1, metavar="[TASK]...")
@model_options
@options_of(Options, eval_rows=None)
@data_options
@click.option(
    "--side-by-side",
    type=click.IntRange(1),
    help="Train at most this many runs at once; fewer need less memory.  [default: all]",
)
@click.option(
    "--compile/--no-compile",
    "compiling",
    default=None,
    help="Compile the model and record CUDA graphs.  [default: on a GPU]",
)
@flag(
    "--checkpointing",
    help="Save memory with long answers: compute blocks again in the backward pass.",
)
@file_option(
    "--out",
    help="Write results below this folder; the same command, typed again, resumes there.",
    default="runs",
)
@table_options
def run(names, compiling, checkpointing, out, data_dir, side_by_side, **given):
    """Train and compare methods on tasks, as the paper does.

    It writes a table, figures, a page and the chosen adapters in PEFT's format. Without TASK it runs the demo: four toy
    classification tasks on the embedded model. `ia2mini tasks` lists the tasks.

    \b
    Examples:
      ia2mini run sst2 --model qwen3-4b-base --n 4
      ia2mini run --data mine.csv --model smollm2-135m --n 2,4,8

    All training sets and learning rates of a method are trained side by side. The table shows the learning rate with
    the lowest dev loss. Only its runs are scored, unless --select asks for more.
    """
    data_arguments = pop_options(
        given, "data", "prompt_column", "answer_column", "template", "eval_data"
    )
    model_arguments = pop_options(given, "model", "device", "dtype", "revision", "check")
    report_arguments = pop_options(given, "full", "columns", "figures", "as_json", "with_paper")
    if not given["eval_rows"]:
        given["eval_rows"] = 500 if names or data_arguments["data"] else DEMO_ROWS
    for option in ("n", "methods"):
        if not given[option]:
            raise UsageError(f"--{option}: give at least one")
    options = Options(**given)
    if data_arguments["data"]:
        refuse_unnamed_model("--data")
        report_arguments["columns"] = report_arguments["columns"] or OWN_COLUMNS
    chosen = find_tasks(names, **data_arguments)
    from ..engine.subject import open_subject
    from ..scale.device import usable
    from ..study.cells import make_cells
    from ..study.study import carry_out, open_folder

    if model_arguments["dtype"] is None and usable(model_arguments["device"]) == "cpu":
        # so that a study gives the same numbers on every processor
        model_arguments["dtype"] = "float32"
    subject = open_subject(**model_arguments)
    cells = make_cells(chosen, subject, options, data_dir)
    store, config = open_folder(cells, out)
    compile_and_checkpoint(subject.model, compiling, checkpointing)
    print_remarks(remark for task in chosen for remark in task.remarks)
    document, folder = carry_out(cells, store, config, side_by_side, progress)
    ranks.stop()
    if ranks.chief:
        write_and_print_report(document, folder, **report_arguments)


@main.command()
@click.argument(
    "folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER..."
)
@file_option("--out", help="Write the joint report into this folder.", default="report")
@flag("--table-8", help="Print the paper's Table 8, too: IA2→SFT against SFT, pooled by N.")
@table_options
def report(folders, out, table_8, **report_arguments):
    """Join finished runs into one report.

    It writes one set of tables, tests and figures for several models, adapters or ranks.

    \b
    Examples:
      ia2mini report runs/a runs/b --out both
      ia2mini report ranks/* --full --columns acc,nll --out ranks-joined
    """
    from ..report.figures import remove_figures
    from ..report.join import check_report_folder, join
    from ..report.paper import write_table_8

    document = join(list(folders))
    check_report_folder(out)
    remove_figures(document, out)
    pooled = write_table_8(document) if table_8 else None
    write_json(out / "results.json", document)
    write_and_print_report(document, out, **report_arguments)
    if pooled:
        click.echo(pooled)


def write_and_print_report(
    document: dict, folder: Path, full: bool, columns, figures, as_json: bool, with_paper: bool
) -> None:
    """Write a study's report; print its table and the files written."""
    from ..report.page import write_report
    from ..report.paper import add_paper, departures
    from ..report.tables import seconds_line, write_table

    if with_paper and not add_paper(document):
        others = ", ".join(departures(document))
        reason = "the paper has none of these cells"
        if others:
            reason = f"the paper's runs had another {others}"
        click.echo(f"--with-paper: no numbers of the paper are shown, since {reason}", err=True)
    table = document | {"columns": columns}
    drawn = write_report(table, folder, command_line(), figures)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    color = terminal and not os.environ.get("NO_COLOR")
    click.echo(write_table(table, full or with_paper, color=color))
    click.echo(seconds_line(table))
    written = "no figures (pip install 'ia2mini[report]')"
    if drawn:
        written = plural(len(drawn), "figure")
    tables = "table.txt (pip install 'ia2mini[report]': more)"
    if (folder / "table.csv").exists():
        tables = "tables"
    adapters = plural(len(document["adapters"]), "adapter")
    click.echo(f"{folder}: report.html, results.json, {tables}, {written}, {adapters} for peft")
    if as_json:
        click.echo(json.dumps(document))


@main.command()
@click.argument("name", required=False, metavar="[TASK]")
@checkpoint_options
@click.option(
    "--n", default=4, type=click.IntRange(2), help="Show a training set of this many rows."
)
@data_options
def tasks(name, model, revision, n, data_dir, **data_arguments):
    """List the tasks, or show what the model sees.

    With TASK or --data it shows a prompt with its demonstrations, and how many tokens each part has.

    \b
    Examples:
      ia2mini tasks
      ia2mini tasks --data mine.csv --model smollm2-135m
    """
    if name is None and not data_arguments["data"]:
        list_tasks()
        return
    from ..episode import draw_episode
    from ..models.checkpoint import locate
    from ..tasks import load_examples
    from ..tokenizer import Tokenizer

    (task,) = find_tasks((name,) if name else (), **data_arguments)
    tokenizer = Tokenizer.from_folder(locate(model, revision))
    examples = load_examples(task, "eval", data_dir)
    sizes = [f"evaluation: {examples.origin['used']} of {examples.origin['rows']} rows"]
    demonstrations = []
    if task.train:
        pool = load_examples(task, "train", data_dir)
        sizes.insert(0, f"pool: {pool.origin['used']} of {pool.origin['rows']} rows")
        demonstrations = draw_episode(pool.rows, n).icl[0]
    print_remarks(task.remarks)
    source = task.hub or "this package"
    click.echo(f"{task.name} ({task.tag}) from {source} · {' · '.join(sizes)}\n")
    for row in demonstrations:
        show_row("demonstration", "cyan", row, tokenizer)
    show_row("query", "yellow", examples.rows[0], tokenizer)


def list_tasks() -> None:
    from ..tasks import all_tasks

    click.echo(f"{'task':<24}{'paper':<16}{'answer':<28}evaluated on (* out of distribution)")
    for task in all_tasks().values():
        answer = "/".join(task.labels)[:26] or f"text, at most {task.max_tokens} tokens"
        evaluated = "evaluation only"
        if task.train:
            evaluated = ", ".join([task.name, *(f"{name}*" for name in task.ood)])
        click.echo(f"{task.name:<24}{task.tag if task.hub else '–':<16}{answer:<28}{evaluated}")


def show_row(role: str, color: str, row, tokenizer) -> None:
    """A row as the model sees it, with its numbers of tokens."""
    prompt = len(tokenizer.encode(row.prompt))
    answer = len(tokenizer.encode_answer(row.prompt, row.answer, row.label is None))
    click.secho(f"{role}: {prompt} tokens, answer {answer}", dim=True)
    text = click.style(plain(row.prompt), fg=color)
    text += click.style(plain(row.answer), fg="green", bold=True)
    click.echo(text + "\n")
