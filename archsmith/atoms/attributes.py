"""Integer attributes of modules that must agree with the shapes of their weights.

Those of torch's own modules are functions of the new weights and of what was kept, worked out here. Those of the user's
modules (``num_heads``, fields of a configuration) come with the cut, by dotted path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from archsmith.atoms.edits import Edits
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.units import IntArray, TensorCut
from archsmith.core.errors import Shown, UserError

Rows = Callable[[str, int], IntArray]
"""Gives the kept positions along the first axis of a module's tensor, by attribute name and old length."""


def refresh_attributes(
    model: nn.Module,
    cuts: Mapping[str, TensorCut],
    edits: Edits,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Make the attributes of torch's own modules agree with their weights, which are cut already.

    Covers convolutions (``groups`` of depthwise and grouped ones by what was kept), linear and bilinear layers,
    normalisations, embeddings, PReLU, recurrent layers and cells, multi-head attention, and the ``Conv1D`` of
    transformers.

    Args:
        model: Changed in place.
        cuts: What each tensor kept, by qualified name.
        edits: Takes the changes back on failure.
        tensors: The model's tensors by name, where they are known already.

    Returns:
        The new values by dotted path.

    Raises:
        CutRefused: What was kept makes no module any more: groups, heads or layers of different sizes, or a padding
            row that is gone.
    """
    tensors = tensors_of(model) if tensors is None else tensors
    of_tensor = {id(tensors[name]): cut for name, cut in cuts.items()}
    changed: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not _has_rule(cast(Hashable, type(module))):
            continue
        rows = _rows_of(module, of_tensor)
        for name, value in _wanted(path, module, rows):
            if getattr(module, name) != value:
                edits.set_attribute(module, name, value)
                changed[f"{path}.{name}" if path else name] = value
    return changed


_OF_TORCH = (
    nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm,
    nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
    nn.Transformer,
)  # fmt: skip
_CONV1D = "transformers.pytorch_utils.Conv1D"


def attributes_of(path: str, module: nn.Module, cuts: Mapping[str, TensorCut]) -> dict[str, Any]:
    """Return the attributes of one of torch's own modules that disagree with its weights, which are cut already.

    Args:
        path: Its qualified name, for messages.
        module: Read only; its attributes are still those of before the cut.
        cuts: What its own tensors kept, by attribute name.

    Returns:
        New values by name; nothing for modules of other makes.

    Raises:
        CutRefused: See ``refresh_attributes``.
    """
    if not _has_rule(cast(Hashable, type(module))):
        return {}
    of_tensor = {id(getattr(module, name)): cut for name, cut in cuts.items()}
    wanted = _wanted(path, module, _rows_of(module, of_tensor))
    return {name: value for name, value in wanted if getattr(module, name) != value}


@functools.cache
def _has_rule(kind: Hashable) -> bool:
    """Whether ``_wanted`` knows modules of a class."""
    assert isinstance(kind, type)
    return issubclass(kind, _OF_TORCH) or f"{kind.__module__}.{kind.__name__}" == _CONV1D


def _rows_of(module: nn.Module, of_tensor: Mapping[int, TensorCut]) -> Rows:
    def rows(name: str, length: int) -> IntArray:
        cut = of_tensor.get(id(getattr(module, name, None)))
        if cut is None:
            return np.arange(length)
        if cut.joint is not None and 0 in cut.joint[0]:
            tensor = cast(Tensor, getattr(module, name))
            columns = _old_columns(module, tensor)
            return cut.joint[1][:, 0] // columns
        return cut.axes.get(0, np.arange(length))

    return rows


def _old_columns(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        total = module.out_channels if module.transposed else module.in_channels
        return total // module.groups
    return weight.shape[1]


def _wanted(path: str, module: nn.Module, rows: Rows) -> Iterator[tuple[str, Any]]:
    match module:
        case nn.modules.conv._ConvNd():
            yield from _convolution(path, module, rows)
        case nn.Linear():
            yield "out_features", module.weight.shape[0]
            yield "in_features", module.weight.shape[1]
        case nn.Bilinear():
            yield from zip(("out_features", "in1_features", "in2_features"), module.weight.shape, strict=True)
        case nn.modules.batchnorm._NormBase():
            vector = module.weight if module.weight is not None else module.running_mean
            if vector is not None:
                yield "num_features", vector.shape[0]
        case nn.GroupNorm():
            if module.weight is not None:
                kept = rows("weight", module.num_channels)
                yield "num_groups", _parts(path, "groups", kept, module.num_groups, module.num_channels)
                yield "num_channels", module.weight.shape[0]
        case nn.LayerNorm() | nn.RMSNorm():
            if module.weight is not None:
                yield "normalized_shape", tuple(module.weight.shape)
        case nn.Embedding() | nn.EmbeddingBag():
            if module.padding_idx is not None:
                yield "padding_idx", _new_row(path, rows("weight", module.num_embeddings), module.padding_idx)
            yield "num_embeddings", module.weight.shape[0]
            yield "embedding_dim", module.weight.shape[1]
        case nn.PReLU():
            yield "num_parameters", module.weight.shape[0]
        case nn.RNNBase():
            yield from _recurrent(path, module)
        case nn.RNNCellBase():
            yield "hidden_size", module.weight_hh.shape[1]
            yield "input_size", module.weight_ih.shape[1]
        case nn.MultiheadAttention():
            yield from _attention(path, module, rows)
        case nn.Transformer():
            layers = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
            if layers:
                yield "d_model", layers[0].out_proj.weight.shape[0]
        case _ if f"{type(module).__module__}.{type(module).__name__}" == _CONV1D:
            weight = cast(Tensor, module.weight)
            yield "nx", weight.shape[0]
            yield "nf", weight.shape[1]


def _convolution(path: str, module: nn.modules.conv._ConvNd, rows: Rows) -> Iterator[tuple[str, Any]]:
    length = module.in_channels if module.transposed else module.out_channels
    groups = module.groups
    if groups > 1:
        kept = rows("weight", length)
        if groups == length and len(np.unique(kept)) < len(kept):  # depthwise, grown: every copy is its own group
            groups = len(kept)
        else:
            groups = _parts(path, "groups", kept, groups, length)
    first, second = module.weight.shape[0], module.weight.shape[1] * groups
    yield "groups", groups
    yield "out_channels", second if module.transposed else first
    yield "in_channels", first if module.transposed else second


def _parts(path: str, what: str, kept: IntArray, parts: int, length: int) -> int:
    """Return how many of equal parts still have members; they must have equally many."""
    counts = np.bincount(kept // (length // parts), minlength=parts)
    living = counts[counts > 0]
    if len(np.unique(living)) > 1:
        raise CutRefused(path, f"its {what} would keep {', '.join(map(str, counts))} members, they must stay equal")
    return len(living)


def _new_row(path: str, kept: IntArray, row: int) -> int:
    found = np.flatnonzero(kept == row)
    if not len(found):
        raise CutRefused(path, f"its padding row {row} would go")
    return int(found[0])


def _recurrent(path: str, module: nn.RNNBase) -> Iterator[tuple[str, Any]]:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    hidden = {weight.shape[0] // gates for name, weight in module.named_parameters() if name.startswith("weight_hh")}
    if len(hidden) > 1:
        raise CutRefused(
            path, f"its layers and directions would have {sorted(hidden)} units, they must have equally many"
        )
    yield "hidden_size", hidden.pop()
    yield "input_size", cast(Tensor, module.weight_ih_l0).shape[1]
    if module.proj_size:
        yield "proj_size", cast(Tensor, module.weight_hr_l0).shape[0]


def _attention(path: str, module: nn.MultiheadAttention, rows: Rows) -> Iterator[tuple[str, Any]]:
    old, size = module.embed_dim, module.out_proj.weight.shape[0]
    if module.in_proj_weight is not None:
        kept, width = rows("in_proj_weight", 3 * old), module.in_proj_weight.shape[1]
        thirds = [kept[kept // old == part] - part * old for part in range(3)]
        keys = values = width
    else:
        thirds = [rows(f"{part}_proj_weight", old) for part in "qkv"]
        width = module.q_proj_weight.shape[1]
        keys, values = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    heads = {_parts(path, "heads", third, module.num_heads, old) for third in thirds if len(third)}
    if len(heads) != 1 or {len(third) for third in thirds} != {size} or width != size:
        raise CutRefused(
            path,
            f"torch.nn.MultiheadAttention needs queries, keys and values as wide as its input: got "
            f"{[len(third) for third in thirds]} rows for {size} features",
        )
    number = heads.pop()
    yield "embed_dim", size
    yield "num_heads", number
    yield "head_dim", size // number
    yield "kdim", keys
    yield "vdim", values


def set_attributes(model: nn.Module, values: Mapping[str, Any], edits: Edits) -> dict[str, tuple[Any, Any]]:
    """Set attributes by dotted path from the model, through modules, objects, dictionaries and lists.

    Args:
        model: Changed in place.
        values: E.g. ``{"layer1.0.attn.num_heads": 4, "config.hidden_sizes.1": 96}``; each must exist.
        edits: Takes the changes back on failure.

    Returns:
        The old and new value of those that changed.

    Raises:
        UserError: A path does not exist, or what it names can not be set.
    """
    changed = {}
    for path, value in values.items():
        owner: Any = model
        *parents, leaf = path.split(".")
        for parent in parents:
            owner = member(owner, parent, path)
        before = member(owner, leaf, path)
        value = _of_kind(value, before)
        if before == value and type(before) is type(value):
            continue
        try:
            if isinstance(owner, dict):
                edits.set_item(owner, leaf, value)
            elif isinstance(owner, list):
                edits.set_item(owner, int(leaf), value)
            else:
                edits.set_attribute(owner, leaf, value)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"attributes['{path}']", value, allowed=f"attributes that can be set; this one can not ({error})"
            ) from None
        changed[path] = (before, value)
    return changed


def _of_kind(value: Any, before: Any) -> Any:
    """Return a value as Python's own number, and as a tuple where there was one: JSON knows only lists."""
    if isinstance(value, np.generic):
        value = value.item()
    return tuple(value) if isinstance(before, tuple) and isinstance(value, list) else value


def member(owner: Any, name: str, path: str) -> Any:
    """Return one step of a dotted path: an attribute, or an entry of a dictionary or list.

    Raises:
        UserError: It does not exist; names the whole ``path``.
    """
    try:
        if isinstance(owner, dict):
            return owner[name]
        if isinstance(owner, list | tuple):
            return owner[int(name)]
        return getattr(owner, name)
    except (AttributeError, KeyError, IndexError, ValueError):
        raise UserError(
            f"attributes['{path}']",
            Shown(f"no '{name}' in {type(owner).__name__}"),
            allowed="dotted paths from the model to attributes that exist",
        ) from None
