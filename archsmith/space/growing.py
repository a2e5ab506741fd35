"""Spaces whose networks grow: an architecture is a string of layers, and edits make a larger one of it.

An *edit* is a plain tuple, so that a trial can carry it: ``("widen", block, layer, width)`` gives a layer more outputs,
``("deepen", block, layer, ...)`` puts a new one behind it; spaces may have further ones. Who searches sees tokens and
masked decisions, who trains sees edits and transforms the weights accordingly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture
from archsmith.space.values import Value

Edit = tuple[Value, ...]


@runtime_checkable
class GrowingSpace(Protocol):
    """What a search by growing asks of a space, beside what ``Space`` has.

    Attributes:
        name: Name of the space.
        vocabulary: Every token that a string may have; its code is its position from 1, 0 is padding.
        longest: Largest number of tokens of a string.
        heads: Numbers of options of the decisions that make a deepening: (block, layer, ...).
    """

    name: str
    vocabulary: tuple[str, ...]
    longest: int
    heads: tuple[int, ...]

    def start(self) -> Architecture:
        """Return the network that growing starts from."""
        ...

    def tokens(self, architecture: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the string of an architecture: its layers in order, without the classifier."""
        ...

    def widenings(
        self, architecture: Mapping[str, Value], widths: Mapping[str, Sequence[int]] | None = None
    ) -> list[Edit | None]:
        """Return for each token the edit to the next larger width, None where there is none.

        Args:
            architecture: What grows.
            widths: Lists to use in place of the space's own, by kind of layer.
        """
        ...

    def deepening_mask(self, architecture: Mapping[str, Value], chosen: Sequence[int]) -> list[bool] | None:
        """Return which options the next decision of a deepening has, None when it is not to be made.

        Args:
            architecture: What grows.
            chosen: Decisions made so far, fewer than ``heads``. A mask without a True means that nothing can be added.
        """
        ...

    def deepening(self, architecture: Mapping[str, Value], chosen: Sequence[int]) -> Edit:
        """Return the edit of complete decisions."""
        ...

    def settling(self, architecture: Mapping[str, Value]) -> list[Edit]:
        """Return the edits that follow from the others and are due at their end; mostly none."""
        ...

    def edited(self, architecture: Mapping[str, Value], edits: Sequence[Edit]) -> dict[str, Value]:
        """Return the decisions after edits without asking whether they are in the space, for steps on the way.

        Raises:
            UserError: An edit that is none.
        """
        ...

    def grown(self, architecture: Mapping[str, Value], edits: Sequence[Edit]) -> Architecture:
        """Return the architecture after edits.

        Raises:
            UserError: An edit that is none, or leads out of the space.
        """
        ...

    def match(self, parent: Mapping[str, Value], child: Mapping[str, Value]) -> tuple[Edit, ...] | None:
        """Return edits that lead from one architecture to another, None when growing cannot."""
        ...


class Layer(NamedTuple):
    """A layer of a block: its width and what may not change by growing (a kernel size, or None)."""

    width: int
    kind: Value = None


def block_match(block: int, parent: Sequence[Layer], child: Sequence[Layer]) -> list[Edit] | None:
    """Return edits that grow the layers of one block into others, None when there are none.

    Every parent layer becomes a child layer of its kind that is not narrower, in order, the first one the first. The
    others are new and descend from the parent layer before them, so they are not narrower than that one was. Each is
    made as late as possible: its ancestor is widened first, as far as all layers between them are wide.

    Args:
        block: Number of the block in the edits.
        parent: Its layers now.
        child: Its layers afterwards.
    """

    @cache
    def aligned(at: int, used: int) -> tuple[bool, ...] | None:
        """Return for the child's layers from ``at`` whether each is a parent layer, ``used`` of which came before."""
        if at == len(child):
            return () if used == len(parent) else None
        if used < len(parent) and parent[used].kind == child[at].kind and parent[used].width <= child[at].width:
            rest = aligned(at + 1, used + 1)
            if rest is not None:
                return (True, *rest)
        if used and parent[used - 1].width <= child[at].width and (rest := aligned(at + 1, used)) is not None:
            return (False, *rest)
        return None

    olds = aligned(0, 0)
    if olds is None:
        return None
    edits: list[Edit] = []
    widths: list[int] = []  # of the child's layers so far
    starts = [at for at, old in enumerate(olds) if old]
    for layer, start, end in zip(parent, starts, [*starts[1:], len(child)], strict=True):
        width, made = layer.width, list[int]()
        for at in range(end - 1, start, -1):  # the last one, which is behind the narrowest, first
            wider = min(new.width for new in child[start : at + 1])
            if width < wider:
                edits.append(("widen", block, start, width := wider))
            kind = child[at].kind
            edits.append(("deepen", block, start) if kind is None else ("deepen", block, start, kind))
            made.append(width)
        widths += [width, *reversed(made)]
    return edits + [("widen", block, at, new.width) for at, new in enumerate(child) if widths[at] < new.width]


def edit_numbers(edit: Edit) -> tuple[int, ...]:
    """Return what follows the name of an edit.

    Raises:
        UserError: Something that is no integer.
    """
    numbers = tuple(number for number in edit[1:] if isinstance(number, int) and not isinstance(number, bool))
    if len(numbers) < len(edit) - 1:
        raise UserError("edit", edit, allowed="a name and integers")
    return numbers


def next_width(width: int, widths: Sequence[int]) -> int | None:
    """Return the next larger width of a list, None at its end."""
    return min((larger for larger in widths if larger > width), default=None)
