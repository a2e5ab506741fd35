"""NAS-Bench-BERT: 500 heterogeneous encoders, pretrained and scored on eight GLUE tasks.

The networks were drawn at random from a space of ten million, so most of its points have no row. Data sets are the
tasks, each with the metric "score" in percent, and "glue", their mean. Costs are the true numbers of parameters of the
encoder: those that were published beside the scores are of models that all have the largest sizes.

Source: arXiv 2306.00288, data under CC BY 4.0; the space of arXiv 2205.11656.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.tables.columns import checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, Table
from archsmith.families.flexibert_space import Layer, encoder_params, nas_bench_bert
from archsmith.space import Architecture

TASKS = ("glue", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst", "sts")

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "flexibert-500",
        "title": "NAS-Bench-BERT: 500 heterogeneous text encoders on GLUE",
        "rows": 500,
        "space": "nas-bench-bert",
        "datasets": ("glue", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst", "sts"),
        "fidelities": (100000,),
        "files": {"flexibert-500-glue.parquet": "66a58c4c3d6276f48d58d0ab4e2336f5db854716b03da3aa97ee57d5435eb8cf"},
    },
)

KINDS = {"SA": "sa", "LT": "l", "DSC": "c"}


class ListedIndex:
    """For tables that list some architectures of a large space.

    Args:
        architectures: One for each row; of equal ones the first is found.
    """

    def __init__(self, architectures: list[Architecture]) -> None:
        self._architectures = architectures
        self._rows = {architecture.digest: row for row, architecture in reversed(list(enumerate(architectures)))}

    def row(self, architecture: Architecture) -> int | None:
        """Return the row, None where the table has none."""
        return self._rows.get(architecture.digest)

    def architecture(self, row: int) -> Architecture:
        """Return the architecture of a row."""
        return self._architectures[row]


def open_table(name: str, path: str | Path, *, checksum: bool = True, cache: str | Path | None = None) -> Table:
    """Open the table.

    Args:
        name: "flexibert-500".
        path: The .parquet file, or its folder.
        checksum: Whether the file must be the known edition.
        cache: Folder for memory-mapped columns, None for memory.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    columns = read_columns("table", path, TABLES[0]["files"], checksum=checksum, cache=cache)
    scores = {f"score_{task}": "f" for task in TASKS}
    needed = scores | {"hidden_size": "iu", "encoder_layers_json": "U", "time_to_train_s": "f"}
    rows = checked_columns("table", columns, needed)
    settings = nas_bench_bert()
    texts = zip(columns["encoder_layers_json"].tolist(), columns["hidden_size"].tolist(), strict=True)
    networks = [_layers(text, hidden) for text, hidden in texts]
    index = ListedIndex([settings.architecture(layers) for layers in networks])
    seconds = columns["time_to_train_s"]
    readings = {task: {100_000.0: Reading({"score": columns[f"score_{task}"]}, seconds=seconds)} for task in TASKS}
    params = np.array([encoder_params(layers) for layers in networks])
    costs = {task: {"params": params} for task in TASKS}
    return Table(name, settings.space(), index, rows=rows, readings=readings, costs=costs, columns=columns)


def _layers(text: str, hidden: int) -> list[Layer]:
    """Return the layers of a row.

    Raises:
        UserError: The text is no list of layers.
    """
    try:
        return [
            Layer(
                KINDS[row["operation_type"]],
                str(parameter).lower() if isinstance(parameter := row["operation_parameter"], str) else parameter,
                hidden,
                row["num_operation_heads"],
                (row["feed_forward_dimension"],) * row["num_feed_forward"],
            )
            for row in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("table.encoder_layers_json", Shown(text[:80]), allowed="JSON lists of layers") from error
