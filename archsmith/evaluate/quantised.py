"""Children of a supernet under a quantisation policy: accuracy and latency of the quantised file, measured.

For every architecture the float network is exported and calibrated once; each of its policies is then applied to that
file, run by ONNX Runtime on the validation part, and timed on this machine. Nothing is simulated. The size is the
analytic one (``policy_bytes``), which is exact and known beforehand.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.cost import (
    CalibrationMethod,
    Latency,
    LayerTime,
    QuantisedFile,
    Ranges,
    activation_ranges,
    export_onnx,
    layer_elements,
    layer_times,
    measure_latency,
    onnx_layers,
    quantise_onnx,
)
from archsmith.cost.backends import onnx_session
from archsmith.evaluate.base import WeightStore
from archsmith.space import Architecture, Result, Trial, policy_bytes
from archsmith.space.joint import JointSpace

Score = Callable[[Callable[[Tensor], Tensor]], Mapping[str, float]]
"""Evaluates any function from inputs to logits: "accuracy" (a fraction) and "loss"."""


@dataclass(frozen=True)
class FloatFile:
    """An architecture before quantisation.

    Args:
        model: Its ONNX model in fp32.
        ranges: Of its activations on the calibration examples.
        elements: Elements of the weight of each of its layers.
        params: All of its parameters.
    """

    model: Any
    ranges: Ranges
    elements: dict[str, int]
    params: int


class QuantisedEvaluator:
    """Evaluates points of a joint space: architecture and policy.

    Args:
        space: The joint space; its sites are called like the layers of the networks.
        network: Returns the trained network of an architecture of the main space, in evaluation mode, statistics of its
            normalisations right.
        calibration: Training examples for the activations' ranges, batches of inputs, as validation inputs come.
        score: Runs a network over the validation part.
        method: How ranges are found, see ``activation_ranges``.
        latency: Whether every quantised file is timed: batch 1.
        threads: Threads of ONNX Runtime.
        rounds: Of the timing.
        block_ms: Of the timing.
        kept: Float files that are kept at a time.

    Results have the metrics ``valid_accuracy`` and ``valid_loss``, and the costs ``size`` (bytes, analytic) and, if it
    is measured, ``latency`` (ms).

    Raises:
        UserError: No calibration example.
    """

    def __init__(
        self,
        space: JointSpace,
        network: Callable[[Architecture], nn.Module],
        *,
        calibration: Sequence[Tensor],
        score: Score,
        method: CalibrationMethod = "minmax",
        latency: bool = True,
        threads: int = 1,
        rounds: int = 10,
        block_ms: float = 2.0,
        kept: int = 16,
    ) -> None:
        if not sum(map(len, calibration)):
            raise UserError("calibration", Shown("an empty set"), allowed="at least one training example")
        self.space, self.network, self.calibration, self.score = space, network, tuple(calibration), score
        self.method, self.latency, self.threads = method, latency, threads
        self.rounds, self.block_ms, self.kept = rounds, block_ms, kept
        self._floats: OrderedDict[str, FloatFile] = OrderedDict()
        self._known: dict[str, Result] = {}

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial; a network that was evaluated before is not measured again.

        Args:
            trial: What to evaluate. Nothing is random, the seed does not count.
            weights: Not used.

        Raises:
            UserError: The architecture is not of the joint space, or a fidelity is asked for.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: a quantised file has no fidelity")
        return self.result(self.space.validate(trial.architecture))

    def result(self, architecture: Architecture) -> Result:
        """Return metrics and costs of a point of the joint space."""
        if (known := self._known.get(architecture.network_digest)) is None:
            start = time.perf_counter()
            file = self.file(architecture)
            metrics = self.metrics(file)
            if not math.isfinite(metrics["valid_loss"]):
                return Result.failed(f"the validation loss is {metrics['valid_loss']}")
            costs: dict[str, float] = {"size": float(self.size(architecture))}
            if self.latency:
                costs["latency"] = self.measured(file).median_ms
            known = Result(metrics=metrics, costs=costs, seconds=time.perf_counter() - start)
            self._known[architecture.network_digest] = known
        return known

    def forget(self) -> None:
        """Forget all files and results: the weights have changed."""
        self._floats.clear()
        self._known.clear()

    def file(self, architecture: Architecture) -> QuantisedFile:
        """Return the quantised file of a point of the joint space."""
        plain = self.float_file(self.space.main_part(architecture))
        return quantise_onnx(plain.model, self.space.policy(architecture), plain.ranges)

    def metrics(self, file: QuantisedFile) -> dict[str, float]:
        """Return accuracy and loss of a file on the validation part, run by ONNX Runtime."""
        session = onnx_session(file.content, threads=self.threads)
        (name,) = (value.name for value in session.get_inputs())
        found = self.score(lambda inputs: torch.from_numpy(session.run(None, {name: inputs.contiguous().numpy()})[0]))
        return {"valid_accuracy": float(found["accuracy"]), "valid_loss": float(found["loss"])}

    def measured(self, file: QuantisedFile) -> Latency:
        """Return the latency of a file here, batch 1."""
        return measure_latency(
            file.content,
            self.calibration[0][:1],
            backend="onnxruntime",
            threads=self.threads,
            rounds=self.rounds,
            block_ms=self.block_ms,
        )

    def layers(self, architecture: Architecture) -> list[LayerTime]:
        """Return where the quantised file of a point of the joint space spends its time here."""
        plain = self.float_file(self.space.main_part(architecture))
        pairs = [(layer.name, layer.node) for layer in onnx_layers(plain.model)]
        inputs = self.calibration[0][:1]
        return layer_times(self.file(architecture).content, inputs, layers=pairs, threads=self.threads)

    def size(self, architecture: Architecture) -> int:
        """Return the analytic size in bytes."""
        plain = self.float_file(self.space.main_part(architecture))
        return policy_bytes(plain.elements, plain.params, self.space.policy(architecture))

    def float_file(self, architecture: Architecture) -> FloatFile:
        """Return an architecture of the main space, exported and calibrated; the latest ones are kept.

        Raises:
            UserError: The file's layers are not the sites that the joint space says exist.
        """
        key = architecture.digest
        if key not in self._floats:
            network = self.network(architecture).eval()
            model = export_onnx(network, self.calibration[0][:2])
            layers = {layer.name for layer in onnx_layers(model)}
            if missing := [site for site in self.space.active_sites(architecture) if site not in layers]:
                raise UserError("sites", missing[:4], allowed=f"layers of the exported network, {sorted(layers)[:4]}")
            ranges = activation_ranges(model, self.calibration, method=self.method)
            elements = {name: count for name, count in layer_elements(network).items() if name in layers}
            params = sum(parameter.numel() for parameter in network.parameters())
            self._floats[key] = FloatFile(model, ranges, elements, params)
            while len(self._floats) > self.kept:
                self._floats.popitem(last=False)
        self._floats.move_to_end(key)
        return self._floats[key]
