"""Lines of compiled code are dropped from standard output, everything else comes through."""

import os
import threading

import pytest

from archsmith.core.clean_stdout import without_lines


def test_only_the_named_lines_are_dropped_also_those_of_other_threads(capfd):
    def other():
        os.write(1, b"other thread\n")

    with without_lines((b"stray",)):
        os.write(1, b"stray line\nkept: stray\n")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    os.write(1, b"stray after\n")
    assert capfd.readouterr().out == "kept: stray\nother thread\nstray after\n"


def test_standard_output_comes_back_after_an_error(capfd):
    with pytest.raises(ValueError, match="inside"), without_lines((b"stray",)):
        os.write(1, b"stray\nbefore\n")
        raise ValueError("inside")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nafter\n"
