"""Greedy generation against transformers on a real checkpoint, stop texts anywhere, the teacher token by token."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from ia2mini.models import load
from reference import EOS, make_checkpoint, random_ids, upstream, upstream_pass
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import ia2mini.teacher
from ia2mini.adapters import IA3, LoRA, adapted
from ia2mini.batch import TokenRow, by_length, truth_row
from ia2mini.episode import Episode, with_demonstrations
from ia2mini.generate import Decoding, DecodingHooks, before_stop, generate
from ia2mini.scale.decode import fast_decoding, who_stays
from ia2mini.tasks import Example
from ia2mini.teacher import Taught, TeacherSettings, record_targets, teach
from ia2mini.tokenizer import Tokenizer

CPU = torch.device("cpu")
HOOKS = {
    "plain": DecodingHooks(),
    "rows leave at once": DecodingHooks(who_stays=who_stays),
    "half of them at once": DecodingHooks(None, True, partial(who_stays, by_halves=True)),
}
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her big red ball "
    "and her dog."
)


@pytest.fixture(scope="module")
def story(shared_data):
    """(our model, tokenizer, 50 prompts of 1 to 25 tokens, transformers' 24 greedy tokens for each)."""
    folder = shared_data / "checkpoints/stories260k"
    (model, tokenizer), net = load(folder), upstream(folder)
    ids, g, eos = (
        tokenizer.encode(STORY),
        torch.Generator().manual_seed(1),
        tokenizer.encode("it was")[-1],
    )
    places = [
        [int(torch.randint(0, high, (), generator=g)) for high in (25, 25)] for _ in range(50)
    ]
    prompts = [ids[:1] + ids[1 + at : 1 + at + length] for at, length in places]
    expected = [None] * 50
    for length in {len(p) for p in prompts}:  # equal lengths together: no padding
        same = [i for i, p in enumerate(prompts) if len(p) == length]
        batch = torch.tensor([prompts[i] for i in same])
        tokens = {"max_new_tokens": 24, "eos_token_id": eos, "pad_token_id": 0}
        found = net.generate(
            batch, attention_mask=torch.ones_like(batch), do_sample=False, **tokens
        )
        for i, row in zip(same, found[:, length:].tolist(), strict=True):
            expected[i] = row[: row.index(eos)] if eos in row else row
    return model, Tokenizer(tokenizer.backend, (eos,)), prompts, expected


@pytest.mark.parametrize("hooks", HOOKS)
def test_fifty_prompts_in_one_batch_equal_transformers(story, hooks):
    model, tokenizer, prompts, expected = story
    assert len({len(p) for p in prompts}) > 10 and len({len(e) for e in expected}) > 2, (
        "unequal prompts, some of which meet EOS"
    )
    how, batches = Decoding(24, stop=None, hooks=HOOKS[hooks]), []
    assert generate(model, tokenizer, prompts, how, batches.append) == expected
    assert batches == [50]
    assert generate(model, tokenizer, prompts, replace(how, budget=200), batches.append) == expected
    assert len(batches) > 5 and sum(batches) == 100
    assert generate(model, tokenizer, prompts[:5], replace(how, max_tokens=3)) == [
        e[:3] for e in expected[:5]
    ]


def test_rows_stop_where_the_text_of_the_whole_answer_is_cut(story):
    model, tokenizer, prompts, expected = story
    stop = ". "
    found = generate(model, tokenizer, prompts, Decoding(24, stop))
    begun = [len(tokenizer.decode(p)) for p in prompts]
    texts = [tokenizer.decode(p + e)[n:] for p, e, n in zip(prompts, expected, begun, strict=True)]
    assert 5 < sum(stop in text for text in texts) < 50
    assert [tokenizer.decode(p + f)[n:] for p, f, n in zip(prompts, found, begun, strict=True)] == [
        t.split(stop)[0] for t in texts
    ]


class Chain(torch.nn.Module):
    """A model whose next token follows from the last one alone; notes the rows of each call."""

    def __init__(self, following: dict[int, int]):
        super().__init__()
        self.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(300, 4)})
        self.config = type(
            "Config", (), {"num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 1}
        )
        self.table, self.rows = torch.tensor([following.get(i, i) for i in range(300)]), []

    def forward(self, ids, cache=None, logits=True, taps=None):
        self.rows.append(len(ids))
        cache.positions(ids.shape[1], ids.device)
        return torch.nn.functional.one_hot(self.table[ids], 300).float()[logits]


def newline_tokenizer() -> tuple[dict[str, int], str, Tokenizer]:
    """(vocabulary, the newline as it writes it, tokenizer) of a byte-level BPE with merges over newlines."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    n = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n")[0][
        0
    ]
    merges = [(n, n), ("a", n), ("a" + n, n), ("b", n + n), (n, "c")]
    vocabulary = {
        token: i
        for i, token in enumerate(
            letters + ["".join(pair) for pair in merges] + ["ab" + n + n + "c"]
        )
    }
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    return vocabulary, n, Tokenizer(backend, (299,))


@pytest.mark.parametrize(
    "tokens, kept, before",
    [
        ("x NN", 1, "x"),  # a token of its own
        ("x N N", 1, "x"),  # spanning two tokens
        ("x bNN", 1, "xb"),  # at the end of a token
        ("x aN Nc", 1, "xa"),  # begun in one token, completed inside the next
        ("x abNNc", 1, "xab"),  # inside a token
        ("x N NN", 1, "x"),  # the first two of three newlines
        ("x é0 é1 NN", 3, "xé"),  # after a character of two tokens
        ("NN", 0, ""),
        ("x N c", None, None),
        ("x Nc N", None, None),
        ("N", None, None),
    ],
)
def test_a_stop_text_wherever_it_falls(tokens, kept, before):
    vocabulary, n, tokenizer = newline_tokenizer()
    names = (
        tokens.replace("N", n).replace("é0", "Ã").replace("é1", "©").split()
    )  # the bytes of é, as byte-level BPE writes them
    ids = [vocabulary[name] for name in names]
    found = before_stop(tokenizer, ids, "\n\n")
    assert found is before is None or (
        tokenizer.decode(found) == before and found[:kept] == ids[:kept]
    )


def test_a_stop_text_inside_a_token_of_sentencepiece_adds_no_blank(story):
    """Such a tokenizer writes a blank before every text, also before the part of a token that is left."""
    tokenizer = story[1]
    ids = tokenizer.encode(STORY, special=False)
    told = tokenizer.decode(ids)
    for start in range(0, len(told), 3):
        for length in (1, 2, 5):
            stop = told[start : start + length]
            found = None
            read = 0
            while found is None:
                read += 1
                found = before_stop(tokenizer, ids[:read], stop)
            assert tokenizer.decode(found) == told[: told.index(stop)], stop


def test_finished_rows_leave_the_batch():
    vocabulary, n, tokenizer = newline_tokenizer()
    a, b, c, new, both, eos = (
        vocabulary["a"],
        vocabulary["b"],
        vocabulary["c"],
        vocabulary[n],
        vocabulary[n + n],
        299,
    )
    model = Chain({200: a, a: eos, 201: b, b: both, 202: c, c: c, 203: eos, 204: new, new: new})
    watched = []
    prompts, how = (
        [[200], [9, 201], [202], [8, 8, 203], [204]],
        Decoding(6, hooks=fast_decoding(CPU, 6)),
    )
    found = generate(model, tokenizer, prompts, how, watched.append)
    assert found == [[a], [b], [c] * 6, [], []]
    assert model.rows == [5, 4, 1, 1, 1, 1] and watched == [5]
    model.rows.clear()
    assert generate(model, tokenizer, prompts, Decoding(6)) == found and model.rows == [5] * 6, (
        "plainly, all stay"
    )
    model.rows.clear()
    halves = replace(how, hooks=HOOKS["half of them at once"])
    assert generate(model, tokenizer, prompts, halves) == found and model.rows == [5, 5, 1, 1, 1, 1]
    assert generate(model, tokenizer, [[204]], Decoding(4, stop=None)) == [[new] * 4]


def naive(student, prompt, tokens):
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(student(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return folder, *load(folder)


@pytest.mark.parametrize("kind", [LoRA, IA3])
def test_generation_under_an_adapter_equals_the_uncached_one(tiny, kind):
    _, model, tokenizer = tiny
    adapter = kind(model)
    theta = adapter.init(torch.Generator().manual_seed(0))[None]
    theta += 0.1 * torch.randn(theta.shape)
    prompts = [random_ids(length).tolist() for length in (5, 2, 9)]
    with adapted(model, adapter, theta) as student:
        found = generate(student, Tokenizer(tokenizer.backend, ()), prompts, Decoding(8, stop=None))
        assert found == [naive(student, p, 8) for p in prompts]
    assert found != [naive(model, p, 8) for p in prompts]


@pytest.mark.parametrize("kind", [LoRA, IA3])
@pytest.mark.parametrize("budget", [16384, 60])
@pytest.mark.parametrize("hooks", HOOKS)
def test_runs_side_by_side_answer_as_each_alone(tiny, kind, budget, hooks):
    """Rows of every run end at other steps, so that runs have unequally many left; a run's answers stay its own."""
    _, model, tokenizer = tiny
    adapter = kind(model)
    theta = torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(3)])
    theta += 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(0))
    prompts, alone, how = (
        [random_ids(length).tolist() for length in (5, 2, 9, 4, 7)],
        [],
        Decoding(12, stop=None),
    )
    free = Tokenizer(tokenizer.backend, ())
    with adapted(model, adapter, theta[:1]) as student:
        answers = generate(student, free, prompts, how)
    ending = Tokenizer(tokenizer.backend, tuple({answers[0][2], answers[1][5], answers[3][0]}))
    for r in range(3):
        with adapted(model, adapter, theta[r : r + 1]) as student:
            alone += generate(student, ending, prompts, how)
    assert len({len(answer) for answer in alone}) > 2
    watched, together = [], Decoding(12, None, budget, runs=3, hooks=HOOKS[hooks])
    with adapted(model, adapter, theta) as student:
        assert generate(student, ending, prompts, together, watched.append) == alone
    assert sum(watched) == 5 and (len(watched) > 1) == (budget == 60)


def small_episode(n=3, dev=2) -> Episode:
    rows = [
        Example(f"Text:{'long ' * i}row {i}\nLabel:", str(i % 2), i % 2) for i in range(n + dev)
    ]
    shown = [[r for r in rows[:n] if r != row][: n - 1] for row in rows]
    return Episode(rows[:n], rows[n:], shown, [rows[:n]])


def said_by(taught: Taught) -> list[TokenRow]:
    """The rows with the teacher's responses."""
    return taught.icl_train + taught.icl_dev


def naive_teacher(net, tokenizer, demonstrations, prompt, most, eos):
    """Response, attention outputs [L, P, D] and log-probabilities [P, V]: one whole forward pass a token."""
    ids, answer, outputs, distributions = (
        tokenizer.encode(with_demonstrations(demonstrations, prompt)),
        [],
        [],
        [],
    )
    for _ in range(most):
        logits, attention = upstream_pass(net, torch.tensor([ids + answer]))
        answer.append(logits[0, -1].argmax().item())
        outputs.append(attention[:, 0, -1])
        distributions.append(logits[0, -1].log_softmax(0))
        if answer[-1] == eos:
            break
    return answer, torch.stack(outputs, 1), torch.stack(distributions)


@pytest.mark.parametrize("most, k", [(1, None), (1, 7), (6, 7), (6, 10_000), (6, None)])
def test_the_teacher_in_one_pass_equals_one_pass_a_token(tiny, most, k):
    folder, model, tokenizer = tiny
    episode, net = small_episode(), upstream(folder)
    shown_rows = list(zip(episode.demonstrations, episode.train + episode.dev, strict=True))
    plain = [
        naive_teacher(net, tokenizer, shown, example.prompt, 6, None)[0]
        for shown, example in shown_rows
    ]
    said = [token for answer in plain for token in answer]
    eos = max(
        said, key=lambda t: len({a.index(t) if t in a else 9 for a in plain})
    )  # a token that ends rows in different places
    sizes, watched, budget = set(), [], 300 if most == 1 else 75
    reader, asked = (
        Tokenizer(tokenizer.backend, (eos,)),
        TeacherSettings(most, k, stop=None, budget=budget),
    )
    taught = teach(model, reader, episode, asked, watched.append)
    assert taught.train + taught.dev == [
        truth_row(example, reader, most > 1) for _, example in shown_rows
    ]
    assert (len(taught.train), len(taught.dev), len(taught.icl_train), len(taught.icl_dev)) == (
        3,
        2,
        3,
        2,
    )
    rows = said_by(taught)
    for row, (shown, example) in zip(rows, shown_rows, strict=True):
        answer, outputs, distributions = naive_teacher(
            net, tokenizer, shown, example.prompt, most, eos
        )
        assert row.prompt == tokenizer.encode(example.prompt) and row.answer == answer
        assert (
            row.activations - outputs
        ).abs().max() <= 1e-4 and row.activations.shape == outputs.shape
        sizes.add(len(answer))
        if k is None:
            assert row.soft is row.soft_ids is None
            continue
        top, ids = distributions.topk(min(k, distributions.shape[1]))
        assert (row.soft - top).abs().max() <= 1e-4
        if k == 7:
            assert torch.equal(row.soft_ids, ids)
        assert (distributions.gather(1, row.soft_ids) - row.soft).abs().max() <= 1e-4
        assert (row.soft_ids.sort().values == ids.sort().values).all()
    assert sum(watched) == 5 and len(watched) > 1, "several passes"
    assert most == 1 or len(sizes) > 1


def test_the_teachers_response_ends_before_the_stop_text_and_with_eos(tiny):
    _, model, tokenizer = tiny
    episode = small_episode()
    whole = said_by(
        teach(model, Tokenizer(tokenizer.backend, ()), episode, TeacherSettings(6, stop=None))
    )
    stop = next(
        tokenizer.decode(row.answer[3:4])
        for row in whole
        if tokenizer.decode(row.answer[3:4]).isascii()
    )
    rows = said_by(teach(model, tokenizer, episode, TeacherSettings(6, stop=stop or None)))
    for row, long in zip(rows, whole, strict=True):
        cut = next((i for i in range(6) if stop in tokenizer.decode(long.answer[i : i + 1])), None)
        assert row.answer == (long.answer if cut is None else long.answer[:cut] + [EOS])
        assert row.activations.shape[1] == len(row.answer)
    assert any(len(row.answer) < 6 for row in rows)


def test_a_response_that_is_tokenized_again_gets_a_pass_of_its_own(tiny, monkeypatch):
    _, model, tokenizer = tiny

    def again(*args):
        responses = generate(*args)
        return [responses[0][:1] + [7, 8], *responses[1:]]

    usual = said_by(teach(model, tokenizer, small_episode(), TeacherSettings(6, 5, stop=None)))
    monkeypatch.setattr(ia2mini.teacher, "generate", again)
    rows = said_by(teach(model, tokenizer, small_episode(), TeacherSettings(6, 5, stop=None)))
    shown = tokenizer.encode(
        with_demonstrations(small_episode().demonstrations[0], small_episode().train[0].prompt)
    )
    plain = TokenRow(rows[0].prompt, usual[0].answer[:1] + [7, 8, EOS])
    record_targets(model, [plain], [shown], TeacherSettings(6, soft_k=5))
    assert rows[0].answer == plain.answer
    for name in ("activations", "soft"):
        torch.testing.assert_close(getattr(rows[0], name), getattr(plain, name), rtol=0, atol=1e-5)
        for a, b in zip(rows[1:], usual[1:], strict=True):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_the_teacher_notes_only_the_chosen_layers(tiny):
    _, model, tokenizer = tiny
    whole, some = (
        said_by(teach(model, tokenizer, small_episode(), TeacherSettings(layers=x)))
        for x in (None, [2, 0])
    )
    for a, b in zip(whole, some, strict=True):
        torch.testing.assert_close(a.activations[[2, 0]], b.activations, rtol=0, atol=1e-6)


def test_the_teacher_reads_the_demonstrations(tiny):
    _, model, tokenizer = tiny
    episode = small_episode()
    bare = Episode(episode.train, episode.dev, [[]] * 5, episode.icl)
    both = (said_by(teach(model, tokenizer, e)) for e in (episode, bare))
    for shown, alone in zip(*both, strict=True):
        assert (shown.activations - alone.activations).abs().max() > 1e-2
    assert by_length([3, 1, 2], 6) == [[0, 2], [1]]
