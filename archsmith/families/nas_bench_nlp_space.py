"""Recurrent cells of NAS-Bench-NLP: recipes read and checked, counted in closed form, and a space of random ones.

Source: Klyuchnikov et al. 2020, NAS-Bench-NLP, arXiv 2006.07116; free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeAlias

from archsmith.core.errors import Shown, UserError
from archsmith.space import Architecture, Categorical, Predicate, ProductSpace, Value

Recipe: TypeAlias = tuple[tuple[str, str, tuple[str, ...]], ...]

ARITIES = {
    "linear": (1, 2, 3),
    "blend": (3,),
    "elementwise_sum": (2, 3),
    "elementwise_prod": (2, 3),
    "activation_tanh": (1,),
    "activation_sigm": (1,),
    "activation_leaky_relu": (1,),
}
"""Operations of a node and how many inputs they take."""

CHOICES = {
    "linear_x1": ("linear", 1, True),
    "linear_x2": ("linear", 2, True),
    "linear_2": ("linear", 2, False),
    "linear_3": ("linear", 3, False),
    "blend": ("blend", 3, False),
    "elementwise_sum": ("elementwise_sum", 2, False),
    "elementwise_prod": ("elementwise_prod", 2, False),
    "activation_tanh": ("activation_tanh", 1, False),
    "activation_sigm": ("activation_sigm", 1, False),
    "activation_leaky_relu": ("activation_leaky_relu", 1, False),
}
"""Options of a node in the space: operation, inputs that are nodes or states, and whether x enters too."""

SLOTS = ("a", "b", "c")


def parse_recipe(given: str | Mapping[str, Any]) -> Recipe:
    """Return a recipe that is written as the benchmark does: node name → ``{"op": ..., "input": [...]}``.

    Args:
        given: JSON text, or what it holds. Nodes may stand in any order.

    Raises:
        UserError: No JSON object of nodes; an unknown operation or input, a wrong number of inputs, x in an elementwise
            operation (its size differs), a circle, no "h_new_0", or states that are not read and written alike.
    """
    try:
        graph = json.loads(given) if isinstance(given, str) else dict(given)
        recipe = tuple((str(name), str(node["op"]), tuple(node["input"])) for name, node in graph.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("recipe", Shown(str(given)[:80]), allowed="an object of nodes with op and input") from error
    names = {name for name, _, _ in recipe}
    new = {name.removeprefix("h_new_") for name in names if _is_state(name, "h_new_")}
    previous = {i.removeprefix("h_prev_") for _, _, inputs in recipe for i in inputs if _is_state(i, "h_prev_")}
    if new != {str(k) for k in range(len(new))} or not new or not previous <= new:
        allowed = "h_new_0, h_new_1, ... without gaps, and h_prev_k only where there is an h_new_k"
        raise UserError("recipe", Shown(f"new states {sorted(new)}, read {sorted(previous)}"), allowed=allowed)
    for name, operation, inputs in recipe:
        if operation not in ARITIES or len(inputs) not in ARITIES[operation]:
            shown = Shown(f"{operation} of {len(inputs)} inputs in node {name}")
            raise UserError("recipe", shown, allowed=", ".join(f"{op} of {n}" for op, n in ARITIES.items()))
        strange = [i for i in inputs if i not in names and i != "x" and not _is_state(i, "h_prev_")]
        if strange or ("x" in inputs and operation != "linear"):
            shown = Shown(f"{operation} of {', '.join(inputs)} in node {name}")
            raise UserError("recipe", shown, allowed="nodes and h_prev_k; x in linear nodes only")
    _insist_on_order(recipe)
    return recipe


def _insist_on_order(recipe: Recipe) -> None:
    waiting = {name: {i for i in inputs if i != "x" and not _is_state(i, "h_prev_")} for name, _, inputs in recipe}
    while ready := [name for name, inputs in waiting.items() if not inputs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    if waiting:
        raise UserError("recipe", Shown(f"a circle among {', '.join(waiting)}"), allowed="a graph without circles")


def recipe_params(
    recipe: Recipe, *, vocabulary: int = 33_278, embedding: int = 400, hidden: int = 600, layers: int = 3
) -> int:
    """Return the parameters of a language model: embedding (shared with the decoder), its bias, and the linear nodes.

    The defaults are those of the WikiText-2 table, whose 345 counts this gives.
    """
    return vocabulary * (embedding + 1) + sum(
        products + biases for products, biases in _linears(recipe, embedding=embedding, hidden=hidden, layers=layers)
    )


def recipe_macs(recipe: Recipe, *, steps: int, vocabulary: int, embedding: int, hidden: int, layers: int) -> int:
    """Return the multiply-accumulates of one sequence of ``steps`` tokens: linear nodes and the decoder."""
    linears = sum(products for products, _ in _linears(recipe, embedding=embedding, hidden=hidden, layers=layers))
    return steps * (linears + embedding * vocabulary)


def _linears(recipe: Recipe, *, embedding: int, hidden: int, layers: int) -> list[tuple[int, int]]:
    """Return weights and biases of every linear node of every layer."""
    sizes = [embedding, *[hidden] * (layers - 1), embedding]
    return [
        (sum(x if name == "x" else h for name in inputs) * h, h)
        for x, h in pairwise(sizes)
        for _, operation, inputs in recipe
        if operation == "linear"
    ]


def cell_space(nodes: int = 8, states: int = 2) -> ProductSpace:
    """Return the space of random cells.

    Rules: there are ``nodes`` places. ``node/<i>/op`` chooses one of ``CHOICES``; ``node/<i>/a``, ``b`` and ``c`` its
    inputs among the previous states and the places before (what the operation does not take is not looked at). The
    last place is the new first state; ``state/<k>`` says which place is the new state k. What reaches no state that is
    read is left out, states that nobody reads too. A cell must read x and the first state. Architectures with the same
    remaining graph have the same ``network_digest``.

    Args:
        nodes: Places, more than states.
        states: 1 to 3.

    Raises:
        UserError: A number out of its range.
    """
    if states not in (1, 2, 3) or nodes <= states:
        raise UserError("space", (nodes, states), allowed="1 to 3 states, and more nodes than states")
    elements = {}
    for i in range(nodes):
        sources = tuple([f"h_prev_{k}" for k in range(states)] + [f"node_{j}" for j in range(i)])
        elements[f"node/{i}/op"] = Categorical(tuple(CHOICES), group="op")
        elements |= {f"node/{i}/{slot}": Categorical(sources, group="input") for slot in SLOTS}
    for k in range(1, states):
        elements[f"state/{k}"] = Categorical(tuple(f"node_{j}" for j in range(nodes - 1)), group="state")
    rules = [Predicate("the new state depends on x and on the state before", _is_recurrent)]
    if states == 3:
        rules.append(Predicate("states are different nodes", lambda a: a["state/1"] != a["state/2"]))
    return ProductSpace(f"recurrent-cells-{nodes}-{states}", elements, constraints=rules, canonical=recipe_of)


def recipe_of(architecture: Mapping[str, Value]) -> Recipe:
    """Return the graph that is left of a point of ``cell_space``: nodes in the order of their places.

    Nodes are named node_0, node_1, ... and h_new_k, states h_prev_0, ... without gaps.
    """
    inputs, outputs = _graph(architecture)
    live, read = _living(inputs, outputs)
    states = [0, *sorted(k for k in read if k)]
    names = {outputs[k]: f"h_new_{number}" for number, k in enumerate(states)}
    places = sorted(live, key=lambda name: int(name.removeprefix("node_")))
    names |= {name: f"node_{number}" for number, name in enumerate(n for n in places if n not in names)}
    names |= {f"h_prev_{k}": f"h_prev_{number}" for number, k in enumerate(states)} | {"x": "x"}
    operations = {name: CHOICES[str(architecture[f"node/{name.removeprefix('node_')}/op"])][0] for name in places}
    return tuple((names[name], operations[name], tuple(names[i] for i in inputs[name])) for name in places)


def architecture_of(recipe: Recipe, space: ProductSpace) -> Architecture:
    """Return a point of a ``cell_space`` with this graph, places that it does not need in front.

    Args:
        recipe: In the form that ``recipe_of`` gives: nodes behind their inputs, the new first state last.
        space: The space.

    Raises:
        UserError: The graph has more nodes or states than the space, or another form.
    """
    nodes = sum(path.endswith("/op") for path in space.paths)
    free = nodes - len(recipe)
    if free < 0 or recipe[-1][0] != "h_new_0":
        raise UserError(
            "recipe", Shown(f"{len(recipe)} nodes"), allowed=f"at most {nodes} nodes, behind their inputs, h_new_0 last"
        )
    places = {name: f"node_{free + number}" for number, (name, _, _) in enumerate(recipe)}
    kinds = {each: option for option, each in CHOICES.items()}
    decisions: dict[str, Value] = {}
    for path in space.paths:
        decisions[path] = "activation_tanh" if path.endswith("/op") else "h_prev_0"
    taken = {places[name] for name, _, _ in recipe if _is_state(name, "h_new_")}
    idle = iter(f"node_{j}" for j in range(nodes - 1) if f"node_{j}" not in taken)
    for path in space.paths:
        if path.startswith("state/"):
            own = places.get(f"h_new_{path.removeprefix('state/')}")
            decisions[path] = own if own is not None else next(idle, "node_0")
    for name, operation, inputs in recipe:
        place = places[name].removeprefix("node_")
        others = [i for i in inputs if i != "x"]
        option = kinds.get((operation, len(others), "x" in inputs))
        if option is None:
            shown = Shown(f"{operation} of {', '.join(inputs)} in node {name}")
            raise UserError("recipe", shown, allowed=", ".join(CHOICES))
        decisions[f"node/{place}/op"] = option
        for slot, source in zip(SLOTS, others, strict=False):
            decisions[f"node/{place}/{slot}"] = places.get(source, source)
    return space.validate(decisions)


def _graph(architecture: Mapping[str, Value]) -> tuple[dict[str, tuple[str, ...]], dict[int, str]]:
    """Return the inputs of every place, and the place of every state."""
    count = sum(path.endswith("/op") for path in architecture)
    inputs = {}
    for i in range(count):
        _, arity, takes_x = CHOICES[str(architecture[f"node/{i}/op"])]
        own = tuple(str(architecture[f"node/{i}/{slot}"]) for slot in SLOTS[:arity])
        inputs[f"node_{i}"] = (("x",) if takes_x else ()) + own
    outputs = {0: f"node_{count - 1}"}
    outputs |= {int(p.removeprefix("state/")): str(v) for p, v in architecture.items() if p.startswith("state/")}
    return inputs, outputs


def _living(inputs: Mapping[str, tuple[str, ...]], outputs: Mapping[int, str]) -> tuple[set[str], set[int]]:
    """Return the places that matter for the first state, and the states that are read on the way."""
    live: set[str] = set()
    read: set[int] = set()
    waiting = [outputs[0]]
    while waiting:
        name = waiting.pop()
        if name == "x" or name in live:
            continue
        if _is_state(name, "h_prev_"):
            k = int(name.removeprefix("h_prev_"))
            if k not in read:
                read.add(k)
                waiting.append(outputs[k])
            continue
        live.add(name)
        waiting += inputs[name]
    return live, read


def _is_recurrent(architecture: Mapping[str, Value]) -> bool:
    inputs, outputs = _graph(architecture)
    live, read = _living(inputs, outputs)
    return 0 in read and any("x" in inputs[name] for name in live)


def _is_state(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.removeprefix(prefix).isdigit()
