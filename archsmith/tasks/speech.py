"""Recognition of short utterances over features in memory, by CTC."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.tasks.base import Batch, Forward, Task
from archsmith.tasks.bounds import whole
from archsmith.tasks.ctc import BLANK, ctc_loss, ctc_scores, greedy_decoded, wanted_tokens
from archsmith.tasks.split import Indices, halved, shuffled


@final
class SpeechRecognition(Task):
    """Utterances in memory, each a sequence of tokens.

    Inputs are (planes, bands, frames) with the same number of frames for all; shorter utterances are padded with zeros,
    the mean of the normalised features. A batch's ``context`` has ``lengths`` (B,), in frames, and ``target_lengths``
    (B,); its targets are (B, L), padded with the blank. The loss is CTC in nats per utterance, not divided by lengths.
    ``accuracy`` is the share of utterances that greedy decoding gives without any error, and ``evaluate`` also has
    ``token_error_rate``.

    Args:
        name: Name of the task.
        features: (planes, bands, its own frames) of each utterance, float32, not normalised.
        targets: Tokens of each utterance, from 1; 0 is the blank.
        tokens: Their names, the blank's first.
        splits: Index arrays for ``"train"``, ``"valid"``, ``"test"``.
        frames: Frames of the inputs; no utterance has more.
        digest: SHA-256 of everything that the features were made of.

    The normalisation is computed per plane from the frames of the training utterances alone.
    """

    kind = "speech"
    metric = "accuracy"
    resume_note = ""  # the order is a function of seed, epoch and step

    def __init__(
        self,
        name: str,
        features: Sequence[NDArray[np.float32]],
        targets: Sequence[Sequence[int]],
        *,
        tokens: Sequence[str],
        splits: Mapping[str, Indices],
        frames: int,
        digest: str,
    ) -> None:
        planes, bands = features[0].shape[:2]
        self.name = name
        self.input_shape = (planes, bands, frames)
        self.class_names = tuple(tokens)
        self.num_classes = len(tokens)
        self.splits = tuple(splits)
        heard = np.concatenate([features[index] for index in splits["train"]], axis=2, dtype=np.float64)
        mean, std = heard.mean((1, 2)), heard.std((1, 2))
        std = np.where(std > 1e-6, std, 1.0)
        self.normalisation = {"mean": mean.tolist(), "std": std.tolist()}
        self._inputs = torch.zeros(len(features), planes, bands, frames)
        self._lengths = torch.tensor([utterance.shape[2] for utterance in features])
        for index, utterance in enumerate(features):
            normal = (utterance - mean[:, None, None]) / std[:, None, None]
            self._inputs[index, :, :, : utterance.shape[2]] = torch.from_numpy(normal.astype(np.float32))
        self._target_lengths = torch.tensor([len(target) for target in targets])
        self._targets = torch.full((len(targets), int(self._target_lengths.max())), BLANK)
        for index, target in enumerate(targets):
            self._targets[index, : len(target)] = torch.tensor(list(target))
        self._indices = {split: torch.from_numpy(np.sort(indices)) for split, indices in splits.items()}
        self.digest = _digest(digest, self._targets, tokens, frames, self._indices)

    def size(self, split: str) -> int:
        """See ``Task.size``."""
        return len(self._of(split))

    def steps_per_epoch(self, batch_size: int) -> int:
        """See ``Task.steps_per_epoch``."""
        whole("batch_size", batch_size, low=1, high=2**31)
        size = self.size("train")
        if batch_size > size:
            raise UserError(
                "batch_size", batch_size, allowed=f"1 to {size}, the size of the training part of {self.name}"
            )
        return size // batch_size

    def batches(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See ``Task.batches``."""
        indices = self._of(split)
        if split == "train":
            steps = self.steps_per_epoch(batch_size)
            indices = indices[torch.from_numpy(shuffled(len(indices), seed, "shuffle", epoch))]
        else:
            whole("batch_size", batch_size, low=1, high=2**31)
            steps = -(-len(indices) // batch_size)
        whole("start", start, low=0, high=steps)
        return self._pass(indices, batch_size, start, steps)

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Task.loss``; nothing is drawn."""
        losses, scores, lengths = ctc_loss(forward, batch, tokens=self.num_classes)
        pairs = zip(greedy_decoded(scores, lengths), wanted_tokens(batch), strict=True)
        right = [float(found == wanted) for found, wanted in pairs]
        return losses.mean(), {"accuracy": torch.tensor(right).mean()}

    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """See ``Task.evaluate``; with ``token_error_rate`` besides."""
        return ctc_scores(forward, self.batches(split, batch_size=batch_size), tokens=self.num_classes)

    def examples(self, n: int, split: str = "test") -> Tensor:
        """See ``Task.examples``."""
        indices = self._of(split)
        return self._inputs[indices[: whole("n", n, low=1, high=len(indices))]]

    def split_indices(self, split: str) -> Indices:
        """Return a copy of the index array of a split, ascending, into the utterances that the task was made of."""
        return self._of(split).numpy().copy()

    def with_splits(self, splits: Mapping[str, Indices]) -> SpeechRecognition:
        """Return the task with other utterances in some of its splits; all else is shared, the normalisation too.

        Args:
            splits: Index arrays as of ``split_indices``, by split.
        """
        other = copy.copy(self)
        changed = {split: torch.from_numpy(np.sort(indices)) for split, indices in splits.items()}
        other._indices = {**self._indices, **changed}
        return other

    def training_halves(self, seed: int) -> tuple[SpeechRecognition, SpeechRecognition]:
        """Return the task twice, with one random half of its training utterances each; the odd one is the first's.

        Raises:
            UserError: There is a single training utterance.
        """
        if self.size("train") < 2:
            raise UserError("task", self.name, allowed="at least 2 training utterances, to be halved")
        first, second = halved(self.split_indices("train"), seed)
        return self.with_splits({"train": first}), self.with_splits({"train": second})

    def _of(self, split: str) -> Tensor:
        if split not in self._indices:
            raise UserError("split", split, allowed=", ".join(self._indices))
        return self._indices[split]

    def _pass(self, indices: Tensor, batch_size: int, start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, steps):
            chosen = indices[step * batch_size : (step + 1) * batch_size]
            context = {"lengths": self._lengths[chosen], "target_lengths": self._target_lengths[chosen]}
            yield Batch(self._inputs[chosen], self._targets[chosen], MappingProxyType(context))


def _digest(made_of: str, targets: Tensor, tokens: Sequence[str], frames: int, splits: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr([made_of, tuple(tokens), frames]).encode())
    digest.update(targets.numpy().astype("<i8").tobytes())
    for split, indices in splits.items():
        digest.update(f"{split}:{len(indices)}".encode())
        digest.update(indices.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
