"""A tokenizer's files: tokenizer.json and the files beside it.

Tokens stand in tokenizer_config.json, special_tokens_map.json or added_tokens.json, too. transformers adds them when it
loads a tokenizer, so that they are cut out of a text whole; here the same is done in the same order. Reference:
transformers 5, `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from .. import UsageError
from ..errors import broken_tokenizer, out_of_memory
from . import is_there, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# what holds further ones with names of their own; the latter is what transformers 5 writes
WITH_NAMES = ("extra_special_tokens", "model_specific_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ENDLESS = 2**31  # size of a vocabulary where config.json names none


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder's tokenizer.json, with the tokens that its other files name. Raises UsageError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; a checkpoint needs its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        if out_of_memory(error):
            raise
        raise UsageError(f"{path}: not a tokenizers file ({error})") from None
    add_tokens(tokenizer, folder)
    # true: names of special tokens in a text are read as plain text
    tokenizer.encode_special_tokens = token_settings(folder).get("split_special_tokens") is True
    tokenizer.no_truncation()  # some files carry both from their training
    tokenizer.no_padding()
    return tokenizer


def read_ends(folder: Path) -> tuple[tuple[int, ...], int]:
    """Ids that end a text by config.json or generation_config.json, and the vocabulary's size. Raises UsageError."""
    config = read_json(folder / "config.json")
    ends = config.get("eos_token_id")
    size = config.get("vocab_size", ENDLESS)
    if is_there(folder / "generation_config.json"):
        ends = read_json(folder / "generation_config.json").get("eos_token_id", ends)
    ids = ends if isinstance(ends, list) else [ends]
    if ends is None:
        ids = []
    if type(size) is not int or not all(type(i) is int and 0 <= i < size for i in ids):
        wanted = f"neither a token id nor a list of them (vocab_size = {repr(size)[:80]})"
        raise UsageError(f"{folder}: eos_token_id = {repr(ends)[:80]} is {wanted}")
    return tuple(ids), size


def token_settings(folder: Path) -> dict:
    """What tokenizer_config.json says and, where it does not list the added tokens, special_tokens_map.json."""
    path = folder / "tokenizer_config.json"
    older = folder / "special_tokens_map.json"
    settings = read_json(path) if is_there(path) else {}
    if "added_tokens_decoder" not in settings and is_there(older):
        settings.update(read_json(older))
        settings.pop("added_tokens_decoder", None)  # of the other file only
    return settings


def named_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a checkpoint names ("bos_token" and so on), as transformers reads them.

    Further ones have names of their own ("image_token"), also in an object (`WITH_NAMES`). Raises UsageError.
    """
    settings = token_settings(folder)
    tokens = {name: token for name, token in settings.items() if name.endswith("_token")}
    for group in WITH_NAMES:
        if isinstance(settings.get(group), dict):
            tokens.update(settings[group])
    found = {}
    for name, token in tokens.items():
        if isinstance(token, dict):  # an added token with its properties
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add to `tokenizer`, read from the folder's tokenizer.json, the tokens that its other files name.

    Raises UsageError where a file is no description of tokens, or asks for another id than the token gets.
    """
    settings = token_settings(folder)
    path = folder / "tokenizer_config.json"
    named, further = special_tokens(settings, path)
    if "added_tokens_decoder" in settings:
        numbered = numbered_tokens(settings["added_tokens_decoder"], path)
    else:  # as files of older versions have it
        path = folder / "added_tokens.json"
        numbered = old_numbered_tokens(path, named + further)
    there = list(tokenizer.get_added_tokens_decoder().values())
    known = set(map(repr, there))
    new = [token for _, token in sorted(numbered.items()) if repr(token) not in known]
    texts = {token.content for token in there + new}
    new += [token for token in named + further if token.content not in texts]
    names = {token.content for token in named}
    for token in new:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(new)
    for number, token in numbered.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            given = f"token {token.content!r} has the id {number}, and {found} by tokenizer.json"
            raise UsageError(f"{path}: {given}; make the two files agree")
    check_ends(tokenizer, settings, folder)


def numbered_tokens(value, path: Path) -> dict[int, AddedToken]:
    """Id -> token of `added_tokens_decoder`. Raises UsageError."""
    if not isinstance(value, dict):
        raise UsageError(f"{path}: added_tokens_decoder is not an object of ids and tokens")
    found = {}
    for number, token in value.items():
        if not number.isdecimal() or len(number) > 9 or not isinstance(token, dict):
            entry = f"added_tokens_decoder: {repr(number)[:40]}"
            raise UsageError(f"{path}: {entry} is not an id with a token")
        found[int(number)] = token_of(token, path, special=False)
    return found


def old_numbered_tokens(path: Path, special_tokens: list[AddedToken]) -> dict[int, AddedToken]:
    """Id -> token of added_tokens.json, {text: id}. Raises UsageError."""
    special = {token.content for token in special_tokens}
    found = {}
    for text, number in (read_json(path) if is_there(path) else {}).items():
        if type(number) is not int or not text:
            raise UsageError(f"{path}: {text[:40]!r}: {repr(number)[:40]} is not a token's id")
        found[number] = AddedToken(text, normalized=text not in special, special=text in special)
    return found


def special_tokens(settings: dict, path: Path) -> tuple[list[AddedToken], list[AddedToken]]:
    """Special tokens that have a name of their own in the settings, and further ones. Raises UsageError."""
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
    specific = settings.get("model_specific_special_tokens") or {}
    if not isinstance(specific, dict):
        raise UsageError(f"{path}: model_specific_special_tokens is not an object of tokens")
    named += specific.values()
    return tokens_of(named, path), tokens_of(further, path)


def tokens_of(values: list, path: Path) -> list[AddedToken]:
    return [token_of(value, path, special=True) for value in values if value is not None]


def token_of(value, path: Path, special: bool) -> AddedToken:
    """A token from its text, or from an object with `content` and flags. Raises UsageError."""
    fields = {"content": value} if isinstance(value, str) else value
    text = fields.get("content") if isinstance(fields, dict) else None
    if not isinstance(text, str):
        files = f"{path} (or special_tokens_map.json beside it)"
        raise UsageError(f"{files}: {repr(value)[:80]} is not a token")
    flags = {name: fields[name] for name in FLAGS if name in fields}
    if special:
        flags["special"] = True
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise UsageError(f"{path}: token {text[:40]!r}: its flags are not true or false")
    return AddedToken(text, **flags)


def check_ends(tokenizer: Tokenizer, settings: dict, folder: Path) -> None:
    """Raises UsageError where settings and tokenizer.json differ in whether BOS and EOS stand around every text."""
    for name, edge in (("bos", slice(0, 1)), ("eos", slice(-1, None))):
        wanted = settings.get(f"add_{name}_token")
        token = settings.get(f"{name}_token")
        if wanted is None or token is None:
            continue
        text = token_of(token, folder / "tokenizer_config.json", special=True).content
        with broken_tokenizer():
            written = tokenizer.encode("").ids
        is_added = tokenizer.token_to_id(text) in written[edge]
        if is_added != bool(wanted):
            what = f"tokenizer_config.json says add_{name}_token = {str(wanted).lower()}"
            has = "adds it" if is_added else "does not add it"
            raise UsageError(f"{folder}: {what}, tokenizer.json {has}; change one of them")
