"""Prompts as turns of a conversation, by the checkpoint's own chat template in a sandbox."""

from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

from . import UsageError
from .files import is_there, read_json, read_text
from .tokenizer import Tokenizer


class ChatPrompt(str):
    """A question as the template renders it, up to where the answer begins; demonstrations become earlier turns."""

    chat: "ChatTemplate"
    question: str

    def after(self, demonstrations: list) -> str:
        """The prompt behind demonstrations: each a question and its answer, or a text alone as the system's message."""
        turns = []
        for shown in demonstrations:
            if isinstance(shown.prompt, ChatPrompt):
                turns.append({"role": "user", "content": shown.prompt.question})
                turns.append({"role": "assistant", "content": shown.answer})
            else:
                turns.append({"role": "system", "content": shown.prompt})
        return self.chat.render([*turns, {"role": "user", "content": self.question}])


class ChatTemplate:
    """The chat template of a checkpoint folder. Raises UsageError where there is none or it is broken."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        settings = read_json(config) if is_there(config) else {}
        source = read_text(path) if is_there(path) else settings.get("chat_template")
        if not isinstance(source, str):
            raise UsageError(f"{folder}: --chat needs a chat template (chat_template.jinja or tokenizer_config.json)")
        sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        sandbox.globals["raise_exception"] = self.refuse
        try:
            self.template = sandbox.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UsageError(f"{folder}: its chat template is broken ({error})") from None
        tokens = {name: settings.get(name) or "" for name in ("bos_token", "eos_token")}  # texts, or objects with one
        self.tokens = {k: str(t.get("content", "") if isinstance(t, dict) else t) for k, t in tokens.items()}
        self.start = tokenizer.backend.decode(tokenizer.encode(""), skip_special_tokens=False)

    @staticmethod
    def refuse(message: str):
        raise UsageError(f"the chat template refuses these turns: {message}")

    def render(self, turns: list[dict]) -> str:
        """The conversation as text up to the assistant's answer, without what the tokenizer itself puts before it."""
        try:
            text = self.template.render(messages=turns, add_generation_prompt=True, **self.tokens)
        except UsageError:
            raise
        except Exception as error:  # a template is a program, and raises what a program does
            raise UsageError(f"the chat template fails on these turns ({error})") from None
        return text.removeprefix(self.start)

    def __call__(self, question: str) -> ChatPrompt:
        prompt = ChatPrompt(self.render([{"role": "user", "content": question}]))
        prompt.chat, prompt.question = self, question
        return prompt
