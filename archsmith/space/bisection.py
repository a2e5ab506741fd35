"""Restructuring a tree of decisions: each choice among many becomes a few binary questions.

Values next to each other then share a part of the way down, and with it the statistics that tree search keeps there.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792 (tree restructuring by bisection).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.deciders import Decide, Mask
from archsmith.space.options import Interval, Options
from archsmith.space.values import Value

HALVES = (0, 1)
"""Options of a binary question: the lower half [low, middle), the upper half [middle, high)."""


@dataclass(frozen=True)
class Bisected:
    """Answers a question by binary ones put to ``decide``: interval [low, high), middle = floor((low + high) / 2).

    The binary questions have the path ``<path>?<low>-<high>``, positions counted among the allowed options. A single
    allowed option is taken without a question.

    Args:
        decide: Answers the binary questions with 0 (lower half) or 1.
    """

    decide: Decide

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return the option that is left.

        Raises:
            UserError: The options are an interval of real numbers.
        """
        allowed = allowed_indices(path, options, mask)
        low, high = 0, len(allowed)
        while high - low > 1:
            middle = (low + high) // 2
            if self.decide(f"{path}?{low}-{high}", HALVES, None, group):
                low = middle
            else:
                high = middle
        assert not isinstance(options, Interval)
        return options[allowed[low]]


def bisection_code(index: int, count: int) -> str:
    """Return the answers that lead to option ``index`` of ``count``: "110" for 3 of 5."""
    code, low, high = "", 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high, code = (middle, high, f"{code}1") if index >= middle else (low, middle, f"{code}0")
    return code


def allowed_indices(path: str, options: Options, mask: Mask) -> list[int]:
    """Return the positions of the allowed options.

    Raises:
        UserError: The options are an interval of real numbers, which a tree of decisions cannot list.
    """
    if isinstance(options, Interval):
        raise UserError(
            "space", path, allowed="decisions with finitely many options", hint="List the values of this dimension."
        )
    return list(range(len(options))) if mask is None else [int(i) for i in np.flatnonzero(mask)]
