"""Reader of MNIST-style idx files, plain or gzipped.

An idx file is four bytes (0, 0, type, number of axes), one big-endian 32-bit size per axis, then the values.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.image_data import RawImages

_UNSIGNED_BYTE = 8
_PART_WORDS = {"train": ("train",), "valid": ("valid", "val-"), "test": ("t10k", "test")}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an idx file of unsigned bytes.

    Only as many bytes are read as the header promises (and one more, to see that the file ends there).

    Raises:
        UserError: Not an idx file of bytes, truncated, too long, or a corrupt gzip stream.
    """
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else open(path, "rb")) as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE or not 1 <= head[3] <= 4:
                raise UserError(
                    f"data file {path}",
                    Shown(f"the first bytes {head.hex(' ')}"),
                    allowed="an idx file of unsigned bytes",
                )
            sizes = stream.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise UserError(f"data file {path}", Shown("a header that ends early"), allowed="a complete idx file")
            shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
            body = _read(stream, prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"data file {path}", Shown(f"{error}"), allowed="a readable idx file, plain or gzipped"
        ) from error
    if len(body) != prod(shape):
        found = f"{len(body)} of" if len(body) < prod(shape) else "more than"
        raise UserError(
            f"data file {path}",
            Shown(f"{found} the {prod(shape)} bytes that its header promises for {' x '.join(map(str, shape))}"),
            allowed="a complete idx file",
            hint="fetch the file again.",
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read(stream: IO[bytes], size: int) -> bytes:
    """Return up to ``size`` bytes; memory grows with what is there, not with what a header claims."""
    pieces: list[bytes] = []
    while size and (piece := stream.read(min(size, 1 << 20))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the idx files of a folder by (part, ``"images"`` or ``"labels"``), told by their names.

    Where a plain and a gzipped file of the same name lie side by side, the plain one is taken.

    Raises:
        UserError: Two files claim the same role.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and "ubyte" in p.name):
        kind = next((k for k in ("images", "labels") if k in path.name), None)
        part = next((part for part, words in _PART_WORDS.items() if any(w in path.name for w in words)), None)
        if kind is None or part is None:
            continue
        earlier = found.setdefault((part, kind), path)
        if earlier != path and earlier.name != path.name.removesuffix(".gz"):
            raise UserError(
                "data",
                Shown(f"{earlier.name} and {path.name} in {folder}"),
                allowed=f"one file with the {kind} of the {part} part",
                hint="move one of them into a folder of its own.",
            )
    return found


def read_idx_folder(folder: Path) -> RawImages:
    """Return the parts of a folder of idx files such as ``train-images-idx3-ubyte.gz``, ``t10k-labels-idx1-ubyte``.

    Raises:
        UserError: A file of a pair is missing, or one is damaged.
    """
    files = idx_files(folder)
    parts: dict[str, Any] = {}
    for part in sorted({part for part, _ in files}, key=list(_PART_WORDS).index):
        for kind in ("images", "labels"):
            if (part, kind) not in files:
                raise UserError(
                    "data",
                    Shown(f"no {kind} file of the {part} part in {folder}"),
                    allowed="images and labels of each part",
                )
        parts[part] = (read_idx(files[part, "images"]), read_idx(files[part, "labels"]))
    return RawImages(parts)
