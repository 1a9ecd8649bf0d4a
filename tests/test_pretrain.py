"""Pretraining in small, its optimizer against independent references, and the checkpoint it made."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from ia2mini.models.checkpoint import TINY, load
from ia2mini.models.common import UsageError

from ia2mini import pretrain
from ia2mini.tasks import world


@pytest.fixture
def small(monkeypatch):
    """Short documents and no probing of accuracy."""
    monkeypatch.setattr(pretrain, "CONTEXT", 48)
    monkeypatch.setattr(pretrain, "probe", lambda *_: {"toy-mood": [0.5] * len(pretrain.SHOTS)})


def test_episode_shows_one_rule():
    values = {word: value for group in world.ATTRIBUTES.values() for value, words in group.items() for word in words}
    mixed = 0
    for seed in range(60):
        text = pretrain.episode(random.Random(seed), *pretrain.STAGES[seed % 3][1:])
        pairs = re.findall(r"Text:(.*)\nLabel:(\w+)", text)
        for text, _ in pairs:
            assert len(text.split()) == 1 or world.split_of(text) == "pretrain"
        told = []  # attributes whose values are labelled one to one
        for attribute, names in world.ATTRIBUTES.items():
            shown = [
                ({values[w] for w in re.findall(r"\w+", text) if values.get(w) in names}, label)
                for text, label in pairs
            ]
            seen = {(next(iter(s)), label) for s, label in shown if len(s) == 1}
            if (
                pairs
                and all(shown)
                and all(len(s) == 1 for s, _ in shown)
                and len(seen) == len({label for _, label in seen})
            ):
                told.append(attribute)
        mixed += len(told) == 1
        assert told or not pairs
    assert mixed > 20


def test_answer_mask_covers_answers_and_their_end():
    tokenizer = world.build_tokenizer()
    ids = tokenizer.encode("Text:a film\nLabel:1\n\nQuestion:how\nAnswer:#### 4" + world.EOS).ids
    starts, stops = (
        [tokenizer.token_to_id(t) for t in ("Label:", "Answer:")],
        [tokenizer.token_to_id(t) for t in ("\n\n", world.EOS)],
    )
    mask = pretrain.answer_mask(torch.tensor([ids[:-1]]), starts, stops)[0]
    assert [tokenizer.id_to_token(i) for i, m in zip(ids[1:], mask.tolist(), strict=True) if m] == [
        "1",
        "\n\n",
        "####",
        "4",
        world.EOS,
    ]


def test_gradients_match_a_plain_loop():
    tokenizer = world.build_tokenizer()
    starts, stops = (
        [tokenizer.token_to_id(t) for t in ("Label:", "Answer:")],
        [tokenizer.token_to_id(t) for t in ("\n\n", world.EOS)],
    )
    model = pretrain.initial_model(0)
    ids = torch.full((2, 14), -1)
    for i, text in enumerate(("Text:a lovely film\nLabel:1\n\nText:so", "noon dusk noon dusk noon")):
        row = tokenizer.encode(text).ids
        ids[i, : len(row)] = torch.tensor(row)
    got, answer = pretrain.gradients(model, starts, stops, ids)
    each = [F.cross_entropy(model(row[row >= 0][None, :-1])[0], row[row >= 0][1:], reduction="none") for row in ids]
    wanted = (each[0][5:7].mean() + each[1].mean()) / 2  # the label and its blank line; all of the copy
    assert answer.item() == pytest.approx(wanted.item(), rel=0.01)  # bfloat16 inside
    (wanted + 0.05 * torch.cat(each).mean()).backward()
    for p, g in zip(model.parameters(), got, strict=True):
        assert F.cosine_similarity(p.grad.flatten(), g.flatten(), 0) > 0.98


def test_orthogonal_has_singular_values_near_one():
    g = torch.randn(24, 8)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    x = pretrain.orthogonal(g)
    assert 0.6 < torch.linalg.svdvals(x).min() and torch.linalg.svdvals(x).max() < 1.3
    assert F.cosine_similarity((u @ vh).flatten(), x.flatten(), 0) > 0.97


def test_the_rest_is_adam():
    model = pretrain.initial_model(0)
    ours, reference = pretrain.Muon(model, 0.0, 0.01), torch.nn.Parameter(model.model.norm.weight.detach().clone())
    adam = torch.optim.Adam([reference], 0.01, betas=(0.9, 0.95))
    for count in range(1, 4):
        grads = [torch.randn_like(p) for p in model.parameters()]
        ours.step(grads, count, 1.0)
        reference.grad = dict(zip(ours.parameters, grads, strict=True))["model.norm.weight"]
        adam.step()
    torch.testing.assert_close(model.model.norm.weight, reference)


def test_loss_falls_and_a_resumed_run_is_the_same_run(small, tmp_path, monkeypatch):
    options = dict(steps=12, rows=4, every=4)
    record = pretrain.pretrain(tmp_path / "whole", **options)
    assert record["curve"][-1]["loss"] < 0.8 * record["curve"][0]["loss"]
    assert sorted(f.name for f in (tmp_path / "whole").iterdir()) == [
        "config.json", "curve.json", "curve.png", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    draw = pretrain.batch
    monkeypatch.setattr(
        pretrain, "batch", lambda tokenizer, seed, *rest: draw(tokenizer, seed, *rest) if seed != "0/10" else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        pretrain.pretrain(tmp_path / "cut", **options)
    drawn = []
    monkeypatch.setattr(
        pretrain, "batch", lambda tokenizer, seed, *rest: drawn.append(seed) or draw(tokenizer, seed, *rest)
    )
    with pytest.raises(UsageError, match="begun with"):
        pretrain.pretrain(tmp_path / "cut", **options | {"rows": 2})
    resumed = pretrain.pretrain(tmp_path / "cut", **options)
    assert drawn[0] == "0/8"
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert [point["loss"] for point in resumed["curve"]] == [point["loss"] for point in record["curve"]]


@pytest.mark.skipif(
    not (TINY / "model.safetensors").is_file(), reason="models/tiny is not there; make it with `ia2mini pretrain`"
)
class TestTiny:
    def test_size_and_tokenizer(self):
        assert (TINY / "model.safetensors").stat().st_size <= 4e6
        assert (TINY / "tokenizer.json").read_text() == world.build_tokenizer().to_str(pretty=True)

    def test_transformers_agrees(self):
        transformers = pytest.importorskip("transformers")
        ours, tokenizer = load("tiny")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY)
        assert type(theirs).__name__ == "Qwen3ForCausalLM"
        prompt, _ = world.pair(world.TOY_TASKS[0], world.rows("toy-mood", "eval")[0])
        ids = torch.tensor([tokenizer.encode(prompt * 3)])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)

    def test_it_learns_in_context(self):
        model, _ = load("tiny")
        toys = [toy for toy in world.TOY_TASKS if len(toy.evals) > 1]
        for name, curve in pretrain.probe(model, world.build_tokenizer(), toys, queries=50).items():
            assert curve[-1] >= 0.9 and curve[-1] >= curve[0] + 0.2, (name, curve)
