"""What a cut keeps of a tensor equals plain indexing, in memory of its own and in the layout of a new tensor."""

import numpy as np
import pytest
import torch

from archsmith.atoms import slices
from archsmith.atoms.slices import in_layout_of, kept, take
from archsmith.atoms.units import TensorCut

SCATTERED, RUN, REPEATED, TURNED = [0, 2, 3, 7, 9], [4, 5, 6], [0, 0, 1, 2, 2], [5, 3, 4]


def plain(tensor, axes):
    for axis, index in axes.items():
        tensor = tensor[(slice(None),) * axis + (torch.tensor(index),)]
    return tensor


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "axes",
    [
        {0: SCATTERED},
        {1: SCATTERED},
        {0: SCATTERED, 1: [1, 2, 5]},
        {1: SCATTERED, 2: [0, 2]},
        {0: SCATTERED, 1: [1, 5], 2: [0, 2]},
        {0: RUN},
        {0: RUN, 1: SCATTERED},
        {0: SCATTERED, 1: RUN},
        {0: RUN, 1: RUN},
        {0: REPEATED, 1: REPEATED},
        {0: TURNED, 1: TURNED},
        {0: TURNED},
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last"])
def test_slices_equal_plain_indexing(axes, layout, large, monkeypatch):
    if large:  # as large tensors are treated: blocks of two rows
        monkeypatch.setattr(slices, "LARGE", 1)
        monkeypatch.setattr(slices, "BLOCK", 2 * 11 * 3 * 4 * 4)
    tensor = torch.randn(10, 11, 3, 4)
    if layout == "transposed":
        tensor = torch.randn(11, 10, 3, 4).transpose(0, 1)
    elif layout == "channels last":
        tensor = tensor.to(memory_format=torch.channels_last)
    before = tensor.clone()
    found = take(tensor, TensorCut({axis: np.array(index) for axis, index in axes.items()}))
    wanted = plain(tensor, axes)
    assert torch.equal(found, wanted) and torch.equal(tensor, before)
    assert torch.equal(kept(tensor, {axis: torch.tensor(index) for axis, index in axes.items()}), wanted)
    new = torch.empty(wanted.shape)
    assert found.stride() == (new.to(memory_format=torch.channels_last) if layout == "channels last" else new).stride()
    assert found.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    assert found.untyped_storage().nbytes() == 4 * found.numel()


def test_arrays_that_several_tensors_share_are_looked_at_once():
    index, known = np.array([1, 3, 4]), {}
    for tensor in (torch.randn(6), torch.randn(6, 2)):
        assert torch.equal(take(tensor, TensorCut({0: index}), known), tensor[[1, 3, 4]])
    assert len(known) == 1


def test_a_slice_that_is_everything_has_its_own_memory():
    tensor = torch.randn(4, 3)
    for found in (take(tensor, TensorCut({0: np.arange(4)})), in_layout_of(tensor, tensor)):
        found.zero_()
        assert tensor.abs().sum() > 0


def test_large_pages_are_advice_only():
    tensor = slices.empty((1024, 1100), torch.zeros(1))
    assert tensor.fill_(2).sum() == 2 * tensor.numel() and tensor.data_ptr() % 64 == 0
