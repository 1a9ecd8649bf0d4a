"""`fit` ships demonstrations in the prompt: what is saved, what answers, what is refused, what it is said to cost."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from mistakes import refused
from reference import upstream
from shipping import shipping

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.episode import with_demonstrations
from ia2mini.report.card import card
from ia2mini.tasks import Example, world

QUICK = FitOptions(epochs=1, rates=(1e-4,), methods=("sft",), folds=3, temperature=False)


def rows(start: int, count: int) -> list[dict]:
    """A task that only demonstrations tell: moods under other names."""
    found = world.rows("toy-mood-remap", "train")[start : start + count]
    return [{"text": row["text"], "label": str(row["label"])} for row in found]


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


@pytest.fixture(scope="module")
def fitted(subject):
    with shipping("icl"):
        return fit(rows(4, 24), subject, QUICK)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    fitted.save(folder := tmp_path_factory.mktemp("shown") / "a")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def test_what_is_said_of_them_where_they_are_shipped(fitted):
    found = fitted.report["candidates"]
    assert fitted.spec["method"] == fitted.report["chosen"] == "icl" and fitted.adapter is None
    assert found["icl"]["nll"][0] < min(found["base"]["nll"][0], found["sft"]["nll"][0])
    tokens = fitted.report["tokens"]
    price = f"A query costs {tokens['icl']:.0f} tokens instead of {tokens['query']:.0f}."
    assert (
        "Demonstrations in the prompt (ICL) are shipped, without an adapter"
        in fitted.report["sentence"]
    )
    assert price in fitted.report["sentence"] and price in card(
        fitted_with_versions(fitted), "a", "ia2mini fit"
    )


def fitted_with_versions(fitted):
    return replace(fitted, spec=fitted.spec | {"versions": {"ia2mini": "0"}})


def test_predict_shows_them_by_itself(fitted, saved, subject):
    """Probabilities of a plain pass over the demonstrations and the query."""
    loaded, asked = load_adapter(saved, subject), rows(200, 3)
    assert loaded.adapter is None and len(loaded.spec["demonstrations"]) == 16
    shown = [Example(**each) for each in fitted.spec["demonstrations"]]
    labels = [
        subject.tokenizer.encode_answer("Text:a\nLabel:", label)[0]
        for label in fitted.spec["labels"]
    ]
    for found, row in zip(loaded.answer_rows(asked), asked, strict=True):
        prompt = with_demonstrations(shown, f"Text:{row['text']}\nLabel:")
        with torch.no_grad():
            logits = subject.model(torch.tensor([subject.tokenizer.encode(prompt)]))[0, -1]
        expected = logits[labels].softmax(-1).tolist()
        assert list(found["probabilities"].values()) == pytest.approx(expected, abs=1e-4)


def test_score_says_how_many_rows_it_has_seen(saved, tmp_path):
    """Two thirds of these: their share of right answers says nothing of new rows."""
    asked = rows(12, 24)
    known = {row["text"] for row in rows(4, 24)}
    seen = sum(row["text"] in known for row in asked)
    assert seen >= 16
    for some, said in (
        (asked, f"{seen} of these are among the rows it was fitted on"),
        (asked[:1], "1 of these is among the rows it was fitted on"),
        ([row for row in asked if row["text"] not in known], None),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        told = " ".join(run("score", saved, path).stdout.split())
        assert said in told if said else "fitted on" not in told


def test_the_commands_know_it(saved, tmp_path):
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(300, 20)))
    said = run("predict", saved, tmp_path / "new.jsonl").stdout
    assert said == run("predict", saved, tmp_path / "new.jsonl", "--icl").stdout
    answers = [json.loads(line) for line in said.splitlines()]
    right = sum(answer["answer"] == answer["label"] for answer in answers)
    assert right >= 15, "as the base would not"
    covered = run("predict", saved, tmp_path / "new.jsonl", "--coverage", 0.5).stdout.splitlines()
    assert any(json.loads(line)["answer"] is None for line in covered)
    assert f"ICL: {100 * right / 20:.0f} % (" in run("score", saved, tmp_path / "new.jsonl").stdout
    told = run("merge", saved, "--out", tmp_path / "whole", code=2).stderr
    assert (
        "no adapter to merge" in told
        and "demonstrations" in told
        and not (tmp_path / "whole").exists()
    )
    told = run("generate", "--adapter", saved, "--prompt", "Text: a film", code=2).stderr
    assert "holds no adapter" in told and "with demonstrations in its prompt" in told


def test_a_base_that_is_another_is_refused(saved, subject):
    spec = json.loads((saved / "ia2mini.json").read_text())
    kept = (saved / "ia2mini.json").read_text()
    spec["canary"]["base"]["log_probabilities"][0] -= 1.0
    (saved / "ia2mini.json").write_text(json.dumps(spec))
    try:
        refused(
            lambda: load_adapter(saved, subject), "the base model is not the one it was fitted on"
        )
    finally:
        (saved / "ia2mini.json").write_text(kept)


def test_an_adapter_that_answers_with_demonstrations(subject, tmp_path):
    """As peft's on the whole prompt; with `icl` as the base; from the folder, merged, and told with its price."""
    with shipping("icl-sft"):
        fitted = fit(rows(4, 12), subject, replace(QUICK, methods=("icl-sft",)))
    fitted.save(tmp_path / "a")
    loaded = load_adapter(tmp_path / "a", subject)
    assert loaded.spec["method"] == "icl-sft" and loaded.adapter is not None
    told = run("generate", "--adapter", tmp_path / "a", "--prompt", "Text:x", "--max-tokens", 1)
    assert "this adapter was trained with demonstrations" in told.stderr and told.stdout
    shown = [Example(**each) for each in loaded.spec["demonstrations"]]
    asked = rows(200, 3)
    prompts = [f"Text:{row['text']}\nLabel:" for row in asked]
    ids = [subject.tokenizer.encode(with_demonstrations(shown, prompt)) for prompt in prompts]
    label_ids = subject.tokenizer.label_tokens(prompts[0], tuple(loaded.spec["labels"]))
    firsts = [tokens[0] for tokens in label_ids]
    base = upstream(subject.folder)
    adapted = peft.PeftModel.from_pretrained(upstream(subject.folder), tmp_path / "a").eval()
    fitted.merge(tmp_path / "b")
    merged = upstream(tmp_path / "b")
    for icl, models in ((False, (adapted, merged)), (True, (base,))):
        found = loaded.predict_proba(asked, icl=icl)
        for row, tokens in zip(found, ids, strict=True):
            for model in models:
                with torch.no_grad():
                    logits = model(torch.tensor([tokens])).logits[0, -1]
                expected = logits[firsts].softmax(-1).tolist()
                assert row.tolist() == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(loaded.predict_proba(asked), loaded.predict_proba(asked, icl=True))
    assert "A query costs" in fitted.report["sentence"]
    text = card(fitted_with_versions(fitted), "a", "ia2mini fit")
    number = len(fitted.spec["demonstrations"])
    assert f"Before it stand {number} demonstrations" in text


def test_after_an_adapter_the_folder_holds_none(subject, tmp_path):
    with shipping("sft"):
        fit(rows(4, 12), subject, QUICK).save(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    with shipping("icl"):
        fit(rows(4, 12), subject, QUICK).save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    assert load_adapter(tmp_path / "a", subject).adapter is None
