"""The catalog: prompts byte for byte, which rows count and in which order, labels, and the nearest name."""

import json

import numpy as np
import pytest

from ia2mini import UsageError
from ia2mini.tasks import all_tasks, find_task, load_examples
from ia2mini.tasks.answers import PARSERS
from ia2mini.tasks.catalog import PREPARE, Task, arrange
from ia2mini.tasks.rows import Row

# The first indices of datasets.Dataset.from_dict({"i": range(n)}).shuffle(seed=42), datasets 5.2.0.
SHUFFLES = {
    10: [5, 6, 0, 7, 3, 2, 4, 9, 1, 8],
    288: [206, 274, 26, 184, 283, 19, 0, 104],
    872: [726, 737, 51, 482, 426, 330, 243, 7],
    4000: [1144, 1690, 1586, 2056, 2708, 709, 1620, 2976],
    4846: [1855, 4392, 2806, 651, 1168, 2162, 1165, 1493],
    67349: [32326, 27449, 60108, 23141, 35226, 66852, 65093, 47847],
}

WRITTEN_OUT = {  # task -> position among the evaluation rows, prompt, answer, label
    "sst2": (
        0,
        "Text:the words , ` frankly , my dear , i do n't give a damn , ' have never been more appropriate . \nLabel:",
        "0",
        0,
    ),
    "finsen": (
        0,
        "Text:Also , it is bringing in `` the right kind of people '' to upgrade its human resources .\nLabel:",
        "1",
        1,
    ),
    "poems": (0, "Text:harsh, featureless, and rude, barrenly perish:\nLabel:", "0", 0),
    "agnews": (
        37,
        "Text:India and Bangladesh Neglect Their Enclaves (Reuters) Reuters - Nazrul Islam is an Indian\\living in an"
        " Indian village.\nLabel:",
        "0",
        0,
    ),
    "gsm8k": (
        56,
        "Question:Grace weighs 125 pounds. Alex weighs 2 pounds less than 4 times what Grace weighs. What are their"
        " combined weights in pounds?\nAnswer:",
        "Alex weighs 125*4-2 = <<125*4-2=498>>498.\n"
        "Their combined weights are 125+498 = <<125+498=623>>623 pounds.\n#### 623",
        None,
    ),
    "gsm8ks": (
        55,
        "Question:There are 24 girls in the park. If there are 1/2 the number of boys in the park, how many kids are in"
        " the park?\nAnswer:",
        "#### 36",
        None,
    ),
    "hmath_algebra": (
        47,
        "Question:What is $50\\%$ of $200\\%$ of $10$?\nAnswer:",
        "Turning words into math, we want the value of $.5\\cdot2\\cdot10$, which is $\\boxed{10}$.",
        None,
    ),
    "sciqa": (
        26,
        "Question:Plants take in carbon dioxide and give off what?\nAnswer:",
        "\n#### oxygen",
        None,
    ),
    "sciq_remap": (
        31,
        "Question:Pluto’s orbit is in the kuiper?\nChoices:\n[apple]belt\n[Friday]zone\n[banana]field\n[Saturday]area"
        "\n\nAnswer:",
        "apple",
        0,
    ),
}

COUNTS = {
    "sst2": (2000, 500),
    "finsen": (1116, 500),
    "poems": (None, 288),
    "agnews": (2000, 500),
    "gsm8k": (2000, 500),
    "gsm8ks": (None, 500),
    "hmath_algebra": (1744, 500),
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("n", SHUFFLES)
def test_shuffle_is_that_of_datasets(n):
    order = arrange(Task("own", "own", steps=("shuffle",)), "train", range(n))
    assert order[: len(SHUFFLES[n])] == SHUFFLES[n]
    assert sorted(order) == list(range(n))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_prompts_of_real_rows_byte_for_byte(shared_data, name):
    position, *expected = WRITTEN_OUT[name]
    example = load_examples(find_task(name), "eval", shared_data).rows[position]
    assert [example.prompt, example.answer, example.label] == expected


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_real_rows(shared_data, name):
    task = find_task(name)
    for role, count in zip(("train", "eval"), COUNTS[name], strict=True):
        if count is not None:
            assert len(load_examples(task, role, shared_data).rows) == count


def test_order_of_real_rows(shared_data):
    """Rows stand where `datasets` puts them; sst2: shuffled; finsen: and filtered, cut; poems: filtered, shuffled."""
    source = rows_of(shared_data / "sst2/validation.jsonl")
    found = [
        example.prompt for example in load_examples(find_task("sst2"), "eval", shared_data).rows[:8]
    ]
    assert found == [f"Text:{source[i]['sentence']}\nLabel:" for i in SHUFFLES[872]]

    source = rows_of(shared_data / "financial_phrasebank/train.jsonl")
    kept = [
        source[i] for i in np.random.default_rng(42).permutation(4000) if source[i]["label"] != 1
    ]
    pool, held = (
        load_examples(find_task("finsen"), role, shared_data).rows for role in ("train", "eval")
    )
    assert [(e.prompt[5:-7], e.answer) for e in pool + held] == [
        (row["sentence"], {0: "0", 2: "1"}[row["label"]]) for row in kept
    ]

    kept = [
        row for row in rows_of(shared_data / "poem_sentiment/train.jsonl") if row["label"] in (0, 1)
    ]
    found = load_examples(find_task("poems"), "eval", shared_data).rows
    assert [e.prompt[5:-7] for e in found[:8]] == [kept[i]["verse_text"] for i in SHUFFLES[288]]


def test_strategytf_is_shuffled_cut_and_shuffled_again():
    """Indices from datasets: shuffle(42), select all but the last 500 and the last 500, shuffle(42) each."""
    task = find_task("strategytf")
    rows = [Row(f"row {i}", {"question": str(i), "answer": i % 3 == 0}) for i in range(2290)]
    pool, held = (arrange(task, role, rows) for role in ("train", "eval"))
    assert (len(pool), len(held)) == (1790, 500)
    assert [int(row["question"]) for row in pool[:6]] == [2250, 1135, 1833, 426, 662, 111]
    assert [int(row["question"]) for row in held[:6]] == [752, 1066, 528, 1918, 2288, 2011]
    example = task.example(Row("", {"question": "Is ice cold?", "answer": True}))
    assert (example.prompt, example.answer, example.label) == (
        "Question:Is ice cold?\nAnswer:",
        "1",
        1,
    )
    assert task.example(Row("", {"question": "", "answer": "False"})).answer == "0"


def test_news_labels_and_cut():
    task = find_task("bbcnews")
    # 256 characters end inside this: "abcdef" is cut to its end, then dropped
    text = "word " * 50 + "abcdef and more"
    rows = arrange(
        task,
        "eval",
        [Row(f"row {label}", {"text": f"{text}", "label": label}) for label in range(5)],
    )
    assert {row["label"]: task.example(row).answer for row in rows} == {
        0: "3",
        1: "2",
        2: "1",
        3: "0",
        4: "0",
    }
    assert task.example(rows[0]).prompt == "Text:" + " ".join(["word"] * 50) + "\nLabel:"
    assert (
        arrange(task, "eval", [Row("", {"text": "one two three", "label": 0})])[0]["text"]
        == "one two"
    )


def test_multiple_choice():
    sciq, qasc = find_task("sciq_remap"), find_task("qasc_remap")
    columns = {
        "question": "Q?",
        "distractor1": "x",
        "distractor2": "y",
        "distractor3": "z",
        "correct_answer": "right",
    }
    places = []
    for i in range(400):
        row = {**columns, "question": f"Q{i}?"}
        places_in_files = (Row("a:1", row), Row("b:7", dict(reversed(row.items()))))
        example, again = (
            sciq.example(arrange(sciq, "eval", [place])[0]) for place in places_in_files
        )
        assert example == again  # wherever the row stands, its choices stand in the same order
        assert f"[{example.answer}]right\n" in example.prompt and sorted(
            example.prompt.count(f"]{c}\n") for c in "xyz"
        ) == [1, 1, 1]
        places.append(example.label)
    assert min(np.bincount(places, minlength=4)) > 70

    row = Row(
        "",
        {
            "question": "Q?",
            "choices": {"text": list("abcdefgh"), "label": list("ABCDEFGH")},
            "answerKey": "F",
        },
    )
    example = qasc.example(arrange(qasc, "eval", [row])[0])
    assert (example.answer, example.label) == ("Sunday", 5)
    assert example.prompt == (
        "Question:Q?\nChoices:\n[apple]a\n[Friday]b\n[banana]c\n[Saturday]d\n[Thursday]e\n[Sunday]f\n[Wednesday]g\n"
        "[Monday]h\n\nAnswer:"
    )
    for broken in ("no", {"label": []}, {"text": ["a"]}):
        with pytest.raises(UsageError, match="f:3: column 'choices'"):
            arrange(qasc, "eval", [Row("f:3", {**row, "choices": broken})])


def test_the_twelve_tasks_and_what_they_are_evaluated_on():
    assert {task.tag for task in all_tasks().values() if task.hub} == set(
        "SST2 FinS PoemS STF AGN BBCN SciQr QASCr GSM8K GSM8Ks HMathA SciQ".split()
    )
    pairs = {task.name: task.evals for task in all_tasks().values() if task.hub and task.train}
    assert pairs == {
        "sst2": ("sst2", "finsen", "poems"),
        "finsen": ("finsen", "sst2", "poems"),
        "strategytf": ("strategytf",),
        "agnews": ("agnews", "bbcnews"),
        "sciq_remap": ("sciq_remap", "qasc_remap"),
        "gsm8k": ("gsm8k", "gsm8ks"),
        "hmath_algebra": ("hmath_algebra",),
        "sciqa": ("sciqa",),
    }
    for task in all_tasks().values():
        assert all(name in all_tasks() for name in task.evals) and hash(task)
        assert (task.max_tokens == 1) == bool(task.labels) == (task.parser is None)
        assert task.parser in (None, *PARSERS) and task.prepare in (None, *PREPARE)


def test_embedded_tasks_load():
    for task in all_tasks().values():
        if task.hub is None:
            found = load_examples(task, "eval", limit=40)
            assert len(found.rows) == 40 and found.origin["source"] == "embedded"
            for example in found.rows:
                if task.labels:
                    assert example.answer == task.labels[example.label]
                else:
                    assert PARSERS[task.parser](example.answer).isdigit()
    assert len(load_examples(find_task("toy-mood"), "train").rows) == 2000


def test_unknown_names_labels_and_roles():
    for typed, near in {
        "sst": "sst2",
        "SST2": "sst2",
        "agnew": "agnews",
        "toy_mood": "toy-mood",
        "": None,
    }.items():
        with pytest.raises(UsageError, match=f"did you mean '{near}'" if near else "unknown task"):
            find_task(typed)
    with pytest.raises(
        UsageError,
        match=r"rows.csv:7: unknown label '-1' in column 'label'; known labels: '0', '1'",
    ):
        find_task("sst2").label_of(Row("rows.csv:7", {"label": -1}))
    yes_no = Task("own", "own", labels=("no", "yes"), label_index={"no": 0, "yes": 1})
    assert yes_no.label_of(Row("rows.csv:8", {"label": "Yes"})) == 1
    with pytest.raises(UsageError, match="poems is only evaluated on"):
        load_examples(find_task("poems"), "train")
    with pytest.raises(UsageError, match="f.jsonl:2: the answer is empty"):
        find_task("gsm8k").example(Row("f.jsonl:2", {"question": "q", "answer": " "}))
