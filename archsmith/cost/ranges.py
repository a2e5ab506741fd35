"""Calibration: between which numbers the activations of an ONNX file lie, on real examples.

Ranges depend on the float network alone, not on a quantisation policy: take them once for each architecture and
quantise as often as wanted. Calibrate on training data, after the normalisation's statistics are right.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.cost.onnx_layers import load_onnx, onnx_layers

CalibrationMethod = Literal["minmax", "percentile", "entropy"]


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest value of every activation that meets a weight or leaves one.

    Args:
        bounds: (low, high) by name of the value.
        method: How they were found.
        examples: Number of examples.
    """

    bounds: dict[str, tuple[float, float]]
    method: CalibrationMethod
    examples: int


def activation_ranges(
    model: str | Path | bytes | Any,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    method: CalibrationMethod = "minmax",
    percentile: float = 99.99,
) -> Ranges:
    """Run examples through a float ONNX model and note the ranges of its activations.

    Args:
        model: Path or content of an ``.onnx`` file, or a model.
        batches: Inputs, batch first: a tensor, or several in the order of the model's inputs.
        method: ``minmax`` takes the extremes; ``percentile`` cuts outliers off; ``entropy`` takes the range whose
            integers tell most about the values (Kullback-Leibler). The last two are ONNX Runtime's own calibrators.
        percentile: Percent of the values that "percentile" keeps inside.

    Raises:
        UserError: No example, an unknown method, a model without layers, or inputs that do not fit it.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    if method not in get_args(CalibrationMethod):
        raise UserError("method", method, allowed=", ".join(get_args(CalibrationMethod)))
    feeds = [(batch,) if isinstance(batch, Tensor) else tuple(batch) for batch in batches]
    examples = sum(len(feed[0]) for feed in feeds)
    if not examples:
        raise UserError(
            "calibration", Shown("an empty set"), allowed="at least one example", hint="Take some of the training set."
        )
    proto = load_onnx(model)
    wanted = dict.fromkeys(value for layer in onnx_layers(proto) for value in layer.values)
    if not wanted:
        raise UserError("model", Shown("a file without a convolution or matrix product"), allowed="one with layers")
    names = [value.name for value in proto.graph.input if value.name not in _initialisers(proto)]
    if any(len(feed) != len(names) for feed in feeds):
        raise UserError("calibration", [len(feed) for feed in feeds], allowed=f"batches of {len(names)} input(s)")
    arrays = [{n: t.detach().cpu().numpy() for n, t in zip(names, feed, strict=True)} for feed in feeds]
    if method == "minmax":
        bounds = _extremes(proto, arrays, list(wanted))
    else:
        bounds = _by_histogram(proto, arrays, method, percentile)
    return Ranges({name: bounds[name] for name in wanted}, method, examples)


def _initialisers(proto: Any) -> set[str]:
    return {tensor.name for tensor in proto.graph.initializer}


def _extremes(
    proto: Any, arrays: Sequence[dict[str, np.ndarray]], wanted: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Return the extremes, read from the values themselves: one run per batch with every value as an output."""
    import onnx

    from archsmith.cost.backends import onnx_session

    inside = set(wanted) - {value.name for value in proto.graph.input}
    own = load_onnx(proto)
    kept = {value.name for value in own.graph.output}
    own.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name in inside - kept)
    session = onnx_session(own.SerializeToString(), threads=1)
    outputs = [value.name for value in session.get_outputs() if value.name in inside]
    found: dict[str, tuple[float, float]] = {}
    for feed in arrays:
        try:
            values = dict(zip(outputs, session.run(outputs, feed), strict=True)) if outputs else {}
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise UserError(
                "calibration", Shown(str(error).strip().splitlines()[0]), allowed="examples that the model takes"
            ) from error
        for name in wanted:
            value = values[name] if name in values else feed[name]
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return found


def _by_histogram(
    proto: Any, arrays: Sequence[dict[str, np.ndarray]], method: str, percentile: float
) -> dict[str, tuple[float, float]]:
    try:
        from onnxruntime.quantization.calibrate import CalibrationMethod as Method
        from onnxruntime.quantization.calibrate import create_calibrator
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "Calibrating activations") from error
    kind = Method.Entropy if method == "entropy" else Method.Percentile
    kinds = sorted({"Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip"} & {n.op_type for n in proto.graph.node})
    # The calibrators stack what they collect, which needs batches of one size: one.
    arrays = [{name: np.concatenate([feed[name] for feed in arrays]) for name in arrays[0]}]
    options = {"percentile": percentile} if method == "percentile" else {}
    with tempfile.TemporaryDirectory(prefix="archsmith-") as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "model.onnx")
        path.write_bytes(proto.SerializeToString())
        calibrator = create_calibrator(
            str(path), kinds, augmented_model_path=str(Path(folder, "more.onnx")), calibrate_method=kind,
            extra_options=options,
        )  # fmt: skip
        calibrator.collect_data(_Reader(arrays))
        data = calibrator.compute_data()
    return {name: (float(value.range_value[0]), float(value.range_value[1])) for name, value in data.data.items()}


class _Reader:
    """What ONNX Runtime's calibrators read from."""

    def __init__(self, arrays: Sequence[dict[str, np.ndarray]]) -> None:
        self._left = iter(arrays)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)
