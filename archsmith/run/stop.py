"""How a run is asked to stop: Ctrl-C, a termination signal, or a time limit.

Nothing is interrupted: loops ask ``stop.reason`` between steps, finish the step, save, and end in their own time.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from archsmith.core.errors import UserError

_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str, *, field: str = "time") -> float:
    """Return the seconds meant by a text such as ``"90s"``, ``"20m"``, ``"2h"`` or ``"1h30m"``.

    Args:
        text: Hours, minutes and seconds in this order, each at most once, decimals allowed (``"1.5h"``).
        field: Name of the option, for the message.

    Raises:
        UserError: Another form, a number without a unit, or nothing above zero.

    Example:
        >>> parse_duration("1h30m")
        5400.0
    """
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip(), flags=re.ASCII)
    seconds = sum(float(n) * _SECONDS[u] for n, u in zip(match.groups(), "hms", strict=True) if n) if match else 0.0
    if seconds <= 0:
        raise UserError(
            field, text, allowed="a positive duration such as 90s, 20m, 2h or 1h30m", hint="Write the unit: h, m or s."
        )
    return seconds


class StopRequest:
    """Remembers that, and why, the run should end: ``with StopRequest(time_limit=7200) as stop: ...``.

    Inside the ``with`` block the first SIGINT (Ctrl-C) or SIGTERM only sets ``reason``; the second raises
    ``KeyboardInterrupt`` at once. Outside of the main thread Python allows no handlers, and only ``request`` and the
    time limit work. The clock runs from the construction.

    Args:
        time_limit: Seconds after which to stop, or None.
        clock: Seconds as a float, never going backwards.
    """

    def __init__(self, *, time_limit: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._time_limit = time_limit
        self._started = clock()
        self._reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, as a sentence's end ("Ctrl-C", "the time limit of 7200 s"); None to go on."""
        if self._reason is None and self._time_limit is not None and self.seconds >= self._time_limit:
            self._reason = f"the time limit of {self._time_limit:g} s"
        return self._reason

    @property
    def seconds(self) -> float:
        """Seconds since the construction."""
        return self._clock() - self._started

    def request(self, reason: str) -> None:
        """Ask to stop; the first reason stays."""
        self._reason = self._reason or reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None:
            raise KeyboardInterrupt
        self._reason = "Ctrl-C" if number == signal.SIGINT else "a termination signal"
        # Not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice.
        os.write(2, b"\nStopping after this step and saving; once more to stop at once.\n")
