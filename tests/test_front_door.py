"""`from ia2mini import …`: every name opens, none costs the import of torch before it is used."""

import subprocess
import sys

import pytest

import ia2mini


@pytest.mark.parametrize("name", ia2mini.__all__)
def test_the_front_door_opens(name):
    assert getattr(ia2mini, name) is not None and name in dir(ia2mini)
    exec(f"from ia2mini import {name}", {})


def test_the_front_door_loads_no_torch_and_knows_its_names():
    code = "import sys, ia2mini; assert 'torch' not in sys.modules and 'load' in dir(ia2mini); ia2mini.load"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'ia2mini' has no attribute 'nonsense'"):
        getattr(ia2mini, "non" + "sense")


def test_the_front_doors_notebook_runs_as_it_is_written():
    _, _, example, *_, after = ia2mini.__doc__.split("\n\n")
    names: dict = {}
    exec("from ia2mini import *\n" + "\n".join(line[4:] for line in example.splitlines()), names)
    (found,) = ia2mini.score(
        names["model"], names["tokenizer"], names["rows"][-100:], ("0", "1"), names["grid"].adapter,
        names["trained"].theta,
    )  # fmt: skip
    assert found["acc"] > 0.6 and "`Taps` asks" in after
