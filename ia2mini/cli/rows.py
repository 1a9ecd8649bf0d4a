"""Shared by the commands on a user's own rows: the task, the check for --model, and reading rows."""

import select
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from .. import UsageError
from ..files import plain
from ..scale import ranks

PORTION = 2**16  # bytes read at once
DEMO = ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap")


def find_tasks(
    names: tuple[str, ...], data, prompt_column, answer_column, template, eval_data
) -> list:
    """The tasks with these names, the task of own rows, or the tasks of the demo. Raises UsageError."""
    from ..tasks import custom_task, find_task

    if data and names:
        raise UsageError("give either TASK or --data, not both")
    if data:
        return [custom_task(data, prompt_column, answer_column, template, eval_data)]
    for option in (prompt_column, answer_column, template, eval_data):
        if option is not None:
            options = "--prompt-column, --answer-column, --template and --eval-data"
            raise UsageError(f"{options} say how your own rows are read; give --data too")
    return [find_task(name) for name in names or DEMO]


def refuse_unnamed_model(rows: str) -> None:
    """Raises UsageError if a command on own rows has no --model."""
    if click.get_current_context().get_parameter_source("model").name == "DEFAULT":
        raise UsageError(
            f"{rows}: name a --model for your own rows, as smollm2-135m-instruct (the embedded one knows 449 words)"
        )


def print_remarks(remarks: Iterable[str]) -> None:
    """Print on stderr how the rows were read; only the first process does."""
    if ranks.chief:
        for remark in remarks:
            click.echo(plain(remark), err=True)


def read_new(rows: str) -> Iterable:
    """The rows of a file. JSONL and standard input are read line by line, see `read_lines`. Raises UsageError."""
    from ..tasks.rows import read_rows

    path = Path(rows)
    if rows != "-" and (path.suffix.lower() != ".jsonl" or not path.is_file()):
        return read_rows(path)
    return read_lines(rows)


def read_lines(rows: str) -> Iterator:
    """The rows of JSON lines; a wrong line gives its UsageError.

    None means that the next line of standard input has not come yet.
    """
    from ..tasks.rows import Row, parse_json

    number = 0
    with sys.stdin.buffer if rows == "-" else Path(rows).open("rb") as stream:
        for line in arriving(stream):
            if line is None:
                yield None
                continue
            number += 1
            where = f"{rows}:{number}"
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield Row(where, parse_json(text, where, "one object a line is expected"))
            except UnicodeDecodeError as error:
                yield UsageError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x})")
            except UsageError as error:
                yield error


def arriving(stream) -> Iterator:
    """The lines of a binary stream as they come; None whenever the next part has not come yet."""
    begun: list[bytes] = []  # parts of an unfinished line
    while True:
        if not is_ready(stream):
            yield None
        part = stream.read1(PORTION)  # waits for one byte, and reads what is there
        if not part:
            break
        first, *lines = part.split(b"\n")
        begun.append(first)
        for line in lines:
            yield b"".join(begun)
            begun = [line]
    last = b"".join(begun)
    if last:
        yield last


def is_ready(stream) -> bool:
    """Whether reading would return at once; True if the system cannot tell."""
    try:
        return bool(select.select([stream.fileno()], [], [], 0)[0])
    except (OSError, ValueError):
        return True
