"""Which columns of a user's rows hold what is asked and what is answered: as given, by convention, or by name."""

from dataclasses import dataclass

from ia2mini import UsageError

from .rows import Row, is_blank, placeholders

PROMPTS = "text prompt question instruction input sentence query message content review ticket title".split()
ANSWERS = "label answer output response completion category class target intent sentiment".split()
# columns that may belong to a prompt and are never left out unasked, whatever they hold
PARTS = "context passage document paragraph premise hypothesis body description subject abstract article system".split()
PARTS += "history dialogue choices options source_text aspect entity claim evidence support hint".split()
ALPACA_ANSWERS = ("output", "response")
ALPACA_INPUTS = ("input", "context")  # of Alpaca, of Dolly
SENTENCE = 3  # words of an entry that may be asked
FEW = 20  # a column of at most so many different entries, each there twice on average, holds categories


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
            prompt = f"{self.prompts[0]!r}, then {self.prompts[1]!r} where it is not empty (as in Alpaca)"
        said = f"columns: the prompt is {prompt}"
        if self.answer is not None:
            said += f"; the answer is {self.answer!r}"
        if self.left_out:
            said += f"; left out: {', '.join(map(repr, self.left_out))}"
        return said


def choose_columns(
    rows: list[Row], prompt: str | None, answer: str | None, template: str | None, answered: bool = True
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
    taken = [*prompts, *answers]
    forgotten = []
    if not asked:
        forgotten = [c for c in there if c not in taken and may_be_asked(rows, c)]
    if not answered:
        forgotten = [c for c in forgotten if not has_name(c, ANSWERS)]
    several = len(prompts) > 1 and not asked
    wanted = 1 if answered else 0
    if not prompts or several or forgotten or len(answers) != wanted:
        parts = [c for c in there if c in prompts or c in forgotten]
        raise UsageError(ask_for_names(rows[0].where, there, parts, answered, len(answers) == wanted))
    left_out = tuple(c for c in there if c not in taken)
    return Chosen(tuple(prompts), answers[0] if answered else None, f"{{{prompts[0]}}}", left_out)


def given_prompts(prompt: str | None, answer: str | None, template: str | None) -> list[str]:
    """The columns of the prompt that were named. Raises UsageError where names contradict one another."""
    if template is None:
        if prompt is not None and prompt == answer:
            raise UsageError(f"column {answer!r} cannot be both prompt and answer")
        return [] if prompt is None else [prompt]
    asked = placeholders(template)
    if answer in asked:
        raise UsageError(f"template {template!r}: must name a column of the prompt, and not the answer's")
    if prompt is not None and prompt not in asked:
        raise UsageError(f"template {template!r}: does not name the prompt's column, {{{prompt}}}")
    return asked


def candidates(there: list[str], asked: list[str], answer: str | None, answered: bool) -> tuple[list, list]:
    """The columns that may hold the prompt, and those that may hold the answer.

    Where one of the two is known and one column is left, that is the other.
    """
    answers = [] if answer is None else [answer]
    if answered and answer is None:
        answers = [c for c in there if has_name(c, ANSWERS) and c not in asked]
    prompts = asked or [c for c in there if has_name(c, PROMPTS) and c not in answers]
    rest = [c for c in there if c not in prompts and c not in answers]
    if len(rest) == 1 and answered and prompts and not answers:
        return prompts, rest
    if len(rest) == 1 and not prompts and (answers or not answered):
        return rest, answers
    return prompts, answers


def by_alpaca(rows: list[Row], there: list[str], answer: str | None, answered: bool) -> Chosen | None:
    """The columns of rows in the form of Alpaca or Dolly: an instruction, an input that may be empty, a response.

    None where they are not of that form, or where a further column may belong to the prompt.
    """
    instructions = [c for c in there if has_name(c, ["instruction"])]
    inputs = [c for c in there if has_name(c, ALPACA_INPUTS)]
    answers = [c for c in there if has_name(c, ALPACA_ANSWERS)]
    if len(instructions) != 1 or len(inputs) != 1 or len(answers) > 1 or (answered and not answers):
        return None
    if answer is not None and answer not in answers:
        return None
    taken = [*instructions, *inputs, *answers] if answered else [*instructions, *inputs]
    rest = tuple(c for c in there if c not in taken)
    allowed = [*answers, "text"]  # Alpaca's own "text" is the whole of prompt and answer
    if any(may_be_asked(rows, c) for c in rest if c not in allowed):
        return None
    body = f"{{{instructions[0]}}}\n{{?{inputs[0]}}}"
    return Chosen((*instructions, *inputs), answers[0] if answered else None, body, rest)


def has_name(column: str, names) -> bool:
    return column.strip().lower() in names


def may_be_asked(rows: list[Row], column: str) -> bool:
    """Whether a column may belong to the prompt: by its name, or since most entries are texts of several words.

    Categories, which repeat, are no such texts.
    """
    held = [row[column] for row in rows if not is_blank(row, column)]
    if held and has_name(column, (*PROMPTS, *PARTS)):
        return True
    texts = [value for value in held if isinstance(value, str) and count_words(value) >= SENTENCE]
    different = len(set(texts))
    categories = different <= FEW and 2 * different <= len(texts)
    return 2 * len(texts) > len(held) and not categories


def count_words(text: str) -> int:
    """Words of letters between blanks: none in dates, numbers and addresses of pages."""
    return sum(word.strip(".,;:!?()\"'").isalpha() for word in text.split())


def ask_for_names(where: str, there: list[str], parts: list[str], answered: bool, answer_known: bool) -> str:
    """The sentence that asks for the columns' names; `parts` may all belong to the prompt."""
    answer = " and --answer-column" if answered else ""
    said = f"{where}: columns {', '.join(map(repr, there))}: name yours with --prompt-column{answer}"
    if len(parts) > 1 and answer_known:
        together = "\\n".join(f"{{{column}}}" for column in parts)
        said += f", or several columns of the prompt with --template '{together}\\nAnswer:'"
    return said
