"""The places of a chain of inverted residual blocks, what may stand there, and what it costs; free of torch.

A candidate is called ``k5e3`` (kernel 5, expansion 3) or ``zero`` (no block; the place is skipped). Look-up tables name
a block by its shapes, see ``block_key``.

Source: ProxylessNAS, arXiv 1812.00332.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, ProductSpace

ZERO = "zero"
"""The candidate without a block."""

NAME = "mobile-chain"

_CANDIDATE = re.compile(r"k([1-9]\d*)e([1-9]\d*)")

SKELETONS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "stem_channels": 32,
        "first_channels": 16,
        "widths": (24, 40, 80, 96, 192, 320),
        "cells": (4, 4, 4, 4, 4, 1),
        "strides": (2, 2, 2, 1, 2, 1),
        "last_channels": 1280,
    },
    "small": {
        "stem_channels": 8,
        "first_channels": 8,
        "widths": (8, 16, 24, 24, 48, 80),
        "cells": (2, 2, 2, 2, 2, 1),
        "strides": (2, 2, 2, 1, 2, 1),
        "last_channels": 320,
    },
    "tiny": {
        "stem_channels": 8,
        "first_channels": 8,
        "widths": (12, 24),
        "cells": (3, 3),
        "strides": (1, 2),
        "last_channels": 96,
    },
}
SKELETONS["mobile"] = {**SKELETONS["imagenet"], "widths": (32, 40, 80, 96, 192, 320)}
SKELETONS["mobile-14"] = {
    **SKELETONS["imagenet"],
    "stem_channels": 48,
    "first_channels": 24,
    "widths": (40, 56, 112, 136, 256, 448),
    "last_channels": 1792,
}
SKELETONS["cpu"] = {
    **SKELETONS["imagenet"],
    "stem_channels": 40,
    "first_channels": 24,
    "widths": (32, 48, 88, 104, 216, 360),
    "last_channels": 1432,
}
SKELETONS["gpu"] = {**SKELETONS["cpu"], "widths": (32, 56, 112, 128, 256, 432), "last_channels": 1728}
"""Widths, places and first strides of the stages. "imagenet" is the search space; "mobile", "cpu" and "gpu" are the
widths of the published networks, "mobile-14" those of the mobile one at 1.4 times the width. "small" (a quarter of the
width, half of the depth) and "tiny" are ours, for images of about 32 and 8 pixels."""

NETWORKS: dict[str, str] = {
    "mobile": "53 33 - - | 73 33 53 53 | 76 53 53 53 | 56 53 53 53 | 76 76 73 73 | 76",
    "cpu": "36 33 33 33 | 36 33 33 53 | 36 - - 33 | 56 33 33 33 | 56 53 53 33 | 56",
    "gpu": "53 - - - | 73 - - 33 | 76 - - 53 | 56 - 33 53 | 76 76 76 56 | 76",
}
NETWORKS["mobile-14"] = NETWORKS["mobile"]
"""The published networks, stage by stage: kernel and expansion of every place, or "-"; for skeletons of their names."""


@dataclass(frozen=True)
class Place:
    """A place of the chain.

    Attributes:
        in_channels: Channels in front of it.
        out_channels: Channels behind it.
        stride: 1 or 2.
        size: Height and width in front of it.
        candidates: What may stand there; a single one is no choice.
    """

    in_channels: int
    out_channels: int
    stride: int
    size: tuple[int, int]
    candidates: tuple[str, ...]

    @property
    def residual(self) -> bool:
        """Whether the input is added to a block's output; only then may the place be empty."""
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def after(self) -> tuple[int, int]:
        """Height and width behind it."""
        return (-(-self.size[0] // self.stride), -(-self.size[1] // self.stride))

    def costs(self, candidate: str) -> dict[str, int]:
        """Return "macs" (one image) and "params" of a candidate; without a block both are 0."""
        if candidate == ZERO:
            return {"macs": 0, "params": 0}
        kernel, expansion = kernel_and_expansion(candidate)
        hidden, before, after = self.in_channels * expansion, _area(self.size), _area(self.after)
        macs = after * hidden * (kernel**2 + self.out_channels)
        params = hidden * (kernel**2 + 2 + self.out_channels) + 2 * self.out_channels
        if expansion != 1:
            macs += before * self.in_channels * hidden
            params += hidden * (self.in_channels + 2)
        return {"macs": macs, "params": params}

    def key(self, candidate: str) -> str | None:
        """Return the name of a candidate's row in look-up tables; None for no block, which costs nothing."""
        if candidate == ZERO:
            return None
        kernel, expansion = kernel_and_expansion(candidate)
        shapes = f"input:{_shape(self.size, self.in_channels)}-output:{_shape(self.after, self.out_channels)}"
        return (
            f"expanded_conv-{shapes}-expand:{expansion}-kernel:{kernel}-stride:{self.stride}"
            f"-idskip:{int(self.residual)}"
        )


def kernel_and_expansion(candidate: str) -> tuple[int, int]:
    """Return (kernel, expansion) of a candidate such as "k5e3".

    Raises:
        UserError: Another form, or an even kernel.
    """
    found = _CANDIDATE.fullmatch(candidate)
    if found is None or int(found[1]) % 2 == 0:
        raise UserError("candidate", candidate, allowed=f"'{ZERO}', or kernel (odd) and expansion such as 'k5e3'")
    return int(found[1]), int(found[2])


def candidate_names(kernels: Sequence[int], expansions: Sequence[int]) -> tuple[str, ...]:
    """Return the names of all kernels with all expansions, kernel by kernel, as in the published search."""
    return tuple(f"k{kernel}e{expansion}" for kernel in kernels for expansion in expansions)


class ChainSpace(ProductSpace):
    """A product space with the canonical form of chains; made by ``chain_space``."""

    def to_json(self) -> dict[str, Any]:
        """Return the space as a JSON object, for ``ProductSpace.from_json``.

        JSON holds no functions, so what is restored has the same architectures and digests, and as ``network_digest``
        of a new architecture its digest. Stored architectures keep the one that they had here.
        """
        return ProductSpace(self.name, self.root.elements).to_json()


def chain_space(places: Sequence[Place]) -> ChainSpace:
    """Return the space: dimension ``blocks/<place>`` says what stands there, for places with several candidates.

    Where an empty place stands in a stretch of equal blocks makes no difference to the network; it does to the
    decisions, not to ``network_digest``.
    """
    dimensions = {
        f"blocks/{number}": Categorical(place.candidates)
        for number, place in enumerate(places)
        if len(place.candidates) > 1
    }

    def canonical(architecture: Mapping[str, Any]) -> list[list[str]]:
        """Return what stands in each stretch of places that can be empty, and in each other place."""
        stretches: list[list[str]] = []
        before = False
        for number, place in enumerate(places):
            chosen = architecture.get(f"blocks/{number}", place.candidates[0])
            if not (before and place.residual):
                stretches.append([])
            stretches[-1] += [] if chosen == ZERO else [str(chosen)]
            before = place.residual
        return stretches

    return ChainSpace(NAME, dimensions, canonical=canonical)


def published_architecture(name: str, places: Sequence[Place]) -> Architecture:
    """Return a published network as a point of the space of its skeleton's places.

    Raises:
        UserError: Unknown network, or places that it does not have.
    """
    if name not in NETWORKS:
        raise UserError("network", name, allowed=", ".join(NETWORKS))
    words = NETWORKS[name].replace("|", "").split()
    chosen = [ZERO if word == "-" else f"k{word[0]}e{word[1]}" for word in words]
    searched = [number for number, place in enumerate(places) if len(place.candidates) > 1]
    if len(searched) != len(chosen):
        raise UserError("places", len(searched), allowed=f"{len(chosen)}, as the network '{name}' has")
    decisions = {f"blocks/{number}": word for number, word in zip(searched, chosen, strict=True)}
    return chain_space(places).validate(decisions)


def divisible(channels: float, by: int = 8) -> int:
    """Return a multiple of ``by``, at least ``by``, that is near ``channels`` and not below nine tenths of it."""
    near = max(by, int(channels + by / 2) // by * by)
    return near if near >= 0.9 * channels else near + by


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _shape(size: tuple[int, int], channels: int) -> str:
    return f"{size[0]}x{size[1]}x{channels}"
