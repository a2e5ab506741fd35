import pytest
import torch
from mobile_samples import built, images, small_family
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.train.layout import use_memory_format_


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_values_and_identities_stay(memory_format):
    network = built(small_family())
    before = {n: (id(t), t.detach().clone()) for n, t in tensors_of(network).items()}
    use_memory_format_(network, memory_format)
    for name, tensor in tensors_of(network).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
        if tensor.dim() == 4:
            assert tensor.stride() == torch.empty(tensor.shape).to(memory_format=memory_format).stride() or 1 in (
                tensor.shape
            )
            assert tensor.is_contiguous(memory_format=memory_format)


def test_strides_do_not_depend_on_where_the_tensor_came_from():
    """Where an axis has length one both formats hold the same bytes, and torch's own conversion keeps old strides."""
    shape = (4, 1, 3, 3)
    plain, sliced = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
    wide = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    sliced.weight.data = wide[:, :1]
    for conv in (plain, sliced):
        use_memory_format_(conv, torch.channels_last)
        assert conv.weight.shape == shape
    assert plain.weight.stride() == sliced.weight.stride() == (9, 1, 3, 1)
    use_memory_format_(sliced, torch.contiguous_format)
    assert sliced.weight.stride() == (9, 9, 3, 1)


def test_the_format_does_not_change_the_function():
    family = small_family()
    network = built(family, dtype=torch.float64).eval()
    x = images(family, 3, dtype=torch.float64)
    before = network(x)
    use_memory_format_(network, torch.channels_last)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), before, rtol=0, atol=1e-12)
