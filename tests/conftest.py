"""Fixtures every test file shares."""

import os
import signal
from pathlib import Path

import pytest
import torch
from ia2mini.models.checkpoint import load
from reference import make_checkpoint

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background; tests send it to their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # models here are tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows, tokenizers and a small checkpoint; `$IA2MINI_DATA` or ../shared/data beside the clone."""
    folder = Path(os.environ.get("IA2MINI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set IA2MINI_DATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Qwen3 of two layers."""
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)[0]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request, tmp_path_factory):
    """(folder, our model): Llama with biases, Qwen3 tied and with a head size of its own."""
    changes = {"head_dim": 12, "tie_word_embeddings": True}
    if request.param == "llama":
        changes = {"attention_bias": True, "mlp_bias": True}
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **changes)
    return folder, load(folder)[0]


@pytest.fixture(scope="session")
def real() -> Path:
    """Folder of a real checkpoint of 135 million weights, which `make test-real` makes (tests/real.py)."""
    if not (folder := os.environ.get("IA2MINI_REAL")):
        pytest.skip("$IA2MINI_REAL does not name the folder of a real checkpoint; `make test-real` makes one")
    return Path(folder)
