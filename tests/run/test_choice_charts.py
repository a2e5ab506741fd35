import json

import pytest

from archsmith.run.cell_picture import cell_picture, chain_picture, ordered
from archsmith.run.choice_charts import colours_of, entropy_and_cost, probabilities_over_time

EDGES = [{"name": f"{i} to 3", "options": ["none", "skip_connect", "conv"][: 3 - i % 2]} for i in range(6)]


def epoch(number):
    rows = [[0.2, 0.3, 0.5], [0.4, 0.6, 0.0]] * 3
    return {
        "epoch": number,
        "probabilities": {"cell": rows},
        "entropy": {"cell": 1.0 - 0.1 * number},
        "expected_macs": 2e6,
        "macs": 1e6,
    }


def test_every_operation_of_every_edge_has_a_line_of_its_own():
    figure = probabilities_over_time([epoch(0), epoch(1)], "cell", EDGES)
    assert len(figure["data"]) == 3 * 3 + 3 * 2
    assert [trace["name"] for trace in figure["data"] if trace["showlegend"]] == ["none", "skip_connect", "conv"]
    first = figure["data"][2]
    assert first["x"] == [1, 2] and first["y"] == [0.5, 0.5] and first["xaxis"] == "x"
    assert figure["data"][-1]["xaxis"] == "x6" and {"xaxis6", "yaxis6"} <= set(figure["layout"])
    domains = [figure["layout"][f"yaxis{n}"]["domain"] for n in ("", "5")]
    assert domains[0][0] > domains[1][1]  # the second row stands below the first
    assert all(0 <= low < high <= 1 for low, high in domains)
    json.dumps(figure, allow_nan=False)
    assert probabilities_over_time([epoch(0)], "cell", EDGES)["data"][0]["mode"] == "markers"


def test_entropy_and_cost():
    figure = entropy_and_cost([epoch(0), epoch(1)])
    assert [trace["y"] for trace in figure["data"]] == [[1.0, 0.9], [2.0, 2.0], [1.0, 1.0]]
    assert [trace.get("yaxis") for trace in figure["data"]] == [None, "y2", "y2"]


def test_colours_tell_operations_apart():
    colours = colours_of(["none", *(f"op{i}" for i in range(8))])
    assert colours["none"] == "var(--soft)" and len(set(colours.values())) == 9


def test_nodes_stand_behind_their_sources():
    arcs = [("1", "2", "a"), ("0", "1", "a"), ("0", "2", "b"), ("x", "0", "b")]
    assert ordered(arcs) == ["x", "0", "1", "2"]


def test_a_cell_is_drawn_with_all_its_edges():
    arcs = [("k-2", "0", "sep<5>"), ("k-1", "0", "skip"), ("0", "1", "skip"), ("k-2", "1", "sep<5>")]
    picture = cell_picture(arcs, {"sep<5>": "red", "skip": "blue"})
    assert picture.count("<path") == 4 and picture.count("<circle") == 4
    assert picture.count("sep&lt;5&gt;") == 2 and "sep<5>" not in picture
    with pytest.raises(KeyError):
        cell_picture(arcs, {"skip": "blue"})


def test_a_chain_is_a_row_of_boxes():
    picture = chain_picture([("block 1", "k3"), ("block 2", "none")], {"k3": "red"})
    assert picture.count('class="link"') == 2 and "block 2" in picture
