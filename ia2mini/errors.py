"""What an error of another library means: whether memory has run out, or a tokenizer's file is broken."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from . import UsageError

NO_MEMORY = (
    "the device has too little memory; use a smaller --model, --dtype bfloat16 or another --device"
)
WORDS = (
    "not enough memory",  # PyTorch's allocator for the CPU, on Windows
    "can't allocate memory",  # the same elsewhere
    "cannot allocate memory",  # the operating system, as where a file is mapped
    "out of memory",  # CUDA
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "bad allocation",
    "bad_alloc",
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that it was raised from or that a compiler wrapped into it, says so."""
    seen = []
    while error is not None and error not in seen:
        if names_memory(error):
            return True
        seen.append(error)
        error = cause(error)
    return False


def cause(error: BaseException) -> BaseException | None:
    wrapped = getattr(error, "inner_exception", None)  # of torch's compiler
    if wrapped is not None:
        return wrapped
    return error.__cause__ if error.__suppress_context__ else error.__context__


def names_memory(error: BaseException) -> bool:
    name = type(error).__name__
    # torch's own; torch may not be loaded yet
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):  # its text holds the name of a file
        return error.errno == errno.ENOMEM
    if not isinstance(error, (RuntimeError, ImportError)) and name not in (
        "SafetensorError",
        "Exception",
    ):
        return False  # tokenizers raises bare Exception
    text = str(error).lower()
    return any(words in text for words in WORDS)


@contextmanager
def broken_tokenizer() -> Iterator[None]:
    """Turn what `tokenizers` raises into a UsageError: a bare Exception, or a panic of its Rust, which is no Exception.

    Some broken files are found out only where a text is read: by a word that they have no token for, and the like.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and (isinstance(error, UsageError) or not isinstance(error, Exception)):
            raise
        raise UsageError(
            f"the tokenizer.json of this checkpoint is broken ({error}); download it again"
        ) from None
