"""The loop: its losses against transformers row by row, its Adam against torch's, runs side by side against alone."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import MIXES, in_order, make_rows, peft_twin, plain_loss, relative, starts

from ia2mini.adapters import (IA3, LoRA, adapted, unpack)
from ia2mini.batch import Row, collate
from ia2mini.losses import per_run
from ia2mini.train import (RACE_FROM, Adam, EarlyStopping, Runs, Settings, losses, train_runs)

ADAPTERS = {
    "lora": LoRA,
    "ia3": IA3,
    "ia3-inputs": lambda m: IA3(m, scale_inputs=True),
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3-inputs"])
def test_losses_of_a_batch_equal_the_plain_ones(folder, model, kind, mix, pack):
    adapter = ADAPTERS[kind](model)
    theta = starts(adapter, model, 2) + 0.05 * torch.randn(2, 1)
    rows = [make_rows(3, seed) for seed in range(2)]
    weights = {name: torch.tensor([w, 2 * w]) for name, w in MIXES[mix].items()}
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        found = losses(student, collate(rows, pack=pack), weights)
        for r in range(2):
            twin = peft_twin(folder, adapter, theta[r])
            expected = sum(plain_loss(twin, row, MIXES[mix]).item() for row in rows[r]) / 3
            assert found[r].item() == pytest.approx((1 + r) * expected, rel=1e-5)


def test_adam_equals_torchs_with_a_rate_a_run_and_runs_that_leave():
    theta, rates = torch.randn(3, 11), torch.tensor([1e-3, 1e-1, 1e-2])
    separate = [torch.nn.Parameter(row.clone()) for row in theta]
    theirs = [torch.optim.Adam([p], lr=rate.item()) for p, rate in zip(separate, rates, strict=True)]
    ours, live = Adam(theta, rates), [0, 1, 2]
    for step in range(12):
        gradients = torch.randn(3, 11) * 10.0 ** torch.randint(-6, 2, (3, 11))
        ours.step(gradients[live])
        for r in live:
            separate[r].grad = gradients[r].clone()
            theirs[r].step()
            torch.testing.assert_close(ours.theta[live.index(r)], separate[r], rtol=1e-6, atol=1e-6)
        if step == 5:
            live = [0, 2]
            ours.keep(torch.tensor([True, False, True]))


def test_a_rate_far_behind_leaves_the_race():
    """Two sets with three rates; their means: one falls to 1, one stands at 1.5, one falls fast enough to catch up."""
    theta, config = torch.zeros(6, 1), torch.tensor([0, 1, 2, 0, 1, 2])

    def race(lost: Callable, looks: int, config=config) -> list[list[bool]]:
        stopping, runs, seen = EarlyStopping(theta, Settings(patience=99), config), torch.arange(6), []
        for look in range(1, looks + 1):
            going = stopping.look(runs, theta, lost(look)[runs], step=look)
            seen.append([r in runs[going].tolist() for r in range(6)])
        return seen

    def lost(look: int) -> torch.Tensor:
        return torch.tensor([1.0, 1.0, 4 - 0.1 * look, 1.0, 2.0, 4 - 0.1 * look]) + 1 / look**3

    for look, going in enumerate(race(lost, 14), 1):
        assert going == [True, look < RACE_FROM, True] * 2, look
    assert all(map(all, race(lost, 14, None)))
    for look, going in enumerate(race(lambda look: lost(look) + torch.tensor([0, 0, 0.0999 * look] * 2), 14), 1):
        assert going == [True, look < RACE_FROM, look < RACE_FROM] * 2  # too slow: 30 looks of .0001 are not enough
    for pace, stays in ((0.034, True), (0.033, False)):  # from 2 to just below, or just above, 1 in 30 looks more
        near = race(lambda look, pace=pace: torch.tensor([1, 9, 2 + pace * (RACE_FROM - look)] * 2), RACE_FROM)[-1]
        assert near == [True, False, stays] * 2
    diverged = race(lambda look: lost(look) + torch.tensor([0, 0, 0, 0, 0, torch.nan]), 10)[-1]
    assert diverged == [True, False, False] * 2
    assert not any(race(lambda look: torch.full((6,), torch.nan), 1)[0])


def test_a_run_that_has_ended_counts_with_what_it_reached():
    stopping, theta = (
        EarlyStopping(torch.zeros(4, 1), Settings(patience=1), torch.tensor([0, 1, 0, 1])),
        torch.zeros(4, 1),
    )
    stopping.look(torch.arange(4), theta, torch.tensor([1.0, 1.9, 3.0, 3.0]), 1)
    for look in range(2, RACE_FROM):  # the first set's runs have ended
        assert stopping.look(torch.tensor([2, 3]), theta[:2], torch.tensor([3.0, 3.0]) / look, look).all()
    assert stopping.look(torch.tensor([2, 3]), theta[:2], torch.tensor([0.3, 0.3]), RACE_FROM).tolist() == [True, True]
    assert torch.stack(stopping.means)[-1].tolist() == pytest.approx([0.65, 1.1])


def test_a_race_needs_all_runs_side_by_side(model):
    runs = Runs(torch.zeros(2, 1), torch.ones(2), [[], []], [[], []], {}, [min, max], torch.tensor([0, 1]))
    assert runs.take(torch.tensor([1, 0])).config.tolist() == [1, 0] and runs.take(torch.tensor([1])).config is None


@pytest.mark.parametrize("kind, mix", [("lora", "mixed"), ("ia3", "ia2"), ("ia3", "soft"), ("ia3-inputs", "sft")])
def test_runs_side_by_side_equal_alone_in_any_order(model, kind, mix):
    adapter, R, settings = ADAPTERS[kind](model), 6, Settings(batch_size=2, epochs=10, patience=99)
    theta, rates = starts(adapter, model, R), torch.tensor([1e-2, 3e-3, 1e-3] * 2)
    train, dev = [make_rows(4, r) for r in range(R)], [make_rows(2, 100 + r) for r in range(R)]

    def trained(runs):
        weights = {name: torch.full((len(runs),), w) for name, w in MIXES[mix].items()}
        rows = [[data[r] for r in runs] for data in (train, dev)]
        orders = [partial(in_order, r) for r in runs]
        return train_runs(model, adapter, Runs(theta[runs], rates[runs], *rows, weights, orders), settings)

    together, shuffled = trained([0, 1, 2, 3, 4, 5]), trained([4, 2, 5, 0, 3, 1])
    assert together.steps.tolist() == [20] * R
    for r in range(R) if kind == "lora" else (1, 4):
        alone, again = trained([r]), [4, 2, 5, 0, 3, 1].index(r)
        assert relative(together.theta[r], alone.theta[0]) <= 1e-5
        assert relative(shuffled.theta[again], alone.theta[0]) <= 1e-5
        assert together.dev_loss[r].item() == pytest.approx(alone.dev_loss[0].item(), rel=1e-5)
        assert relative(alone.theta[0], theta[r]) > 1e-3


@pytest.mark.parametrize("batch_size", [2, 4])
def test_runs_that_stop_at_different_steps_equal_alone(model, batch_size):
    adapter, R, settings = LoRA(model), 6, Settings(batch_size, epochs=12, patience=2)
    theta, rates = starts(adapter, model, R), torch.tensor([1e-1, 1e-4, 3e-2, 1e-3, 5e-2, 1e-2])
    train, dev = [make_rows(4, r) for r in range(R)], [make_rows(2, 50 + r) for r in range(R)]
    beta, seen = torch.linspace(0.1, 0.9, R), []

    def trained(runs, watch=None):
        weights, rows = {"mse": 1 - beta[runs], "ce": beta[runs]}, [[data[r] for r in runs] for data in (train, dev)]
        orders = [partial(in_order, r) for r in runs]
        return train_runs(model, adapter, Runs(theta[runs], rates[runs], *rows, weights, orders), settings, watch)

    together = trained(list(range(R)), lambda step, live: seen.append((step, len(live))))
    assert len(set(together.steps.tolist())) >= 3
    assert seen[-1][0] == max(together.steps)
    assert all(live == (together.steps > step).sum() for step, live in seen if step < 48 / batch_size)
    for r in range(R):
        alone = trained([r])
        assert together.steps[r] == alone.steps[0]
        assert relative(together.theta[r], alone.theta[0]) <= 1e-5
        assert together.dev_loss[r].item() == pytest.approx(alone.dev_loss[0].item(), rel=1e-5)


def overfitting(model, **settings):
    """One run whose dev row asks for the answer that the base already gives and its training row for another."""
    adapter, looks, prompt = LoRA(model), [], [1, 2, 3]
    dev, mix = [[Row(prompt, [model(torch.tensor([prompt]))[0, -1].argmax().item()])]], {"ce": torch.ones(1)}
    runs = Runs(starts(adapter, model, 1), torch.tensor([3e-2]), [[Row(prompt, [4])]], dev, mix, [lambda epoch: [0]])
    found = train_runs(model, adapter, runs, Settings(**settings), lambda *look: looks.append(look))
    with torch.no_grad(), adapted(model, adapter, found.theta) as student:
        return found, [step for step, _ in looks], losses(student, collate(dev), mix).item()


def test_the_best_dev_state_is_kept_not_the_last(model):
    first, _, _ = overfitting(model, epochs=1)
    late, steps, again = overfitting(model, epochs=50, patience=4)
    assert steps == [1, 2, 3, 4, 5] and late.steps.tolist() == [5] and late.best.tolist() == [1]
    assert torch.equal(late.theta, first.theta) and torch.equal(late.dev_loss, first.dev_loss)
    assert again == pytest.approx(late.dev_loss.item(), rel=1e-6)
    assert overfitting(model, epochs=3, patience=99)[0].steps.tolist() == [3]


def test_the_released_scripts_keep_the_last_state(model):
    last, _, again = overfitting(model, epochs=3, patience=99, keep_last=True)
    best, _, _ = overfitting(model, epochs=3, patience=99)
    assert torch.equal(last.dev_loss, best.dev_loss) and not torch.equal(last.theta, best.theta)
    assert again > last.dev_loss.item() + 0.01


def test_exactly_so_many_steps_are_taken_and_the_last_weights_kept(model):
    last, _, _ = overfitting(model, epochs=3, patience=99, keep_last=True)
    exact, looks, again = overfitting(model, epochs=1, patience=1, steps=3)
    assert torch.equal(exact.theta, last.theta) and looks == []
    assert exact.steps.tolist() == exact.best.tolist() == [3] and again > last.dev_loss.item() + 0.01


def test_only_the_chosen_layers_are_aligned(model):
    adapter, batch = IA3(model), collate([make_rows(3, 0)])
    theta = starts(adapter, model, 1)
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        whole = losses(student, batch, {"mse": torch.ones(1)}).item()
        parts = []
        for layer in range(2):
            chosen = replace(batch, activations=batch.activations[[layer]])
            parts.append(losses(student, chosen, {"mse": torch.ones(1)}, [layer]).item())
    assert sum(parts) == pytest.approx(whole, rel=1e-6) and min(parts) > 0.01
    rows = [[replace(row, activations=row.activations[[0]]) for row in make_rows(2, seed)] for seed in (0, 1)]
    mix, rate = {"ce": torch.zeros(1), "mse": torch.ones(1)}, torch.tensor([1e-2])
    runs = Runs(theta, rate, [rows[0]], [rows[1]], mix, [lambda epoch: [0, 1]])
    moved = train_runs(model, adapter, runs, Settings(epochs=2, layers=[0])).theta - theta
    second = unpack(moved, adapter.shapes)["model.layers.1.self_attn.q_proj"]
    assert second.abs().max() == 0 and moved.abs().max() > 1e-3


def test_patience_counts_looks_since_the_last_improvement(model):
    adapter, best = LoRA(model), []
    script = iter([5.0, 6.0, 6.0, 4.0, 4.0, 7.0, 4.0, 3.0])  # an equal loss is no improvement

    class Student(torch.nn.Module):
        config = model.config

        def forward(self, ids, taps, **arguments):
            model(ids, taps=taps, **arguments)
            if not torch.is_grad_enabled():  # a look: both layers are wrong by the square root of half the loss
                taps.outputs = dict.fromkeys(range(2), torch.full((1, 32), math.sqrt(next(script) / 2)))

    data = [make_rows(1, 0)], [[Row([1, 2], [3], torch.zeros(2, 1, 32))]], {"mse": torch.ones(1)}
    runs = Runs(starts(adapter, model, 1), torch.tensor([1e-2]), *data, [lambda epoch: [0]])
    found = train_runs(Student(), adapter, runs, Settings(patience=3), lambda step, live: best.append(live.tolist()))
    assert [[round(x, 4) for x in live] for live in best] == [[5.0], [5.0], [5.0], [4.0], [4.0], [4.0], []]
    assert found.steps.tolist() == [7] and found.dev_loss.item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    "rows, looks", [(5, [2, 3, 4, 6, 8, 9, 10, 12]), (4, [2, 4, 6, 8]), (2, [1, 2, 3, 4]), (1, [1, 2, 3, 4])]
)
def test_the_dev_loss_is_looked_at_after_every_second_step_and_each_epoch(model, rows, looks):
    adapter, seen = IA3(model), []
    settings = Settings(batch_size=2, epochs=4, patience=99)
    data = [make_rows(rows, 0)], [make_rows(1, 1)], {"ce": torch.ones(1)}, [lambda epoch: list(range(rows))]
    runs = Runs(starts(adapter, model, 1), torch.tensor([1e-3]), *data)
    train_runs(model, adapter, runs, settings, lambda step, live: seen.append(step))
    assert seen == looks


def own_cross_entropy(student, batch):
    """A loss of one's own that computes what "ce" does, by torch, through all logits."""
    logits = student(batch.ids, logits=batch.at, cache=batch.packed)
    return per_run(F.cross_entropy(logits, batch.targets, reduction="none"), batch.weights)


@pytest.mark.parametrize("mix", ["sft", "mixed"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_loss_of_ones_own_trains_as_the_built_in_one_does(model, kind, mix):
    """Runs leave at different steps, and the own loss's weights with them."""
    adapter, R, settings, called = ADAPTERS[kind](model), 4, Settings(batch_size=2, epochs=8, patience=2), []
    theta, rates = starts(adapter, model, R), torch.tensor([1e-1, 1e-3, 3e-2, 1e-2])
    rows = [make_rows(4, r) for r in range(R)], [make_rows(2, 50 + r) for r in range(R)]

    def own(student, batch):
        called.append(len(batch.weights))
        return own_cross_entropy(student, batch)

    def trained(ce):
        shares = {ce if name == "ce" else name: torch.linspace(w, 2 * w, R) for name, w in MIXES[mix].items()}
        orders = [partial(in_order, r) for r in range(R)]
        return train_runs(model, adapter, Runs(theta, rates, *rows, shares, orders), settings)

    ours, built_in = trained(own), trained("ce")
    assert ours.steps.tolist() == built_in.steps.tolist() and len(set(ours.steps.tolist())) > 1
    assert called[0] == R and called[-1] < R
    for r in range(R):
        assert relative(ours.theta[r], built_in.theta[r]) <= 1e-5 and relative(ours.theta[r], theta[r]) > 1e-3
    torch.testing.assert_close(ours.dev_loss, built_in.dev_loss, rtol=1e-5, atol=0)
