"""`python -m bench [BENCH]`: how fast, against whom, and what IA2 brings; `--help` tells more."""

import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from ia2mini import UsageError
from ia2mini.cli.main import Commands, keep_freed_memory
from ia2mini.cli.options import Several, many, options_of
from ia2mini.files import write_text
from ia2mini.engine.options import FitOptions, Options
from ia2mini.engine.subject import open_subject

from . import cost, gpu, inference, layers, resources, training
from .averaged import averaged
from .causes import MATCHED, TEACHERS, causes
from .choice import choice, race
from .effect import METHODS, TASKS, effect
from .fit import fit
from .gain import gain
from .report import RESULTS, Result, finish, keep, show, written
from .scale import scale
from .shapes import SHAPES, stand
from .table8 import table8
from .timing import Bystanders, recorded

CPU_SHAPES, GPU_SHAPES = ("tiny", "100m"), ("qwen3-0.6b", "qwen3-4b")


def shapes(shape: str | None, device: str) -> tuple[str, ...]:
    return (shape,) if shape else (CPU_SHAPES if device == "cpu" else GPU_SHAPES)


QUICK: dict[str, dict] = {  # sizes that show in seconds whether all stacks run and agree
    "step": {"runs": 2, "seconds": 0.0},
    "cell": {"whole": training.Size(sets=2, rates=1, steps=2, rows=8), "repeats": 1},
    "collect": {"rows": 2, "tokens": 8, "sample": 2, "seconds": 0.0},
    "icl": {"queries": 20, "shown": 3, "sample": 8, "seconds": 0.0},
    "generate": {"rows": 4, "length": 8, "tokens": 16, "seconds": 0.0},
    "kernel": {"sizes": ((64, 1), (64, 32)), "seconds": 0.0},
    "memory": {"tokens": 8},
}


def run(
    name: str, shape: str | None, device: str, dtype: torch.dtype, select: str, quick: bool, done: Callable
) -> None:
    """One bench; `done` is called with every result as it comes. `select`: which runs `cell` scores."""
    benches = {
        "step": training.step,
        "collect": inference.collect,
        "icl": inference.icl,
        "generate": inference.generate,
    }
    largest = shapes(shape, device)[-1]
    sizes = QUICK.get(name, {}) if quick else {}
    if name == "kernel":
        done(resources.kernel(device, **sizes))
    elif name == "memory":
        done(resources.memory(largest, device, dtype, **sizes))
    elif name == "load":
        done(resources.load(largest, device))
    elif name == "scale":
        done(scale(shapes(shape, device)[0], device, dtype))
    else:
        for each in shapes(shape, device):
            ground = stand(each, device, dtype)
            if name != "cell":
                done(benches[name](ground, **sizes))
            elif quick:
                done(training.cell(ground, **sizes))
            else:
                done(training.cell(ground, *training.portions(each, device, select)))


BENCHES = ("step", "cell", "collect", "icl", "generate", "kernel", "memory", "load", "scale")


def options(command):
    """What every bench of speed asks."""
    usual = f"{' and '.join(CPU_SHAPES)}; on a GPU {' and '.join(GPU_SHAPES)}"
    for option in (
        click.option("--save", is_flag=True, help="keep the results in bench/results/, with the date and the machine"),
        click.option(
            "--quick", is_flag=True, help="tiny sizes, once: do all stacks run and agree? The times say little"
        ),
        click.option(
            "--dtype", type=click.Choice(["float32", "bfloat16"]), help="[default: float32, on a GPU bfloat16]"
        ),
        click.option("--device", help="[default: a GPU if there is one]"),
        click.option("--shape", type=click.Choice(list(SHAPES)), help=f"[default: {usual}]"),
    ):
        command = option(command)
    return command


def several(names: tuple[str, ...], shape, device, dtype, save, quick, select: str = "dev") -> None:
    """Run the benches. Of several, one that fails is told and does not end the others; then the exit status is 1."""
    warnings.simplefilter("ignore")
    keep_freed_memory()  # for all stacks alike
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    asked = [names[0]] if len(names) == 1 else []
    given = {"shape": shape, "dtype": dtype, "select": "" if select == "dev" else select}
    asked += [f"--{key} {value}" for key, value in given.items() if value]
    asked += ["--quick"] if quick else []
    command = " ".join(["python -m bench", *asked])
    start = time.perf_counter()
    results: list[Result] = []
    failed = []

    def done(result: Result) -> None:
        if said := recorded():
            result.remarks.append(said)
        show(result)
        results.append(result)
        if save:
            keep(written(results, command))

    for name in names:
        with Bystanders() as others:
            try:
                run(name, shape, device, kind, select, quick, done)
            except Exception:
                if len(names) == 1:
                    raise
                traceback.print_exc()
                failed.append(name)
                continue
        click.echo(f"  {name}: {time.perf_counter() - start:.0f} s so far")
        results[-1].ratios["share of the processors that others had meanwhile"] = others.share
        if others.share > 0.05:
            click.secho(
                f"  others had {others.share:.0%} of the processors meanwhile: do not trust these numbers", fg="red"
            )
    click.echo(f"\n{time.perf_counter() - start:.0f} s in all")
    finish(results, command, save)
    if failed:
        click.secho(f"failed: {', '.join(failed)}", fg="red")
        sys.exit(1)


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


def here(command: list[str], *about) -> tuple[int, str]:
    """Run a bench in this process, whose imports then serve all of them; other commands as `gpu.attempt` does."""
    if command[2] != "bench":
        return gpu.attempt(command, *about)
    try:
        main.main(command[3:])
    except SystemExit as end:
        return end.code or 0, ""
    except Exception:
        traceback.print_exc()
    return 1, ""


@main.command("gpu")
@click.option("--again", is_flag=True, help="forget what earlier calls have done")
@click.option("--failed", is_flag=True, help="also try again what failed or ran too long in an earlier call")
@click.option("--dry", is_flag=True, help="every step on this CPU, at tiny sizes in bfloat16: does each of them run?")
def gpu_command(again, failed, dry):
    """The first hour on a GPU: its tests, then step, cell, kernel, collect, icl, generate and memory on real shapes.

    At most 25 minutes a call and 9 a step. What a step says is shown and kept as it comes; a step that fails does not
    end the others. The same command goes on with what is missing.
    """
    if dry:
        with TemporaryDirectory() as folder:
            missing = gpu.first_hour(gpu.dry_steps(), Path(folder) / "dry.json", run=here)
    elif torch.cuda.is_available():
        kept = RESULTS / f"gpu-{torch.cuda.get_device_name().replace(' ', '-')}.json"
        if again:
            kept.unlink(missing_ok=True)
        missing = gpu.first_hour(gpu.steps(), kept, failed)
    else:
        raise UsageError("bench gpu: PyTorch sees no GPU here; --dry tries every step on the CPU")
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
