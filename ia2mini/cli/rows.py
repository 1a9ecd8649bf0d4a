"""What the commands on one's own rows share: the task, the model that must be named, and how the rows were read."""

from collections.abc import Iterable
from pathlib import Path

import click

from .. import UsageError
from ..files import plain
from ..scale import ranks

DEMO = ("toy-mood", "toy-topic", "toy-mood-flip", "toy-mood-remap")


def find_tasks(
    names: tuple[str, ...], data, prompt_column, answer_column, template, eval_data
) -> list:
    """The tasks of these names, the one of own rows, or the demo's. Raises UsageError."""
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


def keep_apart(task, tokenizer, template: str | None):
    """A task on own rows with a line end after the default template where an answer would merge with it."""
    from ..tasks import own, rows

    if not task.files or template is not None:
        return task
    complete, _ = own.complete_rows(rows.read_rows(Path(task.files[0])), task)
    kept = own.keep_apart(task, complete, tokenizer)
    merging = "answers would merge with the end of the template in this tokenizer"
    if kept is not task and ranks.says(merging):
        click.echo(f"{merging}, so it is now {kept.prompt!r}", err=True)
    return kept


def refuse_unnamed_model(rows: str) -> None:
    """Raises UsageError where a command on one's own rows names no --model."""
    if click.get_current_context().get_parameter_source("model").name == "DEFAULT":
        raise UsageError(
            f"{rows}: name a --model for your own rows (the embedded one knows 449 words)"
        )


def tell_all(remarks: Iterable[str]) -> None:
    """Tell on stderr how one's own rows were read; of several processes the first tells it."""
    if ranks.chief:
        for remark in remarks:
            click.echo(plain(remark), err=True)
