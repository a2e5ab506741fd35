import math

import pytest
import torch
from mobile_samples import small_family
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.core.rng import seed_of
from archsmith.tasks import open_task
from archsmith.train.average import MovingAverage
from archsmith.train.loop import Diverged, LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.optim import RMSprop, decay_groups

BATCH, SEED = 16, 3


@pytest.fixture(scope="module")
def task():
    return open_task("digits", limit=16, label_smoothing=0.1)


class Run:
    """A small network in training; ``train`` goes on to the end of the epoch."""

    def __init__(self, task, **hooks):
        self.task, self.seen = task, []
        family = small_family(num_classes=10, dropout=0.5)
        self.network = family.build(family.largest(), seed=0)
        self.optimizer = RMSprop(decay_groups(self.network, 1e-4), 99.0)
        self.average = MovingAverage(self.network, 0.9)
        self.position = Position()
        self.hooks = LoopHooks(rate=lambda step: 0.02 / (1 + step), **hooks)

    def train(self, **settings):
        return train_epoch(
            self.network,
            self.optimizer,
            self.task,
            self.position,
            self.hooks,
            **({"batch_size": BATCH, "seed": SEED, "average": self.average} | settings),
        )

    def tensors(self):
        state = {f"state.{i}.{k}": v for i, s in enumerate(self.optimizer.state.values()) for k, v in s.items()}
        return {**tensors_of(self.network), **{f"ema.{n}": t for n, t in self.average.tensors.items()}, **state}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_epoch_is_the_loop_as_everybody_would_write_it(task):
    run, plain = Run(task), Run(task)
    losses = []
    plain.network.train()
    for step, batch in enumerate(task.batches("train", batch_size=BATCH, seed=seed_of(SEED, "order"), epoch=0)):
        torch.manual_seed(seed_of(SEED, "dropout", 0, step))
        for group in plain.optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        plain.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed_of(SEED, "augment", 0, step))
        loss, _ = task.loss(plain.network, batch, generator)
        loss.backward()
        plain.optimizer.step()
        plain.average.update(plain.network)
        losses.append(loss.item())
    assert run.train()
    assert_equal(run.tensors(), plain.tensors())
    assert run.position.step == run.position.total == len(losses) == task.steps_per_epoch(BATCH)
    assert run.position.means()["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert 0 <= run.position.means()["accuracy"] <= 1


def test_stopping_anywhere_and_going_on_changes_nothing(task):
    whole = Run(task)
    for _ in range(2):
        assert whole.train()
        next_epoch(whole.position)
    pieces = Run(task, should_stop=lambda: True)
    ends = 0
    while pieces.position.epoch < 2:
        torch.manual_seed(ends)  # whatever happens to the global stream in between
        pieces.position = Position(**pieces.position.to_json())
        if pieces.train():
            next_epoch(pieces.position)
        ends += 1
    assert ends == 2 * task.steps_per_epoch(BATCH)
    assert_equal(whole.tensors(), pieces.tensors())
    assert whole.position == pieces.position


def test_the_sums_survive_a_stop(task):
    whole, pieces = Run(task), Run(task, should_stop=lambda: True)
    whole.train()
    while not pieces.train():
        pieces.position = Position(**pieces.position.to_json())
    assert whole.position.means() == pieces.position.means()
    next_epoch(whole.position)
    assert (whole.position.epoch, whole.position.step, whole.position.sums) == (1, 0, {})
    assert whole.position.total == task.steps_per_epoch(BATCH)


def test_hooks_are_called_in_their_order(task):
    events = []
    run = Run(
        task,
        after_backward=lambda: events.append("backward"),
        after_step=lambda rate: events.append(("step", rate)),
        on_step=lambda position, loss: events.append(("told", position.total, math.isfinite(loss))),
        should_stop=lambda: len(events) >= 6,
    )
    assert not run.train()
    rates = [0.02, 0.01]
    assert events == [
        event for i, rate in enumerate(rates) for event in ("backward", ("step", rate), ("told", i + 1, True))
    ]
    assert run.position.step == 2
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.01}


def test_gradients_can_be_changed_before_the_step(task):
    def freeze():
        for parameter in run.network.parameters():
            parameter.grad = None

    run = Run(task, after_backward=freeze)
    before = {n: p.detach().clone() for n, p in run.network.named_parameters()}
    run.train()
    assert all(torch.equal(p, before[n]) for n, p in run.network.named_parameters())


def test_the_global_random_stream_is_not_touched(task):
    run = Run(task)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run.train()
    assert torch.equal(torch.rand(3), expected)


def test_seed_and_epoch_decide_the_steps(task):
    one, same, other, later = (Run(task) for _ in range(4))
    later.position = Position(epoch=1)
    for run, seed in ((one, 3), (same, 3), (other, 4), (later, 3)):
        run.train(seed=seed)
    assert_equal(one.tensors(), same.tensors())
    assert not torch.equal(one.network.stem.conv.weight, other.network.stem.conv.weight)
    assert not torch.equal(one.network.stem.conv.weight, later.network.stem.conv.weight)


def test_batches_come_in_the_asked_format(task):
    seen = []
    run = Run(task)
    run.network.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    run.train(memory_format=torch.channels_last)
    assert set(seen) == {torch.empty(BATCH, 1, 8, 8).contiguous(memory_format=torch.channels_last).stride()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_step(task, value):
    run = Run(task)
    run.train(average=None)
    next_epoch(run.position)
    before = {}

    def spoil(position, loss):
        if position.step == 2:
            before.update({n: p.detach().clone() for n, p in run.network.named_parameters()})
            before["classifier.bias"][0] = value
            run.network.classifier.bias.data[0] = value

    run.hooks = LoopHooks(rate=lambda step: 0.01, on_step=spoil)
    with pytest.raises(
        Diverged, match=r"loss is (nan|inf) at epoch 2, step 3 \(batch 2 of that epoch\); the step was not"
    ):
        run.train()
    assert (run.position.epoch, run.position.step) == (1, 2)
    for name, parameter in run.network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_dropout_differs_from_step_to_step(task):
    masks = []
    run = Run(task)
    run.network.dropout.register_forward_hook(lambda m, i, out: masks.append((out == 0).flatten()))
    run.train()
    assert not torch.equal(masks[0], masks[1])


def test_a_model_in_evaluation_mode_is_put_to_training(task):
    run = Run(task)
    run.network.eval()
    run.train()
    assert run.network.training and run.network.stem.norm.num_batches_tracked == task.steps_per_epoch(BATCH)
    assert isinstance(run.network, nn.Module)
