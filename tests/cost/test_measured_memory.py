from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import peak_activation_bytes
from archsmith.cost.energy import NotAvailable
from archsmith.cost.measured_memory import PeakMemory, measured_peak, resident_peak


class Chain(nn.Module):
    """Three element-wise steps: two results are alive at once."""

    def forward(self, x):
        return ((x + 1) * 2).exp()


def test_the_allocator_agrees_with_liveness_where_kernels_need_no_scratch():
    x = torch.zeros(1, 1000, 64)
    size = x.numel() * 4
    found = measured_peak(Chain(), x)
    assert found.source == "allocator"
    # The input lived before and is not counted; liveness counts it.
    assert peak_activation_bytes(Chain(), x) == 2 * size <= found.bytes <= 2 * size + 64  # numbers made tensors


def test_scratch_of_convolutions_is_measured_and_weights_are_not():
    network = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()).eval()
    x = torch.zeros(1, 8, 32, 32)
    found = measured_peak(network, x).bytes
    assert found >= 2 * 16 * 32 * 32 * 4
    assert measured_peak(network, torch.zeros(4, 8, 32, 32)).bytes >= 2 * 4 * 16 * 32 * 32 * 4


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: got 'cuda'"):
        measured_peak(Chain(), torch.zeros(1), device="cuda")


def test_resident_memory_rises_with_what_is_touched():
    found = resident_peak(lambda: torch.ones(32 << 20, dtype=torch.uint8).sum())
    if isinstance(found, NotAvailable):
        pytest.skip(str(found))
    assert isinstance(found, PeakMemory)
    assert found.bytes >= 24 << 20


def test_a_system_that_does_not_tell_is_not_available():
    found = resident_peak(lambda: None, process=Path("/nowhere"))
    assert isinstance(found, NotAvailable) and "does not tell" in found.reason
