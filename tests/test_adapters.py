"""Every adapter against peft's own on the same weights; runs in one batch against each alone; what detaching leaves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ia2mini.models import load
from reference import make_checkpoint, peft_twin, random_ids, twin_parameters, twin_theta
from test_train import adam_step

from ia2mini import UsageError
from ia2mini.adapters import EVERY_MATRIX, IA3, TARGETS, LoRA, adapted, find_linears, unpack
from ia2mini.train import State

MLP = ("gate_proj", "up_proj", "down_proj")
PEFT = {
    "lora": lambda m: LoRA(m),
    "lora-every-matrix": lambda m: LoRA(m, EVERY_MATRIX, rank=3, alpha=6.0),
    "lora-one-matrix": lambda m: LoRA(m, ("o_proj",), rank=2, alpha=8.0),
    "ia3": lambda m: IA3(m),
    "ia3-values-mlp": lambda m: IA3(m, ("v_proj", *MLP)),
    "ia3-inputs": lambda m: IA3(m, (*TARGETS, "down_proj"), scale_inputs=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2))[0]


def start(adapter, model, runs=1, noise=0.1):
    """First weights [R, M] of an adapter, moved away from zeros and ones."""
    rows = torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(runs)])
    return rows + noise * torch.randn(rows.shape, generator=torch.Generator().manual_seed(9))


def loss_of(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", PEFT)
def test_logits_gradients_and_adam_steps_equal_pefts(tiny, kind):
    folder, model = tiny
    adapter = PEFT[kind](model)
    theta, ids, targets = start(adapter, model), random_ids(3, 9), random_ids(3, 9)
    twin = peft_twin(folder, adapter, theta[0])
    theirs = torch.optim.Adam(twin_parameters(twin, adapter), lr=1e-2)
    ours, rate = State.begin(theta), torch.tensor([1e-2])
    for step in range(3):
        with adapted(model, adapter, ours.theta) as student:
            logits = student(ids)
            (gradient,) = torch.autograd.grad(loss_of(logits, targets), ours.theta)
        expected = twin(ids).logits[:, -ids.shape[1] :]
        theirs.zero_grad()
        loss_of(expected, targets).backward()
        assert (logits - expected).abs().max() <= 1e-5, step
        gradients = twin_theta(twin, adapter, gradients=True)
        assert relative(gradient[0], gradients) <= 1e-5 and gradients.norm() > 1e-3
        theirs.step()
        adam_step(ours, gradient, rate)
        torch.testing.assert_close(ours.theta[0], twin_theta(twin, adapter), rtol=0, atol=2e-5)
    assert (ours.theta - theta).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PEFT)
def test_runs_in_one_batch_equal_each_run_alone(model, kind):
    adapter, R, B = PEFT[kind](model), 3, 2
    theta, ids, targets = (
        start(adapter, model, R).requires_grad_(),
        random_ids(R * B, 7),
        random_ids(R * B, 7),
    )
    with adapted(model, adapter, theta) as student:
        together = student(ids)
    (R * loss_of(together, targets)).backward()
    for r in range(R):
        alone, rows = theta.detach()[r : r + 1].clone().requires_grad_(), slice(r * B, r * B + B)
        with adapted(model, adapter, alone) as student:
            logits = student(ids[rows])
        loss_of(logits, targets[rows]).backward()
        torch.testing.assert_close(together[rows], logits, rtol=0, atol=1e-5)
        assert relative(theta.grad[r], alone.grad[0]) <= 1e-5
    assert (together[:B] - together[B : 2 * B]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", PEFT)
def test_an_untrained_adapter_changes_nothing(model, kind):
    adapter, ids = PEFT[kind](model), random_ids(4, 6)
    theta = start(adapter, model, 2, noise=0)
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        assert (student(ids) - model(ids)).abs().max() <= 1e-6


def test_lora_starts_as_pefts_does(model):
    adapter = LoRA(model, ("q_proj", "down_proj"), rank=64)
    for name, value in unpack(start(adapter, model, noise=0), adapter.shapes).items():
        # kaiming_uniform_(a=√5): within 1 / √in
        bound = 0.0 if name.endswith("B") else value.shape[-1] ** -0.5
        assert 0.98 * bound <= value.abs().max() <= bound and value.std() == pytest.approx(
            bound / 3**0.5, rel=0.1
        )


@pytest.mark.parametrize("kind", PEFT)
def test_two_steps_move_every_tensor_and_no_bit_of_the_base(model, kind):
    before = copy.deepcopy(model.state_dict())
    adapter = PEFT[kind](model)
    theta = start(adapter, model, 2, noise=0)
    state, rates = State.begin(theta), torch.tensor([1e-2, 1e-3])
    for _ in range(2):  # LoRA's A moves only once B is no longer zero
        with adapted(model, adapter, state.theta) as student:
            loss = loss_of(student(random_ids(4, 6)), random_ids(4, 6))
            adam_step(state, *torch.autograd.grad(loss, state.theta), rates)
    for name, moved in unpack(state.theta.detach() - theta, adapter.shapes).items():
        assert moved.flatten(1).norm(dim=1).min() > 1e-5, name
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", PEFT)
def test_adapters_are_gone_after_the_block_even_after_an_error(model, kind):
    adapter, ids = PEFT[kind](model), random_ids(2, 6)
    theta, plain = start(adapter, model, noise=0.3), model(ids)
    with (
        pytest.raises(RuntimeError, match="in the block"),
        adapted(model, adapter, theta) as student,
    ):
        assert (student(ids) - plain).abs().max() > 1e-3
        raise RuntimeError("in the block")
    assert torch.equal(model(ids), plain)
    assert all(linear.adapted is None for linear in find_linears(model, EVERY_MATRIX).values())


def test_only_the_chosen_matrices_are_found(model):
    assert list(find_linears(model, TARGETS)) == [
        f"model.layers.{i}.self_attn.{t}" for i in range(2) for t in TARGETS
    ]
    assert list(find_linears(model, ("down_proj",))) == [
        f"model.layers.{i}.mlp.down_proj" for i in range(2)
    ]
    assert len(find_linears(model, EVERY_MATRIX)) == 2 * len(EVERY_MATRIX)


@pytest.mark.parametrize("kind", [LoRA, IA3])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"targets": ("q_proj", "query")}, r"target 'query' matches no matrix.*q_proj"),
        ({"targets": ("proj",)}, "target 'proj' matches no matrix"),
        ({"targets": ("lm_head",)}, "target 'lm_head' matches no matrix"),
    ],
)
def test_what_matches_nothing_is_named(model, kind, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        kind(model, **arguments)
    assert "\n" not in str(error.value)


def test_a_rank_below_one_is_refused(model):
    with pytest.raises(UsageError, match="rank 0"):
        LoRA(model, rank=0)


@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3-inputs"])
def test_weights_stay_float32_over_a_bfloat16_base(model, kind):
    half = copy.deepcopy(model).bfloat16()
    adapter, ids = PEFT[kind](half), random_ids(2, 6)
    theta = start(adapter, half).requires_grad_()
    with adapted(half, adapter, theta) as student:
        logits = student(ids)
    loss_of(logits, ids).backward()
    assert theta.dtype == theta.grad.dtype == torch.float32 and logits.dtype == torch.bfloat16
    with torch.no_grad(), adapted(model, PEFT[kind](model), theta) as student:
        assert relative(logits.float(), student(ids)) < 0.1


def test_packing_and_unpacking_are_inverse(model):
    adapter = LoRA(model, rank=2)
    theta = start(adapter, model, 3)
    parts = unpack(theta, adapter.shapes)
    assert {name: tuple(t.shape[1:]) for name, t in parts.items()} == adapter.shapes
    assert torch.equal(torch.cat([t[1].flatten() for t in parts.values()]), theta[1])
