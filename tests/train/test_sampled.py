import pytest
import torch
from darts_runs import small_family, small_task

from archsmith.core.errors import UserError
from archsmith.supernet import StraightThrough
from archsmith.supernet.gates import BinaryGates
from archsmith.train.bilevel import BilevelStep, bilevel_epoch, halves
from archsmith.train.loop import Position
from archsmith.train.sampled import SampledAlternation


class Seen(SampledAlternation):
    """Notes what is done, in order."""

    def __init__(self, **options):
        super().__init__(**options)
        self.done, self.before, self.samples = [], [], []

    def move_weights(self, context):
        self.done.append(("weights", context.where))
        return super().move_weights(context)

    def logit_loss(self, context, loss, logits, mixing):
        self.done.append(("logits", context.where))
        return super().logit_loss(context, loss, logits, mixing)

    def moved_(self, context, before, mixing):
        self.before.append(before)
        self.samples.append(mixing)


def epoch(updater, *, relaxation=None, learn=True, start=None, seed=5, steps=None):
    """Run one epoch on three cells; return the supernet, both optimisers and the position."""
    first, second = halves(small_task(), 3)
    supernet = small_family().supernet(seed=0, relaxation=relaxation or StraightThrough())
    step = BilevelStep(weight_task=first, logit_task=second, batch_size=4, seed=seed)
    optimizer = torch.optim.SGD(supernet.weights().values(), 0.1, 0.9, weight_decay=0.1)
    logits = torch.optim.Adam(supernet.logits.parameters(), 0.05, betas=(0.0, 0.999))
    position, left = start or Position(), [steps]

    def stop():
        if left[0] is not None:
            left[0] -= 1
        return left[0] == 0

    bilevel_epoch(
        supernet, optimizer, logits if learn else None, step, position, rate=0.1, updater=updater, should_stop=stop
    )
    return supernet, optimizer, logits, position


@pytest.mark.parametrize("first", ["logits", "weights"])
def test_logits_have_their_turn_every_few_steps(first):
    updater = Seen(logits_every=2, first=first)
    epoch(updater)
    second = {"logits": ["logits", "weights"], "weights": ["weights", "logits"]}[first]
    expected = [("weights", (0, 0)), *((name, (0, 1)) for name in second), ("weights", (0, 2))]
    assert updater.done[:4] == expected
    assert sum(name == "logits" for name, _ in updater.done) == len(updater.before) == 2


def test_without_their_optimiser_logits_stay():
    updater = Seen()
    supernet, *_ = epoch(updater, learn=False)
    fresh = small_family().supernet(seed=0)
    assert all(torch.equal(tensor, fresh.logits[name]) for name, tensor in supernet.logits.items())
    assert all(name == "weights" for name, _ in updater.done)


@pytest.mark.parametrize("relaxation", [StraightThrough(), BinaryGates("full"), BinaryGates("two")])
def test_what_a_path_leaves_out_is_left_alone(relaxation):
    """Neither gradient, momentum nor decay: weights off the path are bit for bit as before."""
    supernet, optimizer, *_ = epoch(SampledAlternation(), relaxation=relaxation, learn=False, steps=1)
    fresh = dict(small_family().supernet(seed=0).weights())
    moved = {name: not torch.equal(weight, fresh[name]) for name, weight in supernet.weights().items()}
    mixing = {}
    for name, weight in supernet.weights().items():
        edge, inside, rest = name.partition(".candidates.")
        if inside:
            mixing.setdefault(edge, {}).setdefault(rest.split(".")[0], []).append((moved[name], weight))
        else:
            assert moved[name]
    for candidates in mixing.values():
        for pairs in candidates.values():
            assert len({was for was, _ in pairs}) == 1  # a whole candidate, or nothing of it
            for was, weight in pairs:
                assert (weight.grad is not None) == was == bool(optimizer.state.get(weight))
    chosen = [any(was for pairs in candidates.values() for was, _ in pairs) for candidates in mixing.values()]
    assert any(chosen) and not all(moved.values())


def test_an_epoch_is_a_function_of_its_seed():
    updater = SampledAlternation(logits_every=2, first="weights")
    whole, *_ = epoch(updater)
    other, *_ = epoch(updater, seed=6)
    again, *_ = epoch(updater)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert any(not torch.equal(tensor, other.logits[name]) for name, tensor in whole.logits.items())


def test_the_step_on_the_logits_leaves_the_weights_alone():
    class LogitsAlone(SampledAlternation):
        def move_weights(self, context):
            return {"loss": 0.0}

    supernet, *_ = epoch(LogitsAlone(), relaxation=BinaryGates("full_v2"))
    fresh = small_family().supernet(seed=0)
    for name, weight in supernet.weights().items():
        assert weight.grad is None and torch.equal(weight, fresh.weights()[name])
    assert all(not torch.equal(tensor, fresh.logits[name]) for name, tensor in supernet.logits.items())


def test_bad_options():
    with pytest.raises(UserError, match="logits_every: got 0; allowed: an integer from 1"):
        SampledAlternation(logits_every=0)
    with pytest.raises(UserError, match="first: got 'alpha'; allowed: 'logits' or 'weights'"):
        SampledAlternation(first="alpha")
