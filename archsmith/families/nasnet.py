"""Networks of the NASNet space: any pair of cells, stacked for small images or for large ones.

The cells are searched; the skeleton around them is fixed and scaled by N (normal cells in each third) and F (filters of
the first cells). ``SKELETONS`` has the published settings, ``published_network`` the published networks.

Source: Zoph et al., arXiv 1707.07012, with the settings of the released networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.nasnet_space import (
    BLOCKS,
    CELLS,
    NASNET_A_OUTPUTS,
    Block,
    Genotype,
    architecture_of,
    genotype_of,
    nasnet_a,
    nasnet_space,
    unused_states,
)
from archsmith.layers.nasnet import NasnetNetwork
from archsmith.space import Architecture, ProductSpace

FAMILIES = (
    {
        "name": "nasnet",
        "title": "Two cells of five two-input blocks, stacked (NASNet)",
        "task": "images",
    },
)

SKELETONS: dict[str, dict[str, Any]] = {
    "cifar": {
        "filters": 32,
        "repeats": 6,
        "stem": "cifar",
        "stem_multiplier": 3.0,
        "final_keep": 0.6,
        "dropout": 0.0,
        "norm_eps": 1e-5,
        "norm_momentum": 0.1,
    },
    "mobile": {
        "filters": 44,
        "repeats": 4,
        "stem": "imagenet",
        "stem_multiplier": 1.0,
        "final_keep": 1.0,
        "dropout": 0.5,
        "norm_eps": 1e-3,
        "norm_momentum": 3e-4,
    },
    "large": {
        "filters": 168,
        "repeats": 6,
        "stem": "imagenet",
        "stem_multiplier": 3.0,
        "skip_reduction_input": True,
        "final_keep": 0.7,
        "dropout": 0.5,
        "norm_eps": 1e-3,
        "norm_momentum": 3e-4,
    },
    "search": {
        "filters": 32,
        "repeats": 2,
        "stem": "cifar",
        "stem_multiplier": 3.0,
        "final_keep": 1.0,
        "dropout": 0.0,
        "norm_eps": 1e-5,
        "norm_momentum": 0.1,
    },
}
"""Published settings: the final networks, and "search", the child whose accuracy is the controller's reward."""

PUBLISHED = {
    "NASNet-A 6@768": ("cifar", 10, 32),
    "NASNet-A 4@1056": ("mobile", 1000, 224),
    "NASNet-A 6@4032": ("large", 1000, 331),
}
"""Network → (skeleton, classes, resolution): "N @ filters of the last cell", which are 24 F."""

IMAGENET_STEM = 32
"""Filters of the first convolution at stem multiplier 1; the CIFAR stem has ``F`` times the multiplier."""

AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary head's loss."""


@dataclass(frozen=True, kw_only=True)
class NasnetFamily:
    """Networks of one skeleton for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        filters: F, filters of the first normal cells.
        repeats: N, normal cells in each third.
        stem: "cifar" (resolution kept) or "imagenet" (three halvings before the first normal cell).
        stem_multiplier: Width of the first convolution: times F (cifar) or times 32 (imagenet), rounded down.
        skip_reduction_input: Wiring behind a reduction, see ``archsmith.layers.nasnet.NasnetNetwork``.
        auxiliary: Whether networks have the auxiliary head (for training only).
        dropout: Drop probability in front of the classifier.
        final_keep: Final keep probability of ScheduledDropPath, 1 for none.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of the running statistics.
        blocks: Blocks of each cell.
        outputs: States that each cell concatenates, by cell. None: those that no block consumes, for each architecture
            anew (the rule of the paper's search). NASNet-A as published has ``NASNET_A_OUTPUTS``.

    Build one with ``nasnet_family(skeleton, image=..., num_classes=...)``.
    """

    image: tuple[int, int, int]
    num_classes: int
    filters: int
    repeats: int
    stem: str = "cifar"
    stem_multiplier: float = 3.0
    skip_reduction_input: bool = False
    auxiliary: bool = False
    dropout: float = 0.0
    final_keep: float = 1.0
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    blocks: int = BLOCKS
    outputs: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        least = 4 if self.stem == "imagenet" else 1
        if self.stem not in ("cifar", "imagenet"):
            raise UserError("family.stem", self.stem, allowed="'cifar' or 'imagenet'")
        if self.repeats < 1 or self.filters < least:
            given = {"repeats": self.repeats, "filters": self.filters}
            raise UserError("family", given, allowed=f"repeats from 1, filters from {least} with this stem")
        if self.outputs is not None and set(self.outputs) != set(CELLS):
            raise UserError("family.outputs", self.outputs, allowed="states for each of 'normal' and 'reduction'")
        if not 0.0 < self.final_keep <= 1.0:
            raise UserError("family.final_keep", self.final_keep, allowed="a probability in (0, 1]")

    @property
    def space(self) -> ProductSpace:
        """The space of cell pairs."""
        return nasnet_space(self.blocks)

    def largest(self) -> Architecture:
        """Return the reference of relative budgets: the most expensive architecture we can construct.

        The first block concatenates, every later one applies the convolutions of most weights to that twice as wide
        state, all of them reach the output. Sampled architectures are smaller; a proof that all are we do not have.
        """
        wide = [
            Block(min(index, 1) * 2, min(index, 1) * 2, "conv_1x7_7x1", "conv_1x7_7x1", "concat")
            for index in range(self.blocks)
        ]
        return architecture_of(Genotype(tuple(wide), tuple(wide)))

    def smallest(self) -> Architecture:
        """Return a chain of identities, which pools where the resolution halves: no other output, hardly a weight."""
        chain = [Block(index + 1, index + 1, "identity", "identity") for index in range(self.blocks)]
        pooled = Block(0, 1, "avg_pool_3x3", "avg_pool_3x3")
        return architecture_of(Genotype((Block(0, 1, "identity", "identity"), *chain[1:]), (pooled, *chain[1:])))

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> NasnetNetwork:
        """Return the network of a point of the space.

        Args:
            architecture: Decisions by path, all dimensions present.
            seed: Seed of the initialisation (``initialise_``); None leaves torch's own, for weights loaded next.
        """
        genotype = genotype_of(architecture)
        outputs = self.outputs or {
            "normal": unused_states(genotype.normal),
            "reduction": unused_states(genotype.reduction),
        }
        network = NasnetNetwork(
            in_channels=self.image[0],
            num_classes=self.num_classes,
            normal=genotype.normal,
            reduction=genotype.reduction,
            normal_outputs=outputs["normal"],
            reduction_outputs=outputs["reduction"],
            repeats=self.repeats,
            filters=self.filters,
            stem=self.stem,
            stem_channels=self.stem_channels,
            skip_reduction_input=self.skip_reduction_input,
            auxiliary_size=self.auxiliary_size if self.auxiliary else None,
            dropout=self.dropout,
            final_keep=self.final_keep,
            norm_eps=self.norm_eps,
            norm_momentum=self.norm_momentum,
        )
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def architecture_of(self, network: NasnetNetwork) -> Architecture:
        """Return the point of the space that ``network`` is."""
        arguments = network.constructor()
        cells = {cell: tuple(Block(*block) for block in arguments[cell]) for cell in CELLS}
        return architecture_of(Genotype(**cells))

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" and "params" of an architecture for this image size; nothing is computed or allocated."""
        with torch.device("meta"):
            counted = count(self.build(architecture), torch.zeros(1, *self.image))
        return {"macs": counted.macs, "params": counted.params}

    @property
    def stem_channels(self) -> int:
        """Filters of the first convolution."""
        base = self.filters if self.stem == "cifar" else IMAGENET_STEM
        return int(base * self.stem_multiplier)

    @property
    def auxiliary_size(self) -> tuple[int, int]:
        """Height and width of the map at two thirds of the depth, behind the first reduction."""
        height, width = self.image[1:]
        if self.stem == "imagenet":
            height, width = (height - 1) // 2, (width - 1) // 2
        for _ in range(3 if self.stem == "imagenet" else 1):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        outputs = None if self.outputs is None else {cell: list(states) for cell, states in self.outputs.items()}
        return {"name": "nasnet", **fields, "image": list(self.image), "outputs": outputs}


def family_from_json(data: Mapping[str, Any]) -> NasnetFamily:
    """Return the family that ``NasnetFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image", "outputs")}
    channels, height, width = data["image"]
    outputs = data["outputs"]
    return NasnetFamily(
        image=(channels, height, width),
        outputs=None if outputs is None else {cell: tuple(states) for cell, states in outputs.items()},
        **fields,
    )


def nasnet_family(
    skeleton: str = "auto", *, image: tuple[int, int, int], num_classes: int, **settings: Any
) -> NasnetFamily:
    """Return the family of a skeleton for one image size.

    Args:
        skeleton: A name of ``SKELETONS``, or "auto": "search" below 96 pixels (the child of the search), else "mobile".
        image: (C, H, W).
        num_classes: Number of classes.
        settings: Any attribute of ``NasnetFamily``, in place of the skeleton's.

    Raises:
        UserError: Unknown skeleton or setting, or a value that is not allowed.
    """
    if skeleton == "auto":
        skeleton = "search" if min(image[1:]) < 96 else "mobile"
    if skeleton not in SKELETONS:
        raise UserError("family.skeleton", skeleton, allowed=", ".join(["auto", *SKELETONS]))
    if unknown := sorted(set(settings) - set(NasnetFamily.__dataclass_fields__)):
        allowed = ", ".join(name for name in NasnetFamily.__dataclass_fields__ if name not in ("image", "num_classes"))
        raise UserError("family", unknown, allowed=f"skeleton, {allowed}")
    if (outputs := settings.get("outputs")) is not None:
        settings["outputs"] = {cell: tuple(states) for cell, states in outputs.items()}
    return NasnetFamily(image=image, num_classes=num_classes, **{**SKELETONS[skeleton], **settings})


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> NasnetFamily:
    """Return the family called ``name`` ("nasnet") for a task's images."""
    if name != "nasnet":
        raise UserError("family", name, allowed="nasnet", hint="See archsmith families.")
    return nasnet_family(image=image, num_classes=num_classes, **settings)


def published_family(name: str, **settings: Any) -> NasnetFamily:
    """Return the family whose member ``nasnet_a()`` is a published network; its cells have the published outputs.

    Args:
        name: A name of ``PUBLISHED``.
        settings: In place of the published ones: ``image``, ``num_classes``, ``filters``, ``auxiliary``, ...

    Raises:
        UserError: Unknown name.
    """
    if name not in PUBLISHED:
        raise UserError("network", name, allowed=", ".join(PUBLISHED))
    skeleton, classes, size = PUBLISHED[name]
    own: dict[str, Any] = {"image": (3, size, size), "num_classes": classes, "outputs": NASNET_A_OUTPUTS}
    return nasnet_family(skeleton, **{**own, **settings})


def published_network(name: str, *, seed: int | None = None, **settings: Any) -> NasnetNetwork:
    """Return a published network with fresh weights; arguments as for ``published_family``.

    Build it under ``torch.device("meta")`` where only its counts are wanted.
    """
    return published_family(name, **settings).build(nasnet_a(), seed=seed)


def initialise_(network: nn.Module, generator: torch.Generator) -> None:
    """Initialise convolutions N(0, 2 / fan_in), the classifiers N(0, 1 / fan_in) with bias 0, normalisations 1 and 0.

    The paper does not say how; a depthwise convolution's fan-in is ``k^2``.
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight.shape[1] * module.weight.shape[2] * module.weight.shape[3]
                module.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
