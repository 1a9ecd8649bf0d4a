"""`compare` on the embedded model: which runs are scored, what a run's folder is named by, phases; the front door."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click import BadParameter
from plain import Plain, joined, label_log_probability
from reference import peft_twin, upstream
from safetensors.torch import load_file

import ia2mini
from bench.studies.controls import TEACHERS, Control
from ia2mini import UsageError
from ia2mini.cli.options import CommaSeparated
from ia2mini.engine.options import TINY_RATES, Options
from ia2mini.engine.progress import silent
from ia2mini.engine.subject import open_subject as load_subject
from ia2mini.methods import METHODS
from ia2mini.metrics import fit_temperature
from ia2mini.study import scoring, study
from ia2mini.study.cells import make_cells
from ia2mini.study.study import compare
from ia2mini.tasks import custom_task, find_task, load_examples, world

EVERY = ("base", "icl", "sft", "ia2", "ia2-sft", "ia2+sft")
SMALL = Options(
    n=(2,), sets=2, epochs=4, eval_rows=12, methods=EVERY, rates=(1e-3, 1e-2), betas=(0.3, 0.7)
)
MOOD, SUMS = find_task("toy-mood"), replace(find_task("toy-sums"), max_tokens=12)
# of a cell that is not run
NOTHING = {"runs": [], "training": [], "overlap": [], "adapters": [], "samples": []}


@pytest.fixture(scope="module")
def subject():
    torch.set_num_threads(1)
    return load_subject("tiny", "cpu", None, None)


@pytest.fixture(scope="module")
def studied(subject, tmp_path_factory):
    """select -> (document, folder), for labels and for texts."""
    out = tmp_path_factory.mktemp("runs")
    texts = replace(SMALL, methods=("icl", "sft", "ia2-sft"), eval_rows=3, epochs=2)
    found = {
        select: compare([MOOD], subject, replace(SMALL, select=select), out)
        for select in ("dev", "eval", "both")
    }
    return found | {
        f"{s} texts": compare([SUMS], subject, replace(texts, select=s), out)
        for s in ("dev", "both")
    }


def config_of(run: dict) -> tuple:
    return run["rate"], run["beta"]


def best(training: list[dict], method: str) -> tuple | None:
    """(rate, β) of the lowest mean dev loss over sets."""
    losses: dict[tuple, list[float]] = {}
    for run in (run for run in training if run["method"] == method):
        losses.setdefault(config_of(run), []).append(run["dev_loss"])
    return min(losses, key=lambda config: fmean(losses[config])) if losses else None


def same(one: dict, other: dict) -> None:
    """Two records agree: exactly, but for the rounding of runs that were scored side by side with others."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, (float, list)):
            pair = (np.array(each[key], np.float64) for each in (one, other))  # None is NaN
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-5, err_msg=key)
        else:
            assert value == other[key], key
    assert one["acc"] == other["acc"]


@pytest.mark.parametrize("kind", ["", " texts"])
def test_dev_selection_scores_just_what_scoring_all_gives_for_the_chosen_rate(kind, studied):
    (dev, _), (both, _) = studied[f"dev{kind}"], studied[f"both{kind}"]
    assert dev["training"] == both["training"]  # all runs are trained either way
    picks = {method: best(both["training"], method) for method in dev["config"]["methods"]}
    expected = [run for run in both["runs"] if picks[run["method"]] in (None, config_of(run))]
    assert len(dev["runs"]) == len(expected) < len(both["runs"])
    for one, other in zip(dev["runs"], expected):
        same(one, other)
    cells = [cell for cell in both["cells"] if cell["selected_by"] in ("dev", None)]
    for one, other in zip(dev["cells"], cells, strict=True):
        same(one | {"acc": one["acc"][0]}, other | {"acc": other["acc"][0]})
    assert dev["adapters"] == both["adapters"] and dev["overlap"] == both["overlap"]


def test_long_rows_are_scored_one_set_after_another(subject, tmp_path, monkeypatch):
    options = replace(SMALL, methods=("base", "sft"), betas=(), epochs=1)
    whole, _ = compare([MOOD], subject, options, tmp_path / "whole")
    monkeypatch.setattr(scoring, "ROW_TOKENS", 1)
    groups = []
    plain = scoring.score_runs

    def noted(e, method, runs, references, bar):
        groups.append((method, len(runs)))
        return plain(e, method, runs, references, bar)

    monkeypatch.setattr(scoring, "score_runs", noted)
    parts, _ = compare([MOOD], subject, options, tmp_path / "parts")
    assert groups == [("base", 1), ("sft", 1), ("sft", 1)] * len(MOOD.evals)
    for one, other in zip(parts["runs"], whole["runs"], strict=True):
        same(one, other)


def test_eval_selection_scores_every_run_and_chooses_as_the_paper(studied):
    (every, _), (both, _) = studied["eval"], studied["both"]
    assert every["runs"] == both["runs"] and every["training"] == both["training"]
    assert every["cells"] == [
        cell for cell in both["cells"] if cell["selected_by"] in ("eval", None)
    ]
    count = {
        m: len([r for r in every["runs"] if (r["method"], r["eval"]) == (m, "toy-mood")])
        for m in EVERY
    }
    assert count == {"base": 2, "icl": 2, "sft": 4, "ia2": 4, "ia2-sft": 4, "ia2+sft": 8}
    for cell in every["cells"]:
        runs = [
            r for r in every["runs"] if (r["method"], r["eval"]) == (cell["method"], cell["eval"])
        ]
        configs = {config_of(run) for run in runs}
        assert cell["acc_mean"] == max(
            fmean(r["acc"] for r in runs if config_of(r) == config) for config in configs
        )


def test_records_hold_what_they_say(studied):
    document, folder = studied["dev"]
    for run in document["runs"]:
        assert (
            run["asim"] == pytest.approx(fmean(run["asim_layers"])) and len(run["asim_layers"]) == 4
        )
        assert 0 <= run["acc"] <= 1 and run["adapter"] == (
            None if run["method"] in ("base", "icl") else "lora"
        )
        assert sum(rows for rows, *_ in run["reliability"]) == 12
    assert {run["asim"] for run in document["runs"] if run["method"] == "icl"} == {1.0}
    base = [
        run["acc"]
        for run in document["runs"]
        if (run["method"], run["eval"]) == ("base", "toy-mood")
    ]
    assert len(base) == 2 == len(set(base)) + 1  # the same for every set
    texts, where = studied["dev texts"]
    for run in texts["runs"]:
        kept = json.loads((where / run["texts"]).read_text())
        assert len(kept["texts"]) == 3 and "ece" not in run and "reliability" not in run
    assert all(cell["ece_mean"] is cell["ece_null_mean"] is None for cell in texts["cells"])


def test_temperatures_from_dev_rows_equal_plain_passes(studied, subject):
    document, folder = studied["dev"]
    net = Plain(upstream(subject.folder), subject.tokenizer)
    (cell,) = make_cells([MOOD], subject, SMALL)
    labels = [subject.tokenizer.encode(label) for label in MOOD.labels]
    for method in ("base", "icl"):
        for number, episode in enumerate(cell.episodes):
            before = joined(episode.icl[0]) if method == "icl" else ""
            prompts = [subject.tokenizer.encode(before + row.prompt) for row in episode.dev]
            scores = [
                [label_log_probability(net.following, ids, label) for label in labels]
                for ids in prompts
            ]
            heat = fit_temperature(
                torch.tensor(scores), torch.tensor([row.label for row in episode.dev])
            )
            records = [r for r in document["runs"] if (r["method"], r["set"]) == (method, number)]
            assert records and all(r["temperature"] == pytest.approx(heat) for r in records)
    theta, used = load_file(folder / cell.name / "fit-sft.safetensors")["theta"], {}
    sft = [record for record in document["training"] if record["method"] == "sft"]
    # long prompts, alone as a set's only dev row too
    for record, weights in zip(sft, theta, strict=True):
        if config_of(record) != best(sft, "sft"):
            continue
        net = Plain(peft_twin(subject.folder, cell.study.adapter, weights), subject.tokenizer)
        (row,) = cell.episodes[record["set"]].dev
        scores = [
            [
                label_log_probability(net.following, subject.tokenizer.encode(row.prompt), one)
                for one in labels
            ]
        ]
        used[record["set"]] = fit_temperature(torch.tensor(scores), torch.tensor([row.label]))
    told = {r["set"]: r["temperature"] for r in document["runs"] if r["method"] == "sft"}
    assert told == pytest.approx(used) and len(used) == 2
    assert any(len(subject.tokenizer.encode(e.dev[0].prompt)) > 17 for e in cell.episodes)
    trained = [r for r in document["runs"] if r["rate"]]
    assert all(r["nll_oracle"] <= min(r["nll_dev"], r["nll_labels"]) + 1e-3 for r in trained)
    assert any(r["temperature"] != trained[0]["temperature"] for r in trained)


def test_controls_teach_something_else_and_leave_sft_alone(subject, tmp_path):
    few = {"rates": (1e-2,), "n": (3,), "epochs": 2, "eval_rows": 4}
    options = replace(SMALL, methods=("icl", "sft", "ia2", "hidden"), **few)
    found, tasks = {}, [MOOD, find_task("toy-topic")]
    pools = [load_examples(task, "train").rows for task in tasks]
    for teacher in TEACHERS:
        document, _ = compare(tasks, subject, options, tmp_path, draw=Control(teacher, pools))
        found[teacher] = {
            (r["task"], r["method"], r["set"], r["eval"]): r for r in document["runs"]
        }
    for key, record in found["true"].items():
        others = [found[teacher][key] for teacher in ("shuffled", "other", "none")]
        if key[1] in ("icl", "sft"):
            assert all(
                other["nll"] == record["nll"] and other["asim"] == record["asim"]
                for other in others
            )
        else:
            assert len({other["dev_loss"] for other in [record, *others]}) == 4
    # the teacher without demonstrations is the base itself; a tiny rate, for Adam makes steps of rounding errors
    still = replace(options, methods=("ia2", "hidden"), rates=(1e-9,))
    document, _ = compare(tasks, subject, still, tmp_path, draw=Control("none", pools))
    assert max(r["dev_loss"] for r in document["runs"]) < 1e-6


def test_a_race_ends_rates_that_nobody_would_choose(subject, tmp_path):
    """Fewer steps, and the runs that are reported are those of all rates trained to their end."""
    options = replace(
        SMALL, n=(4,), rates=(1e-5, 1e-2, 3e-3), epochs=20, methods=("sft", "ia2", "ia2-sft")
    )
    (slow, _), (fast, _) = (
        compare([MOOD], subject, replace(options, race=race), tmp_path) for race in (False, True)
    )
    spent = {
        method: [r["steps"] for r in slow["training"] if r["method"] == method]
        for method in options.methods
    }
    saved = {
        method: [r["steps"] for r in fast["training"] if r["method"] == method]
        for method in options.methods
    }
    assert saved["ia2"] == spent["ia2"]  # IA2 → SFT begins with every rate
    for method in ("sft", "ia2-sft"):
        assert (
            sum(saved[method]) < sum(spent[method]) and saved[method][1::3] == spent[method][1::3]
        )
    for one, other in zip(fast["runs"], slow["runs"], strict=True):
        same(one, other)
    whole = replace(options, race=True, select="both", methods=("sft",))
    document, _ = compare([MOOD], subject, whole, tmp_path)
    assert [record["steps"] for record in document["training"]] == spent["sft"]


def test_ones_own_texts_may_be_as_long_as_the_longest_answer(subject, tmp_path):
    rows = world.rows("toy-sums", "train")[:60]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, encode = (
        custom_task(tmp_path / "sums.jsonl", "question", "answer"),
        subject.tokenizer.encode,
    )
    (cell,) = make_cells([task], subject, SMALL)
    longest = max(len(encode(row["answer"])) for row in rows)
    assert cell.max_tokens == cell.task.max_tokens == longest + 1 < task.max_tokens == 200
    assert make_cells([MOOD], subject, SMALL)[0].max_tokens == 1


def test_no_teacher_is_asked_where_no_method_needs_one(subject, studied, tmp_path, monkeypatch):
    """SFT trains to the same weights without one, and the phases are counted without its."""
    monkeypatch.setattr("ia2mini.engine.experiment.teach", None)
    labels = []

    def bar(label, total):
        labels.append(label)
        return silent(label, total)

    options = replace(SMALL, methods=("base", "sft"))
    document, _ = compare([MOOD], subject, options, tmp_path, bar=bar)
    with_teacher, _ = studied["dev"]
    expected = [record for record in with_teacher["training"] if record["method"] == "sft"]
    assert document["training"] == expected
    assert [label.split()[0] for label in labels] == [
        f"{place}/{len(labels)}" for place in range(1, len(labels) + 1)
    ]
    assert not any("collecting" in label for label in labels)


def test_overlaps_are_of_the_chosen_runs(studied):
    document, _ = studied["dev"]
    pairs = [tuple(found["methods"]) for found in document["overlap"]]
    assert len(pairs) == len(set(pairs)) == 6 and ("ia2", "ia2-sft") in pairs
    for found in document["overlap"]:
        assert len(found["overlap"]) == 2 and found["mean"] == pytest.approx(
            fmean(found["overlap"])
        )
        assert 0 < found["chance"] < found["mean"] <= 1
    alike = {tuple(found["methods"]): found["mean"] for found in document["overlap"]}
    assert alike["ia2", "ia2-sft"] > alike["sft", "ia2-sft"]


def test_samples_show_the_prompt_and_right_and_wrong_rows(studied):
    for key in ("dev", "dev texts"):
        (sample,) = studied[key][0]["samples"]
        assert sample["prompt"].count("\n\n") == 2  # after each of two demonstrations
        scored = [
            r
            for r in studied[key][0]["runs"]
            if (r["method"], r["eval"]) == (sample["method"], sample["task"])
        ]
        right = [row["right"] for row in sample["rows"]]
        rows = {"dev": 12, "dev texts": 3}[key]
        assert right.count(True) == min(10, round(scored[0]["acc"] * rows)) and len(right) <= rows
        assert all(
            (row["said"].strip() == row["answer"].strip()) == row["right"]
            for row in sample["rows"]
            if key == "dev"
        )


def test_run_json_holds_what_the_defaults_came_to(studied, subject, tmp_path, monkeypatch):
    kept = json.loads((studied["dev"][1] / "run.json").read_text())
    assert kept["rates"] == [1e-3, 1e-2] and kept["targets"] == ["q_proj", "k_proj", "o_proj"]
    assert (
        kept["templates"] == {"toy-mood": "Text:{text}\nLabel:"}
        and kept["ia2mini"] == ia2mini.__version__
    )
    assert (
        kept["model"] == subject.base == "tiny"
        and kept["dtype"] == "float32"
        and kept["device"] == "cpu"
    )
    monkeypatch.setattr(study, "run_cell", lambda cell, experiment: NOTHING)
    document, folder = compare([MOOD], subject, Options(n=(2,), sets=1, adapter="ia3"), tmp_path)
    kept = json.loads((folder / "run.json").read_text())
    assert tuple(kept["rates"]) == TINY_RATES["ia3"] and document["config"] == kept


def test_a_folder_belongs_to_version_model_data_template_and_options(
    subject, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "run_cell", lambda cell, experiment: NOTHING)

    def folder(task=MOOD, options=SMALL, subject=subject, **more) -> Path:
        return compare([task], subject, options, tmp_path, **more)[1]

    first = folder()
    assert (
        first.name.startswith("toy-mood-tiny-n2-") and folder() == folder(side_by_side=1) == first
    )
    monkeypatch.setattr(study, "__version__", "99.0")
    found = {first, folder()}
    monkeypatch.undo()
    monkeypatch.setattr(study, "run_cell", lambda cell, experiment: NOTHING)
    assert folder() == first
    found |= {
        folder(replace(MOOD, prompt="Text:{text}\nMood:")),
        folder(options=replace(SMALL, seed=1)),
    }
    found |= {
        folder(options=replace(SMALL, select="both")),
        folder(options=replace(SMALL, eval_rows=11)),
    }
    found |= {folder(subject=replace(subject, base="me/tiny"))}
    found |= {folder(draw=Control("none", [])), folder(draw=Control("shuffled", []))}
    assert len(found) == 9


@pytest.mark.parametrize(
    "options, name",
    [
        ({"targets": ("qk",)}, "lora qk"),
        ({"targets": ("kq",)}, "lora qk"),
        ({"targets": ("qko",)}, "lora"),
        ({"targets": ("o_proj", "q_proj", "k_proj")}, "lora"),
        ({"targets": ("v_proj", "q_proj")}, "lora qv"),
        ({"targets": ("all",)}, "lora qkvogud"),
        ({"rank": 4, "targets": ("qk",)}, "lora r4 qk"),
        ({"alpha": 16.0}, "lora α16"),
        ({"adapter": "ia3", "rank": 4, "targets": ("qk",)}, "ia3 qk"),
    ],
)
def test_adapters_of_the_same_matrices_have_one_name(options, name):
    assert Options(**options).adapter_name == name


@pytest.mark.parametrize(
    "methods",
    [
        ("base",),
        ("icl",),
        ("sft",),
        ("ia2-sft", "sft"),
        ("sft-ia2", "base"),
        ("soft", "icl", "sft-sft", "ia2"),
    ],
)
def test_phases_are_counted_as_they_come(methods, subject, tmp_path):
    said = []

    def bar(label, total):
        said.append(label)
        return nullcontext(
            SimpleNamespace(update=lambda n: None, n=0, set_postfix_str=lambda text, refresh: None)
        )

    few = replace(SMALL, methods=methods, epochs=1, sets=1, rates=(1e-2,), eval_rows=2, n=(2, 3))
    compare([MOOD], subject, few, tmp_path, bar=bar)
    numbers = [label.split(" ")[0] for label in said]
    assert numbers == [f"{i}/{len(said)}" for i in range(1, len(said) + 1)]
    named = {label.split(": ")[0].split(" ")[1] for label in said}
    assert named == {"toy-mood-n2", "toy-mood-n3"}


def test_runs_trained_in_turn_give_what_runs_side_by_side_give(studied, subject, tmp_path):
    document, _ = compare([MOOD], subject, SMALL, tmp_path, side_by_side=3)
    for one, other in zip(document["training"], studied["dev"][0]["training"], strict=True):
        assert one["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-3)


def test_mistakes_leave_no_folder(subject, tmp_path):
    for options, said in (
        (replace(SMALL, methods=("base", "ia3")), "unknown method 'ia3'; methods: base, icl, sft"),
        (replace(SMALL, layers=(4,)), "--layers 4: this model has layers 0 to 3"),
        (replace(SMALL, layers=(-1,)), "--layers -1: this model has layers 0 to 3"),
        (replace(SMALL, n=(2, 4000)), "--n 4000: needs"),
    ):
        with pytest.raises(UsageError, match=said):
            compare([MOOD], subject, options, tmp_path / "out")
    assert not (tmp_path / "out").exists() and "sft" in METHODS


def test_layers_by_number():
    def numbers(depth: int, *layers) -> list[int] | None:
        return Options(layers=layers).layer_numbers(depth)

    assert numbers(36) is None and numbers(4, 2, 0, 2) == [0, 2]
    assert CommaSeparated(int).convert("2,0", None, None) == (2, 0)
    with pytest.raises(BadParameter, match="'last-third' is not a valid integer"):
        CommaSeparated(int).convert("last-third", None, None)
