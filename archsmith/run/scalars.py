"""Curves for TensorBoard, where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from archsmith.core.errors import MissingExtra


class Scalars:
    """Writes named numbers per step into TensorBoard's event files; without TensorBoard it says so and does nothing.

    The curves are a view for people. The journal holds what counts, so a curve may lose its last seconds in a kill.

    Args:
        folder: Where the event files go, ``RUN/tensorboard`` in a run; made when missing.
        purge_step: First step that is going to be written when resuming; TensorBoard then hides what an interrupted
            attempt wrote from there on. None for a new run.
    """

    def __init__(self, folder: str | Path, *, purge_step: int | None = None) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            missing = MissingExtra("tensorboard", "tensorboard", "Drawing curves")
            warnings.warn(f"{missing} The run goes on without them.", stacklevel=2)
            return
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each named curve at ``step``; names with a common ``prefix/`` are shown together."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Bring everything added so far to the files."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
