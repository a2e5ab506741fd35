"""Once-for-All's elastic MobileNetV3: the largest network, and every other one as its slices.

A child is the first channels of every expansion, the first blocks of every unit, and of every kernel the centre, passed
through a learned matrix for each step to a smaller size (7 to 5, 5 to 3), the same for all channels of a block.

Source: Cai, Gan, Wang, Zhang, Han 2020, arXiv 1908.09791.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from archsmith.families.mobile_chain_space import divisible
from archsmith.families.ofa_mobile_space import KERNELS, SQUEEZED, shape_of, squeeze_width
from archsmith.layers.ofa_mobile import OfaBlock, OfaMobileNet
from archsmith.supernet.elastic_kernel import KernelTransform, kernel_parts
from archsmith.supernet.elastic_slices import Part, SlicedAxis, SlicedChildren, Slices
from archsmith.supernet.sliced import SlicedSupernet

if TYPE_CHECKING:
    from archsmith.families.ofa_mobile import OfaMobileFamily

NORM = ("weight", "bias", "running_mean", "running_var")


class OfaMobileSupernet(SlicedSupernet[OfaMobileNet]):
    """The largest network with one active child; called, it computes the child.

    Args:
        family: Its largest network is the supernet.
        seed: Seed of the published initialisation; None leaves torch's own weights.
        kernel_transform: Whether kernels shrink through learned matrices, as published; else they are cropped.

    Attributes:
        network: The largest network; whole, whatever is active.
        transforms: The matrices of every block, which start as identities.
        active: The active child; the largest at first.
    """

    def __init__(self, family: OfaMobileFamily, *, seed: int | None = None, kernel_transform: bool = True) -> None:
        super().__init__()
        self.family = family
        self.network = family.build(family.largest(), seed=seed)
        self.transforms = nn.ModuleDict()
        parts: list[Part] = []
        for u, unit in enumerate(self.network.units):
            assert isinstance(unit, nn.Sequential)
            parts.append(SlicedChildren(f"units.{u}", (f"depth.{u}",), range))
            for b, block in enumerate(unit):
                assert isinstance(block, OfaBlock)
                conv = block.depthwise.conv
                transform = KernelTransform(KERNELS, 2, learned=kernel_transform, like=conv.weight)
                self.transforms[f"{u}-{b}"] = transform
                parts += kernel_parts(f"units.{u}.{b}.depthwise.conv", conv, f"kernel.{u}.{b}", transform)
                parts += _block_parts(f"units.{u}.{b}", block, f"{u}.{b}")
        self.begin_(family, Slices(self.network, parts))

    def sizes(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the size of everything that a child reaches, by the genes of the parts."""
        sizes: dict[str, Any] = {}
        for u, blocks in enumerate(shape_of(architecture)):
            sizes[f"depth.{u}"] = len(blocks)
            for b, (kernel, expansion) in enumerate(blocks):
                hidden = divisible(self.family.skeleton.block(u, b)[0] * expansion)
                sizes |= {f"kernel.{u}.{b}": kernel, f"hidden.{u}.{b}": hidden}
                if SQUEEZED[u]:
                    sizes[f"squeeze.{u}.{b}"] = squeeze_width(hidden)
        return sizes


def _block_parts(name: str, block: OfaBlock, at: str) -> Iterator[Part]:
    """Yield what of a block follows its expansion; ``at`` are the numbers of unit and block."""
    hidden, squeeze = f"hidden.{at}", f"squeeze.{at}"
    yield SlicedAxis(f"{name}.expand.conv.weight", 0, (hidden,), int)
    yield SlicedAxis(f"{name}.depthwise.conv.weight", 0, (hidden,), int)
    yield SlicedAxis(f"{name}.project.conv.weight", 1, (hidden,), int)
    for part in ("expand", "depthwise"):
        for leaf in NORM:
            yield SlicedAxis(f"{name}.{part}.norm.{leaf}", 0, (hidden,), int)
    if not isinstance(block.squeeze, nn.Identity):
        for leaf, rows, columns in (("reduce", squeeze, hidden), ("expand", hidden, squeeze)):
            yield SlicedAxis(f"{name}.squeeze.{leaf}.weight", 0, (rows,), int)
            yield SlicedAxis(f"{name}.squeeze.{leaf}.weight", 1, (columns,), int)
            yield SlicedAxis(f"{name}.squeeze.{leaf}.bias", 0, (rows,), int)
