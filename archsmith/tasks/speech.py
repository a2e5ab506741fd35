"""Recognition of short utterances over features in memory, by CTC."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archsmith.tasks.base import Batch, Forward
from archsmith.tasks.ctc import BLANK, ctc_loss, ctc_scores, greedy_decoded, wanted_tokens
from archsmith.tasks.indexed import IndexedTask
from archsmith.tasks.split import Indices


@final
class SpeechRecognition(IndexedTask):
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

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Task.loss``; nothing is drawn."""
        losses, scores, lengths = ctc_loss(forward, batch, tokens=self.num_classes)
        pairs = zip(greedy_decoded(scores, lengths), wanted_tokens(batch), strict=True)
        right = [float(found == wanted) for found, wanted in pairs]
        return losses.mean(), {"accuracy": torch.tensor(right).mean()}

    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """See ``Task.evaluate``; with ``token_error_rate`` besides."""
        return ctc_scores(forward, self.batches(split, batch_size=batch_size), tokens=self.num_classes)

    def batch_of(self, chosen: Tensor) -> Batch:
        """See ``IndexedTask.batch_of``."""
        context = {"lengths": self._lengths[chosen], "target_lengths": self._target_lengths[chosen]}
        return Batch(self._inputs[chosen], self._targets[chosen], MappingProxyType(context))


def _digest(made_of: str, targets: Tensor, tokens: Sequence[str], frames: int, splits: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr([made_of, tuple(tokens), frames]).encode())
    digest.update(targets.numpy().astype("<i8").tobytes())
    for split, indices in splits.items():
        digest.update(f"{split}:{len(indices)}".encode())
        digest.update(indices.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
