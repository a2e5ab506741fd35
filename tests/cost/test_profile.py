"""Profiles: rows of modules and of ONNX kernels; times come from the test's own clock or are not looked at."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import TABLE_COLUMNS, profile, reference_inputs, reference_network
from archsmith.cost.reference import reference_onnx


class Slow(nn.Linear):
    """A layer that takes a given number of fake seconds."""

    now = 0.0

    def __init__(self, seconds):
        super().__init__(4, 4)
        self.seconds = seconds

    def forward(self, x):
        Slow.now += self.seconds
        return super().forward(x)


class Outer(nn.Module):
    """Two timed layers, one of them called twice, and time and work of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Slow(0.001), Slow(0.004)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        Slow.now += 0.010
        return self.second(self.second(self.first(x))) @ self.first.weight


def profiled(net):
    """Profile on fake time; the reference must take some of it, or no block of its calls would ever be long enough."""
    Slow.now = 0.0
    x = torch.zeros(3, 4)
    return profile(net, x, reference=(Slow(0.005), x), clock=lambda: Slow.now)


def test_module_rows_have_their_own_times_and_counts():
    net = Outer().train()
    result = profiled(net)
    rows = {row.name: (row.kind, row.macs, row.params, row.output_shape) for row in result.layers}
    assert rows == {
        "": ("Outer", 16, 0, (1, 4)),
        "first": ("Slow", 16, 20, (1, 4)),
        "second": ("Slow", 32, 20, (1, 4)),
        "unused": ("Linear", 0, 6, None),
    }
    times = {row.name: row.latency_ms for row in result.layers}
    assert times.pop("unused") is None
    assert times == pytest.approx({"": 10.0, "first": 1.0, "second": 8.0})
    assert result.latency.median_ms == pytest.approx(19.0)
    assert result.counts.macs == 64 and result.counts.convention == "standard"
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_table():
    rows = profiled(Outer()).to_table()
    assert all(len(row) == len(TABLE_COLUMNS) for row in rows)
    assert rows[0] == ("(network)", "Outer", "1x4", "0", "16", "10.000", "52.6")
    assert rows[2] == ("second", "Slow", "1x4", "20", "32", "8.000", "42.1")
    assert rows[3] == ("unused", "Linear", "", "6", "0", "", "")
    assert rows[4] == ("total", "", "", "46", "64", "19.000", "")


def test_layers_that_cost_nothing_are_left_out_of_the_table():
    net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    result = profile(net, torch.zeros(1, 2), block_ms=0.1)
    assert [row.name for row in result.layers] == ["0", "1"]
    free = replace(result, layers=tuple(replace(row, latency_ms=0.0) for row in result.layers))
    assert [row[0] for row in free.to_table()] == ["0", "total"]


def test_inputs_that_do_not_fit():
    with pytest.raises(UserError, match=r"with which Sequential fails"):
        profile(reference_network(), torch.zeros(1, 4, 64, 64))


def test_onnx_kernels_take_over_the_counts_of_the_nodes_behind_them(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    path.write_bytes(reference_onnx())
    result = profile(path, reference_inputs(), block_ms=0.1)
    module = profile(reference_network(), reference_inputs(), block_ms=0.1)
    # The blocked layout of some processors pads channels; counts must not see that, nor the fusion of activations.
    found = [(row.macs, row.params) for row in result.layers if row.macs]
    assert found == [(row.macs, row.params) for row in module.layers if row.macs]
    assert all(row.latency_ms is not None for row in result.layers)
    assert result.counts.macs == module.counts.macs == sum(row.macs for row in result.layers)
    assert result.latency.provenance.backend == "onnxruntime" and "fusions" in result.note
    assert list(tmp_path.iterdir()) == [path]
