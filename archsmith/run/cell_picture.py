"""The drawing of a derived cell: nodes on a line, an arc for every chosen operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from archsmith.run.page import Html, element, joined

Arcs = Sequence[Sequence[str]]
"""(source, target, operation) of every edge that has an operation; a single name where choices stand in a row."""

_STEP, _LIFT, _RADIUS, _MARGIN = 168, 34, 25, 60


def cell_picture(arcs: Arcs, colours: Mapping[str, str]) -> Html:
    """Return a cell as an SVG drawing; a node's edges alternate above and below the line.

    Args:
        arcs: Edges; the nodes' order is that of a walk through the graph, sources before targets.
        colours: CSS colour of each operation.
    """
    nodes = ordered(arcs)
    place = {node: number for number, node in enumerate(nodes)}
    entering: dict[str, int] = {}
    drawn: list[tuple[str, str, str, int]] = []
    for source, target, operation in sorted(arcs, key=lambda arc: (place[arc[1]], place[arc[1]] - place[arc[0]])):
        side = -1 if entering.get(target, 0) % 2 == 0 else 1
        entering[target] = entering.get(target, 0) + 1
        drawn.append((source, target, operation, side))
    reach = {side: max((_height(place, arc) for arc in drawn if arc[3] == side), default=0) for side in (-1, 1)}
    line = _MARGIN + reach[-1]
    height, width = line + reach[1] + _MARGIN, _STEP * (len(nodes) - 1) + 2 * _MARGIN
    paths, labels = [], []
    for arc in drawn:
        source, target, operation, side = arc
        x0, x1 = (_MARGIN + _STEP * place[node] for node in (source, target))
        top, colour = line + side * _height(place, arc), colours[operation]
        control = line + side * (_height(place, arc) * 4 / 3)
        path = f"M{x0},{line} C{x0 + 14},{control:.1f} {x1 - 14},{control:.1f} {x1},{line}"
        paths.append(element("path", d=path, fill="none", stroke=colour, stroke_width=2.5))
        wide = 7.3 * len(operation) + 12
        middle = (x0 + x1) / 2
        labels += [
            element(
                "rect", x=f"{middle - wide / 2:.1f}", y=top - 11, width=f"{wide:.1f}", height=22, rx=6, class_="tag"
            ),
            element("text", operation, x=f"{middle:.1f}", y=top + 4.5, text_anchor="middle", style=f"fill:{colour}"),
        ]
    dots = []
    for node, number in place.items():
        x = _MARGIN + _STEP * number
        dots += [
            element("circle", cx=x, cy=line, r=_RADIUS, class_="node"),
            element("text", node, x=x, y=line + 5, text_anchor="middle", class_="name"),
        ]
    return element(
        "div",
        element(
            "svg",
            *paths,
            *labels,
            *dots,
            viewBox=f"0 0 {width} {height}",
            width=width,
            height=height,
            class_="cell",
            role="img",
        ),
        class_="scroll",
    )


def chain_picture(chosen: Sequence[tuple[str, str]], colours: Mapping[str, str]) -> Html:
    """Return choices that stand in a row, one box each.

    Args:
        chosen: Name of the place and its operation; "none" where nothing is left of it.
        colours: CSS colour of each operation.
    """
    boxes = [
        element(
            "div",
            element("span", place),
            element("b", operation, style=f"color:{colours.get(operation, 'var(--soft)')}"),
            class_="link",
        )
        for place, operation in chosen
    ]
    return element("div", *boxes, class_="chain")


def ordered(arcs: Arcs) -> list[str]:
    """Return the nodes, every source in front of its targets, else in the order in which they are first named."""
    names = list(dict.fromkeys(name for arc in arcs for name in arc[:2]))
    sources = {name: {arc[0] for arc in arcs if arc[1] == name} for name in names}
    result: list[str] = []
    while len(result) < len(names):
        result.append(next(name for name in names if name not in result and sources[name] <= set(result)))
    return result


def legend(colours: Mapping[str, str]) -> Html:
    """Return the names of the operations with their colours."""
    swatches = (
        element("span", element("span", class_="swatch", style=f"background:{colour}"), name)
        for name, colour in colours.items()
    )
    return element("div", joined(*swatches), class_="legend")


def _height(place: Mapping[str, int], arc: tuple[str, str, str, int]) -> int:
    return _LIFT * (1 + place[arc[1]] - place[arc[0]])
