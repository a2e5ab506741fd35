"""Local linear attention: a regression of values on keys around every query, in place of their weighted mean.

Softmax attention reads off a local constant, linear attention one global linear fit; this fits, for each query, a
linear model with the softmax weights and returns its value there. ``attention`` is the layer, ``alternative`` the same
rule as a choice of Puzzle's attention slots, in a trained transformer whose other weights stay.

The layer and its backward pass are in ``archsmith.layers.local_linear_attention``.

Source: "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
arXiv 2510.01450.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from archsmith.families.slot_rules import LLA, Rule, local_linear
from archsmith.layers.self_attention import SelfAttention

SYSTEM = {
    "slug": "local-linear-attention",
    "title": "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention",
    "year": 2025,
    "arxiv": "2510.01450",
    "kind": "layer",
    "aliases": ["lla", "flash-lla"],
}


class Settings(BaseModel):
    """How the regressions are made.

    Attributes:
        ridge: Where the ridge starts, above 0; larger is closer to softmax attention.
        ridge_form: "fixed", or learned: one for each "head", or a linear map of each "token".
        blockwise: Stream tiles of keys: memory linear in the length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ridge: float = Field(default=0.1, gt=0)
    ridge_form: Literal["fixed", "head", "token"] = "fixed"
    blockwise: bool = True


def attention(
    embed_dim: int, num_heads: int, settings: Settings | None = None, *, causal: bool = True
) -> SelfAttention:
    """Return a layer (B, T, embed_dim) -> the same; its weights are named as those of the other kinds of attention.

    Args:
        embed_dim: Channels.
        num_heads: Heads, a divisor of ``embed_dim``.
        settings: The regressions; defaults if None.
        causal: Whether a position sees itself and the past only.

    Raises:
        ValueError: Sizes that do not divide.
    """
    chosen = settings or Settings()
    return SelfAttention(
        embed_dim,
        num_heads,
        kind="local_linear",
        causal=causal,
        ridge=chosen.ridge,
        ridge_form=chosen.ridge_form,
        blockwise=chosen.blockwise,
    )


def alternative(settings: Settings | None = None, *, name: str = LLA) -> Rule:
    """Return the rule as an alternative of attention slots: ``SlotFamily(parent, registered=[alternative()])``.

    Args:
        settings: Its ridge; a learned one is for layers that are trained from the start.
        name: Name among the alternatives.

    Raises:
        ValueError: A learned ridge.
    """
    chosen = settings or Settings()
    if chosen.ridge_form != "fixed":
        raise ValueError(f"ridge_form: got {chosen.ridge_form!r}; allowed in a trained transformer: 'fixed'.")
    return local_linear(name, ridge=chosen.ridge)
