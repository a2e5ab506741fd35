"""NAS-Bench-NLP: recurrent cells on Penn Treebank (12,342 rows) and WikiText-2 (345 rows with learning curves).

The Penn Treebank file does not say how its cells are built, so both tables are spaces of row numbers: enough to replay
strategies that need no structure, and to rank scores. The WikiText-2 cells are in the column ``recepie`` as JSON
graphs. Losses are natural logarithms, to be minimised: ``Objective("loss", "minimize")``.

On WikiText-2 the fidelity is the number of epochs, 1 to 50, and an evaluation takes so many mean epochs of recorded
wall clock; four trainings diverged before, these are failed results from there on. Penn Treebank has the final loss
alone (fidelity 1; the source does not say of which split), and no time.

Source: arXiv 2006.07116; the scores beside the Penn Treebank rows are of arXiv 2306.00288.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.columns import checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, RowIndex, Table
from archsmith.families.table_spaces import row_space

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "nas-bench-nlp-ptb",
        "title": "NAS-Bench-NLP: 12,342 recurrent cells on Penn Treebank, by row",
        "rows": 12342,
        "space": "nas-bench-nlp-ptb",
        "datasets": ("ptb",),
        "fidelities": (1,),
        "files": {"nas-bench-nlp-ptb.parquet": "fa46bfee953a058f35cc56c8c1d4fbb45b1215d0e8736670a98050759e1080ce"},
    },
    {
        "name": "nas-bench-nlp-wikitext2",
        "title": "NAS-Bench-NLP: 345 recurrent cells on WikiText-2 with learning curves, by row",
        "rows": 345,
        "space": "nas-bench-nlp-wikitext2",
        "datasets": ("wikitext2",),
        "fidelities": "1 to 50",
        "files": {
            "nas-bench-nlp-wikitext2.parquet": "5dc9903dd42bf645883736fcaba39bfc45044c584b9df87cb315f7e03b35a8e8"
        },
    },
)


def open_table(name: str, path: str | Path, *, checksum: bool = True, cache: str | Path | None = None) -> Table:
    """Open a NAS-Bench-NLP table.

    Args:
        name: "nas-bench-nlp-ptb" or "nas-bench-nlp-wikitext2".
        path: The .parquet file, or its folder.
        checksum: Whether the file must be the known edition.
        cache: Folder for memory-mapped columns, None for memory.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    row = next(row for row in TABLES if row["name"] == name)
    columns = read_columns("table", path, row["files"], checksum=checksum, cache=cache)
    if name == "nas-bench-nlp-ptb":
        measured = ("loss", "perplexity", "bits_per_word")
        rows = checked_columns("table", columns, dict.fromkeys((*measured, "trainable_params"), "f"))
        readings = {1.0: Reading({metric: columns[metric] for metric in measured})}
        params = columns["trainable_params"]  # not recorded everywhere, so a float
    else:
        curves = {"valid_loss": "val_losses", "test_loss": "test_losses", "train_loss": "train_losses"}
        needed = {**dict.fromkeys(curves.values(), "f"), "num_params": "iu", "mean_epoch_wall_s": "f"}
        rows = checked_columns("table", columns, needed)
        widths = {columns[column].shape[1:] for column in curves.values()}
        if len(widths) != 1 or widths == {()}:
            raise UserError("table", sorted(widths), allowed="three losses per epoch, equally many epochs")
        readings = {
            float(epoch): Reading(
                {metric: columns[column][:, epoch - 1] for metric, column in curves.items()},
                seconds=epoch * columns["mean_epoch_wall_s"],
            )
            for epoch in range(1, widths.pop()[0] + 1)
        }
        params = columns["num_params"]
    space, dataset = row_space(name, rows), row["datasets"][0]
    costs = {dataset: {"params": params}}
    index = RowIndex(space)
    return Table(name, space, index, rows=rows, readings={dataset: readings}, costs=costs, columns=columns)
