import copy

import pytest
import torch
from mobile_samples import built, fact, images, small_family
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.train.average import MovingAverage, averaged, recalibrate, rescaled_decay


def test_the_published_warm_up():
    given, expected = fact("ema_warmup")
    model = nn.Module()
    model.w = nn.Parameter(torch.full((2,), given["start"], dtype=torch.float64))
    average = MovingAverage(model, given["momentum"])
    for value, shadow in zip(given["values"], expected, strict=True):
        model.w.data.fill_(value)
        average.update(model)
        assert average.tensors["w"].tolist() == pytest.approx([shadow] * 2, abs=1e-12)
    assert average.steps == len(expected)


def test_the_decay_bounds_the_warm_up():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average, shadow = MovingAverage(model, 0.4), 0.0
    for step in range(1, 12):
        model.w.data.fill_(step)
        average.update(model)
        decay = min(0.4, (1 + step) / (10 + step))
        shadow = decay * shadow + (1 - decay) * step
        assert average.tensors["w"].item() == pytest.approx(shadow, abs=1e-12)


def test_the_decay_for_another_batch_size():
    given, expected = fact("ema_momentum_rescaled")
    assert rescaled_decay(given["momentum"], given["batch"]) == pytest.approx(expected, abs=1e-15)
    assert rescaled_decay(0.9, 64, 64) == 0.9


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match=rf"decay: got {decay}; allowed: a number in \[0, 1\)"):
        MovingAverage(nn.Linear(1, 1), decay)


def test_parameters_and_running_statistics_are_averaged_counters_are_not():
    family = small_family()
    network = built(family)
    names = set(averaged(network))
    assert "stem.norm.running_var" in names and "blocks.1.branches.k3.norm.weight" in names
    assert names == {n for n, t in tensors_of(network).items() if t.is_floating_point()}
    average = MovingAverage(network, 0.5)
    assert all(average.tensors[n].data_ptr() != t.data_ptr() for n, t in averaged(network).items())
    network.train()(images(family))
    start = average.tensors["stem.norm.running_mean"].clone()
    average.update(network)
    decay = 2 / 11
    expected = decay * start + (1 - decay) * network.stem.norm.running_mean
    torch.testing.assert_close(average.tensors["stem.norm.running_mean"], expected)
    assert not any(t.requires_grad for t in average.tensors.values())


def test_what_is_averaged_has_the_names_and_the_order_that_torch_lists():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    model.again = model[1]  # a module twice
    model.tied = nn.Module()
    model.tied.weight = model[0].weight  # a tensor twice
    model.tied.register_buffer("absent", None)
    model.gone = None
    listed = dict(model.named_parameters())
    listed |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    found = averaged(model)
    assert list(found) == list(listed) and "2.running_mean" in found
    assert all(found[name] is tensor for name, tensor in listed.items())


def test_an_averaged_copy_leaves_the_model_alone():
    family = small_family()
    network, other = built(family, 1), built(family, 2)
    average = MovingAverage(other, 0.9)
    network.train()(images(family)).sum().backward()
    before = {n: t.detach().clone() for n, t in tensors_of(network).items()}
    twin = average.averaged_copy(network)
    for name, tensor in tensors_of(twin).items():
        source = average.tensors if name in average.tensors else before
        assert torch.equal(tensor, source[name]), name
        assert tensor.data_ptr() != tensors_of(network)[name].data_ptr()
    assert all(p.grad is None for p in twin.parameters())
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(network).items())
    assert all(p.grad is not None for p in network.parameters())


def test_recalibrated_statistics_are_plain_means_over_the_batches():
    family = small_family(dropout=0.5)
    network = built(family, dtype=torch.float64).train()
    weights = {n: p.detach().clone() for n, p in network.named_parameters()}
    batches = [images(family, 4, seed=s, dtype=torch.float64) for s in range(3)]
    literal = copy.deepcopy(network).train()
    literal.dropout.eval()
    norms = {n: m for n, m in literal.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append((inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))))
        )
    with torch.no_grad():
        for batch in batches:
            literal(batch)
    assert recalibrate(network, batches) is network
    for name, statistics in seen.items():
        norm = network.get_submodule(name)
        means, variances = (torch.stack(values).mean(0) for values in zip(*statistics, strict=True))
        torch.testing.assert_close(norm.running_mean, means, rtol=0, atol=1e-10)
        torch.testing.assert_close(norm.running_var, variances, rtol=0, atol=1e-10)
        assert norm.momentum == 0.1
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in network.named_parameters())


def test_recalibration_needs_a_batch():
    network = built(small_family())
    with pytest.raises(ValueError, match="recalibrate needs at least one batch of inputs, got none"):
        recalibrate(network, [])
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_norms_without_running_statistics_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    recalibrate(model, [torch.randn(5, 2)])
    assert model[0].running_mean is None
    assert model[1].num_batches_tracked == 1
