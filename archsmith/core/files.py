"""Files that are either complete or not there.

Every file that archsmith writes goes to a temporary name in the same folder, is flushed to the disk, and is then
renamed over its final name. A crash, a full disk or a kill leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archsmith.core.errors import Shown, UserError

_PART = ".part"


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or all of the new one.

    Args:
        path: Final name; its folder must exist.
        data: Bytes, or text that is stored as UTF-8.

    Raises:
        OSError: The disk is full, the folder is missing or not writable; the old file is untouched.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_PART}")
    try:
        with open(part, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException as error:
        _remove_quietly(part)
        if isinstance(error, OSError) and error.errno is not None:  # it names the temporary file, or none at all
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def _remove_quietly(path: Path) -> None:
    """Delete a file if that is possible; the error that led here matters more than one made while tidying up."""
    try:
        path.unlink()
    except OSError:
        return


def remove_parts(folder: str | Path) -> list[Path]:
    """Delete what killed writers left half-written below ``folder`` and return the deleted paths, sorted.

    Call it only where no other process writes: a living writer's temporary file looks the same.
    """
    parts = sorted(Path(folder).rglob(f".*{_PART}"))
    for part in parts:
        part.unlink(missing_ok=True)
    return parts


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically; keys keep their order and NaN is refused."""
    write_atomic(path, to_json(value))


def to_json(value: Any) -> str:
    """Return the text that ``write_json`` stores; NaN and infinities raise ``ValueError``."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Return the JSON value stored at ``path``."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits, reading it in pieces of one MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space, then start the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then start the same command again"),
    errno.EFBIG: ("the file size limit is reached", "raise the limit (ulimit -f), then start the same command again"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose a path whose parents are folders"),
    errno.EEXIST: ("it is a file, not a folder", "choose another path"),
    errno.EISDIR: ("it is a folder, not a file", "choose another path"),
    errno.EACCES: ("no permission", "choose a folder that you may write to"),
    errno.EPERM: ("no permission", "choose a folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write to"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter path"),
}


@contextmanager
def storage_errors(field: str, path: str | Path, *, hint: str = "") -> Iterator[None]:
    """Turn an ``OSError`` of the block into one clear paragraph about ``path``.

    Args:
        field: What the user knows the path by, for example ``"out"``.
        path: The file or folder that the block writes.
        hint: Appended to the advice that fits the cause, for example what is still safe.

    Raises:
        UserError: The block raised an ``OSError``; the original is the cause.
    """
    try:
        yield
    except OSError as error:
        cause, advice = _CAUSES.get(error.errno or 0, (error.strerror or str(error), "check the path and the disk"))
        place = error.filename if isinstance(error.filename, str) else str(path)
        raise UserError(
            field,
            Shown(f"{place} ({cause})"),
            allowed="a place that can be written",
            hint=f"{advice[0].upper()}{advice[1:]}.{' ' + hint if hint else ''}",
        ) from error
