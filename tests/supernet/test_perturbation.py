import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.families.darts_space import edges_of
from archsmith.layers.darts import Noise
from archsmith.supernet.mixed import MixedOp
from archsmith.supernet.perturbation import Perturbation, optimal_mixture
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.supernet.selection import magnitude

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "darts-pt.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
TARGETS = tuple(target for _, target in edges_of())
SPACES = {
    "s5": (
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
    "s2": ("skip_connect", "sep_conv_3x3"),
}


def selection(operations=SPACES["s5"], **settings):
    options = dict.fromkeys(("normal", "reduce"), (operations,) * 14)
    given = {"targets": dict.fromkeys(options, TARGETS), "per_node": 2, "interval": 5, **settings}
    return Perturbation(options, **given)


def alpha(operations, scale):
    rows = [[scale * math.sin(1 + e + 0.3 * k * k) for k in range(operations)] for e in range(14)]
    return torch.tensor(rows, dtype=torch.float64).softmax(1).tolist()


def value(mixing, phase):
    """Return the linear surrogate of the accuracy."""
    return sum(
        (abs(math.sin(phase[group] + 1.7 * e + 2.3 * k * k)) + 0.05) * weight
        for group, rows in mixing.items()
        for e, row in enumerate(rows)
        for k, weight in enumerate(row)
    )


PHASES = {"normal": 0.4, "reduce": 1.1}


def linear(mixing):
    accuracy = value(mixing, PHASES)
    return accuracy, -accuracy


def kept(select):
    """Return (operation, source) of the kept edges, by increasing source."""
    return {
        group: [[name, source] for name, (source, _) in zip(names, edges_of(), strict=True) if name is not None]
        for group, names in select.operations().items()
    }


@pytest.mark.parametrize("interval", [5, 1])
def test_the_schedule_with_a_topology_phase(interval):
    case = CASES[f"schedule:E14:N3:intv{interval}"]
    select = selection(interval=interval)
    assert [[event.epoch, event.kind] for event in select.events] == case["expected"]["events"]
    assert select.epochs == case["expected"]["tune_epochs"] == interval * (14 + 3 - 1) + 1


def test_the_schedule_without_one():
    case = CASES["schedule201:E6:intv5"]["expected"]
    select = Perturbation({"cell": [("a", "b")] * 6}, interval=5)
    assert [event.epoch for event in select.events] == case["epochs"]
    assert select.epochs == case["tune_epochs"]
    short = Perturbation({"cell": [("a", "b")] * 6}, interval=1)
    assert [event.epoch for event in short.events] == [0, 1, 2, 3, 4, 5]
    assert Perturbation({"cell": [("a", "b")]}, interval=5).epochs == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("criterion", ["acc", "loss"])
@pytest.mark.parametrize("name", ["projection:s5:alpha_scale0.5", "projection:s2:alpha_scale1.0"])
def test_a_linear_surrogate_is_decided_the_same_in_every_order(name, criterion, seed):
    case = CASES[name]
    operations, scale = SPACES[case["input"]["space"]], float(name.rpartition("scale")[2])
    mixing = {"normal": alpha(len(operations), scale), "reduce": alpha(len(operations), -scale)}
    select = selection(operations, criterion=criterion, seed=seed)
    calls = 0

    def evaluate(asked):
        nonlocal calls
        calls += 1
        return linear(asked)

    epochs = []
    for epoch in range(select.epochs):
        while select.due(epoch):
            assert select.decide(mixing, evaluate)
            epochs.append(epoch)
    assert epochs == [event.epoch for event in select.events] and select.done
    for group in mixing:
        chosen = [select.chosen[group][edge] for edge in range(14)]
        assert chosen == case["expected"]["ops_per_edge"][group]
        assert kept(select)[group] == case["expected"][group]
        # What was selected is what magnitude finds in M * softmax(alpha).
        strength = [
            [weight * (abs(math.sin(PHASES[group] + 1.7 * e + 2.3 * k * k)) + 0.05) for k, weight in enumerate(row)]
            for e, row in enumerate(mixing[group])
        ]
        assert chosen == [row.index(max(row)) for row in strength]
    assert calls == select.evaluations == case["expected"]["n_infer_calls"] == 2 * (14 * len(operations) + 22)


def test_the_order_is_random_and_named_by_the_seed():
    def order(seed):
        select = selection(SPACES["s2"], seed=seed)
        mixing = {group: alpha(2, 1.0) for group in PHASES}
        edges = []
        while not select.done:
            before = {group: set(chosen) for group, chosen in select.chosen.items()}
            select.decide(mixing, linear)
            edges.append(tuple(tuple(set(select.chosen[group]) - before[group]) for group in before))
        return edges

    assert order(0) == order(0) != order(1)
    assert sorted(edge for edge, _ in order(0)[:14]) == [(edge,) for edge in range(14)]
    assert [normal for normal, _ in order(0)[:14]] != [reduce for _, reduce in order(0)[:14]]


def test_a_masked_weight_is_zero_and_the_others_stay():
    select = Perturbation({"cell": [("a", "b", "c"), ("a", "b")]}, order="given")
    mixing = {"cell": ((0.2, 0.3, 0.5), (0.6, 0.4, 0.0))}
    asked = []
    for accuracy in (0.9, 0.1, 0.1, 0.5, 0.5):
        asked.append(select.ask(mixing)["cell"])
        select.tell(accuracy, 0.0)
    assert asked[:3] == [
        ((0.0, 0.3, 0.5), (0.6, 0.4, 0.0)),
        ((0.2, 0.0, 0.5), (0.6, 0.4, 0.0)),
        ((0.2, 0.3, 0.0), (0.6, 0.4, 0.0)),
    ]
    # Worst without "b", and the first of equals; the row is one-hot from now on. The second edge has no "c" to ask for.
    assert asked[3:] == [((0.0, 1.0, 0.0), (0.0, 0.4, 0.0)), ((0.0, 1.0, 0.0), (0.6, 0.0, 0.0))]
    assert select.done and select.ask(mixing) is None
    assert select.operations() == {"cell": ("b", "a")}


def test_the_edge_whose_removal_leaves_most_goes_and_the_last_of_equals():
    select = Perturbation({"cell": [("a",)] * 4}, targets={"cell": (9,) * 4}, per_node=2, order="given")
    mixing = {"cell": ((1.0,),) * 4}
    for _ in range(4):
        select.decide(mixing, lambda asked: (1.0, 1.0))
    removals = iter([0.5, 0.7, 0.7, 0.1, 0.4, 0.4, 0.2])
    seen = []

    def evaluate(asked):
        seen.append([row[0] for row in asked["cell"]])
        return next(removals), 0.0

    assert select.decide(mixing, evaluate) and select.done
    assert seen[:4] == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]
    assert seen[4:] == [[0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    assert select.operations() == {"cell": ("a", None, None, "a")}
    assert select.fixed() == {"cell": {0: (1.0,), 1: (0.0,), 2: (0.0,), 3: (1.0,)}}


def test_groups_ask_about_the_same_supernet_and_decide_together():
    select = Perturbation({"one": [("a", "b")], "two": [("a", "b")]}, seed=0)
    mixing = {"one": ((0.5, 0.5),), "two": ((0.5, 0.5),)}
    asked = []
    for _ in range(4):
        asked.append(select.ask(mixing))
        assert not any(select.chosen.values())
        select.tell(0.0, 0.0)
    assert all(question["one"] == ((0.5, 0.5),) for question in asked[2:])
    assert select.done


def test_groups_of_different_size_share_one_schedule():
    select = Perturbation({"small": [("a", "b")], "large": [("a", "b")] * 3}, interval=2)
    mixing = {"small": ((0.5, 0.5),), "large": ((0.5, 0.5),) * 3}
    assert len(select.events) == 3
    while not select.done:
        select.decide(mixing, lambda asked: (0.0, 0.0))
    assert select.evaluations == 2 + 6


def test_excluded_operations_are_neither_asked_about_nor_chosen():
    select = Perturbation({"cell": [("none", "skip", "conv")]}, never=("none",))
    mixing = {"cell": ((0.8, 0.1, 0.1),)}
    asked = []
    select.decide(mixing, lambda rows: (asked.append(rows["cell"][0]), (float(len(asked)), 0.0))[1])
    assert asked == [(0.8, 0.0, 0.1), (0.8, 0.1, 0.0)]
    assert select.operations() == {"cell": ("skip",)}


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 100, 196, 200, 215, 239])
def test_a_selection_stopped_anywhere_goes_on_the_same(stop):
    mixing = {"normal": alpha(7, 0.5), "reduce": alpha(7, -0.5)}
    whole, halted = selection(seed=3), selection(seed=3)
    while not whole.done:
        whole.decide(mixing, linear)
    left = stop
    while left:
        halted.tell(*linear(halted.ask(mixing)))
        left -= 1
    again = selection(seed=3)
    again.load(json.loads(json.dumps(halted.state())))
    questions = 0
    while not again.done:
        again.decide(mixing, lambda asked: linear(asked))
        questions += 1
    assert again.state() == whole.state() and again.evaluations == 240


def test_decide_stops_between_two_evaluations():
    select = selection(seed=1)
    mixing = {"normal": alpha(7, 0.5), "reduce": alpha(7, -0.5)}
    assert not select.decide(mixing, linear, should_stop=lambda: select.evaluations == 3)
    assert select.evaluations == 3 and select.events_done == 0
    assert select.decide(mixing, linear) and select.evaluations == 14 and select.events_done == 1


def test_what_is_kept_is_what_magnitude_reads_from_the_decided_rows():
    select = selection(seed=2)
    mixing = {"normal": alpha(7, 0.5), "reduce": alpha(7, -0.5)}
    while not select.done:
        select.decide(mixing, linear)
    rows = select.applied(mixing)
    for group in rows:
        read = magnitude(torch.tensor(rows[group]), select.options[group], edges_of())
        assert [list(edge) for edge in read] == kept(select)[group]
        into = [
            sum(sum(row) for row, end in zip(rows[group], TARGETS, strict=True) if end == node) for node in range(2, 6)
        ]
        assert into == [2.0] * 4


def test_the_best_mixture_of_a_skip_and_an_operation():
    case = CASES["prop1:conv_softmax_weight"]
    given = zip(case["input"]["var_x_minus_m"], case["input"]["var_o_minus_m"], case["expected"], strict=True)
    for skipped, computed, expected in given:
        assert optimal_mixture(skipped, computed) == pytest.approx(expected, abs=1e-12)
    noise = torch.randn(2, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, o = 0.3 * noise[0], 0.8 * noise[1] + 0.1 * noise[0]
    cov = torch.cov(torch.stack([x, o]))
    best = optimal_mixture(float(cov[0, 0]), float(cov[1, 1]), float(cov[0, 1]))
    error = {t: float((t * o + (1 - t) * x).var()) for t in (best - 0.01, best, best + 0.01)}
    assert min(error, key=error.__getitem__) == best
    with pytest.raises(UserError, match="errors that differ"):
        optimal_mixture(0.0, 0.0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: selection(interval=0), "interval: got 0"),
        (lambda: selection(criterion="size"), "criterion: got 'size'"),
        (lambda: selection(order="best"), "order: got 'best'"),
        (lambda: selection(targets=None), "targets: got None"),
        (lambda: selection(("none",), never=("none",)), "an operation that may be chosen"),
        (lambda: Perturbation({"cell": []}), "at least one edge"),
        (lambda: selection().ask({"normal": alpha(7, 1.0)}), "mixing: got reduce: 0 rows; allowed: 14 rows of 7"),
        (lambda: selection().tell(math.nan, 0.0), "score: got 'NaN'"),
        (lambda: selection().load(Perturbation({"cell": [("a",)]}).state()), "that of the groups"),
    ],
)
def test_what_makes_no_sense_is_refused(make, text):
    with pytest.raises(UserError, match=text):
        make()


class Useful(nn.Module):
    """Passes its feature on, times a weight that is learned."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x


class Planted(nn.Module):
    """Every edge reads a feature of its own; the label is which half of the edges has the larger sum of features.

    One candidate of every edge passes the feature on, the others are noise.
    """

    def __init__(self, useful, operations):
        super().__init__()
        self.edges = nn.ModuleList(
            MixedOp({str(k): Useful() if k == right else Noise(1, always=True) for k in range(operations)})
            for right in useful
        )
        self.classifier = nn.Linear(len(useful), 2)

    def forward(self, x, mixing):
        terms = [
            edge(x[:, e], weights) for e, (edge, weights) in enumerate(zip(self.edges, mixing["cell"], strict=True))
        ]
        return self.classifier(torch.stack(terms, dim=1))


@pytest.mark.slow
def test_planted_operations_are_recovered_where_magnitude_is_chance():
    recovered, by_size, edges, operations = 0, 0, 12, 4
    for seed in range(2):
        torch.manual_seed(seed)
        useful = torch.randint(operations, (edges,)).tolist()
        supernet = RelaxedSupernet(
            Planted(useful, operations), {"cell": [tuple(map(str, range(operations)))] * edges}, seed=seed
        )
        with torch.no_grad():
            supernet.logits["cell"].copy_(torch.randn(edges, operations))  # random, and never trained
        x = torch.randn(5000, edges)
        y = (x[:, : edges // 2].sum(1) > x[:, edges // 2 :].sum(1)).long()
        optimizer = torch.optim.SGD(supernet.network.parameters(), lr=0.5, momentum=0.9)

        def tune(steps, supernet=supernet, optimizer=optimizer, x=x, y=y):
            for _ in range(steps):
                batch = torch.randint(1000, (100,))
                optimizer.zero_grad()
                functional.cross_entropy(
                    supernet(x[batch], {"cell": supernet.probabilities()["cell"].detach()}), y[batch]
                ).backward()
                optimizer.step()

        def evaluate(asked, supernet=supernet, x=x, y=y):
            with torch.no_grad():
                logits = supernet(x[1000:], {"cell": torch.tensor(asked["cell"])})
            accuracy = float((logits.argmax(1) == y[1000:]).float().mean())
            return accuracy, float(functional.cross_entropy(logits, y[1000:]))

        tune(800)
        select = Perturbation(supernet.options, criterion="acc", seed=seed)
        sizes = supernet.probabilities()["cell"].argmax(1).tolist()
        while not select.done:
            select.decide({"cell": supernet.probabilities()["cell"].tolist()}, evaluate)
            supernet.fixed = select.fixed()
            tune(20)
        recovered += sum(select.chosen["cell"][edge] == right for edge, right in enumerate(useful))
        by_size += sum(size == right for size, right in zip(sizes, useful, strict=True))
    assert recovered >= 0.9 * 2 * edges
    assert by_size <= 0.45 * 2 * edges  # a quarter is expected; more than this by chance once in a hundred times
