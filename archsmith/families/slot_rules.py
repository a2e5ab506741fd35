"""Another way to read values off keys in place of softmax, inside the parent's attention: local linear attention.

The attention module of transformers keeps everything it does around the scores (projections, positions, norms, cache)
and asks a table of functions for the rest. A ``Rule`` puts its function into that table, for the chosen layers only.
"""

# B batch, H query heads, K key-value heads, T queries, S keys, D head width

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.families.slot_alternatives import Alternative, Site
from archsmith.families.slot_layout import ATTENTION
from archsmith.layers.local_linear_attention import local_linear_attention

Attend = Callable[..., Tensor]
"""``attend(q, k, v, mask=, causal=, scale=)``: q (B, H, T, D), k and v (B, K, S, D), mask (B, 1, T, S) of bool or None
-> (B, H, T, D). Query i of a causal call sees keys up to i + S - T."""


@dataclass(frozen=True)
class Rule(Alternative):
    """The parent's attention with another function of queries, keys and values; all weights are the parent's.

    Attributes:
        name: Its name; also its place in the table of transformers, so two functions need two names.
        attend: See ``Attend``.
        head_products: Multiply-accumulates for each pair of tokens, head and channel; 2 for softmax attention.
        part: "attention".
    """

    name: str
    attend: Attend
    head_products: int = 2
    part: str = ATTENTION

    def check(self, site: Site) -> None:
        """Refuse attention that does not ask transformers for its function.

        Raises:
            UserError: It is not of transformers.
        """
        if not hasattr(getattr(site.core, "config", None), "_attn_implementation"):
            raise UserError(
                f"layer{site.index}.{self.part}",
                Shown(type(site.core).__name__),
                allowed="attention of transformers, for alternatives that change its function",
                hint="For a model of your own register Own(...), which replaces the module.",
            )

    def apply_(self, site: Site) -> None:
        """Let this layer's attention ask for the rule."""
        key = f"archsmith-{self.name}"
        register(key, self.attend)
        core: Any = site.core
        core.config = copy.copy(core.config)  # of this layer alone
        core.config._attn_implementation_internal = key

    def products(self, site: Site) -> tuple[int, int]:
        """Return the rule's products, and the cache of the parent's heads."""
        block = site.block
        return (
            self.head_products * block.heads * block.head_dim,
            2 * block.kv_heads * block.head_dim * block.causal,
        )


def register(key: str, attend: Attend) -> None:
    """Put a function into the table of transformers.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface
    except ImportError:
        raise MissingExtra("transformers", "text", "Changing the attention function of a model") from None

    def called(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        if mask is not None and mask.is_floating_point():  # eager attention adds a number to the scores
            mask = mask > -1.0
        causal = mask is None and query.shape[2] > 1 and bool(getattr(module, "is_causal", True))
        found = attend(query, key, value, mask=mask, causal=causal, scale=scaling)
        return found.transpose(1, 2).contiguous(), None

    AttentionInterface.register(key, called)


LLA = "lla"
LLA_ITERATIONS = 32


def local_linear(name: str = LLA, *, ridge: float = 0.1) -> Rule:
    """Return local linear attention as an alternative: "lla".

    Each query fits a ridge regression of values on keys, weighted by the softmax scores, and reads it off at itself. It
    is solved by at most 32 steps of conjugate gradients, as published, and its products are counted as if by all of
    them: two for scores and sums of keys, two for the output, and two for each step.

    Args:
        name: Its name.
        ridge: Of the regression; larger is closer to softmax attention.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        return local_linear_attention(
            q, k, v, ridge=ridge, scale=scale, causal=causal, mask=mask, iterations=LLA_ITERATIONS
        )

    return Rule(name, attend, head_products=4 + 2 * LLA_ITERATIONS)
