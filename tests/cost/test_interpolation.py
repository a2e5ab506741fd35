import pytest

from archsmith.core.errors import UserError
from archsmith.cost.interpolation import InterpolatedRow
from archsmith.cost.lookup import Row


def test_measured_sizes_are_given_as_measured_and_others_between_their_neighbours():
    row = InterpolatedRow({8: Row(1.0, 0.1, 20), 24: Row(3.0, 0.1, 20), 16: Row(1.5, 0.2, 20)})
    assert row.at(16) == Row(1.5, 0.2, 20)
    assert row.at(12).mean == pytest.approx(1.25)
    assert row.at(20).mean == pytest.approx(2.25)
    assert row.at(20).count == 0
    assert row.at(20).std == pytest.approx((0.1**2 + 0.05**2) ** 0.5)


def test_the_error_is_that_of_sizes_left_out():
    line = InterpolatedRow({n: Row(2.0 * n + 1) for n in (8, 16, 32, 64)})
    assert line.median_error == pytest.approx(0)
    steps = InterpolatedRow({8: Row(1.0), 16: Row(1.0), 24: Row(3.0), 32: Row(3.0)})
    assert steps.errors == pytest.approx((1.0, 1 / 3))
    assert InterpolatedRow({1: Row(1.0), 2: Row(2.0)}).median_error is None


def test_nothing_is_extrapolated():
    row = InterpolatedRow({8: Row(1.0), 16: Row(2.0)})
    for size in (7, 17):
        with pytest.raises(UserError, match=f"size: got {size}; allowed: 8 to 16"):
            row.at(size)
    with pytest.raises(UserError, match="at least two"):
        InterpolatedRow({8: Row(1.0)})


def test_json_is_a_way_back():
    row = InterpolatedRow({8: Row(1.0, 0.1, 20), 16: Row(1.5, 0.2, 20)})
    assert InterpolatedRow.from_json(row.to_json()) == row
    with pytest.raises(UserError, match="points"):
        InterpolatedRow.from_json({"8": 3})
