"""A task over the user's own ``DataLoader`` objects.

The loaders keep their batch size, order, workers and transforms. What archsmith adds is that an epoch can be repeated:
while the loader works, its random streams are functions of seed, epoch and step.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import seed_of
from archsmith.tasks.augment import Augment
from archsmith.tasks.base import Batch, Forward, Task
from archsmith.tasks.bounds import whole
from archsmith.tasks.classification import classification_loss, classification_scores
from archsmith.tasks.loader_streams import announce_epoch, global_streams, has_state, repeatable, seed_generators

_RESUME_NOTE = (
    "the training loader resumes at epoch starts: its order depends on something that archsmith cannot seed; for exact "
    "resume use a torch sampler over a dataset with __getitem__, or a loader with state_dict"
)


@final
class LoaderTask(Task):
    """Image classification from a pair (train, valid) or a triple (train, valid, test) of loaders.

    Args:
        train: Yields ``(inputs, targets)``: float32 ``(B, C, H, W)`` and int64 ``(B,)``. Its last incomplete batch is
            left out.
        valid: Same; must not drop or repeat examples.
        test: Same; without it the task has no test part.
        num_classes: Number of classes; the targets are ``0..num_classes-1``.
        name: Name of the task.
        class_names: One name per class; the numbers when None.
        normalisation: ``{"mean": [...], "std": [...]}`` that the loaders already apply, recorded with the result; none
            (mean 0, deviation 1) when None.
        augment: What the training step does to a batch on top of the loader's transforms.
        digest: Identifies the data, to notice at resume that it is another; made from sizes and shapes when None, which
            cannot see a change of content.

    Resuming is exact when the order is the loader's own function of the seeds (torch's samplers over a dataset with
    ``__getitem__``, or a sampler with ``set_epoch``): the epoch is repeated up to the step. It is exact too when the
    training loader has ``state_dict`` and ``load_state_dict``, if the task's own ``state_dict`` is stored and given
    back. Otherwise ``resume_note`` says that it resumes at epoch starts.

    Raises:
        UserError: Something is not a loader, a loader yields something else, or drops examples.
    """

    metric = "accuracy"

    def __init__(
        self,
        train: Iterable[Any],
        valid: Iterable[Any],
        test: Iterable[Any] | None = None,
        *,
        num_classes: int,
        name: str = "loaders",
        class_names: Sequence[str] | None = None,
        normalisation: Mapping[str, Sequence[float]] | None = None,
        augment: Augment | None = None,
        digest: str | None = None,
    ) -> None:
        self.name = name
        self.num_classes = whole("num_classes", num_classes, low=2, high=10**7)
        self.class_names = tuple(class_names or (str(c) for c in range(num_classes)))
        if len(self.class_names) != num_classes:
            raise UserError("class_names", self.class_names, allowed=f"{num_classes} names, one per class")
        given = {"train": train, "valid": valid, "test": test}
        self._loaders = {split: _checked_loader(split, loader) for split, loader in given.items() if loader is not None}
        self.splits = tuple(self._loaders)
        self.input_shape = self._first_shape()
        self.augment = (augment or Augment()).fitting(*self.input_shape[1:])
        channels = self.input_shape[0]
        stated = normalisation or {"mean": [0.0] * channels, "std": [1.0] * channels}
        self.normalisation = {key: [float(v) for v in stated[key]] for key in ("mean", "std")}
        if any(len(v) != channels for v in self.normalisation.values()) or min(self.normalisation["std"]) <= 0:
            raise UserError("normalisation", stated, allowed=f"mean and positive std, {channels} numbers each")
        self._black = -torch.tensor(self.normalisation["mean"]) / torch.tensor(self.normalisation["std"])
        self._sizes: dict[str, int] = {}
        self._place: tuple[int, int] = (0, 0)
        self._restored: dict[str, Any] | None = None
        self.digest = digest or self._structure_digest()
        self.resume_note = "" if has_state(train) or repeatable(train) else _RESUME_NOTE

    def state_dict(self) -> dict[str, Any]:
        """Return where the training loader is, for loaders with ``state_dict``; an empty dictionary for others."""
        loader = self._loaders["train"]
        if not has_state(loader):
            return {}
        epoch, step = self._place
        return {"epoch": epoch, "step": step, "loader": cast(Any, loader).state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``batches("train")`` continue from ``state``, which ``state_dict`` returned.

        It must be called for the epoch and step where the state was taken, or for the start of the epoch after.
        """
        self._restored = dict(state) or None

    def size(self, split: str) -> int:
        """See ``Task.size``; a loader whose dataset has no length is counted by one pass."""
        if split not in self._sizes:
            loader = self._of(split)
            if (
                isinstance(loader, DataLoader)
                and loader.batch_size is not None
                and not isinstance(loader.dataset, IterableDataset)
            ):
                self._sizes[split] = len(cast(Any, loader.sampler))
            else:
                self._sizes[split] = sum(len(batch) for batch in self._whole_pass(split))
        return self._sizes[split]

    def steps_per_epoch(self, batch_size: int) -> int:
        """See ``Task.steps_per_epoch``; ``batch_size`` must be the loader's own where it states one.

        Raises:
            UserError: Another batch size than the loader's, or no complete batch.
        """
        whole("batch_size", batch_size, low=1, high=2**31)
        loader = self._loaders["train"]
        own = getattr(loader, "batch_size", None)
        if own is not None and batch_size != own:
            raise UserError("batch_size", batch_size, allowed=f"{own}, the batch size of the training loader")
        steps = self.size("train") // own if own is not None else len(cast(Any, loader))
        if steps == 0:
            raise UserError(
                "batch_size", batch_size, allowed=f"1 to {self.size('train')}, the size of the training part"
            )
        return steps

    def batches(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See ``Task.batches``; the loader's own batch size holds for valid and test."""
        self._of(split)
        whole("batch_size", batch_size, low=1, high=2**31)
        whole("start", start, low=0, high=self.steps_per_epoch(batch_size) if split == "train" else 2**31)
        if split != "train":
            return islice(self._whole_pass(split), start, None)
        steps = self.steps_per_epoch(batch_size)
        restored = self._restore(steps, epoch, start)
        return self._train_pass(steps, seed, epoch, start, first=start if restored else 0)

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Task.loss``."""
        return classification_loss(
            forward,
            batch,
            augment=self.augment,
            num_classes=self.num_classes,
            fill=self._black,
            generator=generator,
        )

    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """See ``Task.evaluate``; the loader's own batch size holds."""
        self._of(split)
        return classification_scores(forward, self._whole_pass(split), num_classes=self.num_classes)

    def examples(self, n: int, split: str = "test") -> Tensor:
        """See ``Task.examples``."""
        self._of(split)
        whole("n", n, low=1, high=self.size(split))
        found: list[Tensor] = []
        for batch in self._whole_pass(split):
            found.append(batch.inputs)
            if sum(map(len, found)) >= n:
                break
        return torch.cat(found)[:n]

    def _of(self, split: str) -> Iterable[Any]:
        if split not in self._loaders:
            hint = "give LoaderTask a third loader." if split == "test" else ""
            raise UserError("split", split, allowed=", ".join(self._loaders), hint=hint)
        return self._loaders[split]

    def _restore(self, steps: int, epoch: int, start: int) -> bool:
        """Bring a loader with ``state_dict`` to (epoch, start); return whether its next batch is ``start`` already."""
        loader: Any = self._loaders["train"]
        state, self._restored = self._restored, None
        if state is None:
            if has_state(loader) and not repeatable(loader) and (epoch, start) != (0, 0) and self._place == (0, 0):
                raise UserError(
                    "train loader",
                    Shown(f"epoch {epoch}, step {start} of a loader that is at its beginning"),
                    allowed="continuing from a stored state",
                    hint="store task.state_dict() with the checkpoint and give it to task.load_state_dict.",
                )
            return False
        place = (state["epoch"], state["step"])
        if place != (epoch, start) and not (place == (epoch - 1, steps) and start == 0):
            at = f"epoch {place[0]}, step {place[1]}, where the state was taken"
            raise UserError("start", Shown(f"epoch {epoch}, step {start}"), allowed=at)
        loader.load_state_dict(state["loader"])
        if place != (epoch, start):
            deque(iter(loader), maxlen=0)  # what is left of the epoch before: an incomplete batch
        return start > 0

    def _train_pass(self, steps: int, seed: int, epoch: int, start: int, *, first: int) -> Iterator[Batch]:
        """Yield the steps from ``start``; ``first`` is the step that the loader gives next."""
        loader: Any = self._loaders["train"]
        if first == 0:
            announce_epoch(loader, epoch)
            seed_generators(loader, seed_of(seed, "loader", epoch))
        with global_streams(seed_of(seed, "loader", epoch, "begin")):
            iterator = iter(loader)
        for step in range(first, steps):
            with global_streams(seed_of(seed, "loader", epoch, step)):
                raw = next(iterator, None)
            if raw is None:
                raise UserError(
                    "train loader", Shown(f"{step} batches"), allowed=f"{steps} batches, as its length says"
                )
            if step >= start:
                self._place = (epoch, step + 1)
                yield self._batch("train", raw)

    def _whole_pass(self, split: str) -> Iterator[Batch]:
        """Yield all batches of a loader, with the same randomness every time."""
        loader = self._loaders[split]
        seed_generators(loader, seed_of(0, "loader", split))
        with global_streams(seed_of(0, "loader", split, "begin")):
            iterator = iter(loader)
        step = 0
        while True:
            with global_streams(seed_of(0, "loader", split, step)):
                raw = next(iterator, None)
            if raw is None:
                return
            yield self._batch(split, raw)
            step += 1

    def _batch(self, split: str, raw: Any) -> Batch:
        inputs, targets = _pair(split, raw)
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise UserError(
                f"{split} loader", Shown(f"inputs of shape {tuple(inputs.shape[1:])}"), allowed=f"{self.input_shape}"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"{split} loader", Shown(f"targets from {low} to {high}"), allowed=f"0 to {self.num_classes - 1}"
            )
        return Batch(inputs, targets)

    def _first_shape(self) -> tuple[int, int, int]:
        with global_streams(0):
            raw = next(iter(self._loaders["valid"]), None)
        if raw is None:
            raise UserError("valid loader", Shown("no batch"), allowed="at least one batch")
        channels, height, width = _pair("valid", raw)[0].shape[1:]
        return channels, height, width

    def _structure_digest(self) -> str:
        sizes = {split: len(cast(Any, loader)) for split, loader in self._loaders.items()}
        facts = (self.name, self.input_shape, self.class_names, self.normalisation, sizes)
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _checked_loader(split: str, loader: Any) -> Iterable[Any]:
    if not hasattr(loader, "__iter__") or not hasattr(loader, "__len__"):
        raise UserError(
            f"{split} loader", Shown(type(loader).__name__), allowed="a DataLoader, or another iterable with a length"
        )
    if split != "train" and getattr(loader, "drop_last", False):
        raise UserError(f"{split} loader", Shown("drop_last=True"), allowed="drop_last=False: every example counts")
    return cast(Iterable[Any], loader)


def _pair(split: str, raw: Any) -> tuple[Tensor, Tensor]:
    pair = (raw.inputs, raw.targets) if isinstance(raw, Batch) else raw
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(p, Tensor) for p in pair):
        raise UserError(
            f"{split} loader", Shown(f"batches of type {type(raw).__name__}"), allowed="pairs (inputs, targets)"
        )
    inputs, targets = pair
    if inputs.dtype != torch.float32 or inputs.ndim != 4 or targets.dtype != torch.int64 or targets.ndim != 1:
        raise UserError(
            f"{split} loader",
            Shown(f"inputs {inputs.dtype} {tuple(inputs.shape)}, targets {targets.dtype} {tuple(targets.shape)}"),
            allowed="inputs torch.float32 (B, C, H, W), targets torch.int64 (B,)",
        )
    return inputs, targets
