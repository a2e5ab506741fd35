"""Puzzle: one trained transformer becomes a heterogeneous child that fits memory, latency and throughput.

"Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", 2024-2025, arXiv 2411.19146.

Every attention and FFN of every layer gets cheaper alternatives, computed from the parent. Each is trained alone,
against the parent's activations (block-wise local distillation), and judged alone, in the parent's place (replace-one-
block scores). An integer programme then takes one alternative for every layer: the smallest sum of scores within the
limits on memory, caches, parameters and measured runtime. The assembled child is trained end to end towards the
parent's hidden states and logits (global distillation).

Differences from the paper: 1 B tokens for each block and 45 B for the child are a few hundred steps here; the
optimiser is AdamW with a cosine schedule (the paper gives none); runtimes are those of this machine. Extensions:
encoders (scored by embeddings or hidden states), any residual model, runtimes measured again on the whole child.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.cost.block_times import Load
from archsmith.evaluate.replace_one import ScoreName
from archsmith.run.block_search import BlockSearch, Child, CostTables, allowed_ms, comparable_ms
from archsmith.space import Budget
from archsmith.strategies.milp import TOLERANCE, Infeasible
from archsmith.train.blockwise import PARENT, BlockTraining, coupled_jobs
from archsmith.train.global_distill import Uptraining

SYSTEM = {
    "slug": "puzzle",
    "title": "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs",
    "year": 2025,
    "arxiv": "2411.19146",
    "kind": "search",
    "aliases": ["block-distillation"],
}

MEASURED_TRIES = 4
"""From which child on that is too slow the limit falls by halves, whatever was measured."""


class Settings(BaseModel):
    """Hyper-parameters of Puzzle.

    Attributes:
        alternatives: Names by part ("attention", "ffn") or slot; None for the published ones that can stand there.
        ranking: Which channels stay in narrower FFNs: "contribution", "iterative" or "norm".
        kv_initialiser: How fewer key-value heads begin: "mean" or "prune".
        distillation: "decoupled", "coupled", or "mixed": decoupled, then coupled among what selections often take.
        training: Of one block.
        score: What a replaced block is judged by; None for "kl" where there are logits, else "embedding".
        scored: "pairs" or "slots", see ``block_variants``.
        batches: Batch sizes that the programme is solved for; the best-scoring child wins.
        prefill: Tokens read at once; None for the length of the training blocks.
        generation: Tokens generated after them; 0 for encoders.
        precision: Of weights and caches in the memory limit, and of the measured runtimes.
        rounds: Interleaved rounds behind a measured runtime.
        different_from_first: Further children that share at most this part of the layers with each one before; None
            for one child.
        children: Number of children when they have to differ.
        uptraining: Of the assembled child.
        solver_seconds: Time limit of one programme; the paper's code has 60.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alternatives: dict[str, list[str]] | None = None
    ranking: Literal["contribution", "iterative", "norm"] = "contribution"
    kv_initialiser: Literal["mean", "prune"] = "mean"
    distillation: Literal["decoupled", "coupled", "mixed"] = "decoupled"
    training: BlockTraining = Field(default_factory=BlockTraining)
    score: ScoreName | None = None
    scored: Literal["pairs", "slots"] = "pairs"
    batches: tuple[int, ...] = Field(default=(1,), min_length=1)
    prefill: int | None = Field(default=None, ge=1)
    generation: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    rounds: int = Field(default=10, ge=10)
    different_from_first: float | None = Field(default=None, ge=0, le=1)
    children: int = Field(default=1, ge=1)
    uptraining: Uptraining = Field(default_factory=Uptraining)
    solver_seconds: float = Field(default=60.0, gt=0)

    def load(self, batch: int, length: int) -> Load:
        """Return the load of a batch size."""
        return Load(
            batch=batch,
            prefill=self.prefill or length,
            generation=self.generation,
            precision=self.precision,
            rounds=self.rounds,
        )


def search(
    blocks: BlockSearch,
    budget: Budget,
    settings: Settings,
    call: Callable[[Load], Any],
    *,
    length: int,
) -> tuple[list[Child], list[Child], CostTables]:
    """Return the children within the budget (the best first), the baselines beside it, and the tables they rest on.

    Args:
        blocks: The run.
        budget: Limits on memory, params, macs, latency, throughput.
        settings: Hyper-parameters.
        call: A call of the parent for a load.
        length: Tokens of a training block.

    Raises:
        Infeasible: Nothing fits, for any batch size.
    """
    blocks.distil(coupled=settings.distillation == "coupled")  # 1. library
    scores = blocks.scores()  # 2. replace one block
    timed = bool({limit.cost for limit in budget.limits} & {"latency", "throughput"})
    tables = {b: blocks.costs(load := settings.load(b, length), call(load), timed=timed) for b in settings.batches}
    best, costs = _swept(blocks, scores, budget, tables, settings, call)  # 3. integer programme
    if settings.distillation == "mixed":
        blocks.family = blocks.family.with_alternatives(blocks.frequent(_around(blocks, scores, budget, tables)))
        blocks.distil(coupled_jobs(blocks.family))
        scores = blocks.scores(kind="block_scored_coupled")
        tables = {b: blocks.costs(costs.load, call(costs.load), timed=timed) for b in (costs.load.batch,)}
        best, costs = _swept(blocks, scores, budget, tables, settings, call)
    others = blocks.baselines(scores, costs, blocks.limits(budget, costs))
    children = [best]
    while settings.different_from_first is not None and len(children) < settings.children:
        try:
            more = blocks.select(
                scores,
                costs,
                blocks.limits(budget, costs),
                different_from=[child.selection.choice for child in children],
                alpha=settings.different_from_first,
            )
        except Infeasible as error:
            blocks.tell(f"no further child: {error}")
            break
        children.append(more)
    if timed:
        measured = blocks.measured([*children, *others], costs, call(costs.load))
        children, others = measured[: len(children)], measured[len(children) :]
    return children, others, costs


def _swept(
    blocks: BlockSearch,
    scores: list[list[float]],
    budget: Budget,
    tables: Mapping[int, CostTables],
    settings: Settings,
    call: Callable[[Load], Any],
) -> tuple[Child, CostTables]:
    """Solve for every batch size and return the child with the best score, measured as a whole where time counts."""
    found: dict[int, Child] = {}
    failed: list[UserError] = []
    for batch, costs in tables.items():
        try:
            found[batch] = _kept(blocks, scores, budget, costs, settings, call)
        except UserError as error:
            failed.append(error)
            blocks.tell(f"batch {batch}: {error}")
    if not found:
        raise failed[-1]
    best = min(found, key=lambda batch: found[batch].selection.score)
    return found[best], tables[best]


def _kept(
    blocks: BlockSearch,
    scores: list[list[float]],
    budget: Budget,
    costs: CostTables,
    settings: Settings,
    call: Callable[[Load], Any],
) -> Child:
    """Return the exact selection; while the whole child is measured slower than allowed, aim lower.

    The aim falls by what the child exceeds the limit, from the ``MEASURED_TRIES``th time on by half of the distance to
    the fastest selection, and ends there. Every measurement is in the journal.

    Raises:
        UserError: Even the fastest selection is measured slower than allowed; names the nearest child.
    """
    limits = blocks.limits(budget, costs)
    allowed = allowed_ms({li.cost: li.value for li in budget.resolve(costs.parent).limits}, costs.load)
    nearest: tuple[float, Child] | None = None
    tries = 0
    while True:
        child = blocks.select(scores, costs, limits, seconds=settings.solver_seconds)
        if allowed is None:
            return child
        [child] = blocks.measured([child], costs, call(costs.load))
        measured = comparable_ms(child, budget, costs)
        if measured <= allowed:
            return child
        if nearest is None or measured < nearest[0]:
            nearest = measured, child
        tries += 1
        runtime, fastest = child.selection.totals["runtime"], blocks.fastest(costs, limits)
        if runtime <= fastest * (1 + TOLERANCE):
            raise _too_slow(blocks, budget, allowed, *nearest)
        aim = (runtime + fastest) / 2
        if tries < MEASURED_TRIES:
            rest = costs.rest["runtime"]
            aim = max(aim, 0.98 * (runtime + rest) * allowed / measured - rest)
        if aim <= 1.01 * fastest:
            aim = fastest
        blocks.tell(f"measured {measured:.3f} ms, allowed {allowed:.3f}: aiming lower")
        limits = {**limits, "runtime": aim}


def _too_slow(blocks: BlockSearch, budget: Budget, allowed: float, measured: float, child: Child) -> UserError:
    """Return the error of a limit on time that the tables reach and no whole child does."""
    changed = ", ".join(f"{slot} {name}" for slot, name in child.architecture.items() if name != PARENT)
    return UserError(
        "budget",
        str(budget),
        allowed=f"at least {measured:.4g} ms for the load (it allows {allowed:.4g} ms): the nearest measured child",
        hint=f"Down to the fastest selection every whole child is slower. The nearest: {changed or 'the parent'}. "
        f"Blocks, scores and measurements are kept in {blocks.run.path}.",
    )


def _around(
    blocks: BlockSearch, scores: list[list[float]], budget: Budget, tables: Mapping[int, CostTables]
) -> Sequence[Child]:
    """Return selections for every batch size at limits around the budget: what says which alternatives are used."""
    found = []
    for costs in tables.values():
        limits = blocks.limits(budget, costs)
        for share in (0.9, 0.95, 1.0, 1.05, 1.1):
            try:
                found.append(blocks.select(scores, costs, {name: share * value for name, value in limits.items()}))
            except Infeasible:
                continue
    return found
