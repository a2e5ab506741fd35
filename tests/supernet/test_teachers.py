import json
from collections import deque
from pathlib import Path

import pytest
import torch
from darts_runs import small_family
from torch import nn

from archsmith.core.errors import UserError
from archsmith.supernet.mixed import GumbelSoftmax, MixedOp
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.supernet.teachers import Snapshot, TeacherQueue
from archsmith.supernet.updaters import Tensors

CASES = json.loads((Path(__file__).parents[1] / "golden" / "sd-darts.json").read_text())["cases"]
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Scalar(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, mixing: Tensors) -> torch.Tensor:
        return self.w * x


def named(prefix):
    return [case for case in CASES if case["name"].startswith(prefix)]


def moved_(supernet, by=0.1):
    with torch.no_grad():
        for tensor in (*supernet.network.parameters(), *supernet.logits.values()):
            tensor.add_(by * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("case", named("quadratic_toy"), ids=lambda case: case["name"])
def test_the_pull_of_the_last_copies_on_a_parabola(case):
    """The queue holds the iterates before this one, the newest last; the first are copies of the start."""
    given = case["input"]
    supernet = RelaxedSupernet(Scalar(), {"cell": [["a"]]})
    queue = TeacherQueue(given["K"])
    for step in range(-given["K"], 0):
        queue.push(Snapshot.of(supernet, step))
    w, walked = supernet.network.w, [1.0]
    for step in range(12):
        pull = w.detach() - torch.stack([each.weights["w"] for each in queue]).mean()
        before = Snapshot.of(supernet, step)
        with torch.no_grad():
            w -= given["eta"] * (given["h"] * w + given["lam"] * pull)
        queue.push(before)
        walked.append(w.item())
    assert walked == pytest.approx(case["expected"], rel=0, abs=1e-12)


@pytest.mark.parametrize("case", named("largest_stable_curvature"), ids=lambda case: case["name"])
def test_the_pull_makes_sharp_minima_unstable(case):
    given, bound = case["input"], case["expected"]["h_star"]
    eta, lam, count = given["eta"], given["lam"], given["K"]
    law = 2 - eta * lam * (1 + 1 / count) if count % 2 else 2 - eta * lam
    assert law / eta == pytest.approx(bound, rel=1e-9)
    assert bound < 2 / eta

    def largest_of_the_end(curvature, steps=12_000):
        history = deque([1.0] * count, maxlen=count)
        w, seen = 0.5, []
        for _ in range(steps):
            after = w - eta * (curvature * w + lam * (w - sum(history) / count))
            history.append(w)
            w = after
            seen.append(abs(w))
        return max(seen[1000 : 1000 + count + 2]), max(seen[-count - 2 :])

    early, late = largest_of_the_end(0.999 * bound)
    assert late < early / 10
    early, late = largest_of_the_end(1.001 * bound)
    assert late > early * 10


def test_it_keeps_the_newest_and_they_are_copies():
    supernet = small_family().supernet(seed=0)
    queue = TeacherQueue(2)
    for step in range(4):
        queue.push(Snapshot.of(supernet, step))
    assert [each.step for each in queue] == [2, 3] and len(queue) == queue.size == 2
    (_, newest) = queue
    assert set(newest.weights) == {name for name, _ in supernet.network.named_parameters()}
    assert set(newest.logits) == {"normal", "reduce"}
    before = queue.logits(supernet, IMAGES)
    moved_(supernet)
    after = queue.logits(supernet, IMAGES)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    numbers = sum(tensor.numel() for each in queue for tensor in (*each.weights.values(), *each.logits.values()))
    own = sum(p.numel() for p in supernet.network.parameters()) + sum(p.numel() for p in supernet.logits.values())
    assert numbers == 2 * own


def test_a_teacher_has_the_logits_of_its_time():
    supernet = small_family().supernet(seed=0)
    then = Snapshot.of(supernet, 0)
    queue = TeacherQueue(1)
    queue.push(then)
    (before,) = queue.logits(supernet, IMAGES)
    with torch.no_grad():
        supernet.logits["normal"][:, 0] += 3.0
    (after,) = queue.logits(supernet, IMAGES)
    assert torch.equal(before, after)
    with torch.no_grad():
        assert not torch.allclose(supernet.functional(IMAGES, then.weights), after)


@pytest.mark.parametrize("training", [True, False])
def test_asking_teachers_changes_nothing(training):
    supernet = small_family().supernet(seed=0)
    supernet.network.dropout = nn.Dropout(0.5)
    supernet.train(training)
    supernet.network.cells[0].eval()
    queue = TeacherQueue(1)
    queue.push(Snapshot.of(supernet, 0))
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    flags = [module.training for module in supernet.modules()]
    random = torch.get_rng_state()
    (first,), (second,) = queue.logits(supernet, IMAGES), queue.logits(supernet, 2 * IMAGES)
    assert not first.requires_grad and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in supernet.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    assert all(p.grad is None for p in supernet.parameters())


def test_teachers_use_the_statistics_of_their_batch():
    supernet = small_family().supernet(seed=0).train()
    queue = TeacherQueue(1)
    queue.push(Snapshot.of(supernet, 0))
    with torch.no_grad():
        student = supernet(IMAGES)
    torch.testing.assert_close(queue.logits(supernet, IMAGES)[0], student)
    for name, buffer in supernet.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1e6)
    torch.testing.assert_close(queue.logits(supernet, IMAGES)[0], student)


def test_dropout_is_off_in_teachers():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.edge = MixedOp({"a": nn.Linear(3, 3), "b": nn.Identity()})
            self.drop = nn.Dropout(0.5)

        def forward(self, x, mixing):
            return self.drop(self.edge(x, mixing["cell"][0]))

    supernet = RelaxedSupernet(Network(), {"cell": [["a", "b"]]}).train()
    queue = TeacherQueue(1)
    queue.push(Snapshot.of(supernet, 0))
    x = torch.ones(2, 3)
    random = torch.get_rng_state()
    assert torch.equal(queue.logits(supernet, x)[0], queue.logits(supernet, x)[0])
    assert torch.equal(torch.get_rng_state(), random)


def test_sampled_relaxations_draw_from_what_is_given():
    supernet = small_family().supernet(seed=0, relaxation=GumbelSoftmax())
    queue = TeacherQueue(2)
    for step in range(2):
        queue.push(Snapshot.of(supernet, step))

    def seeded(number):
        return torch.Generator().manual_seed(number)

    random = torch.get_rng_state()
    first, again = (queue.logits(supernet, IMAGES, seeded) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_a_checkpoint_goes_on_bit_for_bit():
    supernet = small_family().supernet(seed=0)
    queue = TeacherQueue(3)
    for step in range(2):
        queue.push(Snapshot.of(supernet, step))
        moved_(supernet)
    tensors, values = queue.state()
    again = TeacherQueue(3)
    again.load(supernet, {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))
    assert [each.step for each in again] == [0, 1]
    for one, other in zip(queue.logits(supernet, IMAGES), again.logits(supernet, IMAGES), strict=True):
        assert torch.equal(one, other)
    del tensors["teacher.1.logits.normal"]
    with pytest.raises(UserError, match=r"checkpoint: got 'teacher.1.logits.normal'; allowed: the tensors of every"):
        again.load(supernet, tensors, values)


def test_a_queue_of_nothing_is_refused():
    with pytest.raises(UserError, match="teachers: got 0; allowed: an integer from 1"):
        TeacherQueue(0)
