"""Quantisation policies: in which precision every layer keeps its weights and computes. No torch.

A policy is a mapping layer name → ``LayerPolicy``; layers that it does not name keep fp32. ``archsmith.cost`` applies
it to ONNX files and to modules; ``archsmith.space.joint`` makes it a side of an architecture space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from archsmith.core.errors import UserError

LayerPrecision = Literal["fp32", "bf16", "int8"]
Granularity = Literal["per-channel", "per-tensor"]
Scheme = Literal["symmetric", "asymmetric"]

BITS: Mapping[str, int] = {"fp32": 32, "bf16": 16, "int8": 8}
"""Bits of a stored weight."""


@dataclass(frozen=True)
class LayerPolicy:
    """How one layer is quantised.

    Args:
        precision: ``int8`` quantises weights and activations of the layer; ``bf16`` stores its weights in bfloat16 and
            computes in float32; ``fp32`` leaves it alone.
        granularity: Of the int8 weights: a scale for each output channel, or one for the tensor. Activations always
            have one scale.
        scheme: Of the int8 weights. Activations are always asymmetric.

    Raises:
        UserError: Another word than those.
    """

    precision: LayerPrecision = "fp32"
    granularity: Granularity = "per-channel"
    scheme: Scheme = "symmetric"

    def __post_init__(self) -> None:
        for name, words in (("precision", LayerPrecision), ("granularity", Granularity), ("scheme", Scheme)):
            if (given := getattr(self, name)) not in get_args(words):
                raise UserError(f"policy.{name}", given, allowed=", ".join(get_args(words)))

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return BITS[self.precision]

    def to_json(self) -> dict[str, str]:
        """Return the three words; ``LayerPolicy(**data)`` is the way back."""
        return {"precision": self.precision, "granularity": self.granularity, "scheme": self.scheme}


Policy = Mapping[str, LayerPolicy]
"""Layer name → its policy."""

FP32 = LayerPolicy("fp32")


def check_layers(policy: Policy, layers: Mapping[str, Any]) -> None:
    """Refuse a policy that names a layer which is not there.

    Args:
        policy: The policy.
        layers: The layers that can be quantised, by name.

    Raises:
        UserError: Names the layer and the nearest that exist.
    """
    import difflib

    for name in policy:
        if name not in layers:
            near = difflib.get_close_matches(name, list(layers), n=3, cutoff=0.0)
            raise UserError(
                "policy",
                name,
                allowed=f"one of the {len(layers)} layers with weights",
                hint=f"Nearest: {', '.join(near)}." if near else "This network has none.",
            )


def policy_bytes(elements: Mapping[str, int], params: int, policy: Policy) -> int:
    """Return the analytic size of a network under a policy: exact, without writing a file.

    Everything that is no weight of a listed layer (biases, normalisations, other layers) takes 4 bytes; the weights of
    a listed layer take ``bits / 8``. Scales and zero points are not counted, and nothing of a file's format is: never
    mix this number with sizes of files.

    Args:
        elements: Elements of the weight of every layer that a policy may name.
        params: All parameters of the network, those weights included.
        policy: The policy; layers that it does not name take 4 bytes.

    Raises:
        UserError: The policy names a layer that is not there.

    Example:
        >>> policy_bytes({"conv": 100}, 110, {"conv": LayerPolicy("int8")})
        140
    """
    check_layers(policy, elements)
    listed = sum(elements.values())
    return 4 * (params - listed) + sum(count * policy.get(name, FP32).bits // 8 for name, count in elements.items())
