"""Plain values: what a decision may be, how it becomes JSON and back, and the digest of a JSON value.

A value is ``None``, a bool, an int, a finite float, a string, or a tuple of values. Integers stay integers, floats are
exact (shortest decimal form that reads back to the same bits), tuples are JSON lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, TypeAlias

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.files import sha256_of

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | None"


def frozen_value(value: Any, field: str) -> Value:
    """Return ``value`` as an immutable plain value.

    Args:
        value: A plain value; lists become tuples and numpy scalars the Python number of the same kind.
        field: How an error names the value.

    Raises:
        UserError: NaN, infinity, or a type that JSON cannot hold exactly.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number):
            raise UserError(field, value, allowed="finite numbers")
        return number + 0.0  # -0.0 equals 0.0, so both must have one digest
    if isinstance(value, list | tuple):
        return tuple(frozen_value(item, field) for item in value)
    raise UserError(field, value, allowed="None, bool, int, float, text, or a tuple of these")


def strict_key(value: Value) -> tuple[str, Any]:
    """Return a dictionary key that tells 1, 1.0 and True apart."""
    if isinstance(value, tuple):
        return "tuple", tuple(strict_key(item) for item in value)
    return type(value).__name__, value


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII only, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical text, as 64 hexadecimal digits."""
    return sha256_of(canonical_json(value).encode("ascii"))


class FrozenDict(Mapping[str, Any]):
    """An immutable, hashable, picklable mapping of text to frozen values; order does not count in ``==``."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        self._items = {str(name): freeze(value) for name, value in (items or {}).items()}

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def values(self) -> ValuesView[Any]:
        """Return a view of the values (the inherited one looks up every name)."""
        return self._items.values()

    def items(self) -> ItemsView[str, Any]:
        """Return a view of names and values."""
        return self._items.items()


def freeze(value: Any) -> Any:
    """Return a JSON value with mappings as ``FrozenDict`` and lists as tuples; non-finite floats are kept."""
    if type(value) is float:  # the usual cases first: results of tables are made by the ten thousand
        return value + 0.0
    if type(value) is int or type(value) is str:
        return value
    if isinstance(value, Mapping):
        return FrozenDict(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return float(value)
    return frozen_value(value, "value")


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def number_to_json(value: float) -> float | str:
    """Return a number as strict JSON: NaN and the infinities, which JSON lacks, become their names."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def number_from_json(value: Any, field: str) -> float:
    """Return the number that ``number_to_json`` wrote; integers stay integers.

    Raises:
        UserError: Neither a number nor the name of a non-finite one.
    """
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(field, value, allowed=f"a number, or one of {sorted(_NON_FINITE)}")
    return value
