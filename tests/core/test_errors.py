import pickle

import pytest

from archsmith.core.errors import ArchsmithError, Interrupted, MissingExtra, Shown, UserError


def test_user_error_names_field_given_allowed_and_what_to_do() -> None:
    error = UserError("budget", "macs<=0", allowed="a positive number.", hint="write macs<=0.5x")
    assert str(error) == "budget: got 'macs<=0'; allowed: a positive number. write macs<=0.5x"
    assert (error.field, error.given, error.hint) == ("budget", "macs<=0", "write macs<=0.5x")


def test_prepared_text_is_shown_without_quotes() -> None:
    assert str(UserError("data", Shown("3 of 5 files"), allowed="all 5")) == "data: got 3 of 5 files; allowed: all 5."


@pytest.mark.parametrize(
    "error",
    [
        UserError("budget", Shown("nothing"), allowed="a limit", hint="add one"),
        MissingExtra("onnx", "onnx", "The ONNX export"),
        Interrupted("asked to stop"),
    ],
)
def test_errors_cross_process_boundaries_whole(error: ArchsmithError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_missing_extra_names_the_extra_that_brings_the_package() -> None:
    with pytest.raises(ImportError, match=r"ONNX export needs the package 'onnx'.*pip install 'archsmith\[onnx\]'"):
        raise MissingExtra("onnx", "onnx", "The ONNX export")
