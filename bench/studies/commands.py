"""The commands of the studies, which `python -m bench` takes up."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from ia2mini import UsageError
from ia2mini.cli.options import CommaSeparated, combine_options, options_of, pop_options
from ia2mini.engine.options import FitOptions, Options
from ia2mini.engine.subject import open_subject
from ia2mini.files import write_text

from .. import rivals_figure, rivals_page
from ..report import finish, show
from . import layers
from .bayes import METHODS as BAYESIAN
from .bayes import bayes
from .causes import MATCHED, causes
from .controls import TEACHERS
from .effect import METHODS, effect
from .fit import REAL, gate
from .gain import gain
from .rivals import DATA_SETS, PARTS, Cells, rivals
from .stronger import stronger
from .tasks import TASKS

COMMANDS: list[click.Command] = []


PART = click.option(
    "--part", type=click.Choice(list(TASKS)), default="classification", show_default=True
)
FOUND = (
    click.option("--model", default="tiny", show_default=True, help="folder, hub id or short name"),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        envvar="IA2MINI_DATA",
        help="holds relations/*.jsonl",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        help="of frozen weights",
    ),
)
SAVE = click.option(
    "--save", is_flag=True, help="keep the result in bench/results/, with the date and the machine"
)
SEEN = click.option(
    "--teachers",
    type=CommaSeparated(str, TEACHERS),
    default=",".join(TEACHERS),
    show_default=True,
    help="what they see",
)
OF_A_STUDY = ("teachers", "matched")  # options that are no `Options`


def what_is_matched(names: tuple[str, ...]):
    return click.option(
        "--matched", type=CommaSeparated(str, MATCHED), default=",".join(names), show_default=True
    )


def typed(*folders: str) -> str:
    """The command as it was typed, but for --save and where the folders of models lie."""
    words = [
        Path(word).name if word in folders else word for word in sys.argv[1:] if word != "--save"
    ]
    return " ".join(["python -m bench", *words])


def add_study(name: str, ask: Callable, *more, methods=METHODS) -> None:
    """A command that asks something of the runs of a study: `ask(subject, options, part, data)`."""

    @click.command(name, help=ask.__doc__)
    @combine_options(PART, *FOUND, SAVE, *more)
    @options_of(Options, n=(2, 4, 8), sets=10, methods=methods, eval_rows=100)
    def command(part, model, dtype, data_dir, save, **given):
        asked = {option: given.pop(option) for option in OF_A_STUDY if option in given}
        options = Options(**given)
        if name in ("bayes", "causes", "layers", "stronger") and options.select != "dev":
            raise UsageError(f"{name} takes the rates of the dev loss: leave out --select")
        result = ask(open_subject(model, "cpu", dtype), options, part, data_dir, **asked)
        show(result)
        finish([result], typed(model), save, name=f"{name}-{part}")
        if save and name == "layers":
            layers.draw()

    COMMANDS.append(command)


add_study("effect", effect)
add_study("causes", causes, SEEN, what_is_matched(MATCHED))
add_study("layers", layers.layers, what_is_matched(layers.MATCHED))
add_study("bayes", bayes, methods=BAYESIAN)
add_study("stronger", stronger)


@click.command("gain", help=gain.__doc__)
@SAVE
def gain_command(save):
    result = gain()
    show(result)
    finish([result], "python -m bench gain", save, name="gain")


@click.command("fit", help=gate.__doc__)
@click.option(
    "--tasks", default=114, show_default=True, help="generated; one in eight has random labels"
)
@click.option("--epochs", default=30, show_default=True)
@click.option(
    "--methods", type=CommaSeparated(str), default=",".join(FitOptions().methods), show_default=True
)
@SAVE
def fit_command(tasks, save, **given):
    result = gate(open_subject("tiny", "cpu"), tasks, FitOptions(**given))
    show(result)
    finish([result], typed(), save, name="fit-gate")


@click.command("rivals", help=rivals.__doc__)
@combine_options(*FOUND, SAVE)
@click.option(
    "--embedder",
    type=click.Path(path_type=Path),
    help="folder of a sentence-transformers model, for SetFit and the logistic regression",
)
@click.option(
    "--tasks", type=CommaSeparated(str, REAL), default=",".join(DATA_SETS), show_default=True
)
@click.option(
    "--sizes",
    type=CommaSeparated(int, least=2),
    default="4,8,16",
    show_default=True,
    help="rows a class",
)
@click.option(
    "--seeds", default=5, type=click.IntRange(1), show_default=True, help="draws of the rows"
)
@click.option(
    "--parts", type=CommaSeparated(str, PARTS), default=",".join(PARTS), show_default=True
)
@click.option(
    "--page", is_flag=True, help="only write docs/rivals.md and its figure from bench/results"
)
@options_of(FitOptions)
def rivals_command(model, data_dir, dtype, save, embedder, page, **given):
    cells = Cells(**pop_options(given, "tasks", "sizes", "seeds", "parts"))
    if not page:
        subject = open_subject(model, "cpu", dtype)
        result = rivals(subject, FitOptions(**given), data_dir, embedder, cells)
        show(result)
        click.echo("\n" + "\n".join(rivals_page.tables(asdict(result))))
        finish([result], typed(model, str(embedder)), save, name=f"rivals-{subject.name}")
    if page or save:
        write_text(rivals_page.PAGE, rivals_page.page(rivals_page.PAGE.read_text(encoding="utf-8")))
        rivals_figure.draw()
        click.echo(f"wrote {rivals_page.PAGE} and {rivals_figure.FIGURE}", err=True)


COMMANDS += [gain_command, fit_command, rivals_command]
