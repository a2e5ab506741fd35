"""The protocol of a supernet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from archsmith.space import Space


@runtime_checkable
class Supernet(Protocol):
    """A network of every architecture of a space; implementations are ``nn.Module``."""

    @property
    def space(self) -> Space:
        """The space whose architectures it holds."""

    def activate(self, architecture: Mapping[str, Any]) -> None:
        """Make this architecture's path the one that the next forward passes take.

        Raises:
            UserError: It is not of the space.
        """

    def extract(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return a network of its own with a copy of the path's weights: the same function to 1e-5.

        The supernet stays as it is, its active path included.

        Raises:
            UserError: It is not of the space.
        """

    def __call__(self, x: Tensor) -> Tensor:
        """Return the active path's output."""
