"""What the user sees while a run works and when it ends.

On a terminal: one live line with a bar, the current numbers and the time left. Elsewhere (a log file, CI): plain lines
now and then. Numbers are formatted when something is drawn, not when they are handed in, so a tensor on a GPU is waited
for a few times a second and not at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from numbers import Integral
from types import TracebackType
from typing import Self, SupportsFloat

from rich import progress as rich_progress
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

Value = SupportsFloat | str

_LIVE_SECONDS = 0.2
_PLAIN_SECONDS = 2.0


class Progress:
    """Shows how far a run is, with any named numbers: ``with Progress("search", total=900) as progress: ...``.

    Args:
        title: A word or two in front.
        total: Steps of the whole run.
        done: Steps done before (a resumed run); they count for the bar, not for the speed.
        unit: What one step is called.
        quiet: Show nothing but notes.
        console: Where to show; standard output by default.
        clock: Seconds as a float, never going backwards.
    """

    def __init__(
        self,
        title: str,
        *,
        total: int,
        done: int = 0,
        unit: str = "step",
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._total = total
        self._first = self._done = done
        self._unit = unit
        self._quiet = quiet
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._clock = clock
        self._started = clock()
        self._next = self._started
        self._fields: dict[str, Value] = {}
        self._live = None if quiet or not self._console.is_terminal else _live_line(self._console, total)
        self._task = self._live.add_task(title, total=total, completed=done, rest="") if self._live else None

    def update(self, done: int, **fields: Value) -> None:
        """Tell how many steps are done and the current numbers; draws at most five times a second.

        Args:
            done: Steps done, those before a resume included.
            fields: Numbers, 0-dimensional tensors or text by name (``macs_left`` is shown as "macs left"). A field
                keeps its value until it is given again.
        """
        self._done = done
        self._fields.update(fields)
        if not self._quiet and self._clock() >= self._next:
            self._show()

    def milestone(self, done: int, **fields: Value) -> None:
        """Like ``update``, but always drawn: the end of an epoch, a phase, a trial."""
        self._done = done
        self._fields.update(fields)
        if not self._quiet:
            self._show()

    def note(self, text: str) -> None:
        """Print a line that stays, above the live one; in quiet mode too."""
        self._console.print(Text(text), soft_wrap=True)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the mean speed since the start or resume; None before the first step."""
        steps = self._done - self._first
        if steps <= 0:
            return None
        return (self._clock() - self._started) / steps * max(0, self._total - self._done)

    def _show(self) -> None:
        left = self.seconds_left
        parts = [f"{name.replace('_', ' ')} {format_value(value)}" for name, value in self._fields.items()]
        if left is not None:
            parts.insert(0, f"{format_seconds(left)} left")  # in front: a narrow terminal cuts the end
        rest = " | ".join(parts)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, rest=rest)
            self._live.refresh()
            self._next = self._clock() + _LIVE_SECONDS
        else:
            line = f"{self._title} {self._unit} {self._done}/{self._total}"
            self._console.print(Text(f"{line} | {rest}" if rest else line), soft_wrap=True)
            self._next = self._clock() + _PLAIN_SECONDS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._show()
            self._live.stop()


def _live_line(console: Console, total: int) -> rich_progress.Progress:
    """Return rich's progress line without its refresh thread: we draw from the loop, at our own pace."""
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=20, table_column=Column(min_width=20)),
        rich_progress.MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
        rich_progress.TextColumn(
            "{task.fields[rest]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
        console=console,
        auto_refresh=False,
    )


def summary(title: str, rows: Mapping[str, object], next_command: str, *, console: Console | None = None) -> None:
    """Print what was found, where it is, and the next command to type.

    Args:
        title: Headline of the panel.
        rows: Label and value, in order; long values (paths) are folded, never cut.
        next_command: Shown on a line of its own, unwrapped, ready to be copied.
        console: Where to print; standard output by default.
    """
    console = console or Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in rows.items():
        table.add_row(Text(label), Text(str(value)))
    console.print(Panel(table, title=Text(title), title_align="left", expand=False))
    console.print(Text(f"Next: {next_command}"), soft_wrap=True)


def say(text: str, *, console: Console | None = None) -> None:
    """Print one line that stays, outside of any progress."""
    (console or Console(highlight=False)).print(Text(text), soft_wrap=True)


def format_value(value: Value) -> str:
    """Return a short readable form: counts in thousands (12.3M), other numbers with four significant digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return format_count(int(value))
    return f"{float(value):.4g}"


def format_count(count: float) -> str:
    """Return a count such as 9500, 12.3k, 4.56M or 1.20G: exact below 10,000, then powers of 1000 and three digits."""
    if abs(count) < 10_000:
        return f"{count:g}"
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    power, suffix = next(unit for unit in units if abs(count) >= 0.9995 * unit[0])
    scaled = count / power
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f}{suffix}"


def format_seconds(seconds: float) -> str:
    """Return a duration such as 8 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
