"""Caches, shared prefixes, packed documents and branches against the plain pass."""

import pytest
import torch
import torch.nn.functional as F
from ia2mini.models import Taps, load
from ia2mini.models.attention import Cache, Packed, Prefix, heads_as_rows
from reference import assert_equal, make_checkpoint, our_pass, random_ids, upstream, upstream_pass

families = pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])


@pytest.fixture(scope="module", params=["llama", "qwen3", "olmo2"])
def tiny(request, tmp_path_factory):
    """A tiny random model of each family, gradients on (loading freezes)."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)
    return load(folder)[0].requires_grad_(True)


def last_tokens(logits, lengths):
    return logits[torch.arange(len(lengths)), torch.tensor(lengths) - 1]


def decode(model, rows, prompts, chosen, prefix=None, first_keep=None):
    """Logits [steps, rows, V] of feeding `chosen` [rows, steps] after right-padded `prompts`, with a cache."""
    lengths = torch.tensor([len(p) for p in prompts])
    cache = Cache(model.config, rows, int(lengths.max()) + chosen.shape[1], torch.zeros(()))
    padded = torch.stack(
        [torch.nn.functional.pad(p, (0, int(lengths.max()) - len(p)), value=7) for p in prompts]
    )
    steps = [last_tokens(model(padded, cache=cache, prefix=prefix), lengths.tolist())]
    cache.lengths += lengths
    for step in range(chosen.shape[1]):
        if step == 2 and first_keep is not None:
            cache.keep(first_keep)
            chosen = chosen[first_keep]
        steps.append(model(chosen[:, step : step + 1], cache=cache, prefix=prefix)[:, 0])
        cache.lengths += 1
    return steps


def test_cache_with_unequal_prompts_equals_the_plain_pass(tiny):
    prompts = [random_ids(n) for n in (3, 9, 1, 6)]
    chosen = random_ids(4, 5)
    with torch.no_grad():
        steps = decode(tiny, 4, prompts, chosen)
        for row, prompt in enumerate(prompts):
            whole = tiny(torch.cat((prompt, chosen[row]))[None])[0, len(prompt) - 1 :]
            torch.testing.assert_close(
                torch.stack([s[row] for s in steps]), whole, atol=1e-5, rtol=0
            )


def test_cache_keeps_the_rows_asked_for_in_their_order(tiny):
    prompts = [random_ids(n) for n in (3, 9, 1, 6)]
    chosen = random_ids(4, 5)
    keep = torch.tensor([3, 0])  # the longest leaves, too
    with torch.no_grad():
        steps = decode(tiny, 4, prompts, chosen, first_keep=keep)
        for place, row in enumerate(keep.tolist()):
            whole = tiny(torch.cat((prompts[row], chosen[row]))[None])[0, len(prompts[row]) - 1 :]
            torch.testing.assert_close(
                torch.stack([s[place] for s in steps[3:]]), whole[3:], atol=1e-5, rtol=0
            )


def test_cache_takes_several_tokens_at_once(tiny):
    ids = random_ids(2, 12)
    cache = Cache(tiny.config, 2, 12, torch.zeros(()))
    with torch.no_grad():
        parts = []
        for part in ids.split(4, 1):
            parts.append(tiny(part, cache=cache))
            cache.lengths += 4
        torch.testing.assert_close(torch.cat(parts, 1), tiny(ids), atol=1e-5, rtol=0)


def test_prefix_equals_concatenation(tiny):
    before, ids = random_ids(1, 7), random_ids(6, 5)
    prefix, taps = Prefix(), Taps()
    with torch.no_grad():
        assert tiny(before, cache=prefix, logits=False) is None
        assert prefix.length == 7 and prefix.past(0)[0].shape[0] == 1
        logits = tiny(ids, prefix=prefix, taps=taps)
        whole = our_pass(tiny, torch.cat((before.expand(6, -1), ids), 1))
    assert_equal((logits, taps.stack()), (whole[0][:, 7:], whole[1][:, :, 7:]), 1e-5)


def test_gradients_through_the_prefix_equal_those_of_concatenation(tiny):
    before = random_ids(1, 4)
    ids, weights = random_ids(6, 5), torch.randn(6, 5, tiny.config.vocab_size)
    prefix = Prefix()
    tiny(before, cache=prefix, logits=False)
    parameters = list(tiny.parameters())
    shared = torch.autograd.grad((tiny(ids, prefix=prefix) * weights).mean(), parameters)
    joined = torch.cat((before.expand(6, -1), ids), 1)
    plain = torch.autograd.grad((tiny(joined)[:, 4:] * weights).mean(), parameters)
    assert plain[0].abs().max() > 1e-5
    for ours, theirs in zip(shared, plain, strict=True):
        torch.testing.assert_close(
            ours, theirs, atol=1e-6 * max(1, theirs.abs().max().item()), rtol=1e-4
        )


def test_prefix_and_cache_together_equal_the_plain_pass(tiny):
    before = random_ids(1, 6)
    prompts = [random_ids(n) for n in (3, 8, 1)]
    chosen = random_ids(3, 4)
    prefix = Prefix()
    with torch.no_grad():
        tiny(before, cache=prefix, logits=False)
        steps = decode(tiny, 3, prompts, chosen, prefix=prefix)
        for row, prompt in enumerate(prompts):
            whole = tiny(torch.cat((before[0], prompt, chosen[row]))[None])[
                0, 6 + len(prompt) - 1 :
            ]
            torch.testing.assert_close(
                torch.stack([s[row] for s in steps]), whole, atol=1e-5, rtol=0
            )


@families
def test_prefix_in_bfloat16_stays_near(family, tmp_path):
    folder = make_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    model = load(folder, dtype=torch.bfloat16)[0]
    before, ids = random_ids(1, 16), random_ids(4, 8)
    joined = torch.cat((before.expand(4, -1), ids), 1)
    exact, theirs = (
        x[:, 16:]
        for x in (
            upstream_pass(upstream(folder, d), joined)[0] for d in (torch.float32, torch.bfloat16)
        )
    )
    prefix = Prefix()
    with torch.no_grad():
        model(before, cache=prefix, logits=False)
        ours = model(ids, prefix=prefix)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def places(lengths) -> tuple[torch.Tensor, torch.Tensor]:
    """Document and place in it of every token of documents that stand one after another, [1, T] each."""
    documents = [torch.full((n,), i) for i, n in enumerate(lengths)]
    return torch.cat(documents)[None], torch.cat([torch.arange(n) for n in lengths])[None]


def test_branches_go_on_from_the_first_document(tiny):
    begin, ends = random_ids(2, 5), [random_ids(2, n) for n in (1, 4, 2)]
    documents, at = places((5, 1, 4, 2))
    sees = torch.eye(4, dtype=torch.bool)
    sees[:, 0] = True
    branches = Packed(documents.expand(2, -1), (at + 5 * (documents > 0)).expand(2, -1), sees)
    taps = Taps()
    logits = tiny(torch.cat((begin, *ends), 1), taps=taps, cache=branches)
    alone = [our_pass(tiny, torch.cat((begin, end), 1)) for end in ends]
    wanted = torch.cat([alone[0][0][:, :5], *(found[0][:, 5:] for found in alone)], 1)
    outputs = torch.cat([alone[0][1][:, :, :5], *(found[1][:, :, 5:] for found in alone)], 2)
    assert_equal((logits, taps.stack()), (wanted, outputs), 1e-5)


def test_a_cache_is_like_the_model(tiny):
    cache = Cache(tiny.config, 2, 9, torch.zeros(3, dtype=torch.bfloat16, device="meta"))
    assert len(cache.keys) == len(cache.values) == 3
    for kept in (*cache.keys, *cache.values):
        assert (
            kept.shape == (2, 2, 9, 8)
            and kept.dtype == torch.bfloat16
            and kept.device.type == "meta"
        )
    assert cache.lengths.device.type == "meta" and cache.lengths.dtype == torch.int64


def test_packed_documents_are_computed_as_if_alone(tiny):
    lengths = (5, 1, 7)
    documents = [random_ids(1, length) for length in lengths]
    packed = Packed(*places(lengths))
    taps = Taps()
    logits = tiny(torch.cat(documents, 1), taps=taps, cache=packed)
    alone, outputs = zip(*(our_pass(tiny, ids) for ids in documents))
    torch.testing.assert_close(logits, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(taps.stack(), torch.cat(outputs, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 2, 7, 7), (2, 6, 2, 1, 9), (2, 4, 4, 5, 5)])
def test_masked_attention_with_folded_heads_is_that_with_grouped_ones(shape):
    """What runs on a GPU, where a mask and `enable_gqa` together have no fused kernel."""
    B, H, K, T, S = shape
    q, k, v = (
        torch.randn(B, heads, n, 8, requires_grad=True) for heads, n in ((H, T), (K, S), (K, S))
    )
    mask = torch.rand(B, 1, T, S) < 0.5
    mask[..., 0] = True
    found, weight = [], torch.randn(B, H, T, 8)
    for function in (lambda *a: F.scaled_dot_product_attention(*a, enable_gqa=True), heads_as_rows):
        out = function(q, k, v, mask)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
