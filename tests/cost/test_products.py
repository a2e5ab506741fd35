import pytest
import torch
from hand_units import Attention, Branches
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.cost.products import called, products


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        y, _ = self.attention(x, x, x)
        return self.linear(self.lstm(y)[0]) @ self.linear.weight


NETS = {
    "branches": (Branches, (2, 3, 8, 8)),
    "attention": (Attention, (2, 5, 6)),
    "mixed": (Mixed, (2, 5, 16)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 3, groups=2)),
        (2, 4, 9, 9),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_products_sum_to_the_counted_macs(name):
    make, shape = NETS[name]
    network = make()
    found, complete = products(network, torch.zeros(shape))
    assert complete
    assert sum(product.macs for product in found) == count(network, torch.zeros(shape)).macs
    for product in found:
        assert torch.tensor(product.sizes).prod() == product.macs


def test_weights_are_named_with_the_axes_of_outputs_and_inputs():
    found, _ = products(Mixed(), torch.zeros(2, 5, 16))
    named = [(p.weight, p.weight_axes) for p in found if p.weight.endswith("linear.weight")]
    assert named == [("linear.weight", (0, 1)), ("linear.weight", (1, 0))]  # once as x W^T, once as x W
    assert sum(not p.weight for p in found) == 2  # scores and mixing
    transposed = products(nn.ConvTranspose2d(4, 6, 3), torch.zeros(1, 4, 5, 5))[0][0]
    assert (transposed.weight, transposed.weight_axes) == ("weight", (1, 0))


def test_depthwise_convolutions_and_activations_are_told():
    found, _ = products(Branches(), torch.zeros(2, 3, 8, 8))
    assert [p.kind for p in found] == ["convolution", "depthwise", "convolution", "convolution", "product"]
    assert (found[0].read, found[0].written) == (3 * 64, 8 * 64)  # of one example


def test_a_function_of_a_weight_is_no_weight():
    class Scaled(nn.Linear):
        def forward(self, x):
            return x @ (2 * self.weight).t()

    assert products(Scaled(3, 4, bias=False), torch.zeros(1, 3))[0][0].weight == ""


def test_keyword_arguments_and_own_calls_keep_the_names():
    network = nn.Bilinear(2, 3, 4), nn.Linear(3, 2)
    module, inputs, own = called(network[1], {"input": torch.zeros(2, 3)})
    assert own(products(module, inputs)[0][0].weight) == "weight"
    module, inputs, own = called(network[1], torch.zeros(2, 3), lambda net, x: net(x) + net(x))
    assert [own(p.module) for p in products(module, inputs)[0]] == ["", ""]


def test_wrong_inputs_are_refused():
    with pytest.raises(UserError, match="inputs that the network's forward accepts"):
        products(nn.Linear(3, 2), torch.zeros(1, 4))
