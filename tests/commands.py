"""What the tests of commands share: how one is called, and how one is stopped."""

import sys
from importlib import import_module
from pathlib import Path

from click.testing import CliRunner, Result

from ia2mini.cli.main import main

SMALL = "--n 4 --sets 2 --rates 1e-2,3e-2 --epochs 3 --eval-rows 10 --figures= --device cpu".split()
PROGRAM = [sys.executable, "-c", "from ia2mini.cli.main import main; main(prog_name='ia2mini')"]

ENDED = """import os, signal
from ia2mini.cli.main import main
rename = os.replace
def renamed(source, target):
    rename(source, target)
    if os.path.basename(target) == {file!r}:
        os.kill(os.getpid(), signal.{how})
os.replace = renamed
main(prog_name='ia2mini')
"""


def ended_by(how: str, file: str) -> list[str]:
    """A program that runs a command, and gets the signal `how` as soon as a file of that name is there."""
    return [sys.executable, "-c", ENDED.format(how=how, file=file)]


def invoke(*arguments) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def toy(ground: Path, out: Path, *more) -> list:
    return ["run", "toy-mood", "--model", ground / "model", "--out", out, "--json", *SMALL, *more]


def forbid(monkeypatch, where: str, after: int = 0):
    """Let the function `where` (module.name) raise as an interrupt does, after so many calls."""
    module, name = where.rsplit(".", 1)
    function = getattr(import_module(module), name)
    monkeypatch.setattr(where, stopping(function, after))


def stopping(function, after: int = 0):
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*arguments)

    return stop


def refused(out: Path, arguments: list, *words: str) -> None:
    """The command fails with one line that holds the words, and leaves nothing in `out`."""
    result = invoke(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("ia2mini: ") and all(word in line for word in words), line
    assert result.stdout == "" and not list(out.rglob("*"))
