"""How a command is started: standard streams that are closed, arguments that are not UTF-8, another locale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import invoke
from ia2mini.models.checkpoint import TINY
from shipping import shipping

from ia2mini.cli.group import PRINTING
from ia2mini.cli.main import main

ROOT = Path(__file__).parents[1]
ROW = '{"text": "a grim é film"}\n'


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a fitted adapter, labelled rows and a row to predict."""
    folder = tmp_path_factory.mktemp("streams")
    lines = [f"a {'grim' if i % 2 else 'lovely'} film,{i % 2}\n" for i in range(8)]
    texts = [line.replace("film", f"film {'so ' * i}") for i, line in enumerate(lines)]
    (folder / "rows.csv").write_text("text,label\n" + "".join(texts))
    (folder / "new.jsonl").write_text(ROW)
    with shipping("sft"):
        done = invoke(*fit_command(folder), "--out", folder / "fitted")
    assert done.exit_code == 0, done.output
    return folder


def fit_command(folder) -> list:
    few = "--folds 2 --methods sft --rates 1e-2 --epochs 1 --device cpu".split()
    return ["fit", folder / "rows.csv", "--model", TINY, *few]


def printing(folder) -> dict[str, list]:
    """A command line of each command that only prints."""
    return {
        "predict": ["predict", folder / "fitted", folder / "new.jsonl"],
        "score": ["score", folder / "fitted", folder / "rows.csv"],
        "generate": "generate --prompt film --max-tokens 2 --device cpu".split(),
        "tasks": ["tasks"],
        "models": ["models"],
    }


def test_a_bench_whose_output_is_closed_says_so_before_it_measures():
    command = [sys.executable, "-m", "bench", "kernel", "--quick", "--device", "cpu"]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(closed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "ia2mini: standard output is closed, and the answer goes there; send it to a file or a pipe\n"
    )


def writing(folder, out) -> dict[str, list]:
    """A command line of each command that writes files."""
    few = "--n 2 --sets 1 --methods sft --rates 1e-2 --epochs 1 --eval-rows 2 --figures= --device cpu".split()
    return {
        "fit": [*fit_command(folder), "--out", out],
        "run": ["run", "toy-mood", *few, "--out", out],
        "merge": ["merge", folder / "fitted", "--out", out],
        "predict": [*printing(folder)["predict"], "--out", out / "answers.csv"],
    }


def ended(arguments: list) -> int:
    """The exit code of a command in this process, with its streams as they are."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    return end.value.code or 0


@pytest.mark.parametrize("command", [*PRINTING, "predict"])
def test_closed_input_changes_nothing_and_closed_output_is_a_line(
    command, ground, monkeypatch, capsys
):
    words = printing(ground)[command]
    usual = invoke(*words)
    monkeypatch.setattr(sys, "stdin", None)
    assert ended(words) == 0 and capsys.readouterr().out == usual.stdout != ""
    monkeypatch.setattr(sys, "stdout", None)
    assert ended(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "ia2mini: standard output is closed, and the answer goes there; send it to a file"
    )


@pytest.mark.parametrize("command", ["fit", "run", "merge", "predict"])
def test_a_service_without_streams_gets_its_files(command, ground, tmp_path, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert ended(writing(ground, tmp_path / "out")[command]) == 0
    made = {path.name for path in (tmp_path / "out").rglob("*")}
    expected = {"fit": "ia2mini.json", "run": "results.json", "merge": "model.safetensors"}
    expected["predict"] = "answers.csv"
    assert expected[command] in made


def test_rows_from_a_closed_input_are_a_line_before_a_model_is_loaded(ground, monkeypatch, capsys):
    monkeypatch.setattr("ia2mini.cli.use.open_adapter", None)
    words = ["predict", ground / "fitted", "-"]
    monkeypatch.setattr(sys, "stdin", None)
    assert ended(words) == 2
    assert (
        capsys.readouterr().err
        == "ia2mini: standard input is closed; give a file of rows, or a pipe\n"
    )


def started(arguments: list[str], before: str = "", **more) -> subprocess.CompletedProcess:
    """A command in a process of its own, in which the shell first does what `before` says."""
    line = f'{before} exec "$0" -m ia2mini "$@"'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *arguments], capture_output=True, **more
    )


def test_closed_and_unreadable_streams_of_a_real_process(tmp_path):
    done = started(["tasks"], "exec <&- >&-;")
    assert done.returncode == 2 and done.stdout == b""
    assert (
        done.stderr.startswith(b"ia2mini: standard output is closed")
        and done.stderr.count(b"\n") == 1
    )
    done = started(["tasks"], "exec <&- 2>&-;")
    assert done.returncode == 0 and b"toy-mood-verse*" in done.stdout
    done = started(["predict", str(tmp_path), "-"], f"exec 0>{tmp_path}/written;")
    assert done.returncode == 2
    assert done.stderr == (
        b"ia2mini: standard input cannot be read (Bad file descriptor); give a file of rows, or a pipe\n"
    )


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    code = "import os, sys, ia2mini.cli.streams as s; s.open_streams(); print('lost')\n"
    code += f"number = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
    code += "os.write(1, b'lost too'); sys.exit(number)"
    done = subprocess.run(["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code])
    assert done.returncode > 2 and (tmp_path / "file").read_bytes() == b""


LATIN = "caf\udce9"  # as Python spells the bytes of "café" in Latin-1
ARGUMENTS = {
    "prompt": ["generate", "--prompt", LATIN],
    "stop": ["generate", "--prompt", "a", "--stop", LATIN],
    "labels": ["predict", "{g}", "{g}/new.jsonl", "--labels", f"a,{LATIN}"],
    "template": ["predict", "{g}", "{g}/new.jsonl", "--template", "{{text}}" + LATIN],
    "column": ["score", "{g}", "{g}/rows.csv", "--answer-column", LATIN],
    "model": ["generate", "--prompt", "a", "--model", f"{{g}}/{LATIN}"],
    "adapter": ["predict", f"{{g}}/{LATIN}", "{g}/new.jsonl"],
    "rows": ["fit", f"{LATIN}.csv", "--out", "{o}"],
    "out of fit": ["fit", "{g}/rows.csv", "--out", f"{{o}}/{LATIN}"],
    "out of run": ["run", "--out", f"{{o}}/{LATIN}"],
    "out of merge": ["merge", "{g}/fitted", "--out", f"{{o}}/{LATIN}"],
    "task": ["tasks", LATIN],
    "command": [LATIN],
    "other halves": ["tasks", "\ud800"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_is_not_utf_8_is_one_line(name, ground, tmp_path):
    words = [word.format(g=ground, o=tmp_path) for word in ARGUMENTS[name]]
    done = invoke(*words)
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert line.startswith("ia2mini: argument '") and "is not UTF-8; type it in UTF-8" in line
    assert r"caf\xe9" in line or name == "other halves"


def test_an_argument_of_a_real_process_that_is_not_utf_8():
    done = started(["tasks", b"caf\xe9"])
    assert done.returncode == 2 and done.stderr.startswith(
        rb"ia2mini: argument 'caf\xe9' is not UTF-8".strip()
    )
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = started(["tasks", "café".encode()], env=ascii_only)
    assert (
        done.returncode == 2
        and b"Python reads arguments as ascii here; set PYTHONUTF8=1" in done.stderr
    )


def test_what_is_printed_is_utf_8_in_every_locale(ground):
    words = [str(word) for word in printing(ground)["predict"]]
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = started(words, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout == started(words).stdout and "é" in done.stdout.decode()
