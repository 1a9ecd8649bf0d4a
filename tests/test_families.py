"""What a family's config.json may leave out, and what is written of a merged one: as transformers has it."""

import json
import math
import re
from dataclasses import fields

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from ia2mini.models import load
from ia2mini.models.checkpoint import SHORT_NAMES, locate, save
from ia2mini.models.config import FAMILIES, read_folder_config
from reference import (
    CLASSES,
    EOS,
    assert_equal,
    make_checkpoint,
    our_pass,
    random_ids,
    raw_config,
    relative,
    upstream,
    upstream_pass,
)

from bench import shapes as bench_shapes
from ia2mini import UsageError
from ia2mini.adapters import EVERY_MATRIX, IA3, LoRA, adapted
from ia2mini.cli.main import main
from ia2mini.cli.models import KNOWN, ROWS, RUNS, TOKENS, config_of, count_weights, fit_bytes
from ia2mini.engine.peft import read_adapter, save_adapter
from ia2mini.generate import Decoding, generate
from ia2mini.scale.memory import run_bytes

SHARED = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
OF_SOME = (
    "attention_bias",
    "attention_out_bias",
    "attention_multiplier",
    "embedding_multiplier",
    "head_dim",
    "logits_scaling",
    "mlp_bias",
    "residual_multiplier",
)
NEEDED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@pytest.mark.parametrize("family", CLASSES)
def test_what_a_config_leaves_out_is_transformers_default(family, tmp_path):
    whole = raw_config(family, num_attention_heads=32, hidden_size=256, num_hidden_layers=8)
    short = {name: whole[name] for name in NEEDED}
    if family == "mistral":
        short["sliding_window"] = None  # without it prompts of more than 4,096 tokens differ
    (tmp_path / "config.json").write_text(json.dumps(short))
    ours, _ = read_folder_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for name in SHARED:
        wanted = getattr(theirs, name)
        if name == "num_key_value_heads" and wanted is None:
            wanted = theirs.num_attention_heads
        assert getattr(ours, name) == wanted, name
    for name in OF_SOME:
        wanted = getattr(theirs, name, None)
        if wanted is not None and hasattr(ours, name):
            mine = getattr(ours, name)
            if name == "attention_multiplier" and mine is None:
                continue
            assert mine == wanted, name
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    if family == "smollm3":
        assert list(ours.no_rope_layers) == theirs.no_rope_layers


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_saved_is_read_by_transformers_as_the_same_model(family, tmp_path):
    changes = {"attention_bias": True} if family == "seed_oss" else {}
    if family == "granite":
        changes = {"residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0}
    if family == "mistral":
        changes = {"sliding_window": None}
    folder = make_checkpoint(tmp_path / "made", family, **changes)
    model, tokenizer = load(folder)
    save(model, tmp_path / "saved", tokenizer.backend.to_str())
    raw = json.loads((tmp_path / "saved/config.json").read_text())
    assert hasattr(transformers, raw["architectures"][0])
    ids = random_ids(2, 20)
    mine = our_pass(model, ids)
    assert_equal(mine, upstream_pass(upstream(tmp_path / "saved"), ids), 5e-5)
    again = our_pass(load(tmp_path / "saved")[0], ids)
    assert torch.equal(again[0], mine[0]) and torch.equal(again[1], mine[1])


# as published on the hub
OF_TYPE_LLAMA = {
    "TinyLlama-1.1B-Chat-v1.0": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 32000,
    },
    "Falcon3-1B-Base": {
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000042,
        "vocab_size": 131072,
    },
    "Yi-6B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 5000000.0,
        "vocab_size": 64000,
    },
}
SMALLER = 16  # by which widths are divided


@pytest.mark.parametrize("name", OF_TYPE_LLAMA)
def test_others_of_type_llama_by_their_published_configs(name, tmp_path):
    published = OF_TYPE_LLAMA[name]
    changes = {**published, "num_hidden_layers": 2, "vocab_size": 288}
    for width in ("hidden_size", "intermediate_size", "head_dim"):
        if width in published:
            changes[width] = published[width] // SMALLER
    absent = ("head_dim", "attention_bias", "tie_word_embeddings")
    absent = tuple(field for field in absent if field not in published)
    folder = make_checkpoint(tmp_path, "llama", absent=absent, **changes)
    ids = random_ids(2, 60)
    model = load(folder)[0]
    assert_equal(our_pass(model, ids), upstream_pass(upstream(folder), ids), 1e-4)


def with_weights(adapter, model) -> torch.Tensor:
    """Weights [M] of an adapter that changes what the model answers."""
    theta = adapter.init(torch.Generator().manual_seed(1))
    return theta + 0.1 * torch.randn(theta.shape)


@pytest.mark.parametrize("kind", [LoRA, IA3])
@pytest.mark.parametrize("family", CLASSES)
def test_adapters_go_out_to_peft_and_come_in_again(family, kind, tmp_path):
    changes = {"sliding_window": None} if family == "mistral" else {}
    folder = make_checkpoint(tmp_path / "made", family, **changes)
    model = load(folder)[0]
    adapter = kind(model, EVERY_MATRIX)
    theta = with_weights(adapter, model)
    ids = random_ids(2, 11)
    with torch.no_grad(), adapted(model, adapter, theta[None]) as student:
        ours = student(ids)
    save_adapter(adapter, theta, tmp_path / "ours", str(folder))
    theirs = peft.PeftModel.from_pretrained(upstream(folder), tmp_path / "ours")
    with torch.no_grad():
        assert relative(ours, theirs(ids).logits) <= 1e-5 < relative(ours, model(ids))
    theirs.save_pretrained(tmp_path / "theirs")
    again, weights = read_adapter(tmp_path / "theirs", model)
    with torch.no_grad(), adapted(model, again, weights) as student:
        assert relative(student(ids), ours) <= 1e-5


@pytest.mark.parametrize("family", CLASSES)
def test_greedy_decoding_is_transformers(family, tmp_path):
    changes = {"sliding_window": None} if family == "mistral" else {}
    folder = make_checkpoint(tmp_path, family, **changes)
    model, tokenizer = load(folder)
    prompts = random_ids(3, 9)
    net = upstream(folder)
    net.generation_config.pad_token_id = 0
    wanted = net.generate(prompts, max_new_tokens=12, do_sample=False)[:, 9:].tolist()
    found = generate(model, tokenizer, prompts.tolist(), Decoding(12, stop=None))
    ends = [row.index(EOS) if EOS in row else len(row) for row in wanted]
    assert found == [row[:end] for row, end in zip(wanted, ends)]


def test_a_study_runs_on_a_family_that_the_paper_has_not(tmp_path):
    folder = make_checkpoint(tmp_path / "model", "qwen2", absent=("attention_bias", "head_dim"))
    rows = "".join(f"text {i},{'xy'[i % 2]}\n" for i in range(16))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    options = "--n 2 --sets 1 --epochs 1 --methods base,ia2+sft --rates 1e-3 --figures=".split()
    told = ["run", "--data", str(tmp_path / "rows.csv"), "--model", str(folder), *options]
    result = CliRunner().invoke(main, [*told, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_models_are_listed_with_what_they_need():
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for name, hub_id in SHORT_NAMES.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(hub_id) and line.split()[1] in FAMILIES
        # weights, then what `fit` needs
        weights, needed = (float(amount) for amount in re.findall(r"([\d.]+) GB", line))
        assert 0.2 < weights < needed < 6 * weights
        # the name says about how many weights there are: OLMo 2 1B has half as many again
        number, unit = re.search(r"(\d+(?:\.\d+)?)([bm])\b", name).groups()
        billions = float(number) * (1 if unit == "b" else 1e-3)
        assert 0.8 < weights / 2 / billions < 1.55, line


@pytest.mark.parametrize("beginning", KNOWN)
def test_the_stated_memory_is_counted_from_the_models_own_sizes(beginning):
    name = next(name for name in SHORT_NAMES if name.startswith(beginning))
    config = config_of(name)
    with torch.device("meta"):
        model = FAMILIES[config.model_type][1](config)
        counted = sum(weight.numel() for weight in model.parameters())
        trained = sum(math.prod(shape) for shape in LoRA(model).shapes.values())
    assert count_weights(config) == pytest.approx(counted, rel=2e-3)
    run = run_bytes(config, ROWS * TOKENS, ROWS, 2, trained)
    assert fit_bytes(config) == pytest.approx(2 * counted + RUNS * run, rel=2e-3)


@pytest.mark.parametrize("shape", [name for name in bench_shapes.SHAPES if name in SHORT_NAMES])
def test_sizes_are_those_that_are_measured(shape):
    measured = bench_shapes.SHAPES[shape]
    listed = config_of(shape)
    for field in fields(listed):
        if field.name not in ("rope", "rms_norm_eps", "max_position_embeddings"):
            assert getattr(listed, field.name) == getattr(measured, field.name), field.name


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("qwen3-4b-bse", "'qwen3-4b-base' or 'qwen3-4b'"),
        ("smollm-135m", "'smollm2-135m' or 'smollm2-135m-instruct'"),
        ("mistral-7b", "'mistral-7b-v0.3'"),
        ("OLMo-2-7b", "'olmo2-7b' or 'olmo2-7b-instruct'"),
        ("llama-1b", "'llama-3.2-1b'"),
        ("tinyy", "'tiny'"),
        ("qwen3-6b", None),  # another number is another model
        ("smollm2-136m", None),
        ("gpt2", None),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(UsageError) as told:
        locate(name)
    if nearest is None:
        assert "families: llama, qwen3" in str(told.value)
    else:
        assert f"did you mean {nearest}" in str(told.value)
