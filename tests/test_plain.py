"""How plain the code is: lines of a file, lines and arguments of a function, tokens a line of code.

The lists name who exceeds a ceiling today: nobody joins them, and who no longer does leaves.

A token is a name, number, string or operator; brackets, commas, dots, colons, docstrings and comments do not count.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_OF_A_FILE = 350
LINES_OF_A_FUNCTION = 60
ARGUMENTS = 7
TOKENS_A_LINE = 6.5
TOKENS_A_LINE_OF_THE_CORE = 6.0  # all its files together
LONG_FILES = {  # one thing each, that would be harder to follow in two files
    "bench/pretrain.py",
    "bench/training.py",
}
LONG_FUNCTIONS = ["bench/pretrain.py: pretrain", "bench/resources.py: load"]
MANY_ARGUMENTS = ["ia2mini/study/study.py: compare"]
DENSE = {  # sums, indices and shapes: a line of arithmetic has more tokens
    "bench/pretrain.py",
    "bench/studies/effect.py",
    "bench/training.py",
}
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def files() -> list[Path]:
    found = [
        path for folder in ("models", "ia2mini", "bench") for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted(found)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstring_lines(tree: ast.AST) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            text = node.body[0]
            found.update(range(text.lineno, text.end_lineno + 1))
    return found


def code(source: str) -> tuple[int, int]:
    """Tokens and lines of code."""
    skipped = docstring_lines(ast.parse(source))
    lines = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.start[0] in skipped:
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
        if token.string not in "()[]{},:.":
            tokens += 1
    return tokens, len(lines)


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_the_count_is_that_of_tokens_a_reader_meets():
    source = '"""Not this."""\n\n\ndef f(a, b):\n    "Nor this."\n    return a + b  # nor this\n'
    assert code(source) == (8, 2)


def test_no_file_is_too_long():
    long = {
        name(path)
        for path in files()
        if path.read_text(encoding="utf-8").count("\n") > LINES_OF_A_FILE
    }
    assert long == LONG_FILES


def test_no_function_is_too_long():
    long = []
    for path in files():
        for function in functions(path):
            if function.end_lineno - function.lineno + 1 > LINES_OF_A_FUNCTION:
                long.append(f"{name(path)}: {function.name}")
    assert long == LONG_FUNCTIONS


def test_no_function_takes_too_much():
    many = []
    for path in files():
        for function in functions(path):
            taken = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            names = [argument.arg for argument in taken if argument.arg not in ("self", "cls")]
            is_command = any(
                "command" in ast.unparse(decorator) for decorator in function.decorator_list
            )
            if len(names) > ARGUMENTS and not is_command:
                many.append(f"{name(path)}: {function.name}")
    assert many == MANY_ARGUMENTS


def test_no_file_is_dense():
    dense = set()
    for path in files():
        tokens, lines = code(path.read_text(encoding="utf-8"))
        if lines and tokens / lines > TOKENS_A_LINE:
            dense.add(name(path))
    assert dense == DENSE


@pytest.mark.parametrize("folder", ["ia2mini", "models"])
def test_the_core_is_plain(folder):
    counts = [code(path.read_text(encoding="utf-8")) for path in (ROOT / folder).glob("*.py")]
    tokens = sum(tokens for tokens, _ in counts)
    lines = sum(lines for _, lines in counts)
    assert tokens / lines <= TOKENS_A_LINE_OF_THE_CORE
