"""`--help`: options in groups, each help text a short sentence, two examples a command, all within 80 columns."""

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from ia2mini.cli.help import GROUPS, ORDER
from ia2mini.cli.main import main

COMMANDS = list(main.commands.values())
LONGEST = 35  # words of a sentence
RULES = re.compile(r"\s*\[default:.*|\s*\[required\]", re.DOTALL)


def options(command: click.Command) -> list[click.Option]:
    return [option for option in command.params if isinstance(option, click.Option)]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?:])\s+", text)


def examples(command: click.Command) -> list[list[str]]:
    joined = command.help.replace("\\\n", " ")
    return [
        shlex.split(line)
        for line in joined.splitlines()
        if "ia2mini" in line and line.startswith("  ")
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_is_in_one_group(command):
    for option in options(command):
        homes = [heading for heading, names in GROUPS.items() if option.name in names]
        assert len(homes) == 1, f"--{option.name}: {homes}"


def test_groups_name_options_that_exist():
    known = {option.name for command in COMMANDS for option in options(command)}
    assert known == {name for names in GROUPS.values() for name in names}
    assert set(ORDER) == set(main.commands)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_help_text_is_a_short_sentence(command):
    for option in options(command):
        said = RULES.sub("", option.help)
        assert re.match(r"[A-Z][\w-]+ ", said) and said.endswith("."), f"{option.name}: {said}"
        assert all(len(sentence.split()) <= LONGEST for sentence in sentences(said)), said
    prose = command.help.partition("\b")[0] + command.help.rpartition("\n\n")[2]
    assert all(len(sentence.split()) <= LONGEST for sentence in sentences(prose)), prose


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_two_examples_with_options_that_exist(command):
    found = [
        words
        for words in examples(command)
        if words[:2] == ["ia2mini", command.name] or "|" in words
    ]
    assert len(found) >= 2, found
    known = {name for option in options(command) for name in (*option.opts, *option.secondary_opts)}
    typed = {word for words in found for word in words if word.startswith("--")}
    assert typed <= known, typed - known


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_fits_into_eighty_columns(name):
    shown = CliRunner().invoke(main, [name, "--help"] if name else [], terminal_width=80).stdout
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_the_command_alone_shows_own_rows_first():
    shown = CliRunner().invoke(main, []).stdout
    lines = [line.split()[1] for line in shown.splitlines() if line.startswith("    ia2mini ")]
    assert lines == ["fit", "predict", "run", "report"]
    listed = re.findall(r"^  ([a-z]+) ", shown.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(ORDER)


def test_the_bar_keeps_the_remaining_time_in_eighty_columns(monkeypatch):
    import io

    from ia2mini.engine.progress import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "80")
    with progress("12/16 toy-mood-remap-n16: training ia2-sft", 10) as bar:
        bar.ncols = 80
        bar.start_t -= 5000
        bar.n = 5
        bar.set_postfix_str("15 of 15 runs going, dev loss 0.000123 to 12.3")
        line = str(bar)
    assert len(line) <= 80 and re.search(r" 50%, 1:23:2\d left", line), line
