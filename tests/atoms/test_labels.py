import numpy as np

from archsmith.atoms.labels import Cause, Labels

HERE = Cause("op", "module", "because")


def dead_positions(labels: Labels, axis, units) -> list[int]:
    dead = np.zeros(len(labels), dtype=bool)
    dead[labels.roots(np.asarray(units))] = True
    return np.flatnonzero(labels.dead(axis, dead)).tolist()


def test_join_is_transitive_and_remembers_pins():
    labels = Labels()
    a, b, c = labels.fresh(4), labels.fresh(4), labels.fresh(4)
    labels.join(a, b, HERE)
    labels.join(b[::-1], c, HERE)
    assert dead_positions(labels, c, a[:1]) == [3]
    labels.join(c[:1], np.zeros(1, dtype=np.int64), HERE)
    assert labels.pinned(a).tolist() == [False, False, False, True]
    assert labels.cause(int(b[3])) is HERE


def test_a_view_factors_and_a_merge_gives_the_pairs_back():
    labels = Labels()
    flat = labels.fresh(6)
    rows, columns = labels.factor(flat.reshape(2, 3), HERE)
    assert dead_positions(labels, flat, rows[1:]) == [3, 4, 5]
    assert dead_positions(labels, flat, columns[:1]) == [0, 3]
    again = labels.product([np.repeat(rows, 3), np.tile(columns, 2)])
    assert np.array_equal(labels.roots(again), labels.roots(flat))


def test_transposed_pairs_are_the_same_pairs():
    labels = Labels()
    flat = labels.fresh(6)
    rows, columns = labels.factor(flat.reshape(2, 3), HERE)
    shuffled = labels.product([np.repeat(columns, 2), np.tile(rows, 3)])
    assert np.array_equal(labels.roots(shuffled), labels.roots(flat.reshape(2, 3).T.ravel()))


def test_rows_meet_rows_and_columns_columns():
    labels = Labels()
    a, b = labels.fresh(12), labels.fresh(12)
    rows_a, columns_a = labels.factor(a.reshape(3, 4), HERE)
    rows_b, columns_b = labels.factor(b.reshape(3, 4), HERE)
    labels.join(a, b, HERE)
    assert np.array_equal(labels.roots(rows_a), labels.roots(rows_b))
    assert np.array_equal(labels.roots(columns_a), labels.roots(columns_b))
    assert len(np.unique(labels.roots(np.concatenate([rows_a, columns_a])))) == 7


def test_nested_views_refine():
    labels = Labels()
    flat = labels.fresh(12)
    _, columns = labels.factor(flat.reshape(3, 4), HERE)
    rows, halves, inner = labels.factor(flat.reshape(3, 2, 2), HERE)
    assert dead_positions(labels, columns, halves[:1]) == [0, 1]
    assert dead_positions(labels, flat, inner[1:]) == [1, 3, 5, 7, 9, 11]
    assert dead_positions(labels, flat, rows[:1]) == [0, 1, 2, 3]


def test_a_coarse_product_meets_a_fine_one():
    labels = Labels()
    a, b = labels.fresh(12), labels.fresh(12)
    rows, columns = labels.factor(a.reshape(3, 4), HERE)
    others = labels.factor(b.reshape(3, 2, 2), HERE)
    labels.join(a, b, HERE)
    assert np.array_equal(labels.roots(rows), labels.roots(others[0]))
    assert dead_positions(labels, columns, others[1][:1]) == [0, 1]


def test_factorings_that_do_not_nest_collapse_to_what_both_allow():
    """Twelve as 3 x 4 and as 2 x 6: what may go is every second position, in both."""
    labels = Labels()
    flat = labels.fresh(12)
    _, columns = labels.factor(flat.reshape(3, 4), HERE)
    labels.factor(flat.reshape(2, 6), HERE)
    leaves = {leaf for label in labels.roots(flat).tolist() for leaf in labels.leaves(label)}
    for leaf in leaves:
        gone = set(dead_positions(labels, flat, [leaf]))
        assert len(gone) in (6, 12)  # the even ones, the odd ones, or all
        assert len({len(gone & set(range(6 * r, 6 * r + 6))) for r in range(2)}) == 1
        assert len({len(gone & set(range(4 * r, 4 * r + 4))) for r in range(3)}) == 1
    assert dead_positions(labels, columns, columns[:1]) == [0, 2]


def test_a_pinned_position_pins_its_row_and_column():
    labels = Labels()
    flat = labels.fresh(6)
    rows, columns = labels.factor(flat.reshape(2, 3), HERE)
    labels.pin(flat[4:5], HERE)
    assert labels.pinned(rows).tolist() == [False, True]
    assert labels.pinned(columns).tolist() == [False, True, False]
    assert not labels.pinned(flat[:1])[0]


def test_random_joins_keep_products_consistent():
    """Whatever was united: positions of one class die together under any choice of dead units."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        labels = Labels()
        axes = [labels.fresh(12) for _ in range(3)]
        for _ in range(6):
            axis = axes[rng.integers(3)]
            shape = [(3, 4), (4, 3), (2, 6), (2, 2, 3), (3, 2, 2)][rng.integers(5)]
            if rng.random() < 0.5:
                labels.factor(axis.reshape(shape), HERE)
            else:
                order = rng.permutation(len(shape))
                moved = axis.reshape(shape).transpose(order).ravel()
                labels.join(moved, axes[rng.integers(3)], HERE)
        units = sorted({leaf for axis in axes for r in labels.roots(axis).tolist() for leaf in labels.leaves(r)})
        dead = np.zeros(len(labels), dtype=bool)
        dead[[u for u in units if rng.random() < 0.3]] = True
        for axis in axes:
            roots, gone = labels.roots(axis), labels.dead(axis, dead)
            for root in np.unique(roots):
                assert len(set(gone[roots == root].tolist())) == 1
