"""CIFAR-10 packed in two files of at most 50 MiB each, for machines that take only small files; and unpacked again.

Each half holds every second image of both parts. Images are stored as the planes (G, R - G, B - G), differenced along
both axes modulo 256, then compressed by LZMA: about 1,700 bytes an image instead of 3,072, without loss.

Pack:   ``make gpu-data DATA=cifar10.npz`` or ``python benchmarks/evidence/gpu_data.py pack cifar10.npz data/gpu``
Unpack: ``python benchmarks/evidence/gpu_data.py unpack data/gpu cifar10.npz``

The npz holds x_train, y_train, x_test, y_test: bytes, images (N, 3, 32, 32) or (N, 32, 32, 3). The packed files are
research data: keep them out of the repository (``data/`` is ignored).
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LIMIT = 50 * 2**20
PARTS = ("train", "test")
NAMES = ("cifar10-half-1.npz", "cifar10-half-2.npz")

Bytes = NDArray[np.uint8]


def encoded(images: Bytes) -> bytes:
    """Return images (N, 3, H, W) in compressed form."""
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    planes = np.stack([green, red - green, blue - green])  # bytes wrap around, and back
    for axis in (2, 3):
        planes = np.diff(planes, axis=axis, prepend=np.uint8(0))
    return lzma.compress(planes.tobytes())


def decoded(content: bytes, shape: tuple[int, ...]) -> Bytes:
    """Return the images (N, 3, H, W) that ``encoded`` was given."""
    n, _, height, width = shape
    planes = np.frombuffer(lzma.decompress(content), np.uint8).reshape(3, n, height, width)
    planes = planes.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    return np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1)


def pack(source: Path, folder: Path, limit: int = LIMIT) -> list[Path]:
    """Write both halves of an npz into ``folder``; nothing is written when one of them would be above ``limit`` bytes.

    Raises:
        SystemExit: The arrays are not as they should be, or a half is too large.
    """
    with np.load(source, allow_pickle=False) as archive:
        missing = [f"{kind}_{part}" for part in PARTS for kind in "xy" if f"{kind}_{part}" not in archive.files]
        if missing:
            raise SystemExit(f"{source}: no {', '.join(missing)}; x_train, y_train, x_test and y_test are needed.")
        arrays = {name: archive[name] for part in PARTS for name in (f"x_{part}", f"y_{part}")}
    halves: list[dict[str, NDArray[np.generic]]] = [{}, {}]
    for part in PARTS:
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.uint8).reshape(-1)
        if images.ndim == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
            images = np.moveaxis(images, 3, 1)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(labels):
            raise SystemExit(f"{source}: x_{part} is {images.dtype} {images.shape}; allowed: bytes (N, 3, H, W).")
        for start, half in enumerate(halves):
            own = np.ascontiguousarray(images[start::2])
            half[f"x_{part}"] = np.frombuffer(encoded(own), np.uint8)
            half[f"shape_{part}"] = np.array(own.shape)
            half[f"y_{part}"] = labels[start::2]
    sizes = [sum(array.nbytes for array in half.values()) + 4096 for half in halves]  # headers of the archive
    if max(sizes) > limit:
        raise SystemExit(f"{source}: a half takes {max(sizes):,} bytes; allowed: {limit:,}.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in NAMES]
    for path, half in zip(paths, halves, strict=True):
        np.savez(path, **half)  # type: ignore[arg-type]
    return paths


def unpack(folder: Path, target: Path) -> None:
    """Join both halves of ``folder`` into one npz as ``pack`` took it.

    Raises:
        SystemExit: A half is missing.
    """
    if missing := [name for name in NAMES if not (folder / name).exists()]:
        raise SystemExit(f"{folder}: {' and '.join(missing)} missing; make gpu-data DATA=<npz> writes them.")
    halves = [np.load(folder / name, allow_pickle=False) for name in NAMES]
    joined = {}
    for part in PARTS:
        images = [decoded(half[f"x_{part}"].tobytes(), tuple(half[f"shape_{part}"])) for half in halves]
        labels = [half[f"y_{part}"] for half in halves]
        for kind, pieces in (("x", images), ("y", labels)):
            whole = np.empty((sum(map(len, pieces)), *pieces[0].shape[1:]), np.uint8)
            whole[0::2], whole[1::2] = pieces
            joined[f"{kind}_{part}"] = whole
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **joined)


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("data", type=Path)
    packing.add_argument("folder", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("data", type=Path)
    given = parser.parse_args()
    if given.command == "unpack":
        unpack(given.folder, given.data)
        print(given.data)
        return
    for path in pack(given.data, given.folder):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
