"""Networks whose operations work on one K-th of the channels: what single paths of a PC-DARTS search network are.

They exist so that a path can be taken out of a search before it has ended; what is trained in the end is an ordinary
network of the same cells.

Source: PC-DARTS, arXiv 1907.05737.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from archsmith.layers.cells import DenseCell, NasBench201Network, make_edge_operation
from archsmith.layers.darts import DartsCell, DartsNetwork, make_primitive, reduction_cells
from archsmith.layers.partial import PartialChannels


class PartialDartsNetwork(DartsNetwork):
    """A ``DartsNetwork`` whose edges work on partial channels.

    Args:
        divisor: K, which divides the channels of every cell; of C / K channels of an edge that halves, an even number.
        mixing: See ``PartialChannels``.
        arguments: Those of ``DartsNetwork``, by name.
    """

    def __init__(self, divisor: int, mixing: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.partial = {"divisor": divisor, "mixing": mixing}
        own: dict[str, Any] = self.arguments
        channels = own["channels"]
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, DartsCell)
            reduction = index in reduction_cells(len(self.cells))
            channels = 2 * channels if reduction else channels
            cell.operations = nn.ModuleList()
            for name, source in own["reduce" if reduction else "normal"]:
                stride = 2 if reduction and source < 2 else 1
                inner = make_primitive(name, channels // divisor, stride, own["affine"], self.layers, own["pool_norm"])
                cell.operations.append(PartialChannels(inner, channels, divisor, stride, mixing))

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {**self.partial, **super().constructor()}


class PartialNasBench201Network(NasBench201Network):
    """A ``NasBench201Network`` whose edges work on partial channels.

    Args:
        divisor: K, which divides the channels.
        mixing: See ``PartialChannels``.
        arguments: Those of ``NasBench201Network``, by name.
    """

    def __init__(self, divisor: int, mixing: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.partial = {"divisor": divisor, "mixing": mixing}
        for stage, cells in enumerate(self.stages):
            assert isinstance(cells, nn.ModuleList)
            channels = self.stem.out_channels * 2**stage
            for cell in cells:
                assert isinstance(cell, DenseCell)
                cell.edges = nn.ModuleList(
                    PartialChannels(
                        make_edge_operation(name, channels // divisor, self.affine), channels, divisor, 1, mixing
                    )
                    for name in self.operations
                )

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {**self.partial, **super().constructor()}
