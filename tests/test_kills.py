"""Killed, on a full disk, without permissions: one line or none, nothing half written, and the same command goes on to
the same bytes. `make kills` kills more often ($IA2MINI_KILLS times each command), and at moments by the clock, too."""

import os
import random
import shutil
import signal
from itertools import islice
from pathlib import Path

import click
import kills
import pytest
from click.testing import CliRunner
from kills import COMMANDS, ROOT, check_whole, command, content, lose_permissions, permit
from mistakes import refused

from ia2mini import load_adapter
from ia2mini.cli.group import Commands

BY_THE_CLOCK = "IA2MINI_KILLS" in os.environ
KILLS = int(os.environ.get("IA2MINI_KILLS", 2))
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
WRITING = [name for name in COMMANDS if name != "predict"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with rows and a fitted adapter, for copies; children come from a process that has imported all."""
    folder = tmp_path_factory.mktemp("ground")
    with pytest.MonkeyPatch.context() as m:
        m.setenv(
            "PYTHONPATH",
            os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        )
        m.setenv("OMP_NUM_THREADS", "1")
        m.setenv("TOKENIZERS_PARALLELISM", "false")
        # with it Python itself loses the end of a write that was cut short
        m.delenv("PYTHONUNBUFFERED", raising=False)
        kills.FORKED.set_forkserver_preload(["kills"])
        with (ROOT / "examples/rows.csv").open() as rows:
            (folder / "rows.csv").write_text("".join(islice(rows, 13)))
        (folder / "new.jsonl").write_text(
            "".join(f'{{"text": "a grim film", "id": {i}}}\n' for i in range(200))
        )
        assert command(folder, "fit").code == 0
    (folder / "out").rename(folder / "fitted")
    return folder


@pytest.fixture(scope="module")
def undisturbed(ground, tmp_path_factory):
    """Of each command: what is in its folder afterwards, and how it ended."""
    found = {}
    for name in COMMANDS:
        folder = shutil.copytree(ground, tmp_path_factory.mktemp(name) / "ground")
        done = command(folder, name)
        assert done.code == 0, done.err
        found[name] = content(folder), done
    return found


@pytest.fixture
def folder(ground, tmp_path):
    """Makes copies of the ground."""
    numbers = iter(range(10**6))
    return lambda: shutil.copytree(ground, tmp_path / str(next(numbers)))


def one_line(done, code: int, *mentioned: str) -> None:
    """The command ended with `code` and said so in the last line of what it wrote to stderr, without a traceback."""
    last = [line for line in done.err.splitlines() if line][-1]
    assert done.code == code and "Traceback" not in done.err and "Exception" not in done.err, (
        done.err
    )
    assert last.startswith("ia2mini: ") and done.err.count("ia2mini: ") == 1, done.err
    assert all(text in last for text in mentioned), last


def goes_on(folder: Path, name: str, wanted: dict[str, bytes], out: bytes) -> None:
    """The same command, undisturbed, leaves the same files and no other; `out` is what `predict` then prints."""
    done = command(folder, name)
    assert done.code == 0, done.err
    found = content(folder)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert done.out == out or name != "predict"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_to_the_same_files(name, undisturbed, folder):
    wanted, whole = undisturbed[name]
    rng = random.Random(name)
    hits = 0
    for number in range(4 * KILLS):
        how, place = SIGNALS[hits % 3], folder()
        # just before a file gets its name, or a line is printed
        moment = {"at": (rng.randint(1, whole.files), how)}
        if BY_THE_CLOCK and number % 2:
            moment = {"kill": (rng.uniform(0, whole.seconds), how)}
        killed = command(place, name, **moment)
        if killed.code == 0:  # it was faster than the clock
            continue
        hits += 1
        if how == signal.SIGKILL:
            assert killed.code == -signal.SIGKILL
        else:
            one_line(killed, 130, "interrupted")
        check_whole(place, wanted)
        assert whole.out.startswith(killed.out) or name != "predict"
        assert killed.out[-1:] in (b"", b"\n")
        goes_on(place, name, wanted, whole.out)
        shutil.rmtree(place)
        if hits == KILLS:
            break
    print(f"{name}: {hits} kills, {hits} reruns identical")
    assert hits == KILLS


def test_what_an_interrupted_fit_has_saved_is_not_taken_for_any_adapter_of_peft(
    undisturbed, folder
):
    # then held_out.jsonl, suspects.jsonl, report.html and README.md
    place, spec = folder(), undisturbed["fit"][1].files - 4
    assert command(place, "fit", at=(spec, signal.SIGKILL)).code == -signal.SIGKILL
    out = place / "out"
    assert (out / "adapter_config.json").is_file() and not (out / "ia2mini.json").exists()
    refused(lambda: load_adapter(out), f"{out}: its `ia2mini fit` is not finished")


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_an_interrupt_that_native_code_turns_into_another_error(number):
    @click.group(cls=Commands)
    def group():
        pass

    @group.command()
    def load():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:  # as safetensors' get_tensor does
            raise ValueError("could not determine the shape of object type") from None

    done = CliRunner().invoke(group, ["load"])
    assert done.exit_code == 130 and done.stderr.strip().startswith(
        "ia2mini: interrupted; finished work is kept"
    )
    assert len(done.stderr.strip().splitlines()) == 1


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.parametrize("name", WRITING)
def test_a_full_disk_is_one_line_and_with_room_it_goes_on(name, undisturbed, folder):
    wanted, whole = undisturbed[name]
    rooms = sorted(
        {max(len(data) - 1, 0) for file, data in wanted.items() if file.startswith("out/")}
    )
    rooms = random.Random(name).sample(
        rooms, min(KILLS // 2, len(rooms))
    )  # one file after the other is too long for them
    for room in rooms:
        full = command(place := folder(), name, room=room)
        one_line(full, 2, "cannot be written (", "free some space")
        check_whole(place, wanted)
        assert hidden(place) == []
        goes_on(place, name, wanted, whole.out)
        shutil.rmtree(place)
    print(f"{name}: {len(rooms)} full disks, {len(rooms)} reruns identical")


@pytest.mark.parametrize("name", WRITING)
def test_lost_permissions_are_one_line_and_given_again_it_goes_on(name, undisturbed, folder):
    wanted, whole = undisturbed[name]
    for number in [
        0,
        *random.Random(name).sample(range(1, whole.files + 1), min(KILLS // 2, whole.files)),
    ]:
        (place := folder()).joinpath("out").mkdir()
        if number:  # before this file gets its name
            lost = command(place, name, at=(number, lose_permissions))
            one_line(lost, 2, "cannot ", "Permission denied", "choose another folder with --out")
        else:
            permit(place / "out", 0o555)
            one_line(
                command(place, name, powerless=True),
                2,
                "out",
                "cannot write there (Permission denied)",
            )
            assert list((place / "out").iterdir()) == []
        check_whole(place, wanted)
        permit(place / "out", 0o755)
        goes_on(place, name, wanted, whole.out)


def test_predict_writes_nothing_but_its_output(undisturbed, folder):
    whole = undisturbed["predict"][1].out
    place, answers = folder(), folder() / "answers.jsonl"
    for room in (0, 1, len(whole) // 2, len(whole) - 1):
        one_line(command(place, "predict", output=answers, room=room), 2, "File too large")
        assert answers.read_bytes() == whole[:room]
    permit(place, 0o555)
    done = command(place, "predict", powerless=True)
    permit(place, 0o755)
    assert (done.code, done.out, done.err) == (0, whole, "")
    full = command(place, "predict", output=Path("/dev/full"))
    one_line(full, 2, "No space left on device")
