"""Small made-up image sets, and files of every form that the readers know."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
from PIL import Image


def random_images(n: int, shape: tuple[int, ...], *, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random bytes (n, *shape) and labels that take turns."""
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, np.arange(n) % classes


def write_idx(path: Path, array: np.ndarray, *, promise: tuple[int, ...] | None = None) -> Path:
    """Write an idx file of bytes, gzipped when the name says so; ``promise`` puts another shape into the header."""
    shape = array.shape if promise is None else promise
    data = bytes([0, 0, 8, len(shape)]) + b"".join(s.to_bytes(4, "big") for s in shape) + array.astype("u1").tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def write_idx_folder(folder: Path, *, side: int = 28, classes: int = 10, suffix: str = ".gz") -> Path:
    """Write the four files of an MNIST-like set with 8 training and 3 test images per class."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count, seed in (("train", 8 * classes, 0), ("t10k", 3 * classes, 1)):
        images, labels = random_images(count, (side, side), classes=classes, seed=seed)
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", labels)
    return folder


def cifar_arrays() -> dict[str, np.ndarray]:
    """Return random arrays of CIFAR-10's shape: 100 training and 20 test images."""
    x_train, y_train = random_images(100, (3, 32, 32), classes=10, seed=2)
    x_test, y_test = random_images(20, (3, 32, 32), classes=10, seed=3)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def write_cifar_batches(folder: Path) -> Path:
    """Write ``cifar_arrays`` in the form of the standard python batches."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = cifar_arrays()
    pieces = [(f"data_batch_{i + 1}", slice(20 * i, 20 * i + 20), "train") for i in range(5)]
    for name, rows, part in [*pieces, ("test_batch", slice(None), "test")]:
        write_pickle(
            folder / name,
            {
                "data": arrays[f"x_{part}"][rows].reshape(-1, 3072),
                "labels": arrays[f"y_{part}"][rows].tolist(),
                "batch_label": name,
                "filenames": ["a.png"],
            },
        )
    return folder


def write_pickle(path: Path, value: object) -> Path:
    """Pickle a value with protocol 2 and byte strings as Python 2 wrote them."""
    path.write_bytes(python2_pickle(value))
    return path


def python2_pickle(value: object) -> bytes:
    """Return the pickle of a dictionary in the opcodes of the published batches.

    Python 3 writes an array's bytes in protocol 2 as a call of ``_codecs.encode``; Python 2 wrote a plain string. The
    arrays are therefore put together by hand here.
    """
    body = b"\x80\x02}("
    assert isinstance(value, dict)
    for key, entry in value.items():
        body += _text(key.encode())
        if isinstance(entry, np.ndarray):
            body += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"tR(K\x01"
            body += _int(entry.shape[0]) + _int(entry.shape[1]) + b"\x86"
            body += b"cnumpy\ndtype\n(" + _text(b"u1") + b"K\x00K\x01tR"
            body += b"(K\x03" + _text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            body += b"\x89" + _text(entry.tobytes()) + b"tb"
        else:
            body += pickle.dumps(entry, protocol=2)[2:-1]
    return body + b"u."


def _text(value: bytes) -> bytes:
    return b"T" + len(value).to_bytes(4, "little") + value


def _int(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little")


def write_image_folder(folder: Path, *, per_class: int = 10, parts: tuple[str, ...] = (), colour: bool = True) -> Path:
    """Write PNG files of two classes, below ``parts`` when given."""
    random = np.random.default_rng(4)
    for part in parts or (".",):
        for name in ("cat", "dog"):
            target = folder / part / name
            target.mkdir(parents=True)
            for number in range(per_class):
                pixels = random.integers(0, 256, (8, 10, 3) if colour else (8, 10), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{number:02}.png")
    return folder
