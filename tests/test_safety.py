"""What the library never does with a stranger's files: run them, unpickle them, or let them write to the terminal."""

import ast
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ia2mini.cli.main import main
from ia2mini.files import plain

SOURCES = [
    path
    for folder in ("ia2mini", "models")
    for path in (Path(__file__).parents[1] / folder).rglob("*.py")
]
# where they stand, however they are called
NEVER = {"eval", "exec", "compile", "__import__", "import_module"}
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "jsonpickle",
}
OF_MODULES = {
    "torch": {"load", "hub", "package", "serialization"},
    "torch.jit": {"load"},
    "builtins": NEVER,
}
OF_MODULES |= {"importlib": {"import_module"}, "pandas": {"read_pickle"}}
ARGUMENTS = {"trust_remote_code", "allow_pickle"}
# imports its own names, from a fixed list, when they are asked for
FRONT_DOOR = "ia2mini/__init__.py"


def uses(source: str) -> set[str]:
    """Names of a source that could run what a file holds: called, passed on, renamed or as a constant for getattr."""
    tree, found = ast.parse(source), set()
    known = {}  # name here -> what it is: `import torch as t`, `from torch import jit as j`
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = (
                f"{node.module}."
                if isinstance(node, ast.ImportFrom) and node.module and not node.level
                else ""
            )
            known |= {n.asname or n.name: start + n.name for n in node.names if n.asname or start}
            for path in ((start + n.name).split(".") for n in node.names):
                owners = [".".join(path[:i]) for i in range(len(path))]
                found |= {
                    p
                    for p, o in zip(path, owners)
                    if p in MODULES | NEVER | OF_MODULES.get(o, set())
                }
                found |= {"*"} if path[-1] == "*" and owners[-1] in OF_MODULES else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found |= {node.id} & NEVER
        elif isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node.value).partition(".")
            owner = ".".join(filter(None, (known.get(first, first), rest)))
            found |= {f"{owner}.{node.attr}"} if node.attr in OF_MODULES.get(owner, ()) else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "getattr",
            "attrgetter",
        ):
            owner = known.get(ast.unparse(node.args[0]), ast.unparse(node.args[0]))
            said = {
                part
                for a in node.args
                if isinstance(a, ast.Constant)
                for part in str(a.value).split(".")
            }
            found |= said & (NEVER | OF_MODULES.get(owner, set()))
        elif isinstance(node, ast.keyword):
            found |= {node.arg} & ARGUMENTS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & (ARGUMENTS | MODULES | {"__builtins__", "__import__"})
    return found


def test_nothing_that_is_read_is_ever_run():
    assert len(SOURCES) > 40
    found = {path.name: uses(path.read_text()) for path in SOURCES if uses(path.read_text())}
    assert found.pop(Path(FRONT_DOOR).name) == {"import_module"}
    # what the processes of one torchrun send each other, and the file that `run --loss` names
    assert found == {"ranks.py": {"torch.load"}, "own_loss.py": {"compile", "exec"}}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p; p.loads(x)",
        "from pickle import loads",
        "import os, _pickle",
        "torch.load(x)",
        "import torch as t; t.load(x)",
        "import torch; read = torch.load",
        "from torch import load",
        "from torch import load as read",
        "from torch import *",
        "from torch import jit as j; j.load(x)",
        "import torch.jit as j; j.load(x)",
        "torch.jit.load(x)",
        "torch.hub.load(x)",
        "from torch.hub import load",
        "from torch.serialization import load",
        "import torch as t; getattr(t, 'load')(x)",
        "getattr(builtins, 'eval')(x)",
        "import builtins as b; b.exec(x)",
        "operator.attrgetter('load')(x); getattr(torch, 'load')",
        "eval('1')",
        "run = exec; run(x)",
        "map(eval, x)",
        "__import__('pickle')",
        "import importlib; importlib.import_module(x)",
        "from importlib import import_module as get; get(x)",
        "f('pickle')",
        "compile(x, '', 'exec')",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "numpy.load(x, allow_pickle=True)",
        "import pandas as pd; pd.read_pickle(x)",
    ],
)
def test_the_search_finds(source):
    assert uses(source), source


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.compile(f)",
        "re.compile(x)",
        "from .checkpoint import load; load(x)",
        "getattr(torch, name)",
    ],
)
def test_the_search_leaves_the_rest_alone(source):
    assert not uses(source), source


def test_templates_run_in_the_sandbox():
    lines = [
        line
        for path in SOURCES
        for line in path.read_text().splitlines()
        if "jinja2" in line and "import" in line
    ]
    assert "from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox" in lines
    assert not any(
        "Environment" in line and "sandbox" not in line or "Template" in line.split()
        for line in lines
    )


def test_terminal_escapes_are_shown_not_obeyed(tmp_path):
    evil = "red \x1b[31m, bell \x07, title \x9d0;x\x9c, over\rwrite"
    assert plain(evil) == "red \\x1b[31m, bell \\x07, title \\x9d0;x\\x9c, over\\rwrite"
    assert (
        plain("a\tb\nc ü 漢 🙂 שלום") == "a\tb\nc ü 漢 🙂 שלום"
        and plain("a\n\u202eb", "") == "a\\n\\u202eb"
    )
    assert plain("half \ud800 a pair") == "half \\ud800 a pair"
    rows = [{"text": f"{evil} {i}", "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = CliRunner().invoke(main, ["tasks", "--data", str(tmp_path / "rows.jsonl")])
    assert shown.exit_code == 0 and "\\x1b[31m" in shown.stdout and "\x1b[31m" not in shown.stdout
    wrong = CliRunner().invoke(main, ["tasks", "--data", str(tmp_path / "no\x1b[31m.jsonl")])
    assert (
        wrong.exit_code == 2 and "\x1b" not in wrong.output and "no\\x1b[31m.jsonl" in wrong.output
    )
