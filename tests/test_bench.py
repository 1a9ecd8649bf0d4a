"""bench: the FLOP formula against torch's own counter, the peers against us, and what is extrapolated or said."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import causes, choice, effect, gain, inference, report, timing, training  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.shapes import stand  # noqa: E402
from ia2mini import UsageError, adapted, draw_episode, graphs, open_subject  # noqa: E402
from ia2mini.batch import Row  # noqa: E402
from ia2mini.cli import progress  # noqa: E402
from ia2mini.cost import Pass, flops  # noqa: E402
from ia2mini.episode import with_demonstrations  # noqa: E402
from ia2mini.experiment import FURTHER  # noqa: E402
from ia2mini.options import Options  # noqa: E402
from ia2mini.study import open_study  # noqa: E402
from ia2mini.tasks import load_examples  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    return stand("tiny", layers=2)


@pytest.mark.parametrize("method", ["ia2", "sft"])
def test_flops_formula_matches_torch_counter(tiny, method):
    phase, head = training.PHASES[method][0], method == "sft"
    target = torch.zeros(2, 3, tiny.config.hidden_size)
    rows = [Row(list(range(20, 28)), [1, 2, 3], target) for _ in range(4)]
    step = training.OurStep(tiny, [rows], phase, tiny.theta())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.gradient()
    formula = flops(tiny.config, Pass(4, 10, 12, head, backward=True, rank=8))
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        tiny.model(step.batch.ids, logits=step.batch.at if head else False)
    assert flops(tiny.config, Pass(4, 10, 12, head)) == counter.get_total_flops()


def test_both_peers_compute_what_we_compute(tiny):
    for method in training.PHASES:
        assert "same" in training.check_step(tiny, training.taught_set(tiny, 4, 0, (5, 9), 3).icl_train, method)
    assert "same" in training.check_cell(tiny)


def test_both_sides_score_the_chosen_rates_runs_or_all_of_them(tiny, monkeypatch):
    monkeypatch.setattr(training, "RATES", (1e-5, 3e-2))  # their dev losses differ more than the stacks do
    prompts = tiny.prompts(4, training.SST2_LENGTHS)
    found = {}
    for select, runs in (("dev", 2), ("eval", 4)):
        size = training.Size(2, 2, 4, 4, select=select)
        sides = [training.our_cell(tiny, size, prompts)]
        sides += [training.peer_cell(kind(tiny), size, prompts) for kind in training.PEERS.values()]
        for _, picked, tops in sides:
            assert picked == sides[0][1] and tops.shape == (3, runs, 4)
            torch.testing.assert_close(tops, sides[0][2], atol=1e-3, rtol=1e-3)
        found[select] = sides[0][1:]
    assert all(some in ([0, 2], [1, 3]) for some in found["dev"][0]) and found["eval"][0] == [[0, 1, 2, 3]] * 3
    chosen = torch.stack([tops[some] for some, tops in zip(found["dev"][0], found["eval"][1])])
    torch.testing.assert_close(chosen, found["dev"][1])
    assert training.Size(3, 2).chosen(torch.tensor([1.0, 0.9, 1.0, 0.9, 1.0, 1.3])) == [0, 2, 4]  # means over sets


def test_a_cell_says_on_both_sides_which_runs_it_scores(tiny):
    for select, said in (("dev", "scores the chosen rate's runs, 3 of 6"), ("eval", "scores every run, 6 of 6")):
        whole = training.Size(1, 2, 2, 4, select=select)
        part = training.Size(1, 1, 2, 4, select=select)
        found = training.cell(tiny, whole, {"(a)": part, "(b)": part}, repeats=1)
        notes = {line.stack: line.note for line in found.lines if line.what == "whole cell"}
        assert notes.keys() == {"us", "(a)", "(b)"} and all(note.startswith(said) for note in notes.values())
        assert notes["us"].endswith("; whole") and "extrapolated from 3 of 6 runs" in notes["(a)"]


def test_the_effect_is_what_the_librarys_document_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(effect.TASKS, "classification", ("toy-mood", "toy-topic"))
    options = Options(n=(2,), sets=2, methods=effect.METHODS, eval_rows=10, epochs=3)
    found = effect.effect(open_subject("tiny", "cpu"), options, "classification")
    (kept,) = Path("runs").iterdir()
    document = json.loads((kept / "results.json").read_text())

    def mean(method: str, ood: bool, metric: str) -> float:
        return fmean(c[metric] for c in document["cells"] if (c["method"], c["ood"]) == (method, ood))

    for ood, what in ((False, "classification, N = 2"), (True, "classification, N = 2, out of distribution")):
        lines = {line.stack: line.rates for line in found.lines if line.what == what}
        assert lines.keys() == set(effect.METHODS)
        for method, rates in lines.items():
            assert rates["% accuracy"] == pytest.approx(100 * mean(method, ood, "acc_mean"))
            assert rates["ECE"] == pytest.approx(mean(method, ood, "ece_mean"))
        for control in ("sft", "sft-sft"):
            gain = 100 * (mean("ia2-sft", ood, "acc_mean") - mean(control, ood, "acc_mean"))
            assert found.ratios[f"{what}: acc gain over {control}"] == pytest.approx(gain, abs=1e-9)
            (said,) = [r for r in found.remarks if r.startswith(f"{what}: ia2-sft against {control}: acc ")]
            assert f"acc {gain:+.1f} (95 % " in said and said.endswith("4 pairs")
    overlap = fmean(o["mean"] for o in document["overlap"] if o["methods"] == ["ia2", "ia2-sft"])
    assert found.ratios["classification, N = 2: subspace overlap ia2 with ia2-sft"] == pytest.approx(overlap)
    assert any("asim with ICL base" in remark for remark in found.remarks)
    (mood,) = [line for line in found.lines if (line.what, line.stack) == ("toy-mood, N = 2", "ia2-sft over sft")]
    cells = {c["method"]: c for c in document["cells"] if (c["task"], c["ood"]) == ("toy-mood", False)}
    over = {name: 100 * (cells[name]["acc_mean"] - cells["sft"]["acc_mean"]) for name in ("ia2-sft", "icl")}
    assert (mood.rates["points gain"], mood.rates["points lead"]) == pytest.approx((over["ia2-sft"], over["icl"]))


def test_the_matrix_of_causes_compares_the_same_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(effect.TASKS, "classification", ("toy-mood", "toy-topic"))
    options = Options(n=(2,), sets=2, eval_rows=10, epochs=1, rates=(1e-2,))
    found = causes.causes(open_subject("tiny", "cpu"), options, "classification")
    documents = [json.loads(file.read_text()) for file in Path("runs").glob("*/results.json")]
    what = "classification, N = 2"
    lines = {line.stack: line.rates for line in found.lines if line.what == what}
    names = {
        f"{first}{then}, {teacher}" for first in causes.MATCHED for then in ("", "-sft") for teacher in causes.TEACHERS
    }
    assert lines.keys() == {*causes.CONTROLS, *names} and len(documents) == 4
    each = {d["config"]["teacher"]: [c for c in d["cells"] if not c["ood"]] for d in documents}
    for teacher, cells in each.items():
        mean = fmean(c["nll_oracle_mean"] for c in cells if c["method"] == "hidden-sft")
        assert lines[f"hidden-sft, {teacher}"]["nll_oracle"] == pytest.approx(mean)

    def accuracies(teacher, method):
        return [acc for c in each[teacher] if c["method"] == method for acc in c["acc"]]

    pairs = zip(accuracies("true", "ia2-sft"), accuracies("other", "ia2-sft"), strict=True)
    gain = 100 * fmean(a - b for a, b in pairs)
    assert any(
        f"{what}: acc: ia2-sft, true against ia2-sft, other: {gain:+.1f} (95 % " in said for said in found.remarks
    )
    assert any("risk-coverage curve: ia2-sft, true against sft: " in said for said in found.remarks)


def test_rules_for_the_rate_judged_by_hand(tmp_path, monkeypatch):
    """Every rule's accuracy from the kept runs; the KL by a plain pass over each run and row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(effect.TASKS, "classification", ("toy-mood",))
    options = Options(n=(4,), sets=2, methods=effect.METHODS, eval_rows=10, epochs=3, select="both")
    subject = open_subject("tiny", "cpu")
    found = choice.choice(subject, options, "classification", folds=True)
    lines = {(line.what.rpartition(" ")[2], line.stack): line.rates["% accuracy"] for line in found.lines}
    document = json.loads((next(Path("runs").iterdir()) / "run.json").read_text())
    effect.effect(subject, options, "classification")
    runs = [r for r in json.loads(next(Path("runs").glob("*/results.json")).read_text())["runs"] if not r["ood"]]
    for method in choice.METHODS:
        table = {rate: [r for r in runs if (r["method"], r["rate"]) == (method, rate)] for rate in document["rates"]}
        accuracy = {rate: 100 * fmean(r["acc"] for r in mine) for rate, mine in table.items()}
        pooled = min(table, key=lambda rate: fmean(r["dev_loss"] for r in table[rate]))
        assert lines[method, choice.POOLED] == pytest.approx(accuracy[pooled])
        assert lines[method, "best afterwards, one for all sets"] == pytest.approx(max(accuracy.values()))
        own = [min((t[s] for t in table.values()), key=lambda r: r["dev_loss"])["acc"] for s in range(2)]
        assert lines[method, "dev loss, each set's own"] == pytest.approx(100 * fmean(own))
        assert lines[method, "cross-validation"] in [pytest.approx(a) for a in accuracy.values()]
    assert ("ia2-sft", "dev loss of IA2's phase") in lines and ("sft", "dev loss of IA2's phase") not in lines
    raced = choice.race(subject, replace(options, race=False), "classification")
    spent = {m: sum(r["steps"] for r in runs if r["method"] == m) for m in ("sft", "ia2-sft")}
    found = {line.stack: line.rates["share of the steps"] * spent[line.stack] for line in raced.lines}
    kept = [json.loads(path.read_text()) for path in Path("runs").glob("*/run.json")]
    assert found == pytest.approx(spent) and {document["race"] for document in kept} == {
        True,
        False,
    }  # 3 looks: no race
    assert raced.ratios["share of choices that change"] == 0
    (experiment,), _ = open_study([effect.find_task("toy-mood")], subject, options, Path("runs"), None, None, progress)
    found, pool, model = (
        experiment.divergences("ia2-sft"),
        load_examples(experiment.task, "train").rows,
        subject.model,
    )
    for r in (0, 5):
        drawn, losses = draw_episode(pool, 4, r // 3, more=FURTHER), []
        for row, shown in zip(drawn.unlabelled, drawn.more_demonstrations, strict=True):
            seen = torch.tensor([subject.tokenizer.encode(with_demonstrations(shown, row.prompt))])
            wanted = model(seen)[0, -1].float().log_softmax(-1)
            with adapted(model, experiment.adapter, experiment.trained("ia2-sft").theta[r : r + 1]) as student:
                said = student(torch.tensor([subject.tokenizer.encode(row.prompt)]))[0, -1].float().log_softmax(-1)
            losses.append((wanted.exp() * (wanted - said)).sum().item())
        assert found[r].item() == pytest.approx(fmean(losses), abs=1e-4)


def test_relations_are_read_from_a_folder(tmp_path, shared_data):
    names = [task.name for task in effect.tasks_of("relations", shared_data)]
    assert names == ["antonym", "present_past", "singular_plural"]
    for folder in (None, tmp_path):
        with pytest.raises(UsageError, match="--data-dir"):
            effect.tasks_of("relations", folder)


def test_the_figure_of_gains_reads_the_newest_results(tmp_path):
    def kept(name: str, *lines: tuple) -> None:
        lines = [{"what": what, "stack": stack, "rates": rates} for what, stack, rates in lines]
        (tmp_path / name).write_text(json.dumps({"results": [{"lines": lines}]}))

    def point(what: str, lead: float, gained: float) -> list[tuple]:
        over = {"points lead": lead, "points gain": gained, "points low": gained - 1, "points high": gained + 2}
        return [(what, "ia2", {"asim": lead / 100}), (what, "ia2-sft over sft", over)]

    kept("2026-01-01-effect-relations-cpu.json", *point("old", 1, 1))
    kept("2026-01-02-effect-relations-cpu.json", *point("a", 1, 2), *point("b", 5, 4), *point("c", -3, 0))
    numbers = {"held out % icl": 50.0, "held out % sft": 75.0, "% ia2-sft": 80.0, "% sft": 90.0}
    kept("2026-01-01-fit-gate-cpu.json", ("task", "ships sft", numbers), ("other", "ships sft", numbers | {"% sft": 1}))
    found = gain.points(tmp_path)
    assert found["real"][0] == gain.Point("a", 1, 2, 1, 4, 0.01) and len(found["real"]) == 3 and "toy" not in found
    assert [(p.lead, p.gain) for p in found["fit"]] == [(-25, -10), (-25, 79)]
    result = gain.gain(tmp_path, tmp_path / "gain.png")
    assert (tmp_path / "gain.png").stat().st_size > 5000 and "Spearman's ρ = 1.00" in result.remarks[0]
    assert result.ratios["real relations, SmolLM2-135M, ICL ahead of SFT: mean gain of 2"] == 3


def test_options_of_the_command():
    shown = CliRunner().invoke(main, ["cell", "--help"])
    assert shown.exit_code == 0 and "--select" in shown.stdout and "dev" in shown.stdout
    for name in set(main.commands) - {"cell", "effect", "causes", "choice", "race"}:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0 and "--select" not in shown.stdout
    wrong = CliRunner().invoke(main, ["--shape", "tiny", "step"])
    assert wrong.exit_code == 2 and "options come after the command: python -m bench step" in wrong.stderr


def test_disagreement_stops_the_bench():
    with pytest.raises(AssertionError, match="loss: the stacks differ by 1.0e-02"):
        report.agree("loss", 1.01, 1.0, 1e-3)


def test_extrapolation_scales_each_stage_by_its_own_count_and_says_so():
    whole, some = training.Size(), training.Size(sets=1, rates=1, steps=10, rows=50)
    once = {"collect": 1.0, "train": 1.0, "evaluate": 1.0}
    assert some.times(once, whole, 0.1) == {"collect": 5.0, "train": 75.0, "evaluate": 50.0}  # a run a set is scored
    counts = "3 of 45 runs, 3 of 15 scored runs, 10 of 50 steps, 50 of 500 rows"
    assert some.said(whole) == f"extrapolated from {counts}" and whole.said(whole) == "whole"
    every, some = replace(whole, select="eval"), replace(some, select="eval")
    assert some.times(once, every, 0.1) == {"collect": 5.0, "train": 75.0, "evaluate": 150.0}


def test_race_takes_turns_and_reports_median_and_spread():
    turns = []
    times = timing.race({"us": lambda: turns.append("us"), "them": lambda: turns.append("them")}, repeats=3)
    assert turns == ["us", "them"] * 4  # a round to warm up, then three
    assert times["us"].repeats == 3 and times["us"].low <= times["us"].seconds <= times["us"].high


def test_recordings_are_made_before_anything_is_timed(monkeypatch):
    """A stand-in recorder whose recording, as the calls before it, is slow: only replays are timed, and it is said."""

    class Recorder:
        def __init__(self, device):
            pass

        def __call__(self, function):
            calls.append("recording")
            return lambda: calls.append("replay"), None

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Recorder)
    calls, timed, turns = [], [], []
    step = graphs.CapturedStep(lambda: calls.append("eager"), torch.device("cpu"))
    plain = timing.Timing.of
    monkeypatch.setattr(timing.Timing, "of", lambda values: timed.append(len(values)) or plain(values))
    timing.recorded()
    timing.race({"us": step, "them": lambda: turns.append(1)}, repeats=3)
    assert calls[: graphs.OFTEN + 1] == ["eager"] * graphs.OFTEN + ["recording"]
    assert timed == [3, 3] and calls[-3:] == ["replay"] * 3 and "eager" not in calls[graphs.OFTEN + 1 :]
    assert len(turns) == graphs.OFTEN + 1 + 1 + 3, "the others warm up as long"
    rounds = graphs.OFTEN + 1 + 1 + 3
    said = f"CUDA graphs: recorded 1 ×, {rounds - graphs.OFTEN} of {rounds} calls replayed, warming up included"
    assert timing.recorded() == said and timing.recorded() == ""


def test_tensors_are_counted_at_their_most():
    def step():
        return torch.ones(10_000_000) + torch.ones(5_000_000).sum()  # 40 MB, 20 MB for a while, 40 MB

    assert timing.allocated(step) == pytest.approx(80e6, rel=0.01)
    assert timing.allocated(lambda: torch.ones(5_000_000).sum()) == pytest.approx(20e6, rel=0.01)


def test_inference_benches_agree_and_name_what_is_extrapolated(tiny):
    found = inference.collect(tiny, rows=2, tokens=8, sample=2, seconds=0)
    assert {"(a) / us", "(b) / us", "tapped / plain"} == found.ratios.keys()
    assert [line.note for line in found.lines if line.stack == "(a)"] == ["extrapolated from 2 of 16 passes"]
    assert inference.generate(tiny, 4, 8, 16, seconds=0).ratios["(a) / us"] > 0
    assert "(b) with a copied cache / us" in inference.icl(tiny, queries=20, shown=3, sample=8, seconds=0).ratios


def test_a_sample_of_prompts_is_padded_as_little_as_all_of_them(tiny):
    prompts = tiny.prompts(500, training.SST2_LENGTHS)
    for rows in (40, 128):
        some = sorted(map(len, training.sample(prompts, rows, "us")))
        assert len(some) == rows
        padded = sum(max(block) * len(block) for block in (some[: rows // 2], some[rows // 2 :]))
        assert sum(some) / padded > 0.75
        assert sum(some) / rows == pytest.approx(sum(map(len, prompts)) / 500, rel=0.1)
    assert training.sample(prompts, 40, "(a)") == prompts[:40] and training.sample(prompts, 500, "us") == prompts
