"""A user's own rows as a task: which columns hold prompt and answer, and whether answers are labels or text."""

from dataclasses import replace

from ia2mini import UsageError

from .answers import parser_for
from .catalog import Task
from .rows import Row, placeholders

PROMPTS = "text prompt question input sentence query message content review ticket title".split()
ANSWERS = "label answer output response completion category class target intent sentiment".split()
MOST_LABELS = 20


def guess_columns(row: Row, prompt: str | None, answer: str | None) -> tuple[str, str]:
    """The columns of prompt and answer: as given, else by the header's names. UsageError where it does not tell."""
    known = [[c for name in names for c in row if c.lower() == name] for names in (PROMPTS, ANSWERS)]
    answer = answer or next(iter(known[1]), None)
    prompt = prompt or next((c for c in known[0] if c != answer), None)
    rest = [c for c in row if c not in (prompt, answer)]
    if len(row) == 2 and (prompt is None) != (answer is None):
        prompt, answer = prompt or rest[0], answer or rest[0]
    if prompt is None or answer is None:
        there = ", ".join(map(repr, row))
        raise UsageError(f"{row.where}: columns {there}: name yours with --prompt-column and --answer-column")
    return prompt, answer


def own_task(rows: list[Row], name: str, prompt=None, answer=None, template: str | None = None) -> Task:
    """The task that rows describe; `prompt` and `answer` are their columns, guessed from the header where not given.

    At most 20 different answers, each given twice on average, are labels: `task.labels`, sorted. Others are text,
    parsed as numbers, boxes or after `####` where every answer has that form. In a template, `\\n` is a line end.
    UsageError for whatever is wrong with the rows or the template.
    """
    prompt, answer = guess_columns(rows[0], prompt or next(iter(placeholders(template or "")), None), answer)
    answers = [row.text(answer) for row in rows]
    if empty := [row.where for row, text in zip(rows, answers) if not text.strip()]:
        raise UsageError(f"{empty[0]}: column {answer!r} is empty")
    found = sorted(set(answers))
    if len(found) == 1:
        raise UsageError(f"{name}: every row has the answer {found[0]!r}; nothing can be learned from it")
    labelled = len(found) <= MOST_LABELS and 2 * len(found) <= len(rows)
    default = f"Text:{{{prompt}}}\nLabel:" if labelled else f"Question:{{{prompt}}}\nAnswer:"
    template = template.replace("\\n", "\n") if template else default
    if not (columns := placeholders(template)) or answer in columns:
        wanted = f"must name a column of the prompt, as {{{prompt}}}, and not the answer's"
        raise UsageError(f"template {template!r}: {wanted}")
    about: dict = {"prompt": template, "label": answer, "answer": f"{{{answer}}}", "train": "train", "eval": "eval"}
    if labelled:
        return Task(name, name, **about, labels=tuple(found), known={text: i for i, text in enumerate(found)})
    return Task(name, name, **about, max_tokens=200, parser=parser_for(answers))


def near_labels(labels: tuple[str, ...]) -> list[str]:
    """A sentence for every two labels that differ only in blanks or case."""
    plain, said = {}, []
    for label in labels:
        first = plain.setdefault(" ".join(label.lower().split()), label)
        if first != label:
            said.append(f"labels {first!r} and {label!r} differ only in blanks or case; they are kept apart")
    return said


def keep_apart(task: Task, rows: list[Row], tokenizer) -> Task:
    """The task with a line end after its template where an answer would merge with the end of its prompt."""
    merging = any(tokenizer.merges(e.prompt, e.answer) for e in map(task.example, rows))
    return replace(task, prompt=task.prompt + "\n") if merging else task


def queries_task(rows: list[Row], name: str, prompt=None, answer=None, template: str | None = None) -> Task:
    """The task of rows that only ask: what they are answered is text. Raises UsageError where no column is known."""
    known = [c for wanted in PROMPTS for c in rows[0] if c.lower() == wanted] + list(rows[0]) * (len(rows[0]) == 1)
    if not (prompt or template or known):
        raise UsageError(f"{rows[0].where}: columns {', '.join(map(repr, rows[0]))}: name yours with --prompt-column")
    template = template.replace("\\n", "\n") if template else f"Question:{{{prompt or known[0]}}}\nAnswer:"
    return Task(name, name, prompt=template, answer="", parser="text")
