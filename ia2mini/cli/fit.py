"""The practitioner's commands: fit, predict, score, merge."""

import shlex
import shutil
from pathlib import Path

import click

from .. import UsageError
from ..engine.options import FitOptions
from ..files import count, json_line, plain, read_text
from ..scale import ranks
from .group import main, progress, typed
from .options import GUESS, check_option, file_option, many, model_options, options_of, taken
from .rows import complain, read_new, refuse_unnamed_model, tell_all
from .run import prepare
from .streams import need_input, need_output

adapter_options = many(
    click.argument("adapter", type=click.Path(path_type=Path, exists=True, file_okay=False)),
    click.option("--model", help="base model  [default: the one that the adapter names]"),
    click.option("--device", help="cpu, cuda, cuda:1 …  [default: a GPU if there is one]"),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="of frozen weights"
    ),
    check_option,
    click.option(
        "--template", help="prompt, columns in braces: of an adapter that ia2mini did not fit"
    ),
    click.option(
        "--labels",
        help="its possible answers, separated by commas  [default: it answers with text]",
    ),
)


@main.command()
@click.argument("rows", required=False, type=click.Path(path_type=Path), metavar="[ROWS]")
@model_options
@options_of(FitOptions)
@click.option("--prompt-column", help=f"what is asked{GUESS}")
@click.option("--answer-column", help=f"what is answered{GUESS}")
@click.option("--template", help="prompt, columns in braces  [default: 'Text:{text}\\nLabel:']")
@click.option(
    "--labels/--text",
    "labelled",
    default=None,
    help="what the answers are  [default: labels where they repeat]",
)
@file_option(
    "--unlabelled", "more rows, without answers: the teacher answers them, IA2 learns from them too"
)
@file_option(
    "--context",
    "a text (instruction, policy) to put into the weights: the teacher sees it before every query",
)
@file_option("--prompts", "the queries for --context, in place of ROWS; they need no answers")
@file_option("--out", "folder of the adapter; the same command goes on where it was", required=True)
def fit(rows, labelled, unlabelled, context, prompts, out, **given):
    """Fit an adapter to your own ROWS, and say what it is worth.

    ROWS are JSONL (OpenAI's chat rows, too), JSON, CSV, TSV, Excel, Parquet, or a folder that `datasets` saved.

    \b
      ia2mini fit tickets.csv --model llama-3.2-1b --out tickets
      ia2mini predict tickets new.csv > answers.jsonl
      ia2mini fit --context policy.txt --prompts queries.jsonl --model llama-3.2-1b-instruct --chat --out policy

    Every method is cross-validated. Shipped is what is better on held-out rows than the base model, and surely better
    than always the commonest answer: an adapter or a linear probe, trained on all rows, or demonstrations in the
    prompt. Where nothing is, nothing is shipped, and the report says what to do.
    """
    from ..engine.subject import open_subject
    from ..fitting.fit import Columns, read_own
    from ..fitting.fit import fit as fit_rows
    from ..fitting.folder import check_own
    from ..report.fit import write_fit_report, write_fit_table
    from ..tasks.rows import as_rows

    check_own(out)
    if (rows is None) == (context is None) or (context is None) != (prompts is None):
        raise UsageError("give ROWS, or --context with --prompts")
    refuse_unnamed_model("ROWS" if context is None else "--context")
    how = taken(given, "model", "device", "dtype", "revision", "check")
    columns = Columns(*taken(given, "prompt_column", "answer_column", "template").values())
    if labelled is not None:
        if context is not None:
            raise UsageError(
                "--labels and --text say what ROWS are answered with; --context has none"
            )
        columns = columns._replace(answers="labels" if labelled else "text")
    options = FitOptions(**given, context=read_context(context) if context else "")
    own = as_rows(rows or prompts)
    # its mistakes show before a model is loaded
    _, task = read_own(own, columns, bool(context), options.chat)
    subject = open_subject(**how)
    prepare(subject.model, None, False)
    tell_all([*task.remarks, dtype_note(subject)])
    fitted = fit_rows(own, subject, options, columns, unlabelled or (), keep=out, bar=progress)
    ranks.stop()
    if not ranks.chief:
        return
    fitted.save(out)
    write_fit_report(fitted, out, typed(), own)
    for unfinished in out.glob("unfinished-*"):
        shutil.rmtree(unfinished)
    click.echo(plain(write_fit_table(fitted.report, task.remarks)))
    click.echo(f"{out}: {files_of(fitted, out)}")
    click.echo(plain(f"next: ia2mini predict {shlex.quote(str(out))} NEW_ROWS"))


def read_context(path: Path) -> str:
    text = read_text(path).replace("\r\n", "\n").strip()
    if not text:
        raise UsageError(f"{path}: the file is empty")
    return text


def files_of(fitted, out: Path) -> str:
    """What lies in the folder of a fit, in words."""
    from ..report.fit import SUSPECTS

    kinds = {"base": "no adapter", "icl": "demonstrations", "probe": "probe.safetensors"}
    shipped = kinds.get(fitted.spec["method"], "adapter")
    files = [shipped, "ia2mini.json", "README.md", "report.html", "held_out.jsonl"]
    if (out / "decision.json").is_file():
        files.append("decision.json and its template (to serve it)")
    if (out / SUSPECTS).is_file():
        files.append(f"{SUSPECTS} (rows whose answers may be wrong)")
    return ", ".join(files)


def dtype_note(subject) -> str:
    """In which dtype the model computes, and how to have another."""
    other = "bfloat16" if subject.dtype == "float32" else "float32"
    return f"{subject.name} computes in {subject.dtype} (--dtype {other} for the other)"


@main.command()
@adapter_options
@click.argument("rows", metavar="ROWS|-")
@click.option(
    "--coverage", type=float, help="answer only this share of rows, as 0.9: the most certain"
)
@click.option(
    "--icl",
    is_flag=True,
    help="the base model with demonstrations in its prompt instead, to compare",
)
@click.option(
    "--strict",
    is_flag=True,
    help="stop at the first wrong row  [default: name it on stderr, leave it out]",
)
@file_option(
    "--out",
    "a table of your rows with their answers: .csv, .tsv, .jsonl, .xlsx or .parquet"
    "  [default: JSONL to standard output]",
)
@click.option(
    "--digits",
    type=click.IntRange(0, 17),
    help="of probabilities  [default: 4 in --out, all on standard output]",
)
def predict(adapter, rows, coverage, icl, strict, out, digits, **how):
    """Answer ROWS, or JSON lines from standard input (-), by an ADAPTER of `ia2mini fit` or of peft.

    Prints JSONL: the row's own columns, answer, confidence and, of labels, the probability of each. Where --coverage
    abstains, answer is null and abstained the answer. A column of yours with such a name becomes row_answer and so on.
    With --out the file has a line for every row, also for one that is left out: no answer, and the reason.
    """
    from ..report.answers import rounded

    if rows == "-":
        need_input()
    if out is not None:
        write_predicted(adapter, rows, (icl, coverage, strict), out, digits, **how)
        return
    need_output()
    fitted = open_adapter(adapter, **how)
    for row in fitted.answer_rows(
        read_new(rows), icl, coverage, wrong=lambda error: complain(error, strict)
    ):
        click.echo(json_line(rounded(row, digits)))


def write_predicted(adapter, rows: str, asked: tuple, out: Path, digits, **how) -> None:
    """Write a file with every row and what is said to it."""
    from ..report.answers import DIGITS, Answers, check_size, check_target

    icl, coverage, strict = asked
    check_target(out, rows)
    new = [row for row in read_new(rows) if row is not None]
    check_size(out, new)
    fitted = open_adapter(adapter, **how)
    answers = Answers(rows, fitted.spec["labels"], coverage is not None)
    with progress("answers", len(new)) as bar:
        for row, said in fitted.outcomes(new, icl, coverage):
            if strict and isinstance(said, UsageError):
                raise said
            answers.add(row, said, DIGITS if digits is None else digits)
            bar.update()
    answers.write(out)
    told = f"{out}: {count(len(new), 'row')}"
    if answers.left_out:
        told += f", {answers.left_out} of them without an answer: see the column `reason`"
    click.echo(plain(told))


@main.command()
@adapter_options
@click.argument("rows", metavar="ROWS", type=click.Path(path_type=Path))
@click.option(
    "--answer-column", help="what is answered  [default: as in the rows it was fitted on]"
)
@click.option(
    "--icl",
    is_flag=True,
    help="the base model with demonstrations in its prompt instead, to compare",
)
def score(adapter, rows, answer_column, icl, **how):
    """How good an ADAPTER is on labelled ROWS: accuracy, ECE, Brier and NLL with intervals."""
    from ..report.fit import score_rows, write_fit_table
    from ..tasks.rows import read_rows

    rows = read_rows(rows)  # its mistakes show before a model is loaded
    click.echo(
        plain(write_fit_table(score_rows(open_adapter(adapter, **how), rows, icl, answer_column)))
    )


@main.command()
@adapter_options
@file_option("--out", "folder of the whole checkpoint", required=True)
def merge(adapter, out, **how):
    """Write a whole checkpoint with the ADAPTER merged into the base model's matrices.

    Other tools load it without peft. The adapter's README.md has the lines that serve it.
    """
    gap = open_adapter(adapter, **how).merge(out)
    click.echo(f"{out}: merged; largest difference of a logit to the unmerged model {gap:.1e}")


@main.command()
@model_options
@click.option("--prompt", required=True, help="text to continue")
@click.option(
    "--max-tokens", default=100, type=click.IntRange(1), help="at most, within what the model reads"
)
@click.option(
    "--stop", help="text at which to stop, besides the end of sequence; \\n is a line end"
)
@file_option("--adapter", "folder of an adapter; its own base is the model")
@click.option("--chat", is_flag=True, help="the prompt as a turn of the checkpoint's chat template")
def generate(prompt, max_tokens, stop, adapter, chat, **how):
    """Continue a text greedily; the continuation goes to stdout."""
    from ..engine.subject import open_subject
    from ..fitting.predictor import FOREIGN, Predictor
    from ..generate import Decoding
    from ..generate import generate as continue_text
    from ..models.taps import device_of
    from ..scale.decode import fast_decoding
    from ..tasks.chat import ChatTemplate

    if stop == "":
        raise UsageError("--stop is empty; give some text, or leave it out")
    if adapter:
        if click.get_current_context().get_parameter_source("model").name == "DEFAULT":
            how["model"] = how["revision"] = None
        fitted = open_adapter(adapter, **how)
    else:
        fitted = Predictor(open_subject(**how), None, None, FOREIGN)
    subject = fitted.subject
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
    max_tokens = min(max_tokens, subject.reads + 1 - len(ids))
    stop = stop and stop.replace("\\n", "\n")
    with fitted.student() as student:
        how = Decoding(max_tokens, stop, hooks=fast_decoding(device_of(subject.model), max_tokens))
        (response,) = continue_text(student, tokenizer, [ids], how)
    click.echo(plain(tokenizer.decode(ids + response)[len(tokenizer.decode(ids)) :]))


def open_adapter(folder: Path, model=None, revision=None, template=None, labels=None, **how):
    """A saved adapter on its base model, or another."""
    from ..engine.subject import open_subject
    from ..fitting.folder import base_of
    from ..fitting.predictor import load_adapter
    from ..fitting.spec import check_labels
    from ..tasks.own import check_template

    spec: dict = {"template": check_template(template)}
    if labels is not None:
        spec["labels"] = [label.strip() for label in labels.split(",")]
        check_labels(spec["labels"])
    name, revision = (model, revision) if model else base_of(folder)
    subject = open_subject(name, revision=revision, **how)
    return load_adapter(folder, subject, **{name: value for name, value in spec.items() if value})
