r"""Parsers of text answers: they extract the part of a generated or true answer that is compared exactly.

They read as the paper's released scripts do (protocol section 5), with one difference: `parse_number` keeps a minus
sign, which the scripts drop. Each takes the whole text; None where there is nothing to compare.
"""

import re
from unicodedata import normalize

AMOUNT = r"[0-9,]+(?:\.[0-9]+)?"
UNITS = "miles? meters? hours? minutes? bolts? glasses? sheep eggs? cups? downloads? years? weeks? dollars? GB".split()
LINES = (  # what the line with the answer holds, the most trusted first
    r"\\boxed\{([^}]+)\}",
    r"####\s*([^\n]+)",
    r"answer:\s*([^\n]+)",
    r"the answer is\s*([^\n]+)",
    r"answer is\s*([^\n]+)",
    r"answer\s+([^\n]+)",
)
AMOUNTS = (  # without such a line: an amount of money, then one with a unit
    rf"\$\s*({AMOUNT})",
    rf"({AMOUNT})\s*(?:vacuum cleaners?|{'|'.join(UNITS)})",
)
# at the end of what precedes an amount; not of "5-10"
MINUS = re.compile(r"(^\s*-\s*|(?<![\w)\]}])-)(\\?\$ *)?$")
LONGEST_LINE = 200  # characters; a longer line is no answer


def parse_number(text: str) -> str | None:
    r"""The number that a text gives as its answer (GSM8K), of several alike the last.

    It stands in `\boxed{}`, else after `####`, "Answer:", "the answer is" or "answer", else after `$`, else before a
    unit. Without all of these the last number counts that is neither a year nor between 0 and 1. `1,000.50` reads
    "1000.5", `72.0` reads "72". A line without a number is returned as text, and so is a text without one.
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    for pattern in LINES:
        answers = re.findall(pattern, text, re.IGNORECASE)
        if answers:
            return number_in(answers[-1].strip())
    for pattern in AMOUNTS:
        matches = list(re.finditer(pattern, text, re.IGNORECASE))
        if matches:
            return plain_number(text, matches[-1].start(1), matches[-1][1])
    return last_number(text) or text or None


def number_in(answer: str) -> str:
    """The first number of a short answer; the answer without its marks where there is none."""
    match = re.search(AMOUNT, answer)
    number = plain_number(answer, match.start(), match[0]) if match else ""
    return number or answer.lstrip("$: ").rstrip("}., ")


def last_number(text: str) -> str | None:
    """The last number that may be an answer: one that stands alone, else the last one of the last line with one."""
    for match in reversed(list(re.finditer(rf"\b{AMOUNT}\b", text))):
        if may_be_answer(match[0]):
            return plain_number(text, match.start(), match[0])
    for line in reversed(text.split("\n")):
        line = line.strip()
        if len(line) > LONGEST_LINE or "?" in line:
            continue
        *_, last = [None, *re.finditer(AMOUNT, line)]
        if last and may_be_answer(last[0]):
            return plain_number(line, last.start(), last[0])
    return None


def may_be_answer(amount: str) -> bool:
    """Whether an amount is neither a year from 1900 to 2100 nor a share between 0 and 1."""
    digits = amount.replace(",", "")
    if not digits:
        return False
    value = float(digits)
    is_year = value.is_integer() and 1900 <= value <= 2100
    return not is_year and not 0 < value < 1


def plain_number(text: str, start: int, amount: str) -> str:
    """The `amount` that begins at `start` of `text`, signed, without commas and needless zeros; "" without digits."""
    whole, _, decimals = amount.replace(",", "").partition(".")
    if not whole and not decimals:
        return ""
    whole = whole.lstrip("0") or "0"
    decimals = decimals.rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    negative = MINUS.search(text[:start]) and number != "0"
    return f"-{number}" if negative else number


def parse_boxed(text: str) -> str | None:
    r"""What stands from the first `\boxed{` to the last `}` of its line, spaces dropped, `\dfrac{` as `\frac{` (MATH).

    So what follows the box on its line is compared too, as in the released scripts. Where no line has such a box,
    `\boxed 2$` holds what comes before the `$`: two of MATH's own solutions are written so.
    """
    match = re.search(r"\\boxed\{(.*)\}", text)
    if match is None:
        match = re.search(r"\\boxed +([^\s{$][^$\n]*)", text)
    if match is None:
        return None
    return match[1].replace(" ", "").replace(r"\dfrac{", r"\frac{")


def parse_hashes(text: str) -> str | None:
    """The text after the last `####`, without surrounding blanks; without one the whole text (SciQ)."""
    return text.split("####")[-1].strip() or None


def parse_text(text: str) -> str | None:
    """The whole text, without surrounding blanks."""
    return text.strip() or None


PARSERS = {"number": parse_number, "boxed": parse_boxed, "hashes": parse_hashes, "text": parse_text}
# parser: what each answer of a user's own must hold to be read by it, the first that fits
MARKS = {
    "number": re.compile(
        r"(?:####|\bthe answer is:?)\s*[-+]?\s*\$?\s*-?[0-9][0-9,]*(?:\.[0-9]+)?[^0-9\n]*$", re.I
    ),
    "boxed": re.compile(r"\\boxed\{.*\}"),
    "hashes": re.compile(r"####\s*\S"),
}


def parser_for(answers: list[str]) -> str:
    """The parser for a user's own answers: the first whose marks all answers have, else "text"."""
    for parser, mark in MARKS.items():
        if all(mark.search(answer.replace("\N{MINUS SIGN}", "-")) for answer in answers):
            return parser
    return "text"


def same_answer(parser: str, text: str, answer: str) -> bool:
    """Whether a text and the true answer parse to the same value; accents may be written either way (NFC, NFD).

    An empty value is never right.
    """
    parsed = PARSERS[parser](normalize("NFC", text))
    return bool(parsed) and parsed == PARSERS[parser](normalize("NFC", answer))
