"""Find the columns of prompt and answer in a user's rows: as given, by convention, or by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ia2mini import UsageError

from .rows import Row, is_blank, no_column, placeholders

PROMPTS = "text prompt question instruction input sentence query message content review ticket title".split()
ANSWERS = "label answer output response completion category class target intent sentiment".split()
# columns with these names may belong to a prompt: they are never left out silently
PROMPT_PARTS = """context passage document paragraph premise hypothesis body description subject abstract article
    system history dialogue choices options source_text aspect entity claim evidence support hint""".split()
INDEX_NAMES = ["", *"id idx index nr uid uuid guid".split()]
INDEX_NAMES += ["unnamed: 0", "__index_level_0__"]  # of pandas in CSV and in Parquet
ALPACA_ANSWERS = ("output", "response")
ALPACA_INPUTS = ("input", "context")  # of Alpaca, of Dolly
SENTENCE_WORDS = 3  # words of an entry that may belong to a prompt
# a column of at most so many different entries, each there twice on average, holds categories
MAX_CATEGORIES = 20
COUNT = re.compile(r"\d{1,18}")
NO_TEXT = re.compile(r"https?://\S+|\d{4}-\d\d-\d\d([ T].*)?")  # an address of a page, a date
LEAST_COUNTED = 4  # rows; a column that counts fewer may as well hold answers


class Columns(NamedTuple):
    """The columns of prompt and answer; None: guessed from the header."""

    prompt: str | None = None
    answer: str | None = None
    template: str | None = None  # of the prompt, columns in braces
    answer_kind: str | None = None  # "labels" or "text"; None: as the answers repeat


@dataclass(frozen=True)
class ChosenColumns:
    """The columns of prompt and answer, and the template of the prompt, without "Question:" and the like."""

    prompts: tuple[str, ...]
    answer: str | None  # None: the rows have no answers
    body: str
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """A sentence that names the chosen columns and those left out."""
        prompt = ", ".join(map(repr, self.prompts))
        if "{?" in self.body:
            first, second = self.prompts
            prompt = f"{first!r}, then {second!r} where it is not empty (as in Alpaca)"
        text = f"columns: the prompt is {prompt}"
        if self.answer is not None:
            text += f"; the answer is {self.answer!r}"
        if self.left_out:
            text += f"; left out: {', '.join(map(repr, self.left_out))}"
        return text


def choose_columns(rows: list[Row], columns: Columns, queries: bool = False) -> ChosenColumns:
    """The columns of prompt and answer (of `queries` the prompt alone): as given, else guessed.

    Raises UsageError where a given column is not there, and where the header may be read in several ways.
    """
    prompt, answer, template, _ = columns
    header = list(dict.fromkeys(column for row in rows for column in row))
    for column in (*placeholders(template or ""), prompt, answer):
        if column is not None and column not in header:
            raise no_column(rows[0].where, header, column)
    given = given_prompts(columns)
    answers = [] if answer is None else [answer]
    if not queries and not answers:
        answers = with_name(without(header, given), ANSWERS)
    alpaca = [] if given else alpaca_prompts(header, answers, queries)
    if alpaca:
        prompts = alpaca
        answers = with_name(answers, ALPACA_ANSWERS)
    else:
        prompts = given or with_name(without(header, answers), PROMPTS)
        rest = without(header, [*prompts, *answers])
        rest = [column for column in rest if not only_names_rows(rows, column)]
        if len(rest) == 1 and not prompts and (answers or queries):
            prompts = rest
        elif len(rest) == 1 and prompts and not answers and not queries:
            answers = rest
    left_out = without(header, [*prompts, *answers])
    unclear = [] if given else possible_prompts(rows, left_out)
    if queries:
        unclear = without(unclear, with_name(unclear, ANSWERS))
    prompt_known = given or alpaca or len(prompts) == 1
    answer_known = queries or len(answers) == 1
    if alpaca:  # its "text" is prompt and answer together
        unclear = without(unclear, with_name(unclear, ["text"]))
        answer_known = answer_known and not with_name(unclear, ANSWERS)
    if unclear or not prompt_known or not answer_known:
        parts = [column for column in header if column in (*prompts, *unclear)]
        raise UsageError(ask_for_columns(rows[0].where, header, parts, queries, answer_known))
    body = f"{{{prompts[0]}}}"
    if alpaca:
        body += f"\n{{?{prompts[1]}}}"
    if template is None and placeholders(body) != prompts:
        braces = "has braces or begins with a question mark, which mean something in a template"
        raise UsageError(f"{rows[0].where}: column {prompts[0]!r} {braces}; rename it")
    return ChosenColumns(tuple(prompts), None if queries else answers[0], body, tuple(left_out))


def given_prompts(columns: Columns) -> list[str]:
    """The columns of the prompt that were named. Raises UsageError where names contradict one another."""
    prompt, answer, template, _ = columns
    if template is None:
        if prompt is not None and prompt == answer:
            raise UsageError(f"column {answer!r} cannot be both prompt and answer")
        return [] if prompt is None else [prompt]
    given = placeholders(template)
    if answer in given:
        raise UsageError(
            f"template {template!r}: must name a column of the prompt, and not the answer's"
        )
    if prompt is not None and prompt not in given:
        raise UsageError(f"template {template!r}: does not name the prompt's column, {{{prompt}}}")
    return given


def alpaca_prompts(header: list[str], answers: list[str], queries: bool) -> list[str]:
    """Instruction and input of rows in the form of Alpaca or Dolly, with their name for the answer; else nothing."""
    instructions = with_name(header, ["instruction"])
    inputs = with_name(header, ALPACA_INPUTS)
    of_form = len(instructions) == 1 and len(inputs) == 1
    if not queries:
        of_form = of_form and len(with_name(answers, ALPACA_ANSWERS)) == 1
    return instructions + inputs if of_form else []


def with_name(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns that have one of these names, in any case."""
    return [column for column in columns if column.strip().lower() in names]


def without(columns: Iterable[str], others: Iterable[str]) -> list[str]:
    return [column for column in columns if column not in others]


def only_names_rows(rows: list[Row], column: str) -> bool:
    """Whether a column is called as one of ids, counts the rows, or holds a date or a page's address in each."""
    if with_name([column], INDEX_NAMES) or column.strip().lower().endswith("_id"):
        return True
    values = [str(row.get(column)) for row in rows]
    if all(map(NO_TEXT.fullmatch, values)):
        return True
    if len(rows) < LEAST_COUNTED or not all(map(COUNT.fullmatch, values)):
        return False
    first = int(values[0])
    return [int(value) - first for value in values] == list(range(len(rows)))


def possible_prompts(rows: list[Row], columns: list[str]) -> list[str]:
    """The columns that may belong to the prompt: by their name, or since most entries are texts of several words.

    Categories, which repeat, are no such texts.
    """
    possible = []
    for column in columns:
        values = [row[column] for row in rows if not is_blank(row, column)]
        texts = [value for value in values if is_sentence(value)]
        different = len(set(texts))
        categories = different <= MAX_CATEGORIES and 2 * different <= len(texts)
        has_texts = 2 * len(texts) > len(values) and not categories
        has_name = values and with_name([column], (*PROMPTS, *PROMPT_PARTS))
        if has_texts or has_name:
            possible.append(column)
    return possible


def is_sentence(value) -> bool:
    """Whether a value is a text of several words. Dates, numbers and addresses of pages are no words."""
    if not isinstance(value, str):
        return False
    words = [word for word in value.split() if word.strip(".,;:!?()\"'").isalpha()]
    return len(words) >= SENTENCE_WORDS


def ask_for_columns(
    where: str, header: list[str], parts: list[str], queries: bool, answer_known: bool
) -> str:
    """The sentence that asks for the columns' names; `parts` may all belong to the prompt."""
    listed = ", ".join(map(repr, header))
    text = f"{where}: columns {listed}: name yours with --prompt-column"
    if not queries:
        text += " and --answer-column"
    if len(parts) > 1 and answer_known:
        braces = [f"{{{column}}}" for column in parts]
        template = "\\n".join([*braces, "Answer:"])
        text += f", or several columns of the prompt with --template '{template}'"
    return text
