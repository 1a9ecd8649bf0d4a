"""Both families against transformers; taps, padding and wrapped blocks against the plain pass."""

import json
from functools import partial

import pytest
import torch
from ia2mini.models import Taps, load
from ia2mini.models.attention import Cache, Prefix
from ia2mini.models.layers import Head
from ia2mini.models.taps import device_of
from reference import (
    LLAMA3_SCALING,
    assert_equal,
    distances,
    make_checkpoint,
    our_pass,
    random_ids,
    relative,
    upstream,
    upstream_pass,
)
from torch._dynamo.testing import CompileCounter

from ia2mini import UsageError
from ia2mini.adapters import LoRA, adapted
from ia2mini.scale.blocks import checkpoint_blocks, compile_blocks

CASES = {
    "llama": ("llama", {}),
    "llama no groups, tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama one key head, own head size": ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama head size and groups derived": (
        "llama",
        {"absent": ("num_key_value_heads", "head_dim", "rope_theta")},
    ),
    "llama llama3 scaling": (
        "llama",
        {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": True},
    ),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama sharded, other epsilon": ("llama", {"rms_norm_eps": 0.1, "shard": "20KB"}),
    "qwen2": ("qwen2", {"absent": ("attention_bias", "head_dim"), "use_sliding_window": False}),
    "qwen2 tied": (
        "qwen2",
        {
            "absent": ("attention_bias", "head_dim"),
            "tie_word_embeddings": True,
            "sliding_window": 8,
        },
    ),
    "mistral own head size": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral short": ("mistral", {"sliding_window": 4096, "rope_theta": 1e6}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "absent": ("head_dim",)}),
    "smollm3 by interval": (
        "smollm3",
        {"no_rope_layer_interval": 2, "attention_bias": True, "absent": ("rope_theta", "head_dim")},
    ),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "seed_oss defaults": ("seed_oss", {"head_dim": 16, "absent": ("attention_bias",)}),
    "granite": (
        "granite",
        {
            "absent": ("head_dim",),
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 4.0,
            "mlp_bias": True,
        },
    ),
    "granite defaults": ("granite", {"absent": ("head_dim",)}),
    "olmo2": ("olmo2", {"absent": ("head_dim", "rms_norm_eps"), "rope_theta": 5e5}),
    "olmo2 no groups, tied": (
        "olmo2",
        {
            "absent": ("head_dim", "rope_theta"),
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2 one key head, biases, sharded": (
        "olmo2",
        {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True, "shard": "20KB"},
    ),
    "olmo2 llama3 scaling": ("olmo2", {"rope_scaling": LLAMA3_SCALING, "rms_norm_eps": 0.1}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, own head size": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3 one key head": (
        "qwen3",
        {"num_key_value_heads": 1, "rope_theta": 1e6, "rms_norm_eps": 0.1},
    ),
    "qwen3 default head size, biases": (
        "qwen3",
        {"absent": ("head_dim", "rope_theta"), "attention_bias": True},
    ),
    "qwen3 sharded, tied": ("qwen3", {"shard": "20KB", "tie_word_embeddings": True}),
    "qwen3 llama3 scaling": ("qwen3", {"rope_scaling": LLAMA3_SCALING}),
}
cases = pytest.mark.parametrize("case", CASES)
families = pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])


def make(folder, case: str, **more):
    family, changes = CASES[case]
    return make_checkpoint(folder, family, **changes, **more)


@pytest.fixture(scope="module", params=["llama", "qwen3", "olmo2"])
def tiny(request, tmp_path_factory):
    """A tiny random model of each family, gradients on (loading freezes)."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)
    return load(folder)[0].requires_grad_(True)


@cases
def test_equals_transformers_in_float32(case, tmp_path):
    folder = make(tmp_path, case)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == ("sharded" in case)
    ids = random_ids(2, 40)  # llama3 scaling: far beyond its original context of 16
    allowed = 5e-5 if "granite" in case else 1e-5  # its scores are larger
    assert_equal(our_pass(load(folder)[0], ids), upstream_pass(upstream(folder), ids), allowed)


@cases
def test_equals_transformers_in_bfloat16(case, tmp_path):
    folder = make(tmp_path, case, dtype=torch.bfloat16)
    ids = random_ids(2, 40)
    exact = upstream_pass(upstream(folder), ids)
    theirs = distances(upstream_pass(upstream(folder, torch.bfloat16), ids), exact)
    ours = our_pass(load(folder, dtype=torch.bfloat16)[0], ids)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    assert_equal(ours, exact, [2 * gap for _, gap in theirs])


def test_scaling_far_beyond_the_original_context(tmp_path):
    scaling = {**LLAMA3_SCALING, "original_max_position_embeddings": 256}
    folder = make_checkpoint(
        tmp_path, "llama", rope_theta=500000.0, rope_scaling=scaling, num_hidden_layers=1
    )
    ids = random_ids(1, 2000)
    assert_equal(our_pass(load(folder)[0], ids), upstream_pass(upstream(folder), ids), 1e-5)


@pytest.mark.parametrize(
    "family, scaling", [("llama", None), ("llama", LLAMA3_SCALING), ("qwen3", None)]
)
def test_both_spellings_of_a_config(family, scaling, tmp_path):
    folder = make_checkpoint(tmp_path, family, rope_theta=777.0, rope_scaling=scaling)
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_theta" in raw and "torch_dtype" in raw
    ids = random_ids(2, 40)
    theirs = upstream_pass(upstream(folder), ids)
    hub = load(folder)[0]
    del raw["rope_scaling"]
    raw["rope_parameters"] = {
        "rope_type": "default",
        **(scaling or {}),
        "rope_theta": raw.pop("rope_theta"),
    }
    raw["dtype"] = raw.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(raw))
    new = load(folder)[0]
    assert hub.config == new.config and hub.config.rope.theta == 777.0
    for model in (hub, new):
        assert_equal(our_pass(model, ids), theirs, 1e-5)


def test_the_config_that_transformers_itself_writes(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", rope_theta=500.0, rope_scaling=LLAMA3_SCALING)
    ids = random_ids(1, 40)
    theirs = upstream(folder)
    theirs.save_pretrained(folder)
    assert_equal(our_pass(load(folder)[0], ids), upstream_pass(theirs, ids), 1e-5)


@families
def test_a_difference_names_the_first_layer(family, tmp_path):
    folder = make_checkpoint(tmp_path, family)
    ids = random_ids(1, 12)
    theirs = upstream_pass(upstream(folder), ids)
    model = load(folder)[0]
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 1
    with pytest.raises(AssertionError, match="first difference at attention output of layer 1"):
        assert_equal(our_pass(model, ids), theirs, 1e-5)


def test_padded_rows_equal_rows_alone(tiny):
    lengths = [5, 17, 1, 11]
    ids = random_ids(4, 17)
    logits, outputs = our_pass(tiny, ids)
    for row, n in enumerate(lengths):
        assert_equal(
            (logits[row, :n], outputs[:, row, :n]),
            [x.select(-3, 0) for x in our_pass(tiny, ids[row : row + 1, :n])],
            1e-5,
        )


def test_the_head_maps_the_states_that_stand_before_it(tiny):
    ids = random_ids(2, 9)
    assert torch.equal(tiny.lm_head(tiny(ids, head=False)), tiny(ids))


def test_taps_pick_positions_and_layers_in_the_order_given(tiny):
    ids = random_ids(3, 10)
    logits, whole = our_pass(tiny, ids)
    at = torch.tensor([2, 0, 1, 0, 2]), torch.tensor([9, 0, 4, 3, 9])
    for layers in (None, [1], [2, 0], [0, 1, 2]):
        taps = Taps(at=at, layers=layers)
        assert torch.equal(tiny(ids, taps=taps), logits)  # bit for bit
        assert torch.equal(taps.stack(), whole[layers or [0, 1, 2]][:, at[0], at[1]])
        assert sorted(taps.outputs) == sorted(layers or [0, 1, 2])  # nothing else is kept
    assert torch.equal(tiny(ids), logits)


@families
def test_taps_of_the_residual_stream_equal_hooks_in_transformers(tmp_path, family):
    folder, ids, streams = make_checkpoint(tmp_path / family, family), random_ids(2, 7), []
    theirs, ours = upstream(folder), load(folder)[0]
    for block in theirs.model.layers:
        after = block.mlp if family == "olmo2" else block.post_attention_layernorm
        after.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    with torch.no_grad():
        theirs(ids)
        whole, some = (
            Taps(residual=True),
            Taps((torch.tensor([1, 0]), torch.tensor([6, 2])), [2], residual=True),
        )
        assert ours(ids, taps=whole, logits=False) is None
        logits = ours(ids, taps=some)
    assert relative(whole.stack(), torch.stack(streams)) <= 1e-6
    assert torch.equal(some.stack()[0], whole.stack()[2, [1, 0], [6, 2]]) and torch.equal(
        logits, ours(ids)
    )


def test_taps_are_attached_to_the_graph(tiny):
    tiny.zero_grad()
    taps = Taps(at=(torch.tensor([0]), torch.tensor([3])), layers=[1])
    tiny(random_ids(1, 6), taps=taps, logits=False)
    taps.stack().square().sum().backward()
    moved = [block.self_attn.q_proj.weight.grad is not None for block in tiny.model.layers]
    assert moved == [True, True, False]
    assert tiny.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("layers, blocks, mlps", [([0], 1, 0), ([1, 0], 2, 1), (None, 3, 2)])
def test_without_logits_the_pass_stops_after_the_last_tapped_attention(tiny, layers, blocks, mlps):
    calls = []
    watched = [(b.self_attn, "attention") for b in tiny.model.layers] + [
        (b.mlp, "mlp") for b in tiny.model.layers
    ]
    handles = [
        m.register_forward_hook(lambda *a, n=n: calls.append(n))
        for m, n in [*watched, (tiny.lm_head, "head")]
    ]
    ids, taps = random_ids(2, 7), Taps(layers=layers)
    assert tiny(ids, taps=taps, logits=False) is None
    for handle in handles:
        handle.remove()
    assert [calls.count(n) for n in ("attention", "mlp", "head")] == [blocks, mlps, 0]
    assert torch.equal(taps.stack(), our_pass(tiny, ids)[1][layers or [0, 1, 2]])


@pytest.mark.parametrize("layers", [[3], [-1], []])
def test_taps_on_layers_that_are_not_there(tiny, layers):
    with pytest.raises(UsageError, match="0 to 2"):
        tiny(random_ids(1, 3), taps=Taps(layers=layers))


def test_logits_at_positions_are_slices_of_all(tiny):
    ids = random_ids(3, 10)
    at = torch.tensor([2, 0, 0]), torch.tensor([9, 0, 4])
    seen = []
    handle = tiny.lm_head.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].shape[:-1].numel())
    )
    chosen = tiny(ids, logits=at)
    handle.remove()
    assert seen == [3] and chosen.shape == (3, tiny.config.vocab_size)
    torch.testing.assert_close(chosen, tiny(ids)[at], atol=1e-5, rtol=0)


STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" "
    "Lily was sad and didn't know what to do. She said, \"I want to play with your ball, but"
)


@pytest.mark.parametrize("cached", [False, True])
def test_a_real_checkpoint_continues_with_the_published_text(shared_data, cached):
    model, tokenizer = load(shared_data / "checkpoints" / "stories260k")
    ids = tokenizer.encode("")
    assert ids == [1] and tokenizer.eos_ids == (2,)
    cache = Cache(model.config, 1, 121, torch.zeros(())) if cached else None
    for _ in range(120):
        logits = model(torch.tensor([ids[-1:] if cached else ids]), cache=cache)
        if cached:
            cache.lengths += 1
        ids.append(logits[0, -1].argmax().item())
    assert tokenizer.decode(ids) == STORY


@pytest.mark.parametrize("rows", [1, 6, 16, 17])
def test_head_is_the_same_map_for_few_rows(rows):
    x, head = torch.randn(rows, 24).requires_grad_(), Head(24, 70, bias=False)
    ours, plain = head(x), torch.nn.functional.linear(x, head.weight)
    torch.testing.assert_close(ours, plain)
    up = torch.randn(rows, 70)
    for a, b in zip(
        *(torch.autograd.grad(logits, (x, head.weight), up) for logits in (ours, plain)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_where_a_model_is(tiny):
    assert device_of(tiny) == device_of(partial(tiny, logits=False)) == torch.device("cpu")
    assert device_of(type(tiny)(tiny.config).to("meta")) == torch.device("meta")


@families
@pytest.mark.parametrize("wrap", ["checkpointed", "compiled"])
def test_wrapped_blocks_compute_the_same(family, wrap, tmp_path):
    folder, counter = make_checkpoint(tmp_path, family), CompileCounter()
    plain, wrapped = (load(folder)[0] for _ in range(2))
    if wrap == "compiled":
        torch.compiler.reset()  # it remembers which sizes changed in other tests
        compile_blocks(wrapped, backend=counter, fullgraph=True)
    else:
        assert checkpoint_blocks(wrapped) and not checkpoint_blocks(wrapped)
    adapter = LoRA(plain, rank=2)
    theta = adapter.init(torch.Generator().manual_seed(0)).expand(2, -1) + 0.1
    for tokens in (5, 9, 7):
        ids, found = random_ids(4, tokens), []
        for model in (plain, wrapped):
            leaf = theta.clone().requires_grad_()
            with adapted(model, LoRA(model, rank=2), leaf) as student:
                taps = Taps()
                logits = student(ids, taps=taps)
                (logits.square().mean() + taps.stack().square().mean()).backward()
            found.append((logits, leaf.grad))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    # whatever the length: attention of the first layer, whose input needs no gradient, of the others, and the MLP
    assert counter.frame_count == 3 * (wrap == "compiled")
    caches = [Cache(plain.config, 4, 16, torch.zeros(())) for _ in range(2)]
    prefixes, counts = [Prefix(), Prefix()], []
    with torch.no_grad():
        for part in (ids, *random_ids(4, 4).split(1, 1)):
            a, b = (
                model(part, cache=cache)
                for model, cache in zip((plain, wrapped), caches, strict=True)
            )
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
            counts.append(counter.frame_count)
            for cache in caches:
                cache.lengths += part.shape[1]
        # both halves without gradients, both for a single token, attention for any cache: neither a layer nor a longer
        # cache compiles anew
        assert counts == [n * (wrap == "compiled") for n in (5, 7, 8, 8, 8)]
        before, ids = random_ids(1, 6), random_ids(4, 5)
        for model, prefix in zip((plain, wrapped), prefixes, strict=True):
            model(before, cache=prefix, logits=False)
        a, b = (
            model(ids, prefix=prefix)
            for model, prefix in zip((plain, wrapped), prefixes, strict=True)
        )
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
