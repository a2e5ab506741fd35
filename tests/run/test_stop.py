import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.run.stop import StopRequest, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("2h", 7200), ("1h30m", 5400), ("1h5s", 3605), ("1.5h", 5400), (" 0h0m1s ", 1)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_a_duration_is_the_sum_of_its_parts(hours: int, minutes: int, seconds: int) -> None:
    assume(hours or minutes or seconds)
    text = f"{hours}h" * (hours > 0) + f"{minutes}m" * (minutes > 0) + f"{seconds}s" * (seconds > 0)
    assert parse_duration(text) == 3600 * hours + 60 * minutes + seconds


@pytest.mark.parametrize("text", ["", "90", "2 h", "30m1h", "1h1h", "-5m", "0s", "2d", "h", "1e3s", "nan", "²s", "1.h"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(
        UserError, match=r"time: got '.*'; allowed: a positive duration such as 90s, 20m, 2h or 1h30m\."
    ):
        parse_duration(text)


def test_the_time_limit_is_a_reason_to_stop() -> None:
    now = 100.0
    stop = StopRequest(time_limit=60, clock=lambda: now)
    assert stop.reason is None
    now = 159.9
    assert stop.reason is None
    assert stop.seconds == pytest.approx(59.9)
    now = 160.0
    assert stop.reason == "the time limit of 60 s"
    stop.request("something else")
    assert stop.reason == "the time limit of 60 s"


def test_without_a_limit_time_is_no_reason() -> None:
    times = iter([0.0, 1e9])
    stop = StopRequest(clock=lambda: next(times))
    assert stop.reason is None
    stop.request("no candidates left")
    assert stop.reason == "no candidates left"


def test_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        _ = 1 / 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "a termination signal")])
def test_the_first_signal_asks_and_the_second_interrupts(
    number: signal.Signals, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.reason == reason
        assert "Stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_signal_after_the_time_limit_interrupts_at_once() -> None:
    now = 0.0
    with StopRequest(time_limit=1, clock=lambda: now) as stop:
        now = 2.0
        assert stop.reason is not None
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_requests_still_work() -> None:
    reasons: list[str | None] = []

    def work() -> None:
        with StopRequest() as stop:
            stop.request("asked")
            reasons.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reasons == ["asked"]


LOOP = """
import time
from archsmith.run.stop import StopRequest
with StopRequest(time_limit=60) as stop:
    print("ready", flush=True)
    while stop.reason is None:
        time.sleep(0.01)
    print("stopped by", stop.reason)
"""


def test_a_real_process_ends_its_loop_on_ctrl_c() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "stopped by Ctrl-C\n"), err
    assert "once more to stop at once" in err
