import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from rich.console import Console

from archsmith.run.progress import Progress, format_count, format_seconds, format_value, summary


class Clock:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def live_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200, legacy_windows=False, _environ={})


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_come_at_most_every_two_seconds(clock: Clock) -> None:
    console = plain_console()
    with Progress("search", total=100, console=console, clock=clock) as progress:
        for step in range(1, 81):  # ten seconds of eight steps each
            clock.now += 0.125
            progress.update(step, loss=1 / step, macs_left=1_500_000)
    lines = shown(console).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"search step {n}/100" for n in (1, 17, 33, 49, 65)]
    assert lines[1] == "search step 17/100 | 10 s left | loss 0.05882 | macs left 1.50M"


def test_the_end_of_an_epoch_is_always_shown_and_fields_stay(clock: Clock) -> None:
    console = plain_console()
    with Progress("train", total=3, unit="epoch", console=console, clock=clock) as progress:
        progress.update(0, phase="warm-up")
        progress.milestone(1, accuracy=0.5)
        progress.milestone(2, phase="shrink")
    assert shown(console).splitlines() == [
        "train epoch 0/3 | phase warm-up",
        "train epoch 1/3 | 0 s left | phase warm-up | accuracy 0.5",
        "train epoch 2/3 | 0 s left | phase shrink | accuracy 0.5",
    ]


def test_a_live_line_is_drawn_at_most_five_times_a_second(clock: Clock) -> None:
    console = live_console()
    drawn = 0

    class Loss:
        def __float__(self) -> float:
            nonlocal drawn
            drawn += 1
            return 0.25

    with Progress("search", total=1000, console=console, clock=clock) as progress:
        for step in range(1, 1001):  # two seconds
            clock.now += 0.002
            progress.update(step, loss=Loss(), title="[red]x")
    assert 9 <= drawn <= 12  # twice for every tenth of the run, and at the end; not a thousand times
    text = shown(console)
    assert "0 s left | loss 0.25 | title [red]x" in text
    assert "1000/1000" in text


def test_on_a_narrow_terminal_the_numbers_are_cut_and_not_the_bar(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, legacy_windows=False, _environ={})
    with Progress("search", total=1000, console=console, clock=clock) as progress:
        progress.update(1000, loss=0.5, a_long_name=1.0, another_long_name=2.0, atoms=3)
    text = shown(console)
    assert "1000/1000" in text
    assert "0 s left" in text
    assert "another long name" not in text


def test_a_resumed_run_estimates_from_its_own_steps(clock: Clock) -> None:
    progress = Progress("search", total=100, done=60, console=plain_console(), clock=clock)
    assert progress.seconds_left is None
    clock.now += 10
    progress.update(80)
    assert progress.seconds_left == pytest.approx(10)
    progress.update(120)
    assert progress.seconds_left == 0


@pytest.mark.parametrize("make", [plain_console, live_console])
def test_quiet_shows_notes_only(clock: Clock, make: Callable[[], Console]) -> None:
    console = make()
    with Progress("search", total=2, quiet=True, console=console, clock=clock) as progress:
        progress.update(1, loss=1.0)
        progress.milestone(2)
        progress.note("checkpoint [a] was damaged")
    assert shown(console) == "checkpoint [a] was damaged\n"


def test_notes_are_never_wrapped() -> None:
    console = plain_console()
    Progress("search", total=2, console=console).note("x " * 100)
    assert shown(console).splitlines() == ["x " * 100]


def test_the_summary_says_what_where_and_what_next() -> None:
    console = plain_console()
    folder = "/home/somebody/" + "a-long-name/" * 8 + "final"
    command = "archsmith verify '" + "runs/[demo] " * 12 + "'"
    summary("Finished [1/1]", {"test accuracy": "97.3 %", "folder": folder, "MACs": 1234}, command, console=console)
    *panel, last = shown(console).splitlines()
    assert last == f"Next: {command}"
    assert "Finished [1/1]" in panel[0]
    assert all(len(line) <= 60 for line in panel)
    inside = [line.strip("│ ") for line in panel[1:-1]]
    assert inside[0] == "test accuracy  97.3 %"
    assert inside[-1] == "MACs           1234"
    assert "".join(inside[1:-1]).replace("folder", "", 1).replace(" ", "") == folder


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("warm-up", "warm-up"),
        (0.123456, "0.1235"),
        (12, "12"),
        (np.int64(1_234_567), "1.23M"),
        (torch.tensor(2.0), "2"),
        (float("nan"), "nan"),
    ],
)
def test_values(value: float | str, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (9_999, "9999"),
        (10_000, "10.0k"),
        (99_960, "100k"),
        (999_400, "999k"),
        (999_600, "1.00M"),
        (4_560_000, "4.56M"),
        (1.2e12, "1200G"),
        (-50_000, "-50.0k"),
    ],
)
def test_counts_have_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3600, "1 h 00 min"),
        (7501, "2 h 05 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
