"""A fitted adapter in use: probabilities, streams, abstention, self-proof, merging; by transformers and peft too."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from ia2mini.models import checkpoint as checkpoints
from ia2mini.models.checkpoint import TINY
from mistakes import refused
from reference import make_checkpoint, upstream
from safetensors.torch import load_file, save_file
from shipping import shipping

from ia2mini import FitOptions, UsageError, fit, load_adapter, open_subject
from ia2mini.cli.main import main
from ia2mini.cli.rows import arriving
from ia2mini.fitting.measures import confidence_threshold
from ia2mini.tasks import world

QUICK = FitOptions(epochs=1, rates=(1e-2,), methods=("sft",), folds=2)
LABELS = {
    "single": ("apple", "Friday"),
    "several": ("apple Friday", "apple banana"),
    "nested": ("apple", "apple Friday"),
}
RATES = {"lora": 1e-2, "ia3": 1e-1}


def toy_rows(
    count: int, labels=LABELS["single"], start: int = 0, split: str = "train"
) -> list[dict]:
    rows = world.rows("toy-mood", split)[start : start + count]
    return [
        {"id": i, "text": row["text"], "label": labels[row["label"]]} for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


@pytest.fixture(scope="module")
def saved(subject, tmp_path_factory):
    """kind of adapter, kind of labels -> (what was fitted, its folder), each fitted once."""
    known = {}

    def get(adapter="lora", labels="single"):
        if (adapter, labels) not in known:
            folder = tmp_path_factory.mktemp("fitted") / f"{adapter}-{labels}"
            rate = RATES[adapter] if labels == "single" or adapter != "lora" else 3e-2
            options = replace(QUICK, adapter=adapter, rates=(rate,))
            with shipping("sft"):
                fitted = fit(toy_rows(12, LABELS[labels], start=4), subject, options)
            fitted.save(folder)
            known[adapter, labels] = fitted, folder
        return known[adapter, labels]

    return get


def by_hand(model, fitted, text: str) -> list[float]:
    """Probabilities of the labels by a plain loop over them, one pass each."""
    tokenizer, spec = fitted.subject.tokenizer, fitted.spec
    prompt, scores = spec["template"].replace("{text}", text), []
    start, nested = (
        tokenizer.encode(prompt),
        any(a != b and b.startswith(a) for a in spec["labels"] for b in spec["labels"]),
    )
    for label in spec["labels"]:
        ids = tokenizer.encode(prompt + label) + list(tokenizer.eos_ids[:1]) * nested
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -len(ids) :].double().log_softmax(-1)
        scores.append(sum(logits[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
    return (torch.tensor(scores) / spec["temperature"]).softmax(-1).tolist()


@pytest.mark.parametrize(
    "adapter, labels",
    [*((a, "single") for a in RATES), ("lora", "several"), ("lora", "nested"), ("ia3", "nested")],
)
def test_probabilities_are_those_of_peft_and_a_plain_loop(saved, adapter, labels):
    fitted, folder = saved(adapter, labels)
    assert fitted.spec["method"] == "sft", "this test needs a trained adapter"
    theirs = peft.PeftModel.from_pretrained(upstream(TINY), folder).eval()
    rows = toy_rows(6, LABELS[labels], split="eval")
    for found in (list(fitted.answer_rows(rows)), list(load_adapter(folder).answer_rows(rows))):
        for row, said in zip(rows, found, strict=True):
            ours, hand = list(said["probabilities"].values()), by_hand(theirs, fitted, row["text"])
            assert ours == pytest.approx(hand, abs=1e-5) and sum(ours) == pytest.approx(1, abs=1e-6)
            assert (
                said["confidence"] == max(ours)
                and said["probabilities"][said["answer"]] == said["confidence"]
            )
            assert said | row == said, "a row's own columns are kept"


def run(*arguments, input=None, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)), input=input)
    assert result.exit_code == code, result.output
    return result


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_notebook_shows_the_sentence_and_not_every_weight(saved, subject):
    fitted, folder = saved()
    assert repr(subject) == "<Subject tiny, float32>"
    shown = repr(fitted)
    assert shown.startswith("<Predictor ") and "on <Subject tiny, float32>" in shown
    assert shown.endswith(fitted.report["sentence"])
    assert repr(load_adapter(folder)) == shown, "kept in the folder"


def test_wrong_rows_are_told_and_left_out(saved, tmp_path):
    folder, good = saved()[1], [json.dumps(row) for row in toy_rows(3, split="eval")]
    text = "\n".join(
        [
            good[0],
            "{broken",
            "",
            '{"other": 1}',
            "[1]",
            '{"text": null}',
            good[1],
            good[2] + "\r",
            "\xff",
        ]
    )
    (tmp_path / "rows.jsonl").write_bytes(text.encode("latin-1"))
    for where, given in (("-", text.encode("latin-1")), (tmp_path / "rows.jsonl", None)):
        result = run("predict", folder, where, input=given)
        assert [row["id"] for row in lines(result.stdout)] == [0, 1, 2]
        told = [line for line in result.stderr.splitlines() if line.startswith("ia2mini:")]
        assert {line.partition(f"{where}:")[2].partition(":")[0] for line in told} == {
            "2",
            "4",
            "5",
            "6",
            "9",
        }
        assert len(told) == 5
    run("predict", folder, tmp_path / "rows.jsonl", "--strict", code=2)
    run("predict", folder, "-", "--strict", input='{"other": 1}\n', code=2)
    run("predict", folder, tmp_path / "none.jsonl", code=2)


def test_standard_input_is_a_stream(saved):
    """The first answers come while the input is still open."""
    command = [sys.executable, "-m", "ia2mini", "predict", saved()[1], "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) as process:
        process.stdin.write("".join(json.dumps(row) + "\n" for row in toy_rows(64)))
        process.stdin.flush()
        first = [json.loads(process.stdout.readline())["id"] for _ in range(64)]
        process.stdin.write(json.dumps({"text": toy_rows(1)[0]["text"], "id": "last"}) + "\n")
        process.stdin.close()
        assert first == list(range(64)) and json.loads(process.stdout.read())["id"] == "last"


def test_what_has_come_is_answered_while_the_input_stays_open(saved):
    """One row, and the answer to it, at a time; then three at once."""
    command = [sys.executable, "-m", "ia2mini", "predict", saved()[1], "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) as process:
        for some in ([0], [1], [2, 3, 4]):
            process.stdin.write("".join(json.dumps(toy_rows(5)[i]) + "\n" for i in some))
            process.stdin.flush()
            assert [json.loads(process.stdout.readline())["id"] for _ in some] == some
        process.stdin.close()
        assert process.stdout.read() == ""


def test_rows_are_answered_before_the_next_is_asked_for(saved):
    """None stands where the next row has yet to come."""
    rows = toy_rows(3)
    asked = []

    def coming():
        for row in (rows[0], None, None, rows[1], rows[2], None):
            asked.append(row)
            yield row
        raise AssertionError("asked for more before what has come was answered")

    answers = saved()[0].answer_rows(coming())
    assert next(answers)["id"] == 0 and len(asked) == 2
    assert [next(answers)["id"] for _ in range(2)] == [1, 2] and len(asked) == 6


def test_lines_as_they_come_through_a_pipe():
    reading, writing = os.pipe()
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as pipe:
        lines = arriving(stream)
        assert next(lines) is None
        pipe.write(b"one\ntwo\nthr")
        assert [next(lines) for _ in range(3)] == [b"one", b"two", None]
        pipe.write(b"ee\n\n")
        assert [next(lines) for _ in range(3)] == [b"three", b"", None]
        pipe.write(b"x" * 60_000)
        assert next(lines) is None
        pipe.write(b"y" * 60_000 + b"\nlast")
        assert next(lines) == b"x" * 60_000 + b"y" * 60_000
        pipe.close()
        assert [line for line in lines if line is not None] == [b"last"]


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"a", b"a\n", b"a\n\nb\r\nc", b"a\n" * 9 + b"b" * 200_000 + b"\nc"]
)
def test_lines_of_a_file_are_all_there(tmp_path, data):
    (tmp_path / "rows").write_bytes(data)
    for stream in ((tmp_path / "rows").open("rb"), io.BytesIO(data)):
        with stream:
            expected = [line.removesuffix(b"\n") for line in io.BytesIO(data)]
            assert [line for line in arriving(stream) if line is not None] == expected


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_coverage_answers_that_share_of_fresh_rows(saved, coverage):
    fitted, _ = saved()
    rows = toy_rows(2000)
    fitted = load_adapter(saved()[1], fitted.subject)
    fitted.spec["confidences"] = [found["confidence"] for found in fitted.answer_rows(rows[:1000])]
    found = list(fitted.answer_rows(rows[1000:], coverage=coverage))
    sure = [row["answer"] is not None for row in found]
    # of a difference of two shares of 1,000 rows
    error = (2 * coverage * (1 - coverage) / 1000) ** 0.5
    assert abs(np.mean(sure) - coverage) <= 3 * error
    least = min(row["confidence"] for row in found if row["answer"])
    assert all(
        row["confidence"] < least and row["abstained"] for row in found if row["answer"] is None
    )


def test_coverage_of_few_or_equal_confidences(saved):
    fitted = load_adapter(saved()[1], saved()[0].subject)

    def threshold(coverage):
        return confidence_threshold(fitted.spec["confidences"], coverage)

    fitted.spec["confidences"] = [1.0] * 9
    assert threshold(0.5) == 1.0 and threshold(1) == threshold(0.95) == 0.0
    fitted.spec["confidences"] = [0.1 * i for i in range(1, 10)]
    assert threshold(0.9) == pytest.approx(0.1) and threshold(0.5) == pytest.approx(0.5)
    refused(lambda: next(fitted.answer_rows(toy_rows(1), coverage=1.5)), "--coverage 1.5")
    # as good as no row: what is more certain than every held-out row is answered
    assert threshold(1e-12) == pytest.approx(0.9)
    # the base's confidences with demonstrations are not those that were held out
    asked = partial(fitted.answer_rows, toy_rows(1), icl=True, coverage=0.5)
    refused(lambda: next(asked()), "--coverage with --icl")
    fitted.spec["confidences"] = []
    refused(lambda: next(fitted.answer_rows(toy_rows(1), coverage=0.5)), "--coverage")


def test_icl_is_the_base_with_demonstrations(saved, subject):
    fitted, folder = saved()
    rows = toy_rows(5, split="eval")
    shown = "".join(
        fitted.spec["template"].replace("{text}", e["prompt"][5:-7]) + e["answer"] + "\n\n"
        for e in fitted.spec["demonstrations"]
    )
    assert len(fitted.spec["demonstrations"]) == 12 and shown.count("\n\n") == 12
    spec = json.loads((folder / "ia2mini.json").read_text())
    spec["temperature"] = 2.0  # of the adapter's answers: it is not applied to the base's
    (folder / "ia2mini.json").write_text(json.dumps(spec))
    model = upstream(TINY)
    result = run(
        "predict", folder, "-", "--icl", input="".join(json.dumps(row) + "\n" for row in rows)
    )
    for row, found in zip(rows, lines(result.stdout), strict=True):
        ids = torch.tensor(
            [
                subject.tokenizer.encode(
                    shown + fitted.spec["template"].replace("{text}", row["text"])
                )
            ]
        )
        logits = model(ids).logits[0, -1].log_softmax(-1)
        labels = [logits[subject.tokenizer.encode(label)[0]] for label in fitted.spec["labels"]]
        expected = torch.stack(labels).softmax(-1).tolist()
        assert list(found["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_of_peft_with_template_and_labels(tmp_path, subject):
    twin = peft.get_peft_model(
        upstream(TINY), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for p in twin.parameters():
            p += 0.05 * torch.randn(p.shape) * p.requires_grad
    twin.save_pretrained(tmp_path / "a")
    rows = toy_rows(4, split="eval")
    given = "".join(json.dumps({"words": row["text"]}) + "\n" for row in rows)
    how = ("--template", "Text:{words}\\nLabel:", "--labels", "apple,Friday")
    result = run("predict", tmp_path / "a", "-", "--model", "tiny", *how, input=given)
    for row, found in zip(rows, lines(result.stdout), strict=True):
        with torch.no_grad():
            ids = torch.tensor([subject.tokenizer.encode(f"Text:{row['text']}\nLabel:")])
            logits = twin.eval()(ids).logits[0, -1]
        expected = logits[
            [subject.tokenizer.encode(label)[0] for label in ("apple", "Friday")]
        ].softmax(-1)
        assert list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    text = run(
        "predict",
        tmp_path / "a",
        "-",
        "--model",
        "tiny",
        "--template",
        "Text:{words}\\nLabel:",
        input=given,
    )
    assert all(
        isinstance(row["answer"], str) and 0 <= row["confidence"] <= 1 for row in lines(text.stdout)
    )


def test_an_adapter_proves_itself_when_it_is_loaded(saved, tmp_path, subject):
    folder, n = saved()[1], iter(range(9))

    def damaged(change) -> str:
        copy = tmp_path / str(next(n))
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "adapter_model.safetensors")
        config = json.loads((copy / "adapter_config.json").read_text())
        change(tensors, config)
        save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return copy

    assert load_adapter(damaged(lambda tensors, config: None), subject).theta is not None
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    refused(
        lambda: load_adapter(damaged(lambda t, c: t[name].zero_()), subject),
        "the adapter is damaged",
    )
    refused(lambda: load_adapter(damaged(lambda t, c: t.pop(name)), subject), "lora_B")
    lost = damaged(lambda t, c: [t.pop(name), t.pop(name.replace("_B", "_A"))])
    refused(lambda: load_adapter(lost, subject), "do not name the same matrices")
    lost = damaged(lambda t, c: c["target_modules"].remove("o_proj"))
    refused(lambda: load_adapter(lost, subject), "do not name the same matrices")
    refused(
        lambda: load_adapter(damaged(lambda t, c: c.update(lora_alpha=16)), subject),
        "the adapter is damaged",
    )
    shutil.copytree(TINY, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.05
    save_file(weights, tmp_path / "other" / "model.safetensors")
    refused(
        lambda: load_adapter(folder, open_subject(str(tmp_path / "other"), "cpu")),
        "not the one it was fitted on",
    )
    random = make_checkpoint(tmp_path / "random", "llama")
    refused(lambda: load_adapter(folder, open_subject(str(random), "cpu")), str(folder))


@pytest.mark.parametrize("shard", ["5GB", "300kB"])
def test_merged_equals_unmerged(saved, tmp_path, subject, monkeypatch, shard):
    monkeypatch.setattr(checkpoints, "LARGEST", shard)
    fitted, folder = saved()
    result = run("merge", folder, "--out", tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1 if shard == "5GB" else 5
    rows, whole = toy_rows(8, split="eval"), open_subject(str(tmp_path / "whole"), "cpu")
    ids = torch.tensor([subject.tokenizer.encode(f"Text:{rows[0]['text']}\nLabel:")])
    with torch.no_grad(), fitted.student() as student:
        expected = student(ids)
        rounding = 2e-6 * expected.abs().max()  # of float32, over all layers
        assert (whole.model(ids) - expected).abs().max() <= rounding
        assert (upstream(tmp_path / "whole")(ids).logits - expected).abs().max() <= rounding
    assert float(result.stdout.split()[-1]) <= rounding
    assert whole.tokenizer.encode("Text:a\n") == subject.tokenizer.encode("Text:a\n")


def test_a_prompt_longer_than_the_model_reads_is_a_wrong_row(saved, subject):
    fitted, folder = saved()
    most = subject.model.config.max_position_embeddings
    long = {"text": " ".join(["good"] * (most + 1))}
    refused(
        lambda: list(fitted.answer_rows([toy_rows(1)[0], long])),
        "row 2",
        f"the model reads 1 to {most}",
    )
    given = "".join(json.dumps(row) + "\n" for row in (long, toy_rows(1)[0]))
    result = run("predict", folder, "-", input=given)
    assert len(lines(result.stdout)) == 1 and "-:1: its prompt has" in result.stderr


def test_emoji_numbers_and_no_rows(saved):
    fitted, folder = saved()
    with pytest.warns(UserWarning, match="not in the vocabulary"):
        (found,) = fitted.answer_rows([{"text": "good 🙂 東京"}])
    assert found["text"] == "good 🙂 東京" and sum(
        found["probabilities"].values()
    ) == pytest.approx(1)
    assert next(fitted.answer_rows([{"text": 5}]))["text"] == 5
    refused(lambda: fitted.predict(["good", None]), "row 2", "None")
    refused(lambda: fitted.predict_proba(["good", None, "bad"]), "row 2", "None")
    assert list(fitted.answer_rows([])) == [] and run("predict", folder, "-", input="").stdout == ""


def test_a_damaged_description_is_one_line(saved, tmp_path):
    _, folder = saved()
    copy = shutil.copytree(folder, tmp_path / "copy")
    spec = json.loads((copy / "ia2mini.json").read_text())
    wrong = [
        ("max_tokens", 2**40),
        ("max_tokens", 0),
        ("temperature", 0),
        ("temperature", float("nan")),
    ]
    wrong += [("confidences", [float("nan")]), ("confidences", [2])]
    for field, value in (("method", None), ("canary", 3), ("canary", {}), *wrong):
        broken = {key: v for key, v in spec.items() if value is not None or key != field}
        (copy / "ia2mini.json").write_text(
            json.dumps(broken | ({field: value} if value is not None else {}))
        )
        with pytest.raises(UsageError, match="fit the adapter again"):
            load_adapter(copy)
