"""Reader of numpy files: one ``.npz``, or a folder of ``.npy`` files; never a pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.image_data import RawImages

_PARTS = ("train", "valid", "test")
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)


def read_npz(path: Path) -> RawImages:
    """Return the parts of an ``.npz`` with x_train, y_train and maybe x_valid, y_valid, x_test, y_test, class_names.

    Raises:
        UserError: Not an npz, damaged, an array is missing, or one holds Python objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"data file {path}", Shown("a single array"), allowed="an .npz archive of named arrays")
        with archive:
            return _parts(path, archive.files, archive.__getitem__)
    except UserError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def read_npy_folder(folder: Path) -> RawImages:
    """Return the parts of a folder with ``x_train.npy``, ``y_train.npy`` and so on, the names as in ``read_npz``.

    Raises:
        UserError: As ``read_npz``.
    """

    def load(key: str) -> Any:
        path = folder / f"{key}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    return _parts(folder, [p.stem for p in folder.glob("*.npy")], load)


def _parts(source: Path, keys: Collection[str], load: Callable[[str], Any]) -> RawImages:
    parts = {}
    for part in _PARTS:
        pair = [f"x_{part}", f"y_{part}"]
        if part != "train" and not any(key in keys for key in pair):
            continue
        for key in pair:
            if key not in keys:
                raise UserError(
                    f"data {source}",
                    Shown(f"no array {key!r} among {', '.join(sorted(keys)) or 'no arrays'}"),
                    allowed="x_train and y_train, and for valid and test both or none",
                )
        parts[part] = (load(pair[0]), load(pair[1]))
    names = tuple(str(name) for name in np.atleast_1d(load("class_names"))) if "class_names" in keys else None
    return RawImages(parts, names)


def _damaged(path: Path, error: BaseException) -> UserError:
    if "pickle" in str(error):
        return UserError(
            f"data file {path}",
            Shown("Python objects (a pickle)"),
            allowed="plain arrays of numbers; archsmith never unpickles data",
            hint="save the arrays with a numeric dtype.",
        )
    reason = str(error) or type(error).__name__
    return UserError(
        f"data file {path}", Shown(reason), allowed="an undamaged numpy file", hint="fetch the file again."
    )
