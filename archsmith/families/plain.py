"""Plain networks that grow: the EAS space without skip connections, and how weights pass to a larger network.

Source: Cai et al. 2018, "Efficient Architecture Search by Network Transformation", arXiv 1707.04873.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.atoms.morphisms import channel_statistics, widening
from archsmith.core.errors import Shown, UserError
from archsmith.cost import count
from archsmith.families.plain_growth import PlainWeights, Tensors
from archsmith.families.plain_space import PlainSpace, apply_edit_
from archsmith.layers.plain import PlainNetwork
from archsmith.space import Architecture
from archsmith.space.growing import Edit, GrowingSpace, Layer, edit_numbers

FAMILIES = (
    {
        "name": "plain",
        "title": "plain networks as strings of layers that grow (EAS)",
        "task": "images",
    },
)

STATISTICS_BATCH = 64
"""Images that give the statistics of a new layer."""


@dataclass(frozen=True, kw_only=True)
class PlainFamily:
    """Plain networks for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        space: The strings.
        widen_noise: Noise on repeated units when weights are inherited, in standard deviations of the weights.
        deepen_noise: The same for the weights of new layers. Without noise the function is kept exactly; copies that
            are never told apart, however, learn the same.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.
    """

    image: tuple[int, int, int]
    num_classes: int
    space: PlainSpace = field(default_factory=PlainSpace, compare=False)
    widen_noise: float = 0.01
    deepen_noise: float = 0.001
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    settings: Mapping[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_noise(self.widen_noise, self.deepen_noise)
        object.__setattr__(self, "settings", self.space.settings())

    def largest(self) -> Architecture:
        """Return the string of the widest layers and largest kernels; if not all fit, early blocks are filled first."""
        space = self.space
        room = space.longest - space.blocks - (space.blocks + 1)
        layers = []
        for block in range(space.blocks + 1):
            more = min(space.depth - 1, room)
            room -= more
            widest = Layer(space.units[-1])
            if block < space.blocks:
                widest = Layer(space.filters[-1], space.kernels[-1])
            layers.append([widest] * (1 + more))
        return space.of_layers(layers)

    def smallest(self) -> Architecture:
        """Return one layer in each block, the narrowest and of the smallest kernels."""
        space = self.space
        narrow = [[Layer(space.filters[0], space.kernels[0])]] * space.blocks
        return space.of_layers([*narrow, [Layer(space.units[0])]])

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> PlainNetwork:
        """Return the network of a point of the space.

        Args:
            architecture: Decisions by path.
            seed: Seed of the initialisation (``initialise_``); None leaves torch's own, for weights loaded next.
        """
        network = self._network(self.space.layers(self.space.validate(architecture)))
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def _network(self, layers: Sequence[Sequence[Layer]]) -> PlainNetwork:
        convs: list[Any] = [tuple((layer.width, layer.kind) for layer in rows) for rows in layers[:-1]]
        return PlainNetwork(
            in_channels=self.image[0],
            convs=tuple(convs),
            units=tuple(layer.width for layer in layers[-1]),
            num_classes=self.num_classes,
            norm_eps=self.norm_eps,
            norm_momentum=self.norm_momentum,
        )

    def architecture_of(self, network: PlainNetwork) -> Architecture:
        """Return the point of the space that ``network`` is.

        Raises:
            UserError: It is none of the space.
        """
        convs = [[Layer(filters, kernel) for filters, kernel in rows] for rows in network.convs]
        return self.space.of_layers([*convs, [Layer(units) for units in network.units]])

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
        examples: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """Return the weights of a network grown from another: in evaluation mode the same function, but for noise.

        Args:
            weights: The parent's ``state_dict``.
            parent: Its architecture.
            child: What it grows to.
            edits: How; by default ``space.match(parent, child)``.
            examples: Images (B, C, H, W) whose statistics the normalisations of new layers have.
            generator: Source of the units that are repeated and of the noise.

        Raises:
            UserError: Growing does not lead from parent to child, or the edits lead elsewhere.
        """
        edits = checked_edits(self.space, parent, child, edits)
        layers, grown = self.space.layers(parent), PlainWeights(weights)
        for edit in edits:
            numbers = edit_numbers(edit)
            block, at = numbers[:2]
            if edit[0] == "widen":
                copies = widening(layers[block][at].width, numbers[2], generator=generator)
                grown.widen_(block, at, copies, noise=self.widen_noise, generator=generator)
            else:
                kernel = numbers[2] if len(numbers) == 3 else None
                found = self._statistics(layers, grown, (block, at), examples)
                noise = self.deepen_noise
                grown.deepen_(block, at, kernel, found, eps=self.norm_eps, noise=noise, generator=generator)
            apply_edit_(layers, edit)
        return grown.state_dict()

    def _statistics(
        self, layers: Sequence[Sequence[Layer]], weights: PlainWeights, place: tuple[int, int], examples: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of the outputs of the layer at ``place`` (block, number)."""
        with torch.device("meta"):  # nothing is drawn for weights that are put in next
            network = self._network(layers)
        network.load_state_dict(weights.state_dict(), assign=True)
        block = network.blocks[place[0]]
        assert isinstance(block, nn.ModuleList)
        return output_statistics(network, block[place[1]], examples)

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        names = ("num_classes", "widen_noise", "deepen_noise", "norm_eps", "norm_momentum")
        own = {name: getattr(self, name) for name in names}
        return {"name": "plain", "image": list(self.image), **own, "space": self.space.settings()}


def family_from_json(data: Mapping[str, Any]) -> PlainFamily:
    """Return the family that ``PlainFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image", "space")}
    channels, height, width = data["image"]
    return PlainFamily(image=(channels, height, width), space=PlainSpace(**data["space"]), **fields)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> PlainFamily:
    """Return the family called ``name`` ("plain").

    Args:
        name: "plain".
        image: (C, H, W).
        num_classes: Number of classes.
        settings: Arguments of ``PlainSpace``, and attributes of ``PlainFamily``.

    Raises:
        UserError: Another name, an unknown setting, or a value that is not allowed.
    """
    if name != "plain":
        raise UserError("family", name, allowed="plain", hint="See archsmith families.")
    space, own = split_settings(settings, PlainSpace().settings(), PlainFamily)
    return PlainFamily(image=image, num_classes=num_classes, space=PlainSpace(**space), **own)


# ----------------------------------------------------------------- shared with archsmith.families.densenet


def checked_edits(
    space: GrowingSpace, parent: Mapping[str, Any], child: Mapping[str, Any], edits: Sequence[Edit] | None
) -> Sequence[Edit]:
    """Return edits that lead from parent to child: those given, or else ``space.match``.

    Raises:
        UserError: They lead elsewhere, or there are none.
    """
    found = space.match(parent, child) if edits is None else tuple(tuple(edit) for edit in edits)
    if found is None or dict(space.grown(parent, found)) != dict(child):
        raise UserError(
            "inherited weights",
            Shown(f"those of {' '.join(space.tokens(parent))}"),
            allowed=f"weights of a network that grows to {' '.join(space.tokens(child))}",
        )
    return found


def check_noise(*amounts: float) -> None:
    """Refuse a negative noise.

    Raises:
        UserError: So it is.
    """
    if any(not amount >= 0 for amount in amounts):
        raise UserError("family.widen_noise, deepen_noise", amounts, allowed="numbers from 0; 0 is exact")


def split_settings(
    settings: Mapping[str, Any], of_space: Mapping[str, Any], family: type[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a space, and those of its family's attributes.

    Raises:
        UserError: A name that neither has.
    """
    own = [name for name in family.__dataclass_fields__ if name not in ("image", "num_classes", "space", "settings")]
    if unknown := sorted(set(settings) - set(of_space) - set(own)):
        raise UserError("family", unknown, allowed=", ".join([*of_space, *own]))
    space = {name: value for name, value in settings.items() if name in of_space}
    return space, {name: value for name, value in settings.items() if name in own}


def output_statistics(network: nn.Module, layer: nn.Module, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel that ``layer`` puts out for ``examples``, in evaluation mode."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.append(channel_statistics(output)))
    try:
        with torch.no_grad():
            network.eval()(examples)
    finally:
        handle.remove()
    return seen[0]


def initialise_(network: nn.Module, generator: torch.Generator) -> None:
    """Initialise weights N(0, 2 / fan_in), the classifier's N(0, 1 / fan_in) with bias 0, normalisations 1 and 0."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 1.0 if isinstance(module, nn.Linear) and module.bias is not None else 2.0
                module.weight.normal_(0.0, (gain / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.reset_parameters()
