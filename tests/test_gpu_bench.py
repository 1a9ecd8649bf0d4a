"""The driver of the first hour on a GPU, on a CPU: order, what is kept, going on, failures and steps that last."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from bench import gpu
from bench.__main__ import main


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_order_and_commands():
    """Tests, then each bench on the small shape and on the large one, each with its own command."""
    found = gpu.steps()
    assert list(found)[:6] == [
        "tests",
        "step qwen3-0.6b",
        "step qwen3-4b",
        "cell qwen3-0.6b",
        "cell qwen3-4b",
        "kernel",
    ]
    assert len(found) == 1 + 2 * 6 + 1 and list(found)[-1] == "memory qwen3-4b"
    assert found["icl qwen3-4b"][2:] == ["bench", "icl", "--shape", "qwen3-4b", "--device", "cuda", "--save"]
    assert gpu.STEP < 9 * 60 and gpu.ALL < 25 * 60
    for file in found["tests"][4:]:
        assert (gpu.ROOT / file).is_file()


def test_failures_and_long_steps_do_not_stop_what_follows_and_are_tried_again(tmp_path, monkeypatch):
    log, kept, lines = tmp_path / "log", tmp_path / "kept.json", []

    def noted(name: str, then: str = "") -> list[str]:
        return python(f"open({str(log)!r}, 'a').write({name!r} + ' '); print('said by', {name!r}); {then}")

    attempt = gpu.attempt

    def late(command: list[str], seconds: float) -> tuple[int, str]:
        status, said = attempt(command, seconds)
        return (gpu.TIMEOUT if command == todo["long"] else status), said

    todo = {
        "good": noted("good"),
        "bad": noted("bad", "raise SystemExit(3)"),
        "long": noted("long"),
        "last": noted("last"),
    }
    with monkeypatch.context() as m:
        m.setattr(gpu, "attempt", late)
        found = gpu.first_hour(todo, kept, say=lines.append)
    assert log.read_text().split() == ["good", "bad", "long", "last"]
    assert [found[name]["status"] for name in todo] == [0, 3, gpu.TIMEOUT, 0]
    assert json.loads(kept.read_text()) == found and found["long"]["said"] == "said by long"
    assert "failed with status 3" in lines[1] and "ran too long" in lines[2]
    log.unlink()
    todo = {name: noted(name) for name in todo} | {"new": noted("new")}
    found = gpu.first_hour(todo, kept, say=lines.append)
    assert log.read_text().split() == ["new", "bad", "long"], "what was never begun before what has failed"
    assert all(entry["status"] == 0 for entry in found.values()) and any("good: done before" in line for line in lines)


def test_a_step_that_never_ends_is_ended():
    assert gpu.attempt(python("import time; time.sleep(10**6)"), 0.1) == (gpu.TIMEOUT, "")


def test_every_step_is_saved_as_it_ends_and_the_whole_has_an_end(tmp_path):
    kept, seen = tmp_path / "kept.json", []

    def say(line: str) -> None:
        seen.append((line, list(json.loads(kept.read_text())) if kept.is_file() else []))

    todo = {name: python("import time; time.sleep(0.5)") for name in ("one", "two", "three")}
    gpu.first_hour(todo, kept, total=0.6, say=say)
    assert seen[0][1] == ["one"] and "not begun" in seen[-1][0] and "three" not in seen[-1][1]
    assert set(gpu.first_hour(todo, kept, say=say)) == set(todo)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    said = CliRunner().invoke(main, ["gpu"])
    assert said.exit_code == 2 and said.stderr == "ia2mini: bench gpu: PyTorch sees no GPU here\n"


def test_every_step_is_a_command_that_the_bench_knows(tmp_path):
    """On the tiny shape too; in a process of its own its JSON line, which --save keeps, is left out."""
    for name, command in gpu.steps(("tiny",), "cpu").items():
        assert name == "tests" or CliRunner().invoke(main, [*command[3:], "--help"]).exit_code == 0, command
    told = gpu.first_hour({"a": python("print('{}'); print('seen')")}, tmp_path / "kept.json", say=lambda line: None)
    assert told["a"]["said"] == "seen"
