import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finished_networks import mixed_network, plain_network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import archsmith.layers
from archsmith.core.errors import UserError
from archsmith.run.constructor import Call, build, call_of, parse_call
from archsmith.run.source import render, source_of, standalone_source

PATH = "archsmith.layers.mobile.MobileNet"
FACTS = {
    "input_shape": (1, 8, 8),
    "normalisation": {"mean": [0.5], "std": [0.25]},
    "class_names": ["0", "1"],
}


def text_of(network):
    call = call_of(network)
    return standalone_source(call.path, call.arguments, **FACTS)


def executed(text):
    namespace = {"__name__": "standalone"}
    exec(compile(text, "model.py", "exec"), namespace)
    return namespace


@pytest.fixture
def layer_modules(tmp_path, monkeypatch):
    """Add modules to archsmith.layers for one test: ``layer_modules(name=source, ...)``."""
    monkeypatch.setattr(archsmith.layers, "__path__", [*archsmith.layers.__path__, str(tmp_path)])
    before = set(sys.modules)

    def add(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)

    yield add
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("make", [mixed_network, plain_network])
def test_the_built_network_is_the_same_function(make):
    network = make().eval()
    rebuilt = executed(text_of(network))["build"]()
    rebuilt.load_state_dict(network.state_dict())
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(rebuilt.eval()(inputs), network(inputs))


def test_arguments_from_python_and_from_json_give_the_same_text():
    arguments = mixed_network().constructor()
    as_json = json.loads(json.dumps(arguments))
    assert as_json != arguments
    assert standalone_source(PATH, as_json, **FACTS) == standalone_source(PATH, arguments, **FACTS)


def test_the_text_does_not_depend_on_the_process():
    code = (
        "import json, sys; from archsmith.run.source import standalone_source as s; r = json.load(sys.stdin);"
        "sys.stdout.write(s(r['path'], r['arguments'], **r['facts']))"
    )
    arguments = mixed_network().constructor()
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps({"path": PATH, "arguments": arguments, "facts": FACTS}),
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "123"},
        check=True,
    )
    assert done.stdout == standalone_source(PATH, arguments, **FACTS)


def test_a_literal_value_shows_in_the_constructor_call():
    text = text_of(plain_network())
    assert "return MobileNet(\n        in_channels=1,\n        num_classes=10," in text
    assert "        blocks=((4, 1, ((3, 4), (5, 2)), True),),\n" in text


def test_it_is_formatted_and_has_nothing_unused():
    names = ['it\'s "quoted"', "naïve\n", *map(str, range(40))]
    blocks = tuple((16, 1, ((3, 100 + i), (5, 200), (7, 300)), True) for i in range(6))
    arguments = {**mixed_network().constructor(), "blocks": blocks}
    text = standalone_source(PATH, arguments, **{**FACTS, "class_names": names})
    for command in (["format", "--check"], ["check", "--select", "E,F,I,W,UP"]):
        options = ["--isolated", "--line-length=120", "--target-version=py311", "-"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_imports_are_torch_and_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(text_of(mixed_network()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"__future__", "typing", "torch"}


def test_only_what_is_used_is_inlined():
    text = standalone_source(
        "archsmith.layers.mobile.SqueezeExcite", {"channels": 8, "hidden": 2, "activation": "relu"}, **FACTS
    )
    tree = ast.parse(text)
    defined = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert defined == ["make_activation", "SqueezeExcite", "build"]
    assert "typing" not in text


def test_hostile_texts_stay_literals():
    names = ['"""', "\n__import__('os')", "\\", "'\"", "\u202e", "ü", "\ud800"]
    text = standalone_source(PATH, plain_network().constructor(), **{**FACTS, "class_names": names})
    assert executed(text)["CLASSES"] == tuple(names)
    assert text.isascii()


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "archsmith.run.export.ExportError",
        "archsmith.layersx.mobile.MobileNet",
        "archsmith.layers.MobileNet",
        "archsmith.layers..mobile.MobileNet",
        "archsmith.layers.mobile.MobileNet\n",
        "archsmith.layers.mobile.MobileNet()",
        "archsmith.layers.__init__.os.system",
        None,
    ],
)
def test_a_class_from_elsewhere_is_refused(path):
    with pytest.raises(UserError, match=r"class: got .*allowed: a class below archsmith.layers"):
        standalone_source(path, {}, **FACTS)


@pytest.mark.parametrize("name", ["nn", "Tensor", "Missing"])
def test_a_name_that_the_module_does_not_define_is_refused(name):
    with pytest.raises(UserError, match=f"class: got 'archsmith.layers.mobile.{name}'; allowed: a class that"):
        standalone_source(f"archsmith.layers.mobile.{name}", {}, **FACTS)
    with pytest.raises(UserError, match="class: got"):
        build(parse_call(f"archsmith.layers.mobile.{name}", {}))


def test_a_module_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"allowed: a module of archsmith.layers"):
        standalone_source("archsmith.layers.missing.Net", {}, **FACTS)


@pytest.mark.parametrize("value", [{1, 2}, torch.zeros(1), float("nan"), float("inf"), len, b"x", {1: 2}, [[object()]]])
def test_an_argument_that_is_no_literal_is_refused(value):
    with pytest.raises(UserError, match="arguments: got blocks"):
        parse_call(PATH, {"blocks": value})


@pytest.mark.parametrize("name", ["x=1, y", "a b", "", "é", 3])
def test_an_argument_name_that_is_no_identifier_is_refused(name):
    with pytest.raises(UserError, match="allowed: argument names that are plain identifiers"):
        parse_call(PATH, {name: 1})


def test_arguments_that_the_class_refuses_are_the_users_mistake():
    with pytest.raises(UserError, match="arguments: got values that MobileNet refuses"):
        build(parse_call(PATH, {"in_channels": 1}))


def test_a_network_without_constructor_is_refused():
    with pytest.raises(UserError, match=r"network: got a torch.nn.modules.linear.Linear, which has no constructor\(\)"):
        call_of(nn.Linear(1, 1))


def test_missing_facts_in_an_architecture_are_refused():
    with pytest.raises(UserError, match=r"architecture.json: got None; allowed: an object 'input'"):
        source_of({"class": PATH, "arguments": {}})


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=6).map(tuple) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
)


@given(VALUES, st.integers(0, 110))
def test_rendered_values_read_back(value, column):
    text = render(value, column=column)
    assert ast.literal_eval(text) == value
    assert repr(ast.literal_eval(text)) == repr(value)


@given(st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), VALUES, max_size=4))
def test_a_call_survives_json(arguments):
    call = parse_call(PATH, arguments)
    stored = json.loads(json.dumps(call.to_json()))
    assert parse_call(stored["class"], stored["arguments"]) == call


SHARED = """\
import math

import torch
from torch import nn

# How wide a tail is.
WIDTH = 2
UNUSED = 3


def halve(x: int) -> int:
    return math.floor(x / WIDTH)


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), float(halve(4))))

    def forward(self, x):
        return x * self.scale

    def constructor(self):
        return {"width": self.scale.shape[0]}
"""
COMPOSED = """\
from torch import nn

from archsmith.layers.a_shared import halve


class Body(nn.Module):
    def __init__(self, heads, options) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.options = options

    def forward(self, x):
        for head in self.heads:
            x = head(x)
        return halve(self.options["four"]) * x

    def constructor(self):
        return {"heads": tuple(self.heads), "options": self.options}
"""


def test_nested_layers_of_several_modules_become_nested_calls(layer_modules):
    layer_modules(a_shared=SHARED, b_composed=COMPOSED)
    from archsmith.layers.a_shared import Head
    from archsmith.layers.b_composed import Body

    network = Body([Head(3), Head(3)], {"four": 4})
    call = call_of(network)
    assert isinstance(call.arguments["heads"][0], Call)
    text = text_of(network)
    assert 'return Body(heads=(Head(width=3), Head(width=3)), options={"four": 4})' in text
    assert text.index("# How wide a tail is.\nWIDTH = 2") < text.index("def halve") < text.index("class Head")
    assert text.index("class Head") < text.index("class Body")
    assert "UNUSED" not in text
    assert "import math\n\nimport torch\nfrom torch import nn\n" in text
    assert torch.equal(executed(text)["build"]()(torch.ones(3)), network(torch.ones(3)))
    stored = json.loads(json.dumps(call.to_json()))
    rebuilt = build(parse_call(stored["class"], stored["arguments"]))
    assert torch.equal(rebuilt(torch.ones(3)), network(torch.ones(3)))


def test_one_name_in_two_modules_is_a_defect(layer_modules):
    layer_modules(
        a_one="from torch import nn\ndef helper(): pass\nclass A(nn.Module):\n    x = helper\n",
        b_two="from torch import nn\nfrom archsmith.layers.a_one import A\ndef helper(): pass\n"
        "class B(A):\n    y = helper\n",
    )
    with pytest.raises(ValueError, match="'helper' is defined in two modules"):
        standalone_source("archsmith.layers.b_two.B", {}, **FACTS)


@pytest.mark.parametrize("line", ["import os", "import numpy as np", "from torch import nn as n", "import torch.nn"])
def test_other_imports_in_a_layer_module_are_a_defect(layer_modules, line):
    layer_modules(c_other=f"{line}\nclass A: pass\n")
    with pytest.raises(ValueError, match="c_other line 1: layer modules may import torch"):
        standalone_source("archsmith.layers.c_other.A", {}, **FACTS)


def test_every_layer_module_keeps_the_rules():
    folder = Path(archsmith.layers.__path__[0])
    found = 0
    for file in sorted(folder.glob("[a-z]*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                text = standalone_source(f"archsmith.layers.{file.stem}.{node.name}", {}, **FACTS)
                assert node.name in executed(text)
                found += 1
    assert found
