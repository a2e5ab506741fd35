"""Module expressions as JSON, and the way back from a specified program to the decisions that gave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space.modules import Basic, Concat, Module, Or, Program, Repeat, RepeatTied, Residual
from archsmith.space.values import Value


def decisions_of(module: Module, program: Program, at: str = "") -> dict[str, Value] | None:
    """Return decisions that specify ``module`` to ``program``; None when there are none.

    Where several do (a branch of an ``Or`` twice), the first branches are taken; the network is the same.

    Args:
        module: The expression.
        program: A program, as ``ModuleSpace.program`` gives it.
        at: Path of the module.
    """
    kind, content = program
    if isinstance(module, Basic):
        return _values(module, kind, content, at)
    if isinstance(module, Or):
        for index, branch in enumerate(module.modules):
            label = f"{index}-{branch.kind}"
            if (found := decisions_of(branch, program, _below(at, label))) is not None:
                return {_below(at, "branch"): label, **found} if len(module.modules) > 1 else found
        return None
    if isinstance(module, Residual):
        return decisions_of(module.module, content, _below(at, "body")) if kind == "Residual" else None
    if kind != "Concat":
        return None
    if isinstance(module, Concat):
        labels = [f"{index}-{part.kind}" for index, part in enumerate(module.modules)]
        return _together(list(zip(module.modules, labels, strict=True)), content, at)
    assert isinstance(module, Repeat)
    if len(content) not in module.times:
        return None
    if isinstance(module, RepeatTied):
        first = decisions_of(module.module, content[0], _below(at, "copy0"))
        found = first if all(copy == content[0] for copy in content) else None
    else:
        found = _together([(module.module, f"copy{index}") for index in range(len(content))], content, at)
    if found is None or len(module.times) == 1:
        return found
    return {_below(at, "times"): len(content), **found}


def module_to_json(module: Module) -> dict[str, Any]:
    """Return an expression as plain JSON values; ``module_from_json`` is the way back."""
    if isinstance(module, Basic):
        return {"kind": module.name, "hyperparameters": [[name, list(v)] for name, v in module.hyperparameters]}
    if isinstance(module, Concat | Or):
        return {"kind": module.kind, "modules": [module_to_json(part) for part in module.modules]}
    if isinstance(module, Repeat):
        return {"kind": module.kind, "module": module_to_json(module.module), "times": list(module.times)}
    assert isinstance(module, Residual)
    return {"kind": module.kind, "module": module_to_json(module.module)}


def module_from_json(data: Mapping[str, Any]) -> Module:
    """Return the expression that ``module_to_json`` described.

    Raises:
        UserError: A field is missing.
    """
    try:
        kind = str(data["kind"])
        if kind in ("Concat", "Or"):
            parts = [module_from_json(part) for part in data["modules"]]
            return Concat(parts) if kind == "Concat" else Or(parts)
        if kind in ("Repeat", "RepeatTied"):
            repeated = RepeatTied if kind == "RepeatTied" else Repeat
            return repeated(module_from_json(data["module"]), list(data["times"]))
        if kind == "Residual":
            return Residual(module_from_json(data["module"]))
        return Basic(kind, tuple((str(name), tuple(options)) for name, options in data["hyperparameters"]))
    except KeyError as error:
        raise UserError("module", dict(data), allowed=f"an expression in JSON, with {error}") from error


def _values(module: Basic, kind: str, content: Program, at: str) -> dict[str, Value] | None:
    names = [name for name, _ in module.hyperparameters]
    if kind != module.name or [name for name, _ in content] != names:
        return None
    found: dict[str, Value] = {}
    for (name, options), (_, value) in zip(module.hyperparameters, content, strict=True):
        if value not in options:
            return None
        if len(options) > 1:
            found[_below(at, name)] = value
    return found


def _together(parts: list[tuple[Module, str]], programs: Program, at: str) -> dict[str, Value] | None:
    if len(parts) != len(programs):
        return None
    found: dict[str, Value] = {}
    for (module, label), program in zip(parts, programs, strict=True):
        part = decisions_of(module, program, _below(at, label))
        if part is None:
            return None
        found.update(part)
    return found


def _below(at: str, name: str) -> str:
    return f"{at}/{name}" if at else name
