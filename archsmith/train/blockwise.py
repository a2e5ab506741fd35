"""Block-wise local distillation: every variant of every block is trained alone against the parent's block.

The parent's activations come from an ``ActivationCache``: the input of layer ``k`` goes into the variant, and the
output of the parent's layer ``k`` is the target. No gradient crosses a block, so the blocks are independent jobs, which
an ``Executor`` carries out in any order. *Decoupled*, only one sub-block of a layer is replaced and trained
(``[a_j, f_parent frozen]`` and ``[a_parent frozen, f_k]``): m + n trainings for each layer, composed afterwards.
*Coupled*, every pair is trained: m * n.

A finished block is one safetensors file, complete or absent, with its figures inside; whatever ends the process, no
finished block is trained again.

Source: Puzzle, arXiv 2411.19146, Sec. 3. There the amount of data is given (1 B tokens, saturating at 0.5 B), the
optimiser is not: AdamW with a cosine schedule here. Own decision: a block that training made worse on the last batches
(which it was not trained on) keeps its initial values.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.core.files import storage_errors, write_atomic
from archsmith.core.protocols import Executor, Logger
from archsmith.core.rng import numpy_stream
from archsmith.train.activation_cache import ActivationCache, hidden_of
from archsmith.train.local_distill import normalised_mse
from archsmith.train.schedules import annealed

PARENT = "parent"


@dataclass(frozen=True)
class BlockTraining:
    """How one block is trained.

    Attributes:
        steps: Optimiser steps, each on one batch of the cache.
        lr: Peak learning rate of AdamW, reached after a tenth of the steps and annealed to 0.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest norm of a step's gradient; 0 for no limit.
        held_out: Batches at the end of the cache that judge and do not train.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    steps: int = 200
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    held_out: int = 2

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("held_out", 1), ("weight_decay", 0), ("clip_norm", 0)):
            if not math.inf > getattr(self, name) >= least:
                raise UserError(name, getattr(self, name), allowed=f"a number from {least}")
        if not math.inf > self.lr > 0:
            raise UserError("lr", self.lr, allowed="a number above 0")


@dataclass(frozen=True)
class BlockJob:
    """One block to be trained.

    Attributes:
        layer: Number of the layer.
        choices: Alternative by part; parts that are absent stay the parent's, frozen. All that are named are trained.
    """

    layer: int
    choices: Mapping[str, str] = field(hash=False)

    @property
    def name(self) -> str:
        """``layer3.attention=kv2`` or, for a pair, ``layer3.attention=kv2.ffn=ffn50``: the name of its file."""
        return f"layer{self.layer}." + ".".join(f"{part}={self.choices[part]}" for part in sorted(self.choices))


class Blocks(Protocol):
    """What block-wise training asks of a family; ``archsmith.families.residual_slots.SlotFamily`` has it."""

    def variant_layer(
        self, index: int, choices: Mapping[str, str], *, weights: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> nn.Module:
        """Return a copy of the parent's layer with sub-blocks replaced."""

    def variant_state(self, index: int, part: str, layer: nn.Module) -> Mapping[str, Tensor]:
        """Return the tensors of a sub-block by their names in the layer."""


def decoupled_jobs(family: Any) -> list[BlockJob]:
    """Return a job for every alternative of every slot that has weights to train: not the parent, not "none".

    Args:
        family: A ``SlotFamily``.
    """
    rows = [BlockJob(s.layer, {s.part: name}) for s in family.slots for name in s.alternatives if name != PARENT]
    return [job for job in rows if _has_weights(family, job)]


def coupled_jobs(family: Any) -> list[BlockJob]:
    """Return a job for every combination of alternatives of a layer in which something is trained."""
    jobs: list[BlockJob] = []
    for layer in sorted({slot.layer for slot in family.slots}):
        rows: list[dict[str, str]] = [{}]
        for slot in (slot for slot in family.slots if slot.layer == layer):
            rows = [{**row, slot.part: name} for row in rows for name in slot.alternatives]
        chosen = [{part: name for part, name in row.items() if name != PARENT} for row in rows]
        jobs += [BlockJob(layer, row) for row in chosen if row and _has_weights(family, BlockJob(layer, row))]
    return jobs


def _has_weights(family: Any, job: BlockJob) -> bool:
    return any(
        family.cost(slot, job.choices[slot.part]).params
        for slot in family.slots
        if slot.layer == job.layer and slot.part in job.choices
    )


# ------------------------------------------------------------------ one block


def train_block(
    layer: nn.Module,
    trained: Sequence[str],
    cache: ActivationCache,
    index: int,
    settings: BlockTraining,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the named parameters of a layer, in place, on what the parent's layer saw and returned.

    Args:
        layer: The variant; the parameters that are not named stay frozen.
        trained: Names of the parameters.
        cache: Calls of the parent's layers.
        index: Number of the layer.
        settings: How.
        seed: Of the order of the batches.

    Returns:
        "loss_before" and "loss" on the held-out batches (normalised MSE), "loss_trained" where training led,
        "steps" and "seconds".

    Raises:
        UserError: Fewer than one batch is left for training.
        ArchsmithError: The loss is not finite.
    """
    if cache.count <= settings.held_out:
        raise UserError(
            "held_out", settings.held_out, allowed=f"fewer than the {cache.count} batches of the activation cache"
        )
    start = time.monotonic()
    own = dict(layer.named_parameters())
    for parameter in own.values():
        parameter.requires_grad_(False)
    parameters = [own[name] for name in trained if name in own]
    for parameter in parameters:
        parameter.requires_grad_(True)
    layer.eval()  # what is imitated is the parent without dropout
    judges = range(cache.count - settings.held_out, cache.count)
    before = _held_out_loss(layer, cache, index, judges)
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)
    rng = numpy_stream(seed, "blockwise", index)
    order: list[int] = []
    warmup = max(1, settings.steps // 10)
    for step in range(settings.steps):
        if not order:
            order = rng.permutation(cache.count - settings.held_out).tolist()
        for group in optimizer.param_groups:
            group["lr"] = annealed(step, peak=settings.lr, total=settings.steps, warmup=warmup, shape="cosine")
        loss = block_loss(layer, cache, index, order.pop())
        if not math.isfinite(value := loss.item()):
            raise ArchsmithError(f"The loss of a variant of layer {index} is {value} at step {step}; lower lr.")
        loss.backward()
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = _held_out_loss(layer, cache, index, judges)
    if not after <= before:
        with torch.no_grad():
            for parameter, initial in zip(parameters, kept, strict=True):
                parameter.copy_(initial)
    return {
        "loss_before": before,
        "loss": min(before, after),
        "loss_trained": after,
        "steps": settings.steps,
        "seconds": time.monotonic() - start,
    }


def block_loss(layer: nn.Module, cache: ActivationCache, index: int, batch: int) -> Tensor:
    """Return the normalised MSE of a variant of layer ``index`` on one batch of the cache."""
    call = cache.call(batch, index)
    return normalised_mse(hidden_of(layer(*call.args, **call.kwargs)), call.output, mask=cache.mask(batch))


def _held_out_loss(layer: nn.Module, cache: ActivationCache, index: int, batches: Sequence[int]) -> float:
    with torch.no_grad():
        return math.fsum(float(block_loss(layer, cache, index, batch)) for batch in batches) / len(batches)


# ------------------------------------------------------------------ the library


class BlockLibrary:
    """Trained blocks by name: one file each, complete or absent.

    Args:
        folder: Where the files are; made when the first is written.
        key: Digest of what the blocks depend on beside their names (parent, data, training). A file with another key is
            not used.
    """

    def __init__(self, folder: str | Path, key: str = "") -> None:
        self.folder, self.key = Path(folder), key

    def path(self, job: BlockJob) -> Path:
        """Return the file of a block."""
        return self.folder / f"{job.name}.safetensors"

    def figures(self, job: BlockJob) -> dict[str, Any] | None:
        """Return the figures of a finished block, or None when it is not there (or of another key)."""
        path = self.path(job)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return facts["figures"] if facts["key"] == self.key else None

    def put(self, job: BlockJob, states: Mapping[str, Mapping[str, Tensor]], figures: Mapping[str, Any]) -> None:
        """Keep a block: its tensors by part, and its figures."""
        tensors = {
            f"{part}/{name}": tensor.detach().clone(memory_format=torch.contiguous_format)
            for part, state in states.items()
            for name, tensor in state.items()
        }
        facts = {"key": self.key, "layer": job.layer, "choices": dict(job.choices), "figures": dict(figures)}
        with storage_errors("library", self.folder, hint="Blocks that are finished are kept."):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path(job), save(tensors, {"facts": json.dumps(facts)}))

    def states(self, job: BlockJob) -> dict[str, dict[str, Tensor]] | None:
        """Return the tensors of a block by part, or None when it is not there."""
        if self.figures(job) is None:
            return None
        states: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.path(job), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part, _, name = key.partition("/")
                states.setdefault(part, {})[name] = file.get_tensor(key)
        return states

    def weights(self, layer: int, choices: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """Return the trained tensors for these choices of a layer, by part.

        The pair as it was trained together, where it was; otherwise every part as it was trained beside the parent's
        others. Parts without a trained block are left out: they begin as the family computes them.
        """
        chosen = {part: name for part, name in choices.items() if name != PARENT}
        if chosen and (together := self.states(BlockJob(layer, chosen))) is not None:
            return together
        found: dict[str, dict[str, Tensor]] = {}
        for part, name in chosen.items():
            found |= self.states(BlockJob(layer, {part: name})) or {}
        return found


class FamilySource(Protocol):
    """A call without arguments that gives the family, in this process or another: it pickles."""

    def __call__(self) -> Any:
        """Return the family, with the statistics that its initial values need."""


_KNOWN: dict[str, Any] = {}


def family_of(source: FamilySource) -> Any:
    """Return the family of a source, made once in each process."""
    key = hashlib.sha256(pickle.dumps(source)).hexdigest()
    if key not in _KNOWN:
        _KNOWN.clear()  # a process works on one parent at a time
        _KNOWN[key] = source()
    return _KNOWN[key]


def distil_block(
    source: FamilySource, cache: str, job: BlockJob, settings: BlockTraining, library: BlockLibrary, seed: int
) -> dict[str, Any]:
    """Train one block and keep it in the library; what an executor carries out. Returns its figures."""
    if (found := library.figures(job)) is not None:
        return found
    family: Blocks = family_of(source)
    layer = family.variant_layer(job.layer, job.choices)
    names = [name for part in job.choices for name in family.variant_state(job.layer, part, layer)]
    figures = train_block(layer, names, ActivationCache(cache), job.layer, settings, seed=seed)
    library.put(job, {part: family.variant_state(job.layer, part, layer) for part in job.choices}, figures)
    return figures


def distil_library(
    source: FamilySource,
    cache: ActivationCache,
    jobs: Sequence[BlockJob],
    settings: BlockTraining,
    library: BlockLibrary,
    *,
    executor: Executor,
    logger: Logger,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_block: Callable[[int, BlockJob, Mapping[str, Any]], None] = lambda done, job, figures: None,
) -> bool:
    """Train every block that the library lacks; return whether all of them are there.

    Each finished block is a file of the library and an event ``block_trained`` of the logger (name, figures).

    Args:
        source: Gives the family, here and in other processes.
        cache: Calls of the parent's layers.
        jobs: Blocks to train.
        settings: How each is trained.
        library: Where they are kept.
        executor: Carries the jobs out; ``Inline`` here and now, a process pool elsewhere.
        logger: Where finished blocks are noted.
        seed: Of the order of the batches; the same for a block whoever trains it, and whenever.
        should_stop: Asked between blocks.
        on_block: Told the number of finished blocks, the block and its figures.
    """
    noted = {event["block"] for event in logger.events("block_trained")}
    done = 0

    def note(job: BlockJob, figures: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if job.name not in noted:
            logger.record("block_trained", block=job.name, **figures)
        on_block(done, job, figures)

    missing = []
    for job in jobs:
        if (figures := library.figures(job)) is not None:
            note(job, figures)
        else:
            missing.append(job)
    return carry_out(
        {job.name: (distil_block, (source, str(cache.folder), job, settings, library, seed)) for job in missing},
        executor,
        {job.name: job for job in missing},
        note,
        should_stop,
    )


def carry_out(
    calls: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
    executor: Executor,
    subjects: Mapping[str, Any],
    note: Callable[[Any, Any], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Submit named calls, and note each result as soon as it is there; return whether all were made.

    When asked to stop, calls that have not begun are given up; those under way are waited for and noted.
    """
    pending: dict[Future[Any], str] = {}

    def collect(block: bool) -> None:
        if pending:
            finished, _ = wait(pending, timeout=None if block else 0, return_when=FIRST_COMPLETED)
            for future in finished:
                name = pending.pop(future)
                if not future.cancelled():
                    note(subjects[name], future.result())

    complete = True
    for name, (function, arguments) in calls.items():
        if should_stop():
            complete = False
            break
        pending[executor.submit(function, *arguments)] = name
        collect(False)
    while pending:
        if complete and should_stop():
            given_up = [future.cancel() for future in pending]
            complete = not any(given_up)
        finished, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
        if finished:
            collect(False)
    return complete


class Inline:
    """An executor that carries every call out at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Carry the call out and return its finished future."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future
