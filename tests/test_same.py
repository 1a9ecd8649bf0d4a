"""The same command gives the same bytes, in another order too; other groups and threads nearly the same numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ia2mini.cli.main import main
from ia2mini.engine.options import Options
from ia2mini.engine.subject import open_subject
from ia2mini.study.study import compare
from ia2mini.tasks import find_task, world

MEASURED = ("seconds", "seconds_by_phase", "peak_memory_bytes")
TASKS = [find_task("toy-mood"), find_task("toy-sums-short")]
SMALL = Options(
    n=(2,), sets=2, epochs=4, eval_rows=6, methods=("icl", "sft", "ia2-sft"), rates=(3e-3, 1e-2)
)
COMMAND = "run toy-mood toy-sums-short --n 2 --sets 2 --epochs 4 --eval-rows 6 --rates 3e-3,1e-2 --device cpu".split()
COMMAND += ["--methods", "icl,sft,ia2-sft", "--figures="]  # test_kills compares figures
NEAR, WEIGHTS = 1e-5, 1e-4  # others add up in another order; seen: 5e-6 of numbers, 9e-5 of weights


def computed(folder: Path) -> dict[str, bytes]:
    """Everything in a run's folder but its page, and of results.json all but seconds and memory."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    document = {k: v for k, v in json.loads(files["results.json"]).items() if k not in MEASURED}
    kept = {
        name: data for name, data in files.items() if name not in ("seconds.json", "report.html")
    }
    return kept | {"results.json": json.dumps(document).encode()}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    result = CliRunner().invoke(
        main, [*COMMAND, "--out", str(out := tmp_path_factory.mktemp("first"))]
    )
    assert result.exit_code == 0, result.output
    return next(out.iterdir())


def records(folder: Path) -> dict[tuple, dict]:
    """Of each run its record of training and of each evaluation."""
    document = json.loads((folder / "results.json").read_text())
    both = document["runs"] + document["training"]
    return {tuple(r.get(k) for k in ("task", "eval", "method", "set", "rate")): r for r in both}


def studied(tmp_path, tasks=TASKS, options=SMALL, **more) -> Path:
    return compare(tasks, open_subject("tiny", "cpu"), options, tmp_path, **more)[1]


def test_the_same_command_gives_the_same_bytes_in_another_process(first, tmp_path):
    """Hashes of strings differ there, so that no order comes from a set."""
    program = [sys.executable, "-c", "from ia2mini.cli.main import main; main(prog_name='ia2mini')"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*program, *COMMAND, "--out", tmp_path], env=environment, check=True, capture_output=True
    )
    (again,) = tmp_path.iterdir()
    mine, same = computed(first), computed(again)
    assert (
        mine.keys() == same.keys()
        and len([name for name in mine if name.endswith("adapter_model.safetensors")]) == 8
    )
    assert [name for name in mine if mine[name] != same[name]] == []


@pytest.mark.parametrize(
    "tasks, methods", [(TASKS, SMALL.methods[::-1]), (TASKS[::-1], SMALL.methods)]
)
def test_the_order_of_methods_and_tasks_changes_no_byte(first, tmp_path, tasks, methods):
    other = studied(tmp_path, tasks, replace(SMALL, methods=methods))
    assert records(other) == records(first)
    mine, same = computed(first), computed(other)
    tensors = [
        name
        for name in mine
        if name.endswith((".safetensors", "config.json")) or "generations" in name
    ]
    assert len(tensors) == 46 and all(mine[name] == same[name] for name in tensors)


def apart(one: Path, other: Path) -> tuple[float, float]:
    """The largest relative differences of two studies: of a number in their records, and of an adapter's weights."""
    pairs, worst, weights = records(one), 0.0, 0.0
    assert pairs.keys() == (others := records(other)).keys()
    for key, record in pairs.items():
        for name, value in record.items():
            if isinstance(value, (float, list)):
                difference = np.abs(
                    np.subtract(np.array(value, float), np.array(others[key][name], float))
                ).max()
                assert np.isfinite(difference), (key, name)
                worst = max(worst, difference / max(1, np.abs(np.array(value, float)).max()))
            else:
                assert others[key][name] == value, (key, name)
    for path in one.glob("adapters/*/*.safetensors"):
        mine, same = (
            torch.cat([t.flatten() for t in load_file(p).values()])
            for p in (path, other / path.relative_to(one))
        )
        weights = max(weights, ((mine - same).norm() / mine.norm()).item())
    return worst, weights


@pytest.mark.parametrize("together", [1, 3])
def test_other_groups_side_by_side_give_nearly_the_same_numbers(first, tmp_path, together):
    numbers, weights = apart(first, studied(tmp_path, side_by_side=together))
    assert numbers <= NEAR and weights <= WEIGHTS


def test_two_threads_give_nearly_the_same_numbers(tmp_path):
    few = {"sets": 1, "epochs": 1, "rates": (1e-2,), "eval_rows": 3}
    small, found = replace(SMALL, methods=("icl", "ia2-sft"), **few), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(studied(tmp_path / str(threads), TASKS[1:], small))
    finally:
        torch.set_num_threads(1)
    numbers, weights = apart(*found)
    assert numbers <= NEAR and weights <= WEIGHTS


def test_a_fit_gives_the_same_bytes_again(tmp_path):
    rows = world.rows("toy-mood-remap", "train")[4:16]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = "--methods sft,ia2-sft --rates 1e-2,3e-3 --epochs 3 --folds 3 --model tiny --device cpu".split()
    found = []
    for out in (tmp_path / "one", tmp_path / "two"):
        result = CliRunner().invoke(
            main, ["fit", str(tmp_path / "rows.jsonl"), *how, "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
        found.append(
            {
                p.name: p.read_bytes()
                for p in out.iterdir()
                if p.name not in ("report.html", "README.md")
            }
        )
        spec = json.loads(found[-1].pop("ia2mini.json"))
        assert spec["report"].pop("seconds") > 0
        found[-1]["spec"] = json.dumps(spec)
    assert found[0] == found[1] and "adapter_model.safetensors" in found[0]


def test_deterministic_is_set_before_the_device_is_looked_at_and_changes_no_number(
    tmp_path, monkeypatch
):
    few = "toy-mood --n 2 --sets 1 --epochs 1 --eval-rows 4 --rates 1e-2 --figures= --device cpu".split()
    few += ["--methods", "icl,ia2-sft"]
    seen, opened = [], open_subject

    def opening(*how, **more):
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        return opened(*how, **more)

    monkeypatch.setattr("ia2mini.engine.subject.open_subject", opening)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        result = CliRunner().invoke(
            main, ["run", *few, "--deterministic", "--out", str(tmp_path / "deterministic")]
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.exit_code == 0 and seen == [(True, ":4096:8")], result.output
    options = replace(
        SMALL, sets=1, epochs=1, eval_rows=4, rates=(1e-2,), methods=("icl", "ia2-sft")
    )
    plain, (exact,) = (
        studied(tmp_path / "plain", TASKS[:1], options),
        (tmp_path / "deterministic").iterdir(),
    )
    assert exact.name == plain.name, "it is no part of what names a run's folder"
    mine, same = computed(exact), computed(plain)
    versions = [json.loads(files["results.json"])["versions"] for files in (mine, same)]
    assert versions[0] == versions[1] | {"algorithms": "deterministic"}
    tensors = [name for name in same if name.endswith(".safetensors")]
    assert len(tensors) == 7 and all(mine[name] == same[name] for name in tensors)
