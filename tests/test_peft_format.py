"""Saved adapters as peft loads them, merged checkpoints as transformers loads them."""

import copy
import json

import peft
import pytest
import torch
import transformers
from ia2mini.models import load
from reference import random_ids, upstream

from ia2mini import UsageError
from ia2mini.adapters import EVERY_MATRIX, IA3, TARGETS, LoRA, adapted
from ia2mini.engine.merge import save_merged
from ia2mini.engine.peft import save_adapter

PEFT = {
    "lora": lambda m: LoRA(m),
    "lora-every-matrix": lambda m: LoRA(m, EVERY_MATRIX, rank=3, alpha=6.0),
    "lora-one-matrix": lambda m: LoRA(m, ("o_proj",), rank=4),
    "ia3": lambda m: IA3(m),
    "ia3-values-mlp": lambda m: IA3(m, ("v_proj", "down_proj")),
    "ia3-inputs": lambda m: IA3(m, (*TARGETS, "down_proj"), scale_inputs=True),
}


def trained(adapter, model):
    theta = adapter.init(torch.Generator().manual_seed(1))
    return theta + 0.1 * torch.randn(theta.shape)


def our_logits(model, adapter, theta, ids):
    with torch.no_grad(), adapted(model, adapter, theta[None]) as student:
        return student(ids)


@pytest.mark.parametrize("kind", PEFT)
def test_peft_loads_what_we_save(tiny, tmp_path, kind):
    folder, model = tiny
    adapter, ids = PEFT[kind](model), random_ids(3, 9)
    theta = trained(adapter, model)
    save_adapter(adapter, theta, tmp_path / "new" / "adapter", str(folder))
    assert {p.name for p in (tmp_path / "new" / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    theirs = peft.PeftModel.from_pretrained(upstream(folder), tmp_path / "new" / "adapter")
    added = [
        p
        for name, p in theirs.named_parameters()
        if any(part in name for part in ("lora_", "ia3_l"))
    ]
    assert sum(p.numel() for p in added) == theta.numel(), "peft added weights that we do not have"
    with torch.no_grad():
        expected = theirs(ids).logits[:, -ids.shape[1] :]
        assert (our_logits(model, adapter, theta, ids) - expected).abs().max() <= 1e-5
        assert (model(ids) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PEFT)
def test_a_merged_checkpoint_equals_the_adapted_model(tiny, tmp_path, kind):
    folder, model = tiny
    adapter, ids, before = PEFT[kind](model), random_ids(3, 9), copy.deepcopy(model.state_dict())
    theta = trained(adapter, model)
    expected = our_logits(model, adapter, theta, ids)
    save_merged(model, adapter, theta, tmp_path, load(folder)[1])
    with torch.no_grad():
        assert (upstream(tmp_path)(ids).logits - expected).abs().max() <= 2e-5
        assert (load(tmp_path)[0](ids) - expected).abs().max() <= 2e-5
        assert (model(ids) - expected).abs().max() > 1e-2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(linear.adapted is None for linear in adapter.linears.values())


def test_the_model_in_memory_survives_a_failed_save(tiny, tmp_path):
    folder, model = tiny
    adapter, before = LoRA(model), copy.deepcopy(model.state_dict())
    (tmp_path / "file").write_text("")
    with pytest.raises((UsageError, OSError)):
        save_merged(model, adapter, trained(adapter, model), tmp_path / "file", load(folder)[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bfloat16_base_is_merged_in_float32(tiny, tmp_path):
    folder, model = tiny
    half = load(folder, dtype=torch.bfloat16)[0]
    adapter = LoRA(half)
    theta = trained(adapter, half)
    save_merged(half, adapter, theta, tmp_path, load(folder)[1])
    name = "model.layers.1.self_attn.k_proj"
    weights = dict(
        zip(adapter.shapes, theta.split([a * b for a, b in adapter.shapes.values()]), strict=True)
    )
    A, B = (weights[f"{name}.{x}"].view(adapter.shapes[f"{name}.{x}"]) for x in "AB")
    exact = half.get_submodule(name).weight.double() + B.double() @ A.double()
    found = load(tmp_path, dtype=torch.bfloat16)[0].get_submodule(name).weight
    assert (
        found.dtype == torch.bfloat16
        and ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    )


def test_a_merged_checkpoint_keeps_its_tokenizer_and_end_of_sequence(tiny, tmp_path):
    folder, model = tiny
    adapter, tokenizer = LoRA(model), load(folder)[1]
    tokenizer.eos_ids = (257, 9)  # as Llama 3 Instruct has several
    save_merged(model, adapter, trained(adapter, model), tmp_path, tokenizer)
    merged = load(tmp_path)[1]
    assert merged.eos_ids == (257, 9) and merged.encode("Text:é\n") == tokenizer.encode("Text:é\n")
    assert transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id == [257, 9]
