from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from generators import decisions
from hypothesis import given

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, ProductSpace

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "space.json").read_text())


@given(decisions)
def test_json_round_trip_is_exact(values: dict[str, object]) -> None:
    architecture = Architecture(values, space="random")
    again = Architecture.from_json(json.dumps(architecture.to_json()))
    assert again == architecture
    assert hash(again) == hash(architecture)
    assert list(again.items()) == list(architecture.items())
    assert repr(again) == repr(architecture)  # tells 1, 1.0 and True apart
    assert copy.deepcopy(architecture) == architecture


@given(decisions, decisions)
def test_digests_agree_exactly_when_decisions_do(first: dict[str, object], second: dict[str, object]) -> None:
    one, two = (Architecture(values, space="random") for values in (first, second))
    assert (one.digest == two.digest) == (repr(sorted(one.items())) == repr(sorted(two.items())))


def test_digest_depends_on_type_space_and_not_on_order() -> None:
    digests = {Architecture({"a": value}, space="s").digest for value in (1, 1.0, True, "1", (1,), None)}
    assert len(digests) == 6
    assert Architecture({"a": 1}, space="s") != Architecture({"a": 1}, space="t")
    assert Architecture({"a": 1, "b": 2}, space="s") == Architecture({"b": 2, "a": 1}, space="s")
    assert Architecture({"a": -0.0}, space="s").digest == Architecture({"a": 0.0}, space="s").digest
    assert Architecture({"a": 1}, space="s") != {"a": 1}


@pytest.mark.parametrize("case", GOLDEN["digests"], ids=lambda case: case["name"])
def test_digests_are_golden(case: dict[str, object]) -> None:
    architecture = Architecture.from_json(case["architecture"])
    assert architecture.digest == case["digest"]


def test_digest_is_the_same_in_another_process() -> None:
    case = GOLDEN["digests"][0]
    text = json.dumps(case["architecture"])
    code = f"from archsmith.space import Architecture; print(Architecture.from_json({text!r}).digest)"
    for seed in ("1", "2"):
        run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert run.stdout.strip() == case["digest"], run.stderr


def test_plain_values_only() -> None:
    architecture = Architecture({"a": np.int64(3), "b": np.float64(0.5), "c": [1, [2]], "d": np.bool_(True)}, space="s")
    assert repr(architecture) == "Architecture({'a': 3, 'b': 0.5, 'c': (1, (2,)), 'd': True}, space='s')"
    for bad, message in [
        ({"a": math.nan}, r"architecture\['a'\]: got nan; allowed: finite numbers"),
        ({"a": math.inf}, "got inf"),
        ({"a": object()}, "allowed: None, bool, int, float, text"),
        ({3: 1}, "decision paths that are text"),
    ]:
        with pytest.raises(UserError, match=message):
            Architecture(bad, space="s")


def test_it_is_immutable() -> None:
    architecture = Architecture({"a": 1}, space="s")
    with pytest.raises(AttributeError, match=r"immutable"):
        architecture.space = "t"
    with pytest.raises(AttributeError, match=r"immutable"):
        del architecture.space
    with pytest.raises(TypeError):
        architecture["a"] = 2


def test_newer_versions_are_refused_clearly() -> None:
    data = Architecture({"a": 1}, space="s").to_json()
    with pytest.raises(UserError, match=r"architecture\.format_version: got 2; allowed: 1 to 1.*upgrade archsmith"):
        Architecture.from_json(data | {"format_version": 2})
    for version in (None, 0, "1", True):
        with pytest.raises(UserError, match=r"architecture\.format_version: got .*an integer from 1 to 1"):
            Architecture.from_json(data | {"format_version": version})
    with pytest.raises(UserError, match=r"architecture: got .*JSON text"):
        Architecture.from_json("{")
    with pytest.raises(UserError, match=r"architecture: got .*an object"):
        Architecture.from_json("[]")
    with pytest.raises(UserError, match=r"architecture\.space"):
        Architecture.from_json({"format_version": 1, "decisions": {}})


def test_equal_networks_have_equal_network_digests() -> None:
    def sorted_branches(architecture: Architecture) -> list[object]:
        return sorted(architecture.values(), key=str)

    elements = {"left": Categorical(["a", "b"]), "right": Categorical(["a", "b"])}
    space = ProductSpace("twins", elements, canonical=sorted_branches)
    one, two, three = (space.validate({"left": x, "right": y}) for x, y in ("ab", "ba", "aa"))
    assert one != two
    assert one.network_digest == two.network_digest != three.network_digest
    assert Architecture.from_json(one.to_json()).network_digest == one.network_digest
    plain = ProductSpace("twins", elements).validate({"left": "a", "right": "b"})
    assert plain.network_digest == plain.digest == one.digest

    swapped = ProductSpace("twins", elements, canonical=lambda a: plain)
    assert swapped.validate({"left": "b", "right": "b"}).network_digest == plain.digest
