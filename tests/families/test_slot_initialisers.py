"""How cheaper attention and FFNs begin: published values and identities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from slot_nets import batch_for, family_of, layer_call, run_layer
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.families.slot_initialisers import (
    kept_groups,
    linear_from_attention,
    linear_from_ffn,
    pool_heads,
    rows_of_heads,
)

CASES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "puzzle_slots.json").read_text())["cases"]


def fill(seed: float, *shape: int) -> Tensor:
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.7 * i + 0.013 * i * i + seed).reshape(shape)


def test_pooled_heads_are_the_published_means() -> None:
    expected = torch.tensor(CASES["kv_mean_pool"]["expected"], dtype=torch.float64)
    torch.testing.assert_close(pool_heads(fill(1, 8, 6), 4, 2), expected, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match=r"kv_heads: got 3; allowed: a divisor of the 4 heads there are: \[1, 2, 4\]"):
        pool_heads(fill(1, 8, 6), 4, 3)


def test_linear_from_attention_has_the_published_values() -> None:
    expected = CASES["linear_from_attention"]["expected"]
    weight, bias = linear_from_attention(fill(1, 4, 8), fill(2, 8, 8), heads=4, kv_heads=2)
    assert bias is None
    assert weight.sum().item() == pytest.approx(expected["sum"], abs=1e-10)
    assert weight.square().sum().item() == pytest.approx(expected["sum_sq"], abs=1e-10)
    assert weight[0, :3].tolist() == pytest.approx(expected["row0_first3"], abs=1e-10)


def test_linear_from_ffn_has_the_published_values() -> None:
    expected = torch.tensor(CASES["linear_from_ffn"]["expected"], dtype=torch.float64)
    weight, _ = linear_from_ffn(fill(1, 5, 3), fill(2, 3, 5))
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


def test_biases_pass_through_the_outer_matrix() -> None:
    up, down, b_up, b_down = fill(1, 5, 3), fill(2, 3, 5), fill(3, 5), fill(4, 3)
    weight, bias = linear_from_ffn(up, down, b_up=b_up, b_down=b_down)
    x = fill(5, 7, 3)
    assert bias is not None
    torch.testing.assert_close(x @ weight.T + bias, (x @ up.T + b_up) @ down.T + b_down)


def test_kept_heads_lead_the_groups_that_lost_theirs() -> None:
    kept, order = kept_groups(torch.tensor([0.1, 5.0, 0.3, 4.0]), 2)
    assert kept == [1, 3]
    assert order == [1, 0, 3, 2]
    assert rows_of_heads([2, 0], 3).tolist() == [6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_pruned_heads_equal_the_parent_with_their_groups_masked(name: str) -> None:
    family, batch = family_of(name, kv_initialiser="prune"), batch_for(name)
    family.collect_statistics([batch])
    scores = family.statistics["layer1.attention"]["kv_heads"]
    assert scores.shape == (4,)
    gone = set(scores.argsort()[:2].tolist())
    call = layer_call(family, 1, batch)
    columns = [c for c in range(16) if c // 4 in gone]

    def mask(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_fill(-1, torch.tensor(columns), 0.0),)

    output = family.site(1, "attention").role("output")
    handle = output.register_forward_pre_hook(mask)
    expected = run_layer(family.layer(1), call)
    handle.remove()
    found = run_layer(family.variant_layer(1, {"attention": "kv2"}), call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_pruning_heads_needs_a_calibration_pass() -> None:
    with pytest.raises(UserError, match=r"kv_initialiser='prune'.*collect_statistics"):
        family_of("llama", kv_initialiser="prune").variant_layer(0, {"attention": "kv2"})
