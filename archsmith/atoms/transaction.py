"""One cut of any network as one transaction: model, gradients, optimisers, averages and tables, or nothing at all.

Parameters and buffers keep their identity (``tensor.data = slice``), so ties, optimisers and the user's references
survive. Everything new is computed before the first write, and every write is taken back when a later one fails.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from archsmith.atoms.attributes import refresh_attributes, set_attributes
from archsmith.atoms.edits import Edits
from archsmith.atoms.fingerprint import fingerprint, fingerprint_of, first_of, named_tensors, unwrap
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.optimizer_state import check_owners, elementwise_states, inner_optimizers
from archsmith.atoms.records import Record, attach, record
from archsmith.atoms.slices import Selections, in_layout_of, take
from archsmith.atoms.trace import call_arguments
from archsmith.atoms.units import Cut, TensorCut
from archsmith.atoms.wrappers import forbid_wrappers
from archsmith.core.errors import Shown, UserError
from archsmith.graph import evaluating

Absorb = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Returns what to add to biases and running statistics before the cut, by name, from tensors by name (see
``archsmith.atoms.absorb``). It is asked once with the model's tensors and once with those of every average or table."""


@dataclass(frozen=True, eq=False)
class Shares:
    """Factors on repeated slices, for growing; by tensor name, broadcasting to the new shape.

    Attributes:
        weights: On values: ``1 / copies`` along axes that are summed over.
        gradients: On gradients: ``1 / copies`` along all other axes.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]

    def scaled(self, name: str, value: Tensor, *, gradient: int = 0) -> Tensor:
        """Return a new value times its factor, or a power of that of its gradient."""
        factor = self.gradients.get(name) if gradient else self.weights.get(name)
        return value if factor is None else value.mul_(factor.to(value) ** (gradient or 1))


_WHOLE = Shares({}, {})


@dataclass(frozen=True)
class CutOutcome:
    """What a transaction did.

    Attributes:
        removed: Units removed by group name.
        params: Elements of the model's parameters before and after, tied ones counted once.
        attributes: New values of all module attributes that changed, by dotted path.
        absorbed: Names of the model's tensors that took up constants of removed units.
        gap: Largest difference of the evaluation outputs on the probe, relative to the largest output before; None
            without a probe.
        record: What was kept since the first cut of this model.
        notes: Sentences about what the caller may want to know.
    """

    removed: Mapping[str, int]
    params: tuple[int, int]
    attributes: Mapping[str, Any]
    absorbed: tuple[str, ...]
    gap: float | None
    record: Record
    notes: tuple[str, ...]


@torch.no_grad()
def apply_(
    model: nn.Module,
    cut: Cut,
    *,
    optimizers: Iterable[Any] = (),
    averages: Iterable[nn.Module] = (),
    tables: Iterable[MutableMapping[str, Tensor]] = (),
    absorb: Absorb | None = None,
    attributes: Mapping[str, Any] | None = None,
    elementwise: Iterable[str] = (),
    shares: Shares | None = None,
    probe: Any = None,
    verify: Callable[[nn.Module], None] | None = None,
) -> CutOutcome:
    """Cut a model in place, together with everything that depends on its shapes, or change nothing at all.

    Gradients are cut too, so a cut may come between the backward passes of an accumulated step, and between
    ``GradScaler.unscale_`` and ``step``. The order of parameters and of the optimisers' groups does not change.

    Args:
        model: Network, or its wrapper (``torch.compile``, DDP); a DDP wrapper must be renewed afterwards
            (``archsmith.atoms.wrappers.rewrap``) and refuses to run until then.
        cut: From ``plan_cut`` or the finder.
        optimizers: Every optimiser that trains it; one that holds none of the parameters to be cut is an error.
        averages: Modules of the same code that hold averaged weights (a copy, an ``AveragedModel``); cut alike.
        tables: Further tensors by the model's qualified names (moving averages, masks), replaced in place.
        absorb: Moves the constants of removed units to what follows, see ``archsmith.atoms.absorb``.
        attributes: New values of user attributes by dotted path, over those of the cut.
        elementwise: Names of optimiser states with a number for each element that torch's own do not have.
        shares: Factors on repeated slices (``archsmith.atoms.grow``); a cut has none.
        probe: Example inputs (a tensor, a tuple of arguments or a mapping by name); the evaluation output on them is
            compared before and after, and the gap reported.
        verify: Called with the cut model before the transaction ends; what it raises takes everything back.

    Returns:
        What was done.

    Raises:
        UserError: The cut is of another network, a table or an optimiser does not fit, an attribute does not exist.
            The model and everything else are bit for bit as before, after any exception.
        CutRefused: What remains makes no module (see ``refresh_attributes``).
    """
    inner = unwrap(model)
    averaged = [unwrap(average) for average in averages]
    tables, optimizers = list(tables), inner_optimizers(optimizers)
    tensors, saved = named_tensors(inner)
    present = fingerprint_of(tensors, saved)
    _check_fit(tensors, present, cut, "model")
    for average in averaged:
        _check_fit(tensors_of(average), fingerprint(average), cut, "averages")
    shapes = {name: tuple(tensors[name].shape) for name in cut.tensors}
    past = record(inner, present, {name: tuple(t.shape) for name, t in tensors.items() if name in saved})
    parameters = {name: tensors[name] for name in cut.tensors if isinstance(tensors[name], nn.Parameter)}
    free = check_owners(optimizers, parameters) if optimizers and parameters else []
    notes = [f"no optimiser holds {_listed(free)}"] if free else []
    notes += getattr(absorb, "notes", [])

    first = first_of(tensors)
    part = shares or _WHOLE
    known: Selections = {}
    new_model, absorbed = _new_values(tensors, tensors, cut.tensors, first, absorb, part, "model", known)
    grads = {name: take_gradient(parameter, cut.tensors[name], known) for name, parameter in parameters.items()}
    grads = {name: None if g is None else part.scaled(name, g, gradient=1) for name, g in grads.items()}
    new_averages = []
    for own in map(tensors_of, averaged):
        new_averages.append(_new_values(own, own, cut.tensors, first, absorb, part, "averages", known)[0])
    for_table = (tensors, cut.tensors, first, absorb, part, "tables", known)
    new_tables = [_new_values(table, *for_table)[0] for table in tables]
    new_state = []
    for entry in elementwise_states(optimizers, parameters, elementwise):
        value = take(entry.value, cut.tensors[entry.parameter], known)
        value = part.scaled(entry.parameter, value, gradient=entry.order) if entry.order else value
        new_state.append((entry.state, entry.key, value))
    before = None if probe is None else _outputs(inner, probe)
    params = _elements(tensors)

    with Edits() as edits:
        write_tensors(tensors, new_model, edits, grads)
        for average, new in zip(averaged, new_averages, strict=True):
            write_tensors(tensors_of(average), new, edits)
        for state, key, value in new_state:
            edits.set_item(state, key, value)
        for table, new in zip(tables, new_tables, strict=True):
            edits.restore_on_undo(table)
            table.update(new)
        given = {**cut.attributes, **(attributes or {})}
        changed = set_attributes(inner, given, edits)
        derived = refresh_attributes(inner, cut.tensors, edits, tensors)
        for average in averaged:
            set_attributes(average, given, edits)
            refresh_attributes(average, cut.tensors, edits)
        done = past.then(cut.tensors, changed, fingerprint_of(tensors, saved), shapes)
        text = done.to_json()
        for network in (inner, *averaged):
            attach(network, text, edits)
        notes += forbid_wrappers(inner, edits)
        gap = None if before is None else relative_gap(_outputs(inner, probe), before)
        if verify is not None:
            with torch.enable_grad():
                verify(inner)
    _repack(inner)
    return CutOutcome(
        removed={name: len(units) for name, units in cut.removed.items()},
        params=(params, _elements(tensors)),
        attributes={**{path: after for path, (_, after) in changed.items()}, **derived},
        absorbed=tuple(absorbed),
        gap=gap,
        record=done,
        notes=tuple(notes),
    )


def _check_fit(tensors: Mapping[str, Tensor], present: str, cut: Cut, what: str) -> None:
    if cut.fingerprint and present != cut.fingerprint:
        raise UserError(
            what,
            Shown(f"a network with fingerprint {present}"),
            allowed=f"the one that the cut was planned for, {cut.fingerprint}",
            hint="Plan the cut anew on the present model.",
        )
    lasts: dict[int, int] = {}  # by object: tensors of one width share one array
    for name, keeping in cut.tensors.items():
        if name not in tensors:
            raise UserError(what, Shown(f"a network without '{name}'"), allowed="the one that the cut was planned for")
        if is_traceable_wrapper_subclass(tensors[name]):
            raise UserError(
                what,
                Shown(f"'{name}' as a {type(tensors[name]).__name__}"),
                allowed="plain tensors",
                hint="Cut before parameters are sharded or quantised.",
            )
        shape = tensors[name].shape
        for index in keeping.axes.values():
            if id(index) not in lasts:
                lasts[id(index)] = int(index.max(initial=-1))
        ends = [(axis, lasts[id(index)], len(index)) for axis, index in keeping.axes.items()]
        if keeping.joint is not None:
            axes, positions = keeping.joint
            if positions.max(initial=-1) >= shape[axes[0]] * shape[axes[1]]:
                ends.append((axes[0], shape[axes[0]], positions.size))
        for axis, last, count in ends:
            if not count or last >= shape[axis]:
                raise UserError(
                    f"cut.tensors['{name}']",
                    Shown(f"{count} kept positions up to {last} on axis {axis}"),
                    allowed=f"at least one position below {shape[axis]}",
                )


def _new_values(
    table: Mapping[str, Tensor],
    model_tensors: Mapping[str, Tensor],
    cuts: Mapping[str, TensorCut],
    first: Mapping[str, str],
    absorb: Absorb | None,
    shares: Shares,
    what: str,
    known: Selections,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the new value of every tensor of ``table`` that changes, and which took up constants; nothing is written.

    Tied tensors that are one object in the table get one new value.
    """
    additions = absorb(ChainMap(dict(table), dict(model_tensors))) if absorb is not None else {}
    new: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    absorbed = []
    for name, tensor in table.items():
        canonical = first.get(name, name)
        if canonical not in cuts and canonical not in additions:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != model_tensors[canonical].shape:
            given = Shown(f"shape {tuple(tensor.shape)} for '{name}'") if isinstance(tensor, Tensor) else tensor
            raise UserError(what, given, allowed=f"the shape of the parameter, {tuple(model_tensors[canonical].shape)}")
        if id(tensor) not in done:
            value = tensor.detach()
            if canonical in additions:
                value = in_layout_of(tensor, value + additions[canonical].to(value))
                absorbed.append(name)
            if canonical in cuts:
                value = shares.scaled(canonical, take(value, cuts[canonical], known))
            done[id(tensor)] = value
        new[name] = done[id(tensor)]
    return new, absorbed


def take_gradient(parameter: Tensor, cut: TensorCut, known: Selections | None = None) -> Tensor | None:
    """Return what a cut keeps of a parameter's gradient, sparse ones included."""
    grad = parameter.grad
    if grad is None:
        return None
    if grad.layout == torch.sparse_coo:
        return take(grad.to_dense(), cut, known).to_sparse(grad.sparse_dim())
    return take(grad, cut, known)


def write_tensors(
    tensors: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    edits: Edits,
    grads: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Give tensors new data in place, tied ones once; ``grads`` are the gradients of those that are cut."""
    done = set()
    for name, value in new.items():
        tensor = tensors[name]
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        edits.set_tensor(tensor, value, (grads or {}).get(name, tensor.grad if tensor.shape == value.shape else None))


def relative_gap(after: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest number of the same output before; infinite for NaN."""
    worst = 0.0
    for new, old in zip(after, before, strict=True):
        if new.shape != old.shape:
            return float("inf")
        if not old.numel():
            continue
        scale = float(old.abs().max())
        gap = float((new - old).abs().max())
        worst = max(worst, gap / scale if scale else gap if gap else 0.0) if gap == gap else float("inf")
    return worst


def _outputs(model: nn.Module, probe: Any) -> list[Tensor]:
    args, kwargs = call_arguments(model, probe)
    with evaluating(model), torch.no_grad():
        leaves = tree_leaves(model(*args, **kwargs))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _elements(tensors: Mapping[str, Tensor]) -> int:
    distinct = {id(tensor): tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    return sum(tensor.numel() for tensor in distinct.values())


def _repack(model: nn.Module) -> None:
    """Let recurrent layers on an accelerator put their weights into one block again."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and any(weight.is_cuda for weight in module.parameters()):
            module.flatten_parameters()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
