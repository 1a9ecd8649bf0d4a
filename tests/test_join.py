"""`ia2mini report`: finished studies joined into one set of tables, tests and figures; what is refused."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from test_report import record, records

from ia2mini import UsageError
from ia2mini.cli.main import main
from ia2mini.engine.options import Options
from ia2mini.engine.subject import open_subject
from ia2mini.files import read_json, write_json
from ia2mini.report.join import CELL, RESULTS, join
from ia2mini.report.page import write_page
from ia2mini.report.summary import parts, views
from ia2mini.report.tables import legend
from ia2mini.study.study import compare
from ia2mini.study.table import summarise
from ia2mini.tasks import find_task

SMALL = Options(
    n=(2,), sets=2, epochs=2, eval_rows=8, rates=(1e-2,), methods=("base", "icl", "sft", "ia2-sft")
)
MOOD, TOPIC = find_task("toy-mood"), find_task("toy-topic")


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> dict[str, Path]:
    """Folders of toy studies: ranks 4 and 8 on one task, another task, and another number of sets."""
    torch.set_num_threads(1)
    out, subject = tmp_path_factory.mktemp("runs"), open_subject("tiny", "cpu")
    wanted = {
        "four": (MOOD, {"rank": 4}),
        "eight": (MOOD, {}),
        "topic": (TOPIC, {}),
        "three": (MOOD, {"sets": 3}),
    }
    return {
        name: compare([task], subject, replace(SMALL, **more), out)[1]
        for name, (task, more) in wanted.items()
    }


def report(out: Path, *arguments) -> Result:
    return CliRunner().invoke(
        main, ["report", *map(str, arguments), "--out", str(out), "--figures", "", "--json"]
    )


def refused(out: Path, arguments: list, *words: str) -> None:
    """One line that holds the words, and nothing is written."""
    result = report(out, *arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert not [word for word in words if word not in line], line
    assert not out.exists()


def test_two_ranks_stand_in_one_report_with_the_base_once(studies, tmp_path):
    result = report(tmp_path / "out", studies["four"], studies["eight"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document == read_json(tmp_path / "out" / "results.json")
    for name, adapter in (("four", "lora r4"), ("eight", "lora")):  # each is what it was alone
        alone = read_json(studies[name] / "results.json")
        about = {"study": str(studies[name]), "model": "tiny"}
        for key in ("cells", "runs", "training", "overlap"):
            mine = [one | about for one in alone[key] if one["adapter"] == adapter]
            assert mine and [one for one in document[key] if one["adapter"] == adapter] == mine
    untrained = [
        (cell["eval"], cell["method"]) for cell in document["cells"] if cell["adapter"] is None
    ]
    assert len(untrained) == len(set(untrained)) == 2 * len(MOOD.evals)
    assert [part["adapter"] for part in parts(document)] == ["lora r4", "lora"]
    for part in parts(document):
        assert {cell["method"] for cell in part["cells"]} == set(SMALL.methods)
    assert document["config"]["rank"] == [4, 8] and document["config"]["sets"] == 2
    assert {folder: config["rank"] for folder, config in document["studies"].items()} == {
        str(studies["four"]): 4,
        str(studies["eight"]): 8,
    }
    assert len(document["adapters"]) == 8
    assert all((Path(name) / "adapter_config.json").is_file() for name in document["adapters"])
    both = [
        read_json(studies[name] / "results.json")["seconds"]["train"] for name in ("four", "eight")
    ]
    assert document["seconds"]["train"] == pytest.approx(sum(both))
    table = (tmp_path / "out" / "table.txt").read_text()
    assert (
        "tiny · toy-mood · N = 2 · lora r4 · 2 sets" in table
        and "tiny · toy-mood · N = 2 · lora · 2 sets" in table
    )
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [row["adapter"] for row in rows].count("lora r4") == 2 * len(MOOD.evals)


def test_other_tasks_are_means_of_the_evaluations_that_each_adapter_has(studies):
    document = join([studies["eight"], studies["topic"]])
    (part,) = parts(document)  # one adapter: a mean over both tasks
    assert {cell["task"] for cell in part["cells"]} == {"toy-mood", "toy-topic"}
    # two adapters, each on a task of its own
    first, second = parts(join([studies["four"], studies["topic"]]))
    assert {cell["task"] for cell in first["cells"]} == {"toy-mood"} and first[
        "adapter"
    ] == "lora r4"
    assert {cell["task"] for cell in second["cells"]} == {"toy-topic"} and second[
        "adapter"
    ] == "lora"
    for each in (first, second):
        assert {cell["method"] for cell in each["cells"]} == set(SMALL.methods)


def test_a_folder_given_twice_counts_once(studies):
    assert join([studies["four"]] * 2) == join([studies["four"]])


def test_the_page_loads_an_adapter_from_where_it_is(studies, tmp_path):
    document = join([studies["eight"], studies["four"]])
    page = write_page(document, tmp_path, "")
    adapter = f"{studies['four']}/adapters/toy-mood-n2-ia2-sft-set1"
    assert f"(model, &#x27;{adapter}&#x27;)" in page and "from_pretrained(TINY)" in page
    document["studies"] = {
        folder: config | {"model": "org/base"} for folder, config in document["studies"].items()
    }
    assert "from_pretrained(&#x27;org/base&#x27;)" in write_page(document, tmp_path, "")


def test_table_8_stands_below_the_tables(studies, tmp_path):
    folders = [studies["eight"], studies["topic"]]
    result = report(tmp_path / "out", *folders, "--table-8")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (head,) = [
        i for i, line in enumerate(lines) if line.startswith("task") and line.endswith("pairs")
    ]
    cells = [c for c in join(folders)["cells"] if c["method"] == "sft"]
    for line, metric in zip(lines[head + 1 :], ("acc", "ece")):
        assert line.split()[:4] == ["single-token", metric, "dev", "2"]
        assert int(line.split()[-1]) == sum(cell["sets"] for cell in cells) == 2 * len(cells)
    refused(
        tmp_path / "none",
        [studies["four"], "--table-8"],
        "no cells of SFT and IA2→SFT with LoRA on true answers",
    )


def changed(folder: Path, copy: Path, **changes) -> Path:
    """A copy of a study's results with some of its fields changed."""
    write_json(copy / "results.json", read_json(folder / "results.json") | changes)
    return copy


def test_what_does_not_belong_together_is_refused(studies, tmp_path):
    out, eight = tmp_path / "out", studies["eight"]
    where = f"sets = 2 in {eight} and 3 in {studies['three']}"
    refused(out, [eight, studies["three"]], where, "do not belong together")
    config = read_json(eight / "results.json")["config"]
    for option, value in (
        ("epochs", 9),
        ("labels", "icl"),
        ("select", "eval"),
        ("ia2mini", "0.1"),
        ("draw", "mine"),
    ):
        other = changed(eight, tmp_path / option, config=config | {option: value})
        refused(out, [eight, other], f"{option} = ", "do not belong together")
    cells = read_json(eight / "results.json")["cells"]
    another = {"acc": [0.5, 0.25], "acc_mean": 0.375, "acc_std": 0.125 * 2**0.5}
    other = changed(eight, tmp_path / "cells", cells=[cells[0] | another, *cells[1:]])
    refused(
        out,
        [eight, other],
        f"{eight} and {other} both hold tiny · toy-mood · 2 · base · toy-mood",
        "leave one out",
    )
    refused(out, [eight, tmp_path / "nowhere"], "nowhere: no results.json there")
    joint = tmp_path / "joint"
    write_json(joint / "results.json", join([eight]))
    refused(out, [joint, eight], "joint: a report of several studies")
    assert CliRunner().invoke(main, ["report"]).exit_code == 2
    kept = tmp_path / "kept"
    shutil.copytree(eight, kept)
    result = report(kept, kept, studies["four"])
    assert result.exit_code == 2 and "a study is there" in result.stderr
    assert read_json(kept / "results.json") == read_json(eight / "results.json")


def test_a_report_replaces_nothing_but_an_earlier_report(studies, tmp_path):
    """Another study's results were lost here, and a table of one's own."""
    for name, text in (("results.json", '{"cells": []}'), ("table.csv", "mine"), ("a.png", "")):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(text)
        result = report(folder, studies["four"])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
        assert list(folder.iterdir()) == [folder / name] and (folder / name).read_text() == text
    out = tmp_path / "out"
    assert report(out, studies["four"]).exit_code == 0
    assert report(out, studies["topic"]).exit_code == 0
    assert list(read_json(out / "results.json")["studies"]) == [str(studies["topic"])]


def test_a_page_shows_no_figure_of_an_earlier_report(studies, tmp_path):
    out = tmp_path / "out"
    report(out, studies["four"])
    (out / "methods.png").write_bytes(b"of an earlier report")
    (out / "mine.png").write_bytes(b"mine")
    result = report(out, studies["topic"])
    assert result.exit_code == 0 and "data:image" not in (out / "report.html").read_text()
    assert (out / "mine.png").exists()


def renamed(value):
    """An option's value with something else in its place, under the same names."""
    return {name: {"digest": "x"} for name in value} if isinstance(value, dict) else "x"


@pytest.mark.parametrize("option", ["checkpoint", "dtype", "templates", "pools", "evals"])
def test_one_name_for_two_things_is_refused(studies, tmp_path, option):
    """Were these joined, SFT of one checkpoint would be compared with IA2→SFT of another."""
    eight = studies["eight"]
    document = read_json(eight / "results.json")
    config = document["config"] | {option: renamed(document["config"][option])}
    cells = [cell | {"n": 4} for cell in document["cells"]]  # none is a cell of the first study
    other = changed(eight, tmp_path / "other", config=config, cells=cells)
    name = "tiny" if option in ("checkpoint", "dtype") else "toy-mood"
    refused(
        tmp_path / "out",
        [studies["topic"], eight, other],
        f"{option} of {name} = ",
        "do not belong together; leave one out",
        str(other),
    )


def misshapen(document: dict):
    """(which field, the document with it gone or something else)."""
    for key in RESULTS:
        yield key, {name: value for name, value in document.items() if name != key}
        yield key, document | {key: 3 if key != "peak_memory_bytes" else "3"}
    cell = document["cells"][0]
    for key in CELL:
        yield (
            f"cells.{key}",
            document | {"cells": [{name: value for name, value in cell.items() if name != key}]},
        )
        yield f"cells.{key}", document | {"cells": [cell | {key: {}}]}
    for key, value in (
        ("acc", [1.7, 1.2]),
        ("acc", cell["acc"][:1]),
        ("sets", 0),
        ("ece", [math.nan, 0.1]),
        ("acc_mean", 0.123),
        ("acc_mean", None),
        ("acc_std", -3),
        ("acc_std", None),
        ("asim_layers", cell["asim_layers"] + [0.5]),
        ("n", -2),
    ):
        cells = [cell | {key: value}, *document["cells"][1:]]
        yield f"cells.{key}", document | {"cells": cells}
    without = [cell | {"asim_layers": []} for cell in document["cells"]]
    yield "cells.asim_layers", document | {"cells": without}
    yield "cells", document | {"cells": []}
    yield "adapters", document | {"adapters": ["../../elsewhere"]}
    yield "seconds", document | {"seconds": {"train": "long"}}
    yield "samples", document | {"samples": [3]}
    sample = document["samples"][0] | {"rows": [{"method": 3}]}
    yield "samples.rows.prompt", document | {"samples": [sample]}
    yield "overlap.methods", document | {"overlap": [{**document["overlap"][0], "methods": None}]}


def test_a_file_of_another_shape_is_refused_by_its_field(studies, tmp_path):
    document = read_json(studies["eight"] / "results.json")
    for field, wrong in misshapen(document):
        (tmp_path / "results.json").write_text(json.dumps(wrong))
        with pytest.raises(
            UsageError, match=f"results.json: field {field} is missing or not what it should be"
        ):
            join([tmp_path])
    for content in ("", "[]", "{", '{"cells": 3}', "\xff"):
        (tmp_path / "results.json").write_text(content, encoding="latin-1")
        with pytest.raises(UsageError, match="results.json"):
            join([tmp_path])
    refused(tmp_path / "out", [tmp_path], "results.json")


def joined_by_hand() -> dict:
    """Two models, of one of them two adapters."""
    runs = records(model="a/../b") + [run for run in records(model="c") if run["method"] != "base"]
    runs += [run | {"adapter": "lora r4"} for run in records(model="c") if run["adapter"]]
    overlap = {
        "task": "mood",
        "n": 4,
        "methods": ["sft", "ia2"],
        "overlap": [0.5],
        "mean": 0.5,
        "chance": 0.1,
    }
    kinds = [("a/../b", "lora"), ("c", "lora"), ("c", "lora r4")]
    return {
        "cells": summarise_each(runs),
        "overlap": [overlap | {"model": m, "adapter": k} for m, k in kinds],
    }


def summarise_each(runs: list[dict]) -> list[dict]:
    models = dict.fromkeys(run["model"] for run in runs)
    return [
        cell
        for model in models
        for cell in summarise([run for run in runs if run["model"] == model])
    ]


def test_figures_are_of_one_model_and_adapter_each():
    found = list(views(joined_by_hand()))
    assert [view["suffix"] for view in found] == ["-a-..-b-lora", "-c-lora", "-c-lora-r4"]
    for view, (model, adapter) in zip(
        found, [("a/../b", "lora"), ("c", "lora"), ("c", "lora r4")], strict=True
    ):
        assert {cell["model"] for cell in view["cells"]} == {model} and len(view["parts"]) == 1
        assert [(one["model"], one["adapter"]) for one in view["overlap"]] == [(model, adapter)]


def test_what_failed_is_told_of_its_own_model_and_adapter():
    document = joined_by_hand()
    failed = record("sft", 0, 0.5, 1e-3, 0.1, model="c") | {
        "trouble": "failed at step 2: no finite loss"
    }
    document["training"] = [failed, failed | {"adapter": "lora r4"}]
    said = "mood, N = 4: SFT at rate 0.001, set 0: failed at step 2: no finite loss"
    assert legend(document)[-2:] == [f"c, lora, {said}", f"c, lora r4, {said}"]
    alone = {"cells": summarise(records()), "training": [failed]}
    assert legend(alone)[-1] == said
