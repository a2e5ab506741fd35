import json
import math

import pytest
from st_nas_cases import cases

from archsmith.core.errors import UserError
from archsmith.train.milestones import Milestones, Rule

NUMBERS = {"continue": 0, "new best": 1, "stop": 2}


def rule_of(given):
    names = {"e_min": "free_epochs"}
    return Rule(**{names.get(key, key): value for key, value in given.items() if key != "val_losses"})


@pytest.mark.parametrize("case", cases("schedule/"), ids=lambda case: case["name"])
def test_the_published_sequences(case):
    milestones = Milestones(rule_of(case["input"]))
    for loss, (verdict, lr) in zip(case["input"]["val_losses"], case["expected"], strict=True):
        assert NUMBERS[milestones.tell(loss)] == verdict
        assert milestones.lr == pytest.approx(lr, abs=case["tolerance"])


@pytest.mark.parametrize("case", cases("schedule/"), ids=lambda case: case["name"])
def test_resumed_anywhere_it_goes_on_by_the_same_rule(case):
    losses = case["input"]["val_losses"]
    for cut in range(len(losses)):
        milestones = Milestones(rule_of(case["input"]))
        for loss in losses[:cut]:
            milestones.tell(loss)
        again = Milestones.from_state(json.loads(json.dumps(milestones.state())))
        assert again.rule == milestones.rule
        for loss, (verdict, lr) in zip(losses[cut:], case["expected"][cut:], strict=True):
            assert NUMBERS[again.tell(loss)] == verdict
            assert again.lr == pytest.approx(lr, abs=case["tolerance"])


def test_what_is_no_rule_is_refused():
    with pytest.raises(UserError, match=r"lr_stop: got 0\.1; allowed: above 0, at most lr = 0\.01"):
        Rule(lr=0.01, lr_stop=0.1)
    with pytest.raises(UserError, match=r"gamma: got 1\.0; allowed: between 0 and 1"):
        Rule(lr=0.01, lr_stop=0.01, gamma=1.0)
    with pytest.raises(UserError, match="look_ahead: got 0; allowed: 1 or more"):
        Rule(lr=0.01, lr_stop=0.01, look_ahead=0)


def test_nan_and_losses_behind_the_end_are_refused():
    milestones = Milestones(Rule(lr=0.01, lr_stop=0.01, look_ahead=1))
    with pytest.raises(UserError, match="loss: got nan"):
        milestones.tell(math.nan)
    assert milestones.tell(1.0) == "new best" and milestones.tell(1.0) == "stop"
    with pytest.raises(UserError, match="none behind the end"):
        milestones.tell(0.5)
