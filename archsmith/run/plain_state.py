"""Nested states as plain JSON and named tensors, so that checkpoints need no pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR, _ITEMS = "__tensor__", "__items__"


def split_state(state: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Return JSON values and the tensors that stood in a state, by names that begin with ``prefix``.

    Args:
        state: Dictionaries, lists, tuples, tensors, numbers, texts, None; the keys of dictionaries may be numbers.
        prefix: First part of the tensors' names.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {_TENSOR: path}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {key: plain(each, f"{path}/{key}") for key, each in value.items()}
            return {_ITEMS: [[key, plain(each, f"{path}/{key}")] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(each, f"{path}/{number}") for number, each in enumerate(value)]
        return value

    return plain(state, prefix), tensors


def joined_state(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that ``split_state`` took apart; tuples come back as lists."""
    if isinstance(plain, Mapping):
        if set(plain) == {_TENSOR}:
            return tensors[plain[_TENSOR]]
        if set(plain) == {_ITEMS}:
            return {key: joined_state(value, tensors) for key, value in plain[_ITEMS]}
        return {key: joined_state(value, tensors) for key, value in plain.items()}
    if isinstance(plain, list):
        return [joined_state(value, tensors) for value in plain]
    return plain
