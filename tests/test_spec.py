"""`ia2mini.json` and other small files with anything in their fields: one line, never a traceback or a wrong answer."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from commands import invoke
from mistakes import refused
from reference import make_checkpoint

from ia2mini import UsageError, load_adapter, open_subject
from ia2mini.adapters import LoRA
from ia2mini.fitting.predictor import FOREIGN, Predictor
from ia2mini.fitting.spec import SHAPE
from ia2mini.tokenizer import Tokenizer

WILD = [
    None,
    True,
    -1,
    0,
    2**70,
    0.5,
    float("nan"),
    "",
    " ",
    "x",
    "\ud800",
    [],
    {},
    [None],
    [""],
    ["\ud800"],
]
WILD += [["a"], ["a", "a"], [[]], {"a": {}}, "x" * 100_000]
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 4,
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = make_checkpoint(
        tmp_path_factory.mktemp("model"), "qwen3", **SIZES, num_key_value_heads=1
    )
    return open_subject(str(folder), "cpu")


@pytest.fixture(scope="module", params=["labels", "texts"])
def saved(request, subject, tmp_path_factory):
    adapter = LoRA(subject.model, rank=2)
    theta = adapter.init(torch.Generator().manual_seed(1))
    spec = FOREIGN | {"method": "sft", "example": "film", "template": "{text}\n", "max_tokens": 2}
    if request.param == "labels":
        spec |= {"labels": ["a", "b"], "parser": None, "confidences": [0.6]}
    spec["demonstrations"] = [{"prompt": "c", "answer": "a"}]
    folder = tmp_path_factory.mktemp("saved") / request.param
    Predictor(subject, adapter, theta[None], spec).save(folder)
    return folder


def places(shape, path: tuple = ()) -> list[tuple]:
    """The path to every field that a shape names, the first entry of lists."""
    if isinstance(shape, dict):
        inside = shape.items()
    elif isinstance(shape, list):
        inside = [(0, shape[0])]
    else:
        return [path]
    found = [path] if path else []
    for key, inner in inside:
        found += places(inner, (*path, key))
    return found


@pytest.mark.parametrize("path", places(SHAPE), ids=lambda path: ".".join(map(str, path)))
def test_every_field_with_anything_in_it(path, saved, subject, tmp_path):
    whole = json.loads((saved / "ia2mini.json").read_text())
    folder = shutil.copytree(saved, tmp_path / "copy")
    usual = list(load_adapter(saved, subject).answer_rows([{"text": "a film"}]))
    for value in WILD:
        broken = deepcopy(whole)
        owner = broken
        for key in path[:-1]:
            owner = owner[key]
        if isinstance(owner, list) and not owner:  # of labels there are none, say
            continue
        owner[path[-1]] = value
        (folder / "ia2mini.json").write_text(json.dumps(broken))
        try:
            found = list(load_adapter(folder, subject).answer_rows([{"text": "a film"}]))
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            continue
        asked = path[0] in (
            "template",
            "labels",
            "parser",
            "max_tokens",
            "stop",
            "temperature",
            "chat",
        )
        assert asked or found == usual, f"{path} = {value!r}"


def test_what_a_label_or_template_cannot_be(saved, subject):
    for labels in ("ab", ["a"], ["a", "a"], ["a", ""], ["a", " "], ["a", 1], ["a", "\ud800"], None):
        refused(
            lambda given=labels: load_adapter(saved, subject, labels=given),
            "labels = ",
            "two or more different",
        )
    for template in ("", "no column", "{text}\ud800", 3, None):
        refused(
            lambda given=template: load_adapter(saved, subject, template=given),
            "template = ",
            "columns in braces",
        )
    for name, value in {
        "parser": "none",
        "max_tokens": 0,
        "stop": 1,
        "temperature": 0,
        "chat": 1,
    }.items():
        refused(
            lambda given={name: value}: load_adapter(saved, subject, **given),
            f"{name} = {value!r}: it must be",
        )
    refused(
        lambda: load_adapter(saved, subject, lables=["a", "b"]),
        "lables: unknown; what can be said",
        "labels",
    )
    if json.loads((saved / "ia2mini.json").read_text())["labels"]:
        for labels in (("b", "a"), ("a", "b", "c"), ("no", "yes")):
            refused(
                lambda given=labels: load_adapter(saved, subject, labels=given),
                "it was fitted to 'a', 'b'; leave labels out",
            )
    assert load_adapter(saved, subject, labels=("a", "b"), template="{text}\n").spec["labels"] == (
        "a",
        "b",
    )


def test_a_test_prompt_that_is_longer_than_the_model_reads(saved, subject, tmp_path, monkeypatch):
    kept = json.loads((saved / "ia2mini.json").read_text())
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "ia2mini.json").write_text(
        json.dumps(kept | {"example": "x" * (subject.context_length + 1)})
    )
    monkeypatch.setattr(type(subject.model), "forward", None)  # no pass over it is begun
    refused(
        lambda: load_adapter(folder, subject),
        f"{subject.context_length + 1} tokens",
        "fit the adapter again",
    )


def test_an_answer_column_that_is_no_name(saved, tmp_path):
    kept = json.loads((saved / "ia2mini.json").read_text())
    folder = shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "rows.csv").write_text("text,label\nfilm,a\n")
    for value in ([None], {}, 3, "\ud800"):
        (folder / "ia2mini.json").write_text(json.dumps(kept | {"answer_column": value}))
        result = invoke("score", folder, tmp_path / "rows.csv")
        assert (
            result.exit_code == 2
            and "field answer_column is missing or not what it should be" in result.stderr
        )


def test_half_a_character_in_a_text_is_named(subject):
    tokenizer = subject.tokenizer
    for call in (
        lambda: tokenizer.encode("a\ud800"),
        lambda: tokenizer.encode_all(["a", "a\udcff"]),
        lambda: tokenizer.count(["\udfff"]),
        lambda: tokenizer.label_tokens("a", ("b", "\ud800")),
    ):
        refused(call, "holds half a surrogate pair, which is no character", "\\ud")
    assert tokenizer.decode(tokenizer.encode("\U0001f600")) == "\U0001f600"  # both halves


def broken_tokenizer(subject, folder, **changes) -> Tokenizer:
    said = json.loads((subject.folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(said | changes))
    (folder / "config.json").write_text("{}")
    return Tokenizer.from_folder(folder)


def test_tokenizer_files_that_break_only_on_a_text(subject, tmp_path):
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    mend = "the tokenizer.json of this checkpoint is broken", "download it again"
    lacking = broken_tokenizer(subject, tmp_path, model=words)
    refused(lambda: lacking.encode("word"), *mend)
    refused(lambda: lacking.encode_all(["word", "word"]), *mend)
    piece = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": piece, "pair": piece, "special_tokens": {}}
    panics = broken_tokenizer(subject, tmp_path, post_processor=template)
    refused(lambda: panics.encode("a"), *mend)
    refused(lambda: panics.count(["a"]), *mend)
    # what they say is looked up in a text that is read
    ends = {"add_bos_token": True, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ends))
    refused(lambda: Tokenizer.from_folder(tmp_path), *mend)


def test_an_interrupt_while_a_text_is_read_stays_one(subject, monkeypatch):
    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr(subject.tokenizer, "backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        subject.tokenizer.encode("a")


def test_a_model_in_a_folder_that_is_not_utf_8(subject, tmp_path, monkeypatch):
    folder = shutil.copytree(subject.folder, tmp_path / "caf\udce9" / "model")
    monkeypatch.chdir(folder.parent)  # so that no argument holds the name
    result = invoke("generate", "--model", "model", "--prompt", "a", "--device", "cpu")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and "is not UTF-8; rename it" in line and "delete" not in line


def test_names_that_are_too_long_are_one_line(saved, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n')
    for command in (
        ["generate", "--prompt", "a", "--model"],
        ["predict", saved, tmp_path / "r.jsonl", "--model"],
    ):
        result = invoke(*command, "x" * 5000)
        (line,) = result.stderr.splitlines()
        assert (
            result.exit_code == 2
            and line.startswith("ia2mini: unknown model 'xxx")
            and len(line) < 1100
        )
