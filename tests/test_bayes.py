"""TFB: the noise around a trained LoRA, how much of it a set's rows bear, and what the study tells."""

import pytest
import torch
from ia2mini.models import load
from reference import make_checkpoint, relative

from bench.studies import bayes, tasks
from bench.studies.bayes import DRAWS, METHODS, TOLERANCE, average_scores, drawn_weights
from ia2mini.adapters import LoRA, adapted, unpack
from ia2mini.engine.options import Options
from ia2mini.engine.subject import open_subject


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    model, _ = load(make_checkpoint(tmp_path_factory.mktemp("small"), "llama"))
    adapter = LoRA(model, rank=2)
    torch.manual_seed(1)
    theta = 0.3 * torch.randn(len(adapter.init(torch.Generator())))
    return model, adapter, theta


def test_without_noise_the_draws_are_the_trained_adapter(lora):
    model, adapter, theta = lora
    drawn = drawn_weights(adapter, theta, 0.0, torch.Generator().manual_seed(2))
    ids = torch.randint(0, 200, (1, 5))
    logits = []
    for weights in (theta, drawn[0], drawn[-1]):
        with torch.no_grad(), adapted(model, adapter, weights[None]) as student:
            logits.append(student(ids))
    assert drawn.shape == (DRAWS, len(theta))
    assert relative(logits[1], logits[0]) < 1e-4
    assert relative(logits[2], logits[0]) < 1e-4


def test_noise_has_one_size_within_what_the_update_reaches_and_none_beyond(lora, monkeypatch):
    _, adapter, theta = lora
    monkeypatch.setattr(bayes, "DRAWS", 3000)
    sigma = 0.25
    drawn = drawn_weights(adapter, theta, sigma, torch.Generator().manual_seed(2))
    name = next(iter(adapter.linears))
    trained = unpack(theta[None], adapter.shapes)
    weights = unpack(drawn, adapter.shapes)
    update = trained[f"{name}.B"][0] @ trained[f"{name}.A"][0]  # [out, in]
    noise = weights[f"{name}.B"] @ weights[f"{name}.A"] - update  # [K, out, in]
    basis = torch.linalg.qr(trained[f"{name}.B"][0])[0]  # [out, rank]
    beyond = noise - basis @ (basis.T @ noise)
    assert beyond.abs().max() < 1e-4
    inside = (basis.T @ noise).flatten(1)  # [K, rank * in]
    assert inside.mean(0).abs().max() < 5 * sigma / 3000**0.5
    covariance = inside.T @ inside / 3000
    assert torch.allclose(covariance, sigma**2 * torch.eye(len(covariance)), atol=0.01)


def test_averages_are_of_shares():
    scores = torch.tensor([[[0.0, -1.0]], [[-3.0, -0.5]]])
    expected = (scores[0].softmax(-1) + scores[1].softmax(-1)) / 2
    assert torch.allclose(average_scores(scores).exp(), expected.double())


def test_the_study_takes_the_widest_noise_that_its_rows_bear(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "classification", ("toy-mood",))
    options = Options(
        n=(4,), sets=2, eval_rows=10, epochs=4, rates=(1e-2,), methods=METHODS, batch_size=4
    )
    found = []
    judge = bayes.judge
    monkeypatch.setattr(bayes, "judge", lambda *asked: found.append(asked) or judge(*asked))
    result = bayes.bayes(open_subject("tiny", "cpu"), options, "classification")
    assert [line.stack for line in result.lines] == 2 * list(bayes.WAYS)
    mine, number, theta = found[0]
    episode = mine.cell.episodes[number]
    rows = episode.train + episode.dev
    gold = bayes.labels_of(rows)
    sigma = bayes.widest_noise(mine, theta, rows, number)

    def loss(size: float) -> float:
        drawn = drawn_weights(mine.experiment.adapter, theta, size, bayes.seeded_generator(number))
        each = bayes.scores_of(mine, drawn, rows).double().softmax(-1).mean(0)
        return -each[range(len(rows)), gold].log().mean().item()

    assert 0 < sigma <= bayes.WIDEST
    assert loss(sigma) <= loss(0.0) + TOLERANCE + 1e-6
    assert sigma == bayes.WIDEST or loss(2 * sigma) > loss(0.0) + TOLERANCE
    as_it_is, _, noisy = (line.rates for line in result.lines[:3])
    assert as_it_is["NLL"] != noisy["NLL"]
