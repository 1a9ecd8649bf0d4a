"""Prompts as turns of a conversation, by the checkpoint's own chat template, in the sandbox that transformers uses."""

import json
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

from ia2mini import UsageError
from ia2mini.files import LONE_SURROGATE, is_there, read_json, read_text
from ia2mini.files.tokenizer_files import named_tokens
from ia2mini.tokenizer import Rendered, Tokenizer

from .turns import read_turns


class ChatPrompt(Rendered):
    """A question as the template renders it, up to where the answer begins; demonstrations become earlier turns."""

    chat: "ChatTemplate"
    question: str
    turns: list[dict]  # what is asked: the system's turn, if there is one, then the others

    def after(self, demonstrations: list) -> Rendered:
        """The prompt after demonstrations: each what is asked and its answer, or a text alone, a system's message.

        A prompt's own system's turn stands first; those of its demonstrations are left out.
        """
        instructions = []
        turns = []
        for demonstration in demonstrations:
            if isinstance(demonstration.prompt, ChatPrompt):
                turns += [turn for turn in demonstration.prompt.turns if turn["role"] != "system"]
                turns.append({"role": "assistant", "content": demonstration.answer})
            else:
                instructions.append(demonstration.prompt)
        for turn in self.turns:
            if turn["role"] == "system":
                instructions.append(turn["content"])
            else:
                turns.append(turn)
        if instructions:
            turns.insert(0, {"role": "system", "content": "\n\n".join(instructions)})
        return self.chat.render(turns)


class ChatTemplate:
    """The chat template of a checkpoint folder. Raises UsageError where there is none or it is broken.

    `end` is the token that it writes after an answer, None where that is no special token. `tokenizer` is the given
    one, for which a text ends there. With `conversations` a question is not what the user says but JSON of all turns.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, conversations: bool = False):
        self.conversations = conversations
        self.tokens = named_tokens(folder)
        try:
            self.template = sandbox().from_string(template_of(folder))
        except (TemplateError, RecursionError) as error:
            raise UsageError(f"{folder}: its chat template is broken ({error})") from None
        self.end = self.find_end(tokenizer)
        self.tokenizer = tokenizer.ending_with(self.end)

    def find_end(self, tokenizer: Tokenizer) -> int | None:
        """The first special token after an assistant's turn."""
        answer = "An answer"
        turns = [{"role": "user", "content": "A question"}]
        turns.append({"role": "assistant", "content": answer})
        try:
            text = self.render(turns, open_answer=False)
        except UsageError:  # it may take no such turns; those that are needed say so themselves
            return None
        before, _, after = text.rpartition(answer)
        if not before:
            return None
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special and i < tokenizer.size}
        special.update(tokenizer.eos_ids)
        ids = tokenizer.backend.encode(after, add_special_tokens=False).ids
        return next((i for i in ids if i in special), None)

    def render(self, turns: list[dict], open_answer: bool = True) -> Rendered:
        """The conversation as text; with `open_answer` up to where the assistant's answer begins. Raises UsageError."""
        variables = {"tools": None, "documents": None, "add_generation_prompt": open_answer}
        try:
            text = self.template.render({**variables, **self.tokens, "messages": turns})
        except UsageError:
            raise
        except Exception as error:  # a template is a program, and raises what a program does
            raise UsageError(f"the chat template fails on these turns ({error})") from None
        half = LONE_SURROGATE.search(text)
        if half:
            what = f"half a character ({half[0]!r}), which no tokenizer reads"
            raise UsageError(f"the chat template writes {what}; mend it, or the tokens it names")
        return Rendered(text)

    def __call__(self, question: str) -> ChatPrompt:
        turns = [{"role": "user", "content": question}]
        if self.conversations:
            turns = read_turns(question)
        prompt = ChatPrompt(self.render(turns))
        prompt.chat = self
        prompt.question = question
        prompt.turns = turns
        return prompt


def template_of(folder: Path) -> str:
    """The source of a checkpoint's chat template; of several that have names the one called "default"."""
    if is_there(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja")
    source = None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if source is None and is_there(folder / name):
            source = read_json(folder / name).get("chat_template")
    if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        by_name = {entry.get("name"): entry.get("template") for entry in source}
        if source and "default" not in by_name:
            names = sorted(map(str, by_name))
            raise UsageError(f"{folder}: none of its chat templates {names} is called 'default'")
        source = by_name.get("default")
    if not isinstance(source, str):
        files = "chat_template.jinja or tokenizer_config.json"
        raise UsageError(f"{folder}: --chat needs a chat template ({files})")
    return source


def sandbox() -> Sandbox:
    """What chat templates run in: options, filters and functions of transformers' `apply_chat_template`."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is, where Jinja's own filter of that name escapes what HTML would read."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str):
    raise UsageError(f"the chat template refuses these turns: {message}")


def strftime_now(form: str) -> str:
    """Today's date."""
    return datetime.now().strftime(form)


class Generation(Extension):
    """`{% generation %}` marks what the assistant says; it is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_block"), [], [], body).set_lineno(line)

    def render_block(self, caller) -> str:
        return caller()
