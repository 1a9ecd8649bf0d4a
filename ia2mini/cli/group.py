"""The command line: thin shells over the library's functions. Torch is imported only by commands that compute."""

import os
import shlex
import signal
import sys
import warnings
from contextlib import suppress

import click

from .. import UsageError
from ..errors import NO_MEMORY, out_of_memory
from ..files import plain
from ..scale import ranks
from .help import ORDER, GroupedCommand
from .streams import check_arguments, keep_freed_memory, need_output, open_streams

# commands that only print; `predict` without --out does, too
PRINTING = ("score", "generate", "tasks", "models")


class Commands(click.Group):
    """Commands that turn a user's mistake into one line and exit code 2, and an interrupt into exit code 130."""

    command_class = GroupedCommand

    def list_commands(self, context) -> list[str]:
        rank = dict(zip(ORDER, range(len(ORDER))))  # a command that is new comes last
        return sorted(self.commands, key=lambda name: (rank.get(name, len(rank)), name))

    def invoke(self, context):
        ranks.start()
        return super().invoke(context)

    def main(self, args=None, **more):
        interrupts = []
        warnings.showwarning = lambda text, *where, **_: say(f"warning: {text}", f"warning: {text}")
        try:
            heed_interrupts(interrupts)
            open_streams()
            check_arguments(sys.argv[1:] if args is None else list(args))
            sys.exit(super().main(args, **more | {"standalone_mode": False}))
        # click does not catch the latter everywhere
        except (Exception, KeyboardInterrupt) as error:
            if interrupts or isinstance(error, (click.Abort, KeyboardInterrupt)):
                kept = "finished work is kept, and the same command resumes it"
                say(f"interrupted; {kept}", before="\n")
                sys.exit(130)
            mistake = what_happened(error)
            if mistake is None:
                raise
            say(mistake)
            sys.exit(2)


def what_happened(error: BaseException) -> str | None:
    """A line for a user's mistake, or an error of the system (memory, disk, packages); None for a bug of ours."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path
        return f"{error.format_message()} `{command} --help` lists what there is"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if out_of_memory(error):
        return NO_MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is None:  # do not print the rest again at exit
            sys.stdout = None
        # a name may be long
        return str(UsageError(f"{error.filename or 'output'}: {error.strerror}"))
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; `pip install ia2mini` installs what is needed"
    if isinstance(error, RuntimeError) and ranks.lost(error):
        return ranks.LOST
    return None


def say(line: str, once: str = "the end", before: str = "") -> None:
    """Print a line on stderr, unless another process has already printed a line with this `once`."""
    if ranks.says(once):
        click.echo(before + plain(f"ia2mini: {line}"), err=True)


def heed_interrupts(came: list) -> None:
    """Make SIGTERM interrupt as Ctrl-C does, and note it in `came`: native code may turn it into another error."""

    def interrupt(*signals):
        came.append(signals)
        raise KeyboardInterrupt

    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, interrupt)
        # a shell ignores it for jobs in the background
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, interrupt)


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}


@click.group(cls=Commands, invoke_without_command=True, context_settings=SETTINGS)
@click.version_option(package_name="ia2mini")
@click.pass_context
def main(context):
    """Teach a small language model a task from a handful of examples.

    \b
      ia2mini fit rows.csv --model smollm2-135m-instruct --out fitted
      ia2mini predict fitted new.csv --out answers.csv
      ia2mini run sst2 --model qwen3-4b-base --n 4
      ia2mini report runs/a runs/b

    The first two are for your own rows. The others compare methods as the paper on ICL Activation Alignment does
    (IA2, arXiv 2509.22621). `ia2mini COMMAND --help` has examples and every option.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    if context.invoked_subcommand in PRINTING:
        need_output()
    if ranks.size > 1 and context.invoked_subcommand not in ("run", "fit"):
        alone = "only `run` and `fit` are spread over processes"
        raise UsageError(f"{alone}; start the others without torchrun")
    keep_freed_memory()
    lasting = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # torch's own folder is deleted at a restart
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{lasting}/ia2mini/compiled")


def command_line() -> str:
    """The command as typed, for reports."""
    return shlex.join(["ia2mini", *sys.argv[1:]])
