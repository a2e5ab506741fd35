"""The run behind block-by-block searches: library, scores, costs, selections, children; all of it resumable.

Whatever costs time is kept in the run's folder or journal the moment it is there: activations, trained blocks, scores,
runtimes. A resumed run reads them again, so that its selections and its child are the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.core.files import to_json
from archsmith.core.protocols import Executor
from archsmith.core.rng import numpy_stream
from archsmith.cost.block_times import Load, measure_layers, of_parent, phases_of, runtime_ms, steadiest_layers
from archsmith.cost.latency import Latency
from archsmith.evaluate.replace_one import Metric, ScoreName, block_variants, score_library
from archsmith.families.residual_slots import SlotCost, SlotFamily
from archsmith.run.costs import LATENCY_MARGIN
from archsmith.run.directory import Run
from archsmith.space import Architecture, Budget
from archsmith.strategies.block_baselines import chosen, greedy, largest, random_within, uniform
from archsmith.strategies.milp import Infeasible, Selection, solve
from archsmith.train.activation_cache import ActivationCache, Batch
from archsmith.train.blockwise import (
    PARENT,
    BlockJob,
    BlockLibrary,
    BlockTraining,
    FamilySource,
    Inline,
    coupled_jobs,
    decoupled_jobs,
    distil_library,
)

COSTS = ("memory", "params", "macs", "latency", "throughput")
Stop = Callable[[], bool]


class Stopped(ArchsmithError):
    """The run was asked to stop; what is finished is kept."""


@dataclass(frozen=True)
class CostTables:
    """Additive costs of the alternatives of every layer under one load.

    Attributes:
        load: The load.
        tables: By cost ("memory" in bytes with the caches of the batch, "params", "macs" of one prefill, "runtime" in
            ms of the whole load) one number for each alternative of each layer.
        rest: The same of everything outside of the layers.
        parent: The same of the parent.
    """

    load: Load
    tables: Mapping[str, list[list[float]]]
    rest: Mapping[str, float]
    parent: Mapping[str, float]

    def of(self, choice: Sequence[int]) -> dict[str, float]:
        """Return the costs of a choice, with what lies outside of the layers; latency and throughput included."""
        rows = {name: self.rest[name] + sum(t[i][j] for i, j in enumerate(choice)) for name, t in self.tables.items()}
        return with_rates(rows, self.load)


def with_rates(costs: Mapping[str, float], load: Load) -> dict[str, float]:
    """Return the costs with "latency" (ms of the load) and "throughput" (sequences per second) from the runtime."""
    if "runtime" not in costs:
        return dict(costs)
    return {**costs, "latency": costs["runtime"], "throughput": load.batch * 1e3 / costs["runtime"]}


@dataclass(frozen=True)
class Child:
    """A selection and what it stands for.

    Attributes:
        label: "puzzle", "greedy", "random", "uniform" or "largest".
        selection: Indices, score and sums.
        architecture: The same as a point of the space.
        predicted: Costs by the tables.
        measured: Runtime in ms as a whole, with its samples; empty before it was measured.
    """

    label: str
    selection: Selection
    architecture: Architecture
    predicted: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)


class BlockSearch:
    """One search: from a parent to children within limits.

    Args:
        run: Folder and journal.
        source: Gives the family, here and in worker processes.
        train: Batches that blocks and the assembled child are trained on.
        valid: Batches that scores are measured on.
        key: Digest of parent and data.
        training: How blocks are trained.
        score: What a replaced block is judged by.
        by: "pairs" scores every combination of a layer, "slots" every sub-block alone, whose scores are added.
        seed: Of everything random.
        executor: Carries out trainings and scores; here and now by default.
        should_stop: Asked between pieces of work.
        tell: Told what happens, a line each.
    """

    def __init__(
        self,
        run: Run,
        source: FamilySource,
        train: Sequence[Batch],
        valid: Sequence[Batch],
        *,
        key: str = "",
        training: BlockTraining | None = None,
        score: ScoreName | Metric = "kl",
        by: Literal["pairs", "slots"] = "pairs",
        seed: int = 0,
        executor: Executor | None = None,
        should_stop: Stop = lambda: False,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run, self.source, self.train, self.valid, self.key = run, source, train, valid, key
        self.training = training or BlockTraining()
        self.score: ScoreName | Metric = score
        self.by: Literal["pairs", "slots"] = by
        self.seed, self.executor = seed, executor or Inline()
        self.should_stop, self.tell = should_stop, tell
        self.family: SlotFamily = source()
        self.layers = sorted({slot.layer for slot in self.family.slots})
        self.library = BlockLibrary(run.path / "library", key)

    # ------------------------------------------------------------------ library and scores

    def cache(self, name: Literal["train", "valid"]) -> ActivationCache:
        """Return the activations of a part of the data, written once."""
        folder = self.run.path / "activations" / name
        batches = self.train if name == "train" else self.valid
        parent, paths = self.family.parent, self.family.layer_paths
        cache = ActivationCache.build(
            parent, paths, batches, folder, key=f"{self.key}/{name}", should_stop=self.should_stop
        )
        if cache is None:
            raise Stopped("stopped while activations were written")
        return cache

    def distil(self, jobs: Sequence[BlockJob] | None = None, *, coupled: bool = False) -> None:
        """Train what the library lacks: every sub-block beside the parent's others, or every pair."""
        if jobs is None:
            jobs = coupled_jobs(self.family) if coupled else decoupled_jobs(self.family)
        cache, total = self.cache("train"), len(jobs)

        def told(done: int, job: BlockJob, figures: Mapping[str, Any]) -> None:
            text = f"block {done}/{total} {job.name}: {figures['loss_before']:.4f} -> {figures['loss']:.4f}"
            self.tell(text)

        arguments = (self.source, cache, jobs, self.training, self.library)
        complete = distil_library(
            *arguments,
            executor=self.executor,
            logger=self.run,
            seed=self.seed,
            should_stop=self.should_stop,
            on_block=told,
        )
        if not complete:
            raise Stopped("stopped while blocks were trained")

    def scores(self, *, kind: str = "block_scored") -> list[list[float]]:
        """Return the score of every alternative of every layer (``alternatives``), each measured once."""
        found = score_library(
            self.source,
            self.cache("valid"),
            block_variants(self.family, self.by),
            self.library,
            executor=self.executor,
            logger=self.run,
            score=self.score,
            kind=kind,
            should_stop=self.should_stop,
            on_score=lambda done, job, value: self.tell(f"score {done} {job.name}: {value:.5f}"),
        )
        if found is None:
            raise Stopped("stopped while blocks were scored")

        def of(layer: int, choices: Mapping[str, str]) -> float:
            changed = {part: name for part, name in choices.items() if name != PARENT}
            if not changed:
                return 0.0
            if self.by == "pairs":
                return found[BlockJob(layer, changed).name]
            return sum(found[BlockJob(layer, {part: name}).name] for part, name in changed.items())

        return [[of(layer, choices) for choices in self.alternatives(layer)] for layer in self.layers]

    def alternatives(self, layer: int) -> list[dict[str, str]]:
        """Return every combination of alternatives of a layer; the first is the parent."""
        rows: list[dict[str, str]] = [{}]
        for slot in (slot for slot in self.family.slots if slot.layer == layer):
            rows = [{**row, slot.part: name} for row in rows for name in slot.alternatives]
        return rows

    # ------------------------------------------------------------------ costs

    def costs(self, load: Load, call: Batch, *, timed: bool = True) -> CostTables:
        """Return the tables under a load: counted exactly, and runtimes measured once in the life of the run.

        Args:
            load: The load.
            call: One call of the parent for it (``batch`` sequences of ``prefill`` tokens).
            timed: Whether runtimes are needed; without, "runtime" is missing.
        """
        family = self.family
        rest = family.rest_cost()
        tables: dict[str, list[list[float]]] = {name: [] for name in ("memory", "params", "macs")}
        for layer in self.layers:
            rows = [
                [exact_costs(family.cost(f"layer{layer}.{part}", name), load) for part, name in choices.items()]
                for choices in self.alternatives(layer)
            ]
            for name in tables:
                tables[name].append([sum(row[name] for row in parts) for parts in rows])
        outside = exact_costs(rest, load)
        if timed:
            times = self.runtimes(load, call)
            tables["runtime"] = [
                [times[self._kind(layer, choices)] for choices in self.alternatives(layer)] for layer in self.layers
            ]
            outside["runtime"] = max(0.0, times["model parent"] - sum(row[0] for row in tables["runtime"]))
        parent = {name: outside[name] + sum(row[0] for row in table) for name, table in tables.items()}
        return CostTables(load, tables, outside, with_rates(parent, load))

    def _kind(self, layer: int, choices: Mapping[str, str]) -> str:
        """Return the name under which equal layers share a measurement: exact costs and modules."""
        costs = [self.family.cost(f"layer{layer}.{part}", name) for part, name in choices.items()]
        facts = [(c.params, c.token_macs, c.pair_macs, c.kv_values, c.window or 0) for c in costs]
        return f"{type(self.family.layer(layer)).__name__} {sorted(choices.items())} {facts}"

    def runtimes(self, load: Load, call: Batch) -> dict[str, float]:
        """Return milliseconds of the load by kind of layer, and of the parent; from the journal where they are."""
        what = asdict(load)
        known: dict[str, float] = {}
        for event in self.run.events("runtime_table"):
            if event["load"] == what:
                known |= {name: float(value) for name, value in event["runtime_ms"].items()}
        variants: dict[str, tuple[int, dict[str, str]]] = {}
        for layer in self.layers:
            for choices in self.alternatives(layer):
                variants.setdefault(self._kind(layer, choices), (layer, choices))
        missing = {name: row for name, row in variants.items() if name not in known}
        if missing or "model parent" not in known:
            self.tell(f"measuring {len(missing)} kinds of layers: batch {load.batch}, prefill {load.prefill}")
            made = {name: (layer, self.family.variant_layer(layer, row)) for name, (layer, row) in missing.items()}
            phases = phases_of(self.family.parent, self.family.layer_paths, call, load)
            models = {"parent": self.family.parent}
            latencies = steadiest_layers(lambda: measure_layers(made, models, phases, call, load), load)
            whole = known.get("model parent", _load_ms(latencies["model parent"], load))
            fresh = {name: whole * statistics.median(of_parent(latencies, name, load)) for name in latencies}
            where = next(iter(latencies.values()))["prefill"].to_dict()["provenance"]
            self.run.record("runtime_table", load=what, runtime_ms=fresh, provenance=where)
            known |= fresh
        return known

    # ------------------------------------------------------------------ selections

    def limits(self, budget: Budget, costs: CostTables, *, margin: float = LATENCY_MARGIN) -> dict[str, float]:
        """Return what the layers may cost together: the budget, less what lies outside of them.

        Latency and throughput become one limit on the runtime, of which ``margin`` is used.

        Raises:
            UserError: A cost that is unknown here, or a limit below what lies outside of the layers.
        """
        found: dict[str, float] = {}
        for limit in budget.resolve(costs.parent).limits:
            if limit.cost not in COSTS:
                raise UserError("budget", str(limit), allowed=f"limits on {', '.join(COSTS)}")
            name, value = limit.cost, limit.value
            if limit.cost in ("latency", "throughput"):
                name = "runtime"
                value = margin * (value if limit.cost == "latency" else costs.load.batch * 1e3 / value)
            left = value - costs.rest[name]
            if left <= 0:
                raise UserError(
                    "budget",
                    str(limit),
                    allowed=f"{name} above the {costs.rest[name]:.6g} outside of the layers (embeddings, head, norms)",
                    hint="No selection of layers reaches it.",
                )
            found[name] = min(left, found.get(name, left))
        return found

    def select(
        self, scores: list[list[float]], costs: CostTables, limits: Mapping[str, float], **options: Any
    ) -> Child:
        """Return the exact selection; ``options`` go to ``archsmith.strategies.milp.solve``.

        Raises:
            Infeasible: Nothing keeps the limits; says which binds, and what can be reached (outside included).
        """
        try:
            return self._child("puzzle", solve(scores, costs.tables, limits, **options), costs)
        except Infeasible as error:
            shown = {n: v + costs.rest[n] for n, v in error.reachable.items() if v is not None and n in costs.rest}
            told = ", ".join(f"{name} {with_units(name, value)}" for name, value in shown.items())
            raise Infeasible(
                error.given,
                allowed=f"{error.allowed}; for the whole model {told}",
                hint=error.hint,
                reachable=error.reachable,
            ) from error

    def fastest(self, costs: CostTables, limits: Mapping[str, float]) -> float:
        """Return the smallest sum of the layers' runtimes of a selection within ``limits``."""
        found = solve(costs.tables["runtime"], costs.tables, limits)
        return float(found.totals["runtime"])

    def baselines(
        self, scores: list[list[float]], costs: CostTables, limits: Mapping[str, float], *, seeds: int = 1
    ) -> list[Child]:
        """Return greedy, uniform, largest and random selections; those that find nothing are left out and told."""
        made: dict[str, Callable[[], Selection]] = {
            "greedy": lambda: greedy(scores, costs.tables, limits),
            "uniform": lambda: uniform(scores, costs.tables, limits),
            "largest": lambda: largest(costs.tables["params"], scores, costs.tables, limits),
        }
        for number in range(seeds):
            stream = numpy_stream(self.seed, "random", number)
            label = "random" if seeds == 1 else f"random-{number}"
            made[label] = lambda rng=stream: random_within(scores, costs.tables, limits, rng)  # type: ignore[misc]
        found = []
        for label, make in made.items():
            try:
                found.append(self._child(label, make(), costs))
            except UserError as error:
                self.tell(f"{label}: nothing found ({error})")
        return found

    def _child(self, label: str, selection: Selection, costs: CostTables) -> Child:
        decisions = {
            f"layer{layer}.{part}": name
            for layer, j in zip(self.layers, selection.choice, strict=True)
            for part, name in self.alternatives(layer)[j].items()
        }
        return Child(label, selection, self.family.space.validate(decisions), costs.of(selection.choice))

    def parent_child(self, scores: list[list[float]], costs: CostTables) -> Child:
        """Return the parent as a selection."""
        return self._child("parent", chosen([0] * len(self.layers), scores, costs.tables), costs)

    # ------------------------------------------------------------------ children

    def build(self, child: Child) -> nn.Module:
        """Return the assembled child with its trained blocks."""
        states: dict[tuple[str, str], Mapping[str, Tensor]] = {}
        for layer, j in zip(self.layers, child.selection.choice, strict=True):
            choices = self.alternatives(layer)[j]
            for part, state in self.library.weights(layer, choices).items():
                states[f"layer{layer}.{part}", choices[part]] = state
        return self.family.build(child.architecture, library=states)

    def measured(self, children: Sequence[Child], costs: CostTables, call: Batch) -> list[Child]:
        """Measure whole children beside the parent, interleaved; read from the journal where they were measured."""
        load, what = costs.load, asdict(costs.load)
        known = {event["digest"]: event for event in self.run.events("child_measured") if event["load"] == what}
        missing = {c.architecture.digest: c for c in children if c.architecture.digest not in known}
        if missing:
            models = {"parent": self.family.parent, **{d: self.build(child) for d, child in missing.items()}}
            phases = phases_of(self.family.parent, self.family.layer_paths, call, load)
            latencies = steadiest_layers(lambda: measure_layers({}, models, phases, call, load), load)
            reference = _load_ms(latencies["model parent"], load)
            for digest in missing:
                rows = latencies[f"model {digest}"]
                event = {
                    "digest": digest,
                    "load": what,
                    "runtime_ms": _load_ms(rows, load),
                    "parent_ms": reference,
                    "of_parent": statistics.median(of_parent(latencies, f"model {digest}", load)),
                    "latency": {phase: latency.to_dict() for phase, latency in rows.items()},
                }
                self.run.record("child_measured", **event)
                known[digest] = event
        return [replace(child, measured=known[child.architecture.digest]) for child in children]

    def frequent(self, children: Sequence[Child], share: float = 0.25) -> dict[str, list[str]]:
        """Return the alternatives of every slot that at least a share of the selections takes: the mixed mode.

        Args:
            children: Selections under different budgets, batches, or differences.
            share: Part of them.
        """
        kept: dict[str, list[str]] = {}
        for slot in self.family.slots:
            counts = {name: sum(c.architecture[slot.name] == name for c in children) for name in slot.alternatives}
            kept[slot.name] = [n for n in slot.alternatives if n == PARENT or counts[n] >= share * len(children) > 0]
        return kept


def exact_costs(cost: SlotCost, load: Load) -> dict[str, float]:
    """Return memory in bytes with the caches of the batch, parameters, and MACs of one prefill."""
    dtype = torch.bfloat16 if load.precision == "bf16" else torch.float32
    return {
        "memory": float(cost.memory(batch=load.batch, sequence=load.sequence, dtype=dtype)),
        "params": float(cost.params),
        "macs": float(load.batch * cost.macs(load.prefill)),
    }


def allowed_ms(limits: Mapping[str, float], load: Load) -> float | None:
    """Return the longest runtime of the load in ms that resolved limits on latency and throughput allow, or None."""
    bounds = [limits["latency"]] if "latency" in limits else []
    bounds += [load.batch * 1e3 / limits["throughput"]] if "throughput" in limits else []
    return min(bounds, default=None)


def comparable_ms(child: Child, budget: Budget, costs: CostTables) -> float:
    """Return the measured runtime of a child as the budget's limits on time mean it.

    Limits relative to the parent compare with the parent measured in the same rounds: the median of the ratios round by
    round, times what the parent took in the table's rounds. Absolute limits compare with the milliseconds as they are.
    """
    measured = float(child.measured["runtime_ms"])
    timed = [limit for limit in budget.limits if limit.cost in ("latency", "throughput")]
    if timed and all(limit.relative for limit in timed):
        return float(child.measured["of_parent"]) * costs.parent["runtime"]
    return measured


def with_units(name: str, value: float) -> str:
    """Return a cost with its unit."""
    if name == "memory":
        return f"{value / 2**20:,.2f} MiB"
    return f"{value:.4g} ms" if name in ("runtime", "latency") else f"{value:,.0f}"


def _load_ms(rows: Mapping[str, Latency], load: Load) -> float:
    return runtime_ms({phase: latency.median_ms for phase, latency in rows.items()}, load)


def block_executor(workers: int) -> Executor:
    """Return what carries out independent blocks: this process for 1, else one-thread processes of our own.

    The processes end with this one, however that ends.

    Raises:
        UserError: Fewer than one.
    """
    if workers < 1:
        raise UserError("workers", workers, allowed="an integer from 1")
    if workers == 1:
        return Inline()
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            os._exit(1)


def child_record(child: Child) -> dict[str, Any]:
    """Return a child as JSON values."""
    return {
        "label": child.label,
        "score": child.selection.score,
        "optimal": child.selection.optimal,
        "decisions": dict(child.architecture),
        "predicted": {name: float(value) for name, value in child.predicted.items()},
        "runtime_ms": child.measured.get("runtime_ms"),
    }


def digest_of_batches(batches: Sequence[Batch]) -> str:
    """Return a digest of token ids."""
    import hashlib

    digest = hashlib.sha256()
    for batch in batches:
        values = batch if isinstance(batch, Mapping) else {"": batch}
        for name, value in values.items():
            content = value.numpy().tobytes() if isinstance(value, Tensor) else to_json(value).encode()
            digest.update(name.encode() + np.int64(len(content)).tobytes() + content)
    return digest.hexdigest()


def folder_of(run: Run, label: str) -> Path:
    """Return where a child's files go."""
    return run.path / "networks" / label
