"""README and docs/quickstart.md: every command prints what the page says, every Python block runs, sentences are short.

In a block ```console a line `$ command` is run in a folder that has examples/, and the lines below it are what it
prints. Commands on a real model are run where IA2MINI_DOCS is set: it needs the hub, or the checkpoint in its cache.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/quickstart.md", "docs/studies.md")
PROSE = ("README.md", "docs/quickstart.md", "docs/index.md")
LONGEST = 35  # words of a sentence
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what sets a machine up, or needs a server or several processes
SETUP = ("make", "python3", "pip", "source", "git", "transformers", "curl", "torchrun", "cd")
IA2MINI = f'#!/bin/sh\nexec {sys.executable} -m ia2mini "$@"\n'


def blocks(page: str, *kinds: str) -> list[str]:
    return [
        text
        for kind, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        if kind in kinds
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands of a page are typed: it has examples/, and `ia2mini` is on the path."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    command = folder / "bin/ia2mini"
    command.parent.mkdir()
    command.write_text(IA2MINI)
    command.chmod(0o755)
    return folder


@cache  # pages share commands
def typed(command: str, folder: Path) -> str:
    """What a command prints."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def same(printed: str, said: str) -> bool:
    """Whether the text is what the page says: `…` there stands for any text, alone on its line for any lines."""
    pattern = ""
    for line in said.strip().splitlines():
        if line.strip() == "…":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += re.escape(line.rstrip()).replace("…", ".*") + r"\n"
    lines = [line.rstrip() + "\n" for line in printed.strip().splitlines()]
    return re.fullmatch(pattern, "".join(lines)) is not None


def test_the_comparison_can_fail():
    assert (
        same("a\nb\nc\n", "a\nb\nc")
        and same("a\nb\nc\n", "a\n…")
        and same("a\nb 1 c\n", "a\nb … c")
    )
    assert (
        not same("a\nb\nc\n", "a\nb") and not same("a\nb\n", "a\nd\n…") and not same("a 1\n", "a 2")
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_command_prints_what_the_page_says(page, folder):
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, said = part.partition("\n")
            printed = typed(command, folder)
            assert same(printed, said), f"{page}: {command}\n{printed}"


def test_what_fit_and_score_print_fits_into_eighty_columns():
    """The test above says that this is what they print."""
    for command in ("fit", "score"):
        (block,) = [
            b for b in blocks("docs/quickstart.md", "console") if f"$ ia2mini {command}" in b
        ]
        assert "macro-F1" in block and max(map(len, block.splitlines())) <= 80


def plain_commands(page: str) -> list[str]:
    """The commands of blocks without a kind, which stand there without their output."""
    lines = [
        line.partition("  #")[0].strip()
        for block in blocks(page, "")
        for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("ia2mini ") or line.split(" ")[0] in SETUP]


@pytest.mark.parametrize("page", [*PAGES, "docs/paper.md", "docs/reference.md"])
def test_every_command_without_output_has_options_that_exist(page):
    from ia2mini.cli.main import main

    for command in plain_commands(page):
        words = command.split()
        if words[0] != "ia2mini":
            continue
        known = {
            name
            for option in main.commands[words[1]].params
            for name in (*option.opts, *option.secondary_opts)
        }
        given = {word for word in words[2:] if word.startswith("--")}
        assert given <= known, f"{page}: {command}: {given - known}"


@pytest.mark.skipif(
    not os.environ.get("IA2MINI_DOCS"), reason="minutes and a real model: set IA2MINI_DOCS"
)
@pytest.mark.parametrize("page", ["docs/quickstart.md"])
def test_the_commands_on_a_real_model_run(page, folder):
    real = [line for line in plain_commands(page) if "tickets" in line]
    assert real
    for command in real:
        where = os.environ["IA2MINI_DOCS"]  # a folder in place of the short name, or 1 for the hub
        if Path(where).is_dir():
            command = command.replace("--model smollm2-135m-instruct", f"--model {where}")
        typed(command, folder)


def test_every_python_block_runs(folder, monkeypatch):
    """A statement that stands on both pages runs once."""
    monkeypatch.chdir(folder)
    names: dict = {}
    ran = set()
    for block in blocks("README.md", "python") + blocks("docs/quickstart.md", "python"):
        if "import" not in block:
            continue  # quoted from the library
        for statement in map(ast.unparse, ast.parse(block).body):
            if statement not in ran:
                exec(statement, names)
            ran.add(statement)
        for line in block.splitlines():
            expression, _, said = line.partition("  # ")
            if not said or not is_expression(expression):
                continue
            assert repr(eval(expression, names)) == said, line


@pytest.mark.parametrize("page", ["README.md", "docs/reading.md"])
def test_quoted_lines_stand_in_the_model(page):
    model = (ROOT / "models/llama.py").read_text(encoding="utf-8")
    there = {line.strip() for line in model.splitlines()}
    quoted = [block for block in blocks(page, "python") if "import" not in block]
    assert quoted
    for line in "".join(quoted).splitlines():
        assert line.strip() in there, line


def is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except SyntaxError:
        return False
    return True


def sentences(page: str) -> list[str]:
    """The sentences of a page: without code, tables and quotes of output."""
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    lines = []
    for line in text.splitlines():
        if line.startswith(("|", ">", "![", "#")):
            line = ""
        lines.append("\n" + line if line.startswith(("- ", "1. ")) else line)
    paragraphs = re.split(r"\n\s*\n|\n(?=- )", "\n".join(lines))
    found = []
    for paragraph in paragraphs:
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
        found += re.split(r"(?<=[.!?])\*{0,2}\s+", words)
    return found


@pytest.mark.parametrize("page", PROSE)
def test_no_sentence_is_long(page):
    found = sentences(page)
    assert len(found) > 10
    for sentence in found:
        assert len(sentence.split()) <= LONGEST, sentence


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        path = ROOT / "docs" / (file or page)
        assert path.exists(), target
        if heading:
            assert heading in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    """The anchors that headings have on GitHub."""
    heads = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
