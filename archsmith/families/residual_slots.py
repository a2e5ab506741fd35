"""Any trained residual model as a row of slots, each with alternatives: the family behind block-by-block searches.

A transformer layer is attention, then an FFN, each added to the residual stream. Because every sub-block keeps the
width of the stream, any of them can be replaced without a change elsewhere: by one with fewer key-value heads, fewer
channels, by one matrix, by nothing. A slot is one sub-block of one layer; a point of the space names one alternative
for each slot; the child is a model of the parent's class.

Source: "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", arXiv 2411.19146.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.families.slot_alternatives import (
    PARENT,
    Alternative,
    KVHeads,
    Removed,
    Site,
    State,
    named_alternative,
)
from archsmith.families.slot_costs import SlotCost
from archsmith.families.slot_discovery import discover, observed, run_watched
from archsmith.families.slot_layout import (
    ATTENTION,
    FFN,
    SubBlock,
    is_projection,
    locate,
    module_at,
    tensors_of,
    weight_of,
)
from archsmith.space import Architecture, Categorical, ProductSpace

FFN_PERCENTS = (87, 75, 50, 25, 20, 10)
"""Widths of the published library, in per cent of the parent's."""

Choices = Mapping[str, str]
Library = Mapping[tuple[str, str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Slot:
    """One sub-block of one layer.

    Attributes:
        name: "layer3.attention": also the path of the decision in the space.
        layer: Number of the layer.
        part: "attention", "ffn", or a name of the user's.
        alternatives: Names of what may stand there; the first is "parent".
    """

    name: str
    layer: int
    part: str
    alternatives: tuple[str, ...]


class SlotFamily:
    """The children of one parent.

    Args:
        parent: Trained residual model; put into evaluation mode, never changed otherwise.
        alternatives: Names by part ("attention", "ffn") or by slot ("layer3.ffn"), which takes precedence; "parent" is
            added in front where it is missing. By default: for attention fewer key-value heads (halved again and again,
            then 1), "linear", "none"; for the FFN 87, 75, 50, 25, 20 and 10 per cent of its width, "linear", "none".
            Post-norm models have "norm" as well.
        layers: Path of the list of layers; found by itself where the structure is known.
        sub_blocks: What the sub-blocks of a layer are, where they have unknown names.
        example: Arguments of one call of the parent (a mapping, a tuple, or a tensor). With it the parent is run once:
            sub-blocks without known names are found on numbers (``slot_discovery``), and what cores return is seen.
            Needed for models that are not of transformers unless ``sub_blocks`` says it all.
        registered: Alternatives of the user's own (``archsmith.families.slot_alternatives.Own``).
        kv_initialiser: How fewer key-value heads begin: "mean" or "prune".
        ranking: Which channels stay in a narrower FFN: "contribution", "iterative" or "norm".
        multiple: Widths given in per cent are rounded to multiples of this.
        name: Name of the space.

    Attributes:
        parent: The parent.
        slots: All slots, in the order of the layers.
        space: One choice for each slot.
        layer_paths: Module path of every layer.
        statistics: By slot name what ``collect_statistics`` found; plain tensors, empty before. May be set, to share
            one calibration pass between processes.

    Raises:
        UserError: No layers found, a parent with NaN or infinite weights, or an alternative that cannot stand where it
            was asked for.
    """

    def __init__(
        self,
        parent: nn.Module,
        *,
        alternatives: Mapping[str, Sequence[str]] | None = None,
        layers: str | None = None,
        sub_blocks: Sequence[SubBlock] | None = None,
        example: Any = None,
        registered: Sequence[Alternative] = (),
        kv_initialiser: Literal["mean", "prune"] = "mean",
        ranking: Literal["contribution", "iterative", "norm"] = "contribution",
        multiple: int = 1,
        name: str = "residual-slots",
    ) -> None:
        check_options(kv_initialiser, ranking, multiple)
        _check_finite(parent)
        self.parent = parent.eval()
        self.layer_paths, self._blocks = find_blocks(parent, layers, sub_blocks, example)
        self._sub_blocks = sub_blocks
        self.registered = tuple(registered)
        self._options = {"kv_initialiser": kv_initialiser, "ranking": ranking, "multiple": multiple}
        self.ranking = ranking
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._costs: dict[tuple[str, str], SlotCost] = {}
        self._rest: SlotCost | None = None
        self.slots = self._slots(dict(alternatives or {}))
        self._by_name = {slot.name: slot for slot in self.slots}
        self.space = ProductSpace(name, {slot.name: Categorical(slot.alternatives) for slot in self.slots})

    # ---- what there is -------------------------------------------------------------------------------------------

    def _slots(self, wanted: dict[str, Sequence[str]]) -> tuple[Slot, ...]:
        slots = []
        for index, blocks in enumerate(self._blocks):
            for block in blocks:
                name = slot_name(index, block.part)
                site = Site(self.layer(index), block, index)
                names = wanted.get(name, wanted.get(block.part))
                if names is None:
                    names = [
                        *default_alternatives(site),
                        *(own.name for own in self.registered if own.part == block.part),
                    ]
                rows = tuple(dict.fromkeys((PARENT, *names)))
                for row in rows:
                    self._named(block.part, row).check(site)
                slots.append(Slot(name, index, block.part, rows))
        known = {slot.name for slot in slots} | {slot.part for slot in slots}
        if unknown := sorted(set(wanted) - known):
            raise UserError("alternatives", unknown, allowed=f"parts or slots of this model: {sorted(known)[:12]}")
        return tuple(slots)

    def _named(self, part: str, name: str) -> Alternative:
        return named_alternative(part, name, registered=self.registered, **self._options)  # type: ignore[arg-type]

    def layer(self, index: int) -> nn.Module:
        """Return the parent's layer."""
        found: nn.Module = module_at(self.parent, self.layer_paths[index])
        return found

    def sub_block(self, index: int, part: str) -> SubBlock:
        """Return where a part sits in a layer.

        Raises:
            UserError: The layer has no such part.
        """
        for block in self._blocks[index]:
            if block.part == part:
                return block
        raise UserError("part", part, allowed=f"a part of layer {index}: {[b.part for b in self._blocks[index]]}")

    def slot(self, name: str) -> Slot:
        """Return the slot of a name.

        Raises:
            UserError: There is none.
        """
        if name not in self._by_name:
            raise UserError("slot", name, allowed=f"one of {list(self._by_name)[:8]} ...")
        return self._by_name[name]

    def with_alternatives(self, alternatives: Mapping[str, Sequence[str]]) -> SlotFamily:
        """Return a family of the same parent and statistics with other alternatives, by part or by slot."""
        made = copy.copy(self)
        made._costs = {}
        made.slots = made._slots(dict(alternatives))
        made._by_name = {slot.name: slot for slot in made.slots}
        made.space = ProductSpace(self.space.name, {slot.name: Categorical(slot.alternatives) for slot in made.slots})
        return made

    def site(self, index: int, part: str, layer: nn.Module | None = None) -> Site:
        """Return the site of a part in the parent's layer, or in a copy of it."""
        block = self.sub_block(index, part)
        return Site(layer or self.layer(index), block, index, self._counts_tokens(index))

    def _counts_tokens(self, index: int) -> bool:
        """Return whether transformers may ask this layer's cache how many tokens it has seen."""
        config = getattr(self.parent, "config", None)
        kinds = getattr(config, "layer_types", None) or [None] * len(self._blocks)
        return config is not None and list(kinds).index(kinds[index]) == index

    # ---- building ------------------------------------------------------------------------------------------------

    def variant_layer(
        self, index: int, choices: Choices, *, weights: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> nn.Module:
        """Return a copy of layer ``index`` with these sub-blocks replaced, and the parent's forward signature.

        Args:
            index: Number of the layer.
            choices: Alternative by part; parts that are absent stay the parent's.
            weights: By part a trained state (``variant_state``); others begin as computed from the parent.
        """
        config = getattr(self.parent, "config", None)
        layer = copy.deepcopy(self.layer(index), {} if config is None else {id(config): config})
        self._replace_(layer, index, choices, weights or {})
        return layer

    def _replace_(
        self, layer: nn.Module, index: int, choices: Choices, weights: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        for part, name in choices.items():
            site = self.site(index, part, layer)
            alternative = self._named(part, name)
            alternative.check(self.site(index, part))
            alternative.apply_(site)
            state = weights.get(part)
            if state is None:
                statistics = self.statistics.get(slot_name(index, part), {})
                if self._on_meta():
                    continue
                state = alternative.initial(self.site(index, part), statistics)
                load_tensors_(layer, state, f"layer{index}.{part}={name}", whole=None)
            else:
                load_tensors_(layer, state, f"layer{index}.{part}={name}", whole=site.block)

    def _on_meta(self) -> bool:
        return next(self.parent.parameters()).is_meta

    def variant_state(self, index: int, part: str, layer: nn.Module) -> State:
        """Return the tensors of a sub-block of ``layer``, detached, under their names in the layer."""
        block = self.sub_block(index, part)
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors_of(layer, block)}

    def load_variant(self, index: int, part: str, alternative: str, state: Mapping[str, Tensor]) -> nn.Module:
        """Return layer ``index`` with one sub-block as ``variant_state`` saved it.

        Raises:
            UserError: The state lacks a tensor, has another, or one of another shape.
        """
        return self.variant_layer(index, {part: alternative}, weights={part: state})

    def build(self, arch: Mapping[str, Any], *, library: Library | None = None, seed: int | None = None) -> nn.Module:
        """Return the child: a model of the parent's class in evaluation mode.

        Args:
            arch: A point of the space.
            library: Trained states by (slot name, alternative); what is missing begins as computed from the parent.
            seed: Not used: nothing is drawn.
        """
        architecture = self.space.validate(arch)
        child = copy.deepcopy(self.parent)
        plan: list[dict[str, Any]] = []
        for index, blocks in enumerate(self._blocks):
            layer = module_at(child, self.layer_paths[index])
            row: dict[str, Any] = {}
            for block in blocks:
                name = slot_name(index, block.part)
                choice = str(architecture[name])
                row[block.part] = self._named(block.part, choice).spec(self.site(index, block.part))
                if choice != PARENT or (library and (name, choice) in library):
                    trained = {block.part: library[name, choice]} if library and (name, choice) in library else {}
                    self._replace_(layer, index, {block.part: choice}, trained)
            plan.append(row)
        record_plan_(child, self.layer_paths, plan)
        return child.eval()

    def parent_architecture(self) -> Architecture:
        """Return the point of the space that is the parent."""
        return self.space.validate({slot.name: PARENT for slot in self.slots})

    # ---- costs ---------------------------------------------------------------------------------------------------

    def cost(self, slot: str | Slot, alternative: str) -> SlotCost:
        """Return the exact costs of an alternative, counted on its structure; nothing is computed.

        Args:
            slot: A slot or its name.
            alternative: Any name that can stand there, listed or not.
        """
        slot = self.slot(slot) if isinstance(slot, str) else slot
        key = (slot.name, alternative)
        if key not in self._costs:
            self._costs[key] = self._counted(slot, alternative)
        return self._costs[key]

    def _counted(self, slot: Slot, name: str) -> SlotCost:
        layer = on_meta(self.layer(slot.layer), getattr(self.parent, "config", None))
        chosen = self._named(slot.part, name)
        chosen.check(self.site(slot.layer, slot.part))
        site = self.site(slot.layer, slot.part, layer)
        pairs, cached = chosen.products(site)
        chosen.apply_(site)
        tensors = {
            id(tensor): tensor for _, tensor in tensors_of(layer, site.block) if isinstance(tensor, nn.Parameter)
        }
        return SlotCost(
            params=sum(tensor.numel() for tensor in tensors.values()),
            token_macs=sum(tensor.numel() for tensor in _matrices(layer, site.block)),
            pair_macs=pairs,
            kv_values=cached,
            window=self._window(slot.layer) if cached else None,
        )

    def _window(self, index: int) -> int | None:
        config = getattr(self.parent, "config", None)
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if window is None or not getattr(config, "use_sliding_window", True):
            return None
        return int(window) if kinds is None or kinds[index] == "sliding_attention" else None

    def rest_cost(self) -> SlotCost:
        """Return the costs of everything outside of the slots: embeddings, head, final norm, shared norms.

        MACs are those of the linear layers and the head on every token; a pooler works once for each sequence. The
        patch embedding of an image model (a convolution) works on every token but the class token.
        """
        if self._rest is None:
            self._rest = self._counted_rest()
        return self._rest

    def _counted_rest(self) -> SlotCost:
        owned: set[int] = set()
        for index, blocks in enumerate(self._blocks):
            for block in blocks:
                owned |= {id(tensor) for _, tensor in tensors_of(self.layer(index), block)}
        params = sum(tensor.numel() for tensor in self.parent.parameters() if id(tensor) not in owned)
        extra = sum(name.endswith(("cls_token", "distillation_token")) for name, _ in self.parent.named_parameters())
        token, sequence = 0, 0
        each_token = "TokenClassification" in type(self.parent).__name__
        for name, module in self.parent.named_modules():
            if is_projection(module) and id(module.weight) not in owned:
                once = "pooler" in name or ("classifier" in name and not each_token)
                token, sequence = token + (not once) * module.weight.numel(), sequence + once * module.weight.numel()
            elif isinstance(module, nn.Conv2d) and module.weight.shape[2:] == tuple(module.stride):
                token += module.weight.numel()
                sequence -= extra * module.weight.numel()
        return SlotCost(params=params, token_macs=int(token), sequence_macs=int(sequence))

    def total_cost(self, arch: Mapping[str, Any]) -> SlotCost:
        """Return the sum over slots and the rest; the window is left out where slots have different ones.

        Raises:
            UserError: Not a point of the space.
        """
        architecture = self.space.validate(arch)
        rows = [self.cost(slot, str(architecture[slot.name])) for slot in self.slots] + [self.rest_cost()]
        windows = {row.window for row in rows if row.kv_values}
        return SlotCost(
            params=sum(row.params for row in rows),
            token_macs=sum(row.token_macs for row in rows),
            pair_macs=sum(row.pair_macs for row in rows),
            kv_values=sum(row.kv_values for row in rows),
            window=windows.pop() if len(windows) == 1 else None,
            sequence_macs=sum(row.sequence_macs for row in rows),
        )

    # ---- calibration ---------------------------------------------------------------------------------------------

    def collect_statistics(self, batches: Iterable[Any]) -> None:
        """Run the parent on calibration batches and keep what ranks channels and key-value heads.

        Args:
            batches: Arguments of the parent: mappings (keywords), tuples, or single tensors. Padding does not count
                where a mapping has an "attention_mask" (B, T).
        """
        from archsmith.families.slot_statistics import collected

        self.statistics = collected(self, list(batches))

    def verify(self, batch: Any, *, tolerance: float = 1e-5) -> None:
        """Check on real inputs that the slots are what they are taken for; for models built in an unusual way.

        A layer whose sub-blocks were all removed must return its input. Layers that hold weight matrices outside of
        their slots cannot be checked like that and are passed over.

        Args:
            batch: Arguments of the parent.
            tolerance: Allowed difference, relative to the largest value or 1.

        Raises:
            UserError: Names the first layer that does not, and its sub-blocks.
        """
        for index in range(len(self._blocks)):
            check_layer(self, index, batch, tolerance)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, child: nn.Module, directory: str | Path) -> None:
        """Write a child: config.json with the plan of every layer, and safetensors. See ``slot_files.save``."""
        from archsmith.families.slot_files import save

        save(child, directory)

    def load(self, directory: str | Path) -> nn.Module:
        """Return the child of a directory that ``save`` or ``save_pretrained`` wrote. See ``slot_files.load``."""
        from archsmith.families.slot_files import load

        blocks = self._sub_blocks
        if blocks is None and not hasattr(self.parent, "config"):
            every = [block for row in self._blocks for block in row]
            blocks = [block for at, block in enumerate(every) if block not in every[:at]]
        return load(directory, parent=self.parent, registered=self.registered, sub_blocks=blocks)


def check_layer(family: SlotFamily, index: int, batch: Any, tolerance: float) -> None:
    """Check that a layer without its sub-blocks returns its input; see ``SlotFamily.verify``.

    Raises:
        UserError: It does not.
    """
    parts = [block.part for block in family._blocks[index]]
    owned = {name for block in family._blocks[index] for name, _ in tensors_of(family.layer(index), block)}
    if any(p.dim() > 1 for name, p in family.layer(index).named_parameters() if name not in owned):
        return
    shared = [*family.parent.parameters(), *family.parent.buffers()]
    child = copy.deepcopy(family.parent, {id(tensor): tensor for tensor in shared})  # no second set of weights
    layer = module_at(child, family.layer_paths[index])
    family._replace_(layer, index, dict.fromkeys(parts, "none"), {})
    row = run_watched(child, batch)[id(layer)]
    if row.first is None or row.output is None or row.first.shape != row.output.shape:
        gap, largest = float("inf"), 1.0
    else:
        gap, largest = float((row.output - row.first).abs().max()), max(1.0, float(row.first.abs().max()))
    if not gap <= tolerance * largest:
        raise UserError(
            family.layer_paths[index],
            Shown(f"a layer that changes its input by {gap:.3g} though {parts} were removed"),
            allowed="a layer that is the sum of its input and its sub-blocks",
            hint="Name the sub-blocks yourself with sub_blocks=[SubBlock(...)], norms and closing modules included.",
        )


PLAN = "archsmith_slots"
"""Where a child says what its layers are: attribute of its config (Hugging Face) or of the module itself."""

PLAN_VERSION = 1


def record_plan_(child: nn.Module, paths: Sequence[str], plan: Sequence[Mapping[str, Any]]) -> None:
    """Write the plan of every layer into the child's config, or onto the module where there is none."""
    value = {"format_version": PLAN_VERSION, "layers": list(paths), "plan": [dict(row) for row in plan]}
    setattr(getattr(child, "config", child), PLAN, value)


def plan_of(child: nn.Module) -> dict[str, Any]:
    """Return the plan that ``build`` recorded.

    Raises:
        UserError: The model has none.
    """
    plan = getattr(getattr(child, "config", child), PLAN, None)
    if not isinstance(plan, dict):
        raise UserError("model", Shown(type(child).__name__), allowed="a child that SlotFamily.build made")
    return plan


def slot_name(index: int, part: str) -> str:
    """Return the name of a slot: "layer3.attention"."""
    return f"layer{index}.{part}"


def default_alternatives(site: Site) -> list[str]:
    """Return the published alternatives of a sub-block, as far as they can stand at this site."""
    names: list[str] = []
    block = site.block
    if block.part == ATTENTION and block.kv_heads > 1:
        heads = block.kv_heads
        while heads % 2 == 0 and heads > 2:
            heads //= 2
            names.append(f"kv{heads}")
        names.append("kv1")
    if block.part == FFN:
        names += [f"ffn{percent}" for percent in FFN_PERCENTS]
    if block.part in (ATTENTION, FFN) and block.roles:
        names.append("linear")
    if block.post_norm:
        names.append("norm")
    names.append("none")
    return [name for name in names if _stands(name, site)]


def _stands(name: str, site: Site) -> bool:
    try:
        named_alternative(site.block.part, name).check(site)
    except UserError:
        return False
    return True


def load_tensors_(layer: nn.Module, state: Mapping[str, Tensor], what: str, *, whole: SubBlock | None) -> None:
    """Copy tensors into a layer by name.

    Args:
        layer: The layer.
        state: Tensors by name.
        what: Names the slot in errors.
        whole: Also demand every tensor of this sub-block.

    Raises:
        UserError: A tensor is missing, unknown, or of another shape.
    """
    owned = dict(layer.state_dict(keep_vars=True) if whole is None else tensors_of(layer, whole))
    unknown = sorted(set(state) - set(owned))
    missing = sorted(set(owned) - set(state)) if whole is not None else []
    if unknown or missing:
        raise UserError(
            f"state of {what}", Shown(f"unknown tensors {unknown}, missing {missing}"), allowed="its own tensors"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if owned[name].shape != tensor.shape:
                raise UserError(
                    f"state of {what}",
                    Shown(f"{name} of shape {tuple(tensor.shape)}"),
                    allowed=f"shape {tuple(owned[name].shape)}",
                )
            owned[name].copy_(tensor)


def on_meta(layer: nn.Module, config: Any = None) -> nn.Module:
    """Return a copy of a layer without values; nothing of the size of its weights is allocated."""
    memo: dict[int, Any] = {} if config is None else {id(config): config}
    for weight in layer.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    for buffer in layer.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    made: nn.Module = copy.deepcopy(layer, memo)
    return made


def find_blocks(
    parent: nn.Module, layers: str | None, sub_blocks: Sequence[SubBlock] | None, example: Any
) -> tuple[tuple[str, ...], tuple[tuple[SubBlock, ...], ...]]:
    """Return layers and sub-blocks: as named, by known names, or by a run on an example.

    Raises:
        UserError: They are not found.
    """
    if example is None:
        return locate(parent, layers=layers, sub_blocks=sub_blocks)
    try:
        paths, blocks = locate(parent, layers=layers, sub_blocks=sub_blocks)
    except UserError:
        if sub_blocks is not None:
            raise
        return discover(parent, example, layers=layers)
    return paths, blocks if sub_blocks is not None else observed(parent, paths, blocks, example)


def check_options(kv_initialiser: str, ranking: str, multiple: int) -> None:
    """Refuse options that do not exist.

    Raises:
        UserError: Names the option.
    """
    if kv_initialiser not in ("mean", "prune"):
        raise UserError("kv_initialiser", kv_initialiser, allowed="'mean' or 'prune'")
    if ranking not in ("contribution", "iterative", "norm"):
        raise UserError("ranking", ranking, allowed="'contribution', 'iterative' or 'norm'")
    if multiple < 1:
        raise UserError("multiple", multiple, allowed="a positive integer")


def _check_finite(parent: nn.Module) -> None:
    for name, tensor in parent.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"parent.{name}",
                Shown("NaN or infinite values"),
                allowed="a parent with finite weights",
                hint="Every child would inherit them: load the parent again, or train it anew.",
            )


def _matrices(layer: nn.Module, block: SubBlock) -> Iterable[Tensor]:
    """Yield the weight of every linear layer of a sub-block, a shared one each time it stands there."""
    for name, module in layer.named_modules():
        inside = any(name == path or name.startswith(f"{path}.") for path in block.owned)
        if inside and is_projection(module):
            yield weight_of(module)


__all__ = [
    "FFN_PERCENTS",
    "Alternative",
    "KVHeads",
    "Removed",
    "Site",
    "Slot",
    "SlotCost",
    "SlotFamily",
    "SubBlock",
    "check_layer",
    "default_alternatives",
    "find_blocks",
    "load_tensors_",
    "on_meta",
    "plan_of",
    "record_plan_",
    "slot_name",
]
