"""A user's own rows as a task: which columns hold prompt and answer, and whether answers are labels or text."""

import re
import unicodedata
from collections import Counter

from ia2mini import UsageError
from ia2mini.files import check_text, plural

from .answers import parser_for
from .catalog import Task
from .columns import ChosenColumns, Columns, choose_columns
from .rows import (
    TRUE_FALSE,
    Row,
    check_columns,
    fill,
    find_label,
    missing_part,
    placeholders,
    whole_number,
)

GUESSED = Columns()
MOST_LABELS = 255
BLANK_LINE = "\n\n"  # stands between demonstrations
# may be a label, or stand for a missing one
NULL_WORDS = ("none", "null", "na", "n/a", "#n/a", "nil")
# names of columns
UNINFORMATIVE = "text prompt input content instruction label answer output response completion target class y".split()
RIGHT_IS = {  # parser -> which answers are right
    "number": "the same number",
    "boxed": "the same in \\boxed{}",
    "hashes": "the same after ####",
    "text": "the same, word for word",
}
MAX_NAMED = 10  # rows that a sentence names
LABELS_COUNTED = 10  # up to so many labels are shown with their numbers of rows
LABEL_WIDTH = 40  # characters of each that are shown


def own_task(
    rows: list[Row],
    name: str,
    columns: Columns = GUESSED,
    queries: bool = False,
    chat: bool = False,
) -> tuple[list[Row], Task]:
    """The rows that have a prompt and an answer, and their task; `queries` need no answer, and get a text.

    A query in a `chat` is what the user says, without "Question:" and "Answer:". In a template `\\n` is a line end.
    Without `columns.answer_kind` at most 255 different answers, each given twice on average to different prompts, are
    labels: `task.labels`, sorted. Others are text, parsed as numbers, boxes or after `####` where every answer has that
    form. What was decided is in `task.remarks`. UsageError for whatever is wrong with the rows or the template.
    """
    template = check_template(columns.template)
    chosen = choose_columns(rows, columns._replace(template=template), queries)
    body = template or chosen.body
    check_text(body, "the template", "rename the column")
    answer = chosen.answer
    complete, remarks = complete_rows(rows, body, answer)
    if queries:
        prompt = body if chat else template or default_template(chosen, False)
        said = (*remarks, chosen.describe())
        return complete, Task(name, name, prompt=prompt, answer="", parser="text", remarks=said)
    if not complete:
        empty = "the prompt" if missing_part(rows[0], body, None) else f"column {answer!r}"
        lack = f"{empty} is empty, and no row has both a prompt and an answer"
        raise UsageError(f"{rows[0].where}: {lack}")
    texts = [row.text(answer) for row in complete]
    different = {(fill(body, row), text) for row, text in zip(complete, texts)}
    labels, label_index, merged = read_labels(complete, answer)
    if len(labels) == 1:
        same = f"every row has the answer {labels[0]!r}; nothing can be learned from it"
        raise UsageError("; ".join([f"{name}: {same}", *remarks]))
    labelled = answers_are_labels(columns.answer_kind, len(labels), len(different))
    if labelled:
        rows_of = Counter(labels[label_index[text]] for text in texts)
        remarks += [*merged, chosen.describe(), counted_labels(rows_of), *similar_labels(labels)]
        how: dict = {"labels": labels, "label_index": label_index}
    else:
        parser = parser_for(texts)
        remarks += [chosen.describe(), *described_texts(texts, len(different), parser)]
        how = {"max_tokens": 200, "parser": parser}
    task = Task(
        name,
        name,
        train="train",
        eval="eval",
        prompt=template or default_template(chosen, labelled),
        answer_column=answer,
        answer=f"{{{answer}}}",
        remarks=tuple(remarks),
        **how,
    )
    return complete, task


def described_texts(texts: list[str], different_rows: int, parser: str) -> list[str]:
    """Sentences on answers that are text: how many, which are right, and that a blank line ends one."""
    count = f"{len(set(texts))} different in {different_rows} rows"
    sentences = [f"answers: free text, {count}; right is {RIGHT_IS[parser]}"]
    broken = sum(BLANK_LINE in text.rstrip() for text in texts)
    if broken:
        ended = f"{plural(broken, 'answer')} with a blank line, where a generated answer ends"
        mend = "write one line end in its place, or use --chat"
        sentences.append(f"{ended}: never right; {mend}")
    return sentences


def answers_are_labels(kind: str | None, labels: int, rows: int) -> bool:
    """Whether answers are labels, from the number of different answers and of rows. Raises UsageError for too many."""
    if kind not in ("labels", "text", None):
        raise UsageError(f"answer_kind = {kind!r}: say 'labels' or 'text', or nothing")
    if kind == "labels" and labels > MOST_LABELS:
        most = f"at most {MOST_LABELS} can be labels"
        raise UsageError(f"--labels: {labels} different answers; {most}; use --text")
    if kind is not None:
        return kind == "labels"
    return labels <= MOST_LABELS and 2 * labels <= rows


def check_template(template: str | None) -> str | None:
    """A template with its line ends. Raises UsageError without a column: every prompt would be the same."""
    if template is None:
        return None
    if not placeholders(template):
        raise UsageError(f"template {template!r}: must name a column of the prompt, as {{text}}")
    doubled = re.search(r"\{\{[^{}]*\}\}", template)
    if doubled:
        single = doubled[0][1:-1]
        raise UsageError(f"template {template!r}: {doubled[0]}: write single braces: {single}")
    return template.replace("\\n", "\n")


def default_template(columns: ChosenColumns, labelled: bool) -> str:
    """ "Review: {review}\\nSentiment: ": columns are called by their names, where these tell something."""
    question_cue = "Text" if labelled else "Question"
    answer_cue = "Label" if labelled else "Answer"
    if len(columns.prompts) == 1:
        question_cue = cue(columns.prompts[0], question_cue)
    if columns.answer is not None:
        answer_cue = cue(columns.answer, answer_cue)
    return f"{question_cue}: {columns.body}\n{answer_cue}: "


def cue(column: str, default: str) -> str:
    """A column's name as a word of the prompt, or the default if the name means nothing."""
    words = column.replace("_", " ").strip()
    if words.lower() in UNINFORMATIVE or len(words) < 3 or not words.replace(" ", "").isalpha():
        return default
    return words[0].upper() + words[1:]


def read_labels(rows: list[Row], answer: str) -> tuple[tuple[str, ...], dict[str, int], list[str]]:
    """The labels, sorted; which one each text of the column means; and a sentence where several texts mean one.

    In a column of whole numbers 1 and 1.0 are one label; true is 1, too, where all others are 0 or 1. In a column of
    truth values true and True are one.
    """
    label_of = label_of_each_text([*dict.fromkeys(row.text(answer) for row in rows)])
    spellings: dict[str, set[str]] = {}  # how a label stands in the file, strings in quotes
    for row in rows:
        label = label_of[row.text(answer)]
        spellings.setdefault(label, set()).add(repr(row[answer]))
    labels = tuple(sorted(spellings))
    sentences = []
    for label in labels:
        if len(spellings[label]) > 1 or label not in label_of:
            listed = ", ".join(sorted(spellings[label]))
            sentences.append(f"{listed} in column {answer!r} is read as label {label!r}")
    index = {label: i for i, label in enumerate(labels)}
    return labels, {text: index[label] for text, label in label_of.items()}, sentences


def label_of_each_text(texts: list[str]) -> dict[str, str]:
    """The label that each text of a column means."""
    lowered = {text: text.lower() for text in texts}
    if len(set(lowered.values())) < len(texts) and set(lowered.values()) <= set(TRUE_FALSE):
        return lowered
    numbers = {text: whole_number(text) for text in texts}
    if all(number.lstrip("-").isdecimal() for number in numbers.values()):
        return numbers
    truths = {text: TRUE_FALSE.get(text.lower(), number) for text, number in numbers.items()}
    numeric = any(number in TRUE_FALSE.values() for number in numbers.values())
    if numeric and set(truths.values()) <= set(TRUE_FALSE.values()):
        return truths
    return {text: text for text in texts}


def true_answer(row: Row, column: str, labels: list[str]) -> str:
    """The true answer in a column. Raises UsageError if there are labels and it means none of them (`find_label`)."""
    text = row.text(column)
    label = find_label(text, labels) if labels else text
    if label is None:
        listed = ", ".join(map(repr, labels))
        raise UsageError(f"{row.where}: answer {text!r} is none of the labels {listed}")
    return label


def complete_rows(
    rows: list[Row], template: str, answer: str | None
) -> tuple[list[Row], list[str]]:
    """The rows with a prompt and, in column `answer`, an answer (None: none is needed), and sentences on the others.

    Raises UsageError where a needed column is in no row.
    """
    check_columns(rows, template, answer)
    complete = []
    lacking: dict[str, list[str]] = {"prompt": [], "answer": []}
    for row in rows:
        part = missing_part(row, template, answer)
        if part is None:
            complete.append(row)
        else:
            lacking[part].append(row.where)
    sentences = []
    for part, places in lacking.items():
        if not places:
            continue
        named = first_places(places)
        count = f"{len(places)} of {len(rows)} rows"
        sentences.append(f"left out for want of {part}: {count} ({named})")
    return complete, sentences


def first_places(places: list[str]) -> str:
    """Where rows stand, of the first ones."""
    named = ", ".join(places[:MAX_NAMED])
    return named if len(places) <= MAX_NAMED else f"{named} …"


def counted_labels(rows_of: Counter) -> str:
    """ "answers: 2 labels (yes: 30, no: 10)", the most frequent first; of many only the number."""
    text = f"answers: {len(rows_of)} labels"
    if len(rows_of) > LABELS_COUNTED:
        return text
    counts = [f"{label[:LABEL_WIDTH]}: {count}" for label, count in rows_of.most_common()]
    return f"{text} ({', '.join(counts)})"


def similar_labels(labels: tuple[str, ...]) -> list[str]:
    """Sentences on labels that are two ways to write one, and on labels that may be mistakes."""
    sentences = []
    first_of: dict[str, str] = {}
    for label in labels:
        first = first_of.setdefault(normalized(label), label)
        if first != label:
            how = "are two ways to write the same"
            if first.lower().split() == label.lower().split():
                how = "differ only in blanks or case"
            sentences.append(f"labels {first!r} and {label!r} {how}; they are kept apart")
    for label in labels:
        if label != label.strip():
            sentences.append(f"label {label!r} begins or ends with a blank, which is part of it")
        if label.strip().lower() in NULL_WORDS:
            mend = "if it stands for no answer, empty these cells"
            sentences.append(f"{label!r} is read as a label; {mend}")
    return sentences


def normalized(label: str) -> str:
    """The common form of a label that is written in several ways: letters, invisible marks, numbers, true and 1."""
    seen = [letter for letter in label if unicodedata.category(letter) != "Cf"]
    words = unicodedata.normalize("NFKC", "".join(seen)).casefold().split()
    text = " ".join(words)
    text = TRUE_FALSE.get(text, text)
    try:
        text = text.replace("\N{MINUS SIGN}", "-")
        return str(float(text.replace(",", ".")) + 0.0)  # -0 is 0
    except ValueError:
        return text
