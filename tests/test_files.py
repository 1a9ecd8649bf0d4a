"""Files: whole or not there, and one line for what cannot be read or written."""

import os
import platform
import subprocess
import sys

import pytest
from mistakes import refused
from reference import make_checkpoint

from ia2mini import UsageError
from ia2mini.files import finite, read_json, sweep, write, write_text


@pytest.mark.parametrize(
    "error, raised",
    [
        (OSError(28, "No space left on device"), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_what_was_there(tmp_path, error, raised):
    path = tmp_path / "deep" / "config.json"
    write(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(raised):
        write(path, half)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["config.json"]
    assert path.stat().st_mode & 0o777 == 0o644
    refused(lambda: write(path / "below", half), str(path), "cannot write there")
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode() and path.stat().st_mode & 0o777 == 0o644


def test_files_that_cannot_be_read(tmp_path):
    refused(lambda: read_json(tmp_path / "none.json"), "none.json: no such file")
    refused(lambda: read_json(tmp_path), f"{tmp_path}: cannot be read")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    refused(lambda: read_json(tmp_path / "latin.json"), "latin.json:1: not UTF-8 (byte 0xe9)")


def test_numbers_that_json_lacks_become_null():
    document = {
        "a": [1.5, float("nan"), (2, float("-inf"))],
        "b": {"c": float("inf"), "d": "x", "e": None, "f": True},
    }
    assert finite(document) == {
        "a": [1.5, None, [2, None]],
        "b": {"c": None, "d": "x", "e": None, "f": True},
    }


FULL = """
import resource, signal, sys
from pathlib import Path
from ia2mini import UsageError
from ia2mini.models import load
from ia2mini.models.checkpoint import save
model, _ = load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # stands for a full disk
try:
    save(model, Path(sys.argv[2]))
except UsageError as error:
    print(error)
"""


def test_saving_to_a_full_disk_leaves_nothing(tmp_path):
    folder = make_checkpoint(tmp_path / "first", "llama")
    done = subprocess.run(
        [sys.executable, "-c", FULL, folder, tmp_path / "second"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1 and "model.safetensors: cannot be written" in done.stdout
    assert os.listdir(tmp_path / "second") == []


def test_a_message_is_one_line_of_bounded_length():
    assert str(UsageError("a\nb\r\nc")) == "a b c"
    long = str(UsageError("begin" + "x" * 100_000 + "end"))
    assert len(long) < 1000 and long.startswith("begin") and long.endswith("end")


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        refused(
            lambda name=name: read_json(tmp_path / name),
            f"{name}: cannot be read (it is not a file)",
        )


def test_temporary_files_of_impossible_processes_are_swept(tmp_path):
    left = tmp_path / f".x.{platform.node()}.{10**30}.y"
    left.write_text("")
    sweep(tmp_path / "x")
    assert not left.exists()
