"""Stores of trained weights, addressed by their content: in a folder that processes share, or in memory.

The key is the SHA-256 of the canonical content: for each tensor, in the order of their names, the name, the type, the
shape and the bytes of its values in C order. Equal tensors have the same key in every process and store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import storage_errors, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"[0-9a-f]{64}")


def content_key(tensors: Mapping[str, Tensor]) -> str:
    """Return the key of tensors: 64 hexadecimal digits that depend on names, types, shapes and values only."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _plain(tensors[name])
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class MemoryWeightStore:
    """Keeps copies of the weights in this process.

    Example:
        >>> store = MemoryWeightStore()
        >>> key = store.put({"w": torch.ones(2)})
        >>> store.get(key)["w"].tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep a copy of the tensors and return their key."""
        key = content_key(tensors)
        if key not in self._kept:
            self._kept[key] = {name: _plain(tensor).clone() for name, tensor in tensors.items()}
        return key

    def get(self, key: str) -> dict[str, Tensor]:
        """Return a copy of the tensors of a key.

        Raises:
            KeyError: Nothing is kept under it.
        """
        return {name: tensor.clone() for name, tensor in self._kept[key].items()}


class FolderWeightStore:
    """Keeps weights as ``<key>.safetensors`` in a folder; any number of processes may share it.

    A file is complete or not there. It pickles as the path of its folder.

    Args:
        folder: Made when the first weights are kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(_KEY.fullmatch(key)) and self._path(key).is_file()

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Write the tensors, unless they are there already, and return their key.

        Raises:
            UserError: The folder cannot be written.
        """
        key = content_key(tensors)
        if key not in self:
            with storage_errors("weights", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                # Clones, because the format has no shared memory (tied weights).
                write_atomic(self._path(key), save({name: _plain(t).clone() for name, t in tensors.items()}))
        return key

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of a key.

        Raises:
            KeyError: Nothing is kept under it.
            UserError: The file is damaged: its content has another key.
        """
        if key not in self:
            raise KeyError(key)
        try:
            tensors = load(self._path(key).read_bytes())
            intact = content_key(tensors) == key
        except Exception as error:  # safetensors has an error of its own for broken files, not exported as a class
            raise self._damaged(key) from error
        if not intact:
            raise self._damaged(key)
        return tensors

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _damaged(self, key: str) -> UserError:
        return UserError(
            "weights",
            Shown(f"{self._path(key)}, whose content is not what its name says"),
            allowed="files as they were written",
            hint="Delete the file; the trial trains from the start then.",
        )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()
