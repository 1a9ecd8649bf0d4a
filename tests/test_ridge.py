"""IA2 in closed form against scikit-learn's ridge regression and against what it is for."""

import pytest
import torch
from ia2mini.models import load
from ia2mini.models.taps import Taps
from reference import make_checkpoint, make_rows, relative
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from test_methods import make_grid

from ia2mini import UsageError
from ia2mini.adapters import IA3, LoRA, adapted, unpack
from ia2mini.batch import collate
from ia2mini.methods import METHODS
from ia2mini.ridge import STRENGTHS, ridge_regression, solve
from ia2mini.train import run_losses


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("positions, noise", [(5, 0.01), (5, 3.0), (40, 0.5)])
def test_ridge_is_scikit_learns_at_the_strength_that_predicts_left_out_positions_best(
    positions, noise
):
    x = random(2, positions, 12) * torch.tensor([1.0, 30.0])[:, None, None]
    y = x @ random(2, 12, 7, seed=1) + noise * random(2, positions, 7, seed=2)
    left, size, right = ridge_regression(x, y)
    found = (left * size[:, None]) @ right.mT  # [R, out, in]
    for run in range(2):
        a, b = x[run].numpy(), y[run].numpy()
        unit = (a**2).sum(1).mean()
        models = [Ridge(alpha=strength * unit, fit_intercept=False) for strength in STRENGTHS]
        errors = [
            ((cross_val_predict(model, a, b, cv=LeaveOneOut()) - b) ** 2).sum() for model in models
        ]
        best = models[min(range(len(models)), key=errors.__getitem__)].fit(a, b)
        torch.testing.assert_close(found[run], torch.from_numpy(best.coef_), rtol=1e-6, atol=1e-8)


def test_each_layer_makes_up_for_what_it_lacks(model):
    """As many positions as LoRA has ranks, next to no penalty: the outputs are the wanted ones, layer after layer."""
    adapter, rows = LoRA(model, rank=6), make_rows(3, 5)
    theta, batch = adapter.init(torch.Generator().manual_seed(0))[None], collate([rows])
    found = solve(model, adapter, theta, batch)

    def error(theta) -> float:
        with torch.no_grad(), adapted(model, adapter, theta) as student:
            return run_losses(student, batch, {"mse": torch.ones(1)}).item()

    assert sum(len(row.answer) for row in rows) <= 6 and error(found) < 0.05 * error(theta)
    before, after = unpack(theta, adapter.shapes), unpack(found, adapter.shapes)
    for name in before:
        # nothing else is touched
        assert torch.equal(before[name], after[name]) or ".o_proj." in name


def test_the_first_layer_equals_a_regression_written_out(model):
    adapter, rows = LoRA(model, rank=8, alpha=4.0), make_rows(4, 7)
    theta, batch = adapter.init(torch.Generator().manual_seed(1))[None], collate([rows])
    read, tap = [], Taps(batch.at)
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: read.append(args[0])
    )
    with torch.no_grad():
        model(batch.ids, taps=tap, logits=False)
    handle.remove()
    share = batch.weights[0].double().sqrt()[:, None]
    x, y = (
        read[0][batch.at].double() * share,
        (batch.activations[0] - tap.outputs[0]).double() * share,
    )
    left, size, right = (t[0] for t in ridge_regression(x[None], y[None]))
    wanted = (left[:, :8] * size[:8]) @ right[:, :8].T  # cut to the rank
    parts = unpack(solve(model, adapter, theta, batch), adapter.shapes)
    A, B = (parts[f"model.layers.0.self_attn.o_proj.{name}"][0].double() for name in "AB")
    torch.testing.assert_close(0.5 * B @ A, wanted, rtol=1e-4, atol=1e-6)


def test_runs_of_a_batch_are_solved_as_each_alone(model):
    # of unequal numbers of positions
    adapter, runs = LoRA(model), [make_rows(4, 3), make_rows(3, 9)]
    theta = torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(2)])
    both = solve(model, adapter, theta, collate(runs))
    for run in range(2):
        alone = solve(model, adapter, theta[[run]], collate([runs[run]]))
        A, B = (
            [t[place] for t in unpack(x, adapter.shapes).values()]
            for x, place in ((both, run), (alone, 0))
        )
        for i in range(0, len(A), 2):
            torch.testing.assert_close(A[i + 1] @ A[i], B[i + 1] @ B[i], rtol=1e-3, atol=1e-5)


def test_as_a_method_it_has_no_steps_and_sft_goes_on_from_it(model):
    grid = make_grid(model, "lora")
    found = METHODS["ridge"](grid)
    assert found.steps.tolist() == [0] * 4 and torch.equal(found.theta[0], found.theta[1])
    assert not torch.equal(found.theta[0], found.theta[2]) and found.dev_loss.isfinite().all()
    then = METHODS["ridge-sft"](grid)
    assert (then.steps > 0).all() and not torch.equal(then.theta, found.theta)


def test_granites_multiplier_is_taken_off_the_wanted_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr("ia2mini.ridge.STRENGTHS", (1e-3,))
    changes = {"residual_multiplier": 0.3, "attention_multiplier": 0.35, "num_hidden_layers": 2}
    model = load(make_checkpoint(tmp_path, "granite", **changes))[0]
    adapter, batch = LoRA(model, rank=6), collate([make_rows(3, 5)])
    theta = adapter.init(torch.Generator().manual_seed(0))[None]
    found = solve(model, adapter, theta, batch)
    taps = Taps(batch.at)
    with torch.no_grad(), adapted(model, adapter, found) as student:
        student(batch.ids, taps=taps, logits=False)
    assert relative(taps.stack(), batch.activations) < 0.02


def test_olmo_2_is_refused(tmp_path):
    model = load(make_checkpoint(tmp_path, "olmo2"))[0]
    adapter, batch = LoRA(model), collate([make_rows(3, 5)])
    theta = adapter.init(torch.Generator().manual_seed(0))[None]
    with pytest.raises(UsageError, match="OLMo 2 normalises"):
        solve(model, adapter, theta, batch)


def test_it_is_for_lora_on_the_output_map(model):
    batch = collate([make_rows(2, 0)])
    for adapter in (IA3(model), LoRA(model, ("q_proj",))):
        with pytest.raises(UsageError, match="o_proj"):
            solve(model, adapter, torch.zeros(1, len(adapter.init(torch.Generator()))), batch)
