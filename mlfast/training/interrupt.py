"""Ctrl-C and SIGTERM that let the present step end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether Ctrl-C was pressed, or SIGTERM came, as batch systems send it before they kill."""

    requested = False


@contextmanager
def catch_interrupt() -> Iterator[StopRequest]:
    """Note the first Ctrl-C or SIGTERM instead of ending in the middle of a step; a second one ends at once.

    Signals can be handled in the main thread only: elsewhere they are left as they are.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in previous:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
