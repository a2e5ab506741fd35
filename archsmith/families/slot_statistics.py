"""The calibration pass: what the channels and heads of a parent do on real inputs."""

# I intermediate channels, K key-value heads

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archsmith.atoms.contribution import IterativePruning, channel_contribution, head_contribution
from archsmith.core.errors import Shown, UserError
from archsmith.families.slot_layout import ATTENTION, FFN

if TYPE_CHECKING:
    from archsmith.families.residual_slots import SlotFamily


def collected(family: SlotFamily, batches: Sequence[Any]) -> dict[str, dict[str, Tensor]]:
    """Run the parent on ``batches`` and return by slot name the scores of its units.

    Returns:
        For attention "kv_heads" (K,). For FFNs "channels" (I,), and with ``ranking="iterative"`` also "removal" (I,):
        when each channel went. Higher is better in all of them.

    Raises:
        UserError: No batch, or activations that are not finite.
    """
    if not batches:
        raise UserError("batches", Shown("none"), allowed="at least one calibration batch")
    found: dict[str, dict[str, Tensor]] = {}
    real = _RealTokens()
    finer: dict[str, IterativePruning] = {}
    handles = []
    for slot in family.slots:
        block = family.sub_block(slot.layer, slot.part)
        site = family.site(slot.layer, slot.part)
        if slot.part == ATTENTION and "output" in block.roles and block.kv_heads:
            weight = site.weight("output")
            score = partial(head_contribution, weight=weight, kv_heads=block.kv_heads)
            hook = _adding(found.setdefault(slot.name, {}), "kv_heads", slot.name, score, real)
            handles.append(site.role("output").register_forward_pre_hook(hook))
        elif slot.part == FFN and "down" in block.roles:
            weight = site.weight("down")
            rows = found.setdefault(slot.name, {})
            hook = _adding(rows, "channels", slot.name, partial(channel_contribution, weight=weight), real)
            handles.append(site.role("down").register_forward_pre_hook(hook))
            if family.ranking == "iterative":
                finer[slot.name] = pruning = IterativePruning(weight, len(batches))
                handles.append(site.role("down").register_forward_pre_hook(_updating(pruning, real)))
    try:
        with torch.no_grad():
            for batch in batches:
                real.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                run_batch(family.parent, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, pruning in finer.items():
        found[name]["removal"] = pruning.ranks()
    return {name: {key: value.cpu() for key, value in rows.items()} for name, rows in found.items() if rows}


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: keywords of a mapping, positions of a tuple, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class _RealTokens:
    """Takes the activations of tokens that are no padding, where a batch has an ``attention_mask`` (B, T)."""

    mask: Any = None

    def of(self, activations: Tensor) -> Tensor:
        mask = self.mask
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == activations.shape[:2]:
            return activations[mask.bool().to(activations.device)]
        return activations


def _adding(
    rows: dict[str, Tensor], key: str, slot: str, score: Callable[[Tensor], Tensor], real: _RealTokens
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        scores = score(real.of(args[0]))
        if not bool(torch.isfinite(scores).all()):
            raise UserError(f"activations of {slot}", Shown("NaN or infinite"), allowed="finite activations")
        rows[key] = rows[key] + scores if key in rows else scores

    return hook


def _updating(pruning: IterativePruning, real: _RealTokens) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        pruning.update(real.of(args[0]))

    return hook
