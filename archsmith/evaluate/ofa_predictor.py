"""Once-for-All's published accuracy predictor and its phone latency tables, as an evaluator of a whole space.

The predictor is a small network (128-400-400-400-1) trained by its authors on sub-networks of the elastic MobileNetV3
at width 1.2; it takes kernels and expansions of the existing blocks and the image size as one-hot vectors. The latency
tables hold every block on a Samsung Note10; a network's latency is the sum of its blocks'. Both files are data of their
authors (``docs/guide/tables.md``); neither is shipped, and reading them needs numpy alone.

Source: Cai, Gan, Wang, Zhang, Han 2020, arXiv 1908.09791.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.base import WeightStore
from archsmith.families.mobile_chain_space import divisible
from archsmith.families.ofa_mobile_space import (
    BLOCKS,
    EXPANSIONS,
    HARD_SWISH,
    KERNELS,
    SQUEEZED,
    UNITS,
    OfaMobileSpace,
    Skeleton,
    ofa_mobile_space,
    shape_of,
)
from archsmith.space import Architecture, Result, Trial

# N architectures

RESOLUTIONS = (160, 176, 192, 208, 224)
"""Image sizes that the predictor was trained on, and for which there are latency tables."""

PREDICTOR_FILE = "ofa-mbv3-accuracy-predictor.npz"
LATENCY_FILE = "latency-table-note10-ofa.json"

WIDTH = 1.2

_SMALLEST, _STEP, _SIZES = 112, 16, 8  # the one-hot of the image size


class OfaPredictor:
    """The accuracy predictor.

    Args:
        path: Its weights, or the folder that holds ``ofa-mbv3-accuracy-predictor.npz``.

    Raises:
        UserError: No such file, or one without the weights of the predictor.
    """

    def __init__(self, path: str | Path) -> None:
        file = found_file("predictor", path, PREDICTOR_FILE)
        try:
            with np.load(file) as archive:
                arrays = {name: np.asarray(archive[name], dtype=np.float64) for name in archive.files}
            self._layers = [(arrays[f"{k}.weight"], arrays[f"{k}.bias"]) for k in (0, 2, 4, 6)]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise unreadable("predictor", file, error) from error
        width = 2 * 3 * UNITS * BLOCKS + _SIZES
        if self._layers[0][0].shape[1] != width:
            raise UserError("predictor", self._layers[0][0].shape, allowed=f"a first layer of {width} inputs")

    @staticmethod
    def features(architectures: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return what the predictor sees, shape (N, 128): kernels, expansions, image size; missing blocks are zero."""
        rows = np.zeros((len(architectures), 2 * 3 * UNITS * BLOCKS + _SIZES))
        for row, architecture in zip(rows, architectures, strict=True):
            for unit, blocks in enumerate(shape_of(architecture)):
                for block, (kernel, expansion) in enumerate(blocks):
                    at = 3 * (unit * BLOCKS + block)
                    row[at + KERNELS.index(kernel)] = 1
                    row[3 * UNITS * BLOCKS + at + EXPANSIONS.index(expansion)] = 1
            row[2 * 3 * UNITS * BLOCKS + (int(architecture["resolution"]) - _SMALLEST) // _STEP] = 1
        return rows

    def accuracy(self, architectures: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the predicted ImageNet top-1 accuracy in percent, shape (N,)."""
        hidden = self.features(architectures)
        for weight, bias in self._layers[:-1]:
            hidden = np.maximum(0.0, hidden @ weight.T + bias)
        weight, bias = self._layers[-1]
        return np.asarray(100.0 * (hidden @ weight.T + bias)[:, 0])


class OfaLatency:
    """Latency of a network on a Samsung Note10: the sum of its measured blocks.

    Args:
        path: The tables, or the folder that holds ``latency-table-note10-ofa.json``.

    Raises:
        UserError: No such file, or one without the tables.
    """

    def __init__(self, path: str | Path) -> None:
        file = found_file("latency", path, LATENCY_FILE)
        try:
            tables = json.loads(file.read_text(encoding="utf-8"))["tables"]
            self._tables = {int(size): {key: row["mean"] for key, row in tables[size].items()} for size in tables}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable("latency", file, error) from error
        self._skeletons = {size: Skeleton(image=(3, size, size), width=WIDTH) for size in self._tables}

    def milliseconds(self, architecture: Mapping[str, Any]) -> float:
        """Return the latency in milliseconds.

        Raises:
            UserError: The tables have no such block or image size.
        """
        size = int(architecture["resolution"])
        if size not in self._tables:
            raise UserError("resolution", size, allowed=f"one of {sorted(self._tables)}")
        table, skeleton = self._tables[size], self._skeletons[size]
        try:
            return float(sum(table[key] for key in _keys(skeleton, shape_of(architecture))))
        except KeyError as error:
            raise UserError("latency", Shown(str(error)), allowed="a block that the tables hold") from error


def _keys(skeleton: Skeleton, units: Sequence[Sequence[tuple[int, int]]]) -> list[str]:
    """Return the rows of the latency table that a network is made of."""
    stem, first, *_, last_unit, last, mix = skeleton.widths

    def shape(size: tuple[int, int], channels: int) -> str:
        return f"{size[0]}x{size[1]}x{channels}"

    start, end = skeleton.sizes[0], skeleton.sizes[-1]
    keys = [
        f"Conv-input:{shape((skeleton.image[1], skeleton.image[2]), 3)}-output:{shape(start, stem)}",
        f"expanded_conv-input:{shape(start, stem)}-output:{shape(start, first)}"
        f"-expand:{stem}-kernel:3-stride:1-idskip:1-se:0-hs:0",
    ]
    for unit, blocks in enumerate(units):
        for block, (kernel, expansion) in enumerate(blocks):
            channels, out_channels, stride = skeleton.block(unit, block)
            before = skeleton.sizes[unit] if block == 0 else skeleton.sizes[unit + 1]
            skips = int(stride == 1 and channels == out_channels)
            keys.append(
                f"expanded_conv-input:{shape(before, channels)}-output:{shape(skeleton.sizes[unit + 1], out_channels)}"
                f"-expand:{divisible(channels * expansion)}-kernel:{kernel}-stride:{stride}-idskip:{skips}"
                f"-se:{int(SQUEEZED[unit])}-hs:{int(HARD_SWISH[unit])}"
            )
    return [
        *keys,
        f"Conv_1-input:{shape(end, last_unit)}-output:{shape(end, last)}",
        f"AvgPool2D-input:{shape(end, last)}-output:1x1x{last}",
        f"Conv_2-input:1x1x{last}-output:1x1x{mix}",
        f"Logits-input:1x1x{mix}-output:{skeleton.num_classes}",
    ]


class OfaPredictorEvaluator:
    """Answers trials by the predictor: ``valid_accuracy`` in percent, exact MACs and parameters, phone latency.

    Args:
        predictor: The accuracy predictor.
        latency: The latency tables; None for results without a latency.

    Attributes:
        space: 45 dimensions and the image size.
    """

    def __init__(self, predictor: OfaPredictor, latency: OfaLatency | None = None) -> None:
        self.predictor, self.latency = predictor, latency

    @cached_property
    def space(self) -> OfaMobileSpace:
        """The space with five image sizes."""
        return ofa_mobile_space(RESOLUTIONS, name="ofa-mobile-sized")

    @cached_property
    def _skeletons(self) -> dict[int, Skeleton]:
        return {size: Skeleton(image=(3, size, size), width=WIDTH) for size in RESOLUTIONS}

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, float]:
        """Return "macs" and "params", and "latency" in milliseconds where there are tables; nothing is predicted."""
        costs: dict[str, float] = dict(self._skeletons[int(architecture["resolution"])].costs(architecture))
        return costs if self.latency is None else costs | {"latency": self.latency.milliseconds(architecture)}

    def accuracy(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return the accuracies of several architectures in percent."""
        return self.predictor.accuracy(architectures)

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial.

        Raises:
            UserError: The architecture is not of the space, or a fidelity is asked for; there is only one.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: the predictor has no fidelity")
        architecture = self.space.validate(trial.architecture)
        accuracy = float(self.predictor.accuracy([architecture])[0])
        return Result(metrics={"valid_accuracy": accuracy}, costs=self.exact_costs(architecture))


def found_file(field: str, path: str | Path, name: str) -> Path:
    """Return the path of a published file, given itself or its folder, or refuse."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            field,
            Shown(f"{file} (no such file)"),
            allowed=f"the path of {name}, or of the folder that holds it",
            hint="docs/guide/tables.md says what it is and where it comes from; archsmith never downloads on its own.",
        )
    return file


def unreadable(field: str, file: Path, error: Exception) -> UserError:
    """Return the error of a published file that cannot be read."""
    return UserError(field, Shown(str(file)), allowed="the published file, whole", hint=f"Reading: {error}.")
