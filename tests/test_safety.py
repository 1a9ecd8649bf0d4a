"""What the library never does with a stranger's files: run them, unpickle them, or let them write to the terminal."""

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ia2mini.cli import main, plain

SOURCES = [path for folder in ("ia2mini", "models") for path in (Path(__file__).parents[1] / folder).rglob("*.py")]
NEVER = {"eval", "exec", "compile", "__import__", "pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "yaml"}
NEVER_OF_TORCH = {"torch.load", "torch.hub", "torch.jit.load", "torch.package"}


def uses(source: str) -> set[str]:
    """Names of a source that could run what a file holds."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= {node.func.id} & NEVER
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.name.partition(".")[0] for name in node.names} & NEVER
            found |= {(getattr(node, "module", None) or "").partition(".")[0]} & NEVER
        if isinstance(node, ast.Attribute):
            found |= {ast.unparse(node)} & NEVER_OF_TORCH
        if isinstance(node, ast.keyword):
            found |= {node.arg} & {"trust_remote_code", "allow_pickle"}
    return found


def test_nothing_that_is_read_is_ever_run():
    assert len(SOURCES) > 40
    assert {str(path): uses(path.read_text()) for path in SOURCES if uses(path.read_text())} == {}


@pytest.mark.parametrize(
    "source", ["import pickle", "from pickle import loads", "torch.load(x)", "eval('1')", "f(trust_remote_code=True)"]
)
def test_the_search_finds(source):
    assert uses(source)


def test_templates_run_in_the_sandbox():
    lines = [
        line for path in SOURCES for line in path.read_text().splitlines() if "jinja2" in line and "import" in line
    ]
    assert "from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox" in lines
    assert not any("Environment" in line and "sandbox" not in line or "Template" in line.split() for line in lines)


def test_terminal_escapes_are_shown_not_obeyed(tmp_path):
    evil = "red \x1b[31m, bell \x07, title \x9d0;x\x9c, over\rwrite"
    assert plain(evil) == "red \\x1b[31m, bell \\x07, title \\x9d0;x\\x9c, over\\rwrite"
    assert plain("a\tb\nc ü 漢 🙂") == "a\tb\nc ü 漢 🙂"
    assert plain("half \ud800 a pair") == "half \\ud800 a pair"
    rows = [{"text": f"{evil} {i}", "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = CliRunner().invoke(main, ["tasks", "--data", str(tmp_path / "rows.jsonl")])
    assert shown.exit_code == 0 and "\\x1b[31m" in shown.stdout and "\x1b[31m" not in shown.stdout
    wrong = CliRunner().invoke(main, ["tasks", "--data", str(tmp_path / "no\x1b[31m.jsonl")])
    assert wrong.exit_code == 2 and "\x1b" not in wrong.output and "no\\x1b[31m.jsonl" in wrong.output
