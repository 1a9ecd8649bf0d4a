"""What a user's mistake must look like."""

import pytest

from ia2mini import UsageError


def refused(call, *mentioned: str) -> None:
    """`call` raises a UsageError of one line that mentions every string."""
    with pytest.raises(UsageError) as error:
        call()
    assert "\n" not in str(error.value)
    for text in mentioned:
        assert text in str(error.value), f"{text!r} not in {str(error.value)!r}"
