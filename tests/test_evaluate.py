"""Scores and activation similarity against naive loops over transformers, runs side by side, a shared prefix."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ia2mini.models import load
from reference import VOCABULARY, make_checkpoint, peft_twin, upstream, upstream_pass

from ia2mini import prefix
from ia2mini.adapters import IA3, LoRA, adapted
from ia2mini.batch import TokenRow, by_length, collate, join_groups
from ia2mini.episode import with_demonstrations
from ia2mini.generate import Decoding, generate
from ia2mini.labels import Scoring, label_scores
from ia2mini.prefix import share_prefix
from ia2mini.study.asim import layer_asim, summed_asim
from ia2mini.tasks import Example
from ia2mini.teacher import TeacherSettings, record_targets

LABELS = [[48], [70], [49]]
# a label for every token: one of them is always the top
EVERY = [[token] for token in reversed(range(VOCABULARY))]
ADAPTERS = {"lora": LoRA, "ia3": IA3, "ia3-inputs": lambda m: IA3(m, scale_inputs=True)}
IDS = torch.Generator().manual_seed(0)
PROMPTS = [
    torch.randint(0, 256, (length,), generator=IDS).tolist() for length in (4, 11, 7, 7, 1, 9, 2)
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = make_checkpoint(
        tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=2
    )
    return folder, *load(folder)


def trained(model, kind, runs):
    adapter = ADAPTERS[kind](model)
    theta = torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(runs)])
    return adapter, theta + 0.1 * torch.randn(
        theta.shape, generator=torch.Generator().manual_seed(1)
    )


def check_scores(scores, run, net, prompts, labels, among=None):
    """Of labels of one token."""
    for q, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = net(torch.tensor([prompt])).logits[0, -1].tolist()
        e = [2.718281828459045 ** (x - max(logits)) for x in logits]
        top = logits.index(max(logits))
        assert scores.top[run, q] == (labels.index([top]) if [top] in labels else -1)
        confidence = e[top] / sum(sorted(e)[-among:] if among else e)
        assert scores.confidence[run, q].item() == pytest.approx(confidence, abs=1e-5)
        assert scores.log_probabilities.exp()[run, q].tolist() == pytest.approx(
            [e[i] / sum(e) for (i,) in labels], abs=1e-5
        )


@pytest.mark.parametrize("labels", [LABELS, EVERY], ids=["three", "every"])
@pytest.mark.parametrize("budget, among", [(8192, None), (1, None), (20, 10)])
def test_scores_equal_a_naive_loop(tiny, budget, among, labels):
    folder, model, _ = tiny
    watched = []
    scores = label_scores(
        model, PROMPTS, labels, Scoring(top_k=among, budget=budget), watched.append
    )
    check_scores(scores, 0, upstream(folder), PROMPTS, labels, among)
    assert sum(watched) == len(PROMPTS) and len(watched) == {8192: 1, 1: 7, 20: 4}[budget]
    assert scores.top.shape == (1, 7) and scores.log_probabilities.exp().shape == (
        1,
        7,
        len(labels),
    )


@pytest.mark.parametrize("among", [None, 10])
def test_labels_of_one_token_are_read_off_the_last_position_to_the_bit(tiny, among):
    """As they were before labels could have several tokens."""
    _, model, _ = tiny
    adapter, theta = trained(model, "lora", 3)
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        scores = label_scores(student, PROMPTS, EVERY, Scoring(3, among, budget=60))
        for group in by_length([len(p) for p in PROMPTS], 20):
            batch = collate([[TokenRow(PROMPTS[i], [0]) for i in group]] * 3)
            logits = student(batch.ids, logits=batch.at).float().view(3, len(group), -1)
            total, best = logits.logsumexp(-1, keepdim=True), logits.max(-1)
            whole = total[..., 0] if among is None else logits.topk(among).values.logsumexp(-1)
            assert torch.equal(VOCABULARY - 1 - scores.top[:, group], best.indices)
            assert torch.equal(scores.confidence[:, group], (best.values - whole).exp())
            assert torch.equal(
                scores.log_probabilities.exp()[:, group].flip(-1), (logits - total).exp()
            )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_run_scores_as_its_own_model_does(tiny, kind):
    folder, model, _ = tiny
    adapter, theta = trained(model, kind, 3)
    with adapted(model, adapter, theta) as student:
        scores, every = (
            label_scores(student, PROMPTS, labels, Scoring(3, budget=60))
            for labels in (LABELS, EVERY)
        )
    for r in (0, 2):
        twin = peft_twin(folder, adapter, theta[r])
        check_scores(scores, r, twin, PROMPTS, LABELS)
        check_scores(every, r, twin, PROMPTS, EVERY)
    assert not torch.equal(scores.confidence[0], scores.confidence[1])


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(len(PROMPTS))), budget=st.integers(1, 80))
def test_any_order_of_rows_gives_the_same_scores(tiny, order, budget):
    _, model, _ = tiny
    labels = EVERY + [[5, 6], [5, 7, 8]]
    expected = label_scores(model, PROMPTS, labels)
    found = label_scores(model, [PROMPTS[i] for i in order], labels, Scoring(budget=budget))
    assert torch.equal(found.top, expected.top[:, order])
    torch.testing.assert_close(found.confidence, expected.confidence[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.log_probabilities.exp(), expected.log_probabilities.exp()[:, order], rtol=0, atol=1e-5
    )


DEMONSTRATIONS = [Example(f"Text:example {i} of some\nLabel:", str(i % 2), i % 2) for i in range(3)]
QUERIES = ["Text:a film\nLabel:", "Text:another, longer one\nLabel:", "Text:x\nLabel:"]


def test_demonstrations_computed_once_equal_whole_prompts(tiny):
    _, model, tokenizer = tiny
    whole = [tokenizer.encode(with_demonstrations(DEMONSTRATIONS, q)) for q in QUERIES]
    student, rest = share_prefix(model, tokenizer, [DEMONSTRATIONS], QUERIES)
    assert [len(w) - len(r) for w, r in zip(whole, rest, strict=True)] == [
        student.keywords["prefix"].length
    ] * 3
    bos = len(tokenizer.encode(""))
    shown = "\n\n".join(d.prompt + d.answer for d in DEMONSTRATIONS) + "\n\nText:"
    assert student.keywords["prefix"].length == bos + len(shown)
    assert all(w[-len(r) :] == r for w, r in zip(whole, rest, strict=True))
    expected, found = label_scores(model, whole, EVERY), label_scores(student, rest, EVERY)
    assert torch.equal(expected.top, found.top)
    assert (expected.confidence - found.confidence).abs().max() <= 1e-5
    assert (expected.log_probabilities.exp() - found.log_probabilities.exp()).abs().max() <= 1e-5
    how = Decoding(6, stop=None)
    assert generate(student, tokenizer, rest, how) == generate(model, tokenizer, whole, how)
    answers = [[1, 2], [3], [4, 5, 6]]
    targets = [
        [TokenRow(p, a) for p, a in zip(prompts, answers, strict=True)] for prompts in (whole, rest)
    ]
    record_targets(model, targets[0], whole, TeacherSettings(9))
    record_targets(student, targets[1], rest, TeacherSettings(9))
    assert all(
        (a.activations - b.activations).abs().max() <= 1e-5 for a, b in zip(*targets, strict=True)
    )


def test_one_query_keeps_its_last_token(tiny):
    _, model, tokenizer = tiny
    student, rest = share_prefix(model, tokenizer, [DEMONSTRATIONS], QUERIES[:1])
    whole = tokenizer.encode(with_demonstrations(DEMONSTRATIONS, QUERIES[0]))
    assert rest == [whole[-1:]]
    for labels in (LABELS, [[1, 2, 3], [1, 4]]):
        found, expected = label_scores(student, rest, labels), label_scores(model, [whole], labels)
        torch.testing.assert_close(
            found.log_probabilities.exp(), expected.log_probabilities.exp(), rtol=0, atol=1e-5
        )


def test_demonstrations_a_query_stay_whole(tiny, monkeypatch):
    _, model, tokenizer = tiny
    shown = [DEMONSTRATIONS[i:] + DEMONSTRATIONS[:i] for i in range(3)]
    monkeypatch.setattr(prefix, "MIN_TOKENS", 40)
    same, prompts = share_prefix(model, tokenizer, shown, QUERIES)
    assert same is model
    assert prompts == [
        tokenizer.encode(with_demonstrations(s, q)) for s, q in zip(shown, QUERIES, strict=True)
    ]


def test_similarity_equals_a_naive_loop(tiny):
    folder, model, _ = tiny
    adapter, theta = trained(model, "lora", 2)
    rows = [
        TokenRow([5, 6, 7], [1, 2, 3]),
        TokenRow([8], [4]),
        TokenRow([9, 10, 11, 12, 13], [5, 6]),
    ]
    runs = [
        [TokenRow(row.prompt, row.answer, torch.randn(2, len(row.answer), 32)) for row in rows]
        for _ in range(2)
    ]
    # a run's responses have their own lengths
    runs[1][0] = TokenRow([20, 21, 22, 23], [1], torch.randn(2, 1, 32))
    for budget in (8192, 1):
        with adapted(model, adapter, theta) as student:
            found = layer_asim(student, runs, budget=budget)
        assert found.shape == (2, 2)
        for r in range(2):
            net, similar = peft_twin(folder, adapter, theta[r]).base_model.model, [[], []]
            for row in runs[r]:
                _, outputs = upstream_pass(net, torch.tensor([row.prompt + row.answer[:-1]]))
                for layer in range(2):
                    for p in range(len(row.answer)):
                        ours, target = (
                            outputs[layer, 0, len(row.prompt) - 1 + p],
                            row.activations[layer, p],
                        )
                        similar[layer].append((ours @ target / ours.norm() / target.norm()).item())
            assert found[r].tolist() == pytest.approx([sum(s) / len(s) for s in similar], abs=1e-5)


@pytest.mark.parametrize("labels", [LABELS, [[1, 2, 3], [4], [1, 5]]], ids=["one token", "several"])
@pytest.mark.parametrize("budget", [8192, 20])
def test_scores_come_with_the_similarity_of_the_same_pass(tiny, budget, labels):
    """Outputs kept of the base model; one run compared with two sets, four runs two by two."""
    _, model, _ = tiny
    adapter, theta = trained(model, "lora", 4)
    kept = observed_outputs(model, labels, 1, budget)
    rows = [TokenRow(p, [0]) for p in PROMPTS[:5]]
    record_targets(model, rows, PROMPTS[:5], TeacherSettings(9))
    torch.testing.assert_close(
        kept[:, 0], torch.cat([row.activations for row in rows], 1), rtol=0, atol=1e-5
    )
    like = kept + 0.5 * torch.randn(
        kept.shape[0], 2, *kept.shape[2:], generator=torch.Generator().manual_seed(0)
    )

    def similar(student, number):
        return layer_asim(
            student,
            [[TokenRow(p, [0], like[:, number, i : i + 1]) for i, p in enumerate(PROMPTS[:5])]],
        )[0]

    found = summed_asim(kept, like) / 5
    torch.testing.assert_close(
        found, torch.stack([similar(model, 0), similar(model, 1)]), rtol=0, atol=1e-5
    )
    with adapted(model, adapter, theta) as student:
        found = summed_asim(observed_outputs(student, labels, 4, budget), like) / 5
    for r in range(4):
        with adapted(model, adapter, theta[r : r + 1]) as student:
            torch.testing.assert_close(found[r], similar(student, r // 2), rtol=0, atol=1e-5)


def observed_outputs(model, labels, runs, budget):
    """Attention outputs [L, R, 5, D] of the first five prompts while labels are scored."""
    groups = []
    outputs = []

    def observe(group, found):
        groups.append(group)
        outputs.append(found)

    scoring = Scoring(runs, budget=budget, observed=5, observer=observe)
    label_scores(model, PROMPTS, labels, scoring)
    return join_groups(outputs, groups, dim=2)


def test_a_model_is_entirely_similar_to_itself(tiny):
    _, model, _ = tiny
    rows = [TokenRow(p, [3, 4][: 1 + i % 2]) for i, p in enumerate(PROMPTS)]
    record_targets(model, rows, PROMPTS, TeacherSettings(9))
    torch.testing.assert_close(
        layer_asim(model, [rows], budget=30), torch.ones(1, 2), rtol=0, atol=1e-5
    )
    for row in rows:
        row.activations = -row.activations
    torch.testing.assert_close(layer_asim(model, [rows]), -torch.ones(1, 2), rtol=0, atol=1e-5)
    one = rows[0].activations[0, 0]
    assert F.cosine_similarity(one, -one, dim=0) == pytest.approx(-1, abs=1e-6)
