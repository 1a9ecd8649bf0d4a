"""Tokens that stand beside tokenizer.json: in tokenizer_config.json, special_tokens_map.json or added_tokens.json.

transformers adds them when it loads a tokenizer, so that they are cut out of a text whole; here the same is done in the
same order. Reference: transformers 5, `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from .. import UsageError
from ..errors import broken_tokenizer
from . import is_there, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(backend: Tokenizer, folder: Path) -> None:
    """Add to `backend`, read from the folder's tokenizer.json, the tokens that its other files name.

    Raises UsageError where a file is no description of tokens, or asks for another id than the token gets.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if is_there(path) else {}
    if "added_tokens_decoder" in settings:
        numbered = numbered_tokens(settings["added_tokens_decoder"], path)
    else:  # as files of older versions have it
        settings = settings | old_settings(folder / "special_tokens_map.json")
        path = folder / "added_tokens.json"
        numbered = old_numbered_tokens(path, settings)
    named, further = special_tokens(settings, folder)
    known = set(map(repr, backend.get_added_tokens_decoder().values()))
    new = [token for _, token in sorted(numbered.items()) if repr(token) not in known]
    texts = {token.content for token in (*backend.get_added_tokens_decoder().values(), *new)}
    new += [token for token in named + further if token.content not in texts]
    names = {token.content for token in named}
    for token in new:
        token.special = token.special or token.content in names
    backend.add_tokens(new)
    for number, token in numbered.items():
        found = backend.token_to_id(token.content)
        if found != number:
            given = f"token {token.content!r} has the id {number}, and {found} by tokenizer.json"
            raise UsageError(f"{path}: {given}; make the two files agree")
    check_ends(backend, settings, folder)


def numbered_tokens(value, path: Path) -> dict[int, AddedToken]:
    """Id -> token of `added_tokens_decoder`. Raises UsageError."""
    if not isinstance(value, dict):
        raise UsageError(f"{path}: added_tokens_decoder is not an object of ids and tokens")
    found = {}
    for number, token in value.items():
        if not number.isdecimal() or len(number) > 9 or not isinstance(token, dict):
            raise UsageError(
                f"{path}: added_tokens_decoder: {repr(number)[:40]} is not an id with a token"
            )
        found[int(number)] = token_of(token, path, special=False)
    return found


def old_numbered_tokens(path: Path, settings: dict) -> dict[int, AddedToken]:
    """Id -> token of added_tokens.json, {text: id}. Raises UsageError."""
    named, further = special_tokens(settings, path.parent)
    special = {token.content for token in named + further}
    found = {}
    for text, number in (read_json(path) if is_there(path) else {}).items():
        if type(number) is not int or not text:
            raise UsageError(f"{path}: {text[:40]!r}: {repr(number)[:40]} is not a token's id")
        found[number] = AddedToken(text, normalized=text not in special, special=text in special)
    return found


def old_settings(path: Path) -> dict:
    """What special_tokens_map.json says, which holds where tokenizer_config.json has no `added_tokens_decoder`."""
    return read_json(path) if is_there(path) else {}


def special_tokens(settings: dict, folder: Path) -> tuple[list[AddedToken], list[AddedToken]]:
    """Special tokens that have a name of their own in the settings, and further ones. Raises UsageError."""
    path = folder / "tokenizer_config.json"
    named = [settings.get(name) for name in NAMED]
    older = settings.get("additional_special_tokens") or []
    further = settings.get("extra_special_tokens") or older
    if not isinstance(further, list | dict) or not isinstance(older, list):
        raise UsageError(f"{path}: extra_special_tokens is neither a list nor an object of tokens")
    plain = []
    for name, value in settings.items():
        if name.endswith("_token") and name not in NAMED:
            if isinstance(value, str):
                plain.append(value)
            elif isinstance(value, dict) and value.get("__type") == "AddedToken":
                named.append(value)
    named += plain
    if isinstance(further, dict):
        named += further.values()
        further = older
    return tokens_of(named, path), tokens_of(further, path)


def tokens_of(values: list, path: Path) -> list[AddedToken]:
    return [token_of(value, path, special=True) for value in values if value is not None]


def token_of(value, path: Path, special: bool) -> AddedToken:
    """A token from its text, or from an object with `content` and flags. Raises UsageError."""
    fields = {"content": value} if isinstance(value, str) else value
    text = fields.get("content") if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise UsageError(
            f"{path} (or special_tokens_map.json beside it): {repr(value)[:80]} is not a token"
        )
    flags = {name: fields[name] for name in FLAGS if name in fields}
    if special:
        flags["special"] = True
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UsageError(f"{path}: token {text[:40]!r}: its flags are not true or false")
    return AddedToken(text, **flags)


def check_ends(backend: Tokenizer, settings: dict, folder: Path) -> None:
    """Raises UsageError where settings and tokenizer.json differ in whether BOS and EOS stand around every text."""
    for name, place in (("bos", 0), ("eos", -1)):
        wanted = settings.get(f"add_{name}_token")
        token = settings.get(f"{name}_token")
        if wanted is None or token is None:
            continue
        with broken_tokenizer():
            written = backend.encode("").ids
        number = backend.token_to_id(
            token_of(token, folder / "tokenizer_config.json", special=True).content
        )
        there = number in (written[:1] if place == 0 else written[-1:])
        if there != bool(wanted):
            what = f"add_{name}_token = {str(wanted).lower()}"
            has = "adds it" if there else "does not add it"
            raise UsageError(
                f"{folder}: tokenizer_config.json says {what}, tokenizer.json {has}; change one of them"
            )
