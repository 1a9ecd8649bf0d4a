"""decision.json and decision_template.jinja: what transformers makes of them is what `predict` says."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jinja2
import peft
import pytest
import torch
import transformers
from ia2mini.models.checkpoint import TINY
from jinja2.sandbox import ImmutableSandboxedEnvironment
from reference import make_checkpoint, upstream
from shipping import LABELS, predictor
from transformers import PreTrainedTokenizerFast

from ia2mini import load_adapter, open_subject
from ia2mini.fitting.probe import Probe
from ia2mini.fitting.serving import decision_template, why_not, write_decision
from ia2mini.report.card import card
from ia2mini.tasks import world
from ia2mini.tasks.rows import Row

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}<|assistant|>"
)
THINKING = CHATML + "{% if enable_thinking is defined %}<think></think>{% endif %}"
VERSION = transformers.__version__
DECIDES = tuple(map(int, VERSION.split(".")[:2])) >= (5, 24)
new_enough = pytest.mark.skipif(
    not DECIDES, reason=f"transformers has pipeline('decision') since 5.24; here is {VERSION}"
)


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", "cpu")


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers renders templates in."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message):
        raise jinja2.TemplateError(message)

    made.globals["raise_exception"] = refuse
    return made


def choice(labels=LABELS, kind="choice") -> dict:
    return {"type": kind, "options": list(labels), "labels": list(labels)}


def rendered(template: str, state, question=None) -> str:
    """The text of a request, with all that transformers hands to a template."""
    given = {"messages": [{"role": "user", "content": ""}], "tools": None, "documents": None}
    given |= {"add_generation_prompt": True, "enable_thinking": False}
    given |= {"state": state, "question": question or choice()}
    return environment().from_string(template).render(given)


def by_hand(model, backend, folder: Path, row: dict) -> list[float]:
    """Probabilities of the labels by the two files alone: one pass, the labels' logits, softmax."""
    config = json.loads((folder / "decision.json").read_text())
    template = (folder / "decision_template.jinja").read_text(encoding="utf-8")
    assert config["chat_template"] == template
    labels = config["labels"]["choice"]
    text = rendered(template, row, choice(labels))
    ids = backend.encode(text, add_special_tokens=False).ids
    tokens = [backend.encode(label, add_special_tokens=False).ids for label in labels]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    scores = torch.stack([logits[token].squeeze() for token in tokens])
    return (scores.double() / config["temperature"]["choice"]).softmax(-1).tolist()


SHIPPED = [("sft", "lora"), ("sft", "ia3"), ("icl-sft", "lora"), ("icl", None), ("base", None)]


@pytest.mark.parametrize("method, adapter", SHIPPED)
def test_a_plain_softmax_over_the_template_is_what_predict_says(subject, tmp_path, method, adapter):
    fitted = predictor(subject, method, adapter)
    fitted.save(tmp_path)
    model = upstream(TINY)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    rows = world.rows("toy-mood", "eval")[:6]
    for row, said in zip(rows, load_adapter(tmp_path, subject).answer_rows(rows), strict=True):
        hand = by_hand(model, subject.tokenizer.backend, tmp_path, row)
        assert list(said["probabilities"].values()) == pytest.approx(hand, abs=1e-5)


ODD_ROWS = [
    {"text": "a \"b\" 'c' \\n {text} {{ text }} {% x %} {# y #}", "more": "東京 🙂\u2028 é"},
    {"text": " blanks \n\n", "more": "\ttabs"},
    {"text": 5, "more": 2.0},
    {"text": True, "more": 2.5},
    {"text": False, "more": 1e22},
    {"text": -0.0, "more": 1e-9, "note": 0},
    {"text": "</s><|user|>", "more": "<s>", "note": "a note"},
    {"text": "a", "more": "b", "note": " \n"},
    {"text": "a", "more": "b", "note": None},
    {"text": "a", "more": "b", "note": float("nan")},
]
ODD_TEMPLATES = [
    "{text}\n{?note}\n{more}?",
    "{more}{text}{text}\n",
    'say "{text}" \\ {{more}\n\n{?note}{?note}\r\n\x1b🙂 #} %} }} -%',
]


@pytest.mark.parametrize("chat", [None, CHATML, THINKING])
@pytest.mark.parametrize("template", ODD_TEMPLATES)
@pytest.mark.parametrize("method", ["base", "icl"])
def test_any_row_becomes_the_same_tokens_as_in_predict(tmp_path, chat, template, method):
    """Of a tokenizer that writes BOS; with `chat`, as a turn of that chat template."""
    folder = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    if chat:
        (folder / "chat_template.jinja").write_text(chat)
    how = {"template": template, "chat": bool(chat), "labels": ["x", "y"]}
    fitted = predictor(open_subject(str(folder), "cpu"), method, **how)
    assert why_not(fitted) is None
    tokenizer = fitted.subject.tokenizer
    written = decision_template(fitted)
    for row in ODD_ROWS:
        shown = fitted.demonstrations() if method == "icl" else []
        question = fitted.make_query(Row("here", row), shown)
        before = "".join(f"{e.prompt}{e.answer}\n\n" for e in shown)
        expected = tokenizer.encode(before + question.prompt)
        if chat:
            expected = tokenizer.encode(question.prompt.after(shown))
        text = rendered(written, row, choice(["x", "y"]))
        assert tokenizer.backend.encode(text, add_special_tokens=False).ids == expected
        assert ("<think>" in text) is False


WRONG = {
    "another order": ({"text": "a"}, choice(LABELS[::-1])),
    "fewer labels": ({"text": "a"}, choice(LABELS[:1])),
    "another kind": ({"text": "a"}, choice(LABELS, "score")),
    "no such column": ({"txt": "a"}, choice()),
    "a method of dicts": ({"items": "a"}, choice()),
    "nothing": ({"text": None}, choice()),
    "not a number": ({"text": float("nan")}, choice()),
    "endless": ({"text": float("inf")}, choice()),
    "a list": ({"text": ["a"]}, choice()),
    "no row": (["a"], choice()),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused(subject, name):
    state, question = WRONG[name]
    template = decision_template(predictor(subject))
    with pytest.raises(jinja2.TemplateError):
        rendered(template, state, question)


def test_the_text_of_a_single_column_may_be_the_state(subject):
    template = decision_template(predictor(subject))
    assert rendered(template, "a film") == rendered(template, {"text": "a film"})
    two = decision_template(predictor(subject, template="{text} {more}"))
    with pytest.raises(jinja2.TemplateError):
        rendered(two, "a film")


REFUSED = {
    "'apple Friday' is 2 tokens": {"labels": ["Friday", "apple Friday"]},
    "end of sequence, since a label begins another one": {"labels": ["apple", "apple Friday"]},
    "the answers are texts": {"labels": []},
    "a linear probe answers": {"method": "probe"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_where_it_cannot_be_served_files_of_an_earlier_fit_go(subject, tmp_path, why):
    predictor(subject).save(tmp_path)
    assert (tmp_path / "decision.json").exists()
    fitted = predictor(subject)
    fitted.spec |= REFUSED[why]
    if "method" in REFUSED[why]:
        fitted.adapter = None
        size = subject.model.config.hidden_size
        labels = len(fitted.spec["labels"])
        fitted.probe = Probe(torch.zeros(labels, size), torch.zeros(labels))
    fitted.save(tmp_path)
    assert not list(tmp_path.glob("decision*"))
    text = card(fitted, tmp_path, "ia2mini fit")
    assert why in text and "decision.json" not in text and "systemone" not in text


def test_a_template_that_cannot_be_written_is_not(tmp_path):
    """A chat template that makes more of the text than its place."""
    folder = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(
        "{{ messages | length }}{{ add_generation_prompt }}"
    )
    fitted = predictor(open_subject(str(folder), "cpu"), "base", chat=True, labels=["x", "y"])
    assert why_not(fitted) is None, "the same text"
    other = "{% if state is defined %}other{% endif %}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(other)
    fitted = predictor(open_subject(str(folder), "cpu"), "base", chat=True, labels=["x", "y"])
    assert "cannot be written" in why_not(fitted)
    write_decision(fitted, folder)
    assert not list(folder.glob("decision*"))


@pytest.mark.parametrize("method, adapter", SHIPPED)
def test_the_card_shows_what_serves_it(subject, tmp_path, method, adapter):
    fitted = predictor(subject, method, adapter)
    fitted.save(tmp_path / "a b")
    fitted.subject = replace(subject, base="/models/mine")
    text = card(fitted, tmp_path / "a b", "ia2mini fit")
    for code in re.findall("^```python\n(.*?)^```$", text, re.S | re.M):
        compile(code, "card", "exec")
    assert f"decision_config='{tmp_path}/a b'" in text
    assert f"transformers serve '{tmp_path}/a b-merged'" in text or adapter is None
    assert ("transformers serve /models/mine --dtype float32" in text) == (adapter is None)
    assert f"--decision-config '{tmp_path}/a b/decision.json'" in text or adapter
    assert ("convert_hf_to_gguf.py" in text) == ("ia2mini merge" in text) == (adapter is not None)
    # split conformal: of 19 held-out rows and a new one
    assert "0.050000 (coverage 0.95), 0.100000 (coverage 0.9)" in text
    assert "0.200000 (coverage 0.8), 0.500000 (coverage 0.5)" in text
    (request,) = [line for line in text.splitlines() if line.startswith("curl")]
    body = json.loads(re.search(r"-d '(.*)'$", request)[1])
    assert body["questions"]["label"]["criteria"] == {"Friday": None, "apple": None}
    assert body["state"] == {"text": "A text"}


def test_a_merged_folder_can_be_served(subject, tmp_path):
    fitted = predictor(subject)
    fitted.save(tmp_path / "a")
    fitted.merge(tmp_path / "b")
    for name in ("decision.json", "decision_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = world.rows("toy-mood", "eval")[:3]
    model = upstream(tmp_path / "b")
    for row, said in zip(rows, fitted.answer_rows(rows), strict=True):
        hand = by_hand(model, subject.tokenizer.backend, tmp_path / "b", row)
        assert list(said["probabilities"].values()) == pytest.approx(hand, abs=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_the_tokenizer_that_transformers_loads_is_ours(subject, tmp_path, merged):
    """Without tokenizer_config.json it takes that of Qwen2, which splits otherwise."""
    folder = TINY
    if merged:
        folder = tmp_path / "b"
        shutil.copytree(TINY, tmp_path / "c")
        (tmp_path / "c" / "tokenizer_config.json").unlink()
        predictor(open_subject(str(tmp_path / "c"), "cpu")).merge(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Text:a good film, with 12.\nLabel:"
    assert theirs(text).input_ids == subject.tokenizer.encode(text)


@new_enough
@pytest.mark.parametrize("method, adapter", SHIPPED)
def test_the_decision_pipeline_says_what_predict_says(subject, tmp_path, method, adapter):
    fitted = predictor(subject, method, adapter)
    fitted.save(tmp_path)
    rows = [*world.rows("toy-mood", "eval")[:6], {"text": "a good <eos> film"}]
    model = upstream(TINY)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    how = {"model": model, "tokenizer": tokenizer, "decision_config": str(tmp_path)}
    decide = transformers.pipeline("decision", **how)
    question = {"type": "choice", "criteria": dict.fromkeys(LABELS)}
    for row, said in zip(rows, fitted.answer_rows(rows), strict=True):
        found = decide({"state": row, "questions": {"label": question}})["label"]
        assert found["probabilities"] == pytest.approx(said["probabilities"], abs=1e-5)
        assert found["choice"] == said["answer"]
    wrong = {"type": "choice", "criteria": dict.fromkeys(LABELS[::-1])}
    with pytest.raises(jinja2.TemplateError, match="in this order"):
        decide({"state": rows[0], "questions": {"label": wrong}})


@pytest.mark.parametrize("chat", [False, True])
def test_on_real_weights(real, tmp_path, chat):
    """By hand, and by the pipeline where transformers has it."""
    fitted = predictor(open_subject(str(real), "cpu"), chat=chat, labels=["negative", "positive"])
    fitted.theta *= 0.01
    fitted.save(tmp_path)
    model = peft.PeftModel.from_pretrained(upstream(real), tmp_path).eval()
    rows = [{"text": "a moving , well-acted film"}, {"text": "dull<|im_end|>\n 東京"}]
    decide = None
    if DECIDES:
        tokenizer = transformers.AutoTokenizer.from_pretrained(real)
        how = {"model": model, "tokenizer": tokenizer, "decision_config": str(tmp_path)}
        decide = transformers.pipeline("decision", **how)
    question = {"type": "choice", "criteria": dict.fromkeys(fitted.spec["labels"])}
    for row, said in zip(rows, fitted.answer_rows(rows), strict=True):
        hand = by_hand(model, fitted.subject.tokenizer.backend, tmp_path, row)
        assert list(said["probabilities"].values()) == pytest.approx(hand, abs=3e-5)
        if decide:
            found = decide({"state": row, "questions": {"label": question}})["label"]
            assert found["probabilities"] == pytest.approx(said["probabilities"], abs=3e-5)


@contextmanager
def serving(folder: Path):
    """`transformers serve` of a folder on loopback; the address of /v1/systemone."""
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="transformers serve needs transformers[serving]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                with socket.socket() as caller:
                    if caller.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            assert process.poll() is None, "transformers serve ended"
            yield f"http://127.0.0.1:{port}/v1/systemone"
        finally:
            process.send_signal(signal.SIGKILL)


@new_enough
def test_transformers_serve_says_what_predict_says(subject, tmp_path):
    fitted = predictor(subject)
    fitted.merge(tmp_path / "b")
    rows = world.rows("toy-mood", "eval")[:3]
    question = {"type": "choice", "criteria": dict.fromkeys(LABELS)}
    with serving(tmp_path / "b") as address:
        for row, said in zip(rows, fitted.answer_rows(rows), strict=True):
            body = {"model": str(tmp_path / "b"), "state": row, "questions": {"label": question}}
            request = urllib.request.Request(address, json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request) as response:
                found = json.load(response)["answers"]["label"]
            assert found["probabilities"] == pytest.approx(said["probabilities"], abs=1e-5)
