"""bench rivals: `fit` beside SetFit and an embedding, on the same rows, and the page that tells of it."""

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import rivals_figure, rivals_page  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.report import RESULTS, Line, Result  # noqa: E402
from bench.studies import embedders, fit, measured, rivals  # noqa: E402
from ia2mini import UsageError, open_subject  # noqa: E402
from ia2mini.engine.options import FitOptions  # noqa: E402
from ia2mini.tasks import world  # noqa: E402

CELLS = rivals.Cells(tasks=("mood",), sizes=(4,), seeds=1, parts=("fit", "embedding"))
OPTIONS = FitOptions(epochs=1, rates=(1e-2,), folds=2, demonstrations=4)
TRAINED = ["SFT", "SFT, one temperature", "IA2→SFT", "hidden→SFT"]
OF_FIT = ["base", "ICL", "linear probe", *TRAINED, "what fit ships"]
WORDS = ("0", "1")


class BagOfWords:
    """Embeds a text by the words in it."""

    def encode(self, texts: list[str]) -> np.ndarray:
        found = np.zeros((len(texts), 32))
        for row, text in enumerate(texts):
            for word in text.split():
                found[row, hashlib.sha256(word.encode()).digest()[0] % 32] += 1
        return found


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder of generated rows in the layout of the real ones, and an embedder's; the work is done in another."""
    (tmp_path / "data/mood").mkdir(parents=True)
    for split, file in (("train", "train"), ("eval", "test")):
        lines = [json.dumps(row) + "\n" for row in world.rows("toy-mood", split)[:60]]
        (tmp_path / "data/mood" / f"{file}.jsonl").write_text("".join(lines))
    (tmp_path / "embedder").mkdir()
    (tmp_path / "embedder/modules.json").write_text("[]")
    monkeypatch.setitem(fit.REAL, "mood", ("text", "test", WORDS))
    monkeypatch.setitem(fit.CALLED, "mood", {"text": "text", "label": "label"})
    monkeypatch.setattr(fit, "SOME", 20)
    monkeypatch.setattr(measured, "ONE_BY_ONE", 2)
    monkeypatch.setattr(embedders, "open_embedder", lambda folder: BagOfWords())
    monkeypatch.setattr(rivals, "check_embedder", lambda parts, folder: {"bag-of-words": "1"})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def test_every_rival_answers_the_same_rows(data, tmp_path, monkeypatch):
    subject = open_subject("tiny", "cpu")
    found = rivals.rivals(subject, OPTIONS, data, tmp_path / "embedder", CELLS)
    assert [line.stack for line in found.lines] == [*OF_FIT, rivals.NAMES["embedding"]]
    assert {line.what for line in found.lines} == {"mood, 4 a class, draw 0"}
    from sklearn.linear_model import LogisticRegression

    rows, fresh = fit.real_rows(data, "mood", 4, 0)
    rates = {line.stack: line.rates for line in found.lines}
    # the other bench asks the same candidates in its own way
    trial = fit.trial(subject, rows, fresh, OPTIONS)
    for name in ("base", "icl", "sft", "ia2-sft", "hidden-sft"):
        said = rates[rivals.NAMES[name]]["% accuracy"]
        assert said == pytest.approx(trial.accuracy[name])
    assert rates["SFT, one temperature"]["NLL"] == pytest.approx(trial.nll["sft"], rel=1e-4)
    assert rates["SFT, one temperature"]["ECE"] == pytest.approx(trial.ece["sft"], abs=1e-6)
    assert rates["what fit ships"]["% accuracy"] == pytest.approx(trial.accuracy[trial.shipped])
    (shipped,) = (line.note for line in found.lines if line.stack == "what fit ships")
    assert shipped == f"ships {trial.shipped}"
    # scikit-learn by itself
    answers = [WORDS.index(row["label"]) for row in rows]
    bag = BagOfWords()
    head = LogisticRegression(max_iter=1000).fit(bag.encode(embedders.texts(rows)), answers)
    gold = [WORDS.index(row["label"]) for row in fresh]
    right = head.score(bag.encode(embedders.texts(fresh)), gold)
    assert rates[rivals.NAMES["embedding"]]["% accuracy"] == pytest.approx(100 * right)
    spent = {name: one["s training"] for name, one in rates.items()}
    assert spent["base"] == spent["ICL"] == 0 < spent["SFT"] < spent["what fit ships"]
    sizes = {name: one["MB shipped"] for name, one in rates.items()}
    assert sizes["base"] < sizes["SFT"] == pytest.approx(sizes["IA2→SFT"], rel=0.1)
    base_mb = measured.folder_mb(subject.folder)
    assert rates["SFT"]["MB with its base"] == pytest.approx(sizes["SFT"] + base_mb)
    assert not found.ratios, "SetFit was not asked"
    for part in ("fitted_rivals", "embedded"):
        monkeypatch.setattr(rivals, part, lambda *_: pytest.fail("what was kept is made again"))
    assert rivals.rivals(subject, OPTIONS, data, tmp_path / "embedder", CELLS).lines == found.lines


def test_a_fit_by_other_code_or_options_is_not_taken_up(data, tmp_path, monkeypatch):
    subject = open_subject("tiny", "cpu")

    def folders(options=OPTIONS) -> list[str]:
        kept = rivals.stores(subject, options, tmp_path / "embedder", rivals.Cells())
        return [store.path.name for store in kept.values()]

    before = folders()
    assert folders(replace(OPTIONS, epochs=3))[1:] == before[1:]
    assert folders(replace(OPTIONS, epochs=3))[0] != before[0]
    monkeypatch.setattr(rivals, "sources_digest", lambda: "other code")
    assert folders()[1:] == before[1:] and folders()[0] != before[0]


def test_other_sources_have_another_digest(tmp_path, monkeypatch):
    (tmp_path / "ia2mini/fitting").mkdir(parents=True)
    source = tmp_path / "ia2mini/fitting/fit.py"
    source.write_text("RATE = 1")
    monkeypatch.setattr(rivals, "SOURCES", tmp_path)
    before = rivals.sources_digest()
    assert rivals.sources_digest() == before
    source.write_text("RATE = 2")
    assert rivals.sources_digest() != before


def test_one_temperature_is_the_one_that_fit_found(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ia2mini.fitting.selection.Selection.fit_temperatures",
        lambda self, scores, within: (torch.full((len(scores),), 2.0), 2.0, (1.0, 0.9)),
    )
    subject = open_subject("tiny", "cpu")
    rows, fresh = fit.real_rows(data, "mood", 4, 0)
    gold = [WORDS.index(row["label"]) for row in fresh]
    found = rivals.fitted_rivals(subject, OPTIONS, rows, fresh)
    trial = fit.trial(subject, rows, fresh, OPTIONS)
    nll = {name: measured.judged(one.log_probabilities, gold)["NLL"] for name, one in found.items()}
    assert nll["sft-heated"] == pytest.approx(trial.nll["sft"], rel=1e-4)
    assert nll["shipped"] == pytest.approx(trial.nll[trial.shipped], rel=1e-4)
    assert found["sft-heated"].note == "temperature 2"
    for name in ("base", "icl", "sft", "ia2-sft", "hidden-sft"):
        assert nll[name] != pytest.approx(trial.nll[name], rel=1e-3), "shown at temperature 1"


def test_prompts_are_made_from_the_names_of_columns(data, monkeypatch):
    seen = []

    def asked(predictor, *about):
        seen.append((predictor.spec["template"], predictor.spec["labels"]))
        return measured.Measured([[-1.0, -1.0]] * 20, 0, 0, 0, 0, 0)

    monkeypatch.setattr(rivals, "asked", asked)
    monkeypatch.setitem(fit.CALLED, "mood", {"text": "story", "label": "mood"})
    cells = replace(CELLS, parts=("fit",))
    options = replace(OPTIONS, methods=("sft",))
    rivals.rivals(open_subject("tiny", "cpu"), options, data, None, cells)
    assert seen == [("Story: {story}\nMood: ", list(WORDS))] * 5


def test_what_was_promised_is_counted():
    def lines(what, right, low, high):
        names = {"base": 50.0, "icl": 60.0, "sft": 55.0}
        found = [Line(what, rivals.NAMES[n], rates={"% accuracy": v}) for n, v in names.items()]
        stated = dict(zip(rivals.STATED, (right, low, high)))
        rates = {"% accuracy": right, **stated}
        return [*found, Line(what, rivals.NAMES["shipped"], rates=rates)]

    result = Result("rivals", "", [*lines("a", 58.0, 40, 70), *lines("b", 57.9, 58, 70)])
    rivals.promises(result)
    near, held = result.remarks
    assert "in 1 of 2 cells" in near and "in 1 of 2 cells" in held


def test_what_diverges_is_left_out_and_the_rest_is_kept(data, tmp_path, monkeypatch, capsys):
    alone = rivals.alone

    def diverges(cv, fitted, candidate):
        if candidate.name == "ia2-sft":
            raise UsageError("ia2-sft at rate 1 diverged when trained on every row")
        return alone(cv, fitted, candidate)

    monkeypatch.setattr(rivals, "alone", diverges)
    options = replace(OPTIONS, methods=("sft", "ia2-sft"))
    found = rivals.rivals(open_subject("tiny", "cpu"), options, data, tmp_path / "embedder", CELLS)
    names = [line.stack for line in found.lines]
    assert "IA2→SFT" not in names and {"SFT", "what fit ships"} <= set(names)
    assert "ia2-sft is left out" in capsys.readouterr().err


def test_metrics_of_a_rival_are_scikit_learns():
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    drawn = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 3, generator=drawn, dtype=torch.float64).log_softmax(-1)
    gold = torch.randint(3, (50,), generator=drawn).tolist()
    found = measured.judged(scores.tolist(), gold)
    said = scores.argmax(-1).tolist()
    assert found["% accuracy"] == pytest.approx(100 * accuracy_score(gold, said))
    assert found["% macro-F1"] == pytest.approx(100 * f1_score(gold, said, average="macro"))
    assert found["NLL"] == pytest.approx(log_loss(gold, scores.exp().numpy()))
    assert 0 < found["ECE null"] < 1 and 0 < found["ECE"] < 1


def test_what_is_missing_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(embedders, "version", lambda package: "1")
    for folder, said in ((None, "not given"), (tmp_path / "empty", "modules.json")):
        with pytest.raises(UsageError, match=f"--embedder: .*{said}"):
            embedders.check_embedder(("fit", "embedding"), folder)
    assert embedders.check_embedder(("fit",), None) == {}

    def nothing(package):
        raise embedders.PackageNotFoundError(package)

    monkeypatch.setattr(embedders, "version", nothing)
    with pytest.raises(UsageError, match=r"setfit: the package setfit is missing; pip install"):
        embedders.check_embedder(("setfit",), tmp_path)
    monkeypatch.delenv("IA2MINI_DATA", raising=False)
    done = CliRunner().invoke(main, ["rivals", "--parts", "fit"])
    assert done.exit_code == 2 and "--data-dir" in done.stderr
    done = CliRunner().invoke(main, ["rivals", "--parts", "fasttext"])
    assert done.exit_code == 2 and "setfit" in done.stderr


def test_cells_that_cannot_be_filled_are_refused_at_once(data):
    few = sum(row["label"] == 0 for row in world.rows("toy-mood", "train")[:60])
    most = min(few, 60 - few)
    rivals.check_cells(replace(CELLS, sizes=(4, most)), data)
    with pytest.raises(UsageError, match=f"--sizes {most + 1}: a class of mood has fewer rows"):
        rivals.check_cells(replace(CELLS, sizes=(4, most + 1)), data)
    with pytest.raises(UsageError, match="--parts: give at least one"):
        rivals.check_cells(replace(CELLS, parts=()), data)
    with pytest.raises(UsageError, match="sst2/train.jsonl: no such file"):
        rivals.check_cells(replace(CELLS, tasks=("mood", "sst2")), data)


def small_embedder(folder: Path, words: list[str]) -> None:
    """A sentence-transformers model of random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(known))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(known), intermediate_size=32, **shape)
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"))
    pooling = Pooling(body.get_embedding_dimension())
    SentenceTransformer(modules=[body, pooling], device="cpu").save(str(folder))


def test_setfit_learns_rows_that_one_word_tells_apart(tmp_path):
    for package in ("setfit", "sentence_transformers", "datasets"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra rivals)")
    small_embedder(tmp_path / "embedder", ["grand", "dull", "tale", "film"])
    rows = []
    for i in range(8):
        word, label = (("grand", "good"), ("dull", "bad"))[i % 2]
        rows.append({"text": f"{word} {('tale', 'film')[i // 4]}", "label": label})
    fresh = [{"text": "grand grand", "label": "good"}, {"text": "dull", "label": "bad"}]
    for name, rival in embedders.EMBEDDED.items():
        found = rival(tmp_path / "embedder", rows, fresh, 0)
        shares = np.exp(found.log_probabilities)
        assert shares.sum(-1) == pytest.approx(1) and shares.argmax(-1).tolist() == [1, 0]
        assert min(found.train_seconds, found.ms_one, found.ms_batch, found.mb_shipped) > 0
        assert (found.mb_needed > found.mb_shipped) == (name == "embedding")
        assert "LogisticRegression" in found.note
    assert "epochs 1, batch 16, sampling oversampling" in (
        embedders.setfit(tmp_path / "embedder", rows, fresh, 0).note
    )


KEPT = RESULTS / "2026-12-01-rivals-smollm2-135m-instruct-cpu.json"


def made(seeds: int, gains: dict[str, float]) -> dict:
    """A kept document: SetFit's accuracies are drawn, ours are above them by about a data set's gain."""
    drawn = np.random.default_rng(0)
    lines = []
    for task, gain in gains.items():
        for draw in range(seeds):
            theirs = 60 + drawn.normal()
            both = {"SetFit": theirs, "what fit ships": theirs + gain + drawn.normal()}
            for name, accuracy in both.items():
                ours = name == "what fit ships"
                nll = (0.9 if ours else 0.6) + drawn.random() / 1000
                ece = (0.05 if ours else 0.1) + drawn.random() / 1000
                rates = {"% accuracy": accuracy, "% macro-F1": accuracy - 1, "NLL": nll}
                rates |= {"ECE": ece, "ECE null": 0.04, "s training": 180.0 if ours else 90.0}
                rates |= {name: 3.0 for name in rivals_page.COSTS}
                what = f"{task}, 4 a class, draw {draw}"
                lines.append(Line(what, name, rates=rates, note="ships sft"))
    result = Result("rivals", "some-model (float32): rows, draws", lines, remarks=["torch 2"])
    rivals.compare(result)
    hardware = {"cpu": "a CPU", "cores": 2, "threads": 2}
    about = {"date": "2026-01-01", "command": "python -m bench rivals", "hardware": hardware}
    return about | {"results": [asdict(result)]}


def test_the_page_says_what_the_numbers_say(tmp_path):
    from scipy.stats import ttest_rel

    gains = {"sst2": 12.0, "ag_news": -8.0, "financial_phrasebank": 0.0}
    document = made(6, gains)
    (tmp_path / "2026-01-01-rivals-some-model-cpu.json").write_text(json.dumps(document))
    old = f"before\n\n{rivals_page.BEGIN}\nold numbers\n{rivals_page.END}\n\nafter\n"
    text = rivals_page.page(old, tmp_path)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old numbers" not in text
    assert rivals_page.page(text, tmp_path) == text
    assert "significantly more accurate than SetFit (p < .05) on: SST2." in text
    assert "significantly less accurate on: AG News." in text
    assert "does not differ significantly on: Financial PhraseBank." in text
    assert "take `fit` for tasks like SST2; take SetFit for tasks like AG News; for" in text
    assert "Mean NLL: 0.90 for what `fit` ships, 0.60 for SetFit; significantly higher." in text
    assert (
        "Mean ECE: 0.05 for what `fit` ships, 0.10 for SetFit; significantly lower. A calibrated"
        in text
    )
    assert "of SetFit's time, `fit` needs: training 2 ×, one row alone 1 ×" in text
    assert "`fit` shipped in 18 cases: sft 18" in text
    rows = [line.split(" | ") for line in text.splitlines()]
    lines = document["results"][0]["lines"]

    def accuracies(name: str, task: str) -> list[float]:
        return [
            line["rates"]["% accuracy"]
            for line in lines
            if line["stack"] == name and line["what"].startswith(task)
        ]

    ours = accuracies("what fit ships", "sst2")
    theirs = accuracies("SetFit", "sst2")
    test = ttest_rel(ours, theirs)
    low, high = test.confidence_interval()
    said = f"{fmean(ours) - fmean(theirs):+.1f} ({low:+.1f} to {high:+.1f}, p = {test.pvalue:.2g})"
    (differences,) = (row for row in rows if row[0] == "| SST2")
    assert differences[1:3] == ["6", said]
    first = next(row for row in rows if row[0] == "| SetFit")
    assert first[1].startswith(f"{fmean(theirs):.1f} (")
    (remark, *_) = document["results"][0]["remarks"][1:]
    assert remark.startswith("what fit ships minus SetFit, % accuracy: ") and "18 pairs" in remark


def test_of_few_draws_the_page_claims_nothing(tmp_path):
    document = made(3, {"sst2": 12.0})
    (tmp_path / "2026-01-01-rivals-some-model-cpu.json").write_text(json.dumps(document))
    text = "\n".join(rivals_page.found(tmp_path))
    assert "significantly" not in text and " to +" not in text
    assert "Too few cases to tell whether `fit` or SetFit is better: 3." in text


def test_the_figure_shows_the_kept_numbers_with_exact_intervals(tmp_path):
    from scipy.stats import binomtest, ttest_1samp

    pytest.importorskip("matplotlib")
    lines = json.loads(KEPT.read_text())["results"][0]["lines"]
    of_four = [line for line in lines if line["what"].endswith("4 a class, draw 0")]
    of_eight = []
    for line in of_four:
        of_eight.append(line | {"what": line["what"].replace("4 a class", "8 a class")})
    table = rivals_page.Table(of_four + of_eight)
    for name, task, rows in (("setfit", "ag_news", 200), ("ia2-sft", "financial_phrasebank", 198)):
        row = rivals_figure.chart_row(table, name, task)
        right = round(row.mean / 100 * rows)
        exact = binomtest(right, rows).proportion_ci(method="exact")
        assert row.mean == pytest.approx(100 * right / rows)
        assert (row.low, row.high) == pytest.approx((100 * exact.low, 100 * exact.high))
    assert rivals_figure.chart_row(table, "setfit", "ag_news").mark == 69.5
    five_draws = rivals_page.Table(lines)
    row = rivals_figure.chart_row(five_draws, "setfit", "ag_news")
    values = [69.5, 78.5, 68.5, 71.0, 72.5]
    expected = ttest_1samp(values, 0).confidence_interval()
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high)) and row.mark is None
    assert not rivals_figure.draw(tmp_path, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    (tmp_path / "2026-01-01-rivals-some-model-cpu.json").write_text(
        json.dumps(made(6, {"sst2": 1.0}))
    )
    assert rivals_figure.draw(tmp_path, tmp_path / "draws.png")
    assert (tmp_path / "draws.png").stat().st_size > 10_000


def test_the_page_shows_the_kept_results():
    text = rivals_page.PAGE.read_text(encoding="utf-8")
    assert rivals_page.page(text, RESULTS) == text
    with pytest.raises(UsageError, match="lacks the line"):
        rivals_page.page(text.replace(rivals_page.END, ""), RESULTS)
