"""One living process per run: a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from archsmith.core.errors import Shown, UserError


class RunLock:
    """An ``flock`` on a file that holds the owner's process id and host, for the message to a second process.

    The kernel drops the lock when its process ends, however it ends; the file stays, because deleting it would let two
    processes lock two files of the same name. Network file systems without ``flock`` are not covered.

    Args:
        path: File of the lock; made when missing, its folder must exist.

    Raises:
        UserError: Another process (or another opening in this one) holds the lock.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._handle, 1000, 0).decode(errors="replace").strip() or "a process that just started"
            os.close(self._handle)
            raise UserError(
                "out",
                Shown(f"{path.parent}, which is in use by {holder}"),
                allowed="a run that no living process works on",
                hint="Wait for that process or stop it, or choose another folder.",
            ) from None
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(self._handle)
            raise

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
