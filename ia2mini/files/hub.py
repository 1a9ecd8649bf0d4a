"""Downloads from the Hugging Face hub: tried again if it is busy; every failure is one line."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .. import UsageError

WAITS = (1, 4)  # seconds before a download is tried again
# of the client's library, httpx or requests
BROKEN_OFF = ("RemoteProtocolError", "ReadError", "ChunkedEncodingError")
PARTS = ("connect", "read", "write", "pool")  # of a request, each with a time limit


def patiently(fetch: Callable):
    """Call `fetch()` and try again if the hub is busy or breaks off; each answer has a time limit.

    huggingface_hub alone waits forever for some answers (lists of files), and gives up at once on some brief failures.
    """
    from huggingface_hub.utils import get_session

    # none in clients before 1.0
    hooks = getattr(get_session(), "event_hooks", {}).get("request", [])
    if limit not in hooks:
        hooks.append(limit)
    for wait in (*WAITS, None):
        try:
            return fetch()
        except Exception as error:
            cause = error.__cause__ or error
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            is_brief = status == 429 or status >= 500 or type(cause).__name__ in BROKEN_OFF
            if wait is None or not is_brief:
                raise
        time.sleep(wait)


def limit(request) -> None:
    """Limit every part of a request to the client's own setting (HF_HUB_DOWNLOAD_TIMEOUT)."""
    from huggingface_hub import constants

    most = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {part: min(given.get(part) or most, most) for part in PARTS}


@contextmanager
def hub_errors(repo: str, kind: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turn every error with a "model" or "dataset" on the hub into a UsageError; `instead` names a way around it."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except UsageError:
        raise
    except errors.GatedRepoError:
        place = "datasets/" if kind == "dataset" else ""
        page = f"https://huggingface.co/{place}{repo}"
        raise UsageError(f"{repo} is gated: accept its terms at {page}, then {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(f"{repo}: no such {kind} on the hub (or private: {log_in})") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{repo}: the hub has no revision {revision} of it; {instead}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        answer = f"answers {status}" if status else "is out of reach"
        missing = f"not in the local cache, and the hub {answer}"
        raise UsageError(f"{repo}: {missing}; check the network, or {instead}") from None
    except Exception as error:  # bad ids and the client's own network errors, whose classes differ between its versions
        told = " ".join(f"{type(error).__name__}: {error}".split())
        reason = re.sub("Bearer [^'\"]*", "Bearer …", told)[:160]
        failed = f"cannot be downloaded ({reason})"
        raise UsageError(f"{repo}: {failed}; check the network, or {instead}") from None
