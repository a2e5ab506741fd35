"""Encoders of Hugging Face as slots: BERT, DistilBERT, ViT, and others built like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from archsmith.core.errors import Shown, UserError
from archsmith.families.decoder import check_pretrained
from archsmith.families.residual_slots import SlotFamily
from archsmith.families.slot_layout import ATTENTION

__all__ = ["HFEncoderFamily"]


class HFEncoderFamily(SlotFamily):
    """An encoder, pre-norm (ViT) or post-norm (BERT, DistilBERT).

    In a post-norm block, ``norm(x + f(x))``, "none" takes the norm away with the sub-block: the block becomes the
    identity, and its cost is 0. What the next sub-block reads is then on the scale of the norm before. "norm" keeps the
    norm alone, for the price of its two vectors, and so the scale.

    Args:
        parent: An encoder of transformers, with any head.
        alternatives: See ``SlotFamily``.
        settings: See ``SlotFamily``.

    Raises:
        UserError: It is no model of transformers, or its attention is causal.
    """

    def __init__(
        self, parent: nn.Module, *, alternatives: Mapping[str, Sequence[str]] | None = None, **settings: Any
    ) -> None:
        check_pretrained(parent)
        super().__init__(parent, alternatives=alternatives, **{"name": "encoder-slots", **settings})
        if any(block.causal for blocks in self._blocks for block in blocks if block.part == ATTENTION):
            raise UserError(
                "parent",
                Shown(f"{type(parent).__name__} with causal attention"),
                allowed="an encoder",
                hint="Use archsmith.families.decoder.HFDecoderFamily for causal models.",
            )
