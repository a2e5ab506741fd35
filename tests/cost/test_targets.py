"""What a user may type as a target or a shape, and what is said when it is wrong."""

import sys

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import example_inputs, load_target, parse_shapes

SOURCE = """
import torch.nn as nn

class Small(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
    @staticmethod
    def wide():
        return nn.Linear(2, 30)

instance = Small()
number = 3
def returns_number(): return 3
def needs(width): return nn.Linear(width, 1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "typed_nets.py").write_text(SOURCE)
    (tmp_path / "typed_broken.py").write_text("import no_such_package\n")
    (tmp_path / "typed_failing.py").write_text("1 / 0\n")
    (tmp_path / "net.onnx").write_bytes(b"onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("typed_nets", "typed_broken", "typed_failing"):
        sys.modules.pop(name, None)


def test_factories_and_files(folder):
    assert isinstance(load_target("typed_nets:Small"), nn.Linear)
    assert load_target("typed_nets:Small.wide").out_features == 30
    assert load_target("net.onnx").name == "net.onnx"
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("typed_nets", r"target: got 'typed_nets'; allowed: module:factory or the path of an .onnx file"),
        (":Small", r"got ':Small'"),
        ("other.onnx", r"got 'other.onnx'; allowed: an existing .onnx file"),
        ("no_such_net:Small", r"there is no module 'no_such_net'.*Run from the folder that holds no_such_net"),
        ("typed_broken:Small", r"there is no module 'no_such_package'"),
        ("typed_failing:Small", r"whose import fails \(ZeroDivisionError: division by zero\)"),
        ("typed_nets:Large", r"'typed_nets' has no 'Large'"),
        ("typed_nets:number", r"'typed_nets:number', a int; allowed: a function or class"),
        ("typed_nets:instance", r"'typed_nets:instance', a Small; allowed: a function or class"),
        ("typed_nets:returns_number", r"which returns a int; allowed: a factory of an nn.Module"),
        ("typed_nets:needs", r"fails when called \(TypeError: .*'width'\); allowed: a factory that needs no arg"),
    ],
)
def test_bad_targets(folder, text, message):
    with pytest.raises(UserError, match=message):
        load_target(text)


def test_shapes_and_inputs():
    assert parse_shapes("1x3x224x224") == ((1, 3, 224, 224),)
    assert parse_shapes("2x8, 2") == ((2, 8), (2,))
    inputs = example_inputs(((2, 8), (2,)))
    assert [tuple(x.shape) for x in inputs] == [(2, 8), (2,)] and inputs[0].dtype == torch.float32
    assert torch.equal(inputs[0], example_inputs(((2, 8), (2,)))[0])


@pytest.mark.parametrize("text", ["", "3x", "0x3", "1x-3", "1*3", "axb", "1x3,", "1.5x2", "²x3"])
def test_bad_shapes(text):
    with pytest.raises(UserError, match=r"input: got .*; allowed: positive sizes joined by x.* such as 1x3x224x224"):
        parse_shapes(text)
