"""Time-delay networks for speech: what each block hears of its neighbourhood is the choice.

Source: ST-NAS, arXiv 2011.05649; its published network has six blocks of width 640.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from archsmith.core.errors import UserError
from archsmith.families.tdnn_supernet import MixedTdnn, TdnnSupernet
from archsmith.layers.tdnn import TdnnNetwork, context_and_dilation
from archsmith.space import Architecture, Categorical, ProductSpace
from archsmith.supernet.mixed import Relaxation

FAMILIES = (
    {
        "name": "tdnn",
        "title": "time-delay networks: half context and dilation of each block, one layer of stride 3",
        "task": "speech",
        "relaxed": True,
    },
)

CANDIDATES = ("C1D1", "C1D2", "C2D1", "C2D2")
"""Candidates of a block, half context C and dilation D."""


@dataclass(frozen=True, kw_only=True)
class TdnnFamily:
    """The time-delay networks for features of one shape.

    Attributes:
        image: Shape of one example, (planes, bands, frames); planes are the static features and their differences.
        num_classes: Number of tokens, the blank among them.
        width: Features behind every block.
        blocks: Number of blocks.
        stride_after: Number of blocks in front of the layer with stride 3.
        dropout: Of all layers, in the supernet too.

    The defaults are the published ones. Networks take any number of frames; exported files have the family's.

    Raises:
        UserError: A size is out of its range.
    """

    image: tuple[int, int, int]
    num_classes: int
    width: int = 640
    blocks: int = 6
    stride_after: int = 3
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("num_classes", 2), ("width", 1), ("blocks", 1), ("stride_after", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"family.{name}", value, allowed=f"an integer of at least {least}")
        if self.stride_after > self.blocks:
            raise UserError("family.stride_after", self.stride_after, allowed=f"0 to the {self.blocks} blocks")
        if not 0 <= self.dropout < 1:
            raise UserError("family.dropout", self.dropout, allowed="0 or more, below 1")
        if min(self.image) < 1:
            raise UserError("image", self.image, allowed="(planes, bands, frames), each at least 1")

    @property
    def space(self) -> ProductSpace:
        """Dimension ``block/<number>`` chooses a candidate: 4^6 = 4,096 networks as published."""
        paths = {f"block/{number}": Categorical(CANDIDATES, group="block") for number in range(self.blocks)}
        return ProductSpace("tdnn", paths)

    def largest(self) -> Architecture:
        """Return the widest context everywhere."""
        return self.space.validate({f"block/{number}": "C2D2" for number in range(self.blocks)})

    def smallest(self) -> Architecture:
        """Return the narrowest context everywhere."""
        return self.space.validate({f"block/{number}": "C1D1" for number in range(self.blocks)})

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> TdnnNetwork:
        """Return the network with torch's own initialisation.

        Args:
            architecture: Candidate by path, all blocks present.
            seed: Seed of the initialisation; None draws from torch's global generator (for weights that are loaded
                next).
        """
        names = tuple(str(architecture[f"block/{number}"]) for number in range(self.blocks))
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return TdnnNetwork(
                self.image[0] * self.image[1], self.num_classes, self.width, names, self.stride_after, self.dropout
            )

    def relaxed(
        self, *, seed: int | None = None, relaxation: Relaxation | None = None, **unsupported: Any
    ) -> TdnnSupernet:
        """Return the supernet: every block holds all candidates.

        Args:
            seed: Seed of weights and logits; None draws the weights from torch's global generator.
            relaxation: From logits to mixing weights; softmax if None.
            unsupported: What methods for cells ask besides.

        Raises:
            UserError: Edges or layers of another kind are asked for.
        """
        if unsupported:
            raise UserError(
                "method", ", ".join(unsupported), allowed="a method that mixes whole candidates, for the family tdnn"
            )
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            network = MixedTdnn(self.build(self.smallest()), CANDIDATES)
        return TdnnSupernet(network, self.space, CANDIDATES, self.build, relaxation, 0 if seed is None else seed)

    def search_form(self, channels: int, cells: int) -> TdnnFamily:
        """Return the family of the search network: itself."""
        return self

    def final_form(self, *, auxiliary: bool) -> TdnnFamily:
        """Return the family of the final network: itself, it has no auxiliary classifier."""
        return self

    def architecture_of(self, network: TdnnNetwork) -> Architecture:
        """Return the point of the space that ``network`` is."""
        return self.space.validate({f"block/{number}": name for number, name in enumerate(network.names)})

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return ``macs`` (standard convention, one example) and ``params`` in closed form; nothing is built.

        A layer with kernel k from f to g features has ``f g k`` MACs for each frame of its output and ``f g k + 3 g``
        parameters; dilation costs nothing.
        """
        features, frames = self.image[0] * self.image[1], self.image[2]
        kernels = [2 * context_and_dilation(str(architecture[f"block/{n}"]))[0] + 1 for n in range(self.blocks)]
        layers = [*((kernel, 1) for kernel in kernels[: self.stride_after]), (3, 3)]
        macs = params = 0
        for kernel, stride in [*layers, *((kernel, 1) for kernel in kernels[self.stride_after :])]:
            frames = -(-frames // stride)
            macs += features * self.width * kernel * frames
            params += features * self.width * kernel + 3 * self.width
            features = self.width
        last = self.width * self.num_classes
        return {"macs": macs + last * frames, "params": params + last + self.num_classes}

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"name": "tdnn", **fields, "image": list(self.image)}


def family_from_json(data: Mapping[str, Any]) -> TdnnFamily:
    """Return the family that ``TdnnFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image")}
    planes, bands, frames = data["image"]
    return TdnnFamily(image=(planes, bands, frames), **fields)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> TdnnFamily:
    """Return the family called ``name`` for a task's features.

    Args:
        name: "tdnn".
        image: (planes, bands, frames).
        num_classes: Number of tokens, the blank among them.
        settings: Fields of ``TdnnFamily``.

    Raises:
        UserError: Another name, or an unknown setting.
    """
    if name != "tdnn":
        raise UserError("family", name, allowed="tdnn", hint="See archsmith families.")
    own = [field for field in TdnnFamily.__dataclass_fields__ if field not in ("image", "num_classes")]
    for key in settings:
        if key not in own:
            raise UserError("option of family tdnn", key, allowed=", ".join(own))
    return TdnnFamily(image=(image[0], image[1], image[2]), num_classes=num_classes, **settings)
