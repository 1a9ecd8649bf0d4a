"""The two files with which transformers (5.24 or newer) gives the probabilities of `predict`.

`pipeline("decision")` and `/v1/systemone` of `transformers serve` read decision.json (labels, temperature) and
decision_template.jinja (the prompt). A request's `state` is a row; its question is of type "choice" and has the labels
as `criteria`. Answers are softmax(logits of the labels' tokens after the prompt / temperature), so that every label
must be a single token.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..episode import with_demonstrations
from ..files import write_json, write_text
from ..files.tokenizer_files import named_tokens
from ..tasks.chat import ChatPrompt, sandbox, template_of
from ..tasks.rows import COLUMN, Row, placeholders, prompt_of
from ..tokenizer import Rendered

if TYPE_CHECKING:
    from .predictor import Predictor

CONFIG = "decision.json"
TEMPLATE = "decision_template.jinja"
# Texts of columns as `Row.text` and `fill` write them, in Jinja: `value - value == 0` means that a number is finite,
# 9007199254740992 is 2**53.
MACROS = """\
{%- macro cell(column) -%}
  {%- set value = row[column] if column in row else none -%}
  {%- if value is string or value is integer -%}
    {{- value -}}
  {%- elif value is boolean -%}
    {{- value | string | lower -}}
  {%- elif value is float and value - value == 0 -%}
    {{- value | int if value == value | int and value | abs < 9007199254740992 else value -}}
  {%- else -%}
    {{- raise_exception("column '" ~ column ~ "' of the state is missing or no text") -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro cell_or_nothing(line_end, column) -%}
  {%- set value = row[column] if column in row else none -%}
  {%- set blank = value is none or value != value or (value is string and not value | trim) -%}
  {{- "" if blank else line_end ~ cell(column) -}}
{%- endmacro -%}
"""


def write_decision(predictor: "Predictor", folder: Path) -> None:
    """Write both files. If transformers cannot answer so, remove those of an earlier fit. Raises UsageError."""
    for name in (CONFIG, TEMPLATE):
        (folder / name).unlink(missing_ok=True)
    if why_not(predictor):
        return
    spec = predictor.spec
    template = decision_template(predictor)
    write_text(folder / TEMPLATE, template)
    config = {
        "labels": {"choice": predictor.written_labels()},
        "temperature": {"choice": spec["temperature"]},
        # `transformers serve --decision-config` reads this file alone
        "chat_template": template,
        # a row's text becomes the same tokens as in `predict`
        "sanitize_control_tokens": False,
    }
    write_json(folder / CONFIG, config)


def why_not(predictor: "Predictor") -> str | None:
    """Why transformers' decision pipeline cannot answer as `predict` does; None if it can."""
    spec = predictor.spec
    tokenizer = predictor.subject.tokenizer
    if not spec["labels"]:
        return "the answers are texts, not labels"
    if predictor.is_foreign:
        return "ia2mini did not fit this adapter"
    if predictor.probe is not None:
        return "a linear probe answers in the place of the model's head"
    label_tokens = predictor.label_tokens(spec["example"])
    for label, tokens in zip(predictor.written_labels(), label_tokens):
        if len(tokens) > 1 and tokens[-1:] == tokenizer.closing:
            return f"label {label!r} needs its end of sequence, since a label begins another one"
        if len(tokens) > 1:
            return f"label {label!r} is {len(tokens)} tokens in this tokenizer"
        alone = tokenizer.backend.encode(label, add_special_tokens=False).ids
        if alone != tokens:
            return f"label {label!r} by itself has other tokens than after the prompt"
        if tokens[0] in (tokenizer.unknown, *tokenizer.eos_ids):
            return f"label {label!r} is a special token of this tokenizer"
    if not renders_the_same(predictor):
        return "its prompt cannot be written as a template of transformers"
    return None


def renders_the_same(predictor: "Predictor") -> bool:
    """Whether the template, rendered as in transformers, gives the same tokens for a row as `predict`."""
    spec = predictor.spec
    tokenizer = predictor.subject.tokenizer
    row = Row("the example", dict.fromkeys(placeholders(spec["template"]), spec["example"]))
    prompt = predictor.as_turn(prompt_of(spec["template"], row))
    expected = tokenizer.encode(with_demonstrations(predictor.demonstrations(), prompt))
    variables = {
        "state": dict(row),
        "question": {"type": "choice", "options": list(predictor.written_labels())},
        "messages": [{"role": "user", "content": ""}],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "enable_thinking": False,
        **named_tokens(predictor.subject.folder),
    }
    try:
        text = sandbox().from_string(decision_template(predictor)).render(variables)
    except Exception:  # a chat template is a program, and raises what a program does
        return False
    return tokenizer.encode(Rendered(text)) == expected


def decision_template(predictor: "Predictor") -> str:
    """decision_template.jinja: refuses other questions, fills the row into the prompt, and renders it."""
    spec = predictor.spec
    columns = placeholders(spec["template"])
    state = "state"
    if len(set(columns)) == 1:  # then the text itself may be the state
        state = f"{{{literal(columns[0])}: state}} if state is string else state"
    labels = literal(predictor.written_labels())
    criteria = literal(dict.fromkeys(predictor.written_labels()))
    expected = f'ask one question {{"type": "choice", "criteria": {criteria}}}, in this order'
    lines = [
        "{#- Written by ia2mini: the prompt of `ia2mini predict`. `state`: a row, its columns by name. -#}",
        f'{{%- if question.type != "choice" or question.options != {labels} -%}}',
        f"  {{{{- raise_exception({literal(expected)}) -}}}}",
        "{%- endif -%}",
        f"{{%- set row = {state} -%}}",
        "{%- if row is not mapping -%}",
        '  {{- raise_exception("the state must be an object, a row with its columns") -}}',
        "{%- endif -%}",
        MACROS.rstrip("\n"),
        f"{{%- set prompt = {as_expression(spec['template'].rstrip(' '))} -%}}",
    ]
    if spec["chat"]:
        lines += chat_lines(predictor)
    else:
        before = with_demonstrations(predictor.demonstrations(), "")
        lines.append(f"{{{{- {literal(bos_text(predictor) + before)} ~ prompt -}}}}")
    return "\n".join(lines)


def chat_lines(predictor: "Predictor") -> list[str]:
    """The prompt as the last turn of a conversation, and the checkpoint's own chat template, which renders that."""
    turns = []
    for example in predictor.demonstrations():
        assert isinstance(example.prompt, ChatPrompt)
        turns.append({"role": "user", "content": example.prompt.question})
        turns.append({"role": "assistant", "content": example.answer})
    return [
        f'{{%- set messages = {literal(turns)} + [{{"role": "user", "content": prompt}}] -%}}',
        # transformers sets it, `predict` does not; the line end after it goes (trim_blocks)
        "{%- set enable_thinking = undefined_as_in_predict %}",
        template_of(predictor.subject.folder),
    ]


def bos_text(predictor: "Predictor") -> str:
    """The token that the tokenizer puts before every text, as "<s>"; a template for transformers must write it."""
    tokenizer = predictor.subject.tokenizer
    text = predictor.spec["example"]
    extra = len(tokenizer.encode(text)) - len(tokenizer.encode(Rendered(text)))
    names = map(tokenizer.backend.id_to_token, tokenizer.encode(text)[:extra])
    return "".join(names)


def as_expression(template: str) -> str:
    """A prompt's template, columns in braces, as an expression of Jinja."""
    parts = []
    place = 0
    for match in COLUMN.finditer(template):
        line_end, may_be_empty, column = match.groups()
        text = template[place : match.start()]
        name = literal(column)
        if may_be_empty:
            parts.append(literal(text))
            parts.append(f"cell_or_nothing({literal(line_end)}, {name})")
        else:
            parts.append(literal(text + line_end))
            parts.append(f"cell({name})")
        place = match.end()
    parts.append(literal(template[place:]))
    return " ~ ".join(part for part in parts if part != '""')


def literal(value) -> str:
    """A text, list or object as Jinja reads it: as in JSON."""
    return json.dumps(value, ensure_ascii=False)
