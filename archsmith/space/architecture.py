"""One point of a space: an immutable mapping from decision path to value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space.values import Value, canonical_json, digest_of, frozen_value

FORMAT_VERSION = 1

Canonical = Callable[["Architecture"], Any]


class Architecture(Mapping[str, Value]):
    """An immutable, hashable mapping path → value that knows the name of its space.

    Args:
        decisions: Value per path; numpy scalars and lists are accepted and become plain values. Paths that the space
            leaves inactive are absent.
        space: Name of the space the decisions belong to.
        canonical: Gives the canonical form, for ``network_digest``; spaces pass their own.

    Two architectures are equal when space and decisions are; 1, 1.0 and True are different values, and order does not
    count. The mapping iterates in the order of the decisions.

    Raises:
        UserError: A path is not text, or a value is not plain (see ``archsmith.space.values``).

    Example:
        >>> a = Architecture({"op": "conv", "op/kernel": 3}, space="toy")
        >>> a["op/kernel"], Architecture.from_json(a.to_json()) == a
        (3, True)
    """

    __slots__ = ("_canonical", "_decisions", "_digest", "_network_digest", "format_version", "space")

    space: str
    format_version: int
    _decisions: dict[str, Value]
    _canonical: Canonical | None
    _digest: str | None
    _network_digest: str | None

    def __init__(self, decisions: Mapping[str, Any], *, space: str, canonical: Canonical | None = None) -> None:
        frozen: dict[str, Value] = {}
        for path, value in decisions.items():
            if not isinstance(path, str):
                raise UserError("architecture", path, allowed="decision paths that are text")
            frozen[path] = frozen_value(value, f"architecture[{path!r}]")
        self._fill(frozen, space, canonical)

    @classmethod
    def of_valid(cls, decisions: dict[str, Value], *, space: str, canonical: Canonical | None) -> Architecture:
        """Return an architecture around ``decisions`` without looking at them (spaces only: they just chose them)."""
        self = cls.__new__(cls)
        self._fill(decisions, space, canonical)
        return self

    def _fill(self, decisions: dict[str, Value], space: str, canonical: Canonical | None) -> None:
        fields = {"_decisions": decisions, "space": space, "format_version": FORMAT_VERSION, "_canonical": canonical}
        for name, value in (fields | {"_digest": None, "_network_digest": None}).items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Architecture is immutable; make a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("an Architecture is immutable")

    def __getitem__(self, path: str) -> Value:
        return self._decisions[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Architecture) else NotImplemented

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)

    def __repr__(self) -> str:
        return f"Architecture({self._decisions!r}, space={self.space!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Architecture.from_json, (self.to_json(),)

    @property
    def digest(self) -> str:
        """SHA-256 over decisions, space name and format version: the same in every process and Python version."""
        if (known := self._digest) is None:
            body = {"decisions": self._decisions, "format_version": self.format_version, "space": self.space}
            object.__setattr__(self, "_digest", known := digest_of(body))
        return known

    @property
    def network_digest(self) -> str:
        """Digest of the canonical form: equal networks, equal digest, as far as the space can tell.

        The digest itself where the space has no canonical form. It survives JSON, where the function cannot follow.
        """
        if (known := self._network_digest) is None:
            form = self if self._canonical is None else self._canonical(self)
            known = form.digest if isinstance(form, Architecture) else digest_of({"format_version": 1, "network": form})
            object.__setattr__(self, "_network_digest", known)
        return known

    @property
    def decisions(self) -> Mapping[str, Value]:
        """The decisions as a read-only view of a plain dictionary."""
        return MappingProxyType(self._decisions)

    def under(self, prefix: str) -> dict[str, Value]:
        """Return the decisions below ``prefix`` ("recipe/", say), with the prefix taken off."""
        return {path[len(prefix) :]: value for path, value in self._decisions.items() if path.startswith(prefix)}

    def to_json(self) -> dict[str, Any]:
        """Return the architecture as a JSON object; ``from_json`` restores it exactly."""
        decisions = json.loads(canonical_json(list(self._decisions.items())))
        body = {"format_version": self.format_version, "space": self.space, "decisions": dict(decisions)}
        return body if self.network_digest == self.digest else body | {"network_digest": self.network_digest}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Architecture:
        """Return the architecture that ``to_json`` wrote.

        Args:
            data: The object, or its JSON text. It is not checked against a space: ``space.validate`` does that.

        Raises:
            UserError: Not such an object, or written by a newer format version.
        """
        fields = _parsed(data) if isinstance(data, str) else data
        if not isinstance(fields, Mapping) or not isinstance(fields.get("decisions"), Mapping):
            raise UserError(
                "architecture",
                data,
                allowed='an object {"format_version": 1, "space": name, "decisions": {path: value}}',
            )
        check_version("architecture", fields.get("format_version"), FORMAT_VERSION)
        if not isinstance(fields.get("space"), str):
            raise UserError("architecture.space", fields.get("space"), allowed="the name of a space")
        self = cls(fields["decisions"], space=fields["space"])
        if "network_digest" in fields:
            object.__setattr__(self, "_network_digest", str(fields["network_digest"]))
        return self


def check_version(what: str, given: object, newest: int) -> None:
    """Refuse a ``format_version`` that is missing, not a positive integer, or newer than ``newest``.

    Raises:
        UserError: Says which of these it is.
    """
    field = f"{what}.format_version"
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UserError(field, given, allowed=f"an integer from 1 to {newest}")
    if given > newest:
        raise UserError(
            field,
            given,
            allowed=f"1 to {newest}, what this archsmith reads",
            hint="It was written by a newer archsmith: upgrade archsmith to read it.",
        )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError("architecture", text[:80], allowed="JSON text", hint=f"The parser says: {error}.") from error
