"""The description of a saved adapter in `ia2mini.json`: its fields, and checks for files from strangers."""

from collections.abc import Callable
from pathlib import Path

from .. import UsageError
from ..files import LONE_SURROGATE, check_name, is_there, read_json
from ..generate import STOP
from ..tasks.answers import PARSERS
from ..tasks.rows import placeholders

SPEC = "ia2mini.json"
FOREIGN = {  # for an adapter that ia2mini did not fit
    "template": "{text}",
    "labels": [],
    "parser": "text",
    "max_tokens": 200,
    "stop": STOP,
    "temperature": 1.0,
    "confidences": [],
    "demonstrations": [],
    "method": "adapter",
    "chat": False,
    "context": False,
    "answer_column": None,
}

MISSING = ...  # stands for a field that is not there


def is_number(least: float, most: float) -> Callable:
    """Whether a value is a number from `least` to `most`."""
    return lambda value: type(value) in (int, float) and least <= value <= most


def is_whole_number(least: int, most: int) -> Callable:
    return lambda value: type(value) is int and least <= value <= most


def is_text(value) -> bool:
    """Whether a value is a text that a tokenizer can read."""
    return isinstance(value, str) and not LONE_SURROGATE.search(value)


def is_text_or_none(value) -> bool:
    return value is None or is_text(value)


def is_nonblank(value) -> bool:
    return is_text(value) and value.strip() != ""


def is_template(value) -> bool:
    return is_text(value) and bool(placeholders(value))


def are_labels(value) -> bool:
    """Whether a value is a list of two or more different texts, none of them empty; or an empty list."""
    if not isinstance(value, (list, tuple)) or not all(map(is_nonblank, value)):
        return False
    return len(value) != 1 and len(set(value)) == len(value)


def is_parser(value) -> bool:
    return value is None or isinstance(value, str) and value in PARSERS


CANARY = {"tokens": [is_whole_number(0, 2**31)], "log_probabilities": [is_number(-1e9, 0)]}
SHAPE = {
    "template": is_template,
    "answer_column": is_text_or_none,
    "labels": are_labels,
    "parser": is_parser,
    "max_tokens": is_whole_number(1, 2**16),
    "stop": is_text_or_none,
    "temperature": is_number(1e-6, 1e6),
    "confidences": [is_number(0, 1.001)],
    "demonstrations": [{"prompt": is_text, "answer": is_text}],
    "method": is_text,
    "chat": bool,
    "context": bool,
    "example": is_nonblank,
    "report": dict,
    "adapter_digest": is_text_or_none,
    "probe_digest": is_text_or_none,
    "base": {"name": is_nonblank, "revision": is_text_or_none},
    "canary": {"dtype": is_text, "base": CANARY, "adapted": CANARY},
}


def misfit(value, shape, name: str) -> str | None:
    """The first field that does not match its shape, as "base.name"; None if all match.

    A shape is a type, a function that tells whether a value is right, or an object or a list of shapes.
    """
    if isinstance(shape, dict):
        fits = isinstance(value, dict)
    elif isinstance(shape, list):
        fits = isinstance(value, (list, tuple))
    elif isinstance(shape, type):
        fits = isinstance(value, shape)
    else:
        fits = shape(value)
    if not fits:
        return name
    found = []
    if isinstance(shape, dict):
        for key, inner in shape.items():
            found.append(misfit(value.get(key, MISSING), inner, f"{name}.{key}".lstrip(".")))
    elif isinstance(shape, list):
        found = [misfit(part, shape[0], name) for part in value]
    return next(filter(None, found), None)


def read_spec(folder: Path) -> dict | None:
    """The description of an adapter that ia2mini fitted; None for any other. Raises UsageError for a damaged one."""
    check_name(folder)
    path = folder / SPEC
    if not is_there(path):
        if next(folder.glob("unfinished-*"), None):
            state = "its `ia2mini fit` is not finished: it still runs or was interrupted"
            raise UsageError(f"{folder}: {state}; wait, or type the same command again")
        return None
    kept = read_json(path)
    field = misfit(kept, SHAPE, "")
    if field is None and not kept["labels"] and kept["parser"] is None:
        field = "parser"  # without labels the answers are texts, which something must parse
    if field:
        problem = f"field {field} is missing or not what it should be"
        raise UsageError(f"{path}: {problem}; fit the adapter again")
    return kept


DESCRIPTIONS = {
    "template": "a text with columns in braces",
    "labels": "a list of two or more different texts, none of them empty; or an empty list",
    "parser": f"one of {', '.join(PARSERS)}",
    "max_tokens": "a whole number from 1 to 65,536",
    "stop": "a text, or None",
    "temperature": "a number from 1e-6 to 1e6",
}


def check_given(spec: dict, kept: dict | None) -> None:
    """Raises UsageError for a given field that does not exist or has a wrong value.

    `kept` is the description of an adapter that ia2mini fitted: its labels stay as they are.
    """
    for name, value in spec.items():
        if name not in FOREIGN:
            raise UsageError(f"{name}: unknown; what can be said is {', '.join(FOREIGN)}")
        if misfit(value, SHAPE[name], name):
            usual = f"a {type(FOREIGN[name]).__name__}, as in ia2mini.json"
            description = DESCRIPTIONS.get(name, usual)
            raise UsageError(f"{name} = {repr(value)[:60]}: it must be {description}")
    fitted = kept["labels"] if kept else []
    if fitted and list(spec.get("labels", fitted)) != fitted:
        listed = ", ".join(map(repr, fitted))
        raise UsageError(f"labels: it was fitted to {listed}; leave labels out")
