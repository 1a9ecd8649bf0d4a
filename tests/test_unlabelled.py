"""Rows without answers: the teacher answers them, only IA2 trains on them."""

from dataclasses import replace

from ia2mini.models.checkpoint import load

from ia2mini.engine.experiment import count_steps
from ia2mini.engine.options import FitOptions
from ia2mini.engine.subject import open_subject
from ia2mini.episode import draw_episode
from ia2mini.fitting.crossval import CrossValidation
from ia2mini.fitting.training import train_folds
from ia2mini.tasks import Example, find_task, load_examples
from ia2mini.teacher import teach


def test_only_ia2_trains_on_them():
    model, tokenizer = load("tiny")
    pool = load_examples(find_task("toy-mood"), "train").rows
    episode = draw_episode(pool, 4)
    queries = [replace(row, answer="") for row in pool if row not in episode.train + episode.dev][
        :3
    ]
    demonstrations = episode.demonstrations + [episode.train] * 3
    episode = replace(episode, unlabelled=queries, demonstrations=demonstrations)
    taught = teach(model, tokenizer, episode)
    assert [len(rows) for rows in (taught.train, taught.dev, taught.icl_train, taught.icl_dev)] == [
        4,
        2,
        7,
        2,
    ]
    assert [row.prompt for row in taught.icl_train[4:]] == [
        tokenizer.encode(e.prompt) for e in episode.unlabelled
    ]
    assert all(row.activations is not None and len(row.answer) == 1 for row in taught.icl_train)


def test_a_fit_with_and_without_them():
    """SFT is the same; IA2 has more rows, each after rows of its fold alone, in an order of its own."""
    subject = open_subject("tiny", "cpu")
    rows = load_examples(find_task("toy-mood"), "train").rows
    own, queries = rows[:12], [Example(row.prompt, "") for row in rows[12:18]]
    options = FitOptions(methods=("sft", "ia2"), folds=3, epochs=2, rates=(1e-2,))
    alone, more = (
        CrossValidation(subject, find_task("toy-mood"), own, options, some)
        for some in ([], queries)
    )
    for fold in more.folds:
        assert fold.unlabelled == queries and len(fold.demonstrations) == len(fold.train) + 6
        held = {own[i].prompt for i in fold.test}
        for shown in fold.demonstrations[-6:]:
            assert sorted(shown, key=str) == sorted(fold.train, key=str)
            assert not held & {row.prompt for row in shown}
    assert [
        replace(fold, unlabelled=[], demonstrations=fold.demonstrations[:-6]) for fold in more.folds
    ] == alone.folds
    without = train_folds(alone)
    with_queries = train_folds(more)
    assert without["sft"].theta.equal(with_queries["sft"].theta)
    assert not without["ia2"].theta.equal(with_queries["ia2"].theta)
    assert (with_queries["ia2"].steps > without["ia2"].steps).all()
    for cv, trained in ((alone, without), (more, with_queries)):
        for method, runs in trained.items():
            assert (runs.steps == count_steps(cv.settings, cv.folds[0], method)).all()
