"""The capability page is true as far as a machine can tell: what it names exists, and no row is left open."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "capabilities.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(archsmith(?:\.\w+)+)`", PAGE)))
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| capability")
]

SURVEY = {
    "layer-wise", "cell-based", "hierarchical / factorised", "hyper-parameters of a given network",
    "non-CNN macro-architectures", "restriction", "hardware space",
    "random, grid, exhaustive on tables", "evolutionary", "reinforcement learning", "gradient-based",
    "Bayesian optimisation", "supernet, then search",
    "early stopping, learning curves, successive halving", "proxy task with its rank correlation",
    "hot start, warm start", "weight sharing, batch norm recalibration", "accuracy predictors, zero-cost scores",
    "parallel and asynchronous evaluation, caching",
    "real measurement", "look-up table", "analytical", "learned predictor", "metrics",
    "bit-width choice", "pruning ratio",
    "Pareto front, hypervolume", "violation rate", "search cost, seeds", "cost-model error on held-out architectures",
}  # fmt: skip
"""Rows of the survey's table of capabilities, in its order."""


def imported(name: str) -> object:
    """Return the module, or the attribute of a module, that a dotted name says."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_page_names_exists(name: str) -> None:
    assert imported(name) is not None


def test_every_row_names_a_module_or_says_not_yet() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        assert len(row) == 4, row
        assert "`archsmith." in row[1] or "**not yet**" in row[3], row


def test_no_row_of_the_survey_is_missing() -> None:
    assert {row[0] for row in ROWS} >= SURVEY


def test_attributes_that_the_page_mentions_exist() -> None:
    """Bare names in backticks are attributes of a module in the same row."""
    for row in ROWS:
        modules = [imported(name) for name in re.findall(r"`(archsmith(?:\.\w+)+)`", " ".join(row))]
        for bare in re.findall(r"`(\w+(?:\.\w+)?)`", " ".join(row)):
            first, _, second = bare.partition(".")
            if first == "archsmith":
                continue
            owners = [getattr(module, first) for module in modules if hasattr(module, first)]
            assert owners, f"{bare} is in no module of the row {row[0]!r}"
            assert not second or any(hasattr(owner, second) for owner in owners), bare
