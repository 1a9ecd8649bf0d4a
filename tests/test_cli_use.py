"""Commands in use: tasks, generate, help, mistakes in one line, a device or disk that is full."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from commands import PROGRAM, SMALL, invoke, refused, toy
from hub import connect, serve
from ia2mini.models.checkpoint import save
from ia2mini.models.qwen3 import Config, Qwen3

from ia2mini.cli.main import main
from ia2mini.engine.options import FitOptions, Options


def test_tasks_and_what_the_model_sees(ground):
    listed = invoke("tasks")
    assert listed.exit_code == 0 and all(
        name in listed.stdout
        for name in ("sst2", "gsm8ks", "toy-mood", "finsen*", "evaluation only")
    )
    shown = invoke("tasks", "toy-mood", "--model", ground / "model", "--n", "2")
    assert (
        shown.exit_code == 0
        and shown.stdout.count("demonstration:") == 2
        and shown.stdout.count("query:") == 1
    )
    prompt = shown.stdout.split("query:")[1].split("\n", 1)[1].rstrip()
    count = int(shown.stdout.split("query: ")[1].split()[0])
    # one token a byte
    assert prompt[:-1].endswith("\nLabel:") and count == len(prompt[:-1].encode())
    assert "pool: 2000 of 2000 rows" in shown.stdout


def test_tasks_previews_own_rows(ground):
    own = ["--data", ground / "mine.csv", "--model", ground / "model"]
    shown = invoke("tasks", *own, "--n", "3", "--template", "Tale: {text}\\nKind:")
    assert (
        shown.exit_code == 0
        and shown.stdout.count("demonstration:") == 3
        and shown.stdout.count("query:") == 1
    )
    assert (
        shown.stdout.startswith("mine (mine.csv) from ") and "pool: 20 of 40 rows" in shown.stdout
    )
    assert "evaluation: 20 of 40 rows" in shown.stdout and shown.stdout.count("Tale: a ") == 4
    assert re.search(r"tale, number \d+\nKind:[xy]\n", shown.stdout)
    refused(ground / "none", ["tasks", "toy-mood", *own], "either TASK or --data")


def test_generate_continues_a_real_model(shared_data):
    folder = shared_data / "checkpoints/stories260k"
    result = invoke(
        "generate",
        "--model",
        folder,
        "--prompt",
        "Once upon a time, there was a",
        "--max-tokens",
        "24",
    )
    assert result.exit_code == 0
    assert (
        result.stdout == " little girl named Lily. She loved to play outside in the park. One\n"
    )  # as shared/data's page has it


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_tells_the_defaults(command):
    result = invoke(*([command] if command else []), "--help")
    assert result.exit_code == 0 and result.stdout.startswith("Usage:")
    options = [
        p
        for p in (main.commands[command].params if command else [])
        if isinstance(p, click.Option) and not p.required
    ]
    with_default = [
        p.name
        for p in options
        if isinstance(p.default, (str, int, float)) and p.default and not p.is_flag
    ]
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
        "unsaid/config.json: needed fields are missing: num_attention_heads"),
    "config against weights": ("run toy-mood --model {g}/shape", "of shape", "config.json asks for"),
    "out under a file": ("run toy-mood --out {g}/mine.csv/runs", "mine.csv/runs", "cannot write there", "--out"),
    "read-only out": ("run toy-mood --out /proc/runs", "/proc/runs", "cannot write there", "--out"),
    "rates in words": ("run toy-mood --rates fast",
        "--rates", "'fast' is not a valid float"),
    "rate of nothing": ("run toy-mood --rates 1e-3,0", "--rates 0", "positive"),
    "rate nan": ("run toy-mood --rates nan", "--rates nan", "positive"),
    "figures": ("run toy-mood --figures png,gif", "'--figures': 'gif' is not one of 'png', 'pdf', 'svg'"),
    "columns": ("run toy-mood --columns acc,f1", "'--columns': 'f1' is not one of 'acc', 'ece'", "smooth_ece"),
    "n in words": ("run toy-mood --n abc", "--n", "'abc' is not a valid integer"),
    "no n": ("run toy-mood --n ,", "--n", "at least one"),
    "no method": ("run toy-mood --methods ,", "--methods", "at least one"),
    "option of all": ("--nonsense", "--nonsense"),
    "option": ("run toy-mood --setz 3", "--setz", "--sets"),
    "command": ("rum", "rum"),
    "layer": ("run toy-mood --layers 99", "--layers 99: this model has layers 0 to 1"),
    "target": ("run toy-mood --targets nonsense", "'nonsense' matches no matrix", "q_proj"),
    "an adapter that is gone": ("run toy-mood --adapter prompt", "--adapter", "'prompt' is not one of 'lora', 'ia3'"),
    "device": ("run toy-mood --device tpu9", "--device tpu9", "use --device cpu"),
    "device of others": ("run toy-mood --device xpu", "--device xpu: ia2mini runs on cpu and cuda", "use --device cpu"),
    "rescore": ("rescore {g}/nowhere", "rescore"),
    "empty prompt": ("generate --model {g}/model --prompt=", "--prompt is empty"),
    "rows before the adapter": ("predict {g}/mine.csv {g}/model", "mine.csv: is a file", "comes first"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, ground, tmp_path):
    command, *words = MISTAKES[mistake]
    arguments = command.format(g=ground).split(" ")
    if arguments[0] == "run":
        arguments += ["--model", ground / "model"] * ("--model" not in arguments) + [
            "--out",
            tmp_path,
        ] * ("--out" not in arguments)
    refused(tmp_path, arguments, *words)


def test_own_rows_want_a_model_that_knows_their_words(ground, tmp_path):
    command = ["run", "--data", ground / "mine.csv", "--out", tmp_path / "out"]
    refused(tmp_path, command, "--data: name a --model for your own rows", "449 words")
    words = [f"Text {i},{i % 2}\n" for i in range(30)]
    (tmp_path / "known.csv").write_text("text,label\n" + "".join(words))
    named = ["run", "--data", tmp_path / "known.csv", "--model", "tiny", "--out", tmp_path / "out"]
    # who names it may have it
    assert invoke(*named, *SMALL, "--methods", "base", "--sets", "1").exit_code == 0


LIGHT = {
    "--help": "Usage:",
    "run --help": "--methods",
    "tasks": "toy-mood-verse*",
    "--version": "ia2mini",
}


@pytest.mark.parametrize("command", LIGHT)
def test_help_and_the_list_of_tasks_do_not_wait_for_torch(command):
    code = f"import sys; from ia2mini.cli.main import main\ntry: main({command.split()!r}, prog_name='ia2mini')\n"
    code += "finally: assert not {'torch', 'tokenizers', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and LIGHT[command] in done.stdout, done.stderr


def test_a_warning_is_one_line():
    command = [
        *PROGRAM,
        "generate",
        "--prompt",
        "a zyzzyva zyzzyva film",
        "--max-tokens",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
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
    result = subprocess.run(command, capture_output=True, text=True)
    (line,) = result.stderr.splitlines()
    assert (
        result.returncode == 2
        and line.startswith("ia2mini: --device cuda: not usable here")
        and "--device cpu" in line
    )
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_a_full_device(ground, tmp_path, monkeypatch):
    def full(*args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("ia2mini.study.scoring.label_scores", full)
    result = invoke(*toy(ground, tmp_path))
    *phases, line = result.stderr.splitlines()
    assert result.exit_code == 2 and all(phase.startswith("phase ") for phase in phases)
    assert (
        line.startswith("ia2mini: the device has too little memory") and "smaller --model" in line
    )
    monkeypatch.undo()
    assert invoke(*toy(ground, tmp_path)).exit_code == 0


def test_a_full_disk(ground, tmp_path, monkeypatch):
    def full(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ia2mini.engine.store.save_file", full)
    result = invoke(*toy(ground, tmp_path))
    *phases, line = result.stderr.splitlines()
    assert result.exit_code == 2 and all(phase.startswith("phase ") for phase in phases)
    assert (
        "fit-sft.safetensors: cannot be written (No space left on device); free some space" in line
    )
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"run.json", "seconds.json"}


def test_labels_that_merge_with_the_colon(shared_data, ground, tmp_path):
    """Qwen3 reads ":A" as one token: our template has a blank, the user's own is refused, the label named."""
    model = Qwen3(
        Config(151936, 16, 32, 1, 2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    )
    torch.nn.init.normal_(model.lm_head.weight)
    save(
        model,
        tmp_path / "model",
        (shared_data / "tokenizers/qwen3/tokenizer.json").read_text(encoding="utf-8"),
        151643,
    )
    for labels in (("A", "B"), ("true", "false"), ("negative", "positive")):
        rows = (
            (ground / "mine.csv")
            .read_text()
            .replace(",x\n", f",{labels[0]}\n")
            .replace(",y\n", f",{labels[1]}\n")
        )
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
    result = invoke(
        *command, "--methods", "icl,sft", "--sets", "1", "--rates", "1e-3", "--epochs", "1"
    )
    assert result.exit_code == 0


def test_every_number_has_its_least_value():
    """Of the options of `run` and `fit` that have one; of lists each entry."""
    tried = set()
    for command, options in (("run toy-mood", Options), ("fit rows.csv --out out", FitOptions)):
        for field in (
            field for field in fields(options) if field.metadata.get("least") is not None
        ):
            low = str(field.metadata["least"] - 1)
            result = invoke(*command.split(), f"--{field.name.replace('_', '-')}", low)
            assert result.exit_code == 2 and f"{low} is " in result.stderr, field.name
            tried.add(field.name)
    assert {"rank", "batch_size", "epochs", "patience", "folds", "demonstrations", "sets"} <= tried
