"""What goes in and out of every layer of a parent, written to disk once: the data that blocks are trained on alone.

One safetensors file for each batch holds every tensor once (the output of a layer is the input of the next, a mask is
shared by all) and, in its metadata, how they make up the call of each layer. The parent runs once over the data; after
that a block needs two tensors of each batch, and neither the parent nor its neighbours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import read_json, storage_errors, write_atomic, write_json
from archsmith.families.slot_statistics import run_batch

FORMAT_VERSION = 1

Batch = Any
"""What a model is called with: keywords of a mapping, positions of a tuple, or one tensor."""


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer.

    Attributes:
        args: Positional arguments; the first is the hidden state, unless it came as a keyword.
        kwargs: Keyword arguments; objects that are no plain values (a key-value cache) became None.
        output: The hidden state that it returned.
        returned: Length of the tuple that it came in; 0 when it came alone.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    returned: int = 0

    @property
    def hidden(self) -> Tensor:
        """The hidden state that went in."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def token_mask(batch: Batch) -> Tensor | None:
    """Return which tokens (B, T) of a batch count: its ``attention_mask``, or None."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state that a layer returned, alone or first of a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


@contextmanager
def recorded(model: nn.Module, layer_paths: Sequence[str]) -> Iterator[dict[int, LayerCall]]:
    """Record the last call of every layer while the block runs; tensors are kept as they are, without copies."""
    calls: dict[int, LayerCall] = {}

    def hook(index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            length = len(output) if isinstance(output, tuple | list) else 0
            calls[index] = LayerCall(args, dict(kwargs), hidden_of(output), length)

        return after

    handles = [
        model.get_submodule(path).register_forward_hook(hook(index), with_kwargs=True)
        for index, path in enumerate(layer_paths)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class ActivationCache:
    """The calls of every layer on a sequence of batches, on disk.

    Args:
        folder: Folder that ``build`` filled.

    Attributes:
        count: Number of batches.
        layers: Number of layers.
        bytes: Size on the disk.

    Raises:
        UserError: No complete cache is there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise UserError("activations", str(folder), allowed="a folder that ActivationCache.build filled to the end")
        facts = read_json(index)
        self.count, self.layers, self.bytes = int(facts["batches"]), int(facts["layers"]), int(facts["bytes"])

    @classmethod
    def build(
        cls,
        parent: nn.Module,
        layer_paths: Sequence[str],
        batches: Sequence[Batch],
        folder: str | Path,
        *,
        key: str = "",
        free_bytes: Callable[[Path], int] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ActivationCache | None:
        """Run the parent over the batches and keep what its layers saw; batches that are there already are skipped.

        Args:
            parent: The model, in evaluation mode.
            layer_paths: Module path of every layer, in order.
            batches: What the parent is called with.
            folder: Where the files go.
            key: Digest of parent and data: a folder that was filled for another is refused.
            free_bytes: Bytes that may be written below a folder; by default what the disk has free.
            should_stop: Asked between batches.

        Returns:
            The cache, or None when it was asked to stop before the end.

        Raises:
            UserError: It needs more space than is free (said before anything is written), activations that are not
                finite, a layer that was not called, or a folder of another parent or other data.
        """
        folder = Path(folder)
        mark = folder / "key.json"
        if mark.is_file() and read_json(mark) != {"format_version": FORMAT_VERSION, "key": key}:
            raise UserError(
                "activations",
                Shown(f"{folder}, which holds those of another model or other data"),
                allowed="a new or empty folder, or one of the same model and data",
            )
        if (folder / "index.json").is_file():
            return cls(folder)
        if not batches:
            raise UserError("batches", 0, allowed="at least one batch")
        missing = [number for number in range(len(batches)) if not _file(folder, number).is_file()]
        written = 0
        for turn, number in enumerate(missing):
            if should_stop():
                return None
            tensors, spec = _packed(parent, layer_paths, batches[number], number)
            data = save(tensors, {"spec": json.dumps(spec)})
            if turn == 0:
                _check_room(folder, len(data), number, missing, batches, free_bytes)
                with storage_errors("activations", folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(mark, {"format_version": FORMAT_VERSION, "key": key})
            with storage_errors("activations", folder):
                write_atomic(_file(folder, number), data)
            written += len(data)
        size = sum(_file(folder, number).stat().st_size for number in range(len(batches)))
        facts = {"batches": len(batches), "layers": len(layer_paths), "bytes": size}
        with storage_errors("activations", folder):
            write_json(folder / "index.json", facts)
        return cls(folder)

    def call(self, batch: int, layer: int) -> LayerCall:
        """Return what went into a layer at a batch and what came out."""
        with safe_open(_file(self.folder, batch), framework="pt") as file:
            spec = json.loads(file.metadata()["spec"])
            read = _Reader(file.get_tensor)
            row = spec["layers"][layer]
            kwargs = {name: read(value) for name, value in row["kwargs"].items()}
            return LayerCall(tuple(read(value) for value in row["args"]), kwargs, read(row["output"]), row["returned"])

    def batch(self, batch: int) -> Batch:
        """Return what the model was called with."""
        with safe_open(_file(self.folder, batch), framework="pt") as file:
            return _Reader(file.get_tensor)(json.loads(file.metadata()["spec"])["batch"])

    def mask(self, batch: int) -> Tensor | None:
        """Return the tokens (B, T) of a batch that count, or None."""
        return token_mask(self.batch(batch))


def _file(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:05d}.safetensors"


def _packed(
    parent: nn.Module, layer_paths: Sequence[str], batch: Batch, number: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of one batch's calls, each once, and the specification that puts them together."""
    with torch.no_grad(), recorded(parent, layer_paths) as calls:
        run_batch(parent, batch)
    if missing := [path for index, path in enumerate(layer_paths) if index not in calls]:
        raise UserError("layers", missing[:3], allowed="layers that a call of the model runs through")
    write = _Writer()
    rows = []
    for index in range(len(layer_paths)):
        call = calls[index]
        if not bool(torch.isfinite(call.output).all()):
            raise UserError(
                "parent",
                Shown(f"NaN or infinite output of {layer_paths[index]} at batch {number}"),
                allowed="a parent whose activations are finite",
                hint="Every child would learn them: check its weights, its precision and the data.",
            )
        rows.append(
            {
                "args": [write(value) for value in call.args],
                "kwargs": {name: write(value) for name, value in call.kwargs.items()},
                "output": write(call.output),
                "returned": call.returned,
            }
        )
    return write.tensors, {"layers": rows, "batch": write(batch)}


class _Writer:
    """Turns values into JSON and collects their tensors, one name for each."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id is only a name while its tensor lives

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self._names[id(value)] = name = str(len(self._names))
                self._alive.append(value)
                self.tensors[name] = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            return {"tensor": self._names[id(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, tuple | list):
            return {"tuple": [self(item) for item in value]}
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {"mapping": {name: self(item) for name, item in value.items()}}
        return {"value": None, "left_out": type(value).__name__}  # a key-value cache: blocks are trained without


class _Reader:
    """Turns what ``_Writer`` wrote back into values."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        self._tensor = tensor

    def __call__(self, written: Mapping[str, Any]) -> Any:
        if "tensor" in written:
            return self._tensor(written["tensor"])
        if "tuple" in written:
            return tuple(self(item) for item in written["tuple"])
        if "mapping" in written:
            return {name: self(item) for name, item in written["mapping"].items()}
        return written["value"]


def _size(batch: Batch) -> int:
    """Return the number of elements of a batch's first tensor: what its activations are proportional to."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    return next((value.numel() for value in values if isinstance(value, Tensor)), 1)


def _check_room(
    folder: Path,
    measured: int,
    number: int,
    missing: Sequence[int],
    batches: Sequence[Batch],
    free_bytes: Callable[[Path], int] | None,
) -> None:
    """Refuse, before anything is written, what does not fit: the need of all batches is that of one by their sizes."""
    need = round(measured * sum(_size(batches[each]) for each in missing) / max(1, _size(batches[number])))
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = free_bytes(existing) if free_bytes is not None else shutil.disk_usage(existing).free
    if need > free:
        share = max(1, int(len(missing) * free / need))
        raise UserError(
            "activations",
            Shown(f"{need / 2**30:.2f} GiB for {len(missing)} batches"),
            allowed=f"at most the {free / 2**30:.2f} GiB that are free at {existing}",
            hint=f"Use fewer examples (about {share} batches fit), or a folder on a larger disk.",
        )
