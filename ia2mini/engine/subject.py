"""The model that a command or a notebook works with, and how it is opened by name."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from .. import UsageError
from ..files import check_text, plain
from ..models.checkpoint import SHORT_NAMES, TINY, load, locate
from ..scale.device import usable, weight_dtype
from ..tasks import Example
from ..tasks.chat import ChatTemplate
from ..tasks.turns import ALL_TURNS
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """The model under study."""

    model: nn.Module
    tokenizer: Tokenizer
    folder: Path  # of its checkpoint
    name: str  # in tables and folder names
    base: str  # what peft shall load the adapters onto: hub id or absolute folder
    revision: str | None = None  # commit on the hub

    def __repr__(self) -> str:
        """One line, in place of every layer of the model."""
        return f"<Subject {self.name}, {self.dtype}>"

    @property
    def dtype(self) -> str:
        """The number format of the frozen weights, as "float32"."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int:
        """The most tokens that the model can read, its own answer included."""
        return self.model.config.max_position_embeddings

    def in_turns(self, template: str) -> tuple["Subject", ChatTemplate]:
        """The subject, its texts ending where a turn does, and what makes a prompt of `template` a turn."""
        as_turn = ChatTemplate(self.folder, self.tokenizer, conversations=template == ALL_TURNS)
        return replace(self, tokenizer=as_turn.tokenizer), as_turn

    def check_room(self, prompt: str, tokens: int, mend: str = "cut it or leave it out") -> None:
        """Raises UsageError if a prompt with its answer (`tokens` in all) is longer than the model can read."""
        if tokens > self.context_length:
            need = f"{tokens} tokens with its answer, more than the {self.context_length} tokens the model reads"
            raise UsageError(f"the prompt {' '.join(prompt.split())[:60]!r} … has {need}; {mend}")


def open_subject(
    model: str = "tiny", device=None, dtype=None, revision=None, check: bool = True
) -> Subject:
    """The model of a folder, hub id or short name; on a GPU if there is one. Raises UsageError.

    `dtype` of the frozen weights: None is `scale.device.usual_dtype`. `check`: no weight may be NaN or infinite.
    """
    device = usable(device)
    folder = locate(model, revision)
    check_text(str(folder.resolve()), "the folder", "give it, and those above it, names in UTF-8")
    dtype = weight_dtype(folder, device, dtype)
    network, tokenizer = load(folder, dtype, device, check=check)
    local = folder == TINY or Path(model).is_dir()
    if local:
        name = folder.resolve().name
        base = "tiny" if folder == TINY else str(folder.resolve())
        commit = None
    else:
        name = model.replace("/", "--")
        base = SHORT_NAMES.get(model.lower(), model)
        commit = folder.name  # a snapshot's folder
    return Subject(network, tokenizer, folder, plain(name, ""), base, commit)


def max_label_tokens(labels: list[list[int]]) -> int:
    """Tokens that a response needs for the longest label, with EOS if any label has several tokens."""
    longest = max(map(len, labels))
    return longest + 1 if longest > 1 else 1


def max_answer_tokens(tokenizer: Tokenizer, examples: list[Example]) -> int:
    """Tokens of the longest answer, with EOS."""
    longest = 0
    for example in examples:
        ids = tokenizer.encode_answer(example.prompt, example.answer, apart=True)
        longest = max(longest, len(ids))
    return 1 + longest
