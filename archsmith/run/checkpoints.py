"""Checkpoints: tensors and JSON state in one safetensors file each, verified before they are trusted.

A file's name and SHA-256 go to the journal after the file is complete on the disk, and a file counts only once it is
recorded. So a kill at any moment leaves the previous checkpoint or the new one, and a file damaged later is noticed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import sha256_of, storage_errors, write_atomic
from archsmith.core.protocols import Logger

_FORMAT_VERSION = 1
_METADATA_KEY = "archsmith.checkpoint"


class Checkpoint(NamedTuple):
    """What ``load_latest`` and ``load_best`` return.

    Attributes:
        tensors: On the CPU, bit for bit and in the order saved; no two share memory.
        state: The JSON state (tuples come back as lists).
        notes: Sentences for the user about files that had to be passed over; empty when all is well.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    notes: list[str]


class CheckpointStore:
    """Saves checkpoints into a folder, keeps the last few and the best, and loads the newest that is sound.

    Args:
        folder: Where the files go; made on the first save. ``RUN/checkpoints`` in a run.
        journal: Takes the events ``checkpoint`` and ``checkpoint_rejected``; a ``Run``.
        keep: How many of the newest to keep, at least 1; 2 survive the corruption of one.
    """

    def __init__(self, folder: str | Path, journal: Logger, *, keep: int = 2) -> None:
        if keep < 1:
            raise UserError("keep", keep, allowed="1 or more")
        self.folder = Path(folder)
        self.keep = keep
        self._journal = journal

    def save(
        self, step_name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, best: bool = False
    ) -> Path:
        """Save one checkpoint; it is safe on the disk and recorded when this returns.

        Args:
            step_name: Where training stands, for example ``"epoch-0003"``: letters, digits, ``.``, ``_`` and ``-``. A
                name may come again when a resumed run replays a step.
            tensors: Any dense tensors on any device. Tensors that share memory are saved as separate copies.
            state: JSON values with text keys: counters, schedule, random seeds.
            best: Keep this one until another best is saved, however old it gets.

        Returns:
            Path of the file.

        Raises:
            UserError: The disk is full or the folder cannot be written; earlier checkpoints are kept.
            ValueError: ``step_name`` or ``state`` is not as described; nothing is written.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", step_name):
            raise ValueError(f"step_name must be letters, digits, '.', '_' and '-', got {step_name!r}")
        data = _to_bytes(tensors, state)
        sha256 = sha256_of(data)
        path = self.folder / f"{step_name}.{sha256[:12]}.safetensors"  # a replayed step never overwrites another file
        kept = self._sound_entries()
        hint = f"The last good checkpoint, {kept[-1]['file']}, is kept." if kept else "There is no earlier checkpoint."
        with storage_errors("checkpoint", path, hint=hint):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        self._journal.record("checkpoint", step=step_name, file=path.name, sha256=sha256, bytes=len(data), best=best)
        self._remove_old()
        return path

    def load_latest(self) -> Checkpoint | None:
        """Return the newest sound checkpoint, or None when none was ever saved.

        A file that is missing, truncated or changed is recorded as rejected, described in the notes, and passed over
        for the one before it.

        Raises:
            UserError: Checkpoints were saved and none of them is sound.
        """
        return self._load(reversed(self._sound_entries()))

    def load_best(self) -> Checkpoint | None:
        """Return the checkpoint last saved with ``best=True``, or None when there was none.

        Raises:
            UserError: The file is missing, truncated or changed.
        """
        return self._load(reversed([entry for entry in self._sound_entries() if entry["best"]][-1:]))

    def _load(self, newest_first: Iterable[Mapping[str, Any]]) -> Checkpoint | None:
        problems: list[str] = []
        wanted = self._retained()
        for entry in newest_first:
            name = entry["file"]
            path = self.folder / name
            if name not in wanted and not path.exists():
                continue  # removed by us
            try:
                tensors, state = _from_bytes(path.read_bytes(), entry["sha256"])
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
                problems.append(f"checkpoint {path} cannot be used: {reason.rstrip('.')}")
                self._journal.record("checkpoint_rejected", file=name, sha256=entry["sha256"], reason=reason)
                continue
            return Checkpoint(tensors, state, [f"{problem}; {name} was used instead." for problem in problems])
        if problems:
            raise UserError(
                "checkpoint",
                Shown(f"{self.folder} without a sound file ({'; '.join(problems)})"),
                allowed="at least one checkpoint as it was saved",
                hint="Restore one from a copy, or start again in another folder.",
            )
        return None

    def _sound_entries(self) -> list[dict[str, Any]]:
        """Return the recorded saves, oldest first, one per file, without those rejected since."""
        entries: dict[str, dict[str, Any]] = {}
        for event in self._journal.events():
            if event["kind"] == "checkpoint":
                entries.pop(event["file"], None)  # saved again after a replay: it moves to the end
                entries[event["file"]] = event
            elif event["kind"] == "checkpoint_rejected":
                entries.pop(event["file"], None)
        return list(entries.values())

    def _retained(self) -> set[str]:
        """Names of the files that must be there: the last ``keep`` and the best."""
        entries = self._sound_entries()
        best = [entry for entry in entries if entry["best"]]
        return {entry["file"] for entry in entries[-self.keep :] + best[-1:]}

    def _remove_old(self) -> None:
        """Delete every checkpoint file that is not retained, unrecorded ones of killed processes included."""
        retained = self._retained()
        for path in self.folder.glob("*.safetensors"):
            if path.name not in retained:
                path.unlink(missing_ok=True)


def check_disk_space(folder: str | Path, bytes_needed: int) -> None:
    """Refuse to start when the disk of ``folder`` has less room than is going to be needed.

    Args:
        folder: Where files will go; it need not exist yet.
        bytes_needed: Estimate of everything that will be there at the same time, in bytes. For checkpoints: size of one
            times (``keep`` + 2), for the best one and the one being written.

    Raises:
        UserError: Too little is free; nothing was written.
    """
    place = Path(folder).absolute()
    with storage_errors("out", folder):
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise UserError(
            "out",
            Shown(f"{folder} with {free / 2**20:,.0f} MiB free"),
            allowed=f"a disk with at least {bytes_needed / 2**20:,.0f} MiB free",
            hint="Free some space or choose a folder on another disk; nothing was written.",
        )


def _to_bytes(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> bytes:
    """Return a safetensors file with the state as JSON in its metadata."""
    _require_text_keys(state, "state")
    # The format sorts tensors by type and name, hence the names. It writes several metadata keys in random order, hence
    # one key: equal checkpoints are equal files.
    content = {"format_version": _FORMAT_VERSION, "names": list(tensors), "state": dict(state)}
    metadata = {_METADATA_KEY: json.dumps(content, allow_nan=False)}
    data: bytes = safetensors.torch.save(_separate(tensors), metadata)
    return data


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share a storage; safetensors refuses anything else."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _require_text_keys(value: Any, path: str) -> None:
    """JSON would turn number keys (as in an optimiser's ``state_dict``) into text without a word."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path} must have text keys, got {key!r}; use str(key), and int(key) when loading")
            _require_text_keys(inner, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _require_text_keys(inner, f"{path}[{index}]")


def _from_bytes(data: bytes, sha256: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and state of a file whose digest is the recorded one.

    Raises:
        ValueError: The digest differs or the version is a newer one.
        SafetensorError: The header is not one of safetensors.
    """
    if sha256_of(data) != sha256:
        raise ValueError(f"its content ({len(data)} bytes) is not what was saved, the SHA-256 differs")
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = json.loads(header["__metadata__"][_METADATA_KEY])
    if content["format_version"] > _FORMAT_VERSION:
        raise ValueError(f"it has format version {content['format_version']}, the newest known is {_FORMAT_VERSION}")
    return {name: tensors[name] for name in content["names"]}, content["state"]
