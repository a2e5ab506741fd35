"""The benchmark of partial channels at a tiny size: its checks hold and it prints what it measured."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import partial_channels
import pytest
import torch


@pytest.mark.slow
def test_the_fractions_hold_and_a_ratio_is_printed(capsys):
    threads = str(torch.get_num_threads())
    partial_channels.main(["--sizes", "8", "3", "2", "8", "--rounds", "2", "--threads", threads])
    printed = capsys.readouterr().out
    assert "bytes, exactly 1/4" in printed and "depthwise 1/4, full 1/16, exactly" in printed
    assert "DARTS" in printed and "quartiles" in printed
