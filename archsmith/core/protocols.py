"""What lower rooms may ask of upper ones: an executor, a store and a logger, handed in as arguments.

A room below ``run`` never imports it. Where it needs something carried out elsewhere, kept, or written down, its
function takes one of these, and anything of the right shape will do: a ``ThreadPoolExecutor``, a ``dict``, a ``Run``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Executor(Protocol):
    """Carries out calls, here or elsewhere; every ``concurrent.futures.Executor`` is one.

    ``submit`` returns at once. The future's result is the function's, or its exception. No order is promised.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedule ``fn(*args, **kwargs)`` and return its future."""
        ...


@runtime_checkable
class Store(Protocol):
    """Keeps bytes under names; a ``dict`` is the simplest one.

    After ``store[name] = data`` returns, ``store[name]`` equals ``data`` until it is set again; a name never set raises
    ``KeyError``.
    """

    def __contains__(self, name: object, /) -> bool:
        """Return whether ``name`` was set."""
        ...

    def __getitem__(self, name: str, /) -> bytes:
        """Return the bytes kept under ``name``."""
        ...

    def __setitem__(self, name: str, data: bytes, /) -> None:
        """Keep ``data`` under ``name``, replacing what was there."""
        ...


@runtime_checkable
class Logger(Protocol):
    """Writes down what happened, durably and in order; ``archsmith.run.directory.Run`` is one.

    ``record`` returns when the event is safe. ``events`` returns what was recorded, oldest first, each a dict with the
    key ``kind`` beside the recorded fields.
    """

    def record(self, kind: str, **fields: Any) -> None:
        """Write down one event; ``fields`` are JSON values."""
        ...

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events of one kind, or all of them."""
        ...
