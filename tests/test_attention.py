"""Attention written out, against a plain loop over heads and tokens in float64."""

import pytest
import torch
from ia2mini.models import attention
from ia2mini.models.attention import LayerCache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

B, H, K, T, E = 3, 6, 2, 9, 4


def one_by_one(q, k, v, seen):
    """Each head's and token's softmax over the keys that it sees."""
    found = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = seen[b, t].nonzero()[:, 0]
                head = h // (H // K)
                scores = k[b, head, keys] @ q[b, h, t] / E**0.5
                found[b, h, t] = scores.softmax(0) @ v[b, head, keys]
    return found


def documents():
    """Two documents a row, and one row of a single one."""
    of_token = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    places = torch.arange(T).expand(B, T)
    return attention.Packed(of_token, places)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_written_out_attention_and_its_gradients_are_those_of_a_plain_loop(packed, dtype, off):
    torch.manual_seed(0)
    shapes = ((B, H, T, E), (B, K, T, E), (B, K, T, E))
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    wanted = [tensor.clone().requires_grad_() for tensor in given]
    mine = [tensor.to(dtype).requires_grad_() for tensor in given]
    mask = documents().mask if packed else None
    seen = mask[:, 0] if packed else torch.ones(B, T, T, dtype=torch.bool).tril()
    upstream = torch.randn(B, H, T, E, dtype=torch.float64)

    found = attention.written_out(*mine, mask)
    right = one_by_one(*wanted, seen)
    found.backward(upstream.to(dtype))
    right.backward(upstream)

    assert (found.double() - right).norm() <= off * right.norm()
    for one, other in zip(mine, wanted):
        assert (one.grad.double() - other.grad).norm() <= off * other.grad.norm()


@pytest.mark.parametrize(
    "dtype, tokens, is_written",
    [
        (torch.bfloat16, 9, True),
        (torch.bfloat16, attention.SHORT + 1, False),
        (torch.float32, 9, False),
    ],
)
def test_only_short_rows_in_half_precision_are_written_out(monkeypatch, dtype, tokens, is_written):
    calls = []
    whole = attention.written_out

    def counted(*tensors):
        calls.append(tensors)
        return whole(*tensors)

    monkeypatch.setattr(attention, "written_out", counted)
    q = torch.randn(1, 2, tokens, 4, dtype=dtype, requires_grad=True)
    k = torch.randn(1, 1, tokens, 4, dtype=dtype)
    attention.attend(q, k, k, LayerCache())
    assert bool(calls) == is_written
    calls.clear()
    attention.attend(q.detach(), k, k, LayerCache())
    assert not calls  # nothing to take back: the fused kernel is as fast


class Largest(TorchDispatchMode):
    """The most numbers that an operation has given in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_many_scores_after_a_prefix_are_computed_in_parts(monkeypatch, rows, masked):
    torch.manual_seed(0)
    before = 20
    q = torch.randn(rows, H, T, E, dtype=torch.float64)
    k, v = (torch.randn(rows, K, T, E, dtype=torch.float64) for _ in range(2))
    past = [torch.randn(1, K, before, E, dtype=torch.float64) for _ in range(2)]
    mask = documents().mask[:rows] if masked else None
    with Largest() as whole:
        expected = attention.attend_after_prefix(q, k, v, mask, past)
    monkeypatch.setattr(attention, "SCORES", 2 * H * (before + T))  # of two queries
    with Largest() as parts:
        found = attention.attend_after_prefix(q, k, v, mask, past)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert whole.numbers == rows * H * T * (before + T)
    one_query_a_row = rows * H * (before + T)
    assert parts.numbers <= max(attention.SCORES, one_query_a_row, q.numel())
