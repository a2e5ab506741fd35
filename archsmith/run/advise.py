"""Which strategy for which budget: what our own comparisons on real tables say, random search beside it.

The figures are those of ``advice.json`` beside this file, written by ``benchmarks/evidence/advice.py`` from results
of ``archsmith bench``. Nothing here is opinion: where nothing was measured, it says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsmith.core.errors import UserError
from archsmith.core.files import read_json, write_atomic
from archsmith.core.files import to_json as written

FILE = Path(__file__).with_name("advice.json")

CHECKPOINTS = (25, 50, 100, 200)
"""Numbers of evaluations for which figures are kept."""

BASELINE = "random"


@dataclass(frozen=True)
class Advice:
    """A strategy and how it did at a number of evaluations.

    Attributes:
        strategy: Label of the contender, with its settings.
        regret: Mean over arenas of what is left of the way from the average random architecture (1) to the best of the
            table (0).
        ahead: In how many arenas its interval over seeds lies above that of random search.
        arenas: In how many it was measured.
        figures: Arena → ``(mean, low, high)`` of the judged figure.
    """

    strategy: str
    regret: float
    ahead: int
    arenas: int
    figures: Mapping[str, tuple[float, float, float]]


def summarised(results: Sequence[Mapping[str, Any]], *, command: str) -> dict[str, Any]:
    """Return the content of ``advice.json`` from results of ``archsmith bench``.

    Args:
        results: Contents of ``result.json`` of benches whose budget is a number of evaluations.
        command: How to obtain them again.

    Raises:
        UserError: A bench with another kind of budget.
    """
    arenas = []
    for result in results:
        if not result["bench"]["budget"].get("evaluations"):
            raise UserError("results", result["bench"]["budget"], allowed="benches with evaluations<=N as budget")
        for arena in result["arenas"]:
            rows = {row["contender"]: _at_checkpoints(row["anytime"]) for row in arena["contenders"]}
            arenas.append(
                {
                    "arena": arena["arena"],
                    "judged": arena["judged"],
                    "best": arena["best_of_table"],
                    "random_architecture": arena["random_architectures"]["mean"],
                    "seeds": result["bench"]["seeds"],
                    "contenders": rows,
                }
            )
    return {"format_version": 1, "command": command, "checkpoints": list(CHECKPOINTS), "arenas": arenas}


def write_advice(results: Sequence[Mapping[str, Any]], *, command: str, file: Path = FILE) -> None:
    """Write ``advice.json``."""
    write_atomic(file, written(summarised(results, command=command)).encode())


def advise(evaluations: int, *, file: Path = FILE) -> tuple[int, list[Advice]]:
    """Return what was measured at the largest number of evaluations not above the given one.

    Args:
        evaluations: Architectures that can be evaluated.
        file: The figures.

    Returns:
        That number, and the strategies by their regret, the best first; random search is among them.

    Raises:
        UserError: Fewer evaluations than were ever measured.
    """
    data = read_json(file)
    known = [step for step in data["checkpoints"] if step <= evaluations]
    if not known:
        raise UserError(
            "--evaluations",
            evaluations,
            allowed=f"at least {min(data['checkpoints'])}, the fewest that were measured",
            hint="With fewer, take random search and the best of what it finds.",
        )
    step = max(known)
    at = data["checkpoints"].index(step)
    names = sorted(set.intersection(*(set(arena["contenders"]) for arena in data["arenas"])))
    found = [_advice(name, data["arenas"], at) for name in names]
    return step, sorted(found, key=lambda advice: advice.regret)


def measured_where(file: Path = FILE) -> tuple[str, str]:
    """Return the arenas with their seeds as a sentence's part, and the command behind the figures."""
    data = read_json(file)
    arenas = ", ".join(f"{arena['arena']} ({arena['seeds']} seeds)" for arena in data["arenas"])
    return arenas, data["command"]


def _advice(name: str, arenas: Sequence[Mapping[str, Any]], at: int) -> Advice:
    figures, shares, ahead = {}, [], 0
    for arena in arenas:
        mean, low, high = arena["contenders"][name][at]
        figures[arena["arena"]] = (mean, low, high)
        shares.append((arena["best"] - mean) / (arena["best"] - arena["random_architecture"]))
        ahead += low > arena["contenders"][BASELINE][at][2]
    return Advice(name, sum(shares) / len(shares), ahead, len(arenas), figures)


def _at_checkpoints(anytime: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Return mean and interval at each checkpoint: of the last point not after it."""
    found = []
    for step in CHECKPOINTS:
        points = [point for point in anytime if point[0] <= step and point[1] is not None]
        if not points:
            raise UserError("results", step, allowed="benches in which every strategy found something by then")
        found.append([float(number) for number in points[-1][1:]])
    return found
