"""Checkpoints: where they are found, what is refused and how it is said, loading memory, saving."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import TOKEN, connect, serve
from ia2mini.models import UsageError, load
from ia2mini.models import checkpoint as module
from ia2mini.models.checkpoint import SHORT_NAMES, locate, save, write
from reference import (
    LLAMA3_SCALING,
    assert_equal,
    make_checkpoint,
    our_pass,
    random_ids,
    raw_config,
    upstream,
    upstream_pass,
)
from safetensors.torch import load_file, save_file

families = pytest.mark.parametrize("family", ["llama", "qwen3"])


def refused(call, *mentioned: str) -> None:
    """`call` raises a UsageError of one line that mentions every string."""
    with pytest.raises(UsageError) as error:
        call()
    assert "\n" not in str(error.value)
    for text in mentioned:
        assert text in str(error.value), f"{text!r} not in {str(error.value)!r}"


def change_config(folder: Path, absent: tuple = (), **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in absent}))


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSALS = {
    "other rope scaling": ({"rope_scaling": YARN}, "rope_scaling", "yarn"),
    "other rope scaling, old key": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", "linear"),
    "other rope scaling, transformers 5": ({"rope_parameters": {**YARN, "rope_theta": 1e4}}, "rope_scaling", "yarn"),
    "rope by layer type": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_scaling"),
    "incomplete llama3 scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling",
        "low_freq_factor",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 8}, "sliding"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config", "gptq"),
    "other model_type": ({"model_type": "mistral"}, "model_type", "mistral", "llama, qwen3"),
    "no model_type": ({"absent": ("model_type",)}, "model_type"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
    "no hidden_size": ({"absent": ("hidden_size",)}, "missing: hidden_size"),
    "two fields missing": ({"absent": ("vocab_size", "num_hidden_layers")}, "missing: vocab_size, num_hidden_layers"),
    "null field": ({"intermediate_size": None}, "missing: intermediate_size"),
}


@families
@pytest.mark.parametrize("case", REFUSALS)
def test_configs_refused_by_name(case, family, tmp_path):
    changes, *mentioned = REFUSALS[case]
    (tmp_path / "config.json").write_text(json.dumps(raw_config(family)))
    change_config(tmp_path, **changes)
    refused(lambda: load(tmp_path), "config.json", *mentioned)


@families
def test_fields_that_change_nothing_are_accepted(family, tmp_path):
    folder = make_checkpoint(tmp_path, family)
    ids = random_ids(1, 8)
    before = our_pass(load(folder)[0], ids)
    change_config(
        folder, use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 3, max_window_layers=3
    )
    change_config(
        folder, rope_scaling={"rope_type": "default"}, attention_dropout=0.0, use_cache=True, pretraining_tp=1
    )
    assert_equal(our_pass(load(folder)[0], ids), before, 0.0)


@pytest.mark.parametrize(
    "text, mentioned", [("{", "not valid JSON"), ("[]", "config.json"), ('"llama"', "config.json")]
)
def test_a_broken_config_is_named(tmp_path, text, mentioned):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: load(tmp_path), "config.json", mentioned)


def rewrite(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    for problem, edit in {
        "missing": lambda t: t.pop(name),
        "unknown": lambda t: t.update({"model.layers.1.self_attn.q_proj.scale": torch.ones(1)}),
        "shape": lambda t: t.update({name: t[name][:-1].clone()}),
    }.items():
        folder = make_checkpoint(tmp_path / problem, "qwen3")
        rewrite(folder, edit)
        refused(lambda folder=folder: load(folder), problem, "model.layers.1.self_attn.q_proj")
    refused(lambda: load(folder), "[31, 32]", "[32, 32]")


def test_biases_in_the_file_but_not_in_the_config(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", attention_bias=True)
    change_config(folder, attention_bias=False)
    refused(lambda: load(folder), "unknown", ".bias", "and 11 more")


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_absent_or_repeated(tmp_path, tied):
    folder = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=tied)
    ids = random_ids(1, 8)
    before = our_pass(load(folder)[0], ids)
    if not tied:
        rewrite(folder, lambda t: t.pop("lm_head.weight"))
        return refused(lambda: load(folder), "missing tensor lm_head.weight")
    repeated = {"lm_head.weight": torch.ones(288, 32), "model.layers.0.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(folder, lambda t: t.update(repeated))
    model = load(folder)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equal(our_pass(model, ids), before, 0.0)


BROKEN = {
    "truncated": lambda data: data[:-10],
    "header cut": lambda data: data[:20],
    "empty": lambda data: b"",
    "noise": lambda data: bytes(range(255, -1, -1)) * 9,
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_damaged_file_is_named(tmp_path, damage, shard):
    folder = make_checkpoint(tmp_path, "llama", shard=shard)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(BROKEN[damage](file.read_bytes()))
    refused(lambda: load(folder), file.name, "truncated or corrupt")


def test_missing_files_are_named(tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", "llama", shard="20KB")
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.rename(tmp_path / "away")
    refused(lambda: load(folder), shard.name, "no such file")
    index.write_text('{"metadata": {}}')
    refused(lambda: load(folder), index.name, "weight_map")
    index.unlink()
    refused(lambda: load(folder), "model.safetensors", "no such file")
    (folder / "config.json").unlink()
    refused(lambda: load(folder), str(folder), "config.json")


def test_loaded_weights_are_frozen_and_in_the_type_asked_for(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(folder, dtype=dtype)
        assert not model.training and tokenizer.eos_ids == (257,)
        for name, p in model.named_parameters():
            assert p.dtype == dtype and not p.requires_grad and torch.equal(p, stored[name].to(dtype)), name


MEASURE = """
import sys, torch
from pathlib import Path
from ia2mini.models import load
torch.set_num_threads(1)
load(sys.argv[1])  # imports are not the weights' memory
def status(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
model, _ = load(sys.argv[2])
for p in model.parameters():
    p.view(-1)[::512].sum()  # one element of every page
print((status("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_peak_memory_of_loading_is_near_the_weights(tmp_path, stored):
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    sizes |= {"vocab_size": 8192, "tie_word_embeddings": True, "num_hidden_layers": 4}  # 200 MB
    small, large = make_checkpoint(tmp_path / "small", "qwen3"), tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(raw_config("qwen3", **sizes)))
    (large / "tokenizer.json").write_text((small / "tokenizer.json").read_text())
    with torch.device("meta"):
        config, family = module.read_folder_config(large)
        shapes = {name: p.shape for name, p in family(config).named_parameters()}
    save_file({name: torch.ones(shape, dtype=stored) for name, shape in shapes.items()}, large / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", MEASURE, small, large], capture_output=True, text=True, check=True)
    assert 0.95 < float(done.stdout) < 1.3


def test_short_names_are_hub_ids(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "download", lambda hub_id, revision: asked.append((hub_id, revision)))
    for name in ("qwen3-4b-base", "Llama-3.2-1B", "llama-3.2-3b", "llama-3.2-1b-instruct", "someone/else"):
        locate(name, "r1")
    ids = [
        "Qwen/Qwen3-4B-Base",
        "meta-llama/Llama-3.2-1B",
        "meta-llama/Llama-3.2-3B",
        "meta-llama/Llama-3.2-1B-Instruct",
        "someone/else",
    ]
    assert asked == [(i, "r1") for i in ids]
    assert {"qwen3-0.6b", "qwen3-1.7b-base", "llama-3.2-3b-instruct"} <= set(SHORT_NAMES)


NEAR = {
    "qwen3-4b-bse": "'qwen3-4b-base'",
    "llama3.2-1b": "'llama-3.2-1b'",
    "tinny": "'tiny'",
    "zzzz": "short names: tiny",
}
NEAR |= dict.fromkeys(["./none/there", "/none/there", "../none", "none/there/at-all"], "not a folder")


@pytest.mark.parametrize("name, hint", NEAR.items())
def test_an_unknown_name_gets_the_nearest(name, hint):
    refused(lambda: load(name), repr(name), hint)


@families
def test_transformers_loads_what_save_writes(family, tmp_path):
    extra = (
        {"rope_scaling": LLAMA3_SCALING, "mlp_bias": True}
        if family == "llama"
        else {"tie_word_embeddings": True, "head_dim": 16}
    )
    folder = make_checkpoint(
        tmp_path / "first", family, rope_theta=123.0, attention_bias=True, rms_norm_eps=0.01, **extra
    )
    ids = random_ids(2, 40)
    model, tokenizer = load(folder)
    save(model, tmp_path / "second", (folder / "tokenizer.json").read_text(), eos_token_id=list(tokenizer.eos_ids))
    assert_equal(our_pass(model, ids), upstream_pass(upstream(tmp_path / "second"), ids), 1e-5)
    again, second_tokenizer = load(tmp_path / "second")
    assert again.config == model.config and second_tokenizer.eos_ids == tokenizer.eos_ids
    assert second_tokenizer.encode("a b") == tokenizer.encode("a b")
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_bfloat16_is_saved_as_such(tmp_path):
    model, _ = load(make_checkpoint(tmp_path / "first", "llama"), dtype=torch.bfloat16)
    save(model, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "second" / "model.safetensors").values()} == {torch.bfloat16}
    assert not (tmp_path / "second" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "error, raised", [(OSError(28, "No space left on device"), UsageError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failed_write_leaves_what_was_there(tmp_path, error, raised):
    path = tmp_path / "deep" / "config.json"
    write(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(raised):
        write(path, half)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["config.json"]
    assert path.stat().st_mode & 0o777 == 0o644
    refused(lambda: write(path / "below", half), str(path), "cannot write there")


FULL = """
import resource, signal, sys
from pathlib import Path
from ia2mini.models import UsageError, load
from ia2mini.models.checkpoint import save
model, _ = load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # stands for a full disk
try:
    save(model, Path(sys.argv[2]))
except UsageError as error:
    print(error)
"""


def test_saving_to_a_full_disk_leaves_nothing(tmp_path):
    folder = make_checkpoint(tmp_path / "first", "llama")
    done = subprocess.run(
        [sys.executable, "-c", FULL, folder, tmp_path / "second"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1 and "model.safetensors: cannot be written" in done.stdout
    assert os.listdir(tmp_path / "second") == []


SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}
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
        for revision, same in ((None, folder), ("v2", other), (hub.commit("model", "some/one", "v2"), other)):
            assert_equal(our_pass(load("some/one", revision=revision)[0], ids), our_pass(load(same)[0], ids), 0.0)
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
        {("model", "meta-llama/Llama-3.2-1B"): {"main": hub_model[1]}}, gated=("meta-llama/Llama-3.2-1B",)
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


def test_a_download_that_breaks_off(hub_model, monkeypatch, tmp_path):
    with serve({("model", "some/one"): {"main": hub_model[1]}}) as hub:
        connect(monkeypatch, hub, tmp_path)
        hub.cut["model-00002-of-00002.safetensors"] = [50] * 30
        refused(lambda: load("some/one"), "some/one", "check the network")
        hub.cut.clear()
        assert load("some/one")[0].config.model_type == "qwen3"
