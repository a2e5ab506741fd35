"""The constructor tree of a network: the class and the literal arguments that rebuild its structure.

It has three forms that carry the same facts: the arguments a layer's ``constructor()`` returns, the JSON in
``architecture.json``, and the Python call at the end of ``model.py``. JSON knows no tuples, so the canonical form here
has tuples everywhere and the JSON form has lists everywhere; a nested layer is ``{"class": path, "arguments": {...}}``.

An ``architecture.json`` may come from a stranger. So a class is only ever looked up below ``archsmith.layers``, by a
path of plain identifiers, and arguments can be nothing but literals.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from archsmith.core.errors import Shown, UserError

ROOM = "archsmith.layers"
_PATH = re.compile(re.escape(ROOM) + r"(?:\.[a-z][a-z0-9_]*)+\.[A-Za-z][A-Za-z0-9_]*", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Call:
    """One constructor call.

    Attributes:
        path: Dotted path of the class, below ``archsmith.layers``.
        arguments: Keyword arguments; values are ``None``, booleans, integers, finite floats, text, other calls, and
            tuples and dicts (with text keys) of these.
    """

    path: str
    arguments: Mapping[str, Any]

    @property
    def module(self) -> str:
        """Dotted path of the module that defines the class."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.path.rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        """Return ``{"class": ..., "arguments": ...}`` of JSON types only."""
        return {"class": self.path, "arguments": _to_json(dict(self.arguments))}

    def calls(self) -> list[Call]:
        """Return this call and all nested ones, in the order of the text."""
        return [self, *(inner for value in self.arguments.values() for inner in _calls(value))]


def call_of(network: nn.Module) -> Call:
    """Return the constructor tree of a network made of archsmith's layers.

    Raises:
        UserError: The class lives elsewhere, has no ``constructor()``, or an argument is no literal.
    """
    kind = type(network)
    constructor = getattr(network, "constructor", None)
    if constructor is None:
        raise UserError(
            "network",
            Shown(f"a {kind.__module__}.{kind.__qualname__}, which has no constructor()"),
            allowed=f"a network of {ROOM}, whose constructor() returns its literal arguments",
        )
    return parse_call(f"{kind.__module__}.{kind.__qualname__}", constructor())


def parse_call(path: object, arguments: object) -> Call:
    """Return the canonical call for a class path and arguments in either form (Python's or JSON's).

    Args:
        path: Dotted path of the class, for example ``"archsmith.layers.mobile.MobileNet"``.
        arguments: Mapping of argument names to values.

    Raises:
        UserError: The path leads out of ``archsmith.layers`` or an argument is no literal; nothing was imported.
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise UserError(
            "class", path, allowed=f"a class below {ROOM}, such as '{ROOM}.mobile.MobileNet'; no other code is loaded"
        )
    if not isinstance(arguments, Mapping):
        raise UserError("arguments", arguments, allowed="a mapping of argument names to literal values")
    for name in arguments:
        if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
            raise UserError("arguments", name, allowed="argument names that are plain identifiers")
    return Call(path, {name: _canonical(name, value) for name, value in arguments.items()})


def build(call: Call) -> nn.Module:
    """Return a new network of that structure, with fresh random weights.

    Raises:
        UserError: The class does not exist, is no ``nn.Module``, or does not take these arguments.
    """
    try:
        kind = getattr(importlib.import_module(call.module), call.name)
    except (ImportError, AttributeError):
        raise UserError("class", call.path, allowed=f"a class of {ROOM} in this version of archsmith") from None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == call.module):
        raise UserError("class", call.path, allowed=f"an nn.Module class defined below {ROOM}")
    try:
        return kind(**{name: _build(value) for name, value in call.arguments.items()})
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(
            "arguments", Shown(f"values that {call.name} refuses ({error})"), allowed=f"the arguments of {call.path}"
        ) from error


def _canonical(place: str, value: Any) -> Any:
    """Return a literal in canonical form; ``place`` names it in errors."""
    if value is None or isinstance(value, Call) or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, nn.Module):
        return call_of(value)
    if isinstance(value, (list, tuple)):
        return tuple(_canonical(f"{place}[{index}]", item) for index, item in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        if set(value) == {"class", "arguments"}:
            return parse_call(value["class"], value["arguments"])
        return {key: _canonical(f"{place}[{key!r}]", item) for key, item in value.items()}
    raise UserError(
        "arguments",
        Shown(f"{place} = {value!r} of type {type(value).__name__}"),
        allowed="None, bool, int, finite float, str, and lists, tuples and dicts with text keys of these",
    )


def _to_json(value: Any) -> Any:
    if isinstance(value, Call):
        return value.to_json()
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def _build(value: Any) -> Any:
    if isinstance(value, Call):
        return build(value)
    if isinstance(value, tuple):
        return tuple(_build(item) for item in value)
    if isinstance(value, dict):
        return {key: _build(item) for key, item in value.items()}
    return value


def _calls(value: Any) -> list[Call]:
    if isinstance(value, Call):
        return value.calls()
    items = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else ()
    return [call for item in items for call in _calls(item)]
