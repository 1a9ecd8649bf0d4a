"""Adapters that peft made and saved, read here with the same logits; what we cannot read is refused by name."""

import json
import shutil

import peft
import pytest
import torch
from ia2mini.models import load
from mistakes import refused
from reference import make_checkpoint, random_ids, upstream
from safetensors.torch import load_file, save_file

from ia2mini.adapters import IA3, LoRA, adapted
from ia2mini.engine.peft import read_adapter, save_adapter
from ia2mini.engine.subject import Subject
from ia2mini.fitting.predictor import FOREIGN, Predictor

QKV, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "down_proj"]
TUNED = {"num_attention_heads": 2, "token_dim": 16}
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=QKV),
    "ranks and alphas of their own": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*QKV, "down_proj"],
        rank_pattern={"k_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 7},
        alpha_pattern={"down_proj": 3, "layers.0.self_attn.v_proj": 20},
    ),
    "rsLoRA": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=QKV, use_rslora=True, rank_pattern={"v_proj": 9}
    ),
    "rsLoRA without an alpha": lambda: peft.LoraConfig(r=4, target_modules=QKV, use_rslora=True),
    "some layers": lambda: peft.LoraConfig(r=3, target_modules=QKV, layers_to_transform=[0, 2]),
    "one layer": lambda: peft.LoraConfig(r=3, target_modules=QKV, layers_to_transform=1),
    "full names beside some layers": lambda: peft.LoraConfig(
        r=3, target_modules=["model.layers.2.self_attn.q_proj", "k_proj"], layers_to_transform=[0]
    ),
    "blocks of another name": lambda: peft.LoraConfig(
        r=3, target_modules=QKV, layers_to_transform=[0, 1], layers_pattern=["h", "layers"]
    ),
    "ends of names beside some layers": lambda: peft.LoraConfig(
        r=3, target_modules=["self_attn.v_proj", "mlp.up_proj"], layers_to_transform=[1, 2]
    ),
    "excluded names": lambda: peft.LoraConfig(
        r=3, target_modules=QKV, exclude_modules=["layers.1.self_attn.k_proj"]
    ),
    "a pattern of targets": lambda: peft.LoraConfig(
        r=3, target_modules=r".*\.[12]\.(self_attn\.o|mlp\.up)_proj"
    ),
    "excluded targets": lambda: peft.LoraConfig(
        r=3, target_modules=QKV, exclude_modules=r".*layers\.1.*k_proj"
    ),
    "every matrix": lambda: peft.LoraConfig(r=2, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(target_modules=[*QKV, *MLP], feedforward_modules=MLP),
    "ia3, one map of a square target fed": lambda: peft.IA3Config(
        target_modules=["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"],
        feedforward_modules=["layers.0.self_attn.q_proj"],
    ),
    "ia3, some layers fed by a pattern": lambda: peft.IA3Config(
        target_modules=["o_proj", "q_proj"], feedforward_modules=r".*layers\.(0|2)\..*(o|q)_proj"
    ),
    "ia3, ends of names without a dot": lambda: peft.IA3Config(
        target_modules=r".*(q_proj|o_proj|gate_proj)", feedforward_modules=["attn.q_proj", "o_proj"]
    ),
    "ia3, all maps fed": lambda: peft.IA3Config(target_modules=QKV, feedforward_modules=QKV),
    "ia3, excluded": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        exclude_modules=r".*layers\.1\..*",
    ),
    "ia3, one layer": lambda: peft.IA3Config(
        target_modules=r".*\.1\..*(k|v|down)_proj", feedforward_modules=r".*down_proj"
    ),
}
REFUSED = {
    "use_dora": lambda: peft.LoraConfig(r=3, target_modules=QKV, use_dora=True),
    "modules_to_save": lambda: peft.LoraConfig(
        r=3, target_modules=QKV, modules_to_save=["lm_head"]
    ),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=5, task_type="CAUSAL_LM", **TUNED
    ),
    "VERA": lambda: peft.VeraConfig(r=3, target_modules=["q_proj"]),
    "lm_head": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"]),
    "embed_tokens": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"]),
    "init_lora_weights": lambda: peft.LoraConfig(
        r=3, target_modules=QKV, init_lora_weights="pissa"
    ),
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request, tmp_path_factory):
    """(folder, our model): Llama with biases, Qwen3 with tied embeddings."""
    changes = {"llama": {"attention_bias": True}, "qwen3": {"tie_word_embeddings": True}}[
        request.param
    ]
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **changes)
    return folder, load(folder)[0]


def theirs(folder, config, out):
    """peft's adapter with random weights on the checkpoint, saved into `out`."""
    twin = peft.get_peft_model(upstream(folder), config).eval()
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    twin.save_pretrained(out)
    return twin


def ours(model, folder, ids):
    adapter, theta = read_adapter(folder, model)
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        return student(ids)


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_adapters_are_read_with_equal_logits(tiny, tmp_path, kind):
    (folder, model), ids = tiny, random_ids(2, 9)
    twin = theirs(folder, CONFIGS[kind](), tmp_path / "a")
    with torch.no_grad():
        expected = twin(ids).logits[:, -ids.shape[1] :]
        assert (ours(model, tmp_path / "a", ids) - expected).abs().max() <= 1e-5
        assert (model(ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3-inputs"])
def test_what_we_save_is_read_back(tiny, tmp_path, kind):
    folder, model = tiny
    adapter = {
        "lora": lambda: LoRA(model, rank=3, alpha=7.0),
        "ia3": lambda: IA3(model),
        "ia3-inputs": lambda: IA3(
            model,
            ("k_proj", "down_proj"),
            scale_inputs=["model.layers.0.mlp.down_proj"],
        ),
    }[kind]()
    theta, ids = adapter.init(torch.Generator().manual_seed(1)) + 0.1, random_ids(2, 9)
    save_adapter(adapter, theta, tmp_path, str(folder))
    with torch.no_grad(), adapted(model, adapter, theta[None]) as student:
        expected = student(ids)
    assert (ours(model, tmp_path, ids) - expected).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tiny, tmp_path, name):
    folder, model = tiny
    theirs(folder, REFUSED[name](), tmp_path / "a")
    refused(lambda: read_adapter(tmp_path / "a", model), str(tmp_path / "a"), name)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_refused_where_there_are_some_and_nothing_where_there_are_none(
    tiny, tmp_path, bias
):
    folder, model = tiny
    twin = theirs(
        folder, peft.LoraConfig(r=3, target_modules=["v_proj", "down_proj"], bias=bias), tmp_path
    )
    if any(name.endswith(".bias") for name, _ in model.named_parameters()):
        return refused(lambda: read_adapter(tmp_path, model), f"bias = {bias!r}", "_proj.bias")
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert (ours(model, tmp_path, ids) - twin(ids).logits).abs().max() <= 1e-5


def test_a_rank_and_an_alpha_that_are_not_told_are_pefts_own(tiny, tmp_path):
    folder, model = tiny
    twin, ids = theirs(folder, peft.LoraConfig(target_modules=QKV), tmp_path), random_ids(2, 9)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in (
        "r",
        "lora_alpha",
        "bias",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "layers_to_transform",
    ):
        config.pop(name)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = peft.PeftModel.from_pretrained(upstream(folder), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, twin(ids).logits)
        assert (ours(model, tmp_path, ids) - twin(ids).logits).abs().max() <= 1e-5


def test_what_the_file_holds_besides_or_otherwise_is_refused(tiny, tmp_path):
    """Each of these was read with a part left out, or stretched to fit."""
    folder, model = tiny
    theirs(folder, peft.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path / "lora")
    theirs(
        folder,
        peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"]),
        tmp_path / "ia3",
    )
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    square = "base_model.model.model.layers.1.self_attn.o_proj.ia3_l"
    changes = {
        "embed_tokens": (
            "lora",
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}),
        ),
        "twice": (
            "lora",
            lambda t: t.update({f"{name}.lora_A.weight"[17:]: t[f"{name}.lora_A.weight"].clone()}),
        ),
        "lora_B is (1, 3)": (
            "lora",
            lambda t: t.update({f"{name}.lora_B.weight": torch.ones(1, 3)}),
        ),
        "lora_A is (2,": ("lora", lambda t: t.update({f"{name}.lora_A.weight": torch.ones(2, 32)})),
        "beside lora_A": (
            "lora",
            lambda t: t.update({f"{name}.lora_magnitude_vector": torch.ones(3)}),
        ),
        "no name ends in lora_A.weight": (
            "lora",
            lambda t: [t.update({n.replace(".weight", ".default.weight"): t.pop(n)}) for n in [*t]],
        ),
        "disagree": ("ia3", lambda t: t.update({square: torch.ones(32, 1)})),
        "ia3_l is": ("ia3", lambda t: t.update({square: torch.ones(1, 7)})),
    }
    for said, (kind, change) in changes.items():
        path = tmp_path / kind / "adapter_model.safetensors"
        tensors = load_file(path)
        whole = dict(tensors)
        change(tensors)
        save_file(tensors, path)
        refused(lambda kind=kind: read_adapter(tmp_path / kind, model), said)
        save_file(whole, path)
    config = tmp_path / "lora" / "adapter_config.json"
    whole = json.loads(config.read_text())
    for change, said in (
        ({"layers_to_transform": [0, 1, 2], "target_modules": ".*q_proj"}, "layers_to_transform"),
        ({"r": 4}, "lora_A is (3,"),
        ({"rank_pattern": {"layers.2.self_attn.q_proj": 2}}, "lora_A is (3,"),
        ({"use_a_new_way": True}, "use_a_new_way"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ):
        config.write_text(json.dumps(whole | change))
        refused(lambda: read_adapter(tmp_path / "lora", model), said)


def test_where_an_adapter_lies_instead_is_said(tiny, tmp_path):
    folder, model = tiny
    refused(lambda: read_adapter(folder, model), "a checkpoint and no adapter", "--model")
    twin = peft.get_peft_model(upstream(folder), CONFIGS["lora"](), adapter_name="first")
    twin.save_pretrained(tmp_path / "two")
    refused(lambda: read_adapter(tmp_path / "two", model), "in first; give one of these folders")
    read_adapter(tmp_path / "two" / "first", model)
    (tmp_path / "two" / "first" / "adapter_model.safetensors").rename(
        tmp_path / "two" / "first" / "adapter_model.bin"
    )
    refused(
        lambda: read_adapter(tmp_path / "two" / "first", model),
        "missing",
        "adapter_model.bin is not read",
    )


@pytest.fixture
def saved(tiny, tmp_path):
    folder, model = tiny
    adapter = LoRA(model)
    save_adapter(
        adapter,
        torch.randn(adapter.init(torch.Generator()).shape),
        tmp_path / "a",
        str(folder),
    )
    return model, tmp_path / "a"


def test_missing_and_truncated_files_are_one_line(saved):
    model, folder = saved
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = tensors.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 64):
        tensors.write_bytes(damaged)
        refused(
            lambda: read_adapter(folder, model), "adapter_model.safetensors", "truncated or corrupt"
        )
    tensors.unlink()
    refused(lambda: read_adapter(folder, model), "adapter_model.safetensors", "missing")
    tensors.write_bytes(whole)
    for text, said in (("{", "not valid JSON"), ("[]", "JSON object"), ("{}", "peft_type None")):
        config.write_text(text)
        refused(lambda: read_adapter(folder, model), said)
    config.unlink()
    refused(lambda: read_adapter(folder, model), "adapter_config.json", "no such file")
    shutil.rmtree(folder)
    refused(lambda: read_adapter(folder, model), "no such file")


def test_a_target_that_config_or_tensors_lack_is_an_error(saved):
    model, folder = saved
    path, config = (
        folder / "adapter_model.safetensors",
        json.loads((folder / "adapter_config.json").read_text()),
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["q_proj", "o_proj"]})
    )
    refused(
        lambda: read_adapter(folder, model),
        "do not name the same matrices",
        "layers.0.self_attn.k_proj",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(path)
    lost = {name: t for name, t in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    save_file(lost, path)
    refused(
        lambda: read_adapter(folder, model),
        "do not name the same matrices",
        "layers.1.self_attn.q_proj",
    )
    save_file(
        {
            name: t
            for name, t in tensors.items()
            if not name.endswith("2.self_attn.k_proj.lora_B.weight")
        },
        path,
    )
    refused(lambda: read_adapter(folder, model), "do not fit this model", "lora_B")
    save_file(
        {name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in tensors.items()},
        path,
    )
    refused(lambda: read_adapter(folder, model), "do not fit this model")


def test_an_adapter_of_another_architecture_is_refused(tiny, tmp_path):
    folder, model = tiny
    other = make_checkpoint(
        tmp_path / "m", "llama", hidden_size=48, num_hidden_layers=2, head_dim=12
    )
    theirs(other, CONFIGS["lora"](), tmp_path / "a")
    refused(lambda: read_adapter(tmp_path / "a", model), str(tmp_path / "a"))


WRONG_CONFIGS = [
    {"target_modules": "("},
    {"target_modules": 5},
    {"lora_alpha": float("nan")},
    {"lora_alpha": 1e308},
]
WRONG_CONFIGS += [
    {"lora_alpha": {}},
    {"alpha_pattern": ["q_proj"]},
    {"alpha_pattern": {"(": 1}},
    {"peft_type": []},
]
WRONG_CONFIGS += [
    {"layers_to_transform": "all"},
    {"layers_to_transform": [None]},
    {"bias": "x\ny" * 1000},
]


@pytest.mark.parametrize("change", WRONG_CONFIGS, ids=lambda change: str(change)[:30])
def test_a_configuration_that_says_anything_is_one_line(saved, change):
    model, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(lambda: read_adapter(folder, model), str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_no_number_is_refused(saved, bad):
    model, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[3:4].fill_(bad)
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(lambda: read_adapter(folder, model), str(folder), "NaN or infinity")


def test_a_rank_that_no_tensor_fills_takes_no_memory(saved, monkeypatch):
    model, folder = saved
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        tensors
        | {n: torch.zeros(10**9, 0) for n in tensors if "layers.0.self_attn.q_proj.lora_A" in n},
        path,
    )
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **how: made.append(shape) or zeros(1))
    refused(
        lambda: read_adapter(folder, model), "the shape of model.layers.0.self_attn.q_proj.lora_A"
    )
    assert not made


@pytest.mark.parametrize("labels", [["0", "1"], []])
def test_an_adapter_too_large_to_compute_with_is_named(tiny, labels):
    folder, model = tiny
    subject, adapter = (
        Subject(model, load(folder)[1], folder, "tiny", str(folder)),
        LoRA(model, ("down_proj",)),
    )
    theta = torch.full_like(adapter.init(torch.Generator()), 1e30)[None]
    predictor = Predictor(subject, adapter, theta, FOREIGN | {"labels": labels, "max_tokens": 2})
    refused(lambda: list(predictor.answer_rows([{"text": "a"}])), "computes NaN", "--dtype float32")
