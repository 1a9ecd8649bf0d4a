"""The loop and every method against transformers one row at a time, runs side by side against alone."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from ia2mini.models import UsageError, load
from reference import VOCABULARY, make_checkpoint, peft_twin, twin_parameters, twin_theta

import ia2mini.train
from ia2mini.adapters import IA3, Full, LoRA, PrefixTuning, Prompt, adapted, unpack
from ia2mini.episode import Row, collate
from ia2mini.train import METHODS, Adam, Job, SetRows, Settings, fit, losses

ADAPTERS = {
    "lora": LoRA,
    "ia3": IA3,
    "prompt": lambda m: Prompt(m, 3),
    "prefix": lambda m: PrefixTuning(m, 3),
    "full": Full,
}
MIXES = {"sft": {"ce": 1.0}, "ia2": {"mse": 1.0}, "soft": {"kl": 1.0}, "mixed": {"mse": 0.3, "ce": 0.7}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(folder):
    torch.set_num_threads(1)
    return load(folder)[0]


def make_rows(count: int, seed: int, k: int = 6) -> list[Row]:
    """Random rows of 2 to 7 prompt and 1 to 3 answer tokens with random teacher targets (two layers of 32 units)."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        T, P = (int(torch.randint(low, high, (), generator=g)) for low, high in ((2, 8), (1, 4)))
        ids = torch.randint(0, VOCABULARY, (T + P,), generator=g).tolist()
        soft, soft_ids = (2 * torch.randn(P, VOCABULARY, generator=g)).log_softmax(-1).topk(k)
        made.append(Row(ids[:T], ids[T:], 0.3 * torch.randn(2, P, 32, generator=g), soft, soft_ids))
    return made


def plain_loss(twin, row: Row, mix: dict[str, float]) -> torch.Tensor:
    """One row's loss, written out: hooks on transformers' attention, averages over its answer positions, sum over layers."""
    caught = []
    blocks = [m for name, m in twin.named_modules() if name.endswith("self_attn")]
    handles = [b.register_forward_hook(lambda module, args, out: caught.append(out[0])) for b in blocks]
    logits = twin(torch.tensor([row.prompt + row.answer[:-1]])).logits[0, -len(row.answer) :].double()
    for handle in handles:
        handle.remove()
    total = 0.0
    if "mse" in mix:
        layers = zip(caught, row.activations, strict=True)
        total += mix["mse"] * sum((a[0, -len(row.answer) :].double() - t.double()).pow(2).mean() for a, t in layers)
    if "ce" in mix:
        total -= (
            mix["ce"]
            * sum(torch.log(p.softmax(0)[t]) for p, t in zip(logits, row.answer, strict=True))
            / len(row.answer)
        )
    if "kl" in mix:
        for p, soft, ids in zip(logits, row.soft, row.soft_ids, strict=True):
            teacher = soft.double().exp() / soft.double().exp().sum()
            total += (
                mix["kl"]
                * sum(q * (q.log() - p.log_softmax(0)[i]) for q, i in zip(teacher, ids, strict=True))
                / len(row.answer)
            )
    return total


def plain_fit(twin, adapter, rate, mix, train, dev, order, settings):
    """(best weights [M], its dev loss, steps, best dev loss at each look) of one run, by torch.optim.Adam, one row at a time."""
    optimizer = torch.optim.Adam(twin_parameters(twin, adapter), lr=rate)
    best, best_theta, steps, misses, history = math.inf, None, 0, 0, []
    for epoch in range(settings.epochs):
        portions = np.array_split(order(epoch), range(settings.batch_size, len(train), settings.batch_size))
        for number, portion in enumerate(portions):
            optimizer.zero_grad()
            for i in portion:
                (plain_loss(twin, train[i], mix) / len(portion)).backward()
            optimizer.step()
            steps += 1
            if steps % 2 == 0 or number == len(portions) - 1:
                with torch.no_grad():
                    loss = float(np.mean([plain_loss(twin, row, mix).item() for row in dev]))
                misses = 0 if loss < best else misses + 1
                if loss < best:
                    best, best_theta = loss, twin_theta(twin, adapter)
                history.append((steps, best))
                if misses == settings.patience:
                    return best_theta, best, steps, history
    return best_theta, best, steps, history


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def starts(adapter, model, runs):
    return torch.stack([adapter.init(model, torch.Generator().manual_seed(r)) for r in range(runs)])


def in_order(run, epoch):
    return np.random.default_rng([run, epoch]).permutation(4).tolist()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_losses_of_a_batch_equal_the_plain_ones(folder, model, kind, mix, pack):
    adapter = ADAPTERS[kind](model)
    theta = starts(adapter, model, 2) + 0.05 * torch.randn(2, 1)
    rows = [make_rows(3, seed) for seed in range(2)]
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        found = losses(
            student, collate(rows, pack=pack), {name: torch.tensor([w, 2 * w]) for name, w in MIXES[mix].items()}
        )
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


@pytest.mark.parametrize("kind, mix", [("lora", "mixed"), ("ia3", "ia2"), ("prompt", "soft"), ("prefix", "sft")])
def test_runs_side_by_side_equal_alone_in_any_order(model, kind, mix):
    adapter, R, settings = ADAPTERS[kind](model), 6, Settings(batch_size=2, epochs=10, patience=99)
    theta, rates = starts(adapter, model, R), torch.tensor([1e-2, 3e-3, 1e-3] * 2)
    train, dev = [make_rows(4, r) for r in range(R)], [make_rows(2, 100 + r) for r in range(R)]

    def train_runs(runs):
        weights = {name: torch.full((len(runs),), w) for name, w in MIXES[mix].items()}
        rows = [[data[r] for r in runs] for data in (train, dev)]
        return fit(
            model,
            adapter,
            theta[runs],
            rates[runs],
            *rows,
            weights,
            lambda r, epoch: in_order(runs[r], epoch),
            settings,
        )

    together, shuffled = train_runs([0, 1, 2, 3, 4, 5]), train_runs([4, 2, 5, 0, 3, 1])
    assert together.steps.tolist() == [20] * R
    for r in range(R) if kind == "lora" else (1, 4):
        alone, again = train_runs([r]), [4, 2, 5, 0, 3, 1].index(r)
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

    def train_runs(runs, watch=None):
        weights, rows = {"mse": 1 - beta[runs], "ce": beta[runs]}, [[data[r] for r in runs] for data in (train, dev)]
        return fit(
            model, adapter, theta[runs], rates[runs], *rows, weights, lambda r, e: in_order(runs[r], e), settings, watch
        )

    together = train_runs(list(range(R)), lambda step, live: seen.append((step, len(live))))
    assert len(set(together.steps.tolist())) >= 3
    assert seen[-1][0] == max(together.steps)
    assert all(live == (together.steps > step).sum() for step, live in seen if step < 48 / batch_size)
    for r in range(R):
        alone = train_runs([r])
        assert together.steps[r] == alone.steps[0]
        assert relative(together.theta[r], alone.theta[0]) <= 1e-5
        assert together.dev_loss[r].item() == pytest.approx(alone.dev_loss[0].item(), rel=1e-5)


def overfitting(model, **settings):
    """One run whose dev row asks for the answer that the base already gives and its training row for another."""
    adapter, looks, prompt = LoRA(model), [], [1, 2, 3]
    dev, mix = [[Row(prompt, [model(torch.tensor([prompt]))[0, -1].argmax().item()])]], {"ce": torch.ones(1)}
    arguments = (
        [[Row(prompt, [4])]],
        dev,
        mix,
        lambda r, epoch: [0],
        Settings(**settings),
        lambda *look: looks.append(look),
    )
    found = fit(model, adapter, starts(adapter, model, 1), torch.tensor([3e-2]), *arguments)
    with torch.no_grad(), adapted(model, adapter, found.theta) as student:
        return found, [step for step, _ in looks], losses(student, collate(dev), mix).item()


def test_the_best_dev_state_is_kept_not_the_last(model):
    first, _, _ = overfitting(model, epochs=1)
    late, steps, again = overfitting(model, epochs=50, patience=4)
    assert steps == [1, 2, 3, 4, 5] and late.steps.tolist() == [5]
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
        whole = losses(student, batch, {"mse": torch.ones(1)}).item()
        parts = []
        for layer in range(2):
            chosen = replace(batch, activations=batch.activations[[layer]])
            parts.append(losses(student, chosen, {"mse": torch.ones(1)}, [layer]).item())
    assert sum(parts) == pytest.approx(whole, rel=1e-6) and min(parts) > 0.01
    rows = [[replace(row, activations=row.activations[[0]]) for row in make_rows(2, seed)] for seed in (0, 1)]
    arguments = {"ce": torch.zeros(1), "mse": torch.ones(1)}, lambda r, epoch: [0, 1], Settings(epochs=2, layers=[0])
    moved = fit(model, adapter, theta, torch.tensor([1e-2]), [rows[0]], [rows[1]], *arguments).theta - theta
    second = unpack(moved, adapter.shapes)["model.layers.1.self_attn.q_proj"]
    assert second.abs().max() == 0 and moved.abs().max() > 1e-3


def test_patience_counts_looks_since_the_last_improvement(model):
    adapter, best, script = (
        LoRA(model),
        [],
        iter([5.0, 6.0, 6.0, 4.0, 4.0, 7.0, 4.0, 3.0]),
    )  # an equal loss is no improvement

    class Student(torch.nn.Module):
        config = model.config

        def forward(self, ids, taps, **arguments):
            model(ids, taps=taps, **arguments)
            if not torch.is_grad_enabled():  # a look: both layers are wrong by the square root of half the loss
                taps.outputs = dict.fromkeys(range(2), torch.full((1, 32), math.sqrt(next(script) / 2)))

    data = [make_rows(1, 0)], [[Row([1, 2], [3], torch.zeros(2, 1, 32))]], {"mse": torch.ones(1)}
    more = (
        lambda r, epoch: [0],
        Settings(patience=3),
        lambda step, live: best.append([round(x, 4) for x in live.tolist()]),
    )
    found = fit(Student(), adapter, starts(adapter, model, 1), torch.tensor([1e-2]), *data, *more)
    assert best == [[5.0], [5.0], [5.0], [4.0], [4.0], [4.0], []]
    assert found.steps.tolist() == [7] and found.dev_loss.item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    "rows, looks", [(5, [2, 3, 4, 6, 8, 9, 10, 12]), (4, [2, 4, 6, 8]), (2, [1, 2, 3, 4]), (1, [1, 2, 3, 4])]
)
def test_the_dev_loss_is_looked_at_after_every_second_step_and_each_epoch(model, rows, looks):
    adapter, seen = IA3(model), []
    settings = Settings(batch_size=2, epochs=4, patience=99)
    data = [make_rows(rows, 0)], [make_rows(1, 1)], {"ce": torch.ones(1)}, lambda r, epoch: list(range(rows)), settings
    fit(model, adapter, starts(adapter, model, 1), torch.tensor([1e-3]), *data, lambda step, live: seen.append(step))
    assert seen == looks


TRUTH, TAUGHT = ("truth", {"ce": 1.0}), ("icl", {"mse": 1.0})
PHASES = {  # method -> its phases: which rows, which losses (protocol section 4)
    "sft": [TRUTH],
    "ia2": [TAUGHT],
    "ia2-sft": [TAUGHT, TRUTH],
    "sft-ia2": [TRUTH, TAUGHT],
    "sft-sft": [TRUTH, TRUTH],
    "ia2+sft": [("icl", {"mse": None, "ce": None})],  # 1 - β and β
    "soft": [("icl", {"kl": 1.0})],
}


def make_job(model, kind, labels="truth", rows=5, **more):
    sets = [SetRows(*(make_rows(n, 10 * s + i) for i, n in enumerate((rows, 2, rows, 2)))) for s in range(2)]
    settings = Settings(batch_size=2, epochs=2, patience=9)
    return Job(
        model, ADAPTERS[kind](model), sets, [1e-2, 3e-3], [0.2, 0.7], seed=4, labels=labels, settings=settings, **more
    )


@pytest.mark.parametrize(
    "kind, labels, method",
    [("lora", "truth", method) for method in PHASES]
    + [("lora", "icl", method) for method in ("sft", "ia2-sft", "sft-sft")]
    + [(kind, "truth", method) for kind in ("ia3", "prompt", "prefix") for method in ("ia2-sft", "ia2+sft", "soft")],
)
def test_every_method_equals_the_plain_loop(folder, model, kind, labels, method):
    watched = []

    @contextmanager
    def progress(about):
        watched.append([])
        yield lambda step, live: watched[-1].append((step, live.clone()))

    job = make_job(model, kind, labels, progress=progress)
    found, grid = METHODS[method](job), job.grid(betas=method == "ia2+sft")
    assert len(found.theta) == len(grid) == (8 if method == "ia2+sft" else 4)
    assert len(watched) == len(PHASES[method])
    for r in (1, len(grid) - 2):
        number, rate, beta = grid[r]
        s, theta, steps = job.sets[number], job.start(grid)[r], 0
        for (rows, mix), looks in zip(PHASES[method], watched, strict=True):
            mix = {"mse": 1 - beta, "ce": beta} if beta else mix
            train, dev = (s.train, s.dev) if (rows, labels) == ("truth", "truth") else (s.icl_train, s.icl_dev)
            twin = peft_twin(folder, job.adapter, theta)
            theta, loss, taken, history = plain_fit(
                twin, job.adapter, rate, mix, train, dev, lambda e, n=number: job.order(n, e), job.settings
            )
            steps += taken
            assert [(step, live[r].item()) for step, live in looks] == [
                (step, pytest.approx(x, rel=1e-4)) for step, x in history
            ]
        assert relative(found.theta[r], theta) <= 1e-4
        assert found.dev_loss[r].item() == pytest.approx(loss, rel=1e-4) and found.steps[r] == steps


def test_runs_in_portions_equal_all_at_once(model):
    whole, portions = make_job(model, "lora"), make_job(model, "lora", side_by_side=3)
    for method in ("ia2-sft", "ia2+sft"):
        a, b = METHODS[method](whole), METHODS[method](portions)
        assert a.steps.tolist() == b.steps.tolist()
        assert all(relative(x, y) <= 1e-5 for x, y in zip(a.theta, b.theta, strict=True))
        torch.testing.assert_close(a.dev_loss, b.dev_loss, rtol=1e-5, atol=0)


def test_runs_that_do_not_fit_into_memory_are_trained_in_portions(model, monkeypatch):
    room, tried = 2, []

    def full(*args):
        tried.append(len(args[2]))
        if len(args[2]) > room:
            raise torch.OutOfMemoryError
        return fit(*args)

    whole = METHODS["sft"](make_job(model, "lora"))
    monkeypatch.setattr(ia2mini.train, "fit", full)
    with pytest.warns(UserWarning, match="out of memory with 4 runs side by side; going on with 2"):
        parts = METHODS["sft"](make_job(model, "lora"))
    assert tried == [4, 2, 2] and parts.steps.tolist() == whole.steps.tolist()
    assert all(relative(x, y) <= 1e-5 for x, y in zip(parts.theta, whole.theta, strict=True))
    room = 0
    with pytest.warns(UserWarning), pytest.raises(UsageError, match="single run; use --checkpointing"):
        METHODS["sft"](make_job(model, "lora"))


def test_a_first_phase_that_is_already_there_is_not_trained_again(model):
    job, asked = make_job(model, "ia3"), []
    ready = METHODS["ia2"](job)
    whole = METHODS["ia2-sft"](job)
    job.first = lambda method: asked.append(method) or ready
    again = METHODS["ia2-sft"](job)
    assert asked == ["ia2"] and torch.equal(again.theta, whole.theta) and torch.equal(again.steps, whole.steps)
    assert not torch.equal(again.theta, ready.theta)


def test_sets_start_differently_and_rates_of_a_set_alike(model):
    job = make_job(model, "lora")
    theta = job.start(job.grid())
    assert torch.equal(theta[0], theta[1]) and torch.equal(theta[2], theta[3]) and not torch.equal(theta[0], theta[2])
    assert (
        sorted(job.order(0, 0)) == list(range(5))
        and len({tuple(job.order(n, e)) for n in range(2) for e in range(4)}) > 4
    )
