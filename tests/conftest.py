"""Fixtures every test file shares."""

import json
import os
import shutil
import signal
from functools import cache, wraps
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from ia2mini.models.checkpoint import load
from reference import EOS, make_checkpoint, upstream

from ia2mini.tasks import world

# of a job in the background; tests send it to their children
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("busy", deadline=None)  # no test may fail because the machine is busy
settings.load_profile("busy")
torch.set_num_threads(1)  # models here are tiny: threads would only wait for each other

drawn = cache(world.rows)


@wraps(world.rows)
def rows_drawn_once(name: str, role: str) -> list[dict]:
    return [dict(row) for row in drawn(name, role)]


world.rows = rows_drawn_once  # thousands of sentences, in every other test


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


@pytest.fixture(scope="session", params=["IA2MINI_REAL", "IA2MINI_REAL2"])
def real(request) -> Path:
    """Folder of a real checkpoint: the one that `make test-real` makes (tests/real.py), and a second one."""
    folder = os.environ.get(request.param)
    if not folder:
        made = "; `make test-real` makes one" if request.param == "IA2MINI_REAL" else ""
        pytest.skip(f"${request.param} does not name the folder of a real checkpoint{made}")
    return Path(folder)


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder of checkpoints and row files, good and bad."""
    torch.set_num_threads(1)
    g = tmp_path_factory.mktemp("ground")
    net = upstream(make_checkpoint(g / "model", "qwen3", num_hidden_layers=2))
    net.lm_head.weight.data[EOS] *= 3  # generations end soon
    net.save_pretrained(g / "new")
    (g / "new/model.safetensors").replace(g / "model/model.safetensors")
    words = ["grand", "dull", "sweet", "stale"]
    rows = [(f"a {words[i % 4]} tale, number {i}", "xy"[i % 2]) for i in range(40)]
    (g / "mine.csv").write_text(
        "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)
    )
    (g / "mine.jsonl").write_text(
        "".join(
            json.dumps({"body": text, "kind": ["good", "so so"]["xy".index(y)]}) + "\n"
            for text, y in rows
        )
    )
    lines = [
        json.dumps({"text": f"tale {i}", "label": f"{'very ' * (i % 3)}good, {i}"}) + "\n"
        for i in range(30)
    ]
    (g / "free.jsonl").write_text("".join(lines))
    (g / "other.csv").write_text("text,label\na new tale,z\n")
    (g / "empty.csv").write_text("")
    (g / "header.csv").write_text("text,label\n")
    (g / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label"\n')
    (g / "hub/sst2").mkdir(parents=True)
    lines = [
        json.dumps({"sentence": f"line {i}", "label": 7 if i == 2 else i % 2}) + "\n"
        for i in range(30)
    ]
    (g / "hub/sst2/train.jsonl").write_text("".join(lines))
    for name in ("cut", "garbage", "unsaid", "shape"):
        shutil.copytree(g / "model", g / name)
    weights = (g / "model/model.safetensors").read_bytes()
    (g / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (g / "garbage/model.safetensors").write_bytes(b"\xff" * 400)
    config = json.loads((g / "model/config.json").read_text())
    (g / "unsaid/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "num_attention_heads"})
    )
    (g / "shape/config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    return g
