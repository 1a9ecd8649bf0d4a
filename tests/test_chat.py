"""Prompts as turns of a conversation: rendered as transformers renders them, fitted, and predicted with."""

import json
import shutil
from dataclasses import replace

import pytest
import transformers
from click.testing import CliRunner
from ia2mini.models.checkpoint import TINY
from mistakes import refused
from reference import make_checkpoint

from ia2mini import FitOptions, fit, load_adapter, open_subject
from ia2mini.chat import ChatTemplate
from ia2mini.cli import main
from ia2mini.episode import with_demonstrations
from ia2mini.tasks import Example, world
from ia2mini.tokenizer import Tokenizer

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}
    {%- if m.content is none %}{% continue %}{% endif %}
    {{- '[' + m.role|upper + '] ' + m.content | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[ASSISTANT] ' }}{%- endif %}
"""
TURNS = [("What is two?", "2"), ("  And 🙂\n\nthree? ", "3")]


def checkpoint(folder, template: str, family: str = "llama", **settings):
    """A random checkpoint with a chat template; Llama's tokenizer adds BOS itself, Qwen3's has none."""
    make_checkpoint(folder, family)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about | settings | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("family, template", [("llama", LLAMA), ("qwen3", CHATML), ("qwen3", LLAMA)])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_rendering_equals_transformers(tmp_path, family, template, system):
    folder = checkpoint(tmp_path, template, family)
    tokenizer = Tokenizer.from_folder(folder)
    chat = ChatTemplate(folder, tokenizer)
    shown = [Example(chat(question), answer) for question, answer in TURNS]
    turns = [{"role": role, "content": text} for turn in TURNS for role, text in zip(("user", "assistant"), turn)]
    if system:
        shown, turns = [Example(system, ""), *shown], [{"role": "system", "content": system}, *turns]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for demonstrations, before in (([], []), (shown, turns)):
        messages = [*before, {"role": "user", "content": "Text: four"}]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        found = tokenizer.encode(with_demonstrations(demonstrations, chat("Text: four")))
        assert found == expected and found.count(256) == (template is LLAMA), "BOS once, where the template has it"


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path):
    folder = checkpoint(tmp_path, "{{ wrong }}")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert ChatTemplate(folder, Tokenizer.from_folder(folder))("hi") == "<hi>"


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for", "broken"),
        ("{{ messages[9].content }}", "fails"),
        ("{{ raise_exception('no') }}", "refuses these turns: no"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
        ("{{ 'a'.encode('no such code') }}", "fails"),
        ("{{ '%d' % 'a' }}", "fails"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "broken"),
        (None, "needs a chat template"),
        (["two"], "needs a chat template"),
    ],
)
def test_a_template_that_is_missing_broken_or_hostile_is_one_line(tmp_path, template, said):
    folder = checkpoint(tmp_path, template)
    refused(lambda: ChatTemplate(folder, Tokenizer.from_folder(folder))("hi"), said)


def test_a_template_file_that_is_not_text_is_one_line(tmp_path):
    folder = checkpoint(tmp_path, None)
    (folder / "chat_template.jinja").write_bytes(b"{{ 1 }}\n\xff")
    refused(lambda: ChatTemplate(folder, Tokenizer.from_folder(folder)), "chat_template.jinja:2: not UTF-8")


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The embedded model with a template whose words it knows: a question is a text, an answer its label."""
    folder = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(TINY, folder)
    template = """{% for m in messages %}{% if m.role == 'user' %}Text:{{ m.content }}
Label:{% elif m.role == 'assistant' %}{{ m.content }}

{% else %}{{ m.content }}

{% endif %}{% endfor %}"""
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_fit_and_predict_by_turns(talking, tmp_path):
    subject, rows = open_subject(str(talking), "cpu"), world.rows("toy-mood-remap", "train")[4:16]
    options = FitOptions(epochs=4, rates=(1e-2,), methods=("sft", "ia2"), folds=3, chat=True)
    columns = ("text", "label", "{text}")
    talked = fit(rows, subject, options, columns, keep=tmp_path)
    plain = fit(rows, subject, replace(options, chat=False), (None, None, "Text:{text}\nLabel:"))
    for name, one in talked.report["candidates"].items():
        assert one["nll"] == pytest.approx(plain.report["candidates"][name]["nll"], abs=1e-5), name
    assert talked.report["held_out"][0]["prompt"] in [row["text"] for row in rows]
    assert talked.spec["demonstrations"][0]["prompt"] in [row["text"] for row in rows]
    talked.save(tmp_path / "a")
    loaded, new = load_adapter(tmp_path / "a"), world.rows("toy-mood-remap", "eval")[:4]
    for icl in (False, True):
        expected = [found["probabilities"] for found in plain.predict(new, icl)]
        for found, wanted in zip(loaded.predict(new, icl), expected, strict=True):
            assert found["probabilities"] == pytest.approx(wanted, abs=1e-5)


def test_a_context_is_the_systems_turn(talking, tmp_path):
    (tmp_path / "context.txt").write_text("Text:good\nLabel:1\n\nText:bad\nLabel:0")
    queries = [{"text": row["text"]} for row in world.rows("toy-mood", "train")[:8]]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    how = ("--model", talking, "--chat", "--template", "{text}", "--max-tokens", 3, "--methods", "ia2", "--epochs", 2)
    how += ("--prompts", tmp_path / "queries.jsonl", "--rates", "1e-2", "--out", tmp_path / "o")
    result = CliRunner().invoke(main, list(map(str, ("fit", "--context", tmp_path / "context.txt", *how))))
    assert result.exit_code == 0, result.output
    spec = json.loads((tmp_path / "o" / "ia2mini.json").read_text())
    assert spec["demonstrations"] == [{"prompt": (tmp_path / "context.txt").read_text(), "answer": ""}]
    assert spec["report"]["candidates"]["icl"]["nll"][0] == pytest.approx(0, abs=1e-4)
    assert spec["report"]["candidates"]["icl"]["acc"][0] == 1


def test_generate_talks(talking):
    result = CliRunner().invoke(
        main, ["generate", "--model", str(talking), "--chat", "--prompt", "good", "--max-tokens", "2"]
    )
    plain = CliRunner().invoke(
        main, ["generate", "--model", str(talking), "--prompt", "Text:good\nLabel:", "--max-tokens", "2"]
    )
    assert result.exit_code == 0 and result.stdout == plain.stdout != "\n"
