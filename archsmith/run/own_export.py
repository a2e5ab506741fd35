"""The finished result of a network of the user's own: its code, a record of what was kept, weights, ONNX, torch.export.

``architecture.json`` says which factory makes the original and what its inputs are, ``record.json`` which positions of
it were kept, ``weights.safetensors`` holds the weights, ``model.onnx`` and ``program.pt2`` the same network without its
code, and ``check.safetensors`` real inputs with the logits that each of the others was compared with. There is no
``model.py``: the classes are the user's.
"""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from archsmith.atoms.records import record
from archsmith.core.files import sha256_file, storage_errors, to_json, write_atomic
from archsmith.run.export import check_inputs, check_logits, compare_onnx, largest_gap, replace_folder
from archsmith.run.onnx_file import missing_onnx_packages, onnx_bytes
from archsmith.run.rebuild import SOURCE_TOLERANCE, RebuildError

FORMAT_VERSION = 1
FILES = ("architecture.json", "record.json", "weights.safetensors", "model.onnx", "program.pt2", "check.safetensors")


def export_own_network(
    network: nn.Module,
    folder: str | Path,
    *,
    target: str,
    input_shape: Sequence[int],
    normalisation: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
    examples: Tensor,
    blocks: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Write the finished network, compare every form of it, and return the digests of the files.

    Args:
        network: The network, cut or whole, in evaluation mode; it is only read.
        folder: Where the files go; an older result there is replaced, and nothing is left there by a failure.
        target: "module:factory" of the original.
        input_shape: Shape of one input.
        normalisation: "mean" and "std" of the task.
        class_names: One name for each output.
        examples: At least two real inputs.
        blocks: Positions that remain of containers that lost blocks, before the cuts of the record.

    Returns:
        SHA-256 of every file by its name, and notes on files that could not be written.

    Raises:
        UserError: Inputs or class names do not fit, or the folder cannot be written.
        RebuildError: The network gives NaN.
        ExportError: A written file disagrees with the network.
    """
    folder = Path(folder)
    plain = copy.deepcopy(network).to("cpu", torch.float32).eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    inputs = examples.detach().to("cpu").contiguous()
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    check_inputs(inputs, input_shape)
    with torch.no_grad():
        logits = plain(inputs).contiguous()
    check_logits(logits, class_names)
    what = record(plain)
    facts = {
        "format_version": FORMAT_VERSION,
        "family": "own",
        "target": target,
        **({"blocks": {path: list(kept) for path, kept in blocks.items()}} if blocks else {}),
        "original": what.original,
        "network_digest": what.result,
        "input": {
            "shape": [int(size) for size in input_shape],
            "normalisation": {name: [float(x) for x in normalisation[name]] for name in ("mean", "std")},
            "classes": [str(name) for name in class_names],
        },
    }
    metadata = {"format_version": str(FORMAT_VERSION)}
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in plain.state_dict().items()
    }
    files = {
        "architecture.json": to_json(facts).encode(),
        "record.json": what.to_json().encode(),
        "weights.safetensors": save(weights, metadata),
        "check.safetensors": save({"inputs": inputs, "logits": logits}, metadata),
    }
    notes = []
    program, note = program_bytes(plain, inputs)
    notes += [note] if note else []
    if program is not None:
        files["program.pt2"] = program
    part = folder.with_name(f".{folder.name}.unfinished")
    try:
        with storage_errors("out", folder):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for name, data in files.items():
                write_atomic(part / name, data)
        if program is not None:
            compare_program(part / "program.pt2", {"inputs": inputs}, logits)
        if missing := missing_onnx_packages():
            notes.append(f"ONNX was not written: {', '.join(missing)} not installed (pip install 'archsmith[onnx]').")
        else:
            try:
                data = onnx_bytes(plain, inputs[:2], onnx_facts(facts))
            except RebuildError as error:
                notes.append(f"ONNX was not written: {error}")
            else:
                with storage_errors("out", folder):
                    write_atomic(part / "model.onnx", data)
                compare_onnx(part, inputs, logits)
        digests = {name: sha256_file(part / name) for name in FILES if (part / name).exists()}
        with storage_errors("out", folder):
            replace_folder(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    notes.append(
        "There is no model.py: the network's classes are the user's own; record.json and their code rebuild it."
    )
    return digests, notes


def onnx_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of ``model.onnx``: normalisation and class names, as JSON texts."""
    return {
        "archsmith.format_version": str(FORMAT_VERSION),
        "archsmith.network_digest": str(facts["network_digest"]),
        "archsmith.input": to_json(facts["input"]).strip(),
    }


def program_bytes(network: nn.Module, inputs: Tensor) -> tuple[bytes | None, str]:
    """Return the ``torch.export`` program of a network, with a free batch axis where it allows one, and a note."""
    note = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(network, (inputs[:2],), dynamic_shapes=shapes, strict=False)
        except Exception:
            try:
                program = torch.export.export(network, (inputs[:1],), strict=False)
            except Exception as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return None, f"program.pt2 was not written: torch.export refuses the network ({first})."
            note = "program.pt2 takes one example at a time: torch.export cannot free the batch axis of this network."
        stream = io.BytesIO()
        torch.export.save(program, stream)
    return stream.getvalue(), note


def run_program(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits of a ``program.pt2`` for named batches, and under ``name/single`` one by one.

    Reading such a file runs torch's deserialiser: only hand over files of one's own or of somebody trusted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(path).module()
    found = {}
    with torch.no_grad():
        for name, batch in inputs.items():
            found[f"{name}/single"] = torch.cat([program(example[None]) for example in batch])
            try:
                found[name] = program(batch)
            except Exception:  # a program for one example refuses more, which the note of the export has said
                continue
    return found


def compare_program(path: Path, inputs: Mapping[str, Tensor], logits: Tensor) -> float:
    """Return the largest difference of a ``program.pt2`` from ``logits``.

    Raises:
        ExportError: It is too large.
    """
    return largest_gap("program.pt2", run_program(path, inputs), logits, SOURCE_TOLERANCE)
