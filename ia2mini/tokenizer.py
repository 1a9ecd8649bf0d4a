"""Text to ids and back: a thin layer over `tokenizers`, and the check that prompt and answer join safely."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from . import UsageError
from .errors import broken_tokenizer
from .files import check_text
from .files.tokenizer_files import ENDLESS, named_tokens, read_ends, read_tokenizer

WORDS_NAMED = 5  # unknown words that are named in warnings


class Rendered(str):
    """A text as a chat template wrote it: BOS stands in it where it belongs, and the tokenizer adds nothing."""

    def __add__(self, more: str) -> "Rendered":
        return Rendered(str(self) + more)


class Tokenizer:
    """A checkpoint's tokenizer. BOS comes where the file's own post-processor adds it.

    A text ends at any of `eos_ids`: those of the config, and what the tokenizer itself calls its end. `closing` is the
    one that ends an answer in training: [`end`], else the first of them, or [] where there is none.
    """

    def __init__(
        self,
        backend: Backend,
        eos_ids: tuple[int, ...],
        size: int = ENDLESS,
        end: int | None = None,
    ):
        self.backend = backend
        self.size = size  # the model knows ids below it
        if end is not None and end not in eos_ids:
            eos_ids = (*eos_ids, end)
        self.eos_ids = tuple(dict.fromkeys(eos_ids))  # each once: their probabilities are added
        self.closing = list(eos_ids[:1]) if end is None else [end]
        unknown = getattr(backend.model, "unk_token", None)
        self.unknown = None  # the token of a word that the vocabulary lacks
        if unknown:
            self.unknown = backend.token_to_id(unknown)
        self.warned: set[str] = set()  # of these unknown words

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and the ends of sequence that the other files name. Raises UsageError."""
        backend = read_tokenizer(folder)
        eos_ids, size = read_ends(folder)
        end = backend.token_to_id(named_tokens(folder).get("eos_token", ""))
        if end is not None and end >= size:
            end = None
        return cls(backend, eos_ids, size, end)

    def ending_with(self, end: int | None) -> "Tokenizer":
        """The same tokenizer with another token that closes an answer; None: with its own."""
        return self if end is None else Tokenizer(self.backend, self.eos_ids, self.size, end)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`; with `special`, also what the file's post-processor adds (BOS for Llama, nothing for Qwen)."""
        check_text(text, "the text", "write the whole character")
        special = special and not isinstance(text, Rendered)
        with broken_tokenizer():
            encoding = self.backend.encode(text, add_special_tokens=special)
        return self.checked_ids(text, encoding)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        return [
            self.checked_ids(text, encoding) for text, encoding in zip(texts, self.encodings(texts))
        ]

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        return [len(encoding.ids) for encoding in self.encodings(texts)]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings of texts that are all rendered by a chat template, or none of which is.

        Raises UsageError for half a surrogate pair.
        """
        for text in texts:
            check_text(text, "the text", "write the whole character")
        special = not any(isinstance(text, Rendered) for text in texts)
        with broken_tokenizer():
            return self.backend.encode_batch(list(texts), add_special_tokens=special)

    def checked_ids(self, text: str, encoding: Encoding) -> list[int]:
        """The ids of an encoding; a word that the vocabulary lacks is the unknown token, and is warned of once.

        Raises UsageError for an id that the model does not know.
        """
        most = max(encoding.ids, default=0)
        if most >= self.size:
            beyond = f"is beyond the model's vocab_size {self.size}"
            raise UsageError(f"token {most} of {text[:40]!r} {beyond}")
        if self.unknown is not None and self.unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(self.unknown)]
            self.warn_of(text[start:end][:40])
        return encoding.ids

    def warn_of(self, word: str) -> None:
        """Warn of an unknown word: once of each of the first few, then once that there are more."""
        if word in self.warned or len(self.warned) > WORDS_NAMED:
            return
        self.warned.add(word)
        line = f"{word!r} is not in the vocabulary and is read as an unknown word"
        if len(self.warned) > WORDS_NAMED:
            line = "more words are not in the vocabulary; they are not named"
        warnings.warn(line, stacklevel=4)

    def decode(self, ids: list[int], special: bool = False) -> str:
        """The text of ids; with `special`, special tokens are written out."""
        with broken_tokenizer():
            return self.backend.decode(ids, skip_special_tokens=not special)

    def holds_special(self, text: str) -> bool:
        """Whether a text contains the name of a special token."""
        added = self.backend.get_added_tokens_decoder().values()
        return any(token.special and token.content in text for token in added)

    def encode_answer(self, prompt: str, answer: str, apart: bool = False) -> list[int]:
        """Ids of `answer` right after `prompt`. Raises UsageError when it merges with the prompt's last token.

        With `apart`, as for texts, it is then tokenized by itself instead, as it would be generated after the prompt.
        (In a quarter of GSM8K "The" merges with "Answer:".)
        """
        before = self.encode(prompt)
        ids = self.encode(prompt + answer)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        if apart:
            return self.encode(answer, special=False)
        merging = f"answer {answer[:40]!r} merges with the end of its prompt {prompt[-12:]!r} in this tokenizer"
        raise UsageError(f"{merging}; choose another label, or a template that ends in a line end")

    def label_tokens(self, prompt: str, labels: tuple[str, ...]) -> list[list[int]]:
        """Tokens of every label after `prompt`. Where any label is the beginning of another, all of them end with EOS.

        Raises UsageError for two labels with the same tokens, a label in which a text would end, and where EOS is
        needed but the checkpoint names none.
        """
        tokens = [self.encode_answer(prompt, label) for label in labels]
        label_of: dict[tuple[int, ...], str] = {}
        for label, ids in zip(labels, tokens):
            ends = [self.backend.id_to_token(i) for i in ids if i in self.eos_ids]
            if ends:
                raise UsageError(
                    f"label {label!r} holds {ends[0]!r}, which ends a text in this checkpoint; choose another label"
                )
            if tuple(ids) in label_of:
                same = f"label {label!r} has the tokens of label {label_of[tuple(ids)]!r} in this tokenizer"
                raise UsageError(f"{same}; choose other labels")
            label_of[tuple(ids)] = label
        # sorted, a list that begins others stands right before one of them
        pairs = pairwise(sorted(label_of))
        prefixes = [(short, long) for short, long in pairs if long[: len(short)] == short]
        if not prefixes:
            return tokens
        if not self.closing:
            short, long = prefixes[0]
            conflict = f"label {label_of[short]!r} begins label {label_of[long]!r}"
            lack = "no end of sequence tells them apart: this checkpoint names no eos_token_id"
            raise UsageError(
                f"{conflict}, and {lack}; add it to its config.json, or choose other labels"
            )
        return [ids + self.closing for ids in tokens]
