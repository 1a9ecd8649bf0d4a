"""`--paper-compat` against peft, transformers' arithmetic and plain loops: what the released scripts do."""

from dataclasses import replace

import pytest
import torch
from ia2mini.models import load
from reference import VOCABULARY, make_checkpoint, peft_twin, upstream
from tokenizers import Tokenizer as Backend

import ia2mini.engine.experiment
import ia2mini.study.records
import ia2mini.study.scoring
from ia2mini.adapters import IA3, LoRA, adapted
from ia2mini.batch import TokenRow, collate
from ia2mini.engine.merge import Merged
from ia2mini.engine.options import Options
from ia2mini.engine.subject import open_subject
from ia2mini.labels import label_scores
from ia2mini.scale.pack import in_one_batch, pack
from ia2mini.study.asim import layer_asim
from ia2mini.study.scoring import spellings
from ia2mini.study.study import compare
from ia2mini.tasks import find_task
from ia2mini.tokenizer import Tokenizer
from ia2mini.train import run_losses

COMPAT = Options(n=(2,), sets=2, epochs=3, eval_rows=8, rates=(1e-3, 1e-2), paper_compat=True)


def theta_of(adapter, model, runs: int):
    first = torch.stack([adapter.init(torch.Generator().manual_seed(r)) for r in range(runs)])
    return first + 0.2 * torch.randn(first.shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3 inputs"])
def test_scored_weights_are_those_that_peft_merges_rounded_to_bfloat16(kind, tiny):
    folder, model = tiny
    adapter = LoRA(model) if kind == "lora" else IA3(model, scale_inputs=kind == "ia3 inputs")
    theta, ids = theta_of(adapter, model, 2), torch.randint(0, VOCABULARY, (2, 3, 7))
    with torch.no_grad(), adapted(model, Merged(adapter), theta) as student:
        ours = student(ids.flatten(0, 1)).unflatten(0, (2, 3))
    for r in range(2):
        net = peft_twin(folder, adapter, theta[r]).merge_and_unload()
        for name, matrix in net.named_modules():
            if name in adapter.linears:
                matrix.weight.data = matrix.weight.data.bfloat16().float()
                if matrix.bias is not None and kind == "ia3":
                    matrix.bias.data = matrix.bias.data.bfloat16().float()
        with torch.no_grad():
            assert (net(ids[r]).logits - ours[r]).abs().max() < 1e-4
    with torch.no_grad(), adapted(model, adapter, theta) as student:
        assert (student(ids.flatten(0, 1)).unflatten(0, (2, 3)) - ours).abs().max() > 1e-4, (
            "no rounding was seen"
        )


@pytest.mark.parametrize("packed", [False, True])
def test_losses_are_rounded_row_by_row(packed, tmp_path):
    # dividing by 2 or 4 would not round
    model, _ = load(make_checkpoint(tmp_path, "qwen3", num_hidden_layers=3))
    generator = torch.Generator().manual_seed(0)
    L, D = model.config.num_hidden_layers, model.config.hidden_size
    runs = []
    for _ in range(2):
        rows = []
        for prompt, answer in ((5, 1), (3, 4), (9, 2)):
            ids = torch.randint(0, VOCABULARY, (prompt + answer,), generator=generator).tolist()
            teacher = torch.randn(L, answer, D, generator=generator)
            logs, tokens = (
                torch.randn(answer, VOCABULARY, generator=generator).log_softmax(-1).sort(-1)
            )
            rows.append(TokenRow(ids[:prompt], ids[prompt:], teacher, logs, tokens))
        runs.append(rows)
    adapter = LoRA(model)
    theta = theta_of(adapter, model, 2)
    for mix in ({"mse": torch.ones(2)}, {"kl": torch.ones(2)}, {"ce": torch.ones(2)}):
        (name,) = mix
        expected = []
        for r, rows in enumerate(runs):
            each = []
            for row in rows:
                with torch.no_grad(), adapted(model, adapter, theta[[r]]) as student:
                    value = run_losses(student, collate([[row]]), mix)[0]
                if name == "mse":
                    value = (value / L).bfloat16() * L
                # transformers' is float32
                each.append(value.item() if name == "ce" else value.bfloat16().item())
            expected.append(sum(each) / len(each))
        with torch.no_grad(), adapted(model, adapter, theta) as student:
            (as_scripts,) = in_one_batch(runs)
            plain = pack(collate(runs))
            assert as_scripts.packed and plain.packed
            if not packed:
                plain = collate(runs)
                as_scripts = replace(plain, rows=as_scripts.rows)
            found, plain = (run_losses(student, batch, mix) for batch in (as_scripts, plain))
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
        assert name == "ce" or (found - plain).abs().max() > 1e-4, "nothing was rounded"


def test_a_study_trains_and_stops_by_rounded_losses(tmp_path):
    """With one dev row every dev loss is a bfloat16 number."""
    subject, task = open_subject("tiny", "cpu", None, None), find_task("toy-mood")
    options = replace(COMPAT, methods=("sft", "ia2", "soft"))
    document, _ = compare([task], subject, options, tmp_path)
    found = {}
    for run in document["training"]:
        loss = torch.tensor(run["dev_loss"])
        found.setdefault(run["method"], []).append(bool(loss == loss.bfloat16().float()))
    assert all(found["ia2"]) and all(found["soft"]) and not any(found["sft"])


def test_soft_labels_are_the_whole_vocabulary(tmp_path, monkeypatch):
    asked, teach = [], ia2mini.engine.experiment.teach

    def seen(*given, **more):
        asked.append(more["settings"].soft_k)
        return teach(*given, **more)

    monkeypatch.setattr(ia2mini.engine.experiment, "teach", seen)
    subject, task = open_subject("tiny", "cpu", None, None), find_task("toy-mood")
    for compat in (True, False):
        compare(
            [task],
            subject,
            replace(COMPAT, methods=("soft",), soft_k=7, paper_compat=compat),
            tmp_path,
        )
    assert asked == [subject.model.config.vocab_size] * 2 + [7] * 2


def test_blanks_around_a_generated_token_do_not_count(shared_data):
    labels = ("apple", "Friday", "banana", "Saturday")
    for family in ("qwen3", "llama3"):
        backend = Backend.from_file(str(shared_data / "tokenizers" / family / "tokenizer.json"))
        tokenizer = Tokenizer(backend, ())
        size = tokenizer.backend.get_vocab_size() + 5  # embeddings are padded beyond the vocabulary
        found = spellings(tokenizer, labels, size)
        for place, label in enumerate(labels):
            for text in (label, f" {label}"):
                ids = tokenizer.encode(text, special=False)
                assert len(ids) > 1 or found[ids[0]] == place
        (spaced,) = tokenizer.encode(" Friday", special=False)
        assert found[spaced] == 1 and found[tokenizer.encode(" friday", special=False)[0]] == -1
        wanted = [i for i in range(size - 5) if tokenizer.backend.decode([i]).strip() in labels]
        assert (found >= 0).nonzero()[:, 0].tolist() == wanted and len(found) == size


def test_a_token_that_is_spelled_like_a_label_is_right(model, folder):
    prompts, labels = [[3, 9, 27], [5, 6, 7, 8]], [[48], [70]]
    tops = [upstream(folder)(torch.tensor([ids])).logits[0, -1].argmax().item() for ids in prompts]
    assert not {48, 70} & set(tops) and len(set(tops)) == 2
    spelled = torch.full((VOCABULARY,), -1)
    spelled[tops[1]] = 1
    found = label_scores(model, prompts, labels)
    assert found.first_token.tolist() == [tops]
    longer = label_scores(model, prompts, [[48], [70, 49]])  # predicted after 70, too
    assert longer.first_token.tolist() == [tops]
    assert found.top.tolist() == [[-1, -1]] and spelled[found.first_token].tolist() == [[-1, 1]]


def test_asim_is_a_mean_over_rows(model, folder):
    generator = torch.Generator().manual_seed(0)
    L, D = model.config.num_hidden_layers, model.config.hidden_size
    rows = [
        TokenRow([1, 2, 3], [4] * size, torch.randn(L, size, D, generator=generator))
        for size in (1, 2, 9)
    ]
    alone = torch.stack([layer_asim(model, [[row]])[0] for row in rows])
    for budget in (10, 4096):
        assert layer_asim(model, [rows], budget, by_row=True)[0] == pytest.approx(
            alone.mean(0), abs=1e-6
        )
    by_position = (alone * torch.tensor([1.0, 2.0, 9.0])[:, None]).sum(0) / 12
    assert layer_asim(model, [rows])[0] == pytest.approx(by_position, abs=1e-6)


def test_options_in_python_choose_the_rate_as_the_command_does():
    assert COMPAT.select == "eval" and replace(COMPAT, select="dev").select == "eval"
    assert (
        Options().select == "dev"
        and replace(COMPAT, paper_compat=False, select="both").select == "both"
    )


def test_a_study_scores_as_the_released_scripts_do(tmp_path, monkeypatch):
    """Merged weights, tokens by their spelling, the scripts' bins: only with the option, and of every evaluation."""
    used = []

    def counted(module, name):
        original = getattr(module, name)

        def call(*given, **more):
            used.append((name, *[part for part in given if isinstance(part, str)]))
            return original(*given, **more)

        monkeypatch.setattr(module, name, call)

    counted(ia2mini.study.scoring, "Merged")
    counted(ia2mini.study.scoring, "spellings")
    counted(ia2mini.study.records, "measure")
    subject, task = open_subject("tiny", "cpu", None, None), find_task("toy-mood")
    for compat in (True, False):
        used.clear()
        compare(
            [task], subject, replace(COMPAT, methods=("icl", "sft"), paper_compat=compat), tmp_path
        )
        schemes = {part[1] for part in used if part[0] == "measure"}
        assert schemes == {"scripts" if compat else "width"}
        assert (
            {"Merged", "spellings"} <= {part[0] for part in used}
            if compat
            else len({p[0] for p in used}) == 1
        )
