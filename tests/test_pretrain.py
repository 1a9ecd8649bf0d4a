"""Pretraining in small: documents, a tokenizer that joins and decodes exactly, the optimizer against independent
references, and the checkpoint it made."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from ia2mini.models.checkpoint import TINY, load

from bench import pretrain
from bench.__main__ import main
from ia2mini import UsageError
from ia2mini.tasks import find_task, load_examples, world

TASKS = {toy.name: toy for toy in world.TOY_TASKS}


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.build_tokenizer()


@pytest.fixture(scope="module")
def ends(tokenizer):
    """Ids of the tokens before answers, and of those after them."""
    return [
        [tokenizer.token_to_id(t) for t in tokens]
        for tokens in (("Label:", "Answer:"), ("\n\n", "<eos>"))
    ]


@pytest.fixture
def small(monkeypatch):
    """Short documents and no probing of accuracy."""
    monkeypatch.setattr(pretrain, "CONTEXT", 48)
    monkeypatch.setattr(pretrain, "probe", lambda *_: {"toy-mood": [0.5] * len(pretrain.SHOTS)})


def test_episode_shows_one_rule():
    values = {
        word: value
        for group in world.ATTRIBUTES.values()
        for value, words in group.items()
        for word in words
    }
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


@pytest.mark.parametrize("name", TASKS)
def test_tokenizer_joins_prompt_and_answer_and_decodes_exactly(name, tokenizer):
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    rows = load_examples(find_task(name), "eval").rows
    for first, second in zip(rows[:200], rows[200:400], strict=True):
        whole = f"{first.prompt}{first.answer}\n\n{second.prompt}"
        ids = encode(whole)
        assert ids == encode(first.prompt) + encode(first.answer) + encode("\n\n") + encode(
            second.prompt
        )
        assert tokenizer.decode(ids) == whole
        assert tokenizer.token_to_id(pretrain.UNK) not in ids
    for label in TASKS[name].labels:
        assert len(encode(label)) == 1


def test_tokenizer_specials(tokenizer):
    assert tokenizer.encode("\n\n").tokens == ["\n\n"] and tokenizer.encode("\n").tokens == ["\n"]
    assert tokenizer.encode("a zeppelin film").tokens == ["a", pretrain.UNK, "film"]
    assert tokenizer.encode("#### 4" + pretrain.EOS).tokens == ["####", "4", pretrain.EOS]
    assert tokenizer.encode("").ids == []  # nothing is put in front


def test_answer_mask_covers_answers_and_their_end(tokenizer, ends):
    ids = tokenizer.encode("Text:a film\nLabel:1\n\nQuestion:how\nAnswer:#### 4" + pretrain.EOS).ids
    mask = pretrain.answer_mask(torch.tensor([ids[:-1]]), *ends)[0]
    masked = [tokenizer.id_to_token(i) for i, m in zip(ids[1:], mask.tolist(), strict=True) if m]
    assert masked == ["1", "\n\n", "####", "4", pretrain.EOS]


def test_gradients_match_a_plain_loop(tokenizer, ends):
    model = pretrain.initial_model(0)
    ids = torch.full((2, 14), -1)
    for i, text in enumerate(
        ("Text:a lovely film\nLabel:1\n\nText:so", "noon dusk noon dusk noon")
    ):
        row = tokenizer.encode(text).ids
        ids[i, : len(row)] = torch.tensor(row)
    got, answer = pretrain.gradients(model, *ends, ids)
    each = [
        F.cross_entropy(model(row[row >= 0][None, :-1])[0], row[row >= 0][1:], reduction="none")
        for row in ids
    ]
    # the label and its blank line; all of the copy
    wanted = (each[0][5:7].mean() + each[1].mean()) / 2
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
    ours, reference = (
        pretrain.Muon(model, 0.0, 0.01),
        torch.nn.Parameter(model.model.norm.weight.detach().clone()),
    )
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
        pretrain,
        "batch",
        lambda tokenizer, seed, *rest: draw(tokenizer, seed, *rest) if seed != "0/10" else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        pretrain.pretrain(tmp_path / "cut", **options)
    drawn = []
    monkeypatch.setattr(
        pretrain,
        "batch",
        lambda tokenizer, seed, *rest: drawn.append(seed) or draw(tokenizer, seed, *rest),
    )
    with pytest.raises(UsageError, match="begun with"):
        pretrain.pretrain(tmp_path / "cut", **options | {"rows": 2})
    resumed = pretrain.pretrain(tmp_path / "cut", **options)
    assert drawn[0] == "0/8"
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert [point["loss"] for point in resumed["curve"]] == [
        point["loss"] for point in record["curve"]
    ]


def test_the_command(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(pretrain, "pretrain", lambda out, **more: asked.append((out, more)))
    done = CliRunner().invoke(
        main, ["pretrain", "--out", str(tmp_path), "--steps", "2"], catch_exceptions=False
    )
    assert done.exit_code == 0 and f"--model {tmp_path}" in done.output
    assert asked == [(tmp_path, {"steps": 2, "seed": 0, "device": "cpu"})]
    monkeypatch.undo()
    monkeypatch.setattr(
        pretrain, "resume", lambda *_: (_ for _ in ()).throw(UsageError("begun with others"))
    )
    (tmp_path / "state.safetensors").write_bytes(b"")
    done = CliRunner().invoke(main, ["pretrain", "--out", str(tmp_path), "--steps", "2"])
    assert done.exit_code and done.output.strip().splitlines()[-1].endswith("begun with others")
    assert "Traceback" not in done.output


made = (TINY / "model.safetensors").is_file()


@pytest.mark.skipif(
    not made, reason="models/tiny is not there; make it with `python -m bench pretrain`"
)
class TestTiny:
    def test_size_and_tokenizer(self):
        assert (TINY / "model.safetensors").stat().st_size <= 4e6
        assert (TINY / "tokenizer.json").read_text() == pretrain.build_tokenizer().to_str(
            pretty=True
        )

    def test_transformers_agrees(self):
        transformers = pytest.importorskip("transformers")
        ours, tokenizer = load("tiny")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY)
        assert type(theirs).__name__ == "Qwen3ForCausalLM"
        prompt = load_examples(find_task("toy-mood"), "eval").rows[0].prompt
        ids = torch.tensor([tokenizer.encode(prompt * 3)])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)

    def test_it_learns_in_context(self):
        model, _ = load("tiny")
        names = [toy.name for toy in world.TOY_TASKS if len(toy.evals) > 1]
        curves = pretrain.probe(model, pretrain.build_tokenizer(), names, queries=50)
        assert list(curves) == names and len(names) == 6
        for name, curve in curves.items():
            assert curve[-1] >= 0.9 and curve[-1] >= curve[0] + 0.2, (name, curve)
