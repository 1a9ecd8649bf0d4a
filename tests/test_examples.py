"""The scripts in examples/ run as they stand, and what they print is right."""

import json
import re
import runpy
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from ia2mini.models.checkpoint import SHORT_NAMES
from reference import make_checkpoint

from ia2mini.cli.main import main
from ia2mini.cli.run import report, run
from ia2mini.methods import METHODS, Grid
from ia2mini.tasks import all_tasks, find_task

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_tap_equals_a_hook(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["taps.py"])
    runpy.run_path(str(EXAMPLES / "taps.py"))
    differences = [float(x) for x in re.findall(r"difference (\S+)", capsys.readouterr().out)]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_ia2_in_python_beats_sft_and_is_short(capsys):
    runpy.run_path(str(EXAMPLES / "ia2_in_python.py"))
    said = dict(
        re.findall(r"^(sft|ia2|ia2-sft) +accuracy (\S+),", capsys.readouterr().out, re.MULTILINE)
    )
    assert float(said["ia2"]) > float(said["sft"]) + 0.2
    until_own_loss = (EXAMPLES / "ia2_in_python.py").read_text().split("def cosine")[0]
    assert until_own_loss.count("\n") <= 30


PAPER = (Path(__file__).parents[1] / "docs" / "paper.md").read_text(encoding="utf-8")
COMMANDS = [
    part.removeprefix("ia2mini run ")
    for part in PAPER.split("`")
    if part.startswith("ia2mini run ")
]
REPORTS = [
    part.removeprefix("ia2mini report ")
    for part in PAPER.split("`")
    if part.startswith("ia2mini report runs")
]


def test_every_table_and_figure_of_the_paper_has_a_command():
    first = [line.split("|")[1].strip() for line in PAPER.splitlines() if line.startswith("| ")]
    assert [name for name in first if name.startswith("Table")] == [
        f"Table {i}" for i in range(1, 21)
    ]
    figures = ["Figure 1", "Figure 2", "Figures 3, 5", "Figure 4", "Figure 6"]
    drawn = [name.removesuffix(" (in part)") for name in first if name.startswith("Figure")]
    assert drawn == figures
    assert len(set(COMMANDS)) == len(COMMANDS) >= 30
    for command in COMMANDS:
        given = run.make_context("run", command.split()).params
        assert (
            all(find_task(task).train for task in given["names"]) and given["model"] in SHORT_NAMES
        )
        assert not given["methods"] or set(given["methods"]) <= {"base", "icl", *METHODS}
    filled = {str(run.make_context("run", command.split()).params["out"]) for command in COMMANDS}
    joined = [
        report.make_context("report", command.split()).params["folders"] for command in REPORTS
    ]
    assert {str(folders[0].parent) for (*folders,) in joined} == filled - {"runs"} and len(
        joined
    ) == 2


@pytest.fixture(scope="module")
def paper_data(tmp_path_factory, shared_data) -> Path:
    """A folder of the paper's sets in hub columns: real rows, and made-up ones where there are none."""
    folder = tmp_path_factory.mktemp("data")
    for path in shared_data.glob("*/*.jsonl"):
        (folder / path.parent.name).mkdir(exist_ok=True)
        with path.open(encoding="utf-8") as lines:
            (folder / path.parent.name / path.name).write_text(
                "".join(islice(lines, 1500)), encoding="utf-8"
            )
    made = {
        "bbc_news/test": [{"text": f"the team won {i} games", "label": i % 5} for i in range(20)],
        "qasc/validation": [
            {
                "question": f"{i} and 1?",
                "choices": {"text": list("12345678"), "label": list("ABCDEFGH")},
                "answerKey": "B",
            }
            for i in range(20)
        ],
        "strategy_qa/test": [
            {"question": f"Is {i} more than 300?", "answer": i > 300} for i in range(600)
        ],
    }
    for name, rows in made.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(folder / "sciq" / "validation.jsonl", folder / "sciq" / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def paper_model(tmp_path_factory, shared_data) -> Path:
    """A small random model with the real tokenizer."""
    changes = {
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "hidden_size": 8,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "eos_token_id": 0,
    }
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", **changes)
    shutil.copy(shared_data / "checkpoints" / "stories260k" / "tokenizer.json", folder)
    return folder


def tasks_by_options() -> dict[str, list[str]]:
    """What the commands ask for beside model, N and folder, each with every task that they ask it of."""
    found: dict[str, list[str]] = {}
    for command in COMMANDS:
        names, _, given = command.partition(" --model ")
        options = re.sub(r"^\S+ --n \S+ | --out \S+| --full", "", given)
        found.setdefault(options, []).extend(names.split())
    return {options: list(dict.fromkeys(names)) for options, names in found.items()}


@pytest.mark.parametrize("options, names", tasks_by_options().items())
def test_commands_of_the_paper_run_from_end_to_end(
    options, names, tmp_path, paper_data, paper_model, monkeypatch
):
    """On few rows, with short texts."""
    for name, task in all_tasks().items():
        monkeypatch.setitem(all_tasks(), name, replace(task, max_tokens=min(task.max_tokens, 6)))
    words = [*names, "--model", str(paper_model), "--n", "2", *options.split()]
    words += ["--data-dir", str(paper_data), "--out", str(tmp_path / "runs"), "--figures="]
    words += "--sets 1 --eval-rows 2 --epochs 1 --betas 0.5 --rates 1e-3 --full --json".split()
    done = CliRunner().invoke(main, ["run", *words])
    assert done.exit_code == 0, done.output + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    asked = run.make_context("run", words).params["methods"]
    assert {cell["method"] for cell in document["cells"]} == set(asked)
    assert {cell["task"] for cell in document["cells"]} == set(names)
    assert all(0 <= cell["acc_mean"] <= 1 for cell in document["cells"])


def test_one_run_by_the_loop_itself_is_that_of_a_grid(capsys):
    found = runpy.run_path(str(EXAMPLES / "one_run.py"))
    said = re.findall(r"^(\S+) +asim (\S+), accuracy (\S+)$", capsys.readouterr().out, re.MULTILINE)
    alike = {name: float(asim) for name, asim, _ in said}
    right = {name: float(accuracy) for name, _, accuracy in said}
    assert alike["ia2"] > alike["base"] + 0.3 and right["ia2-sft"] > right["base"] + 0.3

    class AsItStands(Grid):
        def order(self, number, rows, epoch):
            return list(range(rows))

        def first_weights(self, number):
            return found["theta"][0]

    grid = AsItStands(found["model"], found["lora"], [found["taught"]], [1e-2])
    aligned = METHODS["ia2"](grid)
    assert torch.equal(aligned.theta, found["aligned"].theta)
    assert torch.equal(METHODS["ia2-sft"](grid, aligned).theta, found["tuned"].theta)
