"""DenseNets that grow: the EAS space with dense connections, and how weights pass to a larger network.

Source: Cai et al. 2018, "Efficient Architecture Search by Network Transformation", arXiv 1707.04873; Huang et al. 2017,
"Densely Connected Convolutional Networks", arXiv 1608.06993.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from archsmith.atoms.morphisms import widening
from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.densenet_growth import DenseWeights
from archsmith.families.densenet_space import DenseSpace
from archsmith.families.plain import check_noise, checked_edits, initialise_, split_settings
from archsmith.families.plain_growth import Tensors
from archsmith.layers.densenet import DenseNetwork
from archsmith.space import Architecture
from archsmith.space.growing import Edit, edit_numbers

FAMILIES = (
    {
        "name": "densenet",
        "title": "DenseNets of miniblocks with growth rates of their own, that grow (EAS)",
        "task": "images",
    },
)


@dataclass(frozen=True, kw_only=True)
class DenseFamily:
    """DenseNet-BC networks for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        space: The strings.
        bottleneck: Channels inside a miniblock, for each one of its growth.
        widen_noise: Noise on repeated channels when weights are inherited, in standard deviations of the weights.
        deepen_noise: The same for the weights of inserted miniblocks; 0 keeps the function exactly.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.
    """

    image: tuple[int, int, int]
    num_classes: int
    space: DenseSpace = field(default_factory=DenseSpace, compare=False)
    bottleneck: int = 4
    widen_noise: float = 0.01
    deepen_noise: float = 0.001
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    settings: Mapping[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_noise(self.widen_noise, self.deepen_noise)
        if isinstance(self.bottleneck, bool) or not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise UserError("family.bottleneck", self.bottleneck, allowed="an integer from 1")
        object.__setattr__(self, "settings", self.space.settings())

    def largest(self) -> Architecture:
        """Return the string of the largest growths; if not all fit, early blocks are filled first."""
        space = self.space
        room, counts = space.longest - space.blocks + 1 - space.blocks, []
        for _ in range(space.blocks):
            counts.append(1 + min(space.depth - 1, room))
            room -= counts[-1] - 1
        return space.of_growths([[space.growths[-1]] * number for number in counts])

    def smallest(self) -> Architecture:
        """Return the start network: one miniblock of the smallest growth in each block."""
        return self.space.start()

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> DenseNetwork:
        """Return the network of a point of the space.

        Args:
            architecture: Decisions by path.
            seed: Seed of the initialisation (``archsmith.families.plain.initialise_``); None leaves torch's own, for
                weights loaded next.
        """
        dense = self.space.dense(self.space.validate(architecture))
        network = DenseNetwork(
            in_channels=self.image[0],
            stem=dense.stem,
            growths=dense.growths,
            transitions=dense.transitions,
            num_classes=self.num_classes,
            bottleneck=self.bottleneck,
            norm_eps=self.norm_eps,
            norm_momentum=self.norm_momentum,
        )
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def architecture_of(self, network: DenseNetwork) -> Architecture:
        """Return the point of the space that ``network`` is.

        Raises:
            UserError: It is none of the space.
        """
        found = self.space.of_growths(network.growths, stem=network.stem.out_channels)
        if (expected := self.space.dense(found).transitions) != network.transition_widths:
            raise UserError(
                "network.transitions", network.transition_widths, allowed=f"{expected}, which the ratio gives"
            )
        return found

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" and "params" of an architecture for this image size; nothing is computed or allocated."""
        with torch.device("meta"):
            counted = count(self.build(architecture), torch.zeros(1, *self.image))
        return {"macs": counted.macs, "params": counted.params}

    def inherit(
        self,
        weights: Mapping[str, Tensor],
        parent: Mapping[str, Any],
        child: Mapping[str, Any],
        *,
        edits: Sequence[Edit] | None = None,
        examples: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """Return the weights of a network grown from another: in evaluation mode the same function, but for noise.

        Args:
            weights: The parent's ``state_dict``.
            parent: Its architecture.
            child: What it grows to.
            edits: How; by default ``space.match(parent, child)``.
            examples: Not needed here.
            generator: Source of the channels that are repeated and of the noise.

        Raises:
            UserError: Growing does not lead from parent to child, or the edits lead elsewhere.
        """
        edits = checked_edits(self.space, parent, child, edits)
        grown = DenseWeights(weights)
        for edit in edits:
            self._grow_(grown, edit_numbers(edit), str(edit[0]), generator)
        for block, width in enumerate(self.space.dense(child).transitions):  # what no edit said
            self._grow_(grown, (block, width), "transition", generator)
        return grown.state_dict()

    def _grow_(self, grown: DenseWeights, numbers: Sequence[int], what: str, generator: torch.Generator | None) -> None:
        noise: dict[str, Any] = {"noise": self.widen_noise, "generator": generator}
        if what == "stem":
            grown.widen_stem_(widening(grown.widths(0)[0], numbers[0], generator=generator), **noise)
        elif what == "transition":
            before = grown.widths(numbers[0] + 1)[0]
            grown.widen_transition_(numbers[0], widening(before, numbers[1], generator=generator), **noise)
        else:
            block, at = numbers[:2]
            growth = grown.widths(block)[at + 1]
            if what == "widen":
                inner = widening(self.bottleneck * growth, self.bottleneck * numbers[2], generator=generator)
                grown.widen_(block, at, inner, widening(growth, numbers[2], generator=generator), **noise)
            else:
                source = torch.randint(growth, (growth,), generator=generator)
                grown.insert_(block, at, source, noise=self.deepen_noise, generator=generator)

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        names = ("num_classes", "bottleneck", "widen_noise", "deepen_noise", "norm_eps", "norm_momentum")
        own = {name: getattr(self, name) for name in names}
        return {"name": "densenet", "image": list(self.image), **own, "space": self.space.settings()}


def family_from_json(data: Mapping[str, Any]) -> DenseFamily:
    """Return the family that ``DenseFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image", "space")}
    channels, height, width = data["image"]
    return DenseFamily(image=(channels, height, width), space=DenseSpace(**data["space"]), **fields)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> DenseFamily:
    """Return the family called ``name`` ("densenet").

    Args:
        name: "densenet".
        image: (C, H, W).
        num_classes: Number of classes.
        settings: Arguments of ``DenseSpace``, and attributes of ``DenseFamily``.

    Raises:
        UserError: Another name, an unknown setting, or a value that is not allowed.
    """
    if name != "densenet":
        raise UserError("family", name, allowed="densenet", hint="See archsmith families.")
    space, own = split_settings(settings, DenseSpace().settings(), DenseFamily)
    return DenseFamily(image=image, num_classes=num_classes, space=DenseSpace(**space), **own)
