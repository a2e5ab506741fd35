import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsmith.core.journal import Event, Journal, JournalError

EVENTS: list[Event] = [
    {"kind": "a", "n": 1},
    {"kind": "b", "text": "line\nbreak\u2028 é"},
    {"kind": "c", "deep": {"x": [1.5, None]}},
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def test_events_come_back_in_order(path: Path) -> None:
    assert Journal(path).read() == []
    journal = Journal(path)
    journal.append(EVENTS[0])
    journal.append(EVENTS[1:])
    assert journal.read() == Journal(path).read() == EVENTS
    assert path.read_bytes().count(b"\n") == 3


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_json_event_round_trips(tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, object]]) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal") / "j")
    journal.append(events)
    assert journal.read() == events


def test_any_torn_end_is_ignored_by_readers_and_cut_by_the_next_append(path: Path) -> None:
    Journal(path).append(EVENTS)
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = EVENTS[: sum(end <= size for end in ends)]
        assert Journal(path).read() == kept
        Journal(path).append({"kind": "next"})
        assert Journal(path).read() == [*kept, {"kind": "next"}]


def test_a_torn_line_longer_than_the_search_window_is_cut(path: Path) -> None:
    Journal(path).append(EVENTS[0])
    with open(path, "ab") as stream:
        stream.write(b"x" * 10_000)
    Journal(path).append(EVENTS[1])
    assert Journal(path).read() == EVENTS[:2]


@pytest.mark.parametrize(
    ("bad", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ({1, 2}, TypeError), (b"x", TypeError)]
)
def test_what_json_cannot_express_leaves_the_journal_alone(path: Path, bad: object, error: type[Exception]) -> None:
    journal = Journal(path)
    journal.append(EVENTS[0])
    with pytest.raises(error, match="JSON"):
        journal.append([EVENTS[1], {"kind": "bad", "value": bad}])
    assert journal.read() == EVENTS[:1]


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_failed_append_keeps_nothing_of_its_batch(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    journal = Journal(path)
    journal.append(EVENTS[0])
    before = path.read_bytes()
    write = os.write
    calls = 0

    def full_disk(handle: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[: len(json.dumps(EVENTS[1])) + 5])  # a whole first line and a piece of the second

    def failing_sync(handle: int) -> None:
        raise OSError(errno.EIO, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk if step == "write" else failing_sync)
        with pytest.raises(OSError, match=r"No space left on device: '.*journal\.jsonl'$"):
            journal.append(EVENTS[1:])
    assert path.read_bytes() == before
    journal.append(EVENTS[2])
    assert journal.read() == [EVENTS[0], EVENTS[2]]


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    Journal(path).append(EVENTS)
    assert Journal(path).read() == EVENTS


def test_every_batch_is_synchronised_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    journal.append(EVENTS[0])
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    journal.append(EVENTS[1:])
    assert sizes == [path.stat().st_size]


@pytest.mark.parametrize(
    ("line", "what"), [(b"{broken", "is not JSON"), (b"[1]", "is not a JSON object"), (b"", "is not JSON")]
)
def test_damage_in_the_middle_is_an_error_that_names_the_line(path: Path, line: bytes, what: str) -> None:
    Journal(path).append(EVENTS[:2])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    with pytest.raises(JournalError, match=rf"journal\.jsonl line 2 {what}"):
        Journal(path).read()
