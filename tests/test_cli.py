"""The commands as a user types them: what is printed and saved, going on after an end, own rows, every mistake."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from commands import SMALL, ended_by, forbid, invoke, stopping, toy
from hub import connect, serve
from ia2mini.models import load
from reference import random_ids, upstream
from safetensors.torch import load_file

from ia2mini import __version__
from ia2mini.adapters import LoRA, adapted
from ia2mini.cli.options import options_of
from ia2mini.engine.options import FitOptions
from ia2mini.engine.progress import progress
from ia2mini.engine.subject import open_subject as load_subject
from ia2mini.methods import METHODS

CELL = set(
    "task eval ood model n method adapter sets selected_by rate beta acc ece asim_layers".split()
)
CELL |= {
    f"{metric}_{kind}"
    for metric in "acc ece ece_null nll brier asim".split()
    for kind in ("mean", "std")
}


def numbers(folder: Path) -> dict:
    """results.json but for what depends on the clock and the machine."""
    document = json.loads((folder / "results.json").read_text())
    assert document.pop("peak_memory_bytes") > 0 and all(
        seconds >= 0
        for name in ("seconds", "seconds_by_phase")
        for seconds in document.pop(name).values()
    )
    return document


@pytest.fixture(scope="module")
def finished(ground) -> tuple[Result, Path]:
    """A whole run and its folder."""
    with pytest.MonkeyPatch.context() as m:
        # of a phase no line but the first, however long it takes
        m.setattr("ia2mini.engine.progress.MINUTE", 10**6)
        result = invoke(*toy(ground, ground / "runs"))
    assert result.exit_code == 0, result.output
    (folder,) = (ground / "runs").iterdir()
    return result, folder


def test_what_is_on_by_default_can_be_turned_off():
    @click.command()
    @options_of(FitOptions)
    def command(temperature, chat, **others):
        click.echo(f"{temperature} {chat}")

    said = [
        CliRunner().invoke(command, given).stdout for given in ([], ["--no-temperature", "--chat"])
    ]
    assert said == ["True False\n", "False True\n"]


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr("ia2mini.engine.progress.MINUTE", 0)
    with progress("3/20 training sft", 40) as bar:
        for _ in range(40):
            bar.update()
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "phase 3/20 training sft" and len(lines) >= 40
    for line in lines:
        assert re.fullmatch(
            r"phase 3/20 training sft +\d+%, \S+ left, \d\d:\d\d gone \|[# \d]{10}\|", line
        ), line
    monkeypatch.setattr("ia2mini.engine.progress.MINUTE", 60)
    with progress("4/20 short", 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == "phase 4/20 short\n"


def test_run_prints_a_table_and_one_json_document(finished):
    result, folder = finished
    *before, last = result.stdout.splitlines()
    document = json.loads(last)
    keys = {
        "cells",
        "seconds",
        "seconds_by_phase",
        "peak_memory_bytes",
        "runs",
        "training",
        "overlap",
        "adapters",
        "samples",
    }
    assert set(document) == keys | {"config", "versions"}
    assert set(document["seconds"]) == {"collect", "train", "evaluate"}
    assert all(CELL <= set(cell) for cell in document["cells"])
    found = [(c["method"], c["eval"], c["selected_by"]) for c in document["cells"]]
    expected = [(m, e, None if m in ("base", "icl") else "dev") for m in ("base", "icl", "sft", "ia2", "ia2-sft")
                for e in ("toy-mood", "toy-mood-verse")]  # fmt: skip
    assert found == expected
    for cell in document["cells"]:
        about = cell["task"], cell["model"], cell["n"], cell["ood"]
        assert about == ("toy-mood", "model", 4, cell["eval"] != "toy-mood")
        assert (
            cell["sets"] == len(cell["acc"]) == len(cell["ece"]) == 2
            and len(cell["asim_layers"]) == 2
        )
        assert (
            (cell["rate"] in (1e-2, 3e-2))
            == (cell["adapter"] == "lora")
            == (cell["method"] not in ("base", "icl"))
        )
    table = "\n".join(before)
    words = "accuracy (%),ECE,(null),asim,IA2→SFT,mean of 2 evaluations,N = 4,2 sets,rate by lowest dev loss,total "
    assert all(word in table for word in [*words.split(","), str(folder), "6 adapters for peft"])
    assert "toy-mood-verse*" not in table  # only with --full
    assert json.loads((folder / "results.json").read_text()) == document


def test_each_phase_is_a_line_where_there_is_no_terminal(finished):
    lines = finished[0].stderr.splitlines()
    phases = [re.fullmatch(r"phase (\d+)/(\d+) toy-mood-n4: (.+)", line).groups() for line in lines]
    assert [(int(k), int(of)) for k, of, _ in phases] == [
        (k, len(phases)) for k in range(1, len(phases) + 1)
    ]
    said = [phase for *_, phase in phases]
    trained = [f"training {method}" for method in ("sft", "ia2", "ia2-sft")]
    assert said[:6] == ["collecting", *trained, "icl on toy-mood", "base on toy-mood"]
    assert said.count("collecting") == 1 and not any("training" in phase for phase in said[6:])


def test_run_folder_holds_everything_and_nothing_half(ground, finished):
    result, folder = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    tables = {f"table.{suffix}" for suffix in ("txt", "md", "tex", "csv")}
    assert {"run.json", "results.json", "seconds.json", "report.html", *tables} <= names
    assert {f"toy-mood-n4/fit-{m}.safetensors" for m in ("sft", "ia2", "ia2-sft")} <= names
    saved = [f"adapters/toy-mood-n4-{m}-set{s}" for m in ("sft", "ia2", "ia2-sft") for s in (0, 1)]
    assert {f"{name}/adapter_model.safetensors" for name in saved} <= names
    assert json.loads(result.stdout.splitlines()[-1])["adapters"] == saved
    assert not [name for name in names if Path(name).name.startswith(".")]
    what = json.loads((folder / "run.json").read_text())
    assert (
        what["pools"]["toy-mood"]["digest"] and what["checkpoint"] and what["rates"] == [1e-2, 3e-2]
    )
    assert what["targets"] == ["q_proj", "k_proj", "o_proj"] and what["ia2mini"] == __version__
    assert what["model"] == str(ground / "model")
    assert what["templates"] == {"toy-mood": "Text:{text}\nLabel:"}


def test_full_shows_every_evaluation(ground, finished):
    table = (finished[1] / "table.txt").read_text()
    assert "toy-mood → toy-mood-verse*" in table
    result = invoke(*toy(ground, ground / "runs", "--full"))
    assert result.exit_code == 0 and table.rstrip() in result.stdout


def test_peft_loads_the_saved_adapters_with_equal_logits(ground, finished):
    peft = pytest.importorskip("peft")
    document, folder = json.loads((finished[1] / "results.json").read_text()), finished[1]
    (cell,) = [c for c in document["cells"] if (c["method"], c["eval"]) == ("ia2-sft", "toy-mood")]
    model, ids = load(ground / "model")[0], random_ids(2, 12)
    theta = load_file(folder / "toy-mood-n4/fit-ia2-sft.safetensors")["theta"]
    for number in (0, 1):
        saved = folder / f"adapters/toy-mood-n4-ia2-sft-set{number}"
        base = json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]
        twin = peft.PeftModel.from_pretrained(upstream(base), saved)
        run = 2 * number + (1e-2, 3e-2).index(cell["rate"])  # sets by rates
        with torch.no_grad(), adapted(model, LoRA(model), theta[run : run + 1]) as student:
            ours = student(ids)
        with torch.no_grad():
            assert (twin(ids).logits - ours).abs().max() <= 1e-5 < (model(ids) - ours).abs().max()


def test_adapters_name_a_base_that_is_found_from_anywhere(ground, tmp_path, monkeypatch):
    monkeypatch.chdir(ground)
    few = ["--methods", "sft", "--sets", "1", "--rates", "1e-2", "--epochs", "1", "--out", tmp_path]
    assert invoke("run", "toy-mood", "--model", "model", *SMALL, *few).exit_code == 0
    (saved,) = tmp_path.rglob("adapter_config.json")
    assert json.loads(saved.read_text())["base_model_name_or_path"] == str(
        (ground / "model").resolve()
    )
    assert load_subject("tiny", "cpu", None, None).base == "tiny"
    files = {p.name: p.read_bytes() for p in (ground / "model").iterdir()}
    with serve(
        {("model", "Qwen/Qwen3-0.6B-Base"): {"main": files}, ("model", "me/mine"): {"main": files}}
    ) as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        for name, base in (("Qwen3-0.6b-base", "Qwen/Qwen3-0.6B-Base"), ("me/mine", "me/mine")):
            subject = load_subject(name, "cpu", None, None)
            assert (subject.base, subject.name) == (base, name.replace("/", "--"))


def test_the_same_command_does_not_train_again(ground, finished, monkeypatch):
    before = (finished[1] / "results.json").read_bytes()
    forbid(monkeypatch, "ia2mini.engine.experiment.train_method")
    forbid(monkeypatch, "ia2mini.train.run_losses")
    result = invoke(*toy(ground, ground / "runs"))
    assert result.exit_code == 0 and [p.name for p in (ground / "runs").iterdir()] == [
        finished[1].name
    ]
    assert (finished[1] / "results.json").read_bytes() == before


def test_checkpointing_gives_the_same_numbers(ground, finished, tmp_path):
    assert invoke(*toy(ground, tmp_path, "--checkpointing", "--no-compile")).exit_code == 0
    assert json.dumps(numbers(*tmp_path.iterdir())) == json.dumps(numbers(finished[1]))


def test_paper_compat_reports_the_rate_that_is_best_on_the_evaluation_rows(ground, tmp_path):
    result = invoke(*toy(ground, tmp_path, "--paper-compat", "--methods", "icl,sft"))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert {c["selected_by"] for c in document["cells"]} == {None, "eval"} and document["config"][
        "select"
    ] == "eval"


@pytest.mark.parametrize(
    "where, after", [("engine.experiment.train_method", 2), ("train.run_losses", 9)]
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    where, after, ground, finished, tmp_path, monkeypatch
):
    with monkeypatch.context() as m:
        forbid(m, f"ia2mini.{where}", after)  # between methods, or between steps
        result = invoke(*toy(ground, tmp_path))
    *phases, line = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == 130 and line.startswith("ia2mini: interrupted")
    assert phases and all(phase.startswith("phase ") for phase in phases)
    (folder,) = tmp_path.iterdir()
    assert (folder / "toy-mood-n4/fit-sft.safetensors").is_file() and not (
        folder / "results.json"
    ).exists()
    assert not (folder / "toy-mood-n4/fit-ia2-sft.safetensors").exists() and not list(
        folder.rglob(".*")
    )
    monkeypatch.setitem(METHODS, "sft", stopping(METHODS["sft"]))
    assert invoke(*toy(ground, tmp_path)).exit_code == 0
    assert json.dumps(numbers(folder)) == json.dumps(numbers(finished[1]))


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_from_outside_goes_on_to_the_same_numbers(
    how, ground, finished, tmp_path
):
    def heed():
        # a shell's background jobs ignore it, and so would theirs
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    begun = "run.json" if how != "SIGKILL" else "fit-sft.safetensors"
    command = [*ended_by(how, begun), *map(str, toy(ground, tmp_path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=heed)
    stdout, stderr = done.stdout, done.stderr
    *phases, last = [line for line in stderr.splitlines() if line]
    assert stdout == "" and "Traceback" not in stderr
    if how != "SIGKILL":
        assert done.returncode == 130 and last.startswith("ia2mini: interrupted")
    assert done.returncode in (130, -signal.SIGKILL) and all(
        phase.startswith("phase ") for phase in phases
    )
    (folder,) = tmp_path.iterdir()
    assert not (folder / "results.json").exists()
    assert invoke(*toy(ground, tmp_path)).exit_code == 0
    assert json.dumps(numbers(folder)) == json.dumps(numbers(finished[1]))


def test_own_rows_with_single_token_labels(ground, tmp_path):
    own = ["run", "--data", ground / "mine.csv", "--model", ground / "model", "--out", tmp_path]
    result = invoke(*own, *SMALL, "--methods", "icl,sft,sft")
    assert result.exit_code == 0 and "mine" in result.stdout and "SFT" in result.stdout, (
        result.output
    )
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "results.json").read_text())
    assert (
        document["config"]["pools"]["mine"]["used"]
        == document["config"]["evals"]["mine"]["rows"] - 20
        == 20
    )
    # a method given twice counts once
    assert [cell["method"] for cell in document["cells"]] == ["icl", "sft"]
    assert all(cell["ece_mean"] is not None and cell["sets"] == 2 for cell in document["cells"])


def test_own_rows_with_labels_in_words(ground, tmp_path):
    columns = ["--prompt-column", "body", "--answer-column", "kind", "--template", "{body}\\nKind:"]
    few = "--n 4 --sets 2 --rates 1e-2 --epochs 2 --eval-rows 8 --figures= --device cpu".split()
    command = [
        "run",
        "--data",
        ground / "mine.jsonl",
        *columns,
        "--model",
        ground / "model",
        "--out",
        tmp_path,
        "--methods",
        "base,icl,ia2-sft",
        *few,
    ]
    result = invoke(*command)
    assert result.exit_code == 0 and "mine" in result.stdout, result.output
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "results.json").read_text())
    for run in document["runs"]:  # labels of several tokens are scored, not generated
        assert run["ece"] is not None and 0 <= run["acc"] <= 1 and "texts" not in run
    assert not list(folder.rglob("generations")) and document["config"]["templates"] == {
        "mine": "{body}\nKind:"
    }
    # own rows: both meanings of accuracy, unless others are asked for
    heads = result.stdout.splitlines()[1]
    assert "accuracy (%) ↑  accuracy among labels (%) ↑" in heads and "ECE ↓" in heads, heads
    assert (
        "accuracy among labels"
        not in invoke(*command, "--columns", "acc,ece").stdout.splitlines()[1]
    )


def test_own_rows_with_free_answers(ground, tmp_path):
    few = "--n 2 --sets 1 --rates 1e-2,3e-2 --epochs 2 --eval-rows 3 --methods base,sft --figures= --device cpu".split()
    own = ["run", "--data", ground / "free.jsonl", "--model", ground / "model", "--out", tmp_path]
    result = invoke(*own, *few)
    assert result.exit_code == 0 and "free" in result.stdout and "ECE" not in result.stdout, (
        result.output
    )
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "results.json").read_text())
    assert [run["method"] for run in document["runs"]] == ["base", "sft"]  # of one rate only
    for record in (r for r in document["runs"] if r["method"] == "sft"):
        saved = json.loads((folder / record["texts"]).read_text())
        assert len(saved["texts"]) == 3 and all("good, " in answer for answer in saved["answers"])
