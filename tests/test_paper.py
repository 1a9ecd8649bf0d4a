"""What the paper and its released scripts do: limits of texts, `--paper-compat`, the tables beside ours."""

import csv
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from test_report import record, records

import ia2mini.teacher
from ia2mini import UsageError
from ia2mini.cli.run import report as report_command
from ia2mini.cli.run import run as run_command
from ia2mini.cli.run import write_and_print_report
from ia2mini.engine.options import RATES, Options
from ia2mini.engine.subject import open_subject
from ia2mini.files import read_json
from ia2mini.report import paper
from ia2mini.report.paper import add_paper, departures, table_8, write_table_8
from ia2mini.report.tables import write_table
from ia2mini.study.study import compare
from ia2mini.study.table import summarise
from ia2mini.tasks import all_tasks, find_task

SMALL = Options(n=(2,), sets=2, epochs=2, eval_rows=3, methods=("icl", "ia2"), rates=(1e-3, 1e-2))


@pytest.fixture(scope="module")
def subject():
    torch.set_num_threads(1)
    return open_subject("tiny", "cpu", None, None)


def test_the_teacher_of_hmath_says_less_than_an_evaluation_may(subject, monkeypatch, tmp_path):
    """Paper section 5: 200 tokens in training for every task, 400 in the evaluation of HMathA alone."""
    limits = {
        task.name: (task.teacher_tokens, task.max_tokens)
        for task in all_tasks().values()
        if not task.labels
    }
    assert limits.pop("hmath_algebra") == (200, 400) and set(limits.values()) == {(None, 200)}
    task, asked = replace(find_task("toy-sums"), max_tokens=12, teacher_tokens=3), []
    respond = ia2mini.teacher.generate

    def counted(*given):
        asked.append(given[3].max_tokens)
        return respond(*given)

    monkeypatch.setattr(ia2mini.teacher, "generate", counted)
    document, folder = compare([task], subject, SMALL, tmp_path)
    assert asked == [3] * SMALL.sets
    said = [read_json(folder / run["texts"])["ids"] for run in document["runs"]]
    assert max(len(ids) for texts in said for ids in texts) > 3


def paper_study(model="Qwen--Qwen3-4B-Base", adapter="lora", **config) -> dict:
    config = asdict(Options()) | config
    runs = records("sst2", "sst2", model=model) + records("sst2", "finsen", model=model)
    return {
        "cells": summarise([run | {"adapter": run["adapter"] and adapter} for run in runs]),
        "config": config,
    }


def test_the_papers_numbers_stand_beside_the_same_cells():
    document = paper_study()
    assert add_paper(document) == 8  # the paper has no base here
    said = {(c["eval"], c["method"]): c.get("paper") for c in document["cells"]}
    # Table 1
    assert said["sst2", "sft"] == "65.2 / 0.22" and said["finsen", "ia2-sft"] == "82.4 / 0.11"
    assert said["sst2", "icl"] == "85.4 / 0.13" and said["sst2", "base"] is None
    table = write_table(document, full=True)
    assert re.search(r"paper \(% / ECE\)\n", table) and re.search(r"SFT .* 65.2 / 0.22\n", table)
    on_responses = paper_study(labels="icl")
    assert add_paper(on_responses) == 8
    said = {(c["eval"], c["method"]): c["paper"] for c in on_responses["cells"] if "paper" in c}
    # Table 9; IA2 as in Table 1
    assert said["sst2", "sft"] == "62.3 / 0.34" and said["sst2", "ia2"] == "82.7 / 0.28"
    for other in ("lora r16", "prompt"):
        # ICL's alone, which has no adapter
        assert add_paper(found := paper_study(adapter=other)) == 2
        assert not any("paper" in c for c in found["cells"] if c["adapter"])


def test_the_papers_numbers_are_those_of_its_text():
    text = Path(__file__).parents[2] / "shared" / "paper.md"
    if not text.is_file():
        pytest.skip("the paper's text is not beside the clone")
    text = re.sub(r"</?b>", "", text.read_text(encoding="utf-8"))
    with (Path(paper.__file__).parent / "paper.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 356
    for row in rows:
        assert f"{float(row['acc']):04.1f} ({float(row['acc_std']):04.1f})" in text
        assert not row["ece"] or f"{float(row['ece']):.2f}" in text


OTHERS = {  # not the paper's runs
    "layers": (0,), "epochs": 5, "sets": 3, "rates": (1e-3,), "patience": 9, "batch_size": 2,
    "eval_rows": 100, "betas": (0.3,), "soft_k": 5,
}  # fmt: skip


@pytest.mark.parametrize("option", OTHERS)
def test_no_numbers_of_the_paper_stand_beside_other_runs(option):
    document = paper_study(**{option: OTHERS[option]})
    assert departures(document) == [f"--{option.replace('_', '-')}"]
    assert add_paper(document) == 0 and "paper" not in write_table(document, full=True)


def test_nor_beside_runs_of_another_teacher():
    document = paper_study(draw="Control(teacher='none')")
    assert departures(document) == ["another teacher"] and add_paper(document) == 0


def test_what_the_paper_did_too_is_no_departure():
    for same in (
        {},
        {"rates": list(RATES["lora"])},
        {"seed": 3},
        {"paper_compat": True},
        {"n": (8,)},
    ):
        assert departures(paper_study(**same)) == []
    usual = asdict(Options())
    lora = usual | {"rank": 16, "rates": list(RATES["lora"])}
    ia3 = usual | {"adapter": "ia3", "rates": list(RATES["ia3"])}
    assert departures({"studies": {"a": lora, "b": ia3}}) == []
    assert departures({"studies": {"a": lora, "b": ia3 | {"rates": list(RATES["lora"])}}}) == [
        "--rates"
    ]
    assert departures(
        {"studies": {"a": lora | {"epochs": 3}, "b": lora | {"epochs": 3, "sets": 2}}}
    ) == [
        "--epochs",
        "--sets",
    ]


def test_the_cells_of_table_5_are_in_its_columns():
    """Of N = 8, which no other table has: ICL, SFT only, IA2 only, IA2→SFT."""
    rows = list(csv.DictReader((Path(paper.__file__).parent / "paper.csv").open()))
    found = {(r["task"], r["method"]): r["acc"] for r in rows if r["table"] == "5"}
    expected = {"gsm8k": "77.2 73.5 78.8 76.0", "hmath_algebra": "62.1 52.0 57.3 59.4"}
    for task, numbers in expected.items():
        assert [
            found[task, method] for method in ("icl", "sft", "ia2", "ia2-sft")
        ] == numbers.split()
    assert len(found) == 8 and all(
        (r["eval"], r["n"]) == (r["task"], "8") for r in rows if r["table"] == "5"
    )


def studies() -> dict[str, dict]:
    """Two models on single-token tasks, one on texts; accuracies of their own in every run."""
    rng = np.random.default_rng(0)
    lacking = {"ece": None, "nll": None}
    asked = {"a": ("one", "mood", ("mood", "news"), {}), "b": ("two", "mood", ("mood",), {})}
    asked["c"] = ("two", "sums", ("sums",), lacking)
    found = {}
    for name, (model, task, evals, more) in asked.items():
        runs = []
        for method, at in (("sft", 0.6), ("ia2-sft", 0.7)):
            for e, s in ((e, s) for e in evals for s in range(5)):
                acc = at + rng.normal(0, 0.1)
                about = more or {"ece": rng.random() / 4}
                runs.append(
                    record(method, s, acc, 1e-3, 0.1, task=task, evaluation=e, model=model, **about)
                )
        found[name] = {"cells": summarise(runs), "config": asdict(Options()), "runs": runs}
    return found


def pooled() -> dict:
    """All of them as one document."""
    cells = [cell for document in studies().values() for cell in document["cells"]]
    return {"cells": cells, "config": asdict(Options())}


def test_table_8_pools_every_evaluation_and_run_of_all_models():
    documents = studies()
    lines = table_8(pooled())
    assert [line[:4] for line in lines] == [
        ("single-token", 4, "acc", "dev"), ("single-token", 4, "ece", "dev"), ("multi-token", 4, "acc", "dev"),
    ]  # fmt: skip
    for (kind, _, metric, _, test), names, pairs in zip(
        lines, ("ab", "ab", "c"), (15, 15, 5), strict=True
    ):
        values = {"sft": [], "ia2-sft": []}
        for run in (run for name in names for run in documents[name]["runs"]):
            values[run["method"]].append(run[metric])
        first, second = ("sft", "ia2-sft") if metric == "ece" else ("ia2-sft", "sft")
        want = stats.ttest_rel(values[first], values[second])
        assert (test.t, test.p) == pytest.approx(
            (want.statistic, want.pvalue)
        ) and test.pairs == pairs, kind
    said = write_table_8(pooled()).splitlines()
    assert (
        said[1].split()[:4] == ["single-token", "acc", "dev", "4"] and said[1].split()[-1] == "15"
    )


@pytest.mark.parametrize("lacking", ["labels", "adapter", "method"])
def test_table_8_refuses_what_it_cannot_pool(lacking):
    document = pooled()
    if lacking == "labels":
        document["config"]["labels"] = "icl"
    elif lacking == "adapter":
        document["cells"] = [cell | {"adapter": "ia3"} for cell in document["cells"]]
    else:
        document["cells"] = [cell | {"method": "ia2"} for cell in document["cells"]]
    with pytest.raises(UsageError, match="no cells of SFT and IA2→SFT with LoRA on true answers"):
        write_table_8(document)


def test_the_commands_of_table_8_hold_the_papers_pairs():
    """Those that its degrees of freedom give: pairs - 1; of N = 4 the paper has one evaluation less."""
    page = (Path(__file__).parents[1] / "docs" / "paper.md").read_text(encoding="utf-8")
    lines = page.split("| Table 8 |")[1].split("| Table 9 |")[0].split("\n")
    commands = [
        line.split("`ia2mini run ")[1].split("`")[0] for line in lines if "`ia2mini run " in line
    ]
    (report,) = [
        line.split("`ia2mini report ")[1].split("`")[0]
        for line in lines
        if "`ia2mini report " in line
    ]
    given = report_command.make_context("report", report.split()).params
    assert given["table_8"] and all(
        f"--out {given['folders'][0].parent}" in command for command in commands
    )
    pairs = {}
    for command in commands:
        given = run_command.make_context("run", command.split()).params
        for task in map(find_task, given["names"]):
            for n in given["n"]:
                kind = "labels" if task.labels else "texts"
                pairs[kind, n] = pairs.get((kind, n), 0) + 5 * len(task.evals)
    freedom = {2: 104, 4: 99 + 5, 8: 104, 16: 79, 32: 64, 64: 59, 128: 59}
    expected = {("labels", n): df + 1 for n, df in freedom.items()}
    assert pairs == expected | {
        ("texts", 2): 35,
        ("texts", 4): 35,
        ("texts", 8): 35,
        ("texts", 16): 15,
    }


def test_what_is_in_the_way_of_the_papers_numbers_is_said(capsys, tmp_path):
    document = paper_study(sets=3, epochs=3) | {"adapters": [], "seconds": {}}
    write_and_print_report(document, tmp_path, False, ("acc",), ("png",), False, True)
    said = capsys.readouterr().err
    assert (
        said
        == "--with-paper: no numbers of the paper are shown, since the paper's runs had another --sets, --epochs\n"
    )
