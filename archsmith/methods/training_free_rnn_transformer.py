"""Training-free scores for recurrent networks and transformers: draw cells, score them untrained, keep the best.

The hidden covariance asks how uncorrelated the hidden units of an untrained recurrent layer are over a text; for
encoders of text, head confidence and others are sums over layers. Beside them stands what every score must beat, the
number of parameters. ``published_correlations`` recomputes from the public tables how well each ranks trained networks.

The scores are in ``archsmith.evaluate.zero_cost.hidden`` and ``encoder``, the cells in ``families.nas_bench_nlp``, the
encoders in ``families.flexibert``.

Source: Serianni and Kalita 2023, arXiv 2306.00288.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.evaluate.tables import open_table
from archsmith.evaluate.tables.training_free import (
    ENCODER_SCORES,
    PublishedScores,
    encoder_scores,
    recurrent_params,
    recurrent_scores,
)
from archsmith.evaluate.zero_cost import SCORES, TEXT_SCORES, Batch, BuildingFamily, ZeroCostEvaluator
from archsmith.run.statistics import kendall_tau, spearman_rho
from archsmith.space import Architecture, Trial

SYSTEM = {
    "slug": "training-free-rnn-transformer",
    "title": "Training-free Neural Architecture Search for RNNs and Transformers",
    "year": 2023,
    "arxiv": "2306.00288",
    "kind": "evaluate",
    "aliases": ["hidden-covariance"],
}


class Settings(BaseModel):
    """How architectures are chosen.

    Attributes:
        score: Name in ``TEXT_SCORES``, or "params".
        samples: Architectures that are drawn; equal networks are scored once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: str = "hidden_covariance"
    samples: int = Field(default=100, ge=1)


@dataclass(frozen=True)
class Ranked:
    """One scored architecture.

    Attributes:
        architecture: It.
        score: Its score; NaN where the score is undefined (a hidden unit that never moves) or its network failed.
        error: What went wrong, empty if nothing did.
    """

    architecture: Architecture
    score: float
    error: str = ""


def ranked(family: BuildingFamily, batch: Batch, settings: Settings | None = None, *, seed: int = 0) -> list[Ranked]:
    """Return drawn architectures, the best by their score first, undefined scores last.

    Args:
        family: Recurrent cells or text encoders.
        batch: Tokens, in the shape of the family's examples.
        settings: Score and number of samples.
        seed: Decides the samples and every network's initial weights.

    Raises:
        UserError: An unknown score.
    """
    settings = Settings() if settings is None else settings
    evaluator = ZeroCostEvaluator(family, batch, scores=[settings.score])
    sign = 1 if {**SCORES, **TEXT_SCORES}[settings.score].higher_is_better else -1
    rng, found = numpy_stream(seed, "samples"), dict[str, Ranked]()
    for number in range(settings.samples):
        architecture = family.space.sample(rng)
        if architecture.network_digest in found:
            continue
        trial = Trial(id=number, architecture=architecture, seed=seed_of(seed, "trial", number))
        result = evaluator.evaluate(trial)
        value = float(result.metrics.get(settings.score, math.nan))
        found[architecture.network_digest] = Ranked(architecture, value, str(result.reason or ""))
    return sorted(found.values(), key=lambda each: -math.inf if math.isnan(each.score) else sign * each.score)[::-1]


@dataclass(frozen=True)
class Agreement:
    """How a score ranks trained networks: Kendall's tau-b, Spearman's rho, and the number of networks."""

    tau: float
    rho: float
    networks: int


def correlations(published: PublishedScores) -> dict[str, Agreement]:
    """Return how each column of scores agrees with the trained results."""
    target = published.target.tolist()
    return {
        name: Agreement(kendall_tau(column.tolist(), target), spearman_rho(column.tolist(), target), len(target))
        for name, column in published.scores.items()
    }


def published_correlations(folder: str | Path) -> Mapping[str, dict[str, Agreement]]:
    """Return the rank correlations of the public tables: "rnn" (with test loss) and "bert" (with GLUE).

    "Number of Parameters (true sizes)" counts the encoders as they were trained, which the published column does not.

    Args:
        folder: Holds nas-bench-nlp-ptb.parquet, flexibert-500-proxies.parquet and flexibert-500-glue.parquet.

    Raises:
        UserError: A file is missing, damaged or of another edition.
        MissingExtra: pyarrow is not installed.
    """
    encoders = encoder_scores(folder)
    table = open_table("flexibert-500", folder)
    assert table.columns is not None
    if not np.array_equal(table.columns["id"], encoders.ids):
        raise UserError("table", "networks in another order", allowed="the two tables of the same 500 encoders")
    true = np.asarray(table.values("params", dataset="glue"))
    scores = {name: encoders.scores[name] for name in ENCODER_SCORES} | {"Number of Parameters (true sizes)": true}
    encoders = PublishedScores(encoders.ids, encoders.target, encoders.target_name, True, scores)
    recurrent = correlations(recurrent_scores(folder)) | correlations(recurrent_params(folder))
    return {"rnn": recurrent, "bert": correlations(encoders)}
