"""The driver of the first hour on a GPU, on a CPU: order, what is kept, going on, failures and steps that last."""

import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from click.testing import CliRunner

from bench import gpu, training
from bench.__main__ import main
from bench.cost import KERNELS
from bench.shapes import SHAPES
from ia2mini.scale import graphs


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class Clock:
    """The driver's time, which goes by while `runs` only: how busy the machine is decides nothing."""

    def __init__(self, monkeypatch):
        self.now, self.runs = 0.0, False
        monkeypatch.setattr(gpu, "time", self)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(0.02)
        if self.runs:
            self.now += 1


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
    assert found["icl qwen3-4b"][2:] == [
        "bench",
        "icl",
        "--shape",
        "qwen3-4b",
        "--device",
        "cuda",
        "--save",
    ]
    assert gpu.STEP < 9 * 60 and gpu.ALL < 25 * 60
    for file in found["tests"][4:]:
        assert (gpu.ROOT / file).is_file()


def test_failures_and_long_steps_do_not_stop_what_follows_and_are_tried_again_when_asked(
    tmp_path, monkeypatch
):
    log, kept, lines, clock = tmp_path / "log", tmp_path / "kept.json", [], Clock(monkeypatch)

    def say(line: str) -> None:
        lines.append(line)
        clock.runs = line == "said by long"

    def noted(name: str, then: str = "") -> list[str]:
        return python(
            f"open({str(log)!r}, 'a').write({name!r} + ' '); print('said by', {name!r}); {then}"
        )

    todo = {
        "good": noted("good"),
        "bad": noted("bad", "raise SystemExit(3)"),
        "none": [str(tmp_path / "no such")],
    }
    todo |= {"long": noted("long", "import time; time.sleep(600)"), "last": noted("last")}
    assert gpu.first_hour(todo, kept, step=4, say=say) == ["bad", "none", "long"]
    found = json.loads(kept.read_text())
    assert log.read_text().split() == ["good", "bad", "long", "last"]
    assert [found[name]["status"] for name in todo] == [0, 3, gpu.NO_COMMAND, gpu.TIMEOUT, 0]
    assert found["long"]["said"] == "said by long" and "No such file" in found["none"]["said"]
    assert any("bad: failed with status 3" in line for line in lines)
    assert any("long: ran too long" in line for line in lines)
    assert kept.with_suffix(".log").read_text().splitlines() == [
        f"said by {name}" for name in log.read_text().split()
    ]

    todo = {name: noted(name) for name in todo} | {"new": noted("new")}
    log.unlink()
    assert gpu.first_hour(todo, kept, say=lines.append) == ["bad", "none", "long"]
    assert log.read_text().split() == ["new"], "what failed for good is left"
    assert any(
        line == "bad: failed with status 3 in an earlier call; --failed tries it again"
        for line in lines
    )
    log.unlink()
    assert gpu.first_hour(todo, kept, failed=True, say=lines.append) == []
    assert log.read_text().split() == ["bad", "none", "long"]
    assert any("good: done before" in line for line in lines)


def test_what_only_the_end_of_the_call_cut_short_is_tried_again(tmp_path, monkeypatch):
    kept, long, clock = (
        tmp_path / "kept.json",
        {"long": python("import time; time.sleep(600)")},
        Clock(monkeypatch),
    )
    clock.runs = True
    assert gpu.first_hour(long, kept, step=500, total=3, say=lambda line: None) == ["long"]
    clock.runs = False
    assert not json.loads(kept.read_text())["long"]["for_good"]
    assert gpu.first_hour({"long": python("")}, kept, say=lambda line: None) == []


def test_a_step_is_heard_while_it_runs_and_what_it_said_is_kept_at_once(tmp_path, monkeypatch):
    """It waits for a file that is only made once its first line was heard, and kept, and a word said for it."""
    monkeypatch.setattr(gpu, "QUIET", 0.2)
    kept, go = tmp_path / "kept.json", tmp_path / "go"
    code = "import pathlib, time; print('first'); print('{}')\n"
    code += f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\nprint('then', end='')"
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        if "first" in lines and line.startswith("  … "):
            assert kept.with_suffix(".log").read_text().splitlines() == ["first", "{}"]
            go.touch()

    assert gpu.first_hour({"step": python(code)}, kept, step=100, say=say) == []
    assert [line for line in lines if not line.startswith("  … ")][:3] == [
        "== step",
        "first",
        "then",
    ]
    assert json.loads(kept.read_text())["step"]["said"] == "first\nthen"


def test_every_step_is_saved_as_it_ends_and_the_whole_has_an_end(tmp_path, monkeypatch):
    kept, seen, clock = tmp_path / "kept.json", [], Clock(monkeypatch)

    def say(line: str) -> None:
        seen.append((line, list(json.loads(kept.read_text())) if kept.is_file() else []))
        if line == "here":
            clock.now += 6

    todo = {name: python("print('here')") for name in ("one", "two", "three")}
    missing = gpu.first_hour(todo, kept, total=10, say=say)
    first = next(names for line, names in seen if line.startswith("== one: done"))
    assert first == ["one"] and "not begun" in seen[-1][0] and "three" in missing
    assert gpu.first_hour(todo, kept, say=say) == []


NO_NETWORK = """
import socket


def connect(self, address):
    raise OSError(f"no network in this test, and {address} was asked for")


socket.socket.connect = socket.socket.connect_ex = connect
"""


def test_the_whole_first_hour_runs_on_a_cpu_in_bfloat16(tmp_path):
    """Every bench at tiny sizes: float32 and bfloat16 do not mix, and the stacks agree as far as bfloat16 does."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench", "gpu", "--dry"]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in gpu.steps(("tiny",)):
        assert f"== {name}: done" in done.stdout
    assert "  … us: collect" in done.stderr and done.stdout.rstrip().endswith("all is done")


def test_a_step_that_raises_does_not_end_the_others_and_is_named_at_the_end(monkeypatch):
    def broken(*given, **more):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(training, "step", broken)
    monkeypatch.setattr(gpu, "BENCHES", ("step", "kernel"))
    monkeypatch.setattr(gpu, "attempt", lambda *_: (0, "the tests, in their own process"))
    with warnings.catch_warnings():
        done = CliRunner().invoke(main, ["gpu", "--dry"])
    assert done.exit_code == 1 and "== kernel: done" in done.stdout
    assert done.stdout.splitlines()[-1] == "missing or failed: step tiny"
    assert "an illegal memory access" in done.stderr


LAUNCH = 1e-5  # seconds of a kernel that is launched by itself, nothing recorded
PEERS_MORE = 2  # times the kernels that transformers and peft launch for what we do
BEGIN = (
    90  # seconds for imports, random weights of 4 B on the device and the comparison of the stacks
)


def test_each_step_ends_within_its_time_by_arithmetic():
    """On the largest shape every pass is bound by launches: none of its matrix products takes as long."""
    config = SHAPES["qwen3-4b"]
    forward, lora, backward = (config.num_hidden_layers * n for n in KERNELS["qwen3"])
    rounds = graphs.OFTEN + 1 + 5  # of `race`
    whole, parts, repeats = training.portions("qwen3-4b", "cuda")
    looked = (2 * forward + 2 * lora + backward) * 3 * whole.steps  # all runs at once
    most = {"cell": repeats * looked}
    for name, size in parts.items():
        rows = 6 if name == "(a)" else 2  # passes of a step with its look
        each = rows * (forward + lora + backward)
        scored = 3 * size.sets * size.rows * forward
        most["cell"] += repeats * PEERS_MORE * (3 * size.runs * size.steps * each + scored)
    most["collect"] = rounds * (200 * forward + PEERS_MORE * (200 + 8 * 4) * forward)
    most["generate"] = rounds * (64 * forward + PEERS_MORE * (64 + 16 * 4) * forward)
    most["icl"] = rounds * PEERS_MORE * 16 * forward
    most["step"] = 2 * rounds * (1 + PEERS_MORE * 5) * (forward + lora + backward)
    for name, kernels in most.items():
        assert BEGIN + kernels * LAUNCH < gpu.STEP, (name, kernels * LAUNCH)


def test_one_bench_that_fails_does_not_end_the_others(monkeypatch):
    def broken(*given, **more):
        raise AssertionError("the stacks differ")

    monkeypatch.setattr(training, "step", broken)
    monkeypatch.setattr("bench.__main__.BENCHES", ("step", "kernel"))
    with warnings.catch_warnings():
        done = CliRunner().invoke(main, ["--quick", "--shape", "tiny", "--device", "cpu"])
    assert done.exit_code == 1 and "failed: step" in done.stdout
    assert "the stacks differ" in done.stderr and "kernel  activation loss" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    said = CliRunner().invoke(main, ["gpu"])
    assert (
        said.exit_code == 2
        and said.stderr
        == "ia2mini: bench gpu: PyTorch sees no GPU here; --dry tries every step on the CPU\n"
    )


def test_every_step_is_a_command_that_the_bench_knows(tmp_path):
    """On the tiny shape too; in a process of its own its JSON line, which --save keeps, is left out."""
    for name, command in gpu.steps(("tiny",), "cpu").items():
        assert (
            name == "tests" or CliRunner().invoke(main, [*command[3:], "--help"]).exit_code == 0
        ), command
    kept = tmp_path / "kept.json"
    gpu.first_hour({"a": python("print('{}'); print('seen')")}, kept, say=lambda line: None)
    assert json.loads(kept.read_text())["a"]["said"] == "seen"
