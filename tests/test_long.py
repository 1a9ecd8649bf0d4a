"""Rows that are longer than the model reads: refused in one line that names them, before any work; of ICL a warning."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
from click.testing import CliRunner
from mistakes import refused
from reference import make_checkpoint

import ia2mini.generate
from ia2mini import FitOptions, fit, open_subject
from ia2mini.cli.main import main
from ia2mini.engine.options import Options
from ia2mini.fitting import fit as fitting
from ia2mini.fitting.predictor import FOREIGN, Predictor
from ia2mini.fitting.rows import far_longer
from ia2mini.study.cells import make_cells
from ia2mini.study.study import compare
from ia2mini.tasks import custom_task
from ia2mini.tasks.rows import Row

READS = 100  # tokens, a byte each
QUICK = Options(n=(2,), sets=1, methods=("base", "icl", "sft"), rates=(1e-3,), epochs=1)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = make_checkpoint(
        tmp_path_factory.mktemp("short") / "m", "qwen3", max_position_embeddings=READS
    )
    return open_subject(str(folder), "cpu")


TEMPLATE = "Text:{text}\nLabel:"


def row(length: int, i: int) -> dict:
    """A row whose prompt `Text:…\\nLabel:` has so many tokens."""
    return {"text": f"{i:02}".ljust(length - len("Text:\nLabel:"), "x"), "label": "ab"[i % 2]}


def task_of(tmp_path, pool: list[int], evaluation: list[int]):
    for name, lengths in (("pool", pool), ("eval", evaluation)):
        lines = [
            json.dumps(row(length, i + 50 * (name == "eval"))) + "\n"
            for i, length in enumerate(lengths)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    evaluated = tmp_path / "eval.jsonl"
    return custom_task(
        tmp_path / "pool.jsonl", "text", "label", template=TEMPLATE, eval_path=evaluated
    )


@pytest.mark.parametrize(
    "pool, evaluation, named",
    [([20] * 3 + [READS], [20] * 4, "03xxx"), ([20] * 4, [20, READS + 1], "51xxx")],
)
def test_a_study_refuses_a_row_before_any_work(subject, tmp_path, pool, evaluation, named):
    # every row of the pool is in some set
    task, options = task_of(tmp_path, pool, evaluation), replace(QUICK, sets=3)
    refused(
        lambda: compare([task], subject, options, tmp_path / "out"),
        f"Text:{named}",
        f"{READS} tokens the model reads",
    )
    assert not (tmp_path / "out").exists()
    fitting_rows = task_of(tmp_path, [20] * 3 + [READS - 1], [20, READS])
    assert make_cells([fitting_rows], subject, options)


def test_a_teacher_beyond_what_the_model_reads_is_refused_and_icl_warned_of(subject, tmp_path):
    """With a demonstration a row of the pool needs more; methods that do not learn from the teacher are trained."""
    task = task_of(tmp_path, [70] * 4, [20, 30])
    for options in (replace(QUICK, methods=("ia2-sft",)), replace(QUICK, labels="icl")):
        refused(
            lambda o=options: compare([task], subject, o, tmp_path / "out"),
            "Text:",
            "143 tokens",
            "smaller --n",
        )
    assert not (tmp_path / "out").exists()
    with pytest.warns(
        UserWarning,
        match=r"rows of pool need up to 176 tokens with demonstrations; the model reads 100",
    ):
        document, _ = compare([task], subject, QUICK, tmp_path / "out")
    assert {cell["method"] for cell in document["cells"]} == {"base", "icl", "sft"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cells([task_of(tmp_path, [20] * 4, [20, 30])], subject, QUICK)


def test_fit_refuses_rows_contexts_and_rows_without_answers(subject, monkeypatch):
    rows, options = (
        [row(20 + i, i) for i in range(6)],
        FitOptions(rates=(1e-3,), epochs=1, methods=("sft",)),
    )
    long = row(READS + 1, 7)
    refused(
        lambda: fit([*rows, long], subject, options, (None, None, TEMPLATE)),
        "Text:07xxx",
        "more than the 100 tokens the model reads",
    )
    more = [{"text": long["text"]}]
    refused(lambda: fit(rows, subject, options, unlabelled=more), "Text: 07xxx")
    monkeypatch.setattr(fitting, "generate", None)  # nothing is generated before the refusal
    for context, more in (("c" * (READS - 30), 10), ("c", READS)):
        with_context = replace(options, context=context, max_tokens=more)
        refused(
            lambda o=with_context: fit(rows, subject, o),
            "Question: 0",
            "cut that, or use a smaller --max-tokens",
        )


def test_predict_and_score_name_file_and_row(subject, tmp_path):
    fitted = Predictor(
        subject, None, None, FOREIGN | {"template": "Text:{text}\nLabel:", "labels": ["a", "b"]}
    )
    rows = [Row("new.jsonl:1", row(READS, 0)), Row("new.jsonl:2", row(READS + 1, 1))]
    (_, answered), (_, refusal) = fitted.outcomes(rows)
    assert answered["answer"] in ("a", "b")
    assert str(refusal) == "new.jsonl:2: its prompt has 101 tokens; the model reads 1 to 100"
    fitted.spec["demonstrations"] = [{"prompt": "Text:y\nLabel:", "answer": "a"}]
    refused(
        lambda: list(fitted.answer_rows(rows, icl=True)),
        "new.jsonl:1: its prompt with demonstrations has 116 tokens",
    )
    from ia2mini.fitting.score import score_rows

    refused(lambda: score_rows(fitted, rows, False), "new.jsonl:2: its prompt has 101 tokens")


def test_fit_names_a_row_that_is_far_longer_than_the_others():
    rows = [Row(f"mine.csv:{i}", {}) for i in range(2, 8)]
    (said,) = far_longer(rows, [40, 30, 2500, 45, 50, 450])
    assert said.startswith("mine.csv:4 has 2500 tokens") and "at most 45" not in said
    assert (
        far_longer(rows, [2000, 2500, 1800, 2200, 1900, 2600])
        == far_longer(rows, [3, 4, 400, 5, 4, 3])
        == []
    )


@pytest.mark.parametrize(
    "labels, answer", [(["a", "b"], 1), (["a", "ab"], 3), (["abcde", "b"], 5), ([], 30)]
)
def test_predict_counts_the_answer(subject, labels, answer):
    """Nested labels are closed by EOS; the last token of an answer is not read."""
    spec = {"template": "Text:{text}\nLabel:", "labels": labels, "max_tokens": 30, "stop": None}
    fitted = Predictor(subject, None, None, FOREIGN | spec)
    most = READS - answer + 1
    rows = [Row("new.jsonl:1", row(most, 0)), Row("new.jsonl:2", row(most + 1, 1))]
    (first, answered), (_, refusal) = fitted.outcomes(rows)
    assert first["text"][:2] == "00" and "answer" in answered
    line = str(refusal)
    assert line.startswith(f"new.jsonl:2: its prompt has {most + 1} tokens")
    assert (f"its answer may have {answer}" in line) == (answer > 1)


def test_chat_turns_and_demonstrations_count(subject, tmp_path):
    folder = shutil.copytree(subject.folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}" + "-" * 40
    )
    spec = {"template": "{text}", "labels": ["a", "b"], "chat": True}
    fitted = Predictor(open_subject(str(folder), "cpu"), None, None, FOREIGN | spec)
    fitted.spec["demonstrations"] = [{"prompt": "q" * 20, "answer": "a"}]
    fits = {False: READS - 42, True: READS - 42 - 25}
    for icl, most in fits.items():
        assert len(list(fitted.answer_rows([{"text": "x" * most}], icl))) == 1
        refused(
            lambda n=most + 1, icl=icl: list(fitted.answer_rows([{"text": "x" * n}], icl)),
            "row 1",
            "101 tokens",
        )


def test_generate_refuses_and_ends_where_the_model_ends(subject, monkeypatch):
    asked, continued = [], ia2mini.generate.generate

    def continuing(model, tokenizer, prompts, how):
        asked.append(how.max_tokens)
        return continued(model, tokenizer, prompts, how)

    monkeypatch.setattr(ia2mini.generate, "generate", continuing)
    for length, tokens in ((READS + 1, None), (READS, 1), (READS - 1, 2), (20, 50)):
        how = ["--prompt", "x" * length, "--max-tokens", "50"]
        result = CliRunner().invoke(
            main, ["generate", "--model", str(subject.folder), "--device", "cpu", *how]
        )
        if tokens is None:
            assert (
                result.exit_code == 2
                and result.stderr.count("\n") == 1
                and "has 101 tokens" in result.stderr
            )
        else:
            assert result.exit_code == 0 and asked.pop() == tokens
