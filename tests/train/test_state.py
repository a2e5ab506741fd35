import pytest
import torch
from mobile_samples import images, small_family
from torch import nn

from archsmith.train.layout import use_memory_format_
from archsmith.train.optim import RMSprop, decay_groups
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

MAKERS = {
    "rmsprop": lambda groups: RMSprop(groups, 0.02),
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, amsgrad=True),
}


def network_and_optimizer(name, seed=0):
    family = small_family(dropout=0.0)
    network = family.build(family.largest(), seed=seed)
    use_memory_format_(network, torch.channels_last)
    return family, network, MAKERS[name](decay_groups(network, 1e-2))


def steps(family, network, optimizer, first, last):
    for step in range(first, last):
        x = images(family, 4, seed=step).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_optimiser_goes_on_bit_for_bit(name):
    family, network, optimizer = network_and_optimizer(name)
    steps(family, network, optimizer, 0, 3)
    saved = {key: value.contiguous().clone() for key, value in optimizer_tensors(optimizer, network).items()}
    _, other, loaded = network_and_optimizer(name, seed=1)
    steps(family, other, loaded, 5, 6)  # what it had is dropped
    other.load_state_dict(network.state_dict())
    load_optimizer_tensors(loaded, other, {"network.x": torch.zeros(1), **saved})
    assert set(optimizer_tensors(loaded, other)) == set(saved)
    for (key, mine), (_, theirs) in zip(
        optimizer_tensors(loaded, other).items(), optimizer_tensors(optimizer, network).items(), strict=True
    ):
        assert torch.equal(mine, theirs), key
        if name != "sgd":  # whose buffer is a copy of the first gradient, strides included
            assert mine.stride() == theirs.stride(), key
    steps(family, network, optimizer, 3, 6)
    steps(family, other, loaded, 3, 6)
    for (key, mine), (_, theirs) in zip(other.state_dict().items(), network.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), key


def test_names_say_parameter_and_key():
    family, network, optimizer = network_and_optimizer("sgd")
    assert optimizer_tensors(optimizer, network) == {}
    steps(family, network, optimizer, 0, 1)
    assert set(optimizer_tensors(optimizer, network)) == {
        f"optimizer.{name}::momentum_buffer" for name, _ in network.named_parameters()
    }


def test_loaded_state_does_not_share_memory():
    family, network, optimizer = network_and_optimizer("rmsprop")
    steps(family, network, optimizer, 0, 1)
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, network).items()}
    load_optimizer_tensors(optimizer, network, saved)
    before = {key: value.clone() for key, value in saved.items()}
    steps(family, network, optimizer, 1, 2)
    assert all(torch.equal(value, before[key]) for key, value in saved.items())


def test_other_values_than_tensors_are_refused():
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    optimizer.state[layer.weight]["count"] = 3
    with pytest.raises(TypeError, match="optimiser state 'count' of 'weight' is a int, not a tensor"):
        optimizer_tensors(optimizer, layer)
