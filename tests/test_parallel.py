"""Several processes against one: the same files, one voice; a process that dies; going on with more or fewer."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from shipping import shipping
from torch.distributed import TCPStore

import ia2mini.engine.experiment
from ia2mini.cli.main import main
from ia2mini.scale.race import Race

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "ia2mini.cli.main",
        "ia2mini.study.study",
        "ia2mini.fitting.fit",
        "ia2mini.report.page",
        "torch.distributed",
        "torch._dynamo",  # an optimizer of torch imports it, which takes a second
    ]
)
STORES = []
BOUND = 1e-4  # of results' numbers, and of weights relative to their norm: processors round sums in their own order
RACING = "run toy-mood --n 4 --sets 2 --epochs 16 --eval-rows 8 --figures= --device cpu".split()
RACING += ["--methods", "icl,sft,ia2,ia2-sft"]
CELL = [*RACING, "--no-race"]  # rates race only where one process trains all runs
CELLS = "run toy-mood toy-sums-short --n 2 --sets 2 --epochs 2 --eval-rows 6 --figures=".split()
CELLS += "--methods base,icl,ia2 --device cpu".split()
FIT = (
    "fit --model tiny --rates 3e-3,1e-2 --epochs 2 --folds 3 --methods sft,ia2 --device cpu".split()
)
LOST = (
    "ia2mini: another process has ended; finished work is kept, and the same command resumes it\n"
)


def work(rank: int, count: int, port: int, arguments: list[str], said: Path, patch=None) -> None:
    """One process as torchrun starts it; what it says goes to files."""
    torch.set_num_threads(1)
    where = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
    }
    where |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {key: str(value) for key, value in where.items()}
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(said / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY), stream.fileno())
    if patch:
        patch(rank)
    with shipping("ia2"):  # of `fit`: an adapter, so that weights can be compared
        main(arguments)


def begin(count: int, arguments: list[str], out: Path, patch=None) -> list:
    """Start processes as torchrun does, which keeps the store itself."""
    STORES.append(store := TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    out.mkdir(exist_ok=True)
    every = [*map(str, arguments), "--out", str(out / "out")]
    started = [
        SERVER.Process(target=work, args=(r, count, store.port, every, out, patch))
        for r in range(count)
    ]
    for process in started:
        process.start()
    return started


def end(started: list, out: Path) -> tuple[list[int], list[str], list[str]]:
    """Exit codes of the processes, what each said on stdout and on stderr."""
    for process in started:
        process.join(600)
        assert process.exitcode is not None, "still running"
    streams = (
        [(out / f"{r}.{name}").read_text() for r in range(len(started))] for name in ("out", "err")
    )
    return [process.exitcode for process in started], *streams


def together(count: int, arguments: list[str], out: Path, patch=None) -> Path:
    """Run `count` processes to their end: only the first has said anything; the folder of results."""
    codes, told, complaints = end(begin(count, arguments, out, patch), out)
    assert codes == [0] * count, complaints
    assert told[0] and not any(told[1:] + complaints[1:])
    return found(out)


def found(out: Path) -> Path:
    (folder,) = (out / "out").glob("toy-*") if list((out / "out").glob("toy-*")) else [out / "out"]
    return folder


def alone(arguments: list[str], out: Path) -> Path:
    with shipping("ia2"):
        result = CliRunner().invoke(main, [*arguments, "--out", str(out / "out")])
    assert result.exit_code == 0, result.output
    return found(out)


def differ(one, other, where: str = "") -> float:
    """The largest difference of a number, relative above one; all else is the same. Not of what a run took."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        keys = one.keys() - {"seconds", "seconds_by_phase", "peak_memory_bytes"}
        return max((differ(one[key], other[key], f"{where}/{key}") for key in keys), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(other), where
        return max((differ(*pair, where) for pair in zip(one, other)), default=0.0)
    if isinstance(one, float):
        return abs(one - other) / max(1, abs(one))
    assert one == other, where
    return 0.0


def relative_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference of weights in norms of the weights; Adam makes much of rounding where gradients are
    near zero, in a few weights of many thousands."""
    return ((one - other).norm() / one.norm()).item()


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file that does not tell how long something took."""
    timed = ("results.json", "seconds.json", "report.html")
    every = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in every.items() if name not in timed}


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Path:
    """One cell by one process."""
    return alone(CELL, tmp_path_factory.mktemp("cell"))


@pytest.mark.parametrize("count", [2, 3])
def test_a_cell_of_which_each_process_has_a_part_is_the_same(count, cell, tmp_path):
    folder = together(count, CELL, tmp_path)
    assert folder.name == cell.name and files(folder).keys() == files(cell).keys()
    assert differ(results(cell), results(folder)) <= BOUND
    for name in ("fit-sft", "fit-ia2", "fit-ia2-sft"):
        one, other = (load_file(f / f"toy-mood-n4/{name}.safetensors") for f in (cell, folder))
        assert torch.equal(one["steps"], other["steps"]) and torch.equal(one["best"], other["best"])
        assert relative_distance(one["theta"], other["theta"]) <= BOUND


def test_rates_race_only_where_one_process_trains_all_runs(cell, tmp_path):
    beaten = []
    kept = Race.beaten
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Race, "beaten", lambda self: (beaten.append(now := kept(self)), now)[1])
        raced = results(alone(RACING, tmp_path / "one"))
    assert any(now.any() for now in beaten)
    whole = results(cell)
    steps = [[run["steps"] for run in found["training"]] for found in (raced, whole)]
    assert steps[0] != steps[1] and all(less <= more for less, more in zip(*steps))
    several = results(together(2, RACING, tmp_path))
    for found in (whole, several):
        found["config"].pop("race")
    assert differ(whole, several) <= BOUND


def test_cells_with_answers_of_their_own_length_are_the_same(tmp_path):
    one = alone(CELLS, tmp_path / "one")
    assert any("generations" in name for name in files(one))
    for count in (2, 3):
        several = together(count, CELLS, tmp_path / str(count))
        assert differ(results(one), results(several)) <= BOUND
        assert files(one).keys() == files(several).keys()


def test_a_fit_is_the_same(tmp_path):
    (rows := tmp_path / "rows.csv").write_text(
        "\n".join((Path(__file__).parents[1] / "examples/rows.csv").read_text().splitlines()[:13])
    )
    one = alone([*FIT, str(rows)], tmp_path / "one")
    for count in (2, 3):
        two = together(count, [*FIT, str(rows)], tmp_path / str(count))
        kept, again = (json.loads((folder / "ia2mini.json").read_text()) for folder in (one, two))
        assert kept.pop("adapter_digest") and again.pop("adapter_digest")
        assert kept["method"] != "base" and differ(kept, again) <= BOUND
        weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
        assert all(relative_distance(weights[key], others[key]) <= BOUND for key in weights)
        assert files(one).keys() == files(two).keys()


class Dying(NamedTuple):
    """Ends process `killed` (None: every one, by an interrupt) at its second training, when the first one is kept."""

    killed: int | None
    first: Path

    def __call__(self, rank: int) -> None:
        trainings = []
        train_method = ia2mini.engine.experiment.train_method

        def dying(*arguments):
            trainings.append(arguments)
            while len(trainings) == 2 and not self.first.exists():
                time.sleep(0.01)
            if len(trainings) == 2:
                os.kill(os.getpid(), signal.SIGINT if self.killed is None else signal.SIGKILL)
            return train_method(*arguments)

        if self.killed in (None, rank):
            ia2mini.engine.experiment.train_method = dying


@pytest.mark.parametrize("killed, code", [(1, 2), (0, 2), (None, 130)])
def test_a_process_that_dies_ends_the_others_and_one_goes_on(killed, code, cell, tmp_path):
    first = tmp_path / f"out/{cell.name}/toy-mood-n4/fit-sft.safetensors"
    started = begin(2, CELL, tmp_path, Dying(killed, first))
    codes, _, complaints = end(started, tmp_path)
    assert not (first.parent.parent / "results.json").exists()
    left = [c for r, c in enumerate(codes) if r != killed]
    assert set(left) <= {code, 2} and code in left, complaints
    lines = re.findall("^ia2mini: .*\n", "".join(complaints), re.M)
    assert len(lines) == 1 and (killed is None or lines == [LOST])
    if killed == 1:
        when = first.stat().st_mtime_ns
        assert differ(results(cell), results(alone(CELL, tmp_path))) <= BOUND
        assert first.stat().st_mtime_ns == when


def test_what_one_process_began_two_go_on_with(cell, tmp_path):
    folder = shutil.copytree(cell, tmp_path / "out" / cell.name)
    for path in (folder / "results.json", *folder.glob("toy-mood-n4/*ia2*")):
        path.unlink()
    first = folder / "toy-mood-n4/fit-sft.safetensors"
    when = first.stat().st_mtime_ns
    assert differ(results(cell), results(together(2, CELL, tmp_path))) <= BOUND
    assert first.stat().st_mtime_ns == when


def short_of_memory(rank: int) -> None:
    """The second process's first training has no memory left after some looks."""
    if rank == 1:
        whole = ia2mini.engine.experiment.train
        calls = []

        def train(model, adapter, runs, settings, state, hooks):
            def after_evaluation(state):
                if len(calls) == 1 and state.step > 5:
                    raise torch.OutOfMemoryError("out of memory")
                return hooks.after_evaluation(state)

            calls.append(1)
            return whole(
                model,
                adapter,
                runs,
                settings,
                state,
                replace(hooks, after_evaluation=after_evaluation),
            )

        ia2mini.engine.experiment.train = train


def test_a_process_without_memory_trains_fewer_runs_at_once_and_the_others_go_on(cell, tmp_path):
    codes, _, complaints = end(begin(3, CELL, tmp_path, short_of_memory), tmp_path)
    assert codes == [0, 0, 0], complaints
    told = [line for line in "".join(complaints).splitlines() if line.startswith("ia2mini")]
    assert told == [
        "ia2mini: warning: out of memory with 2 runs side by side; going on with 1 (--side-by-side 1)"
    ]
    assert differ(results(cell), results(found(tmp_path))) <= BOUND


def test_torchrun_tells_a_mistake_once(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
    ]
    command = [*launch, "ia2mini", *CELL, "--layers", "99"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode != 0 and not ended.stdout
    mistake = "ia2mini: --layers 99: this model has layers 0 to 3"
    assert [line for line in ended.stderr.splitlines() if line.startswith("ia2mini:")] == [mistake]


def test_commands_that_are_not_spread_are_refused(tmp_path):
    codes, told, complaints = end(begin(2, ["tasks"], tmp_path), tmp_path)
    assert set(codes) == {2} and not any(told)
    refusal = "ia2mini: only `run` and `fit` are spread over processes; start the others without torchrun\n"
    assert sorted(complaints) == ["", refusal]


def test_two_nodes_started_by_torchrun_itself(tmp_path):
    """Two agents with a process each, as on two machines that see one folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = "run toy-mood --n 2 --sets 2 --epochs 2 --eval-rows 8 --figures= --device cpu".split()
    command += ["--methods", "icl,ia2"]
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
    ]
    agent += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    more = ["--out", str(tmp_path / "two" / "out")]
    nodes = [
        subprocess.Popen([*agent, "--node-rank", str(rank), "-m", "--", "ia2mini", *command, *more])
        for rank in (0, 1)
    ]
    assert [node.wait(600) for node in nodes] == [0, 0]
    assert (
        differ(results(found(tmp_path / "two")), results(alone(command, tmp_path / "one"))) <= BOUND
    )
