"""Reader of folders of images, one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.image_data import RawImages

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_PART_FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def read_folder(folder: Path, *, resolution: int | None = None, resample: str = "auto") -> RawImages:
    """Read ``folder/train/<class>/*.png`` (and valid or val, test), or ``folder/<class>/*.png``.

    Images are read in the order of their names. They become grey, ``(N, 1, H, W)``, if every one is grey, else RGB;
    transparency is dropped. Everything is decoded into memory.

    Args:
        folder: Where to read.
        resolution: Scale the shorter side to this and cut the centre out, which allows images of different sizes.
        resample: ``"area"``, ``"bilinear"``, or ``"auto"``: area when shrinking, bilinear when growing.

    Raises:
        UserError: No classes, a class without images, a corrupt image (named), or different sizes without
            ``resolution``.
    """
    roots = {
        part: next((folder / n for n in names if (folder / n).is_dir()), None) for part, names in _PART_FOLDERS.items()
    }
    if roots["train"] is None:
        roots = {"train": folder}
    classes = _class_folders(roots["train"] or folder)
    decoded: dict[str, tuple[list[NDArray[np.uint8]], list[int]]] = {}
    first: tuple[Path, tuple[int, ...]] | None = None
    grey = True
    for part, root in roots.items():
        if root is None:
            continue
        strangers = [c for c in _class_folders(root) if c not in classes]
        if strangers:
            raise UserError(
                "data",
                Shown(f"the class {strangers[0]!r} in {root}"),
                allowed=f"classes of the training part: {', '.join(classes)}",
            )
        images, labels = decoded.setdefault(part, ([], []))
        for label, name in enumerate(classes):
            for path in _images(root / name, needed=part == "train"):
                image, is_grey = _decoded(path, resolution, resample)
                first = first or (path, image.shape)
                if image.shape != first[1]:
                    raise UserError(
                        f"image {path}",
                        Shown(f"{image.shape[2]}x{image.shape[1]} pixels"),
                        allowed=f"{first[1][2]}x{first[1][1]} like {first[0].name}, when no resolution is given",
                        hint="add the option resolution=<pixels> to bring all images to one size.",
                    )
                grey = grey and is_grey
                images.append(image)
                labels.append(label)
        if not images:
            raise UserError("data", Shown(f"no image in {root}"), allowed="at least one image per part")
    parts = {
        part: (np.stack([x[:1] for x in images] if grey else images), np.array(labels, np.int64))
        for part, (images, labels) in decoded.items()
    }
    return RawImages(parts, tuple(classes))


def _class_folders(root: Path) -> list[str]:
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(
            "data", Shown(f"{root} without sub-folders"), allowed="a folder with one sub-folder of images per class"
        )
    return names


def _images(folder: Path, *, needed: bool) -> list[Path]:
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
    if needed and not paths:
        raise UserError(
            "data", Shown(f"no image in {folder}"), allowed=f"images ({', '.join(_SUFFIXES)}) in every class folder"
        )
    return paths


def _decoded(path: Path, resolution: int | None, resample: str) -> tuple[NDArray[np.uint8], bool]:
    """Return one image as RGB ``(3, H, W)`` and whether it is grey."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode not in (*_GREY, *_COLOUR):
                raise UserError(
                    f"image {path}", Shown(f"mode {image.mode}"), allowed="8-bit grey, palette or colour images"
                )
            grey = image.mode in _GREY
            picture: Any = image.convert("RGB")
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path}", Shown(str(error)), allowed="an undamaged image file") from error
    if resolution is not None:
        shrinking = min(picture.size) >= resolution
        area = resample == "area" or (resample == "auto" and shrinking)
        method = Image.Resampling.BOX if area else Image.Resampling.BILINEAR
        picture = ImageOps.fit(picture, (resolution, resolution), method)
    return np.asarray(picture, np.uint8).transpose(2, 0, 1), grey
