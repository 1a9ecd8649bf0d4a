"""Recorded steps against plain ones. Without a GPU a tape is the CUDA graph: it replays operations, never Python."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ia2mini.models import load
from reference import (
    EOS,
    MIXES,
    from_start,
    in_order,
    make_checkpoint,
    make_rows,
    random_ids,
    starts,
)
from tape import Tape

import ia2mini.train
from ia2mini.adapters import IA3, LoRA
from ia2mini.batch import TokenRow, collate
from ia2mini.generate import Decoding, generate
from ia2mini.scale import graphs
from ia2mini.scale.blocks import checkpoint_blocks
from ia2mini.scale.decode import fast_decoding
from ia2mini.scale.memory import within_memory
from ia2mini.scale.pack import in_batches
from ia2mini.scale.parts import take_runs
from ia2mini.scale.shrink import shrinking
from ia2mini.tokenizer import Tokenizer
from ia2mini.train import Hooks, Runs, Settings, State, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOOKS = Hooks(in_batches, partial(graphs.recorded, device=torch.device(DEVICE)))
ADAPTERS = {"lora": LoRA, "ia3": IA3, "ia3-inputs": lambda m: IA3(m, scale_inputs=True)}


@pytest.fixture
def recorded(monkeypatch):
    """Both results of its argument: without a recorder, and with one from a shape's second call on, no warnings."""

    def twice(function):
        Tape.replays = Tape.recordings = 0
        monkeypatch.setattr(graphs, "OFTEN", 1)
        with monkeypatch.context() as patch:
            patch.delitem(graphs.RECORDERS, DEVICE, raising=False)
            plain = function()
        if DEVICE == "cpu":
            monkeypatch.setitem(graphs.RECORDERS, "cpu", Tape)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return plain, function()

    return twice


def same(found, expected):
    """To the bit on a CPU; on a GPU Adam makes rounding larger."""
    assert (found - expected).norm() <= (0 if DEVICE == "cpu" else 1e-2) * expected.norm()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(
        make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2),
        device=DEVICE,
    )


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def on_device(rows: list[list[TokenRow]]) -> list[list[TokenRow]]:
    return [
        [
            TokenRow(
                r.prompt,
                r.answer,
                r.activations.to(DEVICE),
                r.soft.to(DEVICE),
                r.soft_ids.to(DEVICE),
            )
            for r in run
        ]
        for run in rows
    ]


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize(
    "kind, mix", [("lora", "mixed"), ("lora", "soft"), ("ia3", "ia2"), ("ia3-inputs", "sft")]
)
def test_training_recorded_equals_training(model, recorded, monkeypatch, kind, mix, batch_size):
    """Runs leave at once, or half of them together: either way the same with recordings."""
    trainer = from_start(shrinking(train, lambda *step: batch_size == 4))
    adapter, R, calls = ADAPTERS[kind](model), 4, []
    plain_losses = ia2mini.train.run_losses
    monkeypatch.setattr(
        ia2mini.train, "run_losses", lambda *args: calls.append(1) or plain_losses(*args)
    )
    theta, rates = starts(adapter, model, R).to(DEVICE), torch.tensor([1e-1, 1e-4, 3e-2, 1e-3])
    rows = [
        on_device([make_rows(size, seed + r) for r in range(R)]) for size, seed in ((4, 0), (2, 50))
    ]
    weights = {name: torch.full((R,), w, device=DEVICE) for name, w in MIXES[mix].items()}
    settings, counts = Settings(batch_size, epochs=14, patience=2), []
    runs = Runs(theta, rates, *rows, weights, [partial(in_order, r) for r in range(R)])

    def trained():
        calls.clear()
        found = trainer(model, adapter, runs, settings, hooks=HOOKS).trained()
        counts.append(len(calls))
        return found

    plain, replayed = recorded(trained)
    leave = "runs leave at different steps, and the recordings with them"
    assert kind != "lora" or len(set(plain.steps.tolist())) > 1, leave
    assert torch.equal(plain.steps, replayed.steps)
    same(replayed.theta, plain.theta)
    same(replayed.dev_loss, plain.dev_loss)
    assert counts[1] < counts[0]
    if DEVICE == "cpu":
        once = "a recording runs Python once, a replay never"
        assert Tape.replays - Tape.recordings == counts[0] - counts[1] > 0, once


def test_a_recording_knows_of_what_was_there_before_only_the_address():
    """So that the other tests show that nothing a recording reads is given back before its last replay."""
    outside, total = [torch.ones(3)], torch.zeros(3)
    replay, found = Tape()(lambda: total.add_(outside[0] * 2))
    replay()
    replay()
    assert found is total and total.tolist() == [4.0] * 3
    outside.clear()
    with pytest.raises(RuntimeError, match="memory that was given back"):
        replay()


def test_packed_and_checkpointed_steps_are_recorded_too(tmp_path, recorded):
    model = load(make_checkpoint(tmp_path, "llama", num_hidden_layers=2), device=DEVICE)[0]
    checkpoint_blocks(model)
    adapter, rows = LoRA(model), on_device([make_rows(4, r) for r in range(2)])
    assert in_batches(rows)[0].packed is not None
    theta, weights = starts(adapter, model, 2).to(DEVICE), {"mse": torch.ones(2, device=DEVICE)}
    runs = Runs(
        theta, torch.full((2,), 1e-2), rows, rows, weights, [lambda epoch: [0, 1, 2, 3]] * 2
    )
    plain, replayed = recorded(lambda: train(model, adapter, runs, hooks=HOOKS).trained())
    same(replayed.theta, plain.theta)
    assert (plain.theta - theta).abs().max() > 0.01


@pytest.mark.parametrize("observed", [False, True])
def test_decoding_recorded_equals_decoding(loaded, recorded, observed):
    # many ways to end
    model, tokenizer = loaded[0], Tokenizer(loaded[1].backend, (EOS, *range(20, 40)))
    prompts, seen = [random_ids(1, 3 + i % 5)[0].tolist() for i in range(9)], []

    def observer(live, tokens, logits, outputs):
        seen[-1] += [
            (i, token, *x)
            for i, token, x in zip(
                live, tokens, zip(logits.clone(), outputs.unbind(1), strict=True), strict=True
            )
        ]

    def run():
        seen.append([])
        how = Decoding(12, stop=None, hooks=fast_decoding(torch.device(DEVICE), 12))
        return generate(model, tokenizer, prompts, how, observer=observer if observed else None)

    plain, replayed = recorded(run)
    assert plain == replayed
    lengths = [len(response) for response in plain]
    assert min(lengths) < 5 and max(lengths) == 12 and len(set(lengths)) > 2, (
        "rows leave on the way"
    )
    assert not observed or len(seen[0]) == len(seen[1]) == sum(min(n + 1, 12) for n in lengths)
    for (i, token, logits, outputs), (j, again, *others) in zip(*seen, strict=True):
        assert (i, token) == (j, again)
        torch.testing.assert_close(others, [logits, outputs], rtol=1e-4, atol=1e-5)
    assert DEVICE != "cpu" or Tape.replays > 8


def test_what_an_observer_keeps_no_replay_overwrites(loaded, recorded):
    """No row ends before the last token: every step is one of the whole batch."""
    model, tokenizer = loaded[0], Tokenizer(loaded[1].backend, ())
    prompts, kept = [random_ids(1, 3 + i)[0].tolist() for i in range(3)], []

    def run():
        kept.append([])
        how = Decoding(12, stop=None, hooks=fast_decoding(torch.device(DEVICE), 12))
        return generate(
            model, tokenizer, prompts, how, observer=lambda *seen: kept[-1].append(seen[2:])
        )

    plain, replayed = recorded(run)
    assert plain == replayed and len(kept[0]) == len(kept[1]) == 12
    for expected, found in zip(*kept, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert DEVICE != "cpu" or Tape.replays > 8


def test_a_shape_is_recorded_once_it_comes_often_and_only_some_are(monkeypatch):
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Tape)
    monkeypatch.setattr(graphs, "MOST_RECORDINGS", 2)
    Tape.recordings, calls = 0, []
    step = graphs.CapturedStep(
        lambda batch: calls.append(1) or 2.0 * batch.ids, torch.device("cpu")
    )
    for length in (1, 2, 3):
        for call in range(7):
            batch = collate([[TokenRow([call] * length, [0])]])
            assert step(batch).tolist() == [[2.0 * call] * length]
            assert Tape.recordings == min(length - (call < graphs.OFTEN), 2)
    assert len(calls) == 2 * (graphs.OFTEN + 1) + 7


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch):
    monkeypatch.setitem(graphs.RECORDERS, DEVICE, Tape if DEVICE == "cpu" else graphs.CudaRecorder)
    monkeypatch.setattr(graphs, "OFTEN", 1)
    total = torch.zeros((), device=DEVICE)
    functions = lambda: total.add_(1), lambda: total.add_(1).item()
    good, bad = (graphs.CapturedStep(function, total.device) for function in functions)
    assert [float(good()) for _ in range(3)] == [1, 2, 3]
    assert bad() == 4
    with pytest.warns(UserWarning, match="no CUDA graphs from now on: .*captur"):
        assert bad() == 5
    assert DEVICE not in graphs.RECORDERS
    assert (bad(), float(good()), float(good())) == (6, 7, 8), (
        "nor is anything recorded before replayed again"
    )


def race_of(model, R: int = 8, dev: int = 50) -> tuple:
    """Runs that end at different steps, as arguments of `train`."""
    adapter = LoRA(model)
    rows = [on_device([make_rows(4, seed + r) for r in range(R)]) for seed in (0, dev)]
    rates = torch.logspace(-3, -0.5, R)[
        torch.randperm(R, generator=torch.Generator().manual_seed(0))
    ]
    mix, orders = {"mse": torch.ones(R, device=DEVICE)}, [partial(in_order, r) for r in range(R)]
    return model, adapter, Runs(starts(adapter, model, R).to(DEVICE), rates, *rows, mix, orders)


def test_half_of_a_batch_leaves_at_once_where_launching_costs_most(model, monkeypatch):
    """More steps are replays; no run's steps, best step or weights change."""
    if DEVICE == "cpu":
        monkeypatch.setitem(graphs.RECORDERS, "cpu", Tape)
    runs, found, replays, sizes = race_of(model), {}, {}, {}
    for halves in (False, True):
        seen = sizes[halves] = []

        def noted(model, adapter, runs, *more, seen=seen) -> State:
            seen.append(len(runs))
            return train(model, adapter, runs, *more)

        trainer = from_start(shrinking(noted, lambda *step, halves=halves: halves))
        graphs.COUNTED.clear()
        found[halves] = trainer(*runs, Settings(epochs=40, patience=2), hooks=HOOKS).trained()
        replays[halves] = graphs.COUNTED["replays"] / graphs.COUNTED["calls"]
    once, together = found[False], found[True]
    assert len(set(once.steps.tolist())) >= 4, "they end at different steps"
    assert replays[True] > replays[False] + 0.05 and len(set(sizes[True])) < len(set(sizes[False]))
    assert all(
        small <= large // 2 for large, small in zip(sizes[True], sizes[True][1:]) if small != large
    )
    assert torch.equal(once.steps, together.steps) and torch.equal(once.best, together.best)
    torch.testing.assert_close(together.theta, once.theta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.dev_loss, once.dev_loss, rtol=1e-4, atol=0)


def test_what_a_step_costs_decides_how_runs_leave(model, monkeypatch):
    few, many = (race_of(model, R)[2] for R in (1, 64))
    assert not graphs.launch_bound(model, few, Settings()) or DEVICE == "cuda", (
        "nothing is recorded on a CPU"
    )
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Tape)
    assert graphs.launch_bound(model, few, Settings()) and graphs.launch_bound(
        model, many, Settings()
    )
    # of a block; they take no memory
    weights = torch.empty(1, device=DEVICE).expand(8192 * 28672 * 3)
    block = SimpleNamespace(parameters=lambda: [weights])
    inner = SimpleNamespace(embed_tokens=model.model.embed_tokens, layers=[block])
    large = SimpleNamespace(config=model.config, model=inner)
    assert graphs.launch_bound(large, few, Settings()) and not graphs.launch_bound(
        large, many, Settings()
    )
    assert graphs.launch_bound(large, few, Settings(batch_size=1)), (
        "a step has so many rows of a run"
    )


class Crowded(Tape):
    """Has no memory left for a recording of more than `room` runs."""

    room = 1

    def __call__(self, function):
        if Crowded.room < Crowded.runs:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:  # so a capture ends: by an error of its own
                raise RuntimeError("operation failed due to a previous error during capture")
        return super().__call__(function)


@pytest.mark.filterwarnings("ignore:operator")
def test_out_of_memory_while_recording_means_fewer_runs_and_graphs_go_on(model, monkeypatch):
    monkeypatch.setitem(graphs.RECORDERS, DEVICE, Crowded)
    arguments = race_of(model, 4)
    plain_losses = ia2mini.train.run_losses

    def failing_losses(student, batch, *more):
        Crowded.runs = len(batch.weights)
        return plain_losses(student, batch, *more)

    monkeypatch.setattr(ia2mini.train, "run_losses", failing_losses)
    settings, Crowded.room, tried = Settings(epochs=5), 2, []

    def noted(model, adapter, runs, *more) -> State:
        tried.append(len(runs))
        return shrinking(train)(model, adapter, runs, *more)

    graphs.COUNTED.clear()
    trainer = from_start(within_memory(noted))
    with pytest.warns(UserWarning, match="out of memory with 4 runs side by side; going on with 2"):
        found = trainer(*arguments, settings, hooks=HOOKS).trained()
    assert tried == [4, 2, 2] and graphs.COUNTED["replays"] and DEVICE in graphs.RECORDERS
    monkeypatch.delitem(graphs.RECORDERS, DEVICE)
    plain = train(*arguments, settings, hooks=HOOKS).trained()
    torch.testing.assert_close(found.theta, plain.theta, rtol=1e-4, atol=1e-5)
    monkeypatch.setitem(graphs.RECORDERS, DEVICE, Crowded)
    Crowded.room = 0
    graphs.COUNTED.clear()
    tried.clear()
    alone = take_runs(arguments[2], torch.tensor([0]))
    trainer = from_start(within_memory(noted))
    single = trainer(model, arguments[1], alone, settings, hooks=HOOKS).trained()
    assert not graphs.COUNTED["replays"] and graphs.COUNTED["calls"], (
        "a single run goes on unrecorded"
    )
    assert tried == [1]
    torch.testing.assert_close(single.theta, found.theta[:1], rtol=1e-4, atol=1e-5)
