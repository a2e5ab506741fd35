"""Stage-wise elastic mobile networks: the family whose children BigNAS slices out of one trained network.

A point of the space is a resolution, widths, and for each stage a depth, a kernel size and an expansion. ``build``
gives the network alone, ``supernet`` the largest one, whose slices all others are.

Sources: BigNAS, arXiv 2003.11142; AttentiveNAS, arXiv 2011.09011 (preset "attentivenas").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.bignas_space import (
    NAME,
    ElasticTable,
    Rounding,
    drop_connect_rates,
    elastic_space,
    elastic_table,
    resized,
)
from archsmith.layers.bignas import BigNasNet, ResidualEverywhere
from archsmith.space import Architecture, ProductSpace

if TYPE_CHECKING:
    from archsmith.families.bignas_supernet import BigNasSupernet

FAMILIES = (
    {
        "name": "bignas",
        "title": "Stage-wise elastic mobile networks, all slices of the largest (BigNAS, AttentiveNAS)",
        "task": "images",
    },
)


@dataclass(frozen=True, kw_only=True)
class BigNasFamily:
    """Networks of one table of choices for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        table: What a genotype chooses from.
        activation: "relu", "relu6" or "swish".
        dropout: Drop probability in front of the classifier.
        drop_connect: Drop-connect rate of the whole depth, see ``drop_connect_rates``.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of the running statistics of a network that is trained alone.

    Build one with ``bignas_family(preset, image=..., num_classes=...)``.
    """

    image: tuple[int, int, int]
    num_classes: int
    table: ElasticTable
    activation: str = "swish"
    dropout: float = 0.2
    drop_connect: float = 0.2
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.activation not in ("relu", "relu6", "swish"):
            raise UserError("family.activation", self.activation, allowed="relu, relu6, swish")
        for name in ("dropout", "drop_connect"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"family.{name}", getattr(self, name), allowed="a number from 0, below 1")

    @property
    def space(self) -> ProductSpace:
        """The space of genotypes, see ``elastic_space``."""
        return elastic_space(self.table)

    def largest(self) -> Architecture:
        """Return the genotype with the last option everywhere."""
        return self._end(-1)

    def smallest(self) -> Architecture:
        """Return the genotype with the first option everywhere."""
        return self._end(0)

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None, idle: bool = False) -> BigNasNet:
        """Return the network of a genotype.

        Args:
            architecture: Decisions by path.
            seed: Seed of the published initialisation; None leaves torch's own (for weights that are loaded next).
            idle: With the projections of shortcuts that it bypasses, as the published supernets have them.
        """
        network = BigNasNet(**self.arguments(architecture), idle=idle)
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def arguments(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor arguments of a genotype's network."""
        chosen = self.table.completed(architecture)
        stages = self.table.plan(architecture)
        last, mix = self.table.head(architecture)
        return {
            "in_channels": self.image[0],
            "num_classes": self.num_classes,
            "resolution": resized(self.image, chosen["resolution"]),
            "stem_channels": chosen["stem/width"],
            "stem_stride": self.table.stem_stride,
            "stages": tuple(map(tuple, stages)),
            "last_channels": last,
            "mix_channels": mix,
            "activation": self.activation,
            "dropout": self.dropout,
            "drop_connect": self._rates(stages, chosen["stem/width"]),
            "norm_eps": self.norm_eps,
            "norm_momentum": self.norm_momentum,
        }

    def architecture_of(self, network: BigNasNet) -> Architecture:
        """Return the genotype of a network of this family."""
        arguments = network.constructor()
        values = {
            "resolution": arguments["resolution"][0],
            "stem/width": arguments["stem_channels"],
            "head/width": arguments["mix_channels"] or arguments["last_channels"],
        }
        channels = arguments["stem_channels"]
        for number, (stage, row) in enumerate(zip(arguments["stages"], self.table.stages, strict=True), start=1):
            width, _, kernel, hidden, *_ = stage[0]
            values |= {f"mb{number}/width": width, f"mb{number}/depth": len(stage), f"mb{number}/kernel": kernel}
            fitting = [e for e in row[3] if self.table.rounding(channels * e) == hidden]
            values[f"mb{number}/expansion"] = fitting[0] if fitting else row[3][0]
            channels = width
        return self.space.validate({path: values[path] for path in self.space.paths})

    def exact_costs(self, architecture: Mapping[str, Any], *, idle: bool = False) -> dict[str, int]:
        """Return "macs" (at the genotype's resolution) and "params"; nothing is built or computed.

        Args:
            architecture: Decisions by path.
            idle: See ``build``.
        """
        return self.table.costs(architecture, image=self.image, num_classes=self.num_classes, idle=idle)

    def supernet(self, *, seed: int | None = None) -> BigNasSupernet:
        """Return the largest network, whose slices are all others.

        Args:
            seed: Seed of the published initialisation; None leaves torch's own weights.
        """
        from archsmith.families.bignas_supernet import BigNasSupernet

        return BigNasSupernet(self, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        return {"name": NAME, **asdict(self), "image": list(self.image)}

    def _end(self, position: int) -> Architecture:
        choices = self.table.choices()
        return self.space.validate({path: choices[path][0][position] for path in self.space.paths})

    def _rates(self, stages: Sequence[Sequence[Any]], stem: int) -> tuple[float, ...]:
        """Return the drop-connect rate of every block: 0 where the shape changes."""
        rates = drop_connect_rates([len(stage) for stage in stages], self.drop_connect)
        channels, found = stem, []
        for (width, stride, *_), rate in zip((block for stage in stages for block in stage), rates, strict=True):
            found.append(rate if stride == 1 and channels == width else 0.0)
            channels = width
        return tuple(found)


def family_from_json(data: Mapping[str, Any]) -> BigNasFamily:
    """Return the family that ``BigNasFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image", "table")}
    table = dict(data["table"])
    table["stages"] = tuple(
        (*(tuple(options) for options in row[:4]), int(row[4]), bool(row[5])) for row in table["stages"]
    )
    for name in ("resolutions", "stem_widths", "head_widths"):
        table[name] = tuple(table[name])
    table["rounding"] = Rounding(**table["rounding"])
    channels, height, width = data["image"]
    return BigNasFamily(image=(channels, height, width), table=ElasticTable(**table), **fields)


def bignas_family(
    preset: str = "auto",
    *,
    image: tuple[int, int, int],
    num_classes: int,
    rounding: Mapping[str, Any] | None = None,
    **settings: Any,
) -> BigNasFamily:
    """Return the family of a preset for one image size.

    Args:
        preset: "bignas", "attentivenas", "small" or "tiny"; "auto" is "tiny" below 24 pixels, "small" below 96, else
            "bignas".
        image: (C, H, W).
        num_classes: Number of classes.
        rounding: Fields of ``Rounding`` that differ.
        settings: Fields of ``ElasticTable`` (``resolutions``, ``stem_widths``, ``stem_stride``, ``stages``,
            ``head_widths``, ``last_expansion``) in place of the preset's, and ``activation``, ``dropout``,
            ``drop_connect``, ``norm_eps``, ``norm_momentum``.

    Raises:
        UserError: Unknown preset, options that are no rising lists, or too small an image.
    """
    if preset == "auto":
        side = min(image[1:])
        preset = "tiny" if side < 24 else "small" if side < 96 else "bignas"
    names = ("resolutions", "stem_widths", "stem_stride", "stages", "head_widths", "last_expansion")
    changed = {name: settings.pop(name) for name in names if name in settings}
    if rounding is not None:
        changed["rounding"] = Rounding(**rounding)
    return BigNasFamily(image=image, num_classes=num_classes, table=elastic_table(preset, image, **changed), **settings)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> BigNasFamily:
    """Return the family called ``name`` ("bignas") for a task's images; settings as of ``bignas_family``."""
    if name != NAME:
        raise UserError("family", name, allowed=NAME, hint="See archsmith families.")
    return bignas_family(image=image, num_classes=num_classes, **settings)


def initialise_(network: nn.Module, generator: torch.Generator) -> None:
    """Initialise so that every block is its shortcut: the last normalisation scale of each is 0.

    Convolutions N(0, sqrt(2 / fan_out)) (of a depthwise one ``k^2``), biases 0, the classifier U(+-1/sqrt(inputs)).
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                module.weight.normal_(0.0, (2.0 / fan_out) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for module in network.modules():
            if isinstance(module, ResidualEverywhere):
                module.body.project_norm.weight.zero_()
