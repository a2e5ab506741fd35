"""``model.py``: the plain PyTorch source of a finished network.

It holds the sources of the ``archsmith.layers`` classes and functions that the network's class needs, copied as they
are, and one literal constructor call. It imports torch and the standard library, nothing else, and is the same byte for
byte whenever the same facts go in: ``verify`` relies on that, it executes a ``model.py`` only if it equals what this
module writes for the ``architecture.json`` beside it.

What a definition needs is decided by the names that occur in it, so a class comes whole, with methods that this network
never calls, and a local variable named like a definition brings that definition along. Both are harmless.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from archsmith.core.errors import UserError
from archsmith.run.constructor import ROOM, Call, parse_call

_WIDTH = 120
_STANDARD = ("__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing", "warnings")

_HEADER = '''\
"""{name}: a trained network found by archsmith, as plain PyTorch.

This file needs torch only. Its weights are in weights.safetensors beside it:

    from safetensors.torch import load_file

    network = build()
    network.load_state_dict(load_file("weights.safetensors"))
    network.eval()

The network maps float32 inputs of shape (batch, *INPUT_SHAPE) to logits (batch, len(CLASSES)), in the order of CLASSES.
Inputs are normalised channel by channel: (value - MEAN) / STD, with value as the training data had it (images: 0 to 1).
"""
'''


def standalone_source(
    class_path: str,
    arguments: Mapping[str, Any],
    *,
    input_shape: Sequence[int],
    normalisation: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
) -> str:
    """Return the text of ``model.py``.

    Args:
        class_path: Class of the network, below ``archsmith.layers``.
        arguments: Its constructor arguments, as ``constructor()`` returns them or as JSON gives them back (lists where
            tuples were); both give the same text.
        input_shape: Shape of one input, without the batch axis.
        normalisation: ``{"mean": [...], "std": [...]}``, one number for each channel.
        class_names: One name for each output.

    Returns:
        Formatted source, ending with a newline; pure ASCII outside the copied layer sources.

    Raises:
        UserError: The class is not one of archsmith's layers, or a value is no literal.
        ValueError: A layer module breaks the rules of its room (imports something else, the same name twice); a defect
            of archsmith, not of the input.
    """
    call = parse_call(class_path, arguments)
    facts = {
        "INPUT_SHAPE": _literal("input.shape", input_shape),
        "MEAN": _literal("input.normalisation.mean", normalisation.get("mean")),
        "STD": _literal("input.normalisation.std", normalisation.get("std")),
        "CLASSES": _literal("input.classes", class_names),
    }
    return source_of_call(call, _HEADER.format(name=call.name), facts)


def source_of_call(call: Call, header: str, facts: Mapping[str, tuple[Any, ...]] | None = None) -> str:
    """Return the text of a ``model.py`` with a docstring and constants of the caller's.

    Args:
        call: The network.
        header: Docstring, ending with a newline.
        facts: Constants by name, canonical literals.

    Raises:
        UserError: A class is not one of archsmith's layers.
    """
    imports, definitions = _inline(call)
    constants = "\n".join(f"{name} = {render(value, column=len(name) + 3)}" for name, value in (facts or {}).items())
    result = render(call, indent=4, column=len("    return "))
    builder = f'def build() -> {call.name}:\n    """Return the network with random weights."""\n    return {result}'
    parts = [constants, "", ""] if constants else [""]
    return "\n".join([header, imports, "", *parts, "\n\n\n".join([*definitions, builder]), ""])


def source_of(architecture: Mapping[str, Any]) -> str:
    """Return the text of the ``model.py`` that belongs to an ``architecture.json``.

    Raises:
        UserError: A field is missing or wrong.
    """
    facts = architecture.get("input")
    if not isinstance(facts, Mapping) or not isinstance(facts.get("normalisation"), Mapping):
        raise UserError("architecture.json", facts, allowed="an object 'input' with shape, normalisation and classes")
    return standalone_source(
        architecture.get("class", ""),
        architecture.get("arguments", {}),
        input_shape=facts.get("shape", ()),
        normalisation=facts["normalisation"],
        class_names=facts.get("classes", ()),
    )


def render(value: Any, *, indent: int = 0, column: int = 0) -> str:
    """Return a canonical value as formatted Python source.

    Args:
        value: A literal or ``Call`` as ``archsmith.run.constructor`` makes them.
        indent: Indentation of the line on which the value starts; broken lines are indented by four more.
        column: Where the value starts on its line.

    Returns:
        One line if it fits into 120 columns, counting one for a comma behind it; otherwise one item on each line.
    """
    flat = _flat(value)
    if column + len(flat) + 1 <= _WIDTH:
        return flat
    inner, pad = indent + 4, " " * (indent + 4)
    if isinstance(value, Call):
        items = [(f"{name}=", item) for name, item in value.arguments.items()]
        start, end = f"{value.name}(", ")"
    elif isinstance(value, dict):
        items = [(f"{_flat(key)}: ", item) for key, item in value.items()]
        start, end = "{", "}"
    elif isinstance(value, tuple):
        items = [("", item) for item in value]
        start, end = "(", ")"
    else:
        return flat
    if not items:
        return flat
    lines = [f"{pad}{key}{render(item, indent=inner, column=inner + len(key))},\n" for key, item in items]
    return f"{start}\n{''.join(lines)}{' ' * indent}{end}"


def _flat(value: Any) -> str:
    """Return the value on one line; text in ASCII, because what counts as printable depends on the Python version."""
    if isinstance(value, Call):
        return f"{value.name}({', '.join(f'{name}={_flat(item)}' for name, item in value.arguments.items())})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flat(key)}: {_flat(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_flat, value)) + ("," if len(value) == 1 else "") + ")"
    text = ascii(value)
    if isinstance(value, str) and '"' not in text:
        return f'"{text[1:-1]}"'
    return text


def _literal(place: str, value: Any) -> tuple[Any, ...]:
    """Return a sequence of literals in canonical form."""
    if not isinstance(value, (list, tuple)):
        raise UserError(place, value, allowed="a list")
    result: tuple[Any, ...] = parse_call(f"{ROOM}.x.X", {"x": value}).arguments["x"]
    return result


@dataclass
class _Module:
    """The top level of one layer module: its definitions and what its import statements bring."""

    name: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)  # name -> statement, in source order
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (module, original name or "")
    lines: list[str] = field(default_factory=list)


def _inline(call: Call) -> tuple[str, list[str]]:
    """Return the import block and the texts of all definitions the call needs, needed ones before their users."""
    modules: dict[str, _Module] = {}
    needed: set[tuple[str, str]] = set()
    outside: set[tuple[str, str]] = set()
    for inner in call.calls():
        _need(inner.module, inner.name, modules, needed, outside)
    texts: dict[str, str] = {}
    for module in _in_import_order(modules):
        for name in module.definitions:
            if (module.name, name) in needed:
                if name in texts:
                    raise ValueError(f"{ROOM}: '{name}' is defined in two modules that {call.path} needs; rename one.")
                texts[name] = _text(module, module.definitions[name])
    return _import_block(outside), list(dict.fromkeys(texts.values()))


def _need(
    module_name: str,
    name: str,
    modules: dict[str, _Module],
    needed: set[tuple[str, str]],
    outside: set[tuple[str, str]],
) -> None:
    """Add a definition and everything it names to ``needed``; imports from elsewhere go to ``outside``."""
    if (module_name, name) in needed:
        return
    if module_name not in modules:
        modules[module_name] = _read(module_name)
    module = modules[module_name]
    if name not in module.definitions:
        raise UserError("class", f"{module_name}.{name}", allowed=f"a class that {module_name} defines")
    needed.add((module_name, name))
    for node in ast.walk(module.definitions[name]):
        if not isinstance(node, ast.Name) or node.id == name:
            continue
        if node.id in module.definitions:
            _need(module_name, node.id, modules, needed, outside)
        elif node.id in module.imported:
            source, original = module.imported[node.id]
            if source.startswith(f"{ROOM}."):
                _need(source, original, modules, needed, outside)
            else:
                outside.add((source, original))


def _read(module_name: str) -> _Module:
    """Parse a layer module without executing it."""
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    loader = spec.loader if spec is not None else None
    source = loader.get_source(module_name) if isinstance(loader, importlib.abc.InspectLoader) else None
    if source is None:
        raise UserError("class", module_name, allowed=f"a module of {ROOM} in this version of archsmith")
    module = _Module(module_name, lines=source.splitlines())
    for node in ast.parse(source).body:
        for name in _defined(node):
            module.definitions[name] = node
        for name, origin in _imported(node, module_name):
            module.imported[name] = origin
    return module


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported(node: ast.stmt, module_name: str) -> Iterable[tuple[str, tuple[str, str]]]:
    """Yield ``(name, (module, original name))`` for an import; the original name of ``import torch`` is empty."""
    if isinstance(node, ast.Import):
        found = [(alias, alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        found = [(alias, node.module or "", alias.name) for alias in node.names]
    else:
        return
    for alias, source, original in found:
        allowed = source.split(".")[0] in ("torch", *_STANDARD) or (source.startswith(f"{ROOM}.") and original)
        if not allowed or alias.asname is not None or (not original and "." in source):
            raise ValueError(
                f"{module_name} line {node.lineno}: layer modules may import torch, {ROOM} and {', '.join(_STANDARD)}, "
                "without 'as', because their sources are copied into model.py."
            )
        yield (original or source), (source, original)


def _in_import_order(modules: Mapping[str, _Module]) -> list[_Module]:
    """Return the modules so that each stands behind those it imports; independent ones by name."""
    order: dict[str, _Module] = {}

    def visit(name: str) -> None:
        if name in order or name not in modules:
            return
        for source in sorted({source for source, _ in modules[name].imported.values()}):
            visit(source)
        order[name] = modules[name]

    for name in sorted(modules):
        visit(name)
    return list(order.values())


def _text(module: _Module, node: ast.stmt) -> str:
    """Return a definition's lines with its decorators and the comment directly above it."""
    decorators = node.decorator_list if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while first > 0 and module.lines[first - 1].startswith("#"):
        first -= 1
    assert node.end_lineno is not None
    return "\n".join(module.lines[first : node.end_lineno])


def _import_block(outside: set[tuple[str, str]]) -> str:
    """Return the import statements, future first, then the standard library, then torch, each sorted."""
    groups: list[list[str]] = [[], []]
    for source in sorted({source for source, _ in outside}):
        names = sorted((name for module, name in outside if module == source and name), key=_isort_key)
        group = groups[source.split(".")[0] == "torch"]
        if (source, "") in outside:
            group.append(f"import {source}")
        if names:
            group.append(f"from {source} import {', '.join(names)}")
    for group in groups:
        group.sort(key=lambda line: (line.startswith("from "), line))
    return "\n\n".join("\n".join(group) for group in [["from __future__ import annotations"], *groups] if group)


def _isort_key(name: str) -> tuple[int, str]:
    """Constants before classes before functions, as the house format sorts imported names."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
