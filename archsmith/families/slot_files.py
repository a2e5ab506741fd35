"""A child of slots as files: what ``save_pretrained`` writes, or config.json with safetensors; no pickle in either."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.core.files import storage_errors, write_json
from archsmith.families.residual_slots import PLAN, PLAN_VERSION, plan_of, record_plan_
from archsmith.families.slot_alternatives import PARENT, Alternative, KVHeads, Site, Width, named_alternative
from archsmith.families.slot_layout import FFN, SubBlock, locate, module_at

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(child: nn.Module, directory: str | Path) -> None:
    """Write a child to a directory.

    A model of transformers saves itself (``save_pretrained``): its config holds the plan of the layers. Any other gets
    ``config.json`` with class name and plan beside ``model.safetensors``.

    Args:
        child: What ``SlotFamily.build`` returned, trained on or not.
        directory: Made if missing.

    Raises:
        UserError: The model has no plan, or the directory cannot be written.
    """
    plan = plan_of(child)
    folder = Path(directory)
    with storage_errors("directory", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(child, "save_pretrained"):
            child.save_pretrained(folder)  # type: ignore[operator]
            return
        kind = type(child)
        write_json(folder / CONFIG, {"class": f"{kind.__module__}.{kind.__qualname__}", PLAN: plan})
        save_file(_untied(child), folder / WEIGHTS)


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state with one entry for tensors that are the same."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().clone().contiguous()
    return state


def load(
    directory: str | Path,
    *,
    parent: nn.Module | None = None,
    registered: Sequence[Alternative] = (),
    sub_blocks: Sequence[SubBlock] | None = None,
) -> nn.Module:
    """Return the child that ``save`` or ``save_pretrained`` wrote, in evaluation mode.

    Args:
        directory: Where it is.
        parent: A model of the parent's class and shape, for children that are no models of transformers: its structure
            is copied, its weights are not used. For models of transformers only its class is, if it is the child's.
        registered: Alternatives of the user's own that stand in the child.
        sub_blocks: The sub-blocks' places where they were named by hand.

    Raises:
        UserError: Files are missing or damaged, an alternative is not registered, or tensors do not fit.
        MissingExtra: transformers is not installed.
    """
    folder = Path(directory)
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "directory", Shown(f"{folder} ({error})"), allowed="a folder that a child was saved in"
        ) from None
    plan = facts.get(PLAN)
    if not isinstance(plan, Mapping) or plan.get("format_version") != PLAN_VERSION:
        raise UserError(
            f"{CONFIG}.{PLAN}", plan, allowed=f"a plan of format version {PLAN_VERSION}, as SlotFamily.build records it"
        )
    if "class" in facts:
        return _load_plain(folder, plan, parent, registered, sub_blocks)
    return _load_pretrained(folder, facts, plan, parent, registered, sub_blocks)


def restructure_(
    model: nn.Module,
    plan: Mapping[str, Any],
    registered: Sequence[Alternative] = (),
    sub_blocks: Sequence[SubBlock] | None = None,
) -> None:
    """Give a model of the parent's shape the structure of a plan; weights that are new are not set.

    Raises:
        UserError: The model's layers are not those of the plan.
    """
    given = [str(path) for path in plan["layers"]]
    paths, blocks = locate(model, layers=given[0].rpartition(".")[0], sub_blocks=sub_blocks)
    if list(paths) != given:
        raise UserError("plan.layers", Shown(f"{len(given)} layers"), allowed=f"{len(paths)} layers, as the model has")
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or [None] * len(paths)
    for index, (path, row) in enumerate(zip(paths, plan["plan"], strict=True)):
        for block in blocks[index]:
            spec = row.get(block.part, {"name": PARENT})
            counts = hasattr(model, "config") and list(kinds).index(kinds[index]) == index
            site = Site(module_at(model, path), block, index, counts)
            alternative_of(block.part, spec, registered).apply_(site)
    record_plan_(model, paths, plan["plan"])


def alternative_of(part: str, spec: Mapping[str, Any], registered: Sequence[Alternative] = ()) -> Alternative:
    """Return the alternative that a row of a plan names, with the numbers that were resolved when it was made."""
    name = str(spec["name"])
    if "width" in spec and part == FFN:
        return Width(name, width=int(spec["width"]))
    if "kv_heads" in spec:
        return KVHeads(name, int(spec["kv_heads"]))
    return named_alternative(part, name, registered=registered)


def _load_plain(
    folder: Path,
    plan: Mapping[str, Any],
    parent: nn.Module | None,
    registered: Sequence[Alternative],
    sub_blocks: Sequence[SubBlock] | None,
) -> nn.Module:
    if parent is None:
        raise UserError(
            "parent", None, allowed="a model of the parent's class and shape: this child is none of transformers"
        )
    model = copy.deepcopy(parent)
    restructure_(model, plan, registered, sub_blocks)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(WEIGHTS, Shown(str(error)), allowed="a readable safetensors file") from None
    wanted = _untied(model)
    if set(state) != set(wanted):
        raise UserError(
            WEIGHTS,
            Shown(f"unknown tensors {sorted(set(state) - set(wanted))}, missing {sorted(set(wanted) - set(state))}"),
            allowed="the tensors of the child",
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(WEIGHTS, Shown(str(error).splitlines()[-1].strip()), allowed="tensors that fit") from None
    return model.eval()


def _load_pretrained(
    folder: Path,
    facts: Mapping[str, Any],
    plan: Mapping[str, Any],
    parent: nn.Module | None,
    registered: Sequence[Alternative],
    sub_blocks: Sequence[SubBlock] | None,
) -> nn.Module:
    """Let transformers load into a class whose constructor makes the child's structure; return the parent's class."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "text", "Loading a child of a Hugging Face model") from None
    name = (facts.get("architectures") or [""])[0]
    kind = type(parent) if type(parent).__name__ == name else getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(f"{CONFIG}.architectures", name, allowed="a model class of the installed transformers")

    def made(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        restructure_(self, plan, registered, sub_blocks)

    child_class = type(kind.__name__, (kind,), {"__init__": made, "__module__": kind.__module__})
    try:
        model, report = child_class.from_pretrained(  # type: ignore[attr-defined]
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            "directory", Shown(f"{folder} ({error})"), allowed="a folder that a child was saved in"
        ) from None
    except RuntimeError as error:  # tensors of other shapes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            "weights", Shown(lines[-1] if lines else "tensors"), allowed="exactly the tensors of the child"
        ) from None
    wrong = {key: value for key, value in report.items() if value}
    if wrong:
        raise UserError("weights", Shown(str(wrong)[:400]), allowed="exactly the tensors of the child")
    model.__class__ = kind
    loaded: nn.Module = model.eval()
    return loaded
