"""What `fit` leaves in its folder, and what `predict` and `score` say of rows that are odd."""

import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from hub import connect, serve
from ia2mini.models.checkpoint import TINY
from mistakes import refused
from shipping import shipping

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.engine.experiment import make_adapter
from ia2mini.fitting.measures import measures
from ia2mini.fitting.predictor import FOREIGN, Predictor
from ia2mini.fitting.spec import SHAPE
from ia2mini.metrics import row_losses
from ia2mini.report.card import card
from ia2mini.report.fit import by_label
from ia2mini.tasks import world

QUICK = FitOptions(epochs=8, rates=(1e-2,), methods=("sft",), folds=2)


def toy_rows(count: int, start: int = 4) -> list[dict]:
    return world.rows("toy-mood", "train")[start : start + count]


@pytest.fixture(scope="module")
def fitted():
    with shipping("sft"):
        return fit(toy_rows(12), open_subject("tiny", "cpu"), QUICK)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    fitted.save(folder := tmp_path_factory.mktemp("fitted") / "a")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def test_columns_that_are_called_as_what_is_added_are_kept(fitted):
    (row,) = toy_rows(1)
    own = {"answer": "mine", "confidence": 2, "row_answer": "older", "answers": 3}
    for coverage in (None, 0.5):
        (found,) = fitted.answer_rows([row | own], coverage=coverage)
        kept = {"row_answer": "mine", "row_confidence": 2, "row_row_answer": "older", "answers": 3}
        assert (
            found.items() >= (kept | row).items()
            and 0 <= found["confidence"] <= 1
            and found["answer"] != "mine"
        )
    assert fitted.answer_rows([row]).__next__().keys() == row.keys() | {
        "answer",
        "confidence",
        "probabilities",
    }


def test_the_bases_commit_on_the_hub_is_kept_and_loaded(tmp_path, monkeypatch):
    files = {p.name: p.read_bytes() for p in TINY.iterdir() if p.is_file()}
    with serve({("model", "some/one"): {"main": files}}) as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        then = hub.commit("model", "some/one", "main")
        with shipping("sft"):
            found = fit(toy_rows(12), open_subject("some/one", "cpu"), QUICK)
        found.save(tmp_path / "a")
        assert json.loads((tmp_path / "a" / "ia2mini.json").read_text())["base"]["revision"] == then
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["revision"] == then
        assert (
            f"revision={then!r}" in (text := card(found, tmp_path / "a", "fit"))
            and "\nbase_model: some/one\n" in text
        )
        hub.repos["model", "some/one"] = {"main": files | {"config.json": b"{}"}, "then": files}
        now, then = hub.commit("model", "some/one", "main"), hub.commit("model", "some/one", "then")
        assert now != then
        spec = json.loads((tmp_path / "a" / "ia2mini.json").read_text())
        spec["base"]["revision"] = then  # the look-alike's ids are of branches
        (tmp_path / "a" / "ia2mini.json").write_text(json.dumps(spec))
        assert load_adapter(tmp_path / "a").subject.revision == then
        (tmp_path / "rows.jsonl").write_text(json.dumps(toy_rows(1)[0]) + "\n")
        assert json.loads(run("predict", tmp_path / "a", tmp_path / "rows.jsonl").stdout)["answer"]
    assert open_subject("tiny", "cpu").revision is None


@pytest.mark.parametrize("adapter", ["lora", "ia3", None])
def test_the_card_shows_what_can_load_it(fitted, tmp_path, adapter):
    spec = FOREIGN | {"versions": {"ia2mini": "0"}, "chat": False}
    made = adapter and make_adapter(fitted.subject.model, replace(QUICK, adapter=adapter, rank=20))
    subject = replace(fitted.subject, base="/models/mine")
    text = card(Predictor(subject, made, None, spec, fitted.report), tmp_path / "a", "ia2mini fit")
    (code,) = re.findall("```python\n(.*?)```", text, re.S)
    compile(code, "card", "exec")
    assert ("peft" in text) == (adapter is not None), "the base needs transformers alone"
    assert ("--enable-lora --max-lora-rank 32" in text) == ("vLLM" in text) == (adapter == "lora")
    assert code.count(repr(str(tmp_path / "a"))) == (0 if adapter is None else 1)
    assert "dtype='float32'" in code and "\n\n\n" not in text.replace(code, "")
    assert "base_model" not in text, "a folder is no name on the hub"
    assert "from_pretrained('/models/mine'" in code
    text = card(
        Predictor(fitted.subject, made, None, spec, fitted.report), tmp_path / "a", "ia2mini fit"
    )
    assert "import TINY" in text and "from_pretrained(TINY" in text and "vLLM" not in text


def test_a_damaged_field_is_named_and_a_bug_of_ours_is_not_disguised(saved, tmp_path, monkeypatch):
    whole = json.loads((saved / "ia2mini.json").read_text())
    odd = {
        "labels": [1],
        "canary": {"dtype": "float32"},
        "confidences": ["0.5"],
        "demonstrations": [{}],
        "base": {},
    }
    for field in SHAPE:
        for broken in (
            {k: v for k, v in whole.items() if k != field},
            whole | {field: odd.get(field, [[]])},
        ):
            (tmp_path / "ia2mini.json").write_text(json.dumps(broken))
            refused(
                lambda: load_adapter(tmp_path),
                f"ia2mini.json: field {field}",
                "fit the adapter again",
            )

    def bug(*_):
        raise KeyError("a bug of ours")

    monkeypatch.setattr("ia2mini.fitting.folder.read_adapter", bug)
    with pytest.raises(KeyError, match="a bug of ours"):
        load_adapter(saved)


@pytest.mark.parametrize(
    "name, text, said",
    [
        (
            "unknown.csv",
            "text,label\ngood,0\nbad,7\n",
            ("unknown.csv:3", "'7' is none of the labels '0', '1'"),
        ),
        (
            "missing.csv",
            "text,mood\ngood,0\n",
            ("missing.csv:2", "'label'", "'mood'", "--answer-column"),
        ),
        ("blank.csv", "text,label\ngood,0\nbad,\n", ("blank.csv:3", "no answer in column 'label'")),
        (
            "null.jsonl",
            '{"text": "good", "label": null}\n',
            ("null.jsonl:1", "no answer in column 'label'"),
        ),
        ("nan.csv", "text,label\ngood,NaN\n", ("nan.csv:2", "no answer in column 'label'")),
        ("empty_prompt.csv", "text,label\n ,0\n", ("empty_prompt.csv:2", "the prompt is empty")),
        ("prompt.csv", "words,label\ngood,0\n", ("prompt.csv:2", "no column 'text'")),
        ("empty.csv", "", ("empty.csv", "holds no rows")),
        ("header.csv", "text,label\n", ("header.csv", "holds no rows")),
        ("latin.csv", "text,label\ngood \xff,0\n", ("latin.csv:2", "UTF-8")),
        ("none.csv", None, ("none.csv", "no such file")),
    ],
)
def test_rows_that_cannot_be_scored_are_one_line(saved, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    told = run("score", saved, tmp_path / name, code=2).stderr.strip()
    assert "\n" not in told and all(part in told for part in said), told


def test_a_folder_that_was_edited_since_is_one_line(saved, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\ngood,0\n")
    for name, change in (
        ("adapter_model.safetensors", lambda data: data[:-4]),
        ("adapter_model.safetensors", lambda data: data[:-4] + b"\0\0\x80\x3f"),
        (
            "adapter_config.json",
            lambda data: data.replace(b'"lora_alpha": 8.0', b'"lora_alpha": 9.0'),
        ),
        ("ia2mini.json", lambda data: data[:-9]),
    ):
        kept = (saved / name).read_bytes()
        assert change(kept) != kept
        try:
            (saved / name).write_bytes(change(kept))
            told = run("score", saved, tmp_path / "rows.csv", code=2).stderr.strip()
        finally:
            (saved / name).write_bytes(kept)
        assert "\n" not in told and str(saved) in told, told


def test_score_marks_nothing_as_shipped(saved, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\ngood,0\nbad,1\n")
    said = run("score", saved, tmp_path / "rows.csv").stdout
    assert "shipped" not in said and "*" not in said and "(null)" in said


def test_the_reports_loss_is_the_one_that_is_chosen_by():
    """Also of an answer with next to no probability."""
    scores, gold = torch.tensor([[0.0, -200.0], [-3.0, 0.0]]), torch.tensor([1, 1])
    for temperature in (1.0, 2.0):
        found = measures(scores, gold, temperature)["nll"][0]
        assert found == pytest.approx(row_losses(scores, gold, temperature).mean().item(), rel=1e-6)
    assert measures(scores, gold, 1.0)["nll"][0] == pytest.approx(
        100 + torch.tensor(-3.0).exp().log1p().item() / 2
    )


def test_the_rows_to_look_at_first(tmp_path):
    """Those whose own label was least likely when held out, of the wrongly answered ones, a tenth at most."""
    rows = toy_rows(30)
    for row in rows[:2] + rows[20:21]:
        row["label"] = 1 - row["label"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a"
    how = "--model tiny --methods sft --epochs 1 --rates 1e-2 --folds 2".split()
    with shipping("icl"):
        told = run("fit", path, *how, "--out", out).stdout
    assert "suspects.jsonl" in told
    found = [json.loads(line) for line in (out / "suspects.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    wrong = [row for row in held if not row["right"]]
    own = sorted((row["probabilities"][row["true"]], row["prompt"]) for row in wrong)
    assert [(row["probability"], row["prompt"]) for row in found] == own[:3]
    assert {row["row"] for row in found} <= {f"{path}:{i}" for i in range(1, 31)}
    for row in found:
        line = rows[int(row["row"].rpartition(":")[2]) - 1]
        assert line["text"] in row["prompt"] and str(line["label"]) == row["true"] != row["said"]
    flipped = {f"{path}:{i}" for i in (1, 2, 21)}
    assert len({row["row"] for row in found} & flipped) >= 2, "what was spoilt is found"
    page = (out / "report.html").read_text()
    assert "Rows whose answer may be wrong" in page and f"{path}:" in page
    with shipping("base"):
        told = run("fit", path, *how, "--out", out).stdout
    assert "suspects" not in told and not (out / "suspects.jsonl").exists()
    assert "Rows whose answer may be wrong" not in (out / "report.html").read_text()


def test_fit_and_score_tell_macro_f1_and_labels_of_one_row(tmp_path):
    rows = toy_rows(12)
    rows[0]["label"] = "apple"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a"
    how = "--model tiny --methods sft --epochs 1 --rates 1e-2 --folds 2".split()
    told = run("fit", path, *how, "--out", out)
    assert "macro-F1" in told.stdout and "only one row has the answer 'apple'" in told.stdout
    assert "answers: 3 labels (0: 6, 1: 5, apple: 1)" in told.stderr.splitlines()
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert "macro-F1" in run("score", out, tmp_path / "new.jsonl").stdout
    text = run("fit", path, *how, "--text", "--out", tmp_path / "b").stderr
    told = "answers: free text, 3 different in 12 rows; right is the same, word for word"
    assert told in text.splitlines()
    (tmp_path / "context.txt").write_text("be good")
    context = ("--context", tmp_path / "context.txt", "--prompts", path)
    refused_line = run("fit", *context, "--labels", "--model", "tiny", "--out", out, code=2).stderr
    assert "--labels and --text" in refused_line and refused_line.count("\n") == 1


def test_many_labels_are_shown_as_pairs():
    """A square of 21 labels would not be read."""
    labels = [f"label {i}" for i in range(21)]
    matrix = [[5 * (i == j) for j in range(21)] for i in range(21)]
    matrix[3][4] = 2
    matrix[8][1] = 7
    classes = [{"label": label, "rows": 5, "precision": 1, "recall": 1} for label in labels]
    _, pairs = by_label({"classes": classes, "confusion": matrix})
    assert pairs.index("label 8") < pairs.index("label 3") and "label 5" not in pairs
    _, square = by_label({"classes": classes[:20], "confusion": [row[:20] for row in matrix[:20]]})
    assert "label 5" in square
