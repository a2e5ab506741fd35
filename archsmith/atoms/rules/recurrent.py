"""LSTM, GRU and plain recurrent operators: one operator each for all layers and directions."""

from __future__ import annotations

import numpy as np
from torch import fx

from archsmith.atoms.labels import IntArray
from archsmith.atoms.propagate import Axes, Propagation, shape, values_of
from archsmith.atoms.rules.table import packet_name, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}


@rule(*GATES)
def recurrent(p: Propagation, node: fx.Node) -> list[Axes]:
    """X (.., i); per layer and direction w_ih (gates * h, i), w_hh (gates * h, h) and biases.

    The hidden units of all layers and directions are one width of the module, so unit j is removed from all of them.
    """
    given = p.arguments(node)
    count = len(values_of(node))
    gates = GATES[packet_name(node)]
    if "params" not in given or "batch_first" not in given:
        p.pin_inputs(node, "packed sequences have no rule")
        return [{} for _ in range(count)]
    x, params = given["input"], list(given["params"])
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    each = 4 if given["has_biases"] else 2
    directions = 2 if given["bidirectional"] else 1
    layers = int(given["num_layers"])
    if len(params) != each * directions * layers:
        p.pin_inputs(node, "projected states have no rule")
        return [{} for _ in range(count)]
    last = len(shape(x)) - 1
    incoming = p.on(x, last)
    hidden: IntArray | None = None
    for layer in range(layers):
        outputs: list[IntArray] = []
        for direction in range(directions):
            start = each * (layer * directions + direction)
            own = _cell(p, incoming, params[start : start + each], gates)
            if hidden is None:
                hidden = own
            else:
                p.meet(hidden, own)
            outputs.append(own)
        incoming = np.concatenate(outputs)
    assert hidden is not None and incoming is not None
    for state in states:
        rank = len(shape(state))
        if shape(state)[rank - 1] > 1:
            p.meet(hidden, p.on(state, rank - 1))
    found: list[Axes] = [{axis: labels for axis, labels in p.of(x).items() if axis != last}]
    found[0][last] = incoming
    for value in values_of(node)[1:]:
        found.append({len(value.shape) - 1: hidden} if value.shape[-1] > 1 else {})
    return found


def _cell(p: Propagation, incoming: IntArray | None, params: list[fx.Node], gates: int) -> IntArray:
    """Return the labels of the hidden units of one layer in one direction."""
    w_ih, w_hh, *biases = params
    if shape(w_ih)[1] > 1:
        p.meet(incoming, p.on(w_ih, 1), "is summed with an input of fixed width")
    width = shape(w_hh)[1]
    if width == 1:
        return np.zeros(1, dtype=np.int64)
    hidden = p.on(w_hh, 1)
    for tensor in (w_ih, w_hh, *biases):
        rows = p.on(tensor, 0)
        if rows is None:
            p.pin(hidden, "meets a tensor of fixed width")
            continue
        for gate in range(gates):
            p.meet(hidden, rows[gate * width : (gate + 1) * width])
    return hidden if hidden is not None else np.zeros(width, dtype=np.int64)


@rule(*CELLS)
def cell(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """One step of a recurrent layer: x (b, i), hx (b, h) or a pair of them."""
    given = p.arguments(node)
    x, states = given["input"], given["hx"]
    params = [given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if given.get(name) is not None]
    hidden = _cell(p, p.on(x, len(shape(x)) - 1), params, CELLS[packet_name(node)])
    for state in states if isinstance(states, list | tuple) else [states]:
        if shape(state)[-1] > 1:
            p.meet(hidden, p.on(state, len(shape(state)) - 1))
    found: list[Axes] = [{value.dim() - 1: hidden} if value.shape[-1] > 1 else {} for value in values_of(node)]
    return found if len(found) > 1 else found[0]
