"""A batch in parts: the same mathematics wherever the parts are computed; precision and devices."""

import copy
from types import MappingProxyType

import pytest
import torch
from mobile_samples import small_family
from torch import nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.supernet.depthwise import FastDepthwise, use_fast_depthwise_
from archsmith.tasks import open_task
from archsmith.tasks.augment import Augment
from archsmith.tasks.base import Batch
from archsmith.train.average import recalibrate
from archsmith.train.compute import Compute, part_of, resolve_device
from archsmith.train.loop import Diverged, LoopHooks, Position, train_epoch


@pytest.fixture(scope="module")
def task():
    task = open_task("digits", limit=16)
    task.augment = Augment(label_smoothing=0.1)
    return task


def network():
    family = small_family(num_classes=10, dropout=0.0)
    return family.build(family.largest(), seed=0)


def test_on_the_cpu_its_generator_alone_is_seeded(monkeypatch):
    def refuse(seed):
        raise AssertionError("no other device takes part")

    torch.manual_seed(11)
    expected = torch.rand(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    Compute().seed_(11)
    assert torch.rand(3).equal(expected)


def one_step(model, task, compute, rate=0.1, **hooks):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    position = Position()
    hooks = LoopHooks(rate=lambda step: rate, should_stop=lambda: True, **hooks)
    train_epoch(model, optimizer, task, position, hooks, batch_size=16, seed=3, compute=compute)
    return position


def test_the_gradient_and_the_statistics_are_means_over_the_parts(task):
    whole, start = network(), network()
    position = one_step(whole, task, Compute(micro_batches=2))
    batch = next(task.batches("train", batch_size=16, seed=seed_of(3, "order"), epoch=0))
    halves, losses = [], []
    for part in (slice(0, 8), slice(8, 16)):
        half = copy.deepcopy(start).train()
        loss, _ = task.loss(half, Batch(batch.inputs[part], batch.targets[part]), torch.Generator())
        loss.backward()
        halves.append(half)
        losses.append(loss.item())
    assert position.means()["loss"] == pytest.approx(sum(losses) / 2, abs=1e-6)
    named = dict(start.named_parameters())
    for name, value in whole.named_parameters():
        gradient = sum(dict(half.named_parameters())[name].grad for half in halves) / 2
        torch.testing.assert_close(value, named[name] - 0.1 * gradient, rtol=0, atol=1e-6, msg=name)
    for name, value in whole.named_buffers():
        mean = sum(dict(half.named_buffers())[name].double() for half in halves) / 2
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6, msg=name)
    together = network()
    one_step(together, task, Compute())
    assert (together.stem.norm.running_var - whole.stem.norm.running_var).abs().max() > 1e-6


def test_parts_draw_their_own_noise(task):
    family = small_family(num_classes=10, dropout=0.5)
    seen = []
    model = family.build(family.largest(), seed=0)
    model.dropout.register_forward_hook(lambda _, inputs, output: seen.append(output == 0))
    one_step(model, task, Compute(micro_batches=2))
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_a_part_whose_loss_is_no_number_stops_the_step(task):
    model, calls = network(), []

    def spoil(module, inputs, output):
        calls.append(len(inputs[0]))
        return output * float("nan") if len(calls) == 2 else output

    model.register_forward_hook(spoil)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(Diverged, match="the loss is nan at epoch 1, step 1"):
        one_step(model, task, Compute(micro_batches=2))
    assert calls == [8, 8]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_recalibration_averages_over_the_parts(task):
    inputs = [task.examples(32, "train")[:16], task.examples(32, "train")[16:]]
    model = recalibrate(network(), inputs, Compute(micro_batches=2))
    quarters = recalibrate(network(), [quarter for batch in inputs for quarter in batch.split(8)])
    for (name, one), (_, two) in zip(model.named_buffers(), quarters.named_buffers(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6, msg=name)


def test_a_part_of_a_batch_takes_its_share_of_the_context():
    context = MappingProxyType({"lengths": torch.arange(4), "table": torch.zeros(3), "name": "x"})
    batch = Batch(torch.arange(4.0), torch.arange(4), context)
    part = part_of(batch, slice(2, 4))
    assert part.inputs.tolist() == [2.0, 3.0]
    assert part.targets.tolist() == [2, 3]
    assert part.context["lengths"].tolist() == [2, 3]
    assert len(part.context["table"]) == 3
    assert part.context["name"] == "x"
    assert part_of(batch, slice(0, 4)) is batch


@pytest.mark.parametrize(("size", "parts"), [(15, 2), (2, 2), (6, 4)])
def test_batches_that_cannot_be_cut_are_refused(size, parts):
    Compute(micro_batches=parts).check_batch_size(4 * parts)
    with pytest.raises(UserError, match=rf"batch_size: got {size}; allowed: a multiple of {parts}, at least"):
        Compute(micro_batches=parts).check_batch_size(size)


# --------------------------------------------------------------------- precision


def test_bf16_computes_convolutions_in_bfloat16_and_keeps_everything_else_in_float32(task):
    model, seen = network(), {}
    use_fast_depthwise_(model)
    wide = [m for m in model.modules() if isinstance(m, FastDepthwise)]
    assert wide
    wide[0].register_forward_hook(lambda _, inputs, output: seen.update(depthwise=output.dtype))
    model.register_forward_hook(lambda _, inputs, output: seen.update(network=output.dtype))
    gradients = []
    one_step(
        model,
        task,
        Compute(precision="bf16"),
        after_backward=lambda: gradients.extend(p.grad.dtype for p in model.parameters()),
    )
    assert seen == {"depthwise": torch.bfloat16, "network": torch.bfloat16}
    assert set(gradients) == {torch.float32}
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    exact = network()
    one_step(exact, task, Compute())
    differences = [(a - b).abs().max().item() for a, b in zip(model.parameters(), exact.parameters(), strict=True)]
    assert 0 < max(differences) < 0.05


def test_the_training_forward_returns_float32_logits_under_bf16(task):
    model = network().train()
    assert Compute(precision="bf16").forward(model)(task.examples(4)).dtype == torch.float32
    assert Compute().forward(model) is model


# --------------------------------------------------------------------- devices


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("cpu") == resolve_device("auto") == "cpu"
    with pytest.raises(UserError, match=r"device: got cuda, but torch finds no CUDA device here; .*--device cpu"):
        resolve_device("cuda")
    with pytest.raises(UserError, match=r"device: got 'tpu'; allowed: auto, cpu, cuda"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [resolve_device(name) for name in ("cpu", "auto", "cuda")] == ["cpu", "cuda", "cuda"]


def test_inputs_go_where_the_network_is():
    model = nn.Linear(3, 2, device="meta")
    assert Compute(device=torch.device("meta")).evaluating(model)(torch.zeros(4, 3)).device.type == "meta"
