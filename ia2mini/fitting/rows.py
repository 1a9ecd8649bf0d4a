"""A user's own rows: reading them, and remarks on unusual ones."""

import re
from collections import Counter
from pathlib import Path
from statistics import median

from .. import UsageError
from ..files import plain, plural
from ..tasks import Example, Task
from ..tasks.columns import Columns
from ..tasks.own import first_places, own_task
from ..tasks.rows import Row, as_rows
from ..tasks.turns import ALL_TURNS, ANSWER, holds_turns, open_turns
from ..tokenizer import Tokenizer

LONG = 500  # a row of fewer tokens is never called far longer than the others
FAR = 10  # times the median length: longer rows are


def read_own(
    rows, columns: Columns | tuple = (), queries: bool = False, chat: bool = False
) -> tuple[list[Row], Task]:
    """The complete rows among a user's rows, and their task; `queries` have no answers.

    `task.remarks` says how rows were read and which were left out. Raises UsageError.
    """
    rows = as_rows(rows)
    columns = Columns(*columns)
    if not rows:
        raise UsageError("no rows to fit")
    if any(holds_turns(row) for row in rows):
        columns = columns_of_turns(columns, rows[0].where, chat)
        rows = [open_turns(row, columns.template) for row in rows]
    name = plain(Path(re.split(r":| ?row ", rows[0].where)[0]).stem, "") or "rows"
    return own_task(rows, name, columns, queries, chat)


def columns_of_turns(columns: Columns, where: str, chat: bool) -> Columns:
    """The columns of rows with conversations. UsageError if neither --chat nor a template says how to write them."""
    template = ALL_TURNS if columns.template is None else columns.template
    if template == ALL_TURNS and not chat:
        mend = "give --chat, or a template of its system's and user's turn: --template '{user}\\nLabel:'"
        raise UsageError(f"{where}: a conversation (messages): {mend}")
    return columns._replace(template=template, answer=columns.answer or ANSWER)


def remarks(
    rows: list[Row], task: Task, examples: list[Example], tokenizer: Tokenizer
) -> list[str]:
    """Sentences on how the rows were read, and on unusual rows."""
    sentences = []
    repeats = len(rows) - len(examples)
    if repeats:
        sentences.append(f"{plural(repeats, 'row')} repeated another and counted once")
    contrary = len(examples) - len({example.prompt for example in examples})
    if contrary:
        same = "the prompt of another row but a different answer"
        sentences.append(f"{plural(contrary, 'row')} had {same}")
    answers = {example.answer for example in examples}
    given_texts = bool(task.answer) and not task.labels  # not the model's own, after a context
    if given_texts and len(answers) == len(examples) > 1:
        sentences.append("every row has another answer, so that answers are read as text")
    rows_of = Counter(example.label for example in examples)
    rare = [repr(label) for i, label in enumerate(task.labels) if rows_of[i] == 1]
    if rare:
        only = f"only one row has the answer {', '.join(rare)}"
        sentences.append(f"{only}: held out, nothing like it was trained on")
    lengths = tokenizer.count([task.prompt_of(row) for row in rows])
    sentences += [*task.remarks, *far_longer(rows, lengths)]
    if given_texts:
        sentences += ending_early(rows, task, tokenizer)
    return sentences


def far_longer(rows: list[Row], lengths: list[int]) -> list[str]:
    """A sentence for each row that is far longer than the others, of `lengths` in tokens."""
    usual = median(lengths)
    sentences = []
    for row, tokens in zip(rows, lengths):
        if tokens > max(LONG, FAR * usual):
            size = f"{tokens} tokens, half of the rows have at most {usual:.0f}"
            costs = "it takes most of the time; cut it, or leave it out"
            sentences.append(f"{row.where} has {size}: {costs}")
    return sentences


def ending_early(rows: list[Row], task: Task, tokenizer: Tokenizer) -> list[str]:
    """A sentence on answers that hold a token which ends a text."""
    places = []
    for row in rows:
        ids = tokenizer.encode(task.example(row).answer, special=False)
        ends = [token for token in ids if token in tokenizer.eos_ids]
        if ends:
            places.append(row.where)
            end = tokenizer.backend.id_to_token(ends[0])
    if not places:
        return []
    count = plural(len(places), "answer")
    where = first_places(places)
    early = f"{count} with {end!r}, which ends a text in this checkpoint ({where})"
    return [f"{early}: what follows it is never generated"]
