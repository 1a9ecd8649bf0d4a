"""`from ia2mini import …`: every name opens, none costs the import of torch before it is used."""

import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ia2mini


@pytest.mark.parametrize("name", ia2mini.__all__)
def test_the_front_door_opens(name):
    assert getattr(ia2mini, name) is not None
    assert re.search(rf"\b{name}\b", ia2mini.__doc__), "the module's help does not name it"
    exec(f"from ia2mini import {name}", {})


def test_the_front_door_loads_no_torch_and_knows_its_names():
    code = "import sys, ia2mini; assert 'torch' not in sys.modules and 'load' in ia2mini.__all__; ia2mini.load"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'ia2mini' has no attribute 'nonsense'"):
        getattr(ia2mini, "non" + "sense")


def test_the_command_line_starts_without_torch():
    code = "import sys, ia2mini.cli.main; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_front_doors_notebook_runs_as_it_is_written():
    _, _, example, *_ = ia2mini.__doc__.split("\n\n")
    names: dict = {}
    exec("from ia2mini import *\n" + "\n".join(line[4:] for line in example.splitlines()), names)
    (found,) = ia2mini.score(
        names["model"], names["tokenizer"], names["rows"][-100:], ("0", "1"), names["grid"].adapter,
        names["trained"].theta,
    )  # fmt: skip
    assert found["acc"] > 0.6


def test_help_is_a_page_and_lists_no_methods_that_every_object_has():
    shown = pydoc.plaintext.document(ia2mini)
    assert len(shown.splitlines()) < 120
    assert "__delattr__" not in shown and "train_runs" in shown


ROOT = Path(__file__).parents[1]
WHERE = "import ia2mini, ia2mini.models.checkpoint as c; print(ia2mini.__file__); print(c.__file__)"


def imported_from(folder: Path, *path: Path) -> list[Path]:
    """Where a Python started in `folder` finds the package and its models, with `path` as PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()]


def copy_checkout(to: Path) -> Path:
    for name in ("ia2mini", "models"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def test_another_checkout_has_its_own_models(tmp_path):
    other = copy_checkout(tmp_path / "other")
    package, models = imported_from(other)
    assert package.is_relative_to(other) and models.is_relative_to(other)


def test_a_checkout_has_its_own_models_where_a_wheel_is_installed(tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    wheel = tmp_path / "wheel"
    shutil.copytree(ROOT / "ia2mini", wheel / "ia2mini")
    shutil.copytree(ROOT / "models", wheel / "ia2mini/models")
    assert all(place.is_relative_to(checkout) for place in imported_from(checkout, wheel))
    assert all(place.is_relative_to(wheel) for place in imported_from(tmp_path, wheel))


def test_a_checkout_without_models_is_refused_and_takes_no_other_ones(tmp_path):
    shutil.copytree(ROOT / "ia2mini", tmp_path / "ia2mini")
    done = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0 and "models is missing" in done.stderr


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    # as a clone, seen from the folder above it
    (tmp_path / "ia2mini" / "ia2mini").mkdir(parents=True)
    package, models = imported_from(tmp_path, ROOT)
    assert package.is_relative_to(ROOT) and models.is_relative_to(ROOT)
