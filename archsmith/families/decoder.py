"""Causal language models of Hugging Face as slots: Llama, Qwen, Mistral, GPT-2, and others built like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from archsmith.core.errors import Shown, UserError
from archsmith.families.residual_slots import SlotFamily
from archsmith.families.slot_layout import ATTENTION

__all__ = ["HFDecoderFamily"]


class HFDecoderFamily(SlotFamily):
    """A causal model whose children generate with a key-value cache, however many heads each layer caches.

    Args:
        parent: A decoder of transformers, with or without a head.
        alternatives: See ``SlotFamily``.
        settings: See ``SlotFamily``.

    Raises:
        UserError: It is no model of transformers, or its attention is not causal.
    """

    def __init__(
        self, parent: nn.Module, *, alternatives: Mapping[str, Sequence[str]] | None = None, **settings: Any
    ) -> None:
        check_pretrained(parent)
        super().__init__(parent, alternatives=alternatives, **{"name": "decoder-slots", **settings})
        if not any(block.causal for blocks in self._blocks for block in blocks if block.part == ATTENTION):
            raise UserError(
                "parent",
                Shown(f"{type(parent).__name__} without causal attention"),
                allowed="a causal model",
                hint="Use archsmith.families.bert.HFEncoderFamily for encoders.",
            )


def check_pretrained(parent: nn.Module) -> None:
    """Refuse what is no model of transformers.

    Raises:
        UserError: It has no config, or cannot save itself.
    """
    if not hasattr(parent, "config") or not hasattr(parent, "save_pretrained"):
        raise UserError(
            "parent",
            Shown(type(parent).__name__),
            allowed="a model of transformers",
            hint="Use archsmith.families.residual_slots.SlotFamily for other models.",
        )
