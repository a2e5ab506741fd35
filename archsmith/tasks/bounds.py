"""Checks of single option values: each returns the value, or says what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from archsmith.core.errors import UserError


def whole(field: str, value: Any, *, low: int, high: int) -> int:
    """Return ``value`` as an int in ``low..high``.

    Raises:
        UserError: It is not a whole number (``True`` is none), or lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise UserError(field, value, allowed=f"a whole number from {low} to {high}")
    return int(value)


def real(field: str, value: Any, *, low: float, high: float) -> float:
    """Return ``value`` as a float in ``low..high``, both included.

    Raises:
        UserError: It is not a number (nor is NaN), or lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise UserError(field, value, allowed=f"a number from {low:g} to {high:g}")
    return float(value)


def flag(field: str, value: Any) -> bool:
    """Return ``value`` if it is ``True`` or ``False``.

    Raises:
        UserError: It is anything else.
    """
    if not isinstance(value, bool):
        raise UserError(field, value, allowed="true or false")
    return value


def one_of(field: str, value: Any, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is one of the allowed words.

    Raises:
        UserError: It is anything else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise UserError(field, value, allowed=", ".join(allowed))
    return value
