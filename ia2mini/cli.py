"""The command line: thin shells over the functions of the other rooms. Torch is imported only by what computes."""

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import click

from . import UsageError, parallel
from .cli_options import MODEL_HELP, Several, data_options, file_option, model_options, options_of, taken
from .cli_rows import find_tasks, keep_apart, refuse_unnamed_model, tell_all
from .errors import NO_MEMORY, out_of_memory
from .files import plain
from .options import Options
from .streams import check_arguments, keep_freed_memory, need_output, open_streams

DEMO_ROWS = 120  # about a minute
MINUTE = 60
COLUMNS_HELP = "of the tables; also nll, brier …  [default: acc,ece,ece_null,asim; of --data also acc_labels]"
PRINTING = ("predict", "score", "generate", "tasks")  # commands whose whole result is what they print


class Commands(click.Group):
    """A group that turns a user's mistake into one line and exit code 2, and an interrupt into 130."""

    def invoke(self, context):
        parallel.start()
        return super().invoke(context)

    def main(self, args=None, **more):
        interrupts = []
        warnings.showwarning = lambda text, *where, **_: say(f"warning: {text}", f"warning: {text}")
        try:
            try:
                heed_interrupts(interrupts)
                open_streams()
                check_arguments(sys.argv[1:] if args is None else list(args))
                sys.exit(super().main(args, **more | {"standalone_mode": False}))
            except Exception:
                if interrupts:
                    raise KeyboardInterrupt from None
                raise
        except UsageError as error:
            mistake = str(error)
        except click.UsageError as error:
            mistake = f"{error.format_message()} `{error.ctx.command_path} --help` lists what there is"
        except click.ClickException as error:
            mistake = error.format_message()
        except (click.Abort, KeyboardInterrupt):  # the latter outside click's own care
            say("interrupted; what was finished is kept, and the same command goes on from there", before="\n")
            sys.exit(130)
        except Exception as error:
            mistake = what_happened(error)
            if mistake is None:
                raise
        say(mistake)
        sys.exit(2)


def what_happened(error: Exception) -> str | None:
    """A line for an error that the surroundings have caused; None for one of ours."""
    if out_of_memory(error):
        return NO_MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is None:  # what is left to print is not tried again at exit
            sys.stdout = None
        return str(UsageError(f"{error.filename or 'output'}: {error.strerror}"))  # a name may be long
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; `pip install ia2mini` installs what is needed"
    if isinstance(error, RuntimeError) and parallel.lost(error):
        return parallel.LOST
    return None


def say(line: str, once: str = "the end", before: str = "") -> None:
    """Tell a line on stderr, unless another process has told what is said `once`."""
    if parallel.says(once):
        click.echo(before + plain(f"ia2mini: {line}"), err=True)


def heed_interrupts(came: list) -> None:
    """Have SIGTERM interrupt as Ctrl-C does, and note it in `came`: native code may turn it into another error."""

    def interrupt(*signals):
        came.append(signals)
        raise KeyboardInterrupt

    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, interrupt)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's jobs in the background have it
            signal.signal(signal.SIGINT, interrupt)


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}


@click.group(cls=Commands, invoke_without_command=True, context_settings=SETTINGS)
@click.version_option(package_name="ia2mini")
@click.pass_context
def main(context):
    """Teach a language model a task from a handful of examples by ICL Activation Alignment (IA2, arXiv 2509.22621).

    \b
      ia2mini run                                            the demo: four toy tasks on the embedded model, a minute
      ia2mini run sst2 --model qwen3-4b-base --n 4           one row block of the paper's Table 1
      ia2mini run --data mine.jsonl --prompt-column text --answer-column label --model llama-3.2-1b --n 8
      ia2mini tasks                                          what can be run
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    if context.invoked_subcommand in PRINTING or "--dry-run" in sys.argv:
        need_output()
    if parallel.size > 1 and context.invoked_subcommand not in ("run", "fit") and "--shard" not in sys.argv:
        raise UsageError(
            "only `run` and `fit` are spread over processes; start the others with --shard or without torchrun"
        )
    keep_freed_memory()
    lasting = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ia2mini", "compiled")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(lasting))  # torch's own place does not outlive a restart


def typed() -> str:
    """The command as it was typed, for reports."""
    return shlex.join(["ia2mini", *sys.argv[1:]])


class Lines:
    """What a bar is written to where stderr is no terminal: a line each time."""

    def write(self, text: str) -> None:
        if text.strip():
            click.echo(text.strip(), err=True)

    def flush(self) -> None:
        pass


def progress(label: str, total: int):
    """A bar on stderr with the time that remains; where that is no terminal a line at first, then one a minute."""
    from tqdm import tqdm

    if not parallel.chief:
        return tqdm(disable=True)
    known = "{percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left {postfix}"
    if sys.stderr.isatty():
        return tqdm(desc=f"phase {label:<40}", total=total, leave=False, bar_format="{desc} " + known)
    click.echo(f"phase {label}", err=True)
    slow = {"delay": MINUTE, "mininterval": MINUTE, "miniters": 1, "ascii": True}
    return tqdm(desc=f"phase {label}", total=total, leave=False, bar_format="{desc} " + known, file=Lines(), **slow)


@main.command()
@click.argument("names", nargs=-1, metavar="[TASK]...")
@model_options
@options_of(Options, eval_rows=None)
@data_options
@click.option("--side-by-side", type=click.IntRange(1), help="runs trained at once  [default: all]; fewer: less memory")
@click.option("--compile/--no-compile", "compiling", default=None, help="also CUDA graphs  [default: on a GPU]")
@click.option("--checkpointing", is_flag=True, help="compute anew for the backward pass: memory for long answers")
@file_option("--out", "folder of results; the same command goes on where it was", default="runs")
@click.option("--full", is_flag=True, help="a line for every task and evaluation, not only their mean")
@click.option("--with-paper", is_flag=True, help="the paper's numbers beside ours where it has the same cell; --full")
@click.option("--columns", type=Several(str), default="", show_default=False, help=COLUMNS_HELP)
@click.option("--figures", type=Several(str), default="png", help="formats of the figures: png,pdf,svg")
@click.option("--json", "as_json", is_flag=True, help="one JSON document on the last line of stdout")
@click.option("--dry-run", is_flag=True, help="list tokens, memory and least time of every task and N; train nothing")
def run(names, model, compiling, checkpointing, dry_run, **given):
    """Train and compare methods on TASKs: a table, figures, a page, and the chosen adapters in PEFT's format.

    Without TASK, the demo: the four toy classification tasks. All sets and rates of a method are trained side by side.
    The table shows the rate with the lowest dev loss; only its runs are scored, unless --select says otherwise. Several
    adapters are compared side by side (--adapter lora,ia3 --rank 4,8 --targets qko,qv), several models in turn.
    """
    own = taken(given, "data", "prompt_column", "answer_column", "template", "eval_data")
    how = taken(given, "device", "dtype", "revision", "check", "shard")
    out, data, side_by_side = taken(given, "out", "data_dir", "side_by_side").values()
    shown = taken(given, "full", "columns", "figures", "as_json", "with_paper")
    given["eval_rows"] = given["eval_rows"] or (500 if names or own["data"] else DEMO_ROWS)
    for option in ("n", "methods", "adapter", "rank", "unlabelled"):
        if not given[option]:
            raise UsageError(f"--{option}: give at least one")
    options = Options(**given)
    models = [model] if Path(model).is_dir() else list(dict.fromkeys(filter(None, model.split(",")))) or [model]
    if own["data"]:
        refuse_unnamed_model("--data")
    apart = {"--compile": compiling, "--dry-run": dry_run, "--paper-compat": options.paper_compat}
    apart["several models"] = len(models) > 1
    for wrong in (name for name, asked in apart.items() if how["shard"] and asked):
        raise UsageError(f"{wrong}: not with --shard; leave one of them out")
    chosen = find_tasks(names, **own)
    from .report.figures import LEFT_OUT
    from .report.summary import METRICS
    from .report.tables import COLUMNS, OWN_COLUMNS
    from .study import carry_out, lay_out, open_study, plan, worth_compiling
    from .subject import open_subject, usable

    shown["columns"] = shown["columns"] or (OWN_COLUMNS if own["data"] else COLUMNS)
    for option, known in (("figures", LEFT_OUT), ("columns", METRICS)):
        if bad := [name for name in shown[option] if name not in known]:
            raise UsageError(f"--{option} {bad[0]}: unknown; there are {', '.join(known)}")
    for name in models:
        subject = open_subject(name, weights=not dry_run, **how)
        tasks = [keep_apart(task, subject.tokenizer, own["template"]) for task in chosen]
        if dry_run:
            click.echo(plan(lay_out(tasks, subject, options, data, side_by_side), usable(how["device"])))
            continue
        study = open_study(tasks, subject, options, out, data, side_by_side, progress)
        prepare(subject.model, compiling, checkpointing, partial(worth_compiling, study[0]))
        if name == models[0]:
            tell_all(remark for task in tasks for remark in task.remarks)
        document, folder = carry_out(*study)
        if name == models[-1]:
            parallel.stop()
        if parallel.chief:
            conclude(document, folder, **shown)
        del subject, study  # before the next model is loaded


def conclude(document: dict, folder: Path, full: bool, columns, figures, as_json: bool, with_paper: bool) -> None:
    """Write a study's report, and print its table and where everything is."""
    from .report import write_report
    from .report.paper import add_paper, departures
    from .report.summary import count

    if with_paper and not add_paper(document):
        others = ", ".join(departures(document["config"]))
        reason = f"the paper's runs had another {others}" if others else "the paper has none of these cells"
        click.echo(f"--with-paper: nothing beside ours, {reason}", err=True)
    table = document | {"columns": columns}
    drawn = write_report(table, folder, typed(), figures)
    show(table, full or with_paper)
    written = count(len(drawn), "figure") if drawn else "no figures (pip install 'ia2mini[report]')"
    adapters = count(len(document["adapters"]), "adapter")
    tables = "tables" if (folder / "table.csv").exists() else "table.txt (pip install 'ia2mini[report]': more)"
    click.echo(f"{folder}: report.html, results.json, {tables}, {written}, {adapters} for peft")
    if as_json:
        click.echo(json.dumps(document))


def prepare(model, compiling: bool | None, checkpointing: bool, worth: Callable = lambda: True) -> None:
    """Compile and checkpoint a model's blocks as the options say (None: compile on a GPU, where it is `worth` it)."""
    from .graphs import RECORDERS
    from .models.common import checkpoint_blocks, compile_blocks

    if compiling is None:
        compiling = next(model.parameters()).is_cuda and not parallel.same and worth()
    elif not compiling:
        RECORDERS.clear()
    if compiling:
        from torch._dynamo.callback import on_compile_start

        on_compile_start(lambda *about: tell_of_compiling())
        compile_blocks(model)
    if checkpointing:
        checkpoint_blocks(model)


@cache
def tell_of_compiling() -> None:
    """Say it once, as it begins."""
    click.echo(f"compiling (minutes at first; kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']})", err=True)


def show(document: dict, full: bool) -> None:
    from .report import seconds_line, write_table

    terminal = sys.stdout is not None and sys.stdout.isatty()
    click.echo(write_table(document, full, color=terminal and not os.environ.get("NO_COLOR")))
    click.echo(seconds_line(document))


@main.command()
@click.argument("name", required=False, metavar="[TASK]")
@click.option("--model", default="tiny", help=MODEL_HELP)
@click.option("--revision", help="branch, tag or commit on the hub")
@click.option("--n", default=4, type=click.IntRange(2), help="training rows of the set that is shown")
@data_options
def tasks(name, model, revision, n, data_dir, **own):
    """List the tasks; with TASK or --data, show what the model sees: a prompt with its demonstrations, token counts."""
    from .tasks import all_tasks, load_examples

    if name is None and not own["data"]:
        click.echo(f"{'task':<24}{'paper':<16}{'answer':<28}evaluated on (* out of distribution)")
        for task in all_tasks().values():
            answer = "/".join(task.labels)[:26] if task.labels else f"text, at most {task.max_tokens} tokens"
            on = ", ".join([task.name, *(f"{e}*" for e in task.ood)]) if task.train else "evaluation only"
            click.echo(f"{task.name:<24}{task.tag if task.hub else '–':<16}{answer:<28}{on}")
        return
    from .episode import draw_episode
    from .models.checkpoint import locate
    from .tokenizer import Tokenizer

    (task,) = find_tasks((name,) if name else (), **own)
    tokenizer = Tokenizer.from_folder(locate(model, revision))
    task = keep_apart(task, tokenizer, own["template"])
    examples = load_examples(task, "eval", data_dir)
    sizes, demonstrations = [f"evaluation: {examples.origin['used']} of {examples.origin['rows']} rows"], []
    if task.train:
        pool = load_examples(task, "train", data_dir)
        sizes.insert(0, f"pool: {pool.origin['used']} of {pool.origin['rows']} rows")
        demonstrations = draw_episode(pool.rows, n).icl[0]
    tell_all(task.remarks)
    click.echo(f"{task.name} ({task.tag}) from {task.hub or 'this package'} · {' · '.join(sizes)}\n")
    rows = [("demonstration", "cyan", d) for d in demonstrations] + [("query", "yellow", examples.rows[0])]
    for role, color, e in rows:
        count = len(tokenizer.encode(e.prompt)), len(tokenizer.encode_answer(e.prompt, e.answer, e.label is None))
        click.secho(f"{role}: {count[0]} tokens, answer {count[1]}", dim=True)
        click.echo(click.style(plain(e.prompt), fg=color) + click.style(plain(e.answer), fg="green", bold=True) + "\n")


from . import cli_fit  # noqa: E402, F401  (its commands join the group)
