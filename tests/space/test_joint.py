import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Categorical, Given, LayerPolicy, Ordinal, ProductSpace, When
from archsmith.space.joint import JointSpace, sites_of

MAIN = ProductSpace(
    "chain",
    {
        "depth": Ordinal([1, 2]),
        "kernel/0": Ordinal([3, 5]),
        "kernel/1": Given(When("depth", 2), Ordinal([3, 5])),
    },
)
SITES = {"block0": None, "block1": When("depth", 2), "head": None}
INT8, FP32 = LayerPolicy("int8"), LayerPolicy("fp32")


@pytest.fixture
def space():
    return JointSpace(MAIN, SITES, schemes=("symmetric", "asymmetric"))


def genes(**changed):
    base = {"depth": 1, "kernel/0": 3, "kernel/1": 3}
    for site in SITES:
        base |= {f"policy/{site}/precision": "int8", f"policy/{site}/scheme": "symmetric"}
    return base | changed


def test_it_holds_every_architecture_with_every_policy_of_its_layers(space):
    # Per layer: int8 with two schemes, or fp32. Depth 1: 2 kernels, 2 layers; depth 2: 4 kernels, 3 layers.
    assert space.size == 2 * 3**2 + 4 * 3**3 == len(list(space.enumerate()))
    assert space.log10_genotypes == pytest.approx(np.log10(2.0**3 * 2**3 * 2**3))


def test_genes_of_absent_layers_make_no_difference(space):
    first = space.from_genotype(genes())
    for path, value in (
        ("kernel/1", 5),
        ("policy/block1/precision", "fp32"),
        ("policy/block1/scheme", "asymmetric"),
    ):
        other = space.from_genotype(genes(**{path: value}))
        assert other == first and other.network_digest == first.network_digest
        assert np.array_equal(space.encode(other, "one-hot"), space.encode(first, "one-hot"))
        assert space.policy(other) == space.policy(first)
    for path, value in (("depth", 2), ("policy/head/precision", "fp32"), ("policy/block0/scheme", "asymmetric")):
        other = space.from_genotype(genes(**{path: value}))
        assert other != first
        assert not np.array_equal(space.encode(other, "one-hot"), space.encode(first, "one-hot"))


def test_the_scheme_of_a_layer_in_fp32_is_no_decision(space):
    made = space.from_genotype(genes(**{"policy/head/precision": "fp32", "policy/head/scheme": "asymmetric"}))
    assert "policy/head/scheme" not in made
    assert space.policy(made) == {"block0": INT8, "head": FP32}


def test_masks_and_parts(space):
    made = space.from_genotype(genes(depth=2))
    assert space.mask(made).tolist() == [True, True, True]
    assert space.mask(space.from_genotype(genes())).tolist() == [True, False, True]
    main = space.main_part(made)
    assert main == MAIN.validate({"depth": 2, "kernel/0": 3, "kernel/1": 3})
    assert space.with_policy(main, INT8) == made
    assert space.with_policy(main, {"block0": FP32, "block1": INT8, "head": INT8}) == space.from_genotype(
        genes(depth=2, **{"policy/block0/precision": "fp32"})
    )
    with pytest.raises(UserError, match=r"policy.*'block1' as well"):
        space.with_policy(main, {"block0": FP32, "head": INT8})


def test_mutations_never_touch_a_dead_gene(space):
    rng = np.random.default_rng(0)
    architecture = space.sample(rng)
    for _ in range(50):
        child = space.mutate(architecture, rng)
        assert child.network_digest != architecture.network_digest
        assert set(space.policy(child)) == set(space.active_sites(child))
        architecture = child


def test_the_networks_own_canonical_form_is_kept():
    main = ProductSpace("pair", {"a": Ordinal([1, 2]), "b": Ordinal([1, 2])}, canonical=lambda x: sorted(x.values()))
    joint = JointSpace(main, {"head": None})
    first, second = (joint.with_policy(main.validate({"a": a, "b": 3 - a}), INT8) for a in (1, 2))
    assert first != second and first.network_digest == second.network_digest
    assert joint.with_policy(main.validate({"a": 1, "b": 2}), FP32).network_digest != first.network_digest


def test_sites_are_found_by_taking_decisions_away():
    layers = {1: ["block0", "head"], 2: ["block0", "block1", "head"]}
    largest = MAIN.validate({"depth": 2, "kernel/0": 5, "kernel/1": 5})
    found = sites_of(MAIN, largest, lambda architecture: layers[architecture["depth"]])
    assert found == {"block0": None, "block1": When("depth", (2,)), "head": None}


def test_a_layer_may_hang_on_two_decisions():
    main = ProductSpace("two", {"in": Ordinal([8, 16]), "out": Ordinal([8, 16]), "other": Ordinal([1, 2])})
    largest = main.validate({"in": 16, "out": 16, "other": 2})

    def layers(x):
        return ["head", *(["project"] if x["in"] != x["out"] else [])]

    sites = sites_of(main, largest, layers)
    assert list(sites) == ["head", "project"] and sites["head"] is None
    joint = JointSpace(main, sites)
    for each in main.enumerate():
        assert joint.active_sites(each) == layers(each)


def test_layers_whose_existence_was_not_understood_are_refused():
    main = ProductSpace("many", {f"x/{i}": Ordinal(range(4)) for i in range(6)})
    with pytest.raises(UserError, match=r"layers: got \['odd'\]; allowed: layers that exist by a few decisions"):
        sites_of(
            main,
            main.validate({f"x/{i}": 3 for i in range(6)}),
            lambda x: ["head", *(["odd"] if sum(x.values()) % 2 else [])],
        )


def test_what_is_no_joint_space_is_refused():
    with pytest.raises(UserError, match=r"sites"):
        JointSpace(MAIN, {})
    with pytest.raises(UserError, match=r"precision choices"):
        JointSpace(MAIN, SITES, precisions=("int4",))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"main"):
        JointSpace(ProductSpace("taken", {"policy/x": Categorical(["a"])}), SITES)
    with pytest.raises(UserError, match=r"genotype: got 'depth'"):
        JointSpace(MAIN, SITES).from_genotype({})
