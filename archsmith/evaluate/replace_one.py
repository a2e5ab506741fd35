"""Replace-one-block scores: the parent with one layer replaced, judged once for each alternative.

What a whole child is worth is not measured but added up: the score of each (layer, alternatives) is that of the parent
with this one layer replaced. Only the replaced layer and those behind it are computed: the input of the layer comes
from the ``ActivationCache`` of the validation batches, and the layers before it are passed by.

Source: Puzzle, arXiv 2411.19146, Sec. 4.2 (divergence from the parent by default; the child's loss, or a task).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.core.protocols import Executor, Logger
from archsmith.families.slot_statistics import run_batch
from archsmith.train.activation_cache import ActivationCache, Batch, LayerCall, recorded, token_mask
from archsmith.train.blockwise import BlockJob, BlockLibrary, FamilySource, carry_out, family_of
from archsmith.train.local_distill import cosine_distance, lm_loss, pooled, token_kl

Metric = Callable[[Any, Batch], float]
"""From a model's output and the batch to a number, a mean over the batch's examples."""

ScoreName = Literal["kl", "lm_loss", "hidden", "embedding"]
"""``kl``: KL(parent || child) in nats for each token. ``lm_loss``: the child's cross-entropy of the next token.
``hidden``: 1 - cosine of the last layer's output, mean over tokens. ``embedding``: 1 - cosine of its mean over tokens,
mean over sequences."""

PARENT_IS_ZERO = ("kl", "hidden", "embedding")
"""Scores that measure a distance from the parent."""


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the attribute, or the output itself when it is a tensor.

    Raises:
        UserError: It has none.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(
            "score",
            Shown(f"a model that returns {type(output).__name__} without logits"),
            allowed="'hidden' or 'embedding' for a model without a head",
        )
    return logits


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the tokens (B, T) of a batch and their mask, for the loss of a language model."""
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch
    return tokens, token_mask(batch)


def measured_score(
    score: ScoreName | Metric, output: Any, last: Tensor, wanted: Any, wanted_last: Tensor, batch: Batch
) -> tuple[float, int]:
    """Return one batch's mean score and how much it weighs (tokens, or sequences).

    Args:
        score: Which.
        output: What the child returned.
        last: Output of its last layer (B, T, E).
        wanted: Logits of the parent, for ``kl``.
        wanted_last: Output of the parent's last layer.
        batch: What both were called with.
    """
    mask = token_mask(batch)
    tokens = int(mask.sum()) if mask is not None else math.prod(last.shape[:-1])
    if callable(score):
        return float(score(output, batch)), len(last)
    if score == "kl":
        return float(token_kl(wanted, logits_of(output), mask=mask)), tokens
    if score == "lm_loss":
        ids, _ = next_tokens(batch)
        shifted = None if mask is None else mask[:, 1:]
        count = ids[:, 1:].numel() if shifted is None else int(shifted.sum())
        return float(lm_loss(logits_of(output)[:, :-1], ids[:, 1:], mask=shifted)), count
    if score == "hidden":
        return float(cosine_distance(last, wanted_last, mask=mask)), tokens
    if score == "embedding":
        return float(cosine_distance(pooled(last, mask), pooled(wanted_last, mask))), len(last)
    raise UserError("score", score, allowed=f"{', '.join(get_args(ScoreName))}, or a function of output and batch")


@contextmanager
def resumed_at(
    model: nn.Module,
    layer_paths: Sequence[str],
    start: int,
    hidden: Tensor,
    *,
    returned: int = 0,
    layer: nn.Module | None = None,
) -> Iterator[None]:
    """Let calls of ``model`` begin at layer ``start``, with the given hidden state; earlier layers are passed by.

    Args:
        model: Any model that calls its layers one after the other; as before when the block is left.
        layer_paths: Module path of every layer.
        start: Number of the first layer that is computed; the number of layers for none at all.
        hidden: What goes into it.
        returned: Length of the tuple that layers return, 0 for the hidden state alone.
        layer: Stands in for the layer ``start``; None for the model's own.
    """
    layers = [model.get_submodule(path) for path in layer_paths]
    before = [vars(each).get("forward") for each in layers]

    def passed(*args: Any, **kwargs: Any) -> Any:
        return (hidden, *([None] * (returned - 1))) if returned else hidden

    def begun(computed: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return computed(hidden, *args[1:], **kwargs) if args else computed(**{**kwargs, "hidden_states": hidden})

        return forward

    try:
        for each in layers[:start]:
            vars(each)["forward"] = passed  # an attribute of the instance; its class is untouched
        if start < len(layers):
            vars(layers[start])["forward"] = begun(layer if layer is not None else layers[start].forward)
        yield
    finally:
        for each, own in zip(layers, before, strict=True):
            vars(each).pop("forward", None)
            if own is not None:
                vars(each)["forward"] = own


class ReplaceOne:
    """Scores variants of single layers against the parent.

    Args:
        family: A ``SlotFamily``; its parent is restored after every call.
        cache: Calls of the parent's layers on the validation batches.
        score: Which score; see ``ScoreName``, or a function of output and batch that pickles.
        memory_bytes: How much of the parent's logits is kept between calls (for ``kl``); beyond it they are computed
            again from its last hidden states.

    Raises:
        UserError: An unknown score.
    """

    def __init__(
        self,
        family: Any,
        cache: ActivationCache,
        *,
        score: ScoreName | Metric = "kl",
        memory_bytes: int = 512 * 2**20,
    ) -> None:
        if not callable(score) and score not in get_args(ScoreName):
            raise UserError("score", score, allowed=f"{', '.join(get_args(ScoreName))}, or a function")
        self.family, self.cache, self.score = family, cache, score
        self._room = memory_bytes
        self._logits: dict[int, Tensor] = {}

    def parent_score(self) -> float:
        """Return the parent's own score: 0 for a distance from it, else measured."""
        if self.score in PARENT_IS_ZERO:
            return 0.0
        return self._mean(self.cache.layers, None)

    def of(
        self, layer: int, choices: Mapping[str, str], weights: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> float:
        """Return the score of the parent with one layer replaced.

        Args:
            layer: Number of the layer.
            choices: Alternative by part.
            weights: Trained tensors by part (``BlockLibrary.weights``).

        Raises:
            ArchsmithError: The score is not finite.
        """
        variant = self.family.variant_layer(layer, choices, weights=weights)
        value = self._mean(layer, variant.eval())
        if not math.isfinite(value):
            raise ArchsmithError(f"The score of {BlockJob(layer, choices).name} is {value}; a block of it diverged.")
        return value

    def _mean(self, start: int, variant: nn.Module | None) -> float:
        sums, weights = [], []
        with torch.no_grad():
            for number in range(self.cache.count):
                batch = self.cache.batch(number)
                end = self.cache.call(number, self.cache.layers - 1)
                wanted = self._parent_logits(number, batch, end) if self.score == "kl" else None
                hidden = end.output if variant is None else self.cache.call(number, start).hidden
                output, last = self._run(batch, start, hidden, end.returned, variant)
                value, weight = measured_score(self.score, output, last, wanted, end.output, batch)
                sums.append(value * weight)
                weights.append(weight)
        return math.fsum(sums) / max(1, sum(weights))

    def _run(
        self, batch: Batch, start: int, hidden: Tensor, returned: int, variant: nn.Module | None
    ) -> tuple[Any, Tensor]:
        model, paths = self.family.parent, self.family.layer_paths
        begun = resumed_at(model, paths, start, hidden, returned=returned, layer=variant)
        with begun, recorded(model, paths[-1:]) as calls:
            output = run_batch(model, batch)
        return output, calls[0].output

    def _parent_logits(self, number: int, batch: Batch, end: LayerCall) -> Tensor:
        if number in self._logits:
            return self._logits[number]
        output, _ = self._run(batch, self.cache.layers, end.output, end.returned, None)
        logits = logits_of(output)
        size = logits.numel() * logits.element_size()
        if size <= self._room:
            self._room -= size
            self._logits[number] = logits
        return logits


def block_variants(family: Any, by: Literal["pairs", "slots"] = "pairs") -> list[BlockJob]:
    """Return what is scored: every combination of alternatives of a layer ("pairs"), or every alternative alone.

    The parent itself is left out: its score is known. "pairs" is the published way (m * n for each layer); "slots" is
    m + n, and a layer's score is then the sum over its sub-blocks.
    """
    jobs: list[BlockJob] = []
    for layer in sorted({slot.layer for slot in family.slots}):
        slots = [slot for slot in family.slots if slot.layer == layer]
        rows: list[dict[str, str]] = [{}]
        if by == "slots":
            rows = [{slot.part: name} for slot in slots for name in slot.alternatives]
        else:
            for slot in slots:
                rows = [{**row, slot.part: name} for row in rows for name in slot.alternatives]
        chosen = [{part: name for part, name in row.items() if name != "parent"} for row in rows]
        jobs += [BlockJob(layer, row) for row in chosen if row]
    return jobs


_EVALUATORS: dict[tuple[int, str, str], ReplaceOne] = {}


def score_block(
    source: FamilySource, cache: str, job: BlockJob, library: BlockLibrary, score: ScoreName | Metric
) -> float:
    """Score one variant; what an executor carries out. The evaluator is made once in each process."""
    family = family_of(source)
    key = (id(family), cache, str(score))
    if key not in _EVALUATORS:
        _EVALUATORS.clear()
        _EVALUATORS[key] = ReplaceOne(family, ActivationCache(cache), score=score)
    return _EVALUATORS[key].of(job.layer, job.choices, library.weights(job.layer, job.choices))


def score_library(
    source: FamilySource,
    cache: ActivationCache,
    jobs: Sequence[BlockJob],
    library: BlockLibrary,
    *,
    executor: Executor,
    logger: Logger,
    score: ScoreName | Metric = "kl",
    kind: str = "block_scored",
    should_stop: Callable[[], bool] = lambda: False,
    on_score: Callable[[int, BlockJob, float], None] = lambda done, job, score: None,
) -> dict[str, float] | None:
    """Return the score of every variant by name, each measured once in the life of the logger, or None when stopped.

    Args:
        source: Gives the family, here and in other processes.
        cache: Calls of the parent's layers on the validation batches.
        jobs: What to score (``block_variants``).
        library: Trained blocks; what it lacks begins as the family computes it.
        executor: Carries the evaluations out.
        logger: Where scores are noted (events of ``kind``: block, score), and found again.
        score: Which score.
        kind: Kind of the events; another for another library or score.
        should_stop: Asked between variants.
        on_score: Told the number of scores so far, the variant and its score.
    """
    scores = {str(event["block"]): float(event["score"]) for event in logger.events(kind)}
    missing = {job.name: job for job in jobs if job.name not in scores}

    def note(job: BlockJob, value: float) -> None:
        scores[job.name] = value
        logger.record(kind, block=job.name, score=value)
        on_score(len(scores), job, value)

    calls = {name: (score_block, (source, str(cache.folder), job, library, score)) for name, job in missing.items()}
    if not carry_out(calls, executor, missing, note, should_stop):
        return None
    return {job.name: scores[job.name] for job in jobs}
