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
from ia2mini.cli.group import Commands
from ia2mini.cli.streams import keep_freed_memory, need_output
from ia2mini.files import write_text

from . import cost_page, gpu, inference, resources, training
from .report import RESULTS, Result, finish, keep, show, written
from .scale import scale
from .shapes import SHAPES, stand
from .studies.commands import COMMANDS
from .timing import Bystanders, recorded
from .where import where

CPU_SHAPES = ("tiny", "100m")
GPU_SHAPES = ("qwen3-0.6b", "qwen3-4b")
BUSY = 0.05  # share of the processors that others may have before a result is not to be trusted


def shapes(shape: str | None, device: str) -> tuple[str, ...]:
    if shape:
        return (shape,)
    return CPU_SHAPES if device == "cpu" else GPU_SHAPES


QUICK: dict[str, dict] = {  # sizes that show in seconds whether all stacks run and agree
    "step": {"runs": 2, "seconds": 0.0},
    "cell": {"whole": training.Size(sets=2, rates=1, steps=2, rows=8), "repeats": 1},
    "collect": {"rows": 2, "tokens": 8, "sample": 2, "seconds": 0.0},
    "icl": {"queries": 20, "shown": 3, "sample": 8, "seconds": 0.0},
    "generate": {"rows": 4, "length": 8, "tokens": 16, "seconds": 0.0},
    "where": {"runs": 2, "steps": 1},
    "kernel": {"sizes": ((64, 1), (64, 32)), "seconds": 0.0},
    "memory": {"tokens": 8},
}


def run(
    name: str,
    shape: str | None,
    device: str,
    dtype: torch.dtype,
    select: str,
    quick: bool,
    done: Callable,
) -> None:
    """One bench; `done` is called with every result as it comes. `select`: which runs `cell` scores."""
    benches = {
        "step": training.step,
        "collect": inference.collect,
        "icl": inference.icl,
        "generate": inference.generate,
        "where": where,
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
        click.option(
            "--save",
            is_flag=True,
            help="keep the results in bench/results/, with the date and the machine",
        ),
        click.option(
            "--quick",
            is_flag=True,
            help="tiny sizes, once: do all stacks run and agree? The times say little",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            help="[default: float32, on a GPU bfloat16]",
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
    command = typed(names, shape, dtype, select, quick)
    start = time.perf_counter()
    results: list[Result] = []
    failed = []

    def done(result: Result) -> None:
        said = recorded()
        if said:
            result.remarks.append(said)
        show(result)
        results.append(result)
        if save:
            keep(written(results, command))

    for name in names:
        with Bystanders() as others:
            try:
                run(name, shape, device, kind, select, quick, done)
            except BrokenPipeError:  # nobody reads on, as with `| head -1`
                raise
            except Exception:
                if len(names) == 1:
                    raise
                traceback.print_exc()
                failed.append(name)
                continue
        click.echo(f"  {name}: {time.perf_counter() - start:.0f} s so far")
        results[-1].ratios["share of the processors that others had meanwhile"] = others.share
        if others.share > BUSY:
            warning = f"others had {others.share:.0%} of the processors meanwhile: do not trust these numbers"
            click.secho(f"  {warning}", fg="red")
    click.echo(f"\n{time.perf_counter() - start:.0f} s in all")
    finish(results, command, save)
    if failed:
        click.secho(f"failed: {', '.join(failed)}", fg="red")
        sys.exit(1)


def typed(names: tuple[str, ...], shape, dtype, select: str, quick: bool) -> str:
    """The command of a speed bench, as far as it says what is measured."""
    words = ["python -m bench"]
    if len(names) == 1:
        words.append(names[0])
    given = {"shape": shape, "dtype": dtype, "select": None if select == "dev" else select}
    words += [f"--{option} {value}" for option, value in given.items() if value]
    if quick:
        words.append("--quick")
    return " ".join(words)


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Commands, invoke_without_command=True, context_settings=SETTINGS)
@options
@click.pass_context
def main(context, **asked):
    """How fast ia2mini is, against transformers with peft as (a) the paper's scripts use them and (b) used well.

    Without a command: every bench of speed; on two cores about ten minutes. Studies ask how good it is:
    `effect` what IA2 brings, `causes` and `layers` why, `gain` what tells beforehand, `fit` whether what is shipped
    harms anyone, `rivals` what others ship. `pretrain` makes models/tiny.
    """
    need_output()
    if context.invoked_subcommand is None:
        several(BENCHES, **asked)
    elif any(asked.values()):
        raise UsageError(
            f"options come after the command: python -m bench {context.invoked_subcommand} …"
        )


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
for bench in (training.step, where, inference.collect, inference.icl, inference.generate):
    add(bench.__name__, bench.__doc__)
for bench in (resources.kernel, resources.memory, resources.load, scale):
    add(bench.__name__, bench.__doc__)


for study in COMMANDS:
    main.add_command(study)


@main.command("cost")
def cost_command():
    """Write docs/cost.md: FLOPs, bytes, kernels and least seconds of a cell's stages, computed from shapes."""
    write_text(cost_page.PAGE, cost_page.page())
    click.echo(f"wrote {cost_page.PAGE}")


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
@click.option(
    "--failed", is_flag=True, help="also try again what failed or ran too long in an earlier call"
)
@click.option(
    "--dry",
    is_flag=True,
    help="every step on this CPU, at tiny sizes in bfloat16: does each of them run?",
)
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


@main.command("pretrain")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="folder of the checkpoint; rerun, it goes on",
)
@click.option("--steps", default=3000, type=click.IntRange(1), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def pretrain_command(out, steps, seed, device):
    """Make the embedded model from nothing: a small Qwen3 that learns in context, as models/tiny was made."""
    from .pretrain import pretrain

    pretrain(out, steps=steps, seed=seed, device=device)
    click.echo(
        f"{out}: config.json, model.safetensors, tokenizer.json, curve.json; use it as --model {out}"
    )


if __name__ == "__main__":
    main()
