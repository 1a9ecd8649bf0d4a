"""The commands that use an adapter: predict, score, merge, generate."""

from collections.abc import Iterable
from pathlib import Path

import click

from .. import UsageError
from ..engine.progress import progress
from ..files import json_line, plain, plural
from .group import main
from .options import combine_options, file_option, flag, machine_options, model_options
from .rows import read_new
from .streams import need_input, need_output

icl_option = flag(
    "--icl", help="Use the base model with demonstrations in its prompt instead, to compare."
)


def check_folder(context, parameter, path: Path) -> Path:
    """The folder of an adapter. Raises UsageError for a file: rows and adapter may be swapped."""
    if not path.is_dir():
        raise UsageError(f"{path}: is a file; the adapter's folder comes first, then the rows")
    return path


adapter_options = combine_options(
    click.argument("adapter", type=click.Path(path_type=Path, exists=True), callback=check_folder),
    click.option("--model", help="Use this base model.  [default: the one that the adapter names]"),
    machine_options,
    click.option(
        "--template",
        help="Write prompts in this way, columns in braces, for an adapter that peft wrote.",
    ),
    click.option(
        "--labels",
        help="Choose among these answers (A,B,C), for an adapter that peft wrote."
        "  [default: it answers with text]",
    ),
)


@main.command()
@adapter_options
@click.argument("rows", metavar="ROWS|-")
@click.option(
    "--coverage",
    type=float,
    help="Answer only this share of the rows, as 0.9: the most certain ones.",
)
@icl_option
@flag(
    "--strict",
    help="Stop at the first wrong row.  [default: report it on stderr and leave it out]",
)
@file_option(
    "--out",
    help="Write a table of your rows with their answers: .csv, .tsv, .jsonl, .xlsx or .parquet."
    "  [default: JSONL to standard output]",
)
@click.option(
    "--digits",
    type=click.IntRange(0, 17),
    help="Round probabilities to this many digits.  [default: 4 in --out, all on standard output]",
)
def predict(adapter, rows, coverage, icl, strict, out, digits, **adapter_arguments):
    """Answer new rows with a fitted adapter.

    ADAPTER is a folder that `ia2mini fit` or peft wrote. ROWS is a file, or - for JSON lines from standard input.

    \b
    Examples:
      ia2mini predict tickets new.csv --out answers.csv
      echo '{"ticket": "Where is my parcel?"}' | ia2mini predict tickets -

    It prints JSONL: the row's own columns, the answer, its confidence and, for labels, the probability of each. Where
    --coverage abstains, `answer` is null and `abstained` has the answer that was not given. A column of
    yours with such a name becomes `row_answer` and so on. With --out the file has a line for every row; a row that is
    left out has a `reason`.
    """
    from ..fitting.predictor import raise_errors
    from ..report.answers import Answers, check_size, check_target

    if rows == "-":
        need_input()
    new = read_new(rows)
    if out is None:
        need_output()
    else:
        check_target(out, rows)
        new = [row for row in new if row is not None]
        check_size(out, new)
    predictor = open_adapter(adapter, **adapter_arguments)
    if isinstance(new, list):
        check_template_columns(new, predictor)
    outcomes = predictor.outcomes(new, icl, coverage)
    if strict:
        outcomes = raise_errors(outcomes)
    if out is None:
        print_answers(outcomes, digits)
    else:
        answers = Answers(rows, predictor.spec["labels"], coverage is not None)
        write_answers(outcomes, answers, len(new), out, digits)


def check_template_columns(rows: Iterable, predictor) -> None:
    """`check_columns` of an adapter's template in rows that are no conversations."""
    from ..tasks.rows import Row, check_columns
    from ..tasks.turns import holds_turns

    read = [row for row in rows if isinstance(row, Row) and not holds_turns(row)]
    check_columns(read, predictor.spec["template"])


def print_answers(outcomes: Iterable, digits: int | None) -> None:
    """Print each row with its answer as a JSON line as soon as it is there; on stderr what is left out."""
    from ..fitting.predictor import with_answer
    from ..report.answers import rounded

    answered = 0
    left_out = 0
    for row, answer in outcomes:
        if isinstance(answer, UsageError):
            left_out += 1
            click.echo(plain(f"ia2mini: {answer}; left out"), err=True)
        else:
            answered += 1
            click.echo(json_line(rounded(with_answer(row, answer), digits)))
    if left_out and not answered:
        raise UsageError("no row could be answered")


def write_answers(outcomes: Iterable, answers, rows: int, out: Path, digits: int | None) -> None:
    """Write a file with every row and its answer (`report.answers.Answers`)."""
    from ..report.answers import DIGITS

    with progress("answers", rows) as bar:
        for row, answer in outcomes:
            answers.add(row, answer, DIGITS if digits is None else digits)
            bar.update()
    if answers.pairs and answers.left_out == rows:
        _, first = answers.pairs[0]
        raise UsageError(f"no row could be answered, and {out} is not written; {first['reason']}")
    answers.write(out)
    told = f"{out}: {plural(rows, 'row')}"
    if answers.left_out:
        told += f", {answers.left_out} of them without an answer: see the column `reason`"
    if answers.abstains:
        told += f", {answers.abstained} of them not answered for lack of confidence: see the column `abstained`"
    click.echo(plain(told))


@main.command()
@adapter_options
@click.argument("rows", metavar="ROWS", type=click.Path(path_type=Path))
@click.option(
    "--answer-column",
    help="Take the true answer from this column.  [default: as in the rows it was fitted on]",
)
@icl_option
def score(adapter, rows, answer_column, icl, **adapter_arguments):
    """Measure an adapter on labelled rows.

    It prints accuracy with its 95 % interval, macro-F1, ECE, Brier score and NLL.

    \b
    Examples:
      ia2mini score tickets more_tickets.csv
      ia2mini score peft-lora rows.csv --template '{question}' --labels yes,no
    """
    from ..fitting.score import score_rows
    from ..report.fit import fit_table
    from ..tasks.rows import read_rows

    rows = read_rows(rows)  # its mistakes show before a model is loaded
    predictor = open_adapter(adapter, **adapter_arguments)
    check_template_columns(rows, predictor)
    click.echo(plain(fit_table(score_rows(predictor, rows, icl, answer_column))))


@main.command()
@adapter_options
@file_option("--out", help="Write the checkpoint into this new or empty folder.", required=True)
def merge(adapter, out, **adapter_arguments):
    """Merge an adapter into its base model.

    It writes a whole checkpoint, which other tools load without peft. The adapter's README.md has the lines that serve
    it.

    \b
    Examples:
      ia2mini merge tickets --out tickets-merged
      ia2mini merge peft-lora --model smollm2-135m-instruct --out merged
    """
    predictor = open_adapter(adapter, **adapter_arguments)
    gap = predictor.merge(out)
    told = f"{out}: merged; largest difference of a logit to the unmerged model {gap:.1e}"
    dtype = predictor.subject.dtype
    if dtype != "float32":
        told += f", since merged weights are rounded to {dtype} (--dtype float32: not rounded)"
    click.echo(told)


@main.command()
@model_options
@click.option("--prompt", required=True, help="Continue this text.")
@click.option(
    "--max-tokens",
    default=100,
    type=click.IntRange(1),
    help="Generate at most this many tokens.",
)
@click.option(
    "--stop", help="Stop at this text too, besides the end of sequence; \\n is a line end."
)
@file_option("--adapter", help="Use the adapter in this folder, on the base model that it names.")
@flag("--chat", help="Write the prompt as a turn of the checkpoint's chat template.")
def generate(prompt, max_tokens, stop, adapter, chat, **model_arguments):
    """Continue a text greedily.

    The continuation goes to standard output.

    \b
    Examples:
      ia2mini generate --model smollm2-135m --prompt 'Paris is' --max-tokens 5
      ia2mini generate --adapter policy --chat --prompt 'May I return it?'
    """
    from ..engine.subject import open_subject
    from ..fitting.folder import what_answers
    from ..fitting.predictor import FOREIGN, Predictor
    from ..generate import generate as continue_text
    from ..methods import WITH_DEMONSTRATIONS
    from ..scale.decode import decoding_for
    from ..tasks.chat import ChatTemplate

    if stop == "":
        raise UsageError("--stop is empty; give some text, or leave it out")
    if adapter:
        if click.get_current_context().get_parameter_source("model").name == "DEFAULT":
            model_arguments["model"] = model_arguments["revision"] = None
        predictor = open_adapter(adapter, **model_arguments)
        if predictor.adapter is None:
            raise UsageError(f"{adapter}: holds no adapter; {what_answers(predictor)}")
        if predictor.spec["method"] in WITH_DEMONSTRATIONS:
            missing = "was trained with demonstrations, which --prompt must hold"
            click.echo(f"this adapter {missing}; `ia2mini predict` shows them", err=True)
    else:
        predictor = Predictor(open_subject(**model_arguments), None, None, FOREIGN)
    subject = predictor.subject
    tokenizer = subject.tokenizer
    text = prompt
    if chat:
        template = ChatTemplate(subject.folder, tokenizer)
        tokenizer = template.tokenizer
        text = template(prompt)
    ids = tokenizer.encode(text)
    if not ids:
        raise UsageError("--prompt is empty and this model's tokenizer adds no BOS; give some text")
    subject.check_room(prompt, len(ids), "use a shorter --prompt")
    max_tokens = min(max_tokens, subject.context_length + 1 - len(ids))
    stop = stop and stop.replace("\\n", "\n")
    with predictor.student() as student:
        decoding = decoding_for(subject.model, max_tokens, stop)
        (response,) = continue_text(student, tokenizer, [ids], decoding)
    click.echo(plain(tokenizer.decode(ids + response)[len(tokenizer.decode(ids)) :]))


def open_adapter(
    folder: Path, model=None, revision=None, template=None, labels=None, **model_arguments
):
    """Load a saved adapter on its base model, or on another."""
    from ..engine.subject import open_subject
    from ..fitting.folder import base_of
    from ..fitting.predictor import load_adapter
    from ..fitting.spec import check_given, read_spec
    from ..tasks.own import check_template

    given: dict = {}
    if template is not None:
        given["template"] = check_template(template)
    if labels is not None:
        given["labels"] = [label.strip() for label in labels.split(",")]
    check_given(given, read_spec(folder))
    if not model:
        model, revision = base_of(folder)
    subject = open_subject(model, revision=revision, **model_arguments)
    return load_adapter(folder, subject, **given)
