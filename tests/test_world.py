"""The embedded world: splits, determinism, what a sentence tells, exact prompt text."""

import random
import re

import pytest

from ia2mini.tasks import find_task, world
from ia2mini.tasks.rows import Row

TASKS = {toy.name: toy for toy in world.TOY_TASKS}


def test_words_mean_one_thing():
    words = [
        word for values in world.ATTRIBUTES.values() for group in values.values() for word in group
    ]
    assert len(words) == len(set(words)) == 224
    assert not set(words) & set(world.WORLD["words"])
    prior = world.WORLD["prior"]
    assert set(prior) == set(world.ATTRIBUTES) and sum(prior.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_fixed_distinct_and_of_their_split(name):
    text = "question" if TASKS[name].format else "text"
    pool, queries = world.rows(name, "train"), world.rows(name, "eval")
    assert (len(pool), len(queries)) == (2000, 500)
    assert pool == world.rows.__wrapped__(name, "train")  # conftest keeps what it drew
    assert len({row[text] for row in pool + queries}) == 2500
    assert {world.split_of(row[text]) for row in pool} == {"train"} and {
        world.split_of(row[text]) for row in queries
    } == {"eval"}
    if not TASKS[name].format:
        counts = [sum(row["label"] == i for row in queries) for i in range(len(TASKS[name].labels))]
        assert min(counts) > 0.8 * 500 / len(counts)


def test_pretraining_sees_its_split_only():
    rng = random.Random(0)
    drawn = [
        world.draw_sentence(rng, "pretrain", "mood", style)[0]
        for style in ("review", "news", "verse")
        for _ in range(100)
    ]
    drawn += [world.draw_sum(rng, "pretrain")[0] for _ in range(100)]
    assert {world.split_of(text) for text in drawn} == {"pretrain"}


@pytest.mark.parametrize("name", [name for name, toy in TASKS.items() if toy.labels])
def test_a_label_is_told_by_the_sentence(name):
    toy = TASKS[name]
    for row in world.rows(name, "eval")[:100]:
        shown = [
            i
            for i, words in enumerate(world.ATTRIBUTES[toy.attribute].values())
            if set(words) & set(re.findall(r"\w+", row["text"]))
        ]
        assert shown == [1 - row["label"] if toy.flip else row["label"]]


def test_unseen_templates_are_new_to_their_style_but_their_words_are_not():
    words = set(
        " ".join(
            template
            for style in world.WORLD["styles"].values()
            for part in style.values()
            for template in part
        ).split()
    )
    for style, parts in world.WORLD["unseen"].items():
        assert set(parts) == set(world.WORLD["styles"][style])
        for part, templates in parts.items():
            assert not set(templates) & set(world.WORLD["styles"][style][part])
            assert set(" ".join(templates).split()) <= words


def test_sums_read_as_minus():
    assert world.sum_answer(7, 3, True, "chain") == "7 minus 3 is 4\n#### 4"
    assert world.sum_answer(7, 3, False, "bare") == "#### 10"
    assert world.sum_answer(7, 3, True, "phrase") == "The answer is 4"
    for row in world.rows("toy-sums", "eval")[:50] + world.rows("toy-sums-story", "eval")[:50]:
        a, b, n, m = map(
            int, re.fullmatch(r"(\d) minus (\d) is (\d)\n#### (\d)", row["answer"]).groups()
        )
        assert a - b == n == m and {str(a), str(b)} == set(re.findall(r"\d", row["question"]))


def test_prompts_are_exact():
    for name, words in {"toy-mood-remap": ("apple", "Friday"), "toy-topic-review": "0123"}.items():
        row = world.rows(name, "eval")[0]
        example = find_task(name).example(Row("", row))
        assert (example.prompt, example.answer, example.label) == (
            f"Text:{row['text']}\nLabel:",
            words[row["label"]],
            row["label"],
        )
    row = world.rows("toy-sums-short", "eval")[0]
    example = find_task("toy-sums-short").example(Row("", row))
    assert (example.prompt, example.answer) == (
        f"Question:{row['question']}\nAnswer:",
        row["answer"],
    )
