"""config.json: what is refused and how it is said, whatever stands in it; what changes nothing."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ia2mini.models import load
from ia2mini.models.config import read_folder_config
from mistakes import refused
from reference import (
    LLAMA3_SCALING,
    assert_equal,
    make_checkpoint,
    our_pass,
    random_ids,
    raw_config,
)

from ia2mini import UsageError

families = pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])


def change_config(folder: Path, absent: tuple = (), **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in absent})
    )


YARN, HALF = {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "llama3", "factor": 8.0}
REFUSALS = {
    "other rope scaling": ({"rope_scaling": YARN}, "rope_scaling", "yarn"),
    "other rope scaling, old key": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling",
        "linear",
    ),
    "other rope scaling, transformers 5": (
        {"rope_parameters": {**YARN, "rope_theta": 1e4}},
        "rope_scaling",
        "yarn",
    ),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_scaling",
    ),
    "incomplete llama3 scaling": ({"rope_scaling": HALF}, "rope_scaling", "low_freq_factor"),
    "llama3 scaling of no range": (
        {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 5.0}},
        "high_freq_factor is below low_freq_factor",
    ),
    "attention to what follows": ({"is_causal": False}, "is_causal", "False"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 8}, "sliding"),
    "sliding layers": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "sliding",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config",
        "gptq",
    ),
    "other model_type": ({"model_type": "gpt2"}, "model_type", "gpt2", "llama, qwen3"),
    "a model_type with experts": ({"model_type": "qwen3_moe"}, "experts", "use qwen3-8b"),
    "windowed layers": ({"model_type": "gemma3_text"}, "windowed layers", "qwen3-1.7b"),
    "no model_type": ({"absent": ("model_type",)}, "model_type"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
    "no hidden_size": ({"absent": ("hidden_size",)}, "missing: hidden_size"),
    "two fields missing": (
        {"absent": ("vocab_size", "num_hidden_layers")},
        "missing: vocab_size, num_hidden_layers",
    ),
    "null field": ({"intermediate_size": None}, "missing: intermediate_size"),
}


@families
@pytest.mark.parametrize("case", REFUSALS)
def test_configs_refused_by_name(case, family, tmp_path):
    changes, *mentioned = REFUSALS[case]
    (tmp_path / "config.json").write_text(json.dumps(raw_config(family)))
    change_config(tmp_path, **changes)
    refused(lambda: load(tmp_path), "config.json", *mentioned)


MUTATIONS = [  # field, its value, what is said beside the field's name
    ("head_dim", {}, "a whole number"),
    ("head_dim", 7, "even"),
    ("head_dim", -8, "a whole number from 1"),
    ("vocab_size", 2**70, "a whole number from 1 to 1,048,576"),
    ("vocab_size", 288.0, "a whole number"),
    ("vocab_size", "288", "a whole number"),
    ("hidden_size", True, "a whole number"),
    ("hidden_size", 0, "a whole number"),
    ("num_hidden_layers", 10**9, "4,096"),
    ("num_attention_heads", [4], "a whole number"),
    ("num_attention_heads", 3, "num_key_value_heads = 2"),
    ("num_key_value_heads", 3, "num_attention_heads = 4 is not a multiple"),
    ("rms_norm_eps", "1e-6", "a number from 1e-12"),
    ("rms_norm_eps", 2, "a number from 1e-12 to 1"),
    ("rms_norm_eps", float("nan"), "a number from 1e-12"),
    ("tie_word_embeddings", "yes", "bool"),
    ("attention_bias", 1, "bool"),
    ("max_position_embeddings", 1e4, "a whole number"),
    ("rope_theta", None, "a number from 1e-12"),
    ("rope_theta", -1, "a number from 1e-12"),
    ("rope_theta", float("inf"), "a number from 1e-12"),
    ("rope_theta", 10**400, "a number from 1e-12"),
    ("rope_theta", True, "a number from 1e-12"),
    ("rope_scaling", 1e308, "float"),
    ("rope_scaling", [1], "list"),
    ("rope_scaling", "default", "str"),
    ("rope_scaling", {"type": []}, "[]"),
    ("rope_scaling", {"rope_type": "llama3\n"}, "not supported"),
    ("rope_scaling", {"partial_rotary_factor": "a\nb"}, "partial_rotary_factor"),
    *(
        ("rope_scaling", LLAMA3_SCALING | {"factor": value}, "factor = ")
        for value in ([], "8", -1.0, None, 1e300)
    ),
    ("rope_scaling", LLAMA3_SCALING | {"original_max_position_embeddings": {}}, "not supported"),
    ("partial_rotary_factor", [], "not supported"),
    ("model_type", [], "llama, qwen3"),
    ("model_type", {"llama": 1}, "llama, qwen3"),
    ("model_type", "llama\n", "llama, qwen3"),
    ("hidden_act", "silu\n", "not supported"),
    ("hidden_act", ["silu"], "not supported"),
    ("quantization_config", "gptq\n" * 99, "not supported"),
    ("layer_types", 5, "not supported"),
    ("layer_types", "full_attention", "not supported"),
    ("layer_types", [["full_attention"]], "not supported"),
]


@families
@pytest.mark.parametrize(
    "field, value, said", MUTATIONS, ids=lambda x: str(x)[:40] if type(x) is not int else "number"
)
def test_a_mutated_field_is_named(field, value, said, family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw_config(family) | {field: value}))
    refused(lambda: load(tmp_path), "config.json", said, *[field] * (field != "rope_scaling"))


def test_a_derived_head_size_is_checked_too(tmp_path):
    raw = raw_config("llama", absent=("head_dim",)) | {"num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused(lambda: load(tmp_path), "head_dim = 0 (or hidden_size over heads)")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([2**70, 1e308, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*LLAMA3_SCALING, "rope_theta"]), inner)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {
        *raw_config("qwen3"),
        "rope_parameters",
        "layer_types",
        "use_sliding_window",
        "quantization_config",
    }
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["llama", "qwen3"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2),
)
@example("llama", {"rope_scaling": LLAMA3_SCALING | {"factor": 1e308}})
def test_any_config_is_read_or_refused_in_one_line(tmp_path, family, changes):
    (tmp_path / "config.json").write_text(json.dumps(raw_config(family) | changes))
    try:
        config, _ = read_folder_config(tmp_path)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400 + len(str(tmp_path))
    else:
        assert min(config.head_dim, config.num_hidden_layers, config.vocab_size) > 0
        assert config.rope.inverse_frequencies(8, "cpu").isfinite().all()


@families
def test_fields_that_change_nothing_are_accepted(family, tmp_path):
    folder = make_checkpoint(tmp_path, family)
    ids = random_ids(1, 8)
    before = our_pass(load(folder)[0], ids)
    change_config(
        folder,
        use_sliding_window=False,
        sliding_window=None,
        layer_types=["full_attention"] * 3,
        max_window_layers=3,
    )
    change_config(
        folder,
        rope_scaling={"rope_type": "default"},
        attention_dropout=0.0,
        use_cache=True,
        pretraining_tp=1,
    )
    assert_equal(our_pass(load(folder)[0], ids), before, 0.0)


@pytest.mark.parametrize(
    "text, mentioned",
    [
        ("{", "not valid JSON"),
        ("[]", "config.json"),
        ('"llama"', "config.json"),
        ("[" * 100_000, "not valid JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_broken_config_is_named(tmp_path, text, mentioned):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: load(tmp_path), "config.json", mentioned)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sliding_window": 4096, "max_position_embeddings": 32768}, "sliding_window = 4096"),
        ({"max_position_embeddings": 32768}, "sliding_window = 4096"),  # transformers' default
        ({"sliding_window": "4096"}, "sliding_window = '4096'"),
    ],
)
def test_a_window_shorter_than_prompts_may_be_is_refused(tmp_path, changes, said):
    raw = raw_config("mistral", **changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused(lambda: load(tmp_path), said, "prompts may be longer", "mistral-7b-v0.3")


@pytest.mark.parametrize("layers", [[1, 0], [1, 2, 1], "101", [None, 1, 1]])
def test_layers_without_rotary_are_a_number_for_each(tmp_path, layers):
    raw = raw_config("smollm3", no_rope_layers=layers)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused(lambda: load(tmp_path), "no_rope_layers", "for each layer")
