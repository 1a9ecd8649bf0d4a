"""Losses and their gradients against naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from ia2mini import losses
from ia2mini.batch import TokenRow, collate
from ia2mini.losses import activation_mse, cross_entropy, kl_divergence, per_run


def test_losses_equal_naive_loops():
    outputs, targets = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    states, head, answer, teacher = (
        torch.randn(3, 5),
        torch.randn(7, 5),
        torch.tensor([4, 0, 6]),
        torch.randn(3, 7).log_softmax(-1),
    )
    logits = states @ head.T
    top, ids = teacher.topk(3)
    expected = {"mse": [], "ce": [], "kl": [], "top": []}
    for p in range(3):
        probabilities = [
            math.exp(x) / sum(math.exp(y) for y in logits[p].tolist()) for x in logits[p].tolist()
        ]
        layers = [
            [(outputs[m, p, d] - targets[m, p, d]).item() ** 2 for d in range(5)] for m in range(2)
        ]
        expected["mse"].append(sum(layers[0]) / 5 + sum(layers[1]) / 5)
        expected["ce"].append(-math.log(probabilities[answer[p]]))
        expected["kl"].append(
            sum(
                math.exp(t) * (t - math.log(q))
                for t, q in zip(teacher[p].tolist(), probabilities, strict=True)
            )
        )
        kept = [math.exp(t) / sum(math.exp(u) for u in top[p].tolist()) for t in top[p].tolist()]
        expected["top"].append(
            sum(
                t * (math.log(t) - math.log(probabilities[i]))
                for t, i in zip(kept, ids[p].tolist(), strict=True)
            )
        )
    every = torch.arange(7).expand(3, 7)
    found = {"mse": activation_mse(outputs, targets), "ce": cross_entropy(states, head, answer)}
    found |= {
        "kl": kl_divergence(states, head, teacher, every),
        "top": kl_divergence(states, head, top, ids),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values), rtol=1e-5, atol=1e-6)
    assert kl_divergence(teacher, torch.eye(7), teacher, every).abs().max() < 1e-6
    assert activation_mse(outputs.bfloat16(), targets.bfloat16()).dtype == torch.float32
    assert cross_entropy(states.bfloat16(), head.bfloat16(), answer).dtype == torch.float32


def test_a_run_averages_over_positions_then_over_rows():
    rows = [TokenRow([1], [1, 2]), TokenRow([1], [3])], [TokenRow([1], [1]), TokenRow([1], [2])]
    weights = collate(list(rows)).weights
    values = torch.tensor([1.0, 3.0, 10.0, 5.0, 7.0, 1000.0])  # the last one stands on padding
    assert per_run(values, weights).tolist() == [((1 + 3) / 2 + 10) / 2, (5 + 7) / 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_squared_error_equal_autograds(dtype):
    outputs = [torch.randn(4, 6).to(dtype).requires_grad_() for _ in range(3)]
    targets, weights = torch.randn(3, 4, 6).to(dtype), torch.tensor([0.5, 0.0, 2.0, 1.0])
    (activation_mse(outputs, targets) * weights).sum().backward()
    for output, target in zip(outputs, targets, strict=True):
        copy = output.detach().double().requires_grad_()
        (sum((copy - target.double()).T ** 2) / 6 * weights).sum().backward()
        assert output.grad.dtype == dtype
        torch.testing.assert_close(
            output.grad,
            copy.grad.to(dtype),
            rtol=2**-8 if dtype == torch.bfloat16 else 1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("portion", [1, 3, 100])
def test_losses_through_the_head_equal_torchs_with_their_gradients_in_portions(
    monkeypatch, dtype, portion
):
    monkeypatch.setattr(losses, "LOSS_LOGITS", 11 * portion)
    at_once, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: at_once.append(len(x)) or linear(x, weight))
    states, head, weights = (
        torch.randn(8, 5).to(dtype).requires_grad_(),
        torch.randn(11, 5).to(dtype),
        torch.rand(8),
    )
    targets, teacher = torch.randint(11, (8,)), torch.randn(8, 11).log_softmax(-1)
    top, ids = teacher.topk(4)
    logits = (copy := states.detach().clone().requires_grad_()) @ head.T
    hard = F.cross_entropy(logits.float(), targets, reduction="none")
    rest = torch.full_like(teacher, -torch.inf).scatter(1, ids, top.log_softmax(-1))
    soft = F.kl_div(logits.float().log_softmax(-1), rest.exp(), reduction="none").sum(-1)
    for found, expected in (
        (cross_entropy(states, head, targets), hard),
        (kl_divergence(states, head, top, ids), soft),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        ours, theirs = (
            torch.autograd.grad((v * weights).sum(), x, retain_graph=True)[0]
            for v, x in ((found, states), (expected, copy))
        )
        assert max(at_once) == min(portion, 8), "logits of so many positions are there at once"
        torch.testing.assert_close(
            ours, theirs, **({} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.02})
        )
