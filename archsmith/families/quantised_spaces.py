"""The two published joint spaces of SimQ-NAS: elastic ResNet50 and BERT-base, each with a policy per layer.

Closed forms only (which layers exist, their shapes, parameters); nothing is built.

ResNet50 (once-for-all's): a stem of three convolutions, one of them optional; four stages of 4, 4, 6 and 4 bottlenecks,
of which the last two can go; three convolutions each, and one in the shortcut of a stage's first. Genes: ``depth/0``
of the stem (the optional convolution exists at 2), ``depth/1..4`` blocks kept beyond the least, ``expand/i`` the
bottleneck of block i, ``width/0`` and ``/1`` of the stem, ``width/2..5`` of the stages.

BERT: ``layers`` encoders, heads and feed-forward width of each; one site before, six in every encoder, one behind.

Source: SimQ-NAS, arXiv 2312.13301; OFA, arXiv 1908.09791.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archsmith.space import Condition, Element, Given, LayerPolicy, Ordinal, ProductSpace, When, policy_bytes
from archsmith.space.joint import JointSpace

STAGE_WIDTHS = (256, 512, 1024, 2048)
STAGE_BLOCKS = (4, 4, 6, 4)
WIDTHS = (0.65, 0.8, 1.0)
EXPANSIONS = (0.2, 0.25, 0.35)
STEM = 64
CLASSES = 1000

ENCODERS = 12
ENCODER_SITES = ("query", "key", "value", "attention-output", "ffn-in", "ffn-out")


@dataclass(frozen=True)
class ConvShape:
    """A convolution of a network.

    Args:
        site: Its name.
        out_channels: Output channels.
        in_channels: Input channels.
        kernel: Side of its kernel.
    """

    site: str
    out_channels: int
    in_channels: int
    kernel: int

    @property
    def elements(self) -> int:
        """Elements of the weight (no convolution has a bias)."""
        return self.out_channels * self.in_channels * self.kernel**2


def resnet50_space() -> ProductSpace:
    """Return the architecture space: 29 genes, those of absent blocks not asked for."""
    elements: dict[str, Element] = {f"depth/{i}": Ordinal((0, 1, 2), group="depth") for i in range(5)}
    elements |= {f"width/{i}": Ordinal((0, 1, 2), group="width") for i in range(6)}
    number = 0
    for stage, blocks in enumerate(STAGE_BLOCKS):
        for block in range(blocks):
            exists = _block_exists(stage, block)
            expand = Ordinal(EXPANSIONS, group="expand")
            elements[f"expand/{number}"] = expand if exists is None else Given(exists, expand)
            number += 1
    return ProductSpace("ofa-resnet50", elements)


def resnet50_sites() -> dict[str, Condition | None]:
    """Return the 61 convolutions and when they exist. The stem's optional one is listed last of its three."""
    sites: dict[str, Condition | None] = {"stem.0": None, "stem.2": None, "stem.1": When("depth/0", 2)}
    for stage, blocks in enumerate(STAGE_BLOCKS):
        for block in range(blocks):
            for leaf in ("conv1", "conv2", "conv3", *(("shortcut",) if block == 0 else ())):
                sites[f"stage{stage}.{block}.{leaf}"] = _block_exists(stage, block)
    return sites


def resnet50_joint_space() -> JointSpace:
    """Return the published joint space: int8 or fp32, symmetric or asymmetric weights, for each of 61 convolutions."""
    return JointSpace(
        resnet50_space(), resnet50_sites(), precisions=("int8", "fp32"), schemes=("symmetric", "asymmetric")
    )


def resnet50_convolutions(architecture: Mapping[str, Any]) -> list[ConvShape]:
    """Return the convolutions of an architecture, in the order of execution."""
    widths = [WIDTHS[int(architecture[f"width/{i}"])] for i in range(6)]
    channels = _rounded(STEM * widths[1])
    middle = _rounded(_rounded(STEM * widths[0]) // 2)
    optional = [ConvShape("stem.1", middle, middle, 3)] if architecture["depth/0"] == 2 else []
    found = [ConvShape("stem.0", middle, 3, 3), *optional, ConvShape("stem.2", channels, middle, 3)]
    first = 0
    for stage, (whole, blocks) in enumerate(zip(STAGE_WIDTHS, STAGE_BLOCKS, strict=True)):
        out = _rounded(whole * widths[stage + 2])
        for block in range(blocks - 2 + int(architecture[f"depth/{stage + 1}"])):
            hidden = _rounded(round(out * float(architecture[f"expand/{first + block}"])))
            name = f"stage{stage}.{block}"
            found += [
                ConvShape(f"{name}.conv1", hidden, channels, 1),
                ConvShape(f"{name}.conv2", hidden, hidden, 3),
                ConvShape(f"{name}.conv3", out, hidden, 1),
            ]
            if block == 0:
                found.append(ConvShape(f"{name}.shortcut", out, channels, 1))
            channels = out
        first += blocks
    return found


def resnet50_params(architecture: Mapping[str, Any]) -> int:
    """Return all parameters: convolutions, scale and shift behind each, and the classifier."""
    shapes = resnet50_convolutions(architecture)
    last = _rounded(STAGE_WIDTHS[-1] * WIDTHS[int(architecture["width/5"])])
    return sum(each.elements + 2 * each.out_channels for each in shapes) + (last + 1) * CLASSES


def resnet50_bytes(architecture: Mapping[str, Any], policy: Mapping[str, LayerPolicy]) -> int:
    """Return the analytic size, see ``archsmith.space.policy_bytes``."""
    elements = {each.site: each.elements for each in resnet50_convolutions(architecture)}
    return policy_bytes(elements, resnet50_params(architecture), policy)


def bert_space() -> ProductSpace:
    """Return the architecture space: 6 to 12 encoders, with 6 to 12 heads and a feed-forward width each."""
    elements: dict[str, Element] = {"layers": Ordinal(tuple(range(6, ENCODERS + 1)))}
    for name, options in (("heads", (6, 8, 10, 12)), ("ffn", (1024, 2048, 3072))):
        for number in range(ENCODERS):
            dimension, exists = Ordinal(options, group=name), _encoder_exists(number)
            elements[f"{name}/{number}"] = dimension if exists is None else Given(exists, dimension)
    return ProductSpace("bert-sst2", elements)


def bert_sites() -> dict[str, Condition | None]:
    """Return the 74 linear layers and when they exist."""
    sites: dict[str, Condition | None] = {"first": None}
    for number in range(ENCODERS):
        sites |= {f"encoder{number}.{leaf}": _encoder_exists(number) for leaf in ENCODER_SITES}
    return {**sites, "last": None}


def bert_joint_space() -> JointSpace:
    """Return the published joint space: int8 or fp32 for each of 74 linear layers."""
    return JointSpace(bert_space(), bert_sites(), precisions=("int8", "fp32"))


def _block_exists(stage: int, block: int) -> Condition | None:
    extra = block - (STAGE_BLOCKS[stage] - 2)
    return None if extra < 0 else When(f"depth/{stage + 1}", list(range(extra + 1, 3)))


def _encoder_exists(number: int) -> Condition | None:
    return None if number < 6 else When("layers", list(range(number + 1, ENCODERS + 1)))


def _rounded(channels: float) -> int:
    """Return the multiple of 8 near ``channels``, not below nine tenths of it."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8
