"""`python -m bench [BENCH]`: how fast, against whom, and what IA2 brings; `--help` tells more."""

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import torch

from ia2mini import UsageError
from ia2mini.cli import Commands, keep_freed_memory
from ia2mini.cli_options import Several, many, options_of
from ia2mini.files import write_text
from ia2mini.options import FitOptions, Options
from ia2mini.subject import open_subject

from . import cost, gpu, inference, layers, resources, training
from .averaged import averaged
from .causes import MATCHED, TEACHERS, causes
from .choice import choice, race
from .effect import METHODS, TASKS, effect
from .fit import fit
from .gain import gain
from .report import RESULTS, Result, finish, show
from .scale import scale
from .shapes import SHAPES, stand
from .table8 import table8
from .timing import Bystanders, recorded

CPU_SHAPES, GPU_SHAPES = ("tiny", "100m"), ("qwen3-0.6b", "qwen3-4b")


def shapes(shape: str | None, device: str) -> tuple[str, ...]:
    return (shape,) if shape else (CPU_SHAPES if device == "cpu" else GPU_SHAPES)


def run(name: str, shape: str | None, device: str, dtype: torch.dtype, select: str) -> list[Result]:
    """The results of one bench, shown as they come; `select`: which runs `cell` scores."""
    found = []

    def done(result: Result) -> None:
        result.remarks += [said] if (said := recorded()) else []
        show(result)
        found.append(result)

    benches = {
        "step": training.step,
        "collect": inference.collect,
        "icl": inference.icl,
        "generate": inference.generate,
    }
    largest = shapes(shape, device)[-1]
    if name == "kernel":
        done(resources.kernel(device))
    elif name == "memory":
        done(resources.memory(largest, device, dtype))
    elif name == "load":
        done(resources.load(largest, device))
    elif name == "scale":
        done(scale(shapes(shape, device)[0], device, dtype))
    else:
        for each in shapes(shape, device):
            ground = stand(each, device, dtype)
            if name == "cell":
                done(training.cell(ground, *training.portions(each, device, select)))
            else:
                done(benches[name](ground))
    return found


BENCHES = ("step", "cell", "collect", "icl", "generate", "kernel", "memory", "load", "scale")


def options(command):
    """What every bench of speed asks."""
    usual = f"{' and '.join(CPU_SHAPES)}; on a GPU {' and '.join(GPU_SHAPES)}"
    for option in (
        click.option("--save", is_flag=True, help="keep the results in bench/results/, with the date and the machine"),
        click.option(
            "--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: float32, on a GPU bfloat16]"
        ),
        click.option("--device", help="[default: a GPU if there is one]"),
        click.option("--shape", type=click.Choice(list(SHAPES)), help=f"[default: {usual}]"),
    ):
        command = option(command)
    return command


def several(names: tuple[str, ...], shape, device, dtype, save, select: str = "dev") -> None:
    warnings.simplefilter("ignore")
    keep_freed_memory()  # for all stacks alike
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    start, results = time.perf_counter(), []
    for name in names:
        with Bystanders() as others:
            results += run(name, shape, device, kind, select)
        click.echo(f"  {name}: {time.perf_counter() - start:.0f} s so far")
        results[-1].ratios["share of the processors that others had meanwhile"] = others.share
        if others.share > 0.05:
            click.secho(
                f"  others had {others.share:.0%} of the processors meanwhile: do not trust these numbers", fg="red"
            )
    click.echo(f"\n{time.perf_counter() - start:.0f} s in all")
    asked = [names[0]] if len(names) == 1 else []
    given = {"shape": shape, "dtype": dtype, "select": "" if select == "dev" else select}
    asked += [f"--{key} {value}" for key, value in given.items() if value]
    finish(results, " ".join(["python -m bench", *asked]), save)


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Commands, invoke_without_command=True, context_settings=SETTINGS)
@options
@click.pass_context
def main(context, **asked):
    """How fast ia2mini is, against transformers with peft as (a) the paper's scripts use them and (b) used well.

    Without a command: every bench of speed; on two cores about a quarter of an hour. `effect` asks what IA2 brings,
    `fit` whether what is shipped harms anyone, `pretrain` makes models/tiny.
    """
    if context.invoked_subcommand is None:
        several(BENCHES, **asked)
    elif any(asked.values()):
        raise UsageError(f"options come after the command: python -m bench {context.invoked_subcommand} …")


def add(name: str, about: str, *more) -> None:
    command = options(lambda **asked: several((name,), **asked))
    for option in more:
        command = option(command)
    main.command(name, help=about)(command)


SELECT = click.option(
    "--select",
    type=click.Choice(list(training.SCORES)),
    default="dev",
    show_default=True,
    help="all sides score the runs of the rate with the lowest dev loss, or every run",
)
add("cell", training.cell.__doc__, SELECT)
for bench in (training.step, inference.collect, inference.icl, inference.generate):
    add(bench.__name__, bench.__doc__)
for bench in (resources.kernel, resources.memory, resources.load, scale):
    add(bench.__name__, bench.__doc__)


STUDY = (
    click.option("--part", type=click.Choice(list(TASKS)), default="classification", show_default=True),
    click.option("--model", default="tiny", show_default=True, help="folder, hub id or short name"),
    click.option("--data-dir", type=click.Path(path_type=Path), envvar="IA2MINI_DATA", help="holds relations/*.jsonl"),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="of frozen weights"),
    click.option("--save", is_flag=True),
)


def typed(model: str) -> str:
    """The command as it was typed, but for the model's folder and --save."""
    words = (Path(word).name if word == model else word for word in sys.argv[1:] if word != "--save")
    return " ".join(["python -m bench", *words])


def add_study(name: str, ask: Callable, select: str, *more) -> None:
    """A command that asks something of the runs of a study: `ask(subject, options, part, data)`."""

    @main.command(name, help=ask.__doc__)
    @many(*STUDY, *more)
    @options_of(Options, n=(2, 4, 8), sets=10, methods=METHODS, eval_rows=100, select=select)
    def command(part, model, dtype, data_dir, save, **given):
        asked = {name: given.pop(name) for name in ("folds", "teachers", "matched") if name in given}
        options = Options(**given)
        if len(options.adapters) > 1:
            raise UsageError("a bench compares methods of one adapter: give one --adapter, --rank and set of --targets")
        if name in ("causes", "layers", "averaged") and options.select != "dev":
            raise UsageError(f"{name} takes the rates of the dev loss: leave out --select")
        show(result := ask(open_subject(model, "cpu", dtype), options, part, data_dir, **asked))
        finish([result], typed(model), save, name=f"{name}-{part}")
        if save and name == "layers":
            layers.draw()


FOLDS = click.option("--folds", is_flag=True, help="also cross-validation within each set: several times the training")
SEEN = click.option(
    "--teachers", type=Several(str, TEACHERS), default=",".join(TEACHERS), show_default=True, help="what they see"
)


def matched(names: tuple[str, ...]):
    return click.option("--matched", type=Several(str, MATCHED), default=",".join(names), show_default=True)


add_study("effect", effect, "dev")
add_study("causes", causes, "dev", SEEN, matched(MATCHED))
add_study("layers", layers.layers, "dev", matched(layers.MATCHED))
add_study("averaged", averaged, "dev")
add_study("choice", choice, "both", FOLDS)
add_study("race", race, "both")


@main.command("gain", help=gain.__doc__)
@click.option("--save", is_flag=True)
def gain_command(save):
    show(result := gain())
    finish([result], "python -m bench gain", save, name="gain")


@main.command("table8", help=table8.__doc__)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def table8_command(folders):
    click.echo("\n".join(table8(folders)))


@main.command("cost")
def cost_command():
    """Write docs/cost.md: FLOPs, bytes, kernels and least seconds of a cell's stages, computed from shapes."""
    write_text(cost.PAGE, cost.page())
    click.echo(f"wrote {cost.PAGE}")


@main.command("gpu")
@click.option("--again", is_flag=True, help="forget what earlier calls have done")
def gpu_command(again):
    """The first hour on a GPU: its tests, then step, cell, kernel, collect, icl, generate and memory on real shapes.

    At most 25 minutes a call and 9 a step; every step is saved as it ends, and the same command goes on.
    """
    if not torch.cuda.is_available():
        raise UsageError("bench gpu: PyTorch sees no GPU here")
    kept = RESULTS / f"gpu-{torch.cuda.get_device_name().replace(' ', '-')}.json"
    if again:
        kept.unlink(missing_ok=True)
    todo = gpu.steps()
    found = gpu.first_hour(todo, kept)
    missing = [name for name in todo if found.get(name, {}).get("status") != 0]
    click.echo(f"missing or failed: {', '.join(missing)}" if missing else "all is done")
    sys.exit(bool(missing))


@main.command("fit", help=fit.__doc__)
@click.option("--part", type=click.Choice(["all", "sft", "gate", "real"]), default="all", show_default=True)
@click.option("--seeds", default=10, show_default=True, help="draws of the rows")
@click.option("--tasks", default=114, show_default=True, help="generated; one in eight has random labels")
@click.option("--epochs", default=30, show_default=True)
@click.option("--methods", type=Several(str), default=",".join(FitOptions().methods), show_default=True)
@many(*STUDY[1:])
def fit_command(part, methods, model, data_dir, dtype, save, **counts):
    results = fit(part, counts, methods, {"model": model, "data_dir": data_dir, "dtype": dtype})
    for result in results:
        show(result)
    finish(results, typed(model), save, name=f"fit-{part}")


@main.command("pretrain")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="folder of the checkpoint; rerun, it goes on"
)
@click.option("--steps", default=3000, type=click.IntRange(1), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def pretrain_command(out, steps, seed, device):
    """Make the embedded model from nothing: a small Qwen3 that learns in context, as models/tiny was made."""
    from .pretrain import pretrain

    pretrain(out, steps=steps, seed=seed, device=device)
    click.echo(f"{out}: config.json, model.safetensors, tokenizer.json, curve.json; use it as --model {out}")


if __name__ == "__main__":
    main()
