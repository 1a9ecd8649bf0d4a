"""The commands as a user types them: what is printed and saved, going on after an end, own rows, every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from hub import connect, serve
from ia2mini.models import load
from ia2mini.models.checkpoint import TINY, save
from ia2mini.models.qwen3 import Config, Qwen3
from reference import EOS, make_checkpoint, random_ids, upstream
from safetensors.torch import load_file

import ia2mini.experiment
import ia2mini.runs
import ia2mini.train
from ia2mini.adapters import LoRA, adapted
from ia2mini.cli import main, options_of, progress
from ia2mini.methods import METHODS
from ia2mini.options import FitOptions, Options
from ia2mini.subject import open_subject as load_subject

SMALL = "--n 4 --sets 2 --rates 1e-2,3e-2 --epochs 3 --eval-rows 10 --device cpu".split()
PROGRAM = [sys.executable, "-c", "from ia2mini.cli import main; main(prog_name='ia2mini')"]
CELL = set("task eval ood model n method adapter sets selected_by rate beta acc ece asim_layers".split())
CELL |= {f"{metric}_{kind}" for metric in "acc ece ece_null nll brier asim".split() for kind in ("mean", "std")}


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder of checkpoints and row files, good and bad."""
    torch.set_num_threads(1)
    g = tmp_path_factory.mktemp("ground")
    net = upstream(make_checkpoint(g / "model", "qwen3", num_hidden_layers=2))
    net.lm_head.weight.data[EOS] *= 3  # generations end soon
    net.save_pretrained(g / "new")
    (g / "new/model.safetensors").replace(g / "model/model.safetensors")
    words = ["grand", "dull", "sweet", "stale"]
    rows = [(f"a {words[i % 4]} tale, number {i}", "xy"[i % 2]) for i in range(40)]
    (g / "mine.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    (g / "mine.jsonl").write_text(
        "".join(json.dumps({"body": text, "kind": ["good", "so so"]["xy".index(y)]}) + "\n" for text, y in rows)
    )
    lines = [json.dumps({"text": f"tale {i}", "label": f"{'very ' * (i % 3)}good, {i}"}) + "\n" for i in range(30)]
    (g / "free.jsonl").write_text("".join(lines))
    (g / "other.csv").write_text("text,label\na new tale,z\n")
    (g / "empty.csv").write_text("")
    (g / "header.csv").write_text("text,label\n")
    (g / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label"\n')
    (g / "hub/sst2").mkdir(parents=True)
    lines = [json.dumps({"sentence": f"line {i}", "label": 7 if i == 2 else i % 2}) + "\n" for i in range(30)]
    (g / "hub/sst2/train.jsonl").write_text("".join(lines))
    for name in ("cut", "garbage", "unsaid", "shape"):
        shutil.copytree(g / "model", g / name)
    weights = (g / "model/model.safetensors").read_bytes()
    (g / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (g / "garbage/model.safetensors").write_bytes(b"\xff" * 400)
    config = json.loads((g / "model/config.json").read_text())
    (g / "unsaid/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_attention_heads"}))
    (g / "shape/config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    return g


def invoke(*arguments) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def toy(ground: Path, out: Path, *more) -> list:
    return ["run", "toy-mood", "--model", ground / "model", "--out", out, "--json", *SMALL, *more]


def numbers(folder: Path) -> dict:
    """results.json but for what depends on the clock and the machine."""
    document = json.loads((folder / "results.json").read_text())
    assert document.pop("peak_memory_bytes") > 0 and all(
        seconds >= 0 for name in ("seconds", "seconds_by_phase") for seconds in document.pop(name).values()
    )
    return document


@pytest.fixture(scope="module")
def finished(ground) -> tuple[Result, Path]:
    """A whole run and its folder."""
    result = invoke(*toy(ground, ground / "runs"))
    assert result.exit_code == 0, result.output
    (folder,) = (ground / "runs").iterdir()
    return result, folder


def test_what_is_on_by_default_can_be_turned_off():
    @click.command()
    @options_of(FitOptions)
    def command(temperature, chat, **others):
        click.echo(f"{temperature} {chat}")

    said = [CliRunner().invoke(command, given).stdout for given in ([], ["--no-temperature", "--chat"])]
    assert said == ["True False\n", "False True\n"]


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr("ia2mini.cli.MINUTE", 0.02)
    with progress("3/20 training sft", 40) as bar:
        for _ in range(40):
            bar.update()
            time.sleep(0.005)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "phase 3/20 training sft" and 3 <= len(lines) <= 12
    for line in lines:
        assert re.fullmatch(r"phase 3/20 training sft +\d+% \|[# \d]{20}\| \d\d:\d\d, \S+ left *", line), line
    monkeypatch.setattr("ia2mini.cli.MINUTE", 60)
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
        assert cell["sets"] == len(cell["acc"]) == len(cell["ece"]) == 2 and len(cell["asim_layers"]) == 2
        assert (cell["rate"] in (1e-2, 3e-2)) == (cell["adapter"] == "lora") == (cell["method"] not in ("base", "icl"))
    table = "\n".join(before)
    words = "accuracy (%),ECE,(null),asim,IA2→SFT,mean of 2 evaluations,N = 4,2 sets,rate by lowest dev loss,total "
    assert all(word in table for word in [*words.split(","), str(folder), "6 adapters for peft"])
    assert "toy-mood-verse*" not in table  # only with --full
    assert json.loads((folder / "results.json").read_text()) == document


def test_each_phase_is_a_line_where_there_is_no_terminal(finished):
    lines = finished[0].stderr.splitlines()
    phases = [re.fullmatch(r"phase (\d+)/(\d+) toy-mood-n4: (.+)", line).groups() for line in lines]
    assert [(int(k), int(of)) for k, of, _ in phases] == [(k, len(phases)) for k in range(1, len(phases) + 1)]
    said = [phase for *_, phase in phases]
    assert said[:2] == ["icl on toy-mood", "base on toy-mood"] and said.count("collecting") == 1
    assert [phase for phase in said if "training" in phase] == [f"training {m}" for m in ("sft", "ia2", "ia2-sft")]


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
    assert what["pools"]["toy-mood"]["digest"] and what["checkpoint"] and what["rates"] == [1e-2, 3e-2]
    assert what["targets"] == ["q_proj", "k_proj", "o_proj"] and what["ia2mini"] == ia2mini.__version__
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
    assert json.loads(saved.read_text())["base_model_name_or_path"] == str((ground / "model").resolve())
    assert load_subject("tiny", "cpu", None, None).base == str(TINY.resolve())
    files = {p.name: p.read_bytes() for p in (ground / "model").iterdir()}
    with serve({("model", "Qwen/Qwen3-0.6B-Base"): {"main": files}, ("model", "me/mine"): {"main": files}}) as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        for name, base in (("Qwen3-0.6b-base", "Qwen/Qwen3-0.6B-Base"), ("me/mine", "me/mine")):
            subject = load_subject(name, "cpu", None, None)
            assert (subject.base, subject.name) == (base, name.replace("/", "--"))


def forbid(monkeypatch, name: str, after: int = 0):
    """Let ia2mini.train.`name` raise as an interrupt does, after so many calls."""
    monkeypatch.setattr(ia2mini.train, name, stopping(getattr(ia2mini.train, name), after))


def stopping(function, after: int = 0):
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*arguments)

    return stop


def test_the_same_command_does_not_train_again(ground, finished, monkeypatch):
    before = (finished[1] / "results.json").read_bytes()
    forbid(monkeypatch, "train_runs")
    result = invoke(*toy(ground, ground / "runs"))
    assert result.exit_code == 0 and [p.name for p in (ground / "runs").iterdir()] == [finished[1].name]
    assert (finished[1] / "results.json").read_bytes() == before


def test_checkpointing_gives_the_same_numbers(ground, finished, tmp_path):
    assert invoke(*toy(ground, tmp_path, "--checkpointing", "--no-compile")).exit_code == 0
    assert json.dumps(numbers(*tmp_path.iterdir())) == json.dumps(numbers(finished[1]))


def test_paper_compat_reports_the_rate_that_is_best_on_the_evaluation_rows(ground, tmp_path):
    result = invoke(*toy(ground, tmp_path, "--paper-compat", "--methods", "icl,sft"))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert {c["selected_by"] for c in document["cells"]} == {None, "eval"} and document["config"]["select"] == "eval"


@pytest.mark.parametrize("where", ["train_runs", "losses"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(where, ground, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        forbid(m, where, after=2 if where == "train_runs" else 9)  # between methods, or between steps
        result = invoke(*toy(ground, tmp_path))
    *phases, line = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == 130 and line.startswith("ia2mini: interrupted")
    assert phases and all(phase.startswith("phase ") for phase in phases)
    (folder,) = tmp_path.iterdir()
    assert (folder / "toy-mood-n4/fit-sft.safetensors").is_file() and not (folder / "results.json").exists()
    assert not (folder / "toy-mood-n4/fit-ia2-sft.safetensors").exists() and not list(folder.rglob(".*"))
    monkeypatch.setitem(METHODS, "sft", stopping(METHODS["sft"]))
    assert invoke(*toy(ground, tmp_path)).exit_code == 0
    assert json.dumps(numbers(folder)) == json.dumps(numbers(finished[1]))


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_from_outside_goes_on_to_the_same_numbers(how, ground, finished, tmp_path):
    def heed():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would theirs

    pipes, environment = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, *map(str, toy(ground, tmp_path))]
    process = subprocess.Popen(command, text=True, env=environment, preexec_fn=heed, **pipes)
    begun = "*/run.json" if how != "SIGKILL" else "*/*/fit-sft.safetensors"
    while process.poll() is None and not list(tmp_path.glob(begun)):
        time.sleep(0.01)
    process.send_signal(getattr(signal, how))
    stdout, stderr = process.communicate(timeout=120)
    *phases, last = [line for line in stderr.splitlines() if line]
    assert stdout == "" and "Traceback" not in stderr
    if how != "SIGKILL":
        assert process.returncode == 130 and last.startswith("ia2mini: interrupted")
    assert process.returncode in (130, -signal.SIGKILL) and all(phase.startswith("phase ") for phase in phases)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "results.json").exists()
    assert invoke(*toy(ground, tmp_path)).exit_code == 0
    assert json.dumps(numbers(folder)) == json.dumps(numbers(finished[1]))


def test_own_rows_with_single_token_labels(ground, tmp_path):
    own = ["run", "--data", ground / "mine.csv", "--model", ground / "model", "--out", tmp_path]
    result = invoke(*own, *SMALL, "--methods", "icl,sft,sft")
    assert result.exit_code == 0 and "mine" in result.stdout and "SFT" in result.stdout, result.output
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "results.json").read_text())
    assert document["config"]["pools"]["mine"]["used"] == document["config"]["evals"]["mine"]["rows"] - 20 == 20
    assert [cell["method"] for cell in document["cells"]] == ["icl", "sft"]  # a method given twice counts once
    assert all(cell["ece_mean"] is not None and cell["sets"] == 2 for cell in document["cells"])


def test_own_rows_with_labels_in_words(ground, tmp_path):
    columns = ["--prompt-column", "body", "--answer-column", "kind", "--template", "{body}\\nKind:"]
    few = "--n 4 --sets 2 --rates 1e-2 --epochs 2 --eval-rows 8 --methods base,icl,ia2-sft --device cpu".split()
    command = ["run", "--data", ground / "mine.jsonl", *columns, "--model", ground / "model", "--out", tmp_path, *few]
    result = invoke(*command)
    assert result.exit_code == 0 and "mine" in result.stdout, result.output
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "results.json").read_text())
    for run in document["runs"]:  # labels of several tokens are scored, not generated
        assert run["ece"] is not None and 0 <= run["acc"] <= 1 and "texts" not in run
    assert not list(folder.rglob("generations")) and document["config"]["templates"] == {"mine": "{body}\nKind:"}
    refused(tmp_path / "none", ["rescore", folder], "no generated texts there", "only tasks whose answers are text")


def test_own_rows_with_free_answers_and_rescoring(ground, tmp_path):
    few = "--n 2 --sets 1 --rates 1e-2,3e-2 --epochs 2 --eval-rows 3 --methods base,sft --device cpu".split()
    own = ["run", "--data", ground / "free.jsonl", "--model", ground / "model", "--out", tmp_path]
    result = invoke(*own, *few)
    assert result.exit_code == 0 and "free" in result.stdout and "ECE" not in result.stdout, result.output
    (folder,) = tmp_path.iterdir()
    document = json.loads((folder / "results.json").read_text())
    assert [run["method"] for run in document["runs"]] == ["base", "sft"]  # of one rate only
    for record in (r for r in document["runs"] if r["method"] == "sft"):
        saved = json.loads((folder / record["texts"]).read_text())
        assert len(saved["texts"]) == 3 and all("good, " in answer for answer in saved["answers"])
        saved["texts"] = saved["answers"][:2] + ["nonsense"]
        (folder / record["texts"]).write_text(json.dumps(saved))
    result = invoke("rescore", folder)
    assert result.exit_code == 0 and "66.7 ± 0.0" in result.stdout, result.output
    again = json.loads((folder / "results.json").read_text())
    assert {c["acc_mean"] for c in again["cells"] if c["method"] == "sft"} == {2 / 3}
    assert again["seconds"] == document["seconds"] and again["config"] == document["config"]
    assert "66.7 ± 0.0" in (folder / "table.txt").read_text()


def test_tasks_and_what_the_model_sees(ground):
    listed = invoke("tasks")
    assert listed.exit_code == 0 and all(
        name in listed.stdout for name in ("sst2", "gsm8ks", "toy-mood", "finsen*", "evaluation only")
    )
    shown = invoke("tasks", "toy-mood", "--model", ground / "model", "--n", "2")
    assert shown.exit_code == 0 and shown.stdout.count("demonstration:") == 2 and shown.stdout.count("query:") == 1
    prompt = shown.stdout.split("query:")[1].split("\n", 1)[1].rstrip()
    count = int(shown.stdout.split("query: ")[1].split()[0])
    assert prompt[:-1].endswith("\nLabel:") and count == len(prompt[:-1].encode())  # one token a byte
    assert "pool: 2000 of 2000 rows" in shown.stdout


def test_tasks_previews_own_rows(ground):
    own = ["--data", ground / "mine.csv", "--model", ground / "model"]
    shown = invoke("tasks", *own, "--n", "3", "--template", "Tale: {text}\\nKind:")
    assert shown.exit_code == 0 and shown.stdout.count("demonstration:") == 3 and shown.stdout.count("query:") == 1
    assert shown.stdout.startswith("mine (mine.csv) from ") and "pool: 20 of 40 rows" in shown.stdout
    assert "evaluation: 20 of 40 rows" in shown.stdout and shown.stdout.count("Tale: a ") == 4
    assert re.search(r"tale, number \d+\nKind:[xy]\n", shown.stdout)
    refused(ground / "none", ["tasks", "toy-mood", *own], "either TASK or --data")


def test_generate_continues_a_real_model(shared_data):
    folder = shared_data / "checkpoints/stories260k"
    result = invoke("generate", "--model", folder, "--prompt", "Once upon a time, there was a", "--max-tokens", "24")
    assert result.exit_code == 0
    assert (
        result.stdout == " little girl named Lily. She loved to play outside in the park. One\n"
    )  # as shared/data's page has it


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_tells_the_defaults(command):
    result = invoke(*([command] if command else []), "--help")
    assert result.exit_code == 0 and result.stdout.startswith("Usage:")
    options = [
        p for p in (main.commands[command].params if command else []) if isinstance(p, click.Option) and not p.required
    ]
    with_default = [p.name for p in options if isinstance(p.default, (str, int, float)) and p.default and not p.is_flag]
    assert result.stdout.count("[default: ") >= len(with_default), with_default


MISTAKES = {
    "task": ("run sstt2", "unknown task 'sstt2'", "did you mean 'sst2'"),
    "model": ("run toy-mood --model qwen3-4b-bse", "unknown model 'qwen3-4b-bse'", "did you mean 'qwen3-4b-base'"),
    "method": ("run toy-mood --methods base,ia3", "unknown method 'ia3'", "ia2-sft"),
    "only evaluated": ("run poems", "poems is only evaluated on"),
    "column": ("run --data {g}/mine.csv --prompt-column body", "mine.csv:2: no column 'body'", "'text', 'label'"),
    "template column": ("run --data {g}/mine.csv --template {{body}}:",
        "mine.csv:2: no column 'body'", "'text', 'label'"),
    "label": ("run sst2 --data-dir {g}/hub", "sst2/train.jsonl:3: unknown label '7'", "known labels: '0', '1'"),
    "label of own rows": ("run --data {g}/mine.csv --eval-data {g}/other.csv",
        "other.csv:2: unknown label 'z'", "'x', 'y'"),
    "empty file": ("run --data {g}/empty.csv", "empty.csv: the file holds no rows"),
    "only a header": ("run --data {g}/header.csv", "header.csv: the file holds no rows"),
    "not JSON": ("run --data {g}/broken.jsonl", "broken.jsonl:2: not JSON", "one object a line"),
    "no such file": ("run --data {g}/nowhere.csv", "nowhere.csv: no such file"),
    "no such folder": ("run sst2 --data-dir {g}/nowhere", "nowhere: no rows of sst2 there", ".jsonl"),
    "task and data": ("run sst2 --data {g}/mine.csv", "either TASK or --data"),
    "template without data": ("run toy-mood --template {{text}}:", "--template", "give --data"),
    "too many rows": ("run --data {g}/mine.csv --n 16",
        "--n 16: needs 16 training and 8 dev rows", "holds only 20", "smaller --n"),
    "one row": ("run toy-mood --n 4,1", "--n 1: ", "no demonstration", "--n 2"),
    "cut weights": ("run toy-mood --model {g}/cut", "cut/model.safetensors: truncated or corrupt", "download it again"),
    "corrupt weights": ("run toy-mood --model {g}/garbage",
        "garbage/model.safetensors: truncated or corrupt", "download it again"),
    "config field": ("run toy-mood --model {g}/unsaid",
        "unsaid/config.json: needed field missing: num_attention_heads"),
    "config against weights": ("run toy-mood --model {g}/shape", "of shape", "config.json asks for"),
    "out under a file": ("run toy-mood --out {g}/mine.csv/runs", "mine.csv/runs", "cannot write there", "--out"),
    "read-only out": ("run toy-mood --out /proc/runs", "/proc/runs", "cannot write there", "--out"),
    "rates in words": ("run toy-mood --rates fast",
        "--rates", "'fast' is not a list of float values separated by commas"),
    "rate of nothing": ("run toy-mood --rates 1e-3,0", "--rates 0", "positive"),
    "rate nan": ("run toy-mood --rates nan", "--rates nan", "positive"),
    "figures": ("run toy-mood --figures png,gif", "--figures gif: unknown; there are", "png, pdf, svg"),
    "columns": ("run toy-mood --columns acc,f1", "--columns f1: unknown; there are acc, ece", "smooth_ece"),
    "n in words": ("run toy-mood --n abc", "--n", "'abc' is not a list of int values separated by commas"),
    "no n": ("run toy-mood --n ,", "--n", "at least one"),
    "no method": ("run toy-mood --methods ,", "--methods", "at least one"),
    "option of all": ("--nonsense", "--nonsense"),
    "option": ("run toy-mood --setz 3", "--setz", "--sets"),
    "command": ("rum", "rum"),
    "layer": ("run toy-mood --layers 99", "--layers 99: this model has layers 0 to 1"),
    "target": ("run toy-mood --targets nonsense", "'nonsense' matches no matrix", "q_proj"),
    "targets of a prompt": ("run toy-mood --adapter prompt --targets q_proj",
        "--targets", "prompt adapter", "leave it out"),
    "device": ("run toy-mood --device tpu9", "--device tpu9", "use --device cpu"),
    "device of others": ("run toy-mood --device mps", "--device mps: ia2mini runs on cpu and cuda", "use --device cpu"),
    "rescore nothing": ("rescore {g}/nowhere", "nowhere/results.json: no such file"),
    "empty prompt": ("generate --model {g}/model --prompt=", "--prompt is empty"),
}  # fmt: skip


def refused(out: Path, arguments: list, *words: str) -> None:
    """The command fails with one line that holds the words, and leaves nothing in `out`."""
    result = invoke(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("ia2mini: ") and all(word in line for word in words), line
    assert result.stdout == "" and not list(out.rglob("*"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, ground, tmp_path):
    command, *words = MISTAKES[mistake]
    arguments = command.format(g=ground).split(" ")
    if arguments[0] == "run":
        arguments += ["--model", ground / "model"] * ("--model" not in arguments) + ["--out", tmp_path] * (
            "--out" not in arguments
        )
    refused(tmp_path, arguments, *words)


def test_own_rows_want_a_model_that_knows_their_words(ground, tmp_path):
    command = ["run", "--data", ground / "mine.csv", "--out", tmp_path / "out"]
    refused(tmp_path, command, "--data: name a --model for your own rows", "449 words")
    words = [f"Text {i},{i % 2}\n" for i in range(30)]
    (tmp_path / "known.csv").write_text("text,label\n" + "".join(words))
    named = ["run", "--data", tmp_path / "known.csv", "--model", "tiny", "--out", tmp_path / "out"]
    assert invoke(*named, *SMALL, "--methods", "base", "--sets", "1").exit_code == 0  # who names it may have it


LIGHT = {"--help": "Usage:", "run --help": "--methods", "tasks": "toy-mood-verse*", "--version": "ia2mini"}


@pytest.mark.parametrize("command", LIGHT)
def test_help_and_the_list_of_tasks_do_not_wait_for_torch(command):
    code = f"import sys; from ia2mini.cli import main\ntry: main({command.split()!r}, prog_name='ia2mini')\n"
    code += "finally: assert not {'torch', 'tokenizers', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and LIGHT[command] in done.stdout, done.stderr


def test_a_warning_is_one_line():
    command = [*PROGRAM, "generate", "--prompt", "a zyzzyva zyzzyva film", "--max-tokens", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    said = "'zyzzyva' is not in the vocabulary and is read as an unknown word"
    assert done.returncode == 0 and line == f"ia2mini: warning: {said}"


def test_no_network(ground, tmp_path, monkeypatch):
    with serve({}) as hub:
        pass  # its port is closed now
    out = tmp_path / "out"
    for offline in (False, True):
        connect(monkeypatch, hub, tmp_path / "cache", offline)
        refused(
            out,
            ["run", "toy-mood", "--model", "qwen3-4b-base", "--out", out],
            "Qwen/Qwen3-4B-Base: ",
            "network",
            "give a folder",
        )
        refused(
            out,
            ["run", "sst2", "--model", ground / "model", "--out", out],
            "stanfordnlp/sst2: ",
            "network",
            "--data-dir",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_in_another_process(ground, tmp_path):
    command = [*PROGRAM, *map(str, toy(ground, tmp_path / "out")), "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (line,) = result.stderr.splitlines()
    assert (
        result.returncode == 2 and line.startswith("ia2mini: --device cuda: not usable here") and "--device cpu" in line
    )
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_a_full_device(ground, tmp_path, monkeypatch):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(ia2mini.experiment, "label_scores", full)
    result = invoke(*toy(ground, tmp_path))
    *phases, line = result.stderr.splitlines()
    assert result.exit_code == 2 and all(phase.startswith("phase ") for phase in phases)
    assert line.startswith("ia2mini: the device has too little memory") and "smaller --model" in line
    monkeypatch.undo()
    assert invoke(*toy(ground, tmp_path)).exit_code == 0


def test_a_full_disk(ground, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ia2mini.runs, "save_file", full)
    result = invoke(*toy(ground, tmp_path))
    *phases, line = result.stderr.splitlines()
    assert result.exit_code == 2 and all(phase.startswith("phase ") for phase in phases)
    assert "base-on-toy-mood.safetensors: cannot be written (No space left on device); free some space" in line
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"run.json", "seconds.json"}


def test_labels_that_merge_with_the_colon(shared_data, ground, tmp_path):
    """Qwen3 reads ":A" and ":true" as one token: our template gives way, the user's own is refused, the label named."""
    model = Qwen3(Config(151936, 16, 32, 1, 2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))
    torch.nn.init.normal_(model.lm_head.weight)
    save(
        model, tmp_path / "model", (shared_data / "tokenizers/qwen3/tokenizer.json").read_text(encoding="utf-8"), 151643
    )
    for labels in (("A", "B"), ("true", "false"), ("negative", "positive")):
        rows = (ground / "mine.csv").read_text().replace(",x\n", f",{labels[0]}\n").replace(",y\n", f",{labels[1]}\n")
        (tmp_path / "mine.csv").write_text(rows)
        command = [
            "run",
            "--data",
            tmp_path / "mine.csv",
            "--model",
            tmp_path / "model",
            "--out",
            tmp_path / "out",
            *SMALL,
        ]
        own = [*command, "--template", "Text:{text}\\nLabel:"]
        refused(
            tmp_path / "out",
            own,
            f"answer {min(labels)!r} merges",
            "\\nLabel:'",
            "choose another label, or a template that ends",
        )
    result = invoke(*command, "--methods", "icl,sft", "--sets", "1", "--rates", "1e-3", "--epochs", "1")
    assert result.exit_code == 0 and "'Text:{text}\\nLabel:\\n'" in result.stderr


def test_every_number_has_its_least_value():
    """Of the options of `run` and `fit` that have one; of lists each entry."""
    tried = set()
    for command, options in (("run toy-mood", Options), ("fit rows.csv --out out", FitOptions)):
        for field in (field for field in fields(options) if field.metadata.get("least") is not None):
            low = str(field.metadata["least"] - 1)
            result = invoke(*command.split(), f"--{field.name.replace('_', '-')}", low)
            assert result.exit_code == 2 and f"{low} is " in result.stderr, field.name
            tried.add(field.name)
    assert {"rank", "batch_size", "epochs", "patience", "folds", "demonstrations", "sets"} <= tried
