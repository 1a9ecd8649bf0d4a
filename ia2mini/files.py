"""Files in and out: JSON that is checked, writing that is whole or not there, and the hub's errors in one line."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from . import UsageError
from .shard import first


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises UsageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # also of a number of more than 4,300 digits
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Run `writer(temporary path)` beside `path`, then rename: the file is whole or not there. Raises UsageError."""
    if not first():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{platform.node()}.{os.getpid()}.")
        os.close(handle)
    except OSError as error:
        mend = "choose another folder with --out"
        raise UsageError(f"{path.parent}: cannot write there ({error.strerror}); {mend}") from None
    try:
        writer(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason, mend = getattr(error, "strerror", None) or error, "free some space or choose another folder with --out"
        raise UsageError(f"{path}: cannot be written ({reason}); {mend}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what `write` had begun anywhere below `folder` in processes of this machine that are no more."""
    for path in folder.rglob(f".*.{platform.node()}.*.*"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not alive(int(pid)):
            path.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_text(path: Path, text: str) -> None:
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(finite(content), indent=1) + "\n")


def finite(value):
    """`value` as JSON holds it, with every NaN and infinity replaced by None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


@contextmanager
def hub_errors(repo: str, kind: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turn whatever goes wrong with a "model" or "dataset" on the hub into a UsageError; `instead`: a way around."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except UsageError:
        raise
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{repo}"
        raise UsageError(f"{repo} is gated: accept its terms at {page}, then {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(f"{repo}: no such {kind} on the hub (or private: {log_in})") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{repo}: the hub has no revision {revision} of it; {instead}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        missing = "not in the local cache, and the hub is out of reach"
        raise UsageError(f"{repo}: {missing}; check the network, or {instead}") from None
    except Exception as error:  # bad ids and the client's own network errors, whose classes differ between its versions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UsageError(f"{repo}: cannot be downloaded ({reason}); check the network, or {instead}") from None
