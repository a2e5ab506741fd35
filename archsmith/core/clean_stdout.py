"""Standard output without the stray lines that a compiled library prints on its own."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_LOCK = threading.RLock()


@contextmanager
def without_lines(starts: Sequence[bytes]) -> Iterator[None]:
    """Drop lines from standard output that begin with one of ``starts``, whoever in this process writes them.

    File descriptor 1 goes to a temporary file meanwhile; everything else in it, other threads' output included, is
    written on afterwards in its order. One thread at a time is inside, others wait. A process that is forked meanwhile
    keeps the temporary file. Without an open descriptor 1 nothing happens.

    Args:
        starts: Beginnings of the lines to drop.
    """
    with _LOCK, tempfile.TemporaryFile() as kept:
        _flush()
        try:
            real = os.dup(1)
        except OSError:
            yield
            return
        try:
            os.dup2(kept.fileno(), 1)
            try:
                yield
            finally:
                _flush()
                os.dup2(real, 1)
                kept.seek(0)
                lines = kept.read().splitlines(keepends=True)
                rest = b"".join(line for line in lines if not line.startswith(tuple(starts)))
                while rest:
                    rest = rest[os.write(1, rest) :]
        finally:
            os.close(real)


def _flush() -> None:
    """Write out what the C library holds back: compiled code prints through its buffer, not Python's."""
    with suppress(OSError, AttributeError, TypeError):  # TypeError: no handle of the own process, as on Windows
        ctypes.CDLL(None).fflush(None)
