"""What is installed: every import is required, the source archive is whole, a missing package is a line."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}
OURS = {"ia2mini", "models", "bench"}


def imported(*folders: str) -> dict[str, set[str]]:
    """Third-party packages that the sources of a folder import -> the files that do."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    known = sys.stdlib_module_names | OURS
    return {name: files for name, files in found.items() if name not in known}


def required() -> dict[str, set[str]]:
    """Modules that an installation brings, and each extra."""
    said = configparser.ConfigParser()
    said.read(ROOT / "setup.cfg")
    groups = {"": said["options"]["install_requires"], **said["options.extras_require"]}
    found = {}
    for group, text in groups.items():
        packages = [re.match(r"[\w-]+", line)[0] for line in text.split()]
        found[group] = {IMPORTED_AS.get(package, package).replace("-", "_") for package in packages}
    return found


def test_what_is_imported_is_required():
    groups = required()
    library, all_of_it = (
        imported("ia2mini", "models"),
        imported("ia2mini", "models", "tests", "bench", "examples"),
    )
    optional = {name for name in library if name not in groups[""]}
    assert {"torch", "jinja2", "tqdm"} <= groups[""] and optional <= groups["data"] | groups[
        "report"
    ]
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    brought = {
        "markdown_it",
        "yaml",
        "accelerate",
        "triton",
        "optimum",
    }  # by others, or looked for and done without
    lacking = all_of_it.keys() - groups[""] - groups["test"] - groups["rivals"] - helpers - brought
    assert not lacking, {name: all_of_it[name] for name in lacking}


OWN_FILES = (".md", ".txt", ".cfg", ".toml", ".in")  # of the project's folder itself


def test_the_source_archive_holds_what_its_tests_need(tmp_path):
    pytest.importorskip("setuptools")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "*.pyc")
    tree = tmp_path / "tree"
    for folder in ("ia2mini", "models", "bench", "tests", "docs", "examples"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=skipped)
    for file in ROOT.iterdir():
        if file.is_file() and (file.suffix in OWN_FILES or file.name in ("LICENSE", "Makefile")):
            shutil.copy(file, tree)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    wanted = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if ".egg-info" not in name}
    assert {"tests/conftest.py", "tests/golden/full.txt", "Makefile", "constraints.txt"} <= wanted
    assert not wanted - held


WITHOUT = """import sys
sys.modules[sys.argv.pop(1)] = None
from ia2mini.cli.main import main
main(prog_name='ia2mini')"""


@pytest.mark.parametrize("package", ["jinja2", "torch", "tokenizers", "safetensors.torch"])
def test_a_missing_package_is_one_line(package):
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        package,
        "generate",
        "--prompt",
        "film",
        "--max-tokens",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    said = f"ia2mini: the package {package} is missing; `pip install ia2mini` installs what is needed\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_parquet_without_pyarrow_is_one_line(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        "pyarrow",
        "score",
        str(tmp_path),
        str(tmp_path / "rows.parquet"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "reading Parquet needs pyarrow: pip install 'ia2mini[data]'" in done.stderr
