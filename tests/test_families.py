"""What a family's config.json may leave out, and what is written of a merged one: as transformers has it."""

import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from ia2mini.models import load
from ia2mini.models.checkpoint import SHORT_NAMES, save
from ia2mini.models.config import FAMILIES, read_folder_config
from reference import (
    CLASSES,
    assert_equal,
    make_checkpoint,
    our_pass,
    random_ids,
    raw_config,
    upstream,
    upstream_pass,
)

from ia2mini.cli.main import main

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


def test_models_are_listed_with_their_families():
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for name, hub_id in SHORT_NAMES.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(hub_id) and line.split()[1] in FAMILIES and " GB" in line
