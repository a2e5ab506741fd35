"""``verify`` for a finished network of the user's own.

Its classes are the user's code, so nothing of it is executed without ``trust``; neither is ``program.pt2`` read, whose
format may hold more than numbers. What can be checked without: the files' digests, the record, the weights, and
``model.onnx`` on the stored inputs, its multiply-accumulates included.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.atoms.records import Record, rebuild
from archsmith.core.files import read_json, sha256_file
from archsmith.cost import count_onnx
from archsmith.run.checks import Failed, NotChecked, Report, Rows
from archsmith.run.claims import RECORDED, check_accuracy, check_cost, check_latency
from archsmith.run.costs import exact_costs
from archsmith.run.export import largest_gap
from archsmith.run.onnx_file import onnx_faults, onnx_metadata, run_onnx
from archsmith.run.own_export import FILES, FORMAT_VERSION, onnx_facts, run_program
from archsmith.run.own_model import is_folder, made_network
from archsmith.run.rebuild import ONNX_TOLERANCE, SOURCE_TOLERANCE, read_weights
from archsmith.run.verify_network import OnTestRead
from archsmith.supernet.elastic_depth import remove_blocks_
from archsmith.tasks.base import Task

_METRIC = "_accuracy"
_TASK_EXAMPLES = 32


def is_own_network(folder: Path) -> bool:
    """Return whether a folder holds a network of the user's own."""
    return (folder / "record.json").is_file()


def verify_own_network(
    folder: Path,
    *,
    trust: bool,
    task: Task | None,
    expected: Mapping[str, Any],
    limits: Mapping[str, float],
    label: str,
    on_test_read: OnTestRead,
) -> Report:
    """Check one folder; the arguments are those of ``verify_network``."""
    return _OwnVerification(folder, trust, task, expected, limits, label, on_test_read).report()


class _OwnVerification:
    """The checks of one folder, in order; later ones use what earlier ones established."""

    def __init__(
        self,
        folder: Path,
        trust: bool,
        task: Task | None,
        expected: Mapping[str, Any],
        limits: Mapping[str, float],
        label: str,
        on_test_read: OnTestRead,
    ) -> None:
        self.folder, self.trust, self.task = folder, trust, task
        self.expected, self.limits, self.on_test_read = expected, limits, on_test_read
        self.rows = Rows(label)
        self.facts: Mapping[str, Any] | None = None
        self.record: Record | None = None
        self.network: nn.Module | None = None
        self.probes: list[tuple[str, Tensor, Tensor]] = []  # what it is, inputs, logits

    def report(self) -> Report:
        """Run all checks."""
        check = self.rows.check
        if self.expected:
            for name in dict.fromkeys([*FILES, *self.expected.get("files", {})]):
                check(f"sha256 of {name}", partial(self._check_digest, name))
        check("architecture.json", self._check_facts)
        check("record.json", self._check_record)
        check("weights.safetensors", self._check_weights)
        check("check.safetensors", self._check_examples)
        check("rebuilt", self._check_rebuilt)
        if self.task is not None:
            check("task images", self._check_task_images)
        check("program.pt2", self._check_program)
        check("ONNX file", self._check_onnx_file)
        check("ONNX Runtime", self._check_onnx_outputs)
        costs = self.expected.get("costs", {})
        for cost, key in RECORDED.items():
            if key in costs or cost in self.limits:
                check(cost, partial(self._check_cost, cost))
        check("latency", self._check_latency)
        for name, value in self.expected.get("metrics", {}).items():
            if name.endswith(_METRIC):
                check(name, partial(self._check_accuracy, name.removesuffix(_METRIC), value))
        return self.rows.report()

    def _check_digest(self, name: str) -> str:
        recorded = self.expected.get("files", {}).get(name)
        path = self.folder / name
        if name not in FILES:
            raise Failed(f"result.json lists it, but a finished network has only {', '.join(FILES)}")
        if recorded is None:
            if name in ("model.onnx", "program.pt2") and not path.exists():
                raise NotChecked("the run did not write it; its notes say why")
            raise Failed("result.json does not list it")
        if not path.is_file():
            raise Failed("the file is missing")
        if (found := sha256_file(path)) != recorded:
            raise Failed(f"the file has {found[:12]}..., result.json says {str(recorded)[:12]}...")
        return f"{found[:12]}..."

    def _check_facts(self) -> str:
        facts = read_json(self.folder / "architecture.json")
        version = facts.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise Failed(f"format_version is {version!r}; this version of archsmith reads 1 to {FORMAT_VERSION}")
        if not isinstance(facts.get("target"), str):
            raise Failed("it names no module:factory")
        self.facts = facts
        return f"{facts['target']}, fingerprint {facts.get('network_digest')}"

    def _check_record(self) -> str:
        self.record = Record.from_json((self.folder / "record.json").read_text(encoding="utf-8"))
        facts = self.facts or {}
        if (self.record.original, self.record.result) != (facts.get("original"), facts.get("network_digest")):
            raise Failed("its fingerprints are not those of architecture.json")
        return f"{len(self.record.tensors)} tensors of the original are cut"

    def _check_weights(self) -> str:
        weights = read_weights(self.folder / "weights.safetensors")
        broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise Failed(f"NaN or infinite values in {', '.join(broken[:3])}")
        if self.record is not None:
            wrong = [
                name
                for name, tensor in weights.items()
                if name in self.record.shapes and tuple(tensor.shape) != self.record.new_shape(name)
            ]
            if wrong:
                raise Failed(f"shapes that the record does not lead to: {', '.join(wrong[:3])}")
        return f"{len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers"

    def _check_examples(self) -> str:
        stored = read_weights(self.folder / "check.safetensors")
        inputs, logits = stored.get("inputs"), stored.get("logits")
        if inputs is None or logits is None or len(inputs) < 2 or len(inputs) != len(logits):
            raise Failed("needs 'inputs' and 'logits' of the same number of examples, at least 2")
        self.probes.append(("stored inputs", inputs, logits))
        return f"{len(inputs)} inputs of shape {tuple(inputs.shape[1:])} with the logits of the network"

    def _check_rebuilt(self) -> str:
        if self.facts is None or self.record is None:
            raise NotChecked("architecture.json or record.json could not be read")
        if not self.trust and not is_folder(str(self.facts["target"])):
            raise NotChecked("it would execute the network's own code; use --trust if you trust its author")
        with torch.random.fork_rng(devices=[]):
            network = made_network(str(self.facts["target"]), self.task)
        if not isinstance(network, nn.Module):
            raise Failed(f"{self.facts['target']} makes no network")
        if blocks := self.facts.get("blocks"):
            remove_blocks_(network, blocks)
        rebuild(network, self.record, read_weights(self.folder / "weights.safetensors"))
        self.network = network.eval()
        gaps = self._compare("the rebuilt network", self._outputs(), SOURCE_TOLERANCE)
        return f"{self.facts['target']}, cut and loaded: {gaps}"

    def _outputs(self) -> dict[str, Tensor]:
        network = self._rebuilt()
        found = {}
        with torch.no_grad():
            for what, inputs, _ in self._needed_probes():
                found[what] = network(inputs)
                found[f"{what}/single"] = torch.cat([network(example[None]) for example in inputs])
        return found

    def _check_task_images(self) -> str:
        assert self.task is not None
        facts = (self.facts or {}).get("input", {})
        differing = [
            name
            for name, claimed, actual in (
                ("shape", facts.get("shape"), list(self.task.input_shape)),
                ("classes", facts.get("classes"), list(self.task.class_names)),
                ("normalisation", facts.get("normalisation"), {k: list(v) for k, v in self.task.normalisation.items()}),
            )
            if claimed != actual
        ]
        if differing:
            raise Failed(f"architecture.json and the task differ in {', '.join(differing)}")
        network = self._rebuilt()
        split = "test" if "test" in self.task.splits else "valid"
        if split == "test":
            self.on_test_read()
        images = self.task.examples(min(_TASK_EXAMPLES, self.task.size(split)), split).contiguous()
        with torch.no_grad():
            self.probes.append((f"{split} images", images, network(images)))
        return f"{len(images)} {split} images; shape, classes and normalisation are the task's"

    def _check_program(self) -> str:
        path = self.folder / "program.pt2"
        if not path.is_file():
            raise NotChecked("there is no program.pt2")
        if not self.trust:
            raise NotChecked("reading it runs a deserialiser; use --trust if you trust its author")
        outputs = run_program(path, {what: inputs for what, inputs, _ in self._needed_probes()})
        return self._compare("program.pt2", outputs, SOURCE_TOLERANCE)

    def _check_onnx_file(self) -> str:
        path = self._onnx()
        if faults := onnx_faults(path):
            raise Failed("; ".join(faults[:3]))
        if self.facts is None:
            raise NotChecked("architecture.json could not be read")
        found = onnx_metadata(path)
        differing = [name for name, text in onnx_facts(self.facts).items() if found.get(name) != text]
        if differing:
            raise Failed(f"its metadata and architecture.json differ in {', '.join(differing)}")
        return "one file, no traces of the machine, metadata as in architecture.json"

    def _check_onnx_outputs(self) -> str:
        outputs = run_onnx(self._onnx(), {what: inputs for what, inputs, _ in self._needed_probes()})
        return self._compare("model.onnx", outputs, ONNX_TOLERANCE)

    def _check_cost(self, cost: str) -> str:
        if self.network is None and cost == "macs" and (self.folder / "model.onnx").is_file():
            shape = (1, *self._needed_probes()[0][1].shape[1:])
            found = count_onnx(self.folder / "model.onnx", (shape,)).macs
            return f"{check_cost(cost, found, self.expected.get('costs', {}), self.limits)} (of model.onnx)"
        exact = exact_costs(self._rebuilt(), self._needed_probes()[0][1][:1].clone())
        return check_cost(cost, exact[cost], self.expected.get("costs", {}), self.limits)

    def _check_latency(self) -> str:
        claimed = self.expected.get("costs", {}).get("latency")
        example = self._needed_probes()[0][1][:1]
        return check_latency(self._rebuilt(), self.folder / "model.onnx", example, claimed, self.limits)

    def _check_accuracy(self, split: str, value: float) -> str:
        if self.task is None:
            raise NotChecked("the task's data are not at hand")
        if split not in self.task.splits:
            raise NotChecked(f"the task has no part '{split}'")
        network = self._rebuilt()
        if split == "test":
            self.on_test_read()
        return check_accuracy(network, self.task, split, value)

    def _rebuilt(self) -> nn.Module:
        if self.network is None:
            raise NotChecked("the network was not rebuilt")
        return self.network

    def _onnx(self) -> Path:
        path = self.folder / "model.onnx"
        if not path.is_file():
            raise NotChecked("there is no model.onnx")
        return path

    def _needed_probes(self) -> list[tuple[str, Tensor, Tensor]]:
        if not self.probes:
            raise NotChecked("check.safetensors holds no inputs")
        return self.probes

    def _compare(self, file: str, outputs: Mapping[str, Tensor], tolerance: float) -> str:
        """Compare the outputs on every probe, as a batch and one by one; return the gaps."""
        gaps = []
        for what, inputs, logits in self.probes:
            mine = {name: value for name, value in outputs.items() if name.split("/")[0] == what}
            worst = largest_gap(f"{file} on the {what}", mine, logits, tolerance)
            gaps.append(f"{worst:.2g} on {len(inputs)} {what}")
        return f"largest gap {', '.join(gaps)}"
