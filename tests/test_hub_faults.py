"""A hub that is slow, breaks off, redirects, lies or refuses: another try where it may help, then a line; no token."""

import threading
import time

import pytest
from click.testing import CliRunner
from hub import TOKEN, connect, serve
from huggingface_hub import constants
from ia2mini.models import load
from mistakes import refused
from reference import make_checkpoint

import ia2mini.files.hub
from ia2mini.cli.main import main
from ia2mini.files.hub import WAITS, hub_errors
from ia2mini.tasks import find_task, load_examples

REPO = ("model", "some/one")
INFO, TREE, FILE, LARGE = "/revision/", "/tree/", "/resolve/", "/cdn/"
LONG = 60  # seconds that an answer may take
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """What a repository of a tiny sharded checkpoint holds."""
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "model", "qwen3", shard="100KB")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files, monkeypatch, tmp_path):
    """A hub with that repository; the client waits a moment for what never comes, and between tries not at all."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", LONG)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", LONG)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serve({REPO: {"main": files}}) as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        monkeypatch.setattr(ia2mini.files.hub, "limit", limit_of(hub))
        yield hub


def limit_of(hub):
    """The library's own limit, which is made short for a request that the hub will never answer, and for no other."""
    lock, limit = threading.Lock(), ia2mini.files.hub.limit

    def limited(request) -> None:
        limit(request)
        assert all(request.extensions["timeout"][part] <= LONG for part in ia2mini.files.hub.PARTS)
        with lock:
            fault = next(
                (f for part, f in hub.faults.items() if f and part in request.url.path), []
            )
            if fault[:1] == ["hang"]:
                fault.pop(0)
                request.headers["X-Fault"] = "hang"
                request.extensions["timeout"] = dict.fromkeys(ia2mini.files.hub.PARTS, 0.2)

    return limited


PASSING = [
    (INFO, 429),
    (INFO, 500),
    (INFO, 503),
    (INFO, "gone"),
    (INFO, "loop"),
    (INFO, "long"),
    (TREE, 503),
]
PASSING += [
    (TREE, "hang"),
    (FILE, 503),
    (FILE, "hang"),
    (FILE, "gone"),
    (LARGE, 429),
    (LARGE, 500),
    (LARGE, "hang"),
]
PASSING += [(LARGE, "gone"), (LARGE, "long")]


@pytest.mark.parametrize("where, fault", PASSING)
def test_what_passes_is_not_noticed(hub, where, fault):
    hub.faults[where] = [fault]
    assert load("some/one")[0].config.model_type == "qwen3"
    assert hub.faults[where] == []


LASTING = [
    (INFO, 401, "401"),
    (INFO, 403, "hub answers 403"),
    (INFO, 404, "hub answers 404"),
    (INFO, 503, "503"),
]
LASTING += [
    (INFO, "hang", "out of reach"),
    (INFO, "gone", "disconnected"),
    (INFO, "html", "JSONDecodeError"),
]
LASTING += [
    (INFO, "loop", "redirects"),
    (INFO, "long", "peer closed connection"),
    (TREE, 429, "hub answers 429"),
]
LASTING += [
    (TREE, "hang", "out of reach"),
    (TREE, "html", "JSONDecodeError"),
    (FILE, 403, "hub answers 403"),
]
LASTING += [
    (FILE, "html", "out of reach"),
    (LARGE, 401, "401"),
    (LARGE, 404, "404"),
    (LARGE, 503, "503"),
]
LASTING += [
    (LARGE, "hang", "timed out"),
    (LARGE, "html", "Consistency check"),
    (LARGE, "short", "Consistency check"),
]


@pytest.mark.parametrize("where, fault, said", LASTING)
def test_what_lasts_is_one_line_and_a_rerun_goes_on(hub, where, fault, said):
    hub.faults[where] = [fault] * 1000
    refused(lambda: load("some/one"), "some/one: ", said, "check the network, or give a folder")
    assert 0 < 1000 - len(hub.faults[where]) <= 200
    hub.faults.clear()
    assert load("some/one")[0].config.model_type == "qwen3"


def test_how_often_it_is_tried_and_how_long_it_waits(hub, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for fault, expected in ((503, list(WAITS)), (403, []), ("html", []), ("hang", [])):
        hub.faults[INFO], waits[:] = [fault] * 10, []
        refused(lambda: load("some/one"), "some/one")
        assert waits == expected and len(hub.faults[INFO]) == 10 - 1 - len(expected)


def test_what_was_fetched_is_not_fetched_again(hub):
    hub.cut[SHARD] = [50] * 30
    refused(lambda: load("some/one"), "some/one")
    before = len(hub.requests)
    hub.cut.clear()
    load("some/one")
    again = [
        r["path"]
        for r in hub.requests[before:]
        if r["method"] == "GET" and "/api/" not in r["path"]
    ]
    assert [path for path in again if "/cdn/" not in path] in (
        [],
        [f"/some/one/resolve/main/{SHARD}"],
    )
    assert sum("/cdn/" in path for path in again) == 1


def test_half_a_file_that_the_hub_calls_whole_is_named_and_can_be_deleted(hub, files, tmp_path):
    whole = files[SHARD]
    hub.repos[REPO] = {"main": files | {SHARD: whole[: len(whole) // 2]}}
    line = "truncated or corrupt safetensors file"
    refused(lambda: load("some/one"), SHARD, line)
    blob = next(p for p in (tmp_path / "cache").rglob(SHARD) if p.is_symlink()).resolve()
    refused(lambda: load("some/one"), line, f"delete {blob} and download it again")
    blob.write_bytes(whole[:1000])  # of the right name, but not whole
    refused(lambda: load("some/one"), f"delete {blob} and download it again")
    blob.unlink()
    hub.repos[REPO] = {"main": files}
    assert load("some/one")[0].config.model_type == "qwen3"


@pytest.mark.parametrize(
    "fault, said", [(503, "answers 503"), ("hang", "out of reach"), ("html", "JSONDecodeError")]
)
def test_rows_too(fault, said, hub):
    hub.repos["dataset", "stanfordnlp/sst2"] = {"refs/convert/parquet": {}}
    hub.faults["/api/datasets/"] = [fault] * 1000
    refused(lambda: load_examples(find_task("sst2"), "train"), "stanfordnlp/sst2", "--data-dir")
    assert len(hub.faults["/api/datasets/"]) == 1000 - (3 if fault == 503 else 1)


def test_no_token_is_printed_or_saved(files, monkeypatch, tmp_path, capfd):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"line {i},{'xy'[i % 2]}\n" for i in range(6)))
    command = [
        "fit",
        str(rows),
        "--model",
        "some/one",
        "--methods",
        "sft",
        "--rates",
        "1e-2",
        "--epochs",
        "1",
    ]
    command += ["--folds", "2", "--out", str(tmp_path / "out")]
    said = []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serve({REPO: {"main": files}}, gated=("some/one",)) as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        for token, fault, code in (
            (f"{TOKEN}_not", None, 2),
            (TOKEN, 500, 2),
            (f"{TOKEN}é", None, 2),
            (TOKEN, None, 0),
        ):
            monkeypatch.setenv("HF_TOKEN", token)
            hub.faults[FILE] = [fault] * 1000 * bool(fault)
            said.append(CliRunner().invoke(main, command))
            assert said[-1].exit_code == code, said[-1].output
    sent = [request["token"] for request in hub.requests]
    assert f"Bearer {TOKEN}" in sent and not any(
        r["token"] for r in hub.requests if r["path"].startswith("/cdn/")
    )
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "ia2mini.json" for path in saved)
    assert not any(TOKEN.encode() in path.read_bytes() for path in saved)
    assert not any(
        TOKEN in text for text in (*capfd.readouterr(), *(result.output for result in said))
    )


def test_an_error_that_quotes_the_token_is_told_without_it():
    def fail():
        with hub_errors("some/one", "model", None, "give a folder"):
            raise RuntimeError(f"Illegal header value b'Bearer {TOKEN}\\n'")

    refused(fail, "some/one", "Illegal header value b'Bearer …'")
