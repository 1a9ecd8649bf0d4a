"""Parsers: hard cases by hand, and every gold answer of the real sets."""

import json
from decimal import Decimal

import pytest

from ia2mini.tasks import same_answer
from ia2mini.tasks.answers import (
    PARSERS,
    parse_boxed,
    parse_hashes,
    parse_number,
    parse_text,
    parser_for,
)

NUMBERS = {  # hard texts -> the number of the released scripts' rules, with the sign
    "so he has 3.\n#### 18": "18",
    "The final answer is 18": "18",
    r"so \boxed{18}": "18",
    "Answer: 18": "18",
    "18": "18",
    "#### 72.0": "72",
    "#### 2.50": "2.5",
    "72.00 miles": "72",
    "#### 1,234,567": "1234567",
    "#### $1,000": "1000",
    "#### 1,234.50 dollars": "1234.5",
    "#### -5": "-5",
    "#### \N{MINUS SIGN}5": "-5",
    "#### - 5": "-5",
    "#### +5": "5",
    "#### $-7": "-7",
    "#### -$7": "-7",
    "The answer is: -$1,200.": "-1200",
    r"\boxed{-18}": "-18",
    "He owes -$5": "-5",
    "x = -5": "-5",
    "10 - 5 = 5": "5",
    "It takes 5-10": "10",
    "####18": "18",
    "####\n18": "18",
    "#### 18.": "18",
    "#### 20%": "20",
    "#### 3/4": "3",
    "#### .5": "5",
    "#### 007": "7",
    "#### 0.0": "0",
    "#### 3, 4 and 5": "3",
    "#### 4 #### 5": "4",
    "#### 4\n#### 5": "5",
    "#### 4\n#### none": "none",
    "The answer is 9. #### 4": "4",
    "#### 4\nThe answer is 9": "4",
    "#### 7\nQuestion:next": "7",
    r"\boxed{3} but #### 4": "3",
    r"\boxed{3} and \boxed{4}": "4",
    "Answer: 3\nThe answer is 4": "3",
    "ANSWER: **12**": "12",
    "the answer is 3\nno, the answer is -4": "-4",
    "the answer is 3\nmy answer is 5": "3",
    "So the best answer is: 12 apples": "12",
    "We answer 12 now": "12",
    "He pays $5 for each of 3 and gets 15": "5",
    "First 3 miles, then 4 hours, in all 7": "4",
    "2 vacuum cleaners and 9": "2",
    "She has 3, then 4, so 7": "7",
    "In 2021 she had 12 of them by 2022": "12",
    "a share of 0.5 of 12": "12",
    "He came 5th": "5",
    "so x5?\nthen y6": "6",
    "the answer is unknown": "unknown",
    "the answer is , of course, 12": ", of course, 12",
    "#### eighteen": "eighteen",
    "eighteen": "eighteen",
    "in 2021": "in 2021",
    "": None,
    " \n": None,
}
BOXES = {
    r"so $\boxed{4}$.": "4",
    r"\boxed{-4}": "-4",
    r"\boxed{1,234.5}": "1,234.5",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\dfrac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\dfrac12}": r"\dfrac12",
    r"\boxed{ x^{2} + {y_{1}} }": "x^{2}+{y_{1}}",
    r"\boxed{1} and then \boxed{2}, as said": r"1}andthen\boxed{2",
    r"\boxed{1}, cut at \boxed{2 + \frac{3": "1",
    "\\boxed{1}\nor \\boxed{2}": "1",
    "\\boxed{1\n}, so \\boxed{2}": "2",
    r"\boxed{5}. \end{align*}": r"5}.\end{align*",
    r"\boxed{6}\text{ days}": r"6}\text{days",
    r"\boxed{\left\{1, 2\right.}": r"\left\{1,2\right.",
    r"\boxed{a\\}": r"a\\",
    r"\boxed{\boxed{3}}": r"\boxed{3}",
    r"$x=\boxed 2$.": "2",
    r"\boxed 10$": "10",
    r"\boxed{\$5}": r"\$5",
    r"\boxed{}": "",
    r"\boxedtext{4}": None,
    r"\boxed{4": None,
    r"\boxed": None,
    "4": None,
    "": None,
}
HASHES = {
    "Cells divide. \n#### mitosis ": "mitosis",
    "mitosis": "mitosis",
    " mitosis\n": "mitosis",
    "#### a\n#### b c": "b c",
    "why #### a #### b": "b",
    "##### mitosis": "# mitosis",
    "####mitosis": "mitosis",
    "#### mitosis\nand more": "mitosis\nand more",
    "### mitosis": "### mitosis",
    "text ####  ": None,
    "": None,
}


def amounts(text: str) -> list[tuple[int, str]]:
    """Where each run of digits and commas begins, decimals included, and the run; character by character."""
    found, i = [], 0
    while i < len(text):
        end = i
        while end < len(text) and text[end] in "0123456789,":
            end += 1
        if end == i:
            i += 1
            continue
        if text[end : end + 1] == "." and text[end + 1 : end + 2].isdigit():
            end += 1
            while end < len(text) and text[end].isdigit():
                end += 1
        found.append((i, text[i:end]))
        i = end
    return found


def signed(text: str, start: int, amount: str) -> str:
    """The amount as a plain number, minus where a minus sign touches it (or a dollar sign) or begins the text."""
    value = Decimal(amount.replace(",", ""))
    before = text[:start].rstrip("$ ") if "$" in text[:start][-2:] else text[:start]
    first = before.strip() == "-"
    touching = before.endswith("-") and not before[:-1][-1:].isalnum()
    minus = "-" if (first or touching) and value else ""
    return minus + (str(int(value)) if value == int(value) else format(value.normalize(), "f"))


def usual(amount: str) -> bool:
    value = Decimal(amount.replace(",", "") or "0.5")
    return not 0 < value < 1 and not (value == int(value) and 1900 <= value <= 2100)


def by_the_rules(text: str) -> str | None:
    """The released scripts' order of rules for GSM8K, with the sign, line by line: what stands in the last place."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    places = []
    if r"\boxed{" in text and "}" in text.split(r"\boxed{")[-1]:
        places.append(text.split(r"\boxed{")[-1].split("}")[0])
    for mark in ("####", "answer:", "the answer is", "answer is", "answer "):
        lines = text.split("\n")
        for i, line in reversed(list(enumerate(lines))):
            at = line.lower().find(mark)
            if at >= 0 and (rest := "\n".join([line[at + len(mark) :], *lines[i + 1 :]]).strip()):
                places.append(rest.split("\n")[0].strip())
                break
    if places:
        number = next(iter(amounts(places[0])), None)
        if number and number[1].strip(","):
            return signed(places[0], *number)
        return places[0].lstrip("$: ").rstrip("}., ")
    found = amounts(text)
    dollars = [pair for pair in found if text[: pair[0]].rstrip().endswith("$")]
    units = ("mile", "hour", "dollar", "vacuum cleaner")  # those of the table above
    measured = [(at, a) for at, a in found if text[at + len(a) :].lstrip().startswith(units)]
    for group in (dollars, measured):
        if group:
            return signed(text, *group[-1])
    alone = [
        (at, a)
        for at, a in found
        if not text[at - 1 : at].isalnum() and not text[at + len(a) :][:1].isalnum()
    ]
    for group in (
        alone,
        *(amounts(line) for line in reversed(text.split("\n")) if "?" not in line),
    ):
        chosen = [pair for pair in group if usual(pair[1])]
        if chosen:
            where = (
                text
                if group is alone
                else next(line for line in text.split("\n") if amounts(line) == group)
            )
            return signed(where, *chosen[-1])
    return text or None


@pytest.mark.parametrize("text, parsed", NUMBERS.items())
def test_numbers(text, parsed):
    assert parse_number(text) == by_the_rules(text) == parsed


@pytest.mark.parametrize("text, parsed", BOXES.items())
def test_boxes(text, parsed):
    assert parse_boxed(text) == parsed


@pytest.mark.parametrize("text, parsed", HASHES.items())
def test_hashes(text, parsed):
    assert parse_hashes(text) == parsed


def test_text():
    assert parse_text(" a b\n") == "a b" and parse_text(" \n") is None


def test_answers_are_the_same_when_they_parse_to_the_same():
    names = {
        "number": parse_number,
        "boxed": parse_boxed,
        "hashes": parse_hashes,
        "text": parse_text,
    }
    assert names == PARSERS
    assert same_answer("number", "so 1,000.0", "#### 1000") and not same_answer(
        "number", "-1000", "#### 1000"
    )
    assert same_answer("boxed", r"\boxed{\dfrac{1} 2}", r"it is \boxed{\frac{1}2}")
    assert not same_answer("boxed", "4", "4") and not same_answer("boxed", r"\boxed{}", r"\boxed{}")
    assert same_answer("hashes", "why\n#### b ", "#### b") and not same_answer(
        "hashes", "#### a", "#### b"
    )
    assert same_answer("hashes", "b", "#### b")
    assert same_answer("text", " yes", "yes\n") and not same_answer("text", "yes", "Yes")
    assert not any(same_answer(parser, "", "") for parser in PARSERS)  # nothing is never right


OWN = {  # a user's own answers: only marks that all of them have decide how they are read
    "number": ["#### 18", "sum\n#### -1,000", "The answer is 2.5."],
    "boxed": [r"\boxed{4}", r"so $\boxed{\frac12}$"],
    "hashes": ["why\n#### a b", "#### 18"],
    "text": ["18", "The year 1990, at last"],
}


@pytest.mark.parametrize("parser, answers", OWN.items())
def test_how_own_answers_are_read(parser, answers):
    assert parser_for(answers) == parser and parser_for([*answers, "a word"]) == "text"


@pytest.mark.parametrize("answer", ["#### 3/4", "#### .5", "#### 5 of 6", "#### 1e3", "#### 1.2.3"])
def test_own_answers_of_which_a_number_would_be_lost_are_compared_whole(answer):
    assert parser_for(["#### 18", answer]) == "hashes"
    assert not same_answer("hashes", answer[:-1], answer)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_every_gold_gsm8k_answer_parses_to_its_number(shared_data):
    for file, count in {
        "gsm8k/train": 4000,
        "gsm8k/test": 1319,
        "gsm_symbolic/main_test": 2000,
    }.items():
        rows = read(shared_data / f"{file}.jsonl")
        assert len(rows) == count
        for row in rows:
            assert parse_number(row["answer"]) == row["answer"].split("#### ")[1].strip().replace(
                ",", ""
            )
            assert same_answer("number", row["answer"], row["answer"])


def test_every_gold_algebra_solution_parses_to_its_line(shared_data):
    """From the first `\\boxed{` that has a `}` after it on its line to the last of these; two have no brace."""
    without = []
    for file, count in {"math_algebra/train": 1744, "math_algebra/test": 1187}.items():
        rows = read(shared_data / f"{file}.jsonl")
        assert len(rows) == count
        for row in rows:
            lines = [
                line for line in row["solution"].split("\n") if "}" in line.partition(r"\boxed{")[2]
            ]
            if lines:
                inside = lines[0].partition(r"\boxed{")[2].rpartition("}")[0]
                expected = inside.replace(" ", "").replace(r"\dfrac{", r"\frac{")
            else:
                expected = row["solution"].split(r"\boxed ")[1].split("$")[0]
                without.append(expected)
            assert parse_boxed(row["solution"]) == expected
            assert same_answer("boxed", row["solution"], row["solution"])
    assert without == ["2", "9"]


def test_every_sciq_answer_parses_to_itself(shared_data):
    for row in read(shared_data / "sciq/validation.jsonl"):
        answer = f"{row['support']}\n#### {row['correct_answer']}"
        assert (
            parse_hashes(answer)
            == row["correct_answer"].strip()
            == parse_hashes(row["correct_answer"])
        )
        assert same_answer("hashes", answer, answer)
