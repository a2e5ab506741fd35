"""``model.onnx``: one file with everything in it, and nothing that does not belong there.

Which exporter: torch has two. The one that traces (``dynamo=False``) is asked first: on a network of 16 mixed blocks
it took 0.9 s against 10 s of the one built on ``torch.export``, folded the same normalisations into convolutions, and
wrote no stack traces. torch has announced its removal, so where it is gone or fails, the other one is used. Either way
every documentation string and every piece of exporter metadata is removed (the second exporter records source paths of
the machine), and the file is compared with the network in ONNX Runtime by the caller.

Everything optional is imported inside the functions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.core.errors import MissingExtra
from archsmith.cost.backends import onnx_session
from archsmith.run.rebuild import RebuildError

OPSET = 18  # what both exporters can write, and ONNX Runtime 1.14 (2023) and later can read
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
        model = onnx.load_model_from_string(_traced(network, example))
    except Exception:
        try:
            model = _exported(network, example)
        except Exception as error:
            raise RebuildError(f"model.onnx cannot be written: {type(error).__name__}: {error}") from error
    _clean(model)
    model.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _traced(network: nn.Module, example: Tensor) -> bytes:
    with tempfile.TemporaryDirectory(prefix="archsmith-") as folder, warnings.catch_warnings():
        path = Path(folder, "model.onnx")
        warnings.simplefilter("ignore")  # the removal that the module's docstring speaks of
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
        return path.read_bytes()


def _exported(network: nn.Module, example: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about packages of the exporter that this network does not need
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _clean(model: Any) -> None:
    """Remove documentation strings and metadata from every part of a model."""
    for message in _messages(model):
        for name in _notes(message):
            message.ClearField(name)


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
    for message in _messages(model):
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto" and (message.external_data or message.data_location):
            faults.append(f"tensor '{message.name}' lies in another file")
        faults += [f"a {kind} has a {name}" for name in _notes(message) if message is not model]
        faults += [f"a {kind} contains {mark!r}" for text in _texts(message) for mark in marks if mark in text]
    return faults


def _parse(path: Path) -> Any:
    require_onnx("Reading model.onnx")
    import onnx

    try:
        return onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own exceptions
        raise RebuildError(f"{path.name} is no ONNX file: {error}") from error


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protocol buffer message and all messages inside it."""
    yield message
    for part, value in message.ListFields():
        if part.message_type is not None:
            for inner in [value] if hasattr(value, "DESCRIPTOR") else list(value):
                yield from _messages(inner)


def _notes(message: Any) -> list[str]:
    """Return the fields in which exporters leave notes and that are filled here."""
    return [part.name for part, _ in message.ListFields() if part.name in ("doc_string", "metadata_props")]


def _texts(message: Any) -> Iterator[str]:
    """Yield the texts of a message itself; weights are bytes and may spell anything by chance."""
    for _, value in message.ListFields():
        if isinstance(value, str):
            yield value
        elif not hasattr(value, "DESCRIPTOR") and not isinstance(value, (bytes, int, float)):
            for item in value:
                if isinstance(item, (str, bytes)):
                    yield item if isinstance(item, str) else item.decode(errors="replace")
