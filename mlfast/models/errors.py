"""What another library's error says, in a message of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error, or its type where it says nothing, as a `TimeoutError` of the network does."""
    return str(error).partition("\n")[0] or type(error).__name__
