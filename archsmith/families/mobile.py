"""Mixed-kernel mobile networks: the family that AtomNAS searches.

A point of the space says how many atoms each kernel size has in each block; the family builds the network, names its
removable atoms with their exact costs, and knows the published supernets and networks.

Source: AtomNAS, arXiv 1912.09640.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from archsmith.atoms.groups import AtomBlock, AtomGroup, Atoms, Constant, Slot
from archsmith.core.errors import UserError
from archsmith.families.mobile_published import NETWORKS, SUPERNETS, SupernetRow
from archsmith.layers.mobile import ChannelShift, MixedInvertedResidual, MobileNet
from archsmith.space import Architecture, AtLeast, Count, ProductSpace

FAMILIES = (
    {
        "name": "mobile",
        "title": "Mixed-kernel inverted residual networks (AtomNAS, MobileNetV2, ProxylessNAS cells)",
        "task": "images",
    },
)

_ACTIVATIONS: dict[Any, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "swish"}

SMALLEST_MAP = 4
"""Side of the last feature map below which strides are dropped, in pixels."""


@dataclass(frozen=True)
class BlockPlan:
    """One block of the supernet: output channels, stride, ``(kernel, atoms)`` pairs, expansion, searched or not."""

    out_channels: int
    stride: int
    atoms: tuple[tuple[int, int], ...]
    expand: bool
    searched: bool


@dataclass(frozen=True, kw_only=True)
class MobileFamily:
    """Networks of mixed-kernel inverted residual blocks for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        stem_channels: Width of the stem.
        stem_stride: Its stride.
        plan: The blocks of the largest network, in order.
        last_channels: Width of the last 1x1 convolution.
        squeeze_ratio: Squeeze-and-excitation width relative to a block's input, 0 for none.
        activation: "relu", "relu6" or "swish".
        dropout: Drop probability in front of the classifier.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of the running statistics.

    Build one with ``mobile_family(preset, image=..., num_classes=...)``.
    """

    image: tuple[int, int, int]
    num_classes: int
    stem_channels: int
    stem_stride: int
    plan: tuple[BlockPlan, ...]
    last_channels: int
    squeeze_ratio: float = 0.0
    activation: str = "relu"
    dropout: float = 0.2
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01

    @property
    def space(self) -> ProductSpace:
        """The space: dimension ``blocks/<i>/k<kernel>`` counts atoms; blocks without a residual keep at least one."""
        dimensions: dict[str, Count] = {}
        constraints = []
        for index, block in enumerate(self.plan):
            if not block.searched:
                continue
            paths = [f"blocks/{index}/k{kernel}" for kernel, _ in block.atoms]
            dimensions.update({path: Count(0, atoms) for path, (_, atoms) in zip(paths, block.atoms, strict=True)})
            if not self._residual(index):
                constraints.append(AtLeast(paths, 1))
        return ProductSpace("mobile", dimensions, constraints=constraints)

    def largest(self) -> Architecture:
        """Return the architecture with every atom alive: the supernet."""
        return self._architecture({index: dict(block.atoms) for index, block in enumerate(self.plan)})

    def smallest(self) -> Architecture:
        """Return the cheapest valid architecture: dead blocks where there is a residual, else one 3x3-most atom."""
        counts: dict[int, dict[int, int]] = {}
        for index, block in enumerate(self.plan):
            first = min(kernel for kernel, _ in block.atoms)
            counts[index] = {} if self._residual(index) else {first: 1}
        return self._architecture(counts)

    def scaled(self, ratio: float, factors: Mapping[str, float] | None = None) -> Architecture:
        """Return the network with every searched branch scaled: ``round(ratio * factor * atoms)`` atoms.

        Args:
            ratio: Common factor, 0 or more.
            factors: A factor for each path of the space. Branches and blocks may then die, where they are allowed to;
                without factors the network is scaled uniformly and every branch keeps at least one atom.
        """
        counts: dict[int, dict[int, int]] = {}
        for index, block in enumerate(self.plan):
            own = {k: 1.0 if factors is None else factors.get(f"blocks/{index}/k{k}", 1.0) for k, _ in block.atoms}
            least = 1 if factors is None else 0
            counts[index] = {k: min(n, max(least, round(ratio * own[k] * n))) for k, n in block.atoms}
            if not any(counts[index].values()) and not self._residual(index):
                counts[index][max(own, key=own.__getitem__)] = 1
        return self._architecture(counts)

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> MobileNet:
        """Return the network of a point of the space.

        Args:
            architecture: Decisions by path, all dimensions present.
            seed: Seed of the published initialisation; None leaves torch's own (for weights that are loaded next).
        """
        blocks = []
        for index, block in enumerate(self.plan):
            atoms = block.atoms
            if block.searched:
                counted = [(kernel, int(architecture[f"blocks/{index}/k{kernel}"])) for kernel, _ in block.atoms]
                atoms = tuple((kernel, count) for kernel, count in counted if count)
            blocks.append((block.out_channels, block.stride, atoms, block.expand))
        network = MobileNet(
            in_channels=self.image[0],
            num_classes=self.num_classes,
            stem_channels=self.stem_channels,
            stem_stride=self.stem_stride,
            blocks=tuple(blocks),
            last_channels=self.last_channels,
            squeeze_ratio=self.squeeze_ratio,
            activation=self.activation,
            dropout=self.dropout,
            norm_eps=self.norm_eps,
            norm_momentum=self.norm_momentum,
        )
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def architecture_of(self, network: MobileNet) -> Architecture:
        """Return the point of the space that ``network`` is, read from its weights."""
        return self._architecture({i: dict(block.atoms()) for i, block in enumerate(network.inverted_residuals())})

    def kept(self, atoms: Atoms, keep: Mapping[str, torch.Tensor]) -> Architecture:
        """Return the architecture that is left of a network with these ``atoms`` when only ``keep`` stays."""
        counts: dict[int, dict[int, int]] = {}
        for group in atoms:
            _, index, _, key = group.name.split(".")
            counts.setdefault(int(index), {})[int(key.removeprefix("k"))] = int(keep[group.name].sum())
        return self._architecture(counts)

    def atoms(self, network: MobileNet) -> Atoms:
        """Return the removable units of ``network`` with their exact costs for this image size.

        An atom of kernel k costs ``H W C + H' W' (k^2 + C')`` MACs and ``C + k^2 + C' + 4`` parameters (two more
        ``C``-vectors and gates with squeeze-and-excitation). The cost depends on no other atom, because inputs and
        outputs of blocks are never cut. Blocks that are not searched have no units here.
        """
        side = _halved(self.image[1:], self.stem_stride)
        channels = self.stem_channels
        groups: list[AtomGroup] = []
        blocks: list[AtomBlock] = []
        for index, (plan, block) in enumerate(zip(self.plan, network.inverted_residuals(), strict=True)):
            after = _halved(side, plan.stride)
            if plan.searched:
                hidden = round(self.squeeze_ratio * channels)
                owned = _block_groups(f"blocks.{index}", block, channels, plan.out_channels, side, after, hidden)
                groups += owned
                blocks.append(
                    AtomBlock(
                        name=f"blocks.{index}",
                        groups=tuple(group.name for group in owned),
                        minimum=0 if block.residual else 1,
                        norm=f"blocks.{index}.norm",
                        norm_eps=self.norm_eps,
                        cost={"params": plan.out_channels + hidden, "macs": 0},
                    )
                )
            side, channels = after, plan.out_channels
        return Atoms(tuple(groups), tuple(blocks))

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        plan = [[b.out_channels, b.stride, [list(a) for a in b.atoms], b.expand, b.searched] for b in self.plan]
        return {"name": "mobile", **fields, "image": list(self.image), "plan": plan}

    def _residual(self, index: int) -> bool:
        before = self.stem_channels if index == 0 else self.plan[index - 1].out_channels
        return self.plan[index].stride == 1 and before == self.plan[index].out_channels

    def _architecture(self, counts: Mapping[int, Mapping[int, int]]) -> Architecture:
        decisions = {
            f"blocks/{index}/k{kernel}": int(counts.get(index, {}).get(kernel, 0))
            for index, block in enumerate(self.plan)
            if block.searched
            for kernel, _ in block.atoms
        }
        return Architecture(decisions, space="mobile")


def family_from_json(data: Mapping[str, Any]) -> MobileFamily:
    """Return the family that ``MobileFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "plan", "image")}
    plan = tuple(
        BlockPlan(out, stride, tuple((k, n) for k, n in atoms), expand, searched)
        for out, stride, atoms, expand, searched in data["plan"]
    )
    channels, height, width = data["image"]
    return MobileFamily(image=(channels, height, width), plan=plan, **fields)


def mobile_family(
    preset: str = "auto",
    *,
    image: tuple[int, int, int],
    num_classes: int,
    rows: tuple[SupernetRow, ...] | None = None,
    stem_channels: int | None = None,
    last_channels: int | None = None,
    **settings: Any,
) -> MobileFamily:
    """Return the family of a preset for one image size.

    Args:
        preset: A name of ``SUPERNETS``, or "auto": "tiny" below 24 pixels, "small" below 96, else "atomnas-c".
        image: (C, H, W).
        num_classes: Number of classes.
        rows: Instead of the preset's rows: ``(expansion, out_channels, repeats, first stride, kernels)``. A branch has
            ``round(expansion * in_channels)`` atoms; expansion 1 means no expansion and no search.
        stem_channels: Instead of the preset's.
        last_channels: Instead of the preset's.
        settings: ``squeeze_ratio``, ``activation``, ``dropout``, ``norm_eps``, ``norm_momentum``. The presets for small
            images have ``norm_momentum`` 0.1, because their runs have few steps; the published one is 0.01.

    The first strides (stem, then stages in order) are dropped until the last map is at least 4x4 pixels.

    Raises:
        UserError: Unknown preset, or an image so small that no stride is left and the map still is below 4x4.
    """
    size = min(image[1:])
    if preset == "auto":
        preset = "tiny" if size < 24 else "small" if size < 96 else "atomnas-c"
    if preset not in SUPERNETS:
        raise UserError(
            "family.preset", preset, allowed=", ".join(["auto", *SUPERNETS]), hint="See archsmith families."
        )
    chosen = SUPERNETS[preset]
    rows = rows if rows is not None else chosen["rows"]
    stem_stride, strides = fit_strides([2, *(row[3] for row in rows)], image)
    channels = stem = stem_channels or chosen["stem_channels"]
    plan: list[BlockPlan] = []
    for (expansion, out_channels, repeats, _, kernels), first in zip(rows, strides, strict=True):
        for repeat in range(repeats):
            atoms = tuple((kernel, round(expansion * channels)) for kernel in kernels)
            searched = expand = expansion != 1
            plan.append(BlockPlan(out_channels, first if repeat == 0 else 1, atoms, expand, searched))
            channels = out_channels
    return MobileFamily(
        image=image,
        num_classes=num_classes,
        stem_channels=stem,
        stem_stride=stem_stride,
        plan=tuple(plan),
        last_channels=last_channels or chosen["last_channels"],
        **{**chosen.get("settings", {}), **settings},
    )


def published_network(
    name: str, *, image: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000, seed: int | None = None
) -> MobileNet:
    """Return a published network with fresh weights.

    Args:
        name: "AtomNAS-A", "-B", "-C", or one with "+" (swish and squeeze-and-excitation everywhere, dropout 0.28).
        image: (C, H, W).
        num_classes: Number of classes.
        seed: Seed of the initialisation, None for torch's own.

    Raises:
        UserError: Unknown name.
    """
    family = published_family(name, image=image, num_classes=num_classes)
    return family.build(family.largest(), seed=seed)


def published_family(name: str, *, image: tuple[int, int, int], num_classes: int) -> MobileFamily:
    """Return the family whose largest member is the published network called ``name``."""
    plus = name.endswith("+")
    if name.removesuffix("+") not in NETWORKS:
        allowed = ", ".join(n + sign for n in NETWORKS for sign in ("", "+"))
        raise UserError("network", name, allowed=allowed)
    table = NETWORKS[name.removesuffix("+")]
    stem_stride, strides = fit_strides([2, *(row[1] for row in table["blocks"])], image)
    plan = tuple(
        BlockPlan(out, stride, tuple(zip(kernels, atoms, strict=True)), expand, expand)
        for (out, _, kernels, atoms, expand), stride in zip(table["blocks"], strides, strict=True)
    )
    plus_settings: dict[str, Any] = {"squeeze_ratio": 0.5, "activation": "swish", "dropout": 0.28} if plus else {}
    return MobileFamily(
        image=image,
        num_classes=num_classes,
        stem_channels=table["stem_channels"],
        stem_stride=stem_stride,
        plan=plan,
        last_channels=table["last_channels"],
        **plus_settings,
    )


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> MobileFamily:
    """Return the family called ``name`` ("mobile") for a task's images."""
    if name != "mobile":
        raise UserError("family", name, allowed="mobile", hint="See archsmith families.")
    return mobile_family(image=image, num_classes=num_classes, **settings)


def fit_strides(strides: list[int], image: tuple[int, int, int]) -> tuple[int, list[int]]:
    """Return (stem stride, the others) with the first strides set to 1 until the last map is at least 4x4.

    Raises:
        UserError: Even without strides the map is smaller than 4x4.
    """
    if min(image[1:]) < SMALLEST_MAP:
        raise UserError(
            "image size",
            f"{image[1]}x{image[2]}",
            allowed=f"at least {SMALLEST_MAP}x{SMALLEST_MAP} pixels",
            hint="Resize the images (task option resolution).",
        )
    fitted = list(strides)
    for position, stride in enumerate(strides):
        side: tuple[int, ...] = image[1:]
        for kept in fitted:
            side = _halved(side, kept)
        if min(side) >= SMALLEST_MAP:
            break
        if stride > 1:
            fitted[position] = 1
    return fitted[0], fitted[1:]


def initialise_(network: nn.Module, generator: torch.Generator) -> None:
    """Initialise as published: convolutions N(0, sqrt(2 / fan_out)), linear U(+-1/sqrt(out)), normalisation 1 and 0.

    A depthwise convolution's fan-out is ``k^2``.
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                module.weight.normal_(0.0, (2.0 / fan_out) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = module.out_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()


def collapse_(block: nn.Module) -> None:
    """Turn a block that lost its atoms into one that adds its normalisation's bias; that parameter lives on."""
    assert isinstance(block, MixedInvertedResidual)
    bias = block.norm.bias
    assert isinstance(bias, nn.Parameter)
    shift = ChannelShift(len(bias))
    shift.bias = bias
    shift.train(block.training)
    block.norm = shift
    block.squeeze = None


def _halved(side: tuple[int, ...], stride: int) -> tuple[int, ...]:
    return tuple(-(-length // stride) for length in side)


def _block_groups(
    name: str,
    block: MixedInvertedResidual,
    channels: int,
    out_channels: int,
    side: tuple[int, ...],
    after: tuple[int, ...],
    hidden: int,
) -> list[AtomGroup]:
    """Return one group for each living kernel size of a block."""
    groups: list[AtomGroup] = []
    offset = 0
    for (key, branch), (kernel, size) in zip(block.branches.named_children(), block.atoms(), strict=True):
        path = f"{name}.branches.{key}"
        slots = [
            Slot(f"{path}.expand.conv.weight", 0),
            *(Slot(f"{path}.expand.norm.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")),
            Slot(f"{path}.depthwise.weight", 0),
            *(Slot(f"{path}.norm.{leaf}", 0) for leaf in ("weight", "bias", "running_mean", "running_var")),
            Slot(f"{path}.project.weight", 1),
        ]
        macs = side[0] * side[1] * channels + after[0] * after[1] * (kernel**2 + out_channels)
        params = channels + kernel**2 + out_channels + 4
        constant = Constant(
            shift=f"{path}.norm.bias",
            activation=_ACTIVATIONS[type(branch.activation)],
            weight=f"{path}.project.weight",
            running_mean=f"{name}.norm.running_mean",
        )
        if hidden:
            slots += [
                Slot(f"{name}.squeeze.reduce.weight", 1, offset=offset),
                Slot(f"{name}.squeeze.expand.weight", 0, offset=offset),
                Slot(f"{name}.squeeze.expand.bias", 0, offset=offset),
            ]
            macs += 2 * hidden
            params += 2 * hidden + 1
        groups.append(
            AtomGroup(
                name=path,
                block=name,
                size=size,
                scale=f"{path}.norm.weight",
                slots=tuple(slots),
                cost={"macs": macs, "params": params},
                constant=None if hidden else constant,  # behind a gate the dead unit's output is no constant
            )
        )
        offset += size
    return groups
