import pytest
import torch
from darts_runs import small_family, small_task

from archsmith.core.errors import UserError
from archsmith.supernet.updaters import first_order, unrolled
from archsmith.train.bilevel import (
    Bilevel,
    BilevelStep,
    bilevel_epoch,
    halves,
    inner_step,
    logit_gradients,
    loss_of,
    random_batch,
)
from archsmith.train.loop import Diverged, Position


@pytest.fixture
def parts():
    task = small_task()
    supernet = small_family().supernet(seed=0)
    first, second = halves(task, 3)
    step = BilevelStep(weight_task=first, logit_task=second, batch_size=8, seed=5)
    optimizer = torch.optim.SGD(supernet.weights().values(), 0.1, 0.9, weight_decay=1e-3)
    return supernet, step, optimizer


def test_halves_are_disjoint_and_belong_to_their_seed():
    task = small_task()
    whole = set(task.split_indices("train").tolist())
    first, second = (set(half.split_indices("train").tolist()) for half in halves(task, 3))
    assert not first & second and first | second == whole and len(first) - len(second) in (0, 1)
    assert [half.split_indices("train").tolist() for half in halves(task, 3)] == [sorted(first), sorted(second)]
    assert set(halves(task, 4)[0].split_indices("train").tolist()) != first
    assert set(task.split_indices("train").tolist()) == whole  # the task itself is as it was
    assert halves(task, 3)[0].split_indices("valid").tolist() == task.split_indices("valid").tolist()


def test_a_loss_gives_the_same_value_again(parts):
    supernet, step, _ = parts
    batch = random_batch(step, 0, 0)
    assert torch.equal(batch.inputs, random_batch(step, 0, 0).inputs)
    assert not torch.equal(batch.inputs, random_batch(step, 0, 1).inputs)
    loss, metrics = loss_of(supernet, step.weight_task, batch, step, "weights", 0, 0)
    one, again = (loss(supernet.weights(), dict(supernet.logits)) for _ in range(2))
    assert torch.equal(one, again) and 0 <= metrics["accuracy"] <= 1


def test_the_unrolled_step_is_the_optimisers_next_one(parts):
    supernet, step, optimizer = parts
    batch = next(iter(step.weight_task.batches("train", batch_size=8)))
    loss, _ = loss_of(supernet, step.weight_task, batch, step, "weights", 0, 0)
    for _ in range(3):  # without buffers first, then with them
        optimizer.zero_grad()
        loss(supernet.weights(), dict(supernet.logits)).backward()
        weights = {name: weight.detach().clone() for name, weight in supernet.weights().items()}
        gradients = {name: weight.grad.clone() for name, weight in supernet.weights().items()}
        expected = inner_step(optimizer, supernet).taken(weights, gradients)
        optimizer.step()
        for name, weight in supernet.weights().items():
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-6, atol=1e-7)


def test_orders_are_those_of_the_updaters(parts):
    supernet, _, optimizer = parts
    supernet.double()
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64)
    y = torch.arange(8) % 3

    def loss(weights, logits):
        return torch.nn.functional.cross_entropy(supernet.functional(x, weights, logits), y)

    weights, logits = supernet.weights(), dict(supernet.logits)
    inner = inner_step(optimizer, supernet)
    wanted = {
        "first": first_order(loss, weights, logits),
        "second": unrolled(loss, loss, weights, logits, inner),
        "exact": unrolled(loss, loss, weights, logits, inner, how="exact"),
    }
    for order, gradient in wanted.items():
        found = logit_gradients(supernet, loss, loss, order, optimizer)
        assert all(torch.equal(found[name], gradient[name]) for name in gradient)
    assert not torch.equal(wanted["first"]["normal"], wanted["second"]["normal"])


def test_an_epoch_moves_both_and_can_leave_logits_alone(parts):
    supernet, step, optimizer = parts
    before = {name: tensor.detach().clone() for name, tensor in supernet.logits.items()}
    position = Position()
    assert bilevel_epoch(supernet, optimizer, None, step, position, rate=0.05, updater=Bilevel("second"))
    assert position.step == position.total == step.weight_task.steps_per_epoch(8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.logits.items())
    adam = torch.optim.Adam(supernet.logits.parameters(), 0.01)
    assert not bilevel_epoch(supernet, optimizer, adam, step, Position(), rate=0.05, should_stop=lambda: True)
    moved = [(tensor - before[name]).abs().max().item() for name, tensor in supernet.logits.items()]
    assert moved == pytest.approx([0.01, 0.01], rel=1e-3)  # one step of Adam
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_loss_without_a_number_stops_before_the_step(parts):
    supernet, step, optimizer = parts
    with torch.no_grad():
        supernet.network.classifier.bias[0] = torch.nan
    weights = {name: weight.detach().clone() for name, weight in supernet.weights().items()}
    adam = torch.optim.Adam(supernet.logits.parameters(), 0.01)
    for logit_optimizer in (None, adam):
        with pytest.raises(Diverged):
            bilevel_epoch(supernet, optimizer, logit_optimizer, step, Position(), rate=0.05)
    kept = supernet.weights()
    assert all(torch.equal(weight.nan_to_num(), kept[name].nan_to_num()) for name, weight in weights.items())


def test_only_plain_momentum_sgd_can_be_unrolled(parts):
    supernet, _, _ = parts
    for optimizer in (
        torch.optim.Adam(supernet.weights().values()),
        torch.optim.SGD(supernet.weights().values(), 0.1, 0.9, nesterov=True),
    ):
        with pytest.raises(UserError, match="plain momentum SGD with one group"):
            inner_step(optimizer, supernet)
