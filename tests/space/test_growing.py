import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space.growing import Layer, block_match, edit_numbers, next_width


def brute(parent, child):
    """Return whether any sequence of edits leads from parent to child, by trying all (widths are 1, 2, 3)."""
    todo, seen = [tuple(parent)], set()
    while todo:
        now = todo.pop()
        if now == tuple(child):
            return True
        if now in seen or len(now) > len(child):
            continue
        seen.add(now)
        for i, layer in enumerate(now):
            if layer.width < 3:
                todo.append((*now[:i], Layer(layer.width + 1, layer.kind), *now[i + 1 :]))
            todo += [(*now[: i + 1], Layer(layer.width, kind), *now[i + 1 :]) for kind in (3, 5)]
    return False


def test_a_match_is_found_exactly_if_there_is_one():
    rng, found = np.random.default_rng(0), 0
    for _ in range(150):
        parent, child = (
            [Layer(int(rng.integers(1, 4)), int(rng.choice([3, 5]))) for _ in range(int(size))]
            for size in (rng.integers(1, 3), rng.integers(1, 5))
        )
        edits = block_match(0, parent, child)
        assert (edits is not None) == brute(parent, child), (parent, child)
        found += edits is not None
    assert 15 < found < 135


def test_new_layers_come_as_late_as_possible():
    """What is added behind a widened layer is an identity of the widened one; wider new layers are widened at last."""
    assert block_match(2, [Layer(4, 3)], [Layer(8, 3), Layer(8, 5)]) == [("widen", 2, 0, 8), ("deepen", 2, 0, 5)]
    assert block_match(0, [Layer(4)], [Layer(8), Layer(6), Layer(6)]) == [
        ("widen", 0, 0, 6),
        ("deepen", 0, 0),
        ("deepen", 0, 0),
        ("widen", 0, 0, 8),
    ]
    assert block_match(0, [Layer(4, 3)], [Layer(4, 3)]) == []
    assert block_match(0, [Layer(4, 3)], [Layer(4, 5)]) is None  # kernels do not change
    assert block_match(0, [Layer(4, 3), Layer(4, 3)], [Layer(4, 3)]) is None


def test_small_pieces():
    assert next_width(5, (4, 8, 16)) == 8 and next_width(16, (4, 8, 16)) is None
    assert edit_numbers(("deepen", 1, 2)) == (1, 2)
    with pytest.raises(UserError, match=r"edit: got \('widen', 0, True\); allowed: a name and integers"):
        edit_numbers(("widen", 0, True))
