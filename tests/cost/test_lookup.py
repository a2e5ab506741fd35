"""A network's predicted cost is the sum of its rows: by hand, and on two published tables of phone latencies."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable, Row, read_lookup_table

HAND = LookupTable(
    {"conv": Row(2.0, 0.3, 10), "pool": Row(0.5, 0.4, 10), "skip": Row(0.0)}, device="phone", overhead=0.25
)


def test_the_sum_of_rows_and_the_overhead_once() -> None:
    assert HAND.cost([]) == 0.25
    assert HAND.cost(["conv", "pool", "conv"]) == 2 + 0.5 + 2 + 0.25
    assert HAND.cost(["conv"] * 3) - HAND.cost(["conv"] * 2) == pytest.approx(2.0)
    assert HAND.std(["conv", "pool"]) == pytest.approx(0.5)
    assert math.isnan(HAND.std(["conv", "skip"]))
    assert len(HAND) == 3


def test_a_missing_row_is_never_guessed() -> None:
    with pytest.raises(
        UserError, match=r"operator: got 'conw'; allowed: one of the 3 measured on phone. Nearest: .*conv"
    ):
        HAND.cost(["conv", "conw"])
    with pytest.raises(UserError, match="operator: got 'dense'"):
        HAND.std(["dense"])


def test_scale_and_overhead_come_from_whole_networks() -> None:
    networks = [["conv"], ["conv", "pool"], ["conv"] * 3, ["pool"] * 2]
    measured = [0.7 * HAND.cost(keys) + 1.5 for keys in networks]  # on top of the overhead of 0.25
    fitted = HAND.fitted(networks, measured)
    assert (fitted.scale, fitted.overhead) == (pytest.approx(0.7), pytest.approx(0.7 * 0.25 + 1.5))
    assert [fitted.cost(keys) for keys in networks] == pytest.approx(measured)
    for bad in ([["conv"]], [["conv"], ["conv"]]):
        with pytest.raises(UserError, match="at least two with different sums"):
            HAND.fitted(bad, [1.0] * len(bad))
    with pytest.raises(UserError, match="costs that grow with the sums"):
        HAND.fitted([["conv"], ["pool"]], [1.0, 2.0])


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one row"):
        LookupTable({}, device="phone")
    for cost in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="row 'a'"):
            LookupTable({"a": Row(cost)}, device="phone")
    with pytest.raises(UserError, match="scale, overhead"):
        LookupTable({"a": Row(1.0)}, device="phone", scale=0.0)
    file = tmp_path / "table.json"
    with pytest.raises(UserError, match="a readable JSON file"):
        read_lookup_table(file, device="phone")
    file.write_text("[1, 2]")
    with pytest.raises(UserError, match="'entries', or 'tables'"):
        read_lookup_table(file, device="phone")
    file.write_text(json.dumps({"tables": {"160": {"a": {"mean": 1.0, "std": 0.5, "count": 3}}}}))
    with pytest.raises(UserError, match=r"part: got None; allowed: one of \['160'\]"):
        read_lookup_table(file, device="phone")
    assert read_lookup_table(file, device="phone", part="160").rows == {"a": Row(1.0, 0.5, 3)}
    file.write_text(json.dumps({"entries": {"a": {"mean": 1.0, "var": 0.25, "count": 3}}}))
    assert read_lookup_table(file, device="phone").rows == {"a": Row(1.0, 0.5, 3)}
    with pytest.raises(UserError, match="None: the file has a single table"):
        read_lookup_table(file, device="phone", part="160")


STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
"""Width, layers and first stride of the stages of the ProxylessNAS space (arXiv 1812.00332)."""


def block(size: int, into: int, out: int, expand: int, kernel: int, stride: int) -> str:
    after, skip = size // stride, int(stride == 1 and into == out)
    shapes = f"input:{size}x{size}x{into}-output:{after}x{after}x{out}"
    return f"expanded_conv-{shapes}-expand:{expand}-kernel:{kernel}-stride:{stride}-idskip:{skip}"


def proxylessnas_keys(kernel: int, expand: int) -> list[str]:
    """Keys of the network of the space that takes one operator everywhere, at 224 x 224."""
    keys = ["Conv-input:224x224x3-output:112x112x32", block(112, 32, 16, 1, 3, 1)]
    size, into = 112, 16
    for width, layers, first in STAGES:
        for layer in range(layers):
            stride = first if layer == 0 else 1
            keys.append(block(size, into, width, expand, kernel, stride))
            size, into = size // stride, width
    return [*keys, "Conv_1-input:7x7x320-output:7x7x1280", "Logits-input:7x7x1280-output:1000"]


@pytest.mark.parametrize(
    ("kernel", "expand", "expected"), [(3, 3, 76.0481185913086), (5, 6, 158.9527130126953), (7, 6, 191.02989196777344)]
)
def test_stacks_of_the_proxylessnas_table(kernel: int, expand: int, expected: float) -> None:
    """The expected values were summed once, in single precision, by an independent script on the published table."""
    folder = shared_data("nas-benchmarks")
    file = folder / "latency-table-mobile-proxylessnas.json"
    table = read_lookup_table(file, device="Pixel 1")
    keys = proxylessnas_keys(kernel, expand)
    entries = json.loads(file.read_text())["entries"]
    assert len(keys) == 25
    assert table.cost(keys) == pytest.approx(sum(entries[key]["mean"] for key in keys), rel=1e-12)
    assert table.cost(keys) == pytest.approx(expected, rel=1e-6)
    assert table.std(keys) == pytest.approx(math.sqrt(sum(entries[key]["var"] for key in keys)))


def test_the_released_network_is_not_in_the_table_of_the_search() -> None:
    """Its first stage is 32 wide, the table's is 24: an error that names the row, not a number."""
    folder = shared_data("nas-benchmarks")
    table = read_lookup_table(folder / "latency-table-mobile-proxylessnas.json", device="Pixel 1")
    blocks = json.loads((folder / "proxylessnas-architectures.json").read_text())["nets"]["mobile"]["blocks"]
    first = next(each for each in blocks[1:] if each != "zero")
    missing = block(112, first["in"], first["out"], first["e"], first["k"], first["s"])
    with pytest.raises(UserError, match=r"operator: got 'expanded_conv-input:112x112x16-output:56x56x32.*Nearest: "):
        table.cost([*proxylessnas_keys(3, 3)[:2], missing])


@pytest.mark.parametrize("part", ["160", "176", "192", "208", "224"])
def test_any_stack_of_the_note10_table_is_the_sum_of_its_rows(part: str) -> None:
    file = shared_data("nas-benchmarks") / "latency-table-note10-ofa.json"
    table = read_lookup_table(file, device="Note10", part=part)
    entries = json.loads(file.read_text())["tables"][part]
    rng = np.random.default_rng(int(part))
    keys = [str(key) for key in rng.choice(sorted(entries), size=30)]
    assert table.cost(keys) == pytest.approx(sum(entries[key]["mean"] for key in keys), rel=1e-12)
    halves = table.cost(keys[:13]) + table.cost(keys[13:])
    assert halves == pytest.approx(table.cost(keys), rel=1e-12)
    assert table.std(keys) == pytest.approx(math.sqrt(sum(entries[key]["std"] ** 2 for key in keys)))
