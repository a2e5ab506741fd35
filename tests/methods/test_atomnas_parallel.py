"""AtomNAS in several processes, in bfloat16, compiled: the same search."""

import pytest
import torch
from mobile_samples import small_family
from search_samples import QUICK, Notes, Watch, copied, digits, finish
from two_processes import in_processes, outcomes

from archsmith.core.errors import UserError
from archsmith.families.mobile import mobile_family
from archsmith.methods import atomnas
from archsmith.methods.atomnas import Searcher, Settings
from archsmith.run.costs import CostModel
from archsmith.space import Budget
from archsmith.tasks.augment import Augment
from archsmith.train.compute import Compute
from archsmith.train.workers import Workers


def tiny_family():
    rows = ((1, 4, 1, 1, (3,)), (3, 4, 1, 1, (3, 5)))
    return mobile_family("tiny", image=(1, 8, 8), num_classes=10, stem_channels=4, last_channels=8, rows=rows)


def search(compute, *, budget=None, family=None, **settings):
    task = digits()
    task.augment = Augment(label_smoothing=0.1, crop=1).fitting(8, 8)
    family = family or small_family(num_classes=10, dropout=0.3)
    costs = CostModel(family, Budget.parse(budget) if budget else None, Notes())
    chosen = Settings(**(QUICK | settings))
    return Searcher(family=family, task=task, settings=chosen, costs=costs, seed=1, compute=compute)


def ended(searcher):
    """Finish a search; return its figures, its whole state and what it delivers."""
    figures = finish(searcher)
    tensors, state = searcher.state()
    delivered = searcher.deliver()
    return figures, copied(tensors), state, copied(delivered.network.state_dict()), dict(delivered.architecture)


CASES = {
    "rmsprop": {},
    "adamw within a budget": {"optimizer": "adamw", "rho": 3.0, "budget": "macs<=0.4x", "epochs": 4},
}


@pytest.mark.parametrize("case", [pytest.param("rmsprop", marks=pytest.mark.slow), "adamw within a budget"])
def test_two_processes_do_what_one_does_with_two_micro_batches(case):
    options = CASES[case]
    figures, tensors, state, network, architecture = ended(search(Compute(micro_batches=2), **options))
    assert sum(f["cut"] is not None for f in figures) >= 1
    assert figures[-1]["atoms"] < 0.8 * figures[0]["atoms"]
    for found in in_processes(lambda workers: ended(search(Compute(workers=workers), **options))):
        assert [f["kernels"] for f in found[0]] == [f["kernels"] for f in figures]  # the same masks
        assert [f["cut"] for f in found[0]] == [f["cut"] for f in figures]
        assert found[4] == architecture
        assert found[1].keys() == tensors.keys()  # weights, averages, optimiser
        for name, value in tensors.items():
            torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6, msg=name)
        for name, value in network.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[3][name], value, rtol=0, atol=1e-6, msg=name)
        assert found[2]["position"]["sums"] == pytest.approx(state["position"]["sums"], abs=1e-6)


@pytest.mark.slow
def test_four_parts_are_four_parts_however_they_are_spread():
    """In float64: sums in another order round differently, and RMSprop magnifies a gradient next to zero."""
    expected = ended(double_(search(Compute(micro_batches=4))))
    for count, micro in ((2, 2), (4, 1)):
        for found in in_processes(
            lambda workers, micro=micro: ended(double_(search(Compute(workers=workers, micro_batches=micro)))), count
        ):
            assert [f["kernels"] for f in found[0]] == [f["kernels"] for f in expected[0]]
            for name, value in expected[1].items():
                torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-9, msg=name)


def test_the_first_process_decides_what_is_cut(monkeypatch):
    """Another process that would cut differently cuts what the first one says."""
    alive = atomnas.alive

    def work(workers):
        searcher = search(Compute(workers=workers), family=tiny_family(), epochs=2, rho=0.5, threshold=0.7)
        if not workers.main:
            monkeypatch.setattr(
                atomnas,
                "alive",
                lambda *args, **options: {n: torch.ones_like(m) for n, m in alive(*args, **options).items()},
            )
        return finish(searcher)[-1]["kernels"], copied(searcher.state()[0])

    one, two = in_processes(work)
    assert one[0] == two[0]
    assert sum(one[0].values()) < len(search(Compute(), family=tiny_family()).atoms)
    assert all(torch.equal(value, two[1][name]) for name, value in one[1].items())


def test_masks_that_differ_stop_the_run(monkeypatch):
    def work(workers):
        searcher = search(Compute(workers=workers), family=tiny_family(), epochs=2, rho=0.5, threshold=0.7)
        if not workers.main:
            share = Workers.share

            def tampered(self, value):
                received = share(self, value)
                if isinstance(received, tuple) and isinstance(received[0], dict) and "k3" in str(list(received[0])[:1]):
                    next(iter(received[0].values()))[0] ^= True
                return received

            monkeypatch.setattr(Workers, "share", tampered)
        finish(searcher)

    assert all("the processes disagree on the masks of a cut" in text for text, _ in outcomes(work))


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"batch_size: got 32; allowed: a multiple of 3"):
        search(Compute(micro_batches=3))


def test_bf16_searches_and_delivers_float32():
    searcher = search(Compute(precision="bf16"), budget="macs<=0.5x")
    figures = finish(searcher)
    delivered = searcher.deliver()
    assert searcher.costs.of(delivered.architecture)["macs"] <= searcher.costs.limits["macs"]
    assert figures[-1]["atoms"] < figures[0]["atoms"]
    kept = [t for t in searcher.state()[0].values() if t.is_floating_point()]
    assert {t.dtype for t in (*kept, *delivered.network.parameters())} == {torch.float32}
    assert {searcher.network.get_parameter(g.scale).grad.dtype for g in searcher.atoms} == {torch.float32}


def double_(searcher):
    """Compute in float64: in float32 the rounding of an activation at zero would show."""
    searcher.network.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    searcher.average.tensors = {name: tensor.double() for name, tensor in searcher.average.tensors.items()}
    return searcher


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_search_is_the_eager_one_before_and_after_a_cut(backend):
    """The budget's mask cuts once, after the second of three epochs."""
    options = {"family": tiny_family(), "budget": "macs<=0.7x", "epochs": 3, "rho": 0.0}
    eager = double_(search(Compute(), **options))
    compiled = double_(search(Compute(compile=backend), **options))
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    expected, found, compilations = [], [], []
    for _ in range(3):
        expected.append(eager.advance(Watch()))
        found.append(compiled.advance(Watch()))
        compilations.append(graphs["unique_graphs"] - before)
    assert [f["cut"] is not None for f in found] == [False, True, False]
    assert [f["kernels"] for f in found] == [f["kernels"] for f in expected]
    assert [f["loss"] for f in found] == pytest.approx([f["loss"] for f in expected], abs=1e-9)
    tensors = compiled.state()[0]
    for name, value in eager.state()[0].items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-9, msg=name)
    assert compilations == [compilations[0], compilations[0], 2 * compilations[0]]  # again after the cut, only then
