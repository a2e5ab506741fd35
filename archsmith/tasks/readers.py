"""Which reader serves which path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.cifar import batches_folder, read_batches
from archsmith.tasks.idx import idx_files, read_idx_folder
from archsmith.tasks.image_data import RawImages
from archsmith.tasks.npz import read_npy_folder, read_npz

_FORMS = (
    "an .npz file with x_train, y_train, x_test, y_test; or a folder with that file, with x_train.npy ..., "
    "with idx files (train-images-idx3-ubyte.gz ...), or with cifar-10-batches-py"
)


def existing_path(task: str, data: Any) -> Path:
    """Return ``data`` as a path that exists.

    Raises:
        UserError: None was given, or there is nothing at that path.
    """
    if data is None:
        raise UserError(
            "data",
            None,
            allowed=f"the path of the {task} data",
            hint=f"write data=PATH (on the command line --data PATH): {_FORMS}. archsmith never downloads on its own."
            if task != "images"
            else "write data=FOLDER (on the command line --data FOLDER) with one sub-folder of images per class.",
        )
    if not isinstance(data, str | Path):
        raise UserError(
            "data",
            Shown(type(data).__name__),
            allowed="a path; for arrays in memory use ImageClassification.from_arrays",
        )
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError("data", str(data), allowed="a path that exists", hint="check the spelling.")
    return path


def read_images(path: Path, *, name: str) -> RawImages:
    """Return what lies at ``path``, whichever of the known forms it has.

    Args:
        path: File or folder.
        name: Of the task; ``<name>.npz`` is preferred in a folder with several archives.

    Raises:
        UserError: No known form, or the file is damaged.
    """
    if path.is_file():
        if path.suffix != ".npz":
            raise UserError("data", str(path), allowed=_FORMS)
        return read_npz(path)
    if (path / "x_train.npy").is_file():
        return read_npy_folder(path)
    if batches := batches_folder(path):
        return read_batches(batches)
    if idx_files(path):
        return read_idx_folder(path)
    archives = sorted(path.glob("*.npz"))
    named = [p for p in archives if p.stem in (name, name.replace("-", "_"))] or archives
    if len(named) == 1:
        return read_npz(named[0])
    found = ", ".join(p.name for p in archives) if archives else "none of these"
    raise UserError("data", Shown(f"{path} with {found}"), allowed=_FORMS)
