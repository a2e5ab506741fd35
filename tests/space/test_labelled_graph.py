from functools import partial

import numpy as np
import pytest
from flexibert_cases import cases

from archsmith.core.errors import UserError
from archsmith.families.flexibert_graph import encoder_graph, label_order, leading_overlap, plain_vector
from archsmith.families.flexibert_space import (
    FLEXIBERT_MINI,
    FlexiSpace,
    encoder_params,
    large_space,
    layers_from_model,
    nas_bench_bert,
)
from archsmith.predictors.graph_embedding import (
    learned_embedding,
    library_distances,
    row_distances,
    scaled_embedding,
    standardised,
    stress,
)
from archsmith.space.labelled_graph import LabelledGraph, edit_bound, edit_distance, graph_name

SPACE = FlexiSpace()
ORDER = label_order(SPACE)


def shuffled(graph, seed):
    places = np.random.default_rng(seed).permutation(len(graph.labels)).tolist()
    labels = [""] * len(places)
    for place, label in zip(places, graph.labels, strict=True):
        labels[place] = label
    return LabelledGraph(tuple(labels), tuple((places[a], places[b]) for a, b in graph.edges))


@pytest.mark.parametrize("case", cases("graph_"), ids=lambda case: case["name"])
def test_the_published_graphs(case):
    graph = encoder_graph(layers_from_model(case["input"]))
    assert (len(graph.labels), len(graph.edges)) == (case["expected"]["vertices"], case["expected"]["edges"])


def test_the_published_order_of_labels():
    assert cases("ged_node_index")[0]["expected"] == ORDER


@pytest.mark.parametrize("case", [c for c in cases("ged_") if "a" in c["input"]], ids=lambda case: case["name"])
def test_the_published_distances(case):
    first, second = (encoder_graph(layers_from_model(case["input"][key])) for key in "ab")
    assert edit_distance(first, second, ORDER) == pytest.approx(case["expected"], abs=1e-9)
    assert edit_distance(second, first, ORDER) == pytest.approx(case["expected"], abs=1e-9)


def test_distance_and_name_know_graphs_not_their_numbering():
    rng = np.random.default_rng(0)
    graphs = [encoder_graph(SPACE.layers(SPACE.space().sample(rng))) for _ in range(4)]
    for number, graph in enumerate(graphs):
        other = shuffled(graph, number)
        assert graph_name(other) == graph_name(graph)
        assert edit_distance(graph, other, ORDER) == pytest.approx(0, abs=1e-9)
    assert len({graph_name(graph) for graph in graphs}) == len(graphs)
    exact = edit_distance(graphs[0], graphs[1], ORDER)
    assert exact == pytest.approx(edit_distance(graphs[1], graphs[0], ORDER), abs=1e-9)
    assert 0 < exact <= edit_bound(graphs[0], graphs[1], ORDER) < 1.3 * exact


def test_one_more_head_costs_its_vertex_and_two_edges():
    two, four = (encoder_graph([layer._replace(heads=n) for layer in FLEXIBERT_MINI[:1]]) for n in (2, 4))
    label = two.labels[1]
    assert edit_distance(two, four, ORDER) == pytest.approx(2 * (ORDER[label] + 2 * 0.1))


def test_the_published_sizes_of_the_spaces():
    expected = cases("space_sizes")[0]["expected"]
    assert SPACE.level(1).space().size == expected["level1_two_layers_per_stack"]
    assert SPACE.level(2).space().size == expected["per_layer_uniform_ff"]
    assert SPACE.level(3).space().size == SPACE.space().size == expected["per_layer_hetero_ff"]
    one_stack = FlexiSpace(depths=(2,), stack=2, uniform_sizes=True).space().size
    assert one_stack == expected["per_stack"]


@pytest.mark.parametrize("settings", [SPACE, SPACE.level(1), nas_bench_bert(), large_space()], ids=lambda s: s.name)
def test_layers_and_architectures_are_one(settings):
    rng = np.random.default_rng(1)
    space = settings.space()
    drawn = [space.sample(rng) for _ in range(10)]
    assert all(settings.architecture(settings.layers(each)) == each for each in drawn)
    part = settings.between(settings.layers(drawn[0]), settings.layers(drawn[1])).space()
    assert part.contains(dict(drawn[0])) and part.contains(dict(drawn[1]))
    assert all(space.contains(dict(part.sample(rng))) for _ in range(10))


def test_parameters_in_closed_form():
    for row in cases("bert_param_counts")[0]["expected"]:
        kinds = {"SA": "sa", "LT": "l", "DSC": "c"}
        columns = list(zip(*row["layers"], strict=True))
        model = {
            "l": len(row["layers"]),
            "o": [kinds[kind] for kind in columns[0]],
            "p": [p if isinstance(p, int) else p.lower() for p in columns[1]],
            "h": [row["hidden"]] * len(row["layers"]),
            "n": list(columns[2]),
            "f": [[size] * count for size, count in zip(columns[3], columns[4], strict=True)],
        }
        assert encoder_params(layers_from_model(model)) == row["true_params"]


def test_the_embedding_is_nearer_to_the_distances_than_its_baselines():
    rng = np.random.default_rng(0)
    networks = [SPACE.layers(SPACE.space().sample(rng)) for _ in range(50)]
    distances = library_distances([encoder_graph(each) for each in networks], partial(edit_bound, order=ORDER))
    distances = (distances + distances.T) / 2
    rows = learned_embedding(distances, epochs=400, batch_size=128, learning_rate=0.01)
    naive = standardised(np.stack([plain_vector(each, SPACE) for each in networks]))
    upper = np.triu_indices(50, 1)
    apart = row_distances(naive)[upper]
    naive *= (apart * distances[upper]).sum() / (apart**2).sum()  # its best scale
    ours = stress(rows, distances)
    assert ours < 0.8 * stress(scaled_embedding(distances), distances) < 0.8 * stress(naive, distances)
    near = row_distances(rows) + np.diag(np.full(50, np.inf))
    assert distances[np.arange(50), near.argmin(axis=1)].mean() < 0.6 * distances[upper].mean()


def test_interpolated_distances_keep_what_was_computed():
    graphs = [LabelledGraph(tuple("a" * (n + 1)), ()) for n in range(30)]

    def distance(first, second):
        return float(abs(len(first.labels) - len(second.labels)))

    whole, sampled = library_distances(graphs, distance), library_distances(graphs, distance, share=0.05)
    np.testing.assert_allclose(sampled, whole, atol=1e-9)  # a plane on either side: linear interpolation is exact


def test_overlap_counts_from_the_front():
    other = FLEXIBERT_MINI[3]._replace(heads=2)
    assert leading_overlap(FLEXIBERT_MINI, FLEXIBERT_MINI) == 1
    assert leading_overlap(FLEXIBERT_MINI, (*FLEXIBERT_MINI[:3], other)) == 0.75
    assert leading_overlap(FLEXIBERT_MINI, (other, *FLEXIBERT_MINI[1:])) == 0
    assert leading_overlap(FLEXIBERT_MINI[:2], FLEXIBERT_MINI) == 0.5


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LabelledGraph(("a",), ((0, 1),)), "numbers of the 1 vertices"),
        (lambda: edit_distance(LabelledGraph(("x",), ()), LabelledGraph(("a",), ()), {"a": 0}), "a number for every"),
        (lambda: FlexiSpace(heads=(3,)), "divisors of the hidden size 128"),
        (lambda: FlexiSpace(operators=("c-4",)), "c-<odd kernel size>"),
        (lambda: FlexiSpace(depths=(3,), stack=2), "a divisor of every depth"),
        (lambda: learned_embedding(np.array([[0.0, 1.0], [2.0, 0.0]])), "symmetric matrix"),
    ],
)
def test_errors_say_what_is_allowed(make, text):
    with pytest.raises(UserError, match=text):
        make()
