import copy
import json
import os
from pathlib import Path

import pytest
import torch
from finished_networks import CLASSES, NORMALISATION, examples, export, mixed_network, plain_network, run_here
from safetensors.torch import load_file, safe_open
from torch import nn

import archsmith.run.export as export_module
import archsmith.run.onnx_file as onnx_module
from archsmith.core.errors import MissingExtra, UserError
from archsmith.core.files import sha256_file
from archsmith.run.export import ExportError, export_network
from archsmith.run.onnx_file import onnx_bytes, onnx_faults, onnx_metadata, onnx_texts, run_onnx
from archsmith.run.rebuild import RebuildError, execute_source, gap, read_weights, run_fresh

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A training network in channels_last, exported; what it was before; the folder and the digests."""
    network = mixed_network().to(memory_format=torch.channels_last).train()
    before = copy.deepcopy(network)
    random = torch.get_rng_state()
    folder = tmp_path_factory.mktemp("run") / "networks" / "final"
    digests = export(network, folder)
    assert torch.equal(torch.get_rng_state(), random)
    return network, before, folder, digests


@pytest.fixture
def same_process(monkeypatch):
    """Leave out the fresh process, which takes seconds, for tests of other things."""
    monkeypatch.setattr(export_module, "compare_source", lambda *_: 0.0)


@pytest.fixture
def quick(same_process, monkeypatch):
    """Leave out ONNX as well."""
    monkeypatch.setattr(export_module, "missing_onnx_packages", lambda: ("onnx",))


def test_the_callers_network_stays_as_it_is(exported):
    network, before, _, _ = exported
    assert network.training and all(module.training for module in network.modules())
    for name, tensor in before.state_dict().items():
        mine = network.state_dict()[name]
        assert torch.equal(mine, tensor) and mine.stride() == tensor.stride(), name
    assert network.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert list(network.__dict__) == list(before.__dict__)


def test_all_files_are_there_with_their_digests(exported):
    _, _, folder, digests = exported
    assert list(digests) == ["architecture.json", "model.py", "weights.safetensors", "model.onnx", "check.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(digests)
    assert all(sha256_file(folder / name) == digest for name, digest in digests.items())
    assert [path.name for path in folder.parent.iterdir()] == ["final"]


def test_the_architecture_says_what_was_found(exported):
    network, _, folder, _ = exported
    stored = json.loads((folder / "architecture.json").read_text())
    assert stored["format_version"] == 1
    assert (stored["family"], stored["class"]) == ("mobile", "archsmith.layers.mobile.MobileNet")
    assert stored["arguments"] == json.loads(json.dumps(network.constructor()))
    assert stored["input"] == {"shape": [1, 8, 8], "normalisation": NORMALISATION, "classes": list(CLASSES)}
    assert len(stored["network_digest"]) == 64


def test_weights_are_plain_and_complete(exported):
    network, _, folder, _ = exported
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    with safe_open(folder / "weights.safetensors", "pt") as stored:
        assert stored.metadata() == {"format_version": "1"}


def test_the_check_file_holds_the_searched_networks_logits(exported):
    _, before, folder, _ = exported
    stored = load_file(folder / "check.safetensors")
    assert torch.equal(stored["inputs"], examples())
    with torch.no_grad():
        assert torch.equal(stored["logits"], before.eval()(examples()))


def test_the_same_network_gives_the_same_bytes_again(exported, tmp_path, same_process):
    network, _, _, digests = exported
    assert export(network, tmp_path / "again") == digests


def test_the_onnx_file_has_no_traces_of_the_machine(exported):
    _, _, folder, _ = exported
    assert onnx_faults(folder / "model.onnx") == []
    data = (folder / "model.onnx").read_bytes()
    for mark in (os.getcwd(), str(Path.home()), str(folder), "site-packages", ".py"):
        assert mark.encode() not in data, mark
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert not model.functions and not model.doc_string and not model.graph.doc_string
    assert all(not node.doc_string and not node.metadata_props for node in model.graph.node)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]


def test_the_onnx_file_explains_itself(exported):
    _, _, folder, _ = exported
    stored = json.loads((folder / "architecture.json").read_text())
    found = onnx_metadata(folder / "model.onnx")
    assert found == onnx_texts(stored)
    assert json.loads(found["normalisation"]) == NORMALISATION
    assert json.loads(found["classes"]) == list(CLASSES)
    assert found["archsmith.network_digest"] == stored["network_digest"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_onnx_file_takes_any_batch(exported, size):
    _, before, folder, _ = exported
    inputs = torch.randn(size, 1, 8, 8)
    found = run_onnx(folder / "model.onnx", {"x": inputs})
    with torch.no_grad():
        expected = before.eval()(inputs)
    for name in ("x", "x/single"):
        difference, scale = gap(expected, found[name])
        assert difference <= 1e-4 * scale


def test_faults_of_an_onnx_file_are_found(exported, tmp_path):
    _, _, folder, _ = exported
    model = onnx.load(folder / "model.onnx")
    model.graph.node[0].doc_string = "made here"
    entry = model.graph.node[1].metadata_props.add()
    entry.key, entry.value = "trace", f"{os.getcwd()}/x.py"
    onnx.save(model, tmp_path / "noted.onnx")
    faults = " ".join(onnx_faults(tmp_path / "noted.onnx"))
    assert "a NodeProto has a doc_string" in faults and "a NodeProto has a metadata_props" in faults
    assert f"contains {os.getcwd()!r}" in faults
    onnx.save(
        onnx.load(folder / "model.onnx"),
        tmp_path / "outside.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert "lies in another file" in " ".join(onnx_faults(tmp_path / "outside.onnx"))
    (tmp_path / "not.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(RebuildError, match=r"not\.onnx is no ONNX file"):
        onnx_faults(tmp_path / "not.onnx")


def test_a_plain_network_is_exported_too(tmp_path, same_process):
    assert "model.onnx" in export(plain_network(), tmp_path / "plain")


def test_an_onnx_file_that_differs_stops_the_export(tmp_path, same_process, monkeypatch):
    other = onnx_bytes(mixed_network(seed=1).eval(), examples(2), {})
    monkeypatch.setattr(export_module, "onnx_bytes", lambda *_: other)
    with pytest.raises(ExportError, match=r"model\.onnx differs from the searched network by [0-9.e-]+ at batch"):
        export(mixed_network(), tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_differs_stops_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "run_fresh", run_here)
    source = export_module.source_of
    monkeypatch.setattr(
        export_module, "source_of", lambda a: source(a).replace('activation="swish"', 'activation="relu"')
    )
    with pytest.raises(ExportError, match=r"model\.py .* differs from the searched network by .* allowed: 1e-05 \*"):
        export(mixed_network(), tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_single_examples_are_compared_as_well():
    logits = torch.zeros(2, 3)
    outputs = {"inputs": logits, "inputs/single": logits + 1e-3}
    with pytest.raises(
        ExportError, match=r"model\.onnx differs .* by 0\.001 at batch 1; allowed: 0\.0001 \* 1 = 0\.0001"
    ):
        export_module.largest_gap("model.onnx", outputs, logits, 1e-4)


def test_gaps_scale_with_the_logits_and_nan_is_infinite():
    assert gap(torch.tensor([[-50.0, 2.0]]), torch.tensor([[-50.0, 2.5]])) == (0.5, 50.0)
    assert gap(torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]]))[0] == float("inf")
    assert gap(torch.zeros(1, 2), torch.zeros(2, 2))[0] == float("inf")


def test_without_the_onnx_packages_the_rest_is_written(tmp_path, same_process, monkeypatch):
    monkeypatch.setattr(onnx_module, "_PACKAGES", ("onnx_not_installed_here",))
    digests = export(plain_network(), tmp_path / "final")
    assert "model.onnx" not in digests and not (tmp_path / "final" / "model.onnx").exists()
    assert len(digests) == 4
    with pytest.raises(MissingExtra, match=r"pip install 'archsmith\[onnx\]'"):
        onnx_bytes(plain_network(), examples(), {})


def test_an_older_result_is_replaced_as_a_whole(tmp_path, quick):
    folder = tmp_path / "final"
    export(mixed_network(), folder)
    (folder / "stray.txt").write_text("old")
    digests = export(plain_network(), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(digests)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_failed_export_leaves_the_older_result(tmp_path, quick, monkeypatch):
    folder = tmp_path / "final"
    digests = export(mixed_network(), folder)

    def fail(*_):
        raise ExportError("model.py differs")

    monkeypatch.setattr(export_module, "compare_source", fail)
    with pytest.raises(ExportError):
        export(plain_network(), folder)
    assert {name: sha256_file(folder / name) for name in digests} == digests
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_a_killed_export_left_is_cleared(tmp_path, quick):
    (tmp_path / ".final.unfinished").mkdir()
    (tmp_path / ".final.unfinished" / "model.onnx").write_text("half")
    digests = export(plain_network(), tmp_path / "final")
    assert "model.onnx" not in digests
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_path_below_a_file_is_one_clear_paragraph(tmp_path, quick):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: got .*a part of the path is a file, not a folder"):
        export(plain_network(), tmp_path / "file" / "final")


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (4, 3, 8, 8), (4, 64)])
def test_examples_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(
        UserError, match=r"examples: got a tensor of shape .* allowed: at least 2 inputs of shape \(1, 8"
    ):
        export(plain_network(), tmp_path / "final", torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_number_of_class_names_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"class_names: got 2 names for outputs of shape \(6, 10\)"):
        export_network(
            plain_network(),
            tmp_path / "final",
            family="mobile",
            input_shape=(1, 8, 8),
            normalisation=NORMALISATION,
            class_names=["a", "b"],
            examples=examples(),
        )


def test_a_foreign_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"network: got a torch.nn.modules.container.Sequential"):
        export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path / "final")


def test_a_network_that_gives_nan_is_not_exported(tmp_path):
    network = plain_network()
    network.classifier.bias.data[0] = float("nan")
    with pytest.raises(RebuildError, match="NaN or infinite logits"):
        export(network, tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_named(exported, tmp_path):
    _, _, folder, _ = exported
    text = (folder / "model.py").read_text().replace("last_channels=16", "last_channels=17")
    with pytest.raises(RebuildError, match=r"weights\.safetensors does not fit the network: size mismatch"):
        execute_source(text, folder / "weights.safetensors")


def test_a_source_that_needs_archsmith_is_not_standalone(exported, tmp_path):
    _, _, folder, _ = exported
    text = (folder / "model.py").read_text() + "\n\nimport archsmith\n"
    with pytest.raises(RebuildError, match=r"model\.py is not standalone: it brought in archsmith"):
        run_fresh(text, folder / "weights.safetensors", {"x": examples()})


def test_a_pickle_is_not_read_as_weights(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(RebuildError, match=r"not a readable safetensors file .* nothing was unpickled"):
        read_weights(tmp_path / "weights.safetensors")


@pytest.mark.slow
def test_the_other_exporter_takes_over(exported, tmp_path, monkeypatch):
    _, before, _, _ = exported

    def gone(*_):
        raise TypeError("dynamo=False is no longer supported")

    monkeypatch.setattr(onnx_module, "_traced", gone)
    (tmp_path / "model.onnx").write_bytes(onnx_bytes(before.eval(), examples(2), {"a": "b"}))
    assert onnx_faults(tmp_path / "model.onnx") == []
    found = run_onnx(tmp_path / "model.onnx", {"x": examples()})
    with torch.no_grad():
        assert export_module.largest_gap("model.onnx", found, before(examples()), 1e-4) < 1e-4
