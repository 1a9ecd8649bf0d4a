"""What a GPU alone runs for good: whole compiled graphs, fused kernels, bfloat16, estimates of memory.

On a CPU the same checks run with stand-ins (the compiler's front end, kernels unfused), so that they are tested too.
"""

import pytest
import torch
import torch.nn.functional as F
from ia2mini.models import Taps, load
from ia2mini.models.attention import LayerCache, attend, expanded, heads_as_rows
from reference import make_checkpoint, make_rows, random_ids, relative, starts
from test_train import adam_step
from torch.nn.attention import SDPBackend, sdpa_kernel

from ia2mini.adapters import LoRA, adapted
from ia2mini.batch import TokenRow, collate
from ia2mini.losses import activation_mse, squared_error
from ia2mini.scale.blocks import compile_blocks
from ia2mini.scale.memory import run_bytes
from ia2mini.scale.pack import pack
from ia2mini.train import State, run_losses

GPU = torch.cuda.is_available()
DEVICE, BACKEND = ("cuda", "inductor") if GPU else ("cpu", "eager")
only_gpu = pytest.mark.skipif(not GPU, reason="asks the GPU's allocator or its kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2)


def gradient(model, phase: str, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [R] and gradient [R, M] of two runs."""
    adapter = LoRA(model)
    theta = (starts(adapter, model, 2) + 0.02).to(DEVICE).requires_grad_()
    rows = [
        [TokenRow(r.prompt, r.answer, r.activations.to(DEVICE, dtype)) for r in make_rows(4, s)]
        for s in range(2)
    ]
    batch = pack(collate(rows)).to(torch.device(DEVICE))
    with adapted(model, adapter, theta) as student:
        found = run_losses(student, batch, {phase: torch.ones(2, device=DEVICE)})
        return found.detach(), *torch.autograd.grad(found.sum(), theta)


@pytest.mark.parametrize("phase", ["mse", "ce"] if GPU else ["ce"])
def test_compiled_as_one_graph_a_step_is_the_same(folder, phase):
    plain, model = gradient(load(folder, device=DEVICE)[0], phase), load(folder, device=DEVICE)[0]
    compile_blocks(model, backend=BACKEND, fullgraph=True)
    for one, other in zip(gradient(model, phase), plain, strict=True):
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize("phase", ["mse", "ce"])
def test_bfloat16_is_near_float32(folder, phase):
    """Losses, gradients and taps, on weights that are the same in both."""
    wide, narrow = (
        load(folder, torch.bfloat16, DEVICE)[0].float(),
        load(folder, torch.bfloat16, DEVICE)[0],
    )
    (loss, grad), (exact, true) = gradient(narrow, phase, torch.bfloat16), gradient(wide, phase)
    assert relative(loss, exact) < 0.02 and relative(grad, true) < 0.1
    ids, found = random_ids(2, 9).to(DEVICE), []
    for model in (narrow, wide):
        model(ids, taps=(taps := Taps()), logits=False)
        found.append(taps.stack().float())
    assert 0 < relative(*found) < 0.02


def test_fused_kernels_equal_eager_ones():
    outputs = [torch.randn(33, 257, device=DEVICE).bfloat16().requires_grad_() for _ in range(3)]
    targets, weight = (
        torch.randn(3, 33, 257, device=DEVICE).bfloat16(),
        torch.rand(33, device=DEVICE),
    )
    found = []
    for loss in (
        activation_mse,
        lambda o, t: (torch.stack(o).double() - t.double()).square().mean(-1).sum(0),
    ):
        value = loss(outputs, targets)
        found.append(
            (
                value.double(),
                *(g.double() for g in torch.autograd.grad((value * weight).sum(), outputs)),
            )
        )
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 5e-3
    theta, rates = (
        torch.randn(3, 50, device=DEVICE),
        torch.tensor([1e-3, 1e-2, 1e-1], device=DEVICE),
    )
    ours = State.begin(theta)
    rows = [row.clone().requires_grad_() for row in theta]
    theirs = [torch.optim.Adam([row], lr=rate.item()) for row, rate in zip(rows, rates)]
    for seed in range(5):
        step = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        adam_step(ours, step, rates)
        for row, optimizer, grad in zip(rows, theirs, step):
            row.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(
        ours.theta.detach(), torch.stack([row.detach() for row in rows]), rtol=1e-5, atol=1e-6
    )


@only_gpu
def test_nothing_runs_unfused_there(recwarn):
    squared_error(torch.randn(4, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE))
    assert not [warning for warning in recwarn if "unfused" in str(warning.message)]


@only_gpu
def test_masked_attention_has_a_fused_kernel():
    q, k, v = (
        torch.randn(2, heads, 40, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=DEVICE).tril()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        fused = heads_as_rows(q, k, v, mask)
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(fused.float(), heads_as_rows(q, k, v, mask).float()) < 0.02


@pytest.mark.parametrize("heads, shared", [(8, 2), (6, 6), (4, 1)])
def test_attention_with_copied_heads_is_attention_with_shared_ones(heads, shared):
    q, k, v = (
        torch.randn(2, count, 13, 16, device=DEVICE).requires_grad_()
        for count in (heads, shared, shared)
    )
    found = []
    for z in (
        expanded(q, k, v),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ):
        found.append((z, *torch.autograd.grad(z.square().sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@only_gpu
def test_float32_attention_has_a_fused_kernel():
    q, k, v = (torch.randn(2, heads, 40, 64, device=DEVICE) for heads in (8, 2, 2))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        fused = attend(q, k, v, LayerCache())
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(fused, attend(q, k, v, LayerCache())) < 1e-3


@only_gpu
def test_the_estimate_of_memory_is_near_what_a_step_takes(tmp_path):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    path = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=8, num_key_value_heads=4, **sizes)
    model = load(path, torch.bfloat16, DEVICE)[0]
    adapter, peak = LoRA(model), {}
    for runs in (2, 10):
        theta = starts(adapter, model, runs).to(DEVICE)
        targets = torch.randn(8, 100, 512, device=DEVICE).bfloat16()
        rows = [
            [TokenRow(list(range(5, 55)), [5] * 100, targets) for _ in range(4)]
            for _ in range(runs)
        ]
        state, batch = State.begin(theta), collate(rows).to(torch.device(DEVICE))
        mix = {"mse": torch.ones(runs, device=DEVICE)}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with adapted(model, adapter, state.theta) as student:
            (gradient_now,) = torch.autograd.grad(
                run_losses(student, batch, mix).sum(), state.theta
            )
            adam_step(state, gradient_now, torch.ones(runs, device=DEVICE))
        peak[runs] = torch.cuda.max_memory_allocated() - before
    each = run_bytes(model.config, 4 * 149, 0, 2, 0)
    assert peak[10] - peak[2] == pytest.approx(8 * each, rel=0.35)
