"""Stage-wise elastic mobile networks as tables, their spaces and exact costs; free of torch.

A genotype has a resolution, the widths of stem and head, and for every stage one width, depth, kernel size and
expansion that all of its blocks share. Dimensions with a single option are no decisions and have no path. The first
block of a stage depends on the width of the stage before: hidden channels are ``rounded(in_channels * expansion)``,
the bottleneck of its channel gate ``rounded(hidden // 4)``.

Sources: BigNAS (arXiv 2003.11142), whose table is restated by public reimplementations, and AttentiveNAS (arXiv
2011.09011). "small" and "tiny" are ours: the same kind of rows for images of 24 to 32 and of 8 to 16 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Element, Ordinal, ProductSpace

NAME = "bignas"

SMALLEST_MAP = 3
"""Side of the last feature map below which strides are dropped, in pixels."""

StageRow = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]
"""Widths, depths, kernels, expansions, stride of the first block, and whether blocks have a channel gate."""

BlockPlan = tuple[int, int, int, int, bool, int]
"""Of a block: output channels, stride, kernel, hidden channels, whether it expands, and its gate's bottleneck."""

PRESETS: dict[str, dict[str, Any]] = {
    "bignas": {
        "resolutions": (192, 224, 288, 320),
        "stem_widths": (32, 40),
        "stem_stride": 2,
        "stages": (
            ((16, 24), (1, 2), (3,), (1,), 1, True),
            ((24, 32), (2, 3), (3,), (6,), 2, True),
            ((40, 48), (2, 3), (3, 5), (6,), 2, True),
            ((80, 88), (2, 3, 4), (3, 5), (6,), 2, True),
            ((112, 120, 128), (2, 3, 4, 5, 6), (3, 5), (6,), 1, True),
            ((192, 200, 208, 216), (2, 3, 4, 5, 6), (3, 5), (6,), 2, True),
            ((320, 352), (1, 2), (3, 5), (6,), 1, True),
        ),
        "head_widths": (1280, 1408),
    },
    "attentivenas": {
        "resolutions": (192, 224, 256, 288),
        "stem_widths": (16, 24),
        "stem_stride": 2,
        "stages": (
            ((16, 24), (1, 2), (3, 5), (1,), 1, False),
            ((24, 32), (3, 4, 5), (3, 5), (4, 5, 6), 2, False),
            ((32, 40), (3, 4, 5, 6), (3, 5), (4, 5, 6), 2, True),
            ((64, 72), (3, 4, 5, 6), (3, 5), (4, 5, 6), 2, False),
            ((112, 120, 128), (3, 4, 5, 6, 7, 8), (3, 5), (4, 5, 6), 1, True),
            ((192, 200, 208, 216), (3, 4, 5, 6, 7, 8), (3, 5), (6,), 2, True),
            ((216, 224), (1, 2), (3, 5), (6,), 1, True),
        ),
        "head_widths": (1792, 1984),
        "last_expansion": 6,
    },
    "small": {
        "resolutions": (0.75, 0.875, 1.0),
        "stem_widths": (8, 16),
        "stem_stride": 2,
        "stages": (
            ((16, 24), (1, 2), (3,), (1,), 1, True),
            ((24, 32, 40), (1, 2, 3), (3, 5), (3, 4), 2, True),
            ((48, 64), (1, 2, 3), (3, 5), (3, 4), 1, True),
        ),
        "head_widths": (96, 160),
    },
    "tiny": {
        "resolutions": (0.75, 1.0),
        "stem_widths": (8, 16),
        "stem_stride": 1,
        "stages": (
            ((8, 16), (1, 2), (3,), (1,), 1, True),
            ((16, 24), (1, 2), (3, 5), (2, 4), 2, True),
        ),
        "head_widths": (48, 64),
    },
}
"""The published spaces and two small ones. Whole resolutions are pixels, others parts of the image's height."""

PUBLISHED_MODELS: dict[str, dict[str, float]] = {
    "BigNASModel-S": {"macs": 240e6, "params": 4.5e6, "top1": 76.5},
    "BigNASModel-M": {"macs": 418e6, "params": 5.5e6, "top1": 78.9},
    "BigNASModel-L": {"macs": 586e6, "params": 6.4e6, "top1": 79.5},
    "BigNASModel-XL": {"macs": 1000e6, "top1": 80.9},
}
"""Published ImageNet results (top1 in percent, XL at about these MACs); the genotypes were not released."""

_ATTENTIVE = {
    "A0": (192, (16, 16, 24, 32, 64, 112, 192, 216, 1792), (1, 3, 3, 3, 3, 3, 1), (3, 3, 3, 3, 3, 3, 3), (4, 4, 4, 4)),
    "A1": (224, (16, 16, 24, 32, 64, 112, 192, 216, 1984), (1, 3, 3, 3, 3, 3, 1), (3, 3, 3, 5, 3, 5, 3), (4, 4, 4, 4)),
    "A3": (224, (16, 16, 24, 32, 64, 112, 208, 224, 1984), (2, 3, 3, 4, 3, 5, 1), (3, 3, 3, 5, 3, 3, 3), (4, 4, 4, 4)),
    "A5": (256, (16, 16, 24, 32, 72, 112, 192, 216, 1792), (1, 3, 3, 3, 4, 6, 1), (3, 3, 3, 5, 3, 3, 3), (4, 5, 4, 4)),
}


@dataclass(frozen=True)
class Rounding:
    """Rounds a width to a multiple of ``divisor``, at least ``least``, and not below ``share`` of itself.

    Attributes:
        divisor: The result is a multiple of it.
        least: Smallest result.
        share: Where rounding down loses more than this leaves, the next multiple is taken (FBNetV3 has 0.95).

    Example:
        >>> [Rounding()(width) for width in (11, 12, 20, 92)]
        [16, 16, 24, 96]
    """

    divisor: int = 8
    least: int = 8
    share: float = 0.9

    def __call__(self, width: float) -> int:
        """Return the rounded width."""
        near = max(self.least, int(width + self.divisor / 2) // self.divisor * self.divisor)
        return near if near >= self.share * width else near + self.divisor


@dataclass(frozen=True, kw_only=True)
class ElasticTable:
    """What a genotype chooses from.

    Attributes:
        resolutions: Heights of the resized image.
        stem_widths: Channels of the stem.
        stem_stride: Its stride.
        stages: See ``StageRow``.
        head_widths: Channels of the last 1x1 convolution; with ``last_expansion`` of the one behind the pooling.
        last_expansion: Above 0: the last 1x1 convolution has this many times the last stage's channels, and another one
            of a head width, without normalisation, follows behind the pooling.
        rounding: Of hidden channels and bottlenecks.
    """

    resolutions: tuple[int, ...]
    stem_widths: tuple[int, ...]
    stem_stride: int
    stages: tuple[StageRow, ...]
    head_widths: tuple[int, ...]
    last_expansion: int = 0
    rounding: Rounding = Rounding()

    def choices(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the options and the group of every path in order, also where there is a single option."""
        found = {"resolution": (self.resolutions, "resolution"), "stem/width": (self.stem_widths, "width")}
        for number, (widths, depths, kernels, expansions, _, _) in enumerate(self.stages, start=1):
            named = {"width": widths, "depth": depths, "kernel": kernels, "expansion": expansions}
            found |= {f"mb{number}/{name}": (options, name) for name, options in named.items()}
        return {**found, "head/width": (self.head_widths, "width")}

    def completed(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return the value of every path, those without a choice included."""
        return {path: int(architecture.get(path, options[0])) for path, (options, _) in self.choices().items()}

    def plan(self, architecture: Mapping[str, Any]) -> list[list[BlockPlan]]:
        """Return the blocks of every stage."""
        chosen = self.completed(architecture)
        channels, stages = chosen["stem/width"], []
        for number, (*_, expansions, stride, gated) in enumerate(self.stages, start=1):
            width, depth, kernel, expansion = (
                chosen[f"mb{number}/{name}"] for name in ("width", "depth", "kernel", "expansion")
            )
            blocks: list[BlockPlan] = []
            for block in range(depth):
                expand = expansions != (1,)
                hidden = self.rounding(channels * expansion) if expand else channels
                squeeze = self.rounding(hidden // 4) if gated else 0
                blocks.append((width, stride if block == 0 else 1, kernel, hidden, expand, squeeze))
                channels = width
            stages.append(blocks)
        return stages

    def head(self, architecture: Mapping[str, Any]) -> tuple[int, int]:
        """Return the channels of the last 1x1 convolution and of the one behind the pooling (0: there is none)."""
        chosen = self.completed(architecture)
        if not self.last_expansion:
            return chosen["head/width"], 0
        return self.last_expansion * chosen[f"mb{len(self.stages)}/width"], chosen["head/width"]

    def costs(
        self,
        architecture: Mapping[str, Any],
        *,
        image: tuple[int, int, int],
        num_classes: int,
        idle: bool = False,
    ) -> dict[str, int]:
        """Return exact "macs" (of one image; convolutions and matrix products) and "params".

        Args:
            architecture: Decisions by path.
            image: (C, H, W) as the task has it; the resolution is the height of the resized image.
            num_classes: Number of classes.
            idle: Count the projections of shortcuts too that are bypassed because the width stays the same.
        """
        chosen = self.completed(architecture)
        size = resized(image, chosen["resolution"])
        channels = chosen["stem/width"]
        size = _strided(size, self.stem_stride)
        macs, params = _area(size) * 9 * image[0] * channels, 9 * image[0] * channels + 2 * channels
        for stage in self.plan(architecture):
            for width, stride, kernel, hidden, expand, squeeze in stage:
                if expand:
                    macs += _area(size) * channels * hidden
                    params += hidden * (channels + 2)
                size = _strided(size, stride)
                macs += _area(size) * hidden * (kernel**2 + width) + 2 * hidden * squeeze
                params += hidden * (kernel**2 + 2 + width) + 2 * width
                params += 2 * hidden * squeeze + squeeze + hidden if squeeze else 0
                projected = channels * width
                macs += _area(size) * projected if channels != width else 0
                params += projected if channels != width or idle else 0
                channels = width
        last, mix = self.head(architecture)
        macs += _area(size) * channels * last + last * mix + (mix or last) * num_classes
        params += last * (channels + 2) + last * mix + (mix or last) * num_classes + num_classes
        return {"macs": macs, "params": params}


class ElasticSpace(ProductSpace):
    """A product space with the canonical form of these networks; made by ``elastic_space``."""

    def to_json(self) -> dict[str, Any]:
        """Return the space as a JSON object, for ``ProductSpace.from_json``; without its canonical form."""
        return self.without_canonical_form().to_json()


@lru_cache(maxsize=64)
def elastic_space(table: ElasticTable) -> ElasticSpace:
    """Return the space of a table: "resolution", "stem/width", "mb1/width", "mb1/depth", ..., "head/width".

    Groups are "resolution", "width", "depth", "kernel" and "expansion". Where a stage does not change the shape, its
    blocks may stand in the stage before as well: such networks have an equal ``network_digest``.
    """
    dimensions: dict[str, Element] = {
        path: Ordinal(options, group=group) for path, (options, group) in table.choices().items() if len(options) > 1
    }

    def canonical(architecture: Mapping[str, Any]) -> list[Any]:
        chosen = table.completed(architecture)
        blocks = [list(block) for stage in table.plan(architecture) for block in stage]
        return [chosen["resolution"], chosen["stem/width"], blocks, *table.head(architecture)]

    return ElasticSpace(NAME, dimensions, canonical=canonical)


def elastic_table(preset: str, image: tuple[int, int, int], **changed: Any) -> ElasticTable:
    """Return the table of a preset for images of one shape.

    Args:
        preset: A name of ``PRESETS``.
        image: (C, H, W); the first strides are dropped until the last map of the smallest resolution has at least
            ``SMALLEST_MAP`` pixels each way.
        changed: Fields of ``ElasticTable`` in place of the preset's. Resolutions that are no integers are parts of the
            image's height, rounded to even numbers.

    Raises:
        UserError: Unknown preset, options that are no rising lists, even kernels, or too small a resolution.
    """
    if preset not in PRESETS:
        raise UserError("family.preset", preset, allowed=", ".join(["auto", *PRESETS]))
    chosen = {**PRESETS[preset], **changed}
    chosen["stages"] = tuple(tuple(_listed(part) for part in row) for row in chosen["stages"])
    resolutions = chosen["resolutions"] = tuple(
        dict.fromkeys(_pixels(part, image[1]) for part in chosen["resolutions"])
    )
    for name in ("stem_widths", "head_widths"):
        chosen[name] = tuple(chosen[name])
    for number, row in enumerate(chosen["stages"]):
        stage = f"family.stages[{number}]"
        if len(row) != 6:
            raise UserError(stage, row, allowed="widths, depths, kernels, expansions, stride, channel gate")
        for part, options in zip(("widths", "depths", "kernels", "expansions"), row, strict=False):
            _check_options(f"{stage}.{part}", options)
        if any(kernel % 2 == 0 for kernel in row[2]):
            raise UserError(f"{stage}.kernels", row[2], allowed="odd numbers")
        if row[4] not in (1, 2):
            raise UserError(f"{stage}.stride", row[4], allowed="1 or 2")
        if 1 in row[3] and row[3] != (1,):
            raise UserError(f"{stage}.expansions", row[3], allowed="1 alone, which has no expansion, or others only")
    for name in ("resolutions", "stem_widths", "head_widths"):
        _check_options(f"family.{name}", chosen[name])
    side = min(resized(image, min(resolutions)))
    if side < SMALLEST_MAP:
        raise UserError(
            "family.resolutions", resolutions, allowed=f"images of at least {SMALLEST_MAP}x{SMALLEST_MAP} pixels"
        )
    strides = fitted_strides([chosen["stem_stride"], *(row[4] for row in chosen["stages"])], side)
    chosen["stem_stride"] = strides[0]
    chosen["stages"] = tuple(
        (*row[:4], stride, bool(row[5])) for row, stride in zip(chosen["stages"], strides[1:], strict=True)
    )
    return ElasticTable(**chosen)


def published_architecture(name: str, table: ElasticTable) -> Architecture:
    """Return a published AttentiveNAS network as a point of that space.

    Args:
        name: "A0", "A1", "A3" or "A5".
        table: Of the preset "attentivenas".

    Raises:
        UserError: Unknown name.
    """
    if name not in _ATTENTIVE:
        raise UserError("network", name, allowed=", ".join(_ATTENTIVE))
    resolution, widths, depths, kernels, expansions = _ATTENTIVE[name]
    return genotype(table, resolution, widths, depths, kernels, (1, *expansions, 6, 6))


def genotype(
    table: ElasticTable,
    resolution: int,
    widths: Sequence[int],
    depths: Sequence[int],
    kernels: Sequence[int],
    expansions: Sequence[int],
) -> Architecture:
    """Return the architecture of a genotype as tables print them, one list for each kind of choice.

    Args:
        table: The space's table.
        resolution: Height of the resized image.
        widths: Of stem, stages and head.
        depths: Of the stages.
        kernels: Of the stages.
        expansions: Of the stages.

    Raises:
        UserError: It is not of the space.
    """
    stem, *middle, head = widths
    values = {"resolution": resolution, "stem/width": stem, "head/width": head}
    rows = zip(middle, depths, kernels, expansions, strict=True)
    for number, row in enumerate(rows, start=1):
        values |= {
            f"mb{number}/{name}": v for name, v in zip(("width", "depth", "kernel", "expansion"), row, strict=True)
        }
    for path, (options, _) in table.choices().items():
        if values[path] not in options:
            raise UserError(f"architecture[{path!r}]", values[path], allowed=f"one of {list(options)}")
    searched = {path: values[path] for path, (options, _) in table.choices().items() if len(options) > 1}
    return elastic_space(table).validate(searched)


def drop_connect_rates(depths: Sequence[int], rate: float) -> list[float]:
    """Return the drop-connect rate of every block: ``rate * i / L`` for block i of L in the last two stages, else 0.

    Blocks that change the shape ignore theirs.
    """
    total, first = sum(depths), sum(depths[:-2])
    return [rate * number / total if number >= first else 0.0 for number in range(total)]


def fitted_strides(strides: Sequence[int], side: int) -> list[int]:
    """Return the strides with the first ones set to 1 until a side of ``side`` pixels ends with ``SMALLEST_MAP``."""
    fitted = list(strides)
    for position in range(len(fitted)):
        left = side
        for stride in fitted:
            left = -(-left // stride)
        if left >= SMALLEST_MAP:
            break
        fitted[position] = 1
    return fitted


def resized(image: tuple[int, int, int], resolution: int) -> tuple[int, int]:
    """Return height and width of the resized image: the proportions are kept."""
    return resolution, max(1, round(image[2] * resolution / image[1]))


def _pixels(part: float, height: int) -> int:
    return part if isinstance(part, int) else max(2, 2 * round(part * height / 2))


def _listed(part: Any) -> Any:
    return tuple(part) if isinstance(part, list | tuple) else part


def _check_options(name: str, options: Any) -> None:
    good = isinstance(options, tuple) and bool(options) and all(isinstance(o, int) and o >= 1 for o in options)
    if not good or list(options) != sorted(set(options)):
        raise UserError(name, options, allowed="rising integers from 1, at least one")


def _strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return (-(-size[0] // stride), -(-size[1] // stride))


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
