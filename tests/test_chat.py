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
from ia2mini.cli.main import main
from ia2mini.episode import with_demonstrations
from ia2mini.fitting.score import score_rows
from ia2mini.tasks import Example, world
from ia2mini.tasks.chat import ChatTemplate
from ia2mini.tasks.rows import as_rows
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
    (folder / "tokenizer_config.json").write_text(
        json.dumps(about | settings | {"chat_template": template})
    )
    return folder


@pytest.mark.parametrize(
    "family, template", [("llama", LLAMA), ("qwen3", CHATML), ("qwen3", LLAMA)]
)
@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_rendering_equals_transformers(tmp_path, family, template, system):
    folder = checkpoint(tmp_path, template, family)
    tokenizer = Tokenizer.from_folder(folder)
    chat = ChatTemplate(folder, tokenizer)
    shown = [Example(chat(question), answer) for question, answer in TURNS]
    turns = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn)
    ]
    if system:
        shown, turns = (
            [Example(system, ""), *shown],
            [{"role": "system", "content": system}, *turns],
        )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for demonstrations, before in (([], []), (shown, turns)):
        messages = [*before, {"role": "user", "content": "Text: four"}]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        found = tokenizer.encode(with_demonstrations(demonstrations, chat("Text: four")))
        assert found == expected and found.count(256) == (template is LLAMA), (
            "BOS once, where the template has it"
        )


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path):
    folder = checkpoint(tmp_path, "{{ wrong }}")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    )
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


QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{ tools | tojson }}<|im_end|>
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if loop.last or loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
LLAMA32 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% elif message['role'] "
    "== 'system' %}{{ '<<SYS>>' + message['content'] }}{% else %}{{ raise_exception('Only user and assistant!') }}"
    "{% endif %}{% endfor %}"
)
SMOL = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LOOP = "{% for m in messages %}"
MANY = {
    "chatml": CHATML,
    "llama": LLAMA,
    "qwen": QWEN,
    "llama 3.2": LLAMA32,
    "mistral": MISTRAL,
    "smollm": SMOL,
    "tinyllama": LOOP
    + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}<|assistant|>\n",
    "tojson": LOOP
    + "{{ m | tojson }} {{ m.content | tojson(indent=2) }}{% endfor %}{{ {'b': 1, 'a': '<é&>'} | tojson }}",
    "positional": "{{ messages | tojson(false, 3) }}",
    "sorted": "{{ messages | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
    "generation": LOOP
    + "{% if m.role == 'assistant' %}{% generation %}A: {{ m.content }}\n  {% endgeneration %}"
    "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}{% generation %}{% endgeneration %}!",
    "tools": "{% if tools is not none %}T{% endif %}{% if tools is defined %}D{% endif %}"
    "{% if documents is none %}N{% endif %}" + LOOP + "{{ m.content }}{% endfor %}",
    "tokens": "{% for t in (bos_token, eos_token, pad_token, unk_token) %}[{{ t }}]{% endfor %}"
    "{{ sep_token is defined }}{{ mask_token }}" + LOOP + "{{ m.content }}{% endfor %}",
    "today": "{{ strftime_now('%Y-%m-%d %A') }}" + LOOP + "{{ m.content }}{% endfor %}",
    "loops": LOOP
    + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}{{ m.content }}"
    "{% if loop.index > 4 %}{% break %}{% endif %}{% endfor %}",
    "blocks": "  {% if true %}  \n   {# a comment #}\n  {{ messages[-1].content }}\n\n  {% endif %}\n\n",
    "escapes": LOOP
    + "{{ m.content | e }}{{ m['content'] | replace('<', '') | upper }}{{ '%s!' | format(m.role) }}{% endfor %}",
    "macros": "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% set ns = namespace(n=0) %}"
    + LOOP
    + "{{ turn(m) }}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
    "dates": "{% set day = strftime_now('%d') %}{{ day | int }}{{ messages | length }}"
    "{{ messages[-1]['content'].split(' ')[0] }}",
}
EVERY_TOKEN = {"pad_token": "</s>", "unk_token": {"__type": "AddedToken", "content": "<s>"}}


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("name", MANY)
def test_many_templates_are_rendered_as_by_transformers(tmp_path, name, bos):
    """The text to the byte, and the ids: where a template leaves BOS out, the tokenizer does not put it there."""
    folder = checkpoint(tmp_path, MANY[name], "llama" if bos else "qwen3", **EVERY_TOKEN)
    tokenizer = Tokenizer.from_folder(folder)
    chat = ChatTemplate(folder, tokenizer)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    asked = {"role": "user", "content": "Text: <four> & 'é' 日本\n"}
    turns = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn)
    ]
    for before in ([], turns, [{"role": "system", "content": "Be <brief>."}, *turns]):
        messages = [*before, asked]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat.render(messages) == expected
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert (
            tokenizer.encode(chat.render(messages))
            == tokenizer.encode_all([chat.render(messages)])[0]
            == ids
        )
        assert tokenizer.count([chat.render(messages)]) == [len(ids)]
    answered = [*turns, asked, {"role": "assistant", "content": "yes"}]
    assert chat.render(answered, open_answer=False) == theirs.apply_chat_template(
        answered, tokenize=False
    )


@pytest.mark.parametrize("listed", [False, True])
def test_special_tokens_come_from_every_file(tmp_path, listed):
    """special_tokens_map.json counts where tokenizer_config.json does not list the added tokens."""
    settings = {"pad_token": "<old>"}
    if listed:
        settings["added_tokens_decoder"] = {"256": {"content": "<s>", "special": True}}
    folder = checkpoint(tmp_path, MANY["tokens"], "qwen3", **settings)
    said = {
        "pad_token": {"content": "<pad>", "lstrip": False},
        "unk_token": "<unk>",
        "additional_special_tokens": ["<x>"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(said))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found = ChatTemplate(folder, Tokenizer.from_folder(folder))("hi")
    assert found == expected and ("<pad>" in found) == (not listed)


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [
        {"name": "tool_use", "template": "{{ wrong }}"},
        {"name": "default", "template": MISTRAL},
    ]
    folder = checkpoint(tmp_path, named)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(folder, Tokenizer.from_folder(folder))("hi") == expected
    checkpoint(tmp_path, named[:1])
    refused(lambda: ChatTemplate(folder, Tokenizer.from_folder(folder)), "'tool_use'", "'default'")
    checkpoint(tmp_path, None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": MISTRAL}))
    assert ChatTemplate(folder, Tokenizer.from_folder(folder))("hi") == expected


def test_an_adapter_that_talks_of_the_date_loads_on_another_day(talking, tmp_path, monkeypatch):
    folder = shutil.copytree(talking, tmp_path / "dated")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%A') }}\n" + template)
    options = FitOptions(epochs=2, rates=(1e-2,), methods=("sft",), folds=2, chat=True)
    monkeypatch.setattr("ia2mini.tasks.chat.strftime_now", lambda form: "good")
    rows = world.rows("toy-mood-remap", "train")[4:12]
    fit(rows, open_subject(str(folder), "cpu"), options, ("text", "label", "{text}")).save(
        tmp_path / "a"
    )
    monkeypatch.setattr("ia2mini.tasks.chat.strftime_now", lambda form: "bad bad bad")
    loaded = load_adapter(tmp_path / "a")
    assert loaded.as_turn("x").startswith("bad bad bad")
    assert next(loaded.answer_rows(rows[:1]))["answer"] in loaded.spec["labels"]


def test_a_template_file_that_is_not_text_is_one_line(tmp_path):
    folder = checkpoint(tmp_path, None)
    (folder / "chat_template.jinja").write_bytes(b"{{ 1 }}\n\xff")
    refused(
        lambda: ChatTemplate(folder, Tokenizer.from_folder(folder)),
        "chat_template.jinja:2: not UTF-8",
    )


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
        expected = [found["probabilities"] for found in plain.answer_rows(new, icl)]
        for found, wanted in zip(loaded.answer_rows(new, icl), expected, strict=True):
            assert found["probabilities"] == pytest.approx(wanted, abs=1e-5)
    told = score_rows(loaded, as_rows(rows), icl=False)["sentence"]
    assert "12 of these are among the rows it was fitted on" in told


def test_a_context_is_the_systems_turn(talking, tmp_path):
    (tmp_path / "context.txt").write_text("Text:good\nLabel:1\n\nText:bad\nLabel:0")
    queries = [{"text": row["text"]} for row in world.rows("toy-mood", "train")[:8]]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    how = (
        "--model",
        talking,
        "--chat",
        "--max-tokens",
        3,
        "--methods",
        "ia2",
        "--epochs",
        2,
    )
    how += ("--prompts", tmp_path / "queries.jsonl", "--rates", "1e-2", "--out", tmp_path / "o")
    result = CliRunner().invoke(
        main, list(map(str, ("fit", "--context", tmp_path / "context.txt", *how)))
    )
    assert result.exit_code == 0, result.output
    spec = json.loads((tmp_path / "o" / "ia2mini.json").read_text())
    assert spec["demonstrations"] == [
        {"prompt": (tmp_path / "context.txt").read_text(), "answer": ""}
    ]
    assert spec["template"] == "{text}", "a query is the whole turn"
    assert spec["report"]["candidates"]["icl"]["nll"][0] == pytest.approx(0, abs=1e-4)
    assert spec["report"]["candidates"]["icl"]["acc"][0] == 1


def test_generate_talks(talking):
    result = CliRunner().invoke(
        main,
        ["generate", "--model", str(talking), "--chat", "--prompt", "good", "--max-tokens", "2"],
    )
    plain = CliRunner().invoke(
        main,
        ["generate", "--model", str(talking), "--prompt", "Text:good\nLabel:", "--max-tokens", "2"],
    )
    assert result.exit_code == 0 and result.stdout == plain.stdout != "\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"image_token": "<img>"},
        {"extra_special_tokens": {"image_token": "<img>"}},
        {"extra_special_tokens": {"image_token": {"content": "<i>", "__type": "AddedToken"}}},
        {"extra_special_tokens": ["<img>"]},
        {"add_image_token": True},
    ],
)
def test_special_tokens_with_names_of_their_own_are_written_as_by_transformers(tmp_path, settings):
    folder = checkpoint(
        tmp_path, "{{ image_token }}{{ bos_token }}{{ messages[0].content }}", **settings
    )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    assert ChatTemplate(folder, Tokenizer.from_folder(folder))("a b") == expected


HALVES = {
    "in the template": (CHATML + "\ud800", {}),
    "as Jinja's escape": (CHATML + r"{{ '\udfff' }}", {}),
    "from a filter": (CHATML + r"{{ '%c' | format(55296) }}", {}),
    "as a key that is looped over": (
        r"{% for k in {'\ud8ab': 1} %}{{ k }}{% endfor %}" + CHATML,
        {},
    ),
    "in bos_token": ("{{ bos_token }}" + CHATML, {"bos_token": "<\ud83d>"}),
    "in eos_token": (CHATML + "{{ eos_token }}", {"eos_token": {"content": "\udc00"}}),
    "in one of several": ([{"name": "default", "template": CHATML + "\ud800"}], {}),
}


@pytest.mark.parametrize("where", HALVES)
def test_half_a_character_is_refused_with_a_line(where, tmp_path):
    template, settings = HALVES[where]
    folder = checkpoint(tmp_path, template, **settings)
    tokenizer = Tokenizer.from_folder(make_checkpoint(tmp_path / "plain", "llama"))
    chat = ChatTemplate(folder, tokenizer)
    refused(lambda: chat("a question"), "the chat template writes half a character ('\\ud")


def test_half_a_character_that_is_not_written_changes_nothing(tmp_path):
    folder = checkpoint(tmp_path, CHATML + r"{% if false %}{{ '\ud800' }}{% endif %}")
    rendered = ChatTemplate(folder, Tokenizer.from_folder(folder))("a 🙂 question")
    assert "a 🙂 question" in rendered
