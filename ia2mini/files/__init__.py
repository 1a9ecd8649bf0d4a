"""Reading and writing files: checked JSON, writing that never leaves half a file, texts from strangers."""

import base64
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .. import UsageError

# control characters, marks that turn the direction of text, line and paragraph ends of Unicode, halves of surrogates
HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
PACKED = (b"\x1f\x8b", b"PK\x03\x04")  # how a file of gzip begins, and one of zip
# half of a surrogate pair; Python also spells a byte so that is not UTF-8
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def plain(text: str, kept: str = "\t\n") -> str:
    """A text that is safe to print: control and other hidden characters are spelled out, except those in `kept`."""
    return HIDDEN.sub(lambda found: found[0] if found[0] in kept else repr(found[0])[1:-1], text)


def json_line(value) -> str:
    """`value` as JSON in one line, with non-ASCII letters as they are and hidden characters escaped.

    NaN and infinity, which JSON does not have, become null; dates and other things of Parquet become texts.
    """
    line = json.dumps(finite(value, as_text), ensure_ascii=False)
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def check_name(path: Path) -> None:
    """Raises UsageError for a path that is not UTF-8: safetensors and tokenizers cannot open it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        odd = "its name, or a folder's above it, is not UTF-8"
        raise UsageError(f"{plain(str(path), '')}: {odd}; rename it") from None


def check_text(text: str, what: str, mend: str) -> None:
    """Raises UsageError for a text with half a surrogate pair, which tokenizers and files cannot hold."""
    if LONE_SURROGATE.search(text):
        half = "half a surrogate pair, which is no character"
        raise UsageError(f"{what} {text[:60]!r} holds {half}; {mend}")


def is_there(path: Path) -> bool:
    """Whether a file exists. Raises UsageError for a folder, and for a pipe or device, which may never end."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: cannot be read (it is not a file)")
    return path.exists()


def check_there(path: Path) -> None:
    """Raises UsageError where no file is."""
    if not is_there(path):
        raise UsageError(f"{path}: no such file")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises UsageError."""
    check_there(path)
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        if data.startswith(PACKED):
            raise UsageError(f"{path}: is packed (gzip, or zip as of Excel); unpack it") from None
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise UsageError(f"{path}:{line}: not UTF-8 ({byte}); save the file as UTF-8") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UsageError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number of more than 4,300 digits
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Run `writer(temporary path)` beside `path`, then rename: the file is whole or not there. Raises UsageError.

    Temporary files of killed processes are removed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.{platform.node()}.{os.getpid()}."
        )
        os.close(handle)
    except OSError as error:
        mend = "choose another folder with --out"
        raise UsageError(f"{path.parent}: cannot write there ({error.strerror}); {mend}") from None
    try:
        writer(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        mend = "free some space or choose another folder with --out"
        raise UsageError(f"{path}: cannot be written ({reason}); {mend}") from None
    finally:
        with suppress(OSError):  # after the rename, or without permission
            os.unlink(temporary)


def sweep(path: Path) -> None:
    """Remove temporary files of `path` that `write` began in processes of this machine that have ended."""
    begun = f".{path.name}.{platform.node()}."
    for left in path.parent.iterdir():
        pid = left.name[len(begun) :].split(".")[0]
        if left.name.startswith(begun) and pid.isdecimal() and not alive(int(pid)):
            left.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter if no process has this number
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(finite(content), indent=1) + "\n")


def finite(value, default: Callable | None = None):
    """`value` in the types of JSON, with NaN and infinity replaced by None; `default` converts other types."""
    return json.loads(json.dumps(value, default=default), parse_constant=lambda name: None)


def as_text(value) -> str:
    """A date, a decimal number and the like as text; bytes in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def plural(number: int, noun: str) -> str:
    """ "1 set", "5 sets"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
