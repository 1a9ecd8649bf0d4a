"""Losses of one's own for `run`: functions in Python files, which become methods beside the others."""

import hashlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from inspect import isfunction
from pathlib import Path
from types import ModuleType

from .. import UsageError
from ..errors import out_of_memory
from ..methods import ICL, METHODS, STARTS_FROM, Grid, then_sft
from ..train import Trained
from .options import METHOD_NAMES, Options


@dataclass(frozen=True)
class OwnLoss:
    """A loss by its name, and the sha256 of the file that defines it."""

    name: str
    function: Callable  # (student, batch) -> [R]
    digest: str

    def methods(self) -> dict[str, Callable]:
        """NAME trains on the loss, with the teacher's responses; NAME-sft runs SFT from there."""
        return {self.name: self.train, f"{self.name}-sft": then_sft(self.name)}

    def train(self, grid: Grid) -> Trained:
        return grid.train(self.name, {self.function: 1.0}, ICL)


def read_losses(given: tuple[str, ...]) -> list[OwnLoss]:
    """The losses of `--loss`, each FILE.py or FILE.py:NAME. Raises UsageError."""
    losses = []
    taken = {method.lower() for method in METHOD_NAMES}  # two files must not differ by case alone
    for text in given:
        loss = read_loss(text)
        names = {name.lower() for name in loss.methods()}
        if names & taken:
            mend = "give the function another name"
            raise UsageError(f"--loss {text}: a method {loss.name} is there already; {mend}")
        taken |= names
        losses.append(loss)
    return losses


def read_loss(given: str) -> OwnLoss:
    """Execute a Python file and take a function from it: the one that is named, or else its only one.

    Raises UsageError for a file that cannot be read or executed, and where it is not clear which function is meant.
    """
    path, _, name = given.rpartition(":")
    if given.endswith(".py"):
        path = given
        name = ""
    elif not path.endswith(".py"):
        raise UsageError(f"--loss {given}: give a Python file, as loss.py or loss.py:NAME")
    if not Path(path).is_file():
        raise UsageError(f"--loss {path}: no such file")
    with mistakes_of(path):
        source = Path(path).read_bytes()
        module = ModuleType(Path(path).stem)
        exec(compile(source, path, "exec"), vars(module))
    functions = {}
    for key, value in vars(module).items():
        own = isfunction(value) and value.__module__ == module.__name__
        if own and not key.startswith("_"):
            functions[key] = value
    if not name and len(functions) == 1:
        (name,) = functions
    loss = vars(module).get(name)
    if not callable(loss):
        known = ", ".join(functions) or "none"
        raise UsageError(f"--loss {given}: give {path}:NAME of one of its functions ({known})")
    digest = hashlib.sha256(source).hexdigest()
    return OwnLoss(name, watched(loss, path), digest)


def watched(loss: Callable, path: str) -> Callable:
    """The loss, whose mistakes are told as one line that names the line of its file."""

    @wraps(loss)
    def call(student, batch):
        with mistakes_of(path):
            return loss(student, batch)

    return call


@contextmanager
def mistakes_of(path: str) -> Iterator[None]:
    """Turn an error of the code in a file into a UsageError that says where in the file it happened."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if out_of_memory(error) or isinstance(error, UsageError):
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        where = f"--loss {path}, line {lines[-1]}" if lines else f"--loss {path}"
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error


def registered(losses: list[OwnLoss]) -> AbstractContextManager:
    """Within the block METHODS has the methods of these losses."""
    methods: dict[str, Callable] = {}
    starts_from = {}
    for loss in losses:
        methods.update(loss.methods())
        starts_from[f"{loss.name}-sft"] = loss.name
    return further(methods, starts_from)


@contextmanager
def further(methods: dict[str, Callable], starts_from: dict[str, str]) -> Iterator[None]:
    """Within the block METHODS and STARTS_FROM have these entries, too; their names must be new."""
    METHODS.update(methods)
    STARTS_FROM.update(starts_from)
    try:
        yield
    finally:
        for name in methods:
            del METHODS[name]
        for name in starts_from:
            del STARTS_FROM[name]


def with_methods_of(losses: list[OwnLoss], options: Options) -> Options:
    """The options, with both methods of every loss of which `--methods` names neither."""
    methods = options.methods
    for loss in losses:
        if not set(methods) & set(loss.methods()):
            methods += tuple(loss.methods())
    return replace(options, methods=methods)
