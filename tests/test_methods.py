"""Every method against its phases trained by transformers one row at a time, and what phases and runs share."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from reference import make_rows, peft_twin, plain_fit, relative
from test_train import ADAPTERS, own_cross_entropy, watching

from ia2mini import UsageError
from ia2mini.batch import TokenRow, collate
from ia2mini.engine.experiment import make_trainer
from ia2mini.methods import ICL, METHODS, Grid
from ia2mini.scale import memory
from ia2mini.scale.blocks import checkpoint_blocks, is_checkpointed
from ia2mini.scale.memory import run_bytes, within_memory
from ia2mini.teacher import Taught, balanced
from ia2mini.train import Settings, Trained, run_losses, train

TRUTH, TAUGHT = ("truth", {"ce": 1.0}), ("icl", {"mse": 1.0})
PHASES = {  # method -> its phases: which rows, which losses (protocol section 4)
    "sft": [TRUTH],
    "icl-sft": [("demonstrated", {"ce": 1.0})],
    "ia2": [TAUGHT],
    "ia2-sft": [TAUGHT, TRUTH],
    "sft-ia2": [TRUTH, TAUGHT],
    "sft-sft": [TRUTH, TRUTH],
    "ia2+sft": [("icl", {"mse": None, "ce": None})],  # 1 - β and β
    "soft": [("icl", {"kl": 1.0})],
    "soft-sft": [("icl", {"kl": 1.0}), TRUTH],
    "hidden-sft": [("icl", {"hidden": 1.0}), TRUTH],
}


def noting(trainer: Callable, note: Callable) -> Callable:
    """A trainer that tells `note` the runs of each of its calls before it trains them."""

    def noted(model, adapter, runs, *more, **named):
        note(runs)
        return trainer(model, adapter, runs, *more, **named)

    return noted


def make_grid(model, kind, labels="truth", rows=5, **more):
    sets = [
        Taught(*(make_rows(n, 10 * s + i) for i, n in enumerate((rows, 2, rows, 2, rows, 2))))
        for s in range(2)
    ]
    more |= {"labels": labels, "settings": Settings(batch_size=2, epochs=2, patience=9)}
    return Grid(model, ADAPTERS[kind](model), sets, [1e-2, 3e-3], [0.2, 0.7], seed=4, **more)


@pytest.mark.parametrize(
    "kind, labels, method",
    [("lora", "truth", method) for method in PHASES]
    + [("lora", "icl", method) for method in ("sft", "ia2-sft", "sft-sft")]
    + [(kind, "truth", method) for kind in ("ia3",) for method in ("ia2-sft", "ia2+sft", "soft")],
)
def test_every_method_equals_the_plain_loop(folder, model, kind, labels, method):
    watched = []

    def look(state) -> None:
        watched[-1].append((state.step, state.dev_loss.clone()))

    grid = make_grid(
        model,
        kind,
        labels,
        hooks=watching(look),
        trainer=noting(train, lambda runs: watched.append([])),
    )
    found, configs = METHODS[method](grid), grid.configs(method)
    assert len(found.theta) == len(configs) == (8 if method == "ia2+sft" else 4)
    assert len(watched) == len(PHASES[method])
    for r in (1, len(configs) - 2):
        number, rate, beta = configs[r]
        s, theta, steps = grid.sets[number], grid.first_weights(number), 0
        for (rows, mix), looks in zip(PHASES[method], watched, strict=True):
            mix = {"mse": 1 - beta, "ce": beta} if beta else mix
            if rows == "demonstrated":
                data = s.demonstrated_train, s.demonstrated_dev
            elif (rows, labels) == ("truth", "truth"):
                data = s.train, s.dev
            else:
                data = s.icl_train, s.icl_dev
            twin, order = (
                peft_twin(folder, grid.adapter, theta),
                partial(grid.order, number, len(data[0])),
            )
            theta, loss, taken, history = plain_fit(
                twin, grid.adapter, rate, mix, data, order, grid.settings
            )
            steps += taken
            expected = [(step, pytest.approx(x, rel=1e-4)) for step, x in history]
            assert [(step, live[r].item()) for step, live in looks] == expected
        assert relative(found.theta[r], theta) <= 1e-4
        assert found.dev_loss[r].item() == pytest.approx(loss, rel=1e-4) and found.steps[r] == steps


def test_runs_in_portions_equal_all_at_once(model):
    whole, portions = make_grid(model, "lora"), make_grid(model, "lora", trainer=make_trainer(3))
    for method in ("ia2-sft", "ia2+sft"):
        a, b = METHODS[method](whole), METHODS[method](portions)
        assert a.steps.tolist() == b.steps.tolist()
        assert all(relative(x, y) <= 1e-5 for x, y in zip(a.theta, b.theta, strict=True))
        torch.testing.assert_close(a.dev_loss, b.dev_loss, rtol=1e-5, atol=0)


def test_runs_that_do_not_fit_into_memory_are_trained_in_portions(model):
    room, tried = 2, []

    def full(model, adapter, runs, *more):
        tried.append(len(runs))
        if len(runs) > room + (room == 0 and is_checkpointed(model)):
            raise torch.OutOfMemoryError
        return train(model, adapter, runs, *more)

    whole = METHODS["sft"](make_grid(model, "lora"))
    grid = make_grid(model, "lora", trainer=within_memory(full))
    with pytest.warns(UserWarning, match="out of memory with 4 runs side by side; going on with 2"):
        parts = METHODS["sft"](grid)
    assert tried == [4, 2, 2]
    METHODS["ia2"](grid)
    assert tried[3:] == [2, 2], "the next phase begins with what memory has held"
    assert parts.steps.tolist() == whole.steps.tolist()
    assert all(relative(x, y) <= 1e-5 for x, y in zip(parts.theta, whole.theta, strict=True))
    room, small = 0, copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match="out of memory with a single run; going on with --checkpointing"
    ):
        again = METHODS["sft"](make_grid(small, "lora", trainer=within_memory(full)))
    assert all(relative(x, y) <= 1e-5 for x, y in zip(again.theta, whole.theta, strict=True))
    room = -1
    with (
        pytest.warns(UserWarning),
        pytest.raises(UsageError, match="single run; use a smaller --batch-size"),
    ):
        METHODS["sft"](make_grid(small, "lora", trainer=within_memory(full)))


def test_portions_are_estimated_before_memory_runs_out(model, monkeypatch):
    tried, grid = [], make_grid(model, "lora")

    def trained() -> Trained:
        tried.clear()
        counted = noting(train, lambda runs: tried.append(len(runs)))
        return METHODS["sft"](make_grid(model, "lora", trainer=within_memory(counted)))

    runs, size = len(grid.configs("sft")), grid.adapter.init(torch.Generator()).numel()
    whole = METHODS["sft"](grid)
    batches = [sorted(taught.train, key=len)[-grid.settings.batch_size :] for taught in grid.sets]
    tokens, positions = (
        max(sum(map(of, batch)) for batch in batches) for of in (len, lambda row: len(row.answer))
    )
    each = run_bytes(model.config, tokens, positions, 4, size)
    for room, expected in ((runs / 0.9 + 9, [runs]), (2.5, [2] * (runs // 2)), (0.1, [1] * runs)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, room=room: room * each / 0.9)
        found = trained()
        assert tried == expected
        assert all(relative(x, y) <= 1e-5 for x, y in zip(found.theta, whole.theta, strict=True))
    checkpoint_blocks(model)
    try:
        monkeypatch.setattr(memory, "free_bytes", lambda device: 1.9 * each / 0.9)
        trained()
        assert tried[0] > 1, "checkpointed, a run takes less"
    finally:
        for block in model.model.layers:
            del block.attention_output, block.mlp_output


def test_a_first_phase_that_is_already_there_is_not_trained_again(model):
    trained = []
    grid = make_grid(model, "ia3", trainer=noting(train, trained.append))
    ready = METHODS["ia2"](grid)
    whole = METHODS["ia2-sft"](grid)
    assert len(trained) == 3
    again = METHODS["ia2-sft"](grid, ready)
    assert (
        len(trained) == 4
        and torch.equal(again.theta, whole.theta)
        and torch.equal(again.steps, whole.steps)
    )
    assert not torch.equal(again.theta, ready.theta)


def test_sets_start_differently_and_rates_of_a_set_alike(model):
    grid, started = make_grid(model, "lora"), []
    grid.trainer = noting(train, started.append)
    grid.train("sft", {"ce": 1.0}, grid.labels)
    theta = started[0].theta
    assert (
        torch.equal(theta[0], theta[1])
        and torch.equal(theta[2], theta[3])
        and not torch.equal(theta[0], theta[2])
    )
    assert sorted(grid.order(0, 5, 0)) == list(range(5))
    assert len({tuple(grid.order(n, 5, e)) for n in range(2) for e in range(4)}) > 4


def test_a_phase_takes_a_loss_of_ones_own(model):
    grid = make_grid(model, "lora")
    own, built_in = (
        grid.train("sft", {loss: 1.0, "mse": 0.1}, ICL) for loss in (own_cross_entropy, "ce")
    )
    assert own.steps.tolist() == built_in.steps.tolist()
    assert all(relative(x, y) <= 1e-5 for x, y in zip(own.theta, built_in.theta, strict=True))
    torch.testing.assert_close(own.dev_loss, built_in.dev_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "mix, answers, message",
    [
        ({"mse": 1.0}, "icll", "answers 'icll': use truth, icl, demonstrated"),
        ({"ce": 1.0}, "demonstrated", "no rows with the answers 'demonstrated'"),
        ({"mes": 1.0}, "icl", "loss 'mes': use ce, kl, mse, hidden, or a function"),
        ({"mse": 1.0}, "truth", "loss 'mse': the rows have no activations; `TeacherSettings`"),
        ({"mse": 1.0, "hidden": 1.0}, "icl", "losses 'mse' and 'hidden': a pass records one"),
    ],
)
def test_what_was_not_taught_is_one_line(model, mix, answers, message):
    grid = make_grid(model, "lora")
    true = [replace(row, activations=None) for row in grid.sets[0].train]
    bare = replace(grid.sets[0], train=true, dev=true, demonstrated_train=[], demonstrated_dev=[])
    grid = replace(grid, sets=[bare] * len(grid.sets))
    with pytest.raises(UsageError) as error:
        grid.train("sft", mix, answers)
    assert str(error.value).startswith(message)


def test_balanced_answers_weigh_as_scikit_learn_has_it(model):
    from sklearn.utils.class_weight import compute_class_weight

    answers = [5, 5, 6, 5, 5]
    rows = [TokenRow([3, 4 + i], [answer]) for i, answer in enumerate(answers)]
    weighted = balanced(Taught(train=rows, dev=[])).train
    of_answer = compute_class_weight("balanced", classes=np.array([5, 6]), y=np.array(answers))
    expected = [of_answer[answer - 5] for answer in answers]
    assert [row.weight for row in weighted] == pytest.approx(expected)
    assert {row.weight for row in rows} == {1.0}, "the rows that were given stay as they are"
    total = 0.0
    with torch.no_grad():
        for row, weight in zip(rows, expected):
            logits = model(torch.tensor([row.prompt]))[0, -1]
            total += weight * -logits.log_softmax(-1)[row.answer[0]].item()
        found = run_losses(model, collate([weighted]), {"ce": torch.ones(1)})
    assert found.item() == pytest.approx(total / len(rows), rel=1e-5)
