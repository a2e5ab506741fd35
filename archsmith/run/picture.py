"""The picture of a searched network: what is left of every block, kernel by kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from archsmith.run.page import Html, element, joined
from archsmith.space import Count, ProductSpace

Widths = dict[str, dict[str, tuple[int, int]]]
"""Block to branch to (atoms left, atoms of the largest network)."""

COLOURS = 5


def widths_of(architecture: Mapping[str, Any]) -> Widths:
    """Return what is left of every searched width of an ``architecture.json``; empty where it names no space.

    A path ``blocks/1/k3`` is the branch "k3" of the block "blocks.1".
    """
    if not architecture.get("space") or not architecture.get("decisions"):
        return {}
    space = ProductSpace.from_json(architecture["space"])
    widths: Widths = {}
    for path, left in architecture["decisions"].items():
        dimension = space.dimension(path)
        block, _, branch = path.rpartition("/")
        if isinstance(dimension, Count) and block:
            widths.setdefault(block.replace("/", "."), {})[branch] = (int(left), int(dimension.high))
    return widths


def network_picture(widths: Widths, about: Mapping[str, Sequence[str]]) -> Html:
    """Return one row for each block: a lane for each branch, as long as it was, filled as far as it is alive.

    Args:
        widths: From ``widths_of``.
        about: Lines of text about a block, by its name.
    """
    branches = sorted({branch for lanes in widths.values() for branch in lanes}, key=_natural)
    colours = {branch: f"var(--k{i % COLOURS})" for i, branch in enumerate(branches)}
    longest = max(before for lanes in widths.values() for _, before in lanes.values())
    legend = element(
        "div",
        *(element("span", _swatch(colours[branch]), _branch_title(branch)) for branch in branches),
        element("span", _swatch("var(--track)"), "cut away"),
        class_="legend",
    )
    return joined(legend, *(_block(name, lanes, colours, longest, about) for name, lanes in widths.items()))


def _block(
    name: str,
    lanes: Mapping[str, tuple[int, int]],
    colours: Mapping[str, str],
    longest: int,
    about: Mapping[str, Sequence[str]],
) -> Html:
    left, before = (sum(pair[i] for pair in lanes.values()) for i in (0, 1))
    lines = [element("div", line) for line in about.get(name, ())]
    return element(
        "div",
        element("div", element("b", name.replace(".", " ").replace("blocks", "block")), *lines, class_="about"),
        element("div", *(_lane(b, *pair, colours[b], longest) for b, pair in lanes.items()), class_="lanes"),
        element(
            "div", f"{left / before:.0%}" if left else "dead", class_="share", title=f"{left:,} of {before:,} atoms"
        ),
        class_="block" if left else "block dead",
    )


def _lane(branch: str, left: int, before: int, colour: str, longest: int) -> Html:
    after = element("div", class_="after", style=f"width:{100 * left / before:.2f}%;background:{colour}")
    track = element("div", after, class_="before", style=f"width:{100 * before / longest:.2f}%")
    return element(
        "div",
        element("span", _branch_title(branch)),
        element("div", track, class_="room"),
        element("span", element("b", f"{left:,}"), f" / {before:,}", class_="count"),
        class_="lane",
    )


def _swatch(colour: str) -> Html:
    return element("span", class_="swatch", style=f"background:{colour}")


def _branch_title(branch: str) -> str:
    kernel = re.fullmatch(r"k(\d+)", branch)
    return f"{kernel[1]}×{kernel[1]}" if kernel else branch


def _natural(text: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
