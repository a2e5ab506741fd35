"""Reader of the standard ``cifar-10-batches-py`` files, by an unpickler that makes byte arrays and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.image_data import RawImages

_FOLDER = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"


class _Type:
    """Stand-in for ``numpy.dtype``: remembers the name, ignores byte order and flags (bytes have none)."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stand-in for an array: remembers what it should be made of, and makes it only if that is an array of bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        _, shape, dtype, fortran, data = self.state
        of_bytes = isinstance(dtype, _Type) and dtype.name in ("u1", "|u1")
        if not of_bytes or not isinstance(data, str | bytes | bytearray):
            raise ValueError("an array that is not of plain bytes")
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Buffer(_Array):
    """Stand-in for the function that newer pickles make arrays with: (buffer, dtype, shape, order)."""

    def __init__(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        self.state = (1, shape, dtype, order != "C", data)


# numpy's own constructors are not let near a foreign pickle: their __setstate__ trusts the flags and sizes it is given.
# The names differ between numpy 1 and numpy 2.
_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the numpy array constructors to stand-ins; all else is refused before it is imported or called."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        # latin1 maps the byte strings of Python 2 one to one.
        super().__init__(stream, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise UserError(
                f"data file {self._path}",
                Shown(f"a pickle that asks for {module}.{name}; it was refused and nothing of it was run"),
                allowed="a CIFAR-10 batch, which holds arrays, lists and text only",
                hint="do not trust the source of this file.",
            )
        return _STAND_INS[module, name]


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images ``(N, 3, 32, 32)`` and labels ``(N,)`` of one pickled batch.

    Raises:
        UserError: The pickle asks for anything but arrays, is damaged, or does not hold a CIFAR-10 batch.
    """
    try:
        with open(path, "rb") as stream:
            content = _ArrayUnpickler(stream, path).load()
        found = content if isinstance(content, dict) else {}
        pixels, labels = found.get("data"), found.get("labels")
        pixels = pixels.array() if isinstance(pixels, _Array) else None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(
            f"data file {path}", Shown(f"{type(error).__name__}: {error}"), allowed="an undamaged CIFAR-10 batch"
        ) from error
    if (
        pixels is None
        or pixels.ndim != 2
        or pixels.shape[1] != 3072
        or not isinstance(labels, list)
        or not all(type(label) is int and 0 <= label < 10 for label in labels)
    ):
        raise UserError(
            f"data file {path}",
            Shown("a pickle without CIFAR-10 images"),
            allowed="a dictionary with 'data', bytes of shape (N, 3072), and 'labels', a list of numbers 0 to 9",
        )
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def batches_folder(folder: Path) -> Path | None:
    """Return where the pickled batches lie, ``folder`` itself or its ``cifar-10-batches-py``; None when nowhere."""
    return next((f for f in (folder, folder / _FOLDER) if (f / _TRAIN[0]).is_file()), None)


def read_batches(folder: Path) -> RawImages:
    """Return the training part (all five batches) and the test part.

    Raises:
        UserError: A batch is missing, or ``read_batch`` refused it.
    """
    missing = [name for name in (*_TRAIN, _TEST) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "data", Shown(f"{folder} without {', '.join(missing)}"), allowed="the folder with all six CIFAR-10 batches"
        )
    train = [read_batch(folder / name) for name in _TRAIN]
    joined = (np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train]))
    return RawImages({"train": joined, "test": read_batch(folder / _TEST)})
