"""Text to ids and back: a thin layer over `tokenizers`, and the check that prompt and answer join safely."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from . import UsageError
from .added_tokens import add_tokens
from .errors import out_of_memory
from .files import check_text, is_there, read_json

NAMED = 5  # unknown words that are named in warnings


@contextmanager
def broken_file() -> Iterator[None]:
    """Turn what `tokenizers` raises into a UsageError: a bare Exception, or a panic of its Rust, which is no Exception.

    Some broken files are found out only where a text is read: by a word that they have no token for, and the like.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and (isinstance(error, UsageError) or not isinstance(error, Exception)):
            raise
        raise UsageError(f"the tokenizer.json of this checkpoint is broken ({error}); download it again") from None


class Tokenizer:
    """A checkpoint's tokenizer. BOS comes where the file's own post-processor adds it, EOS from the config."""

    def __init__(self, backend: Backend, eos_ids: tuple[int, ...], size: int = 2**31):
        self.backend, self.eos_ids, self.size = backend, eos_ids, size  # the model knows ids below `size`
        unknown = getattr(backend.model, "unk_token", None)
        self.unknown = unknown and backend.token_to_id(unknown)
        self.warned: set[str] = set()  # of these unknown words

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and the end-of-sequence ids of (generation_)config.json. Raises UsageError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"{path}: no such file; a checkpoint needs its tokenizer.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            if out_of_memory(error):
                raise
            raise UsageError(f"{path}: not a tokenizers file ({error})") from None
        add_tokens(backend, folder)
        backend.no_truncation()  # some files carry both from their training
        backend.no_padding()
        config = read_json(folder / "config.json")
        eos, size = config.get("eos_token_id"), config.get("vocab_size", 2**31)
        if is_there(folder / "generation_config.json"):
            eos = read_json(folder / "generation_config.json").get("eos_token_id", eos)
        ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if type(size) is not int or not all(type(i) is int and 0 <= i < size for i in ids):
            wanted = f"neither a token id nor a list of them (vocab_size = {repr(size)[:80]})"
            raise UsageError(f"{folder}: eos_token_id = {repr(eos)[:80]} is {wanted}")
        return cls(backend, ids, size)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`; with `special`, also what the file's post-processor adds (BOS for Llama, nothing for Qwen)."""
        check_text(text, "the text", "write the whole character")
        with broken_file():
            encoding = self.backend.encode(text, add_special_tokens=special)
        return self.known(text, encoding)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        return [self.known(text, encoding) for text, encoding in zip(texts, self.read(texts))]

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        return [len(encoding.ids) for encoding in self.read(texts)]

    def read(self, texts: list[str]) -> list[Encoding]:
        """What the backend makes of each text. Raises UsageError for half a surrogate pair."""
        for text in texts:
            check_text(text, "the text", "write the whole character")
        with broken_file():
            return self.backend.encode_batch(texts)

    def known(self, text: str, encoding: Encoding) -> list[int]:
        """The ids of an encoding; a word that the vocabulary lacks is the unknown token, and is warned of once.

        Raises UsageError for an id that the model does not know.
        """
        if (most := max(encoding.ids, default=0)) >= self.size:
            raise UsageError(f"token {most} of {text[:40]!r} is beyond the model's vocab_size {self.size}")
        if self.unknown is not None and self.unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(self.unknown)]
            self.warn_of(text[start:end][:40])
        return encoding.ids

    def warn_of(self, word: str) -> None:
        """Warn of an unknown word: once of each of the first few, then once that there are more."""
        if word in self.warned or len(self.warned) > NAMED:
            return
        self.warned.add(word)
        if len(self.warned) <= NAMED:
            warnings.warn(f"{word!r} is not in the vocabulary and is read as an unknown word", stacklevel=4)
        else:
            warnings.warn("more words are not in the vocabulary; they are not named", stacklevel=4)

    def decode(self, ids: list[int]) -> str:
        with broken_file():
            return self.backend.decode(ids, skip_special_tokens=True)

    def encode_answer(self, prompt: str, answer: str, apart: bool = False) -> list[int]:
        """Ids of `answer` right after `prompt`. Raises UsageError when it merges with the prompt's last token.

        With `apart` it is then tokenized by itself, as it is generated behind the prompt: so are texts. ("The" after
        "Answer:" merges in a fourth part of GSM8K.)
        """
        if self.merges(prompt, answer):
            if apart:
                return self.encode(answer, special=False)
            merging = f"answer {answer[:40]!r} merges with the end of its prompt {prompt[-12:]!r} in this tokenizer"
            raise UsageError(f"{merging}; choose another label, or a template that ends in a line end")
        return self.encode(prompt + answer)[len(self.encode(prompt)) :]

    def merges(self, prompt: str, answer: str) -> bool:
        """Whether prompt and answer share a token when they stand together."""
        before = self.encode(prompt)
        return self.encode(prompt + answer)[: len(before)] != before

    def label_tokens(self, prompt: str, labels: tuple[str, ...]) -> list[list[int]]:
        """Tokens of every label after `prompt`, with EOS where one begins another. UsageError for equal ones."""
        tokens = [self.encode_answer(prompt, label) for label in labels]
        for i, mine in enumerate(tokens):
            if mine in tokens[:i]:
                same = f"label {labels[i]!r} has the tokens of label {labels[tokens.index(mine)]!r} in this tokenizer"
                raise UsageError(f"{same}; choose other labels")
        nested = any(a != b and b[: len(a)] == a for a in tokens for b in tokens)
        return [ids + list(self.eos_ids[:1]) for ids in tokens] if nested else tokens
