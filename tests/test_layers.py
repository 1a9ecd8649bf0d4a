"""Who may know whom: a file imports only from the rooms below its own, and nothing goes round in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [  # from the bottom up; a room may import from its own and those before it
    ["errors", "files", "tokenizer"],
    ["models", "tasks"],
    ["core"],
    ["scale"],
    ["engine"],
    ["study", "fitting"],
    ["report"],
    ["cli"],
    ["bench"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
STRANGERS = [("study", "fitting"), ("fitting", "study"), ("models", "tasks")]


def modules() -> dict[str, Path]:
    """Every module of the project by the name that it is imported by."""
    found = {}
    for folder in ("ia2mini", "models", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            if folder == "models":
                parts.insert(0, "ia2mini")
            found[".".join(parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], of_types: bool = True) -> set[str]:
    """The project's modules that a module imports, wherever in it; `of_types`: also those that only mypy reads."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    never_run = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            never_run.update(node.body)
    found = set()
    for node in ast.walk(tree):
        if node in never_run and not of_types:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in known else source)
    return found & known.keys()


def room(name: str) -> str:
    """Files that lie in ia2mini/ are the core; its folders are rooms of their own."""
    parts = name.split(".")
    if parts[0] == "bench":
        return "bench"
    if len(parts) == 1:
        return "errors"
    if parts[1] == "__main__":
        return "cli"
    return parts[1] if parts[1] in LEVEL else "core"


def arrows(of_types: bool = True) -> list[tuple[str, str]]:
    known = modules()
    return [
        (name, other)
        for name, path in known.items()
        for other in imports(name, path, known, of_types)
        if other != name
    ]


def test_nobody_imports_from_a_room_above_its_own():
    wrong = [(one, other) for one, other in arrows() if LEVEL[room(one)] < LEVEL[room(other)]]
    assert wrong == []


def test_study_and_fit_do_not_know_each_other():
    wrong = [(one, other) for one, other in arrows() if (room(one), room(other)) in STRANGERS]
    assert wrong == []


def test_there_is_no_circle():
    waiting: dict[str, set[str]] = {name: set() for name in modules()}
    for one, other in arrows(of_types=False):
        if other != "ia2mini":  # the front door, which imports nobody
            waiting[one].add(other)
    while ready := {name for name, others in waiting.items() if not others}:
        waiting = {name: others - ready for name, others in waiting.items() if name not in ready}
    assert waiting == {}


def test_it_sees_an_import_wherever_it_stands(tmp_path):
    path = tmp_path / "rooms.py"
    path.write_text("def f():\n    from ..train import State\n    from . import peft\n")
    known = {"ia2mini.train": path, "ia2mini.engine.peft": path}
    assert imports("ia2mini.engine.rooms", path, known) == known.keys()
    path.write_text("if TYPE_CHECKING:\n    from ..train import State\nfrom . import peft\n")
    assert imports("ia2mini.engine.rooms", path, known) == known.keys()
    assert imports("ia2mini.engine.rooms", path, known, False) == {"ia2mini.engine.peft"}
