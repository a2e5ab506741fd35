"""One decision for all processes of a user's own distributed loop: the first one makes it, the others take it over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import distributed

T = TypeVar("T")


def from_first_rank(make: Callable[[], T]) -> T:
    """Return ``make()`` of rank 0; elsewhere ``make`` is not called. Without a process group it is just ``make()``.

    For loops under plain ``torch.distributed``; archsmith's own loop has ``Workers.from_main``, which also carries
    failures. With NCCL the current CUDA device must be set, as ``torch.cuda.set_device`` does.

    Args:
        make: Returns something that pickles; every rank must call at the same place.

    Raises:
        RuntimeError: ``make`` failed on rank 0 (there its own exception is raised), so that no rank waits for ever.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return make()
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    sent: list[Any] = [None, ""]
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            sent = [make(), ""]
        except Exception as error:
            failure, sent = error, [None, f"{type(error).__name__}: {error}"]
    distributed.broadcast_object_list(sent, src=0, device=device)
    if failure is not None:
        raise failure
    if sent[1]:
        raise RuntimeError(f"rank 0 failed: {sent[1]}")
    return cast(T, sent[0])
