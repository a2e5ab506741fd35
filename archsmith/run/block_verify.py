"""Verification of a block-by-block search: files, outputs, exact costs counted again, runtimes measured again."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError
from archsmith.core.files import read_json, sha256_file
from archsmith.cost.block_times import Load, Phases, load_rounds, measure_layers, model_call, of_parent
from archsmith.cost.latency import Latency
from archsmith.cost.timing import NOISY_SPREAD, median_interval, quartile_range
from archsmith.families.residual_slots import PLAN, SlotFamily
from archsmith.families.slot_alternatives import PARENT
from archsmith.families.slot_files import load as load_child
from archsmith.families.slot_statistics import run_batch
from archsmith.run.block_result import TOLERANCE, output_of
from archsmith.run.block_search import allowed_ms, exact_costs, with_units
from archsmith.run.block_source import ModelSource
from archsmith.run.checks import Failed, NotChecked, Report, Rows
from archsmith.run.measured import ATTEMPTS
from archsmith.space import Budget

TIMED = ("latency", "throughput")


def is_block_result(result: Mapping[str, Any]) -> bool:
    """Return whether a result record is of a block-by-block search."""
    return result.get("family") == "slots" and "baselines" in result


def parent_here(target: str, *, trust: bool) -> SlotFamily | None:
    """Return the family of a run's parent where it can be read without executing foreign code, else None.

    Args:
        target: Folder of a model of transformers with safetensors, or "module:factory".
        trust: Whether a factory may be executed.
    """
    if not trust and not any(Path(target).glob("*.safetensors")):
        return None
    try:
        return ModelSource(target)()
    except ArchsmithError:
        if trust:
            raise
        return None  # moved, or of another version: what needs it is reported as not checked


def verify_blocks(path: Path, result: Mapping[str, Any], family: SlotFamily | None) -> Report:
    """Check every child: digests, outputs of the reloaded model, exact costs, limits, and its runtime where limited.

    Args:
        path: Folder of the run.
        result: Its ``result.json``.
        family: That of the parent; without it children that are no models of transformers are not read, memory and MACs
            are not counted again, and runtimes are compared with the reference network instead of the parent.
    """
    rows: list[Any] = []
    for outcome in result["outcomes"]:
        child = _Child(path / str(outcome["folder"]), outcome, result, family)
        found = Rows(str(outcome["label"]))
        found.check("files", child.check_files)
        found.check("reload", child.check_reload)
        found.check("params", child.check_params)
        found.check("costs", child.check_costs)
        found.check("limits", child.check_limits)
        if any(name in result["limits"] for name in TIMED):
            found.check("runtime", child.check_runtime)
        rows += found.rows
    return Report(tuple(rows))


@dataclass
class _Child:
    """One written child and what is claimed about it."""

    folder: Path
    outcome: Mapping[str, Any]
    result: Mapping[str, Any]
    family: SlotFamily | None
    model: nn.Module | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def check_files(self) -> str:
        files = self.outcome["files"]
        wrong = [name for name, digest in files.items() if sha256_file(self.folder / name) != digest]
        if wrong:
            raise Failed(f"changed since the run: {', '.join(wrong[:3])}")
        return f"{len(files)} files as recorded"

    def check_reload(self) -> str:
        if self.family is None and "class" in read_json(self.folder / "model" / "config.json"):
            raise NotChecked("it would execute the model's own code; use --trust if you trust its author")
        model = load_child(self.folder / "model", parent=None if self.family is None else self.family.parent)
        self.model = model
        stored = load_file(self.folder / "check.safetensors")
        self.inputs = {k.partition("/")[2]: v for k, v in stored.items() if k.startswith("input/")}
        call: Any = self.inputs.get("", self.inputs)
        if not isinstance(call, Tensor) and hasattr(getattr(model, "config", None), "use_cache"):
            call = {**call, "use_cache": False}
        with torch.no_grad():
            found = output_of(run_batch(model, call))
        gap = float((found - stored["output"]).abs().max() / stored["output"].abs().max().clamp(min=1))
        if not gap <= TOLERANCE:
            raise Failed(f"outputs differ by {gap:.2g}")
        return f"largest gap {gap:.2g} on {len(found)} examples"

    def check_params(self) -> str:
        if self.model is None:
            raise NotChecked("the child was not read")
        found, recorded = sum(p.numel() for p in self.model.parameters()), self.outcome["costs"]["params"]
        if found != recorded or found != self.outcome["predicted"]["params"]:
            raise Failed(f"{found:,} parameters, recorded {recorded:,}")
        return f"{found:,} parameters"

    def check_costs(self) -> str:
        """Count memory, parameters and MACs of the plan that the child's own files hold."""
        if self.family is None:
            raise NotChecked("the parent, on whose structure costs are counted, cannot be read here")
        rows = read_json(self.folder / "model" / "config.json")[PLAN]["plan"]
        plan = {slot.name: str(rows[slot.layer].get(slot.part, {"name": PARENT})["name"]) for slot in self.family.slots}
        if wrong := [slot for slot, name in self.outcome["decisions"].items() if plan.get(slot) != name]:
            raise Failed(f"{wrong[0]} is {plan.get(wrong[0])}, recorded {self.outcome['decisions'][wrong[0]]}")
        load = Load(**self.result["load"])
        counted = exact_costs(self.family.rest_cost(), load)
        for slot, name in plan.items():
            part = exact_costs(self.family.cost(slot, name), load)
            counted = {cost: value + part[cost] for cost, value in counted.items()}
        for cost, value in counted.items():
            if value != self.outcome["predicted"][cost]:
                raise Failed(f"{cost} {value:,.0f} counted, {self.outcome['predicted'][cost]:,.0f} recorded")
        return ", ".join(f"{cost} {with_units(cost, value)}" for cost, value in counted.items()) + ", as recorded"

    def check_limits(self) -> str:
        parent = self.result["reference"]
        resolved = {li.cost: li.value for li in Budget.parse(str(self.result["budget"])).resolve(parent).limits}
        if resolved != self.result["limits"]:
            raise Failed(f"limits {self.result['limits']} recorded, the budget means {resolved}")
        told = []
        for name, limit in resolved.items():
            if name in TIMED:
                continue
            if self.outcome["predicted"][name] > limit * (1 + 1e-9):
                raise Failed(f"{name} {self.outcome['predicted'][name]:,} above {limit:,}")
            told.append(f"{name} {with_units(name, self.outcome['predicted'][name])} of {with_units(name, limit)}")
        return "; ".join(told) or "no limits on counted costs"

    def check_runtime(self) -> str:
        """Measure the child again: the rule of ``archsmith.cost.latency.claim``, on the runtime of the whole load.

        A limit relative to the parent compares in every round with the parent beside it; where the parent cannot be
        read, with the reference network, whose ratio to the parent's runtime the run recorded.
        """
        if self.model is None:
            raise NotChecked("the child was not read")
        recorded, load = self.outcome["measured"], Load(**self.result["load"])
        if not recorded:
            raise Failed("a limit on time was set, but no measurement is recorded")
        then = {phase: Latency.from_dict(value) for phase, value in recorded["latency"].items()}
        here: Latency | None = None
        allowed = allowed_ms(self.result["limits"], load)
        assert allowed is not None
        if "input_ids" not in self.inputs:
            raise NotChecked("the child reads no token numbers: its load cannot be made again")
        words = int(self.inputs["input_ids"].max()) + 1
        call = model_call(self.model, load, words)
        timed = [li for li in Budget.parse(str(self.result["budget"])).limits if li.cost in TIMED]
        relative = all(limit.relative for limit in timed)
        beside = relative and self.family is not None
        models = {"child": self.model, **({"parent": self.family.parent} if beside and self.family else {})}
        for _ in range(ATTEMPTS):
            now = measure_layers({}, models, Phases({}, {} if load.generation else None), call, load)
            here = now["model child"]["prefill"]
            samples = load_rounds(now["model child"], load)
            if beside:
                samples = [self.result["reference"]["runtime"] * r for r in of_parent(now, "model child", load)]
            elif relative:
                scale = self.result["reference"]["runtime"] / float(recorded["parent_ms"])
                samples = [scale * ms for ms in _rounds(now["model child"], load, then)]
            middle, spread = statistics.median(samples), quartile_range(samples)
            steady = middle > 0 and spread <= NOISY_SPREAD * middle
            if steady:
                break
        assert here is not None
        how = "beside the parent" if beside else "by the reference network" if relative else "as it is"
        text = f"{middle:.4g} ms now {how}, {float(self.outcome['limit']['measured_ms']):.4g} ms recorded"
        if here.provenance.cpu != then["prefill"].provenance.cpu:
            raise NotChecked(f"{text}; recorded on {then['prefill'].provenance.cpu}, this is {here.provenance.cpu}")
        if not steady:
            raise NotChecked(f"{text}; not verifiable now, IQR is {spread / middle:.0%} of the median")
        lowest = median_interval(samples)[0]
        if lowest > allowed:
            raise Failed(f"{text}; the 95 % interval begins at {lowest:.4g} ms, above the limit {allowed:.4g} ms")
        return f"{text}; limit {allowed:.4g} ms holds"


def _rounds(phases: Mapping[str, Latency], load: Load, then: Mapping[str, Latency]) -> list[float]:
    """Return the runtime of the load in ms round by round, at the speed that the reference network had then."""

    def samples(phase: str) -> list[float]:
        speed = statistics.median(then[phase].reference_ms)
        latency = phases[phase]
        return [speed * s / r for s, r in zip(latency.samples_ms, latency.reference_ms, strict=True)]

    prefill = samples("prefill")
    token = samples("token") if load.generation else [0.0] * len(prefill)
    return [p + load.generation * t for p, t in zip(prefill, token, strict=True)]
