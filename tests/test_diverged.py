"""Runs whose losses are NaN or infinite: they stop alone, are named with their step, shown, and never chosen."""

import json
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mistakes import refused
from reference import MIXES, in_order, make_rows, starts
from shipping import shipping
from test_train import ADAPTERS, TRAINERS

from ia2mini import FitOptions, fit, open_subject
from ia2mini.engine.experiment import troubles, warn_of_failed_runs
from ia2mini.engine.options import Options
from ia2mini.fitting.crossval import CrossValidation
from ia2mini.fitting.rows import read_own
from ia2mini.fitting.selection import Candidate
from ia2mini.fitting.training import train_final
from ia2mini.report.fit import fit_table
from ia2mini.report.page import write_report
from ia2mini.report.tables import write_table
from ia2mini.scale.pack import in_batches
from ia2mini.study.study import compare
from ia2mini.tasks import find_task, world
from ia2mini.train import Hooks, Runs, Settings, State, Trained

NAN, INF = torch.nan, torch.inf
SMALL = Options(n=(2,), sets=2, epochs=6, eval_rows=3, methods=("icl", "sft", "ia2", "ia2-sft"))
MOOD = find_task("toy-mood")


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("where", ["rate", "rows", "first weights"])
@pytest.mark.parametrize(
    "kind, mix, lengths",
    [("lora", "mixed", 1), ("ia3", "ia2", 9), ("ia3", "soft", 1), ("ia3-inputs", "mixed", 9)],
)
def test_the_neighbours_of_a_broken_run_keep_every_bit(
    model, kind, mix, lengths, where, trainer, monkeypatch
):
    """Run 1 is poisoned, healthy, or not there; healthy it ends with the first look, so that shapes are the same.

    The plain loop goes on computing it, with NaN; shrinking, it leaves.
    """
    adapter, settings, note = (
        ADAPTERS[kind](model),
        Settings(batch_size=2, epochs=5, patience=99),
        State.note,
    )
    theta, rates = starts(adapter, model, 3), torch.tensor([1e-2, 3e-3, 1e-3])
    train, dev = [make_rows(4, r) for r in range(3)], [make_rows(2, 50 + r) for r in range(3)]
    for rows in (*train, *dev):  # unequal lengths: packed, or padded where they are more
        rows[0].prompt *= lengths
    bad, wrong = theta.clone(), rates.clone()
    bad[1], wrong[1] = (
        (INF if where == "first weights" else theta[1]),
        (3e38 if where == "rate" else rates[1]),
    )
    poisoned = [
        [replace(row, activations=row.activations * NAN, soft=row.soft * NAN) for row in rows]
        for rows in train
    ]

    def trained(runs, theta=theta, rates=rates, train=train):
        weights, rows = (
            {n: torch.full((len(runs),), w) for n, w in MIXES[mix].items()},
            ([d[r] for r in runs] for d in (train, dev)),
        )
        given = Runs(theta[runs], rates[runs], *rows, weights, [partial(in_order, r) for r in runs])
        return TRAINERS[trainer](
            model, adapter, given, settings, hooks=Hooks(collate=in_batches)
        ).trained()

    broken = trained(
        [0, 1, 2], bad, wrong, [train[0], poisoned[1] if where == "rows" else train[1], train[2]]
    )
    assert broken.broken.tolist() == [0, 2, 0] and broken.steps.tolist() == [10, 2, 10]
    assert broken.theta[1].isnan().all() and broken.dev_loss[1] == INF and broken.best[1] == 0
    absent = trained([0, 2])

    def ends(state, *seen):
        note(state, *seen)
        state.going &= state.index != 1

    monkeypatch.setattr(State, "note", ends)
    healthy = trained([0, 1, 2])
    assert healthy.theta[1].isfinite().all() and healthy.steps.tolist() == [10, 2, 10]
    for name in ("theta", "dev_loss", "steps", "best"):
        mine, same = (getattr(found, name)[[0, 2]] for found in (broken, healthy))
        assert mine.numpy().tobytes() == same.numpy().tobytes(), name
        torch.testing.assert_close(mine, getattr(absent, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_last", [False, True])
def test_what_is_kept_of_a_run_that_diverges_after_a_good_loss(keep_last):
    settings, state = Settings(patience=99, keep_last=keep_last), State.begin(torch.zeros(3, 1))
    # the third run has ended, and stays so
    seen = [[5.0, 5.0, NAN], [4.0, 4.0, 1.0], [4.5, 4.5, 1.0], [3.0, INF, 1.0]]
    for step, losses in enumerate(seen, 1):
        state.step = step
        state.theta.detach().fill_(step)
        state.note(torch.tensor(losses), settings)
    assert state.going.tolist() == [True, False, False]
    assert state.last_step.tolist() == [4, 4, 1] and state.broken_step.tolist() == [0, 4, 1]
    assert (
        state.best_theta[:2, 0].tolist() == [4, 3 if keep_last else 2]
        and state.best_theta[2].isnan()
    )
    kept = f"diverged at step 4, kept as of step {3 if keep_last else 2}"
    assert troubles(state.trained()) == ["", kept, "failed at step 1: no finite loss"]


def told(call) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return list(dict.fromkeys(str(warning.message) for warning in said))


def test_runs_are_named_and_a_rate_that_failed_in_one_set_is_out():
    def found(*losses):
        broken = torch.tensor([0 if loss < INF else 2 for loss in losses])
        return Trained(torch.zeros(4, 1), torch.tensor(losses), broken + 4, 4 - 2 * broken, broken)

    runs = [(number, rate, None) for number in range(2) for rate in (1, 2)]
    two_sets = SimpleNamespace(name="toy", episodes=[None] * 2, configs=lambda method: runs)

    def warn(*losses):
        warn_of_failed_runs(two_sets, "sft", found(*losses))

    assert told(lambda: warn(1.0, 1.0, 1.0, 1.0)) == []
    said = ["toy, sft: set 0 at rate 2 failed at step 2: no finite loss"]
    assert told(lambda: warn(1.0, INF, 1.0, 1.0)) == said
    refused(
        lambda: warn(1.0, INF, INF, 1.0),
        "training toy, sft",
        "set 0 at rate 2",
        "lower --rates",
    )


@pytest.mark.parametrize("select", ["dev", "both"])
def test_a_study_shows_what_failed_and_never_chooses_it(subject, tmp_path, select):
    """IA2 fails at the first rate, and with it what goes on from there."""
    options, found = replace(SMALL, rates=(1e38, 1e-2), select=select), []
    said = told(lambda: found.extend(compare([MOOD], subject, options, tmp_path)))
    failed = "; ".join(
        f"set {number} at rate 1e+38 failed at step 1: no finite loss" for number in (0, 1)
    )
    assert said == [f"toy-mood-n2, {method}: {failed}" for method in ("sft", "ia2", "ia2-sft")]
    document, folder = found
    assert (
        {run["rate"] for run in document["runs"]}
        == {None, 1e-2}
        == {cell["rate"] for cell in document["cells"]}
    )
    assert (
        all(cell["acc_mean"] is not None for cell in document["cells"])
        and len(document["adapters"]) == 6
    )
    kept = json.loads((folder / "results.json").read_text())["training"]
    assert [(r["dev_loss"] is None, r["trouble"]) for r in kept] == [
        (True, "failed at step 1: no finite loss"),
        (False, ""),
    ] * 6
    write_report(document, folder)
    for text in (
        write_table(document),
        (folder / "table.txt").read_text(),
        (folder / "report.html").read_text(),
    ):
        for label in ("SFT", "IA2", "IA2→SFT"):
            assert (
                f"toy-mood, N = 2: {label} at rate 1e+38, set 0, 1: failed at step 1: no finite loss"
                in text
            )


def test_a_fit_shows_what_failed_and_never_chooses_it(subject, tmp_path):
    rows, found = world.rows("toy-mood-remap", "train")[4:19], []
    options = FitOptions(epochs=4, rates=(1e38, 1e-2), methods=("sft", "ia2-sft"), folds=3)
    with shipping("sft"):
        said = told(lambda: found.append(fit(rows, subject, options)))
    failed = "; ".join(
        f"fold {number} at rate 1e+38 failed at step 12: no finite loss" for number in (0, 1, 2)
    )  # ten rows in three steps, four epochs
    lines = [f"sft: {failed}", f"ia2-sft: {failed}"]
    columns = "columns: the prompt is 'text'; the answer is 'label'"
    remarks = [*lines, columns, "answers: 2 labels (1: 8, 0: 7)"]
    assert said == lines and found[0].report["remarks"] == remarks and found[0].spec["rate"] == 1e-2
    assert all(line in fit_table(found[0].report) for line in lines)
    found[0].save(tmp_path)
    assert json.loads((tmp_path / "ia2mini.json").read_text())["report"]["remarks"] == remarks
    assert found[0].theta.isfinite().all() and all(
        one["nll"][0] < 9 for one in found[0].report["candidates"].values()
    )


def test_a_final_training_that_diverges_ships_nothing(subject):
    rows, task = read_own(world.rows("toy-mood-remap", "train")[4:10])
    options = FitOptions(epochs=2, rates=(1e38,), methods=("sft",))
    cv = CrossValidation(subject, task, list(map(task.example, rows)), options)
    refused(
        lambda: train_final(cv, Candidate("sft", None, None, None)),
        "sft at rate 1e+38 diverged",
        "lower --rates",
    )
