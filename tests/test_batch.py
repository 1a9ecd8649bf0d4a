"""Rows as ids and batches of them, written out by hand; any text survives; runs of unequal numbers of rows."""

import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ia2mini.models import load
from ia2mini.models.attention import Packed
from reference import (
    EOS,
    MIXES,
    byte_tokenizer,
    make_checkpoint,
    make_rows,
    peft_twin,
    plain_loss,
    relative,
    starts,
)
from tokenizers import Tokenizer as Backend

from ia2mini import UsageError
from ia2mini.adapters import IA3, LoRA, adapted
from ia2mini.batch import TokenRow, by_length, collate, truth_row
from ia2mini.episode import with_demonstrations
from ia2mini.scale import pack as packing
from ia2mini.scale.pack import ONE_BATCH_TOKENS, in_batches, pack
from ia2mini.tasks import Example
from ia2mini.tokenizer import Tokenizer
from ia2mini.train import Hooks, Runs, Settings, loss_over_batches, run_losses, train_runs

TEXT = st.text(max_size=30)


def tokenizer(bos=False) -> Tokenizer:
    return Tokenizer(Backend.from_str(byte_tokenizer(bos)), (EOS,))


@pytest.fixture(scope="module")
def qwen(shared_data):
    return Tokenizer(
        Backend.from_file(str(shared_data / "tokenizers/qwen3/tokenizer.json")), (151643,)
    )


def test_answers_of_many_tokens_end_with_eos():
    example = Example("Q:", "ab", None)
    single, many = (truth_row(example, tokenizer(bos=True), end) for end in (False, True))
    assert single.prompt == many.prompt == tokenizer(bos=True).encode("Q:")
    assert tokenizer().decode(single.answer) == "ab" and many.answer == single.answer + [EOS]


def test_a_batch_written_out():
    runs = [
        [TokenRow([10, 11, 12], [1, 2, 3]), TokenRow([20], [4])],
        [TokenRow([30, 31], [5]), TokenRow([40, 41], [6, 7])],
    ]
    for i, row in enumerate(row for run in runs for row in run):
        P = len(row.answer)
        row.activations = torch.arange(P).view(1, P, 1) + 10.0 * i
        row.soft, row.soft_ids = torch.arange(P)[:, None] + 0.5, torch.full((P, 1), i)
    batch = collate(runs)
    assert batch.ids.tolist() == [
        [10, 11, 12, 1, 2],
        [20, 0, 0, 0, 0],
        [30, 31, 0, 0, 0],
        [40, 41, 6, 0, 0],
    ]
    rows, columns = batch.at
    assert rows.tolist() == [0, 0, 0, 1, 2, 3, 3, 2]  # the last stands on padding, within its run
    assert columns.tolist() == [2, 3, 4, 0, 1, 1, 2, 0]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    torch.testing.assert_close(
        batch.weights, torch.tensor([[1 / 6, 1 / 6, 1 / 6, 1 / 2], [1 / 2, 1 / 4, 1 / 4, 0]])
    )
    assert batch.activations[0, :7, 0].tolist() == [
        0,
        1,
        2,
        10,
        20,
        30,
        31,
    ] and batch.activations.shape == (1, 8, 1)
    assert batch.soft[:7, 0].tolist() == [0.5, 1.5, 2.5, 0.5, 0.5, 0.5, 1.5]
    assert batch.soft_ids[:7, 0].tolist() == [0, 0, 0, 1, 2, 3, 3] and len(batch.soft_ids) == 8
    assert batch.ids.dtype == rows.dtype == columns.dtype == batch.targets.dtype == torch.int64
    bare = collate([[TokenRow([1], [2])]])
    assert bare.activations is bare.soft is bare.soft_ids is None and bare.ids.tolist() == [[1]]


LENGTHS = st.tuples(st.integers(1, 6), st.integers(1, 5))


@given(
    st.lists(st.lists(LENGTHS, min_size=3, max_size=3), min_size=1, max_size=3)
    | st.lists(st.lists(LENGTHS, min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_every_position_of_a_batch_predicts_its_answer_token(shape):
    counter = iter(range(1, 10_000))
    runs = [
        [
            TokenRow([next(counter) for _ in range(t)], [next(counter) for _ in range(p)])
            for t, p in run
        ]
        for run in shape
    ]
    batch = collate(runs)
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(len(runs)))
    real = batch.weights.flatten() > 0
    assert batch.targets[real].tolist() == [
        token for run in runs for row in run for token in row.answer
    ]
    most = max(map(len, runs))  # shorter runs are padded with empty rows
    sequences = {
        r * most + i: row.prompt + row.answer
        for r, run in enumerate(runs)
        for i, row in enumerate(run)
    }
    for row, column, target in zip(
        *(x[real].tolist() for x in (*batch.at, batch.targets)), strict=True
    ):
        assert (
            sequences[row][column + 1] == target
            and batch.ids[row, column] == sequences[row][column]
        )
    assert len(batch.ids) == most * len(runs)
    for weights, run in zip(batch.weights.tolist(), runs, strict=True):
        expected = [1 / len(row.answer) / len(run) for row in run for _ in row.answer]
        assert weights == pytest.approx(expected + [0] * (len(weights) - len(expected)))
    group = batch.at[0].view(len(runs), -1) // most
    assert (group == torch.arange(len(runs))[:, None]).all()


def test_a_packed_batch_written_out(monkeypatch):
    runs = [
        [TokenRow([10, 11], [1, 2]), TokenRow([20], [4])],
        [TokenRow([30], [5]), TokenRow([40], [6])],
    ]
    batch = pack(collate(runs))
    assert batch.ids.tolist() == [[10, 11, 1, 20], [30, 40, 0, 0]]
    assert batch.packed.places.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.packed.mask[:, 0].int().tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],  # the padding sees only itself
    ]
    assert [x.tolist() for x in batch.at] == [[0, 0, 0, 1, 1, 1], [1, 2, 3, 0, 1, 0]]
    assert pack(collate([[TokenRow([1], [2])]])).packed is None  # nothing to pack
    assert (
        pack(collate([[TokenRow([1, 2], [3]), TokenRow([4, 5], [6])]])).packed is None
    )  # nothing saved
    monkeypatch.setattr(packing, "MOST_TOKENS", 3)
    assert pack(collate(runs)).packed is None  # too long a line


def test_batches_of_unequal_runs_written_out():
    runs = [
        [TokenRow([10, 11], [1, 2]), TokenRow([20], [3]), TokenRow([30], [4])],
        [TokenRow([40, 41], [5])],
        [TokenRow([50], [6]), TokenRow([60], [7])],
    ]
    padded = collate(runs)
    packed = pack(padded)
    assert padded.ids.tolist() == [
        *([10, 11, 1], [20, 0, 0], [30, 0, 0]),
        *([40, 41, 0], [0, 0, 0], [0, 0, 0]),
        *([50, 0, 0], [60, 0, 0], [0, 0, 0]),
    ]
    # no weight: in the run's first row
    assert padded.at[0].tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 6, 7, 6, 6]
    assert packed.ids.tolist() == [[10, 11, 1, 20, 30], [40, 41, 0, 0, 0], [50, 60, 0, 0, 0]]
    assert packed.at[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for batch in (padded, packed):
        expected = torch.tensor([[1 / 6, 1 / 6, 1 / 3, 1 / 3], [1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0]])
        torch.testing.assert_close(batch.weights, expected)
        assert batch.targets.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 0, 0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=2)
    return folder, load(folder)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", [LoRA, IA3])
def test_runs_of_unequal_numbers_of_rows_have_the_loss_they_have_alone(
    tiny, monkeypatch, kind, mix, packed
):
    """And the gradient; and the loss of transformers, row by row."""
    monkeypatch.setattr(packing, "WORTH_PACKING", 2)  # always
    folder, model = tiny
    adapter, counts = kind(model), (3, 1, 4, 2)
    runs = [make_rows(count, 10 + r) for r, count in enumerate(counts)]
    theta = (starts(adapter, model, 4) + 0.05 * torch.randn(4, 1)).requires_grad_()

    def together(runs, theta):
        batch = pack(collate(runs)) if packed else collate(runs)
        assert (batch.packed is not None) == packed
        with adapted(model, adapter, theta) as student:
            found = run_losses(
                student,
                batch,
                {name: torch.full((len(runs),), w) for name, w in MIXES[mix].items()},
            )
            return found.detach(), torch.autograd.grad(found.sum(), theta)[0]

    found, gradient = together(runs, theta)
    for r, run in enumerate(runs):
        alone, expected = together([run], theta[r : r + 1])
        assert found[r].item() == pytest.approx(alone.item(), rel=1e-5)
        assert relative(gradient[r], expected[0]) <= 1e-5
        with torch.no_grad():
            twin = peft_twin(folder, adapter, theta[r])
            plain = sum(plain_loss(twin, row, MIXES[mix]).item() for row in run) / len(run)
        assert found[r].item() == pytest.approx(plain, rel=1e-5)


def uneven(runs: int, rows: int, long: int, seed: int = 0) -> list[list[TokenRow]]:
    """Runs of short rows, in each of which one has `long` further tokens."""
    found = [make_rows(rows, seed + r) for r in range(runs)]
    for r, some in enumerate(found):
        some[r % rows].prompt[:0] = [7] * long
    return found


@pytest.mark.parametrize("mix", MIXES)
def test_a_long_row_among_short_ones_has_batches_of_its_own_and_the_same_loss(tiny, mix):
    """And the gradient of every run; no batch is much longer than what it holds."""
    _, model = tiny
    adapter, runs = LoRA(model), uneven(6, 4, 1100)
    theta = starts(adapter, model, 6) + 0.05 * torch.randn(6, 1)
    weights = {name: torch.linspace(0.5, 1, 6) * w for name, w in MIXES[mix].items()}
    found = []
    for batches in (in_batches(runs), [collate(runs)]):
        leaf = theta.clone().requires_grad_()
        for batch in batches:
            with adapted(model, adapter, batch.of_runs(leaf)) as student:
                run_losses(student, batch, weights).sum().backward()
        found.append((loss_over_batches(model, adapter, theta, batches, weights, None), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert relative(one, other) <= 1e-5
    sizes = [batch.ids.numel() for batch in in_batches(runs)]
    assert max(sizes) <= ONE_BATCH_TOKENS and len(sizes) > 1
    assert collate(runs).ids.numel() > 6 * ONE_BATCH_TOKENS


@given(st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=4), min_size=1, max_size=8))
def test_however_uneven_rows_are_batches_hold_each_once_and_little_else(lengths):
    counter = iter(range(10**9))
    runs = [[TokenRow([next(counter) for _ in range(n)], [1]) for n in some] for some in lengths]
    total = sum(map(sum, lengths))
    batches = in_batches(runs)
    weights = torch.zeros(len(runs))
    for batch in batches:
        which = torch.arange(len(runs)) if batch.runs is None else batch.runs
        weights.index_add_(0, which, batch.weights.sum(1))
    torch.testing.assert_close(weights, torch.ones(len(runs)))
    kept = [[row.prompt[-1] for row in run] for run in runs]
    seen = []
    for batch in batches:
        real = batch.weights.flatten() > 0
        seen += batch.ids[batch.at[0][real], batch.at[1][real]].tolist()
    assert sorted(seen) == sorted(sum(kept, []))
    longest = max(map(max, lengths))
    for batch in batches:
        assert batch.ids.numel() <= max(4 * ONE_BATCH_TOKENS, longest, len(runs) * 512, 8 * total)


def test_training_with_a_long_row_gives_what_whole_batches_give(tiny):
    _, model = tiny
    adapter, runs = LoRA(model), uneven(3, 4, 1100)
    rates, weights = torch.tensor([1e-2, 3e-2, 1e-3]), {"ce": torch.ones(3)}
    given = Runs(
        starts(adapter, model, 3),
        rates,
        runs,
        uneven(3, 2, 1100, 9),
        weights,
        [lambda epoch: range(4)] * 3,
    )
    settings = Settings(batch_size=2, epochs=2)
    found = train_runs(model, adapter, given, settings, Hooks(in_batches))
    whole = train_runs(model, adapter, given, settings)
    assert torch.equal(found.steps, whole.steps)
    torch.testing.assert_close(found.dev_loss, whole.dev_loss, rtol=1e-4, atol=1e-5)
    assert relative(found.theta, whole.theta) <= 1e-3


def test_runs_of_unequal_numbers_of_dev_rows_train_as_alone(tiny):
    _, model = tiny
    adapter, settings, mix = (
        LoRA(model),
        Settings(batch_size=2, epochs=6, patience=2),
        {"mse": 0.3, "ce": 0.7},
    )
    theta, rates = starts(adapter, model, 3), torch.tensor([1e-1, 1e-2, 3e-2])
    train, dev = [make_rows(4, r) for r in range(3)], [make_rows(n, 50 + n) for n in (2, 1, 5)]

    def trained(runs):
        rows = [[data[r] for r in runs] for data in (train, dev)]
        weights = {name: torch.full((len(runs),), w) for name, w in mix.items()}
        orders = [lambda epoch: [0, 1, 2, 3]] * len(runs)
        given = Runs(theta[runs], rates[runs], *rows, weights, orders)
        return train_runs(model, adapter, given, settings, Hooks(in_batches))

    together = trained([0, 1, 2])
    for r in range(3):
        alone = trained([r])
        assert (
            together.steps[r] == alone.steps[0]
            and relative(together.theta[r], alone.theta[0]) <= 1e-5
        )
        assert together.dev_loss[r].item() == pytest.approx(alone.dev_loss[0].item(), rel=1e-5)


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


@given(
    prompt=TEXT,
    answer=TEXT.filter(bool),
    shown=st.lists(st.tuples(TEXT, TEXT), max_size=3),
    bos=st.booleans(),
)
def test_any_text_survives_template_tokenizer_and_batch(prompt, answer, shown, bos):
    assume(prompt or bos)
    text, bytes_only = (
        with_demonstrations([Example(*pair) for pair in shown], prompt + "\nLabel:"),
        tokenizer(bos),
    )
    row = truth_row(Example(text, answer), bytes_only, end=True)
    batch = collate([[row, TokenRow([1] * 300, [1])]])
    ids = batch.ids[0, : len(row.prompt) + len(row.answer) - 1].tolist()
    assert bytes_only.decode(ids) == text + answer and row.answer[-1] == EOS
    assert (
        bytes(b for b in text.encode())
        == "\n\n".join([p + a for p, a in shown] + [prompt + "\nLabel:"]).encode()
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, answer=TEXT.filter(bool))
def test_any_text_survives_a_real_tokenizer_and_a_label_that_merges_is_named(qwen, prompt, answer):
    text = f"Text:{prompt}\nLabel:"
    row = truth_row(Example(text, answer), qwen, end=True)
    apart = unicodedata.normalize("NFC", text) + unicodedata.normalize("NFC", answer)
    assert row.prompt == qwen.encode(text)
    assert qwen.decode(row.prompt + row.answer) in (
        apart,
        unicodedata.normalize("NFC", text + answer),
    )
    try:
        labelled = truth_row(Example(text, answer, 0), qwen, end=True)
    except UsageError as error:
        assert "merges" in str(error)
        assert qwen.encode(text + answer) != row.prompt + row.answer[:-1]
    else:
        assert labelled == row


def test_what_goes_to_a_gpu_is_pinned_first(monkeypatch):
    """Else a copy that claims not to block does."""
    pinned, sent = [], []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor
    )
    plain = torch.Tensor.to

    def to(tensor, *where, **how):
        if where and str(where[0]) == "cuda":
            sent.append((tensor.data_ptr(), how))
            return tensor
        return plain(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    rows = [[TokenRow([1, 2, 3], [4]), TokenRow([1], [2, 3])]]
    batch = pack(collate(rows)).to(torch.device("cuda"))
    assert sent == [(address, {"non_blocking": True}) for address in pinned] and len(sent) >= 5
    assert batch.ids.data_ptr() in pinned
    pinned.clear()
    pack(collate(rows)).to(torch.device("cpu"))
    assert not pinned


def test_a_tree_of_labels_keeps_its_branches_on_another_device():
    sees = torch.tensor([[True, False], [True, True]])
    packed = Packed(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]]), sees)
    moved = packed.to(lambda tensor: tensor.clone())
    assert moved.sees is not sees and torch.equal(moved.mask, packed.mask)
    assert Packed(packed.documents, packed.places).to(torch.clone).sees is None
