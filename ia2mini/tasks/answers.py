r"""Parsers of multi-token answers: from a generated or a gold text to what is compared, exactly (protocol section 5).

Each takes the whole answer text and returns its parsed answer, or None where there is none.
"""

import re
from unicodedata import normalize

NUMBER = r"\+?(?P<sign>-?) *\$? *(?P<size>(?:\d[\d,]*)?\.\d+|\d[\d,]*)(?P<over> ?/ ?\d[\d,]*)?"
AFTER_HASHES = re.compile(rf"####\s*{NUMBER}")
IN_WORDS = re.compile(rf"\bthe answer is:? *{NUMBER}", re.IGNORECASE)


def parse_number(text: str) -> str | None:
    """The last number after `####`, else after "the answer is" (GSM8K); sign, decimals, fractions kept, `,` `$` not."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("$-", "-$")
    found = list(AFTER_HASHES.finditer(text)) or list(IN_WORDS.finditer(text))
    if not found:
        return None
    return re.sub("[, ]", "", found[-1]["sign"] + found[-1]["size"] + (found[-1]["over"] or ""))


def parse_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` with balanced braces holds, spaces dropped, `dfrac` read as `frac` (MATH).

    `\boxed 2$`, as some of MATH's own solutions write, holds what comes before the `$`. Escaped braces do not count.
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed(?![A-Za-z])", text)]):
        if (inside := _braced(text[start:].lstrip())) is not None:
            return "".join(inside.split()).replace("dfrac", "frac")
    return None


def _braced(text: str) -> str | None:
    """The text inside the brace group `text` begins with, None if unbalanced; with no brace, up to `$` or line end."""
    if not text.startswith("{"):
        return re.match(r"[^$\n]*", text)[0].strip() or None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[1 : match.start()]
    return None


def parse_hashes(text: str) -> str | None:
    """The text after the last `####`, without surrounding blanks (SciQ)."""
    _, mark, after = text.rpartition("####")
    return after.strip() or None if mark else None


def parse_text(text: str) -> str | None:
    """The whole text, without surrounding blanks."""
    return text.strip() or None


PARSERS = {"number": parse_number, "boxed": parse_boxed, "hashes": parse_hashes, "text": parse_text}


def same_answer(parser: str, text: str, answer: str) -> bool:
    """Whether a text parses to the same as the true answer does, however either writes its accents (NFC, NFD)."""
    found = PARSERS[parser](normalize("NFC", text))
    return found is not None and found == PARSERS[parser](normalize("NFC", answer))
