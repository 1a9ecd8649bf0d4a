"""What a command starts with: streams that may be closed, arguments that may not be text, and memory settings.

Services and cron jobs may start a program without standard input, output or errors; Python then has None for it.
"""

import codecs
import ctypes
import io
import os
import sys
from contextlib import suppress

from .. import UsageError
from ..files import LONE_SURROGATE


def open_streams() -> None:
    """Replace closed standard streams by /dev/null, and write UTF-8 in every locale.

    Otherwise the next file opened would get the number of the closed stream, and printed text would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def need_input() -> None:
    """Raises UsageError if standard input cannot be read."""
    mend = "give a file of rows, or a pipe"
    if sys.stdin is None:
        raise UsageError(f"standard input is closed; {mend}")
    try:
        os.read(0, 0)
    except OSError as error:
        raise UsageError(f"standard input cannot be read ({error.strerror}); {mend}") from None


def need_output() -> None:
    """Raises UsageError if standard output is closed, for commands that only print."""
    if sys.stdout is None:
        mend = "send it to a file or a pipe"
        raise UsageError(f"standard output is closed, and the answer goes there; {mend}")


def check_arguments(arguments: list[str]) -> None:
    """Raises UsageError for an argument that is not UTF-8."""
    for argument in arguments:
        if LONE_SURROGATE.search(argument):
            typed = LONE_SURROGATE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", argument)
            encoding = sys.getfilesystemencoding()
            mend = "type it in UTF-8, or give the file a name in UTF-8"
            if encoding != "utf-8":
                mend = f"Python reads arguments as {encoding} here; set PYTHONUTF8=1"
            raise UsageError(f"argument '{typed}' is not UTF-8; {mend}")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of mapping it anew for every tensor. Saves a tenth of a small step."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its largest
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
