"""Errors that a user can act on.

A ``UserError`` is one clear paragraph: the field, what was given, what is allowed and what to do. The command line
prints it without a traceback and exits with code 2. Everything else that escapes is a defect of archsmith.
"""

from __future__ import annotations

from typing import Any


class ArchsmithError(Exception):
    """Base of every error that archsmith raises on purpose.

    Attributes:
        told: Whether the other processes of the same run know of it, so that the first of them prints it for all.
    """

    told: bool = False


class UserError(ArchsmithError, ValueError):
    """Wrong input: names the field, what was given, what is allowed and what to do.

    Args:
        field: Name of the option, file or argument that is wrong, as the user typed or knows it.
        given: What was given; shown with ``repr`` unless it is text already prepared by the caller.
        allowed: What would have been accepted.
        hint: What to do next; names only commands and symbols that exist.

    Example:
        >>> raise UserError("budget", "macs<=0", allowed="a positive number", hint="write macs<=0.5x")
        Traceback (most recent call last):
        archsmith.core.errors.UserError: budget: got 'macs<=0'; allowed: a positive number. write macs<=0.5x
    """

    def __init__(self, field: str, given: object, *, allowed: str, hint: str = "") -> None:
        self.field = field
        self.given = given
        self.allowed = allowed
        self.hint = hint
        shown = given if isinstance(given, Shown) else repr(given)
        text = f"{field}: got {shown}; allowed: {allowed.rstrip('.')}."
        super().__init__(f"{text} {hint}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross a process boundary whole; the default would call ``__init__`` with the finished text alone."""
        return _rebuild_user_error, (type(self), self.field, self.given, self.allowed, self.hint)


def _rebuild_user_error(kind: type[UserError], field: str, given: object, allowed: str, hint: str) -> UserError:
    return kind(field, given, allowed=allowed, hint=hint)


class Shown(str):
    """Text for ``UserError.given`` that is printed as it is, without quotes."""


class MissingExtra(ArchsmithError, ImportError):
    """An optional package is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        self.purpose = purpose
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"install it with pip install 'archsmith[{extra}]'."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross a process boundary whole; the default would call ``__init__`` with the finished text alone."""
        return type(self), (self.package, self.extra, self.purpose)


class Interrupted(ArchsmithError):
    """The run was asked to stop (Ctrl-C, ``--time``); everything up to here is saved."""
