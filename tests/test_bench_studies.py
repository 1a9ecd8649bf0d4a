"""bench/studies: what those of effect, causes, layers, gain and fit say, against documents and by hand."""

import json
import sys
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.__main__ import main  # noqa: E402
from bench.studies import after, causes, controls, effect, fit, gain, layers, reopened  # noqa: E402
from bench.studies import tasks as study_tasks  # noqa: E402
from ia2mini import UsageError, draw_episode, open_subject  # noqa: E402
from ia2mini.engine.options import FitOptions, Options  # noqa: E402
from ia2mini.engine.select import chosen  # noqa: E402
from ia2mini.study.study import compare  # noqa: E402
from ia2mini.tasks import find_task, load_examples  # noqa: E402


def test_the_effect_is_what_the_librarys_document_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study_tasks.TASKS, "classification", ("toy-mood", "toy-topic"))
    options = Options(n=(2,), sets=2, methods=effect.METHODS, eval_rows=10, epochs=3)
    found = effect.effect(open_subject("tiny", "cpu"), options, "classification")
    (kept,) = Path("runs").iterdir()
    document = json.loads((kept / "results.json").read_text())

    def mean(method: str, ood: bool, metric: str) -> float:
        return fmean(
            c[metric] for c in document["cells"] if (c["method"], c["ood"]) == (method, ood)
        )

    for ood, what in (
        (False, "classification, N = 2"),
        (True, "classification, N = 2, out of distribution"),
    ):
        lines = {line.stack: line.rates for line in found.lines if line.what == what}
        assert lines.keys() == set(effect.METHODS)
        for method, rates in lines.items():
            assert rates["% accuracy"] == pytest.approx(100 * mean(method, ood, "acc_mean"))
            assert rates["ECE"] == pytest.approx(mean(method, ood, "ece_mean"))
        for control in ("sft", "sft-sft"):
            gain = 100 * (mean("ia2-sft", ood, "acc_mean") - mean(control, ood, "acc_mean"))
            assert found.ratios[f"{what}: acc gain over {control}"] == pytest.approx(gain, abs=1e-9)
            (said,) = [
                r for r in found.remarks if r.startswith(f"{what}: ia2-sft against {control}: acc ")
            ]
            assert said.endswith(f"acc {gain:+.1f}, 4 pairs, too few for a test")
    overlap = fmean(o["mean"] for o in document["overlap"] if o["methods"] == ["ia2", "ia2-sft"])
    assert found.ratios[
        "classification, N = 2: subspace overlap ia2 with ia2-sft"
    ] == pytest.approx(overlap)
    assert any("asim with ICL base" in remark for remark in found.remarks)
    (mood,) = [
        line
        for line in found.lines
        if (line.what, line.stack) == ("toy-mood, N = 2", "ia2-sft over sft")
    ]
    cells = {
        c["method"]: c for c in document["cells"] if (c["task"], c["ood"]) == ("toy-mood", False)
    }
    over = {
        name: 100 * (cells[name]["acc_mean"] - cells["sft"]["acc_mean"])
        for name in ("ia2-sft", "icl")
    }
    assert (mood.rates["points gain"], mood.rates["points lead"]) == pytest.approx(
        (over["ia2-sft"], over["icl"])
    )


def test_the_matrix_of_causes_compares_the_same_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study_tasks.TASKS, "classification", ("toy-mood", "toy-topic"))
    options = Options(n=(2,), sets=1, eval_rows=4, epochs=1, rates=(1e-2,))
    found = causes.causes(open_subject("tiny", "cpu"), options, "classification")
    documents = [json.loads(file.read_text()) for file in Path("runs").glob("*/results.json")]
    what = "classification, N = 2"
    lines = {line.stack: line.rates for line in found.lines if line.what == what}
    names = {
        f"{first}{then}, {teacher}"
        for first in causes.MATCHED
        for then in ("", "-sft")
        for teacher in causes.TEACHERS
    }
    assert lines.keys() == {*causes.CONTROLS, *names} and len(documents) == 4
    demonstrated = {
        line.stack: line.rates
        for line in found.lines
        if line.what == f"{what}, with demonstrations"
    }
    assert demonstrated.keys() == {
        "sft",
        "sft-sft",
        "ia2",
        "ridge",
        *(f"{first}-sft" for first in causes.MATCHED),
    }
    spent = {
        line.stack: line.rates
        for line in found.lines
        if line.what == "classification, cost of training"
    }
    for rate in ("TFLOP", "million tokens", "s"):
        assert (
            spent["ia2-sft"][rate] > spent["ia2"][rate] > 0
            and spent["sft-sft"][rate] > spent["sft"][rate] > 0
        )
        assert spent["ia2"][rate] > spent["ridge"][rate] or rate == "s"
    each = {}
    for document in documents:
        drawn = document["config"].get("draw")  # the true teacher's sets are those of `ia2mini run`
        (teacher,) = (
            t
            for t in causes.TEACHERS
            if (drawn and repr(t) in drawn) or (not drawn and t == "true")
        )
        each[teacher] = [c for c in document["cells"] if not c["ood"]]
    assert each.keys() == set(causes.TEACHERS)
    for teacher, cells in each.items():
        mean = fmean(c["nll_oracle_mean"] for c in cells if c["method"] == "hidden-sft")
        assert lines[f"hidden-sft, {teacher}"]["nll_oracle"] == pytest.approx(mean)

    def accuracies(teacher, method):
        return [acc for c in each[teacher] if c["method"] == method for acc in c["acc"]]

    pairs = zip(accuracies("true", "ia2-sft"), accuracies("other", "ia2-sft"), strict=True)
    gain = 100 * fmean(a - b for a, b in pairs)
    (said,) = [
        r
        for r in found.remarks
        if r.startswith(f"{what}: acc: ia2-sft, true against ia2-sft, other: ")
    ]
    assert f"other: {gain:+.1f}, " in said and said.endswith("pairs, too few for a test")
    assert any("risk-coverage curve: ia2-sft, true against sft: " in said for said in found.remarks)
    for one, other in combinations(causes.MATCHED, 2):
        less = 100 * (
            fmean(accuracies("true", f"{one}-sft")) - fmean(accuracies("true", f"{other}-sft"))
        )
        start = f"{what}: acc: {one}-sft, true against {other}-sft, true: "
        (said,) = (
            remark.removeprefix(start) for remark in found.remarks if remark.startswith(start)
        )
        assert float(said.split()[0].rstrip(",")) == pytest.approx(less, abs=0.051)


def test_demonstrations_before_an_adapted_model_are_those_of_its_set(tmp_path, monkeypatch):
    """With weights that change nothing the accuracies are ICL's, of its own task and of the next."""
    monkeypatch.chdir(tmp_path)
    tasks, options = (
        [find_task(name) for name in ("toy-mood", "toy-sums")],
        Options(n=(2,), sets=2, eval_rows=8),
    )
    subject, options = (
        open_subject("tiny", "cpu"),
        replace(options, methods=("icl", "sft"), epochs=1, rates=(1e-2,)),
    )
    document, _ = compare(tasks, subject, options, reopened.RUNS)
    icl = {
        c["task"]: c["acc"]
        for c in document["cells"]
        if c["method"] == "icl" and c["eval"] == c["task"]
    }
    cells = reopened.reopen(tasks, subject, options)
    nothing = cells[0].experiment.adapter.init(torch.Generator())
    theta = torch.randn(6, len(nothing))  # of the other runs, which break the model
    theta[[2, 5]] = nothing
    for mine in cells:
        mine = replace(
            mine, trained={"sft": SimpleNamespace(theta=theta)}, scored_runs={"sft": [2, 5]}
        )
        for asked in cells:
            found = after.accuracies_with_demonstrations(mine, "sft", asked)
            assert found == pytest.approx(icl[asked.cell.task.name])


def test_a_study_is_reopened_as_it_was(tmp_path, monkeypatch):
    """Its sets, its weights and the runs that it scored; nothing is taught or trained again."""
    monkeypatch.chdir(tmp_path)
    tasks, subject = [find_task("toy-mood")], open_subject("tiny", "cpu")
    options = Options(n=(2,), sets=2, methods=("sft",), eval_rows=8, epochs=2, rates=(1e-3, 1e-2))
    document, folder = compare(tasks, subject, options, reopened.RUNS)
    monkeypatch.setattr(
        "ia2mini.engine.experiment.teach", lambda *_, **__: pytest.fail("taught again")
    )
    monkeypatch.setattr(
        "ia2mini.engine.experiment.train_method", lambda *_: pytest.fail("trained again")
    )
    (one,) = reopened.reopen(tasks, subject, options)
    assert one.experiment.store.path == folder and one.training["sft"] == document["training"]
    assert one.cell.episodes == [
        draw_episode(load_examples(tasks[0], "train").rows, 2, number) for number in range(2)
    ]
    rate, _ = chosen(document["training"], "dev")
    assert [document["training"][run]["rate"] for run in one.scored_runs["sft"]] == [rate, rate]


def test_the_other_task_of_a_control_is_the_next_one():
    pools = [
        load_examples(find_task(name), "train").rows
        for name in ("toy-mood", "toy-topic", "toy-sums")
    ]
    for place, pool in enumerate(pools):
        following = draw_episode(pools[(place + 1) % 3], 6, 1, 5)
        true = draw_episode(pool, 6, 1, 5)
        found = {
            teacher: controls.Control(teacher, pools)(pool, 6, 1, 5)
            for teacher in controls.TEACHERS
        }
        assert found["true"] == true and found["other"].demonstrations == following.demonstrations
        assert (
            found["none"].demonstrations == [[]] * 9
            and found["shuffled"].demonstrations != true.demonstrations
        )
        for episode in found.values():
            assert (episode.train, episode.dev, episode.icl) == (true.train, true.dev, true.icl)
    names = {repr(controls.Control(teacher, pools)) for teacher in controls.TEACHERS}
    assert len(names) == 4 and all(len(name) < 40 for name in names), (
        "a folder is found again by it"
    )


def test_bands_of_layers():
    found = layers.bands(30)
    assert list(found) == [
        "all",
        "first third",
        "middle third",
        "last third",
        *[f"{2**k} of 30" for k in range(5)],
    ]
    assert found["1 of 30"] == (15,) and found["4 of 30"] == (3, 11, 18, 26)
    assert found["all"] == () and found["first third"] + found["middle third"] + found[
        "last third"
    ] == tuple(range(30))
    assert [len(found[f"{name} third"]) for name in ("first", "middle", "last")] == [10, 10, 10]
    assert list(layers.bands(2)) == ["all", "first third", "middle third", "last third", "1 of 2"]


def test_which_layers_matter_is_told_with_a_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study_tasks.TASKS, "classification", ("toy-mood",))
    options = Options(n=(2,), sets=2, eval_rows=4, epochs=1, rates=(1e-2,))
    found = layers.layers(
        open_subject("tiny", "cpu"), options, "classification", matched=("ridge",)
    )
    lines = {line.stack: line.rates for line in found.lines}
    for band in layers.bands(open_subject("tiny", "cpu").model.config.num_hidden_layers):
        gain = lines[f"ridge-sft, {band}"]["% accuracy"] - lines["sft"]["% accuracy"]
        assert lines[f"ridge-sft, {band}"]["points gain"] == pytest.approx(gain)
    (tmp_path / "2026-01-01-layers-classification-cpu.json").write_text(
        json.dumps({"results": [asdict(found)]})
    )
    layers.draw(tmp_path, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_a_study_says_which_choice_of_the_rate_it_needs():
    for name, select in (("causes", "both"), ("layers", "eval")):
        said = CliRunner().invoke(main, [name, "--select", select])
        assert said.exit_code == 2 and name in said.stderr and "leave out --select" in said.stderr


def test_relations_are_read_from_a_folder(tmp_path, shared_data):
    names = [task.name for task in study_tasks.tasks_of("relations", shared_data)]
    assert names == ["antonym", "present_past", "singular_plural"]
    for folder in (None, tmp_path):
        with pytest.raises(UsageError, match="--data-dir"):
            study_tasks.tasks_of("relations", folder)


def test_the_figure_of_gains_reads_the_newest_results(tmp_path):
    def kept(name: str, *lines: tuple) -> None:
        lines = [{"what": what, "stack": stack, "rates": rates} for what, stack, rates in lines]
        (tmp_path / name).write_text(json.dumps({"results": [{"lines": lines}]}))

    def point(what: str, lead: float, gained: float) -> list[tuple]:
        over = {
            "points lead": lead,
            "points gain": gained,
            "points low": gained - 1,
            "points high": gained + 2,
        }
        return [(what, "ia2", {"asim": lead / 100}), (what, "ia2-sft over sft", over)]

    kept("2026-01-01-effect-relations-cpu.json", *point("old", 1, 1))
    kept(
        "2026-01-02-effect-relations-cpu.json",
        *point("a", 1, 2),
        *point("b", 5, 4),
        *point("c", -3, 0),
    )
    (tmp_path / "2026-01-02-ridge-pairs-cpu.json").write_text('{"what": "no results of ours"}')
    numbers = {"held out % icl": 50.0, "held out % sft": 75.0, "% ia2-sft": 80.0, "% sft": 90.0}
    kept(
        "2026-01-01-fit-gate-cpu.json",
        ("task", "ships sft", numbers),
        ("other", "ships sft", numbers | {"% sft": 1}),
    )
    found = gain.points(tmp_path)
    assert (
        found["real"][0] == gain.Point("a", 1, 2, 1, 4, 0.01)
        and len(found["real"]) == 3
        and "toy" not in found
    )
    assert [(p.lead, p.gain) for p in found["fit"]] == [(-25, -10), (-25, 79)]
    result = gain.gain(tmp_path, tmp_path / "gain.png")
    assert (
        tmp_path / "gain.png"
    ).stat().st_size > 5000 and "Spearman's ρ = 1.00" in result.remarks[0]
    assert result.ratios["real relations, SmolLM2-135M, ICL ahead of SFT: mean gain of 2"] == 3


def test_generated_fits_are_judged_by_fresh_rows(monkeypatch):
    generated = fit.generated
    monkeypatch.setattr(fit, "FRESH", 20)
    monkeypatch.setattr(fit, "generated", lambda number: generated(number, ("words", "random")))
    options = FitOptions(
        methods=("sft", "ridge-sft"), epochs=1, rates=(1e-2,), folds=2, demonstrations=2
    )
    found = fit.gate(open_subject("tiny", "cpu"), 2, options)
    assert [line.what.split()[0] for line in found.lines] == ["words", "random"]
    for line in found.lines:
        rates = line.rates
        names = {"base", "icl", "sft", "ridge-sft"}
        stated = {"stated %", "stated low", "stated high"}
        assert {f"% {name}" for name in names} | stated <= rates.keys()
        for name in names:
            right = rates[f"% {name}"] / 5
            assert right == pytest.approx(round(right)), "of twenty fresh rows"
        shipped = rates[f"% {line.stack.removeprefix('ships ')}"]
        lost = max(rates["% base"], rates["% icl"], rates["% sft"]) - shipped
        assert line.note.startswith(f"{-lost:+.1f} points")
        held = rates["stated low"] <= shipped <= rates["stated high"]
        assert held != ("outside" in line.note)
    words, random_labels = found.lines
    share = 0.0 if "outside" in words.note else 1.0
    assert found.ratios["share within the stated interval, all (1)"] == share
    none = 1 if random_labels.stack == "ships base" else 0
    assert f"nothing shipped for {none} of 1" in found.remarks[-1]
