"""`icl-sft`, the teacher that it makes, and SDFT: against transformers, peft and plain loops."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ia2mini.models import load
from plain import Plain, joined, label_log_probability
from plain import teacher as plain_teacher
from reference import make_checkpoint, make_rows, peft_twin, relative, twin_theta, upstream
from safetensors.torch import load_file
from scipy.stats import chisquare

from bench.studies.sdft import draw_answers, on_policy_loss
from bench.studies.stronger import further_methods, own
from ia2mini import UsageError, teacher
from ia2mini.adapters import LoRA, adapted
from ia2mini.batch import TokenRow
from ia2mini.engine.experiment import make_trainer, teach_all, train_all, true_sets
from ia2mini.engine.options import FitOptions, Options
from ia2mini.engine.progress import Progress, silent
from ia2mini.engine.subject import open_subject
from ia2mini.fitting.fit import fit
from ia2mini.methods import METHODS, STARTS_FROM, Grid
from ia2mini.study.cells import make_cells
from ia2mini.study.study import compare, experiment_of, open_folder
from ia2mini.tasks import find_task
from ia2mini.teacher import Taught
from ia2mini.train import Settings

MOOD = find_task("toy-mood")
SUMS = replace(find_task("toy-sums"), max_tokens=6, teacher_tokens=6)
SMALL = Options(n=(3,), sets=2, epochs=6, eval_rows=8, rates=(1e-2, 3e-2), batch_size=2)
ASKED = ("base", "icl", "icl-sft")


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


def make_experiment(task, subject, out, **choices):
    cells = make_cells([task], subject, replace(SMALL, **choices))
    store, _ = open_folder(cells, out)
    return cells[0], experiment_of(cells[0], store, Progress(silent, 9), make_trainer(None))


def records_of(document: dict, method: str) -> list[dict]:
    return [run for run in document["runs"] if run["method"] == method and not run["ood"]]


def test_rows_with_demonstrations_are_the_prompts_of_the_protocol(subject, tmp_path):
    cell, experiment = make_experiment(MOOD, subject, tmp_path, methods=ASKED)
    encode = subject.tokenizer.encode
    for episode, taught in zip(cell.episodes, true_sets(experiment), strict=True):
        rows = episode.train + episode.dev
        found = taught.demonstrated_train + taught.demonstrated_dev
        for example, shown, row in zip(rows, episode.demonstrations, found, strict=True):
            assert row.prompt == encode(joined(shown) + example.prompt)
            assert row.answer == encode(example.answer)
            assert example not in shown
        assert len(taught.demonstrated_train) == len(taught.train) == 3


def test_scores_with_demonstrations_equal_pefts_on_the_whole_prompt(subject, tmp_path):
    document, folder = compare([MOOD], subject, replace(SMALL, methods=ASKED), tmp_path)
    cell, experiment = make_experiment(MOOD, subject, tmp_path, methods=ASKED)
    thetas = load_file(folder / cell.name / "fit-icl-sft.safetensors")["theta"]
    scores = load_file(folder / cell.name / "icl-sft-on-toy-mood.safetensors")
    training = [run for run in document["training"] if run["method"] == "icl-sft"]
    scored = records_of(document, "icl-sft")
    rows = cell.evaluations["toy-mood"].rows
    labels = [subject.tokenizer.encode(label) for label in MOOD.labels]
    base = Plain(upstream(subject.folder), subject.tokenizer)
    for place, record in enumerate(scored):
        run = next(
            r
            for r, one in enumerate(training)
            if (one["set"], one["rate"]) == (record["set"], record["rate"])
        )
        net = Plain(peft_twin(subject.folder, experiment.adapter, thetas[run]), subject.tokenizer)
        before = joined(cell.episodes[record["set"]].icl[0])
        alike = []
        for i, row in enumerate(rows):
            ids = subject.tokenizer.encode(before + row.prompt)
            expected = [label_log_probability(net.following, ids, label) for label in labels]
            found = scores["log_probabilities"][place, i]
            assert torch.allclose(found, torch.tensor(expected), atol=1e-3)
            pair = net(ids, [0])[1], base(ids, [0])[1]
            alike.append(torch.cosine_similarity(*pair, dim=-1).mean())
        assert record["asim"] == pytest.approx(torch.stack(alike).mean().item(), abs=1e-3)


def test_the_tuned_teachers_targets_are_those_of_its_adapter_in_peft(subject, tmp_path):
    for task in (MOOD, SUMS):
        cell, experiment = make_experiment(
            task, subject, tmp_path, methods=("ia2",), teacher="tuned"
        )
        assert experiment.methods == ["icl-sft", "ia2"]
        tuned = train_all(experiment)["icl-sft"]
        rates = tuned.dev_loss.view(2, 2).mean(0)
        best = int(rates.argmin())
        assert rates[0] != rates[1]
        for number, (episode, taught) in enumerate(
            zip(cell.episodes, teach_all(experiment, tuned))
        ):
            theta = tuned.theta[2 * number + best]
            net = Plain(peft_twin(subject.folder, experiment.adapter, theta), subject.tokenizer)
            found = taught.icl_train + taught.icl_dev
            rows = episode.train + episode.dev
            for row, shown, ours in zip(rows, episode.demonstrations, found, strict=True):
                expected = plain_teacher(
                    net, shown, row.prompt, experiment.teacher_settings.max_tokens
                )
                assert (ours.prompt, ours.answer) == (expected.prompt, expected.answer)
                assert relative(ours.activations, expected.targets) < 1e-4


def test_a_plain_teacher_is_the_base_whatever_was_tuned_beside_it(subject, tmp_path):
    methods = ("icl-sft", "ia2")
    _, experiment = make_experiment(MOOD, subject, tmp_path, methods=methods)
    _, alone = make_experiment(MOOD, subject, tmp_path, methods=("ia2",))
    assert torch.equal(train_all(experiment)["ia2"].theta, train_all(alone)["ia2"].theta)
    _, tuned = make_experiment(MOOD, subject, tmp_path, methods=methods, teacher="tuned")
    assert not torch.equal(train_all(tuned)["ia2"].theta, train_all(alone)["ia2"].theta)
    assert torch.equal(train_all(tuned)["icl-sft"].theta, train_all(experiment)["icl-sft"].theta)


def test_what_learns_from_no_teacher_trains_none(subject, tmp_path):
    _, experiment = make_experiment(
        MOOD, subject, tmp_path, methods=("base", "sft"), teacher="tuned"
    )
    assert experiment.methods == ["sft"]


def test_sft_on_the_teachers_answers_takes_the_tuned_teacher(subject, tmp_path):
    choices = {"methods": ("sft",), "labels": "icl", "teacher": "tuned"}
    _, experiment = make_experiment(MOOD, subject, tmp_path, **choices)
    assert experiment.tuned and experiment.methods == ["icl-sft", "sft"]


def test_an_interrupted_study_goes_on_from_the_tuned_teacher(subject, tmp_path):
    _, experiment = make_experiment(MOOD, subject, tmp_path, methods=("ia2-sft",), teacher="tuned")
    whole = train_all(experiment)
    for name in ("fit-ia2", "fit-ia2-sft"):
        (experiment.store.path / experiment.name / f"{name}.safetensors").unlink()
    again = train_all(experiment)
    assert torch.equal(again["ia2-sft"].theta, whole["ia2-sft"].theta)


def test_a_query_costs_its_demonstrations_where_they_stay(subject, tmp_path):
    document, _ = compare([MOOD], subject, replace(SMALL, methods=ASKED), tmp_path)
    cell, _ = make_experiment(MOOD, subject, tmp_path, methods=ASKED)
    rows = cell.evaluations["toy-mood"].rows
    for method in ASKED:
        for record in records_of(document, method):
            before = joined(cell.episodes[record["set"]].icl[0]) if "icl" in method else ""
            lengths = [len(subject.tokenizer.encode(before + row.prompt)) for row in rows]
            assert record["tokens"] == pytest.approx(sum(lengths) / len(lengths))


def test_overconfidence_is_mean_confidence_minus_accuracy(subject, tmp_path):
    document, folder = compare([MOOD], subject, replace(SMALL, methods=("base",)), tmp_path)
    scores = load_file(folder / "toy-mood-n3" / "base-on-toy-mood.safetensors")
    gap = scores["confidence"][0].mean() - scores["correct"][0].float().mean()
    (record, _) = records_of(document, "base")
    assert record["overconfidence"] == pytest.approx(gap.item(), abs=1e-6)


def test_fit_refuses_it_where_the_context_is_the_teacher(subject):
    rows = [{"text": f"row {i}"} for i in range(8)]
    options = FitOptions(methods=("icl-sft",), context="A context.", max_tokens=2)
    with pytest.raises(UsageError, match="--methods icl-sft: with the context"):
        fit(rows, subject, options)


def test_the_further_methods_of_the_study_are_there_only_within_it(model):
    before = dict(METHODS), dict(STARTS_FROM)
    with further_methods():
        assert METHODS["own"] is own and STARTS_FROM["own-sft"] == "own"
    assert (METHODS, STARTS_FROM) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a random model of two layers, and the model."""
    folder = make_checkpoint(tmp_path_factory.mktemp("small"), "llama")
    model, _ = load(folder)
    return folder, model


def test_sdfts_loss_and_gradient_equal_a_plain_loop(small):
    folder, model = small
    adapter = LoRA(model)
    torch.manual_seed(3)
    theta = (0.3 * torch.randn(2, len(adapter.init(torch.Generator())))).requires_grad_()
    alone = [make_rows(3, seed) for seed in (1, 2)]
    demonstrated = [
        [replace(row, prompt=[7, 9, 11] + row.prompt) for row in rows] for rows in alone
    ]
    grid = Grid(model, adapter, [], [1e-3])
    loss = on_policy_loss(grid, theta, alone, demonstrated, torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    with torch.no_grad(), adapted(model, adapter, theta.detach()) as student:
        answers = draw_answers(student, alone, torch.Generator().manual_seed(5))
    net = upstream(folder)
    for r in range(2):
        twin = peft_twin(folder, adapter, theta[r].detach())
        total = 0.0
        for row, shown, answer in zip(alone[r], demonstrated[r], answers[r], strict=True):
            own_logits = twin(torch.tensor([row.prompt + answer[:-1]])).logits[0, -len(answer) :]
            teachers = net(torch.tensor([shown.prompt + answer[:-1]])).logits[0, -len(answer) :]
            divergence = 0.0
            for ours, theirs in zip(own_logits.double(), teachers.double(), strict=True):
                p = ours.softmax(0)
                divergence = divergence + (p * (p.log() - theirs.softmax(0).log().detach())).sum()
            total = total + divergence / len(answer) / 3
        total.backward()
        assert loss[r].item() == pytest.approx(total.item(), rel=1e-4)
        assert relative(gradient[r], twin_theta(twin, adapter, gradients=True)) < 1e-3


def test_sdft_draws_from_the_students_own_distribution(small):
    _, model = small
    adapter = LoRA(model)
    theta = 0.3 * torch.randn(1, len(adapter.init(torch.Generator())))
    (row,) = make_rows(1, 4)
    row = replace(row, answer=[5])
    draws = 4000
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        said = draw_answers(student, [[row] * draws], torch.Generator().manual_seed(1))[0]
        shares = student(torch.tensor([row.prompt]))[0, -1].double().softmax(0)
    counts = torch.bincount(torch.tensor([answer[0] for answer in said]), minlength=len(shares))
    often = shares * draws >= 5
    rest = torch.tensor([1 - shares[often].sum()]) * draws
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([shares[often] * draws, rest])
    assert chisquare(seen.numpy(), expected.numpy()).pvalue > 1e-3


def test_sdft_follows_its_teacher(small):
    """The reverse KL on policy falls, and a longer answer ends at the token that ends the true ones."""
    _, model = small
    adapter = LoRA(model)
    rows = [replace(row, answer=[3, 4, 2]) for row in make_rows(4, 8)]
    demonstrated = [replace(row, prompt=[7, 9, 11] + row.prompt) for row in rows]
    taught = Taught(rows, rows[:2], [], [], demonstrated, demonstrated[:2])
    settings = Settings(batch_size=4, epochs=60, patience=60)
    grid = Grid(model, adapter, [taught], [1e-2], settings=settings)
    with further_methods():
        found = METHODS["sdft"](grid)
    first = grid.first_weights(0)[None]
    judged = [
        on_policy_loss(grid, theta, [rows], [demonstrated], torch.Generator().manual_seed(2)).item()
        for theta in (first, found.theta)
    ]
    assert judged[1] < 0.8 * judged[0]
    with torch.no_grad(), adapted(model, adapter, found.theta) as student:
        for answer in draw_answers(student, [rows * 50], torch.Generator().manual_seed(1))[0]:
            assert len(answer) == 3 or answer[-1] == 2
            assert 2 not in answer[:-1]


def test_an_empty_answer_that_nothing_ends_is_refused(monkeypatch):
    tokenizer = SimpleNamespace(closing=[], decode=lambda ids: "Q: what?")
    monkeypatch.setattr(teacher, "generate", lambda *asked, **named: [[]])
    rows = [TokenRow([5, 6], [0])]
    with pytest.raises(UsageError, match="answer to 'Q: what.' is empty.*eos_token_id"):
        teacher.generate_responses(
            None, tokenizer, rows, [[5, 6]], teacher.TeacherSettings(max_tokens=4), None
        )
