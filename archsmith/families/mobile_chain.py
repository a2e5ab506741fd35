"""Chains of inverted residual blocks: in every place one of several kernels and expansions, or no block.

The family that ProxylessNAS searches, place by place; no two places need agree.

Source: Cai, Zhu, Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", arXiv 1812.00332.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable
from archsmith.families.mobile import fit_strides, initialise_
from archsmith.families.mobile_chain_space import (
    NAME,
    NETWORKS,
    SKELETONS,
    ZERO,
    Place,
    candidate_names,
    chain_space,
    divisible,
    kernel_and_expansion,
    published_architecture,
)
from archsmith.families.mobile_chain_supernet import GROUP, ChainSearchNetwork, ChainSupernet
from archsmith.layers.mobile import ConvNormAct
from archsmith.layers.mobile_chain import MobileChain, inverted_residual
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.expected import ExpectedCost
from archsmith.supernet.mixed import Relaxation

FAMILIES = (
    {
        "name": "mobile-chain",
        "title": "Inverted residual blocks, each with a kernel and expansion of its own, or left out (ProxylessNAS)",
        "task": "images",
        "relaxed": True,
    },
)

FIRST = "k3e1"
"""The first block, which is never searched."""


@dataclass(frozen=True, kw_only=True)
class ChainFamily:
    """Chains of one skeleton for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        stem_channels: Width of the stem.
        stem_stride: Its stride.
        places: Output channels, stride and candidates of every place, in order; see ``chain``.
        last_channels: Width of the last 1x1 convolution.
        activation: "relu", "relu6" or "swish".
        dropout: Drop probability in front of the classifier.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of the running statistics.

    Build one with ``chain_family(skeleton, image=..., num_classes=...)``.

    Raises:
        UserError: A place without candidates, with an unknown one, or with "zero" where the shape changes.
    """

    image: tuple[int, int, int]
    num_classes: int
    stem_channels: int
    stem_stride: int
    places: tuple[tuple[int, int, tuple[str, ...]], ...]
    last_channels: int
    activation: str = "relu6"
    dropout: float = 0.0
    norm_eps: float = 1e-3
    norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.activation not in ("relu", "relu6", "swish"):
            raise UserError("family.activation", self.activation, allowed="relu, relu6, swish")
        for number, place in enumerate(self.chain):
            names = place.candidates
            if not names or len(set(names)) != len(names):
                raise UserError(f"family.places[{number}]", names, allowed="distinct candidates, at least one")
            for name in names:
                if name != ZERO:
                    kernel_and_expansion(name)
                elif not place.residual or names == (ZERO,):
                    raise UserError(
                        f"family.places[{number}]",
                        names,
                        allowed=f"'{ZERO}' beside a block, where neither resolution nor width changes",
                    )

    @property
    def chain(self) -> tuple[Place, ...]:
        """The places with their shapes."""
        size = _strided((self.image[1], self.image[2]), self.stem_stride)
        channels, chain = self.stem_channels, []
        for out_channels, stride, candidates in self.places:
            chain.append(Place(channels, out_channels, stride, size, candidates))
            size, channels = chain[-1].after, out_channels
        return tuple(chain)

    @property
    def searched(self) -> tuple[int, ...]:
        """Numbers of the places with a choice."""
        return tuple(number for number, (*_, candidates) in enumerate(self.places) if len(candidates) > 1)

    @property
    def space(self) -> ProductSpace:
        """The space: ``blocks/<place>`` says what stands there."""
        return chain_space(self.chain)

    def largest(self) -> Architecture:
        """Return the architecture with the most MACs."""
        return self._extreme(max)

    def smallest(self) -> Architecture:
        """Return the architecture with the fewest MACs."""
        return self._extreme(min)

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> MobileChain:
        """Return the network of a point of the space.

        Args:
            architecture: Decisions by path, all dimensions present.
            seed: Seed of the published initialisation; None leaves torch's own (for weights that are loaded next).
        """
        blocks = []
        for (out_channels, stride, _), chosen in zip(self.places, self.chosen(architecture), strict=True):
            blocks.append(None if chosen == ZERO else (out_channels, stride, *kernel_and_expansion(chosen)))
        network = MobileChain(blocks=tuple(blocks), **self._arguments())
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def chosen(self, architecture: Mapping[str, Any]) -> list[str]:
        """Return what stands in every place, those without a choice included."""
        return [
            str(architecture[f"blocks/{number}"]) if len(candidates) > 1 else candidates[0]
            for number, (*_, candidates) in enumerate(self.places)
        ]

    def architecture_of(self, network: MobileChain) -> Architecture:
        """Return the point of the space that ``network`` is."""
        blocks = network.constructor()["blocks"]
        names = [ZERO if block is None else f"k{block[2]}e{block[3]}" for block in blocks]
        return self.space.validate({f"blocks/{number}": names[number] for number in self.searched})

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" and "params" for this image size; nothing is built or computed."""
        parts = [place.costs(name) for place, name in zip(self.chain, self.chosen(architecture), strict=True)]
        fixed = self._outside()
        return {cost: fixed[cost] + sum(part[cost] for part in parts) for cost in fixed}

    def fixed_keys(self) -> list[str]:
        """Return the names, in look-up tables, of what every network has: stem, blocks without a choice, head."""
        size, (*_, last) = (self.image[1], self.image[2]), self.chain
        behind, after = _strided(size, self.stem_stride), last.after
        shapes = [f"{height}x{width}x" for height, width in (size, behind, after)]
        return [
            f"Conv-input:{shapes[0]}{self.image[0]}-output:{shapes[1]}{self.stem_channels}",
            *(str(place.key(place.candidates[0])) for place in self.chain if len(place.candidates) == 1),
            f"Conv_1-input:{shapes[2]}{last.out_channels}-output:{shapes[2]}{self.last_channels}",
            f"Logits-input:{shapes[2]}{self.last_channels}-output:{self.num_classes}",
        ]

    def candidate_keys(self) -> list[list[str | None]]:
        """Return the names of the rows of every candidate of every place with a choice; None costs nothing."""
        return [[place.key(name) for name in place.candidates] for place in self.chain if len(place.candidates) > 1]

    def keys(self, architecture: Mapping[str, Any]) -> list[str]:
        """Return the rows of a look-up table whose sum is the network's cost."""
        chosen = zip(self.chain, self.chosen(architecture), strict=True)
        found = [place.key(name) for place, name in chosen if len(place.candidates) > 1]
        return [*self.fixed_keys(), *(key for key in found if key is not None)]

    def expected_latency(self, table: LookupTable) -> ExpectedCost:
        """Return the latency of the relaxed supernet, by the mixing weights of "blocks", in the table's unit.

        Raises:
            UserError: A candidate, or a part that every network has, is not in the table.
        """
        costs_EO = self._rows(
            [[table.scale * table.row(key).mean if key else 0.0 for key in row] for row in self.candidate_keys()]
        )
        return ExpectedCost({GROUP: costs_EO}, table.cost(self.fixed_keys()))

    def expected_macs(self) -> ExpectedCost:
        """Return the multiply-accumulates of the relaxed supernet, by the mixing weights of "blocks"."""
        chain, smallest = self.chain, self.smallest()
        costs = [[float(chain[n].costs(name)["macs"]) for name in chain[n].candidates] for n in self.searched]
        fixed = self.exact_costs(smallest)["macs"] - sum(map(min, costs))
        return ExpectedCost({GROUP: self._rows(costs)}, float(fixed))

    def measurable(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """Return every distinct part that a look-up table needs, by its key, with the shape of its input."""
        norm = (self.activation, self.norm_eps, self.norm_momentum)
        (*_, last), (stem, *_, mix, head) = self.chain, self.fixed_keys()
        after = (1, last.out_channels, *last.after)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.last_channels, self.num_classes))
        parts: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
            stem: (ConvNormAct(self.image[0], self.stem_channels, 3, self.stem_stride, *norm), (1, *self.image)),
            mix: (ConvNormAct(last.out_channels, self.last_channels, 1, 1, *norm), after),
            head: (pool, (1, self.last_channels, *last.after)),
        }
        for place in self.chain:
            shape = (1, place.in_channels, *place.size)
            for name in place.candidates:
                key = place.key(name)
                if key is not None and key not in parts:
                    kinds = (place.in_channels, place.out_channels, place.stride, *kernel_and_expansion(name))
                    parts[key] = (inverted_residual(*kinds, *norm), shape)
        return parts

    def supernet(
        self, *, seed: int | None = None, relaxation: Relaxation | None = None, edge_weights: bool = False
    ) -> ChainSupernet:
        """Return the search network: in every place all of its candidates, weights of their own.

        Args:
            seed: Seed of weights and logits; None leaves torch's own weights.
            relaxation: From logits to mixing weights; softmax if None.
            edge_weights: Whether places have weights beside their candidates' (each is alone, so they are 1).
        """
        network = ChainSearchNetwork(chain=self.chain, **self._arguments())
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        first = 0 if seed is None else seed
        return ChainSupernet(network, self, relaxation=relaxation, seed=first, edge_weights=edge_weights)

    def relaxed(self, *, layers: Any = None, make_edge: Any = None, **options: Any) -> ChainSupernet:
        """Return the supernet that differentiable searches train; options as of ``supernet``.

        Raises:
            UserError: A method that brings layers or edges of its own: blocks change the width, their edges cannot.
        """
        if layers is not None or make_edge is not None:
            raise UserError(
                "family", NAME, allowed="one whose edges keep their width ('darts', say), for the edges of this method"
            )
        return self.supernet(**options)

    def search_form(self, channels: int, cells: int) -> ChainFamily:
        """Return this family: the search is direct, without a smaller network in between."""
        return self

    def final_form(self, *, auxiliary: bool) -> ChainFamily:
        """Return this family, which has no auxiliary classifier."""
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        places = [[out_channels, stride, list(candidates)] for out_channels, stride, candidates in self.places]
        return {"name": NAME, **fields, "image": list(self.image), "places": places}

    def _extreme(self, best: Any) -> Architecture:
        chain = self.chain
        decisions = {
            f"blocks/{n}": best(chain[n].candidates, key=lambda name, n=n: chain[n].costs(name)["macs"])
            for n in self.searched
        }
        return self.space.validate(decisions)

    def _rows(self, costs: Sequence[Sequence[float]]) -> Tensor:
        """Return rows of different lengths as one tensor, zero where a place has no such candidate."""
        longest = max(map(len, costs), default=0)
        return torch.tensor([[*row, *(0.0,) * (longest - len(row))] for row in costs], dtype=torch.float64)

    def _outside(self) -> dict[str, int]:
        """Return the costs of stem, last convolution and classifier."""
        (*_, last) = self.chain
        side = _strided((self.image[1], self.image[2]), self.stem_stride)
        stem, mix = 9 * self.image[0] * self.stem_channels, last.out_channels * self.last_channels
        head = self.last_channels * self.num_classes
        return {
            "macs": side[0] * side[1] * stem + last.after[0] * last.after[1] * mix + head,
            "params": stem + 2 * self.stem_channels + mix + 2 * self.last_channels + head + self.num_classes,
        }

    def _arguments(self) -> dict[str, Any]:
        return {
            "in_channels": self.image[0],
            "num_classes": self.num_classes,
            "stem_channels": self.stem_channels,
            "stem_stride": self.stem_stride,
            "last_channels": self.last_channels,
            "activation": self.activation,
            "dropout": self.dropout,
            "norm_eps": self.norm_eps,
            "norm_momentum": self.norm_momentum,
        }


def family_from_json(data: Mapping[str, Any]) -> ChainFamily:
    """Return the family that ``ChainFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image", "places")}
    places = tuple((out_channels, stride, tuple(candidates)) for out_channels, stride, candidates in data["places"])
    channels, height, width = data["image"]
    return ChainFamily(image=(channels, height, width), places=places, **fields)


def chain_family(
    skeleton: str = "auto",
    *,
    image: tuple[int, int, int],
    num_classes: int,
    width: float = 1.0,
    cells: Sequence[int] | None = None,
    kernels: Sequence[int] = (3, 5, 7),
    expansions: Sequence[int] = (3, 6),
    skippable: bool = True,
    **settings: Any,
) -> ChainFamily:
    """Return the family of a skeleton for one image size.

    Args:
        skeleton: A name of ``SKELETONS``, or "auto": "tiny" below 24 pixels, "small" below 96, else "imagenet".
        image: (C, H, W).
        num_classes: Number of classes.
        width: Factor of all widths, which become multiples of 8; that of the last convolution is not made smaller.
        cells: Places of every stage, in place of the skeleton's.
        kernels: Kernel sizes of the candidates, odd.
        expansions: Expansions of the candidates.
        skippable: Whether places may be empty where neither resolution nor width changes.
        settings: ``stem_channels``, ``first_channels``, ``widths``, ``strides``, ``last_channels`` in place of the
            skeleton's; ``activation``, ``dropout``, ``norm_eps``, ``norm_momentum``.

    The first strides (stem, then stages in order) are dropped until the last map is at least 4x4 pixels.

    Raises:
        UserError: Unknown skeleton, stages that do not fit together, or too small an image.
    """
    if skeleton == "auto":
        size = min(image[1:])
        skeleton = "tiny" if size < 24 else "small" if size < 96 else "imagenet"
    if skeleton not in SKELETONS:
        raise UserError("family.skeleton", skeleton, allowed=", ".join(["auto", *SKELETONS]))
    chosen = {**SKELETONS[skeleton], **{key: settings.pop(key) for key in SKELETONS[skeleton] if key in settings}}
    counts = tuple(chosen["cells"] if cells is None else cells)
    widths, strides = tuple(chosen["widths"]), tuple(chosen["strides"])
    if not len(widths) == len(counts) == len(strides) or not widths or min(counts) < 1:
        raise UserError("family.cells", counts, allowed=f"a number from 1 for each of the {len(widths)} stages")
    if not width > 0:
        raise UserError("family.width", width, allowed="a number above 0")
    stem, first, last = chosen["stem_channels"], chosen["first_channels"], chosen["last_channels"]
    if width != 1.0:
        stem, first, *widths_ = (divisible(channels * width) for channels in (stem, first, *widths))
        widths, last = tuple(widths_), divisible(last * max(1.0, width))
    stem_stride, fitted = fit_strides([2, *strides], image)
    names = candidate_names(kernels, expansions)
    places: list[tuple[int, int, tuple[str, ...]]] = [(first, 1, (FIRST,))]
    for out_channels, count, stride in zip(widths, counts, fitted, strict=True):
        for number in range(count):
            own = stride if number == 0 else 1
            same = own == 1 and places[-1][0] == out_channels
            places.append((out_channels, own, (*names, ZERO) if same and skippable else names))
    return ChainFamily(
        image=image,
        num_classes=num_classes,
        stem_channels=stem,
        stem_stride=stem_stride,
        places=tuple(places),
        last_channels=last,
        **settings,
    )


def published_network(
    name: str, *, image: tuple[int, int, int] = (3, 224, 224), num_classes: int = 1000
) -> tuple[ChainFamily, Architecture]:
    """Return a published network as a family of its widths and the point of its space.

    Args:
        name: "mobile", "cpu", "gpu", or "mobile-14" (the mobile one at 1.4 times the width).
        image: (C, H, W).
        num_classes: Number of classes.

    Raises:
        UserError: Unknown name.
    """
    if name not in NETWORKS:
        raise UserError("network", name, allowed=", ".join(NETWORKS))
    family = chain_family(name, image=image, num_classes=num_classes)
    return family, published_architecture(name, family.chain)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> ChainFamily:
    """Return the family called ``name`` ("mobile-chain") for a task's images; settings as of ``chain_family``."""
    if name != NAME:
        raise UserError("family", name, allowed=NAME, hint="See archsmith families.")
    return chain_family(image=image, num_classes=num_classes, **settings)


def _strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return (-(-size[0] // stride), -(-size[1] // stride))
