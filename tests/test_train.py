"""The loop: its losses against transformers row by row, its Adam against torch's, runs side by side against alone."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import (
    MIXES,
    from_start,
    in_order,
    make_rows,
    peft_twin,
    plain_loss,
    relative,
    starts,
)

from ia2mini.adapters import IA3, LoRA, adapted, unpack
from ia2mini.batch import TokenRow, collate
from ia2mini.losses import per_run
from ia2mini.scale.memory import within_memory
from ia2mini.scale.pack import in_batches, pack
from ia2mini.scale.parts import put_state, take_state
from ia2mini.scale.race import FIRST, Race
from ia2mini.scale.shrink import shrinking
from ia2mini.train import Hooks, Runs, Settings, State, adam, run_losses, train, train_runs

ADAPTERS = {
    "lora": LoRA,
    "ia3": IA3,
    "ia3-inputs": lambda m: IA3(m, scale_inputs=True),
}
TRAINERS = {"plain": train, "shrinking": from_start(shrinking(train))}


def watching(*looks: Callable) -> Hooks:
    """Hooks that call each of `looks` with the state after every look."""

    def after_evaluation(state: State) -> bool:
        for look in looks:
            look(state)
        return False

    return Hooks(after_evaluation=after_evaluation)


def adam_step(state: State, gradient: torch.Tensor, rates: torch.Tensor) -> None:
    """One step of Adam by a gradient [R, M], with a rate a run [R]."""
    adam(state.theta.detach(), gradient, state.m, state.v, state.t, rates[:, None])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3-inputs"])
def test_losses_of_a_batch_equal_the_plain_ones(folder, model, kind, mix, packed):
    adapter = ADAPTERS[kind](model)
    theta = starts(adapter, model, 2) + 0.05 * torch.randn(2, 1)
    rows = [make_rows(3, seed) for seed in range(2)]
    weights = {name: torch.tensor([w, 2 * w]) for name, w in MIXES[mix].items()}
    batch = pack(collate(rows)) if packed else collate(rows)
    assert (batch.packed is not None) == packed
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        found = run_losses(student, batch, weights)
        for r in range(2):
            twin = peft_twin(folder, adapter, theta[r])
            expected = sum(plain_loss(twin, row, MIXES[mix]).item() for row in rows[r]) / 3
            assert found[r].item() == pytest.approx((1 + r) * expected, rel=1e-5)


def test_adam_equals_torchs_with_a_rate_a_run_and_runs_that_leave():
    theta, rates = torch.randn(3, 11), torch.tensor([1e-3, 1e-1, 1e-2])
    separate = [torch.nn.Parameter(row.clone()) for row in theta]
    theirs = [
        torch.optim.Adam([p], lr=rate.item()) for p, rate in zip(separate, rates, strict=True)
    ]
    ours, live = State.begin(theta), [0, 1, 2]
    for step in range(12):
        gradients = torch.randn(3, 11) * 10.0 ** torch.randint(-6, 2, (3, 11))
        adam_step(ours, gradients[live], rates[live])
        for r in live:
            separate[r].grad = gradients[r].clone()
            theirs[r].step()
            torch.testing.assert_close(ours.theta[live.index(r)], separate[r], rtol=1e-6, atol=1e-6)
        if step == 5:
            live = [0, 2]
            ours = take_state(ours, torch.tensor([0, 2]))


def test_a_rate_far_behind_leaves_the_race():
    """Two sets with three rates; their means: one falls to 1, one stands at 1.5, one falls fast enough to catch up."""
    theta, config = torch.zeros(6, 1), torch.tensor([0, 1, 2, 0, 1, 2])

    def race(lost: Callable, looks: int, config=config) -> list[list[bool]]:
        state, seen = State.begin(theta), []
        after_evaluation = Race(config) if config is not None else lambda state: False
        for look in range(1, looks + 1):
            state.step = look
            state.note(lost(look), Settings(patience=99))
            assert not after_evaluation(state), "it is the loop that ends when no run is left"
            seen.append(state.going.tolist())
        return seen

    def lost(look: int) -> torch.Tensor:
        return torch.tensor([1.0, 1.0, 4 - 0.1 * look, 1.0, 2.0, 4 - 0.1 * look]) + 1 / look**3

    for look, going in enumerate(race(lost, 14), 1):
        assert going == [True, look < FIRST, True] * 2, look
    assert all(map(all, race(lost, 14, None)))
    for look, going in enumerate(
        race(lambda look: lost(look) + torch.tensor([0, 0, 0.0999 * look] * 2), 14), 1
    ):
        # too slow: 30 looks of .0001 are not enough
        assert going == [True, look < FIRST, look < FIRST] * 2
    # from 2 to just below, or just above, 1 in 30 looks more
    for pace, stays in ((0.034, True), (0.033, False)):
        near = race(
            lambda look, pace=pace: torch.tensor([1, 9, 2 + pace * (FIRST - look)] * 2),
            FIRST,
        )[-1]
        assert near == [True, False, stays] * 2
    diverged = race(lambda look: lost(look) + torch.tensor([0, 0, 0, 0, 0, torch.nan]), 10)[-1]
    assert diverged == [True, False, False] * 2
    assert not any(race(lambda look: torch.full((6,), torch.nan), 1)[0])


def test_a_run_that_has_ended_counts_with_what_it_reached():
    state, race, once = (
        State.begin(torch.zeros(4, 1)),
        Race(torch.tensor([0, 1, 0, 1])),
        Settings(patience=1),
    )
    state.note(torch.tensor([1.0, 1.9, 3.0, 3.0]), once)
    race(state)
    state.note(torch.tensor([1.0, 1.9, 1.5, 1.5]), once)  # the first set's runs end, and leave
    race(state)
    assert state.going.tolist() == [False, False, True, True]
    left = take_state(state, torch.tensor([2, 3]))
    for look in range(3, FIRST + 1):
        left.note(torch.tensor([3.0, 3.0]) / look, once)
        race(left)
        assert left.going.all()
    assert race.means[-1].tolist() == pytest.approx([0.65, 1.1])


def test_a_race_needs_all_runs_side_by_side():
    """Of runs in parts none leaves, nor of the last part when all others have ended."""
    whole, race, losses = (
        State.begin(torch.zeros(4, 1)),
        Race(torch.tensor([0, 1, 0, 1])),
        torch.tensor([1.0, 2.0]),
    )
    for part in (take_state(whole, torch.tensor([0, 1])), take_state(whole, torch.tensor([2, 3]))):
        for _ in range(FIRST + 2):
            part.note(losses, Settings(patience=99))
            assert not race(part) and part.going.all()
    assert race.means == []


def test_a_race_that_memory_has_cut_into_parts_is_over():
    """All runs have begun side by side, and some have ended before memory ran out."""
    config, losses, patient = (
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([1.0, 2.0, 1.0, 2.0]),
        Settings(patience=99),
    )
    race, together, again = (
        Race(config),
        State.begin(torch.zeros(4, 1)),
        State.begin(torch.zeros(4, 1)),
    )
    for _ in range(FIRST - 1):
        together.note(losses, patient)
        together.going[2:] = False
        race(together)
    assert len(race.means) == FIRST - 1
    for part in (take_state(again, torch.tensor([2, 3])), take_state(again, torch.tensor([0, 1]))):
        for _ in range(FIRST + 2):
            part.note(losses[part.index], patient)
            race(part)
            assert part.going.all()


def four_runs(model, kind="lora", mix="mixed") -> tuple:
    """Arguments of `train`: runs that end at different steps within 12 epochs, by a patience of 2."""
    adapter, R = ADAPTERS[kind](model), 4
    weights = {name: torch.linspace(w, 2 * w, R) for name, w in MIXES[mix].items()}
    rows = [[make_rows(4, seed + r) for r in range(R)] for seed in (0, 50)]
    orders = [partial(in_order, r) for r in range(R)]
    rates = torch.tensor([1e-1, 1e-3, 3e-2, 3e-4])
    return (
        model,
        adapter,
        Runs(starts(adapter, model, R), rates, *rows, weights, orders),
        Settings(2, 12, 2),
    )


def test_runs_in_parts_do_not_race(model):
    """Two sets with the same two rates, of which one is beaten where all four runs train side by side."""
    model, adapter, runs, _ = four_runs(model)
    runs.rates = torch.tensor([3e-2, 1e-6] * 2)
    settings = Settings(batch_size=2, epochs=12, patience=99)

    def steps(trainer: Callable, racing: bool) -> list[int]:
        hooks = Hooks(after_evaluation=Race(torch.tensor([0, 1, 0, 1]))) if racing else Hooks()
        return trainer(model, adapter, runs, settings, hooks=hooks).last_step.tolist()

    whole, raced = steps(train, False), steps(train, True)
    assert whole == [24] * 4 and raced[1] == raced[3] < 24, "the smallest rate is beaten"
    assert steps(from_start(within_memory(shrinking(train), 2)), True) == whole
    assert steps(from_start(within_memory(shrinking(train), 3)), True) == whole
    assert steps(from_start(within_memory(shrinking(train))), True) == raced


@pytest.mark.parametrize("kind, mix", [("lora", "mixed"), ("ia3", "soft")])
def test_the_plain_loop_equals_the_loop_with_all_that_wraps_it(model, kind, mix):
    """Runs leave, rows are packed, and memory holds two runs."""
    arguments, tried = four_runs(model, kind, mix), []
    whole = arguments[2]

    def crowded(model, adapter, runs, *more):
        tried.append(len(runs))
        if len(runs) > 2:
            raise torch.OutOfMemoryError
        return train(model, adapter, runs, *more)

    plain = train(*arguments)
    with pytest.warns(UserWarning, match="out of memory with 4 runs"):
        trainer = from_start(within_memory(shrinking(crowded)))
        wrapped = trainer(*arguments, hooks=Hooks(collate=in_batches))
    assert tried[:2] == [4, 2] and tried.count(2) >= 2 and (kind == "ia3" or 1 in tried)
    assert any(batch.packed is not None for batch in in_batches(whole.train))
    assert kind == "ia3" or len(set(plain.last_step.tolist())) > 1, "runs end at different steps"
    for name in ("index", "last_step", "best_step", "broken_step", "going"):
        assert torch.equal(getattr(plain, name), getattr(wrapped, name)), name
    for r in range(4):
        assert relative(wrapped.best_theta[r], plain.best_theta[r]) <= 1e-5
        assert relative(plain.best_theta[r], whole.theta[r]) > 1e-3
    torch.testing.assert_close(wrapped.dev_loss, plain.dev_loss, rtol=1e-5, atol=0)


def test_a_state_taken_apart_and_put_together_goes_on_bit_for_bit(model):
    arguments = four_runs(model)
    whole = train(*arguments)
    stopped = train(*arguments, hooks=Hooks(after_evaluation=lambda state: state.step >= 6))
    assert stopped.step == 6 < whole.step
    again = State.begin(torch.zeros_like(stopped.theta.detach()))
    for places in (torch.tensor([3, 1]), torch.tensor([0, 2])):
        part = take_state(stopped, places)
        assert (
            part.index.tolist() == places.tolist()
            and part.theta.is_leaf
            and part.theta.requires_grad
        )
        put_state(again, places, part)
    stopped.theta.detach().zero_()  # what was put together is its own
    found = train(*arguments, again)
    for field in fields(State):
        mine, theirs = (
            torch.as_tensor(getattr(state, field.name)).detach() for state in (found, whole)
        )
        assert mine.numpy().tobytes() == theirs.numpy().tobytes(), field.name
    assert (whole.best_theta != State.begin(arguments[2].theta).best_theta).any()


@pytest.mark.parametrize(
    "kind, mix", [("lora", "mixed"), ("ia3", "ia2"), ("ia3", "soft"), ("ia3-inputs", "sft")]
)
def test_runs_side_by_side_equal_alone_in_any_order(model, kind, mix):
    adapter, R, settings = ADAPTERS[kind](model), 6, Settings(batch_size=2, epochs=10, patience=99)
    theta, rates = starts(adapter, model, R), torch.tensor([1e-2, 3e-3, 1e-3] * 2)
    train, dev = [make_rows(4, r) for r in range(R)], [make_rows(2, 100 + r) for r in range(R)]

    def trained(runs):
        weights = {name: torch.full((len(runs),), w) for name, w in MIXES[mix].items()}
        rows = [[data[r] for r in runs] for data in (train, dev)]
        orders = [partial(in_order, r) for r in runs]
        return train_runs(
            model, adapter, Runs(theta[runs], rates[runs], *rows, weights, orders), settings
        )

    together, shuffled = trained([0, 1, 2, 3, 4, 5]), trained([4, 2, 5, 0, 3, 1])
    assert together.steps.tolist() == [20] * R
    for r in range(R) if kind == "lora" else (1, 4):
        alone, again = trained([r]), [4, 2, 5, 0, 3, 1].index(r)
        assert relative(together.theta[r], alone.theta[0]) <= 1e-5
        assert relative(shuffled.theta[again], alone.theta[0]) <= 1e-5
        assert together.dev_loss[r].item() == pytest.approx(alone.dev_loss[0].item(), rel=1e-5)
        assert relative(alone.theta[0], theta[r]) > 1e-3


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("batch_size", [2, 4])
def test_runs_that_stop_at_different_steps_equal_alone(model, batch_size, trainer):
    adapter, R, settings = LoRA(model), 6, Settings(batch_size, epochs=12, patience=2)
    theta, rates = starts(adapter, model, R), torch.tensor([1e-1, 1e-4, 3e-2, 1e-3, 5e-2, 1e-2])
    train, dev = [make_rows(4, r) for r in range(R)], [make_rows(2, 50 + r) for r in range(R)]
    beta, seen = torch.linspace(0.1, 0.9, R), []

    def trained(runs, *watch):
        weights, rows = (
            {"mse": 1 - beta[runs], "ce": beta[runs]},
            [[data[r] for r in runs] for data in (train, dev)],
        )
        orders = [partial(in_order, r) for r in runs]
        given = Runs(theta[runs], rates[runs], *rows, weights, orders)
        return TRAINERS[trainer](model, adapter, given, settings, hooks=watching(*watch)).trained()

    together = trained(
        list(range(R)), lambda state: seen.append((state.step, int(state.going.sum())))
    )
    assert len(set(together.steps.tolist())) >= 3
    assert seen[-1][0] == max(together.steps)
    assert all(
        live == (together.steps > step).sum() for step, live in seen if step < 48 / batch_size
    )
    for r in range(R):
        alone = trained([r])
        assert together.steps[r] == alone.steps[0]
        assert relative(together.theta[r], alone.theta[0]) <= 1e-5
        assert together.dev_loss[r].item() == pytest.approx(alone.dev_loss[0].item(), rel=1e-5)


def overfitting(model, **settings):
    """One run whose dev row asks for the answer that the base already gives and its training row for another."""
    adapter, looks, prompt = LoRA(model), [], [1, 2, 3]
    dev, mix = (
        [[TokenRow(prompt, [model(torch.tensor([prompt]))[0, -1].argmax().item()])]],
        {"ce": torch.ones(1)},
    )
    runs = Runs(
        starts(adapter, model, 1),
        torch.tensor([3e-2]),
        [[TokenRow(prompt, [4])]],
        dev,
        mix,
        [lambda epoch: [0]],
    )
    found = train_runs(
        model, adapter, runs, Settings(**settings), watching(lambda state: looks.append(state.step))
    )
    with torch.no_grad(), adapted(model, adapter, found.theta) as student:
        return found, looks, run_losses(student, collate(dev), mix).item()


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


def test_only_the_chosen_layers_are_aligned(model):
    adapter, batch = IA3(model), collate([make_rows(3, 0)])
    theta = starts(adapter, model, 1)
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        whole = run_losses(student, batch, {"mse": torch.ones(1)}).item()
        parts = []
        for layer in range(2):
            chosen = replace(batch, activations=batch.activations[[layer]])
            parts.append(run_losses(student, chosen, {"mse": torch.ones(1)}, [layer]).item())
    assert sum(parts) == pytest.approx(whole, rel=1e-6) and min(parts) > 0.01
    rows = [
        [replace(row, activations=row.activations[[0]]) for row in make_rows(2, seed)]
        for seed in (0, 1)
    ]
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
            # a look: both layers are wrong by the square root of half the loss
            if not torch.is_grad_enabled():
                taps.outputs = dict.fromkeys(
                    range(2), torch.full((1, 32), math.sqrt(next(script) / 2))
                )

    data = (
        [make_rows(1, 0)],
        [[TokenRow([1, 2], [3], torch.zeros(2, 1, 32))]],
        {"mse": torch.ones(1)},
    )
    runs = Runs(starts(adapter, model, 1), torch.tensor([1e-2]), *data, [lambda epoch: [0]])
    hooks = watching(lambda state: best.append(state.dev_loss[state.going].tolist()))
    found = train_runs(Student(), adapter, runs, Settings(patience=3), hooks)
    assert [[round(x, 4) for x in live] for live in best] == [
        [5.0],
        [5.0],
        [5.0],
        [4.0],
        [4.0],
        [4.0],
        [],
    ]
    assert found.steps.tolist() == [7] and found.dev_loss.item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    "rows, looks",
    [(5, [2, 3, 4, 6, 8, 9, 10, 12]), (4, [2, 4, 6, 8]), (2, [1, 2, 3, 4]), (1, [1, 2, 3, 4])],
)
def test_the_dev_loss_is_looked_at_after_every_second_step_and_each_epoch(model, rows, looks):
    adapter, seen = IA3(model), []
    settings = Settings(batch_size=2, epochs=4, patience=99)
    data = (
        [make_rows(rows, 0)],
        [make_rows(1, 1)],
        {"ce": torch.ones(1)},
        [lambda epoch: list(range(rows))],
    )
    runs = Runs(starts(adapter, model, 1), torch.tensor([1e-3]), *data)
    train_runs(model, adapter, runs, settings, watching(lambda state: seen.append(state.step)))
    assert seen == looks


def own_cross_entropy(student, batch):
    """A loss of one's own that computes what "ce" does, by torch, through all logits."""
    logits = student(batch.ids, logits=batch.at, cache=batch.packed)
    return per_run(F.cross_entropy(logits, batch.targets, reduction="none"), batch.weights)


@pytest.mark.parametrize("mix", ["sft", "mixed"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_loss_of_ones_own_trains_as_the_built_in_one_does(model, kind, mix):
    """Runs leave at different steps, and the own loss's weights with them."""
    adapter, R, settings, called = (
        ADAPTERS[kind](model),
        4,
        Settings(batch_size=2, epochs=8, patience=2),
        [],
    )
    theta, rates = starts(adapter, model, R), torch.tensor([1e-1, 1e-3, 3e-2, 1e-2])
    rows = [make_rows(4, r) for r in range(R)], [make_rows(2, 50 + r) for r in range(R)]

    def own(student, batch):
        called.append(len(batch.weights))
        return own_cross_entropy(student, batch)

    def trained(ce):
        shares = {
            ce if name == "ce" else name: torch.linspace(w, 2 * w, R)
            for name, w in MIXES[mix].items()
        }
        orders = [partial(in_order, r) for r in range(R)]
        return from_start(shrinking(train))(
            model, adapter, Runs(theta, rates, *rows, shares, orders), settings
        ).trained()

    ours, built_in = trained(own), trained("ce")
    assert ours.steps.tolist() == built_in.steps.tolist() and len(set(ours.steps.tolist())) > 1
    assert called[0] == R and called[-1] < R
    for r in range(R):
        assert (
            relative(ours.theta[r], built_in.theta[r]) <= 1e-5
            and relative(ours.theta[r], theta[r]) > 1e-3
        )
    torch.testing.assert_close(ours.dev_loss, built_in.dev_loss, rtol=1e-5, atol=0)
