"""Plain networks as strings of layers that grow: convolutions in blocks with pools between, then linear layers.

The space of EAS without skip connections. The start network is ``conv-4-3 pool conv-4-3 pool conv-4-3 pool conv-4-3
pool fc-8``; the last pool is the global average, the classifier is not part of the string. Needs no torch.

Source: Cai et al. 2018, "Efficient Architecture Search by Network Transformation", arXiv 1707.04873, with the lists of
the released configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Architecture, AtMost, Count, Ordinal, ProductSpace, Repeat, Value
from archsmith.space.growing import Edit, Layer, block_match, edit_numbers, next_width
from archsmith.space.values import digest_of

SMALL_WIDTHS = {"filters": tuple(range(4, 41, 4)), "units": tuple(range(8, 81, 8))}
"""Widths of the first stage of the search."""

LARGE_WIDTHS = {
    "filters": (16, 32, 64, 96, 128, 192, *range(256, 641, 64)),
    "units": tuple(range(64, 1281, 64)),
}
"""Widths of the second stage; the step of the units is a reconstruction ("64, 128, 256, ..., 1280" is published)."""

KERNELS = (1, 3, 5)


class PlainSpace(ProductSpace):
    """Strings of ``blocks`` groups of convolutions, each followed by a pool, and a group of linear layers.

    Args:
        filters: Widths of convolutions, ascending.
        units: Widths of linear layers, ascending.
        kernels: Kernel sizes of new layers.
        blocks: Groups of convolutions.
        depth: Most layers of a group; the second decision of a deepening has as many options.
        longest: Most tokens of a string, pools included.

    Decisions: ``conv<b>/count``, ``conv<b>/<i>/filters``, ``conv<b>/<i>/kernel``, ``fc/count``, ``fc/<i>/units``. It is
    a ``GrowingSpace``; in edits the group of linear layers is block number ``blocks``.

    Raises:
        UserError: A list that is empty or not ascending, or a string that is too short for the start network.
    """

    def __init__(
        self,
        *,
        filters: Sequence[int] = SMALL_WIDTHS["filters"],
        units: Sequence[int] = SMALL_WIDTHS["units"],
        kernels: Sequence[int] = KERNELS,
        blocks: int = 4,
        depth: int = 10,
        longest: int = 50,
    ) -> None:
        for field, values in (("filters", filters), ("units", units), ("kernels", kernels)):
            check_widths(f"plain.{field}", values)
        if any(kernel % 2 == 0 for kernel in kernels):
            raise UserError("plain.kernels", tuple(kernels), allowed="odd numbers")
        if blocks < 1 or depth < 1 or longest < 2 * blocks + 1:
            given = {"blocks": blocks, "depth": depth, "longest": longest}
            raise UserError("plain", given, allowed="blocks and depth from 1, and longest from 2 * blocks + 1")
        self.filters, self.units, self.kernels = tuple(filters), tuple(units), tuple(kernels)
        self.blocks, self.depth, self.longest = blocks, depth, longest
        self.heads: tuple[int, ...] = (blocks + 1, depth, len(self.kernels))
        convs = [f"conv-{width}-{kernel}" for width in self.filters for kernel in self.kernels]
        self.vocabulary = (*convs, *(f"fc-{width}" for width in self.units), "pool")
        conv = {"filters": Ordinal(self.filters), "kernel": Ordinal(self.kernels)}
        elements = {f"conv{block}": Repeat(Count(1, depth), conv) for block in range(blocks)}
        elements["fc"] = Repeat(Count(1, depth), {"units": Ordinal(self.units)})
        fits = (blocks + 1) * depth + blocks <= longest
        limit = [] if fits else [AtMost([f"{name}/count" for name in elements], longest - blocks)]
        settings = self.settings()
        published = settings == {**DEFAULTS}
        name = "plain" if published else f"plain-{digest_of(settings)[:8]}"
        super().__init__(name, elements, constraints=limit)

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, lists for tuples, as plain JSON."""
        lists = {name: list(getattr(self, name)) for name in ("filters", "units", "kernels")}
        return {**lists, "blocks": self.blocks, "depth": self.depth, "longest": self.longest}

    def layers(self, architecture: Mapping[str, Value]) -> list[list[Layer]]:
        """Return the layers of each block, the linear ones (of kind None) last."""
        found = []
        for block in range(self.blocks):
            name = f"conv{block}"
            rows = range(_int(architecture[f"{name}/count"]))
            found.append(
                [
                    Layer(_int(architecture[f"{name}/{i}/filters"]), _int(architecture[f"{name}/{i}/kernel"]))
                    for i in rows
                ]
            )
        found.append([Layer(_int(architecture[f"fc/{i}/units"])) for i in range(_int(architecture["fc/count"]))])
        return found

    def of_layers(self, layers: Sequence[Sequence[Layer]]) -> Architecture:
        """Return the architecture of layers by block, as ``layers`` returns them.

        Raises:
            UserError: It is not in the space.
        """
        return self.validate(self._decisions(layers))

    def _decisions(self, layers: Sequence[Sequence[Layer]]) -> dict[str, Value]:
        decisions: dict[str, Value] = {}
        for block, rows in enumerate(layers):
            name = f"conv{block}" if block < self.blocks else "fc"
            decisions[f"{name}/count"] = len(rows)
            for i, layer in enumerate(rows):
                if block < self.blocks:
                    decisions |= {f"{name}/{i}/filters": layer.width, f"{name}/{i}/kernel": layer.kind}
                else:
                    decisions[f"{name}/{i}/units"] = layer.width
        return decisions

    def start(self) -> Architecture:
        """Return the start network: one layer in each block, the narrowest, with 3x3 kernels where there are such."""
        kernel = 3 if 3 in self.kernels else self.kernels[0]
        return self.of_layers([*[[Layer(self.filters[0], kernel)]] * self.blocks, [Layer(self.units[0])]])

    def tokens(self, architecture: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the string of an architecture."""
        words: list[str] = []
        for block, rows in enumerate(self.layers(architecture)):
            if block < self.blocks:
                words += [*(f"conv-{layer.width}-{layer.kind}" for layer in rows), "pool"]
            else:
                words += [f"fc-{layer.width}" for layer in rows]
        return tuple(words)

    def from_tokens(self, tokens: Sequence[str]) -> Architecture:
        """Return the architecture of a string.

        Raises:
            UserError: It is no string of this space.
        """
        blocks: list[list[Layer]] = [[]]
        for token in tokens:
            kind, *numbers = token.split("-")
            if token == "pool":
                blocks.append([])
            elif kind == "conv" and len(numbers) == 2 and all(n.isdigit() for n in numbers):
                blocks[-1].append(Layer(int(numbers[0]), int(numbers[1])))
            elif kind == "fc" and len(numbers) == 1 and numbers[0].isdigit():
                blocks[-1].append(Layer(int(numbers[0])))
            else:
                raise UserError("token", token, allowed="conv-<filters>-<kernel>, fc-<units> or pool")
        kinds = [{layer.kind is None for layer in rows} for rows in blocks]
        if len(blocks) != self.blocks + 1 or kinds != [{False}] * self.blocks + [{True}]:
            raise UserError(
                "tokens",
                " ".join(tokens),
                allowed=f"{self.blocks} groups of convolutions with a pool behind each, then fc",
            )
        return self.of_layers(blocks)

    def widenings(
        self, architecture: Mapping[str, Value], widths: Mapping[str, Sequence[int]] | None = None
    ) -> list[Edit | None]:
        """Return for each token the edit to the next larger width; see ``GrowingSpace``.

        Args:
            architecture: What grows.
            widths: Lists "filters" and "units" in place of the space's own.
        """
        lists = {"filters": self.filters, "units": self.units, **(widths or {})}
        edits: list[Edit | None] = []
        for block, rows in enumerate(self.layers(architecture)):
            for i, layer in enumerate(rows):
                wider = next_width(layer.width, lists["filters" if block < self.blocks else "units"])
                edits.append(None if wider is None else ("widen", block, i, wider))
            if block < self.blocks:
                edits.append(None)
        return edits

    def deepening_mask(self, architecture: Mapping[str, Value], chosen: Sequence[int]) -> list[bool] | None:
        """Return the options of the next decision: the block, the layer in it, the kernel (convolutions only)."""
        depths = [_int(architecture[f"conv{block}/count"]) for block in range(self.blocks)]
        depths.append(_int(architecture["fc/count"]))
        if len(chosen) == 0:
            room = sum(depths) + self.blocks < self.longest
            return [room and depth < self.depth for depth in depths]
        if len(chosen) == 1:
            return [i < depths[chosen[0]] for i in range(self.depth)]
        return None if chosen[0] == self.blocks else [True] * len(self.kernels)

    def deepening(self, architecture: Mapping[str, Value], chosen: Sequence[int]) -> Edit:
        """Return the edit of complete decisions; the third one counts for convolutions only."""
        block, layer = chosen[:2]
        return ("deepen", block, layer) if block == self.blocks else ("deepen", block, layer, self.kernels[chosen[2]])

    def settling(self, architecture: Mapping[str, Value]) -> list[Edit]:
        """Return nothing: here no edit follows from others."""
        return []

    def edited(self, architecture: Mapping[str, Value], edits: Sequence[Edit]) -> dict[str, Value]:
        """Return the decisions after edits without asking whether they are in the space.

        Raises:
            UserError: An edit that is none, or a layer that does not exist or would shrink.
        """
        layers = self.layers(architecture)
        for edit in edits:
            apply_edit_(layers, edit)
        return self._decisions(layers)

    def grown(self, architecture: Mapping[str, Value], edits: Sequence[Edit]) -> Architecture:
        """Return the architecture after edits.

        Raises:
            UserError: An edit that is none, a layer that does not exist or would shrink, or a width outside the space.
        """
        return self.validate(self.edited(architecture, edits))

    def match(self, parent: Mapping[str, Value], child: Mapping[str, Value]) -> tuple[Edit, ...] | None:
        """Return edits that lead from one architecture to another, None when growing cannot."""
        return matched(self.layers(parent), self.layers(child))


DEFAULTS: dict[str, Any] = {
    "filters": list(SMALL_WIDTHS["filters"]),
    "units": list(SMALL_WIDTHS["units"]),
    "kernels": list(KERNELS),
    "blocks": 4,
    "depth": 10,
    "longest": 50,
}
"""Settings of the published space."""


def apply_edit_(layers: list[list[Layer]], edit: Edit) -> None:
    """Change layers by block as an edit says.

    Raises:
        UserError: An edit that is none, or a layer that does not exist or would shrink.
    """
    what, numbers = edit[0], edit_numbers(edit)
    if what not in ("widen", "deepen") or len(numbers) not in (2, 3):
        raise UserError("edit", edit, allowed="('widen', block, layer, width) or ('deepen', block, layer[, kernel])")
    block, at = numbers[:2]
    if not (0 <= block < len(layers) and 0 <= at < len(layers[block])):
        raise UserError("edit", edit, allowed=f"a layer of blocks with {[len(rows) for rows in layers]} layers")
    old = layers[block][at]
    last = numbers[2] if len(numbers) == 3 else None
    if what == "widen":
        if last is None or last < old.width:
            raise UserError("edit", edit, allowed=f"a width of at least {old.width}, which the layer has")
        layers[block][at] = Layer(last, old.kind)
    else:
        if (last is None) != (old.kind is None):
            raise UserError("edit", edit, allowed="a kernel size behind convolutions, none behind other layers")
        layers[block].insert(at + 1, Layer(old.width, last))


def matched(parent: Sequence[Sequence[Layer]], child: Sequence[Sequence[Layer]]) -> tuple[Edit, ...] | None:
    """Return the edits of all blocks (``archsmith.space.growing.block_match``), None when one has none."""
    found: list[Edit] = []
    for block, (before, after) in enumerate(zip(parent, child, strict=True)):
        edits = block_match(block, before, after)
        if edits is None:
            return None
        found += edits
    return tuple(found)


def check_widths(field: str, widths: Sequence[int]) -> None:
    """Refuse a list that is empty, not ascending, or not of positive integers.

    Raises:
        UserError: So it is.
    """
    rises = all(first < second for first, second in itertools.pairwise(widths))
    if not widths or not rises or not all(isinstance(width, int) and width > 0 for width in widths):
        raise UserError(field, tuple(widths), allowed="positive integers, ascending")


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value
