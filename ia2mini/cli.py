"""The command line: thin shells over the functions of the other rooms."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from . import UsageError

DEMO, DEMO_ROWS = ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap"), 40  # about a minute


class Commands(click.Group):
    """A group that turns a user's mistake into one line and exit code 2, and an interrupt into 130."""

    def main(self, *args, **more):
        try:
            sys.exit(super().main(*args, **more | {"standalone_mode": False}))
        except UsageError as error:
            mistake(str(error))
        except click.UsageError as error:
            mistake(f"{error.format_message()} `{error.ctx.command_path} --help` lists what there is")
        except click.ClickException as error:
            mistake(error.format_message())
        except click.Abort:
            click.echo(
                "\nia2mini: interrupted; what was finished is kept, and the same command goes on from there", err=True
            )
            sys.exit(130)
        except OSError as error:
            if error.errno is None:
                raise
            mistake(f"{error.filename or 'files'}: {error.strerror}")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; torch may not be loaded yet
                raise
            mistake(
                "the device has too little memory for this; use a smaller --model, --dtype bfloat16 or another --device"
            )


def mistake(text: str) -> None:
    click.echo(f"ia2mini: {text}", err=True)
    sys.exit(2)


class Several(click.ParamType):
    """Values separated by commas."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def convert(self, value, param, context) -> tuple:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self.kind(part) for part in str(value).split(",") if part))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.kind.__name__} values separated by commas", param, context)


INTS, FLOATS, WORDS = Several(int, "N,N"), Several(float, "X,X"), Several(str, "A,B")


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
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of mapping it anew for every tensor: a tenth or more of a small model's step on a CPU."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def progress(label: str, total: int):
    """A bar on stderr; on a terminal only, so that logs stay clean."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed} {postfix}"
    return tqdm(desc=f"{label:<34}", total=total, leave=False, disable=None, bar_format=form)


def model_options(command):
    """The options of every command that loads a model."""
    for option in (
        click.option("--revision", help="branch, tag or commit on the hub"),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16"]),
            help="of frozen weights  [default: float32, on a GPU bfloat16]",
        ),
        click.option("--device", help="cpu, cuda, cuda:1 …  [default: a GPU if there is one]"),
        click.option(
            "--model",
            default="tiny",
            help="folder, hub id, or short name: tiny (embedded), qwen3-4b-base, llama-3.2-1b …",
        ),
    ):
        command = option(command)
    return command


def load_model(model: str, device: str | None, dtype: str | None, revision: str | None):
    """The Subject of the command's options, with their defaults."""
    import torch

    from .experiment import Subject
    from .models.checkpoint import SHORT_NAMES, TINY, load, locate

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {device}: not usable here ({str(error).splitlines()[0]}); use --device cpu"
        ) from None
    folder = locate(model, revision)
    network, tokenizer = load(folder, getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")), device)
    local = folder == TINY or Path(model).is_dir()
    name = folder.resolve().name if local else model.replace("/", "--")
    return Subject(network, tokenizer, folder, name, str(folder) if local else SHORT_NAMES.get(model.lower(), model))


@main.command()
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
@model_options
@click.option("--n", "sizes", type=INTS, default="4", help="training rows of a set; several: 2,4,8")
@click.option(
    "--methods", type=WORDS, default="base,icl,sft,ia2,ia2-sft", help="also sft-ia2, ia2+sft, soft, sft-sft (a control)"
)
@click.option(
    "--sets", default=5, type=click.IntRange(1), help="few-shot sets, each drawn from the pool with its own seed"
)
@click.option(
    "--rates",
    type=FLOATS,
    default="",
    show_default=False,
    help="learning rates  [default: the paper's three for the adapter]",
)
@click.option(
    "--betas", type=FLOATS, default="", show_default=False, help="shares of cross-entropy in ia2+sft  [default: four]"
)
@click.option("--adapter", type=click.Choice(["lora", "ia3", "prompt", "prefix", "full"]), default="lora")
@click.option("--rank", default=8, help="of LoRA")
@click.option("--alpha", default=8.0, help="of LoRA")
@click.option(
    "--targets", type=WORDS, default="", show_default=False, help="matrices to adapt  [default: q_proj,k_proj,o_proj]"
)
@click.option("--virtual-tokens", default=20, type=click.IntRange(1), help="of prompt and prefix tuning")
@click.option(
    "--layers",
    type=INTS,
    default="",
    show_default=False,
    help="layers whose attention outputs are aligned  [default: all]",
)
@click.option(
    "--labels",
    type=click.Choice(["truth", "icl"]),
    default="truth",
    help="what SFT trains on: true answers or ICL responses",
)
@click.option("--soft-k", default=1024, type=click.IntRange(1), help="likeliest tokens that soft labels keep")
@click.option(
    "--icl-demos",
    type=click.Choice(["set", "pool"]),
    default="set",
    help="the set's N rows, or N - 1 other rows for each query",
)
@click.option(
    "--select",
    type=click.Choice(["dev", "eval"]),
    default="dev",
    help="rate by dev loss, or by evaluation rows as in the paper",
)
@click.option(
    "--paper-compat", is_flag=True, help="the released scripts' choices where they differ from ours (docs/reference.md)"
)
@click.option("--batch-size", default=4, type=click.IntRange(1), help="training rows of a run in one step")
@click.option("--epochs", default=50, type=click.IntRange(1), help="at most")
@click.option(
    "--patience", default=5, type=click.IntRange(1), help="looks at the dev loss without improvement before a run stops"
)
@click.option("--seed", default=0, help="of every draw; 0 takes the sets of the paper's scripts")
@click.option(
    "--eval-rows", type=click.IntRange(1), help=f"evaluation rows at most  [default: 500; the demo {DEMO_ROWS}]"
)
@click.option(
    "--side-by-side", type=click.IntRange(1), help="runs trained at once  [default: all]; fewer need less memory"
)
@click.option(
    "--compile/--no-compile",
    "compiling",
    default=None,
    help="torch.compile, and on a GPU CUDA graphs  [default: on a GPU]",
)
@click.option(
    "--checkpointing", is_flag=True, help="keep less for the backward pass and compute it again: for long answers"
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="local sets in hub columns, as DIR/sst2/train.jsonl  [default: hub]",
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="your own rows: JSONL, CSV, TSV or Parquet (instead of TASK)"
)
@click.option("--prompt-column", default="text", help="of --data")
@click.option("--answer-column", default="label", help="of --data")
@click.option("--template", help="prompt of --data, columns in braces  [default: 'Text:{text}\\nLabel:']")
@click.option(
    "--eval-data", type=click.Path(path_type=Path), help="evaluation rows for --data  [default: a held-out part]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="runs",
    help="folder of results; the same command goes on where it was",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON document on the last line of stdout")
def run(
    tasks, model, device, dtype, revision, sizes, compiling, checkpointing, data, data_dir, out, as_json, **settings
):
    """Train and compare methods on TASKs: a table, figures, and the chosen adapters in PEFT's format.

    Without TASK, the demo: the four toy classification tasks. All sets and rates of a method are trained side by side. The table shows the
    rate with the lowest dev loss and, beside it, the one best on the evaluation rows, as in the paper.
    """
    from .experiment import Options, compare
    from .graphs import RECORDERS
    from .models.common import checkpointed, compiled, wrap_blocks
    from .tasks import custom_task, find_task
    from .train import METHODS

    if unknown := set(settings["methods"]) - {"base", "icl", *METHODS}:
        raise UsageError(f"unknown method {min(unknown)!r}; methods: base, icl, {', '.join(METHODS)}")
    for option, given in (("--n", sizes), ("--methods", settings["methods"])):
        if not given:
            raise UsageError(f"{option}: give at least one")
    if bad := [rate for rate in settings["rates"] if not 0 < rate < float("inf")]:
        raise UsageError(f"--rates {bad[0]:g}: a learning rate is a positive number")
    if data and tasks:
        raise UsageError("give either TASK or --data, not both")
    if not data and (settings["template"] or settings["eval_data"]):
        raise UsageError("--template and --eval-data say how your own rows are read; give --data too")
    if settings["paper_compat"]:
        settings["select"] = "eval"
    settings["eval_rows"] = settings["eval_rows"] or (500 if tasks or data else DEMO_ROWS)
    template = settings["template"]
    own = [settings.pop(name) for name in ("prompt_column", "answer_column", "template", "eval_data")]
    chosen = [custom_task(data, *own)] if data else [find_task(t) for t in tasks or DEMO]
    side_by_side, options = settings.pop("side_by_side"), Options(**settings)
    subject = load_model(model, device, dtype, revision)
    if compiling is None:
        compiling = next(subject.model.parameters()).is_cuda
    elif not compiling:
        RECORDERS.clear()
    wrap_blocks(subject.model, *[compiled] * compiling, *[checkpointed] * checkpointing)
    chosen = [fitting(task, subject.tokenizer, template) for task in chosen]
    document, kept = compare(chosen, sizes, subject, options, out, data_dir, side_by_side, progress)
    show(document)
    count = len(list(kept.glob("*.png")))
    drawn = f"{count} figures" if count else "no figures (they need matplotlib: pip install 'ia2mini[report]')"
    click.echo(f"{kept}: results.json, tables, report.html, {drawn}, {len(document['adapters'])} adapters for peft")
    if as_json:
        click.echo(json.dumps(document))


def show(document: dict) -> None:
    from .report import seconds_line, table

    click.echo(table(document, color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    click.echo(seconds_line(document))


def fitting(task, tokenizer, template: str | None):
    """A task on own rows as this tokenizer can read it; others stay as they are.

    Labels of several tokens are generated as text. Where an answer would merge with the default template, a line end keeps them apart.
    """
    from .tasks import load_examples

    if not task.files:
        return task
    if any(len(tokenizer.encode(label, special=False)) > 1 for label in task.labels):
        task = task.as_text()
    if template is None and any(tokenizer.merges(e.prompt, e.answer) for e in load_examples(task, "train").rows):
        task = replace(task, prompt=task.prompt + "\n")
        click.echo(
            f"answers would merge with the end of the template in this tokenizer, so it is now {task.prompt!r}",
            err=True,
        )
    return task


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def rescore(folder):
    """Parse the generated texts of a finished run again, without the model, and print its table."""
    from .experiment import rescore as parse_again

    show(parse_again(folder))


@main.command()
@model_options
@click.option("--prompt", required=True, help="text to continue")
@click.option("--max-tokens", default=100, type=click.IntRange(1))
@click.option("--stop", help="text at which to stop, besides the end of sequence")
def generate(model, device, dtype, revision, prompt, max_tokens, stop):
    """Continue a text greedily; the continuation goes to stdout."""
    from .generate import generate as continue_text

    subject = load_model(model, device, dtype, revision)
    tokenizer = subject.tokenizer
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("--prompt is empty and this model's tokenizer adds no BOS; give some text")
    (response,) = continue_text(subject.model, tokenizer, [ids], max_tokens, stop)
    click.echo(tokenizer.decode(ids + response)[len(tokenizer.decode(ids)) :])


@main.command()
@click.argument("name", required=False, metavar="[TASK]")
@model_options
@click.option("--n", default=4, type=click.IntRange(2), help="training rows of the set that is shown")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="local sets in hub columns, as DIR/sst2/train.jsonl  [default: hub]",
)
def tasks(name, model, device, dtype, revision, n, data_dir):
    """List the tasks; with TASK, show what the model sees: the prompt of one set with its demonstrations, and token counts."""
    from .tasks import all_tasks, find_task, load_examples

    if name is None:
        click.echo(f"{'task':<24}{'paper':<16}{'answer':<28}evaluated on (* out of distribution)")
        for task in all_tasks().values():
            answer = "/".join(task.labels)[:26] if task.labels else f"text, at most {task.max_tokens} tokens"
            on = ", ".join([task.name, *(f"{e}*" for e in task.ood)]) if task.train else "evaluation only"
            click.echo(f"{task.name:<24}{task.tag if task.hub else '–':<16}{answer:<28}{on}")
        return
    from .episode import draw_episode
    from .models.checkpoint import locate
    from .tokenizer import Tokenizer

    task, tokenizer = find_task(name), Tokenizer.from_folder(locate(model, revision))
    examples = load_examples(task, "eval", data_dir)
    sizes = [f"evaluation: {examples.origin['used']} of {examples.origin['rows']} rows"]
    demonstrations = []
    if task.train:
        pool = load_examples(task, "train", data_dir)
        sizes.insert(0, f"pool: {pool.origin['used']} of {pool.origin['rows']} rows")
        demonstrations = draw_episode(pool.rows, n, 0).icl[0]
    click.echo(f"{task.name} ({task.tag}) from {task.hub or 'this package'} · {' · '.join(sizes)}\n")
    for role, color, prompt, answer in [("demonstration", "cyan", d.prompt, d.answer) for d in demonstrations] + [
        ("query", "yellow", examples.rows[0].prompt, examples.rows[0].answer)
    ]:
        count = len(tokenizer.encode(prompt)), len(tokenizer.encode_answer(prompt, answer))
        click.secho(f"{role}: {count[0]} tokens, answer {count[1]}", dim=True)
        click.echo(click.style(prompt, fg=color) + click.style(answer, fg="green", bold=True) + "\n")


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="folder of the checkpoint; rerun, it goes on where it was",
)
@click.option("--steps", default=3000, type=click.IntRange(1))
@click.option("--seed", default=0)
@click.option("--device", default="cpu")
def pretrain(out, steps, seed, device):
    """Make the embedded model from nothing: a small Qwen3 that learns in context, as models/tiny was made."""
    from .pretrain import pretrain as train

    train(out, steps=steps, seed=seed, device=device)
    click.echo(f"{out}: config.json, model.safetensors, tokenizer.json, curve.json; use it as --model {out}")
