"""HyperCuboid networks: chains of operations whose widths and kinds are a path through a grid.

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900,
where a search over it is called differentiable hyper-parameter grid search.
"""

# L steps of a path, I widths in front of a step, J widths behind it, P operations

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost.latency import measure_many
from archsmith.families.hypercuboid_space import POOL_AND_CONVOLUTION, Grid, grid_widths
from archsmith.families.hypercuboid_supernet import GridNetwork, HyperCuboidSupernet, chain_arguments
from archsmith.layers.darts import DenseLayers
from archsmith.layers.hypercuboid import PathNetwork, grid_stem
from archsmith.layers.sharp import CHOKE, SHARP_CONVOLUTIONS, SharpSepConv, make_sharp_primitive, sharp_size
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.grid_paths import GridCosts, cheapest_path, dearest_path
from archsmith.supernet.mixed import Relaxation

FAMILIES = (
    {
        "name": "hypercuboid",
        "title": "Chains of operations, a path through a grid of widths and kinds (HyperCuboid)",
        "task": "images",
        "relaxed": True,
    },
)

SKELETONS: dict[str, dict[str, Any]] = {
    "cifar": {"widths": grid_widths(36, 4), "stages": 4, "filters": 768},
    "tiny": {"widths": grid_widths(8, 3), "stages": 2, "filters": 64},
}
"""Published settings; and ours for images below 24 pixels."""

OPERATIONS = ("max_pool_3x3", "avg_pool_3x3", *SHARP_CONVOLUTIONS)
"""All operations that can change the width."""


@dataclass(frozen=True, kw_only=True)
class HyperCuboidFamily:
    """Networks of one grid for one image size.

    Attributes:
        image: Shape of one image, (C, H, W), of any size.
        num_classes: Number of classes.
        widths: Channels that a path may have behind the stem and behind every step, different ones, ascending.
        stages: Stages, each a step of stride 1 and one of stride 2.
        filters: Channels of the block in front of the classifier.
        operations: What a step may be, of ``OPERATIONS``.
        choke: Middle width of choke convolutions.

    Build one with ``hypercuboid_family(skeleton, image=..., num_classes=...)``.

    Raises:
        UserError: A value that the networks cannot have.
    """

    image: tuple[int, int, int]
    num_classes: int
    widths: tuple[int, ...] = (32, 64, 128, 256)
    stages: int = 4
    filters: int = 768
    operations: tuple[str, ...] = POOL_AND_CONVOLUTION
    choke: int = CHOKE

    def __post_init__(self) -> None:
        for name in ("num_classes", "stages", "filters", "choke"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"family.{name}", value, allowed="an integer from 1")
        whole = all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in self.widths)
        if not self.widths or not whole or list(self.widths) != sorted(set(self.widths)):
            raise UserError("family.widths", self.widths, allowed="different numbers of channels from 1, ascending")
        known = [name for name in self.operations if name in OPERATIONS]
        if not known or len(set(known)) != len(self.operations):
            raise UserError("family.operations", self.operations, allowed=f"different ones of {', '.join(OPERATIONS)}")
        if min(self.image) < 1:
            raise UserError("image size", self.image, allowed="sides from 1 pixel")

    @property
    def grid(self) -> Grid:
        """What paths go through."""
        return Grid(widths=self.widths, steps=2 * self.stages, operations=self.operations)

    @property
    def space(self) -> ProductSpace:
        """The space of paths."""
        return self.grid.space()

    def largest(self) -> Architecture:
        """Return the path of most multiply-accumulates."""
        return self.grid.architecture(dearest_path(self.costs("macs")))

    def smallest(self) -> Architecture:
        """Return the path of fewest multiply-accumulates."""
        return self.grid.architecture(cheapest_path(self.costs("macs")))

    def build(
        self, architecture: Mapping[str, Any], *, seed: int | None = None, layers: DenseLayers | None = None
    ) -> PathNetwork:
        """Return the chain of a path, with torch's own initialisation.

        Args:
            architecture: Decisions by path, all present.
            seed: Seed of the initialisation; None draws from torch's global generator (for weights loaded next).
            layers: Makes convolutions and classifier; ordinary ones if None.
        """
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return PathNetwork(**self._arguments(layers), **chain_arguments(architecture))

    def relaxed(
        self,
        *,
        seed: int | None = None,
        relaxation: Relaxation | None = None,
        layers: DenseLayers | None = None,
        prune: bool = True,
        **unfit: Any,
    ) -> HyperCuboidSupernet:
        """Return the grid network: all candidates of every step, weights of their own.

        Args:
            seed: Seed of weights and logits; None draws the weights from torch's global generator.
            relaxation: From logits to mixing weights; softmax, over all candidates of a step, if None.
            layers: Makes convolutions and classifier; ordinary ones if None.
            prune: Whether candidates of probability up to 1 / N^2 are left out.
            unfit: Options that only cells have.

        Raises:
            UserError: Such an option, or a relaxation that mixes candidates otherwise than by a weighted sum.
        """
        if relaxation is not None and type(relaxation).mix is not Relaxation.mix:
            raise UserError(
                "relaxation", type(relaxation).__name__, allowed="one that takes the weighted sum, on a grid"
            )
        if unfit:
            names = ", ".join(sorted(unfit))
            raise UserError("family", "hypercuboid", allowed=f"a family of cells: its edges can have {names}")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            network = GridNetwork(
                self.image[0], self.num_classes, self.grid, self.filters, self.choke, layers or DenseLayers()
            )
        first = 0 if seed is None else seed
        return HyperCuboidSupernet(
            network, self._arguments(layers), self.grid, self.costs("macs"), relaxation, first, prune
        )

    def search_form(self, channels: int, cells: int) -> HyperCuboidFamily:
        """Return the family itself: its search network is the whole grid."""
        return self

    def final_form(self, *, auxiliary: bool) -> HyperCuboidFamily:
        """Return the family itself: its networks have no auxiliary classifier."""
        return self

    def architecture_of(self, network: PathNetwork) -> Architecture:
        """Return the point of the space that ``network`` is."""
        arguments = network.constructor()
        decisions: dict[str, Any] = {"stem/width": arguments["widths"][0]}
        for step, operation in enumerate(arguments["operations"], 1):
            decisions[f"{step}/operation"] = operation
            decisions[f"{step}/width"] = arguments["widths"][step]
        return self.space.validate(decisions)

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" (convolutions and linear layers, one image) and "params" in closed form; nothing is built."""
        path = self.grid.path(architecture)
        return {cost: round(self.costs(cost).of(path)) for cost in ("macs", "params")}

    def costs(self, cost: Literal["macs", "params"]) -> GridCosts:
        """Return what every step and both ends of a path add, in closed form."""
        macs = cost == "macs"
        pixels = [height * width for height, width in self.sizes()]
        number = 0 if macs else 1
        steps = np.zeros(self.grid.shape)
        for (step, i, j, p), _ in np.ndenumerate(steps):
            size = sharp_size(self.operations[p], self.widths[i], self.widths[j], self.choke)[number]
            steps[step, i, j, p] = size * (pixels[step + 1] if macs else 1)
        stems = [9 * self.image[0] * width * (pixels[0] if macs else 1) for width in self.widths]
        tails = [sharp_size("sep_conv_3x3", width, self.filters)[number] for width in self.widths]
        first = np.array(stems) + (0 if macs else 2 * np.array(self.widths))
        last = np.array(tails) * (pixels[-1] if macs else 1)
        classifier = self.filters * self.num_classes + (0 if macs else self.num_classes)
        return GridCosts(steps, first, last, classifier)

    def measured_times(
        self, *, device: str = "cpu", threads: int = 1, rounds: int = 10, block_ms: float = 2.0
    ) -> GridCosts:
        """Measure what every step and both ends of a path take, in milliseconds for one image.

        Each part is measured alone, interleaved with those that read the same input. The sum is close to the time of a
        path's network, no more: parts that follow each other find their input in the cache.

        Args:
            device: ``cpu`` or ``cuda``.
            threads: Threads inside operators.
            rounds: Measurements of each part, whose median counts.
            block_ms: Shortest time of one measurement.
        """
        layers, sizes = DenseLayers(), self.sizes()

        def times(parts: Mapping[str, nn.Module], channels: int, size: tuple[int, int]) -> dict[str, float]:
            inputs = torch.zeros(1, channels, *size)
            options: dict[str, Any] = {"device": device, "threads": threads, "rounds": rounds, "block_ms": block_ms}
            return {name: latency.median_ms for name, latency in measure_many(parts, inputs, **options).items()}

        stems = {str(width): grid_stem(self.image[0], width, layers) for width in self.widths}
        first = times(stems, self.image[0], sizes[0])
        steps = np.zeros(self.grid.shape)
        for step in range(len(steps)):
            for i, before in enumerate(self.widths):
                parts: dict[str, nn.Module] = {
                    f"{j} {p}": make_sharp_primitive(name, before, behind, 1 + step % 2, True, layers, self.choke)
                    for j, behind in enumerate(self.widths)
                    for p, name in enumerate(self.operations)
                }
                for name, milliseconds in times(parts, before, sizes[step]).items():
                    j, p = map(int, name.split())
                    steps[step, i, j, p] = milliseconds
        last = [
            times({"tail": SharpSepConv(width, self.filters, 3)}, width, sizes[-1])["tail"] for width in self.widths
        ]
        return GridCosts(steps, np.array(list(first.values())), np.array(last))

    def sizes(self) -> list[tuple[int, int]]:
        """Return height and width of the maps behind the stem and behind every step."""
        height, width = self.image[1:]
        sizes = [(height, width)]
        for step in range(2 * self.stages):
            if step % 2:
                height, width = -(-height // 2), -(-width // 2)
            sizes.append((height, width))
        return sizes

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        listed = {name: list(fields[name]) for name in ("image", "widths", "operations")}
        return {"name": "hypercuboid", **fields, **listed}

    def _arguments(self, layers: DenseLayers | None) -> dict[str, Any]:
        return {
            "in_channels": self.image[0],
            "num_classes": self.num_classes,
            "filters": self.filters,
            "choke": self.choke,
            "layers": layers,
        }


def family_from_json(data: Mapping[str, Any]) -> HyperCuboidFamily:
    """Return the family that ``HyperCuboidFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key != "name"}
    channels, height, width = data["image"]
    listed = {"widths": tuple(data["widths"]), "operations": tuple(data["operations"])}
    return HyperCuboidFamily(**{**fields, **listed, "image": (channels, height, width)})


def hypercuboid_family(
    skeleton: str = "auto", *, image: tuple[int, int, int], num_classes: int, **settings: Any
) -> HyperCuboidFamily:
    """Return the family of a skeleton for one image size.

    Args:
        skeleton: A name of ``SKELETONS``, or "auto": "tiny" below 24 pixels, else "cifar".
        image: (C, H, W).
        num_classes: Number of classes.
        settings: Any attribute of ``HyperCuboidFamily``, in place of the skeleton's.

    Raises:
        UserError: Unknown skeleton or setting, or a value that is not allowed.
    """
    if skeleton == "auto":
        skeleton = "tiny" if min(image[1:]) < 24 else "cifar"
    if skeleton not in SKELETONS:
        raise UserError("family.skeleton", skeleton, allowed=", ".join(["auto", *SKELETONS]))
    names = [name for name in HyperCuboidFamily.__dataclass_fields__ if name not in ("image", "num_classes")]
    if unknown := sorted(set(settings) - set(names)):
        raise UserError("family", unknown, allowed=f"skeleton, {', '.join(names)}")
    for name in ("widths", "operations"):
        if name in settings:
            settings[name] = tuple(settings[name])
    return HyperCuboidFamily(image=image, num_classes=num_classes, **{**SKELETONS[skeleton], **settings})


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> HyperCuboidFamily:
    """Return the family called ``name`` ("hypercuboid") for a task's images; settings as of ``hypercuboid_family``."""
    if name != "hypercuboid":
        raise UserError("family", name, allowed="hypercuboid", hint="See archsmith families.")
    return hypercuboid_family(image=image, num_classes=num_classes, **settings)
