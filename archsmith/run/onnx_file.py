"""``model.onnx``: one file with everything in it, and nothing that does not belong there.

The file is written by ``archsmith.cost.onnx_export`` and compared with the network in ONNX Runtime by the caller.

Everything optional is imported inside the functions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.core.errors import MissingExtra, UserError
from archsmith.cost.backends import onnx_session
from archsmith.cost.onnx_export import export_onnx, messages, notes
from archsmith.run.rebuild import RebuildError

INPUT, OUTPUT = "images", "logits"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing_onnx_packages() -> tuple[str, ...]:
    """Return the packages of the extra ``onnx`` that are not installed."""
    return tuple(name for name in _PACKAGES if importlib.util.find_spec(name) is None)


def require_onnx(purpose: str) -> None:
    """Do nothing when the extra ``onnx`` is there.

    Raises:
        MissingExtra: A package of it is missing; ``purpose`` begins the sentence.
    """
    for package in missing_onnx_packages():
        raise MissingExtra(package, "onnx", purpose)


def onnx_bytes(network: nn.Module, example: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Return ``network`` as a self-contained ONNX file with a free batch axis.

    Args:
        network: Network in eval mode; it is only read.
        example: Inputs (B, C, H, W); B should be 2 or more, so that no exporter mistakes the batch axis for a constant.
        metadata: Stored as the file's ``metadata_props``.

    Returns:
        The file. Input ``images`` (batch, C, H, W) float32, output ``logits`` (batch, classes). The same bytes whenever
        the same network is exported with the same versions.

    Raises:
        MissingExtra: A package of the extra ``onnx`` is not installed.
        RebuildError: Both exporters failed.
    """
    require_onnx("Writing model.onnx")
    import onnx

    try:
        model = export_onnx(network, example, input_names=[INPUT], output_names=[OUTPUT])
    except UserError as error:
        raise RebuildError(f"model.onnx cannot be written: {error}") from error
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def run_onnx(path: Path, batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits of ONNX Runtime on its CPU provider, whole batches and single examples.

    Args:
        path: The file.
        batches: Named batches (B, C, H, W), float32.

    Returns:
        As ``run_fresh``: for each name the logits of the batch, and under ``name/single`` those one by one.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        RebuildError: The file cannot be loaded or run.
    """
    require_onnx("Running model.onnx")
    try:
        session = onnx_session(path.read_bytes(), threads=torch.get_num_threads())
        feed = session.get_inputs()[0].name

        def logits(batch: Tensor) -> Tensor:
            return torch.from_numpy(np.asarray(session.run(None, {feed: batch.contiguous().numpy()})[0]))

        found = {}
        for name, batch in batches.items():
            found[name] = logits(batch)
            found[f"{name}/single"] = torch.cat([logits(example) for example in batch.split(1)])
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise RebuildError(f"{path.name} cannot be run: {type(error).__name__}: {error}") from error
    return found


def onnx_texts(architecture: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata for an ``architecture.json``: what a user of the ONNX file alone needs to know."""
    facts = architecture["input"]
    return {
        "archsmith.format_version": str(architecture["format_version"]),
        "archsmith.network_digest": architecture["network_digest"],
        "normalisation": json.dumps(facts["normalisation"]),
        "classes": json.dumps(facts["classes"], ensure_ascii=False),
    }


def onnx_metadata(path: Path) -> dict[str, str]:
    """Return the file's ``metadata_props``.

    Raises:
        MissingExtra: onnx is not installed.
        RebuildError: The file is no ONNX file.
    """
    return {entry.key: entry.value for entry in _parse(path).metadata_props}


def onnx_faults(path: Path) -> list[str]:
    """Return what keeps the file from being one self-contained file without traces of the machine; empty when clean.

    Looked for: tensors in other files, documentation strings and metadata of graph parts, and the home, current and
    installation folders of this process in any text of the file.

    Raises:
        MissingExtra: onnx is not installed.
        RebuildError: The file is no ONNX file.
    """
    model = _parse(path)
    folders = {os.path.expanduser("~"), os.getcwd(), sys.prefix, sys.base_prefix, os.path.dirname(torch.__file__)}
    marks = [*sorted(folder for folder in folders if folder != os.sep), "site-packages", 'File "']
    faults = []
    for message in messages(model):
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto" and (message.external_data or message.data_location):
            faults.append(f"tensor '{message.name}' lies in another file")
        faults += [f"a {kind} has a {name}" for name in notes(message) if message is not model]
        faults += [f"a {kind} contains {mark!r}" for text in _texts(message) for mark in marks if mark in text]
    return faults


def _parse(path: Path) -> Any:
    require_onnx("Reading model.onnx")
    import onnx

    try:
        return onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own exceptions
        raise RebuildError(f"{path.name} is no ONNX file: {error}") from error


def _texts(message: Any) -> Iterator[str]:
    """Yield the texts of a message itself; weights are bytes and may spell anything by chance."""
    for _, value in message.ListFields():
        if isinstance(value, str):
            yield value
        elif not hasattr(value, "DESCRIPTOR") and not isinstance(value, (bytes, int, float)):
            for item in value:
                if isinstance(item, (str, bytes)):
                    yield item if isinstance(item, str) else item.decode(errors="replace")
