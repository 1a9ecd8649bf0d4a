"""Sets and their demonstrations, and prompts byte for byte."""

from dataclasses import replace

import numpy as np
import pytest

from bench.studies.controls import controlled
from ia2mini import UsageError
from ia2mini.episode import draw_episode, seeded, with_demonstrations
from ia2mini.tasks import Example

POOL = [Example(f"Text:row {i}\nLabel:", str(i % 2), i % 2) for i in range(60)]


@pytest.mark.parametrize("number", range(5))
def test_a_set_is_numpys_shuffle_of_the_pool(number):
    rows = list(range(60))
    np.random.RandomState(number).shuffle(rows)
    episode = draw_episode(POOL, 8, number)
    assert episode.train == [POOL[i] for i in rows[:8]]
    assert episode.dev == [POOL[i] for i in rows[8:12]]
    assert draw_episode(POOL, 8, number, seed=1).train != episode.train


def test_the_first_set_is_pinned():
    assert [row.prompt.split()[1] for row in draw_episode(POOL, 4, 0).train] == [
        "26",
        "35",
        "59",
        "28",
    ]


@pytest.mark.parametrize("n, dev", [(2, 1), (3, 1), (4, 2), (16, 8), (95, 47), (96, 48), (128, 48)])
def test_half_as_many_dev_rows_at_most_48(n, dev):
    pool = [Example(f"{i}", "0", 0) for i in range(200)]
    episode = draw_episode(pool, n, 0)
    assert (len(episode.train), len(episode.dev), len(episode.demonstrations)) == (n, dev, n + dev)
    assert not set(episode.train) & set(episode.dev)


def test_demonstrations_are_the_other_training_rows():
    episode = draw_episode(POOL, 6, 2)
    for row, seen in zip(episode.train, episode.demonstrations, strict=False):
        assert row not in seen and set(seen) == set(episode.train) - {row} and len(seen) == 5
    for seen in episode.demonstrations[6:]:
        assert len(seen) == len(set(seen)) == 5 and set(seen) < set(episode.train)
    orders = {tuple(row.prompt for row in seen) for seen in episode.demonstrations}
    assert len(orders) == len(episode.demonstrations)
    in_set_order = [[row for row in episode.train if row != left_out] for left_out in episode.train]
    assert episode.demonstrations[:6] != in_set_order
    assert (
        len(episode.icl) == 1
        and set(episode.icl[0]) == set(episode.train)
        and len(episode.icl[0]) == 6
    )


def test_the_same_command_draws_the_same_set():
    a, b = (draw_episode(POOL, 6, 1, seed=3) for _ in range(2))
    assert a == b
    assert a.demonstrations != draw_episode(POOL, 6, 2, seed=3).demonstrations
    draws = [
        seeded(*key).integers(2**60)
        for key in [(0, 1, "a"), (0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a")]
    ]
    assert draws[0] == draws[1] and len(set(draws)) == 4


def test_the_released_scripts_choices():
    plain, episode = draw_episode(POOL, 5, 1), draw_episode(POOL, 5, 1, pool_demos=7)
    assert (episode.train, episode.dev, episode.demonstrations) == (
        plain.train,
        plain.dev,
        plain.demonstrations,
    )
    assert len(episode.icl) == 7 and len({tuple(seen) for seen in episode.icl}) == 7
    for seen in episode.icl:
        assert len(set(seen)) == 4 and not set(seen) & set(episode.train + episode.dev)
    reusing = draw_episode(POOL, 5, 1, reuse=True)
    # dev row j: training row j's
    assert reusing.demonstrations == plain.demonstrations[:5] + plain.demonstrations[:2]
    assert reusing.icl == plain.icl


@pytest.mark.parametrize(
    "pool, n, demos, message",
    [
        (60, 1, 0, r"--n 1: .*no demonstration"),
        (60, 0, 0, r"--n 0: .*no demonstration"),
        (60, 41, 0, r"--n 41: needs 41 training and 20 dev rows, but the pool holds only 60"),
        (8, 6, 0, r"--n 6: needs 6 training and 3 dev rows, but the pool holds only 8"),
        (13, 6, 2, r"--n 6: .* need 5 rows besides the set, but it has only 4"),
    ],
)
def test_a_size_that_does_not_fit_is_named(pool, n, demos, message):
    with pytest.raises(UsageError, match=message) as error:
        draw_episode(POOL[:pool], n, 0, pool_demos=demos)
    assert "\n" not in str(error.value)


def test_the_largest_size_that_fits():
    assert len(draw_episode(POOL, 40, 0).dev) == 20
    assert len(draw_episode(POOL[:14], 6, 0, pool_demos=3).icl) == 3


def test_a_prompt_with_demonstrations_byte_for_byte():
    shown = [Example("Text:a fine film \nLabel:", "1", 1), Example("Text:dull\nLabel:", "0", 0)]
    expected = "Text:a fine film \nLabel:1\n\nText:dull\nLabel:0\n\nText:so so\nLabel:"
    assert with_demonstrations(shown, "Text:so so\nLabel:") == expected
    assert with_demonstrations([], "Text:so so\nLabel:") == "Text:so so\nLabel:"


def with_queries(episode, queries):
    """The episode with rows without answers, each after two training rows of its own."""
    shown = [[episode.train[i], episode.train[i + 1]] for i in range(len(queries))]
    return replace(
        episode,
        unlabelled=[replace(row, answer="") for row in queries],
        demonstrations=episode.demonstrations + shown,
    )


def test_what_controls_show_the_teacher():
    pool = [Example(f"Text:row {i}\nLabel:", f"answer {i}", i % 2) for i in range(60)]
    episode, other = (with_queries(draw_episode(rows, 5, 1), rows[-3:]) for rows in (pool, POOL))
    assert controlled(episode, "true", None) is episode
    nothing = controlled(episode, "none", None)
    assert nothing.demonstrations == [[]] * 10
    another = controlled(episode, "other", lambda: other)
    assert another.demonstrations == other.demonstrations
    moved = controlled(episode, "shuffled", None, seed=3)
    answers = {row.prompt: row.answer for row in episode.train}
    seen = {row.prompt: row for shown in moved.demonstrations for row in shown}
    assert seen.keys() == answers.keys() and sorted(row.answer for row in seen.values()) == sorted(
        answers.values()
    )
    assert all(
        row.answer != answers[row.prompt] and pool[int(row.answer[7:])].label == row.label
        for row in seen.values()
    )
    for before, after in zip(episode.demonstrations, moved.demonstrations, strict=True):
        assert [row.prompt for row in before] == [row.prompt for row in after]
        # the same wrong answer before every query
        assert all(seen[row.prompt] == row for row in after)
    for control in (nothing, another, moved):  # what is trained on and evaluated stays
        assert (control.train, control.dev, control.icl) == (
            episode.train,
            episode.dev,
            episode.icl,
        )
        assert control.unlabelled == episode.unlabelled
