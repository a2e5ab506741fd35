"""Classification of texts that are token ids in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from archsmith.tasks.base import Batch, Forward
from archsmith.tasks.bounds import one_of, whole
from archsmith.tasks.classification import checked_logits, classification_scores
from archsmith.tasks.indexed import IndexedTask
from archsmith.tasks.split import Indices, shuffled
from archsmith.tasks.tokens import Tokenizer

PADDING = ("longest", "full")

_WINDOW = 32
"""Batches among which training texts are sorted by length."""


@final
class TextClassification(IndexedTask):
    """Texts in memory with one label each.

    Inputs are token ids (B, T), int64, padded on the right. A batch's ``context`` has ``attention_mask`` (B, T), int64,
    1 at tokens. Networks are called with the ids alone: the padding has an id of its own, ``pad_id``, which no text
    contains, so ``ids != pad_id`` is the mask, and an exported network has one input.

    Args:
        name: Name of the task.
        tokens: Ids of each text.
        labels: Class of each.
        tokenizer: What made the ids.
        class_names: One per class.
        splits: Index arrays for ``"train"``, ``"valid"``, ``"test"``.
        length: Ids of the longest inputs; no text has more.
        padding: ``"longest"``: a batch is as long as its longest text, and texts of similar length share training
            batches; ``"full"``: all have ``length``. ``examples`` always have it.
        digest: SHA-256 of everything that the ids were made of.

    Attributes:
        pad_id: Id of the padding.
        vocab_size: Ids are below it.
        tokenizer: What made the ids, in words.

    The order of training texts is a function of seed, epoch and batch size.
    """

    kind = "text"
    metric = "accuracy"
    resume_note = ""

    def __init__(
        self,
        name: str,
        tokens: Sequence[Sequence[int]],
        labels: Sequence[int],
        *,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        splits: Mapping[str, Indices],
        length: int,
        padding: str = "longest",
        digest: str = "",
    ) -> None:
        whole("max_tokens", length, low=2, high=1 << 20)
        self.name = name
        self.input_shape = (length,)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.splits = tuple(splits)
        self.normalisation = {"mean": [], "std": []}
        self.pad_id, self.vocab_size, self.tokenizer = tokenizer.pad_id, tokenizer.size, tokenizer.name
        self.padding = one_of("padding", padding, PADDING)
        self._filler = tokenizer.filler_id
        self._lengths = torch.tensor([len(each) for each in tokens])
        self._tokens = torch.full((len(tokens), length), self.pad_id, dtype=torch.int32)
        for row, each in enumerate(tokens):
            self._tokens[row, : len(each)] = torch.tensor(list(each), dtype=torch.int32)
        self._labels = torch.tensor(list(labels))
        self._indices = {split: torch.from_numpy(np.sort(indices)) for split, indices in splits.items()}
        self.digest = self._digest(digest)

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Task.loss``; nothing is drawn."""
        logits = checked_logits(forward(batch.inputs), len(batch), self.num_classes)
        targets = batch.targets.to(logits.device)
        right = (logits.detach().argmax(1) == targets).float().mean()
        return functional.cross_entropy(logits.float(), targets), {"accuracy": right}

    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """See ``Task.evaluate``."""
        return classification_scores(forward, self.batches(split, batch_size=batch_size), num_classes=self.num_classes)

    def ordered(self, indices: Tensor, *, batch_size: int, seed: int, epoch: int) -> Tensor:
        """See ``IndexedTask.ordered``: random, but texts of similar length share a batch where that saves padding."""
        order = super().ordered(indices, batch_size=batch_size, seed=seed, epoch=epoch)
        steps = len(order) // batch_size
        if self.padding == "full" or steps < 2:
            return order
        order = order[: steps * batch_size]
        windows = order.split(_WINDOW * batch_size)
        order = torch.cat([each[self._lengths[each].argsort(stable=True)] for each in windows])
        batches = torch.from_numpy(shuffled(steps, seed, "batches", epoch))
        return order.view(steps, batch_size)[batches].flatten()

    def batch_of(self, chosen: Tensor) -> Batch:
        """See ``IndexedTask.batch_of``."""
        longest = self.input_shape[0] if self.padding == "full" else int(self._lengths[chosen].max())
        ids = self._tokens[chosen, :longest].long()
        return Batch(ids, self._labels[chosen], MappingProxyType({"attention_mask": (ids != self.pad_id).long()}))

    def examples(self, n: int, split: str = "test") -> Tensor:
        """See ``Task.examples``; all of them have the full length."""
        indices = self._of(split)
        return self._tokens[indices[: whole("n", n, low=1, high=len(indices))]].long()

    def plain_inputs(self, n: int = 1) -> Tensor:
        """See ``Task.plain_inputs``: full length, without padding."""
        return torch.full((n, *self.input_shape), self._filler)

    def _digest(self, made_of: str) -> str:
        digest = hashlib.sha256(repr([made_of, self.class_names, self.input_shape, self.pad_id, self.padding]).encode())
        digest.update(self._tokens.numpy().astype("<i4").tobytes())
        digest.update(self._labels.numpy().astype("<i8").tobytes())
        for split, indices in self._indices.items():
            digest.update(f"{split}:{len(indices)}".encode())
            digest.update(indices.numpy().astype("<i8").tobytes())
        return digest.hexdigest()
