"""Labels of several tokens: their probabilities and the greedy answer against plain loops, a pass a token."""

import math
from functools import cache
from itertools import product
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ia2mini.models import load
from plain import greedy_label, label_log_probability
from reference import EOS, make_checkpoint, peft_twin, upstream
from test_evaluate import ADAPTERS, DEMONSTRATIONS, PROMPTS, QUERIES, trained

from ia2mini.adapters import adapted
from ia2mini.episode import with_demonstrations
from ia2mini.labels import LabelTree, Scoring, label_scores
from ia2mini.prefix import share_prefix
from ia2mini.scoring import score
from ia2mini.tasks import Example


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = make_checkpoint(
        tmp_path_factory.mktemp(request.param), request.param, num_hidden_layers=2
    )
    return folder, *load(folder)


def check_labels(scores, run, following, prompts, labels, among=None):
    """Of labels of any length."""
    for q, prompt in enumerate(prompts):
        found = scores.log_probabilities.exp()[run, q].double().log().tolist()
        assert found == pytest.approx(
            [label_log_probability(following, prompt, label) for label in labels], abs=1e-4
        )
        top, confidence = greedy_label(following, prompt, labels, among)
        assert scores.top[run, q] == top
        assert scores.confidence[run, q].item() == pytest.approx(confidence, rel=1e-4, abs=1e-6)


def upstreams(net):
    """transformers' logits [V] of the token after some."""

    def following(ids):
        with torch.no_grad():
            return net(torch.tensor([ids])).logits[0, -1]

    return following


def near(following, prompts) -> list[list[int]]:
    """Labels of one to four tokens, none the beginning of another: greedy decoding gives some and leaves some late."""
    labels = [[250, 251, 252, 253], [248, 249], [254]]
    for q, prompt in enumerate(prompts):
        said = []
        for _ in range(3):
            said.append(following(prompt + said).argmax().item())
        other = (said[-1] + 1) % 256
        for new in ([said, said[:2] + [other, 7]], [[said[0], (said[1] + 1) % 256]], [said[:1]])[
            q % 3
        ]:
            if not any(a[: len(b)] == b for one in labels for a, b in ((one, new), (new, one))):
                labels.append(new)
    return labels


@pytest.mark.parametrize("budget, among", [(8192, None), (40, None), (8192, 10)])
def test_labels_of_several_tokens_equal_a_plain_loop_over_them(tiny, budget, among):
    folder, model, _ = tiny
    following = upstreams(upstream(folder))
    labels = near(following, PROMPTS)
    scores = label_scores(model, PROMPTS, labels, Scoring(top_k=among, budget=budget))
    check_labels(scores, 0, following, PROMPTS, labels, among)
    assert {1, 2, 3, 4} == {len(label) for label in labels}
    longest = [len(labels[top]) for top in scores.top[0].tolist() if top >= 0]
    assert -1 in scores.top and max(longest) > 1, (
        "greedy decoding gives whole labels and leaves others"
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_run_scores_labels_of_several_tokens_as_its_own_model_does(tiny, kind):
    folder, model, _ = tiny
    adapter, theta = trained(model, kind, 3)
    nets = [upstreams(peft_twin(folder, adapter, row)) for row in theta]
    labels = near(nets[0], PROMPTS)
    with adapted(model, adapter, theta) as student:
        scores = label_scores(student, PROMPTS, labels, Scoring(3, budget=200))
    for r, following in enumerate(nets):
        check_labels(scores, r, following, PROMPTS, labels)
    assert (scores.top[0] >= 0).any() and not torch.equal(
        scores.log_probabilities.exp()[0], scores.log_probabilities.exp()[1]
    )


def test_many_logits_are_read_in_parts(tiny, monkeypatch):
    """Of 255 labels and a large vocabulary those of a single pass might not fit into memory."""
    folder, model, tokenizer = tiny
    adapter, theta = trained(model, "lora", 3)
    labels = near(upstreams(upstream(folder)), PROMPTS)
    widths = []
    plain = LabelTree.greedy

    def noted(tree, logits, among):
        widths.append(logits.numel())
        return plain(tree, logits, among)

    monkeypatch.setattr(LabelTree, "greedy", noted)
    seen = []
    how = Scoring(3, observed=4, observer=lambda group, outputs: seen.append((group, outputs)))
    with adapted(model, adapter, theta) as student:
        whole = label_scores(student, PROMPTS, labels, how)
        most = max(widths)
        widths.clear()
        monkeypatch.setattr("ia2mini.labels.SCORED_LOGITS", most // 4)
        parts = label_scores(student, PROMPTS, labels, how)
    assert max(widths) <= most // 4
    assert torch.equal(parts.top, whole.top)
    assert torch.equal(parts.first_token, whole.first_token)
    torch.testing.assert_close(parts.confidence, whole.confidence, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.log_probabilities, whole.log_probabilities)
    once = seen[: len(seen) // 2]
    again = seen[len(seen) // 2 :]
    for (group, outputs), (same_group, same_outputs) in zip(once, again, strict=True):
        assert group == same_group and torch.equal(outputs, same_outputs)


def test_labels_of_several_tokens_after_shared_demonstrations(tiny):
    folder, model, tokenizer = tiny
    following = upstreams(upstream(folder))
    whole = [tokenizer.encode(with_demonstrations(DEMONSTRATIONS, q)) for q in QUERIES]
    student, rest = share_prefix(model, tokenizer, [DEMONSTRATIONS], QUERIES)
    assert student is not model and len(rest[0]) < len(whole[0])
    labels = near(following, whole) + tokenizer.label_tokens(QUERIES[0], ("good", "not bad", "no"))
    check_labels(label_scores(student, rest, labels), 0, following, whole, labels)


def test_labels_one_of_which_begins_another_end_with_eos(tiny):
    folder, model, tokenizer = tiny
    a, b, c, both = (tokenizer.encode(text, special=False) for text in ("a", "b", "c", "a b"))
    labels = tokenizer.label_tokens("Text:x\nLabel:", ("a", "a b", "c"))
    assert (
        labels == [a + [EOS], both + [EOS], c + [EOS]]
        and len(labels[1]) == 4
        and labels[1][:1] == a
    )
    # no beginning of another
    assert tokenizer.label_tokens("Text:x\nLabel:", ("b", "a b", "c")) == [b, both, c]
    check_labels(
        label_scores(model, PROMPTS, labels), 0, upstreams(upstream(folder)), PROMPTS, labels
    )


def many_labels(count: int, beginning: list[int]) -> list[list[int]]:
    """Labels of two to five tokens that share beginnings; the last ones begin others. Each is closed with EOS."""
    rng = torch.Generator().manual_seed(0)
    found: list[list[int]] = [beginning, beginning[:1], beginning + [7]]
    while len(found) < count:
        length = int(torch.randint(1, 5, (1,), generator=rng))
        label = torch.randint(1, 5, (length,), generator=rng).tolist()
        if label not in found:
            found.append(label)
    return [label + [EOS] for label in found]


def test_two_hundred_and_fifty_five_labels_equal_each_scored_alone(tiny):
    folder, model, _ = tiny
    asked = cache(upstreams(upstream(folder)))
    prompt = PROMPTS[0]

    def following(ids):
        return asked(tuple(ids))

    said = [following(prompt).argmax().item()]
    said.append(following(prompt + said).argmax().item())
    labels = many_labels(255, said)
    scores = label_scores(model, [prompt], labels, Scoring(ends=(EOS,)))
    assert scores.log_probabilities.shape == (1, 1, 255)
    check_labels(scores, 0, following, [prompt], labels)
    shared = label_scores(model, PROMPTS, labels, Scoring(ends=(EOS,), budget=700))
    for q, other in enumerate(PROMPTS[1:], 1):
        alone = label_scores(model, [other], labels, Scoring(ends=(EOS,)))
        torch.testing.assert_close(
            shared.log_probabilities[:, q], alone.log_probabilities[:, 0], atol=1e-4, rtol=1e-5
        )


def test_what_labels_share_is_read_once():
    labels = many_labels(255, [1, 2])
    beginnings = {tuple(label[:i]) for label in labels for i in range(1, len(label))}
    tree = LabelTree(labels, torch.device("cpu"), (EOS,))
    assert len(tree.tokens) == len(beginnings) < sum(len(label) - 1 for label in labels) / 2
    ids, (rows, columns), packed = tree.batch([[9, 8, 7], [6]], 2, torch.device("cpu"))
    assert ids.shape == (4, 3 + len(beginnings)) and len(rows) == 4 * (1 + len(beginnings))
    for row, length in enumerate((3, 1, 3, 1)):
        seen = packed.mask[row, 0]
        for label in labels:
            for i in range(1, len(label)):
                # the prompt, then its own beginning in order
                place = length - 1 + tree.predicted_by[labels.index(label), i]
                visible = seen[place].nonzero()[:, 0]
                assert ids[row, visible[length:]].tolist() == label[:i]
                assert packed.places[row, visible].tolist() == list(range(length + i))


class Chain(torch.nn.Module):
    """R models side by side whose next token follows from the last one alone: logits [R, V, V], as its states."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits
        self.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(1, 1)})
        self.lm_head = torch.nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
        torch.nn.init.eye_(self.lm_head.weight)

    def forward(self, ids, taps, logits, cache, head):
        runs = torch.arange(len(ids))[:, None] * len(self.logits) // len(ids)
        return self.logits[runs, ids][logits]


def test_greedy_decoding_tells_a_label_from_a_longer_one():
    a, space, b, eos = range(4)
    labels, likeliest = [[a, eos], [a, space, b, eos]], 8.0
    steps = [{a: eos}, {a: space, space: b, b: eos}, {a: space, space: b, b: a}, {a: b}]
    table = torch.randn(4, 5, 5)
    for run, following in enumerate(steps):
        for token, then in (following | {4: a}).items():
            table[run, token, then] = likeliest
    scores = label_scores(Chain(table), [[4]], labels, Scoring(4))
    assert scores.top[:, 0].tolist() == [0, 1, -1, -1]
    p = table.softmax(-1)
    # up to where the label is left
    paths = [4, a, eos], [4, a, space, b, eos], [4, a, space, b, a], [4, a, b]
    said = [
        math.prod(p[r, i, j].item() for i, j in zip(path, path[1:])) for r, path in enumerate(paths)
    ]
    assert scores.confidence[:, 0].tolist() == pytest.approx(said, rel=1e-5)


LABEL = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@settings(deadline=None)
@given(st.lists(LABEL, min_size=1, max_size=6), st.integers(0, 2**20), st.integers(1, 3))
def test_any_labels_equal_a_plain_loop_over_them(labels, seed, runs):
    labels = [
        a
        for i, a in enumerate(labels)
        if not any(a[: len(b)] == b or b[: len(a)] == a for b in labels[:i])
    ]
    table = 2 * torch.randn(runs, 4, 4, generator=torch.Generator().manual_seed(seed))
    prompts = [[token] for token in range(4)]
    scores = label_scores(Chain(table), prompts, labels, Scoring(runs))
    for r in range(runs):
        check_labels(scores, r, lambda ids, r=r: table[r, ids[-1]], prompts, labels)


@pytest.mark.parametrize(
    "labels", [("0", "1"), tuple(map("".join, product("abcd", repeat=2)))], ids=["one token", "two"]
)
def test_a_score_is_that_of_the_plain_model(tiny, tmp_path, labels):
    """Of the base model, with demonstrations, and of two adapted ones; all inclined to answer with a label."""
    folder, _, tokenizer = tiny
    tokens = [tokenizer.encode(label, special=False) for label in labels]
    net = upstream(folder)
    with torch.no_grad():
        net.lm_head.weight[sorted(set(sum(tokens, [])))] *= 6
    net.save_pretrained(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    model, tokenizer = load(tmp_path)
    adapter, theta = trained(model, "lora", 2)
    queries = [f"Text:row {i}\nLabel:" for i in range(6)]
    examples = [Example(q, labels[i % len(labels)], i % len(labels)) for i, q in enumerate(queries)]
    shown = tuple(Example(d.prompt, labels[d.label], d.label) for d in DEMONSTRATIONS)
    twins = [upstreams(peft_twin(tmp_path, adapter, row)) for row in theta]
    found = [score(model, tokenizer, examples, labels, demonstrations=d)[0] for d in ((), shown)]
    found += score(model, tokenizer, examples, labels, adapter, theta)
    cases, said = (
        [(upstreams(net), ()), (upstreams(net), shown), *((twin, ()) for twin in twins)],
        [],
    )
    for measured, (following, before) in zip(found, cases, strict=True):
        prompts = [tokenizer.encode(with_demonstrations(before, q)) for q in queries]
        p = [
            [math.exp(label_log_probability(following, prompt, label)) for label in tokens]
            for prompt in prompts
        ]
        said.append([greedy_label(following, prompt, tokens)[0] for prompt in prompts])
        right = [top == e.label for top, e in zip(said[-1], examples, strict=True)]
        assert measured["acc"] == pytest.approx(fmean(right))
        nll = -fmean(math.log(q[e.label]) for q, e in zip(p, examples, strict=True))
        assert measured["nll"] == pytest.approx(nll, abs=1e-4)
        far = [
            sum((q - (i == e.label)) ** 2 for i, q in enumerate(row))
            for row, e in zip(p, examples, strict=True)
        ]
        assert measured["brier"] == pytest.approx(fmean(far), abs=1e-5)
    assert len({top for tops in said for top in tops if top >= 0}) > 1, (
        "no two labels are ever said"
    )
