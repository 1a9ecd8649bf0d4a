"""A user's own rows: which columns are taken, which answers are labels, which rows are left out, and what is said."""

import json
import math

import pandas
import pyarrow as pa
import pytest
from mistakes import refused
from pyarrow import parquet
from tables import write_rows

from ia2mini import FitOptions, open_subject
from ia2mini.fitting.fit import open_store, prepare_fit
from ia2mini.fitting.held_out import score_held_out
from ia2mini.fitting.rows import Columns, read_own
from ia2mini.tasks import custom_task, find_task, load_examples
from ia2mini.tasks.own import own_task, similar_labels
from ia2mini.tasks.rows import Row, check_columns, fill, read_rows

CATEGORIES = ("label", "target", "category", "class", "sentiment", "lang", "label_text")
WORDS = "one two three four five six seven eight".split()


def rows_of(columns: str) -> list[dict]:
    """Eight rows: categories, numbers, dates and addresses where the names say so, else different sentences."""
    found = []
    for i, word in enumerate(WORDS):
        row = {}
        for column in columns.split():
            row[column] = f"this {column} has {word}"
            if column in CATEGORIES:
                row[column] = ("yes", "no")[i % 2]
            elif column == "id":
                row[column] = i
            elif column == "date":
                row[column] = f"2024-01-0{i + 1} 10:00 UTC"
            elif column == "url":
                row[column] = f"https://example.org/{word}"
        found.append(row)
    return found


TAKEN = {  # columns -> prompt, answer, left out
    "text label": ("text", "label", []),
    "Text Label": ("Text", "Label", []),
    "id text label": ("text", "label", ["id"]),
    "label url text date lang": ("text", "label", ["url", "date", "lang"]),
    "text label label_text": ("text", "label", ["label_text"]),
    "instruction output": ("instruction", "output", []),
    "prompt completion": ("prompt", "completion", []),
    "review stars": ("review", "stars", []),
    "source target": ("source", "target", []),
    "message sentiment": ("message", "sentiment", []),
}


@pytest.mark.parametrize("columns", TAKEN)
def test_what_is_taken_and_left_out_is_said(columns):
    prompt, answer, left_out = TAKEN[columns]
    rows, task = read_own(rows_of(columns))
    for row in rows:
        example = task.example(row)
        assert str(row[prompt]) in example.prompt and example.answer == f" {row[answer]}"
        assert not any(
            str(row[column]) in example.prompt
            for column in row
            if column != prompt and len(row) < 3
        )
    said = task.remarks[-2]
    assert f"the prompt is {prompt!r}" in said and f"the answer is {answer!r}" in said
    named = said.partition("left out: ")[2].partition(";")[0]
    assert named == ", ".join(map(repr, left_out))


MANY = [
    "context question answer",
    "question context answer",
    "query passage label",
    "premise hypothesis label",
    "sentence1 sentence2 label",
    "text_a text_b label",
    "question1 question2 is_duplicate",
    "title text label",
    "text comment label",
    "text label category",
    "text aspect label",
    "input output label",
    "system prompt response",
    "prompt chosen rejected",
    "question choices answer",
    "instruction input label",
    "instruction input output system",
    "response label",
    "question text",
    "id text",
    "id label",
    "user_id text",
    "text date",
    "url label",
    "a b",
    "text",
]


@pytest.mark.parametrize("columns", MANY)
def test_a_header_that_may_be_read_in_several_ways_is_refused(columns):
    rows = rows_of(columns)
    refused(lambda: read_own(rows), *map(repr, rows[0]), "--prompt-column", "--answer-column")


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "row", "Zeile"])
def test_a_column_that_numbers_the_rows_is_neither_prompt_nor_answer(name):
    for first in (0, 1, 100):
        for number in (int, str):
            rows = [{name: number(first + i), "text": f"a b {i}"} for i in range(8)]
            refused(lambda rows=rows: read_own(rows), repr(name), "'text'", "--answer-column")
            assert read_own(rows, queries=True)[1].prompt == "Question: {text}\nAnswer: "
            bodies = [{name: row[name], "body": row["text"]} for row in rows]
            assert "{body}" in read_own(bodies, queries=True)[1].prompt
            graded = [row | {"stars": i % 2} for i, row in enumerate(rows)]
            assert read_own(graded)[1].answer_column == "stars"
            assert f"left out: {name!r}" in read_own(graded)[1].remarks[-2]
            assert read_own(rows, (None, name))[1].answer_column == name
    rows = [{name or "n": value, "text": f"a b {value}"} for value in (3, 1, 2, 2, 1, 3)]
    assert name.startswith("Unnamed") or read_own(rows)[1].answer_column == (name or "n")


def test_what_a_template_cannot_name_is_refused():
    for column, said in {
        "a {b} c": "has braces",
        "?text": "begins with a question mark",
        "te\ud83dxt": "half a surrogate pair",
    }.items():
        rows = [{column: f"text {i}", "b": i, "label": i % 2} for i in range(8)]
        refused(lambda rows=rows, column=column: read_own(rows, (column,)), said, "rename")
        asked = (column,)
        refused(lambda rows=rows, asked=asked: read_own(rows, asked, True), said, "rename")
    rows = labelled([1, 0] * 4)
    for template in ("{{text}}", '{"a": {{text}}}', "Text: {{ text }}\nLabel: {text}"):
        refused(lambda template=template: read_own(rows, (None, None, template)), "single braces")
    template = '{"a": {"b": "{text}"}}'
    assert read_own(rows, (None, None, template))[1].example(read_own(rows)[0][0]).prompt == (
        '{"a": {"b": "text 0"}}'
    )


def test_the_refusal_shows_a_template_that_works():
    rows = rows_of("context question answer")
    with pytest.raises(ValueError) as error:
        read_own(rows)
    template = str(error.value).partition("--template '")[2].rpartition("'")[0]
    kept, task = read_own(rows, (None, None, template))
    assert task.example(kept[0]).prompt == "this context has one\nthis question has one\nAnswer:"
    assert (
        task.example(kept[0]).answer == "this answer has one" and "left out" not in task.remarks[-2]
    )


def test_named_columns_are_taken_and_the_others_named():
    rows = rows_of("context question answer id")
    _, task = read_own(rows, ("question", None, None))
    assert task.answer_column == "answer" and "left out: 'context', 'id'" in task.remarks[-2]
    _, task = read_own(rows, (None, "context", "{question}:"))
    assert task.answer_column == "context" and "left out: 'answer', 'id'" in task.remarks[-2]
    refused(
        lambda: read_own(rows, ("question", "question", None)),
        "'question' cannot be both prompt and answer",
    )
    refused(lambda: read_own(rows, ("question", None, "{context}:")), "'{context}:'", "{question}")
    for template in ("", "Is it good?", "{", "}{"):
        refused(
            lambda template=template: read_own(rows, (None, None, template)),
            "must name a column",
            "{text}",
        )
        refused(
            lambda template=template: own_task(rows, "q", Columns(template=template), queries=True),
            "must name a column",
            "{text}",
        )


ALPACA = [
    {"instruction": "Give the capital.", "input": "France", "output": "Paris"},
    {"instruction": "Name the opposite.", "input": "big", "output": "small"},
    {"instruction": "Write a greeting.", "input": "", "output": "Hello there"},
    {"instruction": "Name a colour.", "input": None, "output": "red"},
    {"instruction": "Name a {fruit}.", "input": " \n", "output": "plum"},
    {"instruction": "Name a tree.", "output": "oak"},
]


@pytest.mark.parametrize(
    "names", [("instruction", "input", "output"), ("instruction", "context", "response")]
)
@pytest.mark.parametrize("more", [{}, {"text": "### Instruction: this is the whole of it"}])
def test_alpacas_rows_are_read_as_such(names, more):
    rows = [
        {names[("instruction", "input", "output").index(k)]: v for k, v in row.items()} | more
        for row in ALPACA
    ]
    kept, task = read_own(rows)
    for row, found in zip(ALPACA, kept, strict=True):
        asked = row["instruction"]
        if (row.get("input") or "").strip():
            asked += "\n" + row["input"]
        example = task.example(found)
        assert example.prompt == f"Question: {asked}\nAnswer:"
        assert example.answer == f" {row['output']}"
    said = task.remarks[-2]
    assert all(repr(name) in said for name in (*names, *more)) and "Alpaca" in said
    assert ("left out: 'text'" in said) == bool(more)
    _, asking = own_task(kept, "queries", queries=True)
    assert fill(asking.prompt, kept[0]) == "Question: Give the capital.\nFrance\nAnswer: "
    _, said = own_task(kept, "queries", queries=True, chat=True)
    assert fill(said.prompt, kept[0]) == "Give the capital.\nFrance", "as a person says it"


def test_a_column_that_may_be_empty_is_not_missed_for_its_spelling():
    """It would be left out of the prompt, and the row be answered without it."""
    for name in ("Input", "INPUT", " input"):
        row = Row("new.csv:2", {"instruction": "Give the capital.", name: "France"})
        said = f"new.csv:2: no column 'input', but {name!r}"
        refused(lambda row=row: fill("{instruction}\n{?input}", row), said)
    rows = [Row("new.csv:2", {"instruction": "Give the capital.", "inputs": "France"})]
    with pytest.warns(UserWarning, match="no row has a column 'input'"):
        check_columns(rows, "{instruction}\n{?input}")


def labelled(labels: list) -> list[dict]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


MISSING = [None, math.nan, "", " ", "nan", "NaN", "<NA>", "\u200b", " \ufeff"]


@pytest.mark.parametrize("nothing", MISSING, ids=map(repr, MISSING))
@pytest.mark.parametrize("labels", [["good", "bad"], [1, 0], [1.0, 0.0]], ids=repr)
def test_what_is_missing_is_no_class_and_its_rows_are_named(labels, nothing):
    rows, task = read_own(labelled([*labels, nothing] * 4))
    known = (
        pandas.Series([*labels, nothing] * 4)
        .replace(["", " ", "nan", "NaN", "<NA>", "\u200b", " \ufeff"], None)
        .dropna()
    )
    assert task.labels == tuple(sorted({str(x).removesuffix(".0") for x in known}))
    assert [row.where for row in rows] == [f"row {i + 1}" for i in known.index]
    assert (
        task.remarks[0] == "left out for want of answer: 4 of 12 rows (row 3, row 6, row 9, row 12)"
    )


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_missing_answers_of_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    table = pandas.DataFrame(
        {"text": [f"text {i}" for i in range(12)], "label": [1.0, 0.0, None] * 4}
    )
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix.startswith("json"):
        table.to_json(path, orient="records", lines=suffix == "jsonl")
    else:
        table.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    rows, task = read_own(path)
    assert task.labels == ("0", "1") and len(rows) == 8 and "4 of 12 rows" in task.remarks[0]
    assert [task.example(row).label for row in rows] == table["label"].dropna().astype(int).tolist()
    study = custom_task(path)
    pool, held = (load_examples(study, role).rows for role in ("train", "eval"))
    assert {e.prompt for e in pool + held} == {task.example(row).prompt for row in rows}


def test_rows_without_a_prompt_are_left_out_and_others_named(tmp_path):
    rows = labelled([1, 0] * 4)
    rows[2]["text"], rows[5]["text"] = None, " "
    del rows[7]["text"]
    kept, task = read_own(rows)
    assert (
        len(kept) == 5
        and task.remarks[0] == "left out for want of prompt: 3 of 8 rows (row 3, row 6, row 8)"
    )
    path = write_rows(
        tmp_path / "eval.jsonl",
        [{"text": "a", "label": 1.0}, {"text": "b"}, {"text": "c", "label": 0}],
    )
    task = custom_task(write_rows(tmp_path / "rows.jsonl", labelled([1, 0] * 4)), eval_path=path)
    assert f"1 of 3 rows ({path}:2)" in task.remarks[-1]
    assert {(e.prompt[6:7], e.label) for e in load_examples(task, "eval").rows} == {
        ("a", 1),
        ("c", 0),
    }
    # as pandas writes what held nothing once
    (tmp_path / "eval.csv").write_text("text;label\na;1.0\nb;0.0\n")
    task = custom_task(tmp_path / "rows.jsonl", eval_path=tmp_path / "eval.csv")
    assert {e.label for e in load_examples(task, "eval").rows} == {0, 1}
    refused(lambda: read_own([{"text": "a", "label": None}] * 4), "'label' is empty")
    refused(lambda: read_own(labelled(["a", "nan"] * 4)), "every row has the answer 'a'", "4 of 8")
    refused(lambda: read_own([{"text": None, "label": 1}] * 4), "the prompt is empty")
    refused(
        lambda: custom_task(path, eval_path=write_rows(tmp_path / "e.jsonl", [{"text": "a"}])),
        "no column 'label'",
    )


ONE_LABEL = {  # what one column holds -> the labels
    "floats and ints": ([1, 0, 1.0, 0.0], ["0", "1"]),
    "texts of them": (["1", "0", "1.0", "0.00"], ["0", "1"]),
    "text and number": (["1", 0, 1, "0"], ["0", "1"]),
    "true and one": ([True, False, 1, 0], ["0", "1"]),
    "texts of true and one": (["True", "False", "1", "0"], ["0", "1"]),
    "truth values": ([True, "True", "false", "FALSE"], ["false", "true"]),
    "negative": ([-1.0, 1, -1, 1.0], ["-1", "1"]),
    "only floats": ([1.0, 2.0, 3.0], ["1", "2", "3"]),
    "halves": ([1.0, 1.5, 2, 2.0], ["1", "1.5", "2"]),
    "versions": (["1.0", "1.5", "1.10"], ["1.0", "1.10", "1.5"]),
    "booleans": ([True, False], ["false", "true"]),
    "codes": (["01", "1", "2"], ["01", "1", "2"]),
}


@pytest.mark.parametrize("name", ONE_LABEL)
def test_numbers_are_labels_once_for_the_whole_column(name):
    held, labels = ONE_LABEL[name]
    rows, task = read_own(labelled(held * 4))
    assert list(task.labels) == labels
    for row in rows:
        spoken = task.labels[task.example(row).label]
        assert spoken == str(row["label"]).lower() or float(spoken) == float({"True": 1, "False": 0}.get(
            str(row["label"]), row["label"]))  # fmt: skip
    merged = len({repr(value) for value in held}) > len(labels)
    assert any("is read as label" in remark for remark in task.remarks) == (
        merged or name == "texts of them"
    )


def test_labels_that_may_be_mistakes_are_remarked():
    for labels, said in {
        (" yes", "yes"): "differ only in blanks or case",
        ("Yes", "yes"): "differ only in blanks or case",
        ("1", "1,0"): "two ways to write the same",
        ("01", "1"): "two ways to write the same",
        ("-1", "\N{MINUS SIGN}1"): "two ways to write the same",
        ("-0", "0"): "two ways to write the same",
        ("1", "2", "true"): "two ways to write the same",
        ("yes", "yes\u200b"): "two ways to write the same",
        ("\ufeffyes", "Yes"): "two ways to write the same",
        ("é", "e\u0301"): "two ways to write the same",
        ("no ", "yes"): "begins or ends with a blank",
        ("None", "a"): "'None' is read as a label",
        ("a", "n/a"): "'n/a' is read as a label",
    }.items():
        assert any(said in remark for remark in similar_labels(labels)), labels
    assert not similar_labels(("0", "1", "bad", "good"))


def test_answers_that_do_not_repeat_are_texts_and_that_is_said():
    different = [{"text": f"q{i}", "label": f"a{i}"} for i in range(6)]
    for rows in (different, different * 2, different * 5):  # repeated rows tell nothing new
        task = own_task(read_own(rows)[0], "own")[1]
        told = "answers: free text, 6 different in 6 rows; right is the same, word for word"
        assert not task.labels and task.remarks[-1] == told
    again = [row | {"text": row["text"] + "!"} for row in different]
    task = own_task(read_own(different + again)[0], "own")[1]
    assert len(task.labels) == 6 and task.remarks[-1].startswith("answers: 6 labels (a0: 2, ")


@pytest.mark.parametrize(
    "answer, right",
    [
        ("It is 3 and 4. #### {}", "the same number"),
        (r"so \boxed{{{}}}", r"the same in \boxed{}"),
        ("Well. #### on {} legs", "the same after ####"),
        ("on {} legs", "the same, word for word"),
    ],
)
def test_it_says_which_texts_are_right(answer, right):
    rows = [{"text": f"q{i}", "label": answer.format(i)} for i in range(6)]
    assert read_own(rows)[1].remarks[-1].endswith(f"; right is {right}")


def test_answers_that_a_blank_line_cuts_are_told_of():
    for answer, cut in (("a\n\nb", True), ("\n\na", True), ("a\nb", False), ("a\n\n", False)):
        rows = [{"text": f"q{i}", "label": f"{answer} {i}" if cut else answer} for i in range(6)]
        rows.append({"text": "q", "label": "c"})
        remarks = read_own(rows, Columns(answer_kind="text"))[1].remarks
        told = "6 answers with a blank line, where a generated answer ends: never right"
        assert any(remark.startswith(told) for remark in remarks) == cut


def test_labels_are_what_repeats_up_to_255_or_what_one_says():
    for count, times, labelled in ((21, 2, True), (255, 2, True), (255, 1, False), (256, 2, False)):
        rows = labelled_rows(count, times)
        task = read_own(rows)[1]
        told = f"answers: {count} labels"
        if not labelled:
            texts = f"{count} different in {count * times} rows"
            told = f"answers: free text, {texts}; right is the same, word for word"
        assert (len(task.labels) == count) == labelled and task.remarks[-1] == told
    few = labelled_rows(3, 1)
    assert not read_own(few)[1].labels
    forced = Columns(answer_kind="labels")
    assert read_own(few, forced)[1].labels == ("label 0", "label 1", "label 2")
    assert read_own(labelled_rows(255, 1), forced)[1].remarks[-1] == "answers: 255 labels"
    refused(lambda: read_own(labelled_rows(256, 2), forced), "--labels", "256", "255", "--text")
    text = read_own(labelled_rows(2, 8), Columns(answer_kind="text"))[1]
    assert text.labels == () and text.parser == "text" and "2 different in 16" in text.remarks[-1]
    refused(
        lambda: read_own(labelled_rows(2, 8), Columns(answer_kind="label")), "'label'", "labels"
    )


def test_labels_and_text_do_not_share_what_an_interrupted_fit_kept(tmp_path):
    rows = [{"text": f"good {i}", "label": ("apple", "banana")[i % 2]} for i in range(8)]
    for answers in ("labels", "text"):
        columns = Columns(template="{text}:", answer_kind=answers)
        subject = open_subject("tiny", "cpu")
        cv = prepare_fit(rows, subject, FitOptions(), columns)
        cv.store = open_store(cv, tmp_path)
        score_held_out(cv, "base", None)
    assert len(list(tmp_path.glob("unfinished-*"))) == 2


def labelled_rows(count: int, times: int) -> list[dict]:
    return labelled([f"label {i % count}" for i in range(count * times)])


def class_table(labels: list, names: list[str]) -> pa.Table:
    """A table as `datasets` writes it: numbers, and their names in the metadata of the schema."""
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    table = pa.table(
        {"text": [f"text {i}" for i in range(len(labels))], "label": pa.array(labels, pa.int64())}
    )
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def test_classes_of_parquet_keep_their_names(tmp_path):
    path, numbers = tmp_path / "rows.parquet", [0, 1, 1, 0, -1, None] * 2
    parquet.write_table(class_table(numbers, ["bad", "good"]), path)
    rows, task = read_own(path)
    assert (
        task.labels == ("bad", "good")
        and "left out for want of answer: 4 of 12 rows" in task.remarks[0]
    )
    assert [task.example(row).answer.strip() for row in rows] == [
        ["bad", "good"][i] for i in numbers if i in (0, 1)
    ]
    study = custom_task(path)
    assert {e.answer for e in load_examples(study, "train").rows} == {" bad", " good"}
    parquet.write_table(class_table([0, 1, 2], ["bad", "good"]), path)
    refused(lambda: read_rows(path), "rows.parquet row 3: class 2", "2 names")
    for broken in (
        b"{",
        b'{"info": {"features": [1]}}',
        b'{"info": 3}',
        b'{"info": {"features": {"label": 1}}}',
    ):
        table = class_table([0, 1], ["bad", "good"]).replace_schema_metadata(
            {b"huggingface": broken}
        )
        parquet.write_table(table, path)
        assert [row["label"] for row in read_rows(path)] == [0, 1]


def test_tasks_of_the_catalog_keep_the_numbers(tmp_path):
    (tmp_path / "ag_news").mkdir()
    parquet.write_table(
        class_table([0, 1] * 3, ["World", "Sports"]), tmp_path / "ag_news" / "test.parquet"
    )
    found = load_examples(find_task("agnews"), "eval", tmp_path).rows
    assert sorted((e.answer, e.label) for e in found) == [("0", 0)] * 3 + [("1", 1)] * 3


def test_a_column_that_is_there_twice_is_refused_by_name(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array([0]), pa.array([1])], names=["text", "label", "label"]
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("text,label,label\na,0,1\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0, "label": 1}\n')
    (tmp_path / "rows.json").write_text(
        '[{"text": "a", "label": {"of": 0}}, {"text": "b", "more": {"label": 1, "label": 2}}]'
    )
    for suffix in ("parquet", "csv", "jsonl", "json"):
        refused(
            lambda suffix=suffix: read_rows(tmp_path / f"rows.{suffix}"),
            f"rows.{suffix}",
            "'label'",
        )


def test_labels_are_counted_before_anything_is_trained_and_slips_named():
    rows = [{"text": f"q{i}", "label": "health"} for i in range(5)]
    rows += [{"text": f"r{i}", "label": "price"} for i in range(3)]
    rows += [{"text": "slip", "label": "Health"}]
    remarks = read_own(rows)[1].remarks
    assert "answers: 3 labels (health: 5, price: 3, Health: 1)" in remarks
    assert "'Health' and 'health'" in remarks[-1] and "kept apart" in remarks[-1]
