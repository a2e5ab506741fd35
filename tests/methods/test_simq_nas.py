"""SimQ-NAS: what a policy does to accuracy and size, what makes no difference, what the search delivers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from darts_runs import copied, small_task, to_the_end

from archsmith.core.errors import UserError
from archsmith.cost import activation_ranges, layer_elements, onnx_layers, onnx_precision, quantise_onnx
from archsmith.cost.backends import onnx_session
from archsmith.evaluate.quantised import QuantisedEvaluator
from archsmith.families.bignas import bignas_family
from archsmith.families.bignas_layers import layer_elements as elements_of
from archsmith.methods import load_method
from archsmith.methods.simq_nas import Searcher, Settings, exact_size, joint_space, preset_settings
from archsmith.space import Architecture, LayerPolicy, Trial

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

QUICK = {
    "epochs": 1,
    "batch_size": 8,
    "lr": 0.05,
    "calibration_batches": 2,
    "calibration_images": 12,
    "ranges": "minmax",
    "population": 3,
    "inner_evaluations": 20,
    "evaluations": 6,
    "points": 2,
}
INT8, FP32 = LayerPolicy("int8"), LayerPolicy("fp32")


def family():
    return bignas_family("tiny", image=(3, 8, 8), num_classes=3)


def searcher(**changes):
    return Searcher(family=family(), task=small_task(), settings=Settings(**{**QUICK, **changes}), seed=0)


@pytest.fixture(scope="module")
def trained():
    """A search whose supernet has seen one epoch."""
    search = searcher()
    to_the_end_of_training(search)
    return search


def to_the_end_of_training(search):
    class Quiet:
        def step(self, total, **figures):
            pass

        def should_stop(self):
            return False

    while not search.selecting:
        assert search.advance(Quiet()) is not None


def test_it_is_found_and_described():
    row, module = load_method("simq-nas")
    assert row["kind"] == "search" and module.SYSTEM["arxiv"] == "2312.13301"
    assert preset_settings((3, 224, 224)) == {} and preset_settings((3, 32, 32))["population"] == 20
    published = Settings()
    assert (published.population, published.inner_evaluations, published.calibration_images) == (50, 10_000, 100)
    assert published.precisions == ("int8", "fp32") and published.ranges == "entropy"


def test_the_layers_of_a_child_are_known_before_it_is_built():
    own = family()
    rng = np.random.default_rng(0)
    for child in (own.largest(), own.smallest(), *own.space.sample_many(rng, 8)):
        assert elements_of(own, child) == layer_elements(own.build(child))


def test_every_layer_of_every_child_is_a_site_and_no_other(trained):
    joint = trained.joint
    for child in trained.family.space.sample_many(np.random.default_rng(1), 20):
        assert sorted(joint.active_sites(child)) == sorted(elements_of(trained.family, child))


def test_fp32_everywhere_is_the_network_itself(trained):
    child = trained.family.largest()
    found = trained.evaluate(trained.joint.with_policy(child, FP32))
    plain = trained.task.evaluate(trained.network_of(child), "valid")
    assert found.accuracy == plain["accuracy"]
    assert found.metrics["valid_loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert found.costs["size"] == 4 * trained.family.exact_costs(child)["params"]


def test_int8_everywhere_is_uniform_quantisation_after_training(trained):
    child = trained.family.largest()
    plain = trained.evaluator.float_file(child)
    uniform = quantise_onnx(plain.model, {layer.name: INT8 for layer in onnx_layers(plain.model)}, plain.ranges)
    file = trained.evaluator.file(trained.joint.with_policy(child, INT8))
    assert file.content == uniform.content
    elements = sum(elements_of(trained.family, child).values())
    assert trained.evaluator.size(trained.joint.with_policy(child, INT8)) == 4 * plain.params - 3 * elements


def test_each_layer_that_goes_to_int8_makes_the_child_smaller_and_the_size_is_known_beforehand(trained):
    child = trained.family.space.sample(np.random.default_rng(2))
    policy = dict.fromkeys(trained.joint.active_sites(child), FP32)
    sizes = []
    for site in (None, *policy):
        if site is not None:
            policy[site] = INT8
        made = trained.joint.with_policy(child, policy)
        sizes.append(trained.evaluator.size(made))
        assert exact_size(trained.family, trained.joint, made) == sizes[-1]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_genes_of_absent_layers_change_nothing(trained):
    joint = trained.joint
    smallest = joint.with_policy(trained.family.smallest(), INT8)
    absent = sorted(set(joint.sites) - set(joint.active_sites(trained.family.smallest())))
    assert absent
    genes = {path: smallest.get(path, joint.dimension(path).domain[0]) for path in joint.paths}
    calls = trained.evaluator._known
    first = trained.evaluate(joint.from_genotype(genes))
    known = len(calls)
    for site in absent:
        other = joint.from_genotype(genes | {f"policy/{site}/precision": "fp32", f"policy/{site}/scheme": "asymmetric"})
        again = trained.evaluate(other)
        assert again.metrics == first.metrics and again.costs == first.costs
        assert np.array_equal(joint.encode(other, "one-hot"), joint.encode(smallest, "one-hot"))
    assert len(calls) == known  # nothing was measured again


def test_the_search_goes_from_training_to_quantised_files():
    search = searcher(objectives=("accuracy", "size", "latency"))
    figures = to_the_end(search)
    assert [each["phase"] for each in figures] == ["training", "search"]
    assert len(search.evaluated) == 6
    assert len({each.architecture.network_digest for each in search.evaluated}) == 6
    for each in search.evaluated:
        assert each.costs["latency"] > 0 and each.costs["size"] > 0
    front = search.front()
    assert front and all(
        not (
            other.accuracy >= each.accuracy
            and other.costs["size"] < each.costs["size"]
            and other.costs["latency"] < each.costs["latency"]
        )
        for each in front
        for other in search.evaluated
    )
    delivered = search.deliver()
    assert delivered.label == "final" and len(delivered.others) <= 1
    content = delivered.files["model-quantised.onnx"]
    assert onnx_precision(content) != ""
    record = json.loads(delivered.files["quantised.json"])
    assert record["metrics"]["valid_accuracy"] == search.known(search.chosen()[0][1]).accuracy
    assert set(record["policy"]) == set(elements_of(search.family, delivered.architecture))
    session = onnx_session(content, threads=1)
    found = search.task.evaluate(
        lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), "valid"
    )
    assert found["accuracy"] == record["metrics"]["valid_accuracy"]


def test_a_stopped_search_goes_on_as_if_it_had_not_been():
    whole = searcher()
    to_the_end(whole)
    begun = searcher()
    to_the_end_of_training(begun)

    class After:
        left = 3

        def step(self, total, **figures):
            self.left -= 1

        def should_stop(self):
            return self.left <= 0

    assert begun.advance(After()) is None
    again = searcher()
    again.load(*copied(begun.state()))
    to_the_end(again)
    assert [each.architecture for each in again.evaluated] == [each.architecture for each in whole.evaluated]
    assert [each.metrics for each in again.evaluated] == [each.metrics for each in whole.evaluated]


def test_what_does_not_fit_is_refused(trained):
    with pytest.raises(UserError, match=r"family: got 'object'"):
        Searcher(family=object(), task=small_task(), settings=Settings(**QUICK), seed=0)
    joint = joint_space(family(), Settings(**QUICK))
    with pytest.raises(UserError, match=r"calibration: got an empty set"):
        QuantisedEvaluator(joint, trained.network_of, calibration=[], score=lambda network: {})
    with pytest.raises(UserError, match=r"trial.fidelity"):
        architecture = joint.with_policy(family().smallest(), INT8)
        trained.evaluator.evaluate(Trial(id=1, architecture=architecture, fidelity=0.5, parent=None, seed=0, info={}))
    wrong = QuantisedEvaluator(
        joint, lambda child: torch.nn.Linear(2, 2), calibration=[torch.zeros(2, 2)], score=lambda network: {}
    )
    with pytest.raises(UserError, match=r"sites: got"):
        wrong.result(joint.with_policy(family().smallest(), INT8))


def test_ranges_are_of_training_images_and_taken_once_for_a_child(trained, monkeypatch):
    calls = []

    def counted(model, batches, **settings):
        calls.append(sum(map(len, batches)))
        return activation_ranges(model, batches, **settings)

    monkeypatch.setattr("archsmith.evaluate.quantised.activation_ranges", counted)
    child: Architecture = trained.family.space.sample(np.random.default_rng(11))
    for policy in (INT8, FP32, LayerPolicy("int8", scheme="asymmetric")):
        trained.evaluate(trained.joint.with_policy(child, policy))
    assert calls == [12]


def test_a_supernet_that_still_learns_is_measured_anew():
    search = searcher(epochs=2)
    made = search.joint.with_policy(search.family.largest(), INT8)
    before = search.evaluate(made).metrics["valid_loss"]
    assert search.evaluate(made).metrics["valid_loss"] == before
    to_the_end_of_training(search)
    assert search.evaluate(made).metrics["valid_loss"] != before


def test_a_uniform_start_gives_half_of_the_first_batch_one_policy_throughout():
    search = searcher(start="uniform", population=8)
    trials = search.strategy.ask(8)
    assert len({trial.architecture.network_digest for trial in trials}) == len(trials) == 8
    uniform = [len(set(search.joint.policy(trial.architecture).values())) == 1 for trial in trials]
    assert uniform == [True] * 4 + [False] * 4
    precisions = {next(iter(search.joint.policy(trial.architecture).values())) for trial in trials[:4]}
    assert precisions == {INT8, LayerPolicy("int8", scheme="asymmetric"), FP32}
    published = searcher(population=8).strategy.ask(8)
    assert not all(len(set(search.joint.policy(trial.architecture).values())) == 1 for trial in published[:4])
