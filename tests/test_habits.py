"""scikit-learn's habits: predict, predict_proba, classes_ and score of a fitted adapter, on texts, dicts and frames."""

import numpy as np
import pandas
import pytest
from mistakes import refused
from shipping import shipping
from sklearn.metrics import accuracy_score, log_loss

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.tasks import world

QUICK = FitOptions(epochs=2, rates=(1e-2,), methods=("sft",), folds=2)
ROWS = world.rows("toy-mood", "train")[20:40]
TEXTS = [row["text"] for row in ROWS]
TRUE = [row["label"] for row in ROWS]


@pytest.fixture(scope="module")
def fitted():
    with shipping("sft"):
        return fit(world.rows("toy-mood", "train")[4:16], open_subject("tiny", "cpu"), QUICK)


def test_all_forms_of_rows_are_answered_alike(fitted, tmp_path):
    expected = [row["answer"] for row in fitted.answer_rows(ROWS)]
    assert set(expected) == {"0", "1"}
    path = tmp_path / "rows.csv"
    pandas.DataFrame(ROWS).to_csv(path, index=False)
    frame = pandas.DataFrame(ROWS)
    for rows in (
        ROWS,
        TEXTS,
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        frame,
        frame["text"],
        path,
    ):
        found = fitted.predict(rows)
        assert isinstance(found, np.ndarray) and found.tolist() == expected
    some = frame[frame["label"] == 1]
    assert fitted.predict(some).tolist() == [a for a, t in zip(expected, TRUE) if t == 1]


def test_predict_proba_and_score_fit_scikit_learns_own_measures(fitted, tmp_path):
    shares = fitted.predict_proba(TEXTS)
    rows = list(fitted.answer_rows(TEXTS))
    assert shares.shape == (20, 2) and shares.dtype == np.float64
    assert fitted.classes_.tolist() == ["0", "1"]
    for share, row in zip(shares, rows, strict=True):
        assert dict(zip(fitted.classes_, share)) == row["probabilities"]
    assert (fitted.classes_[shares.argmax(1)] == fitted.predict(TEXTS)).all()
    true = [str(label) for label in TRUE]
    right = accuracy_score(true, fitted.predict(TEXTS))
    assert 0 < right < 1, "a score that could be told from others"
    forms = (true, TRUE, np.array(TRUE), pandas.Series(TRUE, dtype=float), np.array(true))
    for labels in forms:
        assert fitted.score(TEXTS, labels) == pytest.approx(right)
    losses = [-np.log(row["probabilities"][label]) for row, label in zip(rows, true)]
    assert log_loss(true, shares, labels=fitted.classes_) == pytest.approx(np.mean(losses))
    fitted.save(tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")
    assert loaded.predict_proba(TEXTS) == pytest.approx(shares, abs=1e-6)
    assert loaded.score(TEXTS, true) == fitted.score(TEXTS, true)


def test_demonstrations_and_coverage(fitted):
    icl = [row["answer"] for row in fitted.answer_rows(ROWS, icl=True)]
    assert fitted.predict(TEXTS, icl=True).tolist() == icl
    assert fitted.score(TEXTS, TRUE, icl=True) == accuracy_score(list(map(str, TRUE)), icl)
    some = fitted.predict(TEXTS, coverage=0.5)
    assert None in some and [a for a in some if a] == [
        a for a, b in zip(fitted.predict(TEXTS), some) if b
    ]


def test_nothing_is_an_empty_array(fitted):
    assert fitted.predict([]).shape == (0,) and fitted.predict_proba([]).shape == (0, 2)
    refused(lambda: fitted.score([], []), "0 rows and 0 labels")


def test_wrong_rows_and_labels_are_one_line(fitted):
    refused(lambda: fitted.predict("a good film"), "one str", "a list")
    refused(lambda: fitted.predict({"text": "a"}), "one dict", "a list")
    refused(lambda: fitted.predict([["a"]]), "row 1", "not an object")
    refused(lambda: fitted.predict([{"words": "a"}]), "row 1: no column 'text'")
    refused(lambda: fitted.predict(["good", {"text": None}]), "row 2", "'text'")
    refused(lambda: fitted.predict(["good", ""]), "row 2", "empty")
    refused(lambda: fitted.predict(TEXTS, coverage=2), "--coverage 2")
    refused(lambda: fitted.score(TEXTS, TRUE[:-1]), "20 rows and 19 labels")
    refused(
        lambda: fitted.score(TEXTS[:2], ["0", "good"]), "label 2", "'good' is none of the labels"
    )
    refused(lambda: fitted.score(TEXTS[:2], ["0", None]), "label 2", "holds nothing")


def test_an_adapter_of_texts_has_no_classes(fitted):
    rows = [{"text": text, "label": ("apple", "banana")[i % 2]} for i, text in enumerate(TEXTS[:8])]
    found = fit(rows, open_subject("tiny", "cpu"), QUICK, (None, None, None, "text"))
    assert not hasattr(found, "classes_") and hasattr(fitted, "classes_")
    refused(lambda: found.predict_proba(TEXTS), "answers with text")
    said = found.predict(TEXTS[:8])
    assert all(isinstance(text, str) for text in said)
    assert found.score(TEXTS[:8], said) == np.mean([bool(text.strip()) for text in said])


def test_a_template_of_several_columns_takes_no_texts():
    rows = [{"a": f"good {i}", "b": "film", "label": i % 2} for i in range(8)]
    subject = open_subject("tiny", "cpu")
    two = fit(rows, subject, QUICK, (None, "label", "Text:{a} {b}\nLabel:"))
    refused(lambda: two.predict(["good film"]), "row 1: no column", "'text'")
    one = fit(rows, subject, QUICK, (None, "label", "Text:{a}{?b}\nLabel:"))
    assert len(one.predict(["good film"])) == 1
