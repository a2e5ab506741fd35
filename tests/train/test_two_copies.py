import pytest
import torch
from darts_runs import small_family, small_task

from archsmith.core.errors import UserError
from archsmith.supernet.split import Relaxed
from archsmith.train.bilevel import BilevelStep, StepContext, bilevel_epoch, halves, loss_of, random_batch
from archsmith.train.loop import Diverged, Position
from archsmith.train.two_copies import TwoCopies


def parts(relaxed=None, passes="fused", rate=0.05, same_batch=False, clip=5.0):
    """Return a supernet, its updater, and a function that takes steps."""
    first, second = halves(small_task(), 3)
    supernet = small_family(nodes=1, operations=("skip_connect", "dil_conv_3x3")).supernet(seed=0).double()
    step = BilevelStep(
        weight_task=first, logit_task=first if same_batch else second, batch_size=4, seed=5, clip_norm=clip
    )
    optimizer = torch.optim.SGD(supernet.weights().values(), rate, 0.9, weight_decay=1e-3)
    adam = torch.optim.Adam(supernet.logits.parameters(), 0.1)
    updater = TwoCopies(relaxed or Relaxed(), passes)
    updater.begin_(supernet, optimizer, fresh=True)

    def go(steps, *, learning=True):
        figures = []
        for number in range(steps):
            batch = random_batch(step, "weights", number)
            inputs = batch.inputs.double()
            context = Double(
                supernet=supernet,
                optimizer=optimizer,
                logit_optimizer=adam if learning else None,
                step=step,
                batch=type(batch)(inputs, batch.targets),
                where=(0, number),
                same=same_batch,
            )
            figures.append(updater.step(context))
        return figures

    return supernet, updater, go


class Double(StepContext):
    """A context in double precision; with ``same`` both losses are those of the weights' batch."""

    def __init__(self, *, same=False, **fields):
        super().__init__(**fields)
        object.__setattr__(self, "same", same)
        object.__setattr__(self, "given", {})

    def logit_loss(self):
        if self.same:
            return self.weight_loss()
        batch = random_batch(self.step, *self.where)
        batch = type(batch)(batch.inputs.double(), batch.targets)
        return loss_of(self.supernet, self.step.logit_task, batch, self.step, "logits", *self.where)

    def move_logits(self, gradients):
        self.given.update({name: gradient.clone() for name, gradient in gradients.items()})
        TAKEN.append(self.given)
        super().move_logits(gradients)


TAKEN = []


@pytest.fixture(autouse=True)
def nothing_taken():
    TAKEN.clear()


def test_copies_of_one_batch_give_the_logits_twice_the_gradient():
    supernet, _, go = parts(Relaxed(train_weight=1.0, coupling=0.0), same_batch=True)
    weights = {name: w.detach().clone() for name, w in supernet.weights().items()}
    logits = {name: t.detach().clone().requires_grad_() for name, t in supernet.logits.items()}
    go(1)
    first = TAKEN[0]
    again, _, _ = parts(same_batch=True)
    assert set(first) == set(logits)
    step = BilevelStep(
        weight_task=halves(small_task(), 3)[0], logit_task=halves(small_task(), 3)[0], batch_size=4, seed=5
    )
    batch = random_batch(step, "weights", 0)
    loss, _ = loss_of(again, step.weight_task, type(batch)(batch.inputs.double(), batch.targets), step, "weights", 0, 0)
    gradients = torch.autograd.grad(loss(weights, logits), list(logits.values()))
    for name, gradient in zip(logits, gradients, strict=True):
        torch.testing.assert_close(first[name], 2 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("coupling", [0.0, 3.0])
@pytest.mark.parametrize("passes", ["fused", "gauss-seidel"])
def test_the_logits_get_lambda_times_one_half_plus_the_other(coupling, passes):
    """Rates of zero keep the weights, so that both ways of taking gradients agree; the spring has no part in it."""
    found = {}
    for lam in (0.0, 1.0, 2.5):
        TAKEN.clear()
        _, _, go = parts(Relaxed(train_weight=lam, coupling=coupling), passes, rate=0.0)
        go(1)
        found[lam] = TAKEN[0]
    for name in found[0.0]:
        on_valid, on_train = found[0.0][name], found[1.0][name] - found[0.0][name]
        assert on_valid.abs().max() > 0 and on_train.abs().max() > 0
        torch.testing.assert_close(found[2.5][name], 2.5 * on_train + on_valid, rtol=1e-6, atol=1e-10)


@pytest.mark.slow
def test_a_strong_spring_holds_the_copies_together():
    distances = []
    for beta in (1e-3, 1e-2, 1e-1, 1.0):
        _, _, go = parts(Relaxed(coupling=beta))
        distances.append(go(25)[-1]["distance"])
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 2
    assert all(0 < distance < 100 for distance in distances)


def test_the_spring_is_not_clipped():
    """With a clip that leaves hardly any gradient, all that moves the copies together is the spring."""
    supernet, updater, go = parts(Relaxed(coupling=1.0), clip=1e-12)
    with torch.no_grad():
        for parameter in updater.twin.parameters():
            parameter.add_(0.1)
    start = updater.distance(supernet)
    go(20)
    assert updater.distance(supernet) < start / 2


def test_each_copy_has_its_own_running_statistics():
    supernet, updater, go = parts()
    go(2)
    own = {name: buffer for name, buffer in supernet.network.named_buffers() if name.endswith("running_mean")}
    other = dict(updater.twin.named_buffers())
    assert own and not any(torch.equal(buffer, other[name]) for name, buffer in own.items())
    counts = [int(b) for name, b in supernet.network.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [int(b) for name, b in other.items() if name.endswith("num_batches_tracked")] == [2] * len(counts)
    assert not {id(p) for p in updater.twin.parameters()} & {id(p) for p in supernet.parameters()}


def test_logits_can_wait_while_both_copies_learn():
    supernet, updater, go = parts()
    before = {name: t.detach().clone() for name, t in supernet.logits.items()}
    twin = {name: p.detach().clone() for name, p in updater.twin.named_parameters()}
    go(1, learning=False)
    assert all(torch.equal(t, before[name]) for name, t in supernet.logits.items())
    assert any(not torch.equal(p, twin[name]) for name, p in updater.twin.named_parameters())


def test_a_gradient_without_a_number_stops_before_the_step():
    supernet, updater, go = parts()
    with torch.no_grad():
        supernet.network.classifier.bias[0] = torch.nan
    kept = {name: p.detach().clone() for name, p in updater.twin.named_parameters()}
    with pytest.raises(Diverged):
        go(1)
    assert all(torch.equal(p, kept[name]) for name, p in updater.twin.named_parameters())


def test_an_optimiser_of_other_weights_is_refused():
    supernet, updater, _ = parts()
    some = list(supernet.weights().values())[:2]
    with pytest.raises(UserError, match="one group that holds what is trained of the supernet"):
        updater.begin_(supernet, torch.optim.SGD(some, 0.1), fresh=True)


def test_it_trains_in_the_common_epoch():
    first, second = halves(small_task(), 3)
    supernet = small_family(nodes=1).supernet(seed=0)
    optimizer = torch.optim.SGD(supernet.weights().values(), 0.1, 0.9)
    adam = torch.optim.Adam(supernet.logits.parameters(), 0.1)
    updater, position = TwoCopies(Relaxed()), Position()
    updater.begin_(supernet, optimizer, fresh=True)
    step = BilevelStep(weight_task=first, logit_task=second, batch_size=8, seed=5)
    assert bilevel_epoch(supernet, optimizer, adam, step, position, rate=0.03, updater=updater)
    assert {"loss", "twin_loss", "distance", "accuracy"} <= set(position.sums)
    assert updater._optimizer.param_groups[0]["lr"] == 0.03
    assert updater._optimizer.param_groups[0]["momentum"] == 0.9
