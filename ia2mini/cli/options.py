"""Options of the command line: those made from dataclasses, and those that several commands share."""

import os
from dataclasses import fields
from functools import cache, partial, reduce
from pathlib import Path
from typing import get_args

import click


def type_of(kind, choices: tuple = (), least: int | None = None) -> click.ParamType:
    """The type of an option: one of `choices`, a number from `least` on, or (tuple[int, ...]) several of them."""
    if get_args(kind):
        return CommaSeparated(get_args(kind)[0], choices, least)
    if choices:
        return click.Choice(choices)
    return click.types.convert_type(kind) if least is None else click.IntRange(least)


class CommaSeparated(click.ParamType):
    """Values of one type, separated by commas."""

    def __init__(self, kind: type, choices: tuple = (), least: int | None = None):
        self.name = {int: "N,N", float: "X,X", str: "A,B"}[kind]
        self.type = type_of(kind, choices, least)

    def convert(self, value, param, context) -> tuple:
        if isinstance(value, tuple):
            return value
        parts = [part for part in str(value).split(",") if part]
        return tuple(dict.fromkeys(self.type.convert(part, param, context) for part in parts))


def options_of(cls: type, **defaults):
    """Give a command one option for each documented field of a dataclass; `defaults` replace those of the fields."""
    found = []
    for f in fields(cls):
        about = f.metadata
        if "help" not in about:
            continue
        default = defaults.get(f.name, f.default)
        given = ",".join(map(str, default)) if isinstance(default, tuple) else default
        more: dict = {"is_flag": True}
        text = about["help"]
        if f.type is not bool:
            kind = type_of(f.type, about["choices"], about["least"])
            more = {"type": kind, "show_default": not about["shown"]}
        if about["shown"]:  # click would write it in brackets
            text += f"  [default: {about['shown']}]"
        name = f.name.replace("_", "-")
        name = f"--{name}/--no-{name}" if default is True else f"--{name}"
        found.append(click.option(name, f.name, default=given, help=text, **more))
    return combine_options(*found)


file_option = partial(click.option, type=click.Path(path_type=Path))
flag = partial(click.option, is_flag=True)


def combine_options(*options):
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


def pop_options(given: dict, *names: str) -> dict:
    """Remove these options from `given` and return them."""
    return {name: given.pop(name) for name in names}


def make_deterministic(context, option, wanted: bool) -> None:
    """Make CUDA compute the same bits every time. Call it before CUDA is first used, which reads the variable."""
    if wanted:
        import torch

        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)


checkpoint_options = combine_options(
    click.option(
        "--model",
        default="tiny",
        help="Use this model: a folder, a hub id or a short name (`ia2mini models` lists them). "
        "Your own rows need one.",
    ),
    click.option("--revision", help="Take this branch, tag or commit on the hub."),
)
machine_options = combine_options(
    click.option(
        "--device",
        help="Compute on this device: cpu, cuda, cuda:1 and so on.  [default: a GPU if there is one]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Keep the model's frozen weights in this format.  [default: bfloat16 on a GPU; on a CPU too, "
        "where CPU and checkpoint both have it, except in `run`; else float32]",
    ),
    click.option(
        "--check/--no-check", default=True, help="Check that no weight is NaN or infinite."
    ),
)
model_options = combine_options(
    checkpoint_options,
    machine_options,
    flag(
        "--deterministic",
        expose_value=False,
        callback=make_deterministic,
        help="Compute the same bits every time on a GPU, more slowly.",
    ),
)
GUESS = "  [default: guessed from the header]"
column_options = combine_options(
    click.option("--prompt-column", help=f"Take the prompt from this column.{GUESS}"),
    click.option("--answer-column", help=f"Take the true answer from this column.{GUESS}"),
    click.option(
        "--template",
        help="Write prompts in this way, columns in braces.  [default: from the column, "
        "as 'Review: {review}\\nSentiment:']",
    ),
)
data_options = combine_options(
    file_option("--data", help="Read your own rows from this file, in place of TASK."),
    column_options,
    file_option(
        "--eval-data",
        help="Evaluate --data on the rows of this file.  [default: a held-out part]",
    ),
    file_option(
        "--data-dir",
        help="Read the paper's tasks from DIR/sst2/train.jsonl and so on.  [default: hub]",
    ),
)


def compile_and_checkpoint(
    model, compiling: bool | None = None, checkpointing: bool = False
) -> None:
    """Compile and checkpoint a model's blocks as the options say (None: compile on a GPU)."""
    from ..scale.blocks import checkpoint_blocks, compile_blocks
    from ..scale.graphs import RECORDERS

    if compiling is None:
        compiling = next(model.parameters()).is_cuda
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
    """Print once that compiling begins."""
    click.echo(
        f"compiling (minutes at first; kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']})", err=True
    )
