"""Sets and their demonstrations, prompts byte for byte, and batches written out by hand."""

import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ia2mini.models import UsageError
from reference import EOS, byte_tokenizer
from tokenizers import Tokenizer as Backend

from ia2mini import episode
from ia2mini.episode import Row, by_length, collate, draw_episode, seeded, truth_row, with_demonstrations
from ia2mini.tasks import Example
from ia2mini.tokenizer import Tokenizer

POOL = [Example(f"Text:row {i}\nLabel:", str(i % 2), i % 2) for i in range(60)]
TEXT = st.text(max_size=30)


def tokenizer(bos=False) -> Tokenizer:
    return Tokenizer(Backend.from_str(byte_tokenizer(bos)), (EOS,))


@pytest.fixture(scope="module")
def qwen(shared_data):
    return Tokenizer(Backend.from_file(str(shared_data / "tokenizers/qwen3/tokenizer.json")), (151643,))


@pytest.mark.parametrize("number", range(5))
def test_a_set_is_numpys_shuffle_of_the_pool(number):
    rows = list(range(60))
    np.random.RandomState(number).shuffle(rows)
    episode = draw_episode(POOL, 8, number)
    assert episode.train == [POOL[i] for i in rows[:8]]
    assert episode.dev == [POOL[i] for i in rows[8:12]]
    assert draw_episode(POOL, 8, number, seed=1).train != episode.train


def test_the_first_set_is_pinned():
    assert [row.prompt.split()[1] for row in draw_episode(POOL, 4, 0).train] == ["26", "35", "59", "28"]


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
    assert len(episode.icl) == 1 and set(episode.icl[0]) == set(episode.train) and len(episode.icl[0]) == 6


def test_the_same_command_draws_the_same_set():
    a, b = (draw_episode(POOL, 6, 1, seed=3) for _ in range(2))
    assert a == b
    assert a.demonstrations != draw_episode(POOL, 6, 2, seed=3).demonstrations
    draws = [seeded(*key).integers(2**60) for key in [(0, 1, "a"), (0, 1, "a"), (0, 1, "b"), (0, 2, "a"), (1, 1, "a")]]
    assert draws[0] == draws[1] and len(set(draws)) == 4


def test_the_released_scripts_choices():
    plain, episode = draw_episode(POOL, 5, 1), draw_episode(POOL, 5, 1, pool_demos=7)
    assert (episode.train, episode.dev, episode.demonstrations) == (plain.train, plain.dev, plain.demonstrations)
    assert len(episode.icl) == 7 and len({tuple(seen) for seen in episode.icl}) == 7
    for seen in episode.icl:
        assert len(set(seen)) == 4 and not set(seen) & set(episode.train + episode.dev)
    reusing = draw_episode(POOL, 5, 1, reuse=True)
    assert reusing.demonstrations == plain.demonstrations[:5] + plain.demonstrations[:2]  # dev row j: training row j's
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


def test_answers_of_many_tokens_end_with_eos():
    example = Example("Q:", "ab", None)
    single, many = (truth_row(example, tokenizer(bos=True), single) for single in (True, False))
    assert single.prompt == many.prompt == tokenizer(bos=True).encode("Q:")
    assert tokenizer().decode(single.answer) == "ab" and many.answer == single.answer + [EOS]


def test_a_batch_written_out():
    runs = [[Row([10, 11, 12], [1, 2, 3]), Row([20], [4])], [Row([30, 31], [5]), Row([40, 41], [6, 7])]]
    for i, row in enumerate(row for run in runs for row in run):
        P = len(row.answer)
        row.activations = torch.arange(P).view(1, P, 1) + 10.0 * i
        row.soft, row.soft_ids = torch.arange(P)[:, None] + 0.5, torch.full((P, 1), i)
    batch = collate(runs)
    assert batch.ids.tolist() == [[10, 11, 12, 1, 2], [20, 0, 0, 0, 0], [30, 31, 0, 0, 0], [40, 41, 6, 0, 0]]
    rows, columns = batch.at
    assert rows.tolist() == [0, 0, 0, 1, 2, 3, 3, 2]  # the last stands on padding, within its run
    assert columns.tolist() == [2, 3, 4, 0, 1, 1, 2, 0]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    torch.testing.assert_close(batch.weights, torch.tensor([[1 / 6, 1 / 6, 1 / 6, 1 / 2], [1 / 2, 1 / 4, 1 / 4, 0]]))
    assert batch.activations[0, :7, 0].tolist() == [0, 1, 2, 10, 20, 30, 31] and batch.activations.shape == (1, 8, 1)
    assert batch.soft[:7, 0].tolist() == [0.5, 1.5, 2.5, 0.5, 0.5, 0.5, 1.5]
    assert batch.soft_ids[:7, 0].tolist() == [0, 0, 0, 1, 2, 3, 3] and len(batch.soft_ids) == 8
    assert batch.ids.dtype == rows.dtype == columns.dtype == batch.targets.dtype == torch.int64
    bare = collate([[Row([1], [2])]])
    assert bare.activations is bare.soft is bare.soft_ids is None and bare.ids.tolist() == [[1]]


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=3, max_size=3), min_size=1, max_size=3)
)
def test_every_position_of_a_batch_predicts_its_answer_token(shape):
    counter = iter(range(1, 10_000))
    runs = [
        [Row([next(counter) for _ in range(t)], [next(counter) for _ in range(p)]) for t, p in run] for run in shape
    ]
    batch = collate(runs)
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(len(runs)))
    real = batch.weights.flatten() > 0
    assert batch.targets[real].tolist() == [token for run in runs for row in run for token in row.answer]
    sequences = [row.prompt + row.answer for run in runs for row in run]
    for row, column, target in zip(*(x[real].tolist() for x in (*batch.at, batch.targets)), strict=True):
        assert sequences[row][column + 1] == target and batch.ids[row, column] == sequences[row][column]
    group = batch.at[0].view(len(runs), -1) // 3
    assert (group == torch.arange(len(runs))[:, None]).all()


def test_a_packed_batch_written_out(monkeypatch):
    runs = [[Row([10, 11], [1, 2]), Row([20], [4])], [Row([30], [5]), Row([40], [6])]]
    batch = collate(runs, pack=True)
    assert batch.ids.tolist() == [[10, 11, 1, 20], [30, 40, 0, 0]]
    assert batch.packed.places.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.packed.mask[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],  # the padding sees only itself
    ]
    assert [x.tolist() for x in batch.at] == [[0, 0, 0, 1, 1, 1], [1, 2, 3, 0, 1, 0]]
    assert collate([[Row([1], [2])]], pack=True).packed is None  # nothing to pack
    assert collate([[Row([1, 2], [3]), Row([4, 5], [6])]], pack=True).packed is None  # nothing saved
    monkeypatch.setattr(episode, "PACKED", 3)
    assert collate(runs, pack=True).packed is None  # too long a line


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_groups_of_similar_length_cover_all_rows_within_the_budget(lengths, budget):
    groups = by_length(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    ordered = [lengths[i] for group in groups for i in group]
    assert ordered == sorted(lengths, reverse=True)
    for group, following in zip(groups, groups[1:], strict=False):  # no room was left
        assert (len(group) + 1) * lengths[group[0]] > budget and following


@given(prompt=TEXT, answer=TEXT.filter(bool), shown=st.lists(st.tuples(TEXT, TEXT), max_size=3), bos=st.booleans())
def test_any_text_survives_template_tokenizer_and_batch(prompt, answer, shown, bos):
    assume(prompt or bos)
    text, bytes_only = with_demonstrations([Example(*pair) for pair in shown], prompt + "\nLabel:"), tokenizer(bos)
    row = truth_row(Example(text, answer), bytes_only, single=False)
    batch = collate([[row, Row([1] * 300, [1])]])
    ids = batch.ids[0, : len(row.prompt) + len(row.answer) - 1].tolist()
    assert bytes_only.decode(ids) == text + answer and row.answer[-1] == EOS
    assert bytes(b for b in text.encode()) == "\n\n".join([p + a for p, a in shown] + [prompt + "\nLabel:"]).encode()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, answer=TEXT.filter(bool))
def test_any_text_survives_a_real_tokenizer_or_is_named(qwen, prompt, answer):
    text = f"Text:{prompt}\nLabel:"
    try:
        row = truth_row(Example(text, answer), qwen, single=False)
    except UsageError as error:
        assert "merges" in str(error)
        assert qwen.encode(text + answer) != qwen.encode(text) + qwen.encode(answer)
    else:
        assert qwen.decode(row.prompt + row.answer) == unicodedata.normalize("NFC", text + answer)
