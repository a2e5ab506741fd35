from __future__ import annotations

import re

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import (
    AtLeast,
    Categorical,
    Count,
    Given,
    Invalid,
    Ordinal,
    ProductSpace,
    Real,
    Repeat,
    Subset,
    When,
)


def mixed() -> ProductSpace:
    on = When("op", "conv")
    elements = {
        "op": Categorical(["conv", "pool"]),
        "kernel": Given(on, Ordinal([3, 5])),
        "rate": Given(on, Real(-1.0, 1.0)),
        "parts": Given(on, Subset(["a", "b"])),
        "lr": Real(0.0, 1.0),
    }
    return ProductSpace("mixed", elements)


CONV = {"op": "conv", "kernel": 5, "rate": 0.0, "parts": (), "lr": 0.1}
POOL = {"op": "pool", "lr": 0.1}


def test_layout_is_as_documented() -> None:
    space = mixed()
    assert space.columns("one-hot") == [
        "op='conv'",
        "op='pool'",
        "kernel=3",
        "kernel=5",
        "rate?",
        "rate",
        "parts?",
        "parts:'a'",
        "parts:'b'",
        "lr",
    ]
    assert space.encode(space.validate(CONV), "one-hot").tolist() == [1, 0, 0, 1, 1, 0.0, 1, 0, 0, 0.1]
    assert space.encode(space.validate(POOL), "one-hot").tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0.1]
    assert space.columns("ordinal") == ["op", "kernel", "rate?", "rate", "parts:'a'", "parts:'b'", "lr"]
    assert space.encode(space.validate(CONV), "ordinal").tolist() == [0, 1, 1, 0, 0, 0, 0.1]
    assert space.encode(space.validate(POOL), "ordinal").tolist() == [1, -1, 0, 0, -1, -1, 0.1]


def test_inactive_and_empty_are_told_apart() -> None:
    space = mixed()
    for kind in ("one-hot", "ordinal"):
        for decisions in (CONV, POOL):
            architecture = space.validate(decisions)
            assert space.decode(kind, space.encode(architecture, kind)) == architecture
    assert space.activity(space.validate(POOL)).tolist() == [True, False, False, False, True]


def test_rows_equal_single_encodings() -> None:
    space = mixed()
    many = space.sample_many(np.random.default_rng(0), 50)
    for kind in ("one-hot", "ordinal"):
        assert (space.encode_many(many, kind) == np.stack([space.encode(each, kind) for each in many])).all()
    assert space.encode_many([], "one-hot").shape == (0, 10)


@pytest.mark.parametrize(
    ("kind", "column", "value", "reason"),
    [
        ("one-hot", 0, 0.5, "'op': the columns are not one-hot"),
        ("one-hot", 1, 1.0, "'op': the columns are not one-hot"),
        ("one-hot", 0, 0.0, r"architecture\['op'\]: got None"),
        ("one-hot", 4, 0.3, "'rate': the activity column"),
        ("one-hot", 4, 0.0, r"architecture\['rate'\]: got None"),
        ("one-hot", 7, 0.3, "'parts': the membership columns"),
        ("one-hot", 9, 7.0, r"architecture\['lr'\]: got 7.0; allowed: a float from 0.0 to 1.0"),
        ("one-hot", 9, np.nan, "NaN or infinity"),
        ("ordinal", 0, 2.0, "'op': got 2.0, an option's number from 0 to 1"),
        ("ordinal", 1, 0.5, "'kernel': got 0.5"),
        ("ordinal", 0, 1.0, "unknown or inactive"),
    ],
)
def test_arrays_without_architecture_are_invalid(kind: str, column: int, value: float, reason: str) -> None:
    space = mixed()
    row = space.encode(space.validate(CONV), kind)
    row[column] = value
    found = space.decode(kind, row)
    assert isinstance(found, Invalid)
    assert not found
    assert re.search(reason, found.reason)


def test_constraints_hold_for_decoded_arrays() -> None:
    space = ProductSpace("s", {"a": Count(0, 1), "b": Count(0, 1)}, constraints=[AtLeast(["a", "b"], 1)])
    found = space.decode("ordinal", np.array([0.0, 0.0]))
    assert isinstance(found, Invalid)
    assert "constraints rule it out" in found.reason


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(UserError, match=r"array: got 'shape \(3,\)'; allowed: shape \(10,\)"):
        mixed().decode("one-hot", np.zeros(3))


def stack() -> ProductSpace:
    layer = {"op": Categorical(["conv", "pool"]), "kernel": Given(When("op", "conv"), Ordinal([3, 5]))}
    return ProductSpace("stack", {"net": Repeat(Count(1, 3), layer)})


def test_path_encoding_forgets_positions() -> None:
    space = stack()
    assert space.columns("path") == [
        "net/count=1",
        "net/count=2",
        "net/count=3",
        "net/*/op='conv'",
        "net/*/op='pool'",
        "net/*/kernel=3",
        "net/*/kernel=5",
    ]
    one = space.validate({"net/count": 2, "net/0/op": "conv", "net/0/kernel": 5, "net/1/op": "pool"})
    two = space.validate({"net/count": 2, "net/0/op": "pool", "net/1/op": "conv", "net/1/kernel": 5})
    assert space.encode(one, "path").tolist() == space.encode(two, "path").tolist() == [0, 1, 0, 1, 1, 0, 1]
    found = space.decode("path", space.encode(one, "path"))
    assert isinstance(found, Invalid)
    assert found.reason.startswith("ambiguous: the decisions of group 'net/*/op' took ['conv', 'pool']")


def test_path_encoding_decodes_exactly_where_it_is_unambiguous() -> None:
    space = stack()
    everything = list(space.enumerate())
    rows = {architecture: space.encode(architecture, "path").tobytes() for architecture in everything}
    sharing = {row: [a for a in everything if rows[a] == row] for row in rows.values()}
    for architecture, row in rows.items():
        found = space.decode("path", np.frombuffer(row))
        assert found == architecture if len(sharing[row]) == 1 else isinstance(found, Invalid)
    for wrong in ([0, 1, 0, 3, 0, 3, 0], [0, 0.5, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]):
        assert isinstance(space.decode("path", np.array(wrong, dtype=float)), Invalid)
    with pytest.raises(UserError, match=r"kind: got 'path'; allowed: 'one-hot' or 'ordinal'\. 'rate' is a real number"):
        mixed().columns("path")
