"""Running networks in double precision throughout, whatever casts their code asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})


def widened(value: Any) -> Any:
    """Return a tensor or type of narrow floating numbers as doubles; everything else as it is."""
    if isinstance(value, Tensor) and value.dtype in NARROW:
        return value.double()
    return torch.float64 if value in NARROW and isinstance(value, torch.dtype) else value


class _InDouble(TorchDispatchMode):
    """Replaces narrow floating types in arguments and results of every operator."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if str(function).startswith("aten._assert_tensor_metadata"):
            return None  # the types that were traced
        return tree_map(widened, function(*tree_map(widened, args), **tree_map(widened, dict(kwargs or {}))))


@contextmanager
def in_double() -> Iterator[None]:
    """Compute everything inside in float64: casts to narrower types are ignored, factories make doubles.

    For tensors that are doubles to begin with. It lets code that casts on purpose (a normalisation in float32) be
    compared to more digits than it has.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)
