import json

import pytest

from archsmith.core.errors import UserError
from archsmith.space.module_programs import decisions_of, module_from_json, module_to_json
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import (
    Affine,
    Concat,
    Conv2D,
    Dropout,
    MaybeSwap,
    Module,
    Or,
    ReLU,
    Repeat,
    RepeatTied,
    Residual,
    Tanh,
    UserHyperparams,
)

SPACES: dict[str, Module] = {
    "tied": Concat([RepeatTied(Concat([Conv2D([2, 3], [3]), MaybeSwap(ReLU(), Tanh())]), [1, 2]), Affine([10])]),
    "untied": Repeat(Residual(Or([Dropout([0.5, 0.9]), Tanh()])), [1, 3]),
    "single": Or([Concat([UserHyperparams(lr=[0.1, 0.01])])]),
}


@pytest.mark.parametrize("name", SPACES)
def test_every_program_leads_back_to_its_decisions(name: str) -> None:
    space = ModuleSpace(name, SPACES[name], (2, 4, 4))
    for sample in space.enumerate():
        assert decisions_of(space.module, space.program(sample)) == dict(sample)


def test_foreign_programs_have_no_decisions() -> None:
    tied = SPACES["tied"]
    space = ModuleSpace("tied", tied, (2, 4, 4))
    program = space.program(next(iter(space.enumerate())))
    assert decisions_of(SPACES["untied"], program) is None
    assert decisions_of(tied, ("Concat", program[1][:1])) is None
    two = space.program(next(each for each in space.enumerate() if each["0-RepeatTied/times"] == 2))
    copies = two[1][0][1]
    other = ("Concat", (("Conv2D", (("filters", 3), *copies[0][1][0][1][1:])), copies[0][1][1]))
    assert other != copies[0]
    assert decisions_of(tied, ("Concat", (("Concat", (copies[0], other)), two[1][1]))) is None


@pytest.mark.parametrize("name", SPACES)
def test_expressions_survive_json(name: str) -> None:
    again = module_from_json(json.loads(json.dumps(module_to_json(SPACES[name]))))
    assert again == SPACES[name] and type(again) is type(SPACES[name])
    assert again.size == SPACES[name].size
    with pytest.raises(UserError, match="an expression in JSON, with 'modules'"):
        module_from_json({"kind": "Concat"})
