"""Liveness against hand-computed peaks and against a slow literal version on random graphs."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archsmith.graph import Graph, Node, Value, export_graph, liveness, peak_activation

UNIT = 4 * 16  # bytes of one float32 tensor of 16 elements


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def peak(function, *inputs):
    return peak_activation(export_graph(Function(function), inputs)).bytes


def slow_live_bytes(graph):
    """Literal: at each node, sum every storage that exists already (or now) and is still needed (or needed now)."""
    state = {s for n in graph.nodes if n.kind == "state" for s in n.storages}
    result = []
    for now in range(len(graph.nodes)):
        total = 0
        for storage, size in enumerate(graph.storage_bytes):
            if storage in state:
                continue
            touches = [i for i, n in enumerate(graph.nodes) if storage in n.storages or storage in n.reads]
            is_input = any(n.kind == "input" and storage in n.storages for n in graph.nodes)
            is_output = any(n.kind == "output" and storage in n.reads for n in graph.nodes)
            if touches and (is_input or min(touches) <= now) and (is_output or now <= max(touches)):
                total += size
        result.append(total)
    return tuple(result)


x16 = torch.zeros(16)


def test_chain_needs_two_tensors_at_a_time():
    assert peak(lambda x: (x + 1).exp().sin().cos(), x16) == 2 * UNIT


def test_residual_keeps_its_input_alive():
    assert peak(lambda x: (x + 1).exp().sin() + x, x16) == 3 * UNIT


def test_concatenation_holds_parts_and_whole():
    def branches(x):
        return torch.cat([x.exp(), x.sin(), x.cos()])

    assert peak(branches, x16) == 6 * UNIT  # three parts and the whole; x died after cos (1 + 3 before)


def test_in_place_relu_makes_nothing():
    assert peak(lambda x: F.relu(x + 1) * 1.0, x16) == 2 * UNIT
    assert peak(lambda x: (x + 1).relu_(), x16) == 2 * UNIT
    chain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    graph = export_graph(chain, torch.zeros(1, 16))
    assert sum(node.operator == "aten.relu_.default" for node in graph.nodes) == 2
    calls = [live for node, live in zip(graph.nodes, liveness(graph).live_bytes, strict=True) if node.kind == "call"]
    assert calls == [2 * UNIT, UNIT, UNIT]


def test_view_keeps_its_base_alive():
    def through_view(x):
        y = x + 1
        view = y.view(4, 4).t()
        return view.exp() + view

    assert peak(through_view, x16) == 3 * UNIT  # y (through the view), exp, sum; not a copy for view and transpose


def test_reshape_that_copies_is_a_tensor_of_its_own():
    graph = export_graph(Function(lambda x: (x + 1).view(4, 4).t().reshape(16)), x16)
    sizes = {node.name: [graph.storage_bytes[s] for s in node.storages] for node in graph.nodes}
    storages = {node.name: node.storages for node in graph.nodes}
    assert storages["t"] == storages["view"] == storages["add"]
    assert storages["reshape"] != storages["t"] and sizes["reshape"] == [UNIT]


def test_expanded_tensor_counts_what_it_holds():
    assert peak(lambda x: x.sum().expand(1000) * 1.0, x16) == 4 + 4000


def test_outputs_stay_alive_and_weights_do_not_count():
    def two_outputs(x):
        early = x.exp()
        return early, early.sin().cos()

    assert peak(two_outputs, x16) == 3 * UNIT
    assert peak_activation(export_graph(nn.Linear(16, 16), torch.zeros(1, 16))).bytes == 2 * UNIT


def test_returned_input_and_unread_input():
    assert peak(lambda x, y: (x, x.exp().sin()), x16, x16.clone()) == 3 * UNIT
    graph = export_graph(Function(lambda x, y: x.exp()), (x16, x16.clone()))
    assert liveness(graph).live_bytes == (2 * UNIT, 2 * UNIT, 2 * UNIT, UNIT)


def test_result_never_taken_is_freed_at_once():
    def second_of_two(x):
        values, _ = x.sort()
        return values.exp().sin()

    assert peak(second_of_two, x16) == UNIT + UNIT + 2 * UNIT  # x, values, and 16 int64 indices while sort runs
    graph = export_graph(Function(second_of_two), x16)
    assert peak_activation(graph).operator.startswith("aten.sort")
    live = dict(zip([node.operator for node in graph.nodes], liveness(graph).live_bytes, strict=True))
    assert live["getitem"] == UNIT  # taking the values does not keep the indices


def test_peak_names_its_layer():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 100), nn.Linear(100, 1))
    found = peak_activation(export_graph(net, torch.zeros(1, 4)))
    assert (found.bytes, found.operator, found.module) == (4 * 104, "aten.linear.default", "1")


def test_empty_graph():
    assert peak_activation(Graph((), ())).bytes == 0


@st.composite
def graphs(draw):
    """Random execution: inputs, state, then calls that read some storages and make, alias or mix them."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=3, max_size=12))
    nodes = [Node("in0", "input", values=(Value((), "f", 0),)), Node("w", "state", values=(Value((), "f", 1),))]
    known = [0, 1]
    for fresh in range(2, len(sizes)):
        reads = tuple(draw(st.lists(st.sampled_from(known), unique=True, max_size=3)))
        made = [fresh] if draw(st.booleans()) else []
        aliases = draw(st.lists(st.sampled_from(reads), unique=True, max_size=2)) if reads else []
        known += made
        values = tuple(Value((), "f", s) for s in (*made, *aliases))
        nodes.append(Node(f"call{fresh}", "call", "op", reads=reads, values=values))
    returned = tuple(draw(st.lists(st.sampled_from(known), unique=True, max_size=3)))
    return Graph((*nodes, Node("output", "output", reads=returned)), tuple(sizes))


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_equals_the_slow_version_on_random_graphs(graph):
    assert liveness(graph).live_bytes == slow_live_bytes(graph)
    assert peak_activation(graph).bytes == max(slow_live_bytes(graph))


def test_equals_the_slow_version_on_a_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.lstm = nn.LSTM(8, 4, batch_first=True)

        def forward(self, x):
            y = F.relu_(self.norm(self.conv(x)))
            a, b = y.chunk(2, dim=1)
            y = torch.cat([a, b * a], 1) + y
            return self.lstm(y.flatten(2).transpose(1, 2))[0].mean(1)

    graph = export_graph(Net(), torch.zeros(2, 3, 6, 6))
    assert liveness(graph).live_bytes == slow_live_bytes(graph)
