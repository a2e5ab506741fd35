"""Once-for-All's published accuracy predictor of its elastic ResNet50, as an evaluator of the whole space.

A small network (82-400-400-400-1, and a constant) that its authors trained on sub-networks. The file does not say what
its 82 inputs are. Read here from the weights: eight image sizes from 112 in steps of 16 (as in the MobileNetV3
predictor), whether the stem has its second convolution, and one-hot vectors of the six widths and of the expansions of
18 blocks, zero for blocks that do not exist. Under this reading accuracy rises with every width, and with the image
size up to 192 pixels, from where it stays; with other offsets it does not. No published prediction was at hand to
compare with. Neither file nor predictions are shipped, and reading needs numpy alone.

Source: Cai, Gan, Wang, Zhang, Han 2020, arXiv 1908.09791.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.base import WeightStore
from archsmith.evaluate.ofa_predictor import found_file, unreadable
from archsmith.families.ofa_resnet_space import (
    DEPTHS,
    EXPANSIONS,
    FEWEST,
    STEM,
    WIDTHS,
    exact_costs,
    ofa_resnet_space,
)
from archsmith.space import Architecture, ProductSpace, Result, Trial

# N architectures

FILE = "ofa-resnet50-accuracy-predictor.npz"

_SMALLEST, _STEP, _SIZES = 112, 16, 8
_WIDTHS_AT = _SIZES + 2
_EXPANSIONS_AT = _WIDTHS_AT + 3 * (len(STEM) + len(FEWEST))
_INPUTS = _EXPANSIONS_AT + 3 * sum(fewest + max(DEPTHS) for fewest in FEWEST)


class OfaResnetPredictor:
    """The accuracy predictor.

    Args:
        path: Its weights, or the folder that holds ``ofa-resnet50-accuracy-predictor.npz``.
        side: Pixels of a side of the image, 112 to 224 in steps of 16.

    Attributes:
        space: 29 dimensions, see ``ofa_resnet_space``.

    Raises:
        UserError: No such file, one without the weights of the predictor, or another image size.
    """

    def __init__(self, path: str | Path, *, side: int = 224) -> None:
        if side not in range(_SMALLEST, _SMALLEST + _STEP * _SIZES, _STEP):
            raise UserError(
                "side", side, allowed=f"{_SMALLEST} to {_SMALLEST + _STEP * (_SIZES - 1)} in steps of {_STEP}"
            )
        file = found_file("predictor", path, FILE)
        try:
            with np.load(file) as archive:
                arrays = {name: np.asarray(archive[name], dtype=np.float64) for name in archive.files}
            self._layers = [(arrays[f"layers.{k}.0.weight"], arrays[f"layers.{k}.0.bias"]) for k in range(3)]
            self._last, self._base = arrays["layers.3.weight"], arrays["base_acc"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise unreadable("predictor", file, error) from error
        if self._layers[0][0].shape[1] != _INPUTS:
            raise UserError("predictor", self._layers[0][0].shape, allowed=f"a first layer of {_INPUTS} inputs")
        self.side = side
        self.space: ProductSpace = ofa_resnet_space()

    def features(self, architectures: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return what the predictor sees, shape (N, 82)."""
        rows = np.zeros((len(architectures), _INPUTS))
        for row, architecture in zip(rows, architectures, strict=True):
            row[(self.side - _SMALLEST) // _STEP] = 1
            row[_SIZES + int(architecture["stem/depth"] == max(DEPTHS))] = 1
            places = [f"stem/{number}/width" for number in range(len(STEM))]
            places += [f"stage/{stage}/width" for stage in range(len(FEWEST))]
            for number, place in enumerate(places):
                row[_WIDTHS_AT + 3 * number + WIDTHS.index(architecture[place])] = 1
            at = _EXPANSIONS_AT
            for stage, fewest in enumerate(FEWEST):
                for block in range(fewest + max(DEPTHS)):
                    if (chosen := architecture.get(f"stage/{stage}/{block}/expand")) is not None:
                        row[at + EXPANSIONS.index(chosen)] = 1
                    at += 3
        return rows

    def accuracy(self, architectures: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the predicted ImageNet top-1 accuracy in percent, shape (N,)."""
        hidden = self.features(architectures)
        for weight, bias in self._layers:
            hidden = np.maximum(0.0, hidden @ weight.T + bias)
        return np.asarray(100.0 * (hidden @ self._last.T + self._base)[:, 0])

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" (at the image size) and "params"."""
        return exact_costs(architecture, side=self.side)

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial.

        Raises:
            UserError: The architecture is not of the space, or a fidelity is asked for; there is only one.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: the predictor has no fidelity")
        return self.measure(self.space.validate(trial.architecture))

    def measure(self, architecture: Architecture) -> Result:
        """Return "valid_accuracy" in percent, and the costs."""
        accuracy = float(self.accuracy([architecture])[0])
        return Result(metrics={"valid_accuracy": accuracy}, costs=self.exact_costs(architecture))
