"""Checkpoints from a hub look-alike: only what is needed, any revision, the cache, and every way it can fail."""

import pytest
import torch
from hub import TOKEN, connect, serve
from ia2mini.models import load
from mistakes import refused
from reference import assert_equal, make_checkpoint, our_pass, random_ids

SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    *SHARDS,
}
NOT_NEEDED = (
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/model.safetensors",
)


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory):
    """(folder, the files a repository on the hub holds) of a tiny sharded checkpoint."""
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "model", "qwen3", shard="100KB")
    return folder, {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_hub_id_fetches_only_what_is_needed(hub_model, monkeypatch, tmp_path):
    folder, files = hub_model
    with serve({("model", "some/one"): {"main": files | dict.fromkeys(NOT_NEEDED, b"x")}}) as hub:
        connect(monkeypatch, hub, tmp_path)
        model, tokenizer = load("some/one")
    ids = torch.tensor([tokenizer.encode("Label:")])
    assert_equal(our_pass(model, ids), our_pass(load(folder)[0], ids), 0.0)
    asked = {
        request["path"].split("/resolve/")[1].split("/", 1)[1]
        for request in hub.requests
        if "/resolve/" in request["path"]
    }
    assert asked == NEEDED


def test_a_revision_is_taken_as_asked(hub_model, monkeypatch, tmp_path):
    folder, files = hub_model
    other = make_checkpoint(tmp_path / "other", "qwen3", shard="100KB", seed=1)
    branches = {"main": files, "v2": files | {name: (other / name).read_bytes() for name in SHARDS}}
    ids = random_ids(1, 6)
    with serve({("model", "some/one"): branches}) as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        for revision, same in (
            (None, folder),
            ("v2", other),
            (hub.commit("model", "some/one", "v2"), other),
        ):
            assert_equal(
                our_pass(load("some/one", revision=revision)[0], ids),
                our_pass(load(same)[0], ids),
                0.0,
            )
        refused(lambda: load("some/one", revision="v3"), "some/one", "no revision v3")


def test_the_cache_serves_without_a_network(hub_model, monkeypatch, tmp_path):
    with serve({("model", "some/one"): {"main": hub_model[1]}}) as hub:
        connect(monkeypatch, hub, tmp_path)
        model = load("some/one")[0]
        count = len(hub.requests)
        connect(monkeypatch, hub, tmp_path, offline=True)
        again = load("some/one")[0]
        assert len(hub.requests) == count
        refused(lambda: load("some/other"), "some/other", "not in the local cache")
    connect(monkeypatch, hub, tmp_path)  # online, and nobody answers
    ids = random_ids(1, 6)
    for other in (again, load("some/one")[0]):
        assert_equal(our_pass(other, ids), our_pass(model, ids), 0.0)
    refused(lambda: load("some/other"), "some/other", "check the network")


def test_a_gated_repository_says_what_to_do(hub_model, monkeypatch, tmp_path):
    with serve(
        {("model", "meta-llama/Llama-3.2-1B"): {"main": hub_model[1]}},
        gated=("meta-llama/Llama-3.2-1B",),
    ) as hub:
        connect(monkeypatch, hub, tmp_path)
        page = "https://huggingface.co/meta-llama/Llama-3.2-1B"
        refused(lambda: load("llama-3.2-1b"), "meta-llama/Llama-3.2-1B is gated", page, "HF_TOKEN")
        monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
        refused(lambda: load("llama-3.2-1b"), "is gated")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert load("llama-3.2-1b")[1].eos_ids == (257,)


def test_hub_ids_that_lead_nowhere(hub_model, monkeypatch, tmp_path):
    with serve({}) as hub:
        connect(monkeypatch, hub, tmp_path)
        refused(lambda: load("some/none"), "some/none", "no such model")
        refused(lambda: load("some/no ne"), "some/no ne")
