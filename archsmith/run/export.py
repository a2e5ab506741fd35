"""The finished result: a folder with everything that is needed to use a network without archsmith.

``architecture.json`` says what was found, ``model.py`` is its plain source, ``weights.safetensors`` the trained
weights, ``model.onnx`` the same network for other runtimes, and ``check.safetensors`` holds real inputs with the logits
of the searched network, against which each of the others was compared before this module returned.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.core.files import sha256_file, sha256_of, storage_errors, sync_folder, to_json, write_atomic
from archsmith.run.constructor import Call, call_of
from archsmith.run.onnx_file import missing_onnx_packages, onnx_bytes, onnx_texts, run_onnx
from archsmith.run.rebuild import ONNX_TOLERANCE, SOURCE_TOLERANCE, RebuildError, gap, rebuild_network, run_fresh
from archsmith.run.source import source_of

FORMAT_VERSION = 1
FILES = ("architecture.json", "model.py", "weights.safetensors", "model.onnx", "check.safetensors")


class ExportError(ArchsmithError):
    """A written file does not do what the searched network does; the text names the file and the gap."""


def export_network(
    network: nn.Module,
    folder: str | Path,
    *,
    family: str,
    input_shape: Sequence[int],
    normalisation: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
    examples: Tensor,
    space: Mapping[str, Any] | None = None,
    decisions: Mapping[str, Any] | None = None,
    digest: str | None = None,
) -> dict[str, str]:
    """Write the finished result of ``network`` to ``folder``, reload every file and compare it with the network.

    The network is exported in float32, on the CPU and in torch's default memory format, whatever it was trained in, and
    its reference logits are computed in float32 on the CPU as well. It is copied first and stays as it is: mode, memory
    format, device, buffers, and the state of torch's random generators.

    Args:
        network: Network made of ``archsmith.layers`` classes, trained.
        folder: Where the files go; appears only when everything in it is written and checked. An older result there is
            replaced. Missing parents are made.
        family: Name of the family, recorded.
        input_shape: (C, H, W) of one input.
        normalisation: ``{"mean": [...], "std": [...]}`` for each channel.
        class_names: One name for each logit.
        examples: Real inputs (B, C, H, W), normalised, B at least 2.
        space: The space the network was searched in, as JSON values.
        decisions: Its choices by path, as JSON values.
        digest: Digest of these choices.

    Returns:
        SHA-256 by file name. ``model.onnx`` is missing in it (and in the folder) when a package of the extra ``onnx``
        is not installed: ask ``missing_onnx_packages()`` and tell the user.

    Raises:
        UserError: The network is not made of archsmith's layers, shapes disagree, or the folder cannot be written.
        ExportError: A reloaded file disagrees with the network; nothing is left at ``folder``.
        RebuildError: A file cannot be made, or not be rebuilt from; likewise.
    """
    folder = Path(folder)
    call = call_of(network)
    searched = copy.deepcopy(network).to("cpu", torch.float32).eval()
    kind = torch.float32 if examples.is_floating_point() else examples.dtype  # the ids of tokens stay whole numbers
    inputs = examples.detach().to("cpu", kind).contiguous()
    check_inputs(inputs, input_shape)
    with torch.no_grad():
        logits = searched(inputs).contiguous()
    check_logits(logits, class_names)

    architecture = _describe(call, family, space, decisions, digest, input_shape, normalisation, class_names)
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in searched.state_dict().items()
    }
    source = source_of(architecture)
    metadata = {"format_version": str(FORMAT_VERSION)}
    files: dict[str, bytes] = {
        "architecture.json": to_json(architecture).encode(),
        "model.py": source.encode(),
        "weights.safetensors": save(weights, metadata),
        "check.safetensors": save({"inputs": inputs, "logits": logits}, metadata),
    }
    part = folder.with_name(f".{folder.name}.unfinished")
    try:
        with storage_errors("out", folder):
            shutil.rmtree(part, ignore_errors=True)  # left by a killed process; a run has one writer at a time
            part.mkdir(parents=True)
            for name, data in files.items():
                write_atomic(part / name, data)
        compare_source(source, part, inputs, logits)
        if not missing_onnx_packages():
            plain = rebuild_network(call, part / "weights.safetensors")
            data = onnx_bytes(plain, inputs[:2], onnx_texts(architecture))
            with storage_errors("out", folder):
                write_atomic(part / "model.onnx", data)
            compare_onnx(part, inputs, logits)
        digests = {name: sha256_file(part / name) for name in FILES if (part / name).exists()}
        with storage_errors("out", folder):
            replace_folder(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return digests


def network_digest(call: Call) -> str:
    """Return the SHA-256 of the constructor tree: equal for equal networks, however they were found."""
    return sha256_of(json.dumps(call.to_json(), sort_keys=True, separators=(",", ":")).encode())


def compare_source(source: str, folder: Path, inputs: Tensor, logits: Tensor) -> float:
    """Run a ``model.py`` text in a fresh process with the weights of ``folder`` and return its largest difference.

    Raises:
        ExportError: It differs from ``logits`` by more than ``1e-5 * max(1, max|logits|)``, at batch 1 or more.
        RebuildError: It cannot be built or run.
    """
    outputs = run_fresh(source, folder / "weights.safetensors", {"inputs": inputs})
    return largest_gap("model.py with weights.safetensors", outputs, logits, SOURCE_TOLERANCE)


def compare_onnx(folder: Path, inputs: Tensor, logits: Tensor) -> float:
    """Run ``model.onnx`` of ``folder`` in ONNX Runtime and return its largest difference.

    Raises:
        ExportError: It differs from ``logits`` by more than ``1e-4 * max(1, max|logits|)``, at batch 1 or more.
        MissingExtra: ONNX Runtime is not installed.
        RebuildError: It cannot be loaded or run.
    """
    outputs = run_onnx(folder / "model.onnx", {"inputs": inputs})
    return largest_gap("model.onnx", outputs, logits, ONNX_TOLERANCE)


def largest_gap(file: str, outputs: Mapping[str, Tensor], logits: Tensor, tolerance: float) -> float:
    """Return the largest difference of ``outputs`` (one run for each key) from ``logits``.

    Raises:
        ExportError: It is above ``tolerance * max(1, max|logits|)``.
    """
    worst = 0.0
    for name, found in outputs.items():
        difference, scale = gap(logits, found)
        worst = max(worst, difference)
        if not difference <= tolerance * scale:
            size = "batch 1" if name.endswith("/single") else f"batch {len(logits)}"
            raise ExportError(
                f"{file} differs from the searched network by {difference:.3g} at {size}; "
                f"allowed: {tolerance:g} * {scale:.4g} = {tolerance * scale:.3g}."
            )
    return worst


def _describe(
    call: Call,
    family: str,
    space: Mapping[str, Any] | None,
    decisions: Mapping[str, Any] | None,
    digest: str | None,
    input_shape: Sequence[int],
    normalisation: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Return the content of ``architecture.json``."""
    return {
        "format_version": FORMAT_VERSION,
        "family": family,
        **call.to_json(),
        "space": space,
        "decisions": decisions,
        "digest": digest,
        "network_digest": network_digest(call),
        "input": {
            "shape": [int(size) for size in input_shape],
            "normalisation": {name: [float(x) for x in normalisation[name]] for name in ("mean", "std")},
            "classes": [str(name) for name in class_names],
        },
    }


def check_inputs(inputs: Tensor, input_shape: Sequence[int]) -> None:
    """Refuse fewer than two examples, or examples of another shape."""
    if inputs.dim() != len(input_shape) + 1 or tuple(inputs.shape[1:]) != tuple(input_shape) or len(inputs) < 2:
        raise UserError(
            "examples",
            Shown(f"a tensor of shape {tuple(inputs.shape)}"),
            allowed=f"at least 2 inputs of shape {tuple(input_shape)}",
        )


def check_logits(logits: Tensor, class_names: Sequence[str]) -> None:
    """Refuse outputs whose last axis is not one finite number for each class; sequences have an axis of time before."""
    if logits.dim() < 2 or logits.shape[-1] != len(class_names):
        raise UserError(
            "class_names",
            Shown(f"{len(class_names)} names for outputs of shape {tuple(logits.shape)}"),
            allowed="one name for each output",
        )
    if not bool(torch.isfinite(logits).all()):
        raise RebuildError("the network gives NaN or infinite logits on the examples; nothing was exported.")


def replace_folder(part: Path, folder: Path) -> None:
    """Rename ``part`` to ``folder``; an older result is moved aside first and deleted afterwards."""
    old = part.with_suffix(".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
