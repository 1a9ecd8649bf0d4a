"""The linear probe: scikit-learn's logistic regression, shipped as a small file, refused where it is damaged."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mistakes import refused
from safetensors.torch import load_file, save_file
from shipping import shipping
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.episode import with_demonstrations
from ia2mini.fitting import held_out
from ia2mini.fitting.probe import PENALTIES, PROBE, UNSEEN, fit_probe, held_out_scores, last_states
from ia2mini.report.card import card
from ia2mini.tasks import world

QUICK = FitOptions(epochs=1, rates=(1e-4,), methods=("sft",), folds=3, temperature=False)


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


@pytest.fixture(scope="module")
def fitted(subject):
    with shipping("probe"):
        return fit(world.rows("toy-topic", "train")[:24], subject, QUICK)


def some_states(n: int, labels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    gold = torch.arange(n) % labels
    centres = torch.randn(labels, size, generator=generator)
    return 5 * torch.randn(n, size, generator=generator) + centres[gold] + 3, gold


@pytest.mark.parametrize("n, labels, size", [(12, 3, 40), (60, 4, 20), (50, 2, 8)])
@pytest.mark.parametrize("penalty", [1.0, 30.0])
def test_it_is_scikit_learns_logistic_regression(n, labels, size, penalty):
    states, gold = some_states(n, labels, size)
    others, _ = some_states(33, labels, size)
    found = fit_probe(states, gold, labels, penalty).log_probabilities(others)
    scaler = StandardScaler().fit(states.double().numpy())
    # of two labels it has one vector of weights where the softmax has two that are opposite
    C = (2 if labels == 2 else 1) / penalty
    theirs = LogisticRegression(C=C, solver="newton-cg", tol=1e-10, max_iter=10_000)
    theirs.fit(scaler.transform(states.double().numpy()), gold.numpy())
    wanted = theirs.predict_log_proba(scaler.transform(others.double().numpy()))
    assert np.abs(found.numpy() - wanted).max() < 1e-3


def test_a_label_without_a_row_is_never_said():
    states, gold = some_states(20, 2, 10)
    scores = fit_probe(states, 2 * gold, 3, 1.0).log_probabilities(states)
    assert (scores[:, 1] < UNSEEN / 2).all() and scores.exp().sum(1).allclose(torch.ones(20))


def test_held_out_a_label_without_another_row_costs_little():
    states, gold = some_states(20, 2, 10)
    gold[7] = 2
    folds = [list(range(start, 20, 4)) for start in range(4)]
    scores = held_out_scores(states, gold, folds, 3)
    assert scores.exp().sum(-1).allclose(torch.ones(len(PENALTIES), 20), atol=1e-5)
    # fifteen other rows, none of which has it
    assert scores[:, 7, 2].allclose(torch.tensor(1 / 16).log())
    others = [i for i in range(20) if i % 4 != 3]
    probe = fit_probe(states[others], gold[others], 3, PENALTIES[1])
    wanted = probe.log_probabilities(states[folds[3]])[:, :2] + np.log(15 / 16)
    assert scores[1, folds[3], :2].allclose(wanted, atol=1e-6)


def test_a_constant_coordinate_does_no_harm():
    states, gold = some_states(20, 2, 10)
    states[:, 3] = 7.0
    assert fit_probe(states, gold, 2, 1.0).log_probabilities(states).isfinite().all()


def test_it_is_saved_loaded_and_answers_as_a_product_of_its_file(fitted, tmp_path, subject):
    fitted.save(tmp_path / "probe")
    assert {path.name for path in (tmp_path / "probe").iterdir()} >= {PROBE, "ia2mini.json"}
    assert not (tmp_path / "probe" / "adapter_model.safetensors").exists()
    again = load_adapter(tmp_path / "probe", subject)
    rows = world.rows("toy-topic", "eval")[:9]
    said = list(again.answer_rows(rows))
    file = load_file(tmp_path / "probe" / PROBE)
    prompts = [subject.tokenizer.encode(f"Text:{row['text']}\nLabel:") for row in rows]
    states = last_states(subject.model, prompts)
    shares = (states @ file["weight"].T + file["bias"]).softmax(-1)
    for row, expected in zip(said, shares):
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["answer"] == again.spec["labels"][expected.argmax()]
    shown = list(again.answer_rows(rows, icl=True))
    assert shown[0]["probabilities"] != said[0]["probabilities"], "demonstrations: the model's head"
    text = with_demonstrations(again.demonstrations(icl=True), f"Text: {rows[0]['text']}\nLabel:")
    logits = subject.model(torch.tensor([subject.tokenizer.encode(text)]))[0, -1]
    labels = [token for (token,) in again.fitted_label_tokens]
    expected = logits[labels].softmax(-1).tolist()
    assert list(shown[0]["probabilities"].values()) == pytest.approx(expected, abs=1e-4)


def test_the_rows_states_are_read_once(subject, monkeypatch):
    read = []

    def counted(model, prompts):
        read.append(len(prompts))
        return last_states(model, prompts)

    monkeypatch.setattr(held_out, "last_states", counted)
    rows = world.rows("toy-mood", "train")[:12]
    rows = [{**row, "label": str(row["label"])} for row in rows]
    found = fit(rows, subject, FitOptions(methods=("sft",), ship="probe", epochs=1, folds=2))
    assert found.probe is not None and read == [12]


@pytest.mark.parametrize("damage", ["gone", "cut", "other bytes", "shape", "names"])
def test_a_damaged_one_is_refused(fitted, tmp_path, subject, damage):
    folder = tmp_path / "probe"
    fitted.save(folder)
    path = folder / PROBE
    tensors = load_file(path)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "other bytes":
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    elif damage == "shape":
        save_file({"weight": tensors["weight"][:, 1:].clone(), "bias": tensors["bias"]}, path)
    else:
        save_file({"weight": tensors["weight"]}, path)
    refused(
        lambda: load_adapter(folder, subject),
        "the probe" if damage in ("gone", "cut", "other bytes") else "fit it again",
        PROBE,
    )


def test_fit_and_predict_by_command(tmp_path, monkeypatch):
    monkeypatch.setattr("ia2mini.fitting.fit.choose", lambda found: "probe")
    rows = "".join(json.dumps(row) + "\n" for row in world.rows("toy-topic", "train")[:16])
    (tmp_path / "rows.jsonl").write_text(rows)
    how = ["--model", "tiny", "--methods", "sft", "--epochs", "1", "--folds", "3"]
    out = str(tmp_path / "out")
    result = CliRunner().invoke(main, ["fit", str(tmp_path / "rows.jsonl"), *how, "--out", out])
    assert result.exit_code == 0, result.output
    assert "A linear probe on the base's last hidden state is shipped" in result.output
    assert PROBE in result.output
    result = CliRunner().invoke(main, ["predict", out, str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 16
    result = CliRunner().invoke(main, ["merge", out, "--out", str(tmp_path / "merged")])
    assert result.exit_code == 2 and "no adapter to merge" in result.output
    assert "a linear probe on tiny" in result.output
    # generate would answer as the base, as if there were no probe
    result = CliRunner().invoke(main, ["generate", "--adapter", out, "--prompt", "Text: a film"])
    assert result.exit_code == 2 and not result.stdout
    assert "holds no adapter; what answers is a linear probe on tiny" in result.output


def test_the_cards_lines_give_its_probabilities(fitted, tmp_path, subject):
    """Those of the model card, run as they are written, on transformers' model."""
    fitted.save(tmp_path / "probe")
    text = card(fitted, tmp_path / "probe", "ia2mini fit")
    (code,) = re.findall("```python\n(.*?)\n```", text, re.S)
    *lines, last = code.splitlines()
    names: dict = {}
    exec("\n".join(lines), names)
    shares = eval(last, names)
    row = fitted.report["held_out"][0]
    wanted = next(fitted.answer_rows([{"text": row["prompt"][6:].rpartition("\nLabel:")[0]}]))
    for label, share in wanted["probabilities"].items():
        assert shares[label] == pytest.approx(share, abs=1e-4)
