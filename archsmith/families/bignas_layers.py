"""The layers of stage-wise elastic mobile networks by name, with the elements of their weights; nothing is built.

Names are those of the network's modules, so that a quantisation policy (SimQ-NAS, arXiv 2312.13301) can speak of them
before there is a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archsmith.families.bignas import BigNasFamily


def layer_elements(family: BigNasFamily, architecture: Mapping[str, Any]) -> dict[str, int]:
    """Return the elements of every convolution and of the classifier of a child, in the order of execution.

    Args:
        family: The family.
        architecture: Decisions by path.
    """
    channels = family.table.completed(architecture)["stem/width"]
    found = {"stem.conv": 9 * family.image[0] * channels}
    for s, stage in enumerate(family.table.plan(architecture)):
        for b, (width, _, kernel, hidden, expand, squeeze) in enumerate(stage):
            body = f"stages.{s}.{b}.body"
            if expand:
                found[f"{body}.expand.conv"] = channels * hidden
            found[f"{body}.depthwise"] = hidden * kernel**2
            if squeeze:
                found |= {f"{body}.gate.reduce": hidden * squeeze, f"{body}.gate.expand": squeeze * hidden}
            found[f"{body}.project"] = hidden * width
            if channels != width:
                found[f"stages.{s}.{b}.shortcut.project"] = channels * width
            channels = width
    last, mix = family.table.head(architecture)
    found["last.conv"] = channels * last
    if mix:
        found["mix.0"] = last * mix
    found["classifier"] = (mix or last) * family.num_classes
    return found
