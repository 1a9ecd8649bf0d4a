"""Checkpoints: where they are found, what is refused and how it is said, loading memory, saving."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from ia2mini.models import checkpoint as module
from ia2mini.models import load
from ia2mini.models.checkpoint import SHORT_NAMES, locate, save
from mistakes import refused
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

from ia2mini.cli.main import main

families = pytest.mark.parametrize("family", ["llama", "qwen3"])


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
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"attention_bias": False}))
    refused(lambda: load(folder), "unknown", ".bias", "and 11 more")


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_absent_or_repeated(tmp_path, tied):
    folder = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=tied)
    ids = random_ids(1, 8)
    before = our_pass(load(folder)[0], ids)
    if not tied:
        rewrite(folder, lambda t: t.pop("lm_head.weight"))
        return refused(lambda: load(folder), "missing tensor lm_head.weight")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(folder, lambda t: t.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(4)}))
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


WRONG_MAPS = [None, [], [1], "model.safetensors", 1e308, {}, {"a": ["model.safetensors"]}]
WRONG_NAMES = [
    "../away.safetensors",
    "/away.safetensors",
    "deeper/model.safetensors",
    "deeper\\m",
    "",
    "a\nb",
    "9" * 300,
    1.5,
    None,
]


@pytest.mark.parametrize("value", [*WRONG_MAPS, *({"a": name} for name in WRONG_NAMES)], ids=str)
def test_a_weight_map_that_is_none_or_leaves_the_folder(tmp_path, value):
    folder = make_checkpoint(tmp_path / "model", "llama", shard="20KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "away.safetensors")  # a file that must not be read from there
    index = folder / "model.safetensors.index.json"
    if isinstance(value, dict) and value:
        value = json.loads(index.read_text())["weight_map"] | value
    index.write_text(json.dumps({"weight_map": value}))
    refused(lambda: load(folder), "weight_map" if value in WRONG_MAPS else str(folder))


@pytest.mark.parametrize(
    "name", ["../away.safetensors", "/away.safetensors", "deeper/model.safetensors"]
)
def test_a_shard_elsewhere_is_not_read(tmp_path, name):
    folder = make_checkpoint(tmp_path / "model", "llama")
    (folder / "deeper").mkdir()
    for place in (tmp_path / "away.safetensors", folder / "deeper" / "model.safetensors"):
        place.write_bytes((folder / "model.safetensors").read_bytes())
    name = str(tmp_path) + name if name.startswith("/") else name
    weights = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    refused(lambda: load(folder), "model.safetensors.index.json", "names files elsewhere")


def test_loaded_weights_are_frozen_and_in_the_type_asked_for(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(folder, dtype=dtype)
        assert not model.training and tokenizer.eos_ids == (257,)
        for name, p in model.named_parameters():
            assert (
                p.dtype == dtype and not p.requires_grad and torch.equal(p, stored[name].to(dtype))
            ), name


MEASURE = """
import sys, torch
from pathlib import Path
from ia2mini.models import load
torch.set_num_threads(1)
load(sys.argv[1])  # imports are not the weights' memory
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
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
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    sizes |= {"vocab_size": 8192, "tie_word_embeddings": True, "num_hidden_layers": 4}  # 200 MB
    small, large = make_checkpoint(tmp_path / "small", "qwen3"), tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(raw_config("qwen3", **sizes)))
    (large / "tokenizer.json").write_text((small / "tokenizer.json").read_text())
    with torch.device("meta"):
        config, family = module.read_folder_config(large)
        shapes = {name: p.shape for name, p in family(config).named_parameters()}
    save_file(
        {name: torch.ones(shape, dtype=stored) for name, shape in shapes.items()},
        large / "model.safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large], capture_output=True, text=True, check=True
    )
    assert 0.95 < float(done.stdout) < 1.3


def test_short_names_are_hub_ids(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda hub_id, revision, **how: asked.append((hub_id, revision)) or ".",
    )
    for name in (
        "qwen3-4b-base",
        "Llama-3.2-1B",
        "llama-3.2-3b",
        "llama-3.2-1b-instruct",
        "someone/else",
    ):
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
    "qwne3-4b": "'qwen3-4b'",
    "Llama-3.2-1b-instrct": "'llama-3.2-1b-instruct'",
    "smollm2-135m-instrct": "'smollm2-135m-instruct'",
    "qwen2.5-0.5b-instuct": "'qwen2.5-0.5b-instruct'",
    "mistrl-7b-v0.3": "'mistral-7b-v0.3'",
}
FAR = (
    "zzzz",
    "gpt2",
    "qwen2-4b",
    "qwen3-5b",
    "llama-3.3-70b",
    "mixtral-8x7b",
    "llama-2-7b",
    "gemma-3-4b",
)
FAR += ("phi-3-mini", "tiny-random", "", "x" * 5000)
NEAR |= dict.fromkeys(FAR, "families: llama, qwen3, qwen2")
NEAR |= dict.fromkeys(
    ["./none/there", "/none/there", "../none/there", "none/there/at-all"], "not a folder"
)


@pytest.mark.parametrize("name, hint", NEAR.items())
def test_an_unknown_name_gets_the_nearest(name, hint):
    refused(lambda: load(name), repr(name)[:200], hint)


@families
def test_transformers_loads_what_save_writes(family, tmp_path):
    extra = (
        {"rope_scaling": LLAMA3_SCALING, "mlp_bias": True}
        if family == "llama"
        else {"tie_word_embeddings": True, "head_dim": 16}
    )
    folder = make_checkpoint(
        tmp_path / "first",
        family,
        rope_theta=123.0,
        attention_bias=True,
        rms_norm_eps=0.01,
        **extra,
    )
    ids = random_ids(2, 40)
    model, tokenizer = load(folder)
    save(
        model,
        tmp_path / "second",
        (folder / "tokenizer.json").read_text(),
        eos_token_id=list(tokenizer.eos_ids),
    )
    assert_equal(our_pass(model, ids), upstream_pass(upstream(tmp_path / "second"), ids), 1e-5)
    again, second_tokenizer = load(tmp_path / "second")
    assert again.config == model.config and second_tokenizer.eos_ids == tokenizer.eos_ids
    assert second_tokenizer.encode("a b") == tokenizer.encode("a b")
    for (name, a), (other, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)


def test_bfloat16_is_saved_as_such(tmp_path):
    model, _ = load(make_checkpoint(tmp_path / "first", "llama"), dtype=torch.bfloat16)
    save(model, tmp_path / "second")
    assert (
        json.loads((tmp_path / "second" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    )
    assert {t.dtype for t in load_file(tmp_path / "second" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert not (tmp_path / "second" / "tokenizer.json").exists()


@families
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_named(tmp_path, family, bad, stored):
    folder, name = (
        make_checkpoint(tmp_path, family, dtype=stored),
        "model.layers.1.mlp.up_proj.weight",
    )
    rewrite(folder, lambda t: t[name].view(-1)[-1:].fill_(bad))
    for dtype in (torch.float32, torch.bfloat16):
        refused(
            lambda dtype=dtype: load(folder, dtype),
            "model.safetensors",
            f"{name} holds NaN or infinity",
            "--no-check",
        )
    model, _ = load(folder, check=False)
    assert model.model.layers[1].mlp.up_proj.weight.isfinite().sum() == 48 * 32 - 1
    prompt = ["generate", "--model", str(folder), "--prompt", "a", "--max-tokens", "1"]
    asked = CliRunner().invoke(main, prompt)
    assert (
        asked.exit_code == 2
        and asked.stderr.count("\n") == 1
        and f"{name} holds NaN" in asked.stderr
    )
    assert CliRunner().invoke(main, [*prompt, "--no-check"]).exit_code == 0


def test_large_finite_weights_are_fine_and_one_too_large_for_the_type_is_not(tmp_path):
    folder, name = make_checkpoint(tmp_path, "llama"), "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t[name].fill_(3e38))  # their sum is infinite
    assert load(folder)[0].model.layers[0].mlp.up_proj.weight.min() == torch.tensor(3e38)
    refused(lambda: load(folder, torch.float16), name, "another --dtype")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_weights_of_another_kind_are_refused(tmp_path, dtype):
    folder, name = make_checkpoint(tmp_path, "llama"), "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].to(dtype)}))
    refused(lambda: load(folder), name, "F32, BF16, F16, F64 can be read")


def test_links_that_leave_the_folder_are_not_followed_but_those_of_the_hubs_cache(tmp_path):
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "1",
        tmp_path / "models--a--b" / "blobs",
    )
    folder = make_checkpoint(snapshot, "llama")
    file = folder / "model.safetensors"
    blobs.mkdir()
    for place, fine in ((tmp_path / "elsewhere.safetensors", False), (blobs / ("a" * 64), True)):
        file.resolve().rename(place)
        file.unlink(missing_ok=True)
        file.symlink_to(place)
        if fine:
            load(folder)
        else:
            refused(lambda: load(folder), "model.safetensors: a link out of its folder")
    (tmp_path / "name").symlink_to(folder)  # a folder may be a link itself
    load(tmp_path / "name")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"]
)
def test_a_pipe_or_folder_for_a_file_is_no_hang(tmp_path, name):
    folder = make_checkpoint(tmp_path, "llama")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(lambda: load(folder), str(folder))
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(lambda: load(folder), str(folder))


def test_a_dtype_is_torchs_not_its_name():
    refused(lambda: load("tiny", "bfloat16"), "dtype 'bfloat16': give", "torch.bfloat16")
