import itertools
import json
import math

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable, Row, measure_table


class Ticks:
    """A clock that blocks move while they run, by their own time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-7
        return self.now


class Takes(nn.Module):
    """A block that takes a known time."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.shapes = clock, seconds, []

    def forward(self, x):
        self.clock.now += self.seconds
        self.shapes.append(tuple(x.shape))
        return x


def test_every_block_is_measured_alone_at_its_shape():
    clock = Ticks()
    parts = {
        "a": (Takes(clock, 0.002), (1, 3, 4, 4)),
        "b": (Takes(clock, 0.004), (1, 3, 4, 4)),
        "c": (Takes(clock, 0.001), (1, 8)),
    }
    table = measure_table(parts, clock=clock, block_ms=1e-6)
    assert list(table.rows) == ["a", "b", "c"]
    assert [table.row(key).mean for key in parts] == pytest.approx([2.0, 4.0, 1.0], abs=0.05)
    assert all(row.count == 20 and row.std < 0.1 for row in table.rows.values())
    assert 0 <= table.overhead < 0.05
    assert table.cost(["a", "a", "c"]) == pytest.approx(5.0 + table.overhead, abs=0.1)
    assert all(set(module.shapes) == {shape} for module, shape in parts.values())
    assert f"torch {torch.__version__}" in table.device and table.unit == "ms"


def test_a_busy_machine_only_adds():
    """Every third call of a block takes ten times as long; its row is what it takes alone."""
    clock = Ticks()

    class Disturbed(Takes):
        def forward(self, x):
            self.clock.now += 9 * self.seconds if len(self.shapes) % 3 else 0.0
            return super().forward(x)

    table = measure_table({"a": (Disturbed(clock, 0.002), (1, 2))}, clock=clock, block_ms=1e-6)
    assert table.row("a").mean == pytest.approx(2.0, abs=0.05) and table.row("a").std > 5


def test_what_takes_no_longer_than_nothing_costs_nothing():
    table = measure_table({"identity": (nn.Identity(), (1, 2))}, clock=Ticks(), block_ms=1e-6)
    assert 0 <= table.row("identity").mean < 0.01


def test_a_table_survives_json():
    rows = {"a": Row(1.5, 0.25, 12), "b": Row(0.0)}
    table = LookupTable(rows, device="here", unit="us", scale=1.25, overhead=-0.5)
    again = LookupTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again.rows["a"] == rows["a"] and math.isnan(again.rows["b"].std)
    for keys in itertools.product("ab", repeat=2):
        assert again.cost(keys) == table.cost(keys)
    assert (again.device, again.unit, again.scale, again.overhead) == ("here", "us", 1.25, -0.5)


def test_no_parts():
    with pytest.raises(UserError, match=r"parts: got \{\}; allowed: at least one block"):
        measure_table({})


def test_blocks_are_measured_in_the_runtime_that_is_asked_for():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    parts = {
        "small": (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), (1, 8, 8, 8)),
        "large": (nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()), (1, 64, 32, 32)),
    }
    table = measure_table(parts, backend="onnxruntime", rounds=10, block_ms=0.2, warmup=1)
    assert "onnxruntime" in table.device and "torch" not in table.device
    assert table.row("large").mean > table.row("small").mean >= 0  # four hundred times the work
    assert table.overhead > 0
