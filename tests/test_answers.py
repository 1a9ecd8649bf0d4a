"""Parsers: hard cases by hand, and every gold answer of the real sets."""

import json
import re

import pytest

from ia2mini.tasks import same_answer
from ia2mini.tasks.answers import PARSERS, parse_boxed, parse_hashes, parse_number, parse_text

NUMBERS = {
    "so he has 3.\n#### 18": "18",
    "#### -5": "-5",
    "#### \N{MINUS SIGN}5": "-5",
    "#### - 5": "-5",
    "#### +5": "5",
    "####18": "18",
    "####\n18": "18",
    "#### 2.50": "2.50",
    "#### .5": ".5",
    "#### 18.": "18",
    "#### 1,234,567": "1234567",
    "#### 1,234.50 dollars": "1234.50",
    "#### 3/4": "3/4",
    "#### -3 / 4 of it": "-3/4",
    "#### $1,000": "1000",
    "#### $-7": "-7",
    "#### -$7": "-7",
    "#### 20%": "20",
    "#### 3, 4 and 5": "3",
    "#### 4\n#### 5": "5",
    "#### 4\n#### none": "4",
    "The answer is 9. #### 4": "4",
    "#### 4\nThe answer is 9": "4",
    "#### 7\nQuestion:next": "7",
    "The answer is 9": "9",
    "the answer is: $1,200.": "1200",
    "the answer is 3, no, the answer is -4": "-4",
    "the answer is unknown": None,
    "18": None,
    "#### eighteen": None,
    "####": None,
    "": None,
}
BOXES = {
    r"so $\boxed{4}$.": "4",
    r"\boxed{-4}": "-4",
    r"\boxed{1,234.5}": "1,234.5",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\dfrac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{ x^{2} + {y_{1}} }": "x^{2}+{y_{1}}",
    r"\boxed{1} and then \boxed{2}, as said": "2",
    r"\boxed{1}, cut at \boxed{2 + \frac{3": "1",
    r"\boxed{\left\{1, 2\right.}": r"\left\{1,2\right.",
    r"\boxed{a\\}": r"a\\",
    r"\boxed{\boxed{3}}": "3",
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


@pytest.mark.parametrize("text, parsed", NUMBERS.items())
def test_numbers(text, parsed):
    assert parse_number(text) == parsed


@pytest.mark.parametrize("text, parsed", BOXES.items())
def test_boxes(text, parsed):
    assert parse_boxed(text) == parsed


def test_hashes_and_text():
    assert parse_hashes("Cells divide. \n#### mitosis ") == "mitosis"
    assert parse_hashes("#### a\n#### b c") == "b c"
    assert parse_hashes("mitosis") is parse_hashes("text ####  ") is None
    assert parse_text(" a b\n") == "a b" and parse_text(" \n") is None


def test_answers_are_the_same_when_they_parse_to_the_same():
    names = {"number": parse_number, "boxed": parse_boxed, "hashes": parse_hashes, "text": parse_text}
    assert names == PARSERS and list(PARSERS) == list(names)  # tried in this order on a user's own rows
    assert same_answer("number", "so #### 1,000", "#### 1000") and not same_answer("number", "1000", "#### 1000")
    assert same_answer("boxed", r"\boxed{\dfrac 12}", r"it is \boxed{\frac12}") and not same_answer("boxed", "4", "4")
    assert same_answer("hashes", "why\n#### b ", "#### b") and not same_answer("hashes", "#### a", "#### b")
    assert same_answer("text", " yes", "yes\n") and not same_answer("text", "yes", "Yes")
    assert not any(same_answer(parser, "", "") for parser in PARSERS)  # nothing is never right


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_every_gold_gsm8k_answer_parses_to_its_number(shared_data):
    for file, count in {"gsm8k/train": 4000, "gsm8k/test": 1319, "gsm_symbolic/main_test": 2000}.items():
        rows = read(shared_data / f"{file}.jsonl")
        assert len(rows) == count
        for row in rows:
            assert parse_number(row["answer"]) == row["answer"].split("#### ")[1].strip().replace(",", "")


def test_every_gold_algebra_solution_parses_to_its_box(shared_data):
    """Against the text from the last `\\boxed` to the `$` or `\\]` that ends the formula, braces counted one by one."""
    for file, count in {"math_algebra/train": 1744, "math_algebra/test": 1187}.items():
        rows = read(shared_data / f"{file}.jsonl")
        assert len(rows) == count
        for row in rows:
            tail = row["solution"].split(r"\boxed")[-1]
            if tail[0] == "{":
                depth, end = 1, 1
                while depth:
                    escaped = re.search(r"\\*$", tail[:end])[0].count("\\") % 2
                    depth += 0 if escaped else (tail[end] == "{") - (tail[end] == "}")
                    end += 1
                tail = tail[1 : end - 1]
            else:
                tail = tail.split("$")[0]
            assert parse_boxed(row["solution"]) == re.sub(r"\s", "", tail).replace("dfrac", "frac") != ""


def test_every_sciq_answer_parses_to_itself(shared_data):
    for row in read(shared_data / "sciq/validation.jsonl"):
        assert parse_hashes(f"{row['support']}\n#### {row['correct_answer']}") == row["correct_answer"].strip()
