"""Rows, labels, generations, names of files and columns by somebody who means harm: every output shows them as text."""

import csv
import io
import json
import re
import shlex
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from reference import make_checkpoint
from test_report import latex_rows, record, records, tables

from ia2mini.cli.main import main
from ia2mini.files import json_line
from ia2mini.report.tables import write_table
from ia2mini.study.table import summarise

# title, red, red, return, right to left
ESCAPES = "\x1b]0;t\x07\x1b[31m\x9b31m\r\x7f\u202egnp.\u2066\u200e\u2028"
MARKUP = "<script>alert(1)</script><img src=x onerror=y>`a` ```b``` ![c](http://d) [e](javascript:f) | \\input{g} $h$ %"
EVIL = f"=cmd|'/c calc'!A0 {MARKUP} & \"q\" ~^#_{{}}\n\n# {ESCAPES}"
LABELS = ["=1+1<b>\x1b[31m", "|\\x`\u202e"]
FILE = "=1+1 `a`<script>|$h$%\\x\x1b[31m\u202e\n# b.jsonl"  # a name that Linux allows
RUN = {
    "span",
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "h1",
    "main",
    "section",
    "h2",
    "h3",
    "p",
    "pre",
    "div",
}
RUN |= {
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "img",
    "figcaption",
    "details",
    "summary",
}
RUN |= {"small", "ul", "li", "code"}


def hidden(text: str) -> set[str]:
    """Characters that no reader sees but something obeys, by Unicode's own classes."""
    return {
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"
    }


class Page(HTMLParser):
    """What a browser would find: tags, attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.links = [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data):
        self.text.append(data)


def rendered(markdown: str) -> Page:
    """Markdown with tables as CommonMark's reference implementation in Python renders it, raw HTML let through."""
    return Page(
        pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(markdown)
    )


@pytest.fixture(scope="module")
def hostile_study() -> dict:
    runs = records(EVIL, EVIL) + [
        record(EVIL, s, 0.5, 1e-3, 0.1, task=EVIL, evaluation=EVIL) for s in range(3)
    ]
    failed = record("sft", 0, 0.5, 9.0, task=EVIL) | {"trouble": "failed at step 2: no finite loss"}
    return {"cells": summarise([run | {"model": EVIL} for run in runs]), "training": [failed]}


def test_a_spreadsheet_takes_nothing_for_a_formula(hostile_study):
    text = tables(hostile_study)["csv"]
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == 7 and {len(row) for row in rows} == {len(rows[0])} and not hidden(text)
    texts = [entry for row in rows[1:] for entry in row if not re.fullmatch(r"-?[\d.e-]+", entry)]
    assert sum("calc" in entry for entry in texts) >= 18 and not [
        t for t in texts if t[:1] in tuple("=+-@\t\r＝＋－＠")
    ]
    assert rows[1][0].startswith("'=cmd|'/c calc'!A0 <script>") and rows[1][0].endswith(
        r"\u200e\u2028"
    )
    for start in "+-@＝":
        named = tables(
            {
                "cells": summarise(
                    [record("sft", 0, 0.5, 1e-3, 0.1, task=start + "1", evaluation="a")]
                )
            }
        )["csv"]
        assert named.splitlines()[1].startswith(f"'{start}1,a,")


def test_markdown_shows_names_as_they_are(hostile_study):
    text = tables(hostile_study)["md"]
    page = rendered(text)
    assert page.tags <= {
        "p",
        "strong",
        "em",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    } and not hidden(text)
    assert {
        len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")
    } == {10}
    assert (
        sum(
            "<script>alert(1)</script><img src=x onerror=y>`a` ```b```" in part
            for part in page.text
        )
        >= 13
    )
    assert not page.attributes - {"style"}  # of a table's columns


def test_latex_is_one_table_of_plain_letters(hostile_study):
    text = tables(hostile_study)["tex"]
    rows, bare = latex_rows(text), re.sub(r"\\[&%$#_{}]", "", text)
    assert {len(row) for row in rows} == {8} and len(rows) == 7 and not hidden(text)
    commands = r"begin|end|caption|toprule|midrule|bottomrule|textbackslash|textasciitilde|textasciicircum|rightarrow"
    assert not re.findall(rf"\\(?!{commands}|uparrow|downarrow|pm|beta|cdot|\\)[a-z]+", bare)
    assert bare.count("{") == bare.count("}") and not set("%#~^") & set(bare)
    assert (
        r"\textbackslash{}input\{g\} \$h\$ \%" in text.split(r"\caption")[1].splitlines()[0]
        and "\n\n#" not in text
    )


def test_the_terminals_table_writes_no_escapes_but_its_own(hostile_study):
    for color in (False, True):
        shown = re.sub(r"\x1b\[\d*m", "", write_table(hostile_study, full=True, color=color))
        assert (
            not hidden(shown) and shown.count(r"\x1b]0;t\x07\x1b[31m\x9b31m\r\x7f\u202egnp.") >= 4
        )
        assert not [line for line in shown.splitlines() if line.startswith("#")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    make_checkpoint(folder / "m", "qwen3", num_hidden_layers=1, tie_word_embeddings=True)
    rows = [{"text": f"{i} {EVIL}", "label": LABELS[i % 2], f"{EVIL}": "\ud800"} for i in range(10)]
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def invoke(*arguments) -> str:
    """What a command shows in the terminal; whatever it shows is checked."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0 and not hidden(result.output), result.output
    return result.stdout


def test_what_run_writes_is_harmless(ground, tmp_path):
    own = [
        "--data",
        ground / FILE,
        "--model",
        ground / "m",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--full",
    ]
    shown = invoke(
        "run",
        *own,
        *"--n 2 --sets 1 --methods icl,sft --rates 1e-3 --epochs 1 --eval-rows 3 --figures=".split(),
    )
    (folder,) = tmp_path.iterdir()
    # one evaluation
    assert r"\x1b[31m\u202e\n# b" in folder.name and r"\x1b[31m\u202e\n# b → " not in shown
    for name in ("table.txt", "table.md", "table.tex", "table.csv", "report.html"):
        assert not hidden((folder / name).read_text()), name
    page = Page((folder / "report.html").read_text())
    assert page.tags <= RUN and not {name for name in page.attributes if name.startswith("on")}
    text = "".join(page.text)
    assert "<script>alert(1)</script><img src=x" in text and r"\x1b[31m\x9b31m" in text
    assert (folder / "table.csv").read_text().splitlines()[1].startswith("'=1+1 `a`<script>|")
    assert (
        invoke("tasks", "--data", ground / FILE, "--model", ground / "m", "--n", 2).count(
            r"\x1b]0;t\x07"
        )
        >= 2
    )


def test_what_fit_writes_is_harmless(ground, tmp_path):
    out, template = tmp_path / "a`b", "```</code><script>Text:{text} `x`\\n\u202eLabel:"
    how = ["--model", ground / "m", "--device", "cpu", "--template", template, "--out", out]
    invoke("fit", ground / FILE, *how, *"--methods sft --rates 1e-3 --epochs 1 --folds 2".split())
    for name in ("README.md", "report.html", "held_out.jsonl"):
        assert not hidden((out / name).read_text()), name
    page = Page((out / "report.html").read_text())
    assert page.tags <= RUN and not {name for name in page.attributes if name.startswith("on")}
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front).keys() == {"library_name", "tags"}
    shown = rendered(card)
    assert (
        shown.tags <= {"h1", "h2", "p", "a", "code", "pre"}
        and shown.attributes <= {"href", "class"}
        and card.count("\n# ") == 1
    )
    assert r"=1+1 `a`<script>|$h$%\x\x1b[31m\u202e\n# b" in shown.text
    assert repr(template.replace("\\n", "\n")) in shown.text  # what its code span holds
    held = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert (
        len(held) == 10
        and {row["true"] for row in held} == set(LABELS)
        and EVIL in held[0]["prompt"]
    )
    said = invoke("predict", out, ground / FILE, "--model", ground / "m", "--device", "cpu")
    rows = [json.loads(line) for line in (ground / FILE).read_text().splitlines()]
    assert [
        {**found, **row}
        for row, found in zip(rows, map(json.loads, said.splitlines()), strict=True)
    ] == [json.loads(line) for line in said.splitlines()]
    invoke("score", out, ground / FILE, "--model", ground / "m", "--device", "cpu")


def test_the_command_of_a_report_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "fit", "a b.csv", "--template", "{text}\n`$(rm -rf ~)`"])
    from ia2mini.cli.group import command_line

    assert shlex.split(command_line()) == [
        "ia2mini",
        "fit",
        "a b.csv",
        "--template",
        "{text}\n`$(rm -rf ~)`",
    ]


def test_a_line_of_json_holds_every_text_and_hides_nothing():
    value = {EVIL: [EVIL + "ü 漢 🙂 \ud800", 1.5, None]}
    assert (
        json.loads(json_line(value)) == value
        and not hidden(json_line(value))
        and "ü 漢 🙂" in json_line(value)
    )
