"""Real evaluations of Once-for-All sub-networks, and the black box that is fitted to them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.evaluate.surrogate import KernelSurrogate
from archsmith.families.ofa_mobile_space import BLOCKS, DEPTHS, EXPANSIONS, KERNELS, UNITS, from_genes, ofa_mobile_space
from archsmith.space import Architecture
from archsmith.space.genotypes import Genotypes

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "hw-aware-system.json").read_text())

SPACE = ofa_mobile_space()


@cache
def evaluations() -> list[tuple[Architecture, int, int, float]]:
    """Return all rows: architecture, parameters, MACs, top-1 in percent."""
    found = []
    for row in GOLDEN["rows"]:
        kernels, expansions, depths, params, macs, top1 = row.split()
        decisions = from_genes(*([int(digit) for digit in genes] for genes in (kernels, expansions, depths)))
        found.append((SPACE.validate(decisions), int(params), int(macs), float(top1)))
    return found


@cache
def genotypes() -> np.ndarray:
    """Return the published genotypes of all rows with their inactive genes, in the order of ``Genotypes.paths``."""
    place = {path: gene for gene, path in enumerate(Genotypes(SPACE).paths)}
    found = np.zeros((len(GOLDEN["rows"]), len(place)), dtype=np.int64)
    for genes, row in zip(found, GOLDEN["rows"], strict=True):
        kernels, expansions, depths, *_ = row.split()
        for unit in range(UNITS):
            genes[place[f"stage/{unit}/depth"]] = DEPTHS.index(int(depths[unit]))
            for block in range(BLOCKS):
                at, here = unit * BLOCKS + block, f"stage/{unit}/{block}"
                genes[place[f"{here}/kernel"]] = KERNELS.index(int(kernels[at]))
                genes[place[f"{here}/expand"]] = EXPANSIONS.index(int(expansions[at]))
    return found


def columns() -> dict[str, list[float]]:
    """Return the measured columns: MMACs and top-1."""
    rows = evaluations()
    return {"macs": [macs / 1e6 for *_, macs, _ in rows], "valid_accuracy": [top1 for *_, top1 in rows]}


@cache
def black_box() -> KernelSurrogate:
    """Return the surrogate benchmark: kernel ridge regression through all rows."""
    return KernelSurrogate(SPACE, [row[0] for row in evaluations()], columns())
