import pytest

from archsmith.core.errors import UserError
from archsmith.space.quantisation import FP32, LayerPolicy, check_layers, policy_bytes


def test_words_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match=r"policy.precision: got 'int3'; allowed: fp32, bf16, int8"):
        LayerPolicy("int3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"policy.scheme"):
        LayerPolicy("int8", "per-channel", "odd")  # type: ignore[arg-type]


def test_json_is_a_way_back():
    policy = LayerPolicy("int8", "per-tensor", "asymmetric")
    assert LayerPolicy(**policy.to_json()) == policy  # type: ignore[arg-type]


def test_bytes_count_what_is_listed_by_its_bits_and_the_rest_by_four():
    elements = {"a": 100, "b": 30}
    assert policy_bytes(elements, 150, {}) == 600
    assert policy_bytes(elements, 150, {"a": LayerPolicy("int8")}) == 600 - 300
    assert policy_bytes(elements, 150, {"a": LayerPolicy("bf16"), "b": LayerPolicy("int8")}) == 200 + 30 + 80


def test_each_layer_that_goes_to_int8_makes_the_network_smaller():
    elements = {"a": 7, "b": 1, "c": 300}
    policy: dict[str, LayerPolicy] = {}
    sizes = [policy_bytes(elements, 400, policy)]
    for name in elements:
        policy[name] = LayerPolicy("int8")
        sizes.append(policy_bytes(elements, 400, policy))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_a_layer_that_does_not_exist_is_named_with_its_nearest():
    with pytest.raises(UserError, match=r"policy: got 'stem.con'.*Nearest: stem.conv"):
        check_layers({"stem.con": FP32}, {"stem.conv": 1, "head": 2})
