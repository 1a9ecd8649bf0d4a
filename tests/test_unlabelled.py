"""Rows without answers in a study: the teacher answers them, only IA2 trains on them."""

import pytest
from ia2mini.models.checkpoint import load

from ia2mini import UsageError
from ia2mini.episode import draw_episode
from ia2mini.engine.options import Options
from ia2mini.report.summary import parts
from ia2mini.study.study import compare
from ia2mini.engine.subject import open_subject
from ia2mini.tasks import find_task, load_examples
from ia2mini.teacher import teach


def test_an_episode_takes_them_from_the_rest_of_the_pool():
    pool = load_examples(find_task("toy-mood"), "train").rows[:40]
    episode = draw_episode(pool, 4, more=8)
    assert draw_episode(pool, 4) == draw_episode(pool, 4, more=0)
    assert episode.train == draw_episode(pool, 4).train and len(episode.unlabelled) == 8
    assert not set(episode.unlabelled) & {*episode.train, *episode.dev}
    assert all(sorted(map(str, shown)) == sorted(map(str, episode.train)) for shown in episode.more_demonstrations)
    with pytest.raises(
        UsageError,
        match="^35 rows without answers .--unlabelled, --select kl.: besides the sets the pool holds only 34",
    ):
        draw_episode(pool, 4, more=35)


def test_only_ia2_trains_on_them():
    model, tokenizer = load("tiny")
    episode = draw_episode(load_examples(find_task("toy-mood"), "train").rows, 4, more=3)
    taught = teach(model, tokenizer, episode)
    assert [len(rows) for rows in (taught.train, taught.dev, taught.icl_train, taught.icl_dev)] == [4, 2, 7, 2]
    assert [row.prompt for row in taught.icl_train[4:]] == [tokenizer.encode(e.prompt) for e in episode.unlabelled]
    assert all(row.activations is not None and len(row.answer) == 1 for row in taught.icl_train)


def test_a_study_of_several_numbers(tmp_path):
    options = Options(methods=("sft", "ia2"), unlabelled=(0, 6), sets=1, eval_rows=8, rates=(1e-2,), epochs=2)
    document, _ = compare([find_task("toy-mood")], open_subject("tiny", "cpu"), options, tmp_path)
    first, more = parts(document)
    assert [part["unlabelled"] for part in (first, more)] == [0, 6] and "6 unlabelled" in more["title"]
    losses = {(r["method"], r["unlabelled"]): r["dev_loss"] for r in document["training"]}
    steps = {(r["method"], r["unlabelled"]): r["steps"] for r in document["training"]}
    assert losses["sft", 0] == losses["sft", 6] and losses["ia2", 0] != losses["ia2", 6]
    assert steps["ia2", 6] > steps["ia2", 0]
