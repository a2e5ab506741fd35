"""What was kept of a network, as JSON: with its code and its weights this builds the cut network again.

A record names the original by its fingerprint, and says for every tensor which positions of the *original* remain, so
any number of cuts is one record. ``record(model)`` returns that of a network that was cut, ``rebuild`` applies it to a
fresh original, ``save_weights`` and ``load_weights`` keep both in one safetensors file. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.attributes import refresh_attributes, set_attributes
from archsmith.atoms.edits import Edits
from archsmith.atoms.fingerprint import fingerprint, first_names, shapes_of, unwrap
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.slices import take
from archsmith.atoms.units import IntArray, TensorCut
from archsmith.core.errors import Shown, UserError

FORMAT_VERSION = 1

ATTRIBUTE = "_archsmith_record"
"""Where a cut network carries its record, as JSON text: it follows ``copy.deepcopy`` and needs no class of ours."""


@dataclass(frozen=True, eq=False)
class Record:
    """Everything that cuts did to one network.

    Attributes:
        original: Fingerprint of the network before its first cut.
        result: Fingerprint of the network now.
        shapes: Shape in the original, by qualified name, of every tensor of its ``state_dict``.
        unsaved: The same for tensors that were cut and are not in the ``state_dict`` (buffers that are not saved).
        tensors: What remains of the tensors that changed, as positions in the original.
        attributes: Old and new value of the user's attributes that changed, by dotted path; JSON values.
    """

    original: str
    result: str
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, TensorCut] = field(default_factory=dict)
    attributes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    unsaved: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def then(
        self,
        cuts: Mapping[str, TensorCut],
        attributes: Mapping[str, tuple[Any, Any]],
        result: str,
        present: Mapping[str, tuple[int, ...]],
    ) -> Record:
        """Return the record after one more cut of the present network.

        Args:
            cuts: What the new cut keeps of the present tensors.
            attributes: Old and new values that it changes.
            result: Fingerprint afterwards.
            present: Shapes of the tensors in ``cuts`` before it.
        """
        tensors, unsaved = dict(self.tensors), dict(self.unsaved)
        for name, cut in cuts.items():
            if name not in self.shapes:
                unsaved.setdefault(name, present[name])
            shape = self.shapes.get(name) or unsaved[name]
            tensors[name] = compose(self.tensors[name], cut, shape) if name in self.tensors else cut
        merged = dict(self.attributes)
        for path, (before, after) in attributes.items():
            merged[path] = (merged[path][0] if path in merged else before, after)
        return dataclasses.replace(self, result=result, tensors=tensors, attributes=merged, unsaved=unsaved)

    def to_json(self) -> str:
        """Return the record as JSON text; equal selections (a residual stream) are written once."""
        selections: dict[bytes, int] = {}
        known: dict[int, int] = {}  # by object: most tensors of one width share one array
        texts: list[str] = []

        def number(index: IntArray) -> int:
            key = index.tobytes()
            if key not in selections:
                selections[key] = len(selections)
                texts.append(to_ranges(index))
            return selections[key]

        def shared(index: IntArray) -> int:
            if id(index) not in known:
                known[id(index)] = number(index)
            return known[id(index)]

        tensors: dict[str, Any] = {}
        for name, cut in self.tensors.items():
            entry: dict[str, Any] = {}
            if cut.axes:
                entry["axes"] = {str(axis): shared(index) for axis, index in cut.axes.items()}
            if cut.joint is not None:
                rows = [number(row) for row in cut.joint[1]]
                entry["joint"] = {"axes": list(cut.joint[0]), "rows": rows}
            tensors[name] = entry
        content = {
            "format": "archsmith-cut",
            "format_version": FORMAT_VERSION,
            "original": self.original,
            "result": self.result,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "unsaved": {name: list(shape) for name, shape in self.unsaved.items()},
            "kept": texts,
            "tensors": tensors,
            "attributes": {path: list(values) for path, values in self.attributes.items()},
        }
        try:
            return json.dumps(content)
        except TypeError as error:
            raise UserError("attributes", Shown(str(error)), allowed="values that JSON can hold") from error

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Return the record that ``to_json`` wrote.

        Raises:
            UserError: The text is no record, or of a newer format.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError("record", Shown(f"text that is not JSON ({error})"), allowed="what to_json wrote") from None
        if not isinstance(content, dict) or content.get("format") != "archsmith-cut":
            raise UserError("record", Shown("JSON of another kind"), allowed="what archsmith.atoms.record wrote")
        version = content.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                "record.format_version", version, allowed=f"up to {FORMAT_VERSION}", hint="Use a newer archsmith."
            )
        kept = [from_ranges(line) for line in content["kept"]]
        tensors = {}
        for name, entry in content["tensors"].items():
            joint = entry.get("joint")
            tensors[name] = TensorCut(
                axes={int(axis): kept[number] for axis, number in entry.get("axes", {}).items()},
                joint=joint and (tuple(joint["axes"]), np.stack([kept[number] for number in joint["rows"]])),
            )
        return cls(
            original=content["original"],
            result=content["result"],
            shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
            unsaved={name: tuple(shape) for name, shape in content["unsaved"].items()},
            tensors=tensors,
            attributes={path: (before, after) for path, (before, after) in content["attributes"].items()},
        )

    def new_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor after the cuts."""
        shape = list(self.shapes[name] if name in self.shapes else self.unsaved[name])
        if (cut := self.tensors.get(name)) is not None:
            for axis, index in cut.axes.items():
                shape[axis] = len(index)
            if cut.joint is not None:
                for axis, size in zip(cut.joint[0], cut.joint[1].shape, strict=True):
                    shape[axis] = size
        return tuple(shape)

    def describe(self) -> str:
        """Return the differences from the original, one line a tensor or attribute, the totals last."""
        lines = [f"{self.original} -> {self.result}"]
        for name in self.tensors:
            before_shape = self.shapes[name] if name in self.shapes else self.unsaved[name]
            lines.append(f"  {name}: {_shape(before_shape)} -> {_shape(self.new_shape(name))}")
        lines += [f"  {path}: {before!r} -> {after!r}" for path, (before, after) in self.attributes.items()]
        before = sum(int(np.prod(shape)) for shape in self.shapes.values())
        after = sum(int(np.prod(self.new_shape(name))) for name in self.shapes)
        lines.append(f"  elements of the state_dict: {before:,} -> {after:,}")
        return "\n".join(lines)


def record(model: nn.Module, present: str | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Record:
    """Return what was kept of a network since its first cut; an empty record when it was never cut.

    Args:
        model: The network.
        present: Its fingerprint, where it is known already.
        shapes: Likewise what ``shapes_of`` returns.

    Raises:
        UserError: The network was changed by other hands after its last cut.
    """
    model = unwrap(model)
    present = present or fingerprint(model)
    text = model.__dict__.get(ATTRIBUTE)
    if text is None:
        return Record(present, present, shapes_of(model) if shapes is None else shapes)
    found = Record.from_json(text)
    if found.result != present:
        raise UserError(
            "model",
            Shown(f"one with fingerprint {present}, its record ends with {found.result}"),
            allowed="a network that nothing but archsmith changed since its first cut",
        )
    return found


def rebuild(model: nn.Module, what: Record, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Cut a freshly built original as the record says, and load weights into it.

    Args:
        model: The original as its code builds it; changed in place. Nothing is changed when an error is raised.
        what: Its record.
        state: Weights of the cut network; None keeps the slices of those that ``model`` has (which preserves a cut,
            but not the function of a network that was grown).

    Returns:
        ``model``.

    Raises:
        UserError: The record is of another network, or the weights are of another cut; the message says what differs.
    """
    inner = unwrap(model)
    if (present := fingerprint(inner)) != what.original:
        found = (
            f"one of a network with fingerprint {what.original}; this one has {present}:\n{differences(what, inner)}"
        )
        raise UserError("record", Shown(found), allowed="the record of this network")
    tensors = tensors_of(inner)
    with Edits() as edits:
        for name, cut in what.tensors.items():
            edits.set_tensor(tensors[name], take(tensors[name], cut))
        set_attributes(inner, {path: after for path, (_, after) in what.attributes.items()}, edits)
        refresh_attributes(inner, what.tensors, edits)
        attach(inner, what.to_json(), edits)
        if (built := fingerprint(inner)) != what.result:
            raise UserError("record", Shown(f"one that leads to {built}"), allowed=f"its own result, {what.result}")
        if state is not None:
            _load(inner, state)
    return model


def attach(model: nn.Module, text: str, edits: Edits) -> None:
    """Let a network carry its record, as JSON text, so that ``record`` finds it."""
    before = model.__dict__.get(ATTRIBUTE)

    def restore() -> None:
        if before is None:
            model.__dict__.pop(ATTRIBUTE, None)
        else:
            model.__dict__[ATTRIBUTE] = before

    edits.on_undo(restore)
    model.__dict__[ATTRIBUTE] = text


def differences(what: Record, model: nn.Module) -> str:
    """Return how the tensors of ``model`` differ from the original of a record, one line each, or what else can be."""
    lines = list(_differing(what.shapes, shapes_of(unwrap(model))))
    return "\n".join(lines[:20] + [f"  and {len(lines) - 20} more"] * (len(lines) > 20)) or (
        "  all names and shapes agree: other tensors are tied, or of another kind"
    )


def _differing(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        if name not in given:
            yield f"  {name}: {_shape(shape)} in the record, missing here"
        elif given[name] != shape:
            yield f"  {name}: {_shape(shape)} in the record, {_shape(given[name])} here"
    for name in given:
        if name not in expected:
            yield f"  {name}: not in the record, {_shape(given[name])} here"


@torch.no_grad()
def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights in place; a tied tensor may be given under any of its names."""
    first = first_names(model)
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    given = {first.get(name, name): tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}
    expected = {first[name]: tuple(tensor.shape) for name, tensor in own.items()}
    lines = list(_differing(expected, given))
    if lines:
        more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise UserError(
            "state_dict",
            Shown("one of another network or another cut:\n" + "\n".join(lines[:20]) + more + "\n"),
            allowed=f"weights of fingerprint {fingerprint(model)}",
        )
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            own[name].copy_(tensor)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write weights and record into one safetensors file; tied tensors once.

    Args:
        model: Network, cut or not.
        path: File; replaced when it exists.
    """
    from safetensors.torch import save_file

    inner = unwrap(model)
    first = first_names(inner)
    state = {n: t.contiguous() for n, t in inner.state_dict().items() if isinstance(t, Tensor) and first[n] == n}
    save_file(state, str(path), metadata={"archsmith_record": record(inner).to_json()})


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Build the cut network again from its freshly built original and a file of ``save_weights``.

    Args:
        model: The original as its code builds it; changed in place.
        path: The file.

    Returns:
        ``model``, cut and with the weights of the file.

    Raises:
        UserError: The file has no record, or one of another network.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get("archsmith_record")
        if text is None:
            raise UserError(
                "path", str(path), allowed="a file with a record, as archsmith.atoms.records.save_weights writes it"
            )
        return rebuild(model, Record.from_json(text), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def compose(first: TensorCut, second: TensorCut, shape: tuple[int, ...]) -> TensorCut:
    """Return two cuts of one tensor as one.

    Args:
        first: Made on the original.
        second: Made on what ``first`` left.
        shape: Of the original.

    Raises:
        UserError: They cut different pairs of axes jointly.
    """
    joint = None
    if first.joint is not None and second.joint is not None and first.joint[0] != second.joint[0]:
        raise UserError(
            "cut", Shown(f"joint axes {second.joint[0]} after {first.joint[0]}"), allowed="the same ones for one tensor"
        )
    if first.joint is not None or second.joint is not None:
        pair = (first.joint or second.joint or ((), None))[0]
        rows, columns = pair
        matrix = first.joint[1] if first.joint is not None else _matrix(first, rows, columns, shape)
        if second.joint is not None:
            matrix = matrix.reshape(-1)[second.joint[1]]
        else:
            matrix = matrix[second.axes.get(rows, np.arange(matrix.shape[0]))]
            matrix = matrix[:, second.axes.get(columns, np.arange(matrix.shape[1]))]
        joint = (pair, matrix)
    axes = {}
    for axis in sorted({*first.axes, *second.axes}):
        if joint is not None and axis in joint[0]:
            continue
        before, after = first.axes.get(axis), second.axes.get(axis)
        axes[axis] = before[after] if before is not None and after is not None else after if before is None else before
    return TensorCut(axes={axis: index for axis, index in axes.items() if index is not None}, joint=joint)


def _matrix(cut: TensorCut, rows: int, columns: int, shape: tuple[int, ...]) -> IntArray:
    row = cut.axes.get(rows, np.arange(shape[rows]))
    column = cut.axes.get(columns, np.arange(shape[columns]))
    return row[:, None] * shape[columns] + column


def to_ranges(index: IntArray) -> str:
    """Return positions as text, runs by their ends: ``"0-5,8,10-12"``."""
    if not len(index):
        return ""
    breaks = np.flatnonzero(index[1:] != index[:-1] + 1) + 1
    firsts = index[np.concatenate([[0], breaks])].tolist()
    lasts = index[np.concatenate([breaks - 1, [len(index) - 1]])].tolist()
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))


def from_ranges(text: str) -> IntArray:
    """Return the positions that ``to_ranges`` wrote."""
    parts = []
    for run in text.split(",") if text else []:
        first, _, last = run.partition("-")
        parts.append(np.arange(int(first), int(last or first) + 1))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
