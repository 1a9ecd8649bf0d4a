"""From one's own rows to an adapter: nothing leaks, the numbers are right, the odd is said, a killed fit goes on."""

import json
import re
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mistakes import refused
from reference import relative
from scipy import stats
from scipy.optimize import minimize_scalar
from shipping import shipping
from sklearn import metrics as theirs

from ia2mini import FitOptions, UsageError, fit, load_adapter, open_subject
from ia2mini.adapters import adapted
from ia2mini.cli.main import main
from ia2mini.engine import experiment as engine
from ia2mini.engine.experiment import count_steps, in_order, make_grid, teach_all
from ia2mini.engine.options import Options
from ia2mini.episode import with_demonstrations
from ia2mini.fitting import held_out
from ia2mini.fitting.crossval import CrossValidation, those_that_fit
from ia2mini.fitting.fit import make_choice, ship
from ia2mini.fitting.report import make_report
from ia2mini.fitting.rows import read_own, remarks
from ia2mini.fitting.training import experiment_of_folds, train_folds
from ia2mini.methods import METHODS, Grid
from ia2mini.metrics import ece, fit_temperature
from ia2mini.tasks import Example, world
from ia2mini.train import Hooks, Trained, train

QUICK = FitOptions(epochs=4, rates=(1e-2,), methods=("sft",), folds=3)


def toy_rows(count: int, name: str = "toy-mood-remap", start: int = 4) -> list[dict]:
    return world.rows(name, "train")[start : start + count]


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


@pytest.fixture(scope="module")
def fitted(subject):
    with shipping("sft"):
        return fit(
            toy_rows(24, "toy-topic"),
            subject,
            replace(QUICK, methods=("sft", "ia2"), temperature=False),
        )


def cross_validation(subject, rows, options=QUICK, **more) -> CrossValidation:
    rows, task = read_own(rows)
    return CrossValidation(subject, task, list(map(task.example, rows)), options, **more)


def run(*arguments, code=0, input=None):
    result = CliRunner().invoke(main, list(map(str, arguments)), input=input)
    assert result.exit_code == code, result.output
    return result


def test_labels_that_cannot_be_known_are_guessed_at_chance(subject):
    """Labels by the row's number: whatever saw a held-out row's answer would be right far more often than half."""
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1], 20))
    rows = [{"text": row["text"], "label": str(y)} for row, y in zip(toy_rows(40), labels)]
    found = fit(rows, subject, replace(QUICK, epochs=8, methods=("sft", "ia2", "ia2-sft"))).report[
        "candidates"
    ]
    assert set(found) == {"base", "commonest", "icl", "sft", "ia2", "ia2-sft", "probe"}
    for name, one in found.items():
        assert abs(one["acc"][0] - 0.5) <= 3 * 0.5 / 40**0.5, f"{name}: {one['acc'][0]:.2f} right"
        assert one["nll"][0] > np.log(2) - 0.1 or name == "probe", (
            f"{name}: loss {one['nll'][0]:.2f} is below chance's"
        )


@dataclass
class Alone(Grid):
    """A grid of one fold that draws as fold `number` of many does."""

    number: int = 0

    def first_weights(self, number):
        return super().first_weights(self.number)

    def order(self, number, rows, epoch):
        return super().order(self.number, rows, epoch)


@pytest.mark.parametrize("method", ["sft", "ia2-sft"])
def test_a_fold_among_others_equals_it_alone(subject, method):
    """In the plain loop, without what scale/ wraps around it."""
    options = replace(QUICK, rates=(3e-3, 1e-2), methods=(method,))
    cv = cross_validation(subject, toy_rows(15), options)
    trained = train_folds(cv)
    together = trained[method]
    experiment = experiment_of_folds(cv)
    taught = make_grid(experiment, teach_all(experiment), Hooks())
    for number in range(3):
        mine = slice(2 * number, 2 * number + 2)
        first = []
        if method == "ia2-sft":
            first = [Trained(*(value[mine] for value in vars(trained["ia2"]).values()))]
        grid = replace(taught, sets=[taught.sets[number]], trainer=train)
        alone = METHODS[method](Alone(**vars(grid), number=number), *first)
        steps = sum(
            count_steps(cv.settings, cv.folds[number], phase) for phase in in_order((method,))
        )
        assert (alone.steps == steps).all()
        assert relative(together.theta[mine], alone.theta) <= 1e-4


def test_the_reports_numbers_are_those_of_scikit_learn(fitted):
    report, labels = fitted.report, fitted.spec["labels"]
    found = report["candidates"][report["chosen"]]
    true, said = ([row[key] for row in report["held_out"]] for key in ("true", "said"))
    p = np.array([[row["probabilities"][label] for label in labels] for row in report["held_out"]])
    gold = np.array([labels.index(t) for t in true])
    assert p.sum(1) == pytest.approx(1) and [labels[i] for i in p.argmax(1)] == said
    assert [row["confidence"] for row in report["held_out"]] == pytest.approx(p.max(1).tolist())
    assert [row["right"] for row in report["held_out"]] == [t == s for t, s in zip(true, said)]
    assert found["acc"][0] == pytest.approx(theirs.accuracy_score(true, said))
    assert found["nll"][0] == pytest.approx(
        theirs.log_loss(gold, p / p.sum(1, keepdims=True)), abs=1e-5
    )
    brier = theirs.brier_score_loss(gold, p / p.sum(1, keepdims=True), scale_by_half=False)
    assert found["brier"][0] == pytest.approx(brier, abs=1e-5)
    assert report["confusion"] == theirs.confusion_matrix(true, said, labels=labels).tolist()
    by_class = theirs.precision_recall_fscore_support(
        true, said, labels=labels, zero_division=np.nan
    )
    for row, precision, recall, _, rows in zip(report["classes"], *by_class):
        assert row["rows"] == rows and row["recall"] == pytest.approx(recall)
        assert (
            row["precision"] is None
            if np.isnan(precision)
            else row["precision"] == pytest.approx(precision)
        )
    low, high = stats.binomtest(sum(map(str.__eq__, true, said)), 24).proportion_ci(0.95, "exact")
    assert found["acc"][1:] == pytest.approx([low, high])
    losses = -np.log(p / p.sum(1, keepdims=True))[np.arange(24), gold]
    theirs_low, theirs_high = stats.t.interval(0.95, 23, losses.mean(), stats.sem(losses))
    assert found["nll"][1:] == pytest.approx([max(0, theirs_low), theirs_high], abs=1e-5)
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(true, said, average="macro"))
    assert found["ece"] == pytest.approx(ece(p.max(1), gold == p.argmax(1)))


@pytest.mark.parametrize("scale, n", [(0.3, 40), (1.0, 40), (4.0, 40), (6.0, 5)])
def test_the_temperature_is_the_one_an_optimiser_finds(scale, n):
    g = torch.Generator().manual_seed(3)
    gold = torch.randint(0, 3, (n,), generator=g)
    scores = scale * (
        torch.randn(n, 3, generator=g) + 1.5 * torch.nn.functional.one_hot(gold, 3)
    ).log_softmax(-1)
    target = np.full((n, 3), 1 / (n + 2) / 2)
    target[np.arange(n), gold] = (n + 1) / (n + 2)

    def loss(log_t: float) -> float:
        return -(target * (scores.double() / np.exp(log_t)).log_softmax(-1).numpy()).sum(1).mean()

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    found = fit_temperature(scores, gold)
    assert np.log(found) == pytest.approx(best.x, abs=0.026) and loss(
        np.log(found)
    ) == pytest.approx(best.fun, abs=1e-3)


def test_without_temperature_probabilities_stay_the_models(subject):
    found = fit(toy_rows(12), subject, replace(QUICK, temperature=False))
    assert found.spec["temperature"] == 1.0
    one = found.report["candidates"]["base"]
    assert one["ece"] == pytest.approx(one["ece_without_temperature"], abs=1e-6)


def test_what_is_odd_is_said(subject):
    rows = [{"text": row["text"], "label": str(row["label"])} for row in toy_rows(12)]
    rows += [
        rows[0],
        rows[0],
        rows[1] | {"label": "3"},
        rows[2] | {"label": "apple"},
        rows[3] | {"label": "Apple"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Apple" is no word of the embedded model
        report = fit(rows, subject, QUICK).report
    said = " ".join(report["remarks"])
    assert "2 rows repeated another" in said and "3 rows had the prompt of another row" in said
    assert "'Apple' and 'apple' differ only in blanks or case" in said
    assert "only one row has the answer '3', 'Apple', 'apple'" in said
    assert report["rows"] == 15 and len(report["held_out"]) == 15


def test_few_rows_and_unknown_names_are_one_line(subject, tmp_path):
    rows = toy_rows(12)
    assert fit(toy_rows(5), subject, replace(QUICK, epochs=1)).report["folds"] == 5
    refused(lambda: fit([rows[0], rows[1] | {"label": 5}], subject), "at least 4")
    refused(lambda: fit([], subject), "no rows")
    refused(
        lambda: fit([row | {"label": 1} for row in rows], subject), "every row has the answer '1'"
    )
    refused(lambda: fit(rows, subject, replace(QUICK, methods=("sfd",))), "--methods sfd")
    refused(lambda: fit(rows, subject, replace(QUICK, methods=())), "--methods: give at least one")
    refused(lambda: fit(rows, subject, replace(QUICK, rates=(0.0,))), "--rates 0")
    refused(lambda: fit(rows, subject, columns=("texts", None, None)), "texts", "'text', 'label'")
    refused(lambda: fit(rows, subject, columns=(None, None, "{text} {other}:")), "other")
    refused(lambda: fit([row | {"label": ""} for row in rows], subject), "'label' is empty")
    refused(lambda: fit([{"a": "1", "b": "2"}] * 5, subject), "--prompt-column")
    long = {"text": " ".join(["good"] * 3000), "label": 0}
    refused(lambda: fit([*rows, long], subject), "tokens the model reads")
    refused(
        lambda: fit(
            [{"q": r["text"], "answer": "good " * 900 + str(i)} for i, r in enumerate(rows)],
            subject,
        ),
        "read",
    )
    run("fit", code=2)
    run("fit", tmp_path / "none.csv", "--model", "tiny", "--out", tmp_path / "o", code=2)
    assert not (tmp_path / "o").exists()


def test_wrong_options_show_before_the_model_is_loaded_or_answers(subject, tmp_path, monkeypatch):
    def too_late(*_, **__):
        raise AssertionError("the model was needed")

    monkeypatch.setattr("ia2mini.fitting.fit.answer_with_context", too_late)
    rows = [{"text": row["text"]} for row in toy_rows(12)]
    context = replace(QUICK, context="Task:mood")
    for wrong, told in (
        (replace(context, methods=("sfd",)), "--methods sfd"),
        (replace(context, methods=("icl-sft",)), "--methods icl-sft"),
        (replace(context, ship="ia2"), "--ship ia2"),
        (replace(context, ship="probe"), "--ship probe"),
    ):
        refused(lambda wrong=wrong: fit(rows, subject, wrong), told)
    refused(lambda: fit([*rows[:3], *rows[:3]], subject, context), "3 rows with different prompts")

    monkeypatch.setattr("ia2mini.engine.subject.open_subject", too_late)
    lines = [json.dumps(row) + "\n" for row in toy_rows(12)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    (tmp_path / "few.jsonl").write_text("".join(lines[:3]))
    for file, wrong, told in (
        ("rows", ("--methods", "sfd"), "--methods sfd"),
        ("rows", ("--ship", "sfd"), "--ship sfd"),
        ("few", (), "3 rows with different prompts"),
    ):
        command = ("fit", tmp_path / f"{file}.jsonl", "--model", "tiny", *wrong)
        assert told in run(*command, "--out", tmp_path / "o", code=2).stderr


def test_demonstrations_fill_what_the_model_reads_and_no_more(subject, monkeypatch):
    cv = cross_validation(subject, toy_rows(12))
    longest = cv.longest_prompt
    shown = [example for example in cv.rows if example.prompt != longest]
    for count in (1, 3, len(shown)):
        full = cv.count_tokens(with_demonstrations(shown[:count], longest)) + cv.max_tokens - 1
        for reads, fit_in in ((full, count), (full - 1, count - 1)):
            monkeypatch.setattr(type(subject), "context_length", reads)
            assert those_that_fit(cv, shown) == shown[:fit_in]


def test_text_numbers_and_emoji(subject):
    rows = [{"question": r["question"], "answer": r["answer"]} for r in toy_rows(8, "toy-sums")]
    found = fit(rows, subject, replace(QUICK, epochs=2, methods=("sft", "ia2")))
    assert (
        not found.spec["labels"] and found.spec["max_tokens"] < 20 and "classes" not in found.report
    )
    assert {"prompt", "true", "said", "confidence", "right"} <= set(found.report["held_out"][0])
    (answer,) = found.answer_rows([rows[0]])
    assert isinstance(answer["answer"], str) and 0 < answer["confidence"] <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown words
        numbers = [{"text": f"good 🙂 {i}", "n": i, "label": i % 2} for i in range(8)]
        columns = (None, None, "{text} {n}\nLabel:")
        assert fit(numbers, subject, replace(QUICK, epochs=1), columns).spec["labels"] == ["0", "1"]


def test_rows_without_answers_join_the_queries_of_ia2(subject):
    more = [{"text": row["text"]} for row in toy_rows(10, start=100)]
    options = replace(QUICK, methods=("sft", "ia2"), epochs=2)
    cv = cross_validation(subject, toy_rows(12), options)
    from ia2mini.tasks import Example

    wide = cross_validation(
        subject,
        toy_rows(12),
        options,
        unlabelled=[Example(f"Text:{m['text']}\nLabel:", "") for m in more],
    )
    both = [teach_all(experiment_of_folds(one)) for one in (cv, wide)]
    for narrow, taught in zip(*both):
        assert len(taught.icl_train) == len(narrow.icl_train) + 10 and len(taught.train) == len(
            narrow.train
        )
        assert [row.prompt for row in taught.train] == [row.prompt for row in narrow.train]
    assert fit(toy_rows(12), subject, options, unlabelled=more).report["rows"] == 12


def test_a_context_goes_into_the_weights(subject, tmp_path):
    """The context alone names what is asked for; the adapter answers as the teacher does that sees it."""
    (tmp_path / "context.txt").write_text("Task:mood\n")
    rows = "".join(json.dumps({"text": row["text"]}) + "\n" for row in toy_rows(16))
    (tmp_path / "queries.jsonl").write_text(rows)
    how = (
        "--context",
        tmp_path / "context.txt",
        "--prompts",
        tmp_path / "queries.jsonl",
        "--max-tokens",
        1,
    )
    how += (
        "--model",
        "tiny",
        "--template",
        "Text:{text}\\nLabel:",
        *"--methods ia2,sft --rates 1e-2 --epochs 8 --folds 3".split(),
    )
    result = run("fit", *how, "--out", tmp_path / "o")
    report = json.loads((tmp_path / "o" / "ia2mini.json").read_text())["report"]
    kl = {name: one["nll"][0] for name, one in report["candidates"].items()}
    assert kl["icl"] == pytest.approx(0, abs=1e-4) and report["candidates"]["icl"]["acc"][0] == 1
    assert (
        kl[report["chosen"]] < 0.5 * kl["base"]
        and "from the model that sees the context, word for word" in " ".join(result.stdout.split())
        and "instead of" in " ".join(result.stdout.split())
    )
    assert report["tokens"]["icl"] > report["tokens"]["query"]
    said = run("predict", tmp_path / "o", tmp_path / "queries.jsonl", "--icl").stdout
    assert len(said.splitlines()) == 16
    (tmp_path / "long.txt").write_text("good " * 5000)
    run("fit", "--context", tmp_path / "long.txt", *how[2:], "--out", tmp_path / "p", code=2)


def test_answers_that_a_context_gives_are_not_remarked_as_read(subject):
    rows, task = read_own([{"text": row["text"]} for row in toy_rows(4)], queries=True)
    examples = [Example(task.prompt_of(row), f"answer {i}") for i, row in enumerate(rows)]
    assert not any(
        "read as text" in said for said in remarks(rows, task, examples, subject.tokenizer)
    )
    given = replace(task, answer="{text}")
    assert any("read as text" in said for said in remarks(rows, given, examples, subject.tokenizer))


def test_of_a_context_ia2_alone_is_tried_and_trained_longer():
    rows = FitOptions()
    assert (rows.methods, rows.epochs) == (("sft", "ia2-sft", "hidden-sft"), 5)
    context = FitOptions(context="Be brief.")
    assert (context.methods, context.epochs) == (("ia2",), 15)
    given = FitOptions(context="Be brief.", methods=("sft",), epochs=2)
    assert (given.methods, given.epochs) == (("sft",), 2)


@pytest.mark.parametrize("kind", [FitOptions, Options])
def test_options_in_python_are_those_of_the_command_line(kind):
    """A negative seed and no fold at all ended in an error of numpy or of Python."""
    for name, wrong, told in (
        ("seed", -1, "seed = -1: at least 0"),
        ("epochs", 0, "epochs = 0: at least 1"),
        ("batch_size", 0, "batch_size = 0: at least 1"),
        ("adapter", "dora", "adapter = 'dora': give one of lora, ia3"),
        ("rates", 1e-2, "rates = 0.01: give a tuple, as (0.01,)"),
        ("methods", "sft", "methods = 'sft': give a tuple, as ('sft',)"),
    ):
        with pytest.raises(UsageError, match=re.escape(told)):
            kind(**{name: wrong})
    with pytest.raises(UsageError, match="folds = 0: at least 2"):
        FitOptions(folds=0)


def test_a_killed_fit_goes_on_and_nothing_half_written_stays(subject, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{r['text']!r},{r['label']}\n" for r in toy_rows(12))
    )
    text = (tmp_path / "rows.csv").read_text().replace("'", '"')
    (tmp_path / "rows.csv").write_text(text)
    how = (
        "fit",
        tmp_path / "rows.csv",
        "--model",
        "tiny",
        "--methods",
        "sft,ia2",
        "--rates",
        "1e-2",
        "--epochs",
        3,
        "--folds",
        3,
    )
    whole = run(*how, "--out", tmp_path / "whole")
    out, score, calls = tmp_path / "killed", held_out.score_by_model, []

    def killed(cv, name, *more):
        scores = score(cv, name, *more)
        if name == "ia2" and not calls.append(name) and len(calls) == 1:
            raise KeyboardInterrupt
        return scores

    monkeypatch.setattr(held_out, "score_by_model", killed)
    run(*how, "--out", out, code=130)
    assert [path.name.partition("-")[0] for path in out.iterdir()] == ["unfinished"]
    assert not list(out.rglob(".*")) and list(out.rglob("fit-ia2.safetensors"))
    trained = {
        name: lambda grid, *first, m=m: calls.append(len(grid.sets)) or m(grid, *first)
        for name, m in METHODS.items()
    }
    monkeypatch.setattr(engine, "METHODS", trained)
    again = run(*how, "--out", out)
    assert 3 not in calls, "folds that had been trained were trained again"
    assert (out / "held_out.jsonl").read_text() == (
        tmp_path / "whole" / "held_out.jsonl"
    ).read_text()
    assert again.stdout.replace(str(out), str(tmp_path / "whole")) == whole.stdout
    names = {"ia2mini.json", "README.md", "report.html", "held_out.jsonl"}
    assert {path.name for path in out.iterdir()} - {
        "adapter_config.json",
        "adapter_model.safetensors",
        "probe.safetensors",
        "suspects.jsonl",
        "decision.json",
        "decision_template.jinja",
    } == names
    text = run("score", out, tmp_path / "rows.csv").stdout
    assert "accuracy (%)" in text and "12 rows" in text


def test_a_folder_keeps_no_adapter_of_an_earlier_fit(fitted, subject, tmp_path):
    fitted.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    base = replace(fitted, adapter=None, theta=None, spec=fitted.spec | {"method": "base"})
    base.save(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert load_adapter(tmp_path, subject).adapter is None


def test_sentencepiece(shared_data, tmp_path):
    model = shared_data / "checkpoints" / "stories260k"
    rows = [{"text": f"One day a {w} went to the park", "label": ("happy", "very sad")[i % 2]} for i, w in
            enumerate("dog cat bird girl boy mom frog cow duck fish bug kid".split())]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = ("--rates", "1e-3", "--epochs", 2)
    run(
        "fit",
        tmp_path / "rows.jsonl",
        "--model",
        model,
        "--methods",
        "sft",
        *quick,
        "--out",
        tmp_path / "o",
    )
    found = [
        json.loads(line)
        for line in run("predict", tmp_path / "o", tmp_path / "rows.jsonl").stdout.splitlines()
    ]
    assert len(found) == 12 and {row["answer"] for row in found} <= {"happy", "very sad"}
    given = (
        "--model",
        model,
        "--n",
        2,
        "--sets",
        1,
        "--methods",
        "base,icl,sft",
        "--figures=",
        *quick,
        "--out",
        tmp_path / "runs",
    )
    assert "rows" in run("run", "--data", tmp_path / "rows.jsonl", *given).stdout


def test_the_kept_confidences_of_text_are_those_of_what_was_said(subject):
    """By a plain loop, a pass a token; a share of rows that a fold never saw then reaches the threshold."""
    cv = cross_validation(subject, toy_rows(40, "toy-sums"), replace(QUICK, epochs=8, folds=4))
    trained = train_folds(cv)
    answers = held_out.answer_held_out(cv, trained)
    with shipping("sft"):
        choice = make_choice(cv, answers)
    fitted, tokenizer = ship(cv, choice, make_report(cv, answers, choice)), subject.tokenizer
    kept, fresh, sure = fitted.spec["confidences"], toy_rows(60, "toy-sums", start=100), []
    weights = trained["sft"].theta  # of a fold each: there is one rate
    for number, fold in enumerate(cv.folds):
        theta = weights[number][None]
        with torch.no_grad(), adapted(subject.model, cv.adapter, theta) as student:
            for i in fold.test[:2]:
                said, logs = plain_answer(student, tokenizer, cv.rows[i].prompt, cv.max_tokens)
                assert fitted.report["held_out"][i]["said"] == tokenizer.decode(said)
                assert kept[i] == fitted.report["held_out"][i]["confidence"]
                assert kept[i] == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)
        fitted.theta = theta
        sure += [row["answer"] is not None for row in fitted.answer_rows(fresh, coverage=0.5)]
    assert abs(np.mean(sure) - 0.5) <= 0.15


def plain_answer(student, tokenizer, prompt: str, max_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy answer's tokens, and the log-probabilities of all that was generated, EOS too where it came."""
    ids, said, logs = tokenizer.encode(prompt), [], []
    while True:
        p = student(torch.tensor([ids + said]))[0, -1].log_softmax(-1)
        best = p.argmax().item()
        if len(said) == max_tokens:
            return said, logs
        if best in tokenizer.eos_ids:
            return said, [*logs, p[list(tokenizer.eos_ids)].logsumexp(0).item()]
        said.append(best)
        logs.append(p[best].item())


def test_balance_trains_other_weights_on_labels_and_is_refused_for_text(subject):
    uneven = [row for row in toy_rows(24) if row["label"] == "1"][:8] + toy_rows(24)[:6]
    found = []
    for balance in (False, True):
        cv = cross_validation(subject, uneven, replace(QUICK, methods=("sft",), balance=balance))
        found.append(train_folds(cv)["sft"].theta)
    assert not torch.equal(*found)
    with pytest.raises(UsageError, match="--balance: weighs labels, and these answers are text"):
        fit(toy_rows(12, "toy-sums"), subject, replace(QUICK, balance=True))
