"""Run folders: computed once, whole or absent, found again by what made them; a run's metrics against numpy."""

import errno
import json
import math
import os
import platform
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ia2mini import UsageError
from ia2mini.engine import store
from ia2mini.engine.store import Store, checkpoint_digest, peak_memory, versions
from ia2mini.files import finite, write_json
from ia2mini.metrics import measure


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_once_computes_once_and_reads_back(tmp_path):
    folder, calls = Store(tmp_path, "name", {"n": 4}), []

    def make():
        calls.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1, 2])}

    assert not (folder.path / "cell/fit.safetensors").exists()
    first = folder.once("cell/fit", make)
    again = Store(tmp_path, "name", {"n": 4}).once("cell/fit", make)
    assert calls == [1] and (folder.path / "cell/fit.safetensors").is_file()
    for found in (first, again, load_file(folder.path / "cell/fit.safetensors")):
        assert torch.equal(found["a"], torch.arange(6.0).view(2, 3).T) and torch.equal(
            found["b"], torch.tensor([1, 2])
        )


def test_nothing_is_written_before_the_run_begins(tmp_path):
    what = {"n": [4], "rates": []}
    folder = Store(tmp_path / "out", "name", what)
    assert not (tmp_path / "out").exists()
    folder.keep_json("run.json", what | {"rates": (1e-3,), "targets": ("q_proj",)})
    assert files(folder.path) == {"run.json"}
    kept = json.loads((folder.path / "run.json").read_text())
    assert kept == {
        "n": [4],
        "rates": [1e-3],
        "targets": ["q_proj"],
    }  # as resolved; asked for was what names the folder
    assert Store(tmp_path / "out", "name", what).json("run.json") == kept


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UsageError, match="file/name-.*: cannot write there .*; choose another folder with --out"
    ):
        Store(tmp_path / "file", "name", {}).keep_json("run.json", {})


def test_json_is_kept_and_read_back(tmp_path):
    folder = Store(tmp_path, "name", {})
    assert folder.json("cell/texts.json") is None and files(tmp_path) == set()
    held = {"texts": ["a", "ü"], "share": None}
    assert folder.keep_json("cell/texts.json", {"texts": ["a", "ü"], "share": math.nan}) == held
    assert (
        folder.json("cell/texts.json")
        == Store(tmp_path, "name", {}).json("cell/texts.json")
        == held
    )


def test_tensors_are_kept_and_read_back(tmp_path):
    folder = Store(tmp_path, "name", {})
    assert folder.tensors("cell/fit") is None and files(tmp_path) == set()
    given = {"a": torch.ones(2, 3, requires_grad=True).T, "b": torch.tensor([], dtype=torch.bool)}
    kept = folder.keep("cell/fit", given)
    for found in (
        kept,
        folder.tensors("cell/fit"),
        Store(tmp_path, "name", {}).tensors("cell/fit"),
    ):
        assert found.keys() == given.keys() and all(
            torch.equal(found[name], given[name]) for name in given
        )
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())


def test_once_leaves_nothing_of_a_failing_maker_and_goes_on_later(tmp_path):
    folder = Store(tmp_path, "name", {})
    before = files(tmp_path)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.once("fit", fail)
    assert files(tmp_path) == before and not (folder.path / "fit.safetensors").exists()
    assert folder.once("fit", lambda: {"a": torch.ones(1)})["a"] == 1


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    folder = Store(tmp_path, "name", {})
    write_json(folder.path / "results.json", {"a": 1})

    def cut(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", cut)
    with pytest.raises(
        UsageError, match="fit.safetensors: cannot be written .No space left.*free some space"
    ):
        folder.once("fit", lambda: {"a": torch.ones(1)})
    with pytest.raises(TypeError):
        write_json(folder.path / "results.json", {"a": object()})
    assert json.loads((folder.path / "results.json").read_text()) == {"a": 1}
    assert not any(name.startswith(".") or "fit" in name for name in files(folder.path))


@pytest.mark.parametrize("harm", ["half", "less", "more", "header", "empty", "text"])
def test_a_damaged_file_is_set_aside_and_computed_again(tmp_path, harm):
    folder = Store(tmp_path, "name", {})
    tensors = {"a": torch.arange(9.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    folder.once("cell/fit", lambda: tensors)
    path = folder.path / "cell/fit.safetensors"
    whole = path.read_bytes()
    harmed = {
        "half": whole[: len(whole) // 2],
        "less": whole[:-1],
        "more": whole + b"\0",
        "header": whole[:9] + bytes([whole[9] ^ 4]) + whole[10:],
        "empty": b"",
        "text": b"not tensors at all",
    }[harm]
    path.write_bytes(harmed)
    with pytest.warns(
        UserWarning,
        match="fit.safetensors: damaged .*set aside as fit.safetensors.bad and computed again",
    ):
        found = folder.once("cell/fit", lambda: tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (
        path.read_bytes() == whole
        and (folder.path / "cell/fit.safetensors.bad").read_bytes() == harmed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.once("cell/fit", lambda: pytest.fail("it is whole again"))


@pytest.mark.parametrize("harmed", ['{"a": ', "", "[1]", "\ufeff\0", '{"a": ' + "9" * 5000 + "}"])
def test_damaged_json_is_set_aside_and_made_again(tmp_path, harmed):
    folder = Store(tmp_path, "name", {})
    folder.keep_json("texts.json", {"a": 1})
    (folder.path / "texts.json").write_text(harmed)
    with pytest.warns(UserWarning, match="texts.json: damaged .*JSON.*set aside as texts.json.bad"):
        assert folder.json("texts.json") is None
    assert (folder.path / "texts.json.bad").read_text() == harmed and folder.json(
        "texts.json"
    ) is None
    assert folder.keep_json("texts.json", {"a": 2}) == folder.json("texts.json") == {"a": 2}


def test_what_killed_processes_had_begun_is_swept(tmp_path):
    folder = Store(tmp_path, "name", {})
    code = (
        "import os, signal, sys; from pathlib import Path; from ia2mini.files import write\n"
        "write(Path(sys.argv[1]), lambda path: (path.write_text('half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    subprocess.run([sys.executable, "-c", code, folder.path / "cell" / "fit.safetensors"])
    (left,) = (folder.path / "cell").iterdir()
    mine = folder.path / f".results.json.{platform.node()}.{os.getpid()}.x"
    others = [
        folder.path / ".results.json.elsewhere.1234567.x",
        folder.path / ".hidden",
        mine,
        left.with_name("1234567"),
    ]
    for path in others:
        path.write_text("")
    folder.once("cell/fit", lambda: {})
    write_json(folder.path / "results.json", {})
    assert not left.exists() and all(path.exists() for path in others)


def test_seconds_add_up_over_sessions(tmp_path, monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(store.time, "perf_counter", lambda: next(clock))
    memory = iter([300, 700, 500])
    monkeypatch.setattr(store, "peak_memory", lambda: next(memory))
    first = Store(tmp_path, "name", {})
    with first.stage("train", "training sft"):
        pass
    with pytest.raises(KeyboardInterrupt), first.stage("train", "training sft"):
        raise KeyboardInterrupt
    second = Store(tmp_path, "name", {})
    with second.stage("evaluate", "icl on news"):
        pass
    phases = {"training sft": 3.5, "icl on news": 4.0}
    expected = {
        "seconds": {"train": 3.5, "evaluate": 4.0},
        "seconds_by_phase": phases,
        "peak_memory_bytes": 700,
    }
    assert second.spent == expected == Store(tmp_path, "name", {}).spent


def test_a_folder_belongs_to_what_made_it(tmp_path):
    what = {"rates": (1e-3,), "n": (4,), "seed": 0}
    folder = Store(tmp_path, "name", what)
    assert (
        Store(tmp_path, "name", dict(reversed(what.items()))).path == folder.path
    )  # order says nothing
    assert Store(tmp_path, "name", {"rates": [1e-3], "n": [4], "seed": 0}).path == folder.path
    for change in ({"seed": 1}, {"rates": (1e-4,)}, {"n": (4, 8)}):
        assert Store(tmp_path, "name", what | change).path != folder.path
    assert folder.path.parent == tmp_path and folder.path.name.startswith("name-")
    assert Store(tmp_path / "elsewhere", "name", what).path.name == folder.path.name


def test_checkpoint_digest_sees_every_byte_of_config_tokenizer_and_weights(tmp_path):
    names = ("config.json", "tokenizer.json", "model.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 10)
    (tmp_path / "README.md").write_text("a page")
    first = checkpoint_digest(tmp_path)
    (tmp_path / "README.md").write_text("another page")
    assert checkpoint_digest(tmp_path) == first
    for name in names:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert checkpoint_digest(tmp_path) != first
        (tmp_path / name).write_bytes(data)
    assert checkpoint_digest(tmp_path) == first


def test_checkpoint_digest_takes_the_hub_caches_names_for_large_files(tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots/1"
    snapshot.mkdir(parents=True)
    digests = set()
    for name in ("a" * 64, "b" * 64):
        (tmp_path / "blobs" / name).write_bytes(b"not read")
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
        digests.add(checkpoint_digest(snapshot))
    assert len(digests) == 2


def test_finite_makes_json_of_anything_we_hold():
    value = {
        "a": [1, math.nan, (math.inf, -math.inf, 2.5)],
        "b": {"c": None, "d": True, "e": "NaN"},
    }
    assert finite(value) == {
        "a": [1, None, [None, None, 2.5]],
        "b": {"c": None, "d": True, "e": "NaN"},
    }
    json.dumps(finite(value), allow_nan=False)


def test_versions_and_memory_are_told():
    found = versions()
    assert (
        found["torch"] == torch.__version__
        and found["numpy"] == np.__version__
        and {"python", "machine", "ia2mini"} <= set(found)
    )
    before = peak_memory()
    held = torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB
    assert 10 << 20 < before <= peak_memory() < 1 << 40 and len(held)


def test_measure_on_a_written_out_example():
    p = np.array([[0.6, 0.2], [0.3, 0.5], [0.02, 0.2], [0.45, 0.4]])
    confidence, correct, gold = (
        np.array([0.6, 0.5, 0.7, 0.45]),
        np.array([1, 0, 0, 1]),
        [0, 0, 1, 0],
    )
    found = measure(
        torch.tensor(confidence),
        torch.tensor(correct).bool(),
        torch.tensor(p).log(),
        torch.tensor(gold),
    )
    share = p / p.sum(1, keepdims=True)
    right = share.argmax(1) == gold
    gap = np.abs  # no two rows share a bin
    bins = {i: sums for i, sums in enumerate(found.pop("reliability")) if sums[0]}
    wanted = ((6, 0.45, 1), (7, 0.5, 0), (8, 0.6, 1), (10, 0.7, 0))
    assert bins == {i: [1, pytest.approx(c), right] for i, c, right in wanted}
    # alone in its bin, a row is off by 1 - p with probability p and by p with 1 - p
    assert found.pop("ece_null") == pytest.approx(
        (2 * confidence * (1 - confidence)).mean(), abs=0.02
    )
    expected = {
        "acc": 0.5,
        "ece": (gap(1 - 0.6) + gap(0 - 0.5) + gap(0 - 0.7) + gap(1 - 0.45)) / 4,
        "ece_mass": (gap(1 - 0.6) + gap(0 - 0.5) + gap(0 - 0.7) + gap(1 - 0.45)) / 4,
        "nll": -np.log([0.6, 0.3, 0.2, 0.45]).mean(),
        "brier": np.mean([0.4**2 + 0.2**2, 0.7**2 + 0.5**2, 0.02**2 + 0.8**2, 0.55**2 + 0.4**2]),
        "acc_labels": right.mean(),
        "ece_labels": gap(right - share.max(1)).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_measure_bins_as_asked():
    confidence = torch.tensor([0.02] * 20 + [0.03] * 10 + [0.9] * 30)
    correct = torch.tensor([True] * 15 + [False] * 45)
    given = confidence, correct, torch.full((60, 2), 0.5).log(), torch.zeros(60, dtype=torch.int64)
    found = measure(*given)
    width = (
        abs(15 - 20 * 0.02 - 10 * 0.03) + 30 * 0.9
    ) / 60  # 0.02 and 0.03 share the first fifteenth, not a mass bin
    mass = (abs(15 - 20 * 0.02) + 10 * 0.03 + 30 * 0.9) / 60
    assert (found["ece"], found["ece_mass"]) == pytest.approx((width, mass), abs=1e-6)
    assert measure(*given, scheme="mass")["ece"] == pytest.approx(mass, abs=1e-6)


def test_a_folder_for_a_file_and_damaged_seconds_are_set_aside(tmp_path):
    folder = Store(tmp_path, "name", {})
    with folder.stage("train", "training sft"):
        folder.once("fit-sft", lambda: {"a": torch.zeros(2)})
    (folder.path / "seconds.json").write_text('{"seconds": ')
    (folder.path / "fit-sft.safetensors").unlink()
    (folder.path / "fit-sft.safetensors").mkdir()
    with pytest.warns(UserWarning, match="seconds.json: damaged"):
        folder = Store(tmp_path, "name", {})
    assert folder.spent == {"seconds": {}, "seconds_by_phase": {}, "peak_memory_bytes": 0}
    with pytest.warns(UserWarning, match="fit-sft.safetensors: damaged"):
        assert folder.once("fit-sft", lambda: {"a": torch.zeros(2)})["a"].tolist() == [0, 0]


def test_what_memory_does_not_hold_is_not_damaged(tmp_path, monkeypatch):
    folder = Store(tmp_path, "name", {})
    folder.keep("fit", {"a": torch.zeros(2)})

    def full(path):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(store, "load_file", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        folder.tensors("fit")
    assert files(folder.path) == {"fit.safetensors"}


@pytest.mark.parametrize(
    "seconds", [[], {"seconds": 3}, {"seconds": {"a": None}, "peak_memory_bytes": "much"}]
)
def test_seconds_of_another_shape_count_as_none(tmp_path, seconds):
    store = Store(tmp_path, "x", {})
    write_json(store.path / "seconds.json", seconds)
    again = Store(tmp_path, "x", {})
    with again.stage("a", "b"):
        pass
    assert again.spent["seconds"]["a"] >= 0 and again.spent["peak_memory_bytes"] > 0
