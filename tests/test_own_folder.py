"""`fit --out` into a folder that is not its own changes nothing there; a fit under way is not called interrupted."""

import json

import pytest
from click.testing import CliRunner
from mistakes import refused

from ia2mini import load_adapter
from ia2mini.cli.main import main
from ia2mini.fitting.folder import check_out_folder
from ia2mini.tasks import world


def fit_into(out, rows):
    how = [
        "--model",
        "tiny",
        "--methods",
        "sft",
        "--epochs",
        "1",
        "--rates",
        "1e-9",
        "--folds",
        "2",
    ]
    return CliRunner().invoke(main, ["fit", str(rows), *how, "--out", str(out)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in world.rows("toy-mood", "train")[:8]))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "adapter_model.safetensors", "adapter_config.json", "report.html", "held_out.jsonl", "config.json",
        "model.safetensors", "tokenizer.json", "notes.txt", "rows.csv",
    ],
)  # fmt: skip
def test_what_others_left_in_a_folder_stays(tmp_path, rows, name):
    (tmp_path / name).write_text("years of notes")
    result = fit_into(tmp_path, rows)
    told = result.stderr.strip()
    assert (
        result.exit_code == 2 and "\n" not in told and repr(name) in told and "empty folder" in told
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "years of notes"


def test_a_folder_in_it_or_a_file_in_its_place_is_refused(tmp_path, rows):
    (tmp_path / "a" / "src").mkdir(parents=True)
    (tmp_path / "b").write_text("")
    for out in (tmp_path / "a", tmp_path / "b"):
        result = fit_into(out, rows)
        assert result.exit_code == 2 and str(out) in result.stderr
    assert (tmp_path / "a" / "src").is_dir()


def test_its_own_folder_is_used_again_but_no_card_of_others_is_replaced(tmp_path, rows):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".gitignore").write_text("")
    assert fit_into(out, rows).exit_code == 0 and fit_into(out, rows).exit_code == 0
    (out / "README.md").write_text("# My project")
    result = fit_into(out, rows)
    assert result.exit_code == 2 and "README.md" in result.stderr
    assert (out / "README.md").read_text() == "# My project"
    (out / "README.md").unlink()
    (out / "ia2mini.json").unlink()
    refused(lambda: check_out_folder(out), "is no folder of an earlier fit")
    (out / "unfinished-1234abcd").mkdir()
    check_out_folder(out)


def test_rows_in_the_folder_of_an_earlier_fit_are_not_replaced(tmp_path, rows, monkeypatch):
    out = tmp_path / "out"
    assert fit_into(out, rows).exit_code == 0
    kept = (out / "held_out.jsonl").read_bytes()
    monkeypatch.chdir(out)
    for name in (out / "held_out.jsonl", "held_out.jsonl", "../out/held_out.jsonl"):
        result = fit_into(out, name)
        told = f"{out}: holds 'held_out.jsonl', which this fit reads"
        assert result.exit_code == 2 and told in result.stderr
    assert (out / "held_out.jsonl").read_bytes() == kept


def test_an_unfinished_fit_may_still_run(tmp_path):
    (tmp_path / "unfinished-1234abcd").mkdir()
    refused(
        lambda: load_adapter(tmp_path),
        "is not finished: it still runs or was interrupted",
        "same command",
    )
