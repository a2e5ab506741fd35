"""What is recorded of a finished network as it runs on the device of the run: its file, latency, layers, accuracy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archsmith.core.files import sha256_file, write_atomic
from archsmith.cost import Deployed, Deployment, Latency, layer_times
from archsmith.run.measured import steadiest
from archsmith.run.onnx_file import missing_onnx_packages
from archsmith.tasks.base import Task

INT8_FILE = "model-int8.onnx"
"""The quantised file of a network, beside ``model.onnx``."""


def deployed_record(
    network: nn.Module,
    folder: Path,
    deployment: Deployment,
    calibration: torch.Tensor,
    task: Task,
    *,
    file: str | None = None,
) -> tuple[Latency, dict[str, Any]]:
    """Make a finished network ready, measure it, and return its latency and the record of it.

    Args:
        network: The network, in evaluation mode, on the CPU.
        folder: Its files. With ONNX Runtime the very file in it is measured; an int8 one is written there.
        deployment: Where it runs.
        calibration: Training inputs, for int8.
        task: The task, for the accuracy where the precision is not fp32; the test part is not read.
        file: Name of a file in the folder that runs in place of ``model.onnx`` (quantised by the method).

    Returns:
        The latency, and: "on" (words), the fields of the deployment, "file" (name or None), "sha256", "note" (how it
        was quantised), "metrics" (of the validation part, where the precision is not fp32), and "layers": the time of
        every layer of the exported file in ONNX Runtime, and in "layers_of" the file's name.
    """
    example = task.plain_inputs()
    plain = folder / "model.onnx"
    if file is not None:
        ready = Deployed(deployment, (folder / file).read_bytes())
    elif deployment.device == "onnxruntime":
        ready = deployment.of_file(plain.read_bytes(), calibration)
        file = INT8_FILE if deployment.quantised else plain.name
        if deployment.quantised:
            assert isinstance(ready.target, bytes)
            write_atomic(folder / file, ready.target)
    else:
        ready = deployment.ready(network, calibration)
    record: dict[str, Any] = {"on": str(deployment), **deployment.to_json(), "file": file, "note": ready.note}
    if file is not None:
        record["sha256"] = sha256_file(folder / file)
    if deployment.precision != "fp32" or file not in (None, plain.name):
        scores = task.evaluate(ready.forward(), "valid")
        record["metrics"] = {"valid_accuracy": float(scores["accuracy"]), "valid_loss": float(scores["loss"])}
    if ready.layers:
        record |= {"layers_of": file, "layers": [asdict(each) for each in ready.layer_times(example)]}
    elif file is None and not missing_onnx_packages():
        times = layer_times(plain, example, threads=deployment.threads)
        record |= {"layers_of": plain.name, "layers": [asdict(each) for each in times]}
    return steadiest(lambda: ready.measure(example)), record
