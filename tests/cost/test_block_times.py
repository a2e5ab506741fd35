"""Runtimes of layers beside their parent: what is shared by a round cancels, what is not is measured again."""

import pytest

from archsmith.cost.block_times import Load, load_rounds, of_parent, steadiest_layers
from archsmith.cost.latency import Latency, Provenance

WHERE = Provenance(
    **{name: {"int": 1, "str": "x"}.get(str(kind), ()) for name, kind in Provenance.__annotations__.items()}
)


def row(*samples, token=None):
    made = {"prefill": Latency(tuple(samples), (1.0,) * len(samples), 1, WHERE)}
    return made if token is None else {**made, "token": Latency(tuple(token), (1.0,) * len(samples), 1, WHERE)}


def test_a_load_is_a_prefill_and_its_tokens():
    phases = row(10.0, 20.0, token=(1.0, 2.0))
    assert load_rounds(phases, Load(generation=3)) == [13.0, 26.0]
    assert load_rounds(phases, Load()) == [10.0, 20.0]


def test_rounds_that_are_slow_for_both_cancel():
    # The machine is ten times as slow from the second round on, for both.
    rows = {"model parent": row(2.0, 20.0, 20.0, 20.0), "model child": row(1.0, 10.0, 10.0, 10.0)}
    assert of_parent(rows, "model child", Load()) == [0.5] * 4
    calls = []
    found = steadiest_layers(lambda: calls.append(1) or rows, Load())
    assert found is rows and len(calls) == 1


@pytest.mark.parametrize("steady_at", [1, 2, None])
def test_unsteady_ratios_are_measured_again(steady_at):
    steady = {"model parent": row(2.0, 2.0, 2.0, 2.0), "model child": row(1.0, 1.0, 1.0, 1.0)}
    wild = {"model parent": row(2.0, 2.0, 2.0, 2.0), "model child": row(1.0, 4.0, 1.0, 4.0)}
    milder = {"model parent": row(2.0, 2.0, 2.0, 2.0), "model child": row(1.0, 1.5, 1.0, 1.5)}
    given = [wild, milder, wild] if steady_at is None else [*[wild] * steady_at, steady]
    calls = iter(given)
    found = steadiest_layers(lambda: next(calls), Load())
    assert found is (milder if steady_at is None else steady)
    assert next(calls, None) is None, "neither fewer nor more measurements"
