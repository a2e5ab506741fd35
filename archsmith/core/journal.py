"""The journal: an append-only file of JSON lines, the only truth about a run.

Each append is one ``write`` of whole lines followed by ``fsync``. A line torn by a crash can only be the last one: it
is recognised by its missing newline, ignored when reading, and cut off before the next append.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from archsmith.core.errors import ArchsmithError
from archsmith.core.files import sync_folder

Event = dict[str, Any]


class JournalError(ArchsmithError):
    """The journal is damaged in its middle, which no crash can explain."""


class Journal:
    """Append-only JSON lines with fsync per batch.

    Args:
        path: File of the journal; made on the first append when missing.

    Events are JSON objects. ``append`` returns only when they are on the disk. One process may append at a time (the
    run's lock sees to that); any number may read meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._clean = False

    def append(self, events: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Append one event or a batch; all of them are durable when this returns.

        Raises:
            ValueError: An event holds NaN or a value that JSON cannot express; nothing is written.
            TypeError: The same, for a value that is no JSON type.
            OSError: The disk is full or the file cannot be written; none of the batch is kept.
        """
        batch = [events] if isinstance(events, Mapping) else list(events)
        data = "".join(json.dumps(dict(e), ensure_ascii=False, allow_nan=False) + "\n" for e in batch).encode()
        created = not self.path.exists()
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if not self._clean:
                _cut_torn_line(handle)
                self._clean = True
            before = os.fstat(handle).st_size
            try:
                while data:
                    data = data[os.write(handle, data) :]
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, before)
                raise
        except BaseException as error:
            self._clean = False
            if isinstance(error, OSError):
                error.filename = str(self.path)  # a failed write names no file
            raise
        finally:
            os.close(handle)
        if created:
            sync_folder(self.path.parent)

    def read(self) -> list[Event]:
        """Return all complete events in order; a torn last line is left out.

        Raises:
            JournalError: A complete line is not a JSON object.
        """
        return list(self._events())

    def _events(self) -> Iterator[Event]:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
            try:
                event = json.loads(line)
            except ValueError as error:
                raise JournalError(
                    f"{self.path} line {number} is not JSON ({error}); the file was damaged from outside."
                ) from error
            if not isinstance(event, dict):
                raise JournalError(
                    f"{self.path} line {number} is not a JSON object; the file was damaged from outside."
                )
            yield event


def _cut_torn_line(handle: int) -> None:
    """Truncate the file behind its last newline."""
    size = os.fstat(handle).st_size
    end = size
    while end:
        start = max(0, end - 4096)
        piece = os.pread(handle, end - start, start)
        found = piece.rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        os.ftruncate(handle, end)
