"""What channels and key-value heads contribute: published values, and what the scores mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archsmith.atoms.contribution import IterativePruning, channel_contribution, head_contribution, removal_schedule
from archsmith.core.errors import UserError

CASES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "puzzle_slots.json").read_text())["cases"]


def fill(seed: float, *shape: int) -> Tensor:
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * i + 0.013 * i * i + seed).reshape(shape)


def test_channel_scores_of_two_batches_are_the_published_ones() -> None:
    weight = fill(1, 4, 6)
    scores = sum(channel_contribution(fill(k, 2, 3, 6), weight) for k in (2, 3))
    expected = torch.tensor(CASES["channel_contribution_A"]["expected"]["score_sum_over_batches"], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["iterative_channel_pruning_A", "iterative_channel_pruning_A_scaled"])
def test_channels_go_in_the_published_order(case: str) -> None:
    pruning = IterativePruning(fill(1, 4, 6), 3, scale_by_magnitude=case.endswith("scaled"))
    for k in (2, 3, 4):
        pruning.update(fill(k, 2, 3, 6))
    assert pruning.removed == CASES[case]["expected"]["removed_first_to_last"]
    assert pruning.ranks().argsort().tolist() == pruning.removed
    with pytest.raises(UserError, match="batches: got 4; allowed: the 3 that were announced"):
        pruning.update(fill(5, 2, 3, 6))


def test_schedules_are_the_published_ones() -> None:
    case = CASES["pruning_schedule"]
    assert [removal_schedule(*pair) for pair in case["input"]["pairs"]] == case["expected"]
    with pytest.raises(UserError, match=r"channels, calls: got \(3, 0\)"):
        removal_schedule(3, 0)


@pytest.mark.parametrize(("channels", "calls"), [(c, t) for c in (0, 1, 5, 16) for t in (1, 3, 7)])
def test_every_schedule_removes_all_channels(channels: int, calls: int) -> None:
    schedule = removal_schedule(channels, calls)
    assert len(schedule) == calls
    assert sum(schedule) == channels


def test_the_first_removal_costs_what_the_output_changes_by() -> None:
    """With nothing removed yet, a channel's cost is the mean norm of its own share of the output."""
    weight, x = fill(1, 4, 6), fill(2, 5, 6)
    pruning = IterativePruning(weight, 6)
    pruning.update(x)
    change = torch.stack([(x[:, i : i + 1] * weight[:, i]).norm(dim=1).mean() for i in range(6)])
    assert pruning.removed == [int(change.argmin())]


def test_a_silent_head_contributes_nothing_and_the_shares_are_norms() -> None:
    weight, x = fill(1, 5, 12), fill(2, 3, 4, 12)
    x[..., 4:8] = 0
    scores = head_contribution(x, weight, 3)
    assert scores[1] == 0
    torch.testing.assert_close(scores[2], (x[..., 8:] @ weight[:, 8:].T).norm(dim=-1).mean())
