"""The measured Pareto set of a finished search, and any of its points as a finished network.

A run delivers a few points of the set. The others are in its last checkpoint: the supernet's weights and the children
that were measured. Exporting one takes it out, and writes and checks the same files as for those delivered. The test
part is not read again: whoever chooses among many points by it has no test part left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archsmith.core.errors import Shown, UserError
from archsmith.core.files import to_json, write_atomic
from archsmith.run.checkpoints import CheckpointStore
from archsmith.run.costs import CostModel
from archsmith.run.directory import Run
from archsmith.run.drive import Searcher, finish_one
from archsmith.run.own_finish import finish_one_own, is_own
from archsmith.run.supernet_search import Evaluated, SupernetSearcher
from archsmith.tasks.base import Task

RECORD = "outcome.json"
"""Beside the files of an exported point: its metrics, costs and digests, as an outcome of ``result.json``."""


def restored(run: Run, searcher: Searcher) -> SupernetSearcher:
    """Give a freshly made search the state with which its run ended, and return it.

    Raises:
        UserError: The method has no measured set, or the run has no checkpoint.
    """
    if not isinstance(searcher, SupernetSearcher):
        raise UserError(
            "run",
            Shown(f"{run.path}, a run of {run.config['method']}"),
            allowed="a search among the children of a supernet (bignas, linas, instatune, simq-nas)",
            hint=f"Its finished networks are in {run.path / 'networks'}.",
        )
    loaded = CheckpointStore(run.path / "checkpoints", run).load_latest()
    if loaded is None:
        raise UserError("run", str(run.path), allowed="a run with a checkpoint", hint="It has not got that far.")
    searcher.load(loaded.tensors, loaded.state["searcher"])
    if not searcher.front():
        raise UserError("run", str(run.path), allowed="a run that evaluated a network within its budget")
    return searcher


def front_rows(searcher: SupernetSearcher) -> list[dict[str, Any]]:
    """Return the points of the measured set, numbered from 1, with their metrics and costs."""
    return [
        {"point": number, **dict(child.metrics), **dict(child.costs)}
        for number, child in enumerate(searcher.front(), start=1)
    ]


def export_points(
    run: Run, searcher: SupernetSearcher, task: Task, costs: CostModel, points: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Write points of the measured set as finished networks, each into a folder of its own; return their records.

    Args:
        run: The open run.
        searcher: What ``restored`` returned.
        task: The task of the run.
        costs: Its costs.
        points: Numbers as of ``front_rows``.
        out: Where the folders "front-NUMBER" go.

    Raises:
        UserError: No such point.
    """
    front: list[Evaluated] = searcher.front()
    if wrong := [number for number in points if not 1 <= number <= len(front)]:
        raise UserError("--point", wrong[0], allowed=f"1 to {len(front)}, or all")
    records = []
    for number in points:
        delivered = searcher.delivered_as(f"front-{number}", front[number - 1].architecture)
        folder = out / delivered.label
        if is_own(run.config):
            record, _ = finish_one_own(run, delivered, task, folder=folder, test=False)
        else:
            record = finish_one(run, delivered, task, costs, folder=folder, test=False)
        write_atomic(folder / RECORD, to_json(record).encode())
        records.append(record)
    return records
