import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.predictors.latency import LatencyPredictor, corners, next_networks
from archsmith.space import Architecture, Categorical, Given, Ordinal, ProductSpace, When

SPACE = ProductSpace(
    "chain",
    {
        "depth": Ordinal([1, 2, 3]),
        **{
            f"block/{i}": Given(When("depth", list(range(i + 1, 4))), Categorical(["k3", "k5", "k7"])) for i in range(3)
        },
    },
)


def milliseconds(architecture):
    return 0.2 + sum({"k3": 0.1, "k5": 0.25, "k7": 0.6}[v] for p, v in architecture.items() if p != "depth")


def measured(n, seed, known=()):
    rng = np.random.default_rng(seed)
    networks = next_networks(SPACE, n, rng, known=known)
    return networks, [milliseconds(each) * float(np.exp(rng.normal(0, 0.01))) for each in networks]


@pytest.mark.parametrize("model", ["ridge", "svr", "boosting", "auto"])
def test_unseen_networks_are_predicted_about_as_well_as_measurements_repeat(model):
    seen, times = measured(26, 0)
    predictor = LatencyPredictor(SPACE, model=model)
    predictor.fit(seen, times)
    rest = [each for each in SPACE.enumerate() if each not in seen]
    predicted = predictor.predict(rest)
    errors = [abs(p - milliseconds(each)) / milliseconds(each) for p, each in zip(predicted.mean, rest, strict=True)]
    assert np.median(errors) < (0.08 if model in ("ridge", "auto") else 0.25)
    assert (predicted.std > 0).all()
    if model == "auto":
        assert predictor.chosen == min(predictor.errors, key=predictor.errors.get) and len(predictor.errors) == 3


def test_what_multiplies_is_learned_as_a_logarithm():
    space = ProductSpace("scaled", {f"width/{i}": Ordinal([1, 2, 4, 8]) for i in range(4)})
    seen = next_networks(space, 60, np.random.default_rng(0))

    def product(architecture):
        return 0.01 * float(np.prod([float(value) for value in architecture.values()]))

    predictor = LatencyPredictor(space, model="ridge")
    predictor.fit(seen, [product(each) for each in seen])
    assert predictor.logarithmic and predictor.errors["ridge"] < 0.01
    rest = [each for each in space.enumerate() if each not in seen]
    assert predictor.predict(rest).mean == pytest.approx([product(each) for each in rest], rel=0.05)


def test_it_is_saved_with_its_protocol_and_predicts_the_same_again(tmp_path):
    seen, times = measured(20, 1)
    predictor = LatencyPredictor(SPACE, provenance={"cpu": "one", "threads": 1}, seed=3)
    predictor.fit(seen, times)
    predictor.save(tmp_path / "p.json")
    again = LatencyPredictor.load(tmp_path / "p.json", SPACE)
    assert again.provenance == {"cpu": "one", "threads": 1} and again.chosen == predictor.chosen
    everything = list(SPACE.enumerate())
    assert np.array_equal(again.predict(everything).mean, predictor.predict(everything).mean)


def test_corners_are_the_uniform_settings():
    assert {tuple(each.values()) for each in corners(SPACE)} == {
        (1, "k3"),
        (3, "k7", "k7", "k7"),
        (2, "k5", "k5"),
    }


def test_next_networks_are_new_and_begin_with_the_corners():
    rng = np.random.default_rng(0)
    first = next_networks(SPACE, 10, rng)
    assert first[:3] == corners(SPACE) and len(set(first)) == 10
    more = next_networks(SPACE, 10, rng, known=first)
    assert not set(first) & set(more)
    assert len(next_networks(SPACE, 1000, rng)) == SPACE.size == 39


def test_half_of_the_next_networks_lie_near_a_front_where_there_is_one():
    best = SPACE.validate({"depth": 3, "block/0": "k3", "block/1": "k3", "block/2": "k3"})
    near = next_networks(SPACE, 12, np.random.default_rng(0), known=[best, *corners(SPACE)], front=[best], near=1.0)

    def changed(each: Architecture) -> int:
        return sum(each.get(path) != value for path, value in best.items())

    assert len(near) == 12 and np.mean([changed(each) <= 2 for each in near]) > 0.6


def test_what_cannot_be_learned_is_refused(tmp_path):
    seen, times = measured(6, 0)
    predictor = LatencyPredictor(SPACE)
    with pytest.raises(UserError, match="before fit"):
        predictor.predict(seen)
    with pytest.raises(UserError, match="at least 5"):
        predictor.fit(seen[:4], times[:4])
    with pytest.raises(UserError, match="positive"):
        predictor.fit(seen, [*times[:5], 0.0])
    with pytest.raises(UserError, match="model"):
        LatencyPredictor(SPACE, model="oracle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="format_version 1 of 'other'"):
        LatencyPredictor.from_json(predictor.to_json(), ProductSpace("other", {"a": Ordinal([1])}))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="readable JSON"):
        LatencyPredictor.load(tmp_path / "bad.json", SPACE)
    with pytest.raises(UserError, match="n: got 0"):
        next_networks(SPACE, 0, np.random.default_rng(0))
