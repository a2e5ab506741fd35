"""Training-free scores that were published beside trained results: 8,794 recurrent cells, and 500 text encoders.

Columns only, to rank: one random initialisation each. The published encoder scores are of models that all have the
largest sizes (hidden 256, feed-forward 1,024), the column of their parameters too.

Source: Serianni and Kalita 2023, arXiv 2306.00288, data under CC BY 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from archsmith.evaluate.tables.columns import checked_columns, read_columns

RECURRENT_FILES = {"nas-bench-nlp-ptb.parquet": "fa46bfee953a058f35cc56c8c1d4fbb45b1215d0e8736670a98050759e1080ce"}

ENCODER_FILES = {"flexibert-500-proxies.parquet": "837721035c2962bae3c6c75f6890221763af3a4451c7e6110142751010a03d4f"}

RECURRENT_SCORES = (
    "activation_distance",
    "synaptic_saliency",
    "jacobian_covariance",
    "jacobian_cosine",
    "large_noise_jacobian",
    "large_noise_jacobian_cosine",
    "more_noised_jacobian",
    "more_noised_jacobian_cosine",
    "hidden_synaptic_saliency",
    "layer_1_hidden_covariance",
    "layer_2_hidden_covariance",
    "layer_3_hidden_covariance",
)

ENCODER_SCORES = (
    "Synaptic Diversity",
    "Synaptic Saliency",
    "Activation Distance",
    "Jacobian Score",
    "Number of Parameters",
    "Head Importance",
    "Head Confidence",
    "Head Softmax Confidence",
)


@dataclass(frozen=True)
class PublishedScores:
    """Scores beside what they should foretell, one value for each network.

    Attributes:
        ids: Numbers of the networks.
        target: The trained result.
        target_name: Its name.
        higher_is_better: Which way the target points.
        scores: Columns by name.
    """

    ids: np.ndarray
    target: np.ndarray
    target_name: str
    higher_is_better: bool
    scores: dict[str, np.ndarray]


def recurrent_scores(path: str | Path, *, checksum: bool = True) -> PublishedScores:
    """Return the scores of recurrent cells on Penn Treebank: the rows where the loss and all scores are finite.

    Args:
        path: nas-bench-nlp-ptb.parquet, or its folder.
        checksum: Whether the file must be the known edition.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    columns = read_columns("table", path, RECURRENT_FILES, checksum=checksum, cache=None)
    checked_columns("table", columns, {**dict.fromkeys(("loss", *RECURRENT_SCORES), "f"), "recepie_id": "iu"})
    known = np.isfinite([columns[name] for name in ("loss", *RECURRENT_SCORES)]).all(0)
    scores = {name: columns[name][known] for name in RECURRENT_SCORES}
    return PublishedScores(columns["recepie_id"][known], columns["loss"][known], "loss", False, scores)


def recurrent_params(path: str | Path, *, checksum: bool = True) -> PublishedScores:
    """Return the numbers of parameters of all recurrent cells with a finite loss; as ``recurrent_scores``."""
    columns = read_columns("table", path, RECURRENT_FILES, checksum=checksum, cache=None)
    checked_columns("table", columns, {"loss": "f", "trainable_params": "f", "recepie_id": "iu"})
    known = np.isfinite([columns["loss"], columns["trainable_params"]]).all(0)
    params = {"trainable_params": columns["trainable_params"][known]}
    return PublishedScores(columns["recepie_id"][known], columns["loss"][known], "loss", False, params)


def encoder_scores(path: str | Path, *, checksum: bool = True) -> PublishedScores:
    """Return the scores of 500 text encoders beside their mean GLUE score.

    Args:
        path: flexibert-500-proxies.parquet, or its folder.
        checksum: Whether the file must be the known edition.

    ``scores`` has the columns of ``ENCODER_SCORES`` and, where there is one, "... Normalized"; "Jacobian Score
    Normalized" is in truth the cosine form.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    columns = read_columns("table", path, ENCODER_FILES, checksum=checksum, cache=None)
    checked_columns("table", columns, {"ID": "iu", "GLUE Score": "f", **dict.fromkeys(ENCODER_SCORES, "fiu")})
    scores = {name: column for name, column in columns.items() if name not in ("ID", "GLUE Score")}
    return PublishedScores(columns["ID"], columns["GLUE Score"], "glue", True, scores)
