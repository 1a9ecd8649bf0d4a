"""Which columns of a user's rows hold what is asked and what is answered: as given, by convention, or by name."""

from collections.abc import Iterable
from dataclasses import dataclass

from ia2mini import UsageError

from .rows import Row, is_blank, placeholders

PROMPTS = "text prompt question instruction input sentence query message content review ticket title".split()
ANSWERS = "label answer output response completion category class target intent sentiment".split()
# columns that may belong to a prompt and are never left out unasked, whatever they hold
PARTS = "context passage document paragraph premise hypothesis body description subject abstract article system".split()
PARTS += (
    "history dialogue choices options source_text aspect entity claim evidence support hint".split()
)
ALPACA_ANSWERS = ("output", "response")
ALPACA_INPUTS = ("input", "context")  # of Alpaca, of Dolly
SENTENCE = 3  # words of an entry that may be asked
# a column of at most so many different entries, each there twice on average, holds categories
FEW = 20


@dataclass(frozen=True)
class Chosen:
    """The columns of prompt and answer, and the template of what is asked, without "Question:" and the like."""

    prompts: tuple[str, ...]
    answer: str | None  # None: the rows only ask
    body: str
    left_out: tuple[str, ...] = ()

    def told(self) -> str:
        """A sentence on what was taken and what was left out."""
        prompt = ", ".join(map(repr, self.prompts))
        if "{?" in self.body:
            first, second = self.prompts
            prompt = f"{first!r}, then {second!r} where it is not empty (as in Alpaca)"
        said = f"columns: the prompt is {prompt}"
        if self.answer is not None:
            said += f"; the answer is {self.answer!r}"
        if self.left_out:
            said += f"; left out: {', '.join(map(repr, self.left_out))}"
        return said


def choose_columns(
    rows: list[Row],
    prompt: str | None,
    answer: str | None,
    template: str | None,
    answered: bool = True,
) -> Chosen:
    """The columns of prompt and answer (without `answered`: of the prompt alone): as given, else guessed.

    Raises UsageError where a given column is not there, and where the header may be read in several ways.
    """
    there = list(dict.fromkeys(column for row in rows for column in row))
    for column in (*placeholders(template or ""), prompt, answer):
        if column is not None and column not in there:
            Row(rows[0].where, dict.fromkeys(there))[column]  # raises
    asked = given_prompts(prompt, answer, template)
    if not asked:
        alpaca = by_alpaca(rows, there, answer, answered)
        if alpaca is not None:
            return alpaca
    prompts, answers = candidates(there, asked, answer, answered)
    left_out = without(there, [*prompts, *answers])
    forgotten = [] if asked else may_be_asked(rows, left_out)
    if not answered:
        forgotten = without(forgotten, named(forgotten, ANSWERS))
    prompt_known = bool(asked) or len(prompts) == 1
    answer_known = len(answers) == 1 if answered else True
    if forgotten or not prompt_known or not answer_known:
        parts = [column for column in there if column in (*prompts, *forgotten)]
        raise UsageError(ask_for_names(rows[0].where, there, parts, answered, answer_known))
    found = answers[0] if answered else None
    return Chosen(tuple(prompts), found, f"{{{prompts[0]}}}", tuple(left_out))


def given_prompts(prompt: str | None, answer: str | None, template: str | None) -> list[str]:
    """The columns of the prompt that were named. Raises UsageError where names contradict one another."""
    if template is None:
        if prompt is not None and prompt == answer:
            raise UsageError(f"column {answer!r} cannot be both prompt and answer")
        return [] if prompt is None else [prompt]
    asked = placeholders(template)
    if answer in asked:
        raise UsageError(
            f"template {template!r}: must name a column of the prompt, and not the answer's"
        )
    if prompt is not None and prompt not in asked:
        raise UsageError(f"template {template!r}: does not name the prompt's column, {{{prompt}}}")
    return asked


def candidates(
    there: list[str], asked: list[str], answer: str | None, answered: bool
) -> tuple[list, list]:
    """The columns that may hold the prompt, and those that may hold the answer.

    Where one of the two is known and one column is left, that is the other.
    """
    answers = [] if answer is None else [answer]
    if answered and answer is None:
        answers = named(without(there, asked), ANSWERS)
    prompts = asked or named(without(there, answers), PROMPTS)
    rest = without(there, [*prompts, *answers])
    if len(rest) == 1:
        if not prompts and (answers or not answered):
            prompts = rest
        elif prompts and not answers and answered:
            answers = rest
    return prompts, answers


def by_alpaca(
    rows: list[Row], there: list[str], answer: str | None, answered: bool
) -> Chosen | None:
    """The columns of rows in the form of Alpaca or Dolly: an instruction, an input that may be empty, a response.

    None where they are not of that form, or where a further column may belong to the prompt.
    """
    instructions = named(there, ["instruction"])
    inputs = named(there, ALPACA_INPUTS)
    answers = named(there, ALPACA_ANSWERS)
    if len(instructions) != 1 or len(inputs) != 1 or len(answers) > 1:
        return None
    if answered and not answers or answer not in (None, *answers):
        return None
    prompts = (*instructions, *inputs)
    rest = without(there, [*prompts, *answers])
    whole = named(rest, ["text"])  # Alpaca's own "text" is prompt and answer together
    if may_be_asked(rows, without(rest, whole)):
        return None
    body = f"{{{instructions[0]}}}\n{{?{inputs[0]}}}"
    if answered:
        return Chosen(prompts, answers[0], body, tuple(rest))
    return Chosen(prompts, None, body, tuple(without(there, prompts)))


def named(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns that have one of these names, in any case."""
    return [column for column in columns if column.strip().lower() in names]


def without(columns: Iterable[str], others: Iterable[str]) -> list[str]:
    return [column for column in columns if column not in others]


def may_be_asked(rows: list[Row], columns: list[str]) -> list[str]:
    """The columns that may belong to the prompt: by their name, or since most entries are texts of several words.

    Categories, which repeat, are no such texts.
    """
    found = []
    for column in columns:
        held = [row[column] for row in rows if not is_blank(row, column)]
        texts = [value for value in held if is_sentence(value)]
        different = len(set(texts))
        categories = different <= FEW and 2 * different <= len(texts)
        has_texts = 2 * len(texts) > len(held) and not categories
        has_name = held and named([column], (*PROMPTS, *PARTS))
        if has_texts or has_name:
            found.append(column)
    return found


def is_sentence(value) -> bool:
    """Whether a value is a text of several words. Dates, numbers and addresses of pages are no words."""
    if not isinstance(value, str):
        return False
    words = [word for word in value.split() if word.strip(".,;:!?()\"'").isalpha()]
    return len(words) >= SENTENCE


def ask_for_names(
    where: str, there: list[str], parts: list[str], answered: bool, answer_known: bool
) -> str:
    """The sentence that asks for the columns' names; `parts` may all belong to the prompt."""
    listed = ", ".join(map(repr, there))
    said = f"{where}: columns {listed}: name yours with --prompt-column"
    if answered:
        said += " and --answer-column"
    if len(parts) > 1 and answer_known:
        braces = [f"{{{column}}}" for column in parts]
        template = "\\n".join([*braces, "Answer:"])
        said += f", or several columns of the prompt with --template '{template}'"
    return said
